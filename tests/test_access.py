"""Who may do what: every route for every kind of token, another tenant's admin, and tokens that end while something is under way."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientPayloadError, StreamReader, web
from plant import PATIENCE, Device, Plant, locked

import iiot

LIMITS = attrs.evolve(iiot.Limits(), guesses=100_000, csv_rows=100, audit_rows=100, storage_seconds=60.0)
ROLES = ("viewer", "operator", "admin", "platform")
MAY = {  # the role of a route: those who may use it
    "public": set(ROLES),
    "any": set(ROLES),
    "viewer": {"viewer", "operator", "admin"},
    "operator": {"operator", "admin"},
    "admin": {"admin"},
    "platform": {"platform"},
}
JSON = "application/json"
DEVICE = (
    "alerts device connected connected_at disconnected_at seen_at created_at agent software_version disabled labels config latest"
    " reported"
)
CONFIG = "version document status status_at at by timeout sent_at message errors device applied drift"
STATE = "device version at session reported"
RULE = "by changed_at condition id match metric name"
ALERT = (
    "acknowledged device fired_at held_back id kind labels metric reason resolved_at rule rule_id severity silenced since stale status"
    " text told value"
)
COMMAND = (
    "argv at batch by device ended_at exit_code expires_at id message output_bytes output_cut parallel sent_at started_at status timeout"
)
BATCH = "argv at by counts devices id items match next not_begun parallel per_minute status stop_after_failures stopped timeout"
WEBHOOK = "created_at form group_by id interval match name old_secret_until repeat rule severity url wait"
SIGNER = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
TENANT = "devices connections points_per_day log_bytes_per_day"


@attrs.frozen
class Example:
    """A valid request of a route, and how it is answered to those who may: `keys` of the JSON, `kind` of the content."""

    status: int
    keys: str = ""
    query: str = ""
    body: Any = None
    kind: str = JSON


PAGE = Example(200, "items next")
DONE = Example(204, kind="")
EXAMPLES: dict[tuple[str, str], tuple[Example, ...]] = {
    ("GET", "/iiot"): (PAGE, Example(200, "items next", "?match=*&connected=true&limit=5&sort=attention")),
    ("GET", "/iiot/summary"): (
        Example(200, "devices online offline disabled never_seen alerts unattended critical drifted rejected", "?match=*"),
    ),
    ("POST", "/iiot"): (Example(202, "items", body={"match": "*", "config": {"n": 2}}),),
    ("GET", "/iiot/{device}"): (Example(200, DEVICE),),
    ("PUT", "/iiot/{device}"): (Example(201, "device token"),),
    ("PATCH", "/iiot/{device}"): (Example(200, DEVICE, body={"disabled": True, "labels": {"line": "3"}}),),
    ("DELETE", "/iiot/{device}"): (DONE,),
    ("POST", "/iiot/{device}/token"): (
        Example(201, "device token", body={}),
        Example(201, "device token", body={"revoke": True}),
    ),
    ("POST", "/iiot/{device}/seq"): (Example(200, "device seq", body={"seq": 0}), Example(200, "device seq", body={"seq": 7})),
    ("POST", "/iiot/{device}"): (Example(202, "device version status", body={"n": 2}),),
    ("GET", "/iiot/{device}/config"): (Example(200, CONFIG),),
    ("GET", "/iiot/{device}/config/history"): (PAGE,),
    ("POST", "/iiot/{device}/config/rollback"): (Example(202, "device version status", body={"version": 1}),),
    ("GET", "/iiot/{device}/state"): (Example(200, STATE), Example(200, STATE, "?version=1")),
    ("GET", "/iiot/{device}/state/history"): (PAGE,),
    ("GET", "/iiot/{device}/events"): (PAGE,),
    ("GET", "/iiot/{device}/logs"): (
        PAGE, Example(200, "items next", "?q=a&level=info&limit=5"), Example(200, query="?format=ndjson", kind="application/x-ndjson"),
    ),
    ("GET", "/logs"): (
        PAGE, Example(200, "items next", "?match=*&from=-1h"), Example(200, query="?format=text&limit=3", kind="text/plain"),
    ),
    ("POST", "/iiot/{device}/log-token"): (
        Example(201, "device token", body={}), Example(201, "device token", body={"revoke": True}),
    ),
    ("DELETE", "/iiot/{device}/log-token"): (DONE,),
    ("GET", "/iiot/{device}/syslog-source"): (Example(200, "device addresses"),),
    ("PUT", "/iiot/{device}/syslog-source"): (Example(200, "device addresses", body={"addresses": []}),),
    ("GET", "/syslog/refused"): (Example(200, "datagrams_lost items since"),),
    ("GET", "/retention"): (Example(200, "logs"),),
    ("PUT", "/retention"): (Example(200, "logs", body={"logs": {"days": 7}}),),
    ("DELETE", "/retention"): (DONE,),
    ("GET", "/webhooks"): (PAGE, Example(200, "items next", "?limit=1&after=0")),
    ("POST", "/webhooks"): (
        Example(201, f"{WEBHOOK} secret", body={"url": "http://127.0.0.1:9/"}),
        Example(201, WEBHOOK, body={"url": "http://127.0.0.1:9/topic", "form": "ntfy", "match": "press-*"}),
    ),
    ("DELETE", "/webhooks/{id}"): (DONE,),
    ("POST", "/webhooks/{id}/secret"): (Example(201, f"{WEBHOOK} secret"), Example(201, f"{WEBHOOK} secret", body={"secret": SIGNER})),
    ("POST", "/webhooks/{id}/test"): (Example(200, "error http_status status"),),
    ("GET", "/notifications"): (PAGE, Example(200, "items next", "?webhook=1&status=waiting&limit=3")),
    ("GET", "/iiot/{device}/telemetry"): (
        Example(200, "device series next"),
        Example(200, "device series next", "?every=60s&agg=max"),
        Example(200, query="?format=csv", kind="text/csv"),
    ),
    ("GET", "/telemetry"): (
        Example(200, query="?match=nobody"), Example(200, query="?latest=1&match=nobody"), Example(200, query="?every=1h&match=nobody"),
        Example(200, query="?format=csv", kind="text/csv"),
    ),
    ("POST", "/rules/dry-run"): (
        Example(200, "devices from items readings to", body={"metric": "level", "condition": {"above": 5}}),
        Example(200, "devices from items readings to", body={"metric": "level", "condition": {"absent": "5m"}}),
    ),
    ("GET", "/rules"): (PAGE, Example(200, "items next", "?limit=1&after=0")),
    ("POST", "/rules"): (
        Example(201, "by changed_at condition id metric name", body={"name": "hot", "metric": "level", "condition": {"above": 5}}),
    ),
    ("GET", "/rules/{id}"): (Example(200, RULE),),
    ("PUT", "/rules/{id}"): (
        Example(200, RULE, body={"name": "rule {id}", "metric": "level", "match": "press-*", "condition": {"above": 5}}),
    ),
    ("DELETE", "/rules/{id}"): (DONE,),
    ("GET", "/alerts"): (PAGE, Example(200, "items next", "?status=firing&severity=warning&match=*&limit=3")),
    ("GET", "/alerts/{id}"): (Example(200, ALERT),),
    ("POST", "/alerts/{id}/ack"): (Example(200, ALERT, body={"text": "on my way"}), Example(200, ALERT, body={})),
    ("DELETE", "/alerts/{id}/ack"): (Example(200, ALERT),),
    ("GET", "/silences"): (PAGE,),
    ("POST", "/silences"): (
        Example(201, "id labels match rule text until", body={"match": "press-*", "until": "2099-01-01T00:00:00Z"}),
    ),
    ("DELETE", "/silences/{id}"): (DONE,),
    ("DELETE", "/iiot/{device}/telemetry"): (Example(204, query="?metric=level&from=1&to=2026-01-02T00:00:00Z", kind=""),),
    ("POST", "/iiot/{device}/report"): (Example(202, "device what", body={"what": "telemetry"}),),
    ("POST", "/iiot/{device}/commands"): (
        Example(202, f"{COMMAND} output", body={"argv": ["uname", "-a"]}),
        Example(202, f"{COMMAND} output", body={"argv": ["true"], "timeout": "5s", "ttl": "1h", "parallel": False}),
    ),
    ("GET", "/iiot/{device}/commands"): (PAGE, Example(200, "items next", "?status=queued&status=running&limit=3&after=9")),
    ("GET", "/iiot/{device}/commands/{id}"): (Example(200, f"{COMMAND} output"),),
    ("DELETE", "/iiot/{device}/commands/{id}"): (Example(202, f"{COMMAND} output"),),
    ("GET", "/iiot/{device}/commands/{id}/output"): (
        Example(200, kind="text/plain"), Example(200, query="?format=raw&stream=stdout", kind="application/octet-stream"),
        Example(200, query="?format=ndjson", kind="application/x-ndjson"),
    ),
    ("POST", "/commands"): (
        Example(202, BATCH, body={"match": "nobody", "argv": ["true"]}),
        Example(202, BATCH, body={"match": "nobody", "argv": ["true"], "ttl": "1h", "per_minute": 60, "stop_after_failures": 3}),
    ),
    ("GET", "/commands"): (PAGE, Example(200, "items next", "?limit=3&after=9")),
    ("GET", "/commands/{id}"): (Example(200, BATCH), Example(200, BATCH, "?limit=1&after=9")),
    ("DELETE", "/commands/{id}"): (Example(202, BATCH),),
    ("GET", "/iiot/{device}/tunnel/{port}"): (Example(426, "error"),),  # without the upgrade to a WebSocket; with it, see below
    ("GET", "/iiot/{device}/tunnels"): (PAGE,),
    ("DELETE", "/iiot/{device}/tunnels/{id}"): (DONE,),
    ("GET", "/provisioning-keys"): (PAGE,),
    ("POST", "/provisioning-keys"): (Example(201, "id key", body={"uses": 1}),),
    ("DELETE", "/provisioning-keys/{id}"): (DONE,),
    ("GET", "/tokens"): (PAGE,),
    ("POST", "/tokens"): (Example(201, "id name role token", body={"name": "minted", "role": "viewer"}),),
    ("DELETE", "/tokens/{id}"): (DONE,),
    ("GET", "/audit"): (PAGE, Example(200, query="?format=ndjson", kind="application/x-ndjson")),
    ("GET", "/tenants"): (PAGE,),
    ("POST", "/tenants"): (Example(201, "name token", body={"name": "newcomer", "quotas": {"devices": 5}}),),
    ("PATCH", "/tenants/{tenant}"): (Example(200, TENANT, body={"quotas": {"devices": 7}}),),
    ("DELETE", "/tenants/{tenant}"): (Example(204, query="?confirm={tenant}", kind=""),),
    ("GET", "/platform/tokens"): (PAGE,),
    ("POST", "/platform/tokens"): (Example(201, "id name role token", body={"name": "minted", "role": "platform"}),),
    ("DELETE", "/platform/tokens/{id}"): (DONE,),
    ("GET", "/platform/audit"): (PAGE, Example(200, query="?format=ndjson", kind="application/x-ndjson")),
    ("GET", "/events"): (Example(200, kind="text/event-stream"), Example(200, query="?after=0", kind="text/event-stream")),
    ("GET", "/whoami"): (Example(200, "id name role tenant expires_at quotas"),),
    ("GET", "/"): (Example(200, "name version page"),),
    ("GET", "/healthz"): (Example(200, "status version"),),
    ("GET", "/metrics"): (Example(200, kind="text/plain"),),
    ("GET", "/metrics/devices"): (
        Example(200, kind="text/plain"), Example(200, query="?match=*&metric=level&max_age=1h", kind="text/plain"),
    ),
    ("GET", "/device"): (Example(400, "error"),),  # without the upgrade to a WebSocket; with it, see below
}


def name_of(route: iiot.Route) -> str:
    return f"{route.method} {route.path}"


every_route = pytest.mark.parametrize("route", iiot.ROUTES, ids=name_of)
every_named_thing = pytest.mark.parametrize("route", [route for route in iiot.ROUTES if "{" in route.path], ids=name_of)


def path_of(route: iiot.Route, example: Example, subject: str) -> str:
    """The path and the query of a request with the names of what it is about."""
    names = iter(subject.split("/"))
    return re.sub(r"{\w+}", lambda _: next(names, subject), route.path + example.query)


@attrs.frozen
class Answer:
    """What came back, `headers` without the date; of an event stream the head alone."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@attrs.frozen
