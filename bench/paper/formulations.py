"""The ways to take batch statistics of sequences that end at different times, in plain PyTorch, several models at once.

What people do, what might be done, and what the library does, in one recurrence, so that nothing else differs. Models
that differ in their seed alone (*members*) are trained together, along an axis of their own: S members, T steps, B
sequences, D features, H units, C = 4H. Gates are in the order i, f, g, o. The library's own formulation is here once
more ("both rules"); tests hold it against `BNLSTM` in outputs, gradients and statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_bnlstm.statistics import Moments

EPS = 1e-5


class Formulation(NamedTuple):
    """Which rows a step's statistics are made of.

    counted: "valid": rows of sequences that have not ended; "padded": all, the padding runs on as if it were data;
        "frozen": all, an ended sequence is counted with its last state and its last input; "none": no batch norm.
    phantoms: rows of the population beside these: "none", "vacated" (κ = B − n), or a number (κ whatever B − n).
    prior: what phantom rows are like: "resolved" slots (rule 2's inheritance) or the slot's "own".
    running: how the population that they come from is merged: "merged", with the between-batch term, or "pooled" within
        batches.
    gradient: whether sequences that have ended get gradients through the statistics that they are counted in.
    """

    counted: str
    phantoms: str | int = "none"
    prior: str = "resolved"
    running: str = "merged"
    gradient: bool = True


FORMULATIONS = {
    "LSTM": Formulation("none"),
    "both rules": Formulation("valid", "vacated"),
    "both rules, pooled": Formulation("valid", "vacated", running="pooled"),
    "rule 1, own prior": Formulation("valid", "vacated", prior="own"),
    "fixed κ = 16": Formulation("valid", 16),
    "frozen rows": Formulation("frozen"),
    "frozen rows, no gradient": Formulation("frozen", gradient=False),
    "padding counted": Formulation("padded"),
    "plain masking": Formulation("valid"),
}


class Weights(NamedTuple):
    """Parameters of all members, as `triton_bnlstm`'s with an axis in front.

    weight_ih [S, 4H, D], weight_hh [S, 4H, H], bias, gamma_ih, gamma_hh [S, 4H]; gamma_c, beta_c [S, H] with cell norm.
    The γ are not used without batch norm.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor
    gamma_ih: Tensor
    gamma_hh: Tensor
    gamma_c: Tensor | None = None
    beta_c: Tensor | None = None


class Batch(NamedTuple):
    """One batch for each member, longest sequences first.

    x: [T, S, B, D], padded with zeros. lengths: [S, B], at least 1, descending.
    """

    x: Tensor
    lengths: Tensor


class Running:
    """Population statistics of one norm while training: T slots (or one) of S members.

    mean, var: [T, S, C]. count: [T, S, 1] rows, float64. freedom: [T, S, 1] degrees of freedom of the pooled variance.

    `kind` "merged": mean and variance of all rows, discounted, so that the distances between batches count; "pooled":
    the variance within batches alone, unbiased.
    """

    def __init__(self, kind: str, slots: int, members: int, columns: int, device: torch.device) -> None:
        self.kind = kind
        self.mean = torch.zeros(slots, members, columns, device=device)
        self.var = torch.ones(slots, members, columns, device=device)
        self.count = torch.zeros(slots, members, 1, dtype=torch.float64, device=device)
        self.freedom = torch.zeros_like(self.count)

    def update(self, mean: Tensor, var: Tensor, count: Tensor, rows: int, momentum: float) -> None:
        """One training step: moments [T', S, C] of the first T' slots and their rows, count [T', S, 1]; rows: B."""
        steps = len(mean)
        discount = (1 - momentum) ** (count / rows).clamp_max(1)
        before = discount * self.count[:steps]
        total = before + count
        share = torch.where(total > 0, count / total.clamp_min(1e-300), 0)
        gap = mean - self.mean[:steps]
        part = share.to(mean.dtype)
        if self.kind == "merged":
            merged = torch.lerp(self.var[:steps], var, part) + part * (1 - part) * gap.square()
        else:
            known = discount * self.freedom[:steps]
            freedom = known + (count - 1).clamp_min(0)
            squares = known.to(var.dtype) * self.var[:steps] + count.to(var.dtype) * var
            merged = torch.where(freedom > 0, squares / freedom.clamp_min(1e-30).to(var.dtype), self.var[:steps])
            self.freedom[:steps] = freedom
        self.var[:steps] = torch.where(count > 0, merged, self.var[:steps])
        self.mean[:steps] += part * gap
        self.count[:steps] = total

    def resolved(self, steps: int, rows: int) -> tuple[Tensor, Tensor]:
        """What is used of the first slots: rows that one lacks against slot 0 come from its predecessor. [T', S, C]."""
        means, variances = [self.mean[0]], [self.var[0]]
        inherited = (self.count[0] - self.count[:steps]).clamp(0, rows)
        total = self.count[:steps] + inherited
        keep = torch.where(total > 0, self.count[:steps] / total.clamp_min(1e-300), 0).to(self.mean.dtype)
        for t in range(1, min(steps, len(self.mean))):
            gap = self.mean[t] - means[-1]
            variances.append(torch.lerp(variances[-1], self.var[t], keep[t]) + keep[t] * (1 - keep[t]) * gap.square())
            means.append(torch.lerp(means[-1], self.mean[t], keep[t]))
        return torch.stack(means), torch.stack(variances)

    def of_member(self, member: int) -> Moments:
        """One member's slots, as the library's buffers hold them."""
        mean, var, count = self.mean[:, member], self.var[:, member], self.count[:, member, 0]
        return Moments(mean.clone(), var.clone(), count.clone())


class Own(NamedTuple):
    """A batch's own moments, for `Running.update`: mean, var [T, S, C], count [T, S, 1]."""

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks for


Prior = tuple[Tensor, Tensor, Tensor]  # means and variances [T, S, C] of phantom rows, the batch's share [T, S, 1]


def counted_rows(formulation: Formulation, lengths: Tensor, steps: int) -> Tensor:
    """Mask [T, S, B] of the rows that statistics are made of; none beyond a member's own longest sequence."""
    step = torch.arange(steps, device=lengths.device)[:, None, None]
    if formulation.counted in ("padded", "frozen"):
        return step < lengths.amax(1, keepdim=True).expand_as(lengths)
    return step < lengths


def batch_share(formulation: Formulation, count: Tensor, rows: int, seen: Tensor) -> Tensor:
    """The batch's share n/(n + κ) [T, S, 1]; count [T, S, 1] is n, seen [S, 1] rows of the population's slot 0."""
    if formulation.phantoms == "none":
        return torch.ones_like(count)
    vacated = formulation.phantoms == "vacated"
    kappa = rows - count if vacated else torch.full_like(count, float(formulation.phantoms))
    return count / (count + kappa.minimum(seen)).clamp_min(1)


class _Normalise(torch.autograd.Function):
    """Batch norm of rows among which some are counted and some phantom, times γ, plus a term.

    By hand because autograd's record of the same takes three times as long: with r = 1/√(σ̃² + ε), n counted rows, the
    batch's share w, and sums over all rows,

        dz = γ r dy − [counted] γ r w/n · (Σ dy + (z − μ̃) r² Σ dy (z − μ̃))
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, term: Tensor, gamma: Tensor, mask: Tensor, count: Tensor, *prior: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (
            mask.transpose(-1, -2) / count[..., None]
        )  # [.., 1, B]: sums as products, faster than a mask and a sum
        mean = weights @ z
        deviation = z - mean
        own_var = (weights @ deviation.square()).squeeze(-2)
        share: Tensor | None = None
        used = own_var
        if prior:
            prior_mean, prior_var, share = prior
            gap = mean.squeeze(-2) - prior_mean
            deviation += ((1 - share) * gap)[..., None, :]
            used = share * own_var + (1 - share) * prior_var + share * (1 - share) * gap.square()
        rstd = (used + EPS).rsqrt()
        ctx.save_for_backward(deviation, rstd, gamma, mask, count, share)
        ctx.mark_non_differentiable(mean, own_var)
        return torch.addcmul(term, deviation, (rstd * gamma)[..., None, :]), mean, own_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        deviation, rstd, gamma, mask, count, share = ctx.saved_tensors
        sum_dy, product = dy.sum(-2), (dy * deviation).sum(-2)
        scale = rstd * gamma
        part = -scale / count if share is None else -scale * share / count
        dz = torch.addcmul((part * sum_dy)[..., None, :], deviation, (part * rstd.square() * product)[..., None, :])
        dz.mul_(mask).addcmul_(dy, scale[..., None, :])
        d_gamma = product * rstd
        return dz, dy, d_gamma, None, None, *[None] * (len(ctx.needs_input_grad) - 5)


def normalise(
    z: Tensor, term: Tensor, gamma: Tensor, mask: Tensor, count: Tensor, prior: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Term + γ · rows z [.., B, C] less their mean, over their deviation; and the rows' own mean and variance [.., C].

    Args:
        z: rows.
        term: [.., B, C].
        gamma: [.., C].
        mask: [.., B, 1], 1 for rows that are counted.
        count: [.., 1], how many these are, at least 1.
        prior: mean and variance [.., C] of phantom rows and the batch's share [.., 1], or None.
    """
    y, mean, var = _Normalise.apply(z, term, gamma, mask, count, *(prior or ()))
    return y, mean.squeeze(-2), var


def forward(
    formulation: Formulation,
    weights: Weights,
    batch: Batch,
    priors: dict[str, Prior] | None,
    *,
    over_time: bool,
) -> tuple[Tensor, dict[str, Own]]:
    """One training forward of all members.

    Args:
        formulation: which rows count.
        weights: parameters; cell norm where they have its γ.
        batch: inputs.
        priors: phantom rows by norm, "ih" (not with statistics over sequences), "hh" and "c"; None for no phantoms.
        over_time: statistics of W_ih x per step, else one set for all steps.

    Returns:
        h of all steps [T, S, B, H] (what stands beyond a sequence's length means nothing), and the batch's own moments.
    """
    steps, members, rows = batch.x.shape[:3]
    hidden = weights.weight_hh.shape[2]
    mask = counted_rows(formulation, batch.lengths, steps).to(batch.x.dtype)[..., None]
    valid = counted_rows(Formulation("valid"), batch.lengths, steps)[..., None]
    count = mask.sum(2)
    own: dict[str, Own] = {}
    x, plain = batch.x, formulation.counted == "none"
    if formulation.counted == "frozen" and over_time:  # its last input is counted, as its last state is
        at = torch.arange(steps, device=x.device)[:, None, None].minimum(batch.lengths - 1)
        x = x.gather(0, at[..., None].expand_as(x))
    z_x = torch.einsum("tsbd,scd->tsbc", x, weights.weight_ih)
    by_step = over_time and not plain
    if plain:
        a_x = z_x + weights.bias[:, None]
    elif by_step:
        a_x = z_x  # normalised step by step below, while a step's rows are in a CPU's cache
    else:
        frames = mask if formulation.counted == "padded" else valid.to(mask.dtype)
        flat, held = (each.transpose(0, 1).flatten(1, 2) for each in (z_x, frames))
        bias = weights.bias[:, None].expand_as(flat)
        y, mean, var = normalise(flat, bias, weights.gamma_ih, held, held.sum(1), None)
        own["ih"] = Own(mean[None], var[None], held.sum(1)[None])
        a_x = y.view(members, steps, rows, -1).transpose(0, 1)

    # rows are sorted, so what no member has left can be skipped where nobody counts it
    left = [rows] * steps if formulation.counted in ("padded", "frozen") else valid[..., 0].any(1).sum(1).tolist()
    turned = weights.weight_hh.transpose(1, 2)
    counts = count.clamp_min(1).unbind()
    prior_ih, prior_hh, prior_c = (_by_step(priors, name, steps) for name in ("ih", "hh", "c"))
    bias = weights.bias[:, None].expand(members, rows, -1)
    a_steps, masks, valids = a_x.unbind(), mask.unbind(), valid.unbind()
    h = batch.x.new_zeros(members, rows, hidden)
    c = torch.zeros_like(h)
    outputs, found_ih, found_hh, found_c = [], [], [], []
    for t in range(steps):
        n = left[t]
        h, c, row_mask = h[:, :n], c[:, :n], masks[t][:, :n]
        z, a = torch.bmm(h, turned), a_steps[t][:, :n]
        if not formulation.gradient:
            z, a, c_held = _of_valid(valids[t], z), _of_valid(valids[t], a), c.detach()
        else:
            c_held = c
        if by_step:
            a, *moments = normalise(a, bias[:, :n], weights.gamma_ih, row_mask, counts[t], prior_ih[t])
            found_ih.append(moments)
        if plain:
            a = z + a
        else:
            a, *moments = normalise(z, a, weights.gamma_hh, row_mask, counts[t], prior_hh[t])
            found_hh.append(moments)
        i, f, g, o = a.chunk(4, 2)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        squashed = c_new
        if weights.gamma_c is not None and weights.beta_c is not None:
            counted_c = c_new if formulation.counted != "frozen" else torch.where(valids[t], c_new, c_held)
            beta_c = weights.beta_c[:, None].expand_as(counted_c)
            squashed, *moments = normalise(counted_c, beta_c, weights.gamma_c, row_mask, counts[t], prior_c[t])
            found_c.append(moments)
        h_new = o.sigmoid() * squashed.tanh()
        if formulation.counted == "frozen":
            h, c = torch.where(valids[t], h_new, h), torch.where(valids[t], c_new, c)
        else:
            h, c = h_new, c_new
        outputs.append(h if n == rows else torch.nn.functional.pad(h, (0, 0, 0, rows - n)))
    for name, found in (("ih", found_ih), ("hh", found_hh), ("c", found_c)):
        if found:
            mean, var = (torch.stack(each) for each in zip(*found, strict=True))
            own[name] = Own(mean, var, count)
    return torch.stack(outputs), own


def _of_valid(valid: Tensor, z: Tensor) -> Tensor:
    """The same rows, of which only the valid ones pass a gradient on."""
    return torch.where(valid, z, z.detach())


def _by_step(priors: dict[str, Prior] | None, name: str, steps: int) -> list[tuple[Tensor, ...] | None]:
    """One norm's phantom rows of each step; None where there are none."""
    if priors is None or name not in priors:
        return [None] * steps
    return list(zip(*(each.unbind() for each in priors[name]), strict=True))
