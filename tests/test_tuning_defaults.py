"""The layouts that come with the package: up to date, found by the devices that they are for, and made as they say."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from bench import defaults, trials
from bench.aot.targets import TARGETS
from bench.defaults import ARCHITECTURES, FOLDER, fault, faults, generate, main, read, sizes
from bench.trials import compiled
from triton_bnlstm.kernels.config import BackwardConfig
from triton_bnlstm.tuning import Work, choice, shipped, space
from triton_bnlstm.tuning.device import Identity, minor, triton_version
from triton_bnlstm.tuning.entry import MEASURED, MODELLED, Candidate, Entry
from triton_bnlstm.tuning.work import layout_as_json

FILES = {name: (FOLDER / f"{name}.json").read_text(encoding="utf-8") for name in ARCHITECTURES}
# Bytes of each file: the package is small.
MOST_BYTES = 160 * 1024


def entries_of(name):
    return shipped.parse(FILES[name])[Identity.of(TARGETS[name].device)]


@pytest.fixture(autouse=True)
def _looked_up_anew():
    choice.forget()
    yield
    choice.forget()


def test_they_are_up_to_date(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out
    assert {path.stem for path in FOLDER.glob("*.json")} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_is_whole(name):
    text = FILES[name]
    assert len(text) < MOST_BYTES
    devices = shipped.parse(text)
    assert shipped.text_of(devices) == text
    for entries in devices.values():
        for key, fields in entries.items():
            entry = Entry.of_json(fields)
            assert key == str(entry.key)
            assert set(entry.as_json()) <= set(fields) <= {*entry.as_json(), "checked", "problem"}
            if entry.how == MEASURED:
                found = entry.candidate(entry.layout)
                assert entry.by.name not in ("", "none", "unknown")
                assert found is not None
                assert found.microseconds is not None
            else:
                assert (entry.how, entry.at, entry.candidates, entry.gain) == (MODELLED, 0, (), None)
                assert fields["checked"] == f"Triton {entry.by.triton}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_boards_get_them_and_others_do_not(name):
    device = TARGETS[name].device
    other = dataclasses.replace(device, multiprocessors=device.multiprocessors - 1)
    entries = entries_of(name)
    for size in sizes(TARGETS[name]):
        found = choice.choose(device, size.work)
        assert found.origin == choice.SHIPPED
        assert layout_as_json(found.layout) == entries[size.name]["layout"]
        assert space.why_not(device, size.work, found.layout) is None
        assert choice.choose(other, size.work).origin == choice.ANALYTIC
    unknown = Work("forward", 640, 64, 1, torch.bfloat16)
    assert choice.choose(device, unknown).origin == choice.ANALYTIC


def test_the_usual_sizes_are_there():
    for name in ARCHITECTURES:
        there = {
            (s.work.kernel, s.work.hidden, s.work.batch, s.work.directions, s.numbers) for s in sizes(TARGETS[name])
        }
        for kernel in ("forward", "backward", "inference"):
            assert {(kernel, 1024, batch, 1, "bf16") for batch in (32, 64, 128)} < there
            assert (kernel, 512, 64, 2, "bf16") in there
            assert (kernel, 512, 64, 1, "fp32" if name == "gfx942" else "tf32") in there


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float16_has_the_layouts_of_bfloat16(name):
    """Which is why its kernels are checked at a few sizes only."""
    device = TARGETS[name].device
    for size in sizes(TARGETS[name]):
        if size.numbers == "bf16":
            half = dataclasses.replace(size.work, dtype=torch.float16)
            assert space.analytic(device, half) == space.analytic(device, size.work)


SM90 = TARGETS["sm90"]
KEY = str(Work("backward", 1024, 64, 1, torch.bfloat16).key)


def modelled_entries(folder):
    """All entries of the board as the model alone has them, whatever has been measured since."""
    folder.mkdir()
    generate(SM90, folder, compiling=False)
    return read(folder / "sm90.json")[Identity.of(SM90.device)]


def measured(fields, **changes):
    entry = Entry.of_json(fields)
    timed = (Candidate(entry.layout, 5.0, 6.0, 15),)
    by = entry.by._replace(name="NVIDIA H100")
    return dataclasses.replace(entry, how=MEASURED, at=1.7e9, by=by, **{"candidates": timed, **changes}).as_json()


def with_other_layout(fields, **changes):
    return {**fields, "layout": {**fields["layout"], **changes}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda fields: fields, None),
        (measured, None),
        (lambda fields: measured(fields, candidates=()), "does not say how long it took"),
        (lambda fields: {**fields, "how": "guessed"}, "neither modelled nor measured"),
        (lambda fields: {**fields, "key": {**fields["key"], "batch": 32}}, "its key is backward bfloat16 H1024 B32"),
        (lambda fields: with_other_layout(fields, warps=4), "does not say why"),
        (
            lambda fields: {**with_other_layout(fields, warps=2), "problem": "spills", "checked": "Triton 3.6.0"},
            "none that would be tried",
        ),
        (lambda fields: with_other_layout(fields, warps=64), "64 warps are more than"),
        (lambda fields: {**fields, "default": {**fields["default"], "stages": 2}}, "another one by now"),
    ],
)
def test_what_is_wrong_with_an_entry(change, expected, tmp_path):
    found = fault(SM90, KEY, change(modelled_entries(tmp_path / "modelled")[KEY]))
    assert (found is None) if expected is None else (found is not None and expected in found)


def test_what_is_wrong_with_a_file(tmp_path, monkeypatch, capsys):
    path, entries = tmp_path / "sm90.json", modelled_entries(tmp_path / "modelled")
    board, other = Identity.of(SM90.device), Identity("cuda", "sm90", 114, 232448)
    assert faults(SM90, tmp_path)[0] == f"sm90.json: {sizes(SM90)[0].name}: missing"
    assert len(faults(SM90, tmp_path)) == len(entries)
    path.write_text(shipped.text_of({board: {k: v for k, v in entries.items() if k != KEY}}))
    assert faults(SM90, tmp_path) == [f"sm90.json: {KEY}: missing"]
    path.write_text(shipped.text_of({board: entries, other: {KEY: measured(entries[KEY])}}))
    assert faults(SM90, tmp_path) == []
    path.write_text(shipped.text_of({board: entries, other: {KEY: entries[KEY]}}))
    assert faults(SM90, tmp_path) == [f"sm90.json: {KEY}: it is modelled, and for another board than H100"]
    path.write_text("[]")
    assert "it is no file of" in faults(SM90, tmp_path)[0]
    assert main(["--check", "--targets", "sm90", "--folder", str(tmp_path)]) == 1
    assert "it is no file of" in capsys.readouterr().out

    path.write_text(shipped.text_of({board: entries}))
    monkeypatch.setattr(defaults, "source_hash", lambda kernel: "0" * 12)
    assert len(faults(SM90, tmp_path)) == len(entries)
    assert faults(SM90, tmp_path)[0].endswith("its kernel's code is another one by now")


def test_what_was_measured_stays_as_long_as_its_code(tmp_path):
    path, entries = tmp_path / "sm90.json", modelled_entries(tmp_path / "modelled")
    board, other = Identity.of(SM90.device), Identity("cuda", "sm90", 114, 232448)
    mine = measured(entries[KEY])
    moments = measured_moments(entries[KEY])
    key = Entry.of_json(mine).key._replace(source="0" * 12)
    old = {**mine, "key": key.as_json()}
    held = {board: {KEY: mine, str(key): old, **moments}, other: {KEY: mine}, other._replace(shared=1): entries}
    path.write_text(shipped.text_of(held))

    found = generate(SM90, tmp_path, compiling=False)
    assert (found.measured, found.kept, found.made) == (3, 0, len(sizes(SM90)) - 1)
    devices = read(path)
    assert devices.keys() == {board, other}
    assert devices[other] == {KEY: mine}
    assert devices[board][KEY] == mine
    assert devices[board].keys() == {size.name for size in sizes(SM90)} | moments.keys()
    assert faults(SM90, tmp_path) == []

    before = path.stat()
    assert generate(SM90, tmp_path, compiling=False).kept == len(sizes(SM90)) - 1
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def measured_moments(fields):
    work = Work.of_moments(256, 64, 1, torch.bfloat16, centre=True)
    layout = space.analytic(SM90.device, work)
    by = Entry.of_json(fields).by
    entry = Entry(work.key, layout, MEASURED, 1.7e9, by, layout, {}, (Candidate(layout, 5.0, 5.0, 15),))
    return {str(work.key): entry.as_json()}


def replies(script, asked):
    """In the place of `aot.checks.results`: of each process what the script says, [trial, layout, problems]."""

    def results(request, cache):
        asked.append([len(trial["layouts"]) for trial in request.trials])
        for trial, layout, problems in script.pop(0):
            yield {"trial": trial, "layout": layout, "problems": problems}

    return results


def test_the_first_layout_without_a_problem_is_taken(tmp_path, monkeypatch):
    """Also where a layout aborts the process, and the next one goes on behind it."""
    wanted, asked = sizes(SM90)[:4], []
    script = [
        [(0, 0, []), (1, 0, ["spills"]), (1, 1, ["spills"]), (1, 2, []), (2, 0, ["spills"]), (2, 1, ["ended"])],
        [(0, 0, ["again"]), (0, 1, []), (0, 1, []), (1, 0, ["a\n  b"])],
        [(0, k, ["spills"]) for k in range(20)],
    ]
    layouts = [[space.analytic(SM90.device, s.work), *trials.alternatives(SM90.device, s.work)] for s in wanted]
    script[2] = script[2][: len(layouts[3]) - 1]
    monkeypatch.setattr(trials, "results", replies(script, asked))
    found = dict(compiled(SM90, wanted, tmp_path))
    assert [found[size].layout for size in wanted] == [layouts[0][0], layouts[1][2], layouts[2][3], layouts[3][0]]
    assert [found[size].problem for size in wanted] == ["", "spills", "spills", "a b"]
    assert asked == [list(map(len, layouts)), [len(layouts[2]) - 2, len(layouts[3])], [len(layouts[3]) - 1]]

    told = defaults.entry_of(SM90, wanted[1], found[wanted[1]], triton_version())
    assert (told["problem"], told["checked"]) == ("spills", f"Triton {triton_version()}")
    assert fault(SM90, wanted[1].name, told) is None
    assert fault(SM90, wanted[3].name, defaults.entry_of(SM90, wanted[3], found[wanted[3]], "1.2.3")) is None


def test_a_run_that_ends_early_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "results", replies([[(0, 0, []), (1, 0, [])], []], []))
    with pytest.raises(trials.CompilerFailed, match="said nothing"):
        generate(SM90, tmp_path)
    assert list(read(tmp_path / "sm90.json")[Identity.of(SM90.device)]) == sorted(s.name for s in sizes(SM90)[:2])
    asked = []
    monkeypatch.setattr(trials, "results", replies([[]], asked))
    assert main(["--targets", "sm90", "--folder", str(tmp_path)]) == 1
    assert len(asked[0]) == len(sizes(SM90)) - 2
    assert "bench.defaults: sm90: the compiling process said nothing" in capsys.readouterr().out


def test_where_triton_cannot_compile_they_are_not_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "results", lambda request, cache: iter([{"skipped": "Triton 1.2.3: no linker"}]))
    assert main(["--targets", "gfx942", "--folder", str(tmp_path)]) == 0
    assert f"{len(sizes(TARGETS['gfx942']))} made, 0 with a problem" in capsys.readouterr().out
    assert faults(TARGETS["gfx942"], tmp_path) == []
    (entries,) = read(tmp_path / "gfx942.json").values()
    assert not any("checked" in fields for fields in entries.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_may_take_the_analytic_layouts_place(name):
    device = TARGETS[name].device
    for size in sizes(TARGETS[name]):
        default = space.analytic(device, size.work)
        found = trials.alternatives(device, size.work)
        assert 0 < len(found) <= trials.MOST_TRIED
        assert default not in found
        for layout in found:
            assert layout.sequence == default.sequence
            assert layout.sequence or not layout.resident
            assert not isinstance(layout, BackwardConfig) or not layout.divided or layout.product_rows >= 16


def test_they_compile_as_they_say(tmp_path):
    keys = [Work(kernel, 1024, 128, 1, torch.bfloat16).key for kernel in ("forward", "backward")]
    wanted = [size for size in sizes(SM90) if size.work.key in keys]
    there = [entries_of("sm90")[size.name] for size in wanted]
    if any(each["how"] == MEASURED or minor(each["by"]["triton"]) != minor(triton_version()) for each in there):
        pytest.skip(f"they are not what Triton {triton_version()} was asked for")
    found = dict(compiled(SM90, wanted, tmp_path))
    assert found.keys() == set(wanted)
    for size, fields in zip(wanted, there, strict=True):
        assert layout_as_json(found[size].layout) == fields["layout"]
        assert found[size].problem == fields.get("problem", "")


def test_a_layout_with_a_problem_is_not_taken(tmp_path, monkeypatch):
    """Tiles this large leave no registers: the compiler's own word."""
    size = next(each for each in sizes(SM90) if each.name == str(Work("forward", 512, 64, 1, torch.bfloat16).key))
    good = space.analytic(SM90.device, size.work)
    bad = dataclasses.replace(good, sequence=False, resident=False, units=32, batch_tile=128, warps=4, stages=2)
    monkeypatch.setattr(defaults.space, "analytic", lambda device, work: bad)
    monkeypatch.setattr(trials, "alternatives", lambda device, work: [good])
    monkeypatch.setattr(defaults, "alternatives", lambda device, work: [good])
    ((_, found),) = compiled(SM90, [size], tmp_path)
    assert found.layout == good
    assert "bytes of stack" in found.problem
    assert json.dumps(found.problem).isascii()
