"""The instructions of a cubin: its listing by nvdisasm, counts of opcodes, and the classes that people think in.

Counts are of instructions in the code, not of how often they run. nvdisasm comes with the wheel `nvidia-cuda-nvdisasm` or a CUDA toolkit on the PATH.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

NVDISASM_HINT = "The instruction mix needs nvdisasm: pip install 'cuflash[inspect]'"


# -------------------------------------------------------------------------------------------------------------------------- instruction mix

CLASSES: tuple[str, ...] = ("matrix", "mufu", "fp32", "integer", "shared", "global", "local", "move", "control", "other")
"""Classes of instructions. "fp32" holds packed half arithmetic and conversions too; "local" is what spills and indexed arrays cause."""

_OPCODES: dict[str, str] = {
    "matrix": "HMMA IMMA BMMA DMMA QMMA OMMA HGMMA IGMMA BGMMA QGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA",
    "mufu": "MUFU",
    "fp32": "FADD FADD2 FMUL FMUL2 FFMA FFMA2 FMNMX FMNMX3 FSEL FSET FSETP FCHK FRND HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2 F2F F2FP F2I "
    "F2IP I2F I2FP I2IP",
    "integer": "IADD IADD3 IMAD IMUL ISETP ISCADD IABS IMNMX IDP LEA LOP LOP3 PLOP3 SHF SHL SHR PRMT SEL POPC FLO BREV BMSK SGXT VIADD "
    "VIADDMNMX VIMNMX VIMNMX3 VABSDIFF P2R R2P",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LD ST LDG STG LDGSTS RED REDG ATOM ATOMG CCTL TMALDG TMASTG TMAREDG TMAPF BLKCP BLKRED BLKPF",
    "local": "LDL STL",
    "move": "MOV MOVM S2R S2UR CS2R R2UR LDC SHFL VOTE REDUX MATCH",
    "control": "BRA BRX JMP CALL RET EXIT KILL BREAK BSSY BSYNC BMOV BAR SYNCS WARPSYNC WARPGROUP WARPGROUPSET DEPBAR LDGDEPBAR MEMBAR "
    "ERRBAR FENCE ARRIVES ELECT NANOSLEEP YIELD SETMAXREG CGABAR_ARV CGABAR_WAIT ACQBULK PREEXIT TMACMDFLUSH TMACCTL WARPGROUP_ARRIVE",
}
_CLASS_OF: dict[str, str] = {opcode: name for name, opcodes in _OPCODES.items() for opcode in opcodes.split()}

_SECTION = re.compile(r"^\.text\.(\S+):$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")


def classify(opcode: str) -> str:
    """The class of a SASS instruction with its modifiers: "HMMA.16816.F32" -> "matrix", "IMAD.MOV.U32" -> "move", "ULEA" -> "integer"."""
    if opcode.startswith("IMAD.MOV"):
        return "move"
    base = opcode.split(".")[0]
    if base == "LDCU":  # the one uniform instruction whose U stands at the end
        return "move"
    # The uniform datapath computes once per warp and prefixes its instructions with U.
    return _CLASS_OF.get(base) or _CLASS_OF.get(base.removeprefix("U")) or "other"


def instruction_counts(sass: str) -> dict[str, Counter[str]]:
    """nvdisasm's text -> for each function, how often each opcode (with modifiers) stands there; padding NOPs do not count."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in sass.splitlines():
        if section := _SECTION.match(line):
            current = counts.setdefault(section[1], Counter())
        elif line.startswith("//-----"):  # the next section, perhaps one of data
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)) and instruction[1] != "NOP":
            current[instruction[1]] += 1
    return counts


def find_nvdisasm() -> Path | None:
    """nvdisasm in the wheel `nvidia-cuda-nvdisasm` (any CUDA version), else on the PATH, else None."""
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations or () if package else ():
        for found in sorted(Path(root).glob("*/bin/nvdisasm*"), reverse=True):
            if found.stem == "nvdisasm":
                return found
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else None


def disassemble(cubin: bytes, *, source_lines: bool = False) -> str | None:
    """SASS of a cubin, each instruction with its encoding; None without nvdisasm, or if it is too old for the cubin's architecture.

    Args:
        cubin: an ELF file.
        source_lines: also print, above instructions, the lines of the source that they come from, innermost call first.
    """
    tool = find_nvdisasm()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory(prefix="cuflash-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        result = subprocess.run([tool, "-c", "-hex", *(["-gi"] if source_lines else []), path], capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else None
