"""The order of imports: a folder imports only from folders below it, and no module imports itself in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxscape"
# From the top down. The folders of one row do not import from each other.
ROWS = (
    ("cli",),
    ("sweeps",),
    ("report",),
    ("landscapes",),
    ("evaluate",),
    ("finetuning",),
    ("forecast",),
    ("engine",),
    ("directions",),
    ("models", "prompts"),
    ("runtime",),
)
ROW = {folder: number for number, row in enumerate(ROWS) for folder in row}


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, such as `engine.decode`; those for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxscape."):
            module = str(node.module).removeprefix("jaxscape.")
            yield from (f"{module}.{alias.name}" for alias in node.names) if "." not in module else (module,)


def modules() -> dict[str, set[str]]:
    """What each module of a folder imports."""
    paths = sorted(PACKAGE.glob("*/**/*.py"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): set(imported(path)) for path in paths}


def test_every_folder_has_a_row() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == set(ROW)


def test_imports_only_go_down() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in modules().items()
        for other in others
        if other.partition(".")[0] != module.partition(".")[0]
        and ROW[other.partition(".")[0]] <= ROW[module.partition(".")[0]]
    ]
    assert not upward


def test_no_module_imports_itself_in_a_circle() -> None:
    graph, done = modules(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_real_weights_are_loaded_by_the_files_that_one_process_takes() -> None:
    loaded = {"smollm2", "safe_smollm2", "torch_smollm2", "smollm2_reference"}
    for path in sorted(Path(__file__).parent.glob("**/test_*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        wanted = {argument.arg for node in nodes if isinstance(node, ast.FunctionDef) for argument in node.args.args}
        assert path.name.startswith("test_real_") or not wanted & loaded, path


def test_no_test_module_imports_another() -> None:
    for path in sorted(Path(__file__).parent.glob("**/test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path
