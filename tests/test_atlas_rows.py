"""The atlas's rows: what is told as worse than before, how they are kept, and which layouts are tried."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench.aot import atlas, atlas_command, checks
from bench.aot.candidates import candidates, default_layout, why_not
from bench.aot.cases import VARIANTS, Case
from bench.aot.rows import COLUMNS, FIGURES, NOTHING, Row, Table, differences, line, missing, of_line, read, row, write
from bench.aot.targets import NUMBERS, TARGETS

NAME = ("sm90", "bf16", "forward/keep", "sequence", "64", "512", "1", "U8,BB64,BK64,W8,resident")


def good(**figures: str) -> Row:
    usual = dict.fromkeys(FIGURES, "0") | {"matrix": "HMMA:64", "barrier": "r1,p1,a2,b2+1", "registers": "178"}
    loop = {"loop": "800", "loop_integer": "100", "loop_global": "40", "loop_matrix": "64"}
    return Row(NAME, "default", usual | {"together": "2"} | loop | figures, NOTHING)


def table_of(*rows: Row, triton: str = "3.9.0") -> Table:
    return Table({"Triton": triton}, {each.name: each for each in rows})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (good(), None),
        (good(loop="840", loop_integer="140"), None),
        (good(loop="841", loop_integer="141"), "loop 800 → 841 instructions (integer 100 → 141)"),
        (good(loop="770", registers="255"), None),
        (good(loop="750"), "loop 800 → 750 instructions: less than the table says"),
        (good(loop="0"), "loop 800 → 0 instructions: less than the table says"),
        (good(loop_global="44", loop_integer="50"), None),
        (good(loop_global="45"), "loop_global 40 → 45"),
        (good(loop_matrix="1"), "loop_matrix 64 → 1"),
        (good(together="1", shared="99"), "together 2 → 1"),
        (good(matrix=NOTHING), "matrix instruction HMMA is gone"),
        (good(matrix="HGMMA:4"), "matrix instruction HMMA is gone"),
        (good(matrix="HMMA:32"), None),
        (good(barrier=NOTHING), "barrier r1,p1,a2,b2+1 → -"),
        (good(barrier="r0,p1,a2,b2+1"), "barrier r1,p1,a2,b2+1 → r0,p1,a2,b2+1"),
        (good(barrier="r1,p1,a1,b2+1"), "barrier r1,p1,a2,b2+1 → r1,p1,a1,b2+1"),
        (good(barrier="r1,p1,a2,b1+1"), "barrier r1,p1,a2,b2+1 → r1,p1,a2,b1+1"),
        (replace(good(), problems="spills: 8 bytes of stack"), "spills: 8 bytes of stack"),
        (replace(good(), name=(*NAME[:7], "U16")), "not in the table"),
    ],
)
def test_what_is_worse(changed, told):
    """The row is named, and the figure."""
    found = differences([changed], table_of(good()), triton="3.9.0")
    assert len(found) == (told is not None)
    assert told is None or (told in found[0] and found[0].startswith("sm90 bf16 forward/keep sequence B64 H512 D1 "))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (good(loop="2000"), False),
        (good(barrier="r1,p1,a2,b1+1"), False),
        (good(barrier="r1,p1,a1,b2+1"), True),
        (good(matrix=NOTHING), True),
        (replace(good(), problems="spills"), True),
    ],
)
def test_what_another_triton_may_do(changed, told):
    assert bool(differences([changed], table_of(good()), triton="3.6.0")) == told


def test_a_kernel_that_is_no_longer_compiled_is_told():
    step = replace(good(), name=(*NAME[:3], "step", *NAME[4:]))
    larger = replace(good(), name=(*NAME[:5], "1024", *NAME[6:]))
    (told,) = missing([good()], table_of(good(), step, larger))  # the larger one's size was not asked for
    assert told.startswith("sm90 bf16 forward/keep step B64 H512")
    assert missing([good()], table_of(good(), replace(step, of="near"))) == []


def result(**changes):
    used = {"shared": 98_304, "registers": 178, "stack": 0, "spills": 0, "matrix": {"HMMA": 64}, "instructions": 1000}
    shape = {"releases": 1, "polls": 1, "acquires": 2, "before": 2, "behind": 1, "faults": []}
    constants = {"U": 8, "BB": 64, "BK": 64, "RESIDENT": True, "SYNC": "assert", "PRECISION": "ieee"}
    found = {"target": "sm90", "numbers": "bf16", "kernel": "forward/keep", "mode": "sequence", "batch": 64}
    found |= {"hidden": 512, "directions": 1, "constants": constants, "programs": 64, "problems": []}
    found |= {"options": {"num_warps": 8, "num_stages": 1}}
    return found | {"resources": used | {"loop": {"matrix": 64, "integer": 9}, "barrier": shape} | changes}


def test_a_row_of_what_was_compiled():
    found = row(result(), "default")
    assert found.name == NAME
    assert found.figures["together"] == "1"  # 178 registers of 256 threads: two would fit no more
    assert found.figures["matrix"] == "HMMA:64"
    assert found.figures["barrier"] == "r1,p1,a2,b2+1"
    assert (found.number("loop"), found.number("loop_matrix"), found.number("spills")) == (73, 64, 0)
    assert of_line(line(found)) == found
    with pytest.raises(ValueError, match="columns"):
        of_line("sm90\tbf16")


def test_barrier_faults_are_problems_of_a_kernel():
    shape = {"releases": 1, "polls": 1, "acquires": 2, "before": 0, "behind": 1, "faults": ["no block barrier"]}
    assert checks.problems(result(barrier=shape)) == ["barrier: no block barrier"]
    none = {"releases": 0, "polls": 0, "acquires": 0, "before": 0, "behind": 0, "faults": []}
    assert checks.problems(result(barrier=none)) == ["barrier: no release and no poll"]
    assert checks.problems(result()) == []


def test_the_table_is_the_same_again_and_sorted(tmp_path):
    small = replace(good(), name=(*NAME[:5], "100", *NAME[6:]))
    path = tmp_path / "atlas.tsv"
    write(path, [good(), small], ["About.", "Triton: 3.9.0"])
    found = read(path)
    assert found.head == {"Triton": "3.9.0"}
    assert list(found.rows.values()) == [small, good()]
    path.write_text("\t".join(COLUMNS[:-1]) + "\n")
    with pytest.raises(ValueError, match="write it again"):
        read(path)


def results_of(*found):
    """In the place of the compiling process: what is in request.skip is not compiled."""
    asked = []

    def results(request, cache):
        asked.append(request)
        for each in found:
            name = row(each, "default").name
            yield {"done": list(name)} if name in request.skip else each

    return results, asked


def test_what_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Rows that are done are not compiled again, unless kernels or Triton are others; half a line does no harm."""
    path = tmp_path / "kept" / "atlas.jsonl"
    plan = [atlas.Request("sm90", ["bf16"], ["forward/keep"], [64], [512], [1])]

    def made(version):
        results, asked = results_of(result())
        monkeypatch.setattr(atlas, "results", results)
        rows = atlas.make(plan, atlas.Kept(path, version), 1, lambda *_: None)
        return rows, asked[0].skip

    first, skipped = made("Triton 3.9.0")
    assert [each.name for each in first] == [NAME]
    assert skipped == []
    with path.open("a") as file:
        file.write('{"of": "Triton 3.9.0 ')
    again, skipped = made("Triton 3.9.0")
    assert again == first
    assert skipped == [NAME]
    assert all(json.loads(each) for each in path.read_text().splitlines())
    assert made("Triton 3.6.0")[1] == []
    monkeypatch.setattr(atlas, "fingerprint", lambda **_: "other")
    assert made("Triton 3.6.0")[1] == []


