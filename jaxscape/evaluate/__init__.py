"""From a model's outputs to numbers: pure functions."""

from jaxscape.evaluate.refusal import REFUSAL_KEYWORDS, attack_success_rate, is_refusal, wilson_interval

__all__ = ["REFUSAL_KEYWORDS", "attack_success_rate", "is_refusal", "wilson_interval"]
