"""Measures of weights against what transformers' logits say, and which inputs they refuse."""

import copy
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import PROMPTS, torch_logits
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.point import materialise
from jaxscape.evaluate.measure import Subject
from jaxscape.evaluate.measures import MEASURES, check_names, make_measures
from jaxscape.evaluate.statistics import bootstrap_interval, mean_interval
from jaxscape.finetuning.chats import tokenize
from jaxscape.models.checkpoint import named_leaves
from jaxscape.prompts.chat_format import chat_text

TARGETS = ["Sure, here is a poem", "Hello", "A key is", "Because"]


@pytest.fixture(scope="module")
def pair(make_model: Any) -> tuple[js.Model, Any]:
    directory, torch_model = make_model(seed=11)
    return js.load_model(directory, "float32"), torch_model


@pytest.fixture(scope="module")
def moved(pair: tuple[js.Model, Any]) -> tuple[Any, Any]:
    """The parameters at a point, and transformers' model with the same parameters."""
    model, torch_model = pair
    params = materialise(model.params, [js.random_direction(model, 0)], jnp.array([0.2]))
    other = copy.deepcopy(torch_model)
    tensors = {name: torch.from_numpy(np.array(leaf)) for name, leaf in named_leaves(params).items()}
    other.load_state_dict(tensors)
    return params, other


def chat_tokens(model: js.Model, prompt: str) -> list[int]:
    tokens: list[int] = model.tokenizer(chat_text(model.tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return tokens


def torch_first(model: js.Model, torch_model: Any, prompts: list[str]) -> torch.Tensor:
    """log-probabilities of the first token of each answer."""
    rows = [torch_logits(torch_model, np.array([chat_tokens(model, prompt)]))[0, -1] for prompt in prompts]
    return torch.tensor(np.array(rows)).double().log_softmax(-1)


def torch_per_token(model: js.Model, torch_model: Any, prompt: str, answer: list[int]) -> float:
    tokens = chat_tokens(model, prompt)
    logits = torch.tensor(torch_logits(torch_model, np.array([tokens + answer])))[0, len(tokens) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(answer)), answer].mean())


def test_first_token_is_the_refusal_score_of_arditi_et_al(pair: Any, moved: Any) -> None:
    """Their `refusal_score`: p is the sum over refusal tokens; log(p + ε) − log(1 − p + ε)."""
    model, torch_model = pair
    params, other = moved
    answers = ["I cannot do that.", "Hello", "Sorry, but no", "I apologize"]
    (measure,) = make_measures(["first-token"], Subject(model, PROMPTS, recorded=answers))
    greedy = torch_first(model, torch_model, PROMPTS).argmax(-1).tolist()
    tokens = sorted({greedy[0], greedy[3]} | ({greedy[2]} if js.is_refusal(answers[2]) else set()))
    assert measure.settings["token_ids"] == tokens
    p = torch_first(model, other, PROMPTS)[:, tokens].exp().sum(-1)
    samples = measure.samples(params)
    np.testing.assert_allclose(samples[:, 0], p, atol=1e-5)
    np.testing.assert_allclose(samples[:, 1], p.log() - (1 - p).log(), atol=1e-3)
    summary = measure.summary(samples)
    assert summary["value"].value == pytest.approx(p.mean().item(), abs=1e-5)
    assert summary["value"].low <= summary["value"].value <= summary["value"].high


def test_a_given_refusal_decides_the_tokens(pair: Any) -> None:
    model, _ = pair
    (measure,) = make_measures(["first-token"], Subject(model, PROMPTS, refusal="I cannot"))
    assert measure.settings["token_ids"] == model.tokenizer("I cannot", add_special_tokens=False)["input_ids"][:1]


def test_damage_is_the_kl_divergence_of_torch(pair: Any, moved: Any) -> None:
    model, torch_model = pair
    params, other = moved
    (measure,) = make_measures(["damage"], Subject(model, (), harmless=PROMPTS))
    before, after = torch_first(model, torch_model, PROMPTS), torch_first(model, other, PROMPTS)
    expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(measure.samples(params)[:, 0], expected, atol=1e-4)
    np.testing.assert_array_equal(measure.samples(model.params), np.zeros((4, 1)))


def test_likelihood_is_the_mean_over_tokens_of_torch(pair: Any, moved: Any) -> None:
    model, _ = pair
    params, other = moved
    answers = ["I cannot.", "Hi", "I cannot.", "I'm sorry, but " + "no " * 40]
    (measure,) = make_measures(["likelihood"], Subject(model, PROMPTS, TARGETS, recorded=answers))
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    samples = measure.samples(params)
    refusals = ["I cannot.", "I cannot.", "I cannot.", answers[3]]  # the commonest stands for one that is no refusal
    for row, prompt, target, refusal in zip(samples, PROMPTS, TARGETS, refusals, strict=True):
        positive = torch_per_token(model, other, prompt, encode(target))
        negative = torch_per_token(model, other, prompt, encode(refusal)[:16])
        np.testing.assert_allclose(row, [positive - negative, positive, negative], atol=1e-3)
    assert list(measure.summary(samples)) == ["value", "target", "refusal"]


