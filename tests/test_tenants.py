"""Tenants: made, listed and removed by the platform or from the command line; their quotas; and what is left of a removed one: nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientError, ClientResponse, ClientSession, ClientWebSocketResponse, WSMsgType
from plant import PATIENCE, Closed, Device, Plant, Process

import iiot

OWN_DEFAULTS = {"devices": 15_000, "connections": 15_000, "points_per_day": 5_000_000_000, "log_bytes_per_day": 10_000_000_000}
SLOWLY = attrs.evolve(iiot.Limits(), resume_seconds=0.0, removed_rows=1, removed_devices=1)
BEING_REMOVED = """select 1 from tenant where name is null union select 1 from device where name is null and emptied = 0
    union select 1 from removed_series union select 1 from removed_range"""
MOMENT = 1_767_225_600_000  # 2026-01-01T00:00:00Z


@attrs.frozen
class Site:
    """A server as the platform sees it: `plant` is its first tenant."""

    plant: Plant
    platform: str

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return await self.plant.ask(method, path, body, token=self.platform)

    async def add(self, name: str = "acme", **quotas: int) -> Plant:
        """A new tenant, as its own admin sees the server."""
        status, body = await self.ask("POST", "/tenants", {"name": name, "quotas": quotas})
        assert status == 201, body
        return Plant(self.plant.url, self.plant.client, body["token"], self.plant.database)

    async def allow(self, name: str, **quotas: int | None) -> Any:
        """Change a tenant's quotas."""
        status, body = await self.ask("PATCH", f"/tenants/{name}", {"quotas": quotas})
        assert status == 200, body
        return body

    async def remove(self, name: str = "acme") -> None:
        status, body = await self.ask("DELETE", f"/tenants/{name}?confirm={name}")
        assert status == 204, body

    async def quotas(self) -> dict[str, dict[str, dict[str, int]]]:
        """Of every tenant, by name."""
        status, body = await self.ask("GET", "/tenants?limit=1000")
        assert status == 200, body
        return {item["name"]: item["quotas"] for item in body["items"]}

    async def removed(self) -> None:
        """Wait until nothing is left to be deleted."""
        async with asyncio.timeout(PATIENCE):
            while query(self.plant.database, BEING_REMOVED):
                await asyncio.sleep(0.01)


def site_of(plant: Plant) -> Site:
    return Site(plant, plants.admin_token(plant.database, "platform"))


@pytest.fixture
def site(plant: Plant) -> Site:
    return site_of(plant)


@asynccontextmanager
async def opened(folder: Path, limits: iiot.Limits | None = None, **settings: Any) -> AsyncIterator[Site]:
    async with plants.plant(folder, limits, **settings) as plant:
        yield site_of(plant)


def query(database: Path, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql, parameters).fetchall()


def tables(database: Path) -> dict[str, list[Any]]:
    """Every row of every table, but for what is the platform's own, the numbers that were given out, and in which hours."""
    found = {}
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        for name in sorted(plants.tables(connection) - {"salt", "hour"}):
            rows = [dict(row) for row in connection.execute(f"select * from {name}")]
            found[name] = sorted(repr(row) for row in rows if row.get("tenant_id", 1) is not None)
    return found


def orphans(database: Path) -> int:
    """Readings of a series that is not there."""
    return len(query(database, "select 1 from telemetry where series_id not in (select id from series)"))


async def populate(tenant: Plant, connected: int = 1) -> list[Device]:
    """Something of everything that a tenant can have; the devices whose sessions are still open."""
    devices = []
    for name in ("press-1", "press-2", "press-3"):
        device = await tenant.device(name, agent="plc/1")
        await device.store(*({"values": {"level": n, "mode": "auto", "flow": n / 7}} for n in range(40)))
        for number in range(3):
            device.seq += 1
            await device.send("state", seq=device.seq, reported={"n": number})
        assert (await tenant.ask("POST", f"/iiot/{name}", {"speed": 3}))[0] == 202
        device.seq += 1
        await device.send("config_status", seq=device.seq, version=(await device.expect("config"))["version"], status="applied")
        device.seq += 1
        await device.send("log", seq=device.seq, entries=[{"level": "info", "message": f"line{number} of {name}"} for number in range(9)])
        await device.acknowledged(device.seq)
        devices.append(device)
    assert (await tenant.ask("POST", "/iiot/press-1/log-token"))[0] == 201
    ((number,),) = plants.rows(tenant.database, "select count(*) + 1 from syslog_source")
    assert (await tenant.ask("PUT", "/iiot/press-1/syslog-source", {"addresses": [f"10.0.0.{number}"]}))[0] == 200
    assert (await tenant.ask("PUT", "/retention", {"logs": {"days": 7}}))[0] == 200
    assert (await tenant.ask("PATCH", "/iiot/press-1", {"labels": {"line": "3"}}))[0] == 200
    assert (await tenant.ask("POST", "/iiot/press-1/token"))[0] == 201
    assert (await tenant.ask("POST", "/tokens", {"name": "night shift", "role": "viewer"}))[0] == 201
    newcomer = await provision(tenant, (await new_key(tenant))["key"], "press-4")
    assert newcomer["type"] == "credentials"
    assert (await tenant.ask("PUT", "/iiot/press-1"))[0] == 409  # a refusal, for the audit
    rule = {"name": "high", "metric": "level", "condition": {"above": 38}}
    assert (await tenant.ask("POST", "/rules", rule))[0] == 201
    await tenant.until("/alerts", lambda body: len(body["items"]) == len(devices))
    await be_told(tenant)
    assert (await tenant.ask("POST", "/silences", {"match": "*", "until": "2099-01-01T00:00:00Z"}))[0] == 201
    await run_commands(tenant, devices)
    if connected:
        await tenant.tunnel("press-1", devices[0])
    for device in devices[connected:]:
        await device.close()
    await tenant.until("/iiot?connected=true", lambda body: len(body["items"]) == connected)
    return devices[:connected]


async def run_commands(tenant: Plant, devices: list[Device]) -> None:
    """One for many that each has run, and one that the first still runs."""

    async def tell(device: Device, *frames: dict[str, Any]) -> None:
        number = (await device.expect("command"))["command"]
        for frame in frames:
            device.seq += 1
            await device.send(seq=device.seq, command=number, **frame)
        await device.acknowledged(device.seq)

    output = {"kind": "output", "stream": "stdout", "data": "text"}
    status, body = await tenant.ask("POST", "/commands", {"argv": ["uname"], "match": "press-[123]"})
    assert status == 202, body
    for device in devices:
        await tell(device, output, {"kind": "result", "status": "done", "exit_code": 0})
    await tenant.until(f"/commands/{body['id']}", lambda shown: shown["status"] == "done")
    assert (await tenant.ask("POST", "/iiot/press-1/commands", {"argv": ["tail"], "timeout": "1h"}))[0] == 202
    await tell(devices[0], {"kind": "started"}, output)


