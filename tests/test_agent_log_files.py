"""The agent and files that lines are appended to: rotated, emptied, cut off, and read again after a restart."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import closing, suppress
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
    for name, value in (("RETRY_SECONDS", 0.01), ("LOG_SECONDS", 0.01), ("ROTATED_SECONDS", 0.15), ("PARTIAL_SECONDS", 0.3)):
        monkeypatch.setattr(agent, name, value)
    monkeypatch.setattr(agent, "CURSOR_SECONDS", 0.01)


def following(folder: Path, url: str, *names: str) -> Any:
    """The agent that sends `app.log`, or files of other names."""
    paths = os.pathsep.join(str(folder / name) for name in names or ("app.log",))
    return running(folder, url, log_file=agent.Paths(paths), cursor_file=str(folder / "cursors.json"))


def append(path: Path, *lines: str) -> None:
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def cursor(folder: Path, name: str = "app.log") -> dict[str, Any]:
    with suppress(FileNotFoundError, ValueError, AttributeError):  # some tests write nonsense into it
        kept: dict[str, dict[str, Any]] = json.loads((folder / "cursors.json").read_text())
        return kept.get(f"file:{folder / name}", {})
    return {}


async def at(folder: Path, offset: int, name: str = "app.log") -> None:
    """Wait until the cursor is kept at this place of the file."""
    await until(lambda: cursor(folder, name).get("offset") == offset, lambda: cursor(folder, name))


async def sent(store: Store, *messages: str) -> None:
    await until(lambda: len(store.messages) >= len(messages), lambda: store.messages)
    assert store.messages == [*messages]


# ---- what is sent of a file


async def test_lines_are_sent_as_they_are_appended_and_none_of_those_before(tmp_path: Path) -> None:
    file, store = tmp_path / "app.log", Store()
    file.write_text("old\nthe start of a li")
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 4)
        append(file, "ne", "2026-01-01 12:00:00 ERROR no oil", "")
        await sent(store, "the start of a line", "2026-01-01 12:00:00 ERROR no oil")
    first, second = store.entries
    assert (first["level"], second["level"]) == ("info", "error")
    assert first["logger"] == second["logger"] == str(file)
    assert abs(first["ts"] - agent.now_ms()) < 60_000
    assert "fields" not in first


async def test_a_file_that_appears_later_is_sent_from_its_start(tmp_path: Path) -> None:
    file, store = tmp_path / "app.log", Store()
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
        append(file, "one")
        async with following(tmp_path, url):
            append(file, "two")
            await sent(store, "one", "two")


async def test_several_files_are_sent_each_in_its_order(tmp_path: Path) -> None:
    store, names = Store(), ("a.log", "b.log")
    for name in names:
        (tmp_path / name).touch()
    async with played(store.play) as url, following(tmp_path, url, *names, "a.log"):
        for name in names:
            await at(tmp_path, 0, name)
        for number in range(30):
            for name in names:
                append(tmp_path / name, f"{name} {number}")
        await until(lambda: len(store.entries) >= 60)
    for name in names:
        lines = [entry["message"] for entry in store.entries if entry["logger"] == str(tmp_path / name)]
        assert lines == [f"{name} {number}" for number in range(30)]


@pytest.mark.parametrize(
    ("written", "messages"),
    [
        (b"D\xfcse zu\n", ["D\\xfcse zu"]),
        ("Düse zu\n".encode(), ["Düse zu"]),
        (b"one\r\ntwo\r\n\r\n\n  \nthree\n", ["one", "two", "three"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b"a\0b\n\x1b[31mred\n", ["a\u2400b", "\x1b[31mred"]),
        (b"x" * 8_192 + b"\n", ["x" * 8_192]),
        (b"x" * 8_193 + b"\nnext\n", ["x" * 8_185 + "… (cut)", "next"]),
        (b"x" * 1_000_000 + b"\nnext\n", ["x" * 8_185 + "… (cut)", "next"]),
        ("\U0001f525".encode() * 8_192 + b"\n", ["\U0001f525" * 8_192]),
        ("\U0001f525".encode() * 50_000 + b"\n", ["\U0001f525" * 8_185 + "… (cut)"]),
    ],
    ids=["not UTF-8", "UTF-8", "CR LF", "BOM", "control", "long", "too long", "much too long", "long in bytes", "too long in bytes"],
)
async def test_a_line_is_sent_as_far_as_it_can_be(tmp_path: Path, written: bytes, messages: list[str]) -> None:
    file, store = tmp_path / "app.log", Store()
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        file.write_bytes(written)
        await sent(store, *messages)
        await at(tmp_path, len(written))


async def test_the_end_of_a_line_is_waited_for_a_short_while(tmp_path: Path) -> None:
    file, store = tmp_path / "app.log", Store()
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        for part in ("one ", "li", "ne\ntw"):
            with file.open("a") as writing:
                writing.write(part)
            await asyncio.sleep(0.05)  # less than the agent's patience
        await sent(store, "one line", "tw")
        append(file, "o", "three")
        await until(lambda: len(store.messages) >= 4)
    assert store.messages == ["one line", "tw", "o", "three"]


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("ERROR no oil", "error"), ("2026-01-01 12:00:00,123 WARN  [main] pump: slow", "warning"), ("[error] 12#12: no", "error"),
        ("2026/01/01 12:00:00 [crit] 7: no", "critical"), ("DEBUG:root:x", "debug"), ("warning: slow", "warning"), ("<notice> x", "notice"),
        ("2026-01-01T12:00:00Z FATAL out", "critical"), ("Jan  1 12:00:00 pump app[7]: ERR x", "error"), ("(EE) INFO x", "info"),
        ("no error was found", "info"), ("it is an ERRORLESS day", "info"), ("ERROR_CODE=7", "info"), ("a b c d e f ERROR", "info"),
        ("INFO an ERROR came", "info"), ("pump 3 started", "info"), ("", "info"), ("Error", "info"), ("Error: x", "error"),
    ],
)  # fmt: skip
def test_the_level_is_read_where_a_line_says_it_plainly(line: str, level: str) -> None:
    assert agent.level_of(line) == level


# ---- rotation


async def test_a_rotated_file_is_read_to_its_end(tmp_path: Path) -> None:
    """Its writer goes on with the old file until it is told."""
    file, store = tmp_path / "app.log", Store()
    file.touch()
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        with file.open("a") as writing:
            print("one", file=writing, flush=True)
            await sent(store, "one")
            file.rename(tmp_path / "app.log.1")
            append(file, "three")
            print("two", file=writing, flush=True)
            await until(lambda: "two" in store.messages)
            writing.write("and the end of it")
        await until(lambda: "three" in store.messages)
        append(file, "four")
        await sent(store, "one", "two", "and the end of it", "three", "four")


def test_the_old_file_is_left_when_it_was_quiet_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ROTATED_SECONDS", 1e9)
    file = tmp_path / "app.log"
    file.touch()
    tail = agent.Tail(file)
    with closing(tail), file.open("a") as writing:
        tail.start(None)
        file.rename(tmp_path / "app.log.1")
        append(file, "new")
        assert [tail.read() for _ in range(3)] == [[]] * 3
        print("old", file=writing, flush=True)
        assert [text for text, _ in tail.read()] == ["old"]
        monkeypatch.setattr(agent, "ROTATED_SECONDS", 0.0)
        assert tail.read() == []
        assert [text for text, _ in tail.read()] == ["new"]


async def test_a_file_that_is_rotated_with_a_while_between_is_followed(tmp_path: Path) -> None:
    file, store = tmp_path / "app.log", Store()
    file.touch()
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        for number in range(4):
            append(file, f"line {number}")
            await until(lambda number=number: len(store.messages) > number)  # type: ignore[misc]
            file.rename(tmp_path / f"app.log-2026010{number}")
        append(file, "last")
        await sent(store, "line 0", "line 1", "line 2", "line 3", "last")


def rotate(file: Path, keep: int = 6) -> None:
    """As logrotate does it, with numbers; the oldest goes."""
    for number in range(keep - 1, 0, -1):
        with suppress(FileNotFoundError):
            Path(f"{file}.{number}").replace(f"{file}.{number + 1}")
    file.rename(f"{file}.1")
    file.touch()


@pytest.mark.parametrize("rotations", [1, 2, 3])
async def test_what_was_rotated_while_the_agent_did_not_run_is_sent_once_and_in_order(tmp_path: Path, rotations: int) -> None:
    file, store = tmp_path / "app.log", Store()
    append(tmp_path / "app.log.4", "of last week")
    os.utime(tmp_path / "app.log.4", (agent.now_ms() / 1000 - 1_000,) * 2)
    append(tmp_path / "app.log.bak", "somebody's copy")
    file.touch()
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
            append(file, "0")
            await at(tmp_path, 2)
        expected = ["0"]
        for number in range(1, rotations + 1):
            append(file, f"{number} before")
            os.utime(file, (agent.now_ms() / 1000 - 100 + number,) * 2)
            rotate(file)
            append(file, f"{number} after")
            expected += [f"{number} before", f"{number} after"]
        async with following(tmp_path, url):
            await sent(store, *expected)


async def test_a_file_that_went_while_the_agent_did_not_run_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, store = tmp_path / "app.log", Store()
    append(file, "old")
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 4)
        append(tmp_path / "other", "new")
        (tmp_path / "other").replace(file)
        async with following(tmp_path, url):
            await sent(store, "new")
    assert f"{file}: the file that was read last is gone: lines may be missing" in caplog.text


# ---- rotation while nobody looks


def written(file: Path, seconds: float) -> None:
    """Let a file be one that was written to so many seconds after a moment that lies in the future: later than what is written now."""
    os.utime(file, ns=(round((1_900_000_000 + seconds) * 1e9),) * 2)


@pytest.mark.parametrize("used_again", [False, True], ids=["its inode is free", "its inode is used again"])
@pytest.mark.parametrize("end", ["compressed", "deleted"])
async def test_when_the_file_that_was_read_last_is_gone_what_was_rotated_after_it_is_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str, *, used_again: bool
) -> None:
    file, store = tmp_path / "app.log", Store()
    file.touch()
    append(tmp_path / "app.log.3", "of last week")
    written(tmp_path / "app.log.3", -1_000_000_000)
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
            append(file, "one")
            written(file, 0)
            await at(tmp_path, 4)
        for number in (1, 2):
            rotate(file)
            append(file, f"wholly unread {number}", f"wholly unread {number}, too")
            written(file, number)
        read = tmp_path / "app.log.2"
        if end == "compressed":
            (tmp_path / "app.log.2.gz").write_bytes(read.read_bytes())
        read.unlink()
        if used_again:
            kept = json.loads((tmp_path / "cursors.json").read_text())
            kept[f"file:{file}"]["inode"] = (tmp_path / "app.log.1").stat().st_ino
            (tmp_path / "cursors.json").write_text(json.dumps(kept))
        async with following(tmp_path, url):
            await sent(store, "one", *(f"wholly unread {number}{more}" for number in (1, 2) for more in ("", ", too")))
    assert caplog.text.count(": lines may be missing") == 1


async def test_of_files_that_are_rotated_fast_only_the_last_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is gone after three more."""
    monkeypatch.setattr(agent, "ROTATED_SECONDS", 60.0)
    file, store, expected = tmp_path / "app.log", Store(), list[str]()
    file.touch()
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        for number in range(12):
            for part in range(5):
                append(file, f"{number} {part}")
                expected.append(f"{number} {part}")
            await asyncio.sleep(0.1)
            rotate(file, keep=3)
        await sent(store, *expected)


