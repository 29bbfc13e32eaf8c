"""What the noisy tenant of `neighbours.py` does: each input of one tenant that once made all others wait, and the history that it needs."""

from __future__ import annotations

import asyncio
import functools
import json
import sqlite3
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing, suppress
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
from load import client_frame
from plant import locked

FIRST_TS = 1_735_689_600_000  # 2025-01-01
PATIENCE = 30.0


# ---- the wire


@functools.cache
def trusting(certificate: str) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=certificate) if certificate else None


@attrs.frozen
class Place:
    """Where a server listens; with a certificate it speaks TLS."""

    host: str
    port: int
    certificate: str

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, ssl=trusting(self.certificate), limit=1024 * 1024)


class Link:
    """A device's WebSocket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.acknowledged = 0

    @classmethod
    async def open(cls, place: Place, token: str) -> Link:
        """ConnectionError, when the server refuses."""
        link = cls(*await place.connect())
        link.writer.write(
            b"GET /device HTTP/1.1\r\nHost: server\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        try:
            await link._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("closed before the welcome") from error
        link.writer.write(client_frame(json.dumps({"type": "hello", "token": token}).encode()))
        frame = await link.receive()
        if frame["type"] != "welcome":
            link.writer.transport.abort()
            raise ConnectionRefusedError(frame["code"])
        link.acknowledged = frame["seq"]
        return link

    async def receive(self) -> dict[str, Any]:
        """The next text frame. ConnectionError, with the code, when the server closes the socket."""
        while True:
            try:
                first, length = await self._reader.readexactly(2)
                if length > 125:
                    length = int.from_bytes(await self._reader.readexactly(2 if length == 126 else 8), "big")
                payload = await self._reader.readexactly(length)
            except asyncio.IncompleteReadError as error:
                raise ConnectionResetError("closed without a code") from error
            if first & 15 == 8:
                raise ConnectionAbortedError(f"closed {int.from_bytes(payload[:2], 'big')}")
            if first & 15 == 1:
                return dict(json.loads(payload))
            self.writer.write(client_frame(payload, 10))  # a ping


def request(method: str, path: str, token: str = "", body: bytes = b"") -> bytes:
    shown = f"Authorization: Bearer {token}\r\n" if token else ""
    return f"{method} {path} HTTP/1.1\r\nHost: server\r\n{shown}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Client:
    """Asks over one connection for as long as the server keeps it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def ask(self, content: bytes) -> str:
        """The status of the answer, which is read and forgotten; or what went wrong."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._ask(content)
        except (OSError, EOFError) as error:
            self.close()
            return type(error).__name__
        except asyncio.CancelledError:
            self.close()
            raise

    async def _ask(self, content: bytes) -> str:
        if self._streams is None:
            self._streams = await self._place.connect()
        reader, writer = self._streams
        writer.write(content)
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        lengths = [int(field.removeprefix(b"content-length:")) for field in fields if field.startswith(b"content-length:")]
        left = 0 if b" 204 " in status else lengths[0] if lengths else sys.maxsize
        while left and (piece := await reader.read(min(left, 1024 * 1024))):
            left -= len(piece)
            if not lengths and piece.endswith(b"\r\n0\r\n\r\n"):  # the end of a stream
                left = 0
        if left:
            raise EOFError
        return status.split()[1].decode()


# ---- the tenant


@attrs.frozen
class Tenant:
    """What a tenant works with: an admin's token, a viewer's, and its devices'."""

    admin: str
    viewer: str
    devices: tuple[str, ...]