async def be_told(tenant: Plant) -> None:
    """A receiver that waits with what it is to be told, and was told something before."""
    status, body = await tenant.ask("POST", "/webhooks", {"url": "https://example.com/", "wait": "30d"})
    assert status == 201, body
    async with asyncio.timeout(PATIENCE):
        while not query(tenant.database, "select 1 from notice where webhook_id = ?", body["id"]):
            await asyncio.sleep(0.01)
    with plants.writing(tenant.database) as connection:
        connection.execute(
            """insert into notification (tenant_id, webhook_id, message_id, at, alerts, headers, status)
               select tenant_id, id, 'msg_1', ?, 1, '{}', 'delivered' from webhook where id = ?""",
            (iiot.now_ms(), body["id"]),
        )


async def new_key(tenant: Plant, **chosen: Any) -> Any:
    status, body = await tenant.ask("POST", "/provisioning-keys", chosen)
    assert status == 201, body
    return body


async def provision(plant: Plant, key: str, name: str) -> dict[str, Any]:
    """The server's answer to a device that shows a provisioning key."""
    device = await plant.connect()
    await device.send("provision", key=key, device=name)
    answer = await device.receive()
    await device.close()
    return answer


async def turned_away(plant: Plant, token: str) -> tuple[str, int | None]:
    """The error and the close code of a hello that is refused."""
    device = await plant.connect()
    await device.send("hello", token=token)
    error = (await device.expect("error"))["code"]
    return str(error), (await device.closed()).code


async def flood(device: Device, sample: Callable[[int], dict[str, Any]]) -> Closed:
    """Send without a break until the server closes; how it did."""
    closing_frame = asyncio.create_task(device.closed())
    number = 0
    async with asyncio.timeout(PATIENCE):
        with suppress(ConnectionError):
            while not closing_frame.done():
                number += 1
                await device.telemetry(sample(number))
                if number % 50 == 0:
                    await asyncio.sleep(0)
    return await closing_frame


def ever_new(number: int) -> dict[str, Any]:
    """Samples that name a new metric again and again, up to what a device may have."""
    return {"values": {"level": number, f"metric-{number // 20 % 1_900}": number}}


def always_the_same(number: int) -> dict[str, Any]:
    return {"ts": MOMENT, "values": {"level": number}}


async def is_ended(response: ClientResponse) -> None:
    """Read a stream to its end."""
    async with asyncio.timeout(PATIENCE):
        with suppress(ClientError):
            while await response.content.readany():
                pass


# ---- made, listed, changed and removed over HTTP


async def test_a_new_tenants_first_token_is_an_admins_in_that_tenant_alone(site: Site) -> None:
    await site.plant.register("press-1")
    status, made = await site.ask("POST", "/tenants", {"name": "acme"})
    assert status == 201
    assert made.keys() == {"name", "token"}
    assert made["name"] == "acme"
    acme = Plant(site.plant.url, site.plant.client, made["token"], site.plant.database)
    who = await acme.get("/whoami")
    assert (who["tenant"], who["role"], who["expires_at"]) == ("acme", "admin", None)
    assert (await acme.get("/iiot"))["items"] == []
    assert (await acme.ask("GET", "/iiot/press-1"))[0] == 404
    await acme.register("press-1")
    device = await acme.device("press-1")
    assert device.welcome["tenant"] == "acme"
    for method, path in (("GET", "/tenants"), ("POST", "/tenants"), ("PATCH", "/tenants/acme"), ("DELETE", "/tenants/acme?confirm=acme")):
        status, body = await acme.ask(method, path, None if method == "GET" else {})
        assert (status, body["error"]["code"]) == (403, "forbidden")
    assert [item["role"] for item in (await acme.get("/tokens"))["items"]] == ["admin"]
    assert made["token"][-43:] not in json.dumps(await acme.get("/tokens"))


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "x" * 65, "a\n", None, 7, ["acme"]])
async def test_a_tenants_name_keeps_to_the_rules_of_names(site: Site, name: object) -> None:
    status, body = await site.ask("POST", "/tenants", {"name": name})
    assert (status, body["error"]["code"]) == (422, "invalid")
    assert [detail["path"] for detail in body["error"]["details"]] == ["name"]
    assert list(await site.quotas()) == ["default"]


@pytest.mark.parametrize("name", ["a", "x" * 64, "Acme.North_2:east-1", "00:1b:44:11:3a:b7"])
async def test_a_tenant_may_have_every_name_that_a_device_may(site: Site, name: str) -> None:
    tenant = await site.add(name)
    assert (await tenant.get("/whoami"))["tenant"] == name
    await site.allow(name, devices=1)
    await site.remove(name)
    assert list(await site.quotas()) == ["default"]


@pytest.mark.parametrize("body", [{}, {"quotas": {}}, {"name": "acme", "colour": "red"}, [], "acme"])
async def test_a_tenant_is_not_made_of_a_body_that_is_none(site: Site, body: Any) -> None:
    assert (await site.ask("POST", "/tenants", body))[0] in (400, 422)
    assert list(await site.quotas()) == ["default"]


async def test_a_name_is_given_once(site: Site) -> None:
    acme = await site.add("acme", devices=3)
    for name in ("acme", "default"):
        status, body = await site.ask("POST", "/tenants", {"name": name, "quotas": {"devices": 9}})
        assert (status, body["error"]["code"]) == (409, "tenant_exists")
    assert (await acme.get("/whoami"))["quotas"]["devices"]["limit"] == 3
    assert len((await acme.get("/tokens"))["items"]) == 1
    await site.add("Acme")  # another name
    assert set(await site.quotas()) == {"default", "acme", "Acme"}


WRONG_QUOTAS: list[tuple[object, str]] = [
    ({"device": 1}, "quotas.device"), ({"points": 1}, "quotas.points"), ({"log_bytes_per_day": -1}, "quotas.log_bytes_per_day"),
    ({"connections": True}, "quotas.connections"), ({"points_per_day": 1.0}, "quotas.points_per_day"),
    ({"devices": -1}, "quotas.devices"), ({"devices": 1e3}, "quotas.devices"), ({"devices": "7"}, "quotas.devices"),
    ({"devices": [7]}, "quotas.devices"),
    ({"devices": 2**63}, "quotas.devices"), ({"devices": 2**64}, "quotas.devices"), ({"devices": 10**40}, "quotas.devices"),
    ({"connections": 5, "devices": {}}, "quotas.devices"), (None, "quotas"), ([], "quotas"), (7, "quotas"), ("many", "quotas"),
]  # fmt: skip


async def test_quotas_that_are_none_are_named_and_change_nothing(site: Site) -> None:
    await site.add("acme", devices=3, connections=4, points_per_day=5)
    before = await site.quotas()
    for quotas, path in WRONG_QUOTAS:
        for method, where, more in (("POST", "/tenants", {"name": "other"}), ("PATCH", "/tenants/acme", {})):
            status, answer = await site.ask(method, where, {**more, "quotas": quotas})
            assert (status, answer["error"]["code"]) == (422, "invalid"), (quotas, answer)
            assert [detail["path"] for detail in answer["error"]["details"]] == [path]
    assert (await site.ask("PATCH", "/tenants/acme", {}))[0] == 422
    assert (await site.ask("PATCH", "/tenants/acme", {"quotas": {}, "name": "other"}))[0] == 422
    assert await site.quotas() == before