@pytest.mark.parametrize("made", [True, False], ids=["and made anew", "and not made anew"])
async def test_a_file_that_appears_and_is_rotated_between_two_looks_is_sent(tmp_path: Path, *, made: bool) -> None:
    file, store = tmp_path / "app.log", Store()
    append(tmp_path / "app.log.7", "of last week")
    written(tmp_path / "app.log.7", -1_000_000_000)
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        append(tmp_path / "app.log.2", "one")
        written(tmp_path / "app.log.2", 1)
        await sent(store, "one")
        append(tmp_path / "app.log.1", "two")
        written(tmp_path / "app.log.1", 2)
        if made:
            append(file, "three")
        await sent(store, "one", "two", *["three"] * made)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, True) for name in (".1", "-20260131", ".2026-11-30_12", ".20261130-1200", "-1796040000", ".2026-11-30.1")),
        *((name, False) for name in (".1.gz", ".bak", ".1~", "2", ".", ".old")),
    ],
)
def test_a_rotated_file_is_known_by_its_name(tmp_path: Path, name: str, *, known: bool) -> None:
    file = tmp_path / "app.log"
    file.touch()
    append(tmp_path / f"app.log{name}", "one")
    with closing(agent.Tail(file)) as tail:
        assert [path.name for path, _ in tail._rotated()] == [f"app.log{name}"] * known


