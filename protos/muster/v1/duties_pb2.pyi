from protos.muster.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DutyKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DUTY_KIND_UNSPECIFIED: _ClassVar[DutyKind]
    DUTY_KIND_EVALUATE: _ClassVar[DutyKind]
    DUTY_KIND_CHECKPOINT: _ClassVar[DutyKind]
    DUTY_KIND_TRIAL: _ClassVar[DutyKind]
DUTY_KIND_UNSPECIFIED: DutyKind
DUTY_KIND_EVALUATE: DutyKind
DUTY_KIND_CHECKPOINT: DutyKind
DUTY_KIND_TRIAL: DutyKind

class Duty(_message.Message):
    __slots__ = ("duty_id", "kind", "fence", "eval_tokens", "min_outer_step", "trial")
    DUTY_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    EVAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    duty_id: str
    kind: DutyKind
    fence: int
    eval_tokens: int
    min_outer_step: int
    trial: Trial
    def __init__(self, duty_id: _Optional[str] = ..., kind: _Optional[_Union[DutyKind, str]] = ..., fence: _Optional[int] = ..., eval_tokens: _Optional[int] = ..., min_outer_step: _Optional[int] = ..., trial: _Optional[_Union[Trial, _Mapping]] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("run_spec", "mark_tokens")
    RUN_SPEC_FIELD_NUMBER: _ClassVar[int]
    MARK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    run_spec: bytes
    mark_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run_spec: _Optional[bytes] = ..., mark_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportDutyRequest(_message.Message):
    __slots__ = ("request_id", "duty_id", "fence", "failure_reason", "evaluation", "trial")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DUTY_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_REASON_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    duty_id: str
    fence: int
    failure_reason: str
    evaluation: Evaluation
    trial: TrialResult
    def __init__(self, request_id: _Optional[str] = ..., duty_id: _Optional[str] = ..., fence: _Optional[int] = ..., failure_reason: _Optional[str] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., trial: _Optional[_Union[TrialResult, _Mapping]] = ...) -> None: ...

class TrialResult(_message.Message):
    __slots__ = ("run_digest", "seed", "convention", "params_n", "flop_per_token", "points", "params_digest", "train_seconds", "divergence")
    RUN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    CONVENTION_FIELD_NUMBER: _ClassVar[int]
    PARAMS_N_FIELD_NUMBER: _ClassVar[int]
    FLOP_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    run_digest: str
    seed: int
    convention: str
    params_n: int
    flop_per_token: float
    points: _containers.RepeatedCompositeFieldContainer[TrialPoint]
    params_digest: bytes
    train_seconds: float
    divergence: str
    def __init__(self, run_digest: _Optional[str] = ..., seed: _Optional[int] = ..., convention: _Optional[str] = ..., params_n: _Optional[int] = ..., flop_per_token: _Optional[float] = ..., points: _Optional[_Iterable[_Union[TrialPoint, _Mapping]]] = ..., params_digest: _Optional[bytes] = ..., train_seconds: _Optional[float] = ..., divergence: _Optional[str] = ...) -> None: ...

class TrialPoint(_message.Message):
    __slots__ = ("tokens", "total_nats", "num_tokens", "num_bytes")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NATS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    total_nats: float
    num_tokens: int
    num_bytes: int
    def __init__(self, tokens: _Optional[int] = ..., total_nats: _Optional[float] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("incarnation", "outer_step", "state_digest", "total_nats", "num_tokens", "num_bytes", "schedule_tokens")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NATS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    outer_step: int
    state_digest: bytes
    total_nats: float
    num_tokens: int
    num_bytes: int
    schedule_tokens: int
    def __init__(self, incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., state_digest: _Optional[bytes] = ..., total_nats: _Optional[float] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ..., schedule_tokens: _Optional[int] = ...) -> None: ...

class ReportDutyResponse(_message.Message):
    __slots__ = ("is_accepted", "reason")
    IS_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    is_accepted: bool
    reason: str
    def __init__(self, is_accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class UploadCheckpointRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: CheckpointHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[CheckpointHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CheckpointHeader(_message.Message):
    __slots__ = ("duty_id", "fence", "attestation", "total_bytes")
    DUTY_ID_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    duty_id: str
    fence: int
    attestation: _common_pb2.Signed
    total_bytes: int
    def __init__(self, duty_id: _Optional[str] = ..., fence: _Optional[int] = ..., attestation: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class UploadCheckpointResponse(_message.Message):
    __slots__ = ("is_accepted", "reason")
    IS_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    is_accepted: bool
    reason: str
    def __init__(self, is_accepted: bool = ..., reason: _Optional[str] = ...) -> None: ...

class FetchCheckpointRequest(_message.Message):
    __slots__ = ("max_outer_step",)
    MAX_OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    max_outer_step: int
    def __init__(self, max_outer_step: _Optional[int] = ...) -> None: ...

class FetchCheckpointResponse(_message.Message):
    __slots__ = ("outer_step", "incarnation", "state_digest", "total_bytes", "data")
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    outer_step: int
    incarnation: int
    state_digest: bytes
    total_bytes: int
    data: bytes
    def __init__(self, outer_step: _Optional[int] = ..., incarnation: _Optional[int] = ..., state_digest: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
