"""What must hold for every kind of direction: its bits on other meshes, and that a scan along it can be resumed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import MakeModel

import jaxscape as js
from jaxscape.directions import examples
from jaxscape.directions.kinds import COMPOSED_KINDS, KINDS
from jaxscape.directions.path import CHECKPOINTS, checkpoint_manager
from jaxscape.directions.storage import Factored
from jaxscape.models.checkpoint import fingerprint, named_leaves
from jaxscape.runtime.rundir import CONFIG
from jaxscape.runtime.sharding import MeshShape

SQUARE = {"num_hidden_layers": 1, "intermediate_size": 32, "num_key_value_heads": 4}  # few programs to compile
MESHES = [MeshShape(8, 1), MeshShape(4, 2), MeshShape(2, 4), MeshShape(1, 8)]

LOSS = "HARMFUL:2:No:Yes"
SETS = "HARMFUL,HARMLESS:4"

SAME_BITS = [
    "random:3",
    "gaussian:3",
    "relative-gaussian:3",
    "filter:3",
    "sparse:0.5:3",
    "low-rank:2:3",
    "file:FILE",
    "to:OTHER",
    "from:OTHER",
    "quantisation:int8",
    "quantisation:int4",
    "principal:PATH",
    "sum:[gaussian:3][random:3]",
    "orthogonal:[gaussian:3][random:3]",
    "projected:[gaussian:3][random:3]",
    "restricted:[gaussian:3]:layers=0-0",
    "weight-norm:[gaussian:3]",
    "tensor-norm:[gaussian:3]",
    "control:[gaussian:3]",
    "control:[low-rank:2:3]",
]
"""Kinds that follow from the weights by sums which no mesh changes."""

ROUNDED = [
    f"gradient:{LOSS}",
    f"worst-case:0.001:2:{LOSS}",
    f"hessian:1:{LOSS}",
    f"refusal:0@-14:{SETS}",
    f"mask:snip:20:10:{SETS}",
    f"mask:wanda:20:10:{SETS}",
    f"masked:[gaussian:3][mask:wanda:20:10:{SETS}]",
    f"singular:2:8:{SETS}",
]
"""Kinds that come from activations or gradients, whose last bits depend on the mesh. Their programs take long to trace,
so they are tested on two meshes: with the weights sharded over two devices, and over eight."""


@dataclass(frozen=True)
class Inputs:
    """A model, and what directions are read from.

    Attributes:
        directory: the model, whose matrices have few shapes, for each of which programs are compiled.
        other: another model of the same shape.
        file: the file of a direction.
        path: a finetuning with two epochs.
        harmful, harmless: files of prompts, which are short.
    """

    directory: Path
    other: Path
    file: Path
    path: Path
    harmful: Path
    harmless: Path

    def named(self, name: str) -> str:
        """A direction's name with the paths that belong to it."""
        paths = {"OTHER": self.other, "FILE": self.file, "PATH": self.path}
        paths |= {"HARMFUL": self.harmful, "HARMLESS": self.harmless}
        for word, path in paths.items():
            name = name.replace(word, str(path))
        return name