@pytest.mark.parametrize("names", [(".3", ".2", ".1"), (".11", ".10", ".9"), ("-20260129", "-20260130", "-20260131")])
def test_files_of_the_same_moment_are_read_in_the_order_of_their_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    file = tmp_path / "app.log"
    append(file, "old")
    with closing(agent.Tail(file)) as tail:
        tail.start(None)
        file.rename(tmp_path / f"app.log{names[0]}")
        for number, name in enumerate(names[1:]):
            append(tmp_path / f"app.log{name}", f"line {number}")
        for name in names:
            written(tmp_path / f"app.log{name}", 0)
        assert [text for _ in range(9) for text, _ in tail.read()] == ["line 0", "line 1"]


@pytest.mark.parametrize("restarted", [False, True], ids=["while it is read", "and the agent is started again"])
def test_a_file_that_was_written_to_after_the_next_one_was_made_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, restarted: bool
) -> None:
    """Its writer was told a little later, and the next one stays empty until it is rotated."""
    monkeypatch.setattr(agent, "ROTATED_SECONDS", 0.0)
    file = tmp_path / "app.log"
    file.touch()
    tail = agent.Tail(file)
    tail.start(None)
    rotate(file)
    written(file, 1)
    append(tmp_path / "app.log.1", "late")
    written(tmp_path / "app.log.1", 2)
    seen = [text for _ in range(3) for text, _ in tail.read()]
    if restarted:
        position = tail.position()
        tail.close()
        tail = agent.Tail(file)
        tail.start(position)
    rotate(file)
    append(file, "new")
    written(file, 3)
    assert seen + [text for _ in range(5) for text, _ in tail.read()] == ["late", "new"]
    tail.close()


