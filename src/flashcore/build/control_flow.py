"""The loops of a binary, from the disassembler's text: basic blocks, the edges between them, natural loops.

A loop is what leads back to a label that it started from (Aho, Lam, Sethi, Ullman, Compilers, 2nd edition, 9.6). A branch to an
earlier line is not enough: ptxas puts the spinning part of every wait behind the code, from where it jumps back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from flashcore.errors import CompileError

# "        /*0a10*/  @!P0 HGMMA.64x64x16.F32 R24, ... ;": predicate, opcode, modifiers, operands
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(\S*)(.*)$")
_LABEL = re.compile(r"^\s*(\.[\w.$]+):")
# where the disassembler names a place in the code: an operand, or in a comment all that an indirect branch may go to
_PLACES = re.compile(r"`\((\.L\w+)\)|BRANCH_TARGETS ([\w.,]+)")
_NEVER_GOES_ON = ("BRX", "JMP", "JMX", "EXIT", "RET", "BSYNC")


@dataclass(slots=True)
class _Block:
    opcodes: list[str] = field(default_factory=list)
    predicated: list[bool] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    goes_on: bool = True


def opcodes_of(text: str) -> Counter[str]:
    """How often each instruction is in the code, whatever its predicate and modifiers."""
    return Counter(found[2] for line in text.splitlines() if (found := _INSTRUCTION.match(line)))


def opcodes_of_innermost_loops(text: str, holding: Collection[str]) -> Counter[str]:
    """How often each instruction is in a loop that holds one of `holding` and has no smaller such loop in it.

    Raises:
        CompileError: the text has a branch to nowhere, so that a loop might pass unseen.
    """
    blocks, edges = _graph(text)
    loops = [loop for loop in _loops(edges) if any(opcode in holding for block in loop for opcode in blocks[block].opcodes)]
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    return Counter(opcode for block in set[int]().union(*innermost) for opcode in blocks[block].opcodes)


def opcodes_before(text: str, wait: str) -> Counter[str]:
    """How often each instruction is on some way through the code that has not met `wait`, one with a predicate not counted.

    Raises:
        CompileError: the text has a branch to nowhere, so that a way might pass unseen.
    """
    blocks, edges = _graph(text)
    found: Counter[str] = Counter()
    reached = {0}
    waiting = [0]
    while waiting:
        number = waiting.pop()
        block = blocks[number]
        for opcode, predicated in zip(block.opcodes, block.predicated, strict=True):
            if opcode == wait and not predicated:
                break
            found[opcode] += 1
        else:
            following = set(edges[number]) - reached
            reached |= following
            waiting += following
    return found


def atomics_that_part_lanes(text: str) -> int:
    """How many atomics return a number to some lanes alone, which then do not meet the others again at once.

    ptxas branches around such an atomic, and may leave the lanes apart until some later place. On the way there a uniform
    register would be computed once for each group of lanes, and what a loop counts in it goes wrong (docs/notes/backward.md).

    Raises:
        CompileError: the text has a branch to nowhere, so that an atomic might pass unseen.
    """
    blocks, edges = _graph(text)
    found = 0
    for before, ways in enumerate(edges):
        # a branch around the block that follows, from which the code goes on where the branch leads to
        number = before + 1
        if len(ways) == 2 and ways[1] == number and edges[number] == [ways[0]]:
            some_lanes = not {"ATOM", "ATOMG"}.isdisjoint(blocks[number].opcodes)
            found += some_lanes and blocks[ways[0]].opcodes[:1] != ["BSYNC"]
    return found


def _graph(text: str) -> tuple[list[_Block], list[list[int]]]:
    """The code's blocks, and the blocks that each may be followed by."""
    blocks = [_Block()]
    labels: dict[str, int] = {}
    joins: dict[str, str] = {}  # the place where the threads of a barrier meet, by the barrier
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].opcodes:
                blocks.append(_Block())
            labels[label[1]] = len(blocks) - 1
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        predicate, opcode, _, operands = found.groups()
        block = blocks[-1]
        block.opcodes.append(opcode)
        block.predicated.append(bool(predicate))
        places = [name for one, many in _PLACES.findall(operands) for name in (one or many).split(",")]
        barrier = operands.split(",")[0].strip(" ;")
        if opcode == "BSSY":
            joins[barrier] = places[0]
            continue
        if opcode == "BSYNC" and barrier in joins:
            places = [joins[barrier]]
        if opcode in ("BRX", "BSYNC") and not places:
            raise CompileError(f"cannot follow the code: {line.strip()} goes nowhere")
        always = opcode in _NEVER_GOES_ON or (opcode == "BRA" and operands.lstrip().startswith("`"))
        if places or always:
            block.targets, block.goes_on = places, bool(predicate) or not always
            blocks.append(_Block())
    edges: list[list[int]] = []
    for number, block in enumerate(blocks):
        unknown = [name for name in block.targets if name not in labels]
        if unknown:
            raise CompileError(f"cannot follow the code: it has no {unknown[0]}")
        on = [number + 1] if block.goes_on and number + 1 < len(blocks) else []
        edges.append([*(labels[name] for name in block.targets), *on])
    return blocks, edges


def _loops(edges: list[list[int]]) -> list[set[int]]:
    """The blocks of each loop, loops with the same first block as one. The code is entered at block 0."""
    before: dict[int, set[int]] = {0: set()}  # of the blocks that can be reached
    ends: dict[int, set[int]] = {}  # a loop's last blocks, by its first
    on_the_way = {0}
    way = [(0, iter(edges[0]))]
    while way:
        block, following = way[-1]
        after = next(following, None)
        if after is None:
            on_the_way.discard(block)
            way.pop()
            continue
        if after in on_the_way:
            ends.setdefault(after, set()).add(block)
        if after not in before:
            before[after] = set()
            on_the_way.add(after)
            way.append((after, iter(edges[after])))
        before[after].add(block)
    loops = []
    for first, last in ends.items():
        loop, waiting = {first}, [*last]
        while waiting:
            block = waiting.pop()
            if block not in loop:
                loop.add(block)
                waiting += before[block]
        loops.append(loop)
    return loops
