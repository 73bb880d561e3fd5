"""What a model's files may leave out: its chat template, and some of the tokens that end a turn."""

import copy
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jaxscape.runtime.errors import UserError

# Tokens that end a turn or a text in the usual chat formats. An answer ends at each of them that the model has, because
# a model's files often name only the token that ends a text.
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),
    *("<|end_of_text|>", "<|endoftext|>", "</s>"),
)

# Vicuna's chat format (Zheng et al., arXiv 2306.05685), as FastChat writes it; Vicuna's tokenizer has no template.
_VICUNA = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% set system = "A chat between a curious user and an artificial intelligence \
assistant. The assistant gives helpful, detailed, and polite answers to the user's questions." %}{% endif %}
{%- if system %}{{ system + ' ' }}{% endif %}
{%- for turn in turns %}
{%- if turn['role'] == 'user' %}{{ 'USER: ' + turn['content'] + ' ' }}
{%- elif turn['role'] == 'assistant' %}{{ 'ASSISTANT: ' + turn['content'] }}{{ eos_token }}
{%- else %}{{ raise_exception('only the first message may be the system\\'s') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, given Vicuna's chat template if it has none.

    The template begins with the BOS token if the tokenizer puts that before every text.

    Raises:
        UserError: the tokenizer has several templates with names, and none of them is the default.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UserError(
            f"The tokenizer has no default chat template, but only {', '.join(sorted(tokenizer.chat_template))}: write "
            f"the one for chats into a file chat_template.jinja."
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (_bos_of_template(tokenizer) if adds_bos(tokenizer) else "") + _VICUNA
    return tokenizer


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before every text, unless it is told not to add special tokens."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def _bos_of_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a template that gives a text the token ids that it has behind the tokenizer's own BOS token.

    Tokenizers of Llama that are not `legacy` put a blank before a text, but not behind a BOS token that is spelled out.
    """
    text = "A chat"
    spelled = tokenizer(f"{tokenizer.bos_token} {text}", add_special_tokens=False)["input_ids"]
    plain = tokenizer(f"{tokenizer.bos_token}{text}", add_special_tokens=False)["input_ids"]
    needs_blank = plain != tokenizer(text)["input_ids"] == spelled
    return "{{ bos_token + ' ' }}" if needs_blank else "{{ bos_token }}"


def template_source(tokenizer: PreTrainedTokenizerBase, file: Path) -> str:
    """Where a chat template comes from: `file`, or a sentence if it is the default one."""
    if without_default_template(tokenizer).chat_template is None:
        return "Vicuna's format, because the model's files have no template"
    return str(file)


def template_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A line for the user if the chat template is the default one; otherwise none."""
    is_default = without_default_template(tokenizer) is not tokenizer
    return ["the model's files have no chat template, so Vicuna's is used"] * is_default


def without_default_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as the model's files have it: a copy without the template that `with_chat_template` added."""
    if not isinstance(tokenizer.chat_template, str) or not tokenizer.chat_template.endswith(_VICUNA):
        return tokenizer
    original = copy.copy(tokenizer)
    original.chat_template = None
    return original
