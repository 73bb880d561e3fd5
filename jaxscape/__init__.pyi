# The public names and where they are defined. Type checkers read this file, and jaxscape/__init__.py loads each name
# from here when it is first used.
from .directions.difference import difference
from .directions.files import load_direction, save_direction
from .directions.kinds import make_directions, model_at
from .directions.path import load_path
from .directions.random import random_direction
from .engine.engine import generate
from .engine.options import EngineOptions
from .evaluate.base import Evaluator
from .evaluate.evaluators import evaluator
from .evaluate.keywords import attack_success_rate
from .evaluate.perplexity import perplexity
from .evaluate.statistics import wilson_interval
from .finetuning.chats import load_chats
from .finetuning.options import Training
from .finetuning.run import finetune
from .finetuning.trajectory import Trajectory, load_trajectories, project, save_trajectories
from .landscapes.axes import Axis, interpolation_axis
from .landscapes.comparison import Comparison, compare
from .landscapes.landscape import Landscape
from .landscapes.measure import measure
from .landscapes.measurement import Measurement
from .landscapes.merge import merge
from .landscapes.radii import Certificate, Radii, Ray
from .landscapes.radius import certify, radius
from .landscapes.scan import scan
from .landscapes.score import score
from .landscapes.visage import visage
from .models.model import Model, load_model, save_model
from .prompts.refusal import is_refusal
from .prompts.sets import load_prompts
from .report.comparison import plot_comparison, save_comparison
from .report.figures import plot_landscape, save_figure
from .report.measures import plot_measures
from .report.page.document import save_report
from .runtime.errors import UserError
from .runtime.sharding import MeshShape, Split

__version__: str

__all__ = [
    "Axis",
    "Certificate",
    "Comparison",
    "EngineOptions",
    "Evaluator",
    "Landscape",
    "Measurement",
    "MeshShape",
    "Model",
    "Radii",
    "Ray",
    "Split",
    "Training",
    "Trajectory",
    "UserError",
    "attack_success_rate",
    "certify",
    "compare",
    "difference",
    "evaluator",
    "finetune",
    "generate",
    "interpolation_axis",
    "is_refusal",
    "load_chats",
    "load_direction",
    "load_model",
    "load_path",
    "load_prompts",
    "load_trajectories",
    "make_directions",
    "measure",
    "merge",
    "model_at",
    "perplexity",
    "plot_comparison",
    "plot_landscape",
    "plot_measures",
    "project",
    "radius",
    "random_direction",
    "save_comparison",
    "save_direction",
    "save_figure",
    "save_model",
    "save_report",
    "save_trajectories",
    "scan",
    "score",
    "visage",
    "wilson_interval",
]