async def test_a_quota_is_set_by_name_and_null_gives_the_default_back(site: Site) -> None:
    def limits(quotas: dict[str, dict[str, int]]) -> list[int]:
        return [quotas[name]["limit"] for name in ("devices", "connections", "points_per_day")]

    acme = await site.add("acme", devices=3, points_per_day=0)
    assert limits((await site.quotas())["acme"]) == [3, 15_000, 0]
    assert limits(await site.allow("acme", connections=7)) == [3, 7, 0]
    assert limits(await site.allow("acme", points_per_day=2**63 - 1)) == [3, 7, 2**63 - 1]
    assert limits(await site.allow("acme", devices=None, connections=0)) == [15_000, 0, 2**63 - 1]
    assert limits(await site.allow("acme")) == [15_000, 0, 2**63 - 1]
    assert await site.allow("acme") == (await site.quotas())["acme"] == (await acme.get("/whoami"))["quotas"]
    await site.allow("acme", connections=None, points_per_day=None)
    for name in ("acme", "default"):
        assert {quota: each["limit"] for quota, each in (await site.quotas())[name].items()} == OWN_DEFAULTS


async def test_tenants_are_listed_by_name_in_pages(site: Site) -> None:
    names = ["Zeta", "acme", "bolt", "cork", "default", "echo"]
    for name in ("echo", "acme", "Zeta", "cork", "bolt"):
        await site.add(name)
    found: list[str] = []
    after = ""
    for size in (2, 2, 2):
        status, page = await site.ask("GET", f"/tenants?limit={size}{after}")
        assert status == 200
        assert len(page["items"]) == size
        assert all(item.keys() == {"name", "created_at", "quotas"} for item in page["items"])
        found += [item["name"] for item in page["items"]]
        after = f"&after={page['next']}"
    assert found == names
    assert page["next"] is None
    for wrong in ("limit=0", "limit=1001", "limit=x", "colour=red"):
        status, body = await site.ask("GET", f"/tenants?{wrong}")
        assert (status, body["error"]["code"]) == (400, "bad_query")


async def test_removing_a_tenant_needs_its_name_repeated(site: Site) -> None:
    acme = await site.add()
    await site.add("other")
    for wrong in ("", "?confirm=", "?confirm=ACME", "?confirm=other", "?confirm=acme&confirm=acme", "?confirm=acme&force=true"):
        status, body = await site.ask("DELETE", f"/tenants/acme{wrong}")
        assert (status, body["error"]["code"]) == (400, "bad_query"), wrong
    assert set(await site.quotas()) == {"default", "acme", "other"}
    assert (await acme.get("/whoami"))["tenant"] == "acme"
    await site.remove("acme")
    assert set(await site.quotas()) == {"default", "other"}
    assert (await acme.ask("GET", "/whoami"))[0] == 401


async def test_a_tenant_that_is_not_there_can_be_neither_changed_nor_removed(site: Site) -> None:
    await site.add()
    await site.remove()
    for name in ("nobody", "acme", "null", "a%20b"):
        status, body = await site.ask("PATCH", f"/tenants/{name}", {"quotas": {"devices": 1}})
        assert (status, body["error"]["code"]) == (404, "not_found")
        status, body = await site.ask("DELETE", f"/tenants/{name}?confirm={name}")
        assert (status, body["error"]["code"]) == (404, "not_found")
    assert list(await site.quotas()) == ["default"]


async def test_what_is_done_to_tenants_stays_in_the_platforms_audit(site: Site) -> None:
    await site.add(devices=3)
    await site.allow("acme", devices=None)
    await site.ask("DELETE", "/tenants/acme?confirm=no")
    await site.remove()
    await site.removed()
    status, body = await site.ask("GET", "/platform/audit")
    assert status == 200
    assert [(item["action"], item["target"], item["outcome"]) for item in reversed(body["items"])] == [
        ("tenant.create", "acme", "ok"), ("tenant.update", "acme", "ok"), ("tenant.remove", "acme", "bad_query"),
        ("tenant.remove", "acme", "ok"),
    ]  # fmt: skip


# ---- the command line


async def tenant_command(folder: Path, *words: str) -> tuple[int, str, str]:
    return await plants.command("tenant", *words, folder=folder)


async def test_a_tenant_made_from_the_command_line_works_at_once(site: Site, tmp_path: Path) -> None:
    code, out, _ = await tenant_command(tmp_path, "add", "acme")
    assert code == 0
    token, end = out[:-1], out[-1]
    assert end == "\n"
    acme = Plant(site.plant.url, site.plant.client, token, site.plant.database)
    who = await acme.get("/whoami")
    assert (who["tenant"], who["role"]) == ("acme", "admin")
    device = await acme.device("press-1")
    await device.store({"values": {"level": 1}})
    (again, _, errors), (listed, lines, _) = await asyncio.gather(
        tenant_command(tmp_path, "add", "acme"),
        plants.command("tenant", "list", "--quota-devices", "7", folder=tmp_path, IIOT_QUOTA_POINTS="8"),
    )
    assert again == 1
    assert iiot.FAULTS["tenant_exists"].message in errors
    assert listed == 0
    items = [json.loads(line) for line in lines.splitlines()]
    assert [(item["name"], item["quotas"]["devices"], item["quotas"]["points_per_day"]) for item in items] == [
        ("acme", {"used": 1, "limit": 7}, {"used": 1, "limit": 8}), ("default", {"used": 0, "limit": 7}, {"used": 0, "limit": 8}),
    ]  # fmt: skip
    shown = (await site.ask("GET", "/tenants"))[1]["items"]
    assert [item["created_at"] for item in items] == [item["created_at"] for item in shown]


async def test_the_command_line_removes_only_what_is_confirmed_and_there(site: Site, tmp_path: Path) -> None:
    acme = await site.add()
    outcomes = await asyncio.gather(
        tenant_command(tmp_path, "remove", "acme", "--confirm", "ACME"),
        tenant_command(tmp_path, "remove", "acme"),
        tenant_command(tmp_path, "remove", "nobody", "--confirm", "nobody"),
        tenant_command(tmp_path, "add", "a b"),
        tenant_command(tmp_path, "remove", "a/b", "--confirm", "a/b"),
        tenant_command(tmp_path),
    )
    assert [code for code, _, _ in outcomes] == [1, 2, 1, 2, 2, 2]
    for (_, out, errors), word in zip(outcomes, ["--confirm", "--confirm", "nobody", "'a b'", "'a/b'", "verb"], strict=True):
        assert out == ""
        assert word in errors
        assert "Traceback" not in errors
    assert (await acme.get("/whoami"))["tenant"] == "acme"
    assert set(await site.quotas()) == {"default", "acme"}


