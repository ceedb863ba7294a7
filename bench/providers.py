"""Who runs a case: this library's kernels and reference path, loops, compilers, and other people's LSTMs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_bnlstm import BNLSTM
from triton_bnlstm.backend import why_no_kernels
from triton_bnlstm.kernels.config import BackwardConfig, Config, Device

from . import peers
from .cases import Case
from .loops import BatchNormLoop, StepLoop
from .problem import Expected, Model, Problem
from .unavailable import Unavailable

# Seconds that torch.compile gets for a loop over all steps, forward and backward together.
LOOP_LIMIT_S = 60.0
DEVICE_LENGTHS = "sequence, device lengths"
# For packages that compile their kernels when they are first used.
PEER_LIMIT_S = 120.0


class TimeUp(BaseException):
    """The limit of `time_limit` has passed. No Exception: a compiler must not take it for one of its own troubles."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the main thread after so long; elsewhere, and where there are no alarms, nothing."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Provider:
    """Somebody who runs cases.

    Attributes:
        name: in tables and records.
        build: a problem → its model; raises Unavailable where it cannot run it.
        ours: it is one of this library's kernels.
        limit_s: seconds for its first training step, compilers included.
        note: what it is, to be shown beside its name.
    """

    name: str
    build: Callable[[Problem], Model]
    ours: bool = False
    limit_s: float | None = None
    note: str = ""


class Layouts(NamedTuple):
    """Of the kernels in training, forward and backward, and in evaluation."""

    forward: Config
    backward: BackwardConfig
    inference: Config


def _named_parameters(layer: BNLSTM) -> dict[str, Tensor]:
    return dict(layer.named_parameters())


def default_layouts(problem: Problem, *, sequence: bool) -> Layouts:
    """What the device gets in sequence mode or in step mode if nobody tunes: what is shipped, else the analytic choice.

    Raises:
        Unavailable: no layout of this case is for sequence mode.
    """
    from triton_bnlstm.kernels import launch  # not at the top: there may be no Triton
    from triton_bnlstm.kernels.backward_config import default_backward_config
    from triton_bnlstm.kernels.config import device_of
    from triton_bnlstm.kernels.forward_config import default_config

    case = problem.case
    device = device_of(problem.device)
    precision = launch.product_precision(case.dtype, problem.device)
    common = (device, case.hidden, case.batch, case.directions, case.dtype, precision)
    steps = case.steps if sequence or device.backend == "cpu" else 1
    forward, inference = (default_config(*common, split_batch=split, steps=steps) for split in (False, True))
    analytic = Layouts(forward, default_backward_config(*common, steps=steps), inference)
    found = {}
    for what, layout in analytic._asdict().items():
        known = _shipped(device, case, what)
        if known is not None and known.sequence == sequence:
            layout = known
        if sequence and not layout.sequence:
            raise Unavailable(f"sequence mode, {what}: no layout whose programs can all run at the same time")
        found[what] = layout if sequence else replace(layout, sequence=False)
    return Layouts(**found)


def _shipped(device: Device, case: Case, what: str) -> Config | BackwardConfig | None:
    """The layout that the package brings for a kernel of a case, if any can run there."""
    from triton_bnlstm.tuning import shipped, space
    from triton_bnlstm.tuning.device import Identity

    from .layouts import work_of

    work = work_of(case, what)
    entry = None if device.backend == "cpu" else shipped.get(Identity.of(device), work.key)
    if entry is None or space.why_not(device, work, entry.layout) is not None:
        return None
    assert isinstance(entry.layout, (Config, BackwardConfig))
    return entry.layout


def kernels(problem: Problem, layouts: Layouts, save: str = "preactivations", *, device_lengths: bool = False) -> Model:
    """BNLSTM on the kernels, laid out like this."""
    from triton_bnlstm.kernels.config import use_config

    layer, evaluated = problem.layers(backend="triton", save=save)
    capturable = problem.capturable or device_lengths

    def call(x: Tensor, train: bool) -> Tensor:
        with use_config(layouts.forward if train else layouts.inference, backward=layouts.backward):
            return problem.call_layer(layer if train else evaluated, x, train, on_device=device_lengths)

    told = {what: asdict(layout) for what, layout in layouts._asdict().items()}
    return Model(
        call,
        _named_parameters(layer),
        lambda: problem.batch_normalised,
        graphed=capturable,
        # In a graph the layer resolves its population again at each replay, which a call as it is does not; but outside
        # of one the host takes longer to enqueue even sequence mode's few launches than an H100 to run them.
        graphed_inference=capturable,
        layout=told,
    )


