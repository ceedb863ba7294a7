"""Population statistics of a data set taken as one batch: every sequence advances together, step by step.

Step t of all rows is normalised by the resolved statistics of slot t that these very rows have just given. Evaluating
the same data afterwards normalises by the same numbers, so it reproduces this pass however the data is split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import BNLSTMBase, States
from .packing import Packing
from .peers import Lockstep
from .precision import compute_dtype, in_dtype
from .reference import accumulation_dtype, moments_of_rows, update_cell
from .statistics import Moments, inherit, merge


class Captured(NamedTuple):
    """One call of a layer that was stopped at its door: rows [R, D], in which packing, hx in the order of the rows."""

    x: Tensor
    packing: Packing
    hx: States | None
    start: int


class _Chunk:
    """One captured batch on its way through a direction: inputs, states and outputs, on `home`."""

    def __init__(self, x: Tensor, packing: Packing, h: Tensor, c: Tensor, home: torch.device) -> None:
        self.x_steps = x.to(home).split(packing.sizes)
        self.packing = packing
        self.h, self.c = h.to(home), c.to(home)
        self.outputs: list[Tensor] = []

    def rows(self, t: int) -> int:
        """Rows of step t."""
        return self.packing.sizes[t]


def on_host(call: Captured) -> Captured:
    """Lengths that only the device knows → a prefix of rows per step."""
    old = call.packing
    if old.mask is None:
        return call
    new = Packing.of_host_lengths(old.steps, old.lengths.cpu(), call.x.device)
    hx = None if call.hx is None else (new.seat(call.hx[0]), new.seat(call.hx[1]))
    return Captured(new.pack(call.x.view(old.steps, old.batch, -1)), new, hx, call.start)


def _moments_of_parts(parts: list[Tensor]) -> Moments | None:
    """Moments of the rows of all parts [n, C] together, as [1, C] float64; None without parts."""
    total: Moments | None = None
    for z in parts:
        mean, var, _ = moments_of_rows(z)
        own = Moments(mean[None].double(), var[None].double(), mean.new_full((1,), len(z), dtype=torch.float64))
        total = own if total is None else merge(total, own)
    return total


class _Slots:
    """One norm's slots as the pass fills them, and what it normalises by."""

    def __init__(self, moments: Moments, rows: Tensor, start: int, lockstep: Lockstep) -> None:
        moments.mean.zero_()
        moments.var.fill_(1)
        moments.count.zero_()
        self.found, self.rows, self.start, self.lockstep = moments, rows, start, lockstep
        self.used: Moments | None = None

    def __call__(self, t: int, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of all chunks of this rank at step t → the mean and variance that normalise them, each [C]."""
        last = self.found.mean.shape[0] - 1
        # The last slot stands on the first step that it serves: it could not hold later ones, which depend on it.
        if self.used is None or self.start + t <= last:
            slot = min(self.start + t, last)
            merged = self.lockstep.merge(_moments_of_parts(parts), self.found.mean.shape[1])
            for buffer, value in zip(self.found, merged, strict=True):
                buffer[slot] = value[0]
            own = Moments(*(s[slot : slot + 1] for s in self.found))
            self.used = own if self.used is None else inherit(own, self.used, self.found.count[0], self.rows)
        return self.used.mean[0], self.used.var[0]


def _run_direction(
    layer: BNLSTMBase,
    suffix: str,
    chunks: list[_Chunk],
    start: int,
    steps: int,
    home: torch.device,
    lockstep: Lockstep,
    dtype: torch.dtype,
) -> None:
    """One direction over all chunks; fills its statistics, and each chunk's outputs in the order of its rows.

    steps: of the longest chunk of any rank. dtype: of matrix products, and of outputs.
    """
    p = layer._parameters_of(suffix)
    p = in_dtype(p, dtype)
    weight_ih = p.weight_ih.to(dtype)

    def project(x: Tensor) -> Tensor:
        return F.linear(x.to(device, dtype), weight_ih).to(wide)

    found = layer._statistics_of(suffix)
    wide = accumulation_dtype(p.weight_hh.dtype)
    gamma_ih, gamma_hh = p.gamma_ih.to(wide), p.gamma_hh.to(wide)
    over_time = layer.input_stats == "time"
    slots_ih, slots_hh = (_Slots(moments, found.rows, start, lockstep) for moments in (found.ih, found.hh))
    slots_c = None if found.c is None else _Slots(found.c, found.rows, start, lockstep)
    device = found.rows.device

    if not over_time:
        all_steps = [project(x) for k in chunks for x in k.x_steps]
        used_ih = slots_ih(0, all_steps)
        del all_steps

    for t in range(steps):
        held = [k for k in chunks if t < len(k.x_steps)]
        z_xs = [project(k.x_steps[t]) for k in held]
        if over_time:
            used_ih = slots_ih(t, z_xs)
        z_hs = [F.linear(k.h[: k.rows(t)].to(device), p.weight_hh).to(wide) for k in held]
        used_hh = slots_hh(t, z_hs)

        open_gates, cells = [], []
        for k, z_x, z_h in zip(held, z_xs, z_hs, strict=True):
            a = (z_x - used_ih[0]) * (gamma_ih * (used_ih[1] + layer.eps).rsqrt())
            a += (z_h - used_hh[0]) * (gamma_hh * (used_hh[1] + layer.eps).rsqrt())
            if p.bias is not None:
                a += p.bias
            _, _, _, o, c = update_cell(a, k.c[: k.rows(t)].to(device))
            open_gates.append(o)
            cells.append(c)

        if slots_c is not None and p.gamma_c is not None and p.beta_c is not None:
            mean, var = slots_c(t, cells)
            scale = p.gamma_c * (var + layer.eps).rsqrt()
            normed = [(c - mean) * scale + p.beta_c for c in cells]
        else:
            normed = cells
        for k, o, c, y in zip(held, open_gates, cells, normed, strict=True):
            h = (o * y.tanh()).to(p.weight_hh.dtype).to(home)
            k.outputs.append(h)
            k.h[: k.rows(t)] = h
            k.c[: k.rows(t)] = c.to(home)


@torch.no_grad()
def run_whole(
    layer: BNLSTMBase, calls: list[Captured], offload: bool, start: int, steps: int, batch: int, lockstep: Lockstep
) -> None:
    """Replace a layer's statistics by those of all rows of `calls`, through its layers and directions in turn.

    Args:
        layer: what is to be run.
        calls: this rank's; there may be none where other ranks have some.
        offload: rows, states and outputs wait on the CPU; only one step's pre-activations are on the device.
        start: of all calls.
        steps: of the longest call of any rank.
        batch: sequences of all calls of all ranks.
        lockstep: makes the ranks' moments those of all rows.
    """
    home = torch.device("cpu") if offload else layer.rows.device
    if not layer.rows:  # never trained: as if every vacated seat were inherited
        layer.rows.fill_(batch)
    wide = accumulation_dtype(layer._like().dtype)
    dtype = compute_dtype(layer._like())
    inputs = [call.x.to(home) for call in calls]
    place = 0
    for directions in layer._suffixes:
        results: list[list[Tensor]] = [[] for _ in calls]
        for direction, suffix in enumerate(directions):
            chunks = []
            for call, x in zip(calls, inputs, strict=True):
                if call.hx is None:
                    h = x.new_zeros(call.packing.batch, layer.hidden_size, dtype=dtype)
                    c = torch.zeros_like(h, dtype=wide)
                else:
                    h, c = call.hx[0][place].clone(), call.hx[1][place].to(wide, copy=True)
                turned = x if direction == 0 else x.index_select(0, call.packing.mirror.to(home))
                chunks.append(_Chunk(turned, call.packing, h, c, home))
            _run_direction(layer, suffix, chunks, start, steps, home, lockstep, dtype)
            for result, chunk in zip(results, chunks, strict=True):
                rows = torch.cat(chunk.outputs)
                mirror = chunk.packing.mirror.to(home) if direction else None
                result.append(rows if mirror is None else rows.index_select(0, mirror))
            place += 1
        inputs = [torch.cat(result, 1) for result in results]
