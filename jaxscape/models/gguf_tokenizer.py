"""GGUF files: configuration, tensors and tokenizer, without torch."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from jaxscape.models.checkpoint import with_chat_template
from jaxscape.runtime.errors import UserError

# How text is cut before byte-pair merging, by `tokenizer.ggml.pre`: the expressions of the models' own tokenizers.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": _GPT2_SPLIT,
    "smollm": _GPT2_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_MAX_CHARACTERS = 4096  # of a SentencePiece token: its merges are looked for at each of its places


def _token_types(fields: Mapping[str, Any]) -> list[int]:
    return fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(fields["tokenizer.ggml.tokens"]))


def read_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that the metadata describes: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`)."""
    tokens = fields["tokenizer.ggml.tokens"]
    match fields["tokenizer.ggml.model"]:
        case "gpt2":
            tokenizer = _byte_level(tokens, fields)
        case "llama":
            tokenizer = _sentencepiece(tokens, fields)
        case other:
            raise UserError(f"The GGUF file's tokenizer is of type {other!r:.60}; supported are 'gpt2' and 'llama'.")
    kinds = list(zip(tokens, _token_types(fields), strict=True))
    # Phi-3's special tokens take the white space after them, but for some; no file says so.
    strips = fields["general.architecture"] == "phi3" and fields["tokenizer.ggml.model"] == "llama"
    # All at once: each addition takes as long as there are tokens that were added before.
    special = [t for t, kind in kinds if kind == _CONTROL or (strips and t == "</s>")]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=strips and t not in UNSTRIPPED) for t in special]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in kinds if k == _USER_DEFINED])
    if fields.get("tokenizer.ggml.add_bos_token", fields["tokenizer.ggml.model"] == "llama"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    special_tokens = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError("The GGUF file's chat template is not a text.")
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
    return with_chat_template(whole)


def _byte_level(tokens: list[str], fields: Mapping[str, Any]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise UserError(f"The GGUF file's pre-tokenizer is {pre!r:.60}; supported are {', '.join(sorted(SPLITS))}.")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
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
    if (longest := max(map(len, tokens))) > _MAX_CHARACTERS:
        raise UserError(f"The GGUF file has a token of {longest} characters; it is damaged, so download it again.")
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
