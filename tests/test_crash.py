"""Nothing acknowledged is lost, and nothing is stored twice, whenever the server is killed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession
from plant import PATIENCE, Closed, Device, Process, admin_token

import iiot

DEVICES = 50


class Counter:
    """A device that counts: frame n carries the value n and no time, so that a frame stored twice would be two points."""

    def __init__(self, name: str, token: str) -> None:
        self.name = name
        self.token = token
        self.sent = 0
        self.acknowledged = 0

    def sample(self, seq: int) -> dict[str, Any]:
        return {"values": {"n": seq}}

    async def run(self, client: ClientSession, url: str, last: int | None = None) -> None:
        """Count until the connection breaks, or until `last` is acknowledged."""
        try:
            link = await client.ws_connect(url + "/device")
            device = await Device(link).hello(self.token)
            assert self.acknowledged <= device.welcome["seq"] <= self.sent, (self.name, self.acknowledged, device.welcome, self.sent)
            sender = asyncio.create_task(self.send(device, device.welcome["seq"], last))
            try:
                while last is None or self.acknowledged < last:
                    self.acknowledged = max(self.acknowledged, (await device.expect("ack"))["seq"])
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
                await link.close()
        except (ClientError, Closed, OSError):
            if last is not None:
                raise

    async def send(self, device: Device, after: int, last: int | None) -> None:
        """Everything above `after`, again if it was sent before; then on and on."""
        seq = after
        while last is None or seq < last:
            seq += 1
            self.sent = max(self.sent, seq)
            await device.link.send_str(json.dumps({"type": "telemetry", "seq": seq, "samples": [self.sample(seq)]}))
            while self.sent - self.acknowledged > 500 or seq % 20 == 0:
                await asyncio.sleep(0)
                if seq % 20 == 0:
                    break


class Wave(Counter):
    """A device whose readings go above a limit and below it again, by times of their own."""

    start = 0

    def sample(self, seq: int) -> dict[str, Any]:
        return {"ts": self.start + seq, "values": {"n": (seq * seq) % 23}}


def registered(database: Path, count: int = DEVICES, kind: type[Counter] = Counter) -> list[Counter]:
    tokens = [iiot.mint("dev") for _ in range(count)]

    def add(connection: sqlite3.Connection) -> None:
        tenant = iiot.tenant_id_of(connection, "default")
        for number, token in enumerate(tokens):
            iiot.insert_device(connection, tenant, f"device-{number}", token.stored, {})

    iiot.change_database(database, add)
    return [kind(f"device-{number}", token.text) for number, token in enumerate(tokens)]


async def count_through_kills(process: Process, counters: list[Counter], kills: int) -> None:
    """Let devices count while the server is killed again and again, then until all is acknowledged."""
    chance = random.Random()
    for _ in range(kills):
        await process.start()
        before = sum(counter.acknowledged for counter in counters)
        async with ClientSession() as client:
            running = [asyncio.create_task(counter.run(client, process.url)) for counter in counters]
            async with asyncio.timeout(PATIENCE):
                while sum(counter.acknowledged for counter in counters) == before:
                    await asyncio.sleep(0)
            await asyncio.sleep(chance.uniform(0, 0.5))
            await process.stop(signal.SIGKILL)
            await asyncio.gather(*running)

    await process.start()
    async with ClientSession() as client:
        await asyncio.gather(*(counter.run(client, process.url, last=counter.sent + 1) for counter in counters))
    await process.stop()


async def test_acknowledged_frames_survive_kill(process: Process, pytestconfig: pytest.Config) -> None:
    iiot.prepare_database(process.database)
    admin_token(process.database)
    counters = registered(process.database)
    await count_through_kills(process, counters, pytestconfig.getoption("--kills"))
    with closing(sqlite3.connect(process.database)) as connection:
        for counter in counters:
            values = connection.execute(
                "select value from telemetry join series on series.id = series_id join device on device.id = device_id"
                " where device.name = ? order by ts",
                (counter.name,),
            ).fetchall()
            assert [value for (value,) in values] == list(range(1, counter.acknowledged + 1)), counter.name


async def test_alerts_are_what_the_readings_say_whenever_the_server_is_killed(process: Process, pytestconfig: pytest.Config) -> None:
    """None is missing, none is there twice, and each fired and ended once."""
    iiot.prepare_database(process.database)
    admin_token(process.database)
    Wave.start = iiot.now_ms()
    body = '{"name":"high","metric":"n","condition":{"above":11}}'
    iiot.change_database(process.database, lambda connection: iiot.insert_rule(connection, 1, "high", body, "test", 10))
    waves = registered(process.database, 5, Wave)
    await count_through_kills(process, waves, pytestconfig.getoption("--kills"))
    rule = iiot.Codec(iiot.Limits()).body(body.encode(), iiot.Rule)
    with closing(sqlite3.connect(process.database)) as connection:
        for number, wave in enumerate(waves, 1):
            trial = iiot.Trial(rule, 0)
            for seq in range(1, wave.acknowledged + 1):
                trial.take(Wave.start + seq, wave.sample(seq)["values"]["n"])
            expected = [(one.since, one.fired_at, one.resolved_at) for one in trial.end(iiot.LATEST)]
            alerts = connection.execute("select since, fired_at, resolved_at from alert where device_id = ? order by since", (number,))
            assert alerts.fetchall() == expected
            assert len(expected) > 10
        repeated = connection.execute(
            "select detail ->> 'alert', detail ->> 'status' from event where kind = 'alert' group by 1, 2 having count(*) > 1"
        )
        assert repeated.fetchall() == []


async def test_devices_are_not_shown_online_after_a_crash(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        await plant.device("press")
        assert (await plant.get("/iiot/press"))["connected"] is True
        await process.stop(signal.SIGKILL)
        await process.start()
        plant = process.plant(client, token)
        shown = await plant.get("/iiot/press")
        assert shown["connected"] is False
        assert shown["disconnected_at"] is not None
        (last, *_) = (await plant.get("/iiot/press/events"))["items"]
        assert (last["kind"], last["reason"]) == ("disconnected", "crashed")
