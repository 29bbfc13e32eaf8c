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
    Rules                pure functions: values, times, documents, what a refusal means
    Recordings           a recorded file, row by row, and what of it is lost
    Machine              this machine's own readings, and what it is
    Files                what the agent keeps on the disk
    Configuration        the command that applies a configuration
    Spool file           frames on the disk: records, and when they are written
    Spool                frames until the server has them on disk, and how many of them are under way
    Logs                 lines of logs, gathered into frames
    Commands             programs that are run for the operator
    Link                 one connection: whether it lives, how much waits on it, and how it ended
    Tunnels              bytes between programs of this machine and the server
    Agent                the session with the server, and coming back to it
    Command line         python agent.py …
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import functools
import hashlib
import json
import logging
import os
import platform as host
import random
import re
import secrets
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import IO, Any, Final, NoReturn, cast
from zoneinfo import ZoneInfo

from aiohttp import (
    ClientError,
    ClientSession,
    ClientTimeout,
    ClientWebSocketResponse,
    ClientWSTimeout,
    TraceConfig,
    TraceRequestEndParams,
    WSMsgType,
)

if sys.platform != "win32":
    import fcntl

VERSION: Final = "0.1.0"
Value = bool | float | int | str

log = logging.getLogger("iiot")
shipping = logging.getLogger("iiot.shipping")  # what is logged because lines are sent; it is not sent itself


# ==== Limits and options ====
# Owns: what the agent can be told (Options: one field per flag and IIOT_* variable) and the bounds that it keeps.
# Must not know: anything else.

# What the server takes (README.md, wire contract). The agent looks first, so that one bad value does not cost a whole frame.
FRAME_BYTES: Final = 1024 * 1024
METRIC_CHARACTERS: Final = 128
TEXT_CHARACTERS: Final = 1024
METRICS: Final = 2_000
INTEGERS: Final = 2**63
EARLIEST: Final = 946_684_800_000  # 2000-01-01
DAY: Final = 86_400_000

# A recorded file.
REPLAY_ROWS: Final = 50  # in one frame
REPLAY_BYTES: Final = 256 * 1024  # likewise
LINE_CHARACTERS: Final = 4 * 1024 * 1024  # a longer line is lost, and is never in memory as a whole
RECORD_LINES: Final = 100  # a quoted cell that goes on for longer was never closed
LOSSES_SHOWN: Final = 20
MOMENTS: Final = 50_000  # values that are compared with later ones of the same millisecond; about 15 MB
SECONDS_BELOW: Final = 1e11  # a smaller number is seconds since 1970 (until the year 5138), a larger one milliseconds (from 1973)
MILLISECONDS_BELOW: Final = 1e14

# Lines of logs.
MESSAGE_MOST: Final = 8_192  # characters of a line; a longer one is cut
LOGGER_CHARACTERS: Final = 256
FIELDS_BYTES: Final = 64 * 1024  # as JSON; larger ones are left out
FIELD_CHARACTERS: Final = 1_024  # of a text among the fields
LOG_ENTRIES: Final = 500  # in one frame
LOG_BYTES: Final = 64 * 1024  # likewise; one line alone may take more, and stays under a quarter of a frame all the same
LOG_SECONDS: Final = 0.5  # between two looks at a file that has nothing new; the lines of this time go into one frame
JOURNAL_BYTES: Final = 1024 * 1024  # of an entry of the journal; a larger one is left out
JOURNAL_SECONDS: Final = 30.0  # for the entry that was reached: none comes while all of the journal's times lie before it
PIECE_BYTES: Final = 64 * 1024  # that are read of a file at once
LINE_BYTES: Final = 4 * MESSAGE_MOST + 4  # of a line that are kept in memory: one character more than a message has, in its longest form
HEAD_BYTES: Final = 1_024  # a file is known again by its first bytes, and by those before the place that was reached
LAST_BYTES: Final = 256
FILES_KNOWN: Final = 64  # that were read, so that none is read twice
PARTIAL_SECONDS: Final = 5.0  # for the end of a line
ROTATED_SECONDS: Final = 2.0  # after a file was rotated, and since its last line: its writer is told a little later
CURSOR_SECONDS: Final = 1.0  # between two writes of the cursor file
LINE_AHEAD_MOST: Final = 23 * 3_600_000  # of the server's clock; it takes a day, and clocks differ
OWN_LINES: Final = 1_000  # of the agent's own log that wait for room; beyond this the oldest are lost, and counted
LOG_SPOOL_BYTES: Final = 1024 * 1024  # of lines that are read and not acknowledged; the others stay where they are

# A spool on the disk.
SPOOL_BYTES_LEAST: Final = 8 * 1024 * 1024  # a third of it holds frames, and one frame may have a megabyte
SPOOL_SLACK: Final = 1024 * 1024  # of records that are done with, until the file is written anew
FRAME_OVERHEAD: Final = 100  # of a frame's records, beside its content
RECORD_BYTES: Final = 4 * FRAME_BYTES  # a longer one was never written
SYNC_SECONDS: Final = 0.2  # between two syncs: flash wears out
SYNC_GATHER_SECONDS: Final = 0.01  # a frame is numbered just after it is made; both are written at once
SYNC_PATIENCE: Final = 30.0  # for a disk that hangs; then frames are sent all the same
SPOOL_RETRY_SECONDS: Final = 10.0  # after a write that failed

# Commands.
COMMANDS_MOST: Final = 16  # that run at the same time
COMMANDS_KNOWN: Final = 1_000  # that run, or whose results the server does not have
COMMANDS_SECONDS: Final = 0.2  # between two writes that only leave out what is done with
OUTPUT_BYTES: Final = 16 * 1024  # of output in one frame
OUTPUT_SECONDS: Final = 0.1  # what comes within this time goes into one frame
OUTPUT_PIECES: Final = 64  # in this time at most, where a command writes to both of its streams in turn
TERM_SECONDS: Final = 2.0  # between SIGTERM and SIGKILL
KILL_SECONDS: Final = 1.0  # after SIGKILL, for what still holds the pipes
GONE_SECONDS: Final = 0.05  # between two looks whether all processes have ended

# Tunnels.
TUNNELS_MOST: Final = 64
TUNNEL_BYTES: Final = 32 * 1024  # in one frame
TUNNEL_WINDOW: Final = 256 * 1024  # that the server may send before the program at the port has taken any
CONNECT_SECONDS: Final = 10.0
CLEAR_SECONDS: Final = 0.001  # between two looks whether the link is clear, at first
CLEAR_MOST: Final = 0.02  # and at most

# Bytes under way: see Window.
WINDOW_FIRST: Final = 16 * 1024
WINDOW_LEAST: Final = 2 * 1024
WINDOW_MOST: Final = FRAME_BYTES
FRAME_LEAST: Final = 1024  # a frame is cut no further where somebody on the way does not take it
QUICK_SECONDS: Final = 1.0
SLOW_SECONDS: Final = 4.0

# How long something is waited for.
STEP_SECONDS: Final = 30.0  # a step of the handshake: on the server's side a session may first have to be stored
CLOSE_SECONDS: Final = 3.0  # the server's answer to a close frame
VERDICT_SECONDS: Final = 10.0  # the close that follows an error which names no frame
LOOK_SECONDS: Final = 5.0  # between two looks at what moved on the link
PING_SECONDS: Final = 15.0  # without anything that moves, until a ping
LINK_SECONDS: Final = 45.0  # without anything that moves, until the link is given up: three pings
TUNNEL_QUIET_SECONDS: Final = 24.0  # in which nothing arrives, until tunnels end: both ends are to hear of a cut within half a minute
LINK_BYTES: Final = 256  # sent and confirmed count as movement from here on; three pings are less, TLS included
ANSWER_SECONDS: Final = 300.0  # for the acknowledgement of what was sent; on the slowest link it takes a minute or two
HELD_SECONDS: Final = 60.0  # at most, after `throttled`: the quota may be raised, and until then the server just does not read
RETRY_SECONDS: Final = 60.0  # at most, between two attempts of the agent's own choice
ASKED_SECONDS: Final = 3_600.0  # at most, where the server names the time
ON_CONFIG_SECONDS: Final = 50.0  # for the command: less than the server waits for the verdict
MESSAGE_CHARACTERS: Final = 1000  # of what the command says, in the verdict

CLOSED: Final = frozenset((WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR))
SECRET: Final = re.compile(r"(iiot_(?:dev|op|prov|log)_[0-9a-f]{16}_)[A-Za-z0-9_-]+")
PORTS: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
OFFSET: Final = re.compile(r"([+-])([0-9]{2}):?([0-9]{2})")


class Paths(tuple[str, ...]):
    """Names of files, as one text: separated as in PATH."""

    __slots__ = ()

    def __new__(cls, text: str = "") -> Paths:
        return super().__new__(cls, (path for path in text.split(os.pathsep) if path))

    def __str__(self) -> str:
        return os.pathsep.join(self)


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


def is_encoding(name: str) -> bool:
    """Whether Python reads text of this encoding."""
    try:
        return "".encode(name) is not None
    except (LookupError, ValueError):
        return False


def parse_zone(text: str) -> tzinfo:
    """The time zone UTC, +01:00, or one of an IANA name. ValueError."""
    if text.upper() in ("UTC", "Z"):
        return UTC
    if found := OFFSET.fullmatch(text):
        offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
        return timezone(-offset if found[1] == "-" else offset)
    try:
        return ZoneInfo(text)
    except (KeyError, OSError) as error:
        raise ValueError(f"{text} is no time zone") from error


def is_zone(text: str) -> bool:
    try:
        return not text or parse_zone(text) is not None
    except ValueError:
        return False


def parse_ports(text: str) -> tuple[range, ...]:
    """The ports of a text such as 22,8000-8010. ValueError."""
    found = [PORTS.fullmatch(part.strip()) for part in text.split(",")] if text else []
    ports = tuple(range(int(part[1]), int(part[2] or part[1]) + 1) for part in found if part is not None)
    if len(ports) < len(found) or not all(one and one[0] >= 1 and one[-1] <= 65_535 for one in ports):
        raise ValueError(f"{text} is no list of ports")
    return ports


def is_ports(text: str) -> bool:
    try:
        return parse_ports(text) is not None
    except ValueError:
        return False


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
    on_config: str = setting(
        "", "command that gets a new configuration on standard input; exit code 0 applies it, any other code rejects it"
    )
    config_file: str = setting("", "where the applied configuration is kept (NAME.config.json in this folder)")
    interval: float = setting(5.0, "seconds between two readings", positive, "above 0")
    spool: int = setting(10_000, "frames kept while offline; beyond this the oldest are deleted", positive, "at least 1")
    spool_file: str = setting(
        "",
        "keep the frames in this file while offline, so that they survive a restart and a power cut; "
        "a power cut loses at most the frames of the last second",
    )
    spool_bytes: int = setting(
        64 * 1024 * 1024,
        "bytes on the disk for --spool-file, in place of --spool; a third holds frames, the rest is room to write the file anew",
        lambda count: count >= SPOOL_BYTES_LEAST,
        f"at least {SPOOL_BYTES_LEAST}",
    )
    log_file: Paths = setting(
        Paths(),
        "send the lines that are appended to this file; may be given several times (in the variable with : between the names). "
        "The agent follows a rename; where a file is copied and then emptied (copytruncate), lines can be lost",
    )
    journal: bool = setting(False, "send the lines of the system's journal, as journalctl tells them, from the first start on")
    own_log: bool = setting(False, "send what the agent itself logs")
    cursor_file: str = setting("", "where the agent keeps how far it has sent the logs (NAME.cursors.json in this folder)")
    allow_commands: bool = setting(False, "run the commands that the server sends, as the user of this agent and without a shell")
    commands_file: str = setting(
        "", "where the agent keeps which commands it began, so that none runs twice (NAME.commands.json in this folder)"
    )
    allow_tunnel: str = setting(
        "",
        "TCP ports of this device that the server may connect to: ports and ranges, such as 22,8000-8010",
        is_ports,
        "ports and ranges of ports from 1 to 65535, such as 22,8000-8010",
    )
    replay: str = setting("", "send a recorded CSV instead: first column a time, the rest metrics; comma, semicolon or tab")
    speed: float = setting(
        0.0,
        "of --replay: 1 is the recording's own pace, 10 ten times it, 0 as fast as the server acknowledges",
        lambda speed: 0 <= speed < float("inf"),
        "0 or above",
    )
    timezone: str = setting(
        "",
        "of --replay: time zone for times without a zone: an IANA name, UTC or +01:00; without this flag such times are refused",
        is_zone,
        "a time zone such as Europe/Berlin, UTC or +01:00",
    )
    time_format: str = setting("", "of --replay: form of the times, as strptime takes it, such as '%d.%m.%Y %H:%M' (ISO 8601, or a number)")
    decimal: str = setting(
        "", "of --replay: comma or point before decimals (as the file shows)", ("", "comma", "point").__contains__, "comma or point"
    )
    encoding: str = setting("utf-8", "of --replay: how the file's text is encoded", is_encoding, "an encoding such as utf-8 or cp1252")
    log_level: str = setting(
        "info",
        "debug, info, warning or error; logs go to standard error",
        ("debug", "info", "warning", "error").__contains__,
        "debug, info, warning or error",
    )


# ==== Rules ====
# Owns: pure functions: values, times, documents, what a refusal means. Must not know: files, sockets.

# Error codes after which trying again is of no use: at any time, and before the server's welcome.
FINAL_CODES: Final = frozenset(("unauthorized", "device_disabled", "device_removed", "credentials_revoked", "tenant_removed"))
FINAL_FIRST_CODES: Final = frozenset(("device_exists", "invalid", "bad_handshake"))
CLOSE_UNAUTHORIZED: Final = 4401
CLOSE_FORBIDDEN: Final = 4403
CLOSE_BAD_HANDSHAKE: Final = 4400
CLOSE_FRAME_TOO_BIG: Final = 1009
TIME_PATH: Final = re.compile(r"entries\[[0-9]{1,9}\]\.ts")
ITEM_PATH: Final = re.compile(r"(?:samples|entries)\[([0-9]{1,9})\](?:\.values\.(.+))?.*", re.DOTALL)

# The levels of lines, and Python's numbers for them.
LEVELS: Final[Mapping[str, int]] = MappingProxyType(
    {"debug": 10, "info": 20, "notice": 25, "warning": 30, "error": 40, "critical": 50},
)
PRIORITIES: Final = ("critical", "critical", "critical", "error", "warning", "notice", "info", "debug")  # of the journal, 0 to 7
CUT: Final = "… (cut)"
LEVEL_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("TRACE", "DEBUG", "DBG"), "debug"),
        **dict.fromkeys(("INFO", "INFORMATION"), "info"),
        "NOTICE": "notice",
        **dict.fromkeys(("WARN", "WARNING"), "warning"),
        **dict.fromkeys(("ERROR", "ERR", "SEVERE"), "error"),
        **dict.fromkeys(("FATAL", "CRITICAL", "CRIT", "ALERT", "EMERG", "PANIC"), "critical"),
    }
)
LEVEL_WORD: Final = re.compile(r"([\[(<|]?)([A-Za-z]+)(?:[\])>|]?(:)|[\])>|,]|$)")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def same(one: object, other: object) -> bool:
    """Whether two JSON values are equal; unlike in Python, 1, 1.0 and true are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def encode(content: Mapping[str, Any]) -> bytes:
    """The JSON text of a frame. What is no text (half of a surrogate pair, out of a file name) becomes a question mark."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


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


def is_final(code: str, close: int | None, *, welcomed: bool) -> bool:
    """Whether a refusal is for good. The code of the error frame decides; where there was none, the close code."""
    if code:
        return code in FINAL_CODES or (not welcomed and code in FINAL_FIRST_CODES)
    return close in (CLOSE_UNAUTHORIZED, CLOSE_FORBIDDEN) or (not welcomed and close == CLOSE_BAD_HANDSHAKE)


def level_numbered(number: int) -> str:
    """The level of a record of Python's logging."""
    return max((level for level in LEVELS if LEVELS[level] <= number), key=LEVELS.__getitem__, default="debug")


def level_of(line: str) -> str:
    """The level that a line of text names: the first word for one among its first six, in capitals, in brackets or before a
    colon. Else info: no more is guessed."""
    for word in line[:120].split()[:6]:
        found = LEVEL_WORD.match(word)
        if found and (found[2].isupper() or found[1] or found[3]) and (level := LEVEL_WORDS.get(found[2].upper())):
            return level
    return "info"


def shortened(text: str, most: int) -> str:
    """A text of a line, with a sign in place of a zero character, which no database takes; what is cut is marked."""
    text = text.replace("\0", "\u2400")
    return text if len(text) <= most else text[: most - len(CUT)] + CUT


def log_entry(level: str, message: str, ts: int, logger: str = "", fields: Mapping[str, Value] | None = None) -> dict[str, Any]:
    """A line as the wire takes it. What is too long is cut, and says so. A clock before 2000 is wrong: then the server's counts."""
    entry: dict[str, Any] = {"ts": ts} if ts >= EARLIEST else {}
    entry |= {"level": level, "message": shortened(message, MESSAGE_MOST)}
    if logger:
        entry["logger"] = shortened(logger, LOGGER_CHARACTERS)
    kept = {name: shortened(value, FIELD_CHARACTERS) if isinstance(value, str) else value for name, value in (fields or {}).items()}
    if kept and len(encode(kept)) <= FIELDS_BYTES:
        entry["fields"] = kept
    return entry


