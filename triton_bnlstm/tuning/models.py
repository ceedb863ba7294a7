"""Which layers to tune for, by their sizes or by a file of weights, and what their kernels have to do."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .screens import NUMBERS, USAGE, Failure, listed
from .work import FLAGS, KERNELS, Work

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
# Other names of them.
SAME_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LENGTHS = ("equal", "unequal", "device")
# What most calls have; with equal ones another forward is compiled, and nothing else differs.
USUAL_LENGTHS = ("equal", "unequal")
# What layers run, with save="auto", too.
USUAL_KERNELS = KERNELS

# A parameter that every layer of ours has, and nobody else's.
_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?)gamma_hh(?P<layer>_l\d+)?$", re.DOTALL)
# Of torch.save before 1.6: 0x1950a86a20f9469cfc6c, as pickle writes it.
_OLD_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_HINT = "save the weights with torch.save(model.state_dict(), FILE), and give that file"


@dataclass(frozen=True)
class Layer:
    """One layer, as far as its kernels depend on it.

    Attributes:
        hidden, columns: H and D.
        directions: 1 or 2.
        numbers: one of `DTYPES`.
        cell_norm: whether it has it.
        name: of its parameters in a file.
        cell: it is a `BNLSTMCell`, which runs single steps.
    """

    hidden: int
    columns: int
    directions: int
    numbers: str
    cell_norm: bool
    name: str = ""
    cell: bool = False


class Wanted(NamedTuple):
    """A batch, which of `LENGTHS` its sequences have, and which of `KERNELS`."""

    batch: int
    lengths: str
    kernels: tuple[str, ...]


def works_of(layer: Layer, wanted: Wanted) -> Iterator[Work]:
    """What a layer's kernels do with such a batch, as `online.works_of` has it for a call."""
    dtype, precision = DTYPES[layer.numbers]
    given = {
        "cell_norm": layer.cell_norm,
        "narrow": layer.columns == 1,
        "seats": wanted.lengths != "equal",
        "fill": wanted.lengths == "device",
    }
    for kernel in KERNELS:
        if kernel not in wanted.kernels:
            continue
        if kernel != "moments":
            flags = tuple(name for name in FLAGS[kernel] if given[name])
            yield Work(kernel, layer.hidden, wanted.batch, layer.directions, dtype, precision, flags)
            continue
        if layer.columns > 1:  # moments of one column cost nothing
            yield Work.of_moments(layer.columns, wanted.batch, layer.directions, dtype, centre=True)
            yield Work.of_moments(4 * layer.hidden, wanted.batch, layer.directions, dtype, centre=False)
        # of h, in the backward
        yield Work.of_moments(layer.hidden, wanted.batch, layer.directions, dtype, centre=True, before=True)


def without_doubles(works: Iterable[Work]) -> list[Work]:
    """One work for each key: the largest, as layouts are kept by buckets of sizes."""
    found: dict[Any, Work] = {}
    for work in works:
        known = found.get(work.key)
        if known is None or (work.hidden, work.batch, work.columns) > (known.hidden, known.batch, known.columns):
            found[work.key] = work
    return list(found.values())


def layers_asked(arguments: argparse.Namespace) -> list[Layer]:
    """What `tune` is asked for, by sizes or by a file.

    Raises:
        Failure: too little is given, too much, or what no kernel computes.
    """
    needed = {"--batch": arguments.batch}
    if arguments.from_model is None:
        needed = {"--hidden": arguments.hidden, **needed, "--dtype": arguments.dtype}
    lacking = [name for name, given in needed.items() if not given]
    if lacking:
        more = " (or --from-model and --batch)" if "--hidden" in lacking else ", too"
        raise Failure(f"tune needs {listed(lacking)}{more}", USAGE)
    if arguments.from_model is None:
        return [
            Layer(hidden, arguments.columns or hidden, directions, numbers, arguments.cell_norm)
            for hidden in arguments.hidden
            for directions in arguments.directions or [1]
            for numbers in arguments.dtype
        ]
    given = {"--hidden": arguments.hidden, "--columns": arguments.columns, "--directions": arguments.directions}
    clash = [name for name, value in {**given, "--cell-norm": arguments.cell_norm}.items() if value]
    if clash:
        raise Failure(f"{', '.join(clash)}: the model's own are taken with --from-model", USAGE)
    found = []
    for layer in layers_of_file(arguments.from_model):
        print(layer_words(layer), file=sys.stderr)
        if layer.cell:
            print(
                "  a cell runs single steps, whose recurrence keeps its default layout: "
                "layers of its sizes have the use of it",
                file=sys.stderr,
            )
        found += [replace(layer, numbers=each) for each in arguments.dtype or [layer.numbers]]
    for layer in found:
        if layer.numbers not in DTYPES:
            raise Failure(f"{layer.name}: no kernel computes in {layer.numbers}; choose with --dtype", USAGE)
    return found


