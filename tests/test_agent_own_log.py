"""What the agent itself logs, sent as lines: all of it once, and without an end that feeds on itself."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from devices import played, started
from storing import TOKEN, Store, running, until

import agent

log = logging.getLogger("iiot")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="")
    for name, value in (("RETRY_SECONDS", 0.01), ("LOG_SECONDS", 0.01), ("CURSOR_SECONDS", 0.01)):
        monkeypatch.setattr(agent, name, value)


async def test_what_the_agent_logs_is_sent_with_its_level_and_without_secrets(tmp_path: Path) -> None:
    store = Store()
    async with played(store.play) as url, running(tmp_path, url, own_log=True):
        await until(lambda: any("connected as press-1" in message for message in store.messages))
        log.error("a token: %s", TOKEN)
        log.debug("not at this level")
        await asyncio.to_thread(logging.getLogger("other").warning, "from a thread")
        await until(lambda: "from a thread" in store.messages)
    lines = {entry["message"]: (entry["level"], entry["logger"]) for entry in store.entries}
    assert lines["from a thread"] == ("warning", "other")
    (told,) = [message for message in lines if message.startswith("a token: ")]
    assert lines[told] == ("error", "iiot")
    assert TOKEN not in told
    assert "not at this level" not in lines
    assert not [handler for handler in logging.getLogger().handlers if isinstance(handler, agent.OwnLog)]


async def test_a_process_sends_each_of_its_lines_once(tmp_path: Path) -> None:
    store = Store()
    arguments = ("--token", TOKEN, "--name", "press-1", "--own-log")
    async with played(store.play) as url, started(tmp_path, "--url", url, *arguments) as device:
        await device.line("connected as press-1")
        await until(lambda: store.messages)
        await store.sessions[-1].send("config", version=1, document={"speed": 1})
        await until(lambda: len(store.messages) >= 2)
    assert store.messages == ["connected as press-1, session 1", "configuration 1 applied"]


async def test_what_is_logged_because_of_lines_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that takes no lines: each refusal is logged, and none of that makes another line."""
    store = Store(refuses=lambda frame: {"code": "unknown_type", "message": "What?"} if frame["type"] == "log" else None)
    async with played(store.play) as url, running(tmp_path, url, own_log=True) as device:
        await until(lambda: store.refused and len(device._spool) == 0)
        await store.sessions[-1].send("throttled", limit="log_bytes_per_day", retry_after=0.01)
        await until(lambda: "log_bytes_per_day is used up" in caplog.text)
        log.info("one more")
        await until(lambda: "one more" in sent_lines(store))
        await until(lambda: len(device._spool) == 0)
        count = len(store.refused)
        assert caplog.text.count("lost a frame of log") == count
    assert not [message for message in sent_lines(store) if "lost a frame" in message or "used up" in message]


def sent_lines(store: Store) -> list[str]:
    return [entry["message"] for frame in store.refused for entry in frame["entries"]]


async def test_beyond_a_bound_the_oldest_lines_are_lost_and_it_is_said_how_many(tmp_path: Path) -> None:
    spool = agent.Spool(10_000)
    own = agent.OwnLog(agent.LogFrames("own log", spool, agent.Level(), None))
    for number in range(agent.OWN_LINES + 7):
        own.handle(logging.LogRecord("iiot", logging.INFO, "", 0, f"line {number}", None, None))
    await own._send()
    lines = [entry for frame in spool._waiting for entry in frame.content["entries"]]
    assert (lines[0]["level"], lines[0]["message"]) == ("warning", "7 lines of this log are lost")
    assert [line["message"] for line in lines[1:]] == [f"line {number}" for number in range(7, agent.OWN_LINES + 7)]


async def test_with_the_journal_its_own_lines_come_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "journalctl"
    program.parent.mkdir()
    entries: list[dict[str, Any]] = [
        {"__CURSOR": str(number), "MESSAGE": f"line {number}", "_PID": str(pid)} for number, pid in enumerate((1, os.getpid(), 2))
    ]
    told = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    body = f"import sys, time\nif '--lines=0' in sys.argv:\n    print({told!r}, flush=True)\ntime.sleep(60)\n"
    program.write_text(f"#!{sys.executable}\n{body}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    store = Store()
    options: dict[str, Any] = {"journal": True, "own_log": True, "cursor_file": str(tmp_path / "cursors.json")}
    async with played(store.play) as url, running(tmp_path, url, **options):
        await until(lambda: "line 2" in store.messages)
    assert [message for message in store.messages if message.startswith("line ")] == ["line 0", "line 2"]


@pytest.mark.parametrize(
    ("number", "level"),
    [(10, "debug"), (19, "debug"), (20, "info"), (25, "notice"), (30, "warning"), (40, "error"), (50, "critical"), (99, "critical")],
)
def test_the_level_of_a_record_is_the_next_lower_one(number: int, level: str) -> None:
    assert agent.level_numbered(number) == level
