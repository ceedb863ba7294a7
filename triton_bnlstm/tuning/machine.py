"""The devices that the command line is for, and where its times come from."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ..backend import why_no_kernels
from ..kernels.config import Device, device_of
from . import online, shipped, space
from .device import Identity, minor, triton_version
from .entry import MEASURED, Entry
from .screens import NO_DEVICE, USAGE, Failure, in_order, program
from .tuner import Bench
from .work import Work

# Published numbers that an identity lacks: KB of shared memory and most threads of a multiprocessor.
_MULTIPROCESSORS = {
    "sm75": (64, 1024),
    "sm80": (164, 2048),
    "sm86": (100, 1536),
    "sm89": (100, 1536),
    "sm90": (228, 2048),
    "sm100": (228, 2048),
    "sm120": (100, 1536),
    "gfx90a": (64, 2048),
    "gfx942": (64, 2048),
}

ARCHITECTURES = tuple(_MULTIPROCESSORS)
# What every device computes in that computes at all.
FLOAT = torch.float32


class Here(NamedTuple):
    """A device of this machine: as torch has it, its numbers, and its name."""

    device: torch.device
    numbers: Device
    name: str

    @property
    def identity(self) -> Identity:
        """Under which its layouts are kept."""
        return Identity.of(self.numbers)


def find(name: str | None = None) -> Here:
    """A device of this machine: "cuda:1", or None for the current one.

    Raises:
        Failure: there is none, or none of that name.
    """
    try:
        device = torch.device(name or "cuda")
    except RuntimeError:
        raise Failure(f"--device: {name!r} is no device; write cuda:0", USAGE) from None
    if device.type != "cuda":
        raise Failure(f"--device: kernels are measured on a GPU, not on {device.type}; write cuda:0", USAGE)
    if not torch.cuda.is_available():
        raise Failure(f"there is no GPU of use here: {why_none()}; `{program()} doctor` tells more", NO_DEVICE)
    index = torch.cuda.current_device() if device.index is None else device.index
    there = torch.cuda.device_count()
    if index >= there:
        raise Failure(f"--device: there is no cuda:{index}, torch sees {there}", USAGE)
    device = torch.device("cuda", index)
    try:
        numbers = device_of(device)
    except Exception as error:  # a Triton that is broken, or does not fit the driver, may raise anything
        raise Failure(f"Triton tells nothing of {device} ({type(error).__name__}: {error})", NO_DEVICE) from error
    return Here(device, numbers, torch.cuda.get_device_name(device))


def why_none() -> str:
    """Why torch sees no accelerator here, and what to do about it."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch, {torch.__version__}, is built for CPUs only: install a build for CUDA or ROCm"
    names = ["CUDA_VISIBLE_DEVICES", *(["HIP_VISIBLE_DEVICES"] if torch.version.hip is not None else [])]
    for name in names:
        if os.environ.get(name, "0").strip() in ("", "-1"):
            return f"{name}={os.environ[name]} hides all GPUs: unset it"
    return (
        f"torch {torch.__version__} sees none: is there one, with a driver that is new enough? If not, run this on the "
        "machine with the GPU"
    )


def numbers_named(architecture: str) -> Device:
    """The numbers of the board that layouts are shipped for.

    Raises:
        Failure: there is none of this architecture.
    """
    boards = {identity.architecture: identity for identity in shipped.boards()}
    identity = boards.get(architecture.lower())
    numbers = None if identity is None else numbers_of(identity)
    if numbers is None:
        raise Failure(f"--architecture: {architecture!r} is none of {', '.join(sorted(boards, key=in_order))}", USAGE)
    return numbers


def find_all() -> list[Here]:
    """Every device of this machine.

    Raises:
        Failure: torch sees one, and Triton does not.
    """
    if not torch.cuda.is_available():
        return []
    return [find(f"cuda:{index}") for index in range(torch.cuda.device_count())]


def find_any() -> Here | None:
    """The current device; None where there is none of use."""
    try:
        return find()
    except Failure:
        return None


def why_not_measured(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why nothing that is timed on this device would count; None if it does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and the interpreter's times say nothing about a device: unset it"
    return why_no_kernels(device, dtype)


def make_bench(work: Work, device: torch.device) -> Bench:
    """Where layouts are tried."""
    return online.device_bench(work, device)


def is_settled(work: Work, numbers: Device, known: Entry | None) -> bool:
    """Whether tuning would find nothing new to try, as far as the search's first steps tell."""
    if known is None or known.how != MEASURED or minor(known.by.triton) != minor(triton_version()):
        return False
    tried = {each.layout for each in known.candidates}
    looked_at = (*space.structures(numbers, work), *space.neighbours(known.layout))
    return known.default == space.analytic(numbers, work) and tried.issuperset(looked_at)


def numbers_here(identity: Identity) -> Device | None:
    """The numbers of a device of this machine; None: it is none of them."""
    try:
        return next((here.numbers for here in find_all() if here.identity == identity), None)
    except Failure:
        return None


def numbers_of(identity: Identity) -> Device | None:
    """The numbers of a device that need not be here; None where nobody has written them down."""
    known = _MULTIPROCESSORS.get(identity.architecture)
    if known is None or identity.backend != ("cuda" if identity.architecture.startswith("sm") else "hip"):
        return None
    shared, threads = known
    if identity.backend == "hip":
        registers, capability, warp, name = 4 * 512 * 64, 0, 64, identity.architecture
    else:
        registers, capability, warp, name = 65536, int(identity.architecture.removeprefix("sm")), 32, ""
    return Device(
        identity.backend,
        capability,
        identity.multiprocessors,
        identity.shared,
        shared * 1024,
        registers,
        threads,
        warp,
        name,
    )
