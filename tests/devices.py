"""What the tests of the reference device work with: the agent as a process of its own, recordings, and servers that tests play."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
from aiohttp import WSMsgType, web
from plant import PATIENCE, ROOT, Plant, agent_command

START = datetime(2026, 1, 1, tzinfo=UTC)
SENSORS = ("Accelerometer1RMS", "Accelerometer2RMS", "Current", "Pressure", "Temperature", "Thermocouple", "Voltage", "Volume Flow RateRMS")
Points = dict[str, list[list[Any]]]


def wire_time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def record(path: Path, rows: int, step: timedelta = timedelta(seconds=1), delimiter: str = ",") -> Points:
    """Write a recording of full-length numbers; its points as the server has to show them."""
    numbers = random.Random(rows)
    points: Points = {metric: [] for metric in SENSORS}
    lines = [delimiter.join(("datetime", *SENSORS))]
    for row in range(rows):
        moment = START + row * step
        cells = [repr(numbers.uniform(-1000, 1000)) for _ in SENSORS]
        lines.append(delimiter.join((f"{moment:%Y-%m-%d %H:%M:%S.%f}Z", *cells)))
        for metric, cell in zip(SENSORS, cells, strict=True):
            points[metric].append([wire_time(moment), float(cell)])
    path.write_text("\n".join(lines) + "\n")
    return points


@attrs.define
class Running:
    """The agent while it runs."""

    process: asyncio.subprocess.Process
    printed: str = ""

    async def line(self, words: str) -> str:
        """The next line on standard error with these words."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while line := (await self.process.stderr.readline()).decode():
                self.printed += line
                if words in line:
                    return line
        raise AssertionError(f"ended without {words!r}: {self.printed}")

    async def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and all of standard error."""
        async with asyncio.timeout(PATIENCE):
            _, rest = await self.process.communicate()
        assert self.process.returncode is not None
        self.printed += rest.decode()
        return self.process.returncode, self.printed


@asynccontextmanager
async def started(folder: Path, *arguments: str, **environment: str) -> AsyncIterator[Running]:
    """`python agent.py …`, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "agent.py"), *arguments, cwd=folder, env={**os.environ, **environment},
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def replay(plant: Plant, folder: Path, name: str, *arguments: str) -> tuple[int, str]:
    """Send `run.csv` as a device; exit code and standard error. Nothing belongs on standard output."""
    token = plant.tokens.get(name) or await plant.register(name)
    code, out, err = await agent_command("--url", plant.url, "--token", token, "--replay", "run.csv", *arguments, folder=folder)
    assert out == ""
    assert "Traceback" not in err
    return code, err


async def replay_by_key(plant: Plant, folder: Path, *arguments: str) -> str:
    """Send `run.csv` as a new device; standard error."""
    key = await provisioning_key(plant)
    code, _, err = await agent_command("--url", plant.url, "--key", key, "--replay", "run.csv", *arguments, folder=folder)
    assert code == 0, err
    return err


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


async def provisioning_key(plant: Plant) -> str:
    status, body = await plant.ask("POST", "/provisioning-keys", {})
    assert status == 201, body
    return str(body["key"])


async def stored(plant: Plant, name: str) -> Points:
    """All points of a device, by metric."""
    points: Points = {}
    following = ""
    while following is not None:
        body = await plant.get(f"/iiot/{name}/telemetry?limit=10000{following and f'&after={following}'}")
        for series in body["series"]:
            points.setdefault(series["metric"], []).extend(series["points"])
        following = body["next"]
    return points


async def frames_of(plant: Plant, name: str) -> int:
    """The highest frame number on disk: as many as were sent, for an agent counts from one and leaves no gap."""
    device = await plant.device(name)
    await device.close()
    return int(device.welcome["seq"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Gone(Exception):
    """The agent closed the connection."""


class Caller:
    """A session of the agent, as seen by a server that a test plays."""

    def __init__(self, link: web.WebSocketResponse, number: int) -> None:
        self.link = link
        self.number = number  # 1 for the first

    async def send(self, kind: str, **fields: Any) -> None:
        await self.link.send_str(json.dumps({"type": kind, **fields}))

    async def receive(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            message = await self.link.receive()
        if message.type != WSMsgType.TEXT:
            raise Gone
        frame: dict[str, Any] = json.loads(message.data)
        return frame

    async def welcome(self, seq: int = 0) -> dict[str, Any]:
        """Take the hello, and answer it."""
        hello = await self.receive()
        assert hello["type"] == "hello", hello
        now = wire_time(datetime.now(UTC))
        await self.send("welcome", device="press-1", tenant="default", session=self.number, seq=seq, time=now, heartbeat=20.0, config=None)
        return hello

    async def refuse(self, close: int, code: str, **fields: Any) -> None:
        """An error, and the close that follows it."""
        await self.send("error", code=code, message=f"{code} it is.", **fields)
        await self.link.close(code=close, message=f"{code} it is.".encode())


@asynccontextmanager
async def played(play: Callable[[Caller], Awaitable[None]], *, autoping: bool = True) -> AsyncIterator[str]:
    """A server on a real socket whose sessions a test plays; its address. What went wrong in the play fails the test."""
    failures: list[BaseException] = []
    number = 0

    async def session(request: web.Request) -> web.WebSocketResponse:
        nonlocal number
        number += 1
        link = web.WebSocketResponse(protocols=("iiot.v1",), max_msg_size=0, autoping=autoping)
        await link.prepare(request)
        try:
            await play(Caller(link, number))
        except (Gone, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001 - it is raised again in the test itself
            failures.append(error)
        return link

    app = web.Application()
    app.router.add_get("/device", session)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
    if failures:
        raise failures[0]
