"""Safety-critical weights and ranks, against the definitions of Wei et al. in torch and numpy."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import MakeModel

import jaxscape as js
from jaxscape.directions import examples
from jaxscape.directions.examples import Answered, PromptSets
from jaxscape.directions.importance import snip_scores, wanda_scores
from jaxscape.directions.kinds import largest_rank, parse_direction
from jaxscape.directions.masks import Mask, top
from jaxscape.directions.singular import left_singular_vectors
from jaxscape.directions.stacked import rank_of
from jaxscape.directions.storage import Factored
from jaxscape.models.checkpoint import named_leaves
from jaxscape.prompts.chat_format import chat_texts

SETS = "harmful,benign:6"


@pytest.fixture(scope="module")
def pair(make_model: MakeModel) -> tuple[js.Model, Any]:
    """A model and transformers' reading of it. The wider layers have more outputs than inputs, or fewer."""
    directory, torch_model = make_model(num_hidden_layers=1)
    return js.load_model(directory, "float32"), torch_model


@pytest.fixture(autouse=True)
def harmful_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model refuses nothing, so the answers to harmful prompts count as refusals."""
    kept = examples._answered

    def answered(model: js.Model, prompts: Any, refuses: bool) -> Answered:
        return kept(model, prompts, refuses=False)

    monkeypatch.setattr(examples, "_answered", answered)


def torch_examples(model: js.Model, name: str, count: int = 6) -> list[tuple[list[int], int]]:
    """The tokens of each prompt with its answer, and the length of the prompt: transformers' greedy answers."""
    answered = PromptSets("harmful", "benign", count)
    texts, begins = answered.refused(model) if name == "harmful" else answered.complied(model)
    prompts = model.tokenizer(chat_texts(model.tokenizer, js.load_prompts(name, count)), add_special_tokens=False)
    assert [text[:begin] for text, begin in zip(texts, begins, strict=True)] == prompts["input_ids"]
    return list(zip(texts, begins, strict=True))


def linear_layers(torch_model: Any) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in torch_model.model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    }


