"""The README's words are true: its commands run, its answers have the shape it shows, its tables are the program's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession, WSServerHandshakeError
from aiohttp.test_utils import unused_port
from plant import PATIENCE, ROOT, Device, Plant, Process, agent_command, command, rows
from readme import README, RUNNABLE, SECTIONS, Section, Terminal, anchor, answers, blocks, part, section, shape, strays, table

import agent
import iiot

LISTING = 'curl -s -H "Authorization: Bearer $TOKEN" "$IIOT_URL/iiot/pump-house"'

PUSH = 'curl -s -H "Authorization: Bearer $TOKEN" -d \'{"pressure": 7}\' "$IIOT_URL/iiot/pump-house?wait=10"'


@pytest.fixture
async def terminal(tmp_path: Path, process: Process) -> AsyncIterator[Terminal]:
    """The reader's terminal after "Five minutes": a server with its first secrets, and the variables of the page."""
    if shutil.which("curl") is None or shutil.which("awk") is None:
        pytest.skip("the README's commands need curl and awk")
    process.arguments = ("--port", str(unused_port()))
    await process.start()
    token, key = await process.read_first_start()
    exports = blocks("Five minutes")[0]
    shown = re.findall(r"iiot_(?:op|prov)_\w+…", exports)
    assert len(shown) == 2
    running = Terminal(tmp_path, {"http://127.0.0.1:8080": process.url, shown[0]: key, shown[1]: token})
    await running.run(exports)
    try:
        yield running
    finally:
        await running.stop()
        assert strays(tmp_path) == []


async def seen(terminal: Terminal) -> None:
    """Wait until the agent of the page has connected, and sent readings and its state."""
    await terminal.until(LISTING, lambda body: body.get("connected") and body["reported"] and "cpu_percent" in body["latest"])


# ---- Parts 2 and 4: what a reader types ----


async def test_the_first_start_prints_what_the_readme_shows(tmp_path: Path) -> None:
    start, shown = blocks("Run")
    assert start == ".venv/bin/python iiot.py\n"
    process = Process(tmp_path)
    await process.start()
    await process.read_first_start()
    await process.stop()
    printed = process.printed.replace(process.url, "http://127.0.0.1:8080")
    printed = printed.replace(f"{sys.executable} {ROOT / 'agent.py'}", ".venv/bin/python agent.py")
    assert re.sub(r"_[\w…-]+", "_", shown) == re.sub(r"_[\w…-]+", "_", printed)


async def test_a_start_at_a_taken_port_names_the_flag_and_leaves_nothing_that_harms(tmp_path: Path) -> None:
    assert "`--port 8081`" in section("Run").text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = await Terminal(tmp_path).attempt(f"{blocks('Run')[0].strip()} --port {taken.getsockname()[1]}")
    assert (code, out) == (1, "")
    assert "--port" in err
    assert (tmp_path / "iiot.db").exists()
    process = Process(tmp_path)
    await process.start()
    assert all(await process.read_first_start())
    await process.stop()


async def test_five_minutes_are_true(terminal: Terminal) -> None:
    _, start, listing, listed, latest, reading, buckets, charted, chart, drawn = blocks("Five minutes")
    await terminal.start(start)
    await seen(terminal)
    assert shape(json.loads(await terminal.run(listing))) == shape(json.loads(listed))
    device, shown = json.loads(await terminal.run(latest)), json.loads(reading)
    assert shape({**device, "latest": None, "reported": None}) == shape({**shown, "latest": None, "reported": None})
    assert set(shown["reported"]) == set(device["reported"])
    assert set(shown["latest"]) <= set(device["latest"]) | {metric for metric in shown["latest"] if "network" in metric}
    assert shape(json.loads(await terminal.run(buckets))) == shape(json.loads(charted))
    line = re.compile(r"\d\d:\d\d:\d\d +\d+\.\d\d #*")
    for text in (await terminal.run(chart), drawn):
        assert text
        assert all(line.fullmatch(row) for row in text.splitlines()), text
    assert (terminal.folder / "pump-house.token").stat().st_mode & 0o777 == 0o600


