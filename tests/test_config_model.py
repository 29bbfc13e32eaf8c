"""Pushes, verdicts, disconnects, restarts and takeovers in any order: a model and the server agree after every step."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from plant import PATIENCE, Device, Plant

import iiot

NAMES = ("press-1", "press-2")
OPEN = ("pending", "sent", "in_progress", "timed_out")


@attrs.define
class Version:
    """One configuration, as the model has it."""

    document: dict[str, Any]
    hasty: bool = False  # it times out as soon as it is sent
    status: str = "pending"
    sent: bool = False


@attrs.define
class Twin:
    """A device: its configurations, what it has applied, and its connection."""

    versions: list[Version] = attrs.Factory(list)
    applied: int | None = None
    link: Device | None = None

    def push(self, document: dict[str, Any], *, hasty: bool = False) -> None:
        if self.versions and self.versions[-1].status in OPEN:
            self.versions[-1].status = "superseded"
        self.versions.append(Version(document, hasty))
        if self.link is not None:
            self.send()

    def send(self) -> None:
        self.versions[-1].status, self.versions[-1].sent = "timed_out" if self.versions[-1].hasty else "sent", True

    def owed(self) -> dict[str, Any] | None:
        """What a welcome must carry."""
        if not self.versions or self.versions[-1].status not in OPEN:
            return None
        return {"version": len(self.versions), "document": self.versions[-1].document}

    def hear(self, number: int, status: str) -> bool:
        """A verdict of the device; whether the server takes it."""
        if number > len(self.versions) or not self.versions[number - 1].sent:
            return False
        version = self.versions[number - 1]
        if status != "in_progress" or version.status in ("sent", "in_progress"):
            version.status = status
        if status == "applied":
            self.applied = number
        return True


class Configurations(RuleBasedStateMachine):
    """Every rule does one thing to the server and to the model; the invariant compares them."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.limits = attrs.evolve(iiot.Limits(), clock_seconds=0.01)
        self.twins = {name: Twin() for name in NAMES}
        self.tokens: dict[str, str] = {}
        self.pushes = 0

    @initialize()
    def start(self) -> None:
        self.runner.run(self._start())

    async def _start(self) -> None:
        self.stack = AsyncExitStack()
        self.plant: Plant = await self.stack.enter_async_context(plants.plant(Path(self.folder.name), self.limits))
        for name in NAMES:
            self.plant.tokens[name] = self.tokens.get(name) or await self.plant.register(name)
            self.tokens[name] = self.plant.tokens[name]

    def document(self) -> dict[str, Any]:
        self.pushes += 1
        return {"number": self.pushes}

    @rule(name=st.sampled_from(NAMES), timeout=st.sampled_from(["", "?timeout=1ms"]))
    def push(self, name: str, timeout: str) -> None:
        twin, document = self.twins[name], self.document()

        async def run() -> None:
            status, body = await self.plant.ask("POST", f"/iiot/{name}{timeout}", document)
            assert (status, body["version"]) == (202, len(twin.versions) + 1), body
            twin.push(document, hasty=bool(timeout))
            await self.receive(twin)

        self.runner.run(run())

    @rule(match=st.sampled_from(["press-*", "press-2", "none"]))
    def push_to_many(self, match: str) -> None:
        document, chosen = self.document(), [name for name in NAMES if match in (name, "press-*")]

        async def run() -> None:
            status, body = await self.plant.ask("POST", "/iiot", {"match": match, "config": document})
            assert (status, [row["device"] for row in body["items"]]) == (202, chosen), body
            for name in chosen:
                self.twins[name].push(document)
                await self.receive(self.twins[name])

        self.runner.run(run())

    async def receive(self, twin: Twin) -> None:
        if twin.link is not None:
            config = await twin.link.expect("config")
            assert (config["version"], config["document"]) == (len(twin.versions), twin.versions[-1].document)

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 3), status=st.sampled_from(["applied", "rejected", "in_progress"]))
    @precondition(lambda self: any(twin.link for twin in self.twins.values()))
    def answer(self, name: str, back: int, status: str) -> None:
        """A verdict on the newest version, or on one before, or on one that never was."""
        twin = self.twins[name]
        number = len(twin.versions) - back if back < 3 else len(twin.versions) + 1
        if twin.link is None or number < 1:
            return
        link = twin.link

        async def run() -> None:
            await self.settled()  # that it was sent is on disk
            link.seq += 1
            await link.send("config_status", seq=link.seq, version=number, status=status)
            if not twin.hear(number, status):
                assert (await link.expect("error"))["code"] == "unknown_version"
            await link.acknowledged(link.seq)

        self.runner.run(run())

    @rule(name=st.sampled_from(NAMES))
    def connect(self, name: str) -> None:
        """A new session, which supersedes the older one if there is one."""
        twin = self.twins[name]

        async def run() -> None:
            before, owed = twin.link, twin.owed()
            twin.link = await self.plant.device(name)
            assert twin.link.welcome["config"] == owed
            if owed:
                twin.send()
            if before is not None:
                assert (await before.closed()).code == 4409
                await before.close()

        self.runner.run(run())

    @rule(name=st.sampled_from(NAMES))
    def disconnect(self, name: str) -> None:
        twin = self.twins[name]

        async def run() -> None:
            if twin.link is not None:
                await twin.link.close()
                twin.link = None
                await self.plant.until(f"/iiot/{name}", lambda body: not body["connected"])

        self.runner.run(run())

    @rule()
    def restart(self) -> None:
        async def run() -> None:
            await self.settled()
            await self._stop()
            await self._start()

        self.runner.run(run())

    async def _stop(self) -> None:
        for twin in self.twins.values():
            if twin.link is not None:
                await twin.link.close()
                twin.link = None
        await self.stack.aclose()

    async def shown(self, name: str) -> tuple[Any, ...]:
        config = await self.plant.get(f"/iiot/{name}/config")
        history = await self.plant.get(f"/iiot/{name}/config/history?limit=1000")
        rows = [(item["version"], item["status"], item["document"]) for item in history["items"]]
        return config["version"], config["status"], config["document"], config["applied"], config["drift"], rows

    def expected(self, name: str) -> tuple[Any, ...]:
        twin = self.twins[name]
        rows = [(number, version.status, version.document) for number, version in enumerate(twin.versions, 1)][::-1]
        version, status, document = rows[0] if rows else (0, None, None)
        return version, status, document, twin.applied, (twin.applied or 0) != version, rows

    async def settled(self) -> None:
        """What follows without being announced (that a configuration was sent, that it timed out) is on disk."""
        for name in NAMES:
            try:
                async with asyncio.timeout(PATIENCE):
                    while await self.shown(name) != self.expected(name):
                        await asyncio.sleep(0.002)
            except TimeoutError:
                assert await self.shown(name) == self.expected(name)

    @invariant()
    def model_and_server_agree(self) -> None:
        if hasattr(self, "plant"):
            self.runner.run(self.settled())

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.runner.run(self._stop())
        self.runner.close()
        self.folder.cleanup()


@pytest.fixture
def steps(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--model-runs"))


def test_any_order_of_events_leaves_model_and_server_agreed(steps: int) -> None:
    chosen = settings(max_examples=steps, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Configurations, settings=chosen)
