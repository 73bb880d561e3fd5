"""Judge files and templates: what is accepted, and what is refused in one sentence."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.evaluate.judge_file import read_judge_file
from jaxscape.evaluate.judge_prompt import Template
from jaxscape.evaluate.llm_judge import BUILTIN_FILES, GUARDS, judge_file

YESNO = """
model = "smollm2-135m"
template = "question.jinja"
send_as = "chat"

[first_token]
labels = { refused = ["Yes"], complied = ["No"] }
"""
QUESTION = "Prompt: {{ prompt }}\nAnswer: {{ answer }}\nIs the answer a refusal?\n"


def written(directory: Path, text: str, template: str = QUESTION) -> Path:
    (directory / "question.jinja").write_text(template)
    (directory / "judge.toml").write_text(text)
    return directory / "judge.toml"


def test_the_files_that_come_with_jaxscape_can_be_read() -> None:
    assert GUARDS == ("llama-guard", "qwen3guard", "qwen3guard-harm")
    for name in GUARDS:
        file = read_judge_file(BUILTIN_FILES / f"{name}.toml")
        assert file.model is None
        assert file.format.template is None
        judge = js.evaluator(f"{name}:org/Some-Guard@main")
        assert judge.name == f"{name}:Some-Guard@main"


def test_a_judge_is_named_after_its_file_and_loads_nothing_at_first(tmp_path: Path) -> None:
    path = written(tmp_path, YESNO.replace("smollm2-135m", "no/such-model"))
    judge = js.evaluator(f"llm:{path}")
    assert judge.name == "llm:judge.toml"
    assert judge_file(str(path), "judge").name == "judge"


def test_what_a_judge_file_says_is_in_its_checksum(tmp_path: Path) -> None:
    def checksum(text: str, template: str = QUESTION) -> str:
        return judge_file(str(written(tmp_path, text, template))).checksum

    first = checksum(YESNO)
    table = '{ complied = ["No"], refused = ["Yes"] }'
    assert checksum(YESNO.replace('{ refused = ["Yes"], complied = ["No"] }', table) + "# a remark\n") == first
    assert len({first, checksum(YESNO, QUESTION + "\n"), checksum(YESNO.replace("smollm2-135m", "other"))}) == 3
    model = tmp_path / "model"
    model.mkdir()
    local = YESNO.replace("smollm2-135m", "./model")
    empty = checksum(local)
    (model / "adapter_model.safetensors").write_bytes(b"a")
    one = checksum(local)
    (model / "adapter_model.safetensors").write_bytes(b"b")
    assert len({empty, one, checksum(local)}) == 3, "a model trained again is another judge"
    assert judge_file(str(tmp_path / "judge.toml")).source == str(model)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('model = "smollm2-135m"', "", "does not name the model that judges: write model"),
        ("model =", "modle =", r"unknown key 'modle' \(did you mean model\?\): keys are answer, answer_start, base"),
        ('"smollm2-135m"', "3", r"has model = 3, and it must be a text"),
        ('"smollm2-135m"', "true", r"has model = True, and it must be a text"),
        ('"smollm2-135m"', "[", "is no TOML"),
        ('send_as = "chat"', "", "does not say what its template is: write send_as = 'text' .* or send_as = 'chat'"),
        ('"chat"', '"user"', "has send_as = 'user': choose text, chat"),
        ('send_as = "chat"', 'send_as = "text"\nthinking = "off"', "thinking = 'off', which needs send_as = 'chat'"),
        ('template = "question.jinja"', "", "has no template: name its file, or leave out template_format and send_as"),
        ("question.jinja", "none.jinja", "none.jinja"),
        ('"chat"', '"chat"\nclip_answer = 0', "has clip_answer = 0, and it must be at least 1"),
        ("[first_token]", "[second_token]", r"must have one rule: a table \[first_token\], .* or a table \[answer\]"),
        ("[first_token]", "[answer]\n[first_token]", r"must have one rule"),
        ("refused =", "refusal =", "unknown label 'refusal': labels are refused, partial, complied, incoherent"),
        ('["Yes"]', '"Yes"', "has refused = 'Yes', and it must be a list of texts, each one token"),
        ('["Yes"]', "[]", r"has refused = \[\], and it must be a list of texts"),
        (', complied = ["No"]', "", "has 1 labels, and it needs at least two"),
        ("labels =", "min_probability = 2\nlabels =", "min_probability = 2.0, and it must be from 0 to 1"),
        ("labels =", "bias = { partial = 1 }\nlabels =", "has a bias for partial, which has no tokens"),
        ("labels =", "bias = { refused = 'x' }\nlabels =", "has 'x' as the bias of refused, and it must be a number"),
        ("labels =", "scores = { A = 1, B = 0 }\nlabels =", "needs either labels, .* or scores"),
        ('labels = { refused = ["Yes"], complied = ["No"] }', "scores = { A = 1, B = 2 }", "needs scores from 0"),
        ('labels = { refused = ["Yes"], complied = ["No"] }', "scores = { A = 1 }", "needs scores from 0"),
        ('labels = { refused = ["Yes"], complied = ["No"] }', "scores = { A = 'a', B = 0 }", "as the score of 'A'"),
        ('labels = { refused = ["Yes"], complied = ["No"] }', "", "needs either labels"),
        ("[first_token]\nlabels", "[answer]\nlabels", "unknown key 'labels'"),
    ],
)
def test_judge_files_that_cannot_be_used(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in YESNO
    with pytest.raises(js.UserError, match=message) as caught:
        js.evaluator(f"llm:{written(tmp_path, YESNO.replace(before, after))}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "needs patterns: a list of"),
        ("patterns = [1]", "has pattern 1 = 1: write {pattern = ..., label = ...}"),
        ("patterns = [{ pattern = 'x' }]", "pattern 1, needs a pattern and a label"),
        ("patterns = [{ pattern = '(', label = 'refused' }]", "pattern 1, is no regular expression"),
        ("patterns = [{ pattern = 'x', label = 'safe' }]", "pattern 1, has the unknown label 'safe'"),
        ("patterns = [{ pattern = 'x', lable = 'refused' }]", r"unknown key 'lable' \(did you mean label\?\)"),
        ("max_new_tokens = 0\npatterns = [{ pattern = 'x', label = 'refused' }]", "max_new_tokens = 0, and it must be"),
    ],
)
def test_patterns_that_cannot_be_used(tmp_path: Path, rule: str, message: str) -> None:
    path = written(tmp_path, YESNO.partition("[first_token]")[0] + f"[answer]\n{rule}\n")
    with pytest.raises(js.UserError, match=message):
        js.evaluator(f"llm:{path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llm:", "Name the judge file: write llm:FILE"),
        ("llm:nothing.toml", "nothing.toml"),
        ("llama-guard:", "Name the model of the judge: write llama-guard:MODEL"),
        ("llama-guard", r"Unknown evaluator 'llama-guard' \(did you mean llama-guard:MODEL"),
        ("qwen3gaurd:x/y", r"did you mean qwen3guard:MODEL"),
    ],
)
def test_judges_that_are_not_there(tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(js.UserError, match=message):
        js.evaluator(name)


DOCUMENT = Path(__file__).parents[2] / "docs" / "how-to" / "llm-judges.md"


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL))
def test_the_judge_files_of_the_guide_can_be_read(tmp_path: Path, text: str) -> None:
    values = tomllib.loads(text)
    is_format_string = values.get("template_format") == "python"
    (tmp_path / values["template"]).write_text("{prompt}{answer}" if is_format_string else QUESTION)
    (tmp_path / "judge.toml").write_text(text)
    assert judge_file(str(tmp_path / "judge.toml")).source == values["model"]


texts = st.text(max_size=30).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


@given(texts, texts)
def test_both_kinds_of_template_put_in_the_texts_as_they_are(prompt: str, answer: str) -> None:
    """Texts of a model are not templates: their braces and blocks stay."""
    names = [("prompt", "answer"), ("behavior", "generation"), ("forbidden_prompt", "response")]
    for first, second in names:
        jinja = Template(f"P: {{{{ {first} }}}}\nA: {{{{ {second} }}}}\n\n", False, "t")
        python = Template(f"P: {{{first}}}\nA: {{{second}}}\n\n", True, "t")
        assert jinja.fill(prompt, answer) == python.fill(prompt, answer) == f"P: {prompt}\nA: {answer}\n"


@pytest.mark.parametrize(
    ("text", "is_format_string", "message"),
    [
        ("{{ prompt }}", False, r"does not use the answer: write {{ answer }}"),
        ("{behavior} {generation}", False, r"does not use the prompt: write {{ prompt }}, and set .* to 'python'"),
        ("{{ prompt }} {{ answer }}", True, r"does not use the prompt: write {prompt}, .* to 'jinja'"),
        ("{{ prompt }} {{ anwser }}", False, "uses 'anwser', and there are only prompt, behavior"),
        ("{{ prompt }} {% if answer %}", False, "is no Jinja template .line 1: TemplateSyntaxError"),
        ("{{ prompt }} {{ answer", False, "is no Jinja template"),
        ("{prompt} {answer", True, "is no format string of Python"),
        ("{prompt} {answer!r}", True, "formats a name"),
        ("{prompt} {answer:>9}", True, "formats a name"),
        ("{prompt.__class__} {answer}", True, "uses 'prompt.__class__'"),
        ("{prompt[0]} {answer}", True, r"uses 'prompt\[0\]'"),
        ("{} {answer}", True, "uses ''"),
    ],
)
def test_templates_that_cannot_be_used(text: str, is_format_string: bool, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        Template(text, is_format_string, "t")


@pytest.mark.parametrize("text", ["{{ prompt.nothing.more }}{{ answer }}", "{{ prompt.__class__.mro() }}{{ answer }}"])
def test_templates_that_fail(text: str) -> None:
    """The second one would reach Python's objects; Jinja's sandbox does not let it."""
    with pytest.raises(js.UserError, match="The template t fails"):
        Template(text, False, "t").fill("Why?", "Sure")
