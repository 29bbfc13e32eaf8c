-- The whole database of the platform: one SQLite file, WAL, read top to bottom.
-- Times are integer milliseconds since 1970-01-01 UTC. Every row that belongs to a customer reaches its tenant.
-- Secrets are never stored: `secret_hash` is the SHA-256 of a token's secret part, its `id` part is the look-up key.

-- A customer, alone with their devices, tokens and data. Numbers of tenants, devices and series are never given out again:
-- what is under way to a removed one must not reach another.
create table tenant (
    id                integer primary key autoincrement,
    name              text unique,                             -- null: removed, and what is left of it is being deleted
    created_at        integer not null,
    devices_most      integer,                                 -- quotas; null: what the installation gives to every tenant
    connections_most  integer,
    points_most       integer,                                 -- stored in one day, UTC
    log_bytes_most    integer                                  -- likewise, as they were sent
) strict;

-- What a tenant stored, by day.
create table usage (
    tenant_id  integer not null references tenant on delete cascade,
    day        integer not null,                               -- since 1970-01-01, UTC
    points     integer not null,
    log_bytes  integer not null default 0,                     -- of lines of logs, as they were sent
    primary key (tenant_id, day)
) strict, without rowid;

-- A person's or program's key to the HTTP interface.
create table operator_token (
    id           text primary key,
    tenant_id    integer references tenant on delete cascade,  -- null: the platform's own, which manages tenants and sees inside none
    name         text not null,
    role         text not null check (role in ('viewer', 'operator', 'admin', 'platform')),
    secret_hash  blob not null,
    created_at   integer not null,
    expires_at   integer,                                      -- null: never
    used_at      integer,                                      -- at most half a minute before its last use; null: never used
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
    id          integer primary key autoincrement,
    tenant_id   integer not null references tenant on delete cascade,
    name        text,                                                   -- null: removed, and what is left of it is being deleted
    created_at  integer not null,
    disabled    integer not null default 0 check (disabled in (0, 1)),  -- its tokens are known, and refused
    labels      text not null default '{}' check (json_valid(labels)),  -- JSON: {name: text}, the operators' own
    old_name    text,                                                   -- of a removed device: its events stay in the live feed for a day
    removed_at  integer,
    emptied     integer not null default 0 check (emptied in (0, 1)),   -- of a removed device: nothing but its events is left
    unique (tenant_id, name)
) strict;
create index device_removed on device (emptied, removed_at) where name is null;
-- For hardware addresses as names: one in other letters is the same device.
create index device_by_folded_name on device (tenant_id, lower(name), name);

-- A device's token. Its holder is the device, whatever name it gives. There are two while the device is given a new one.
create table device_token (
    id           text primary key,
    device_id    integer not null references device on delete cascade,
    secret_hash  blob not null,
    created_at   integer not null,
    pending      integer not null default 0 check (pending in (0, 1)),  -- waits for its first use, which ends the one before it
    key_id       text                                                   -- the provisioning key that it came by, if the device made the secret
) strict, without rowid;
create index device_token_by_device on device_token (device_id);

-- Where a device stands: its present or last session, and how far its frames are on disk. One narrow row a device,
-- for it is written with every batch.
create table presence (
    device_id        integer primary key references device on delete cascade,
    seq              integer not null default 0,  -- the highest frame number on disk; written in the transaction that stores the frame
    stamp            integer not null default 0,  -- the newest time of receipt given to a sample without a time
    session          integer not null default 0,  -- counts the device's sessions
    connected        integer not null default 0 check (connected in (0, 1)),
    connected_at     integer,
    disconnected_at  integer,                     -- of the session before, while one is open
    seen_at          integer,                     -- when the device was last heard, at most half a minute old while connected
    address          text,
    agent            text,                        -- what the device said it runs, name and version
    software_version text,                        -- of the same name in the document that the device reports, its start
    config_version   integer not null default 0,  -- the configuration that is wanted, 0 for none; a row of `config`
    config_applied   integer                      -- the configuration that the device last said it has applied
) strict;

