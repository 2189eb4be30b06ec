"""Which strategy a spec names."""

from peer.model.decoder import Decoder, FlatParameters
from peer.parallel.inner_steps import FlatInnerSteps, InnerSteps
from peer.shared_vectors import SharedVectors
from peer.swarm.diloco import DilocoStrategy
from peer.swarm.strategy import Strategy, TrainedParameters
from peer.swarm.sync import SyncStrategy
from protos.contract.run_spec import RunSpec


def build_strategy(
    spec: RunSpec, inner: InnerSteps | None, parameters: TrainedParameters, vectors: SharedVectors
) -> Strategy:
    """The strategy of `spec`, at work on a model's parameters; `inner` steps for diloco."""
    if spec.strategy.name == "diloco":
        assert inner is not None
        return DilocoStrategy(spec, inner, parameters, vectors)
    return SyncStrategy(vectors, parameters, seq_len=spec.model.seq_len)


def flat_strategy(
    spec: RunSpec, model: Decoder, parameters: FlatParameters, vectors: SharedVectors
) -> Strategy:
    """The strategy of `spec` on a whole model on one device."""
    inner = None
    if has_inner_optimizer(spec):
        inner = FlatInnerSteps(spec.optimizer, model, parameters)
    return build_strategy(spec, inner, parameters, vectors)


def has_inner_optimizer(spec: RunSpec) -> bool:
    """True if the trainer keeps moments of its own."""
    return spec.strategy.name == "diloco"
