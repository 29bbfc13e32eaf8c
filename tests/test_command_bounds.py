"""Commands of ten thousand devices: no transaction, no answer and no list grows with how many there are."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from plant import PATIENCE, Plant, rows

import iiot

LIMITS = attrs.evolve(iiot.Limits(), command_devices=2)
ACTOR = iiot.Actor(1, None, "test", "admin")
BATCH = iiot.WantedBatch('["true"]', 30_000, 3_600_000, parallel=False, match="*")
NAMES = [f"press-{number}" for number in range(5)]


def add_devices(database: Path, names: list[str]) -> None:
    def add(connection: sqlite3.Connection) -> None:
        for name in names:
            iiot.insert_device(connection, 1, name, iiot.mint("dev").stored, {})

    iiot.prepare_database(database)
    iiot.change_database(database, add)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A database with five devices that are away."""
    add_devices(tmp_path / "iiot.db", NAMES)
    with closing(iiot.connect(tmp_path / "iiot.db")) as connection:
        yield connection


def numbers(connection: sqlite3.Connection, sql: str) -> list[int]:
    return [number for (number,) in connection.execute(sql)]


def given(connection: sqlite3.Connection, wanted: iiot.WantedBatch) -> int:
    """A command for many that went to all."""
    number, _ = iiot.insert_batch(connection, ACTOR, wanted, 20)
    while numbers(connection, "select 1 from command_batch where next_at is not null"):
        iiot.go_on_with_commands(connection, [], [], LIMITS)
    assert len(numbers(connection, f"select 1 from command where batch_id = {number} and status = 'queued'")) == len(NAMES)
    return number


def come(connection: sqlite3.Connection) -> list[int]:
    """The devices, which are connected now."""
    connection.execute("update presence set connected = 1, connected_at = 1, session = 1")
    return numbers(connection, "select id from device")


def test_a_stopped_command_for_many_is_taken_back_in_parts_and_sent_to_nobody_meanwhile(connection: sqlite3.Connection) -> None:
    number, devices = given(connection, BATCH), come(connection)
    taken_back = iiot.cancel_batch(connection, 1, number, LIMITS.command_devices)
    for size in (2, 2, 1):
        assert len(taken_back) == size
        assert iiot.send_commands(connection, devices, iiot.now_ms(), LIMITS) == []
        step = iiot.go_on_with_commands(connection, devices, [], LIMITS)
        assert step.frames == []
        taken_back = step.ended
    assert taken_back == []
    assert rows_of(connection, "select distinct status from command") == [("cancelled",)]
    assert rows_of(connection, "select stopped, next_at from command_batch") == [("cancelled", None)]


def rows_of(connection: sqlite3.Connection, sql: str) -> list[Any]:
    return connection.execute(sql).fetchall()


@pytest.mark.parametrize("failed", [{"status": "done", "exit_code": 1}, {"status": "failed"}, {"status": "refused"}, {"status": "lost"}])
def test_too_many_failures_take_back_what_waits_in_their_transaction(connection: sqlite3.Connection, failed: dict[str, Any]) -> None:
    number, devices = given(connection, attrs.evolve(BATCH, failures_most=2)), come(connection)
    sent = iiot.send_commands(connection, devices[:3], iiot.now_ms(), LIMITS)
    assert [device for device, _ in sent] == devices[:3]
    first, second, third = numbers(connection, "select id from command where status = 'sent'")

    def report(command: int, **end: Any) -> iiot.CommandOutcome:
        (device,) = numbers(connection, f"select device_id from command where id = {command}")
        told = iiot.CommandReport(None, device, 1, iiot.now_ms(), command, **end)  # type: ignore[arg-type]
        return iiot.write_command_reports(connection, [told], LIMITS)

    assert report(first, **failed).over == devices[:1]
    assert report(second, status="done", exit_code=0).over == devices[1:2]
    outcome = report(third, **failed)
    assert outcome.over == devices[2:], "the devices of those that waited, too: it may be the turn of another"
    assert outcome.changed == numbers(connection, f"select id from command where batch_id = {number} and device_id > 2 order by id")
    assert iiot.go_on_with_commands(connection, outcome.over, [], LIMITS) == iiot.CommandStep([], [])
    assert rows_of(connection, "select stopped, next_at from command_batch") == [("failures", None)]
    ends = rows_of(connection, "select device, detail ->> 'status' from audit where action = 'command.end' order by id")
    assert ends == [*((name, failed["status"]) for name in NAMES[:1]), (NAMES[1], "done"), (NAMES[2], failed["status"]),
                    *((name, "cancelled") for name in NAMES[3:])]  # fmt: skip