class Minted:
    """A token that was shown once."""

    id: str
    text: str


@attrs.define
class Site:
    """A server, the first tenant's tokens by role and the platform's, and what the routes are tried on."""

    plant: Plant
    tokens: dict[str, str]
    devices: dict[str, Device] = attrs.field(factory=dict)
    count: int = 0

    async def mint(self, role: str = "viewer", **fields: Any) -> Minted:
        path, by = ("/platform/tokens", "platform") if role == "platform" else ("/tokens", "admin")
        status, body = await self.plant.ask("POST", path, {"name": f"a {role}", "role": role, **fields}, token=self.tokens[by])
        assert status == 201, body
        return Minted(body["id"], body["token"])

    async def revoke(self, token: Minted, role: str = "viewer") -> None:
        path, by = ("/platform/tokens", "platform") if role == "platform" else ("/tokens", "admin")
        assert await self.plant.ask("DELETE", f"{path}/{token.id}", token=self.tokens[by]) == (204, "")

    async def used_at(self, token: Minted, role: str) -> str | None:
        path, by = ("/platform/tokens", "platform") if role == "platform" else ("/tokens", "admin")
        _, body = await self.plant.ask("GET", path, token=self.tokens[by])
        (used_at,) = (item["used_at"] for item in body["items"] if item["id"] == token.id)
        return None if used_at is None else str(used_at)

    async def until_used(self, token: Minted, role: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.used_at(token, role) is None:
                await asyncio.sleep(0.01)

    async def key(self) -> Minted:
        status, body = await self.plant.ask("POST", "/provisioning-keys", {})
        assert status == 201, body
        return Minted(body["id"], body["key"])

    async def tenant(self, name: str) -> str:
        """A new tenant's admin token."""
        status, body = await self.plant.ask("POST", "/tenants", {"name": name}, token=self.tokens["platform"])
        assert status == 201, body
        return str(body["token"])

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.count:03}"

    async def rule(self, device: str) -> str:
        """A new rule, by which the readings of a device are too high."""
        body = {"name": self.fresh("rule"), "metric": "level", "match": device, "condition": {"above": 0}}
        status, answer = await self.plant.ask("POST", "/rules", body)
        assert status == 201, answer
        return str(answer["id"])

    async def alert(self, rule: str) -> str:
        """Its alert, once that fires."""
        answer = await self.plant.until("/alerts", lambda answer: any(str(one["rule_id"]) == rule for one in answer["items"]))
        return str(next(one["id"] for one in answer["items"] if str(one["rule_id"]) == rule))

    async def webhook(self, device: str) -> str:
        """A new receiver, which is not told of anything while others look."""
        status, answer = await self.plant.ask("POST", "/webhooks", {"url": "http://127.0.0.1:9/", "match": f"not-{device}"})
        assert status == 201, answer
        return str(answer["id"])

    async def command(self, device: str) -> str:
        """A new command that a device runs; those after it wait."""
        body = {"argv": ["tail", "-f", f"{device}.log"], "timeout": "1h"}
        status, answer = await self.plant.ask("POST", f"/iiot/{device}/commands", body)
        assert status == 202, answer
        session = self.devices[device]
        assert (await session.expect("command"))["command"] == answer["id"]
        await session.send("started", seq=5, command=answer["id"])
        await session.send("output", seq=6, command=answer["id"], stream="stdout", data=f"{device} says\n")
        await session.acknowledged(6)
        return str(answer["id"])

    async def batch(self, device: str) -> str:
        """A new command for many, which waits on one device for another command to end."""
        await self.command(device)
        status, answer = await self.plant.ask("POST", "/commands", {"match": device, "argv": ["echo", device]})
        assert status == 202, answer
        await self.plant.until(f"/commands/{answer['id']}", lambda body: body["counts"] == {"queued": 1})
        return str(answer["id"])

    async def furnish(self) -> str:
        """The name of a new device of the first tenant: connected, with readings, state and configuration, and at rest."""
        name = self.fresh("press")
        device = self.devices[name] = await self.plant.device(name)
        assert (await self.plant.ask("POST", f"/iiot/{name}", {"n": 1}))[0] == 202
        await device.expect("config")
        await device.telemetry({"values": {"level": 1}}, seq=1)
        await device.send("state", seq=2, reported={"hostname": name})
        await device.send("config_status", seq=3, version=1, status="applied")
        await device.send("log", seq=4, entries=[{"level": "error", "message": f"{name} says"}])
        await device.acknowledged(4)
        return name

    async def subject(self, route: iiot.Route) -> str:
        """Something new of the first tenant that the parameter of the route's path may name, two of them with a / between; and a device
        in any case."""
        device = await self.furnish()
        if "commands" in route.path or "tunnel" in route.path:
            return await self.subject_of_reach(route, device)
        match re.findall(r"{(\w+)}", route.path), route.path.split("/{")[0]:
            case [], _:
                return ""
            case ["device"], "/iiot":
                return self.fresh("press") if (route.method, route.path) == ("PUT", "/iiot/{device}") else device
            case ["tenant"], "/tenants":
                name = self.fresh("acme")
                await self.tenant(name)
                return name
            case ["id"], "/rules" | "/alerts" as path:
                rule = await self.rule(device)
                alert = await self.alert(rule)
                return rule if path == "/rules" else alert
            case ["id"], "/silences":
                body = {"match": device, "until": "2099-01-01T00:00:00Z"}
                status, answer = await self.plant.ask("POST", "/silences", body, token=self.tokens["operator"])
                assert status == 201, answer
                return str(answer["id"])
            case ["id"], "/webhooks":
                return await self.webhook(device)
            case ["id"], "/provisioning-keys":
                return (await self.key()).id
            case ["id"], "/tokens" | "/platform/tokens" as path:
                return (await self.mint("viewer" if path == "/tokens" else "platform")).id
        raise NotImplementedError(f"nothing is known here that {route.path} might be about")

    async def subject_of_reach(self, route: iiot.Route, device: str) -> str:
        """The same for routes of commands and tunnels. The device runs a command, so that a new one waits, and all is at rest."""
        if route.path == "/commands/{id}":
            return await self.batch(device)
        if "tunnel" in route.path:
            number = await self.plant.tunnel(device, self.devices[device])
        else:
            number = await self.command(device)
        return f"{device}/22" if "{port}" in route.path else f"{device}/{number}" if "{id}" in route.path else device

    async def ask(self, route: iiot.Route, example: Example, subject: str, authorization: str | None) -> Answer:
        path = path_of(route, example, subject)
        headers = {} if authorization is None else {"Authorization": authorization}
        data = None if example.body is None else json.dumps(example.body).replace("{id}", subject)
        async with (
            asyncio.timeout(PATIENCE),
            self.plant.client.request(route.method, self.plant.url + path, data=data, headers=headers) as response,
        ):
            body = b"" if response.content_type == "text/event-stream" else await response.read()
            if (route.path, response.status) == ("/iiot/{device}/tunnels/{id}", 204):
                await self.entered(subject.rpartition("/")[2])
            shown = {name.lower(): value for name, value in response.headers.items() if name != "Date"}
            return Answer(response.status, shown, body)

    async def entered(self, tunnel: str) -> None:
        """Wait until the end of a tunnel is in the audit."""
        async with asyncio.timeout(PATIENCE):
            while plants.rows(self.plant.database, f"select 1 from tunnel where id = {tunnel}"):
                await asyncio.sleep(0.01)

    async def cleaned(self) -> None:
        """Wait until nothing is left of what was removed before."""
        async with asyncio.timeout(plants.PATIENCE):
            with closing(sqlite3.connect(self.plant.database)) as connection:
                times = iiot.removal_times(iiot.Limits())
                while iiot.Removed.of(connection.execute(iiot.REMOVED_SQL, {"most": 1, **times}).fetchone()):
                    await asyncio.sleep(0.01)

    def snapshot(self, tenant: str | None = None) -> dict[str, list[str]]:
        """Every row but the audit's and where in it an hour is, of all or of one tenant; without the times at which tokens and devices
        were last heard."""
        with closing(sqlite3.connect(self.plant.database)) as connection:
            rows = {}
            for table in plants.tables(connection) - {"audit", "hour"}:
                columns = [row[1] for row in connection.execute(f"select * from pragma_table_info('{table}')")]
                shown = ", ".join(column for column in columns if column not in ("used_at", "seen_at"))
                where = "true" if tenant is None else of_tenant(table, columns, f"(select id from tenant where name = '{tenant}')")
                rows[table] = sorted(repr(row) for row in connection.execute(f"select {shown} from {table} where {where}"))
            return rows


