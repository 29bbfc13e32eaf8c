"""The live feed of a tenant (server-sent events), and the timeline of a device: what happened, in order, after it was committed."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import attrs
import plant as plants
import pytest
from aiohttp import ClientResponse, ClientSession
from plant import PATIENCE, Device, Plant

import iiot


@attrs.frozen
class Event:
    """What one block of the stream says; a comment has no id."""

    id: int | None
    kind: str
    data: dict[str, Any]


class Feed:
    """A reader of the stream that keeps to the format (HTML standard, section 9.2.6)."""

    def __init__(self, response: ClientResponse) -> None:
        self.response = response

    async def block(self) -> Event | None:
        """The next event, or comment; None at the end."""
        fields: dict[str, str] = {}
        comment = False
        async with asyncio.timeout(PATIENCE):
            while line := (await self.response.content.readline()).decode():
                if line == "\n" and (fields or comment):
                    number = fields.get("id")
                    return Event(None if number is None else int(number), fields.get("event", ""), json.loads(fields.get("data", "{}")))
                name, colon, value = line.rstrip("\n").partition(":")
                assert colon, line
                comment = comment or not name
                if name:
                    assert name not in fields
                    fields[name] = value.removeprefix(" ")
        assert not fields, "the stream ended within an event"
        return None

    async def event(self) -> Event:
        """The next event; comments are passed over."""
        while (event := await self.block()) is not None:
            if event.id is not None:
                return event
        raise AssertionError("the stream ended")

    async def events(self, count: int) -> list[Event]:
        return [await self.event() for _ in range(count)]

    async def until(self, number: int) -> list[Event]:
        """Every event up to the one of this id."""
        events = [await self.event()]
        while cast(int, events[-1].id) < number:
            events.append(await self.event())
        return events


@asynccontextmanager
async def feed(plant: Plant, query: str = "", token: str | None = None, last: int | str | None = None) -> AsyncIterator[Feed]:
    headers = {"Authorization": f"Bearer {token or plant.token}"}
    if last is not None:
        headers["Last-Event-ID"] = str(last)
    async with plant.client.get(f"{plant.url}/events{query}", headers=headers) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        yield Feed(response)


async def timeline(plant: Plant, name: str = "press-1", query: str = "") -> list[dict[str, Any]]:
    """A device's timeline, oldest first."""
    items: list[dict[str, Any]] = (await plant.get(f"/iiot/{name}/events?limit=1000{query}"))["items"]
    return items[::-1]


async def change(device: Device, number: int) -> int:
    """Report a new state; the number of the frame."""
    device.seq += 1
    await device.send("state", seq=device.seq, reported={"n": number})
    return device.seq


async def changed(device: Device, *numbers: int) -> None:
    """Report new states, one after the other, and wait until they are on disk."""
    for number in numbers:
        await change(device, number)
    await device.acknowledged(device.seq)


async def push(plant: Plant, name: str, document: Any) -> int:
    status, body = await plant.ask("POST", f"/iiot/{name}", document)
    assert status == 202, body
    return int(body["version"])


async def other_tenant(plant: Plant) -> tuple[str, Device]:
    """An operator's token of a second tenant, and its device, connected."""
    operator, token = iiot.mint("op"), iiot.mint("dev")

    def add(connection: sqlite3.Connection) -> None:
        connection.execute("insert into tenant (name, created_at) values ('other', 0)")
        tenant = iiot.tenant_id_of(connection, "other")
        iiot.insert_operator_token(connection, tenant, operator.stored, "theirs", "viewer")
        iiot.insert_device(connection, tenant, iiot.DeviceName("press-1"), token.stored, {})

    iiot.change_database(plant.database, add)
    return operator.text, await (await plant.connect()).hello(token.text)


# ---- the live feed


