"""What the gradients at initialisation say, in tables and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .experiment import Results, Settings
from .gradients import Case, positions_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Gradient flow at initialisation, by γ"
# A gradient lives while all its norms are within 10^±7 of the last: a weight's gradient is a sum over the steps, and
# float32 keeps 7 digits of it.
DECADES = 7
LOST = 3  # decades below the last norm, for the table's "lost"
MODELS = ("BN-RNN", "RNN", "LSTM", "BN-LSTM", "BN-LSTM, cell norm")
NORMALISED = ("BN-RNN", "BN-LSTM", "BN-LSTM, cell norm")
STARTS = {model: ("identity", "orthogonal", "identity for g")[: 2 if model.endswith("RNN") else 3] for model in MODELS}
PLAIN = {"BN-RNN": "RNN", "BN-LSTM": "LSTM", "BN-LSTM, cell norm": "LSTM"}
# log10 of the norm at the fourth step over that at the last, from the vectors of figure 1(a) in the authors' repository
# (paper/figures/rnn_grad_prop.pdf); the three steps before rise steeply, as after hardly any noise on h_0. From γ = 0.7
# on the curves leave the axis, below −24.
PAPER = {0.1: -1.0, 0.2: -0.9, 0.3: -0.8, 0.4: -2.6, 0.5: -7.8, 0.6: -20.0}
PAPER_AXIS = -24


def outcome(low: float, high: float) -> str:
    """What becomes of a gradient whose norm, relative to the last step's, lies between these powers of ten."""
    if max(-low, high) <= DECADES:
        return "lives"
    return "vanishes" if -low > high else "explodes"


def outcomes(value: dict[str, Any]) -> list[str]:
    """Of each seed."""
    return [outcome(low, high) for low, high in zip(value["low"], value["high"], strict=True)]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _told(found: list[str]) -> str:
    """As "vanishes", or with counts where seeds differ."""
    kinds = sorted(set(found), key=lambda kind: (-found.count(kind), kind))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{kind} ({found.count(kind)} of {len(found)})" for kind in kinds)


def _range(numbers: list[float]) -> str:
    text = f"{_mean(numbers):.1f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.1f} … {max(numbers):.1f})"


def _steps(lost: list[int | None]) -> str:
    found = [steps for steps in lost if steps is not None]
    if not found:
        return "never"
    return f"{_mean([float(s) for s in found]):.0f}" + (f" ({len(found)} of {len(lost)})" * (len(found) < len(lost)))


def _factor(value: dict[str, Any]) -> float:
    return float(10 ** (_mean(value["first"]) / (value["steps"] - 1)))


def verdict(low: dict[str, Any], high: dict[str, Any]) -> str:
    """Of the claim's two parts, from the results of the smallest γ and of the largest."""
    alive, killed = set(outcomes(low)) == {"lives"}, set(outcomes(high)) == {"vanishes"}
    return {(True, True): "holds", (True, False): "(1) only", (False, True): "(2) only"}.get((alive, killed), "neither")


