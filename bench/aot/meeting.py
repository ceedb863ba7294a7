"""The grid barrier as a kernel's PTX has it: what is in it, and whether it still orders what it is there to order.

Triton and LLVM may move, merge or drop what a kernel's source says, and nothing would fail until a GPU reads a state
that has not been written yet. So it is looked up on every way that control can take:

- the atomics that count programs in are releases, and the loads that poll are acquires, of the whole GPU;
- between a store to global memory and the release behind it all threads of the block meet: it is one thread's;
- between a poll, which is one thread's too, and the next load of global memory all threads of the block meet;
- from a release to the next poll nothing is loaded past L1, as what other programs write is;
- there are as many polls as releases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .flow import Code, Instruction

_LABEL = re.compile(r"^([$\w]+):(?!:)\s*")
_STATEMENT = re.compile(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Ptx:
    """A kernel in PTX: its code, and of each instruction the scope that it stands in, 0 for the body."""

    code: Code
    scopes: list[int]


@dataclass
class Shape:
    """What a kernel's barriers are made of.

    Attributes:
        releases: atomics that count a program in.
        polls: texts that wait for the others. acquires: loads in them.
        before, behind: block barriers right before the releases and right behind the polls, in all.
        faults: what is wrong; nothing if it is as it should be.
    """

    releases: int
    polls: int
    acquires: int
    before: int
    behind: int
    faults: list[str] = field(default_factory=list)


def ptx(text: str) -> Ptx:
    """The body of the one kernel in it. Labels are known in the braces that they stand in.

    Raises:
        ValueError: a jump to where a register says, or to a label that is not there.
    """
    lines = iter(re.sub(r"//.*", "", text[max(text.find(".entry"), 0) :]).splitlines())
    for line in lines:
        if line.strip() == "{":
            break
    found: list[tuple[str, tuple[int, ...]]] = []
    labels: dict[tuple[str, int], int] = {}
    stack, opened, statement = [0], 0, ""
    for line in lines:
        rest = line.strip()
        while rest and stack:
            if statement:  # goes on over several lines
                head, ends, rest = rest.partition(";")
                statement += " " + head
                if ends:
                    found.append((statement, tuple(stack)))
                    statement = ""
            elif rest[0] == "{":
                opened += 1
                stack.append(opened)
                rest = rest[1:]
            elif rest[0] == "}":
                stack.pop()
                rest = rest[1:]
            elif label := _LABEL.match(rest):
                labels[label[1], stack[-1]] = len(found)
                rest = rest[label.end() :]
            elif rest[0] in ".;":  # a declaration
                rest = rest.partition(";")[2]
            else:
                head, ends, rest = rest.partition(";")
                if ends:
                    found.append((head, tuple(stack)))
                else:
                    statement = head
            rest = rest.strip()
    instructions = [_instruction(words, scopes, labels) for words, scopes in found]
    return Ptx(Code(instructions, {f"{n}@{s}": i for (n, s), i in labels.items()}), [scopes[-1] for _, scopes in found])


def _instruction(words: str, scopes: tuple[int, ...], labels: dict[tuple[str, int], int]) -> Instruction:
    statement = _STATEMENT.fullmatch(words.strip())
    if statement is None:
        raise ValueError(f"not PTX: {words!r}")
    predicate, opcode, operands = statement.groups()
    text = " ".join(words.split())
    word = opcode.partition(".")[0]
    if word == "brx":
        raise ValueError(f"a jump to where a register says: {text!r}")
    if word == "bra":
        target = operands.strip()
        scope = next((s for s in reversed(scopes) if (target, s) in labels), scopes[-1])
        return Instruction(opcode, text, (f"{target}@{scope}",), goes_on=predicate is not None)
    return Instruction(opcode, text, goes_on=predicate is not None or word not in ("ret", "exit", "trap"))


def _is_block_barrier(instruction: Instruction) -> bool:
    """Of all threads of the block; those with another number than 0 may be a part's."""
    words = instruction.text.replace(",", " ").split()
    return bool(re.match(r"bar(rier)?(\.cta)?\.(sync|red)", instruction.opcode)) and words[-1] == "0"


def _accesses(instruction: Instruction, *words: str) -> bool:
    """Whether it is one of these operations on global memory, or on memory that is not named."""
    parts = instruction.opcode.split(".")
    if parts[0] not in words:
        return False
    return "global" in parts or not any(p.partition("::")[0] in ("shared", "local", "param", "const") for p in parts)


def _is_load(instruction: Instruction) -> bool:
    copies = instruction.opcode.startswith("cp.async") and ".global" in instruction.opcode
    return copies or _accesses(instruction, "ld", "ldu")


def _whole_gpu(instruction: Instruction, *orders: str) -> bool:
    parts = instruction.opcode.split(".")
    return any(order in parts for order in orders) and ("gpu" in parts or "sys" in parts)


def _polls(kernel: Ptx) -> dict[int, list[int]]:
    """Texts in braces that load from global memory and jump back, as instructions of each."""
    scopes: dict[int, list[int]] = {}
    for index, scope in enumerate(kernel.scopes):
        if scope:
            scopes.setdefault(scope, []).append(index)
    code = kernel.code

    def polls(part: list[int]) -> bool:
        back = any(after <= index for index in part for after in code.successors(index))
        return back and any(_accesses(code.instructions[index], "ld") for index in part)

    return {scope: part for scope, part in scopes.items() if polls(part)}