async def test_a_tenant_removed_from_the_command_line_ends_in_the_running_server(site: Site, tmp_path: Path) -> None:
    theirs = await site.plant.device("press-1")
    acme = await site.add()
    key = (await new_key(acme))["key"]
    before_hello = await acme.connect()
    device, idle = await acme.device("press-1"), await acme.device("press-2")
    await device.store({"values": {"level": 1}})
    async with acme.client.get(f"{acme.url}/events", headers={"Authorization": f"Bearer {acme.token}"}) as response:
        assert response.status == 200
        code, out, errors = await tenant_command(tmp_path, "remove", "acme", "--confirm", "acme")
        assert (code, out) == (0, ""), errors
        assert (await acme.ask("GET", "/whoami"))[0] == 401
        answer = await provision(acme, key, "press-9")
        assert (answer["type"], answer["code"]) == ("error", "unauthorized")
        for session in (device, idle):
            closed = await session.closed()
            assert (closed.code, closed.reason) == (4403, iiot.FAULTS["tenant_removed"].message)
        await is_ended(response)
    await before_hello.send("hello", token=acme.tokens["press-1"])
    assert (await before_hello.closed()).code == 4401
    await site.removed()
    assert orphans(site.plant.database) == 0
    await theirs.store({"values": {"level": 1}})


async def test_a_tenant_removed_while_an_earlier_removal_goes_on_ends_all_the_same(tmp_path: Path) -> None:
    async with opened(tmp_path, SLOWLY) as site:
        large = await site.plant.device("large")
        await large.store(*({"values": {"level": n}} for n in range(1_500)))
        acme = await site.add()
        device = await acme.device("press-1")
        await device.store({"values": {"level": 1}})
        assert (await site.plant.ask("DELETE", "/iiot/large"))[0] == 204
        database = str(tmp_path / "iiot.db")
        await asyncio.to_thread(iiot.main, ["tenant", "remove", "acme", "--confirm", "acme", "--db", database])
        assert query(site.plant.database, BEING_REMOVED), "the earlier removal is done already"
        await site.removed()
        with suppress(ConnectionError):
            await device.telemetry({"values": {"level": 2}})
        with pytest.raises(Closed) as refused:  # not an acknowledgement of what is stored nowhere
            await device.acknowledged(device.seq)
        assert refused.value.code == 4403
        assert orphans(site.plant.database) == 0


# ---- nothing is left


@pytest.mark.parametrize("limits", [iiot.Limits(), SLOWLY], ids=["at once", "in many steps"])
async def test_a_removed_tenant_leaves_nothing_behind_and_others_lose_nothing(tmp_path: Path, limits: iiot.Limits) -> None:
    async with opened(tmp_path, limits) as site:
        database = site.plant.database
        neighbour = await site.add("neighbour")
        await populate(site.plant, 0)
        await populate(neighbour, 0)
        before = tables(database)
        assert before["presence"]
        acme = await site.add()
        sessions = await populate(acme, 2)
        full = tables(database)
        assert {name for name, rows in full.items() if len(rows) <= len(before[name])} == {
            "removed_series", "removed_range", "push", "log_repeat",  # numbers of lines alone, for an hour
            "changed", "late_reading",
        }  # fmt: skip
        await site.remove()
        for device in sessions:
            closed = await device.closed()
            assert (closed.code, closed.reason) == (4403, iiot.FAULTS["tenant_removed"].message)
        assert (await acme.ask("GET", "/iiot"))[0] == 401
        await site.removed()
        assert tables(database) == before
        assert len(await neighbour.points("press-1", "level")) == 40


async def test_a_removal_that_a_stop_interrupts_is_finished_by_the_next_start(tmp_path: Path) -> None:
    database = tmp_path / "iiot.db"
    async with opened(tmp_path, SLOWLY) as site:
        await populate(site.plant, 0)
        before = tables(database)
        acme = await site.add()
        await populate(acme, 0)
        device = await acme.device("press-1")
        await device.store(*({"values": {"level": n}} for n in range(3_000)))
        await site.remove()
    assert query(database, "select count(*) from tenant where name is null") == [(1,)]
    async with opened(tmp_path) as site:
        await site.removed()
        now = tables(database)
        assert list(await site.quotas()) == ["default"]
    now["operator_token"] = [row for row in now["operator_token"] if row in before["operator_token"]]  # the second start's own
    assert now == before


async def test_a_removal_that_was_confirmed_without_a_server_is_done_by_the_next_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as site:
        await populate(site.plant, 0)
        before = tables(site.plant.database)
        acme = await site.add()
        await populate(acme, 0)
    assert (await tenant_command(tmp_path, "remove", "acme", "--confirm", "acme"))[0] == 0
    async with opened(tmp_path) as site:
        await site.removed()
        now = tables(site.plant.database)
        now["operator_token"] = [row for row in now["operator_token"] if row in before["operator_token"]]
        assert now == before


async def test_the_name_of_a_removed_tenant_is_free_at_once_and_the_new_one_sees_nothing_of_the_old(tmp_path: Path) -> None:
    async with opened(tmp_path, SLOWLY) as site:
        database = site.plant.database
        acme = await site.add("acme", devices=4)
        await populate(acme)
        key = (await new_key(acme))["key"]
        ids = query(database, "select max(tenant.id), max(device.id) from tenant join device on tenant_id = tenant.id")[0]
        await site.remove()
        fresh = await site.add()
        assert query(database, "select count(*) from device where tenant_id = ?", ids[0]) != [(0,)], "the old one is gone already"
        for path in ("/iiot", "/provisioning-keys", "/audit"):
            assert (await fresh.get(path))["items"] == []
        assert len((await fresh.get("/tokens"))["items"]) == 1
        assert (await fresh.get("/whoami"))["quotas"] == {name: {"used": 0, "limit": most} for name, most in OWN_DEFAULTS.items()}
        assert (await turned_away(fresh, acme.tokens["press-1"])) == ("unauthorized", 4401)
        assert (await provision(fresh, key, "press-9"))["code"] == "unauthorized"
        assert (await acme.ask("GET", "/iiot"))[0] == 401
        device = await fresh.device("press-1")
        assert (device.welcome["seq"], device.welcome["session"], device.welcome["config"]) == (0, 1, None)
        await device.store({"values": {"level": 7}})
        assert [value for _, value in await fresh.points("press-1", "level")] == [7]
        assert (await fresh.ask("GET", "/iiot/press-1/state"))[0] == 404
        assert [event["kind"] for event in (await fresh.get("/iiot/press-1/events"))["items"]] == ["connected", "credentials"]
        await site.remove()  # the second of the name, while the first is still being deleted
        assert (await device.closed()).code == 4403
        await site.removed()
        assert query(database, "select name from tenant") == [("default",)]
        assert [tables(database)[name] for name in ("device", "telemetry", "audit", "event", "usage")] == [[]] * 5