async def test_import_export_rotation_and_removal_are_true(terminal: Terminal) -> None:
    imported = await terminal.follow("Import a CSV file")
    points, flags = (json.loads(answer)["series"][0]["points"] for answer in imported[-2:])
    assert points == [["2026-01-12T05:00:00.000Z", 7.25], ["2026-01-12T05:01:00.000Z", 7.5], ["2026-01-12T05:02:00.000Z", 7.125]]
    assert [value for _, value in flags] == [1, 1, 0]
    await terminal.follow("Export a CSV file")
    export, _, sheet, _ = blocks("Export a CSV file")
    assert (await terminal.attempt(sheet))[0] == 23  # the file is there already
    assert await terminal.run(export.replace("?", "?metric=Druk&")) == "time,metric,value\n"
    rotation = await terminal.follow("Rotate a stolen token")
    assert json.loads(rotation[0])["token"] not in (terminal.folder / "test-bed.token").read_text()
    tokens = await terminal.run('curl -s -H "Authorization: Bearer $TOKEN" "$IIOT_URL/tokens"')
    assert [item["name"] for item in json.loads(tokens)["items"]] == ["first start"]
    keys = await terminal.run('curl -s -H "Authorization: Bearer $TOKEN" "$IIOT_URL/provisioning-keys"')
    assert len(json.loads(keys)["items"]) == 1
    await terminal.follow("Remove readings")
    left = json.loads(await terminal.run('curl -s -H "Authorization: Bearer $TOKEN" "$IIOT_URL/iiot/test-bed/telemetry?metric=Druck"'))
    assert left["series"][0]["points"] == points[1:]


async def test_commands_are_true(terminal: Terminal) -> None:
    title = "Run a command on a device"
    await terminal.start(blocks(title)[0])
    await seen(terminal)
    ran, followed, many = (output for output in await terminal.follow(title, first=1))
    assert json.loads(ran)["output"] == "Linux\n"
    assert followed == "step 1\nstep 2\nstep 3\n"
    assert json.loads(many)["counts"] == {"done": 1}


async def test_configurations_the_timeline_and_the_feed_are_true(terminal: Terminal) -> None:
    title = "Push, reject and roll back a configuration"
    check, start = blocks(title)[:2]
    await terminal.run(check)
    running = await terminal.start(start)
    await seen(terminal)
    outputs = [answers(text) for text in await terminal.follow(title, first=2)]
    applied, (rejected, wanted), back, many, guarded = outputs
    assert applied == [{"device": "pump-house", "version": 1, "status": "applied"}]
    assert (rejected["status"], wanted["message"], wanted["applied"], wanted["drift"]) == ("rejected", "pressure is missing", 1, True)
    assert back == [{"device": "pump-house", "version": 3, "status": "applied"}]
    assert many == [{"items": [{"device": "pump-house", "version": 4, "status": "applied"}]}]
    assert guarded == [{"device": "pump-house", "version": 5, "status": "applied"}]
    feed, example, resumed = blocks("Read the live feed")
    live = await terminal.start(feed)
    assert live.stdout is not None
    shown = example.splitlines()
    came = asyncio.create_task(event_with(live.stdout, shown[1]))
    async with asyncio.timeout(PATIENCE):
        while not came.done():  # the feed is open some time, and what is pushed and applied is in the state
            await terminal.run(PUSH)
    real = await came
    assert [line.partition(":")[0] for line in real] == [line.partition(":")[0] for line in shown]
    assert shape(json.loads(real[2].removeprefix("data: "))) == shape(json.loads(shown[2].removeprefix("data: ")))
    again = await terminal.start(resumed)
    assert again.stdout is not None
    async with asyncio.timeout(PATIENCE):
        assert await again.stdout.readline() == b"id: 3\n"
    await terminal.stop(running)
    await terminal.follow("Find out why a device was offline")


async def event_with(feed: asyncio.StreamReader, line: str) -> list[str]:
    """The lines of the next event of a feed among which this one is."""
    lines: list[str] = []
    while line not in lines:
        lines.clear()
        while read := (await feed.readline()).decode().strip():
            lines.append(read)
        assert not feed.at_eof()
    return lines