class Noise:
    """The noisy tenant. It counts what became of all that it did. `neighbour` is a device of the quiet tenant."""

    def __init__(self, pipe: Connection, place: Place, database: Path, tenant: Tenant, neighbour: str) -> None:
        self._pipe = pipe
        self.place = place
        self.database = database
        self.admin, self.viewer, self.devices = tenant.admin, tenant.viewer, tenant.devices
        self.neighbour = neighbour
        self.counts: Counter[str] = Counter()

    async def together(self, *work: Coroutine[Any, Any, object]) -> None:
        """Tell that all is prepared; told for how long, do it all, and break it off when the time is over."""
        self._pipe.send("ready")
        seconds = await asyncio.to_thread(self._pipe.recv)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*work)

    async def keep_asking(self, *contents: bytes, patience: float = PATIENCE, pause: float = 0.0) -> None:
        """Ask in turn; go away without the answer when that takes longer than the patience."""
        client = Client(self.place)
        while True:
            for content in contents:
                try:
                    async with asyncio.timeout(patience):
                        status = await client.ask(content)
                except TimeoutError:
                    status = "gone away"
                self.counts[status] += 1
                await asyncio.sleep(pause)

    async def flood(self, token: str, payloads: Iterator[bytes], at_once: int = 1, pause: float = 0.0) -> None:
        """Send frames as fast as the server takes them; connect again when it closes."""
        while True:
            try:
                link = await Link.open(self.place, token)
            except OSError as error:
                self.counts[str(error)] += 1
            else:
                reading = asyncio.create_task(self._count_answers(link))
                while not reading.done():
                    link.writer.write(b"".join(map(client_frame, islice(payloads, at_once))))
                    with suppress(ConnectionError):
                        await link.writer.drain()
                    await asyncio.sleep(pause)
            await asyncio.sleep(1.0)

    async def _count_answers(self, link: Link) -> None:
        try:
            while True:
                frame = await link.receive()
                if frame["type"] == "ack":
                    self.counts["frames stored"] += frame["seq"] - link.acknowledged
                    link.acknowledged = frame["seq"]
                elif frame["type"] in ("error", "throttled"):
                    self.counts[frame.get("code", frame["type"])] += 1
        except ConnectionError as error:
            self.counts[str(error)] += 1

    async def come_and_go(self, token: str) -> None:
        while True:
            try:
                link = await Link.open(self.place, token)
            except OSError as error:
                self.counts[str(error)] += 1
            else:
                self.counts["sessions"] += 1
                link.writer.transport.abort()

    async def stay_silent(self) -> None:
        """Open a connection, say nothing, and open another one when the server closes it."""
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(self.place.host, self.place.port)
                self.counts["silent connections"] += 1
                await reader.read(1)
                self.counts["of them closed"] += 1
                writer.close()
            await asyncio.sleep(0.1)


def document(numbers: int, more: int = 0) -> bytes:
    return json.dumps({f"k{n}": n + more for n in range(numbers)}, separators=(",", ":")).encode()


def patches() -> Iterator[bytes]:
    """A large document, then patches of about 50 bytes."""
    yield b'{"type":"state","seq":1,"mode":"replace","reported":%b}' % document(4_600)
    for seq in count(2):
        yield b'{"type":"state","seq":%d,"reported":{"k0":%d}}' % (seq, seq)


def documents() -> Iterator[bytes]:
    """Documents of nearly 64 KiB that differ in every value."""
    two = document(4_600), document(4_600, 1)
    for seq in count(1):
        yield b'{"type":"state","seq":%d,"mode":"replace","reported":%b}' % (seq, two[seq % 2])


def telemetry(samples: int, values: str) -> Iterator[bytes]:
    """Frames of so many samples, each a second after the one before."""
    for seq in count(1):
        first = FIRST_TS + seq * samples * 1000
        content = ",".join([f'{{"ts":{first + n * 1000},"values":{values}}}' for n in range(samples)])
        yield f'{{"type":"telemetry","seq":{seq},"samples":[{content}]}}'.encode()


# ---- the inputs


async def send_patches(noise: Noise) -> None:
    await noise.together(noise.flood(noise.devices[0], patches(), at_once=50))


async def send_documents(noise: Noise) -> None:
    await noise.together(noise.flood(noise.devices[0], documents()))


async def read_while_writing(noise: Noise) -> None:
    """Two dashboards, and 25,000 points a second."""
    asked = request("GET", "/iiot/noisy-00000/telemetry?metric=m0&metric=m1&limit=10000&every=13s&agg=avg,min,max,sum,last", noise.viewer)
    values = json.dumps({f"k{n}": n * 1.5 for n in range(100)})
    writing = noise.flood(noise.devices[1], telemetry(5, values), pause=0.02)
    await noise.together(noise.keep_asking(asked), noise.keep_asking(asked), writing)


