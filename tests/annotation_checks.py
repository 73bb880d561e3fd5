"""Checks of annotations at run time, as jaxtyping's import hook makes them, but quicker where they name no shape."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping

check_shapes = jaxtyping.jaxtyped

SHAPE_OR_TEXT = re.compile(r"jaxtyping\.|ForwardRef|(?<!<class )'(?!>)")  # in an annotation's repr


def check_quickly() -> None:
    """Let `checked` check modules imported from now on: the hook calls jaxtyping's decorator by its name."""
    jaxtyping.jaxtyped = lambda *, typechecker: partial(checked, typechecker=typechecker)


def checked(definition: Any, typechecker: Any) -> Any:
    """A function or class whose calls are checked. What names no shape is left to the type checker alone: jaxtyping
    calls it twice and binds the arguments to their names in between, which takes twenty times as long."""
    if inspect.isclass(definition):
        if dataclasses.is_dataclass(definition) and "__init__" in vars(definition):
            definition.__init__ = checked(definition.__init__, typechecker)
        return definition
    if inspect.isfunction(definition) and not names_shapes(definition):
        return typechecker(definition)
    return check_shapes(definition, typechecker=typechecker)


def names_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation names a shape, or holds a text, which jaxtyping reads as far as it can."""
    annotations = function.__annotations__.values()
    return any(isinstance(each, str) or SHAPE_OR_TEXT.search(repr(each)) for each in annotations)
