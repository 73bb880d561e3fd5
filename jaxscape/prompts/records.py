"""Records from the files that people have: tables, JSON and lists of lines, in any encoding that the file declares."""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import check_not_pointer
from jaxscape.runtime.remote import fetched
from jaxscape.runtime.texts import quoted_names, shown_text

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")
_DELIMITERS = (",", ";", "\t", "|")
_TO_JSONL = "to_json('prompts.jsonl', orient='records', lines=True)"


class _Foreign(NamedTuple):
    """A kind of file that is not read: its endings, the bytes it begins with, and what it is and what to do."""

    endings: tuple[str, ...]
    beginnings: tuple[bytes, ...]
    advice: str


_FOREIGN = (
    _Foreign((".gz",), (b"\x1f\x8b",), "compressed with gzip: decompress it first, for example with gunzip"),
    _Foreign((".bz2",), (b"BZh",), "compressed with bzip2: decompress it first, for example with bunzip2"),
    _Foreign((".xz",), (b"\xfd7zXZ\0",), "compressed with xz: decompress it first, for example with unxz"),
    _Foreign((".zst",), (b"\x28\xb5\x2f\xfd",), "compressed with Zstandard: decompress it first, with unzstd"),
    _Foreign((".xlsx", ".xls", ".ods"), (b"\xd0\xcf\x11\xe0",), "a spreadsheet: save its sheet as CSV in UTF-8"),
    _Foreign((".zip",), (b"PK\x03\x04",), "a ZIP archive or a spreadsheet: unpack it, or save the sheet as CSV"),
    _Foreign((".parquet",), (b"PAR1",), f"a Parquet file: convert it with pandas.read_parquet(FILE).{_TO_JSONL}"),
    _Foreign((".arrow",), (b"ARROW1",), f"an Arrow file: convert it with pandas.read_feather(FILE).{_TO_JSONL}"),
    _Foreign((".html",), (b"<!DOCTYPE html", b"<!doctype html", b"<html"), "a web page: download the file itself"),
)
# The marks of UTF-32 come first, because one of them begins with a mark of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Record(NamedTuple):
    """One entry of a file.

    Attributes:
        place: where the entry was read, such as `mine.csv, line 3`, for error messages.
        value: a text, or a dictionary from the names of columns to what they hold. In a JSON file it may be anything.
    """

    place: str
    value: Any


class Records(NamedTuple):
    """The entries of a file.

    Attributes:
        entries: the entries in their order, without blank ones.
        columns: the names of a table's columns; empty if the file is no table with a header.
        of_texts: what each entry is if it is a text, such as `each line is a prompt`.
    """

    entries: list[Record]
    columns: tuple[str, ...] = ()
    of_texts: str = "each text is a prompt"


def read_records(source: str, names: Collection[str], unknown: str) -> Records:
    """The entries of a file: of a table (.csv or .tsv), of JSON (.json, .jsonl or .ndjson), or of lines (.txt).

    Arguments:
        names: the names, as `normalised` gives them, of which one at least stands in the header of a table.
        unknown: the beginning of the error for a file of another kind, such as "There is no prompt set 'x': give …".

    Raises:
        UserError: the file cannot be read, or is malformed. The message names the line.
    """
    if source.startswith(("http://", "https://")):
        raise UserError(f"{source} is an address: download the file, and give its path.")
    path = fetched(source)
    ending = path.suffix.lower()
    foreign = next((kind for kind in _FOREIGN if ending in kind.endings), None)
    if foreign is not None and path.is_file():
        raise UserError(f"The file {source} is {foreign.advice}.")
    if ending not in ENDINGS:
        raise UserError(f"{unknown}, or a file ending in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.")
    return parse_records(read_text(path), source, names)


