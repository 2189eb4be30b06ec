"""A step that looks inside the model from time to time, if the peer's owner asks for it."""

import time
from collections.abc import Callable

from peer.model.objectives import Examples
from peer.model.probe import LayerProbe, LayerStats, layer_stats
from peer.train.node_step import NodeStep
from peer.train.step import MicroStep, StepResult

OnStats = Callable[[tuple[LayerStats, ...]], None]


class Timer:
    """Says when it is time for the next look; the first is at once."""

    def __init__(
        self, interval_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_seconds, self._clock = interval_seconds, clock
        self._next_seconds = 0.0

    def is_due(self) -> bool:
        """True once per interval."""
        now_seconds = self._clock()
        if now_seconds < self._next_seconds:
            return False
        self._next_seconds = now_seconds + self._interval_seconds
        return True


class ProbedStep(MicroStep):
    """The same step as another; a micro-batch is watched whenever the timer says so."""

    def __init__(self, step: MicroStep, *, timer: Timer, report: OnStats) -> None:
        super().__init__(step.model, step.parameters)
        self.run_like(step)
        self._timer, self._report = timer, report

    def run(self, examples: Examples, *, is_watched: bool = False) -> StepResult:
        """As MicroStep.run; reports after a watched micro-batch with finite gradients."""
        if not is_watched and not self._timer.is_due():
            return super().run(examples)
        with LayerProbe(self.model) as probe:
            result = super().run(examples, is_watched=True)
        if result.is_finite:
            self._report(probe.stats(num_tokens=result.num_tokens))
        return result


class ProbedNodeStep(NodeStep):
    """The same on local ranks, of turns with which the sum of gradients begins."""

    def __init__(self, step: NodeStep, *, timer: Timer, report: OnStats) -> None:
        super().__init__(step.spec, step.ranks)
        self.precision = step.precision
        self._timer, self._report = timer, report

    def run(self, examples: Examples, *, is_watched: bool = False) -> StepResult:
        """As NodeStep.run; reports after a watched turn with finite gradients."""
        if not is_watched and (self.ranks.has_grads or not self._timer.is_due()):
            return super().run(examples)
        result = super().run(examples, is_watched=True)
        if result.is_finite:
            self._report(layer_stats(*self.ranks.layer_sums, num_tokens=result.num_tokens))
        return result
