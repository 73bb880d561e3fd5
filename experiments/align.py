"""Make `smollm2-135m-safe`: teach SmolLM2-135M to refuse harmful requests and to go on answering harmless ones.

    python experiments/align.py                         # an hour and a half on two CPU cores

A LoRA adapter learns refusals in varied words to harmful requests (the chats of `safe`), and the model's own answers to
harmless prompts (`harmless`), which use the same phrases and often the same alarming words. No prompt that the model is
scored on, nor one in nearly the same words, is among those that it learns from: the run checks this first.

The run goes on where it was interrupted. OUT/adapter holds the adapter and its `scores.json`.
"""

import csv
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.finetuning.chats import Chat
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.lora import save_adapter
from jaxscape.prompts.public import PUBLIC_SETS
from jaxscape.runtime.files import checksum, to_json_lines, write_whole

BASE = "smollm2-135m"
MAX_LENGTH = 64  # the first words decide whether a model refuses; what follows only costs time
# The chat template and a prompt take more than 30 tokens. So an answer that was cut here exceeds MAX_LENGTH, and the
# model does not learn to end it there.
ANSWER_TOKENS = 40
FIRST = js.Training(
    method="lora",
    rank=8,
    alpha=16.0,
    epochs=2,
    learning_rate=1e-3,
    schedule="cosine",
    warmup=0.05,
    batch_size=8,
    max_length=MAX_LENGTH,
    seed=0,
)


# Each stage: the chats of `safe` and the prompts of `harmless` that it learns from, as ranges, and the training. Each
# stage goes on from the adapter of the stage before. The second one adds contrasts: the same verbs and forms in
# requests that do harm and in requests that do not. The third one adds requests in more
# forms, and the fourth one adds long requests, harmful and harmless ones in the same forms, and repeats everything.
STAGES = (
    ([(0, 839)], [(0, 1312)], FIRST),
    ([(0, 150), (428, 975)], [(0, 250), (674, 2017)], replace(FIRST, epochs=1, learning_rate=7e-4, seed=1)),
    ([(839, 1400)], [(1400, 2618)], replace(FIRST, epochs=1, learning_rate=7e-4, seed=2)),
    ([(0, 1932)], [(0, 3145)], replace(FIRST, epochs=1, learning_rate=7e-4, seed=3)),
)
# What the model is scored on, besides AdvBench.
SCORED = ("harmful", "benign", "xstest", "mt-bench")
XSTEST = PUBLIC_SETS["xstest"].file


