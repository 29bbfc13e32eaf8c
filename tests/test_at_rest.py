"""No secret at rest: after a full run neither the database nor its journal, no copy, log line or error holds a part of a token
or key, wherever people and devices put it; only the first start prints two."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
import signal
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import PATIENCE, Closed, Device, Plant

import iiot

TABLES = ("operator_token", "provisioning_key", "device_token")


def secret_of(token: str) -> str:
    return token[-43:]


def forms(token: str) -> list[bytes]:
    """What gives a token away: a third of its secret, or the whole in another writing."""
    secret = secret_of(token)
    raw = base64.urlsafe_b64decode(secret + "=")
    thirds = (secret[:14], secret[14:28], secret[28:])
    return [*(third.encode() for third in thirds), raw, raw.hex().encode(), secret.encode().hex().encode(), secret.encode("utf-16-le")]


def leaks(content: bytes, tokens: Iterable[str]) -> list[str]:
    """The tokens of which there is a part in this."""
    return [token for token in tokens if any(form in content for form in forms(token))]


def altered(token: str) -> str:
    """A wrong token with an id that there is."""
    return token[:-43] + secrets.token_urlsafe(32)


class Server(plants.Process):
    """A server process, with all that it ever printed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__(folder, *arguments)
        self.output = ""

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
            async with asyncio.timeout(PATIENCE):
                self.output += self.printed + (await self._process.stdout.read()).decode()
                await self._process.wait()
        assert self._process.returncode is not None
        return self._process.returncode


