"""The README's two device programs, as a reader saves and runs them: nothing is lost when the server is killed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import unused_port
from plant import PATIENCE, ROOT, Plant, Process
from readme import Terminal, answers, blocks, shape, strays

MODULES = ROOT / ".node" / "node_modules"  # .ci/run puts the package ws there, by the README's own line
# What stands on the page, and what a test needs: readings that can be counted, and more of them.
COUNTED = {
    "device.py": {"20 + random.random()": "next(count)", "\nkept = ": "\nimport itertools; count = itertools.count()\nkept = "},
    "device.js": {"20 + Math.random()": "count++", "\nconst fresh = ": "\nlet count = 0;\nconst fresh = "},
}
DEVICES = {"mixer-1": "device.py", "mixer-2": "device.js"}
PAGES = {"device.py": "A device in Python", "device.js": "A device in JavaScript"}


@pytest.fixture
async def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Terminal]:
    """A folder with both programs in it, and a shell there."""
    if find_spec("websockets") is None or shutil.which("node") is None or not (MODULES / "ws").is_dir():
        pytest.skip("the README's device programs need websockets, node and ws")
    for name, title in PAGES.items():
        (text,) = blocks(title, "python", "js")
        for shown, counted in COUNTED[name].items():
            assert text.count(shown) == 1, shown
            text = text.replace(shown, counted)
        text, intervals = re.subn(r'("?interval"?: )1\b', r"\g<1>0.05", text)
        assert intervals == 1
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("NODE_PATH", str(MODULES))
    running = Terminal(tmp_path)
    try:
        yield running
    finally:
        await running.stop()
        assert strays(tmp_path) == []


async def prepared(terminal: Terminal, name: str, url: str, key: str) -> str:
    """The command that runs a program, after those of the page before it. The package of JavaScript is there already."""
    (text,) = blocks(PAGES[DEVICES[name]], "sh")
    (shown,) = re.findall(r"iiot_prov_\w+…", text)
    terminal.replace |= {"http://127.0.0.1:8080": url, shown: key}
    *before, start = text.splitlines()
    await terminal.run("\n".join(line for line in before if not line.startswith("npm ")))
    return start


async def until_printed(program: asyncio.subprocess.Process, *words: str) -> None:
    """Read what a program prints until all of these have come."""
    assert program.stdout is not None
    printed = ""
    async with asyncio.timeout(PATIENCE):
        while not all(word in printed for word in words):
            line = await program.stdout.readline()
            assert line, printed
            printed += line.decode()


@pytest.mark.long
async def test_what_is_missing_and_what_is_refused_is_told_in_words(terminal: Terminal, process: Process) -> None:
    await process.start()
    token, key = await process.read_first_start()
    starts = {name: await prepared(terminal, name, process.url, key) for name in sorted(DEVICES)}
    await asyncio.gather(*(check_words(terminal, process, token, key, name, start) for name, start in starts.items()))


async def check_words(terminal: Terminal, process: Process, token: str, key: str, name: str, start: str) -> None:
    for variable in ("IIOT_URL", "IIOT_KEY"):
        assert await terminal.attempt(f"env -u {variable} {start}") == (1, "", f"The variable {variable} is not set.\n")
    program = await terminal.start(f"env IIOT_KEY={key[:-1]} {start}")
    await until_printed(program, "unauthorized", "A valid token is needed.")
    await terminal.stop(program)
    async with ClientSession() as client:
        plant = process.plant(client, token)
        await plant.register(name)
        program = await terminal.start(start)
        await until_printed(program, "device_exists", "A device of this name is registered already.")
        assert (await plant.ask("DELETE", f"/iiot/{name}"))[0] == 204
        await every_reading(plant, name, 1)
        assert (await plant.ask("PATCH", f"/iiot/{name}", {"disabled": True}))[0] == 200
        await until_printed(program, "device_disabled", "The device is disabled.")


async def every_reading(plant: Plant, name: str, wanted: int) -> list[float]:
    """The counted readings of a device in the order of their times, once it is there and so many are on disk."""
    await plant.until("/iiot?limit=10", lambda body: name in [item["device"] for item in body["items"]])
    path = f"/iiot/{name}/telemetry?metric=temperature&limit=10000"
    body = await plant.until(path, lambda body: body["series"] and len(body["series"][0]["points"]) >= wanted)
    return [value for _, value in body["series"][0]["points"]]


@pytest.mark.long
async def test_both_programs_lose_nothing_and_apply_what_is_pushed(terminal: Terminal, process: Process, tmp_path: Path) -> None:
    process.arguments = ("--port", str(unused_port()))
    await process.start()
    token, key = await process.read_first_start()
    await terminal.run(f"export TOKEN={token}")
    programs = {name: await terminal.start(await prepared(terminal, name, process.url, key)) for name in DEVICES}
    async with ClientSession() as client:
        plant = process.plant(client, token)
        for name in DEVICES:
            await every_reading(plant, name, 20)
        await process.stop(signal.SIGKILL)
        await process.start()
        plant = process.plant(client, token)
        push, pushed, look = blocks("Try both programs")
        for name in DEVICES:
            await plant.until(f"/iiot/{name}", lambda body: body["connected"])
            counted = await every_reading(plant, name, 150)
            assert counted == list(range(len(counted))), name
            stored = json.loads(await terminal.run(look.replace("mixer-1", name).replace("from=-5m", "from=-5m&limit=10000")))
            assert len(stored["series"][0]["points"]) >= len(counted)
        outcome = await terminal.run(push)
        assert list(map(shape, answers(outcome))) == list(map(shape, answers(pushed)))
        assert [item["status"] for item in json.loads(outcome)["items"]] == ["applied", "applied"]
        await the_welcome_carries_what_was_pushed_meanwhile(terminal, plant, tmp_path, programs)


async def the_welcome_carries_what_was_pushed_meanwhile(
    terminal: Terminal, plant: Plant, folder: Path, programs: dict[str, asyncio.subprocess.Process]
) -> None:
    for name, program in DEVICES.items():
        await terminal.stop(programs[name])
        assert json.loads((folder / f"{name}.json").read_text())["config"] == {"interval": 0.5}
        await plant.until(f"/iiot/{name}", lambda body: not body["connected"])
        assert (await plant.ask("POST", f"/iiot/{name}", {"interval": 0.2}))[1]["status"] == "pending"
        again = f"{'.venv/bin/python' if program.endswith('py') else 'node'} {program}"
        await terminal.start(f"env -u IIOT_KEY {again}")  # the token is kept
        await plant.until(f"/iiot/{name}/config", lambda body: body["status"] == "applied")
        assert json.loads((folder / f"{name}.json").read_text())["config"] == {"interval": 0.2}
        assert (await plant.ask("POST", f"/iiot/{name}?wait=10", {"interval": "often"}))[1]["status"] == "rejected"
        assert {path.stat().st_mode & 0o777 for path in folder.glob(f"{name}.*")} == {0o600}
