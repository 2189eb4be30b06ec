"""Join: a token makes a key a member once; after that the key alone is enough, from any address, as
often as it likes.

Both identities are proved by signatures over the coordinator's fresh nonce: the Ed25519 key that
signs everything, and the libp2p key by which neighbours recognise the peer. They are bound to one
another for the life of the membership. What a peer cannot honour of the run's spec is refused here,
before it costs anybody anything.
"""

from dataclasses import replace

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from coordinator.domain.membership import after_join, missing_capability
from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import OperationContext, load_book, load_run, unix_ms
from coordinator.operations.duties import release_duties
from coordinator.operations.epochs import admit_at_once
from coordinator.operations.leases import release_all
from coordinator.operations.members import (
    capabilities_from_json,
    capabilities_to_json,
    live_addresses,
    member_from_row,
    note_peer_state,
    row_from_member,
)
from coordinator.operations.requests import JoinRequest, JoinResponse
from coordinator.operations.requests_ledger import ReleaseAllRequest
from coordinator.operations.tokens import use_token
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_membership import PeerRow
from protos.contract.addresses import ALLOWED_ADDRESS, problem_of_address
from protos.contract.certificate import Tag, join_payload, p2p_join_payload
from protos.contract.errors import ErrorCode, RefusedError, UnavailableError, UsageError
from protos.contract.ids import (
    PROTOCOL_VERSION,
    is_valid_name,
    p2p_peer_id_from_public_key,
    peer_id_from_public_key,
)
from protos.contract.run_spec import RunSpec
from protos.contract.signing import has_valid_signature
from protos.contract.telemetry import PeerState
from protos.muster.v1 import common_pb2

NONCE_BYTES = 32
SESSION_KEY_BYTES = 32
MAX_ADDRESSES = 16
MAX_ADDRESS_CHARACTERS = 256
NUM_INITIAL_PEERS = 8
_MIN_RSA_BITS = 2048
_RSA_PROTOBUF_PREFIX = b"\x08\x00\x12"


