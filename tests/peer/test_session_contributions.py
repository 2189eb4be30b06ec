"""The session machine and the trainer's contributions: one verdict each, after the state that it
brings.
"""

import pytest

from peer import session_events as ev
from protos.contract.telemetry import RoundOutcome, SessionState
from tests.peer.session_timeline import (
    Timeline,
    contribution,
    ended,
    state_reached,
    training_peer,
)


@pytest.fixture
def training() -> Timeline:
    return training_peer()


def test_an_outcome_waits_for_its_state(training: Timeline) -> None:
    training.feed(contribution(5, [(1, 0, 16)]))
    assert len(training.take(ev.PassContribution)) == 1
    assert training.state is SessionState.AVERAGING
    training.feed(ended(RoundOutcome.COMMITTED, 6))
    assert training.take(ev.TellRoundOutcome) == []
    training.feed(state_reached(6, round_tokens=8192))
    assert training.take(ev.TellRoundOutcome) == [
        ev.TellRoundOutcome(
            outcome=RoundOutcome.COMMITTED,
            incarnation=1,
            outer_step=6,
            round_tokens=8192,
            reason="because",
            offer_number=1,
        )
    ]
    assert training.state is SessionState.TRAINING


def test_a_state_waits_for_the_outcome_of_the_contribution(training: Timeline) -> None:
    training.feed(contribution(5, [(1, 0, 16)]), state_reached(6))
    assert training.take(ev.TellRoundOutcome) == []
    training.feed(ended(RoundOutcome.COMMITTED, 6))
    told = training.take(ev.TellRoundOutcome)
    assert [action.outcome for action in told] == [RoundOutcome.COMMITTED]


def test_resync_returns_the_leases_of_the_contribution(training: Timeline) -> None:
    training.feed(
        contribution(5, [(1, 0, 16), (2, 0, 4)]), ended(RoundOutcome.RESYNC, 6), state_reached(6)
    )
    assert training.take(ev.ReleaseLeases) == [
        ev.ReleaseLeases(lease_numbers=(1, 2), reason="because")
    ]
    told = training.take(ev.TellRoundOutcome)
    assert [action.outcome for action in told][-1] is RoundOutcome.RESYNC
    assert told[-1].outer_step == 6
    training.feed(ev.LeasesReleasedByTrainer(lease_numbers=(1, 2), reason="resync"))
    assert training.take(ev.ReleaseLeases) == []


def test_a_step_without_this_peer_makes_the_trainer_follow(training: Timeline) -> None:
    training.feed(ended(RoundOutcome.COMMITTED, 6), state_reached(6))
    told = training.take(ev.TellRoundOutcome)
    assert [(action.outcome, action.outer_step) for action in told] == [(RoundOutcome.RESYNC, 6)]


def test_a_state_that_replaces_another_of_its_step_is_told(training: Timeline) -> None:
    training.feed(state_reached(5, state_digest=b"wrong"))
    training.take(ev.TellRoundOutcome)
    training.feed(state_reached(5, state_digest=b"wrong"))
    assert training.take(ev.TellRoundOutcome) == []
    training.feed(state_reached(5, state_digest=b"right"))
    told = training.take(ev.TellRoundOutcome)
    assert [(action.outcome, action.offer_number) for action in told] == [(RoundOutcome.RESYNC, 0)]


def test_a_contribution_to_an_older_state_is_not_passed_on(training: Timeline) -> None:
    training.feed(state_reached(6), contribution(5, [(1, 0, 16)]))
    assert training.take(ev.PassContribution) == []
    assert training.take(ev.ReleaseLeases)[0].lease_numbers == (1,)
    told = training.take(ev.TellRoundOutcome)
    found = [(action.outcome, action.outer_step, action.offer_number) for action in told]
    assert found == [(RoundOutcome.RESYNC, 6, 0), (RoundOutcome.RESYNC, 6, 1)]
    training.feed(contribution(6, [(2, 0, 16)], number=2))
    assert len(training.take(ev.PassContribution)) == 1 and training.take(ev.TellRoundOutcome) == []


def test_a_verdict_on_an_older_contribution_is_not_one_on_the_newest(training: Timeline) -> None:
    """The swarm process made step 6 without this peer; its trainer has read that state before its
    outcome has come here, and offers on it.
    """
    training.feed(state_reached(6), contribution(6, [(1, 0, 16)], number=4))
    training.take(ev.TellRoundOutcome)
    training.feed(ended(RoundOutcome.RESYNC, 6, number=0), ended(RoundOutcome.RESYNC, 6, number=3))
    assert training.take(ev.ReleaseLeases) == [] and training.take(ev.TellRoundOutcome) == []
    training.feed(ended(RoundOutcome.COMMITTED, 7, number=4), state_reached(7))
    told = training.take(ev.TellRoundOutcome)
    assert [(a.outcome, a.offer_number) for a in told] == [(RoundOutcome.COMMITTED, 4)]


def test_a_verdict_comes_also_if_the_incarnation_ends_first(training: Timeline) -> None:
    training.feed(
        contribution(5, [(1, 0, 16)], number=2),
        ended(RoundOutcome.COMMITTED, 6, number=2),  # its state was never announced
        state_reached(4, incarnation=2),
    )
    told = training.take(ev.TellRoundOutcome)
    assert [(a.outcome, a.offer_number) for a in told] == [(RoundOutcome.RESYNC, 2)]
