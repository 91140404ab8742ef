"""mma.sync, ldmatrix, stmatrix and movmatrix: fragments as in the PTX ISA, products against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from simulated import Array, run_cuda, run_ptx

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
GROUP, QUAD = np.divmod(np.arange(32), 4)  # groupID and threadID_in_group of the PTX ISA


def a_indices(k: int, dtype: np.dtype) -> tuple[Array, Array]:
    """Row and column of every element of A: [lane][element], as the PTX ISA writes them."""
    per_register = 4 // dtype.itemsize
    element = np.arange(k // 2)  # 16 * k elements over 32 lanes
    register, inner = np.divmod(element, per_register)
    row = GROUP[:, None] + 8 * (register % 2)[None, :]
    column = QUAD[:, None] * per_register + inner[None, :] + (register // 2)[None, :] * 4 * per_register
    return row, column


def b_indices(k: int, dtype: np.dtype) -> tuple[Array, Array]:
    per_register = 4 // dtype.itemsize
    register, inner = np.divmod(np.arange(k // 4), per_register)
    row = QUAD[:, None] * per_register + inner[None, :] + register[None, :] * 4 * per_register
    return row, np.broadcast_to(GROUP[:, None], row.shape)


def c_indices() -> tuple[Array, Array]:
    i = np.arange(4)
    return GROUP[:, None] + 8 * (i // 2)[None, :], QUAD[:, None] * 2 + (i % 2)[None, :]


def test_fragments_written_out() -> None:
    """A few places copied from the figures of the PTX ISA, section "Matrix Fragments for mma.m16n8k16"."""
    row, column = a_indices(16, F16)
    assert (row[5, 0], column[5, 0]) == (1, 2)  # lane 5, a0
    assert (row[5, 3], column[5, 3]) == (9, 3)  # lane 5, a3
    assert (row[31, 7], column[31, 7]) == (15, 15)  # lane 31, a7
    assert (row[31, 4], column[31, 4]) == (7, 14)  # lane 31, a4
    row, column = b_indices(16, F16)
    assert (row[6, 0], column[6, 0]) == (4, 1)  # lane 6, b0
    assert (row[6, 3], column[6, 3]) == (13, 1)  # lane 6, b3
    row, column = c_indices()
    assert (row[9, 3], column[9, 3]) == (10, 3)  # lane 9, c3
    row, column = a_indices(8, np.dtype(np.float32))  # tf32, mma.m16n8k8
    assert (row[5, 2], column[5, 2]) == (1, 5)  # lane 5, a2


def words(matrix: Array, indices: tuple[Array, Array]) -> Array:
    """The registers of a fragment: [register][lane]."""
    return np.ascontiguousarray(np.ascontiguousarray(matrix[indices]).view(np.uint32).T)


def mma(shape: str, kind: str, accumulator: str, a: Array, b: Array, c: Array, repeat: int = 1) -> Array:
    """Execute one mma and return D as a matrix."""
    k = a.shape[1]
    a_words, b_words = words(a, a_indices(k, a.dtype)), words(b, b_indices(k, b.dtype))
    c_words = words(c, c_indices())
    registers = ""
    for letter, array in (("a", a_words), ("b", b_words), ("c", c_words)):
        registers += f"ld.param.u64 %p, [param_{letter}]; add.u64 %p, %p, %o;\n"
        registers += "".join(f"ld.global.b32 %{letter}{i}, [%p+{128 * i}];\n" for i in range(len(array)))
    lists = {letter: "{" + ",".join(f"%{letter}{i}" for i in range(n)) + "}" for letter, n in
             (("a", len(a_words)), ("b", len(b_words)), ("c", len(c_words)))}  # fmt: skip
    instruction = f"mma.sync.aligned.{shape}.row.col.{accumulator}.{kind}.{kind}.{accumulator} {lists['c']}, {lists['a']}, {lists['b']}, {lists['c']};"
    stores = "".join(f"st.global.b32 [%p+{128 * i}], %c{i};\n" for i in range(len(c_words)))
    out = np.zeros_like(c_words)
    ptx = f""".version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 param_a, .param .u64 param_b, .param .u64 param_c, .param .u64 param_d)
{{ .reg .b32 %a<4>, %b<4>, %c<4>, %t; .reg .b64 %p, %o;
mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, 4;
{registers}
{(instruction + chr(10)) * repeat}
ld.param.u64 %p, [param_d]; add.u64 %p, %p, %o;
{stores}
ret; }}"""
    counters = run_ptx(ptx, a_words, b_words, c_words, out)
    assert counters.matrix_instructions == repeat
    assert counters.matrix_flops == repeat * 2 * 16 * 8 * k
    result = np.zeros((16, 8), c.dtype)
    result[c_indices()] = np.ascontiguousarray(out.T).view(c.dtype)
    return result


CASES = [
    ("m16n8k16", "bf16", BF16, 16),
    ("m16n8k8", "bf16", BF16, 8),
    ("m16n8k16", "f16", F16, 16),
    ("m16n8k8", "f16", F16, 8),
    ("m16n8k8", "tf32", np.dtype(np.float32), 8),
    ("m16n8k4", "tf32", np.dtype(np.float32), 4),
]


@pytest.mark.parametrize(("shape", "kind", "dtype", "k"), CASES)
def test_product(shape: str, kind: str, dtype: np.dtype, k: int) -> None:
    rng = np.random.default_rng(k)
    a, b = rng.standard_normal((16, k)).astype(dtype), rng.standard_normal((k, 8)).astype(dtype)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    got = mma(shape, kind, "f32", a, b, c)
    if kind == "tf32":  # the low 13 bits are not looked at
        a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("shape", "k"), [("m16n8k16", 16), ("m16n8k8", 8)])
def test_product_with_half_accumulator(shape: str, k: int) -> None:
    rng = np.random.default_rng(k)
    a, b = rng.standard_normal((16, k)).astype(F16), rng.standard_normal((k, 8)).astype(F16)
    c = rng.standard_normal((16, 8)).astype(F16)
    got = mma(shape, "f16", "f16", a, b, c)
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", F16), ("bf16", BF16)])
def test_one_element_at_a_time(kind: str, dtype: np.dtype) -> None:
    """Each A[i][k] B[k][j] lands in C[i][j] and nowhere else."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        i, k, j = rng.integers(0, (16, 16, 8))
        a, b = np.zeros((16, 16), dtype), np.zeros((16, 8), dtype)
        a[i, k], b[k, j] = dtype.type(2), dtype.type(3)
        expected = np.zeros((16, 8), np.float32)
        expected[i, j] = 6
        np.testing.assert_array_equal(mma("m16n8k16", kind, "f32", a, b, np.zeros((16, 8), np.float32)), expected)


