"""The program as it is started, stopped and asked from a shell."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import ClientSession
from plant import PATIENCE, ROOT, Device, Plant, Process, command

import iiot

QUICKLY = 10.0  # seconds that a program which cannot start may take to say so: it waits four for another server to stop
TOKEN = re.compile(r"iiot_op_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n")
KEY = re.compile(r"iiot_prov_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n")


@asynccontextmanager
async def started(*arguments: str, folder: Path, **environment: str) -> AsyncIterator[str]:
    """The program started with exactly these arguments and variables; the first line that it prints. Ended by SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "iiot.py"), *arguments, cwd=folder, env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode()
        yield line
    finally:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> tuple[str, str]:
    """End a process by SIGTERM, and by SIGKILL if that is of no use, which fails the test; what it still printed."""
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    return (out or b"").decode(), (err or b"").decode()


def refused(outcome: tuple[int, str, str], *words: str) -> str:
    """The message of a command that had to fail: for people, on standard error, with these words in it."""
    code, out, err = outcome
    assert code not in (0, None), (out, err)
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_output(folder: Path, process: Process) -> str:
    return process.printed + (folder / "stderr").read_text()


async def whoami(client: ClientSession, url: str, token: str) -> tuple[int, Any]:
    async with client.get(f"{url}/whoami", headers={"Authorization": f"Bearer {token}"}) as response:
        return response.status, await response.json()


async def test_the_first_start_prints_a_token_and_a_key_once_and_the_second_start_none(tmp_path: Path) -> None:
    first = await Process(tmp_path).start()
    token, key = await first.read_first_start()
    rest = await read_to_the_end(first)
    printed = first.printed + rest
    assert printed.count("admin token") == printed.count("provisioning key") == 1
    assert len(set(re.findall(r"iiot_op_\S{60}", printed))) == 1
    assert len(set(re.findall(r"iiot_prov_\S{60}", printed))) == 1
    assert token in printed
    assert key in printed
    second = await Process(tmp_path).start()
    assert await read_to_the_end(second) == ""
    assert "iiot_" not in (tmp_path / "stderr").read_text()


