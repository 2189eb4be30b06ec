import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Signed(_message.Message):
    __slots__ = ("payload", "signature")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class WindowRange(_message.Message):
    __slots__ = ("data_pass", "chunk_index", "begin_window", "end_window")
    DATA_PASS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    BEGIN_WINDOW_FIELD_NUMBER: _ClassVar[int]
    END_WINDOW_FIELD_NUMBER: _ClassVar[int]
    data_pass: int
    chunk_index: int
    begin_window: int
    end_window: int
    def __init__(self, data_pass: _Optional[int] = ..., chunk_index: _Optional[int] = ..., begin_window: _Optional[int] = ..., end_window: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("run_id", "incarnation", "peer_id", "lease_number", "fence", "range", "chunk_digest")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    incarnation: int
    peer_id: str
    lease_number: int
    fence: int
    range: WindowRange
    chunk_digest: bytes
    def __init__(self, run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., peer_id: _Optional[str] = ..., lease_number: _Optional[int] = ..., fence: _Optional[int] = ..., range: _Optional[_Union[WindowRange, _Mapping]] = ..., chunk_digest: _Optional[bytes] = ...) -> None: ...

class RosterEntry(_message.Message):
    __slots__ = ("peer_id", "p2p_peer_id", "public_key", "has_vote", "round_tokens", "max_round_tokens", "can_accept_connections", "addresses", "name")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    P2P_PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    HAS_VOTE_FIELD_NUMBER: _ClassVar[int]
    ROUND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROUND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAN_ACCEPT_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    p2p_peer_id: str
    public_key: bytes
    has_vote: bool
    round_tokens: int
    max_round_tokens: int
    can_accept_connections: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    name: str
    def __init__(self, peer_id: _Optional[str] = ..., p2p_peer_id: _Optional[str] = ..., public_key: _Optional[bytes] = ..., has_vote: bool = ..., round_tokens: _Optional[int] = ..., max_round_tokens: _Optional[int] = ..., can_accept_connections: bool = ..., addresses: _Optional[_Iterable[str]] = ..., name: _Optional[str] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("run_id", "incarnation", "directive_number", "roster", "budget_tokens", "cooldown_start_tokens", "is_paused", "reason", "issue_time")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COOLDOWN_START_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ISSUE_TIME_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    incarnation: int
    directive_number: int
    roster: _containers.RepeatedCompositeFieldContainer[RosterEntry]
    budget_tokens: int
    cooldown_start_tokens: int
    is_paused: bool
    reason: str
    issue_time: _timestamp_pb2.Timestamp
    def __init__(self, run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., directive_number: _Optional[int] = ..., roster: _Optional[_Iterable[_Union[RosterEntry, _Mapping]]] = ..., budget_tokens: _Optional[int] = ..., cooldown_start_tokens: _Optional[int] = ..., is_paused: bool = ..., reason: _Optional[str] = ..., issue_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class IncarnationRecord(_message.Message):
    __slots__ = ("run_id", "incarnation", "to_outer_step", "base_incarnation", "base_state_digest", "directive", "reason", "decide_time")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TO_OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    BASE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BASE_STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DECIDE_TIME_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    incarnation: int
    to_outer_step: int
    base_incarnation: int
    base_state_digest: bytes
    directive: Signed
    reason: str
    decide_time: _timestamp_pb2.Timestamp
    def __init__(self, run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., to_outer_step: _Optional[int] = ..., base_incarnation: _Optional[int] = ..., base_state_digest: _Optional[bytes] = ..., directive: _Optional[_Union[Signed, _Mapping]] = ..., reason: _Optional[str] = ..., decide_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Attestation(_message.Message):
    __slots__ = ("run_id", "incarnation", "outer_step", "state_digest", "peer_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    incarnation: int
    outer_step: int
    state_digest: bytes
    peer_id: str
    def __init__(self, run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., state_digest: _Optional[bytes] = ..., peer_id: _Optional[str] = ...) -> None: ...