def of_tenant(table: str, columns: list[str], tenant: str) -> str:
    """Which rows of a table belong to a tenant."""
    if table == "tenant":
        return f"id = {tenant}"
    if "tenant_id" in columns:
        return f"tenant_id = {tenant}"
    devices = f"device_id in (select id from device where tenant_id = {tenant})"
    if "device_id" in columns:
        return devices
    if "series_id" in columns:
        return f"series_id in (select id from series where {devices})"
    if table == "document":
        return f"id in (select document_id from config where {devices})"
    if "command_id" in columns:
        return f"command_id in (select id from command where {devices})"
    if "webhook_id" in columns:
        return f"webhook_id in (select id from webhook where tenant_id = {tenant})"
    assert table in ("removed_series", "removed_range", "salt", "changed"), table
    return "false"


@asynccontextmanager
async def opened(folder: Path, limits: iiot.Limits = LIMITS) -> AsyncIterator[Site]:
    async with plants.plant(folder, limits, webhook_networks="127.0.0.0/8") as plant:
        site = Site(plant, {"admin": plant.token, "platform": plants.admin_token(plant.database, "platform")})
        for role in ("viewer", "operator"):
            site.tokens[role] = (await site.mint(role)).text
        yield site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with opened(tmp_path) as running:
        yield running


def check_allowed(answer: Answer, example: Example) -> None:
    assert answer.status == example.status, answer
    assert answer.headers.get("content-type", "").partition(";")[0] == example.kind
    if example.kind == JSON:
        assert set(answer.json) == set(example.keys.split())
    if example.status == 204:
        assert answer.body == b""


def check_refused(answer: Answer, code: str) -> None:
    """The whole answer is that of the table of faults."""
    fault = iiot.FAULTS[code]
    assert (answer.status, answer.json) == (fault.status, {"error": {"code": code, "message": fault.message}})
    assert answer.headers["content-type"].partition(";")[0] == JSON
    assert answer.headers.get("www-authenticate") == ("Bearer" if fault.status == 401 else None)


def bearer(token: str) -> str:
    return f"Bearer {token}"