async def read_to_the_end(process: Process) -> str:
    """Stop a server; what it still printed."""
    running = process._process
    assert running is not None
    rest, _ = await end(running)
    assert running.returncode == 0
    return rest


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_lines_that_the_first_start_prints_work_as_they_stand(process: Process, tmp_path: Path) -> None:
    await process.start()
    await process.read_first_start()
    lines = process.printed.splitlines()
    device_line, curl_line = (line.strip() for line in lines if "agent.py --url " in line or line.startswith("  curl "))
    agent = await asyncio.create_subprocess_exec(
        *shlex.split(device_line), cwd=tmp_path, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert agent.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while b"connected as" not in (line := await agent.stderr.readline()):
                assert line, "the agent ended"
        curl = await asyncio.create_subprocess_exec(
            *shlex.split(curl_line), "--silent", "--show-error", "--fail", cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await curl.communicate()
    finally:
        agent.kill()
        await agent.communicate()
    assert curl.returncode == 0
    assert out.count(b'"connected":true') == 1


async def test_tokens_of_every_role_are_minted_beside_a_running_server(process: Process, tmp_path: Path) -> None:
    await process.start()
    async with ClientSession() as client:
        for role, tenant in {"viewer": "default", "operator": "default", "admin": "default", "platform": None}.items():
            code, out, err = await command("token", "--role", role, "--name", f"{role}'s", "--db", str(process.database), folder=tmp_path)
            assert (code, err) == (0, "")
            assert TOKEN.fullmatch(out), "the token alone"
            status, who = await whoami(client, process.url, out.strip())
            assert status == 200
            assert (who["role"], who["name"], who["tenant"]) == (role, f"{role}'s", tenant)


async def test_a_provisioning_key_is_minted_beside_a_running_server(process: Process, tmp_path: Path) -> None:
    await process.start()
    code, key, err = await command("provisioning-key", "--uses", "1", "--db", str(process.database), folder=tmp_path)
    assert (code, err) == (0, "")
    assert KEY.fullmatch(key), "the key alone"
    async with ClientSession() as client:
        plant = process.plant(client, "")
        device = await plant.connect()
        await device.send("provision", key=key.strip(), device="press-1")
        credentials = await device.expect("credentials")
        await device.hello(credentials["token"])
        used_up = await plant.connect()
        await used_up.send("provision", key=key.strip(), device="press-2")
        assert (await used_up.closed()).code == 4401


async def test_minting_beside_a_running_server_costs_no_acknowledged_reading(process: Process, tmp_path: Path) -> None:
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        device = await plant.device("press-1")
        for second in range(4):
            await device.store({"ts": f"2026-01-01T00:00:0{second}Z", "values": {"pressure": second}})
            code, _, err = await command("token", "--role", "viewer", "--db", str(process.database), folder=tmp_path)
            assert (code, err) == (0, "")
        await process.stop(signal.SIGKILL)
        await process.start()
        plant.url = process.url
        assert [value for _, value in await plant.points("press-1", "pressure")] == [0, 1, 2, 3]
        assert len((await plant.get("/tokens"))["items"]) == 5
    await process.stop()
    with closing(sqlite3.connect(process.database)) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("words", [("token", "--role", "viewer"), ("provisioning-key",)], ids=" ".join)
async def test_minting_needs_a_database_and_makes_none(tmp_path: Path, words: tuple[str, ...]) -> None:
    refused(await command(*words, "--db", "elsewhere.db", folder=tmp_path), "elsewhere.db")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("words", [("token", "--role", "viewer"), ("provisioning-key",)], ids=" ".join)
async def test_minting_for_an_unknown_tenant_names_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    iiot.prepare_database(tmp_path / "iiot.db")
    refused(await command(*words, "--tenant", "mill-7", folder=tmp_path), "mill-7")


async def test_minting_asks_for_a_known_role(tmp_path: Path) -> None:
    iiot.prepare_database(tmp_path / "iiot.db")
    refused(await command("token", folder=tmp_path), "--role")
    refused(await command("token", "--role", "emperor", folder=tmp_path), "emperor", "viewer")


@pytest.mark.parametrize("uses", ["0", "-1", "many"])
async def test_a_key_is_for_at_least_one_device(tmp_path: Path, uses: str) -> None:
    iiot.prepare_database(tmp_path / "iiot.db")
    refused(await command("provisioning-key", "--uses", uses, folder=tmp_path), "uses")


async def test_settings_come_from_variables_too(tmp_path: Path) -> None:
    settings = {"IIOT_PORT": "0", "IIOT_DB": str(tmp_path / "plant.db"), "IIOT_HEARTBEAT": "7.5", "IIOT_HOST": "0.0.0.0"}
    async with started(folder=tmp_path, **settings) as line:
        found = re.fullmatch(r"listening on http://0\.0\.0\.0:([1-9]\d*)\n", line)
        assert found is not None, line
        assert (tmp_path / "plant.db").exists()
        code, key, _ = await command("provisioning-key", folder=tmp_path, IIOT_DB=settings["IIOT_DB"])
        assert code == 0
        async with ClientSession() as client:
            device = Device(await client.ws_connect(f"http://127.0.0.1:{found[1]}/device"))
            await device.send("provision", key=key.strip(), device="press-1")
            await device.hello((await device.expect("credentials"))["token"])
            assert device.welcome["heartbeat"] == 7.5


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://0.0.0.0:8080", "http://localhost:8080"),
        ("https://[::]:8443", "https://localhost:8443"),
        ("http://10.0.0.0:8080", "http://10.0.0.0:8080"),
        ("http://[fd00::]:8080", "http://[fd00::]:8080"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
    ],
)
def test_a_client_is_told_an_address_that_it_can_use(url: str, near: str) -> None:
    assert iiot.address_to_use(url) == near


async def test_a_flag_wins_over_its_variable(tmp_path: Path) -> None:
    async with started("--port", "0", "--db", "chosen.db", folder=tmp_path, IIOT_PORT="1", IIOT_DB="other.db") as line:
        assert line.startswith("listening on http://127.0.0.1:")
    assert (tmp_path / "chosen.db").exists()
    assert not (tmp_path / "other.db").exists()


async def test_serve_may_be_named(tmp_path: Path) -> None:
    async with started("serve", "--port", "0", folder=tmp_path) as line:
        assert line.startswith("listening on http://127.0.0.1:")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "eighty"], {}, ["--port"]),
        (["--port", "99999"], {}, ["port"]),
        (["--heartbeat", "0"], {}, ["heartbeat"]),
        (["--heartbeat", "nan"], {}, ["heartbeat"]),
        (["--log-level", "loud"], {}, ["loud"]),
        (["--host", "no.such.host.invalid"], {}, ["no.such.host.invalid"]),
        (["--db", "no-such-folder/iiot.db"], {}, ["no-such-folder"]),
        (["--tls-cert", "no-such.pem"], {}, ["no-such.pem"]),
        (["--colour"], {}, ["--colour"]),
        (["fly"], {}, ["fly"]),
        ([], {"IIOT_PORT": "eighty"}, ["IIOT_PORT"]),
        ([], {"IIOT_HEARTBEAT": "often"}, ["IIOT_HEARTBEAT"]),
        ([], {"IIOT_LOG_LEVEL": "loud"}, ["loud"]),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else " ".join(value),
)
async def test_a_setting_that_cannot_be_is_refused_by_name(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    defaults = {"IIOT_PORT": "0", **environment}
    outcome = await run_briefly(*arguments, folder=tmp_path, **defaults)
    refused(outcome, *words)


async def run_briefly(*arguments: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Run the program to its end, or to its first line of output, for then it has started after all."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "iiot.py"), *arguments, cwd=folder, env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(QUICKLY):
            line = (await process.stdout.readline()).decode()
            if not line:
                await process.wait()
    except TimeoutError:
        process.kill()
        raise
    rest, err = await end(process)
    assert process.returncode is not None
    return process.returncode, line + rest, err


@pytest.mark.parametrize("words", [(), ("serve",)], ids=" ".join)
async def test_help_is_a_result(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, err = await command(*words, "--help", folder=tmp_path)
    assert (code, err) == (0, "")
    assert "usage: iiot.py" in out
    if words == ("serve",):
        assert all(f"--{field.name.replace('_', '-')}" in out for field in attrs.fields(iiot.Settings))


async def test_the_version_is_a_result(tmp_path: Path) -> None:
    assert await command("--version", folder=tmp_path) == (0, f"{iiot.VERSION}\n", "")


async def test_two_servers_with_port_zero_listen_on_ports_of_their_own(tmp_path: Path) -> None:
    async with (
        started("--port", "0", "--db", "a.db", folder=tmp_path) as first,
        started("--port", "0", "--db", "b.db", folder=tmp_path) as second,
    ):
        ports = {int(line.rsplit(":", 1)[1]) for line in (first, second)}
    assert len(ports) == 2
    assert 0 not in ports


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = refused(await command("--port", port, folder=tmp_path), port)
    assert "in use" in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_a_signal_ends_sessions_with_1001_and_the_server_with_0(process: Process, number: signal.Signals) -> None:
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        devices = [await plant.device(name) for name in ("press-1", "press-2")]
        await devices[0].telemetry({"values": {"pressure": 1.5}})
        stopping = asyncio.create_task(process.stop(number))
        closed = [await device.closed() for device in devices]
        assert [(one.code, one.reason) for one in closed] == [(1001, "The server is shutting down.")] * 2
        assert await stopping == 0
        assert "Traceback" not in all_output(process.folder, process)
        await process.start()
        plant.url = process.url
        assert [item["connected"] for item in (await plant.get("/iiot"))["items"]] == [False, False]
        events = (await plant.get("/iiot/press-1/events?kind=disconnected"))["items"]
        assert [event["reason"] for event in events] == ["shutting_down"]
        assert len(await plant.points("press-1", "pressure")) == 1, "what was under way is stored before the end"


async def test_nothing_is_left_beside_the_database_after_a_clean_end(process: Process) -> None:
    await process.start()
    await process.stop()
    left = {path.name for path in process.folder.iterdir()} - {"stderr"}
    assert not {name for name in left if name.endswith(("-wal", "-shm", "-journal"))}


async def test_results_are_on_standard_output_and_logs_on_standard_error(tmp_path: Path) -> None:
    process = await Process(tmp_path, "--log-level", "debug").start()
    await process.read_first_start()
    rest = await read_to_the_end(process)
    logged = (tmp_path / "stderr").read_text()
    assert re.search(r"^\S+ \S+ INFO iiot: stopping$", logged, re.MULTILINE)
    assert not re.search(r"DEBUG|INFO|WARNING", process.printed + rest)
    assert "listening" not in logged


async def test_after_kill_9_no_device_is_shown_online(process: Process) -> None:
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        devices = [await plant.device(f"press-{number}") for number in range(3)]
        for device in devices:
            await device.store({"values": {"pressure": 1.5}})
        assert [item["connected"] for item in (await plant.get("/iiot"))["items"]] == [True] * 3
        assert await process.stop(signal.SIGKILL) == -signal.SIGKILL
        await process.start()
        plant.url = process.url
        items = (await plant.get("/iiot"))["items"]
        assert [item["connected"] for item in items] == [False] * 3
        assert all(item["disconnected_at"] >= item["connected_at"] for item in items)
        events = (await plant.get("/iiot/press-1/events"))["items"]
        assert [event["kind"] for event in events] == ["disconnected", "connected", "credentials"]
        assert events[0]["reason"] == "crashed"
        assert "3 open sessions" in (process.folder / "stderr").read_text()


async def expect_the_first_undisturbed(plant: Plant, device: Device) -> None:
    """A running server still stores what its device sends, and shows it online."""
    await device.store({"ts": "2026-01-01T00:00:00Z", "values": {"new metric": 2.5}})
    assert await plant.points("press-1", "new metric") == [["2026-01-01T00:00:00.000Z", 2.5]]
    shown = await plant.get("/iiot/press-1")
    assert (shown["connected"], shown["disconnected_at"]) == (True, None)
    assert [event["kind"] for event in (await plant.get("/iiot/press-1/events"))["items"]] == ["connected", "credentials"]


async def test_a_second_server_on_the_same_database_is_refused_and_the_first_undisturbed(process: Process) -> None:
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        device = await plant.device("press-1")
        database = str(process.database)
        there = process.url.rsplit(":", 1)[1]
        seconds = [run_briefly("--port", port, "--db", database, folder=process.folder) for port in (there, "0")]
        for outcome in await asyncio.gather(*seconds):
            refused(outcome)
        await expect_the_first_undisturbed(plant, device)


COMMANDS = pytest.mark.parametrize("words", [("serve", "--port", "0"), ("token", "--role", "viewer")], ids=lambda words: words[0])


def make_foreign(version: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("create table recipe (name text)")
            connection.execute("insert into recipe values ('soup')")
            connection.execute(f"pragma user_version = {version}")
            connection.commit()

    return make


def make_newer(path: Path) -> None:
    iiot.prepare_database(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"pragma user_version = {iiot.SCHEMA_VERSION + 1}")


@COMMANDS
async def test_a_database_of_a_newer_program_is_refused_and_unchanged(tmp_path: Path, words: tuple[str, ...]) -> None:
    make_newer(tmp_path / "iiot.db")
    before = contents(tmp_path)
    message = refused(await run_briefly(*words, folder=tmp_path), "iiot.db", "newer")
    assert str(iiot.SCHEMA_VERSION + 1) in message
    assert contents(tmp_path) == before


@COMMANDS
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_foreign(0), id="without a version"),
        pytest.param(make_foreign(1), id="of version 1"),
        pytest.param(make_foreign(-1), id="of version -1"),
        pytest.param(make_foreign(9), id="of version 9"),
        pytest.param(lambda path: path.write_text("Dear diary,\n" * 1000), id="a text"),
        pytest.param(lambda path: path.write_text("x"), id="a text of one letter"),
        pytest.param(lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(4096)), id="a broken database"),
    ],
)
async def test_a_file_of_some_other_program_is_refused_and_unchanged(
    tmp_path: Path, words: tuple[str, ...], make: Callable[[Path], Any]
) -> None:
    make(tmp_path / "iiot.db")
    before = contents(tmp_path)
    refused(await run_briefly(*words, folder=tmp_path), "iiot.db")
    assert contents(tmp_path) == before


async def test_a_database_that_is_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "iiot.db").mkdir()
    refused(await run_briefly("--port", "0", folder=tmp_path), "iiot.db")
