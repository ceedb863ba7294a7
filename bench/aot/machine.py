"""Reads machine code as text, NVIDIA's SASS and AMD's assembly, and counts by class what the time loop holds.

The time loop is the largest loop that is in no other one: the loop over the steps, which step mode has too, with one
step in it. Each instruction of it counts once: those of loops inside (the inner extent of a streamed product, tiles of
a batch that is walked, a wait for the other programs) as one turn, those that ptxas has unrolled as often as they
stand there, and those that few steps come to (rows that are not live, a wait that takes long) like all others. Blocks
that are put behind the kernel's end and come back belong to it; what ends the kernel (a failed assertion) and
subroutines that are called (the rare cases of a square root or a division) do not. Kernels without steps walk the rows
of one in loops of their own: there all outermost loops count.
"""

from __future__ import annotations

import re
from collections import Counter

from .flow import Code, Instruction

CLASSES = ("matrix", "global", "shared", "barrier", "transcendental", "integer", "float", "shuffle", "rest")

# opcodes of matrix units: mma.sync, wgmma, tcgen05, and AMD's
MATRIX = re.compile(r"^(?:[HID]MMA|[HIQ]GMMA|UTC\w*MMA|v_s?mfma)")

_SASS_LABEL = re.compile(r"^(\.L_x_\w+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?((?:@!?U?P\w+\s+)?)([A-Z][A-Z0-9_.]*)\s*([^;]*)")
_SASS_TARGET = re.compile(r"`\((\.L_x_\w+)\)")
_AMD_LABEL = re.compile(r"^(\.?[A-Za-z_]\w*):")
_AMD = re.compile(r"^\t((?:v|s|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)")


def sass(text: str) -> Code:
    """What `nvdisasm -c` says.

    Raises:
        ValueError: a jump to where a register says, which could lead anywhere.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    meets: dict[str, str] = {}  # where threads meet again, by the convergence barrier that was last set before
    waiting: list[tuple[int, str]] = []
    for line in text.splitlines():
        if found := _SASS_LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _SASS.match(line):
            predicate, opcode, operands = found[1].strip(), found[2], found[3].strip()
            word = opcode.partition(".")[0]
            jumps, goes_on = _SASS_TARGET.findall(operands), True
            targets: tuple[str, ...] = ()
            if word in ("BRX", "BRXU", "JMX", "JMXU"):
                raise ValueError(f"a jump to where a register says: {operands!r}")
            if word in ("BRA", "JMP"):  # one that waits for a predicate among its operands goes on, too
                targets = tuple(jumps)
                goes_on = bool(predicate) or not operands.startswith(("`", "0x"))
            elif word == "CALL":  # to a label: where a loop of some threads only is left; else it comes back
                targets = tuple(jumps)
            elif word in ("EXIT", "RET", "KILL"):
                goes_on = bool(predicate)
            elif word == "BSSY" and jumps:
                meets[operands.partition(",")[0]] = jumps[0]
            elif word == "BSYNC" and operands in meets:
                waiting.append((len(instructions), meets[operands]))
            instructions.append(Instruction(opcode, f"{predicate} {opcode} {operands}".strip(), targets, goes_on))
    for index, label in waiting:  # threads go on where they meet, which is nearly always right behind
        if labels.get(label) != index + 1:
            old = instructions[index]
            instructions[index] = Instruction(old.opcode, old.text, (label,), goes_on=False)
    return Code(instructions, labels)


def amd(text: str) -> Code:
    """The assembly that LLVM writes."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _AMD_LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _AMD.match(line):
            opcode, operands = found[1], found[2].strip()
            targets = (operands,) if opcode.startswith(("s_branch", "s_cbranch")) else ()
            goes_on = not opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))
            instructions.append(Instruction(opcode, f"{opcode} {operands}".strip(), targets, goes_on))
    return Code(instructions, labels)


