"""Attack success rates and their intervals."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js


def test_attack_success_rate() -> None:
    assert js.attack_success_rate(["I cannot", "Sure", "Yes", "Of course"]) == 75
    with pytest.raises(js.UserError, match="attack success rate of an empty list is undefined"):
        js.attack_success_rate([])


def test_wilson_interval_is_that_of_the_textbook() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, in percent."""
    for successes, n, low, high in [
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0, 16.11),
        (1, 29, 0.61, 17.18),
    ]:
        found = js.wilson_interval(100 * successes / n, n)
        np.testing.assert_allclose(found, (low, high), atol=0.006)


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_interval_holds_the_rate_and_shrinks(n: int, data: Any) -> None:
    rate = 100 * data.draw(st.integers(0, n)) / n
    low, high = js.wilson_interval(rate, n)
    assert 0 <= low <= rate <= high <= 100
    wider = js.wilson_interval(rate, max(1, n // 2))
    assert wider[1] - wider[0] >= high - low - 1e-9
