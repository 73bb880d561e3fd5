"""The refusal direction, against a direct computation from the activations that transformers returns."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from helpers import MakeModel, assert_same_tree
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions import examples
from jaxscape.directions.examples import PromptSets
from jaxscape.directions.kinds import parse_direction, prepare
from jaxscape.directions.refusal import (
    Outcome,
    Refusal,
    best_place,
    common_suffix,
    mean_difference,
    refusal_score,
    separation,
)
from jaxscape.directions.storage import Factored
from jaxscape.models.activations import residual_stream
from jaxscape.models.checkpoint import named_leaves
from jaxscape.prompts.chat_format import chat_texts


def torch_direction(torch_model: Any, model: js.Model, layer: int, position: int, count: int) -> np.ndarray:
    """Arditi et al., equation 1: the difference of means of transformers' hidden states, normalised."""
    means = []
    for name in ("harmful", "benign"):
        texts = chat_texts(model.tokenizer, js.load_prompts(name, count))
        tokens = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        with torch.no_grad():
            states = [torch_model(torch.tensor([t]), output_hidden_states=True).hidden_states for t in tokens]
        means.append(np.mean([state[layer][0, position].double().numpy() for state in states], axis=0))
    difference = means[0] - means[1]
    return difference / np.linalg.norm(difference)


def test_each_writing_matrix_loses_the_direction(make_model: MakeModel) -> None:
    """W − r rᵀ W for what writes, and nothing else changes, by the formula in numpy."""
    directory, torch_model = make_model(attention_bias=True, mlp_bias=True)
    model = js.load_model(directory, "float32")
    r = torch_direction(torch_model, model, 1, -2, 6)
    (direction,) = js.make_directions(["refusal:1@-2:harmful,benign:6"], model)
    moved = named_leaves(js.model_at(model, [direction], [1.0]).params)
    for name, weight in named_leaves(model.params).items():
        original = weight = np.asarray(weight, np.float64)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight = weight - np.outer(r, r @ weight)
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            weight = weight - r * (r @ weight)
        elif name == "model.embed_tokens.weight":
            weight = weight - np.outer(weight @ r, r)
        np.testing.assert_allclose(moved[name], weight, atol=5e-6, err_msg=name)
        leaf = named_leaves(direction)[name]
        assert isinstance(leaf, Factored)
        assert leaf.rank == int(bool((weight != original).any()))


def test_nothing_is_written_along_the_direction_any_more(make_model: MakeModel) -> None:
    """Also where a norm follows the matrix, embeddings are scaled, and the output head is tied."""
    model = js.load_model(make_model("gemma2", head_dim=8)[0], "float32")
    recipe = Refusal(1, -1, PromptSets(number=4))
    r = recipe.unit_vector(model)
    moved = js.model_at(model, [recipe], [1.0])
    tokens = [[5, 9, 200, 31, 7]]
    along = residual_stream(moved, tokens, 5)[0] @ r
    assert np.abs(along).max() < 1e-3
    assert np.abs(residual_stream(model, tokens, 5)[0] @ r).max() > 0.1


@given(st.lists(st.integers(0, 3), min_size=1), st.lists(st.integers(0, 3), min_size=1))
def test_the_common_suffix(a: list[int], b: list[int]) -> None:
    count = common_suffix([a, b])
    assert a[len(a) - count :] == b[len(b) - count :]
    longer = count + 1
    assert longer > min(len(a), len(b)) or a[-longer:] != b[-longer:]


def test_difference_separation_and_score_by_hand() -> None:
    harmful, harmless = np.array([[2.0, 0], [4, 0]]), np.array([[-1.0, 0], [-3, 0]])
    np.testing.assert_array_equal(unit := mean_difference(harmful, harmless), [1, 0])
    assert separation(unit, harmful, harmless) == 5
    np.testing.assert_array_equal(mean_difference(harmful, harmful), 0)
    probabilities = np.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    np.testing.assert_allclose(refusal_score(np.log(probabilities), [0, 1]), (0 + np.log(9)) / 2)