def ours(problem: Problem, *, sequence: bool, save: str = "preactivations", device_lengths: bool = False) -> Model:
    """The kernels, or why there are none here."""
    why = why_no_kernels(problem.device, problem.case.dtype)
    if why is not None:
        raise Unavailable(why)
    if problem.case.precision == "tf32" and not _has_tf32(problem.device):
        raise Unavailable("no TF32 on this device")
    if device_lengths and problem.case.lengths == "equal":
        raise Unavailable("all lengths are equal")
    return kernels(problem, default_layouts(problem, sequence=sequence), save, device_lengths=device_lengths)


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def reference(problem: Problem) -> Model:
    """BNLSTM on the reference path, eagerly."""
    return problem.reference_model()


def _equal_lengths_only(problem: Problem) -> None:
    if problem.case.lengths != "equal":
        raise Unavailable("equal lengths only: batch statistics would count padding")


def batch_norm_loop(problem: Problem) -> Model:
    """A loop of F.batch_norm, eagerly."""
    _equal_lengths_only(problem)
    layer = problem.copy_of_layer()
    loop = BatchNormLoop(layer)
    return Model(loop, _named_parameters(layer), lambda: problem.batch_normalised, graphed=False)


def _compiler(device: torch.device) -> Callable[[Any], Any]:
    # on a CPU the loops are only walked through; Inductor would need a C++ compiler and a minute
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)


def compiled_step(problem: Problem) -> Model:
    """A compiled step for all steps in a row."""
    _equal_lengths_only(problem)
    torch.compiler.reset()  # shapes of earlier cases count towards a limit beyond which nothing is compiled
    layer = problem.copy_of_layer()
    loop = StepLoop(layer, _compiler(problem.device))
    return Model(loop, _named_parameters(layer), lambda: problem.batch_normalised, replayed=True)


def compiled_loop(problem: Problem) -> Model:
    """All steps compiled as one function."""
    _equal_lengths_only(problem)
    torch.compiler.reset()
    layer = problem.copy_of_layer()
    loop = StepLoop(layer, lambda function: function)
    compiled = _compiler(problem.device)(loop.__call__)
    return Model(compiled, _named_parameters(layer), lambda: problem.batch_normalised)


def cudnn(problem: Problem) -> Model:
    """nn.LSTM: cuDNN's on a GPU."""
    if problem.case.cell_norm:
        raise Unavailable("nn.LSTM has no cell norm")
    lstm = problem.plain_lstm(problem.case.dtype)
    return Model(
        lambda x, _: problem.call_plain_lstm(lstm, x),
        dict(lstm.named_parameters()),
        lambda: problem.without_batch_norm,
        graphed=problem.capturable,
    )


def peer(adapter: Callable[..., peers.Model], problem: Problem) -> Model:
    """Somebody else's kernels, with the layer's weights as far as they have such."""
    case = problem.case
    weights = {name.removesuffix("_l0"): p.detach() for name, p in problem.layer.named_parameters()}
    model = adapter(case, weights, problem.device)
    wide = {name: p.detach().double().requires_grad_() for name, p in model.parameters.items()}

    def expected() -> Expected:
        return problem.expected_of(lambda x, _: model.expected(wide, x), wide)

    layout = {"backend": model.backend} if model.backend else None
    return Model(model.call, model.parameters, expected, graphed=False, graphed_inference=False, layout=layout)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("sequence", partial(ours, sequence=True), ours=True, note="one launch for all steps"),
        Provider("step", partial(ours, sequence=False), ours=True, note="a launch for each step"),
        Provider(
            "sequence, recompute",
            partial(ours, sequence=True, save="recompute"),
            ours=True,
            note='save="recompute": less memory kept for the backward',
        ),
        Provider(
            DEVICE_LENGTHS,
            partial(ours, sequence=True, device_lengths=True),
            ours=True,
            note="lengths are a tensor on the device: nothing waits for the host, and padding costs products",
        ),
        Provider("compiled step", compiled_step, note="torch.compile of one step, replayed from a CUDA graph"),
        Provider("compiled loop", compiled_loop, limit_s=LOOP_LIMIT_S, note="torch.compile of the loop over all steps"),
        Provider("reference", reference, note="this library's reference path, eager"),
        Provider("F.batch_norm loop", batch_norm_loop, note="two F.batch_norm calls a step, eager"),
        Provider("nn.LSTM", cudnn, note="no batch norm"),
        Provider("FlashRNN", partial(peer, peers.flashrnn), note="no batch norm", limit_s=PEER_LIMIT_S),
        Provider("Haste", partial(peer, peers.haste), note="layer norm", limit_s=PEER_LIMIT_S),
    )
}
# Compiling a loop takes minutes.
USUAL = tuple(name for name in PROVIDERS if name not in ("compiled loop", DEVICE_LENGTHS))


def usual(case: Case) -> list[str]:
    """Who a case is measured with unless somebody else is asked for."""
    return [*USUAL, DEVICE_LENGTHS] if case.lengths != "equal" else [*USUAL]