def test_a_default_near_another_one_stays_a_default(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "results", results_of(result())[0])
    request = atlas.Request("sm90", ["bf16"], ["forward/keep"], [64], [512], [1])
    for plan in ([request, replace(request, near=True)], [replace(request, near=True), request]):
        (found,) = atlas.make(plan, atlas.Kept(tmp_path / "kept.jsonl", "3.9.0"), 1, lambda *_: None)
        assert found.of == "default"


def test_layouts_that_tuning_may_choose():
    device, numbers = TARGETS["sm90"].device, NUMBERS["bf16"]
    case = Case("backward/plain", 64, 1024, 1)
    found = list(candidates(device, numbers, case))
    layouts = [layout for layout, _ in found]
    assert len(layouts) == len(set(layouts)) > 10
    assert default_layout(device, numbers, case) not in layouts
    reasons = {reason for _, reason in found if reason}
    assert any("bytes of W_hh stay on chip" in reason for reason in reasons)
    assert list(candidates(device, numbers, Case("moments/centre", 64, 1024, 1))) == []


def test_why_a_layout_cannot_run():
    case = Case("forward/keep", 64, 512, 1)
    device, numbers = TARGETS["sm75"].device, NUMBERS["fp16"]
    layout = default_layout(device, numbers, case)
    assert layout is not None
    assert why_not(device, numbers, case, layout) is None
    assert "without a matrix unit" in str(why_not(device, numbers, case, replace(layout, resident=True)))
    assert "needs a matrix unit" in str(why_not(device, numbers, case, replace(layout, inner=64)))
    small = replace(layout, units=4, warps=8)
    many = Case("forward/keep", 64, 4096, 1)
    assert "have to run at the same time" in str(why_not(device, numbers, many, small))


