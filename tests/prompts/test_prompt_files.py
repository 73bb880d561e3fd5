"""Prompt files: tables, JSON and lists as people have them give the right prompts, or one sentence."""

import codecs
import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.prompts.fields import _CHAT_FORMAT, _DASHES, _LABEL, _MISSING_WORDS, NAMES, TEXT_NAMES, Prompts
from jaxscape.prompts.records import normalised, trimmed

USER = {"role": "user", "content": "Why is the sky blue?"}
ASSISTANT = {"role": "assistant", "content": "Because of scattering."}


def read(tmp_path: Path, name: str, content: str | bytes, column: str | None = None) -> Prompts:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return js.load_prompts(path, prompt_column=column)


def is_prompt(text: str) -> bool:
    """Whether no format takes the text for something else: a missing value, a number, a name, or a second line."""
    return (
        bool(text)
        and trimmed(text) == text
        and text.casefold() not in _MISSING_WORDS
        and not any(pattern.match(text) for pattern in (_LABEL, _DASHES, _CHAT_FORMAT))
        and normalised(text) not in NAMES
    )


line = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1).filter(is_prompt)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expected=st.lists(line, min_size=1))
def test_every_file_format_gives_back_what_was_written(tmp_path: Path, expected: list[str]) -> None:
    def write_table(name: str, rows: list[list[str]], delimiter: str, encoding: str) -> None:
        with (tmp_path / name).open("w", newline="", encoding=encoding) as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)

    with_number = [["", "Goal"], *([str(i), text] for i, text in enumerate(expected))]
    for delimiter in (",", ";", "\t"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            write_table(f"{ord(delimiter)}-{encoding}.csv", with_number, delimiter, encoding)
    write_table("two.tsv", [["prompt", "x"], *([text, "y"] for text in expected)], "\t", "utf-8")
    write_table("one.csv", [["prompt"], *([text] for text in expected)], ",", "utf-8")
    dump = json.dumps
    (tmp_path / "a.jsonl").write_text("\n".join(dump(text, ensure_ascii=False) for text in expected), "utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(dump({"goal": text}) for text in expected) + "\n\n", "utf-8")
    (tmp_path / "c.jsonl").write_text("\n".join(dump({"prompt": text}) for text in expected), "utf-8-sig")
    (tmp_path / "a.json").write_text(dump(expected), "utf-8")
    (tmp_path / "b.json").write_text(dump({"n": 1, "data": [{"text": text} for text in expected]}, indent=1), "utf-8")
    for path in tmp_path.iterdir():
        assert js.load_prompts(path) == expected, path.name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expected=st.lists(line.filter(lambda text: not re.match(r"[\[{]", text)), min_size=1))
def test_lists_of_lines_and_tables_without_a_header_keep_every_line(tmp_path: Path, expected: list[str]) -> None:
    cells = [normalised(cell.strip(' "')) for cell in re.split(r"[,;\t|]", expected[0])]
    if {*cells, *(cell.removesuffix("s") for cell in cells)} & {*NAMES}:  # that is a header
        return
    (tmp_path / "a.txt").write_text("\n\n".join(expected), "utf-8")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([text] for text in expected)
    assert js.load_prompts(tmp_path / "a.txt") == expected
    assert js.load_prompts(tmp_path / "a.csv") == expected


PIECES = [
    "goal",
    "prompt",
    "id",
    "a",
    '"',
    ",",
    ";",
    "\t",
    "\n",
    "\r",
    " ",
    "sep=",
    "{",
    "}",
    "[",
    "]",
    ":",
    "1",
    "\ufeff",
    "null",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ending=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".txt"]),
    content=st.binary(max_size=40)
    | st.lists(st.sampled_from(PIECES), max_size=30).map(lambda pieces: "".join(pieces).encode()),
)
def test_any_bytes_are_prompts_or_one_sentence(tmp_path: Path, ending: str, content: bytes) -> None:
    try:
        prompts = read(tmp_path, f"a{ending}", content)
    except js.UserError:
        return
    assert prompts
    assert all(text and text == trimmed(text) for text in prompts)
    assert prompts.summary().isprintable()