def tables(settings: Settings, results: Results) -> list[str]:
    """The claim by model; the ratio by γ; the smallest and the largest γ in detail; the derivative of tanh."""
    gammas = settings["gammas"]
    rows = [(model, start) for model in NORMALISED for start in STARTS[model]]
    found = {f"{row[0]}, {row[1]}": [results.get(Case(*row, gamma).key) for gamma in gammas] for row in rows}
    plain = [results.get(Case(PLAIN[model], start, None).key) for model, start in rows]
    lines = [
        f"Claim: (1) γ = {gammas[0]:g} keeps the gradient alive: norms of all steps are within 10^±{DECADES} of the "
        f"last one's; (2) γ = {gammas[-1]:g} makes it vanish. By model and start of W_hh:",
        "",
        f"| Model, W_hh | Claim | γ = {gammas[0]:g} | γ = {gammas[-1]:g} |",
        "|---|---|---|---|",
    ]
    for name, (low, *_, high) in found.items():
        if low and high:
            lines.append(f"| {name} | {verdict(low, high)} | {_told(outcomes(low))} | {_told(outcomes(high))} |")
    lines += [
        "",
        "log10 of ‖∂L/∂h_1‖ / ‖∂L/∂h_T‖, mean over seeds:",
        "",
        "| Model, W_hh | " + " | ".join(f"γ {gamma:g}" for gamma in gammas) + " | no BN |",
        "|---|" + "---:|" * (len(gammas) + 1),
    ]
    for (name, values), without in zip(found.items(), plain, strict=True):
        cells = [f"{_mean(value['first']):.1f}" if value else "" for value in (*values, without)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if settings["side"] == 28:
        cells = [f"{PAPER[gamma]:.1f}" if gamma in PAPER else f"< {PAPER_AXIS}" for gamma in gammas]
        lines.append("| the paper's figure, from its fourth step | " + " | ".join(cells) + " | |")
    lines += [
        "",
        "Norms relative to the last step's, as powers of ten (mean over seeds, their range); factor: geometric mean "
        f"of what a step back multiplies with; lost: steps back to below 10^−{LOST}:",
        "",
        "| Model, W_hh | γ | h_1 | lowest | highest | factor | lost |",
        "|---|---:|---|---|---|---:|---|",
    ]
    for name, values in found.items():
        for gamma, value in ((gammas[0], values[0]), (gammas[-1], values[-1])):
            if value:
                cells = [f"{gamma:g}", *(_range(value[part]) for part in ("first", "low", "high"))]
                lines.append(f"| {name} | {' | '.join(cells)} | {_factor(value):.3f} | {_steps(value['lost'])} |")
    return [*lines, *(_slopes(settings, results) if "tanh" in results else [])]


def _slopes(settings: Settings, results: Results) -> list[str]:
    lines = [
        "",
        "A step back through the RNN multiplies by tanh′, which saturation makes small, and by γ/σ, σ the standard "
        "deviation of W_hh h over the batch. Figure 1(b): mean of tanh′ (and quartiles) for normal input of standard "
        "deviation γ. In the RNN: mean of tanh′, geometric mean of γ/σ, and the factor of a step as it came out:",
        "",
        "| γ | figure 1(b) | identity: tanh′ | γ/σ | factor | orthogonal: tanh′ | γ/σ | factor |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for gamma in settings["gammas"]:
        normal = results["tanh"][f"{gamma:.2f}"]
        cells = [f"{gamma:g}", f"{normal['mean']:.3f} ({normal['lower']:.3f} … {normal['upper']:.3f})"]
        for start in STARTS["BN-RNN"]:
            value = results.get(Case("BN-RNN", start, gamma).key)
            numbers = [_mean(value["slope"]), 10 ** _mean(value["gain"]), _factor(value)] if value else []
            cells += [f"{number:.3f}" for number in numbers] or [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(settings: Settings, results: Results) -> list[str]:
    """What becomes of the gradient for the smallest and the largest γ, by the way in which W_hh starts."""
    gammas = settings["gammas"]
    lines = []
    for gamma in (gammas[0], gammas[-1]):
        parts: dict[str, list[str]] = {}
        for model in NORMALISED:
            for start in STARTS[model]:
                if value := results.get(Case(model, start, gamma).key):
                    parts.setdefault(_told(outcomes(value)), []).append(f"{model} ({start})")
        kinds = "; ".join(f"{kind}: {', '.join(models)}" for kind, models in parts.items())
        lines.append(f"- γ = {gamma:g}, the gradient {kinds}.")
    return lines


def figure(settings: Settings, results: Results, note: str) -> Figure:
    """Curves by γ for each model and start, figure 1(b), and below all of them first step against last by γ."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.6, 12.4), dpi=100)
    grid = drawn.add_gridspec(4, 3, left=0.075, right=0.985, top=0.89, bottom=0.045, hspace=0.4, wspace=0.2)
    drawn.text(0.015, 0.988, TITLE, fontsize=14, weight="bold", va="top")
    drawn.text(0.015, 0.967, note, fontsize=8.5, color="#555555", va="top")
    gammas = settings["gammas"]
    colours = [colormaps["plasma"](0.95 * k / len(gammas)) for k in range(len(gammas))]
    kept = [v for value in results.values() for v in value.get("norm", [])] or [-1.0, 0.0]
    limits = 10 ** (min(kept) - 1), 10 ** (max(kept) + 1)
    handles: dict[str, Any] = {}
    for model in NORMALISED:
        for column, start in enumerate(STARTS[model]):
            axes = drawn.add_subplot(grid[NORMALISED.index(model), column])
            for gamma, colour in (*zip(gammas, colours, strict=True), (None, "black")):
                if value := results.get(Case(model if gamma else PLAIN[model], start, gamma).key):
                    norms = [10**v for v in value["norm"]]
                    line = "-" if gamma else ":"
                    (curve,) = axes.plot(positions_of(value["steps"]), norms, line, color=colour, lw=1.4)
                    handles.setdefault(f"γ = {gamma:g}" if gamma else "no BN", curve)
            axes.set(yscale="log", ylim=limits)
            _finish(axes, f"{model}; W_hh: {start}", "pixel t", "" if column else "mean of ‖∂L/∂h_t‖")
    place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.955)}
    drawn.legend(handles.values(), handles.keys(), ncols=6, frameon=False, fontsize=9, **place)
    _plot_slope(drawn.add_subplot(grid[0, 2]), results.get("tanh", {}))
    _plot_ratios(drawn.add_subplot(grid[3, :2]), gammas, results)
    return drawn


def _plot_slope(axes: Axes, normal: dict[str, dict[str, float]]) -> None:
    deviations = [float(text) for text in normal]
    mean, lower, upper = ([value[name] for value in normal.values()] for name in ("mean", "lower", "upper"))
    axes.fill_between(deviations, lower, upper, color="#1f5fa8", alpha=0.25, lw=0, label="quartiles")
    axes.plot(deviations, mean, color="#1f5fa8", label="mean")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    _finish(axes, "tanh′ of normal input", "standard deviation of the input", "")


def _plot_ratios(axes: Axes, gammas: list[float], results: Results) -> None:
    colours = dict(zip(NORMALISED, ("#555555", "#d1621a", "#1f5fa8"), strict=True))
    marks = {"identity": "o-", "orthogonal": "s--", "identity for g": "^:"}
    axes.axhspan(-DECADES, DECADES, color="#999999", alpha=0.18, lw=0, label=f"within 10^±{DECADES}")
    for model in NORMALISED:
        for start in STARTS[model]:
            found = {g: results[key]["first"] for g in gammas if (key := Case(model, start, g).key) in results}
            means = [_mean(first) for first in found.values()]
            spread = [[abs(m - end(f)) for m, f in zip(means, found.values(), strict=True)] for end in (min, max)]
            label = f"{model}, {start}"
            axes.errorbar(list(found), means, spread, fmt=marks[start], color=colours[model], ms=4, lw=1.2, label=label)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.04, 0.5))
    _finish(axes, "First step against last (bars: range over seeds)", "γ", "log10 of ‖∂L/∂h_1‖ / ‖∂L/∂h_T‖")


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
