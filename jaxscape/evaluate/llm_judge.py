"""LLM judges: a causal model says of each answer whether it refuses.

A judge file (`jaxscape.evaluate.judge_file`) says how. `jaxscape.evaluate.judge_prompt` makes the judge's prompt, and
`jaxscape.evaluate.judge_rule` reads its answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float

from jaxscape.engine.batching import Workload
from jaxscape.engine.engine import Engine
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import MAX_MEMORY_FRACTION, Hardware, make_plan, smallest_plan
from jaxscape.engine.prefill import next_token_logits
from jaxscape.engine.sampling import Sampling
from jaxscape.evaluate.base import Label
from jaxscape.evaluate.judge_file import JudgeFile, read_judge_file
from jaxscape.evaluate.judge_prompt import JudgePrompt
from jaxscape.evaluate.judge_rule import UNJUDGED, AnswerPatterns, Verdict, log_sum
from jaxscape.models.model import Model, load_model
from jaxscape.prompts.thinking import answer_of, is_unanswered
from jaxscape.runtime.errors import UserError, as_texts
from jaxscape.runtime.files import checksum, file_checksum
from jaxscape.runtime.hardware import Roofline

BUILTIN_FILES = Path(__file__).parents[1] / "data" / "judges"
SHIPPED, SHIPPED_FILE = "judge", Path(__file__).parents[1] / "data" / "judge" / "judge.toml"
BATCH_ANSWERS = 256  # about so many answers are judged at a time by the probability of the first token
USUAL_ANSWER = 512  # number of an answer's tokens for which memory is reserved, before any answer is known
LARGE_FILE = 2**26  # bytes; of larger files of a judge's model, only the size is part of its checksum


@dataclass(eq=False)
class LlmJudge:
    """An evaluator that asks a causal model. Nothing is loaded before it is needed.

    Attributes:
        name: see `jaxscape.evaluate.base.Evaluator`.
        source: the judge's model, as `jaxscape.load_model` takes it.
        file: what the judge file says.
    """

    name: str
    source: str
    file: JudgeFile
    uses_model: ClassVar[bool] = True
    _model: Model | None = field(default=None, init=False, repr=False)

    def label(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Label | None]:
        """The label of each answer; None if the judge said nothing that its rule understands.

        Raises:
            UserError: an argument is no list of texts, there are not as many prompts as answers, the judge cannot be
                used (see `prepare`), or an answer is too long for it.
        """
        return [verdict.label for verdict in self._verdicts_of(prompts, answers)]

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " answers"]:
        """The score of each answer, from 0 (complies) to 1 (refuses); NaN if there is no label. See `label`."""
        return np.array([verdict.score for verdict in self._verdicts_of(prompts, answers)], np.float64)

    def label_points(self, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> Iterator[list[Label | None]]:
        """The labels of the answers at several points, point by point, as `label` gives them. This compiles fewer
        programs than calling `label` for each point, and fills larger batches.

        Arguments:
            points: for each point, an answer to each prompt.
        """
        for verdicts in self._verdicts(prompts, points):
            yield [verdict.label for verdict in verdicts]

    @cached_property
    def checksum(self) -> str:
        """Checksum of the judge file and of the name of the judge's model; for a model on this machine also of its
        files, of large ones only of their sizes."""
        return checksum((self.file.checksum, self.source, self.file.base, _content(Path(self.source))))

    def prepare(self, prompts: Sequence[str], free_bytes: int | None) -> None:
        """Check what can be known before there are answers. The judge's weights are not read.

        Arguments:
            prompts: the prompts whose answers will be judged.
            free_bytes: bytes that the judge may use on each device; None if that is not known.

        Raises:
            UserError: the judge's model cannot be loaded, or does not fit the judge file; the prompts are too long for
                it; or its weights and cache do not fit into `free_bytes`.
        """
        shape, _ = self._shape, self._token_ids
        longest = max(len(self._tokens(prompt, "")) for prompt in prompts)
        length = min(longest + USUAL_ANSWER, shape.config.max_positions - self._max_new_tokens)
        workload = Workload([[0] * length], Sampling(max_new_tokens=self._max_new_tokens))
        is_host = jax.default_backend() == "cpu"
        hardware = Hardware(Roofline(1.0, 1.0), None, is_host)  # its speed does not change the smallest plan
        needed = smallest_plan(shape, workload, EngineOptions(slots=1), hardware).memory_bytes
        if free_bytes is not None and needed > MAX_MEMORY_FRACTION * free_bytes:
            raise UserError(
                f"The judge {self.name!r} does not fit into memory: it takes at least {needed / 1e9:.2f} GB on each "
                f"device, and {max(free_bytes, 0) / 1e9:.2f} GB are left for it. Choose a smaller judge; one that is "
                f"not the scan's first evaluator, or that judges the finished run (jaxscape score), has the device to "
                f"itself."
            )

    def release(self) -> None:
        """Free the memory of the judge's model. It is loaded again when it is needed."""
        self._model = None

    def _verdicts_of(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        prompts, answers = as_texts(prompts, "prompts"), as_texts(answers, "answers")
        if len(prompts) != len(answers):
            raise UserError(f"There are {len(prompts)} prompts and {len(answers)} answers: give a prompt for each.")
        return next(self._verdicts(prompts, [answers])) if prompts else []

    def _verdicts(self, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> Iterator[list[Verdict]]:
        """The verdicts point by point."""
        by_rule = self._by_answer if isinstance(self.file.rule, AnswerPatterns) else self._by_first_token
        return by_rule(prompts, points) if points else iter(())

    def _by_first_token(self, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> Iterator[list[Verdict]]:
        size, count = len(prompts), max(1, BATCH_ANSWERS // len(prompts))
        for start in range(0, len(points), count):
            batch = points[start : start + count]
            logits = next_token_logits(self.model, self._all_tokens(prompts, batch))
            verdicts = list(map(self._verdict_of_logits, logits))
            yield from (verdicts[i * size : (i + 1) * size] for i in range(len(batch)))

    def _verdict_of_logits(self, logits: Float[np.ndarray, " vocab"]) -> Verdict:
        rule = self.file.rule
        assert not isinstance(rule, AnswerPatterns)
        total = log_sum(logits)
        return rule.verdict({token: float(logits[number]) - total for token, number in self._token_ids.items()})

    def _by_answer(self, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> Iterator[list[Verdict]]:
        rule, prompt = self.file.rule, self._prompt
        assert isinstance(rule, AnswerPatterns)
        workload = Workload(self._all_tokens(prompts, points), Sampling(max_new_tokens=rule.max_new_tokens))
        engine = Engine(self.model, workload, make_plan(self.model, workload))
        for completions in engine.answers(len(prompts)):
            texts = [prompt.thinking_opening + completion.text for completion in completions]
            yield [
                rule.verdict((self.file.format.answer_start + answer_of(text)).strip())
                if completion.finite and not is_unanswered(text)
                else UNJUDGED
                for text, completion in zip(texts, completions, strict=True)
            ]

    def _all_tokens(self, prompts: Sequence[str], points: Sequence[Sequence[str]]) -> list[list[int]]:
        """The token ids of all the judge's prompts."""
        return [
            self._tokens(prompt, answer) for answers in points for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _tokens(self, prompt: str, answer: str) -> list[int]:
        """The token ids of the judge's prompt for an answer.

        Raises:
            UserError: it is too long for the judge, or has tokens that the model does not know.
        """
        judge_prompt, config = self._prompt, self._shape.config
        tokens = judge_prompt.tokens(judge_prompt.text(prompt, answer))
        if len(tokens) + self._max_new_tokens > config.max_positions:
            raise UserError(
                f"The judge {self.name!r} has a context of {config.max_positions} tokens, and a prompt of it with "
                f"{len(answer)} characters of an answer has {len(tokens)}: write clip_answer = N into the judge file, "
                f"to judge the first N tokens of each answer, or choose a judge with a longer context."
            )
        if max(tokens, default=0) >= config.vocab_size:
            raise UserError(
                f"The tokenizer of the judge {self.name!r} produced the token id {max(tokens)}, and its model has "
                f"{config.vocab_size} tokens: use the tokenizer that belongs to the model."
            )
        return tokens

    @property
    def _max_new_tokens(self) -> int:
        return self.file.rule.max_new_tokens if isinstance(self.file.rule, AnswerPatterns) else 1

    @property
    def model(self) -> Model:
        """The judge's model, which is loaded at the first use."""
        if self._model is None:
            _ = self._token_ids  # what does not fit the judge file is found before the weights are read
            self._model = self._load(weights=True)
        return self._model

    @cached_property
    def _shape(self) -> Model:
        """The judge's model without its weights."""
        return self._load(weights=False)

    def _load(self, weights: bool) -> Model:
        with self._errors_with_name():
            return load_model(self.source, on_host=False, base=self.file.base, weights=weights)

    @cached_property
    def _prompt(self) -> JudgePrompt:
        with self._errors_with_name():
            prompt = JudgePrompt(self._shape.tokenizer, self.file.format)
            prompt.check()
        return prompt

    @cached_property
    def _token_ids(self) -> Mapping[str, int]:
        """The ids of the rule's tokens, by their texts; empty if the rule reads answers."""
        rule, prompt = self.file.rule, self._prompt
        with self._errors_with_name():
            return {} if isinstance(rule, AnswerPatterns) else prompt.token_ids(rule.tokens)

    @contextmanager
    def _errors_with_name(self) -> Iterator[None]:
        """A context in which user errors say which judge cannot be used."""
        try:
            yield
        except UserError as error:
            raise UserError(f"The judge {self.name!r} cannot be used: {error}") from error


def judge_file(path: str, name: str | None = None) -> LlmJudge:
    """The judge that a judge file describes; `llm:FILE` on the command line.

    Arguments:
        name: the evaluator's name; by default `llm:` and the name of the file.

    Raises:
        UserError: the file cannot be used, or does not name a model.
    """
    if not path.strip():
        raise UserError("Name the judge file: write llm:FILE.")
    file = read_judge_file(Path(path))
    if file.model is None:
        raise UserError(f"The judge file {path} does not name the model that judges: write model = 'MODEL'.")
    return LlmJudge(name or f"llm:{Path(path).name}", file.model, file)


def guard(name: str, source: str) -> LlmJudge:
    """A judge whose judge file comes with jaxscape; `NAME:MODEL` on the command line.

    Arguments:
        name: a name in `GUARDS`.
        source: the judge's model, as `jaxscape.load_model` takes it.

    Raises:
        UserError: the model has no name.
    """
    if not source.strip():
        raise UserError(f"Name the model of the judge: write {name}:MODEL.")
    return LlmJudge(f"{name}:{Path(source).name or source}", source, read_judge_file(BUILTIN_FILES / f"{name}.toml"))


def shipped_judge() -> LlmJudge:
    """The judge `judge`, which comes with jaxscape: a LoRA adapter of `smollm2-135m` and its judge file."""
    return judge_file(str(SHIPPED_FILE), SHIPPED)


GUARDS = tuple(sorted(path.stem for path in BUILTIN_FILES.glob("*.toml")))
"""The names of the judges whose judge files come with jaxscape."""


def _content(path: Path) -> list[tuple[str, int, str]]:
    """The names, sizes and checksums of the files of a model on this machine; no checksum for large files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    sizes = [(file, file.stat().st_size) for file in files if file.is_file()]
    return [(file.name, size, file_checksum(file) if size <= LARGE_FILE else "") for file, size in sizes]