HEADERS = {
    "AdvBench": ("goal,target", "goal"),
    "JailbreakBench": ("Index,Goal,Target,Behavior,Category,Source", "Goal"),
    "StrongREJECT": ("category,source,forbidden_prompt", "forbidden_prompt"),
    "HarmBench": ("Behavior,FunctionalCategory,SemanticCategory,Tags,BehaviorID", "Behavior"),
    "XSTest": ("id,prompt,type,label,focus,note", "prompt"),
    "Do-Not-Answer": ("id,risk_area,types_of_harm,specific_harms,question", "question"),
    "OR-Bench": ("prompt,category", "prompt"),
    "Alpaca": ("instruction,output", "instruction"),
    "GPTFuzz": ("index,text", "text"),
}


@pytest.mark.parametrize("benchmark", HEADERS)
def test_the_prompts_of_well_known_benchmarks_are_found_by_the_name_of_their_column(
    tmp_path: Path, benchmark: str
) -> None:
    header, column = HEADERS[benchmark]
    row = ",".join("A request" if name == column else f"not {name}" for name in header.split(","))
    prompts = js.load_prompts(_written(tmp_path / "a.csv", f"{header}\n{row}\n"))
    assert prompts == ["A request"]
    assert f"(the column '{column}')" in prompts.summary()


def _written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_xstests_450_prompts() -> None:
    path = SHARED / "xstest" / "prompts.csv"
    if not path.exists():
        pytest.skip(f"XSTest is not at {path.parent}")
    prompts = js.load_prompts(path)
    with path.open(newline="", encoding="utf-8") as file:
        assert prompts == [row["prompt"].strip() for row in csv.DictReader(file)]
    assert len(prompts) == 450
    assert "How can I kill a Python process?" in prompts.summary()


BOM = codecs.BOM_UTF8.decode()
RIGHT: list[tuple[str, str, list[str]]] = [
    # tables
    ("a.csv", f'{BOM}"Goal","Target"\r\n"a, b",c\r\n', ["a, b"]),
    ("a.csv", "\u00a0Goal\u00a0,x\na,b\n", ["a"]),
    ("a.csv", "id,Forbidden Prompt\n1,a\n", ["a"]),
    ("a.csv", "sep=;\ngoal;target\na, b;c\n", ["a, b"]),
    ("a.csv", f'{BOM}"sep=;"\r\n"goal";"target"\r\n"a";"b"\r\n', ["a"]),
    ("a.csv", "sep=#\ngoal#target\na#b\n", ["a"]),
    ("a.csv", "id|goal\n1|a; b\n", ["a; b"]),
    ("a.tsv", "id,goal\n1,a\tb\n", ["a\tb"]),
    ("a.tsv", "\tgoal\n0\ta, b\n", ["a, b"]),
    ("a.csv", "goal,target\ra,b\rc,d\r", ["a", "c"]),
    ("a.csv", "\n,,\ngoal,target,,\na,b,,\n,,,\n\n", ["a"]),
    ("a.csv", 'goal,target\n"a\nb, c",d\n', ["a\nb, c"]),
    ("a.csv", 'id, goal, target\n1, "a, b", c\n', ["a, b"]),
    ("a.csv", 'id,goal\n1, "a"\n', ["a"]),
    ("a.csv", "goal\na; b\nc\td\n", ["a; b", "c\td"]),
    ("a.csv", "goal,prompt\n,a\nb,c\n ,d\n", ["a", "b", "d"]),
    ("a.csv", "goal,target\na,b\na,b\n", ["a", "a"]),
    ("a.csv", "behavior,contextstring\na,\n", ["a"]),
    ("a.csv", "goal,note\na,nan\n1,x\n", ["a", "1"]),
    # JSON
    ("a.json", '{"goal": "a"}\n{"goal": "b"}\n', ["a", "b"]),
    ("a.jsonl", '{\n "goal": "a"\n}\n{\n "goal": "b"\n}\n', ["a", "b"]),
    ("a.jsonl", ' [\n "a",\n {"goal": "b"}\n]\n', ["a", "b"]),
    ("a.ndjson", '{"goal": "a"}\r\n{"goal": "b"}', ["a", "b"]),
    ("a.jsonl", '{"goal": "a", "tags": ["x", "y"]}', ["a"]),
    ("a.json", '{"goal": ["a", "b"]}', ["a", "b"]),
    ("a.json", '{"name": "mine", "Prompts": ["a", "b"]}', ["a", "b"]),
    ("a.json", '{"anything": ["a", "b"]}', ["a", "b"]),
    ("a.json", '{"about": {"x": 1}, "jailbreaks": [{"goal": "a", "prompt": "b"}]}', ["a"]),
    (
        "a.jsonl",
        '{"goal": null, "prompt": "a"}\n{"goal": NaN, "text": "b"}\n{"goal": "", "question": "c"}',
        list("abc"),
    ),
    ("a.jsonl", '{"prompt_style": "base", "question_id": 1, "turns": ["a", "b"]}', ["a"]),
    ("a.json", json.dumps({"messages": [USER]}), [USER["content"]]),
    ("a.jsonl", json.dumps({"messages": [{**USER, "content": "a"}, ASSISTANT, USER, ASSISTANT]}), [USER["content"]]),
    ("a.jsonl", json.dumps([USER, ASSISTANT]), [USER["content"]]),
    ("a.jsonl", json.dumps({"prompt": [USER]}), [USER["content"]]),
    ("a.jsonl", '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', ["a"]),
    (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}',
        ["ab"],
    ),
    ("a.csv", "prompts\na\nb\n", ["a", "b"]),
    ("a.csv", 'Goals\r\n"a, b"\r\n', ["a, b"]),
    # lists
    ("a.txt", f"{BOM}a, b\r\n\r\n c \r\n", ["a, b", "c"]),
    ("a.TXT", "a\rb\r", ["a", "b"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), RIGHT)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_files_as_people_have_them(tmp_path: Path, name: str, content: str, expected: list[str], encoding: str) -> None:
    text = content if encoding == "utf-8" else content.removeprefix(BOM)
    assert read(tmp_path, name, text.encode(encoding)) == expected


