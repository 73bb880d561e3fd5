"""How fast is the engine, beside Hugging Face generate or one form beside another, and how much memory does it take?

`python benchmarks/benchmark.py` compares it with generate at batch 4, as the paper's code uses it, and at the best of
some larger batches. All contestants take turns at every point of the landscape, with the same float32 weights, prompts
and numbers of new tokens; figures are medians over rounds. In a round, a contestant with many batches runs every n-th
of them only, another part in each of the n rounds, and its time is multiplied.
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
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape import save_model
from jaxscape.cli.main import run_program
from jaxscape.cli.options import DEFAULT_MODEL, write_line
from jaxscape.directions.kinds import make_directions
from jaxscape.directions.point import materialise
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.engine.scheduler import Completion
from jaxscape.evaluate.keywords import attack_success_rate, is_refusal
from jaxscape.landscapes.axes import symmetric_axes
from jaxscape.models.checkpoint import Params, named_leaves
from jaxscape.models.model import Model, load_model
from jaxscape.prompts.sets import load_prompts
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.hardware import measure_roofline

Answer = tuple[str, list[int]]
"""A text, and its tokens."""


@dataclass(frozen=True)
class Benchmark:
    """Time the engine on a landscape along one random direction."""

    compare: Literal["reference", "forms", "memory"] = "reference"
    """reference: with Hugging Face generate. forms: factorised with materialised, and a grid with a line. memory: the
    peak of a scan's process."""
    model: str = DEFAULT_MODEL
    prompts: str = "advbench"
    """As in a scan."""
    num_prompts: int | None = None
    """By default 80, and 4 to compare forms."""
    steps: int = 20
    radius: float = 0.5
    max_new_tokens: int = 64
    rounds: int = 3
    batch_sizes: tuple[int, ...] = (20, 40, 80)
    """Of which Hugging Face generate uses the best, beside 4."""

    def run(self) -> None:
        if self.rounds < 1:
            raise UserError(f"The number of rounds must be at least 1, not {self.rounds}.")
        prompts = load_prompts(self.prompts, self.num_prompts or (4 if self.compare == "forms" else 80))
        if self.compare == "memory":
            self._memory(len(prompts))
            return
        compiled = compile_seconds()
        model = load_model(self.model, "float32")
        (axis,) = symmetric_axes(1, self.steps, self.radius)
        setting = Setting(model, prompts, Sampling(self.max_new_tokens), axis.values)
        if self.compare == "forms":
            compare_forms(setting, self.rounds)
        else:
            compare_reference(setting, self.rounds, self.batch_sizes, compiled)

    def _memory(self, num_prompts: int) -> None:
        """The peak of a process that scans, beside one that only starts."""
        scan = ["scan", "--model", self.model, "--prompts", self.prompts, "--num-prompts", str(num_prompts)]
        scan += ["--max-new-tokens", str(self.max_new_tokens), "--steps", "2", "--dtype", "float32"]
        with tempfile.TemporaryDirectory() as out:
            started = peak_of("import jaxscape.cli, jax; jax.numpy.ones(1).block_until_ready()")
            scanned = peak_of(f"from jaxscape.cli import main; main({[*scan, '--out', out + '/run']!r})")
        write_line(f"peak resident memory: {scanned / 1e9:.2f} GB, of which {started / 1e9:.2f} before any weights")


@dataclass(frozen=True)
class Setting:
    """What is computed."""

    model: Model
    prompts: Sequence[str]
    sampling: Sampling
    alphas: Sequence[float]

    def engine(self, form: str, ndim: int = 1, whole: bool = False) -> Engine:
        rows = tokenize(self.model, self.prompts, "default", self.sampling.max_new_tokens)
        line = len(self.alphas)
        workload = Workload(rows, self.sampling, line**ndim, points_per_line=line, ndim=ndim, num_random=ndim)
        plan = make_plan(self.model, workload, EngineOptions(form=form))  # type: ignore[arg-type]
        return Engine(self.model, workload, plan, None if whole else is_refusal)


