"""Measuring on a device: compiled before it is launched, right before it is timed, and timed as replays of a graph."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import fused_backward, fused_forward
from ..kernels import launch
from ..kernels.config import BackwardConfig, Config, Device, MomentsConfig, SaveConfig, device_of, use_config
from ..kernels.errors import KernelError
from ..kernels.launch import Recurrence
from ..kernels.rows import Rows
from ..kernels.run import only_loaded
from . import space
from .choice import analytic_only
from .sample import Sample, relative_error, usual_steps
from .tuner import Bench, TuningError, Unfit
from .work import Layout, Work

# Mean and variance are float32 sums over at most some thousand rows.
_MOMENTS_BOUND = 1e-4


@contextmanager
def _product_precision(work: Work, device: torch.device) -> Iterator[None]:
    """float32 products are rounded to TF32 within it, or not, as the work has it; torch's switch is left as it was.

    The switch is the process's. It is touched only where it stands otherwise, which is never so before a layer's call:
    that has its precision from the switch. `tune` and `verify` have a process of their own.
    """
    if work.dtype != torch.float32 or launch.product_precision(work.dtype, device) == work.precision:
        yield
        return
    matmul, allowed = torch.backends.cuda.matmul, work.precision == "tf32"
    new = hasattr(matmul, "fp32_precision")  # since torch 2.9, which raises where it meets the old switch
    before = matmul.fp32_precision if new else matmul.allow_tf32
    try:
        if new:
            matmul.fp32_precision = work.precision
        else:
            matmul.allow_tf32 = allowed
        yield
    finally:
        if new:
            matmul.fp32_precision = before
        else:
            matmul.allow_tf32 = before


@contextmanager
def undisturbed(work: Work, device: torch.device, *, tuned: bool = False) -> Iterator[None]:
    """Whatever mode the caller is in, and nothing of his is touched: no autocast, no inference mode, his own graph.

    tuned: kernels get the layouts that they would get; else those that nobody has tuned.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _product_precision(work, device),
        nullcontext() if tuned else analytic_only(),
    ):
        yield


