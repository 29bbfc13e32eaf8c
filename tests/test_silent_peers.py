"""Connections that say nothing, or not who they are: they are closed in time, and make room for those that do."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import socket
import ssl
import struct
from asyncio import sslproto
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import ClientError
from plant import PATIENCE, Device, Plant, Process, certificate, client, plant

import iiot

DESCRIPTORS = 200  # of the server, so that few connections are many
MANY = DESCRIPTORS + 200
HEAD = b"GET /healthz HTTP/1.1\r\nHost: press\r\n\r\n"
UPGRADE = (
    b"GET /device HTTP/1.1\r\nHost: press\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
QUICK = attrs.evolve(iiot.Limits(), hello_seconds=0.5, close_seconds=0.2, body_seconds=PATIENCE)
PATIENT = attrs.evolve(iiot.Limits(), hello_seconds=PATIENCE)
KINDS = ("tcp", "hello-of-tls", "nothing", "half-a-head", "an-answer-before", "websocket")
WITHOUT_TLS = KINDS[2:]
ALWAYS_SILENT = ("tcp", "hello-of-tls", "nothing", "half-a-head", "websocket")


@functools.cache
def any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Silent:
    """A connection that says little or nothing, and waits."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self, request: bytes) -> bytes:
        """The status line and header of the answer to a request; its body has come as well."""
        self.writer.write(request)
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            if b"Content-Length: " in head:
                await self.reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r")[0]))
        return head

    async def closed(self, seconds: float = PATIENCE / 2) -> None:
        """Wait until the server has closed it."""
        async with asyncio.timeout(seconds):
            try:
                while await self.reader.read(4096):
                    pass
            except ConnectionError:
                pass

    @property
    def is_closed(self) -> bool:
        return self.reader.exception() is not None or bool(vars(self.reader)["_eof"])  # `at_eof` asks for all to be read


class Crowd:
    """Connects to a server, and closes what it has opened at the end."""

    def __init__(self, url: str) -> None:
        scheme, address = url.split("://")
        host, port = address.split(":")
        self.address = (host, int(port))
        self.tls = any_certificate() if scheme == "https" else None
        self.opened: list[Silent] = []

    async def connect(self, kind: str) -> Silent:
        tls = None if kind in ("tcp", "hello-of-tls") else self.tls
        silent = Silent(*await asyncio.open_connection(*self.address, ssl=tls))
        self.opened.append(silent)
        if kind == "hello-of-tls":
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            with pytest.raises(ssl.SSLWantReadError):
                any_certificate().wrap_bio(incoming, outgoing).do_handshake()
            silent.writer.write(outgoing.read())
        elif kind == "half-a-head":
            silent.writer.write(HEAD[:-4])
        elif kind == "an-answer-before":
            assert b" 200 " in await silent.answer(HEAD)
        elif kind == "websocket":
            assert b" 101 " in await silent.answer(UPGRADE)
        return silent

    async def many(self, kind: str, number: int) -> list[Silent]:
        """One after the other: the server must know them in this order."""
        return [await self.connect(kind) for _ in range(number)]

    def close(self) -> None:
        for silent in self.opened:
            if silent.writer.transport is not None:
                silent.writer.transport.abort()


@asynccontextmanager
async def crowd(url: str) -> AsyncIterator[Crowd]:
    made = Crowd(url)
    try:
        yield made
    finally:
        made.close()
        await asyncio.sleep(0)  # transports close in the next turn


@asynccontextmanager
async def small(folder: Path, *, tls: bool) -> AsyncIterator[tuple[Process, Plant, str]]:
    """A server process with few descriptors, a client for it, and a provisioning key."""
    arguments: tuple[str, ...] = ()
    if tls:
        cert, key = await certificate(folder, "localhost")
        arguments = ("--tls-cert", cert, "--tls-key", key)
    process = Process(folder, *arguments, descriptors=DESCRIPTORS)
    async with AsyncExitStack() as stack:
        await process.start()
        stack.push_async_callback(process.stop)
        token, provisioning = await process.read_first_start()
        operator = await stack.enter_async_context(client())
        yield process, process.plant(operator, token), provisioning


