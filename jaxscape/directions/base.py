"""The protocol of a recipe: a description from which the same directions can be made again."""

from typing import ClassVar, Protocol, runtime_checkable

from jaxscape.directions.storage import Direction
from jaxscape.models.model import Model


@runtime_checkable
class Recipe(Protocol):
    """Where directions come from. The recipes of one kind are a class; `jaxscape.directions.kinds` lists the kinds.

    `str(recipe)` is the recipe's name, `KIND:OPTION`, from which `parse` makes it again.

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

    @classmethod
    def parse(cls, option: str) -> "Recipe":
        """The recipe that the text after `KIND:` describes.

        Raises:
            UserError: the text describes no direction of this kind.
        """
        ...

    def make(self, model: Model) -> list[Direction]:
        """The directions, each a tree like `model.params`.

        Raises:
            UserError: a file or model cannot be read, or does not fit this model.
        """
        ...