def test_perplexity_is_that_of_torch(pair: Any, moved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    params, other = moved
    (tmp_path / "texts.txt").write_text("A goose is a bird.\nHi there\n")
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you"}],
        [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because"},
            {"role": "user", "content": "Really"},
            {"role": "assistant", "content": "Yes, it is so"},
        ],
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    names = [f"perplexity:{tmp_path / name}" for name in ("texts.txt", "chats.jsonl")]
    of_texts, of_chats = make_measures(names, Subject(model, ()))

    def perplexity(rows: list[tuple[list[int], list[bool]]]) -> float:
        losses = []
        for tokens, counted in rows:
            logits = torch.tensor(torch_logits(other, np.array([tokens])))[0].log_softmax(-1)
            losses += [-logits[i - 1, tokens[i]].item() for i in range(1, len(tokens)) if counted[i]]
        return float(np.exp(np.mean(losses)))

    rows = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A goose is a bird.", "Hi there")]
    expected = perplexity([(row, [True] * len(row)) for row in rows])
    assert of_texts.summary(of_texts.samples(params))["value"].value == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr("jaxscape.evaluate.perplexity.adds_bos", lambda tokenizer: True)
    (behind_bos,) = make_measures(names[:1], Subject(model, ()))
    expected = perplexity([([model.tokenizer.bos_token_id, *row], [True] * (len(row) + 1)) for row in rows])
    assert behind_bos.summary(behind_bos.samples(params))["value"].value == pytest.approx(expected, rel=1e-3)
    assert behind_bos.settings == {"texts": 2, "tokens": sum(map(len, rows)), "bos": True}
    examples = tokenize(model, chats, 512).examples
    expected = perplexity([(e.tokens.tolist(), (e.learned & (e.tokens != 2)).tolist()) for e in examples])
    assert of_chats.summary(of_chats.samples(params))["value"].value == pytest.approx(expected, rel=1e-3)
    assert js.perplexity(js.Model(**{**vars(model), "params": params}), chats) == pytest.approx(expected, rel=1e-3)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.floats(0.1, 10))
def test_intervals_contain_the_mean_and_scale_with_it(values: list[float], scale: float) -> None:
    samples = np.array(values)
    interval = mean_interval(samples)
    assert samples.min() - 1e-9 <= interval.low <= interval.high <= samples.max() + 1e-9
    assert interval.value == pytest.approx(samples.mean())
    np.testing.assert_allclose(mean_interval(scale * samples), scale * np.array(interval), atol=1e-6)


def test_the_bootstrap_covers_as_often_as_it_says() -> None:
    """About 95 % of the 95 % intervals of a mean of 60 numbers contain the true mean; those of a ratio too."""
    rng = np.random.default_rng(0)
    drawn = rng.gamma(4, 1 / 4, size=(100, 60, 2))  # little skew, which percentile intervals do not correct
    means = [mean_interval(samples[:, 0]) for samples in drawn]
    assert 89 <= sum(interval.low <= 1 <= interval.high for interval in means) <= 99
    ratios = [bootstrap_interval(samples, lambda m: m[..., 0] / m[..., 1], 500) for samples in drawn]
    assert 89 <= sum(interval.low <= 1 <= interval.high for interval in ratios) <= 99


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one measure: first-token, damage"),
        (["frist-token"], "Unknown measure 'frist-token' .did you mean first-token.*: choose first-token, damage"),
        (["damage", "damage"], "'damage' is given twice"),
    ],
)
def test_wrong_names_are_user_errors(names: list[str], message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        check_names(names)


def test_what_a_measure_lacks_is_a_user_error(pair: Any) -> None:
    model, _ = pair
    subject = Subject(model, PROMPTS, recorded=["Sure!"] * 4)
    cases = {
        "first-token": "refuses none of the 4 prompts.*--refusal",
        "first-token:x": "takes nothing after its name, not 'x'",
        "damage": "needs harmless prompts",
        "damage:x": "takes nothing after its name",
        "likelihood": "needs a target for each prompt.*--target",
        "likelihood:x": "takes nothing after its name",
        "perplexity": "perplexity:SET or perplexity:FILE",
        "multiple-choice": "multiple-choice:FILE",
        "multiple-choice:nowhere.csv": "no file of questions nowhere.csv",
    }
    for name, message in cases.items():
        with pytest.raises(js.UserError, match=message):
            make_measures([name], subject)
    with pytest.raises(js.UserError, match="There are 1 targets for 4 prompts"):
        make_measures(["likelihood"], Subject(model, PROMPTS, ["Sure"], recorded=["I cannot"] * 4))
    assert {name.partition(":")[0] for name in cases} == set(MEASURES), "each measure is tried"