def test_what_is_late_is_looked_at_in_parts_and_nothing_ends_that_was_not_looked_at(connection: sqlite3.Connection) -> None:
    given(connection, BATCH)
    now = iiot.now_ms()
    connection.execute("update command set status = 'sent', sent_at = ?, due_at = ?", (now, now - 1_000))
    for left in (3, 1, 0):
        assert iiot.go_on_with_commands(connection, [], [], LIMITS).ended == []
        assert len(numbers(connection, f"select 1 from command where due_at < {now}")) == left
    connection.execute("update command set sent_at = 1, due_at = ?", (now - 1_000,))
    ended = [iiot.go_on_with_commands(connection, [], [], LIMITS).ended for _ in range(4)]
    assert [len(part) for part in ended] == [2, 2, 1, 0]
    assert rows_of(connection, "select distinct status, due_at from command") == [("timed_out", None)]


async def test_a_page_of_a_command_for_many_has_a_bound_in_bytes(tmp_path: Path) -> None:
    count = 150
    add_devices(tmp_path / "iiot.db", [f"press-{number:03}" for number in range(count)])
    argv = json.dumps(["echo", "x" * 60_000])
    async with iiot.Store.open(tmp_path / "iiot.db", iiot.Limits()) as store:
        number, _ = await store.writer.change(lambda connection: iiot.insert_batch(connection, ACTOR, attrs.evolve(BATCH, argv=argv), 20))
        await store.writer.change(lambda connection: iiot.go_on_with_commands(connection, [], [], iiot.Limits()))
        pages, after = list[int](), 0
        while True:
            page = await store.read.commands.batch(1, number, 1_000, after, 100)
            assert page is not None
            pages.append(len(page["items"]))
            if page["next"] is None:
                break
            assert page["next"] == page["items"][-1]["id"]
            after = page["next"]
    assert sum(pages) == count
    assert max(pages) * 60_000 <= iiot.PAGE_CHARACTERS


async def test_a_command_for_many_that_went_to_none_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), command_days=0, command_clock_seconds=0.02, retention_seconds=0.05)
    async with plants.plant(tmp_path, limits) as plant:
        status, batch = await plant.ask("POST", "/commands", {"argv": ["true"], "match": "nobody"})
        assert status == 202
        async with asyncio.timeout(PATIENCE):
            while rows(plant.database, "select 1 from command_batch"):
                await asyncio.sleep(0.01)
        assert (await plant.ask("GET", f"/commands/{batch['id']}"))[0] == 404


async def test_what_comes_byte_by_byte_is_shown_whole(plant: Plant) -> None:
    device, text = await plant.device("press-1"), "".join(f"{number} é\n" for number in range(500))
    _, made = await plant.ask("POST", "/iiot/press-1/commands", {"argv": ["count"]})
    await device.expect("command")
    pieces = [text.encode()[start : start + 1] for start in range(len(text.encode()))]
    assert len(pieces) > 2 * iiot.OUTPUT_PIECES
    for piece in pieces:
        device.seq += 1
        coded = base64.b64encode(piece).decode()
        await device.send("output", seq=device.seq, command=made["id"], stream="stdout", data=coded, encoding="base64")
    await device.acknowledged(device.seq)
    path = f"/iiot/press-1/commands/{made['id']}"
    followed = asyncio.create_task(plant.ask("GET", f"{path}/output?follow=1"))
    assert (await plant.get(path))["output"] == text
    device.seq += 1
    await device.send("result", seq=device.seq, command=made["id"], status="done", exit_code=0)
    assert await followed == (200, text)
    assert (await plant.ask("GET", f"{path}/output")) == (200, text)
    _, lines = await plant.ask("GET", f"{path}/output?format=ndjson")
    assert lines.count("\n") == len(pieces)


async def test_a_ring_that_nobody_waits_for_is_forgotten() -> None:
    bells = iiot.TenantBells()
    first, same = bells.next(1), bells.next(1)
    assert first is same
    bells.next(2)
    bells.ring(2)
    bells.ring(1)
    assert first.done()
    assert not bells
    waiting = bells.next(3)
    assert bells
    del waiting
    assert not bells
