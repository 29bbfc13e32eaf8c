"""The reference device, as a process of its own against a real server; then its parts one by one."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
from aiohttp import ClientSession
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plant import PATIENCE, ROOT, Plant, Process, agent_command

import agent
import iiot

START = datetime(2026, 1, 1, tzinfo=UTC)
SENSORS = ("Accelerometer1RMS", "Accelerometer2RMS", "Current", "Pressure", "Temperature", "Thermocouple", "Voltage", "Volume Flow RateRMS")
T = TypeVar("T")
Points = dict[str, list[list[Any]]]


def wire_time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def record(path: Path, rows: int, step: timedelta = timedelta(seconds=1), delimiter: str = ",") -> Points:
    """Write a recording of full-length numbers; its points as the server has to show them."""
    numbers = random.Random(rows)
    points: Points = {metric: [] for metric in SENSORS}
    lines = [delimiter.join(("datetime", *SENSORS))]
    for row in range(rows):
        moment = START + row * step
        cells = [repr(numbers.uniform(-1000, 1000)) for _ in SENSORS]
        lines.append(delimiter.join((f"{moment:%Y-%m-%d %H:%M:%S.%f}", *cells)))
        for metric, cell in zip(SENSORS, cells, strict=True):
            points[metric].append([wire_time(moment), float(cell)])
    path.write_text("\n".join(lines) + "\n")
    return points


@attrs.define
class Running:
    """The agent while it runs."""

    process: asyncio.subprocess.Process
    printed: str = ""

    async def line(self, words: str) -> str:
        """The next line on standard error with these words."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while line := (await self.process.stderr.readline()).decode():
                self.printed += line
                if words in line:
                    return line
        raise AssertionError(f"ended without {words!r}: {self.printed}")

    async def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and all of standard error."""
        async with asyncio.timeout(PATIENCE):
            _, rest = await self.process.communicate()
        assert self.process.returncode is not None
        self.printed += rest.decode()
        return self.process.returncode, self.printed


@asynccontextmanager
async def started(folder: Path, *arguments: str, **environment: str) -> AsyncIterator[Running]:
    """`python agent.py …`, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "agent.py"), *arguments, cwd=folder, env={**os.environ, **environment},
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def replay(plant: Plant, folder: Path, name: str, *arguments: str) -> tuple[int, str]:
    """Send `run.csv` as a device; exit code and standard error. Nothing belongs on standard output."""
    token = plant.tokens.get(name) or await plant.register(name)
    code, out, err = await agent_command("--url", plant.url, "--token", token, "--replay", "run.csv", *arguments, folder=folder)
    assert out == ""
    assert "Traceback" not in err
    return code, err


async def replay_by_key(plant: Plant, folder: Path, *arguments: str) -> str:
    """Send `run.csv` as a new device; standard error."""
    key = await provisioning_key(plant)
    code, _, err = await agent_command("--url", plant.url, "--key", key, "--replay", "run.csv", *arguments, folder=folder)
    assert code == 0, err
    return err


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


async def provisioning_key(plant: Plant) -> str:
    status, body = await plant.ask("POST", "/provisioning-keys", {})
    assert status == 201, body
    return str(body["key"])


async def stored(plant: Plant, name: str) -> Points:
    """All points of a device, by metric."""
    body = await plant.get(f"/iiot/{name}/telemetry?limit=10000")
    assert body["next"] is None
    return {series["metric"]: series["points"] for series in body["series"]}


