"""Commands on a device: live output, how they end, and that each is run once and has one result, whenever the agent is killed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from devices import Caller, free_port, played, started
from hypothesis import given
from hypothesis import strategies as st
from plant import PATIENCE, agent_command
from storing import TOKEN, Store, running, until

import agent

PYTHON = sys.executable
REFUSED = "this device runs no commands: its agent was started without --allow-commands"
MEGABYTE = 1_000_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RETRY_SECONDS", 0.01), ("COMMANDS_SECONDS", 0.01), ("SYNC_SECONDS", 0.01), ("TERM_SECONDS", 0.5)):
        monkeypatch.setattr(agent, name, value)


def order(number: int, *argv: str, timeout: float = PATIENCE, most: int = MEGABYTE) -> dict[str, Any]:
    """The fields of a command's frame."""
    return {"command": number, "argv": list(argv), "timeout": timeout, "output_bytes": most}


def of(store: Store, number: int) -> list[dict[str, Any]]:
    """The frames of one command."""
    return [frame for frame in store.frames if frame.get("command") == number]


def results(store: Store, number: int) -> list[dict[str, Any]]:
    """What the results of one command say."""
    frames = [frame for frame in of(store, number) if frame["type"] == "result"]
    return [{name: value for name, value in frame.items() if name not in ("type", "seq", "command")} for frame in frames]


def data(frame: dict[str, Any]) -> bytes:
    return base64.b64decode(frame["data"]) if frame.get("encoding") == "base64" else frame["data"].encode()


def written(store: Store, number: int, stream: str = "stdout") -> bytes:
    """What a command wrote to a stream, as far as it came."""
    return b"".join(data(frame) for frame in of(store, number) if frame["type"] == "output" and frame["stream"] == stream)


async def result(store: Store, number: int) -> dict[str, Any]:
    """The only result of a command, when it is there."""
    await until(lambda: results(store, number), lambda: of(store, number))
    (said,) = results(store, number)
    return said


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody waits for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    return False


@contextmanager
def gate(path: Path) -> Iterator[Callable[[], None]]:
    """Something that a shell waits for with `read x < PATH`, until it is opened."""
    os.mkfifo(path)
    with path.open("r+b", buffering=0) as end:

        def go_on() -> None:
            end.write(b"\n")

        yield go_on


@asynccontextmanager
async def device(folder: Path, store: Store, **options: Any) -> AsyncIterator[agent.Agent]:
    """The agent in this process, in a session with the store."""
    kept = {"allow_commands": True, "commands_file": str(folder / "commands.json"), **options}
    count = len(store.sessions)
    async with played(store.play) as url, running(folder, url, **kept) as held:
        await until(lambda: len(store.sessions) > count)
        yield held


async def send(store: Store, kind: str, **fields: Any) -> None:
    await store.sessions[-1].send(kind, **fields)


def ledger(folder: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        content: dict[str, Any] = json.loads((folder / "commands.json").read_text())
        return content
    return {}


# ---- output


async def test_output_of_both_streams_comes_while_the_command_runs_and_in_its_order(tmp_path: Path) -> None:
    store = Store()
    with gate(tmp_path / "one") as first, gate(tmp_path / "two") as second:
        script = f"echo one; read x < {tmp_path}/one; echo two >&2; read x < {tmp_path}/two; echo three; exit 4"
        async with device(tmp_path, store):
            await send(store, "command", **order(7, "sh", "-c", script))
            await until(lambda: written(store, 7) == b"one\n")
            first()
            await until(lambda: written(store, 7, "stderr") == b"two\n")
            assert not results(store, 7)
            second()
            assert await result(store, 7) == {"status": "done", "exit_code": 4, "output_bytes": 14}
    assert [(frame["type"], frame.get("stream"), frame.get("data")) for frame in of(store, 7)] == [
        ("started", None, None), ("output", "stdout", "one\n"), ("output", "stderr", "two\n"), ("output", "stdout", "three\n"),
        ("result", None, None),
    ]  # fmt: skip
    seqs = [frame["seq"] for frame in of(store, 7)]
    assert seqs == sorted(set(seqs))


async def test_a_character_that_is_cut_waits_for_its_other_bytes_and_at_the_end_for_none(tmp_path: Path) -> None:
    store = Store()
    with gate(tmp_path / "gate") as go_on:
        script = f"printf 'x\\303'; read x < {tmp_path}/gate; printf '\\244y'; printf '\\342\\202' >&2"
        async with device(tmp_path, store):
            await send(store, "command", **order(7, "sh", "-c", script))
            await until(lambda: written(store, 7) == b"x")
            go_on()
            await result(store, 7)
    outputs = [(frame["stream"], frame["data"], frame.get("encoding")) for frame in of(store, 7) if frame["type"] == "output"]
    assert outputs == [("stdout", "x", None), ("stdout", "äy", None), ("stderr", base64.b64encode(b"\xe2\x82").decode(), "base64")]


@pytest.mark.parametrize("octal", ["\\377\\376", "a\\000b"], ids=["no UTF-8", "a zero character"])
async def test_what_is_no_text_comes_as_base64(tmp_path: Path, octal: str) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "printf", octal))
        await result(store, 7)
    (output,) = [frame for frame in of(store, 7) if frame["type"] == "output"]
    assert output["encoding"] == "base64"
    assert data(output) == (b"\xff\xfe" if "377" in octal else b"a\0b")


