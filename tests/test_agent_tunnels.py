"""Tunnels on a device: bytes both ways, no more than each side has room for, and never before what the spool has to send."""

from __future__ import annotations

import asyncio
import json
import random
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp import WSMsgType
from devices import Caller, Gone, free_port, played
from hypothesis import given
from hypothesis import strategies as st
from plant import PATIENCE, agent_command
from storing import TOKEN, running, until

import agent

WINDOW = 256 * 1024
PIECE = 32 * 1024
MANY = 1 << 40
Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@attrs.define
class Office:
    """A server with tunnels that keeps to the contract, and looks whether the device does. What it says in a tunnel waits for room;
    it reads nothing while `reads` is not set."""

    callers: list[Caller] = attrs.Factory(list)
    frames: list[dict[str, Any]] = attrs.Factory(list)  # of the spool
    said: list[dict[str, Any]] = attrs.Factory(list)  # of tunnels
    order: list[tuple[str, int]] = attrs.Factory(list)  # of all: the kind, and of bytes the tunnel
    received: dict[int, bytearray] = attrs.Factory(dict)
    room: dict[int, int] = attrs.Factory(dict)  # bytes that the device may send
    credit: dict[int, int] = attrs.Factory(dict)  # bytes that the server may send
    granted: dict[int, list[int]] = attrs.Factory(dict)
    reads: asyncio.Event = attrs.Factory(asyncio.Event)
    seq: int = 0
    refills: bool = False  # the room for the device

    async def play(self, caller: Caller) -> None:
        await caller.welcome(self.seq)
        self.callers.append(caller)
        self.reads.set()
        while True:
            await self.reads.wait()
            message = await caller.link.receive()
            if message.type == WSMsgType.BINARY:
                await self.take_bytes(caller, message.data)
            elif message.type == WSMsgType.TEXT:
                await self.take(caller, json.loads(message.data))
            else:
                raise Gone

    async def take(self, caller: Caller, frame: dict[str, Any]) -> None:
        self.order.append((frame["type"], 0))
        if frame["type"] != "tunnel":
            self.frames.append(frame)
            self.seq = frame["seq"]
            await caller.send("ack", seq=self.seq)
            return
        assert "seq" not in frame
        self.said.append(frame)
        if "credit" in frame:
            assert frame["state"] in ("open", "credit")
            self.credit[frame["tunnel"]] = self.credit.get(frame["tunnel"], 0) + frame["credit"]
            self.granted.setdefault(frame["tunnel"], []).append(frame["credit"])

    async def take_bytes(self, caller: Caller, data: bytes) -> None:
        (number,) = struct.unpack_from(">I", data)
        self.order.append(("bytes", number))
        size = len(data) - 4
        assert 0 < size <= PIECE
        self.room[number] -= size
        assert self.room[number] >= 0, "the device keeps to its credit"
        self.received.setdefault(number, bytearray()).extend(data[4:])
        if self.refills:
            await self.grant(number, size)

    async def tell(self, number: int, state: str, **fields: Any) -> None:
        await self.callers[-1].send("tunnel", tunnel=number, state=state, **fields)

    async def open(self, number: int, port: int, credit: int = WINDOW) -> None:
        """Open a tunnel, and wait until it is."""
        self.room[number] = credit
        await self.tell(number, "open", port=port, credit=credit)
        await until(lambda: self.states(number)[:1] == ["open"], lambda: self.said)

    async def grant(self, number: int, credit: int) -> None:
        self.room[number] += credit
        await self.tell(number, "credit", credit=credit)

    async def put(self, number: int, data: bytes) -> None:
        """Send bytes whether it may or not."""
        await self.callers[-1].link.send_bytes(struct.pack(">I", number) + data)

    async def send(self, number: int, data: bytes) -> None:
        """Send bytes as the device has room for them."""
        rest = memoryview(data)
        while rest:
            await until(lambda: self.credit[number] > 0, lambda: self.said)
            piece = rest[: min(PIECE, self.credit[number])]
            self.credit[number] -= len(piece)
            await self.put(number, bytes(piece))
            rest = rest[len(piece) :]

    def states(self, number: int) -> list[str]:
        """What the device said of a tunnel, but for room."""
        return [frame["state"] for frame in self.said if frame["tunnel"] == number and frame["state"] != "credit"]

    def last(self, number: int) -> dict[str, Any]:
        """What it said last."""
        return next(frame for frame in reversed(self.said) if frame["tunnel"] == number)

    async def answers(self, number: int, state: str) -> dict[str, Any]:
        await until(lambda: state in self.states(number), lambda: self.said)
        return next(frame for frame in self.said if (frame["tunnel"], frame["state"]) == (number, state))