async def test_numbers_of_tenants_and_devices_are_given_out_once(tmp_path: Path) -> None:
    def numbers() -> tuple[int, int]:
        there = "select tenant.id, device.id from tenant join device on tenant_id = tenant.id where device.name is not null"
        (found,) = query(tmp_path / "iiot.db", there)
        return found[0], found[1]

    given = []
    for _ in range(2):
        async with opened(tmp_path) as site:
            for _ in range(2):
                acme = await site.add()
                await acme.register("press-1")
                given.append(numbers())
                assert (await acme.ask("DELETE", "/iiot/press-1"))[0] == 204
                await acme.register("press-1")
                given.append(numbers())
                await site.remove()
                await site.removed()
    devices = [device for _, device in given]
    assert len(set(devices)) == len(devices) == 8
    assert len({tenant for tenant, _ in given}) == 4


async def test_what_devices_send_while_their_tenant_is_removed_ends_nowhere(tmp_path: Path) -> None:
    async with opened(tmp_path) as site:
        await populate(site.plant, 0)
        before = tables(site.plant.database)
        acme = await site.add()
        tasks = [asyncio.create_task(flood(await acme.device(f"press-{n}"), ever_new)) for n in range(3)]
        await acme.until("/whoami", lambda body: body["quotas"]["points_per_day"]["used"] > 500)
        await site.remove()
        assert [(await task).code for task in tasks] == [4403] * 3
        await site.removed()
        assert tables(site.plant.database) == before


async def test_what_a_device_sends_while_it_is_removed_ends_nowhere(plant: Plant) -> None:
    other = await plant.device("press-2")
    task = asyncio.create_task(flood(await plant.device("press-1"), ever_new))
    await plant.until("/whoami", lambda body: body["quotas"]["points_per_day"]["used"] > 500)
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    assert (await task).code == 4403
    await other.store({"values": {"level": 1}})
    await site_of(plant).removed()
    assert orphans(plant.database) == 0
    assert len(query(plant.database, "select * from telemetry")) == 1


async def test_what_a_device_sends_while_it_is_removed_ends_nowhere_when_other_removals_go_on(plant: Plant) -> None:
    for _ in range(3):
        senders = [await plant.device(f"press-{number}") for number in range(4)]
        for device in senders:
            await device.store(always_the_same(0))
        tasks = [asyncio.create_task(flood(device, always_the_same)) for device in senders]
        large = await plant.device("large")
        await large.store({"values": {f"metric-{number}": number for number in range(600)}})
        assert (await plant.ask("DELETE", "/iiot/large"))[0] == 204
        for number, task in enumerate(tasks):
            assert (await plant.ask("DELETE", f"/iiot/press-{number}"))[0] == 204
            assert (await task).code == 4403
        await site_of(plant).removed()
        assert query(plant.database, "select * from series") == []
        assert query(plant.database, "select * from telemetry") == []
        plant.tokens.clear()


# ---- quotas of devices and connections


async def test_a_tenant_has_no_more_devices_than_its_quota(site: Site) -> None:
    acme = await site.add("acme", devices=2)
    key = await new_key(acme, uses=5)
    assert (await provision(acme, key["key"], "press-1"))["type"] == "credentials"
    await acme.register("press-2")
    status, body = await acme.ask("PUT", "/iiot/press-3")
    assert (status, body["error"]["code"]) == (403, "too_many_devices")
    device = await acme.connect()
    await device.send("provision", key=key["key"], device="press-3")
    assert (await device.expect("error"))["code"] == "too_many_devices"
    assert (await device.closed()).code == 4429
    assert [item["uses_left"] for item in (await acme.get("/provisioning-keys"))["items"]] == [4]
    assert (await acme.get("/whoami"))["quotas"]["devices"] == {"used": 2, "limit": 2}
    assert [item["device"] for item in (await acme.get("/iiot"))["items"]] == ["press-1", "press-2"]
    status, body = await acme.ask("PUT", "/iiot/press-2")
    assert (status, body["error"]["code"]) == (409, "device_exists")
    await site.plant.register("press-3")  # another tenant
    assert (await acme.ask("DELETE", "/iiot/press-1"))[0] == 204
    await acme.register("press-3")
    assert (await site.allow("acme", devices=3))["devices"] == {"used": 2, "limit": 3}
    assert (await provision(acme, key["key"], "press-4"))["type"] == "credentials"
    assert (await site.allow("acme", devices=1))["devices"] == {"used": 3, "limit": 1}  # those that are there stay
    assert (await acme.ask("PUT", "/iiot/press-5"))[0] == 403
    assert len((await acme.get("/iiot"))["items"]) == 3


async def test_a_tenant_has_no_more_connected_devices_than_its_quota(site: Site) -> None:
    acme = await site.add("acme", connections=2)
    one, two = await acme.device("press-1"), await acme.device("press-2")
    third = await acme.register("press-3")
    assert await turned_away(acme, third) == ("too_many_connected", 4429)
    assert (await acme.get("/whoami"))["quotas"]["connections"] == {"used": 2, "limit": 2}
    assert not (await acme.get("/iiot/press-3"))["connected"]
    kinds = [event["kind"] for event in (await acme.get("/iiot/press-3/events"))["items"]]
    assert kinds == ["credentials"]
    await site.plant.device("press-1")  # another tenant's
    again = await acme.device("press-2")  # in the place of the one before
    assert (await two.closed()).code == 4409
    await again.store({"values": {"level": 1}})
    await one.store({"values": {"level": 1}})
    assert await turned_away(acme, third) == ("too_many_connected", 4429)
    await one.close()
    instead = await acme.device("press-3")
    await instead.store({"values": {"level": 1}})
    assert await turned_away(acme, acme.tokens["press-1"]) == ("too_many_connected", 4429)
    assert (await acme.ask("DELETE", "/iiot/press-3"))[0] == 204
    assert (await instead.closed()).code == 4403
    back = await acme.device("press-1")
    await back.store({"values": {"level": 2}})
    acme.tokens.pop("press-3")
    fourth = await acme.register("press-4")
    assert await turned_away(acme, fourth) == ("too_many_connected", 4429)
    await site.allow("acme", connections=3)
    await (await acme.device("press-4")).store({"values": {"level": 1}})
    assert (await acme.get("/whoami"))["quotas"]["connections"] == {"used": 3, "limit": 3}


async def test_sessions_that_never_were_take_no_connection(site: Site) -> None:
    acme = await site.add("acme", connections=1)
    token = await acme.register("press-1")
    assert (await acme.ask("PATCH", "/iiot/press-1", {"disabled": True}))[0] == 200
    for _ in range(3):
        assert await turned_away(acme, token) == ("device_disabled", 4403)
    device = await acme.connect()
    await device.send("hello", token=token[:-1] + ("A" if token[-1] != "A" else "B"))
    assert (await device.closed()).code == 4401
    await (await acme.device("press-2")).store({"values": {"level": 1}})


async def test_a_lowered_quota_of_connections_ends_none_and_lets_none_in(site: Site) -> None:
    acme = await site.add()
    one, two = await acme.device("press-1"), await acme.device("press-2")
    assert (await site.allow("acme", connections=0))["connections"] == {"used": 2, "limit": 0}
    for device in (one, two):
        await device.store({"values": {"level": 1}})
    assert await turned_away(acme, await acme.register("press-3")) == ("too_many_connected", 4429)


# ---- the quota of points