def compare_forms(setting: Setting, rounds: int) -> None:
    """Factorised beside materialised on a line, and lines of a grid beside that line, all with whole texts."""
    directions = make_directions([0, 1], setting.model)
    line: list[tuple[float, ...]] = [(alpha,) for alpha in setting.alphas]
    # Every fifth line of the grid: each line of it is decoded on its own.
    grid: list[tuple[float, ...]] = list(itertools.product(setting.alphas[::5], setting.alphas))
    contestants: dict[str, tuple[Engine, list[Params], list[tuple[float, ...]]]] = {
        "materialised": (setting.engine("materialised", whole=True), directions[:1], line),
        "factorised": (setting.engine("factorised", whole=True), directions[:1], line),
        "factorised grid": (setting.engine("factorised", ndim=2, whole=True), directions, grid),
    }
    seconds = defaultdict(list)
    texts = {}
    for number in range(-1, rounds):  # the first round compiles, and does not count
        for name, (engine, along, points) in contestants.items():
            chosen = points[: 2 * len(line)] if number < 0 else points
            started = time.perf_counter()
            texts[name] = [[c.text for c in point] for point in engine.complete(along, chosen)]
            if number >= 0:
                seconds[name].append((time.perf_counter() - started) / len(chosen))
    for name, (engine, _, points) in contestants.items():
        each = 1e3 * statistics.median(seconds[name])
        write_line(
            f"{name}, {len(points)} points x {len(setting.prompts)} prompts: {each:.1f} ms a point; {engine.plan}"
        )
    for above, below in (("materialised", "factorised"), ("factorised", "factorised grid")):
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        write_line(
            f"{above} / {below}: {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        )
    same = sum(a == b for a, b in zip(texts["materialised"], texts["factorised"], strict=True))
    asr = [[attack_success_rate(point) for point in texts[name]] for name in ("materialised", "factorised")]
    write_line(f"texts are the same at {same} of {len(line)} points, ASR at {sum(map(float.__eq__, *asr))}")


def compare_reference(setting: Setting, rounds: int, batch_sizes: Sequence[int], compiled: dict[str, float]) -> None:
    model, points = setting.model, [(alpha,) for alpha in setting.alphas]
    (direction,) = make_directions([0], model)
    reference = Reference(setting, direction)
    engine = setting.engine("auto")
    write_line(f"engine: {engine.plan}")
    engine.seconds = {}
    started = time.perf_counter()
    next(engine.complete([direction], points[:1]))
    list(engine.complete([direction], [(0.0,)]))
    write_line(
        f"first two points, with {sum(compiled.values()):.1f} s of compilation: {time.perf_counter() - started:.1f} s"
    )

    trial = {size: sum(reference.timed(alpha, size)[0] for alpha in (0.0, setting.alphas[0])) for size in batch_sizes}
    best = min(trial, key=lambda size: trial[size])
    write_line("generate, centre and first point: " + ", ".join(f"batch {size} {s:.1f} s" for size, s in trial.items()))

    engine.seconds = {}
    times: dict[str, list[list[float]]] = {name: [] for name in ("engine", "batch 4", f"batch {best}")}
    completions: list[list[Completion]] = []
    answers: dict[str, list[dict[int, Answer]]] = {name: [{} for _ in points] for name in times if name != "engine"}
    for number in range(rounds):
        for record in times.values():
            record.append([])
        completions = []
        stepping = engine.complete([direction], points)
        for index, (alpha,) in enumerate(points):
            started = time.perf_counter()
            completions.append(next(stepping))
            times["engine"][-1].append(time.perf_counter() - started)
            for name, size in (("batch 4", 4), (f"batch {best}", best)):
                elapsed, part = reference.timed(alpha, size, number, rounds)
                times[name][-1].append(elapsed)
                answers[name][index] |= part
        totals = {name: sum(record[-1]) for name, record in times.items()}
        write_line(f"round {number + 1}: " + ", ".join(f"{name} {total:.1f} s" for name, total in totals.items()))

    total = {name: statistics.median(map(sum, record)) for name, record in times.items()}
    for name in total.keys() - {"engine"}:
        ratios = [sum(a) / sum(b) for a, b in zip(times[name], times["engine"], strict=True)]
        write_line(f"{name} / engine: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
    report_share(engine, completions, total["engine"], rounds)
    report_rates(setting, reference, engine, completions, answers)


def report_share(engine: Engine, completions: list[list[Completion]], total: float, rounds: int) -> None:
    """Where the time goes, and which part of the measured peak the needed arithmetic reached."""
    seconds = {phase: s / rounds for phase, s in (engine.seconds or {}).items()}
    seconds["host"] = total - sum(seconds.values())
    write_line("engine, a round: " + ", ".join(f"{phase} {s:.1f} s" for phase, s in seconds.items()))
    needed = needed_flops(engine, completions)
    peak = measure_roofline("float32").flops
    needed["all"] = sum(needed.values())
    write_line(
        f"peak of a large product: {peak / 1e9:.0f} GFLOP/s; needed arithmetic, and the share of the peak reached:"
    )
    for phase, flops in needed.items():
        elapsed = seconds.get(phase, total)
        write_line(f"  {phase}: {flops / 1e12:.2f} TFLOP, {100 * flops / elapsed / peak:.1f} %")


def needed_flops(engine: Engine, completions: list[list[Completion]]) -> dict[str, float]:
    """Of the tokens that had to be computed: the prefix once a point, each prompt's own tokens, and those generated,
    products with weights and attention both."""
    config = engine.model.config
    sizes = {name: leaf.size for name, leaf in named_leaves(engine.model.params).items() if leaf.ndim > 1}
    head = config.vocab_size * config.hidden_size
    layers = sum(sizes.values()) - sizes["model.embed_tokens.weight"] - sizes.get("lm_head.weight", 0)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim  # for each token attended to
    prefix = engine.workload.prefix_length
    prefill = decode = 0.0
    for point in completions:
        prefill += 2 * layers * prefix + attention * prefix**2 / 2
        for row, completion in zip(engine.workload.prompt_tokens, point, strict=True):
            own, steps = len(row) - prefix, completion.length - 1  # the first token is the prefill's
            prefill += 2 * layers * own + 2 * head + attention * own * (prefix + own / 2)
            decode += steps * (2 * layers + 2 * head + attention * (len(row) + steps / 2))
    return {"prefill": prefill, "decode": decode}


def report_rates(
    setting: Setting,
    reference: "Reference",
    engine: Engine,
    completions: list[list[Completion]],
    answers: dict[str, list[dict[int, Answer]]],
) -> None:
    """The ASR of all contestants at each point; and where a text differs, how near the two tokens were to a tie."""
    prompts = range(len(setting.prompts))
    rates = {"engine": [attack_success_rate([c.text for c in point]) for point in completions]}
    for name, points in answers.items():
        rates[name] = [attack_success_rate([point[p][0] for p in prompts]) for point in points]
    write_line("alpha   " + "".join(f"{name:>12}" for name in rates))
    for i, alpha in enumerate(setting.alphas):
        write_line(f"{alpha:+.3f}  " + "".join(f"{rate[i]:11.2f}%" for rate in rates.values()))
    spelled = Spelled(engine, reference.direction)
    for name, points in answers.items():
        differing = []
        for i, p in itertools.product(range(len(points)), prompts):
            ours, (text, tokens) = completions[i][p], points[i][p]
            if not (text.startswith(ours.text) if ours.cut else text == ours.text):
                differing.append((is_refusal(ours.text) == is_refusal(text), setting.alphas[i], p, tokens))
        total = len(completions) * len(setting.prompts)
        changed = sum(not same for same, *_ in differing)
        write_line(f"{name}: {len(differing)} of {total} texts differ, and {changed} outcomes")
        for _, alpha, p, tokens in sorted(differing)[:10]:
            write_line(f"  alpha {alpha:+.3f}, prompt {p}: {reference.tie(alpha, p, spelled.tokens(alpha)[p], tokens)}")


class Spelled:
    """The engine's whole answers as tokens: the same engine, with a tokenizer that writes their numbers."""

    def __init__(self, engine: Engine, direction: Params) -> None:
        tokenizer = copy.copy(engine.model.tokenizer)
        tokenizer.batch_decode = lambda rows, **_: [" ".join(map(str, row)) for row in rows]
        model = replace(engine.model, tokenizer=tokenizer)
        self._engine = Engine(model, engine.workload, engine.plan)
        self._direction = direction

    @functools.cache  # noqa: B019 (lives as long as the program)
    def tokens(self, alpha: float) -> list[list[int]]:
        (point,) = self._engine.complete([self._direction], [(alpha,)])
        return [list(map(int, completion.text.split())) for completion in point]


class Reference:
    """Hugging Face generate, with torch, on the same weights."""

    def __init__(self, setting: Setting, direction: Params) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(f"The reference needs PyTorch ({error}): pip install 'jaxscape[test]'.") from error
        self._torch, self._setting, self.direction = torch, setting, direction
        with tempfile.TemporaryDirectory() as directory:
            save_model(setting.model, directory)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._tokenizer = setting.model.tokenizer
        self._tokenizer.padding_side = "left"
        self._pad = self._tokenizer.pad_token_id or setting.model.eos_token_ids[0]
        self._rows = tokenize(setting.model, setting.prompts, "default", setting.sampling.max_new_tokens)
        self._at: float | None = None

    def move(self, alpha: float) -> None:
        if alpha == self._at:
            return
        point = named_leaves(materialise(self._setting.model.params, [self.direction], jnp.array([alpha], jnp.float32)))
        state = self._model.state_dict()
        with self._torch.no_grad():
            for name, weight in point.items():
                state[name].copy_(self._torch.from_numpy(np.array(weight)))
        self._at = alpha

    def timed(self, alpha: float, size: int, number: int = 0, rounds: int = 1) -> tuple[float, dict[int, Answer]]:
        """Seconds for all prompts at a point, and the answers; of many batches, every `rounds`-th is run."""
        self.move(alpha)
        batches = [range(i, min(i + size, len(self._rows))) for i in range(0, len(self._rows), size)]
        chosen = batches[number % rounds :: rounds] if len(batches) >= rounds else batches
        answers: dict[int, Answer] = {}
        started = time.perf_counter()
        for batch in chosen:
            answers |= zip(batch, self._generate([self._rows[i] for i in batch]), strict=True)
        elapsed = time.perf_counter() - started
        return elapsed * len(self._rows) / sum(map(len, chosen)), answers

    def _generate(self, rows: Sequence[Sequence[int]]) -> list[Answer]:
        torch, width = self._torch, max(map(len, rows))
        ids = torch.tensor([[self._pad] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        eos = list(self._setting.model.eos_token_ids)
        with torch.no_grad():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self._setting.sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=self._pad,
            )
        new = [list(itertools.takewhile(lambda token: token not in eos, row)) for row in out[:, width:].tolist()]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return list(zip(texts, new, strict=True))

    def tie(self, alpha: float, prompt: int, ours: list[int], theirs: list[int]) -> str:
        """The first place where two answers part, and by how much torch prefers the one token to the other there."""
        self.move(alpha)
        end = self._setting.model.eos_token_ids[0]
        pairs = enumerate(itertools.zip_longest(ours, theirs, fillvalue=end))
        place, (a, b) = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), (0, (end, end)))
        with self._torch.no_grad():
            row = self._torch.tensor([[*self._rows[prompt], *theirs[:place]]])
            logits = self._model(row).logits[0, -1].tolist()
        return f"they part at token {place}, where torch, alone, gives {logits[a]:.6f} and {logits[b]:.6f}"


def compile_seconds() -> dict[str, float]:
    """Seconds that JAX spends on making programs, from now on."""
    seconds: dict[str, float] = defaultdict(float)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds[event] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def peak_of(code: str) -> int:
    """The peak resident memory of a Python process, in bytes."""
    wrapped = f"{code}\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    output = subprocess.run([sys.executable, "-c", wrapped], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.split()[-1])


if __name__ == "__main__":
    run_program(Benchmark)
