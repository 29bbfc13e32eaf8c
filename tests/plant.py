"""What the tests work with: a server on a real socket, in this process or in one of its own, and devices that speak the wire."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Self

import attrs
import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, TCPConnector, WSMsgType

import iiot

ROOT = Path(iiot.__file__).parent
OPENSSL = shutil.which("openssl")
PATIENCE = 20.0  # seconds after which a test gives up waiting for something that ought to come at once


class Closed(Exception):
    """The server closed the socket."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Device:
    """A device as a test plays it: raw frames out, frames in."""

    def __init__(self, link: ClientWebSocketResponse) -> None:
        self.link = link
        self.welcome: dict[str, Any] = {}
        self.seq = 0

    async def send(self, kind: str, **fields: Any) -> None:
        await self.link.send_str(json.dumps({"type": kind, **fields}))

    async def receive(self) -> dict[str, Any]:
        """The next frame. Closed when the server has closed the socket."""
        async with asyncio.timeout(PATIENCE):
            message = await self.link.receive()
        if message.type != WSMsgType.TEXT:
            raise Closed(self.link.close_code, str(message.extra or ""))
        frame: dict[str, Any] = json.loads(message.data)
        return frame

    async def expect(self, kind: str) -> dict[str, Any]:
        """The next frame of this type; others before it are passed over."""
        while (frame := await self.receive())["type"] != kind:
            pass
        return frame

    async def closed(self) -> Closed:
        """Wait until the server closes the socket."""
        try:
            while True:
                await self.receive()
        except Closed as closed:
            return closed

    async def hello(self, token: str, **fields: Any) -> Self:
        await self.send("hello", token=token, **fields)
        self.welcome = await self.expect("welcome")
        self.seq = self.welcome["seq"]
        return self

    async def telemetry(self, *samples: dict[str, Any], seq: int | None = None) -> int:
        """Send samples; the frame's number."""
        self.seq = self.seq + 1 if seq is None else seq
        await self.send("telemetry", seq=self.seq, samples=list(samples))
        return self.seq

    async def acknowledged(self, seq: int) -> None:
        """Wait until the server says that every frame up to `seq` is on disk."""
        while (await self.expect("ack"))["seq"] < seq:
            pass

    async def store(self, *samples: dict[str, Any]) -> None:
        """Send samples and wait until they are on disk."""
        await self.acknowledged(await self.telemetry(*samples))

    async def close(self) -> None:
        await self.link.close()