async def held(device: Device, seq: int) -> dict[str, Any]:
    """The frame that says the device is throttled, once all up to `seq` is acknowledged, and nothing more."""
    told, acknowledged = None, 0
    while told is None or acknowledged < seq:
        frame = await device.receive()
        if frame["type"] == "throttled":
            assert told is None
            told = frame
        else:
            assert frame["type"] == "ack"
            acknowledged = frame["seq"]
            assert acknowledged <= seq
    return told


async def used_points(tenant: Plant) -> int:
    return int((await tenant.get("/whoami"))["quotas"]["points_per_day"]["used"])


async def exhausted(site: Site, name: str = "acme", frames: int = 5) -> tuple[Plant, Device]:
    """A tenant at its quota of five points, and the device of it that has just stored the fifth; frames beyond it are on their way."""
    tenant = await site.add(name, points_per_day=5)
    device = await tenant.device("press-1")
    for number in range(1, frames + 1):
        await device.telemetry({"values": {"level": number}})
    await held(device, 5)
    return tenant, device


@pytest.mark.usefixtures("same_day")
async def test_a_device_at_the_quota_of_points_is_told_and_nothing_that_it_sends_is_lost(site: Site) -> None:
    other = await site.plant.device("press-1")
    acme = await site.add("acme", points_per_day=5)
    device = await acme.device("press-1")
    for number in range(1, 31):
        await device.telemetry({"values": {"level": number}})
    told = await held(device, 5)
    assert told["limit"] == "points_per_day"
    assert 0 < told["retry_after"] <= 86_400
    assert told["retry_after"] == pytest.approx((iiot.DAY - iiot.now_ms() % iiot.DAY) / 1000, abs=PATIENCE)
    for number in range(50):  # meanwhile another tenant goes on
        await other.store({"values": {"level": number}})
    assert await used_points(acme) == 5
    assert [value for _, value in await acme.points("press-1", "level")] == [1, 2, 3, 4, 5]
    assert (await acme.get("/iiot/press-1"))["connected"]
    assert (await site.allow("acme", points_per_day=12))["points_per_day"] == {"used": 5, "limit": 12}
    await device.acknowledged(12)
    await other.store({"values": {"level": 50}})
    assert await used_points(acme) == 12
    await site.allow("acme", points_per_day=None)
    await device.acknowledged(30)
    assert [value for _, value in await acme.points("press-1", "level")] == list(range(1, 31))
    assert await used_points(acme) == 30
    await device.store({"values": {"level": 31}})


@pytest.mark.usefixtures("same_day")
async def test_a_device_is_told_again_when_a_raised_quota_is_used_up_too(site: Site) -> None:
    acme, device = await exhausted(site, frames=20)
    await site.allow("acme", points_per_day=12)
    await acme.until("/whoami", lambda body: body["quotas"]["points_per_day"]["used"] == 12)
    await site.allow("acme", points_per_day=None)
    frames = [await device.receive()]
    while frames[-1] != {"type": "ack", "seq": 20}:
        frames.append(await device.receive())
    assert [frame["type"] for frame in frames].count("throttled") == 1


@pytest.mark.usefixtures("same_day")
async def test_the_frame_that_goes_over_the_quota_is_stored_whole(site: Site) -> None:
    acme = await site.add("acme", points_per_day=5)
    device = await acme.device("press-1")
    await device.store(*({"values": {"level": n, "flow": n}} for n in range(2)))
    await device.telemetry(*({"values": {"level": n, "flow": n}} for n in range(2, 10)))
    await held(device, 2)
    assert await used_points(acme) == 20
    assert len(await acme.points("press-1", "flow")) == 10


@pytest.mark.usefixtures("same_day")
async def test_every_kind_of_frame_waits_while_the_quota_is_used_up(site: Site) -> None:
    acme, device = await exhausted(site)
    await device.send("state", seq=6, reported={"n": 1})
    await device.telemetry({"values": {"level": 7}}, seq=7)
    await (await site.plant.device("press-1")).store({"values": {"level": 1}})
    assert (await acme.ask("GET", "/iiot/press-1/state"))[0] == 404
    await site.allow("acme", points_per_day=100)
    await device.acknowledged(7)
    assert (await acme.get("/iiot/press-1/state"))["reported"] == {"n": 1}


@pytest.mark.usefixtures("same_day")
async def test_devices_that_were_silent_are_throttled_with_their_next_frame(site: Site) -> None:
    acme = await site.add("acme", points_per_day=5)
    device, idle = await acme.device("press-1"), await acme.device("press-2")
    for number in range(1, 8):
        await device.telemetry({"values": {"level": number}})
    await held(device, 5)
    for number in range(1, 6):
        await idle.telemetry({"values": {"level": number}})
    assert (await held(idle, 0))["limit"] == "points_per_day"
    await (await site.plant.device("press-1")).store({"values": {"level": 1}})
    assert await used_points(acme) == 5
    await site.allow("acme", points_per_day=13)
    await device.acknowledged(7)
    await idle.acknowledged(5)
    assert await used_points(acme) == 12
    for name, count in (("press-1", 7), ("press-2", 5)):
        assert [value for _, value in await acme.points(name, "level")] == list(range(1, count + 1))


@pytest.mark.usefixtures("same_day")
async def test_the_next_day_takes_what_was_held_in_the_order_in_which_it_was_sent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = await site.add("acme", points_per_day=10)
    one, two = await acme.device("press-1"), await acme.device("press-2")
    for number in range(1, 13):
        await one.telemetry({"values": {"level": number}})
    await held(one, 10)
    for number in range(1, 3):
        await two.telemetry({"values": {"level": number}})
    await held(two, 0)
    today = iiot.now_ms
    monkeypatch.setattr(iiot, "now_ms", lambda: today() + iiot.DAY)
    for device, number in ((one, 13), (two, 3)):
        await device.store({"values": {"level": number}})
    assert [value for _, value in await acme.points("press-1", "level")] == list(range(1, 14))
    assert [value for _, value in await acme.points("press-2", "level")] == [1, 2, 3]
    assert await used_points(acme) == 6


@pytest.mark.usefixtures("same_day")
async def test_a_device_that_comes_while_the_quota_is_used_up_is_welcomed_and_throttled(site: Site) -> None:
    acme, _ = await exhausted(site)
    device = await acme.device("press-2")
    assert device.welcome["seq"] == 0
    await device.telemetry({"values": {"level": 1}})
    told = await device.receive()
    assert (told["type"], told["limit"]) == ("throttled", "points_per_day")
    assert told["retry_after"] > 0
    await (await site.plant.device("press-1")).store({"values": {"level": 1}})
    assert await used_points(acme) == 5
    assert (await acme.get("/whoami"))["quotas"]["connections"]["used"] == 2
    await site.allow("acme", points_per_day=6)
    await device.acknowledged(1)


