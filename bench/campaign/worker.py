"""The process that touches the GPU. Reads items as JSON lines, and answers in JSON lines what it is at and has found.

{"at": [provider, what]}                  a sign of life
{"done": {list of the record: entries}}   the item's findings
{"lost": [provider, why]}                 the device is of no use to this process any more; it ends
{"uncaptured": [provider, why]}           a graph's capture failed, and others would now too; it ends
{"failed": why}                           the item raised something else
"""

# ruff: noqa: E402
from __future__ import annotations

import os

# What kernels, compilers and imports print must not get between the answers.
_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1) if __name__ == "__main__" else None
if _ANSWERS is not None:
    os.dup2(2, 1)

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import records
from ..cases import Case
from ..environment import current_device, device_info, versions
from ..measure import CannotCapture, DeviceLost, compile_all, is_lost, measure, short
from ..problem import Problem, product_precision
from ..providers import PROVIDERS
from ..timing import CaptureFailed, Tell, synchronize

Found = dict[str, Any]
Reasons = dict[str, str]
COUNTERS_LIMIT_S = 90.0


def identity(tell: Tell, **_: Any) -> Found:
    """The device and the versions."""
    return {"device": device_info(), "versions": versions()}


def ceilings(tell: Tell, **_: Any) -> Found:
    """What this device can do at most."""
    from ..ceilings import measure as measured

    tell("ceilings", "measure")
    found = measured(current_device(), toy=current_device().type == "cpu")
    return {"ceilings": {**found.as_json(), "source": records.source()}}


def bench(
    tell: Tell, case: Case, providers: list[str], skip: Reasons, withheld: Reasons, plain: Reasons, **options: Any
) -> Found:
    """All providers in one case. skip: reasons, by provider, why it is not tried again; plain: not captured."""
    chosen = [PROVIDERS[name] for name in providers if name not in skip]
    found = measure(case, current_device(), chosen, withheld=withheld, plain=plain, tell=tell, **options)
    found += [
        records.Result(case.key, name, records.FAILED, why, source=records.source())
        for name, why in skip.items()
        if name in providers
    ]
    return {"results": [result.as_json() for result in found]}


def warm(tell: Tell, case: Case, providers: list[str], **_: Any) -> Found:
    """What is compiled for a case, into the caches."""
    compile_all(case, current_device(), [PROVIDERS[name] for name in providers], tell)
    return {}


def tune(tell: Tell, case: Case, skip: Reasons, seconds: float, rounds: int = 15, most: int = 100, **_: Any) -> Found:
    """The default layouts' neighbours."""
    from ..layouts import tune as tuned

    found = tuned(case, current_device(), skip=skip, tell=tell, seconds=seconds, rounds=rounds, most=most)
    return {"layouts": found}


def stages(tell: Tell, case: Case, skip: Reasons, plain: Reasons, rounds: int = 15, **_: Any) -> Found:
    """Where the time goes."""
    from ..stages import measure as measured

    found = measured(case, current_device(), rounds=rounds, graphed=not plain, skip=skip, tell=tell)
    return {"stages": [{**each, "source": records.source()} for each in found]}


def profile(tell: Tell, case: Case, **_: Any) -> Found:
    """Every kernel of a training step."""
    from ..profiling import measure as measured

    tell("profile", "measure")
    return {"kernels": [{**measured(case, current_device()), "source": records.source()}]}


def counters(tell: Tell, case: Case, **_: Any) -> Found:
    """The two hot kernels under Nsight Compute, where it is installed."""
    from ..profiling import counters as measured

    tell("counters", "measure")
    return {"counters": [{"case": case.key, "counters": measured(case, COUNTERS_LIMIT_S)}]}


def first_call(tell: Tell, case: Case, providers: list[str], **_: Any) -> Found:
    """Seconds of a process's first training step, by the caches that it was started with."""
    (name,) = providers
    on = current_device()
    torch.zeros(1, device=on)
    tell(name, "first call")
    with product_precision(case):
        problem = Problem(case, on)
        synchronize(on)
        started = time.perf_counter()
        model = PROVIDERS[name].build(problem)
        output = model.call(problem.x, True)
        torch.autograd.grad(output, list(model.leaves.values()), problem.pull)
        synchronize(on)
    return {"first_calls": [{"case": case.key, "provider": name, "seconds": time.perf_counter() - started}]}


KINDS: dict[str, Callable[..., Found]] = {
    f.__name__: f for f in (identity, ceilings, bench, warm, tune, stages, profile, counters, first_call)
}


def _end_with(parent: int) -> None:
    """A campaign that is killed must not leave a process that holds the GPU."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Serve items until there are no more."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if os.environ.get("TRITON_INTERPRET") == "1":  # a dry run
        with contextlib.suppress(ModuleNotFoundError):  # there may be no Triton
            from ..interpreter import quicken

            quicken()

    def answer(**message: Any) -> None:
        assert _ANSWERS is not None
        _ANSWERS.write(json.dumps(message) + "\n")

    def tell(provider: str, what: str) -> None:
        answer(at=[provider, what])

    for line in sys.stdin:
        item = json.loads(line)
        kind, fields = item.pop("kind"), item.pop("case")
        if fields:
            item["case"] = Case(**fields)
        try:
            found = KINDS[kind](tell, **item)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            answer(done=found)
            if "out of memory" in json.dumps(found):
                return  # what is left of it in this process would be missing in the next case
        except DeviceLost as error:
            answer(lost=[error.provider, str(error)])
            return
        except (CannotCapture, CaptureFailed) as error:
            answer(uncaptured=[getattr(error, "provider", ""), str(error)])
            return
        except Exception as error:
            why = f"{type(error).__name__}: {short(error)}"
            if is_lost(current_device()):
                answer(lost=["", why])
                return
            answer(failed=why)


if __name__ == "__main__":
    main()