BYTES = (
    st.binary(max_size=9) | st.text(max_size=5).map(str.encode) | st.integers(1, 40_000).map(lambda count: "ä€😀".encode() * (count // 9))
)


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), BYTES), max_size=6), st.integers(0, 60_000))
def test_whatever_is_read_the_frames_hold_all_bytes_up_to_the_limit_in_their_order(reads: list[tuple[str, bytes]], most: int) -> None:
    async def frames() -> tuple[int, list[dict[str, Any]]]:
        spool = agent.Spool(10_000)
        output = agent.Output(7, most, spool)
        for stream, piece in reads:
            output.take(stream, piece)
        for stream in ("stdout", "stderr"):
            output._add(stream, b"")
        output._full.set()
        await output.send()
        return output.total, spool.of("output")

    total, made = asyncio.run(frames())
    assert total == sum(len(piece) for _, piece in reads)
    left, expected = most, {"stdout": b"", "stderr": b""}
    for stream, piece in reads:
        expected[stream] += piece[:left]
        left -= len(piece[:left])
    assert {stream: b"".join(data(frame) for frame in made if frame["stream"] == stream) for stream in expected} == expected
    assert all(0 < len(data(frame)) <= agent.OUTPUT_BYTES for frame in made)
    assert all("\0" not in frame["data"] for frame in made)
    for stream, text in expected.items():
        with suppress(UnicodeDecodeError):
            assert "\0" in text.decode() or not any("encoding" in frame for frame in made if frame["stream"] == stream)


async def test_beyond_its_limit_output_is_counted_and_not_sent(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' a; echo last >&2", most=50_000))
        assert await result(store, 7) == {"status": "done", "exit_code": 0, "output_bytes": 3_000_005}
    assert written(store, 7) == b"a" * 50_000
    assert written(store, 7, "stderr") == b""
    assert max(len(frame.get("data", "")) for frame in of(store, 7)) <= 16 * 1024


async def test_a_command_that_writes_to_both_streams_in_turn_makes_few_frames_and_loses_nothing(tmp_path: Path) -> None:
    store, script = Store(), "import os\nfor _ in range(20_000): os.write(1, b'o'), os.write(2, b'e')"
    async with device(tmp_path, store):
        await send(store, "command", **order(7, PYTHON, "-c", script))
        await result(store, 7)
    assert (written(store, 7), written(store, 7, "stderr")) == (b"o" * 20_000, b"e" * 20_000)
    assert len(of(store, 7)) < 2_000


# ---- how a command is run


async def test_the_words_of_a_command_reach_the_program_as_they_are(tmp_path: Path) -> None:
    store, words = Store(), ["two words", "", "größe 测试", "$HOME; echo 'no shell' > x", "*"]
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "printf", "%s\n", *words))
        await result(store, 7)
    assert written(store, 7).decode() == "\n".join(words) + "\n"


async def test_a_command_sees_nothing_of_the_agent_s_secrets_and_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IIOT_TOKEN", "hidden")
    monkeypatch.setenv("IIOT_OTHER", "hidden")
    monkeypatch.setenv("OTHER", "given")
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "cat; pwd; env"))
        await result(store, 7)
    lines = written(store, 7).decode().splitlines()
    assert lines[0] == os.getcwd()  # noqa: PTH109 - as the shell says it
    assert "OTHER=given" in lines
    assert not [line for line in lines if "hidden" in line or line.startswith("IIOT_")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["no-such-program"], "no such file: no-such-program"), (["/"], "permission denied: /"), (["a\0b"], "embedded null byte: a\0b")],
)
async def test_what_cannot_be_started_has_failed_and_says_why(tmp_path: Path, argv: list[str], words: str) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, *argv))
        assert await result(store, 7) == {"status": "failed", "message": words.replace("\0", "\u2400"), "output_bytes": 0}
    assert [frame["type"] for frame in of(store, 7)] == ["result"]


