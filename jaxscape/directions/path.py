"""The path of a finetuning through weight space, read from the directory in which `jaxscape.finetune` kept the run.

The names of the files that are read here are defined here too, because `finetuning/`, which writes them, may import
`directions/`, but not the reverse.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxscape.models.checkpoint import Params, fingerprint, named_leaves, tree_of
from jaxscape.models.lora import init_factors, with_factors
from jaxscape.models.model import Model
from jaxscape.runtime import reporting, rundir
from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import read_json
from jaxscape.runtime.remote import fetched
from jaxscape.runtime.sharding import replicated

ADAPTER, MODEL, CHECKPOINTS, OPTIMIZER = "adapter", "model", "checkpoints", "optimizer"
FINETUNING = rundir.RunKind(
    "finetuning",
    state="log.jsonl",
    marks=frozenset({"weights", "chats", "learning_rate"}),
    computed=(ADAPTER, MODEL, CHECKPOINTS, OPTIMIZER, *reporting.FOLDERS),
)


def load_path(directory: str | Path, model: Model) -> Iterator[Params]:
    """How far a finetuning had moved the weights at the end of each epoch.

    Arguments:
        directory: where `jaxscape.finetune` kept the run.
        model: the model that the finetuning started from, in the same dtype.

    Yields:
        A float32 tree like `model.params` for each epoch: the weights minus those of `model`.

    Raises:
        UserError: the directory holds no finetuning with a finished epoch, the finetuning started from another model,
            or a file is damaged.
    """
    directory = fetched(directory)
    config = read_json(directory / rundir.CONFIG)
    if not config.keys() >= FINETUNING.marks:
        raise UserError(f"{directory} holds no finetuning: give the directory of a finetuning.")
    if config.get("dtype") != model.dtype:
        raise UserError(
            f"The finetuning in {directory} was made in {config.get('dtype')}, but the model was loaded in "
            f"{model.dtype}: load it with --dtype {config.get('dtype')}."
        )
    if config["weights"] != fingerprint(model.params):
        raise UserError(f"The finetuning in {directory} did not start from the weights of {model.name}.")
    is_full, shapes, scale = _trained(config, directory, model)
    manager = checkpoint_manager((directory / CHECKPOINTS).absolute(), None)
    if not manager.all_steps():
        raise UserError(f"The finetuning in {directory} has not finished an epoch yet: wait until it has.")
    # Restored onto the devices of this model, whichever devices wrote the checkpoint.
    everywhere = replicated(model.mesh)
    shardings = model.shardings if is_full else jax.tree.map(lambda _: everywhere, shapes)
    shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)
    for epoch in sorted(manager.all_steps()):
        try:
            trained = manager.restore(epoch, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # Orbax and its storage raise many types for what is missing or damaged
            raise UserError(
                f"The checkpoint of epoch {epoch} in {directory} cannot be read ({type(error).__name__})."
            ) from error
        if is_full:
            yield jax.tree.map(lambda new, old: new - old.astype(jnp.float32), trained, model.params)
            continue
        steps = {
            name: jnp.zeros(leaf.shape, jnp.float32, device=leaf.sharding)
            for name, leaf in named_leaves(model.params).items()
        }
        for name, pair in jax.device_get(trained).items():
            steps[name] = with_factors(steps[name], pair, scale)
        yield tree_of(steps)


def _trained(config: dict[str, Any], directory: Path, model: Model) -> tuple[bool, Any, float]:
    """Whether all weights were trained; the float32 shapes of what was trained (all weights, or an adapter's factors);
    and the adapter's scale, which is 1 without an adapter."""
    try:
        if config["method"] == "full":
            return True, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), model.params), 1.0
        if config["method"] != "lora":
            raise ValueError(f"the method {config['method']!r} is unknown")
        rank, scale, targets = int(config["rank"]), float(config["alpha"]) / int(config["rank"]), config["targets"]
        key = jax.random.key(0, impl="threefry2x32")
        return False, jax.eval_shape(lambda: init_factors(model.params, tuple(targets), rank, key)), scale
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{directory / rundir.CONFIG} is damaged ({reason(error)}).") from error


def checkpoint_manager(directory: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
    """Orbax's manager of a directory of checkpoints, one for each epoch.

    Arguments:
        max_to_keep: number of checkpoints to keep, the latest ones; None keeps all.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory, options=options)
