"""The protocols of recipes: descriptions from which the same directions can be made again.

A recipe has a name, `KIND` or `KIND:OPTION`. The name of a recipe that is made of others begins with theirs, each in
square brackets: `orthogonal:[gradient][random:0]`, or `restricted:[random:0]:*mlp*`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxscape.directions.storage import Direction
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError

T = TypeVar("T", int, float)


DEFAULT_RADIUS = 0.5


@runtime_checkable
class Recipe(Protocol):
    """Where directions come from. The recipes of one kind are a class; `jaxscape.directions.kinds` lists the kinds.

    `str(recipe)` is the recipe's name. Seven further attributes may be left out:

    - `has_control`: whether a random direction of the same norm and rank is scanned beside it by default; else False.
    - `is_drawn`: whether the directions follow from the name and the weights alone and are made quickly, so that a scan
      makes them when their turn comes; else False.
    - `axis_radius`: how far its axis runs on either side by default; else 0.5.
    - `units`: what a coordinate of 1 along them is, see `jaxscape.landscapes.axes.Axis.unit`; else `("raw",)`.
    - `made_from(model)`: the token ids from which the model computes the directions, for kinds whose tensors have other
      last bits on another machine or mesh. A run then identifies them by the name, the weights and these tokens, and
      not by a checksum of the tensors.
    - `rank_in(model)`: the largest rank of their matrices, where it is known before they are made and they move
      nothing but matrices that are stored as factors; else None.
    - `settled(model)`: the same recipe with every choice made that it leaves to the model, and named in it.

    Attributes:
        kind: what the names of these recipes begin with.
        usage: how a name is written, for messages, such as `random:SEED`.
        is_interpolation: whether the direction leads to another model, which lies at coordinate 1.
    """

    kind: ClassVar[str]
    usage: ClassVar[str]
    is_interpolation: ClassVar[bool]

    @property
    def count(self) -> int:
        """How many directions the recipe makes."""
        ...

    def make(self, model: Model) -> list[Direction]:
        """The directions, each a tree like `model.params`.

        Raises:
            UserError: a file or model cannot be read, or does not fit this model.
        """
        ...


class SimpleRecipe(Recipe, Protocol):
    """A recipe that is made of no other."""

    @classmethod
    def parse(cls, option: str) -> Recipe:
        """The recipe that the text after `KIND:` describes; the text is empty if the name is `KIND` alone.

        Raises:
            UserError: the text describes no direction of this kind.
        """
        ...


class ComposedRecipe(Recipe, Protocol):
    """A recipe that is made of others."""

    @classmethod
    def compose(cls, parts: tuple[Recipe, ...], option: str) -> Recipe:
        """The recipe that is made of the recipes in square brackets, with the text that follows them as its option.

        Raises:
            UserError: there are not as many recipes as this kind needs, one of them makes several directions, or the
                option describes no direction of this kind.
        """
        ...


def with_parts(recipe: Recipe, change: Callable[[Recipe], Recipe]) -> Recipe:
    """A recipe that is made of others, with each of them changed; the same recipe if it is made of none."""
    if not dataclasses.is_dataclass(recipe):
        return recipe
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Recipe):
            parts[field.name] = change(value)
        elif isinstance(value, tuple) and all(isinstance(part, Recipe) for part in value):
            parts[field.name] = tuple(map(change, value))
    return dataclasses.replace(recipe, **parts) if parts else recipe


def parts_of(recipe: Recipe) -> list[Recipe]:
    """The recipes of which a recipe is made; none if it is made of no other."""
    parts: list[Recipe] = []

    def seen(part: Recipe) -> Recipe:
        parts.append(part)
        return part

    with_parts(recipe, seen)
    return parts


def settled(recipe: Recipe, model: Model) -> Recipe:
    """The recipe with every choice made that it or its parts leave to the model."""
    settle: Callable[[Model], Recipe] | None = getattr(recipe, "settled", None)
    return with_parts(recipe, lambda part: settled(part, model)) if settle is None else settle(model)


def has_control(recipe: object) -> bool:
    """Whether a random direction of the same norm and rank is scanned beside a recipe's by default."""
    return bool(getattr(recipe, "has_control", False))


