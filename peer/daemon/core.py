"""What every part of the daemon shares: the session machine with its clock, the numbers, the
metrics, the reporter.
"""

import logging
import time
from collections.abc import Callable

from peer import session_events as ev
from peer.daemon.reports import Report, Reporter, SessionNumbers
from peer.metrics import PeerMetrics
from peer.session import Decision, SessionMachine
from protos.contract import telemetry
from protos.contract.telemetry import LogField, SessionState

_LOGGER = logging.getLogger(__name__)


class Core:
    """Feeds events to the machine and hands its actions on, in order, also when an action causes an
    event.
    """

    def __init__(
        self,
        *,
        numbers: SessionNumbers,
        metrics: PeerMetrics,
        report: Reporter,
        on_drain: Callable[[ev.BeginDrain], None],
    ) -> None:
        self.machine = SessionMachine()
        self.numbers = numbers
        self.metrics = metrics
        self.report = report
        self._on_drain = on_drain
        self.perform: Callable[[ev.Action], None] = self._keep
        """Carries out one action; until it is set, actions wait."""
        self._waiting: list[ev.Action] = []
        self._events: list[ev.Event] = []
        self._is_feeding = False
        self._shown_state: SessionState | None = None
        self._shown_reason = ""

    def feed(self, event: ev.Event) -> None:
        """Let the machine decide about an event, carry out what it decides, then take the events
        that caused.
        """
        self._events.append(event)
        if self._is_feeding:
            return
        self._is_feeding = True
        try:
            while self._events:
                decision = self.machine.handle(self._events.pop(0), now_seconds=time.monotonic())
                self._show(decision)
                for action in decision.actions:
                    if isinstance(action, ev.BeginDrain):
                        self._on_drain(action)
                    else:
                        self.perform(action)
        finally:
            self._is_feeding = False

    def begin_performing(self, perform: Callable[[ev.Action], None]) -> None:
        """From now on actions are carried out; those that waited come first."""
        self.perform = perform
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            perform(action)

    def note(self, text: str) -> None:
        """Warn the owner."""
        _LOGGER.debug("%s", text)  # the report is printed
        self.report(Report(kind="warning", text=text))

    def show_leases(self) -> None:
        """Bring numbers and metrics to what the machine holds."""
        leases, numbers, metrics = self.machine.leases, self.numbers, self.metrics
        numbers.held_leases, numbers.held_tokens = leases.num_held, leases.left_tokens
        metrics.set(telemetry.PEER_HELD_LEASES, numbers.held_leases)
        metrics.set(telemetry.PEER_HELD_TOKENS, numbers.held_tokens)
        metrics.set(telemetry.PEER_CLOCK_OFFSET_SECONDS, numbers.clock_offset_seconds)

    def _keep(self, action: ev.Action) -> None:
        self._waiting.append(action)

    def _show(self, decision: Decision) -> None:
        """Tell the owner of a new state, and of a new reason to wait; other reasons change with
        every step.
        """
        state, reason = decision.state, decision.reason
        numbers = self.numbers
        numbers.state, numbers.state_reason = state.value, reason
        is_new_state = state is not self._shown_state
        is_new_wait = state is SessionState.WAITING and reason != self._shown_reason
        is_new_sync = (
            state in (SessionState.JOINING, SessionState.SYNCING) and reason != self._shown_reason
        )
        if not (is_new_state or is_new_wait or is_new_sync):
            return
        self._shown_state, self._shown_reason = state, reason
        self.metrics.show_state(state)
        _LOGGER.debug("%s=%s %s=%s", LogField.STATE, state, LogField.REASON, reason)  # reported too
        fields = {"state": state.value, "reason": reason, "outer_step": numbers.outer_step}
        self.report(Report(kind="state", text=f"{state.value}: {reason}", fields=fields))
