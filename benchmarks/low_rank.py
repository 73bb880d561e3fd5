"""Measure what it costs that every point of a batch has a low-rank direction of its own.

    python benchmarks/low_rank.py                       # 256 directions × 4 prompts; some minutes on two CPU cores

The unperturbed model, and models that are perturbed along directions of each rank, decode in turns, from the same
batch: the prompts are prefilled once, and copied into the rows of every point. Reported are new tokens per second while
decoding, and the memory: weights, cache, factors, and the work space of the compiled decode program.
"""

import resource
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.directions.low_rank import low_rank_direction
from jaxscape.directions.stacked import stack
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.decode import Slots, Weights, compact, decode_chunk, empty_slots, insert, static_arguments
from jaxscape.engine.forms import Form
from jaxscape.engine.layout import pack
from jaxscape.engine.planner import Hardware, Planner
from jaxscape.engine.sampling import Sampling
from jaxscape.engine.scheduler import Scheduler
from jaxscape.runtime.hardware import Roofline, measure_roofline
from jaxscape.runtime.streams import write_line


@dataclass(frozen=True)
class LowRankBenchmark:
    """Measure what it costs that every point of a batch has a low-rank direction of its own."""

    model: str = "smollm2-135m"
    """A model, as in `jaxscape scan`."""
    dtype: str = "float32"
    """Dtype of weights and activations."""
    num_directions: int = 256
    """Number of directions, each with one point in the batch."""
    num_prompts: int = 4
    """Number of prompts at each point."""
    ranks: tuple[int, ...] = (1,)
    """The ranks to measure."""
    radius: float = 0.1
    """The coordinate of each point along its direction."""
    max_new_tokens: int = 32
    """Number of cache slots for new tokens in each row."""
    steps: int = 8
    """Number of decode steps in each measurement, in one call of the decode program as in a scan."""
    rounds: int = 5
    """How often each time is measured."""

    def run(self) -> None:
        if min(self.num_directions, self.num_prompts, self.steps, self.rounds) < 1:
            raise js.UserError("Give at least one direction, prompt, step and round.")
        if self.steps >= self.max_new_tokens:
            raise js.UserError(f"--max-new-tokens must be above the {self.steps} --steps, not {self.max_new_tokens}.")
        model = js.load_model(self.model, self.dtype)
        model = js.Model(**{**vars(model), "eos_token_ids": (-1,)})  # no row ends
        batch = Batch(model, js.load_prompts("harmful", self.num_prompts), self)
        seconds: dict[str, list[float]] = {name: [] for name in batch.weights}
        for number in range(self.rounds):
            for name, measured in seconds.items():
                measured.append(batch.seconds(name, self.steps))
                write_line(f"round {number + 1}, {name}: {measured[-1]:.2f} s for {self.steps} steps")
        speed = measure_roofline(self.dtype)
        write_line(f"{speed.flops / 1e9:.0f} GFLOP/s, {speed.bandwidth / 1e9:.1f} GB/s; {batch.plan}")
        for name, measured in seconds.items():
            tokens = batch.plan.layout.batch * self.steps / statistics.median(measured)
            shares = [100 * a / b for a, b in zip(seconds["unperturbed"], measured, strict=True)]
            write_line(
                f"{name}: {tokens:.0f} tokens/s, {statistics.median(shares):.1f} % of the unperturbed model "
                f"({min(shares):.1f} to {max(shares):.1f}); {batch.memory(name)}"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_line(f"peak resident memory of the process: {peak / 1e9:.2f} GB")


class Batch:
    """A batch with one point for each direction, and all prompts at each of them.

    Attributes:
        weights: what decodes in the batch, by name.
    """

    def __init__(self, model: js.Model, prompts: list[str], options: LowRankBenchmark) -> None:
        points = options.num_directions
        rows = tokenize(model, prompts, "default", options.max_new_tokens)
        workload = Workload(rows, Sampling(options.max_new_tokens), 1, 1, 1, num_sets=points, rank=max(options.ranks))
        engine_options = js.EngineOptions(slots=points * len(prompts))
        planner = Planner(model, workload, engine_options, Hardware(Roofline(1e11, 1e10), None, is_host=True))
        self.plan = next(plan for plan in planner.plans(Form.FACTORISED) if plan.layout.num_sets == points)
        self.weights = {"unperturbed": Weights(model.params)}
        for rank in options.ranks:
            directions = [low_rank_direction(model, rank, seed) for seed in range(points)]
            self.weights[f"rank {rank}"] = Weights(model.params, stack(directions, 1))
        self._coords = options.radius * np.eye(points, dtype=np.float32)
        self._static, self._stream = static_arguments(model, workload), jax.random.key(0, impl="threefry2x32")
        self._prefilled = self._prefill(model, workload)
        for name in self.weights:  # compiles
            self.seconds(name, 1)

    def _prefill(self, model: js.Model, workload: Workload) -> Slots:
        """The rows of one point, with all prompts prefilled by the unperturbed model."""
        layout = replace(self.plan.layout, points_in_flight=1, groups_per_insert=1, num_factored=0, num_sets=1)
        packed = pack(workload, layout.prompts_per_group)
        prefix, groups = jax.device_put(packed)
        slots = empty_slots(self._static, model.dtype, layout)
        for insertion in Scheduler(layout, packed[1], [()]).insertions():
            weights = self.weights["unperturbed"]
            slots = insert(weights, slots, prefix, groups, insertion, self._stream, static=self._static)
        return slots

    def _arguments(self, name: str, steps: int) -> tuple[Any, ...]:
        """The arguments of the decode program, with the prefilled rows at every point."""
        weights, layout = self.weights[name], self.plan.layout
        rows = np.tile(np.arange(layout.rows_per_point, dtype=np.int32), layout.points_in_flight)
        slots = compact(self._prefilled, rows, np.zeros(layout.points_in_flight, np.int32), static=self._static)
        coords = jax.numpy.asarray(self._coords if weights.directions else self._coords[:, :0])
        slots = slots._replace(coords=coords)
        return weights, slots, np.ones(layout.batch, bool), self._stream, np.int32(steps)

    def seconds(self, name: str, steps: int) -> float:
        """The time that a number of decode steps take."""
        arguments = jax.block_until_ready(self._arguments(name, steps))
        started = time.perf_counter()
        _, generated = jax.block_until_ready(decode_chunk(*arguments, static=self._static))
        elapsed = time.perf_counter() - started
        assert (np.asarray(generated.lengths) == 1 + steps).all()
        return elapsed

    def memory(self, name: str) -> str:
        """What lies in the device's memory while these weights decode."""
        weights, slots, *others = self._arguments(name, 1)
        program = decode_chunk.lower(weights, slots, *others, static=self._static).compile()
        work: Any = program.memory_analysis()
        parts = {
            "weights": size(weights.params),
            "cache": size((slots.cache, slots.prefix)),
            "factors": size(weights.directions),
            "work space": work.temp_size_in_bytes,
        }
        return ", ".join(f"{part} {number / 1e9:.2f} GB" for part, number in parts.items())


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    run_program(LowRankBenchmark)
