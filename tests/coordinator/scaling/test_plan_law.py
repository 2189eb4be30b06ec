"""The laws that a plan may use: the nine-row table, growth, extrapolation."""

import math

import pytest

from coordinator.scaling.constants import NINE_ROWS
from coordinator.scaling.extrapolation import check_extrapolation
from coordinator.scaling.plan_law import LAW_NAMES, published_law
from protos.contract.errors import UsageError


def errors_of_params(name: str) -> list[float]:
    """Relative errors of N at the compute of each of the nine rows."""
    law = published_law(name)
    return [law.optimum(flop).params_n / params_n - 1 for params_n, flop, _ in NINE_ROWS]


def mean(values: list[float]) -> float:
    return sum(abs(value) for value in values) / len(values)


def test_the_nine_rows_come_out_of_the_default_law() -> None:
    assert mean(errors_of_params("chinchilla")) <= 0.005
    for (_, flop, tokens_d), error in zip(NINE_ROWS, errors_of_params("chinchilla"), strict=True):
        assert abs(error) <= 0.013
        if flop != 5.76e23:  # that row's 1.5 T is rounded: 6 N D / C = 1.047
            assert published_law("chinchilla").optimum(flop).tokens_d == pytest.approx(
                tokens_d, rel=0.02
            )


def test_the_square_root_rule_is_near_every_row() -> None:
    assert max(abs(error) for error in errors_of_params("chinchilla-ratio")) <= 0.042
    for params_n, flop, tokens_d in NINE_ROWS:
        assert math.sqrt(flop / 120) == pytest.approx(params_n, rel=0.042)
        if params_n == 67e9:
            assert flop / (6 * params_n * tokens_d) == pytest.approx(0.955, abs=5e-4)
            assert 20 * params_n / tokens_d - 1 == pytest.approx(-0.107, abs=5e-4)


def test_published_approach_3_misses_the_table_by_half() -> None:
    assert mean(errors_of_params("hoffmann-a3")) == pytest.approx(0.51, abs=0.01)
    before_rounding = errors_of_params("hoffmann-a3-unrounded")
    assert mean(before_rounding) == pytest.approx(0.389, abs=0.002)
    assert before_rounding[-1] == pytest.approx(-0.608, abs=0.002)
    assert mean(errors_of_params("besiroglu")) == pytest.approx(0.104, abs=0.01)


@pytest.mark.parametrize(
    ("name", "params", "tokens"), [("kaplan", 5.4, 1.9), ("chinchilla", 3.1, 3.2)]
)
def test_growth_with_ten_times_the_compute(name: str, params: float, tokens: float) -> None:
    law = published_law(name)
    assert round(law.growth.params_ratio, 1) == params
    assert round(law.growth.tokens_ratio, 1) == tokens
    low, high = law.optimum(1e20), law.optimum(1e21)
    assert high.params_n / low.params_n == pytest.approx(law.growth.params_ratio)
    assert high.tokens_d / low.tokens_d == pytest.approx(law.growth.tokens_ratio)


@pytest.mark.parametrize("name", LAW_NAMES)
def test_compute_for_params_is_the_inverse(name: str) -> None:
    law = published_law(name)
    flop = law.compute_for_params(3e9)
    assert law.optimum(flop).params_n == pytest.approx(3e9, rel=1e-9)


def test_extrapolation_is_refused_unless_forced() -> None:
    def check(compute_flop: float, *, is_forced: bool = False) -> str:
        return check_extrapolation(compute_flop, (1e17, 1e19), law="it", is_forced=is_forced)

    assert check(1e22) == check(1e17) == ""
    with pytest.raises(UsageError, match="times the largest compute") as caught:
        check(1.001e22)
    assert "--force-extrapolation" in caught.value.remedy
    assert "by force" in check(1.001e22, is_forced=True)
    assert "10 times less than the smallest compute" in check(1e16)
    with pytest.raises(UsageError, match="less than the smallest") as caught:
        check(0.999e12)
    assert "--force-extrapolation" in caught.value.remedy
    assert "by force" in check(0.999e12, is_forced=True)


def test_unknown_law() -> None:
    with pytest.raises(UsageError, match="law 'moore'"):
        published_law("moore")
