"""The audit: every change and every reach into a device is accounted for, refused ones too, and nothing takes an entry back."""

from __future__ import annotations

import asyncio
import getpass
import json
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import attrs
import plant as plants
import pytest
from aiohttp import ClientError, ClientSession
from plant import PATIENCE, Closed, Device, Plant, Process, admin_token, command, locked

import iiot

Entry = dict[str, Any]
Row = tuple[str | None, str | None, Any]  # target, device, detail
ACCOUNTED = [route for route in iiot.ROUTES if route.action]
TUNNEL = ("GET", "/iiot/{device}/tunnel/{port}")  # a WebSocket, which begins as a GET
KILLS = 4


def name_of(route: iiot.Route) -> str:
    return f"{route.method} {route.path}"


def id_of(text: str) -> str:
    """The id part of a token or key."""
    return text.split("_")[2]


def altered(text: str) -> str:
    """A token of the same id with another secret."""
    return text[:-2] + ("AA" if text[-2:] != "AA" else "BB")


def minted(plant: Plant, role: str, name: str, tenant: str = "default") -> str:
    """A new operator's token, made without an entry."""
    token = iiot.mint("op")

    def add(connection: sqlite3.Connection) -> None:
        owner = None if role == "platform" else iiot.tenant_id_of(connection, tenant)
        iiot.insert_operator_token(connection, owner, token.stored, name, role)

    iiot.change_database(plant.database, add)
    return token.text


async def ask(plant: Plant, method: str, path: str, body: Any = None, token: str = "", **headers: str) -> tuple[int, Any]:
    """Status and parsed JSON of an answer to a request with headers of its own."""
    shown = {"Authorization": f"Bearer {token or plant.token}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    data = None if body is None else json.dumps(body).encode()
    async with asyncio.timeout(PATIENCE), plant.client.request(method, plant.url + path, data=data, headers=shown) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None


async def entries(plant: Plant, query: str = "", token: str | None = None, path: str = "/audit") -> list[Entry]:
    """The audit, newest first, where one page holds it."""
    status, body = await plant.ask("GET", f"{path}?limit=1000{query}", token=token)
    assert status == 200, body
    assert body["next"] is None
    items: list[Entry] = body["items"]
    return items


async def exported(plant: Plant, query: str = "", token: str | None = None, path: str = "/audit") -> list[Entry]:
    """The audit as NDJSON, oldest first."""
    status, text = await plant.ask("GET", f"{path}?format=ndjson{query}", token=token)
    assert status == 200, text
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]  # other ends of lines may stand in a line of JSON


