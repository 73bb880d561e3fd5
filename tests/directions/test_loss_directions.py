"""Directions that come from the loss of refusal: its gradient and its worst case."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import MakeModel, torch_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.gradient import Gradient
from jaxscape.directions.kinds import parse_direction, prepare
from jaxscape.directions.objective import RefusalLoss, Refusals, norm, positive_norm
from jaxscape.directions.worst_case import WorstCase, steepest_step
from jaxscape.models.checkpoint import fingerprint, named_leaves
from jaxscape.models.encoding import encode
from jaxscape.models.greedy import greedy_tokens
from jaxscape.prompts import refusal
from jaxscape.prompts.chat_format import chat_texts
from jaxscape.runtime.sharding import MeshShape

REFUSAL, TARGET = "I cannot, no", "Sure: here"
REFUSALS = Refusals(number=3, text=REFUSAL, target="none")


@pytest.fixture(scope="module")
def pair(make_model: MakeModel) -> tuple[Path, Any]:
    """A model of one layer, whose programs compile quickly."""
    return make_model(num_hidden_layers=1, intermediate_size=32, num_key_value_heads=4)


@pytest.fixture(scope="module")
def small(pair: tuple[Path, Any]) -> js.Model:
    return js.load_model(pair[0], "float32")


@pytest.fixture(scope="module")
def loss(small: js.Model) -> RefusalLoss:
    return RefusalLoss(small, REFUSALS)


def torch_loss(model: js.Model, torch_model: Any, text: str = REFUSAL) -> Any:
    """Minus the log-likelihood per token of an answer, one prompt after another, as a tensor of torch."""
    texts = chat_texts(model.tokenizer, js.load_prompts("harmful", 3))
    (answer,) = model.tokenizer([text], add_special_tokens=False)["input_ids"]
    total = torch.zeros(())
    for prompt in model.tokenizer(texts, add_special_tokens=False)["input_ids"]:
        logits = torch_model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer)) / len(texts)
    return total


def test_the_gradient_is_that_of_torch(pair: tuple[Path, Any], small: js.Model, loss: RefusalLoss) -> None:
    torch_model = pair[1]
    expected = torch_loss(small, torch_model)
    names, parameters = zip(*torch_model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))
    value, gradient = loss.value_and_gradient(loss.weights)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert set(gradient) == {name for name in gradients if "norm" not in name}
    largest = max(float(x.abs().max()) for x in gradients.values())
    for name, ours in gradient.items():
        np.testing.assert_allclose(ours, gradients[name].numpy(), rtol=1e-3, atol=1e-5 * largest, err_msg=name)


def test_a_target_makes_the_loss_that_of_the_measure(pair: tuple[Path, Any], small: js.Model) -> None:
    value, _ = (both := RefusalLoss(small, replace(REFUSALS, target=TARGET))).value_and_gradient(both.weights)
    with torch.no_grad():
        expected = torch_loss(small, pair[1]) - torch_loss(small, pair[1], TARGET)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    measured = js.measure(
        small,
        prompts=js.load_prompts("harmful", 3),
        measures=["likelihood"],
        targets=[TARGET] * 3,
        refusal=REFUSAL,
        progress=False,
        directions=[0],
        steps=2,
    )
    assert value == pytest.approx(measured.measures["likelihood"]["value"][0, 1], rel=1e-4)


def test_refusals_become_unlikely_along_the_gradient(small: js.Model, loss: RefusalLoss) -> None:
    """It has the norm of a random direction, and leaves norm parameters alone; the loss rises at first order."""
    (direction,) = Gradient(REFUSALS).make(small)
    tensors = named_leaves(direction)
    assert not any(tensor.any() for name, tensor in tensors.items() if "norm" in name)
    assert norm(direction) == pytest.approx(norm(js.random_direction(small, 0)), rel=1e-3)
    value, gradient = loss.value_and_gradient(loss.weights)
    step = 1e-4 / norm(loss.weights)
    ahead, behind = (
        loss.value_and_gradient({name: w + sign * step * tensors[name] for name, w in loss.weights.items()})[0]
        for sign in (1, -1)
    )
    assert (ahead - behind) / 2e-4 == pytest.approx(norm(gradient), rel=0.05)
    assert ahead > value > behind


def test_a_gradient_on_a_mesh_is_sharded_as_the_weights(pair: tuple[Path, Any]) -> None:
    many = js.load_model(pair[0], "float32", mesh_shape=MeshShape(1, 8))
    for name, tensor in named_leaves(Gradient(REFUSALS).make(many)[0]).items():
        assert tensor.sharding.is_equivalent_to(named_leaves(many.shardings)[name], tensor.ndim)


@pytest.mark.cpu
def test_weights_in_16_bits_have_a_gradient_in_float32(pair: tuple[Path, Any], small: js.Model) -> None:
    rounded = js.load_model(pair[0], "bfloat16")
    widened = js.Model(**{**vars(small), "params": jax.tree.map(lambda x: x.astype(jnp.float32), rounded.params)})
    (ours,), (expected,) = (Gradient(REFUSALS).make(model) for model in (rounded, widened))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_refusals_are_the_models_own(pair: tuple[Path, Any], small: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a keyword that this random model says after some prompts; after the others, its commonest refusal."""
    prompts = js.load_prompts("harmful", 5)
    tokens = encode(small, chat_texts(small.tokenizer, prompts), 0)
    answers = torch_tokens(pair[1], small, prompts, 24)
    assert greedy_tokens(small, tokens, 24) == answers
    texts = [small.tokenizer.decode(answer) for answer in answers]
    word = next(c for c in texts[1] if c.isalnum() and c not in texts[0])
    monkeypatch.setattr(refusal, "REFUSAL_KEYWORDS", (word,))
    own = [answer[:16] for answer, text in zip(answers, texts, strict=True) if word in text]
    commonest = max(own, key=own.count)
    expected = [answer[:16] if word in text else commonest for answer, text in zip(answers, texts, strict=True)]
    assert Refusals(number=5, target="none").tokens(small) == (tokens, expected, [])
    monkeypatch.setattr(refusal, "REFUSAL_KEYWORDS", ("\u2603",))
    with pytest.raises(js.UserError, match="refuses none of the first 5 prompts of harmful"):
        Refusals(number=5, target="none").tokens(small)


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5).filter(lambda g: np.linalg.norm(g) > 1e-3),
    st.floats(0.01, 100),
    st.integers(0, 12),
)
@settings(max_examples=20)
def test_the_worst_step_of_a_linear_function_is_its_gradient(slope: list[float], radius: float, steps: int) -> None:
    g = jnp.array(slope, jnp.float32)
    step, value = steepest_step(lambda s: (float(g @ s["x"]), {"x": g}), {"x": jnp.zeros_like(g)}, radius, steps)
    np.testing.assert_allclose(step["x"], radius * g / np.linalg.norm(g), rtol=1e-4, atol=1e-4 * radius)
    assert value == pytest.approx(radius * np.linalg.norm(g), rel=1e-4)


