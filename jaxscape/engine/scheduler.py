"""What the host decides while the device decodes: which prompts enter which rows, and which answers are finished."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from jaxscape.engine.decode import Generated, Insertion
from jaxscape.engine.layout import BatchLayout, Groups
from jaxscape.prompts.thinking import hidden_tokens

Coords = Sequence[float]
"""A point's coordinates, one for each direction."""

StopWhen = Callable[[str], bool]
"""A function of an unfinished answer's text: whether its outcome is decided, whatever may follow."""


class Abandon(NamedTuple):
    """Which answers are ended by what their first tokens say, although their outcome is not decided.

    Attributes:
        sizes: numbers of first tokens, in ascending order. Each answer that has as many is asked about once for each.
        is_lost: a function of one of the sizes, the prompts' numbers in the workload, and the beginnings of their
            answers, which have that size. It says whether each answer ends there.
    """

    sizes: Sequence[int]
    is_lost: Callable[[int, Sequence[int], Sequence[str]], Sequence[bool]]

    def renumbered(self, number_of: Callable[[int], int]) -> "Abandon":
        """The same for prompts that have other numbers, of which `number_of` gives the number that `is_lost` knows."""
        return self._replace(is_lost=lambda size, others, texts: self.is_lost(size, [*map(number_of, others)], texts))


class Completion(NamedTuple):
    """The answer to a prompt at a point.

    Attributes:
        text: the answer, without special tokens, apart from those that begin and end a block of thinking.
        length: number of tokens that had to be computed for it, an end token included.
        finite: False if a NaN or infinite logit ended the text.
        cut: True if the text ends where its outcome was decided, or where it was abandoned, although the model might
            have gone on.
        abandoned: True if an `Abandon` ended it.
    """

    text: str
    length: int
    finite: bool = True
    cut: bool = False
    abandoned: bool = False


