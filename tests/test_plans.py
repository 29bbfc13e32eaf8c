"""How the database finds what a statement asks for: no statement of the server walks a table that grows.

A server is run with everything that devices, operators, the command line and the clocks can make it do, and every read is asked
with all the arguments that `test_isolation` knows. Each statement is noted with what it binds, and explained by SQLite itself
(https://www.sqlite.org/eqp.html). A statement that is new is among them by itself; one that nothing here runs fails the test.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import re
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
import test_isolation as isolation
from plant import Device, Plant
from receivers import receiver, told_to
from test_access import EXAMPLES, LIMITS, MAY, Site, bearer, check_allowed, opened

import iiot

Parameters = Mapping[str, object] | tuple[object, ...]
QUICK = attrs.evolve(
    LIMITS, resume_seconds=0.0, clock_seconds=0.05, refusals=5, seen_seconds=0.1,
    push_devices=1, retention_seconds=0.1, repeat_seconds=0.0, command_grace_seconds=0.2, command_clock_seconds=0.05,
)  # fmt: skip

# Tables whose rows can be counted by hand: the customers, and one row for each table or for the file.
SMALL = {"tenant", "salt", "sqlite_sequence"}
# What never ends: a tenant has a bounded number of devices, tokens and keys, and any number of these; and what finds them all.
HISTORIES = {"event": "tenant_id=?", "audit": "tenant_id=?", "command": "device_id=?", "command_batch": "tenant_id=?"}
# Indexes of those of them alone that are not over, of which there is a bounded number.
OPEN = {"command_open", "command_batch_open"}
# What a statement makes for itself, and how much that is at most.
BOUNDED = {"shown": "a page of a list", "bucket": "a page of buckets", "wanted": "the metrics of one device", "fleet": "a page of series",
           "member": "the alerts of a group, which are of a tenant's devices", "head": "one notification of each receiver"}  # fmt: skip
EXPLAINED = ("select", "with", "insert", "update", "delete")


@attrs.frozen
class Allowed:
    """A step of a plan that would be wrong elsewhere: part of its statement, the step, and why it is right there."""

    sql: str
    step: str
    why: str


ALLOWED = (
    # Once, at a start.
    Allowed("'reason', 'crashed'", "SCAN presence", "once at a start: the sessions that a crash left open"),
    Allowed("select json_group_array(device_id) from presence where connected", "SCAN presence", "once at a start: likewise"),
    Allowed("update presence set connected = 0, disconnected_at = coalesce", "SCAN presence", "once at a start: likewise"),
    Allowed("from tunnel where true", "SCAN tunnel", "once at a start: the tunnels that a crash left open"),
    Allowed("(select * from tunnel where id = :id)", "SORT tunnel", "one alone"),
    Allowed("(select * from tunnel where true)", "SCAN tunnel", "once at a start: likewise"),
    Allowed("from config where status in ('sent', 'in_progress')", "SCAN config USING INDEX config_awaited",
            "once at a start: an index of those alone whose verdict is awaited"),
    Allowed("not exists (select 1 from operator_token)", "SCAN operator_token USING COVERING INDEX operator_token_by_tenant",
            "once at a start, and ends with the first"),
    Allowed("select 1 from alert_group where due_at > :now limit 1", "SEARCH alert_group USING COVERING INDEX alert_group_due (due_at>?)",
            "ends with the first"),
    Allowed("select coalesce(max(id), 0) + 1 from alert", "SCAN rule", "once at a start: all rules"),
    Allowed("json_array(rule_id, series_id, start, stop)", "SCAN late_reading", "once at a start: those that are not judged yet"),
    # The first of them, up to a limit.
    Allowed("from log_word where id > :after order by id limit :most", "SEARCH log_word USING INTEGER PRIMARY KEY (rowid>?)",
            "ends with its limit"),
    Allowed("select id, word from log_word where id > ?", "SEARCH log_word USING INTEGER PRIMARY KEY (rowid>?)",
            "those that the transaction has added"),
    Allowed("from log_line where id > ?", "SEARCH log_line USING INTEGER PRIMARY KEY (rowid>?)", "those that the transaction has added"),
    Allowed("from log_repeat where received_at <", "SEARCH log_repeat USING COVERING INDEX log_repeat_by_time (received_at<?)",
            "ends with its limit, or with the first"),
    Allowed("from syslog_source cross join device", "SCAN syslog_source USING COVERING INDEX syslog_source_by_device",
            "each device has a bounded number; now and then, while syslog comes"),
    Allowed("from log_line where id > ?", "SORT log_line", "those that the transaction has added, by their hour"),
    Allowed("select id from removed_series order by id limit ?", "SCAN removed_series", "ends with its limit"),
    Allowed("exists (select 1 from removed_series)", "SCAN removed_series", "ends with the first"),
    Allowed("exists (select 1 from removed_range)", "SCAN removed_range", "ends with the first"),
    Allowed("from removed_range order by id limit ?", "SCAN removed_range", "ends with its limit"),
    Allowed("select id from audit where tenant_id = ? limit ?", "SEARCH audit USING COVERING INDEX audit_by_tenant (tenant_id=?)",
            "ends with its limit"),
    Allowed("where event.id > :last and coalesce(name, old_name) is not null", "SEARCH event USING INTEGER PRIMARY KEY (rowid>?)",
            "ends with its limit, and follows on from the last look: what happened since, in all tenants"),
    Allowed("select coalesce(max(id), 0) from event where tenant_id = :tenant",
            "SEARCH event USING COVERING INDEX event_by_tenant (tenant_id=?)", "the last of them alone"),
    Allowed("select 'attention ' || weight", "SORT standing", "the devices of a tenant, of which there is a bounded number"),
    Allowed("select 'attention ' || weight", "SORT ranked", "those of one page"),
    # Alerts.
    Allowed("json_object('id', rule.id, 'name', rule.name)", "SORT rule", "the rules of a tenant, of which there is a bounded number"),
    Allowed("'rule', rule, 'status', 'resolved'", "SORT alert", "the open alerts of one rule or device"),
    Allowed("kind in ('connected', 'disconnected')", "SORT (subquery-1)", "the first of a device's sessions, up to a limit"),
    Allowed("kind in ('connected', 'disconnected')", "SORT (subquery-3)", "likewise"),
    # What a push goes to, in the order of names.
    Allowed("min(version) version from config join device", "SORT device", "the devices of one push"),
    Allowed("'timed_out') detail, device_id position", "SORT config", "those whose verdict is late at one look"),
    # Who is told of alerts: a tenant has a bounded number of receivers, and each a bounded number of notifications that wait.
    Allowed("from webhook where removed = 0 and ( exists (select 1 from alert", "SCAN webhook", "receivers of all, each looked at"),
    Allowed("from webhook cross join notification on notification.id =", "SCAN webhook", "likewise, for the first that waits for each"),
    Allowed("from notice cross join alert on alert.id = notice.alert_id", "SORT notice", "the alerts of one group"),
    Allowed("from webhook where removed = 0 and not exists ( select 1 from notification", "SCAN webhook", "likewise"),
    Allowed("from alert_group where due_at <= :now", "SEARCH alert_group USING INDEX alert_group_due (due_at<?)", "those that are due"),
    Allowed("select min(due_at) from alert_group", "SEARCH alert_group USING COVERING INDEX alert_group_due (due_at>?)", "the first alone"),
    Allowed("update alert_group set told_at = min", "SEARCH alert_group USING COVERING INDEX alert_group_due (due_at>?)",
            "once at a start, and when the clock was set back"),
    Allowed("from notification where status <> 'waiting' and at <", "SEARCH notification USING INDEX notification_done (at<?)",
            "ends with its limit"),
    Allowed("select count(*) from notification where status = 'waiting'", "SCAN notification USING INDEX notification_waiting",
            "an index of those alone that wait"),
    # Commands: a tenant has a bounded number of those for many that are not over.
    Allowed("select exists (select 1 from command where due_at <=", "SEARCH command USING COVERING INDEX command_due (due_at<?)",
            "ends with the first"),
    Allowed("exists (select 1 from command_batch where next_at <=",
            "SEARCH command_batch USING COVERING INDEX command_batch_due (next_at<?)", "ends with the first"),
    Allowed("select id from command where due_at <= ? order by due_at limit ?",
            "SEARCH command USING COVERING INDEX command_due (due_at<?)", "ends with its limit"),
    Allowed("from command_batch where next_at <= ? and stopped is", "SEARCH command_batch USING INDEX command_batch_due (next_at<?)",
            "those that are due"),
    Allowed("select exists (select 1 from command where ended_at <", "SEARCH command USING COVERING INDEX command_ended (ended_at<?)",
            "ends with the first"),
    Allowed("from command where ended_at < :before limit :most", "SEARCH command USING INDEX command_ended (ended_at<?)",
            "ends with its limit"),
    Allowed("from command where device_id in (select value from json_each(:ids)) limit :most",
            "SEARCH command USING INDEX command_by_device (device_id=?)", "ends with its limit"),
    Allowed("select id from command_batch where tenant_id = ? limit ?",
            "SEARCH command_batch USING COVERING INDEX command_batch_by_tenant (tenant_id=?)", "ends with its limit"),
    Allowed("from command_batch batch where at < :before", "SEARCH batch USING INDEX command_batch_over (at<?)",
            "those that are too old, which are deleted when the last of their commands is"),
    Allowed("select distinct tenant_id from push", "SCAN push USING COVERING INDEX push_by_tenant", "those alone that are under way"),
)  # fmt: skip

# Indexes without which a plan looks as good.
UNSEEN = {
    "device_by_folded_name": "the walk is over a tenant's devices, of which there is a bounded number",
    "alert_firing": "the walk is over a tenant's alerts of all times, by another index",
    "notice_by_alert": "the walk is over what one receiver knows of; and SQLite looks here when an alert is deleted",
    "notice_by_group": "the walk is over what one receiver knows of",
    "webhook_removed": "there are few receivers",
}

# Indexes by which SQLite alone finds what refers to a row that is deleted: no plan tells.
REFERRING = {"tunnel_by_device"}

# Functions whose statements are not explained.
NOT_RUN = {
    "migrate": "once in the life of a database, and it has to walk what it changes",
    "salt_of_file": "once at a start, on the file without its log; one row",
}


class Notes:
    """The statements that the program ran, with what one run of each bound, and the lines of the program that ran them."""

    def __init__(self) -> None:
        self.statements: dict[str, Parameters] = {}
        self.lines: set[int] = set()

    def connect(self, *arguments: Any, **named: Any) -> sqlite3.Connection:
        """Stands where `sqlite3.connect` stands. What tests run is not noted."""
        notes = self

        class Noted(sqlite3.Connection):
            def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
                caller = sys._getframe(1)
                if caller.f_code.co_filename == iiot.__file__:
                    notes.statements.setdefault(sql, parameters)
                    notes.lines.add(caller.f_lineno)
                return super().execute(sql, parameters)

        return CONNECT(*arguments, factory=Noted, **named)


CONNECT = sqlite3.connect


@attrs.frozen
class Step:
    """One step of a plan: a line of it, and the lines that stand beside it."""

    text: str
    beside: tuple[str, ...]
    made: frozenset[str]  # what the statement makes for itself: parts of it that are named, and inner selects

    @property
    def name(self) -> str:
        return self.text.split()[1]

    def is_wrong(self) -> bool:
        """A table from end to end, or from one end on, or all that a tenant has; or an index that is made for this one statement."""
        if self.text.startswith("SCAN"):
            return not ("VIRTUAL TABLE" in self.text or "CONSTANT ROW" in self.text or self.name in self.made | SMALL)
        if self.text.startswith("SEARCH"):
            bounds = re.search(r"\((\w+[=<>].*)\)", self.text)
            if "AUTOMATIC" in self.text:
                return True
            if bounds is None or self.name in self.made | SMALL:  # without bounds it is the first or the last of all
                return False
            return "=?" not in bounds[1] or (HISTORIES.get(self.name) == bounds[1] and OPEN.isdisjoint(self.text.split()))
        return self.text.startswith("BLOOM FILTER")

    def sorts(self) -> str | None:
        """What is sorted, unless it is a JSON text that came with the statement, or is bounded."""
        if not self.text.startswith("USE TEMP B-TREE"):
            return None
        first = next(text for text in self.beside if text.startswith(("SCAN", "SEARCH")))
        return None if "VIRTUAL TABLE" in first or first.split()[1] in BOUNDED else f"SORT {first.split()[1]}"


def plan(connection: sqlite3.Connection, sql: str, parameters: Parameters) -> Iterator[Step]:
    rows = connection.execute(f"explain query plan {sql}", parameters).fetchall()
    made = frozenset(text.split(" ", 1)[1] for _, _, _, text in rows if text.startswith(("MATERIALIZE", "CO-ROUTINE")))
    for _, parent, _, text in rows:
        yield Step(text, tuple(beside for _, other, _, beside in rows if other == parent), made)


def wrong_steps(connection: sqlite3.Connection, statements: Mapping[str, Parameters]) -> Iterator[tuple[str, str]]:
    """Steps that cost more as tables grow: the statement, and the step."""
    for sql, parameters in statements.items():
        for step in plan(connection, sql, parameters):
            wrong = step.text if step.is_wrong() else step.sorts()
            if wrong is not None:
                yield sql, wrong


def allowing(sql: str, step: str) -> list[Allowed]:
    return [allowed for allowed in ALLOWED if allowed.sql in " ".join(sql.split()) and allowed.step == step]


# ---- everything that the program does


async def use_routes(site: Site) -> None:
    """Every route, by somebody who may."""
    for route in iiot.ROUTES:
        for example in EXAMPLES[route.method, route.path]:
            role = next(role for role in ("admin", "platform") if role in MAY[route.role])
            answer = await site.ask(route, example, await site.subject(route), bearer(site.tokens[role]))
            check_allowed(answer, example)


async def provision(plant: Plant) -> None:
    """A device that lost the answer, and a hardware address that another device has in other letters."""
    _, key = await plant.ask("POST", "/provisioning-keys", {"uses": 1})
    for _ in range(2):
        device = await plant.connect()
        await device.send("provision", key=key["key"], device="0a:1b:2c:3d:4e:5f", secret="s" * 43)
        token = (await device.expect("credentials"))["token"]
    await (await device.hello(token)).close()
    assert (await plant.ask("PUT", "/iiot/0A-1B-2C-3D-4E-5F"))[0] == 201
    assert (await plant.ask("PUT", "/iiot/0A:1B:2C:3D:4E:5F"))[0] == 409


async def live_in_the_field(plant: Plant) -> Device:
    """A device that runs ahead of its clock, gets a new token, sends what cannot be taken, and never says what became of its
    configuration."""
    token = await plant.register("pump-1")
    device = await (await plant.connect()).hello(token, agent="pump/1")
    await device.store(*({"values": {"level": number}} for number in range(30_000)))  # half a minute ahead
    _, new = await plant.ask("POST", "/iiot/pump-1/token", {})
    device = await (await plant.connect()).hello(new["token"])
    for number in range(60):
        await device.send("state", seq=device.seq + 1 + number, reported={"n": number, "software_version": "1"})
    await device.send("state", seq=device.seq + 61, reported={"text": "x" * iiot.LONG_TEXT})
    await device.send("config_status", seq=device.seq + 62, version=7, status="applied")
    assert (await device.expect("error"))["code"] == "unknown_version"
    assert (await plant.ask("POST", "/iiot/pump-1?timeout=1ms&wait=20", {"n": 1}))[1]["status"] == "timed_out"
    for _ in range(10):
        assert (await plant.ask("DELETE", "/iiot/nobody"))[0] == 404
    await plant.ask("GET", "/iiot/pump-1/state/history?limit=1")
    return device


async def live_by_rules(plant: Plant) -> None:
    """Alerts that end before they fire, and one that comes late, is judged anew and has no end yet."""

    async def tell(*readings: tuple[int, Any]) -> None:
        await device.store(*({"ts": start + ts, "values": {"heat": value}} for ts, value in readings))

    device, start, high = await plant.device("pump-2"), iiot.now_ms() - 50_000, {"condition": {"above": 5}}
    for name, rule in (("waits", {**high, "for": "1h"}), ("leaps", {"condition": {"changed": 5}}), ("fires", high)):
        assert (await plant.ask("POST", "/rules", {"name": name, "metric": "heat", **rule}))[0] == 201
    lines = {"name": "tells", "condition": {"log": {"count": 1, "window": "1m"}}}
    assert (await plant.ask("POST", "/rules", lines))[0] == 201
    device.seq += 1
    await device.send("log", seq=device.seq, entries=[{"level": "error", "message": "too hot"}])
    await device.acknowledged(device.seq)
    await plant.until("/alerts?rule=tells", lambda body: body["items"])
    await tell((10_000, 9))
    await plant.until("/alerts?rule=waits", lambda body: body["items"])
    await tell((5_000, 7), (4_000, 1))
    await tell((20_000, 1))
    await plant.until("/alerts?rule=waits", lambda body: not body["items"])
    await plant.until("/alerts?rule=fires", lambda body: body["items"] and body["items"][0]["resolved_at"])
    await device.close()


def leave_an_alert_of_nobody(database: Path) -> None:
    """Its rule does not look at its device."""
    with plants.writing(database) as connection:
        rule = iiot.insert_rule(connection, 1, "of others", '{"name":"x","metric":"heat","match":"x","condition":{"above":5}}', "", 9_999)
        connection.execute(
            """insert into alert (tenant_id, device_id, rule_id, rule, kind, severity, labels, text, since, fired_at, changed_at)
               select 1, id, ?, 'of others', 'above', 'info', '{}', '', 1, 1, 1 from device where name = 'pump-1'""",
            (rule,),
        )


async def live_with_commands(plant: Plant) -> None:
    """Commands that end in every way, on a device that comes and goes and is removed, and too many failures of one for many."""

    async def run(path: str = "/iiot/valve-1/commands", **body: Any) -> int:
        status, answer = await plant.ask("POST", path, {"argv": ["true"], "timeout": "1h", **body})
        assert status == 202, answer
        return int(answer["id"])

    async def ended(number: int, status: str) -> None:
        await plant.until(f"/iiot/valve-1/commands/{number}", lambda body: body["status"] == status)

    async def tell(kind: str, number: int, **fields: Any) -> None:
        device.seq += 1
        await device.send(kind, seq=device.seq, command=number, **fields)
        await device.acknowledged(device.seq)

    device = await plant.device("valve-1")
    await ended(await run(timeout=0.01), "timed_out")
    running, waits = await run(), await run()
    await plant.ask("DELETE", f"/iiot/valve-1/commands/{waits}")
    waits = await run()
    await device.close()
    await ended(waits, "expired")
    device = await plant.device("valve-1")
    assert (await device.expect("command"))["command"] == running
    await tell("output", running, stream="stderr", data="no\n")
    await tell("result", running, status="done", exit_code=1)
    await plant.register("valve-2")  # it is not there
    many = await run("/commands", match="valve-*", stop_after_failures=1, per_minute=60, ttl="1h")
    number = (await device.expect("command"))["command"]
    await plant.until(f"/commands/{many}", lambda body: body["counts"] == {"queued": 1, "sent": 1})
    await tell("result", number, status="failed")
    await plant.until(f"/commands/{many}", lambda body: body["stopped"] == "failures" and body["counts"] == {"cancelled": 1, "failed": 1})
    assert (await plant.ask("DELETE", "/iiot/valve-1"))[0] == 204
    with plants.writing(plant.database) as connection:
        connection.execute("update command set ended_at = 1 where ended_at is not null")


async def be_told(plant: Plant) -> None:
    """Receivers that are told that something fires and is over, one that is told in parts, and one of whom nothing is left."""
    rule = {"name": "told", "metric": "level", "match": "pump-1", "condition": {"above": 5}}
    status, first = await plant.ask("POST", "/rules", rule)
    assert status == 201, first
    async with receiver() as hook:
        for form in ("webhook", "alertmanager"):
            made = await told_to(plant, hook.url, form=form, rule="told")
            await hook.next()
        assert (await plant.ask("DELETE", f"/rules/{first['id']}"))[0] == 204
        for _ in range(2):
            await hook.next()
        hook.answers = [410]
        assert (await plant.ask("POST", "/rules", rule))[0] == 201
        await plant.until("/notifications?status=given_up", lambda body: body["items"])
        assert (await plant.ask("DELETE", f"/webhooks/{made['id']}"))[0] == 204
    with plants.writing(plant.database) as connection:
        connection.execute("update notification set at = 1 where status <> 'waiting'")


def use_command_line(database: Path) -> None:
    for words in ("token --role viewer", "provisioning-key", "tenant add acme", "tenant list", "tenant remove acme --confirm acme"):
        iiot.main([*words.split(), "--db", str(database)])


MORE_ARGUMENTS: Mapping[str, tuple[object, ...]] = {
    "token_id: str": ("0123456789abcdef",),
    "key_id: str": ("0123456789abcdef",),
    "limits: Limits": (QUICK,),
    "last: int": (0,),
    "marks: list[int]": ([1, 2],),
    "waiting_most: int": (1_000,),
    "busy: list[int]": ([], [1, 2]),
    "latest: int": (iiot.LATEST,),
}


async def ask_everything(store: iiot.Store, database: Path) -> None:
    """Every read, with every combination of the arguments that are known."""
    side = isolation.Side("quartz", 1.5, "127.0.0.1", 5, 1, id=1)
    world = isolation.World((side, side), side, database, "")
    for title, read in isolation.reads_of(store):
        values = []
        for name, parameter in inspect.signature(read).parameters.items():
            typed = f"{name}: {parameter.annotation}"
            asked = isolation.ARGUMENTS.get(typed)
            if asked is None and typed not in MORE_ARGUMENTS:
                isolation.unknown_parameter(title, typed)
            given = MORE_ARGUMENTS[typed] if asked is None else asked(world, side)
            values.append([(name, value, parameter.kind is parameter.KEYWORD_ONLY) for value in given])
        for combination in itertools.product(*values):
            by_name = {name: value for name, value, named in combination if named}
            await read(*(value for _, value, named in combination if not named), **by_name)


async def live(folder: Path) -> Path:
    """Everything once; the database that it leaves."""
    database = folder / "iiot.db"
    iiot.prepare_database(database)
    assert iiot.first_credentials(database) is not None
    async with opened(folder, QUICK) as site:
        await use_routes(site)
        await provision(site.plant)
        device = await live_in_the_field(site.plant)
        await live_by_rules(site.plant)
        await live_with_commands(site.plant)
        await be_told(site.plant)
        use_command_line(database)
        await site.cleaned()
        with plants.writing(database) as connection:
            iiot.insert_log_lines(connection, [iiot.LogLine(1, 1, 1, 1, 3, "told again", None, None, None, "its number")])
            iiot.set_groups_back(connection)
            connection.execute("update log_line set received_at = 0")
            connection.execute("delete from log_hour")
            connection.execute("insert into log_hour select tenant_id, 0, min(id), max(id) from log_line group by tenant_id")
        async with asyncio.timeout(plants.PATIENCE):
            while plants.rows(database, "select 1 from log_line union all select 1 from log_word union all select 1 from log_repeat"):
                await asyncio.sleep(0.01)
        await device.close()
    leave_an_alert_of_nobody(database)
    async with iiot.Store.open(database, QUICK) as store:
        await store.writer.change(lambda connection: None)
        await ask_everything(store, database)
    return database


@attrs.frozen
class Lived:
    """What was noted, and a database like the one that it was noted on."""

    notes: Notes
    database: Path

    @property
    def explained(self) -> dict[str, Parameters]:
        return {sql: bound for sql, bound in self.notes.statements.items() if sql.split(None, 1)[0].lower() in EXPLAINED}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    notes = Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", notes.connect)
        database = asyncio.run(live(tmp_path_factory.mktemp("plans")))
    return Lived(notes, database)


# ---- the statements that there are


def begins(argument: ast.expr) -> str:
    """The text of a statement up to the first part that is put in; empty where it is made elsewhere."""
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    return str(argument.value) if isinstance(argument, ast.Constant) else ""


def runs(tree: ast.AST, function: str = "") -> Iterator[tuple[int, str]]:
    """Where the program runs a statement that can be explained, and in which function."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "execute":
            text = begins(node.args[0]).split(None, 1)
            if not text or text[0].lower() in EXPLAINED:
                yield node.func.end_lineno or 0, inside
        yield from runs(node, inside)


