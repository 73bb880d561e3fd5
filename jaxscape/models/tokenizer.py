"""Tokenizers of model directories and of adapters, their chat templates and end tokens, and where these come from."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from jaxscape.models.chat_defaults import (
    END_OF_TURN,
    template_source,
    with_chat_template,
    without_default_template,
)
from jaxscape.models.checkpoint import Checkpoint, Sources
from jaxscape.models.weights import CONFIG
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import check_not_pointer, read_json
from jaxscape.runtime.progress import note

SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATES = ("processor_config.json", "chat_template.json")  # in the order of transformers' processors
_TABLES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # each of them makes a tokenizer
# Texts whose token ids must be those that sentencepiece itself gives. None begins with a blank, where transformers 5
# leaves out the blank that sentencepiece adds.
_PLAIN_TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful answers.",
    'Write 12 short poems about geese, please: x = f(3) + 4567; it\'s "quoted" (really)!',
)
_OTHER_TEXTS = ("two  spaces and   three", "a line\n\nand\tanother", "Zürich, 北京 🙂 ﬁ ²")


@dataclass(frozen=True)
class Language:
    """A tokenizer and what belongs to it.

    Attributes:
        tokenizer: the transformers tokenizer; it always has a chat template.
        eos_token_ids: the tokens that end a text or a turn.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    sources: Sources


def load_language(path: Path, config: PreTrainedConfig, eos_token_id: Any) -> Language:
    """The tokenizer of a model directory, with its chat template and end tokens.

    Arguments:
        config: the text model's configuration.
        eos_token_id: this field of `config.json`.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer needs code of its own.
    """
    tokenizer = _load_tokenizer(path, None)
    template = template_source(tokenizer, _template_file(path))
    ids, files = _end_tokens(path, {CONFIG: eos_token_id}, tokenizer, config.vocab_size)
    return Language(with_chat_template(tokenizer), ids, Sources(str(path), template, files))


def adapter_language(path: Path, base: Checkpoint) -> Language:
    """The tokenizer, chat template and end tokens of an adapter: what its directory does not hold is the base model's.

    Arguments:
        base: the checkpoint of the base model, with the adapter's vocabulary if that is larger.

    Raises:
        UserError: a file is damaged, or the tokenizer needs code of its own.
    """
    tokenizer, sources = without_default_template(base.tokenizer), base.sources
    own: list[str] = []
    if any((path / name).is_file() for name in _TABLES):
        template = tokenizer.chat_template
        tokenizer = _load_tokenizer(path, base.transformers_config)
        sources = replace(sources, tokenizer=str(path))
        if tokenizer.chat_template is None:
            own.append("tokenizer (but no chat template)")
            tokenizer.chat_template = template
        else:
            own += ["tokenizer", "chat template"]
            sources = replace(sources, chat_template=template_source(tokenizer, _template_file(path)))
    elif (text := _bare_template(path)) is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = text
        own.append("chat template")
        sources = replace(sources, chat_template=template_source(tokenizer, _template_file(path)))
    ids, files = _end_tokens(path, {}, tokenizer, base.config.vocab_size)
    if added := sorted(set(ids) - set(base.eos_token_ids)):
        own.append(f"end tokens ({', '.join(map(str, tokenizer.convert_ids_to_tokens(added)))})")
    ids = tuple(sorted({*ids, *base.eos_token_ids}))
    sources = replace(sources, end_tokens=(*sources.end_tokens, *files))
    if own:
        note(f"The adapter {path} brings its own {', '.join(own)}, used instead of the base model's.")
    return Language(with_chat_template(tokenizer), ids, sources)


def _template_file(path: Path) -> Path:
    """The file of a directory that its chat template is read from, if it has one."""
    files = [path / name for name in (SETTINGS, *PROCESSOR_TEMPLATES)]
    if (path / TEMPLATE).is_file():
        return path / TEMPLATE
    return next((file for file in files if file.is_file() and read_json(file).get("chat_template")), files[0])


def _bare_template(path: Path) -> str | None:
    """The chat template of a directory that has no tokenizer, or None."""
    file = _template_file(path)
    if file.name != TEMPLATE:
        template = read_json(file).get("chat_template") if file.is_file() else None
        return template if isinstance(template, str) else None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); fix it, or download it again.") from error


def _eos_of_settings(path: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the end token of a directory's tokenizer, or of the one that its settings name without a tokenizer."""
    if any((path / name).is_file() for name in _TABLES):
        return tokenizer.eos_token_id
    token = _settings(path).get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.convert_tokens_to_ids(content) if isinstance(content, str) else None
    return None if number == tokenizer.unk_token_id else number


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path / SETTINGS) if (path / SETTINGS).is_file() else {}