# What may have happened on the way to an instruction.
_STORED = 1  # to global memory, and the block has not met since
_POLLED = 2  # the block has not met since
_ARRIVED = 4  # and not polled since


def _reaching(code: Code, releases: set[int], polling: set[int]) -> list[int]:
    """Of each instruction what may have happened on some way to it."""
    reaching = [0] * len(code.instructions)
    waiting = set(range(len(code.instructions)))
    after = [tuple(code.successors(index)) for index in range(len(code.instructions))]
    while waiting:
        index = waiting.pop()
        instruction, now = code.instructions[index], reaching[index]
        if index in polling:
            now = (now | _POLLED) & ~_ARRIVED
        elif index in releases:
            now |= _ARRIVED
        elif _is_block_barrier(instruction):
            now &= ~(_STORED | _POLLED)
        elif _accesses(instruction, "st", "red", "atom"):
            now |= _STORED
        for target in after[index]:
            if reaching[target] | now != reaching[target]:
                reaching[target] |= now
                waiting.add(target)
    return reaching


def _before(code: Code, index: int) -> int:
    """Block barriers right before an instruction, with no memory access or place to jump to between."""
    entered = {after for i in range(len(code.instructions)) for after in code.successors(i) if after != i + 1}
    found = 0
    while index and index not in entered:
        index -= 1
        if code.instructions[index].targets or _touches_memory(code.instructions[index]):
            break
        found += _is_block_barrier(code.instructions[index])
    return found


def _behind(code: Code, index: int, seen: frozenset[int] = frozenset()) -> int:
    """Block barriers right behind an instruction, on the way with the most of them."""
    ways = [
        _is_block_barrier(code.instructions[after]) + _behind(code, after, seen | {after})
        for after in code.successors(index)
        if after not in seen and not _touches_memory(code.instructions[after])
    ]
    return max(ways, default=0)


def _touches_memory(instruction: Instruction) -> bool:
    word = instruction.opcode.partition(".")[0]
    return word in ("ld", "ldu", "st", "red", "atom", "cp", "ldmatrix", "stmatrix", "call", "prefetch")


def shape(kernel: Ptx) -> Shape:
    """What its barriers are made of; all zeros where it has none."""
    code, polls = kernel.code, _polls(kernel)
    polling = {index for part in polls.values() for index in part}
    arrivals = {
        index
        for index, instruction in enumerate(code.instructions)
        if index not in polling and _accesses(instruction, "red", "atom")
    }
    releases = {index for index in arrivals if _whole_gpu(code.instructions[index], "release", "acq_rel")}
    loads = {index for index in polling if _accesses(code.instructions[index], "ld")}
    acquires = {index for index in loads if _whole_gpu(code.instructions[index], "acquire")}
    return Shape(
        len(releases),
        len(polls),
        len(acquires),
        sum(_before(code, index) for index in releases),
        sum(_behind(code, max(part)) for part in polls.values()),
        _first_of_each(_faults(code, arrivals, releases, polling, loads - acquires, len(polls))),
    )


def _first_of_each(faults: Iterator[tuple[str, str]]) -> list[str]:
    """Each fault with the first instruction that has it, and how many more do."""
    found: dict[str, list[str]] = {}
    for fault, where in faults:
        found.setdefault(fault, []).append(where)
    more = {fault: f" and {len(where) - 1} more" if len(where) > 1 else "" for fault, where in found.items()}
    return [f"{fault}: {where[0]}{more[fault]}" for fault, where in found.items()]


def _faults(
    code: Code, arrivals: set[int], releases: set[int], polling: set[int], not_acquiring: set[int], polls: int
) -> Iterator[tuple[str, str]]:
    """What is wrong, and the instruction."""
    for index in sorted(arrivals - releases):
        yield "an atomic that releases nothing to the GPU", code.instructions[index].text
    for index in sorted(not_acquiring):
        yield "a poll that acquires nothing from the GPU", code.instructions[index].text
    if len(releases) != polls:
        yield "not as many polls as releases", f"{len(releases)} releases, {polls} polls"
    for index, now in enumerate(_reaching(code, releases, polling)):
        instruction = code.instructions[index]
        if index in releases and now & _STORED:
            yield "no block barrier between a store and the release", instruction.text
        if index not in polling and _is_load(instruction):
            if now & _POLLED:
                yield "no block barrier between a poll and a load", instruction.text
            if now & _ARRIVED and re.match(r"ld\b.*\.(cg|cv|relaxed|volatile)\b", instruction.opcode):
                yield "loaded past L1 before the poll", instruction.text


def problems(found: Shape, *, meets: bool) -> list[str]:
    """What is wrong with the barriers of a kernel that meets others, or that does not."""
    if not meets:
        return [] if found.releases == found.polls == 0 else ["a barrier where nobody is met"]
    nothing = [] if found.releases or found.polls else ["no release and no poll"]
    return [f"barrier: {fault}" for fault in nothing + found.faults]
