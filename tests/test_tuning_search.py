"""The search for a layout, with kernels whose times are a formula and a clock that stands still in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.aot.targets import TARGETS
from tests.support.tuning import BY, H100, WORK, Clock, FakeBench, entry, microseconds
from triton_bnlstm.kernels.config import Config, MomentsConfig
from triton_bnlstm.tuning import space
from triton_bnlstm.tuning.tuner import LEAST_ROUNDS, ROUNDS, SCREENING, TuningError, tune
from triton_bnlstm.tuning.work import FLAGS, KERNELS, LAYOUTS, Work

CASE = {"hidden": 512, "batch": 64, "columns": 0}


def searched(bench, **options):
    options = {"seconds": 1000.0, "by": BY, "case": CASE, **options}
    return tune(WORK, bench, clock=bench.clock, now=lambda: 5.0, **options)


def test_the_fastest_layout_is_found_and_told():
    bench = FakeBench()
    found = searched(bench)
    possible = {bench.default, *bench.structures(), *bench.neighbours(found.layout)}
    assert microseconds(found.layout) == min(map(microseconds, possible))
    assert found.layout != bench.default
    assert found.gain == pytest.approx(microseconds(bench.default) / microseconds(found.layout), rel=1e-3)
    assert (found.how, found.at, found.by, found.case, found.default) == ("measured", 5.0, BY, CASE, bench.default)
    assert {each.layout for each in found.candidates} == set(bench.prepared)  # every one is told of


def test_layouts_take_turns():
    bench = FakeBench()
    found = searched(bench)
    first_round = bench.sampled[: len(set(bench.sampled[:20]))]
    assert len(first_round) == len(set(first_round)) > 5
    assert bench.sampled[len(first_round) : 2 * len(first_round)] == first_round
    # those far behind are timed no further than the screening
    slow = [each for each in found.candidates if each.rounds == SCREENING]
    assert slow
    assert all(each.microseconds > 1.25 * microseconds(found.layout) for each in slow)


@pytest.mark.parametrize(("better", "taken"), [(0.985, False), (0.975, True)])
def test_what_stands_stays_unless_something_is_two_percent_better(better, taken):
    """2 % is what `BETTER` says: a choice must not follow the noise."""
    bench = FakeBench(time=lambda layout: 10 * (1 if layout == bench.default else better))
    assert (searched(bench).layout != bench.default) == taken


def test_a_lucky_sample_is_not_enough():
    """Medians count, and the winner has to win once more."""
    bench = FakeBench(time=lambda layout: 10.0, noise=lambda k: 0.5 if k % 7 == 0 else 1.0)
    assert searched(bench).layout == bench.default
    lucky = {}

    def time(layout):  # fast in the first rounds that it is in, never again
        lucky[layout] = lucky.get(layout, 0) + 1
        return 10.0 if layout == bench.default or lucky[layout] > ROUNDS + 1 else 8.0

    bench = FakeBench(time=time)
    assert searched(bench).layout == bench.default


def test_a_clock_that_slows_down_slows_all():
    """All layouts equal, and a device whose clock falls to half of its speed while it works."""
    bench = FakeBench(time=lambda layout: 10.0, noise=lambda k: min(2.0, 1 + k / 100))
    found = searched(bench)
    assert found.layout == bench.default


def test_layouts_that_cannot_run_are_told_and_not_timed():
    bench = FakeBench()
    every = set(bench.structures()) - {bench.default}
    bench.unfit = dict.fromkeys(every, "it needs 300000 bytes of shared memory")
    found = searched(bench)
    assert not every & set(bench.sampled)
    assert {each.failed for each in found.candidates if each.layout in every} == set(bench.unfit.values())
    bench = FakeBench()
    bench.unfit = {bench.default: "it spills"}  # then another one has nothing to be compared with
    found = searched(bench)
    assert found.layout != bench.default
    assert found.gain is None


def test_nothing_runs():
    bench = FakeBench(compiling=0.0)
    bench.prepare = lambda layout: FakeBench.prepare(replace(bench, unfit={layout: "no"}), layout)
    with pytest.raises(TuningError, match=r"forward bfloat16 H512 B64 .* \(no\)"):
        searched(bench)


def test_the_time_is_kept():
    """What takes 60 s to compile is not begun once the time is up; what has been compiled is timed all the same."""
    bench = FakeBench(compiling=60.0)
    found = searched(bench, seconds=200.0)
    assert bench.clock.now < 200 + 2 * 60
    assert len(found.candidates) == len(bench.prepared) == 3
    assert found.candidate(found.layout).rounds >= LEAST_ROUNDS
    bench = FakeBench(compiling=60.0)
    assert searched(bench, seconds=1.0).layout == bench.default  # there was time for one


def test_only_what_is_new_is_tried():
    bench = FakeBench()
    found = searched(bench)
    again = FakeBench()
    assert searched(again, known=found) is found
    assert again.prepared == again.sampled == []
    # one that this version of the library has come to know of: it alone, against the best and the default
    known = replace(found, candidates=tuple(each for each in found.candidates if each.layout != found.layout))
    known = replace(known, layout=bench.default)
    newer = searched(again, known=known)
    assert newer.layout == found.layout
    assert set(again.prepared) == {bench.default, found.layout}
    assert {each.layout for each in newer.candidates} == {each.layout for each in found.candidates}


def test_times_against_an_earlier_default_are_taken_again():
    """Nothing else is new, so only it and the best one are timed; the gain is that over the default of today."""
    found = searched(FakeBench())
    earlier = next(each for each in found.candidates if each.layout not in (found.layout, found.default))
    known = replace(
        found,
        default=earlier.layout,
        candidates=tuple(each._replace(standard=2 * earlier.microseconds) for each in found.candidates),
    )
    bench = FakeBench()
    newer = searched(bench, known=known)
    assert set(bench.prepared) == {found.layout, bench.default}
    assert (newer.layout, newer.default) == (found.layout, bench.default)
    assert newer.gain == pytest.approx(found.gain)
    assert {each.layout for each in newer.candidates} == {each.layout for each in known.candidates}


def test_times_of_another_triton_are_taken_again():
    old = BY._replace(triton="2.0.0")
    bench = FakeBench()
    found = searched(bench, known=replace(searched(FakeBench()), by=old))
    assert found.by == BY
    assert len(bench.prepared) > 5


def test_what_fails_while_it_is_timed_is_dropped():
    from triton_bnlstm.tuning.tuner import Unfit

    bench = FakeBench()
    sample, best = bench.sample, searched(FakeBench()).layout

    def failing(layout):
        if layout == best and len(bench.sampled) > 30:
            raise Unfit("it failed")
        return sample(layout)

    bench.sample = failing
    found = searched(bench)
    assert found.layout != best
    assert found.candidate(best).failed == "it failed"


# Which layouts there are


@given(
    st.sampled_from(sorted(TARGETS)),
    st.sampled_from(KERNELS),
    st.sampled_from([1, 5, 16, 100, 512, 1000, 2048]),
    st.sampled_from([1, 2, 33, 64, 256]),
    st.sampled_from([(torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]),
)
def test_every_layout_is_one_that_may_run(target, kernel, hidden, batch, numbers):
    device = TARGETS[target].device
    columns = hidden if kernel == "moments" else 0
    work = Work(kernel, hidden, batch, 1, *numbers, FLAGS[kernel], columns)
    found = space.structures(device, work)
    assert found[0] == space.analytic(device, work)
    assert len(found) == len(set(found))
    for layout in found:
        assert type(layout) is LAYOUTS[kernel]
        assert layout == found[0] or space.why_not(device, work, layout) is None
        if isinstance(layout, Config) and layout.sequence and space.programs(work, layout) > 1:
            assert device.backend == "cuda"
            assert space.programs(work, layout) <= device.resident_programs(0, 1, layout.warps)


def test_the_analytic_layout_is_one_that_may_run():
    for target in TARGETS.values():
        for kernel in KERNELS:
            for hidden, batch in ((100, 100), (512, 64), (1024, 64), (2048, 128)):
                work = Work(kernel, hidden, batch, 1, torch.float16, columns=hidden if kernel == "moments" else 0)
                assert space.why_not(target.device, work, space.analytic(target.device, work)) is None, (target, work)


def test_the_model_orders_as_the_analytic_choice_does():
    """Few units, W_hh on chip, a product that is divided: the library's own reasons."""
    for kernel in ("forward", "backward"):
        work = Work(kernel, 1024, 64, 1, torch.bfloat16)
        found = space.structures(H100, work)
        times = [space.modelled_seconds(H100, work, layout) for layout in found]
        assert times[1:] == sorted(times[1:])
        assert times[0] == min(times)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"units": 4, "sequence": True}, None),
        ({"units": 4, "sequence": True, "warps": 32}, "have to run at the same time"),
        ({"units": 64, "batch_tile": 128}, "does not fit into registers"),
        ({"warps": 64}, "more than a program can have"),
        ({"units": 32, "resident": True, "inner": 64}, "from one launch to the next"),
        ({"stages": 8}, None),
        ({"stages": 9}, "a pipeline of 9 stages"),
        ({"stages": 8, "inner": 256}, "bytes of the pipeline"),
    ],
)
def test_why_a_layout_cannot_run(change, why):
    work = Work("forward", 1064, 64, 1, torch.bfloat16)
    base = Config(sequence=False, units=8, batch_tile=64, inner=64, resident=False, warps=4, stages=2)
    found = space.why_not(H100, work, replace(base, **change))
    assert (found is None) if why is None else (why in (found or ""))


