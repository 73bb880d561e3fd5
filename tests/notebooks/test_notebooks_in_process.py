"""The notebooks run from top to bottom on tiny random models, and find in them what their texts say of the figures."""

import atexit
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from jaxscape.cli.main import main
from jaxscape.evaluate import coherence

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


class Shell(InteractiveShell):
    """IPython without a kernel: a process of its own would import everything and compile the programs again."""

    def system(self, cmd: str) -> None:
        """Run `!jaxscape ...` in this process too."""
        program, *arguments = self.var_expand(cmd, depth=1).split()
        assert program == "jaxscape"
        main(arguments)


RunNotebook = Callable[..., dict[str, Any]]


@pytest.fixture
def run_notebook(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunNotebook]:
    """Runs the cells of a notebook on the tiny model, in an empty directory, with other values of the cell that is
    tagged `parameters`. Returns the notebook's variables."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coherence, "NUM_CALIBRATION", 2)
    monkeypatch.setattr(coherence, "CALIBRATION_TOKENS", 4)
    shell = Shell(user_module=types.ModuleType("notebook"), config=Config({"HistoryManager": {"enabled": False}}))

    def run(name: str, **parameters: Any) -> dict[str, Any]:
        parameters |= {"MODEL": str(tiny_dir), "NUM_PROMPTS": 2, "MAX_NEW_TOKENS": 4}
        for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source).raise_error()
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= shell.user_ns.keys()
                shell.push(parameters)
        return shell.user_ns

    yield run
    atexit.unregister(shell.atexit_operations)


def test_both_paths_of_the_finetuning_attack_end_at_the_models(run_notebook: RunNotebook) -> None:
    chats = {"NUM_REFUSALS": 8, "NUM_HARMLESS": 2, "NUM_ATTACK": 5, "MAX_LENGTH": 256}
    found = run_notebook("finetuning_attack", STEPS=1, ALIGN_EPOCHS=1, ATTACK_EPOCHS=1, **chats)
    for path, ends in (("align_path", [(0, 0), (1, 0)]), ("attack_path", [(1, 0), (1, 1)])):
        np.testing.assert_allclose(found[path].coords, ends, atol=1e-3)
        np.testing.assert_allclose(found[path].residual, 0, atol=1e-2)


def test_your_own_model_has_the_system_prompts_and_judges(
    run_notebook: RunNotebook, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["none", "Speak like a pirate."]
    found = run_notebook("your_own_model", SYSTEM_PROMPTS=prompts, JUDGES=["xstest", "wei"], STEPS=2)
    assert found["refused"].keys() == {"keywords", "xstest", "wei"}
    printed = capsys.readouterr().out
    assert printed.count("Speak like a pirate.</s><s>user") == 1
    assert "radius of Speak like a pirate. minus that of none" in printed
    assert "wei / xstest: they differ on" in printed


def test_special_directions_have_controls(run_notebook: RunNotebook, capsys: pytest.CaptureFixture[str]) -> None:
    # A random model refuses nothing, so the layer and the refusal are given.
    special = [
        f"weight-norm:[{name}]" for name in ("refusal:1:harmful,benign:2", "worst-case:0.01:1:harmful:2:I cannot")
    ]
    found = run_notebook("directions", DIRECTIONS=["random:0", *special], DISTANCES=[0.01, 0.1])
    assert [name for (name,) in found["land"].directions] == [
        "random:0",
        *(name for direction in special for name in (direction, f"control:[{direction}]")),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert sum("first point with an ASR above 50 %" in line for line in printed) == 5
    assert sum(line.startswith((*special, "random:0  ")) for line in printed) == 3 + 3 * 3


def test_meshes_and_forms_give_the_same_answers(
    run_notebook: RunNotebook, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libtpu")
    workload = "--form materialised --slots 2 --points 3 --prompts 2 --max-new-tokens 8"
    plan = f"--model {tiny_dir} --topology v5e:1x1 --quick {workload}"
    run_notebook("scaling_on_tpu", PLAN=plan, STEPS=2, ROUNDS=1)
    printed = capsys.readouterr().out
    assert re.search(r"materialised: \d+ rows at a time .* s in all", printed)
    assert "up_proj (64, 32), of which a device holds (32, 32)" in printed
    assert "6 of 6 answers are the same on one device and on points=4,model=2" in printed
    assert "6 of 6 answers are the same in both forms" in printed