async def test_a_device_that_was_refused_comes_back_by_the_page_s_remedies(terminal: Terminal) -> None:
    start = blocks("Five minutes")[1]
    _, enable, forget, reset = blocks("Find out why a device was offline", "sh")
    ask = 'curl -s -H "Authorization: Bearer $TOKEN" "$IIOT_URL/iiot/pump-house'

    async def ends(running: asyncio.subprocess.Process) -> bool:
        async with asyncio.timeout(PATIENCE):
            return await running.wait() == 1

    running = await terminal.start(start)
    await seen(terminal)
    await terminal.run(enable.replace("false", "true"))
    assert await ends(running)
    (left,) = (await terminal.until(f'{ask}/events?kind=disconnected"', lambda body: body["items"]))["items"]
    assert left["reason"] == "device_disabled"
    assert not json.loads(await terminal.run(enable))["disabled"]
    running = await terminal.start(start)
    await terminal.until(f'{ask}"', lambda body: body["connected"])
    assert json.loads(await terminal.run(reset)) == {"device": "pump-house", "seq": 0}
    await terminal.until(f'{ask}"', lambda body: body["connected"])
    await terminal.run(f'{ask}" -X DELETE')
    assert await ends(running)
    assert json.loads(await terminal.run(f'{ask}/events"'))["error"]["code"] == "not_found"
    assert await ends(await terminal.start(start))
    await terminal.run(forget)
    await terminal.start(start)
    await seen(terminal)


async def test_access_and_tenants_are_true(terminal: Terminal) -> None:
    token, key = await terminal.follow("Give access that ends on a date")
    assert json.loads(token)["role"] == "viewer"
    assert json.loads(key)["key"].startswith("iiot_prov_")
    await terminal.follow("Add a tenant")
    left = json.loads(await terminal.run('curl -s -H "Authorization: Bearer $PLATFORM" "$IIOT_URL/tenants"'))
    assert [item["name"] for item in left["items"]] == ["default"]


async def test_charts_and_tables_of_all_devices_are_true(terminal: Terminal) -> None:
    await terminal.start(blocks("Five minutes")[1])
    await seen(terminal)
    latest, shown, program, _, follow, _ = blocks("Charts and tables of all devices")
    (row,) = json.loads(await terminal.run(latest))
    assert row.keys() == json.loads(shown)[0].keys()
    assert row["device"] == "pump-house"
    (terminal.folder / "table.py").write_text(program)
    table = await terminal.run(".venv/bin/python table.py")
    (terminal.folder / "table.py").unlink()
    assert re.search(r"device +pump-house\ntime *\n20[0-9-]{8} [0-9:]{8}\+00:00 +[0-9.]+\n", table), table
    feed = await terminal.start(follow)
    assert feed.stdout is not None
    async with asyncio.timeout(PATIENCE):
        lines = [(await feed.stdout.readline()).decode() for _ in range(3)]
    assert lines[0] == ": connected\n"


async def test_receiving_syslog_is_true(terminal: Terminal) -> None:
    await terminal.start(blocks("Five minutes")[1])
    await seen(terminal)
    commands = blocks("Receive syslog")
    device, token, source = [json.loads(await terminal.run(commands[at])) for at in (0, 2, 5)]
    assert device["token"].startswith("iiot_dev_")
    assert token["token"].startswith("iiot_log_")
    assert source == json.loads(commands[6])


# ---- Part 7: an example for every topic ----


async def test_the_reference_is_true(terminal: Terminal) -> None:
    await terminal.start(blocks("Five minutes")[1])
    await seen(terminal)
    for topic in part(7):
        await terminal.follow(topic.title)


def test_routes_are_the_readme_s() -> None:
    """Those of every topic together; only their order is the page's own."""
    topics = [topic for topic in part(7) if "| route |" in topic.text]
    shown = [(*row[0].split(" "), row[1]) for topic in topics for row in table(topic.text, "route")]
    assert len(shown) == len(set(shown))
    assert sorted(shown) == sorted((route.method, route.path, route.role) for route in iiot.ROUTES)
    assert all("sh" in {block.kind for block in topic.blocks} for topic in topics)


def test_actions_are_the_readme_s() -> None:
    shown = re.search(r"Actions: (.*?)\.\n", section("Audit").text, re.DOTALL)
    assert shown is not None
    of_devices = {"device.provision"}  # at the socket, not at a route
    assert set(re.findall(r"`([a-z_.]+)`", shown[1])) == {route.action for route in iiot.ROUTES if route.action} | of_devices