def rows(database: Path, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
    """What a program beside the server sees."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql, parameters).fetchall()


def contents(database: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every table but the audit and where in it an hour is, without the moments at which somebody was last heard."""
    found = {}
    with closing(sqlite3.connect(database)) as connection:
        tables = plants.tables(connection)
    for table in tables:
        if table in ("audit", "hour"):
            continue
        columns = [name for (name,) in rows(database, "select name from pragma_table_info(?)", table) if name not in ("used_at", "seen_at")]
        found[table] = rows(database, f"select {', '.join(columns)} from {table}")
    return found


@contextmanager
def no_entry_possible(database: Path) -> Iterator[None]:
    """The database takes no entry of what was done."""
    with closing(sqlite3.connect(database)) as other:
        other.execute("create trigger full before insert on audit when new.outcome = 'ok' begin select raise(abort, 'full'); end")
        try:
            yield
        finally:
            other.execute("drop trigger full")


# ---- every action


RULE = {"name": "hot", "metric": "level", "condition": {"above": 5}}
WEBHOOK = {"name": "night shift", "url": "https://user:pa55@example.com/t0ken", "match": "pump-*"}
COMMAND = {"argv": ["uname", "-a"], "timeout": "1h"}
SILENCE = {"match": "pump-*", "until": "2099-01-01T00:00:00.000Z"}


class World:
    """A server with something of everything, and a token of every role."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self.roles = {role: minted(plant, role, f"the {role}") for role in ("viewer", "operator", "admin", "platform")}
        self.names: dict[str, str] = {}

    async def furnish(self) -> None:
        """press-1 is connected, press-2 is not and has a configuration; valve-1 runs one command of its own and one of those for many,
        which goes on to valve-2 in a minute, and has a tunnel."""
        plant, platform = self.plant, self.roles["platform"]
        device = await plant.device("press-1")
        await device.store({"values": {"level": 9}})
        await plant.register("press-2")
        for method, path, body, token in (
            ("POST", "/iiot/press-2", {"speed": 1}, None),
            ("POST", "/provisioning-keys", {}, None),
            ("POST", "/tokens", {"name": "spare", "role": "viewer"}, None),
            ("PUT", "/retention", {"logs": {"days": 9}}, None),
            ("POST", "/iiot/press-2/log-token", {}, None),
            ("PUT", "/iiot/press-2/syslog-source", {"addresses": ["10.0.0.7"]}, None),
            ("POST", "/rules", RULE, None),
            ("POST", "/silences", SILENCE, None),
            ("POST", "/webhooks", WEBHOOK, None),
            ("POST", "/tenants", {"name": "acme"}, platform),
            ("POST", "/platform/tokens", {"name": "spare", "role": "platform"}, platform),
        ):
            status, answer = await plant.ask(method, path, body, token=token)
            assert status in (200, 201, 202), answer
            self.names[path] = str(answer.get("id", ""))
        await self.run_commands()
        found = await plant.until("/alerts", lambda answer: answer["items"])
        self.names["/alerts"] = str(found["items"][0]["id"])
        # then there is one token that may manage tokens
        assert (await plant.ask("DELETE", f"/tokens/{id_of(plant.token)}", token=self.roles["admin"]))[0] == 204

    async def run_commands(self) -> None:
        device = await self.plant.device("valve-1")
        await self.plant.register("valve-2")
        many = {**COMMAND, "match": "valve-*", "per_minute": 1, "parallel": True}
        for path, body in (("/iiot/valve-1/commands", COMMAND), ("/commands", many)):
            status, answer = await self.plant.ask("POST", path, body, token=self.roles["admin"])
            assert status == 202, answer
            self.names[path] = str(answer["id"])
            device.seq += 1
            await device.send("started", seq=device.seq, command=(await device.expect("command"))["command"])
        await device.acknowledged(device.seq)
        self.names["/iiot/valve-1/tunnels"] = await self.plant.tunnel("valve-1", device, self.roles["admin"])

    def real(self, path: str) -> str:
        """A path with the ids of this world in place of [where they were made]."""
        for name, value in {**self.names, "admin": id_of(self.roles["admin"])}.items():
            path = path.replace(f"[{name}]", value)
        return path

    async def audit(self) -> dict[str, list[Entry]]:
        """Both audits, oldest first."""
        found = {}
        for scope, token, path in (("tenant", "admin", "/audit"), ("platform", "platform", "/platform/audit")):
            found[scope] = (await entries(self.plant, token=self.roles[token], path=path))[::-1]
        return found

    async def left(
        self, role: str, method: str, path: str, body: Any = None, data: bytes | None = None, headers: Any = None
    ) -> tuple[int, Any, list[Entry]]:
        """Ask as somebody of this role: status, answer, and the entries that this left. They are where they belong, complete,
        and of this time."""
        before, start = await self.audit(), iiot.now_ms()
        token = self.roles[role]
        if headers:
            status, answer = await ask(self.plant, method, path, body, token, **headers)
        else:
            status, answer = await self.plant.ask(method, path, body, token=token, data=data)
        after, end = await self.audit(), iiot.now_ms()  # what the call led to may be told by now
        mine, other = ("platform", "tenant") if role == "platform" else ("tenant", "platform")
        assert after[other] == before[other]
        assert after[mine][: len(before[mine])] == before[mine]
        new = after[mine][len(before[mine]) :]
        for entry in new:
            assert start <= (iiot.parse_rfc3339(entry["at"]) or 0) <= end
            assert (entry["token"], entry["name"], entry["role"]) == (id_of(token), f"the {role}", role)
            assert entry["address"] == "127.0.0.1"
            assert set(entry) == {
                "id", "at", "token", "name", "role", "action", "target", "device", "address", "outcome", "detail"
            }  # fmt: skip
        return status, answer, new


def told(entry: Entry) -> tuple[Any, ...]:
    """What an entry says was tried, on what, and what came of it."""
    return entry["action"], entry["target"], entry["device"], entry["outcome"], entry["detail"]


@attrs.frozen
class Refused:
    """A call that is refused; `target` is what its body names."""

    status: int
    code: str
    path: str = ""
    body: Any = None
    headers: dict[str, str] = attrs.field(factory=dict)
    target: str | None = None


@attrs.frozen
class Case:
    """An allowed call of a route, the entries that it leaves by its answer, and refused ones; and the action of the entry that somewhat
    later tells what the call led to."""

    path: str
    body: Any
    status: int
    leaves: Callable[[Any], list[Row]]
    refused: tuple[Refused, ...]
    later: str | None = None


def device_row(detail: Any = None, device: str = "press-1") -> Callable[[Any], list[Row]]:
    return lambda _: [(device, device, detail)]


EXPIRY = "2099-01-01T00:00:00.000Z"
NOBODY = "/iiot/nobody"
CASES = {
    ("POST", "/iiot"): Case(
        "/iiot?timeout=5s", {"match": "press-*", "config": {"speed": 2}}, 202,
        lambda _: [
            ("press-*", None, {"devices": 2}),
            *((f"press-{n}", f"press-{n}", {"version": n, "match": "press-*"}) for n in (1, 2)),
        ],
        (
            Refused(422, "invalid", body={"match": "press-*"}), Refused(400, "not_an_object", body=[]),
            Refused(400, "bad_query", "/iiot?timeout=90000s", {"match": "*", "config": {}}, target="*"),
        ),
    ),
    ("PUT", "/iiot/{device}"): Case(
        "/iiot/press-9", None, 201, device_row(device="press-9"),
        (
            Refused(409, "device_exists", "/iiot/press-1"), Refused(422, "invalid", "/iiot/bad%20name"),
            Refused(422, "invalid", body={"a": 1}),
        ),
    ),
    ("PATCH", "/iiot/{device}"): Case(
        "/iiot/press-1", {"disabled": True, "labels": {"line": "3"}}, 200, device_row({"disabled": True, "labels": {"line": "3"}}),
        (
            Refused(404, "not_found", NOBODY, {"disabled": True}), Refused(422, "invalid", body={"disabled": 3}),
            Refused(422, "invalid", body={"labels": {f"l{n}": "" for n in range(33)}}),
        ),
    ),
    ("DELETE", "/iiot/{device}"): Case("/iiot/press-1", None, 204, device_row(), (Refused(404, "not_found", NOBODY),)),
    ("POST", "/iiot/{device}/token"): Case(
        "/iiot/press-1/token", {"revoke": True}, 201,
        lambda answer: [("press-1", "press-1", {"token": id_of(answer["token"]), "revoke": True})],
        (Refused(404, "not_found", f"{NOBODY}/token"), Refused(422, "invalid", body={"revoke": 1})),
    ),
    ("POST", "/iiot/{device}"): Case(
        "/iiot/press-1", {"speed": 2}, 202, device_row({"version": 1}),
        (
            Refused(404, "not_found", NOBODY, {}), Refused(400, "not_an_object", body=[]),
            Refused(412, "precondition_failed", body={}, headers={"If_Match": "7"}),
            Refused(422, "invalid", body={}, headers={"If_Match": "x"}), Refused(400, "bad_query", "/iiot/press-1?wait=1h", {}),
            Refused(413, "too_large", body={"a": "x" * 70_000}), Refused(413, "too_large", body={"a": "x" * 300_000}),
        ),
    ),
    ("POST", "/iiot/{device}/config/rollback"): Case(
        "/iiot/press-2/config/rollback", {"version": 1}, 202, device_row({"version": 2, "document_of": 1}, "press-2"),
        (
            Refused(404, "unknown_version", body={"version": 99}), Refused(404, "not_found", f"{NOBODY}/config/rollback", {"version": 1}),
            Refused(422, "invalid", body={"version": 0}),
        ),
    ),
    ("POST", "/iiot/{device}/seq"): Case(
        "/iiot/press-1/seq", {"seq": 5}, 200, device_row({"seq": 5}),
        (
            Refused(404, "not_found", f"{NOBODY}/seq", {"seq": 0}), Refused(422, "invalid", body={}),
            Refused(422, "invalid", body={"seq": -1}),
            Refused(422, "invalid", body={"seq": 2**63}),
        ),
    ),
    ("DELETE", "/iiot/{device}/telemetry"): Case(
        "/iiot/press-1/telemetry?from=2020-01-01T00:00:00Z&to=2099-01-01T00:00:00Z", None, 204,
        device_row({"metric": None, "from": "2020-01-01T00:00:00.000Z", "to": EXPIRY}),
        (
            Refused(404, "not_found", f"{NOBODY}/telemetry?from=0&to=1"),
            Refused(404, "not_found", "/iiot/press-1/telemetry?metric=x&from=0&to=1"),
            Refused(400, "bad_query", "/iiot/press-1/telemetry?from=0"), Refused(400, "bad_query", "/iiot/press-1/telemetry?from=1&to=0"),
        ),
    ),
    ("POST", "/iiot/{device}/log-token"): Case(
        "/iiot/press-1/log-token", {"revoke": True}, 201,
        lambda answer: [("press-1", "press-1", {"token": answer["token"].split("_")[2], "revoke": True})],
        (Refused(404, "not_found", f"{NOBODY}/log-token", {}), Refused(422, "invalid", body={"revoke": 1})),
    ),
    ("DELETE", "/iiot/{device}/log-token"): Case(
        "/iiot/press-2/log-token", None, 204, device_row(device="press-2"), (Refused(404, "not_found", f"{NOBODY}/log-token"),),
    ),
    ("PUT", "/iiot/{device}/syslog-source"): Case(
        "/iiot/press-1/syslog-source", {"addresses": ["10.0.0.8"]}, 200, device_row({"addresses": ["10.0.0.8/32"]}),
        (
            Refused(404, "not_found", f"{NOBODY}/syslog-source", {"addresses": []}), Refused(422, "invalid", body={"addresses": ["x"]}),
            Refused(409, "source_taken", body={"addresses": ["10.0.0.7"]}),
        ),
    ),
    ("PUT", "/retention"): Case(
        "/retention", {"logs": {"days": 7}}, 200, lambda _: [(None, None, {"logs": {"days": 7}})],
        (Refused(422, "invalid", body={"logs": {"days": 0}}), Refused(400, "not_an_object", body=[])),
    ),
    ("DELETE", "/retention"): Case("/retention", None, 204, lambda _: [(None, None, None)], ()),
    ("POST", "/iiot/{device}/report"): Case(
        "/iiot/press-1/report", {"what": "telemetry"}, 202, device_row({"what": "telemetry"}),
        (
            Refused(404, "not_found", f"{NOBODY}/report", {"what": "state"}), Refused(422, "invalid", body={"what": "everything"}),
            Refused(409, "device_offline", "/iiot/press-2/report", {"what": "state"}),
        ),
    ),
    ("POST", "/rules"): Case(
        "/rules", {**RULE, "name": "cold"}, 201, lambda answer: [("cold", None, {"id": answer["id"], "rule": {**RULE, "name": "cold"}})],
        (
            Refused(409, "rule_exists", body=RULE, target="hot"), Refused(422, "invalid", body={**RULE, "match": ""}, target="hot"),
            Refused(422, "invalid", body={"name": "hot"}), Refused(400, "not_an_object", body=[]),
        ),
    ),
    ("PUT", "/rules/{id}"): Case(
        "/rules/[/rules]", {**RULE, "name": "warm"}, 200,
        lambda answer: [("warm", None, {"id": answer["id"], "rule": {**RULE, "name": "warm"}})],
        (
            Refused(404, "not_found", "/rules/999", RULE, target="hot"), Refused(404, "not_found", "/rules/x", RULE),
            Refused(422, "invalid", body={"name": "hot"}),
        ),
    ),
    ("DELETE", "/rules/{id}"): Case(
        "/rules/[/rules]", None, 204, lambda _: [("hot", None, {"id": 1})], (Refused(404, "not_found", "/rules/999"),),
    ),
    ("POST", "/alerts/{id}/ack"): Case(
        "/alerts/[/alerts]/ack", {"text": "on my way", "until": EXPIRY}, 200,
        lambda _: [("[/alerts]", "press-1", {"until": EXPIRY, "text": "on my way"})],
        (
            Refused(404, "not_found", "/alerts/999/ack", {}), Refused(422, "invalid", body={"until": "2020-01-01T00:00:00Z"}),
            Refused(422, "invalid", body={"text": 3}),
        ),
    ),
    ("DELETE", "/alerts/{id}/ack"): Case(
        "/alerts/[/alerts]/ack", None, 200, lambda _: [("[/alerts]", "press-1", None)], (Refused(404, "not_found", "/alerts/999/ack"),),
    ),
    ("POST", "/silences"): Case(
        "/silences", SILENCE, 201,
        lambda answer: [(str(answer["id"]), None, {**SILENCE, "labels": {}, "rule": None, "text": ""})],
        (
            Refused(422, "invalid", body={"match": "", "until": EXPIRY}), Refused(422, "invalid", body={"match": "*"}),
            Refused(422, "invalid", body={"match": "*", "until": "2020-01-01T00:00:00Z"}),
        ),
    ),
    ("DELETE", "/silences/{id}"): Case(
        "/silences/[/silences]", None, 204, lambda _: [("[/silences]", None, None)], (Refused(404, "not_found", "/silences/999"),),
    ),
    ("POST", "/webhooks"): Case(
        "/webhooks", {**WEBHOOK, "severity": "error"}, 201,
        lambda answer: [(str(answer["id"]), None, {
            "name": "night shift", "url": "https://example.com/…", "form": "webhook", "match": "pump-*", "severity": "error", "rule": None,
            "group_by": "rule", "wait": "10s", "interval": "5m", "repeat": "4h",
        })],
        (
            Refused(422, "invalid", body={**WEBHOOK, "url": "http://10.0.0.1/"}, target="night shift"),
            Refused(422, "invalid", body={"name": "night shift"}), Refused(400, "not_an_object", body=[]),
        ),
    ),
    ("DELETE", "/webhooks/{id}"): Case(
        "/webhooks/[/webhooks]", None, 204, lambda _: [("[/webhooks]", None, None)], (Refused(404, "not_found", "/webhooks/999"),),
    ),
    ("POST", "/webhooks/{id}/secret"): Case(
        "/webhooks/[/webhooks]/secret", {"secret": f"whsec_{'A' * 43}="}, 201, lambda _: [("[/webhooks]", None, None)],
        (Refused(404, "not_found", "/webhooks/999/secret", {}), Refused(422, "invalid", body={"secret": "short"})),
    ),
    ("POST", "/webhooks/{id}/test"): Case(
        "/webhooks/[/webhooks]/test", None, 200, lambda _: [("[/webhooks]", None, None)],
        (Refused(404, "not_found", "/webhooks/999/test"), Refused(422, "invalid", body={"url": "https://example.com"})),
    ),
    ("POST", "/iiot/{device}/commands"): Case(
        "/iiot/valve-1/commands", {"argv": ["echo", "a b"], "timeout": 5, "ttl": "2m"}, 202,
        lambda answer: [(str(answer["id"]), "valve-1", {"argv": ["echo", "a b"], "timeout": 5.0, "ttl": 120.0})],
        (
            Refused(404, "not_found", f"{NOBODY}/commands", COMMAND), Refused(409, "device_offline", "/iiot/press-2/commands", COMMAND),
            Refused(422, "invalid", body={"argv": []}), Refused(422, "invalid", body={**COMMAND, "timeout": "2d"}),
            Refused(422, "invalid", body=COMMAND, headers={"Idempotency_Key": "x" * 129}),
            Refused(400, "bad_query", "/iiot/valve-1/commands?wait=1h", COMMAND), Refused(400, "not_an_object", body=[]),
        ),
    ),
    ("DELETE", "/iiot/{device}/commands/{id}"): Case(
        "/iiot/valve-1/commands/[/iiot/valve-1/commands]", None, 202, lambda _: [("[/iiot/valve-1/commands]", "valve-1", None)],
        (
            Refused(404, "not_found", f"{NOBODY}/commands/[/iiot/valve-1/commands]"),
            Refused(404, "not_found", "/iiot/valve-2/commands/[/iiot/valve-1/commands]"),
            Refused(404, "not_found", "/iiot/valve-1/commands/999"), Refused(404, "not_found", "/iiot/valve-1/commands/x"),
        ),
    ),
    ("POST", "/commands"): Case(
        "/commands", {"match": "nobody-*", "argv": ["true"]}, 202,
        lambda answer: [("nobody-*", None, {"batch": answer["id"], "argv": ["true"], "timeout": 30.0, "ttl": None})],
        (
            Refused(422, "invalid", body={"argv": ["true"]}), Refused(422, "invalid", body={"argv": ["true"], "match": ""}),
            Refused(422, "invalid", body={"argv": ["true"], "match": "*", "timeout": "2d"}, target="*"),
            Refused(422, "invalid", body={"argv": ["true"], "match": "*", "per_minute": 0}), Refused(400, "not_an_object", body=[]),
        ),
    ),
    ("DELETE", "/commands/{id}"): Case(
        "/commands/[/commands]", None, 202, lambda _: [("[/commands]", None, None)],
        (Refused(404, "not_found", "/commands/999"), Refused(404, "not_found", "/commands/x")),
    ),
    ("DELETE", "/iiot/{device}/tunnels/{id}"): Case(
        "/iiot/valve-1/tunnels/[/iiot/valve-1/tunnels]", None, 204, lambda _: [("[/iiot/valve-1/tunnels]", "valve-1", None)],
        (
            Refused(404, "not_found", f"{NOBODY}/tunnels/[/iiot/valve-1/tunnels]"),
            Refused(404, "not_found", "/iiot/press-1/tunnels/[/iiot/valve-1/tunnels]"),
            Refused(404, "not_found", "/iiot/valve-1/tunnels/999"), Refused(404, "not_found", "/iiot/valve-1/tunnels/x"),
        ),
        later="tunnel.end",
    ),
    ("POST", "/provisioning-keys"): Case(
        "/provisioning-keys", {"uses": 3, "expires_at": EXPIRY}, 201,
        lambda answer: [(answer["id"], None, {"uses": 3, "expires_at": EXPIRY})],
        (Refused(422, "invalid", body={"uses": 0}), Refused(422, "invalid", body={"expires_at": "tomorrow"})),
    ),
    ("DELETE", "/provisioning-keys/{id}"): Case(
        "/provisioning-keys/[/provisioning-keys]", None, 204, lambda _: [("[/provisioning-keys]", None, None)],
        (Refused(404, "not_found", "/provisioning-keys/0123456789abcdef"),),
    ),
    ("POST", "/tokens"): Case(
        "/tokens", {"name": "new", "role": "operator"}, 201,
        lambda answer: [(answer["id"], None, {"name": "new", "role": "operator", "expires_at": None})],
        (
            Refused(403, "forbidden", body={"name": "new", "role": "platform"}, target="new"),
            Refused(422, "invalid", body={"name": "new", "role": "boss"}, target="new"),
        ),
    ),
    ("DELETE", "/tokens/{id}"): Case(
        "/tokens/[/tokens]", None, 204, lambda _: [("[/tokens]", None, None)],
        (Refused(404, "not_found", "/tokens/[/platform/tokens]"), Refused(409, "last_token", "/tokens/[admin]")),
    ),
    ("POST", "/tenants"): Case(
        "/tenants", {"name": "other", "quotas": {"devices": 5}}, 201,
        lambda answer: [("other", None, {"quotas": {"devices": 5}, "token": id_of(answer["token"])})],
        (Refused(422, "invalid", body={"name": ""}), Refused(422, "invalid", body={"name": "other", "quotas": {"devices": -1}})),
    ),
    ("PATCH", "/tenants/{tenant}"): Case(
        "/tenants/acme", {"quotas": {"devices": 7, "connections": None}}, 200,
        lambda _: [("acme", None, {"quotas": {"devices": 7, "connections": None}})],
        (Refused(404, "not_found", "/tenants/nobody", {"quotas": {}}), Refused(422, "invalid", body={"quotas": {"metals": 1}})),
    ),
    ("DELETE", "/tenants/{tenant}"): Case(
        "/tenants/acme?confirm=acme", None, 204, lambda _: [("acme", None, None)],
        (
            Refused(400, "bad_query", "/tenants/acme"), Refused(400, "bad_query", "/tenants/acme?confirm=other"),
            Refused(404, "not_found", "/tenants/nobody?confirm=nobody"),
        ),
    ),
    ("POST", "/platform/tokens"): Case(
        "/platform/tokens", {"name": "new", "role": "platform", "expires_at": EXPIRY}, 201,
        lambda answer: [(answer["id"], None, {"name": "new", "role": "platform", "expires_at": EXPIRY})],
        (Refused(403, "forbidden", body={"name": "new", "role": "admin"}, target="new"), Refused(422, "invalid", body={"name": "new"})),
    ),
    ("DELETE", "/platform/tokens/{id}"): Case(
        "/platform/tokens/[/platform/tokens]", None, 204, lambda _: [("[/platform/tokens]", None, None)],
        (Refused(404, "not_found", "/platform/tokens/[admin]"),),
    ),
}  # fmt: skip


CALLS = {**{called: (case.path, case.body) for called, case in CASES.items()}, TUNNEL: ("/iiot/valve-1/tunnel/22", None)}


def named_by(route: iiot.Route, path: str) -> tuple[str | None, str | None]:
    """Target and device that a path names: the target is the last of its names."""
    shown = zip(route.path.split("/"), path.partition("?")[0].split("/"), strict=True)
    names = {pattern: unquote(text) for pattern, text in shown if pattern.startswith("{")}
    return next(reversed(names.values()), None), names.get("{device}")


@pytest.mark.parametrize("route", [route for route in ACCOUNTED if (route.method, route.path) != TUNNEL], ids=name_of)
async def test_a_call_leaves_its_exact_entry_allowed_or_refused(plant: Plant, route: iiot.Route) -> None:
    case = CASES[route.method, route.path]
    world = World(plant)
    await world.furnish()
    real = world.real

    async def refused(role: str, code: str, path: str, body: Any = None, data: bytes | None = None, call: Refused | None = None) -> int:
        status, answer, new = await world.left(role, route.method, path, body, data, call.headers if call else None)
        assert answer["error"]["code"] == code
        target, device = named_by(route, path)
        assert [told(entry) for entry in new] == [(route.action, (call.target if call else None) or target, device, code, None)]
        return status

    path = real(case.path)
    state = contents(plant.database)
    with no_entry_possible(plant.database):
        status, _, new = await world.left(route.role, route.method, path, case.body)
    assert status >= 500
    assert new == []
    assert contents(plant.database) == state, "what cannot be accounted for does not happen"

    ranks = ["viewer", "operator", "admin"]
    for role in [*ranks[: ranks.index(route.role)], "platform"] if route.role in ranks else ranks:
        assert await refused(role, "forbidden", path, case.body) == 403
    mark = "&" if "?" in path else "?"
    assert await refused(route.role, "bad_query", f"{path}{mark}nonsense=1", case.body) == 400
    if case.body is not None:
        assert await refused(route.role, "not_json", path, data=b"{") == 400
    for call in case.refused:
        status = await refused(route.role, call.code, real(call.path) or path, call.body, call=call)
        assert status == call.status
    assert contents(plant.database) == state

    status, answer, new = await world.left(route.role, route.method, path, case.body)
    assert status == case.status, answer
    if case.later is not None:
        async with asyncio.timeout(PATIENCE):
            while not await entries(plant, f"&action={case.later}", world.roles[route.role]):
                await asyncio.sleep(0.01)
        new = [entry for entry in new if entry["action"] != case.later]
    expected = [(target and real(target), device, detail) for target, device, detail in case.leaves(answer)]
    assert [told(entry) for entry in new] == [(route.action, target, device, "ok", detail) for target, device, detail in expected]
    if route.action not in ("device.report", "telemetry.remove", "webhook.test"):  # there are no readings
        assert contents(plant.database) != state


def test_every_route_that_can_change_something_has_an_action() -> None:
    changes_nothing = {("POST", "/rules/dry-run")}
    assert {(r.method, r.path) for r in ACCOUNTED} >= {(r.method, r.path) for r in iiot.ROUTES if r.method != "GET"} - changes_nothing
    assert set(CASES) | {TUNNEL} == {(route.method, route.path) for route in ACCOUNTED}
    assert TUNNEL not in CASES


async def test_a_refused_creation_names_what_was_to_be_created(plant: Plant) -> None:
    world = World(plant)
    await world.furnish()
    status, _, new = await world.left("platform", "POST", "/tenants", {"name": "acme"})
    assert status == 409
    assert [told(entry)[:4] for entry in new] == [("tenant.create", "acme", None, "tenant_exists")]


async def test_a_push_to_many_leaves_an_entry_for_each_with_its_version(plant: Plant) -> None:
    names = [f"press-{n}" for n in range(12)]
    for number, name in enumerate(names):
        await plant.register(name)
        for _ in range(number % 3):
            assert (await plant.ask("POST", f"/iiot/{name}", {}))[0] == 202
    before = len(await entries(plant))
    status, answer = await plant.ask("POST", "/iiot", {"match": "press-*", "config": {"speed": 2}})
    assert status == 202
    *new, whole = (await entries(plant))[:-before]
    assert told(whole) == ("config.push", "press-*", None, "ok", {"devices": 12})
    assert sorted((e["device"], e["detail"]["version"]) for e in new) == sorted((i["device"], i["version"]) for i in answer["items"])
    assert {(e["action"], e["outcome"], e["detail"]["match"], e["target"] == e["device"]) for e in new} == {
        ("config.push", "ok", "press-*", True)
    }
    assert len(new) == len(names)
    assert (await plant.ask("POST", "/iiot", {"match": "pump-*", "config": {}}))[0] == 202
    to_none = (await entries(plant))[: -before - len(names) - 1]
    assert [told(entry) for entry in to_none] == [("config.push", "pump-*", None, "ok", {"devices": 0})]


async def test_what_a_device_is_asked_for_while_it_goes_is_entered_as_it_is_answered(plant: Plant) -> None:
    async def answers_and_outcomes(asking: list[asyncio.Task[tuple[int, Any]]]) -> tuple[list[int], list[str]]:
        statuses = [status for status, _ in await asyncio.gather(*asking)]
        return statuses, [entry["outcome"] for entry in await entries(plant, "&action=device.report")]

    def ask(name: str) -> asyncio.Task[tuple[int, Any]]:
        return asyncio.create_task(plant.ask("POST", f"/iiot/{name}/report", {"what": "state"}))

    gone = await plant.device("press-1")
    with locked(plant.database):
        asking = [ask("press-1")]
        for _ in range(5):
            await plant.get("/iiot")
        await gone.close()
    assert await answers_and_outcomes(asking) == ([409], ["device_offline"])
    devices = [await plant.device(f"pump-{number}") for number in range(30)]
    closing_all = [asyncio.create_task(device.close()) for device in devices]
    statuses, outcomes = await answers_and_outcomes([ask(f"pump-{number}") for number in range(30)])
    assert statuses.count(202) == outcomes.count("ok")
    assert statuses.count(409) == outcomes.count("device_offline") - 1
    await asyncio.gather(*closing_all)


async def test_a_read_leaves_no_entry(plant: Plant) -> None:
    world = World(plant)
    await world.furnish()
    before = await world.audit()
    reads = [route for route in iiot.ROUTES if route.method == "GET" and route.path not in ("/events", "/device", TUNNEL[1])]
    assert len(reads) > 10
    statuses: Counter[int] = Counter()
    for route in reads:
        for role in world.roles.values():
            for device in ("press-2", "nobody"):
                for query in ("", "?nonsense=1"):
                    statuses[(await plant.ask("GET", route.path.replace("{device}", device) + query, token=role))[0]] += 1
    assert {200, 400, 403, 404} <= set(statuses)
    assert await world.audit() == before


async def test_a_wrong_token_leaves_no_entry(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), guesses=10_000)) as plant:
        world = World(plant)
        await world.furnish()
        before, state = await world.audit(), contents(plant.database)
        revoked, of_a_device = plant.token, plant.tokens["press-1"]
        wrong = [iiot.mint("op").text, altered(world.roles["admin"]), revoked, of_a_device, "nonsense", ""]
        for route in ACCOUNTED:
            path, body = CALLS[route.method, route.path]
            for token in wrong:
                assert (await plant.ask(route.method, world.real(path), body, token=token))[0] == 401
        assert await world.audit() == before
        assert contents(plant.database) == state


# ---- provisioning, the command line, the first start


async def provision(plant: Plant, key: str, name: str) -> Closed | None:
    """Provision a device; how the server closed the socket if it refused."""
    device = await plant.connect()
    await device.send("provision", key=key, device=name)
    try:
        answer = await device.receive()
    except Closed as closed:
        return closed
    if answer["type"] == "error":
        return await device.closed()
    assert answer["type"] == "credentials"
    await device.close()
    return None


async def new_key(plant: Plant, **chosen: Any) -> str:
    status, body = await plant.ask("POST", "/provisioning-keys", chosen)
    assert status == 201, body
    return str(body["key"])


async def test_provisioning_is_accounted_by_its_key_allowed_or_refused(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, quota_devices=2) as plant:
        await plant.register("press-1")
        key = await new_key(plant)
        before, start = len(await entries(plant)), iiot.now_ms()
        assert await provision(plant, key, "press-2") is None
        for name, code in (("press-1", "device_exists"), ("press-3", "too_many_devices")):
            closed = await provision(plant, key, name)
            assert closed is not None
            assert closed.reason == iiot.FAULTS[code].message
        for shown in (iiot.mint("prov").text, altered(key), "nonsense"):
            closed = await provision(plant, shown, "press-4")
            assert closed is not None
            assert closed.code == 4401
        new, end = (await entries(plant))[:-before][::-1], iiot.now_ms()
    assert [told(entry) for entry in new] == [
        ("device.provision", "press-2", "press-2", "ok", None),
        ("device.provision", "press-1", "press-1", "device_exists", None),
        ("device.provision", "press-3", "press-3", "too_many_devices", None),
    ]
    for entry in new:
        assert (entry["token"], entry["name"], entry["role"]) == (id_of(key), "provisioning key", "provisioning")
        assert entry["address"] == "127.0.0.1"
        assert start <= (iiot.parse_rfc3339(entry["at"]) or 0) <= end


async def test_a_device_is_not_provisioned_without_an_entry(plant: Plant) -> None:
    key = await new_key(plant, uses=1)
    state = contents(plant.database)
    with no_entry_possible(plant.database):
        closed = await provision(plant, key, "press-1")
    assert closed is not None
    assert closed.code == 1011
    assert contents(plant.database) == state
    assert await provision(plant, key, "press-1") is None
    assert [(e["target"], e["outcome"]) for e in await entries(plant, "&action=device.provision")] == [("press-1", "ok")]


async def test_the_command_line_is_accounted_by_the_name_of_the_systems_user(plant: Plant, tmp_path: Path) -> None:
    platform = admin_token(plant.database, "platform")
    start = iiot.now_ms()

    async def run(*arguments: str) -> tuple[str, str]:
        """What it printed, and the id part of it."""
        code, out, err = await command(*arguments, folder=tmp_path)
        assert code == 0, err
        return out.strip(), id_of(out) if out else ""

    (_, token), (_, key), (_, master), (_, acme) = await asyncio.gather(
        run("token", "--role", "viewer", "--name", "wall display"), run("provisioning-key", "--uses", "3"),
        run("token", "--role", "platform", "--name", "master"), run("tenant", "add", "acme"),
    )  # fmt: skip
    theirs, _ = await run("token", "--role", "admin", "--tenant", "acme")
    in_acme = [told(entry) for entry in await entries(plant, token=theirs)]
    failed, _, _ = await asyncio.gather(
        command("tenant", "remove", "nobody", "--confirm", "nobody", folder=tmp_path),
        run("tenant", "remove", "acme", "--confirm", "acme"), run("tenant", "list"),
    )  # fmt: skip
    assert failed[0] != 0
    end = iiot.now_ms()
    ours, platforms = await entries(plant), await entries(plant, token=platform, path="/platform/audit")
    assert sorted(map(told, ours), key=str) == sorted([
        ("token.create", token, None, "ok", {"name": "wall display", "role": "viewer"}),
        ("key.create", key, None, "ok", {"uses": 3}),
    ], key=str)  # fmt: skip
    assert sorted(map(told, platforms), key=str) == sorted([
        ("token.create", master, None, "ok", {"name": "master", "role": "platform"}),
        ("tenant.create", "acme", None, "ok", {"token": acme}),
        ("tenant.remove", "acme", None, "ok", None),
    ], key=str)  # fmt: skip
    assert in_acme == [("token.create", id_of(theirs), None, "ok", {"name": "command line", "role": "admin"})]
    for entry in ours + platforms:
        assert (entry["token"], entry["name"], entry["role"], entry["address"]) == (None, getpass.getuser(), "command line", None)
        assert start <= (iiot.parse_rfc3339(entry["at"]) or 0) <= end


async def test_the_first_start_accounts_for_what_it_prints(process: Process) -> None:
    await process.start()
    token, key = await process.read_first_start()
    async with ClientSession() as client:
        found = await exported(process.plant(client, token))
    assert [(e["action"], e["target"], e["device"], e["outcome"]) for e in found] == [
        ("token.create", id_of(token), None, "ok"), ("key.create", id_of(key), None, "ok"),
    ]  # fmt: skip
    for entry in found:
        assert (entry["token"], entry["name"], entry["role"], entry["address"]) == (None, getpass.getuser(), "command line", None)


# ---- one transaction


async def test_what_cannot_be_stored_leaves_neither_change_nor_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), storage_seconds=0.3, retry_seconds=0.05, resume_seconds=0.0)) as plant:
        viewer = minted(plant, "viewer", "viewer")
        await plant.register("press-1")
        before, state = await entries(plant), contents(plant.database)
        changes: list[tuple[str, str, Any]] = [
            ("PUT", "/iiot/press-2", None), ("PATCH", "/iiot/press-1", {"labels": {"a": "b"}}), ("POST", "/iiot/press-1", {"speed": 1}),
            ("POST", "/tokens", {"name": "x", "role": "viewer"}), ("DELETE", "/iiot/press-1", None),
        ]  # fmt: skip
        with locked(plant.database):
            answers = await asyncio.gather(
                *(plant.ask(*change) for change in changes), plant.ask("DELETE", "/iiot/press-1", token=viewer)
            )
            assert [status for status, _ in answers] == [503] * len(changes) + [403]
        assert "cannot enter in the audit" in caplog.text
        assert (await plant.ask("PUT", "/iiot/press-3"))[0] == 201  # what might still have waited would be on disk before it
        new = (await entries(plant))[: -len(before)]
        assert [told(entry) for entry in new] == [("device.register", "press-3", "press-3", "ok", None)]
        assert (await plant.ask("DELETE", "/iiot/press-3"))[0] == 204
        async with asyncio.timeout(PATIENCE):
            while contents(plant.database) != state:
                await asyncio.sleep(0.01)


async def test_a_change_whose_token_is_revoked_first_is_neither_done_nor_entered_as_done(plant: Plant) -> None:
    other = minted(plant, "admin", "other")
    assert (await plant.ask("GET", "/whoami", token=other))[0] == 200
    with locked(plant.database):  # what comes meanwhile is done in the order in which it came
        revoking = asyncio.create_task(plant.ask("DELETE", f"/tokens/{id_of(other)}"))
        for _ in range(5):
            await plant.get("/whoami")
        late = asyncio.create_task(plant.ask("PUT", "/iiot/press-1", token=other))
        for _ in range(5):
            await plant.get("/whoami")
    assert (await revoking)[0] == 204
    assert (await late)[0] == 401
    assert rows(plant.database, "select * from device") == []
    assert [told(entry)[0] for entry in await entries(plant) if entry["outcome"] == "ok"] == ["token.revoke"]


async def test_the_command_line_does_nothing_without_an_entry(plant: Plant, tmp_path: Path) -> None:
    assert (await plant.ask("POST", "/tenants", {"name": "acme"}, token=admin_token(plant.database, "platform")))[0] == 201
    state, before = contents(plant.database), rows(plant.database, "select * from audit")
    with no_entry_possible(plant.database):
        results = await asyncio.gather(*(command(*words.split(), folder=tmp_path) for words in (
            "token --role admin", "token --role platform", "provisioning-key", "tenant add other", "tenant remove acme --confirm acme"
        )))  # fmt: skip
    for code, out, _ in results:
        assert code != 0
        assert out == ""
    assert contents(plant.database) == state
    assert rows(plant.database, "select * from audit") == before


def answered(action: str, target: str, outcome: str = "ok", more: object = None) -> tuple[str, str, str, object]:
    return action, target, outcome, more


class Clerk:
    """A client that changes things one after the other, and remembers what it was answered."""

    def __init__(self, name: str, key: str) -> None:
        self.name = name
        self.key = key
        self.done: list[tuple[str, str, str, object]] = []
        self._numbers = count()

    async def run(self, plant: Plant) -> None:
        """Until the server is gone."""
        try:
            while True:
                await self.work(plant, f"{self.name}-{next(self._numbers)}")
        except (ClientError, Closed, OSError):
            return

    async def work(self, plant: Plant, device: str) -> None:
        """A device's life. Each change can be told from every other by what it leaves in the database and in the audit."""
        path = f"/iiot/{device}"
        await self.ask(plant, "PUT", path, 201)
        self.done.append(answered("device.register", device))
        await self.ask(plant, "PUT", path, 409)
        self.done.append(answered("device.register", device, "device_exists"))
        for label in ("a", "b"):
            await self.ask(plant, "PATCH", path, 200, {"labels": {label: ""}})
            self.done.append(answered("device.update", device, more=label))
            pushed = await self.ask(plant, "POST", path, 202, {"speed": 1})
            self.done.append(answered("config.push", device, more=pushed["version"]))
        token = await self.ask(plant, "POST", f"{path}/token", 201)
        self.done.append(answered("device.token", device, more=id_of(token["token"])))
        token = await self.ask(plant, "POST", "/tokens", 201, {"name": device, "role": "viewer"})
        self.done.append(answered("token.create", token["id"]))
        if (closed := await provision(plant, self.key, f"{device}-x")) is not None:
            raise closed
        self.done.append(answered("device.provision", f"{device}-x"))
        if device[-1] in "13579":
            await self.ask(plant, "DELETE", path, 204)
            self.done.append(answered("device.remove", device))

    async def ask(self, plant: Plant, method: str, path: str, expected: int, body: Any = None) -> Any:
        status, answer = await plant.ask(method, path, body)
        assert status == expected, answer
        return answer


def accounted(entry: Entry) -> tuple[str, str, str, object]:
    """An entry as a clerk remembers its change."""
    more: object = None
    match entry["action"], entry["detail"]:
        case "device.update", {"labels": labels}:
            (more,) = labels
        case ("config.push", {"version": more}) | ("device.token", {"token": more}):
            pass
    return answered(entry["action"], entry["target"], entry["outcome"], more)


def changed(database: Path) -> dict[str, set[tuple[str, object]]]:
    """What the database has of the clerks' changes, by action."""
    found = {
        "device.register": rows(database, "select name, null from device where name not like '%-x'"),
        "device.provision": rows(database, "select name, null from device where name like '%-x'"),
        "device.update": rows(database, "select name, key from device, json_each(labels) where name is not null"),
        "config.push": rows(database, "select name, version from config join device on device.id = device_id where name is not null"),
        "device.token": rows(database, "select name, t.id from device_token t join device on device.id = device_id where pending"),
        "token.create": rows(database, "select id, null from operator_token where role = 'viewer'"),
    }
    assert all(len(set(some)) == len(some) for some in found.values())
    return {action: {(target, more) for target, more in some} for action, some in found.items()}


async def test_whenever_the_server_is_killed_what_is_done_is_accounted_for_and_nothing_else(process: Process) -> None:
    iiot.prepare_database(process.database)
    token, key, chance = admin_token(process.database), iiot.mint("prov"), random.Random()
    iiot.change_database(process.database, lambda connection: iiot.insert_provisioning_key(connection, 1, key.stored))
    clerks = [Clerk(f"clerk-{n}", key.text) for n in range(6)]
    for _ in range(KILLS):
        await process.start()
        before = sum(len(clerk.done) for clerk in clerks)
        async with ClientSession() as client:
            plant = process.plant(client, token)
            working = [asyncio.create_task(clerk.run(plant)) for clerk in clerks]
            async with asyncio.timeout(PATIENCE):
                while sum(len(clerk.done) for clerk in clerks) < before + 50:
                    await asyncio.sleep(0)
            await asyncio.sleep(chance.uniform(0, 0.3))
            await process.stop(signal.SIGKILL)
            await asyncio.gather(*working)
    await process.start()
    async with ClientSession() as client:
        found = [accounted(entry) for entry in await exported(process.plant(client, token))]
    await process.stop()

    done = {entry for entry in found if entry[2] == "ok"}
    assert len(done) == sum(outcome == "ok" for _, _, outcome, _ in found), "one entry a change"
    removed = {target for action, target, _, _ in done if action == "device.remove"}
    for action, stored in changed(process.database).items():
        entered = {(target, more) for name, target, _, more in done if name == action}
        assert stored == {(target, more) for target, more in entered if target not in removed}, action
    assert removed <= {target for action, target, _, _ in done if action == "device.register"}
    missing = Counter(entry for clerk in clerks for entry in clerk.done) - Counter(found)
    assert not missing, "what was answered is all there"


# ---- nothing is taken back

OVERWRITES = (
    "update audit set outcome = 'ok'",
    "update audit set name = 'somebody else' where id = :id",
    "update or ignore audit set at = 0 where id = :id",
    "update or replace audit set id = :id where id = :other",
    "update audit set id = 1000000 where id = :id",
    "update audit set tenant_id = 7 where id = :id",
    "delete from audit",
    "delete from audit where id = :id",
    "insert or replace into audit (id, tenant_id, at, name, role, action, outcome) values (:id, :tenant, 0, '', '', '', '')",
    "replace into audit (id, tenant_id, at, name, role, action, outcome) values (:id, :tenant, 0, '', '', '', '')",
    "replace into audit select * from audit where id = :id",
    """insert into audit (id, tenant_id, at, name, role, action, outcome) values (:id, :tenant, 0, '', '', '', '')
       on conflict (id) do update set outcome = 'ok'""",
    """insert into audit (id, tenant_id, at, name, role, action, outcome) values (:id, :tenant, 0, '', '', '', '')
       on conflict do update set name = 'somebody else'""",
)


async def test_the_database_refuses_to_change_or_delete_an_entry(plant: Plant) -> None:
    platform = admin_token(plant.database, "platform")
    await plant.register("press-1")
    assert (await plant.ask("PUT", "/iiot/press-1"))[0] == 409
    for name in ("acme", "other"):
        assert (await plant.ask("POST", "/tenants", {"name": name}, token=platform))[0] == 201
    before = rows(plant.database, "select * from audit order by id")
    ours = [row[0] for row in before if row[1] is not None]
    platforms = [row[0] for row in before if row[1] is None]
    assert len(ours) == len(platforms) == 2
    for recursive in (0, 1):
        with closing(sqlite3.connect(plant.database, isolation_level=None)) as other:
            other.execute(f"pragma recursive_triggers = {recursive}")
            for (one, another), tenant in ((ours, 1), (platforms, None)):
                for statement in OVERWRITES:
                    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                        other.execute(statement, {"id": one, "other": another, "tenant": tenant})
    assert rows(plant.database, "select * from audit order by id") == before
    await plant.register("press-2")
    assert (await entries(plant))[0]["target"] == "press-2"


async def test_the_entries_of_a_tenant_do_not_go_while_it_stays(plant: Plant) -> None:
    await plant.register("press-1")
    before = rows(plant.database, "select * from audit order by id")
    with closing(sqlite3.connect(plant.database, isolation_level=None)) as other, suppress(sqlite3.IntegrityError):
        other.execute("begin")
        other.execute("update tenant set name = null where id = 1")
        other.execute("delete from audit where tenant_id = 1")
        other.execute("update tenant set name = 'default' where id = 1")
        other.execute("commit")
    assert rows(plant.database, "select * from audit order by id") == before


async def test_the_audit_of_a_removed_tenant_goes_with_it_and_the_platform_keeps_that_it_went(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), removed_rows=3)) as plant:
        platform = minted(plant, "platform", "the owner")
        await plant.register("press-1")
        status, body = await plant.ask("POST", "/tenants", {"name": "acme"}, token=platform)
        assert status == 201
        for number in range(10):
            assert (await plant.ask("PUT", f"/iiot/press-{number}", token=body["token"]))[0] == 201
            assert (await plant.ask("DELETE", f"/tokens/{number}", token=body["token"]))[0] == 404
        ours = await entries(plant)
        ((theirs,),) = rows(plant.database, "select id from tenant where name = 'acme'")
        assert rows(plant.database, "select count(*) from audit where tenant_id = ?", theirs) == [(20,)]
        assert (await plant.ask("DELETE", "/tenants/acme?confirm=acme", token=platform))[0] == 204
        async with asyncio.timeout(PATIENCE):
            while rows(plant.database, "select 1 from tenant where id = ?", theirs):
                await asyncio.sleep(0.01)
        assert rows(plant.database, "select count(*) from audit where tenant_id = ?", theirs) == [(0,)]
        assert await entries(plant) == ours
        kept = await entries(plant, token=platform, path="/platform/audit")
        assert [told(entry) for entry in kept[::-1]] == [
            ("tenant.create", "acme", None, "ok", {"quotas": {}, "token": id_of(body["token"])}),
            ("tenant.remove", "acme", None, "ok", None),
        ]
        assert {(entry["token"], entry["name"]) for entry in kept} == {(id_of(platform), "the owner")}