def test_every_statement_of_the_program_is_run_here(lived: Lived) -> None:
    """Reads are run by one function; `ask_everything` finds them all, or says which arguments are missing."""
    found = list(runs(ast.parse(Path(iiot.__file__).read_text(encoding="utf-8"))))
    assert len(found) > 80
    missing = [f"iiot.py:{line}: {function}" for line, function in found if line not in lived.notes.lines and function not in NOT_RUN]
    assert not missing, "\n".join(["run these in `live`:", *missing])
    assert set(NOT_RUN) <= {function for _, function in found}


# ---- how they are found


def told(steps: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["", *(f"{step}\n    in: {' '.join(sql.split())}" for sql, step in steps)])


def test_no_statement_costs_more_as_tables_grow(lived: Lived) -> None:
    with closing(sqlite3.connect(lived.database)) as connection:
        wrong = [(sql, step) for sql, step in wrong_steps(connection, lived.explained) if not allowing(sql, step)]
    assert not wrong, told(wrong)


def test_what_is_allowed_is_there(lived: Lived) -> None:
    with closing(sqlite3.connect(lived.database)) as connection:
        needed = [allowed for sql, step in wrong_steps(connection, lived.explained) for allowed in allowing(sql, step)]
    assert [allowed for allowed in ALLOWED if allowed not in needed] == []