def test_the_plans():
    """The representative part is in the preset, so that the table has it; everything has every variant everywhere."""

    def asked(plan):
        return {
            (part.target, numbers, variant, batch, hidden, ways)
            for part in plan
            if not part.near
            for numbers in part.numbers
            for variant in part.variants
            for batch in part.batches
            for hidden in part.hiddens
            for ways in part.directions
        }

    assert asked(atlas.representative(VARIANTS)) < asked(atlas.preset(VARIANTS))
    whole = atlas.everything(VARIANTS)
    assert {variant for *_, variant, _, _, _ in asked(whole)} == set(VARIANTS)
    assert {part.target for part in whole if part.near} == set(TARGETS)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--targets", "sm42"], "'sm42' is none of sm75"),
        (["--targets", "sm90"], "say with --table"),
        (["--jobs", "0"], "must be 1 or more"),
        (["--everything", "--check"], "does not hold everything"),
        (["--table", "/nowhere/atlas.tsv"], "no such folder"),
    ],
)
def test_arguments_that_cannot_be(argv, told, capsys):
    with pytest.raises(SystemExit):
        atlas_command.main(argv, {}, list(VARIANTS))
    assert told in capsys.readouterr().err


def test_the_command_is_one_of_bench_aot(capsys):
    from bench.aot.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(["atlas", "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "--everything" in told
    assert max(map(len, told.splitlines())) <= 120


def test_the_command_writes_compares_and_fails(tmp_path, monkeypatch, capsys):
    table = tmp_path / "atlas.tsv"
    argv = ["--targets", "sm90", "--table", str(table), "--kept", str(tmp_path / "kept.jsonl"), "--fresh"]
    versions = {"triton": "3.9.0", "torch": "2.13.0"}

    def run(found, *more):
        monkeypatch.setattr(atlas, "results", results_of(found)[0])
        status = atlas_command.main([*argv, *more], versions, list(VARIANTS))
        return status, capsys.readouterr().out

    assert run(result())[0] == 0
    assert read(table).head["Triton"] == "3.9.0"
    before = table.read_text()
    status, told = run(result(loop={"matrix": 64, "integer": 99}), "--check")
    assert status == 1
    assert "loop 73 → 163 instructions (integer 9 → 99)" in told
    assert run(result(), "--check")[0] == 0
    assert table.read_text() == before
    status, told = run({**result(), "problems": ["spills: 8 bytes of stack"]})
    assert status == 1
    assert "spills: 8 bytes of stack" in told
