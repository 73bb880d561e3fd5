"""Leading eigenvectors of the Hessian of the loss of refusal, against torch and a dense Hessian."""

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import MakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.hessian import Hessian, leading_eigenpair
from jaxscape.directions.objective import RefusalLoss, Refusals, norm
from jaxscape.models.checkpoint import named_leaves
from jaxscape.prompts.chat_format import chat_texts

PROMPTS = ["Hi", "Why?"]
ANSWER = "I cannot"


@pytest.fixture(scope="module")
def pair(make_model: MakeModel) -> tuple[Path, Any]:
    """A model with so few weights that their Hessian is a matrix that can be written down."""
    return make_model(
        hidden_size=2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="module")
def tiniest(pair: tuple[Path, Any]) -> js.Model:
    return js.load_model(pair[0], "float32")


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    path = tmp_path_factory.mktemp("prompts") / "short.txt"
    path.write_text("\n".join(PROMPTS))
    return Refusals(str(path), len(PROMPTS), ANSWER, "none")


@pytest.fixture(scope="module")
def dense(pair: tuple[Path, Any], tiniest: js.Model) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The names of the weights, and the gradient and the Hessian of the loss of refusal as torch computes them."""
    model = copy.deepcopy(pair[1]).double()
    weights = {name: weight for name, weight in model.named_parameters() if "norm" not in name}
    texts = chat_texts(tiniest.tokenizer, PROMPTS)
    (answer,) = tiniest.tokenizer([ANSWER], add_special_tokens=False)["input_ids"]
    loss = torch.zeros((), dtype=torch.double)
    for prompt in tiniest.tokenizer(texts, add_special_tokens=False)["input_ids"]:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(answer)) / len(texts)
    parts = torch.autograd.grad(loss, weights.values(), create_graph=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    eye = torch.eye(len(gradient), dtype=torch.double)
    rows = torch.autograd.grad(gradient, weights.values(), eye, is_grads_batched=True)
    hessian = torch.cat([part.reshape(len(eye), -1) for part in rows], dim=1)
    return list(weights), gradient.detach().numpy(), hessian.numpy()


def flat(tree: dict[str, Any], names: list[str]) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name]).ravel() for name in names]).astype(np.float64)


def test_products_with_the_hessian_are_those_of_torch(tiniest: js.Model, refusals: Refusals, dense: Any) -> None:
    names, _, hessian = dense
    loss = RefusalLoss(tiniest, refusals)
    for seed in range(3):
        tensors = named_leaves(js.random_direction(tiniest, seed))
        vector = {name: tensors[name] for name in names}
        expected = hessian @ flat(vector, names)
        ours = flat(loss.hessian_product(vector), names)
        assert np.linalg.norm(ours - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("number", [1, 2])
def test_eigenvectors_are_those_of_the_dense_hessian(
    tiniest: js.Model, refusals: Refusals, dense: Any, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names, gradient, hessian = dense
    value, expected = (part[..., -number] for part in np.linalg.eigh(hessian))
    (direction,) = Hessian(number, refusals).make(tiniest)
    assert f"the eigenvalue is {value:.2g}"[:-1] in capsys.readouterr().err
    assert norm(direction) == pytest.approx(norm(js.random_direction(tiniest, 0)), rel=1e-3)
    ours = flat(named_leaves(direction), names)
    ours /= np.linalg.norm(ours)
    assert ours @ gradient > 0
    assert np.linalg.norm(hessian @ ours - value * ours) < 0.03 * value
    assert abs(ours @ expected) > 0.99


def test_a_hessian_that_does_not_converge_is_a_warning(
    tiniest: js.Model, refusals: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(product: Any, start: Any, number: int) -> Any:
        return leading_eigenpair(product, start, number, most=1, tolerance=1e-9)

    monkeypatch.setattr("jaxscape.directions.hessian.leading_eigenpair", impatient)
    monkeypatch.setattr("jaxscape.directions.hessian.TOLERANCE", 1e-9)
    with pytest.warns(UserWarning, match="after 60 products with the Hessian: the direction is strongly curved, but"):
        Hessian(1, refusals).make(tiniest)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=24, max_size=24),
    st.floats(0.1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=15)
def test_eigenpairs_of_matrices(values: list[float], gap: float, number: int, seed: int) -> None:
    """Symmetric matrices of which the largest eigenvalues are apart, in two tensors; the residual is the true one."""
    spectrum = np.sort(np.array(values))
    spectrum[-3:] = spectrum[-4] + gap * np.array([1, 2, 3])
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(len(values),) * 2))[0]
    matrix = jnp.asarray(basis * spectrum @ basis.T, jnp.float32)

    def product(tree: Any) -> Any:
        image = matrix @ jnp.concatenate([tree["a"], tree["b"].ravel()])
        return {"a": image[:4], "b": image[4:, None]}

    start = rng.normal(size=len(values)).astype(np.float32)
    pair = leading_eigenpair(product, {"a": jnp.asarray(start[:4]), "b": jnp.asarray(start[4:, None])}, number, 1e-3)
    vector = np.concatenate([pair.vector["a"], pair.vector["b"].ravel()])
    scale = np.abs(spectrum).max()
    assert pair.value == pytest.approx(spectrum[-number], abs=1e-2 * scale)
    assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-3)
    assert vector @ start > -1e-3
    assert np.linalg.norm(np.asarray(matrix) @ vector - pair.value * vector) <= pair.residual + 1e-3 * scale
    assert pair.residual <= 1e-3 * abs(pair.value) + 1e-4 * scale or gap < 0.5


def test_a_matrix_that_leaves_the_start_where_it_is_has_one_eigenvector() -> None:
    pair = leading_eigenpair(lambda tree: {"a": 3 * tree["a"]}, {"a": jnp.arange(5.0)}, 1)
    assert (pair.value, pair.residual) == (pytest.approx(3), 0)
    with pytest.raises(js.UserError, match="has only 1 eigenvectors"):
        leading_eigenpair(lambda tree: {"a": 3 * tree["a"]}, {"a": jnp.arange(5.0)}, 2)
    with pytest.raises(js.UserError, match="not finite"):
        leading_eigenpair(lambda tree: {"a": jnp.nan * tree["a"]}, {"a": jnp.arange(5.0)}, 1)


@pytest.mark.parametrize("name", ["hessian", "hessian:2", "hessian:1:advbench:4", "hessian:1:harmful:8:Sorry:Sure"])
def test_a_recipe_writes_what_is_not_the_default(name: str) -> None:
    recipe = Hessian.parse(name.partition(":")[2])
    assert str(recipe) == name
    assert recipe.has_control


@pytest.mark.parametrize(("option", "message"), [("0", "numbered from 1"), ("x", "must be a whole number, not 'x'")])
def test_options_that_are_none(option: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        Hessian.parse(option)


def test_a_model_without_a_gradient_is_a_sentence(tiniest: js.Model, refusals: Refusals) -> None:
    params = jax.tree.map(jnp.zeros_like, tiniest.params)
    with pytest.raises(js.UserError, match="gradient of the refusal likelihood is zero"):
        Hessian(1, refusals).make(js.Model(**{**vars(tiniest), "params": params}))