class Plant:
    """A server, a client with an operator's token, and the devices of one test."""

    def __init__(self, url: str, client: ClientSession, token: str, database: Path) -> None:
        self.url = url
        self.client = client
        self.token = token
        self.database = database
        self.tokens: dict[str, str] = {}
        self._devices: list[Device] = []  # kept: a socket that nobody holds is closed
        self._tunnels: list[ClientWebSocketResponse] = []  # likewise

    async def ask(self, method: str, path: str, body: Any = None, token: str | None = None, data: bytes | None = None) -> tuple[int, Any]:
        """Status and parsed JSON of an answer (its text where it is none)."""
        shown = self.token if token is None else token
        headers = {"Authorization": f"Bearer {shown}"} if shown else {}
        content = json.dumps(body).encode() if data is None and body is not None else data
        async with asyncio.timeout(PATIENCE), self.client.request(method, self.url + path, data=content, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def get(self, path: str) -> Any:
        """The JSON of an answer that must be 200."""
        status, body = await self.ask("GET", path)
        assert status == 200, body
        return body

    async def register(self, name: str) -> str:
        """A new device's token."""
        status, body = await self.ask("PUT", f"/iiot/{name}")
        assert status == 201, body
        self.tokens[name] = body["token"]
        return str(body["token"])

    async def connect(self) -> Device:
        """An open socket on which nothing has been said."""
        link = await self.client.ws_connect(self.url + "/device", protocols=("iiot.v1",), max_msg_size=0, autoclose=True)
        self._devices.append(Device(link))
        return self._devices[-1]

    async def device(self, name: str, **hello: Any) -> Device:
        """A device with an open session; registered if it is new."""
        token = self.tokens.get(name) or await self.register(name)
        return await (await self.connect()).hello(token, **hello)

    async def tunnel(self, name: str, device: Device, token: str | None = None) -> str:
        """A tunnel to a device, which opens it; its number."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        opening = asyncio.create_task(self.client.ws_connect(f"{self.url}/iiot/{name}/tunnel/22", headers=headers, autoclose=False))
        asked = await device.expect("tunnel")
        await device.send("tunnel", tunnel=asked["tunnel"], state="open", credit=1_000)
        self._tunnels.append(await opening)
        _, body = await self.ask("GET", f"/iiot/{name}/tunnels", token=token)
        return str(body["items"][-1]["id"])

    async def points(self, name: str, metric: str, more: str = "") -> list[list[Any]]:
        """Every point of a metric that one page holds."""
        body = await self.get(f"/iiot/{name}/telemetry?metric={metric}&limit=10000{more}")
        points: list[list[Any]] = body["series"][0]["points"]
        return points

    async def until(self, path: str, condition: Any) -> Any:
        """Ask until the answer is as expected: for what follows without being announced to the asker."""
        async with asyncio.timeout(PATIENCE):
            while not condition(body := await self.get(path)):
                await asyncio.sleep(0.01)
        return body


def admin_token(database: Path, role: str = "admin", tenant_name: str = "default") -> str:
    token = iiot.mint("op")

    def add(connection: sqlite3.Connection) -> None:
        tenant = None if role == "platform" else iiot.tenant_id_of(connection, tenant_name)
        iiot.insert_operator_token(connection, tenant, token.stored, f"test {role}", role)

    iiot.change_database(database, add)
    return token.text


async def certificate(folder: Path, name: str, *, passphrase: str = "") -> tuple[str, str]:
    """Files of a certificate and its key."""
    if OPENSSL is None:
        pytest.skip("certificates are made by openssl")
    secret = ["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"]
    process = await asyncio.create_subprocess_exec(
        OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/CN={name}", *secret,
        "-keyout", f"{name}.key", "-out", f"{name}.pem", cwd=folder, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0
    return f"{name}.pem", f"{name}.key"


def client() -> ClientSession:
    """An HTTP client that takes every certificate, and opens as many connections as it is asked for: devices keep theirs."""
    return ClientSession(connector=TCPConnector(ssl=False, limit=0))


@contextmanager
def writing(database: Path) -> Iterator[sqlite3.Connection]:
    """A transaction of the test's own, as a crash may have left it."""
    with closing(iiot.connect(database)) as connection, iiot.transaction(connection):
        yield connection


def rows(database: Path, sql: str) -> list[Any]:
    """What is on disk."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def check_whole(database: Path) -> None:
    """Nothing in a database is damaged. `pragma integrity_check` does not look into an index of words."""
    with writing(database) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert connection.execute("pragma foreign_key_check").fetchall() == []
        connection.execute("insert into log_index (log_index, rank) values ('integrity-check', 0)")
        connection.execute("insert into log_word_index (log_word_index, rank) values ('integrity-check', 1)")


def tables(connection: sqlite3.Connection) -> set[str]:
    """All but SQLite's own, and those of indexes of words, which hold nothing that is not in others."""
    (names,) = connection.execute(
        """select json_group_array(name) from pragma_table_list where schema = 'main' and type = 'table' and name not like 'sqlite_%'"""
    ).fetchone()
    return set(json.loads(names))


def expire(database: Path, table: str, identifier: str) -> None:
    """Let a token or key expire: none can be made that has."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(f"update {table} set expires_at = ? where id = ?", (iiot.now_ms() - 1, identifier))


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program holds the write lock."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("begin immediate")
        try:
            yield
        finally:
            other.execute("rollback")


@functools.cache
def new_database() -> bytes:
    """What a database file holds at first: to make one takes as long as many a test."""
    with tempfile.TemporaryDirectory() as folder:
        iiot.prepare_database(Path(folder, "iiot.db"))
        return Path(folder, "iiot.db").read_bytes()


@asynccontextmanager
async def plant(folder: Path, limits: iiot.Limits | None = None, **settings: Any) -> AsyncIterator[Plant]:
    """A server in this process, its limits lowered at will, and a client for it."""
    database = folder / "iiot.db"
    if not database.exists():
        iiot.make_file(database)
        database.write_bytes(new_database())
    token = admin_token(database)
    chosen = attrs.evolve(iiot.Settings(db=str(database), port=0), **settings)
    async with iiot.serving(chosen, limits) as url, client() as operator:
        yield Plant(url, operator, token, database)


class Process:
    """The server as a process of its own, as people run it."""

    def __init__(self, folder: Path, *arguments: str, descriptors: int = 0, **environment: str) -> None:
        """`descriptors`: how many files and sockets it may have open, if not as many as the system allows."""
        self.folder = folder
        self.arguments = arguments
        self.environment = environment
        self.descriptors = descriptors
        self.url = ""
        self.printed = ""
        self._killed = False
        self._process: asyncio.subprocess.Process | None = None

    @property
    def database(self) -> Path:
        return self.folder / "iiot.db"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> Self:
        """Start, and wait until it listens."""
        with (self.folder / "stderr").open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, str(ROOT / "iiot.py"), "--port", "0", "--db", str(self.database), *self.arguments,
                stdout=asyncio.subprocess.PIPE, stderr=errors, cwd=self.folder,
                env={**os.environ, "PYTHONWARNINGS": "error", **self.environment},
                preexec_fn=self._lower if self.descriptors else None,
            )  # fmt: skip
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = (await self._process.stdout.readline()).decode()
        found = re.fullmatch(r"listening on (https?://\S+)\n", line)
        assert found is not None, (line, (self.folder / "stderr").read_text())
        self.url = found[1]
        self.printed = line
        return self

    def _lower(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.descriptors, self.descriptors))

    async def read_first_start(self) -> tuple[str, str]:
        """The admin token and the provisioning key that the first start prints."""
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while "curl" not in self.printed:
                self.printed += (await self._process.stdout.readline()).decode()
        token, key = re.search(r"iiot_op_\S+", self.printed), re.search(r"iiot_prov_\S+", self.printed)
        assert token is not None
        assert key is not None
        return token[0], key[0]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop it by a signal; its exit code. After a kill the next start must find the database as it was left, so it is looked at when
        that is over."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            await self._process.communicate()
        assert self._process.returncode is not None
        self._killed = self._killed or number == signal.SIGKILL
        if self._killed and number != signal.SIGKILL:
            check_whole(self.database)
        return self._process.returncode

    def plant(self, client: ClientSession, token: str) -> Plant:
        return Plant(self.url, client, token, self.database)


async def command(
    *arguments: str, folder: Path, program: str = "iiot.py", stdin: bytes = b"", **environment: str
) -> tuple[int, str, str]:
    """Run `python iiot.py …`, or another program of the project, to its end: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / program), *arguments, cwd=folder, env={**os.environ, **environment},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(120):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def agent_command(*arguments: str, folder: Path) -> tuple[int, str, str]:
    """Run `python agent.py …` to its end."""
    return await command(*arguments, folder=folder, program="agent.py")
