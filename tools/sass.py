"""Machine code of NVIDIA GPUs as ``cuobjdump -sass`` prints it: instructions, basic blocks, loops, and paths.

A loop is a natural one: a branch back to a block without which nothing reaches it, and what lies on the way. Where code
divides, a loop's or a function's *path* takes the alternative that loads most bytes from global memory, then the one
with most multiply-adds, then the shortest: full tiles and wide loads, in place of ragged ends. Subroutines, such as the
slow cases of a division, are left out.

The last 23 bits of an instruction schedule it: which of six barriers it waits for, and which one it gives back when its
result is there. By them the loads that are in flight are counted, as the hardware does it: source, arXiv:1804.06826.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_HEADING = re.compile(r"arch = (\w+)|\s+Function : (\S+)")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;/]*)")
_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "JMP", "KILL")
TENSOR = ("HMMA", "DMMA")


@dataclass(eq=False)
class Instruction:
    address: int
    guard: str  # @P0, @!UP1 or nothing
    opcode: str  # LDG.E.128
    operands: str
    word: int = 0  # the upper 64 bits

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes. A call under a condition is one: sm_80 leaves loops by it."""
        jumps = self.name == "BRA" or (self.name == "CALL" and self.guard)
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if jumps else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        if self.name == "BRA":
            return bool(self.guard) or not self.operands.strip().startswith("0x")  # BRA P1, ..; BRA.DIV UR4, ..
        return self.name not in _ENDS or bool(self.guard)

    @property
    def width(self) -> int:
        """Bytes that a thread loads or stores, of a memory instruction."""
        parts = self.opcode.split(".")
        for part in parts[1:]:
            if part in ("64", "128", "256"):
                return int(part) // 8
            if part in ("U8", "S8"):
                return 1
            if part in ("U16", "S16"):
                return 2
        return 4

    @property
    def global_bytes(self) -> int:
        """Bytes that a thread loads from global memory, into registers or past them into shared memory."""
        return self.width if self.name in ("LDG", "LDGSTS", "LD") else 0

    @property
    def multiply_adds(self) -> int:
        """Of one thread; those of a tensor core are dealt to the 32 of a warp."""
        if self.name == "FFMA2":
            return 2
        if self.name in ("FFMA", "DFMA"):
            return 1
        if self.name in TENSOR:
            shape = re.search(r"\.(16|8)x?(8)x?(\d+)", self.opcode)  # HMMA.16816.F32.BF16, DMMA.16x8x8
            m, n, k = map(int, shape.groups()) if shape else (0, 0, 0)
            return m * n * k // 32
        return 0

    @property
    def waits_for(self) -> int:
        """The barriers, a bit each, that must be clear before this instruction starts."""
        return self.word >> 52 & 0x3F

    @property
    def sets(self) -> int:
        """The barrier that is clear when the result has come; 7: none."""
        return self.word >> 46 & 7


@dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)  # indices of blocks


@dataclass(eq=False)
class Loop:
    header: int
    latches: set[int]
    body: set[int]  # blocks, with those of loops inside
    inside: list[Loop] = field(default_factory=list)  # directly


# What lies on a path: an instruction, or a loop whose own path is asked for separately
Step = Instruction | Loop
Weight = tuple[int, int, int]  # bytes loaded, multiply-adds, instructions that are saved


