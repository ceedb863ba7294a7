"""Memory that is still there: bytes of all tensors made within, however they are held."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts storages of tensors that operations give within it, until nobody holds them: Python, or a graph in C++.

    A storage's Python object lives as long as the storage itself.

    Args:
        before: tensors that were there already.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.bytes = self.made = 0
        self._before = [tensor.untyped_storage() for tensor in before]
        self._known = {storage._cdata for storage in self._before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self.bytes += size
            self.made += size
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.bytes -= size
