from protos.muster.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RefusalKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_KIND_UNSPECIFIED: _ClassVar[RefusalKind]
    REFUSAL_KIND_RESYNC: _ClassVar[RefusalKind]
    REFUSAL_KIND_SUPERSEDED: _ClassVar[RefusalKind]
    REFUSAL_KIND_NOT_A_MEMBER: _ClassVar[RefusalKind]
    REFUSAL_KIND_INVALID: _ClassVar[RefusalKind]
    REFUSAL_KIND_ATTEMPT_FAILED: _ClassVar[RefusalKind]
REFUSAL_KIND_UNSPECIFIED: RefusalKind
REFUSAL_KIND_RESYNC: RefusalKind
REFUSAL_KIND_SUPERSEDED: RefusalKind
REFUSAL_KIND_NOT_A_MEMBER: RefusalKind
REFUSAL_KIND_INVALID: RefusalKind
REFUSAL_KIND_ATTEMPT_FAILED: RefusalKind

class RoundValue(_message.Message):
    __slots__ = ("run_id", "incarnation", "outer_step", "roster_directive_number", "averaged_digest", "contributions_digest", "previous_state_digest", "next_directive_number")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIRECTIVE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    AVERAGED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NEXT_DIRECTIVE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    incarnation: int
    outer_step: int
    roster_directive_number: int
    averaged_digest: bytes
    contributions_digest: bytes
    previous_state_digest: bytes
    next_directive_number: int
    def __init__(self, run_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., roster_directive_number: _Optional[int] = ..., averaged_digest: _Optional[bytes] = ..., contributions_digest: _Optional[bytes] = ..., previous_state_digest: _Optional[bytes] = ..., next_directive_number: _Optional[int] = ...) -> None: ...