async def test_a_command_that_a_signal_killed_says_which(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "kill -9 $$"))
        said = await result(store, 7)
    assert said == {"status": "done", "exit_code": 137, "message": "killed by signal 9 (SIGKILL)", "output_bytes": 0}


@pytest.mark.parametrize("argv", [[], "ls", [1]], ids=str)
async def test_what_is_no_command_is_refused(tmp_path: Path, argv: Any) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **{**order(7), "argv": argv})
        assert await result(store, 7) == {"status": "refused", "message": "argv is no list of texts", "output_bytes": 0}


async def test_without_leave_no_command_is_run_and_nothing_is_kept(tmp_path: Path) -> None:
    store = Store(answers=False)
    async with device(tmp_path, store, allow_commands=False):
        await send(store, "command", **order(7, "touch", str(tmp_path / "ran")))
        await send(store, "command", **order(7, "touch", str(tmp_path / "ran")))
        await send(store, "cancel", command=8)
        assert (await result(store, 8))["status"] == "cancelled"
        assert await result(store, 7) == {"status": "refused", "message": REFUSED, "output_bytes": 0}
    assert list(tmp_path.iterdir()) == []


async def test_a_recording_runs_no_commands(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("time,a\n1767225600,1\n")
    store = Store(answers=False)
    async with played(store.play) as url, running(tmp_path, url, replay=str(tmp_path / "run.csv")):
        await until(lambda: store.sessions)
        await send(store, "command", **order(7, "touch", str(tmp_path / "ran")))
        await send(store, "cancel", command=8)
        assert (await result(store, 8))["status"] == "cancelled"
        assert (await result(store, 7))["message"] == REFUSED
    code, _, err = await agent_command("--token", TOKEN, "--replay", "run.csv", "--allow-commands", folder=tmp_path)
    assert (code, err) == (1, "agent.py: --replay sends a recording alone; leave out --allow-commands\n")


async def test_sixteen_commands_run_at_once_and_no_more(tmp_path: Path) -> None:
    store = Store()
    with gate(tmp_path / "gate") as go_on:
        async with device(tmp_path, store):
            for number in range(1, 18):
                await send(store, "command", **order(number, "sh", "-c", f"read x < {tmp_path}/gate; echo done"))
            assert await result(store, 17) == {
                "status": "refused", "message": "this device runs 16 commands already, and no more at once", "output_bytes": 0,
            }  # fmt: skip
            await until(lambda: len(store.of("started")) == 16)
            for _ in range(16):
                go_on()
            await until(lambda: len(store.of("result")) == 17)
            await send(store, "command", **order(18, "true"))
            assert (await result(store, 18))["status"] == "done"
    assert [results(store, number)[0]["exit_code"] for number in range(1, 17)] == [0] * 16


# ---- how a command ends

STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"


async def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """A child that keeps the output open, one that passes SIGTERM over, and one that does both without any output."""
    store = Store()
    script = f"sleep 1000 & echo $!; ({STUBBORN}) & echo $!; ({STUBBORN}) > /dev/null 2>&1 & echo $!; echo $$; sleep 1000"
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", script, timeout=0.5))
        assert await result(store, 7) == {"status": "timed_out", "message": "killed after 0.5 s", "output_bytes": len(written(store, 7))}
    pids = [int(line) for line in written(store, 7).split()]
    assert len(pids) == 4
    assert [pid for pid in pids if alive(pid)] == []


async def test_a_command_is_ended_gently_first(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "trap 'echo bye; exit 3' TERM; while :; do sleep 0.02; done", timeout=0.3))
        assert (await result(store, 7))["status"] == "timed_out"
    assert written(store, 7) == b"bye\n"


async def test_a_child_that_keeps_the_output_open_keeps_the_command_running_and_ends_with_it(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "sleep 1000 & echo $!", timeout=0.5))
        assert (await result(store, 7))["message"] == "killed after 0.5 s"
    assert not alive(int(written(store, 7)))


