"""Run a call under many schedules with all checks on.

Contract: `check(call)` executes every kernel that the call launches under the schedules "early", "late" and a number of random ones, and compares the
results of all runs bit for bit. Silent when all is well; else a SimulatorError says what fired and how to run exactly that schedule again.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cuflash.arrays.borrowing import CPU, Array, borrow
from cuflash.errors import DeviceError, DTypeError, OptionError, SimulatorError
from cuflash.simulator.module import Counters, Launch, record_launches
from cuflash.simulator.options import SCHEDULES, configure

Bytes = npt.NDArray[np.uint8]

_MAX_DIFFERENCES = 3  # that a message shows


@dataclass(frozen=True)
class CheckReport:
    """What `check` did.

    Attributes:
        runs: (schedule, seed) of every run of the call; the seed is 0 where the schedule is not random.
        kernels: names of the kernels that each run launched, in order.
        compared: the arrays whose bits were compared, such as "result[0]: float16 (2, 64, 4, 32)"; empty if none were.
    """

    runs: tuple[tuple[str, int], ...]
    kernels: tuple[str, ...]
    compared: tuple[str, ...]

    def __str__(self) -> str:
        counts = {schedule: sum(run == schedule for run, _ in self.runs) for schedule in dict.fromkeys(run for run, _ in self.runs)}
        schedules = ", ".join(f"{count} {schedule}" for schedule, count in counts.items())
        same = "; the same bits in " + ", ".join(self.compared) if self.compared else "; no results compared"
        return f"{len(self.runs)} runs ({schedules}) of {', '.join(self.kernels)}: no check fired{same}"


@dataclass(frozen=True)
class _Snapshot:
    """A copy of an array's elements in logical order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    def elements(self) -> Bytes:
        """One row of bytes per element."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(self.data, np.uint8).reshape(count, -1)

    def element(self, number: int) -> str:
        """An element for people."""
        raw = self.elements()[number].tobytes()
        bits = f"0x{int.from_bytes(raw, 'little'):0{2 * len(raw)}x}"
        if self.dtype == "bfloat16":
            return f"{np.frombuffer(bytes(2) + raw, np.float32)[0]:.6g} ({bits})"
        try:
            return f"{np.frombuffer(raw, self.dtype)[0]!s} ({bits})"
        except TypeError:
            return bits


def _memory(array: Array) -> Bytes:
    """The array's own bytes: its shape and one more dimension for the bytes of an element."""
    low, high = array.byte_range
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
    strides = (*(stride * array.itemsize for stride in array.strides), 1)
    return np.lib.stride_tricks.as_strided(memory[array.pointer - low :], (*array.shape, array.itemsize), strides)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Array]]:
    """The arrays in nested tuples, lists, mappings and dataclasses, each with the expression that leads to it."""
    if value is None or isinstance(value, Counters):  # how often something was tried may differ
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, item in zip(value._fields, value, strict=True):
            yield from _leaves(item, f"{name}.{field}")
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}[{number}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from _leaves(getattr(value, entry.name), f"{name}.{entry.name}")
    else:
        array = borrow(np.asarray(value) if isinstance(value, (np.generic, int, float)) else value, name)
        if array.device != CPU:
            raise DeviceError(name, f"an array on {array.device[0]}", "memory on the CPU", "The simulator runs calls on arrays on the CPU.")
        yield name, array


def _snapshots(value: Any, name: str) -> dict[str, _Snapshot]:
    return {path: _Snapshot(array.dtype, array.shape, _memory(array).tobytes()) for path, array in _leaves(value, name)}


def _restore(outputs: Sequence[Array], contents: Iterable[_Snapshot]) -> None:
    for array, snapshot in zip(outputs, contents, strict=True):
        memory = _memory(array)
        memory[...] = np.frombuffer(snapshot.data, np.uint8).reshape(memory.shape)


def _compare(first: Mapping[str, _Snapshot], other: Mapping[str, _Snapshot], how: str) -> str:
    """What differs, or ""."""
    if list(first) != list(other):
        return f"the call returned {', '.join(other) or 'nothing'}, but {', '.join(first) or 'nothing'} {how}"
    for name, one in first.items():
        two = other[name]
        if str(one) != str(two):
            return f"{name} is {two}, but was {one} {how}"
        if one.data == two.data:
            continue
        where = np.flatnonzero((one.elements() != two.elements()).any(axis=1))
        lines = [f"{name}: {where.size} of {one.elements().shape[0]} elements are not the same bits as {how}"]
        for number in where[:_MAX_DIFFERENCES]:
            index = tuple(int(i) for i in np.unravel_index(number, one.shape))
            lines.append(f"  {name}[{', '.join(map(str, index))}] = {two.element(number)}, was {one.element(number)}")
        return "\n".join(lines)
    return ""


def _schedule_runs(schedules: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    if isinstance(schedules, str):
        raise OptionError("schedules", repr(schedules), "several names, such as a list", f"Write schedules=[{schedules!r}].")
    numbers = list(seeds) if isinstance(seeds, Iterable) else [None]
    if not all(isinstance(seed, (int, np.integer)) for seed in numbers):
        hint = "seeds=range(5) makes five runs, seeds=[5] repeats the run of one report."
        raise OptionError("seeds", repr(seeds), "ints, in a range or a list", hint)
    for schedule in schedules:
        if schedule not in SCHEDULES:
            raise OptionError("schedules", repr(schedule), "some of " + ", ".join(SCHEDULES), "Name known schedules only.")
        runs += [(schedule, int(seed)) for seed in numbers] if schedule == "random" else [(schedule, 0)]
    if not runs:
        raise OptionError("schedules", "none, or only random ones and no seeds", "at least one run", "Leave it out to use all.")
    return runs


def _check_launches(launches: Sequence[Launch], schedule: str, seed: int) -> None:
    """Whether the launches were ours to schedule."""
    if not launches:
        hint = "Kernels run here only for arrays on the CPU, and an empty problem launches none."
        raise OptionError("call", "a call that launched no kernel on the simulator", "at least one launch", hint)
    for launch in launches:
        if (launch.options.schedule, launch.options.seed) != (schedule, seed):
            got = f"a call that launches {launch.kernel} with options of its own"
            raise OptionError("call", got, "launches that take the current options", "Leave out its options= and its own configure(...).")


def check(
    call: Callable[[], Any],
    seeds: Iterable[int] = range(20),
    schedules: Iterable[str] = SCHEDULES,
    deterministic: bool = True,
    *,
    outputs: Any = (),
    checks: bool = True,
    threads: int | None = None,
) -> CheckReport:
    """Run a call under every schedule, with all checks on, and compare the results.

        check(lambda: cuflash.scaled_dot_product_attention(query, key, value))
        check(lambda: cuflash.scaled_dot_product_attention(query, key, value, out=out), outputs=out)

    Args:
        call: takes nothing and launches kernels on the simulator. Returns an array on the CPU of any library, or any nesting of tuples, lists, mappings
            and dataclasses of arrays; None where it has no result.
        seeds: of the random schedule, one run each.
        schedules: which of "early", "late" and "random".
        deterministic: the results of all runs must be the same bit for bit. False: only the checks count.
        outputs: arrays that the call writes into, nested as results may be. They are results too, and have their present contents again at the beginning
            of each run, so that a call may also add to them.
        checks: False leaves out the checks of accesses, so that only the results count.
        threads: of the simulator; None: as configured.

    Returns:
        What was run and compared.

    Raises:
        SimulatorError: a check fired, whose name is the error's `check`, or results differ (`check` is then "nondeterministic"). The message names
            schedule and seed, and how to repeat that run.
        OptionError: an option is not known, or the call launched nothing that could be checked.
        DeviceError, DTypeError: a result that is not an array on the CPU, an output that cannot be written.
    """
    runs = _schedule_runs(schedules, seeds)
    written = [array for _, array in _leaves(outputs, "outputs")]
    for array in written:
        if array.read_only:
            raise DTypeError("outputs", "a read-only array", "memory that the call may write to", "Leave out what is not written.")
    before = list(_snapshots(outputs, "outputs").values())
    options: dict[str, Any] = {"checks": checks} if threads is None else {"checks": checks, "threads": threads}
    reference: dict[str, _Snapshot] = {}
    kernels: tuple[str, ...] = ()
    for number, (schedule, seed) in enumerate(runs):
        _restore(written, before)
        again = f'\n  again: with cuflash.simulator.configure(schedule="{schedule}", seed={seed}, checks={checks}, threads=1): call()'
        with configure(schedule=schedule, seed=seed, **options), record_launches() as launches:
            try:
                result = call()
            except SimulatorError as error:
                raise SimulatorError(f"schedule {schedule!r}, seed {seed}: {error}{again}", check=error.check) from error
        _check_launches(launches, schedule, seed)
        if not deterministic:
            kernels = tuple(launch.kernel for launch in launches)
            continue
        results = _snapshots(result, "result") | _snapshots(outputs, "outputs")
        if number == 0:
            reference, kernels = results, tuple(launch.kernel for launch in launches)
            continue
        difference = _compare(reference, results, f"under schedule {runs[0][0]!r}, seed {runs[0][1]}")
        if difference:
            raise SimulatorError(f"schedule {schedule!r}, seed {seed}: [nondeterministic] {difference}{again}", check="nondeterministic")
    return CheckReport(tuple(runs), kernels, tuple(f"{name}: {snapshot}" for name, snapshot in reference.items()))
