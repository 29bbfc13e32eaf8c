"""The README as the tests read it: its headings, tables and blocks, and a terminal in which its commands run."""

from __future__ import annotations

import asyncio
import getpass
import grp
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from plant import PATIENCE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNABLE = {"sh", "python", "js", "ini", "nginx", "caddy", "rsyslog", "yaml"}


@attrs.frozen
class Block:
    """A fenced block: its language, and its text."""

    kind: str
    text: str


@attrs.define
class Section:
    """What stands under one heading, up to the next heading."""

    rank: int
    title: str
    text: str = ""
    blocks: list[Block] = attrs.field(factory=list)


def parse(page: str) -> Iterator[Section]:
    section, block = Section(0, ""), None
    for line in page.splitlines(keepends=True):
        heading = re.fullmatch(r"(#+) (.*)\n", line)
        if block is not None:
            if line == "```\n":
                section.blocks.append(block)
                block = None
            else:
                block = Block(block.kind, block.text + line)
        elif line.startswith("```"):
            block = Block(line.strip("`\n"), "")
        elif heading is not None:
            yield section
            section = Section(len(heading[1]), heading[2])
        else:
            section.text += line
    yield section


SECTIONS = list(parse(README))


def section(title: str) -> Section:
    (found,) = [section for section in SECTIONS if section.title == title]
    return found


def part(number: int) -> list[Section]:
    """A numbered part of the page: its own section and those under it."""
    starts = [index for index, section in enumerate(SECTIONS) if section.rank == 2] + [len(SECTIONS)]
    first = next(index for index in starts[:-1] if SECTIONS[index].title.startswith(f"{number}. "))
    return SECTIONS[first : starts[starts.index(first) + 1]]


def blocks(title: str, *kinds: str) -> list[str]:
    """The texts of a section's blocks; of the kinds, if any are named."""
    return [block.text for block in section(title).blocks if not kinds or block.kind in kinds]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose head starts with `first`, without the marks of code."""
    lines = text[text.index(f"| {first} |") :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def anchor(title: str) -> str:
    """The address of a heading on the page, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def shape(value: Any) -> Any:
    """What a JSON value is made of: keys, and the kinds of values, whatever their number and size. What changed in a state is the
    machine's own."""
    if isinstance(value, dict):
        return {key: "any" if key in ("from", "to") else shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def answers(text: str) -> list[Any]:
    """The JSON of every line."""
    return [json.loads(line) for line in text.splitlines()]


def as_root(text: str, root: Path) -> str:
    """Commands of the page with a folder in the place of the machine's own, and this user in the place of the service's. Only systemd does
    not run there."""
    user, group = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
    text = re.sub(r"-o \w+ -g \w+", f"-o {user} -g {group}", text)
    text = text.replace("sudo useradd ", f"{'' if os.geteuid() == 0 else 'sudo '}useradd --prefix {root} ")
    text = text.replace("sudo systemctl enable --now ", f"systemctl --root={root} enable ")
    text = re.sub(r"^sudo systemctl (restart|reload|start|stop) [\w.-]+$", "true", text, flags=re.MULTILINE)
    text = re.sub(r"sudo (-u \w+ )?", "", text)
    return re.sub(r"(?<![\w/])(?=/(opt|var|etc)/)", str(root), text)


def strays(folder: Path, *others: str) -> list[str]:
    """What git would keep of that which the page's commands made in a folder; `others` are those that a test made there."""
    if shutil.which("git") is None:
        pytest.skip("what git ignores is asked of git")
    subprocess.run(["git", "init", "-q", folder], check=True)
    words = ["git", "-C", str(folder), "ls-files", "--others", f"--exclude-from={ROOT / '.gitignore'}"]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return [path for path in found if not path.startswith((".errors", ".exports", "stderr", *others))]


class Terminal:
    """A shell in one folder. What one command exports, the next command has. Each leaves the folder and the umask as they were: whoever
    reads the page goes on in the same shell."""

    def __init__(self, folder: Path, replace: dict[str, str] | None = None) -> None:
        """`replace`: what stands on the page, and what a test has in its place."""
        self.folder = folder
        self.replace = dict(replace or {})
        self._running: list[asyncio.subprocess.Process] = []
        self._exports = folder / ".exports"
        self._exports.touch()

    def localized(self, text: str) -> str:
        for shown, real in self.replace.items():
            text = text.replace(shown, real)
        text = re.sub(r"(?<!\S)\.venv/bin/pip ", f"{sys.executable} -m pip ", text)
        text = re.sub(r"(?<![\w/])\.venv/bin/python ", f"{sys.executable} ", text)
        return re.sub(rf"(?<={re.escape(sys.executable)} )(iiot|agent)\.py", rf"{ROOT}/\1.py", text)

    async def attempt(self, text: str) -> tuple[int, str, str]:
        """Run commands; exit code, standard output, standard error."""
        exports = shlex.quote(str(self._exports))
        same = 'test "$PWD $(umask)" = "$before" || { echo "left the folder or the umask changed" >&2; exit 99; }'
        script = f'source {exports}\nset -e\nbefore="$PWD $(umask)"\n{self.localized(text)}\n{same}\nexport -p > {exports}\n'
        process = await asyncio.create_subprocess_exec(
            "bash", "-o", "pipefail", "-c", script, cwd=self.folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(300):
            out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def run(self, text: str) -> str:
        """Run commands that must succeed; their standard output."""
        code, out, err = await self.attempt(text)
        assert code == 0, (text, code, out, err)
        return out

    async def start(self, text: str) -> asyncio.subprocess.Process:
        """Start a command that goes on until it is stopped."""
        script = f"source {shlex.quote(str(self._exports))}\nexec {self.localized(text)}"
        with (self.folder / ".errors").open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                "bash", "-c", script, cwd=self.folder, stdout=asyncio.subprocess.PIPE, stderr=errors
            )
        self._running.append(process)
        return process

    async def stop(self, *processes: asyncio.subprocess.Process, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop commands; all that run if none is named."""
        for process in processes or tuple(self._running):
            if process.returncode is None:
                process.send_signal(number)
            async with asyncio.timeout(PATIENCE):
                await process.communicate()

    async def until(self, text: str, wanted: Any) -> Any:
        """Ask by a command until the JSON of its answer is as wanted."""
        async with asyncio.timeout(PATIENCE):
            while True:
                code, out, _ = await self.attempt(text)
                if code == 0 and out and wanted(body := json.loads(out)):
                    return body
                await asyncio.sleep(0.05)

    async def follow(self, title: str, first: int = 0) -> list[str]:
        """Run every command of a section from a block on, and compare what it prints with what the page shows; the outputs."""
        outputs: list[str] = []
        for block in section(title).blocks[first:]:
            if block.kind == "sh":
                outputs.append(await self.run(block.text))
            elif block.kind == "json":
                assert list(map(shape, answers(outputs[-1]))) == list(map(shape, answers(block.text))), (title, outputs[-1])
            elif block.kind == "text":
                assert outputs[-1] == block.text, title
        return outputs
