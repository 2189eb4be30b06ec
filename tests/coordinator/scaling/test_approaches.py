"""Approaches 1 and 2: exponents that are known, and the budgets that must be rejected."""

import numpy as np
import pytest

from coordinator.scaling.approach1 import fit_envelope
from coordinator.scaling.approach2 import fit_isoflop
from coordinator.scaling.frontier import is_near_frontier
from coordinator.scaling.observations import Observations
from protos.contract.errors import UsageError
from tests.coordinator.scaling.tables import (
    PORIAN_CSV,
    TINY_CSV,
    TRUTH,
    chinchilla_240,
    made_up,
    read,
)


def isoflop(table: Observations, factor: float = 1.0):  # type: ignore[no-untyped-def]
    """Approach 2 of a table, N in another unit."""
    return fit_isoflop(
        table.params_n * factor, table.tokens_d / factor, table.compute_flop, table.loss_nats
    )


def test_isoflop_finds_a_known_exponent() -> None:
    fit = isoflop(made_up(noise_ratio=0.0))
    assert fit.law.exponent == pytest.approx(TRUTH.params_exponent, abs=0.01)
    assert all(budget.is_accepted for budget in fit.budgets)
    for budget in fit.budgets:
        assert budget.params_n == pytest.approx(
            TRUTH.optimum(budget.compute_flop).params_n, rel=0.12
        )


def test_porians_exponent() -> None:
    fit = isoflop(read(PORIAN_CSV))
    assert fit.law.exponent == pytest.approx(0.497, abs=0.03)
    assert sum(budget.is_accepted for budget in fit.budgets) >= 10


def test_the_other_unit_changes_only_the_coefficient() -> None:
    table = made_up()
    assert isoflop(table, 1e-6).law.exponent == pytest.approx(isoflop(table).law.exponent)


def test_a_minimum_at_the_edge_is_rejected() -> None:
    table = made_up(num_budgets=6, noise_ratio=0.0)
    best = np.array([TRUTH.optimum(compute).params_n for compute in table.compute_flop])
    is_cut = (table.compute_flop < 2e17) & (table.params_n > best * 0.8)
    extra = made_up(num_budgets=1, num_sizes=9, first_flop=1e17 * 3.0**6)
    beside = extra.where(extra.params_n < TRUTH.optimum(extra.compute_flop[0]).params_n * 0.95)
    fit = isoflop(Observations.of([*table.where(~is_cut).rows, *beside.rows]))
    last = fit.budgets[-1]
    assert not last.is_accepted
    assert "not interior" in last.reason


def test_a_wild_budget_is_rejected() -> None:
    table = made_up(noise_ratio=0.0)
    levels = np.unique(table.compute_flop)
    is_wild = table.compute_flop == levels[4]
    rows = [
        row if not wild else type(row)(
            params_n=row.params_n * 4, tokens_d=row.tokens_d / 4,
            compute_flop=row.compute_flop, loss_nats=row.loss_nats,
        )
        for row, wild in zip(table.rows, is_wild, strict=True)
    ]  # fmt: skip
    fit = isoflop(Observations.of(rows))
    assert [b.is_accepted for b in fit.budgets].count(False) == 1
    assert "tokens per parameter" in fit.budgets[4].reason
    assert fit.law.exponent == pytest.approx(TRUTH.params_exponent, abs=0.02)


def test_the_chinchilla_points_have_a_bad_budget() -> None:
    fit = isoflop(chinchilla_240())
    assert 0.40 <= fit.law.exponent <= 0.60
    assert any(not budget.is_accepted for budget in fit.budgets)


def test_too_few_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="good IsoFLOP budgets"):
        isoflop(made_up(num_budgets=2))


def test_the_envelope_of_curves() -> None:
    sizes = np.geomspace(1e7, 1e9, 14)
    computes = np.geomspace(1e17, 1e20, 25)
    params, compute = (grid.ravel() for grid in np.meshgrid(sizes, computes))
    losses = TRUTH.loss_nats(params, compute / 6 / params)
    fit = fit_envelope(params, compute, losses)
    assert fit.law.exponent == pytest.approx(TRUTH.params_exponent, abs=0.04)
    middle = TRUTH.optimum(3e18).params_n
    assert fit.law.optimum(3e18).params_n == pytest.approx(middle, rel=0.15)


def test_the_envelope_of_our_own_curves() -> None:
    table = read(TINY_CSV)
    fit = fit_envelope(table.params_n, table.compute_flop, table.loss_nats)
    assert 0.5 <= fit.law.exponent <= 0.8
    with pytest.raises(UsageError, match="sizes"):
        small = table.where(table.params_n < 12_000)
        fit_envelope(small.params_n, small.compute_flop, small.loss_nats)


def test_near_the_frontier() -> None:
    compute, losses = np.array([1.0, 1.0, 10.0, 100.0]), np.array([3.0, 3.5, 2.9, 2.0])
    assert is_near_frontier(compute, losses).tolist() == [True, False, True, True]
    assert is_near_frontier(compute, losses, near_ratio=0.2).all()
