"""Rows of prompts that keep a step short."""

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
