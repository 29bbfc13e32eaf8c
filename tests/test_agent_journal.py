"""The agent and the system's journal. The journalctl here is a program of the test's own, a process on PATH as the real one is."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from devices import Caller, played, started
from hypothesis import given
from hypothesis import strategies as st
from storing import TOKEN, Store, running, until

import agent

# Where the entry of --cursor is not there, the file `seek` says what it does: it begins with the entry of that number, ends with an
# error, or tells nothing.
JOURNALCTL = f"""#!{sys.executable}
import json, os, pathlib, sys, time
folder = pathlib.Path(__file__).parent
file = (folder / "journal").open("rb")
if "--lines=0" in sys.argv:
    file.seek(0, 2)
with (folder / "calls").open("a") as calls:  # now what is told is after this
    calls.write(json.dumps([os.getpid(), *sys.argv[1:]]) + "\\n")
cursors = [word.split("=", 1)[1] for word in sys.argv if word.startswith("--cursor=")]
told = False
if cursors:
    lines = file.readlines()
    known = [json.loads(line).get("__CURSOR") if line.startswith(b"{{") else "" for line in lines]
    seek = (folder / "seek").read_text() if (folder / "seek").exists() else ""
    if cursors[0] in known:
        seek = str(known.index(cursors[0]))
        told = None
    elif seek == "error":
        sys.exit("Failed to seek to cursor: Invalid argument")
    elif not seek:
        time.sleep(3600)
    file.seek(sum(map(len, lines[: int(seek)])))
while True:
    line = file.readline()
    if not line:
        time.sleep(0.01)
    elif line.startswith(b"die"):
        if told:
            sys.exit("the journal was rotated")
    else:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        told = told is not None
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
        ["-o", "json", "--all", "--follow", "--no-tail", "--cursor=s=a;i=2"],
        ["-o", "json", "--all", "--follow", "--no-tail", "--cursor=s=a;i=3"],
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


# ---- a journal without the entry that was reached

BOOTS: Mapping[str, str] = MappingProxyType({name: name * 32 for name in "abc"})
PRESENT = "c"
GONE = "the place in the journal that was reached is gone: lines may be missing"


@pytest.fixture(autouse=True)
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's present boot."""
    file = tmp_path / "boot_id"
    file.write_text(f"{UUID(BOOTS[PRESENT])}\n")
    monkeypatch.setattr(agent, "BOOT", file)
    return file


def place(boot: str, since_boot: int, clock: int) -> str:
    """The cursor of an entry."""
    return f"s={'e' * 32};i=1f;b={BOOTS[boot]};m={since_boot:x};t={clock:x};x=0123456789abcdef"


def placed(message: str, boot: str, since_boot: int, clock: int) -> dict[str, Any]:
    return entry(1, MESSAGE=message, __CURSOR=place(boot, since_boot, clock))


@pytest.mark.parametrize(
    ("made", "reached", "sent_before"),
    [
        (place("a", 100, 5_000), place("a", 100, 5_000), True),
        (place("a", 99, 9_000), place("a", 100, 5_000), True),  # the clock was set back
        (place("a", 101, 4_000), place("a", 100, 5_000), False),
        (place("c", 99, 9_000), place("c", 100, 5_000), True),
        (place("c", 101, 4_000), place("c", 100, 5_000), False),
        (place("b", 500, 5_000), place("a", 100, 5_000), True),
        (place("b", 50, 5_001), place("a", 100, 5_000), False),
        (place("c", 50, 1), place("a", 100, 5_000), False),  # the present boot, whose clock is not set yet
        (place("b", 1, 1), "s=broken", True),
        (place("c", 1, 1), "s=broken", False),
        ("s=broken", place("a", 100, 5_000), False),
        ("", "", False),
    ],
)
def test_what_was_sent_before_is_known_by_its_boot_and_times(made: str, reached: str, *, sent_before: bool) -> None:
    assert agent.was_sent(made, reached, BOOTS[PRESENT]) is sent_before


def test_where_the_present_boot_is_not_known_the_clock_decides() -> None:
    assert agent.was_sent(place("c", 1, 5), place("a", 9, 5), "")
    assert not agent.was_sent(place("c", 1, 6), place("a", 9, 5), "")
    assert not agent.was_sent(place("c", 1, 6), "s=broken", "")


@pytest.mark.parametrize("content", [None, b"\xff", b""])
def test_a_machine_that_does_not_tell_its_boot_has_none(boot: Path, content: bytes | None) -> None:
    assert agent.present_boot() == BOOTS[PRESENT]
    boot.unlink()
    if content is not None:
        boot.write_bytes(content)
    assert agent.present_boot() == ""


async def read_so_far(folder: Path, url: str, journal: Path, *entries: dict[str, Any]) -> None:
    """Let an agent send these, and end."""
    before = len(calls(journal))
    async with following(folder, url):
        await until(lambda: len(calls(journal)) > before)
        tell(journal, *entries)
        await until(lambda: cursor(folder) == entries[-1]["__CURSOR"])