def test_the_lowest_score_at_a_small_damage() -> None:
    """The paper's rule where a damage of 0.1 is reached, and else within 1.5 times the least damage."""
    mild = {(1, -1): Outcome(-1.0, 0.02), (2, -1): Outcome(-3.0, 0.09), (3, -1): Outcome(-9.0, 0.11)}
    assert best_place(mild) == (2, -1)
    harsh = {(1, -1): Outcome(2.0, 0.05), (2, -1): Outcome(-1.0, 0.4), (3, -2): Outcome(-4.0, 0.59)}
    assert best_place(harsh | {(4, -1): Outcome(-9.0, 0.61)}) == (3, -2)
    assert best_place({(1, -1): Outcome(2.0, 0.5), (2, -1): Outcome(1.5, 0.6)}) == (2, -1)


@pytest.fixture
def refusing(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> js.Model:
    """The tiny model, whose answers to the even ones of the prompts count as refusals."""
    answers: dict[str, bool] = {}
    monkeypatch.setattr(examples, "is_refusal", lambda text: answers.setdefault(text, len(answers) % 2 == 0))
    return tiny


def test_the_place_is_chosen_by_what_ablation_does(refusing: js.Model, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a search that forms every ablated model: transformers' way, and the rule in the docstring."""
    recipe = Refusal(sets=PromptSets(number=8))
    chosen, _ = recipe.choose(refusing)
    assert f"refusal:auto:harmful,benign:8: chose {chosen} on 2 further prompts of each set" in capsys.readouterr().err
    assert chosen.layer == 1  # of two layers, the last fifth is no candidate, nor is the embedding
    prompts = [recipe.sets.prompts(refusing, first, end) for first, end in ((0, 8), (8, 10))]
    count = common_suffix([*prompts[0][0], *prompts[0][1]])
    apart = []
    for position in range(-min(count, 8), 0):
        r = replace(recipe, layer=1, position=position).unit_vector(refusing)
        ours, others = (residual_stream(refusing, texts, -position)[:, 1, 0] @ r for texts in prompts[1])
        apart.append((ours.mean() - others.mean()) / np.sqrt((ours.var() + others.var()) / 2))
    assert chosen.position == np.argmax(apart) - len(apart)
    assert str(parse_direction(str(chosen))) == str(chosen)
    recipes = (recipe, chosen, replace(chosen, position=chosen.position - 1))
    sets = prepare([[parse_direction(f"weight-norm:[{one}]")] for one in recipes], refusing)
    one, same, other = (made for (made,) in sets)
    assert_same_tree(*(jax.tree.leaves(made.recipe.make(refusing)) for made in (one, same)))
    assert one.ids == same.ids, "what is chosen is part of what identifies a direction"
    assert one.ids != other.ids


def test_a_model_that_refuses_nothing_needs_a_layer(tiny: js.Model) -> None:
    with pytest.raises(js.UserError, match="The model refuses none of 2 prompts of harmful, so the layer of refusal"):
        js.make_directions(["refusal:auto:harmful,benign:8"], tiny)


@pytest.mark.parametrize(
    "name",
    ["refusal", "refusal:3", "refusal:3@-4", "refusal:auto:advbench,harmless", "refusal:2:harmful,benign:32"],
)
def test_a_refusal_direction_has_the_name_that_it_was_made_from(name: str) -> None:
    assert str(parse_direction(name)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refusal:one", "Cannot read the layer 'one' of a refusal direction: write refusal"),
        ("refusal:3@0", "Cannot read the layer '3@0'"),
        ("refusal:3:harmful", "Cannot read the prompts 'harmful:' in the name of a direction: write HARMFUL,HARMLESS"),
        ("refusal:3:a,b:x", "Cannot read the prompts 'a,b:x'"),
        ("refusal:3:a,b:0", "The number of prompts of a direction must be at least 1, not 0"),
        ("refusal:3:a,[b", "The prompts '\\[b' cannot stand in the name of a direction"),
        ("refusal:auto:harmful,benign:2", "is chosen on a fourth of the prompts: give at least 4, or a layer"),
        ("refusal:2:harmful,benign:4", "needs the layer 2, but .* has the layers 0 to 1"),
        ("refusal:0:harmful,benign:4", "do not differ at the layer 0 and the token -1"),
        ("refusal:1@-900:harmful,benign:4", "needs the token -900 of each prompt, but one is shorter"),
        ("refusal:1:nothing,benign:4", "There is no prompt set 'nothing'"),
    ],
)
def test_refusal_directions_that_cannot_be_made(tiny: js.Model, name: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.make_directions([name], tiny)
