"""How prompts lie in the rows of a batch.

A batch has B rows, each of which generates one answer at a time. It holds N points at a time, and B / N consecutive
rows belong to each point. All prompts begin with the same prefix (the chat template's opening and the system prompt),
whose keys and values are cached once for each point. The rest of a prompt and its new tokens lie in the ring of cache
slots that each row has to itself.

Prompts enter the batch in groups. So that prefill computes hardly any padding, the prompts of a group are packed into
few lines, and a token attends to its own prompt only.

Each of D devices along the mesh axis `points` holds a shard of the batch: B / D consecutive rows, which are those of
N / D whole points. A device prefills the groups that its own rows take, so that no keys and values are sent to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxscape.engine.batching import LENGTH_MULTIPLE, Workload, padded_length


@dataclass(frozen=True)
class BatchLayout:
    """The sizes of a batch. The planner chooses them, and the engine and the forecast use them.

    Attributes:
        points_in_flight: N, the number of points that decode together. A form that decodes one point at a time counts
            it once for each shard.
        rows_per_point: B / N, the number of rows of each of these points.
        rows_per_group: number of rows that a group of prompts takes; divides `rows_per_point`.
        prompts_per_group: number of prompts that enter the batch together; at most `rows_per_group`.
        groups_per_insert: number of groups that one call of `decode.insert` prefills, the same number in each shard.
        compact_slots: the number of rows of each smaller batch, the largest first; empty if there is none. The last
            unfinished rows move to the smallest one that holds them. With several points in a shard, each number is a
            multiple of `rows_per_point`.
        num_groups: number of groups that are answered together at one point: those of all prompts, or of a block.
        prefix_slots: number of cache slots for the common prefix of each point.
        ring_slots: number of cache slots in the ring of each row.
        num_factored: number of directions that are multiplied separately; those of all direction sets of a batch.
        num_sets: number of direction sets whose points decode together.
        shards: D, the number of devices that share the rows; divides N and `groups_per_insert`.
    """

    points_in_flight: int
    rows_per_point: int
    rows_per_group: int
    prompts_per_group: int
    groups_per_insert: int
    compact_slots: tuple[int, ...]
    num_groups: int
    prefix_slots: int
    ring_slots: int
    num_factored: int
    num_sets: int = 1
    shards: int = 1

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.points_in_flight * self.rows_per_point

    @property
    def first_compact_slots(self) -> int:
        """The number of rows of the first smaller batch; 0 if there is none."""
        return max(self.compact_slots, default=0)

    @property
    def max_new_points(self) -> int:
        """The largest number of points that the groups of one insertion into a shard belong to.

        The groups come in the points' order, so only the first and the last point may have groups in other insertions
        too.
        """
        groups = self.groups_per_insert // self.shards
        return min(groups, (groups - 2) // self.num_groups + 2)


class Groups(NamedTuple):
    """The prompts without their common prefix: G groups of up to R prompts, each packed into L lines of T tokens.

    Attributes:
        tokens: int32[G, L, T].
        positions: int32[G, L, T], each token's position in its whole prompt; -1 for padding.
        segments: int32[G, L, T], the index in its group of the prompt that each token belongs to.
        first_token: int32[G, R], the index of each prompt's first token, counted through the lines of its group.
        own_lengths: int32[G, R], number of tokens of each prompt after the prefix; 0 where a group has fewer than R.
        prompt_lengths: int32[G, R], number of tokens of each whole prompt, and so the position of its first new token.
        prompt_ids: int32[G, R], the index of each prompt, on which its random stream depends.
    """

    tokens: Int[Array | np.ndarray, "groups lines time"]
    positions: Int[Array | np.ndarray, "groups lines time"]
    segments: Int[Array | np.ndarray, "groups lines time"]
    first_token: Int[Array | np.ndarray, "groups rows"]
    own_lengths: Int[Array | np.ndarray, "groups rows"]
    prompt_lengths: Int[Array | np.ndarray, "groups rows"]
    prompt_ids: Int[Array | np.ndarray, "groups rows"]


def pack(
    workload: Workload, prompts_per_group: int, rows_per_group: int | None = None
) -> tuple[Int[np.ndarray, " prefix"], Groups]:
    """The token ids of the common prefix, and the rest of the prompts packed into groups.

    Arguments:
        rows_per_group: R; by default the number of prompts.
    """
    prefix = workload.prefix_length
    texts = [tokens[prefix:] for tokens in workload.prompt_tokens]
    starts = range(0, len(texts), prompts_per_group)
    groups = [range(i, min(i + prompts_per_group, len(texts))) for i in starts]
    own_lengths = [[len(texts[prompt]) for prompt in group] for group in groups]
    # Of several line widths, take the one with the least padding.
    narrowest = padded_length(max(map(len, texts)))
    widths = range(narrowest, narrowest + 8 * LENGTH_MULTIPLE, LENGTH_MULTIPLE)
    counts = [max(max(assign_lines(own, width)) + 1 for own in own_lengths) for width in widths]
    num_lines, width = min(zip(counts, widths, strict=True), key=lambda shape: (shape[0] * shape[1], shape[1]))
    tokens, segments = (np.zeros((len(groups), num_lines, width), np.int32) for _ in range(2))
    positions = np.full_like(tokens, -1)
    shape = (len(groups), rows_per_group or prompts_per_group)
    first, lengths, prompt_lengths, ids = (np.zeros(shape, np.int32) for _ in range(4))
    for g, group in enumerate(groups):
        filled = np.zeros(num_lines, int)
        for r, (prompt, line) in enumerate(zip(group, assign_lines(own_lengths[g], width), strict=True)):
            text, begin = texts[prompt], filled[line]
            span = (g, line, slice(begin, begin + len(text)))
            tokens[span], positions[span], segments[span] = text, prefix + np.arange(len(text)), r
            first[g, r], lengths[g, r] = line * width + begin, len(text)
            prompt_lengths[g, r], ids[g, r] = prefix + len(text), workload.first_prompt + prompt
            filled[line] += len(text)
    prefix_tokens = np.asarray(workload.prompt_tokens[0][:prefix], np.int32)
    return prefix_tokens, Groups(tokens, positions, segments, first, lengths, prompt_lengths, ids)


def assign_lines(lengths: Sequence[int], narrowest: int) -> list[int]:
    """The index of the line that takes each text: first fit, the longest texts first.

    Arguments:
        lengths: the number of tokens of each text.
        narrowest: the width of a line, unless its longest text is longer; see `line_width`.
    """
    free: list[int] = []
    chosen = [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        size = lengths[number]
        line = next((i for i, room in enumerate(free) if room >= size), len(free))
        if line == len(free):
            free.append(line_width(size, narrowest))
        free[line] -= size
        chosen[number] = line
    return chosen


def line_width(longest: int, narrowest: int) -> int:
    """The width of a line whose longest text has `longest` tokens: `narrowest`, or the next power of two."""
    return narrowest if longest <= narrowest else 2 ** (longest - 1).bit_length()