@pytest.mark.usefixtures("same_day")
async def test_a_quota_of_no_points_stores_none(site: Site) -> None:
    acme = await site.add("acme", points_per_day=0)
    device = await acme.device("press-1")
    assert (await device.receive())["type"] == "throttled"
    await device.telemetry({"values": {"level": 1}})
    await (await site.plant.device("press-1")).store({"values": {"level": 1}})
    assert await used_points(acme) == 0
    await site.allow("acme", points_per_day=1)
    await device.acknowledged(1)


@pytest.mark.usefixtures("same_day")
async def test_a_throttled_device_is_superseded_disabled_and_removed_as_any(site: Site) -> None:
    acme, first = await exhausted(site, frames=9)
    second = await acme.device("press-1")
    assert (await first.closed()).code == 4409
    assert second.welcome["seq"] == 5
    assert (await second.receive())["type"] == "throttled"
    assert (await acme.ask("PATCH", "/iiot/press-1", {"disabled": True}))[0] == 200
    closed = await second.closed()
    assert (closed.code, closed.reason) == (4403, iiot.FAULTS["device_disabled"].message)
    await acme.until("/iiot/press-1", lambda body: not body["connected"])
    assert (await acme.ask("PATCH", "/iiot/press-1", {"disabled": False}))[0] == 200
    third = await acme.device("press-1")
    assert (await third.receive())["type"] == "throttled"
    await site.remove()
    assert (await third.closed()).code == 4403
    await site.removed()
    assert orphans(site.plant.database) == 0


@pytest.mark.usefixtures("same_day")
async def test_the_end_of_the_server_is_the_end_of_throttled_sessions_too(tmp_path: Path) -> None:
    async with ClientSession() as client, asyncio.timeout(PATIENCE):
        async with opened(tmp_path, heartbeat=1000.0) as site:
            plant = Plant(site.plant.url, client, site.plant.token, site.plant.database)  # its client stays when the server goes
            _, device = await exhausted(Site(plant, site.platform), frames=9)
            closing_frame = asyncio.create_task(device.closed())
        assert (await closing_frame).code == 1001
    (detail,) = query(tmp_path / "iiot.db", "select detail from event where kind = 'disconnected'")[0]
    assert json.loads(detail)["reason"] == "shutting_down"


async def throttled_by_hand(site: Site) -> tuple[Plant, ClientWebSocketResponse, Device]:
    """A tenant, and its device that has used up the quota and whose pings the test answers itself."""
    acme = await site.add("acme", points_per_day=1)
    token = await acme.register("press-1")
    link = await acme.client.ws_connect(acme.url + "/device", autoping=False, max_msg_size=0)
    device = await Device(link).hello(token)
    await device.telemetry({"values": {"level": 1}})
    await held(device, 1)
    return acme, link, device


@pytest.mark.usefixtures("same_day")
async def test_a_throttled_device_that_answers_pings_stays_connected(tmp_path: Path) -> None:
    async with opened(tmp_path, heartbeat=0.2) as site:
        acme, link, device = await throttled_by_hand(site)
        for _ in range(6):
            message = await link.receive(PATIENCE)
            assert message.type == WSMsgType.PING
            await link.pong(message.data)
        body = await acme.get("/iiot/press-1")
        assert (body["connected"], body["disconnected_at"]) == (True, None)
        await site.allow("acme", points_per_day=5)
        await device.telemetry({"values": {"level": 2}})
        while (message := await link.receive(PATIENCE)).type == WSMsgType.PING:
            await link.pong(message.data)
        assert json.loads(message.data) == {"type": "ack", "seq": 2}
        assert len((await acme.get("/iiot/press-1/events?kind=disconnected"))["items"]) == 0


@pytest.mark.usefixtures("same_day")
async def test_a_throttled_device_whose_sends_have_come_to_a_stand_loses_neither_session_nor_frame(tmp_path: Path) -> None:
    async with opened(tmp_path, heartbeat=0.2) as site:
        acme, link, device = await throttled_by_hand(site)

        async def send_much() -> None:
            for number in range(2, 202):
                await device.telemetry({"values": {f"text-{n}": f"{number:01000}" for n in range(60)}})

        sending = asyncio.create_task(send_much())
        for _ in range(6):
            assert (await link.receive(PATIENCE)).type == WSMsgType.PING
        assert await used_points(acme) == 1
        assert (await acme.get("/iiot/press-1"))["connected"]
        await site.allow("acme", points_per_day=None)
        acknowledged = 0
        while acknowledged < 201:
            message = await link.receive(PATIENCE)
            if message.type == WSMsgType.PING:
                await link.pong(message.data)
            else:
                acknowledged = json.loads(message.data)["seq"]
        await sending
        assert [int(value) for _, value in await acme.points("press-1", "text-59")] == list(range(2, 202))
        assert await used_points(acme) == 1 + 200 * 60


def break_link(device: Device) -> None:
    """As when the device loses power: no close frame."""
    connection = device.link._conn
    assert connection is not None
    assert connection.transport is not None
    connection.transport.abort()


@pytest.mark.usefixtures("same_day")
async def test_a_throttled_device_that_goes_away_is_offline(tmp_path: Path) -> None:
    async with opened(tmp_path, heartbeat=0.2) as site:
        acme, device = await exhausted(site)
        break_link(device)
        await acme.until("/iiot/press-1", lambda body: not body["connected"])
        assert (await site.quotas())["acme"]["connections"]["used"] == 0
        assert (await acme.get("/iiot/press-1/events?kind=disconnected"))["items"][0]["reason"] == "connection_lost"


@pytest.mark.usefixtures("same_day")
async def test_what_a_throttled_device_had_sent_before_it_went_away_is_not_stored_beyond_the_quota(tmp_path: Path) -> None:
    async with opened(tmp_path, heartbeat=0.2) as site:
        acme, device = await exhausted(site, frames=100)
        break_link(device)
        await acme.until("/iiot/press-1", lambda body: not body["connected"])
        await (await site.plant.device("press-1")).store({"values": {"level": 1}})
        assert await used_points(acme) == 5
        assert [value for _, value in await acme.points("press-1", "level")] == [1, 2, 3, 4, 5]
        again = await acme.device("press-1")
        assert again.welcome["seq"] == 5


@pytest.mark.usefixtures("same_day")
async def test_a_throttled_device_that_closes_is_answered(tmp_path: Path) -> None:
    async with opened(tmp_path, heartbeat=0.2) as site:
        acme = await site.add("acme", points_per_day=0)
        token = await acme.register("press-1")
        link = await acme.client.ws_connect(acme.url + "/device", autoping=False, autoclose=False, max_msg_size=0)
        device = await Device(link).hello(token)
        await device.expect("throttled")
        await link._writer.close(1000)
        messages = [(await link.receive(PATIENCE)).type]
        while messages[-1] == WSMsgType.PING and len(messages) < 6:
            messages.append((await link.receive(PATIENCE)).type)
        assert messages[-1] == WSMsgType.CLOSE


