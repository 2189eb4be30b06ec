"""What the daemon tells the swarm process at start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from protos.contract.run_spec import RunSpec
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmConfig:
    """The `configure` message, parsed."""

    spec: RunSpec
    run_id: str
    key: SigningKey
    home: Path
    p2p_key_path: Path
    coordinator_public_key: bytes
    dht_prefix: str
    initial_peers: tuple[str, ...]
    host: str
    listen_port: int
    announce: tuple[str, ...]
    upload_limit_mbit: float | None
    incarnation_record: common_pb2.Signed
    directive: common_pb2.Signed
    outer_step: int
    """Newest certified outer step that the coordinator knows."""
    checkpoint_interval_seconds: float

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Self:
        """Parse the message; reads the identity key."""
        return cls(
            spec=RunSpec.from_wire(message["run_spec"]),
            run_id=message["run_id"],
            key=SigningKey(Path(message["identity_key_path"]).read_bytes()),
            home=Path(message["home"]),
            p2p_key_path=Path(message["p2p_key_path"]),
            coordinator_public_key=message["coordinator_public_key"],
            dht_prefix=message["dht_prefix"],
            initial_peers=tuple(message["initial_peers"]),
            host=message["host"],
            listen_port=message["listen_port"],
            announce=tuple(message["announce"]),
            upload_limit_mbit=message["upload_limit_mbit"],
            incarnation_record=common_pb2.Signed.FromString(message["incarnation_record"]),
            directive=common_pb2.Signed.FromString(message["directive"]),
            outer_step=message["outer_step"],
            checkpoint_interval_seconds=message["checkpoint_interval_seconds"],
        )
