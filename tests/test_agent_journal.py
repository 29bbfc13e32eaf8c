"""The agent and the system's journal. The journalctl here is a program of the test's own, a process on PATH as the real one is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from devices import Caller, played, started
from hypothesis import given
from hypothesis import strategies as st
from storing import TOKEN, Store, running, until

import agent

JOURNALCTL = f"""#!{sys.executable}
import json, os, pathlib, sys, time
folder = pathlib.Path(__file__).parent
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")
after = [word.split("=", 1)[1] for word in sys.argv if word.startswith("--after-cursor=")]
file = (folder / "journal").open("rb")
told = False
if "--lines=0" in sys.argv:
    file.seek(0, 2)
while True:
    line = file.readline()
    if not line:
        time.sleep(0.01)
    elif line.startswith(b"die"):
        if told:
            sys.exit("the journal was rotated")
    elif after:
        if line.startswith(b"{{") and json.loads(line).get("__CURSOR") == after[0]:
            after.clear()
    else:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        told = True
"""


@pytest.fixture(autouse=True)
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What journalctl tells, line by line; it stands first on PATH."""
    for name, value in (("RETRY_SECONDS", 0.01), ("LOG_SECONDS", 0.02), ("CURSOR_SECONDS", 0.01)):
        monkeypatch.setattr(agent, name, value)
    program = tmp_path / "bin" / "journalctl"
    program.parent.mkdir()
    program.write_text(JOURNALCTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (program.parent / "journal").touch()
    return program.parent / "journal"


def entry(number: int, **fields: Any) -> dict[str, Any]:
    moment = str(1_767_225_600_000_000 + number * 1_000 + 999)
    return {"__CURSOR": f"s=a;i={number}", "__REALTIME_TIMESTAMP": moment, "MESSAGE": f"line {number}", **fields}


def tell(journal: Path, *entries: dict[str, Any] | str) -> None:
    with journal.open("a") as file:
        file.writelines(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in entries)


def calls(journal: Path) -> list[list[Any]]:
    file = journal.with_name("calls")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def following(folder: Path, url: str, **options: Any) -> Any:
    return running(folder, url, journal=True, cursor_file=str(folder / "cursors.json"), **options)


def cursor(folder: Path) -> str:
    file = folder / "cursors.json"
    return str(json.loads(file.read_text())["journal"]["cursor"]) if file.exists() else ""


async def sent(store: Store, *messages: str) -> None:
    await until(lambda: len(store.messages) >= len(messages), lambda: store.messages)
    assert store.messages == [*messages]


async def test_an_entry_is_sent_as_a_line(tmp_path: Path, journal: Path) -> None:
    store = Store()
    tell(journal, entry(1))
    async with played(store.play) as url, following(tmp_path, url):
        await until(lambda: calls(journal))
        more = {"PRIORITY": "3", "SYSLOG_IDENTIFIER": "pump", "_PID": "4711", "_SYSTEMD_UNIT": "pump.service", "_COMM": "python"}
        tell(journal, entry(2, **more), entry(3, MESSAGE=[68, 252, 115, 101], _COMM="python", PRIORITY="9"))
        await sent(store, "line 2", "D\\xfcse")
    assert store.entries == [
        {"ts": 1_767_225_600_002, "level": "error", "message": "line 2", "logger": "pump", "fields": {"pid": 4711, "unit": "pump.service"}},
        {"ts": 1_767_225_600_003, "level": "info", "message": "D\\xfcse", "logger": "python"},
    ]


@pytest.mark.parametrize(
    ("priority", "level"),
    [*zip("01234567", ("critical", "critical", "critical", "error", "warning", "notice", "info", "debug"), strict=True)],
)
def test_the_priority_is_the_level(priority: str, level: str) -> None:
    line = agent.journal_entry(entry(1, PRIORITY=priority))
    assert line is not None
    assert line["level"] == level


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=4), max_leaves=9
)
NAMES = ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "_PID", "_SYSTEMD_UNIT", "_COMM", "__REALTIME_TIMESTAMP")


@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_whatever_a_field_holds_a_line_or_none_comes_of_it(content: dict[str, Any]) -> None:
    line = agent.journal_entry(content)
    if line is not None:
        assert line["level"] in agent.LEVELS
        assert isinstance(line["message"], str)
        assert line.keys() <= {"ts", "level", "message", "logger", "fields"}


@pytest.mark.parametrize(
    ("message", "text"),
    [("a\nb\n", "a\nb"), ([104, 105, 0, 10], "hi\u2400"), (["first", "second"], "first"), ([[104, 105], "second"], "hi")],
)
def test_a_message_may_be_bytes_or_several(message: Any, text: str) -> None:
    line = agent.journal_entry(entry(1, MESSAGE=message))
    assert line is not None
    assert line["message"] == text


@pytest.mark.parametrize("message", [None, "", " \n", [], 7, {}])
def test_an_entry_without_a_message_is_no_line(message: Any) -> None:
    assert agent.journal_entry(entry(1, MESSAGE=message)) is None


