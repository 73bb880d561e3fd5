"""What the engine does on a GPU, tried on a CPU: fused projections and the emulated attention kernel."""

from typing import Any

import jax
import numpy as np
import pytest
from helpers import PROMPTS, spelled, torch_tokens

import jaxscape as js
from jaxscape.engine import platforms
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.engine import Engine
from jaxscape.engine.planner import Hardware, make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.models import decode_attention
from jaxscape.models.checkpoint import named_leaves
from jaxscape.models.fusion import fuse, fused_config, is_part
from jaxscape.models.model import Model
from jaxscape.runtime.hardware import Roofline
from jaxscape.runtime.sharding import MeshShape

LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "gemma2": LOCAL | {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    "olmo2": {"num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 4, "pad_token_id": 0},
}
POINTS = {0: [()], 1: [(0.0,), (0.1,), (-0.1,)], 2: [(0.1, 0.0), (0.1, 0.1)]}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU gets a GPU's choices."""
    monkeypatch.setitem(platforms.PLATFORMS, "cpu", platforms.PLATFORMS["gpu"])
    monkeypatch.setattr(decode_attention, "matches_reference", lambda *_: True)


def answers(model: Model, ndim: int, form: Any = "auto", storage: Any = "exact") -> tuple[bool, list[list[str]]]:
    """Whether the plan fuses projections, and the answers at the points along `ndim` directions."""
    rows = tokenize(model, PROMPTS, "default", 12)
    points = POINTS[ndim]
    workload = Workload(rows, Sampling(12), len(points), len(points), ndim, num_random=ndim)
    plan = make_plan(model, workload, js.EngineOptions(form=form, direction_storage=storage))
    directions = js.make_directions(list(range(ndim)), model, storage)
    completed = Engine(model, workload, plan).complete(directions, points)
    return plan.is_fused, [[completion.text for completion in point] for point in completed]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_transformers(family: str, make_model: Any, as_on_a_gpu: None) -> None:
    directory, torch_model = make_model(family, **FAMILIES[family])
    model = spelled(js.load_model(directory, "float32"))
    is_fused, [texts] = answers(model, 0)
    assert is_fused == (family != "phi3"), "its checkpoints are fused already"
    assert [list(map(int, text.split())) for text in texts] == torch_tokens(torch_model, model, PROMPTS, new=12)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("ndim", "form", "storage", "fuses"),
    [
        (1, "materialised", "exact", True),
        (1, "materialised", "seed", True),
        (1, "factorised", "exact", True),
        (1, "factorised", "int8", False),  # the scales of a direction's tensors differ
        (2, "factorised", "exact", True),
    ],
)
def test_the_texts_at_points_are_those_of_a_cpu(
    ndim: int, form: str, storage: str, fuses: bool, tiny: js.Model, request: pytest.FixtureRequest
) -> None:
    model = spelled(tiny)
    was_fused, expected = answers(model, ndim, form, storage)
    assert not was_fused
    request.getfixturevalue("as_on_a_gpu")
    assert answers(model, ndim, form, storage) == (fuses, expected)


def test_weights_in_host_memory_and_split_weights_are_not_fused(tiny_dir: Any, as_on_a_gpu: None) -> None:
    on_host = js.load_model(tiny_dir, "float32", on_host=True)
    assert not answers(on_host, 1)[0]
    split = js.load_model(tiny_dir, "float32", mesh_shape=MeshShape(1, 2))
    assert not answers(split, 1, "materialised")[0]


def test_a_fused_model_has_the_same_logits(make_model: Any) -> None:
    directory, _ = make_model("qwen2")  # with biases
    model = js.load_model(directory, "float32")
    params = fuse(model.params)
    names = {name.split(".")[-2] for name in named_leaves(params)}
    assert {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"} <= names
    assert not any(map(is_part, named_leaves(params)))
    assert named_leaves(params)["model.norm.weight"] is named_leaves(model.params)["model.norm.weight"]
    fused = Model(**{**vars(model), "config": fused_config(model.config), "params": params})
    tokens = np.arange(3, 40)[None]
    np.testing.assert_allclose(fused(tokens), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
def test_a_fused_copy_counts_as_memory_and_is_not_made_where_there_is_no_room(
    tiny: js.Model, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(tokenize(tiny, PROMPTS, "default", 12), Sampling(12), 3, 3, 1)

    def plan(free: int | None, form: Any) -> Any:
        options = js.EngineOptions(form=form, slots=4)
        return make_plan(tiny, workload, options, Hardware(Roofline(1e12, 1e11), free, is_host=False))

    size = {name: leaf.nbytes for name, leaf in named_leaves(tiny.params).items()}
    parts = sum(nbytes for name, nbytes in size.items() if is_part(name))
    fused = plan(None, "factorised")
    # A factorised point multiplies with the weights and the direction; those of the model stay as they are.
    least = (fused.memory_bytes - sum(size.values())) / 0.9
    unfused = plan(int(least) - 1, "factorised")
    assert fused.is_fused
    assert not unfused.is_fused
    assert fused.memory_bytes - unfused.memory_bytes == 2 * parts
    materialised = plan(None, "materialised")
    monkeypatch.setitem(platforms.PLATFORMS, "cpu", platforms.PLATFORMS["tpu"])
    plain = plan(None, "materialised")
    assert (materialised.is_fused, plain.is_fused) == (True, False)
    assert materialised.memory_bytes == plain.memory_bytes, "a point's weights are formed fused"


def test_there_are_choices_for_every_platform_that_jax_may_name() -> None:
    assert {"cpu", "gpu", "tpu"} <= platforms.PLATFORMS.keys()
    assert jax.devices()[0].platform in platforms.PLATFORMS


@pytest.mark.parametrize("storage", ["seed", "bfloat16", "int8"])
def test_a_direction_that_is_stored_in_fewer_bits_can_be_fused(storage: Any, tiny: js.Model, as_on_a_gpu: None) -> None:
    """A direction may be given in another storage than the one that the plan was made for."""
    rows = tokenize(tiny, PROMPTS, "default", 12)
    (direction,) = js.make_directions([0], tiny, storage)
    texts = []
    for form in ("materialised", "factorised"):
        workload = Workload(rows, Sampling(12), len(POINTS[1]), len(POINTS[1]), 1)
        plan = make_plan(tiny, workload, js.EngineOptions(form=form))  # type: ignore[arg-type]
        assert plan.is_fused
        completed = Engine(tiny, workload, plan).complete([direction], POINTS[1])
        texts.append([[completion.text for completion in point] for point in completed])
    assert texts[0] == texts[1]
