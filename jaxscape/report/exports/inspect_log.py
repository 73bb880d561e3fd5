"""Export of a run as a log of Inspect (https://inspect.aisi.org.uk), which `inspect view` and its data frames read."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from os import replace
from pathlib import Path
from typing import Any

import jaxscape
from jaxscape.evaluate.base import LABELS
from jaxscape.landscapes.store import GENERATIONS
from jaxscape.report.exports.rows import Row, answer_rows
from jaxscape.report.run import KeptRun
from jaxscape.runtime.extras import import_extra
from jaxscape.runtime.files import checksum, temporary_path

FILE_NAME = "landscape.eval"
TASK = "safety_landscape"
NOT_METADATA = ("prompt", "generation")


def export_inspect(run: KeptRun, out: Path) -> list[Path]:
    """Write `landscape.eval` into a directory. Returns the file.

    The log has a sample for each answer. Its `input` is the prompt, its output the answer. Its metadata are the other
    columns of `answer_rows`, so the point is `direction`, `point`, `coord_0` and `coord_1`. Each evaluator is a score
    whose value is its label; an answer that it could not judge has none. The metrics of a score are the fractions of
    the answers that have each label, over all points.

    Raises:
        UserError: inspect_ai is not installed.
    """
    log = import_extra("inspect_ai.log", "inspect")
    content = log.EvalLog(
        status="success",
        eval=_spec(run, log),
        results=_results(run, log),
        stats=log.EvalStats(started_at=_time(run), completed_at=_time(run)),
        samples=list(_samples(run, log)),
    )
    temporary = temporary_path(out / FILE_NAME)
    log.write_eval_log(content, temporary, format="eval")
    replace(temporary, out / FILE_NAME)
    return [out / FILE_NAME]


def _spec(run: KeptRun, log: Any) -> Any:
    """What was evaluated: the model, the prompts and the settings of generation."""
    model = import_extra("inspect_ai.model", "inspect")
    config, land = run.config, run.landscape
    identity = checksum([str(config), run.prompts])
    settings = {"max_tokens": "max_new_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
    return log.EvalSpec(
        created=_time(run),
        eval_id=identity[:22],
        run_id=identity[22:44],
        task_id=identity[-20:],
        task=TASK,
        model=str(config.get("model", "unknown")),
        model_generate_config=model.GenerateConfig(
            seed=config.get("seed"), **{theirs: config.get(ours) for theirs, ours in settings.items()}
        ),
        dataset=log.EvalDataset(name=config.get("prompt_source"), samples=len(run.points) * land.num_prompts),
        config=log.EvalConfig(),
        packages={"jaxscape": jaxscape.__version__},
        metadata={"config": dict(run.config), "visage": land.visage_values, "numbers": land.numbers},
    )


def _results(run: KeptRun, log: Any) -> Any:
    """For each evaluator, the fraction of each label among the answers that it could judge, over all points."""
    total, scores = len(run.points) * run.landscape.num_prompts, []
    for name, rows in run.labels.items():
        counts = Counter(label for row in rows for label in row)
        judged = total - counts.pop(None, 0)
        metrics = {label: log.EvalMetric(name=label, value=counts[label] / judged) for label in LABELS if counts[label]}
        scores.append(
            log.EvalScore(
                name=name, scorer=name, scored_samples=judged, unscored_samples=total - judged, metrics=metrics
            )
        )
    return log.EvalResults(total_samples=total, completed_samples=total, scores=scores)


def _samples(run: KeptRun, log: Any) -> Iterator[Any]:
    """A sample for each answer."""
    name = str(run.config.get("model", "unknown"))
    model, scorer = import_extra("inspect_ai.model", "inspect"), import_extra("inspect_ai.scorer", "inspect")
    for row in answer_rows(run):
        labels = {evaluator: row[f"label_{evaluator}"] for evaluator in run.labels}
        output = model.ModelOutput.from_content(name, row["generation"])
        yield log.EvalSample(
            id=_sample_id(row),
            epoch=1,
            input=row["prompt"],
            target="",
            messages=[model.ChatMessageUser(content=row["prompt"]), output.message],
            output=output,
            scores={
                evaluator: scorer.Score(value=label, answer=row["generation"])
                for evaluator, label in labels.items()
                if label is not None
            },
            metadata={
                key: value for key, value in row.items() if key not in NOT_METADATA and not key.startswith("label_")
            },
        )


def _sample_id(row: Row) -> str:
    """A name of the sample that sorts as the samples do: direction set, point and prompt."""
    return f"{row['direction']}-{row['point']:04d}-{row['prompt_number']:04d}"


def _time(run: KeptRun) -> str:
    """When the last answer was written, in UTC."""
    written = (run.directory / GENERATIONS).stat().st_mtime
    return datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")