# ---- filters, pages and export


async def lived(plant: Plant) -> list[Entry]:
    """Entries of several people, two of one name, on several devices; newest first."""
    people = [minted(plant, "admin", "Jörg & Söhne, Schicht 1"), minted(plant, "admin", "twin"), minted(plant, "operator", "twin")]
    key = await new_key(plant)
    for number, person in enumerate([*people, plant.token]):
        for device in ("press-1", f"press-{number}", "a:b.c_d-e"):
            await plant.ask("PUT", f"/iiot/{device}", token=person)
            await plant.ask("POST", f"/iiot/{device}", {"speed": number}, token=person)
            await plant.ask("PATCH", f"/iiot/{device}", {"labels": {"line": "ü"}}, token=person)
        for match in ("press-*", "two\nlines \u2028 \r"):
            await plant.ask("POST", "/iiot", {"match": match, "config": {}}, token=person)
    assert await provision(plant, key, "press-9") is None
    items = await entries(plant)
    assert len(items) > 40
    assert len({item["at"] for item in items}) > 5
    return items


async def both(plant: Plant, query: str) -> list[Entry]:
    """What a query finds, newest first; its export is the same."""
    items = await entries(plant, query)
    assert await exported(plant, query) == items[::-1]
    return items


async def test_the_audit_is_filtered_by_actor_action_device_and_time(plant: Plant) -> None:
    items = await lived(plant)
    assert await both(plant, "") == items
    people = {item["name"] for item in items} | {item["token"] for item in items}
    assert len(people) == 4 + 5
    for actor in [*people, "nobody", "twi", "TWIN", "%"]:
        expected = [item for item in items if actor in (item["name"], item["token"])]
        assert await both(plant, f"&actor={quote(actor)}") == expected, actor
    for actions in (["device.register"], ["config.push", "key.create"], ["device.provision", "device.register", "nothing"], ["device"]):
        query = "".join(f"&action={action}" for action in actions)
        assert await both(plant, query) == [item for item in items if item["action"] in actions]
    for device in ("press-1", "press-9", "a:b.c_d-e", "press", "nobody"):
        assert await both(plant, f"&device={device}") == [item for item in items if item["device"] == device]
    for at in {item["at"] for item in items}:
        assert await entries(plant, f"&from={at}") == [item for item in items if item["at"] >= at]
        assert await entries(plant, f"&to={at}") == [item for item in items if item["at"] < at]
    low, high = items[-5]["at"], items[5]["at"]
    assert await both(plant, f"&from={low}&to={high}") == [item for item in items if low <= item["at"] < high]
    assert await both(plant, f"&from={iiot.parse_rfc3339(low)}") == [item for item in items if item["at"] >= low]
    assert await both(plant, "&from=-1h") == items
    assert await both(plant, "&to=-1h") == []


