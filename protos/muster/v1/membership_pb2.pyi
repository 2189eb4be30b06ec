import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from protos.muster.v1 import common_pb2 as _common_pb2
from protos.muster.v1 import duties_pb2 as _duties_pb2
from protos.muster.v1 import rounds_pb2 as _rounds_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChallengeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChallengeResponse(_message.Message):
    __slots__ = ("nonce", "now_time")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    NOW_TIME_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    now_time: _timestamp_pb2.Timestamp
    def __init__(self, nonce: _Optional[bytes] = ..., now_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("request_id", "run_id", "token_secret", "nonce", "public_key", "signature", "p2p_public_key", "p2p_signature", "name", "protocol_version", "capabilities")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    P2P_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    P2P_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    run_id: str
    token_secret: bytes
    nonce: bytes
    public_key: bytes
    signature: bytes
    p2p_public_key: bytes
    p2p_signature: bytes
    name: str
    protocol_version: int
    capabilities: PeerCapabilities
    def __init__(self, request_id: _Optional[str] = ..., run_id: _Optional[str] = ..., token_secret: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., p2p_public_key: _Optional[bytes] = ..., p2p_signature: _Optional[bytes] = ..., name: _Optional[str] = ..., protocol_version: _Optional[int] = ..., capabilities: _Optional[_Union[PeerCapabilities, _Mapping]] = ...) -> None: ...

class PeerCapabilities(_message.Message):
    __slots__ = ("package_version", "torch_version", "tokens_per_second", "memory_bytes", "can_accept_connections", "addresses", "codecs", "strategies", "objectives")
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAN_ACCEPT_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    STRATEGIES_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVES_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    torch_version: str
    tokens_per_second: float
    memory_bytes: int
    can_accept_connections: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    strategies: _containers.RepeatedScalarFieldContainer[str]
    objectives: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, package_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., tokens_per_second: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., can_accept_connections: bool = ..., addresses: _Optional[_Iterable[str]] = ..., codecs: _Optional[_Iterable[str]] = ..., strategies: _Optional[_Iterable[str]] = ..., objectives: _Optional[_Iterable[str]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("peer_id", "session_key", "session_expire_time", "run_spec", "coordinator_public_key", "dht_prefix", "initial_peers", "incarnation_record", "directive", "outer_step", "dataset_id", "heartbeat_interval_duration", "now_time", "next_lease_number", "checkpoint_mirrors")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_KEY_FIELD_NUMBER: _ClassVar[int]
    SESSION_EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    RUN_SPEC_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    DHT_PREFIX_FIELD_NUMBER: _ClassVar[int]
    INITIAL_PEERS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_RECORD_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    NOW_TIME_FIELD_NUMBER: _ClassVar[int]
    NEXT_LEASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_MIRRORS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    session_key: bytes
    session_expire_time: _timestamp_pb2.Timestamp
    run_spec: bytes
    coordinator_public_key: bytes
    dht_prefix: str
    initial_peers: _containers.RepeatedScalarFieldContainer[str]
    incarnation_record: _common_pb2.Signed
    directive: _common_pb2.Signed
    outer_step: int
    dataset_id: bytes
    heartbeat_interval_duration: _duration_pb2.Duration
    now_time: _timestamp_pb2.Timestamp
    next_lease_number: int
    checkpoint_mirrors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer_id: _Optional[str] = ..., session_key: _Optional[bytes] = ..., session_expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., run_spec: _Optional[bytes] = ..., coordinator_public_key: _Optional[bytes] = ..., dht_prefix: _Optional[str] = ..., initial_peers: _Optional[_Iterable[str]] = ..., incarnation_record: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., outer_step: _Optional[int] = ..., dataset_id: _Optional[bytes] = ..., heartbeat_interval_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., now_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., next_lease_number: _Optional[int] = ..., checkpoint_mirrors: _Optional[_Iterable[str]] = ...) -> None: ...

class PeerClaims(_message.Message):
    __slots__ = ("state", "state_reason", "outer_step", "loss_nats", "tokens_per_second", "sent_bytes", "received_bytes", "num_rounds_committed", "num_attempts_discarded", "round_seconds", "clock_offset_seconds", "memory_bytes", "trained_tokens", "upload_bytes_per_second", "download_bytes_per_second", "form_seconds", "exchange_seconds", "reduce_seconds", "agree_seconds", "apply_seconds", "averaging_bytes_per_second", "discard_reason")
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_NATS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_DISCARDED_FIELD_NUMBER: _ClassVar[int]
    ROUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_OFFSET_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FORM_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REDUCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGREE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    APPLY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AVERAGING_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DISCARD_REASON_FIELD_NUMBER: _ClassVar[int]
    state: str
    state_reason: str
    outer_step: int
    loss_nats: float
    tokens_per_second: float
    sent_bytes: int
    received_bytes: int
    num_rounds_committed: int
    num_attempts_discarded: int
    round_seconds: float
    clock_offset_seconds: float
    memory_bytes: int
    trained_tokens: int
    upload_bytes_per_second: float
    download_bytes_per_second: float
    form_seconds: float
    exchange_seconds: float
    reduce_seconds: float
    agree_seconds: float
    apply_seconds: float
    averaging_bytes_per_second: float
    discard_reason: str
    def __init__(self, state: _Optional[str] = ..., state_reason: _Optional[str] = ..., outer_step: _Optional[int] = ..., loss_nats: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., num_rounds_committed: _Optional[int] = ..., num_attempts_discarded: _Optional[int] = ..., round_seconds: _Optional[float] = ..., clock_offset_seconds: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., trained_tokens: _Optional[int] = ..., upload_bytes_per_second: _Optional[float] = ..., download_bytes_per_second: _Optional[float] = ..., form_seconds: _Optional[float] = ..., exchange_seconds: _Optional[float] = ..., reduce_seconds: _Optional[float] = ..., agree_seconds: _Optional[float] = ..., apply_seconds: _Optional[float] = ..., averaging_bytes_per_second: _Optional[float] = ..., discard_reason: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("request_id", "claims", "attestations", "lease_numbers", "directive_number", "incarnation", "addresses", "has_lost_state", "duty_id", "duty_fence")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    ATTESTATIONS_FIELD_NUMBER: _ClassVar[int]
    LEASE_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    HAS_LOST_STATE_FIELD_NUMBER: _ClassVar[int]
    DUTY_ID_FIELD_NUMBER: _ClassVar[int]
    DUTY_FENCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    claims: PeerClaims
    attestations: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    lease_numbers: _containers.RepeatedScalarFieldContainer[int]
    directive_number: int
    incarnation: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    has_lost_state: bool
    duty_id: str
    duty_fence: int
    def __init__(self, request_id: _Optional[str] = ..., claims: _Optional[_Union[PeerClaims, _Mapping]] = ..., attestations: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ..., lease_numbers: _Optional[_Iterable[int]] = ..., directive_number: _Optional[int] = ..., incarnation: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., has_lost_state: bool = ..., duty_id: _Optional[str] = ..., duty_fence: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("directive", "incarnation_record", "certificates", "lost_lease_numbers", "duty", "heartbeat_interval_duration", "now_time", "is_run_over", "run_state", "run_state_reason", "initial_peers", "outer_step")
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_RECORD_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    LOST_LEASE_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    DUTY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    NOW_TIME_FIELD_NUMBER: _ClassVar[int]
    IS_RUN_OVER_FIELD_NUMBER: _ClassVar[int]
    RUN_STATE_FIELD_NUMBER: _ClassVar[int]
    RUN_STATE_REASON_FIELD_NUMBER: _ClassVar[int]
    INITIAL_PEERS_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    directive: _common_pb2.Signed
    incarnation_record: _common_pb2.Signed
    certificates: _containers.RepeatedCompositeFieldContainer[_rounds_pb2.Certificate]
    lost_lease_numbers: _containers.RepeatedScalarFieldContainer[int]
    duty: _duties_pb2.Duty
    heartbeat_interval_duration: _duration_pb2.Duration
    now_time: _timestamp_pb2.Timestamp
    is_run_over: bool
    run_state: str
    run_state_reason: str
    initial_peers: _containers.RepeatedScalarFieldContainer[str]
    outer_step: int
    def __init__(self, directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., incarnation_record: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., certificates: _Optional[_Iterable[_Union[_rounds_pb2.Certificate, _Mapping]]] = ..., lost_lease_numbers: _Optional[_Iterable[int]] = ..., duty: _Optional[_Union[_duties_pb2.Duty, _Mapping]] = ..., heartbeat_interval_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., now_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., is_run_over: bool = ..., run_state: _Optional[str] = ..., run_state_reason: _Optional[str] = ..., initial_peers: _Optional[_Iterable[str]] = ..., outer_step: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("request_id", "reason", "attestations")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ATTESTATIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    attestations: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ..., attestations: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ("num_released_leases",)
    NUM_RELEASED_LEASES_FIELD_NUMBER: _ClassVar[int]
    num_released_leases: int
    def __init__(self, num_released_leases: _Optional[int] = ...) -> None: ...