@pytest.mark.usefixtures("same_day")
async def test_the_count_of_points_outlives_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as site:
        acme = await site.add("acme", points_per_day=10)
        device = await acme.device("press-1")
        for number in range(1, 7):
            await device.store({"values": {"level": number}})
        assert await used_points(acme) == 6
        token, admin = acme.tokens["press-1"], acme.token
    async with opened(tmp_path) as site:
        acme = Plant(site.plant.url, site.plant.client, admin, site.plant.database)
        assert await used_points(acme) == 6
        device = await (await acme.connect()).hello(token)
        for number in range(7, 15):
            await device.telemetry({"values": {"level": number}})
        await held(device, 10)
        await (await site.plant.device("press-1")).store({"values": {"level": 1}})
        assert await used_points(acme) == 10
        assert [value for _, value in await acme.points("press-1", "level")] == list(range(1, 11))


@pytest.mark.usefixtures("same_day")
async def test_the_count_of_points_outlives_kill_9(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        sending = asyncio.create_task(flood(device, lambda number: {"values": {"level": number}}))
        await plant.until("/whoami", lambda body: body["quotas"]["points_per_day"]["used"] > 300)
        counted = await used_points(plant)
        os.kill(process.pid, signal.SIGKILL)
        await process.stop()
        await sending
        await process.start()
        again = process.plant(client, token)
        used = await used_points(again)
        assert counted <= used
        assert query(process.database, "select count(*) from telemetry") == [(used,)]
        device = await (await again.connect()).hello(plant.tokens["press-1"])
        assert device.welcome["seq"] == used
        await site_of(again).allow("default", points_per_day=used + 50)
        for number in range(100):
            await device.telemetry({"values": {"level": number}})
        await held(device, used + 50)
        assert await used_points(again) == used + 50


@pytest.mark.parametrize(
    ("most", "steps"),
    [
        # milliseconds from the end of the day, points that come then, points of that day after it, milliseconds to wait
        (10, [(-5_000, 4, 4, 0), (-4_000, 5, 9, 0), (-3_000, 1, 10, 3_000), (-1, 0, 10, 1), (0, 0, 0, 0), (0, 3, 3, 0)]),
        (10, [(-9, 25, 25, 9), (0, 4, 4, 0), (1, 6, 10, iiot.DAY - 1), (iiot.DAY - 1, 0, 10, 1), (iiot.DAY, 10, 10, iiot.DAY)]),
        (10, [(-1, 10, 10, 1), (3 * iiot.DAY + 60_000, 10, 10, iiot.DAY - 60_000), (4 * iiot.DAY, 0, 0, 0)]),
        (0, [(-7, 0, 0, 7), (0, 0, 0, iiot.DAY), (1, 0, 0, iiot.DAY - 1)]),
        (2**63 - 1, [(-7, 10**9, 10**9, 0), (0, 10**9, 10**9, 0)]),
    ],
    ids=["up to the quota", "over the quota", "after days of silence", "no points", "as many as can be"],
)
def test_points_are_counted_by_the_day(most: int, steps: list[tuple[int, int, int, int]]) -> None:
    today = 20_780
    quota, midnight = iiot.DailyQuota(most, today, 0), (today + 1) * iiot.DAY
    for offset, points, counted, wait in steps:
        quota.add(midnight + offset, points)
        assert quota.used == counted
        assert quota.rest(midnight + offset) == wait / 1000
        assert quota.used == counted


def test_a_day_goes_on_with_what_was_stored_of_it_before() -> None:
    quota, midnight = iiot.DailyQuota(10, 20_780, 8), 20_781 * iiot.DAY
    quota.add(midnight - 2, 2)
    assert quota.rest(midnight - 2) == 0.002
    assert quota.rest(midnight) == 0
    assert quota.used == 0


# ---- what is used, and the defaults


@pytest.mark.usefixtures("same_day")
async def test_the_use_that_is_shown_is_what_was_done(site: Site) -> None:
    async def shown(tenant: Plant, name: str, *used: int) -> None:
        expected = {quota: {"used": each, "limit": OWN_DEFAULTS[quota]} for quota, each in zip(iiot.QUOTAS, (*used, 0), strict=True)}
        async with asyncio.timeout(PATIENCE):
            while (await tenant.get("/whoami"))["quotas"] != expected:
                await asyncio.sleep(0.01)
        assert (await site.quotas())[name] == expected

    acme = await site.add()
    await shown(acme, "acme", 0, 0, 0)
    for name in ("press-1", "press-2", "press-3"):
        await acme.register(name)
    one, two = await acme.device("press-1"), await acme.device("press-2")
    await one.store(*({"values": {"level": n, "flow": n, "mode": "auto", "on": True}} for n in range(5)))
    await two.store({"values": {"level": 1}}, {"values": {}})
    await shown(acme, "acme", 3, 2, 21)
    await two.telemetry({"values": {"level": 2}}, seq=1)  # a duplicate
    await two.telemetry({"values": {"level": [3]}}, seq=2)  # refused
    assert (await two.expect("error"))["seq"] == 2
    await two.telemetry({"values": {"level": 4}}, seq=3)
    await two.acknowledged(3)
    await shown(acme, "acme", 3, 2, 22)
    await shown(site.plant, "default", 0, 0, 0)
    await two.close()
    await shown(acme, "acme", 3, 1, 22)
    assert (await acme.ask("DELETE", "/iiot/press-2"))[0] == 204
    assert (await acme.ask("DELETE", "/iiot/press-1"))[0] == 204
    await one.closed()
    await shown(acme, "acme", 1, 0, 22)
    assert (await site.ask("GET", "/whoami"))[1]["quotas"] is None


@pytest.mark.usefixtures("same_day")
async def test_the_installations_quotas_are_those_of_tenants_without_their_own(tmp_path: Path) -> None:
    async with opened(tmp_path, quota_devices=2, quota_connections=1, quota_points=3, quota_log_bytes=8) as site:
        larger = {"devices": 3, "connections": 2, "points_per_day": 9, "log_bytes_per_day": 10}
        own = await site.add("own", **larger)
        acme = await site.add()
        defaults = {"devices": 2, "connections": 1, "points_per_day": 3, "log_bytes_per_day": 8}
        for tenant, quotas in ((site.plant, defaults), (acme, defaults), (own, larger)):
            shown = (await tenant.get("/whoami"))["quotas"]
            assert {name: each["limit"] for name, each in shown.items()} == quotas
            for number in range(quotas["devices"]):
                await tenant.register(f"press-{number}")
            status, body = await tenant.ask("PUT", "/iiot/press-9")
            assert (status, body["error"]["code"]) == (403, "too_many_devices")
            devices = [await tenant.device(f"press-{number}") for number in range(quotas["connections"])]
            assert await turned_away(tenant, tenant.tokens[f"press-{len(devices)}"]) == ("too_many_connected", 4429)
            for _ in range(quotas["points_per_day"] + 3):
                await devices[0].telemetry({"values": {"level": 1}})
            await held(devices[0], quotas["points_per_day"])
        body = await site.allow("own", **dict.fromkeys(iiot.QUOTAS))
        assert {name: each["limit"] for name, each in body.items()} == defaults
        await site.allow("acme", points_per_day=4)
        assert (await site.quotas())["default"]["points_per_day"] == {"used": 3, "limit": 3}
