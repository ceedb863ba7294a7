"""Instructions of a kernel in whatever language, where control goes from each, and the loops that this makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import networkx


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with all that belongs to it, "LDG.E.128" or "ld.global.v4.b32".
        text: the whole of it.
        targets: labels that it may jump to.
        goes_on: control may pass to the next one.
    """

    opcode: str
    text: str
    targets: tuple[str, ...] = ()
    goes_on: bool = True


@dataclass(frozen=True)
class Code:
    """A kernel: its instructions, and before which of them each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def successors(self, index: int) -> Iterator[int]:
        """Instructions that may come next.

        Raises:
            ValueError: a jump to a label that is not there.
        """
        instruction = self.instructions[index]
        for target in instruction.targets:
            if target not in self.labels:
                raise ValueError(f"no label {target!r}, of {instruction.text!r}")
            yield from [self.labels[target]] if self.labels[target] < len(self.instructions) else []
        if instruction.goes_on and index + 1 < len(self.instructions):
            yield index + 1

    def edges(self) -> Iterable[tuple[int, int]]:
        """All ways from one instruction to the next."""
        return ((index, after) for index in range(len(self.instructions)) for after in self.successors(index))

    def outermost_loops(self) -> list[list[int]]:
        """Instructions of each loop that is in no other one, the largest loop first; indices in their order.

        A loop is all that control can come back to from each other, so it does not matter where its blocks stand, at
        which end it is tested, or how often it is entered. Code that the first instruction does not lead to is none,
        nor is a jump to itself, which pads the end of a kernel.
        """
        graph = networkx.DiGraph()
        graph.add_edges_from(self.edges())
        if 0 not in graph:
            return []
        reached = graph.subgraph({0} | networkx.descendants(graph, 0))
        parts = networkx.strongly_connected_components(reached)
        loops = [sorted(part) for part in parts if len(part) > 1]
        return sorted(loops, key=lambda loop: (-len(loop), loop))