def join(
    tx: Transaction, request: JoinRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> JoinResponse:
    """Admit a peer, new or known, and give it a session. Raises RefusedError or UsageError, each
    with its code.
    """
    run = load_run(tx, request.run_id)
    if run.state in FINAL_STATES:
        raise RefusedError(
            f"run {run.run_id!r} is {run.state}: {run.state_reason}",
            allowed="runs that are not over",
            remedy="ask the operator for the join string of another run",
            code=ErrorCode.RUN_NOT_ACTIVE,
        )
    peer_id, p2p_peer_id = _check_identity(request)
    known = tx.peer(run.run_id, peer_id)
    _check_binding(tx, run, known, peer_id=peer_id, p2p_peer_id=p2p_peer_id)
    _check_capabilities(request, RunSpec.from_wire(run.spec))
    if known is None:
        _check_room(tx, context, run.run_id)
        use_token(
            tx,
            run_id=run.run_id,
            secret=request.token_secret,
            peer_id=peer_id,
            now_unix_seconds=now_unix_seconds,
        )
    num_released = _end_earlier_process(tx, context, known, now_unix_seconds=now_unix_seconds)
    row = _admit(
        tx,
        context,
        request,
        known,
        run=run,
        peer_id=peer_id,
        p2p_peer_id=p2p_peer_id,
        now_unix_seconds=now_unix_seconds,
    )
    run = admit_at_once(tx, context, run, now_unix_seconds=now_unix_seconds)
    return _answer(
        tx,
        context,
        run,
        row,
        is_new_member=known is None,
        num_released_leases=num_released,
        now_unix_seconds=now_unix_seconds,
    )


def _check_identity(request: JoinRequest) -> tuple[str, str]:
    """(peer_id, p2p_peer_id), both proved; refuses other protocol versions first, since they may
    sign otherwise.
    """
    if request.protocol_version != PROTOCOL_VERSION:
        raise RefusedError(
            f"the peer speaks protocol version {request.protocol_version}",
            allowed=f"version {PROTOCOL_VERSION}",
            remedy="install the package version that the operator runs",
            code=ErrorCode.PROTOCOL_MISMATCH,
        )
    if len(request.nonce) != NONCE_BYTES:
        raise UsageError(
            f"nonce of {len(request.nonce)} bytes",
            allowed=f"{NONCE_BYTES} bytes",
            remedy="upgrade the peer",
        )
    try:
        peer_id = peer_id_from_public_key(request.public_key)
    except ValueError as error:
        raise UsageError(
            str(error), allowed="a raw Ed25519 public key", remedy="upgrade the peer"
        ) from error
    payload = join_payload(
        request.nonce, run_id=request.run_id, p2p_public_key=request.p2p_public_key
    )
    is_signed = has_valid_signature(request.public_key, Tag.JOIN, payload, request.signature)
    p2p_payload = p2p_join_payload(request.nonce, public_key=request.public_key)
    if not is_signed:
        raise _bad_proof(f"the Ed25519 signature of {peer_id}")
    if not is_signed_by_p2p_key(request.p2p_public_key, p2p_payload, request.p2p_signature):
        raise _bad_proof(f"the libp2p key's signature of {peer_id}")
    return peer_id, p2p_peer_id_from_public_key(request.p2p_public_key)


def _bad_proof(what: str) -> RefusedError:
    return RefusedError(
        f"{what} over the nonce is not valid",
        allowed="signatures by the keys that the request names, over the nonce of this Challenge",
        remedy="try again; if it stays, the key files under --home do not belong together",
        code=ErrorCode.SIGNATURE_INVALID,
    )


def is_signed_by_p2p_key(p2p_public_key: bytes, payload: bytes, signature: bytes) -> bool:
    """True if the libp2p RSA key (protobuf 08 00 12 length DER) of at least 2048 bits signed this
    (PKCS#1 v1.5, SHA-256).
    """
    if not p2p_public_key.startswith(_RSA_PROTOBUF_PREFIX):
        return False
    der, length, shift = b"", 0, 0
    for index, byte in enumerate(p2p_public_key[3:6], 4):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            der = p2p_public_key[index:]
            break
    if len(der) != length:
        return False
    try:
        key = load_der_public_key(der)
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < _MIN_RSA_BITS:
            return False
        key.verify(signature, payload, padding.PKCS1v15(), SHA256())
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def _check_binding(
    tx: Transaction, run: RunRow, known: PeerRow | None, *, peer_id: str, p2p_peer_id: str
) -> None:
    """Evicted keys stay out; a libp2p identity belongs to one member, and a member has one."""
    if known is not None and known.state == PeerState.EVICTED:
        raise RefusedError(
            f"{peer_id} was evicted from run {run.run_id!r}: {known.state_reason}",
            allowed="keys that were not evicted",
            remedy="talk to the operator",
            code=ErrorCode.PEER_EVICTED,
        )
    if known is not None and known.p2p_peer_id != p2p_peer_id:
        raise RefusedError(
            f"{peer_id} joined before with libp2p identity {known.p2p_peer_id}, now with "
            f"{p2p_peer_id}",
            allowed="one libp2p identity per member",
            remedy="restore p2p.key, or join with a new --home and an unused token",
            code=ErrorCode.IDENTITY_CONFLICT,
        )
    for row in tx.peers(run.run_id):
        if row.p2p_peer_id == p2p_peer_id and row.peer_id != peer_id:
            raise RefusedError(
                f"libp2p identity {p2p_peer_id} belongs to member {row.peer_id}",
                allowed="one member per libp2p identity",
                remedy="use a --home of its own for every peer; do not copy p2p.key",
                code=ErrorCode.IDENTITY_CONFLICT,
            )


def _check_capabilities(request: JoinRequest, spec: RunSpec) -> None:
    capabilities = request.capabilities
    missing = missing_capability(
        needs=(
            ("strategy", spec.strategy.name, capabilities.strategies),
            ("codec", spec.strategy.codec, capabilities.codecs),
            ("objective", spec.objective.name, capabilities.objectives),
        )
    )
    if missing:
        raise RefusedError(
            missing,
            allowed="peers that can honour the whole run spec",
            remedy="upgrade the peer's package",
            code=ErrorCode.CAPABILITY_MISSING,
        )
    if request.name and not is_valid_name(request.name):
        raise UsageError(
            f"name {request.name!r}",
            allowed="1 to 40 letters, digits, spaces, dots, hyphens, underscores",
            remedy="choose another --name",
        )
    check_addresses(capabilities.addresses)


def check_addresses(addresses: tuple[str, ...]) -> None:
    """Raises UsageError unless they are libp2p multiaddresses, few and short."""
    for address in addresses:
        is_long = len(address) > MAX_ADDRESS_CHARACTERS
        problem = "it is too long" if is_long else problem_of_address(address)
        if problem:
            raise UsageError(
                f"address {address[:80]!r}: {problem}",
                allowed=f"{ALLOWED_ADDRESS}; at most {MAX_ADDRESS_CHARACTERS} characters",
                remedy="correct --announce",
            )
    if len(addresses) > MAX_ADDRESSES:
        raise UsageError(
            f"{len(addresses)} addresses",
            allowed=f"at most {MAX_ADDRESSES}",
            remedy="announce fewer",
        )


def _check_room(tx: Transaction, context: OperationContext, run_id: str) -> None:
    num_live = sum(member_from_row(row).is_live for row in tx.peers(run_id))
    if num_live >= context.policy.max_peers:
        raise UnavailableError(
            f"run {run_id!r} has {num_live} live members",
            allowed=f"at most {context.policy.max_peers}",
            remedy="try again later, or ask the operator to raise max_peers",
            code=ErrorCode.RATE_LIMITED,
        )


def _end_earlier_process(
    tx: Transaction,
    context: OperationContext,
    known: PeerRow | None,
    *,
    now_unix_seconds: float,
) -> int:
    """Return leases and duties of an earlier process of this key; its unfinished work is gone.
    Returns how many leases.
    """
    if known is None:
        return 0
    reason = "the peer joined again: its earlier process is gone"
    request = ReleaseAllRequest(run_id=known.run_id, peer_id=known.peer_id, reason=reason)
    released = release_all(tx, request, context=context, now_unix_seconds=now_unix_seconds)
    release_duties(
        tx, known.run_id, known.peer_id, reason=reason, now_unix_seconds=now_unix_seconds
    )
    return released.num_released_leases


def _admit(
    tx: Transaction,
    context: OperationContext,
    request: JoinRequest,
    known: PeerRow | None,
    *,
    run: RunRow,
    peer_id: str,
    p2p_peer_id: str,
    now_unix_seconds: float,
) -> PeerRow:
    """Write the member's row with a new session."""
    now_unix_ms = unix_ms(now_unix_seconds)
    before = None if known is None else member_from_row(known)
    member = after_join(before, peer_id=peer_id, now_unix_seconds=now_unix_seconds)
    reach_problem = (
        "" if known is None else capabilities_from_json(known.capabilities_json).reach_problem
    )
    row = PeerRow(
        run_id=run.run_id,
        peer_id=peer_id,
        p2p_peer_id=p2p_peer_id,
        public_key=request.public_key,
        name=request.name or f"peer-{peer_id[:6]}",
        state=member.state,
        state_reason=member.state_reason,
        first_join_unix_ms=now_unix_ms if known is None else known.first_join_unix_ms,
        join_unix_ms=now_unix_ms,
        last_heartbeat_unix_ms=now_unix_ms,
        session_key=context.random_bytes(SESSION_KEY_BYTES),
        session_expire_unix_ms=unix_ms(now_unix_seconds + context.policy.session_seconds),
        capabilities_json=capabilities_to_json(
            replace(request.capabilities, reach_problem=reach_problem)
        ),
        claims_json="{}",
        attested_incarnation=-1,
        attested_outer_step=0,
        attested_digest=b"",
        has_vote=member.has_vote,
    )
    row = row_from_member(row, member)
    tx.put_peer(row)
    note_peer_state(tx, row, member, now_unix_seconds=now_unix_seconds)
    return row


def _answer(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    row: PeerRow,
    *,
    is_new_member: bool,
    num_released_leases: int,
    now_unix_seconds: float,
) -> JoinResponse:
    record = tx.incarnation(run.run_id, run.incarnation)
    directive = tx.directive(run.run_id, run.directive_number)
    assert record is not None and directive is not None, "a run has a record and a directive"
    newest_lease = tx.newest_lease_number(run.run_id, run.incarnation, row.peer_id)
    return JoinResponse(
        peer_id=row.peer_id,
        session_key=row.session_key,
        session_expire_unix_seconds=row.session_expire_unix_ms / 1000,
        run_spec=run.spec,
        coordinator_public_key=context.signing_key.public_key,
        dht_prefix=run.dht_prefix,
        initial_peers=live_addresses(
            tx.peers(run.run_id), except_peer_id=row.peer_id, num_addresses=NUM_INITIAL_PEERS
        ),
        incarnation_record=common_pb2.Signed(payload=record.payload, signature=record.signature),
        directive=common_pb2.Signed(payload=directive.payload, signature=directive.signature),
        outer_step=load_book(tx, run.run_id).certified_outer_step,
        dataset_id=bytes.fromhex(run.dataset_id),
        heartbeat_interval_seconds=context.heartbeat_interval_seconds,
        now_unix_seconds=now_unix_seconds,
        next_lease_number=newest_lease + 1,
        is_new_member=is_new_member,
        num_released_leases=num_released_leases,
    )
