"""Recipes: one way to name a direction, and the model at a point along it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MakeModel, assert_same_tree

import jaxscape as js
from jaxscape.directions import kinds
from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import (
    COMPOSED_KINDS,
    KINDS,
    Given,
    largest_rank,
    num_stored,
    parse_direction,
    prepare,
    recipe_of,
)
from jaxscape.directions.point import materialise
from jaxscape.directions.random import Random
from jaxscape.models.checkpoint import fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "random:0",
        "random:4294967295",
        "file:a/b.safetensors",
        "to:org/model@main",
        "low-rank:4:7",
        "sparse:1:0",
        "sparse:0.3333333333333333:0",
        "sparse:1e-07:0",
    ],
)
def test_a_recipe_has_the_name_that_it_was_made_from(name: str) -> None:
    assert str(parse_direction(name)) == name


@pytest.mark.parametrize("name", ["bf16", "", "exactly"])
def test_an_unknown_storage_is_a_user_error(tiny: js.Model, name: str) -> None:
    for make in (lambda: js.random_direction(tiny, 0, storage=name), lambda: js.make_directions([0], tiny, name)):
        with pytest.raises(js.UserError, match=f"Unknown direction storage '{name}'.* choose exact, seed, bfloat16"):
            make()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random", "The direction 'random' needs an option: write random:SEED"),
        ("to:", "The direction 'to' needs an option: write to:MODEL"),
        ("file", "The direction 'file' needs an option: write file:PATH"),
        ("principal", "The direction 'principal' needs an option: write principal:RUN"),
        ("random:one", "The seed of the direction 'random' is a number, not 'one': write random:SEED"),
        ("random:-1", "The seed of the direction 'random' is a number, not '-1'"),
        ("random:4294967296", "seed"),
        ("randomly:0", r"Unknown direction 'randomly:0' \(did you mean random:SEED"),
        ("", "Unknown direction '': write one of random:SEED, "),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        parse_direction(name)


def test_every_kind_keeps_the_protocol() -> None:
    kinds = (*KINDS, *COMPOSED_KINDS)
    assert len({kind.kind for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert kind.usage.startswith(kind.kind)
        assert all(hasattr(kind, name) for name in ("is_interpolation", "count", "make"))
    for kind in KINDS:
        options = {"sparse": "0.5:0", "low-rank": "2:0", "worst-case": "0.1", "hessian": "1"}
        options |= {"quantisation": "int8", "mask": "snip", "singular": "1"}
        assert isinstance(kind.parse(options.get(kind.kind, "0")), Recipe)


REFUSAL = "refusal:1:harmful,benign:4"


@pytest.mark.parametrize(
    "name", [REFUSAL, f"weight-norm:[{REFUSAL}]", f"control:[tensor-norm:[{REFUSAL}]]", "low-rank:2:0", "random:0"]
)
def test_a_rank_is_known_before_a_direction_is_made(name: str, tiny: js.Model, tiny_dir: Path) -> None:
    weightless = js.load_model(tiny_dir, "float32", weights=False)
    recipe, ((made,),) = parse_direction(name), prepare([[parse_direction(name)]], tiny)
    assert largest_rank([recipe], weightless) == largest_rank([made.recipe])
    assert largest_rank([made.recipe]) == {"random:0": None, "low-rank:2:0": 2}.get(name, 1)


def test_a_refusal_direction_that_moves_biases_has_no_rank(make_model: MakeModel) -> None:
    model = js.load_model(make_model("llama", attention_bias=True)[0], "float32")
    ((made,),) = prepare([[parse_direction(REFUSAL)]], model)
    assert largest_rank([parse_direction(REFUSAL)], model) is largest_rank([made.recipe]) is None


def test_names_seeds_trees_and_recipes_make_the_same_direction(tiny: js.Model, tmp_path: Path) -> None:
    tree = js.random_direction(tiny, 3)
    js.save_direction(tree, tmp_path / "d.safetensors", tiny)
    for direction in (3, np.int64(3), "random:3", Random(3), tree, f"file:{tmp_path / 'd.safetensors'}"):
        (made,) = js.make_directions([direction], tiny)
        assert_same_tree(made, tree)


def test_a_random_direction_is_orthogonal_to_the_one_before_it(tiny: js.Model) -> None:
    first, second = js.make_directions(["random:0", "random:1"], tiny)
    assert_same_tree(second, js.random_direction(tiny, 1, orthogonal_to=first))
    given, third = js.make_directions([first, 1], tiny)
    assert_same_tree(third, second)
    assert_same_tree(given, first)


def test_what_identifies_a_direction_in_a_run(tiny: js.Model) -> None:
    tree = js.random_direction(tiny, 7)
    (drawn,), (given,) = prepare([[Random(7)], [recipe_of(tree)]], tiny)
    assert (drawn.recipe, drawn.ids) == (Random(7), (7,)), "a random direction is made when it is needed"
    assert given.ids == (fingerprint(tree),)


def test_a_direction_that_is_drawn_where_it_is_used_can_be_given(tiny: js.Model) -> None:
    """It has a checksum of its own, and a scan along it is the scan along the stored one."""
    drawn, other = (js.random_direction(tiny, seed, storage="seed") for seed in (7, 8))
    exact = js.random_direction(tiny, 7)
    assert fingerprint(drawn) == fingerprint(js.random_direction(tiny, 7, storage="seed")) != fingerprint(other)
    texts = []
    for direction in (drawn, exact):
        options: dict[str, Any] = {"steps": 2, "max_new_tokens": 4, "shares": False, "progress": False}
        texts.append(js.scan(tiny, [direction], prompts=["Hi", "Say it"], **options).asr.tolist())
        moved = js.model_at(tiny, [direction], [0.25])
    assert texts[0] == texts[1]
    assert_same_tree(js.model_at(tiny, [drawn], [0.25]).params, moved.params)


def test_which_directions_are_stored(tiny: js.Model) -> None:
    given, names = js.random_direction(tiny, 1), ["random:0", "low-rank:2:0", "filter:0", "weight-norm:[sparse:0.5:0]"]
    assert [num_stored([parse_direction(name)]) for name in names] == [(0, 0), (0, 0), (0, 1), (0, 1)]
    assert num_stored([parse_direction("to:model"), parse_direction("filter:0")]) == (1, 1)
    assert num_stored([Given((given,))]) == (0, 0), "it is on the devices already"
    assert num_stored([Given((jax.device_get(given),))]) == (1, 0)


def test_a_prepared_direction_waits_in_host_memory(tiny: js.Model) -> None:
    recipe = parse_direction(f"weight-norm:[{REFUSAL}]")
    ((waiting,),) = prepare([[recipe]], tiny)
    assert isinstance(waiting.recipe, Given)
    assert {type(leaf) for leaf in jax.tree.leaves(waiting.recipe.directions)} == {np.ndarray}
    on_device, again = (jax.tree.leaves(js.make_directions([one], tiny)) for one in (waiting.recipe, recipe))
    assert all(isinstance(leaf, jax.Array) for leaf in on_device)
    assert_same_tree(on_device, again)


def test_the_model_at_a_point(tiny: js.Model, make_model: MakeModel) -> None:
    directions = js.make_directions([0, 1], tiny)
    moved = js.model_at(tiny, [0, 1], [0.25, -0.5])
    assert_same_tree(moved.params, materialise(tiny.params, directions, jnp.array([0.25, -0.5], jnp.float32)))
    assert moved.tokenizer is tiny.tokenizer
    assert_same_tree(js.model_at(tiny, [], []).params, tiny.params)
    directory, _ = make_model(seed=5)
    other = js.load_model(directory, "float32")
    end = js.model_at(tiny, [f"to:{directory}"], [1.0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), end.params, other.params)
    with pytest.raises(js.UserError, match="There are 2 directions, but 1 coordinates"):
        js.model_at(tiny, [0, 1], [0.5])
    with pytest.raises(js.UserError, match=r"missing lm_head\.weight"):
        js.model_at(tiny, [{"model": {"norm": {"weight": np.zeros(32)}}}], [0.5])


class Zero:
    """A kind of direction that a contributor adds."""

    kind = "zero"
    usage = "zero:ANYTHING"
    is_interpolation = False
    count = 1

    @classmethod
    def parse(cls, option: str) -> "Zero":
        return cls()

    def __str__(self) -> str:
        return "zero:0"

    def make(self, model: js.Model) -> list[Any]:
        return [jax.tree.map(jnp.zeros_like, model.params)]


def test_a_new_kind_is_one_class_in_the_registry(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", (*KINDS, Zero))
    land = js.scan(tiny, ["zero:0"], prompts=["Hi", "Why?"], steps=2, max_new_tokens=4, progress=False, shares=False)
    assert len(set(land.asr.ravel().tolist())) == 1


def test_the_axis_to_another_model_runs_from_0_to_1(tiny: js.Model, make_model: MakeModel) -> None:
    directory, _ = make_model(seed=5)
    options: dict[str, Any] = {"prompts": ["Hi", "Why?"], "steps": 2, "max_new_tokens": 4, "progress": False}
    (axis,) = js.scan(tiny, [f"to:{directory}"], **options).axes
    assert (axis.name, axis.values) == ("interpolation", (0.0, 0.5, 1.0))
    with pytest.raises(js.UserError, match="these need different ones"):
        js.scan(tiny, [0, f"to:{directory}"], **options)


def test_seeds_are_checked_before_anything_is_written(tiny: js.Model, tmp_path: Path) -> None:
    for directions in ([-1], [2**32], ["random:4294967296"], [(0, 2**32)]):
        with pytest.raises(js.UserError, match="seed"):
            js.scan(
                tiny,
                directions,
                prompts=["Hi"],
                steps=2,
                max_new_tokens=4,
                out=tmp_path / "run",
                progress=False,
                shares=False,
            )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("direction", [None, 0.5, Path("d.safetensors")])
def test_what_is_no_direction_is_a_user_error(direction: Any) -> None:
    message = f"A direction cannot be a {type(direction).__name__}: give a tree"
    with pytest.raises(js.UserError, match=message):
        recipe_of(direction)
