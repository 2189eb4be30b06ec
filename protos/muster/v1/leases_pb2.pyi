from protos.muster.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AcquireLeasesRequest(_message.Message):
    __slots__ = ("request_id", "incarnation", "wanted_tokens", "held_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WANTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    incarnation: int
    wanted_tokens: int
    held_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., wanted_tokens: _Optional[int] = ..., held_tokens: _Optional[int] = ...) -> None: ...

class AcquireLeasesResponse(_message.Message):
    __slots__ = ("leases", "reason", "is_budget_exhausted")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IS_BUDGET_EXHAUSTED_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    reason: str
    is_budget_exhausted: bool
    def __init__(self, leases: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ..., reason: _Optional[str] = ..., is_budget_exhausted: bool = ...) -> None: ...

class ReleaseLeasesRequest(_message.Message):
    __slots__ = ("request_id", "incarnation", "lease_numbers", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    incarnation: int
    lease_numbers: _containers.RepeatedScalarFieldContainer[int]
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., lease_numbers: _Optional[_Iterable[int]] = ..., reason: _Optional[str] = ...) -> None: ...

class ReleaseLeasesResponse(_message.Message):
    __slots__ = ("num_released_leases",)
    NUM_RELEASED_LEASES_FIELD_NUMBER: _ClassVar[int]
    num_released_leases: int
    def __init__(self, num_released_leases: _Optional[int] = ...) -> None: ...
