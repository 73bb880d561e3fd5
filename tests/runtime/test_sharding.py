"""Meshes of eight forced CPU devices against one device."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MakeModel, assert_same_tree, spelled
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxscape as js
import jaxscape.engine.engine as engine
from jaxscape.directions.sums import order_free_sum
from jaxscape.engine.batching import Workload, tokenize
from jaxscape.engine.decode import compact, decode_chunk, insert
from jaxscape.engine.planner import make_plan
from jaxscape.engine.sampling import Sampling
from jaxscape.forecast.hlo import program_traffic
from jaxscape.models import model as models
from jaxscape.models.cache import GPU_ORDER, TPU_ORDER, CacheOrder
from jaxscape.models.checkpoint import fingerprint, named_leaves
from jaxscape.runtime.sharding import MeshShape, default_mesh_shape, make_mesh, parse_mesh_shape, partition

MESHES = [MeshShape(1, 1), MeshShape(8, 1), MeshShape(4, 2), MeshShape(2, 4), MeshShape(1, 8)]
PROMPTS = js.load_prompts("harmful", 9)
NEW = 8


def whole(tree: Any) -> Any:
    def numbers(x: jax.Array) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return jax.tree.map(numbers, tree)


@pytest.fixture(scope="module")
def square(make_model: MakeModel) -> Path:
    """A model whose matrices have few shapes, for each of which programs are compiled."""
    return make_model(intermediate_size=32, num_key_value_heads=4, num_hidden_layers=1)[0]


@pytest.mark.parametrize("storage", ["exact", "int8", "seed"])
def test_a_pair_of_directions_is_the_same_to_the_bit_on_a_mesh(square: Path, storage: str) -> None:
    one, many = (js.load_model(square, "float32", split=each) for each in (MeshShape(), MeshShape(2, 4)))
    assert fingerprint(many.params) == fingerprint(one.params)
    first, there = (js.random_direction(model, 0, storage=storage) for model in (one, many))
    assert_same_tree(whole(jax.tree.leaves(first)), whole(jax.tree.leaves(there)))
    second, there = (
        js.random_direction(model, 1, orthogonal_to=direction, storage=storage)
        for model, direction in ((one, first), (many, there))
    )
    assert_same_tree(whole(jax.tree.leaves(second)), whole(jax.tree.leaves(there)))


@pytest.fixture(scope="module")
def scans() -> dict[Any, list[str]]:
    return {}


@pytest.mark.parametrize("form", ["materialised", "factorised"])
@pytest.mark.parametrize("split", MESHES, ids=str)
def test_a_scan_gives_the_same_on_every_mesh(
    tiny_dir: Path, scans: dict[Any, Any], split: MeshShape, form: Any, tmp_path: Path
) -> None:
    """Every text, and so every ASR; with refilled slots and programs that are compiled once."""
    model = spelled(js.load_model(tiny_dir, "float32", mesh_shape=split))
    options = js.EngineOptions(form=form, slots=8, full_text=True)
    before = [program._cache_size() for program in (insert, decode_chunk, compact)]  # type: ignore[attr-defined]
    land = js.scan(
        model,
        [0],
        prompts=PROMPTS,
        steps=2,
        max_new_tokens=NEW,
        options=options,
        out=tmp_path,
        progress=False,
        shares=False,
    )
    after = [program._cache_size() for program in (insert, decode_chunk, compact)]  # type: ignore[attr-defined]
    assert after[0] - before[0] <= 1  # one to insert
    assert after[1] - before[1] <= 2  # two to decode: all slots, and few
    texts = [json.loads(line)["generation"] for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(set(texts)) > 10
    found = (texts, land.asr.tolist())
    assert scans.setdefault(form, found) == found


@pytest.mark.parametrize("form", ["materialised", "factorised"])
def test_rows_are_inserted_and_moved_where_they_are(tiny_dir: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one, two, four and eight devices along `points` the same texts, which end at different lengths; and programs
    that send no keys and values, although rows are refilled and the last ones move to fewer."""
    found, sent = [], dict[tuple[str, int], float]()
    for devices in (1, 2, 4, 8):
        model = spelled(js.load_model(tiny_dir, "float32", mesh_shape=MeshShape(devices, 1)))
        model = js.Model(**{**vars(model), "eos_token_ids": (2, 14, 77)})
        for name, program in {"insert": insert, "compact": compact}.items():

            def traced(*arguments: Any, key: Any = (name, devices), program: Any = program, **static: Any) -> Any:
                if key not in sent:
                    text = program.lower(*arguments, **static).compile().as_text()
                    sent[key] = program_traffic(text).sent_bytes
                return program(*arguments, **static)

            monkeypatch.setattr(engine, name, traced)
        points = [(c,) for c in np.linspace(-0.4, 0.4, 12)]
        workload = Workload(tokenize(model, PROMPTS, "default", 24), Sampling(24), 12, 12, 1)
        # So few rows that they are refilled on any number of devices.
        options = js.EngineOptions(form=form, slots=8 if form == "materialised" else 64)
        answers = engine.Engine(model, workload, make_plan(model, workload, options))
        completions = list(answers.complete([js.random_direction(model, 0)], points))
        found.append([[completion.text for completion in point] for point in completions])
    assert len({len(text.split()) for point in found[0] for text in point}) > 5
    assert all(texts == found[0] for texts in found)
    assert {name for name, devices in sent if devices > 1} == {"insert", "compact"}
    assert max(sent.values()) < 10, "at most a flag"


