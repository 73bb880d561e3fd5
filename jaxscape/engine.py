"""The engine: which rows decode where and when, so that a landscape costs what its arithmetic costs.

The work is a queue of (point, group of prompts), taken in order into slots. The device runs a few steps at a time; in
between the host looks at what was generated, ends the rows whose outcome is known, refills the slots that came free,
and moves the last rows into fewer slots. What a row generates depends on none of that.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxscape.decode import (
    Fill,
    Generated,
    Sampling,
    Slots,
    SlotSizes,
    Weights,
    common_prefix,
    compact,
    decode_chunk,
    empty_slots,
    insert,
    make_program,
    most_new_points,
    pack,
    ring_size,
    tokenize,
)
from jaxscape.models import Model
from jaxscape.models.checkpoint import Params
from jaxscape.perturb import Direction, materialise, materialise_streamed
from jaxscape.plan import EngineOptions, Plan, Work, make_plan
from jaxscape.sharding import replicated, split_of

Coords = Sequence[float]


class Completion(NamedTuple):
    """A prompt's completion.

    Attributes:
        finite: all logits on the way were finite.
        cut: the text was ended as soon as it decided the outcome; the model may have gone on.
        length: the tokens that had to be computed for it, an end token included.
    """

    text: str
    length: int
    finite: bool = True
    cut: bool = False


@dataclass
class Engine:
    """Completes one set of prompts at any number of points.

    Attributes:
        rows: each prompt's tokens.
        decided: whether a text's outcome is known, whatever may follow; its row ends there. None lets every row go on
            to its end.
        seconds: where given, the seconds of `weights`, `prefill` and `decode` are added up in it; the host then waits
            for each program.
    """

    model: Model
    rows: Sequence[Sequence[int]]
    sampling: Sampling
    plan: Plan
    decided: Callable[[str], bool] | None = None
    seconds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        prefix = common_prefix(self.rows)
        points = split_of(self.model.mesh).points
        groups = pack(self.rows, prefix, self.plan.group, self.plan.inserts, points)
        # By group, its prompts' numbers; -1 for a row that only fills it up.
        self._grouped = np.where(groups.lengths > 0, groups.rows, -1)
        self._ring = ring_size(groups, self.sampling.max_new_tokens)
        shared = np.asarray(self.rows[0][:prefix], np.int32)
        self._prefix, self._groups = jax.device_put((shared, groups), replicated(self.model.mesh))
        self._stream = jax.random.key(self.sampling.seed, impl="threefry2x32")
        self._program = make_program(self.model, self.rows, self.sampling)
        self._slots: Slots | None = None

    def complete(self, directions: Sequence[Direction], points: Sequence[Coords]) -> Iterator[list[Completion]]:
        """The completions of all prompts at each point, in the points' order."""
        params = None
        if self.plan.form == "factorised":
            # Points that differ in their last coordinate alone decode together: whatever the number of directions, each
            # use of a weight is two products.
            for fixed, line in itertools.groupby(points, key=lambda coords: tuple(coords[:-1])):
                params = self._moved(directions[:-1], fixed, params)
                weights = Weights(params, tuple(directions[-1:]))
                yield from self._decode(weights, [tuple(coords[-1:]) for coords in line])
        else:
            for coords in points:
                params = self._moved(directions, coords, params)
                yield from self._decode(Weights(params), [()])

    def _moved(self, directions: Sequence[Direction], coords: Coords, previous: Params | None) -> Params:
        """The parameters at a point, in the place of the last point's."""
        if not directions and self.plan.form != "streamed":
            return self.model.params
        move: Callable[..., Params] = materialise
        if self.plan.form == "streamed":
            move = partial(materialise_streamed, shardings=self.model.shardings)
        where = np.asarray(coords, np.float32)
        return self._timed("weights", move, self.model.params, directions, where, previous)

    def _decode(self, weights: Weights, points: Sequence[Coords]) -> Iterator[list[Completion]]:
        board = Board(self.plan, len(points), self._grouped)
        results = Results(self.model, self.sampling, self.decided, len(points), len(self.rows))
        slots, self._slots = self._slots, None
        if slots is None:
            slots = self._empty_slots(len(points[0]))
        whole = None  # the slots that the last rows have left
        reports: deque[tuple[Generated, Int[np.ndarray, " batch"]]] = deque()
        run = partial(self._timed, program=self._program)
        steps = 1
        while not results.complete:
            for fill in board.fills(points):
                steps = 1
                slots = run("prefill", insert, weights, slots, self._prefix, self._groups, fill, self._stream)
            if whole is None and (smaller := board.compacted()) is not None:
                whole, slots = slots, run("decode", compact, slots, *smaller)
            # A refusal shows in the first tokens: the first looks come early.
            steps = min(2 * steps, self.plan.chunk)
            chunk = (board.alive, self._stream, np.asarray(steps, np.int32))
            slots, report = run("decode", decode_chunk, weights, slots, *chunk)
            reports.append((report, board.owners.copy()))
            if len(reports) > self.plan.ahead:
                board.free(results.settle(*reports.popleft()))
            yield from results.ready()
        self._slots = slots if whole is None else whole

    def _timed(self, phase: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **options)
        if self.seconds is not None:
            jax.block_until_ready(result)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        return result

    def _empty_slots(self, ndim: int) -> Slots:
        places, rows = self.plan.places, self.plan.rows
        return empty_slots(
            self._program, self.model.dtype, SlotSizes(places, places * rows, self._ring, self._prefix.size, ndim)
        )


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    system_prompt: str = "default",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    options: EngineOptions = EngineOptions(),  # noqa: B008 (immutable)
) -> list[str]:
    """The model's answers to prompts, each given as a user's turn in the model's chat format.

    See `jaxscape.decode.Sampling` for sampling, `jaxscape.prompts.chat_text` for `system_prompt`, and
    `jaxscape.plan.EngineOptions` for `options`. The texts end before the model's end token and hold no special tokens;
    they are a model's output and as such not to be trusted.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    rows = tokenize(model, prompts, system_prompt, max_new_tokens)
    engine = Engine(model, rows, sampling, make_plan(model, Work(rows, sampling), options))
    return [completion.text for completion in next(engine.complete((), [()]))]


class Board:
    """Which (point, prompt) is in which slot, and what still waits. A job is point × number of prompts + prompt."""

    def __init__(self, plan: Plan, num_points: int, grouped: Int[np.ndarray, "groups rows"]) -> None:
        self._plan, self._grouped = plan, grouped
        self._num_prompts = int((grouped >= 0).sum())
        self._queue = deque((point, group) for point in range(num_points) for group in range(len(grouped)))
        self.owners = np.full(plan.places * plan.rows, -1)
        self._points = np.full(plan.places, -1)  # whose prefix each place has

    @property
    def alive(self) -> Bool[np.ndarray, " batch"]:
        return self.owners >= 0

    def free(self, finished: set[int]) -> None:
        self.owners[np.isin(self.owners, list(finished))] = -1

    def fills(self, points: Sequence[Coords]) -> Iterator[Fill]:
        """What to insert now: a program inserts several groups at once, so as many slots are waited for."""
        size, group_size = self._plan.inserts, self._plan.group
        while self._queue:
            blocks = self.owners.reshape(-1, group_size)
            free = np.flatnonzero((blocks < 0).all(-1))
            count = min(size, len(self._queue))
            if len(free) < count:
                return
            chosen = [self._queue.popleft() for _ in range(count)]
            known = {int(point): place for place, point in enumerate(self._points) if point >= 0}
            index = np.minimum(np.arange(size), count - 1)  # the last one is repeated, and nobody takes the copies
            of_row = np.full(blocks.shape, -1, np.int32)
            of_place = np.full(self._points.shape, -1, np.int32)
            new = list(dict.fromkeys(point for point, _ in chosen if point not in known))
            known |= {point: -1 - k for k, point in enumerate(new)}
            most = most_new_points(size, len(self._grouped))
            padded = (new + [chosen[-1][0]] * most)[:most]
            for i, (block, (point, group)) in enumerate(zip(free, chosen, strict=False)):
                place = block * group_size // self._plan.rows
                of_row[block] = i * group_size + np.arange(group_size)
                of_place[place] = i
                prompts = self._grouped[group]
                blocks[block] = np.where(prompts < 0, -1, point * self._num_prompts + prompts)
                self._points[place] = point
            yield Fill(
                group=np.array([chosen[i][1] for i in index], np.int32),
                coords=np.array([points[chosen[i][0]] for i in index], np.float32).reshape(size, -1),
                new=np.array([points[point] for point in padded], np.float32).reshape(most, -1),
                source=np.array([known[chosen[i][0]] for i in index], np.int32),
                of_row=of_row.reshape(-1),
                of_place=of_place,
            )

    def compacted(self) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " places"]] | None:
        """The rows and places to go on with, once fewer slots are enough for them."""
        plan = self._plan
        if self._queue:
            return None
        # What stays together: rows, where all are at one point; otherwise places.
        size = 1 if plan.places == 1 else plan.rows
        few = plan.few if plan.places == 1 else plan.few // plan.rows
        chosen = np.flatnonzero(self.alive.reshape(-1, size).any(axis=1))
        if not 0 < len(chosen) <= few:
            return None
        kept = np.resize(chosen, few)
        rows = (kept[:, None] * size + np.arange(size)).reshape(-1)
        self.owners = np.where(np.arange(few * size) < len(chosen) * size, self.owners[rows], -1)
        return rows.astype(np.int32), (np.zeros(1, np.int32) if plan.places == 1 else kept.astype(np.int32))


class Results:
    """What the jobs came to."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        decided: Callable[[str], bool] | None,
        num_points: int,
        num_prompts: int,
    ) -> None:
        self._tokenizer, self._limit, self._decided = model.tokenizer, sampling.max_new_tokens, decided
        self._seen = np.zeros(num_points * num_prompts, int)  # tokens in which nothing was decided
        self._done: list[Completion | None] = [None] * (num_points * num_prompts)
        self._num_prompts, self._given = num_prompts, 0

    @property
    def complete(self) -> bool:
        return self._given * self._num_prompts == len(self._done)

    def settle(self, report: Generated, owners: Int[np.ndarray, " batch"]) -> set[int]:
        """Take what was generated by the rows of these owners; the jobs that this finishes."""
        out = jax.device_get(report)
        going = [(job, row) for row, job in enumerate(owners.tolist()) if job >= 0 and self._done[job] is None]
        texts = self._texts([out.tokens[row, : out.lengths[row]] for _, row in going])
        finished = set()
        for (job, row), text in zip(going, texts, strict=True):
            length, tokens = int(out.lengths[row]), out.tokens[row]
            if self._decided is not None and self._decided(text):
                # The row ends at the very token that decided, wherever the steps were cut into chunks.
                length = next(n for n in range(self._seen[job], length + 1) if self._is_decided(tokens[:n]))
                self._done[job] = Completion(self._texts([tokens[:length]])[0], length, cut=length < self._limit)
            elif out.ended[row]:
                self._done[job] = Completion(text, min(length + 1, self._limit), finite=bool(out.finite[row]))
            else:
                self._seen[job] = length
                continue
            finished.add(job)
        return finished

    def ready(self) -> Iterator[list[Completion]]:
        """The completions of the next points, as far as they are all there."""
        while not self.complete:
            start = self._given * self._num_prompts
            point = self._done[start : start + self._num_prompts]
            if None in point:
                return
            self._given += 1
            yield [completion for completion in point if completion is not None]

    def _is_decided(self, tokens: Int[np.ndarray, " _"]) -> bool:
        return self._decided is not None and self._decided(self._texts([tokens])[0])

    def _texts(self, rows: Sequence[Int[np.ndarray, " _"]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(
            [row.tolist() for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts
