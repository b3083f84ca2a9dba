"""Rows of prompts that keep a step short."""

import pytest

from pyllama_dist.engine.budget import StepBudget


def test_at_first_little_is_risked():
    assert StepBudget(0.25, 256).rows(0) == 16


def test_rows_fit_the_seconds():
    budget = StepBudget(0.25, 256)
    budget.observe(100, 0.2)  # 2 ms a row: 125 of them
    assert budget.rows(0) == 112
    assert budget.rows(14) == 96
    for _ in range(50):
        budget.observe(100, 10.0)  # a slow machine reads on nevertheless
    assert budget.rows(14) == 16
    for _ in range(50):
        budget.observe(100, 0.001)
    assert budget.rows(0) == 256


def test_steps_of_few_rows_say_nothing():
    budget = StepBudget(0.25, 256)
    budget.observe(100, 0.2)
    budget.observe(1, 5.0)
    assert budget.rows(0) == 112


@pytest.mark.parametrize(("fixed", "each"), [(0.14, 0.0012), (0.0, 0.002), (0.2, 0.02)])
def test_steps_that_cost_something_without_rows_grow_until_they_fit(fixed, each):
    """Of a machine whose steps take `fixed` seconds and `each` more for each row."""
    budget, rows = StepBudget(0.25, 256), []
    for _ in range(200):
        rows.append(budget.rows(1))
        budget.observe(rows[-1] + 1, fixed + each * (rows[-1] + 1))
    fits = [n for n in range(16, 257, 16) if fixed + each * (n + 1) <= 0.25] or [16]
    assert fits[-1] - 32 <= rows[-1] <= fits[-1] + 16
    longest = max(fixed + each * (n + 1) for n in rows)
    assert longest <= max(1.2 * 0.25, fixed + each * 17)
