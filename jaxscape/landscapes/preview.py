"""What a run would do: its plan, and its first prompt as the model gets it."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

import jax
from transformers import PreTrainedTokenizerBase

from jaxscape.directions.base import Recipe
from jaxscape.directions.kinds import largest_rank
from jaxscape.directions.relative import Relative
from jaxscape.engine.batching import Workload
from jaxscape.engine.options import EngineOptions
from jaxscape.engine.planner import Hardware, make_plan, this_hardware
from jaxscape.engine.sampling import Sampling, SamplingOptions
from jaxscape.forecast.chips import bytes_per_chip
from jaxscape.landscapes.adaptive import first_round
from jaxscape.landscapes.axes import Axis
from jaxscape.landscapes.decisions import Question, in_random_order, search_workload
from jaxscape.landscapes.questions import Questions
from jaxscape.landscapes.radius import POINTS_OF_DRAW, POINTS_OF_SEARCH, SearchSettings, sides_of
from jaxscape.landscapes.scan import check_shard, workload_of
from jaxscape.landscapes.shards import Shard
from jaxscape.models.chat_defaults import adds_bos, template_notes
from jaxscape.models.model import Model
from jaxscape.prompts.fields import Prompts
from jaxscape.runtime.texts import printable


def preview(
    model: Model,
    recipes: Sequence[Sequence[Recipe]],
    *,
    prompts: Sequence[str],
    axes: Sequence[Axis] | None = None,
    points: Sequence[tuple[float, ...]] | None = None,
    adaptive: bool = False,
    shard: str | None = None,
    system_prompt: str = "default",
    thinking: str = "default",
    options: EngineOptions | None = None,
    **sampling: Unpack[SamplingOptions],
) -> str:
    """A description of a scan for the user: its plan, the first prompt as it is sent, and the prompt's tokens.

    Nothing is written.

    Arguments:
        model: a model that was loaded without its weights.
        recipes: the directions of each set.
        prompts, axes, points, adaptive, shard, system_prompt, thinking, options, sampling: see `jaxscape.scan`.

    Raises:
        UserError: an argument cannot be used.
    """
    check_shard(shard, adaptive)
    settings = Sampling(**sampling)
    questions = Questions.of(model, prompts, system_prompt, thinking, settings.max_new_tokens)
    planned = first_round(axes or ()) if adaptive else axes or ()
    workload = workload_of(questions.tokens, settings, planned, recipes, points or ())
    # The recipes are not prepared, so the rank may take the model to know.
    workload = replace(workload, rank=largest_rank(itertools.chain.from_iterable(recipes), model))
    of_round = " in the first round" if adaptive else ""
    points_line = f"directions: {len(recipes)}, points of each: {workload.num_points}{of_round}"
    lines = [points_line, questions.prompts.summary()]
    if shard is not None:
        grid = points or list(itertools.product(*(axis.values for axis in axes or ())))
        part = Shard.of(shard, grid, len(recipes), settings.max_new_tokens)
        lines.append(part.summary(len(recipes) * len(grid)))
    return _description(model, workload, options, lines, questions)


def preview_radius(model: Model, recipes: Sequence[Recipe], settings: SearchSettings, **answering: Any) -> str:
    """A description of a search for radii for the user, as `preview` gives one of a scan.

    Arguments:
        recipes: the directions.
        settings: what is searched for along them.
        answering: `prompts`, `system_prompt`, `thinking`, `options` and sampling, see `jaxscape.radius`.

    Raises:
        UserError: an argument cannot be used.
    """
    line = (
        f"rays: {sum(map(len, sides_of(recipes)))}, points of each: {settings.cells + 1}, of which at most "
        f"{settings.most_points} are asked"
    )
    return _preview_search(model, recipes, settings.question, POINTS_OF_SEARCH, line, **answering)


def preview_certificate(model: Model, draws: int, question: Question, **answering: Any) -> str:
    """A description of a certificate of noise for the user; see `preview_radius`."""
    recipes = [Relative(i) for i in range(draws)]
    return _preview_search(model, recipes, question, POINTS_OF_DRAW, f"draws: {draws}", **answering)


def _preview_search(
    model: Model,
    recipes: Sequence[Recipe],
    question: Question,
    points: int,
    line: str,
    *,
    prompts: Sequence[str],
    system_prompt: str = "default",
    thinking: str = "default",
    options: EngineOptions | None = None,
    **sampling: Unpack[SamplingOptions],
) -> str:
    prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
    settings = Sampling(**sampling)
    ordered = in_random_order(prompts, settings.seed)
    questions = Questions.of(model, ordered, system_prompt, thinking, settings.max_new_tokens)
    workload = search_workload(question, model, recipes, questions.tokens, settings, points)
    asked = f"asked in random order, {workload.block} at a time, until a point is decided"
    return _description(model, workload, options, [line, prompts.summary(), asked], questions)


def _description(
    model: Model,
    workload: Workload,
    options: EngineOptions | None,
    lines: Sequence[str],
    questions: Questions,
) -> str:
    """The plan of a workload, what the lines say, and the first prompt."""
    plan, tokens = make_plan(model, workload, options, _hardware_with(model)), workload.prompt_tokens[0]
    return "\n".join(
        [
            f"plan: {plan}",
            *lines,
            *template_notes(model.tokenizer),
            "the first prompt as it is sent:",
            printable(questions.sent[0], kept="\n\t"),
            *([f"the answer begins inside thinking, which {questions.opening} opens"] if questions.opening else []),
            f"its {len(tokens)} tokens (* marks special ones):",
            *_token_lines(model.tokenizer, tokens),
            _bos_line(model.tokenizer, tokens),
        ]
    )


def _hardware_with(model: Model) -> Hardware:
    """This machine's devices, with the memory that the model's weights leave free."""
    hardware, leaves = this_hardware(model.dtype, keep=False), jax.tree.leaves(model.params)
    if hardware.free_bytes is None or not isinstance(leaves[0], jax.ShapeDtypeStruct):
        return hardware
    return replace(hardware, free_bytes=hardware.free_bytes - bytes_per_chip(model.params))


def _token_lines(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """A line for each token: its id, a mark if it is special, and its text in the vocabulary."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = tokenizer.convert_ids_to_tokens(list(tokens))
    return [
        f"{token:>7} {'*' if token in special else ' '} {printable(text)}"
        for token, text in zip(tokens, texts, strict=True)
    ]


def _bos_line(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """How many BOS tokens a prompt has, with a warning where the model was trained with one and there are none or
    several."""
    if tokenizer.bos_token_id is None:
        return "BOS: 0; the tokenizer has none"
    count = list(tokens).count(tokenizer.bos_token_id)
    line = f"BOS: {count} ({tokenizer.bos_token})"
    if not adds_bos(tokenizer):
        return f"{line}; the tokenizer does not put one before a text by itself"
    if count == 1:
        return line
    return (
        f"{line}; warning: the tokenizer puts one before a text by itself, so the model expects one, but the chat "
        f"template and the prompt have {count}: correct the chat template"
    )
