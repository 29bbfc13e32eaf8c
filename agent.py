# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14",
# ]
# ///
"""The reference device of the Industrial-IoT platform: this machine's readings or a recorded file, sent over one WebSocket.

One file that needs aiohttp alone, so that a device needs none of the server's packages. It knows the server by the wire
contract in README.md and by nothing else. The file reads bottom-up: a section uses only sections above it.

    Limits and options   what the agent can be told, and the bounds that it keeps
    Rules                pure functions: values, times, differences of documents
    Recordings           a recorded file, row by row
    Machine              this machine's own readings, and what it is
    Files                what the agent keeps on the disk
    Configuration        the command that applies a configuration
    Spool                frames until the server has them on disk
    Agent                the session with the server, and coming back to it
    Command line         python agent.py …
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import functools
import json
import logging
import os
import platform as host
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from aiohttp import ClientError, ClientSession, ClientTimeout, ClientWebSocketResponse, WSMsgType

if sys.platform != "win32":
    import fcntl

VERSION: Final = "0.1.0"
Value = float | int | str

log = logging.getLogger("iiot")


# ==== Limits and options ====
# Owns: what the agent can be told (Options: one field per flag and IIOT_* variable) and the bounds that it keeps.
# Must not know: anything else.

ON_CONFIG_SECONDS: Final = 50.0  # for the command: less than the server waits for the verdict
MESSAGE_CHARACTERS: Final = 1000  # of what the command says, in the verdict
REPLAY_ROWS: Final = 50  # of a recorded file in one frame
REPLAY_BYTES: Final = 256 * 1024  # likewise, well within what a frame may have
HELD_SECONDS: Final = 60.0  # at most, after `throttled`: the quota may be raised, and until then the server just does not read
PERMANENT: Final = (4400, 4401, 4403)  # close codes after which trying again is of no use
CLOSED: Final = frozenset((WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR))
INTEGERS: Final = 2**63  # SQLite's integers, and every JSON parser's that matters
FURTHEST: Final = 1e11  # seconds: the fifth millennium
SECRET: Final = re.compile(r"(iiot_(?:dev|op|prov)_[0-9a-f]{16}_)[A-Za-z0-9_-]+")


class AgentError(Exception):
    """The agent cannot go on; the text is for the person who started it."""


def redacted(text: str) -> str:
    """`text` without the secret part of any token or key in it."""
    return SECRET.sub(r"\1…", text)


def setting(default: Any, text: str, good: Callable[[Any], object] | None = None, rule: str = "") -> Any:
    """One field of the options: its default, the help text that the command line and the README show, and what it must be."""
    return field(default=default, metadata={"help": text, "good": good, "rule": rule})


def positive(number: float) -> bool:
    return 0 < number < float("inf")


@dataclass(frozen=True)
class Options:
    """What `python agent.py` is told. One of `key` and `token` is needed until the token file is there."""

    url: str = setting(
        "http://127.0.0.1:8080", "address of the server", lambda url: re.fullmatch(r"(http|ws)s?://\S+", url), "http://… or https://…"
    )
    key: str = setting("", "provisioning key, for the first start")
    name: str = setting("", "name to be provisioned under (this machine's host name)")
    token: str = setting("", "device token, instead of a key")
    token_file: str = setting("", "where the token is kept, mode 0600 (NAME.token in this folder)")
    on_config: str = setting("", "command that is given a new configuration on standard input: exit 0 applies it, all else rejects it")
    config_file: str = setting("", "where the applied configuration is kept (NAME.config.json in this folder)")
    interval: float = setting(5.0, "seconds between two readings", positive, "above 0")
    spool: int = setting(10_000, "frames kept while offline; then the oldest are dropped", positive, "at least 1")
    replay: str = setting("", "send a recorded CSV instead: first column a time, the rest metrics; comma or semicolon")
    speed: float = setting(
        0.0,
        "of --replay: 1 is the recording's own pace, 10 ten times it, 0 as fast as the server acknowledges",
        lambda speed: 0 <= speed < float("inf"),
        "0 or above",
    )
    log_level: str = setting(
        "info",
        "debug, info, warning or error; logs go to standard error",
        ("debug", "info", "warning", "error").__contains__,
        "debug, info, warning or error",
    )


# ==== Rules ====
# Owns: pure functions: values, times, differences of documents. Must not know: files, sockets.

INTEGER: Final = re.compile(r"[+-]?[0-9]{1,40}")
REAL: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def same(one: object, other: object) -> bool:
    """Whether two JSON values are equal; unlike in Python, 1, 1.0 and true are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def merge_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch that leads from one document to the other; neither holds null."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            if inner := merge_difference(before, value):
                patch[name] = inner
        elif name not in old or not same(before, value):
            patch[name] = value
    return patch


