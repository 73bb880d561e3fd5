"""The file of a sweep: YAML that gives options of `jaxscape scan`, some of them with several values."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.events import Event
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.texts import did_you_mean, shown_text
from jaxscape.sweeps.cells import Cell, Setting, make_cells

KEYS = ("out", "shards", "scan", "matrix")
RESERVED = ("shards", "notes", "table.md", "table.csv", "report.html")
"""What a sweep's directory holds beside its scans."""
MAX_SCANS, MAX_SHARDS = 10_000, 1_000  # a file that asks for more is probably mistaken
_NULL = "tag:yaml.org,2002:null"

ReadSetting = Callable[[str, tuple[str, ...]], Setting]
"""Returns the setting of an option of `jaxscape scan`, from the option's name and its values as they are written. It
raises a `UserError` if there is no such option, or if the option does not take the values."""


@dataclass(frozen=True)
class SweepFile:
    """What a sweep's file says.

    Attributes:
        out: the sweep's directory.
        shards: the number of shards of each scan.
        cells: the scans.
    """

    out: str
    shards: int
    cells: tuple[Cell, ...]


def read_sweep(path: Path, read_setting: ReadSetting) -> SweepFile:
    """Read a sweep's file.

    Values are taken as they are written, and the parser of the command line says what they mean: YAML's own rules would
    take `on` for a truth value. Nothing but texts is made from the file.

    Raises:
        UserError: the file cannot be read, or something in it is wrong. The message names the line.
    """
    return _Reader(path, read_setting).sweep()


@dataclass(frozen=True)
class _Reader:
    """Reads one file; see `read_sweep`."""

    path: Path
    read_setting: ReadSetting

    def sweep(self) -> SweepFile:
        top = self.mapping(self.root(), "the file")
        for name, node in top.items():
            if name not in KEYS:
                raise self.error(node, f"unknown key {shown_text(name)}{did_you_mean(name, KEYS)}: {_KEYS_TEXT}.")
        fixed_nodes, matrix_nodes = (self.section(top, name) for name in ("scan", "matrix"))
        count = math.prod(len(node.value) for node in matrix_nodes.values() if isinstance(node, SequenceNode))
        if count > MAX_SCANS:
            raise self.error(top["matrix"], f"the matrix has {count} scans: give at most {MAX_SCANS} in one file.")
        fixed = [self.setting(name, node) for name, node in fixed_nodes.items()]
        matrix = {name: self.alternatives(name, node) for name, node in matrix_nodes.items()}
        for setting in fixed:
            if setting.option in matrix:
                raise self.error(top["scan"], f"{setting.option} stands in scan and in matrix: leave out one of them.")
        return SweepFile(
            self.text(top["out"], "out") if "out" in top else f"runs/{self.path.stem}",
            self.shards(top["shards"]) if "shards" in top else 1,
            make_cells(matrix, fixed, RESERVED),
        )

    def root(self) -> Node:
        try:
            text = self.path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            tagged = next((event for event in yaml.parse(text, Loader=yaml.SafeLoader) if _tag(event)), None)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"The sweep {self.path} cannot be read as YAML ({reason(error)}): correct it.") from error
        if node is None:
            raise UserError(f"The sweep {self.path} is empty: {_KEYS_TEXT}.")
        if tagged is not None:  # some tags would make YAML run a program
            raise self.error(tagged, f"the tag {shown_text(_tag(tagged))} is not allowed: leave it out.")
        return node

    def error(self, node: Node | Event, text: str) -> UserError:
        return UserError(f"The sweep {self.path}, line {node.start_mark.line + 1}: {text}")

    def section(self, top: Mapping[str, Node], name: str) -> dict[str, Node]:
        """The nodes of the options in a section, by their names with underscores; none if there is no such section."""
        if name not in top:
            return {}
        options = self.mapping(top[name], name)
        named = {option.replace("-", "_"): node for option, node in options.items()}
        if len(named) < len(options):
            raise self.error(top[name], f"{name} has an option twice, with - and with _: leave out one of them.")
        return named

    def mapping(self, node: Node, what: str) -> dict[str, Node]:
        if not isinstance(node, MappingNode):
            raise self.error(node, f"{what} is {_kind(node)} and no mapping: write 'name: value' lines.")
        nodes: dict[str, Node] = {}
        for key, value in node.value:
            name = self.text(key, f"a key of {what}")
            if name in nodes:
                raise self.error(key, f"{shown_text(name)} stands twice in {what}: leave out one of them.")
            nodes[name] = value
        return nodes

    def alternatives(self, option: str, node: Node) -> list[Setting]:
        """The settings of an option of the matrix."""
        if not isinstance(node, SequenceNode) or not node.value:
            what = "an empty list" if isinstance(node, SequenceNode) else _kind(node)
            raise self.error(node, f"{option} of matrix is {what}: give a list of values, such as [{option}-1].")
        settings: list[Setting] = []
        for item in node.value:
            setting = self.setting(option, item)
            if any(setting.value == other.value for other in settings):
                raise self.error(item, f"{option} of matrix has {shown_text(setting.text)} twice: leave out one.")
            settings.append(setting)
        return settings

    def setting(self, option: str, node: Node) -> Setting:
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        if not nodes:
            raise self.error(node, f"{option} is an empty list: give a value, or leave it out.")
        texts = tuple(self.text(item, option) for item in nodes)
        try:
            return self.read_setting(option, texts)
        except UserError as error:
            raise self.error(node, str(error)) from error

    def shards(self, node: Node) -> int:
        text = self.text(node, "shards")
        if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= MAX_SHARDS:
            raise self.error(node, f"shards is {shown_text(text)}: give a number from 1 to {MAX_SHARDS}.")
        return int(text)

    def text(self, node: Node, what: str) -> str:
        """The text of a value, as it is written."""
        if not isinstance(node, ScalarNode):
            raise self.error(node, f"{what} is {_kind(node)}: give a text or a number.")
        if node.tag == _NULL or not node.value:
            raise self.error(node, f"{what} has no value: give one, or leave it out.")
        return str(node.value)


def _tag(event: Event) -> str:
    """The tag that is written there; empty if there is none."""
    return getattr(event, "tag", None) or ""


def _kind(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return f"the text {shown_text(node.value, 40)}"
    return "a list" if isinstance(node, SequenceNode) else "a mapping"


_KEYS_TEXT = f"the keys of a sweep are {', '.join(KEYS)}"