class _Timed:
    """Calls that have been made ready: replays of graphs on a device, plain calls in the interpreter."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._calls: dict[Layout, Callable[[], Any]] = {}
        self._pool: Any = None

    def add(self, layout: Layout, call: Callable[[], Any]) -> None:
        """Capture a call.

        Raises:
            TuningError: it cannot be captured. Later captures of this process may fail for that alone.
        """
        if self.device.type != "cuda":
            self._calls[layout] = call
            return
        with torch.cuda.device(self.device):
            self._calls[layout] = self._captured(call)

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # What one graph leaves, another may write over: they are replayed one after the other, for the time alone.
            # Other threads, which load data, may go on allocating: this capture is no affair of theirs.
            # torch's own stream for captures belongs to one device, the first that captured: a graph of another one
            # would be empty, of which torch only warns, and its replays would be fast.
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*CUDA Graph is empty", category=UserWarning)
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise TuningError(f"the kernels cannot be captured in a CUDA graph: {error}") from error
        self._pool = self._pool or graph.pool()
        return graph.replay

    def seconds(self, layout: Layout) -> float:
        """Of one call, behind another one that keeps the device busy while this one is enqueued."""
        call = self._calls[layout]
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        with torch.cuda.device(self.device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()
            before.record()
            call()
            after.record()
            after.synchronize()
        return before.elapsed_time(after) / 1000


def bench_of(work: Work, device: torch.device, steps: int | None = None) -> Bench:
    """Where some work is tuned."""
    kinds: dict[str, type[_DeviceBench]] = {"moments": MomentsBench, "save": SaveBench}
    return kinds.get(work.kernel, RecurrentBench)(work, device, steps or usual_steps(work))


class _DeviceBench:
    def __init__(self, work: Work, device: torch.device, steps: int) -> None:
        self.work, self.device, self.steps = work, device, steps
        self.numbers: Device = device_of(device)
        self.default = space.analytic(self.numbers, work)
        self.timed = _Timed(device)

    def structures(self) -> Iterable[Layout]:
        """See `Bench`."""
        return space.structures(self.numbers, self.work)

    def neighbours(self, layout: Layout) -> Iterable[Layout]:
        """See `Bench`."""
        return space.neighbours(layout)

    def prepare(self, layout: Layout) -> None:
        """See `Bench`."""
        reason = space.why_not(self.numbers, self.work, layout)
        if reason is not None:
            raise Unfit(reason)
        with undisturbed(self.work, self.device, tuned=self.work.kernel == "save"):
            try:
                reason = self.why_not_compiled(layout) or self.why_wrong(layout)
                if reason is not None:
                    raise Unfit(reason)
                self.timed.add(layout, self.call_of(layout))
            except KernelError as error:
                raise Unfit(str(error)) from error
            except torch.OutOfMemoryError as error:  # says nothing about the layout
                raise TuningError(f"there is too little memory on {self.device} to measure") from error

    def sample(self, layout: Layout) -> float:
        """See `Bench`."""
        with undisturbed(self.work, self.device, tuned=self.work.kernel == "save"):
            return self.timed.seconds(layout)

    def why_not_compiled(self, layout: Layout) -> str | None:
        """Why it cannot run here, having compiled it."""
        raise NotImplementedError

    def why_wrong(self, layout: Layout) -> str | None:
        """What it computes wrongly, having run it."""
        raise NotImplementedError

    def call_of(self, layout: Layout) -> Callable[[], Any]:
        """What is timed."""
        raise NotImplementedError


class RecurrentBench(_DeviceBench):
    """The recurrence's kernels: a whole layer says whether they are right, their loop alone is timed, a step each."""

    def __init__(self, work: Work, device: torch.device, steps: int) -> None:
        super().__init__(work, device, steps)
        self._sample: Sample | None = None
        self._recurrence: Recurrence | None = None

    @property
    def layer(self) -> Sample:
        """Made when it is needed first."""
        if self._sample is None:
            self._sample = Sample(self.work, self.device, self.steps)
        return self._sample

    @property
    def recurrence(self) -> Recurrence:
        """The kernel on its tensors."""
        if self._recurrence is None:
            with launch.observed() as seen:
                self._run(None)
            self._recurrence = next(each for each in seen if each.kernel.__name__ == f"{self.work.kernel}_kernel")
        return self._recurrence

    def _run(self, layout: Layout | None, save: str = "preactivations") -> dict[str, Tensor]:
        """The layer in this layout; in its default layouts with None."""
        forward = layout if isinstance(layout, Config) and self.work.kernel != "backward" else None
        backward = layout if isinstance(layout, BackwardConfig) else None
        calls = [call._replace(c=call.c.float()) for call in self.layer.calls]
        packing = calls[0].problem.packing
        found: dict[str, Tensor] = {}
        with use_config(forward, backward=backward):
            if not self.layer.training:
                h, c, _ = fused_forward.infer(calls, keep_cells=False)
                c_n = list(c)
            else:
                ran = fused_forward.train(calls, save)
                h, c_n = ran.h, fused_forward.last_states(ran.c, packing)
                for k, moments in enumerate(ran.moments):
                    found |= {f"mean {k}": moments.hh.mean, f"variance {k}": moments.hh.var}
                wanted = [(pull, None, None) for pull in self.layer.pull]
                flags = [tuple(s is not None for s in (call.x, call.h, call.c, *call.parameters)) for call in calls]
                gradients = fused_backward.backward(calls, ran, wanted, flags, backward, reuse=False)  # type: ignore[arg-type]
                given = [d for d in gradients if d is not None]
                names = [f"d_{name} {k}" for k in range(len(calls)) for name in self.layer.names()]
                found |= dict(zip(names, given, strict=True))
        h_n = fused_forward.last_states(h, packing)
        for k in range(len(calls)):
            found |= {f"output {k}": h[k, packing.batch :], f"h_n {k}": h_n[k], f"c_n {k}": c_n[k]}
        return found

    def training_step(self, save: str) -> dict[str, Tensor]:
        """Forward and backward of the layer in training, and what they give."""
        return self._run(None, save)

    def why_not_compiled(self, layout: Layout) -> str | None:
        """See `_DeviceBench`."""
        assert isinstance(layout, Config)
        return self.recurrence.why_not(layout)

    def why_wrong(self, layout: Layout) -> str | None:
        """See `_DeviceBench`."""
        return self.layer.why_wrong(self._run(layout))

    def call_of(self, layout: Layout) -> Callable[[], Any]:
        """See `_DeviceBench`."""
        assert isinstance(layout, Config)
        recurrence, config = self.recurrence, layout
        return lambda: recurrence.run(config)

    def sample(self, layout: Layout) -> float:
        """See `Bench`."""
        return super().sample(layout) / self.steps


