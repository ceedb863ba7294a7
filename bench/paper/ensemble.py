"""Training several members of one formulation together, and handing each to the library for its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bnlstm import BNLSTM

from .data import Sequences
from .formulations import FORMULATIONS, Batch, Own, Prior, Running, Weights, batch_share, counted_rows, forward

LONGEST_SHARE = 0.1
CLIP = 1.0
MOMENTUM = 0.1


class Plan(NamedTuple):
    """How members are trained.

    formulation: a name. input_stats: "time" or "sequence". hidden, batch, steps: H, B, training steps. rate: Adam's at
    first; it falls to 0 in a straight line. seeds: one for each member, of weights and batches.
    """

    formulation: str
    input_stats: str
    cell_norm: bool
    hidden: int
    batch: int
    steps: int
    rate: float
    seeds: list[int]


class Member(nn.Module):
    """One model as a user would have it: a layer of the library, or nn.LSTM, and a linear readout."""

    def __init__(self, layer: nn.Module, hidden: int, classes: int, every_step: bool) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(hidden, classes)
        self.every_step = every_step

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """X [T, B, D], lengths [B] → logits [B, classes] after each sequence's last step, or [T, B, classes]."""
        if isinstance(self.layer, BNLSTM):
            rows, (h_n, _) = self.layer(x, lengths=lengths)
        else:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
            packed_rows, (h_n, _) = self.layer(packed)
            rows, _ = nn.utils.rnn.pad_packed_sequence(packed_rows, total_length=len(x))
        logits: Tensor = self.readout(rows if self.every_step else h_n[-1])
        return logits


def _bnlstm(data: Sequences, plan: Plan) -> BNLSTM:
    return BNLSTM(
        features(data),
        plan.hidden,
        max_length=int(data.lengths[data.train].max()),
        cell_norm=plan.cell_norm,
        input_stats=plan.input_stats,
        momentum=MOMENTUM,
        prior_count=0 if FORMULATIONS[plan.formulation].phantoms == "none" else None,
    )


def features(data: Sequences) -> int:
    """Features D of a step: those of the data, or one for each character."""
    return data.x.shape[2] if data.x.dim() == 3 else data.classes