async def strangers(site: Site, role: str) -> dict[str, str | None]:
    """What those show who have no valid token, though nearly one of a role that would do."""
    valid, revoked = await site.mint(role), await site.mint(role)
    expired = await site.mint(role)
    plants.expire(site.plant.database, "operator_token", expired.id)
    assert (await site.plant.ask("GET", "/whoami", token=revoked.text))[0] == 200
    await site.revoke(revoked, role)
    unknown = iiot.mint("op")
    return {
        "no token": None,
        "an empty one": "Bearer ",
        "a malformed one": bearer("let me in"),
        "one cut short": bearer(valid.text[:-1]),
        "another scheme": f"Basic {valid.text}",
        "no scheme": valid.text,
        "a device's": bearer(await site.plant.register(site.fresh("press"))),
        "a provisioning key": bearer((await site.key()).text),
        "the right secret as another kind": bearer(valid.text.replace("_op_", "_dev_")),
        "an unknown one": bearer(unknown.text),
        "another secret": bearer(f"iiot_op_{valid.id}_{unknown.text[-43:]}"),
        "another id": bearer(f"iiot_op_{unknown.stored.id}_{valid.text[-43:]}"),
        "an expired one": bearer(expired.text),
        "a revoked one": bearer(revoked.text),
    }


# ---- the table of routes


def test_every_route_is_tried_here() -> None:
    routes = [(route.method, route.path) for route in iiot.ROUTES]
    assert len(set(routes)) == len(routes)
    assert set(EXAMPLES) == set(routes)


@every_route
def test_a_route_has_a_role_that_is_known(route: iiot.Route) -> None:
    assert route.role in MAY


@every_route
def test_a_route_that_changes_something_is_accounted_for(route: iiot.Route) -> None:
    changes_nothing = route.path == "/rules/dry-run"  # its body is a question
    reaches_into_a_device = route.path == "/iiot/{device}/tunnel/{port}"  # by a WebSocket, which begins as a GET
    assert bool(route.action) == (reaches_into_a_device or (route.method != "GET" and not changes_nothing))


def test_the_server_answers_nothing_that_is_not_in_the_table() -> None:
    app = iiot.make_app(iiot.Settings())
    served = [(route.method, route.resource and route.resource.canonical) for route in app.router.routes()]
    assert sorted(served) == sorted((route.method, route.path) for route in iiot.ROUTES)
    assert all(isinstance(resource, web.Resource) for resource in app.router.resources())


# ---- every route for everybody


@every_route
async def test_a_route_is_closed_to_all_who_have_no_valid_token(site: Site, route: iiot.Route) -> None:
    subject = await site.subject(route)
    shown = await strangers(site, route.role if route.role in ROLES else "viewer")
    before = site.snapshot()
    for who, authorization in shown.items():
        for example in EXAMPLES[route.method, route.path]:
            answer = await site.ask(route, example, subject, authorization)
            try:
                if route.role == "public":
                    check_allowed(answer, example)
                else:
                    check_refused(answer, "unauthorized")
            except AssertionError as error:
                error.add_note(f"with {who}")
                raise
    assert site.snapshot() == before


@every_route
async def test_a_route_is_open_to_the_roles_of_the_table_and_closed_to_the_others(site: Site, route: iiot.Route) -> None:
    for role in ROLES:
        for example in EXAMPLES[route.method, route.path]:
            subject = await site.subject(route)
            await site.cleaned()
            before = site.snapshot()
            answer = await site.ask(route, example, subject, bearer(site.tokens[role]))
            try:
                if role in MAY[route.role]:
                    check_allowed(answer, example)
                else:
                    check_refused(answer, "forbidden")
                    assert site.snapshot() == before
            except AssertionError as error:
                error.add_note(f"as {role}")
                raise


async def test_who_may_not_learns_nothing_of_what_was_asked(site: Site) -> None:
    """Neither whether a query or a body would be right, nor whether there is such a thing."""
    tried = 0
    for route in iiot.ROUTES:
        if route.role == "public":
            continue
        wrong = [Example(0, query="?nonsense=1&limit=x"), Example(0, body="no object")]
        for example in wrong:
            check_refused(await site.ask(route, example, "nothing", None), "unauthorized")
            for role in set(ROLES) - MAY[route.role]:
                check_refused(await site.ask(route, example, "nothing", bearer(site.tokens[role])), "forbidden")
                tried += 1
    assert tried > len(iiot.ROUTES)


async def test_a_device_s_address_without_an_upgrade_is_no_handshake(site: Site) -> None:
    (route,) = (route for route in iiot.ROUTES if route.path == "/device")
    for authorization in (None, bearer(site.plant.token), bearer(await site.plant.register("press"))):
        check_refused(await site.ask(route, Example(400), "", authorization), "bad_handshake")
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "1"}
    async with site.plant.client.get(site.plant.url + "/device", headers=headers) as response:
        check_refused(Answer(response.status, {"content-type": response.content_type}, await response.read()), "bad_handshake")


# ---- another tenant


def masked(body: bytes, name: str) -> bytes:
    """An answer without what is new in every one: the name that was asked for, and a new token."""
    return re.sub(rb"iiot_\w\w+_[0-9a-f]{16}_[\w-]{43}", b"TOKEN", body.replace(name.encode(), b"NAME"))


def nothing_like(subject: str) -> str:
    """A name or id that nobody has, as long as this one."""
    kind, dash, rest = subject.partition("-")
    _, slash, number = rest.partition("/")
    return f"{kind}-zzz{slash}{number}" if dash else iiot.mint("op").stored.id


@every_named_thing
async def test_what_another_tenant_owns_answers_as_what_does_not_exist(site: Site, route: iiot.Route) -> None:
    stranger = bearer(await site.tenant("neighbour"))
    registers = (route.method, route.path) == ("PUT", "/iiot/{device}")
    no_upgrade = route.path == "/iiot/{device}/tunnel/{port}"  # with one, see below
    expected = 403 if route.role == "platform" else 201 if registers else 426 if no_upgrade else 404
    for example in EXAMPLES[route.method, route.path]:
        subject = await site.furnish() if registers else await site.subject(route)
        before, of_platform = site.snapshot("default"), site.snapshot()["tenant"]
        nothing = nothing_like(subject) if not registers else site.fresh("press")
        known, unknown = [await site.ask(route, example, name, stranger) for name in (subject, nothing)]
        assert known.status == expected
        assert masked(known.body, subject) == masked(unknown.body, nothing)
        assert (known.status, known.headers) == (unknown.status, unknown.headers)
        assert (site.snapshot("default"), site.snapshot()["tenant"]) == (before, of_platform)


async def test_a_token_is_revoked_by_those_it_belongs_to_and_unknown_to_all_others(site: Site) -> None:
    theirs = await site.tenant("neighbour")
    of_default, of_platform, unknown = (await site.mint()).id, (await site.mint("platform")).id, iiot.mint("op").stored.id
    _, neighbour = await site.plant.ask("GET", "/whoami", token=theirs)
    own, platform = "/tokens", "/platform/tokens"
    for path, asker, foreign in (
        (own, site.plant.token, (of_platform, neighbour["id"])),
        (platform, site.tokens["platform"], (of_default, neighbour["id"])),
        (own, theirs, (of_platform, of_default)),
    ):
        (route,) = (route for route in iiot.ROUTES if (route.method, route.path) == ("DELETE", path + "/{id}"))
        nothing = await site.ask(route, DONE, unknown, bearer(asker))
        check_refused(nothing, "not_found")
        for token_id in foreign:
            assert await site.ask(route, DONE, token_id, bearer(asker)) == nothing
    assert (await site.plant.ask("GET", "/whoami", token=theirs))[0] == 200


@asynccontextmanager
async def listening(site: Site, token: str) -> AsyncIterator[StreamReader]:
    """The event stream from the first event on."""
    async with site.plant.client.get(site.plant.url + "/events?after=0", headers={"Authorization": bearer(token)}) as response:
        assert response.status == 200
        yield response.content