@pytest.mark.parametrize(("curvatures", "radius"), [((3.0, 1.0, -2.0), 2.0), ((-1.0, -2.0, -4.0), 10.0)])
def test_the_worst_step_of_a_quadratic_function(curvatures: tuple[float, ...], radius: float) -> None:
    """½ sᵀAs + bᵀs. On the surface, its maximum is where (μI − A) s = b with ‖s‖ = radius; else it is inside."""
    a, b = jnp.array(curvatures), jnp.array([1.0, -2.0, 0.5])
    expected = -np.asarray(b / a)
    if max(curvatures) > 0:
        low, high = max(curvatures), 1e3
        for _ in range(100):  # the norm falls with μ
            mu = (low + high) / 2
            low, high = (mu, high) if np.linalg.norm(b / (mu - a)) > radius else (low, mu)
        expected = np.asarray(b / (mu - a))

    def evaluate(step: Any) -> tuple[float, Any]:
        s = step["x"]
        return float(0.5 * (a * s * s).sum() + b @ s), {"x": a * s + b}

    step, _ = steepest_step(evaluate, {"x": jnp.zeros(3)}, radius, 200)
    np.testing.assert_allclose(step["x"], expected, atol=0.02 * radius)
    assert np.linalg.norm(step["x"]) <= radius * 1.0001