def test_a_rotated_file_that_is_written_to_just_when_the_next_one_is_looked_for_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "app.log"
    append(file, "old")
    with closing(agent.Tail(file)) as tail:
        tail.start(None)
        rotate(file)
        assert tail.read() == []
        append(tmp_path / "app.log.1", "late")
        assert tail._next() is None


# ---- a file that is emptied


@pytest.mark.parametrize("runs", [True, False], ids=["while it is read", "while the agent does not run"])
@pytest.mark.parametrize("lines", [1, 50], ids=["and stays shorter", "and grows past the old place"])
async def test_a_file_that_is_emptied_is_read_from_its_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: int, *, runs: bool
) -> None:
    file, store = tmp_path / "app.log", Store()
    expected = [f"new {number}" for number in range(lines)]

    def empty() -> None:
        file.write_text("".join(f"{line}\n" for line in expected))

    file.touch()
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
            append(file, "one", "two", "three")
            await at(tmp_path, 14)
            if runs:
                empty()
                await sent(store, "one", "two", "three", *expected)
        if not runs:
            empty()
            async with following(tmp_path, url):
                await sent(store, "one", "two", "three", *expected)
    assert f"{file} was emptied" in caplog.text


def test_a_file_that_shrinks_and_begins_as_before_was_emptied(tmp_path: Path) -> None:
    file = tmp_path / "app.log"
    file.touch()
    tail = agent.Tail(file)
    with closing(tail):
        tail.start(None)
        append(file, *["the same banner"] * 200)
        assert len(tail.read()) == 200
        file.write_text("the same banner\n" * 100)
        assert len(tail.read()) == 100


