"""Batch-normalised LSTM (Cooijmans et al. 2016) for PyTorch, right for every sequence length.

`BNLSTM` is the layer, `BNLSTMCell` one step of it, `bn_lstm` the pure function under both, `estimate_statistics` sets
population statistics from a pass over a data set, `convert_sync` makes the batches of several ranks one. Importing this
needs neither Triton nor a GPU; `backend_report()` tells what will run.
"""

from ._version import __version__
from .backend import BackendReport, backend_report, use_backend
from .cell import BNLSTMCell
from .distributed import convert_sync
from .estimate import estimate_statistics
from .functional import Result, bn_lstm
from .module import BNLSTM
from .reference import Parameters
from .statistics import Moments, Statistics, update_statistics
from .tuning.mode import use_autotune

__all__ = [
    "BNLSTM",
    "BNLSTMCell",
    "BackendReport",
    "Moments",
    "Parameters",
    "Result",
    "Statistics",
    "__version__",
    "backend_report",
    "bn_lstm",
    "convert_sync",
    "estimate_statistics",
    "update_statistics",
    "use_autotune",
    "use_backend",
]