def test_repeated_product_accumulates() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(BF16), rng.standard_normal((16, 8)).astype(BF16)
    got = mma("m16n8k16", "bf16", "f32", a, b, np.zeros((16, 8), np.float32), repeat=5)
    np.testing.assert_allclose(got, 5 * (a.astype(np.float64) @ b.astype(np.float64)), rtol=1e-5, atol=1e-5)


def test_special_values() -> None:
    a, b = np.zeros((16, 16), F16), np.zeros((16, 8), F16)
    a[0, 0], b[0, :] = np.float16(6e-8), 1  # the smallest subnormal
    a[1, 3], a[2, 3], b[3, 0] = np.inf, np.nan, 2
    c = np.zeros((16, 8), np.float32)
    got = mma("m16n8k16", "f16", "f32", a, b, c)
    assert got[0, 5] == np.float32(np.float16(6e-8))
    assert got[1, 0] == np.inf
    assert np.isnan(got[2, 0])
    assert np.isnan(got[1, 1])  # infinity times zero


LDMATRIX = """
extern "C" __global__ void k(const u32* in, u32* out) {
    __shared__ __align__(16) u32 tile[128];
    int lane = threadIdx.x;
    for (int i = lane; i < 128; i += 32) tile[i] = in[i];
    __syncthreads();
    u32 address = (u32)__cvta_generic_to_shared(tile + lane * 4), r[4] = {0, 0, 0, 0};
    LOAD
    for (int i = 0; i < 4; ++i) out[i * 32 + lane] = r[i];
}"""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(count: int, trans: bool) -> None:
    places = ",".join(f"%{i}" for i in range(count))
    outputs = ",".join(f'"=r"(r[{i}])' for i in range(count))
    load = (
        f'asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 {{{places}}}, [%{count}];"'
        f' : {outputs} : "r"(address));'
    )
    matrices = np.random.default_rng(0).integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    out = np.zeros(128, np.uint32)
    run_cuda(LDMATRIX.replace("LOAD", load), matrices, out)
    got = out.view(np.uint16).reshape(4, 32, 2)
    for j in range(count):
        m = matrices[j].T if trans else matrices[j]
        for lane in range(32):  # row lane / 4, elements 2 (lane % 4) and the next
            assert got[j, lane].tolist() == m[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(count: int, trans: bool) -> None:
    registers = ",".join(f"%{i + 1}" for i in range(count))
    inputs = "".join(f', "r"(in[lane + {32 * i}])' for i in range(count))
    opcode = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    source = f"""
    extern "C" __global__ void k(const u32* in, u32* out) {{
        __shared__ __align__(16) u32 tile[128];
        int lane = threadIdx.x;
        for (int i = 0; i < 4; ++i) tile[i * 32 + lane] = 0;
        __syncwarp();
        u32 address = (u32)__cvta_generic_to_shared(tile + (lane ^ 3) * 4);
        asm volatile("{opcode} [%0], {{{registers}}};" :: "r"(address){inputs} : "memory");
        __syncwarp();
        for (int i = 0; i < 4; ++i) out[i * 32 + lane] = tile[i * 32 + lane];
    }}"""
    fragments = np.random.default_rng(0).integers(1, 65536, (4, 32, 2)).astype(np.uint16)  # [register][lane][half]
    out = np.zeros((32, 8), np.uint16)
    run_cuda(source, np.ascontiguousarray(fragments), out, arch="compute_90")
    expected = np.zeros((32, 8), np.uint16)
    for j in range(count):
        for lane in range(32):
            for half in range(2):  # the lane holds elements 2 (lane % 4) and the next of row lane / 4, or of that column
                row, column = lane // 4, 2 * (lane % 4) + half
                if trans:
                    row, column = column, row
                expected[(8 * j + row) ^ 3, column] = fragments[j, lane, half]
    np.testing.assert_array_equal(out, expected)


def test_movmatrix() -> None:
    source = """
    extern "C" __global__ void k(const u32* in, u32* out) {
        u32 r;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(in[threadIdx.x]));
        out[threadIdx.x] = r;
    }"""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.zeros((8, 8), np.uint16)
    run_cuda(source, matrix, out)
    np.testing.assert_array_equal(out, matrix.T)
