"""What a device's counter, its credentials and its link may do in the field: run away, be shared, get lost, be slow."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import Device, Plant, locked

import iiot

LEAP = iiot.Limits().seq_leap


async def kinds(plant: Plant, name: str = "press-1") -> list[str]:
    """The kinds of a device's timeline, oldest first."""
    return [item["kind"] for item in (await plant.get(f"/iiot/{name}/events?limit=1000"))["items"]][::-1]


# ---- the counter


@pytest.mark.parametrize("seq", [LEAP + 1, 2**63 - 1])
async def test_a_leap_of_the_counter_is_refused_and_changes_nothing(plant: Plant, seq: int) -> None:
    device = await plant.device("press-1")
    await device.telemetry({"values": {"level": 1}}, seq=seq)
    error = await device.receive()
    assert (error["type"], error["code"], error["seq"], error["errors"][0]["path"]) == ("error", "invalid", seq, "seq")
    await device.telemetry({"values": {"level": 2}}, seq=1)
    assert await device.receive() == {"type": "ack", "seq": 1}
    assert [value for _, value in await plant.points("press-1", "level")] == [2]
    await device.telemetry({"values": {"level": 3}}, seq=1 + LEAP)
    assert await device.receive() == {"type": "ack", "seq": 1 + LEAP}


@pytest.mark.parametrize("kind", ["nonsense", "hello"])
async def test_a_bad_frame_with_a_leap_is_not_taken_for_the_highest(plant: Plant, kind: str) -> None:
    device = await plant.device("press-1")
    await device.send(kind, seq=2**62)
    assert (await device.receive())["seq"] == 2**62
    await device.store({"values": {"level": 1}})
    await device.close()
    assert (await plant.device("press-1")).welcome["seq"] == 1


async def test_a_counter_at_its_top_harms_nobody(plant: Plant) -> None:
    assert (await plant.ask("PUT", "/iiot/press-1"))[0] == 201
    assert (await plant.ask("POST", "/iiot/press-1/seq", {"seq": 2**63 - 2}))[0] == 200
    _, body = await plant.ask("POST", "/iiot/press-1/token", {"revoke": True})
    plant.tokens["press-1"] = body["token"]
    device, other = await plant.device("press-1"), await plant.device("press-2")
    for seq in (2**63, 2**63 - 1, 2**63, 2**63 + 1):
        await device.telemetry({"values": {"level": 1}}, seq=seq)
        frame = await device.receive()
        assert frame["seq"] == seq
        assert frame["type"] == ("ack" if seq < 2**63 else "error")
        await other.store({"values": {"level": 1}})
    assert [item["kind"] for item in (await plant.get("/iiot/press-2/events"))["items"]] == ["connected", "credentials"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"type":"state","reported":{"seq": 8000000000000, "x": NaN}, "seq": }', b'[{"seq": 8000000000000}, NaN]',
        b'{"type":"telemetry","samples":[{"values":{"seq":8000000000000,"a":NaN}}]}',
    ],
)  # fmt: skip
async def test_a_number_from_within_a_broken_frame_moves_no_counter(plant: Plant, text: bytes) -> None:
    device = await plant.device("press-1")
    await device.link.send_str(text.decode())
    assert (await device.receive())["type"] == "error"
    await device.store({"values": {"level": 1}})
    await device.close()
    assert (await plant.device("press-1")).welcome["seq"] == 1


async def test_a_reset_says_to_which_number(plant: Plant) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("POST", "/iiot/press-1/seq", {})
    assert (status, body["error"]["details"]) == (422, [{"path": "seq", "message": "is missing"}])


async def test_milliseconds_since_1970_may_be_the_first_number(plant: Plant) -> None:
    device = await plant.device("press-1")
    device.seq = iiot.now_ms()
    await device.store({"values": {"level": 1}})


