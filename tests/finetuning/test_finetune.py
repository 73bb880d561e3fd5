"""Finetuning: against torch and PEFT, batches, schedules, and options."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import MakeModel, assert_same_tree, losses, torch_losses, with_peft
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.engine.batching import bucket
from jaxscape.finetuning.batches import epoch_batches, hold_out, learning_rates
from jaxscape.finetuning.chats import tokenize
from jaxscape.finetuning.training import train_step
from jaxscape.models.config import LayerKind
from jaxscape.models.rope import Rope

CHATS = js.load_chats("safe:22")
SHORT = js.Training(epochs=2, batch_size=4, learning_rate=5e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_the_loss_curve_is_that_of_torch(make_model: MakeModel, method: Any, schedule: Any) -> None:
    directory, torch_model = make_model(attention_bias=True)
    model = js.load_model(directory, "float32")
    training = js.Training(
        method=method, epochs=4, batch_size=4, schedule=schedule, warmup=0.1, learning_rate=5e-3, weight_decay=0.1
    )
    result = js.finetune(model, CHATS, training, progress=False)
    examples = tokenize(model, CHATS, training.max_length).examples
    rates = [record["learning_rate"] for record in result.log]
    if method == "lora":
        torch_model = with_peft(model, torch_model, training)
    expected = torch_losses(torch_model, examples, training, rates, method == "lora")
    assert len(expected) == 24
    assert expected[-1] < expected[0] - 0.5, "it learns"
    np.testing.assert_allclose(losses(result), expected, rtol=2e-3)


@pytest.mark.parametrize("change", [{"accumulation": 2, "batch_size": 2}, {"remat": True}])
def test_accumulation_and_remat_change_nothing(tiny: js.Model, change: dict[str, Any]) -> None:
    expected = js.finetune(tiny, CHATS, SHORT, progress=False)
    found = js.finetune(tiny, CHATS, replace(SHORT, **change), progress=False)
    np.testing.assert_allclose(losses(found), losses(expected), rtol=1e-3)


def test_bfloat16_computes_with_a_float32_state(tiny_dir: Path) -> None:
    model = js.load_model(tiny_dir, "bfloat16")
    for method in ("full", "lora"):
        training = replace(SHORT, method=method, epochs=6)
        result = js.finetune(model, CHATS, training, progress=False)
        assert losses(result)[-1] < losses(result)[0] - 0.3
        assert {leaf.dtype for leaf in jax.tree.leaves(result.model.params)} == {jnp.dtype("bfloat16")}
        exact = js.finetune(js.load_model(tiny_dir, "float32"), CHATS, training, progress=False)
        np.testing.assert_allclose(losses(result), losses(exact), rtol=0.1)


def test_a_seed_gives_the_same_weights_again_and_leaves_the_model_alone(tiny: js.Model) -> None:
    before = jax.tree.map(jnp.copy, tiny.params)
    for method in ("full", "lora"):
        first, again, other = (
            js.finetune(tiny, CHATS, replace(SHORT, method=method, seed=seed), progress=False) for seed in (0, 0, 1)
        )
        assert_same_tree(first.model.params, again.model.params)
        assert losses(first) != losses(other)
    assert_same_tree(tiny.params, before)


def test_only_the_widths_of_batches_are_compiled(tiny: js.Model) -> None:
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "well " * n}] for n in (2, 3, 12, 14) * 8
    ]
    training = replace(SHORT, alpha=3.25)  # a value that no other test compiles
    js.finetune(tiny, chats, training, progress=False)
    widths = {bucket(len(example.tokens)) for example in tokenize(tiny, chats, 512).examples}
    compiled = train_step._cache_size()
    js.finetune(tiny, chats, replace(training, epochs=7, learning_rate=1e-3, seed=3, warmup=0.5), progress=False)
    assert len(widths) >= 2
    assert train_step._cache_size() == compiled


def test_validation_is_held_out(tiny: js.Model, tmp_path: Path) -> None:
    training = replace(SHORT, validation=0.25)
    result = js.finetune(tiny, CHATS, training, out=tmp_path / "run", progress=False)
    found = [record["validation_loss"] for record in result.log if "validation_loss" in record]
    assert len(found) == 2
    examples = tokenize(tiny, CHATS, 512).examples
    learning, held_out = hold_out(examples, 0.25, 0)
    assert (len(learning), len(held_out)) == (16, 6)
    assert {example.tokens.tobytes() for example in learning}.isdisjoint(e.tokens.tobytes() for e in held_out)
    # The validation loss is that of the finetuned weights: computed here from the logits of the result.
    total = count = 0.0
    for tokens, learned in held_out:
        logits = np.asarray(result.model(tokens[None]))[0, :-1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= logprobs[np.arange(len(tokens) - 1), tokens[1:]][learned[1:]].sum()
        count += learned[1:].sum()
    assert found[-1] == pytest.approx(total / count, rel=1e-3)
    with pytest.raises(js.UserError, match="cannot be held out"):
        js.finetune(tiny, CHATS[:2], replace(training, validation=0.1), progress=False)


def test_perplexity_is_that_of_torch(make_model: MakeModel) -> None:
    directory, torch_model = make_model()
    model = js.load_model(directory, "float32")
    total, count = 0.0, 0
    for tokens, learned in tokenize(model, CHATS, 512).examples:
        labels = np.where(learned & (tokens != 2), tokens, -100).astype(np.int64)  # without the end of the turn
        with torch.no_grad():
            loss = torch_model(input_ids=torch.tensor(tokens[None]), labels=torch.tensor(labels[None])).loss.item()
        total, count = total + loss * (labels[1:] >= 0).sum(), count + (labels[1:] >= 0).sum()
    assert js.perplexity(model, CHATS, batch_size=3) == pytest.approx(math.exp(total / count), rel=1e-3)


@given(
    st.lists(st.integers(2, 500), min_size=1, max_size=200),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_an_epoch_has_every_example_once(lengths: list[int], size: int, accumulation: int, epoch: int) -> None:
    training = js.Training(batch_size=size, accumulation=accumulation)
    batches = epoch_batches(lengths, training, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // (size * accumulation))
    assert max(map(len, batches)) <= size * accumulation


@given(st.integers(1, 100_000))
def test_buckets_are_few_and_waste_little(length: int) -> None:
    width = bucket(length)
    assert length <= width <= max(32, 1.5 * length)
    assert width in {32 * 2**i for i in range(20)} | {48 * 2**i for i in range(20)}


def test_schedules_are_those_of_torch_and_transformers() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))

    def rates(make: Any, steps: int, per_epoch: int = 1) -> list[float]:
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scheduler = make(optimizer)
        found = []
        for step in range(steps):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            if (step + 1) % per_epoch == 0:
                scheduler.step()
        return found

    cosine = js.Training(epochs=4, learning_rate=0.1, schedule="cosine")
    expected = rates(lambda o: transformers.get_cosine_schedule_with_warmup(o, 0, 20), 20)
    np.testing.assert_allclose(learning_rates(cosine, 5), expected, atol=1e-8)
    step = replace(cosine, schedule="step")
    expected = rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.85), 20, per_epoch=5)
    np.testing.assert_allclose(learning_rates(step, 5), expected, rtol=1e-6)
    warm = learning_rates(replace(cosine, schedule="constant", warmup=0.25), 5)
    np.testing.assert_allclose(warm[:5], [0.1 * (i + 1) / 6 for i in range(5)], rtol=1e-6)
    np.testing.assert_allclose(warm[5:], 0.1, rtol=1e-6)
    assert learning_rates(replace(cosine, epochs=1, warmup=0.6), 1).tolist() == [np.float32(0.05)]  # it only rises


def test_a_model_that_cannot_be_saved_is_not_trained_in_full(tiny: js.Model, tmp_path: Path) -> None:
    (kind,) = tiny.config.layers
    halved = Rope(tuple(f / 2 for f in kind.rope.frequencies))
    table = replace(tiny.config, layers=(LayerKind(halved),))
    model = replace(tiny, config=table)
    with pytest.raises(js.UserError, match="scales its RoPE by a table"):
        js.finetune(model, CHATS, replace(SHORT, method="full"), out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    js.finetune(model, CHATS, replace(SHORT, epochs=1), out=tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "prefix"}, "Unknown method 'prefix': choose lora, full"),
        ({"schedule": "linear"}, "Unknown schedule 'linear': choose cosine, step, constant"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulation": -1}, "accumulation must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1, not"),
        ({"validation": -0.5}, "validation must be at least 0 and below 1, not"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number of at least 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a finite number of at least 0"),
        ({"learning_rate": 0.0}, "must be positive numbers"),
        ({"alpha": float("inf")}, "must be positive numbers"),
        ({"targets": ()}, "A LoRA training needs --targets: name at least one"),
        ({"seed": -1}, "A seed is a number"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    training = object.__new__(js.Training)  # `check` itself, not the checks of types, which only run in tests
    training.__dict__.update(vars(js.Training()) | options)
    with pytest.raises(js.UserError, match=message):
        training.check()


def test_an_adapter_goes_on_training(tiny: js.Model) -> None:
    first = js.finetune(tiny, CHATS, SHORT, progress=False)
    assert first.adapter is not None
    kept = jax.tree.map(jnp.copy, first.adapter.factors)
    # A step of this length is lost in the rounding of every factor.
    still = js.finetune(tiny, CHATS, replace(SHORT, learning_rate=1e-30), start=first.adapter, progress=False)
    assert_same_tree(still.model.params, first.model.params)
    more = js.finetune(tiny, CHATS, SHORT, start=first.adapter, progress=False)
    assert losses(more)[-1] < losses(first)[-1]
    assert_same_tree(first.adapter.factors, kept)
    for other in ({"rank": 4}, {"alpha": 1.0}, {"targets": ("q_proj",)}, {"method": "full"}):
        with pytest.raises(
            js.UserError,
            match="choose the method lora, and the rank, alpha and targets of the adapter",
        ):
            js.finetune(tiny, CHATS, replace(SHORT, **other), start=first.adapter, progress=False)
    name = next(iter(kept))
    for field in ("scales", "magnitudes", "replaced"):
        changed = replace(first.adapter, **{field: {name: 2 * first.adapter.scale}})
        with pytest.raises(
            js.UserError, match=f"{name} by more than the product of its factors.*merge it into its base"
        ):
            js.finetune(tiny, CHATS, SHORT, start=changed, progress=False)
    same = replace(first.adapter, scales={name: first.adapter.scale})
    js.finetune(tiny, CHATS, replace(SHORT, epochs=1), start=same, progress=False)
