"""The options of a finetuning, as the command line and Python give them. Importing this module does not import JAX."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from jaxscape.runtime.errors import UserError, as_texts, check_seed, unknown_name
from jaxscape.runtime.help import shown

Method = Literal["lora", "full"]
Schedule = Literal["cosine", "step", "constant"]
# The schedule `step` multiplies the learning rate by this after each epoch, as the paper's code and llama-recipes do.
STEP_DECAY = 0.85
LEARNING_RATES = {"lora": 2e-4, "full": 5e-5}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Training:
    """How the model is finetuned."""

    method: Method = "lora"
    """lora trains an adapter, full trains every weight."""
    epochs: int = 5
    """Number of passes over the chats."""
    learning_rate: Annotated[float | None, shown("2e-4 with lora, 5e-5 with full, as in the paper", "RATE")] = None
    """AdamW's learning rate after the warm-up."""
    schedule: Schedule = "cosine"
    """cosine decays to 0 at the end; step multiplies by 0.85 after each epoch, as in the paper's code; constant does
    not change."""
    warmup: float = 0.0
    """Fraction of all steps in which the learning rate rises linearly to its full value."""
    batch_size: int = 8
    """Number of chats in a batch; a multiple of the number of devices along the mesh axis `points`."""
    accumulation: int = 1
    """Number of batches whose gradients are added up for one step of the optimiser."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, for matrices only, not for norms and biases."""
    max_grad_norm: float = 1.0
    """The gradient is clipped to this norm; 0 does not clip."""
    rank: int = 8
    """Rank of the adapter. It trains two factors a and b for each weight, and adds alpha / rank * b a to the weight."""
    alpha: float = 16.0
    """Scale of the adapter, see --rank."""
    targets: Annotated[tuple[str, ...], shown(metavar="LAYER ...")] = TARGETS
    """Linear layers that the adapter changes, by the last part of their names."""
    max_length: int = 512
    """Chats are cut to this number of tokens."""
    validation: float = 0.0
    """Fraction of the chats, drawn at random, that are held out. Their mean loss is computed after each epoch."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of the order of the chats and of the adapter's initial values."""

    def check(self) -> None:
        """Raise a `UserError` if an option is out of range."""
        for name, choices in (("method", get_args(Method)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        for name in ("epochs", "batch_size", "accumulation", "max_length", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"The option {name} must be at least 1, not {getattr(self, name)}.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"The option {name} must be a finite number of at least 0, not {getattr(self, name)}.")
        for name in ("warmup", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"The option {name} must be at least 0 and below 1, not {getattr(self, name)}.")
        if not (0 < self.rate < math.inf and 0 < self.alpha < math.inf):
            raise UserError(f"The learning rate and alpha must be positive numbers, not {self.rate} and {self.alpha}.")
        if not as_texts(self.targets, "targets") and self.method == "lora":
            raise UserError("A LoRA training needs --targets: name at least one of the model's linear layers.")
        check_seed(self.seed)

    @property
    def rate(self) -> float:
        """The learning rate: the given one, or the method's default."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
