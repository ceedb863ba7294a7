"""Loops and classes of instructions in machine code, by hand-made texts, and barriers in the PTX of real kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.aot import machine, meeting

ROOT = Path(__file__).parents[1]

# A loop over steps whose head stands first, with a poll inside, a cold block behind the kernel's end that comes back,
# a subroutine, what a failed assertion runs into, and a jump to itself that pads the end.
SASS = """
.text.forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_9:
        /*0010*/                   NANOSLEEP 0x64 ;
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_0:
        /*0030*/                   BSSY B0, `(.L_x_1) ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/                   LDG.E.STRONG.GPU R25, desc[UR14][R186.64] ;
        /*0060*/                   CCTL.IVALL ;
        /*0070*/              @!P6 BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   BSYNC B0 ;
.L_x_1:
        /*0090*/               @P0 BRA `(.L_x_4) ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/                   LDG.E.128.STRONG.GPU R24, desc[UR14][R28.64] ;
        /*00c0*/                   LDSM.16.M88.4 R4, [R8] ;
        /*00d0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00e0*/                   SHFL.BFLY PT, R3, R4, 0x1, 0x1f ;
        /*00f0*/                   MUFU.EX2 R3, R3 ;
        /*0100*/                   FFMA R3, R3, R4, R5 ;
        /*0110*/                   IMAD.WIDE R2, R3, 0x4, R8 ;
        /*0120*/                   IMAD.MOV.U32 R2, RZ, RZ, R3 ;
        /*0130*/               @P1 CALL.REL.NOINC `($forward_kernel$sqrt) ;
        /*0140*/              @!P2 BRA `(.L_x_5) ;
.L_x_6:
        /*0150*/                   STG.E desc[UR14][R2.64], R3 ;
        /*0160*/                   MEMBAR.ALL.GPU ;
        /*0170*/               @P6 REDG.E.ADD.STRONG.GPU desc[UR14][R186.64], R25 ;
        /*0180*/                   BRA.U UP0, `(.L_x_0) ;
        /*0190*/                   EXIT ;
.L_x_4:
        /*01a0*/                   CALL.ABS.NOINC R2 ;
        /*01b0*/                   EXIT ;
.L_x_5:
        /*01c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ ;
        /*01d0*/                   BRA `(.L_x_6) ;
$forward_kernel$sqrt:
        /*01e0*/                   MUFU.RSQ R2, R2 ;
        /*01f0*/                   RET.REL.NODEC R20 `(forward_kernel) ;
.L_x_7:
        /*0200*/                   BRA `(.L_x_7);
"""


def test_the_time_loop_of_nvidia_machine_code():
    found = machine.loop_counts(machine.sass(SASS), steps=True)
    expected = {"matrix": 1, "global": 2, "shared": 1, "transcendental": 1, "integer": 1, "float": 1, "shuffle": 1}
    # the poll, CCTL, BAR, MEMBAR, REDG and the cold block's SYNCS; jumps, the convergence barrier, CALL and a move
    expected |= {"barrier": 6, "rest": 10}
    assert found == expected
    assert machine.loop_counts(machine.sass(SASS.replace("BRA.U UP0, `(.L_x_0)", "NOP")), steps=True)["matrix"] == 0
    assert machine.loop_counts(machine.sass(SASS.split(".L_x_9:")[0]), steps=True) == {}


def test_all_loops_of_a_kernel_without_steps():
    everything = machine.loop_counts(machine.sass(SASS), steps=False)
    assert sum(everything.values()) == sum(machine.loop_counts(machine.sass(SASS), steps=True).values()) + 2


def test_a_loop_within_that_is_left_by_a_call():
    """As ptxas leaves a loop that only some of the threads are still in."""
    left = """
        /*0141*/                   NOP ;
.L_x_11:
        /*0142*/               @P4 CALL.REL.NOINC `(.L_x_12) ;
        /*0143*/                   BRA `(.L_x_11) ;
.L_x_12:
        /*0144*/              @!P2 BRA `(.L_x_5) ;"""
    text = SASS.replace("\n        /*0140*/              @!P2 BRA `(.L_x_5) ;", left)
    found, before = (machine.loop_counts(machine.sass(each), steps=True) for each in (text, SASS))
    assert found == before | {"rest": before["rest"] + 3}


def test_threads_that_meet_elsewhere_go_on_there():
    """A convergence barrier whose end is not right behind the instruction that waits at it."""
    text = SASS.replace("BSYNC B0 ;\n.L_x_1:", "BSYNC B0 ;\n        /*0088*/                   EXIT ;\n.L_x_1:")
    assert machine.loop_counts(machine.sass(text), steps=True) == machine.loop_counts(machine.sass(SASS), steps=True)


