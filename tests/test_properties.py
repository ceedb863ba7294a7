"""Random shapes, lengths and options against the straight-line transcription."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import learnt
from tests.support import make_layer, oracle_of


@st.composite
def cases(draw):
    steps = draw(st.integers(1, 7))
    batch = draw(st.integers(2, 6))
    return {
        "sizes": (draw(st.integers(1, 5)), draw(st.integers(1, 6))),
        "lengths": draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)),
        "steps": steps,
        "start": draw(st.integers(0, 8)),
        "options": {
            "max_length": draw(st.integers(1, 8)),
            "cell_norm": draw(st.booleans()),
            "input_stats": draw(st.sampled_from(["time", "sequence"])),
            "bias": draw(st.booleans()),
            "prior_count": draw(st.one_of(st.none(), st.floats(0, 10))),
            "momentum": draw(st.one_of(st.none(), st.floats(0.01, 1))),
            "bidirectional": draw(st.booleans()),
            "seen": draw(st.booleans()),
            "seed": draw(st.integers(0, 10)),
        },
        "training": draw(st.booleans()),
    }


@given(cases())
@settings(max_examples=150)
def test_any_shape_is_the_papers(case):
    torch.manual_seed(case["options"]["seed"])
    layer = make_layer(*case["sizes"], **case["options"]).train(case["training"])
    lengths, batch, hidden = case["lengths"], len(case["lengths"]), case["sizes"][1]
    suffixes = layer._suffixes[0]
    oracles = [oracle_of(layer, suffix) for suffix in suffixes]
    x = torch.randn(case["steps"], batch, case["sizes"][0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(batch, hidden, dtype=torch.float64)
    output, (h_n, _) = layer(x, lengths=lengths, start=case["start"])
    runs = [
        oracle.run(x, lengths, zeros, zeros, case["training"], case["start"], reverse=k == 1)
        for k, oracle in enumerate(oracles)
    ]
    expected = torch.cat([run[0] for run in runs], 2)
    # columns whose rows nearly coincide (n = 2 close values, or n = 1 without a population) are divided by √ε: 316
    # times the rounding of the inputs, once per step
    torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(h_n, torch.stack([run[1] for run in runs]), rtol=1e-7, atol=1e-8)
    weights = torch.randn_like(output)
    (mine,) = torch.autograd.grad(output, x, weights)
    (theirs,) = torch.autograd.grad(expected, x, weights)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if case["training"]:
        momentum = case["options"]["momentum"]
        for oracle, suffix, run in zip(oracles, suffixes, runs, strict=True):
            for k, slot in enumerate(learnt(oracle.slots["hh"], run[3]["hh"], batch, momentum)):
                torch.testing.assert_close(getattr(layer, f"mean_hh{suffix}")[k], slot.mean, rtol=1e-7, atol=1e-8)
                torch.testing.assert_close(getattr(layer, f"var_hh{suffix}")[k], slot.var, rtol=1e-7, atol=1e-8)
