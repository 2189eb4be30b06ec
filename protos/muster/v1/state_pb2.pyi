from protos.muster.v1 import common_pb2 as _common_pb2
from protos.muster.v1 import rounds_pb2 as _rounds_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StateInfoRequest(_message.Message):
    __slots__ = ("run_id", "incarnation", "from_outer_step")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FROM_OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    incarnation: int
    from_outer_step: int
    def __init__(self, run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., from_outer_step: _Optional[int] = ...) -> None: ...

class StateInfoResponse(_message.Message):
    __slots__ = ("attestations", "newest_certificate", "incarnation_record", "directive", "reason", "certificates", "directives")
    ATTESTATIONS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_RECORD_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVES_FIELD_NUMBER: _ClassVar[int]
    attestations: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    newest_certificate: _rounds_pb2.Certificate
    incarnation_record: _common_pb2.Signed
    directive: _common_pb2.Signed
    reason: str
    certificates: _containers.RepeatedCompositeFieldContainer[_rounds_pb2.Certificate]
    directives: _containers.RepeatedCompositeFieldContainer[_common_pb2.Signed]
    def __init__(self, attestations: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ..., newest_certificate: _Optional[_Union[_rounds_pb2.Certificate, _Mapping]] = ..., incarnation_record: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., reason: _Optional[str] = ..., certificates: _Optional[_Iterable[_Union[_rounds_pb2.Certificate, _Mapping]]] = ..., directives: _Optional[_Iterable[_Union[_common_pb2.Signed, _Mapping]]] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("incarnation", "outer_step")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    outer_step: int
    def __init__(self, incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ...) -> None: ...

class PieceRequest(_message.Message):
    __slots__ = ("begin_piece", "end_piece")
    BEGIN_PIECE_FIELD_NUMBER: _ClassVar[int]
    END_PIECE_FIELD_NUMBER: _ClassVar[int]
    begin_piece: int
    end_piece: int
    def __init__(self, begin_piece: _Optional[int] = ..., end_piece: _Optional[int] = ...) -> None: ...

class SnapshotHeader(_message.Message):
    __slots__ = ("state_meta", "piece_digests", "total_bytes", "refusal_reason", "unreported_certificates", "directive", "is_busy")
    STATE_META_FIELD_NUMBER: _ClassVar[int]
    PIECE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_REASON_FIELD_NUMBER: _ClassVar[int]
    UNREPORTED_CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    IS_BUSY_FIELD_NUMBER: _ClassVar[int]
    state_meta: bytes
    piece_digests: _containers.RepeatedScalarFieldContainer[bytes]
    total_bytes: int
    refusal_reason: str
    unreported_certificates: _containers.RepeatedCompositeFieldContainer[_rounds_pb2.Certificate]
    directive: _common_pb2.Signed
    is_busy: bool
    def __init__(self, state_meta: _Optional[bytes] = ..., piece_digests: _Optional[_Iterable[bytes]] = ..., total_bytes: _Optional[int] = ..., refusal_reason: _Optional[str] = ..., unreported_certificates: _Optional[_Iterable[_Union[_rounds_pb2.Certificate, _Mapping]]] = ..., directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., is_busy: bool = ...) -> None: ...

class AveragedRequest(_message.Message):
    __slots__ = ("averaged_digest",)
    AVERAGED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    averaged_digest: bytes
    def __init__(self, averaged_digest: _Optional[bytes] = ...) -> None: ...

class AveragedHeader(_message.Message):
    __slots__ = ("piece_digests", "total_bytes", "refusal_reason")
    PIECE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_REASON_FIELD_NUMBER: _ClassVar[int]
    piece_digests: _containers.RepeatedScalarFieldContainer[bytes]
    total_bytes: int
    refusal_reason: str
    def __init__(self, piece_digests: _Optional[_Iterable[bytes]] = ..., total_bytes: _Optional[int] = ..., refusal_reason: _Optional[str] = ...) -> None: ...

class PartHeader(_message.Message):
    __slots__ = ("incarnation", "outer_step", "attempt", "begin_piece", "end_piece")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BEGIN_PIECE_FIELD_NUMBER: _ClassVar[int]
    END_PIECE_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    outer_step: int
    attempt: int
    begin_piece: int
    end_piece: int
    def __init__(self, incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., attempt: _Optional[int] = ..., begin_piece: _Optional[int] = ..., end_piece: _Optional[int] = ...) -> None: ...

class ReducedHeader(_message.Message):
    __slots__ = ("piece_digests", "refusal_reason")
    PIECE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_REASON_FIELD_NUMBER: _ClassVar[int]
    piece_digests: _containers.RepeatedScalarFieldContainer[bytes]
    refusal_reason: str
    def __init__(self, piece_digests: _Optional[_Iterable[bytes]] = ..., refusal_reason: _Optional[str] = ...) -> None: ...

class LaneAsk(_message.Message):
    __slots__ = ("bundle_id", "secret", "num_lanes", "port")
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    NUM_LANES_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    bundle_id: bytes
    secret: bytes
    num_lanes: int
    port: int
    def __init__(self, bundle_id: _Optional[bytes] = ..., secret: _Optional[bytes] = ..., num_lanes: _Optional[int] = ..., port: _Optional[int] = ...) -> None: ...

class LaneAnswer(_message.Message):
    __slots__ = ("port", "is_connected", "reason")
    PORT_FIELD_NUMBER: _ClassVar[int]
    IS_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    port: int
    is_connected: bool
    reason: str
    def __init__(self, port: _Optional[int] = ..., is_connected: bool = ..., reason: _Optional[str] = ...) -> None: ...