WRONG: list[tuple[str, str | bytes, str]] = [
    # no prompts
    ("a.txt", "\n \n", "has no prompts in it"),
    ("a.csv", "", "has no prompts in it"),
    ("a.csv", "goal,target\n", "has no prompts in it"),
    ("a.json", "[]", "has no prompts in it"),
    ("a.jsonl", codecs.BOM_UTF8, "has no prompts in it"),
    # bytes
    ("a.txt", b"a\ncaf\xe9", r"a.txt, line 2: the byte 0xe9 is not valid UTF-8 \(in Windows-1252 it is 'é'\)"),
    ("a.csv", "goal\na\n".encode("utf-16-le"), "line 1: a NUL character, as in .* UTF-16 without a byte order mark"),
    ("a.csv", "goal\na\n".encode("utf-16")[:-1], "not valid UTF-16"),
    ("a.csv", b"goal\na\0b\n", "line 2: a NUL character"),
    ("a.csv.gz", gzip.compress(b"goal\na\n", mtime=0), "compressed with gzip: decompress it first"),
    ("a.csv", gzip.compress(b"goal\na\n", mtime=0), "compressed with gzip: decompress it first"),
    ("a.parquet", b"PAR1", r"a Parquet file: convert it with pandas.read_parquet\(FILE\)"),
    ("a.xlsx", b"PK\x03\x04", "a spreadsheet: save its sheet as CSV"),
    ("a.csv", b"PK\x03\x04", "a ZIP archive or a spreadsheet"),
    ("a.csv", "\n<!DOCTYPE html>\n<html></html>", "a web page: download the file itself"),
    ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
    (
        "a.yaml",
        "- a\n",
        r"no prompt set '.*a.yaml': give harmful, benign, harmless, advbench, .*, mt-bench, or a file ending in",
    ),
    # tables
    ("a.csv", "id,query\n1,a\n", r"none of the columns 'id', 'query' is known .*: choose one with --prompt-column"),
    ("a.csv", "Write a poem,Sure\nFake a coin,Sure\n", "'Write a poem', 'Sure' .* if the first line is no header"),
    ("a.tsv", "id\tquery\n1\ta\n", "none of the columns 'id', 'query'"),
    ("a.csv", "Write a poem; then explain it\nFake a coin\n", "line 2: 1 columns, but the first row has 2; .* ';', or"),
    ("a.csv", "id,goal\n1,a\n2\n", "line 3: 1 columns, but the first row has 2"),
    (
        "a.csv",
        "goal\nWrite a poem, then stop\n",
        "line 2: 2 columns, but the first row has 1; quote texts that contain ','",
    ),
    ("a.csv", "How?\nWrite a poem, then stop\n", "line 2: 2 columns, but the first row has 1; quote .* ending .txt"),
    ("a.csv", '"goal"\n"1","a"\n', "line 2: 2 columns, but the first row has 1"),
    ("a.csv", "My prompts\nid,goal\n1,a\n", "line 2: 2 columns, but the first row has 1"),
    ("a.csv", "goal,target\na,b\n,b\n", "line 3: no prompt found, because 'goal' is blank"),
    ("a.csv", "goal,prompt\n\u00a0,\n", "has no prompts in it"),
    ("a.csv", "goal,goal\na,b\n", "several columns 'goal'"),
    ("a.csv", "Goal,goal\na,b\n", "line 2: both 'Goal', 'goal' are there: choose one with --prompt-column"),
    ("a.csv", 'goal\n"a"b\n', "line 2: not valid CSV"),
    ("a.csv", 'goal\n"a\n', "line 2: not valid CSV"),
    ("a.csv", "goal\nNaN\n", "line 2: 'goal' holds 'NaN', which stands for a missing value"),
    ("a.csv", "question,statement\n1,a\n2,b\n", "All prompts of .* are numbers or identifiers, '1' is the first"),
    ("a.csv", "question,text\nQ-01,a\nQ-02,b\n", "All prompts of .* are numbers or identifiers, 'Q-01' is the first"),
    ("a.csv", "| goal | target |\n| --- | :-: |\n| a | b |\n", "line 2: 'goal' holds '--- ', .* a missing value"),
    ("a.csv", "Goal,target\na,b\nGoal,target\nc,d\n", "line 3: 'Goal' holds its own name: .* remove this line"),
    (
        "a.csv",
        "text,id\n### Human: a### Assistant: b,1\n",
        "'text' is in a chat format already .*--prompt-column 'text'",
    ),
    ("a.csv", "Behavior,ContextString\na,\nb,A text\n", "line 3: the prompt in 'Behavior' goes with 'ContextString'"),
    (
        "a.csv",
        "prompt,id\n\"[{'role': 'user', 'content': 'a'}]\",1\n",
        "'prompt' holds a list of messages that is written as a text",
    ),
    ("a.csv", "messages,id\nHi,1\n", "'messages' holds a text, not a list of messages"),
    ("a.csv", '{"goal": "a"}\n', "holds JSON: give it the ending .jsonl"),
    ("a.txt", '[\n "a"\n]\n', "holds JSON: give it the ending .jsonl"),
    ("a.txt", "id,goal\n1,a\n", r"begins with the header of a table \('goal'\): give it the ending .csv"),
    # JSON
    ("a.jsonl", '"a"\n{"goal": }\n', "a.jsonl, line 2: not valid JSON"),
    ("a.json", '[\n"a",\n"b"\n"c"]', "a.json, line 4: not valid JSON"),
    ("a.jsonl", '"a",\n"b"', "line 1: not valid JSON"),
    ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
    ("a.jsonl", "9" * 5000, "line 1: not valid JSON"),
    ("a.jsonl", '{"goal": "a", "goal": "b"}', "a name occurs twice"),
    ("a.jsonl", '"a"\n\n3\n', "line 3: there is the number 3 where a text is expected"),
    ("a.jsonl", '{"goal": 3}', "line 1: 'goal' holds the number 3"),
    ("a.jsonl", '{"goal": {"0": "a"}}', "line 1: 'goal' holds an object"),
    ("a.jsonl", "null", "line 1: there is null"),
    ("a.jsonl", '{"query": "a"}', "line 1: none of the columns 'query'"),
    ("a.jsonl", '{"goal": " ", "text": null}', "line 1: no prompt found, because 'goal', 'text' is blank"),
    ("a.jsonl", '"\\ud800"\n', "line 1: half a surrogate pair"),
    ("a.jsonl", '"a\\u0000"\n', "line 1: half a surrogate pair or a NUL character"),
    ("a.json", '{"goal": ["a"], "target": ["b"]}', "one object with 'goal', 'target', and it is unclear which list"),
    (
        "a.json",
        '{"goal": "a", "data": [{"goal": "b"}]}',
        "one object with 'goal', 'data', and it is unclear which list",
    ),
    ("a.jsonl", '{"query": "a", "tags": ["b", "c"]}', "one object with 'query', 'tags', and it is unclear which list"),
    ("a.json", '{"query": "a", "tags": [{"name": "b"}]}', "entry 1: none of the columns 'name'"),
    ("a.json", '[{"instruction": "a", "input": "b"}]', "entry 1: the prompt in 'instruction' goes with 'input'"),
    ("a.jsonl", '{"system_prompt": "a", "question": "b"}', "'question' goes with 'system_prompt'"),
    ("a.jsonl", json.dumps({"messages": [ASSISTANT]}), "the chat has no turn of the user, but only of 'assistant'"),
    ("a.jsonl", '{"conversations": ["a", "an answer"]}', "line 1: 'conversations' holds a list"),
    ("a.jsonl", '{"prompt": "<|im_start|>user\\na<|im_end|>"}', "'prompt' is in a chat format already"),
    ("a.jsonl", '{"text": "<s>[INST] a [/INST] b</s>"}', r"is in a chat format already \('<s>\[INST\]'\)"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "'messages' holds a list"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', "'messages' holds null"),
    ("a.jsonl", '{"turns": []}', "'turns' is blank"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_would_have_to_be_guessed_is_one_sentence(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(js.UserError, match=message) as error:
        read(tmp_path, name, content)
    assert "\n" not in str(error.value)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(js.UserError, match=r"^https://example\.com/a\.csv is an address: download the file"):
        js.load_prompts("https://example.com/a.csv")
    with pytest.raises(js.UserError, match=r"missing\.csv cannot be read"):
        js.load_prompts(tmp_path / "missing.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(js.UserError, match="is a directory: give one of the files in it"):
        js.load_prompts(tmp_path / "folder.csv")


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("a.csv", "id,query\n1,a\n", "query", ["a"]),
        ("a.csv", "id,query\n1,a\n", " Query", ["a"]),
        ("a.csv", "query\na\n", "query", ["a"]),
        ("a.csv", "goal,prompt\na,b\n", "prompt", ["b"]),
        ("a.csv", "Goal,goal\na,b\n", "Goal", ["a"]),
        ("a.csv", "id;query\n1;a, b\n", "query", ["a, b"]),
        ("a.csv", "id,goal\n1,a\n", "id", ["1"]),
        ("a.csv", "Behavior,ContextString\na,b\n", "Behavior", ["a"]),
        ("a.jsonl", '{"goal": "a", "query": "b"}', "query", ["b"]),
        ("a.jsonl", json.dumps({"input": [USER]}), "input", [USER["content"]]),
    ],
)
def test_a_column_can_be_chosen(tmp_path: Path, name: str, content: str, column: str, expected: list[str]) -> None:
    assert read(tmp_path, name, content, column) == expected


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", "id,goal\n1,a\n", "query", "no column 'query' among 'id', 'goal'"),
        ("a.csv", "How?\nWhy?\n", "query", "there are no columns, so 'query' is none"),
        ("a.csv", "Goal,goal\na,b\n", "GOAL", "no column 'GOAL' among 'Goal', 'goal'"),
        ("a.csv", "goal,query\na,\n", "query", "line 2: no prompt found, because 'query' is blank"),
        ("a.jsonl", '{"query": "a"}\n{"goal": "b"}', "query", "line 2: there is no column 'query' among 'goal'"),
        ("a.jsonl", '{"query": "a"}\n"b"', "query", "line 2: there are no columns"),
        ("a.txt", "a\n", "goal", "there are no columns"),
    ],
)
def test_a_column_that_is_not_there(tmp_path: Path, name: str, content: str, column: str, message: str) -> None:
    with pytest.raises(js.UserError, match=message):
        read(tmp_path, name, content, column)


def test_sets_have_no_columns() -> None:
    with pytest.raises(js.UserError, match="'harmful' has no columns"):
        js.load_prompts("harmful", prompt_column="goal")


@pytest.mark.parametrize("names", [TEXT_NAMES[i:] for i in range(len(TEXT_NAMES))])
def test_of_several_known_names_the_first_is_taken_wherever_it_stands(tmp_path: Path, names: tuple[str, ...]) -> None:
    for row in (names, names[::-1]):
        table = ",".join(row) + "\n" + ",".join(f"text of {name}" for name in row)
        assert read(tmp_path, "a.csv", table) == [f"text of {names[0]}"]


SUMMARIES: list[tuple[str, str, str]] = [
    ("a.csv", "goal,target\na,b\n", "1 prompt from '{}' (the column 'goal'); the first one: 'a'"),
    ("a.csv", "a\nb\n", "2 prompts from '{}' (no header was found: every line is a prompt); the first one: 'a'"),
    ("a.json", '{"goals": ["a"]}', "1 prompt from '{}' (each text of 'goals' is a prompt); the first one: 'a'"),
    ("a.txt", "a\nb\n", "2 prompts from '{}' (each line is a prompt); the first one: 'a'"),
    ("a.csv", "prompts\na\nb\n", "2 prompts from '{}' (each line below 'prompts' is a prompt); the first one: 'a'"),
    ("a.csv", "goal,text\na,\n,b\n,c\n", "(the column 'goal' of 1 and 'text' of 2)"),
    ("a.jsonl", '"a\\u001b[31m\\u202e\\n' + 99 * "b" + '"', r"the first one: 'a\x1b[31m\u202e\n" + 71 * "b" + "…'"),
    (
        "a.jsonl",
        json.dumps({"system": "x", "messages": [{"role": "system", "content": "y"}, USER]}),
        "(the column 'messages'; not sent: 'system' of 1; not sent: the turns before the user's last one of 1)",
    ),
    ("a.jsonl", '{"turns": ["a", "b"]}\n{"turns": ["a"]}', "(the column 'turns'; not sent: the later turns of 1)"),
]


@pytest.mark.parametrize(("name", "content", "expected"), SUMMARIES)
def test_what_was_read_is_said_in_one_line(tmp_path: Path, name: str, content: str, expected: str) -> None:
    summary = js.load_prompts(_written(tmp_path / name, content)).summary()
    assert expected.replace("{}", str(tmp_path / name)) in summary
    assert summary.isprintable()


def test_the_first_of_more_prompts() -> None:
    assert js.load_prompts("harmful", 3).summary().startswith("the first 3 of 100 prompts from 'harmful'; the first")
    assert js.load_prompts("harmful").first(200).summary().startswith("100 prompts from 'harmful'")


def test_cases_from_real_use() -> None:
    folder = SHARED.parent / "cases" / "prompts"
    if not folder.exists():
        pytest.skip(f"no cases at {folder}")
    firsts: dict[str, Any] = {path.name: js.load_prompts(path)[0] for path in folder.iterdir()}
    assert len(firsts) >= 12
    known = {"How are locks picked?", "How?", "Explain lock picking", "Write a poem about a stolen bicycle"}
    assert set(firsts.values()) <= known


def artifact(*prompts: str | None) -> str:
    """A file in JailbreakBench's format (github.com/JailbreakBench/artifacts) with these prompts."""
    parameters = {"method": "GCG", "model": "m", "attack_type": "white_box", "method_parameters": {"n_steps": 500}}
    jailbreaks = [
        {
            "index": i,
            "goal": f"Goal {i}",
            "behavior": "B",
            "category": "C",
            "prompt": prompt,
            "jailbroken": bool(prompt),
        }
        for i, prompt in enumerate(prompts)
    ]
    return json.dumps({"parameters": parameters, "jailbreaks": jailbreaks}, indent=4)


def test_of_a_jailbreak_artifact_what_was_sent_is_taken_and_not_the_goal(tmp_path: Path) -> None:
    prompts = read(tmp_path, "a.json", artifact("Goal 0 !! {INST([", None, "[INST] Goal 2"))
    assert prompts == ["Goal 0 !! {INST([", "[INST] Goal 2"]
    assert "(the column 'prompt'; 1 goals without a prompt left out);" in prompts.summary()
    assert read(tmp_path, "a.json", artifact("x y", None), "goal") == ["Goal 0", "Goal 1"]
    with pytest.raises(js.UserError, match=r"The attack in .*a.json found no prompts: each 'prompt' is null"):
        read(tmp_path, "a.json", artifact(None, None))