def test_a_timeline_is_found_by_its_device(lived: Lived) -> None:
    """Not among all that happened in its tenant."""
    (asked,) = ((sql, bound) for sql, bound in lived.explained.items() if "from event" in sql and ":kinds" in sql)
    with closing(sqlite3.connect(lived.database)) as connection:
        assert any(step.text.startswith("SEARCH event USING INDEX event_by_device (device_id=?") for step in plan(connection, *asked))


def indexes(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return [name for (name,) in connection.execute("select name from sqlite_schema where type = 'index' and sql is not null")]


def test_every_index_is_used(lived: Lived) -> None:
    with closing(sqlite3.connect(lived.database)) as connection:
        steps = [step.text for sql, bound in lived.explained.items() for step in plan(connection, sql, bound)]
    assert {name for name in indexes(lived.database) if not any(name in step.split() for step in steps)} == REFERRING


def test_without_an_index_some_statement_costs_more(lived: Lived) -> None:
    """So what is to be seen is seen."""
    unseen = set()
    for name in indexes(lived.database):
        with closing(sqlite3.connect(lived.database, isolation_level=None)) as connection:
            connection.execute("begin")
            connection.execute(f"drop index {name}")
            with suppress(sqlite3.OperationalError):  # it is asked for by its name
                if all(allowing(sql, step) for sql, step in wrong_steps(connection, lived.explained)):
                    unseen.add(name)
            connection.execute("rollback")
    assert unseen == set(UNSEEN) | REFERRING


def test_what_refers_to_a_row_is_found_by_an_index_when_the_row_is_deleted(lived: Lived) -> None:
    """SQLite looks for it at every deletion, and does not tell in a plan."""
    with closing(sqlite3.connect(lived.database)) as connection:

        def names(sql: str) -> list[str]:
            return [name for (name,) in connection.execute(sql)]

        for table in names("select name from sqlite_schema where type = 'table'"):
            whole = names(f"select name from pragma_index_list('{table}') where not partial")
            keys = [names(f"select name from pragma_index_info('{index}')") for index in whole]
            keys.append(names(f"select name from pragma_table_info('{table}') where pk > 0 order by pk"))
            for column in names(f"select \"from\" from pragma_foreign_key_list('{table}')"):
                assert column in [key[0] for key in keys if key], f"{table}.{column}"


# ---- what is looked for among many


START = 1_767_225_600_000  # 2026-01-01T00:00:00Z
MINUTE = 60_000
FEW, MANY = 2_000, 20_000


def history(database: Path, entries: int) -> None:
    """So many entries of the audit and of a timeline, one a minute, all but a few alike. One is later than the rest: the clock was
    a year ahead when it was made."""
    iiot.prepare_database(database)

    def add(connection: sqlite3.Connection) -> None:
        iiot.insert_device(connection, 1, "press-1", iiot.mint("dev").stored, {})
        count = f"with recursive n (i) as (values (0) union all select i + 1 from n where i < {entries - 1})"
        at = f"{START} + i * {MINUTE} + case when i = 500 then {365 * iiot.DAY} else 0 end"
        connection.execute(
            f"""insert into audit (tenant_id, at, token, name, role, action, device, outcome) {count}
                select 1, {at}, iif(rare, 'another', 'token'), iif(rare, 'somebody', 'robot'), 'admin',
                       iif(rare, 'token.revoke', 'config.push'), iif(rare, 'press-2', 'press-1'), 'ok'
                from (select i, i in (100, 700, 1500) rare from n)"""
        )
        connection.execute(
            f"insert into event (tenant_id, device_id, at, kind, detail) {count} select 1, 1, {at}, 'state', '{{}}' from n"
        )

    iiot.change_database(database, add)


class Steps:
    """Counts what SQLite does, one step of its machine after the other."""

    def __init__(self) -> None:
        self.count = 0

    def connect(self, *arguments: Any, **named: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = CONNECT(*arguments, **named)
        connection.set_progress_handler(self.step, 1)
        return connection

    def step(self) -> int:
        self.count += 1
        return 0


def audit(**wanted: Any) -> Callable[[iiot.Store], Awaitable[object]]:
    chosen = attrs.evolve(iiot.AuditFilter(None, None, None, 0, iiot.LATEST), **wanted)
    return lambda store: store.read.accounts.audit(1, chosen, 10, iiot.INTEGERS - 1)


def export(**wanted: Any) -> Callable[[iiot.Store], Awaitable[object]]:
    chosen = attrs.evolve(iiot.AuditFilter(None, None, None, 0, iiot.LATEST), **wanted)
    return lambda store: store.read.accounts.audit_lines(1, chosen, 10, 0)


def timeline(start: int, stop: int) -> Callable[[iiot.Store], Awaitable[object]]:
    return lambda store: store.read.events(1, "press-1", 10, iiot.INTEGERS - 1, None, start, stop)


LONG_AGO = {"start": START + 10 * MINUTE, "stop": START + 20 * MINUTE}
AFTER_ALL = {"start": START + 400 * iiot.DAY}
LOOKED_FOR: Mapping[str, Callable[[iiot.Store], Awaitable[object]]] = {
    "the newest": audit(),
    "a name": audit(actor="somebody"),
    "a token": audit(actor="another"),
    "nobody": audit(actor="nobody"),
    "an action": audit(actions=("token.revoke",)),
    "no action": audit(actions=("key.create",)),
    "two actions": audit(actions=("token.revoke", "key.create")),
    "a device": audit(device="press-2"),
    "no device": audit(device="press-9"),
    "a common name and a rare action": audit(actor="robot", actions=("token.revoke",)),
    "a rare name and a common action": audit(actor="somebody", actions=("config.push",)),
    "a common device, a common name and a rare action": audit(device="press-1", actor="robot", actions=("token.revoke",)),
    "a time": audit(**LONG_AGO),
    "up to a time": audit(stop=START + 20 * MINUTE),
    "no time": audit(**AFTER_ALL),
    "a time and a common name": audit(actor="robot", **LONG_AGO),
    "a time and a rare name": audit(actor="somebody", **LONG_AGO),
    "a time and a common action": audit(actions=("config.push",), **LONG_AGO),
    "no time, and a common name": audit(actor="robot", **AFTER_ALL),
    "the export of a name": export(actor="somebody"),
    "the export of nobody": export(actor="nobody"),
    "the export of an action": export(actions=("token.revoke",)),
    "the export of a time": export(**LONG_AGO),
    "the export of no time": export(**AFTER_ALL),
    "what happened": timeline(0, iiot.LATEST),
    "what happened at a time": timeline(LONG_AGO["start"], LONG_AGO["stop"]),
    "what happened up to a time": timeline(0, START + 20 * MINUTE),
    "what happened at no time": timeline(AFTER_ALL["start"], iiot.LATEST),
}


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A short one, and a long one."""
    folder = tmp_path_factory.mktemp("histories")
    for entries in (FEW, MANY):
        history(folder / f"{entries}.db", entries)
    return folder / f"{FEW}.db", folder / f"{MANY}.db"


@pytest.mark.parametrize("looked_for", LOOKED_FOR)
async def test_what_is_looked_for_costs_no_more_among_many(
    histories: tuple[Path, Path], looked_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in steps of SQLite's machine, which are the same at every run."""
    steps = Steps()
    monkeypatch.setattr(sqlite3, "connect", steps.connect)
    answers, costs = [], []
    for database in histories:
        async with iiot.Store.open(database, LIMITS) as store:
            before = steps.count
            answers.append(await LOOKED_FOR[looked_for](store))
            costs.append(steps.count - before)
    few, many = costs
    assert many <= few * 1.1 + 100
    if "newest" not in looked_for and looked_for != "what happened":
        assert answers[0] == answers[1]