def _load_tokenizer(path: Path, config: PreTrainedConfig | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, without a default chat template.

    Arguments:
        config: the model's configuration; None if it lies in the directory.
    """
    if "auto_map" in _settings(path):
        raise UserError(
            f"The tokenizer in {path} needs code of its own ('auto_map' in {SETTINGS}), which jaxscape never "
            f"runs; use a model with a standard tokenizer."
        )
    for name in _TABLES:
        if (path / name).is_file():
            check_not_pointer(path / name)
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if config is not None:
        options["config"] = config
    try:
        if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
            tokenizer = _from_sentencepiece(path, options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many types for a missing or damaged tokenizer
        raise UserError(
            f"The tokenizer in {path} cannot be loaded ({reason(error)}); download its files again."
        ) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(path)
    return tokenizer


def _processor_template(path: Path) -> str | None:
    """The chat template that a directory has for the processor of a multimodal model; None if there is none.

    transformers' tokenizers do not read it, so it counts only where the tokenizer has no template of its own.
    """
    for file in (path / name for name in PROCESSOR_TEMPLATES):
        template = read_json(file).get("chat_template") if file.exists() else None
        if not isinstance(template, str | None):
            raise UserError(f"The chat_template in {file} is {template!r:.60}, not a text; download it again.")
        if template is not None:
            return template
    return None


def _from_sentencepiece(path: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory that has only `tokenizer.model`, checked against sentencepiece itself.

    Without the name of a class in `tokenizer_config.json`, transformers 5 takes one that reads Llama's files wrongly.
    """
    file = path / "tokenizer.model"
    try:
        reference = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{file} is not a SentencePiece model ({reason(error)}); if it is Meta's original file of Llama 3, "
            f"download the model's tokenizer.json instead."
        ) from error

    def known(text: str) -> str:
        """The text without the characters that the tokenizer does not know: programs fuse them differently."""
        return "".join(character for character in text if reference.unk_id() not in reference.encode(character))

    def wrong(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
        texts = [known(text) for text in texts]
        ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
        return [text for text in texts if ids[text] != reference.encode(text)]

    candidates = [AutoTokenizer.from_pretrained(path, **options)]
    if wrong(candidates[0], (*_PLAIN_TEXTS, *_OTHER_TEXTS)):
        options.pop("config", None)
        candidates.append(LlamaTokenizer.from_pretrained(path, **options))
    default = type(candidates[0]).__name__
    candidates = [tokenizer for tokenizer in candidates if not wrong(tokenizer, _PLAIN_TEXTS)]
    if not candidates:
        raise UserError(
            f"transformers reads {file} as another tokenizer than sentencepiece does; convert it to a tokenizer.json "
            f"with the tool that the model comes with."
        )
    tokenizer = min(candidates, key=lambda tokenizer: len(wrong(tokenizer, _OTHER_TEXTS)))
    if type(tokenizer).__name__ != default:
        note(f"{file} is read by transformers' LlamaTokenizer: {default}, which {SETTINGS} leads to, reads it wrongly.")
    if texts := wrong(tokenizer, _OTHER_TEXTS):
        note(
            f"transformers reads {file} with other token ids than sentencepiece gives for a text such as {texts[0]!r}, "
            f"and they are used; convert the file to a tokenizer.json to be sure."
        )
    return tokenizer


def _end_tokens(
    path: Path, named: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids of all end tokens that a directory's files name, and of the added tokens that are in `END_OF_TURN`; and
    the files that name some.

    All are needed, because chat models end a turn and a text with different tokens.

    Arguments:
        named: ids, or lists of ids, by the file that they are from; None for none.
    """
    named = {**named, SETTINGS: _eos_of_settings(path, tokenizer)}
    if (path / GENERATION).exists():
        named[GENERATION] = read_json(path / GENERATION).get("eos_token_id")
    lists = {name: value if isinstance(value, list) else [value] for name, value in named.items() if value is not None}
    ids = [token for tokens in lists.values() for token in tokens]
    for name, tokens in lists.items():
        if wrong := [token for token in tokens if type(token) is not int or not 0 <= token < vocab_size]:
            field = "eos_token" if name == SETTINGS else "eos_token_id"
            raise UserError(
                f"{path} names the end token {wrong[0]!r:.60}, which is not one of its {vocab_size} tokens; correct "
                f"{field} in its {name}."
            )
    added_tokens = tokenizer.added_tokens_decoder.items()
    end_of_turn = {number for number, token in added_tokens if token.content in END_OF_TURN and number < vocab_size}
    return tuple(sorted({*ids, *end_of_turn})), tuple(str(path / name) for name in lists)