@pytest.mark.parametrize("seek", ["0", "1", "error", ""], ids=["the next entry", "a later entry", "an error", "nothing"])
async def test_the_rest_of_a_journal_whose_older_entries_were_removed_is_sent_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path, caplog: pytest.LogCaptureFixture, seek: str
) -> None:
    monkeypatch.setattr(agent, "JOURNAL_SECONDS", 20.0 if seek else 0.3)
    store = Store()
    async with played(store.play) as url:
        await read_so_far(tmp_path, url, journal, placed("one", "c", 1, 1), placed("two", "c", 2, 2))
        journal.write_text("")
        tell(journal, placed("three", "c", 3, 3), placed("four", "c", 4, 4))
        journal.with_name("seek").write_text(seek)
        async with following(tmp_path, url):
            await sent(store, "one", "two", "three", "four")
            tell(journal, placed("five", "c", 5, 5))
            await sent(store, "one", "two", "three", "four", "five")
    assert [words[6:] for words in calls(journal)[1:]] == [[f"--cursor={place('c', 2, 2)}"], []]
    assert caplog.text.count(GONE) == 1
    assert "journalctl ended" not in caplog.text


@pytest.mark.parametrize("seek", ["2", ""], ids=["is passed over to a later time", "tells nothing"])
async def test_after_a_boot_with_an_earlier_clock_and_a_new_journal_every_line_is_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path, seek: str
) -> None:
    monkeypatch.setattr(agent, "JOURNAL_SECONDS", 20.0 if seek else 0.3)
    store = Store()
    async with played(store.play) as url:
        await read_so_far(tmp_path, url, journal, placed("one", "a", 900, 9_000))
        journal.write_text("")
        tell(journal, placed("kernel", "c", 1, 10), placed("start failed", "c", 2, 20), placed("clock is set", "c", 3, 9_500))
        journal.with_name("seek").write_text(seek)
        async with following(tmp_path, url):
            await sent(store, "one", "kernel", "start failed", "clock is set")


async def test_of_what_is_left_only_what_was_not_sent_before_is_sent(tmp_path: Path, journal: Path) -> None:
    store = Store()
    async with played(store.play) as url:
        await read_so_far(tmp_path, url, journal, placed("last", "b", 100, 1_000))
        journal.write_text("")
        old = placed("of an older boot", "a", 900, 900), placed("sent before", "b", 99, 999)
        tell(journal, *old, placed("one", "b", 101, 1_001), "die", placed("two", "c", 1, 1), "die", placed("three", "c", 2, 2))
        journal.with_name("seek").write_text("0")
        async with following(tmp_path, url):
            await sent(store, "last", "one", "two", "three")
    starts = [words[6:] for words in calls(journal)[1:]]
    assert starts == [[f"--cursor={place('b', 100, 1_000)}"], [], [f"--cursor={place('b', 101, 1_001)}"], [f"--cursor={place('c', 1, 1)}"]]


async def test_an_entry_that_was_sent_before_does_not_move_the_place_back(tmp_path: Path) -> None:
    """Else the next child would go on there, and what follows would be sent again."""
    cursors, reached = agent.Cursors(tmp_path / "cursors.json"), place("b", 100, 1_000)
    journal = agent.Journal(agent.LogFrames("journal", agent.Spool(9), agent.Level(), cursors), {"cursor": reached})
    journal._is_known = functools.partial(agent.was_sent, reached=reached, boot=BOOTS[PRESENT])
    await journal._take(json.dumps(placed("sent before", "b", 99, 999)).encode())
    assert journal._cursor == reached
    await journal._take(json.dumps(placed("new", "c", 1, 1)).encode())
    assert journal._cursor == place("c", 1, 1)


async def test_a_cursor_that_journalctl_refuses_is_not_tried_again_and_the_present_boot_is_sent(
    tmp_path: Path, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    (tmp_path / "cursors.json").write_text('{"journal": {"cursor": "s=broken", "count": 7}}')
    tell(journal, placed("of another boot", "a", 1, 1), placed("one", "c", 1, 1))
    journal.with_name("seek").write_text("error")
    async with played(store.play) as url, following(tmp_path, url):
        await sent(store, "one")
        tell(journal, placed("two", "c", 2, 2))
        await sent(store, "one", "two")
    assert [words[6:] for words in calls(journal)] == [["--cursor=s=broken"], []]
    assert caplog.text.count(GONE) == 1


async def test_an_agent_that_is_started_again_sends_no_line_twice(
    tmp_path: Path, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    async with played(store.play) as url:
        await read_so_far(tmp_path, url, journal, placed("one", "c", 1, 1))
        for number in range(2, 5):
            tell(journal, placed(f"{number} while it was down", "c", number, number))
            async with following(tmp_path, url):
                await until(lambda number=number: len(store.messages) >= number)  # type: ignore[misc]
                await until(lambda number=number: cursor(tmp_path) == place("c", number, number))  # type: ignore[misc]
    assert store.messages == ["one", *(f"{number} while it was down" for number in range(2, 5))]
    assert GONE not in caplog.text


async def test_the_entry_that_was_reached_is_waited_for_no_longer_than_for_lines_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it has come, the journal may be silent."""
    monkeypatch.setattr(agent, "JOURNAL_SECONDS", 0.3)
    store = Store()
    async with played(store.play) as url:
        await read_so_far(tmp_path, url, journal, placed("one", "c", 1, 1))
        async with following(tmp_path, url):
            await asyncio.sleep(0.6)
            tell(journal, placed("two", "c", 2, 2))
            await sent(store, "one", "two")
    assert len(calls(journal)) == 2
    assert GONE not in caplog.text


# ---- the child, and what it tells besides


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
