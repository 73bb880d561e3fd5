"""The engine's options, as the command line and Python give them. Importing this module does not import JAX."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from jaxscape.runtime.errors import UserError, unknown_name
from jaxscape.runtime.help import shown

FormOption = Literal["auto", "materialised", "factorised", "streamed"]
StorageOption = Literal["auto", "exact", "seed", "bfloat16", "int8"]


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated."""

    max_new_tokens: int = 64
    """Maximum number of tokens generated for a prompt."""
    temperature: float = 0.0
    """0 takes the most likely token; otherwise the logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities add up to p."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine decodes. The planner chooses whatever is left at its default."""

    form: FormOption = "auto"
    """How the weights of a point are computed: materialised forms them on the device; streamed does the same from
    weights that stay in host memory; factorised decodes many points in one batch, which share the weights and the
    directions."""
    slots: Annotated[int | None, shown(default="planned", metavar="N")] = None
    """Number of rows of the batch, each of which generates one answer at a time. Fewer rows take less memory and more
    time."""
    chunk: Annotated[int | None, shown(default="8", metavar="N")] = None
    """Maximum number of tokens that each row decodes before the host checks which answers are finished."""
    direction_storage: StorageOption = "auto"
    """How directions are stored: exact stores them as they are; seed draws a random direction again wherever it is
    used, with the same values; bfloat16 and int8 round the direction, which makes it a different one."""
    full_text: bool = False
    """Generate every answer to its end, even after the evaluators have decided the outcome."""

    def check(self) -> None:
        """Raise a `UserError` if an option is out of range."""
        for name, choices in (("form", get_args(FormOption)), ("direction_storage", get_args(StorageOption))):
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        for name in ("slots", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"The option {name} must be at least 1, not {value}.")