async def test_filters_are_combined(plant: Plant) -> None:
    items = await lived(plant)
    low, high = items[-3]["at"], items[3]["at"]
    twin = next(item["token"] for item in items if item["name"] == "twin" and item["role"] == "operator")
    query = f"&actor=twin&action=config.push&action=device.update&device=press-1&from={low}&to={high}"
    expected = [
        item for item in items
        if item["name"] == "twin" and item["action"] in ("config.push", "device.update") and item["device"] == "press-1"
        and low <= item["at"] < high
    ]  # fmt: skip
    assert {item["role"] for item in expected} == {"admin", "operator"}
    assert {item["outcome"] for item in expected} == {"ok", "forbidden"}
    assert await both(plant, query) == expected
    assert await both(plant, query.replace("twin", twin)) == [item for item in expected if item["token"] == twin]


def add_at_random(database: Path, chance: random.Random) -> None:
    """Entries over two days, of a clock that was set again and again."""
    with plants.writing(database) as connection:
        for number in range(400):
            who = chance.choice([("ada", "11"), ("ada", "12"), ("bob", "13"), ("13", None), ("cli", None)])
            what = chance.choice(["config.push", "config.push", "config.push", "device.update", "token.revoke"])
            at = 1_767_225_600_000 + chance.randrange(2 * iiot.DAY)
            connection.execute(
                """insert into audit (tenant_id, at, token, name, role, action, target, device, outcome)
                   values (1, ?, ?, ?, 'admin', ?, ?, ?, 'ok')""",
                (at, who[1], who[0], what, str(number), chance.choice([None, "press-1", "press-2"])),
            )