async def test_the_feed_tells_what_happens_in_the_order_in_which_it_happens(plant: Plant) -> None:
    await plant.register("press-1")
    async with feed(plant) as following:
        device = await plant.device("press-1", agent="plc/1")
        await changed(device, 1)
        version = await push(plant, "press-1", {"speed": 3})
        assert (await device.expect("config"))["version"] == version
        device.seq += 1
        await device.send("config_status", seq=device.seq, version=version, status="applied")
        await device.acknowledged(device.seq)
        await device.close()
        await plant.register("press-2")
        events = await following.events(6)
    assert [(event.kind, event.data["device"]) for event in events] == [
        ("connected", "press-1"), ("state", "press-1"), ("config", "press-1"), ("config", "press-1"),
        ("disconnected", "press-1"), ("credentials", "press-2"),
    ]  # fmt: skip
    assert [event.data.get("status") for event in events[2:4]] == ["pending", "applied"]
    assert events[4].data["reason"] == "closed_by_device"
    for event in events:
        assert (event.data["kind"], event.data["id"]) == (event.kind, event.id)
    shown = [{name: value for name, value in event.data.items() if name != "device"} for event in events[:5]]
    assert shown == (await timeline(plant))[-5:], "the timeline says the same"


async def test_an_event_is_told_only_when_it_is_committed(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with feed(plant) as following:
        with closing(sqlite3.connect(plant.database, isolation_level=None)) as other:
            other.execute("begin immediate")  # until it is over, nothing is committed
            seq = await change(device, 1)
            await device.send("nonsense")  # answered at once: by then the report has been read
            await device.expect("error")
            told = asyncio.create_task(following.event())
            for _ in range(5):
                await plant.get("/whoami")
            assert not told.done()
            other.execute("rollback")
        await device.acknowledged(seq)
        event = await told
    assert (event.kind, event.data["version"]) == ("state", 1)


async def test_the_feed_without_an_id_tells_only_what_is_new(plant: Plant) -> None:
    device = await plant.device("press-1")
    await changed(device, 1, 2, 3)
    async with feed(plant) as following:
        await changed(device, 4)
        event = await following.event()
    assert (event.kind, event.data["version"]) == ("state", 4)


async def test_the_feed_goes_on_after_an_id_by_header_or_parameter(plant: Plant) -> None:
    device = await plant.device("press-1")
    await changed(device, 1, 2, 3)
    ids = [item["id"] for item in await timeline(plant)]
    async with feed(plant, "?after=0") as following:
        assert [event.id for event in await following.events(len(ids))] == ids
    async with feed(plant, f"?after={ids[2]}") as by_parameter, feed(plant, last=ids[2]) as by_header:
        await changed(device, 4)
        for following in (by_parameter, by_header):
            events = await following.events(len(ids) - 2)
            assert [event.id for event in events[:-1]] == ids[3:]
            assert (events[-1].kind, events[-1].data["version"]) == ("state", 4)


async def test_of_header_and_parameter_the_header_counts(plant: Plant) -> None:
    device = await plant.device("press-1")
    await changed(device, 1, 2, 3)
    ids = [item["id"] for item in await timeline(plant)]
    async with feed(plant, "?after=0", last=ids[-2]) as following:  # a browser comes back to the address with what it saw last
        assert (await following.event()).id == ids[-1]


async def test_an_empty_last_event_id_tells_only_what_is_new(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with feed(plant, last="") as following:
        await changed(device, 1)
        assert (await following.event()).kind == "state"


@pytest.mark.parametrize("header", ["abc", "-1", "1.5", "9" * 30])
async def test_a_last_event_id_that_is_none_is_refused(plant: Plant, header: str) -> None:
    headers = {"Authorization": f"Bearer {plant.token}", "Last-Event-ID": header}
    async with plant.client.get(plant.url + "/events", headers=headers) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["details"][0]["path"]) == (422, "invalid", "Last-Event-ID")


async def test_a_reader_that_comes_and_goes_in_a_stream_of_changes_has_each_event_once(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), feed_events=7)
    async with plants.plant(tmp_path, limits) as plant:
        devices = [await plant.device(f"press-{number}") for number in range(3)]
        start = max([(await timeline(plant, f"press-{number}"))[-1]["id"] for number in range(3)])
        async def report(device: Device) -> None:
            for number in range(150):
                await changed(device, number)

        reporting = asyncio.gather(*map(report, devices))
        seen: list[int] = []
        last = start
        while len(seen) < 450:
            async with feed(plant, last=last) as following:
                for _ in range(min(11, 450 - len(seen))):
                    event = await following.event()
                    last = cast(int, event.id)
                    seen.append(last)
        await reporting
        everything = [item["id"] for number in range(3) for item in await timeline(plant, f"press-{number}")]
    assert seen == sorted(number for number in everything if number > start)


