"""Starting and stopping, and what lies on the disk: half a setting is refused in words, and no file is taken for another."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import attrs
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import unused_port
from plant import PATIENCE, ROOT, Plant, Process, admin_token, certificate, command, plant, rows, writing

import iiot

Started = asyncio.subprocess.Process


@asynccontextmanager
async def server(folder: Path, *arguments: str, **environment: str) -> AsyncIterator[tuple[Started, str]]:
    """The program as a process, and the first line that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "iiot.py"), *arguments, cwd=folder, env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode()
        yield process, line
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: Started) -> tuple[int, str]:
    """Exit code and standard error."""
    async with asyncio.timeout(PATIENCE):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def logged(process: Started, words: str) -> str:
    """The next line of the log with these words."""
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        while line := (await process.stderr.readline()).decode():
            if words in line:
                return line
    raise AssertionError(f"ended without {words!r}")


# ---- settings


@pytest.mark.parametrize("cert", [(), ("--tls-cert", "")], ids=["absent", "empty"])
async def test_a_key_without_a_certificate_is_refused(tmp_path: Path, cert: tuple[str, ...]) -> None:
    code, out, err = await command("--port", "0", "--tls-key", "key.pem", *cert, folder=tmp_path)
    assert (code, out) == (1, "")
    assert "there is --tls-key but no --tls-cert" in err


async def test_an_empty_variable_is_no_half_of_a_setting(tmp_path: Path) -> None:
    code, _, err = await command("--port", "0", folder=tmp_path, IIOT_TLS_CERT="", IIOT_TLS_KEY="key.pem")
    assert code == 1
    assert "there is --tls-key but no --tls-cert" in err


async def test_a_key_with_a_passphrase_is_refused_in_words(tmp_path: Path) -> None:
    cert, key = await certificate(tmp_path, "locked", passphrase="secret")
    code, out, err = await command("--port", "0", "--tls-cert", cert, "--tls-key", key, folder=tmp_path)
    assert (code, out) == (1, "")
    assert "the key has a passphrase" in err
    assert "openssl pkey" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("variable", [False, True])
async def test_an_empty_host_is_refused(tmp_path: Path, variable: bool) -> None:  # noqa: FBT001 - a table
    if variable:
        code, out, err = await command("--port", "0", folder=tmp_path, IIOT_HOST="")
    else:
        code, out, err = await command("--port", "0", "--host", "", folder=tmp_path)
    assert (code, out) == (2, "")
    assert "'' is not an address or a name" in err


def families(port: int) -> set[str]:
    """The loopback addresses at which something listens on a port."""
    found = set()
    for address in ("127.0.0.1", "::1"):
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError:
            continue
        found.add(address)
    return found


