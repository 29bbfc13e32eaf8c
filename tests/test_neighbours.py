"""Nobody pays for another: bounds and orders, tried from outside the process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from pathlib import Path
from typing import Any, cast

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import PATIENCE, Device, Plant, Process, locked
from test_feed import feed as follow

import iiot

# ---- tasks that the server cannot do without


@pytest.mark.parametrize("part", ["Heartbeat._sweep", "Awaited.take_late", "Removed.__bool__"])
async def test_a_part_that_fails_is_told_and_ends_the_server(tmp_path: Path, part: str) -> None:
    """A defect is put into the program, as nobody knows one to cause from outside."""
    owner, method = part.split(".")
    (tmp_path / "broken.py").write_text(
        f"import sys\nsys.path.insert(0, {str(plants.ROOT)!r})\nimport iiot\n"
        f"def fail(*_): raise ZeroDivisionError('a defect')\niiot.{owner}.{method} = fail\niiot.main()\n"
    )
    code, _, err = await plants.command("--port", "0", folder=tmp_path, program=str(tmp_path / "broken.py"))
    assert code == 1
    assert "failed, and the server ends" in err
    assert "ZeroDivisionError: a defect" in err
    assert err.rstrip().endswith("the server could not go on; its log says why")


async def test_a_writer_that_fails_turns_health_red_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    running = plants.plant(tmp_path)
    plant = await running.__aenter__()
    assert (await plant.ask("GET", "/healthz"))[0] == 200
    monkeypatch.setattr(iiot.Writer, "_tell", fail)
    assert (await plant.ask("PUT", "/iiot/press-2"))[0] == 503
    assert (await plant.ask("GET", "/healthz"))[0] == 500
    assert (await plant.ask("PUT", "/iiot/press-3"))[0] == 503
    with pytest.raises(iiot.StoreError, match="could not go on"):
        await running.__aexit__(None, None, None)
    assert "the writer failed, and the server ends" in caplog.text


# ---- a database that another program holds


async def test_a_database_held_by_another_program_for_a_while_ends_no_session(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), storage_seconds=3.0)) as plant:
        device = await plant.device("press-1")
        with locked(plant.database):
            await device.telemetry({"values": {"level": 1}})
            await asyncio.sleep(1.5)  # longer than one try, shorter than all
        await device.acknowledged(1)
        assert [item["kind"] for item in (await plant.get("/iiot/press-1/events"))["items"]] == ["connected", "credentials"]


# ---- what waits in the writer


async def test_what_waits_in_the_writer_is_bounded_for_all_sessions_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    write = iiot.Batch.write

    def noted(batch: iiot.Batch, *arguments: Any) -> iiot.Outcome:
        batches.append(batch.points_taken)
        return write(batch, *arguments)

    monkeypatch.setattr(iiot.Batch, "write", noted)
    limits = attrs.evolve(iiot.Limits(), pending_points=1_000)
    async with plants.plant(tmp_path, limits) as plant:
        devices = [await plant.device(f"press-{n}") for n in range(40)]
        with locked(plant.database):
            for device in devices:
                await device.telemetry(*({"ts": iiot.EARLIEST + n, "values": {"level": n}} for n in range(400)))
                await device.telemetry(*({"ts": iiot.EARLIEST + n, "values": {"flow": n}} for n in range(400)))
            await plant.get("/iiot")
        for device in devices:
            await device.acknowledged(2)
    assert sum(batches) == 40 * 800
    assert max(batches) < 1_000 + 400, "a batch ends with the frame that fills it"


# ---- questions whose client has gone


def abandon(plant: Plant, path: str) -> None:
    """Ask, and go away without the answer."""
    host, port = plant.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as link:
        link.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {plant.token}\r\n\r\n".encode())
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_a_question_whose_client_has_gone_ends(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), points_most=10**9, values_together=10**9, readers=1)
    async with plants.plant(tmp_path, limits, query_seconds=600.0) as plant:
        device = await plant.device("press-1")
        await device.store({"ts": iiot.EARLIEST, "values": {"level": 1}}, {"ts": iiot.now_ms(), "values": {"level": 2}})
        abandon(plant, "/iiot/press-1/telemetry?every=1ms&limit=1000000000")  # for longer than a test may take
        async with asyncio.timeout(PATIENCE):
            assert len(await plant.points("press-1", "level")) == 2, "its reader is free again"


async def test_slow_questions_of_one_tenant_leave_a_reader_to_another(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), points_most=10**9, values_together=10**9)
    async with plants.plant(tmp_path, limits, query_seconds=600.0) as plant:
        platform = plants.admin_token(plant.database, "platform")
        other = (await plant.ask("POST", "/tenants", {"name": "other"}, token=platform))[1]["token"]
        device = await plant.device("press-1")
        await device.store({"ts": iiot.EARLIEST, "values": {"level": 1}}, {"ts": iiot.now_ms(), "values": {"level": 2}})
        slow = [
            asyncio.create_task(plant.ask("GET", "/iiot/press-1/telemetry?every=1ms&limit=1000000000")) for _ in range(2 * limits.readers)
        ]
        await plant.ask("GET", "/whoami")
        for _ in range(5):
            assert (await plant.ask("GET", "/iiot", token=other))[0] == 200
        assert not any(question.done() for question in slow)
        for question in slow:
            question.cancel()


async def test_readers_take_turns_between_tenants() -> None:
    turns = iiot.Turns(["x", "y", "z"])  # type: ignore[list-item]
    held = [await turns.take("a") for _ in range(2)]
    order: list[str] = []

    async def ask(tenant: str) -> None:
        reader = await turns.take(tenant)
        order.append(tenant)
        await asyncio.sleep(0)
        turns.give(tenant, reader)

    waiting = [asyncio.create_task(ask(tenant)) for tenant in ("a", "a", "a", "a", "b", "b", "c")]
    await asyncio.sleep(0)
    assert order == ["b"], "a has all but one already, and b is the first that may"
    gone = asyncio.create_task(ask("d"))
    await asyncio.sleep(0)
    gone.cancel()
    for reader in held:
        turns.give("a", reader)
    await asyncio.gather(*waiting)
    assert sorted(order) == ["a", "a", "a", "a", "b", "b", "c"]
    assert order.index("c") < 4, "who asks once does not wait for all of who asks often"
    async with turns.paused(5.0):
        late = asyncio.create_task(ask("a"))
        await asyncio.sleep(0)
        assert len(order) == 7
    await late
    assert len(order) == 8


async def test_before_a_pause_a_long_question_makes_its_own_tenant_wait_alone() -> None:
    turns = iiot.Turns([cast(iiot.Connection, object()) for _ in range(4)])
    long = await turns.take("a")
    paused = turns.paused(PATIENCE)
    pausing = asyncio.create_task(paused.__aenter__())
    again = asyncio.create_task(turns.take("a"))
    for _ in range(3):
        short = await turns.take("b")
        turns.give("b", short)
    assert not again.done()
    assert not pausing.done()
    turns.give("a", long)
    await pausing
    assert not again.done()
    await paused.__aexit__(None, None, None)
    turns.give("a", await again)


@pytest.mark.long
async def test_the_log_stays_short_under_readers_that_always_overlap(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), log_bytes=1024 * 1024, log_look_seconds=0.05, checkpoint_pages=50)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        ended, longest, log = asyncio.Event(), 0, Path(f"{plant.database}-wal")

        async def keep_asking() -> None:
            while not ended.is_set():
                assert (await plant.ask("GET", "/iiot/press-1/telemetry?every=10s&limit=10000"))[0] == 200

        asking = [asyncio.create_task(keep_asking()) for _ in range(6)]
        for start in range(0, 200_000, 1_000):
            await device.store(*({"ts": iiot.EARLIEST + 1_000 * (start + n), "values": {"level": n}} for n in range(1_000)))
            longest = max(longest, log.stat().st_size)
        ended.set()
        await asyncio.gather(*asking)
        async with asyncio.timeout(PATIENCE):
            while log.stat().st_size > limits.log_bytes:
                await asyncio.sleep(0.01)
        assert longest < 30 * limits.log_bytes


async def test_a_push_whose_client_has_gone_is_made(plant: Plant) -> None:
    device = await plant.device("press-1")
    host, port = plant.url.removeprefix("http://").split(":")
    with locked(plant.database):
        with socket.create_connection((host, int(port))) as link:
            body = json.dumps({"n": 1})
            link.sendall(
                f"POST /iiot/press-1 HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {plant.token}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            await plant.get("/iiot")
            await plant.get("/iiot")
        await plant.get("/iiot")
    assert (await device.expect("config"))["document"] == {"n": 1}
    (entry,) = (await plant.get("/audit?action=config.push"))["items"]
    assert entry["outcome"] == "ok"


# ---- feeds


async def test_what_happens_in_one_tenant_wakes_no_feed_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    feed = iiot.Reads.feed

    async def noted(reads: iiot.Reads, tenant: int, *arguments: int) -> list[tuple[int, str, str]]:
        asked.append(tenant)
        return await feed(reads, tenant, *arguments)

    monkeypatch.setattr(iiot.Reads, "feed", noted)
    async with plants.plant(tmp_path) as plant, contextlib.AsyncExitStack() as stack:
        platform = plants.admin_token(plant.database, "platform")
        other = (await plant.ask("POST", "/tenants", {"name": "other"}, token=platform))[1]["token"]
        quiet = [await stack.enter_async_context(follow(plant, token=other)) for _ in range(20)]
        loud = [await stack.enter_async_context(follow(plant)) for _ in range(20)]
        device = await plant.device("press-1")
        for number in range(1, 51):
            await device.send("state", seq=number, reported={"n": number})
        for feed_of_all in loud:
            assert [(await feed_of_all.event()).kind for _ in range(52)] == ["credentials", "connected", *["state"] * 50]
        assert len(asked) == 40, "each feed asks the database once, at its start"
        assert len(quiet) == 20


async def test_a_feed_that_falls_behind_misses_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), feed_events=5)) as plant:
        device = await plant.device("press-1")
        async with follow(plant) as following:
            for number in range(1, 301):
                await device.send("state", seq=number, reported={"n": number})
            await device.acknowledged(300)
            assert [(await following.event()).data["version"] for _ in range(300)] == list(range(1, 301))


async def test_a_tenant_has_a_bounded_number_of_feeds(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), feeds=3)) as plant, contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(follow(plant))
        status, body = await plant.ask("GET", "/events")
        assert (status, body["error"]["code"]) == (429, "too_many_feeds")
        await stack.aclose()
        async with asyncio.timeout(PATIENCE):
            while (await try_feed(plant)) != 200:
                await asyncio.sleep(0.01)


async def try_feed(plant: Plant) -> int:
    headers = {"Authorization": f"Bearer {plant.token}"}
    async with plant.client.get(plant.url + "/events", headers=headers) as response:
        return response.status


# ---- what cannot be deleted, or is written at every return


async def test_refusals_beyond_the_first_are_counted_and_entered_together(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), refusals=5)
    async with plants.plant(tmp_path, limits) as plant:
        await plant.register("press-1")
        made = (await plant.ask("POST", "/tokens", {"name": "loop", "role": "viewer"}))[1]
        for _ in range(40):
            assert (await plant.ask("DELETE", "/iiot/press-1", token=made["token"]))[0] == 403
        for _ in range(3):
            assert (await plant.ask("POST", "/iiot/press-1", {}, token=made["token"]))[0] == 403
        items = (await plant.get("/audit?actor=loop&limit=1000"))["items"]
        assert [item["outcome"] for item in items] == ["forbidden"] * 5
        assert (await plant.ask("PUT", "/iiot/press-2"))[0] == 201, "another token has its own allowance"
    entries = plants.rows(plant.database, "select action, outcome, detail from audit where name = 'loop' order by id")
    assert [(action, outcome, detail) for action, outcome, detail in entries[5:]] == [
        ("device.remove", "forbidden", '{"count":35}'), ("config.push", "forbidden", '{"count":3}'),
    ]  # fmt: skip


async def test_a_device_that_says_hello_in_a_loop_fills_no_timeline(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), sessions=10, conflict_seconds=0.0)
    async with plants.plant(tmp_path, limits) as plant:
        token, refused = await plant.register("press-1"), []
        for _ in range(40):
            device = await plant.connect()
            await device.send("hello", token=token)
            frame = await device.receive()
            if frame["type"] == "error":
                refused.append(frame)
                assert (await device.closed()).code == 4429
            await device.close()
        assert len(refused) >= 25
        assert {frame["code"] for frame in refused} == {"too_many_sessions"}
        assert all(1 <= frame["retry_after"] <= 10 for frame in refused)


# ---- nothing before the welcome


async def test_a_report_that_is_asked_for_while_a_device_says_hello_comes_after_its_welcome(plant: Plant) -> None:
    token = await plant.register("press-1")
    device = await plant.connect()
    with locked(plant.database):
        await device.send("hello", token=token)
        asking = [asyncio.create_task(plant.ask("POST", "/iiot/press-1/report", {"what": "state"})) for _ in range(5)]
        for _ in range(5):
            await plant.get("/iiot")
    assert (await device.receive())["type"] == "welcome"
    statuses = [status for status, _ in await asyncio.gather(*asking)]
    assert set(statuses) <= {202, 409}
    status, _ = await plant.ask("POST", "/iiot/press-1/report", {"what": "state"})
    assert status == 202
    assert [await device.expect("report") for _ in range(statuses.count(202) + 1)]


# ---- answers and how they are found


async def test_a_bucket_has_a_bounded_number_of_values(plant: Plant) -> None:
    await plant.register("press-1")
    many = ",".join(["sum"] * 9)
    status, body = await plant.ask("GET", f"/iiot/press-1/telemetry?every=1m&agg={many}")
    assert (status, body["error"]["details"]) == (400, [{"path": "agg", "message": "names more than 8"}])


async def test_a_device_is_not_kept_from_its_welcome_by_a_stop(process: Process) -> None:
    """Sockets that have not said hello are closed as the others are."""
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, "")
        waiting: Device = await plant.connect()
        stopping = asyncio.create_task(process.stop())
        assert (await waiting.closed()).code == 1001
        assert await stopping == 0
