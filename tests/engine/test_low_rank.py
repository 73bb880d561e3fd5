"""Low-rank directions are multiplied as factors, and points of several direction sets share a batch."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MakeModel, spelled

import jaxscape as js
from jaxscape.directions.low_rank import low_rank_direction
from jaxscape.directions.point import at_point, materialise
from jaxscape.directions.stacked import rank_of, stack
from jaxscape.directions.storage import Direction, Factored, concatenated, dense, on_model_mesh
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.forms import Form
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Hardware, Plan, Planner, make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.decoder import forward
from jaxscape.models.fusion import fuse, fused_config
from jaxscape.runtime.hardware import Roofline
from jaxscape.runtime.sharding import MeshShape

NEW = 10
PROMPTS = ["Hi", "Why?", "Write a poem about geese", "Explain what a key is and how a lock works, please", "No"]
SETS, LINE = 3, ((-0.4,), (0.0,), (0.3,))
SPEED = Roofline(flops=4e11, bandwidth=2e10)


@pytest.fixture(scope="module")
def model(tiny: js.Model) -> js.Model:
    return spelled(js.Model(**{**vars(tiny), "eos_token_ids": (2, 14, 77)}))


@pytest.fixture(scope="module")
def directions(tiny: js.Model) -> list[Direction]:
    """The directions have different ranks."""
    return [low_rank_direction(tiny, rank, seed) for seed, rank in enumerate((2, 1, 2))]


def dense_tree(direction: Direction, dtype: Any = jnp.float32) -> Any:
    return tree_of({name: dense(tensor).astype(dtype) for name, tensor in named_leaves(direction).items()})


def answers(
    model: js.Model,
    sets: Sequence[Sequence[Direction]],
    points: Sequence[Sequence[float]],
    form: Form = Form.FACTORISED,
    size: int = 1,
    slots: int = 64,
) -> list[list[str]]:
    """The answers at these points along the directions of every set, set by set; `size` sets share a batch."""
    rows, ndim = tokenize(model, PROMPTS, "default", NEW), len(points[0])
    ranks = [rank_of(direction) for item in sets for direction in item]
    rank = None if None in ranks else max(rank for rank in ranks if rank is not None)
    workload = Workload(rows, Sampling(NEW), len(points), len(points), ndim, num_sets=len(sets), rank=rank)
    plans = Planner(model, workload, EngineOptions(slots=slots), Hardware(SPEED, None, is_host=True)).plans(form)
    engine, texts = Engine(model, workload, next(plan for plan in plans if plan.layout.num_sets == size)), []
    for first in range(0, len(sets), size):
        together = sets[first : first + size]
        own = [
            np.concatenate([np.multiply(point, i == k) for k in range(len(together))]).tolist()
            for i in range(len(together))
            for point in points
        ]
        flat = list(itertools.chain(*together))
        texts += [[answer.text for answer in point] for point in engine.complete(flat, own)]
    return texts


@pytest.fixture(scope="module")
def expected(model: js.Model, directions: list[Direction]) -> list[list[str]]:
    """The answers along the same directions as dense trees, one point at a time."""
    sets = [[dense_tree(direction)] for direction in directions]
    found = answers(model, sets, LINE, Form.MATERIALISED)
    assert len({text for point in found for text in point}) > len(PROMPTS)
    return found


def test_points_of_several_sets_in_one_batch(
    model: js.Model, directions: list[Direction], expected: list[list[str]]
) -> None:
    """Two sets at a time; the third one is the only one of its batch."""
    assert answers(model, [[direction] for direction in directions], LINE, size=2, slots=16) == expected


def test_points_of_one_set_share_its_factors(
    model: js.Model, directions: list[Direction], expected: list[list[str]]
) -> None:
    assert answers(model, [[directions[0]]], LINE) == expected[: len(LINE)]


def test_full_rank_directions_of_several_sets_in_one_batch(
    model: js.Model, directions: list[Direction], expected: list[list[str]]
) -> None:
    assert answers(model, [[dense_tree(direction)] for direction in directions], LINE, size=2) == expected


def test_all_points_of_low_rank_planes_in_one_batch(model: js.Model, directions: list[Direction]) -> None:
    sets, points = [directions[:2], directions[1:]], list(itertools.product((-0.2, 0.3), (0.0, 0.25)))
    dense_sets = [[dense_tree(direction) for direction in item] for item in sets]
    assert answers(model, sets, points, size=2) == answers(model, dense_sets, points, Form.MATERIALISED)


def test_the_answers_are_the_same_on_a_mesh(
    model: js.Model, tiny_dir: Path, directions: list[Direction], expected: list[list[str]]
) -> None:
    many = js.load_model(tiny_dir, "float32", mesh_shape=MeshShape(2, 4))
    many = js.Model(**{**vars(model), "params": many.params, "mesh": many.mesh})
    sets = [[on_model_mesh(direction, many)] for direction in directions]
    assert answers(many, sets, LINE, size=SETS) == expected


@pytest.mark.parametrize(
    ("dtype", "is_fused", "is_stacked"),
    [("float32", True, True), ("float32", True, False), ("bfloat16", False, True), ("bfloat16", False, False)],
)
def test_logits_are_those_of_the_dense_direction(
    make_model: MakeModel, dtype: str, is_fused: bool, is_stacked: bool
) -> None:
    """The rows are at points of their own, with tied embeddings, biases and rows of several tokens."""
    directory, _ = make_model(tie_word_embeddings=True, attention_bias=True, num_hidden_layers=1)
    model = js.load_model(directory, dtype)
    directions = [low_rank_direction(model, rank, seed) for seed, rank in enumerate((2, 3))]
    points, rows = np.array([[0.3, 0], [0, -0.2], [0, 0]], np.float32), 2
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 300, (len(points) * rows, 5)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5), tokens.shape)
    logits = jax.jit(lambda config, params: forward(config, params, tokens, positions)[0], static_argnums=0)
    trees = [dense_tree(direction) for direction in directions]
    at_points = [logits(model.config, materialise(model.params, trees, point)) for point in points]
    expected = np.concatenate([at_points[i][rows * i : rows * (i + 1)] for i in range(len(points))])
    config, params = model.config, model.params
    if is_fused:
        config, params = fused_config(config), fuse(params)
        directions = [fuse(direction, concatenated) for direction in directions]
    given = stack(directions, 1) if is_stacked else directions
    found = logits(config, jax.jit(at_point, static_argnums=3)(params, given, points, rows))
    assert np.abs(found - expected).max() < (1e-5 if dtype == "float32" else 4e-2) * np.abs(expected).max()
    np.testing.assert_array_equal(found[-rows:], logits(config, params)[-rows:])


def planned(model: js.Model, num_sets: int, rank: int | None, flops: float, prompts: int = 4) -> Plan:
    """For five points along each direction; without a rank, they are random ones of full rank."""
    rows = tokenize(model, [f"Say {i}" for i in range(prompts)], "default", NEW)
    workload = Workload(rows, Sampling(NEW), 5, 5, 1, num_random=int(rank is None), num_sets=num_sets, rank=rank)
    return make_plan(model, workload, EngineOptions(), Hardware(Roofline(flops, 1e9), None, is_host=True))


@pytest.mark.cpu
def test_the_planner_lets_sets_share_a_batch_where_that_is_faster(make_model: MakeModel) -> None:
    model = js.load_model(make_model(hidden_size=256, intermediate_size=512)[0], "float32")
    low_rank = planned(model, 4, 1, flops=1e10)
    assert (low_rank.form, low_rank.layout.num_sets, low_rank.layout.points_in_flight) == ("factorised", 4, 20)
    # Full-rank directions cost a product each: worth it only while a step mostly reads the weights.
    assert planned(model, 3, None, flops=1e13).layout.num_sets == 3
    assert planned(model, 3, None, flops=1e10, prompts=80).layout.num_sets == 1
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert low_rank.memory_bytes < 1.5 * weights + 2 * low_rank.cache_bytes, "one copy of the weights"
    assert "20 points of 4 direction sets at a time, 4 slots each" in str(low_rank)


def test_ranks(directions: list[Direction], tiny: js.Model) -> None:
    assert [rank_of(direction) for direction in directions] == [2, 1, 2]
    assert rank_of(js.random_direction(tiny, 0)) is None
    assert rank_of({"bias": Factored(jnp.ones((4, 1)), jnp.ones(1))}) is None


def test_a_resumed_scan_of_several_sets_ends_with_the_same_bytes(model: js.Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "prompts": PROMPTS[:2],
        "steps": 2,
        "max_new_tokens": 4,
        "progress": False,
        "shares": False,
        "options": EngineOptions(form="factorised", slots=8),
    }
    names = [f"low-rank:1:{seed}" for seed in range(SETS)]
    land = js.scan(model, names, out=tmp_path / "run", **options)
    lines = (tmp_path / "run" / "generations.jsonl").read_bytes()
    assert len(set(lines.splitlines())) == len(PROMPTS[:2]) * SETS * 3
    (tmp_path / "run" / "generations.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[: 2 * 4 + 1]))
    again = js.scan(model, names, out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "generations.jsonl").read_bytes() == lines
    np.testing.assert_array_equal(again.asr, land.asr)
    # Set by set, along the same directions as they are without their name.
    separate = [js.scan(model, js.make_directions([name], model), **options) for name in names]
    np.testing.assert_array_equal(land.asr, np.concatenate([one.asr for one in separate]))
