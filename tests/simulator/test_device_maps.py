"""Tensor maps that kernels make: every field, the copy to global memory, and what is reported about maps that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mbarriers import SCHEDULES, launch, report
from simulated import Array
from test_tensor_copy import aligned, cut, swizzled, tensor_map

from cuflash.errors import SimulatorError
from cuflash.simulator import Module, Options

# `a` receives the box, `b` is the tensor, `c` has room for the map.
SETUP = """extern __shared__ __align__(1024) char s[]; __shared__ __align__(128) char map[128]; __shared__ u64 m;
if (t == 0) { init(&m, 1); fence_init(); } __syncthreads();
"""
PUBLISH = """
asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;"
    :: "l"(c), "r"(address(map)) : "memory");
asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" :: "l"(c) : "memory");
"""
ZEROS = "((int*)map)[t] = 0; __syncwarp();\n"


def replaced(field: str, value: int | str, ordinal: int | None = None, where: str = "shared::cta", to: str = '"r"(address(map))') -> str:
    """A tensormap.replace by thread 0."""
    wide = field in ("global_address", "global_stride")
    order = "" if ordinal is None else f"{ordinal}, "
    immediate = field in ("elemtype", "interleave_layout", "swizzle_mode", "fill_mode")
    operand = str(value) if immediate else "%1"
    inputs = to if immediate else f'{to}, "{"l" if wide else "r"}"({value})'
    return (
        f'if (t == 0) asm volatile("tensormap.replace.tile.{field}.{where}.b1024.b{64 if wide else 32} [%0], {order}{operand};" '
        f':: {inputs} : "memory");\n'
    )


def fields(
    array: Array, box: tuple[int, ...], element: int, swizzle: int = 0, fill: int = 0, steps: tuple[int, ...] | None = None
) -> list[str]:
    """All that a map of a C-contiguous array needs, one instruction each."""
    rank = array.ndim
    lines = [replaced("global_address", "(u64)b"), replaced("rank", rank - 1)]
    lines += [replaced("box_dim", extent, i) for i, extent in enumerate(box[::-1])]
    lines += [replaced("global_dim", extent, i) for i, extent in enumerate(array.shape[::-1])]
    lines += [replaced("global_stride", f"{stride}ull", i) for i, stride in enumerate(array.strides[-2::-1])]
    lines += [replaced("element_stride", step, i) for i, step in enumerate((steps or (1,) * rank)[::-1])]
    lines += [
        replaced("elemtype", element),
        replaced("interleave_layout", 0),
        replaced("swizzle_mode", swizzle),
        replaced("fill_mode", fill),
    ]
    return lines


def load(rank: int, start: tuple[int, ...], nbytes: int, map_address: str = "c") -> str:
    coordinates = "{" + ", ".join(str(i) for i in start[::-1]) + "}"
    return f"""if (t == 0) {{
    arrive_expect(&m, {nbytes});
    asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {coordinates}], [%2];"
        :: "r"(address(s)), "l"({map_address}), "r"(address(&m)) : "memory");
}}
wait(&m, 0);
for (int i = t; i < {nbytes}; i += 32) a[i] = s[i];"""


def room() -> Array:
    return aligned(np.zeros(128, np.uint8))


def run(body: str, out: Array, array: Array, options: Options | None = None, **more: Any) -> None:
    launch(SETUP + body, out, array, room(), element="char", shared=out.nbytes, options=options, **more)


# Number of the element type in PTX, the array's type.
ELEMENTS = [
    (0, np.uint8),
    (1, np.uint16),
    (2, np.uint32),
    (3, np.int32),
    (4, np.uint64),
    (5, np.int64),
    (6, np.float16),
    (7, np.float32),
    (9, np.float64),
    (10, np.uint16),  # bf16
]


@pytest.mark.parametrize(("element", "dtype"), ELEMENTS)
@pytest.mark.parametrize("options", SCHEDULES)
def test_a_map_made_from_zeros(element: int, dtype: Any, options: Options) -> None:
    array = aligned(np.random.default_rng(element).integers(0, 100, (6, 7, 32)).astype(dtype))
    box, start = (2, 3, 16), (5, -1, 16 if array.itemsize == 1 else 24)  # a multiple of 16 bytes; 24 reaches beyond the array
    want = cut(array, start, box, (1, 1, 1), 0)
    out = np.zeros(want.nbytes, np.uint8)
    run(ZEROS + "".join(fields(array, box, element)) + PUBLISH + load(3, start, out.nbytes), out, array, options)
    np.testing.assert_array_equal(out.view(dtype).reshape(box), want)


@pytest.mark.parametrize(("mode", "span"), [(1, 32), (2, 64), (3, 128)])
def test_swizzles_steps_and_filling(mode: int, span: int) -> None:
    array = aligned(np.random.default_rng(mode).standard_normal((9, 40)).astype(np.float32))
    box, start, steps = (8, span // 4), (4, -4), (2, 1)
    want = cut(array, start, box, steps, np.nan)
    out = np.zeros(want.nbytes, np.uint8)
    body = ZEROS + "".join(fields(array, box, 7, mode, 1, steps)) + PUBLISH + load(2, start, out.nbytes)
    run(body, out, array)
    np.testing.assert_array_equal(
        np.isnan(out.view(np.float32)), np.isnan(swizzled(want.reshape(-1).view(np.uint8), span).view(np.float32))
    )
    known = swizzled(np.nan_to_num(want).reshape(-1).view(np.uint8), span).view(np.float32)
    np.testing.assert_array_equal(np.nan_to_num(out.view(np.float32)), known)


def test_a_map_of_the_host_with_another_address() -> None:
    """As grouped products do it: a parameter is copied to shared memory and pointed to another tensor."""
    array = aligned(np.arange(1024, dtype=np.int32).reshape(32, 32))
    encoded = tensor_map(aligned(np.zeros((32, 32), np.int32)), (4, 8))
    out = np.zeros(128, np.uint8)
    body = "((int*)map)[t] = ((const int*)&m0)[t]; __syncwarp();\n" + replaced("global_address", "(u64)b") + PUBLISH + load(2, (3, 4), 128)
    run(body, out, array, maps=[encoded])
    np.testing.assert_array_equal(out.view(np.int32).reshape(4, 8), array[3:7, 4:12])


def test_a_map_in_global_memory() -> None:
    """Changed where it lies, by a generic address, and used for a store."""
    array = aligned(np.zeros((8, 16), np.float32))
    target = '"l"(c)'
    body = "((int*)c)[t] = 0; __syncwarp();\n"
    body += "".join(
        line.replace('"r"(address(map))', target).replace(".shared::cta.b1024", ".global.b1024") for line in fields(array, (8, 16), 7)
    )
    body += """asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" :: "l"(c) : "memory");
