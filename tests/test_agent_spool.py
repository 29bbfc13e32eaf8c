"""The agent's spool on the disk: frames that survive restarts and power cuts, each stored once."""

from __future__ import annotations

import asyncio
import io
import json
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from devices import Caller, free_port, played, started
from hypothesis import given, settings
from hypothesis import strategies as st
from plant import agent_command
from storing import TOKEN, Store, running, until

import agent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RETRY_SECONDS", 0.01), ("LOG_SECONDS", 0.01), ("CURSOR_SECONDS", 0.01), ("SYNC_SECONDS", 0.01)):
        monkeypatch.setattr(agent, name, value)


def reading(number: int, samples: int = 1) -> dict[str, Any]:
    stamps = [agent.EARLIEST + number * 100 + index for index in range(samples)]
    return {"type": "telemetry", "samples": [{"ts": stamp, "values": {"a": stamp}} for stamp in stamps]}


def records(path: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.read(len(agent.SPOOL_HEADER))
        return [record for record, _ in agent.unpack(file)]
    return []


def made(path: Path) -> list[dict[str, Any]]:
    """What was put into a file that was not written anew."""
    return [content for record in records(path) for _, content in record.get("frames", [])]


@asynccontextmanager
async def spooled(path: Path, most: int = 3_000_000, cursors: agent.Cursors | None = None) -> AsyncIterator[agent.Spool]:
    """A spool on the disk, as after a start; at the end it is as after a power cut: what was not written is lost."""
    known = cursors or agent.Cursors(path.with_name("cursors.json"))
    file = agent.SpoolFile(path)
    ledger = agent.Ledger(file, most)
    spool = agent.Spool(10_000, ledger)
    spool.load(known)
    keeping = asyncio.create_task(ledger.keep(spool.size, lambda: spool.records(known)))
    try:
        yield spool
        assert not keeping.done(), keeping
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        ledger._pending.clear()
        await ledger.close()


async def on_disk(spool: agent.Spool) -> None:
    """Wait until all that the spool did is on the disk."""
    assert spool._ledger is not None
    await spool._ledger.synced(spool._ledger.note({}))


# ---- the form of the file

RECORDS = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=40), min_size=1, max_size=3), max_size=8)


def read_back(data: bytes) -> list[dict[str, Any]]:
    return [record for record, _ in agent.unpack(io.BytesIO(data))]