def test_faults_are_the_readme_s() -> None:
    shown = table(section("9. Errors").text, "code")
    expected = [[fault.code, str(fault.status), str(fault.close), fault.message] for fault in iiot.FAULTS.values()]
    assert [row[:4] for row in shown] == expected
    assert all(row[4] for row in shown)


def test_reasons_are_faults_that_end_a_session() -> None:
    source = (ROOT / "iiot.py").read_text(encoding="utf-8")
    ends = set(re.findall(r"(?:\bend|abort|sign_off|end_all)\((?:device_id, |self\._?\w*, |next\(broken, )?\"(\w+)\"", source))
    before = {"handshake_timeout"}  # ends what is no session yet
    inside = {"protocol_error", "frame_too_big", "connection_lost", "crashed", "superseded", "seq_reset"}
    shown = {row[0] for row in table(section("Find out why a device was offline").text, "reason")}
    assert shown == (ends - before) | inside
    assert shown <= set(iiot.FAULTS)


def test_kinds_of_the_timeline_are_the_schema_s() -> None:
    schema = re.search(r"kind +text not null, +-- (.*)", iiot.schema_text())
    assert schema is not None
    assert {row[0] for row in table(section("Timeline").text, "kind")} >= set(schema[1].split(", "))


async def test_entries_of_the_timeline_have_the_fields_of_the_readme(tmp_path: Path) -> None:
    """Everything that can happen to a device, and the fields of its entries: those of all are `id`, `device`, `kind` and `at`; those of
    what an operator did are `by` and `address`."""
    limits = attrs.evolve(iiot.Limits(), fights=1, conflict_seconds=0.0)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.connect()
        key = (await plant.ask("POST", "/provisioning-keys", {}))[1]["key"]
        await device.send("provision", key=key, device="press-1")
        plant.tokens["press-1"] = (await device.expect("credentials"))["token"]
        await device.hello(plant.tokens["press-1"])
        await device.send("state", seq=1000, reported={"serial": "A-17"})
        await plant.ask("POST", "/iiot/press-1", {"interval": 5})
        fault = {"path": "interval", "code": "range", "message": "too long"}
        await device.send("config_status", seq=1001, version=1, status="rejected", message="no", errors=[fault])
        await device.acknowledged(1001)
        for seq in range(1, 12):
            await device.telemetry({"values": {"level": 1}}, seq=seq)
        await device.telemetry({"values": {"level": 1}}, seq=1002)
        await device.acknowledged(1002)
        await plant.until("/iiot/press-1/events?kind=duplicates", lambda body: body["items"])
        plant.tokens["press-1"] = (await plant.ask("POST", "/iiot/press-1/token", {}))[1]["token"]
        session = await plant.device("press-1")
        fighting = await plant.connect()
        await fighting.send("hello", token=plant.tokens["press-1"])
        assert (await fighting.closed()).code == 4429
        await plant.ask("POST", "/rules", {"name": "some", "metric": "level", "condition": {"above": 0}})
        (alert,) = (await plant.until("/alerts", lambda body: body["items"]))["items"]
        later = iiot.format_time(iiot.now_ms() + 60_000)
        await plant.ask("POST", f"/alerts/{alert['id']}/ack", {"text": "seen", "until": later})
        await plant.ask("POST", "/iiot/press-1/commands", {"argv": ["ls"], "ttl": 60})
        await session.expect("command")
        await session.send("result", seq=2000, command=1, status="done", exit_code=0)
        await session.acknowledged(2000)
        await plant.ask("POST", "/iiot/press-1/commands", {"argv": ["ls"], "ttl": 60})
        url, bearer = f"{plant.url}/iiot/press-1/tunnel/22", {"Authorization": f"Bearer {plant.token}"}
        tunnel = asyncio.create_task(plant.client.ws_connect(url, headers=bearer))
        await session.expect("tunnel")
        await session.send("tunnel", tunnel=1, state="refused", message="no")
        with pytest.raises(WSServerHandshakeError):
            await tunnel
        await plant.until("/iiot/press-1/events?kind=tunnel", lambda body: len(body["items"]) == 2)
        await plant.ask("POST", "/iiot/press-1/seq", {"seq": 0})
        await plant.ask("PATCH", "/iiot/press-1", {"disabled": True})
        await plant.ask("DELETE", "/iiot/press-1")
        entries = rows(plant.database, "select kind, detail from event")
    listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", section("Timeline").text, re.MULTILINE)
    shown = {kind: set(re.findall(r"`(\w+)`", text)) for kind, text in listed}
    real: dict[str, set[str]] = {kind: set() for kind in shown}
    for kind, detail in entries:
        real[kind] |= set(json.loads(detail))
    assert {kind: fields - ({"by", "address"} if "by" in fields else set()) for kind, fields in real.items()} == shown


