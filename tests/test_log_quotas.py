"""How much a tenant may log in a day, and a device in a second: it is told, it waits, and nothing is lost without a word."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from devices import Caller, played
from plant import Device, Plant, Process
from storing import Store, running, until
from test_syslog import listening

import agent
import iiot

pytestmark = pytest.mark.usefixtures("same_day")

FRAME_BYTES = 1_000
SLOW = attrs.evolve(iiot.Limits(), log_bytes_a_second=5 * FRAME_BYTES, log_rate_seconds=1.0)


async def log(device: Device, count: int = 1) -> int:
    """Send lines, each in a frame of its own that is as long as all others; the last one's number."""
    for _ in range(count):
        device.seq += 1
        text = json.dumps({"type": "log", "seq": device.seq, "entries": [{"level": "info", "message": f"line {device.seq} "}]})
        message = f"line {device.seq} {'x' * (FRAME_BYTES - len(text))}"
        await device.send("log", seq=device.seq, entries=[{"level": "info", "message": message}])
    return device.seq


async def told(device: Device) -> dict[str, Any]:
    return await device.expect("throttled")


async def allow(plant: Plant, log_bytes: int | None) -> None:
    platform = plants.admin_token(plant.database, "platform")
    status, body = await plant.ask("PATCH", "/tenants/default", {"quotas": {"log_bytes_per_day": log_bytes}}, token=platform)
    assert status == 200, body


async def used(plant: Plant) -> int:
    return int((await plant.get("/whoami"))["quotas"]["log_bytes_per_day"]["used"])


def numbers(plant: Plant) -> list[int]:
    """Of the lines that are stored."""
    return [int(message.split()[1]) for (message,) in plants.rows(plant.database, "select message from log_line order by id")]


async def test_lines_count_as_they_were_sent_and_not_as_points(plant: Plant) -> None:
    device = await plant.device("press-1")
    before = (await plant.get("/whoami"))["quotas"]
    await device.acknowledged(await log(device, 3))
    assert await used(plant) == 3 * FRAME_BYTES
    assert (await plant.get("/whoami"))["quotas"]["points_per_day"] == before["points_per_day"]


async def test_a_device_that_stops_when_it_is_told_goes_on_with_its_readings(plant: Plant) -> None:
    await allow(plant, 40 * FRAME_BYTES)
    device = await plant.device("press-1")
    await log(device, 41)  # the last one was sent before it could know
    frame = await told(device)
    assert frame["limit"] == "log_bytes_per_day"
    assert 0 < frame["retry_after"] <= 86_400
    for level in range(20):
        await device.store({"values": {"level": level}})
    assert numbers(plant) == list(range(1, 42))


async def test_beyond_a_twentieth_more_lines_wait_and_come_when_the_quota_is_raised(plant: Plant) -> None:
    await allow(plant, 40 * FRAME_BYTES)
    device, other = await plant.device("press-1"), await plant.device("press-2")
    await log(device, 50)
    await device.telemetry({"values": {"level": 1}})
    await device.acknowledged(42)
    await other.store({"values": {"level": 2}})
    assert (await log(other), (await told(other))["limit"]) == (2, "log_bytes_per_day")
    assert await used(plant) == 42 * FRAME_BYTES
    await allow(plant, 60 * FRAME_BYTES)
    await device.acknowledged(51)
    await other.acknowledged(2)
    assert sorted(numbers(plant)) == sorted([*range(1, 51), 2])
    assert len(await plant.points("press-1", "level")) == 1


async def test_who_was_told_is_told_when_lines_are_taken_again(plant: Plant) -> None:
    await allow(plant, 40 * FRAME_BYTES)
    device = await plant.device("press-1")
    await log(device, 40)
    assert (await told(device))["retry_after"] > 0
    await allow(plant, None)
    assert await told(device) == {"type": "throttled", "limit": "log_bytes_per_day", "retry_after": 0.0}


async def test_a_quota_of_no_logs_stores_none_and_readings_go_on_in_a_session_without_lines(plant: Plant) -> None:
    await allow(plant, 0)
    device, other = await plant.device("press-1"), await plant.device("press-2")
    await log(device)
    await told(device)
    await other.store({"values": {"level": 1}})
    assert numbers(plant) == []
    await allow(plant, FRAME_BYTES)
    await device.acknowledged(1)


async def test_a_device_that_logs_too_fast_waits_and_others_do_not(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, SLOW) as plant:
        device, other = await plant.device("press-1"), await plant.device("press-2")
        await log(device, 16)
        frame = await told(device)
        assert frame["limit"] == "log_bytes_per_second"
        assert 0 < frame["retry_after"] < 5
        await other.acknowledged(await log(other))
        await device.acknowledged(16)
        assert sorted(numbers(plant)) == sorted([*range(1, 17), 1])


async def test_a_device_does_not_log_faster_for_a_new_session(tmp_path: Path) -> None:
    limits = attrs.evolve(SLOW, log_bytes_a_second=1, log_rate_seconds=5.0 * FRAME_BYTES)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        await log(device, 6)
        await told(device)
        device = await plant.device("press-1")
        await log(device)
        assert (await told(device))["limit"] == "log_bytes_per_second"
        assert numbers(plant) == list(range(1, 7))


async def test_what_was_logged_of_a_day_survives_a_kill(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with plants.client() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        await device.acknowledged(await log(device, 3))
        await process.stop(signal.SIGKILL)
        await process.start()
        assert await used(process.plant(client, token)) == 3 * FRAME_BYTES


async def test_datagrams_beyond_the_quota_are_counted_and_streams_wait(tmp_path: Path) -> None:
    async with listening(tmp_path) as site:
        await site.bind("press-1", "127.0.0.1")
        line = b"<14>1 - host app - - - " + b"x" * 977
        await allow(site.plant, 2 * len(line))
        await site.tcp(line + b"\n" + line + b"\n")
        await site.lines(2)
        site.udp(line)
        assert [item["reason"] for item in await site.refused(1)] == ["log_bytes_per_day"]
        sending = asyncio.create_task(site.tcp(line + b"\n"))
        done, _ = await asyncio.wait((sending,), timeout=0.2)
        assert not done
        assert await used(site.plant) == 2 * len(line)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_the_agent_holds_its_lines_and_sends_its_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOG_SECONDS", 0.01), ("CURSOR_SECONDS", 0.01)):
        monkeypatch.setattr(agent, name, value)
    file = tmp_path / "press.log"
    file.touch()
    store = Store()
    options: dict[str, Any] = {"log_file": (str(file),), "cursor_file": str(tmp_path / "cursors.json")}
    async with played(store.play) as url, running(tmp_path, url, interval=0.05, **options) as device:
        await until(lambda: store.sessions and store.of("telemetry"))
        caller: Caller = store.sessions[0]
        await append_until(file, "first", store)
        await caller.send("throttled", limit="log_bytes_per_day", retry_after=3_600.0)
        await until(device._spool._holds_lines)
        with file.open("a") as lines:
            lines.write("second\n")
        count = len(store.of("telemetry"))
        await until(lambda: len(store.of("telemetry")) > count + 5)
        assert "second" not in store.messages
        await caller.send("throttled", limit="log_bytes_per_day", retry_after=0.0)
        await until(lambda: "second" in store.messages)
    assert store.messages.count("second") == 1


async def append_until(file: Path, line: str, store: Store) -> None:
    with file.open("a") as lines:
        lines.write(f"{line}\n")
    await until(lambda: line in store.messages)
