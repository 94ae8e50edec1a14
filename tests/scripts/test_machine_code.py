"""How instructions are counted; the listing is what cuobjdump writes."""

from machine_code import MachineCode, parse

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                     /* 0x00000a0000017a02 */
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0020*/               @P1 BRA 0x10 ;
        /*0030*/                   BRA.DIV UR4, 0xa0 ;
        /*0040*/              @!P0 BRA 0x70 ;
        /*0050*/                   MUFU.RCP R2, R3 ;
        /*0060*/                   FADD R2, R2, R2 ;
        /*0070*/               @P2 EXIT ;
        /*0080*/                   STG.E [R2.64], R0 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0x40 ;
"""


def test_instructions():
    instructions = parse(LISTING)
    assert [instruction.op for instruction in instructions[:4]] == ["MOV", "IADD3", "BRA", "BRA.DIV"]
    assert instructions[2] == (0x20, True, "BRA", 0x10)
    assert not instructions[9].is_conditional


def test_lengths():
    code = MachineCode(parse(LISTING), registers=4, spill_bytes=0)
    assert code.loop_length() == 7  # the last branch, back from 0xa0 to 0x40
    assert code.usual_length(rounds=1) == 8
    assert code.usual_length(rounds=5) == 8 + 4 * 2
