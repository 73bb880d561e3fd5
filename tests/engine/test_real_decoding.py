"""What the real SmolLM2-135M-Instruct generates."""

from typing import Any

import pytest
from helpers import tokens_of, torch_tokens

import jaxscape as js

pytestmark = pytest.mark.real


def test_greedy_tokens_are_those_of_transformers(smollm2: js.Model, torch_smollm2: Any) -> None:
    """16 prompts of different lengths, 32 tokens each."""
    prompts = js.load_prompts("benign", 16)
    assert tokens_of(smollm2, prompts, max_new_tokens=32) == torch_tokens(torch_smollm2, smollm2, prompts, new=32)