async def test_a_child_without_output_outlives_a_command_that_is_done(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "sleep 1000 > /dev/null 2>&1 & echo $!"))
        assert (await result(store, 7))["status"] == "done"
        pid = int(written(store, 7))
        assert alive(pid)
        os.kill(pid, signal.SIGKILL)


async def test_a_process_that_left_the_group_does_not_hold_the_result_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "KILL_SECONDS", 0.1)
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "setsid sh -c 'echo $$; exec sleep 1000' & wait", timeout=0.5))
        assert (await result(store, 7))["status"] == "timed_out"
        assert alive(int(written(store, 7)))
        os.kill(int(written(store, 7)), signal.SIGKILL)


async def test_a_command_that_is_cancelled_is_killed_and_says_so(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "sh", "-c", "echo $$; exec sleep 1000"))
        await until(lambda: written(store, 7))
        await send(store, "cancel", command=7)
        await send(store, "cancel", command=7)
        said = await result(store, 7)
        await send(store, "cancel", command=7)
        await send(store, "command", **order(7, "true"))
        await send(store, "command", **order(8, "true"))
        await result(store, 8)
    assert len(results(store, 7)) == 1
    assert said == {"status": "cancelled", "message": "killed because it was cancelled", "output_bytes": len(written(store, 7))}
    assert not alive(int(written(store, 7)))


async def test_a_command_that_is_cancelled_before_it_comes_is_never_run(tmp_path: Path) -> None:
    """With an agent that is killed before the server has the result, too."""
    store = Store(answers=False)
    async with device(tmp_path, store):
        await send(store, "cancel", command=7)
        await send(store, "command", **order(7, "touch", str(tmp_path / "ran")))
        assert await result(store, 7) == {"status": "cancelled", "message": "it was not begun", "output_bytes": 0}
    store.answers = True
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "touch", str(tmp_path / "ran")))
        await until(lambda: len(results(store, 7)) == 2)
        await until(lambda: ledger(tmp_path) == {})
    assert results(store, 7)[0] == results(store, 7)[1]
    assert not (tmp_path / "ran").exists()


# ---- once, and one result


async def test_a_command_that_comes_twice_is_run_once(tmp_path: Path) -> None:
    store, counting = Store(answers=False), f"echo x >> {tmp_path}/runs"
    with gate(tmp_path / "gate") as go_on:
        async with device(tmp_path, store):
            for _ in range(2):
                await send(store, "command", **order(7, "sh", "-c", f"{counting}; read x < {tmp_path}/gate"))
            await until(lambda: of(store, 7))
            await send(store, "command", **order(7, "sh", "-c", counting))
            go_on()
            await result(store, 7)
            await send(store, "command", **order(7, "sh", "-c", counting))
            await send(store, "command", **order(8, "true"))
            await result(store, 8)
    assert (tmp_path / "runs").read_text() == "x\n"
    assert len(results(store, 7)) == 1


@pytest.mark.parametrize("spool", [False, True], ids=["in memory", "with a spool file"])
async def test_a_command_goes_on_while_the_link_breaks_and_no_byte_is_missing_or_twice(tmp_path: Path, *, spool: bool) -> None:
    """The link breaks before some frames are acknowledged, stored or not; the server sends the command again each time."""
    store = Store(loses=lambda count: count % 7 == 0)
    script = "for i in $(seq 1 40); do seq 1 2000; sleep 0.01; done"
    again = order(7, "sh", "-c", script)

    async def play(caller: Caller) -> None:
        asking = asyncio.create_task(ask())
        try:
            await store.play(caller)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def ask() -> None:
        count = len(store.sessions)
        await until(lambda: len(store.sessions) > count)
        await store.sessions[-1].send("command", **again)

    options = {"spool_file": str(tmp_path / "spool")} if spool else {}
    async with played(play) as url, running(
        tmp_path, url, allow_commands=True, commands_file=str(tmp_path / "commands.json"), **options
    ):  # fmt: skip
        said = await result(store, 7)
        await until(lambda: ledger(tmp_path) == {})
    assert said["exit_code"] == 0
    assert written(store, 7) == 40 * "".join(f"{number}\n" for number in range(1, 2001)).encode()
    assert len(written(store, 7)) == said["output_bytes"]
    assert len(store.sessions) > 2
    assert [frame["type"] for frame in of(store, 7)].count("started") == 1


