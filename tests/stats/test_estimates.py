"""Known differences are found at the stated confidence, null ones are not; pairing helps; brute force agrees."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tasks.stats import estimates as module
from tasks.stats.estimates import Estimate, over_seeds, over_seeds_and_rows, paired
from tasks.stats.standard_errors import ratio_stderr

REPETITIONS = 400
SEEDS, ROWS = 3, 64
SPREADS = [0.0, 0.01, 0.02, 0.03, 0.1]
"""Of the seeds. Those in the middle are the hardest: there three seeds often look alike by chance."""


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 500)


def worlds(
    difference: float, spread_of_seeds: float, seeds: int = SEEDS
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Losses of two methods by seed and row: rows differ a lot, each seed moves a method as a whole."""
    generator = np.random.default_rng(5)
    for _ in range(REPETITIONS):
        counts = generator.integers(5, 40, ROWS)
        difficulty = generator.normal(1.5, 0.5, ROWS)
        sensitivity = generator.normal(0, 0.05, ROWS)
        methods = []
        for method in (0, 1):
            seed_effect = generator.normal(0, spread_of_seeds, (seeds, 1))
            noise = generator.normal(0, 0.05, (seeds, ROWS))
            methods.append((difficulty + method * (difference + sensitivity) + seed_effect + noise) * counts)
        yield methods[1], methods[0], counts


def at_most(share: float) -> float:
    """What a share of that size exceeds once in a thousand times, over all repetitions."""
    return float(stats.binom.ppf(0.999, REPETITIONS, share)) / REPETITIONS


@pytest.mark.slow
@pytest.mark.parametrize("spread_of_seeds", SPREADS)
@pytest.mark.parametrize(("difference", "seeds"), [(0.0, 3), (-0.1, 3), (0.0, 2)])
def test_the_interval_holds_the_true_difference_as_often_as_it_says(
    spread_of_seeds: float, difference: float, seeds: int
) -> None:
    missed = 0
    for values, reference, counts in worlds(difference, spread_of_seeds, seeds):
        low, high = paired(values, reference, counts, 0.95).interval
        missed += not low <= difference <= high
    assert missed / REPETITIONS <= at_most(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("spread_of_seeds", SPREADS)
def test_a_null_pair_is_not_found(spread_of_seeds: float) -> None:
    exceeding = sum(paired(*world, 0.95).exceeds_error for world in worlds(0.0, spread_of_seeds))
    assert exceeding / REPETITIONS <= at_most(0.05)


def test_a_known_difference_is_found() -> None:
    estimates = [paired(*world, 0.95) for world in worlds(-0.08, 0.01)]
    exceeding = sum(estimate.exceeds_error and estimate.value < 0 for estimate in estimates)
    assert exceeding / REPETITIONS >= 0.95


@pytest.mark.slow
def test_pairing_finds_what_two_errors_side_by_side_do_not() -> None:
    by_pairs = side_by_side = 0
    for values, reference, counts in worlds(-0.08, 0.01):
        by_pairs += paired(values, reference, counts, 0.95).exceeds_error
        apart = [over_seeds_and_rows(method, counts, 0.95) for method in (values, reference)]
        stderr = math.hypot(*(estimate.stderr for estimate in apart))
        side_by_side += abs(apart[0].value - apart[1].value) > 1.96 * stderr
    assert by_pairs >= 0.95 * REPETITIONS > 0.05 * REPETITIONS >= side_by_side


def test_the_stated_error_is_the_spread_of_repetitions() -> None:
    estimates = [paired(*world, 0.95) for world in worlds(-0.05, 0.02)]
    spread = np.std([estimate.value for estimate in estimates], ddof=1)
    assert np.sqrt(np.mean([estimate.stderr**2 for estimate in estimates])) == pytest.approx(spread, rel=0.15)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 30)), min_size=2, max_size=20), st.integers(1, 4))
def test_loss_per_token_is_the_brute_force_sum(rows: list[tuple[float, int]], seeds: int) -> None:
    nll, counts = [row[0] for row in rows], [row[1] for row in rows]
    total = tokens = 0.0
    for _ in range(seeds):
        for value, count in rows:
            total += value
            tokens += count
    estimate = over_seeds_and_rows([nll] * seeds, counts, 0.95)
    assert estimate.value == pytest.approx(total / tokens)
    assert estimate.stderr == pytest.approx(ratio_stderr(nll, counts), abs=1e-9), "equal seeds add no error"


def test_without_rows_it_is_students_t_over_seeds() -> None:
    estimate = over_seeds([1.0, 2.0, 4.0], 0.95)
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert estimate.interval == pytest.approx((low, high))
    assert paired([2.0, 3.0, 5.0], [1.0, 2.0, 4.0], None, 0.95).stderr == 0


def test_one_seed_says_nothing_of_seeds() -> None:
    assert over_seeds([1.0], 0.95) == Estimate(1.0, None, None, repeated=False)
    assert not over_seeds([1.0], 0.95).exceeds_error
    clear = paired([[1.0, 1.1, 1.2]], [[3.0, 3.0, 3.0]], [1, 1, 1], 0.95)
    assert clear.interval[1] < 0 and not clear.exceeds_error, "two trainings differ; of their methods it says nothing"
    of_rows = over_seeds_and_rows([[1.0, 2.0, 3.0]], [1, 1, 1], 0.95)
    assert of_rows.stderr == pytest.approx(stats.sem([1.0, 2.0, 3.0]))
    assert over_seeds_and_rows([[1.0], [2.0]], [1], 0.95).stderr == pytest.approx(0.5), "one row: seeds alone"


def test_a_difference_to_the_base_pairs_each_seed_with_the_one_base() -> None:
    tuned, base = np.array([[1.0, 2.0], [1.5, 2.5]]), np.array([[3.0, 4.0]])
    assert paired(tuned, base, [1, 1], 0.95).value == pytest.approx(-1.75)


def test_equal_values_tell_no_error() -> None:
    assert not paired([30, 30], [40, 40], None, 0.95).exceeds_error
    assert not paired(np.ones((2, 2)), np.zeros((2, 2)), [1, 1], 0.95).exceeds_error
    assert not paired([0.7, 0.8, 0.6], [0.6, 0.7, 0.5], None, 0.95).exceeds_error, "equal but for rounding"