async def test_a_file_that_was_removed_and_whose_inode_is_used_again_is_another_one(tmp_path: Path) -> None:
    """Told by its first bytes; on this file system or not, the number is written into the cursor here."""
    file, store = tmp_path / "app.log", Store()
    append(file, "one", "two")
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 8)
        kept = json.loads((tmp_path / "cursors.json").read_text())
        file.unlink()
        append(file, "other one", "other two")
        kept[f"file:{file}"]["inode"] = file.stat().st_ino
        (tmp_path / "cursors.json").write_text(json.dumps(kept))
        async with following(tmp_path, url):
            await sent(store, "other one", "other two")


def copy_and_empty(file: Path) -> None:
    """As logrotate's copytruncate does it."""
    for number in (2, 1):
        with suppress(FileNotFoundError):
            Path(f"{file}.{number}").rename(f"{file}.{number + 1}")
    Path(f"{file}.1").write_bytes(file.read_bytes())
    os.truncate(file, 0)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("runs", [True, False], ids=["while it is read", "while the agent does not run"])
async def test_the_copy_of_a_file_that_was_emptied_is_read_to_its_end_and_each_line_is_sent_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, times: int, *, runs: bool
) -> None:
    file, store = tmp_path / "app.log", Store()
    expected = ["one", "two", *(f"{number} {when}" for number in range(times) for when in ("before", "afterwards"))]
    file.touch()
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
            append(file, "one", "two")
            await at(tmp_path, 8)
            if runs:
                change_by_copies(file, times)
                await sent(store, *expected)
                await at(tmp_path, file.stat().st_size)
        if not runs:
            change_by_copies(file, times)
        async with following(tmp_path, url):
            await sent(store, *expected)
            append(file, "last")
            await sent(store, *expected, "last")
    assert ": lines may be missing" not in caplog.text


def change_by_copies(file: Path, times: int) -> None:
    for number in range(times):
        append(file, f"{number} before")
        copy_and_empty(file)
        append(file, f"{number} afterwards")


async def test_a_file_whose_banner_is_always_the_same_was_emptied_if_what_follows_it_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, store, banner = tmp_path / "app.log", Store(), [f"{number:40} the same banner" for number in range(40)]
    assert len("\n".join(banner)) > agent.HEAD_BYTES + agent.LAST_BYTES
    file.touch()
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
            append(file, *banner, "one")
            await at(tmp_path, file.stat().st_size)
        os.truncate(file, 0)
        append(file, *banner, "another one", "two")
        async with following(tmp_path, url):
            await sent(store, *banner, "one", *banner, "another one", "two")
    assert f"{file} was emptied while it was not read: lines may be missing" in caplog.text


@pytest.mark.parametrize("runs", [True, False], ids=["while it is read", "while the agent does not run"])
async def test_an_older_file_that_begins_with_the_same_bytes_is_no_copy(tmp_path: Path, *, runs: bool) -> None:
    file, store = tmp_path / "app.log", Store()
    append(tmp_path / "app.log.1", "the banner", "of yesterday")
    written(tmp_path / "app.log.1", -1_000_000_000)
    file.touch()
    async with played(store.play) as url:
        async with following(tmp_path, url):
            await at(tmp_path, 0)
            append(file, "the banner")
            await at(tmp_path, 11)
            if runs:
                file.write_text("new\n")
                await sent(store, "the banner", "new")
        if not runs:
            file.write_text("new\n")
            async with following(tmp_path, url):
                await sent(store, "the banner", "new")


