"""The reference device: what it reports of its machine, and what it does with a configuration."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shlex
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import attrs
import pytest
from plant import PATIENCE, ROOT, Plant, agent_command

import agent
import iiot


@attrs.define
class Running:
    """The agent while it runs; what it says goes to a file."""

    process: asyncio.subprocess.Process
    log: Path

    async def says(self, words: str) -> None:
        """Wait until it has said these words."""
        async with asyncio.timeout(PATIENCE):
            while words not in self.log.read_text():
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.01)

    def cpu_ticks(self) -> int:
        """How much it has worked."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(words[11]) + int(words[12])

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def started(folder: Path, plant: Plant, *arguments: str, name: str = "press-1", url: str = "") -> AsyncIterator[Running]:
    """`python agent.py …` as `name`, killed at the end if it still runs."""
    token = plant.tokens.get(name) or await plant.register(name)
    log = folder / f"{name}.log"
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "agent.py"), "--url", url or plant.url, "--token", token, "--name", name, *arguments,
            cwd=folder, stdout=asyncio.subprocess.DEVNULL, stderr=errors, env={**os.environ, "PYTHONWARNINGS": "error"},
        )  # fmt: skip
    running = Running(process, log)
    try:
        yield running
    finally:
        await running.kill()


def script(folder: Path, body: str) -> str:
    """A command for --on-config: Python with the document in `document` and its text in `text`."""
    file = folder / "on_config.py"
    file.write_text(f"import json, os, pathlib, sys, time\ntext = sys.stdin.read()\ndocument = json.loads(text)\n{body}\n")
    return shlex.join([sys.executable, str(file)])


RECORD = """with open('runs', 'a') as file:
    file.write(text + '\\n')"""
UNTIL_GO = """while not os.path.exists('go'):
    time.sleep(0.01)"""


def runs(folder: Path) -> list[Any]:
    """What the command was given, run by run."""
    file = folder / "runs"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kept(folder: Path, name: str = "press-1") -> Any:
    return json.loads((folder / f"{name}.config.json").read_text())


def config_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.json*"))


async def push(plant: Plant, document: Any, wait: str = "", name: str = "press-1") -> dict[str, Any]:
    status, body = await plant.ask("POST", f"/iiot/{name}{wait and f'?wait={wait}'}", document)
    assert status == 202, body
    answer: dict[str, Any] = body
    return answer


async def reported(plant: Plant, condition: Any, name: str = "press-1") -> dict[str, Any]:
    """The document that the device reports, once it is as expected."""
    body = await plant.until(f"/iiot/{name}", lambda body: body["reported"] is not None and condition(body["reported"]))
    document: dict[str, Any] = body["reported"]
    return document


async def online(plant: Plant, name: str = "press-1") -> None:
    """Wait until the agent is connected and has reported."""
    await plant.until(f"/iiot/{name}", lambda body: body["connected"] and body["reported"] is not None)


async def configs(plant: Plant, name: str = "press-1") -> list[tuple[int, str]]:
    """Versions and what came of them, oldest first."""
    items = (await plant.get(f"/iiot/{name}/config/history"))["items"][::-1]
    return [(item["version"], item["status"]) for item in items]


async def verdicts(plant: Plant, name: str = "press-1") -> list[tuple[int, str]]:
    """What the timeline says of configurations, oldest first."""
    items = (await plant.get(f"/iiot/{name}/events?kind=config&limit=1000"))["items"][::-1]
    return [(item["version"], item["status"]) for item in items]


async def state_frames(plant: Plant, name: str = "press-1") -> list[dict[str, Any]]:
    """The changes of the reported document, oldest first."""
    items: list[dict[str, Any]] = (await plant.get(f"/iiot/{name}/state/history?limit=1000"))["items"]
    return items[::-1]


async def readings(plant: Plant, more_than: int) -> int:
    """Wait until there are more readings than that; how many."""
    path = "/iiot/press-1/telemetry?metric=disk_used_percent&limit=10000"
    body = await plant.until(path, lambda body: len(body["series"][0]["points"]) > more_than)
    return len(body["series"][0]["points"])


@asynccontextmanager
async def relay(port: int, url: str) -> AsyncIterator[None]:
    """Pass connections on to the server, which is thereby found at another port; at the end they break."""
    host, _, server = url.removeprefix("http://").partition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(server))
        tasks.update((asyncio.create_task(pass_on(reader, far_writer)), asyncio.create_task(pass_on(far_reader, writer))))

    listening = await asyncio.start_server(connected, "127.0.0.1", port)
    try:
        yield
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listening.wait_closed()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- what the machine is


