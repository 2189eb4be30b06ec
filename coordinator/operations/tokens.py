"""Join tokens: a secret lets new keys into one run, so often and so long; only its hash is kept.

A use is a new key; the same key may always come back without one. Revoking or expiry ends what is
left of a token, not the memberships that came by it (that is what eviction is for).
"""

import hashlib
from dataclasses import replace

from coordinator.operations.common import OperationContext, unix_ms
from coordinator.operations.requests_admin import (
    CreateTokenRequest,
    CreateTokenResponse,
    ListTokensRequest,
    ListTokensResponse,
    RevokeTokenRequest,
    RevokeTokenResponse,
    TokenSummary,
)
from coordinator.operations.runs import find_run, find_run_to_change
from coordinator.store.base import Transaction
from coordinator.store.rows_membership import TokenRow
from protos.contract.errors import ErrorCode, RefusedError, UsageError

SECRET_BYTES = 32
_TOKEN_ID_BYTES = 4


def secret_digest(secret: bytes) -> bytes:
    """What the store keeps of a secret; it has 256 random bits, so a plain hash is enough."""
    return hashlib.sha256(secret).digest()


def use_token(
    tx: Transaction, *, run_id: str, secret: bytes, peer_id: str, now_unix_seconds: float
) -> None:
    """Count one new key against the token. Raises RefusedError: unknown, revoked, expired or
    exhausted.
    """
    row = tx.token_by_secret_digest(secret_digest(secret)) if secret else None
    if row is None or row.run_id != run_id:
        found = "a token that is not known here" if secret else "no token"
        raise RefusedError(
            f"{found} for run {run_id!r}",
            allowed="a join string of this run, or a key that has joined it before",
            remedy="copy the whole join string again, or ask the operator for one",
            code=ErrorCode.TOKEN_UNKNOWN,
        )
    if tx.has_token_use(row.token_id, peer_id):
        return
    state = token_state(row, now_unix_seconds=now_unix_seconds)
    code_and_text = {
        "REVOKED": (ErrorCode.TOKEN_REVOKED, "was revoked"),
        "EXPIRED": (
            ErrorCode.TOKEN_EXPIRED,
            f"expired {now_unix_seconds - row.expire_unix_ms / 1000:.0f} s ago",
        ),
        "EXHAUSTED": (ErrorCode.TOKEN_EXHAUSTED, f"has been used by {row.num_uses} keys"),
    }.get(state)
    if code_and_text is not None:
        code, text = code_and_text
        raise RefusedError(
            f"token {row.token_id} {text}",
            allowed=f"at most {row.max_uses} keys" if state == "EXHAUSTED" else "valid tokens",
            remedy="ask the operator for a new join string (muster-coordinator token create)",
            code=code,
        )
    tx.insert_token_use(row.token_id, peer_id, use_unix_ms=unix_ms(now_unix_seconds))
    tx.update_token(replace(row, num_uses=row.num_uses + 1))


def token_state(row: TokenRow, *, now_unix_seconds: float) -> str:
    """VALID, or why it admits nobody new: REVOKED, EXPIRED, EXHAUSTED, in this order."""
    if row.is_revoked:
        return "REVOKED"
    if row.expire_unix_ms and row.expire_unix_ms <= unix_ms(now_unix_seconds):
        return "EXPIRED"
    if row.max_uses and row.num_uses >= row.max_uses:
        return "EXHAUSTED"
    return "VALID"


def create_token(
    tx: Transaction,
    request: CreateTokenRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> CreateTokenResponse:
    """Make a token; its secret is in the answer and nowhere else. Raises UsageError for numbers
    below 0.
    """
    run = find_run_to_change(tx, request.run_id)
    if request.max_uses < 0 or not 0 <= request.expire_after_seconds < 1e10:
        raise UsageError(
            f"max_uses {request.max_uses}, expiry in {request.expire_after_seconds} s",
            allowed="numbers from 0, an expiry within 300 years; 0 means without limit",
            remedy="correct --max-uses or --expires",
        )
    secret = context.random_bytes(SECRET_BYTES)
    expire_unix_seconds = 0
    if request.expire_after_seconds:
        expire_unix_seconds = int(now_unix_seconds + request.expire_after_seconds)
    token_id = context.random_bytes(_TOKEN_ID_BYTES).hex()
    while tx.token(token_id) is not None:
        token_id = context.random_bytes(_TOKEN_ID_BYTES).hex()
    tx.insert_token(
        TokenRow(
            token_id=token_id,
            run_id=run.run_id,
            secret_digest=secret_digest(secret),
            max_uses=request.max_uses,
            num_uses=0,
            create_unix_ms=unix_ms(now_unix_seconds),
            expire_unix_ms=unix_ms(expire_unix_seconds),
            is_revoked=False,
        )
    )
    return CreateTokenResponse(
        run_id=run.run_id,
        token_id=token_id,
        secret=secret,
        max_uses=request.max_uses,
        expire_unix_seconds=expire_unix_seconds,
    )


def list_tokens(
    tx: Transaction,
    request: ListTokensRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ListTokensResponse:
    """Tokens of a run, newest first."""
    run = find_run(tx, request.run_id)
    tokens = tuple(
        TokenSummary(
            token_id=row.token_id,
            state=token_state(row, now_unix_seconds=now_unix_seconds),
            num_uses=row.num_uses,
            max_uses=row.max_uses,
            create_unix_seconds=row.create_unix_ms / 1000,
            expire_unix_seconds=row.expire_unix_ms // 1000,
        )
        for row in reversed(tx.tokens(run.run_id))
    )
    return ListTokensResponse(run_id=run.run_id, tokens=tokens)


def revoke_token(
    tx: Transaction,
    request: RevokeTokenRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> RevokeTokenResponse:
    """End a token. Raises RefusedError (TOKEN_UNKNOWN)."""
    row = tx.token(request.token_id)
    if row is None:
        raise RefusedError(
            f"token {request.token_id!r} is not known here",
            allowed="ids that `muster-coordinator token list` shows",
            remedy="correct the id",
            code=ErrorCode.TOKEN_UNKNOWN,
        )
    if row.is_revoked:
        return RevokeTokenResponse(token_id=row.token_id, was_revoked=False)
    tx.update_token(replace(row, is_revoked=True))
    tx.insert_event(
        run_id=row.run_id,
        unix_ms=unix_ms(now_unix_seconds),
        kind="token",
        peer_id="",
        text=f"token {row.token_id} revoked after {row.num_uses} uses",
    )
    return RevokeTokenResponse(token_id=row.token_id, was_revoked=True)
