"""The reference device, as a process of its own against a real server; then its parts one by one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
from aiohttp import ClientSession
from devices import SENSORS, Running, frames_of, free_port, names, provisioning_key, record, replay, replay_by_key, started, stored
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plant import Plant, Process, agent_command

import agent
import iiot

T = TypeVar("T")


# The first start, and the token


async def test_the_agent_provisions_itself_and_keeps_its_token_in_a_file_of_mode_0600(plant: Plant, tmp_path: Path) -> None:
    record(tmp_path / "run.csv", 3)
    before = os.umask(0)  # nothing but the agent itself protects the file
    try:
        err = await replay_by_key(plant, tmp_path, "--name", "press-1")
    finally:
        os.umask(before)
    file = tmp_path / "press-1.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert re.fullmatch(r"iiot_dev_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n", file.read_text())
    assert file.read_text().strip() not in err
    assert names(tmp_path, "*.token*") == ["press-1.token"]
    assert [item["device"] for item in (await plant.get("/iiot"))["items"]] == ["press-1"]
    assert (await plant.get("/iiot/press-1"))["agent"] == f"iiot-agent/{agent.VERSION}"


async def test_the_agent_comes_back_with_the_token_file_alone(plant: Plant, tmp_path: Path) -> None:
    expected = record(tmp_path / "run.csv", 120)
    await replay_by_key(plant, tmp_path, "--name", "press-1", "--token-file", "kept")
    kept = (tmp_path / "kept").read_text()
    plant.tokens["press-1"] = kept.strip()
    code, _, err = await agent_command("--url", plant.url, "--token-file", "kept", "--replay", "run.csv", folder=tmp_path)
    assert code == 0, err
    assert "connected as press-1, session 2" in err
    assert (tmp_path / "kept").read_text() == kept
    kinds = [event["kind"] for event in (await plant.get("/iiot/press-1/events"))["items"]]
    assert kinds.count("credentials") == 1
    assert await stored(plant, "press-1") == expected
    assert await frames_of(plant, "press-1") == 6, "numbering goes on where the server stands"


async def test_a_token_given_as_an_argument_or_a_variable_is_not_written_down(plant: Plant, tmp_path: Path) -> None:
    record(tmp_path / "run.csv", 3)
    before = names(tmp_path)
    assert (await replay(plant, tmp_path, "press-1"))[0] == 0
    variables = {"IIOT_URL": plant.url, "IIOT_TOKEN": plant.tokens["press-1"], "IIOT_REPLAY": "run.csv"}
    async with started(tmp_path, **variables) as running:
        assert (await running.end())[0] == 0
    assert names(tmp_path) == before


async def test_the_agent_is_named_after_its_machine(plant: Plant, tmp_path: Path) -> None:
    record(tmp_path / "run.csv", 1)
    await replay_by_key(plant, tmp_path)
    host = re.sub(r"[^A-Za-z0-9._:-]", "-", socket.gethostname())[:64]
    assert [item["device"] for item in (await plant.get("/iiot"))["items"]] == [host]
    assert names(tmp_path, "*.token") == [f"{host}.token"]


async def test_a_token_file_that_cannot_be_written_costs_no_device_its_name(plant: Plant, tmp_path: Path) -> None:
    record(tmp_path / "run.csv", 1)
    key = await provisioning_key(plant)
    arguments = ("--key", key, "--name", "press-1", "--token-file", "no-such-folder/token", "--replay", "run.csv")
    code, _, err = await agent_command("--url", plant.url, *arguments, folder=tmp_path)
    assert code != 0
    assert "no-such-folder" in err
    assert "Traceback" not in err
    assert (await plant.get("/iiot"))["items"] == []


# This machine's readings


async def test_the_agent_sends_this_machines_readings(plant: Plant, tmp_path: Path) -> None:
    before = iiot.now_ms()
    async with started(tmp_path, "--url", plant.url, "--token", await plant.register("press-1"), "--interval", "0.05"):
        shown = await plant.until("/iiot/press-1", lambda body: body["connected"] and "cpu_percent" in body["latest"])
    latest = {metric: point["value"] for metric, point in shown["latest"].items()}
    assert latest.keys() >= {"load_1m", "disk_used_percent", "memory_used_percent", "memory_available_bytes", "cpu_percent"}
    assert all(0 <= latest[metric] <= 100 for metric in latest if metric.endswith("_percent"))
    assert 0 < latest["memory_available_bytes"] < 2**50
    assert all(iiot.format_time(before) <= point["time"] <= iiot.format_time(iiot.now_ms()) for point in shown["latest"].values())


async def test_a_report_triggers_a_reading_at_once(plant: Plant, tmp_path: Path) -> None:
    async with started(tmp_path, "--url", plant.url, "--token", await plant.register("press-1"), "--interval", "3600"):
        await plant.until("/iiot/press-1", lambda body: "load_1m" in body["latest"])
        for readings in (2, 3):
            status, body = await plant.ask("POST", "/iiot/press-1/report", {"what": "telemetry"})
            assert status == 202, body
            path = "/iiot/press-1/telemetry?metric=load_1m"
            await plant.until(path, lambda body, readings=readings: len(body["series"][0]["points"]) == readings)


# A broken link


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_recording_goes_on_when_the_server_is_back_and_nothing_is_lost_or_doubled(tmp_path: Path, number: signal.Signals) -> None:
    process = Process(tmp_path, "--port", str(free_port()))
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        expected = record(tmp_path / "run.csv", 240, step=timedelta(milliseconds=5))
        token = await plant.register("press-1")
        try:
            async with started(tmp_path, "--url", plant.url, "--token", token, "--replay", "run.csv", "--speed", "1") as running:
                await plant.until(f"/iiot/press-1/telemetry?metric={SENSORS[0]}", enough_points(60))
                await process.stop(number)
                await running.line("no session")
                await process.start()
                code, err = await running.end()
            assert code == 0, err
            assert await stored(plant, "press-1") == expected
            assert await frames_of(plant, "press-1") == 240, "no row went out under two numbers"
        finally:
            await process.stop()


def enough_points(least: int) -> Any:
    return lambda body: bool(body["series"]) and len(body["series"][0]["points"]) >= least


async def test_what_was_stored_but_not_acknowledged_counts_as_replayed(plant: Plant, tmp_path: Path) -> None:
    expected = record(tmp_path / "run.csv", 40)
    token = await plant.register("press-1")
    arguments = ("--token", token, "--replay", "run.csv", "--speed", "1000")
    async with deaf_link(plant) as url, started(tmp_path, "--url", url, *arguments) as running:
        code, err = await running.end()
    assert code == 0, err
    assert "session 2" in err
    assert "replayed 40 of 40 rows" in err
    assert await stored(plant, "press-1") == expected
    assert await frames_of(plant, "press-1") == 40


@asynccontextmanager
async def deaf_link(plant: Plant) -> AsyncIterator[str]:
    """A way to the server that loses, on its first connection, all that follows the welcome, and breaks when all is stored."""
    connections = 0
    upstream = plant.url.removeprefix("http://").split(":")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, until: bytes) -> None:
        seen = b""
        while data := await source.read(65536):
            if not until or until not in seen:
                sink.write(data)
                seen = seen[-100:] + data
        if not until:
            sink.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        first = connections == 1
        far_reader, far_writer = await asyncio.open_connection(upstream[0], int(upstream[1]))
        try:
            async with asyncio.TaskGroup() as group:
                down = group.create_task(carry(far_reader, writer, b'"type":"welcome"' if first else b""))
                up = group.create_task(carry(reader, far_writer, b""))
                if first:
                    await plant.until(f"/iiot/press-1/telemetry?metric={SENSORS[0]}", enough_points(40))
                    down.cancel()
                    up.cancel()
        finally:
            far_writer.transport.abort()
            writer.transport.abort()

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_an_outage_costs_no_more_memory_than_the_spool(tmp_path: Path) -> None:
    process = Process(tmp_path, "--port", str(free_port()))
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        token = await plant.register("press-1")
        try:
            async with started(tmp_path, "--url", plant.url, "--token", token, "--interval", "0.01", "--spool", "7") as running:
                path = "/iiot/press-1/telemetry?metric=load_1m&limit=10000"
                await plant.until(path, enough_points(3))
                await process.stop()
                stopped = iiot.now_ms()
                while iiot.now_ms() < stopped + 300:
                    await running.line("no session")
                await process.start()
                back = (await plant.until("/iiot/press-1", lambda body: body["connected"]))["connected_at"]
                await plant.until(f"{path}&from={back}", enough_points(20))
                kept = await plant.points("press-1", "load_1m", f"&from={iiot.format_time(stopped)}&to={back}")
                assert 1 <= len(kept) <= 7, "of the thirty and more of the outage, the newest"
        finally:
            await process.stop()


# A server that says no


async def expect_refusal(running: Running, *words: str) -> None:
    code, err = await running.end()
    assert code not in (0, None)
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("agent.py: ")
    for word in words:
        assert word in last


async def test_a_wrong_key_ends_the_agent(plant: Plant, tmp_path: Path) -> None:
    key = iiot.mint("prov").text
    async with started(tmp_path, "--url", plant.url, "--key", key, "--name", "press-1") as running:
        await expect_refusal(running, "4401", "A valid token is needed.")
    assert names(tmp_path, "*.token*") == []


async def test_a_taken_name_ends_the_agent(plant: Plant, tmp_path: Path) -> None:
    await plant.register("press-1")
    async with started(tmp_path, "--url", plant.url, "--key", await provisioning_key(plant), "--name", "press-1") as running:
        await expect_refusal(running, "A device of this name is registered already.")
    assert names(tmp_path, "*.token*") == []


@pytest.mark.parametrize("name", ["press 1", "x" * 65])
async def test_a_name_that_cannot_be_ends_the_agent(plant: Plant, tmp_path: Path, name: str) -> None:
    async with started(tmp_path, "--url", plant.url, "--key", await provisioning_key(plant), "--name", name) as running:
        await expect_refusal(running)
    assert (await plant.get("/iiot"))["items"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"iiot_dev_0", "4401"), (b"\n", "--key"), (b"\xff\xfe", "press-1.token"), (iiot.mint("dev").text.encode(), "4401")],
    ids=["torn", "empty", "not a text", "unknown"],
)
async def test_a_token_file_that_is_no_devices_ends_the_agent(plant: Plant, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "press-1.token").write_bytes(content)
    async with started(tmp_path, "--url", plant.url, "--name", "press-1") as running:
        await expect_refusal(running, words)


async def test_an_agent_without_key_or_token_says_what_it_needs(tmp_path: Path) -> None:
    async with started(tmp_path, "--name", "press-1") as running:
        await expect_refusal(running, "--key", "--token")


async def test_a_revoked_token_ends_an_agent_that_comes_back(tmp_path: Path) -> None:
    process = Process(tmp_path, "--port", str(free_port()))
    await process.start()
    try:
        async with ClientSession() as client:
            plant = process.plant(client, (await process.read_first_start())[0])
            token = await plant.register("press-1")
            async with started(tmp_path, "--url", plant.url, "--token", token) as running:
                await running.line("connected as press-1")
                await process.stop()
                with closing(iiot.connect(process.database)) as connection:
                    connection.execute("delete from device_token")
                await process.start()
                await expect_refusal(running, "4401", "A valid token is needed.")
    finally:
        await process.stop()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--spool", "0"), ("--interval", "0"), ("--interval", "nan"), ("--speed", "-1"), ("--url", "plant")],
)
async def test_an_option_that_cannot_be_is_refused_by_name(plant: Plant, tmp_path: Path, option: str, value: str) -> None:
    record(tmp_path / "run.csv", 1)
    token = await plant.register("press-1")
    arguments = {"--url": plant.url, "--token": token, option: value}
    async with started(tmp_path, *(word for pair in arguments.items() for word in pair)) as running:
        async with asyncio.timeout(4):
            code, err = await running.end()
    assert code != 0
    assert "Traceback" not in err
    assert option.strip("-") in err


# Its parts


def test_a_token_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "press-1.token"
    file = agent.TokenFile(path)
    assert file.read() == ""
    path.write_text("old\n")
    path.chmod(0o644)
    (tmp_path / "press-1.token.new").write_text("left by a crash")
    file.write("iiot_dev_1")
    assert file.read() == "iiot_dev_1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def frame(number: int) -> dict[str, Any]:
    return {"type": "telemetry", "samples": [{"ts": number, "values": {}}]}


async def at_once(step: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    """The outcome of what must not have to wait for anything."""
    task = step if isinstance(step, asyncio.Task) else asyncio.create_task(step)
    for _ in range(10):
        await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        raise AssertionError("it waits")
    return await task


@attrs.define
class Peer:
    """A server as the spool meets it: what is on disk, in order, and up to which number."""

    seq: int = 0
    disk: list[int] = attrs.Factory(list)

    def store(self, sent: dict[str, Any]) -> None:
        assert sent["seq"] > 0
        if sent["seq"] > self.seq:
            self.seq = sent["seq"]
            self.disk += [sample["ts"] for sample in sent["samples"]]


STEPS = st.lists(st.sampled_from(["put", "put", "send", "send", "store", "acknowledge", "break"]), max_size=60)


@settings(deadline=None)
@given(STEPS, st.one_of(st.integers(min_value=1, max_value=5), st.just(100)), st.integers(min_value=0, max_value=50))
@example(["put", "put", "send", "put", "send", "store"], 2, 0)
@example(["put", "send", "store", "break", "put", "send", "store"], 10, 5)
@example(["put", "put", "send", "send", "put", "store", "break"], 2, 0)
def test_whatever_breaks_the_spool_brings_each_frame_once_and_in_order(steps: list[str], most: int, known: int) -> None:
    async def run() -> None:
        spool, peer, way, made = agent.Spool(most), Peer(known), list[dict[str, Any]](), 0
        await spool.resume(peer.seq)
        unsent = 0
        for step in [*steps, "break", *["send"] * most, *["store"] * most, "acknowledge"]:
            if step == "put":
                made += 1
                await spool.put(frame(made))
                unsent = min(unsent + 1, len(spool))
            elif step == "send" and unsent:
                way.append(json.loads((await at_once(spool.next())).text))
                unsent -= 1
            elif step == "store" and way:
                peer.store(way.pop(0))
            elif step == "acknowledge":
                await spool.acknowledge(peer.seq)
            elif step == "break":
                way.clear()
                await spool.resume(peer.seq)
                unsent = len(spool)
            assert len(spool) <= most
        assert peer.disk == sorted(set(peer.disk)), "in order, none twice"
        assert made - len(peer.disk) <= spool.dropped
        assert set(range(max(1, made - most + 1), made + 1)) <= set(peer.disk), "the newest are never those lost"
        if made <= most:
            assert spool.dropped == 0
            assert peer.disk == list(range(1, made + 1))
        assert len(spool) == 0

    asyncio.run(run())


def test_a_full_spool_lets_go_of_the_oldest() -> None:
    async def run() -> list[int]:
        spool = agent.Spool(3)
        for number in range(1, 6):
            await spool.put(frame(number))
        assert spool.dropped == 2
        return [(await spool.next()).samples[0]["ts"] for _ in range(3)]

    assert asyncio.run(run()) == [3, 4, 5]


@pytest.mark.parametrize(("known", "numbers"), [(8, [8, 9, 9, 10]), (1, [8, 9, 2, 3, 4])])
def test_what_is_not_stored_is_numbered_anew_above_the_server_s_number(known: int, numbers: list[int]) -> None:
    """Downwards too, where an operator reset the counter."""

    async def run() -> list[int]:
        spool = agent.Spool(10)
        await spool.resume(7)
        for number in range(3):
            await spool.put(frame(number))
        sent = [(await at_once(spool.next())).seq for _ in range(2)]
        await spool.resume(known)
        return sent + [(await at_once(spool.next())).seq for _ in range(len(spool))]

    assert asyncio.run(run()) == numbers


def test_acknowledging_counts_the_rows_done_with() -> None:
    async def run() -> tuple[int, int, int]:
        spool = agent.Spool(10)
        for number in range(3):
            await spool.put({"type": "telemetry", "samples": [{"values": {}}] * (number + 1)}, tuple(range(number + 1)))
            await spool.next()
        return await spool.acknowledge(2), await spool.acknowledge(2), len(spool)

    assert asyncio.run(run()) == (3, 0, 1)


def test_waiting_for_room_ends_when_there_is_some() -> None:
    async def run() -> None:
        spool = agent.Spool(10)
        for number in range(3):
            await spool.put(frame(number))
            await spool.next()
        waiting = asyncio.create_task(spool.at_most(1))
        await spool.acknowledge(1)
        assert not waiting.done()
        await spool.acknowledge(2)
        await at_once(waiting)

    asyncio.run(run())


def test_readings_are_numbers_that_the_wire_takes() -> None:
    readings = agent.Readings()
    values = readings.take()
    codec = iiot.Codec(iiot.Limits())
    taken = codec.frame(json.dumps({"type": "telemetry", "seq": 1, "samples": [{"ts": iiot.now_ms(), "values": values}]}).encode())
    assert isinstance(taken, iiot.Telemetry)
    assert taken.samples[0].values == values
