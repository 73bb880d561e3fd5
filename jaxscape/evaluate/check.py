"""What a loaded model is, how it answers, and whether it computes what transformers computes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxscape.engine.batching import tokenize
from jaxscape.engine.engine import generate
from jaxscape.models.checkpoint import named_leaves
from jaxscape.models.gguf import is_gguf, stored_types
from jaxscape.models.model import Model
from jaxscape.models.quantised import FLOAT_DTYPES
from jaxscape.models.transformers_reference import Reference, is_torch_installed
from jaxscape.models.weights import stored_dtypes
from jaxscape.prompts.chat_format import chat_text
from jaxscape.prompts.sets import load_prompts
from jaxscape.runtime.errors import UserError

# The largest difference between logits that the order of sums explains, as a fraction of the largest logit: in float32
# all families stay below 7e-6 (see docs/measurements.md), so this leaves room for deeper models. In 16 bits,
# transformers' own rounding on the same texts, of which jaxscape's may be a multiple.
FLOAT32_LIMIT, ROUNDING_LIMIT = 1e-4, 2.0
LONG_TEXT = 512  # tokens, longer than many windows


@dataclass(frozen=True)
class Facts:
    """What was found in a model's files.

    Attributes:
        family: transformers' `model_type`.
        stored: number of tensors of each dtype in the files.
        dtype: dtype of the weights in memory.
        quantisation: what the weights were dequantised from; None if they are stored as floats.
        is_tied: whether the output head is the embedding table.
        num_tokens: number of tokens that the tokenizer knows.
        tokenizer_source, template_source: where the tokenizer and the chat template come from.
        end_tokens: text of each end token, by its id.
        prompt: a prompt as it is sent.
        num_prompt_tokens: number of its tokens.
        bos: the BOS token; None if the tokenizer has none.
        num_bos: how many tokens of the prompt are the BOS token.
    """

    family: str
    num_layers: int
    context: int
    num_parameters: int
    stored: dict[str, int]
    dtype: str
    quantisation: str | None
    is_tied: bool
    tokenizer_source: str
    num_tokens: int
    vocab_size: int
    template_source: str
    end_tokens: dict[int, str]
    prompt: str
    num_prompt_tokens: int
    bos: str | None
    num_bos: int


@dataclass(frozen=True)
class Comparison:
    """How far a model is from transformers' float32.

    Attributes:
        difference: the largest difference of logits, as a fraction of the largest logit.
        limit: the largest difference that rounding explains.
        num_logits: the number of positions at which logits were compared.
        num_same: number of tokens with which both greedy answers begin alike.
        num_answer: number of tokens of transformers' answer.
        margin: where the answers part, how much better than the second token transformers' token was, as a fraction of
            the largest logit; None if they are the same.
    """

    difference: float
    limit: float
    num_logits: int
    num_same: int
    num_answer: int
    margin: float | None

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences; two tokens that are nearly as good may be exchanged."""
        return self.difference <= self.limit and (self.margin is None or self.margin <= 2 * self.limit)


def find_facts(model: Model, prompt: str) -> Facts:
    """What the model is, and how it is given a prompt.

    Raises:
        UserError: the model was not loaded from files.
    """
    config, tokenizer = model.config, model.tokenizer
    (tokens,) = tokenize(model, [prompt], "default", 0)
    stored, sources = _stored(model.files), model.sources
    if sources is None:
        raise UserError("The model was not loaded from files: give one that js.load_model returns.")
    return Facts(
        family=model.transformers_config.model_type,
        num_layers=config.num_layers,
        context=config.max_positions,
        num_parameters=sum(leaf.size for leaf in named_leaves(model.params).values()),
        stored=stored,
        dtype=model.dtype,
        quantisation=sources.quantisation or ", ".join(name for name in stored if name not in FLOAT_DTYPES) or None,
        is_tied=config.tie_word_embeddings,
        tokenizer_source=sources.tokenizer,
        num_tokens=len(tokenizer),
        vocab_size=config.vocab_size,
        template_source=sources.chat_template,
        end_tokens={number: tokenizer.convert_ids_to_tokens(number) for number in model.eos_token_ids},
        prompt=chat_text(tokenizer, prompt),
        num_prompt_tokens=len(tokens),
        bos=tokenizer.bos_token,
        num_bos=tokens.count(tokenizer.bos_token_id),
    )


def _stored(files: Sequence[Path]) -> dict[str, int]:
    """How many tensors of each dtype, or GGUF type, a model's files have, the most frequent first."""
    count: Counter[str] = Counter()
    for path in files:
        if is_gguf(path):
            count.update(stored_types(path))
        elif path.suffix == ".safetensors":
            count.update(stored_dtypes(path))
    return dict(count.most_common())


def answer(model: Model, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer to a prompt. It is a model's output and not to be trusted."""
    (text,) = generate(model, [prompt], max_new_tokens=max_new_tokens)
    return text


def compare(model: Model, prompt: str, text: str, max_new_tokens: int) -> Comparison:
    """Compare a model with transformers, which loads the same files in float32.

    Logits are compared for the prompt as it is sent and for a long text, tokens for the greedy answer.

    Arguments:
        text: the model's own answer to the prompt.

    Raises:
        UserError: torch is not installed, or transformers cannot load the files.
    """
    if not is_torch_installed():
        raise UserError("PyTorch is not installed, without which transformers has no models: run pip install torch")
    reference = Reference(model)
    (sent,) = tokenize(model, [prompt], "default", max_new_tokens)
    texts = [sent, _long_text(model)]
    exact = [reference.logits(tokens) for tokens in texts]
    tokens, logits = reference.answer(sent, max_new_tokens, model.eos_token_ids)
    scale = max(float(np.abs(values).max()) for values in exact)
    difference = _largest_difference([np.asarray(model(np.array([tokens])))[0] for tokens in texts], exact) / scale
    limit = FLOAT32_LIMIT
    if model.dtype != "float32":
        reference.round_to(model.dtype)
        rounding = _largest_difference([reference.logits(tokens) for tokens in texts], exact) / scale
        limit = max(limit, ROUNDING_LIMIT * rounding)
    end = next((i for i, token in enumerate(tokens) if token in model.eos_token_ids), len(tokens))
    same = _num_same(model, tokens[:end], text)
    margin = None
    if same < end or _decode(model, tokens[:end]) != text:
        second, first = np.sort(logits[same])[-2:]
        margin = float(first - second) / scale
    return Comparison(difference, limit, sum(map(len, texts)), same, end, margin)


def _long_text(model: Model) -> list[int]:
    """The tokens of harmless prompts, one after the other, up to `LONG_TEXT` of them."""
    text = "\n".join(load_prompts("benign"))
    tokens: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens[: min(LONG_TEXT, model.config.max_positions)]


def _largest_difference(
    ours: Sequence[Float[np.ndarray, "_ vocab"]], theirs: Sequence[Float[np.ndarray, "_ vocab"]]
) -> float:
    """The largest difference; NaN if a number is not finite, which no limit allows."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)]))


def _num_same(model: Model, tokens: Sequence[int], text: str) -> int:
    """With how many of the tokens the text begins."""
    # The bytes of a character may be in several tokens; until the last, they are decoded as U+FFFD.
    starts = (_decode(model, tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1))
    return next((i - 1 for i, start in enumerate(starts) if not text.startswith(start)), len(tokens))


def _decode(model: Model, tokens: Sequence[int]) -> str:
    decoded: str = model.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decoded