def test_a_jump_that_nobody_can_follow_is_an_error():
    with pytest.raises(ValueError, match="where a register says"):
        machine.sass(SASS.replace("BRA.U UP0, `(.L_x_0)", "BRX R2 -0x10"))
    with pytest.raises(ValueError, match="no label"):
        machine.loop_counts(machine.sass(SASS.replace(".L_x_0:", ".L_x_8:")), steps=True)


AMDGCN = """
forward_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_2
.LBB0_1:                                ; =>This Loop Header: Depth=1
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tds_read_b64 v[0:1], v2
\tds_bpermute_b32 v0, v1, v2
\tv_mov_b32_dpp v3, v2 row_shr:8 row_mask:0xf bank_mask:0xf
\ts_barrier
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\tv_exp_f32_e32 v0, v1
\tv_pk_mul_f32 v[0:1], v[2:3], v[4:5]
\tv_lshl_add_u32 v0, v1, 2, v3
\ts_add_i32 s0, s0, 1
\ts_waitcnt lgkmcnt(0)
\tv_mov_b32_e32 v0, 0
\ts_branch .LBB0_1
.LBB0_3:
\tv_add_f32_e32 v0, v1, v2
\ts_endpgm
"""


def test_the_time_loop_of_amd_assembly():
    found = machine.loop_counts(machine.amd(AMDGCN), steps=True)
    expected = {"matrix": 1, "global": 1, "shared": 1, "barrier": 1, "transcendental": 1, "integer": 2, "float": 1}
    assert found == expected | {"shuffle": 2, "rest": 4}


# Compiles kernels of the `triton_bnlstm` that is found first, and tells their PTX by target and SYNC.
COMPILE = """
import json, sys
from bench.aot.cases import Case, launches
from bench.aot.compiler import compiled
from bench.aot.targets import NUMBERS, TARGETS
found = {}
for target, numbers, *case in json.load(sys.stdin):
    for launch in launches(TARGETS[target].device, NUMBERS[numbers], Case(*case)):
        if launch.constants.get("SYNC", "none") != "none":
            found[f"{target} {launch.constants['SYNC']}"] = compiled(launch, TARGETS[target]).asm["ptx"]
print(json.dumps(found))
"""
SMALL = ("inference/narrow", 16, 64, 1)
DIVIDED = ("backward/narrow", 64, 512, 1)  # meets twice in a step, and on Hopper in warpgroups: "drain"
KERNELS = [("sm90", "bf16", *SMALL), ("sm75", "fp16", *SMALL), ("sm90", "bf16", *DIVIDED)]
WAITS = {"sm90 assert": 1, "sm75 assert": 1, "sm90 drain": 2}


def compiled(kernels, cache, *paths):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    process = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(kernels),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        cwd=cache.parent,  # not where this `triton_bnlstm` would be found first
    )
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """PTX of kernels with both ways to end a wait, on Hopper and on an older device."""
    return compiled(KERNELS, tmp_path_factory.mktemp("cache"))


def told(text):
    return meeting.problems(meeting.shape(meeting.ptx(text)), meets=True)


def without_barriers(lines, where):
    """Lines without block barriers next to a place: until the first memory access before it, or behind it."""
    kept, removing = [], True
    for line in lines if where == "behind" else reversed(lines):
        code = line.partition("//")[0]
        if re.search(r"\b(ld|st)\.(global|shared)", code):
            removing = False
        if not (removing and re.match(r"\s*bar(rier)?\.sync", code)):
            kept.append(line)
    return kept if where == "behind" else kept[::-1]


def release_of(text):
    return next(k for k, line in enumerate(text) if re.search(r"\b(red|atom)\.\S*release", line))


def missing_release(text):
    lines = text.splitlines()
    del lines[release_of(lines)]
    return lines


def relaxed_release(text):
    lines = text.splitlines()
    lines[release_of(lines)] = lines[release_of(lines)].replace("release", "relaxed")
    return lines


def relaxed_poll(text):
    return text.replace("ld.acquire.gpu", "ld.relaxed.gpu", 1).splitlines()


def poll_of_the_block(text):
    return text.replace("ld.acquire.gpu", "ld.acquire.cta", 1).splitlines()


def missing_poll(text):
    start = text.index("SPIN:")
    return (text[:start] + text[text.index("MET:", start) :]).splitlines()


def missing_block_barrier_before(text):
    lines = text.splitlines()
    at = next(k for k in range(len(lines)) if is_release_behind_a_store(lines, k))
    return without_barriers(lines[:at], "before") + lines[at:]


def is_release_behind_a_store(lines, k):
    return re.search(r"\b(red|atom)\.\S*release", lines[k]) and any("st.global" in line for line in lines[:k])