def layers_of_file(path: Path) -> list[Layer]:
    """The layers whose weights a file has, each sort once. No code of the file is run.

    Raises:
        Failure: it cannot be read, is no file of weights, or has no layer of ours.
    """
    held = _loaded(path)
    states = [each for each in _mappings(held) if any(isinstance(name, str) and _LAYER.match(name) for name in each)]
    found = list(dict.fromkeys(layer for state in states for layer in _layers(state, path)))
    if not found:
        kinds = {_kind(each) for each in _mappings(held)}
        if "LSTM" in kinds:
            raise Failure(
                f"{path} has an nn.LSTM, and no layer of triton_bnlstm: BNLSTM.from_lstm makes one of it, whose "
                "state_dict to save; or give its sizes by --hidden, --columns and --directions",
                USAGE,
            )
        if "other" in kinds:
            raise Failure(f"{path} has a recurrent layer that is no LSTM, and no layer of triton_bnlstm", USAGE)
        raise Failure(f"{path} has no layer of triton_bnlstm (parameters gamma_hh_l0, weight_hh_l0, …); {_HINT}", USAGE)
    sorts: dict[Layer, Layer] = {}
    for layer in found:  # of equal layers the first names them all
        sorts.setdefault(replace(layer, name=""), layer)
    return list(sorts.values())


def _loaded(path: Path) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has its own hints for archives of scripts
            saved = _is_saved(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror or error})", USAGE) from None
    except Exception as error:  # what is no torch file raises anything
        told = str(error)
        if saved and ("weights_only" in told or "Weights only" in told):
            reason = "it holds objects beside tensors and plain values, which would run code and are not loaded"
        else:
            reason = "it is no file that torch.save has written, or not whole"
        raise Failure(f"{path}: {reason}; {_HINT}", USAGE) from None


def _is_saved(file: IO[bytes]) -> bool:
    """Whether torch.save may have written it: an archive since torch 1.6, before that pickles behind a number."""
    head = file.read(64)
    file.seek(0)
    archive = zipfile.is_zipfile(file)
    file.seek(0)
    return archive or _OLD_MAGIC in head


def _kind(state: Mapping[str, Any]) -> str:
    """Of torch's recurrent layers whose weights it has: "LSTM" (four gates of each unit), "other", or "none"."""
    kind = "none"
    for name, weight in state.items():
        if isinstance(name, str) and name.rpartition(".")[2] == "weight_hh_l0" and isinstance(weight, Tensor):
            if weight.dim() == 2 and weight.shape[0] == 4 * weight.shape[1]:
                return "LSTM"
            kind = "other"
    return kind


def _mappings(held: Any) -> Iterator[Mapping[str, Any]]:
    """What is held and is a mapping, at any depth."""
    waiting, seen = [held], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            yield each
            inner = list(each.values())
        else:
            inner = list(each) if isinstance(each, list | tuple) else []
        waiting.extend(value for value in reversed(inner) if isinstance(value, Mapping | list | tuple))


def _layers(state: Mapping[str, Any], path: Path) -> Iterator[Layer]:
    for name in state:
        match = _LAYER.match(name) if isinstance(name, str) else None
        if match is not None:
            yield _layer(state, match["prefix"], match["layer"] or "", path)


def _layer(state: Mapping[str, Any], prefix: str, suffix: str, path: Path) -> Layer:
    gamma = state[f"{prefix}gamma_hh{suffix}"]
    weight_ih, weight_hh = (_weight(state, prefix, f"{name}{suffix}") for name in ("weight_ih", "weight_hh"))
    name = f"{prefix}*{suffix}"
    if weight_ih is None or weight_hh is None or not isinstance(gamma, Tensor):
        raise Failure(f"{path}: {name}: it has gamma_hh, and not the weights of a layer; {_HINT}", USAGE)
    if (weight_ih.dim(), weight_hh.dim(), gamma.dim()) != (2, 2, 1):
        raise Failure(f"{path}: {name}: its weights are not those of a layer; {_HINT}", USAGE)
    hidden = weight_hh.shape[1]
    if hidden < 1 or not 4 * hidden == weight_hh.shape[0] == weight_ih.shape[0] == gamma.shape[0]:
        shapes = f"{tuple(weight_ih.shape)}, {tuple(weight_hh.shape)} and {tuple(gamma.shape)}"
        raise Failure(f"{path}: {name}: weights of {shapes} are not those of a layer; {_HINT}", USAGE)
    numbers = NUMBERS.get(str(weight_hh.dtype).removeprefix("torch."), str(weight_hh.dtype).removeprefix("torch."))
    directions = 2 if f"{prefix}gamma_hh{suffix}_reverse" in state else 1
    cell_norm = f"{prefix}gamma_c{suffix}" in state
    return Layer(hidden, weight_ih.shape[1], directions, numbers, cell_norm, name, cell=not suffix)


def _weight(state: Mapping[str, Any], prefix: str, name: str) -> Tensor | None:
    """A weight, or what stands in its place where it is parametrised."""
    names = (f"{prefix}{name}", *(f"{prefix}parametrizations.{name}.{part}" for part in ("original", "original1")))
    return next((state[each] for each in (*names, f"{prefix}{name}_v") if isinstance(state.get(each), Tensor)), None)


def layer_words(layer: Layer) -> str:
    """A layer in one line."""
    kind = "cell" if layer.cell else "layer"
    norm = ", cell_norm" if layer.cell_norm else ""
    return f"{kind} {layer.name}: D={layer.columns}, H={layer.hidden}, x{layer.directions}, {layer.numbers}{norm}"