def test_programs_that_hold_a_recurrence_each_need_not_meet():
    many = Work("inference", 16, 200_000, 1, torch.bfloat16)
    alone = Config(sequence=True, units=16, batch_tile=64, inner=16, resident=False, warps=4, stages=2)
    assert space.programs(many, alone) > H100.resident_programs(0, 1, 4)
    assert space.why_not(H100, many, alone) is None
    assert "have to run at the same time" in space.why_not(H100, many, replace(alone, units=8))


def test_why_moments_cannot_run():
    work = Work.of_moments(512, 64, 1, torch.bfloat16, centre=True)
    assert space.why_not(H100, work, MomentsConfig(64, 64, 32)) is None
    assert "64 warps are more" in space.why_not(H100, work, MomentsConfig(64, 64, 64))
    assert "does not fit" in space.why_not(H100, work, MomentsConfig(256, 128, 8))


def test_what_is_varied():
    """All that a layout has: some of it by dividing the work differently, all of it beside the best of these."""
    for kernel in ("forward", "inference", "backward"):
        work = Work(kernel, 512, 64, 1, torch.bfloat16)
        found = space.structures(H100, work)
        assert {layout.sequence for layout in found} == {True, False}
        assert len({layout.units for layout in found}) > 1
        assert {layout.resident for layout in found} == {True, False}
        beside = {False: set(), True: set()}
        default = found[0]
        for layout in (default, replace(default, resident=False, stages=2)):
            for near in space.neighbours(layout):
                beside[layout.resident] |= {name for name in vars(near) if getattr(near, name) != getattr(layout, name)}
        names = {"units", "batch_tile", "inner", "resident", "warps", "stages"}
        if kernel == "backward":
            names |= {"splits", "groups"}
            assert len({(layout.splits, layout.groups) for layout in found}) > 3
        assert beside[True] | {"stages"} == beside[False] == names
    work = Work.of_moments(512, 64, 1, torch.bfloat16, centre=True)
    tiles = space.structures(H100, work)
    assert all(len({getattr(tile, name) for tile in tiles}) > 1 for name in ("rows", "columns", "warps"))
    assert len(space.structures(H100, Work("save", 512, 64, 1, torch.bfloat16))) == 2


