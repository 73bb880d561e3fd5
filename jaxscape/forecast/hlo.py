"""What a compiled program moves, counted in its text: bytes to and from memory, and between chips.

The compiler's own count takes what is prefetched into on-chip memory twice, when it is fetched and when it is used.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# What only names, orders or waits for bytes that others move.
_FREE = (
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "iota",
    "partition-id",
    "domain",
)


class Traffic(NamedTuple):
    """Bytes on each device; `+` is not theirs: use `plus`.

    Attributes:
        memory: read from and written to the device's memory.
        between: sent by a device to others, in rings.
        collectives: how many operations that is.
        kept: what a loop holds on the chip from pass to pass, so that it need not be read.
    """

    memory: float = 0.0
    between: float = 0.0
    collectives: int = 0
    kept: float = 0.0

    def plus(self, other: "Traffic") -> "Traffic":
        memory, between, collectives, kept = map(sum, zip(self, other, strict=True))
        return Traffic(memory, between, int(collectives), kept)


@dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    arrays: tuple[tuple[int, bool], ...]  # of each array of the result, its bytes, and whether it is in memory
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def stored(self) -> int:
        """Bytes of the result in the device's memory; others are on the chip."""
        return sum(size for size, in_memory in self.arrays if in_memory)

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.arrays)


def loop_traffic(text: str) -> Traffic:
    """Of one pass through the outermost loop that moves the most.

    Raises:
        ValueError: there is no loop in the program.
    """
    computations = _parse(text)
    loops = [each for instructions in computations.values() for each in instructions if each.kind == "while"]
    return max(_traffic(computations, _called(loop, "body"))._replace(kept=loop.size - loop.stored) for loop in loops)


def program_traffic(text: str) -> Traffic:
    """Of the whole program, loops counted as one pass."""
    entry = re.search(r"^ENTRY %(\S+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("the program has no beginning")
    return _traffic(_parse(text), entry[1])


def _parse(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and (start := re.match(r"(?:ENTRY )?%(\S+) ", line)):
            current = computations.setdefault(start[1], [])
        elif found := _INSTRUCTION.match(line):
            root, name, shape, kind, rest = found.groups()
            arrays = tuple(_array(*array) for array in _ARRAY.findall(shape))
            inner, _, attributes = rest.partition(")")
            current.append(
                _Instruction(name, kind, arrays, tuple(re.findall(r"%([^\s,)]+)", inner)), attributes, bool(root))
            )
    return computations


def _array(kind: str, dimensions: str, layout: str) -> tuple[int, bool]:
    size = _SIZES.get(kind, 4) * math.prod(int(n) for n in dimensions.split(",") if n)
    return size, "S(" not in layout


def _called(instruction: _Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%([^\s,)}}]+)", instruction.attributes)
    return found[1] if found else ""


def _traffic(computations: dict[str, list[_Instruction]], name: str) -> Traffic:
    total, channels = Traffic(), set[str]()
    known = {instruction.name: instruction for instruction in computations.get(name, [])}
    for instruction in known.values():
        for part in _parts(computations, known, instruction, channels):
            total = total.plus(part)
    return total


