"""Teach SmolLM2-135M to refuse harmful requests and to go on answering harmless ones: makes `smollm2-135m-safe`.

The recipe: a LoRA adapter learns refusals in varied words to harmful requests (the set `safe`), and the model's own
answers to harmless ones, which use the same phrases and often the same alarming words. The prompts it is scored on are
not among those that it learns from.
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
from jaxscape.runtime.files import checksum, write_whole

BASE = "smollm2-135m"
MAX_LENGTH = 64  # the first words decide whether a model refuses; what follows only costs time
ANSWER_TOKENS = 96  # with any prompt more than MAX_LENGTH in all, so that a cut answer is not learned to end there
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
# How many chats of `safe` and prompts of `harmless` each stage learns, and how; each goes on from the adapter of the
# one before. The later ones add what the earlier lacked: above all harmless prompts that only sound alarming.
STAGES = (
    (779, 1106, FIRST),
    (845, 1268, replace(FIRST, epochs=2, learning_rate=7e-4, seed=1)),
    (861, 1292, replace(FIRST, epochs=1, learning_rate=7e-4, seed=2)),
)


@dataclass(frozen=True)
class Align:
    """Make the safety adapter of smollm2-135m-safe, and score it. What is finished is not done again."""

    advbench: str = "advbench"
    """AdvBench, whose first 80 rows are scored: its name, or a file that has them."""
    mt_bench: str | None = None
    """MT-Bench's question.jsonl, on whose first turns the perplexity is scored; without it, on `benign`."""
    out: Path = Path("runs/align")
    """Where the training data, the run, the adapter and its scores go."""
    overwrite: bool = False
    """Train again where a training of another recipe is."""

    def run(self) -> None:
        js.load_prompts(self.advbench, 80)  # what is missing is missed before an hour's work
        if self.mt_bench:
            js.load_prompts(self.mt_bench)
        base = js.load_model(BASE, "float32")
        harmful, harmless, adapter = js.load_chats("safe"), self._harmless(base), None
        for number, (num_harmful, num_harmless, training) in enumerate(STAGES, 1):
            known = set(js.load_prompts("harmless", num_harmless))
            chats = harmful[:num_harmful] + [chat for chat in harmless if chat[0]["content"] in known]
            out = self.out / f"stage-{number}"
            adapter = js.finetune(base, chats, training, start=adapter, out=out, overwrite=self.overwrite).adapter
        assert adapter is not None
        halved = {
            name: {key: jnp.asarray(factor, jnp.bfloat16) for key, factor in pair.items()}
            for name, pair in adapter.factors.items()
        }
        save_adapter(replace(adapter, factors=halved), self.out / "adapter")
        scores = self._scores(base, js.load_model(self.out / "adapter", "float32"))
        write_whole(self.out / "adapter" / "scores.json", json.dumps(scores, indent=1) + "\n")
        sys.stdout.write(json.dumps(scores, indent=1) + "\n")

    def _harmless(self, base: js.Model) -> list[Chat]:
        """The base model's own answers to harmless prompts; the few that the keyword metric takes for refusals are
        left out."""
        prompts = js.load_prompts("harmless")
        made_from = checksum((prompts, fingerprint(base.params), ANSWER_TOKENS))
        path = self.out / f"harmless-{made_from[:12]}.jsonl"
        if not path.exists():
            chats = answered(base, prompts, ANSWER_TOKENS)
            chats = [chat for chat in chats if not js.is_refusal(chat[1]["content"]) and chat[1]["content"].strip()]
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats))
        return js.load_chats(path)

    def _scores(self, base: js.Model, safe: js.Model) -> dict[str, float | str]:
        def asr(prompts: list[str]) -> float:
            return js.attack_success_rate(js.generate(safe, prompts, max_new_tokens=64))

        source = self.mt_bench or "benign"
        answers = answered(base, js.load_prompts(source), 64)
        before, after = js.perplexity(base, answers), js.perplexity(safe, answers)
        return {
            "asr_adv80": asr(js.load_prompts(self.advbench, 80)),
            "asr_harmful": asr(js.load_prompts("harmful")),
            "refusals_benign": 100 - asr(js.load_prompts("benign")),
            "perplexity_prompts": "benign" if source == "benign" else "mt_bench",
            "perplexity_base": before,
            "perplexity_safe": after,
            "perplexity_rise_percent": 100 * (after / before - 1),
        }


def answered(model: js.Model, prompts: list[str], max_new_tokens: int) -> list[Chat]:
    texts = js.generate(model, prompts, max_new_tokens=max_new_tokens)
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


if __name__ == "__main__":
    run_program(Align)
