"""Triton's interpreter without what it does again and again for nothing: the same numbers in a third of the time.

It works on Triton 3.3 to 3.9, whose interpreters differ in arguments that nothing here looks at.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

core = tl.core
# What has been replaced: where, under which name, and what was there.
REPLACED: list[tuple[Any, str, Any]] = []


@cache
def quicken() -> None:
    """For the rest of the process, whatever runs in the interpreter; kernels that are compiled do not notice."""
    _patch_language_once()
    _leave_out_overflow_checks()
    _keep_types()
    _leave_equal_shapes()
    _give_room()


def _replace(owner: Any, name: str, value: Any) -> None:
    REPLACED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _patch_language_once() -> None:
    """Let a launch patch triton.language once, not again at every call of a device function.

    The interpreter does that, with the same result each time, which takes 40 % of its time for these kernels.
    """
    patch = interpreter._patch_lang
    patched: set[frozenset[str]] = set()  # in this launch, by the names under which a function's module knows it
    named: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()

    def once(function: Any) -> Any:
        modules = named.get(function)
        if modules is None:
            modules = frozenset(m.__name__ for m in function.__globals__.values() if m in (tl, core))
            named[function] = modules
        if modules in patched:
            return _NoScope
        scope = patch(function)
        if not patched and scope is not None:  # a kernel's; before Triton 3.6 patches stay for good
            restore = scope.restore

            def leave() -> None:
                patched.clear()
                restore()

            scope.restore = leave
        patched.add(modules)
        return scope

    _replace(interpreter, "_patch_lang", once)


class _NoScope:
    @staticmethod
    def restore() -> None:
        pass


def _leave_out_overflow_checks() -> None:
    """Sums and products of integers are made again in 64 bits and compared, for an assertion that is off."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        _replace(builder, "options", replace(builder.options, sanitize_overflow=False))


def _keep_types() -> None:
    """What types of blocks and their tensors consist of is found once for each type; it never changes."""
    real_type, real_tensor, real_numpy = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    constexpr = core.constexpr
    types: dict[Any, dict[str, Any]] = {}
    numpy: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([s.value if isinstance(s, constexpr) else s for s in shape])
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        found = types.get(key)
        if found is None:
            real_type(self, element_ty, shape)  # raises where there is no such type
            types[key] = vars(self)
        else:
            self.__dict__ = found

    def tensor(self: Any, handle: Any, type: Any) -> None:
        common = type.__dict__.get("_of_its_tensors")
        if common is None:
            real_tensor(self, handle, type)
            type._of_its_tensors = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            self.__dict__.update(common)
            self.handle = handle

    def numpy_type(type: Any) -> Any:
        element = type.scalar
        found = numpy.get(element.name)
        if found is None:
            found = numpy[element.name] = real_numpy(element)
        return found

    _replace(core.block_type, "__init__", block_type)
    _replace(core.tensor, "__init__", tensor)
    _replace(interpreter, "_get_np_dtype", numpy_type)


def _leave_equal_shapes() -> None:
    """Operands of the same shape are what broadcasting would give, after it has looked at each of their sizes."""
    semantic = getattr(interpreter, "interpreter_semantic", None)
    if semantic is None:  # before Triton 3.4
        return
    broadcast = semantic.broadcast_impl_value

    def broadcast_unless_equal(left: Any, right: Any) -> Any:
        one, other = left.type, right.type
        if one.is_block():
            if other.is_block() and one.shape.values == other.shape.values:
                return left, right
        elif not other.is_block():
            return left, right
        return broadcast(left, right)

    _replace(semantic, "broadcast_impl_value", broadcast_unless_equal)


def _roomy(call: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return call(*arguments, **options)


# A frame of more than half of 2¹⁹ bytes: Python gets a piece of memory for it in which there is room for what it calls.
_roomy.__code__ = _roomy.__code__.replace(co_stacksize=(1 << 15) + 1)


def _give_room() -> None:
    """Python's frames lie in pieces of 16 KiB, which it gets from the system and gives back at once, piece by piece.

    Where one ends in the middle of a kernel every further call is a call of the system, up to a third of all the time.
    """
    run = getattr(interpreter.InterpretedFunction, "run", None)  # before Triton 3.6 there is none
    if run is not None:
        _replace(interpreter.InterpretedFunction, "run", lambda *given, **options: _roomy(run, given, options))