def _parts(
    computations: dict[str, list[_Instruction]],
    known: dict[str, _Instruction],
    instruction: _Instruction,
    channels: set[str],
) -> Iterator[Traffic]:
    """What an instruction moves; `channels` are those of the collectives that were met, which it adds to."""
    kind = instruction.kind
    operands = [known[name] for name in instruction.operands if name in known]
    if kind in _FREE or kind.endswith("-done"):
        return
    if kind == "while":
        yield _traffic(computations, _called(instruction, "body"))
    elif kind == "conditional":
        branches = instruction.attributes.partition("branch_computations={")[2].partition("}")[0]
        yield max(_traffic(computations, branch) for branch in re.findall(r"%([^\s,]+)", branches))
    elif kind == "call":
        yield _traffic(computations, _called(instruction, "to_apply"))
    elif kind.removesuffix("-start") in _COLLECTIVES:
        yield _collective(instruction, operands)
    elif (found := _inner_collective(computations, instruction)) is not None:
        # One that runs aside stands in several fusions, of which those on its way compute something else.
        channel = re.findall(r"channel_id=\d+", found[0].attributes)
        if not channel or channel[0] not in channels:
            yield _collective(*found)
        channels.update(channel)
        its = {each.size for each in (found[0], *found[1])}
        yield Traffic(sum(size for each in operands for size, stored in each.arrays if stored and size not in its))
    elif kind == "async-start":
        yield Traffic(sum(each.size for each in computations.get(_called(instruction, "calls"), []) if each.is_root))
    elif kind in ("copy-start", "slice-start", "dynamic-slice", "slice", "gather"):
        # Of what they read, only what they give; a copy within memory is read and written.
        sizes = [size for size, _ in instruction.arrays]
        moved_bytes = sizes[1] if kind == "slice-start" and len(sizes) > 1 else sizes[0]
        yield Traffic(moved_bytes if kind.endswith("-start") else moved_bytes + instruction.stored)
    else:
        yield Traffic(_used(computations, instruction, operands))


def _inner_collective(
    computations: dict[str, list[_Instruction]], instruction: _Instruction
) -> tuple[_Instruction, list[_Instruction]] | None:
    """A collective that runs aside, or in a fusion, and its operands; an all-reduce of which each device keeps its part
    scatters."""
    known = {each.name: each for each in computations.get(_called(instruction, "calls"), [])}
    found = next((each for each in known.values() if each.kind in _COLLECTIVES), None)
    if found is None:
        fused = (_inner_collective(computations, each) for each in known.values() if each.kind == "fusion")
        return next((each for each in fused if each is not None), None)
    operands = [known[name] for name in found.operands if name in known]
    if found.kind == "all-reduce" and instruction.kind == "fusion" and instruction.size < found.size:
        found = replace(found, kind="reduce-scatter")
    return found, operands


def _used(
    computations: dict[str, list[_Instruction]], instruction: _Instruction, operands: list[_Instruction]
) -> float:
    """Bytes in memory that an instruction reads and writes; of a table that it looks up rows in, and of what it updates
    in place, these parts alone."""
    inner = computations.get(_called(instruction, "calls"), [instruction])
    names = {each.name: each for each in inner}
    tables = {names[each.operands[0]].size for each in inner if each.kind == "gather" and each.operands[0] in names}
    read = sum(operand.stored for operand in operands if operand.stored not in tables)
    total = float(read + instruction.stored)
    for update in (each for each in inner if each.kind == "dynamic-update-slice"):
        whole = update.size
        if any(operand.stored >= whole for operand in operands) and instruction.stored >= whole:
            new = names.get(update.operands[1]) if len(update.operands) > 1 else None
            total -= 2 * whole - 2 * (new.size if new is not None else 0)
    return max(total, 0.0)


def _collective(instruction: _Instruction, operands: list[_Instruction]) -> Traffic:
    """A ring sends n - 1 of n parts of what is gathered or scattered, and of what is reduced twice as much."""
    kind = instruction.kind.removesuffix("-start")
    count = _group_size(instruction.attributes)
    given = sum(each.size for each in operands)
    # The result of a start holds the operands too.
    whole = max(given, instruction.size - (given if instruction.kind.endswith("-start") else 0))
    part = whole if kind == "collective-permute" else whole * (count - 1) / max(count, 1)
    sent = 2 * part if kind == "all-reduce" else part
    return Traffic(2.0 * whole, sent if count > 1 else 0.0, 1 if count > 1 else 0)


def _group_size(attributes: str) -> int:
    """How many devices a collective connects, by its list of their numbers, its grid, or its mesh and the axes of that;
    two where it does not say."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # A part of an axis is named with what lies before it and its own size, 'axis_0':(2)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2