@asynccontextmanager
async def device(folder: Path, office: Office, *ports: int, **options: Any) -> AsyncIterator[agent.Agent]:
    """The agent in this process, in a session with the office, with leave for these ports."""
    allowed = ",".join(map(str, ports))
    async with played(office.play) as url, running(folder, url, allow_tunnel=allowed, **options) as held:
        await until(lambda: len(office.frames) >= 2)
        yield held


@asynccontextmanager
async def program(handle: Handle) -> AsyncIterator[int]:
    """A program that listens on this machine; its port. What went wrong in it fails the test."""
    failures: list[BaseException] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except ConnectionError:
            pass
        except Exception as error:  # noqa: BLE001 - it is raised again in the test itself
            failures.append(error)
        finally:
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failures:
        raise failures[0]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(bytes(65_536))
        await writer.drain()


async def wait_for_end(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


def noise(count: int) -> bytes:
    return random.Random(count).randbytes(count)


# ---- bytes both ways


async def test_bytes_go_both_ways_unchanged_and_nobody_sends_more_than_it_may(tmp_path: Path) -> None:
    office, data = Office(refills=True), noise(3_000_000)
    async with program(echo) as port, device(tmp_path, office, port):
        await office.open(7, port)
        await office.send(7, data)
        await until(lambda: len(office.received.get(7, b"")) == len(data))
        assert office.received[7] == data
        await office.tell(7, "end")
        await office.answers(7, "end")
        await office.put(7, b"late")
        await office.tell(7, "credit", credit=5)
        await office.tell(7, "closed")
        await office.open(8, port)
    assert office.states(7) == ["open", "end"]
    first, *others = office.granted[7]
    assert first == WINDOW
    assert all(credit >= WINDOW // 2 for credit in others)


async def test_the_operator_may_end_first_and_reads_the_answer(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.read()
        writer.write(b"answer to " + question)

    office = Office()
    async with program(answer) as port, device(tmp_path, office, port):
        await office.open(7, port)
        await office.send(7, b"question")
        await office.tell(7, "end")
        await office.answers(7, "end")
    assert office.received[7] == b"answer to question"
    assert office.states(7) == ["open", "end"]


async def test_the_program_may_end_first_and_reads_on(tmp_path: Path) -> None:
    read: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"that is all")
        writer.write_eof()
        read.set_result(await reader.read())

    office, data = Office(), noise(WINDOW + 5)
    async with program(end) as port, device(tmp_path, office, port):
        await office.open(7, port)
        await office.answers(7, "end")
        assert office.received[7] == b"that is all"
        await office.send(7, data)
        await office.tell(7, "end")
        async with asyncio.timeout(PATIENCE):
            assert await read == data
    assert office.states(7) == ["open", "end"]


async def test_a_program_that_listens_on_the_other_family_is_found(tmp_path: Path) -> None:
    office = Office()
    try:
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no ::1")
    with listening:
        port = listening.getsockname()[1]
        async with device(tmp_path, office, port):
            await office.open(7, port)


# ---- what is refused


async def test_a_port_without_leave_is_refused_and_so_is_one_where_nothing_listens(tmp_path: Path) -> None:
    office, dead = Office(), free_port()
    async with program(echo) as port, device(tmp_path, office, dead):
        await office.tell(7, "open", port=port, credit=WINDOW)
        told = (await office.answers(7, "refused"))["message"]
        assert told == f"this device does not open port {port}: its agent was started without it in --allow-tunnel"
        await office.tell(8, "open", port=dead, credit=WINDOW)
        assert (await office.answers(8, "refused"))["message"] == f"nothing listens at port {dead} of this device"
        await office.tell(9, "open", port=dead, credit=WINDOW)
        await office.answers(9, "refused")
    assert [office.states(number) for number in (7, 8, 9)] == [["refused"]] * 3


async def test_a_program_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue of connections is full."""
    monkeypatch.setattr(agent, "CONNECT_SECONDS", 0.2)
    office = Office()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        port = listening.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        async with device(tmp_path, office, port):
            await office.tell(7, "open", port=port, credit=WINDOW)
            assert (await office.answers(7, "refused"))["message"] == f"nothing answers at port {port} of this device within 0 s"
        for one in waiting:
            one.close()


async def test_sixty_four_tunnels_are_open_at_once_and_no_more(tmp_path: Path) -> None:
    office = Office()
    async with program(wait_for_end) as port, device(tmp_path, office, port):
        for number in range(64):
            await office.open(number, port)
        await office.tell(64, "open", port=port, credit=WINDOW)
        assert (await office.answers(64, "refused"))["message"] == "this device has 64 tunnels already, and no more at once"
        await office.tell(5, "end")
        await office.answers(5, "end")
        await office.open(65, port)


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("", ()), ("22", (22,)), ("22, 8000-8002", (22, 8000, 8001, 8002)), ("1-1,65535", (1, 65535)),
        ("0", None), ("65536", None), ("22-", None), ("30-22", None), ("22,", None), ("ssh", None), ("99999999", None), ("-5", None),
    ],
)  # fmt: skip
def test_ports_are_single_ones_and_ranges(text: str, ports: tuple[int, ...] | None) -> None:
    assert agent.is_ports(text) is (ports is not None)
    if ports is not None:
        assert tuple(port for part in agent.parse_ports(text) for port in part) == ports


@given(st.lists(st.tuples(st.integers(1, 65_535), st.integers(0, 50)), max_size=5))
def test_ports_that_are_named_are_those_that_are_open(parts: list[tuple[int, int]]) -> None:
    named = [(first, min(first + more, 65_535)) for first, more in parts]
    ports = agent.parse_ports(",".join(f"{first}-{last}" if last > first else str(first) for first, last in named))
    assert {port for part in ports for port in part} == {port for first, last in named for port in range(first, last + 1)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--allow-tunnel", "22,70000"), "'22,70000' is not ports and ranges of ports from 1 to 65535, such as 22,8000-8010"),
        (("--allow-tunnel", "22", "--replay", "run.csv"), "--replay sends a recording alone; leave out --allow-tunnel"),
    ],
)
async def test_what_cannot_be_is_refused_at_the_start(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = await agent_command("--token", TOKEN, *arguments, folder=tmp_path)
    assert code in (1, 2)
    assert words in err
    assert "Traceback" not in err


# ---- credit


async def test_the_device_sends_what_it_may_and_waits_for_more(tmp_path: Path) -> None:
    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    office, data = Office(), noise(100_000)
    async with program(talk) as port, device(tmp_path, office, port):
        await office.open(7, port, credit=1)
        for most in (1, 1_000, 40_000, 100_000):
            await office.grant(7, most - len(office.received.get(7, b"")) - office.room[7])
            await until(lambda most=most: len(office.received.get(7, b"")) == most)  # type: ignore[misc]
        assert office.received[7] == data
        assert office.states(7) == ["open"], "it looks no further than its credit"
        await office.grant(7, 1)
        await office.answers(7, "end")


async def test_a_program_that_does_not_read_stops_its_tunnel_alone(tmp_path: Path) -> None:
    office, loop = Office(refills=True), asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        listening.setblocking(False)
        port = listening.getsockname()[1]
        async with program(echo) as other, device(tmp_path, office, port, other):
            await office.open(7, port)
            await office.open(8, other)
            stopped, _ = await loop.sock_accept(listening)
            with stopped:
                data, rest = bytearray(), 0
                while office.credit[7] or rest < 20:  # until it had many chances to grant more, and did not
                    piece = noise(min(PIECE, office.credit[7]))
                    data += piece
                    if piece:
                        await office.send(7, piece)
                    rest = 0 if piece else rest + 1
                    size = len(office.received.get(8, b""))
                    await office.send(8, b"goes on")
                    await until(lambda size=size: len(office.received.get(8, b"")) == size + 7)  # type: ignore[misc]
                grants = len(office.granted[7])
                read = bytearray()
                async with asyncio.timeout(PATIENCE):
                    while len(read) < len(data):
                        read += await loop.sock_recv(stopped, 65_536)
                assert read == data
                await until(lambda: len(office.granted[7]) > grants)
                await office.send(7, b"x" * WINDOW)


# ---- what breaks


BREACHES = {
    "more than its credit": f"the server sent {WINDOW + 1} bytes where it may send {WINDOW}",
    "after its end": "the server sent bytes after it had said that it sends no more",
    "opened twice": "the server opened it twice",
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_a_breach_of_the_contract_closes_the_tunnel_and_not_the_session(tmp_path: Path, breach: str) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            ended.set()
            await asyncio.Event().wait()  # it does not end its own side

    office = Office()
    async with program(wait) as port, program(echo) as other, device(tmp_path, office, port, other):
        await office.open(7, port)
        if breach == "more than its credit":
            await office.put(7, bytes(WINDOW + 1))
        elif breach == "after its end":
            await office.tell(7, "end")
            await office.put(7, b"x")
        else:
            await office.tell(7, "open", port=port, credit=WINDOW)
        assert (await office.answers(7, "closed"))["message"] == BREACHES[breach]
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
        await office.put(7, b"x")
        await office.open(8, other)
    assert office.states(7) == ["open", "closed"]
    assert len(office.callers) == 1


async def test_what_is_for_no_tunnel_is_passed_over(tmp_path: Path) -> None:
    office = Office()
    async with program(echo) as port, device(tmp_path, office, port):
        await office.open(0, port)
        for state in ("credit", "end", "closed"):
            await office.tell(9, state, credit=1)
        await office.put(9, b"x")
        for short in (b"", b"\0", bytes(4)):
            await office.callers[-1].link.send_bytes(short)
        await office.send(0, b"goes on")
        await until(lambda: office.received.get(0, b"") == b"goes on")
    assert {frame["tunnel"] for frame in office.said} == {0}


async def test_a_program_that_breaks_the_connection_is_told_of(tmp_path: Path) -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    office = Office()
    async with program(break_off) as port, device(tmp_path, office, port):
        await office.open(7, port)
        await office.send(7, b"x")
        told = (await office.answers(7, "closed"))["message"]
    assert told == "the program at the port broke the connection: Connection reset by peer"
    assert office.states(7) == ["open", "closed"]


async def test_a_tunnel_that_the_server_closes_is_over_at_once_and_nothing_is_answered(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await flood(_, writer)
        ended.set()

    office = Office()
    async with program(talk) as port, device(tmp_path, office, port):
        await office.open(7, port, credit=10)
        await until(lambda: len(office.received.get(7, b"")) == 10)
        await office.tell(7, "closed")
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
        await office.grant(7, 1_000)
        await office.open(8, port, credit=10)
    assert office.states(7) == ["open"]
    assert len(office.received[7]) == 10


def sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += str(path.readlink()).startswith("socket:")
    return count


async def test_with_the_link_all_tunnels_end_and_nothing_of_them_is_left(tmp_path: Path) -> None:
    """Tunnels that carry bytes, that wait for credit, whose program does not read, and that are not open yet."""
    office, ended = Office(), list[bool]()

    async def stop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await flood(reader, writer)
        ended.append(True)

    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [socket.socket() for _ in range(4)]
    for one in waiting:
        one.setblocking(False)
        one.connect_ex(full.getsockname())
    silent = full.getsockname()[1]
    async with program(stop) as port, device(tmp_path, office, port, silent) as held:
        await until(lambda: len(held._spool) == 0)
        before = sockets(), len(asyncio.all_tasks())
        for number in range(10):
            await office.open(number, port, credit=number * PIECE)
            await office.send(number, bytes(WINDOW))
        await office.tell(10, "open", port=silent, credit=WINDOW)
        await until(lambda: len(office.received.get(9, b"")) == 9 * PIECE)
        assert sockets() >= before[0] + 20
        await office.callers[-1].link.close()
        await until(lambda: len(ended) == 10 and len(office.callers) == 2)
        await until(lambda: (sockets(), len(asyncio.all_tasks())) == before, lambda: (sockets(), before, asyncio.all_tasks()))
        await office.open(11, port, credit=5)
    for one in (full, *waiting):
        one.close()


# ---- beside all else


async def test_what_the_spool_sends_goes_before_a_flood_of_tunnels(tmp_path: Path) -> None:
    """The server reads nothing until the agent has sent a reading. What it reads before the reading waited in front of it: most of
    that in the server's own buffers, and little at the agent."""
    office, amount = Office(), 64 * 1024 * 1024
    async with program(flood) as port, device(tmp_path, office, port) as held:
        office.callers[-1].link.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        for number in (7, 8):
            await office.open(number, port, credit=amount)
        office.reads.clear()
        transport, full = held._transports.newest, 0
        assert transport is not None

        def stands_still() -> bool:
            nonlocal full
            full = 0 if writable(transport) else full + 1
            return full == 30

        await until(stands_still)
        assert transport.get_write_buffer_size() + not_sent(transport) < 3 * PIECE
        await office.callers[-1].send("report", what="telemetry")
        await until(lambda: held._spool.sent > 0)
        count = len(office.order)
        office.reads.set()
        await until(lambda: ("telemetry", 0) in office.order[count:])
        before = office.order[count:].index(("telemetry", 0))
        await until(lambda: len(office.order) > count + before + 200)
    numbers = [number for kind, number in office.order[count:] if kind == "bytes"]
    assert before < 40
    assert max(numbers.count(7), numbers.count(8)) <= 0.6 * len(numbers), "and tunnels take turns"


def writable(transport: asyncio.Transport) -> bool:
    """Whether the system takes more."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLOUT)
    return bool(poll.poll(0))


def not_sent(transport: asyncio.Transport) -> int:
    """Bytes that the system was given and has not sent: struct tcp_info of <linux/tcp.h>."""
    told = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)
    return int(struct.unpack_from("I", told, 144)[0])


async def test_bytes_of_a_tunnel_are_life_of_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers no ping, and sends bytes for longer than the agent waits for anything that moves."""
    for name, value in (("LOOK_SECONDS", 0.05), ("PING_SECONDS", 0.1), ("LINK_SECONDS", 0.4)):
        monkeypatch.setattr(agent, name, value)
    monkeypatch.setattr(agent.Movement, "_counts", lambda _: (0, 0))  # as on a system that does not tell
    office, until_ = Office(), asyncio.get_running_loop().time() + 1.0
    async with program(echo) as port, device(tmp_path, office, port):
        await office.open(7, port, credit=MANY)
        while asyncio.get_running_loop().time() < until_:
            size = len(office.received.get(7, b""))
            await office.send(7, b"x")
            await until(lambda size=size: len(office.received.get(7, b"")) > size)  # type: ignore[misc]
        assert len(office.callers) == 1
