"""A tenant's share of the time of all: turns on the event loop, and a part of each transaction."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sqlite3
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st
from plant import PATIENCE, Plant, Process, locked

import iiot

LIMITS = attrs.evolve(iiot.Limits(), pending_points=1_000, transaction_seconds=0.0002, share_least=10, turns_alone=4)


class Rounds:
    """Counts the rounds of the event loop."""

    def __init__(self) -> None:
        self.number = 0
        self._counting = True

    def _count(self) -> None:
        self.number += 1
        if self._counting:
            asyncio.get_running_loop().call_soon(self._count)

    @classmethod
    @asynccontextmanager
    async def counted(cls) -> AsyncIterator[Rounds]:
        rounds = cls()
        rounds._count()
        try:
            yield rounds
        finally:
            rounds._counting = False


def shared(tenants: int) -> tuple[iiot.Shares, list[iiot.Share]]:
    """Tenants that have just used the server."""
    shares = iiot.Shares(LIMITS)
    parts = [shares.of(number) for number in range(tenants)]
    for part in parts:
        part.add(1)
    shares.next_transaction()
    return shares, parts


async def turns(rounds: Rounds, share: iiot.Share, count: int, *, storing: bool = True) -> list[int]:
    """The rounds in which as many as want to go on at once may do so."""

    async def one() -> int:
        await share.turn(iiot.for_seconds(PATIENCE), storing=storing)
        return rounds.number

    return await asyncio.gather(*(one() for _ in range(count)))


@pytest.mark.parametrize("storing", [True, False])
async def test_one_of_a_tenant_goes_on_in_a_round_while_others_use_the_server(storing: bool) -> None:  # noqa: FBT001
    _, (busy, quiet) = shared(2)
    async with Rounds.counted() as rounds:
        came, other = await asyncio.gather(turns(rounds, busy, 20, storing=storing), turns(rounds, quiet, 1, storing=storing))
    assert len(set(came)) == 20
    assert came == sorted(came), "who came first goes on first"
    assert other == [came[0]], "the other tenant does not wait"


async def test_several_of_a_tenant_that_is_alone_go_on_in_a_round() -> None:
    _, (share,) = shared(1)
    async with Rounds.counted() as rounds:
        came = await turns(rounds, share, 20)
    assert len(set(came)) == 20 / LIMITS.turns_alone


async def test_what_is_to_be_stored_and_what_is_not_take_turns() -> None:
    _, (share, _) = shared(2)
    async with Rounds.counted() as rounds:
        stored, asked = await asyncio.gather(turns(rounds, share, 10), turns(rounds, share, 10, storing=False))
    assert not set(stored) & set(asked)
    assert abs(max(stored) - max(asked)) == 1


async def test_a_full_transaction_keeps_those_waiting_that_store_and_nobody_else() -> None:
    shares, (share, _) = shared(2)
    share.add(LIMITS.pending_points)
    assert share.full
    storing = asyncio.create_task(share.turn(iiot.for_seconds(PATIENCE)))
    async with Rounds.counted() as rounds:
        await turns(rounds, share, 3, storing=False)
    assert not storing.done()
    shares.next_transaction()
    await storing
    share.add(LIMITS.pending_points)
    with pytest.raises(TimeoutError):
        await share.turn(iiot.for_seconds(0.01))


async def test_whoever_gives_up_is_passed_over() -> None:
    shares, (share, _) = shared(2)
    share.add(LIMITS.pending_points)
    waiting = [asyncio.create_task(share.turn(iiot.for_seconds(PATIENCE))) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    shares.next_transaction()
    await asyncio.gather(*waiting[1:])


def fill(share: iiot.Share) -> int:
    """Take all that there is; how much that was."""
    before = share.weight
    while not share.full:
        share.add(1)
    return share.weight - before


@pytest.mark.parametrize("tenants", [1, 2, 5])
async def test_tenants_share_a_transaction_evenly_and_one_alone_has_it_all(tenants: int) -> None:
    shares, parts = shared(tenants)
    for _ in range(2):  # that they want more than there is shows at the first
        shares.next_transaction()
        taken = [fill(part) for part in parts]
    assert taken == [LIMITS.pending_points if tenants == 1 else 100 // tenants] * tenants


@pytest.mark.parametrize("others", [1, 20])
async def test_what_a_tenant_leaves_is_for_those_that_want_more(others: int) -> None:
    shares, (busy, *quiet) = shared(1 + others)
    for _ in range(3):
        shares.next_transaction()
        for share in quiet:
            share.add(1)
        assert not any(share.full for share in quiet)
        taken = fill(busy)
    assert taken == 100 - others


async def test_a_slow_disk_leaves_everybody_something() -> None:
    shares, (share, _) = shared(2)
    for _ in range(100):
        shares.measured(1_000, 10.0)
    shares.next_transaction()
    assert fill(share) == LIMITS.share_least


async def test_no_more_of_what_is_heavy_is_taken_than_a_transaction_may_have() -> None:
    """A document counts as thousands of points: a second one made the transaction twice as long as it may be."""
    shares = iiot.Shares(LIMITS)
    share = shares.of(1)
    share.add(LIMITS.pending_points * 2)
    assert share.full
    shares.next_transaction()
    assert not share.full, "one is always taken"
    share.add(600)
    assert share.full, "two are more than a thousand"
    shares.next_transaction()
    share.add(500)
    assert not share.full


# ---- at a running server


@asynccontextmanager
async def two_tenants(folder: Path, limits: iiot.Limits) -> AsyncIterator[tuple[Plant, Plant]]:
    """One of them holds the session and the client of the other."""
    async with plants.plant(folder, limits) as plant:
        status, _ = await plant.ask("POST", "/tenants", {"name": "acme"}, token=plants.admin_token(plant.database, "platform"))
        assert status == 201
        yield plant, Plant(plant.url, plant.client, plants.admin_token(plant.database, tenant_name="acme"), plant.database)


async def test_requests_that_wait_are_bounded_in_number_and_in_time(tmp_path: Path) -> None:
    nobody = attrs.evolve(iiot.Limits(), requests_waiting=2, turns_alone=0, request_seconds=1.0)
    async with plants.plant(tmp_path, nobody) as plant:
        answered: list[int] = []

        async def ask(number: int) -> None:
            status, body = await plant.ask("GET", "/whoami")
            assert (status, body["error"]["code"]) == (429, "too_many_requests")
            answered.append(number)

        await asyncio.gather(*(ask(number) for number in range(20)))
        assert len(answered) == 20, "those that may wait are answered, too, and last"
        assert (await plant.ask("GET", "/healthz"))[0] == 200


async def test_pushes_that_wait_for_a_verdict_are_bounded(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), waiting_pushes=2)) as plant:
        for name in ("press-1", "press-2"):
            await plant.register(name)
        waiting = [asyncio.create_task(plant.ask("POST", f"/iiot/{name}?wait=60", {"n": 1})) for name in plant.tokens]
        await plant.until("/iiot", lambda body: all(item["config"] for item in body["items"]))
        status, body = await plant.ask("POST", "/iiot/press-1?wait=60", {"n": 3})
        assert (status, body["error"]["code"]) == (429, "too_many_requests")
        assert (await plant.get("/iiot/press-1/config"))["version"] == 1, "what is refused is not pushed"
        assert (await plant.ask("POST", "/iiot/press-1", {"n": 3}))[0] == 202
        assert (await waiting[0])[1]["status"] == "superseded"
        waiting[1].cancel()
        await asyncio.gather(waiting[1], return_exceptions=True)
        async with asyncio.timeout(PATIENCE):
            accepted = False
            while not accepted:  # both at once, when the one that has gone does not count any more
                both = await asyncio.gather(*(plant.ask("POST", f"/iiot/{name}?wait=300ms", {"n": 5}) for name in plant.tokens))
                accepted = [status for status, _ in both] == [202, 202]


def long_frame(seq: int, samples: int, *, timed: bool) -> dict[str, Any]:
    times = [{"ts": iiot.EARLIEST + n} for n in range(samples)] if timed else [{}] * samples
    return {"seq": seq, "samples": [{**times[n], "values": {"level": n}} for n in range(samples)]}


@pytest.mark.parametrize("timed", [True, False])
async def test_a_long_frame_is_stored_in_order_with_those_around_it(tmp_path: Path, timed: bool) -> None:  # noqa: FBT001
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), piece_bytes=300)) as plant:
        device = await plant.device("press-1")
        for seq in (1, 2, 3):
            await device.send("telemetry", **long_frame(seq, 100 if seq == 2 else 1, timed=timed))
        await device.acknowledged(3)
        assert [value for _, value in await plant.points("press-1", "level")] == (list(range(100)) if timed else [0, *range(100), 0])


async def test_nothing_of_a_long_frame_that_is_refused_is_stored(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), piece_bytes=300)) as plant:
        device = await plant.device("press-1")
        frame = long_frame(1, 100, timed=True)
        frame["samples"][95]["values"]["level"] = None
        await device.send("telemetry", **frame)
        error = await device.expect("error")
        assert (error["seq"], error["errors"][0]["path"]) == (1, "samples[95].values.level")
        await device.acknowledged(await device.telemetry({"ts": iiot.EARLIEST, "values": {"flow": 1}}, seq=2))
        assert (await plant.get("/iiot/press-1/telemetry"))["series"][0]["metric"] == "flow"


async def test_no_transaction_has_more_of_a_long_frame_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    write = iiot.Batch.write

    def noted(batch: iiot.Batch, *arguments: Any) -> iiot.Outcome:
        batches.append(sum(map(len, batch.points.values())))
        return write(batch, *arguments)

    monkeypatch.setattr(iiot.Batch, "write", noted)
    limits = attrs.evolve(iiot.Limits(), piece_bytes=2_000, transaction_seconds=1e-9, share_least=100)
    async with two_tenants(tmp_path, limits) as (busy, quiet):
        device, other = await busy.device("press-1"), await quiet.device("press-1")
        await device.send("telemetry", **long_frame(1, 5_000, timed=True))
        acknowledged = asyncio.create_task(device.acknowledged(1))
        while not acknowledged.done():
            await other.store({"values": {"level": 1}})
        await acknowledged
        assert sum(batches) == 5_000 + other.seq
        assert max(batches) <= limits.share_least + 50 + 1


async def test_a_long_frame_that_a_kill_cut_is_sent_again_and_stored_once(process: Process) -> None:
    """Part of it may be on the disk by then."""
    iiot.prepare_database(process.database)
    token = plants.admin_token(process.database)
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        with locked(process.database):
            await device.send("telemetry", **long_frame(1, 20_000, timed=True))
            await plant.get("/iiot")
        with closing(sqlite3.connect(process.database)) as connection:
            while not connection.execute("select 1 from telemetry limit 1").fetchone():
                await asyncio.sleep(0)
        await process.stop(signal.SIGKILL)
        await process.start()
        tokens, plant = plant.tokens, process.plant(client, token)
        plant.tokens = tokens
        device = await plant.device("press-1")
        if device.welcome["seq"] == 0:
            await device.send("telemetry", **long_frame(1, 20_000, timed=True))
            await device.acknowledged(1)
        counted = await plant.get("/iiot/press-1/telemetry?every=1h&agg=count,sum")
        assert [series["points"][0][1:] for series in counted["series"]] == [[20_000, sum(range(20_000))]]


# ---- what devices have sent and the server has not taken


class Sender:
    def __init__(self) -> None:
        self.held = False

    def hold(self) -> None:
        assert not self.held
        self.held = True

    def go_on(self) -> None:
        assert self.held
        self.held = False


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=60))
def test_of_what_is_not_taken_the_first_goes_on_and_nobody_is_left_behind(steps: list[tuple[int, int]]) -> None:
    """A step: a sender, and how much more of it has come; nothing more means that what it sent is taken."""
    backlog, senders, sizes = iiot.Backlog(100), [Sender() for _ in range(6)], dict[Sender, int]()
    for number, more in steps:
        sender = senders[number]
        if not more:
            backlog.taken(sender)
            sizes.pop(sender, None)
        elif not sender.held:  # nothing comes of one that is held
            sizes[sender] = sizes.get(sender, 0) + more
            backlog.received(sender, sizes[sender])
            assert sender.held == (sum(sizes.values()) > 100 and sender is not next(iter(sizes)))
        held = [sender for sender in senders if sender.held]
        assert set(held) <= sizes.keys()
        assert not sizes or not next(iter(sizes)).held
    while sizes:
        first = next(iter(sizes))
        assert not first.held
        backlog.taken(first)
        del sizes[first]
    assert not any(sender.held for sender in senders)


def megabyte() -> str:
    """A frame of nearly as many bytes as one may have."""
    frame = json.dumps({"type": "telemetry", **long_frame(1, 12_000, timed=True)}).replace('"level"', f'"{"x" * 40}"')
    assert iiot.Limits().frame_bytes * 0.8 < len(frame) < iiot.Limits().frame_bytes
    return frame


async def test_of_long_frames_that_come_at_one_time_few_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage thousands of devices may send a megabyte each."""
    most, received, chunk = [0], iiot.Backlog.received, 256 * 1024  # that asyncio reads at one time

    def noted(backlog: iiot.Backlog, sender: iiot.Sender, size: int) -> None:
        received(backlog, sender, size)
        most[0] = max(most[0], sum(backlog._sizes.values()))

    monkeypatch.setattr(iiot.Backlog, "received", noted)
    limits = attrs.evolve(iiot.Limits(), backlog_bytes=500_000)
    frame = megabyte()
    async with plants.plant(tmp_path, limits) as plant:
        devices = [await plant.device(f"press-{number}") for number in range(16)]
        await asyncio.gather(*(device.link.send_str(frame) for device in devices))
        for device in devices:
            await device.acknowledged(1)
        assert most[0] < limits.backlog_bytes + len(frame) + len(devices) * chunk / 2


