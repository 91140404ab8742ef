"""Decoded programs are kept on disk, and nothing that happens to the disk matters."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated import PRELUDE, compile_cuda, pack

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options, parser, program_cache

SOURCE = """
extern "C" __global__ void kernel(int* out) {
  out[threadIdx.x] = 3 * threadIdx.x + blockIdx.x;
}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the core stays where it is, for it is loaded."""
    Module(compile_cuda(SOURCE))
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    return tmp_path / "simulator" / "programs"


@pytest.fixture
def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: object) -> Any:
        raise AssertionError("parsed")

    return lambda: monkeypatch.setattr(parser, "parse_kernel", refuse)


def result_of(module: Module) -> list[int]:
    out = np.zeros(32, np.int32)
    module.launch((1, 1, 1), (32, 1, 1), 0, pack([out]), [(out.ctypes.data, out.nbytes, "out")], Options(threads=1))
    return list(out)


EXPECTED = [3 * i for i in range(32)]


def test_a_second_module_neither_parses_nor_decodes(folder: Path, forbid_parsing: Callable[[], None]) -> None:
    first = Module(compile_cuda(SOURCE), keep=True)
    assert len(list(folder.iterdir())) == 1
    forbid_parsing()
    second = Module(compile_cuda(SOURCE), keep=True)
    assert result_of(first) == result_of(second) == EXPECTED
    assert (second.name, second.param_bytes) == (first.name, first.param_bytes) == ("kernel", 8)


@pytest.mark.usefixtures("folder")
def test_a_report_of_a_kept_program_names_the_line() -> None:
    Module(compile_cuda(SOURCE), keep=True)
    module = Module(compile_cuda(SOURCE), keep=True, sources={"test.cu": PRELUDE + SOURCE})
    assert "kernel" not in vars(module)  # not parsed
    with pytest.raises(SimulatorError, match=r"test\.cu:3: out\[threadIdx\.x\]"):
        module.launch((1, 1, 1), (32, 1, 1), 0, pack([np.zeros(1, np.int32)]), [])


def test_damaged_files_are_decoded_anew(folder: Path) -> None:
    Module(compile_cuda(SOURCE), keep=True)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    flipped = [bytes([*whole[:at], whole[at] ^ 1 << int(rng.integers(8)), *whole[at + 1 :]]) for at in range(0, len(whole), 97)]
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[100:], *flipped):
        path.write_bytes(content)
        assert result_of(Module(compile_cuda(SOURCE), keep=True)) == EXPECTED
    path.write_bytes(b"")
    Module(compile_cuda(SOURCE), keep=True)
    assert path.read_bytes() == whole
    assert list(folder.iterdir()) == [path]


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "file"))  # no directory can be made below a file
    assert result_of(Module(compile_cuda(SOURCE), keep=True)) == EXPECTED


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert result_of(Module(compile_cuda(SOURCE), keep=True)) == EXPECTED
    assert list(folder.iterdir()) == []


def test_the_key_covers_text_entry_and_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {program_cache.key("a", None), program_cache.key("b", None), program_cache.key("a", "entry"), program_cache.key("a", None, True)}
    monkeypatch.setattr(program_cache, "_decoder_fingerprint", lambda: b"another")
    keys.add(program_cache.key("a", None))
    assert len(keys) == 5


def test_programs_with_addresses_of_this_process_are_not_kept(folder: Path) -> None:
    source = """
__constant__ int table[4] = {5, 6, 7, 8};
extern "C" __global__ void kernel(int* out) { out[threadIdx.x] = table[threadIdx.x & 3]; }
"""
    assert result_of(Module(compile_cuda(source), keep=True))[:5] == [5, 6, 7, 8, 5]
    assert list(folder.glob("*")) == []


def test_nothing_is_kept_unasked(folder: Path) -> None:
    Module(compile_cuda(SOURCE))
    assert not folder.exists()


def test_clearing(folder: Path) -> None:
    Module(compile_cuda(SOURCE), keep=True)
    (folder / "left.tmp").write_text("by a process that was killed")
    program_cache.clear()
    assert list(folder.iterdir()) == []
    program_cache.clear()