async def frames_of(plant: Plant, name: str) -> int:
    """The highest frame number on disk: as many as were sent, for an agent counts from one and leaves no gap."""
    device = await plant.device(name)
    await device.close()
    return int(device.welcome["seq"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


# A recorded file


@pytest.mark.parametrize("delimiter", [",", ";"])
async def test_a_recording_arrives_whole_and_a_second_time_changes_nothing(plant: Plant, tmp_path: Path, delimiter: str) -> None:
    expected = record(tmp_path / "run.csv", 1000, delimiter=delimiter)
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    first = await stored(plant, "press-1")
    assert sum(map(len, first.values())) == 8000
    assert first == expected
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    assert await stored(plant, "press-1") == expected


async def test_a_recording_shows_its_progress_on_standard_error(plant: Plant, tmp_path: Path) -> None:
    record(tmp_path / "run.csv", 1000)
    _, err = await replay(plant, tmp_path, "press-1")
    shown = [int(rows) for rows in re.findall(r"\r(\d+) of 1000 rows acknowledged", err)]
    assert shown
    assert shown == sorted(shown)
    assert err.endswith("\rreplayed 1000 of 1000 rows\n")


async def test_a_recording_may_hold_what_recordings_hold(plant: Plant, tmp_path: Path) -> None:
    lines = [
        "\ufeffzeit;druck;zahl;text;\"komma, und; mehr\"",
        "2026-01-01T00:00:00Z;1.5;7;läuft;\"a;b\"",
        "",
        "2026-01-01T02:00:01+02:00;;-9223372036854775807;\"say \"\"on\"\"\";0.1",
        " 1767225602.25 ;1e100;0;;-0.0",
        "2026-01-01 00:00:03;nan;99999999999999999999;true;inf",
    ]
    (tmp_path / "run.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    zero, one, two, three = (f"2026-01-01T00:00:0{second}Z" for second in ("0.000", "1.000", "2.250", "3.000"))
    assert await stored(plant, "press-1") == {
        "druck": [[zero, 1.5], [two, 1e100]],
        "zahl": [[zero, 7], [one, -9223372036854775807], [two, 0]],
        "text": [[zero, "läuft"], [one, 'say "on"'], [three, "true"]],
        "komma, und; mehr": [[zero, "a;b"], [one, 0.1], [two, 0.0]],
    }


GOOD = "2026-01-01 00:00:00,1.5,2.5\n2026-01-01 00:00:01,3.5,4.5\n"


@pytest.mark.parametrize(
    ("tail", "line"),
    [
        pytest.param(b"2026-01-01 00:00:02,5.", 4, id="a short last line"),
        pytest.param(b"\n\nyesterday,1,2\n", 6, id="a bad time after empty lines"),
        pytest.param(b"2026-01-01 00:00:02,\xff\xfe,2\n", 4, id="not UTF-8"),
    ],
)
async def test_a_recording_that_breaks_off_is_sent_up_to_there_and_the_line_named(
    plant: Plant, tmp_path: Path, tail: bytes, line: int
) -> None:
    (tmp_path / "run.csv").write_bytes(f"time,a,b\n{GOOD}".encode() + tail)
    code, err = await replay(plant, tmp_path, "press-1")
    assert code != 0
    assert f"run.csv: line {line}: " in err
    zero, one = "2026-01-01T00:00:00.000Z", "2026-01-01T00:00:01.000Z"
    assert await stored(plant, "press-1") == {"a": [[zero, 1.5], [one, 3.5]], "b": [[zero, 2.5], [one, 4.5]]}


async def test_a_recording_that_is_not_there_is_named(plant: Plant, tmp_path: Path) -> None:
    code, err = await replay(plant, tmp_path, "press-1")
    assert code != 0
    assert "cannot read run.csv: No such file or directory" in err


@pytest.mark.parametrize(
    "bad",
    ["1999-12-31 23:59:59,1.0", f"2026-01-01 00:00:01,{'x' * 5000}"],
    ids=["too early", "too long"],
)
async def test_rows_that_the_server_refuses_are_not_called_replayed(plant: Plant, tmp_path: Path, bad: str) -> None:
    (tmp_path / "run.csv").write_text(f"time,a\n2026-01-01 00:00:00,1.5\n{bad}\n")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code != 0
    assert "replayed 2 of 2 rows" not in err


async def test_speed_keeps_the_recordings_pace_so_many_times(plant: Plant, tmp_path: Path) -> None:
    expected = record(tmp_path / "run.csv", 4, step=timedelta(seconds=10))
    before = time.monotonic()
    code, err = await replay(plant, tmp_path, "press-1", "--speed", "25")
    took = time.monotonic() - before
    assert code == 0, err
    assert 1.2 <= took < 10, "30 s of recording in 1.2 s"
    assert await stored(plant, "press-1") == expected
    assert await frames_of(plant, "press-1") == 4, "each row goes out when it is due"


async def test_a_recording_longer_than_the_spool_waits_for_room(tmp_path: Path) -> None:
    port = free_port()
    process = Process(tmp_path, "--port", str(port))
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        token = await plant.register("press-1")
        await process.stop()
        expected = record(tmp_path / "run.csv", 120)
        arguments = ("--url", plant.url, "--token", token, "--replay", "run.csv", "--spool", "2")
        try:
            async with started(tmp_path, *arguments) as running:
                await running.line("no session")  # all that the spool takes is in it by now
                await process.start()
                code, err = await running.end()
            assert code == 0, err
            assert "replayed 120 of 120 rows" in err
            assert await stored(plant, "press-1") == expected
        finally:
            await process.stop()


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
    expected = record(tmp_path / "run.csv", 120)
    token = await plant.register("press-1")
    async with deaf_link(plant) as url, started(tmp_path, "--url", url, "--token", token, "--replay", "run.csv") as running:
        code, err = await running.end()
    assert code == 0, err
    assert "session 2" in err
    assert "replayed 120 of 120 rows" in err
    assert await stored(plant, "press-1") == expected
    assert await frames_of(plant, "press-1") == 3


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
                    await plant.until(f"/iiot/press-1/telemetry?metric={SENSORS[0]}", enough_points(120))
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), (" 42 ", 42), ("-7", -7), ("+7", 7), ("007", 7), ("1.5", 1.5), ("1.0", 1.0), ("-0.0", -0.0), ("1e3", 1000.0), (".5", 0.5),
        ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)), ("9223372036854775808", None), ("1e400", None),
        ("-1e300", -1e300),        ("", None), ("   ", None), ("nan", None), ("inf", None), ("-Infinity", None),
        ("running", "running"), (" running ", "running"), ("1,5", "1,5"), ("0x10", "0x10"), ("12:30", "12:30"), ("1_000", "1_000"),
    ],
)  # fmt: skip
def test_a_cell_is_read_as_what_it_says(text: str, value: object) -> None:
    read = agent.parse_cell(text)
    assert (type(read), read) == (type(value), value)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200))