# ---- how far it is sent


async def test_the_cursor_moves_with_acknowledgements_alone_and_the_rest_is_sent_at_the_next_start(tmp_path: Path) -> None:
    file, deaf, store = tmp_path / "app.log", list[str](), Store()

    async def take(caller: Caller) -> None:
        """A server whose storage is broken: it takes what comes, and acknowledges nothing."""
        await caller.welcome()
        while True:
            deaf.extend(entry["message"] for entry in (await caller.receive()).get("entries", []))

    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        append(file, "one")
        await at(tmp_path, 4)
    async with played(take) as url, following(tmp_path, url):
        append(file, "two", "three")
        await until(lambda: deaf == ["two", "three"])
    assert cursor(tmp_path)["offset"] == 4
    async with played(store.play) as url, following(tmp_path, url):
        await sent(store, "one", "two", "three")


async def test_of_a_refused_frame_the_cursor_waits_for_every_part(tmp_path: Path) -> None:
    spool, cursors = agent.Spool(100), agent.Cursors(tmp_path / "cursors.json")
    frames = agent.LogFrames("a", spool, agent.Level(), cursors)
    for number in range(1, 4):
        for part in range(2):
            await frames.add(agent.log_entry("info", f"{number} {part}", 0), {"offset": number})
        await frames.put()
    first, *_ = [await spool.next() for _ in range(3)]
    taken = spool.refuse(first.seq)
    assert taken is first
    await spool.put_first(agent.halves(first), first)
    await spool.acknowledge(3)
    assert cursors._kept == {}
    await spool.next()
    await spool.acknowledge(4)
    assert cursors._kept == {}
    await spool.next()
    await spool.acknowledge(5)
    assert cursors._kept == {"a": {"offset": 3, "count": 3}}
    assert len(spool) == 0


async def test_lines_below_the_level_move_the_cursor_without_a_frame(tmp_path: Path) -> None:
    (tmp_path / "press-1.config.json").write_text('{"version": 1, "document": {"log_level": "error"}}')
    file, store = tmp_path / "app.log", Store()
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 0)
        append(file, "INFO one")
        await at(tmp_path, 9)
        append(file, "ERROR two")
        await sent(store, "ERROR two")


async def test_an_agent_that_is_ended_in_any_way_sends_no_acknowledged_line_again(tmp_path: Path) -> None:
    store = Store()
    file = tmp_path / "app.log"
    file.touch()
    expected = []
    async with played(store.play) as url:
        arguments = ("--url", url, "--token", TOKEN, "--name", "press-1", "--interval", "3600", "--log-file", str(file))
        for number, end in enumerate(("kill", "terminate", "terminate")):
            async with started(tmp_path, *arguments) as device:
                await device.line("connected as press-1")
                path = tmp_path / "press-1.cursors.json"
                await until(lambda path=path: path.exists() and "inode" in path.read_text())  # type: ignore[misc]
                for part in "ab":  # the second one while the agent rests from writing the cursor of the first
                    append(file, f"line {number} {part}")
                    expected.append(f"line {number} {part}")
                    await until(lambda: store.messages == expected, lambda: store.messages)
                if end == "kill":
                    await until(lambda path=path: f'"offset": {file.stat().st_size}' in path.read_text())  # type: ignore[misc]
                await until(lambda: store.acknowledged == store.seq)
                getattr(device.process, end)()
                await device.end()
        assert f'"offset": {file.stat().st_size}' in path.read_text()
        async with started(tmp_path, *arguments) as device:
            await device.line("connected as press-1")
            append(file, "last")
            await until(lambda: "last" in store.messages)
    assert store.messages == [*expected, "last"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\udcff"])
async def test_a_cursor_file_without_cursors_is_told_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    file, store = tmp_path / "app.log", Store()
    append(file, "old")
    (tmp_path / "cursors.json").write_bytes(content.encode(errors="surrogateescape"))
    async with played(store.play) as url, following(tmp_path, url):
        await at(tmp_path, 4)
        append(file, "new")
        await sent(store, "new")
    assert f"it is not known how far the logs were sent: cannot use {tmp_path / 'cursors.json'}: " in caplog.text


async def test_what_is_no_file_is_told_once_and_harms_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, names = Store(), ("folder", "pipe", "app.log")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "app.log").touch()
    async with played(store.play) as url, following(tmp_path, url, *names):
        await at(tmp_path, 0)
        for number in range(5):
            append(tmp_path / "app.log", f"line {number}")
            await until(lambda number=number: len(store.messages) > number)  # type: ignore[misc]
        (tmp_path / "folder").rmdir()
        append(tmp_path / "folder", "a file at last")
        await until(lambda: "a file at last" in store.messages)
    for name in ("folder", "pipe"):
        assert caplog.text.count(f"cannot read {tmp_path / name}: ") == 1


