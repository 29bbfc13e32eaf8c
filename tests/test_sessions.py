"""The life of a device's session: from provisioning and hello to every way in which it ends."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import resource
import sqlite3
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession, WSMsgType
from plant import Device, Plant, locked

import iiot

REASONS = {fault.message for fault in iiot.FAULTS.values()}
NUMBER = 2**63 - 1


def stored(database: Path, sql: str) -> Any:
    """The first column of the first row, as a program beside the server sees it."""
    with closing(sqlite3.connect(database)) as other:
        return other.execute(sql).fetchone()[0]


def reading(value: float) -> dict[str, Any]:
    """A sample without a time: were it stored twice, there would be two points."""
    return {"values": {"n": value}}


def provisioning_key(plant: Plant, **chosen: Any) -> str:
    key = iiot.mint("prov")
    iiot.change_database(
        plant.database,
        lambda connection: iiot.insert_provisioning_key(connection, iiot.tenant_id_of(connection, "default"), key.stored, **chosen),
    )
    return key.text


async def taken(device: Device) -> None:
    """Wait until the server has read all that was sent: it answers nonsense at once, without a word to the storage."""
    await device.send("nonsense")
    assert (await device.expect("error"))["code"] == "unknown_type"


async def expect_close(device: Device, code: int) -> str:
    """The socket closes with this code; its reason."""
    closed = await device.closed()
    assert closed.code == code, closed
    assert closed.reason in REASONS
    return closed.reason


async def events(plant: Plant, name: str, kind: str) -> list[dict[str, Any]]:
    """A device's timeline of one kind, oldest first."""
    items: list[dict[str, Any]] = (await plant.get(f"/iiot/{name}/events?kind={kind}&limit=1000"))["items"]
    return items[::-1]


async def ending(plant: Plant, name: str) -> dict[str, Any]:
    """How the device's only session ended, once it has."""
    body = await plant.until(f"/iiot/{name}/events?kind=disconnected", lambda body: body["items"])
    (event,) = body["items"]
    assert isinstance(event, dict)
    return event


async def values(plant: Plant, name: str = "press-1") -> list[Any]:
    return [value for _, value in await plant.points(name, "n")]


def masked(opcode: int, payload: bytes, first: int = 0x80) -> bytes:
    """A frame of a client; its mask is zero."""
    length = len(payload)
    size = (
        bytes([0x80 | length])
        if length < 126
        else struct.pack("!BH", 0xFE, length)
        if length < 65_536
        else struct.pack("!BQ", 0xFF, length)
    )
    return bytes([first | opcode]) + size + bytes(4) + payload


