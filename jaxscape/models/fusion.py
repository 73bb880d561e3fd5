"""Fused projections: queries, keys and values as one matrix product, gate and up as another.

A GPU reads one large matrix faster than several small ones. The decoder multiplies with fused weights if
`ModelConfig.is_fused` is set, as for families whose checkpoints hold them fused. Files, names and directions keep the
separate weights, which are fused only for decoding.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxscape.models.checkpoint import Params, named_leaves, tree_of
from jaxscape.models.config import ModelConfig

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""For each fused projection, the projections whose outputs it has one after the other."""

_PARTS = frozenset(part for parts in FUSED.values() for part in parts)


def fused_config(config: ModelConfig) -> ModelConfig:
    """The configuration of a model whose projections are fused."""
    return replace(config, is_fused=True)


def fuse(params: Params, concatenate: Callable[[list[Any]], Any] = jnp.concatenate) -> Params:
    """A tree like the parameters, with its projections fused; all other leaves are those of the given tree.

    Arguments:
        params: the parameters, or a direction. Its projections may be fused already.
        concatenate: concatenates leaves along their first dimension.
    """
    leaves = named_leaves(params)
    fused = {name: leaf for name, leaf in leaves.items() if not is_part(name)}
    for name in leaves:
        *block, projection, kind = name.split(".")
        for target, parts in FUSED.items():
            if projection == parts[0]:
                tensors = [leaves[".".join((*block, part, kind))] for part in parts]
                fused[".".join((*block, target, kind))] = concatenate(tensors)
    return tree_of(fused)


def is_part(name: str) -> bool:
    """Whether the parameter with this name becomes a part of a fused projection."""
    return name.split(".")[-2] in _PARTS
