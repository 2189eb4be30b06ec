-- When a duty's holder last said that it works on it; before that it is as if never.

ALTER TABLE duties ADD COLUMN renew_unix_ms INTEGER NOT NULL DEFAULT 0;
UPDATE duties SET renew_unix_ms = assign_unix_ms;
