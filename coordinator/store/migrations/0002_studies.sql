-- Forecasts of runs under way, studies (sweeps of small runs) and their trials.

CREATE TABLE forecasts (
    run_id TEXT NOT NULL REFERENCES runs,
    incarnation INTEGER NOT NULL,
    outer_step INTEGER NOT NULL,
    schedule_tokens INTEGER NOT NULL,
    credited_tokens INTEGER NOT NULL,
    budget_tokens INTEGER NOT NULL,
    make_unix_ms INTEGER NOT NULL,
    forecast_json TEXT NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (run_id, incarnation, outer_step)
) WITHOUT ROWID;

CREATE TABLE studies (
    study_id TEXT PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES runs,
    design_json TEXT NOT NULL,
    stage TEXT NOT NULL,
    stage_reason TEXT NOT NULL,
    create_unix_ms INTEGER NOT NULL,
    finish_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE trials (
    trial_id TEXT PRIMARY KEY,
    study_id TEXT NOT NULL REFERENCES studies,
    trial_number INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    plan_json TEXT NOT NULL,
    flop REAL NOT NULL,
    params_n REAL NOT NULL,
    first_peer_id TEXT NOT NULL,
    peer_id TEXT NOT NULL,
    fence INTEGER NOT NULL,
    result_json TEXT NOT NULL,
    finish_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX trials_by_study ON trials (study_id, trial_number);