def is_drawn(recipe: object) -> bool:
    """Whether a recipe's directions are made when their turn comes, because they follow from its name and the weights
    alone."""
    return bool(getattr(recipe, "is_drawn", False))


def units_of(recipe: object) -> tuple[str, ...]:
    """What a coordinate of 1 along a recipe's directions is: `tensors`, `weights`, `raw`, or several of these."""
    units: tuple[str, ...] = getattr(recipe, "units", ("raw",))
    return units


def default_radius(recipe: object) -> float:
    """How far the axis along a recipe's direction runs on either side by default."""
    return float(getattr(recipe, "axis_radius", DEFAULT_RADIUS))


def needs_option(kind: type[Any], option: str) -> str:
    """The option of a kind whose name needs one.

    Raises:
        UserError: it is empty.
    """
    if not option:
        raise UserError(f"The direction {kind.kind!r} needs an option: write {kind.usage}.")
    return option


def check_no_option(kind: type[Any], option: str) -> None:
    """Raise a `UserError` if an option was given to a kind that has none."""
    if option:
        raise UserError(f"The direction {kind.kind!r} has no option: write {kind.usage}, and not {option!r} after it.")


def check_parts(kind: type[Any], parts: tuple[Recipe, ...], fewest: int, most: int | None = None) -> None:
    """Raise a `UserError` if a composed recipe has the wrong number of parts, or if a part makes several directions."""
    if len(parts) < fewest or (most is not None and len(parts) > most):
        raise UserError(
            f"The direction {kind.kind!r} has {len(parts)} directions in square brackets: write {kind.usage}."
        )
    for part in parts:
        if part.count != 1:
            raise UserError(
                f"The direction {part} makes {part.count} directions: a direction of the kind {kind.kind!r} is made of "
                f"single ones."
            )


def split_parts(rest: str) -> tuple[list[str], str]:
    """The names in square brackets with which a composed recipe's text begins, and the option after them.

    Raises:
        UserError: the brackets are not closed, or what follows them does not begin with a colon.
    """
    parts: list[str] = []
    while rest.startswith("["):
        depths = list(itertools.accumulate((one == "[") - (one == "]") for one in rest))
        if 0 not in depths:
            raise UserError(f"A square bracket is not closed in {rest!r}: write each direction as [NAME].")
        end = depths.index(0)
        parts.append(rest[1:end])
        rest = rest[end + 1 :]
    if rest and not rest.startswith(":"):
        raise UserError(f"Cannot read {rest!r}: write each direction as [NAME], and an option after a colon.")
    return parts, rest[1:]


def split_options(option: str, count: int) -> list[str]:
    """The first `count` options in the text after `KIND:`; those that are left out are empty. The last one may contain
    colons."""
    parts = option.split(":", count - 1)
    return parts + [""] * (count - len(parts))


def as_number(text: str, name: str, default: T) -> T:
    """The number that an option of a direction's name is, of the type of its default; an empty option is the default.

    Raises:
        UserError: the option is no such number, or is not finite.
    """
    try:
        number = type(default)(text) if text else default
        if not math.isfinite(number):
            raise ValueError
    except ValueError as error:
        kind = "a whole number" if isinstance(default, int) else "a finite number"
        raise UserError(f"The {name} in the name of a direction must be {kind}, not {text!r}.") from error
    return number


def exact_text(number: float) -> str:
    """The text of a number in a direction's name. `float` makes the same number of it."""
    return str(number).removesuffix(".0")


def recipe_name(kind: str, options: Sequence[str], defaults: Sequence[str]) -> str:
    """`KIND:OPTION:…`, without the last options if they have their defaults."""
    used = len(options)
    while used and options[used - 1] == defaults[used - 1]:
        used -= 1
    return ":".join((kind, *options[:used]))
