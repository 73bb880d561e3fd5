"""Measure the engine on one GPU, at the shapes of large models with random weights.

Run it from the repository's root; it takes some ten minutes:

    python benchmarks/gpu.py                         # every case, each in a process of its own
    python benchmarks/gpu.py --cases 8b-80 8b-512    # some of them
    python benchmarks/gpu.py --reference             # beside Hugging Face generate, which needs PyTorch with CUDA
    python benchmarks/gpu.py --profile               # also which kernels a decode step runs
    python benchmarks/gpu.py --loading               # also how long loading takes; writes up to 16 GB to a local disk

A case is a number of points of a line, the same prompts at each, and a number of new tokens, in bfloat16. The floor of
a decode step is the time to read the weights and the filled cache slots once at the card's datasheet bandwidth. Each
case is measured twice: the first process compiles its programs, the second finds them in JAX's cache.
"""

import collections
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxscape.cli.main import run_program
from jaxscape.runtime.errors import UserError
from jaxscape.runtime.streams import write_line

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "B200": 8e12}
"""Bytes per second of each card's memory, by NVIDIA's datasheets."""

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # to try this program without a GPU
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 30000,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""The sizes of Llama-3.2-1B and Llama-3-8B, in the spelling of transformers."""


COMMON: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPENING = " ".join(f"w{i}" for i in range(5, 29))
"""What the chat template begins each prompt with."""


@dataclass(frozen=True)
class Case:
    """What is measured: `points` points, `prompts` prompts at each, `new_tokens` tokens for each prompt."""

    shape: str
    prompts: int = 80
    new_tokens: int = 128
    points: int = 4
    form: str = "materialised"


CASES = {
    "tiny": Case("tiny", prompts=8, new_tokens=16),
    "1b-80": Case("1b"),
    "1b-factorised": Case("1b", form="factorised"),
    "8b-80": Case("8b"),
    "8b-512": Case("8b", new_tokens=512, points=1),
    "8b-256": Case("8b", prompts=256, points=2),
    "8b-factorised": Case("8b", form="factorised"),
}


@dataclass(frozen=True)
class Benchmark:
    """Measure the engine on one GPU."""

    cases: tuple[str, ...] = tuple(name for name in CASES if name != "tiny")
    """The cases to measure."""
    loading: bool = False
    """Also measure how long a model takes to load from a local disk."""
    dtype: str = "bfloat16"
    """The dtype of weights and activations."""
    reference: bool = False
    """Also measure Hugging Face generate with a compiled static cache."""
    profile: bool = False
    """Also write which kernels a decode step runs."""
    once: bool = False
    """Measure each case in one process only, which compiles."""

    def run(self) -> None:
        unknown = sorted(set(self.cases) - set(CASES))
        if unknown:
            raise UserError(f"There is no case {unknown[0]!r}; choose {', '.join(CASES)}.")
        results = []
        for name in self.cases:
            result = self._in_process("engine", name)
            if not self.once:
                again = self._in_process("engine", name)
                result |= {"second_start_s": again["first_point_s"]}
            if self.reference:
                result |= self._in_process("reference", name)
            if self.loading:
                result |= self._in_process("loading", name)
            results.append({"case": name} | result)
            write_line(json.dumps(results[-1]))
        write_table(results)

    def _in_process(self, part: str, name: str) -> dict[str, Any]:
        """The result of a part of a case, which runs in a process of its own, so that each begins with an empty GPU."""
        call = f"benchmarks.gpu.{part}(json.loads(sys.argv[1]), sys.argv[2], bool(sys.argv[3]))"
        code = f"import json, sys; sys.path.insert(0, '.'); import benchmarks.gpu; print(json.dumps({call}))"
        arguments = [json.dumps(asdict(CASES[name])), self.dtype, "1" if self.profile else ""]
        process = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        *lines, last = process.stdout.splitlines() or [""]
        for line in lines:
            write_line(line)
        if process.returncode:
            raise UserError(f"The part {part!r} of the case {name} failed with exit code {process.returncode}.")
        result: dict[str, Any] = json.loads(last)
        return result


def random_model(shape: str, dtype: str) -> Any:
    """A `Model` of a shape with random weights; each word w0, w1, … is a token."""
    import jax
    import jax.numpy as jnp
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from jaxscape.models.checkpoint import named_leaves, tree_of
    from jaxscape.models.decoder import parameter_shapes
    from jaxscape.models.families import from_transformers
    from jaxscape.models.model import Model

    settings = transformers.LlamaConfig(**SHAPES[shape], **COMMON)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(settings.vocab_size)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w3"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}w1 " + OPENING + " {{ m['content'] }} w30 {% endfor %}"
        "{% if add_generation_prompt %}w31 w32{% endif %}"
    )
    config = from_transformers(settings)
    draw = jax.jit(lambda key, shape: (jax.random.normal(key, shape) * 0.02).astype(dtype), static_argnums=1)
    params = {
        name: jnp.ones(leaf.shape, dtype) if "norm" in name else draw(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(named_leaves(parameter_shapes(config)).items())
    }
    return Model(shape, config, tree_of(params), tokenizer, (2,), settings)


def random_prompts(count: int) -> list[str]:
    """Prompts of 8 to 30 words."""
    choice = random.Random(1)
    return [" ".join(f"w{choice.randrange(100, 30000)}" for _ in range(choice.randint(8, 30))) for _ in range(count)]


def engine(case: dict[str, Any], dtype: str, profile: bool) -> dict[str, Any]:
    """The times and speeds of a case in the engine."""
    import jax
    import numpy as np

    import jaxscape as js
    from jaxscape.engine.batching import Workload, tokenize
    from jaxscape.engine.engine import Engine
    from jaxscape.engine.planner import make_plan
    from jaxscape.engine.sampling import Sampling
    from jaxscape.models.checkpoint import named_leaves
    from jaxscape.runtime.hardware import enable_compilation_cache

    enable_compilation_cache()
    task = Case(**case)
    model = random_model(task.shape, dtype)
    jax.block_until_ready(model.params)
    seconds = Stopwatch()
    (direction,) = js.make_directions([0], model)
    jax.block_until_ready(direction)
    result: dict[str, Any] = {"direction_s": seconds.lap()}

    prompts = random_prompts(task.prompts)
    sampling = Sampling(task.new_tokens)
    tokens = tokenize(model, prompts, "default", task.new_tokens)
    workload = Workload(tokens, sampling, task.points, task.points, 1, num_random=1)
    plan = make_plan(model, workload, js.EngineOptions(form=task.form))  # type: ignore[arg-type]
    write_line(str(plan))
    running = Engine(model, workload, plan)
    points = [(float(alpha),) for alpha in np.linspace(-0.01, 0.01, task.points)]
    answers = running.complete([direction], points)
    next(answers)
    result["first_point_s"] = seconds.lap()
    list(answers)

    scans = []
    for _ in range(2):
        started = time.perf_counter()
        done = list(running.complete([direction], points))
        scans.append(time.perf_counter() - started)
    generated = sum(completion.length for point in done for completion in point)
    result |= {"scan_s": min(scans), "tokens_per_s": generated / min(scans)}

    running.seconds = {}
    list(running.complete([direction], points))
    batches = 1 if plan.form.batches_points else task.points
    # Waiting for each program takes time that a scan does not need, so the decode phase itself is not a scan's.
    other = sum(spent for phase, spent in running.seconds.items() if phase != "decode")
    step = (min(scans) - other) / batches / (task.new_tokens - 1)
    leaves = named_leaves(model.params)
    looked_up = 0 if model.config.tie_word_embeddings else leaves["model.embed_tokens.weight"].nbytes
    weights = sum(leaf.nbytes for leaf in leaves.values()) - looked_up
    config, rows = model.config, plan.layout.batch
    itemsize = jax.tree.leaves(model.params)[0].dtype.itemsize
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    own = np.mean([len(text) for text in tokens]) - workload.prefix_length + task.new_tokens / 2
    trees = 1 + plan.layout.num_factored
    cache = slot * (rows * own + plan.layout.points_in_flight * workload.prefix_length)
    card = jax.devices()[0].device_kind
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in card), None)
    floor = None if bandwidth is None else (trees * weights + cache) / bandwidth
    result |= {"step_ms": 1e3 * step, "floor_ms": floor and 1e3 * floor, "of_floor": floor and floor / step}
    result |= {f"{phase}_s": value for phase, value in running.seconds.items()}
    stats = jax.devices()[0].memory_stats() or {}
    result |= {"rows": rows, "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9, "card": card, "jax": jax.__version__}
    if profile:
        running.seconds = None
        write_profile(running, [direction], points, batches * (task.new_tokens - 1))
    return result


def reference(case: dict[str, Any], dtype: str, profile: bool) -> dict[str, Any]:
    """The speed of Hugging Face generate with a compiled static cache, all prompts of a point in one batch."""
    import torch
    import transformers

    task = Case(**case)
    settings = transformers.LlamaConfig(**SHAPES[task.shape], **COMMON)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype)).eval()
    words = [f"w1 {OPENING} {prompt} w30 w31 w32".split() for prompt in random_prompts(task.prompts)]
    rows = [[int(word[1:]) for word in text] for text in words]
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows]).cuda()
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).cuda()

    def generate() -> None:
        with torch.no_grad():
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=task.new_tokens,
                min_new_tokens=task.new_tokens,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
            )
        torch.cuda.synchronize()

    seconds = Stopwatch()
    generate()
    first = seconds.lap()
    times = []
    for _ in range(2):
        generate()
        times.append(seconds.lap())
    return {"generate_first_s": first, "generate_tokens_per_s": task.prompts * task.new_tokens / min(times)}


def loading(case: dict[str, Any], dtype: str, profile: bool) -> dict[str, Any]:
    """How long the case's model takes to load from a local disk."""
    import jax

    import jaxscape as js

    with tempfile.TemporaryDirectory() as directory:
        js.save_model(random_model(case["shape"], dtype), directory)
        seconds = Stopwatch()
        model = js.load_model(directory, dtype)
        jax.block_until_ready(model.params)
        return {"load_s": seconds.lap()}


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def lap(self) -> float:
        started, self._started = self._started, time.perf_counter()
        return self._started - started


