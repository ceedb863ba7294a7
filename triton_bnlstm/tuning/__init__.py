"""Layouts of the kernels, tuned once for each card and kept in a cache.

A kernel's layout is, in this order: the explicit one (`use_config`), what this process already knows, the user's cache,
a layout that is shipped for the device, and the analytic choice from the device's numbers. Nothing is measured unless
it is asked for: by `python -m triton_bnlstm.tuning tune`, or by `autotune="on_miss"` or `"force"` (argument,
`use_autotune`, TRITON_BNLSTM_AUTOTUNE).

Files: `work` says what is tuned and under which key, `device` for which device; `choice` looks up, `store` keeps the
user's cache, `shipped` reads what comes with the package, `entry` is one line of either; `space` has the candidates,
`tuner` the search, `measure` and `sample` the measuring on a device; `online` tunes before a call, `ranks` lets rank 0
decide for all; `commands` is the command line.
"""

from ..kernels.config import BackwardConfig, Config, MomentsConfig, use_config
from .choice import Choice, analytic_only, choose, forget
from .mode import use_autotune
from .work import Work

__all__ = [
    "BackwardConfig",
    "Choice",
    "Config",
    "MomentsConfig",
    "Work",
    "analytic_only",
    "choose",
    "forget",
    "use_autotune",
    "use_config",
]
