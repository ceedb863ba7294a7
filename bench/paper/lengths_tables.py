"""What the runs on unequal lengths say, in tables."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from .experiment import Results, Settings
from .numbers import Paired, holm, paired, shown, spread

TITLES = {
    "vowels": "Japanese vowels (216 utterances to learn from, 370 to test on, 7 to 29 frames, the speaker is asked "
    "for)",
    "spoken": "spoken digits (2,100 to learn from, 600 to test on, 6 to 92 frames, the digit is asked for)",
    "sentences": "sentences of Python's help texts (1,339 to learn from, 380 to test on, 9 to 79 steps, each next "
    "character is asked for)",
}
SHORT = {"vowels": "Japanese vowels", "spoken": "spoken digits", "sentences": "sentences"}
KINDS = {
    "merged": "running, with the between-batch term",
    "pooled": "running, pooled within batches",
    "batches": 'estimated, "batches"',
    "paper": 'estimated, "paper"',
    "whole": 'estimated, "whole"',
}
# how README's table calls them
NAMES = {
    "LSTM": "no batch norm: nn.LSTM",
    "both rules": "sequences that are left, and the population in vacated seats (both rules)",
    "both rules, pooled": "the same, the population's variance pooled within batches",
    "rule 1, own prior": "the same, without inheritance between slots",
    "fixed κ = 16": "sequences that are left, and always 16 rows of the population",
    "frozen rows": "all sequences, ended ones with their last state (frozen rows)",
    "frozen rows, no gradient": "the same, without a gradient into them",
    "padding counted": "all sequences, padding read as if it were data",
    "plain masking": "sequences that are left (plain masking)",
}
OURS = "both rules"
LEVEL = 0.05

Key = tuple[str, str, bool]  # formulation, input_stats, cell_norm


def sets_of(settings: Settings) -> list[str]:
    """Sets of data in the order of the page; JSON need not keep that of the settings."""
    return [of for of in SHORT if of in settings["sets"]]


def finals(settings: Settings, results: Results, of: str) -> dict[Key, list[dict[str, Any]]]:
    """Scores of each seed by variant, of one set of data."""
    found = {}
    for key, value in results.items():
        name, formulation, stats, cell, ending = key.split("/")
        if name == of and ending == "final":
            found[formulation, stats, cell == "cell norm"] = value["scores"]
    order = [("LSTM", "time", False)]
    order += [(f, s, c) for c in (True, False) for s in ("time", "sequence") for f in settings["formulations"]]
    return {key: found[key] for key in order if key in found}


def values(scores: list[dict[str, Any]], what: str, kind: str = "merged", part: str = "test") -> list[float]:
    """One number for each seed. nn.LSTM has no statistics, so any kind is its only one."""
    return [float(seed[kind if kind in seed else "none"][part][what]) for seed in scores]


def scale(of: str) -> float:
    """Nats, but bits per character for text."""
    return 1 / math.log(2) if of == "sentences" else 1.0


def compared(found: dict[Key, list[dict[str, Any]]], what: str = "loss") -> dict[Key, Paired]:
    """Each variant against both rules with the same input_stats and cell_norm, p by Holm's correction over all of them.

    LSTM is held against the layer's defaults: both rules, statistics of the input over sequences, no cell norm.
    """
    pairs = {}
    for key, scores in found.items():
        other = (OURS, "sequence" if key[0] == "LSTM" else key[1], key[2])
        if key != other and other in found:
            pairs[key] = paired(values(scores, what), values(found[other], what))
    corrected = holm([pair.p for pair in pairs.values()])
    return {key: pair._replace(p=p) for (key, pair), p in zip(pairs.items(), corrected, strict=True)}


def tables(settings: Settings, results: Results) -> list[str]:
    """For each set of data all variants, and what statistics do in evaluation; then where they differ, in words."""
    lines: list[str] = []
    for of in sets_of(settings):
        found = finals(settings, results, of)
        if found:
            lines += _variants(of, found)
    lines += _kinds(settings, results)
    lines += _input_stats(settings, results)
    return lines + verdicts(settings, results)


def _variants(of: str, found: dict[Key, list[dict[str, Any]]]) -> list[str]:
    unit = "bits per character" if of == "sentences" else "loss, nats"
    seeds = len(next(iter(found.values())))
    lines = [
        f"*{TITLES[of]}*: test part, {seeds} seeds, running statistics; p against both rules, corrected for all of the "
        "table",
        "",
        f"| formulation | input_stats | cell norm | {unit} | accuracy, % | longest tenth, {unit} | "
        "loss − both rules | p |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|",
    ]
    against = compared(found)
    for key, scores in found.items():
        loss = spread([scale(of) * v for v in values(scores, "loss")])
        long = spread([scale(of) * v for v in values(scores, "long_loss")])
        accuracy = spread([100 * v for v in values(scores, "accuracy")], 1)
        options = ("–", "–") if key[0] == "LSTM" else (key[1], "yes" if key[2] else "no")
        difference, p = (
            ("", "") if key not in against else (f"{scale(of) * against[key].difference:+.3f}", shown(against[key].p))
        )
        name = f"**{key[0]}**" if key[0] == OURS else key[0]
        lines.append(f"| {name} | {options[0]} | {options[1]} | {loss} | {accuracy} | {long} | {difference} | {p} |")
    return [*lines, ""]


def _kinds(settings: Settings, results: Results) -> list[str]:
    """Statistics in evaluation, for models trained by both rules."""
    sets = [of for of in sets_of(settings) if (OURS, "time", True) in finals(settings, results, of)]
    if not sets:
        return []
    lines = [
        "*Statistics in evaluation*, models trained by both rules with cell norm: test loss, and in brackets the "
        "difference from running statistics with the between-batch term and its p (not corrected)",
        "",
        "| input_stats | statistics | " + " | ".join(SHORT[of] for of in sets) + " |",
        "|:--|:--|" + "--:|" * len(sets),
    ]
    for stats in ("time", "sequence"):
        for kind, name in KINDS.items():
            cells = []
            for of in sets:
                scores = finals(settings, results, of).get((OURS, stats, True))
                if scores is None:
                    cells.append("–")
                    continue
                own = [scale(of) * v for v in values(scores, "loss", kind)]
                base = [scale(of) * v for v in values(scores, "loss")]
                pair = paired(own, base)
                cells.append(
                    spread(own) + ("" if kind == "merged" else f" ({pair.difference:+.4f}, p {shown(pair.p)})")
                )
            lines.append(f"| {stats} | {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _input_stats(settings: Settings, results: Results) -> list[str]:
    """Statistics of the input over sequences against time, and cell norm against none, by both rules."""
    lines = []
    for title, first, second in (
        ('input_stats="sequence" − "time", with cell norm', (OURS, "sequence", True), (OURS, "time", True)),
        ('input_stats="sequence" − "time", without', (OURS, "sequence", False), (OURS, "time", False)),
        ('cell norm − none, "time"', (OURS, "time", True), (OURS, "time", False)),
        ('cell norm − none, "sequence"', (OURS, "sequence", True), (OURS, "sequence", False)),
    ):
        cells = []
        for of in sets_of(settings):
            found = finals(settings, results, of)
            if first not in found or second not in found:
                cells.append("–")
                continue
            pair = paired(
                [scale(of) * v for v in values(found[first], "loss")],
                [scale(of) * v for v in values(found[second], "loss")],
            )
            cells.append(f"{pair.difference:+.3f}, p {shown(pair.p)}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    head = [
        "*Options*, both rules: difference of the test loss and its p (not corrected); below 0 the first is better",
        "",
        "| | " + " | ".join(SHORT[of] for of in sets_of(settings)) + " |",
        "|:--|" + "--:|" * len(settings["sets"]),
    ]
    return [*head, *lines, ""]


def summary(settings: Settings, results: Results) -> list[str]:
    """One row for each formulation: mean test losses with cell norm, and where they differ clearly from both rules."""
    sets = [of for of in sets_of(settings) if finals(settings, results, of)]
    units = {of: "bits per character" if of == "sentences" else "nats" for of in sets}
    lines = [
        f'Mean test loss of {len(settings["seeds"])} seeds, input_stats="time" / "sequence", with cell norm except in '
        "the last two rows; − is better and + worse than both rules with the same options (nn.LSTM: than the second "
        f'last row with "sequence", the defaults), p < {LEVEL} after correction:',
        "",
        "| a step's statistics are made of | " + " | ".join(f"{SHORT[of]}, {units[of]}" for of in sets) + " |",
        "|:--|" + "--:|" * len(sets),
    ]
    rows = [("LSTM", False), *((name, True) for name in settings["formulations"])]
    for name, cell in [*rows, (OURS, False), ("frozen rows", False)]:
        cells = []
        for of in sets:
            found = finals(settings, results, of)
            against = compared(found)
            keys = [(name, stats, cell) for stats in ("time", "sequence")]
            if name == "LSTM":
                keys = [("LSTM", "time", False)]
            means = []
            for key in keys:
                if key in found:
                    mean = fmean(scale(of) * v for v in values(found[key], "loss"))
                    means.append(f"{mean:.3f}{_mark(against.get(key))}")
            cells.append(" / ".join(means) or "–")
        without = "" if cell or name == "LSTM" else f"{name}, without cell norm"
        lines.append(f"| {without or NAMES.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def _mark(pair: Paired | None) -> str:
    if pair is None or not pair.p < LEVEL:
        return ""
    return "\N{MINUS SIGN}" if pair.difference < 0 else "+"


def verdicts(settings: Settings, results: Results) -> list[str]:
    """For each formulation where it is clearly worse or better than both rules, out of all cases that were run."""
    lines = []
    for what, lower_is_better in (("loss", True), ("accuracy", False)):
        found: dict[str, list[str]] = {}
        for of in sets_of(settings):
            for key, pair in compared(finals(settings, results, of), what).items():
                word = "no clear difference"
                if pair.p < LEVEL:
                    word = "better" if (pair.difference < 0) == lower_is_better else "worse"
                found.setdefault(key[0], []).append(word)
        for name, words in found.items():
            counts = ", ".join(f"{word} in {words.count(word)}" for word in ("worse", "no clear difference", "better"))
            lines.append(
                f"- {name}, {what} against both rules: {counts} of {len(words)} cases (p < {LEVEL} corrected)."
            )
    return [*lines, ""]