def backoff(attempt: int, most: float, jitter: float) -> float:
    """Seconds before attempt number `attempt` (from 0): doubling from half a second, spread over its whole width by
    `jitter` in 0 to 1, so that a fleet does not come back in step (AWS Architecture Blog, Exponential Backoff and Jitter)."""
    return min(most, 0.5 * 2.0 ** min(attempt, 16)) * jitter


def parse_cell(text: str) -> Value | None:
    """A value of a recorded file: integer, real or text; None for an empty cell, or a number that has no value."""
    text = text.strip()
    if INTEGER.fullmatch(text):
        whole = int(text)
        return whole if -INTEGERS <= whole < INTEGERS else None
    if REAL.fullmatch(text):
        real = float(text)
        return real if abs(real) < float("inf") else None
    return text or None


def parse_recorded_time(text: str) -> int:
    """Milliseconds of a recorded time: ISO 8601 (UTC where it names no zone) or seconds since 1970. ValueError."""
    text = text.strip()
    if REAL.fullmatch(text):
        seconds = float(text)
        if not abs(seconds) < FURTHEST:
            raise ValueError(f"{text} is no time")
        return round(seconds * 1000)
    moment = datetime.fromisoformat(text)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


# ==== Recordings ====
# Owns: a recorded file, row by row. Must not know: sockets.


class Recording:
    """A recorded CSV file, row by row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self.rows = max(0, sum(1 for line in file if line.strip()) - 1)
        except OSError as error:
            raise AgentError(f"cannot read {path}: {error.strerror}") from error

    def samples(self) -> Iterator[dict[str, Any]]:
        """Samples in the file's order. AgentError at the line where the file breaks off or is not as its header says."""
        line = 1
        try:
            with self._path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                first = file.readline()
                delimiter = ";" if first.count(";") > first.count(",") else ","
                header = self._header(next(csv.reader([first], delimiter=delimiter), []))
                rows = csv.reader(file, delimiter=delimiter, strict=True)
                while True:
                    line = rows.line_num + 2
                    row = next(rows, None)
                    if row is None:
                        return
                    line = rows.line_num + 1
                    if row:
                        yield self._sample(header, row)
        except (ValueError, csv.Error) as error:
            raise AgentError(f"{self._path}: line {line}: {error}") from error

    @staticmethod
    def _header(names: list[str]) -> list[str]:
        metrics = [name.strip() for name in names[1:]]
        if not metrics or not all(metrics) or len(set(metrics)) < len(metrics):
            raise ValueError("needs a time column and one or more metrics, each with a name of its own")
        return metrics

    @staticmethod
    def _sample(header: list[str], row: list[str]) -> dict[str, Any]:
        if len(row) != len(header) + 1:
            raise ValueError(f"{len(row)} columns where the header has {len(header) + 1}")
        if any("\udc80" <= mark <= "\udcff" for cell in row for mark in cell):
            raise ValueError("is not UTF-8")
        values = {name: parse_cell(cell) for name, cell in zip(header, row[1:], strict=True)}
        return {"ts": parse_recorded_time(row[0]), "values": {name: value for name, value in values.items() if value is not None}}


