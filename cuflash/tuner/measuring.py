"""One call on arrays of this process, with any tile for any of its kernels: whether its results are right, and how long the kernel takes.

On a GPU, events stand around the launches of the kernel alone. Before each, outside of what is timed, counters are cleared as each call clears them, what the
kernel needs of small kernels runs again (row statistics, lists of tiles), and memory twice as large as L2 is written, so that no operand lies there; that also
gives the host time to launch ahead. On the simulator the results are as right as on a GPU, but there is no time: the timing model gives one.

Results and workspace are NaN before a candidate's first run: memory that the last candidate gave back holds right values, which a tile that writes nothing
must not be taken for.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy

from cuflash import reference
from cuflash.arrays.borrowing import Array, bfloat16
from cuflash.arrays.frameworks import BFloat16Bits
from cuflash.errors import SetupError
from cuflash.hardware.architectures import architecture
from cuflash.hardware.device import Device
from cuflash.planning.kernel_plan import Buffer
from cuflash.planning.kernel_specs import BACKWARD_DKDV_MERGE, BACKWARD_DQ_CONVERT, MERGE_ATTENTION
from cuflash.planning.plan import Plan
from cuflash.planning.planner import make_plan
from cuflash.problem.checks import check_backward, make_problem
from cuflash.problem.features import drawn_from
from cuflash.problem.operands import Operands, borrowed
from cuflash.problem.options import Options
from cuflash.problem.tile import Tile
from cuflash.runtime import launch
from cuflash.runtime.prepared import PreparedBackward, PreparedCall, PreparedForward
from cuflash.tuned.table import UNTIMED, Timing
from cuflash.tuner.comparing import ALLOWED, FLOOR, excess
from cuflash.tuner.described_calls import Described, DescribedCall
from cuflash.tuner.monitor import Monitor
from cuflash.tuner.tasks import Task, predicted_milliseconds

JUDGED_PAIRS = 2**22
"""Up to so many pairs of query and key the default tile's output is compared with the formula in float64."""

_NOT_OF_THE_FORMULA = ("allow_tf32", "need_attn_mask_grad", "deterministic", "max_seqlen_q", "max_seqlen_kv")

_DRAWN = 2**20 - 3
"""Random numbers that are drawn for an array; a larger one repeats them. A prime, so that rows, heads and batches differ."""

_NAN_BYTE = 0xFF  # NaN of every floating point type, if all bytes have it

FIRST_LAUNCHES, MOST_LAUNCHES = 3, 100
SECONDS_EACH = 0.05


