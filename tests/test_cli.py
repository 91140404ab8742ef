"""Each command of `python -m cuflash`, the README's example and examples/, run as a user does, from another directory."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import share_simulator

import cuflash
from cuflash.__main__ import main
from cuflash.cli import inspection
from cuflash.jit import compiler, disassembly
from cuflash.planning.kernel_plan import KernelPlan

ROOT = Path(__file__).resolve().parent.parent
needs_nvdisasm = pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)


def command(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "cuflash", *arguments], capture_output=True, text=True, cwd=directory, env=variables, check=False
    )


def here(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported everything already: for commands whose process does not matter."""
    before, environment, out, err = Path.cwd(), dict(os.environ), io.StringIO(), io.StringIO()
    os.chdir(directory)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    except SystemExit as exit_of_the_parser:
        status = int(exit_of_the_parser.code or 0)
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)  # a command may set the simulated architecture
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_alone_it_prints_help(tmp_path: Path) -> None:
    result = command(directory=tmp_path)
    assert result.returncode == 0
    for name in ("demo", "info", "inspect", "predict", "profile", "explain", "autotune", "warmup", "cache"):
        assert re.search(rf"^ +{name} ", result.stdout, re.MULTILINE), name


@pytest.mark.parametrize("arguments", [("--help",), ("profile", "--help"), ("cache",)])
def test_commands_survive_any_encoding(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = command(*arguments, directory=tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C", CUFLASH_CACHE_DIR=str(tmp_path / "Ä"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_cache_whose_path_is_no_text(tmp_path: Path, locale: str) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xff")
    environment = {"CUFLASH_CACHE_DIR": str(folder), "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "CUFLASH_DECODE": "0"}
    options = ("--head-dim", "16", "--arch", "sm_80", "--dtype", "float16", "--causal", "--forward-only")
    for compiled in (1, 0):  # found the second time
        result = command("warmup", *options, directory=tmp_path, **environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"{compiled} compiled now" in result.stdout
    assert command("cache", directory=tmp_path, **environment).returncode == 0
    assert len(list((folder / "kernels").glob("*.cubin"))) == 1


def test_a_plan_is_ascii() -> None:
    x = numpy.zeros((1, 4, 2, 8), numpy.float16)
    assert str(cuflash.plan(x, x, x, is_causal=True, window=(3, None), softcap=3.0)).isascii()


def test_version(tmp_path: Path) -> None:
    assert command("--version", directory=tmp_path).stdout.strip() == cuflash.__version__


def test_info_names_what_there_is_and_what_would_run(tmp_path: Path) -> None:
    result = command("info", directory=tmp_path, CUFLASH_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    for expected in (
        "CuPy",
        "NVRTC",
        "C++ for the simulator",
        str(tmp_path / "cache"),
        "ml_dtypes",
        "forward attention on",
        "forward_mma.cu",
    ):
        assert expected in result.stdout, expected


def test_info_works_where_everything_is_missing(tmp_path: Path) -> None:
    for missing in ("cupy", "ziglang", "rich"):
        (tmp_path / f"{missing}.py").write_text("raise ImportError('not here')\n")
    blocked = f"{tmp_path}{os.pathsep}{ROOT}"
    result = command("info", directory=tmp_path, PATH="", CXX="/nowhere", PYTHONPATH=blocked, CUFLASH_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert "pip install 'cuflash[cuda12]'" in result.stdout
    assert "It cannot run yet" in result.stdout


def test_inspect_as_json(tmp_path: Path) -> None:
    result = here("inspect", "--arch", "sm_80", "--head-dim", "64", "--dtype", "float16", "--forward-only", "--json", directory=tmp_path)
    reports = json.loads(result.stdout)
    assert [report["kernel"] for report in reports] == ["forward"]
    report = reports[0]
    assert report["arch"] == "sm_80"
    assert 32 < report["registers"] <= 255
    assert report["dynamic_shared_bytes"] > 0
    assert report["blocks_per_sm"] >= 1
    assert 0 < report["occupancy"] <= 1
    spills = report["spill_store_bytes"] + report["spill_load_bytes"] > 0
    assert bool(report["failures"]) == spills == (result.returncode == 1)


def test_inspect_of_a_kernel_of_wgmma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "1")
    result = here("inspect", "--arch", "sm_90", "--head-dim", "64", "--dtype", "float16", "--forward-only", "--json", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout)
    assert (report["kernel"], report["blocks_per_sm"]) == ("forward_wgmma", 1)
    assert 0.2 < report["predicted_matrix_share"] < 1


class _Planned(Exception):
    """Ends a command before it compiles."""


def test_inspect_shows_the_kernels_of_every_length_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_FORWARD_WGMMA", "")

    def stop(plans: Iterable[tuple[object, KernelPlan]]) -> None:
        raise _Planned([kernel.name for _, kernel in plans])

    monkeypatch.setattr(inspection, "inspect_kernels", stop)
    options = ("inspect", "--arch", "sm_90", "--head-dim", "128", "--dtype", "float16", "--forward-only")
    with pytest.raises(_Planned) as of_one_length:
        here(*options, directory=tmp_path)
    with pytest.raises(_Planned) as of_every_length:
        here(*options, "--every-length", directory=tmp_path)
    assert of_one_length.value.args[0] == ["forward_wgmma"]
    assert set(of_every_length.value.args[0]) == {"forward_wgmma", "forward", "forward_split", "merge_attention"}


KERNEL = ("--arch", "sm_80", "--head-dim", "64", "--dtype", "float16")
KERNEL_128 = ("--arch", "sm_80", "--head-dim", "128", "--dtype", "float16")  # docs/timing.md says what is odd about the one of 64


@needs_nvdisasm
def test_kernels_are_saved_and_predicted_from_files(tmp_path: Path) -> None:
    result = here("inspect", *KERNEL_128, "--forward-only", "--save", "kept", directory=tmp_path)
    assert result.returncode in (0, 1), result.stderr
    assert re.search(r"predicted sm_80 forward float16 128 full \d+x\d+ w\d s\d: 0\.\d\d of the matrix rate with", result.stdout)
    (cubin,) = (tmp_path / "kept").glob("forward_sm_80_float16_d128_full_*.cubin")
    fields = json.loads(cubin.with_suffix(".json").read_text())
    assert {"kernel", "arch", "dtype", "head_dim", "causal", "tile", "registers", "spill_bytes", "shared_bytes"} <= set(fields)
    (kernel,) = json.loads(here("predict", "--cubin", str(cubin), "--json", directory=tmp_path).stdout)
    assert fields.items() <= kernel.items()
    assert 0.2 < kernel["matrix_share"] < 1
    assert kernel["busy"]["matrix"] == kernel["matrix_share"]
    assert (
        kernel["matrix_instructions_per_trip"]
        == 2 * 128 * fields["tile"]["tile_q"] * fields["tile"]["tile_kv"] // 2048 // fields["tile"]["num_warps"]
    )
    assert all(gain > 0.9 for gain in kernel["speedup_without"].values())
    assert kernel["binds"] in kernel["speedup_without"]


@needs_nvdisasm
def test_a_call_is_predicted(tmp_path: Path) -> None:
    shape = ("--batch", "2", "--heads", "8", "--seqlen")
    short, long = (
        json.loads(here("predict", *KERNEL, *shape, seqlen, "--fast", "--json", directory=tmp_path).stdout) for seqlen in ("1024", "4096")
    )
    (kernel,) = short["kernels"]
    assert (short["card"], kernel["kernel"], kernel["arch"]) == ("A100 SXM 80 GB", "forward", "sm_80")
    flops = 4 * 2 * 8 * 64 * 1024**2
    assert short["predicted_tflops"] == pytest.approx(flops / short["predicted_milliseconds"] / 1e9, rel=1e-3)
    assert short["predicted_tflops"] < long["predicted_tflops"] < 312 * kernel["matrix_share"], (
        "long sequences come nearer to the steady state"
    )
    assert kernel["speedup_without"] == {}
    text = here("predict", *KERNEL, *shape, "1024", "--fast", directory=tmp_path).stdout
    assert text.startswith("predicted for A100 SXM 80 GB (sm_80, 108 SMs, 1.41 GHz)")
    assert f"{short['predicted_tflops']:.4g} TFLOP/s" in text


@needs_nvdisasm
def test_a_call_with_features_is_predicted(tmp_path: Path) -> None:
    """Documents leave a half of the tiles of a padded batch, and packed sequences of half the length as many; a boolean mask of pairs makes each tile longer."""
    shape = ("--batch", "2", "--heads", "8", "--fast", "--json")

    def predicted(*options: str) -> dict[str, Any]:
        return dict(json.loads(here("predict", *KERNEL, *shape, *options, directory=tmp_path).stdout))

    whole, segments, packed, masked = (
        predicted("--seqlen", "2048"), predicted("--seqlen", "2048", "--segments", "2"),
        predicted("--varlen", "1024", "1024", "1024", "1024"), predicted("--seqlen", "2048", "--attn-mask", "bool"),
    )  # fmt: skip
    assert [kernel["kernel"] for kernel in segments["kernels"]] == ["visible_tiles", "forward"]
    assert (segments["features"], segments["predicted_tflops"]) == (["segments"], None)
    forward = segments["kernels"][1]
    tile_q, tile_kv = forward["tile"]["tile_q"], forward["tile"]["tile_kv"]
    assert 1024 % tile_q == 0
    tiles_kv = -(-1024 // tile_kv) + (
        -(-2048 // tile_kv) - 1024 // tile_kv
    )  # of the first document and of the second, which may begin within a tile
    assert forward["tiles_visited"] == 2 * 8 * (1024 // tile_q) * tiles_kv
    assert segments["predicted_milliseconds"] < whole["predicted_milliseconds"]
    assert packed["predicted_milliseconds"] < 0.7 * whole["predicted_milliseconds"]
    assert masked["kernels"][1]["tiles_partial"] == masked["kernels"][1]["tiles_visited"] > 0
    assert masked["predicted_milliseconds"] > whole["predicted_milliseconds"]
    text = here("predict", *KERNEL, "--seqlen", "2048", "--segments", "2", "--fast", directory=tmp_path).stdout
    assert re.search(r"not causal, segments: [\d.]+ ms\n", text), text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "sm_75"), "arch: got sm_75; expected one of sm_80, sm_86, sm_89, sm_90, sm_120"),
        (("--arch", "sm_1"), "arch: got 'sm_1'"),
        (("--tile", "64", "64", "3", "2"), "tile: got Tile(tile_q=64"),
        (("--cubin", "nowhere.cubin"), "cubin: got 'nowhere.cubin': No such file or directory"),
        (("--attn-mask", "float32", "--need-attn-mask-grad"), "--need-attn-mask-grad: got it without the backward pass"),
    ],
)
def test_predict_names_what_it_cannot_use(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = here("predict", *options, directory=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"cuflash: {message}"), result.stderr


@pytest.mark.usefixtures("no_disassembly")
def test_inspect_prints_a_table_of_both_passes(tmp_path: Path) -> None:
    options = ("--head-dim", "16", "--dtype", "float16", "--causal", "--sinks")
    result = here("inspect", "--arch", "sm_75", "sm_90", *options, directory=tmp_path)
    assert result.returncode in (0, 1), result.stderr
    for expected in ("sm_75", "sm_90 ", "forward", "backward_dq", "backward_sinks", "regs", "spill"):
        assert expected in result.stdout, expected
    assert "sm_90a" not in result.stdout, "architectures are named as --arch takes them"
    assert result.stdout.startswith("calls: causal; features: sinks\n")


FEATURES = ("--causal", "--window", "20", "-1", "--softcap", "30", "--alibi", "--sinks", "--dropout", "--head-dim-v", "32")


@pytest.mark.usefixtures("no_disassembly")
def test_inspect_knows_features_and_lengths(tmp_path: Path) -> None:
    call = ("--arch", "sm_80", "--head-dim", "16", "--dtype", "float16", "--attn-mask", "bool", "--segments", "--seqlens-kv")
    reports = json.loads(here("inspect", *call, *FEATURES, "--forward-only", "--json", directory=tmp_path).stdout)
    assert {"visible_tiles", "forward"} == {report["kernel"] for report in reports}
    assert all(report["features"] == ["boolean mask", "dropout", "window", "softcap", "alibi", "sinks", "segments"] for report in reports)
    assert {report["head_dim_v"] for report in reports if report["kernel"] == "forward"} == {32}
    table = here("inspect", *call, *FEATURES, "--forward-only", directory=tmp_path).stdout
    assert table.startswith("calls: causal, seqlens_kv; features: boolean mask, dropout, window, softcap, alibi, sinks, segments\n")
    assert "16/32" in table
    assert table.count("visible_tiles") == 1


def test_inspect_of_packed_sequences_is_of_other_kernels(tmp_path: Path) -> None:
    options = ("inspect", "--arch", "sm_80", "--head-dim", "64", "--dtype", "float16", "--forward-only", "--json")
    padded, packed = (json.loads(here(*options, *more, directory=tmp_path).stdout)[0] for more in ((), ("--varlen",)))
    assert padded["kernel"] == packed["kernel"] == "forward"
    assert padded["instructions"] != packed["instructions"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("options", "operands"),
    [
        (("--seqlen", "40", "--segments", "3"), {"segment_ids_q", "segment_ids_kv"}),
        (("--seqlen", "40", "--prefix", "10", "--batch", "2", "--seqlens-kv", "40", "0"), {"prefix_lengths", "seqlens_kv"}),
        (("--seqlen", "40", "--batch", "2", "--seqlens-q", "9", "0"), {"seqlens_q"}),
        (("--varlen", "40", "0", "7", "--prefix", "3"), {"prefix_lengths", "cu_seqlens_q", "cu_seqlens_kv"}),
    ],
)
def test_profile_knows_features_and_lengths(tmp_path: Path, options: tuple[str, ...], operands: set[str]) -> None:
    """Every array that an option asks for is read by a kernel, and the call is in the file."""
    result = here("profile", *options, *FEATURES, "--pass", "backward", "--json", "profile.json", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["call"]["features"]["window"] == [20, -1]
    assert content["call"]["head_dim_v"] == 32
    assert content["call"]["direction"] == "backward"
    read = {operand["name"] for kernel in content["kernels"] for operand in kernel["operands"] if operand["bytes_read"]}
    assert operands | {"alibi_slopes", "sinks"} <= read


def test_profile_names_the_line_of_a_feature(tmp_path: Path) -> None:
    """The hyperbolic tangent of a large softcap is what costs most."""
    result = here("profile", "--seqlen", "64", "--softcap", "100", "--top", "1", directory=tmp_path)
    assert re.search(r"tile/score\.cuh:\d+ +const float (far|square)\b.*;", result.stdout), result.stderr


@pytest.mark.parametrize(("alignment", "keys"), [("top_left", 1), ("bottom_right", 512)])
def test_profile_of_decoding_reads_the_keys_that_its_alignment_shows(tmp_path: Path, alignment: str, keys: int) -> None:
    """One query at the end of many keys sees them all, one at their start sees the first alone."""
    options = ("--seqlen", "1", "--seqlen-kv", "512", "--causal", "--causal-alignment", alignment)
    result = here("profile", *options, "--json", "profile.json", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["call"]["causal_alignment"] == alignment
    kernel = content["kernels"][0]  # and one that merges what blocks with parts of the keys have made
    (read,) = (operand["bytes_read"] for operand in kernel["operands"] if operand["name"] == "key")
    assert read == keys * 64 * 2


@pytest.mark.usefixtures("no_disassembly")
def test_inspect_and_warmup_know_the_gradient_of_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_DECODE", "0")  # whose kernels warmup compiles too
    options = ("--arch", "sm_80", "--head-dim", "16", "--dtype", "float16", "--attn-mask", "float16", "--causal")
    without, with_gradient = (
        {report["kernel"] for report in json.loads(here("inspect", *options, *more, "--json", directory=tmp_path).stdout)}
        for more in ((), ("--need-attn-mask-grad",))
    )
    assert with_gradient - without == {"backward_dq_mask"}
    assert without - with_gradient == {"backward_dq"}
    of_odd_masks = 1  # forward, of masks whose rows do not start on 16 bytes
    of_sums = 2  # backward_dq and backward_mask, of masks that are broadcast
    assert f"{len(without) + of_odd_masks} kernels are in the cache" in here("warmup", *options, directory=tmp_path).stdout
    assert (
        f"{len(with_gradient) + of_odd_masks + of_sums} kernels are in the cache"
        in here("warmup", *options, "--need-attn-mask-grad", directory=tmp_path).stdout
    )


def test_warmup_of_a_prefix_needs_no_other_option(tmp_path: Path) -> None:
    result = here("warmup", "--prefix", "--arch", "sm_80", "--head-dim", "16", "--dtype", "float16", "--forward-only", directory=tmp_path)
    assert "1 kernels are in the cache" in result.stdout, result.stderr


def test_profile_of_the_gradient_of_a_mask(tmp_path: Path) -> None:
    options = ("--seqlen", "32", "--attn-mask", "float32", "--pass", "backward", "--need-attn-mask-grad")
    result = here("profile", *options, directory=tmp_path)
    assert "backward_dq_mma: 1 launch" in result.stdout, result.stderr
    assert "grad_attn_mask" in result.stdout


def test_a_profile_that_fails_leaves_its_file_alone(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        assert here("profile", "--softcap", "-1", "--json", name, directory=tmp_path).returncode == 2
    assert (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "new.json").exists()


def test_profile_prints_tables_and_writes_json(tmp_path: Path) -> None:
    whole_tiles = ("--seqlen", "64", "--tile", "64", "64", "4", "2")
    result = command("profile", *whole_tiles, "--heads", "2", "--top", "3", "--json", "profile.json", directory=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in (
        "forward_mma: 1 launch",
        "matrix",
        "shared memory, reads: wavefronts",
        "query",
        "Lines with the most instructions (3 of ",
    ):
        assert expected in result.stdout, expected
    (kernel,) = json.loads((tmp_path / "profile.json").read_text())["kernels"]
    assert kernel["total"]["matrix_flops"] == 2 * 2 * 2 * 64 * 64 * 64
    assert f"{sum(kernel['total']['instructions'].values())} warp instructions" in result.stdout
    assert sum(sum(line["counts"]["instructions"].values()) for line in kernel["lines"]) == sum(kernel["total"]["instructions"].values())


def test_profile_annotates_whole_sources(tmp_path: Path) -> None:
    arguments = ("--pass", "backward", "--dtype", "bfloat16", "--seqlen", "32", "--causal", "--full", "--by-kernel-line")
    result = here("profile", *arguments, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("backward_delta.cu", "backward_dkdv_mma.cu", "backward_dq_mma.cu"):
        for line in (ROOT / "kernels" / name).read_text(encoding="utf-8").splitlines():
            assert line.strip() in result.stdout


def test_a_long_profile_says_how_long_it_may_take_and_can_be_stopped(tmp_path: Path) -> None:
    """The estimate comes before the arrays are made; a launch of minutes ends with Ctrl-C."""
    arguments = [sys.executable, "-m", "cuflash", "profile", "--seqlen", "40000"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "CUFLASH_SIMULATOR_THREADS": "1"}
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell lets what it runs in the background ignore it
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeded
    ) as process:
        try:
            assert process.stderr is not None
            assert re.fullmatch(r"The simulator may need \d+ min for this; .*\n", process.stderr.readline())
            time.sleep(4)  # far into the launch
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130
        finally:
            process.kill()


def test_a_short_profile_says_nothing_of_time(tmp_path: Path) -> None:
    assert here("profile", "--seqlen", "32", directory=tmp_path).stderr == ""


def test_warmup_fills_the_cache_and_cache_clears_it(tmp_path: Path) -> None:
    place = {"CUFLASH_CACHE_DIR": str(tmp_path / "cache"), "CUFLASH_DECODE": "0"}
    arguments = ("warmup", "--arch", "sm_80", "--head-dim", "32", "--dtype", "float16", "--forward-only", "--merge")
    first = command(*arguments, directory=tmp_path, **place)
    assert first.returncode == 0, first.stderr
    assert "5 kernels are in the cache, 5 compiled now" in first.stdout  # causal and not, and three that merge
    assert "5 kernels are in the cache, 0 compiled now" in command(*arguments, directory=tmp_path, **place).stdout
    listed = command("cache", directory=tmp_path, **place).stdout
    assert "forward_mma.cu for sm_80 (cubin)" in listed
    assert "5 kernels in" in listed
    assert (
        "5 kernels, 0 decoded programs and 0 cores of the simulator removed"
        in command("cache", "--clear", directory=tmp_path, **place).stdout
    )
    assert "0 kernels in" in command("cache", directory=tmp_path, **place).stdout


def test_warmup_for_another_machine_is_found_there(tmp_path: Path) -> None:
    """Cubins of another architecture, in a folder that is carried; the process that finds them must not compile."""
    arguments = ("warmup", "--arch", "sm_90", "--head-dim", "32", "--dtype", "float16", "--causal", "--forward-only")
    made = command(*arguments, "--into", "ahead", directory=tmp_path, CUFLASH_DECODE="0")
    assert "1 kernels are in the cache, 1 compiled now" in made.stdout, made.stderr
    version = ".".join(map(str, compiler.nvrtc_version()))
    assert f"A machine with NVRTC {version} and this cuflash finds them with CUFLASH_CACHE_DIR=ahead" in made.stdout
    (tmp_path / "ahead").rename(tmp_path / "carried")
    there = {"CUFLASH_CACHE_DIR": str(tmp_path / "carried"), "CUFLASH_COMPILE": "forbid", "CUFLASH_DECODE": "0"}
    found = command(*arguments, directory=tmp_path, **there)
    assert "1 kernels are in the cache, 0 compiled now" in found.stdout, found.stderr
    other = command(*arguments, "--sinks", directory=tmp_path, **there)
    assert other.returncode == 2
    (tmp_path / "file").touch()
    refused = command(*arguments, "--into", "file", directory=tmp_path)
    assert refused.returncode == 2
    assert "--into: got 'file': no directory can be made there; expected a folder that can be written" in refused.stderr


def test_warmup_compiles_what_a_call_with_features_needs(tmp_path: Path) -> None:
    # Without the kernels of few queries, which warmup compiles too.
    place = {"CUFLASH_CACHE_DIR": str(tmp_path / "cache"), "CUFLASH_SIMULATOR_ARCH": "sm_80", "CUFLASH_DECODE": "0"}
    options = ("--head-dim", "32", "--dtype", "float16", "--causal", "--softcap", "30", "--varlen", "--forward-only")
    warmed = command("warmup", *options, directory=tmp_path, **place)
    assert "2 kernels are in the cache, 2 compiled now" in warmed.stdout, warmed.stderr  # and the list of tiles
    share_simulator(tmp_path / "cache")
    call = ("profile", "--head-dim", "32", "--causal", "--softcap", "20", "--varlen", "5", "9")
    assert command(*call, directory=tmp_path, **place, CUFLASH_COMPILE="forbid").returncode == 0
    refused = command(*call, "--sinks", directory=tmp_path, **place, CUFLASH_COMPILE="forbid")
    assert refused.returncode == 2, "another feature is another kernel"


def test_demo_names_a_picture_that_it_cannot_draw_before_it_trains(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = here("demo", "--steps", "2", "--output", "loss.txt", directory=tmp_path)
    assert result.returncode == 2
    assert "--output: got 'loss.txt'; expected a file whose name ends in" in result.stderr
    assert "step" not in result.stdout
    assert not (tmp_path / "loss.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("inspect", "--arch", "sm_42"), "expected one of sm_75"),
        (("inspect", "--head-dim", "600"), "an int from 1 to 576"),
        (("demo", "--arch", "volta"), "expected one of sm_75"),
        (("demo", "--steps", "0"), "expected a positive number"),
        (("profile", "--layout", "bsdx"), "the letters b, s, h, d in the order of the dimensions"),
        (("profile", "--tile", "1", "2", "3", "4"), "Nearest legal tiles"),
        (("profile", "--window", "3", "-2"), "window: got (3, -2); expected a pair"),
        (("profile", "--softcap", "-1"), "softcap: got -1.0; expected a positive float"),
        (("profile", "--prefix"), "--prefix: got 64 without --causal; expected --causal with it."),
        (("profile", "--segments", "0"), "a positive number of documents"),
        (("profile", "--segments", "--varlen"), "expected a padded batch"),
        (("profile", "--varlen", "--layout", "bhsd"), "leave layout out"),
        (("profile", "--varlen", "--attn-mask", "bool"), "packed sequences do not see each other anyway"),
        (("profile", "--varlen", "--seqlens-kv"), "not allowed with argument"),
        (("profile", "--seqlens-kv", "3", "4"), "seqlens_kv: got shape (2,); expected (1,)"),
        (("profile", "--seqlen", "256", "--seqlens-q", "500"), "--seqlens-q: got 500 of 256 queries; expected numbers from 0 to 256."),
        (("profile", "--varlen", "--seqlens-q"), "--seqlens-q: got it with --varlen; expected a padded batch."),
        (("warmup", "--cache", "--seqlens-q"), "--seqlens-q: got it with --cache; expected no such option."),
        (("profile", "--head-dim-v", "600"), "value: got head_dim 600"),
        (("profile", "--seqlen", "256", "--seqlens-kv", "500"), "--seqlens-kv: got 500 of 256 keys; expected numbers from 0 to 256."),
        (("profile", "--need-attn-mask-grad", "--pass", "backward"), "--need-attn-mask-grad: got it without --attn-mask; expected"),
        (("profile", "--need-attn-mask-grad", "--attn-mask", "float16"), "Add --pass backward."),
        (("inspect", "--need-attn-mask-grad", "--attn-mask", "bool"), "got it with --attn-mask bool; expected an additive --attn-mask"),
        (("warmup", "--need-attn-mask-grad", "--attn-mask", "float32", "--forward-only"), "Leave out --forward-only."),
        (("profile", "--causal-alignment", "center"), "invalid choice: 'center'"),
        (("demo", "--output", "/nowhere/loss.png"), "--output: got '/nowhere/loss.png': No such file or directory"),
        (("profile", "--json", "/nowhere/profile.json"), "--json: got '/nowhere/profile.json': No such file or directory"),
        (("inspect", "--save", "/dev/null"), "--save: got '/dev/null': File exists; expected a folder that can be written."),
        (("predict", "--cubin", "/nowhere"), "cubin: got '/nowhere': No such file or directory"),
        (("profile", "--causal", "--prefix", "4294967296"), "expected a number below 2**31"),
        (("profile", "--varlen", "5", "-3"), "expected a number of at least 0"),
        (("inspect", "--prefix"), "--prefix: got 64 without --causal; expected --causal with it."),
        (("inspect", "--dropout", "2"), "dropout_p: got 2.0; expected a probability"),
        (("inspect", "--head-dim-v", "600"), "head_dim_v: got 600; expected an int from 1 to 576"),
        (("warmup", "--cache", "--jvp"), "--jvp: got it with --cache; expected no such option."),
        (("warmup", "--varlen", "--segments"), "features: got segments with varlen=True"),
        (("warmup", "--seqused"), "--seqused: got it without --varlen; expected --varlen with it."),
        (("explain", "--mask-axes", "bhqk"), "--mask-axes: got it without --attn-mask; expected --attn-mask with it."),
        (
            ("explain", "--attn-mask", "bool", "--mask-axes", "qh"),
            "--mask-axes: got 'qh'; expected some of the letters bhqk, in this order.",
        ),
        (("explain", "--backward"), "cuflash explain: error: unrecognized arguments: --backward; the pass is chosen by --pass backward"),
        (("predict", "--pass", "backward"), "unrecognized arguments: --pass backward; the pass is chosen by --backward"),
        (("explain", "--seqused"), "cuflash explain: error: unrecognized arguments: --seqused; it is an option of warmup"),
        (("explain", "--seqlen-q", "5"), "unrecognized arguments: --seqlen-q 5; did you mean --seqlens-q?"),
        (("cache", "surplus"), "cuflash cache: error: unrecognized arguments: surplus"),
        (("frobnicate",), "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUFLASH_SIMULATOR_ARCH", "sm_80")  # a command may set it
    try:
        status: object = main(arguments)
    except SystemExit as exit_of_the_parser:
        status = exit_of_the_parser.code
    assert status == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


def test_without_the_text_of_kernels_there_is_one_message(tmp_path: Path) -> None:
    result = command("warmup", "--head-dim", "64", directory=tmp_path, CUFLASH_KERNELS_DIR="/nowhere")
    assert result.returncode == 2
    assert "kernels' text is missing" in result.stderr
    assert "Traceback" not in result.stderr


def run_script(code: str, *arguments: str, directory: Path) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=directory, env=variables, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_examples_of_the_readme_run(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    examples = [example for example in examples if "cuflash.torch" not in example]  # tests/with_torch runs that one
    assert len(examples) == 3
    assert "forward attention on" in run_script("".join(examples), directory=tmp_path)  # one after the other, as in one session


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("quickstart", (), "gradient of value (1, 500, 2, 64) float16"),
        ("train_transformer", (str(ROOT / "LICENSE"), "3"), "held out: "),
        ("chat", (), "56 keys in 4 pages"),
    ],
)
def test_examples_run(tmp_path: Path, name: str, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in run_script((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"), *arguments, directory=tmp_path)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^python3 -m venv .* -m pytest.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
