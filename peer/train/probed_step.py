"""A micro-step that looks inside the model from time to time, if the peer's owner asks for it."""

import time
from collections.abc import Callable

from peer.model.objectives import Examples
from peer.model.probe import LayerProbe, LayerStats
from peer.train.step import MicroStep, StepResult

OnStats = Callable[[tuple[LayerStats, ...]], None]


class ProbedStep(MicroStep):
    """The same step as another; every `interval_seconds` one micro-batch is watched."""

    def __init__(
        self,
        step: MicroStep,
        *,
        interval_seconds: float,
        report: OnStats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(step.model, step.parameters)
        self.run_like(step)
        self._interval_seconds, self._report, self._clock = interval_seconds, report, clock
        self._next_seconds = 0.0

    def run(self, examples: Examples, *, is_watched: bool = False) -> StepResult:
        """As MicroStep.run; reports after a watched micro-batch with finite gradients."""
        now_seconds = self._clock()
        if not is_watched and now_seconds < self._next_seconds:
            return super().run(examples)
        self._next_seconds = now_seconds + self._interval_seconds
        with LayerProbe(self.model) as probe:
            result = super().run(examples, is_watched=True)
        if result.is_finite:
            self._report(probe.stats(num_tokens=result.num_tokens))
        return result