async def heard_until(stream: StreamReader, word: str) -> str:
    """What an event stream says up to an event with this word."""
    heard = ""
    async with asyncio.timeout(PATIENCE):
        while word not in heard:
            line = (await stream.readline()).decode()
            assert line, f"the stream ended without {word}: {heard}"
            heard += line
    return heard


def unbounded_lists() -> Iterator[tuple[iiot.Route, Example]]:
    for route in iiot.ROUTES:
        if route.method == "GET" and "{" not in route.path and route.role in ("any", "viewer", "operator", "admin"):
            yield from ((route, example) for example in EXAMPLES[route.method, route.path] if example.kind != "text/event-stream")


async def test_nothing_of_another_tenant_is_in_a_list(site: Site) -> None:
    device, key, token = await site.furnish(), await site.key(), await site.mint(name="the night shift")
    await site.alert(await site.rule(device))
    status, _ = await site.plant.ask("POST", "/silences", {"match": device, "until": "2099-01-01T00:00:00Z"})
    assert status == 201
    await site.webhook(device)
    await site.batch(device)
    theirs = await site.tenant("neighbour")
    assert (await site.plant.ask("PUT", "/iiot/pump-1", token=theirs))[0] == 201
    words = [device, key.id, token.id, "the night shift", '"default"']
    seen = set()
    for route, example in unbounded_lists():
        own = (await site.ask(route, example, "", bearer(site.plant.token))).body.decode()
        seen |= {word for word in words if word in own}
        if route.path not in ("/retention", "/syslog/refused", "/telemetry", "/notifications", "/iiot/summary"):
            assert any(word in own for word in words), f"{name_of(route)} shows nothing that could leak"
        text = (await site.ask(route, example, "", bearer(theirs))).body.decode()
        assert not [word for word in words if word in text], name_of(route)
    assert seen == set(words)
    for query in (f"match={device}", "match=*&connected=true"):
        assert await site.plant.ask("GET", f"/iiot?{query}", token=theirs) == (200, {"items": [], "next": None})
    for query in (f"device={device}", f"actor={token.id}", "actor=the%20night%20shift", "action=key.create"):
        assert await site.plant.ask("GET", f"/audit?{query}", token=theirs) == (200, {"items": [], "next": None})


async def test_nothing_of_another_tenant_is_in_the_event_stream(site: Site) -> None:
    device = await site.furnish()
    theirs = await site.tenant("neighbour")
    async with listening(site, theirs) as stream, listening(site, site.plant.token) as own_stream:
        assert device in await heard_until(own_stream, device)
        assert (await site.plant.ask("PUT", "/iiot/pump-1", token=theirs))[0] == 201
        heard = await heard_until(stream, "pump-1")
        later = await site.furnish()
        assert (await site.plant.ask("PUT", "/iiot/pump-2", token=theirs))[0] == 201
        heard += await heard_until(stream, "pump-2")
        own = await heard_until(own_stream, later)
    assert "press" not in heard
    assert "pump" not in own
    assert set(re.findall(r"event: (\w+)", heard)) == {"credentials"}


async def test_a_push_to_all_reaches_no_device_of_another_tenant(site: Site) -> None:
    name = await site.furnish()
    theirs = await site.tenant("neighbour")
    assert (await site.plant.ask("PUT", "/iiot/pump-1", token=theirs))[0] == 201
    before = site.snapshot("default")
    for match, reached in (("*", ["pump-1"]), (name, []), ("press-*", [])):
        status, body = await site.plant.ask("POST", "/iiot", {"match": match, "config": {"n": 666}}, token=theirs)
        assert (status, [item["device"] for item in body["items"]]) == (202, reached)
    assert site.snapshot("default") == before
    device = site.devices[name]
    await device.telemetry({"values": {"level": 2}}, seq=4)
    assert (await device.receive())["type"] == "ack", "no configuration came before it"


async def test_a_command_for_all_reaches_no_device_of_another_tenant(site: Site) -> None:
    name, theirs = await site.furnish(), await site.tenant("neighbour")
    assert (await site.plant.ask("PUT", "/iiot/pump-1", token=theirs))[0] == 201
    before = site.snapshot("default")
    for match, reached in (("*", ["pump-1"]), (name, []), ("press-*", [])):
        _, made = await site.plant.ask("POST", "/commands", {"match": match, "argv": ["reboot"], "ttl": "1h"}, token=theirs)
        assert made["devices"] == len(reached)
        async with asyncio.timeout(PATIENCE):
            while (given := (await site.plant.ask("GET", f"/commands/{made['id']}", token=theirs))[1])["not_begun"]:
                await asyncio.sleep(0.01)
        assert [(item["device"], item["status"]) for item in given["items"]] == [(device, "queued") for device in reached]
    assert site.snapshot("default") == before
    device = site.devices[name]
    await device.telemetry({"values": {"level": 2}}, seq=4)
    assert (await device.receive())["type"] == "ack", "no command came before it"


async def test_a_command_is_its_device_s_and_its_tenant_s_alone(site: Site) -> None:
    """Whatever others are called, and whoever knows its number."""
    name, other = await site.furnish(), await site.furnish()
    batch, command = await site.batch(name), await site.command(other)
    theirs = await site.tenant("neighbour")
    _, body = await site.plant.ask("PUT", f"/iiot/{name}", token=theirs)
    twin = await (await site.plant.connect()).hello(body["token"])
    before = site.snapshot("default")
    for method, path in (
        *((method, f"/iiot/{name}/commands/{number}{more}") for number in range(1, int(command) + 1)
          for method, more in (("GET", ""), ("GET", "/output"), ("GET", "/output?follow=1"), ("DELETE", ""))),
        ("GET", f"/commands/{batch}"), ("DELETE", f"/commands/{batch}"),
    ):  # fmt: skip
        status, answer = await site.plant.ask(method, path, token=theirs)
        assert (status, answer["error"]["code"]) == (404, "not_found"), path
    for path in (f"/iiot/{name}/commands", "/commands"):
        assert await site.plant.ask("GET", path, token=theirs) == (200, {"items": [], "next": None})
    for method, more in (("GET", ""), ("GET", "/output"), ("DELETE", "")):
        assert (await site.plant.ask(method, f"/iiot/{name}/commands/{command}{more}"))[0] == 404, "it is another device's"
    for seq, kind, fields in (
        (1, "started", {}), (2, "output", {"stream": "stdout", "data": "x"}), (3, "result", {"status": "done", "exit_code": 0}),
    ):  # fmt: skip
        await twin.send(kind, seq=seq, command=int(command), **fields)
        assert (await twin.expect("error"))["code"] == "unknown_command"
    assert site.snapshot("default") == before


async def test_a_tunnel_is_opened_by_admins_of_the_device_s_tenant_alone(site: Site) -> None:
    """To all others its device is one that does not exist, and to those without the role nothing is said at all."""
    name, theirs = await site.furnish(), await site.tenant("neighbour")
    tunnel = await site.plant.tunnel(name, site.devices[name])
    assert (await site.plant.ask("PUT", "/iiot/pump-1", token=theirs))[0] == 201
    before = site.snapshot()

    async def refused(token: str | None, device: str) -> tuple[int, Any]:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "A" * 22 + "=="}
        headers |= {} if token is None else {"Authorization": bearer(token)}
        async with site.plant.client.get(f"{site.plant.url}/iiot/{device}/tunnel/22", headers=headers) as response:
            return response.status, (await response.json())["error"]["code"]

    for who, answer in {
        None: (401, "unauthorized"), site.tokens["viewer"]: (403, "forbidden"), site.tokens["operator"]: (403, "forbidden"),
        site.tokens["platform"]: (403, "forbidden"), site.plant.tokens[name]: (401, "unauthorized"), theirs: (404, "not_found"),
    }.items():  # fmt: skip
        assert await refused(who, name) == await refused(who, "nobody") == answer
    assert await refused(theirs, "pump-1") == (409, "device_offline")
    listed = [await site.plant.ask("GET", f"/iiot/{device}/tunnels", token=theirs) for device in (name, "nobody")]
    assert listed[0] == listed[1]
    for path in (f"/iiot/{name}/tunnels/{tunnel}", f"/iiot/pump-1/tunnels/{tunnel}"):
        assert (await site.plant.ask("DELETE", path, token=theirs))[0] == 404
    assert site.snapshot() == before
    assert [str(item["id"]) for item in (await site.plant.get(f"/iiot/{name}/tunnels"))["items"]] == [tunnel]
    device = site.devices[name]
    await device.telemetry({"values": {"level": 2}}, seq=4)
    assert (await device.receive())["type"] == "ack", "it was asked for no other tunnel"