class Bench:
    """A pass of a call.

    Attributes:
        device: where.
        timer: "events" or "model".
    """

    def __init__(self, call: DescribedCall, backward: bool, device: Device) -> None:
        self._call, self._backward, self.device = call, backward, device
        self.timer = "model" if device.kind == "simulator" else "events"
        self._library: Any = library_of(device)
        arrays = {name: self._random(described, seed) for seed, (name, described) in enumerate(call.operands.items())}
        arrays |= {name: self._placed(value) for name, value in call.arguments.items() if name in Operands._fields}
        self._operands, self._options = call.operands_and_options(arrays, return_lse=True)
        if not backward and self._options.need_attn_mask_grad:
            self._options = self._options._replace(need_attn_mask_grad=False)
        self._monitor = Monitor(device)
        self._flushed: Any = None
        self.wrong_default = ""
        if backward:
            out, lse = Pass(self._operands, self._options, False, device).run()
            like = call.operands["query"]
            grad_out = Described(tuple(out.shape), tuple(range(len(out.shape))), like.dtype)
            self._operands = self._operands._replace(grad_out=self._random(grad_out, 9), out=out, lse=lse)
        self._wanted = [self._as_float32(x) for x in self._compared(Pass(self._operands, self._options, backward, device).run())]
        error = self._error_of_default()
        if not error <= 1.0:
            self.wrong_default = f"the default tile's result is {error:.1f} times as far from the formula's as rounding explains"

    def _compared(self, results: list[Any]) -> list[Any]:
        """All but lse, which has infinities."""
        return results if self._backward else results[:1]

    def _error_of_default(self) -> float:
        """`excess` of what the other tiles are compared with over the formula in float64, where that is small enough; else 0."""
        of, options = self._operands, self._options
        problem = make_problem(borrowed(of, options), options)
        pairs = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_kv
        if pairs > JUDGED_PAIRS or options.num_heads is not None or not options.batch_first:
            return 0.0
        named = {name: value for name, value in self._call.arguments.items() if name not in _NOT_OF_THE_FORMULA}
        inputs = [reference.to_float64(x) for x in (of.query, of.key, of.value)]
        if self._backward:
            judge = reference.varlen_attention_backward if options.varlen else reference.attention_backward
            want: Any = judge(reference.to_float64(of.grad_out), *inputs, out=reference.to_float64(of.out), **named)[:3]
        else:
            want = (reference.varlen_attention if options.varlen else reference.attention)(*inputs, **named)[:1]
        # TF32 rounds the products of a row whose terms cancel, but not the sum that is subtracted from them.
        floor = self._allowed if self._allowed == ALLOWED["tf32"] else FLOOR
        return max(excess(reference.to_float64(got), exact, self._allowed, floor) for got, exact in zip(self._wanted, want, strict=False))

    @property
    def _allowed(self) -> float:
        dtype = self._call.operands["query"].dtype
        return ALLOWED["tf32" if dtype == "float32" and self._options.allow_tf32 else dtype]

    def evaluate(self, task: Task, tile: Tile, give_up_at: float | None) -> Timing:
        """See `session.Evaluator`; raises whatever the candidate raises."""
        candidate = Pass(self._operands, self._options._replace(tile={task.kernel.name: tile}), self._backward, self.device)
        results = self._compared(candidate.run())
        apart = [excess(self._as_float32(got), want, self._allowed) for got, want in zip(results, self._wanted, strict=True)]
        if not all(error <= 1.0 for error in apart):
            times = ", ".join(f"{error:.1f}" for error in apart)
            return Timing(tile, note=f"wrong: {times} times as far from the default tile's result as rounding explains")
        if self.timer == "model":
            predicted = predicted_milliseconds(task, tile, self.device)
            return _timing(tile, [predicted], None) if predicted is not None else Timing(tile, note=UNTIMED)
        return self._timed(candidate, task.kernel.name, tile, give_up_at)

    # --- Time -----------------------------------------------------------------------------------------------------------------------------

    def _timed(self, candidate: Pass, kernel: str, tile: Tile, give_up_at: float | None) -> Timing:
        events = self._library.cuda
        stream = events.Stream.null

        def measure(count: int) -> list[float]:
            pairs = [(events.Event(), events.Event()) for _ in range(count)]
            for start, end in pairs:
                candidate.launch_before(kernel)
                self._flush()
                start.record(stream)
                candidate.launch(kernel)
                end.record(stream)
            self._synchronize()
            return [float(events.get_elapsed_time(start, end)) for start, end in pairs]

        measure(1)
        times = measure(FIRST_LAUNCHES)
        if give_up_at is not None and min(times) > give_up_at:
            return _timing(tile, times, None, "left early")
        once = max(statistics.median(times), 1e-3) / 1e3
        self._monitor.watch()
        times += measure(max(FIRST_LAUNCHES, min(MOST_LAUNCHES, int(SECONDS_EACH / once))))
        return _timing(tile, times, self._monitor.sm_clock())

    def _flush(self) -> None:
        """Leave nothing of the operands in L2."""
        if self._flushed is None:
            self._flushed = self._library.empty(2 * architecture(self.device.arch).l2_bytes, numpy.uint8)
        self._flushed.data.memset_async(0, self._flushed.nbytes)

    def _synchronize(self) -> None:
        self._library.cuda.runtime.deviceSynchronize()

    # --- Arrays ---------------------------------------------------------------------------------------------------------------------------

    def _random(self, of: Described, seed: int) -> Any:
        """Normally distributed numbers in the same order in memory."""
        shape = tuple(of.shape[axis] for axis in of.axes)
        back = tuple(of.axes.index(axis) for axis in range(len(shape)))
        block = numpy.random.default_rng(seed).standard_normal(min(prod(shape), _DRAWN), numpy.float32)
        if of.dtype == "bfloat16":  # the upper halves of float32
            bits = (block.view(numpy.uint32) >> 16).astype(numpy.uint16)
            return bfloat16(self._library.asarray(numpy.resize(bits, shape)).transpose(back))
        return self._library.asarray(numpy.resize(block.astype(of.dtype), shape)).transpose(back)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, BFloat16Bits):
            return bfloat16(self._library.asarray(value.bits))
        return self._library.asarray(value) if isinstance(value, numpy.ndarray) else value

    @staticmethod
    def _as_float32(x: Any) -> Any:
        return x.to_float32() if isinstance(x, BFloat16Bits) else x.astype(numpy.float32)


