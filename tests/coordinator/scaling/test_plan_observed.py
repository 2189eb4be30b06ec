"""Planning with a law fitted on own runs."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator.scaling.laws import LossLaw
from coordinator.scaling.links import Codec
from coordinator.scaling.observations import Convention, Observation, Observations
from coordinator.scaling.plan_observed import observed_law
from coordinator.scaling.plan_types import PlanRequest
from coordinator.scaling.planner import plan
from coordinator.scaling.study_fit import fit_observations
from protos.contract.errors import UsageError

TRUTH = LossLaw(e_nats=1.5, a=40.0, b=120.0, alpha=0.3, beta=0.3, kappa=0.8)
FP32 = Codec(name="fp32", bytes_per_value=4.0)


def table(**fields: object) -> Observations:
    """Slices of equal FLOP with a seed noise of 0.1 %."""
    rng = np.random.default_rng(4)
    rows = []
    for flop in np.geomspace(1e15, 1e18, 7):
        best = TRUTH.optimum(float(flop)).params_n
        for ratio in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
            params_n = float(ratio * best)
            tokens_d = float(flop) / (6 * params_n)
            loss = float(TRUTH.loss_nats(params_n, tokens_d)) * (1 + 1e-3 * rng.standard_normal())
            rows.append(
                Observation(
                    params_n=params_n,
                    tokens_d=tokens_d,
                    compute_flop=float(flop),
                    loss_nats=loss,
                    **fields,  # type: ignore[arg-type]
                )
            )
    return Observations.of(rows)


def test_a_plan_from_own_runs() -> None:
    law = observed_law(table(), name="own.csv")
    request = PlanRequest(
        law=law,
        compute_flop=1e20,
        vocab_size=32_768,
        seq_len=1024,
        codecs=(FP32,),
        strategies=("sync",),
    )
    found = plan(request)
    assert found.law_optimum.params_n == pytest.approx(TRUTH.optimum(1e20).params_n, rel=0.15)
    best = TRUTH.loss_nats(found.params_n, found.tokens_d)
    assert found.loss_low_nats < best < found.loss_high_nats
    assert found.loss_nats == pytest.approx(best, rel=0.02)
    assert (found.loss_high_nats - found.loss_low_nats) / found.loss_nats < 0.25, "narrower"
    names = {choice.name for choice in found.choices}
    assert {"fit", "certainty of N"} <= names
    assert any("does not say what N counts" in warning for warning in found.warnings)
    with pytest.raises(UsageError, match="times the largest compute"):
        plan(PlanRequest(
            law=law, compute_flop=1.1e21, vocab_size=32_768, seq_len=1024, codecs=(FP32,),
            strategies=("sync",),
        ))  # fmt: skip


def test_the_tables_own_flop_per_param_token_is_used() -> None:
    rows = [replace(row, compute_flop=7.5 / 6 * row.compute_flop) for row in table().rows]
    own = Observations.of(rows)
    law = observed_law(own, name="own.csv")
    shown = fit_observations(own).optimum(1e19)
    assert law.optimum(1e19).params_n == pytest.approx(shown.optimum.params_n, rel=1e-6)
    assert law.params_interval_at is not None
    low, high = law.params_interval_at(1e19)
    assert low <= law.optimum(1e19).params_n <= high
    odd = Observations.of(replace(row, compute_flop=2.5 * row.compute_flop) for row in rows)
    assert any("far from the usual 6 N D" in text for text in observed_law(odd, name="x").warnings)


def test_tables_without_the_head_are_converted_or_refused() -> None:
    with pytest.raises(UsageError, match="head_params"):
        observed_law(table(convention=Convention.NON_EMBEDDING), name="own.csv")
    law = observed_law(table(convention=Convention.NON_EMBEDDING, head_params=1e6), name="own.csv")
    assert law.warnings == ()
