"""What a campaign lists, and how it runs the tests that need a GPU."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

from bench.campaign import gpu_tests, plan
from bench.cases import CASES, HOT, VOWEL_LENGTHS, Case

ROOT = Path(__file__).parents[1]


# Cases and plan


def test_the_papers_cases_and_a_grid_are_there_once_each():
    keys = [case.key for case in CASES]
    assert len(set(keys)) == len(keys)
    sizes = {(c.batch, c.hidden, c.steps, c.columns) for c in CASES}
    assert {(100, 100, 784, 1), (64, 1000, 100, 50), (128, 2000, 180, 27)} <= sizes
    plain = {(c.batch, c.hidden) for c in CASES if c.steps == 100 and c.lengths == "equal"}
    assert {(b, h) for b in (16, 32, 64, 128, 256) for h in (128, 256, 512, 1024, 2048)} <= plain
    assert {c.precision for c in CASES} == {"float32", "tf32", "bfloat16", "float16"}
    assert {c.lengths for c in CASES} == {"equal", "uniform", "vowels"}
    assert any(c.cell_norm for c in CASES)
    assert any(c.layers == 2 and c.bidirectional for c in CASES)


def test_lengths_are_those_that_are_said():
    assert Case(4, 8, 100, 8).lengths_of_batch() is None
    uniform = Case(64, 8, 100, 8, lengths="uniform").lengths_of_batch()
    assert uniform is not None
    assert (uniform[0], uniform[-1], len(uniform)) == (100, 25, 64)
    assert uniform == sorted(uniform, reverse=True)
    assert sum(uniform) / 64 == pytest.approx(62.5, abs=0.5)
    vowels = Case(64, 8, 26, 12, lengths="vowels").lengths_of_batch()
    assert vowels is not None
    assert (vowels[0], vowels[-1]) == (26, 7)
    mean = sum(n * count for n, count in VOWEL_LENGTHS.items()) / sum(VOWEL_LENGTHS.values())
    assert sum(vowels) / 64 == pytest.approx(mean, abs=0.3)
    assert Case(64, 8, 26, 12, lengths="vowels").rows == sum(vowels)
    assert sum(VOWEL_LENGTHS.values()) == 270


def test_what_compiles_much_is_compiled_beforehand():
    warm = plan.warm_items(plan.items(), 10)
    assert [item.kind for item in warm] == ["tune"] * 2 + ["stages"] * 2 + ["warm"] * 6
    assert [item.case for item in warm[4:]] == CASES[:6]
    assert all(item.options["rounds"] == 1 for item in warm[:4])


def test_every_case_is_planned_and_every_kind_has_a_worker():
    from bench.campaign.worker import KINDS

    items = plan.items()
    assert len({item.key for item in items}) == len(items)
    assert {item.case for item in items if item.kind == "bench"} == set(CASES)
    assert {item.kind for item in items} | {"identity", "warm"} == set(KINDS)
    assert {item.kind for item in plan.toy_items()} == {item.kind for item in items}


# GPU tests


def test_pytests_words_are_understood():
    chunk = [f"tests/test_gpu.py::test_a[{k}]" for k in range(5)]
    output = textwrap.dedent("""
        tests/test_gpu.py::test_a[0] PASSED                  [ 20%]
        tests/test_gpu.py::test_a[1] FAILED                  [ 40%]
        tests/test_gpu.py::test_a[2] FAILED                  [ 60%]
        tests/test_gpu.py::test_a[3]
        FAILED tests/test_gpu.py::test_a[1] - AssertionError: sequence mode, output: relative RMS 1
        FAILED tests/test_gpu.py::test_a[2] - RuntimeError: CUDA error: device-side assert triggered
    """)
    verdicts, messages, again = gpu_tests.read(output, chunk, "the process was killed by SIGSEGV")
    assert verdicts == {chunk[0]: "PASSED", chunk[1]: "FAILED", chunk[3]: "FAILED"}
    assert messages[chunk[1]].startswith("AssertionError: sequence mode")
    assert messages[chunk[3]] == "the process was killed by SIGSEGV"
    assert again == [chunk[2], chunk[4]]


def test_a_pool_outlives_tests_that_crash_and_hang(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        textwrap.dedent("""
        import os, pathlib, time
        import pytest

        here = pathlib.Path(__file__).parent

        @pytest.mark.gpu
        @pytest.mark.parametrize("kind", ["good", "wrong-bfloat16", "crash", "behind", "hang", "last"])
        def test_kind(kind):
            if kind == "crash":
                os._exit(7)
            if kind == "hang":
                time.sleep(600)
            assert "wrong" not in kind, "step mode, output: relative RMS 1"

        @pytest.mark.gpu
        def test_memory():
            marker = here / "tried"
            if not marker.exists():
                marker.touch()
                raise RuntimeError("CUDA out of memory. Tried to allocate")

        @pytest.mark.gpu
        def test_other():
            pytest.skip("not here")

        def test_of_no_gpu():
            raise AssertionError
    """)
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # none is needed, and each process would import them
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "SECONDS_OF_A_PROCESS", 5.0)
    monkeypatch.setattr(gpu_tests, "SECONDS_OF_A_TEST", 0.0)
    monkeypatch.setattr(gpu_tests, "CHUNK", 6)
    tests = gpu_tests.collect(60, ("tests/test_gpu.py",))
    assert len(tests) == 8
    said: list[str] = []
    found = gpu_tests.Pool(said.append, tmp_path / "log", 2, time.monotonic() + 120).run(tests)
    hanging = "tests/test_gpu.py::test_kind[hang]"
    assert (found.passed, found.skipped, found.unfinished) == (4, 1, [hanging])
    assert found.slow == {hanging: "not finished in good time"}
    why = {test.partition("::")[2]: message for test, message in found.failed.items()}
    assert set(why) == {"test_kind[wrong-bfloat16]", "test_kind[crash]"}
    assert "status 7" in why["test_kind[crash]"]
    assert said[-1] == "GPU tests: 7 of 8: 4 passed, 1 skipped, 2 failed"


def test_tests_that_there_is_no_time_for_are_not_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import pytest, time\n@pytest.mark.gpu\ndef test_long(): time.sleep(600)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    tests = ["tests/test_gpu.py::test_long"]
    found = gpu_tests.Pool(lambda text: None, tmp_path / "log", 2, time.monotonic() + 6).run(tests)
    assert (found.failed, found.unfinished) == ({}, tests)
    assert gpu_tests.Pool(lambda text: None, tmp_path / "log", 2, time.monotonic() - 1).run(tests).unfinished == tests


def test_only_the_case_of_a_failed_tests_own_sizes_is_withheld():
    def withheld(test, message="off", case=HOT[0]):
        return set(gpu_tests.withheld({f"tests/test_gpu.py::{test}": message}, case))

    sequence = {"sequence", "sequence, recompute", "sequence, device lengths"}
    assert withheld("test_real_sizes[bfloat16-(64, 512, 64)-equal]") == {*sequence, "step"}
    assert withheld("test_real_sizes[bfloat16-(64, 512, 64)-equal]", "sequence mode, x: 1") == sequence
    assert withheld("test_real_sizes[bfloat16-(64, 512, 64)-equal]", "step mode, x: 1") == {"step"}
    for other in ("[float16-(64, 512, 64)]", "[bfloat16-(17, 129, 33)]", "[bfloat16]"):
        assert withheld("test_real_sizes" + other) == set()
    why = gpu_tests.withheld({"tests/test_gpu.py::t[bfloat16-(64, 512, 64)]": "off"}, HOT[0])["step"]
    assert why == "its GPU test t[bfloat16-(64, 512, 64)] fails: off"


def test_output_that_is_no_text_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import os, pytest\n@pytest.mark.gpu\ndef test_bytes():\n    os.write(2, b'\\xff\\xfe')\n    assert 0\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\naddopts = -s\n")
    tests = ["tests/test_gpu.py::test_bytes"]
    found = gpu_tests.Pool(lambda text: None, tmp_path / "log", 1, time.monotonic() + 60).run(tests)
    assert (list(found.failed), found.unfinished) == (tests, [])


def test_a_test_that_is_no_more_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    text = "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('k', range(3))\ndef test_a(k): pass\n"
    (tmp_path / "tests" / "test_gpu.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    tests = [f"tests/test_gpu.py::test_a[{k}]" for k in (0, 7, 2)]
    pool = gpu_tests.Pool(lambda text: None, tmp_path / "log", 1, time.monotonic() + 60)
    found = pool.run(tests)
    assert (found.passed, found.skipped, found.failed, found.unfinished) == (2, 1, {}, [])
    assert pool.seen == set(tests)


def test_few_tests_are_spread_and_slow_ones_left_out():
    tests = [f"tests/test_gpu.py::test_a[{k}]" for k in range(5)]
    assert [len(chunk) for chunk in gpu_tests.chunks(tests, 2)] == [3, 2]
    assert [len(chunk) for chunk in gpu_tests.chunks(tests, 14)] == [1] * 5
    assert not any("compute_sanitizer" in test for test in gpu_tests.collect(120))
