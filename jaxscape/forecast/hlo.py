"""The HBM and inter-chip traffic of a compiled program, counted in its optimised HLO text.

The compiler's own count is not used, because it counts a buffer that is prefetched into on-chip memory twice: when it
is fetched, and when it is used.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

_ITEM_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "f64": 8},
}
_BUFFER = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These instructions move nothing: they only name or order buffers, or make their result on the chip.
_WITHOUT_TRAFFIC = (
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
    """What one pass of a program moves on each device.

    Add two with `plus`: `+` would concatenate the tuples.

    Attributes:
        hbm_bytes: bytes read from and written to HBM.
        sent_bytes: bytes that a device sends to others, if collectives use ring algorithms.
        collectives: number of collective operations.
        on_chip_bytes: size of the loop-carried buffers that are kept on the chip, and so cause no HBM traffic.
    """

    hbm_bytes: float = 0.0
    sent_bytes: float = 0.0
    collectives: int = 0
    on_chip_bytes: float = 0.0

    def plus(self, other: "Traffic") -> "Traffic":
        hbm_bytes, sent_bytes, collectives, on_chip_bytes = map(sum, zip(self, other, strict=True))
        return Traffic(hbm_bytes, sent_bytes, int(collectives), on_chip_bytes)


class _Buffer(NamedTuple):
    num_bytes: int
    in_hbm: bool  # otherwise on the chip


@dataclass(frozen=True)
class _Instruction:
    """An HLO instruction.

    Attributes:
        results: the buffers of the result; several if it is a tuple.
        operands: names of the instructions whose results it takes.
        attributes: what follows the operands in the text.
        is_root: whether its result is that of its computation.
    """

    name: str
    opcode: str
    results: tuple[_Buffer, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the result."""
        return sum(buffer.num_bytes for buffer in self.results)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the part of the result that is in HBM."""
        return sum(buffer.num_bytes for buffer in self.results if buffer.in_hbm)

    def attribute(self, name: str) -> str:
        """The name of the computation that an attribute refers to; empty if there is no such attribute."""
        match = re.search(rf"\b{name}=%([^\s,)}}]+)", self.attributes)
        return match[1] if match else ""


_Computations = dict[str, list[_Instruction]]


def loop_traffic(text: str) -> Traffic:
    """The traffic of one iteration of a program's main loop, the one with the most HBM traffic.

    Raises:
        ValueError: the program has no loop.
    """
    computations = _parse(text)
    loops = [
        instruction
        for instructions in computations.values()
        for instruction in instructions
        if instruction.opcode == "while"
    ]
    if not loops:
        raise ValueError("The program has no loop.")
    return max(
        _computation_traffic(computations, loop.attribute("body"))._replace(
            on_chip_bytes=loop.num_bytes - loop.hbm_bytes
        )
        for loop in loops
    )


def program_traffic(text: str) -> Traffic:
    """The traffic of a whole program, in which each loop counts as one iteration."""
    entry = re.search(r"^ENTRY %(\S+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("The program has no entry computation.")
    return _computation_traffic(_parse(text), entry[1])


def _parse(text: str) -> _Computations:
    """The instructions of each computation, by the computation's name."""
    computations: _Computations = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%(\S+) ", line)):
            current = computations.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            results = tuple(_parse_buffer(*parts) for parts in _BUFFER.findall(shape))
            operands, _, attributes = rest.partition(")")
            names = tuple(re.findall(r"%([^\s,)]+)", operands))
            current.append(_Instruction(name, opcode, results, names, attributes, bool(root)))
    return computations


def _parse_buffer(dtype: str, dimensions: str, layout: str) -> _Buffer:
    num_bytes = _ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in dimensions.split(",") if n)
    return _Buffer(num_bytes, in_hbm="S(" not in layout)  # S(n) is a memory space on the chip


def _computation_traffic(computations: _Computations, name: str) -> Traffic:
    total, counted_channels = Traffic(), set[str]()
    instructions = {instruction.name: instruction for instruction in computations.get(name, [])}
    for instruction in instructions.values():
        operands = [instructions[operand] for operand in instruction.operands if operand in instructions]
        total = total.plus(_instruction_traffic(computations, instruction, operands, counted_channels))
    return total


def _instruction_traffic(
    computations: _Computations,
    instruction: _Instruction,
    operands: list[_Instruction],
    counted_channels: set[str],
) -> Traffic:
    """The traffic of one instruction.

    Arguments:
        counted_channels: the channels of the fused collectives that have been counted. If this instruction has a fused
            collective, its channel is added.
    """
    opcode = instruction.opcode
    if opcode in _WITHOUT_TRAFFIC or opcode.endswith("-done"):
        return Traffic()
    if opcode == "while":
        return _computation_traffic(computations, instruction.attribute("body"))
    if opcode == "conditional":
        branches = instruction.attributes.partition("branch_computations={")[2].partition("}")[0]
        return max(_computation_traffic(computations, branch) for branch in re.findall(r"%([^\s,]+)", branches))
    if opcode == "call":
        return _computation_traffic(computations, instruction.attribute("to_apply"))
    if opcode.removesuffix("-start") in _COLLECTIVES:
        return _collective_traffic(instruction, operands)
    if (fused := _fused_collective(computations, instruction)) is not None:
        return _fused_collective_traffic(*fused, operands, counted_channels)
    if opcode == "async-start":
        called = computations.get(instruction.attribute("calls"), [])
        return Traffic(sum(inner.num_bytes for inner in called if inner.is_root))
    if opcode in ("copy-start", "slice-start", "dynamic-slice", "slice", "gather"):
        # They read only the bytes that they copy out, which may be fewer than their operands have.
        sizes = [buffer.num_bytes for buffer in instruction.results]
        read = sizes[1] if opcode == "slice-start" and len(sizes) > 1 else sizes[0]
        return Traffic(read if opcode.endswith("-start") else read + instruction.hbm_bytes)
    return Traffic(_read_and_written(computations, instruction, operands))