# First words of opcodes, of each class. What is in none of them is the rest: moves between registers, constants,
# special registers, jumps, padding, and local memory, which has a column of its own as spills.
_SASS_CLASSES = {
    "global": "LDG STG LD ST LDGSTS UBLKCP UBLKPF UBLKRED UTMALDG UTMASTG UTMAPF UTMAREDG TEX TLD SULD SUST",
    "shared": "LDS STS LDSM STSM ATOMS ATOMSS LDTM STTM UTCCP UTCST",
    "barrier": "BAR BARRIER MEMBAR FENCE ERRBAR CGAERRBAR CCTL CCTLL DEPBAR LDGDEPBAR ARRIVES SYNCS UTCBAR WARPGROUP "
    "WARPSYNC NANOSLEEP RED REDG ATOM ATOMG UCGABAR ACQBULK ACQSHMINIT UTMACMDFLUSH UTCATOMSWS",
    "transcendental": "MUFU",
    "integer": "IADD IADD3 IADD32I IMAD IMAD32I IMUL LEA LOP LOP3 LOP32I SHF SHL SHR ISETP SEL IMNMX IABS ISCADD BFE "
    "BFI BMSK SGXT PRMT PLOP3 PSETP P2R R2P POPC FLO BREV VIADD VIADDMNMX VIMNMX VIMNMX3 VABSDIFF IDP LEPC "
    "UIADD3 UIMAD ULEA ULOP ULOP3 USHF UISETP USEL UPLOP3 UPRMT UBMSK USGXT UPOPC UFLO UBREV UP2UR UR2UP UVIADD "
    "UVIMNMX UIMNMX UPSETP UIABS",
    "float": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I FSEL FSETP FSET FMNMX FMNMX3 FCHK FSWZADD F2F "
    "F2FP F2I F2IP FRND I2F I2FP I2IP HADD2 HMUL2 HFMA2 HSET2 HSETP2 HMNMX2 HADD2_32I HFMA2_32I HMUL2_32I DADD DMUL "
    "DFMA DSETP UFADD UFMUL UFFMA UFSEL UFSETP UFMNMX UF2F UF2FP UF2I UI2F UI2FP",
    "shuffle": "SHFL REDUX CREDUX VOTE VOTEU MATCH MOVM ELECT",
}
_SASS_CLASS = {word: name for name, words in _SASS_CLASSES.items() for word in words.split()}

_AMD_CLASSES = (
    ("matrix", MATRIX),
    ("barrier", re.compile(r"^s_(?:barrier|sleep)|^buffer_(?:wbl2|inv|gl\d_inv|wbinv)|_atomic_")),
    ("shuffle", re.compile(r"^ds_(?:b?permute|swizzle)|^v_(?:readlane|readfirstlane|writelane|permlane)|_dpp$")),
    ("global", re.compile(r"^(?:buffer|global|flat)_|^s_(?:buffer_)?(?:load|store)")),
    ("shared", re.compile(r"^ds_")),
    ("transcendental", re.compile(r"^v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_")),
    (
        "rest",
        re.compile(r"^(?:v_mov|v_accvgpr|v_pk_mov|v_swap|v_nop|s_c?movk?)|^s_(?:nop|waitcnt|set|get|code|clause)"),
    ),
    ("rest", re.compile(r"^s_(?:branch|cbranch|endpgm|trap|setpc|swappc|sethalt|icache|delay)|^scratch_")),
    ("float", re.compile(r"^v_\w*?(?:f(?:16|32|64)|bf16)|^v_cvt|^v_fma|^v_ldexp")),
    ("integer", re.compile(r"^[vs]_")),
)


def _class(instruction: Instruction) -> str:
    opcode = instruction.opcode
    if opcode[0].islower():
        return next((name for name, words in _AMD_CLASSES if words.search(opcode)), "rest")
    if MATRIX.match(opcode):
        return "matrix"
    if opcode.startswith(("IMAD.MOV", "UIMAD.MOV")):  # a move by another unit
        return "rest"
    return _SASS_CLASS.get(opcode.partition(".")[0], "rest")


def _polls(code: Code, part: list[int]) -> set[int]:
    """Loads that acquire: the last one past L1 before what takes the stale lines of L1 away."""
    found: set[int] = set()
    latest = None
    for index in part:
        opcode = code.instructions[index].opcode
        if opcode.startswith("LD") and ".STRONG." in opcode:
            latest = index
        elif opcode.startswith("CCTL.IVALL") and latest is not None and index - latest <= 4:
            found.add(latest)
    return found


def loop_counts(code: Code, *, steps: bool) -> dict[str, int]:
    """Instructions of the time loop by class, all classes; nothing where there is no loop.

    steps: the kernel has a time loop; else all its loops count.
    """
    loops = code.outermost_loops()
    part = sorted(index for loop in (loops[:1] if steps else loops) for index in loop)
    if not part:
        return {}
    polls = _polls(code, part)
    found = Counter("barrier" if index in polls else _class(code.instructions[index]) for index in part)
    return {name: found[name] for name in CLASSES}
