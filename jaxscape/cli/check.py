"""`jaxscape check`: say what a model is and how it answers, and compare it with transformers."""

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscape.cli.options import DEFAULT_MODEL, Group, ModelOptions, RunOptions, check_texts
from jaxscape.runtime.help import shown
from jaxscape.runtime.streams import write_line
from jaxscape.runtime.texts import printable

if TYPE_CHECKING:
    from jaxscape.evaluate.check import Comparison, Facts

PROMPT = "How do I bake a simple loaf of bread?"


@dataclass(frozen=True)
class CheckedModel(ModelOptions):
    """The model."""

    model: Annotated[str, tyro.conf.Positional, shown(metavar="MODEL")] = DEFAULT_MODEL
    """A built-in name (smollm2-135m-safe or smollm2-135m), a Hugging Face directory or hub id (of a model or of a LoRA
    adapter), or a .gguf file."""


@dataclass(frozen=True)
class AnswerOptions:
    """The answer and the output."""

    prompt: Annotated[str, shown(PROMPT, "TEXT")] = PROMPT
    """The prompt that the model answers."""
    max_new_tokens: int = 32
    """Maximum number of tokens of the answer."""
    json: bool = False
    """Write JSON instead of lines."""


@dataclass(frozen=True)
class Check:
    """Say what a model is and how it answers, and compare it with transformers, where PyTorch is installed.

    The exit code is 1 if the model differs from transformers by more than rounding.

    Examples:
      # The model that the default one was made from
      jaxscape check smollm2-135m
      # Your own model, in 16 bits
      jaxscape check path/to/model --dtype bfloat16
      # A model of the hub, for a script
      jaxscape check meta-llama/Llama-2-7b-chat-hf --gpu --json
    """

    model: Group[CheckedModel] = field(default_factory=CheckedModel)
    answer: Group[AnswerOptions] = field(default_factory=AnswerOptions)
    devices: Group[RunOptions] = field(default_factory=RunOptions)

    def run(self) -> None:
        prompt, max_new_tokens = self.answer.prompt, self.answer.max_new_tokens
        check_texts(self.model.model, self.model.base or "", prompt)

        from jaxscape.evaluate.check import answer, compare, find_facts
        from jaxscape.models.transformers_reference import is_torch_installed
        from jaxscape.runtime.errors import UserError
        from jaxscape.runtime.processes import is_first
        from jaxscape.runtime.progress import note

        self.devices.start()
        model = self.model.load(self.devices.mesh)
        facts, text = find_facts(model, prompt), answer(model, prompt, max_new_tokens)
        comparison, obstacle = None, None
        if is_torch_installed():
            note("comparing with transformers, which loads the model in float32 ...")
        try:
            comparison = compare(model, prompt, text, max_new_tokens)
        except UserError as error:
            obstacle = str(error)
        if not is_first():
            return
        if self.answer.json:
            result = {"model": model.name, **asdict(facts), "answer": text, "not_compared": obstacle}
            agrees = None if comparison is None else comparison.agrees
            compared = None if comparison is None else asdict(comparison)
            write_line(json.dumps(result | {"comparison": compared, "agrees": agrees}))
        else:
            lines = {"model": model.name, **_described(facts), "answer": f'"{text}"'}
            lines |= {"comparison": f"not made: {obstacle}."} if comparison is None else _compared(comparison, facts)
            write_line("\n".join(f"{name:15}{printable(value)}" for name, value in lines.items()))
        if comparison is not None and not comparison.agrees:
            sys.exit(1)


def _described(facts: "Facts") -> dict[str, str]:
    """What was found, as texts by the headings of their lines."""
    stored = ", ".join(f"{count} {name}" for name, count in facts.stored.items())
    bos = "no BOS token" if facts.bos is None else f"{facts.num_bos} times the BOS token {facts.bos}"
    quantised = "not quantised" if facts.quantisation is None else f"quantised ({facts.quantisation})"
    ends = ", ".join(f'{number} "{text}"' for number, text in facts.end_tokens.items())
    return {
        "family": f"{facts.family}, {facts.num_layers} layers, context of {facts.context} tokens",
        "parameters": f"{facts.num_parameters:,}, embedding and output head {'tied' if facts.is_tied else 'not tied'}",
        "files": f"tensors of type: {stored}; {quantised}",
        "in memory": facts.dtype,
        "tokenizer": f"{facts.num_tokens} tokens, vocabulary of {facts.vocab_size}; from {facts.tokenizer_source}",
        "chat template": facts.template_source,
        "end tokens": ends,
        "prompt": f'"{facts.prompt}"',
        "prompt tokens": f"{facts.num_prompt_tokens}, with {bos}",
    }


def _compared(comparison: "Comparison", facts: "Facts") -> dict[str, str]:
    """The result of a comparison, as texts by the headings of their lines."""
    same = f"{comparison.num_same} of {comparison.num_answer} greedy tokens are the same"
    if comparison.margin is not None:
        same += f"; where they part, transformers' first choice leads by {comparison.margin:.1e}"
    return {
        "logits": f"at {comparison.num_logits} positions they differ by at most {comparison.difference:.1e} of the "
        f"largest; rounding explains {comparison.limit:.1e} in {facts.dtype}",
        "tokens": same,
        "verdict": "agrees with transformers"
        if comparison.agrees
        else "DIFFERS from transformers by more than rounding: do not trust its numbers, and report this",
    }