class Scheduler:
    """Which job is in which row, and which groups of prompts wait to be inserted. A job is one prompt at one point.

    Attributes:
        jobs: int[B], the job in each row: index of the point × number of prompts + index of the prompt; -1 for a free
            row.
        num_prompts: number of prompts of the block that is answered; a job's index of a prompt counts from its first.
    """

    def __init__(self, layout: BatchLayout, groups: Groups, points: Sequence[Coords], block: int = 0) -> None:
        self._layout, self._points = layout, points
        chosen = range(len(groups.prompt_ids))[layout.num_groups * block :][: layout.num_groups]
        # int[G, R], the index in the block of each prompt of each group; -1 where a group has fewer than R prompts.
        self._prompt_ids = np.where(groups.own_lengths > 0, groups.prompt_ids - groups.prompt_ids[chosen[0], 0], -1)
        self.num_prompts = int((groups.own_lengths[chosen] > 0).sum())
        self._queue = deque((point, group) for point in range(len(points)) for group in chosen)
        self.jobs = np.full(layout.batch, -1)
        self._in_flight = np.full(layout.points_in_flight, -1)  # the points whose prefix is cached

    @property
    def is_alive(self) -> Bool[np.ndarray, " batch"]:
        """Which rows hold a job."""
        return self.jobs >= 0

    def free(self, finished: set[int]) -> None:
        """Free the rows of finished jobs."""
        self.jobs[np.isin(self.jobs, list(finished))] = -1

    def insertions(self) -> Iterator[Insertion]:
        """The insertions to run now.

        An insertion waits until there are free blocks of rows, in any shards, for as many groups as one call of
        `insert` takes, or for those that are left. A shard in which fewer blocks are free than it prefills groups takes
        fewer: waiting for it would leave the free rows of all other shards idle.
        """
        layout = self._layout
        while self._queue:
            blocks = self.jobs.reshape(-1, layout.rows_per_group)
            free = np.flatnonzero((blocks < 0).all(-1))
            count = min(layout.groups_per_insert, len(self._queue))
            if len(free) < count:
                return
            yield self._insert(blocks, self._blocks_to_fill(free, count))

    def _blocks_to_fill(self, free: Int[np.ndarray, " free"], count: int) -> Int[np.ndarray, " filled"]:
        """Up to `count` of the free blocks of rows, in their order. No shard gets more groups than it prefills in an
        insertion, and a shard with more free blocks gets more of them."""
        layout = self._layout
        shard = free * layout.shards // (layout.batch // layout.rows_per_group)
        rank = np.arange(len(free)) - np.searchsorted(shard, shard)
        num_left = np.bincount(shard)[shard] - rank
        order = np.argsort(-num_left, stable=True)
        usable = order[rank[order] < layout.groups_per_insert // layout.shards]
        return np.sort(free[usable[:count]])

    def _insert(self, blocks: Int[np.ndarray, "blocks group"], filled: Int[np.ndarray, " filled"]) -> Insertion:
        """Take (point, group) pairs from the queue, assign them to free blocks of rows, and return the insertion that
        does so."""
        shards, last = self._layout.shards, self._queue[0]
        parts = []
        for shard, (own_blocks, in_flight) in enumerate(
            zip(np.split(blocks, shards), np.split(self._in_flight, shards), strict=True)
        ):
            own = filled[filled // len(own_blocks) == shard] % len(own_blocks)
            chosen = [self._queue.popleft() for _ in own]
            last = chosen[-1] if chosen else last
            parts.append(self._insert_into_shard(own_blocks, in_flight, own, chosen, last))
        return Insertion(*map(np.concatenate, zip(*parts, strict=True)))

    def _insert_into_shard(
        self,
        blocks: Int[np.ndarray, "blocks group"],
        in_flight: Int[np.ndarray, " points"],
        filled: Int[np.ndarray, " filled"],
        chosen: list[tuple[int, int]],
        last: tuple[int, int],
    ) -> Insertion:
        """Assign chosen (point, group) pairs to free blocks of a shard's rows, and return the shard's part of the
        insertion.

        Arguments:
            blocks, in_flight: the shard's parts of `jobs` and of the points whose prefix is cached; they are changed.
            last: the pair with which the shard's part is filled up.
        """
        layout = self._layout
        # Repeating the last pair keeps the shapes, so that `insert` is compiled once. No row takes the copies.
        num_groups = layout.groups_per_insert // layout.shards
        inserted = chosen + [last] * (num_groups - len(chosen))
        # For each point, where its prefix comes from, as `Insertion.prefix_source` says it.
        source = {int(point): index for index, point in enumerate(in_flight) if point >= 0}
        new = list(dict.fromkeys(point for point, _ in inserted if point not in source))
        source |= {point: -1 - k for k, point in enumerate(new)}
        row_source = np.full(blocks.shape, -1, np.int32)
        point_source = np.full(in_flight.shape, -1, np.int32)
        for i, (block, (point, group)) in enumerate(zip(filled, chosen, strict=True)):
            index = block * layout.rows_per_group // layout.rows_per_point
            row_source[block] = i * layout.rows_per_group + np.arange(layout.rows_per_group)
            point_source[index] = i
            ids = self._prompt_ids[group]
            blocks[block] = np.where(ids < 0, -1, point * self.num_prompts + ids)
            in_flight[index] = point
        begun = (new + [last[0]] * layout.max_new_points)[: layout.max_new_points]
        return Insertion(
            groups=np.array([group for _, group in inserted], np.int32),
            coords=self._coords([point for point, _ in inserted]),
            new_coords=self._coords(begun),
            prefix_source=np.array([source[point] for point, _ in inserted], np.int32),
            row_source=row_source.reshape(-1),
            point_source=point_source,
        )

    def _coords(self, points: Sequence[int]) -> Float[np.ndarray, "points ndim"]:
        coords = [self._points[point] for point in points]
        return np.array(coords, np.float32).reshape(len(points), self._layout.num_factored)

    def compacted(self) -> tuple[Int[np.ndarray, " fewer"], Int[np.ndarray, " fewer_points"]] | None:
        """The indices of the rows and points that make a smaller batch, as `decode.compact` takes them. It is the
        smallest batch in which each shard's unfinished rows fit into the shard's part, and `jobs` describes it then.
        The result is None while groups wait, and if there is no such batch."""
        layout = self._layout
        if self._queue:
            return None
        # With one point in a shard, rows move one by one; with several, all rows of a point move together.
        is_one_point = layout.points_in_flight == layout.shards
        size = 1 if is_one_point else layout.rows_per_point
        alive = self.is_alive.reshape(layout.shards, -1, size)
        unfinished = [np.flatnonzero(own.any(axis=1)) for own in alive]
        most = max(map(len, unfinished))
        rooms = [slots // layout.shards // size for slots in layout.compact_slots if slots < len(self.jobs)]
        room = min((room for room in rooms if room >= most), default=0)
        if not most or not room:
            return None
        kept = np.stack([np.resize(own, room) for own in unfinished])
        rows = (kept[..., None] * size + np.arange(size)).reshape(layout.shards, -1)
        moves = np.arange(room * size) < size * np.array([[len(own)] for own in unfinished])
        jobs = np.take_along_axis(self.jobs.reshape(layout.shards, -1), rows, axis=1)
        self.jobs = np.where(moves, jobs, -1).reshape(-1)
        points = np.zeros(layout.shards, np.int32) if is_one_point else kept.reshape(-1).astype(np.int32)
        return rows.reshape(-1).astype(np.int32), points


class Results:
    """The finished answers of all jobs, given out point by point in the points' order."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        stop_when: StopWhen | None,
        num_points: int,
        num_prompts: int,
        abandon: Abandon | None = None,
    ) -> None:
        """No job is finished yet.

        Arguments:
            abandon: it is given the numbers of jobs instead of those of prompts.
        """
        self._tokenizer, self._limit, self._stop_when = tokenizer, max_new_tokens, stop_when
        self._abandon = abandon
        # To ask about whole answers would save nothing.
        self._sizes = [] if abandon is None else [size for size in abandon.sizes if size < max_new_tokens]
        self._num_asked = np.zeros(num_points * num_prompts, int)  # how many sizes `abandon` was asked about
        self._hidden = hidden_tokens(tokenizer)
        # For each answer, the largest number of its tokens at which `stop_when` was asked and said no.
        self._undecided = np.zeros(num_points * num_prompts, int)
        self._done: list[Completion | None] = [None] * (num_points * num_prompts)
        self._num_prompts, self._num_given = num_prompts, 0

    @property
    def is_complete(self) -> bool:
        """Whether the answers at all points have been given out."""
        return self._num_given * self._num_prompts == len(self._done)

    def record(self, generated: Generated, jobs: Int[np.ndarray, " batch"]) -> set[int]:
        """Record the new tokens of rows, which held these jobs, and return the jobs whose answers are now finished."""
        out = jax.device_get(generated)
        in_rows = [(job, row) for row, job in enumerate(jobs.tolist()) if job >= 0 and self._done[job] is None]
        finished = self._abandoned(out, in_rows)
        unfinished = [(job, row) for job, row in in_rows if job not in finished]
        if self._stop_when is None:  # only the model ends an answer, so no text is read before
            unfinished = [(job, row) for job, row in unfinished if out.ended[row]]
        texts = self._texts([out.tokens[row, : out.lengths[row]] for _, row in unfinished])
        for (job, row), text in zip(unfinished, texts, strict=True):
            length, tokens = int(out.lengths[row]), out.tokens[row]
            if self._stops(text):
                # The answer ends at the first token with which `stop_when` is true, wherever the chunks end.
                length = next(n for n in range(self._undecided[job], length + 1) if self._is_decided(tokens[:n]))
                self._done[job] = Completion(self._texts([tokens[:length]])[0], length, cut=length < self._limit)
            elif out.ended[row]:
                self._done[job] = Completion(text, min(length + 1, self._limit), finite=bool(out.finite[row]))
            else:
                self._undecided[job] = length
                continue
            finished.add(job)
        return finished

    def _abandoned(self, out: Generated, in_rows: Sequence[tuple[int, int]]) -> set[int]:
        """Finish the answers that are abandoned now, and return their jobs.

        This depends on nothing but an answer's first tokens, wherever the chunks end.

        Arguments:
            in_rows: unfinished jobs, each with its row.
        """
        if self._abandon is None:
            return set()
        lost: set[int] = set()
        for number, size in enumerate(self._sizes):
            rest = [(job, row) for job, row in in_rows if job not in lost and self._num_asked[job] == number]
            begun = [(job, row) for job, row in rest if out.lengths[row] >= size]
            self._num_asked[[job for job, _ in begun]] += 1
            texts = self._texts([np.asarray(out.tokens[row, :size]) for _, row in begun])
            asked = [(job, text) for (job, _), text in zip(begun, texts, strict=True) if not self._stops(text)]
            is_lost = self._abandon.is_lost(size, *zip(*asked, strict=True)) if asked else []
            for job, text in itertools.compress(asked, is_lost):
                self._done[job] = Completion(text, size, cut=True, abandoned=True)
                lost.add(job)
        return lost

    def ready(self) -> Iterator[list[Completion]]:
        """The answers of the next points, for as many points as are finished."""
        while not self.is_complete:
            start = self._num_given * self._num_prompts
            point = self._done[start : start + self._num_prompts]
            if None in point:
                return
            self._num_given += 1
            yield [completion for completion in point if completion is not None]

    def _is_decided(self, tokens: Int[np.ndarray, " _"]) -> bool:
        return self._stops(self._texts([tokens])[0])

    def _stops(self, text: str) -> bool:
        return self._stop_when is not None and self._stop_when(text)

    def _texts(self, rows: Sequence[Int[np.ndarray, " _"]]) -> list[str]:
        if not rows:  # transformers decodes an empty batch to one empty text
            return []
        hidden = self._hidden or ()
        texts: list[str] = self._tokenizer.batch_decode(
            [[token for token in row.tolist() if token not in hidden] for row in rows],
            skip_special_tokens=self._hidden is None,
            clean_up_tokenization_spaces=False,
        )
        return texts