async def test_duplicates_that_keep_coming_are_on_the_timeline_once(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.telemetry({"values": {"level": 1}}, seq=1_000)
    await device.acknowledged(1_000)
    for seq in range(1, 10):
        await device.telemetry({"values": {"level": 2}}, seq=seq)
        assert await device.receive() == {"type": "ack", "seq": 1_000}
    assert "duplicates" not in await kinds(plant)
    for seq in range(10, 50):
        await device.telemetry({"values": {"level": 2}}, seq=seq)
        assert await device.receive() == {"type": "ack", "seq": 1_000}
    device.seq = 1_000
    await device.store({"values": {"level": 3}})
    (told,) = (await plant.get("/iiot/press-1/events?kind=duplicates"))["items"]
    assert (told["seq"], told["highest"]) == (10, 1_000)


async def test_duplicates_between_new_frames_are_not_told(plant: Plant) -> None:
    device = await plant.device("press-1")
    for seq in range(1, 30):
        for _ in range(3):
            await device.telemetry({"values": {"level": 1}}, seq=seq)
        await device.acknowledged(seq)
    assert "duplicates" not in await kinds(plant)


async def test_an_operator_resets_a_counter_that_ran_away(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.telemetry({"ts": iiot.EARLIEST, "values": {"level": 1}}, seq=LEAP)
    await device.acknowledged(LEAP)
    assert await plant.ask("POST", "/iiot/press-1/seq", {"seq": 0}) == (200, {"device": "press-1", "seq": 0})
    closed = await device.closed()
    assert (closed.code, closed.reason) == (4409, iiot.FAULTS["seq_reset"].message)
    device = await plant.device("press-1")
    assert device.welcome["seq"] == 0
    await device.store({"ts": iiot.EARLIEST + 1, "values": {"level": 2}})
    assert [value for _, value in await plant.points("press-1", "level")] == [1, 2]
    (event,) = (await plant.get("/iiot/press-1/events?kind=counter"))["items"]
    assert (event["seq"], event["by"]) == (0, "test admin")
    assert (await plant.ask("POST", "/iiot/press-1/seq", {"seq": 40}))[0] == 200
    await device.closed()
    assert (await plant.device("press-1")).welcome["seq"] == 40


async def test_frames_under_way_do_not_undo_the_reset_of_their_counter(plant: Plant) -> None:
    device = await plant.device("press-1")
    with locked(plant.database):
        resetting = asyncio.create_task(plant.ask("POST", "/iiot/press-1/seq", {"seq": 0}))
        for seq in range(500, 600):
            await device.telemetry({"values": {"level": 1}}, seq=seq)
        await plant.get("/iiot")
    assert (await resetting)[0] == 200
    await device.closed()
    assert (await plant.device("press-1")).welcome["seq"] == 0


# ---- two clients with one token


async def fight(plant: Plant, token: str, rounds: int) -> tuple[list[Device], list[dict[str, Any]]]:
    """Clients that come again and again without waiting: their sessions, and the errors of those that were refused."""
    sessions, refused = [], []
    for _ in range(rounds):
        device = await plant.connect()
        await device.send("hello", token=token)
        frame = await device.receive()
        if frame["type"] == "welcome":
            sessions.append(device)
        else:
            refused.append(frame)
            closed = await device.closed()
            assert (closed.code, closed.reason) == (4429, iiot.FAULTS["session_conflict"].message)
    return sessions, refused


async def test_a_fight_for_a_session_is_damped_and_told_in_one_line(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), fights=5, conflict_seconds=0.0)
    async with plants.plant(tmp_path, limits) as plant:
        token = await plant.register("press-1")
        sessions, refused = await fight(plant, token, 60)
        assert (len(sessions), len(refused)) == (6, 54)
        assert {(frame["code"], frame["retry_after"]) for frame in refused} == {("session_conflict", 60)}
        holder = sessions[-1]
        holder.seq = 0
        await holder.store({"values": {"level": 1}})
        assert (await kinds(plant)).count("conflict") == 1
        assert (await kinds(plant)).count("connected") == 6
        (event,) = (await plant.get("/iiot/press-1/events?kind=conflict"))["items"]
        assert (event["address"], event["session_address"]) == ("127.0.0.1", "127.0.0.1")
        await holder.close()
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
        assert len((await fight(plant, token, 1))[0]) == 1, "who is alone is welcome"


async def test_sessions_that_lasted_are_superseded_as_often_as_need_be(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), fights=2, fought_seconds=0.0)) as plant:
        sessions, refused = await fight(plant, await plant.register("press-1"), 20)
        assert (len(sessions), len(refused)) == (20, 0)


# ---- a lost answer to `provision`


async def provision(plant: Plant, key: str, name: str, secret: str | None) -> dict[str, Any]:
    device = await plant.connect()
    await device.send("provision", key=key, device=name, **({} if secret is None else {"secret": secret}))
    answer = await device.receive()
    await device.close()
    return answer


async def new_key(plant: Plant, **fields: Any) -> str:
    return str((await plant.ask("POST", "/provisioning-keys", fields))[1]["key"])


