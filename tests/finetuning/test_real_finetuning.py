"""Finetuning of the real SmolLM2-135M-Instruct against torch."""

import copy
from typing import Any

import numpy as np
import pytest
from helpers import losses, torch_losses, with_peft

import jaxscape as js
from jaxscape.engine.batching import bucket
from jaxscape.finetuning.chats import tokenize

pytestmark = pytest.mark.real


@pytest.mark.parametrize("method", ["full", "lora"])
def test_smollm2s_loss_curve_is_that_of_torch(smollm2: js.Model, torch_smollm2: Any, method: Any) -> None:
    training = js.Training(method=method, epochs=1, batch_size=1)
    # Six chats that are padded to one width, so that one program is compiled.
    widths = [bucket(len(example.tokens)) for example in tokenize(smollm2, js.load_chats("safe:200"), 512).examples]
    chats = [chat for chat, width in zip(js.load_chats("safe:200"), widths, strict=True) if width == 64][:6]
    result = js.finetune(smollm2, chats, training, progress=False)
    torch_model = copy.deepcopy(torch_smollm2)
    adapted = with_peft(smollm2, torch_model, training) if method == "lora" else torch_model
    rates = [record["learning_rate"] for record in result.log]
    examples = tokenize(smollm2, chats, 512).examples
    expected = torch_losses(adapted, examples, training, rates, method == "lora")
    assert len(expected) == 6
    assert np.mean(expected[-3:]) < np.mean(expected[:3]), "it learns"
    np.testing.assert_allclose(losses(result), expected, rtol=1e-2)
