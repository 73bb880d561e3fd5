"""How a scan is planned: the form, the slots and the storage that the machine's speed and memory allow."""

from typing import Any

import jax
import numpy as np
import pytest

import jaxscape as js
from jaxscape.engine import planner, platforms
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Hardware, Plan, Planner, make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.models.checkpoint import named_leaves, tree_of
from jaxscape.models.config import LayerKind, ModelConfig
from jaxscape.models.decoder import parameter_shapes
from jaxscape.models.shape import model_shape
from jaxscape.runtime.hardware import Roofline

NEW = 12


def planned(model: js.Model, prompts: int, line: int, ndim: int = 1, **options: Any) -> Plan:
    rows = tokenize(model, [f"Say {i}" for i in range(prompts)], "default", NEW)
    return make_plan(
        model, Workload(rows, Sampling(NEW), line**ndim, line, ndim, num_random=ndim), EngineOptions(**options)
    )


def at_speed(monkeypatch: pytest.MonkeyPatch, flops: float, bandwidth: float, free: int | None = None) -> None:
    monkeypatch.setattr(planner, "roofline", lambda dtype, keep: Roofline(flops, bandwidth))
    monkeypatch.setattr(planner, "free_memory", lambda: free)


@pytest.mark.cpu
def test_the_plan_follows_the_roofline(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    at_speed(monkeypatch, flops=4e11, bandwidth=2e10)  # a CPU: a balance of some 20 rows a weight
    assert planned(tiny, prompts=80, line=21).form == "materialised"
    few = planned(tiny, prompts=4, line=21)
    assert (few.form, few.layout.batch) == ("factorised", 84)
    assert planned(tiny, prompts=1, line=1).form == "materialised"
    assert planned(tiny, prompts=80, line=21, slots=20).layout.rows_per_point == 20
    assert planned(tiny, prompts=80, line=21, form="factorised").form == "factorised"
    sizes = {prompts: planned(tiny, prompts, line=21, form="materialised").layout for prompts in (80, 40, 16, 1)}
    smaller = {layout.batch: layout.compact_slots for layout in sizes.values()}
    assert smaller == {80: (60, 40, 20), 40: (30, 20, 10), 16: (4,), 1: ()}
    at_speed(monkeypatch, flops=8e14, bandwidth=3e12)  # an accelerator: some hundred rows
    assert planned(tiny, prompts=20, line=21, ndim=2).form == "factorised"
    assert planned(tiny, prompts=80, line=21, chunk=3).chunk == 3


def test_an_accelerators_batch_shrinks_once(tiny: js.Model) -> None:
    hardware = Hardware(Roofline(8e14, 3e12), None, is_host=False)
    workload = Workload(tokenize(tiny, ["Say it"] * 80, "default", NEW), Sampling(NEW), 21, 21, 1, num_random=1)
    plans = Planner(tiny, workload, EngineOptions(form="materialised", slots=80), hardware).all_plans()
    assert {plan.layout.compact_slots for plan in plans} == {(24,)}, "whole tiles of 8 rows"


@pytest.mark.cpu
def test_the_plan_keeps_within_the_memory(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.params))
    seen = []
    for free in (10**9, 10**7, 3 * 10**6, 10**6, 4 * 10**5):
        at_speed(monkeypatch, 4e11, 2e10, free)
        plan = planned(tiny, prompts=64, line=5, form="materialised")
        assert plan.memory_bytes - weights <= 0.9 * free
        seen.append((plan.layout.batch, plan.storage))
    assert seen[0] == (64, "exact")
    assert seen[-1][0] < 8
    assert planned(tiny, prompts=64, line=5, form="materialised", slots=2).layout.batch == 2
    with pytest.raises(js.UserError, match="with 64 slots\\) takes"):  # what was asked for is not changed
        planned(tiny, prompts=64, line=5, form="materialised", slots=64)
    at_speed(monkeypatch, 4e11, 2e10, 10**4)
    with pytest.raises(
        js.UserError, match=r"memory does not hold this scan: .* GB on each device. Choose a --dtype of 16 bits"
    ):
        planned(tiny, prompts=64, line=5)


