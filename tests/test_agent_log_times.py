"""The agent and the times of lines: a line is worth more than its time, so a wrong clock costs no line."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from devices import played
from hypothesis import given
from hypothesis import strategies as st
from plant import plant
from storing import Store, running, until

import agent
import iiot

DAYS = 86_400_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RETRY_SECONDS", 0.01), ("LOG_SECONDS", 0.01), ("CURSOR_SECONDS", 0.01)):
        monkeypatch.setattr(agent, name, value)


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Let the device's clock be so many milliseconds ahead."""
    monkeypatch.setattr(agent, "now_ms", lambda: iiot.now_ms() + ahead)


def entry(number: int, ts: int) -> dict[str, Any]:
    return agent.log_entry("info", f"line {number}", ts)


def refuses_times(frame: dict[str, Any]) -> dict[str, Any] | None:
    """As the server does it: the first line of a frame whose time it does not take."""
    late = [index for index, line in enumerate(frame.get("entries", [])) if line.get("ts", 0) > iiot.now_ms() + DAYS]
    fault = {"path": f"entries[{late[0]}].ts", "code": "time", "message": "is more than a day ahead"} if late else {}
    return {"code": "invalid", "message": "No.", "errors": [fault]} if late else None


@given(st.lists(st.integers(0, 9) | st.none(), min_size=1), st.integers(0, 9))
def test_times_that_are_too_late_are_left_out_and_nothing_else(times: list[int | None], latest: int) -> None:
    lines = [{"message": f"line {index}"} | ({} if ts is None else {"ts": ts}) for index, ts in enumerate(times)]
    content = {"type": "log", "entries": lines}
    left = agent.with_times_to(content, latest)
    assert [line["message"] for line in left["entries"]] == [line["message"] for line in lines]
    assert [line.get("ts") for line in left["entries"]] == [None if ts is None or ts > latest else ts for ts in times]
    assert left["type"] == "log"
    assert [line.get("ts") for line in lines] == times, "what is kept stays as it is"


async def test_the_servers_clock_says_which_times_are_too_late() -> None:
    spool, moment, hours = agent.Spool(9), 1_800_000_000_000, 3_600_000
    spool.learn_time(moment)
    times = [moment, moment + 23 * hours - 60_000, moment + 23 * hours + 60_000]
    await spool.put({"type": "log", "entries": [entry(number, ts) for number, ts in enumerate(times)]})
    sent = json.loads((await spool.next()).text)
    assert [line.get("ts") for line in sent["entries"]] == [*times[:2], None]


async def test_while_the_clock_is_days_ahead_lines_are_sent_without_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When the clock is set, lines have times again."""
    file, store = tmp_path / "app.log", Store()
    file.touch()
    set_clock(monkeypatch, 3 * DAYS)
    options: dict[str, Any] = {"log_file": agent.Paths(str(file)), "cursor_file": str(tmp_path / "cursors.json")}
    async with played(store.play) as url, running(tmp_path, url, **options) as device:
        await until((tmp_path / "cursors.json").exists)
        for number in range(3):
            with file.open("a") as writing:
                print(f"line {number}", file=writing)
            await until(lambda number=number: len(store.messages) > number)  # type: ignore[misc]
        assert all("ts" not in line for line in store.entries)
        set_clock(monkeypatch, 0)
        with file.open("a") as writing:
            print("line 3", file=writing)
        await until(lambda: len(store.messages) > 3)
        await until(lambda: len(device._spool) == 0)
    assert store.messages == [f"line {number}" for number in range(4)]
    assert [abs(line["ts"] - iiot.now_ms()) < 60_000 for line in store.entries if "ts" in line] == [True]
    assert "lost a frame of log" not in caplog.text


async def test_lines_that_were_made_before_the_first_session_are_sent_without_their_wrong_times(tmp_path: Path) -> None:
    store, spool = Store(refuses=refuses_times), str(tmp_path / "spool")
    async with running(tmp_path, "http://127.0.0.1:9", spool_file=spool) as device:
        for number in range(3):
            await device._spool.put({"type": "log", "entries": [entry(number, agent.now_ms() + number * DAYS)]})
        assert device._ledger is not None
        await device._ledger.synced(device._ledger.note({}))
    async with played(store.play) as url, running(tmp_path, url, spool_file=spool):
        await until(lambda: len(store.messages) >= 3)
    assert store.messages == ["line 0", "line 1", "line 2"]
    assert ["ts" in line for line in store.entries] == [True, False, False]
    assert store.refused == []


async def test_a_frame_that_is_refused_for_a_time_is_sent_again_without_any(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The server's clock may be set too, back by days."""

    def refuses(frame: dict[str, Any]) -> dict[str, Any] | None:
        timed = [index for index, line in enumerate(frame.get("entries", [])) if "ts" in line]
        errors = [{"path": f"entries[{index}].ts", "message": "is more than a day ahead"} for index in timed]
        return {"code": "invalid", "message": "No.", "errors": errors} if timed else None

    store = Store(refuses=refuses)
    async with played(store.play) as url, running(tmp_path, url) as device:
        for first in (0, 5):
            await device._spool.put({"type": "log", "entries": [entry(first + number, agent.now_ms()) for number in range(5)]})
            await until(lambda first=first: len(store.messages) >= first + 5 and len(device._spool) == 0)  # type: ignore[misc]
    assert store.messages == [f"line {number}" for number in range(10)]
    assert len(store.refused) == 2
    assert "lost a frame of log" not in caplog.text


async def test_a_server_that_refuses_a_time_where_there_is_none_is_not_asked_for_ever(tmp_path: Path) -> None:
    error = {"code": "invalid", "message": "No.", "errors": [{"path": "entries[0].ts", "message": "is missing"}]}
    store = Store(refuses=lambda frame: error if frame["type"] == "log" else None)
    async with played(store.play) as url, running(tmp_path, url) as device:
        await device._spool.put({"type": "log", "entries": [entry(1, agent.now_ms()), entry(2, agent.now_ms())]})
        await until(lambda: len(store.refused) >= 3 and len(device._spool) == 0)
    assert [len(frame["entries"]) for frame in store.refused] == [2, 2, 1]


async def test_the_server_stores_every_line_of_a_device_whose_clock_is_days_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "app.log"
    file.touch()
    set_clock(monkeypatch, 3 * DAYS)
    async with plant(tmp_path) as server:
        token = await server.register("press-1")
        options: dict[str, Any] = {"log_file": agent.Paths(str(file)), "cursor_file": str(tmp_path / "cursors.json")}
        async with running(tmp_path, server.url, **options) as device:
            device._token = token
            await until((tmp_path / "cursors.json").exists)
            for number in range(20):
                with file.open("a") as writing:
                    print(f"line {number}", file=writing)
                await server.until("/iiot/press-1/logs", lambda body, number=number: len(body["items"]) > number)
            lines = (await server.get("/iiot/press-1/logs"))["items"][::-1]
    assert [line["message"] for line in lines] == [f"line {number}" for number in range(20)]
    assert "lost a frame of log" not in caplog.text
    assert all(abs(datetime.fromisoformat(line["at"]).timestamp() * 1000 - iiot.now_ms()) < 60_000 for line in lines)
