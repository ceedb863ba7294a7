"""A straight-line transcription of the paper's equations and of the variable-length rules, sharing no code with the
library: sequences in the caller's order, Python loops over steps, one statistic at a time, always float64.

Cooijmans et al. 2016: BN(z; γ, β) = β + γ (z − E[z]) / √(Var[z] + ε), and
    (f, i, o, g)~ = BN(W_h h_{t−1}; γ_h, 0) + BN(W_x x_t; γ_x, 0) + b        equation (6)
    c_t = σ(f~) ∘ c_{t−1} + σ(i~) ∘ tanh(g~)                                 equation (7)
    h_t = σ(o~) ∘ tanh(BN(c_t; γ_c, β_c))                                    equation (8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Slot:
    mean: Tensor
    var: Tensor
    count: float


def merged(a: Slot, b: Slot) -> Slot:
    total = a.count + b.count
    if total == 0:
        return a
    gap = b.mean - a.mean
    return Slot(
        a.mean + (b.count / total) * gap,
        (a.count * a.var + b.count * b.var + a.count * b.count / total * gap**2) / total,
        total,
    )


def resolved(slots: list[Slot], rows: float) -> list[Slot]:
    """resolved_0 = slot_0; resolved_t = merge(slot_t, resolved_{t−1} with min(max(N_0 − N_t, 0), R) rows)."""
    out = [slots[0]]
    for slot in slots[1:]:
        lacking = min(max(slots[0].count - slot.count, 0.0), rows)
        before = out[-1]
        if slot.count == 0 and lacking == 0:
            out.append(Slot(before.mean, before.var, 0.0))
        else:
            out.append(merged(Slot(before.mean, before.var, lacking), slot))
    return out


def learnt(slots: list[Slot], seen: dict[int, Slot], batch: int, momentum: float | None) -> list[Slot]:
    """Rule 2: what was known is discounted by ρ = (1 − momentum)^min(1, n/B), then the n new rows are merged in."""
    out = list(slots)
    for index, new in seen.items():
        rho = 1.0 if momentum is None else (1 - momentum) ** min(1.0, new.count / batch)
        old = slots[index]
        out[index] = merged(Slot(old.mean, old.var, rho * old.count), new)
    return out


@dataclass
class Oracle:
    """Parameters (a dict of float64 tensors) and slots of one layer and direction."""

    p: dict[str, Any]
    slots: dict[str, list[Slot]]  # "ih", "hh", "c"
    rows: float = 0.0
    input_stats: str = "time"
    prior_count: float | None = None
    eps: float = 1e-5

    def run(
        self,
        x: Tensor,
        lengths: list[int],
        h0: Tensor,
        c0: Tensor,
        training: bool,
        start: int = 0,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, dict[int, Slot]]]:
        """x [T, B, D] → output [T, B, H], h_n, c_n [B, H], and what each slot saw of this batch."""
        p, eps = self.p, self.eps
        steps, batch = x.shape[:2]
        h, c = list(h0), list(c0)
        output = torch.zeros(steps, batch, h0.shape[1], dtype=x.dtype)
        seen: dict[str, list[tuple[int, Tensor]]] = {"ih": [], "hh": [], "c": []}
        use = {name: resolved(slots, self.rows) for name, slots in self.slots.items()}
        last = len(self.slots["hh"]) - 1

        def place(b: int, t: int) -> int:
            return lengths[b] - 1 - t if reverse else t

        def moments(name: str, z: Tensor, t: int, vacant: int) -> tuple[Tensor, Tensor]:
            """Mean and variance that normalise the active rows z [n, C] in step t."""
            slot = min(start + t, len(use[name]) - 1)
            population = use[name][slot]
            if not training:
                return population.mean, population.var
            seen[name].append((slot, z.detach()))
            n = z.shape[0]
            mean, var = z.sum(0) / n, ((z - z.sum(0) / n) ** 2).sum(0) / n
            kappa = min(float(vacant), self.slots["hh"][0].count)
            if self.prior_count is not None:
                kappa = min(kappa, self.prior_count)
            w = n / (n + kappa)
            return (
                w * mean + (1 - w) * population.mean,
                w * var + (1 - w) * population.var + w * (1 - w) * (mean - population.mean) ** 2,
            )

        everything = torch.stack([x[t, b] @ p["weight_ih"].T for b in range(batch) for t in range(lengths[b])])
        for t in range(max(lengths)):
            active = [b for b in range(batch) if lengths[b] > t]
            z_x = torch.stack([x[place(b, t), b] @ p["weight_ih"].T for b in active])
            z_h = torch.stack([h[b] @ p["weight_hh"].T for b in active])
            vacant = batch - len(active)
            if self.input_stats == "time":
                mean_x, var_x = moments("ih", z_x, t, vacant)
            elif training:
                mean_x = everything.mean(0)
                var_x = ((everything - mean_x) ** 2).mean(0)
            else:
                mean_x, var_x = self.slots["ih"][0].mean, self.slots["ih"][0].var
            mean_h, var_h = moments("hh", z_h, t, vacant)
            a = p["gamma_ih"] * (z_x - mean_x) / torch.sqrt(var_x + eps)
            a = a + p["gamma_hh"] * (z_h - mean_h) / torch.sqrt(var_h + eps)
            if p["bias"] is not None:
                a = a + p["bias"]
            hidden = h0.shape[1]
            i, f, g, o = (a[:, k * hidden : (k + 1) * hidden] for k in range(4))
            new = torch.sigmoid(f) * torch.stack([c[b] for b in active]) + torch.sigmoid(i) * torch.tanh(g)
            shown = new
            if p["gamma_c"] is not None:
                mean_c, var_c = moments("c", new, t, vacant)
                shown = p["gamma_c"] * (new - mean_c) / torch.sqrt(var_c + eps) + p["beta_c"]
            out = torch.sigmoid(o) * torch.tanh(shown)
            for k, b in enumerate(active):
                h[b], c[b] = out[k], new[k]
                output[place(b, t), b] = out[k]
        if self.input_stats == "sequence" and training:
            seen["ih"] = [(0, everything.detach())]

        pooled: dict[str, dict[int, Slot]] = {}
        for name, parts in seen.items():
            by_slot: dict[int, list[Tensor]] = {}
            for slot, z in parts:
                by_slot.setdefault(min(slot, last), []).append(z)
            pooled[name] = {}
            for slot, zs in by_slot.items():
                z = torch.cat(zs)
                pooled[name][slot] = Slot(z.mean(0), ((z - z.mean(0)) ** 2).mean(0), float(z.shape[0]))
        return output, torch.stack(h), torch.stack(c), pooled
