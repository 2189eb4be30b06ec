"""Evaluation duties of the trainer: on a copy of the state, slice by slice, in the time when the
loop waits for others.

The copy is taken when an evaluation begins and labelled with the state that it is of, so training
goes on meanwhile.
"""

import logging

from peer.eval.evaluate import Evaluation
from peer.model.decoder import Decoder, FlatParameters
from peer.model.objectives import ExampleBuilder
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.strategy import load_params
from peer.train.link import DaemonLink
from peer.train.node_step import NodeStep
from peer.train.state import EvaluationOrder
from peer.train.step import MicroStep
from protos.contract.chunk_format import Int64Array
from protos.contract.errors import MusterError

_LOGGER = logging.getLogger(__name__)


class EvaluationDesk:
    """Works through evaluation orders."""

    def __init__(
        self,
        step: MicroStep | NodeStep,
        *,
        vectors: SharedVectors,
        link: DaemonLink,
        byte_lengths: Int64Array,
        builder: ExampleBuilder,
    ) -> None:
        """`byte_lengths` of the tokenizer's ids, `builder` of the run's objective."""
        self._step = step
        self._vectors = vectors
        self._link = link
        self._byte_lengths = byte_lengths
        self._builder = builder
        self._copy: tuple[Decoder, FlatParameters] | None = None
        self._evaluation: Evaluation | None = None
        self._order: EvaluationOrder | None = None
        self._position: StatePosition | None = None

    def advance(self, orders: list[EvaluationOrder]) -> bool:
        """Evaluate some windows of the order under way, or begin the next of `orders`; False if
        there is none.

        A held-out chunk that cannot be used ends the duty with a reason, never the trainer.
        """
        if self._order is None:
            if not orders:
                return False
            self._order = orders.pop(0)
        try:
            if self._evaluation is None:
                self._begin(self._order)
            assert self._evaluation is not None and self._position is not None
            result = self._evaluation.advance()
        except (MusterError, OSError) as error:
            _LOGGER.warning("evaluation %s failed: %s", self._order.duty_id, error)
            self._report(self._order, self._vectors.position(), (0.0, 0, 0), reason=str(error))
            return True
        if result is not None:
            sums = result.total_nats, result.num_tokens, result.num_bytes
            self._report(self._order, self._position, sums, reason="")
        return True

    def _begin(self, order: EvaluationOrder) -> None:
        if self._copy is None:
            device = self._step.device
            model = Decoder(self._step.spec, device=device)
            self._copy = model, FlatParameters(model, device=device, has_grads=False)
        model, parameters = self._copy
        self._position = load_params(self._vectors, parameters)
        self._evaluation = Evaluation(
            model,
            heldout_paths=order.heldout_paths,
            byte_lengths=self._byte_lengths,
            eval_tokens=order.eval_tokens,
            builder=self._builder,
            autocast=self._step.autocast(),
        )

    def _report(
        self,
        order: EvaluationOrder,
        position: StatePosition,
        sums: tuple[float, int, int],
        *,
        reason: str,
    ) -> None:
        self._link.send(
            "evaluation",
            duty_id=order.duty_id,
            incarnation=position.incarnation,
            outer_step=position.outer_step,
            schedule_tokens=position.schedule_tokens,
            total_nats=sums[0],
            num_tokens=sums[1],
            num_bytes=sums[2],
            reason=reason,
        )
        self._order = self._evaluation = self._position = None