async def test_a_device_writes_only_to_its_own_whatever_another_tenant_s_is_called(site: Site) -> None:
    name = await site.furnish()
    theirs = await site.tenant("neighbour")
    status, body = await site.plant.ask("PUT", f"/iiot/{name}", token=theirs)
    assert status == 201
    before = site.snapshot("default")
    twin = await (await site.plant.connect()).hello(body["token"], agent="twin/1")
    assert (twin.welcome["device"], twin.welcome["tenant"], twin.seq) == (name, "neighbour", 0)
    assert (await site.plant.ask("POST", f"/iiot/{name}", {"n": 5}, token=theirs))[0] == 202
    assert (await twin.expect("config"))["document"] == {"n": 5}
    await twin.telemetry({"values": {"level": 99}}, seq=1)
    await twin.send("state", seq=2, reported={"hostname": "twin"}, mode="replace")
    await twin.send("config_status", seq=3, version=1, status="rejected")
    await twin.acknowledged(3)
    assert site.snapshot("default") == before
    _, shown = await site.plant.ask("GET", f"/iiot/{name}", token=theirs)
    assert (shown["latest"]["level"]["value"], shown["reported"], shown["agent"]) == (99, {"hostname": "twin"}, "twin/1")
    _, config = await site.plant.ask("GET", f"/iiot/{name}/config", token=theirs)
    assert (config["version"], config["status"]) == (1, "rejected")
    assert (await site.plant.ask("DELETE", f"/iiot/{name}", token=theirs))[0] == 204
    assert (await twin.closed()).code == 4403
    assert site.snapshot("default") == before
    await site.devices[name].store()


# ---- the WebSocket


def check_closed(closed: plants.Closed, code: str) -> None:
    fault = iiot.FAULTS[code]
    assert (closed.code, closed.reason) == (fault.close, fault.message)


@pytest.mark.parametrize("credential", ["missing", "malformed", "operator's", "key", "secret", "removed", "revoked", "replaced"])
async def test_a_device_is_refused_that_does_not_prove_who_it_is(site: Site, credential: str) -> None:
    plant = site.plant
    other, removed, revoked, replaced = [await plant.register(f"pump-{number}") for number in range(4)]
    assert (await plant.ask("DELETE", "/iiot/pump-1"))[0] == 204
    assert (await plant.ask("POST", "/iiot/pump-2/token", {"revoke": True}))[0] == 201
    _, new = await plant.ask("POST", "/iiot/pump-3/token", {})
    await (await (await plant.connect()).hello(new["token"])).close()
    await plant.until("/iiot/pump-3", lambda shown: not shown["connected"])
    tokens = {
        "missing": "", "malformed": "let me in", "operator's": plant.token, "key": (await site.key()).text,
        "secret": other[:-43] + removed[-43:], "removed": removed, "revoked": revoked, "replaced": replaced,
    }  # fmt: skip
    before = site.snapshot()
    device = await plant.connect()
    await device.send("hello", token=tokens[credential])
    assert (await device.receive())["code"] == "unauthorized"
    check_closed(await device.closed(), "unauthorized")
    assert site.snapshot() == before


@pytest.mark.parametrize("credential", ["missing", "malformed", "operator's", "device's", "secret", "expired", "used up", "removed"])
async def test_no_device_is_provisioned_without_a_valid_key(site: Site, credential: str) -> None:
    plant = site.plant
    key, removed = await site.key(), await site.key()
    _, expired = await plant.ask("POST", "/provisioning-keys", {})
    plants.expire(plant.database, "provisioning_key", expired["id"])
    _, used_up = await plant.ask("POST", "/provisioning-keys", {"uses": 1})
    first = await plant.connect()
    await first.send("provision", key=used_up["key"], device="pump-1")
    await first.expect("credentials")
    assert (await plant.ask("DELETE", f"/provisioning-keys/{removed.id}"))[0] == 204
    keys = {
        "missing": "", "malformed": "let me in", "operator's": plant.token, "device's": await plant.register("pump-2"),
        "secret": key.text[:-43] + removed.text[-43:], "expired": expired["key"], "used up": used_up["key"], "removed": removed.text,
    }  # fmt: skip
    before = site.snapshot()
    device = await plant.connect()
    await device.send("provision", key=keys[credential], device="pump-3")
    assert (await device.receive())["code"] == "unauthorized"
    check_closed(await device.closed(), "unauthorized")
    assert site.snapshot() == before


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ({"type": "telemetry", "seq": 1, "samples": [{"values": {"level": 1}}]}, "bad_handshake"),
        ({"type": "state", "seq": 1, "reported": {}}, "bad_handshake"),
        ({"type": "welcome"}, "bad_handshake"),
        ({"type": "hello"}, "invalid"),
        ({"type": "hello", "token": 7}, "invalid"),
    ],
)
async def test_a_device_that_does_not_say_hello_is_not_heard(site: Site, frame: dict[str, Any], code: str) -> None:
    await site.furnish()
    before = site.snapshot()
    device = await site.plant.connect()
    await device.send(**{"kind": frame["type"], **{name: value for name, value in frame.items() if name != "type"}})
    assert (await device.receive())["code"] == code
    check_closed(await device.closed(), code)
    assert site.snapshot() == before


async def test_a_device_s_revoked_token_ends_its_session_at_once(site: Site) -> None:
    name = await site.furnish()
    status, body = await site.plant.ask("POST", f"/iiot/{name}/token", {"revoke": True})
    assert status == 201
    check_closed(await site.devices[name].closed(), "credentials_revoked")
    device = await (await site.plant.connect()).hello(body["token"])
    assert (device.welcome["device"], device.seq) == (name, 4)


# ---- what is under way when a token ends


