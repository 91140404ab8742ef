"""Every exception that cuflash raises on purpose.

A message about a user's input names the argument, what came, what was expected and the way out, so each of those is a field of `ArgumentError`.
"""

from __future__ import annotations

_MAX_PART, _MAX_MESSAGE = 1000, 50_000


def shortened(text: str, limit: int = 100) -> str:
    """What somebody passed may have megabytes; a message does not repeat them."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... ({len(text) - limit} characters) ... {text[-(limit // 2) :]}"


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # an int of thousands of digits, or an object of a class that cannot be printed
        return f"an object of type {type(value).__name__}"


class CuflashError(Exception):
    """Base class of all cuflash exceptions."""


class ArgumentError(CuflashError, ValueError):
    """An argument that cannot be used as it came.

    Attributes:
        argument: name of the offending argument as the caller knows it.
        got: what came.
        expected: what would have been accepted.
        hint: what to do about it.
    """

    def __init__(self, argument: str, got: object, expected: str, hint: str) -> None:
        self.argument, self.got, self.expected, self.hint = (shortened(_text(part), _MAX_PART) for part in (argument, got, expected, hint))
        super().__init__(f"{self.argument}: got {self.got}; expected {self.expected}. {self.hint}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.argument, self.got, self.expected, self.hint)


class ShapeError(ArgumentError):
    """Ranks, extents or layouts that do not fit together."""


class DTypeError(ArgumentError, TypeError):
    """An element type that is not supported, or types that differ."""


class DeviceError(ArgumentError):
    """Arrays on different devices or of different kinds, or a device that is not supported."""


class KeywordError(ArgumentError, TypeError):
    """Keyword arguments that the function does not have, all of them; the message says what each is called here."""


class OptionError(ArgumentError):
    """A scalar option outside its domain, or offsets of packed sequences that are none."""


class TileError(ArgumentError):
    """A tile that breaks a rule of the device; the message carries the nearest legal tiles."""


class UnsupportedError(ArgumentError, NotImplementedError):
    """A combination that cuflash has no kernel for; it never falls back to a slower path silently."""


class SetupError(CuflashError, ImportError):
    """Something that has to be installed is missing; the message is the command to run."""


class CompileError(CuflashError, RuntimeError):
    """The compiler refused a kernel; carries its log and the configuration."""

    def __init__(self, message: str, *, log: str = "", config: str = "") -> None:
        self.log = log
        self.config = config
        parts = [message]
        if log:
            parts.append("--- compiler log ---\n" + log.strip())
        if config:
            parts.append("--- configuration ---\n" + config.strip())
        super().__init__("\n".join(parts))


class CompilationForbiddenError(CompileError):
    """A kernel is not in the cache, and `CUFLASH_COMPILE=forbid`.

    Attributes:
        missing: the kernel and the cache that lacks it.
        way_out: what compiles it.
    """

    def __init__(self, missing: str, way_out: str = "Make the same call once where compiling is allowed") -> None:
        self.missing = missing
        self.way_out = way_out
        super().__init__(f"{missing}, and CUFLASH_COMPILE=forbid. {way_out}, or unset CUFLASH_COMPILE.")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.missing, self.way_out)


class TuningError(CuflashError, RuntimeError):
    """A tuning run cannot go on, and no tile that it tried is to blame: no memory, no GPU, or a default tile that does not run."""


class SimulatorError(CuflashError, RuntimeError):
    """The virtual machine stopped a kernel: an illegal access, a deadlock, an unknown instruction.

    Attributes:
        check: name of the check that fired, such as "race"; "" where it was none, as for an instruction that is not supported.
    """

    def __init__(self, message: str, *, check: str = "") -> None:
        self.check = check
        super().__init__(shortened(message, _MAX_MESSAGE))