for (int i = t; i < 128; i += 32) ((float*)s)[i] = i;
fence_async(); __syncwarp();
if (t == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {0, 0}], [%1];" :: "l"(c), "r"(address(s)) : "memory");
    commit(); wait_group<0>();
}"""
    run(body, np.zeros(512, np.uint8), array)
    np.testing.assert_array_equal(array, np.arange(128, dtype=np.float32).reshape(8, 16))


ARRAY = aligned(np.zeros((8, 32), np.float32))


def failure(body: str) -> str:
    return report(SETUP + body, np.zeros(512, np.uint8), ARRAY, room(), element="char", shared=512)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("rank", "a tensor map without a rank"),
        ("box_dim", "a tensor map whose box lacks an extent"),
        ("global_dim", "a tensor map that lacks an extent"),
        ("element_stride", "a tensor map that lacks an element stride"),
    ],
)
def test_fields_that_were_not_set(left_out: str, message: str) -> None:
    lines = [line for line in fields(ARRAY, (4, 32), 7) if f".{left_out}." not in line]
    text = failure(ZEROS + "".join(lines) + PUBLISH + load(2, (0, 0), 512))
    assert text.startswith(f"[tensor-map] {message}")
    assert "cp.async.bulk.tensor.2d" in text


@pytest.mark.parametrize(
    ("field", "value", "ordinal"),
    [
        ("global_address", "(u64)b + 8", None),
        ("rank", 5, None),
        ("box_dim", 0, 1),
        ("box_dim", 257, 0),
        ("global_dim", 0, 1),
        ("global_stride", "24ull", 0),
        ("element_stride", 9, 1),
        ("swizzle_mode", 4, None),
        ("fill_mode", 2, None),
    ],
)
def test_values_that_no_map_has(field: str, value: int | str, ordinal: int | None) -> None:
    text = failure(ZEROS + replaced(field, value, ordinal))
    assert text.startswith("[tensor-map] no tensor map has the value")
    assert f"tensormap.replace.tile.{field}" in text


def test_combinations_that_cannot_be() -> None:
    for changes, message in (
        ({"box": (4, 30)}, "rows of a box that are not multiples of 16 bytes"),
        ({"swizzle": 3, "box": (4, 16)}, "rows of a box that do not fill the span of the swizzle"),
        ({"element": 2, "fill": 1}, "fills other elements than floats with NaN"),
    ):
        options: dict[str, Any] = {"box": (4, 32), "element": 7} | changes
        assert f"[tensor-map] a tensor map {'with ' if 'rows' in message else 'that '}{message}" in failure(
            ZEROS + "".join(fields(ARRAY, **options)) + PUBLISH + load(2, (0, 0), 512)
        )


def test_a_box_that_no_shared_memory_has_room_for() -> None:
    """Each extent alone is one that a box may have."""
    text = failure(ZEROS + "".join(fields(ARRAY, (256, 256), 9)) + PUBLISH + load(2, (0, 0), 512))
    assert text.startswith("[tensor-map] a tensor map with a box that no shared memory has room for")


def test_memory_that_is_no_map() -> None:
    assert "[tensor-map] what the address names is neither a tensor map of the simulator" in failure(
        "((int*)map)[t] = 7; __syncwarp();\n" + replaced("rank", 1)
    )
    assert "[uninitialized] tensormap.replace" in failure(replaced("rank", 1))
    assert "[race] tensormap.replace" in failure("((int*)map)[t] = 0;\n" + replaced("rank", 1))
    assert "[misaligned] tensormap.cp_fenceproxy" in failure(ZEROS + replaced("rank", 1) + PUBLISH.replace('"l"(c)', '"l"(c + 64)'))
    assert "[partial-warp]" in failure(ZEROS + "if (t < 16) {" + PUBLISH + "}")


@pytest.mark.parametrize(
    "instruction",
    [
        "tensormap.replace.tile.elemtype.global.b1024.b32 [d], 8;",  # f32.ftz
        "tensormap.replace.tile.interleave_layout.global.b1024.b32 [d], 1;",
        "tensormap.replace.tile.box_dim.global.b1024.b32 [d], 5, r;",
        "tensormap.replace.tile.rank.global.b1024.b64 [d], d;",
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [d], [r], 64;",
        "fence.proxy.tensormap::generic.acquire.gpu;",
    ],
)
def test_unsupported_forms(instruction: str) -> None:
    ptx = f".version 8.3\n.target sm_90a\n.address_size 64\n.visible .entry k() {{ .reg .b32 r; .reg .b64 d; {instruction} ret; }}"
    with pytest.raises(SimulatorError, match="does not support"):
        Module(ptx)
