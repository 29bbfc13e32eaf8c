"""Pushes to many devices are made in parts: others go on between them, and neither a kill nor another push undoes their order."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import PATIENCE, Plant, Process, rows

import iiot

IN_PARTS = attrs.evolve(iiot.Limits(), push_devices=3)
ALL = {"match": "*", "config": {"n": 1}}


async def registered(plant: Plant, count: int) -> list[str]:
    names = [f"press-{number:02}" for number in range(count)]
    for name in names:
        await plant.register(name)
    return names


class Gate:
    """Holds parts of pushes back until it is told to let so many go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._go_on = asyncio.Semaphore(0)
        self._before = asyncio.Queue[None]()
        make = iiot.Pusher._make_part

        async def held(pusher: iiot.Pusher, tenant_id: int) -> None:
            self._before.put_nowait(None)
            await self._go_on.acquire()
            await make(pusher, tenant_id)

        patch.setattr(iiot.Pusher, "_make_part", held)
        part = iiot.make_part_of_push

        def noted(*arguments: Any, **named: Any) -> iiot.PushPart | None:
            made = part(*arguments, **named)
            self.sizes.append(len(made.rows) if made else 0)
            return made

        patch.setattr(iiot, "make_part_of_push", noted)

    async def reached(self) -> None:
        """Until a part is about to be made."""
        async with asyncio.timeout(PATIENCE):
            await self._before.get()

    def let(self, parts: int = 1) -> None:
        for _ in range(parts):
            self._go_on.release()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


async def test_a_push_is_made_in_parts_and_answered_as_one(tmp_path: Path, gate: Gate) -> None:
    gate.let(100)
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        names = await registered(plant, 10)
        device = await plant.device("press-07")
        status, body = await plant.ask("POST", "/iiot", ALL)
        assert status == 202
        assert body["items"] == [
            {"device": name, "version": 1, "status": "sent" if name == "press-07" else "pending"} for name in names
        ]
        assert (await device.expect("config"))["document"] == {"n": 1}
        assert gate.sizes == [3, 3, 3, 1]
        *audit, whole = (await plant.get("/audit?action=config.push"))["items"]
        assert (whole["target"], whole["detail"]) == ("*", {"devices": 10})
        assert [entry["device"] for entry in reversed(audit)] == names
        assert {(entry["detail"]["match"], entry["detail"]["version"]) for entry in audit} == {("*", 1)}
        assert rows(plant.database, "select count(*), (select count(*) from push) from document") == [(1, 0)]


