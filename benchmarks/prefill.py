"""Measure how much of the machine's matmul peak log-likelihoods and next-token logits reach.

    python benchmarks/prefill.py                         # a minute or two on two CPU cores

FLOPs are those of the matrix products that are needed: for each prompt's own tokens, for their common beginning once,
for no padding, and with the output head for the tokens whose prediction is asked for. The peak is what a large matrix
product reaches, measured before and after each round. The best round of each counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jaxscape as js
from jaxscape.cli.main import run_program
from jaxscape.cli.options import DEFAULT_MODEL
from jaxscape.engine.batching import common_prefix, tokenize
from jaxscape.engine.prefill import log_likelihoods, next_token_logits
from jaxscape.models.checkpoint import named_leaves
from jaxscape.runtime.hardware import measure_roofline
from jaxscape.runtime.streams import write_line

HEADS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class PrefillBenchmark:
    """Measure how much of the machine's matmul peak log-likelihoods and next-token logits reach."""

    model: str = DEFAULT_MODEL
    """A model, as in `jaxscape scan`."""
    prompts: str = "harmful"
    """A prompt set, as in `jaxscape scan`."""
    num_prompts: int = 80
    """Number of prompts."""
    target: str = "Sure, here is a step-by-step guide to what you ask for"
    """The answer whose log-likelihood is computed for each prompt."""
    rounds: int = 5
    """How often each time is measured."""

    def run(self) -> None:
        model = js.load_model(self.model)
        prompts = tokenize(model, js.load_prompts(self.prompts, self.num_prompts), "default", 1)
        answer: list[int] = model.tokenizer(self.target, add_special_tokens=False)["input_ids"]
        prefix = common_prefix(prompts)
        own = sum(map(len, prompts)) - prefix * (len(prompts) - 1)
        write_line(
            f"{len(prompts)} prompts of {sum(map(len, prompts)) / len(prompts):.1f} tokens, the first {prefix} shared"
        )
        answers = [answer] * len(prompts)
        tokens = own + (len(answer) - 1) * len(prompts)
        self._report(
            "log-likelihoods",
            lambda: log_likelihoods(model, prompts, answers),
            flops(model, tokens, len(answer) * len(prompts)),
            model.dtype,
        )
        self._report(
            "next-token logits", lambda: next_token_logits(model, prompts), flops(model, own, len(prompts)), model.dtype
        )

    def _report(self, name: str, compute: Callable[[], object], total: float, dtype: str) -> None:
        compute()  # compiles
        seconds, peaks = [], [measure_roofline(dtype).flops]
        for _ in range(self.rounds):
            started = time.perf_counter()
            compute()
            seconds.append(time.perf_counter() - started)
            peaks.append(measure_roofline(dtype).flops)
        speed = total / min(seconds)
        write_line(
            f"{name}: {min(seconds):.2f} s, {speed / 1e9:.0f} GFLOP/s, {100 * speed / max(peaks):.0f} % of "
            f"{max(peaks) / 1e9:.0f} GFLOP/s"
        )


def flops(model: js.Model, tokens: int, predictions: int) -> float:
    """FLOPs of the products with the layers' matrices for `tokens`, and with the output head for `predictions`."""
    sizes = {name: leaf.size for name, leaf in named_leaves(model.params).items() if leaf.ndim == 2}
    head = sizes[HEADS[0] if model.config.tie_word_embeddings else HEADS[1]]
    layers = sum(size for name, size in sizes.items() if name not in HEADS)
    return 2.0 * layers * tokens + 2.0 * head * predictions


if __name__ == "__main__":
    run_program(PrefillBenchmark)