def test_no_random_direction_is_worse_than_the_worst(small: js.Model, loss: RefusalLoss) -> None:
    recipe = WorstCase(radius=0.05, steps=6, refusals=REFUSALS)
    (direction,) = recipe.make(small)
    size = norm(loss.weights)
    assert norm(direction) == pytest.approx(size, rel=1e-3)

    def at(tree: Any, c: float = recipe.radius) -> float:
        tensors = named_leaves(tree)
        moved = {name: w + np.float32(c) * tensors[name] for name, w in loss.weights.items()}
        return loss.value_and_gradient(moved)[0]

    worst = at(direction)
    (steepest,) = Gradient(REFUSALS).make(small)
    assert worst > at(steepest)
    assert worst > max(at(js.random_direction(small, seed)) for seed in range(100))


@pytest.mark.parametrize(
    "name",
    [
        "gradient",
        "gradient:advbench",
        "gradient:harmful:16",
        "gradient:harmful:8:I cannot",
        "gradient:harmful:8::Sure: here",
        "gradient:harmful:8::none",
        "worst-case",
        "worst-case:0.05",
        "worst-case:0.0002:20:mine.csv:4",
        "worst-case:0.0002:10:harmful:8:Sorry",
    ],
)
def test_a_recipe_writes_what_is_not_the_default(name: str) -> None:
    kind, _, option = name.partition(":")
    recipe = {recipe.kind: recipe for recipe in (Gradient, WorstCase)}[kind].parse(option)
    assert str(recipe) == name
    assert recipe.has_control
    assert recipe.count == 1