def test_every_real_is_read_exactly(value: float) -> None:
    assert agent.parse_cell(repr(value)) == value


@given(st.integers(min_value=-(2**63) + 1, max_value=2**63 - 1))
def test_every_integer_is_read_exactly(value: int) -> None:
    assert agent.parse_cell(str(value)) == value


@given(st.text())
def test_whatever_a_cell_holds_is_a_value_for_the_wire_or_none(text: str) -> None:
    value = agent.parse_cell(text)
    assert value is None or value == json.loads(json.dumps(value, allow_nan=False))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2020-03-09 10:14:33", 1_583_748_873_000),
        ("2020-03-09T10:14:33", 1_583_748_873_000),
        ("2020-03-09T10:14:33Z", 1_583_748_873_000),
        ("2020-03-09T11:14:33.250+01:00", 1_583_748_873_250),
        (" 2020-03-09 10:14:33.0006 ", 1_583_748_873_001),
        ("2020-03-09", 1_583_712_000_000),
        ("1583748873", 1_583_748_873_000),
        ("1583748873.25", 1_583_748_873_250),
        ("1.58374887325e9", 1_583_748_873_250),
    ],
)
def test_a_recorded_time_is_utc_or_names_its_zone(text: str, moment: int) -> None:
    assert agent.parse_recorded_time(text) == moment


@pytest.mark.parametrize("text", ["", "yesterday", "nan", "inf", "-inf", "1e400", "2020-13-09", "2020-03-09 25:00:00", "10:14", "9.3.20"])
def test_what_is_no_time_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        agent.parse_recorded_time(text)


@given(st.integers(min_value=946_684_800_000, max_value=4_000_000_000_000))
@example(1_583_748_873_000)
def test_every_millisecond_is_read_exactly_in_each_form(moment: int) -> None:
    seconds, milliseconds = divmod(moment, 1000)
    utc = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=moment)
    assert agent.parse_recorded_time(f"{seconds}.{milliseconds:03d}") == moment
    assert agent.parse_recorded_time(utc.isoformat()) == moment
    assert agent.parse_recorded_time(utc.replace(tzinfo=None).isoformat(" ")) == moment


