"""What an LLM judge is given: a template, filled with the prompt and the answer that it judges."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from jaxscape.models.chat_defaults import adds_bos
from jaxscape.prompts.chat_format import chat_text, render, thinking_opening
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.texts import quoted_names

# The names by which a template may call the prompt and the answer. Templates of the field have various ones: those of
# HarmBench `behavior` and `generation`, those of StrongREJECT `forbidden_prompt` and `response`.
PROMPT_NAMES = ("prompt", "behavior", "forbidden_prompt", "instruction", "question")
ANSWER_NAMES = ("answer", "generation", "response", "completion")

_PROBES = ("What do you know about Xanthippe?", "She was the wife of Socrates.")  # a prompt and an answer
_OTHER_ANSWER = "That is nothing to talk about."


@dataclass(frozen=True)
class Template:
    """A template of the user's, checked when it is made.

    Attributes:
        text: the template. One newline at its end, which editors add, is dropped.
        is_format_string: whether it is a format string of Python, with `{prompt}` and `{answer}`, and not a Jinja
            template, with `{{ prompt }}` and `{{ answer }}`. See `PROMPT_NAMES` and `ANSWER_NAMES` for the names.
        name: the name of its file, for errors.

    Raises:
        UserError: the template cannot be parsed, or does not use the prompt and the answer and nothing else.
    """

    text: str
    is_format_string: bool
    name: str

    def __post_init__(self) -> None:
        names = self._names()
        unknown = sorted(names - {*PROMPT_NAMES, *ANSWER_NAMES})
        if unknown:
            raise UserError(
                f"The template {self.name} uses {quoted_names(unknown)}, and there are only {', '.join(PROMPT_NAMES)} "
                f"(for the prompt) and {', '.join(ANSWER_NAMES)} (for the answer)."
            )
        for what, known in (("prompt", PROMPT_NAMES), ("answer", ANSWER_NAMES)):
            if names.isdisjoint(known):
                written = f"{{{what}}}" if self.is_format_string else f"{{{{ {what} }}}}"
                raise UserError(
                    f"The template {self.name} does not use the {what}: write {written}, and set template_format to "
                    f"'python' if it is a format string and to 'jinja' if it is not."
                )

    def fill(self, prompt: str, answer: str) -> str:
        """The template's text with a prompt and an answer.

        Raises:
            UserError: the template fails.
        """
        values = dict.fromkeys(PROMPT_NAMES, prompt) | dict.fromkeys(ANSWER_NAMES, answer)
        if self.is_format_string:
            return self._text.format(**values)
        try:
            return self._jinja.render(**values)
        except Exception as error:  # a template is a program and can raise anything
            raise UserError(f"The template {self.name} fails ({reason(error)}).") from error

    @property
    def _text(self) -> str:
        return self.text.removesuffix("\n")

    @cached_property
    def _jinja(self) -> jinja2.Template:
        return _environment().from_string(self._text)

    def _names(self) -> set[str]:
        """The names of the variables that the template uses."""
        if not self.is_format_string:
            try:
                environment = _environment()
                return meta.find_undeclared_variables(environment.parse(self._text)) - environment.globals.keys()
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"The template {self.name} is no Jinja template (line {error.lineno}: {reason(error)}): correct "
                    f"it, or set template_format to 'python' if it is a format string."
                ) from error
        try:
            fields = [field for field in string.Formatter().parse(self._text) if field[1] is not None]
        except ValueError as error:
            raise UserError(
                f"The template {self.name} is no format string of Python ({reason(error)}): write {{{{ and }}}} for "
                f"braces that are text."
            ) from error
        if any(spec or conversion for _, _, spec, conversion in fields):
            raise UserError(f"The template {self.name} formats a name, as in {{prompt!r}}: write the names only.")
        return {str(name) for _, name, _, _ in fields}


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates; unknown variables are errors, and all newlines stay."""
    return ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )


@dataclass(frozen=True)
class PromptFormat:
    """How a judge's prompt is made.

    Attributes:
        template: None for a guard model, whose own chat template makes the judge's prompt from a chat of the prompt
            and the answer.
        is_chat: whether the filled template is a user's turn in the model's chat format, and not the whole prompt.
        thinking: see `jaxscape.prompts.chat_format.render`; only for chats.
        answer_start: how the judge's answer begins; the end of the prompt, unless it ends so already.
        clip_answer: the answer that is judged is cut to this number of the judge's tokens; None leaves it whole.
    """

    template: Template | None = None
    is_chat: bool = False
    thinking: str = "default"
    answer_start: str = ""
    clip_answer: int | None = None


@dataclass(frozen=True)
class JudgePrompt:
    """Makes the judge's prompts, as texts and as token ids.

    Attributes:
        tokenizer: the judge's tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat

    def text(self, prompt: str, answer: str) -> str:
        """The judge's prompt for an answer to a prompt, without the BOS token that `tokens` may add.

        Raises:
            UserError: the template does not accept them.
        """
        how, answer = self.format, self._clipped(answer)
        user = {"role": "user", "content": prompt}
        if how.template is None:
            chat = [user, {"role": "assistant", "content": answer}]
            text = render(self.tokenizer, chat, add_generation_prompt=False)
        elif how.is_chat:
            text = chat_text(self.tokenizer, how.template.fill(prompt, answer), thinking=how.thinking)
        else:
            text = how.template.fill(prompt, answer)
        return text if text.endswith(how.answer_start) else text + how.answer_start

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text. A text that is no chat begins with the BOS token if the tokenizer puts one before
        every text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        is_whole = self.format.template is not None and not self.format.is_chat
        bos = [self.tokenizer.bos_token_id] if is_whole and adds_bos(self.tokenizer) else []
        return ids if ids[:1] == bos else [*bos, *ids]

    def token_ids(self, tokens: tuple[str, ...]) -> Mapping[str, int]:
        """The id of each token behind a judge's prompt.

        Arguments:
            tokens: the texts of the tokens.

        Raises:
            UserError: a text is not one token there, or two texts are the same token.
        """
        text = self.text(*_PROBES)
        before = self.tokens(text)
        ids: dict[str, int] = {}
        for token in tokens:
            behind = self.tokens(text + token)
            if behind[: len(before)] != before:
                raise UserError(
                    f"The tokenizer joins the rule's token {token!r} with the end of the judge's prompt "
                    f"({text[-12:]!r}): end the template and answer_start without white space, and begin the token "
                    f"with it, as in {' ' + token.strip()!r}."
                )
            if len(behind) != len(before) + 1:
                raise UserError(
                    f"The rule's token {token!r} is {len(behind) - len(before)} tokens of the judge's tokenizer: write "
                    f"a text that is one token."
                )
            if behind[-1] in ids.values():
                raise UserError(f"The rule's token {token!r} is the same token as another one: write each once.")
            ids[token] = behind[-1]
        return ids

    def check(self) -> None:
        """Raise a `UserError` if the answer does not change what the judge is given."""
        prompt, answer = _PROBES
        if self.text(prompt, answer) == self.text(prompt, _OTHER_ANSWER):
            raise UserError(
                "The chat template of the judge's model leaves out the answer that it is to judge: write a template "
                "file for this model."
            )

    @cached_property
    def thinking_opening(self) -> str:
        """The marker with which the prompts open a block of thinking, or an empty text."""
        return thinking_opening(self.tokenizer, thinking=self.format.thinking) if self.format.is_chat else ""

    def _clipped(self, answer: str) -> str:
        limit = self.format.clip_answer
        if limit is None:
            return answer
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) <= limit:
            return answer
        return str(self.tokenizer.decode(ids[:limit], clean_up_tokenization_spaces=False))