class LeasedRange(_message.Message):
    __slots__ = ("lease", "begin_window", "end_window")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BEGIN_WINDOW_FIELD_NUMBER: _ClassVar[int]
    END_WINDOW_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.Signed
    begin_window: int
    end_window: int
    def __init__(self, lease: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., begin_window: _Optional[int] = ..., end_window: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("peer_id", "ranges", "loss_nats")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    LOSS_NATS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    ranges: _containers.RepeatedCompositeFieldContainer[LeasedRange]
    loss_nats: float
    def __init__(self, peer_id: _Optional[str] = ..., ranges: _Optional[_Iterable[_Union[LeasedRange, _Mapping]]] = ..., loss_nats: _Optional[float] = ...) -> None: ...

class Contributions(_message.Message):
    __slots__ = ("contributions",)
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    def __init__(self, contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("value", "attempt", "voter", "signature")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VOTER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    value: bytes
    attempt: int
    voter: str
    signature: bytes
    def __init__(self, value: _Optional[bytes] = ..., attempt: _Optional[int] = ..., voter: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("value", "attempt", "votes", "contributions")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    value: bytes
    attempt: int
    votes: _containers.RepeatedCompositeFieldContainer[VoteSignature]
    contributions: bytes
    def __init__(self, value: _Optional[bytes] = ..., attempt: _Optional[int] = ..., votes: _Optional[_Iterable[_Union[VoteSignature, _Mapping]]] = ..., contributions: _Optional[bytes] = ...) -> None: ...

class VoteSignature(_message.Message):
    __slots__ = ("voter", "signature")
    VOTER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    voter: str
    signature: bytes
    def __init__(self, voter: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class JoinGroup(_message.Message):
    __slots__ = ("previous_state_digest", "contribution", "piece_digests", "newest_directive", "upload_bytes_per_second", "download_bytes_per_second")
    PREVIOUS_STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    PIECE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    previous_state_digest: bytes
    contribution: Contribution
    piece_digests: _containers.RepeatedScalarFieldContainer[bytes]
    newest_directive: _common_pb2.Signed
    upload_bytes_per_second: int
    download_bytes_per_second: int
    def __init__(self, previous_state_digest: _Optional[bytes] = ..., contribution: _Optional[_Union[Contribution, _Mapping]] = ..., piece_digests: _Optional[_Iterable[bytes]] = ..., newest_directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., upload_bytes_per_second: _Optional[int] = ..., download_bytes_per_second: _Optional[int] = ...) -> None: ...

class FormGroup(_message.Message):
    __slots__ = ("members", "reducer_piece_ends", "next_directive")
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    REDUCER_PIECE_ENDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[JoinGroup]
    reducer_piece_ends: _containers.RepeatedScalarFieldContainer[int]
    next_directive: _common_pb2.Signed
    def __init__(self, members: _Optional[_Iterable[_Union[JoinGroup, _Mapping]]] = ..., reducer_piece_ends: _Optional[_Iterable[int]] = ..., next_directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class ExchangeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExchangeAnswer(_message.Message):
    __slots__ = ("highest_vote", "contributions", "newest_directive", "previous_state_digest", "next_directive")
    HIGHEST_VOTE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NEXT_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    highest_vote: Vote
    contributions: bytes
    newest_directive: _common_pb2.Signed
    previous_state_digest: bytes
    next_directive: _common_pb2.Signed
    def __init__(self, highest_vote: _Optional[_Union[Vote, _Mapping]] = ..., contributions: _Optional[bytes] = ..., newest_directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., previous_state_digest: _Optional[bytes] = ..., next_directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class Repropose(_message.Message):
    __slots__ = ("value", "contributions", "next_directive", "holders")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    value: bytes
    contributions: bytes
    next_directive: _common_pb2.Signed
    holders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, value: _Optional[bytes] = ..., contributions: _Optional[bytes] = ..., next_directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ..., holders: _Optional[_Iterable[str]] = ...) -> None: ...

class RoundRefusal(_message.Message):
    __slots__ = ("reason", "kind", "attempt", "accused_peer_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ACCUSED_PEER_ID_FIELD_NUMBER: _ClassVar[int]
    reason: str
    kind: RefusalKind
    attempt: int
    accused_peer_id: str
    def __init__(self, reason: _Optional[str] = ..., kind: _Optional[_Union[RefusalKind, str]] = ..., attempt: _Optional[int] = ..., accused_peer_id: _Optional[str] = ...) -> None: ...

class Nudge(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RoundMessage(_message.Message):
    __slots__ = ("incarnation", "outer_step", "attempt", "join_group", "form_group", "vote", "exchange_request", "exchange_answer", "repropose", "certificate", "refusal", "nudge")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    JOIN_GROUP_FIELD_NUMBER: _ClassVar[int]
    FORM_GROUP_FIELD_NUMBER: _ClassVar[int]
    VOTE_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_ANSWER_FIELD_NUMBER: _ClassVar[int]
    REPROPOSE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    NUDGE_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    outer_step: int
    attempt: int
    join_group: JoinGroup
    form_group: FormGroup
    vote: Vote
    exchange_request: ExchangeRequest
    exchange_answer: ExchangeAnswer
    repropose: Repropose
    certificate: Certificate
    refusal: RoundRefusal
    nudge: Nudge
    def __init__(self, incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., attempt: _Optional[int] = ..., join_group: _Optional[_Union[JoinGroup, _Mapping]] = ..., form_group: _Optional[_Union[FormGroup, _Mapping]] = ..., vote: _Optional[_Union[Vote, _Mapping]] = ..., exchange_request: _Optional[_Union[ExchangeRequest, _Mapping]] = ..., exchange_answer: _Optional[_Union[ExchangeAnswer, _Mapping]] = ..., repropose: _Optional[_Union[Repropose, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., refusal: _Optional[_Union[RoundRefusal, _Mapping]] = ..., nudge: _Optional[_Union[Nudge, _Mapping]] = ...) -> None: ...

class RoundAck(_message.Message):
    __slots__ = ("incarnation", "outer_step", "done_ratio")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    DONE_RATIO_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    outer_step: int
    done_ratio: float
    def __init__(self, incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., done_ratio: _Optional[float] = ...) -> None: ...

class CoordinatorExchangeRequest(_message.Message):
    __slots__ = ("incarnation", "outer_step", "attempt")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    outer_step: int
    attempt: int
    def __init__(self, incarnation: _Optional[int] = ..., outer_step: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class CoordinatorExchangeResponse(_message.Message):
    __slots__ = ("answer", "certificate", "is_promised", "reason")
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    IS_PROMISED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    answer: ExchangeAnswer
    certificate: Certificate
    is_promised: bool
    reason: str
    def __init__(self, answer: _Optional[_Union[ExchangeAnswer, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., is_promised: bool = ..., reason: _Optional[str] = ...) -> None: ...

class SubmitVotesRequest(_message.Message):
    __slots__ = ("request_id", "votes", "contributions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VOTES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    votes: _containers.RepeatedCompositeFieldContainer[Vote]
    contributions: bytes
    def __init__(self, request_id: _Optional[str] = ..., votes: _Optional[_Iterable[_Union[Vote, _Mapping]]] = ..., contributions: _Optional[bytes] = ...) -> None: ...

class SubmitVotesResponse(_message.Message):
    __slots__ = ("certificate", "reason")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    certificate: Certificate
    reason: str
    def __init__(self, certificate: _Optional[_Union[Certificate, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class ReportCertificatesRequest(_message.Message):
    __slots__ = ("request_id", "certificates")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    certificates: _containers.RepeatedCompositeFieldContainer[Certificate]
    def __init__(self, request_id: _Optional[str] = ..., certificates: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ...) -> None: ...

class ReportCertificatesResponse(_message.Message):
    __slots__ = ("receipts", "directive")
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[CertificateReceipt]
    directive: _common_pb2.Signed
    def __init__(self, receipts: _Optional[_Iterable[_Union[CertificateReceipt, _Mapping]]] = ..., directive: _Optional[_Union[_common_pb2.Signed, _Mapping]] = ...) -> None: ...

class CertificateReceipt(_message.Message):
    __slots__ = ("outer_step", "is_stored", "credited_tokens", "uncredited_tokens", "reason")
    OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    IS_STORED_FIELD_NUMBER: _ClassVar[int]
    CREDITED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCREDITED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    outer_step: int
    is_stored: bool
    credited_tokens: int
    uncredited_tokens: int
    reason: str
    def __init__(self, outer_step: _Optional[int] = ..., is_stored: bool = ..., credited_tokens: _Optional[int] = ..., uncredited_tokens: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class FetchCertificatesRequest(_message.Message):
    __slots__ = ("incarnation", "from_outer_step", "num_certificates")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FROM_OUTER_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    from_outer_step: int
    num_certificates: int
    def __init__(self, incarnation: _Optional[int] = ..., from_outer_step: _Optional[int] = ..., num_certificates: _Optional[int] = ...) -> None: ...

class FetchCertificatesResponse(_message.Message):
    __slots__ = ("certificates",)
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedCompositeFieldContainer[Certificate]
    def __init__(self, certificates: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ...) -> None: ...