async def go_away(noise: Noise) -> None:
    asked = request("GET", "/iiot/noisy-00000/telemetry?limit=10000&every=1s&agg=avg,min,max,sum,last", noise.viewer)
    await noise.together(*(noise.keep_asking(asked, patience=0.3) for _ in range(3)))


async def ask_for_much(noise: Noise) -> None:
    """What is refused, the most that is not, the same as CSV, and 200,000 points."""
    many, most = ",".join(["sum"] * 120), ",".join(["sum"] * 8)
    queries = ("limit=10000", f"limit=10000&every=1s&agg={many}", f"limit=10000&every=1s&agg={most}", f"every=1s&agg={most}&format=csv")
    await noise.together(
        *(noise.keep_asking(request("GET", f"/iiot/noisy-00000/telemetry?{query}", noise.viewer)) for query in queries)
    )


async def read_and_remove_states(noise: Noise) -> None:
    asked = request("GET", "/iiot/noisy-00000/state/history?limit=1000", noise.viewer)
    removals = [request("DELETE", f"/iiot/noisy-{n:05}", noise.admin) for n in (1, 2)]
    await noise.together(noise.keep_asking(asked), noise.keep_asking(asked), noise.keep_asking(*removals, pause=4.0))


async def push_to_many(noise: Noise) -> None:
    bodies = [json.dumps({"match": "noisy-*", "config": {"blob": letter * 60_000}}).encode() for letter in "xy"]
    await noise.together(noise.keep_asking(*(request("POST", "/iiot", noise.admin, body) for body in bodies)))


async def follow(noise: Noise) -> None:
    """Live feeds that see nothing, and 50 events a second of the quiet tenant."""
    states = (b'{"type":"state","seq":%d,"reported":{"n":%d}}' % (seq, seq) for seq in count(1))
    feeds = (noise.keep_asking(request("GET", "/events", noise.viewer), pause=15.0) for _ in range(300))
    await noise.together(noise.flood(noise.neighbour, states, pause=0.02), *feeds)


async def come_back_with_much(noise: Noise) -> None:
    """Frames of 16,500 points, 1 MB."""
    frames = (telemetry(16_500, '{"temperature_of_bearing":21.5}') for _ in noise.devices)
    await noise.together(*map(noise.flood, noise.devices, frames))


async def lock_database(noise: Noise) -> None:
    async def hold() -> None:
        with locked(noise.database):
            await asyncio.sleep(5.0)
        noise.counts["locked for 5 s"] += 1

    await noise.together(hold())


async def send_large_reals(noise: Noise) -> None:
    """Frames of 0.9 MB with reals that the quick reader does not take."""
    frames = (telemetry(20_000, '{"a":1e20,"b":2e20}') for _ in noise.devices)
    await noise.together(*map(noise.flood, noise.devices, frames))


async def be_refused(noise: Noise) -> None:
    refused = request("POST", f"/iiot/{'z' * 60}", noise.viewer, b"{}")
    await noise.together(*(noise.keep_asking(refused) for _ in range(20)), *(noise.come_and_go(noise.devices[0]) for _ in range(4)))
    with closing(sqlite3.connect(noise.database)) as connection:
        for table in ("audit", "event"):
            (noise.counts[f"{table} entries"],) = connection.execute(f"select count(*) from {table}").fetchone()


async def open_silent_sockets(noise: Noise) -> None:
    await noise.together(*(noise.stay_silent() for _ in range(700)))


async def search_timelines(noise: Noise) -> None:
    """A device with a short timeline, one with half of all entries, and the audit by what is rare."""
    paths = (
        "/iiot/noisy-00001/events", "/iiot/noisy-00000/events?kind=conflict", "/audit?actor=auditor", "/audit?action=token.create",
        "/audit?from=2025-01-02T00:00:00Z&to=2025-01-02T00:01:00Z", "/audit?device=noisy-00001",
    )  # fmt: skip
    await noise.together(*(noise.keep_asking(request("GET", path, noise.admin)) for path in paths))


# ---- their history


def first_device(connection: sqlite3.Connection, tenant: int) -> int:
    return int(connection.execute("select min(id) from device where tenant_id = ?", (tenant,)).fetchone()[0])