@attrs.frozen
class Link:
    """An HTTP request by hand, over a socket whose buffer holds little: what is not read stays with the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """All that comes until the server ends the connection."""
        got = bytearray()
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionError):
                while piece := await self.reader.read(65_536):
                    got += piece
        return bytes(got)


@asynccontextmanager
async def link(plant: Plant, method: str, path: str, token: str, *headers: str, body: bytes = b"") -> AsyncIterator[Link]:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    host, _, port = plant.url.removeprefix("http://").partition(":")
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    try:
        lines = [f"{method} {path} HTTP/1.1", "Host: plant", f"Authorization: Bearer {token}", *headers]
        if body and not headers:
            lines.append(f"Content-Length: {len(body)}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        yield Link(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def fill(database: Path) -> None:
    """More events, readings and entries of the audit than all buffers hold between a server and a client that does not read."""
    text = "x" * 1_000

    def add(connection: sqlite3.Connection) -> None:
        tenant = iiot.tenant_id_of(connection, "default")
        iiot.insert_device(connection, tenant, "full", iiot.mint("dev").stored, {})
        rows = "with recursive n (i) as (values (1) union all select i + 1 from n where i < 16000)"
        connection.execute(f"insert into event (tenant_id, device_id, at, kind, detail) {rows} select {tenant}, 1, i, 'state', ? from n",
                           (json.dumps({"note": text}),))  # fmt: skip
        connection.execute("insert into series (id, device_id, metric) values (1, 1, 'note')")
        connection.execute(f"insert into telemetry (series_id, ts, value) {rows} select 1, i, ? from n", (text,))
        actor = iiot.Actor(tenant, None, "test", "test")
        iiot.add_entries(connection, actor, "device.update", "ok", [iiot.Affected("full", "full", {"note": text})] * 16_000)
        iiot.insert_command(connection, actor, "full", iiot.WantedCommand('["true"]', 1_000, 86_400_000, parallel=False), 1)

    iiot.prepare_database(database)
    iiot.change_database(database, add)


@pytest.fixture(scope="module")
def full_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("full") / "iiot.db"
    fill(database)
    return database


@pytest.fixture
async def full_site(tmp_path: Path, full_database: Path) -> AsyncIterator[Site]:
    shutil.copyfile(full_database, tmp_path / "iiot.db")
    async with opened(tmp_path) as running:
        yield running


STREAMS = {
    "events": "/events?after=0",
    "events of none": "/events",
    "csv": "/iiot/full/telemetry?format=csv",
    "audit": "/audit?format=ndjson",
    "output": "/iiot/full/commands/1/output?follow=1",
}
OPEN_FILES = Path("/dev/fd")
FINAL_CHUNK = b"0\r\n\r\n"


async def check_stream_broke_off(stream: Link) -> None:
    rest = await stream.rest()
    assert len(rest) < 16_000_000
    assert not rest.endswith(FINAL_CHUNK)


@pytest.mark.parametrize("stream", STREAMS)
async def test_a_revoked_token_ends_the_stream_that_is_open(full_site: Site, stream: str) -> None:
    token = await full_site.mint("admin")
    async with link(full_site.plant, "GET", STREAMS[stream], token.text) as open_stream:
        assert (await open_stream.head()).startswith(b"HTTP/1.1 200 ")
        await full_site.revoke(token)
        await check_stream_broke_off(open_stream)
    assert (await full_site.plant.ask("GET", "/whoami", token=token.text))[0] == 401


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="counts the open files of this process")
@pytest.mark.parametrize(
    "stream",
    ["events", "csv", "audit"],
)
async def test_a_stream_that_nobody_reads_ends_with_its_token_too(full_site: Site, stream: str) -> None:
    token, plant = await full_site.mint("admin"), full_site.plant
    async with link(plant, "GET", STREAMS[stream], token.text) as unread:
        await unread.head()
        await full_site.until_used(token, "admin")
        for _ in range(100):  # meanwhile the server sends until nothing more goes out
            await plant.get("/whoami")
        files = len(list(OPEN_FILES.iterdir()))
        await full_site.revoke(token)
        for _ in range(20):  # the server does much else meanwhile
            await plant.get("/whoami")
        assert len(list(OPEN_FILES.iterdir())) < files, "the server holds the connection open"


async def test_a_revoked_token_ends_no_stream_of_another(site: Site) -> None:
    token = await site.mint()
    async with listening(site, site.tokens["viewer"]) as others, listening(site, token.text) as own:
        await site.revoke(token)
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ClientPayloadError):
                await own.read()
        await site.plant.register("late")
        await heard_until(others, "late")


async def test_a_revoked_token_ends_the_wait_for_a_verdict(site: Site) -> None:
    name, token = await site.furnish(), await site.mint("operator")
    waiting = asyncio.create_task(site.plant.ask("POST", f"/iiot/{name}?wait=60", {"n": 2}, token=token.text))
    await site.devices[name].expect("config")
    await site.revoke(token)
    fault = iiot.FAULTS["unauthorized"]
    assert await waiting == (401, {"error": {"code": fault.code, "message": fault.message}})
    config = await site.plant.get(f"/iiot/{name}/config")
    assert (config["version"], config["document"]) == (2, {"n": 2}), "what was done before stays done"


async def test_a_revoked_token_ends_the_wait_for_a_command_and_not_the_command(site: Site) -> None:
    name, token = await site.furnish(), await site.mint("admin")
    path, device = f"/iiot/{name}/commands", site.devices[name]
    waiting = asyncio.create_task(site.plant.ask("POST", f"{path}?wait=60", {"argv": ["true"]}, token=token.text))
    command = (await device.expect("command"))["command"]
    await site.revoke(token)
    assert (await waiting)[0] == 401
    await device.send("result", seq=5, command=command, status="done", exit_code=0)
    await device.acknowledged(5)
    assert (await site.plant.get(f"{path}/{command}"))["status"] == "done"


async def test_a_revoked_token_ends_its_tunnels_and_no_others(site: Site) -> None:
    name, token = await site.furnish(), await site.mint("admin")
    device, path = site.devices[name], f"/iiot/{name}/tunnels"
    stays, ends = await site.plant.tunnel(name, device), await site.plant.tunnel(name, device, token.text)
    await site.revoke(token)
    assert (await device.expect("tunnel"))["state"] == "closed"
    await site.entered(ends)
    assert [str(item["id"]) for item in (await site.plant.get(path))["items"]] == [stays]


async def test_what_is_under_way_ends_when_its_token_expires(full_site: Site) -> None:
    plant = full_site.plant
    name = await full_site.furnish()
    token = await full_site.mint("admin", expires_at=iiot.now_ms() + 4_000)
    async with (
        link(plant, "GET", STREAMS["events"], token.text) as events,
        link(plant, "GET", STREAMS["events of none"], token.text) as none,
        link(plant, "GET", STREAMS["csv"], token.text) as csv,
        link(plant, "GET", STREAMS["audit"], token.text) as audit,
        link(plant, "GET", STREAMS["output"], token.text) as output,
        link(plant, "POST", f"/iiot/{name}?wait=60", token.text, body=b'{"n": 2}') as push,
    ):
        streams = (events, none, csv, audit, output)
        for stream in streams:
            assert (await stream.head()).startswith(b"HTTP/1.1 200 ")
        await full_site.devices[name].expect("config")
        assert (await push.head()).startswith(b"HTTP/1.1 401 ")
        for stream in streams:
            await check_stream_broke_off(stream)
    assert (await plant.ask("GET", "/whoami", token=token.text))[0] == 401


def with_a_body() -> Iterator[Any]:
    for route in iiot.ROUTES:
        for number, example in enumerate(EXAMPLES.get((route.method, route.path), ())):
            if route.action and (example.body is not None or route.method == "PUT"):
                yield pytest.param(route, example, id=f"{name_of(route)} {number}")


@pytest.mark.parametrize(("route", "example"), list(with_a_body()))
async def test_a_token_revoked_before_the_body_is_there_changes_nothing(site: Site, route: iiot.Route, example: Example) -> None:
    subject, token = await site.subject(route), await site.mint(route.role)
    body = json.dumps({} if example.body is None else example.body).encode()
    path = path_of(route, example, subject)
    before = site.snapshot()
    async with link(site.plant, route.method, path, token.text, f"Content-Length: {len(body)}", "Expect: 100-continue") as slow:
        assert (await slow.head()).startswith(b"HTTP/1.1 100 ")
        slow.writer.write(body[:1])
        await site.until_used(token, route.role)  # by now the server waits for the rest
        await site.revoke(token, route.role)
        assert (await slow.head()).startswith(b"HTTP/1.1 401 ")
        slow.writer.write(body[1:])
        slow.writer.write_eof()
        assert json.loads(await slow.rest())["error"]["code"] == "unauthorized"
    after = site.snapshot()
    assert [row for row in before["operator_token"] if row not in after["operator_token"]] == [
        row for row in before["operator_token"] if f"'{token.id}'" in row
    ]
    del before["operator_token"], after["operator_token"]
    assert after == before


@pytest.fixture
async def complaints() -> AsyncIterator[list[dict[str, Any]]]:
    """What would be logged of tasks and futures that nobody looked after."""
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    yield heard
    gc.collect()


@pytest.mark.usefixtures("complaints")
async def test_a_change_that_waits_behind_the_revocation_of_its_token_is_not_made(site: Site) -> None:
    plant, token = site.plant, await site.mint("admin")
    changes = [
        (route, example, await site.subject(route))
        for route in iiot.ROUTES if route.action and route.method != "GET" and "admin" in MAY[route.role]
        for example in EXAMPLES[route.method, route.path]
    ]  # fmt: skip
    assert len({route.action for route, _, _ in changes}) > 8
    assert (await plant.ask("GET", "/whoami", token=token.text))[0] == 200
    before = site.snapshot()
    with locked(plant.database):
        revoking = asyncio.create_task(site.revoke(token))
        for _ in range(5):  # by then the revocation waits for the lock
            await plant.get("/whoami")
        asked = [asyncio.create_task(site.ask(route, example, subject, bearer(token.text))) for route, example, subject in changes]
        for _ in range(20):  # and these behind it, for their token is still good
            assert (await plant.ask("GET", "/whoami", token=token.text))[0] == 200
        assert not revoking.done()
        assert not any(task.done() for task in asked)
    await revoking
    for answer in await asyncio.gather(*asked):
        check_refused(answer, "unauthorized")
    assert (await plant.ask("DELETE", "/tokens/none"))[0] == 404  # whatever waited is done
    after = site.snapshot()
    assert len(after["operator_token"]) == len(before["operator_token"]) - 1
    del before["operator_token"], after["operator_token"]
    assert after == before
    for device in site.devices.values():
        await device.telemetry({"values": {"level": 2}}, seq=4)
        assert (await device.receive())["type"] == "ack", "it was asked for nothing"


async def test_a_change_refused_when_its_asker_has_gone_is_no_fault_in_the_log(site: Site, complaints: list[dict[str, Any]]) -> None:
    plant, token = site.plant, await site.mint("admin")
    with locked(plant.database):
        revoking = asyncio.create_task(site.revoke(token))
        for _ in range(5):
            await plant.get("/whoami")
        asked = asyncio.create_task(plant.ask("PUT", "/iiot/press", token=token.text))
        for _ in range(20):
            await plant.get("/whoami")
    await revoking
    assert (await asked)[0] == 401
    await plant.register("last")
    gc.collect()
    assert complaints == []


async def test_a_token_may_revoke_itself_and_is_told_so(site: Site) -> None:
    token = await site.mint("admin")
    async with listening(site, token.text) as own:
        assert await site.plant.ask("DELETE", f"/tokens/{token.id}", token=token.text) == (204, "")
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ClientPayloadError):
                await own.read()
    assert (await site.plant.ask("GET", "/whoami", token=token.text))[0] == 401
    assert (await site.plant.ask("DELETE", f"/tokens/{token.id}"))[0] == 404


async def test_a_revocation_in_the_moment_of_the_look_up_is_not_undone_by_the_expiry() -> None:
    registry, looked_up = iiot.Registry(LIMITS, iiot.Allowances(LIMITS)), asyncio.get_running_loop().create_future()

    def revoke_after_look_up() -> None:
        looked_up.set_result(None)
        registry.end_requests("a token")

    async def request() -> None:
        async with registry.request("a token") as running:
            asyncio.get_running_loop().call_soon(revoke_after_look_up)
            await looked_up
            registry.stands(running, 1, 3_600.0)
            for _ in range(20):
                await asyncio.sleep(0)

    with pytest.raises(iiot.Refusal):
        await request()


# ---- tokens


async def test_a_token_is_named_and_shows_when_it_was_used(site: Site) -> None:
    expiry = "2100-01-01T00:00:00.000Z"
    token = await site.mint("operator", name="shift leader", expires_at=expiry)
    (shown,) = (item for item in (await site.plant.get("/tokens"))["items"] if item["id"] == token.id)
    assert set(shown) == {"id", "name", "role", "created_at", "expires_at", "used_at"}
    assert (shown["name"], shown["role"], shown["expires_at"], shown["used_at"]) == ("shift leader", "operator", expiry, None)
    status, who = await site.plant.ask("GET", "/whoami", token=token.text)
    assert (status, who["id"], who["name"], who["role"], who["tenant"], who["expires_at"]) == (
        200, token.id, "shift leader", "operator", "default", expiry,
    )  # fmt: skip
    await site.until_used(token, "operator")
    used_at = iiot.parse_rfc3339(await site.used_at(token, "operator") or "")
    created_at = iiot.parse_rfc3339(shown["created_at"])
    assert used_at is not None
    assert created_at is not None
    assert created_at <= used_at <= iiot.now_ms()


async def test_a_refused_token_was_not_used(site: Site) -> None:
    token = await site.mint()
    wrong = f"iiot_op_{token.id}_{iiot.mint('op').text[-43:]}"
    assert (await site.plant.ask("GET", "/whoami", token=wrong))[0] == 401
    await site.plant.register("press")  # a commit later
    assert await site.used_at(token, "viewer") is None


@pytest.mark.parametrize("role", ROLES)
async def test_a_token_is_minted_by_admins_of_its_own_tenant_and_by_the_platform_for_itself(site: Site, role: str) -> None:
    before = site.snapshot()["operator_token"]
    refused = 0
    for path, may in (("/tokens", "admin"), ("/platform/tokens", "platform")):
        for minted in ROLES:
            status, body = await site.plant.ask("POST", path, {"name": "n", "role": minted}, token=site.tokens[role])
            if role == may and (minted == "platform") == (may == "platform"):
                assert (status, body["role"]) == (201, minted)
                _, who = await site.plant.ask("GET", "/whoami", token=body["token"])
                assert (who["role"], who["tenant"]) == (minted, None if minted == "platform" else "default")
            else:
                assert (status, body["error"]["code"]) == (403, "forbidden")
                refused += 1
    assert len(site.snapshot()["operator_token"]) == len(before) + 8 - refused


@pytest.mark.parametrize(("role", "path"), [("admin", "/tokens"), ("platform", "/platform/tokens")])
async def test_the_last_token_that_manages_tokens_cannot_be_revoked(site: Site, role: str, path: str) -> None:
    plant, token = site.plant, site.tokens[role]
    _, who = await plant.ask("GET", "/whoami", token=token)
    last = f"{path}/{who['id']}"
    fault = iiot.FAULTS["last_token"]
    refused = (409, {"error": {"code": fault.code, "message": fault.message}})
    assert await plant.ask("DELETE", last, token=token) == refused, "viewers, operators, and others' admins do not count"
    plants.expire(plant.database, "operator_token", (await site.mint(role)).id)
    assert await plant.ask("DELETE", last, token=token) == refused, "one that has expired does not count"
    assert (await plant.ask("GET", "/whoami", token=token))[0] == 200
    second = await site.mint(role)
    assert await plant.ask("DELETE", last, token=token) == (204, "")
    assert (await plant.ask("GET", "/whoami", token=token))[0] == 401
    assert await plant.ask("DELETE", f"{path}/{second.id}", token=second.text) == refused


async def test_an_admin_that_expires_later_counts_until_then(site: Site) -> None:
    _, who = await site.plant.ask("GET", "/whoami")
    other = await site.mint("admin", expires_at=iiot.now_ms() + 1_000)
    async with asyncio.timeout(PATIENCE):
        while (await site.plant.ask("GET", "/whoami", token=other.text))[0] == 200:
            await asyncio.sleep(0.05)
    assert (await site.plant.ask("DELETE", f"/tokens/{who['id']}"))[0] == 409
    assert (await site.plant.ask("DELETE", f"/tokens/{other.id}"))[0] == 204, "what has expired can be cleared away"