def inputs(data: Sequences, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """X [T, B, D] as long as the longest, lengths [B] and targets, [B] or [T, B], of sequences in the order given."""
    lengths = data.lengths[positions]
    steps = int(lengths.max())
    x, y = data.x[positions, :steps], data.y[positions]
    if x.dim() == 2:
        x = F.one_hot(x, data.classes).float()
        y = y[:, :steps].t()
    return x.transpose(0, 1).to(device), lengths.to(device), y.to(device)


class Ensemble:
    """Members of one plan: stacked parameters, and running statistics of both kinds, whichever is the prior."""

    def __init__(self, data: Sequences, plan: Plan, device: torch.device) -> None:
        self.data, self.plan, self.device = data, plan, device
        self.formulation = FORMULATIONS[plan.formulation]
        self.every_step = data.y.dim() == 2
        layers, readouts = [], []
        for seed in plan.seeds:
            torch.manual_seed(seed)
            layers.append(_bnlstm(data, plan))
            readouts.append(nn.Linear(plan.hidden, data.classes))
        names = [name for name in Weights._fields if getattr(layers[0], f"{name}_l0", None) is not None]

        def stacked(modules: list[nn.Module], name: str) -> Tensor:
            together = torch.stack([getattr(module, name).detach() for module in modules])
            return together.to(device).requires_grad_()

        self.weights = Weights(**{name: stacked(list(layers), f"{name}_l0") for name in names})
        self.readout = stacked(list(readouts), "weight"), stacked(list(readouts), "bias")
        self.parameters = [p for p in (*self.weights, *self.readout) if p is not None]
        if self.formulation.counted == "none":  # a plain LSTM has no γ
            unused = (self.weights.gamma_ih, self.weights.gamma_hh, self.weights.gamma_c, self.weights.beta_c)
            self.parameters = [p for p in self.parameters if not any(p is each for each in unused)]
            self.weights = self.weights._replace(gamma_c=None, beta_c=None)
        slots, members = layers[0].max_length, len(plan.seeds)
        columns = {"ih": 4 * plan.hidden, "hh": 4 * plan.hidden}
        if plan.cell_norm:
            columns["c"] = plan.hidden
        self.running: dict[str, dict[str, Running]] = {}
        if self.formulation.counted != "none":
            for kind in ("merged", "pooled"):
                self.running[kind] = {
                    name: Running(
                        kind, 1 if name == "ih" and plan.input_stats == "sequence" else slots, members, width, device
                    )
                    for name, width in columns.items()
                }
        self._generators = [torch.Generator().manual_seed(seed) for seed in plan.seeds]
        self._orders: list[Tensor] = [data.train[:0] for _ in plan.seeds]

    def _next(self, member: int) -> Tensor:
        """Positions of the member's next batch, longest first; epochs in orders of its own."""
        if len(self._orders[member]) < self.plan.batch:
            train = self.data.train
            self._orders[member] = train[torch.randperm(len(train), generator=self._generators[member])]
        order = self._orders[member]
        positions, self._orders[member] = order[: self.plan.batch], order[self.plan.batch :]
        return positions[self.data.lengths[positions].argsort(descending=True, stable=True)]

    def next_batch(self) -> tuple[Batch, Tensor]:
        """One batch for each member, and targets: [S, B], or [T, S, B]."""
        positions = torch.stack([self._next(member) for member in range(len(self.plan.seeds))])
        x, lengths, y = inputs(self.data, positions.flatten(), self.device)
        shape = positions.shape
        targets = y.unflatten(-1, shape)
        return Batch(x.unflatten(1, shape), lengths.view(shape)), targets

    def priors(self, batch: Batch) -> dict[str, Prior] | None:
        """Phantom rows for a batch, from the population as it stands."""
        if self.formulation.phantoms == "none" or self.formulation.counted == "none":
            return None
        steps, _, rows = batch.x.shape[:3]
        running = self.running[self.formulation.running]
        count = counted_rows(self.formulation, batch.lengths, steps).sum(2)[..., None].double()
        share = batch_share(self.formulation, count, rows, running["hh"].count[0]).to(batch.x.dtype)
        found = {}
        for name, norm in running.items():
            if len(norm.mean) == 1:  # statistics over sequences have no phantom rows
                continue
            mean, var = (
                norm.resolved(steps, rows)
                if self.formulation.prior == "resolved"
                else (norm.mean[:steps].clone(), norm.var[:steps].clone())
            )
            found[name] = mean, var, share
        return found

    def logits(self, h: Tensor, lengths: Tensor) -> Tensor:
        """H [T, S, B, H] → [S, B, classes] after each sequence's last step, or [T, S, B, classes]."""
        weight, bias = self.readout
        if self.every_step:
            return torch.einsum("tsbh,skh->tsbk", h, weight) + bias[:, None]
        last = (lengths - 1)[None, ..., None].expand(1, *h.shape[1:])
        return torch.baddbmm(bias[:, None], h.gather(0, last)[0], weight.transpose(1, 2))

    def losses(self, logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Mean cross-entropy of each member over its targets, [S]."""
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
        if not self.every_step:
            return loss.mean(1)
        valid = torch.arange(len(loss), device=loss.device)[:, None, None] < lengths
        return (loss * valid).sum((0, 2)) / lengths.sum(1)

    def step(self, optimiser: torch.optim.Optimizer) -> Tensor:
        """One training step of all members; their losses [S]."""
        batch, targets = self.next_batch()
        h, own = forward(
            self.formulation, self.weights, batch, self.priors(batch), over_time=self.plan.input_stats == "time"
        )
        losses = self.losses(self.logits(h, batch.lengths), targets, batch.lengths)
        optimiser.zero_grad()
        losses.sum().backward()  # members share nothing, so each gets the gradient of its own loss
        self._clip()
        optimiser.step()
        self._learn(own, batch.x.shape[2])
        return losses.detach()

    def _clip(self) -> None:
        """Each member's gradient to a norm of at most CLIP, as `clip_grad_norm_` does for one."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        factor = (CLIP / (norms + 1e-6)).clamp_max(1)
        for g in gradients:
            g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))

    @torch.no_grad()
    def _learn(self, own: dict[str, Own], rows: int) -> None:
        for norms in self.running.values():
            for name, norm in norms.items():
                moments = own[name]
                norm.update(moments.mean, moments.var, moments.count.double(), rows, MOMENTUM)

    def train(self, each: Callable[[], None] = lambda: None) -> list[Tensor]:
        """All steps of the plan; losses [S] of each. each: called after each step."""
        optimiser = torch.optim.Adam(self.parameters, lr=self.plan.rate)
        losses = []
        for done in range(self.plan.steps):
            optimiser.param_groups[0]["lr"] = self.plan.rate * (1 - done / self.plan.steps)
            losses.append(self.step(optimiser))
            each()
        return losses

    @torch.no_grad()
    def member(self, member: int, running: str = "merged") -> Member:
        """One member in eval, with its running statistics of one kind."""
        if self.formulation.counted == "none":
            layer: nn.Module = nn.LSTM(features(self.data), self.plan.hidden)
            layer.get_parameter("bias_hh_l0").zero_()
            names = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0", "bias": "bias_ih_l0"}
        else:
            layer = _bnlstm(self.data, self.plan)
            names = {name: f"{name}_l0" for name in Weights._fields}
            layer.rows.fill_(self.plan.batch)
            for name, norm in self.running[running].items():
                for kind, value in norm.of_member(member)._asdict().items():
                    getattr(layer, f"{kind}_{name}_l0").copy_(value)
        for name, target in names.items():
            value = getattr(self.weights, name)
            if value is not None:
                getattr(layer, target).copy_(value[member])
        made = Member(layer, self.plan.hidden, self.data.classes, self.every_step)
        made.readout.weight.copy_(self.readout[0][member])
        made.readout.bias.copy_(self.readout[1][member])
        return made.to(self.device).eval()


@torch.no_grad()
def scores(member: Member, data: Sequences, positions: Tensor, device: torch.device) -> dict[str, float]:
    """Loss [nats] and accuracy in evaluation over all targets, and over those of the longest tenth of the sequences."""
    sums = torch.zeros(2, 3, dtype=torch.float64)  # all, longest: loss, right, targets
    order = positions[data.lengths[positions].argsort(descending=True, stable=True)]
    longest = set(order[: -(-len(order) * 1 // round(1 / LONGEST_SHARE))].tolist())
    for part in order.split(300):
        x, lengths, y = inputs(data, part, device)
        logits = member(x, lengths).double()
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
        right = (logits.argmax(-1) == y).double()
        valid = torch.ones_like(loss)
        if member.every_step:
            valid = (torch.arange(len(x), device=device)[:, None] < lengths).double()
        among = torch.tensor([k in longest for k in part.tolist()], dtype=torch.float64, device=device)
        for row, chosen in enumerate((valid, valid * among)):
            sums[row] += torch.stack([(loss * chosen).sum(), (right * chosen).sum(), chosen.sum()]).cpu()
    (loss, right, count), (long_loss, long_right, long_count) = sums.tolist()
    return {
        "loss": loss / count,
        "accuracy": right / count,
        "long_loss": long_loss / long_count,
        "long_accuracy": long_right / long_count,
    }