class Raw:
    """A WebSocket by hand, for what a good client does not do: it answers no ping, and reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, opcode: int, payload: bytes, first: int = 0x80) -> None:
        self.writer.write(masked(opcode, payload, first))

    def send(self, kind: str, **fields: Any) -> None:
        self.write(WSMsgType.TEXT, json.dumps({"type": kind, **fields}).encode())

    async def frame(self) -> tuple[int, bytes]:
        async with asyncio.timeout(plants.PATIENCE):
            head = await self.reader.readexactly(2)
            length = head[1]
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return head[0] & 0x0F, await self.reader.readexactly(length)

    async def expect(self, opcode: int) -> bytes:
        """The payload of the next frame of this kind."""
        while True:
            kind, payload = await self.frame()
            if kind == opcode:
                return payload

    async def expect_close(self, code: int) -> None:
        payload = await self.expect(WSMsgType.CLOSE)
        assert (struct.unpack("!H", payload[:2])[0], payload[2:].decode() in REASONS) == (code, True), payload

    async def hello(self, token: str) -> None:
        self.send("hello", token=token)
        assert json.loads(await self.expect(WSMsgType.TEXT))["type"] == "welcome"

    async def broken(self) -> None:
        """Wait until the server has let go of the connection."""
        async with asyncio.timeout(plants.PATIENCE):
            try:
                while await self.reader.read(65_536):
                    pass
            except ConnectionError:
                pass


@asynccontextmanager
async def raw(plant: Plant, along: bytes = b"") -> AsyncIterator[Raw]:
    """`along`: what the client sends in one piece with its request."""
    host, port = plant.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=4_096)
    try:
        writer.write(
            f"GET /device HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode() + along
        )
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


# ---- hello and welcome


@pytest.mark.parametrize("frames", [1, 400], ids=["one-frame", "more-than-aiohttp-keeps"])
async def test_what_comes_in_one_piece_with_the_handshake_is_taken(plant: Plant, frames: int) -> None:
    token = await plant.register("press-1")
    sent: list[dict[str, Any]] = [{"type": "hello", "token": token}]
    sent += [{"type": "telemetry", "seq": n + 1, "samples": [{"ts": n + 10**12, "values": {"text": "x" * 1000}}]} for n in range(frames)]
    async with raw(plant, b"".join(masked(WSMsgType.TEXT, json.dumps(frame).encode()) for frame in sent)) as link:
        assert json.loads(await link.expect(WSMsgType.TEXT))["type"] == "welcome"
        acknowledged = 0
        while acknowledged < frames:
            acknowledged = json.loads(await link.expect(WSMsgType.TEXT))["seq"]
    assert len(await plant.points("press-1", "text")) == frames


async def test_what_is_left_of_sessions_is_no_garbage_to_be_looked_for(plant: Plant) -> None:
    """A fleet that comes and goes would fill the memory with circles until the collector of garbage looks at them all."""
    kinds = (iiot.Link, iiot.Session, iiot.Intake, iiot.Opening, iiot.Upgrade)
    gc.collect()
    gc.disable()
    try:
        for number in range(5):
            device = await plant.device(f"press-{number}")
            await device.store(reading(number))
            await device.close()
        await plant.until("/iiot?connected=true", lambda body: not body["items"])
        async with asyncio.timeout(plants.PATIENCE):
            while any(isinstance(thing, kinds) for thing in gc.get_objects()):
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


async def test_a_session_keeps_nothing_of_its_http(plant: Plant) -> None:
    await plant.device("press-1")
    await plant.until("/iiot/press-1", lambda body: body["connected"])
    gc.collect()
    kept = [thing for thing in gc.get_objects() if isinstance(thing, iiot.Upgrade)]
    links = [thing for thing in gc.get_objects() if isinstance(thing, iiot.Link)]
    assert (kept, len(links)) == ([], 1)


async def test_stored_telemetry_is_read_back(plant: Plant) -> None:
    device = await plant.device("press-1", agent="test/1")
    assert device.welcome["seq"] == 0
    await device.store({"ts": "2026-01-01T00:00:00Z", "values": {"pressure": 1.5, "running": True, "mode": "auto"}})
    assert await plant.points("press-1", "pressure") == [["2026-01-01T00:00:00.000Z", 1.5]]
    assert await plant.points("press-1", "running") == [["2026-01-01T00:00:00.000Z", 1]]
    assert await plant.points("press-1", "mode") == [["2026-01-01T00:00:00.000Z", "auto"]]


async def test_welcome_says_who_where_and_how_far(plant: Plant) -> None:
    before = iiot.now_ms()
    welcome = (await plant.device("press-1")).welcome
    now = iiot.parse_rfc3339(welcome.pop("time"))
    assert now is not None
    assert before <= now <= iiot.now_ms()
    assert welcome == {
        "type": "welcome",
        "device": "press-1",
        "tenant": "default",
        "session": 1,
        "seq": 0,
        "heartbeat": 20.0,
        "config": None,
    }


async def test_sessions_are_counted(plant: Plant) -> None:
    for number in (1, 2, 3):
        device = await plant.device("press-1")
        assert device.welcome["session"] == number
        await device.close()


async def test_hello_may_name_an_agent_and_a_time(plant: Plant) -> None:
    await plant.device("press-1", agent="plc/7.2", time="2026-01-01T00:00:00Z")
    assert (await plant.get("/iiot/press-1"))["agent"] == "plc/7.2"
    assert [event["agent"] for event in await events(plant, "press-1", "connected")] == ["plc/7.2"]
    await plant.device("press-1", agent=None, time=None)
    assert (await plant.get("/iiot/press-1"))["agent"] is None


@pytest.mark.parametrize(
    ("offered", "chosen"), [(("iiot.v1",), "iiot.v1"), (("mqtt", "iiot.v1"), "iiot.v1"), ((), None), (("mqtt",), None)]
)
async def test_the_subprotocol_is_optional(plant: Plant, offered: tuple[str, ...], chosen: str | None) -> None:
    token = await plant.register("press-1")
    device = Device(await plant.client.ws_connect(plant.url + "/device", protocols=offered))
    assert device.link.protocol == chosen
    await (await device.hello(token)).store(reading(1))


async def test_a_device_may_ping(plant: Plant) -> None:
    async with raw(plant) as link:
        link.write(WSMsgType.PING, b"before hello")
        assert await link.frame() == (WSMsgType.PONG, b"before hello")
        await link.hello(await plant.register("press-1"))
        link.write(WSMsgType.PING, b"and after")
        assert await link.frame() == (WSMsgType.PONG, b"and after")


async def test_a_frame_in_pieces_is_one_frame(plant: Plant) -> None:
    async with raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        text = json.dumps({"type": "telemetry", "seq": 1, "samples": [reading(5)]}).encode()
        link.write(WSMsgType.TEXT, text[:20], first=0)
        link.write(WSMsgType.PING, b"between")
        link.write(WSMsgType.CONTINUATION, text[20:])
        assert json.loads(await link.expect(WSMsgType.TEXT)) == {"type": "ack", "seq": 1}
        assert await values(plant) == [5]


# ---- sequence numbers


async def test_a_duplicate_is_acknowledged_and_ignored(plant: Plant) -> None:
    device = await plant.device("press-1")
    for value in (1, 2, 3):
        await device.store(reading(value))
    for seq in (1, 2, 3, 3, 1):
        await device.telemetry(reading(99), seq=seq)
        assert await device.receive() == {"type": "ack", "seq": 3}
    assert await values(plant) == [1, 2, 3]
    await device.telemetry(reading(4), seq=4)
    await device.acknowledged(4)
    assert await values(plant) == [1, 2, 3, 4]


async def test_a_duplicate_of_a_frame_that_waits_for_its_commit_is_ignored_too(plant: Plant) -> None:
    device = await plant.device("press-1")
    with locked(plant.database):
        for seq in (1, 2, 2, 1, 3, 3):
            await device.telemetry(reading(seq), seq=seq)
        await taken(device)
    await device.acknowledged(3)
    assert await values(plant) == [1, 2, 3]


async def test_gaps_are_allowed(plant: Plant) -> None:
    device = await plant.device("press-1")
    for seq in (10, 20, 1_000, 2**40, 2**40 + 2**43):
        await device.telemetry(reading(1), seq=seq)
        assert await device.receive() == {"type": "ack", "seq": seq}
    await device.telemetry(reading(2), seq=15)
    assert await device.receive() == {"type": "ack", "seq": 2**40 + 2**43}
    assert await values(plant) == [1] * 5
    await device.close()
    assert (await plant.device("press-1")).welcome["seq"] == 2**40 + 2**43


async def test_numbers_go_on_across_sessions(plant: Plant) -> None:
    for session in range(3):
        device = await plant.device("press-1")
        assert device.welcome["seq"] == session * 2
        await device.telemetry(reading(-1), seq=session * 2)  # of the session before; 0 is none
        await device.store(reading(session))
        await device.store(reading(session))
        await device.close()
    assert await values(plant) == [0, 0, 1, 1, 2, 2]


async def test_what_is_sent_again_after_each_broken_link_is_stored_exactly_once(plant: Plant) -> None:
    token, seq, most = await plant.register("press-1"), 0, 400
    for breaks in range(12):
        async with raw(plant) as link:
            link.send("hello", token=token)
            seq = json.loads(await link.expect(WSMsgType.TEXT))["seq"]
            for number in range(seq + 1, min(most, seq + 45 + breaks) + 1):
                link.send("telemetry", seq=number, samples=[reading(number)])
            if breaks % 2 and seq < most:
                await link.frame()
            await link.writer.drain()
    device = await plant.device("press-1")
    for number in range(device.seq + 1, most + 1):
        await device.telemetry(reading(number))
    await device.store(reading(most + 1))
    assert await values(plant) == list(range(1, most + 2))


async def test_acks_rise_and_the_last_covers_everything(plant: Plant) -> None:
    device = await plant.device("press-1")
    sender = asyncio.create_task(send_many(device, 2_000))
    acks: list[int] = []
    while not acks or acks[-1] < 2_000:
        acks.append((await device.expect("ack"))["seq"])
    await sender
    assert acks == sorted(set(acks))
    assert stored(plant.database, "select count(*) from telemetry") == 2_000


async def send_many(device: Device, count: int) -> None:
    for value in range(count):
        await device.telemetry(reading(value))


async def test_acks_wait_for_the_disk_and_are_coalesced(plant: Plant) -> None:
    device = await plant.device("press-1")
    with locked(plant.database):
        await send_many(device, 500)
        await device.send("nonsense")
        assert (await device.receive())["type"] == "error"  # and no ack before it
        assert stored(plant.database, "select count(*) from telemetry") == 0
    acks = [await device.receive()]
    while acks[-1]["seq"] < 500:
        acks.append(await device.receive())
    assert len(acks) <= 2  # the transaction that had begun, and all that gathered behind it


async def test_an_acknowledged_frame_is_in_the_file_with_its_number(plant: Plant) -> None:
    device = await plant.device("press-1")
    for value in range(1, 21):
        await device.store(reading(value))
        assert stored(plant.database, "select count(*) from telemetry") == value
        assert stored(plant.database, "select seq from presence") == value


async def test_a_bad_frame_uses_up_its_number(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.send("telemetry", seq=1, samples=[{"values": {"n": None}}])
    assert (await device.receive())["seq"] == 1
    assert await device.receive() == {"type": "ack", "seq": 1}
    await device.telemetry(reading(2), seq=1)
    assert await device.receive() == {"type": "ack", "seq": 1}
    await device.close()
    assert (await plant.device("press-1")).welcome["seq"] == 1


async def test_two_devices_count_apart(plant: Plant) -> None:
    first, second = await plant.device("press-1"), await plant.device("press-2")
    await first.telemetry(reading(1), seq=100)
    await second.telemetry(reading(2), seq=1)
    assert await first.receive() == {"type": "ack", "seq": 100}
    assert await second.receive() == {"type": "ack", "seq": 1}
    assert (await values(plant, "press-1"), await values(plant, "press-2")) == ([1], [2])


async def test_samples_without_a_time_are_all_kept(plant: Plant) -> None:
    device = await plant.device("press-1")
    before = iiot.now_ms()
    await device.store(*(reading(value) for value in range(50)))
    points = await plant.points("press-1", "n")
    assert [value for _, value in points] == list(range(50))
    first = iiot.parse_rfc3339(points[0][0])
    assert first is not None
    assert before <= first <= iiot.now_ms()


async def test_the_last_write_to_a_time_wins(plant: Plant) -> None:
    device, moment = await plant.device("press-1"), "2026-01-01T00:00:00Z"
    await device.store(
        {"ts": moment, "values": {"n": 1, "m": 1}}, {"ts": 1_767_225_600_000, "values": {"n": 2}}, {"ts": moment, "values": {"m": "off"}}
    )
    assert await plant.points("press-1", "n") == [["2026-01-01T00:00:00.000Z", 2]]
    await device.store({"ts": moment, "values": {"n": True}})
    assert await plant.points("press-1", "n") == [["2026-01-01T00:00:00.000Z", 1]]
    assert await plant.points("press-1", "m") == [["2026-01-01T00:00:00.000Z", "off"]]


# ---- one session per device


async def test_a_newer_session_supersedes_the_older(plant: Plant) -> None:
    old = await plant.device("press-1")
    await old.store(reading(1))
    new = await plant.device("press-1")
    assert new.welcome["seq"] == 1
    assert await expect_close(old, 4409) == iiot.FAULTS["superseded"].message
    await new.store(reading(2))
    assert await values(plant) == [1, 2]
    event = await ending(plant, "press-1")
    assert (event["reason"], event["session"]) == ("superseded", 1)
    assert (await plant.get("/iiot/press-1"))["connected"] is True


async def test_while_a_session_is_open_disconnected_at_is_of_the_one_before(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.close()
    first = await ending(plant, "press-1")
    device = await plant.device("press-1")
    assert (await plant.get("/iiot/press-1"))["disconnected_at"] == first["at"]
    newer = await plant.device("press-1")
    await expect_close(device, 4409)
    body = await plant.until("/iiot/press-1/events?kind=disconnected", lambda body: len(body["items"]) == 2)
    assert (await plant.get("/iiot/press-1"))["disconnected_at"] == body["items"][0]["at"]
    await newer.close()


async def test_welcome_waits_for_what_the_older_session_queued(plant: Plant) -> None:
    old, new = await plant.device("press-1"), await plant.connect()
    with locked(plant.database):
        await send_many(old, 300)
        await taken(old)
        await new.send("hello", token=plant.tokens["press-1"])
        await expect_close(old, 4409)
    new.welcome = await new.receive()
    assert (new.welcome["type"], new.welcome["seq"]) == ("welcome", 300)
    assert stored(plant.database, "select count(*) from telemetry") == 300
    new.seq = 300
    await new.store(reading(300))
    assert await values(plant) == list(range(301))


async def test_a_device_that_changes_over_in_full_flow_loses_and_doubles_nothing(plant: Plant) -> None:
    token, sent = await plant.register("press-1"), 0
    async with raw(plant) as old:
        await old.hello(token)
        for _ in range(8):
            for number in range(sent + 1, sent + 101):
                old.send("telemetry", seq=number, samples=[reading(number)])
            async with raw(plant) as new:
                new.send("hello", token=token)
                sent = json.loads(await new.expect(WSMsgType.TEXT))["seq"]
                assert stored(plant.database, "select count(*) from telemetry") == sent
                old.writer.transport.abort()
                await old.broken()
                old.reader, old.writer, new.reader, new.writer = new.reader, new.writer, old.reader, old.writer
    device = await plant.device("press-1")
    await device.store(reading(device.seq + 1))
    assert await values(plant) == list(range(1, device.seq + 1))


async def test_of_many_hellos_at_once_one_session_remains(plant: Plant) -> None:
    token = await plant.register("press-1")
    devices = [await plant.connect() for _ in range(20)]
    await asyncio.gather(*(device.send("hello", token=token) for device in devices))
    closings = {asyncio.create_task(device.closed()): device for device in devices}
    while len(closings) > 1:
        done, _ = await asyncio.wait(closings, timeout=plants.PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        assert done
        for closing_of in done:
            assert closing_of.result().code == 4409
            del closings[closing_of]
    ((waiting, last),) = closings.items()
    waiting.cancel()
    await asyncio.wait([waiting])
    await plant.until("/iiot/press-1/events?kind=disconnected", lambda body: len(body["items"]) == 19)
    assert (await plant.get("/iiot/press-1"))["connected"] is True
    last.seq = 0
    await last.store(reading(1))
    assert await values(plant) == [1]


# ---- presence


async def test_presence_follows_the_socket(plant: Plant) -> None:
    token = await plant.register("press-1")
    body = await plant.get("/iiot/press-1")
    assert body["connected"] is False
    assert body["connected_at"] is body["disconnected_at"] is body["seen_at"] is None
    device = await (await plant.connect()).hello(token)
    body = await plant.get("/iiot/press-1")
    assert (body["connected"], body["disconnected_at"]) == (True, None)
    await device.store(reading(1))
    seen = (await plant.get("/iiot/press-1"))["seen_at"]
    assert body["connected_at"] <= seen
    await device.close()
    body = await plant.until("/iiot/press-1", lambda body: not body["connected"])
    assert body["disconnected_at"] >= seen
    assert body["seen_at"] >= seen


async def test_connections_are_on_the_timeline_with_their_address(plant: Plant) -> None:
    for _ in range(2):
        device = await plant.device("press-1", agent="test/1")
        await device.close()
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
    items = (await plant.get("/iiot/press-1/events"))["items"]
    assert [item["kind"] for item in items] == ["disconnected", "connected", "disconnected", "connected", "credentials"]
    assert [item["at"] for item in items] == sorted((item["at"] for item in items), reverse=True)
    for item in items[:4]:
        assert item["address"] == "127.0.0.1"
    assert [item["session"] for item in items[:4]] == [2, 2, 1, 1]
    assert {item["reason"] for item in items if item["kind"] == "disconnected"} == {"closed_by_device"}
    assert {item["agent"] for item in items if item["kind"] == "connected"} == {"test/1"}


async def test_a_broken_link_is_told_from_a_closed_one(plant: Plant) -> None:
    async with raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        assert (await plant.get("/iiot/press-1"))["connected"] is True
    assert (await ending(plant, "press-1"))["reason"] == "connection_lost"


async def test_a_session_that_breaks_the_protocol_is_closed_with_1002(plant: Plant) -> None:
    async with raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        link.send("telemetry", seq=1, samples=[reading(1)])
        assert json.loads(await link.expect(WSMsgType.TEXT)) == {"type": "ack", "seq": 1}
        link.write(WSMsgType.TEXT, b"{}", first=0xC0)  # compressed, which was not agreed on
        await link.expect_close(1002)
    assert (await ending(plant, "press-1"))["reason"] == "protocol_error"
    assert await values(plant) == [1]


async def test_a_device_that_answers_no_ping_is_seen_offline(tmp_path: Path) -> None:
    heartbeat = 0.5
    async with plants.plant(tmp_path, heartbeat=heartbeat) as plant, raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        began = asyncio.get_running_loop().time()
        assert await link.expect(WSMsgType.PING) == b""
        assert asyncio.get_running_loop().time() - began >= heartbeat * 0.9
        assert (await plant.get("/iiot/press-1"))["connected"] is True
        await link.broken()
        assert (await ending(plant, "press-1"))["reason"] == "unresponsive"
        silent = asyncio.get_running_loop().time() - began
        assert heartbeat < silent < heartbeat * 1.5 + 1.0  # a busy machine is slow to tell
        assert (await plant.get("/iiot/press-1"))["connected"] is False


async def test_a_silent_device_that_answers_pings_stays(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, heartbeat=0.2) as plant, raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        for _ in range(5):
            link.write(WSMsgType.PONG, await link.expect(WSMsgType.PING))
        assert (await plant.get("/iiot/press-1"))["connected"] is True
        assert await events(plant, "press-1", "disconnected") == []


async def test_a_silent_device_is_seen_all_the_same(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), seen_seconds=0.2), heartbeat=0.2) as plant, raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        first = (await plant.get("/iiot/press-1"))["seen_at"]
        for _ in range(2):
            link.write(WSMsgType.PONG, await link.expect(WSMsgType.PING))
        await plant.until("/iiot/press-1", lambda body: body["seen_at"] > first)


# ---- every close code


async def test_1001_a_shutdown_stores_what_was_taken_and_says_goodbye(tmp_path: Path) -> None:
    database = tmp_path / "iiot.db"
    iiot.prepare_database(database)
    settings, token = iiot.Settings(db=str(database), port=0), plants.admin_token(database)
    async with ClientSession() as client:
        async with iiot.serving(settings) as url:
            plant = Plant(url, client, token, database)
            device, stranger = await plant.device("press-1"), await plant.connect()
            await send_many(device, 200)
            await taken(device)
            closings = [asyncio.create_task(expect_close(each, 1001)) for each in (device, stranger)]
        assert await asyncio.gather(*closings) == [iiot.FAULTS["shutting_down"].message] * 2
        async with iiot.serving(settings) as url:
            plant.url = url
            assert (await plant.get("/iiot/press-1"))["connected"] is False
            assert (await ending(plant, "press-1"))["reason"] == "shutting_down"
            device = await plant.device("press-1")
            assert device.seq == 200
            assert await values(plant) == list(range(200))
            await device.close()


async def test_1009_a_frame_too_big_ends_the_session_and_loses_nothing_before_it(plant: Plant) -> None:
    device = await plant.device("press-1")
    await send_many(device, 100)
    await device.send("telemetry", seq=101, samples=[{"values": {"n": "x" * 1_100_000}}])
    await expect_close(device, 1009)
    assert (await ending(plant, "press-1"))["reason"] == "frame_too_big"
    device = await plant.device("press-1")
    assert device.seq == 100
    await device.store(reading(100))
    assert await values(plant) == list(range(101))


async def test_1009_a_device_that_goes_on_sending_is_let_go(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), close_seconds=0.2)) as plant:
        device = await plant.device("press-1")

        async def flood() -> None:
            while True:
                await device.link.send_str("x" * 2_000_000)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(flood(), plants.PATIENCE)
        assert (await ending(plant, "press-1"))["reason"] == "frame_too_big"


@pytest.mark.parametrize("size", [4_097, 100_000, 1_100_000])
async def test_1009_the_first_frame_may_have_4_kib(plant: Plant, size: int) -> None:
    token = await plant.register("press-1")
    text = json.dumps({"type": "hello", "token": token})
    device = await plant.connect()
    await device.link.send_str(text.ljust(size))
    await expect_close(device, 1009)
    device = await plant.connect()
    await device.link.send_str(text.ljust(4_096))
    assert (await device.receive())["type"] == "welcome"


async def test_a_frame_of_a_thousand_samples_is_not_too_big(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.store(*({"values": {f"m{metric}": value * 0.1 for metric in range(8)}} for value in range(1_000)))
    assert stored(plant.database, "select count(*) from telemetry") == 8_000


async def test_1013_a_session_whose_frames_cannot_be_stored_ends_and_its_data_is_there_once_when_it_comes_back(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), unacknowledged_frames=2, storage_seconds=0.3)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        with locked(plant.database):
            await send_many(device, 5)
            await expect_close(device, 1013)
        body = await plant.until("/iiot/press-1", lambda body: not body["connected"])
        assert body["disconnected_at"] is not None
        assert (await ending(plant, "press-1"))["reason"] == "storage_unavailable"
        device = await plant.device("press-1")
        assert device.seq == 2
        for value in range(device.seq, 5):
            await device.store(reading(value))
        assert await values(plant) == list(range(5))


async def test_1013_no_session_opens_while_nothing_can_be_stored(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), storage_seconds=0.3)) as plant:
        token, device = await plant.register("press-1"), await plant.connect()
        with locked(plant.database):
            await device.send("hello", token=token)
            await expect_close(device, 1013)
        assert (await plant.device("press-1")).welcome["seq"] == 0


async def test_a_session_that_could_not_be_opened_is_never_shown_as_connected(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), storage_seconds=0.3)) as plant:
        token, device = await plant.register("press-1"), await plant.connect()
        with locked(plant.database):
            await device.send("hello", token=token)
            await expect_close(device, 1013)
        await plant.register("press-2")  # whatever waited for the lock has been written before it
        body = await plant.get("/iiot/press-1")
        opened, ended = await events(plant, "press-1", "connected"), await events(plant, "press-1", "disconnected")
        assert (body["connected"], len(opened)) == (False, len(ended))


async def test_a_device_whose_registration_failed_can_be_registered_again(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), storage_seconds=0.3)) as plant:
        key = provisioning_key(plant, uses=1)
        with locked(plant.database):
            status, body = await plant.ask("PUT", "/iiot/press-1")
            assert (status, body["error"]["code"]) == (503, "storage_unavailable")
            device = await plant.connect()
            await device.send("provision", key=key, device="press-2")
            await expect_close(device, 1013)
        await plant.register("press-3")  # whatever waited for the lock has been written before it
        assert (await plant.ask("PUT", "/iiot/press-1"))[0] == 201
        device = await plant.connect()
        await device.send("provision", key=key, device="press-2")
        assert (await device.receive())["type"] == "credentials"


async def test_a_frame_that_can_never_be_stored_costs_no_other_device_a_frame(plant: Plant) -> None:
    device, poison = await plant.device("press-1"), await plant.device("press-2")
    with closing(sqlite3.connect(plant.database)) as other:  # behind the server's back
        other.execute(
            "create trigger poison before insert on series when new.metric = 'poison' begin select raise(abort, 'poison'); end"
        )
        other.commit()

    async def send(last: int) -> None:
        with suppress(ConnectionError):
            while device.seq < last:
                await device.telemetry(reading(device.seq + 1))

    ended = asyncio.create_task(poison.closed())
    await send(100)
    await poison.telemetry({"values": {"poison": 1}})
    sending = asyncio.create_task(send(3_000))
    with suppress(plants.Closed):
        await device.acknowledged(3_000)
    await sending
    assert (await ended).code == 1013
    await device.close()
    device = await plant.device("press-1")  # had it to go, it comes back and sends what is not on disk
    if device.seq < 3_000:
        await asyncio.gather(send(3_000), device.acknowledged(3_000))
    assert await values(plant) == list(range(1, 3_001))


async def test_a_second_name_for_a_database_is_no_second_database(plant: Plant, tmp_path: Path) -> None:
    device = await plant.device("press-1")
    (tmp_path / "alias.db").symlink_to(plant.database)
    with pytest.raises(iiot.StoreError, match="another server"):
        async with iiot.serving(iiot.Settings(db=str(tmp_path / "alias.db"), port=0)):
            pass
    await device.store(reading(1))


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
async def test_1013_a_full_disk_acknowledges_nothing_and_is_over_when_there_is_room(process: plants.Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device, idle = await plant.device("press-1"), await plant.device("press-2")
        await device.store(reading(1))
        size = process.database.with_name("iiot.db-wal").stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        await device.telemetry(reading(2))
        assert await expect_close(device, 1013) == iiot.FAULTS["storage_unavailable"].message
        assert (await plant.ask("GET", "/healthz"))[0] == 503
        refused = await plant.connect()
        await refused.send("hello", token=plant.tokens["press-1"])
        await expect_close(refused, 1013)
        status, body = await plant.ask("PUT", "/iiot/press-3")
        assert (status, body["error"]["code"]) == (503, "storage_unavailable")
        assert await values(plant) == [1]  # what is there can still be read
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        async with asyncio.timeout(plants.PATIENCE):
            while (await plant.ask("GET", "/healthz"))[0] != 200:
                await asyncio.sleep(0.01)
        device = await plant.device("press-1")
        await device.telemetry(reading(2), seq=2)
        await device.acknowledged(2)
        await idle.store(reading(1))
        assert await values(plant) == [1, 2]
        assert stored(process.database, "pragma integrity_check") == "ok"


def first_frames() -> list[tuple[str, bytes | str]]:
    hello = {"type": "hello", "token": iiot.mint("dev").text}
    return [
        ("not JSON", "hello?"), ("empty", ""), ("not UTF-8", '{"type":"hello","token":"\udcff"}'), ("an array", "[]"), ("a number", "1"),
        ("no type", "{}"), ("unknown type", '{"type":"subscribe"}'), ("type of no text", '{"type":1}'), ("too deep", "[" * 4_000),
        ("telemetry", '{"type":"telemetry","seq":1,"samples":[]}'), ("binary", b"\0\0\0\1abc"), ("no token", '{"type":"hello"}'),
        ("token of no text", '{"type":"hello","token":1}'), ("no key", '{"type":"provision","device":"press-1"}'),
        ("unknown field", json.dumps({**hello, "more": 1})), ("agent of no text", json.dumps({**hello, "agent": 7})),
        ("token too long", json.dumps({"type": "hello", "token": "x" * 2_000})),
    ]  # fmt: skip


@pytest.mark.parametrize("payload", [pytest.param(payload, id=name) for name, payload in first_frames()])
async def test_4400_a_bad_handshake(plant: Plant, payload: bytes | str) -> None:
    device = await plant.connect()
    binary = isinstance(payload, bytes)
    content = payload if isinstance(payload, bytes) else payload.encode("utf-8", "surrogateescape")
    await device.link.send_frame(content, WSMsgType.BINARY if binary else WSMsgType.TEXT)
    error = await device.receive()
    assert error["type"] == "error"
    assert error["code"] in ("bad_handshake", "invalid")
    assert error["message"] in REASONS
    await expect_close(device, 4400)


@pytest.mark.parametrize("again", ["provision", "telemetry"])
async def test_4400_after_credentials_comes_hello(plant: Plant, again: str) -> None:
    key, device = provisioning_key(plant), await plant.connect()
    await device.send("provision", key=key, device="press-1")
    assert (await device.receive())["type"] == "credentials"
    await device.send(again, **({"key": key, "device": "press-2"} if again == "provision" else {"seq": 1, "samples": []}))
    await expect_close(device, 4400)
    assert (await plant.ask("GET", "/iiot/press-2"))[0] == 404


async def test_4400_too_many_bad_frames(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), bad_frames_per_minute=5)) as plant:
        device = await plant.device("press-1")
        for number in range(4):
            await device.send("nonsense", seq=number * 2 + 1)
            assert (await device.expect("error"))["code"] == "unknown_type"
            await device.telemetry(reading(number), seq=number * 2 + 2)
            await device.acknowledged(number * 2 + 2)
        await device.send("nonsense")
        assert (await device.receive())["code"] == "unknown_type"
        assert await expect_close(device, 4400) == iiot.FAULTS["too_many_bad_frames"].message
        assert (await ending(plant, "press-1"))["reason"] == "too_many_bad_frames"
        assert await values(plant) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "wrong", ["empty", "words", "unknown", "other secret", "truncated", "longer", "operator's", "provisioning key", "spaced"]
)
async def test_4401_a_token_that_proves_nothing(plant: Plant, wrong: str) -> None:
    token, other = await plant.register("press-1"), await plant.register("press-2")
    tokens = {
        "empty": "", "words": "let me in", "unknown": iiot.mint("dev").text, "other secret": token[:26] + other[26:],
        "truncated": token[:-1],
        "longer": token + "A", "operator's": plant.token, "provisioning key": provisioning_key(plant), "spaced": f" {token}",
    }  # fmt: skip
    device = await plant.connect()
    await device.send("hello", token=tokens[wrong])
    error = await device.receive()
    assert (error["type"], error["code"]) == ("error", "unauthorized")
    assert await expect_close(device, 4401) == iiot.FAULTS["unauthorized"].message
    assert (await plant.get("/iiot/press-1"))["connected"] is False
    assert await events(plant, "press-1", "connected") == []


async def test_a_session_without_its_right_is_none_to_supersede(plant: Plant) -> None:
    device = await plant.device("press-1")
    stranger = await plant.connect()
    await stranger.send("hello", token=plant.tokens["press-1"][:-1])
    await expect_close(stranger, 4401)
    await device.store(reading(1))


async def test_4408_silence_before_hello(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), hello_seconds=0.2)) as plant:
        device = await plant.connect()
        assert await expect_close(device, 4408) == iiot.FAULTS["handshake_timeout"].message
        device = await plant.connect()
        await device.send("provision", key=provisioning_key(plant), device="press-1")
        assert (await device.receive())["type"] == "credentials"
        await expect_close(device, 4408)


async def test_4408_pings_are_no_hello(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), hello_seconds=0.3)) as plant, raw(plant) as link:
        while True:
            link.write(WSMsgType.PING, b"")
            kind, payload = await link.frame()
            if kind == WSMsgType.CLOSE:
                break
        assert payload == struct.pack("!H", 4408) + iiot.FAULTS["handshake_timeout"].message.encode()


async def test_4429_too_many_connections(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), connections=2)) as plant:
        first, second, third = await plant.device("press-1"), await plant.connect(), await plant.connect()
        assert (await third.receive())["code"] == "too_many_connections"
        assert await expect_close(third, 4429) == iiot.FAULTS["too_many_connections"].message
        await first.store(reading(1))
        await first.close()
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
        await second.hello(plant.tokens["press-1"])


async def test_1011_a_damaged_database_is_not_explained_to_the_device(plant: Plant) -> None:
    token, device = await plant.register("press-1"), await plant.connect()
    with closing(sqlite3.connect(plant.database)) as other:
        other.execute("alter table device_token rename to misplaced")
    await device.send("hello", token=token)
    assert await expect_close(device, 1011) == iiot.FAULTS["server_fault"].message


async def test_get_device_without_an_upgrade_is_refused(plant: Plant) -> None:
    status, body = await plant.ask("GET", "/device")
    assert (status, body["error"]["code"]) == (400, "bad_handshake")


@pytest.mark.parametrize(
    "headers", [{"Upgrade": "websocket"}, {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "7"}]
)
async def test_a_broken_upgrade_is_a_bad_request(plant: Plant, headers: dict[str, str]) -> None:
    async with plant.client.get(plant.url + "/device", headers=headers) as response:
        body = await response.json()
    assert (response.status, body["error"]["code"]) == (400, "bad_handshake")


# ---- backpressure


async def test_a_session_with_too_many_frames_unacknowledged_is_not_read(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), unacknowledged_frames=8)) as plant:
        device = await plant.device("press-1")
        with locked(plant.database):
            await send_many(device, 7)
            await taken(device)  # there is room for one more
            await device.telemetry(reading(7))
            await device.send("nonsense")  # would be answered at once if it were read
            await (await plant.connect()).close()
            assert (await plant.get("/iiot/press-1"))["connected"] is True
        assert (await device.receive())["type"] == "ack"
        assert (await device.receive())["type"] in ("ack", "error")
        await device.send("nonsense")
        await device.expect("error")
        await device.store(reading(8))  # what was sent before it is on disk with it
        assert await values(plant) == list(range(9))


async def test_however_far_a_device_runs_ahead_nothing_is_lost(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), unacknowledged_frames=16, pending_points=50)) as plant:
        devices = [await plant.device(f"press-{number}") for number in range(4)]
        sending = [asyncio.create_task(send_many(device, 1_000)) for device in devices]
        for device in devices:
            await device.acknowledged(1_000)
        await asyncio.gather(*sending)
        for number in range(4):
            assert await values(plant, f"press-{number}") == list(range(1_000))


async def test_while_too_many_points_wait_no_session_is_read(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), pending_points=100)) as plant:
        first, second = await plant.device("press-1"), await plant.device("press-2")
        with locked(plant.database):
            await first.telemetry(reading(0))
            await taken(first)  # the writer is at work on it, and waits for the lock
            for value in range(1, 100):
                await first.telemetry(reading(value))
            await taken(first)  # there is room for one more point
            await second.telemetry(reading(1))
            await second.send("nonsense")
            answered = asyncio.create_task(second.expect("error"))
            for _ in range(20):
                await plant.get("/iiot")
            assert not answered.done()
        assert (await answered)["code"] == "unknown_type"
        await taken(second)
        assert await plant.until("/iiot/press-2/telemetry", lambda body: body["series"])
        assert await values(plant) == list(range(100))
        assert await values(plant, "press-2") == [1]


async def test_a_device_that_is_not_read_is_not_blamed_for_its_silence(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), unacknowledged_frames=1), heartbeat=0.2) as plant:
        device = await plant.device("press-1")
        with locked(plant.database):
            await device.telemetry(reading(1))
            await asyncio.sleep(0.8)  # four heartbeats
        await device.acknowledged(1)
        assert await events(plant, "press-1", "disconnected") == []


async def test_a_device_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), outbox_bytes=10_000)) as plant, raw(plant) as link:
        await link.hello(await plant.register("press-1"))
        neighbour = await plant.device("press-2")

        async def flood() -> None:
            while True:  # every ping is owed an answer
                for _ in range(500):
                    link.write(WSMsgType.PING, b"x" * 125)
                await link.writer.drain()
                await asyncio.sleep(0)

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(flood(), plants.PATIENCE)
        assert (await ending(plant, "press-1"))["reason"] == "too_slow"
        await neighbour.store(reading(1))


async def test_a_device_may_have_so_many_metrics(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), series_per_device=3)) as plant:
        device = await plant.device("press-1")
        await device.store({"values": {"a": 1, "b": 1}})
        await device.telemetry({"values": {"n": 5}}, {"values": {"d": 1}})
        error = await device.expect("error")
        assert (error["code"], error["seq"]) == ("too_many_series", 2)
        await device.acknowledged(2)
        await device.store({"values": {"a": 2, "b": 2, "n": 1}}, {"values": {"a": 3, "b": 3, "n": 2}})
        assert await values(plant) == [1, 2]
        await device.close()
        device = await plant.device("press-1")
        await device.telemetry({"values": {"e": 1}})
        assert (await device.expect("error"))["code"] == "too_many_series"
        assert (await plant.get("/iiot/press-1"))["latest"].keys() == {"a", "b", "n"}


# ---- report


@pytest.mark.parametrize("what", ["telemetry", "state"])
async def test_a_device_is_asked_to_report(plant: Plant, what: str) -> None:
    device = await plant.device("press-1")
    assert (await plant.ask("POST", "/iiot/press-1/report", {"what": what}))[0] == 202
    assert await device.receive() == {"type": "report", "what": what}
    await device.store(reading(1))


async def test_only_a_connected_device_can_be_asked_to_report(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.close()
    await plant.until("/iiot/press-1", lambda body: not body["connected"])
    status, body = await plant.ask("POST", "/iiot/press-1/report", {"what": "telemetry"})
    assert (status, body["error"]["code"]) == (409, "device_offline")
    assert (await plant.ask("POST", "/iiot/nothing/report", {"what": "telemetry"}))[0] == 404


@pytest.mark.parametrize("body", [{}, {"what": "logs"}, {"what": 1}, {"what": None}, {"what": "telemetry", "now": True}])
async def test_a_report_is_of_telemetry_or_state(plant: Plant, body: dict[str, Any]) -> None:
    await plant.device("press-1")
    status, answer = await plant.ask("POST", "/iiot/press-1/report", body)
    assert (status, answer["error"]["code"]) == (422, "invalid")
    assert [detail["path"] for detail in answer["error"]["details"]] == ["now" if "now" in body else "what"]


# ---- provisioning


async def provision(plant: Plant, key: str, name: str) -> tuple[Device, dict[str, Any]]:
    device = await plant.connect()
    await device.send("provision", key=key, device=name)
    return device, await device.receive()


def uses_left(plant: Plant) -> int | None:
    left: int | None = stored(plant.database, "select uses_left from provisioning_key")
    return left


async def test_a_new_device_gets_a_token_and_says_hello_on_the_same_socket(plant: Plant) -> None:
    device, credentials = await provision(plant, provisioning_key(plant), "press-1")
    assert credentials.keys() == {"type", "device", "token"}
    assert (credentials["type"], credentials["device"]) == ("credentials", "press-1")
    await (await device.hello(credentials["token"])).store(reading(1))
    await device.close()
    device = await (await plant.connect()).hello(credentials["token"])
    assert device.welcome["seq"] == 1
    (event,) = await events(plant, "press-1", "credentials")
    assert event["address"] == "127.0.0.1"


async def test_tokens_and_keys_are_not_in_the_file(plant: Plant) -> None:
    key = provisioning_key(plant)
    _, credentials = await provision(plant, key, "press-1")
    token = await plant.register("press-2")
    content = b"".join(path.read_bytes() for path in plant.database.parent.iterdir())
    assert b"press-2" in content
    for text in (key, credentials["token"], token, plant.token):
        assert text[-43:].encode() not in content


async def test_a_key_has_so_many_uses(plant: Plant) -> None:
    key = provisioning_key(plant, uses=2)
    assert (await provision(plant, key, "press-1"))[1]["type"] == "credentials"
    assert (await provision(plant, key, "press-2"))[1]["type"] == "credentials"
    device, error = await provision(plant, key, "press-3")
    assert error["code"] == "unauthorized"
    await expect_close(device, 4401)
    assert uses_left(plant) == 0
    assert (await plant.ask("GET", "/iiot/press-3"))[0] == 404


async def test_of_many_devices_at_once_a_key_admits_as_many_as_it_has_uses(plant: Plant) -> None:
    key = provisioning_key(plant, uses=3)
    answers = [answer for _, answer in await asyncio.gather(*(provision(plant, key, f"press-{number}") for number in range(10)))]
    assert sorted(answer["type"] for answer in answers) == ["credentials"] * 3 + ["error"] * 7
    assert len((await plant.get("/iiot"))["items"]) == 3
    assert uses_left(plant) == 0


async def test_of_many_devices_of_one_name_one_is_admitted(plant: Plant) -> None:
    key = provisioning_key(plant, uses=20)
    answers = [answer for _, answer in await asyncio.gather(*(provision(plant, key, "press-1") for _ in range(10)))]
    assert sorted(answer["type"] for answer in answers) == ["credentials"] + ["error"] * 9
    assert uses_left(plant) == 19


async def test_a_key_expires(plant: Plant) -> None:
    device, error = await provision(plant, provisioning_key(plant, expires_at=iiot.now_ms() - 1, uses=5), "press-1")
    assert error["code"] == "unauthorized"
    await expect_close(device, 4401)
    assert uses_left(plant) == 5
    assert (await provision(plant, provisioning_key(plant, expires_at=iiot.now_ms() + 60_000), "press-1"))[1]["type"] == "credentials"


async def test_a_wrong_key_is_refused_and_uses_nothing_up(plant: Plant) -> None:
    key = provisioning_key(plant, uses=5)
    for wrong in ("", "key", key[:-1], key + "A", key[:27] + iiot.mint("prov").text[27:], iiot.mint("prov").text, plant.token, key.upper()):
        device, error = await provision(plant, wrong, "press-1")
        assert (error["type"], error["code"]) == ("error", "unauthorized")
        await expect_close(device, 4401)
    assert uses_left(plant) == 5
    assert (await plant.get("/iiot"))["items"] == []


async def test_a_taken_name_is_refused_and_no_use_is_taken(plant: Plant) -> None:
    key, holder = provisioning_key(plant, uses=5), await plant.device("press-1")
    device, error = await provision(plant, key, "press-1")
    assert (error["type"], error["code"]) == ("error", "device_exists")
    assert await expect_close(device, 4400) == iiot.FAULTS["device_exists"].message
    assert uses_left(plant) == 5
    await holder.store(reading(1))
    assert len(await events(plant, "press-1", "credentials")) == 1


NAMES = ["x", "x" * 64, "00:1A:2b:3C:4d:5E", "line_2.press-1", "7", "_-", "A"]


@pytest.mark.parametrize("name", NAMES)
async def test_devices_of_any_allowed_name(plant: Plant, name: str) -> None:
    device, credentials = await provision(plant, provisioning_key(plant), name)
    await (await device.hello(credentials["token"])).store(reading(1))
    assert (await plant.get(f"/iiot/{name}"))["device"] == name
    assert await values(plant, name) == [1]


@pytest.mark.parametrize("name", ["", "x" * 65, "press 1", "a/b", "a\n", "prés", "a*", "a,b", "a%41", "\0", 7, None, ["a"]])
async def test_names_that_are_not_allowed(plant: Plant, name: Any) -> None:
    device, error = await provision(plant, provisioning_key(plant, uses=5), name)
    assert error["code"] == "invalid"
    assert error["errors"] == [{"path": "device", "message": "must have 1 to 64 letters, digits or . _ : -"}]
    await expect_close(device, 4400)
    assert uses_left(plant) == 5


async def test_names_differ_by_case(plant: Plant) -> None:
    assert await plant.register("press-1") != await plant.register("PRESS-1")
    assert [item["device"] for item in (await plant.get("/iiot"))["items"]] == ["PRESS-1", "press-1"]


@pytest.mark.parametrize("name", NAMES)
async def test_a_device_is_registered_by_hand(plant: Plant, name: str) -> None:
    status, body = await plant.ask("PUT", f"/iiot/{name}")
    assert status == 201
    assert body.keys() == {"device", "token"}
    assert body["device"] == name
    assert re.fullmatch(r"iiot_dev_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", body["token"])
    await (await (await plant.connect()).hello(body["token"])).store(reading(1))
    status, body = await plant.ask("PUT", f"/iiot/{name}")
    assert (status, body["error"]["code"]) == (409, "device_exists")
    (event,) = await events(plant, name, "credentials")
    assert (event["by"], event["address"]) == ("test admin", "127.0.0.1")


@pytest.mark.parametrize("name", ["x" * 65, "press%201", "pr%C3%A9s", "a*", "a%2Cb", "a%00", "a%0A"])
async def test_a_device_is_not_registered_under_a_name_that_is_not_allowed(plant: Plant, name: str) -> None:
    status, body = await plant.ask("PUT", f"/iiot/{name}")
    assert (status, body["error"]["code"]) == (422, "invalid")
    assert [detail["path"] for detail in body["error"]["details"]] == ["device"]
    assert (await plant.get("/iiot"))["items"] == []


async def test_registration_by_hand_takes_no_fields(plant: Plant) -> None:
    status, body = await plant.ask("PUT", "/iiot/press-1", {"token": "mine"})
    assert (status, body["error"]["details"]) == (422, [{"path": "token", "message": "is not a known field"}])
    assert (await plant.ask("PUT", "/iiot/press-1", {}))[0] == 201
