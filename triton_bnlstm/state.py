"""A layer's state_dict: the number of its format, older and newer ones, and what cannot be loaded.

Format 1, the only one there has been, for each layer and direction (`suffix`):

    weight_ih, weight_hh, bias, gamma_ih, gamma_hh, gamma_c, beta_c     parameters that the layer has
    mean_n, var_n, count_n for n = ih, hh and, with cell_norm, c         its statistics
    rows                                                                 once, 0-d

torch saves the number beside the tensors, in the state_dict's metadata. A plain dict, as from safetensors, has none; it
is taken to be of the format of the code that reads it.

Who changes names, shapes or meaning of what is saved counts `VERSION` up and adds to `MIGRATIONS` how a state_dict of
the former number becomes one of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .reference import accumulation_dtype

VERSION = 1

# From a format to the next: called with the state_dict, changed in place, the layer's prefix in it and the layer.
MIGRATIONS: dict[int, Callable[[dict[str, Any], str, nn.Module], None]] = {}

_PARTS = ("mean", "var", "count")


def buffer_dtype(name: str, parameters: torch.dtype) -> torch.dtype:
    """Dtype of a buffer of statistics: counts are float64, moments float32 (float64 for float64 parameters)."""
    counted = name == "rows" or name.startswith("count_")
    return torch.float64 if counted else accumulation_dtype(parameters)


def prepare(
    layer: nn.Module,
    suffixes: Iterable[str],
    max_length: int,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
) -> None:
    """Before a layer loads: bring its part of a state_dict, in place, to the format of this code.

    Args:
        layer: that loads.
        suffixes: of its layers and directions.
        max_length: its slots.
        state_dict, prefix: what it loads, and what its names begin with there.
        metadata: of the layer, as torch has saved it; its "version" is the number of the format.

    Raises:
        RuntimeError: it is an nn.LSTM's; there is no such format, or it is newer than this code; of statistics that
            make sense only together some are missing, with strict=False too.
        ValueError: the statistics have another number of slots.
    """
    called = prefix.rstrip(".") or type(layer).__name__
    version = metadata.get("version")
    if version is not None:
        if not isinstance(version, int) or version < 1:
            raise RuntimeError(f"state_dict: that of {called} has format {version!r}; formats are numbers from 1")
        if version > VERSION:
            raise RuntimeError(
                f"state_dict: that of {called} has format {version}, and triton_bnlstm {__version__} knows formats up "
                f"to {VERSION}. Upgrade triton_bnlstm to load it"
            )
        for older in range(version, VERSION):
            MIGRATIONS[older](state_dict, prefix, layer)
    for suffix in suffixes:
        if f"{prefix}bias_ih{suffix}" in state_dict:
            raise RuntimeError(
                f"state_dict: that of {called} is an nn.LSTM's; load it into one, and make the layer of it with "
                "BNLSTM.from_lstm"
            )
        saved = state_dict.get(f"{prefix}mean_hh{suffix}")
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[0] != max_length:
            raise ValueError(
                f"max_length: this state_dict was saved with max_length={saved.shape[0]}, the layer "
                f"{called} has max_length={max_length}. Call "
                f"set_max_length({saved.shape[0]}) on it, load the state_dict, then call "
                f"set_max_length({max_length})"
            )
        saved, own = state_dict.get(f"{prefix}mean_ih{suffix}"), getattr(layer, f"mean_ih{suffix}")
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[0] != own.shape[0]:
            theirs, ours = ("sequence" if s.shape[0] == 1 else "time" for s in (saved, own))
            raise ValueError(
                f'input_stats: this state_dict was saved with input_stats="{theirs}", the layer {called} has "{ours}"; '
                f'make it with input_stats="{theirs}"'
            )
    missing = _missing_statistics(layer, suffixes, state_dict, prefix)
    if missing:
        raise RuntimeError(
            f"statistics of {called} are there only in part, and mean nothing so: Missing key(s) in state_dict: "
            f"{', '.join(missing)}. Put them back, or leave out all mean_*, var_*, count_* and rows and load with "
            "strict=False: then the layer keeps its own statistics, and estimate_statistics makes those of the weights"
        )


def _missing_statistics(
    layer: nn.Module, suffixes: Iterable[str], state_dict: dict[str, Any], prefix: str
) -> list[str]:
    """Statistics that others need: means beside a fresh layer's counts would be of slots that have seen nothing.

    All may be missing, and those of a norm whose parameters are missing as well: it is new to what was saved.
    """
    with_parameters = any(f"{prefix}gamma_hh{suffix}" in state_dict for suffix in suffixes)
    there, missing = f"{prefix}rows" in state_dict, []
    for suffix in suffixes:
        for norm in ("ih", "hh", "c"):
            names = [f"{prefix}{part}_{norm}{suffix}" for part in _PARTS if hasattr(layer, f"{part}_{norm}{suffix}")]
            lacking = [name for name in names if name not in state_dict]
            there |= len(lacking) < len(names)
            new = with_parameters and f"{prefix}gamma_{norm}{suffix}" not in state_dict
            missing += lacking if not new or len(lacking) < len(names) else []
    if f"{prefix}rows" not in state_dict:
        missing.append(f"{prefix}rows")
    return missing if there else []