def _fused_collective(
    computations: _Computations, instruction: _Instruction
) -> tuple[_Instruction, list[_Instruction]] | None:
    """The collective inside a fusion or an asynchronous computation, and its operands; None if there is none."""
    inner = {called.name: called for called in computations.get(instruction.attribute("calls"), [])}
    collective = next((called for called in inner.values() if called.opcode in _COLLECTIVES), None)
    if collective is None:
        nested = (_fused_collective(computations, called) for called in inner.values() if called.opcode == "fusion")
        return next((fused for fused in nested if fused is not None), None)
    operands = [inner[name] for name in collective.operands if name in inner]
    # An all-reduce of which each device keeps only its own part is a reduce-scatter.
    is_partial = instruction.opcode == "fusion" and instruction.num_bytes < collective.num_bytes
    if collective.opcode == "all-reduce" and is_partial:
        collective = replace(collective, opcode="reduce-scatter")
    return collective, operands


def _fused_collective_traffic(
    collective: _Instruction,
    collective_operands: list[_Instruction],
    operands: list[_Instruction],
    counted_channels: set[str],
) -> Traffic:
    """The traffic of a fusion with a collective inside: the collective's, and what the fusion reads besides.

    Arguments:
        operands: the operands of the fusion.
    """
    total = Traffic()
    # An asynchronous collective appears in several fusions, which compute something else while it is under way. It
    # counts only in the first of them.
    channel = re.findall(r"channel_id=\d+", collective.attributes)
    if not channel or channel[0] not in counted_channels:
        total = _collective_traffic(collective, collective_operands)
    counted_channels.update(channel)
    counted_sizes = {part.num_bytes for part in (collective, *collective_operands)}
    read = sum(
        buffer.num_bytes
        for operand in operands
        for buffer in operand.results
        if buffer.in_hbm and buffer.num_bytes not in counted_sizes
    )
    return total.plus(Traffic(read))


def _read_and_written(computations: _Computations, instruction: _Instruction, operands: list[_Instruction]) -> float:
    """Bytes of HBM that an instruction or fusion reads and writes.

    A table that rows are gathered from does not count as read, only the rows do. Of a buffer that is updated in place,
    only the update counts.
    """
    fused = computations.get(instruction.attribute("calls"), [instruction])
    inner = {called.name: called for called in fused}
    table_sizes = {
        inner[called.operands[0]].num_bytes
        for called in fused
        if called.opcode == "gather" and called.operands[0] in inner
    }
    read = sum(operand.hbm_bytes for operand in operands if operand.hbm_bytes not in table_sizes)
    total = float(read + instruction.hbm_bytes)
    for called in fused:
        if called.opcode != "dynamic-update-slice":
            continue
        size = called.num_bytes
        if instruction.hbm_bytes >= size and any(operand.hbm_bytes >= size for operand in operands):
            update = inner.get(called.operands[1]) if len(called.operands) > 1 else None
            total -= 2 * size - 2 * (update.num_bytes if update is not None else 0)
    return max(total, 0.0)


def _collective_traffic(collective: _Instruction, operands: list[_Instruction]) -> Traffic:
    """The traffic of a collective over n devices in a ring.

    An all-gather, reduce-scatter or all-to-all sends (n − 1)/n of the whole array; an all-reduce, which is a
    reduce-scatter and an all-gather, twice as much.
    """
    opcode = collective.opcode.removesuffix("-start")
    num_devices = _group_size(collective.attributes)
    operand_bytes = sum(operand.num_bytes for operand in operands)
    # The result of a -start instruction contains its operands.
    result_bytes = collective.num_bytes - (operand_bytes if collective.opcode.endswith("-start") else 0)
    size = max(operand_bytes, result_bytes)
    part = size if opcode == "collective-permute" else size * (num_devices - 1) / max(num_devices, 1)
    sent = 2 * part if opcode == "all-reduce" else part
    is_alone = num_devices <= 1
    return Traffic(2.0 * size, 0.0 if is_alone else sent, 0 if is_alone else 1)


def _group_size(attributes: str) -> int:
    """How many devices take part in a collective; 2 if the text does not say.

    The text has a list of device numbers, the shape of a grid of them, or a mesh and some of its axes.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # Part of an axis is written with the size that lies before it and its own, as in 'axis_0':(2)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2