def test_layouts_of_another_kind():
    assert "no layout of forward" in space.why_not(H100, WORK, MomentsConfig(64, 64, 8))
    assert "no layout of backward" in space.why_not(H100, replace(WORK, kernel="backward"), entry().layout)
    mi300 = TARGETS["gfx942"].device
    assert "CUDA" in space.why_not(mi300, WORK, replace(entry().layout, sequence=True, batch_tile=16))


def test_clock_is_used_for_nothing_but_the_time_cap():
    """A clock that stands still is a tuning that takes no time."""
    bench = FakeBench(clock=Clock(), compiling=0.0)
    assert searched(bench, seconds=1e-3).layout == searched(FakeBench()).layout


# What counts of the samples


def counted(time):
    """Times of layouts by how often each has been sampled: 16 times in each comparison, the first not counted."""
    seen = {}

    def of(layout):
        seen[layout] = seen.get(layout, 0) + 1
        return time(layout, (seen[layout] - 1) % (ROUNDS + 1))

    return of


def test_medians_count_not_means_and_not_the_best_sample():
    """One layout is fast but for three samples that something else has disturbed, another slow but for one."""
    fast, lucky = list(FakeBench().structures())[1:3]

    def time(layout, sample):
        if layout == fast:
            return 1000.0 if sample % 5 == 4 else 8.0
        return 1.0 if layout == lucky and sample == 8 else 10.0

    found = searched(FakeBench(time=counted(time)))
    assert found.layout == fast
    assert found.gain == pytest.approx(10 / 8, rel=1e-3)


