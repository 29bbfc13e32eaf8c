"""What the tests of the agent's logs and of its spool work with: a server that stores by the wire contract, and the agent in this
process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
from devices import Caller, Gone
from plant import PATIENCE

import agent
import iiot

TOKEN = iiot.mint("dev").text


@attrs.define
class Store:
    """A server that stores frames once, by their number, and acknowledges what it has. `loses` says after which of its frames the
    connection breaks before anything is answered; `refuses` names the fault of a frame, none for a good one."""

    seq: int = 0
    frames: list[dict[str, Any]] = attrs.Factory(list)
    refused: list[dict[str, Any]] = attrs.Factory(list)
    sessions: list[Caller] = attrs.Factory(list)
    loses: Callable[[int], bool] = lambda _: False
    refuses: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda _: None
    answers: bool = True
    received: int = 0
    acknowledged: int = 0

    async def play(self, caller: Caller) -> None:
        await caller.welcome(self.seq)
        self.sessions.append(caller)
        while True:
            frame = await caller.receive()
            self.received += 1
            assert frame["seq"] > 0
            error = self.refuses(frame) if frame["seq"] > self.seq else None
            if frame["seq"] > self.seq:
                self.seq = frame["seq"]
                (self.refused if error else self.frames).append(frame)
            if self.loses(self.received):
                raise Gone
            if error:
                await caller.send("error", seq=frame["seq"], **error)
            if self.answers:
                await caller.send("ack", seq=self.seq)
                self.acknowledged = self.seq

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [entry for frame in self.frames if frame["type"] == "log" for entry in frame["entries"]]

    @property
    def messages(self) -> list[str]:
        return [entry["message"] for entry in self.entries]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["type"] == kind]


async def until(condition: Callable[[], object], told: Callable[[], object] = lambda: "") -> None:
    """Wait until something is so; a server played here cannot be asked to wait for it."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"it did not come: {told()}") from None


@asynccontextmanager
async def running(folder: Path, url: str, **options: Any) -> AsyncIterator[agent.Agent]:
    """The agent in this process, until the end of the block."""
    kept = {"config_file": str(folder / "press-1.config.json"), "interval": 3_600.0, **options}
    device = agent.Agent(agent.Options(url=url, token=TOKEN, name="press-1", **kept))
    task = asyncio.create_task(device.run())
    try:
        yield device
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        logging.getLogger("iiot").setLevel(logging.NOTSET)