-- The timeline of a device: what happened to it, in the order in which it was committed.
create table event (
    id         integer primary key autoincrement,
    tenant_id  integer not null references tenant on delete cascade,
    device_id  integer not null references device on delete cascade,
    at         integer not null,
    kind       text not null,                     -- connected, disconnected, credentials, state, config, duplicates, conflict, removed
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

-- Series of devices that were removed, alone or with their tenant: their readings are deleted little by little, for a device may have millions.
create table removed_series (
    id  integer primary key
) strict;

-- Readings that an operator removed, by series and time from `start` up to but without `stop`: deleted little by little.
create table removed_range (
    id         integer primary key autoincrement,
    series_id  integer not null,
    start      integer not null,
    stop       integer not null
) strict;

-- What a device reports of itself: a version for every actual change, with what changed. The newest has the whole document, and so
-- has one in fifty.
create table state (
    device_id  integer not null references device on delete cascade,
    version    integer not null,                  -- 1, 2, 3 …
    at         integer not null,                  -- when the report came
    session    integer not null,                  -- in which of the device's sessions
    document   text not null,                     -- JSON, its keys in order, so that equal documents are equal texts; or empty
    changes    text not null,                     -- JSON: [{path (RFC 6901), from?, to?}]
    primary key (device_id, version)
) strict, without rowid;

-- The text of a configuration: one row for a push, however many devices it goes to, and for all its roll-backs.
create table document (
    id    integer primary key autoincrement,
    text  text not null                           -- JSON, its keys in order
) strict;

-- What a device is wanted to be: every configuration that was pushed to it, and what came of it.
create table config (
    device_id  integer not null references device on delete cascade,
    version    integer not null,                  -- 1, 2, 3 …; the highest is the one that is wanted
    document_id integer not null references document,
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
create index config_by_document on config (document_id);

-- A configuration for many devices that some of them still have to be given: a part of them in each transaction, by their names.
create table push (
    id           integer primary key autoincrement,
    tenant_id    integer not null references tenant on delete cascade,
    match        text not null,                   -- glob of the names
    document_id  integer not null references document,
    timeout      integer not null,                -- as in `config`
    newest       integer not null,                -- the newest device of that time: later ones are not meant
    done         text not null,                   -- devices up to this name have it
    actor        text not null check (json_valid(actor))  -- JSON: who answers for it, as the audit shows it
) strict;
create index push_by_tenant on push (tenant_id, id);
create index push_by_document on push (document_id);
-- For a start, after which the verdicts that are awaited have their whole time again.
create index config_awaited on config (device_id, version) where status in ('sent', 'in_progress');

-- Who did what, to what, from where, and whether they might: every change and every debug access, refused ones too. An entry
-- is written in the transaction of its change. None is ever changed; they go only with all else of a removed tenant.
create table audit (
    id         integer primary key autoincrement,
    tenant_id  integer references tenant,         -- null: the platform's own affairs
    at         integer not null,
    token      text,                              -- the id of the token or provisioning key; null: the command line
    name       text not null,                     -- of the token
    role       text not null,
    action     text not null,                     -- device.remove, config.push …
    target     text,                              -- a name or an id, as the action has it
    device     text,                              -- by name, where one is meant; the entry outlives it
    address    text,
    outcome    text not null,                     -- ok, or the code of the refusal
    detail     text check (detail is null or json_valid(detail))  -- JSON: what else the action was told
) strict;
create index audit_by_tenant on audit (tenant_id, id);
create index audit_by_device on audit (tenant_id, device, id) where device is not null;
create index audit_by_name on audit (tenant_id, name, id);
create index audit_by_token on audit (tenant_id, token, id) where token is not null;
create index audit_by_action on audit (tenant_id, action, id);
create trigger removed_tenant_stays_removed before update of name on tenant
when old.name is null
begin
    select raise(abort, 'a removed tenant stays removed');
end;
create trigger audit_is_not_updated before update on audit
begin
    select raise(abort, 'the audit is append-only');
end;
create trigger audit_is_not_deleted before delete on audit
when old.tenant_id is null or exists (select 1 from tenant where id = old.tenant_id and name is not null)
begin
    select raise(abort, 'the audit is append-only');
end;
create trigger audit_is_not_replaced before insert on audit
when exists (select 1 from audit where id = new.id)
begin
    select raise(abort, 'the audit is append-only');
end;

-- Which numbers the entries of an hour have, in the timelines, in the audit and in the logs, those of all tenants together: by it a range
-- of times is found among the entries of a device or a tenant, which lie in the order of their numbers. Times need not rise with
-- numbers: the clock may be set. Triggers keep it for timelines and audit, and no row goes.
create table hour (
    kind   text not null check (kind in ('event', 'audit', 'log')),
    hour   integer not null,                      -- since 1970-01-01 00:00 UTC
    first  integer not null,                      -- the lowest number, and the highest
    last   integer not null,
    primary key (kind, hour)
) strict, without rowid;
create trigger hour_of_event after insert on event
begin
    insert into hour (kind, hour, first, last) values ('event', new.at / 3600000, new.id, new.id)
    on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
end;
create trigger hour_of_moved_event after update of at on event
begin
    insert into hour (kind, hour, first, last) values ('event', new.at / 3600000, new.id, new.id)
    on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
end;
create trigger hour_of_audit after insert on audit
begin
    insert into hour (kind, hour, first, last) values ('audit', new.at / 3600000, new.id, new.id)
    on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
end;

-- What devices log, in the order in which it came. No foreign keys: they would be looked up for every line.
create table log_line (
    id           integer primary key autoincrement,
    tenant_id    integer not null,
    device_id    integer not null,
    at           integer not null,                  -- the sender's time, or that of receipt where it gave none
    received_at  integer not null,
    level        integer not null check (level between 2 and 7),  -- as severities of syslog (RFC 5424): 2 is critical, 7 is debug
    message      text not null,
    logger       text,                              -- which part of the sender says it
    host         text,
    fields       text                               -- JSON: what else the sender told
) strict;
-- Which numbers the lines of a tenant have that came in an hour, by the server's clock: by it those that are too old are found. Those of
-- others, and of other hours if the clock was set, may lie between them. A row goes with the last of its lines.
create table log_hour (
    tenant_id  integer not null references tenant on delete cascade,
    hour       integer not null,                    -- since 1970-01-01 00:00 UTC
    first      integer not null,                    -- the lowest number, and the highest
    last       integer not null,
    primary key (tenant_id, hour)
) strict, without rowid;
-- The words of all lines. `who` holds words of the server's own: t1 is a tenant, d1 a device, t1l4 a level of a tenant. So a search
-- is narrowed within the index. The texts themselves are not kept here a second time.
create virtual table log_index using fts5 (who, text, content = '', columnsize = 0, tokenize = 'unicode61 remove_diacritics 2');
-- The words that a tenant's lines have had, but for numbers and the like, and in which of them a part of a word stands.
create table log_word (
    id         integer primary key,
    tenant_id  integer not null,
    word       text not null,
    unique (tenant_id, word)
) strict;
create virtual table log_word_index using fts5 (word, content = 'log_word', content_rowid = 'id', columnsize = 0, tokenize = 'trigram');
-- The words that `log_index` has at present.
create virtual table log_vocabulary using fts5vocab (log_index, 'row');

-- A secret that is good for nothing but adding lines to a device: it crosses the wire in clear where TLS is not used.
create table log_token (
    id           text primary key,
    device_id    integer not null references device on delete cascade,
    secret_hash  blob not null,
    created_at   integer not null
) strict, without rowid;
create index log_token_by_device on log_token (device_id);

-- Addresses and networks whose lines are a device's, for senders that cannot show a token.
create table syslog_source (
    network    text primary key,                    -- 10.0.0.7/32
    device_id  integer not null references device on delete cascade
) strict, without rowid;
create index syslog_source_by_device on syslog_source (device_id);

-- Which lines came lately, of those that their sender may tell again when it is not sure: each is stored once.
create table log_repeat (
    device_id    integer not null,
    repeat_id    text not null,                     -- the sender's own number of a line
    received_at  integer not null,
    primary key (device_id, repeat_id)
) strict, without rowid;
create index log_repeat_by_time on log_repeat (received_at);

-- How long a tenant's data is kept, where it is not as long as the installation says.
create table retention (
    tenant_id  integer not null references tenant on delete cascade,
    kind       text not null check (kind in ('logs')),
    days       integer not null check (days > 0),
    primary key (tenant_id, kind)
) strict, without rowid;

-- What is watched, and when it is an alert.
create table rule (
    id          integer primary key autoincrement,
    tenant_id   integer not null references tenant on delete cascade,
    name        text not null,
    body        text not null check (json_valid(body)),  -- JSON: all of it, as it was sent
    changed_at  integer not null,
    author      text not null,                           -- the name of the token that changed it last
    last_line   integer not null,                        -- of a rule about logs: lines up to this number are judged
    unique (tenant_id, name)
) strict;

-- A rule's finding about a device: pending, then firing, then resolved; one that ends before it fires is deleted. What it shows of its
-- rule is as it was then. There is one at a time for a rule and a device.
create table alert (
    id            integer primary key,                   -- numbers are handed out in memory by the only writer, and rise
    tenant_id     integer not null references tenant on delete cascade,
    device_id     integer not null references device on delete cascade,
    rule_id       integer not null,                      -- no foreign key: an alert outlives its rule
    rule          text not null,
    kind          text not null,                         -- of its condition: above, offline …
    severity      text not null,
    labels        text not null check (json_valid(labels)),
    metric        text,
    series_id     integer,                               -- of its readings, if it has some
    text          text not null,
    value         any,                                   -- what was judged when its condition began to hold
    since         integer not null,                      -- the condition holds, by the times of readings
    fired_at      integer,                               -- null: pending
    ended_at      integer,                               -- the condition holds no more; the alert is resolved if that stays so
    resolved_at   integer,                               -- null: open
    reason        text,                                  -- why it was resolved
    catching_up   integer not null default 0 check (catching_up in (0, 1)),  -- it fired among readings that came late: nobody is told yet
    changed_at    integer not null,                      -- by the server's clock
    acknowledged  text check (acknowledged is null or json_valid(acknowledged))  -- JSON: {by, at, until, text}
) strict;
create unique index alert_open on alert (rule_id, device_id) where resolved_at is null;
create index alert_by_tenant on alert (tenant_id, id);
create index alert_by_device on alert (device_id, rule_id, resolved_at);
create index alert_open_by_device on alert (device_id) where resolved_at is null;
create index alert_firing on alert (tenant_id, id) where fired_at is not null and resolved_at is null;

-- For a time nobody is told of the alerts that it covers; those that have all that it asks for.
create table silence (
    id          integer primary key autoincrement,
    tenant_id   integer not null references tenant on delete cascade,
    match       text not null,                           -- glob of names of devices
    labels      text not null check (json_valid(labels)),  -- JSON: labels that the alert or its device has, {name: text}
    rule        text,                                    -- a rule's name; null: every rule
    created_at  integer not null,
    until       integer not null,
    author      text not null,
    text        text not null
) strict;
create index silence_by_tenant on silence (tenant_id, id);

-- Who is told of alerts, and how. What is removed is out of reach at once, and is deleted little by little.
create table webhook (
    id               integer primary key autoincrement,
    tenant_id        integer not null references tenant on delete cascade,
    form             text not null check (form in ('webhook', 'alertmanager', 'ntfy', 'slack', 'email')),
    url              text not null,                       -- it may hold secrets
    shown            text not null check (json_valid(shown)),  -- JSON: what people are shown of it
    match            text not null,                       -- glob of names of devices
    severity         integer not null,                    -- how severe an alert is at least: 1 for info, 4 for critical
    rule             text,                                -- a rule's name; null: every rule
    group_by         text not null,                       -- rule, device, or label: and a name
    group_wait       integer not null,                    -- milliseconds, as the next two: before the first notification of a group
    group_interval   integer not null,                    -- between two of them
    repeat_interval  integer not null,                    -- before the same is told again
    secret           text,                                -- signs what is sent: it is kept as it is
    old_secret       text,                                -- signs too, for some time
    old_until        integer,
    created_at       integer not null,
    removed          integer not null default 0 check (removed in (0, 1))
) strict;
create index webhook_by_tenant on webhook (tenant_id, id);
create index webhook_removed on webhook (id) where removed = 1;

-- Alerts that a receiver is told of together, as long as there are some.
create table alert_group (
    webhook_id  integer not null references webhook on delete cascade,
    key         text not null,                           -- what they have in common: the rule, the device, the label's text
    due_at      integer not null,                        -- when it is looked whether there is something to tell
    told_at     integer,                                 -- when something was told last; null: not yet
    primary key (webhook_id, key)
) strict, without rowid;
create index alert_group_due on alert_group (due_at);

-- Alerts that a receiver is to be told of, and those that it knows of. It is deleted when the receiver is told that the alert is over.
create table notice (
    webhook_id  integer not null references webhook on delete cascade,
    alert_id    integer not null references alert on delete cascade,
    key         text not null,                           -- of its group
    told_at     integer,                                 -- when it was told last that it fires; null: not yet
    primary key (webhook_id, alert_id)
) strict, without rowid;
create index notice_by_alert on notice (alert_id);
create index notice_by_group on notice (webhook_id, key);

-- What is sent to receivers. It is written together with what it tells, and sent until it arrives.
create table notification (
    id            integer primary key autoincrement,
    tenant_id     integer not null references tenant on delete cascade,
    webhook_id    integer not null references webhook on delete cascade,
    message_id    text not null,                         -- the receiver knows it by this, whenever it is sent again
    at            integer not null,
    alerts        integer not null,                      -- how many it tells of
    headers       text not null check (json_valid(headers)),  -- JSON: what is sent beside the body
    body          text,                                  -- null: it is sent no more
    status        text not null default 'waiting' check (status in ('waiting', 'delivered', 'given_up')),
    tries         integer not null default 0,
    next_at       integer,                               -- when it is tried; null: no more
    error         text,                                  -- of the last try
    delivered_at  integer
) strict;
create index notification_by_tenant on notification (tenant_id, id);
create index notification_by_webhook on notification (webhook_id, id);
create index notification_waiting on notification (webhook_id, id) where status = 'waiting';
create index notification_done on notification (at) where status <> 'waiting';

-- Readings that came after later ones of their series, from `start` to `stop`: the rule is to judge the series anew.
create table late_reading (
    rule_id    integer not null references rule on delete cascade,
    series_id  integer not null,
    device_id  integer not null references device on delete cascade,
    start      integer not null,
    stop       integer not null,
    primary key (rule_id, series_id)
) strict, without rowid;
create index late_reading_by_device on late_reading (device_id);

-- Rules and devices that have changed, for whoever watches. Devices only while there are rules.
create table changed (
    kind  text not null check (kind in ('rule', 'device')),
    id    integer not null,
    primary key (kind, id)
) strict, without rowid;
create trigger new_rule after insert on rule
begin
    insert or ignore into changed values ('rule', new.id);
end;
create trigger changed_rule after update of body on rule
begin
    insert or ignore into changed values ('rule', new.id);
end;
create trigger removed_rule after delete on rule
begin
    insert or ignore into changed values ('rule', old.id);
end;
create trigger new_device after insert on presence when exists (select 1 from rule)
begin
    insert or ignore into changed values ('device', new.device_id);
end;
create trigger changed_device after update of name, labels, disabled on device when exists (select 1 from rule)
begin
    insert or ignore into changed values ('device', new.id);
end;
create trigger changed_presence after update of connected on presence when exists (select 1 from rule)
begin
    insert or ignore into changed values ('device', new.device_id);
end;

-- A command for many devices: it is given to some of them at a time, in the order of their names.
create table command_batch (
    id             integer primary key autoincrement,
    tenant_id      integer not null references tenant on delete cascade,
    match          text not null,                        -- glob of the names
    argv           text not null check (json_valid(argv)),
    timeout        integer not null,                     -- as the next two, of each of its commands
    ttl            integer,
    parallel       integer not null check (parallel in (0, 1)),
    per_minute     integer,                              -- how many devices are given it in a minute; null: as many as there are
    failures_most  integer,                              -- it is stopped after so many that did not end well; null: never
    actor          text not null check (json_valid(actor)),  -- JSON: who answers for it, as the audit shows it
    key            text,                                 -- by which a request that is sent again is known
    at             integer not null,
    devices        integer not null,                     -- how many were to be given it
    newest         integer not null,                     -- the newest device of that time: later ones are not meant
    done           text not null default '',             -- devices up to this name were given it
    next_at        integer,                              -- when the next are given it, or it is taken back from them; null: it is over
    stopped        text                                  -- why it was stopped: cancelled, or failures
) strict;
create index command_batch_by_tenant on command_batch (tenant_id, id);
create unique index command_batch_by_key on command_batch (tenant_id, key) where key is not null;
create index command_batch_due on command_batch (next_at) where next_at is not null;
create index command_batch_open on command_batch (tenant_id) where next_at is not null;
create index command_batch_over on command_batch (at) where next_at is null;

-- A program that a device is to run, and what came of it. It moves on by what the device says, or by the clock; the end is final.
create table command (
    id             integer primary key autoincrement,
    device_id      integer not null references device on delete cascade,
    batch_id       integer,                              -- no foreign key: it would be looked up for every row
    argv           text not null check (json_valid(argv)),
    timeout        integer not null,                     -- milliseconds that it may run
    ttl            integer,                              -- milliseconds that it may wait for the device; null: it is for the open session
    parallel       integer not null check (parallel in (0, 1)),  -- it waits for no other command
    actor          text not null check (json_valid(actor)),  -- JSON: who answers for it, as the audit shows it
    key            text,                                 -- by which a request that is sent again is known
    status         text not null check (status in
        ('queued', 'sent', 'running', 'done', 'failed', 'refused', 'timed_out', 'cancelled', 'expired', 'lost')),
    at             integer not null,
    sent_at        integer,                              -- when it was first to go out on a socket
    started_at     integer,                              -- when the device said that it runs
    cancelled_at   integer,                              -- when the device was first to be told to end it
    ended_at       integer,
    due_at         integer,                              -- when the clock ends it, or looks again; null: it does not
    exit_code      integer,
    message        text,                                 -- why it ended as it did
    stored_bytes   integer not null default 0,           -- of its output, those that are kept
    output_bytes   integer not null default 0            -- all that it wrote, kept or not
) strict;
create index command_by_device on command (device_id, id);
create index command_open on command (device_id, id) where ended_at is null;
create index command_due on command (due_at) where due_at is not null;
create index command_ended on command (ended_at) where ended_at is not null;
create index command_by_batch on command (batch_id, id) where batch_id is not null;
create index command_by_status on command (batch_id, status, exit_code) where batch_id is not null;
create unique index command_by_key on command (device_id, key) where key is not null;

-- What commands write, in the order in which their devices read it. A character may be cut between two parts.
create table command_output (
    command_id  integer not null references command on delete cascade,
    start       integer not null,                        -- bytes of both streams before it
    stream      text not null check (stream in ('stdout', 'stderr')),
    at          integer not null,                        -- when it came
    data        blob not null,
    primary key (command_id, start)
) strict;

-- Tunnels that are open: what is left of them at a start ended with the server, and is entered in the audit then.
create table tunnel (
    id         integer primary key autoincrement,
    device_id  integer not null references device on delete cascade,
    port       integer not null,
    actor      text not null check (json_valid(actor)),  -- JSON: who answers for it, as the audit shows it
    at         integer not null
) strict;
create index tunnel_by_device on tunnel (device_id);

-- A random text, new at every start and every five minutes. It stands in the file beside the database too, so that a write-ahead log
-- is not replayed over a copy of another time.
create table salt (
    id     integer primary key check (id = 1),
    value  text not null
) strict;