async def test_a_lost_answer_to_provision_is_given_again(plant: Plant) -> None:
    key, secret = await new_key(plant, uses=1), secrets.token_urlsafe(32)
    first = await provision(plant, key, "press-1", secret)
    assert first["token"].endswith(f"_{secret}")
    assert await provision(plant, key, "press-1", secret) == first
    plant.tokens["press-1"] = first["token"]
    assert (await plant.device("press-1")).welcome["device"] == "press-1"
    assert await provision(plant, key, "press-1", secret) == first, "after its first use too"
    assert (await plant.get("/provisioning-keys"))["items"][0]["uses_left"] == 0
    assert (await kinds(plant)).count("credentials") == 1
    entries = (await plant.get("/audit?action=device.provision"))["items"]
    assert [(entry["outcome"], entry["detail"]) for entry in entries] == [("ok", {"again": True}), ("ok", {"again": True}), ("ok", None)]


async def test_another_secret_name_or_key_is_another_device(plant: Plant) -> None:
    key, secret = await new_key(plant), secrets.token_urlsafe(32)
    first = await provision(plant, key, "press-1", secret)
    assert (await provision(plant, key, "press-1", secrets.token_urlsafe(32)))["code"] == "device_exists"
    assert (await provision(plant, key, "press-1", None))["code"] == "device_exists"
    assert (await provision(plant, await new_key(plant), "press-1", secret))["code"] == "device_exists"
    assert (await provision(plant, key, "press-2", secret))["token"] != first["token"]
    assert (await plant.ask("POST", "/iiot/press-1/token", {"revoke": True}))[0] == 201
    assert (await provision(plant, key, "press-1", secret))["code"] == "device_exists", "its token is another by now"


async def test_a_key_that_is_used_up_or_withdrawn_gives_nothing_new(plant: Plant) -> None:
    key, secret = await new_key(plant, uses=1), secrets.token_urlsafe(32)
    await provision(plant, key, "press-1", secret)
    assert (await provision(plant, key, "press-2", secret))["code"] == "unauthorized"
    (item,) = (await plant.get("/provisioning-keys"))["items"]
    assert (await plant.ask("DELETE", f"/provisioning-keys/{item['id']}"))[0] == 204
    assert (await provision(plant, key, "press-1", secret))["code"] == "unauthorized"


async def test_a_key_that_is_used_up_is_a_guess_with_a_secret_too(plant: Plant) -> None:
    key = await new_key(plant, uses=1)
    await provision(plant, key, "press-1", secrets.token_urlsafe(32))
    before = len((await plant.get("/audit?limit=1000"))["items"])
    codes = [(await provision(plant, key, "press-2", secrets.token_urlsafe(32)))["code"] for _ in range(20)]
    assert codes[0] == "unauthorized"
    assert codes[-1] == "too_many_attempts"
    assert len((await plant.get("/audit?limit=1000"))["items"]) == before


@pytest.mark.parametrize("secret", ["", "x" * 42, "x" * 44, "x" * 42 + "=", "x" * 42 + "\n", "\u00e9" * 43, 7])
async def test_a_secret_that_is_no_32_bytes_is_refused(plant: Plant, secret: Any) -> None:
    answer = await provision(plant, await new_key(plant), "press-1", secret)
    assert (answer["code"], answer["errors"][0]["path"]) == ("invalid", "secret")
    assert (await plant.get("/iiot"))["items"] == []


# ---- names


@pytest.mark.parametrize("name", [".", ".."])
async def test_a_step_in_a_path_is_no_device(plant: Plant, name: str) -> None:
    answer = await provision(plant, await new_key(plant), name, None)
    assert (answer["code"], answer["errors"][0]["path"]) == ("invalid", "device")


@pytest.mark.parametrize(
    ("first", "second"),
    [("aa:bb:cc:dd:ee:0f", "AA:BB:CC:DD:EE:0F"), ("AA-BB-CC-DD-EE-0F", "aa-bb-cc-dd-ee-0f"), ("aabb.ccdd.ee0f", "AABB.CCDD.EE0F")],
)
async def test_a_hardware_address_in_other_letters_is_the_same_device(plant: Plant, first: str, second: str) -> None:
    await plant.register(first)
    expected = [{"path": "device", "message": f"is the same hardware address as {first}"}]
    status, body = await plant.ask("PUT", f"/iiot/{second}")
    assert (status, body["error"]["code"], body["error"]["details"]) == (409, "device_exists", expected)
    answer = await provision(plant, await new_key(plant), second, None)
    assert (answer["code"], answer["errors"]) == ("device_exists", expected)
    assert (await plant.ask("DELETE", f"/iiot/{first}"))[0] == 204
    await plant.register(second)


async def test_names_that_are_no_hardware_addresses_may_differ_in_case(plant: Plant) -> None:
    for name in ("press-1", "Press-1"):
        await plant.register(name)


# ---- frames