def test_statuses_of_a_configuration_are_the_schema_s() -> None:
    schema = re.search(r"check \(status in \(('pending'.*?)\)\)", iiot.schema_text(), re.DOTALL)
    assert schema is not None
    assert [row[0] for row in table(section("Configuration").text, "status")] == re.findall(r"'(\w+)'", schema[1])


def test_limits_are_the_readme_s() -> None:
    limits = iiot.Limits()
    expected = {
        "size of a frame": f"{limits.frame_bytes // 2**20} MiB",
        "size of the first frame (hello, provision)": f"{limits.hello_bytes // 1024} KiB",
        "size of a request body": f"{limits.body_bytes // 1024} KiB",
        "size of a document (state, configuration)": f"{limits.document_bytes // 1024} KiB",
        "depth of a document": f"{limits.document_depth}",
        "length of a metric name": f"{limits.metric_characters} characters",
        "length of a text value": f"{limits.text_characters:,} characters",
        "length of a log message": f"{limits.log_characters:,} characters",
        "lines of logs of a device in a second, over a minute": f"{limits.log_bytes_a_second >> 20} MiB",
        "length of a search of logs": f"{limits.search_characters:,} characters (8 KiB in the address), {limits.search_terms} words",
        "words that contain a part of a word that is searched for": f"{limits.log_parts:,}",
        "metrics of a device": f"{limits.series_per_device:,}",
        "labels of a device": f"{limits.labels}",
        "unconfirmed frames of a session": f"{limits.unacknowledged_frames:,}, then the server reads no more for a time",
        "refused frames of a session in a minute": f"{limits.bad_frames_per_minute}, then it closes",
        "connections": f"{limits.connections:,}",
        "time for the handshake of TLS, for the first request after it, and for hello after that": f"{limits.hello_seconds:.0f} s each",
        "time for a request body": f"{limits.body_seconds:.0f} s",
        "time for a query (--query-seconds)": f"{iiot.Settings().query_seconds:.0f} s",
        "points of a series in one page": f"{limits.points_most:,}",
        "entries in one page of a list": f"{limits.page_most:,}",
        "time for wait": f"{limits.wait_seconds_most:.0f} s",
        "time for timeout of a push": f"{limits.config_seconds_most:,.0f} s",
        "wrong tokens of an address in a minute": f"{limits.guesses}",
        "sessions that a device opens at once": f"{limits.sessions}, then one in a second",
        "live feeds of a tenant": f"{limits.feeds}",
        "series that a stream of points follows": f"{limits.followed_series:,}",
        "devices that one request for readings names": f"{limits.fleet_devices:,}",
        "streams of points of a tenant": f"{limits.point_followers}",
        "readings on which a rule is tried": f"{limits.trial_most:,}",
        "rules of a tenant": f"{limits.rules:,}",
        "silences of a tenant": f"{limits.silences:,}",
        "receivers of notifications of a tenant": f"{limits.webhooks}",
        "addresses of a receiver by e-mail": f"{limits.mail_addresses}",
        "alerts that one notification shows": f"{limits.alerts_shown}",
        "size of a notification, about": f"{limits.notification_bytes // 1024} KiB",
        "notifications that wait for a receiver": f"{limits.notifications_waiting:,}, then no more are made for a time",
        "time for one try to deliver a notification": f"{limits.delivery_seconds:.0f} s",
        "tests of receivers of a tenant at a time": f"{limits.webhook_tests}",
        "pushes and commands of a tenant that wait for an answer (wait)": f"{limits.waiting_pushes}",
        "words of a command, bytes of all of them": f"{iiot.ARGV_WORDS:,}, {iiot.ARGV_BYTES // 1024} KiB",
        "time that a command may run": f"{limits.command_seconds_most:,.0f} s",
        "output of a command that is kept": f"{limits.command_bytes >> 20} MiB",
        "commands of a device that are not over": f"{limits.commands_open}",
        "commands for many devices of a tenant that are not given to all yet": f"{limits.batches_open}",
        "time for which commands are kept": f"{limits.command_days} days",
        "tunnels of a device": f"{limits.tunnels}",
        "time for a device to open a port": f"{limits.tunnel_open_seconds:.0f} s",
        "requests of a tenant that wait for their turn": f"{limits.requests_waiting}",
    }
    assert {row[0]: row[1] for row in table(section("Limits").text, "limit")} == expected