# ==== Machine ====
# Owns: this machine's own readings, and what it is. Must not know: where they go.


def read_numbers(path: str) -> list[int]:
    """The first line's numbers of a file of /proc or /sys; none where the system has no such file."""
    try:
        return [int(word) for word in Path(path).read_text().splitlines()[0].split() if word.lstrip("-").isdigit()]
    except (OSError, IndexError):
        return []


def read_table(path: str) -> dict[str, list[str]]:
    """Lines `name: words…` of a file of /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): words.split() for name, colon, words in (line.partition(":") for line in lines) if colon}


class Readings:
    """This machine's own readings, as far as its system tells them."""

    def __init__(self) -> None:
        self._processor = read_numbers("/proc/stat")

    def take(self) -> dict[str, float | int]:
        values: dict[str, float | int] = {}
        with suppress(OSError, AttributeError):
            values["load_1m"] = round(os.getloadavg()[0], 2)
        with suppress(OSError):
            disk = shutil.disk_usage("/")
            values["disk_used_percent"] = round(100 * disk.used / disk.total, 2)
        return values | self._processor_use() | self._memory() | self._network() | self._temperatures()

    def _processor_use(self) -> dict[str, float | int]:
        before, self._processor = self._processor, read_numbers("/proc/stat")
        spent = [now - then for now, then in zip(self._processor, before, strict=False)]
        if len(spent) < 5 or sum(spent[:8]) <= 0:
            return {}
        idle = spent[3] + spent[4]  # idle and waiting for input or output: proc(5)
        return {"cpu_percent": round(100 * (1 - idle / sum(spent[:8])), 1)}

    def _memory(self) -> dict[str, float | int]:
        table = read_table("/proc/meminfo")
        if "MemTotal" not in table or "MemAvailable" not in table:
            return {}
        total, available = int(table["MemTotal"][0]), int(table["MemAvailable"][0])
        return {"memory_used_percent": round(100 * (1 - available / total), 2), "memory_available_bytes": available * 1024}

    def _network(self) -> dict[str, float | int]:
        links = [words for name, words in read_table("/proc/net/dev").items() if name != "lo" and len(words) > 8]
        if not links:
            return {}
        return {
            "network_received_bytes": sum(int(words[0]) for words in links),
            "network_sent_bytes": sum(int(words[8]) for words in links),
        }

    def _temperatures(self) -> dict[str, float | int]:
        zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*"))
        read = {zone.name.removeprefix("thermal_zone"): read_numbers(f"{zone}/temp") for zone in zones}
        return {f"temperature_{zone}_celsius": numbers[0] / 1000 for zone, numbers in read.items() if numbers}


def network_addresses() -> dict[str, list[str]]:
    """The addresses of every interface that has any, as far as the system tells."""
    addresses: dict[str, list[str]] = {}
    if sys.platform == "linux":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has none
                    answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))  # SIOCGIFADDR: netdevice(7)
                    addresses[name] = [socket.inet_ntoa(answer[20:24])]
        with suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                words = line.split()
                addresses.setdefault(words[5], []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])))
    return addresses


def describe_machine() -> dict[str, Any]:
    """What this machine is."""
    return {
        "hostname": socket.gethostname(),
        "operating_system": host.platform(),
        "kernel": host.release(),
        "python": host.python_version(),
        "software_version": VERSION,
        "addresses": network_addresses(),
    }


# ==== Files ====
# Owns: what the agent keeps on the disk: its token and the applied configuration. Must not know: sockets.


def write_beside(path: Path, text: str, mode: int) -> Path:
    """A file beside `path`, on the disk, to be moved into its place: so a crash leaves the whole file or none. OSError."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return beside


class TokenFile:
    """Where the agent keeps its token, for its own eyes only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str:
        """The token, empty without a file. AgentError when the file cannot be used."""
        try:
            return self._path.read_text().strip()
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            raise AgentError(f"cannot read {self._path}: {error}") from error

    def check(self) -> None:
        """AgentError when no token could be kept: to be asked before one is minted, for it is shown but once."""
        self._write("").unlink()

    def write(self, token: str) -> None:
        """Written beside and moved into place, so that a crash leaves the whole file or none."""
        self._write(token).replace(self._path)

    def _write(self, token: str) -> Path:
        try:
            return write_beside(self._path, token + "\n", 0o600)
        except OSError as error:
            raise AgentError(f"cannot keep a token in {self._path}: {error.strerror}") from error


