"""Tunnels: bytes go both ways as they are, each side has its end, and nobody waits for another one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientWebSocketResponse, WSMsgType, WSServerHandshakeError
from plant import PATIENCE, ROOT, Device, Plant, Process

import iiot

WINDOW = 4_096
QUICK = attrs.evolve(
    iiot.Limits(), tunnel_window=WINDOW, tunnel_bytes=1_024, tunnel_open_seconds=0.3, tunnel_ping_seconds=0.1, tunnels=3, close_seconds=1.0
)


class Port:
    """A device's side of a tunnel, by hand."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.number = 0
        self.port = 0
        self.credit = 0

    async def asked(self) -> Port:
        """Until the device is asked to open a port; what is said of an earlier tunnel is passed over."""
        while (frame := await self.device.expect("tunnel"))["state"] != "open":
            pass
        self.number, self.port, self.credit = frame["tunnel"], frame["port"], frame["credit"]
        return self

    async def say(self, state: str, **more: Any) -> None:
        await self.device.send("tunnel", tunnel=self.number, state=state, **more)

    async def send(self, data: bytes) -> None:
        await self.device.link.send_bytes(struct.pack("!I", self.number) + data)

    async def next(self) -> bytes | dict[str, Any]:
        """The next bytes, or the next that is said of a tunnel; acknowledgements are passed over."""
        while True:
            async with asyncio.timeout(PATIENCE):
                message = await self.device.link.receive()
            if message.type == WSMsgType.BINARY:
                assert struct.unpack("!I", message.data[:4]) == (self.number,)
                return bytes(message.data[4:])
            assert message.type == WSMsgType.TEXT, message
            frame = message.json()
            if frame["type"] in ("tunnel", "error"):
                return dict(frame)

    async def bytes(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            piece = await self.next()
            assert isinstance(piece, bytes)
            got += piece
        return got


@asynccontextmanager
async def operator(plant: Plant, port: int = 22, name: str = "press-1", token: str = "") -> AsyncIterator[ClientWebSocketResponse]:
    headers = {"Authorization": f"Bearer {token or plant.token}"}
    path = f"{plant.url}/iiot/{name}/tunnel/{port}"
    link = await plant.client.ws_connect(path, headers=headers, autoclose=False, max_msg_size=0)
    try:
        yield link
    finally:
        cut(link)


def cut(link: ClientWebSocketResponse) -> None:
    """Break a connection: a close in order would wait for the device's end."""
    if link._response.connection is not None and link._response.connection.transport is not None:
        link._response.connection.transport.abort()


@asynccontextmanager
async def tunnel(
    plant: Plant, device: Device, port: int = 22, credit: int = 1 << 20
) -> AsyncIterator[tuple[ClientWebSocketResponse, Port]]:
    """Both sides of an open tunnel."""
    there = Port(device)

    async def answer() -> None:
        await there.asked()
        await there.say("open", credit=credit)

    answering = asyncio.create_task(answer())
    async with operator(plant, port) as here:
        await answering
        yield here, there


async def received(here: ClientWebSocketResponse, count: int) -> bytes:
    got = b""
    async with asyncio.timeout(PATIENCE):
        while len(got) < count:
            got += await here.receive_bytes()
    return got


async def finish(here: ClientWebSocketResponse) -> None:
    """What the operator sends is at its end."""
    await here.send_frame(struct.pack("!H", 1000), WSMsgType.CLOSE)


async def closed(here: ClientWebSocketResponse) -> tuple[int, str]:
    """The server's close frame, with the reason."""
    async with asyncio.timeout(PATIENCE):
        message = await here.receive()
        while message.type in (WSMsgType.BINARY, WSMsgType.PING):
            message = await here.receive()
    assert message.type == WSMsgType.CLOSE, message
    return message.data, message.extra or ""


async def ended(plant: Plant) -> Any:
    """The newest end of a tunnel, as the audit has it."""
    return (await plant.until("/audit?action=tunnel.end", lambda shown: shown["items"]))["items"][0]


async def test_bytes_go_both_ways_and_are_accounted_for(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with tunnel(plant, device, 8000) as (here, there):
        assert (there.number, there.port) == (1, 8000)
        data = bytes(range(256)) * 300
        await here.send_bytes(data)
        assert await there.bytes(len(data)) == data
        await there.send(b"answer")
        assert await received(here, 6) == b"answer"
        (shown,) = (await plant.get("/iiot/press-1/tunnels"))["items"]
        assert (shown["port"], shown["by"], shown["address"], shown["open"]) == (8000, "test admin", "127.0.0.1", True)
        assert (shown["from_device"], shown["to_device"]) == (6, len(data))
        await finish(here)
        assert await there.next() == {"type": "tunnel", "tunnel": 1, "state": "end"}
        await there.say("end")
        assert await closed(here) == (1000, "")
    entry = await ended(plant)
    assert (entry["device"], entry["target"], entry["name"], entry["address"]) == ("press-1", "8000", "test admin", "127.0.0.1")
    assert {name: entry["detail"][name] for name in ("reason", "from_device", "to_device")} == {
        "reason": "both sides came to their end", "from_device": 6, "to_device": len(data),
    }  # fmt: skip
    assert (await plant.get("/iiot/press-1/tunnels"))["items"] == []
    events = (await plant.get("/iiot/press-1/events?kind=tunnel"))["items"]
    assert [(event["status"], event["port"]) for event in events] == [("closed", 8000), ("opened", 8000)]


async def test_texts_are_bytes_too(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with tunnel(plant, device) as (here, there):
        await here.send_str("grüße")
        assert await there.bytes(7) == "grüße".encode()


async def test_half_a_tunnel_goes_on_after_the_end_of_the_other_half(plant: Plant) -> None:
    """As after `printf x | websocat -b`, which closes at the end of its input."""
    device = await plant.device("press-1")
    async with tunnel(plant, device) as (here, there):
        await here.send_bytes(b"x")
        await finish(here)
        assert await there.bytes(1) == b"x"
        assert await there.next() == {"type": "tunnel", "tunnel": there.number, "state": "end"}
        for part in (b"one", b"two"):
            await there.send(part)
            assert await received(here, 3) == part
        await there.say("end")
        assert await closed(here) == (1000, "")


async def test_the_operator_hears_of_the_device_s_end(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with tunnel(plant, device) as (here, there):
        await there.send(b"bye")
        await there.say("end")
        assert await received(here, 3) == b"bye"
        assert await closed(here) == (1000, "")
        await here.send_bytes(b"more")
        assert await there.bytes(4) == b"more"
        await finish(here)
        assert await there.next() == {"type": "tunnel", "tunnel": there.number, "state": "end"}
    assert (await ended(plant))["detail"]["reason"] == "both sides came to their end"


async def test_a_port_that_is_not_opened_is_told_with_the_reason(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")

        async def ask() -> tuple[int, Any]:
            headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "a" * 22 + "=="}
            url, token = f"{plant.url}/iiot/press-1/tunnel/80", f"Bearer {plant.token}"
            async with plant.client.get(url, headers={**headers, "Authorization": token}) as response:
                return response.status, await response.json()

        asking = asyncio.create_task(ask())
        await (await Port(device).asked()).say("refused", message="nobody listens on port 80")
        status, answer = await asking
        assert (status, answer["error"]["code"]) == (502, "tunnel_refused")
        assert answer["error"]["details"] == [{"path": "port", "message": "nobody listens on port 80"}]
        assert (await ended(plant))["detail"]["reason"] == "nobody listens on port 80"
        asking = asyncio.create_task(ask())
        there = await Port(device).asked()
        status, answer = await asking  # the device never answers
        assert (status, answer["error"]["code"]) == (504, "tunnel_timeout")
        assert await there.next() == {"type": "tunnel", "tunnel": there.number, "state": "closed"}
        await there.say("open", credit=100)  # too late
        await there.send(b"x")
        assert (await plant.get("/iiot/press-1/tunnels"))["items"] == []
        assert await device.telemetry({"values": {"n": 1}}) == 1
        await device.acknowledged(1)


async def test_what_is_no_tunnel_is_refused(plant: Plant) -> None:
    await plant.register("press-1")
    viewer = plants.admin_token(plant.database, "operator")
    for path, token, status in (
        ("press-1/tunnel/22", viewer, 403), ("press-1/tunnel/22", "", 409), ("nobody/tunnel/22", "", 404), ("press-1/tunnel/0", "", 404),
        ("press-1/tunnel/65536", "", 404), ("press-1/tunnel/ssh", "", 404), ("press-1/tunnel/-1", "", 404),
    ):  # fmt: skip
        with pytest.raises(WSServerHandshakeError) as caught:
            await plant.client.ws_connect(f"{plant.url}/iiot/{path}", headers={"Authorization": f"Bearer {token or plant.token}"})
        assert (path, caught.value.status) == (path, status)
    status, answer = await plant.ask("GET", "/iiot/press-1/tunnel/22")
    assert (status, answer["error"]["code"]) == (426, "upgrade_required")
    assert (await plant.ask("GET", "/iiot/nobody/tunnels"))[0] == 404
    assert (await plant.get("/iiot/press-1/tunnels"))["items"] == []
    assert (await plant.ask("DELETE", "/iiot/press-1/tunnels/1"))[0] == 404


async def test_the_device_is_never_sent_more_than_it_has_room_for(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        async with tunnel(plant, device, credit=1_500) as (here, there):
            data = os.urandom(5_000)
            await here.send_bytes(data)
            assert await there.next() == data[:1_024]
            assert await there.next() == data[1_024:1_500]
            await device.store({"values": {"n": 1}})  # nothing more came: the acknowledgement is next
            await there.say("credit", credit=10)
            assert await there.next() == data[1_500:1_510]
            await there.say("credit", credit=10_000)
            assert await there.bytes(5_000 - 1_510) == data[1_510:]


async def test_the_device_may_send_as_much_as_was_handed_on(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        async with tunnel(plant, device) as (here, there):
            assert there.credit == WINDOW
            room, sent = there.credit, 0
            data = os.urandom(10 * WINDOW)
            reading = asyncio.create_task(received(here, len(data)))
            while sent < len(data):
                if not room:
                    frame = await there.next()
                    assert isinstance(frame, dict)
                    assert frame["state"] == "credit"
                    room += frame["credit"]
                size = min(room, 1_000)
                await there.send(data[sent : sent + size])
                sent, room = sent + size, room - size
            assert await reading == data


BREACHES = ("more than there is room for", "after its end", "before it is open", "room before it is open", "room for too much")


@pytest.mark.parametrize("breach", BREACHES)
async def test_a_device_that_breaks_the_rules_loses_the_tunnel_and_not_the_session(tmp_path: Path, breach: str) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        if "before it is open" in breach:
            asking = asyncio.create_task(plant.client.ws_connect(
                f"{plant.url}/iiot/press-1/tunnel/22", headers={"Authorization": f"Bearer {plant.token}"}
            ))  # fmt: skip
            there = await Port(device).asked()
            await (there.send(b"x") if breach == "before it is open" else there.say("credit", credit=5))
            with pytest.raises(WSServerHandshakeError) as caught:
                await asking
            assert caught.value.status == 502
        else:
            async with tunnel(plant, device) as (here, there):
                if breach == "after its end":
                    await there.say("end")
                    await there.send(b"x")
                elif breach == "room for too much":
                    await there.say("credit", credit=1 << 31)
                else:
                    await there.send(b"x" * (WINDOW + 1))
                assert (await closed(here))[0] in (1000, 1011)
        assert await there.next() == {"type": "tunnel", "tunnel": there.number, "state": "closed"}
        assert "device" in (await ended(plant))["detail"]["reason"]
        await device.store({"values": {"n": 1}})


async def test_bytes_for_no_tunnel_are_refused_and_those_for_one_that_is_over_are_not_heeded(plant: Plant) -> None:
    device = await plant.device("press-1")
    for data in (b"", b"\0\0", b"\0\0\0\0", b"\0\0\0\1x"):
        await device.link.send_bytes(data)
        assert (await device.expect("error"))["code"] == "not_binary"
    await device.send("tunnel", tunnel=5, state="end")
    assert (await device.expect("error"))["code"] == "not_binary"
    async with tunnel(plant, device) as (here, there):
        await finish(here)
        await there.next()
        await there.say("end")
        await closed(here)
    await ended(plant)
    await there.send(b"late")
    await there.say("credit", credit=5)
    async with tunnel(plant, device) as (here, other):
        assert other.number == there.number + 1
        await other.send(b"x")
        assert await received(here, 1) == b"x"


async def stalled(plant: Plant, device: Device, credit: int = 100) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Port]:
    """An operator that has opened a tunnel and reads nothing, with little room of its own."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", int(plant.url.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1_024)
    writer.write(upgrade(plant).encode())
    there = await Port(device).asked()
    await there.say("open", credit=credit)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer, there


def upgrade(plant: Plant, *, without: str = "", key: str = "aaaaaaaaaaaaaaaaaaaaaa==", version: str = "13") -> str:
    headers = {
        "Host": "x", "Authorization": f"Bearer {plant.token}", "Connection": "Upgrade", "Upgrade": "websocket",
        "Sec-WebSocket-Version": version, "Sec-WebSocket-Key": key,
    }  # fmt: skip
    lines = [f"{name}: {value}" for name, value in headers.items() if name != without]
    return "\r\n".join(("GET /iiot/press-1/tunnel/22 HTTP/1.1", *lines, "", ""))


async def test_an_operator_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, tunnel_window=1 << 20, tunnel_bytes=32_768)) as plant:
        device = await plant.device("press-1")
        _, writer, unread = await stalled(plant, device)
        room = unread.credit
        async with tunnel(plant, device) as (here, there):
            for _ in range(64):  # until nothing more is granted: what is not read fills the system's buffers first
                while room >= 32_768:
                    await unread.send(b"x" * 32_768)
                    room -= 32_768
                await there.send(b"ping")
                assert await received(here, 4) == b"ping"
                await here.send_bytes(b"pong")
                while isinstance(frame := await unread_or(there, unread), dict):
                    room += frame["credit"]
                assert frame == b"pong"
                await device.store({"values": {"n": 1}})
                if room < 32_768:
                    break
            assert room < 32_768
        writer.close()


async def unread_or(one: Port, other: Port) -> bytes | dict[str, Any]:
    """What comes next for either of two tunnels."""
    while True:
        async with asyncio.timeout(PATIENCE):
            message = await one.device.link.receive()
        if message.type == WSMsgType.BINARY:
            assert struct.unpack("!I", message.data[:4]) == (one.number,)
            return bytes(message.data[4:])
        frame = dict(message.json())
        if frame["type"] == "tunnel":
            assert (frame["tunnel"], frame["state"]) == (other.number, "credit")
            return frame


async def test_too_many_tunnels_are_refused(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        async with tunnel(plant, device), tunnel(plant, device), tunnel(plant, device):
            with pytest.raises(WSServerHandshakeError) as caught:
                await plant.client.ws_connect(
                    f"{plant.url}/iiot/press-1/tunnel/22", headers={"Authorization": f"Bearer {plant.token}"}
                )
            assert caught.value.status == 429


SLOW = attrs.evolve(iiot.Limits(), stall_seconds=0.3, tunnel_ping_seconds=0.1, tunnel_window=4 << 20)


async def test_an_operator_that_stands_still_for_long_loses_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, SLOW) as plant:
        device = await plant.device("press-1")
        reader, writer, there = await stalled(plant, device)
        for _ in range(128):
            await there.send(b"x" * 32_768)
        await there.say("end")
        await asyncio.sleep(2.5)  # the system breaks what takes nothing for 0.3 s, where it is told so
        frames = b""
        async with asyncio.timeout(PATIENCE):
            while not frames.endswith(struct.pack("!BBH", 0x88, 2, 1000)):
                data = await reader.read(1 << 20)
                assert data, len(frames)
                frames += data
        assert frames.count(b"x") == 128 * 32_768
        writer.close()


@pytest.mark.parametrize("how", ["DELETE", "disabled"])
async def test_a_tunnel_whose_operator_does_not_read_ends_at_once_too(tmp_path: Path, how: str) -> None:
    limits = attrs.evolve(iiot.Limits(), tunnel_window=8 << 20, stop_close_seconds=0.2, close_seconds=0.2)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        _, writer, there = await stalled(plant, device)
        for _ in range(200):
            await there.send(b"x" * 32_768)
        await device.store({"values": {"n": 1}})
        (shown,) = (await plant.get("/iiot/press-1/tunnels"))["items"]
        if how == "DELETE":
            assert (await plant.ask("DELETE", f"/iiot/press-1/tunnels/{shown['id']}"))[0] == 204
        else:
            await plant.ask("PATCH", "/iiot/press-1", {"disabled": True})
        async with asyncio.timeout(2):
            while not (found := (await plant.get("/audit?action=tunnel.end"))["items"]):
                await asyncio.sleep(0.01)
        assert ("closed by" if how == "DELETE" else "disabled") in found[0]["detail"]["reason"]
        writer.close()


async def test_what_the_device_sent_before_it_closed_arrives_before_the_reason(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with tunnel(plant, device) as (here, there):
        for _ in range(4):
            await there.send(b"x" * 30_000)
        await there.say("closed", message="broken")
        await here.send_bytes(b"nobody takes this")
        assert await received(here, 120_000) == b"x" * 120_000
        assert await closed(here) == (1011, "the device: broken")
    (end,) = (await plant.until("/audit?action=tunnel.end", lambda body: body["items"]))["items"]
    assert (end["detail"]["from_device"], end["detail"]["to_device"]) == (120_000, 0)


@pytest.mark.parametrize("wrong", [{"without": "Connection"}, {"without": "Sec-WebSocket-Key"}, {"key": "short"}, {"version": "12"}])
async def test_a_handshake_that_cannot_be_reaches_no_device(plant: Plant, wrong: dict[str, str]) -> None:
    device = await plant.device("press-1")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(plant.url.rpartition(":")[2]))
    writer.write(upgrade(plant, **wrong).encode())
    async with asyncio.timeout(PATIENCE):
        assert b" 426 " in await reader.readline()
    writer.close()
    await device.store({"values": {"n": 1}})  # nothing was said before this was confirmed
    assert (await plant.get("/audit?action=tunnel.open&limit=1"))["items"][0]["outcome"] == "upgrade_required"


@pytest.mark.parametrize("how", ["taken over", "disabled", "removed", "broken", "token revoked", "closed by an operator", "its device"])
async def test_a_tunnel_ends_with_what_it_stands_on(plant: Plant, how: str) -> None:
    device = await plant.device("press-1")
    _, other = await plant.ask("POST", "/tokens", {"name": "other", "role": "admin"})
    there = Port(device)
    asking = asyncio.create_task(there.asked())
    async with asyncio.timeout(PATIENCE):
        headers = {"Authorization": f"Bearer {other['token']}"}
        connecting = asyncio.create_task(
            plant.client.ws_connect(f"{plant.url}/iiot/press-1/tunnel/22", headers=headers, autoclose=False)
        )
        await asking
        await there.say("open", credit=100)
        here = await connecting
    if how == "taken over":
        await plant.device("press-1")
        reason = "the device's session ended: The device opened a newer session."
    elif how == "disabled":
        await plant.ask("PATCH", "/iiot/press-1", {"disabled": True})
        reason = "the device's session ended: The device is disabled."
    elif how == "removed":
        await plant.ask("DELETE", "/iiot/press-1")
        reason = "the device's session ended: The device was removed."
    elif how == "broken":
        await device.link.close()
        reason = "the device's session ended: The device closed the connection."
    elif how == "token revoked":
        await plant.ask("DELETE", f"/tokens/{other['id']}")
        reason = "the operator's token is valid no more"
    elif how == "its device":
        await there.say("closed", message="reset by the program on port 22")
        reason = "the device: reset by the program on port 22"
    else:
        (shown,) = (await plant.get("/iiot/press-1/tunnels"))["items"]
        assert (await plant.ask("DELETE", f"/iiot/press-1/tunnels/{shown['id']}"))[0] == 204
        reason = "closed by test admin"
    assert await closed(here) == (1011, reason)
    assert (await ended(plant))["detail"]["reason"] == reason
    if how in ("token revoked", "closed by an operator"):
        assert await there.next() == {"type": "tunnel", "tunnel": there.number, "state": "closed"}
    await here.close()


async def test_an_operator_that_goes_away_ends_the_tunnel(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with tunnel(plant, device) as (here, there):
        cut(here)
        assert await there.next() == {"type": "tunnel", "tunnel": there.number, "state": "closed"}
    assert (await ended(plant))["detail"]["reason"] == "the operator's connection broke"


async def test_idle_is_a_tunnel_without_bytes_in_either_direction(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK, tunnel_idle=0.4) as plant:
        device = await plant.device("press-1")
        async with tunnel(plant, device) as (here, there):
            began = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < began + 1.0:  # one way only, for longer than the limit
                await there.send(b"x")
                assert await received(here, 1) == b"x"
            assert await closed(here) == (1011, "no bytes in either direction for 0.4 s")
            frame = await there.next()
            while isinstance(frame, dict) and frame["state"] == "credit":
                frame = await there.next()
            assert frame == {"type": "tunnel", "tunnel": there.number, "state": "closed"}


async def test_the_operator_is_pinged(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        there = Port(device)
        asking = asyncio.create_task(there.asked())
        headers = {"Authorization": f"Bearer {plant.token}"}
        connecting = asyncio.create_task(
            plant.client.ws_connect(f"{plant.url}/iiot/press-1/tunnel/22", headers=headers, autoping=False, autoclose=False)
        )
        await asking
        await there.say("open", credit=100)
        here = await connecting
        for _ in range(5):  # not one is answered, and the connection lives all the same
            assert (await here.receive(PATIENCE)).type == WSMsgType.PING
        await there.send(b"x")
        message = await here.receive(PATIENCE)
        while message.type == WSMsgType.PING:
            message = await here.receive(PATIENCE)
        assert message.data == b"x"
        cut(here)


async def test_a_device_whose_tenant_may_store_no_more_can_still_be_reached(plant: Plant) -> None:
    iiot.change_database(plant.database, lambda connection: connection.execute("update tenant set points_most = 1").close())
    device = await plant.device("press-1")
    await device.telemetry({"values": {"a": 1, "b": 2}})
    await device.telemetry({"values": {"a": 1, "b": 2}})
    await device.expect("throttled")
    async with tunnel(plant, device) as (here, there):
        await there.send(b"x")
        assert await received(here, 1) == b"x"


async def test_the_end_of_a_tunnel_that_a_kill_cut_is_in_the_audit(tmp_path: Path) -> None:
    server = await Process(tmp_path).start()
    try:
        async with plants.client() as client:
            plant = Plant(server.url, client, plants.admin_token(server.database), server.database)
            device = await plant.device("press-1")
            async with tunnel(plant, device):
                await server.stop(signal.SIGKILL)
            await server.start()
            plant.url = server.url
            assert (await ended(plant))["detail"]["reason"] == "the server stopped without closing it"
    finally:
        await server.stop(signal.SIGKILL)


async def command_line(plant: Plant, *words: str, data: bytes = b"", token: str | None = None) -> tuple[int, bytes, str]:
    """Run `python iiot.py tunnel`: exit code, output, errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "iiot.py"), "tunnel", *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "IIOT_URL": plant.url, "IIOT_TOKEN": plant.token if token is None else token},
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE):
        output, errors = await process.communicate(data)
    assert process.returncode is not None
    return process.returncode, output, errors.decode()


async def echo(device: Device, greeting: bytes = b"") -> None:
    """Answer all that comes with itself, and an end with an end."""
    there = await Port(device).asked()
    await there.say("open", credit=1 << 20)
    await there.send(greeting)
    while isinstance(got := await there.next(), bytes) or got["state"] == "credit":
        if isinstance(got, bytes):
            await there.send(got)
            await there.say("credit", credit=len(got))
    if got["state"] == "end":
        await there.say("end")


async def test_the_command_line_connects_standard_input_and_output(plant: Plant) -> None:
    device = await plant.device("00:1B:44:11:3A:B7")
    data = os.urandom(300_000)[:200_000]
    for name in ("00:1B:44:11:3A:B7", "[00:1B:44:11:3A:B7]"):
        echoing = asyncio.create_task(echo(device))
        assert await command_line(plant, name, "22", data=data) == (0, data, "")
        await echoing


async def test_the_command_line_takes_files_too(plant: Plant, tmp_path: Path) -> None:
    device = await plant.device("press-1")
    (tmp_path / "in").write_bytes(b"x" * 100_000)
    echoing = asyncio.create_task(echo(device))
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "iiot.py"), "tunnel", "press-1", "22", "--url", plant.url, stdin=source, stdout=sink,
            env={**os.environ, "IIOT_TOKEN": plant.token},
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
    await echoing
    assert (tmp_path / "out").read_bytes() == b"x" * 100_000


@asynccontextmanager
async def client_of(
    plant: Plant, device: Device, credit: int = 10, **pipes: Any
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Port]]:
    """`python iiot.py tunnel press-1 22`, its three streams at hand if nothing else is said; and the device's side, which is open."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE) | pipes
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "iiot.py"), "tunnel", "press-1", "22", "--url", plant.url,
        env={**os.environ, "IIOT_TOKEN": plant.token}, **streams,
    )  # fmt: skip
    try:
        there = await Port(device).asked()
        await there.say("open", credit=credit)
        yield process, there
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_command_line_goes_on_sending_after_the_end_of_what_the_device_sends(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with client_of(plant, device, credit=1_000_000) as (client, there):
        await there.send(b"bye")
        await there.say("end")
        assert client.stdin is not None
        assert client.stdout is not None
        async with asyncio.timeout(PATIENCE):
            assert await client.stdout.read() == b"bye"  # and its end
        client.stdin.write(b"x" * 500_000)
        client.stdin.close()
        assert await there.bytes(500_000) == b"x" * 500_000
        assert (await there.next())["state"] == "end"  # type: ignore[call-overload]
        async with asyncio.timeout(PATIENCE):
            assert await client.wait() == 0


async def test_the_command_line_ends_with_the_tunnel_though_input_is_open(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with client_of(plant, device) as (client, there):
        await there.send(b"the last words")
        await there.say("closed", message="the program broke the connection")
        assert client.stdout is not None
        assert client.stderr is not None
        async with asyncio.timeout(PATIENCE):
            assert await client.stdout.read() == b"the last words"
            assert b"the device: the program broke the connection" in await client.stderr.read()
            assert await client.wait() == 1


async def test_the_command_line_leaves_streams_that_others_share_as_they_were(plant: Plant) -> None:
    device = await plant.device("press-1")
    ends = [os.pipe(), os.pipe()]
    pair = socket.socketpair()
    for stdin, stdout in ((ends[0][0], ends[1][1]), (pair[0].fileno(), pair[0].fileno())):
        async with client_of(plant, device, stdin=stdin, stdout=stdout) as (client, there):
            if stdin != stdout:
                assert os.get_blocking(stdin)
                assert os.get_blocking(stdout)
            await there.say("closed", message="done")
            async with asyncio.timeout(PATIENCE):
                await client.wait()
        assert os.get_blocking(stdin)
        assert os.get_blocking(stdout)
    for descriptor in (*ends[0], *ends[1]):
        os.close(descriptor)
    for side in pair:
        side.close()


async def test_the_command_line_that_is_stopped_says_so_to_the_server(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with client_of(plant, device) as (client, there):
        await plant.until("/iiot/press-1/tunnels", lambda body: body["items"] and body["items"][0]["open"])
        client.send_signal(signal.SIGHUP)
        assert (await there.next())["state"] == "end"  # type: ignore[call-overload]
        await there.send(b"too late")
        await there.say("end")
    (end,) = (await plant.until("/audit?action=tunnel.end", lambda body: body["items"]))["items"]
    assert end["detail"]["reason"] in ("the operator closed the connection", "both sides came to their end")


async def test_the_command_line_says_why_there_is_no_tunnel(plant: Plant) -> None:
    await plant.register("press-1")
    for words, token, text in (
        (("press-1", "22"), None, "iiot.py: The device is not connected.\n"),
        (("nobody", "22"), None, "iiot.py: There is no such resource.\n"),
        (("press-1", "22"), "", "iiot.py: set IIOT_TOKEN to the token of an admin\n"),
        (("press-1", "22"), "iiot_op_" + "0" * 16 + "_x", "iiot.py: A valid token is needed.\n"),
        (("press-1", "22", "--url", "http://127.0.0.1:9"), None, "iiot.py: no connection to the server: "),
    ):
        code, output, errors = await command_line(plant, *words, token=token)
        assert (code, output, errors[: len(text)]) == (1, b"", text)
    code, _, errors = await command_line(plant, "press-1", "70000")
    assert (code, "no port" in errors) == (2, True)
    device = await plant.device("press-1")

    async def refuse() -> None:
        await (await Port(device).asked()).say("refused", message="nobody listens on port 22")

    refusing = asyncio.create_task(refuse())
    _, _, errors = await command_line(plant, "press-1", "22")
    assert errors == "iiot.py: The device did not open the port. nobody listens on port 22\n"
    await refusing
    breaking = asyncio.create_task(echo(device, b"hello"))

    async def cut() -> None:
        await plant.until("/iiot/press-1/tunnels", lambda shown: any(one["from_device"] for one in shown["items"]))
        await plant.ask("PATCH", "/iiot/press-1", {"disabled": True})

    cutting = asyncio.create_task(cut())
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "iiot.py"), "tunnel", "press-1", "22", "--url", plant.url, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "IIOT_TOKEN": plant.token},
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        assert (await process.stderr.read()).decode() == "iiot.py: the device's session ended: The device is disabled.\n"
        assert await process.wait() == 1
    await cutting
    breaking.cancel()
    await asyncio.gather(breaking, return_exceptions=True)


@pytest.mark.parametrize("name", ["-x", "-", ".", ".."])
async def test_names_that_a_command_line_would_not_take_are_refused(plant: Plant, name: str) -> None:
    status, answer = await plant.ask("PUT", f"/iiot/{'%2E' * len(name) if name.strip('.') == '' else name}")
    assert status in (404, 405, 422), answer
    key = (await plant.ask("POST", "/provisioning-keys", {}))[1]["key"]
    device = await plant.connect()
    await device.send("provision", key=key, device=name)
    assert (await device.expect("error"))["code"] == "invalid"