async def test_it_is_started_behind_the_last_line_when_it_ends(tmp_path: Path, journal: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    async with played(store.play) as url, following(tmp_path, url):
        await until(lambda: calls(journal))
        tell(journal, entry(1), entry(2), "die", entry(3), "die", entry(4))
        await sent(store, *(f"line {number}" for number in range(1, 5)))
    assert [words[1:] for words in calls(journal)] == [
        ["-o", "json", "--all", "--follow", "--lines=0"],
        ["-o", "json", "--all", "--follow", "--no-tail", "--after-cursor=s=a;i=2"],
        ["-o", "json", "--all", "--follow", "--no-tail", "--after-cursor=s=a;i=3"],
    ]
    assert "journalctl ended: the journal was rotated; it is started again in " in caplog.text


async def test_the_pause_before_it_is_started_again_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path) -> None:
    attempts: list[int] = []

    def note(attempt: int, *_: float) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr(agent, "backoff", note)
    monkeypatch.setattr(agent, "RETRY_SECONDS", 3_600.0)
    journal.with_name("journalctl").write_text("#!/bin/sh\nexit 3\n")
    async with played(Store().play) as url, following(tmp_path, url):
        await until(lambda: len(attempts) >= 4)
    assert attempts[:4] == [1, 2, 3, 4]


async def test_the_cursor_moves_with_acknowledgements_alone(tmp_path: Path, journal: Path) -> None:
    store, taken = Store(), list[str]()

    async def take(caller: Caller) -> None:
        await caller.welcome()
        while True:
            taken.extend(line["message"] for line in (await caller.receive()).get("entries", []))

    async with played(store.play) as url, following(tmp_path, url):
        await until(lambda: calls(journal))
        tell(journal, entry(1))
        await until(lambda: cursor(tmp_path) == "s=a;i=1")
    async with played(take) as url, following(tmp_path, url):
        tell(journal, entry(2), entry(3))
        await until(lambda: taken == ["line 2", "line 3"])
    assert cursor(tmp_path) == "s=a;i=1"
    async with played(store.play) as url, following(tmp_path, url):
        await sent(store, "line 1", "line 2", "line 3")


async def test_entries_without_a_message_move_the_cursor(tmp_path: Path, journal: Path) -> None:
    async with played(Store().play) as url, following(tmp_path, url):
        await until(lambda: calls(journal))
        tell(journal, entry(1, MESSAGE=None))
        await until(lambda: cursor(tmp_path) == "s=a;i=1")


async def test_what_is_no_entry_and_what_is_too_long_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(agent, "JOURNAL_BYTES", 200_000)
    store = Store()
    async with played(store.play) as url, following(tmp_path, url):
        await until(lambda: calls(journal))
        long = entry(2, MESSAGE="a core dump", COREDUMP="x" * 900_000)
        tell(journal, "-- No entries --", "", "{", "[]", '{"MESSAGE": "without a cursor"}', entry(1))
        tell(journal, long, entry(3, MESSAGE="y" * 100_000), entry(4))
        await sent(store, "line 1", "y" * 8_185 + "… (cut)", "line 4")
    assert caplog.text.count("an entry of the journal is left out: it is longer than 200000 bytes") == 1


async def test_lines_that_keep_coming_are_sent_all_the_same(tmp_path: Path, journal: Path) -> None:
    """A frame is not put off by every line that follows."""
    store = Store()
    async with played(store.play) as url, following(tmp_path, url):
        await until(lambda: calls(journal))
        number = 0

        def more() -> bool:
            nonlocal number
            number += 1
            tell(journal, entry(number))
            return len(store.of("log")) >= 3

        await until(more)


async def test_a_machine_without_journalctl_sends_its_readings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    store = Store()
    async with played(store.play) as url, following(tmp_path, url, interval=0.05):
        await until(lambda: len(store.of("telemetry")) > 3)
    assert "journalctl ended: it cannot be started (No such file or directory)" in caplog.text


async def test_the_child_ends_with_the_agent(tmp_path: Path, journal: Path) -> None:
    store = Store()
    arguments = ("--token", TOKEN, "--name", "press-1", "--journal", "--interval", "3600")
    async with played(store.play) as url, started(tmp_path, "--url", url, *arguments) as device:
        await until(lambda: calls(journal))
        tell(journal, entry(1))
        await sent(store, "line 1")
        device.process.terminate()
        assert (await device.end())[0] == 0
    process = Path("/proc") / str(calls(journal)[0][0])
    assert not process.exists() or ") Z " in (process / "stat").read_text()


@pytest.mark.parametrize(("text", "on"), [("1", True), ("true", True), ("YES", True), ("0", False), ("off", False), ("", False)])
def test_a_switch_may_be_a_variable(monkeypatch: pytest.MonkeyPatch, text: str, *, on: bool) -> None:
    monkeypatch.setenv("IIOT_JOURNAL", text)
    assert agent.make_parser().parse_args([]).journal is on
    assert agent.make_parser().parse_args(["--journal"]).journal is True


def test_a_switch_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("IIOT_JOURNAL", "perhaps")
    with pytest.raises(SystemExit):
        agent.make_parser()
    assert "IIOT_JOURNAL: 'perhaps' is neither true nor false" in capsys.readouterr().err