@pytest.mark.parametrize("seed", range(3))
async def test_any_filter_finds_what_a_look_at_every_entry_finds(plant: Plant, seed: int) -> None:
    chance = random.Random(seed)
    add_at_random(plant.database, chance)
    items = await both(plant, "")
    moments = [item["at"] for item in items]
    for _ in range(60):
        actor = chance.choice([None, "ada", "11", "13", "cli", "nobody"])
        some, many = ["device.update", "token.revoke", "nothing"], [*map(str, range(25)), "config.push"]
        actions = chance.choice([None, ["config.push"], some, many])
        device = chance.choice([None, None, "press-1", "press-9"])
        low, high = chance.choice([None, *moments]), chance.choice([None, *moments])
        query = "".join(
            [
                f"&actor={actor}" if actor else "", "".join(f"&action={action}" for action in actions or ()),
                f"&device={device}" if device else "", f"&from={low}" if low else "", f"&to={high}" if high else "",
            ]
        )  # fmt: skip
        assert await both(plant, query) == [
            item for item in items
            if (actor is None or actor in (item["name"], item["token"])) and (actions is None or item["action"] in actions)
            and (device is None or item["device"] == device) and (low is None or item["at"] >= low) and (high is None or item["at"] < high)
        ], query  # fmt: skip