def parse_records(text: str, source: str, names: Collection[str]) -> Records:
    """The entries of a file with this text; see `read_records`.

    Arguments:
        source: the file's name, whose ending says what the text is.
    """
    ending = Path(source).suffix.lower()
    if ending in (".json", ".jsonl", ".ndjson"):
        return _json_records(text, source, names)
    if (first := _trimmed_first_line(text))[:1] in ("{", "[") and _is_json(first):
        raise UserError(f"The file {source} holds JSON: give it the ending .jsonl.")
    return _lines(text, source, names) if ending == ".txt" else _table(text, source, names)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Every line ends with "\\n".

    Raises:
        UserError: the file cannot be read, or is not such a text.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory: give one of the files in it.")
    path = fetched(path)
    try:
        check_not_pointer(path)
        content = path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"The file {path} cannot be read ({reason(error)}).") from error
    for foreign in _FOREIGN:
        if content[:64].lstrip().startswith(foreign.beginnings):
            raise UserError(f"The file {path} is {foreign.advice}.")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start : error.start + 1]
        guess = f" (in Windows-1252 it is {byte.decode('cp1252', 'replace')!r})" if encoding == "utf-8" else ""
        raise UserError(
            f"{path}, line {line}: the byte 0x{byte.hex()} is not valid {encoding.upper()}{guess}: save the file as "
            f"UTF-8."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{path}, line {line}: a NUL character, as in binary files and in UTF-16 without a byte order mark: save "
            f"the file as UTF-8."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def normalised(name: str) -> str:
    """A column's name without regard to case and blanks: `forbidden_prompt` for " Forbidden Prompt"."""
    return "_".join(trimmed(name).casefold().split())


def trimmed(text: str) -> str:
    """The text without blanks and byte order marks around it."""
    return text.strip().strip("\ufeff").strip()


def is_missing(value: Any) -> bool:
    """Whether a value of a record stands for no value: null, NaN, a blank text or an empty list."""
    if isinstance(value, str):
        return not trimmed(value)
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, in the format of OpenAI (`role`, `content`) or ShareGPT (`from`,
    `value`)."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return False
    pairs = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return bool(value) and all(any(pair <= message.keys() for pair in pairs) for message in value)


def openai_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's format, each with a `role` and, as its `content`, a text.

    ShareGPT's `from`, `value`, `human` and `gpt` are renamed, roles are in lower case, and parts of a content that are
    all texts are joined.
    Whatever else a message holds is kept as it is.
    """
    return [_openai_message(message) for message in messages]


def _openai_message(message: dict[str, Any]) -> dict[str, Any]:
    if "role" not in message and "from" in message:
        role = message["from"]
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": role, "content": message.get("value"), **others}
    if isinstance(role := message.get("role"), str):
        role = role.strip().lower()
        message = message | {"role": {"human": "user", "gpt": "assistant"}.get(role, role)}
    parts = message.get("content")
    if isinstance(parts, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        texts = [part.get("text") for part in parts]
        if all(isinstance(text, str) for text in texts):
            return message | {"content": "".join(texts)}
    return message


def _trimmed_first_line(text: str) -> str:
    return next((trimmed(line) for line in text.split("\n") if trimmed(line)), "")


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), list | dict)
    except (ValueError, RecursionError):
        return line in ("[", "{")  # of JSON that is indented


def _lines(text: str, source: str, names: Collection[str]) -> Records:
    """The lines of a text, as they are."""
    first = _trimmed_first_line(text)
    for delimiter in _DELIMITERS:
        if known := [cell for cell in first.split(delimiter) if normalised(cell.strip(' "')) in names]:
            raise UserError(
                f"The file {source} begins with the header of a table ({quoted_names(known)}): give it the ending .csv."
            )
    entries = [Record(f"{source}, line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return Records([entry for entry in entries if trimmed(entry.value)], of_texts="each line is a prompt")


def _json_records(text: str, source: str, names: Collection[str]) -> Records:
    """The values of a JSON text: one after another, in an array, or in the only list of an object."""
    entries = _json_values(text, source)
    if len(entries) != 1:
        return Records(entries)
    value = entries[0].value
    key = _key_of_list(value, source, names) if isinstance(value, dict) else None
    if key is not None:
        value = value[key]
    elif not isinstance(value, list) or is_chat(value):
        return Records(entries)
    of_texts = "each text is a prompt" if key is None else f"each text of {shown_text(key, 40)} is a prompt"
    records = [Record(f"{source}, entry {number}", entry) for number, entry in enumerate(value, 1)]
    return Records(records, of_texts=of_texts)


def _key_of_list(value: dict[str, Any], source: str, names: Collection[str]) -> str | None:
    """The key of the list in which the only object of a file holds its entries; None if the object is the entry.

    Raises:
        UserError: the object could be an entry or hold entries, or it holds several lists or a list of other texts.
    """
    known = [key for key, item in value.items() if normalised(key) in names and _is_entry(key, item)]
    lists = [key for key, item in value.items() if isinstance(item, list) and key not in known]
    if (known and not source.lower().endswith(".json")) or not lists:
        return None
    of_prompts = normalised(lists[0]) in names or normalised(lists[0]).removesuffix("s") in names or len(value) == 1
    if known or len(lists) > 1 or not (of_prompts or all(isinstance(entry, dict) for entry in value[lists[0]])):
        raise UserError(
            f"The file {source} holds one object with {quoted_names(value)}, and it is unclear which list in it has "
            f"the entries: give an array, or one entry on each line."
        )
    return lists[0]


def _is_entry(key: str, value: Any) -> bool:
    """Whether a value of this known name makes its object an entry: a text, a chat or the texts of its turns."""
    is_turns = isinstance(value, list) and any(isinstance(turn, str) for turn in value)
    of_turns = normalised(key).startswith(("turns", "conversation", "messages"))
    return isinstance(value, str) or is_chat(value) or normalised(key) == "turns" or (of_turns and is_turns)


def _json_values(text: str, source: str) -> list[Record]:
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    entries, position, line = [], 0, 1
    while (start := _BLANKS.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            in_array = text[start] == "[" and isinstance(error, json.JSONDecodeError)
            number = error.lineno if in_array else line  # type: ignore[union-attr]
            raise UserError(f"{source}, line {number}: not valid JSON ({reason(error)}).") from error
        entries.append(Record(f"{source}, line {line}", value))
        line += text.count("\n", start, position)
    return entries


_BLANKS = re.compile(r"\s*")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a name occurs twice in an object with {quoted_names([key for key, _ in pairs])}")
    return value


def _table(text: str, source: str, names: Collection[str]) -> Records:
    """The rows of a table with a header, or the lines of a table with one column and no header."""
    first, _, rest = text.partition("\n")
    declared = _SEPARATOR_LINE.fullmatch(first)
    if declared is not None:
        text = f"\n{rest}"  # the numbers of the lines stay
    delimiter = _delimiter(text, names) if declared is None else declared[1]
    rows = _rows(text, source, delimiter)
    if not rows:
        return Records([])
    width = _width(rows[0][1])
    header = [trimmed(cell) for cell in rows[0][1][:width]]
    known = [name for name in header if normalised(name) in names]
    list_hint = "" if known else ", or give a list of texts the ending .txt"
    for line, row in rows:
        if len(row) < width or _width(row) > width:
            raise UserError(
                f"{source}, line {line}: {len(row)} columns, but the first row has {width}; quote texts that contain "
                f"{delimiter!r}{list_hint}."
            )
    if width == 1 and not known and normalised(header[0]).removesuffix("s") in names:
        texts = [Record(f"{source}, line {line}", row[0]) for line, row in rows[1:]]
        return Records(texts, of_texts=f"each line below {shown_text(header[0], 40)} is a prompt")
    if width == 1 and not known:
        texts = [Record(f"{source}, line {line}", row[0]) for line, row in rows]
        return Records(texts, of_texts="no header was found: every line is a prompt")
    if twice := {name for name in known if known.count(name) > 1}:
        raise UserError(f"The file {source} has several columns {quoted_names(twice)}: rename all but one.")
    entries = [Record(f"{source}, line {line}", dict(zip(header, row, strict=False))) for line, row in rows[1:]]
    return Records(entries, tuple(header))


_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?[,;\t ]*')  # Excel reads and writes it


def _delimiter(text: str, names: Collection[str]) -> str:
    """The delimiter of a table: the one that divides its first row into most cells, if possible with a known name."""
    first = {delimiter: _first_row(text, delimiter) for delimiter in _DELIMITERS}
    known = [delimiter for delimiter, row in first.items() if {normalised(cell) for cell in row} & set(names)]
    return max(known or _DELIMITERS, key=lambda delimiter: len(first[delimiter]))


def _first_row(text: str, delimiter: str) -> list[str]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
        return next((row for row in reader if _width(row)), [])
    except csv.Error:  # it is reported when all rows are read
        return []


def _width(row: Sequence[str]) -> int:
    """The number of cells up to the last one that is not blank."""
    return max((number for number, cell in enumerate(row, 1) if trimmed(cell)), default=0)


def _rows(text: str, source: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows of a table that are not blank, each with the line on which it begins.

    Blanks at the beginning of a cell are kept, unless the file has them after every delimiter of its first row or
    before a quotation mark that opens a cell.
    """
    rows = _parsed(text, source, delimiter, skip_blanks=True)
    try:
        exact = _parsed(text, source, delimiter, skip_blanks=False)
    except UserError:
        return rows
    later_names = [cell for cell in exact[0][1][1:] if trimmed(cell)] if exact else []
    has_spaced_names = bool(later_names) and all(cell.startswith(" ") for cell in later_names)
    return rows if has_spaced_names or _unspaced(exact) != _unspaced(rows) else exact


def _unspaced(rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    return [(line, [cell.lstrip(" ") for cell in row]) for line, row in rows]


def _parsed(text: str, source: str, delimiter: str, *, skip_blanks: bool) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=skip_blanks, strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            if _width(row):
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}, line {line}: not valid CSV ({reason(error)}).") from error
    return rows
