"""What several test modules share: a tiny tokenizer, comparisons, and what PyTorch computes."""

import copy
import importlib.util
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import jaxscape as js
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.engine.scheduler import Completion
from jaxscape.evaluate.base import Evaluator, Label
from jaxscape.finetuning.batches import epoch_batches
from jaxscape.finetuning.chats import Example
from jaxscape.landscapes.axes import Axis, symmetric_axes
from jaxscape.landscapes.store import Run, open_run, records_of
from jaxscape.models.lora import init_factors
from jaxscape.prompts.chat_format import chat_text

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ADVBENCH = SHARED / "advbench_000-279.csv"


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # wide, so that logits differ enough for greedy tokens to be certain
    "eos_token_id": 2,
    "bos_token_id": 1,
}


TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nBe kind.</s>{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(js.load_prompts("harmful") + js.load_prompts("benign"), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


MakeModel = Callable[..., tuple[Path, transformers.PreTrainedModel]]


def load_script(path: Path) -> ModuleType:
    """A Python file outside the package as a module. It may import the files beside it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


def run_experiment(name: str, *arguments: object) -> None:
    """Run a program of `experiments/` in this process, as `python experiments/NAME.py ARGUMENTS` does in its own."""
    script = str(Path(__file__).parents[1] / "experiments" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")


def device_flags(count: int) -> dict[str, str]:
    """The environment of a process that has `count` CPU devices, and compiles as these tests do."""
    return {"XLA_FLAGS": re.sub(r"(?<=device_count=)\d+", str(count), os.environ["XLA_FLAGS"])}


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def torch_log_likelihoods(torch_model: Any, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """The log-likelihood of each token of an answer. The text is computed alone, without padding."""
    if not answer:
        return np.zeros(0, np.float32)
    logits = torch.tensor(torch_logits(torch_model, np.array([[*prompt, *answer]])))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].numpy()


def assert_same_tree(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def spelled(model: js.Model) -> js.Model:
    """The model with a tokenizer whose texts are the tokens' numbers, so that nothing of them is lost."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.batch_decode = lambda rows, **_: [" ".join(map(str, row)) for row in rows]
    return js.Model(**{**vars(model), "tokenizer": tokenizer})


BYTES = list(bytes_to_unicode().values())


BPE = ["<unk>", "<|im_start|>", "<|im_end|>", *BYTES, "th", "the", "Ġthe", "in", "Ġ1", "12", "123", "ĠĠ"]


BPE_MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ 1", "1 2", "12 3", "Ġ Ġ"]


SPM = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁t",
    "he",
    "▁the",
    "in",
    "▁▁",
    "▁",
    *"abcdehint12.",
]


PROMPTS = ["Write a poem about geese", "Hi", "Explain what a key is and how a lock works, please", "Why?"]


def completions_of(model: js.Model, prompts: list[str], slots: int = 128, **options: Any) -> list[Completion]:
    sampling = Sampling(**({"max_new_tokens": 20} | options))
    rows = tokenize(model, prompts, "default", sampling.max_new_tokens)
    workload = Workload(rows, sampling)
    plan = make_plan(model, workload, js.EngineOptions(slots=slots))
    return next(Engine(model, workload, plan).complete((), [()]))


def tokens_of(model: js.Model, prompts: list[str], slots: int = 128, **options: Any) -> list[list[int]]:
    texts = (completion.text for completion in completions_of(spelled(model), prompts, slots, **options))
    return [list(map(int, text.split())) for text in texts]


def torch_tokens(torch_model: Any, model: js.Model, prompts: list[str], new: int = 20) -> list[list[int]]:
    """transformers' greedy continuations of prompts of one batch, padded on the left, without their end tokens."""
    texts = [model.tokenizer(chat_text(model.tokenizer, p), add_special_tokens=False)["input_ids"] for p in prompts]
    width, eos = max(map(len, texts)), list(model.eos_token_ids)
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    # What is not said here is taken from the model, whose own settings another test may have changed.
    config = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=False
    )
    rows = torch_model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in eos), len(row))] for row in rows]


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
    "partial_rotary_factor": 0.75,
}


def losses(result: Any) -> list[float]:
    return [record["loss"] for record in result.log if "loss" in record]


def torch_losses(
    model: Any, examples: Sequence[Example], training: js.Training, rates: Sequence[float], weight_decay_on_all: bool
) -> list[float]:
    """The same finetuning as a plain torch loop: transformers' loss, torch's AdamW and clipping."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 or weight_decay_on_all]
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1 and not weight_decay_on_all], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0)
    found: list[float] = []
    epoch = 0
    while len(found) < len(rates):
        for chosen in epoch_batches([len(e.tokens) for e in examples], training, epoch):
            width = max(len(examples[i].tokens) for i in chosen)
            tokens = np.zeros((len(chosen), width), np.int64)
            labels = np.full_like(tokens, -100)
            mask = np.zeros_like(tokens)
            for row, i in enumerate(chosen):
                n = len(examples[i].tokens)
                tokens[row, :n], mask[row, :n] = examples[i].tokens, 1
                labels[row, :n] = np.where(examples[i].learned, examples[i].tokens, -100)
            loss = model(
                input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = float(rates[len(found)])
            optimizer.step()
            found.append(loss.item())
        epoch += 1
    return found


def with_peft(model: js.Model, torch_model: Any, training: js.Training) -> Any:
    """The torch model with PEFT's adapter, started from the same factors as ours."""
    config = peft.LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=list(training.targets))
    adapted = peft.get_peft_model(torch_model, config)
    key = jax.random.key(training.seed, impl="threefry2x32")
    factors = init_factors(model.params, training.targets, training.rank, key)
    state = adapted.state_dict()
    for name, pair in factors.items():
        for part in "ab":
            path = f"base_model.model.{name.removesuffix('.weight')}.lora_{part.upper()}.default.weight"
            state[path].copy_(torch.from_numpy(np.array(pair[part])))
    return adapted