def missing_block_barrier_behind(text):
    lines = text.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("MET:"))
    return lines[:at] + without_barriers(lines[at:], "behind")


def load_before_the_poll(text):
    lines = text.splitlines()
    at = max(k for k, line in enumerate(lines) if re.search(r"\b(red|atom)\.\S*release", line))
    return [*lines[: at + 1], "\tld.global.cg.b32 \t%r1, [ %rd1 + 0 ];", *lines[at + 1 :]]


@pytest.mark.parametrize("kernel", WAITS)
def test_the_barrier_of_real_kernels(kernel, real):
    found = meeting.shape(meeting.ptx(real[kernel]))
    assert meeting.problems(found, meets=True) == []
    assert (found.releases, found.polls, found.acquires) == (WAITS[kernel], WAITS[kernel], 2 * WAITS[kernel])
    assert found.before >= found.releases
    assert found.behind >= found.polls
    assert meeting.problems(found, meets=False) == ["a barrier where nobody is met"]


@pytest.mark.parametrize("kernel", WAITS)
@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        (missing_release, "not as many polls as releases"),
        (relaxed_release, "an atomic that releases nothing to the GPU"),
        (relaxed_poll, "a poll that acquires nothing from the GPU"),
        (poll_of_the_block, "a poll that acquires nothing from the GPU"),
        (missing_poll, "not as many polls as releases"),
        (missing_block_barrier_before, "no block barrier between a store and the release"),
        (missing_block_barrier_behind, "no block barrier between a poll and a load"),
        (load_before_the_poll, "loaded past L1 before the poll"),
    ],
)
def test_a_defect_of_the_barrier_is_told(kernel, defect, expected, real):
    text = "\n".join(defect(real[kernel]))
    assert text != real[kernel]
    assert any(expected in problem for problem in told(text)), told(text)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('sem="release"', 'sem="relaxed"', "an atomic that releases nothing to the GPU"),
        ("ld.acquire.gpu.global", "ld.volatile.global", "a poll that acquires nothing from the GPU"),
        (
            "    tl.atomic_add(counter_ptr, 1, sem",
            "    if False:\n        tl.atomic_add(counter_ptr, 1, sem",
            "releases",
        ),
        (
            "    # pipelining the loop over steps, which would load h before its wait.\n    tl.debug_barrier()\n",
            "",
            "load",
        ),
        ("    tl.debug_barrier()  # the release", "    # the release", None),
    ],
    ids=["relaxed atomic", "no acquire", "no release", "no block barrier behind", "no block barrier before"],
)
def test_a_defective_copy_of_the_kernels_is_told(old, new, expected, real, tmp_path):
    copy = tmp_path / "copy" / "triton_bnlstm"
    shutil.copytree(ROOT / "triton_bnlstm", copy, ignore=shutil.ignore_patterns("__pycache__"))
    barrier = copy / "kernels" / "barrier.py"
    source = barrier.read_text(encoding="utf-8")
    assert old in source
    barrier.write_text(source.replace(old, new), encoding="utf-8")
    text = compiled(KERNELS[:1], tmp_path / "cache", copy.parent)["sm90 assert"]
    if expected is not None:
        assert any(expected in problem for problem in told(text)), told(text)
    else:  # newer Tritons put one of their own before an atomic; then there is one less
        before = meeting.shape(meeting.ptx(real["sm90 assert"])).before
        assert told(text) or meeting.shape(meeting.ptx(text)).before < before


PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 128
{
	.reg .pred 	%p<2>;
$L__BB0_1:
	bar.sync 	0;
	// begin inline asm

{ .reg .pred complete;
waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
}
{
waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
	@!complete bra.uni waitLoop;
}
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
		{%r3,
		%r4}, %rd1;
	@%p1 st.global.b32 [ %rd1 + 0 ], { %r3 };
	@%p1 bra 	$L__BB0_1;
	ret;
}
	.section	.debug_abbrev
	{
.b8 1
	}
"""


def test_labels_are_those_of_their_braces():
    kernel = meeting.ptx(PTX)
    opcodes = [instruction.opcode.partition(".")[0] for instruction in kernel.code.instructions]
    assert opcodes == ["bar", "mbarrier", "bra", "mbarrier", "bra", "wgmma", "st", "bra", "ret"]
    assert [list(kernel.code.successors(k)) for k in (2, 4, 7, 8)] == [[1, 3], [3, 5], [0, 8], []]
    assert meeting.problems(meeting.shape(kernel), meets=False) == []
    assert meeting.problems(meeting.shape(kernel), meets=True) == ["barrier: no release and no poll"]
    with pytest.raises(ValueError, match="no label"):
        list(meeting.ptx(PTX.replace("$L__BB0_1:", "")).code.edges())
