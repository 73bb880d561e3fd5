"""Activations against those that transformers computes with torch on the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MakeModel

import jaxscape as js
from jaxscape.models.activations import input_moments, next_token_logits, residual_stream
from jaxscape.runtime.sharding import MeshShape

TEXTS = [[5, 9, 200, 31, 7], [8] * 11, [3, 250, 17, 4, 4, 90, 2, 61], list(range(20, 60))]


def torch_stream(torch_model: Any, text: list[int]) -> np.ndarray:
    """transformers' residual stream before each layer, [layers, time, dim]."""
    with torch.no_grad():
        states = torch_model(torch.tensor([text]), output_hidden_states=True).hidden_states
    return torch.cat(states[:-1]).numpy()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_residual_stream_is_that_of_transformers(make_model: MakeModel, family: str) -> None:
    options = {"head_dim": 8} if family == "gemma2" else {}
    directory, torch_model = make_model(family, **options)
    stream = residual_stream(js.load_model(directory, "float32"), TEXTS, 3)
    assert stream.shape == (4, 2, 3, 32)
    for ours, text in zip(stream, TEXTS, strict=True):
        np.testing.assert_allclose(ours, torch_stream(torch_model, text)[:, -3:], atol=2e-4, rtol=1e-4)


def test_a_mesh_changes_activations_by_rounding_only(tiny: js.Model, tiny_dir: Path) -> None:
    on_mesh = js.load_model(tiny_dir, "float32", mesh_shape=MeshShape(2, 4))
    np.testing.assert_allclose(residual_stream(on_mesh, TEXTS), residual_stream(tiny, TEXTS), atol=1e-4)
    ours, others = (input_moments(model, TEXTS, [2, 3, 0, 1], is_full=True) for model in (on_mesh, tiny))
    for path, moment in ours.items():
        np.testing.assert_allclose(moment, others[path], atol=1e-4 * float(moment.max()), err_msg=path)


def test_the_logits_after_each_text(tiny: js.Model) -> None:
    logits = next_token_logits(tiny, TEXTS)
    for ours, text in zip(logits, TEXTS, strict=True):
        np.testing.assert_allclose(ours, tiny(np.array([text]))[0, -1], atol=2e-4)