async def test_the_agent_reports_what_its_machine_is(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant):
        document = await reported(plant, lambda _: True)
    assert document["hostname"] == socket.gethostname()
    assert document["operating_system"] == platform.platform()
    assert document["kernel"] == platform.release()
    assert document["python"] == platform.python_version()
    assert document["software_version"] == agent.VERSION
    assert document["config_version"] == 0
    assert isinstance(document["addresses"], dict)
    if sys.platform == "linux":
        assert "127.0.0.1" in document["addresses"]["lo"]
        assert {"lo"} <= set(document["addresses"]) <= {name for _, name in socket.if_nameindex()}
    assert (await plant.get("/iiot"))["items"][0]["software_version"] == agent.VERSION


async def test_the_agent_reports_once_as_long_as_nothing_changes(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--interval", "0.02"):
        await readings(plant, 10)
    assert [item["version"] for item in await state_frames(plant)] == [1]
    frames = (await plant.device("press-1")).welcome["seq"]
    count = await readings(plant, 10)
    assert frames - count in (1, 2), "frames besides the readings: the state, and again once it is connected"
    async with started(tmp_path, plant, "--interval", "0.02"):
        await readings(plant, count + 5)
    assert [item["version"] for item in await state_frames(plant)] == [1], "nor does a new start change anything"


async def test_the_agent_reports_again_what_changed_alone(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--interval", "0.02"):
        await online(plant)
        await push(plant, {"speed": 1}, wait="10")
        await reported(plant, lambda document: document["config_version"] == 1)
        count = await readings(plant, 1)
        await readings(plant, count + 5)
    assert [item["changes"] for item in await state_frames(plant)][1:] == [[{"path": "/config_version", "from": 0, "to": 1}]]


async def test_a_device_whose_first_report_was_dropped_while_it_was_offline_reports_after_all(plant: Plant, tmp_path: Path) -> None:
    port = free_port()
    async with started(tmp_path, plant, "--interval", "0.01", "--spool", "3", url=f"http://127.0.0.1:{port}") as running:
        await running.says("no session")
        before = running.cpu_ticks()
        async with asyncio.timeout(PATIENCE):
            while running.cpu_ticks() < before + 5:  # many readings by now, each of which pushes an older frame out
                await asyncio.sleep(0.01)
        async with relay(port, plant.url):
            await readings(plant, 20)
            document = (await plant.get("/iiot/press-1"))["reported"]
    assert document is not None
    assert document["hostname"] == socket.gethostname()


async def test_asked_for_its_state_the_agent_sends_it_whole(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--interval", "0.02"):
        document = await reported(plant, lambda _: True)
        await readings(plant, 5)  # by now it reports nothing but changes
        with closing(sqlite3.connect(plant.database)) as other:  # behind the server's back
            other.execute("insert into state select device_id, 2, at, session, ?, '[]' from state", ('{"hostname":"other","more":1}',))
            other.commit()
        await readings(plant, await readings(plant, 0) + 3)
        assert (await plant.get("/iiot/press-1"))["reported"] == {"hostname": "other", "more": 1}
        status, _ = await plant.ask("POST", "/iiot/press-1/report", {"what": "state"})
        assert status == 202
        await reported(plant, lambda shown: shown == document)
    assert [item["version"] for item in await state_frames(plant)] == [1, 2, 3]


# ---- a configuration


async def test_a_configuration_is_applied_and_kept_without_a_command(plant: Plant, tmp_path: Path) -> None:
    documents: list[dict[str, Any]] = [{"speed": 3, "text": "ümläut ☃", "deep": {"list": [1, 2.5, None, True]}}, {}, {"speed": 4}]
    async with started(tmp_path, plant):
        await online(plant)
        for version, document in enumerate(documents, 1):
            answer = await push(plant, document, wait="10")
            assert (answer["version"], answer["status"]) == (version, "applied")
            assert kept(tmp_path) == {"version": version, "document": document}
            await reported(plant, lambda shown, version=version: shown["config_version"] == version)
    assert await verdicts(plant) == [(version, status) for version in (1, 2, 3) for status in ("pending", "applied")]
    shown = await plant.get("/iiot/press-1/config")
    assert (shown["applied"], shown["drift"]) == (3, False)
    assert config_files(tmp_path) == ["press-1.config.json"]


async def test_a_configuration_may_be_kept_elsewhere(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--config-file", "kept.json"):
        await online(plant)
        assert (await push(plant, {"a": 1}, wait="10"))["status"] == "applied"
    assert json.loads((tmp_path / "kept.json").read_text()) == {"version": 1, "document": {"a": 1}}
    assert not (tmp_path / "press-1.config.json").exists()


async def test_a_configuration_that_cannot_be_kept_is_rejected(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--config-file", "no-such-folder/kept.json"):
        await online(plant)
        answer = await push(plant, {"a": 1}, wait="10")
    assert (answer["status"], answer["message"]) == ("rejected", "cannot keep it: No such file or directory")
    assert (await plant.get("/iiot/press-1"))["reported"]["config_version"] == 0


async def test_the_command_is_given_the_document_and_exit_0_applies_it(plant: Plant, tmp_path: Path) -> None:
    document = {"speed": 3, "text": "ümläut ☃ \n \"quoted\" $HOME", "deep": {"list": [1, 2.5, None, True]}}
    command = script(tmp_path, f"{RECORD}\nprint('on standard output')\nprint('a warning', file=sys.stderr)")
    async with started(tmp_path, plant, "--on-config", command):
        await online(plant)
        answer = await push(plant, document, wait="10")
        assert answer == {"device": "press-1", "version": 1, "status": "applied"}
        assert kept(tmp_path) == {"version": 1, "document": document}
        await reported(plant, lambda shown: shown["config_version"] == 1)
    assert runs(tmp_path) == [document]
    assert await verdicts(plant) == [(1, "pending"), (1, "in_progress"), (1, "applied")]
    kinds = [item["kind"] for item in (await plant.get("/iiot/press-1/events?kind=config&kind=state"))["items"]]
    assert kinds[:2] == ["state", "config"], "the state that follows comes after the verdict"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('speed 3 is too fast')", "speed 3 is too fast"),
        ("print('no ümläut ☃', file=sys.stderr)\nsys.exit(2)", "no ümläut ☃"),
        ("print('not this')\nsys.exit(3)", "exit code 3"),
        ("sys.stderr.buffer.write(b'bad \\xff byte\\0')\nsys.exit(1)", "bad \ufffd byte"),
        ("sys.exit('x' * 5000 + ' the end')", "x" * 992 + " the end"),
        ("os.kill(os.getpid(), 9)", None),
    ],
)
async def test_a_command_that_fails_rejects_with_what_it_says(plant: Plant, tmp_path: Path, body: str, message: str | None) -> None:
    async with started(tmp_path, plant, "--on-config", script(tmp_path, body)):
        await online(plant)
        answer = await push(plant, {"speed": 3}, wait="10")
        assert (answer["version"], answer["status"]) == (1, "rejected")
        assert answer["message"] == message if message else answer["message"]
        (tmp_path / "on_config.py").write_text("")  # the next one is taken again
        assert (await push(plant, {"speed": 2}, wait="10"))["status"] == "applied"
        await reported(plant, lambda shown: shown["config_version"] == 2)
    assert kept(tmp_path) == {"version": 2, "document": {"speed": 2}}
    assert await configs(plant) == [(1, "rejected"), (2, "applied")]


async def test_a_command_that_is_not_there_rejects(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--on-config", "./no-such-command"):
        await online(plant)
        answer = await push(plant, {}, wait="10")
    assert answer["status"] == "rejected"
    assert "no-such-command" in answer["message"]
    assert not (tmp_path / "press-1.config.json").exists()


async def test_a_command_need_not_read_the_document(plant: Plant, tmp_path: Path) -> None:
    large = {"a": "x" * 60_000}
    async with started(tmp_path, plant, "--on-config", "exec <&-; true"):
        await online(plant)
        assert (await push(plant, large, wait="10"))["status"] == "applied"
    assert kept(tmp_path)["document"] == large


async def test_a_command_may_leave_a_process_behind(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--on-config", "sleep 6 & cat > received; exit 0"):  # say, the service that it restarts
        await online(plant)
        answer = await push(plant, {"a": 1}, wait="3")
    assert json.loads((tmp_path / "received").read_text()) == {"a": 1}
    assert answer["status"] == "applied"


async def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ON_CONFIG_SECONDS", 0.5)
    file = tmp_path / "pid"
    command_line = f"sh -c 'echo $$ > {shlex.quote(str(file))}; exec sleep 6'; true"
    async with asyncio.timeout(3):
        status, message = await agent.run_on_config(command_line, {})
    assert (status, message) == ("rejected", "the command took longer than 0 s")
    child = Path("/proc") / file.read_text().strip() / "stat"
    async with asyncio.timeout(2):  # what goes on may still change the machine
        while child.exists() and ") Z " not in child.read_text():
            await asyncio.sleep(0.01)


async def test_of_several_pushes_while_a_command_runs_the_newest_alone_is_applied_next(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--on-config", script(tmp_path, f"{RECORD}\n{UNTIL_GO}")):
        await online(plant)
        for number in range(1, 5):
            await push(plant, {"n": number})
            if number == 1:
                await plant.until("/iiot/press-1/config", lambda body: body["status"] == "in_progress")
        (tmp_path / "go").touch()
        await reported(plant, lambda shown: shown["config_version"] == 4)
    assert runs(tmp_path) == [{"n": 1}, {"n": 4}]
    assert kept(tmp_path) == {"version": 4, "document": {"n": 4}}
    assert await configs(plant) == [(1, "applied"), (2, "superseded"), (3, "superseded"), (4, "applied")]


async def test_the_agent_goes_on_sending_readings_while_a_command_runs(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, plant, "--interval", "0.02", "--on-config", script(tmp_path, UNTIL_GO)):
        await online(plant)
        await push(plant, {})
        await plant.until("/iiot/press-1/config", lambda body: body["status"] == "in_progress")
        count = await readings(plant, 1)
        await readings(plant, count + 5)
        assert (await plant.get("/iiot/press-1/config"))["status"] == "in_progress"
        (tmp_path / "go").touch()
        await plant.until("/iiot/press-1/config", lambda body: body["status"] == "applied")


# ---- offline and again


async def test_what_was_pushed_while_the_agent_was_offline_is_applied_within_a_second_of_its_return(plant: Plant, tmp_path: Path) -> None:
    port = free_port()
    arguments = ("--on-config", script(tmp_path, RECORD))
    async with AsyncExitStack() as stack:
        async with relay(port, plant.url):
            await stack.enter_async_context(started(tmp_path, plant, *arguments, url=f"http://127.0.0.1:{port}"))
            await online(plant)
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
        for number in range(1, 4):
            assert (await push(plant, {"n": number}))["status"] == "pending"
        async with relay(port, plant.url):
            shown = await plant.until("/iiot/press-1/config", lambda body: body["status"] == "applied")
            device = await plant.get("/iiot/press-1")
    connected, applied = (iiot.parse_rfc3339(moment) or 0 for moment in (device["connected_at"], shown["status_at"]))
    assert 0 <= applied - connected < 1000
    assert runs(tmp_path) == [{"n": 3}]
    assert await configs(plant) == [(1, "superseded"), (2, "superseded"), (3, "applied")]


async def test_a_verdict_that_came_while_the_connection_was_broken_is_told_afterwards(plant: Plant, tmp_path: Path) -> None:
    port = free_port()
    arguments = ("--on-config", script(tmp_path, f"{RECORD}\n{UNTIL_GO}"))
    async with AsyncExitStack() as stack:
        async with relay(port, plant.url):
            running = await stack.enter_async_context(started(tmp_path, plant, *arguments, url=f"http://127.0.0.1:{port}"))
            await online(plant)
            await push(plant, {"n": 1})
            await plant.until("/iiot/press-1/config", lambda body: body["status"] == "in_progress")
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
        (tmp_path / "go").touch()
        await running.says("configuration 1 applied")
        assert (await plant.get("/iiot/press-1/config"))["status"] != "applied"
        async with relay(port, plant.url):
            await plant.until("/iiot/press-1/config", lambda body: body["status"] == "applied")
            await reported(plant, lambda shown: shown["config_version"] == 1)
    assert runs(tmp_path) == [{"n": 1}]


async def test_the_agent_started_again_does_not_run_the_command_for_what_is_applied(plant: Plant, tmp_path: Path) -> None:
    command = script(tmp_path, RECORD)
    async with started(tmp_path, plant, "--on-config", command):
        await online(plant)
        assert (await push(plant, {"n": 1}, wait="10"))["status"] == "applied"
        await reported(plant, lambda shown: shown["config_version"] == 1)
    async with started(tmp_path, plant, "--on-config", command):
        await plant.until("/iiot/press-1/events?kind=connected", lambda body: len(body["items"]) == 2)
        assert (await push(plant, {"n": 2}, wait="10"))["status"] == "applied"
        await reported(plant, lambda shown: shown["config_version"] == 2)
    assert runs(tmp_path) == [{"n": 1}, {"n": 2}]
    changes = [item["changes"] for item in await state_frames(plant)][1:]
    assert changes == [[{"path": "/config_version", "from": n, "to": n + 1}] for n in (0, 1)], "nor does it forget the version"


async def test_what_was_applied_and_could_not_be_told_is_told_at_the_next_start(plant: Plant, tmp_path: Path) -> None:
    await plant.register("press-1")
    await push(plant, {"n": 1})
    (tmp_path / "press-1.config.json").write_text('{"version": 1, "document": {"n": 1}}')
    async with started(tmp_path, plant, "--on-config", script(tmp_path, RECORD)):
        await plant.until("/iiot/press-1/config", lambda body: body["status"] == "applied")
        await reported(plant, lambda shown: shown["config_version"] == 1)
    assert runs(tmp_path) == []


async def test_another_document_of_the_same_version_is_not_taken_for_the_applied_one(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "press-1.config.json").write_text('{"version": 1, "document": {"n": "of the device before it was removed"}}')
    await plant.register("press-1")
    await push(plant, {"n": 1})
    async with started(tmp_path, plant, "--on-config", script(tmp_path, RECORD)):
        await plant.until("/iiot/press-1/config", lambda body: body["status"] == "applied")
    assert runs(tmp_path) == [{"n": 1}]
    assert kept(tmp_path) == {"version": 1, "document": {"n": 1}}


async def test_a_command_that_was_cut_off_with_its_agent_is_run_again(plant: Plant, tmp_path: Path) -> None:
    command = script(tmp_path, f"{RECORD}\n{UNTIL_GO}")
    async with started(tmp_path, plant, "--on-config", command):
        await online(plant)
        await push(plant, {"n": 1})
        await plant.until("/iiot/press-1/config", lambda body: body["status"] == "in_progress")
    (tmp_path / "go").touch()
    assert not (tmp_path / "press-1.config.json").exists()
    async with started(tmp_path, plant, "--on-config", command):
        await plant.until("/iiot/press-1/config", lambda body: body["status"] == "applied")
    assert runs(tmp_path) == [{"n": 1}, {"n": 1}]


async def test_a_command_ends_with_its_agent_and_the_next_start_runs_it_alone(plant: Plant, tmp_path: Path) -> None:
    command = script(tmp_path, f"""with open('pids', 'a') as file:
    file.write(f'{{os.getpid()}}\\n')
{UNTIL_GO}""")
    for start in (1, 2):
        async with started(tmp_path, plant, "--on-config", command) as running:
            if start == 1:
                await online(plant)
                await push(plant, {"n": 1})
            async with asyncio.timeout(PATIENCE):
                while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().splitlines()) < start:
                    await asyncio.sleep(0.01)
            running.process.terminate()
            async with asyncio.timeout(PATIENCE):
                assert await running.process.wait() == 0
        for pid in (tmp_path / "pids").read_text().split():
            assert not is_alive(int(pid)), "the command is gone when the agent is"
    assert "ended by SIGTERM" in (tmp_path / "press-1.log").read_text()
    assert "Traceback" not in (tmp_path / "press-1.log").read_text()
    assert not (tmp_path / "press-1.config.json").exists()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    state = Path("/proc") / str(pid) / "stat"
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


@pytest.mark.parametrize(
    "content", ["", " \n", "{", "[]", "{}", '"text"', '{"version": null}', '{"version": "one"}', '{"version": 1e999}', "\udcff"]
)
async def test_a_configuration_file_without_one_is_told_by_its_name_and_the_agent_goes_on(
    plant: Plant, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "press-1.config.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    async with started(tmp_path, plant, "--on-config", script(tmp_path, RECORD)) as running:
        await running.says("no applied configuration is known: cannot use press-1.config.json: ")
        await online(plant)
        assert (await push(plant, {"n": 1}, wait="10"))["status"] == "applied"
    assert kept(tmp_path) == {"version": 1, "document": {"n": 1}}
    assert "Traceback" not in running.log.read_text()


async def test_a_configuration_that_has_no_file_to_be_kept_in_ends_the_agent_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "press-1.config.json").mkdir()
    token = iiot.mint("dev").text
    code, out, err = await agent_command("--url", "http://127.0.0.1:9", "--token", token, "--name", "press-1", folder=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("agent.py: cannot use press-1.config.json: ")
    assert err.count("\n") == 1
