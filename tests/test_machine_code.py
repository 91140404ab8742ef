"""`benchmarks/machine_code.py`: what it reads of a listing, how it counts loops, and what it says of two checkouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

import machine_code
from cuflash.jit import disassembly
from machine_code import Code, instructions_of, loop_of, rows_of

LISTING = """
//--------------------- .text.other --------------------------
.text.other:
        /*0000*/                   EXIT ;                                  /* 0x000000000000794d */
//--------------------- .text.kernel --------------------------
kernel:
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fe40000000f00 */
.L_x_0:
        /*0010*/                   LDS R0, [R2] ;                          /* 0x0000000002007984 */
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;        /* 0x0000000c0804723c */
        /*0030*/               @P1 BRA `(.L_x_1) ;                         /* 0xffffffe000001947 */
        /*0040*/              @!P0 BRA `(.L_x_0) ;                         /* 0xffffffc000008947 */
        /*0050*/                   EXIT ;                                  /* 0x000000000000794d */
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);                          /* 0xfffffff000007947 */
        /*0070*/                   NOP;                                    /* 0x0000000000007918 */
//--------------------- .nv.shared.kernel --------------------------
        /*0000*/                   RET ;
"""


def test_instructions_have_no_addresses() -> None:
    instructions = instructions_of(LISTING, "kernel")
    assert instructions == (
        "MOV R1, c[0x0][0x28]", ".L_x_0:", "LDS R0, [R2]", ".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4", "@P1 BRA `(.L_x_1)", "@!P0 BRA `(.L_x_0)",
        "EXIT", ".L_x_2:", "BRA `(.L_x_2)",
    )  # fmt: skip
    assert instructions_of(LISTING.replace("/*0040*/", "/*0990*/"), "kernel") == instructions
    assert Code("", 0, 0, instructions, 0).length == 7


def test_the_loop_is_the_shortest_one_with_the_products() -> None:
    instructions = instructions_of(LISTING, "kernel")
    assert loop_of(instructions) == 2
    without = tuple(line.replace("HMMA.16816.F32", "IADD3") for line in instructions)
    assert loop_of(without) == 0
    assert loop_of(tuple(line.replace("HMMA.16816.F32", "FFMA") for line in instructions)) == 2


def test_what_is_said_of_two_checkouts() -> None:
    code = Code("64x64 w4 s2", 100, 0, instructions_of(LISTING, "kernel"), 2)
    changed = replace(code, registers=104, instructions=(*code.instructions, "EXIT"))
    before = {("sm_80", "float16", d, False, "forward"): code for d in (64, 128)}
    after = {**before, ("sm_80", "float16", 64, False, "forward"): changed, ("sm_80", "float16", 64, False, "decode"): code}
    rows = rows_of(before, after, every=False)
    assert rows[2:] == ["| forward | none | 2 | 1 | 0 | +0 to +4 | 0 | +0 to +1 | 2 |", "\nOnly after: decode."]
    assert rows_of(before, after, every=True)[2] == "| forward | none | sm_80 | float16 | 64 | 1 | 0 | 0 | 100 → 104 | 0 | 7 → 8 | 2 |"


@pytest.mark.skipif(disassembly.find_nvdisasm() is None, reason=disassembly.NVDISASM_HINT)
def test_a_checkout_is_the_same_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUFLASH_KERNELS_DIR", "")  # put back afterwards
    codes = machine_code.codes_of(machine_code.HERE, ["sm_80"], [("float16", 64, False, False)])
    assert [case[-1] for case in codes] == ["forward"]
    (code,) = codes.values()
    assert code.spills == 0
    assert 500 < code.loop < code.length
    assert rows_of(codes, codes, every=False)[2].startswith("| forward | none | 1 | 1 | 0 |")
