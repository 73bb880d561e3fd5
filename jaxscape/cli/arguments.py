"""From arguments to the options of a program: tyro does it, with help texts and errors that are easy to read."""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from jaxscape.runtime.errors import UserError, unknown_name
from jaxscape.runtime.texts import did_you_mean

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands, tyro.conf.DisallowNone)
REGISTRY = ConstructorRegistry()


def parse(program: Any, arguments: Sequence[str], name: str, description: str | None) -> Any:
    """The options of a program. `--help` and errors that tyro finds end the process.

    Arguments:
        program: the dataclass of the options.
        name: what the program is called in its help.
        description: what its help begins with.

    Raises:
        UserError: an argument is no option, or an option has a value that is none of its choices.
    """
    check_arguments(program, arguments, name)
    return tyro.cli(program, prog=name, description=description, args=arguments, config=CONFIG, registry=REGISTRY)


def check_arguments(program: Any, arguments: Sequence[str], name: str) -> None:
    """Raise a `UserError` if an argument is no option of the program, or gives an option a value that is none of its
    choices. The error names what is near. Like tyro, it takes every argument that begins with `--` for an option."""
    options: dict[str, tuple[str, ...]] = {"help": ()}
    options |= {field.name.replace("_", "-"): _choices(kind) for field, kind in _options(program)}
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if not argument.startswith("--"):
            continue
        option, equals, value = argument[2:].partition("=")
        option, value = option.replace("_", "-"), value if equals else following
        if option not in options:
            hint = did_you_mean(option, options, {known: f"--{known}" for known in options})
            raise UserError(f"Unknown option --{option}{hint}: see {name} --help.")
        is_missing = not equals and value.startswith("--")
        if options[option] and value not in options[option] and not is_missing:
            raise unknown_name(f"value of --{option}", value, options[option])


def parse_option(program: Any, option: str, arguments: Sequence[str], name: str) -> Any:
    """The value that a program would have for one of its options.

    Arguments:
        program: the dataclass of the options.
        option: the name of its field.
        arguments: what the command line has for the option.
        name: what the program is called in its help.

    Raises:
        UserError: there is no such option, or it does not take these arguments.
    """
    options = {field.name: (field, kind) for field, kind in _options(program)}
    if option not in options:
        raise UserError(f"Unknown option {option}{did_you_mean(option, options)}: see {name} --help.")
    field, kind = options[option]
    alone = dataclasses.make_dataclass("Alone", [(option, kind, dataclasses.field(default=field.default))])
    check_arguments(alone, arguments, name)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where tyro explains errors, on several lines
            return getattr(tyro.cli(alone, args=arguments, config=CONFIG, registry=REGISTRY), option)
    except SystemExit as stop:
        raise UserError(f"{name} does not take {' '.join(arguments)}: see {name} --help.") from stop


def with_values(options: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass of options in which options have other values, also in the dataclasses in it.

    Arguments:
        values: by the names of the options' fields.
    """
    old = {field.name: getattr(options, field.name) for field in fields(options)}
    return replace(
        options,
        **{
            name: with_values(value, values) if is_dataclass(value) else values.get(name, value)
            for name, value in old.items()
        },
    )


def _options(program: Any) -> Iterator[tuple["Field[Any]", Any]]:
    """The options of a dataclass and of the dataclasses in it: their fields, with their annotated types."""
    hints = get_type_hints(program, include_extras=True)
    for field in fields(program):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if is_dataclass(kind):
            yield from _options(kind)
        elif tyro.conf.Positional not in marks:
            yield field, hint


def _choices(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal`, also of one in a union; nothing for another type."""
    if get_origin(kind) is Literal:
        return tuple(map(str, get_args(kind)))
    return next(filter(None, map(_choices, get_args(kind))), ())


@REGISTRY.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's own rule for dataclasses (1.0) would show the line breaks of the source in the help of each option."""
    if not is_dataclass(info.type):
        return None
    hints, helps = get_type_hints(info.type, include_extras=True), _helps(info.type)
    return StructConstructorSpec(
        info.type,
        tuple(
            StructFieldSpec(field.name, hints[field.name], _default(field, info.default), helps.get(field.name))
            for field in fields(info.type)
        ),
    )


@cache
def _helps(kind: type) -> dict[str, str]:
    """The help text of each field of a dataclass, from docstrings. It is kept, because Python parses the source for it,
    and tyro asks several times."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        documented = docstring_parser.parse_from_object(base).params
        helps |= {item.arg_name: " ".join((item.description or "").split()) for item in documented}
    return helps


def _default(field: "Field[Any]", instance: Any) -> Any:
    """The default of a field: its value in an instance of the dataclass, or the field's own."""
    if hasattr(instance, field.name):
        return getattr(instance, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING_NONPROP if field.default is dataclasses.MISSING else field.default