class AppliedConfig:
    """The configuration that was applied last, in a file: {version, document}."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[int, object]:
        """Version and document, 0 and None when none was applied. AgentError when the file cannot be used."""
        try:
            kept = json.loads(self._path.read_text())
            return int(kept["version"]), kept["document"]
        except FileNotFoundError:
            return 0, None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise AgentError(f"cannot use {self._path}: {error}") from error

    def write(self, version: int, document: object) -> None:
        """Written beside and moved into place, so that a crash leaves the whole file or none. OSError."""
        write_beside(self._path, json.dumps({"version": version, "document": document}, indent=2) + "\n", 0o666).replace(self._path)


# ==== Configuration ====
# Owns: the command that applies a configuration. Must not know: the wire.


async def run_on_config(command: str, document: object) -> tuple[str, str]:
    """Give a configuration to the command: the verdict, and what it says on standard error if it rejects it.

    What it says goes through a file: a pipe would stay open as long as any process that the command leaves behind.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as given:
        given.write(json.dumps(document).encode())
        given.seek(0)
        process = await asyncio.create_subprocess_shell(
            command, stdin=given, stdout=asyncio.subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        try:
            async with asyncio.timeout(ON_CONFIG_SECONDS):
                code = await process.wait()
        except TimeoutError:
            return "rejected", f"the command took longer than {ON_CONFIG_SECONDS:.0f} s"
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if code == 0:
            return "applied", ""
        said.seek(0)
        text = said.read().decode(errors="replace").replace("\0", "").strip()
        return "rejected", text[-MESSAGE_CHARACTERS:] or f"exit code {code}"


# ==== Spool ====
# Owns: frames from their making until the server has them on disk, and their numbers. Must not know: sockets.


class Spool:
    """Frames from their making until the server has them on disk; bounded. A frame is numbered when it is first sent."""

    def __init__(self, most: int) -> None:
        self._frames: deque[dict[str, Any]] = deque()
        self._most = most
        self._sent = 0
        self._seq = 0
        self._changed = asyncio.Condition()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._frames)

    async def put(self, frame: dict[str, Any]) -> None:
        """Keep a frame; where there is no room, let go of the oldest."""
        async with self._changed:
            if len(self._frames) >= self._most:
                self._frames.popleft()
                self._sent = max(0, self._sent - 1)
                self.dropped += 1
            self._frames.append(frame)
            self._changed.notify_all()

    async def next(self) -> dict[str, Any]:
        """The next frame to send, numbered."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._sent < len(self._frames))
            frame = self._frames[self._sent]
            self._sent += 1
            if "seq" not in frame:
                self._seq += 1
                frame["seq"] = self._seq
            return frame

    async def acknowledge(self, seq: int) -> int:
        """Let go of every frame up to `seq`; how many samples were in them."""
        samples = 0
        async with self._changed:
            while self._frames and self._frames[0].get("seq", seq + 1) <= seq:
                samples += len(self._frames.popleft().get("samples", ()))
                self._sent = max(0, self._sent - 1)
            self._changed.notify_all()
        return samples

    async def refuse(self, seq: int) -> list[dict[str, Any]]:
        """The server does not take this frame; the samples that are lost with it."""
        async with self._changed:
            frame = next((frame for frame in self._frames if frame.get("seq") == seq), {})
            lost: list[dict[str, Any]] = frame.get("samples", [])
            if lost:
                frame["samples"] = []
            return lost

    async def resume(self, seq: int) -> int:
        """A new session: what lies above the server's `seq` is sent again, and numbering goes on above it. How many samples
        turn out to be stored."""
        samples = await self.acknowledge(seq)
        self._seq = max(self._seq, seq)
        self._sent = 0
        return samples

    async def at_most(self, frames: int) -> None:
        """Wait until no more than so many frames are kept."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._frames) <= frames)