@dataclass
class Function:
    name: str  # mangled
    architecture: str
    instructions: list[Instruction]
    _paths: dict[int, list[Step]] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[Block]:
        starts = {self.instructions[0].address}
        for instruction, after in zip(self.instructions, [*self.instructions[1:], None], strict=True):
            if instruction.target is not None:
                starts.add(instruction.target)
            if after and (instruction.target is not None or instruction.name in _ENDS):
                starts.add(after.address)
        blocks: list[Block] = []
        for instruction in self.instructions:
            if instruction.address in starts:
                blocks.append(Block([]))
            blocks[-1].instructions.append(instruction)
        index = {block.instructions[0].address: i for i, block in enumerate(blocks)}
        for i, block in enumerate(blocks):
            last = block.instructions[-1]
            if last.target in index:
                block.successors.append(index[last.target])
            if last.falls_through and i + 1 < len(blocks) and i + 1 not in block.successors:
                block.successors.append(i + 1)
        return blocks

    @cached_property
    def order(self) -> list[int]:
        """The blocks that the entry reaches, each before its successors unless a loop leads back."""
        seen, order, stack = {0}, [], [(0, iter(self.blocks[0].successors))]
        while stack:
            block, successors = stack[-1]
            for successor in successors:
                if successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    @cached_property
    def loops(self) -> list[Loop]:
        """All of them, those inside others first."""
        place = {block: i for i, block in enumerate(self.order)}
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for successor in self.blocks[block].successors:
                before[successor].append(block)
        # Immediate dominators: Cooper, Harvey, Kennedy, "A simple, fast dominance algorithm".
        dominator = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [b for b in before[block] if b in dominator]
                new = known[0]
                for other in known[1:]:
                    while new != other:
                        if place[new] > place[other]:
                            new = dominator[new]
                        else:
                            other = dominator[other]
                if dominator.get(block) != new:
                    dominator[block] = new
                    changed = True
        loops: dict[int, Loop] = {}
        for block in self.order:
            for header in self.blocks[block].successors:
                up = block
                while up != header and up:
                    up = dominator[up]
                if up == header and place[header] <= place[block]:
                    loop = loops.setdefault(header, Loop(header, set(), {header}))
                    loop.latches.add(block)
                    stack = [block]
                    while stack:
                        b = stack.pop()
                        if b not in loop.body:
                            loop.body.add(b)
                            stack += before[b]
        found = sorted(loops.values(), key=lambda loop: len(loop.body))
        for i, loop in enumerate(found):
            outer = next((o for o in found[i + 1 :] if loop.header in o.body), None)
            if outer:
                outer.inside.append(loop)
        return found

    def path(self, scope: Loop | None = None) -> list[Step]:
        """The way through one turn of a loop, or through the function; see the head of this file."""
        key = scope.header if scope else -1
        if key not in self._paths:
            self._paths[key] = self._path(scope)
        return self._paths[key]

    def _path(self, scope: Loop | None) -> list[Step]:
        body = scope.body if scope else set(self.order)
        inside = scope.inside if scope else [loop for loop in self.loops if not self.outer(loop)]
        owner = {block: loop for loop in inside for block in loop.body}
        ends = scope.latches if scope else {b for b in self.order if self.blocks[b].instructions[-1].name == "EXIT"}

        def entry(block: int) -> int:
            return owner[block].header if block in owner else block

        best: dict[int, tuple[Weight, list[Step]]] = {}
        for block in reversed(self.order):  # successors first
            if block not in body or entry(block) != block:
                continue
            loop = owner.get(block)
            members = loop.body if loop else {block}
            choices = []
            if members & ends:
                choices.append(self._choice([loop] if loop else self.blocks[block].instructions, (0, 0, 0), []))
            for after in {s for b in members for s in self.blocks[b].successors} & body - members:
                if not (scope and after == scope.header) and entry(after) in best:
                    steps = [loop] if loop else self._taken(block, after)
                    choices.append(self._choice(steps, *best[entry(after)]))
            if choices:  # else it leads out of the loop
                best[block] = max(choices, key=lambda choice: choice[0])
        return best[scope.header if scope else 0][1]

    def _choice(self, steps: Sequence[Step], weight: Weight, after: list[Step]) -> tuple[Weight, list[Step]]:
        own = self._weight(steps)
        return (own[0] + weight[0], own[1] + weight[1], own[2] + weight[2]), [*steps, *after]

    def _taken(self, block: int, after: int) -> list[Instruction]:
        """What is done of a block that is left for another: nothing under the opposite of the branch's condition."""
        instructions = self.blocks[block].instructions
        last = instructions[-1]
        if last.name != "BRA" or not last.guard:
            return instructions
        jumps = self.blocks[after].instructions[0].address == last.target
        condition = last.guard.lstrip("@!")
        opposite = f"@{condition}" if jumps == last.guard.startswith("@!") else f"@!{condition}"
        done = []
        for i, instruction in enumerate(instructions):
            later = instructions[i + 1 :]
            if instruction.guard == opposite and not any(condition in x.operands for x in later if "SETP" in x.opcode):
                continue
            done.append(instruction)
        return done

    def outer(self, loop: Loop) -> Loop | None:
        return next((o for o in self.loops if loop in o.inside), None)

    def _weight(self, steps: Sequence[Step]) -> Weight:
        total = (0, 0, 0)
        for step in steps:
            if isinstance(step, Loop):
                more = self._weight(self.path(step))
            else:
                more = (step.global_bytes, step.multiply_adds, -1)
            total = (total[0] + more[0], total[1] + more[1], total[2] + more[2])
        return total


def read(text: Iterable[str]) -> Iterator[Function]:
    """The functions that ``cuobjdump -sass`` printed, line by line."""
    name, architecture = "", ""
    found: list[Instruction] = []
    for line in text:
        if heading := _HEADING.match(line):
            if found:
                yield Function(name, architecture, found)
                found = []
            architecture, name = heading[1] or architecture, heading[2] or name
        elif match := _INSTRUCTION.match(line):
            address, guard, opcode, operands = match.groups(default="")
            found.append(Instruction(int(address, 16), guard, opcode, operands.strip()))
        elif (word := _WORD.match(line)) and found:
            found[-1].word = int(word[1], 16)
    if found:
        yield Function(name, architecture, found)


def most_in_flight(path: Sequence[Instruction], least: int = 1, turns: int = 3) -> int:
    """Bytes that a thread waits for at once, at most, on a path that it takes several times.

    Of global loads of at least so many bytes each.
    """
    most, groups = 0, [0]  # asynchronous copies: those of each group that is on its way, the newest last
    loads: dict[int, int] = {}  # by barrier
    for instruction in [*path] * turns:
        for barrier in range(6):
            if instruction.waits_for >> barrier & 1:
                loads.pop(barrier, None)
        if instruction.global_bytes and instruction.width < least:
            continue
        if instruction.name == "LDGSTS":
            groups[-1] += instruction.global_bytes
        elif instruction.name == "LDGDEPBAR":
            groups.append(0)
        elif instruction.name == "DEPBAR" and (left := re.search(r"SB0, (0x\w+)", instruction.operands)):
            groups = groups[-1 - int(left[1], 16) :]
        elif instruction.global_bytes:
            loads[instruction.sets] = loads.get(instruction.sets, 0) + instruction.global_bytes
        most = max(most, sum(groups) + sum(loads.values()))
    return most