@asynccontextmanager
async def quick(folder: Path, *, tls: bool = False, limits: iiot.Limits = QUICK) -> AsyncIterator[Plant]:
    """A server in this process whose patience is short."""
    settings = {}
    if tls:
        cert, key = await certificate(folder, "localhost")
        settings = {"tls_cert": str(folder / cert), "tls_key": str(folder / key)}
    async with plant(folder, limits, **settings) as running:
        yield running


def peers() -> iiot.Peers:
    """Those of the server in this process."""
    return known_peers(asyncio.get_running_loop())


@functools.lru_cache(maxsize=1)  # each test has a loop of its own; to look through all objects takes long
def known_peers(_: asyncio.AbstractEventLoop) -> iiot.Peers:
    doors = [thing for thing in gc.get_objects() if isinstance(thing, iiot.Door)]
    (found,) = [door.peers for door in doors if not all(task.done() for task in door._listening)]
    return found


async def held(number: int) -> None:
    """Wait until the server holds so many connections."""
    known = peers()
    async with asyncio.timeout(PATIENCE):
        while known.held != number:
            await asyncio.sleep(0)


def room_for(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server in this process believe that it may hold so many connections."""
    monkeypatch.setattr(iiot, "descriptors", lambda: iiot.SPARE_DESCRIPTORS + number)


async def provision(running: Plant, key: str, name: str) -> Device:
    """A device that nobody knew, with an open session."""
    device = await running.connect()
    await device.send("provision", key=key, device=name)
    return await device.hello((await device.expect("credentials"))["token"])


async def is_well(running: Plant) -> bool:
    """Whether somebody who was not there before gets an answer."""
    async with client() as newcomer:
        try:
            async with asyncio.timeout(PATIENCE / 4), newcomer.get(running.url + "/healthz") as response:
                return response.status == 200
        except (ClientError, TimeoutError):
            return False


# ---- more of them than descriptors


@pytest.mark.parametrize(("tls", "kind"), [(True, kind) for kind in KINDS] + [(False, kind) for kind in WITHOUT_TLS])
async def test_who_says_who_it_is_comes_in_whoever_holds_connections(tmp_path: Path, tls: bool, kind: str) -> None:  # noqa: FBT001
    async with small(tmp_path, tls=tls) as (process, running, key), crowd(running.url) as silent:
        there = await running.device("press-1")
        for turn in range(2):
            await silent.many(kind, MANY // 2)
            assert await is_well(running)
            await (await provision(running, key, f"new-{turn}")).store({"values": {"level": turn}})
            await there.store({"values": {"level": turn}})
        assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) <= DESCRIPTORS
        held = sum(not one.is_closed for one in silent.opened)
        assert DESCRIPTORS // 3 < held <= DESCRIPTORS - iiot.SPARE_DESCRIPTORS, "who is silent loses its place to somebody alone"
        assert [one.is_closed for one in silent.opened] == [True] * (MANY - held) + [False] * held, "the oldest make room"
        assert (await running.get("/iiot/press-1"))["connected"]
    errors = (tmp_path / "stderr").read_text()
    assert [errors.count(level) for level in ("WARNING", "ERROR", "Traceback")] == [1, 0, 0], errors
    assert "connections run short" in errors


async def test_who_is_known_is_never_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with quick(tmp_path, limits=PATIENT) as running, crowd(running.url) as others:
        devices = [await running.device(f"press-{n}") for n in range(3)]
        feed = await others.connect("nothing")
        follow = f"GET /events HTTP/1.1\r\nHost: press\r\nAuthorization: Bearer {running.token}\r\n\r\n"
        assert b" 200 " in await feed.answer(follow.encode())
        room_for(len(devices) + 1, monkeypatch)
        for _ in range(3):  # the operator has nothing under way and goes; then nobody is left to make room
            await (await others.connect("nothing")).closed()
            assert peers().held == len(devices) + 1
        assert not await is_well(running)
        for device in devices:
            await device.store({"values": {"level": 1}})
        assert not feed.is_closed
        await devices[0].close()
        await held(len(devices))
        assert await is_well(running)


async def test_a_crowd_of_strangers_is_bounded_where_descriptors_are_not(tmp_path: Path) -> None:
    limits = attrs.evolve(PATIENT, connections=6)
    async with quick(tmp_path, limits=limits) as running, crowd(running.url) as silent:
        await silent.many("nothing", 5)
        assert await is_well(running)
        await silent.many("nothing", 3)
        assert await is_well(running)
        assert [one.is_closed for one in silent.opened] == [True] * 3 + [False] * 5


async def test_what_is_left_of_strangers_is_no_garbage_to_be_looked_for(tmp_path: Path) -> None:
    """Thousands of them in a second would fill the memory with circles, and the collector of garbage would make everybody wait."""
    kinds = (iiot.PlainRequestHandler, sslproto.SSLProtocol)

    def left() -> int:
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    async with quick(tmp_path, tls=True, limits=PATIENT) as running, crowd(running.url) as others:
        gc.collect()
        before = left()
        gc.disable()
        try:
            for kind in ("tcp", "hello-of-tls") * 3:
                (await others.connect(kind)).writer.transport.abort()
            noise = await others.connect("tcp")
            noise.writer.write(b"what is this?\r\n\r\n")
            await noise.closed()
            await held(0)
            async with asyncio.timeout(PATIENCE):
                while left() > before:
                    await asyncio.sleep(0.05)
        finally:
            gc.enable()


@pytest.mark.parametrize("tls", [False, True])
async def test_each_connection_is_counted_until_it_ends_however_it_ends(tmp_path: Path, tls: bool) -> None:  # noqa: FBT001 - a table
    async with quick(tmp_path, tls=tls, limits=PATIENT) as running, crowd(running.url) as others:
        token = await running.register("press-1")
        for kind in KINDS if tls else WITHOUT_TLS:
            silent = await others.connect(kind)
            await held(2)  # and the operator
            silent.writer.close()
            await held(1)
            silent = await others.connect(kind)
            connection = silent.writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            silent.writer.transport.abort()  # a reset
            await held(1)
        noise = await others.connect("tcp")
        noise.writer.write(b"what is this?\r\n\r\n")
        await noise.closed()
        await held(1)
        first = await (await running.connect()).hello(token)  # over the connection of the operator
        await held(1)
        second = await (await running.connect()).hello(token)  # supersedes the first
        await first.closed()
        await held(1)
        assert not peers()._strangers
        await second.close()
        await held(0)


async def test_an_accept_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop, failures = asyncio.get_running_loop(), [errno.EMFILE, errno.ECONNABORTED, errno.ENOBUFS]
    accept = loop.sock_accept

    async def accept_or_fail(listener: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise OSError(failures.pop(), "there is none")
        return await accept(listener)

    async with quick(tmp_path, limits=attrs.evolve(QUICK, retry_seconds=0.01)) as running:
        monkeypatch.setattr(loop, "sock_accept", accept_or_fail)
        assert await is_well(running)  # waited for before
        assert await is_well(running)
        assert not failures
    assert caplog.text.count("cannot accept connections") == 2


# ---- in time


async def ask_for_ever(connection: socket.socket) -> None:
    """Send requests and read no answer."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE):
        while True:
            await loop.sock_sendall(connection, HEAD * 100)


@pytest.mark.parametrize(("tls", "kind"), [(True, kind) for kind in ALWAYS_SILENT] + [(False, kind) for kind in ALWAYS_SILENT[2:]])
async def test_who_says_nothing_is_closed_in_time(tmp_path: Path, tls: bool, kind: str) -> None:  # noqa: FBT001 - a table
    async with quick(tmp_path, tls=tls) as running, crowd(running.url) as silent:
        for one in await silent.many(kind, 20):
            await one.closed()
        await held(0)


@pytest.mark.parametrize("tls", [False, True])
async def test_a_head_of_a_byte_now_and_then_is_closed_in_time(tmp_path: Path, tls: bool) -> None:  # noqa: FBT001 - a table
    async with quick(tmp_path, tls=tls) as running, crowd(running.url) as slow:
        one = await slow.connect("half-a-head")
        ended = asyncio.create_task(one.closed())
        while not ended.done():
            one.writer.write(b"x")
            await asyncio.wait([ended], timeout=0.02)
        await ended


async def test_nothing_is_asked_in_time_of_those_who_have_shown_who_they_are(tmp_path: Path) -> None:
    async with quick(tmp_path) as running, crowd(running.url) as others:
        device, asks = await running.device("press-1"), await others.connect("an-answer-before")
        upload = await others.connect("nothing")
        body = b'{"name":"reader","role":"viewer"}'
        upload.writer.write(
            f"POST /tokens HTTP/1.1\r\nHost: press\r\nAuthorization: Bearer {running.token}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        for piece in (body[:10], body[10:20], body[20:]):
            await (await others.connect("nothing")).closed()  # their time is over now
            assert b" 200 " in await asks.answer(HEAD)
            await device.store({"values": {"level": 1}})
            upload.writer.write(piece)
        assert b" 201 " in await upload.answer(b"")


async def test_tls_keeps_little_for_each_connection_and_takes_long_frames(tmp_path: Path) -> None:
    async with quick(tmp_path, tls=True) as running:
        device = await running.device("press-1")
        kept = [thing for thing in gc.get_objects() if isinstance(thing, sslproto.SSLProtocol) and vars(thing)["_server_side"]]
        assert kept
        assert all(len(vars(one)["_ssl_buffer"]) <= 16 * 1024 for one in kept)
        await device.store(*({"ts": iiot.EARLIEST + n, "values": {"text": "x" * 1000}} for n in range(1000)))
        assert len(await running.points("press-1", "text")) == 1000


async def test_who_does_not_answer_the_end_of_tls_is_not_waited_for(tmp_path: Path) -> None:
    async with quick(tmp_path, tls=True) as running, crowd(running.url) as others:
        for _ in range(5):
            deaf = await others.connect("nothing")
            deaf.writer.write(HEAD[:-2] + b"Connection: close\r\n\r\n")
            deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await held(0)


async def test_a_body_that_does_not_come_is_not_waited_for_without_end(tmp_path: Path) -> None:
    async with quick(tmp_path, limits=attrs.evolve(QUICK, body_seconds=0.2)) as running, crowd(running.url) as others:
        upload = await others.connect("nothing")
        head = f"POST /tokens HTTP/1.1\r\nHost: press\r\nAuthorization: Bearer {running.token}\r\nContent-Length: 99\r\n\r\n"
        assert b" 400 " in await upload.answer(head.encode() + b"{")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system does not tell of peers that take nothing")
async def test_who_reads_no_answers_is_not_waited_for_without_end(tmp_path: Path) -> None:
    async with quick(tmp_path, limits=attrs.evolve(QUICK, stall_seconds=0.5)) as running, crowd(running.url) as others:
        await running.client.close()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(others.address)
            deaf.setblocking(False)
            with pytest.raises(ConnectionError):
                await ask_for_ever(deaf)
        await held(0)


async def test_the_end_does_not_wait_for_who_is_about_to_come_in(tmp_path: Path) -> None:
    async with quick(tmp_path, tls=True, limits=PATIENT) as running, crowd(running.url) as silent:
        everybody = await silent.many("tcp", 5) + await silent.many("hello-of-tls", 5)
        await held(10)
    for one in everybody:
        assert one.is_closed


async def test_who_has_gone_is_no_stranger_although_its_request_is_answered_later(tmp_path: Path) -> None:
    async with quick(tmp_path) as running, crowd(running.url) as others:
        for _ in range(20):
            hasty = socket.create_connection(others.address)
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            hasty.sendall(HEAD * 3)
            hasty.close()
        assert await is_well(running)
        await held(0)
        assert not peers()._strangers
