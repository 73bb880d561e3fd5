"""The tokenizer in a GGUF file's metadata."""

import re
from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from jaxscape.models.chat_defaults import with_chat_template
from jaxscape.runtime.errors import UserError

# How text is split before byte-pair merging, by `tokenizer.ggml.pre`. The models' own tokenizers have the same regexes.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"  # letters without case are in both
_GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": _GPT2_SPLIT,
    "smollm": _GPT2_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
    "dbrx": _LLAMA3_SPLIT,  # Phi-4
    "gpt-4o": _GPT4O_SPLIT,  # Phi-4-mini
    "tekken": _GPT4O_SPLIT.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}"),  # Mistral
}
# Pre-tokenizers of models that take a whole piece of the split text as one token, if there is such a token, whichever
# merges lead to it.
_IGNORE_MERGES = ("llama-bpe", "tekken")
# Phi-3's special tokens remove the white space after them, except these.
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")
# The largest number of characters of a SentencePiece token. A damaged file may have a much longer one, and the search
# for merges tries every position in it.
MAX_CHARACTERS = 4096


_MARKUP = re.compile(r"<[^<>\s]+>")


def token_types(fields: Mapping[str, Any]) -> list[int]:
    """The `gguf.TokenType` of each token; all tokens are normal if the metadata has no types.

    Some files call a token such as `<start_of_turn>` normal, which would then be cut into pieces. If it is markup in
    the chat template, it is a control token.
    """
    tokens, template = fields["tokenizer.ggml.tokens"], str(fields.get("tokenizer.chat_template"))
    types = fields.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    markup = set(_MARKUP.findall(template))
    return [
        TokenType.CONTROL if kind == TokenType.NORMAL and token in markup else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def read_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that the metadata describes: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

    Raises:
        UserError: the tokenizer is of another type, or damaged.
    """
    tokens, model = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.model"]
    match model:
        case "gpt2":
            tokenizer = _byte_level(tokens, fields)
        case "llama":
            tokenizer = _sentencepiece(tokens, fields)
        case _:
            raise UserError(f"The file's tokenizer is of type {model!r:.60}; supported are 'gpt2' and 'llama'.")
    _add_tokens(tokenizer, tokens, fields)
    if fields.get("tokenizer.ggml.add_bos_token", model == "llama"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    special_tokens = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{stored_name}_token_id"]]
        for name, stored_name in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{stored_name}_token_id" in fields
    }
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"The file's tokenizer.chat_template is {template!r:.60}, not a string; download it again.")
    if template is None and (names := fields.get("tokenizer.chat_templates")):
        raise UserError(
            f"The file has no default chat template, but only {names!r:.80}: use the model's own directory."
        )
    return with_chat_template(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **special_tokens,
        )
    )


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], fields: Mapping[str, Any]) -> None:
    """Add the tokens that are found in a text before it is split: those of the types control and user-defined."""
    types = list(zip(tokens, token_types(fields), strict=True))
    # In Phi-3's files, no metadata says that special tokens remove the white space after them.
    is_phi3 = fields["general.architecture"] == "phi3" and fields["tokenizer.ggml.model"] == "llama"
    special = [token for token, kind in types if kind == TokenType.CONTROL or (is_phi3 and token == "</s>")]
    user_defined = [token for token, kind in types if kind == TokenType.USER_DEFINED]
    # One call for all: the time of a call grows with the number of tokens that were added before.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=is_phi3 and token not in UNSTRIPPED)
            for token in special
        ]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _byte_level(tokens: list[str], fields: Mapping[str, Any]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise UserError(f"The file's pre-tokenizer is {pre!r:.60}; supported are {', '.join(sorted(SPLITS))}.")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORE_MERGES))
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(tokens: list[str], fields: Mapping[str, Any]) -> Tokenizer:
    if (longest := max(map(len, tokens))) > MAX_CHARACTERS:
        raise UserError(
            f"The vocabulary has a token of {longest} characters, more than the limit of {MAX_CHARACTERS}: the file is "
            f"damaged, so download it again."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, map(float, fields["tokenizer.ggml.scores"]), strict=True))
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = generate_merges(vocab, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
