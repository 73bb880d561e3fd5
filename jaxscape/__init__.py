"""Safety landscapes of large language models, in JAX."""

import os

# transformers would say at import that without PyTorch it has no models; none of its models is used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxscape.chats import load_chats
from jaxscape.engine import generate
from jaxscape.errors import UserError
from jaxscape.evaluate import attack_success_rate, is_refusal, wilson_interval
from jaxscape.finetune import finetune
from jaxscape.landscape import Axis, Landscape, interpolation_axis, visage
from jaxscape.models import Model, load_model, save_model
from jaxscape.perturb import difference, load_direction, random_direction, save_direction
from jaxscape.plan import EngineOptions
from jaxscape.plotting import plot_landscape
from jaxscape.prompts import load_prompts
from jaxscape.scan import scan
from jaxscape.sharding import Split
from jaxscape.training import Training, perplexity

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "EngineOptions",
    "Landscape",
    "Model",
    "Split",
    "Training",
    "UserError",
    "attack_success_rate",
    "difference",
    "finetune",
    "generate",
    "interpolation_axis",
    "is_refusal",
    "load_chats",
    "load_direction",
    "load_model",
    "load_prompts",
    "perplexity",
    "plot_landscape",
    "random_direction",
    "save_direction",
    "save_model",
    "scan",
    "visage",
    "wilson_interval",
]