def numbers(pattern: str, text: str) -> list[list[float]]:
    """The numbers wherever a text looks so, with a number for each N."""
    found = re.finditer(re.escape(pattern).replace("N", r"([\d,.]*\d)"), " ".join(text.split()))
    return [[float(number.replace(",", "")) for number in place.groups()] for place in found]


def test_sizing_is_rounded_from_the_measurements() -> None:
    (printed,) = blocks("Measurements")
    text = " ".join(section("Sizing").text.split())
    [[disk]] = numbers("on disk: N bytes a point", printed)
    written = numbers("written at N frames/s of N points, N devices: N bytes a point, N GB a day", printed)
    of_ten = {devices: day for _, points, devices, _, day in written if points == 10}
    units = {"million": 1e6, "MB": 1e6, "GB": 1e9}
    rows = table(section("Sizing").text, "devices")
    assert [float(row[0].replace(",", "")) for row in rows] == list(of_ten)
    for devices, row in zip(of_ten, rows, strict=True):
        a_day = devices * 10 * 86_400 / 5
        shown = [float(number.replace(",", "")) * units[unit] for number, unit in (cell.split() for cell in row[1:])]
        assert [f"{one:.2g}" for one in shown] == [f"{one:.2g}" for one in (a_day, a_day * disk, of_ten[devices] * 1e9)], row
    for count in (10, 120):
        each = [size for _, points, _, size, _ in written if points == count]
        assert f"{min(each):,.0f} to {max(each):,.0f} bytes for each point" in text
    [[devices, whole, empty, each_kb]] = numbers("memory with N connected devices: N MB (N MB without, N KB each)", printed)
    memory = f"{empty:g} MB without devices, and {each_kb:g} KB more for each connected device: {whole:g} MB with {devices:,.0f} idle"
    [[frames, _, half, most]] = numbers("ack at N frames/s, N devices: p50 N ms, p99 N ms", printed)
    speed = f"{frames:,.0f} frames in a second: half of them within {half:g} ms, and 99 of 100 within {most:g} ms"
    assert all(told in text for told in (f"takes {disk:.0f} bytes", memory, speed))


# ---- Part 6: settings ----


@pytest.mark.parametrize(
    ("title", "options"), [("Server settings", attrs.fields(iiot.Settings)), ("Device agent", dataclasses.fields(agent.Options))]
)
def test_options_are_the_readme_s(title: str, options: tuple[Any, ...]) -> None:
    expected = [
        [f"--{option.name.replace('_', '-')}", f"IIOT_{option.name.upper()}", str(option.default), option.metadata["help"]]
        for option in options
    ]
    assert table(section(title).text, "flag") == expected


async def test_help_names_every_flag(tmp_path: Path) -> None:
    server = await command("serve", "--help", folder=tmp_path)
    device = await agent_command("--help", folder=tmp_path)
    for (code, out, _), options in ((server, attrs.fields(iiot.Settings)), (device, dataclasses.fields(agent.Options))):
        assert code == 0
        for option in (*options,):
            assert f"--{option.name.replace('_', '-')} " in out


async def test_other_commands_are_there(terminal: Terminal) -> None:
    rows = table(section("Other commands").text, "command")
    for row in rows:
        line = row[0].replace("python iiot.py", ".venv/bin/python iiot.py").replace("ROLE", "viewer").replace("NAME", "acme")
        printed = await terminal.run(line)
        assert bool(printed) != ("remove" in line), line
    assert len(rows) == 6


# ---- Part 8: the device contract ----