async def test_a_tenant_s_short_push_does_not_wait_for_another_s_long_one(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        await registered(plant, 30)
        assert (await plant.ask("POST", "/tenants", {"name": "acme"}, token=plants.admin_token(plant.database, "platform")))[0] == 201
        other = Plant(plant.url, plant.client, plants.admin_token(plant.database, tenant_name="acme"), plant.database)
        await registered(other, 2)
        long = asyncio.create_task(plant.ask("POST", "/iiot", ALL))
        await gate.reached()
        short = asyncio.create_task(other.ask("POST", "/iiot", ALL))
        await plant.until("/audit?limit=1", lambda _: len(rows(plant.database, "select 1 from push")) == 2)
        gate.let(3)
        assert (await short)[0] == 202
        assert not long.done()
        gate.let(100)
        assert len((await long)[1]["items"]) == 30


@pytest.mark.parametrize("again", [False, True])
async def test_what_is_pushed_to_one_meanwhile_is_newer(tmp_path: Path, gate: Gate, again: bool) -> None:  # noqa: FBT001
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        names = await registered(plant, 8)
        device = await plant.device("press-06")
        many = asyncio.create_task(plant.ask("POST", "/iiot", ALL))
        await gate.reached()
        expected = 2
        assert (await plant.ask("POST", "/iiot/press-06", {"n": 2}))[1]["version"] == 2, "the earlier push comes before it"
        if again:
            expected = 3
            assert (await plant.ask("POST", "/iiot/press-06", {"n": 3}))[1]["version"] == 3
        await plant.register("press-later")
        gate.let(100)
        assert [(item["device"], item["version"]) for item in (await many)[1]["items"]] == [(name, 1) for name in names]
        config = await plant.get("/iiot/press-06/config")
        assert (config["version"], config["document"]) == (expected, {"n": expected})
        assert (await device.expect("config"))["document"] == {"n": 2}
        assert (await plant.get("/iiot/press-later/config"))["version"] == 0, "it came after the push"
        history = (await plant.get("/iiot/press-06/config/history"))["items"]
        assert [item["document"]["n"] for item in history] == list(range(expected, 0, -1))


async def test_pushes_of_a_tenant_are_made_in_their_order(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        await registered(plant, 7)
        first = asyncio.create_task(plant.ask("POST", "/iiot", ALL))
        await gate.reached()
        second = asyncio.create_task(plant.ask("POST", "/iiot", {"match": "*", "config": {"n": 2}}))
        await plant.until("/audit?limit=1", lambda _: len(rows(plant.database, "select 1 from push")) == 2)
        gate.let(100)
        assert {item["version"] for item in (await first)[1]["items"]} == {1}
        assert {item["version"] for item in (await second)[1]["items"]} == {2}


async def leave(plant: Plant, gate: Gate) -> None:
    """A push whose client goes away after its first part."""
    asking = asyncio.create_task(plant.ask("POST", "/iiot", ALL))
    await gate.reached()
    gate.let(1)
    await gate.reached()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_a_push_whose_client_goes_away_is_made(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        await registered(plant, 8)
        device = await plant.device("press-07")
        await leave(plant, gate)
        gate.let(100)
        assert (await device.expect("config"))["document"] == {"n": 1}
        await plant.until("/iiot", lambda body: all(item["config"] for item in body["items"]))


async def test_what_a_stop_leaves_of_a_push_is_made_at_the_next_start(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        names = await registered(plant, 8)
        await leave(plant, gate)
    assert rows(plant.database, "select count(*) from config") == [(3,)]
    gate.let(100)
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        body = await plant.until("/iiot", lambda body: all(item["config"] for item in body["items"]))
        assert [(item["device"], item["config"]["version"]) for item in body["items"]] == [(name, 1) for name in names]


async def test_devices_that_are_removed_meanwhile_are_left_out(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        names = await registered(plant, 5)
        many = asyncio.create_task(plant.ask("POST", "/iiot", ALL))
        await gate.reached()
        for name in names[1:]:
            assert (await plant.ask("DELETE", f"/iiot/{name}"))[0] == 204
        gate.let(100)
        assert [item["device"] for item in (await many)[1]["items"]] == names[:1]


async def test_a_push_to_devices_that_are_all_removed_leaves_nothing(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, IN_PARTS) as plant:
        names = await registered(plant, 2)
        many = asyncio.create_task(plant.ask("POST", "/iiot", ALL))
        await gate.reached()
        for name in names:
            assert (await plant.ask("DELETE", f"/iiot/{name}"))[0] == 204
        gate.let(100)
        assert (await many)[1] == {"items": []}
        assert rows(plant.database, "select count(*), (select count(*) from push) from document") == [(0, 0)]


async def test_a_push_of_a_tenant_that_is_removed_leaves_nothing(tmp_path: Path, gate: Gate) -> None:
    async with plants.plant(tmp_path, attrs.evolve(IN_PARTS, resume_seconds=0.0)) as plant:
        platform = plants.admin_token(plant.database, "platform")
        assert (await plant.ask("POST", "/tenants", {"name": "acme"}, token=platform))[0] == 201
        acme = Plant(plant.url, plant.client, plants.admin_token(plant.database, tenant_name="acme"), plant.database)
        await registered(acme, 8)
        many = asyncio.create_task(acme.ask("POST", "/iiot", ALL))
        await gate.reached()
        gate.let(1)
        await gate.reached()
        assert (await plant.ask("DELETE", "/tenants/acme?confirm=acme", token=platform))[0] == 204
        gate.let(100)
        assert (await many)[0] == 401
        async with asyncio.timeout(PATIENCE):
            while rows(plant.database, "select 1 from tenant where name is null union all select 1 from push"):
                await asyncio.sleep(0.01)
        assert rows(plant.database, "select (select count(*) from document), (select count(*) from config)") == [(0, 0)]


def until_some(database: Path, sql: str) -> Callable[[], bool]:
    return lambda: bool(rows(database, sql))


async def test_a_kill_in_the_middle_of_a_push_leaves_it_to_the_next_start(process: Process) -> None:
    iiot.prepare_database(process.database)
    token = plants.admin_token(process.database)
    with plants.writing(process.database) as connection:
        add_devices(connection, 3_000)
    await process.start()
    async with ClientSession() as client:
        asking = asyncio.create_task(process.plant(client, token).ask("POST", "/iiot", ALL))
        some = until_some(process.database, "select 1 from config limit 1")
        async with asyncio.timeout(PATIENCE):
            while not some():
                await asyncio.sleep(0)
        await process.stop(signal.SIGKILL)
        await asyncio.gather(asking, return_exceptions=True)
        assert 0 < rows(process.database, "select count(*) from config")[0][0] < 3_000, "killed too late to say anything"
        await process.start()
        await process.plant(client, token).until("/whoami", lambda _: not rows(process.database, "select 1 from push"))
    assert rows(process.database, "select count(*), count(distinct device_id), max(version) from config") == [(3_000, 3_000, 1)]
    audited = "select count(*) from audit where action = 'config.push' and device is not null"
    assert rows(process.database, audited) == [(3_000,)], "what was done and what is in the audit are of one transaction"


def add_devices(connection: sqlite3.Connection, count: int) -> None:
    for number in range(count):
        iiot.insert_device(connection, 1, f"press-{number:05}", iiot.mint("dev").stored, {})


async def test_an_answer_with_much_that_devices_say_leaves_some_of_it_out(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may say 64 KiB: of a fleet it would be a gigabyte in one answer."""
    monkeypatch.setattr(iiot, "PAGE_CHARACTERS", 1_000)
    devices = [await plant.device(f"press-{number}") for number in range(5)]
    push = asyncio.create_task(plant.ask("POST", "/iiot?wait=60", ALL))
    errors = [{"path": "n", "code": "range", "message": "x" * 400}]
    for device in devices:
        version = (await device.expect("config"))["version"]
        await device.send("config_status", seq=1, version=version, status="rejected", errors=errors)
    items = (await push)[1]["items"]
    assert [item["status"] for item in items] == ["rejected"] * 5
    assert [item.get("errors") for item in items] == [errors, errors, None, None, None]
    assert (await plant.get("/iiot/press-4/config"))["errors"] == errors