def test_an_empty_option_is_the_default() -> None:
    assert Gradient.parse("::Sorry") == Gradient(Refusals(text="Sorry"))
    assert Gradient.parse("") == Gradient()
    assert WorstCase.parse(":5") == WorstCase(steps=5)


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        (Gradient, "harmful:many", "number of prompts in the name of a direction must be a whole number, not 'many'"),
        (Gradient, "harmful:0", "number of prompts of a direction must be at least 1, not 0"),
        (Gradient, "harmful:4:[no]", "leave out colons and square brackets"),
        (WorstCase, "0", "radius of a worst-case direction must be positive, not 0"),
        (WorstCase, "nan", "radius in the name of a direction must be a finite number, not 'nan'"),
        (WorstCase, "0.1:2.5", "number of steps in the name of a direction must be a whole number, not '2.5'"),
        (WorstCase, "0.1:-1", "steps of a worst-case direction must be at least 0, not -1"),
    ],
)
def test_options_that_are_none(recipe: Any, option: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        recipe.parse(option)


@pytest.mark.parametrize(("fill", "message"), [(0.0, "is zero"), (np.nan, r"not finite \(NaN or infinite\)")])
def test_a_gradient_without_a_direction_is_a_sentence(small: js.Model, fill: float, message: str) -> None:
    params = jax.tree.map(lambda x: jnp.full_like(x, fill), small.params)
    for recipe in (Gradient(REFUSALS), WorstCase(refusals=REFUSALS)):
        with pytest.raises(js.UserError, match=message):
            recipe.make(js.Model(**{**vars(small), "params": params}))


def test_a_gradient_that_overflows_is_a_sentence() -> None:
    with pytest.raises(js.UserError, match="not finite"):
        positive_norm({"x": jnp.array([1.0, jnp.inf])})


OTHER_MESH = MeshShape(1, 4)
ALONG = f"gradient:harmful:3:{REFUSAL}:none"


@pytest.fixture(scope="module")
def scanned(small: js.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gradient") / "run"
    js.scan(small, [ALONG], out=directory, **SCAN)
    return directory


SCAN: dict[str, Any] = {"prompts": ["Hi", "Why?"], "steps": 2, "radius": 0.01, "max_new_tokens": 4}
SCAN |= {"progress": False, "shares": False}


def begun(scanned: Path, directory: Path) -> Path:
    """A copy of the scan that was interrupted in the middle."""
    shutil.copytree(scanned, directory)
    file = directory / "generations.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    return directory


@pytest.mark.parametrize("shape", [MeshShape(), OTHER_MESH], ids=["here", "on another mesh"])
def test_a_scan_along_the_gradient_is_resumed(
    pair: tuple[Path, Any], scanned: Path, shape: MeshShape, tmp_path: Path
) -> None:
    """The direction is made again: with the same bits on the same mesh, and close to it on another one."""
    run = begun(scanned, tmp_path / "run")
    js.scan(js.load_model(pair[0], "float32", mesh_shape=shape), [ALONG], out=run, **SCAN)
    assert (run / "generations.jsonl").read_text() == (scanned / "generations.jsonl").read_text()
    assert (run / "config.json").read_text() == (scanned / "config.json").read_text()


@pytest.mark.cpu
def test_a_run_that_recorded_checksums_of_its_tensors_is_resumed(
    small: js.Model, scanned: Path, tmp_path: Path
) -> None:
    run = begun(scanned, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    tensors = fingerprint(js.make_directions([ALONG], small)[0])
    assert config["directions"][0] != [tensors]
    former = json.dumps(config | {"directions": [[tensors], [f"control:{tensors}:0"]]}, indent=1) + "\n"
    (run / "config.json").write_text(former)
    js.scan(small, [ALONG], out=run, **SCAN)
    assert (run / "config.json").read_text() == former
    assert (run / "generations.jsonl").read_text() == (scanned / "generations.jsonl").read_text()
    js.measure(small, measures=["damage"], harmless=["Hi"], like=run, progress=False)
    for changed in (tensors[::-1], config["directions"][0][0][::-1]):
        config["directions"][0] = [changed]
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(js.UserError, match="directions"):
            js.scan(small, [ALONG], out=run, **SCAN)
        with pytest.raises(js.UserError, match=r"directions of the scan in .* have changed"):
            js.measure(small, measures=["damage"], harmless=["Hi"], like=run, progress=False)


def test_a_direction_is_identified_by_what_it_is_computed_from(
    pair: tuple[Path, Any], small: js.Model, tmp_path: Path
) -> None:
    """By its name, the weights and the tokens; and a file that it is made of, too, by its content."""
    path = tmp_path / "d.safetensors"
    js.save_direction(js.random_direction(small, 0), path, small)

    def identity(name: str, model: js.Model = small) -> Any:
        (prepared,) = prepare([[parse_direction(name)]], model)[0]
        return prepared.ids

    many = js.load_model(pair[0], "float32", mesh_shape=OTHER_MESH)
    (here,), (there,) = (js.make_directions([ALONG], model) for model in (small, many))
    assert fingerprint(here) != fingerprint(there), "else this test shows nothing"
    assert identity(ALONG) == identity(ALONG, many)
    moved = replace(small, params=jax.tree.map(lambda x: x * 2, small.params))
    others = [identity(ALONG, moved), identity(ALONG.replace(":3:", ":2:")), identity(f"weight-norm:[{ALONG}]")]
    composed = f"orthogonal:[{ALONG}][file:{path}]"
    others += [identity(composed)]
    js.save_direction(js.random_direction(small, 1), path, small)
    others += [identity(composed), identity(ALONG)]
    assert len(set(others)) == len(others)
    assert identity(f"control:[{ALONG}]") == (f"control:{identity(ALONG)[0]}:0",)
    assert identity(f"file:{path}") == (fingerprint(js.load_direction(path, small)),), "files have the same bits"