def random_landscape(ndim: int, num_sets: int = 1, done: int | None = None) -> js.Landscape:
    """A landscape with one basin, five points along each axis; `done` leaves the points after the first ones out."""
    axes = symmetric_axes(ndim, 4, 0.5)
    shape = (num_sets, *[5] * ndim)
    distance = np.hypot.reduce(np.meshgrid(*(axis.values for axis in axes), indexing="ij"), axis=0)
    refused = np.random.default_rng(0).random((*shape, 20)) > 2 * distance[None, ..., None]
    evaluated = np.arange(np.prod(shape)) < (np.prod(shape) if done is None else done)
    return js.Landscape.from_outcomes(axes, refused, np.zeros(shape, int), evaluated.reshape(shape))


def append_answers(
    run: Run,
    texts: Sequence[str],
    refused: Sequence[bool],
    labels: Sequence[tuple[Evaluator, Sequence[Label | None]]] = (),
) -> None:
    """Add the answers to all prompts at the next point of a run."""
    answers = [Completion(text, 2) for text in texts]
    point = run.points[run.num_done]
    run.append(records_of(point, run.prompts, answers, refused, [False] * len(answers)), labels)


def write_run(
    directory: Path,
    refused: np.ndarray,
    axes: Sequence[Axis],
    prompts: Sequence[str] | None = None,
    done: int | None = None,
    **config: Any,
) -> Path:
    """The directory of a scan whose answers are refused as `refused`, [directions, *grid, prompts], says; `done` leaves
    the points after the first ones out. Returns the directory."""
    prompts = [f"prompt {i:03d}" for i in range(refused.shape[-1])] if prompts is None else prompts
    recorded = {
        "weights": "w",
        "directions": [[100 * i + k for k in range(len(axes))] for i in range(len(refused))],
        "axes": [{"name": axis.name, "values": list(axis.values)} for axis in axes],
        "architecture": "a",
        "max_new_tokens": 8,
    }
    with open_run(directory, recorded | config, axes, len(refused), prompts, prompts) as run:
        for verdicts in refused.reshape(-1, len(prompts))[:done]:
            append_answers(run, ["I cannot" if verdict else "Sure" for verdict in verdicts], verdicts.tolist())
    return directory


@dataclass(frozen=True)
class NamedJudge:
    """An evaluator whose labels a test gives."""

    name: str

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def write_scan(
    directory: Path,
    axes: Sequence[Axis],
    answer: Callable[[int, tuple[float, ...], str], str],
    prompts: Sequence[str],
    judges: Mapping[str, Callable[[str], Label | None]] | None = None,
    num_sets: int = 1,
    done: int | None = None,
    points: Sequence[tuple[float, ...]] = (),
    **config: Any,
) -> Path:
    """The directory of a scan with answers to read. One that begins with `I cannot` refuses.

    Arguments:
        answer: the answer at a direction set and coordinates to a prompt.
        judges: for each further evaluator, by its name, the label of an answer.
        done: the points after the first ones are left out.
        points: the points, if they are a list.
        config: what else `config.json` holds.
    """
    recorded = {
        "model": "tiny",
        "weights": "0123456789abcdef" * 4,
        "directions": [[100 * i + k for k in range(max(1, len(axes)))] for i in range(num_sets)],
        "axes": [axis.described() for axis in axes],
        **({"points": [list(point) for point in points]} if points else {}),
    }
    with open_run(directory, recorded | config, axes, num_sets, prompts, prompts, coords=points) as run:
        for index, coords in run.points[:done]:
            texts = [answer(index, coords, prompt) for prompt in prompts]
            labels = [(NamedJudge(name), list(map(label, texts))) for name, label in (judges or {}).items()]
            refused = [text.startswith("I cannot") for text in texts]
            append_answers(run, texts, refused, labels)
    return directory


def with_shares(land: js.Landscape, seed: int = 0) -> js.Landscape:
    """The landscape with shares: of what is not refused, a random part is incoherent."""
    rng, count = np.random.default_rng(seed), land.num_prompts
    refused = np.where(np.isnan(land.asr), np.nan, count - (land.asr * count / 100).round())
    incoherent = (rng.random(land.asr.shape) * (count - refused)).round()
    counts = {"refused": refused, "complied": count - refused - incoherent, "incoherent": incoherent}
    shares = {}
    for kind, number in counts.items():
        low, high = js.wilson_interval(100 * number / count, count)
        shares |= {kind: 100 * number / count, f"{kind}_low": low, f"{kind}_high": high}
    return replace(land, shares=shares)