async def test_who_waits_for_a_frame_that_does_not_end_goes_on_in_time_and_is_not_taken_for_dead(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), backlog_bytes=1, piece_bytes=2_000, stall_seconds=2.5)
    async with plants.plant(tmp_path, limits, heartbeat=1.0) as plant:
        slow, other = await plant.device("press-1"), await plant.device("press-2")
        connection = slow.link.get_extra_info("socket").dup()
        connection.sendall(struct.pack("!BBQI", 0x81, 0xFF, 100_000, 0) + b" " * 3_000)
        shares = [thing for thing in gc.get_objects() if isinstance(thing, iiot.Share)]
        async with asyncio.timeout(PATIENCE):
            while not any(share.backlog._sizes for share in shares):
                await asyncio.sleep(0)
        sending = asyncio.create_task(other.link.send_str(megabyte()))
        async with asyncio.timeout(PATIENCE):
            while not any(share.backlog._held for share in shares):
                await asyncio.sleep(0)
        acknowledged = asyncio.create_task(other.acknowledged(1))
        while not acknowledged.done():
            connection.send(b" ")
            await asyncio.wait((acknowledged,), timeout=0.2)
        await asyncio.gather(acknowledged, sending)
        connection.close()


async def test_what_devices_hold_back_for_their_tenants_quota_comes_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new day begins for all of them at one time."""
    taken, take = list[int](), iiot.Intake._take
    async with Rounds.counted() as rounds, plants.plant(tmp_path) as plant:
        platform = plants.admin_token(plant.database, "platform")

        async def allow(points: int | None) -> None:
            assert (await plant.ask("PATCH", "/tenants/default", {"quotas": {"points_per_day": points}}, token=platform))[0] == 200

        devices = [await plant.device(f"press-{number}") for number in range(10)]
        await allow(0)
        for device in devices:
            for number in range(20):
                await device.telemetry({"ts": iiot.EARLIEST + number, "values": {"level": number}})
        for device in devices:
            await device.expect("throttled")
        sessions = [thing for thing in gc.get_objects() if isinstance(thing, iiot.Intake)]
        async with asyncio.timeout(PATIENCE):
            while sum(intake._throttle is not None and len(intake._throttle._frames) for intake in sessions) < 200:
                await asyncio.sleep(0)

        def noted(intake: iiot.Intake, data: bytes) -> None:
            taken.append(rounds.number)
            take(intake, data)

        monkeypatch.setattr(iiot.Intake, "_take", noted)
        for intake in sessions:
            assert intake._throttle is not None
            intake._throttle._take = intake._take
        await allow(None)
        for device in devices:
            await device.acknowledged(20)
            assert len(await plant.points(f"press-{devices.index(device)}", "level")) == 20
    assert len(taken) == 200
    assert max(Counter(taken).values()) <= iiot.Limits().turns_alone
