"""Fixtures: a tiny random model on disk in the Hugging Face format, and the real SmolLM2-135M.

With workers, the process that only hands out the tests reads this file before it starts them, so what takes long to
import is imported where it is used.
"""

from __future__ import annotations

import os

# JAX reads these when it is imported, and the processes that tests start inherit them. The tests run on a CPU, which
# appears as eight devices, or on the platforms in JAXSCAPE_TEST_PLATFORM, with the devices that there are: `cuda,cpu`.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXSCAPE_TEST_PLATFORM", "cpu")
os.environ["NPROC"] = "32"  # threads of XLA: each device may block several, and with too few all would wait
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the workers share a GPU
# Most of the time goes into compiling programs for tiny models, so they are compiled quickly and not optimised.
# Models of one device live on the first of the eight.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if os.environ["JAX_PLATFORMS"] == "cpu"
    else os.environ.get("XLA_FLAGS", "")
)

import gc
import importlib
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist import is_xdist_controller
from xdist.scheduler import LoadFileScheduling

import jaxscape as js

if TYPE_CHECKING:
    from helpers import MakeModel

    from jaxscape.models.transformers_reference import Reference


IS_CPU = os.environ["JAX_PLATFORMS"] == "cpu"

# Modules of jaxscape import these. Python compiles anew what is first imported while jaxtyping's hook imports another.
LIBRARIES = (
    "beartype",
    "flax",
    "gguf",
    "optax",
    "orbax.checkpoint",
    "scipy.special",
    "transformers.modeling_utils",
    "tyro",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare a process that runs tests."""
    if is_xdist_controller(session):
        return
    import jax
    import torch
    from annotation_checks import check_quickly
    from hypothesis import settings

    check_quickly()
    for name in LIBRARIES:
        importlib.import_module(name)
    from jaxscape.runtime.files import cache_dir

    # Compiled programs are kept on disk, however quickly they were compiled: for the other worker, for the processes
    # that tests start, and for the next run.
    for option, value in {
        "jax_compilation_cache_dir": str(cache_dir() / "compiled-in-tests"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }.items():
        os.environ[option.upper()] = str(value)
        jax.config.update(option, value)

    settings.register_profile("local", deadline=None)
    # Chance finds bugs at a desk, and only noise in CI.
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")

    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core; torch's threads would wait for one another
        torch.set_num_threads(1)


# In this order, before all others, so that the workers end at about the same time.
SLOW_FILES = (
    "test_real_model.py",
    "test_real_evaluators.py",
    "test_real_decoding.py",
    "test_real_safe_model.py",
    "test_real_judge.py",
    "test_real_finetuning.py",
    "test_processes.py",
    "test_families.py",
    "test_forecast.py",
    "test_finetuning_run.py",
    "test_engine.py",
    "test_cli.py",
    "test_check.py",
    "test_surroundings.py",
    "test_sharding.py",
    "test_notebook.py",
    "test_extension.py",
    "test_documents_run.py",
    "test_scan.py",
    "test_finetune.py",
    "test_damaged.py",
    "test_decode.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by file, the slow files first, and skip on other platforms what expects a CPU."""
    places = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if not IS_CPU:
        for item in items:
            if item.get_closest_marker("cpu") is not None:
                item.add_marker(pytest.mark.skip(reason=f"expects a CPU, and this is {os.environ['JAX_PLATFORMS']}"))


@pytest.hookimpl(wrapper=True)
def skipped_without_devices() -> Iterator[None]:
    """Skip, on other platforms than the CPU with its eight devices, a test that needs more devices than there are."""
    try:
        return (yield)
    except js.UserError as error:
        if IS_CPU or not re.search(r"The mesh .* does not fit \d+ devices", str(error)):
            raise
        pytest.skip(str(error))


pytest_runtest_setup = pytest_runtest_call = skipped_without_devices


class FilesScheduling(LoadFileScheduling):
    """Gives each process whole files, and all files `test_real_*.py` to one: only that one loads the real weights."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "real" if "/test_real_" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return FilesScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


STATM = Path("/proc/self/statm")  # of Linux
MAX_RESIDENT = 4 * 2**30  # bytes


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Forget the compiled programs after a file when they take gigabytes. Those that are needed again are on disk."""
    yield
    if STATM.exists() and int(STATM.read_text().split()[1]) * resource.getpagesize() > MAX_RESIDENT:
        import jax

        jax.clear_caches()
        gc.collect()


WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *path: None if name.split(".")[0] in ("torch", "accelerate") else find(name, *path)
"""


@pytest.fixture(scope="session", autouse=True)
def no_torch_in_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that tests start do without torch, as those of most users; transformers would import it for seconds."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(WITHOUT_TORCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes a random model with transformers: `make_model(**options)` gives its directory and the torch model."""
    import torch
    import transformers
    from helpers import TINY, tiny_tokenizer

    tokenizer = tiny_tokenizer()

    def make(
        family: str = "llama",
        seed: int = 0,
        save: dict[str, Any] | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> tuple[Path, Any]:
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(family, **(TINY | options))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():  # norms and biases start as ones and zeros: hide no mistake
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        model.to(getattr(torch, dtype))
        directory = tmp_path_factory.mktemp("model")
        model.save_pretrained(directory, **(save or {}))
        tokenizer.save_pretrained(directory)
        return directory, model

    return make


@pytest.fixture(scope="session")
def tiny_dir(make_model: MakeModel) -> Path:
    return make_model()[0]


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> js.Model:
    return js.load_model(tiny_dir, "float32")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    from jaxscape.models import builtin

    return builtin.packaged_file(builtin.MODELS["smollm2-135m"])


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> js.Model:
    return js.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def weightless_smollm2(smollm2_file: Path) -> js.Model:
    """SmolLM2 without its weights, which are what takes time to load."""
    return js.load_model("smollm2-135m", weights=False)


@pytest.fixture(scope="session")
def safe_smollm2() -> js.Model:
    return js.load_model("smollm2-135m-safe")


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: js.Model) -> Reference:
    """What `jaxscape check` compares with: transformers' own reading of the same file, which takes long."""
    from jaxscape.models.transformers_reference import Reference

    return Reference(smollm2)


@pytest.fixture(scope="session")
def torch_smollm2(smollm2_reference: Reference) -> Any:
    """The torch model of that reading. A test that changes it copies it first."""
    return smollm2_reference._model


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, that of the system. It is started once for all tests of a process."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    # Surfaces are drawn by the CPU where there is no GPU. Root cannot have Chromium's sandbox.
    arguments = ["--enable-unsafe-swiftshader", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def advbench_file() -> Path:
    from helpers import ADVBENCH

    if not ADVBENCH.exists():
        pytest.skip(f"AdvBench's first rows are not at {ADVBENCH.parent}")
    return ADVBENCH


@pytest.fixture(scope="session")
def adv80(advbench_file: Path) -> list[str]:
    return js.load_prompts(advbench_file, 80)


@pytest.fixture
def edit_json() -> Callable[..., None]:
    def edit(path: Path, **changes: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit
