"""The agent and lines of logs: frames of them, and the level that a configuration asks for. The server is one that the tests play,
which stores by the wire contract."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from devices import played
from hypothesis import given
from hypothesis import strategies as st
from storing import Store, running, until

import agent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "RETRY_SECONDS", 0.01)


async def applied(device: agent.Agent, version: int) -> None:
    await until(lambda: device._configurations.version == version)


def line(number: int, level: str = "info", message: str = "") -> dict[str, Any]:
    return agent.log_entry(level, message or f"line {number}", 1_767_225_600_000 + number)


# ---- frames


async def test_lines_are_stored_once_whatever_breaks_between_their_storing_and_the_answer(tmp_path: Path) -> None:
    store = Store(loses=lambda received: received % 3 == 2)
    async with played(store.play) as url, running(tmp_path, url) as device:
        frames = agent.LogFrames("test", device._spool, agent.Level(), device._cursors)
        for number in range(60):
            await frames.add(line(number), {"number": number})
            if number % 3 == 2:
                await frames.put()
        await until(lambda: len(store.entries) >= 60 and len(device._spool) == 0, lambda: store.messages)
    assert store.messages == [f"line {number}" for number in range(60)]
    assert len(store.sessions) > 5
    assert [frame["seq"] for frame in store.frames] == sorted({frame["seq"] for frame in store.frames})


async def test_the_server_takes_a_frame_of_lines_as_the_agent_writes_it(tmp_path: Path) -> None:
    """By the contract's own words: nothing but these fields, and these levels."""
    store = Store()
    async with played(store.play) as url, running(tmp_path, url) as device:
        frames = agent.LogFrames("test", device._spool, agent.Level(), device._cursors)
        entry = agent.log_entry("warning", "Überhitzt\0 ☃ \ud800", 1_767_225_600_000, "pump", {"unit": "a" * 5_000, "pid": 7})
        await frames.add(entry, {})
        await frames.add(agent.log_entry("info", "the clock stood in 1970", 1_000), {})
        await frames.put()
        await until(lambda: len(store.entries) == 2)
    (frame,) = store.of("log")
    assert set(frame) == {"type", "seq", "entries"}
    first, second = frame["entries"]
    assert first == {
        "ts": 1_767_225_600_000, "level": "warning", "message": "Überhitzt␀ ☃ ?", "logger": "pump",
        "fields": {"unit": "a" * (1_024 - len("… (cut)")) + "… (cut)", "pid": 7},
    }  # fmt: skip
    assert second == {"level": "info", "message": "the clock stood in 1970"}


@given(st.text(max_size=20_000) | st.integers(8_180, 8_200).map("x".__mul__))
def test_a_message_that_is_too_long_is_cut_and_says_so(text: str) -> None:
    message = agent.log_entry("info", text, 0)["message"]
    assert len(message) <= 8_192
    assert message == text.replace("\0", "\u2400") if len(text) <= 8_192 else message.endswith("… (cut)")


def test_fields_that_are_too_many_are_left_out() -> None:
    assert "fields" not in agent.log_entry("info", "a", 0, fields={f"field {number}": "x" * 1_000 for number in range(70)})
    assert "fields" in agent.log_entry("info", "a", 0, fields={f"field {number}": "x" * 1_000 for number in range(60)})


@pytest.mark.parametrize("message", ["x", "\1" * 9_000, "☃" * 9_000])
async def test_a_frame_of_lines_is_far_smaller_than_a_frame_may_be(message: str) -> None:
    spool = agent.Spool(10_000)
    frames = agent.LogFrames("test", spool, agent.Level(), agent.Cursors(Path("unused")))
    for number in range(1_200):
        await frames.add(line(number, message=message), {"number": number})
        if spool._line_bytes >= agent.LOG_SPOOL_BYTES:
            break
    sent = [frame.content for frame in spool._waiting]
    assert len(sent) > 1
    assert all(len(json.dumps(content)) < agent.FRAME_BYTES / 4 for content in sent)
    assert all(len(content["entries"]) <= agent.LOG_ENTRIES for content in sent)


async def test_of_refused_lines_the_bad_ones_alone_are_lost(tmp_path: Path) -> None:
    def fault(frame: dict[str, Any]) -> dict[str, Any] | None:
        for index, entry in enumerate(frame.get("entries", [])):
            if entry["message"] in ("line 7", "line 31"):
                path = f"entries[{index}].message" if entry["message"] == "line 7" else ""
                return {"code": "invalid", "message": "It is bad.", "errors": [{"path": path, "message": "is odd"}]}
        return None

    store = Store(refuses=fault)
    async with played(store.play) as url, running(tmp_path, url) as device:
        frames = agent.LogFrames("test", device._spool, agent.Level(), device._cursors)
        for number in range(50):
            await frames.add(line(number), {"number": number})
        await frames.put()
        await until(lambda: len(store.entries) == 48 and len(device._spool) == 0, lambda: store.messages)
        assert len(store.refused) <= 8, "once for the line that was named, as often as one halves for the other"
        assert device._spool._line_bytes == 0
    assert sorted(store.messages) == sorted(f"line {number}" for number in range(50) if number not in (7, 31))


async def test_a_server_that_knows_no_lines_is_asked_once_for_each_frame(tmp_path: Path) -> None:
    store = Store(refuses=lambda frame: {"code": "unknown_type", "message": "What?"} if frame["type"] == "log" else None)
    async with played(store.play) as url, running(tmp_path, url) as device:
        frames = agent.LogFrames("test", device._spool, agent.Level(), device._cursors)
        for number in range(50):
            await frames.add(line(number), {"number": number})
        await frames.put()
        await until(lambda: store.refused and len(device._spool) == 0)
        assert len(store.refused) == 1


async def test_lines_wait_for_room_and_leave_half_of_the_spool_to_readings() -> None:
    spool = agent.Spool(10)
    frames = agent.LogFrames("test", spool, agent.Level(), agent.Cursors(Path("unused")))

    async def write() -> None:
        for number in range(20):
            await frames.add(line(number), {"number": number})
            await frames.put()

    writing = asyncio.create_task(write())
    await asyncio.wait((writing,), timeout=0.05)
    assert not writing.done()
    assert len(spool) == 6
    for number in range(20):
        await spool.put({"type": "telemetry", "samples": [{"ts": number, "values": {}}]})
    kinds = [frame.kind for frame in spool._waiting]
    assert kinds == ["log"] * 6 + ["telemetry"] * 4, "the oldest readings are let go of, and no line"
    assert spool.dropped == 16
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)


# ---- the level that a configuration asks for


async def test_the_level_of_the_configuration_decides_which_lines_are_sent(tmp_path: Path) -> None:
    store = Store()
    levels = tuple(agent.LEVELS)
    async with played(store.play) as url, running(tmp_path, url) as device:
        frames = agent.LogFrames("test", device._spool, device._level, device._cursors)

        async def write(version: int) -> None:
            for level in levels:
                await frames.add(agent.log_entry(level, f"{version} {level}", 1_767_225_600_000), {})
            await frames.put()

        await write(0)
        await until(lambda: store.sessions and store.entries)
        for version, document in enumerate(({"log_level": "warning"}, {"log_level": "notice", "speed": 3}, {"speed": 3}), 1):
            await store.sessions[-1].send("config", version=version, document=document)
            await applied(device, version)
            await write(version)
        await until(lambda: f"3 {levels[-1]}" in store.messages)
        assert logging.getLogger("iiot").level == logging.NOTSET
    assert [message for message in store.messages if message.startswith("1 ")] == ["1 warning", "1 error", "1 critical"]
    assert next(message for message in store.messages if message.startswith("2 ")) == "2 notice"
    assert [sum(message.startswith(number) for message in store.messages) for number in "03"] == [6, 6]


async def test_what_the_agent_logs_itself_follows_and_a_new_start_knows_it(tmp_path: Path) -> None:
    store = Store()
    async with played(store.play) as url:
        async with running(tmp_path, url):
            await until(lambda: store.sessions)
            await store.sessions[-1].send("config", version=1, document={"log_level": "error"})
            await until(lambda: logging.getLogger("iiot").level == logging.ERROR)
        async with running(tmp_path, url) as device:
            assert logging.getLogger("iiot").level == logging.ERROR
            assert [level for level in agent.LEVELS if device._level.takes(level)] == ["error", "critical"]


@pytest.mark.parametrize("level", ["loud", "WARNING", "", None, 30, ["info"], {}])
async def test_a_level_that_is_none_rejects_the_configuration_with_its_path(tmp_path: Path, level: Any) -> None:
    store = Store()
    async with played(store.play) as url, running(tmp_path, url, on_config=f"touch {tmp_path}/ran") as device:
        await until(lambda: store.sessions)
        await store.sessions[-1].send("config", version=4, document={"log_level": level})
        await until(lambda: store.of("config_status"))
        assert device._level.takes("debug")
    (verdict,) = store.of("config_status")
    told = "is none of debug, info, notice, warning, error, critical"
    assert (verdict["version"], verdict["status"], verdict["message"]) == (4, "rejected", f"log_level {told}")
    assert verdict["errors"] == [{"path": "log_level", "code": "value", "message": told}]
    assert not (tmp_path / "press-1.config.json").exists()
    assert not (tmp_path / "ran").exists(), "the command is not asked"