# ---- options


async def test_the_flag_may_be_given_several_times_and_takes_the_place_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(*arguments: str) -> agent.Paths:
        return agent.Options(**vars(agent.make_parser().parse_args(arguments))).log_file

    assert files() == ()
    assert files("--log-file", "a", "--log-file", "b") == ("a", "b")
    monkeypatch.setenv("IIOT_LOG_FILE", "/var/log/c:/var/log/d")
    assert files() == ("/var/log/c", "/var/log/d")
    assert files("--log-file", "a") == ("a",)


async def test_a_recording_is_sent_alone(tmp_path: Path) -> None:
    arguments = ("--url", f"http://127.0.0.1:{free_port()}", "--token", TOKEN, "--replay", "run.csv", "--log-file", "a")
    code, _, err = await agent_command(*arguments, folder=tmp_path)
    assert (code, err) == (1, "agent.py: --replay sends a recording alone; leave out --log-file\n")


# ---- the reader of a file alone

PIECES = st.sampled_from([b"a", b"bc\n", b"\n", b"\r\n", b"d\r\ne", b"x" * 300, b"\xff", b"yy\nz\n"])
STEPS = st.lists(st.one_of(PIECES, st.sampled_from(["read", "rotate", "restart"])), max_size=40)


def lines_of(content: bytes) -> Iterator[str]:
    for line in content.split(b"\n"):
        if line.strip():
            yield line.removesuffix(b"\r").decode(errors="backslashreplace")


@settings(deadline=None, max_examples=200)
@given(STEPS)
def test_however_a_file_grows_and_rotates_its_lines_are_read_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[bytes | str]
) -> None:
    """Several times, with or without a look between."""
    folder = tmp_path_factory.mktemp("tail")
    file, seen, contents = folder / "app.log", list[str](), [b""]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROTATED_SECONDS", 0.0), ("PARTIAL_SECONDS", 1e9), ("PIECE_BYTES", 64)):
            patch.setattr(agent, name, value)
        file.touch()
        tail = agent.Tail(file)
        tail.start(None)
        position = tail.position()
        for number, step in enumerate([*steps, *["read"] * 200]):
            if isinstance(step, bytes):
                with file.open("ab") as writing:
                    writing.write(step)
                contents[-1] += step
                written(file, number)
            elif step == "rotate":
                rotate(file, keep=50)
                contents.append(b"")
                written(file, number)
            elif step == "restart":
                tail.close()
                tail = agent.Tail(file)
                tail.start(position)
            else:
                lines = tail.read()
                seen += [text for text, _ in lines]
                position = lines[-1][1] if lines else position
        tail.close()
    *before, last = contents
    whole = last[: last.rfind(b"\n") + 1]
    assert seen == [line for content in (*before, whole) for line in lines_of(content)]
