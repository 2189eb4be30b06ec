"""When a directive is due, what it says, and why."""

from dataclasses import replace

import pytest

from coordinator.domain.directives import (
    Contact,
    DirectiveContent,
    DirectivePlan,
    RunTerms,
    build_content,
    cooldown_start,
    plan_directive,
)
from coordinator.domain.membership import Member
from coordinator.domain.policy import SwarmPolicy
from protos.contract.run_spec import StrategySpec
from protos.contract.telemetry import PeerState

TERMS = RunTerms(
    budget_tokens=1000,
    cooldown_start_tokens=800,
    is_paused=False,
    strategy=StrategySpec(global_batch_tokens=80),
    seq_len=10,
)


def member(peer_id: str, state: PeerState = PeerState.VOTER, *, is_sure: bool = False) -> Member:
    return Member(
        peer_id=peer_id,
        state=state,
        state_reason="",
        join_unix_seconds=0.0,
        last_heartbeat_unix_seconds=0.0,
        has_vote=state is PeerState.VOTER,
        is_gone_for_sure=is_sure,
    )


def contact(peer_id: str, address: str = "/ip4/127.0.0.1") -> Contact:
    return Contact(
        p2p_peer_id="Qm" + peer_id,
        public_key=b"k" * 32,
        can_accept_connections=True,
        addresses=(address,),
        name=peer_id,
    )


CONTACTS = {peer_id: contact(peer_id) for peer_id in "abcd"}


def content(members: list[Member], **speeds: float) -> DirectiveContent:
    return build_content(
        members,
        contact_by_peer=CONTACTS,
        speed_by_peer=speeds,
        voters=frozenset(m.peer_id for m in members if m.is_live and m.has_vote),
        terms=TERMS,
    )


def plan(
    newest: DirectiveContent,
    members: list[Member],
    *,
    age_seconds: float = 5.0,
    terms: RunTerms = TERMS,
    contacts: dict[str, Contact] = CONTACTS,
    **speeds: float,
) -> DirectivePlan:
    return plan_directive(
        newest,
        members,
        issue_unix_seconds=100.0,
        now_unix_seconds=100.0 + age_seconds,
        contact_by_peer=contacts,
        speed_by_peer=speeds,
        terms=terms,
        policy=SwarmPolicy(),
    )


def test_content_gives_tokens_to_holders_of_the_state_only() -> None:
    found = content([member("b"), member("a"), member("c", PeerState.JOINED)])
    assert [line.peer_id for line in found.roster] == ["a", "b", "c"]
    assert found.round_tokens_by_peer == {"a": 40, "b": 40}
    assert found.voters == {"a", "b"}
    assert [line.max_round_tokens for line in found.roster] == [160, 160, 0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([member("a"), member("b")], ""),
        ([member("a"), member("b"), member("c", PeerState.JOINED)], "c (c) joined"),
        ([member("a")], "b (b) is gone"),
        ([member("a"), member("b", PeerState.LOST)], "b (b) is gone"),
    ],
)
def test_membership_changes_are_reasons(members: list[Member], reason: str) -> None:
    found = plan(content([member("a"), member("b")]), members)
    assert bool(found.content) == bool(reason)
    assert reason in found.reason


def test_a_synced_member_gets_its_vote_and_its_tokens() -> None:
    newest = content([member("a"), member("c", PeerState.JOINED)])
    found = plan(newest, [member("a"), member("c", PeerState.SYNCED)])
    assert found.content is not None and found.content.voters == {"a", "c"}
    assert "c (c) gets its vote" in found.reason


def test_a_restarted_voter_keeps_its_vote_but_not_its_tokens() -> None:
    restarted = replace(member("b", PeerState.JOINED), has_vote=True)
    found = plan(content([member("a"), member("b")]), [member("a"), restarted])
    assert found.content is not None and found.content.voters == {"a", "b"}
    assert found.content.round_tokens_by_peer == {"a": 80}
    assert "restarted" in found.reason


def test_not_more_often_than_every_two_seconds_unless_urgent() -> None:
    newest = content([member("a"), member("b")])
    joiner = member("c", PeerState.JOINED)
    found = plan(newest, [member("a"), member("b"), joiner], age_seconds=1.0)
    assert found.content is None and "1.0 s" in found.reason
    exited = member("b", PeerState.LOST, is_sure=True)
    assert plan(newest, [member("a"), exited], age_seconds=0.0).content is not None
    paused = replace(TERMS, is_paused=True)
    found = plan(newest, [member("a"), member("b")], age_seconds=0.0, terms=paused)
    assert found.content is not None and found.content.is_paused
    assert found.reason == "paused by the operator"


def test_speeds_count_beyond_a_fifth_and_not_too_often() -> None:
    members = [member("a"), member("b")]
    newest = content(members)
    assert plan(newest, members, age_seconds=60.0, a=11.0, b=10.0).content is None
    assert plan(newest, members, age_seconds=5.0, a=30.0, b=10.0).content is None
    found = plan(newest, members, age_seconds=10.0, a=30.0, b=10.0)
    assert found.content is not None
    assert found.content.round_tokens_by_peer == {"a": 60, "b": 20}


def test_diloco_plans_whole_inner_steps_for_each_contributor() -> None:
    strategy = StrategySpec(name="diloco", inner_steps=12, num_fragments=2, inner_batch_tokens=20)
    terms = replace(TERMS, strategy=strategy)
    members = [member("a"), member("b"), member("c", PeerState.JOINED)]
    newest = content(members)
    found = plan(newest, members, age_seconds=10.0, terms=terms, a=30.0, b=10.0)
    assert found.content is not None  # on average 6 inner steps of 20 tokens each
    assert found.content.round_tokens_by_peer == {"a": 180, "b": 60}


def test_other_addresses_and_budgets_are_reasons() -> None:
    members = [member("a"), member("b")]
    moved = CONTACTS | {"a": contact("a", "/ip4/10.0.0.1")}
    assert "addresses" in plan(content(members), members, contacts=moved).reason
    more = replace(TERMS, budget_tokens=2000, cooldown_start_tokens=1600)
    assert "budget_tokens 1000 -> 2000" in plan(content(members), members, terms=more).reason


def test_addresses_of_a_member_without_a_part_wait_for_the_directive_that_gives_it_one() -> None:
    moved = CONTACTS | {"b": contact("b", "/ip4/10.0.0.1")}
    joined = [member("a"), member("b", PeerState.JOINED)]
    assert plan(content(joined), joined, contacts=moved).content is None
    synced = [member("a"), member("b", PeerState.SYNCED)]
    found = plan(content(joined), synced, contacts=moved).content
    assert found is not None and found.roster[1].contact == moved["b"]


def test_no_directive_without_a_voter() -> None:
    found = plan(content([member("a")]), [member("a", PeerState.LOST)])
    assert found.content is None and "without a voter" in found.reason
    joiner = member("c", PeerState.JOINED)
    assert plan(content([member("a")]), [member("a", PeerState.LOST), joiner]).content is None


def test_no_directive_without_a_contributor() -> None:
    """The only member restarts: a roster in which nobody trains could never be left again."""
    restarted = replace(member("a", PeerState.JOINED), has_vote=True)
    found = plan(content([member("a"), member("b")]), [restarted])
    assert found.content is None and "without a contributor" in found.reason
    found = plan(content([member("a"), member("b")]), [restarted, member("b")])
    assert found.content is not None and found.content.round_tokens_by_peer == {"b": 80}


def test_cooldown_begins_before_the_last_part_of_the_budget() -> None:
    assert cooldown_start(1000, cooldown_ratio=0.2) == 800
    assert cooldown_start(1000, cooldown_ratio=0.0) == 1000