def test_a_recording_knows_its_rows_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("time,a\n2026-01-01,1\n\n2026-01-02,\n")
    recording = agent.Recording(tmp_path / "run.csv")
    assert recording.rows == 2
    assert list(recording.samples()) == [{"ts": 1_767_225_600_000, "values": {"a": 1}}, {"ts": 1_767_312_000_000, "values": {}}]


@pytest.mark.parametrize(
    ("tail", "line"),
    [
        pytest.param(b"2026-01-01 00:00:02,5.", 4, id="a short last line"),
        pytest.param(b"2026-01-01 00:0", 4, id="only a part of a time"),
        pytest.param(b"2026-01-01 00:00:02,1,2,3\n", 4, id="a line too long"),
        pytest.param(b"\n\nyesterday,1,2\n", 6, id="a bad time after empty lines"),
        pytest.param(b"2026-13-01 00:00:02,1,2\n", 4, id="a month too many"),
        pytest.param(b",1,2\n", 4, id="no time"),
        pytest.param(b"nan,1,2\n", 4, id="a time that is no number"),
        pytest.param(b"inf,1,2\n", 4, id="a time without end"),
        pytest.param(b"1e300,1,2\n", 4, id="a time beyond all clocks"),
        pytest.param(b"2026-01-01 00:00:02,\xff\xfe,2\n", 4, id="not UTF-8"),
        pytest.param(b"2026-01-01 00:00:02," + b"9" * 200_000 + b",2\n", 4, id="a cell without end"),
        pytest.param(b'2026-01-01 00:00:02,"5', 4, id="an open quote"),
        pytest.param(b'2026-01-01 00:00:02,"a\nb",2\nyesterday,1,2\n', 6, id="a bad time after a cell of two lines"),
    ],
)
def test_a_recording_yields_what_stands_above_the_line_at_which_it_breaks_off(tmp_path: Path, tail: bytes, line: int) -> None:
    (tmp_path / "run.csv").write_bytes(f"time,a,b\n{GOOD}".encode() + tail)
    samples = agent.Recording(tmp_path / "run.csv").samples()
    taken = [next(samples), next(samples)]
    with pytest.raises(agent.AgentError, match=rf"run\.csv: line {line}: "):
        list(samples)
    assert [sample["values"] for sample in taken] == [{"a": 1.5, "b": 2.5}, {"a": 3.5, "b": 4.5}]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="an empty file"),
        pytest.param("time\n2026-01-01\n", id="no metric"),
        pytest.param("time,a,a\n2026-01-01,1,2\n", id="two metrics of one name"),
        pytest.param("time,a,\n2026-01-01,1,2\n", id="a metric without a name"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_at_its_first_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.csv").write_text(content)
    with pytest.raises(agent.AgentError, match=r"run\.csv: line 1: "):
        list(agent.Recording(tmp_path / "run.csv").samples())


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
            self.disk.append(sent["samples"][0]["ts"])


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
                way.append(dict(await at_once(spool.next())))
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
        return [(await spool.next())["samples"][0]["ts"] for _ in range(3)]

    assert asyncio.run(run()) == [3, 4, 5]


def test_a_frame_keeps_its_number_when_it_is_sent_again_and_new_ones_go_above_the_servers() -> None:
    async def run() -> list[int]:
        spool, numbers = agent.Spool(10), []
        await spool.resume(7)
        for number in range(3):
            await spool.put(frame(number))
        numbers += [(await spool.next())["seq"] for _ in range(2)]
        await spool.resume(8)
        numbers += [(await spool.next())["seq"] for _ in range(2)]
        return numbers

    assert asyncio.run(run()) == [8, 9, 9, 10]


def test_acknowledging_counts_the_samples_let_go_of() -> None:
    async def run() -> tuple[int, int, int]:
        spool = agent.Spool(10)
        for number in range(3):
            await spool.put({"type": "telemetry", "samples": [{}] * (number + 1)})
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
