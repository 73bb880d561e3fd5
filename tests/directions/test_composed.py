"""Directions that are made of others, scaled ones, and random controls."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.directions.base import split_parts
from jaxscape.directions.kinds import parse_direction, prepare
from jaxscape.directions.storage import dense_tree
from jaxscape.landscapes.choice import choose_axes, choose_directions, choose_grid, with_controls
from jaxscape.models.checkpoint import named_leaves


def made(model: js.Model, name: str) -> dict[str, np.ndarray]:
    (direction,) = js.make_directions([name], model)
    return {key: np.asarray(leaf, np.float64) for key, leaf in named_leaves(dense_tree(direction)).items()}


def flat(direction: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([leaf.ravel() for leaf in direction.values()])


def test_sums_and_projections_are_those_of_vectors(tiny: js.Model) -> None:
    a, b = flat(made(tiny, "random:0")), flat(made(tiny, "gaussian:1"))
    along = (a @ b) / (b @ b) * b
    for name, expected in (
        ("sum:[random:0][gaussian:1]", a + b),
        ("orthogonal:[random:0][gaussian:1]", a - along),
        ("projected:[random:0][gaussian:1]", along),
    ):
        np.testing.assert_allclose(flat(made(tiny, name)), expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_restricted_direction_is_zero_elsewhere(tiny: js.Model) -> None:
    whole = made(tiny, "random:0")
    for where, is_kept in (
        ("*mlp*", lambda name: "mlp" in name),
        ("layers=1-1", lambda name: ".layers.1." in name),
        ("layers=0-0,*q_proj*", lambda name: ".layers.0." in name or "q_proj" in name),
    ):
        for name, leaf in made(tiny, f"restricted:[random:0]:{where}").items():
            np.testing.assert_array_equal(leaf, whole[name] if is_kept(name) else 0 * leaf)
    with pytest.raises(js.UserError, match=r"'layers=5-9' selects no parameter .* numbers 0 to 1"):
        made(tiny, "restricted:[random:0]:layers=5-9")


def test_scaled_directions_have_the_norms_of_the_weights(tiny: js.Model) -> None:
    weights = {name: np.asarray(leaf) for name, leaf in named_leaves(tiny.params).items() if "norm" not in name}
    whole = np.sqrt(sum(np.linalg.norm(leaf) ** 2 for leaf in weights.values()))
    source, scaled = flat(made(tiny, "gaussian:2")), flat(made(tiny, "weight-norm:[gaussian:2]"))
    np.testing.assert_allclose(np.linalg.norm(scaled), whole, rtol=1e-5)
    np.testing.assert_allclose(scaled / whole, source / np.linalg.norm(source), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(flat(made(tiny, "random:2"))), whole, rtol=1e-5)
    for name, leaf in made(tiny, "tensor-norm:[gaussian:2]").items():
        np.testing.assert_allclose(np.linalg.norm(leaf), np.linalg.norm(weights.get(name, 0)), rtol=1e-5, err_msg=name)


def test_a_control_has_the_norms_and_ranks_of_its_direction(tiny: js.Model) -> None:
    source, control = made(tiny, "restricted:[gaussian:2]:*mlp*"), made(tiny, "control:[restricted:[gaussian:2]:*mlp*]")
    for name, leaf in source.items():
        np.testing.assert_allclose(np.linalg.norm(control[name]), np.linalg.norm(leaf), rtol=1e-5, err_msg=name)
    cosine = flat(source) @ flat(control) / np.linalg.norm(flat(source)) / np.linalg.norm(flat(control))
    assert abs(cosine) < 5 / np.sqrt(np.count_nonzero(flat(source)))
    other = made(tiny, "control:[restricted:[gaussian:2]:*mlp*]:1")
    assert not np.allclose(flat(other), flat(control))
    low_rank = made(tiny, "control:[low-rank:2:0]")
    for name, leaf in low_rank.items():
        if leaf.ndim == 2 and leaf.any():
            assert np.linalg.matrix_rank(leaf, tol=1e-4 * np.linalg.norm(leaf)) == 2, name


def test_special_directions_have_controls_beside_them() -> None:
    special = parse_direction("sum:[random:0][random:1]")
    sets = with_controls([[parse_direction("random:7")], [special]])
    assert [[str(recipe) for recipe in item] for item in sets] == [
        ["random:7"],
        ["sum:[random:0][random:1]"],
        ["control:[sum:[random:0][random:1]]"],
    ]
    assert with_controls(sets) == sets, "a chosen control is the only one"
    pair = with_controls([[special, special]])[1]
    assert [str(recipe) for recipe in pair] == [f"control:[{special}]", f"control:[{special}]:1"]
    assert len(choose_grid([special], None, 2, None)[0]) == 2
    assert len(choose_grid([special], None, 2, None, control=False)[0]) == 1


@pytest.mark.parametrize(
    ("names", "equal_norm", "unit"),
    [
        (["random:0"], False, None),
        (["to:model"], False, None),
        (["filter:0", "random:0"], False, "tensors"),
        (["gaussian:0"], False, "raw"),
        (["gaussian:0", "random:0"], False, "own"),
        (["gaussian:0", "random:0"], True, "weights"),
        (["control:[weight-norm:[gaussian:0]]", "random:0"], False, "weights"),
        (["tensor-norm:[gaussian:0]", "filter:0"], False, "tensors"),
    ],
)
def test_an_axis_says_its_unit(names: list[str], equal_norm: bool, unit: str | None) -> None:
    sets = choose_directions(1, names=names, equal_norm=equal_norm)
    (axis,) = choose_axes(sets, 2, None)
    assert axis.unit == unit
    assert axis.described().get("unit") == unit
    assert js.Axis.read(axis.described()) == axis


def test_a_direction_that_is_slow_to_make_is_made_once(tiny: js.Model, tmp_path: Any) -> None:
    js.save_direction(js.random_direction(tiny, 3), tmp_path / "d.safetensors", tiny)
    name = f"file:{tmp_path / 'd.safetensors'}"
    (first,), (second,), (drawn,) = prepare(
        [[parse_direction(name)], [parse_direction(f"control:[{name}]:2")], [parse_direction("gaussian:4")]], tiny
    )
    assert str(second.recipe) == f"control:[{name}]:2"
    assert second.ids == (f"control:{first.ids[0]}:2",)
    assert drawn.ids == ("gaussian:4",)
    assert second.recipe.of is first.recipe  # type: ignore[union-attr]


names = st.recursive(
    st.sampled_from(["random:0", "gaussian:1", "file:a[0].safetensors", "to:org/model@main"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"sum:{''.join(f'[{part}]' for part in parts)}"),
        st.tuples(inner, inner).map(lambda pair: f"orthogonal:[{pair[0]}][{pair[1]}]"),
        inner.map(lambda part: f"restricted:[{part}]:*mlp*,layers=0-1"),
        inner.map(lambda part: f"control:[{part}]:3"),
        inner.map(lambda part: f"weight-norm:[{part}]"),
    ),
    max_leaves=4,
)


@given(name=names)
def test_a_composed_recipe_has_the_name_that_it_was_made_from(name: str) -> None:
    assert str(parse_direction(name)) == name


@given(text=st.text("[]:ab"))
def test_any_text_is_parts_and_an_option_or_a_user_error(text: str) -> None:
    try:
        parts, option = split_parts(text)
    except js.UserError:
        return
    rebuilt = "".join(f"[{part}]" for part in parts)
    assert text in (rebuilt, f"{rebuilt}:{option}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sum:[random:0]", "has 1 directions in square brackets: write sum:"),
        ("sum:[random:0][random:1]:x", "has no option: write sum:.*and not 'x' after it"),
        ("orthogonal:[random:0", "A square bracket is not closed"),
        ("orthogonal:[random:0][random:1]x", "Cannot read 'x': write each direction as"),
        ("orthogonal:[random:0][nothing]", "Unknown direction 'nothing'"),
        ("orthogonal", "has 0 directions in square brackets"),
        ("projected:[principal:a,b][random:0]", "makes 2 directions"),
        ("restricted:[random:0]", "The direction 'restricted' needs an option"),
        ("control:[random:0]:x", "The seed of the direction 'control' is a number, not 'x'"),
        ("gausian:0", r"Unknown direction 'gausian:0' \(did you mean gaussian:SEED\?\)"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        parse_direction(name)


def test_what_cannot_be_scaled_or_projected_is_a_user_error(tiny: js.Model) -> None:
    zero = "restricted:[random:0]:*norm*"
    with pytest.raises(js.UserError, match="has the norm 0, so it cannot be scaled"):
        made(tiny, f"weight-norm:[{zero}]")
    with pytest.raises(js.UserError, match="is zero everywhere"):
        made(tiny, f"orthogonal:[random:0][{zero}]")


@pytest.mark.parametrize(
    ("name", "radius"),
    [
        ("random:0", 0.5),
        ("principal:a,b", 1.25),
        ("refusal", 1.0),
        ("gradient", 0.001),
        ("control:[gradient]", 0.001),
        ("worst-case:0.0002:4", 0.001),
        ("weight-norm:[gradient]", 0.001),
        ("weight-norm:[refusal]", 0.5),
        ("restricted:[refusal]:*mlp*", 1.0),
    ],
)
def test_a_kind_has_a_radius_of_its_own(name: str, radius: float) -> None:
    recipe = parse_direction(name)
    axes = choose_axes([(recipe,)], 2, None)
    assert {axis.values for axis in axes} == {(-radius, 0.0, radius)}
    assert choose_axes([(recipe,)], 2, 0.1)[0].values == (-0.1, 0.0, 0.1)


def test_kinds_with_other_radii_need_one_that_is_given() -> None:
    sets = [(parse_direction("random:0"),), (parse_direction("gradient"),)]
    with pytest.raises(js.UserError, match="give --radius"):
        choose_axes(sets, 2, None)
    assert choose_axes(sets, 2, 0.01)[0].unit == "weights"
    pair = choose_axes([(parse_direction("random:0"), parse_direction("gradient"))], 2, None)
    assert [axis.values[-1] for axis in pair] == [0.5, 0.001]