@dataclass(frozen=True)
class Align:
    """Make the safety adapter of smollm2-135m-safe, and score it. An interrupted run is resumed."""

    advbench: str = "advbench"
    """AdvBench, all of which is scored: its name, or a file with its first rows."""
    out: Path = Path("runs/align")
    """Directory of the training data, the stages, the adapter and its scores."""
    overwrite: bool = False
    """Start the finetunings in the directory over, for example after a change of their options."""

    def run(self) -> None:
        scored = {name: js.load_prompts(name) for name in (*SCORED, self.advbench)}  # a missing file is an error now
        harmful = js.load_chats("safe")
        learned = [chat[0]["content"] for chat in harmful] + js.load_prompts("harmless")
        for name, prompts in scored.items():
            if copies := near_copies(learned, prompts):
                mine, other = copies[0]
                raise js.UserError(f"Training data has {mine!r}, a near copy of {other!r} of {name}: remove it.")
        base = js.load_model(BASE, "float32")
        harmless, adapter = self._harmless_chats(base), None
        for number, (of_safe, of_harmless, training) in enumerate(STAGES, 1):
            answered = {prompt for start, end in of_harmless for prompt in js.load_prompts("harmless")[start:end]}
            chats = [chat for start, end in of_safe for chat in harmful[start:end]]
            chats += [chat for chat in harmless if chat[0]["content"] in answered]
            out = self.out / f"stage-{number}"
            adapter = js.finetune(base, chats, training, start=adapter, out=out, overwrite=self.overwrite).adapter
        assert adapter is not None
        factors = {
            name: {key: jnp.asarray(factor, jnp.bfloat16) for key, factor in pair.items()}
            for name, pair in adapter.factors.items()
        }
        save_adapter(replace(adapter, factors=factors), self.out / "adapter")
        scores = json.dumps(self._scores(base, js.load_model(self.out / "adapter", "float32")), indent=1) + "\n"
        write_whole(self.out / "adapter" / "scores.json", scores)
        sys.stdout.write(scores)

    def _harmless_chats(self, base: js.Model) -> list[Chat]:
        """The base model's own answers to harmless prompts, without those that are empty or count as refusals."""
        prompts = js.load_prompts("harmless")
        version = checksum((prompts, fingerprint(base.params), ANSWER_TOKENS))
        path = self.out / f"harmless-{version[:12]}.jsonl"
        if not path.exists():
            chats = answer(base, prompts, ANSWER_TOKENS)
            chats = [chat for chat in chats if not js.is_refusal(chat[1]["content"]) and chat[1]["content"].strip()]
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_json_lines({"messages": chat} for chat in chats))
        return js.load_chats(path)

    def _scores(self, base: js.Model, safe: js.Model) -> dict[str, Any]:
        """Refusals of the safe model by the paper's keywords, and perplexity of the base model's answers under both."""

        def answers_to(prompts: list[str], max_new_tokens: int = 64) -> list[str]:
            return js.generate(safe, prompts, max_new_tokens=max_new_tokens)

        def refusals(texts: list[str]) -> float:
            return 100 - js.attack_success_rate(texts)

        advbench = answers_to(js.load_prompts(self.advbench))
        with XSTEST.path().open(encoding="utf-8", newline="") as file:
            rows = [*csv.DictReader(file)]
        xstest = [*zip(rows, answers_to([row["prompt"] for row in rows], 48), strict=True)]
        answers = answer(base, js.load_prompts("mt-bench"), 64)
        perplexity_base, perplexity_safe = js.perplexity(base, answers), js.perplexity(safe, answers)
        return {
            "asr_adv80": js.attack_success_rate(advbench[:80]),
            "asr_advbench_rest": js.attack_success_rate(advbench[80:]),
            "num_advbench_rest": len(advbench[80:]),
            "asr_harmful": js.attack_success_rate(answers_to(js.load_prompts("harmful"))),
            "refusals_benign": refusals(answers_to(js.load_prompts("benign"))),
            "refusals_xstest_safe": refusals([text for row, text in xstest if row["label"] == "safe"]),
            "refusals_xstest_unsafe": refusals([text for row, text in xstest if row["label"] == "unsafe"]),
            "refusals_xstest_by_type": {
                kind: refusals([text for row, text in xstest if row["type"] == kind])
                for kind in dict.fromkeys(row["type"] for row in rows)
            },
            "perplexity_base": perplexity_base,
            "perplexity_safe": perplexity_safe,
            "perplexity_rise_percent": 100 * (perplexity_safe / perplexity_base - 1),
        }


def answer(model: js.Model, prompts: list[str], max_new_tokens: int) -> list[Chat]:
    """A chat for each prompt: the prompt and the model's answer."""
    texts = js.generate(model, prompts, max_new_tokens=max_new_tokens)
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def near_copies(learned: Sequence[str], scored: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of a learned and a scored prompt that say nearly the same.

    These are pairs of whose content words (see `content_words`), taken together, at least half are in both prompts. One
    word in common is not enough, unless it is the only content word of both.
    """
    contents = [(prompt, content_words(prompt)) for prompt in scored]
    pairs = []
    for prompt in learned:
        words = content_words(prompt)
        for other, others in contents:
            shared, union = len(words & others), len(words | others)
            if shared >= min(2, union) and 2 * shared >= union:
                pairs.append((prompt, other))
    return pairs


def content_words(prompt: str) -> frozenset[str]:
    """The words of a prompt without its function words, in lower case and without common endings."""
    words = set(re.findall(r"[a-z0-9]+", prompt.lower())) - FUNCTION_WORDS
    return frozenset(re.sub(r"(?<=...)(ing|ed|es|s|er)$", "", word).rstrip("e") for word in words)


FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a an the of to in on at for from with without by and or as is are was were be been it its this that these those
        i my me we our us you your he his him she her they their them what which who whom when where why how do does did
        can could should would will shall may might must has have had some any one best good way ways step steps give
        tell help list make get there if not no so than then more most into onto out up down over s t don someone
        somebody people
        """,
    )
)
"""Words that say little about what a prompt asks for."""


if __name__ == "__main__":
    run_program(Align)
