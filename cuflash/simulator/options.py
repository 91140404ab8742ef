"""Options of a launch, and the default that `configure` changes for a while.

Contract: frozen values in a context variable, so that threads and tasks do not see each other's.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cuflash.errors import OptionError
from cuflash.simulator.kernel_profile import Profile

SCHEDULES = ("early", "late", "random")


@dataclass(frozen=True)
class Options:
    """How a kernel is executed.

    Attributes:
        threads: number of host threads that blocks are spread over; None: `CUFLASH_SIMULATOR_THREADS`, else all cores.
        schedule: when asynchronous work completes: "early" at once, "late" when something waits for it, "random" in between, with warps
            interleaved at random too.
        seed: of the random schedule; the same seed gives the same schedule whatever the number of threads.
        checks: test every access; without them a wild pointer crashes the process.
        isa_rules: with checks, also report what the PTX ISA demands but NVIDIA's own kernels leave out (check "isa-rules"): switch it off for kernels of
            others.
        max_instructions: a warp that executes more is reported as an endless loop. The default is some ten seconds for each warp.
        profile: what launches are counted in; None counts nothing. `cuflash.simulator.profile()` makes one for a while.
    """

    threads: int | None = None
    schedule: Literal["early", "late", "random"] = "late"
    seed: int = 0
    checks: bool = True
    isa_rules: bool = True
    max_instructions: int = 2**30
    profile: Profile | None = None

    def __post_init__(self) -> None:
        for name, kind, expected in (
            ("seed", int, "an int"),
            ("checks", bool, "True or False"),
            ("isa_rules", bool, "True or False"),
            ("max_instructions", int, "an int"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise OptionError(name, repr(value), expected, "Leave it out for the default.")
        if self.threads is not None and (not isinstance(self.threads, int) or isinstance(self.threads, bool)):
            raise OptionError("threads", repr(self.threads), "a positive number or None", "Leave it out to use all cores.")
        if self.profile is not None and not isinstance(self.profile, Profile):
            raise OptionError("profile", repr(self.profile), "a Profile or None", "with cuflash.simulator.profile() as profile: makes one.")
        if not 0 <= self.seed < 2**63:
            raise OptionError("seed", self.seed, "a number from 0 to 2**63 - 1", "Leave it out for 0.")
        if not 1 <= self.max_instructions < 2**63:
            raise OptionError("max_instructions", self.max_instructions, "a positive number below 2**63", "Leave it out for 2**30.")
        if self.threads is not None and self.threads < 1:
            raise OptionError("threads", self.threads, "a positive number or None", "Leave it out to use all cores.")
        if self.schedule not in SCHEDULES:
            raise OptionError("schedule", repr(self.schedule), "one of " + ", ".join(SCHEDULES), "Choose one of these.")

    def num_threads(self) -> int:
        """The number of threads to start."""
        if self.threads is not None:
            return self.threads
        variable = os.environ.get("CUFLASH_SIMULATOR_THREADS", "")
        if variable:
            if not (variable.isdecimal() and variable.isascii() and int(variable) > 0):
                raise OptionError("CUFLASH_SIMULATOR_THREADS", repr(variable), "a positive number", "Unset it to use all cores.")
            return int(variable)
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


_current: contextvars.ContextVar[Options] = contextvars.ContextVar("cuflash_simulator_options", default=Options())  # noqa: B039  # frozen


def current_options() -> Options:
    """The options that a launch uses when it is given none."""
    return _current.get()


@contextlib.contextmanager
def configure(**fields: Any) -> Iterator[Options]:
    """Change fields of the current options inside a `with` block."""
    options = dataclasses.replace(_current.get(), **fields)
    token = _current.set(options)
    try:
        yield options
    finally:
        _current.reset(token)


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Count what launches inside a `with` block do, per kernel and per source line.

    Yields:
        the profile, which grows with every launch that ends without a report.
    """
    with configure(profile=Profile()) as options:
        assert options.profile is not None
        yield options.profile