def arguments(folder: Path, url: str, *more: str) -> tuple[str, ...]:
    return (
        "--url",
        url,
        "--token",
        TOKEN,
        "--name",
        "press-1",
        "--allow-commands",
        "--commands-file",
        str(folder / "commands.json"),
        *more,
    )


SPOOLED = pytest.mark.parametrize("spool", [False, True], ids=["in memory", "with a spool file"])


@SPOOLED
@pytest.mark.parametrize("leader", [True, False], ids=["its first process runs", "its first process has ended"])
async def test_what_a_killed_agent_ran_is_killed_at_the_next_start_and_lost_once(tmp_path: Path, *, leader: bool, spool: bool) -> None:
    store, more = Store(), ("--spool-file", str(tmp_path / "spool")) if spool else ()
    script = f"sleep 1000 & echo $!; {'echo $$; exec sleep 1000' if leader else ''}"
    command = order(7, "sh", "-c", f"echo x >> {tmp_path}/runs; {script}")
    async with played(store.play) as url:
        async with started(tmp_path, *arguments(tmp_path, url, *more)) as first:
            await first.line("connected as press-1")
            await send(store, "command", **command)
            await until(lambda: len(written(store, 7).split()) == 1 + leader)
            first.process.kill()
            await first.end()
        pids = [int(line) for line in written(store, 7).split()]
        assert all(map(alive, pids))
        async with started(tmp_path, *arguments(tmp_path, url, *more)) as second:
            await second.line("connected as press-1")
            await send(store, "command", **command)
            said = await result(store, 7)
            await until(lambda: ledger(tmp_path) == {})
            second.process.kill()
            await second.end()
        async with started(tmp_path, *arguments(tmp_path, url, *more)) as third:
            await third.line("connected as press-1")
            await send(store, "command", **order(8, "true"))
            await result(store, 8)
    assert said == {"status": "lost", "message": "the agent was started again while the command ran", "output_bytes": 0}
    assert len(results(store, 7)) == 1
    await until(lambda: not any(map(alive, pids)))
    assert (tmp_path / "runs").read_text() == "x\n"


@SPOOLED
async def test_a_result_that_was_not_acknowledged_to_a_killed_agent_is_given_again_and_the_command_is_not_run_again(
    tmp_path: Path, *, spool: bool
) -> None:
    """Where the numbers of frames are on the disk too, it is not even sent again."""
    store, more = Store(answers=False), ("--spool-file", str(tmp_path / "spool")) if spool else ()
    command = order(7, "sh", "-c", f"echo x >> {tmp_path}/runs; exit 5")
    async with played(store.play) as url:
        for count in (1, 2):
            async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
                await device.line("connected as press-1")
                if not results(store, 7) or not spool:  # else the server says in its welcome that it has the result
                    await send(store, "command", **command)
                await until(lambda count=count: len(results(store, 7)) == (1 if spool else count))  # type: ignore[misc]
                device.process.kill()
                await device.end()
        async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
            await device.line("connected as press-1")
            if not spool:
                await send(store, "command", **command)
            await send(store, "command", **order(8, "true"))
            await until(lambda: of(store, 8))
            store.answers = True
            await result(store, 8)
            await until(lambda: ledger(tmp_path) == {})
    assert results(store, 7) == [{"status": "done", "exit_code": 5, "output_bytes": 0}] * (1 if spool else 3)
    assert (tmp_path / "runs").read_text() == "x\n"


@SPOOLED
async def test_a_result_that_never_left_a_killed_agent_is_given_at_the_next_start(tmp_path: Path, *, spool: bool) -> None:
    """The link is down when the command ends."""
    store, more = Store(), ("--spool-file", str(tmp_path / "spool")) if spool else ()
    silent = asyncio.Event()

    async def play(caller: Caller) -> None:
        if silent.is_set():
            return
        await store.play(caller)

    with gate(tmp_path / "gate") as go_on:
        async with played(play) as url:
            async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
                await device.line("connected as press-1")
                await send(store, "command", **order(7, "sh", "-c", f"read x < {tmp_path}/gate; exit 5"))
                await until(lambda: of(store, 7))
                silent.set()
                await store.sessions[-1].link.close()
                go_on()
                await until(lambda: "result" in ledger(tmp_path)["7"])
                device.process.kill()
                await device.end()
            silent.clear()
            async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
                assert await result(store, 7) == {"status": "done", "exit_code": 5, "output_bytes": 0}