@given(RECORDS, st.data())
def test_whatever_is_cut_off_the_records_before_it_are_read_and_nothing_is_invented(
    rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    packed = [agent.pack(row) for row in rows]
    whole = b"".join(packed)
    assert read_back(whole) == rows
    stop = data.draw(st.integers(0, len(whole)))
    kept = sum(len(b"".join(packed[: number + 1])) <= stop for number in range(len(packed)))
    assert read_back(whole[:stop]) == rows[:kept]


@given(RECORDS, st.binary(min_size=1, max_size=60) | st.integers(1, 5_000).map(bytes), st.data())
def test_whatever_stands_at_the_end_the_records_before_it_are_read_and_nothing_is_invented(
    rows: list[dict[str, Any]], damage: bytes, data: st.DataObject
) -> None:
    """Zeros, as file systems leave them, or anything else, written over the end or behind it."""
    packed = [agent.pack(row) for row in rows]
    whole = b"".join(packed)
    start = data.draw(st.integers(0, len(whole)))
    torn = whole[:start] + damage
    kept = sum(len(b"".join(packed[: number + 1])) <= start for number in range(len(packed)))
    found = read_back(torn)
    assert found[:kept] == rows[:kept]
    assert found == rows[: len(found)]


@given(st.binary(min_size=1, max_size=300))
def test_what_is_no_record_is_none(noise: bytes) -> None:
    assert read_back(noise) == []


def test_a_number_that_was_given_again_is_nobody_elses() -> None:
    """As after a broken link, where parts of a refused frame go before one that had their number."""
    found = agent.Found()
    for record in (
        {"frames": [[1, {"a": 1}], [2, {"a": 2}], [3, {"a": 3}]]}, {"number": [1, 5]}, {"number": [2, 6]}, {"number": [3, 7]},
        {"instead": 1, "frames": [[4, {"a": 4}], [5, {"a": 5}]]}, {"number": [4, 6]}, {"done": [9]},
    ):  # fmt: skip
        found.add(record)
    assert [(frame.key, frame.seq) for frame, _ in found.in_order()] == [(4, 6), (5, 0), (2, 0), (3, 0)]
    assert found.last_key == 5


# ---- a model: whatever happens, each frame is stored once

STEPS = st.lists(
    st.sampled_from(["put", "put", "wide", "send", "send", "store", "answer", "break", "write", "power cut", "refuse"]), max_size=40
)


class Peer:
    """A server: what it has, and up to which number."""

    def __init__(self) -> None:
        self.seq = 0
        self.disk: list[int] = []

    def store(self, frame: dict[str, Any]) -> None:
        assert frame["seq"] > 0
        if frame["seq"] > self.seq:
            self.seq = frame["seq"]
            self.disk += [sample["ts"] for sample in frame["samples"]]

    def refuse(self, frame: dict[str, Any]) -> None:
        self.seq = max(self.seq, frame["seq"])


class Model:
    """A device whose power fails, its server, and what lies between them."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.way: list[dict[str, Any]] = []
        self.safe: set[int] = set()  # is on the disk, or at the server
        self.made: list[int] = []
        self.fresh: list[int] = []  # since the start

    async def lead(self, path: Path, steps: list[str]) -> None:
        while True:
            rest = steps.index("power cut") if "power cut" in steps else len(steps)
            async with spooled(path, 60_000) as spool:
                await spool.resume(self.peer.seq)
                for step in steps[:rest]:
                    await self.step(spool, step)
                if rest == len(steps):
                    await self.finish(spool)
                    return
            self.way.clear()
            self.fresh.clear()
            steps = steps[rest + 1 :]

    async def step(self, spool: agent.Spool, step: str) -> None:
        if step in ("put", "wide"):
            content = reading(len(self.made), 9 if step == "wide" else 1)
            self.fresh += [sample["ts"] for sample in content["samples"]]
            self.made += [sample["ts"] for sample in content["samples"]]
            await spool.put(content)
        elif step == "send":
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2 if spool._waiting and not spool._sent else 0.02):
                    self.way.append(json.loads((await spool.next()).text))
        elif step == "store" and self.way:
            self.peer.store(self.way.pop(0))
        elif step == "refuse" and self.way and len(self.way[0]["samples"]) > 1 and self.way[0]["seq"] > self.peer.seq:
            refused = self.way.pop(0)
            self.peer.refuse(refused)
            frame = spool.refuse(refused["seq"])
            assert frame is not None
            again = [sample["ts"] for sample in refused["samples"]]  # the server is done with them, until their parts are on the disk
            self.safe.difference_update(again)
            self.fresh += again
            await spool.put_first(agent.halves(frame), frame)
        elif step == "answer":
            await spool.acknowledge(self.peer.seq)
        elif step == "break":
            self.way.clear()
            await spool.resume(self.peer.seq)
        elif step == "write":
            await on_disk(spool)
            self.safe.update(self.fresh)

    async def finish(self, spool: agent.Spool) -> None:
        self.way.clear()
        await spool.resume(self.peer.seq)
        while len(spool):
            self.peer.store(json.loads((await asyncio.wait_for(spool.next(), 5)).text))
            await spool.acknowledge(self.peer.seq)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.sampled_from([10_000, 150]))
def test_through_power_cuts_each_frame_is_stored_once_and_none_is_lost_that_was_on_the_disk(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], frame_most: int
) -> None:
    path, model = tmp_path_factory.mktemp("spool") / "spool", Model()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SYNC_SECONDS", 0.0), ("SYNC_GATHER_SECONDS", 0.0), ("SPOOL_SLACK", 300), ("FRAME_BYTES", frame_most)):
            patch.setattr(agent, name, value)
        asyncio.run(model.lead(path, steps))
    assert len(model.peer.disk) == len(set(model.peer.disk)), "none twice"
    assert model.safe <= set(model.peer.disk) <= set(model.made)
    if "power cut" not in steps:
        assert set(model.peer.disk) == set(model.made)


# ---- the agent


def arguments(folder: Path, url: str, *more: str) -> tuple[str, ...]:
    return ("--url", url, "--token", TOKEN, "--name", "press-1", "--spool-file", str(folder / "spool"), *more)


async def test_readings_of_an_outage_survive_a_killed_agent(tmp_path: Path) -> None:
    path, store = tmp_path / "spool", Store()
    async with started(tmp_path, *arguments(tmp_path, f"http://127.0.0.1:{free_port()}", "--interval", "0.02")) as device:
        await device.line("no session")
        await until(lambda: len(made(path)) > 20)
        device.process.kill()
        await device.end()
    kept = [content["samples"] for content in made(path) if content["type"] == "telemetry"]
    async with played(store.play) as url, started(tmp_path, *arguments(tmp_path, url, "--interval", "3600")) as device:
        await device.line("frames that the server may not have")
        await until(lambda: len(store.of("telemetry")) == len(kept) + 1)
    assert [frame["samples"] for frame in store.of("telemetry")][:-1] == kept


@pytest.mark.parametrize("end", ["kill", "terminate"])
async def test_frames_that_were_stored_and_not_acknowledged_are_stored_once_after_a_restart(tmp_path: Path, end: str) -> None:
    """Readings and lines: they keep their numbers."""
    file, store = tmp_path / "app.log", Store(answers=False)
    more = ("--interval", "0.1", "--log-file", str(file))
    async with played(store.play) as url:
        async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
            await device.line("connected as press-1")
            for number in range(5):
                with file.open("a") as writing:
                    print(f"line {number}", file=writing)
                await until(lambda number=number: f"line {number}" in store.messages)  # type: ignore[misc]
            getattr(device.process, end)()
            await device.end()
        store.answers, before = True, store.seq
        async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
            await device.line("connected as press-1")
            with file.open("a") as writing:
                print("last", file=writing)
            await until(lambda: "last" in store.messages)
    assert store.messages == [*(f"line {number}" for number in range(5)), "last"]
    numbers = [frame["seq"] for frame in store.frames]
    assert numbers == list(range(1, len(numbers) + 1)), "nor is a number left out"
    assert len(numbers) > before
    stamps = [frame["samples"][0]["ts"] for frame in store.of("telemetry")]
    assert len(stamps) == len(set(stamps))


async def test_a_frame_is_on_the_disk_with_its_number_before_it_is_sent(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(frame: dict[str, Any]) -> None:
        numbered = [record["number"][1] for record in records(tmp_path / "spool") if "number" in record]
        assert frame["seq"] in numbered
        seen.append(frame["seq"])

    store = Store(refuses=look)
    async with played(store.play) as url, running(tmp_path, url, spool_file=str(tmp_path / "spool")) as device:
        for number in range(40):
            await device._spool.put(reading(number))
        await until(lambda: len(seen) >= 42)


async def test_the_disk_is_synced_so_often_and_not_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    real = os.fsync

    def count(number: int) -> None:
        real(number)
        synced.append(time.monotonic())

    monkeypatch.setattr(agent, "SYNC_SECONDS", 0.1)
    async with spooled(tmp_path / "spool") as spool:
        monkeypatch.setattr(os, "fsync", count)
        for number in range(200):
            await spool.put(reading(number))
            await asyncio.sleep(0.002)
        await on_disk(spool)
        assert len(made(tmp_path / "spool")) == 200
    assert len(synced) > 2
    assert all(later - earlier >= 0.1 for earlier, later in pairwise(synced))


async def test_frames_that_are_ready_go_to_the_disk_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "SYNC_SECONDS", 3_600.0)  # the first write is the last one
    async with spooled(tmp_path / "spool") as spool:
        for number in range(30):
            await spool.put(reading(number))
        async with asyncio.timeout(5):
            sent = [await spool.next() for _ in range(30)]
    assert [frame.seq for frame in sent] == list(range(1, 31))


async def test_the_cursor_of_a_log_file_lies_in_the_spool_and_moves_when_lines_are_acknowledged(tmp_path: Path) -> None:
    file, store, taken = tmp_path / "app.log", Store(), list[str]()
    file.touch()
    options: dict[str, Any] = {"log_file": agent.Paths(str(file)), "cursor_file": str(tmp_path / "c")}
    options["spool_file"] = str(tmp_path / "spool")

    async def take(caller: Caller) -> None:
        await caller.welcome()
        while True:
            taken.extend(entry["message"] for entry in (await caller.receive()).get("entries", []))

    async with played(take) as url, running(tmp_path, url, **options):
        await until(lambda: '"offset": 0' in ((tmp_path / "c").read_text() if (tmp_path / "c").exists() else ""))
        file.write_text("one\ntwo\n")
        await until(lambda: taken == ["one", "two"])
    file.write_text("one\ntwo\nthree\n")
    assert '"offset": 0' in (tmp_path / "c").read_text()
    async with played(store.play) as url, running(tmp_path, url, **options):
        await until(lambda: len(store.messages) >= 3)
        await until(lambda: '"offset": 14' in (tmp_path / "c").read_text())
    assert store.messages == ["one", "two", "three"]


# ---- a bound, and a disk that takes nothing


async def test_a_full_spool_lets_go_of_the_oldest_readings_and_the_file_keeps_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "SPOOL_SLACK", 2_000)
    path, most = tmp_path / "spool", 60_000
    lines = agent.LogFrames("a", agent.Spool(1), agent.Level(), agent.Cursors(tmp_path / "c"))
    async with spooled(path, most) as spool:
        lines._spool = spool
        writing = asyncio.create_task(write_lines(lines, 200))
        for number in range(600):
            await spool.put(reading(number))
            if number % 20 == 0:
                await on_disk(spool)
                assert path.stat().st_size + spool._bytes <= most
        assert not writing.done(), "lines wait"
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        kept = [frame.content for frame in spool._waiting]
        assert 0.45 < sum(frame.size for frame in spool._waiting if frame.kind == "log") / spool._bytes < 0.6
        assert spool.dropped == 600 - sum(content["type"] == "telemetry" for content in kept)
        await on_disk(spool)
    async with spooled(path, most) as spool:
        assert [frame.content for frame in spool._waiting] == kept
    assert kept[-1] == reading(599)


async def write_lines(frames: agent.LogFrames, count: int) -> None:
    for number in range(count):
        await frames.add(agent.log_entry("info", "x" * 300, agent.EARLIEST), {"offset": number})
        await frames.put()


async def test_while_the_disk_is_full_frames_are_sent_and_afterwards_all_that_wait_are_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files, which the system answers as it does where there is no room."""
    monkeypatch.setattr(agent, "SPOOL_RETRY_SECONDS", 0.02)
    caplog.set_level("INFO")
    path = tmp_path / "spool"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with spooled(path) as spool:
        await spool.put(reading(0))
        await on_disk(spool)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        try:
            for number in range(1, 5):
                await spool.put(reading(number))
            async with asyncio.timeout(5):
                sent = [(await spool.next()).seq for _ in range(5)]
            assert "frames are kept in memory alone: cannot write the spool file: " in caplog.text
            assert made(path) == [reading(0)], "no part of what was not written"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await until(lambda: "the spool file is written again" in caplog.text)
        assert sent == [1, 2, 3, 4, 5]
    async with spooled(path) as spool:
        assert [frame.content for frame in spool._sent] == [reading(number) for number in range(5)]


# ---- what cannot be used


async def test_a_torn_end_is_told_and_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "spool"
    async with spooled(path) as spool:
        await spool.put(reading(0))
        await on_disk(spool)
    with path.open("ab") as file:
        file.write(agent.pack(reading(1))[:-3])
    async with spooled(path) as spool:
        await spool.put(reading(2))
        await on_disk(spool)
    assert f"{path}: {len(agent.pack(reading(1))) - 3} bytes at its end are no whole record, and are cut off" in caplog.text
    async with spooled(path) as spool:
        assert [frame.content for frame in spool._waiting] == [reading(0), reading(2)]


@pytest.mark.parametrize("content", [b"", b"\0", bytes(3 * agent.PIECE_BYTES + 7)], ids=["empty", "one zero", "zeros"])
async def test_a_file_that_a_power_cut_left_without_content_is_begun_anew_and_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "spool"
    path.write_bytes(content)
    async with spooled(path) as spool:
        await spool.put(reading(0))
        await on_disk(spool)
    assert f"{path} is empty or holds nothing but zeros, as after a power cut: it is begun anew" in caplog.text
    caplog.clear()
    async with spooled(path) as spool:
        assert [frame.content for frame in spool._waiting] == [reading(0)]
    assert caplog.text == ""


@pytest.mark.parametrize("content", [b"my notes\n", bytes(2 * agent.PIECE_BYTES) + b"my notes\n"], ids=["text", "zeros before text"])
async def test_another_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spool").write_bytes(content)
    code, _, err = await agent_command(*arguments(tmp_path, "http://127.0.0.1:9"), folder=tmp_path)
    assert (code, err) == (1, f"agent.py: {tmp_path / 'spool'} is no spool file of this agent; name another one\n")
    assert (tmp_path / "spool").read_bytes() == content


async def test_what_is_empty_and_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "spool").symlink_to(os.devnull)
    code, _, err = await agent_command(*arguments(tmp_path, "http://127.0.0.1:9"), folder=tmp_path)
    assert (code, err) == (1, f"agent.py: {tmp_path / 'spool'} is no spool file of this agent; name another one\n")
    assert (tmp_path / "spool").is_symlink()


async def test_two_agents_do_not_share_a_file(tmp_path: Path) -> None:
    store = Store()
    async with played(store.play) as url, started(tmp_path, *arguments(tmp_path, url)) as device:
        await device.line("connected as press-1")
        code, _, err = await agent_command(*arguments(tmp_path, url), folder=tmp_path)
    assert (code, err) == (1, f"agent.py: another agent uses {tmp_path / 'spool'}\n")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--spool-bytes", "1000"), "'1000' is not at least 8388608"),
        (("--replay", "run.csv"), "--replay sends a recording alone; leave out --spool-file"),
        (("--spool-file", "no-such-folder/spool"), "cannot use no-such-folder/spool: "),
    ],
)
async def test_what_cannot_be_is_refused_in_words(tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    code, _, err = await agent_command(*arguments(tmp_path, "http://127.0.0.1:9"), *more, folder=tmp_path)
    assert code in (1, 2)
    assert words in err
    assert "Traceback" not in err