def test_the_default_is_timed_to_the_end_however_slow_it_is():
    """It is what all others are compared with."""
    bench = FakeBench()
    bench.time = lambda layout: 100.0 if layout == bench.default else 10.0 - layout.units / 1000
    found = searched(bench)
    assert found.candidate(bench.default).rounds == ROUNDS
    assert found.gain == pytest.approx(10, rel=0.01)


def test_what_stands_is_timed_to_the_end_however_slow_it_is():
    """What takes its place has to be seen to be faster in as many rounds."""
    bench = FakeBench()
    standing = list(bench.structures())[1]
    known = entry(layout=standing, by=BY._replace(triton="2.0.0"))
    bench.time = lambda layout: 100.0 if layout == standing else 10.0
    found = searched(bench, known=known)
    assert found.layout != standing
    assert found.candidate(standing).rounds == ROUNDS


def test_timing_ends_with_the_time():
    """But for the fewest rounds that say anything."""
    bench = FakeBench(time=lambda layout: 2e6, compiling=0.0)
    found = searched(bench, seconds=1.0)
    assert max(each.rounds for each in found.candidates) == LEAST_ROUNDS
    bench = FakeBench(time=lambda layout: 2e6, compiling=0.0)
    found = searched(bench, seconds=1e6)
    assert max(each.rounds for each in found.candidates) == ROUNDS


@pytest.mark.parametrize(("confirmed", "taken"), [(9.9, False), (9.7, True)])
def test_the_winner_wins_by_two_percent_once_more(confirmed, taken):
    """A layout of 8 µs where many are compared, and of so many in its rounds against the default alone."""
    bench = FakeBench()
    best = list(bench.structures())[1]
    compared = []

    def time(layout):
        if layout != best:
            return 10.0
        compared.append(layout)
        return 8.0 if len(compared) <= waves * (ROUNDS + 1) else confirmed

    # the waves that it is in: the structures', and that of its neighbours
    waves = 2
    bench.time = time
    found = searched(bench)
    assert len(compared) == (waves + 1) * (ROUNDS + 1)
    assert (found.layout == best) == taken