def write_profile(running: Any, directions: Sequence[Any], points: Sequence[Any], steps: int) -> None:
    """Write the kernels of a scan, summed by name, those of most time first."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory, create_perfetto_trace=True)
        list(running.complete(directions, points))
        jax.profiler.stop_trace()
        kernels = list(kernel_events(Path(directory)))
    total, count = collections.Counter[str](), collections.Counter[str]()
    for name, microseconds in kernels:
        total[name] += microseconds  # type: ignore[assignment]
        count[name] += 1
    busy = sum(total.values())
    write_line(
        f"profile: {len(kernels) / steps:.0f} kernels and {busy / steps / 1e3:.2f} ms a step, all phases counted"
    )
    for name, microseconds in total.most_common(28):
        mean = microseconds / count[name]
        share = 100 * microseconds / busy
        write_line(f"  {share:5.1f} %  {count[name] / steps:7.1f} a step  {mean:8.1f} us  {name[:90]}")


def kernel_events(directory: Path) -> Iterator[tuple[str, float]]:
    """The name and the microseconds of each kernel in a profile of `jax.profiler`."""
    trace = max(directory.rglob("perfetto_trace.json.gz"))
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    process, thread = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            process[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event["name"] == "thread_name":
            thread[event["pid"], event.get("tid")] = event["args"]["name"]
    for event in events:
        on_gpu = "GPU" in process.get(event.get("pid"), "")
        if event.get("ph") == "X" and on_gpu and "Stream" in thread.get((event["pid"], event["tid"]), ""):
            yield event["name"], event["dur"]


def write_table(results: Sequence[dict[str, Any]]) -> None:
    """Write the results as a Markdown table."""
    columns = {
        "case": "case",
        "rows": "rows",
        "step_ms": "decode step, ms",
        "of_floor": "share of the floor",
        "tokens_per_s": "scan, tokens/s",
        "generate_tokens_per_s": "generate, tokens/s",
        "load_s": "load, s",
        "direction_s": "direction, s",
        "first_point_s": "first point, s",
        "second_start_s": "second start, s",
        "peak_gb": "peak, GB",
    }
    used = [name for name in columns if any(name in result for result in results)]

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    write_line("| " + " | ".join(columns[name] for name in used) + " |")
    write_line("| " + " | ".join("---" for _ in used) + " |")
    for result in results:
        write_line("| " + " | ".join(cell(result.get(name, "")) for name in used) + " |")


if __name__ == "__main__":
    run_program(Benchmark)
