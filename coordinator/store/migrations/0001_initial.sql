-- First schema. Forward only: a released file is never edited, a change is a new file.
-- Instants are unix milliseconds, tokens and windows are counts, enums are text
-- (protos/contract/telemetry.py).

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE request_ids (
    caller TEXT NOT NULL,
    request_id TEXT NOT NULL,
    method TEXT NOT NULL,
    request_digest BLOB NOT NULL,
    response BLOB NOT NULL,
    store_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (caller, request_id)
) WITHOUT ROWID;
CREATE INDEX request_ids_by_time ON request_ids (store_unix_ms);

CREATE TABLE events (
    event_id INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    unix_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    peer_id TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX events_by_run ON events (run_id, event_id);

CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    run_digest TEXT NOT NULL,
    spec BLOB NOT NULL,
    dataset_id TEXT NOT NULL,
    dataset_dir TEXT NOT NULL,
    dht_prefix TEXT NOT NULL,
    state TEXT NOT NULL,
    state_reason TEXT NOT NULL,
    min_peers INTEGER NOT NULL,
    incarnation INTEGER NOT NULL,
    directive_number INTEGER NOT NULL,
    create_unix_ms INTEGER NOT NULL,
    start_unix_ms INTEGER NOT NULL,
    finish_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE incarnation_records (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    to_outer_step INTEGER NOT NULL,
    base_incarnation INTEGER NOT NULL,
    base_state_digest BLOB NOT NULL,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    decide_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (run_id, incarnation)
) WITHOUT ROWID;

CREATE TABLE directives (
    run_id TEXT NOT NULL REFERENCES runs,
    directive_number INTEGER NOT NULL,
    incarnation INTEGER NOT NULL,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    issue_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (run_id, directive_number)
) WITHOUT ROWID;

-- Membership.

CREATE TABLE tokens (
    token_id TEXT PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs,
    secret_digest BLOB NOT NULL UNIQUE,
    max_uses INTEGER NOT NULL,
    num_uses INTEGER NOT NULL,
    create_unix_ms INTEGER NOT NULL,
    expire_unix_ms INTEGER NOT NULL,
    is_revoked INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE token_uses (
    token_id TEXT NOT NULL REFERENCES tokens,
    peer_id TEXT NOT NULL,
    use_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (token_id, peer_id)
) WITHOUT ROWID;

CREATE TABLE peers (
    run_id TEXT NOT NULL REFERENCES runs,
    peer_id TEXT NOT NULL,
    p2p_peer_id TEXT NOT NULL,
    public_key BLOB NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    state_reason TEXT NOT NULL,
    first_join_unix_ms INTEGER NOT NULL,
    join_unix_ms INTEGER NOT NULL,
    last_heartbeat_unix_ms INTEGER NOT NULL,
    session_key BLOB NOT NULL,
    session_expire_unix_ms INTEGER NOT NULL,
    capabilities_json TEXT NOT NULL,
    claims_json TEXT NOT NULL,
    attested_incarnation INTEGER NOT NULL,
    attested_outer_step INTEGER NOT NULL,
    attested_digest BLOB NOT NULL,
    has_vote INTEGER NOT NULL,
    PRIMARY KEY (run_id, peer_id)
) WITHOUT ROWID;
CREATE INDEX peers_by_id ON peers (peer_id);

CREATE TABLE attestations (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    peer_id TEXT NOT NULL,
    state_digest BLOB NOT NULL,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    receive_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (run_id, incarnation, outer_step, peer_id)
) WITHOUT ROWID;

CREATE TABLE duties (
    duty_id TEXT PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    peer_id TEXT NOT NULL,
    fence INTEGER NOT NULL,
    eval_tokens INTEGER NOT NULL,
    min_outer_step INTEGER NOT NULL,
    create_unix_ms INTEGER NOT NULL,
    assign_unix_ms INTEGER NOT NULL,
    finish_unix_ms INTEGER NOT NULL,
    reason TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX duties_by_run ON duties (run_id, state);

CREATE TABLE evaluations (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    duty_id TEXT NOT NULL,
    peer_id TEXT NOT NULL,
    state_digest BLOB NOT NULL,
    total_nats REAL NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    schedule_tokens INTEGER NOT NULL,
    receive_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (run_id, incarnation, outer_step, duty_id)
) WITHOUT ROWID;

CREATE TABLE checkpoints (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    state_digest BLOB NOT NULL,
    path TEXT NOT NULL,
    total_bytes INTEGER NOT NULL,
    peer_id TEXT NOT NULL,
    store_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (run_id, incarnation, outer_step)
) WITHOUT ROWID;

-- Ledger.

CREATE TABLE books (
    run_id TEXT PRIMARY KEY REFERENCES runs,
    seq_len INTEGER NOT NULL,
    budget_tokens INTEGER NOT NULL,
    frontier_position INTEGER NOT NULL,
    frontier_window INTEGER NOT NULL,
    granted_tokens INTEGER NOT NULL,
    active_tokens INTEGER NOT NULL,
    released_tokens INTEGER NOT NULL,
    expired_tokens INTEGER NOT NULL,
    credited_tokens INTEGER NOT NULL,
    uncredited_tokens INTEGER NOT NULL,
    rolled_back_tokens INTEGER NOT NULL,
    schedule_tokens INTEGER NOT NULL,
    certified_outer_step INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE peer_totals (
    run_id TEXT NOT NULL REFERENCES runs,
    peer_id TEXT NOT NULL,
    credited_tokens INTEGER NOT NULL,
    uncredited_tokens INTEGER NOT NULL,
    rolled_back_tokens INTEGER NOT NULL,
    PRIMARY KEY (run_id, peer_id)
) WITHOUT ROWID;

CREATE TABLE leases (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    peer_id TEXT NOT NULL,
    lease_number INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    schedule_position INTEGER NOT NULL,
    data_pass INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    begin_window INTEGER NOT NULL,
    end_window INTEGER NOT NULL,
    state TEXT NOT NULL,
    credited_windows INTEGER NOT NULL,
    grant_unix_ms INTEGER NOT NULL,
    expire_unix_ms INTEGER NOT NULL,
    end_reason TEXT NOT NULL,
    PRIMARY KEY (run_id, incarnation, peer_id, lease_number)
) WITHOUT ROWID;
CREATE INDEX leases_by_chunk ON leases (run_id, incarnation, schedule_position);
CREATE INDEX leases_active_by_peer ON leases (run_id, peer_id) WHERE state = 'ACTIVE';
CREATE INDEX leases_active_by_expiry ON leases (run_id, expire_unix_ms) WHERE state = 'ACTIVE';

CREATE TABLE returned_ranges (
    run_id TEXT NOT NULL REFERENCES runs,
    schedule_position INTEGER NOT NULL,
    begin_window INTEGER NOT NULL,
    end_window INTEGER NOT NULL,
    data_pass INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    cause TEXT NOT NULL,
    PRIMARY KEY (run_id, schedule_position, begin_window)
) WITHOUT ROWID;
CREATE INDEX returned_ranges_by_cause
    ON returned_ranges (run_id, cause, schedule_position, begin_window);

CREATE TABLE journal (
    journal_number INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs,
    unix_ms INTEGER NOT NULL,
    kind TEXT NOT NULL,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    peer_id TEXT NOT NULL,
    lease_number INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    data_pass INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    begin_window INTEGER NOT NULL,
    end_window INTEGER NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX journal_by_run ON journal (run_id, journal_number);

CREATE TABLE certificates (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    next_directive_number INTEGER NOT NULL,
    num_members INTEGER NOT NULL,
    num_contributors INTEGER NOT NULL,
    trained_tokens INTEGER NOT NULL,
    credited_tokens INTEGER NOT NULL,
    uncredited_tokens INTEGER NOT NULL,
    schedule_tokens INTEGER NOT NULL,
    loss_nats REAL NOT NULL,
    store_unix_ms INTEGER NOT NULL,
    rolled_back_by INTEGER NOT NULL,
    value BLOB NOT NULL,
    certificate BLOB NOT NULL,
    PRIMARY KEY (run_id, incarnation, outer_step)
) WITHOUT ROWID;
CREATE INDEX certificates_live ON certificates (run_id, outer_step) WHERE rolled_back_by = 0;

CREATE TABLE credits (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    peer_id TEXT NOT NULL,
    lease_number INTEGER NOT NULL,
    schedule_position INTEGER NOT NULL,
    data_pass INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    begin_window INTEGER NOT NULL,
    end_window INTEGER NOT NULL,
    rolled_back_by INTEGER NOT NULL,
    PRIMARY KEY (run_id, schedule_position, begin_window, incarnation, outer_step)
) WITHOUT ROWID;
CREATE INDEX credits_by_step ON credits (run_id, outer_step);

CREATE TABLE uncredited (
    uncredited_id INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    peer_id TEXT NOT NULL,
    lease_number INTEGER NOT NULL,
    data_pass INTEGER NOT NULL,
    chunk_index INTEGER NOT NULL,
    begin_window INTEGER NOT NULL,
    end_window INTEGER NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX uncredited_by_run ON uncredited (run_id, outer_step);

CREATE TABLE acceptor (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    promised_attempt INTEGER NOT NULL,
    vote_attempt INTEGER NOT NULL,
    vote_value BLOB NOT NULL,
    equivocation_reason TEXT NOT NULL,
    PRIMARY KEY (run_id, incarnation, outer_step)
) WITHOUT ROWID;
