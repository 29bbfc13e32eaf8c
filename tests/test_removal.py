"""A removed device is gone, with all that was known of it, and its name is free."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import attrs
import plant as plants
import pytest
from plant import PATIENCE, Plant

import iiot

TABLES = ("device", "device_token", "presence", "event", "series", "telemetry", "state", "config", "document", "removed_series")


def left(database: Path) -> dict[str, int]:
    """Rows of every table that holds something of a device."""
    with closing(sqlite3.connect(database)) as connection:
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in TABLES}


async def test_a_removed_device_leaves_nothing_behind(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), removed_rows=100, resume_seconds=0.0)) as plant:
        other = await plant.device("press-2")
        await other.store({"values": {"level": 1}})
        before = left(plant.database)
        device = await plant.device("press-1")
        await device.store(*({"values": {"level": n, "flow": n}} for n in range(1_000)))
        await device.send("state", seq=2, reported={"a": 1})
        await device.acknowledged(2)
        assert (await plant.ask("POST", "/iiot/press-1", {"n": 1}))[0] == 202
        await device.expect("config")
        assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
        closed = await device.closed()
        assert (closed.code, closed.reason) == (4403, iiot.FAULTS["device_removed"].message)
        for path in ("", "/telemetry", "/events", "/state", "/config"):
            assert (await plant.ask("GET", f"/iiot/press-1{path}"))[0] == 404
        async with asyncio.timeout(PATIENCE):
            while left(plant.database) != before:
                await asyncio.sleep(0.01)
        assert len(await plant.points("press-2", "level")) == 1


async def test_the_name_of_a_removed_device_is_free_and_its_token_is_not_valid(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.store({"values": {"level": 1}})
    old = plant.tokens["press-1"]
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 404
    stranger = await plant.connect()
    await stranger.send("hello", token=old)
    assert (await stranger.closed()).code == 4401
    await plant.register("press-1")
    device = await plant.device("press-1")
    assert device.welcome["seq"] == 0
    await device.store({"values": {"level": 2}})
    assert [value for _, value in await plant.points("press-1", "level")] == [2]


async def test_what_a_stop_interrupted_is_deleted_after_the_next_start(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        device = await plant.device("press-1")
        await device.store(*({"values": {"level": n}} for n in range(100)))
    with closing(iiot.connect(plant.database)) as connection, iiot.transaction(connection):
        iiot.remove_device(connection, 1, "press-1")  # as a crash right after the removal leaves it
    async with plants.plant(tmp_path) as plant:
        async with asyncio.timeout(PATIENCE):
            while left(plant.database)["telemetry"]:
                await asyncio.sleep(0.01)
        device = await plant.device("press-2")
        await device.store({"values": {"level": 1}})
        assert len(await plant.points("press-2", "level")) == 1


@pytest.mark.parametrize("path", ["/iiot", "/healthz", "/nothing", "/iiot/nobody"])
async def test_answers_carry_what_browsers_need(plant: Plant, path: str) -> None:
    async with plant.client.get(plant.url + path, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["Cache-Control"] == "no-store"


def test_a_slice_of_a_removal_reads_no_more_versions_than_it_deletes(tmp_path: Path) -> None:
    """Each may be long. A hundred were read to delete eight."""
    database = tmp_path / "iiot.db"
    iiot.prepare_database(database)
    limits = attrs.evolve(iiot.Limits(), removed_bytes=50_000, removed_versions=100)
    with closing(iiot.connect(database)) as connection:
        for device_id in (1, 2):
            iiot.insert_device(connection, 1, f"press-{device_id}", iiot.mint("dev").stored, {})
            rows = [(device_id, version, "x" * 10_000) for version in range(40 if device_id == 1 else 4)]
            connection.executemany("insert into state values (?, ?, 0, 1, ?, '[]')", rows)
            iiot.remove_device(connection, 1, f"press-{device_id}")
        steps, left = [0], 44
        connection.set_progress_handler(lambda: steps.append(steps.pop() + 1), 1)
        costs = []
        while left:
            steps[:] = [0]
            iiot.delete_removed_devices(connection, [1, 2], limits)
            costs.append(steps[0])
            left, before = connection.execute("select count(*) from state").fetchone()[0], left
            assert before - left == 4
        assert max(costs) < 1.5 * min(costs)


def test_a_slice_of_a_removal_is_bounded_in_bytes_and_never_empty(tmp_path: Path) -> None:
    database = tmp_path / "iiot.db"
    iiot.prepare_database(database)
    limits = attrs.evolve(iiot.Limits(), removed_bytes=50_000)
    with closing(iiot.connect(database)) as connection:
        iiot.insert_device(connection, 1, "press-1", iiot.mint("dev").stored, {})
        sizes = [100_000 if version == 7 else 10_000 for version in range(40)]
        rows = [(version, "x" * size) for version, size in enumerate(sizes)]
        connection.executemany("insert into state values (1, ?, 0, 1, ?, '[]')", rows)
        iiot.remove_device(connection, 1, "press-1")
        left = len(sizes)
        while left:
            iiot.delete_removed_devices(connection, [1], limits)
            before, left = left, connection.execute("select count(*) from state").fetchone()[0]
            assert 0 < before - left <= 5
