"""The engine: answers prompts at many landscape points with continuous batching: finished rows take the next prompts.

Pairs of a point and a group of prompts wait in a queue. The loop repeats four steps until all answers are finished:
  1. Insert waiting groups into free rows.
  2. When no group waits and the unfinished rows fit into a smaller batch, move them there.
  3. Decode a few tokens in all rows.
  4. Read the tokens, end the rows whose outcome is decided, and free them.
The tokens of an answer do not depend on when it is inserted, moved or read.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import jax
import numpy as np
from jaxtyping import Int

from jaxscape.directions.point import materialise, materialise_by_tensor
from jaxscape.directions.stacked import Stacked, stack
from jaxscape.directions.storage import Direction, concatenated
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.decode import (
    Generated,
    Slots,
    Weights,
    compact,
    decode_chunk,
    empty_slots,
    insert,
    static_arguments,
)
from jaxscape.engine.layout import pack
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Plan, make_plan
from jaxscape.engine.platforms import platform_of
from jaxscape.engine.sampling import Sampling, SamplingOptions
from jaxscape.engine.scheduler import Abandon, Completion, Coords, Results, Scheduler, StopWhen
from jaxscape.models.checkpoint import Params
from jaxscape.models.fusion import fuse
from jaxscape.models.model import Model
from jaxscape.runtime.errors import as_texts
from jaxscape.runtime.sharding import replicated


@dataclass
class Engine:
    """Answers the prompts of a workload at any number of points.

    Attributes:
        stop_when: called with the text of an unfinished answer; True ends the answer at the first token with which
            that holds. None generates every answer to its end.
        abandon: says which answers end because of their first tokens, although their outcome is not decided.
        on_finished: called with the number of answers that have just been finished, at whichever points.
        seconds: a dictionary in which the seconds spent in the phases `weights`, `prefill` and `decode` are added up.
            The host then waits for each program to end; with None, it does not and nothing is measured.
    """

    model: Model
    workload: Workload
    plan: Plan
    stop_when: StopWhen | None = None
    abandon: Abandon | None = None
    on_finished: Callable[[int], None] | None = None
    seconds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        layout = self.plan.layout
        prefix, self._groups = pack(self.workload, layout.prompts_per_group, layout.rows_per_group)
        # The prompts stay on the devices for the whole run.
        self._prompts_on_device = jax.device_put((prefix, self._groups), replicated(self.model.mesh))
        self._stream = jax.random.key(self.workload.sampling.seed, impl="threefry2x32")
        self._static = static_arguments(self.model, self.workload, self.plan.is_fused)
        self._slots: Slots | None = None
        self._unperturbed: Params | None = None  # the model's parameters as they are decoded

    @property
    def block(self) -> int:
        """Number of prompts of each block but the last, see `Workload.block`."""
        return self.plan.layout.num_groups * self.plan.layout.prompts_per_group

    def complete(
        self, directions: Sequence[Direction], points: Sequence[Coords], block: int = 0
    ) -> Iterator[list[Completion]]:
        """For each point in order: the answers to the prompts of a block; by default, a block holds all prompts.

        Arguments:
            directions: those of a direction set; or of up to `plan.layout.num_sets` sets, set by set.
            points: coordinates along all these directions; those along directions of other sets are 0.
        """
        params, layout = None, self.plan.layout
        added = max(0, len(directions) - layout.num_factored)  # number of directions that are added to the weights
        if self.plan.form.batches_points:
            batches = itertools.groupby(points, key=lambda coords: tuple(coords[:added]))
        else:
            batches = ((tuple(coords), iter([coords])) for coords in points)  # type: ignore[assignment]
        factored = self._factored(directions[added:])
        for coords, batch in batches:
            params = self._params_at(directions[:added], coords, params)
            weights = Weights(params, factored)
            missing = (0.0,) * (layout.num_factored - len(directions) + added)
            yield from self._decode(weights, [(*point[added:], *missing) for point in batch], block=block)

    def _factored(self, directions: Sequence[Direction]) -> tuple[Direction, ...] | Stacked:
        """The directions that are multiplied separately, as the programs take them."""
        layout = self.plan.layout
        if self.plan.is_fused:
            directions = [fuse(direction, concatenated) for direction in directions]
        if directions:  # the programs are compiled for a number of directions: the last sets may have fewer
            directions = [*directions, *[directions[-1]] * (layout.num_factored - len(directions))]
        if layout.num_sets > 1 and self.workload.rank is not None:
            return stack(directions, self.workload.ndim)
        return tuple(directions)

    def answers(self, count: int) -> Iterator[list[Completion]]:
        """The answers of the model itself, `count` prompts at a time, in the order of the prompts.

        Arguments:
            count: divides the number of prompts.
        """
        yield from self._decode(Weights(self._params_at((), (), None), ()), [()], count)

    def _params_at(self, directions: Sequence[Direction], coords: Coords, previous: Params | None) -> Params:
        """The parameters at a point, in the buffers of the previous point's parameters."""
        form = self.plan.form
        if not directions and not form.keeps_weights_on_host:
            if self._unperturbed is None:
                self._unperturbed = fuse(self.model.params) if self.plan.is_fused else self.model.params
            return self._unperturbed
        at: Callable[..., Params] = partial(materialise, is_fused=self.plan.is_fused)
        draws = self.plan.storage == "seed" and platform_of(self.model.mesh).draws_by_tensor
        if form.keeps_weights_on_host or draws:
            at = partial(materialise_by_tensor, shardings=self.model.shardings)
        return self._timed("weights", at, self.model.params, directions, np.asarray(coords, np.float32), previous)

    def _decode(
        self, weights: Weights, points: Sequence[Coords], count: int | None = None, block: int = 0
    ) -> Iterator[list[Completion]]:
        """The answers to a block's prompts at all points, `count` at a time; by default all answers of a point."""
        scheduler = Scheduler(self.plan.layout, self._groups, points, block)
        limit, count = self.workload.sampling.max_new_tokens, count or scheduler.num_prompts
        num_given = len(points) * scheduler.num_prompts // count
        first, num_prompts = block * self.block, scheduler.num_prompts
        abandon = self.abandon and self.abandon.renumbered(lambda job: first + job % num_prompts)
        results = Results(self.model.tokenizer, limit, self.stop_when, num_given, count, abandon)
        slots, self._slots = self._slots, None
        if slots is None:
            slots = empty_slots(self._static, self.model.dtype, self.plan.layout)
        # Where in its ring a row begins decides the order of attention's sums. It must not depend on earlier points.
        slots = slots._replace(clock=jax.device_put(np.int32(0), slots.clock.sharding))
        reports: deque[tuple[Generated, Int[np.ndarray, " batch"]]] = deque()
        run = partial(self._timed, static=self._static)
        steps = 1
        while not results.is_complete:
            for insertion in scheduler.insertions():
                steps = 1
                slots = run("prefill", insert, weights, slots, *self._prompts_on_device, insertion, self._stream)
            if (smaller := scheduler.compacted()) is not None:
                slots = run("decode", compact, slots, *smaller)
            # A refusal shows in the first tokens, so the first chunks are short.
            steps = min(2 * steps, self.plan.chunk)
            chunk = (scheduler.is_alive, self._stream, np.asarray(steps, np.int32))
            slots, generated = run("decode", decode_chunk, weights, slots, *chunk)
            reports.append((generated, scheduler.jobs.copy()))
            if len(reports) > self.plan.chunks_in_flight:
                finished = results.record(*reports.popleft())
                scheduler.free(finished)
                if finished and self.on_finished is not None:
                    self.on_finished(len(finished))
            yield from results.ready()
        is_whole = len(slots.prompt_ids) == self.plan.layout.batch
        self._slots = slots if is_whole else None

    def _timed(self, phase: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **options)
        if self.seconds is not None:
            jax.block_until_ready(result)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        return result


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    system_prompt: str = "default",
    thinking: str = "default",
    options: EngineOptions | None = None,
    **sampling: Unpack[SamplingOptions],
) -> list[str]:
    """The model's answers to prompts, each given as a user turn in the model's chat format.

    Arguments:
        system_prompt, thinking: see `jaxscape.prompts.chat_format.chat_text`.
        options: see `jaxscape.engine.options.EngineOptions`.
        sampling: `max_new_tokens`, `temperature`, `top_k`, `top_p` and `seed`, see
            `jaxscape.engine.sampling.Sampling`.

    Returns:
        One text for each prompt. It ends before the model's end token and contains no special tokens. What the model
        thinks before its answer is part of it. It is a model's output and not to be trusted.

    Raises:
        UserError: there are no prompts, a single text is given instead of a list, a prompt is too long for the model,
            or an option is out of range.
    """
    settings = Sampling(**sampling)
    texts = as_texts(prompts, "prompts")
    workload = Workload(tokenize(model, texts, system_prompt, settings.max_new_tokens, thinking), settings)
    engine = Engine(model, workload, make_plan(model, workload, options))
    return [completion.text for completion in next(engine.complete((), [()]))]