async def test_many_readers_have_the_same_stream(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with feed(plant) as one, feed(plant) as two, feed(plant) as three:
        await changed(device, *range(50))
        streams = await asyncio.gather(*(following.events(50) for following in (one, two, three)))
    assert streams[0] == streams[1] == streams[2]
    assert [event.data["version"] for event in streams[0]] == list(range(1, 51))


async def test_the_feed_goes_on_after_a_restart_of_the_server(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        device = await plant.device("press-1")
        await changed(device, 1)
        async with feed(plant, "?after=0") as following:
            seen = [event.id for event in await following.events(3)]
    async with plants.plant(tmp_path) as plant, feed(plant, last=seen[-1]) as following:
        event = await following.event()
    assert (event.kind, event.data["session"]) == ("disconnected", 1)
    assert cast(int, event.id) > cast(int, seen[-1])


async def test_the_feed_is_of_one_tenant(plant: Plant) -> None:
    theirs, their_device = await other_tenant(plant)
    ours = await plant.device("press-1")
    async with feed(plant) as our_feed, feed(plant, token=theirs) as their_feed:
        for number in range(5):
            await changed(their_device, number)
            await changed(ours, number)
        our_events, their_events = await our_feed.events(5), await their_feed.events(5)
    assert [event.data["version"] for event in our_events] == [event.data["version"] for event in their_events] == [1, 2, 3, 4, 5]
    assert {event.id for event in our_events}.isdisjoint(event.id for event in their_events)
    our_ids = {item["id"] for item in await timeline(plant)}
    assert {event.id for event in our_events} <= our_ids
    async with feed(plant, "?after=0", token=theirs) as following:
        events = await following.events(7)
    assert {event.id for event in events}.isdisjoint(our_ids)


async def test_a_comment_keeps_a_quiet_feed_alive(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), feed_seconds=0.05)) as plant, feed(plant) as following:
        for _ in range(3):
            comment = await following.block()
            assert comment is not None
            assert comment.id is None
        await plant.register("press-1")
        assert (await following.event()).kind == "credentials"


async def test_a_comment_keeps_a_quiet_feed_alive_while_others_are_busy(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), feed_seconds=0.2)) as plant:
        _, busy = await other_tenant(plant)
        async with feed(plant) as following:
            comment = asyncio.create_task(following.block())
            until = time.monotonic() + 2
            while not comment.done() and time.monotonic() < until:
                await changed(busy, busy.seq)
            told = comment.done()
            comment.cancel()
    assert told, "no comment for ten times as long as a feed may be silent"


