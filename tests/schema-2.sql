-- The whole database of the platform: one SQLite file, WAL, read top to bottom.
-- Times are integer milliseconds since 1970-01-01 UTC. Every row that belongs to a customer reaches its tenant.
-- Secrets are never stored: `secret_hash` is the SHA-256 of a token's secret part, its `id` part is the look-up key.

-- A customer, alone with their devices, tokens and data.
create table tenant (
    id          integer primary key,
    name        text not null unique,
    created_at  integer not null
) strict;

-- A person's or program's key to the HTTP interface.
create table operator_token (
    id           text primary key,
    tenant_id    integer references tenant on delete cascade,  -- null: the platform's own, which manages tenants and sees inside none
    name         text not null,
    role         text not null check (role in ('viewer', 'operator', 'admin', 'platform')),
    secret_hash  blob not null,
    created_at   integer not null,
    expires_at   integer,                                      -- null: never
    check ((role = 'platform') = (tenant_id is null))
) strict, without rowid;
create index operator_token_by_tenant on operator_token (tenant_id);

-- What a new device shows once, to be given a token of its own.
create table provisioning_key (
    id           text primary key,
    tenant_id    integer not null references tenant on delete cascade,
    secret_hash  blob not null,
    created_at   integer not null,
    expires_at   integer,                                      -- null: never
    uses_left    integer check (uses_left >= 0)                -- null: any number
) strict, without rowid;
create index provisioning_key_by_tenant on provisioning_key (tenant_id);

-- A machine in the plant. Rarely written; what changes with every frame is in `presence`.
create table device (
    id          integer primary key,
    tenant_id   integer not null references tenant on delete cascade,
    name        text not null,
    created_at  integer not null,
    unique (tenant_id, name)
) strict;

-- A device's token. Its holder is the device, whatever name it gives.
create table device_token (
    id           text primary key,
    device_id    integer not null references device on delete cascade,
    secret_hash  blob not null,
    created_at   integer not null
) strict, without rowid;
create index device_token_by_device on device_token (device_id);

-- Where a device stands: its present or last session, and how far its frames are on disk. One narrow row a device,
-- for it is written with every batch.
create table presence (
    device_id        integer primary key references device on delete cascade,
    seq              integer not null default 0,  -- the highest frame number on disk; written in the transaction that stores the frame
    stamp            integer not null default 0,  -- the last time of receipt given to a sample without one; they never repeat
    session          integer not null default 0,  -- counts the device's sessions
    connected        integer not null default 0 check (connected in (0, 1)),
    connected_at     integer,
    disconnected_at  integer,                     -- of the session before, while one is open
    seen_at          integer,                     -- when the device was last heard, at most half a minute old while connected
    address          text,
    agent            text,                        -- what the device said it runs, name and version
    software_version text,                        -- of the same name in the document that the device reports
    config_version   integer not null default 0,  -- the configuration that is wanted, 0 for none; a row of `config`
    config_applied   integer                      -- the configuration that the device last said it has applied
) strict;

-- The timeline of a device: what happened to it, in the order in which it was committed.
create table event (
    id         integer primary key autoincrement,
    tenant_id  integer not null references tenant on delete cascade,
    device_id  integer not null references device on delete cascade,
    at         integer not null,
    kind       text not null,                     -- connected, disconnected, credentials, state, config
    detail     text not null check (json_valid(detail))
) strict;
create index event_by_device on event (device_id, id);
create index event_by_tenant on event (tenant_id, id);

-- One metric of one device. Numbers are handed out in memory by the only writer.
create table series (
    id         integer primary key,
    device_id  integer not null references device on delete cascade,
    metric     text not null,
    unique (device_id, metric)
) strict;

-- The readings, clustered by series and time, so that a range of one series is one walk over neighbouring pages.
-- The last write to a time wins. No foreign key: it would be looked up for every point.
create table telemetry (
    series_id  integer not null,
    ts         integer not null,
    value      any not null,                      -- real, integer (booleans are 0 and 1) or text
    primary key (series_id, ts)
) strict, without rowid;

-- Series of devices that were removed: their readings are deleted little by little, for a device may have millions.
create table removed_series (
    id  integer primary key
) strict;

-- What a device reports of itself, one whole document for every actual change, each with what changed.
create table state (
    device_id  integer not null references device on delete cascade,
    version    integer not null,                  -- 1, 2, 3 …
    at         integer not null,                  -- when the report came
    session    integer not null,                  -- in which of the device's sessions
    document   text not null,                     -- JSON, its keys in order, so that equal documents are equal texts
    changes    text not null,                     -- JSON: [{path (RFC 6901), from?, to?}]
    primary key (device_id, version)
) strict, without rowid;

-- What a device is wanted to be: every configuration that was pushed to it, and what came of it.
create table config (
    device_id  integer not null references device on delete cascade,
    version    integer not null,                  -- 1, 2, 3 …; the highest is the one that is wanted
    document   text not null,
    at         integer not null,                  -- when it was pushed
    author     text not null,                     -- the name of the token that pushed it
    timeout    integer not null,                  -- milliseconds from sending to `timed_out`
    status     text not null check (status in ('pending', 'sent', 'in_progress', 'applied', 'rejected', 'timed_out', 'superseded')),
    status_at  integer not null,
    sent_at    integer,                           -- when it last went out on a socket; null: never
    message    text,                              -- of the device's last verdict
    errors     text,                              -- of the device's last verdict, JSON: [{path, code, message}]
    primary key (device_id, version)
) strict, without rowid;
-- For the clock that looks for verdicts that did not come.
create index config_awaited on config (sent_at + timeout) where status in ('sent', 'in_progress');