async def test_the_audit_comes_in_pages_that_are_complete_while_it_grows(plant: Plant) -> None:
    await lived(plant)
    writing = True

    async def write() -> None:
        for number in count():
            await plant.register(f"new-{number}")
            if not writing:
                return

    growing = asyncio.create_task(write())
    try:
        for query in ("", "&actor=twin", "&action=device.register"):
            found: list[Entry] = []
            after = ""
            while True:
                page = await plant.get(f"/audit?limit=3{query}{after}")
                assert len(page["items"]) <= 3
                found += page["items"]
                if page["next"] is None:
                    break
                after = f"&after={page['next']}"
            everything = await both_while_growing(plant, query)
            assert found == [item for item in everything if item["id"] <= found[0]["id"]]
            assert len(found) > 10
    finally:
        writing = False
        await growing


async def both_while_growing(plant: Plant, query: str) -> list[Entry]:
    """As `both`, where more may come between the two."""
    items = await entries(plant, query)
    lines = await exported(plant, query)
    assert lines[: len(items)] == items[::-1]
    assert [line["id"] for line in lines] == sorted({line["id"] for line in lines})
    return items


@pytest.mark.parametrize(
    "query",
    [
        "nonsense=1", "who=x", "outcome=ok", "actor=a&actor=b", "device=a&device=b", "limit=0", "limit=1001", "limit=x", "after=x",
        "after=-1", "from=yesterday", "to=2026-13-01", "from=-1h&from=-2h", "format=csv", "format=", "format=NDJSON",
        "format=ndjson&limit=5", "format=ndjson&nonsense=1", "format=ndjson&format=json", "actor=%00",
    ],
)  # fmt: skip
async def test_a_query_that_is_not_understood_is_refused(plant: Plant, query: str) -> None:
    platform = admin_token(plant.database, "platform")
    for path, token in (("/audit", plant.token), ("/platform/audit", platform)):
        status, body = await plant.ask("GET", f"{path}?{query}", token=token)
        assert (status, body["error"]["code"]) == (400, "bad_query")
        problem = body["error"]["details"][0]["path"]
        assert problem in query