# ==== Agent ====
# Owns: the session with the server, and coming back to it. Must not know: the server's insides; it speaks the wire contract alone.


@asynccontextmanager
async def closing_link(link: ClientWebSocketResponse) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await link.close()


class Agent:
    """Holds a session to the server, and comes back when it breaks."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._name = options.name or re.sub(r"[^A-Za-z0-9._:-]", "-", socket.gethostname())[:64] or "device"
        self._token_file = TokenFile(Path(options.token_file or f"{self._name}.token"))
        self._token = options.token or self._token_file.read()
        self._spool = Spool(options.spool)
        self._applied = AppliedConfig(Path(options.config_file or f"{self._name}.config.json"))
        self._config_version, self._config_document = self._applied.read()
        self._reported: dict[str, Any] | None = None
        self._held_until = 0.0  # until then the server takes nothing
        self._wanted: dict[str, Any] | None = None  # the newest configuration that was not looked at yet
        self._wanted_changed = asyncio.Event()
        self._report = asyncio.Event()
        self._delivered = 0
        self._refused = 0
        self._dropped = 0
        if not self._token and not options.key:
            raise AgentError("needs --key (a provisioning key) or --token for the first start")

    async def run(self) -> None:
        """Until the recording is delivered, or for ever. AgentError when the server refuses the device."""
        source = asyncio.create_task(self._replay() if self._options.replay else self._observe(), name="source")
        link = asyncio.create_task(self._stay_connected(), name="link")
        configure = asyncio.create_task(self._apply_configs(), name="configure")
        try:
            await asyncio.wait((source, link, configure), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (source, link, configure):
                task.cancel()
            outcomes = await asyncio.gather(source, link, configure, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _observe(self) -> None:
        """A reading now, at every interval, and when the server asks."""
        readings = Readings()
        while True:
            self._report.clear()
            await self._spool.put({"type": "telemetry", "samples": [{"ts": now_ms(), "values": readings.take()}]})
            await self._report_state()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.interval):
                    await self._report.wait()

    async def _report_state(self) -> None:
        """What this machine is, whole at the first time, then what changed."""
        state = {**describe_machine(), "config_version": self._config_version}
        if self._reported is None:
            await self._spool.put({"type": "state", "mode": "replace", "reported": state})
        elif changed := merge_difference(self._reported, state):
            await self._spool.put({"type": "state", "reported": changed})
        self._reported = state

    async def _apply_configs(self) -> None:
        """Apply the newest configuration that came, answer, then report the state that follows from it."""
        while True:
            await self._wanted_changed.wait()
            self._wanted_changed.clear()
            wanted, self._wanted = self._wanted, None
            if wanted is not None:
                await self._apply_config(wanted["version"], wanted["document"])

    async def _apply_config(self, version: int, document: object) -> None:
        status, message = "applied", ""
        known = version == self._config_version and same(document, self._config_document)
        if self._options.on_config and not known:
            await self._spool.put({"type": "config_status", "version": version, "status": "in_progress"})
            status, message = await run_on_config(self._options.on_config, document)
        if status == "applied":
            try:
                self._applied.write(version, document)
            except OSError as error:
                status, message = "rejected", f"cannot keep it: {error.strerror}"
        log.info("configuration %d %s %s", version, status, message)
        verdict: dict[str, Any] = {"type": "config_status", "version": version, "status": status}
        await self._spool.put({**verdict, "message": message} if message else verdict)
        if status == "applied":
            self._config_version, self._config_document = version, document
            await self._report_state()

    def _want(self, config: dict[str, Any] | None) -> None:
        if config is not None:
            self._wanted = config
            self._wanted_changed.set()

    async def _replay(self) -> None:
        """Send the recording, and return when the server has all of it. AgentError when some of it could not be sent."""
        recording = Recording(Path(self._options.replay))
        progress = asyncio.create_task(self._show_progress(recording.rows), name="progress")
        broken: AgentError | None = None
        try:
            await self._send_samples(recording)
        except AgentError as error:
            broken = error  # what came before it is good
        await self._spool.at_most(0)
        progress.cancel()
        await asyncio.gather(progress, return_exceptions=True)
        print(f"\rreplayed {self._delivered} of {recording.rows} rows", file=sys.stderr)
        if broken:
            raise broken
        if self._refused:
            raise AgentError(f"the server refused {self._refused} rows")

    async def _send_samples(self, recording: Recording) -> None:
        waiting: list[dict[str, Any]] = []
        size, before = 0, cast("int | None", None)
        try:
            for sample in recording.samples():
                if self._options.speed > 0 and before is not None:
                    await asyncio.sleep(max(0, sample["ts"] - before) / 1000 / self._options.speed)
                before = sample["ts"]
                waiting.append(sample)
                size += len(json.dumps(sample))
                if len(waiting) >= REPLAY_ROWS or size > REPLAY_BYTES or self._options.speed > 0:
                    await self._send_rows(waiting)
                    waiting, size = [], 0
        finally:
            await self._send_rows(waiting)

    async def _send_rows(self, samples: list[dict[str, Any]]) -> None:
        """Unlike readings, rows wait for room."""
        if samples:
            await self._spool.at_most(min(100, self._options.spool - 1))
            await self._spool.put({"type": "telemetry", "samples": samples})

    async def _send_apart(self, samples: list[dict[str, Any]]) -> None:
        """Of samples that were refused together, each is sent again alone; what is refused alone is lost."""
        if len(samples) < 2:
            self._refused += len(samples)
            return
        for sample in samples:
            await self._spool.put({"type": "telemetry", "samples": [sample]})

    async def _show_progress(self, rows: int) -> None:
        while True:
            print(f"\r{self._delivered} of {rows} rows acknowledged", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)

    async def _stay_connected(self) -> None:
        attempt = 0
        async with ClientSession(timeout=ClientTimeout(total=None, sock_connect=10)) as client:
            while True:
                started = time.monotonic()
                try:
                    await self._hold_session(client)
                except (ClientError, OSError, TimeoutError) as error:
                    log.warning("no session: %s", error or type(error).__name__)
                attempt = 0 if time.monotonic() - started > 30 else attempt + 1
                await asyncio.sleep(backoff(attempt, 60.0, random.random()))  # noqa: S311 - no secret

    async def _hold_session(self, client: ClientSession) -> None:
        """One session from hello to close."""
        url = re.sub("^http", "ws", self._options.url.rstrip("/")) + "/device"
        async with asyncio.timeout(30):
            link = await client.ws_connect(url, protocols=("iiot.v1",), heartbeat=30, max_msg_size=4 * 1024 * 1024)
        async with closing_link(link):
            if not self._token:
                self._token_file.check()
                await link.send_json({"type": "provision", "key": self._options.key, "device": self._name})
                self._token = (await self._expect(link, "credentials"))["token"]
                self._token_file.write(self._token)
                log.info("provisioned as %s", self._name)
            await link.send_json({"type": "hello", "token": self._token, "agent": f"iiot-agent/{VERSION}", "time": now_ms()})
            welcome = await self._expect(link, "welcome")
            log.info("connected as %s, session %s", welcome["device"], welcome["session"])
            self._held_until = 0.0
            self._delivered += await self._spool.resume(welcome["seq"])
            self._want(welcome.get("config"))
            if self._spool.dropped != self._dropped:  # a report may have been among it
                self._dropped, self._reported = self._spool.dropped, None
            sender = asyncio.create_task(self._send(link), name="sender")
            try:
                await self._receive(link)
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)

    async def _expect(self, link: ClientWebSocketResponse, kind: str) -> dict[str, Any]:
        """The server's answer to a step of the handshake."""
        async with asyncio.timeout(30):
            message = await link.receive()
        if message.type == WSMsgType.TEXT:
            frame = cast("dict[str, Any]", json.loads(message.data))
            if frame.get("type") == kind:
                return frame
            if frame.get("type") == "error":
                await self._closed(link, frame.get("message", ""))
        await self._closed(link, str(message.extra or ""))
        raise ClientError("the server did not answer the handshake")

    async def _closed(self, link: ClientWebSocketResponse, reason: str) -> None:
        """The server is closing: AgentError if for good."""
        if not link.closed:
            async with asyncio.timeout(10):
                while (message := await link.receive()).type not in CLOSED:
                    pass
                reason = reason or str(message.extra or "")
        if link.close_code in PERMANENT:
            raise AgentError(f"the server refuses this device ({link.close_code}): {reason}")
        raise ClientError(f"closed by the server ({link.close_code}): {reason}")

    async def _send(self, link: ClientWebSocketResponse) -> None:
        while True:
            frame = await self._spool.next()
            await asyncio.sleep(max(0.0, self._held_until - time.monotonic()))
            await link.send_str(json.dumps(frame, separators=(",", ":")))

    async def _receive(self, link: ClientWebSocketResponse) -> None:
        while (message := await link.receive()).type not in CLOSED:
            if message.type != WSMsgType.TEXT:
                continue
            frame = json.loads(message.data)
            if frame["type"] == "ack":
                self._delivered += await self._spool.acknowledge(frame["seq"])
            elif frame["type"] == "error":
                log.warning("the server refused a frame: %s %s", frame.get("message"), frame.get("errors", ""))
                await self._send_apart(await self._spool.refuse(frame.get("seq", 0)))
            elif frame["type"] == "config":
                self._want(frame)
            elif frame["type"] == "throttled":
                log.warning("the server takes no more for %.0f s: %s is used up", frame["retry_after"], frame["limit"])
                self._held_until = time.monotonic() + min(frame["retry_after"], HELD_SECONDS)
            elif frame["type"] == "report":
                self._reported = None  # state is sent whole
                self._report.set()
        await self._closed(link, str(message.extra or ""))


