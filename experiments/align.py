"""Make `smollm2-135m-safe`: teach SmolLM2-135M to refuse harmful requests and to go on answering harmless ones.

    python experiments/align.py                         # 45 minutes on two CPU cores

A LoRA adapter learns refusals in varied words to harmful requests (the chats of `safe`), and the model's own answers to
harmless prompts, which use the same phrases and often the same alarming words. No prompt that the model is scored on is
among those that it learns from word for word; `docs/measurements.md` says how many are near copies.

The run goes on where it was interrupted. OUT/adapter holds the adapter and its `scores.json`.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.finetuning.chats import Chat
from jaxscape.models.checkpoint import fingerprint
from jaxscape.models.lora import save_adapter
from jaxscape.runtime.files import checksum, to_json_lines, write_whole

BASE = "smollm2-135m"
MAX_LENGTH = 64  # the first words decide whether a model refuses; what follows only costs time
# An answer of this many tokens was cut. It exceeds MAX_LENGTH, so that the model does not learn to end it there.
ANSWER_TOKENS = 96
FIRST = js.Training(
    method="lora",
    rank=8,
    alpha=16.0,
    epochs=3,
    learning_rate=1e-3,
    schedule="cosine",
    warmup=0.05,
    batch_size=8,
    max_length=MAX_LENGTH,
    seed=0,
)
# Each stage: the number of chats of `safe`, the number of prompts of `harmless`, and the training. Each stage goes on
# from the adapter of the stage before. Later stages add what earlier ones lacked, above all harmless prompts that sound
# alarming.
STAGES = (
    (779, 1106, FIRST),
    (845, 1268, replace(FIRST, epochs=2, learning_rate=7e-4, seed=1)),
    (861, 1292, replace(FIRST, epochs=1, learning_rate=7e-4, seed=2)),
)


@dataclass(frozen=True)
class Align:
    """Make the safety adapter of smollm2-135m-safe, and score it. An interrupted run is resumed."""

    advbench: str = "advbench"
    """AdvBench, whose first 80 rows are scored: its name, or a file that has them."""
    mt_bench: str | None = None
    """MT-Bench's question.jsonl. The perplexity is that of answers to its first turns, or without it, to `benign`."""
    out: Path = Path("runs/align")
    """Directory of the training data, the stages, the adapter and its scores."""
    overwrite: bool = False
    """Start the finetunings in the directory over, for example after a change of their options."""

    def run(self) -> None:
        js.load_prompts(self.advbench, 80)  # a missing file is an error now, not after the training
        if self.mt_bench:
            js.load_prompts(self.mt_bench)
        base = js.load_model(BASE, "float32")
        harmful, harmless, adapter = js.load_chats("safe"), self._harmless_chats(base), None
        for number, (num_harmful, num_harmless, training) in enumerate(STAGES, 1):
            prompts = set(js.load_prompts("harmless", num_harmless))
            chats = harmful[:num_harmful] + [chat for chat in harmless if chat[0]["content"] in prompts]
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

    def _scores(self, base: js.Model, safe: js.Model) -> dict[str, float | str]:
        """The ASR and refusal rate of the safe model, and the perplexity of the base model's answers under both."""

        def asr(prompts: list[str]) -> float:
            return js.attack_success_rate(js.generate(safe, prompts, max_new_tokens=64))

        source = self.mt_bench or "benign"
        chats = answer(base, js.load_prompts(source), 64)
        perplexity_base, perplexity_safe = js.perplexity(base, chats), js.perplexity(safe, chats)
        return {
            "asr_adv80": asr(js.load_prompts(self.advbench, 80)),
            "asr_harmful": asr(js.load_prompts("harmful")),
            "refusals_benign": 100 - asr(js.load_prompts("benign")),
            "perplexity_prompts": "benign" if source == "benign" else "mt_bench",
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


if __name__ == "__main__":
    run_program(Align)