async def test_the_export_is_a_line_of_json_for_each_entry_oldest_first_beyond_one_slice(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), audit_rows=4)) as plant:
        items = await lived(plant)
        async with plant.client.get(f"{plant.url}/audit?format=ndjson", headers={"Authorization": f"Bearer {plant.token}"}) as response:
            assert (response.status, response.content_type) == (200, "application/x-ndjson")
            body = await response.read()
        assert body.endswith(b"\n")
        lines = body[:-1].split(b"\n")
        assert [json.loads(line) for line in lines] == items[::-1]
        for size in range(1, 10):  # of the last slice, and slices that are just full
            first = items[size - 1]["id"] - 1
            assert await exported(plant, f"&after={first}") == items[:size][::-1]
        for name, number in {"n0": 0, "n4": 4, "n5": 5, "n8": 8}.items():
            for _ in range(number):
                await plant.ask("DELETE", f"/iiot/{name}")
            status, text = await plant.ask("GET", f"/audit?format=ndjson&device={name}")
            assert status == 200
            assert text.count("\n") == number
            assert [json.loads(line)["device"] for line in text.split("\n")[:-1]] == [name] * number
        status, text = await plant.ask("GET", "/audit?format=ndjson&actor=nobody")
        assert (status, text) == (200, "")


async def test_the_platforms_audit_is_filtered_and_exported_too(plant: Plant) -> None:
    platform = minted(plant, "platform", "the owner")
    other = minted(plant, "platform", "the deputy")
    for name in ("acme", "other"):
        for token in (platform, other):
            await plant.ask("POST", "/tenants", {"name": name}, token=token)
            await plant.ask("PUT", f"/iiot/{name}", token=token)
    items = await entries(plant, token=platform, path="/platform/audit")
    assert len(items) == 8
    assert await exported(plant, token=platform, path="/platform/audit") == items[::-1]
    for query, expected in (
        (f"&actor={id_of(other)}", [item for item in items if item["name"] == "the deputy"]),
        ("&actor=the%20owner&action=tenant.create", [i for i in items if (i["name"], i["action"]) == ("the owner", "tenant.create")]),
        ("&device=acme", [item for item in items if item["target"] == "acme" and item["action"] == "device.register"]),
        (f"&to={items[4]['at']}", [item for item in items if item["at"] < items[4]["at"]]),
    ):
        assert await entries(plant, query, token=platform, path="/platform/audit") == expected
        assert await exported(plant, query, token=platform, path="/platform/audit") == expected[::-1]


# ---- who may see what


async def test_the_audit_of_a_tenant_is_its_admins_alone(plant: Plant) -> None:
    world = World(plant)
    await world.furnish()
    platform = world.roles["platform"]
    status, body = await plant.ask("POST", "/tenants", {"name": "b"}, token=platform)
    assert status == 201
    theirs: str = body["token"]
    for name in ("press-1", "press-7"):
        assert (await plant.ask("PUT", f"/iiot/{name}", token=theirs))[0] == 201
    assert (await plant.ask("POST", "/tenants", {"name": "c"}, token=theirs))[0] == 403
    ours = await entries(plant, token=world.roles["admin"])
    of_b = await entries(plant, token=theirs)
    of_platform = await entries(plant, token=platform, path="/platform/audit")
    assert [(e["action"], e["target"], e["outcome"]) for e in of_b] == [
        ("tenant.create", None, "forbidden"), ("device.register", "press-7", "ok"), ("device.register", "press-1", "ok"),
    ]  # fmt: skip
    ids = [entry["id"] for entry in ours + of_b + of_platform]
    assert len(ids) == len(set(ids)) == rows(plant.database, "select count(*) from audit")[0][0]
    assert {entry["token"] for entry in ours} == {id_of(plant.token), id_of(world.roles["admin"])}
    assert {entry["token"] for entry in of_b} == {id_of(theirs)}
    assert {entry["token"] for entry in of_platform} == {id_of(platform)}
    admin = world.roles["admin"]
    queries = (f"&actor={id_of(theirs)}", "&device=press-7", f"&actor={id_of(platform)}", "&action=tenant.create", f"&after={max(ids) + 1}")
    for query in queries:
        found = await entries(plant, query, token=admin)
        assert found == (ours if "after" in query else [])
    assert await exported(plant, f"&after={min(ids) - 1}", token=admin) == ours[::-1]


async def test_only_an_admin_sees_the_audit_and_who_was_refused(plant: Plant) -> None:
    world = World(plant)
    await world.furnish()
    before = await world.audit()
    for path, roles in (("/audit", ("viewer", "operator", "platform")), ("/platform/audit", ("viewer", "operator", "admin"))):
        for role in roles:
            for query in ("", "?format=ndjson", "?nonsense=1"):
                status, body = await plant.ask("GET", path + query, token=world.roles[role])
                assert (status, body["error"]["code"]) == (403, "forbidden")
    assert await world.audit() == before
    routes = [route for route in ACCOUNTED if route.role != "public"]
    for route in routes:
        path = route.path.replace("{device}", "press-1").replace("{id}", "abc").replace("{tenant}", "acme").replace("{port}", "22")
        assert (await plant.ask(route.method, path, {}, token=world.roles["viewer"]))[0] == 403
    found = await entries(plant, "&actor=the%20viewer", token=world.roles["admin"])
    assert [(entry["action"], entry["outcome"], entry["role"]) for entry in found[::-1]] == [
        (route.action, "forbidden", "viewer") for route in routes
    ]
    assert {entry["token"] for entry in found} == {id_of(world.roles["viewer"])}


# ---- how commands end


async def until_entered(plant: Plant, count: int) -> list[Entry]:
    """The ends of commands, oldest first, once there are so many."""
    found = await plant.until("/audit?action=command.end", lambda body: len(body["items"]) == count)
    items: list[Entry] = found["items"]
    return items[::-1]


async def test_the_end_of_a_command_is_entered_in_the_name_of_who_ran_it(plant: Plant) -> None:
    ada, bob = minted(plant, "admin", "ada"), minted(plant, "admin", "bob")

    async def run(token: str, **more: Any) -> int:
        status, answer = await plant.ask("POST", "/iiot/press-1/commands", {**COMMAND, **more}, token=token)
        assert status == 202, answer
        return int(answer["id"])

    async def tell(kind: str, **fields: Any) -> None:
        device.seq += 1
        await device.send(kind, seq=device.seq, command=(await device.expect("command"))["command"], **fields)

    device = await plant.device("press-1")
    failed, waits, runs = await run(ada), await run(ada), await run(bob, ttl="1h", parallel=True)
    assert (await plant.ask("DELETE", f"/iiot/press-1/commands/{waits}", token=bob))[0] == 202
    await tell("result", status="failed", message="no such program", output_bytes=7)
    await until_entered(plant, 2)
    await tell("started")
    await device.acknowledged(device.seq)
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    ends = await until_entered(plant, 3)
    assert [(entry["target"], entry["name"], entry["token"], entry["detail"]["status"]) for entry in ends] == [
        (str(waits), "ada", id_of(ada), "cancelled"), (str(failed), "ada", id_of(ada), "failed"),
        (str(runs), "bob", id_of(bob), "cancelled"),
    ]  # fmt: skip
    assert ends[1]["detail"] == {"status": "failed", "exit_code": None, "seconds": 0.0, "output_bytes": 7}
    assert ends[2]["detail"]["seconds"] >= 0
    for entry in ends:
        assert (entry["device"], entry["role"], entry["address"], entry["outcome"]) == ("press-1", "admin", "127.0.0.1", "ok")
    taken_back = await entries(plant, "&action=command.cancel")
    assert [(entry["name"], entry["target"], entry["device"]) for entry in taken_back] == [("bob", str(waits), "press-1")]


