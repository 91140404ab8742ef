"""The programs that measure: their texts, and their compilation by NVRTC to cubins or, for the simulator, PTX.

A program is a file of this directory between generated lines: wrappers of `wgmma` for the shapes that it needs in front, the kernels that are wanted behind.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ARCH = "90a"
SHAPES = (64, 80, 112, 128, 176, 256)
INSTRUCTIONS = [
    "ffma",
    "fadd",
    "fmul",
    "fmnmx",
    "mufu_ex2",
    "mufu_lg2",
    "mufu_rsq",
    "mufu_tanh",
    "f2fp_bf16",
    "f2fp_f16",
    "cvt_tf32",
    "imad",
    "lop3",
    "prmt",
    "hfma2_bf16",
    "shfl",
    "redux",
    "mufu_and_ffma",
    "hmma_f16",
    "hmma_bf16",
    "hmma_tf32",
    "lds_b32",
    "lds_128",
    "ldsm_x4",
    "ldsm_x4_trans",
    "sts_b32",
    "sts_128",
    "stsm_x4",
]
ORDERS = {
    # Kernel of the test of the order of service -> (N, A from registers) of group 0, and of the others.
    "order_64_ss": ((64, False), (64, False)),
    "order_128_ss": ((128, False), (128, False)),
    "order_176_ss": ((176, False), (176, False)),
    "order_256_ss": ((256, False), (256, False)),
    "order_128_rs": ((128, True), (128, True)),
    "order_256_rs": ((256, True), (256, True)),
    "order_256_ss_64_ss": ((256, False), (64, False)),
    "order_128_ss_128_rs": ((128, False), (128, True)),
}
TIMELINES = {
    "timeline_64_ss": (64, False),
    "timeline_128_ss": (128, False),
    "timeline_256_ss": (256, False),
    "timeline_128_rs": (128, True),
}


def product_costs(kernel: str, groups: int) -> list[float]:
    """Clocks of the tensor unit per product, for each warpgroup of a test of the order of service: N/2, which `wgmma` measures to a percent."""
    (first, _), (others, _) = ORDERS[kernel]
    return [first / 2, *[others / 2] * (groups - 1)]


def _wgmma(n: int) -> str:
    """`Wgmma<n>`: D += A B of bfloat16, B's rows being N, A in shared memory or in registers."""
    count = n // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    head = f"{{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{accumulators}}}, "
    ss = f"{head}%{count}, %{count + 1}, p, 1, 1, 0, 0;}}"
    rs = f"{head}{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, p, 1, 1, 0;}}"
    return f"""template <> struct Wgmma<{n}> {{
  static __device__ __forceinline__ void ss(float (&d)[{count}], unsigned long long a, unsigned long long b) {{
    asm volatile("{ss}" : {outputs} : "l"(a), "l"(b));
  }}
  static __device__ __forceinline__ void rs(float (&d)[{count}], unsigned (&a)[4], unsigned long long b) {{
    asm volatile("{rs}" : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }}
}};
"""


def _tensor_program(shapes: set[int], kernels: list[str]) -> str:
    wrappers = "".join(map(_wgmma, sorted(shapes)))
    return f'template <int N> struct Wgmma;\n{wrappers}#include "tensor_unit.cu"\n' + "\n".join(kernels) + "\n"


def texts() -> dict[str, str]:
    """Name -> program."""
    programs = {name: f'#include "{name}.cu"\n' for name in ("memory", "handover")}
    half = len(INSTRUCTIONS) // 2
    for part, names in enumerate((INSTRUCTIONS[:half], INSTRUCTIONS[half:])):
        programs[f"instructions_{part}"] = '#include "instructions.cu"\n' + "".join(f"INSTRUCTION({name})\n" for name in names)
    for n in SHAPES:
        kernels = [f"THROUGHPUT(wgmma_{n}_{kind}, {n}, {flag})" for kind, flag in (("ss", "false"), ("rs", "true"))]
        programs[f"wgmma_{n}"] = _tensor_program({n}, kernels)
    for name, ((n0, rs0), (n1, rs1)) in ORDERS.items():
        programs[name] = _tensor_program({n0, n1}, [f"ORDER({name}, {n0}, {str(rs0).lower()}, {n1}, {str(rs1).lower()})"])
    for name, (n, rs) in TIMELINES.items():
        programs[name] = _tensor_program({n}, [f"TIMELINE({name}, {n}, {str(rs).lower()})"])
    return programs


def compile_program(name: str, target: str) -> tuple[bytes, str]:
    """("cubin" or "ptx", what NVRTC and ptxas printed) of a program.

    Raises:
        RuntimeError: NVRTC refused; the message is its log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(texts()[name], str(FOLDER / f"{name}.program.cu"), (), ())
    flags = [f"-arch={'sm' if target == 'cubin' else 'compute'}_{ARCH}", "-std=c++17", "-default-device", f"-I{FOLDER}", "-lineinfo"]
    if target == "cubin":
        flags.append("--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, tuple(flags))
        data = nvrtc.getCUBIN(program) if target == "cubin" else nvrtc.getPTX(program)
        data = data if isinstance(data, bytes) else data.encode("latin-1")
        # CuPy's getCUBIN cuts off the last byte, which is zero; its PTX may have one too many.
        return (data + bytes(-len(data) % 8) if target == "cubin" else data.rstrip(b"\0")), nvrtc.getProgramLog(program).rstrip("\0")
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name}: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def compile_all(folder: Path, threads: int) -> None:
    """Write folder/NAME.cubin and folder/NAME.log of every program."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> None:
        data, log = compile_program(name, "cubin")
        (folder / f"{name}.log").write_text(log)
        temporary = folder / f".{name}.part"
        temporary.write_bytes(data)
        temporary.replace(folder / f"{name}.cubin")

    first, *others = texts()
    one(first)  # alone: NVRTC loads its own second library at the first compilation, and two threads that do so disturb each other
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, others))
