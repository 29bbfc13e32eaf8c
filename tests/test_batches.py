"""Whatever can wait in the writer at one time is stored, and no statement binds a text that is too long for it.

SQLite takes no text of a gigabyte: a batch with one would never be stored, and its devices would send it for ever. So these look at
how long the texts are, not at the clock.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession, TCPConnector
from plant import PATIENCE, Device, Plant, locked
from test_state import Step, document_of, play

import iiot

LIMITS = iiot.Limits()
DOCUMENT = LIMITS.document_bytes
PENDING_BYTES = LIMITS.pending_points * LIMITS.point_bytes
REPORTS = PENDING_BYTES // DOCUMENT  # that wait at most
CONNECT = sqlite3.connect
# A part, and the row that fills it: a document and what changed in it, both as texts within a text, where quotes are written twice.
LONGEST = iiot.TEXT_BYTES + 2 * (DOCUMENT + 4 * DOCUMENT) + 1_000


class Bound:
    """Notes how long the texts are that the program binds, and what is in its batches."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.longest = 0
        self.batches: list[iiot.Batch] = []
        self.writer: iiot.Writer | None = None
        write, take = iiot.Batch.write, iiot.Writer.frame_taken

        def noted(batch: iiot.Batch, *arguments: Any) -> iiot.Outcome:
            self.batches.append(batch)
            return write(batch, *arguments)

        def taken(writer: iiot.Writer, *arguments: Any) -> None:
            self.writer = writer
            take(writer, *arguments)

        patch.setattr(iiot.Batch, "write", noted)
        patch.setattr(iiot.Writer, "frame_taken", taken)
        patch.setattr(sqlite3, "connect", self.connect)

    def connect(self, *arguments: Any, **named: Any) -> sqlite3.Connection:
        bound = self

        class Noted(sqlite3.Connection):
            def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
                if sys._getframe(1).f_code.co_filename == iiot.__file__ and isinstance(parameters, tuple):
                    bound.longest = max([bound.longest, *(len(value.encode()) for value in parameters if isinstance(value, str))])
                return super().execute(sql, parameters)

        connection: sqlite3.Connection = CONNECT(*arguments, factory=Noted, **named)
        return connection

    @property
    def full(self) -> bool:
        """Whether as much waits in the writer as can."""
        shares = self.writer._shares._shares.values() if self.writer is not None else ()
        return any(share.weight + share._last > LIMITS.pending_points for share in shares)

    def most(self, count: Callable[[iiot.Batch], int]) -> int:
        return max(map(count, self.batches))


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Bound:
    return Bound(monkeypatch)


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[Plant]:
    """A server whose one tenant may always have all of a transaction."""
    async with plants.plant(tmp_path, attrs.evolve(LIMITS, alone_seconds=1e-6)) as running:
        yield running


async def connected(plant: Plant, count: int) -> list[Device]:
    """So many devices, registered without a request for each."""
    tokens = [iiot.mint("dev") for _ in range(count)]

    def add(connection: sqlite3.Connection) -> None:
        for number, token in enumerate(tokens):
            iiot.insert_device(connection, 1, f"press-{number:04}", token.stored, {})

    iiot.change_database(plant.database, add)
    return [await (await plant.connect()).hello(token.text) for token in tokens]


async def wait_in_the_writer(plant: Plant, devices: list[Device], bound: Bound, *frames: dict[str, Any]) -> None:
    """All send the same while nothing can be stored, until as much waits as can; then all is stored. They must have twice as much, for
    one batch is under way."""

    async def send(device: Device) -> None:
        for frame in frames:
            device.seq += 1
            await device.link.send_str(json.dumps({**frame, "seq": device.seq}))

    bound.batches.clear()
    with locked(plant.database):
        sending = asyncio.gather(*map(send, devices))
        async with asyncio.timeout(PATIENCE):
            while not bound.full:
                await asyncio.sleep(0.01)
    await sending
    for device in devices:
        await device.acknowledged(device.seq)


