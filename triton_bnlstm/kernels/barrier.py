"""The grid barrier of sequence mode: programs of one recurrence meet between two steps.

One int32 counter, zero at launch, only grows: each program adds 1 when what it wrote in a step is there for all to
see, and waits until all have. The launch is cooperative, so all programs run at the same time; if one does not come
within 10 s all the same, the kernel stops with an assertion that names it instead of hanging.

An assertion is a call, and in a kernel with a call ptxas serialises Hopper's warpgroup products. There the counter is
raised beyond every target instead, so that the whole grid runs to its end, and `check_kernel`, launched behind it,
asserts that this has not happened.
"""

from __future__ import annotations

import triton
import triton.language as tl

# $0 = 1 in thread 0 if the time is up, else 0; $1 counter's address; $2 what it has to reach; $3 limit in ns.
# Braces make labels and registers local, so the text can stand in a kernel more than once. Only thread 0 polls. The
# load is an acquire: nothing behind it is performed before it, and the multiprocessor's stale L1 lines go. The clock
# is looked at after 1,024 polls, about a millisecond; from then on the thread naps between polls.
_POLL = """
{
    .reg .pred  %done;
    .reg .b32   %seen, %polls;
    .reg .b64   %began, %now;
    mov.b32     $0, 0;
    mov.u32     %polls, %tid.x;
    setp.ne.u32 %done, %polls, 0;
    @%done bra  MET;
SPIN:
    ld.acquire.gpu.global.s32 %seen, [$1];
    setp.ge.s32 %done, %seen, $2;
    @%done bra  MET;
    add.u32     %polls, %polls, 1;
    setp.lt.u32 %done, %polls, 1024;
    @%done bra  SPIN;
    mov.u64     %began, %globaltimer;
NAP:
    ld.acquire.gpu.global.s32 %seen, [$1];
    setp.ge.s32 %done, %seen, $2;
    @%done bra  MET;
    nanosleep.u32 100;
    mov.u64     %now, %globaltimer;
    sub.u64     %now, %now, %began;
    setp.lt.u64 %done, %now, $3;
    @%done bra  NAP;
    ON_TIME_UP;
MET:
}
"""
NOT_MET = "of triton_bnlstm: the grid did not meet within 10 s"
MOST_ARRIVALS = 1 << 30
_DRAINED = tl.constexpr(MOST_ARRIVALS)  # above every target, and so far below 2³¹ that arrivals do not wrap it
_POLL_TO_ASSERT = tl.constexpr(_POLL.replace("ON_TIME_UP", "mov.b32 $0, 1"))
_POLL_TO_DRAIN = tl.constexpr(_POLL.replace("ON_TIME_UP", f"red.relaxed.gpu.global.max.s32 [$1], {MOST_ARRIVALS}"))
# $0 is written before the inputs are last read; no memory access may be kept across the text.
_CONSTRAINTS = tl.constexpr("=&r,l,r,l,~{memory}")
_LIMIT_NS = tl.constexpr(10_000_000_000)


@triton.jit
def arrive(counter_ptr):
    """Count this program in. All that its threads stored before is visible to who sees the counter grow."""
    tl.debug_barrier()  # the release below is one thread's: the others' stores have to happen before it
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, SYNC: tl.constexpr, KERNEL: tl.constexpr):
    """Return when the counter has reached `target`; what was stored before those arrivals is then visible.

    SYNC: what happens when the time is up, "assert" or "drain"; "interpreted" where programs are processes.
    KERNEL: the name that the assertion tells.
    """
    if SYNC == "interpreted":
        while tl.atomic_add(counter_ptr, 0, sem="acquire") < target:
            pass
    else:
        limit = tl.full((), _LIMIT_NS, tl.int64)
        if SYNC == "assert":
            late = tl.inline_asm_elementwise(
                _POLL_TO_ASSERT, _CONSTRAINTS, [counter_ptr, target, limit], dtype=tl.int32, is_pure=False, pack=1
            )
            tl.device_assert(late == 0, KERNEL)
        else:
            tl.inline_asm_elementwise(
                _POLL_TO_DRAIN, _CONSTRAINTS, [counter_ptr, target, limit], dtype=tl.int32, is_pure=False, pack=1
            )
    # Thread 0 alone has acquired: this orders the other threads' loads behind it. It also keeps Triton from
    # pipelining the loop over steps, which would load h before its wait.
    tl.debug_barrier()


@triton.jit
def check_kernel(
    counter_ptr,  # [meetings, 32] int32, of a launch with SYNC "drain"
    KERNEL: tl.constexpr,
):
    """One program per meeting: stops with an assertion if that launch ran out of time."""
    tl.device_assert(tl.load(counter_ptr + tl.program_id(0) * 32) < _DRAINED, KERNEL)
