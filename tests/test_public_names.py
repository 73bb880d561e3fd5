"""The public names: all there, documented, and imported only when they are used."""

import subprocess
import sys

import pytest

import jaxscape as js

SLOW = ("jax", "flax", "transformers", "matplotlib", "orbax", "optax", "gguf", "huggingface_hub", "numpy")


@pytest.mark.parametrize("name", js.__all__)
def test_each_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(js, name)
    assert value.__doc__
    assert value.__doc__.strip()
    assert name in dir(js)


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        js.no_such_name  # noqa: B018


def imported_by(program: str) -> set[str]:
    """The slow packages that a Python program imports."""
    program += f"\nimport sys\nsys.stderr.write(' '.join(name for name in {SLOW!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(result.stderr.split())


def test_importing_the_package_imports_nothing_slow() -> None:
    assert imported_by("import jaxscape") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["scan", "--help"], ["finetune", "--help"], ["plan", "--help"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    program = f"""
from jaxscape.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code"""
    assert imported_by(program) == set()


def test_a_name_imports_only_what_it_needs() -> None:
    assert "matplotlib" not in imported_by("import jaxscape as js; js.scan")
    assert imported_by("import jaxscape.report.registry") == {"matplotlib", "numpy"}
    assert imported_by("import jaxscape as js; js.UserError; js.EngineOptions; js.Training") == set()