@pytest.fixture
async def many(plant: Plant) -> AsyncIterator[Plant]:
    """The same, with a client that opens as many connections as it is asked for."""
    async with ClientSession(connector=TCPConnector(limit=0)) as client:
        yield Plant(plant.url, client, plant.token, plant.database)


async def test_the_most_reports_of_state_that_can_wait_are_stored(bound: Bound, many: Plant) -> None:
    plant, devices = many, await connected(many, 2 * REPORTS + 2)
    document = document_of(DOCUMENT - 20)
    with plants.writing(plant.database) as connection:
        connection.execute(
            "insert into state (device_id, version, at, session, document, changes) select id, 1, 0, 1, ?, '[]' from device",
            (json.dumps(document),),
        )
    await wait_in_the_writer(plant, devices, bound, {"type": "state", "reported": {"n": 1}})
    assert bound.most(lambda batch: len(batch.states)) >= REPORTS
    assert DOCUMENT / 2 < bound.longest <= LONGEST
    for name in ("press-0000", "press-0300", "press-0999"):
        assert (await plant.get(f"/iiot/{name}/state"))["reported"] == {**document, "n": 1}
    counted = "select version, count(*), sum(document <> '') from state group by version"
    assert plants.rows(plant.database, counted) == [(1, len(devices), len(devices)), (2, len(devices), len(devices))]


def long_name(value: int) -> dict[str, Any]:
    """A document with one long name around many short ones."""
    return {'"/~' * 5_000: {f"{number:x}": value for number in range(3_000)}, "n": value}


@pytest.mark.parametrize("mode", ["merge", "replace"])
async def test_a_long_name_does_not_stand_in_each_of_the_changes_below_it(bound: Bound, plant: Plant, mode: str) -> None:
    """There it would be 40 million characters of one report, and a gigabyte of those that can wait."""
    assert len(iiot.canonical(long_name(1))) <= DOCUMENT
    frame = {"type": "state", "mode": mode, "reported": long_name(1)}
    reports = PENDING_BYTES // (len(json.dumps(frame)) * LIMITS.state_weight)
    devices = await connected(plant, 2 * reports + 4)
    for value in (1, 2):
        await wait_in_the_writer(plant, devices, bound, {**frame, "reported": long_name(value)})
        assert bound.most(lambda batch: len(batch.states)) >= reports
    assert bound.longest <= LONGEST
    ((longest,),) = plants.rows(plant.database, "select max(length(cast(changes as blob))) from state")
    assert longest <= 2 * DOCUMENT + 100
    newest = (await plant.get("/iiot/press-0007/state/history?limit=1"))["items"][0]
    assert newest["changes"] == [{"path": "", "from": long_name(1), "to": long_name(2)}]
    await devices[0].send("state", seq=3, reported={"n": 3})
    await devices[0].acknowledged(3)
    for version, value in ((1, 1), (2, 2)):
        assert (await plant.get(f"/iiot/press-0000/state?version={version}"))["reported"] == long_name(value)
    assert (await plant.get("/iiot/press-0000/state"))["reported"] == {**long_name(2), "n": 3}


async def test_the_most_verdicts_that_can_wait_are_stored(bound: Bound, plant: Plant) -> None:
    (device,) = await connected(plant, 1)
    assert (await plant.ask("POST", "/iiot/press-0000", {"n": 1}))[0] == 202
    await device.expect("config")
    errors = [{"path": '"' * 1_000, "code": "x", "message": "\\" * 1_000} for _ in range(14)]
    verdict = {"type": "config_status", "version": 1, "status": "rejected", "errors": errors}
    frames = 2 * PENDING_BYTES // len(json.dumps(verdict)) + 2
    await wait_in_the_writer(plant, [device], bound, *[verdict] * frames)
    assert bound.most(lambda batch: batch.weight) > LIMITS.pending_points * 0.99
    assert iiot.TEXT_BYTES / 2 < bound.longest <= LONGEST
    assert (await plant.get("/iiot/press-0000/config"))["errors"] == errors
    assert plants.rows(plant.database, "select count(*) from event where kind = 'config' and detail like '%rejected%'") == [(frames,)]