def _timing(tile: Tile, times: list[float], sm_clock_mhz: int | None, note: str = "") -> Timing:
    p20, median, p80 = (round(float(x), 6) for x in numpy.quantile(times, (0.2, 0.5, 0.8)))
    return Timing(tile, median, p20, p80, len(times), sm_clock_mhz, note)


class Pass:
    """One pass, prepared with a tile, and memory for its results."""

    def __init__(self, operands: Operands, options: Options, backward: bool, device: Device) -> None:
        arrays = borrowed(operands, options, backward=backward)
        problem = make_problem(arrays, options)
        plan = make_plan(problem, device, backward=backward, tile=options.tile)
        executables = [launch.executable(kernel, device) for kernel in plan.kernels]
        self._plan, self._held, self._prepared = plan, [operands], _prepare(plan, executables, arrays, backward)
        self._addresses, _ = drawn_from(options.dropout_p, operands.dropout_seed)
        self._addresses |= {name: array.pointer for name, array in arrays.items()}
        self._results = [self._allocated(buffer) for buffer in plan.outputs]
        for buffer in plan.workspace:
            self._allocated(buffer)
        for buffer in (*plan.outputs, *plan.workspace):
            if buffer.nbytes:
                launch.fill_memory(device, self._addresses[buffer.name], buffer.nbytes, 0, _NAN_BYTE)

    def _allocated(self, buffer: Buffer) -> Any:
        made, self._addresses[buffer.name] = self._prepared.allocate(buffer)
        self._held.append(made)
        return made

    def run(self) -> list[Any]:
        """All kernels; the results."""
        self._prepared.launch_all(self._addresses)
        return [self._prepared.framework.finish(result) for result in self._results]

    def launch_before(self, kernel: str) -> None:
        """Clear what each call clears, and run the kernels without matrix products that the named one comes behind."""
        self._prepared.clear_counters(self._addresses, 0)
        for planned, launched in zip(self._plan.kernels, self._prepared.launches, strict=True):
            if planned.name == kernel:
                return
            if not planned.spec.is_tiled:
                self._launch(launched)

    def launch(self, kernel: str) -> None:
        """The named kernel, and what makes results of its parts, of which a tile decides how many there are, or of its sums."""
        for planned, launched in zip(self._plan.kernels, self._prepared.launches, strict=True):
            if planned.name == kernel or planned.spec in (MERGE_ATTENTION, BACKWARD_DKDV_MERGE, BACKWARD_DQ_CONVERT):
                self._launch(launched)

    def _launch(self, launched: Any) -> None:
        launched.executable.launch(launched.shape, launched.struct.fill(self._addresses), 0, ())


def library_of(device: Device) -> Any:
    """The library of the arrays.

    Raises:
        SetupError: CuPy is missing.
    """
    if device.kind == "simulator":
        return numpy
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise SetupError(f"CuPy cannot be imported ({error}). Install it: pip install 'cuflash[cuda13]'.") from error


def _prepare(plan: Plan, executables: Sequence[launch.Executable], arrays: Mapping[str, Array], backward: bool) -> PreparedCall:
    if not backward:
        return PreparedForward(plan, executables, arrays, None, None)
    problem = plan.problem
    views = check_backward(problem, arrays["grad_out"], arrays["out"], arrays["lse"], arrays.get("grad_lse"))
    return PreparedBackward(plan, executables, arrays, views)
