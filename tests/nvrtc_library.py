"""An NVRTC library of any version, by ctypes, with what `cuflash.jit.compiler` asks of CuPy's binding, which knows one version only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "CUFLASH_TEST_NVRTC"
"""Environment variable: files libnvrtc.so.* or directories that have one somewhere below, separated as in PATH."""


def libraries() -> list[Path]:
    """What the variable names."""
    found: list[Path] = []
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name)
        here = [path] if path.is_file() else sorted(path.rglob("libnvrtc.so.*"))
        if not here:
            raise FileNotFoundError(f"{VARIABLE} names {name}, where there is no libnvrtc.so.*")
        found += here
    return found


class NvrtcError(RuntimeError):
    """NVRTC refused."""


class NvrtcLibrary:
    """With the names of `cupy.cuda.nvrtc`. Its fellow libnvrtc-builtins is found beside it, or where the process has loaded one of the same version."""

    NVRTCError = NvrtcError

    def __init__(self, path: Path) -> None:
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def getVersion(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def getSupportedArchs(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        return tuple(archs)

    def createProgram(self, text: str, name: str, _headers: Sequence[str], _names: Sequence[str]) -> ctypes.c_void_p:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        return program

    def compileProgram(self, program: ctypes.c_void_p, options: Sequence[str]) -> None:
        self._call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options)))

    def getProgramLog(self, program: ctypes.c_void_p) -> str:
        return self._result("ProgramLog", program).decode()

    def getCUBIN(self, program: ctypes.c_void_p) -> bytes:
        return self._result("CUBIN", program)

    def getPTX(self, program: ctypes.c_void_p) -> bytes:
        return self._result("PTX", program)

    def destroyProgram(self, program: ctypes.c_void_p) -> None:
        self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _result(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{name}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{name}", program, data)
        return data.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise NvrtcError(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")