@pytest.mark.parametrize(("size", "taken"), [(1024 * 1024, True), (1024 * 1024 + 1, False)])
async def test_a_frame_of_just_the_limit_is_taken(plant: Plant, size: int, taken: bool) -> None:  # noqa: FBT001 - a table
    device = await plant.device("press-1")
    frame = '{"type":"telemetry","seq":1,"samples":[{"values":{"level":1}}]}'
    await device.link.send_str(frame + " " * (size - len(frame)))
    if taken:
        assert await device.receive() == {"type": "ack", "seq": 1}
    else:
        assert (await device.closed()).code == 1009


@pytest.mark.parametrize(
    "text",
    [
        b'{"type":"telemetry","seq":1,"samples":[{"values":{"level":NaN}}]}', b'\xef\xbb\xbf{"type":"telemetry","seq":1,"samples":[]}',
        b'{"type":"telemetry","seq":1,"samples":[{"values":{"note":"\xb0C"}}]}',
        b'{"type":"telemetry","seq":1,"samples":[{"values":{"a":1.}}]}',
        b'{"type":"telemetry","seq":1,"samples":[{"values":{"a":"\\ud800"}}]}', b'{"type":"telemetry","seq":1,"samples":[]}\0',
    ],
)  # fmt: skip
async def test_an_error_names_the_frame_that_is_no_json(plant: Plant, text: bytes) -> None:
    token = await plant.register("press-1")
    async with raw(plant) as link:
        link.text(json.dumps({"type": "hello", "token": token}).encode())
        assert (await link.frame())["type"] == "welcome"
        link.text(text)
        error = await link.frame()
        assert (error["type"], error["seq"]) == ("error", 1)
        assert await link.frame() == {"type": "ack", "seq": 1}, "it is consumed"


# ---- a slow link


class Link:
    """A WebSocket by hand, that sends its bytes when the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def bytes_of(self, text: bytes) -> bytes:
        size = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + len(text).to_bytes(2, "big")
        return b"\x81" + size + bytes(4) + text

    def text(self, text: bytes) -> None:
        self.writer.write(self.bytes_of(text))

    async def frame(self) -> dict[str, Any]:
        """The next text frame; pings are passed over, and not answered."""
        async with asyncio.timeout(plants.PATIENCE):
            while True:
                first, length = await self.reader.readexactly(2)
                if length == 126:
                    length = int.from_bytes(await self.reader.readexactly(2), "big")
                payload = await self.reader.readexactly(length)
                if first == 0x81:
                    frame: dict[str, Any] = json.loads(payload)
                    return frame
                assert first == 0x89, payload


@asynccontextmanager
async def raw(plant: Plant) -> AsyncIterator[Link]:
    host, port = plant.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(
            f"GET /device HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        yield Link(reader, writer)
    finally:
        writer.transport.abort()


async def test_a_frame_that_takes_many_heartbeats_to_arrive_is_taken(tmp_path: Path) -> None:
    heartbeat = 0.4
    async with plants.plant(tmp_path, heartbeat=heartbeat) as plant, raw(plant) as link:
        link.text(json.dumps({"type": "hello", "token": await plant.register("press-1")}).encode())
        await link.frame()
        samples = [{"values": {"level": n}} for n in range(40)]
        frame = link.bytes_of(json.dumps({"type": "telemetry", "seq": 1, "samples": samples}).encode())
        loop = asyncio.get_running_loop()
        began = loop.time()
        for at in range(0, len(frame), 100):
            link.writer.write(frame[at : at + 100])
            await asyncio.sleep(heartbeat / 4)  # the link's own pace
        assert loop.time() - began > 2 * heartbeat, "longer than silence may last"
        assert await link.frame() == {"type": "ack", "seq": 1}


# ---- what a list shows


async def test_a_row_of_a_list_has_a_bounded_software_version(plant: Plant) -> None:
    device = await plant.device("press-1", agent="a" * 1_000)
    await device.send("state", seq=1, reported={"software_version": "v" * 60_000})
    await device.acknowledged(1)
    (item,) = (await plant.get("/iiot"))["items"]
    assert (item["software_version"], item["agent"]) == ("v" * 128, "a" * 128)
    assert (await plant.get("/iiot/press-1/state"))["reported"] == {"software_version": "v" * 60_000}


async def test_a_session_is_not_counted_twice_after_a_conflict(tmp_path: Path) -> None:
    """Who is refused holds no place of the tenant's connections."""
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), fights=1, conflict_seconds=0.0)) as plant, ClientSession() as client:
        token = await plant.register("press-1")
        await fight(Plant(plant.url, client, plant.token, plant.database), token, 5)
        quotas = (await plant.get("/whoami"))["quotas"]
        assert quotas["connections"]["used"] <= 1
