"""What `gpu.py` measures. Each part runs in a process of its own, so that it begins with an empty GPU."""

import collections
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from random_model import COMMON, OPENING, SHAPES, Stopwatch, random_model, random_prompts

from jaxscape.runtime.streams import write_line

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "B200": 8e12}
"""Bytes per second of each card's memory, by NVIDIA's datasheets."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""FLOP/s of each card's dense bfloat16 products, by NVIDIA's datasheets."""
FORMS_NEW_TOKENS = 32  # tokens of each answer where the forms are compared
FINETUNING_ROWS = 16  # chats in a batch of finetuning


@dataclass(frozen=True)
class Case:
    """What is measured: `points` points, `prompts` prompts at each, `new_tokens` tokens for each prompt."""

    shape: str
    prompts: int = 80
    new_tokens: int = 128
    points: int = 4
    form: str = "materialised"


def prepared(model: Any, task: Case) -> Any:
    """The engine for a case of a model."""
    import jaxscape as js
    from jaxscape.engine.batching import Workload, tokenize
    from jaxscape.engine.engine import Engine
    from jaxscape.engine.planner import make_plan
    from jaxscape.engine.sampling import Sampling

    tokens = tokenize(model, random_prompts(task.prompts), "default", task.new_tokens)
    workload = Workload(tokens, Sampling(task.new_tokens), task.points, task.points, 1, num_random=1)
    return Engine(model, workload, make_plan(model, workload, js.EngineOptions(form=task.form)))  # type: ignore[arg-type]


def of_card(numbers: dict[str, float]) -> float | None:
    """The number of the first device, by its name; None if it is not among them."""
    import jax

    return next((number for name, number in numbers.items() if name in jax.devices()[0].device_kind), None)


def engine(case: dict[str, Any], dtype: str, profile: bool) -> dict[str, Any]:
    """The times and speeds of a case in the engine."""
    import jax
    import numpy as np

    import jaxscape as js
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

    running = prepared(model, task)
    plan, workload = running.plan, running.workload
    result["plan_s"] = seconds.lap()
    write_line(str(plan))
    points = [(float(alpha),) for alpha in np.linspace(-0.01, 0.01, task.points)]
    answers = running.complete([direction], points)
    next(answers)
    result["first_point_s"] = result["plan_s"] + seconds.lap()
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
    # The host waits for each program here, so decoding takes longer than in a scan. The time of a step is therefore
    # that of a whole scan without its other phases.
    other = sum(spent for phase, spent in running.seconds.items() if phase != "decode")
    step = (min(scans) - other) / batches / (task.new_tokens - 1)
    leaves = named_leaves(model.params)
    looked_up = 0 if model.config.tie_word_embeddings else leaves["model.embed_tokens.weight"].nbytes
    weights = sum(leaf.nbytes for leaf in leaves.values()) - looked_up
    config, rows = model.config, plan.layout.batch
    itemsize = jax.tree.leaves(model.params)[0].dtype.itemsize
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    own = np.mean([len(text) for text in workload.prompt_tokens]) - workload.prefix_length + task.new_tokens / 2
    trees = 1 + plan.layout.num_factored
    cache = slot * (rows * own + plan.layout.points_in_flight * workload.prefix_length)
    card = jax.devices()[0].device_kind
    bandwidth = of_card(BANDWIDTH)
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


def forms(case: dict[str, Any], dtype: str, profile: bool) -> dict[str, Any]:
    """The time of scans in each form, and how much longer the planner's choice takes than the best of them."""
    import jaxscape as js
    from jaxscape.runtime.hardware import enable_compilation_cache

    enable_compilation_cache()
    model = random_model(case["shape"], dtype)
    directions = js.make_directions([0], model)
    losses = []
    for num_points, num_prompts in itertools.product((1, 4, 21), (4, 40, 80)):
        task = Case(case["shape"], num_prompts, FORMS_NEW_TOKENS, num_points, form="auto")
        chosen = str(prepared(model, task).plan.form)
        points = [(0.001 * i,) for i in range(num_points)]
        seconds = {}
        for form in ("materialised", "factorised"):
            running = prepared(model, replace(task, form=form))
            times = []
            for _ in range(3):
                started = time.perf_counter()
                list(running.complete(directions, points))
                times.append(time.perf_counter() - started)
            seconds[form] = min(times[1:])  # the first one compiles
        losses.append(seconds[chosen] / min(seconds.values()) - 1)
        shown = ", ".join(f"{form} {spent:.3f} s" for form, spent in seconds.items())
        write_line(
            f"{num_points} points x {num_prompts} prompts: {shown}; chosen: {chosen}, {100 * losses[-1]:.0f} % longer"
        )
    return {"chosen_form_longer": max(losses)}


def finetuning(case: dict[str, Any], dtype: str, profile: bool) -> dict[str, Any]:
    """The speed of full finetuning, and how long its step takes to compile for each of two widths of a batch."""
    import jax
    import numpy as np

    from jaxscape.finetuning.batches import Batch
    from jaxscape.finetuning.options import Training
    from jaxscape.finetuning.training import initial_trainable, make_trainer
    from jaxscape.models.checkpoint import named_leaves

    model = random_model(case["shape"], dtype)
    size, widths = sum(leaf.size for leaf in named_leaves(model.params).values()), (256, 512)
    training = Training(method="full", batch_size=FINETUNING_ROWS)
    trainer = make_trainer(model, training, widths[-1])
    trainable = initial_trainable(model, training)
    model.params.clear()  # the trainer has a copy
    state = trainer.initial_state(trainable)
    result: dict[str, Any] = {}
    draw = np.random.default_rng(0)
    for width in widths:
        shape = (1, training.batch_size, width)
        tokens = draw.integers(5, model.config.vocab_size, shape).astype(np.int32)
        batch = Batch(tokens, np.full(shape[:2], width, np.int32), np.ones(shape, np.float32))
        seconds = Stopwatch()
        state, metrics = trainer.step(state, batch, 1e-5)
        jax.block_until_ready(metrics)
        first = seconds.lap()
        for _ in range(10):
            state, metrics = trainer.step(state, batch, 1e-5)
        jax.block_until_ready((state, metrics))
        spent = seconds.lap() / 10
        # Each token of the batch costs 6 FLOPs for each weight; those of attention are left out.
        flops = 6 * size * training.batch_size * width / spent
        result |= {f"step_{width}_s": spent, f"step_{width}_compile_s": first - spent}
        result |= {"learned_tokens_per_s": training.batch_size * (width - 1) / spent}
        peak = of_card(PEAK)
        result |= {"of_peak": peak and flops / peak}
    return result


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