async def test_each_command_of_one_for_many_is_entered_with_its_end(plant: Plant) -> None:
    """In the name of who asked for all of them; also that of a device that is not there."""
    ada = minted(plant, "admin", "ada")
    device = await plant.device("press-1")
    await plant.register("press-2")
    status, made = await plant.ask("POST", "/commands", {"argv": ["true"], "match": "press-*"}, token=ada)
    assert status == 202, made
    device.seq += 1
    await device.send("result", seq=device.seq, command=(await device.expect("command"))["command"], status="done", exit_code=0)
    ends = await until_entered(plant, 2)
    assert [(entry["device"], entry["detail"]["status"]) for entry in ends] == [("press-2", "expired"), ("press-1", "done")]
    begun = (await entries(plant, "&action=command.run"))[::-1]
    assert [(entry["target"], entry["device"]) for entry in begun[:1]] == [("press-*", None)]
    assert {entry["device"]: entry["target"] for entry in begun[1:]} == {entry["device"]: entry["target"] for entry in ends}
    assert [entry["detail"] for entry in begun[1:]] == [{"batch": made["id"]}] * 2
    for entry in begun + ends:
        assert (entry["name"], entry["token"], entry["address"], entry["outcome"]) == ("ada", id_of(ada), "127.0.0.1", "ok")


async def test_a_command_does_not_end_without_an_entry(plant: Plant) -> None:
    device = await plant.device("press-1")
    _, made = await plant.ask("POST", "/iiot/press-1/commands", COMMAND)
    await device.expect("command")
    end = {"seq": device.seq + 1, "command": made["id"], "status": "done", "exit_code": 0}
    with no_entry_possible(plant.database):
        await device.send("result", **end)
        assert (await device.closed()).code == 1013
        assert (await plant.get(f"/iiot/press-1/commands/{made['id']}"))["status"] == "sent"
    await (await plant.device("press-1")).send("result", **end)
    assert [entry["target"] for entry in await until_entered(plant, 1)] == [str(made["id"])]


# ---- tunnels


async def test_a_tunnel_leaves_its_exact_entries_opened_or_refused(plant: Plant) -> None:
    world = World(plant)
    await world.furnish()
    path, state = "/iiot/valve-1/tunnel/22", contents(plant.database)
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "A" * 22 + "=="}

    async def refused(role: str, code: str, path: str, **headers: str) -> None:
        shown = {name.replace("-", "_"): value for name, value in headers.items()}
        status, answer, new = await world.left(role, "GET", path, headers=shown)
        assert (status, answer["error"]["code"]) == (iiot.FAULTS[code].status, code)
        _, _, device, _, port = path.split("/")
        assert [told(entry) for entry in new] == [("tunnel.open", port, device, code, None)]

    with no_entry_possible(plant.database):
        status, _, new = await world.left("admin", "GET", path, headers=upgrade)
    assert status >= 500
    assert new == []
    for role in ("viewer", "operator", "platform"):
        await refused(role, "forbidden", path, **upgrade)
    await refused("admin", "upgrade_required", path)
    for code, other in (
        ("not_found", "/iiot/nobody/tunnel/22"), ("not_found", "/iiot/valve-1/tunnel/70000"), ("device_offline", "/iiot/press-2/tunnel/22"),
    ):  # fmt: skip
        await refused("admin", code, other, **upgrade)
    assert contents(plant.database) == state


async def test_a_tunnel_is_entered_before_it_is_open_and_when_it_is_over(plant: Plant) -> None:
    ada, bob = minted(plant, "admin", "ada"), minted(plant, "admin", "bob")
    device = await plant.device("press-1")
    number = await plant.tunnel("press-1", device, ada)
    assert [(entry["name"], *told(entry)) for entry in await entries(plant, "&action=tunnel.open")] == [
        ("ada", "tunnel.open", "22", "press-1", "ok", None)
    ]
    assert await entries(plant, "&action=tunnel.end") == []
    assert (await plant.ask("DELETE", f"/iiot/press-1/tunnels/{number}", token=bob))[0] == 204
    (end,) = (await plant.until("/audit?action=tunnel.end", lambda body: body["items"]))["items"]
    assert (end["name"], end["token"], end["role"], end["address"]) == ("ada", id_of(ada), "admin", "127.0.0.1")
    assert (end["target"], end["device"], end["outcome"]) == ("22", "press-1", "ok")
    assert end["detail"].pop("seconds") >= 0
    assert end["detail"] == {"reason": "closed by bob", "from_device": 0, "to_device": 0}
    assert [(entry["name"], entry["target"]) for entry in await entries(plant, "&action=tunnel.close")] == [("bob", number)]


# ---- what an entry holds


async def test_the_secret_of_a_token_in_a_path_is_kept_nowhere(plant: Plant) -> None:
    secret = {kind: iiot.mint(kind).text for kind in ("op", "prov", "dev")}
    viewer = minted(plant, "viewer", "viewer")
    paths = [
        f"{folder}/{text}{more}" for text in (*secret.values(), viewer, plant.token) for more in ("", "x", "%20", "%2F")
        for folder in ("/tokens", "/provisioning-keys", "/iiot")
    ]  # fmt: skip
    for path in paths:
        for token in (plant.token, viewer):
            assert (await plant.ask("DELETE", path, token=token))[0] in (403, 404)
    found = await entries(plant)
    assert len(found) == 2 * len(paths)
    assert {entry["target"] for entry in found} >= {f"iiot_op_{id_of(plant.token)}_…", f"iiot_prov_{id_of(secret['prov'])}_…"}
    files = b"".join(path.read_bytes() for path in plant.database.parent.iterdir())
    assert id_of(secret["op"]).encode() in files
    for text in (*secret.values(), viewer, plant.token):
        assert text[-43:] not in json.dumps(found)
        assert text[-43:].encode() not in files


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x" * 2_000, "x" * 256), ("a%0Ab%22", 'a\nb"'), ("%C3%BC%F0%9F%98%80", "ü😀"), ("%E2%80%A8", "\u2028"),
        ("%FF", None), ("%ED%A0%80", None),
    ],
)  # fmt: skip
async def test_a_strange_name_is_refused_and_entered(plant: Plant, name: str, shown: str | None) -> None:
    status, body = await plant.ask("PUT", f"/iiot/{name}")
    assert (status, body["error"]["code"]) == (422, "invalid")
    assert (await plant.ask("DELETE", f"/iiot/{name}"))[0] == 404
    found = await both(plant, "")
    assert [(entry["action"], entry["outcome"]) for entry in found] == [("device.remove", "not_found"), ("device.register", "invalid")]
    if shown is not None:
        assert {(entry["target"], entry["device"]) for entry in found} == {(shown, shown)}


async def test_a_name_with_a_zero_character_is_not_entered_as_that_of_a_device(plant: Plant) -> None:
    await plant.register("press-1")
    assert (await plant.ask("DELETE", "/iiot/press-1%00"))[0] == 404
    assert [entry["action"] for entry in await entries(plant, "&device=press-1")] == ["device.register"]


FORWARDED = "198.51.100.9, 203.0.113.7"


async def addresses(plant: Plant) -> dict[str, str]:
    """Addresses of the newest entries of a change, a refusal and a provisioning, each with the header of a proxy."""
    key = await new_key(plant)
    viewer = minted(plant, "viewer", "viewer")
    assert (await ask(plant, "PUT", "/iiot/press-1", X_Forwarded_For=FORWARDED))[0] == 201
    assert (await ask(plant, "PUT", "/iiot/press-2", token=viewer, X_Forwarded_For=FORWARDED))[0] == 403
    async with plant.client.ws_connect(f"{plant.url}/device", headers={"X-Forwarded-For": FORWARDED}) as link:
        await Device(link).send("provision", key=key, device="press-3")
        await Device(link).expect("credentials")
    await plant.register("press-4")
    return {entry["target"]: entry["address"] for entry in await entries(plant) if entry["device"]}


async def test_behind_a_trusted_proxy_the_address_is_the_forwarded_one(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, trusted_proxy="127.0.0.1/32") as plant:
        forwarded = {f"press-{number}": "203.0.113.7" for number in (1, 2, 3)}
        assert await addresses(plant) == {**forwarded, "press-4": "127.0.0.1"}


@pytest.mark.parametrize("trusted", ["", "10.0.0.0/8"])
async def test_without_a_trusted_proxy_the_address_is_the_peers(tmp_path: Path, trusted: str) -> None:
    async with plants.plant(tmp_path, trusted_proxy=trusted) as plant:
        assert await addresses(plant) == {f"press-{number}": "127.0.0.1" for number in (1, 2, 3, 4)}
