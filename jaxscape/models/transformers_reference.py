"""The same model as transformers loads it, with torch, to compare with."""

import importlib.util
import io
from collections.abc import Sequence
from contextlib import redirect_stderr

import numpy as np
from jaxtyping import Float

from jaxscape.models import lora
from jaxscape.models.gguf import is_gguf
from jaxscape.models.model import Model
from jaxscape.runtime.errors import UserError, reason


def is_torch_installed() -> bool:
    """Whether there is torch, without which transformers has no models."""
    return importlib.util.find_spec("torch") is not None


class Reference:
    """A model in transformers, on the CPU and in float32."""

    def __init__(self, model: Model) -> None:
        """Load the files that `model` was loaded from, the base before its adapters.

        Raises:
            UserError: transformers or PEFT cannot load them.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        adapters = [path.parent for path in model.files if path.name == lora.CONFIG]
        base = next(path for path in model.files if path.parent not in adapters)
        options = {"gguf_file": base.name} if is_gguf(base) else {}
        try:
            with redirect_stderr(io.StringIO()):  # progress bars, and warnings of packages that are not needed
                loaded, loading_info = AutoModelForCausalLM.from_pretrained(
                    base.parent, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
                )
                for adapter in adapters:
                    from peft import PeftModel

                    loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
        except Exception as error:  # both raise many types, for missing packages too
            raise UserError(f"transformers cannot load it ({reason(error)})") from error
        if missing := sorted(loading_info["missing_keys"]):  # these have random values now
            raise UserError(f"transformers does not find {len(missing)} of its tensors, such as {missing[0]}")
        self._model = loaded.eval()

    def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "time vocab"]:
        """Next-token logits of a text."""
        with self._torch.no_grad():
            return self._model(self._torch.tensor([tokens])).logits[0].float().numpy()

    def answer(
        self, tokens: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> tuple[list[int], Float[np.ndarray, "new vocab"]]:
        """The greedy continuation of a text, end token included, and the logits by which each token was chosen."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(eos_token_ids),
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = self._torch.tensor([tokens])
        self._model.generation_config = config  # that of the files may ban or penalise tokens
        output = self._model.generate(prompt, attention_mask=self._torch.ones_like(prompt), generation_config=config)
        return output.sequences[0, len(tokens) :].tolist(), self._torch.cat(output.logits).float().numpy()

    def round_to(self, dtype: str) -> None:
        """Change the dtype of weights and activations."""
        self._model.to(getattr(self._torch, dtype))
