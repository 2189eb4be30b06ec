"""Which strategy a spec names."""

from peer.model.decoder import Decoder, FlatParameters
from peer.shared_vectors import SharedVectors
from peer.swarm.diloco import DilocoStrategy
from peer.swarm.strategy import Strategy
from peer.swarm.sync import SyncStrategy
from protos.contract.run_spec import RunSpec


def build_strategy(
    spec: RunSpec, model: Decoder, parameters: FlatParameters, vectors: SharedVectors
) -> Strategy:
    """The strategy of `spec`, at work on a model's parameters."""
    if spec.strategy.name == "diloco":
        return DilocoStrategy(spec, model, parameters, vectors)
    return SyncStrategy(vectors, parameters, seq_len=spec.model.seq_len)
