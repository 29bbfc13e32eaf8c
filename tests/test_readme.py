"""The README's words are true: its commands run, its answers have the shape it shows, its tables are the program's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from aiohttp.test_utils import unused_port
from plant import PATIENCE, ROOT, Process, agent_command, command

import agent
import iiot

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text under a heading, up to the next one of its rank."""
    found = re.search(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose head starts with `first`, without the marks of code."""
    lines = text[text.index(f"| {first} |") :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def shape(value: Any) -> Any:
    """What a JSON value is made of: keys, and the kinds of values, whatever their number and size."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


async def shell(line: str, folder: Path, **environment: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "bash", "-o", "pipefail", "-c", line, cwd=folder, env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    assert process.returncode == 0, (line, out, err)
    return out.decode()


def localized(line: str, port: int) -> str:
    """A command of the README for this test's port and interpreter."""
    line = line.replace("http://127.0.0.1:8080", f"http://127.0.0.1:{port}")
    return re.sub(r"\.venv/bin/python (iiot|agent)\.py", rf"{sys.executable} {ROOT}/\1.py", line)


class Walk:
    """The commands and shown answers of the README, in order, against one server."""

    def __init__(self, folder: Path, server: Process, token: str, key: str) -> None:
        self.folder = folder
        self.port = int(server.url.rpartition(":")[2])
        self.environment = {"TOKEN": token, "KEY": key}

    async def run(self, line: str) -> str:
        return await shell(localized(line, self.port), self.folder, **self.environment)

    async def start(self, line: str) -> asyncio.subprocess.Process:
        """A command that goes on until it is stopped."""
        return await asyncio.create_subprocess_exec(
            "bash", "-c", f"exec {localized(line, self.port)}", cwd=self.folder, env={**os.environ, **self.environment},
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip


@pytest.fixture
async def walk(tmp_path: Path, process: Process) -> Walk:
    if shutil.which("curl") is None or shutil.which("awk") is None:
        pytest.skip("the README's commands need curl and awk")
    process.arguments = ("--port", str(unused_port()))
    await process.start()
    return Walk(tmp_path, process, *await process.read_first_start())


async def test_five_minute_walk_is_true(walk: Walk) -> None:
    blocks = BLOCK.findall(section("Five minutes: a chart of this machine"))
    assert [kind for kind, _ in blocks] == ["sh", "text", "sh", "sh", "json", "sh", "json", "sh", "json", "sh", "text"]
    server, printed, device, listing, listed, latest, reading, buckets, charted, chart, drawn = (text for _, text in blocks)
    assert server == ".venv/bin/python iiot.py\n"
    assert re.sub(r"_[\w…-]+", "_", printed) == re.sub(r"_[\w…-]+", "_", (await first_start(walk)))
    running = await walk.start(device.strip())
    try:
        async with asyncio.timeout(PATIENCE):
            while '"cpu_percent"' not in await walk.run(latest.replace("curl -s", "curl -s --retry 5")):
                await asyncio.sleep(0.05)
        assert shape(json.loads(await walk.run(listing))) == shape(json.loads(listed))
        seen, shown = json.loads(await walk.run(latest)), json.loads(reading)
        assert shape({**seen, "latest": None}) == shape({**shown, "latest": None})
        assert set(shown["latest"]) <= set(seen["latest"]) | {m for m in shown["latest"] if "network" in m}
        assert shape(json.loads(await walk.run(buckets))) == shape(json.loads(charted))
        line = re.compile(r"\d\d:\d\d:\d\d +\d+\.\d\d #*")
        for text in (await walk.run(chart), drawn):
            assert text
            assert all(line.fullmatch(row) for row in text.splitlines()), text
    finally:
        running.terminate()
        await running.wait()
    token_file = walk.folder / "pump-house.token"
    assert token_file.stat().st_mode & 0o777 == 0o600


async def first_start(walk: Walk) -> str:
    """What a first start prints on the README's own port's behalf."""
    folder = walk.folder / "fresh"
    folder.mkdir()
    fresh = Process(folder)
    await fresh.start()
    await fresh.read_first_start()
    await fresh.stop()
    printed = fresh.printed.replace(fresh.url, "http://127.0.0.1:8080")
    return printed.replace(f"{sys.executable} {ROOT / 'agent.py'}", ".venv/bin/python agent.py")


async def test_more_to_do_is_true(walk: Walk) -> None:
    (walk.folder / "recording.csv").write_text("time;level;flow\n2026-01-01 00:00:00;1.5;2\n2026-01-01 00:00:01;1.25;3\n")
    replay, mint, register, configure, rotate, tenants = (text for _, text in BLOCK.findall(section("More to do")))
    await walk.run(replay)
    viewer, key = (await walk.run(mint)).split()
    assert viewer.startswith("iiot_op_")
    assert key.startswith("iiot_prov_")
    registered, events = (json.loads(line) for line in (await walk.run(register)).splitlines())
    assert registered["device"] == "press-7"
    assert [event["kind"] for event in events["items"]] == ["credentials"]
    running = await walk.start('.venv/bin/python agent.py --url http://127.0.0.1:8080 --key "$KEY" --name pump-house')
    try:
        first, rest = configure.split("\n", 1)
        async with asyncio.timeout(PATIENCE):
            while "hostname" not in await walk.run(first):
                await asyncio.sleep(0.05)
        verdict, shown, timeline = (json.loads(line) for line in (await walk.run(rest)).splitlines())
        assert verdict == {"device": "pump-house", "version": 1, "status": "applied"}
        assert (shown["document"], shown["applied"], shown["drift"]) == ({"limits": {"pressure": 8.5}}, 1, False)
        assert {"config", "state", "connected"} <= {event["kind"] for event in timeline["items"]}
    finally:
        running.terminate()
        await running.wait()


    rotated, patched, *entries = (json.loads(line) for line in (await walk.run(rotate)).splitlines())
    assert rotated["token"].startswith("iiot_dev_")
    assert (patched["disabled"], patched["labels"]) == (True, {"line": "3"})
    assert [(entry["action"], entry["outcome"]) for entry in entries] == [
        ("device.register", "ok"), ("device.token", "ok"), ("device.update", "ok"),
    ]  # fmt: skip
    made, listed = (json.loads(line) for line in (await walk.run(tenants)).splitlines())
    assert made["name"] == "acme"
    quotas = {item["name"]: item["quotas"] for item in listed["items"]}
    assert quotas["acme"]["devices"] == {"used": 0, "limit": 500}
    assert quotas["default"]["devices"]["used"] >= 3


def test_actions_are_the_readme_s() -> None:
    shown = re.search(r"Actions: (.*?)\.\n", section("HTTP contract"), re.DOTALL)
    assert shown is not None
    of_devices = {"device.provision"}  # at the socket, not at a route
    assert set(re.findall(r"`([a-z.]+)`", shown[1])) == {route.action for route in iiot.ROUTES if route.action} | of_devices


def test_install_and_test_lines_stand_once() -> None:
    """The lines that .ci/run takes out of the README."""
    assert len(re.findall(r"^python3 -m venv .*pytest$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^python3 -m venv .*iiot\.py$", README, re.MULTILINE)) == 1


def test_routes_are_the_readme_s() -> None:
    shown = [(*row[0].split(" "), row[1]) for row in table(section("HTTP contract"), "route")]
    assert shown == [(route.method, route.path, route.role) for route in iiot.ROUTES]


def test_faults_are_the_readme_s() -> None:
    shown = table(section("HTTP contract"), "code")
    assert shown == [[fault.code, str(fault.status), str(fault.close), fault.message] for fault in iiot.FAULTS.values()]


@pytest.mark.parametrize(
    ("title", "options"), [("Server settings", attrs.fields(iiot.Settings)), ("Device agent", dataclasses.fields(agent.Options))]
)
def test_options_are_the_readme_s(title: str, options: tuple[Any, ...]) -> None:
    expected = [
        [f"--{option.name.replace('_', '-')}", f"IIOT_{option.name.upper()}", str(option.default), option.metadata["help"]]
        for option in options
    ]
    assert table(section(title), "flag") == expected


def test_frames_of_devices_are_the_readme_s() -> None:
    assert {row[0] for row in table(section("Wire contract of devices"), "device sends")} == set(iiot.FRAMES)


def test_dependencies_are_the_readme_s() -> None:
    listed = {row[0] for row in table(section("Dependencies"), "package")}
    declared = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert listed == set(re.findall(r'"([a-z\[\]]+)>=', declared[1]))


async def test_help_names_every_flag(tmp_path: Path) -> None:
    server = await command("serve", "--help", folder=tmp_path)
    device = await agent_command("--help", folder=tmp_path)
    for (code, out, _), options in ((server, attrs.fields(iiot.Settings)), (device, dataclasses.fields(agent.Options))):
        assert code == 0
        for option in (*options,):
            assert f"--{option.name.replace('_', '-')} " in out