class SaveBench(_DeviceBench):
    """A training step that keeps W_hh h for its backward, or makes it again, in the layouts that it would get."""

    def __init__(self, work: Work, device: torch.device, steps: int) -> None:
        super().__init__(work, device, steps)
        self._layer = RecurrentBench(work, device, steps)

    def why_not_compiled(self, layout: Layout) -> str | None:
        """It is made of kernels that have their own layouts."""
        return None

    def why_wrong(self, layout: Layout) -> str | None:
        """See `_DeviceBench`."""
        return self._layer.layer.why_wrong(self.call_of(layout)())

    def call_of(self, layout: Layout) -> Callable[[], Any]:
        """See `_DeviceBench`."""
        assert isinstance(layout, SaveConfig)
        save = "recompute" if layout.recompute else "preactivations"
        return lambda: self._layer.training_step(save)

    def sample(self, layout: Layout) -> float:
        """See `Bench`."""
        return super().sample(layout) / self.steps


class MomentsBench(_DeviceBench):
    """The moments kernel, of all steps in one call."""

    def __init__(self, work: Work, device: torch.device, steps: int) -> None:
        super().__init__(work, device, steps)
        rows = steps * work.batch
        generator = torch.Generator(device).manual_seed(0)
        self.before = "before" in work.flags  # a step's rows are those before it: behind the last there are more
        shape = (work.directions, rows + (work.batch if self.before else 0), work.columns)
        self.x = torch.randn(shape, generator=generator, device=device).to(work.dtype)
        self.of_steps = self.x[:, :rows]
        self.centred = (
            torch.empty(self.of_steps.shape, dtype=work.dtype, device=device) if "centre" in work.flags else None
        )
        first = torch.arange(steps + 1, dtype=torch.int64, device=device) * work.batch
        count = torch.full((steps,), work.batch, dtype=torch.int32, device=device)
        self.rows = Rows(first, count, steps, rows, work.batch)

    def call_of(self, layout: Layout) -> Callable[[], Any]:
        """See `_DeviceBench`."""
        assert isinstance(layout, MomentsConfig)
        moments = layout

        def call() -> Tensor:
            with use_config(moments=moments):
                return launch.moments(self.x, self.rows, self.centred, before=self.before)

        return call

    def why_not_compiled(self, layout: Layout) -> str | None:
        """See `_DeviceBench`."""
        try:
            with only_loaded():
                self.call_of(layout)()
        except KernelError as error:
            return str(error)
        return None

    def why_wrong(self, layout: Layout) -> str | None:
        """See `_DeviceBench`."""
        found = self.call_of(layout)()
        steps = self.of_steps.double().unflatten(1, (self.steps, self.work.batch))
        mean = steps.mean(2)
        expected = torch.stack([mean, (steps - mean[:, :, None]).square().mean(2)])
        error = relative_error(found, expected)
        if self.centred is not None:
            centred = (steps - mean[:, :, None]).flatten(1, 2)
            # rounded once to the dtype
            error = max(error, relative_error(self.centred, centred) - torch.finfo(self.work.dtype).eps)
        return None if error <= _MOMENTS_BOUND else f"moments off by {error:.1e} (at most {_MOMENTS_BOUND:.0e})"