def test_more_points_than_can_wait_are_stored_in_parts(tmp_path: Path) -> None:
    """Devices that were held back for their tenant's quota let go of all they hold at once."""
    iiot.prepare_database(tmp_path / "iiot.db")
    batch, texts = iiot.Batch(), list[int]()
    expected = {(series, ts, series * ts) for series in range(1, 100) for ts in range(1, 50)}
    for series, ts, value in sorted(expected):
        batch.points.setdefault(str(series), {})[str(ts)] = value
    with closing(iiot.connect(tmp_path / "iiot.db")) as connection:
        connection.set_trace_callback(lambda sql: texts.append(len(sql)) if "insert into telemetry" in sql else None)
        batch.write(connection, attrs.evolve(LIMITS, pending_points=100), iiot.Dictionary(0))
        connection.set_trace_callback(None)
        assert set(connection.execute("select series_id, ts, value from telemetry")) == expected
    assert len(texts) > 20
    assert max(texts) < 10_000


def test_a_part_is_no_longer_than_is_said_and_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    monkeypatch.setattr(iiot, "TEXT_BYTES", 1_000)
    for _ in range(200):
        rows = [["x" * chance.choice([0, 10, 300, 999, 2_000])] for _ in range(chance.randrange(12))]
        parts = [text for (text,) in iiot.bind_in_parts(rows)]
        assert [row for text in parts for row in json.loads(text)] == rows
        assert all(len(text) <= 1_100 or len(json.loads(text)) == 1 for text in parts)
        assert all(len(one) + len(other) > 1_000 for one, other in pairwise(parts)), "none is cut needlessly"


def test_reports_in_many_parts_are_what_they_are_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iiot, "TEXT_BYTES", 200)
    monkeypatch.setattr(iiot, "REPORTING", 1)
    modes = ("merge", "merge", "replace")
    steps: list[Step] = [(modes[number % 3], {f"n{number % 4}": number, "x": "y" * (number % 7)}) for number in range(120)]
    asyncio.run(play([(number % 2, step) for number, step in enumerate(steps)]))


async def test_verdicts_in_many_parts_are_refused_and_taken_each(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iiot, "TEXT_BYTES", 200)
    device = await plant.device("press-1")
    assert (await plant.ask("POST", "/iiot/press-1", {"n": 1}))[0] == 202
    await device.expect("config")
    with locked(plant.database):
        for seq in range(1, 41):
            await device.send("config_status", seq=seq, version=1 + seq % 3, status="applied", message=f"number {seq}")
    refused = [(await device.expect("error"))["seq"] for seq in range(1, 41) if seq % 3]
    assert refused == [seq for seq in range(1, 41) if seq % 3]
    await device.acknowledged(40)
    config = await plant.get("/iiot/press-1/config")
    assert (config["status"], config["message"], config["applied"]) == ("applied", "number 39", 1)
    events = (await plant.get("/iiot/press-1/events?kind=config&limit=1000"))["items"]
    told = [event["message"] for event in events if event["status"] == "applied"]
    assert told == [f"number {seq}" for seq in range(39, 0, -3)]


async def test_nobody_hears_of_a_batch_before_all_its_parts_are_stored(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are of one transaction."""
    monkeypatch.setattr(iiot, "TEXT_BYTES", 200)
    device = await plant.device("press-1")
    failing = "create trigger fail before insert on state when new.version = 30 begin select raise(abort, 'the disk is broken'); end"
    with plants.writing(plant.database) as connection:
        connection.execute(failing)
    with locked(plant.database):
        for seq in range(1, 41):
            await device.send("state", seq=seq, reported={"n": seq})
        await plant.get("/iiot")
    assert (await device.closed()).code == 1013
    assert "the disk is broken" in caplog.text
    ((versions, seq),) = plants.rows(plant.database, "select count(*), (select seq from presence) from state")
    assert versions == seq < 29, "those of the batches before it alone"