# ==== Command line ====
# Owns: arguments, variables of the environment, what is printed where: progress and logs go to standard error.


def parse_option(option: Field[Any], text: str) -> Any:
    """An option's value. ArgumentTypeError, which argparse shows with the flag's name."""
    kind: Callable[[str], Any] = type(option.default)
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a number' if kind is float else 'a whole number'}") from None
    if option.metadata["good"] and not option.metadata["good"](value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {option.metadata['rule']}")
    return value


class RedactingParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


def make_parser() -> argparse.ArgumentParser:
    """A flag for every option; its default from IIOT_NAME where that is set."""
    parser = RedactingParser(prog="agent.py", description="Run this machine as a device of an Industrial-IoT platform.")
    parser.add_argument("--version", action="version", version=VERSION)
    for option in fields(Options):
        variable, default = f"IIOT_{option.name.upper()}", option.default
        if variable in os.environ:
            try:
                default = parse_option(option, os.environ[variable])
            except argparse.ArgumentTypeError as error:
                parser.error(f"{variable}: {error}")
        shown = f" ({option.default})" if option.default not in ("", 0.0) else ""
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=functools.partial(parse_option, option), default=default, help=option.metadata["help"] + shown)
    return parser


class RedactingFormatter(logging.Formatter):
    """Log lines without the secrets that a peer may have put into what it sent."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


async def run_agent(options: Options) -> None:
    await Agent(options).run()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = Options(**vars(make_parser().parse_args(argv)))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    try:
        asyncio.run(run_agent(options))
    except KeyboardInterrupt:
        sys.exit(130)
    except (AgentError, OSError) as error:
        sys.exit(redacted(f"agent.py: {error}"))


if __name__ == "__main__":
    main()