NUMBERS = "with recursive n (i) as (select 0 union all select i + 1 from n where i < ? - 1)"


def add_points(connection: sqlite3.Connection, tenant: int) -> None:
    """2.6 million points of one device: 20 metrics, a point a second of each."""
    device = first_device(connection, tenant)
    connection.executemany("insert into series (id, device_id, metric) values (?, ?, ?)", [(n + 1, device, f"m{n}") for n in range(20)])
    connection.execute(
        f"insert into telemetry {NUMBERS} select series.id, ? + i * 1000, i * 1.1 from series, n where device_id = ?",
        (130_000, FIRST_TS, device),
    )


def add_states(connection: sqlite3.Connection, tenant: int) -> None:
    """1,000 documents of 60 KB of three devices."""
    device = first_device(connection, tenant)
    connection.execute(
        f"""insert into state (device_id, version, at, session, document, changes) {NUMBERS}
            select id, i + 1, ? + i * 1000, 1, iif(i % 50 = 0 or i = 999, json_object('blob', printf('%60000d', i)), ''),
                   json_array(json_object('path', '/blob', 'from', printf('%60000d', i - 1), 'to', printf('%60000d', i)))
            from device, n where id between ? and ? + 2""",
        (1_000, FIRST_TS, device, device),
    )


def add_timelines(connection: sqlite3.Connection, tenant: int) -> None:
    """3 million events, half of them of one device and five of another; and as many entries of the audit."""
    device, most = first_device(connection, tenant), 3_000_000
    connection.execute(
        f"""insert into event (tenant_id, device_id, at, kind, detail) {NUMBERS}
            select ?, ? + case when i < 5 then 1 when i % 2 then 0 else 2 + i / 2 % 98 end, ? + i * 1000, 'state', '{{"version":1}}'
            from n""",
        (most, tenant, device, FIRST_TS),
    )
    connection.execute(
        f"""insert into audit (tenant_id, at, token, name, role, action, target, device, address, outcome) {NUMBERS}
            select ?, ? + i * 1000, printf('%016x', i % 20), iif(i < 5, 'auditor', 'operator-' || i % 20), 'operator',
                   iif(i < 5, 'token.create', 'config.push'), 'x', printf('noisy-%05d', iif(i < 5, 1, 2 + i % 98)), '127.0.0.1', 'ok'
            from n""",
        (most, tenant, FIRST_TS),
    )


@attrs.frozen
class Input:
    """One input of the noisy tenant: what it does (None: how long others wait says nothing about it), what its history must be, and
    how many devices it has."""

    number: int
    label: str
    work: Callable[[Noise], Awaitable[None]] | None = None
    fill: Callable[[sqlite3.Connection, int], None] | None = None
    devices: int = 3


INPUTS = (
    Input(1, "merge patches of 50 bytes to a document of 4,600 keys", send_patches),
    Input(1, "documents of 64 KiB that differ in every value", send_documents),
    Input(2, "two bucket queries in a loop, and 25,000 points/s", read_while_writing, add_points),
    Input(3, "three slow queries whose client goes away, in a loop", go_away, add_points),
    Input(4, "120 aggregates; 8 of 20 metrics, as JSON and CSV; 200,000 points", ask_for_much, add_points),
    Input(5, "state history of large documents; their devices removed", read_and_remove_states, add_states),
    Input(6, "pushes of 60 KB to 4,000 devices in a loop", push_to_many, devices=4_000),
    Input(7, "300 idle feeds, and 50 events/s of another tenant", follow),
    Input(8, "150 devices send frames of 1 MB after an outage", come_back_with_much, devices=150),
    Input(9, "another process locks the database for 5 s", lock_database),
    Input(10, "six devices send frames of 0.9 MB, reals of 2^63 and more", send_large_reals, devices=6),
    Input(11, "a viewer's refused requests, a device's hello in a loop", be_refused),
    Input(12, "a configuration that crashes its device"),
    Input(13, "a report that is asked for during a hello"),
    Input(14, "a task that fails"),
    Input(15, "silent TCP connections on the TLS port", open_silent_sockets),
    Input(16, "timelines and audit of 3 million entries, by what is rare", search_timelines, add_timelines, devices=100),
)