def with_times_to(content: dict[str, Any], latest: float) -> dict[str, Any]:
    """A frame without the times of lines that are later than this one: a line is worth more than its time, and the server then uses
    its own. This is done when a frame is sent and not when a line is read, because without a session nobody knows the right time."""
    entries = content.get("entries", [])
    if all(entry.get("ts", latest) <= latest for entry in entries):
        return content
    return {**content, "entries": [{n: v for n, v in entry.items() if n != "ts" or v <= latest} for entry in entries]}


def journal_text(value: object) -> str:
    """A field of an entry of the journal: a text, a list of its bytes where it is none of UTF-8, or a list of several such."""
    if isinstance(value, list) and value:
        if all(type(byte) is int and 0 <= byte < 256 for byte in value):
            return bytes(value).decode(errors="backslashreplace")
        return journal_text(value[0])
    return value if isinstance(value, str) else ""


def journal_entry(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """A line of the journal; none for an entry without a message."""
    message = journal_text(content.get("MESSAGE")).strip("\n")
    if not message.strip():
        return None
    priority, moment = journal_text(content.get("PRIORITY")), journal_text(content.get("__REALTIME_TIMESTAMP"))
    level = PRIORITIES[int(priority)] if re.fullmatch("[0-7]", priority) else "info"
    fields: dict[str, Value] = {}
    if re.fullmatch("[0-9]{1,10}", pid := journal_text(content.get("_PID"))):
        fields["pid"] = int(pid)
    if unit := journal_text(content.get("_SYSTEMD_UNIT")):
        fields["unit"] = unit
    logger = journal_text(content.get("SYSLOG_IDENTIFIER")) or journal_text(content.get("_COMM"))
    return log_entry(level, message, int(moment) // 1000 if re.fullmatch("[0-9]{1,18}", moment) else now_ms(), logger, fields)


def wanted_level(document: object) -> object:
    """The `log_level` of a configuration; none where it says nothing about it."""
    return document.get("log_level") if isinstance(document, dict) else None


def config_errors(document: object) -> list[dict[str, str]]:
    """What of a configuration the agent itself cannot take, as the verdict tells it."""
    level = wanted_level(document)
    if isinstance(document, dict) and "log_level" in document and not (isinstance(level, str) and level in LEVELS):
        return [{"path": "log_level", "code": "value", "message": f"is none of {', '.join(LEVELS)}"}]
    return []


@dataclass(frozen=True)
class Numbers:
    """How numbers are written: the mark before decimals, the one between groups of three digits or none, and the pattern."""

    decimal: str
    group: str
    pattern: re.Pattern[str]


def numbers_with(decimal: str, group: str) -> Numbers:
    mark, groups = re.escape(decimal), rf"|[1-9][0-9]{{0,2}}(?:{re.escape(group)}[0-9]{{3}})+" if group else ""
    pattern = rf"[+-]?(?=[0-9]|{mark}[0-9])(?:[0-9]+{groups})?(?:{mark}[0-9]*)?(?:[eE][+-]?[0-9]+)?"
    return Numbers(decimal, group, re.compile(pattern))


PLAIN: Final = numbers_with(".", "")
POINT: Final = numbers_with(".", ",")
COMMA: Final = numbers_with(",", ".")


def decimal_mark(text: str) -> str:
    """What a cell says about its file: "comma" (21,5), "point" (21.5), "either" (1.013), or nothing."""
    text = text.strip()
    if "," not in text and "." not in text:
        return ""
    comma, point = COMMA.pattern.fullmatch(text), POINT.pattern.fullmatch(text)
    return "either" if comma and point else "comma" if comma else "point" if point else ""


def shown(text: str) -> str:
    """A cell in a message."""
    text = redacted(text.strip())
    return repr(text if len(text) <= 60 else text[:60] + "…")


def check_text(text: str) -> str:
    if len(text) > TEXT_CHARACTERS:
        raise ValueError(f"a text of {len(text)} characters; the server takes {TEXT_CHARACTERS}")
    if "\0" in text:
        raise ValueError("a text with a zero character")
    return text


def parse_cell(text: str, style: Numbers = PLAIN) -> Value | None:
    """A value of a recorded file: integer, real, boolean or text; None for an empty cell and for nan, which say that there is
    no value. A number that begins with a zero is a name (00123), and stays text. ValueError for what the server cannot keep."""
    text = text.strip()
    word = text.lower().lstrip("+-")
    if style.pattern.fullmatch(text):
        plain = (text.replace(style.group, "") if style.group else text).replace(style.decimal, ".")
        digits = plain.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
            return check_text(text)
        if digits.isdigit():
            if len(digits) > 19 or not -INTEGERS <= int(plain) < INTEGERS:
                raise ValueError(f"{shown(text)} is an integer of over 63 bits")
            return int(plain)
        real = float(plain)
        if abs(real) == float("inf"):
            raise ValueError(f"{shown(text)} is larger than a number can be")
        return real
    if word in ("inf", "infinity"):
        raise ValueError(f"{shown(text)} is no finite number")
    if text.lower() in ("true", "false"):
        return word == "true"
    return None if not text or word == "nan" else check_text(text)


def place_in_zone(moment: datetime, zone: tzinfo, before: int | None) -> tuple[int, bool]:
    """Milliseconds of a local time, and whether the clock showed it twice. Then it is the earlier one, unless that lies before
    the row above. ValueError for a time that the clock left out."""
    first, second = (round(moment.replace(tzinfo=zone, fold=fold).timestamp() * 1000) for fold in (0, 1))
    if first > second:
        raise ValueError(f"{moment} does not exist in {zone}: the clock was set forward")
    return (second if before is not None and first < before else first), first != second


@dataclass(frozen=True)
class Times:
    """How a recording writes its times: the zone of those that name none, and the form for strptime, if it is not ISO 8601."""

    zone: tzinfo | None = None
    form: str = ""


def parse_moment(text: str, times: Times) -> int | datetime:
    """Milliseconds, or a date and time. ValueError, whose text says what to add."""
    text = text.strip()
    if times.form:
        try:
            return datetime.strptime(text, times.form)
        except ValueError:
            raise ValueError(f"{shown(text)} is not of the form --time-format {times.form!r}") from None
    number = text.replace(",", ".", 1)
    if PLAIN.pattern.fullmatch(number):
        since = float(number)
        if abs(since) >= MILLISECONDS_BELOW:
            raise ValueError(f"{shown(text)} is no time: neither seconds nor milliseconds since 1970")
        return round(since * 1000 if abs(since) < SECONDS_BELOW else since)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        hint = "name its form, for example --time-format '%d.%m.%Y %H:%M'"
        raise ValueError(f"{shown(text)} is no time of ISO 8601 and no number; {hint}") from None


def parse_time(text: str, times: Times, before: int | None = None) -> tuple[int, bool]:
    """Milliseconds of a recorded time, and whether the clock showed it twice; `before` is the time of the row above. ValueError."""
    moment = parse_moment(text, times)
    if isinstance(moment, int):
        return moment, False
    if moment.tzinfo is not None:
        return round(moment.timestamp() * 1000), False
    if times.zone is None:
        hint = "add --timezone, for example --timezone UTC or --timezone Europe/Berlin"
        raise ValueError(f"{shown(text)} names no time zone; {hint}")
    return place_in_zone(moment, times.zone, before)


def is_metric(name: str) -> bool:
    return 0 < len(name) <= METRIC_CHARACTERS and name.isprintable()


# ==== Recordings ====
# Owns: a recorded file, row by row, and what of it is lost. Must not know: sockets.

EXPORT: Final = ("time", "metric", "value")  # the server's own CSV of readings
BUCKETS: Final = ("avg", "min", "max", "sum", "count", "last")
SEPARATORS: Final = ((",", "comma"), (";", "semicolon"), ("\t", "tab"))


class Losses:
    """What of a recording did not reach the server, by line."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._shown: list[tuple[int, str]] = []
        self._lines = bytearray()  # 1 for a line of which something is lost: a byte a line is little, whatever the file
        self.count = 0
        self.rows = 0

    def add(self, line: int, text: str) -> None:
        self.count += 1
        if len(self._shown) < LOSSES_SHOWN:
            self._shown.append((line, text))
        if line >= len(self._lines):
            self._lines.extend(bytes(line + 1 - len(self._lines)))
        if not self._lines[line]:
            self._lines[line] = 1
            self.rows += 1

    def report(self) -> str:
        """A line for every loss, the first twenty of them."""
        lines = [f"{self._path}: line {line}: {text}\n" for line, text in sorted(self._shown)]
        more = self.count - len(lines)
        return redacted("".join(lines) + (f"{self._path}: and {more} more\n" if more else ""))


class Lines:
    """The lines of a file, numbered. A record whose quotes do not end within RECORD_LINES lines can be left and read again
    from its second line on, so that one stray quote does not take the rest of the file."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self.number = 0  # of the line that was given last

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self._record) >= RECORD_LINES:
            raise StopIteration
        line = self._again.popleft() if self._again else self._read()
        if not line:
            raise StopIteration
        self.number += 1
        self._record.append(line)
        return line

    def begin(self) -> int:
        """A new record; the number of its first line."""
        self._record.clear()
        return self.number + 1

    def leave(self) -> None:
        """Give the lines of this record once more, without the first."""
        self._again.extendleft(reversed(self._record[1:]))
        self.number -= max(0, len(self._record) - 1)

    def _read(self) -> str:
        line = self._file.readline(LINE_CHARACTERS)
        if len(line) == LINE_CHARACTERS and line[-1] not in "\r\n":
            while (rest := self._file.readline(LINE_CHARACTERS)) and rest[-1] not in "\r\n":
                pass
            self._record.append("")
            self.number += 1
            raise csv.Error(f"is longer than {LINE_CHARACTERS} characters")
        return line


class Overwriting:
    """Which values share a metric and a millisecond: the server keeps the last of them. The newest MOMENTS values are known."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[int, str], tuple[int, Value]] = OrderedDict()

    def add(self, line: int, moment: int, metric: str, value: Value) -> int:
        """The line whose value is overwritten by this one with another; 0 if none is."""
        before, known = self._values.pop((moment, metric), (0, value))
        self._values[moment, metric] = line, value
        if len(self._values) > MOMENTS:
            self._values.popitem(last=False)
        return before if type(known) is not type(value) or known != value else 0


class Recording:
    """A recorded CSV file, row by row. It is read twice: first for the way in which it is written, then for its rows."""

    def __init__(self, options: Options) -> None:
        self.path = Path(options.replay)
        self._encoding = "utf-8-sig" if re.fullmatch(r"utf[-_]?8", options.encoding.lower()) else options.encoding
        self._times = Times(parse_zone(options.timezone) if options.timezone else None, options.time_format)
        self._decimal = options.decimal
        self._separator = ","
        self._style = PLAIN
        self._metrics: list[str] = []
        self._export = False  # a metric and a value in each row, as the server writes them
        self._texts: Counter[str] = Counter()
        self._overwriting = Overwriting()
        self._names: set[str] = set()  # of an export
        self._before: int | None = None
        self._twice = 0
        self.losses = Losses(options.replay)
        self.rows = 0
        self.given_up = False

    def survey(self) -> None:
        """Look at the whole file: its header, the number of its rows, how it writes numbers. AgentError where it is of no use."""
        marks: dict[str, tuple[int, str]] = {}
        try:
            with self._open() as file:
                first = file.readline(LINE_CHARACTERS)
            self._separator = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
            for line, cells in self._records():
                if line == 1:
                    self._read_header(cells)
                    continue
                if self.given_up:
                    return
                self.rows += 1
                if self._separator != "," and not self._decimal and isinstance(cells, list):
                    for cell in cells[1:]:
                        marks.setdefault(decimal_mark(cell), (line, cell))
            if not self._metrics:
                raise ValueError("line 1: is empty")
        except OSError as error:
            raise AgentError(f"cannot read {self.path}: {error.strerror}") from error
        except (ValueError, csv.Error) as error:
            raise AgentError(f"{self.path}: {error}") from error
        self._style = self._choose_numbers(marks)
        separator = dict(SEPARATORS)[self._separator]
        decimal = "comma" if self._style.decimal == "," else "point"
        log.info("%s: %d rows, columns separated by %s, decimal %s", self.path, self.rows, separator, decimal)

    def samples(self, latest: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Line and sample of every row in the file's order, none for a row without any value that can be sent; `latest` is the
        last time that the server takes."""
        for line, cells in self._records():
            if line == 1:
                continue
            try:
                if isinstance(cells, str):
                    raise ValueError(cells)
                sample = self._sample(line, cells, latest)
            except ValueError as error:
                self.losses.add(line, str(error))
                yield line, None
            else:
                yield line, sample if sample["values"] else None

    def remarks(self) -> str:
        """What else is to be said at the end, on the same line."""
        texts = [f"{count} of {shown(metric)}" for metric, count in self._texts.most_common(LOSSES_SHOWN)]
        more = len(self._texts) - len(texts)
        words = f"; values that are text: {', '.join(texts)}" if texts else ""
        words += f" and of {more} more columns" if more else ""
        return words + (f"; {self._twice} rows at a time that the clock showed twice, taken in the file's order" if self._twice else "")

    def _open(self) -> IO[str]:
        return self.path.open(newline="", encoding=self._encoding, errors="surrogateescape")

    def _records(self) -> Iterator[tuple[int, list[str] | str]]:
        """Every record that is not empty, with its line; in place of one that cannot be read, why."""
        with self._open() as file:
            lines = Lines(file)
            reader = csv.reader(lines, delimiter=self._separator, strict=True)
            while True:
                number = lines.begin()
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    lines.leave()
                    reader = csv.reader(lines, delimiter=self._separator, strict=True)
                    yield number, str(error)
                    continue
                if cells is None:
                    return
                if cells:
                    yield number, cells

    def _check_encoding(self, cells: list[str]) -> None:
        if any("\udc80" <= mark <= "\udcff" for cell in cells for mark in cell):
            raise ValueError(f"is not {self._encoding.removesuffix('-sig').upper()}; name the encoding, for example --encoding cp1252")

    def _read_header(self, cells: list[str] | str) -> None:
        try:
            if isinstance(cells, str):
                raise ValueError(cells)
            self._check_encoding(cells)
            names = [name.strip() for name in cells]
            words = tuple(name.lower() for name in names)
            if words[:2] == EXPORT[:2] and len(words) > 2 and all(word in BUCKETS for word in words[2:]):
                raise ValueError("is an export of buckets; export the readings themselves, without every=")
            if "device" in words and words[-2:] == EXPORT[1:]:
                raise ValueError("is an export of several devices; export one device")
            self._export = words == EXPORT
            self._metrics = names[1:]
            if not self._metrics or len(set(self._metrics)) < len(self._metrics):
                raise ValueError("needs a time column and one or more metrics, each with a name of its own")
            if bad := [name for name in self._metrics if not is_metric(name)]:
                raise ValueError(f"{shown(bad[0])} is no name of a metric: 1 to {METRIC_CHARACTERS} printable characters")
            if len(self._metrics) > METRICS:
                raise ValueError(f"{len(self._metrics)} metrics; a device may have {METRICS}")
        except ValueError as error:
            raise ValueError(f"line 1: {error}") from error

    def _choose_numbers(self, marks: Mapping[str, tuple[int, str]]) -> Numbers:
        """How the file writes its numbers. AgentError where it can be read in two ways."""
        if self._decimal:
            return COMMA if self._decimal == "comma" else POINT
        if self._separator == ",":
            return PLAIN
        if "comma" in marks and "point" in marks:
            told = " and ".join(f"{shown(cell)} in line {line}" for line, cell in sorted((marks["comma"], marks["point"])))
            raise AgentError(f"{self.path}: decimals are written in two ways, {told}; add --decimal comma or --decimal point")
        if "either" in marks and "comma" not in marks and "point" not in marks:
            line, cell = marks["either"]
            told = f"{shown(cell)} may be about one or about one thousand"
            raise AgentError(f"{self.path}: line {line}: {told}; add --decimal comma or --decimal point")
        return COMMA if "comma" in marks else POINT

    def _sample(self, line: int, cells: list[str], latest: int) -> dict[str, Any]:
        if len(cells) != len(self._metrics) + 1:
            raise ValueError(f"{len(cells)} columns where the header has {len(self._metrics) + 1}")
        self._check_encoding(cells)
        moment, twice = parse_time(cells[0], self._times, self._before)
        self._before = moment
        self._twice += twice
        if not EARLIEST <= moment <= latest:
            raise ValueError(f"{shown(cells[0])} is not between 2000-01-01 and a day from now")
        values: dict[str, Value] = {}
        columns = ((self._export_metric(cells[1]), cells[2]),) if self._export else zip(self._metrics, cells[1:], strict=True)
        for metric, cell in columns:
            try:
                value = parse_cell(cell, self._style)
            except ValueError as error:
                self.losses.add(line, f"{shown(metric)}: {error}")
                continue
            if value is not None:
                values[metric] = value
                if isinstance(value, str):
                    self._texts[metric] += 1
                if before := self._overwriting.add(line, moment, metric, value):
                    self.losses.add(before, f"{shown(metric)}: line {line} has another value for the same millisecond, which is kept")
        return {"ts": moment, "values": values}

    def _export_metric(self, name: str) -> str:
        name = name.strip()
        if not is_metric(name):
            raise ValueError(f"{shown(name)} is no name of a metric: 1 to {METRIC_CHARACTERS} printable characters")
        if name not in self._names:
            if len(self._names) >= METRICS:
                raise ValueError(f"{shown(name)} is one metric more than the {METRICS} that a device may have")
            self._names.add(name)
        return name


# ==== Machine ====
# Owns: this machine's own readings, and what it is. Must not know: where they go.

BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


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


def present_boot() -> str:
    """The boot of this machine, as the journal names it; empty where that is not known."""
    try:
        return BOOT.read_text().strip().replace("-", "")
    except (OSError, ValueError):
        return ""


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
# Owns: what the agent keeps on the disk: its token, the secret it asks for one with, the applied configuration, how far the
# logs are sent. Must not know: sockets.

PROPOSED: Final = re.compile(r"[A-Za-z0-9_-]{43}")


def sync_folder(path: Path) -> None:
    """See to it that what was renamed in a folder stays so."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        with suppress(OSError):  # some file systems cannot; the file is in its place
            os.fsync(folder)
        os.close(folder)


def write_whole(path: Path, text: str, mode: int) -> None:
    """Write a file under another name, and move it into its place when it is on the disk: a crash leaves the old file or the
    new one, never a part. OSError."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def lock_of(path: Path) -> IO[bytes]:
    """Take a file for this agent alone, until what is returned is closed: two would spoil it. OSError; AgentError when another
    agent has it."""
    guard = path.with_name(path.name + ".lock").open("ab")
    if sys.platform != "win32":
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            guard.close()
            raise AgentError(f"another agent uses {path}") from error
    return guard


class TokenFile:
    """Where the agent keeps its token, readable for its own user alone. Until it has one, another file holds the secret that it
    asks for a token with. The secret is on the disk before it is sent: if the answer is lost, the agent sends the same secret
    again and is given the same token."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._secret_path = path.with_name(path.name + ".secret")

    def read(self) -> str:
        """The token, empty without a file. AgentError when the file cannot be used."""
        return self._read(self.path)

    def is_empty(self) -> bool:
        """Whether there is a file without a token in it."""
        return self.path.is_file() and not self.read()

    def secret(self) -> tuple[str, bool]:
        """The secret to ask with, and whether it is new. AgentError when none could be kept."""
        kept = self._read(self._secret_path)
        if PROPOSED.fullmatch(kept):
            return kept, False
        made = secrets.token_urlsafe(32)
        self._write(self._secret_path, made)
        return made, True

    def forget_secret(self) -> None:
        self._secret_path.unlink(missing_ok=True)

    def write(self, token: str) -> None:
        """Keep the token; the secret has done its part."""
        self._write(self.path, token)
        self.forget_secret()

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            raise AgentError(f"cannot read {path}: {error}") from error

    def _write(self, path: Path, text: str) -> None:
        try:
            write_whole(path, text + "\n", 0o600)
        except OSError as error:
            raise AgentError(f"cannot keep a token in {self.path}: {error.strerror}") from error


class AppliedConfig:
    """The configuration that was applied last, in a file: {version, document}."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[int, object]:
        """Version and document, 0 and None when none was applied. A file without one is told by its name: the readings go on,
        and the server sends the configuration that it wants. AgentError when there can be no such file."""
        try:
            text = self._path.read_text(encoding="utf-8")
            if not text.strip():
                raise ValueError("it is empty")
            kept = json.loads(text)
            return int(kept["version"]), kept["document"]
        except FileNotFoundError:
            return 0, None
        except OSError as error:
            raise AgentError(f"cannot use {self._path}: {error}") from error
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            log.warning("no applied configuration is known: cannot use %s: %s", self._path, error)
            return 0, None

    def write(self, version: int, document: object) -> None:
        """OSError when it cannot be kept."""
        write_whole(self._path, json.dumps({"version": version, "document": document}, indent=2) + "\n", 0o666)


@dataclass(eq=False)
class Cursor:
    """How far a source of lines was read when a frame was made of them. It is kept once the server has all parts of the frame."""

    source: str
    position: dict[str, Any]
    settle: Callable[[str], None]
    open: int = 1  # parts that the server does not have

    def release(self) -> None:
        """A part of the frame is done with."""
        self.open -= 1
        if not self.open:
            self.settle(self.source)


def later(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Of two positions of a source the one that was reached later."""
    return one if one is not None and one.get("count", 0) >= other.get("count", 0) else other


class Cursors:
    """How far each source of lines is sent, in a file: {source: position}. A position moves when everything up to it is
    acknowledged, so what the server does not have is read again after a restart; unless it is in the spool's file, which says
    with its frames how far their source was read. Positions are counted, so that the later one is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        self.reached: dict[str, dict[str, Any]] = {}  # how far each source was read
        self._moved: dict[str, deque[Cursor]] = {}  # by source, in order; those that are not kept yet
        self._changed = asyncio.Event()
        self._writing = threading.Lock()

    def read(self) -> None:
        """Read the file. One that cannot be read is told by its name, and every source starts as at the first time."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(kept, dict) or not all(isinstance(position, dict) for position in kept.values()):
                raise ValueError("it holds no cursors")
            self._kept = kept
            self.learn(kept)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("it is not known how far the logs were sent: cannot use %s: %s", self._path, error)

    def learn(self, positions: Mapping[str, dict[str, Any]]) -> None:
        """How far sources were read before this start."""
        for source, position in positions.items():
            self.reached[source] = later(self.reached.get(source), position)

    def position(self, source: str) -> dict[str, Any] | None:
        """From where on a source is to be read; none at the first time."""
        return self.reached.get(source)

    def move(self, source: str, position: dict[str, Any]) -> Cursor:
        """A source was read so far."""
        count = self.reached.get(source, {}).get("count", 0) + 1
        return self.restore(source, {**position, "count": count})

    def restore(self, source: str, position: dict[str, Any]) -> Cursor:
        """The cursor of a frame that was made before this start."""
        self.learn({source: position})
        cursor = Cursor(source, position, self._settle)
        self._moved.setdefault(source, deque()).append(cursor)
        return cursor

    async def keep(self) -> None:
        """Write the file whenever it changed, but not too often."""
        try:
            while True:
                await self._changed.wait()
                await asyncio.to_thread(self._write)
                await asyncio.sleep(CURSOR_SECONDS)
        finally:
            if self._changed.is_set():
                self._write()

    def _settle(self, source: str) -> None:
        moved = self._moved[source]
        while moved and not moved[0].open:
            self._kept[source] = later(self._kept.get(source), moved.popleft().position)
            self._changed.set()

    def _write(self) -> None:
        with self._writing:
            self._changed.clear()
            text = json.dumps(dict(self._kept), indent=2)
            try:
                write_whole(self._path, text + "\n", 0o600)
            except OSError as error:
                log.warning("cannot keep how far the logs are sent in %s: %s", self._path, error.strerror)


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


# ==== Spool file ====
# Owns: frames on the disk: the form of the file, and when it is written. Must not know: what the frames say, sockets.

SPOOL_HEADER: Final = b"iiot spool 1\n"
RECORD: Final = struct.Struct(">II")  # before each record: the length of its text, and the checksum of it


def pack(record: Mapping[str, Any]) -> bytes:
    text = encode(record)
    return RECORD.pack(len(text), zlib.crc32(text)) + text


def unpack(file: IO[bytes]) -> Iterator[tuple[dict[str, Any], int]]:
    """The records of a file from where it stands, each with the place behind it, up to the first that is not whole. A power cut
    leaves a part of the last one, or zeros."""
    place = file.tell()
    while len(head := file.read(RECORD.size)) == RECORD.size:
        length, checksum = RECORD.unpack(head)
        text = file.read(length) if 0 < length <= RECORD_BYTES else b""
        if not text or len(text) < length or zlib.crc32(text) != checksum:
            return
        place += RECORD.size + length
        yield json.loads(text), place


class SpoolFile:
    """A file of records, appended to, and now and then written anew. What it does blocks, so it is for a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._guard: IO[bytes] | None = None
        self.size = 0

    def open(self) -> Iterator[dict[str, Any]]:
        """Its records. What is torn at its end is cut off. AgentError when it cannot be used."""
        try:
            self._guard = lock_of(self._path)
            if not self._path.exists() or self._is_blank():
                self.rewrite([])
                return
            with self._path.open("rb") as file:
                if file.read(len(SPOOL_HEADER)) != SPOOL_HEADER:
                    raise AgentError(f"{self._path} is no spool file of this agent; name another one")
                self.size = len(SPOOL_HEADER)
                for record, place in unpack(file):
                    self.size = place
                    yield record
                torn = file.seek(0, os.SEEK_END) - self.size
            self._file = self._path.open("r+b", buffering=0)
            if torn:
                log.warning("%s: %d bytes at its end are no whole record, and are cut off", self._path, torn)
                self._file.truncate(self.size)
        except OSError as error:
            raise AgentError(f"cannot use {self._path}: {error}") from error

    def append(self, data: bytes) -> None:
        """Write records, on to the disk. OSError; then a part of them may be there, and the file is to be written anew."""
        with self._lock:
            assert self._file is not None
            self._file.seek(self.size)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
            self.size += len(data)

    def rewrite(self, records: Iterable[bytes]) -> None:
        """Write these records in place of all. OSError; then the file is as it was."""
        with self._lock:
            new = self._path.with_name(self._path.name + ".new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(SPOOL_HEADER)
                file.writelines(records)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            if self._file is not None:
                self._file.close()
            new.replace(self._path)
            sync_folder(self._path.parent)
            self._file, self.size = self._path.open("r+b", buffering=0), size

    def close(self) -> None:
        with self._lock:
            for file in (self._file, self._guard):
                if file is not None:
                    file.close()

    def _is_blank(self) -> bool:
        """Whether the file holds nothing that could be lost: after a power cut some file systems leave it empty, or as zeros."""
        if not self._path.is_file():
            return False
        with self._path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                if piece.strip(b"\0"):
                    return False
        log.warning("%s is empty or holds nothing but zeros, as after a power cut: it is begun anew", self._path)
        return True


class Ledger:
    """What the spool does, noted on the disk: within a fifth of a second, but not more often. While the disk takes nothing, frames
    are in memory alone; as soon as it does again, the file is written anew."""

    def __init__(self, file: SpoolFile, most: int) -> None:
        self._file = file
        self.room = most // 3  # bytes of frames that may be kept
        self._work: asyncio.Future[None] | None = None
        self._pending: list[bytes] = []
        self._noted = 0  # records
        self._synced = 0  # of them, those on the disk
        self._failed = False
        self._wanted = asyncio.Event()
        self._changed = asyncio.Condition()

    def read(self) -> Iterator[dict[str, Any]]:
        """What was noted before. AgentError."""
        return self._file.open()

    def note(self, record: Mapping[str, Any], *, soon: bool = True) -> int:
        """Note something; its number. What need not be soon goes with the next."""
        self._pending.append(pack(record))
        self._noted += 1
        if soon:
            self._wanted.set()
        return self._noted

    async def synced(self, number: int) -> None:
        """Wait until a record is on the disk, as far as the disk takes any."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SYNC_PATIENCE), self._changed:
                await self._changed.wait_for(lambda: self._failed or self._synced >= number)

    async def keep(self, size: Callable[[], int], records: Callable[[], list[Mapping[str, Any]]]) -> None:
        """Write what is noted. `records` is what the file holds when it is written anew, and `size` how many bytes this is."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(SYNC_GATHER_SECONDS)
            self._wanted.clear()
            try:
                await self._write(size(), records)
            except OSError as error:
                if not self._failed:
                    log.warning("frames are kept in memory alone: cannot write the spool file: %s", error)
                self._failed = True
                self._pending.clear()
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(SPOOL_RETRY_SECONDS if self._failed else SYNC_SECONDS)
            if self._failed:
                self._wanted.set()

    async def close(self) -> None:
        """The end: what is noted and not written is written now."""
        if self._work is not None and not self._work.done():
            await asyncio.wait((self._work,), timeout=SYNC_PATIENCE)
        with suppress(OSError):
            if self._pending and not self._failed:
                self._file.append(b"".join(self._pending))
        self._file.close()

    async def _write(self, size: int, records: Callable[[], list[Mapping[str, Any]]]) -> None:
        number, data = self._noted, b"".join(self._pending)
        dead = self._file.size + len(data) - size
        self._pending.clear()
        work: Callable[[], None] = functools.partial(self._file.append, data)
        if self._failed or dead > min(self.room, size + SPOOL_SLACK):
            work = functools.partial(self._file.rewrite, map(pack, records()))
        self._work = asyncio.get_running_loop().run_in_executor(None, work)
        await asyncio.shield(self._work)  # whoever ends this waits for it
        if self._failed:
            log.info("the spool file is written again")
        self._failed, self._synced = False, number


# ==== Spool ====
# Owns: frames from their making until the server has them on disk, their numbers, and how much of them is under way.
# Must not know: sockets.


DROPPED_LATE: Final[Mapping[str, int]] = MappingProxyType({"output": 1, "started": 2, "result": 3})  # and in this order


@dataclass(eq=False)
class Outgoing:
    """A frame on its way. `lines` are those of a recorded file, one for each sample; `rows` is how many of the file's rows are
    done with when this frame is. `cursor` is how far the source of lines of logs was read. `size` is that of such lines, and of
    every frame on the disk; there it is known by `key`, and `noted` is the record of its number."""

    content: dict[str, Any]
    lines: tuple[int, ...] = ()
    rows: int = 0
    seq: int = 0
    text: bytes = b""
    sent: float = 0.0
    size: int = 0
    cursor: Cursor | None = None
    key: int = 0
    noted: int = 0

    @property
    def kind(self) -> str:
        return str(self.content.get("type", ""))

    @property
    def items(self) -> list[dict[str, Any]]:
        """What a frame can be cut between: samples, or lines of a log."""
        return cast("list[dict[str, Any]]", self.content.get("entries") or self.samples)

    @property
    def samples(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", self.content.get("samples", []))


def part_of(frame: Outgoing, start: int, stop: int) -> Outgoing:
    """A frame with some of the samples or lines of another one."""
    items = frame.items[start:stop]
    rows = frame.rows if len(frame.items) == 1 else min(len(items), frame.rows)
    return Outgoing({**frame.content, "entries" if "entries" in frame.content else "samples": items}, frame.lines[start:stop], rows)


def metrics_of(frame: Outgoing) -> list[str]:
    return list(dict.fromkeys(metric for sample in frame.samples for metric in sample["values"]))


def with_metrics(frame: Outgoing, metrics: Collection[str], rows: int = 0) -> Outgoing:
    """A frame with these metrics alone of another one."""
    samples = [{**sample, "values": {m: v for m, v in sample["values"].items() if m in metrics}} for sample in frame.samples]
    kept = [index for index, sample in enumerate(samples) if sample["values"]]
    lines = tuple(frame.lines[index] for index in kept) if frame.lines else ()
    return Outgoing({**frame.content, "samples": [samples[index] for index in kept]}, lines, rows)


def parts_by_metric(frame: Outgoing) -> list[Outgoing]:
    """Two frames with half of the metrics each; none for a frame with fewer than two metrics."""
    metrics = metrics_of(frame)
    half = len(metrics) // 2
    return [with_metrics(frame, metrics[:half]), with_metrics(frame, metrics[half:], frame.rows)] if half else []


def halves(frame: Outgoing) -> list[Outgoing]:
    """Two frames with half of the samples or lines each, or half of the values of the only one; none for what cannot be halved."""
    count = len(frame.items)
    if count > 1:
        return [part_of(frame, 0, count // 2), part_of(frame, count // 2, count)]
    return parts_by_metric(frame)


def parts_without(frame: Outgoing, path: str) -> tuple[list[Outgoing], Outgoing | None]:
    """A refused frame, where the server names the value at fault: what is to be sent again, and what is lost. The server looks
    no further than to the first fault, so what stands behind it may hold more. Nothing lost where the path names nothing."""
    found = ITEM_PATH.fullmatch(path)
    index = int(found[1]) if found else len(frame.items)
    if found is None or index >= len(frame.items):
        return halves(frame), None
    lost = part_of(frame, index, index + 1)
    rest = [part_of(frame, 0, index), part_of(frame, index + 1, len(frame.items))]
    metric = found[2]
    values = lost.items[0].get("values", {})
    if metric in values and len(values) > 1:
        others = {name: value for name, value in values.items() if name != metric}
        rest.insert(1, Outgoing({**lost.content, "samples": [{**lost.samples[0], "values": others}]}, lost.lines, lost.rows))
        lost = Outgoing({**lost.content, "samples": [{**lost.samples[0], "values": {metric: values[metric]}}]}, lost.lines)
    return [part for part in rest if part.items], lost


class Window:
    """How many bytes may be under way: sent, and not acknowledged. It grows by what is acknowledged within QUICK_SECONDS, and
    is halved when an acknowledgement takes longer than SLOW_SECONDS. So frames on a slow link are small enough that they,
    and the answers to pings between them, arrive within seconds."""

    def __init__(self) -> None:
        self.size = WINDOW_FIRST
        self.frame_most = FRAME_BYTES  # what the server takes, as far as it is known
        self.one_by_one = False  # the server refused a frame and did not say which
        self._halved = 0.0

    @property
    def frame(self) -> int:
        """How large a frame should be at most."""
        return min(self.frame_most, self.size)

    def acknowledged(self, size: int, sent: float, now: float, under_way: int) -> None:
        """A frame of this size was acknowledged, when so many bytes were under way. One sent before the last halving says
        nothing about the window as it is now; one sent while the window stood half empty says nothing about its size."""
        if now - sent <= QUICK_SECONDS:
            if under_way * 2 >= self.size:
                self.size = min(WINDOW_MOST, self.size + size)
        elif now - sent > SLOW_SECONDS and sent >= self._halved:
            self.halve(now)

    def halve(self, now: float) -> None:
        self.size = max(WINDOW_LEAST, self.size // 2)
        self._halved = now


class Found:
    """The frames of a spool file, as its records tell of them."""

    def __init__(self) -> None:
        self.reached: dict[str, dict[str, Any]] = {}  # how far sources were read
        self.last_key = 0
        self._frames: dict[int, Outgoing] = {}
        self._places: dict[int, tuple[int, ...]] = {}  # in the order of all; parts of a frame stand in its place
        self._told: dict[int, tuple[str, dict[str, Any]] | None] = {}  # the cursor of each frame
        self._numbered: list[Outgoing] = []  # by number
        self._records = 0

    def add(self, record: Mapping[str, Any]) -> None:
        self._records += 1
        for source, position in record.get("cursors", {}).items():
            self._reach(source, position)
        place: tuple[int, ...] = (self._records,)
        told = None
        if "cursor" in record:
            told = record["cursor"][0], record["cursor"][1]
            self._reach(*told)
        if "instead" in record:
            place, told = self._places.get(record["instead"], place), self._told.get(record["instead"])
            self._frames.pop(record["instead"], None)
        for index, (key, content) in enumerate(record.get("frames", ())):
            self._frames[key] = Outgoing(content, key=key)
            self._places[key], self._told[key] = (*place, index), told
            self.last_key = max(self.last_key, key)
        if "number" in record:
            self._number(*record["number"])
        for key in record.get("done", ()):
            self._frames.pop(key, None)

    def in_order(self) -> list[tuple[Outgoing, tuple[str, dict[str, Any]] | None]]:
        """Every frame that is not done with, and its cursor."""
        frames = sorted(self._frames.values(), key=lambda frame: self._places[frame.key])
        return [(frame, self._told[frame.key]) for frame in frames]

    def _reach(self, source: str, position: dict[str, Any]) -> None:
        self.reached[source] = later(self.reached.get(source), position)

    def _number(self, key: int, seq: int) -> None:
        """A frame was given a number. Then the server had none from this one on, so no other frame has one of them."""
        while self._numbered and self._numbered[-1].seq >= seq:
            self._numbered.pop().seq = 0
        if key in self._frames:
            self._frames[key].seq = seq
            self._numbered.append(self._frames[key])


class Spool:
    """Frames from their making until the server has them on disk; bounded.

    A frame is numbered when it is sent. What is not stored when a session ends is numbered anew in the next one, above the
    number that the server's welcome names: it may be lower than before, and the frames may be cut into smaller ones.

    With a ledger, frames and their numbers are on the disk before they are sent. So after a restart the number in the server's
    welcome tells which of them are stored, as it does after a broken link."""

    def __init__(self, most: int, ledger: Ledger | None = None) -> None:
        self.window = Window()
        self._sent: deque[Outgoing] = deque()
        self._numbered: deque[Outgoing] = deque()  # the last ones of those: numbered, and not handed over to be sent
        self._waiting: deque[Outgoing] = deque()
        self._ledger = ledger
        self._keys = 0
        self._under_way = 0  # bytes
        self._bytes = 0  # of all frames, as far as they are counted: on the disk
        self._line_bytes = 0  # of lines of logs
        self._lines_from = 0.0  # when lines may be sent again, by the monotonic clock
        self._server_clock = float("inf")  # milliseconds that it is ahead of the monotonic clock
        self.most = most
        self._seq = 0
        self._changed = asyncio.Condition()
        self.dropped = 0
        self.settled: Callable[[dict[str, Any]], None] = lambda _: None  # told of every frame that the server has stored or refused

    def __len__(self) -> int:
        return len(self._sent) + len(self._waiting)

    @property
    def sent(self) -> int:
        """How many frames are under way."""
        return len(self._sent)

    def load(self, cursors: Cursors) -> None:
        """Take up the frames that were on the disk at the start. Those with a number may have been sent. AgentError."""
        if self._ledger is None:
            return
        found = Found()
        for record in self._ledger.read():
            found.add(record)
        cursors.learn(found.reached)
        frames, made = found.in_order(), dict[int, Cursor]()
        for frame, told in frames:
            if told is not None and id(told) in made:
                frame.cursor = made[id(told)]
                frame.cursor.open += 1
            elif told is not None:
                frame.cursor = made[id(told)] = cursors.restore(*told)
            self._count(frame)
        self._keys = found.last_key
        self._sent.extend(sorted((frame for frame, _ in frames if frame.seq), key=lambda frame: frame.seq))
        self._waiting.extend(frame for frame, _ in frames if not frame.seq)
        if frames:
            log.info("the spool file holds %d frames that the server may not have", len(frames))

    def size(self) -> int:
        """Bytes of all frames, as far as they are counted."""
        return self._bytes

    def of(self, kind: str) -> list[dict[str, Any]]:
        """What the frames of one kind say."""
        return [frame.content for frame in chain(self._sent, self._waiting) if frame.kind == kind]

    def records(self, cursors: Cursors) -> list[Mapping[str, Any]]:
        """What the file holds when it is written anew."""
        records: list[Mapping[str, Any]] = [{"cursors": dict(cursors.reached)}]
        for frame in chain(self._sent, self._waiting):
            record: dict[str, Any] = {"frames": [[frame.key, frame.content]]}
            if frame.cursor is not None:
                record["cursor"] = [frame.cursor.source, frame.cursor.position]
            records.append(record)
        return records + [{"number": [frame.key, frame.seq]} for frame in self._sent]

    async def put(self, content: dict[str, Any], lines: tuple[int, ...] = (), cursor: Cursor | None = None) -> None:
        """Keep a frame; where there is no room, let go of the oldest."""
        frame = Outgoing(content, lines, len(lines), cursor=cursor)
        async with self._changed:
            self._enter([frame])
            self._waiting.append(frame)
            while len(self) > 1 and self._is_full():
                self._drop()
            self._changed.notify_all()

    async def put_first(self, frames: list[Outgoing], instead: Outgoing) -> None:
        """Parts of a frame that was refused, in its place: they are sent next."""
        async with self._changed:
            self._replace(instead, frames)
            self._waiting.extendleft(reversed(frames))
            self._changed.notify_all()

    async def room_for_lines(self) -> None:
        """Wait until lines of logs may be put. They can wait where they are, so they take no more than half of the room."""
        async with self._changed:
            await self._changed.wait_for(self._has_room_for_lines)

    async def hold_lines(self, seconds: float) -> None:
        """Send no lines for so long: readings would wait behind them."""
        async with self._changed:
            self._lines_from = time.monotonic() + seconds
            self._changed.notify_all()

    def learn_time(self, moment: int) -> None:
        """What the server's clock says now. The monotonic clock goes on from there, because the device's own may be set at any time."""
        self._server_clock = moment - time.monotonic() * 1000

    async def look_again(self) -> None:
        """Lines may be sent again by now."""
        async with self._changed:
            self._changed.notify_all()

    async def next(self) -> Outgoing:
        """The next frame to send, numbered, cut to the size that the link is good for."""
        while True:
            async with self._changed:
                await self._changed.wait_for(self._number_more)
                frame = self._numbered[0]
            if self._ledger is not None:
                await self._ledger.synced(frame.noted)
            if self._numbered and self._numbered[0] is frame:
                self._numbered.popleft()
                frame.sent = time.monotonic()
                return frame

    async def acknowledge(self, seq: int) -> int:
        """Let go of every frame up to `seq`; how many rows of a recording were done with them."""
        rows, under_way, now = 0, self._under_way, time.monotonic()
        async with self._changed:
            while self._sent and self._sent[0].seq <= seq:
                frame = self._sent[0]
                rows += frame.rows
                self._remove_sent(frame)
                self._leave(frame)
                self.window.acknowledged(len(frame.text), frame.sent, now, under_way)
            self._changed.notify_all()
        return rows

    def refuse(self, seq: int) -> Outgoing | None:
        """Take out a frame that the server does not take; 0 is the oldest one. `put_first` has to follow with what is to be
        sent in its place, if only with nothing: until then nobody who waits sees the change."""
        frame = next((frame for frame in self._sent if frame.seq == seq or not seq), None)
        if frame is not None:
            self._remove_sent(frame)
        return frame

    async def resume(self, seq: int) -> int:
        """A new session: what lies above the server's `seq` is sent again. How many rows turn out to be stored."""
        if self._sent and seq < self._sent[0].seq:  # nothing that was under way arrived
            self.window.halve(time.monotonic())
        rows = 0
        async with self._changed:
            while self._sent and self._sent[0].seq <= seq:
                frame = self._sent.popleft()
                rows += frame.rows
                self._leave(frame)
            self._send_again()
            self._seq = seq
            self._changed.notify_all()
        return rows

    def waiting_since(self) -> float | None:
        """When the oldest frame under way was sent, by the monotonic clock; none if none is."""
        return self._sent[0].sent if self._sent else None

    async def suspect(self) -> None:
        """One of the frames under way was refused: all are sent again, whatever number the server is at, and one at a time."""
        async with self._changed:
            self.window.one_by_one = True
            self._send_again()
            self._changed.notify_all()

    def largest(self) -> int:
        """Bytes of the largest frame under way."""
        return max((len(frame.text) for frame in self._sent), default=0)

    async def at_most(self, frames: int) -> None:
        """Wait until no more than so many frames are kept."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self) <= frames)

    def _is_full(self) -> bool:
        """Whether there is more than there is room for."""
        return len(self) > self.most if self._ledger is None else self._bytes > self._ledger.room

    def _has_room_for_lines(self) -> bool:
        if self._holds_lines():
            return False
        if self._ledger is None:
            return self._line_bytes < LOG_SPOOL_BYTES and 2 * len(self) <= self.most
        return 2 * self._line_bytes <= self._ledger.room

    def _holds_lines(self) -> bool:
        return time.monotonic() < self._lines_from

    def _next_waiting(self) -> Outgoing | None:
        """The oldest frame that may be sent."""
        if self._holds_lines():
            return next((frame for frame in self._waiting if frame.kind != "log"), None)
        return self._waiting[0] if self._waiting else None

    def _drop(self) -> None:
        """Let go of the oldest readings; where there are none, of the oldest frame, and of those of commands at last."""
        oldest = next((frame for frame in chain(self._sent, self._waiting) if frame.kind == "telemetry"), None)
        frame = oldest or min(chain(self._sent, self._waiting), key=lambda frame: DROPPED_LATE.get(frame.kind, 0))
        if frame in self._sent:
            self._remove_sent(frame)
        else:
            self._waiting.remove(frame)
        self._leave(frame, settled=False)
        self.dropped += 1

    def _number_more(self) -> bool:
        """Number what may be under way now: without a ledger one frame, with one as many as go to the disk together. Whether there
        is one to send."""
        while not (self._sent and self.window.one_by_one) and not (self._numbered and self._ledger is None):
            frame = self._next_waiting()
            if frame is None:
                break
            if frame.seq != self._seq + 1 or not frame.text:
                frame.seq = self._seq + 1
                latest = self._server_clock + time.monotonic() * 1000 + LINE_AHEAD_MOST
                frame.text = encode({**with_times_to(frame.content, latest), "seq": frame.seq})
            if len(frame.text) > self.window.frame and (parts := halves(frame)):
                self._waiting.remove(frame)
                self._replace(frame, parts)
                self._waiting.extendleft(reversed(parts))
            elif self._sent and self._under_way + len(frame.text) > self.window.size:
                break
            else:
                self._waiting.remove(frame)
                self._sent.append(frame)
                self._numbered.append(frame)
                self._seq = frame.seq
                self._under_way += len(frame.text)
                frame.sent = time.monotonic()
                if self._ledger is not None:
                    frame.noted = self._ledger.note({"number": [frame.key, frame.seq]})
        return bool(self._numbered)

    def _remove_sent(self, frame: Outgoing) -> None:
        self._sent.remove(frame)
        self._under_way -= len(frame.text)
        with suppress(ValueError):
            self._numbered.remove(frame)

    def _send_again(self) -> None:
        """Whatever is under way waits again."""
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        self._numbered.clear()
        self._under_way = 0

    def _count(self, frame: Outgoing) -> None:
        if self._ledger is not None or frame.kind == "log":
            frame.size = len(encode(frame.content)) + FRAME_OVERHEAD
            if frame.cursor is not None:
                frame.size += len(frame.cursor.source) + len(encode(frame.cursor.position))
        self._bytes += frame.size
        self._line_bytes += frame.size if frame.kind == "log" else 0

    def _enter(self, frames: list[Outgoing], instead: Outgoing | None = None) -> None:
        for frame in frames:
            self._count(frame)
            self._keys += 1
            frame.key = self._keys
        if self._ledger is not None and frames:
            record: dict[str, Any] = {"frames": [[frame.key, frame.content] for frame in frames]}
            if instead is not None:
                record["instead"] = instead.key
            elif frames[0].cursor is not None:
                record["cursor"] = [frames[0].cursor.source, frames[0].cursor.position]
            self._ledger.note(record)

    def _leave(self, frame: Outgoing, *, settled: bool = True) -> None:
        self._bytes -= frame.size
        self._line_bytes -= frame.size if frame.kind == "log" else 0
        if frame.cursor is not None:
            frame.cursor.release()
        if settled:
            self.settled(frame.content)
        if self._ledger is not None:
            self._ledger.note({"done": [frame.key]}, soon=False)

    def _replace(self, frame: Outgoing, parts: list[Outgoing]) -> None:
        for part in parts:
            part.cursor = frame.cursor
            if part.cursor is not None:
                part.cursor.open += 1
        self._enter(parts, instead=frame)
        self._leave(frame)


# ==== Logs ====
# Owns: lines of logs, gathered into frames. Must not know: sockets.


class Level:
    """The lowest level of lines that are sent, as the configuration says it; without a word of it all are. What the agent logs
    itself follows: without a word of it, --log-level decides."""

    def __init__(self) -> None:
        self._least = 0

    def follow(self, document: object) -> None:
        """A configuration was applied."""
        level = wanted_level(document)
        self._least = LEVELS.get(level, 0) if isinstance(level, str) else 0
        log.setLevel(self._least)

    def takes(self, level: str) -> bool:
        return LEVELS[level] >= self._least


class LogFrames:
    """Makes frames of the lines of one source, in their order. Lines below the level that is wanted are left out."""

    def __init__(self, source: str, spool: Spool, level: Level, cursors: Cursors | None) -> None:
        self._source = source
        self._spool = spool
        self._level = level
        self._cursors = cursors
        self._entries: list[dict[str, Any]] = []
        self._bytes = 0
        self._position: dict[str, Any] | None = None
        self._since = 0.0  # when the first of what waits came

    def patience(self) -> float | None:
        """For how many seconds what waits may wait for more; none where nothing waits."""
        return None if self._position is None else max(0.0, self._since + LOG_SECONDS - time.monotonic())

    async def add(self, entry: dict[str, Any] | None, position: dict[str, Any]) -> None:
        """Take a line, or none, and how far its source was read with it; a full frame is put."""
        if self._position is None:
            self._since = time.monotonic()
        self._position = position
        if entry is not None and self._level.takes(entry["level"]):
            self._entries.append(entry)
            self._bytes += len(encode(entry))
        if len(self._entries) >= LOG_ENTRIES or self._bytes >= LOG_BYTES:
            await self.put()

    async def put(self) -> None:
        """Make a frame of what is there, as soon as there is room for one. The cursor moves without one too."""
        if self._position is None:
            return
        if self._entries:
            await self._spool.room_for_lines()
        cursor = self._cursors.move(self._source, self._position) if self._cursors is not None else None
        entries, self._entries, self._bytes, self._position = self._entries, [], 0, None
        if entries:
            await self._spool.put({"type": "log", "entries": entries}, cursor=cursor)
        elif cursor is not None:
            cursor.release()


ROTATED: Final = re.compile(r"[.-][0-9][0-9._-]*")  # what is added to a name, .1 or -20260131 or .2026-01-31_12; not what is compressed
NUMBERED: Final = re.compile(r"[.-]([0-9]{1,3})")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


class Tail:
    """Reads the lines that are appended to a file, a piece at a time. What it does blocks, so it is for a thread.

    The file is known by its device and inode, and by its first bytes and those before the place that was reached, because an inode
    is used again. One that is renamed is read to its end, then those that were written after it, then the one that has its name now.
    One that shrinks, or has other bytes than before, was emptied: its copy is read to its end, if there is one, then the file from
    its start; what was written and emptied between copy and look is lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._stat = os.stat_result([0] * 10)
        self._modified = 0  # what was written after that follows
        self._done: deque[tuple[int, int]] = deque(maxlen=FILES_KNOWN)  # files that were opened
        self._head = b""
        self._last = b""  # the bytes before `_offset`
        self._offset = 0  # behind the last line that was given
        self._line = bytearray()  # the start of the next one
        self._length = 0  # of it, in the file
        self._end = b""  # the last bytes that were read
        self._moved = time.monotonic()  # when something was last there to be read
        self._told = ""
        self.at_end = False

    def start(self, position: Mapping[str, Any] | None) -> None:
        """Go on where the position says; at the first time, behind the last whole line."""
        if position is None:
            try:
                self._open(self._path, 0)
                self._offset = self._after_last_line()
                self._learn_place()
            except OSError:
                self._modified = time.time_ns()
            return
        offset, known = int(position.get("offset", 0)), (position.get("device"), position.get("inode"))
        self._modified = int(position.get("modified", time.time_ns()))
        files = {path: identity(stat) for path, stat in self._files()}
        found = [path for path in files if files[path] == known and self._is_at(path, position)]
        for path in (*found, *self._copies(position)):
            with suppress(OSError):
                self._open(path, offset)
                self._learn_place()
                if self._stat.st_mtime_ns < self._modified:  # then what was written last was read before this file
                    self._done.extend(identity(stat) for _, stat in self._rotated() if stat.st_mtime_ns == self._modified)
                return
        if known in files.values():
            log.warning("%s was emptied while it was not read: lines may be missing", self._path)
        elif position.get("inode"):
            log.warning("%s: the file that was read last is gone: lines may be missing", self._path)

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """The next lines, each with the position behind it."""
        try:
            if self._file is None:
                self._open(self._next() or self._path, 0)
            lines = self._read()
            self._told = ""
        except FileNotFoundError:  # it appears later
            lines, self.at_end = [], True
        except OSError as error:
            lines, self.at_end = [], True
            if str(error) != self._told:
                self._told = str(error)
                log.warning("cannot read %s: %s", self._path, error)
        return lines

    def position(self) -> dict[str, Any]:
        return self._position(self._offset)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        assert self._file is not None
        lines = self._emptied()
        self._file.seek(self._offset + self._length)
        data = self._file.read(PIECE_BYTES)
        self.at_end = len(data) < PIECE_BYTES
        if data:
            self._moved = time.monotonic()
            return lines + self._split(data)
        quiet, following = time.monotonic() - self._moved, self._following()
        if following == self._path and quiet < ROTATED_SECONDS:  # its writer may not know yet
            following = None
        if self._length and (following is not None or quiet >= PARTIAL_SECONDS):
            lines += self._finish(0)
        if following is not None:
            self._open(following, 0)
            self.at_end = False
        return lines

    def _open(self, path: Path, offset: int) -> None:
        """OSError when it is not there, or no file."""
        if not S_ISREG(path.stat().st_mode):  # to open a pipe would wait for somebody who writes
            raise OSError(f"{path} is no file")
        file = path.open("rb", buffering=0)
        if self._file is not None:
            self._file.close()
        self._file, self._stat = file, os.fstat(file.fileno())
        if self._stat.st_size or self._stat.st_mtime_ns > self._modified:  # the last one may be newer than this one, made empty
            self._modified = self._stat.st_mtime_ns
        self._done.append(identity(self._stat))
        self._head, self._last, self._offset, self._length, self._moved = b"", b"", offset, 0, time.monotonic()
        self._line.clear()
        self._end = b""

    def _after_last_line(self) -> int:
        assert self._file is not None
        start = max(0, self._stat.st_size - PIECE_BYTES)
        self._file.seek(start)
        return start + self._file.read(PIECE_BYTES).rfind(b"\n") + 1

    def _take_head(self) -> None:
        """Learn the first bytes, as many of them as lie before the position."""
        most = min(HEAD_BYTES, self._offset)
        if self._file is not None and len(self._head) < most:
            self._file.seek(0)
            self._head = self._file.read(most)

    def _learn_place(self) -> None:
        """Learn the bytes by which the place is known again."""
        self._take_head()
        if self._file is not None:
            start = max(0, self._offset - LAST_BYTES)
            self._file.seek(start)
            self._last = self._end = self._file.read(self._offset - start)

    def _is_at(self, path: Path, position: Mapping[str, Any]) -> bool:
        """Whether a file has the bytes that were read, as far as they are known."""
        offset = int(position.get("offset", 0))
        with suppress(OSError), path.open("rb") as file:
            head = file.read(min(HEAD_BYTES, offset))
            start = max(0, offset - LAST_BYTES)
            file.seek(start)
            last = file.read(offset - start)
            return digest(head) == position.get("head") and digest(last) == position.get("last", digest(last))
        return False

    def _copies(self, position: Mapping[str, Any]) -> Iterator[Path]:
        """Other files that have the bytes that were read, and were written to since. So does what is copied before a file is emptied."""
        own = position.get("device"), position.get("inode")
        for path, stat in self._rotated():
            if position.get("offset") and identity(stat) != own and stat.st_mtime_ns >= self._modified and self._is_at(path, position):
                yield path

    def _emptied(self) -> list[tuple[str, dict[str, Any]]]:
        """Look whether the file was emptied; then it is read from its start. What was there of its last line is a line."""
        assert self._file is not None
        stat = os.fstat(self._file.fileno())
        changed, self._stat = stat.st_mtime_ns != self._stat.st_mtime_ns or stat.st_size != self._stat.st_size, stat
        emptied = stat.st_size < self._offset + self._length
        if changed and not emptied:
            self._file.seek(0)
            emptied = self._file.read(len(self._head)) != self._head
            self._file.seek(self._offset - len(self._last))
            emptied = emptied or self._file.read(len(self._last)) != self._last
        if not emptied:
            self._modified = stat.st_mtime_ns if changed else self._modified
            return []
        for copy in self._copies(self.position()):
            self._open(copy, self._offset)
            self._learn_place()
            return []
        self._modified = stat.st_mtime_ns
        log.warning("%s was emptied: what was written just before may be missing", self._path)
        lines = self._finish(0) if self._length else []
        self._head, self._last, self._end, self._offset = b"", b"", b"", 0
        return [(text, self._position(0)) for text, _ in lines]

    def _split(self, data: bytes) -> list[tuple[str, dict[str, Any]]]:
        lines: list[tuple[str, dict[str, Any]]] = []
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._grow(piece)
            self._end = self._end[1 - LAST_BYTES :] + b"\n"
            lines += self._finish(1)
        self._grow(rest)
        return lines

    def _grow(self, piece: bytes) -> None:
        self._line += piece[: max(0, LINE_BYTES - len(self._line))]
        self._length += len(piece)
        self._end = (self._end + piece[-LAST_BYTES:])[-LAST_BYTES:]

    def _finish(self, newline: int) -> list[tuple[str, dict[str, Any]]]:
        """The line that is complete now. An empty one says nothing."""
        text = bytes(self._line).removesuffix(b"\r").decode(errors="backslashreplace").removeprefix("\ufeff")
        self._offset += self._length + newline
        self._line.clear()
        self._length = 0
        self._last = self._end
        self._take_head()
        return [(text, self._position(self._offset))] if text.strip() else []

    def _position(self, offset: int) -> dict[str, Any]:
        return {
            "device": self._stat.st_dev, "inode": self._stat.st_ino, "offset": offset, "head": digest(self._head[:offset]),
            "last": digest(self._last), "modified": self._modified,
        }  # fmt: skip

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The file, and those that it became when it was rotated."""
        name, beside = self._path.name, list[Path]()
        with suppress(OSError):
            beside = [path for path in self._path.parent.iterdir() if path.name.startswith(name)]
        for path in (self._path, *(path for path in beside if ROTATED.fullmatch(path.name.removeprefix(name)))):
            with suppress(OSError):
                if S_ISREG((stat := path.stat()).st_mode):
                    yield path, stat

    def _rotated(self) -> list[tuple[Path, os.stat_result]]:
        """The files that this one became, in the order in which they were written. Of two that were written in the same moment the
        one with the higher number is the older one, as most programs number them."""

        def age(found: tuple[Path, os.stat_result]) -> tuple[int, int, str]:
            number = NUMBERED.fullmatch(found[0].name.removeprefix(self._path.name))
            return found[1].st_mtime_ns, -int(number[1]) if number else 0, found[0].name

        return sorted((found for found in self._files() if found[0] != self._path), key=age)

    def _following(self) -> Path | None:
        """The file that follows this one, if it was renamed, or is a copy. The one with the name may not be there yet."""
        with suppress(OSError):
            if identity(self._path.stat()) == identity(self._stat):
                return None
            return self._next() or self._path
        return self._next()

    def _is_later(self, stat: os.stat_result) -> bool:
        """Than this file. The times of two files that are written one right after the other may be the same."""
        if identity(stat) == identity(self._stat):  # somebody may write to it just now
            return False
        return stat.st_mtime_ns > self._modified or (stat.st_mtime_ns == self._modified and identity(stat) not in self._done)

    def _next(self) -> Path | None:
        """The oldest file that was rotated and written to after this one."""
        return next((path for path, stat in self._rotated() if self._is_later(stat)), None)


class LogFile:
    """Sends the lines of one file. They have no time that one could rely on, so it is the time at which they were read."""

    def __init__(self, path: str, frames: LogFrames, position: Mapping[str, Any] | None) -> None:
        self._path = path
        self._tail = Tail(Path(path))
        self._frames = frames
        self._position = position

    async def run(self) -> None:
        with closing(self._tail):
            await asyncio.to_thread(self._tail.start, self._position)
            await self._follow()

    async def _follow(self) -> None:
        while True:
            for text, position in await asyncio.to_thread(self._tail.read):
                await self._frames.add(log_entry(level_of(text), text, now_ms(), self._path), position)
            if self._tail.at_end:
                if (position := self._tail.position()) != self._position:  # at the first start too, which is one only once
                    self._position = position
                    await self._frames.add(None, position)
                await self._frames.put()
                await asyncio.sleep(LOG_SECONDS)


PLACE: Final = re.compile(r"(?:^|;)b=([0-9a-f]{32});m=([0-9a-f]{1,16});t=([0-9a-f]{1,16})(?:;|$)")


@dataclass(frozen=True)
class JournalPlace:
    """When an entry of the journal was made, as its cursor says it: in which boot, so long after its start, and by the clock."""

    boot: str
    since_boot: int
    clock: int

    @classmethod
    def parse(cls, cursor: str) -> JournalPlace | None:
        found = PLACE.search(cursor)
        return None if found is None else cls(found[1], int(found[2], 16), int(found[3], 16))


def was_sent(cursor: str, reached: str, boot: str) -> bool:
    """Whether an entry was certainly sent before, where the last one that was sent is gone from the journal. Within one boot its own
    count of time says so. The clock says it of other boots; but not of the present one, whose clock may not be set yet. Without the
    time of the last one, what other boots left was sent: it is much, and the agent most likely ran then."""
    place, last = JournalPlace.parse(cursor), JournalPlace.parse(reached)
    if place is None:
        return False
    if last is None:
        return bool(boot) and place.boot != boot
    if place.boot == last.boot:
        return place.since_boot <= last.since_boot
    return place.boot != boot and place.clock <= last.clock


class PlaceGone(Exception):  # noqa: N818 - it is no error: the journal is read from its start
    """The journal does not have the entry that was reached."""


class Journal:
    """Sends the lines of the system's journal. A child tells them; when it ends, the next one goes on behind the last line.

    The child is to begin with the last line itself. Told to begin behind it, journalctl passes over another one where this one is
    gone, or tells nothing. Then it tells all that it has, and what was sent before is left out."""

    def __init__(self, frames: LogFrames, position: Mapping[str, Any] | None, without: int = 0) -> None:
        self._frames = frames
        self._without = without  # a process whose lines come another way
        self._cursor = str(position.get("cursor", "")) if position else ""
        self._sought = 0.0  # until when the child has to tell the entry of the cursor, by the monotonic clock; 0 once it has
        self._is_known: Callable[[str], bool] = lambda _: False  # entries that are left out

    async def run(self) -> None:
        attempt = 0
        while True:
            started = time.monotonic()
            reason = await self._follow()
            attempt = 0 if time.monotonic() - started > RETRY_SECONDS else attempt + 1
            pause = backoff(attempt, RETRY_SECONDS, 1.0)
            log.warning("journalctl ended: %s; it is started again in %.1f s", reason, pause)
            await asyncio.sleep(pause)

    async def _follow(self) -> str:
        """Run journalctl until it ends; why it did."""
        self._sought, self._is_known = 0.0, lambda _: False
        if not self._cursor:
            return await self._run_child("--lines=0")
        self._sought = time.monotonic() + JOURNAL_SECONDS
        try:
            return await self._run_child("--no-tail", f"--cursor={self._cursor}")
        except PlaceGone:
            log.warning("the place in the journal that was reached is gone: lines may be missing")
        self._sought, self._is_known = 0.0, functools.partial(was_sent, reached=self._cursor, boot=present_boot())
        return await self._run_child("--no-tail")

    async def _run_child(self, *start: str) -> str:
        """Run journalctl until it ends; why it did. Without --all it would tell no long message."""
        with tempfile.TemporaryFile() as said:
            try:
                process = await asyncio.create_subprocess_exec(
                    "journalctl", "-o", "json", "--all", "--follow", *start,
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=said,
                )  # fmt: skip
            except OSError as error:
                return f"it cannot be started ({error.strerror})"
            try:
                assert process.stdout is not None
                await self._read(process.stdout)
                with suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await process.wait()
            finally:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            said.seek(0)
            return said.read()[-MESSAGE_CHARACTERS:].decode(errors="replace").strip() or f"exit code {process.returncode}"

    async def _read(self, told: asyncio.StreamReader) -> None:
        """Take what the child tells, until it tells no more. A piece of an entry at its end is read again from the next one."""
        rest, too_long, ended = b"", False, False
        while not ended:
            data = b""
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    data = await told.read(PIECE_BYTES)
                    ended = not data
            *entries, rest = (rest + data).split(b"\n")
            for entry in entries:  # the end of one that was too long is no JSON
                await self._take(entry)
            too_long = too_long and not entries
            if len(rest) > JOURNAL_BYTES:
                log.warning("an entry of the journal is left out: it is longer than %d bytes", JOURNAL_BYTES)
                too_long = True
            rest = b"" if too_long else rest
            if self._sought and (ended or time.monotonic() >= self._sought):
                raise PlaceGone
            if self._frames.patience() == 0 or ended:
                await self._frames.put()

    def _patience(self) -> float | None:
        """For how many seconds to wait for what the child tells next."""
        return max(0.0, self._sought - time.monotonic()) if self._sought else self._frames.patience()

    async def _take(self, text: bytes) -> None:
        try:
            content = json.loads(text)
            cursor = content["__CURSOR"]
        except (ValueError, KeyError, TypeError):  # what journalctl says besides, such as `-- No entries --`
            return
        cursor = journal_text(cursor)
        if self._sought:
            if cursor != self._cursor:
                raise PlaceGone
            self._sought = 0.0
            return
        if self._is_known(cursor):
            return
        self._cursor = cursor
        entry = journal_entry(content)
        if entry is not None and self._without and entry.get("fields", {}).get("pid") == self._without:
            entry = None
        await self._frames.add(entry, {"cursor": self._cursor})


class OwnLog(logging.Handler):
    """Sends what the agent itself logs. What is logged because lines are sent is not among it: there would be no end to it."""

    def __init__(self, frames: LogFrames) -> None:
        super().__init__()
        self._frames = frames
        self._entries: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record, in whatever thread it was made."""
        if record.name != shipping.name:
            text = redacted(self.format(record)).strip()
            self._entries.append(log_entry(level_numbered(record.levelno), text, round(record.created * 1000), record.name))
            if len(self._entries) > OWN_LINES:
                self._entries.popleft()
                self._lost += 1
            self._loop.call_soon_threadsafe(self._came.set)

    async def run(self) -> None:
        logging.getLogger().addHandler(self)
        try:
            while True:
                await self._came.wait()
                await asyncio.sleep(LOG_SECONDS)
                self._came.clear()
                await self._send()
        finally:
            logging.getLogger().removeHandler(self)

    async def _send(self) -> None:
        while self._entries:
            if self._lost:
                lost, self._lost = self._lost, 0
                await self._frames.add(log_entry("warning", f"{lost} lines of this log are lost", now_ms(), log.name), {})
            await self._frames.add(self._entries.popleft(), {})
        await self._frames.put()


def log_steps(options: Options, spool: Spool, level: Level, cursors: Cursors) -> dict[str, Coroutine[Any, Any, None]]:
    """What reads lines of logs, by its source, and what keeps how far they are read."""
    steps: dict[str, Coroutine[Any, Any, None]] = {}
    for path in dict.fromkeys(options.log_file):
        source = f"file:{Path(path).absolute()}"
        steps[source] = LogFile(path, LogFrames(source, spool, level, cursors), cursors.position(source)).run()
    if options.journal:
        frames = LogFrames("journal", spool, level, cursors)
        steps["journal"] = Journal(frames, cursors.position("journal"), os.getpid() if options.own_log else 0).run()
    if steps:
        steps["cursors"] = cursors.keep()
    if options.own_log:
        steps["own log"] = OwnLog(LogFrames("own log", spool, level, None)).run()
    return steps


# ==== Commands ====
# Owns: programs that are run for the operator: what they write, how they end, and that none runs twice. Must not know: sockets.

MARK: Final = "AGENT_COMMAND"  # variable of the environment by which the processes of a command are known
NOT_BEGUN: Final = "it was not begun"
LOST: Final = "the agent was started again while the command ran"
SIGNALS: Final[Mapping[int, str]] = MappingProxyType({one.value: one.name for one in signal.Signals})


@dataclass(frozen=True)
class ProcessStat:
    """What the system tells of a process: its group, its session, and its start in ticks since the boot."""

    group: int
    session: int
    start: int

    @classmethod
    def of(cls, pid: int) -> ProcessStat | None:
        """None where there is no such process, or the system does not tell: proc(5)."""
        try:
            words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return cls(int(words[2]), int(words[3]), int(words[19]))
        except (OSError, IndexError, ValueError):
            return None


@dataclass(frozen=True)
class Group:
    """The processes of a command: a group and a session of their own, both with the number of the first process. The number is
    given to no other process while one of them is there; afterwards it can be."""

    command: int
    leader: int
    start: int = 0  # of the leader; 0 where it is not known
    boot: str = ""

    @classmethod
    def led_by(cls, pid: int, command: int) -> Group:
        stat = ProcessStat.of(pid)
        return cls(command, pid, stat.start if stat is not None else 0, present_boot())

    def is_there(self) -> bool:
        """Whether processes with this number are certainly those of the command."""
        if not self.boot or self.boot != present_boot():
            return False
        stat = ProcessStat.of(self.leader)
        if stat is not None and self.start and stat.start == self.start:
            return True
        return any(self._has(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit())

    def signal(self, number: int) -> bool:
        """Send a signal to all of them; whether there is any."""
        try:
            os.killpg(self.leader, number)
        except ProcessLookupError:
            return False
        except PermissionError:  # they are another user's by now
            return True
        return True

    def _has(self, pid: int) -> bool:
        stat = ProcessStat.of(pid)
        if stat is None or stat.group != self.leader or stat.session != self.leader or stat.start < self.start:
            return False
        with suppress(OSError):
            return f"{MARK}={self.command}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False


@dataclass(eq=False)
class Known:
    """A command that the server may send again: until the server has its result."""

    number: int
    group: Group | None = None
    result: dict[str, Any] | None = None  # the frame that says it
    kept: bool = True  # in the file
    given: bool = False  # the result was put into the spool

    @classmethod
    def read(cls, number: int, content: Mapping[str, Any]) -> Known:
        """As the file has it. ValueError and the like where it is no such content."""
        group = Group(number, int(content["leader"]), int(content["start"]), str(content["boot"])) if "leader" in content else None
        return cls(number, group, {**content["result"]} if "result" in content else None)

    def content(self) -> dict[str, Any]:
        """As the file has it."""
        if self.result is not None:
            return {"result": self.result}
        return {"leader": self.group.leader, "start": self.group.start, "boot": self.group.boot} if self.group is not None else {}


class CommandsFile:
    """Which commands were begun, and the results that the server may not have. It is written before a command is begun, so that
    none is begun twice, and before a result is sent, so that each has one result; whenever the agent is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard: IO[bytes] | None = None
        self._turn = asyncio.Lock()
        self._writing = threading.Lock()
        self._wanted = 0  # how often it was to be written
        self._written = 0

    def open(self, *, make: bool) -> dict[int, Known]:
        """What it holds. AgentError when it cannot be used. Without `make` nothing is made beside a file that is not there."""
        try:
            if not make and not self.path.exists():
                return {}
            self._guard = lock_of(self.path)
            kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            return {int(number): Known.read(int(number), content) for number, content in kept.items()}
        except OSError as error:
            raise AgentError(f"cannot use {self.path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("it is not known which commands were begun: cannot use %s: %s", self.path, error)
            return {}

    async def write(self, commands: Mapping[int, Known]) -> None:
        """Write what is so by now; once for all who wait. OSError."""
        self._wanted += 1
        wanted = self._wanted
        async with self._turn:
            if self._written < wanted:
                await asyncio.to_thread(self._write, self._wanted, self._text(commands))

    def write_now(self, commands: Mapping[int, Known]) -> None:
        """Write it while nothing else can go on. OSError."""
        self._wanted += 1
        self._write(self._wanted, self._text(commands))

    def close(self) -> None:
        if self._guard is not None:
            self._guard.close()

    def _text(self, commands: Mapping[int, Known]) -> str:
        return json.dumps({known.number: known.content() for known in commands.values() if known.kept}, indent=2) + "\n"

    def _write(self, number: int, text: str) -> None:
        with self._writing:  # an agent that ends does not wait for a thread
            if number > self._written:
                write_whole(self.path, text, 0o600)
                self._written = number


def begun_character(data: bytes) -> int:
    """How many bytes at the end are the begin of a character of UTF-8 whose other bytes are missing."""
    for count in range(1, min(3, len(data)) + 1):
        byte = data[-count]
        if byte & 0xC0 != 0x80:  # the first byte of a character says how long it is
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 1
            return count if length > count else 0
    return 0


def output_data(data: bytes) -> dict[str, str]:
    """What a frame says of bytes: text, or base64 where they are none that the server can keep."""
    with suppress(UnicodeDecodeError):
        text = data.decode()
        if "\0" not in text:
            return {"data": text}
    return {"data": base64.b64encode(data).decode(), "encoding": "base64"}


class PipeEnd(asyncio.Protocol):
    """Where a stream of a command is read."""

    def __init__(self, take: Callable[[bytes], None], end: Callable[[], None]) -> None:
        self._take = take
        self._end = end

    def data_received(self, data: bytes) -> None:
        self._take(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._end()


class Output:
    """What a command writes to its two streams, as frames, in the order in which it is read. What lies beyond the limit is counted.

    What comes within a moment goes into one frame, as far as it is of one stream. While much waits, the pipes are not read: a program
    that writes to both in turn makes no more than so many frames in a second."""

    def __init__(self, command: int, most: int, spool: Spool) -> None:
        self.total = 0  # bytes, sent or not
        self._command = command
        self._left = most
        self._spool = spool
        self._pieces: list[tuple[str, bytes]] = []  # nothing is the end of a stream
        self._waiting = 0  # bytes of them
        self._held: dict[str, bytes] = {}  # the begin of a character, by stream
        self._pipes: dict[str, asyncio.ReadTransport] = {}
        self._came = asyncio.Event()
        self._full = asyncio.Event()

    async def open(self, stream: str, pipe: IO[bytes]) -> None:
        """Read a stream from this pipe from now on."""
        end = PipeEnd(functools.partial(self.take, stream), functools.partial(self.end, stream))
        self._pipes[stream], _ = await asyncio.get_running_loop().connect_read_pipe(lambda: end, pipe)

    def close(self) -> None:
        """Read no more, whoever may still hold the other ends."""
        for pipe in self._pipes.values():
            pipe.close()

    def take(self, stream: str, data: bytes) -> None:
        self.total += len(data)
        data = data[: self._left]
        self._left -= len(data)
        if data:
            self._add(stream, data)

    def end(self, stream: str) -> None:
        del self._pipes[stream]
        self._add(stream, b"")
        if not self._pipes:
            self._full.set()

    async def send(self) -> None:
        """Until both streams have ended, and all is put into the spool."""
        while self._pipes or self._pieces:
            await self._came.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(OUTPUT_SECONDS):
                    await self._full.wait()
            pieces, self._pieces, self._waiting = self._pieces, [], 0
            self._came.clear()
            if self._pipes:
                self._full.clear()
            for stream, data in pieces:
                await self._put(stream, data)
            for pipe in self._pipes.values():
                pipe.resume_reading()

    def _add(self, stream: str, data: bytes) -> None:
        if data and self._pieces and self._pieces[-1][0] == stream:
            data = self._pieces.pop()[1] + data
        self._pieces.append((stream, data))
        self._waiting += len(data)
        self._came.set()
        if self._waiting >= OUTPUT_BYTES:
            self._full.set()
        if self._waiting >= OUTPUT_BYTES or len(self._pieces) >= OUTPUT_PIECES:
            for pipe in self._pipes.values():
                pipe.pause_reading()

    async def _put(self, stream: str, data: bytes) -> None:
        """Make frames of what was read at once. A character that is cut waits for its other bytes."""
        rest = self._held.pop(stream, b"") + data
        while rest:
            part = rest[:OUTPUT_BYTES]
            if data or len(rest) > len(part):
                part = part[: len(part) - begun_character(part)]
            if not part:
                self._held[stream] = rest
                return
            rest = rest[len(part) :]
            await self._spool.put({"type": "output", "command": self._command, "stream": stream, **output_data(part)})


def why_not_started(program: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such file: {program}"
    words = str(getattr(error, "strerror", None) or error)
    return f"{words[:1].lower()}{words[1:]}: {program}"


class Run:
    """One command while it runs. It is over when its process has ended and nobody can write to its two streams any more."""

    def __init__(self, frame: Mapping[str, Any], spool: Spool) -> None:
        self._number: int = frame["command"]
        self._argv: list[str] = frame["argv"]
        self._seconds = float(frame["timeout"])
        self._output = Output(self._number, int(frame["output_bytes"]), spool)
        self._cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def cancel(self) -> None:
        if not self._cancelled.done():
            self._cancelled.set_result(None)

    async def perform(self, begun: Callable[[Group], Awaitable[None]]) -> dict[str, Any]:
        """Run it, and what its result says. `begun` is told when it runs, before anything of its output is sent."""
        with closing(self._output):
            said = await self._run(begun)
        return {**said, "output_bytes": self._output.total}

    async def _run(self, begun: Callable[[Group], Awaitable[None]]) -> dict[str, Any]:
        if self._cancelled.done():
            return {"status": "cancelled", "message": NOT_BEGUN}
        until = time.monotonic() + self._seconds
        try:
            process = await self._start()
        except (OSError, ValueError) as error:
            return {"status": "failed", "message": shortened(why_not_started(self._argv[0], error), MESSAGE_CHARACTERS)}
        group = Group.led_by(process.pid, self._number)
        over = asyncio.create_task(self._follow(process, functools.partial(begun, group)), name=f"command {self._number}")
        try:
            await asyncio.wait((over, self._cancelled), timeout=until - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
            status = "done" if over.done() else "cancelled" if self._cancelled.done() else "timed_out"
            if status != "done":
                await self._end(process, group, over)
        finally:  # the agent may end just now
            await self._leave(process, group, over)
        return self._outcome(status, process.returncode)

    async def _start(self) -> asyncio.subprocess.Process:
        """OSError or ValueError where it cannot be started."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("IIOT_")}
        with ExitStack() as ends:
            theirs = []
            for stream in ("stdout", "stderr"):
                ours, end = os.pipe()
                ends.callback(os.close, end)
                theirs.append(end)
                await self._output.open(stream, os.fdopen(ours, "rb", buffering=0))
            return await asyncio.create_subprocess_exec(
                *self._argv, stdin=asyncio.subprocess.DEVNULL, stdout=theirs[0], stderr=theirs[1], start_new_session=True,
                env={**environment, MARK: str(self._number)},
            )  # fmt: skip

    async def _follow(self, process: asyncio.subprocess.Process, begun: Callable[[], Awaitable[None]]) -> None:
        """Until it is over."""
        await begun()
        await self._output.send()
        await process.wait()

    async def _end(self, process: asyncio.subprocess.Process, group: Group, over: asyncio.Task[None]) -> None:
        """End all of its processes, gently first. One that left the group may hold the pipes for ever; then they are closed."""
        self._signal(process, group, signal.SIGTERM)
        for _ in range(round(TERM_SECONDS / GONE_SECONDS)):
            if over.done() and not group.signal(0):
                break
            await asyncio.sleep(GONE_SECONDS)
        self._signal(process, group, signal.SIGKILL)
        await asyncio.wait((over,), timeout=KILL_SECONDS)
        self._output.close()
        await asyncio.wait((over,), timeout=KILL_SECONDS)

    async def _leave(self, process: asyncio.subprocess.Process, group: Group, over: asyncio.Task[None]) -> None:
        """Leave nothing behind of a command that is not over."""
        if not over.done():
            self._signal(process, group, signal.SIGKILL)
            self._output.close()
            await asyncio.wait((over,), timeout=KILL_SECONDS)
        over.cancel()
        for outcome in await asyncio.gather(over, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def _signal(self, process: asyncio.subprocess.Process, group: Group, number: int) -> None:
        """Until the first process is waited for, its number is certainly that of the group; afterwards it may be another one's."""
        if process.returncode is None or sys.platform != "linux" or group.is_there():
            group.signal(number)

    def _outcome(self, status: str, code: int | None) -> dict[str, Any]:
        if status == "done" and code is not None and code >= 0:
            return {"status": status, "exit_code": code}
        if status == "done" and code is not None:
            name = f" ({SIGNALS[-code]})" if -code in SIGNALS else ""
            return {"status": status, "exit_code": 128 - code, "message": f"killed by signal {-code}{name}"}
        words = f"killed after {self._seconds:g} s" if status == "timed_out" else "killed because it was cancelled"
        return {"status": status, "message": words if code is not None else f"{words}, but it did not end"}


def why_no_commands(options: Options) -> str:
    """Why this device runs no commands; empty where it does."""
    if not options.allow_commands:
        return "this device runs no commands: its agent was started without --allow-commands"
    return "" if os.name == "posix" else "this device runs no commands: its system is none of POSIX"


class Commands:
    """Runs commands, as many at the same time as the server sends. Each has one result, and is known until the server has it."""

    def __init__(self, file: CommandsFile, spool: Spool, refusal: str) -> None:
        self._file = file
        self._spool = spool
        self._refusal = refusal  # why none is run; empty where they are
        self._known: dict[int, Known] = {}
        self._done: deque[int] = deque(maxlen=COMMANDS_KNOWN)  # one of these may be on its way once more
        self._running: dict[int, Run] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._failed = False

    async def run(self) -> None:
        """Say what became of the commands of the last start, then run those that come. Those that run at the end are killed, and
        are lost at the next start."""
        try:
            self._known = self._file.open(make=not self._refusal)
            self._look_back()
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                try:
                    await self._give_back()
                    await self._keep()
                finally:
                    self._tasks = None
        finally:
            with suppress(OSError):
                if self._changed.is_set():
                    self._file.write_now(self._known)
            self._file.close()

    async def take(self, frame: Mapping[str, Any]) -> None:
        """A command. The server sends one again when it does not know whether the agent has it."""
        number = frame["command"]
        if number in self._known or number in self._done:
            return
        if len(self._known) >= COMMANDS_KNOWN:
            log.warning("command %s is left out: the server has not acknowledged the results of %d others", number, COMMANDS_KNOWN)
            return
        if reason := self._refuses(frame["argv"]):
            known = self._known[number] = Known(number, kept=False)
            await self._give(known, {"status": "refused", "message": reason, "output_bytes": 0})
        elif self._tasks is not None:  # else the agent ends
            known, run = Known(number), Run(frame, self._spool)
            self._known[number], self._running[number] = known, run
            log.info("command %d: %s", number, redacted(frame["argv"][0]))
            self._tasks.create_task(self._perform(known, run))

    async def cancel(self, number: int) -> None:
        """The server wants a command no more. Where it is not known here, it is to stay so, whatever comes later."""
        if number in self._running:
            self._running[number].cancel()
        elif number not in self._known and number not in self._done and len(self._known) < COMMANDS_KNOWN:
            known = self._known[number] = Known(number, kept=not self._refusal)
            result = {"status": "cancelled", "message": NOT_BEGUN, "output_bytes": 0}
            if self._tasks is None:
                await self._give(known, result)
            else:
                self._tasks.create_task(self._give(known, result))

    async def give_again(self) -> None:
        """Results that the spool had no room for."""
        held = {content["command"] for content in self._spool.of("result")}
        for known in [*self._known.values()]:
            if known.given and known.number not in held and known.result is not None:
                await self._spool.put(known.result)

    def settle(self, content: Mapping[str, Any]) -> None:
        """The server has stored a frame, or does not take it. With its result a command is done with."""
        if content.get("type") == "result":
            self._done.append(content["command"])
            known = self._known.pop(content["command"], None)
            if known is not None and known.kept:
                self._changed.set()

    def _refuses(self, argv: object) -> str:
        if self._refusal:
            return self._refusal
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            return "argv is no list of texts"
        if len(self._running) >= COMMANDS_MOST:
            return f"this device runs {COMMANDS_MOST} commands already, and no more at once"
        return ""

    async def _perform(self, known: Known, run: Run) -> None:
        try:
            await self._file.write(self._known)
        except OSError as error:
            known.kept = False
            reason = f"it is not begun: that cannot be noted in {self._file.path}: {error.strerror}"
            result: dict[str, Any] = {"status": "refused", "message": shortened(reason, MESSAGE_CHARACTERS), "output_bytes": 0}
        else:
            result = await run.perform(functools.partial(self._begun, known))
        finally:
            del self._running[known.number]
        await self._give(known, result)

    async def _begun(self, known: Known, group: Group) -> None:
        known.group = group
        await self._write()
        await self._spool.put({"type": "started", "command": known.number})

    async def _give(self, known: Known, result: dict[str, Any]) -> None:
        """The result of a command. From here on it has no other one."""
        known.result = {"type": "result", "command": known.number, **result}
        log.info("command %d: %s %s", known.number, result["status"], result.get("message", ""))
        if known.kept:
            await self._write()
        await self._spool.put(known.result)
        known.given = True

    def _look_back(self) -> None:
        """The spool's file may have results that the server does not have; and the processes of an agent that was killed may be there."""
        for content in self._spool.of("result"):
            known = self._known.setdefault(content["command"], Known(content["command"], kept=False))
            known.result, known.given = content, True
        for known in self._known.values():
            if known.result is None and known.group is not None and known.group.is_there():
                known.group.signal(signal.SIGKILL)
                log.info("command %d was running when the agent ended: its processes are killed", known.number)

    async def _give_back(self) -> None:
        """The results of the last start that the spool's file does not have."""
        for known in [*self._known.values()]:
            if known.result is None:
                await self._give(known, {"status": "lost", "message": LOST, "output_bytes": 0})
            elif not known.given:
                await self._spool.put(known.result)
                known.given = True

    async def _keep(self) -> None:
        """Write the file when the server has results, but not too often."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._write()
            await asyncio.sleep(SPOOL_RETRY_SECONDS if self._failed else COMMANDS_SECONDS)

    async def _write(self) -> None:
        """Write the file. What could not be written is written later."""
        try:
            await self._file.write(self._known)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot keep what became of commands in %s: %s", self._file.path, error.strerror)
            self._failed = True
            self._changed.set()


# ==== Link ====
# Owns: one connection: whether it lives, how much waits on it, and how it ended. Must not know: what the frames say.

NOTSENT_LOWAT: Final = 25  # TCP_NOTSENT_LOWAT of <linux/tcp.h>


class SessionEnded(Exception):  # noqa: N818 - it is no error: the agent comes back
    """The session is over, and the agent is to come back: after `wait` seconds at least, or at once."""

    def __init__(self, text: str, wait: float = 0.0, *, at_once: bool = False) -> None:
        super().__init__(text)
        self.wait = wait
        self.at_once = at_once


@asynccontextmanager
async def time_limit(seconds: float, text: str) -> AsyncIterator[None]:
    """SessionEnded when something takes too long; the text says what."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise SessionEnded(f"{text} within {seconds:.0f} s") from error


class Transports:
    """Knows the transport of the newest connection, because aiohttp tells it to whoever traces requests."""

    def __init__(self) -> None:
        self.newest: asyncio.Transport | None = None

    def tracing(self) -> TraceConfig:
        config = TraceConfig()
        config.on_request_end.append(self._note)
        return config

    async def _note(self, _: ClientSession, __: object, told: TraceRequestEndParams) -> None:
        self.newest = told.response.connection.transport if told.response.connection is not None else None


@asynccontextmanager
async def closing_link(link: ClientWebSocketResponse, transport: asyncio.Transport | None) -> AsyncIterator[None]:
    """Close it at the end. What a dead link does not take would keep it open for many minutes."""
    try:
        yield
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await link.close()
        if transport is not None:
            transport.abort()


class Movement:
    """Since when nothing has moved on a connection, in either direction.

    A slow link is not a dead one: no ping is answered in the middle of a long frame. So what counts are bytes: those that
    arrived, and those whose arrival the other side's system confirmed, as Linux tells them. Elsewhere, frames that arrive."""

    def __init__(self, link: ClientWebSocketResponse) -> None:
        self._socket = link.get_extra_info("socket")
        self._received, self._confirmed = self._counts()
        self._since = self._heard = time.monotonic()

    def note(self) -> None:
        """A frame arrived."""
        self._since = self._heard = time.monotonic()

    def quiet(self) -> float:
        """For how many seconds nothing has moved, as far as one sees by looking now and then."""
        received, confirmed = self._counts()
        if received != self._received:
            self.note()
        if received != self._received or confirmed - self._confirmed >= LINK_BYTES:
            self._received, self._confirmed = received, confirmed
            self._since = time.monotonic()
        return time.monotonic() - self._since

    @property
    def unheard(self) -> float:
        """For how many seconds nothing has arrived, by the last look: a proxy confirms what its server never gets."""
        return time.monotonic() - self._heard

    def _counts(self) -> tuple[int, int]:
        """Bytes received, and bytes sent and confirmed: struct tcp_info of <linux/tcp.h>."""
        if sys.platform == "linux" and self._socket is not None:
            with suppress(OSError):
                told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                if len(told) == 136:
                    confirmed, received = struct.unpack_from("QQ", told, 120)
                    return received, confirmed
        return 0, 0


async def watch_link(link: ClientWebSocketResponse, movement: Movement, seems_dead: Callable[[], None]) -> None:
    """Ping a quiet link. `seems_dead` is called before it is given up. SessionEnded when it is dead."""
    pinged = 0.0
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        quiet, now = movement.quiet(), time.monotonic()
        if movement.unheard > TUNNEL_QUIET_SECONDS:
            seems_dead()
        if quiet > LINK_SECONDS:
            raise SessionEnded(f"nothing has moved on the connection for {quiet:.0f} s")
        if movement.unheard > PING_SECONDS and now - pinged > PING_SECONDS:
            pinged = now
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await link.ping()


class Outlet:
    """Lets frames of bytes out: one at a time, in turn, and only while nothing else waits on the link. So another frame never waits
    behind more than one or two of them: one in the connection's own buffer, and what the system was given and has not sent."""

    def __init__(self, link: ClientWebSocketResponse, transport: asyncio.Transport | None) -> None:
        self._link = link
        self._transport = transport
        self._turn = asyncio.Lock()  # first come, first served
        self._poll = None
        wire = link.get_extra_info("socket")
        if sys.platform == "linux" and wire is not None:
            with suppress(OSError):
                wire.setsockopt(socket.IPPROTO_TCP, NOTSENT_LOWAT, TUNNEL_BYTES)
        if sys.platform != "win32" and wire is not None:
            self._poll = select.poll()
            self._poll.register(wire.fileno(), select.POLLOUT)

    async def send(self, frame: bytes) -> None:
        async with self._turn:
            pause = CLEAR_SECONDS
            while not self._is_clear():
                await asyncio.sleep(pause)
                pause = min(2 * pause, CLEAR_MOST)
            await self._link.send_frame(frame, WSMsgType.BINARY)

    def _is_clear(self) -> bool:
        """Whether what is sent now goes to the system at once. With TLS the connection has a buffer that cannot be seen; it is not
        empty for longer than the system takes more."""
        if self._transport is not None and self._transport.get_write_buffer_size():
            return False
        return self._poll is None or bool(self._poll.poll(0))


# ==== Tunnels ====
# Owns: bytes between programs that listen on this machine and the server, within one session; how many each side may send.
# Must not know: the spool.

TUNNEL: Final = struct.Struct(">I")  # before the bytes of a tunnel: its number


class TunnelBroken(Exception):  # noqa: N818 - it is no error of the agent: one tunnel is over
    """A tunnel cannot go on; the text says why."""


@contextmanager
def local_side() -> Iterator[None]:
    """TunnelBroken when the program at the port breaks the connection."""
    try:
        yield
    except OSError as error:
        raise TunnelBroken(f"the program at the port broke the connection: {error.strerror or error}") from error


async def connect_to(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    """OSError."""
    local = socket.socket(family, socket.SOCK_STREAM)
    try:
        local.setblocking(False)
        local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(local, (address, port))
    except BaseException:
        local.close()
        raise
    return local


async def connect_locally(port: int) -> socket.socket:
    """A connection to the program that listens at a port. TunnelBroken when there is none."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            try:
                return await connect_to(socket.AF_INET, "127.0.0.1", port)
            except ConnectionRefusedError:
                with suppress(OSError):
                    return await connect_to(socket.AF_INET6, "::1", port)
                raise
    except ConnectionRefusedError:
        raise TunnelBroken(f"nothing listens at port {port} of this device") from None
    except TimeoutError:
        raise TunnelBroken(f"nothing answers at port {port} of this device within {CONNECT_SECONDS:.0f} s") from None
    except OSError as error:
        raise TunnelBroken(f"no connection to port {port} of this device: {error.strerror or error}") from error


async def say_of_tunnel(link: ClientWebSocketResponse, number: int, state: str, **fields: Any) -> None:
    await link.send_frame(encode({"type": "tunnel", "tunnel": number, "state": state, **fields}), WSMsgType.TEXT)


class Tunnel:
    """One connection to a program of this machine, carried over the link. Each side sends no more than the other one has room for, so
    a program that does not read stops nobody else."""

    def __init__(self, number: int, port: int, credit: int, say: Callable[..., Awaitable[None]], outlet: Outlet) -> None:
        self._number = number
        self._port = port
        self._say = say
        self._outlet = outlet
        self._credit = credit  # bytes that the device may send
        self._credited = asyncio.Event()
        self._granted = 0  # bytes that the server may send
        self._taken = 0  # bytes that the program took, and the server does not know of
        self._unwritten = bytearray()
        self._ended = False  # the server sends no more
        self._broken: TunnelBroken | None = None  # the program takes no more: what it had written before is still carried
        self._came = asyncio.Event()

    async def run(self) -> None:
        """From its opening until both sides have ended, or one breaks it."""
        try:
            local = await connect_locally(self._port)
        except TunnelBroken as broken:
            await self._say("refused", message=str(broken))
            return
        with closing(local):
            self._granted = TUNNEL_WINDOW
            await self._say("open", credit=TUNNEL_WINDOW)
            try:
                async with asyncio.TaskGroup() as directions:
                    directions.create_task(self._read(local))
                    directions.create_task(self._write(local))
            except* TunnelBroken as broken:
                self._broken = self._broken or TunnelBroken(str(broken.exceptions[0]))
            if self._broken:
                await self._say("closed", message=str(self._broken))

    def grant(self, credit: int) -> None:
        """The server has room for more."""
        self._credit += credit
        self._credited.set()

    def end(self) -> None:
        """The server sends no more."""
        self._ended = True
        self._came.set()

    def take(self, data: bytes) -> None:
        """Bytes for the program. TunnelBroken when the server may not send them."""
        if self._broken:  # the server does not know yet
            return
        if self._ended:
            raise TunnelBroken("the server sent bytes after it had said that it sends no more")
        if len(data) > self._granted:
            raise TunnelBroken(f"the server sent {len(data)} bytes where it may send {self._granted}")
        self._granted -= len(data)
        self._unwritten += data
        self._came.set()

    async def _read(self, local: socket.socket) -> None:
        """Carry what the program writes, until it writes no more."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._credit:
                self._credited.clear()
                await self._credited.wait()
            with local_side():
                data = await loop.sock_recv(local, min(self._credit, TUNNEL_BYTES))
            if not data:
                break
            self._credit -= len(data)
            await self._outlet.send(TUNNEL.pack(self._number) + data)
        if not self._broken:
            await self._say("end")

    async def _write(self, local: socket.socket) -> None:
        """Give the program what the server sends, until it sends no more, or the program takes no more."""
        try:
            await self._write_all(local)
        except TunnelBroken as broken:
            self._broken = broken
            self._unwritten.clear()

    async def _write_all(self, local: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while self._unwritten or not self._ended:
            await self._came.wait()
            self._came.clear()
            while self._unwritten:
                piece = bytes(self._unwritten[:TUNNEL_BYTES])
                del self._unwritten[:TUNNEL_BYTES]
                with local_side():
                    await loop.sock_sendall(local, piece)
                await self._make_room(len(piece))
        with local_side():
            local.shutdown(socket.SHUT_WR)

    async def _make_room(self, size: int) -> None:
        """The program took so much; the server learns of it when it is half of the window."""
        self._taken += size
        if self._taken >= TUNNEL_WINDOW // 2 and not self._ended:
            room, self._taken = self._taken, 0
            self._granted += room
            await self._say("credit", credit=room)


class Tunnels:
    """The tunnels of one session. They end with it."""

    def __init__(self, ports: tuple[range, ...], link: ClientWebSocketResponse, transport: asyncio.Transport | None) -> None:
        self._ports = ports
        self._link = link
        self._transport = transport
        self._outlet: Outlet | None = None
        self._open: dict[int, tuple[Tunnel, asyncio.Task[None]]] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Until the session ends."""
        async with asyncio.TaskGroup() as self._tasks:
            await asyncio.get_running_loop().create_future()

    async def take(self, frame: Mapping[str, Any]) -> None:
        """A frame of the server. One for a tunnel that is over was sent before the server knew."""
        number, state = frame["tunnel"], frame["state"]
        if state == "open":
            await self._begin(number, frame["port"], frame["credit"])
        elif number in self._open:
            if state == "credit":
                self._open[number][0].grant(frame["credit"])
            elif state == "end":
                self._open[number][0].end()
            elif state == "closed":
                self._forget(number)

    async def take_bytes(self, data: bytes) -> None:
        """Bytes of the server, for one of the tunnels."""
        if len(data) > TUNNEL.size and (number := TUNNEL.unpack_from(data)[0]) in self._open:
            try:
                self._open[number][0].take(data[TUNNEL.size :])
            except TunnelBroken as broken:
                await self._break(number, str(broken))

    def give_up(self) -> None:
        """The link is silent: programs at the ports are not to wait as long as the session does."""
        for number in list(self._open):
            self._forget(number)
            if self._tasks is not None:
                why = "nothing has moved on the device's connection"
                self._tasks.create_task(say_of_tunnel(self._link, number, "closed", message=why))

    async def _begin(self, number: int, port: int, credit: int) -> None:
        if number in self._open:
            await self._break(number, "the server opened it twice")
        elif reason := self._refuses(port):
            await say_of_tunnel(self._link, number, "refused", message=reason)
        elif self._tasks is not None:
            if self._outlet is None:
                self._outlet = Outlet(self._link, self._transport)
            tunnel = Tunnel(number, port, credit, functools.partial(say_of_tunnel, self._link, number), self._outlet)
            log.info("tunnel %d to port %d", number, port)
            self._open[number] = tunnel, self._tasks.create_task(self._hold(number, tunnel))

    def _refuses(self, port: int) -> str:
        if not any(port in ports for ports in self._ports):
            return f"this device does not open port {port}: its agent was started without it in --allow-tunnel"
        return f"this device has {TUNNELS_MOST} tunnels already, and no more at once" if len(self._open) >= TUNNELS_MOST else ""

    async def _hold(self, number: int, tunnel: Tunnel) -> None:
        try:
            await tunnel.run()
        except* (ClientError, OSError):
            log.debug("tunnel %d ends with the link", number)  # the session sees by itself that it is broken
        finally:
            if number in self._open and self._open[number][0] is tunnel:
                del self._open[number]

    async def _break(self, number: int, why: str) -> None:
        self._forget(number)
        await say_of_tunnel(self._link, number, "closed", message=why)

    def _forget(self, number: int) -> None:
        _, task = self._open.pop(number)
        task.cancel()


# ==== Agent ====
# Owns: the session with the server, and coming back to it. Must not know: the server's insides; it speaks the wire contract alone.


class Replay:
    """Sends a recording. `latest` comes with the first welcome: the last time that the server takes, by its own clock."""

    def __init__(self, options: Options, spool: Spool) -> None:
        self.recording = Recording(options)
        self.delivered = 0  # rows
        self.latest: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._speed = options.speed
        self._spool = spool

    async def run(self) -> None:
        """Send the recording, and return when the server has all of it. AgentError when some of it could not be sent."""
        recording = self.recording
        try:
            await asyncio.to_thread(recording.survey)
        finally:
            recording.given_up = True  # a thread cannot be cancelled
        progress = asyncio.create_task(self._show_progress(recording.rows), name="progress")
        replayed, losses = 0, recording.losses
        try:
            latest = await self.latest
            await self._send_samples(latest)
            await self._spool.at_most(0)
            replayed = recording.rows - losses.rows
        finally:
            progress.cancel()
            replayed = replayed or min(self.delivered, recording.rows - losses.rows)
            others = recording.rows - replayed
            partly = f" completely; of the other {others} a part or nothing is stored" if others else ""
            self._erase_progress()
            print(f"{losses.report()}replayed {replayed} of {recording.rows} rows{partly}{recording.remarks()}", file=sys.stderr)
        if losses.count:
            raise AgentError(f"something is lost in {losses.rows} rows of {recording.path}")

    async def _send_samples(self, latest: int) -> None:
        waiting: list[tuple[int, dict[str, Any]]] = []
        size, before = 0, cast("int | None", None)
        for count, (line, sample) in enumerate(self.recording.samples(latest)):
            if count % 500 == 0:
                await asyncio.sleep(0)  # of many rows that cannot be sent, none waits for anything
            if sample is None:
                continue
            if self._speed > 0 and before is not None:
                await asyncio.sleep(max(0, sample["ts"] - before) / 1000 / self._speed)
            before = sample["ts"]
            waiting.append((line, sample))
            size += len(json.dumps(sample))
            if len(waiting) >= REPLAY_ROWS or size > REPLAY_BYTES or self._speed > 0:
                await self._send_rows(waiting)
                waiting, size = [], 0
        await self._send_rows(waiting)

    async def _send_rows(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """Unlike readings, rows wait for room."""
        if rows:
            await self._spool.at_most(min(100, self._spool.most - 1))
            lines, samples = zip(*rows, strict=True)
            await self._spool.put({"type": "telemetry", "samples": list(samples)}, lines)

    async def _show_progress(self, rows: int) -> None:
        """On a terminal, on a line that whatever is said next is written over."""
        while sys.stderr.isatty():
            print(f"{self.delivered} of {rows} rows acknowledged", end="\r", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)

    def _erase_progress(self) -> None:
        if sys.stderr.isatty():
            print(" " * 40, end="\r", file=sys.stderr)


class Refusals:
    """What becomes of frames that the server does not take."""

    def __init__(self, spool: Spool, losses: Losses | None) -> None:
        self._spool = spool
        self._losses = losses
        self._unwelcome: set[str] = set()  # metrics that the server does not take because there are too many

    async def find(self, error: dict[str, Any]) -> None:
        """An error named no frame, and the session went on. With one frame under way it is that one. Otherwise it may be any of
        them: all are sent again, which changes nothing where they were stored, and from then on one at a time."""
        if self._spool.sent > 1:
            await self._spool.suspect()
            raise SessionEnded(f"the server refused a frame and did not say which: {error.get('message')}")
        await self.take(self._spool.refuse(0), error)

    async def take(self, frame: Outgoing | None, error: dict[str, Any]) -> None:
        """A frame was refused: what may be good in it is sent again, next. What is refused alone is lost."""
        if frame is None:
            shipping.warning("the server refused frame %s after it had acknowledged it: %s", error.get("seq"), error.get("message"))
            return
        lost: Outgoing | None
        parts: list[Outgoing] = []
        errors = [fault for fault in error.get("errors") or [] if isinstance(fault, dict)]
        path = str(errors[0].get("path", "")) if errors else ""
        if error.get("code") == "unknown_type":  # a server that is older than the agent takes no part of it either
            lost = frame
        elif error.get("code") == "too_many_series":
            parts, lost = self._without_unwelcome(frame)
        elif TIME_PATH.fullmatch(path) and any("ts" in entry for entry in frame.items):
            parts, lost = [Outgoing(with_times_to(frame.content, 0))], None
        else:
            parts, lost = parts_without(frame, path)
        if lost is None and not parts:
            lost = frame
        if lost is not None:
            told = f"{path} {errors[0].get('message', '')}".strip() if errors else str(error.get("message"))
            self._lose(lost, f"the server refuses it: {told}")
        await self._spool.put_first(parts, frame)

    def _without_unwelcome(self, frame: Outgoing) -> tuple[list[Outgoing], Outgoing | None]:
        """The device has as many metrics as it may, and some of these are new. Which, is found once for each."""
        metrics = metrics_of(frame)
        if len(metrics) == 1:
            self._unwelcome.update(metrics)
        known = [metric for metric in metrics if metric not in self._unwelcome]
        if len(known) == len(metrics):
            return parts_by_metric(frame), None
        return ([with_metrics(frame, known, frame.rows)] if known else []), with_metrics(frame, self._unwelcome)

    def _lose(self, frame: Outgoing, why: str) -> None:
        if self._losses is not None and frame.lines:
            metrics = metrics_of(frame)
            for line in frame.lines:
                self._losses.add(line, f"{shown(metrics[0])}: {why}" if len(metrics) == 1 else why)
        else:
            (shipping if frame.kind == "log" else log).warning("lost a frame of %s: %s", frame.kind, why)

    async def send_smaller(self) -> None:
        """The server, or a proxy before it, does not take frames of this size."""
        window = self._spool.window
        if window.frame_most > FRAME_LEAST:
            window.frame_most = max(FRAME_LEAST, min(window.frame_most, self._spool.largest()) // 2)
        elif frame := self._spool.refuse(0):
            self._lose(frame, "a frame of this size is not taken")
            await self._spool.put_first([], frame)


class Configurations:
    """Applies the configurations that the server wants. `applied` is told when one is, so that the state can follow."""

    def __init__(self, command: str, file: AppliedConfig, spool: Spool, level: Level, applied: Callable[[], Awaitable[None]]) -> None:
        self._command = command
        self._file = file
        self._spool = spool
        self._level = level
        self._applied = applied
        self.version, self._document = file.read()
        level.follow(self._document)
        self._wanted: dict[str, Any] | None = None  # the newest one that was not looked at yet
        self._wanted_changed = asyncio.Event()

    def want(self, config: dict[str, Any] | None) -> None:
        if config is not None:
            self._wanted = config
            self._wanted_changed.set()

    async def run(self) -> None:
        """Apply the newest configuration that came, answer, then tell of it."""
        while True:
            await self._wanted_changed.wait()
            self._wanted_changed.clear()
            wanted, self._wanted = self._wanted, None
            if wanted is not None:
                await self._apply(wanted["version"], wanted["document"])

    async def _apply(self, version: int, document: object) -> None:
        status, message, errors = "applied", "", config_errors(document)
        known = version == self.version and same(document, self._document)
        if errors:
            status, message = "rejected", f"{errors[0]['path']} {errors[0]['message']}"
        elif self._command and not known:
            await self._spool.put({"type": "config_status", "version": version, "status": "in_progress"})
            status, message = await run_on_config(self._command, document)
        if status == "applied":
            try:
                self._file.write(version, document)
            except OSError as error:
                status, message = "rejected", f"cannot keep it: {error.strerror}"
        log.info("configuration %d %s %s", version, status, message)
        verdict: dict[str, Any] = {"type": "config_status", "version": version, "status": status}
        if message:
            verdict["message"] = message
        if errors:
            verdict["errors"] = errors
        await self._spool.put(verdict)
        if status == "applied":
            self.version, self._document = version, document
            self._level.follow(document)
            await self._applied()


class Agent:
    """Holds a session to the server, and comes back when it breaks."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._name = options.name or re.sub(r"[^A-Za-z0-9._:-]", "-", socket.gethostname())[:64] or "device"
        self._token_file = TokenFile(Path(options.token_file or f"{self._name}.token"))
        self._token = options.token or self._token_file.read()
        applied = AppliedConfig(Path(options.config_file or f"{self._name}.config.json"))
        self._ledger = Ledger(SpoolFile(Path(options.spool_file)), options.spool_bytes) if options.spool_file else None
        self._spool = Spool(options.spool, self._ledger)
        for name in ("log_file", "journal", "own_log", "spool_file", "allow_commands", "allow_tunnel"):
            if options.replay and getattr(options, name):
                raise AgentError(f"--replay sends a recording alone; leave out --{name.replace('_', '-')}")
        self._replay = Replay(options, self._spool) if options.replay else None
        self._refusals = Refusals(self._spool, self._replay.recording.losses if self._replay else None)
        self._level = Level()
        self._configurations = Configurations(options.on_config, applied, self._spool, self._level, self._report_state)
        self._cursors = Cursors(Path(options.cursor_file or f"{self._name}.cursors.json"))
        if options.log_file or options.journal:
            self._cursors.read()
        self._spool.load(self._cursors)
        commands_file = CommandsFile(Path(options.commands_file or f"{self._name}.commands.json"))
        self._commands = Commands(commands_file, self._spool, why_no_commands(options))
        self._spool.settled = self._commands.settle
        self._ports = parse_ports(options.allow_tunnel)
        self._transports = Transports()
        self._reported: dict[str, Any] | None = None
        self._held_until = 0.0  # until then the server takes nothing
        self._answered = 0.0  # when the server last acknowledged something, or until when it said that it will not
        self._report = asyncio.Event()
        self._dropped = 0
        self._token_is_kept = bool(self._token) and not options.token
        if self._token_is_kept:
            self._token_file.forget_secret()  # left by a crash
        if not self._token:
            empty = f"{self._token_file.path} is empty" if self._token_file.is_empty() else ""
            if not options.key:
                raise AgentError(f"{empty + ': ' if empty else ''}needs --key (a provisioning key) or --token for the first start")
            if empty:
                log.warning("%s; the provisioning key is used", empty)

    async def run(self) -> None:
        """Until the recording is delivered, or for ever. AgentError when the server refuses the device."""
        source = self._replay.run() if self._replay else self._observe()
        log_sources = log_steps(self._options, self._spool, self._level, self._cursors)
        steps = {"source": source} if self._replay else {"source": source, "commands": self._commands.run()}
        steps |= {"link": self._stay_connected(), "configure": self._configurations.run(), **log_sources}
        if self._ledger is not None:
            steps["spool"] = self._ledger.keep(self._spool.size, functools.partial(self._spool.records, self._cursors))
        tasks = [asyncio.create_task(step, name=name) for name, step in steps.items()]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            if self._ledger is not None:
                await self._ledger.close()
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
        state = {**describe_machine(), "config_version": self._configurations.version}
        if self._reported is None:
            await self._spool.put({"type": "state", "mode": "replace", "reported": state})
        elif changed := merge_difference(self._reported, state):
            await self._spool.put({"type": "state", "reported": changed})
        self._reported = state

    async def _stay_connected(self) -> None:
        attempt = 0
        timeout, traces = ClientTimeout(total=None, sock_connect=10), [self._transports.tracing()]
        async with ClientSession(timeout=timeout, trace_configs=traces) as client:
            while True:
                started, least, at_once = time.monotonic(), 0.0, False
                try:
                    await self._hold_session(client)
                except SessionEnded as ended:
                    reason, least, at_once = str(ended), min(ended.wait, ASKED_SECONDS), ended.at_once
                except (ClientError, OSError, TimeoutError) as error:
                    reason = str(error) or type(error).__name__
                attempt = 0 if time.monotonic() - started > 30 else attempt + 1
                pause = max(least, backoff(attempt, RETRY_SECONDS, random.random()))  # noqa: S311 - no secret
                if at_once and attempt < 2:  # the second time within seconds it waits as ever
                    pause = 0.0
                log.warning("no session: %s; the next attempt comes in %.1f s", reason, pause)
                await asyncio.sleep(pause)

    async def _hold_session(self, client: ClientSession) -> None:
        """One session from hello to close. It ends with an exception that says why."""
        url = re.sub("^http", "ws", self._options.url.rstrip("/")) + "/device"
        async with time_limit(STEP_SECONDS, "no connection"):
            link = await client.ws_connect(
                url, protocols=("iiot.v1",), autoping=False, max_msg_size=4 * FRAME_BYTES, timeout=ClientWSTimeout(ws_close=CLOSE_SECONDS)
            )
        async with closing_link(link, self._transports.newest):
            if not self._token:
                await self._provision(link)
            await link.send_json({"type": "hello", "token": self._token, "agent": f"iiot-agent/{VERSION}", "time": now_ms()})
            welcome = await self._expect(link, "welcome")
            log.info("connected as %s, session %s", welcome["device"], welcome["session"])
            self._held_until = self._answered = 0.0
            moment = round(datetime.fromisoformat(welcome["time"]).timestamp() * 1000)
            self._spool.learn_time(moment)
            self._done(await self._spool.resume(welcome["seq"]))
            if self._replay is not None and not self._replay.latest.done():
                self._replay.latest.set_result(moment + DAY)
            await self._commands.give_again()
            self._configurations.want(welcome.get("config"))
            if self._spool.dropped != self._dropped:  # a report may have been among it
                log.warning("the spool was full: %d frames are lost", self._spool.dropped - self._dropped)
                self._dropped, self._reported = self._spool.dropped, None
            await self._converse(link)

    async def _converse(self, link: ClientWebSocketResponse) -> None:
        """Send and receive until the session ends. What the server said last weighs more than that a send failed."""
        movement, tunnels = Movement(link), Tunnels(self._ports, link, self._transports.newest)
        steps = self._send(link), watch_link(link, movement, tunnels.give_up), self._watch_answers(), tunnels.run()
        others = [asyncio.create_task(step) for step in steps]
        receiver = asyncio.create_task(self._receive(link, movement, tunnels), name="receiver")
        try:
            await asyncio.wait((receiver, *others), return_when=asyncio.FIRST_COMPLETED)
            if others[0].done():
                await asyncio.wait((receiver,), timeout=CLOSE_SECONDS)
        finally:
            for task in (receiver, *others):
                task.cancel()
            outcomes = await asyncio.gather(receiver, *others, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def _done(self, rows: int) -> None:
        if self._replay is not None:
            self._replay.delivered += rows

    async def _provision(self, link: ClientWebSocketResponse) -> None:
        """Ask for a token by the key and by a secret of our own, which the token ends with."""
        secret, new = self._token_file.secret()
        await link.send_json({"type": "provision", "key": self._options.key, "device": self._name, "secret": secret})
        try:
            self._token = (await self._expect(link, "credentials"))["token"]
        except AgentError:
            if new:  # the server refused, and was never asked with this secret before: no device was made with it
                self._token_file.forget_secret()
            raise
        self._token_file.write(self._token)
        self._token_is_kept = True
        log.info("provisioned as %s", self._name)

    async def _expect(self, link: ClientWebSocketResponse, kind: str) -> dict[str, Any]:
        """The server's answer to a step of the handshake."""
        error: dict[str, Any] = {}
        async with time_limit(STEP_SECONDS, f"no answer of the server ({kind})"):
            while (message := await link.receive()).type not in CLOSED:
                if message.type == WSMsgType.PING:
                    await link.pong(message.data)
                elif message.type == WSMsgType.TEXT:
                    frame = cast("dict[str, Any]", json.loads(message.data))
                    if frame.get("type") == kind:
                        return frame
                    if frame.get("type") == "error":
                        error = frame
        raise await self._ending(link, error, str(message.extra or ""), welcomed=False)

    async def _ending(self, link: ClientWebSocketResponse, error: dict[str, Any], reason: str, *, welcomed: bool) -> Exception:
        """What it means that the server closed the connection."""
        code, text = str(error.get("code", "")), error.get("message") or reason
        if is_final(code, link.close_code, welcomed=welcomed):
            return AgentError(f"the server refuses this device ({link.close_code}): {text}{self._way_out(code, link.close_code)}")
        if link.close_code == CLOSE_FRAME_TOO_BIG:
            await self._refusals.send_smaller()
        wait = error.get("retry_after")
        if code in ("session_conflict", "superseded"):
            text = f"another client uses the same token as this device ({text})"
        if link.close_code is None or link.close_code == 1006:
            return ClientError(f"the connection broke {text}".rstrip())
        seconds = float(wait) if isinstance(wait, (int, float)) else 0.0
        return SessionEnded(f"closed by the server ({link.close_code}): {text}", seconds, at_once=code == "seq_reset")

    def _way_out(self, code: str, close: int | None) -> str:
        """What to do about a token of an earlier device."""
        gone = code in ("unauthorized", "device_removed") or close == CLOSE_UNAUTHORIZED
        if not gone or not self._token_is_kept:
            return ""
        return f" Its token is in {self._token_file.path}; to make a new device of this machine, remove this file and start with --key."

    async def _send(self, link: ClientWebSocketResponse) -> None:
        while True:
            frame = await self._spool.next()
            await asyncio.sleep(max(0.0, self._held_until - time.monotonic()))
            frame.sent = time.monotonic()
            await link.send_frame(frame.text, WSMsgType.TEXT)

    async def _watch_answers(self) -> None:
        """SessionEnded when the server acknowledges nothing for too long: a new session tells what it has."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._spool.look_again()
            since = self._spool.waiting_since()
            if since is not None and time.monotonic() - max(since, self._answered) > ANSWER_SECONDS:
                raise SessionEnded(f"the server has acknowledged nothing for {ANSWER_SECONDS:.0f} s")

    async def _receive(self, link: ClientWebSocketResponse, movement: Movement, tunnels: Tunnels) -> None:
        unnamed: dict[str, Any] = {}  # an error that names no frame: the reason of the close that follows it
        verdict: float | None = None  # when it must have come
        while True:
            try:
                async with asyncio.timeout_at(verdict):
                    message = await link.receive()
            except TimeoutError:
                await self._refusals.find(unnamed)
                unnamed, verdict = {}, None
                continue
            movement.note()
            if message.type in CLOSED:
                raise await self._ending(link, unnamed, str(message.extra or ""), welcomed=True)
            if message.type == WSMsgType.PING:
                await link.pong(message.data)
            elif message.type == WSMsgType.BINARY:
                await tunnels.take_bytes(message.data)
            elif message.type == WSMsgType.TEXT:
                frame = json.loads(message.data)
                if unnamed and frame["type"] in ("ack", "error"):  # an acknowledgement may cover the frame in question
                    continue
                if frame["type"] == "error" and not frame.get("seq"):
                    unnamed, verdict = frame, asyncio.get_running_loop().time() + VERDICT_SECONDS
                elif frame["type"] == "tunnel":
                    await tunnels.take(frame)
                else:
                    await self._take(frame)

    async def _take(self, frame: dict[str, Any]) -> None:
        """A frame of the server, within the session."""
        if frame["type"] == "ack":
            self._answered = max(self._answered, time.monotonic())
            self._done(await self._spool.acknowledge(frame["seq"]))
        elif frame["type"] == "error":
            await self._refusals.take(self._spool.refuse(frame["seq"]), frame)
        elif frame["type"] == "config":
            self._configurations.want(frame)
        elif frame["type"] == "throttled":
            await self._wait_for_quota(frame["limit"], frame["retry_after"])
        elif frame["type"] == "command":
            await self._commands.take(frame)
        elif frame["type"] == "cancel":
            await self._commands.cancel(frame["command"])
        elif frame["type"] == "report":
            self._reported = None  # state is sent whole
            self._report.set()

    async def _wait_for_quota(self, limit: str, seconds: float) -> None:
        if "log" in limit:
            if seconds:
                shipping.warning("the server takes no more lines for %.0f s: %s is used up", seconds, limit)
            await self._spool.hold_lines(seconds)
        else:
            log.warning("the server takes no more for %.0f s: %s is used up", seconds, limit)
            self._held_until = time.monotonic() + min(seconds, HELD_SECONDS)
            self._answered = time.monotonic() + seconds


# ==== Command line ====
# Owns: arguments, variables of the environment, what is printed where: progress and logs go to standard error.


SWITCHES: Final[Mapping[str, bool]] = MappingProxyType(
    {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("", "0", "false", "no", "off"), False)},
)


def parse_option(option: Field[Any], text: str) -> Any:
    """An option's value. ArgumentTypeError, which argparse shows with the flag's name."""
    kind: Callable[[str], Any] = type(option.default)
    if kind is bool:
        if text.lower() not in SWITCHES:
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return SWITCHES[text.lower()]
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a number' if kind is float else 'a whole number'}") from None
    if option.metadata["good"] and not option.metadata["good"](value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {option.metadata['rule']}")
    return value


class Repeated(argparse.Action):
    """A flag that may be given several times; the first time takes the place of the variable."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, Paths(os.pathsep.join((*(() if before is self.default else before), str(values)))))


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
        shown = f" ({option.default})" if str(option.default) not in ("", "0.0", "False") else ""
        flag, text = f"--{option.name.replace('_', '-')}", (option.metadata["help"] + shown).replace("%", "%%")
        if isinstance(option.default, Paths):
            parser.add_argument(flag, action=Repeated, default=default, help=text)
        elif isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", default=default, help=text)
        else:
            parser.add_argument(flag, type=functools.partial(parse_option, option), default=default, help=text)
    return parser


class RedactingFormatter(logging.Formatter):
    """Log lines without the secrets that a peer may have put into what it sent."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


async def run_agent(options: Options) -> int:
    """Until the agent ends, or a signal ends it; the exit code. What it started ends with it."""
    agent = asyncio.create_task(Agent(options).run(), name="agent")
    numbers: list[int] = []

    def stop(number: int) -> None:
        numbers.append(number)
        agent.cancel()

    for name in ("SIGTERM", "SIGHUP"):
        with suppress(NotImplementedError, AttributeError):  # Windows
            asyncio.get_running_loop().add_signal_handler(getattr(signal, name), stop, getattr(signal, name))
    try:
        await agent
    except asyncio.CancelledError:
        if not numbers:
            raise
        log.info("ended by %s", signal.Signals(numbers[0]).name)
        return 128 + numbers[0] if options.replay else 0  # a recording was to be sent whole, readings are never all sent
    return 0


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = Options(**vars(make_parser().parse_args(argv)))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    try:
        sys.exit(asyncio.run(run_agent(options)))
    except KeyboardInterrupt:
        sys.exit(130)
    except (AgentError, OSError) as error:
        sys.exit(redacted(f"agent.py: {error}"))


if __name__ == "__main__":
    main()
