"""Attack success rates and their intervals."""

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import jaxscape as js
from jaxscape.evaluate.statistics import block_size, clopper_pearson_bound, more_than, sign_flip_test


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


def test_clopper_pearson_bound_is_that_of_scipy() -> None:
    for count, total in [(0, 10), (1, 10), (93, 100), (100, 100), (3, 3)]:
        test = scipy.stats.binomtest(count, total, alternative="greater")
        expected = test.proportion_ci(0.95, method="exact").low
        assert clopper_pearson_bound(count, total) == pytest.approx(expected, abs=1e-12)
    assert clopper_pearson_bound(100, 100) == pytest.approx(0.05**0.01)  # the closed form where all succeed


@given(total=st.integers(1, 12), data=st.data())
def test_without_an_error_only_what_is_certain_is_decided(total: int, data: Any) -> None:
    limit, asked = data.draw(st.integers(0, total - 1)), data.draw(st.integers(0, total))
    happened = data.draw(st.integers(0, asked))
    outcomes = {happened + rest > limit for rest in range(total - asked + 1)}
    assert more_than(limit, happened, asked, total, 0.0) == (outcomes.pop() if len(outcomes) == 1 else None)


@given(total=st.integers(1, 60), data=st.data())
def test_more_answers_than_all_are_never_needed_and_certainty_is_never_contradicted(total: int, data: Any) -> None:
    limit, asked = data.draw(st.integers(0, total - 1)), data.draw(st.integers(0, total))
    happened = data.draw(st.integers(0, asked))
    certain = more_than(limit, happened, asked, total, 0.0)
    decided = more_than(limit, happened, asked, total, 0.01)
    assert certain in (None, decided)
    assert asked < total or decided == (happened > limit)


@pytest.mark.parametrize(("total", "limit", "error"), [(40, 20, 0.05), (40, 20, 0.005), (25, 3, 0.05), (9, 4, 0.2)])
def test_a_sequential_decision_is_wrong_no_more_often_than_it_says(total: int, limit: int, error: float) -> None:
    """The exact probability over all orders, with a decision after every answer, for every number of things."""
    for number in range(total + 1):

        @cache
        def wrong(happened: int, asked: int, number: int = number) -> float:
            decided = more_than(limit, happened, asked, total, error)
            if decided is not None:
                return float(decided != (number > limit))
            next_happens = (number - happened) / (total - asked)
            return sum(
                share * wrong(happened + step, asked + 1)
                for step, share in ((1, next_happens), (0, 1 - next_happens))
                if share
            )

        assert wrong(0, 0) <= error


def test_a_block_is_as_large_as_a_decision_between_like_answers_needs() -> None:
    assert block_size(20, 40, 0.007) == 9  # of 40 answers, 9 that are alike decide
    assert block_size(20, 40, 0.0) == 21
    assert block_size(0, 1, 0.01) == 1
    assert block_size(2, 40, 0.0) <= 8  # 3 of 40 answers may decide that it is more than 2


def test_sign_flips_of_few_samples_give_the_exact_p_value() -> None:
    changes = np.array([[1.0], [0.5], [0.25], [1.0], [-0.25]])
    sums = [np.dot(signs, changes[:, 0]) for signs in itertools.product((-1, 1), repeat=5)]
    exact = np.mean(np.array(sums) >= changes.sum() - 1e-9)
    assert sign_flip_test(changes, 40000)[0] == pytest.approx(exact, abs=0.01)


def test_sign_flips_with_one_column_are_mcnemars_test() -> None:
    """Where each change is one question won or lost, the exact test is a binomial one."""
    changes = np.concatenate([np.ones(9), -np.ones(2), np.zeros(20)])[:, None]
    exact = scipy.stats.binomtest(9, 11, alternative="greater").pvalue
    assert sign_flip_test(changes, 40000)[0] == pytest.approx(exact, abs=0.005)


def test_sign_flips_count_a_false_alarm_in_any_column() -> None:
    rng = np.random.default_rng(1)
    lowest = [sign_flip_test(rng.choice([-1.0, 0, 1], (40, 6)), 400).min() for _ in range(200)]
    assert np.mean(np.array(lowest) <= 0.05) < 0.1
    assert sign_flip_test(np.zeros((10, 3))).tolist() == [1, 1, 1]  # nothing changes
    assert sign_flip_test(np.ones((20, 2)), 999).max() == pytest.approx(1 / 1000)