async def test_the_feed_ends_when_the_server_stops(process: plants.Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        async with feed(plant) as one, feed(plant) as two:
            await plant.register("press-1")
            assert [(await one.event()).kind, (await two.event()).kind] == ["credentials"] * 2
            started = time.monotonic()
            stopped = asyncio.create_task(process.stop())
            assert [await one.block(), await two.block()] == [None, None]
            assert await stopped == 0
            assert time.monotonic() - started < 2


@asynccontextmanager
async def deaf_reader(plant: Plant) -> AsyncIterator[socket.socket]:
    """A client that asks for the whole feed and reads nothing of it."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        host, port = plant.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, (host, int(port)))
        request = f"GET /events?after=0 HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {plant.token}\r\n\r\n"
        await loop.sock_sendall(deaf, request.encode())
        yield deaf


def established(near: socket.socket) -> bool:
    """Whether the peer of a connection on this machine still has it open."""
    try:
        (_, far), (_, own) = near.getpeername(), near.getsockname()
    except OSError:  # it was reset
        return False
    peer = f"0100007F:{far:04X} 0100007F:{own:04X} 01 "
    return any(peer in line for line in Path("/proc/net/tcp").read_text().splitlines())


async def flood(plant: Plant, device: Device, megabytes: int) -> None:
    """Events of about a megabyte in all, each: more than the buffers of a socket take."""
    version = await push(plant, "press-1", {})
    await device.expect("config")
    errors = [{"path": "", "code": "", "message": "x" * 1000}] * 60
    for _ in range(megabytes * 16):
        device.seq += 1
        await device.send("config_status", seq=device.seq, version=version, status="rejected", errors=errors)
    await device.acknowledged(device.seq)


async def test_a_reader_that_does_not_read_holds_up_nobody(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with AsyncExitStack() as stack, feed(plant) as following:
        for _ in range(iiot.Limits().readers + 2):
            await stack.enter_async_context(deaf_reader(plant))
        await flood(plant, device, 12)
        started = time.monotonic()
        await changed(device, 1)
        while (await following.event()).kind != "state":
            pass
        assert (await plant.get("/iiot/press-1"))["reported"] == {"n": 1}
        await plant.register("press-2")
        assert (await following.event()).kind == "credentials"
        assert time.monotonic() - started < 5


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
async def test_a_reader_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), stall_seconds=0.3)) as plant:
        device = await plant.device("press-1")
        async with deaf_reader(plant) as deaf:
            assert established(deaf)
            await flood(plant, device, 12)
            until = time.monotonic() + 3
            while established(deaf) and time.monotonic() < until:
                await plant.get("/whoami")
            dropped = not established(deaf)
    assert dropped


async def test_a_reader_that_does_not_read_does_not_hold_up_the_end_of_the_server(process: plants.Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        async with deaf_reader(plant):
            await flood(plant, device, 12)
            await device.close()
            started = time.monotonic()
            stopped = asyncio.create_task(process.stop())
            await asyncio.wait([stopped], timeout=3)
            in_time = stopped.done()
        assert await stopped == 0
        assert in_time, f"{time.monotonic() - started:.1f} s"


async def test_the_feed_is_for_whoever_may_read(plant: Plant) -> None:
    for token, expected in (("", 401), ("iiot_op_nonsense", 401), (plants.admin_token(plant.database, "platform"), 403)):
        status, body = await plant.ask("GET", "/events", token=token)
        assert (status, body["error"]["code"]) == (expected, "unauthorized" if expected == 401 else "forbidden")
    for role in ("viewer", "operator", "admin"):
        async with feed(plant, token=plants.admin_token(plant.database, role)):
            pass


@pytest.mark.parametrize("query", ["after=last", "after=-1", "after=1&after=2", "since=1", "after=" + "9" * 30])
async def test_a_feed_that_is_not_understood_is_refused(plant: Plant, query: str) -> None:
    status, body = await plant.ask("GET", f"/events?{query}")
    assert (status, body["error"]["code"]) == (400, "bad_query")
    assert [field["path"] for field in body["error"]["details"]] == [query.partition("=")[0]]


# ---- the timeline of a device


async def lived(plant: Plant) -> None:
    """A device's life: registered, connected, reported, configured, taken over, gone."""
    await plant.register("press-1")
    device = await plant.device("press-1", agent="plc/1")
    await changed(device, 1)
    version = await push(plant, "press-1", {"speed": 3})
    await device.expect("config")
    for status in ("in_progress", "rejected"):
        device.seq += 1
        more = {} if status == "in_progress" else {"message": "too fast", "errors": [{"path": "/speed", "code": "max", "message": "2"}]}
        await device.send("config_status", seq=device.seq, version=version, status=status, **more)
        await device.acknowledged(device.seq)
    newer = await plant.device("press-1")
    await device.closed()
    await push(plant, "press-1", {"speed": 2})
    await newer.close()
    await plant.until("/iiot/press-1", lambda body: not body["connected"])


LIFE = ["credentials", "connected", "state", "config", "config", "config", "disconnected", "connected", "config", "disconnected"]


async def test_the_timeline_tells_a_devices_life_in_order(plant: Plant) -> None:
    await lived(plant)
    items = await timeline(plant)
    # The old session is seen off and the new one welcomed in one transaction; which is written first is fixed.
    assert [item["kind"] for item in items] == LIFE
    ids, times = [item["id"] for item in items], [item["at"] for item in items]
    assert ids == sorted(set(ids))
    assert [len(moment) for moment in times] == [24] * len(times)
    by_kind = {kind: [item for item in items if item["kind"] == kind] for kind in set(LIFE)}
    assert [item["reason"] for item in by_kind["disconnected"]] == ["superseded", "closed_by_device"]
    assert [item["session"] for item in by_kind["connected"]] == [1, 2]
    assert [item["session"] for item in by_kind["disconnected"]] == [1, 2]
    assert [(item["version"], item["status"]) for item in by_kind["config"]] == [
        (1, "pending"), (1, "in_progress"), (1, "rejected"), (2, "pending"),
    ]  # fmt: skip
    assert by_kind["config"][2]["message"] == "too fast"
    assert by_kind["config"][2]["errors"] == [{"path": "/speed", "code": "max", "message": "2"}]
    assert by_kind["config"][0]["by"] == "test admin"
    assert by_kind["state"][0]["version"] == 1


async def test_what_is_committed_together_keeps_its_order_in_the_timeline(plant: Plant) -> None:
    device = await plant.device("press-1")
    version = await push(plant, "press-1", {"speed": 3})
    await device.expect("config")
    await changed(device, 0)
    with closing(sqlite3.connect(plant.database, isolation_level=None)) as other:
        other.execute("begin immediate")  # until it is over, nothing is committed
        for number in (1, 2):
            device.seq += 1
            await device.send("config_status", seq=device.seq, version=version, status="applied", message=str(number))
            await change(device, number)
        await device.close()
        other.execute("rollback")
    await plant.until("/iiot/press-1", lambda body: not body["connected"])
    items = (await timeline(plant))[-5:]
    assert [item["kind"] for item in items] == ["config", "state", "config", "state", "disconnected"]
    assert [item.get("message") or item.get("version") for item in items[:4]] == ["1", 2, "2", 3]


async def test_the_timeline_is_filtered_by_kind_and_time(plant: Plant) -> None:
    await lived(plant)
    items = await timeline(plant)
    for kinds in (["state"], ["config"], ["connected", "disconnected"], ["credentials", "state", "config"], ["nothing"]):
        query = "".join(f"&kind={kind}" for kind in kinds)
        assert await timeline(plant, query=query) == [item for item in items if item["kind"] in kinds]
    for item in items:
        assert await timeline(plant, query=f"&from={item['at']}") == [one for one in items if one["at"] >= item["at"]]
        assert await timeline(plant, query=f"&to={item['at']}") == [one for one in items if one["at"] < item["at"]]
    low, high = items[2]["at"], items[-1]["at"]
    expected = [item for item in items if item["kind"] == "config" and low <= item["at"] < high]
    assert await timeline(plant, query=f"&kind=config&from={low}&to={high}") == expected


async def test_the_timeline_comes_in_pages_that_keep_their_filter(plant: Plant) -> None:
    await lived(plant)
    expected = await timeline(plant, query="&kind=config")
    found: list[Any] = []
    after = ""
    while True:
        page = await plant.get(f"/iiot/press-1/events?kind=config&limit=1{after}")
        found += page["items"]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert found == expected[::-1]


async def test_the_timeline_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        await lived(plant)
        before, token = await timeline(plant), plant.tokens["press-1"]
        await plant.device("press-1")
    async with plants.plant(tmp_path) as plant:
        plant.tokens["press-1"] = token
        await plant.device("press-1")
        after = await timeline(plant)
    assert after[: len(before)] == before
    assert [item["kind"] for item in after[len(before) :]] == ["connected", "disconnected", "connected"]
    assert [item["session"] for item in after[-3:]] == [3, 3, 4]


async def test_a_page_of_the_timeline_is_of_bounded_size(plant: Plant) -> None:
    device = await plant.device("press-1")
    version = await push(plant, "press-1", {})
    await device.expect("config")
    device.seq += 1
    errors = [{"path": "", "code": "", "message": "x" * 1000}] * 900  # a frame just under its bound
    await device.send("config_status", seq=device.seq, version=version, status="rejected", errors=errors)
    await device.acknowledged(device.seq)
    most = iiot.Limits().document_bytes + 4096  # a page holds up to a thousand entries, each of them in memory
    for item in await timeline(plant):
        assert len(json.dumps(item)) < most