@pytest.mark.parametrize(
    ("host", "expected", "warned"),
    [
        ("127.0.0.1", {"127.0.0.1"}, False), ("::1", {"::1"}, False), ("localhost", None, False),
        ("::", {"127.0.0.1", "::1"}, True), ("0.0.0.0", {"127.0.0.1"}, True),
    ],
)  # fmt: skip
async def test_where_it_listens_and_whether_it_warns(tmp_path: Path, host: str, expected: set[str] | None, warned: bool) -> None:  # noqa: FBT001
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    named = {str(info[4][0]) for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    async with server(tmp_path, "--port", "0", "--host", host) as (process, line):
        port = int(line.rsplit(":", 1)[1])
        assert families(port) == (expected or named)
        process.send_signal(signal.SIGTERM)
        code, err = await ended(process)
    assert code == 0
    assert err.count("without TLS") == int(warned)


@pytest.mark.parametrize("name", ["a..b", "x" * 70])
async def test_a_name_that_cannot_be_one_is_refused_in_words(tmp_path: Path, name: str) -> None:
    code, _, err = await command("--port", "0", "--host", name, folder=tmp_path)
    assert code == 1
    assert f"cannot listen on {name} port 0" in err
    assert "Traceback" not in err


async def test_a_taken_port_is_told_whatever_the_family(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = await command("--port", str(port), "--host", "localhost", folder=tmp_path)
    assert code == 1
    assert f"cannot listen on localhost port {port}" in err
    assert err.endswith("; choose another with --port or --host\n")


# ---- SIGHUP


async def shown_certificate(port: int) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert isinstance(shown, bytes)
    return shown


async def test_sighup_takes_another_certificate_and_keeps_the_old_one_where_it_cannot(tmp_path: Path) -> None:
    cert, key = await certificate(tmp_path, "first")
    other_cert, other_key = await certificate(tmp_path, "second")
    async with server(tmp_path, "--port", "0", "--tls-cert", cert, "--tls-key", key) as (process, line):
        port = int(line.rsplit(":", 1)[1])
        first = await shown_certificate(port)
        shutil.copy(tmp_path / other_cert, tmp_path / cert)
        process.send_signal(signal.SIGHUP)
        assert "the old certificate stays" in await logged(process, "certificate")
        assert await shown_certificate(port) == first, "the key is still the other one's"
        shutil.copy(tmp_path / other_key, tmp_path / key)
        process.send_signal(signal.SIGHUP)
        await logged(process, "reloaded first.pem")
        assert await shown_certificate(port) == ssl.PEM_cert_to_DER_cert((tmp_path / other_cert).read_text())
        process.send_signal(signal.SIGTERM)
        assert (await ended(process))[0] == 0


async def test_sighup_ends_nothing(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        running = process.plant(client, token)
        device = await running.device("press-1")
        os.kill(process.pid, signal.SIGHUP)
        await device.store({"values": {"level": 1}})
        assert await running.get("/healthz")


# ---- the end


async def deaf(running: Plant, name: str) -> asyncio.StreamWriter:
    """A device that answers no close frame."""
    host, port = running.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"GET /device HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    hello = f'{{"type":"hello","token":"{await running.register(name)}"}}'.encode()
    writer.write(b"\x81" + bytes([0x80 | 126]) + len(hello).to_bytes(2, "big") + bytes(4) + hello)
    await reader.readexactly(2)
    return writer


async def test_a_start_waits_for_the_server_that_is_stopping(process: Process, tmp_path: Path) -> None:
    port = unused_port()
    process.arguments = ("--port", str(port))
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        writers = [await deaf(process.plant(client, token), f"press-{n}") for n in range(3)]
        os.kill(process.pid, signal.SIGTERM)
        async with server(tmp_path, "--port", str(port)) as (second, line):
            assert line == f"listening on http://127.0.0.1:{port}\n"
            second.send_signal(signal.SIGTERM)
            assert (await ended(second))[0] == 0
        assert await process.stop() == 0
    for writer in writers:
        writer.close()
    reasons = {row[0] for row in rows(process.database, "select detail ->> 'reason' from event where kind = 'disconnected'")}
    assert reasons == {"shutting_down"}


# ---- who may read it, and whose log it is


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_the_database_and_its_companions_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with plant(tmp_path) as running:
            await running.register("press-1")
            names = {path.name for path in tmp_path.glob("iiot.db*")}
            assert names == {"iiot.db", "iiot.db-wal", "iiot.db-shm", "iiot.db.lock"}
            assert {mode(tmp_path / name) for name in names} == {0o600}
    finally:
        os.umask(before)


def test_an_earlier_database_that_is_migrated_is_for_its_owner_alone_too(tmp_path: Path) -> None:
    database = tmp_path / "iiot.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(f"pragma application_id = {iiot.APPLICATION_ID}")
        connection.executescript((Path(__file__).parent / f"schema-{iiot.SCHEMA_VERSION - 1}.sql").read_text())
        connection.execute(f"pragma user_version = {iiot.SCHEMA_VERSION - 1}")
    database.chmod(0o644)
    iiot.prepare_database(database)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}


async def killed(process: Process, *readings: int) -> None:
    """A run that is killed with readings in its log."""
    await process.start()
    token = admin_token(process.database)
    async with ClientSession() as client:
        running = process.plant(client, token)
        if any(item["device"] == "press-1" for item in (await running.get("/iiot"))["items"]):
            running.tokens["press-1"] = (await running.ask("POST", "/iiot/press-1/token", {"revoke": True}))[1]["token"]
        device = await running.device("press-1")
        for level in readings:
            await device.store({"ts": iiot.EARLIEST + level, "values": {"level": level}})
        assert await process.stop(signal.SIGKILL) == -signal.SIGKILL
    assert Path(f"{process.database}-wal").stat().st_size


def levels(database: Path) -> list[int]:
    return [value for (value,) in rows(database, "select value from telemetry order by ts")]


async def test_a_killed_server_goes_on_with_its_own_log(process: Process) -> None:
    for number in range(3):
        await killed(process, number)
    await process.start()
    assert await process.stop() == 0
    assert levels(process.database) == [0, 1, 2]


@pytest.mark.parametrize("made", ["before this run", "during this run"])
async def test_a_log_is_not_replayed_over_a_backup(process: Process, tmp_path: Path, made: str) -> None:
    backup = tmp_path / "backup.db"
    await process.start()
    assert await process.stop() == 0
    if made == "before this run":
        shutil.copy(process.database, backup)
        await killed(process, 1, 2)
    else:
        await killed(process, 1)
        with closing(sqlite3.connect(process.database)) as connection:
            connection.execute("vacuum into ?", (str(backup),))
        await killed(process, 2)  # a later run, or some minutes later: another salt
    log = Path(f"{process.database}-wal").read_bytes()
    shutil.copyfile(backup, process.database)
    for words in (("--port", "0"), ("token", "--role", "viewer")):
        code, out, err = await command(*words, folder=tmp_path)
        assert (code, out) == (1, "")
        assert "iiot.db-wal was not written for this iiot.db" in err
        assert "remove iiot.db-wal and iiot.db-shm" in err
    assert Path(f"{process.database}-wal").read_bytes() == log
    assert process.database.read_bytes() == backup.read_bytes()
    for companion in ("-wal", "-shm"):
        Path(f"{process.database}{companion}").unlink(missing_ok=True)
    await process.start()
    assert await process.stop() == 0
    assert levels(process.database) == levels(backup)


async def test_a_log_is_replayed_over_the_copy_that_it_was_copied_with(process: Process, tmp_path: Path) -> None:
    await killed(process, 1, 2)
    other = tmp_path / "other"
    other.mkdir()
    for companion in ("", "-wal"):
        shutil.copy(f"{process.database}{companion}", other)
    moved = Process(other)
    await moved.start()
    assert await moved.stop() == 0
    assert levels(moved.database) == [1, 2]


async def test_a_crash_at_any_point_of_renewing_the_salt_is_none_of_another_log(tmp_path: Path) -> None:
    database = tmp_path / "iiot.db"
    iiot.prepare_database(database)
    with closing(iiot.LockFile(database)) as lock:
        for kept in (("old", "new"), ("new",), ()):
            lock.keep(*kept)
            with writing(database) as connection:
                connection.execute("insert into salt values (1, 'new') on conflict (id) do update set value = 'new'")
            with closing(iiot.connect(database)) as reader, closing(iiot.connect(database)) as writer:
                reader.execute("select * from salt").fetchone()
                writer.execute("pragma wal_checkpoint(truncate)")
                with iiot.transaction(writer):
                    counting = "insert into usage (tenant_id, day, points) values (1, 1, 1) on conflict do update set points = points + 1"
                    writer.execute(counting)
                assert Path(f"{database}-wal").stat().st_size
                lock.check_log()
        lock.keep("other")
        with closing(iiot.connect(database)) as reader, writing(database) as connection:
            reader.execute("select * from salt").fetchone()
            connection.execute("update usage set points = 0")
            connection.execute("commit")
            connection.execute("begin")
            with pytest.raises(iiot.StoreError, match=r"iiot\.db-wal was not written for this iiot\.db"):
                lock.check_log()


async def test_the_salt_changes_and_stands_in_both(tmp_path: Path) -> None:
    async with plant(tmp_path, attrs.evolve(iiot.Limits(), salt_seconds=0.01)) as running:
        seen: set[str] = set()
        async with asyncio.timeout(PATIENCE):
            while len(seen) < 4:
                seen.add(rows(running.database, "select value from salt")[0][0])
                await asyncio.sleep(0)
        device = await running.device("press-1")
        await device.store({"values": {"level": 1}})
    kept = (tmp_path / "iiot.db.lock").read_text().split()
    assert rows(running.database, "select value from salt")[0][0] in kept


# ---- open files


INFINITIES = (-1, 2**63 - 1)  # as Linux and as macOS write it


@pytest.mark.parametrize("infinity", INFINITIES)
@pytest.mark.parametrize(
    ("soft", "hard", "tried"),
    [
        (1_024, 524_288, [524_288, 262_144, 65_536, 24_576, 10_240]),
        (1_024, 4_096, [4_096]),
        (4_096, 4_096, []),
        (256, None, [1_048_576, 262_144, 65_536, 24_576, 10_240]),  # macOS
        (65_536, None, [1_048_576, 262_144]),
        (2_000_000, None, []),
        (None, None, []),
    ],
)
def test_a_process_tries_finite_limits_of_open_files_the_highest_first(
    infinity: int, soft: int | None, hard: int | None, tried: list[int]
) -> None:
    assert iiot.higher_limits(infinity if soft is None else soft, infinity if hard is None else hard, infinity) == tried


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="only Linux shows the limits of another process")
async def test_a_server_raises_its_limit_of_open_files_as_far_as_it_may(tmp_path: Path) -> None:
    started = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", 'ulimit -Sn 256; ulimit -Hn 2000; exec "$0" "$@"', sys.executable, str(ROOT / "iiot.py"), "--port", "0",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            assert (await started.stdout.readline()).startswith(b"listening on ")
        limits = Path(f"/proc/{started.pid}/limits").read_text()
        assert next(line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")) == ["2000", "2000"]
    finally:
        started.kill()
        await started.communicate()