@pytest.fixture(scope="module")
def inputs(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    directory, other = (make_model(seed=seed, **SQUARE)[0] for seed in (0, 5))
    model, folder = js.load_model(directory, "float32"), tmp_path_factory.mktemp("inputs")
    js.save_direction(js.random_direction(model, 1), folder / "direction.safetensors", model)
    with checkpoint_manager(folder / "path" / CHECKPOINTS, None) as manager:
        for epoch in (1, 2):
            moved = js.model_at(model, [f"gaussian:{epoch}"], [0.01 * epoch]).params
            manager.save(epoch, args=ocp.args.StandardSave(moved))
    config = {"weights": fingerprint(model.params), "chats": "c", "learning_rate": 1.0, "method": "full"}
    (folder / "path" / CONFIG).write_text(json.dumps(config | {"dtype": model.dtype}))
    harmful, harmless = folder / "harmful.txt", folder / "harmless.txt"
    harmful.write_text("\n".join(["Steal it", "Break in", "Lie", "Hurt me"]))
    harmless.write_text("\n".join(["Hi", "Why?", "Sing a song", "Count"]))
    return Inputs(directory, other, folder / "direction.safetensors", folder / "path", harmful, harmless)


@pytest.fixture(scope="module")
def model(inputs: Inputs) -> js.Model:
    return js.load_model(inputs.directory, "float32")


@pytest.fixture(scope="module")
def on_meshes(inputs: Inputs) -> list[js.Model]:
    return [js.load_model(inputs.directory, "float32", mesh_shape=shape) for shape in MESHES]


@pytest.fixture(autouse=True)
def harmful_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model refuses nothing, so the answers to harmful prompts count as refusals."""
    kept = examples._answered
    monkeypatch.setattr(examples, "_answered", lambda model, prompts, refuses: kept(model, prompts, refuses=False))


def test_no_kind_is_left_out() -> None:
    assert {name.partition(":")[0] for name in SAME_BITS + ROUNDED} == {kind.kind for kind in (*KINDS, *COMPOSED_KINDS)}


def product(tensor: Any) -> np.ndarray:
    """A direction's tensor, flat."""
    return np.ravel(tensor.left @ tensor.right if isinstance(tensor, Factored) else tensor)


def flat(name: str, model: js.Model) -> np.ndarray:
    """All numbers of a direction."""
    (direction,) = jax.device_get(js.make_directions([name], model))
    return np.concatenate([product(leaf) for leaf in named_leaves(direction).values()])


def stored(name: str, model: js.Model) -> list[np.ndarray]:
    """The arrays of a direction, as it is stored."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(js.make_directions([name], model))]


@pytest.mark.parametrize("name", SAME_BITS)
def test_a_direction_has_the_same_bits_on_every_mesh(
    inputs: Inputs, model: js.Model, on_meshes: list[js.Model], name: str
) -> None:
    expected = stored(inputs.named(name), model)
    assert any(tensor.any() for tensor in expected)
    for shape, many in zip(MESHES, on_meshes, strict=True):
        for here, there in zip(expected, stored(inputs.named(name), many), strict=True):
            np.testing.assert_array_equal(there, here, err_msg=str(shape))


@pytest.mark.parametrize("name", ROUNDED)
def test_a_direction_from_what_the_model_computes_is_the_same_up_to_rounding_on_meshes(
    inputs: Inputs, model: js.Model, on_meshes: list[js.Model], name: str
) -> None:
    expected = flat(inputs.named(name), model)
    assert expected.any()
    for shape, many in zip(MESHES[1::2], on_meshes[1::2], strict=True):
        difference = np.linalg.norm(flat(inputs.named(name), many) - expected)
        assert difference < 1e-4 * np.linalg.norm(expected), shape


OPTIONS: dict[str, Any] = {"prompts": ["Hi", "Why?"], "steps": 2, "radius": 0.5, "max_new_tokens": 4}
OPTIONS |= {"options": js.EngineOptions(form="materialised"), "progress": False, "shares": False}


@pytest.mark.parametrize("name", SAME_BITS + ROUNDED)
def test_a_scan_that_was_cut_off_ends_as_an_unbroken_one(
    inputs: Inputs, model: js.Model, name: str, tmp_path: Path
) -> None:
    """With its random control, where there is one; the last answer is cut in the middle."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    js.scan(model, [inputs.named(name)], out=whole, **OPTIONS)
    resumed.mkdir()
    for kept in (CONFIG, "prompts.jsonl"):
        (resumed / kept).write_bytes((whole / kept).read_bytes())
    answers = (whole / "generations.jsonl").read_bytes()
    (resumed / "generations.jsonl").write_bytes(answers[: len(answers) // 2])
    js.scan(model, [inputs.named(name)], out=resumed, **OPTIONS)
    for file in (CONFIG, "prompts.jsonl", "generations.jsonl", "landscape.json"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file
