"""The quickstart runs from top to bottom on the real model, and the outputs that notebooks have saved are real ones."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"

# The model that is measured says with answers of its own what makes sense. They would take most of the test's time.
FEW_CALIBRATION_TOKENS = """
from jaxscape.evaluate import coherence
coherence.NUM_CALIBRATION, coherence.CALIBRATION_TOKENS = 2, 4
"""


@pytest.mark.real
@pytest.mark.filterwarnings("default")  # the kernel's own, of other packages
def test_the_quickstart_runs_with_small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS")  # the kernel runs a real model, for which optimised programs pay
    notebook = nbformat.read(PATH, as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    settings.source = "NUM_PROMPTS = 2\nSTEPS = 2\nMAX_NEW_TOKENS = 4\n" + FEW_CALIBRATION_TOKENS
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "VISAGE" in text
    # Far from the model nothing is refused.
    assert "alpha -0.5  ASR 100.0 %" in text
    assert "alpha +0.5  ASR 100.0 %" in text


@pytest.mark.parametrize("path", sorted(PATH.parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_saved_outputs_are_those_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert (
        f"colab.research.google.com/github/jaxscape/jaxscape/blob/main/notebooks/{path.name})"
        in notebook.cells[0].source
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 'find_spec("jaxscape") is None' in code[0].source
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert "error" not in {output.output_type for output in outputs}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == (path.stem != "scaling_on_tpu")
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    for file in re.findall(r"jaxscape/jaxscape/blob/main/([^)#]+)", text):
        assert (path.parents[1] / file).is_file()
    assert not re.search(r"""["\s(]/(home|root|tmp|work|content|usr|opt)/""", text)