@pytest.mark.cpu
def test_a_cpu_stores_no_direction_where_points_take_long(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    at_speed(monkeypatch, flops=4e11, bandwidth=2e10)
    assert planned(tiny, prompts=40, line=21).storage == "exact", "a point takes little longer than drawing"
    monkeypatch.setitem(globals(), "NEW", 64)
    plan, stored = planned(tiny, 40, 21), planned(tiny, 40, 21, direction_storage="exact")
    assert (plan.form, plan.layout, plan.storage) == ("materialised", stored.layout, "seed")
    sizes = [leaf.size for leaf in jax.tree.leaves(tiny.params)]
    assert stored.memory_bytes - plan.memory_bytes == 4 * (sum(sizes) - max(sizes))
    assert planned(tiny, prompts=40, line=3, ndim=2, form="materialised").storage == "exact", "not the same bits"


@pytest.mark.cpu
def test_an_accelerator_stores_directions_that_fit(tiny: js.Model) -> None:
    rows = [[1, 2, 3, index] for index in range(40)]
    workload = Workload(rows, Sampling(64), 21, 21, 1, num_random=1)
    card = Hardware(Roofline(4e11, 2e10), None, is_host=False)
    assert make_plan(tiny, workload, EngineOptions(form="materialised"), card).storage == "exact"


def test_seven_billion_parameters_in_16_bits_fit_a_card_of_24_gb(
    tiny: js.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama-2-7B's shapes, with weights that take no memory: streamed, along directions that are not stored."""
    config = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, (LayerKind(None),))
    shapes = named_leaves(parameter_shapes(config))
    params = tree_of({name: np.broadcast_to(np.zeros(1, "bfloat16"), leaf.shape) for name, leaf in shapes.items()})
    model = js.Model(**{**vars(tiny), "config": config, "params": params})
    weights = sum(leaf.size * 2 for leaf in shapes.values())
    at_speed(monkeypatch, flops=7e13, bandwidth=9e11, free=24 * 10**9)
    plan = planned(model, prompts=80, line=21)
    assert (plan.form, plan.storage) == ("streamed", "seed")
    assert weights < plan.memory_bytes <= 0.9 * 24e9 < 2 * weights
    assert plan.layout.batch >= 8


def test_directions_that_are_stored_take_memory(tiny: js.Model) -> None:
    """Each in float32, in the plan of either form; where weights are streamed, those in host memory stay there."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(tiny.params))
    card = Hardware(Roofline(8e14, 3e12), None, is_host=False)

    def needed(form: str, **kinds: int) -> int:
        workload = Workload([[1, 2, 3]], Sampling(NEW), 5, 5, 1, **kinds)
        return make_plan(tiny, workload, EngineOptions(form=form, slots=4), card).memory_bytes

    for form in ("materialised", "factorised"):
        nothing = needed(form)
        assert needed(form, num_waiting=1) == needed(form, num_made=1) == nothing + 4 * numbers
        assert needed(form, num_random=1, num_waiting=1, num_made=1) == nothing + 4 * numbers, "a set has one of them"
    assert needed("streamed", num_waiting=1) == needed("streamed")
    assert needed("streamed", num_made=1) == needed("streamed") + 4 * numbers


def test_listed_points_along_one_direction_share_a_batch(tiny: js.Model) -> None:
    card, options = Hardware(Roofline(8e14, 3e12), None, is_host=False), EngineOptions(form="factorised")
    listed, line = (Workload([[1, 2, 3]] * 4, Sampling(NEW), 40, n, 1, num_random=1) for n in (1, 40))
    assert make_plan(tiny, listed, options, card) == make_plan(tiny, line, options, card)


@pytest.mark.parametrize("name", ["form", "direction_storage"])
def test_unknown_names_are_user_errors(name: str) -> None:
    options = EngineOptions()
    object.__setattr__(options, name, "round")  # as without type checks it may be
    with pytest.raises(js.UserError, match=f"Unknown {name} 'round': choose auto, "):
        options.check()


@pytest.mark.cpu
def test_the_plan_says_what_and_why(tiny: js.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    at_speed(monkeypatch, 4e11, 2e10)
    assert "factorised: 21 points at a time, 4 slots each; 0.0" in str(planned(tiny, prompts=4, line=21))
    line = str(planned(tiny, prompts=4, line=21, form="materialised", direction_storage="int8"))
    assert "materialised: 4 slots, directions in int8; 0.0" in line
    assert "a step reads weights for" in line


# Seconds of scans on an H100 along one direction, 32 new tokens, a quarter of the layers of Llama-3-8B in bfloat16: for
# each number of points and prompts, those of the materialised and of the factorised form (docs/measurements.md).
ON_AN_H100 = {
    (1, 4): (0.068, 0.154),
    (1, 40): (0.078, 0.181),
    (1, 80): (0.095, 0.208),
    (4, 4): (0.271, 0.175),
    (4, 40): (0.312, 0.274),
    (4, 80): (0.369, 0.442),
    (21, 4): (1.447, 0.241),
    (21, 40): (1.674, 1.044),
    (21, 80): (1.958, 2.184),
}


@pytest.mark.parametrize(("points", "prompts"), ON_AN_H100)
def test_estimates_are_near_what_an_h100_takes(points: int, prompts: int, tiny: js.Model) -> None:
    config = ModelConfig(128256, 4096, 14336, 8, 32, 8, 128, 8192, 1e-5, (LayerKind(None),))
    large = model_shape(config, tiny.mesh, "bfloat16")
    texts = [[*range(44), *range(100 * i, 100 * i + 39)] for i in range(1, prompts + 1)]  # 44 tokens are shared
    workload = Workload(texts, Sampling(32), points, points, 1, num_random=1)
    hardware = Hardware(platforms.PLATFORMS["gpu"].reached(Roofline(8.0e14, 1.98e12)), None, is_host=False)
    seconds = {}
    for form, measured in zip(("materialised", "factorised"), ON_AN_H100[points, prompts], strict=True):
        options = EngineOptions(form=form)  # type: ignore[arg-type]
        plan = make_plan(large, workload, options, hardware)
        seconds[form] = measured
        assert Planner(large, workload, options, hardware).seconds(plan) == pytest.approx(measured, rel=0.25)
    chosen = make_plan(large, workload, EngineOptions(), hardware).form
    assert seconds[chosen] <= 1.12 * min(seconds.values())
