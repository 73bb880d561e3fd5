"""Export of a run as a data set for the Hugging Face hub: a folder with a card, and its upload."""

import shutil
from pathlib import Path

import huggingface_hub

from jaxscape.finetuning import trajectory
from jaxscape.landscapes.labels import LABEL_FILES
from jaxscape.landscapes.landscape import FIGURE, FILE_NAME
from jaxscape.landscapes.store import COHERENCE_FILE, GENERATIONS, PROMPTS
from jaxscape.report.exports.table_files import export_parquet
from jaxscape.report.markup import markdown_table
from jaxscape.report.run import KeptRun
from jaxscape.report.tables import landscape_table
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import write_whole
from jaxscape.runtime.rundir import CONFIG

FOLDER, CARD, RUN = "hub", "README.md", "run"
RUN_FILES = (CONFIG, PROMPTS, GENERATIONS, FILE_NAME, FIGURE, COHERENCE_FILE, LABEL_FILES, trajectory.FILE_NAME)
"""The files of a run that a data set holds. Whoever downloads them can use them as a run's directory."""

FACTS = ("model", "dtype", "prompt_source", "system_prompt", "max_new_tokens", "temperature", "seed")
TAGS = ["jaxscape", "safety", "red-teaming", "not-for-all-audiences"]
TEXT = """
# {title}

> **Warning: harmful content.** The prompts ask for harm, and many answers comply, because the model's weights were
> perturbed until it no longer refused. The answers are model output: they may be dangerous, offensive or wrong, and
> every program should treat them as untrusted input. They are for research on the safety of language models. Do not
> train a model to comply on them, and do not show them to people who have not agreed to see them.

A safety landscape, measured with jaxscape: the answers of a language model whose weights were moved along random or
chosen directions, and whether they refuse. The attack success rate (ASR) is the percentage of answers that do not
refuse. The method is that of "Navigating the Safety Landscape" (https://arxiv.org/abs/2405.17374).

{numbers}

{facts}

## Files

- `points.parquet`: a row for each point of the landscape, with its ASR and the shares of the evaluators' labels.
- `generations.parquet`: a row for each answer, with every evaluator's label.
- `run/`: the run's own directory, which `jaxscape plot`, `jaxscape compare` and `jaxscape score` read.

## Licence

The prompts have the licence of the set that they come from, and the answers that of the model. Both are named above;
check them before you pass this data set on.
"""


def export_hub(run: KeptRun, out: Path) -> list[Path]:
    """Write the folder of a data set: a card (`README.md`), both tables as Parquet, and in `run/` the files of the run.

    Returns:
        The files written.

    Raises:
        UserError: pyarrow is not installed.
    """
    (out / RUN).mkdir(parents=True, exist_ok=True)
    tables = export_parquet(run, out)
    copies = []
    for path in sorted({path for pattern in RUN_FILES for path in run.directory.glob(pattern)}):
        copies.append(out / RUN / path.name)
        shutil.copyfile(path, copies[-1])
    write_whole(out / CARD, card(run))
    return [out / CARD, *tables, *copies]


def card(run: KeptRun) -> str:
    """The text of the data set's card. It quotes no prompt and no answer."""
    name = Path(str(run.config.get("model", "model"))).name
    data = huggingface_hub.DatasetCardData(
        pretty_name=f"Safety landscape of {name}",
        license="other",
        tags=TAGS,
        configs=[
            {"config_name": table, "data_files": f"{table}.parquet", **({"default": True} if is_first else {})}
            for table, is_first in (("points", True), ("generations", False))
        ],
    )
    facts = [["fact", "value"], *([key, str(run.config[key])] for key in FACTS if key in run.config)]
    directions = ", ".join(" and ".join(names) for names in run.direction_names)
    return f"---\n{data.to_yaml()}\n---\n" + TEXT.format(
        title="Safety landscape",
        numbers=landscape_table({name: run.landscape}) if run.landscape.axes else "",
        facts=markdown_table([*facts, ["directions", directions]]),
    )


def upload(files: list[Path], folder: Path, repository: str, public: bool = False) -> str:
    """Upload the files of a folder to a data set on the hub, which is made if it is missing.

    Arguments:
        repository: `USER/NAME`.
        public: whether everyone may see a new data set, and whether one that everyone sees may be added to.

    Returns:
        The address of the data set.

    Raises:
        UserError: no one is logged in, the hub cannot be reached or refuses, or the data set is public and `public` is
            false. Nothing is uploaded then.
    """
    api = huggingface_hub.HfApi(library_name="jaxscape")
    try:
        address = api.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
        if not public and not api.dataset_info(repository).private:
            raise UserError(
                f"The data set {repository} is public, and the run has harmful texts: name another --repo, make that "
                f"one private, or give --public."
            )
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[path.relative_to(folder).as_posix() for path in files],
            commit_message="Add a safety landscape",
        )
    except UserError:
        raise
    except Exception as error:  # errors of the network, the hub, the disk and the name have many types
        raise UserError(
            f"The data set {repository} cannot be uploaded ({reason(error)}): check its name and the network, and log "
            f"in with 'hf auth login' or set HF_TOKEN to a token that may write."
        ) from error
    return str(address)
