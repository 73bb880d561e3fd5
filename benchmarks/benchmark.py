"""Measure the speed and memory of the engine on a landscape along one random direction.

Run one of the four comparisons from the repository's root:

    python benchmarks/benchmark.py                      # with Hugging Face generate; an hour on two CPU cores
    python benchmarks/benchmark.py --compare fast       # whole scans, exact and fast; half an hour a round
    python benchmarks/benchmark.py --compare forms      # between forms of the weights; some minutes
    python benchmarks/benchmark.py --compare memory     # peak memory of a scan's process; a minute or two

The first one runs generate at batch 4, the default of the paper's code, and at the fastest of some larger batches. At
the points of the landscape the engine and both batch sizes take turns, with the same float32 weights, prompts and
numbers of new tokens. Reported ratios are medians over n rounds. To save time, a batch size with at least n batches
runs only every n-th batch in a round, other batches in each round, and the measured time is scaled up to all prompts.
With `--every N`, generate runs only at every N-th point in a round, other points in each round, and of ten or more
batches it runs every tenth; the ratios are those of the points where it ran.
"""

import copy
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.cli.options import DEFAULT_MODEL
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.engine.scheduler import Completion
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.landscapes.landscape import SHARES
from jaxscape.models.checkpoint import named_leaves
from jaxscape.report.tables import landscape_cells
from jaxscape.runtime.hardware import measure_roofline
from jaxscape.runtime.streams import write_line

EVERY_BATCH = 10  # of many small batches, each tenth one stands for all

Direction = Any
"""A tree like `model.params`."""


class Answer(NamedTuple):
    """An answer of Hugging Face generate, without its end token."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Benchmark:
    """Measure the speed and memory of the engine on a landscape along one random direction."""

    compare: Literal["reference", "fast", "forms", "memory"] = "reference"
    """reference compares the engine with Hugging Face generate; fast compares a scan that evaluates all points and
    decodes all answers with one that is adaptive and abandons incoherent answers, and with generate; forms compares the
    factorised with the materialised form of the weights, and a 2D with a 1D landscape; memory compares the peak memory
    of a scan's process with that of a process that only starts."""
    model: str = DEFAULT_MODEL
    """A model, as in `jaxscape scan`."""
    prompts: str = "advbench"
    """A prompt set, as in `jaxscape scan`."""
    num_prompts: int | None = None
    """Number of prompts; by default 80, and 4 to compare forms."""
    steps: int = 20
    """Number of intervals along the direction, from -RADIUS to RADIUS."""
    radius: float = 0.5
    """Largest coordinate along the direction."""
    max_new_tokens: int = 64
    """Maximum number of tokens generated for a prompt."""
    rounds: int = 3
    """How often each time is measured."""
    every: int = 1
    """Hugging Face generate runs only at every N-th point in a round, if it is compared with the engine alone."""
    batch_sizes: tuple[int, ...] = (20, 40, 80)
    """Batch sizes of Hugging Face generate, of which the fastest is compared besides batch 4."""

    def run(self) -> None:
        if self.rounds < 1:
            raise js.UserError(f"--rounds must be at least 1, not {self.rounds}.")
        if not 1 <= self.every <= self.steps + 1:
            raise js.UserError(
                f"--every must be from 1 to {self.steps + 1}, the number of points, but it is {self.every}."
            )
        prompts = js.load_prompts(self.prompts, self.num_prompts or (4 if self.compare == "forms" else 80))
        if self.compare == "memory":
            self._compare_memory(len(prompts))
            return
        compile_seconds = count_compile_seconds()
        model = js.load_model(self.model, "float32")
        (axis,) = symmetric_axes(1, self.steps, self.radius)
        task = Task(model, prompts, Sampling(self.max_new_tokens), axis.values)
        if self.compare == "fast":
            compare_fast(task, self.rounds, self.batch_sizes, self.steps, self.radius)
        elif self.compare == "forms":
            compare_forms(task, self.rounds)
        else:
            compare_reference(task, self.rounds, self.every, self.batch_sizes, compile_seconds)

    def _compare_memory(self, num_prompts: int) -> None:
        scan = ["scan", "--model", self.model, "--prompts", self.prompts, "--num-prompts", str(num_prompts)]
        scan += ["--max-new-tokens", str(self.max_new_tokens), "--steps", "2", "--dtype", "float32"]
        start_code = "import jax, jaxscape as js; js.scan; js.load_model; jax.numpy.ones(1).block_until_ready()"
        with tempfile.TemporaryDirectory() as directory:
            scan += ["--out", f"{directory}/run"]
            start, peak = peak_memory(start_code), peak_memory(f"from jaxscape.cli.main import main; main({scan!r})")
        write_line(f"peak resident memory: {peak / 1e9:.2f} GB, of which {start / 1e9:.2f} GB before any weights")


@dataclass(frozen=True)
class Task:
    """What is computed: the answers to prompts at the points of a line.

    Attributes:
        alphas: the coordinate of each point.
    """

    model: js.Model
    prompts: Sequence[str]
    sampling: Sampling
    alphas: Sequence[float]

    def tokenized(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return tokenize(self.model, self.prompts, "default", self.sampling.max_new_tokens)

    def engine(self, form: str, ndim: int = 1, full_text: bool = False) -> Engine:
        """An engine for this line, or with `ndim` 2 for a grid with such a line along both axes."""
        num_points = len(self.alphas)
        workload = Workload(self.tokenized(), self.sampling, num_points**ndim, num_points, ndim, num_random=ndim)
        plan = make_plan(self.model, workload, js.EngineOptions(form=form))  # type: ignore[arg-type]
        return Engine(self.model, workload, plan, None if full_text else js.is_refusal)


def compare_forms(task: Task, rounds: int) -> None:
    """Compare the speed of the factorised and the materialised form on a line, and that of a line and a 2D grid.

    All answers are generated to their ends.
    """
    directions = js.make_directions([0, 1], task.model)
    line: list[tuple[float, ...]] = [(alpha,) for alpha in task.alphas]
    # The engine decodes each line of a grid by itself, so every fifth line is enough.
    grid: list[tuple[float, ...]] = list(itertools.product(task.alphas[::5], task.alphas))
    contestants: dict[str, tuple[Engine, list[Direction], list[tuple[float, ...]]]] = {
        "materialised": (task.engine("materialised", full_text=True), directions[:1], line),
        "factorised": (task.engine("factorised", full_text=True), directions[:1], line),
        "factorised grid": (task.engine("factorised", ndim=2, full_text=True), directions, grid),
    }
    seconds_per_point = defaultdict(list)
    texts = {}
    for round_number in range(-1, rounds):
        is_warm_up = round_number < 0  # compiles, and does not count
        for name, (engine, engine_directions, all_points) in contestants.items():
            points = all_points[: 2 * len(line)] if is_warm_up else all_points
            started = time.perf_counter()
            texts[name] = [[c.text for c in completions] for completions in engine.complete(engine_directions, points)]
            if not is_warm_up:
                seconds_per_point[name].append((time.perf_counter() - started) / len(points))
    for name, (engine, _, points) in contestants.items():
        median = 1e3 * statistics.median(seconds_per_point[name])
        write_line(
            f"{name}, {len(points)} points x {len(task.prompts)} prompts: {median:.1f} ms a point; {engine.plan}"
        )
    for slower, faster in (("materialised", "factorised"), ("factorised", "factorised grid")):
        write_ratios(f"{slower} / {faster}", seconds_per_point[slower], seconds_per_point[faster])
    same_texts = sum(a == b for a, b in zip(texts["materialised"], texts["factorised"], strict=True))
    asr = [[js.attack_success_rate(point) for point in texts[name]] for name in ("materialised", "factorised")]
    same_asr = sum(map(float.__eq__, *asr))
    write_line(f"the two forms give the same texts at {same_texts} of {len(line)} points, the same ASR at {same_asr}")


def compare_reference(
    task: Task, rounds: int, every: int, batch_sizes: Sequence[int], compile_seconds: dict[str, float]
) -> None:
    """Compare the engine with Hugging Face generate, which in each round runs at every `every`-th point."""
    points = [(alpha,) for alpha in task.alphas]
    engine = task.engine("auto")
    (direction,) = js.make_directions([0], task.model, engine.plan.storage)
    reference = Reference(task, direction)
    write_line(f"engine: {engine.plan}")
    engine.seconds = {}
    started = time.perf_counter()
    next(engine.complete([direction], points[:1]))
    list(engine.complete([direction], [(0.0,)]))
    seconds = time.perf_counter() - started
    write_line(f"first two points, with {sum(compile_seconds.values()):.1f} s of compilation: {seconds:.1f} s")

    trial = {size: sum(reference.timed(alpha, size)[0] for alpha in (0.0, task.alphas[0])) for size in batch_sizes}
    fastest = min(trial, key=lambda size: trial[size])
    trial_text = ", ".join(f"batch {size} {seconds:.1f} s" for size, seconds in trial.items())
    write_line(f"generate, centre and first point: {trial_text}")

    engine.seconds = {}
    sizes = {f"batch {size}": size for size in (4, fastest)}
    # times[contestant][round][point] is in seconds, and has only the points where the contestant ran in that round.
    # answers[contestant][point][prompt] has only the prompts that the contestant answered.
    times: dict[str, list[dict[int, float]]] = {name: [] for name in ("engine", *sizes)}
    answers: dict[str, list[dict[int, Answer]]] = {name: [{} for _ in points] for name in sizes}
    completions: list[list[Completion]] = []
    every_batch = rounds if every == 1 else EVERY_BATCH
    for round_number in range(rounds):
        for contestant_times in times.values():
            contestant_times.append({})
        visited = range(round_number % every, len(points), every)
        completions = []
        remaining = engine.complete([direction], points)
        for index, (alpha,) in enumerate(points):
            started = time.perf_counter()
            completions.append(next(remaining))
            times["engine"][-1][index] = time.perf_counter() - started
            if index not in visited:
                continue
            for name, size in sizes.items():
                seconds, new_answers = reference.timed(alpha, size, round_number, every_batch)
                times[name][-1][index] = seconds
                answers[name][index] |= new_answers
        totals = (f"{name} {sum(all_times[-1].values()):.1f} s" for name, all_times in times.items())
        write_line(f"round {round_number + 1}: {', '.join(totals)}; generate at {len(visited)} points")

    for name in sizes:
        seconds_of = [sum(seconds.values()) for seconds in times[name]]
        engine_seconds = [
            sum(seconds[index] for index in there) for seconds, there in zip(times["engine"], times[name], strict=True)
        ]
        write_ratios(f"{name} / engine", seconds_of, engine_seconds)
    median = statistics.median(sum(seconds.values()) for seconds in times["engine"])
    report_utilisation(engine, completions, median, rounds)
    report_answers(task, reference, engine, completions, answers)


def compare_fast(task: Task, rounds: int, batch_sizes: Sequence[int], steps: int, radius: float) -> None:
    """Compare the seconds and the numbers of an exact scan and a fast one, both with shares and without the compilation
    of programs, and the seconds that generate takes for the same points."""
    options: dict[str, Any] = {"prompts": task.prompts, "steps": steps, "radius": radius, "progress": False}
    options |= {"max_new_tokens": task.sampling.max_new_tokens}
    modes: dict[str, dict[str, Any]] = {"exact": {}, "fast": {"adaptive": True, "abandon_incoherent": True}}
    (direction,) = js.make_directions([0], task.model)
    reference = Reference(task, direction)
    trial = {size: reference.timed(task.alphas[0], size)[0] for size in batch_sizes}
    sizes = {f"batch {size}": size for size in (4, min(trial, key=lambda size: trial[size]))}
    times: dict[str, list[float]] = {name: [] for name in (*modes, *sizes)}
    landscapes = {}
    for round_number in range(-1, rounds):
        for name, mode in modes.items():
            started = time.perf_counter()
            grid = {"steps": 4} if round_number < 0 else {}  # the first round compiles, and does not count
            landscapes[name] = js.scan(task.model, [0], **(options | mode | grid))
            times[name].append(time.perf_counter() - started)
        if round_number < 0:
            for name in modes:
                times[name].clear()
            continue
        for name, size in sizes.items():
            times[name].append(sum(reference.timed(alpha, size, round_number, EVERY_BATCH)[0] for alpha in task.alphas))
        write_line(", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in times.items()))
    for name in ("exact", *sizes):
        write_ratios(f"{name} / fast", times[name], times["fast"])
    write_line(f"fast: {landscapes['fast'].num_evaluated} points, {landscapes['fast'].abandoned_text}")
    exact = landscapes["exact"]
    for name, landscape in landscapes.items():
        write_line(f"{name}: " + ", ".join(f"{title} {cell}" for title, cell in landscape_cells(landscape).items()))
    for kind in SHARES:
        low, high, share = exact.shares[f"{kind}_low"], exact.shares[f"{kind}_high"], landscapes["fast"].shares[kind]
        outside = int(((share < low) | (share > high)).sum())
        write_line(
            f"{kind}: {outside} of {share.size} points of the fast scan outside the intervals of the exact one; they "
            f"differ by at most {np.abs(share - exact.shares[kind]).max():.1f} points of a hundred"
        )


def write_ratios(name: str, numerators: Sequence[float], denominators: Sequence[float]) -> None:
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    write_line(f"{name}: {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def report_utilisation(engine: Engine, completions: list[list[Completion]], total: float, rounds: int) -> None:
    """Write the engine's seconds in each phase, and the share of the peak FLOP/s that the useful FLOPs reached.

    Arguments:
        total: median of the seconds that a round takes.
    """
    seconds = {phase: value / rounds for phase, value in (engine.seconds or {}).items()}
    seconds["host"] = total - sum(seconds.values())
    write_line("engine, a round: " + ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items()))
    flops = useful_flops(engine, completions)
    flops["all"] = sum(flops.values())
    peak = measure_roofline("float32").flops
    write_line(
        f"peak of a large matrix product: {peak / 1e9:.0f} GFLOP/s; useful arithmetic, and its share of the peak:"
    )
    for phase, count in flops.items():
        share = 100 * count / seconds.get(phase, total) / peak
        write_line(f"  {phase}: {count / 1e12:.2f} TFLOP, {share:.1f} %")


def useful_flops(engine: Engine, completions: list[list[Completion]]) -> dict[str, float]:
    """FLOPs of the tokens that had to be computed, in products with weights and in attention, by phase.

    These tokens are the common prefix once for each point, each prompt's own tokens, and the generated tokens.
    """
    config = engine.model.config
    sizes = {name: leaf.size for name, leaf in named_leaves(engine.model.params).items() if leaf.ndim > 1}
    head = config.vocab_size * config.hidden_size
    layers = sum(sizes.values()) - sizes["model.embed_tokens.weight"] - sizes.get("lm_head.weight", 0)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim  # for each token that a token attends to
    prefix = engine.workload.prefix_length
    prefill = decode = 0.0
    for point in completions:
        prefill += 2 * layers * prefix + attention * prefix**2 / 2
        for tokens, completion in zip(engine.workload.prompt_tokens, point, strict=True):
            own, steps = len(tokens) - prefix, completion.length - 1  # the prefill generates the first token
            prefill += 2 * layers * own + 2 * head + attention * own * (prefix + own / 2)
            decode += steps * (2 * layers + 2 * head + attention * (len(tokens) + steps / 2))
    return {"prefill": prefill, "decode": decode}


def report_answers(
    task: Task,
    reference: "Reference",
    engine: Engine,
    completions: list[list[Completion]],
    answers: dict[str, list[dict[int, Answer]]],
) -> None:
    """Write each contestant's ASR at the points where it answered all prompts, and how close to a tie the logits are
    where texts begin to differ."""
    texts = {"engine": [[c.text for c in point] for point in completions]}
    for name, points in answers.items():
        texts[name] = [[answer.text for answer in point.values()] for point in points]
    write_line("ASR, where all prompts were answered:")
    write_line("alpha   " + "".join(f"{name:>12}" for name in texts))
    for i, alpha in enumerate(task.alphas):
        answered = [all_points[i] for all_points in texts.values()]
        cells = [f"{js.attack_success_rate(x):.2f}%" if len(x) == len(task.prompts) else "" for x in answered]
        write_line(f"{alpha:+.3f}  " + "".join(f"{cell:>12}" for cell in cells))
    engine_tokens = EngineTokens(engine, reference.direction)
    for name, points in answers.items():
        differing = []
        given = [(i, p, answer) for i, point in enumerate(points) for p, answer in sorted(point.items())]
        for i, p, answer in given:
            completion = completions[i][p]
            is_same = answer.text.startswith(completion.text) if completion.cut else answer.text == completion.text
            if not is_same:
                same_outcome = js.is_refusal(completion.text) == js.is_refusal(answer.text)
                differing.append((same_outcome, task.alphas[i], p, answer.tokens))
        changed = sum(not same_outcome for same_outcome, *_ in differing)
        of = f"{len(differing)} of {len(given)} texts"
        write_line(f"{name}: {of} differ from the engine's, {changed} in their outcome")
        for _, alpha, p, tokens in sorted(differing)[:10]:
            tie = reference.describe_tie(alpha, p, engine_tokens.at(alpha)[p], tokens)
            write_line(f"  alpha {alpha:+.3f}, prompt {p}: {tie}")


class EngineTokens:
    """The token ids of the engine's answers, generated to their ends.

    The engine returns texts. Here its tokenizer is replaced by one that writes token ids as numbers.
    """

    def __init__(self, engine: Engine, direction: Direction) -> None:
        tokenizer = copy.copy(engine.model.tokenizer)
        tokenizer.batch_decode = lambda rows, **_: [" ".join(map(str, row)) for row in rows]
        model = replace(engine.model, tokenizer=tokenizer)
        self._engine = Engine(model, engine.workload, engine.plan)
        self._direction = direction

    @functools.cache  # noqa: B019 (lives as long as the program)
    def at(self, alpha: float) -> list[list[int]]:
        """The token ids of the answer to each prompt at a point."""
        (point,) = self._engine.complete([self._direction], [(alpha,)])
        return [list(map(int, completion.text.split())) for completion in point]


class Reference:
    """Hugging Face generate on PyTorch, with the same weights."""

    def __init__(self, task: Task, direction: Direction) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise js.UserError(
                f"Hugging Face generate needs PyTorch ({error}): run pip install 'jaxscape[test]'."
            ) from error
        self._torch, self._task, self.direction = torch, task, direction
        with tempfile.TemporaryDirectory() as directory:
            js.save_model(task.model, directory)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._tokenizer = task.model.tokenizer
        self._tokenizer.padding_side = "left"
        self._pad = self._tokenizer.pad_token_id or task.model.eos_token_ids[0]
        self._prompts = task.tokenized()
        self._alpha: float | None = None  # the point that the model's weights are at

    def move_to(self, alpha: float) -> None:
        """Set the model's weights to those of a point."""
        if alpha == self._alpha:
            return
        point = named_leaves(js.model_at(self._task.model, [self.direction], [alpha]).params)
        state = self._model.state_dict()
        with self._torch.no_grad():
            for name, weight in point.items():
                state[name].copy_(self._torch.from_numpy(np.array(weight)))
        self._alpha = alpha

    def timed(
        self, alpha: float, batch_size: int, round_number: int = 0, rounds: int = 1
    ) -> tuple[float, dict[int, Answer]]:
        """Seconds for all prompts at a point, and the answers by prompt.

        If there are at least `rounds` batches, only every `rounds`-th is run; the seconds are then scaled up to all
        prompts, and the answers are only those of the batches that were run.
        """
        self.move_to(alpha)
        num_prompts = len(self._prompts)
        batches = [range(i, min(i + batch_size, num_prompts)) for i in range(0, num_prompts, batch_size)]
        batches_to_run = batches[round_number % rounds :: rounds] if len(batches) >= rounds else batches
        answers: dict[int, Answer] = {}
        started = time.perf_counter()
        for batch in batches_to_run:
            answers |= zip(batch, self._generate([self._prompts[i] for i in batch]), strict=True)
        seconds = time.perf_counter() - started
        return seconds * num_prompts / sum(map(len, batches_to_run)), answers

    def _generate(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        torch, width = self._torch, max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (width - len(tokens)) + list(tokens) for tokens in prompts])
        mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts])
        eos = list(self._task.model.eos_token_ids)
        with torch.no_grad():
            output = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self._task.sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=self._pad,
            )
        new = [list(itertools.takewhile(lambda token: token not in eos, row)) for row in output[:, width:].tolist()]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [Answer(text, tokens) for text, tokens in zip(texts, new, strict=True)]

    def describe_tie(self, alpha: float, prompt: int, engine_tokens: list[int], tokens: list[int]) -> str:
        """A text: at which token two answers to a prompt begin to differ, and PyTorch's logits of both tokens."""
        self.move_to(alpha)
        end = self._task.model.eos_token_ids[0]
        pairs = enumerate(itertools.zip_longest(engine_tokens, tokens, fillvalue=end))
        index, (a, b) = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (0, (end, end)))
        with self._torch.no_grad():
            row = self._torch.tensor([[*self._prompts[prompt], *tokens[:index]]])
            logits = self._model(row).logits[0, -1].tolist()
        return f"they part at token {index}, where PyTorch's logits at batch 1 are {logits[a]:.6f} and {logits[b]:.6f}"


def count_compile_seconds() -> dict[str, float]:
    """A dictionary in which JAX adds up the seconds that it spends on compilation from now on."""
    seconds: dict[str, float] = defaultdict(float)

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds[event] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    return seconds


def peak_memory(code: str) -> int:
    """Run Python code in a new process, and return the peak of its resident memory in bytes."""
    code += "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.split()[-1])


if __name__ == "__main__":
    run_program(Benchmark)