def test_frames_of_devices_are_the_readme_s() -> None:
    shown = {row[0]: row[1] for row in table(section("Frames").text, "device sends")}
    assert set(shown) == set(iiot.FRAMES)
    for kind, cls in iiot.FRAMES.items():
        for field in attrs.fields(cls):
            optional = "" if field.default is attrs.NOTHING else r"\?"
            assert re.search(rf"\b{field.name}{optional}(?!\w|\?)", shown[kind]), (kind, field.name)


def test_frames_of_the_server_are_the_readme_s() -> None:
    frames = (iiot.Credentials, iiot.Welcome, iiot.Error, iiot.Throttled, iiot.Report, iiot.Config)
    shown = {row[0]: row[1] for row in table(section("Frames").text, "server sends")}
    written_by_hand = {"ack", "command", "cancel", "tunnel"}  # tests of commands and tunnels compare them whole
    assert set(shown) == written_by_hand | {cls.__name__.lower() for cls in frames}
    for cls in frames:
        for field in attrs.fields(cls):
            assert field.name in shown[cls.__name__.lower()], (cls, field.name)


def matching(shown: Any, real: Any, learned: dict[str, str]) -> None:
    """A frame of the page and a frame of a server: equal but for secrets, which are learned, and the time."""
    assert set(shown) == set(real), (shown, real)
    for name, value in shown.items():
        if isinstance(value, str) and "…" in value:
            learned[value] = real[name]
        elif name != "time":
            assert value == real[name], (shown, real)


async def test_the_trace_is_true(process: Process) -> None:
    await process.start()
    token, key = await process.read_first_start()
    (trace,) = blocks("A full trace")
    learned = {"…": "s" * 43}
    async with ClientSession() as client:
        plant: Plant = process.plant(client, token)
        device: Device = await plant.connect()
        for line in trace.splitlines():
            shown = json.loads(line[2:])
            if line.startswith(">"):
                for name, value in shown.items():
                    if isinstance(value, str) and "…" in value:
                        shown[name] = key if value.startswith("iiot_prov_") else learned[value]
                await device.link.send_str(json.dumps(shown))
                continue
            if shown["type"] == "config":
                assert (await plant.ask("POST", "/iiot/press-9", shown["document"]))[0] == 202
            matching(shown, await device.receive(), learned)
        assert (await plant.get("/iiot/press-9/config"))["status"] == "applied"
        await device.close()


# ---- The page itself ----


def test_dependencies_are_the_readme_s() -> None:
    listed = {row[0] for row in table(section("Dependencies").text, "package")}
    assert f"installs the {('four', 'five', 'six', 'seven')[len(listed) - 4]} [dependencies]" in README
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert listed == set(re.findall(r'"([a-z\[\]-]+)>=', declared[1]))


def test_lines_that_ci_takes_stand_once() -> None:
    """The lines for the tests, for npm and for the start, as .ci/run and others find them."""
    assert len(re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^npm install .*$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^\.venv/bin/python iiot\.py$", README, re.MULTILINE)) == 1
    install = r"^python3 -m venv \.venv && \.venv/bin/pip install -q -e \.$"
    assert len(re.findall(install, README, re.MULTILINE)) == 1


def test_links_within_the_readme_lead_somewhere() -> None:
    there = [anchor(section.title) for section in SECTIONS if section.rank]
    assert len(there) == len(set(there))
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= set(there)
    contents = set(re.findall(r"\]\(#([^)]+)\)", section("Contents").text))
    assert {anchor(found.title) for found in SECTIONS if found.rank == 2} - {"contents"} <= contents
    parts = [found.title for found in SECTIONS if found.rank == 2 and found.title != "Contents"]
    assert [title.split(".")[0] for title in parts] == [str(number) for number in range(1, 11)]


def test_every_block_that_runs_is_run_by_a_test() -> None:
    """A section with commands, a program or a configuration file is named by a test, or followed with its whole part."""
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_readme*.py")))
    followed = {topic.title for topic in part(7)} | {"Tests"}  # the line of the tests is run by .ci/run
    runnable: list[Section] = [found for found in SECTIONS if {block.kind for block in found.blocks} & RUNNABLE]
    assert [found.title for found in runnable if f'"{found.title}"' not in tests and found.title not in followed] == []
    assert {block.kind for found in SECTIONS for block in found.blocks} <= RUNNABLE | {"json", "text"}
