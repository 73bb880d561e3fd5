"""Which directions and axes the options of a scan describe."""

from typing import Any

import pytest

import jaxscape as js
from jaxscape.landscapes.choice import choose_axes, choose_directions


@pytest.mark.parametrize(
    ("ndim", "options", "expected"),
    [
        (1, {}, [["random:0"]]),
        (1, {"seed": 5, "num_directions": 3}, [["random:5"], ["random:6"], ["random:7"]]),
        (2, {"num_directions": 2}, [["random:0", "random:1"], ["random:2", "random:3"]]),
        (1, {"files": ["a", "b"]}, [["file:a"], ["file:b"]]),
        (2, {"files": ["a", "b"]}, [["file:a", "file:b"]]),
        (1, {"names": ["random:4", "file:a"]}, [["random:4"], ["file:a"]]),
        (2, {"names": ["to:m", "random:4"]}, [["to:m", "random:4"]]),
        (2, {"names": ["principal:r,s", "random:1", "random:2"]}, [["principal:r,s"], ["random:1", "random:2"]]),
        (1, {"interpolate_to": ["m"]}, [["to:m"]]),
        (2, {"interpolate_to": ["m"], "seed": 2, "num_directions": 2}, [["to:m", "random:2"], ["to:m", "random:3"]]),
        (2, {"interpolate_to": ["m", "n"]}, [["to:m", "to:n"]]),
        (2, {"trajectories": ["r", "s"]}, [["principal:r,s"]]),
        (2, {"trajectories": ["r"], "interpolate_to": ["m", "n"]}, [["to:m", "to:n"]]),
    ],
)
def test_directions(ndim: int, options: dict[str, Any], expected: list[list[str]]) -> None:
    assert [[str(recipe) for recipe in item] for item in choose_directions(ndim, **options)] == expected


@pytest.mark.parametrize(
    ("ndim", "options", "message"),
    [
        (1, {"num_directions": 0}, "--num-directions must be at least 1, not 0"),
        (1, {"names": ["random:0"], "files": ["a"]}, "only one of --direction and --directions"),
        (1, {"files": ["a"], "num_directions": 2}, "either --directions or --num-directions"),
        (1, {"files": ["a"], "interpolate_to": ["m"]}, "only one of --directions and --interpolate-to"),
        (2, {"files": ["a", "b", "c"]}, "Each 2D landscape takes 2 directions, but 3 were given"),
        (2, {"names": ["random:0", "principal:r"]}, "principal:r fills 2 axes"),
        (1, {"names": ["principal:r"]}, "principal:r fills 2 axes"),
        (1, {"names": ["randm:0"]}, "Unknown direction 'randm:0'"),
        (1, {"interpolate_to": ["m", "n"]}, "at most 1 models with --ndim 1, but 2 were given"),
        (2, {"interpolate_to": ["m", "n"], "num_directions": 2}, "this interpolation has none"),
        (1, {"trajectories": ["r"]}, "--trajectory is drawn on one plane"),
        (2, {"trajectories": ["r"], "num_directions": 2}, "--trajectory is drawn on one plane"),
    ],
)
def test_contradictions(ndim: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        choose_directions(ndim, **options)


def test_axes_follow_the_directions() -> None:
    (line,) = choose_directions(1)
    (alpha,) = choose_axes(line, 2, None)
    assert (alpha.name, alpha.values) == ("alpha", (-0.5, 0.0, 0.5))
    (mixed,) = choose_directions(2, names=["random:0", "to:m"])
    alpha, end = choose_axes(mixed, 2, 1.0, extra_steps=1)
    assert (alpha.name, alpha.values) == ("alpha", (-1.0, 0.0, 1.0))
    assert (end.name, end.values) == ("interpolation", (-0.5, 0.0, 0.5, 1.0, 1.5))
    (plane,) = choose_directions(2, trajectories=["r"])
    first, second = choose_axes(plane, 2, None)
    assert (first.name, second.name, first.values[-1]) == ("alpha", "beta", 1.25)
    assert choose_axes(plane, 2, 2.0)[0].values[-1] == 2.0
    with pytest.raises(js.UserError, match="--extra-steps continue an interpolation"):
        choose_axes(line, 2, None, extra_steps=1)