@attrs.define
class Run:
    """What a run has seen: every token and key that was shown by anybody, and every answer that was not to hold one."""

    server: plants.Process
    plant: Plant
    tokens: list[str] = attrs.field(factory=list)
    answers: list[str] = attrs.field(factory=list)

    def know(self, token: str) -> str:
        self.tokens.append(token)
        return token

    async def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        """An answer that is to hold no token, whatever its status."""
        status, answer = await self.plant.ask(method, path, body, **more)
        self.answers.append(f"{method} {path.partition('/')[0]} {status} {json.dumps(answer)}")
        return answer

    async def make(self, method: str, path: str, body: Any = None, token: str | None = None) -> str:
        """The token or key that an answer gives."""
        status, answer = await self.plant.ask(method, path, body, token=token)
        assert status == 201, answer
        return self.know(answer.get("token") or answer["key"])

    async def command(self, *arguments: str) -> str:
        """The token or key that a command prints, alone."""
        code, out, err = await plants.command(*arguments, "--db", str(self.server.database), folder=self.server.folder)
        assert (code, err) == (0, "")
        assert iiot.TOKEN.fullmatch(out.strip())
        return self.know(out.strip())

    async def last_words(self, device: Device) -> None:
        """All that the server still says on a socket that it closes."""
        try:
            while True:
                self.answers.append(json.dumps(await device.receive()))
        except Closed as closed:
            self.answers.append(f"{closed.code} {closed.reason}")

    async def say(self, content: bytes, *more: bytes) -> None:
        """Bytes on a raw connection, in as many pieces, and what comes back until the server closes."""
        url = urlsplit(self.plant.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        for piece in (content, *more):
            writer.write(piece)
            await writer.drain()
            if more:  # a round trip of another connection, so that the server has read this piece by itself
                await self.ask("GET", "/healthz")
        writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            self.answers.append((await reader.read()).decode("latin-1"))
        writer.close()


async def use_devices(run: Run, key: str) -> None:
    """Devices provisioned and registered, all that they send, tokens changed and revoked."""
    plant, name = run.plant, f"press-{len(run.tokens)}"
    device = await plant.connect()
    await device.send("provision", key=key, device=name)
    token = run.know((await device.expect("credentials"))["token"])
    await device.hello(token, agent="press/1")
    await device.store({"values": {"level": 1, "note": "a text"}})
    await device.send("state", seq=2, reported={"serial": "7", "software_version": "1"})
    await device.acknowledged(2)
    await run.ask("POST", f"/iiot/{name}", {"limits": 8.5})
    version = (await device.expect("config"))["version"]
    await device.send("config_status", seq=3, version=version, status="rejected", message="too much")
    await device.acknowledged(3)
    new = await run.make("POST", f"/iiot/{name}/token")
    again = await (await plant.connect()).hello(new)
    await device.closed()
    last = await run.make("POST", f"/iiot/{name}/token", {"revoke": True})
    await run.last_words(again)
    for gone in (token, new):
        stranger = await plant.connect()
        await stranger.send("hello", token=gone)
        await run.last_words(stranger)
    await (await plant.connect()).hello(last)
    await run.make("PUT", f"/iiot/{name}-by-hand")
    await run.ask("DELETE", f"/iiot/{name}-by-hand")


async def mint_and_revoke(run: Run) -> tuple[str, str]:
    """Tokens and keys of every kind, made and removed over HTTP and by the command line; a platform token and a key that stay."""
    platform = await run.command("token", "--role", "platform", "--name", "night shift")
    key = await run.command("provisioning-key", "--uses", "10")
    tenant = f"tenant-{len(run.tokens)}"
    first = await run.command("tenant", "add", tenant)
    await run.make("POST", "/provisioning-keys", {"uses": 1}, token=first)
    await run.ask("GET", "/whoami", token=first)
    await run.ask("DELETE", f"/tenants/{tenant}?confirm={tenant}", token=platform)
    await run.make("POST", "/tenants", {"name": f"{tenant}-too"}, token=platform)
    for path, body, token in (
        ("/tokens", {"name": "viewer", "role": "viewer"}, run.plant.token),
        ("/platform/tokens", {"name": "other", "role": "platform"}, platform),
        ("/provisioning-keys", {}, run.plant.token),
    ):
        made = await run.make("POST", path, body, token=token)
        await run.ask("DELETE", f"{path}/{made.split('_')[2]}", token=token)
        await run.ask("GET", "/whoami", token=made)
    return platform, key


async def misplace_in_requests(run: Run, platform: str, token: str) -> None:
    """A token wherever a request has room for a mistake."""
    encoded = quote(token).replace("_", "%5F")
    for shown in (token, encoded):
        for method, path, body in (
            ("DELETE", f"/tokens/{shown}", None), ("DELETE", f"/provisioning-keys/{shown}", None),
            ("PUT", f"/iiot/{shown}", None), ("GET", f"/iiot/{shown}", None), ("DELETE", f"/iiot/{shown}", None),
            ("PATCH", f"/iiot/{shown}", {"disabled": True}), ("POST", f"/iiot/{shown}", {}),
            ("POST", f"/iiot/{shown}/token", None), ("POST", f"/iiot/{shown}/report", {"what": "state"}),
            ("POST", f"/iiot/{shown}/config/rollback", {"version": 1}), ("GET", f"/nothing/{shown}", None),
            ("GET", f"/iiot?token={shown}", None),
            ("GET", f"/iiot?limit={shown}", None), ("GET", f"/iiot?match={shown}", None), ("GET", f"/iiot?after={shown}", None),
            ("GET", f"/audit?actor={shown}&action={shown}&device={shown}", None), ("GET", f"/audit?from={shown}", None),
            ("POST", f"/iiot?wait={shown}", {"match": "x", "config": {}}), ("GET", f"/events?after={shown}", None),
        ):  # fmt: skip
            await run.ask(method, path, body)
        await run.ask("DELETE", f"/tenants/{shown}?confirm={shown}", token=platform)
        await run.ask("PATCH", f"/tenants/{shown}", {"quotas": {}}, token=platform)
        await run.ask("DELETE", f"/platform/tokens/{shown}", token=platform)
    bodies: tuple[tuple[str, Any], ...] = (
        ("/iiot", {"match": token, "config": {}}), ("/iiot", {"match": f"{token}*", "config": {}}),
        ("/tokens", {"name": "n", "role": token}), ("/tokens", {"name": [token], "role": "viewer"}),
        ("/tokens", {"name": "n", "role": "viewer", "expires_at": token}), ("/provisioning-keys", {"uses": token}),
        ("/iiot/nobody/report", {"what": token}), ("/iiot/nobody/config/rollback", {"version": token}), ("/tokens", token),
    )  # fmt: skip
    for path, body in bodies:
        await run.ask("POST", path, body)
    await run.ask("POST", "/tokens", data=f'{{"name": {token}'.encode())
    await run.ask("POST", "/tenants", {"name": token}, token=platform)
    await run.ask("POST", "/tenants", {"name": "n", "quotas": {"devices": token}}, token=platform)
    basic = base64.b64encode(f"admin:{token}".encode()).decode()
    for name, text in (
        ("Authorization", f"Basic {basic}"), ("Authorization", token), ("Authorization", f"Bearer {token} {token}"), ("If-Match", token),
        ("Last-Event-ID", token), ("X-Forwarded-For", token), ("Cookie", f"token={token}"), ("Upgrade", token), (token, "1"),
    ):  # fmt: skip
        headers = {"Authorization": f"Bearer {run.plant.token}", name: text}
        async with run.plant.client.post(f"{run.plant.url}/iiot/nobody", data=b"{}", headers=headers) as response:
            run.answers.append(await response.text())


def spoiled_requests(shown: bytes) -> list[bytes]:
    """What is no HTTP, with a token in it as a peer writes it."""
    end, header, long = b"\r\nHost: plant\r\n\r\n", b"GET /iiot HTTP/1.1\r\nHost: plant\r\n", b"x" * 9_000
    bearer = header + b"Authorization: Bearer " + shown
    return [
        shown + end, b"GET /iiot/" + shown + end, b"GET /iiot/" + shown + b" HTTP/9.9" + end, b"GET " + shown + b"\0 HTTP/1.1" + end,
        b"GET /iiot/" + shown + b"\0 HTTP/1.1" + end, b"GET /iiot/" + long + shown + b" HTTP/1.1" + end,
        b"GET /iiot/" + shown + long + b" HTTP/1.1" + end, b"GET http://" + shown + b":x/ HTTP/1.1" + end,
        b"GET //[" + shown + b"/ HTTP/1.1" + end, shown + b" /iiot HTTP/1.1" + end, bearer + b"\0\r\n\r\n",
        bearer + long + b"\r\n\r\n", header + b"X: " + long + shown + b"\r\n\r\n", header + shown + b"\r\n\r\n",
        header + shown + b" : 1\r\n\r\n", header + b"Content-Length: " + shown + b"\r\n\r\n",
        header + b"Transfer-Encoding: " + shown + b"\r\n\r\n", header + b"Transfer-Encoding: chunked\r\n\r\n" + shown + b"\r\n",
    ]  # fmt: skip


async def misplace_on_sockets(run: Run, key: str, token: str) -> None:
    """A token wherever a frame has room for a mistake, before and after hello."""
    plant = run.plant
    wrong: tuple[dict[str, Any], ...] = (
        {"type": "provision", "key": key, "device": token}, {"type": "provision", "key": token, "device": "x"},
        {"type": "hello", "token": altered(token)}, {"type": token},
        {"type": "hello", "token": [token]}, {"type": "hello", "token": token, "time": token}, {"token": token},
    )  # fmt: skip
    for frame in wrong:
        if "device" in frame or "token" in frame:
            run.tokens.extend(text for text in frame.values() if isinstance(text, str) and text.startswith("iiot_"))
        device = await plant.connect()
        await device.link.send_json(frame)
        await run.last_words(device)
    for text in (token, f'{{"type": "hello", "token": {token}'):
        device = await plant.connect()
        await device.link.send_str(text)
        await run.last_words(device)
    device = await plant.connect()
    await device.link.send_bytes(token.encode())
    await run.last_words(device)

    name = f"bad-{len(run.tokens)}"
    device = await (await plant.connect()).hello(await run.make("PUT", f"/iiot/{name}"))
    bad: tuple[dict[str, Any], ...] = (
        {"type": "telemetry", "samples": [{"ts": token, "values": {"level": 1}}]},
        {"type": "telemetry", "samples": [{"values": {"note": [token]}}]},
        {"type": "telemetry", "samples": token}, {"type": "state", "reported": token}, {"type": "state", "reported": {}, "mode": token},
        {"type": "config_status", "version": 1, "status": token}, {"type": "config_status", "version": token, "status": "applied"},
        {"type": token}, {"type": "telemetry", "samples": [token]},
    )  # fmt: skip
    for number, frame in enumerate(bad, 1):
        await device.link.send_json({"seq": number, **frame})
        run.answers.append(json.dumps(await device.expect("error")))
    await device.link.send_json({"type": "telemetry", "seq": token, "samples": []})
    run.answers.append(json.dumps(await device.expect("error")))
    await device.close()


async def misplace_as_names(run: Run, platform: str, token: str) -> None:
    """A token as the name of a field, which errors name."""
    for method, path, body, shown in (
        ("GET", f"/iiot?{token}", None, None), ("GET", f"/iiot?{quote(token).replace('_', '%5F')}=1", None, None),
        ("POST", "/tokens", {token: 1}, None), ("POST", "/iiot", {"match": "x", "config": {}, token: 1}, None),
        ("PATCH", "/iiot/nobody", {"labels": {token: 1}}, None), ("PATCH", "/tenants/default", {"quotas": {token: 1}}, platform),
    ):  # fmt: skip
        await run.ask(method, path, body, token=shown)
    device = await run.plant.connect()
    await device.send("hello", **{token: 1})
    await run.last_words(device)
    device = await run.plant.device(f"names-{len(run.tokens)}")
    run.tokens.extend(run.plant.tokens.values())
    frames: tuple[dict[str, Any], ...] = (
        {"type": "telemetry", "samples": [{"values": {token: []}}]}, {"type": "state", "reported": {}, token: 1},
    )  # fmt: skip
    for number, frame in enumerate(frames, 1):
        await device.link.send_json({"seq": number, **frame})
        run.answers.append(json.dumps(await device.expect("error")))


async def full_run(run: Run, key: str) -> None:
    platform, minted = await mint_and_revoke(run)
    for each in (key, minted):
        await use_devices(run, each)
    token = await run.make("POST", "/tokens", {"name": "careless", "role": "operator"})
    await misplace_on_sockets(run, minted, await run.make("PUT", f"/iiot/spare-{len(run.tokens)}"))
    await misplace_in_requests(run, platform, token)
    await misplace_in_requests(run, platform, minted)
    await misplace_as_names(attrs.evolve(run, answers=[]), platform, token)  # the answers have a test of their own
    for content in spoiled_requests(token.encode()):
        await run.say(content)
    for _ in range(12):  # refused as wrong at first, then as too many
        await run.ask("GET", "/whoami", token=run.know(altered(token)))
    for path in ("/audit?format=ndjson", "/audit", "/tokens", "/provisioning-keys", "/iiot", "/whoami"):
        await run.ask("GET", path)
    for path in ("/platform/audit?format=ndjson", "/platform/tokens", "/tenants"):
        await run.ask("GET", path, token=platform)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_files(run: Run, *expected: str) -> None:
    """No file of the server's folder, its log among them, holds a secret."""
    found = files(run.server.folder)
    assert set(expected) <= set(found)
    assert all(found[name] for name in expected), "or nothing was searched"
    assert {name: leaks(content, run.tokens) for name, content in found.items() if leaks(content, run.tokens)} == {}


def check_hashes(run: Run) -> None:
    """What the database has of a secret is its SHA-256, for every token that is not revoked."""
    with closing(sqlite3.connect(run.server.database)) as connection:
        stored = {row for table in TABLES for row in connection.execute(f"select id, secret_hash from {table}")}
    given = {(token.split("_")[2], hashlib.sha256(secret_of(token).encode()).digest()) for token in run.tokens}
    assert stored <= given
    assert len(stored) >= 8


def make_database_of_the_version_before(path: Path) -> None:
    """Nobody's yet, so that the first start is one, and migrates."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"pragma application_id = {iiot.APPLICATION_ID}")
        connection.executescript((Path(__file__).parent / f"schema-{iiot.SCHEMA_VERSION - 1}.sql").read_text())
        connection.execute("insert into tenant (id, name, created_at) values (1, 'default', 0)")
        connection.execute(f"pragma user_version = {iiot.SCHEMA_VERSION - 1}")
        connection.commit()


@asynccontextmanager
async def started(server: Server) -> AsyncIterator[Server]:
    try:
        yield await server.start()
    finally:
        if server.url:
            await server.stop(signal.SIGKILL)


async def test_no_secret_is_in_any_file_log_line_or_error_after_a_full_run(tmp_path: Path) -> None:
    make_database_of_the_version_before(tmp_path / "iiot.db")
    async with ClientSession() as client, started(Server(tmp_path)) as server:
        admin, key = await server.read_first_start()
        run = Run(server, server.plant(client, admin), [admin, key])
        await full_run(run, key)
        database = ("iiot.db", "iiot.db-wal", f"iiot.db.schema-{iiot.SCHEMA_VERSION - 1}")
        check_files(run, *database)
        check_hashes(run)
        assert await server.stop(signal.SIGKILL) == -signal.SIGKILL
        check_files(run, *database)
    async with ClientSession() as client, started(Server(tmp_path, "--log-level", "debug")) as noisy:
        run = Run(noisy, noisy.plant(client, admin), run.tokens, run.answers)
        await full_run(run, key)
        check_files(run, *database, "stderr")
        assert await noisy.stop() == 0
    check_files(run, "iiot.db", "stderr")
    log = (tmp_path / "stderr").read_text()
    assert "cannot serve" in log, "what is no HTTP is logged, or nothing of it was searched"
    for token in (admin, key):
        assert token.split("_")[2].encode() in (tmp_path / "iiot.db").read_bytes(), "the search would find what is there"

    assert [answer for answer in run.answers if leaks(answer.encode(), run.tokens)] == []
    first, rest = server.output.partition("First start.")[::2]
    shown = [line for line in rest.splitlines() if leaks(line.encode(), run.tokens)]
    assert [line.split()[0].partition("#")[0] for line in shown] == ["admin", "provisioning", f"{server.url}/", sys.executable, "curl"]
    assert leaks("".join(shown).encode(), run.tokens) == [admin, key]
    assert leaks((first + noisy.output).encode(), run.tokens) == []


async def test_no_error_repeats_a_secret_that_stands_for_the_name_of_a_field(process: plants.Process) -> None:
    async with ClientSession() as client:
        await process.start()
        admin, key = await process.read_first_start()
        run = Run(process, process.plant(client, admin), [admin, key])
        await misplace_as_names(run, await run.command("token", "--role", "platform"), admin)
    assert len(run.answers) > 8
    assert [answer for answer in run.answers if leaks(answer.encode(), run.tokens)] == []


@pytest.mark.parametrize("way", ["escaped", "cut"])
async def test_no_secret_is_in_the_log_when_a_spoiled_request_has_it_escaped_or_cut(process: plants.Process, way: str) -> None:
    """Percent-encoded, as a client writes it in an address; or in two packets, of which the parser shows the second."""
    process.arguments = ("--log-level", "debug")
    async with ClientSession() as client:
        await process.start()
        admin, key = await process.read_first_start()
        run = Run(process, process.plant(client, admin), [admin, key])
        shown = admin.encode()
        if way == "escaped":
            for content in spoiled_requests(shown.replace(b"_", b"%5F").replace(b"-", b"%2D")):
                await run.say(content)
        else:
            for cut in (len(shown) - 43, len(shown) - 30):
                for content in (b"GET /iiot/%b\0 HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nAuthorization: Bearer %b\0\r\n\r\n"):
                    request = content % shown
                    middle = request.index(shown) + cut
                    await run.say(request[:middle], request[middle:])
        assert await process.stop() == 0
    log = (process.folder / "stderr").read_text()
    assert "cannot serve" in log
    assert leaks(log.replace("%5F", "_").replace("%2D", "-").encode(), run.tokens) == []


@pytest.mark.parametrize("form", range(7))
def test_the_search_finds_a_secret_in_every_writing(form: int) -> None:
    token, other = iiot.mint("op").text, iiot.mint("op").text
    assert leaks(b"before " + forms(token)[form] + b" after", [other, token]) == [token]


async def test_the_agent_keeps_its_token_for_its_own_eyes_and_logs_none(plant: Plant, tmp_path: Path) -> None:
    key = (await plant.ask("POST", "/provisioning-keys", {}))[1]["key"]
    folder = tmp_path / "agent"
    folder.mkdir()
    words = ("--url", plant.url, "--key", key, "--name", "pump-house", "--interval", "0.05", "--log-level", "debug")
    with (tmp_path / "log").open("wb") as log:
        agent = await asyncio.create_subprocess_exec(
            sys.executable, str(plants.ROOT / "agent.py"), *words, cwd=folder, stdout=log, stderr=log, umask=0
        )
        try:
            await plant.until("/iiot", lambda body: body["items"] and body["items"][0]["connected"])
            await plant.ask("POST", "/iiot/pump-house", {"interval": 1})
            await plant.until("/iiot/pump-house/config", lambda body: body["status"] == "applied")
        finally:
            agent.terminate()
            await agent.wait()
    file = folder / "pump-house.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_text().strip()
    with closing(sqlite3.connect(plant.database)) as connection:
        (stored,) = connection.execute("select secret_hash from device_token where id = ?", (token.split("_")[2],)).fetchone()
    assert stored == hashlib.sha256(secret_of(token).encode()).digest()
    assert {name for name, content in files(folder).items() if leaks(content, [key, token])} == {file.name}
    assert leaks((tmp_path / "log").read_bytes(), [key, token]) == []