@SPOOLED
async def test_whenever_the_agent_is_killed_a_command_is_run_at_most_once_and_has_one_result(tmp_path: Path, *, spool: bool) -> None:
    """The server sends at every session what has no result yet, and two commands more each time."""
    store, more, numbers = Store(), ("--spool-file", str(tmp_path / "spool")) if spool else (), random.Random(spool)

    async def play(caller: Caller) -> None:
        sending = asyncio.create_task(send_all(caller))
        try:
            await store.play(caller)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def send_all(caller: Caller) -> None:
        await until(lambda: caller in store.sessions)
        for number in range(1, 2 * caller.number + 1):
            if not results(store, number):
                await caller.send("command", **order(number, "sh", "-c", f"echo {number} >> {tmp_path}/runs; echo out; sleep 0.05; exit 3"))

    async with played(play) as url:
        for _ in range(7):
            async with started(tmp_path, *arguments(tmp_path, url, *more)) as device:
                await device.line("connected as press-1")
                await asyncio.sleep(numbers.uniform(0.0, 0.2))  # any moment
                device.process.kill()
                await device.end()
        async with started(tmp_path, *arguments(tmp_path, url, *more)):
            await until(lambda: all(results(store, number) for number in range(1, 17)))
            await until(lambda: ledger(tmp_path) == {})
    runs = (tmp_path / "runs").read_text().split()
    assert len(runs) == len(set(runs))
    for number in range(1, 17):
        said = results(store, number)
        assert all(one == said[0] for one in said)
        assert said[0]["status"] == "lost" or (said[0]["exit_code"] == 3 and str(number) in runs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_agent_that_is_ended_kills_what_it_runs(tmp_path: Path, number: int) -> None:
    store = Store()
    async with played(store.play) as url:
        async with started(tmp_path, *arguments(tmp_path, url)) as device:
            await device.line("connected as press-1")
            await send(store, "command", **order(7, "sh", "-c", f"({STUBBORN}) & echo $!; echo $$; {STUBBORN}"))
            await until(lambda: len(written(store, 7).split()) == 2)
            device.process.send_signal(number)
            code, err = await device.end()
        assert code == (0 if number == signal.SIGTERM else 130)
        assert "Traceback" not in err
        await until(lambda: not any(alive(int(pid)) for pid in written(store, 7).split()))
        assert (ledger(tmp_path)["7"].keys()) == {"leader", "start", "boot"}
        assert stat.S_IMODE((tmp_path / "commands.json").stat().st_mode) == 0o600
        async with started(tmp_path, *arguments(tmp_path, url)):
            assert (await result(store, 7))["status"] == "lost"


@pytest.mark.parametrize("change", [{"start": 1}, {"boot": "0" * 32}], ids=["another process", "another boot"])
async def test_a_process_that_may_be_another_one_is_left_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    other = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # noqa: ASYNC220 - it is there at once
    try:
        group = agent.Group.led_by(other.pid, 7)
        assert group.is_there()
        entry = {"leader": group.leader, "start": group.start, "boot": group.boot, **change}
        (tmp_path / "commands.json").write_text(json.dumps({"7": entry}))
        store = Store()
        async with device(tmp_path, store):
            assert (await result(store, 7))["status"] == "lost"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("kind", ["result", "output"])
async def test_a_frame_of_a_command_that_the_server_does_not_take_is_done_with(tmp_path: Path, kind: str) -> None:
    fault = {"code": "unknown_command", "message": "There is no such command."}
    store = Store(refuses=lambda frame: fault if frame["type"] == kind else None)
    async with device(tmp_path, store) as held:
        await send(store, "command", **order(7, "echo", "x"))
        await until(lambda: store.refused)
        if kind == "output":
            await result(store, 7)
        await until(lambda: ledger(tmp_path) == {} and len(held._spool) == 0)
        await send(store, "command", **order(8, "true"))
        await until(lambda: results(store, 8) or len(store.refused) == 2)
    assert [frame["type"] for frame in of(store, 7)] == [name for name in ("started", "output", "result") if name != kind]


async def test_a_command_that_cannot_be_noted_is_not_run(tmp_path: Path) -> None:
    store = Store()
    async with device(tmp_path, store):
        (tmp_path / "commands.json.new").mkdir()
        await send(store, "command", **order(7, "touch", str(tmp_path / "ran")))
        said = await result(store, 7)
        assert said["status"] == "refused"
        assert said["message"].startswith(f"it is not begun: that cannot be noted in {tmp_path / 'commands.json'}: ")
        (tmp_path / "commands.json.new").rmdir()
        await send(store, "command", **order(8, "touch", str(tmp_path / "other")))
        assert (await result(store, 8))["status"] == "done"
    assert {path.name for path in tmp_path.iterdir()} >= {"other", "commands.json"}
    assert not (tmp_path / "ran").exists()


# ---- the file


async def test_two_agents_do_not_share_a_file(tmp_path: Path) -> None:
    store = Store()
    async with played(store.play) as url, started(tmp_path, *arguments(tmp_path, url)) as device:
        await device.line("connected as press-1")
        code, _, err = await agent_command(*arguments(tmp_path, url), folder=tmp_path)
    assert code == 1
    assert err.splitlines()[-1] == f"agent.py: another agent uses {tmp_path / 'commands.json'}"


async def test_a_file_whose_folder_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    arguments_ = arguments(tmp_path / "none", f"http://127.0.0.1:{free_port()}")
    code, _, err = await agent_command(*arguments_, folder=tmp_path)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"agent.py: cannot use {tmp_path}/none/commands.json: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("content", ["", "[]", '{"x": {}}', '{"7": 1}', '{"7": {"leader": "x"}}', "\0" * 10], ids=repr)
async def test_a_file_that_is_none_is_told_of_and_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    (tmp_path / "commands.json").write_text(content)
    store = Store()
    async with device(tmp_path, store):
        await send(store, "command", **order(7, "true"))
        await result(store, 7)
        await until(lambda: (tmp_path / "commands.json").read_text() == "{}\n")
    assert f"it is not known which commands were begun: cannot use {tmp_path / 'commands.json'}: " in caplog.text


async def test_what_was_begun_is_answered_for_without_leave_too(tmp_path: Path) -> None:
    """The agent is started again without the flag."""
    (tmp_path / "commands.json").write_text('{"7": {}, "8": {"result": {"type": "result", "command": 8, "status": "done"}}}')
    store = Store()
    async with device(tmp_path, store, allow_commands=False):
        assert (await result(store, 7))["status"] == "lost"
        assert (await result(store, 8))["status"] == "done"
        await until(lambda: ledger(tmp_path) == {})


# ---- the spool


def kinds(spool: agent.Spool) -> list[str]:
    return [frame.kind for frame in spool._waiting]


async def test_frames_of_commands_are_the_last_to_be_dropped() -> None:
    spool = agent.Spool(5)
    for kind in ("result", "started", "output", "state", "telemetry", "log"):
        await spool.put({"type": kind})
    assert kinds(spool) == ["result", "started", "output", "state", "log"]
    for kind in ("output", "output", "telemetry", "output"):
        await spool.put({"type": kind})
    assert kinds(spool) == ["result", "started", "output", "output", "output"]
    for kind in ("result", "result", "result", "result", "started"):
        await spool.put({"type": kind})
    assert kinds(spool) == ["result"] * 5
    assert spool.dropped == 10


async def test_a_result_that_the_spool_had_no_room_for_is_given_again(tmp_path: Path) -> None:
    spool = agent.Spool(1)
    commands = agent.Commands(agent.CommandsFile(tmp_path / "commands.json"), spool, "no")
    spool.settled = commands.settle
    for number in (7, 8):
        await commands.take({"command": number, "argv": ["true"]})
    given = []
    for _ in range(2):
        given += [content["command"] for content in spool.of("result")]
        await spool.next()
        await spool.acknowledge(len(given))
        await commands.give_again()
    assert given == [8, 7]
    assert len(spool) == 0


async def test_the_agent_takes_no_more_commands_than_it_can_keep_in_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "COMMANDS_KNOWN", 3)
    store = Store(answers=False)
    async with device(tmp_path, store, allow_commands=False) as held:
        for number in range(1, 6):
            await send(store, "command", **order(number, "true"))
            await send(store, "cancel", command=number + 10)
        await until(lambda: len(store.of("result")) == 3)
        await send(store, "ack", seq=store.seq)
        await until(lambda: len(held._spool) == 0)
        await send(store, "command", **order(9, "true"))
        assert (await result(store, 9))["status"] == "refused"
    assert {frame["command"] for frame in store.of("result")} == {1, 11, 2, 9}