def test_odd_sizes_are_copied_where_they_do_not_divide(make_model: MakeModel) -> None:
    """Fewer key-value heads than the model axis, query heads that it does not divide, an uneven vocabulary."""
    directory, _ = make_model(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, vocab_size=301, intermediate_size=40
    )
    one, many = (js.load_model(directory, "float32", mesh_shape=split) for split in (MeshShape(), MeshShape(2, 4)))
    tokens = np.arange(24).reshape(4, 6)
    np.testing.assert_allclose(one(tokens), many(tokens), rtol=1e-4, atol=1e-4)
    leaves = named_leaves(many.params)
    embedding = leaves["model.embed_tokens.weight"]
    assert embedding.sharding.shard_shape(embedding.shape) == (301, 6)  # its features are split instead
    keys = leaves["model.layers.0.self_attn.k_proj.weight"]
    assert keys.sharding.shard_shape(keys.shape) == (4, 24)  # one head each, on two devices
    assert js.generate(one, PROMPTS[:3], max_new_tokens=6) == js.generate(many, PROMPTS[:3], max_new_tokens=6)


@pytest.mark.parametrize(
    ("order", "form"), [(GPU_ORDER, "materialised"), (TPU_ORDER, "factorised")], ids=["gpu", "tpu"]
)
def test_the_orders_of_accelerators_generate_the_same(
    tiny: js.Model, order: CacheOrder, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spelled(tiny)
    options = js.EngineOptions(form=form, slots=8, full_text=True)

    def texts(out: Path) -> str:
        js.scan(
            model,
            [0],
            prompts=PROMPTS,
            steps=2,
            max_new_tokens=NEW,
            options=options,
            out=out,
            progress=False,
            shares=False,
        )
        return (out / "generations.jsonl").read_text()

    plain = texts(tmp_path / "plain")
    make = engine.static_arguments
    monkeypatch.setattr(engine, "static_arguments", lambda *given: replace(make(*given), order=order))
    assert texts(tmp_path / "other") == plain


@settings(max_examples=20)
@given(
    shape=st.sampled_from([(8,), (64,), (16, 24), (8, 3000)]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e12]),
    seed=st.integers(0, 1000),
)
def test_a_sum_does_not_depend_on_how_it_is_split(shape: tuple[int, ...], scale: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
    mesh = make_mesh(MeshShape(8, 1), 1)
    total = jax.jit(order_free_sum)
    sums = [
        total(jax.device_put(x, NamedSharding(mesh, spec)))
        for spec in (PartitionSpec(), PartitionSpec("points"), *[PartitionSpec(None, "points")] * (len(shape) > 1))
    ]
    assert len({float(each) for each in sums}) == 1
    error = abs(float(sums[0]) - x.astype(np.float64).sum())
    # Below 2⁻¹⁰⁰ nothing is scaled further up, and half of the last of those bits may be lost of each number.
    lost = max(2.0**-24 * float(np.abs(x).max()), 2.0**-125) * x.size
    assert error <= 1e-6 * np.abs(x.astype(np.float64)).sum() + lost


def test_a_sum_of_what_is_not_finite_is_not_finite() -> None:
    assert not np.isfinite(order_free_sum(jnp.array([1.0, jnp.inf])))
    assert np.isnan(order_free_sum(jnp.array([1.0, jnp.nan])))
    assert order_free_sum(jnp.zeros(4)) == 0


def test_the_mesh_follows_the_size_of_the_model() -> None:
    gigabyte = 10**9
    assert default_mesh_shape(gigabyte, 16 * gigabyte, 8) == MeshShape(8, 1)
    assert default_mesh_shape(14 * gigabyte, 16 * gigabyte, 8) == MeshShape(2, 4)
    assert default_mesh_shape(140 * gigabyte, 16 * gigabyte, 8) == MeshShape(1, 8)
    assert default_mesh_shape(140 * gigabyte, None, 8) == MeshShape(8, 1)
    assert default_mesh_shape(14 * gigabyte, 16 * gigabyte, 3) == MeshShape(3, 1)  # hardly a shape is divided by three
    assert default_mesh_shape(14 * gigabyte, 16 * gigabyte, 12) == MeshShape(3, 4)


def test_key_value_heads_fewer_than_the_model_axis_are_copied() -> None:
    mesh = make_mesh(MeshShape(1, 8), 2)
    assert dict(mesh.shape) == {"points": 1, "kv": 2, "q": 4}
    assert partition(mesh, ("kv_heads", None), (8, 16)) == PartitionSpec("kv")
    assert partition(mesh, ("heads", None), (32, 16)) == PartitionSpec(("kv", "q"))
    assert partition(mesh, ("rows", "kv_heads", None, None), (4, 2, 8, 8)) == PartitionSpec(None, "kv")


@pytest.mark.parametrize("text", ["", "points", "points=0", "points=2,points=2", "rows=2", "points=2;model=4"])
def test_a_mesh_that_is_none_is_a_sentence(text: str) -> None:
    with pytest.raises(js.UserError, match=re.escape(f"Cannot parse --mesh {text!r}: write points=N,model=M")):
        parse_mesh_shape(text)
    assert parse_mesh_shape("model=4, points=2") == MeshShape(2, 4)


def test_a_mesh_needs_its_devices(tiny_dir: Path) -> None:
    with pytest.raises(js.UserError, match="mesh points=3,model=3 does not fit 8 devices"):
        js.load_model(tiny_dir, mesh_shape=MeshShape(3, 3))


def test_a_device_reads_its_own_part(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No single read takes more than an eighth of a tensor that is sharded over eight devices."""
    read = []

    def watched(name: str, index: Any, original: Any) -> np.ndarray:
        values = original(name, index)
        read.append((name, values.size))
        return values

    make = models.huggingface.open_directory

    def opened(path: Path) -> Any:
        found = make(path)
        return replace(found, read=lambda name, index: watched(name, index, found.read))

    monkeypatch.setattr(models.huggingface, "open_directory", opened)
    model = js.load_model(tiny_dir, "float32", mesh_shape=MeshShape(1, 8))
    sizes = {name: leaf.size for name, leaf in named_leaves(model.params).items()}
    parts = [size for name, size in read if name.endswith("up_proj.weight")]
    assert len(parts) == 2 * 8
    assert all(size == sizes["model.layers.0.mlp.up_proj.weight"] // 8 for size in parts)


def test_kept_weights_are_restored_onto_any_mesh(
    tiny_dir: Path, tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSCAPE_CACHE", str(tmp_path))
    first = js.load_model(tiny_dir, "float32", mesh_shape=MeshShape(2, 4), keep=True)
    monkeypatch.setattr(models, "load_params", None)  # what is kept is not read again
    for split in (MeshShape(2, 4), MeshShape(1, 8), MeshShape()):
        again = js.load_model(tiny_dir, "float32", mesh_shape=split, keep=True)
        assert fingerprint(again.params) == fingerprint(first.params) == fingerprint(tiny.params)
        assert jax.tree.map(lambda x: x.sharding, again.params) == again.shardings
    (kept,) = (tmp_path / "weights").iterdir()
    for path in kept.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(js.UserError, match=r"cached weights in .* cannot be read"):
        js.load_model(tiny_dir, "float32", keep=True)
