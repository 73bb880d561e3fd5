"""Forecasts with the real TPU compiler: counts of compiled programs, plans for both forms, and `jaxscape plan`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import jaxscape as js
from jaxscape.cli.main import main
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Hardware, make_plan
from jaxscape.finetuning.forecast import finetune_step
from jaxscape.forecast import hlo
from jaxscape.forecast.chips import CHIPS, Slice, open_slice, shape_on
from jaxscape.forecast.compile import compile_program, program_cost
from jaxscape.forecast.forecast import _cache_bytes, _resident_bytes, forecast, make_workload
from jaxscape.forecast.known_models import SHAPES, shape_config
from jaxscape.forecast.table import as_json, describe
from jaxscape.models.config import ModelConfig
from jaxscape.models.decoder import parameter_shapes
from jaxscape.runtime.hardware import Roofline, compiling_for_absent_devices
from jaxscape.runtime.sharding import MeshShape, make_mesh, replicated, sharding

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def eight() -> Slice:
    return open_slice("v5e:2x4")


@pytest.fixture(scope="module")
def one_layer() -> ModelConfig:
    """Llama-2-7B with one layer."""
    return replace(shape_config("llama-2-7b"), num_layers=1)


def small_config() -> ModelConfig:
    config = replace(shape_config("llama-2-7b"), vocab_size=1024, hidden_size=512, intermediate_size=1024)
    return replace(config, num_heads=4, num_kv_heads=4)


@pytest.mark.parametrize("topology", ["v6e:4x4", "v5p:4x4x4", "v5e:8x8"])
def test_meshes_of_all_shapes_fit_a_slice(topology: str) -> None:
    """A mesh axis may also be part of a physical axis of the slice."""
    devices = open_slice(topology).devices
    for model in (1, 2, 4, 8, 16):
        assert make_mesh(MeshShape(len(devices) // model, model), 8, devices).size == len(devices)
    with pytest.raises(js.UserError, match="cannot be laid out"):
        make_mesh(MeshShape(5, 1), 8, devices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "streamed"}, "--form streamed cannot be planned, because its time depends on the host"),
        ({"slots": 0}, "slots must be at least 1"),
    ],
)
def test_options_that_cannot_be_planned_raise_user_errors(eight: Slice, options: dict[str, Any], message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        forecast(small_config(), make_workload(8, 30, 20, 32, (5,)), eight, options=EngineOptions(**options))


def test_impossible_finetuning_batches_raise_user_errors(eight: Slice) -> None:
    for batch, mesh_shape, message in (
        (0, MeshShape(1, 8), "A batch of 0 chats of 8 tokens cannot be planned"),
        (3, MeshShape(2, 4), "not a multiple of the 2 devices"),
    ):
        with pytest.raises(js.UserError, match=message):
            finetune_step(small_config(), eight, batch_size=batch, length=8, remat=False, mesh_shape=mesh_shape)


def test_resident_bytes_of_directions_depend_on_their_storage(eight: Slice) -> None:
    """While a line of a 2D grid decodes, the original weights and the first direction stay in memory; while the line's
    parameters are formed, the second direction does."""
    shape = shape_on(small_config(), eight, MeshShape(2, 4), "bfloat16")
    work, machine = make_workload(8, 30, 20, 32, (3, 3)), Hardware(Roofline(1e14, 1e12), None, is_host=False)
    weights = sum(2 * leaf.size for leaf in jax.tree.leaves(parameter_shapes(small_config()))) / 4
    for storage, part in {"exact": 1.0, "int8": 0.5, "seed": 0.0}.items():
        options = EngineOptions(form="factorised", slots=8, direction_storage=storage)  # type: ignore[arg-type]
        plan = make_plan(shape, work, options, machine)
        rings = _cache_bytes(shape, work, plan)
        beside = {name: _resident_bytes(shape, work, plan, name, rings) for name in ("decode", "materialise")}
        assert beside["decode"] == pytest.approx((1 + part) * weights, rel=0.05)
        assert beside["materialise"] - rings == pytest.approx(part * weights, abs=0.05 * weights)


def test_both_forms_are_forecast(eight: Slice, one_layer: ModelConfig) -> None:
    """For the shapes of a 7B model, a decode step copies no cache and reads memory about once."""
    work = make_workload(80, 32, 26, 512, (21,))
    found = forecast(one_layer, work, eight, num_sets=3, mesh_shape=MeshShape(2, 4), options=EngineOptions(slots=128))
    assert {each.form for each in found} == {"materialised", "factorised"}
    assert found[0].landscape_seconds <= found[1].landscape_seconds
    for each in found:
        assert each.fits
        decode = each.programs["decode"]
        assert decode.temporary_bytes < 0.1 * decode.argument_bytes
        assert 0.6 < each.decode_share <= 1.02
        assert decode.collectives > 2 * one_layer.num_layers
        assert each.most_rows >= each.plan.layout.batch
        assert each.landscape_seconds == pytest.approx(63 * each.point_seconds)
    text = describe(found, None, "title")
    assert "factorised" in text
    assert "unusable" in text or "compiler's own" not in text
    assert json.loads(json.dumps(as_json(found)))[0]["programs"]["insert"]["flops"] > 0


@pytest.mark.parametrize("form", ["materialised", "factorised"])
def test_rows_are_inserted_where_they_are_computed(eight: Slice, form: Any) -> None:
    """No chip sends another one keys and values, or anything else."""
    config, work = replace(small_config(), num_layers=1), make_workload(80, 30, 20, 32, (21,))
    options = EngineOptions(form=form, slots=128)
    (found,) = forecast(config, work, eight, mesh_shape=MeshShape(8, 1), options=options)
    inserted = found.programs["insert"]
    assert (inserted.collectives, inserted.sent_bytes) == (0, 0.0)


def test_low_rank_directions_of_all_sets_share_a_batch_and_one_copy_of_the_weights(eight: Slice) -> None:
    config, options = replace(small_config(), num_layers=1), EngineOptions(form="factorised")
    work = make_workload(4, 30, 20, 32, (5,), rank=2)
    (found,) = forecast(config, work, eight, num_sets=8, mesh_shape=MeshShape(2, 4), options=options)
    layout = found.plan.layout
    assert (layout.num_sets, layout.num_factored, layout.points_in_flight) == (8, 8, 40)
    assert found.programs.keys() == {"insert", "decode"}
    assert found.landscape_seconds == pytest.approx(40 * found.point_seconds)
    weights = sum(2 * leaf.size for leaf in jax.tree.leaves(parameter_shapes(config))) / 4
    factors = sum(2 * 2 * sum(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)) if leaf.ndim == 2) / 4
    arguments = found.programs["decode"].argument_bytes - found.plan.cache_bytes
    assert arguments == pytest.approx(weights + 8 * factors, rel=0.3)
    assert as_json([found])[0]["plan"]["num_sets"] == 8
    with pytest.raises(js.UserError, match="rank of the directions must be at least 1, not 0"):
        make_workload(4, 30, 20, 32, (5,), rank=0)


def test_a_plan_that_does_not_fit_says_by_how_much(eight: Slice) -> None:
    one = replace(eight, devices=eight.devices[:1], chip=replace(eight.chip, memory=2.0**26))
    config = replace(small_config(), num_layers=8)
    options = EngineOptions(form="materialised", direction_storage="exact")
    (found,) = forecast(config, make_workload(8, 30, 20, 32, (5,)), one, mesh_shape=MeshShape(), options=options)
    assert not found.fits
    weights = sum(2 * leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))
    missing = found.programs["materialise"].missing_bytes
    assert missing == pytest.approx(3 * weights - 2**26, rel=0.15)  # θ₀, a direction, θ(c), and a small cache
    assert "does not fit, by" in describe([found], None, "title")
    (found_json,) = as_json([found])
    assert found_json["fits"] is False


def test_fewer_rows_are_tried_when_the_planned_rows_do_not_fit(eight: Slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxscape.engine.planner.MAX_MEMORY_FRACTION", 2.0)
    config = replace(small_config(), num_layers=2)
    options, work = EngineOptions(form="materialised"), make_workload(40, 30, 20, 32, (5,))
    one = replace(eight, devices=eight.devices[:1])
    (whole,) = forecast(config, work, one, mesh_shape=MeshShape(), options=options)
    assert whole.plan.layout.batch == 40
    used = max(program.used_bytes or 0 for program in whole.programs.values())
    chip = replace(eight.chip, memory=used - 20 * whole.plan.cache_bytes / 40)
    (found,) = forecast(config, work, replace(one, chip=chip), mesh_shape=MeshShape(), options=options)
    assert found.fits
    assert found.plan.layout.batch == found.slots in (8, 16)
    assert f"with --slots {found.slots} (" in describe([found], None, "title")


def test_the_size_of_a_refused_program_is_read_from_the_compiler_error(eight: Slice) -> None:
    x = jax.ShapeDtypeStruct((16, 2**30), jnp.bfloat16, sharding=SingleDeviceSharding(eight.devices[0]))
    counts = compile_program(jax.jit(lambda x: x + 1).lower(x), hlo.program_traffic)
    assert counts.missing_bytes == pytest.approx(64 * 2**30 - eight.chip.memory, rel=0.01)
    refused = program_cost(counts, eight.chip, 2**30)
    assert refused.missing_bytes == counts.missing_bytes + 2**30
    assert "finetune: does not fit, by at least 52." in describe([], refused, "title")


def test_a_finetuning_step(eight: Slice) -> None:
    """A step of three layers costs the same compiled as extrapolated from one and two layers."""
    config = replace(small_config(), num_layers=3)
    whole, quick = (
        finetune_step(config, eight, batch_size=8, length=128, remat=True, mesh_shape=MeshShape(2, 4), quick=quick)
        for quick in (False, True)
    )
    numbers = 3 * 512 * (4 * 512 + 3 * 1024) + 2 * 1024 * 512
    assert whole.argument_bytes == pytest.approx(12 * numbers / 4, rel=0.01)  # float32 weights and two moments
    assert quick.argument_bytes == pytest.approx(whole.argument_bytes, rel=0.01)
    assert quick.flops == pytest.approx(whole.flops, rel=0.1)
    assert quick.hbm_bytes == pytest.approx(whole.hbm_bytes, rel=0.2)
    resident = 2 * numbers / 4  # the starting model in bfloat16
    assert whole.used_bytes == pytest.approx(whole.argument_bytes + whole.temporary_bytes + resident, rel=0.01)
    assert whole.missing_bytes is None


@pytest.mark.parametrize("mesh_shape", [MeshShape(1, 8), MeshShape(2, 4)])
def test_bytes_are_counted_once(eight: Slice, mesh_shape: MeshShape) -> None:
    """In each iteration of a loop that multiplies by a sharded matrix, a device reads its shard once and sends its part
    of the result to all devices that share the matrix."""
    mesh = make_mesh(mesh_shape, 1, eight.devices)
    x_everywhere = sharding(mesh, (None, None), (8, 8192))
    x = jax.ShapeDtypeStruct((8, 8192), jnp.bfloat16, sharding=x_everywhere)
    w = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=sharding(mesh, (None, "mlp"), (8192, 8192)))

    @jax.jit
    def loop(x: jax.Array, w: jax.Array, steps: int) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w.T, x_everywhere))

        return jax.lax.fori_loop(0, steps, step, x)

    with compiling_for_absent_devices():
        moved = hlo.loop_traffic(loop.lower(x, w, 5).compile().as_text())
    matrix = 8192 * 8192 * 2 / mesh_shape.model
    assert matrix <= moved.hbm_bytes < 1.1 * matrix
    assert moved.collectives == 1
    assert moved.sent_bytes == (1 - 1 / mesh_shape.model) * 8 * 8192 * 2

    @jax.jit
    def loop_with_state(x: jax.Array, state: jax.Array, steps: int) -> Any:
        def step(i: int, carry: Any) -> Any:
            x = jnp.tanh(carry[0] @ carry[1].T)
            return x, jax.lax.dynamic_update_slice(carry[1], x[:1], (i, 0))

        return jax.lax.fori_loop(0, steps, step, (x, state))

    x, state = (jax.ShapeDtypeStruct((n, 4096), jnp.bfloat16, sharding=replicated(mesh)) for n in (8, 4096))
    with compiling_for_absent_devices():
        moved = hlo.loop_traffic(loop_with_state.lower(x, state, 5).compile().as_text())
    assert moved.hbm_bytes < 1e6, "the loop-carried buffer stays on the chip"
    assert 2 * 4096**2 <= moved.on_chip_bytes < 1.1 * 2 * 4096**2
    with pytest.raises(ValueError, match="no loop"), compiling_for_absent_devices():
        hlo.loop_traffic(jax.jit(jnp.tanh).lower(x).compile().as_text())


def test_known_models_have_the_right_number_of_parameters(
    tiny_dir: Path, tiny: js.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    billions = {"llama-2-7b": 6.74, "llama-3-8b": 8.03, "mistral-7b": 7.24, "qwen2.5-7b": 7.6, "qwen3-8b": 8.19}
    billions |= {"llama-3.2-1b": 1.24, "gemma-2-27b": 27.2, "phi-4": 14.7, "smollm3-3b": 3.08, "olmo-2-7b": 7.30}
    for name, expected in billions.items():
        leaves = jax.tree.leaves(parameter_shapes(shape_config(name)))
        assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(expected, rel=0.01)
    assert all(shape_config(name).vocab_size for name in SHAPES)
    found = shape_config(str(tiny_dir))
    assert parameter_shapes(found) == parameter_shapes(tiny.config)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tiny_dir)
    for source, message in {
        "nothing": "Unknown model 'nothing': give a name",
        "": "Unknown model '': give a name",
        str(tmp_path / "adapter"): "holds a LoRA adapter, not a whole model: give its base model",
        str(tmp_path): "architecture is None",
    }.items():
        with pytest.raises(js.UserError, match=message):
            shape_config(source)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2x", "v5e:3x7x9"])
def test_an_unknown_topology_raises_a_user_error(name: str) -> None:
    with pytest.raises(js.UserError, match="topology"):
        open_slice(name)


def test_a_prompt_with_no_tokens_of_its_own_raises_a_user_error() -> None:
    with pytest.raises(js.UserError, match="A prompt of 20 tokens cannot share 20 of them"):
        make_workload(8, 20, 20, 8, (5,))


def test_a_batch_that_the_mesh_does_not_divide_is_an_error_before_compilation(
    tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--model", str(tiny_dir), "--mesh", "points=2,model=4", "--finetune", "3", "32"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "batch size 3 is not a multiple of the 2 devices" in capsys.readouterr().err


def test_jaxscape_plan_writes_json(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(tiny_dir), "--topology", "v5e:2x2", "--json"]
    command += ["--points", "5", "5", "--prompts", "4", "--max-new-tokens", "16", "--finetune", "8", "32"]
    main(command)
    result = json.loads(capsys.readouterr().out)
    assert {each["form"] for each in result["forms"]} == {"materialised", "factorised"}
    assert result["finetune"]["flops"] > 0
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e"}