def torch_inputs(torch_model: Any, chats: list[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    """The inputs of each linear layer at the tokens of the answers, [in, tokens]."""
    inputs: dict[str, list[np.ndarray]] = {}
    for text, begin in chats:
        handles = [
            module.register_forward_hook(
                lambda _, x, __, name=name, begin=begin: inputs.setdefault(name, []).append(x[0][0, begin:].numpy())
            )
            for name, module in linear_layers(torch_model).items()
        ]
        with torch.no_grad():
            torch_model(torch.tensor([text]))
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(parts).T.astype(np.float64) for name, parts in inputs.items()}


def torch_snip(torch_model: Any, chats: list[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    """|W| times the mean magnitude of the gradients of each example's loss, which transformers computes."""
    layers = linear_layers(torch_model)
    total = {name: torch.zeros_like(module.weight) for name, module in layers.items()}
    for text, begin in chats:
        torch_model.zero_grad()
        labels = torch.tensor([[-100] * begin + text[begin:]])
        torch_model(torch.tensor([text]), labels=labels).loss.backward()
        for name, module in layers.items():
            total[name] += module.weight.grad.abs()
    return {name: (layers[name].weight.abs() * total[name]).detach().numpy() / len(chats) for name in layers}


def torch_wanda(torch_model: Any, chats: list[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    inputs = torch_inputs(torch_model, chats)
    return {
        name: np.abs(module.weight.detach().numpy()) * np.linalg.norm(inputs[name], axis=1)
        for name, module in linear_layers(torch_model).items()
    }


@pytest.mark.parametrize(("ours", "theirs"), [(snip_scores, torch_snip), (wanda_scores, torch_wanda)])
def test_scores_are_those_of_torch(pair: tuple[js.Model, Any], ours: Callable[..., Any], theirs: Any) -> None:
    model, torch_model = pair
    scores = ours(model, PromptSets("harmful", "benign", 6).refused(model))
    expected = theirs(torch_model, torch_examples(model, "harmful"))
    assert {name.removesuffix(".weight") for name in scores} == expected.keys()
    for name, score in scores.items():
        reference = expected[name.removesuffix(".weight")]
        np.testing.assert_allclose(score, reference, rtol=1e-3, atol=1e-4 * reference.max(), err_msg=name)


@pytest.mark.parametrize("is_by_row", [False, True])
def test_the_top_scores_are_those_of_torch(is_by_row: bool) -> None:
    scores = np.random.default_rng(0).random((6, 50)).astype(np.float32)
    groups = torch.from_numpy(scores if is_by_row else scores.reshape(1, -1))
    count = int(0.07 * groups.shape[1])
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, torch.topk(groups, count, dim=1).indices, True)
    np.testing.assert_array_equal(top(jnp.asarray(scores), 7.0, is_by_row), expected.numpy().reshape(scores.shape))
    assert not top(jnp.asarray(scores), 0.1, is_by_row).any()
    assert top(jnp.asarray(scores), 100.0, is_by_row).all()


@pytest.mark.parametrize(("score", "is_by_row"), [("snip", False), ("wanda", True)])
def test_a_mask_is_the_difference_of_two_sets_and_prunes_them(
    pair: tuple[js.Model, Any], score: str, is_by_row: bool
) -> None:
    model, _ = pair
    recipe = Mask(score, 20.0, 10.0, PromptSets("harmful", "benign", 6))
    mask = named_leaves(recipe.mask(model))
    scores = {"snip": snip_scores, "wanda": wanda_scores}[score]
    safety, utility = scores(model, recipe.sets.refused(model)), scores(model, recipe.sets.complied(model))
    moved = named_leaves(js.model_at(model, [str(recipe)], [1.0]).params)
    for name, weight in named_leaves(model.params).items():
        selected = np.zeros(weight.shape, bool)
        if name in safety:
            for row in range(len(weight)) if is_by_row else [slice(None)]:
                ours, others = np.asarray(safety[name])[row], np.asarray(utility[name])[row]
                size = ours.size
                selected[row] = (ours >= np.sort(ours.ravel())[-int(0.2 * size)]) & (
                    others < np.sort(others.ravel())[-int(0.1 * size)]
                )
            assert selected.any()
        np.testing.assert_array_equal(mask[name], selected, err_msg=name)
        np.testing.assert_array_equal(moved[name], np.where(selected, 0, weight), err_msg=name)


def test_a_mask_restricts_any_other_direction(pair: tuple[js.Model, Any]) -> None:
    model, recipe = pair[0], Mask("wanda", 20.0, 10.0, PromptSets("harmful", "benign", 6))
    mask, noise = named_leaves(recipe.mask(model)), named_leaves(js.random_direction(model, 3))
    (masked,) = js.make_directions([f"masked:[random:3][{recipe}]"], model)
    for name, leaf in named_leaves(masked).items():
        np.testing.assert_array_equal(leaf, np.where(mask[name], noise[name], 0), err_msg=name)
    with pytest.raises(js.UserError, match="The direction random:3 is no mask: write masked"):
        parse_direction("masked:[random:3][random:3]")


@pytest.mark.parametrize("free", [None, 5])
def test_singular_directions_remove_the_top_ranks(pair: tuple[js.Model, Any], free: int | None) -> None:
    """ΔW = (I − Πᵘ) Πˢ W, with the projections from numpy's SVD of W X with the inputs that torch has."""
    model, torch_model = pair
    name = f"singular:3:{free or ''}:{SETS}"
    (direction,) = js.make_directions([name], model)
    safety, utility = (torch_inputs(torch_model, torch_examples(model, of)) for of in ("harmful", "benign"))
    leaves = named_leaves(direction)
    for layer, module in linear_layers(torch_model).items():
        weight = module.weight.detach().numpy().astype(np.float64)
        removed = np.linalg.svd(weight @ safety[layer])[0][:, :3]
        change = removed @ removed.T @ weight
        if free is not None:
            kept = np.linalg.svd(weight @ utility[layer])[0][:, : min(weight.shape) - free]
            change = change - kept @ kept.T @ change
        leaf = leaves.pop(f"{layer}.weight")
        assert isinstance(leaf, Factored)
        assert leaf.rank == 3
        product = np.asarray(leaf.left) @ np.asarray(leaf.right)
        np.testing.assert_allclose(product, -change, atol=2e-3 * np.abs(weight).max(), err_msg=layer)
    assert all(leaf.rank == 0 for leaf in leaves.values())
    assert largest_rank([parse_direction(name)], model) == rank_of(direction) == 3


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_left_singular_vectors_are_those_of_numpy(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal(shape), rng.standard_normal((shape[1], 4))  # fewer tokens than features
    vectors = left_singular_vectors(weight, inputs @ inputs.T)
    expected = np.linalg.svd(weight @ inputs, full_matrices=False)[0]
    np.testing.assert_allclose(np.abs((vectors[:, :4] * expected).sum(0)), 1, rtol=1e-5)
    assert vectors.shape == (12 if shape[0] == 12 else 7, 7)
    assert not vectors[:, 4:].any()


@pytest.mark.parametrize(
    "name",
    [
        "mask:snip",
        "mask:wanda:5",
        "mask:snip:3:0.5",
        "mask:snip:3::advbench,harmless:32",
        "masked:[random:0][mask:snip:5]",
        "singular:4",
        "singular:4:64",
        "singular:4::advbench,harmless",
    ],
)
def test_a_recipe_has_the_name_that_it_was_made_from(name: str) -> None:
    assert str(parse_direction(name)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask", "There is no direction mask:: write mask:snip"),
        ("mask:magnitude", "There is no direction mask:magnitude: write mask:snip"),
        ("mask:snip:0", "There is no direction mask:snip:0"),
        ("mask:snip:three", "The percentage of safety in the name of a direction must be a finite number, not 'three'"),
        ("mask:wanda:3:3:harmful", "Cannot read the prompts 'harmful:'"),
        (f"mask:wanda:1:1:{SETS}", "The mask mask:wanda:1:.* selects no weight: raise the first percentage"),
        ("singular", "The direction 'singular' needs an option: write singular:RANK"),
        ("singular:0", "The direction singular:0 removes nothing"),
        ("singular:a", "Cannot read the direction 'singular:a'"),
        (f"singular:17::{SETS}", "removes 17 ranks of each matrix, but .*k_proj.weight has only 16: give a lower rank"),
    ],
)
def test_directions_that_cannot_be_made(pair: tuple[js.Model, Any], name: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        js.make_directions([name], pair[0])


def test_answers_are_sorted_by_whether_they_refuse(pair: tuple[js.Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, sets = pair[0], PromptSets("harmful", "benign", 6)
    monkeypatch.undo()
    with pytest.raises(js.UserError, match="The model refuses none of the first 6 prompts of harmful"):
        sets.refused(model)
    assert len(sets.complied(model).texts) == 6
    monkeypatch.setattr(examples, "is_refusal", lambda text: True)
    assert len(sets.refused(model).texts) == 6
    with pytest.raises(js.UserError, match="The model refuses all of the first 6 prompts of benign"):
        sets.complied(model)
