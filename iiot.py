# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14,<3.15",
#     "aiosmtplib>=3",
#     "aiosqlite>=0.22,<0.23",
#     "attrs>=25.1",
#     "cattrs[orjson]>=25.1",
#     "prometheus-client>=0.22",
# ]
# ///
"""Industrial-IoT platform in one process: devices hold a WebSocket to it, operators curl it, SQLite keeps everything.

The file reads bottom-up: a section uses only sections above it. README.md holds the contracts and a five-minute walk,
schema.sql the whole database, dashboard.html the page for a browser.

    Limits and settings   what an installation can choose, and the bounds it cannot
    Errors                every way to say no
    Frames                what crosses the wire, checked
    Rules                 pure functions: time, durations, cursors, searches of logs
    Alert rules           what a rule makes of readings, and when its alert fires
    Alert watch           all rules at work: how each stands with each device
    Notices               what receivers are told of alerts, in which form, and which addresses may be reached
    Syslog messages       what a syslog message says, and where it ends
    Allowances            who may use how much, and who goes on next
    Counts                what the server counts of itself
    Database              the file, connections, migrations, transactions, the readers
    Accounts              SQL about tenants, tokens, keys and the audit
    Devices               SQL about devices, their sessions, states and configurations
    Readings              SQL about telemetry
    Logs                  SQL about lines of logs, their words and how long they are kept
    Alerts                SQL about rules, alerts and silences
    Notifications         SQL about receivers, what they are to be told, and what is sent to them
    Commands              SQL about what devices are to run, and what they write
    Removal               what is left of removed things, deleted little by little
    Writer                what waits to be stored, and the one task that stores it
    Store                 the open database
    Identity              tokens, roles, principals
    Connections           sockets from their accept to their end, and who makes room
    Tunnels               byte streams between operators and ports of a device
    Registry              the live sessions, their heartbeat
    Delivery              who is told of alerts and when, and how that arrives
    Page                  the page for a browser, and its policy
    Sessions              one device's WebSocket from hello to close
    Syslog                the listeners for syslog
    HTTP queries          what the address of a request asks for, checked
    HTTP calls            a request in hand, and how it is answered
    HTTP metrics          the handlers for a monitoring system that scrapes
    HTTP readings         the handlers of readings and logs
    HTTP alerts           the handlers of rules, alerts and silences
    HTTP notifications    the handlers of receivers and of what they were sent
    HTTP commands         the handlers of commands, and of those for many devices
    HTTP tunnels          an operator's side of a tunnel
    HTTP API              the other handlers, and the route table
    Application           how the parts are put together, started and stopped
    Tunnel client         python iiot.py tunnel
    Command line          python iiot.py …
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import bisect
import codecs
import contextvars
import errno
import functools
import gc
import getpass
import hashlib
import heapq
import hmac
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import sysconfig
import threading
import time
import unicodedata
import weakref
from asyncio import sslproto
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parsedate_to_datetime
from itertools import accumulate, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NewType, NoReturn, Protocol, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

import aiosmtplib
import aiosqlite
import attrs
import orjson
from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientError,
    ClientRequest,
    ClientResponse,
    ClientSession,
    ClientSSLError,
    ClientTimeout,
    ClientWebSocketResponse,
    ClientWSTimeout,
    DummyCookieJar,
    EofStream,
    HttpVersion11,
    TCPConnector,
    WebSocketError,
    WSCloseCode,
    WSMessage,
    WSMsgType,
    hdrs,
    web,
)
from aiohttp._websocket.reader import WebSocketDataQueue, WebSocketReader
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.base_protocol import BaseProtocol
from cattrs import Converter, IterableValidationError
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from yarl import URL

if sys.platform != "win32":
    import fcntl
    import resource

T = TypeVar("T")
VERSION: Final = "0.1.0"

# What aiohttp and aiosqlite keep private and this program uses, each with what for: their next minor version may have it no more,
# and need not say so. So the dependencies end below that, and a test looks for each of these. Raise the ends when it passes.
PRIVATE: Final = MappingProxyType(
    {
        "aiohttp.base_protocol.BaseProtocol": "the connection of a WebSocket that is no longer aiohttp's",
        "aiohttp.base_protocol.BaseProtocol._upgraded": "it holds the connection without a parser of HTTP",
        "aiohttp.base_protocol.BaseProtocol._loop": "the clock by which a connection was last heard",
        "aiohttp._websocket.reader.WebSocketDataQueue": "the messages that were read",
        "aiohttp._websocket.reader.WebSocketDataQueue._buffer": "whether there is one more",
        "aiohttp._websocket.reader.WebSocketReader": "reads messages out of bytes, in C",
        "aiohttp.web.WebSocketResponse._post_start": "called when the handshake was answered: the connection is handed over",
        "aiohttp.web.WebSocketResponse._eof_sent": "nothing more is written to it",
        "aiohttp.web.RequestHandler._manager": "the server, which counts connections",
        "aiohttp.web.RequestHandler._message_tail": "what came after the request",
        "aiohttp.web.RequestHandler._buffer_paused": "whether reading was held meanwhile",
        "aiohttp.base_protocol.BaseProtocol._buffer_paused": "likewise",
        "aiohttp.base_protocol.BaseProtocol._pause_reading_for_buffer": "to hold up a device that sends more than is taken",
        "aiohttp.base_protocol.BaseProtocol._resume_reading_for_buffer": "to let it go on",
        "aiohttp.web.Server._loop": "to make handlers of our own",
        "aiohttp.web.Server._kwargs": "likewise",
        "aiohttp.web.AppRunner._make_server": "to make a server of our own",
        "aiohttp.web.AppRunner._kwargs": "likewise",
        "aiosqlite.Connection._conn": "the connection itself, for a whole transaction on its thread",
        "aiosqlite.Connection._execute": "to run one there",
    }
)

log = logging.getLogger("iiot")


# ==== Limits and settings ====
# Owns: what an installation chooses (Settings: one field per flag and IIOT_* variable) and the bounds that keep memory and
# time finite (Limits, each with its reason). Must not know: anything else.


def setting(default: Any, text: str, good: Callable[[Any], object] | None = None, rule: str = "") -> Any:
    """One field of an options class: its default, the help text that the command line and the README show, and what it must be."""
    return attrs.field(default=default, metadata={"help": text, "good": good, "rule": rule})


def positive(number: float) -> bool:
    return 0 < number < float("inf")


def quota(default: int, text: str) -> Any:
    """What a tenant may have unless the platform says otherwise."""
    return setting(default, f"{text} that a tenant may have if it has no quota of its own", lambda number: number >= 0, "at least 0")


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Networks = tuple[Network, ...]


def networks(text: str) -> Networks:
    """Networks and addresses, separated by commas. ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def are_networks(text: str) -> bool:
    try:
        return networks(text) is not None
    except ValueError:
        return False


def is_smtp_url(text: str) -> bool:
    """Whether it names a server for mail; empty is none."""
    try:
        parts = urlsplit(text)
        return not text or (parts.scheme in ("smtp", "smtps") and bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/"))
    except ValueError:
        return False


MAIL_ADDRESS: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
DAYS_MOST: Final = 36_600  # for which something is kept: a hundred years


@attrs.frozen
class Settings:
    """What an installation may choose. Flags are the names with dashes, variables the names with IIOT_ before them."""

    host: str = setting(
        "127.0.0.1",
        "address or name to listen on; :: is every address of IPv4 and IPv6, 0.0.0.0 is every address of IPv4",
        bool,
        "an address or a name",
    )
    port: int = setting(8080, "port to listen on; 0 uses any free port", lambda port: 0 <= port < 65_536, "between 0 and 65535")
    db: str = setting("iiot.db", "the database file, made at the first start")
    heartbeat: float = setting(
        20.0,
        "seconds of silence before the server pings a device; if no answer comes in half of this time, the device is offline",
        positive,
        "above 0",
    )
    tls_cert: str = setting("", "file of the server's certificate chain (PEM): serve HTTPS and WSS")
    tls_key: str = setting("", "file of the certificate's private key (PEM)")
    trusted_proxy: str = setting(
        "",
        "networks of reverse proxies whose X-Forwarded-For the server trusts, separated by commas",
        are_networks,
        "a list of networks such as 10.0.0.0/8,::1",
    )
    query_seconds: float = setting(2.0, "seconds that a query may take; a longer query is refused", positive, "above 0")
    quota_devices: int = quota(15_000, "devices")
    quota_connections: int = quota(15_000, "connected devices")
    quota_points: int = quota(5_000_000_000, "points stored in a day (UTC)")
    quota_log_bytes: int = quota(10_000_000_000, "bytes of logs stored in a day (UTC)")
    syslog_port: int = setting(
        0, "port for syslog without TLS, over TCP and UDP; 0 is none", lambda port: 0 <= port < 65_536, "between 0 and 65535"
    )
    syslog_tls_port: int = setting(
        0, "port for syslog with TLS, with the server's certificate; 0 is none", lambda port: 0 <= port < 65_536, "between 0 and 65535"
    )
    relp_port: int = setting(
        0, "port for RELP, syslog with confirmations; 0 is none", lambda port: 0 <= port < 65_536, "between 0 and 65535"
    )
    log_days: int = setting(
        30,
        "days for which lines of logs are kept, where a tenant says nothing else",
        lambda days: 0 < days <= DAYS_MOST,
        f"between 1 and {DAYS_MOST}",
    )
    webhook_networks: str = setting(
        "",
        "networks of receivers of notifications, beyond public addresses, separated by commas",
        are_networks,
        "a list of networks such as 10.0.0.0/8,fd00::/8",
    )
    external_url: str = setting(
        "",
        "address under which people reach this server, for links in notifications",
        lambda text: not text or text.startswith(("http://", "https://")),
        "an address that begins with http:// or https://",
    )
    smtp_url: str = setting(
        "",
        "server for notifications by e-mail: smtp://user:password@host:587, or smtps:// for TLS from the first byte on",
        is_smtp_url,
        "an address such as smtp://user:password@mail.example.com:587",
    )
    smtp_from: str = setting(
        "",
        "address that e-mail comes from",
        lambda text: not text or MAIL_ADDRESS.fullmatch(text),
        "an address such as iiot@example.com",
    )
    tunnel_idle: float = setting(
        28_800.0, "seconds without a byte in either direction after which a tunnel is closed", positive, "above 0"
    )
    metrics_public: bool = setting(False, "answer GET /metrics to everybody, without a token")
    log_level: str = setting(
        "info",
        "debug, info, warning or error; logs go to standard error",
        ("debug", "info", "warning", "error").__contains__,
        "debug, info, warning or error",
    )


QUOTA_OPTIONS: Final = ("quota_devices", "quota_connections", "quota_points", "quota_log_bytes")


def default_quotas(settings: Settings) -> Mapping[str, int]:
    """What a tenant may have that has no quotas of its own, by the names of the contract."""
    return {
        "devices": settings.quota_devices,
        "connections": settings.quota_connections,
        "points_per_day": settings.quota_points,
        "log_bytes_per_day": settings.quota_log_bytes,
    }


def with_defaults(own: Mapping[str, int | None], defaults: Mapping[str, int]) -> Mapping[str, int]:
    """Quotas that a tenant has of its own, and the defaults in the place of those that it has not."""
    return {name: defaults[name] if most is None else most for name, most in own.items()}


@attrs.frozen
class ReachLimits:
    """The bounds of commands and tunnels, which are among those of the server."""

    # Commands of a device that are not over, and commands for many devices of a tenant; what is kept of the output of each, and for how
    # long; how long one may run at most.
    commands_open: int = 100
    batches_open: int = 20
    command_bytes: int = 1024 * 1024
    command_days: int = 30
    command_seconds_most: float = 86_400.0
    # A device ends a command at its time-out by itself, and tells so; for so long it is waited for, and for one that is away and may
    # come back with the result. One without `ttl` is sent again only within so many seconds: nobody expects it later.
    command_grace_seconds: float = 30.0
    command_away_seconds: float = 3_600.0
    command_again_seconds: float = 60.0
    # Clocks of commands are looked at so often; so many devices are given theirs in one transaction, some 20 ms.
    command_clock_seconds: float = 0.5
    command_devices: int = 500
    # Of the output of each command in a list so many bytes are shown.
    output_shown: int = 4_096
    # Tunnels of a device; bytes that each side may send before the other has handed them on, and in one frame, which all others wait
    # for; how long a device may take to open a port; how often the operator's side is pinged.
    tunnels: int = 64
    tunnel_window: int = 256 * 1024
    tunnel_bytes: int = 32 * 1024
    tunnel_open_seconds: float = 15.0
    tunnel_ping_seconds: float = 30.0
    tunnel_look_seconds: float = 5.0
    tunnel_gone_seconds: float = 25.0  # without a word of an operator's system, which is asked: a cut is to be told within half a minute


@attrs.frozen
class Limits(ReachLimits):
    """The bounds of the server, each with its reason. Tests lower them; an installation has no need to."""

    # The handshake: a peer that has not proved who it is may cost little time. It has so long for the handshake of TLS, so long for
    # its first request, and so long for its `hello`, if that request opened a WebSocket. What it may cost in memory is one frame of
    # `frame_bytes`, for aiohttp puts a frame together before it can be looked at.
    hello_seconds: float = 10.0
    hello_bytes: int = 4 * 1024
    # A frame of a thousand samples of eight metrics is about 200 KiB; a whole frame is held in memory several times over.
    frame_bytes: int = 1024 * 1024
    # Bodies of requests: documents, never bulk data. The largest comes in time over a line of 20 kbit in a second.
    body_bytes: int = 256 * 1024
    body_seconds: float = 120.0
    # Names appear in every answer, and string values are states ("running"), not documents.
    metric_characters: int = 128
    text_characters: int = 1024
    # A line of a log: what is longer is no line. It weighs as points by its bytes, and costs so many times as much to store: its words
    # are indexed.
    log_characters: int = 16 * 1024
    log_weight: int = 32
    # Bytes of logs that one device may send in a second, over a minute: 90 GB in a day. A program that logs in a loop makes more.
    log_bytes_a_second: int = 1024 * 1024
    log_rate_seconds: float = 60.0
    # Words of a tenant's logs that hold a part that was asked for; and devices that a search names: the index opens each apart.
    log_parts: int = 300
    log_devices: int = 200
    # Words of logs that are known to be in the database already, of all tenants.
    log_words_known: int = 200_000
    # Documents of state and configuration: read by people, and kept whole for every change.
    document_bytes: int = 64 * 1024
    document_depth: int = 10
    # Every so many versions of a state the whole document is kept; between them what changed. A report of state costs more than
    # its bytes while it is stored, for it is merged into the document: it counts as so many times as much, and as a document at least.
    state_versions: int = 50
    state_weight: int = 16
    # A device's metric names are held in memory for the length of its session.
    series_per_device: int = 2_000
    # Frames of one session that wait for their commit: then its socket is not read until they are on disk.
    unacknowledged_frames: int = 4_096
    # Points that wait in the writer: then no socket is read. Other content counts as points by its bytes, and a control operation
    # and a verdict as so many. A waiting number costs about 200 bytes, a text up to eight times its frame's.
    pending_points: int = 200_000
    point_bytes: int = 168
    change_points: int = 200
    verdict_points: int = 8
    # For so long a transaction may take while several tenants use the server: whoever comes meanwhile waits for it. A tenant of whom
    # nothing was heard for a second leaves its part to the others. And what each may store at least in a transaction.
    transaction_seconds: float = 0.01
    alone_seconds: float = 1.0
    share_least: int = 100
    # For so long one session works before it is another's turn, and how many of a tenant go on in a round of the event loop, while
    # no other tenant uses the server. A frame of more bytes is taken in pieces of about so many.
    turn_seconds: float = 0.005
    turns_alone: int = 8
    piece_bytes: int = 32 * 1024
    # What the devices of a tenant have sent beyond that and the server has not taken yet: then one of them is read after the other.
    # A device is held up by others for `stall_seconds` at most.
    backlog_bytes: int = 8 * 1024 * 1024
    # A push to many devices is made in parts of so many: what one transaction makes of it takes as long as it may.
    push_devices: int = 200
    device_points: int = 15
    # Requests of a tenant that wait for their turn, and for how long each does.
    requests_waiting: int = 500
    request_seconds: float = 10.0
    # How long a session waits for the writer before it gives up with 1013. Devices keep what was not acknowledged.
    storage_seconds: float = 15.0
    # What may lie unsent for one session: then its peer is too slow and is dropped.
    outbox_bytes: int = 1024 * 1024
    # A counter that leaps further is not believed: the numbers below it could never be used again. Milliseconds since 1970 as
    # the first number are within it.
    seq_leap: int = 2**43
    # So many duplicates without a new frame between them are told on the timeline, and a fight for a session is; once an hour.
    duplicates: int = 10
    notice_seconds: float = 3_600.0
    notices: int = 20_000
    # A session that is superseded so soon after its start counts as fought for; so many of them in an hour are let pass. After
    # those the session stays, and who wants to supersede it waits for its answer, and then is told for how long to wait.
    fought_seconds: float = 30.0
    fights: int = 20
    conflict_seconds: float = 1.0
    conflict_retry_seconds: int = 60
    # Sessions that a device may open at once, and one a second after that: each is two entries of its timeline.
    sessions: int = 300
    # Refused actions of one token that are entered in the audit each, in a minute. Those beyond are counted, and entered together.
    refusals: int = 60
    refusals_seconds: float = 60.0
    # A device in good health sends no bad frame at all.
    bad_frames_per_minute: int = 100
    # Fields at fault that one answer names: a frame may have thousands.
    field_errors: int = 20
    # Wrong tokens and keys from one network (an address, or 64 bits of IPv6): so many at once, and so many a minute after
    # that, are answered 401; those beyond 429. A right one is always heard. And how many networks are remembered.
    guesses: int = 10
    guessing_networks: int = 10_000
    # What a device says it runs stands in every row of every list: its start.
    shown_characters: int = 128
    # Labels are shown with every device of a list.
    labels: int = 32
    label_characters: int = 128
    # Of devices, and of peers that have not proved who they are. File descriptors are finite (README: raise `ulimit -n` with the
    # fleet). That there are too few is logged so often at most.
    connections: int = 15_000
    # Sockets that one round of the event loop serves: timers, and what one round leaves to the next, come between them.
    sockets_in_a_round: int = 200
    shortage_seconds: float = 60.0
    # How long a peer is given to answer a close frame; when the server stops, so that nobody waits for a peer that is deaf.
    close_seconds: float = 5.0
    stop_close_seconds: float = 1.0
    # How long a start waits for the server before it on the same database: a stop takes less.
    lock_seconds: float = 4.0
    # Between two changes of the salt by which a write-ahead log is known to belong to its database.
    salt_seconds: float = 300.0
    # Between two records of `seen_at` for devices that are connected and send nothing.
    seen_seconds: float = 30.0
    # Connections that read. A tenant has all but one of them at most.
    readers: int = 4
    # A piece of an export may take longer than a query that somebody looks at: it is as many rows as `csv_rows`.
    export_seconds: float = 30.0
    # For so long a client may not read what it asked for.
    stall_seconds: float = 30.0
    # The write-ahead log is started over when it is longer than this: readers that always overlap keep SQLite from doing so. And
    # between two looks at its length.
    log_bytes: int = 64 * 1024 * 1024
    log_look_seconds: float = 0.5
    # Lists: entries a page. Telemetry: points a series, and values of all series together: they are written in their fewest digits
    # while everybody waits, which takes 15 ms for so many.
    page: int = 100
    page_most: int = 1_000
    points: int = 1_000
    points_most: int = 10_000
    values_together: int = 50_000
    # Series of the fleet: that are looked for at one time, that are read by one statement, and that somebody may follow. Points that a
    # follower has not been sent yet.
    fleet_page: int = 500
    fleet_series: int = 50
    followed_series: int = 1_000
    fleet_devices: int = 1_000  # that are named in one request: as many as one list has
    followed_points: int = 100_000
    # Who follows points, of a tenant: each gets rows of its own made. Rows in one event: clients read a line of half a megabyte at most.
    point_followers: int = 20
    event_points: int = 1_000
    # Readings that a rule is tried on: at one time, for each takes some microseconds of the event loop; and in all.
    trial_readings: int = 2_000
    trial_most: int = 1_000_000
    # Rows of a streamed CSV that are in memory at one time.
    csv_rows: int = 10_000
    # Lines of a scrape of devices that are in memory at one time: of a hundred devices with 20 metrics. They are written while everybody
    # waits, which takes 3 ms. A reading that is older than the time after it is left out, if nothing else is asked for: Prometheus itself
    # looks back so far for the last value of a series, and takes an older one for gone.
    scrape_rows: int = 2_000
    scrape_age_seconds: float = 300.0
    # A push may ask for its own time until `timed_out`, up to a day; an answer may be waited for by HTTP for so long.
    config_seconds: float = 60.0
    config_seconds_most: float = 86_400.0
    wait_seconds_most: float = 60.0
    # Between two looks for verdicts that did not come, and for tenants removed from the command line.
    clock_seconds: float = 0.5
    # A live feed sends a comment after so long without an event, so that both ends notice a broken connection.
    feed_seconds: float = 15.0
    feed_events: int = 500
    # Live feeds that a tenant may have open: each has a socket, and what it has not read yet. And its pushes that wait for a verdict:
    # whatever happens in the tenant makes each of them look.
    feeds: int = 200
    # Whoever follows logs looks for new lines no more often than this, and is shown so many of those before, if nothing else is asked for.
    follow_seconds: float = 0.2
    tail: int = 10
    waiting_pushes: int = 100
    # For so long after its removal a device's events stay in the live feed, so that a client that was away misses nothing.
    resume_seconds: float = 86_400.0
    # What one transaction deletes of removed devices and tenants, between those of devices that are there: devices that it looks at,
    # series likewise, small rows, documents of up to `document_bytes`, and versions of states, which are as many bytes at most.
    removed_devices: int = 5
    removed_series: int = 500
    removed_rows: int = 1_000
    removed_documents: int = 20
    removed_versions: int = 100
    removed_bytes: int = 512 * 1024
    # Lines of logs that one transaction deletes, with all that the index has of them; words of logs that it looks at. And how often
    # it is looked for lines that were kept for as long as their tenant wants.
    removed_lines: int = 300
    looked_words: int = 500
    retention_seconds: float = 60.0
    # A clock that was set forward by more makes everything seem old. Whoever sees a wrong clock has so long to put it right.
    clock_jump_seconds: float = 3_600.0
    clock_doubt_seconds: float = 86_400.0
    # Frames of a device whose tenant may store no more points for now: those that were under way when it was told. After so
    # many bytes of them its socket is not read.
    held_bytes: int = 16 * 1024
    # Rows of the audit that an export reads at one time.
    audit_rows: int = 1_000
    # Connections that the lines of a tenant come on at one time; datagrams that wait for their turn, of one address a quarter of them,
    # beyond which they are counted as lost, and what the system keeps of them before; addresses whose refused lines are counted apart.
    # What is known of a sender is looked up again after a few seconds.
    syslog_connections: int = 1_000
    syslog_datagrams: int = 2_000
    syslog_buffer: int = 4 * 1024 * 1024
    # Where several tenants are on a server, one that binds a network takes its addresses from the others: it is no larger than this.
    source_bits: int = 16
    refused_senders: int = 1_000
    sender_seconds: float = 5.0
    # A line that its sender repeats is stored once, if the first one is no older than this; after a start, since when its sender
    # may not have been able to repeat it, for as long again.
    repeat_seconds: float = 3_600.0
    # Addresses and log tokens of a device.
    sources: int = 100
    log_tokens: int = 10
    # A search of logs. Each of its words costs a look into the index, or as many as words contain it. FTS5 reads parentheses with a
    # stack of a hundred entries, which overflows at eleven levels in the worst case.
    search_characters: int = 1_024
    search_terms: int = 50
    search_depth: int = 8
    # Receivers of notifications that a tenant may have, and people whom one e-mail goes to.
    webhooks: int = 20
    mail_addresses: int = 20
    # Alerts that one notification shows, and one part of what an Alertmanager is told; receivers take some hundred kilobytes. Lines of a
    # text that people read: a phone shows no more.
    # And alerts that it counts: they are marked as told in its transaction. Those beyond have to wait for the next one.
    alerts_shown: int = 100
    alerts_posted: int = 500
    alert_lines: int = 20
    alerts_together: int = 20_000
    # Firing alerts that are looked at in one statement, to find those that are to be told; and groups whose notifications are written
    # in one transaction.
    alerts_looked: int = 2_000
    groups_together: int = 20
    # Between two looks for alerts that are to be told: while many fire, there is one after the other. And how often it is looked when
    # nothing has happened: a silence may have ended.
    notice_pause_seconds: float = 0.1
    notice_seconds_most: float = 5.0
    # A receiver that takes nothing has so many notifications waiting. After those its groups wait: what has changed meanwhile is told
    # when it takes some again.
    notifications_waiting: int = 1_000
    # A notification has about so many bytes at most: of alerts with long texts it shows fewer. It is kept until it arrives.
    notification_bytes: int = 256 * 1024
    # The same is told again after that at least: whoever means 4h and writes 4s is not flooded.
    repeat_seconds_least: float = 60.0
    # One try to deliver: a receiver that is slower does its work before it answers. Bytes of its answer that are read, and for how long:
    # what it says is not used, but one that is cut off in the middle of its answer may not do its work.
    delivery_seconds: float = 10.0
    answer_bytes: int = 4 * 1024
    answer_seconds: float = 1.0
    # Deliveries at one time, to receivers that took the last one, and to those that did not. Each costs a connection.
    deliveries: int = 50
    failing_deliveries: int = 50
    # Names that are looked up at one time. A lookup cannot be ended, so one that hangs stays for a while.
    lookups: int = 100
    # Before the first repetition; each further one comes after twice as long, up to the second. A receiver may ask for more, up to the
    # third. After the fourth a notification is given up, it is news no more; not before so many tries: the clock may have been set forward,
    # and the network may not be there yet. One whose content a receiver does not want is given up sooner, as others wait behind it.
    redelivery_seconds: float = 5.0
    redelivery_seconds_most: float = 600.0
    retry_after_seconds_most: float = 3_600.0
    given_up_seconds: float = 86_400.0
    given_up_tries: int = 10
    unwanted_tries: int = 5
    # Tests of receivers that a tenant has under way: each waits for its answer.
    webhook_tests: int = 5
    # For so long a secret that was changed signs, too: a receiver has to be told the new one.
    old_secret_seconds: float = 86_400.0
    # Notifications that were delivered or given up are listed for so long.
    notification_days: int = 30
    # Before a failed commit is tried again.
    retry_seconds: float = 1.0
    # Alerts. Rules of a tenant; clocks are looked at so often; at one time so many of what is due, so many devices, and so many parts of
    # so many readings of what is judged anew, which take some milliseconds each.
    rules: int = 2_000
    silences: int = 1_000
    silenced_shown: int = 100
    # An alert is stale if its readings are older: many devices report every few minutes.
    stale_seconds: float = 900.0
    alert_seconds: float = 0.5
    alert_rows: int = 1_000
    alert_devices: int = 500
    judged_lines: int = 100_000
    replays: int = 4
    replay_readings: int = 2_500
    # A server that did not look at its clock for so long stood still: silence meanwhile is nobody's.
    standstill_seconds: float = 5.0
    # A reading so old is one of the past: a device tells what it could not tell before. Nobody is told of alerts in it until a look
    # after so many seconds shows that the device no longer catches up.
    behind_seconds: float = 60.0
    settle_seconds: float = 10.0
    # Samples without a time get one millisecond each, so a burst of one metric runs ahead of the clock. A frame holds about
    # 55,000 samples: one frame always fits. A stamp further ahead comes from a clock that was wrong, and binds nothing.
    stamp_ahead_seconds: float = 60.0
    # The write-ahead log is copied into the database file whenever it has grown by so many pages (4 KiB each). While several tenants
    # use the server, by a quarter of them: a commit does it, and others wait for it.
    checkpoint_pages: int = 4_000
    # A syslog message: what is longer is cut there. RFC 5425, section 4.3.1, asks for 8 KiB, which is what rsyslogd sends unless it is
    # told otherwise; twice that holds a trace of some hundred calls. A message is held whole, and every word of it is indexed.
    syslog_bytes: int = 16 * 1024
    # A healthy idle server proves at most this long ago that it can commit.
    healthy_seconds: float = 10.0


# ==== Errors ====
# Owns: the one table of every way to say no, and the exception that carries an entry of it. The text that a peer sees comes
# from here alone; what an exception says goes to the log. Must not do: input or output.


@attrs.frozen
class Fault:
    """One way to say no: a code for programs, the HTTP status, the WebSocket close code, and a sentence for people."""

    code: str
    status: int
    close: int
    message: str


def fault_table(*rows: tuple[str, int, int, str]) -> Mapping[str, Fault]:
    return MappingProxyType({row[0]: Fault(*row) for row in rows})


FAULTS: Final = fault_table(
    # code                  HTTP  close  message
    ("alert_resolved",       409, 4400, "The alert is over."),
    ("bad_handshake",        400, 4400, "The first frame must be hello or provision."),
    ("bad_query",            400, 4400, "A query parameter is not valid."),
    ("bad_request",          400, 4400, "The request is not valid HTTP."),
    ("connection_lost",      400, 1006, "The connection broke."),
    ("command_over",         409, 4400, "The command is over."),
    ("closed_by_device",     400, 1000, "The device closed the connection."),
    ("crashed",              500, 1011, "The server stopped without closing the session."),
    ("credentials_revoked",  403, 4403, "The device's token was revoked."),
    ("device_disabled",      403, 4403, "The device is disabled."),
    ("device_exists",        409, 4400, "A device of this name is registered already."),
    ("device_offline",       409, 4400, "The device is not connected."),
    ("device_removed",       403, 4403, "The device was removed."),
    ("document_too_large",   422, 4400, "The document is too large or too deep."),
    ("forbidden",            403, 4403, "The token's role does not allow this."),
    ("frame_too_big",        413, 1009, "The frame is too big."),
    ("handshake_timeout",    408, 4408, "No hello came in time."),
    ("invalid",              422, 4400, "The content is not valid."),
    ("key_reused",           422, 4400, "The Idempotency-Key was used for another command."),
    ("last_token",           409, 4400, "This is the last token that can manage tokens. Make another token first."),
    ("method_not_allowed",   405, 4400, "The resource has no such method."),
    ("not_an_object",        400, 4400, "The content is not a JSON object."),
    ("not_binary",           400, 4400, "Binary frames belong to an open tunnel."),
    ("not_found",            404, 4400, "There is no such resource."),
    ("not_json",             400, 4400, "The content is not JSON."),
    ("precondition_failed",  412, 4400, "The condition of the request is not true."),
    ("protocol_error",       400, 1002, "The device does not follow the WebSocket protocol."),
    ("query_too_slow",       503, 1013, "The query took too long; ask for less."),
    ("rule_exists",          409, 4400, "A rule of this name exists already."),
    ("server_fault",         500, 1011, "The server failed; its log says why."),
    ("seq_reset",            409, 4409, "An operator reset the device's frame counter."),
    ("session_conflict",     409, 4429, "Two clients use the token of this device. Wait, then try again."),
    ("shutting_down",        503, 1001, "The server is shutting down."),
    ("source_taken",         409, 4400, "The address belongs to another device already."),
    ("storage_unavailable",  503, 1013, "Nothing can be stored now. Keep the data and try again later."),
    ("superseded",           409, 4409, "The device opened a newer session."),
    ("tenant_exists",        409, 4400, "A tenant of this name exists already."),
    ("tenant_removed",       403, 4403, "The tenant was removed."),
    ("too_deep",             422, 4400, "The JSON is nested too deeply."),
    ("too_large",            413, 1009, "The body is too large."),
    ("too_many_attempts",    429, 4429, "Too many wrong tokens or keys came from this address."),
    ("too_many_bad_frames",  429, 4400, "Too many bad frames."),
    ("too_many_commands",    429, 4429, "Too many commands wait or run already."),
    ("too_many_connected",   403, 4429, "The tenant has reached its limit of connected devices."),
    ("too_many_connections", 503, 4429, "The server has reached its limit of connections."),
    ("too_many_devices",     403, 4429, "The tenant has reached its limit of devices."),
    ("too_many_feeds",       429, 4429, "The tenant has reached its limit of live feeds."),
    ("too_many_requests",    429, 4429, "The tenant has too many requests at once. Wait, then try again."),
    ("too_many_rules",       409, 4429, "The tenant has reached its limit of rules."),
    ("too_many_series",      422, 4400, "The device has reached its limit of metrics."),
    ("too_many_sessions",    429, 4429, "The device opens sessions too often. Wait, then try again."),
    ("too_many_silences",    409, 4429, "The tenant has reached its limit of silences."),
    ("too_many_tunnels",     429, 4429, "The device has reached its limit of tunnels."),
    ("too_many_webhooks",    403, 4429, "The tenant has reached its limit of receivers."),
    ("too_slow",             408, 1013, "The client did not read what the server sent."),
    ("tunnel_refused",       502, 4400, "The device did not open the port."),
    ("tunnel_timeout",       504, 4400, "The device did not say in time whether it opens the port."),
    ("unauthorized",         401, 4401, "A valid token is needed."),
    ("unknown_command",      404, 4400, "No such command was sent to the device."),
    ("unknown_type",         400, 4400, "There is no frame of this type."),
    ("unknown_version",      404, 4400, "No configuration of this version was sent to the device."),
    ("upgrade_required",     426, 4400, "This resource is a WebSocket."),
    ("unresponsive",         408, 1006, "The device did not answer a ping."),
)  # fmt: skip


@attrs.frozen
class FieldError:
    """What is wrong with one field: `path` from the top of the content (`samples[0].ts`), and a sentence."""

    path: str
    message: str


class Refusal(Exception):  # noqa: N818 - the project's word for it
    """A refusal on its way to the peer. `code` names a row of FAULTS; `errors` are the fields at fault; `retry_after` is in how
    many seconds it is of use to try again, where that is known."""

    def __init__(self, code: str, *errors: FieldError, retry_after: int | None = None) -> None:
        super().__init__(code)
        self.fault = FAULTS[code]
        self.errors = errors
        self.retry_after = retry_after


class Invalid(ValueError):  # noqa: N818 - the project's word for it
    """One field is not as expected. The text is written for the peer; `at` says where inside the field."""

    def __init__(self, text: str, at: str = "") -> None:
        super().__init__(text)
        self.at = at


SECRET: Final = re.compile(
    r"(iiot_(?:dev|op|prov|log)_[0-9a-f]{16}_)[A-Za-z0-9_-]+|(whsec_)[A-Za-z0-9+/=]+|(://[^\s/:@]{0,256}:)[^\s/@]{1,256}(?=@)"
    r"|(://)[^\s/:@]{1,256}(?=@)"
)


def redacted(text: str) -> str:
    """`text` without the secret part of any token or key in it, and without the password of any address, or what stands for one."""
    return SECRET.sub(r"\1\2\3\4…", text)


# ==== Frames ====
# Owns: an attrs class for every frame and request body, and the converter that makes them out of JSON text or says which
# field is wrong. Must not know: sockets, SQL.

Seq = NewType("Seq", int)
Timestamp = NewType("Timestamp", int)
Expiry = NewType("Expiry", int)
Clock = NewType("Clock", int)
Count = NewType("Count", int)
DeviceName = NewType("DeviceName", str)
DeviceSecret = NewType("DeviceSecret", str)
TenantName = NewType("TenantName", str)
TokenName = NewType("TokenName", str)
Value = float | int | str
Values = NewType("Values", dict[str, Value])
Document = NewType("Document", dict[str, Any])
Labels = NewType("Labels", dict[str, str | None])
QuotaChange = NewType("QuotaChange", dict[str, int | None])
Mode = NewType("Mode", str)
Verdict = NewType("Verdict", str)
LogLevel = NewType("LogLevel", str)
Days = NewType("Days", int)
Span = NewType("Span", int)
LogText = NewType("LogText", str)
MetricName = NewType("MetricName", str)
TextLabels = NewType("TextLabels", dict[str, str])
Severity = NewType("Severity", str)
WebhookForm = NewType("WebhookForm", str)
Grouping = NewType("Grouping", str)
Argv = NewType("Argv", tuple[str, ...])
Period = NewType("Period", int)
Stream = NewType("Stream", str)
Encoding = NewType("Encoding", str)
End = NewType("End", str)
OutputText = NewType("OutputText", str)
MessageText = NewType("MessageText", str)
TunnelState = NewType("TunnelState", str)

DEVICE_NAME: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
MAC_ADDRESS: Final = re.compile(r"[0-9A-Fa-f]{2}([:.-]?[0-9A-Fa-f]{2}){5}([:.-]?[0-9A-Fa-f]{2}){0,2}")
DEVICE_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}")
RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
EARLIEST: Final = 946_684_800_000  # 2000-01-01: a device without a clock starts in 1970
LATEST: Final = 253_402_300_799_999  # the end of the year 9999, and of RFC 3339
DAY: Final = 86_400_000
LARGE_INTEGER: Final = re.compile(rb"(?<![0-9.])[0-9]{19,}(?![0-9.eE])")  # may have more than 63 bits
SEQ_TEXT: Final = re.compile(rb'"seq"\s*:\s*(-?[0-9]{1,40})(?![0-9.eE])')
INNER: Final = re.compile(rb"[\[{]")
LEVELS: Final = MappingProxyType({"critical": 2, "error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7})  # RFC 5424, section 6.2.1
SEVERITIES: Final = MappingProxyType({"info": 1, "warning": 2, "error": 3, "critical": 4})  # of alerts, the least first
WEBHOOK_FORMS: Final = ("webhook", "alertmanager", "ntfy", "slack", "email")
QUOTAS_WATCHED: Final = ("connections", "points_per_day", "log_bytes_per_day")  # where it is used, in memory
QUOTAS: Final = ("devices", *QUOTAS_WATCHED)
INTEGERS: Final = 2**63  # SQLite's integers, and every JSON parser's that matters


@attrs.frozen
class Provision:
    """A new device asks for a token of its own. One that makes the secret itself may ask again, when the answer was lost."""

    key: str
    device: DeviceName
    secret: DeviceSecret | None = None


@attrs.frozen
class Hello:
    """A device says who it is; `time` is its own clock."""

    token: str
    agent: str | None = None
    time: Clock | None = None


@attrs.frozen
class Sample:
    """Readings of one moment; `ts` in milliseconds, absent for the time of receipt."""

    values: Values
    ts: Timestamp | None = None


@attrs.frozen
class Telemetry:
    """Readings of one or more moments."""

    seq: Seq
    samples: tuple[Sample, ...]


@attrs.frozen
class State:
    """What the device is; `mode` merge applies `reported` as a merge patch (RFC 7396), replace puts it in place of all before."""

    seq: Seq
    reported: Document
    mode: Mode = Mode("merge")


@attrs.frozen
class ConfigError:
    """Why a device does not take a part of its configuration."""

    path: str
    code: str
    message: str


@attrs.frozen
class ConfigStatus:
    """What became of a configuration: `status` is applied, rejected or in_progress."""

    seq: Seq
    version: Seq
    status: Verdict
    message: str | None = None
    errors: tuple[ConfigError, ...] = ()


@attrs.frozen
class LogEntry:
    """A line of a log; `ts` in milliseconds, absent for the time of receipt."""

    level: LogLevel
    message: LogText
    ts: Timestamp | None = None
    logger: LogText | None = None
    fields: Document | None = None


@attrs.frozen
class Log:
    """Lines of a device's logs, in their order."""

    seq: Seq
    entries: tuple[LogEntry, ...]


@attrs.frozen
class Started:
    """A command runs now."""

    seq: Seq
    command: Seq


@attrs.frozen
class Output:
    """What a command wrote, text; or bytes that are no text, in base64."""

    seq: Seq
    command: Seq
    stream: Stream
    data: OutputText
    encoding: Encoding = Encoding("text")


@attrs.frozen
class Result:
    """What became of a command; `output_bytes` is all that it wrote, sent or not."""

    seq: Seq
    command: Seq
    status: End
    exit_code: int | None = None
    message: MessageText | None = None
    output_bytes: Count | None = None


@attrs.frozen
class TunnelNews:
    """What a device says of a tunnel: that it is open or refused, that there is room for `credit` bytes more, that no more come, or that
    it is over. It has no number: it is for the session alone."""

    tunnel: Count
    state: TunnelState
    credit: Count | None = None
    message: MessageText | None = None


OfCommand = Started | Output | Result
Numbered = Telemetry | State | ConfigStatus | Log | OfCommand
Frame = Provision | Hello | TunnelNews | Numbered
FRAMES: Final[Mapping[str, type[Frame]]] = MappingProxyType(
    {
        "provision": Provision, "hello": Hello, "telemetry": Telemetry, "state": State, "config_status": ConfigStatus, "log": Log,
        "started": Started, "output": Output, "result": Result, "tunnel": TunnelNews,
    },
)  # fmt: skip


@attrs.frozen
class Credentials:
    """Answer to `provision`. The token is shown this once."""

    device: str
    token: str


@attrs.frozen
class Config:
    """A configuration that the device is to apply and answer by `config_status`."""

    version: int
    document: Document


@attrs.frozen
class Welcome:
    """Answer to `hello`: `seq` is the highest frame number on disk, `heartbeat` in seconds, `config` the one that is owed."""

    device: str
    tenant: str
    session: int
    seq: int
    time: str
    heartbeat: float
    config: Config | None = None


@attrs.frozen
class Error:
    """A frame was not stored, and the session goes on; or the session ends. `seq` as the device wrote it, `retry_after` in seconds."""

    code: str
    message: str
    seq: int | None = None
    errors: tuple[FieldError, ...] = ()
    retry_after: float | None = None


@attrs.frozen
class Throttled:
    """The server reads no more for `retry_after` seconds, for what `limit` names is used up; nothing is dropped. 0: it reads again."""

    limit: str
    retry_after: float


@attrs.frozen
class Report:
    """The server asks for telemetry or state now."""

    what: str


@attrs.frozen
class NewProvisioningKey:
    """Body of POST /provisioning-keys; absent fields mean no end."""

    expires_at: Expiry | None = None
    uses: int | None = None


@attrs.frozen
class NewToken:
    """Body of POST /tokens."""

    name: TokenName
    role: str
    expires_at: Expiry | None = None


@attrs.frozen
class NewTenant:
    """Body of POST /tenants."""

    name: TenantName
    quotas: QuotaChange = QuotaChange({})


@attrs.frozen
class TenantPatch:
    """Body of PATCH /tenants/{tenant}: the quotas that are named; null is the installation's default."""

    quotas: QuotaChange


@attrs.frozen
class DevicePatch:
    """Body of PATCH /iiot/{device}; `labels` is a merge patch (RFC 7396)."""

    disabled: bool | None = None
    labels: Labels = Labels({})


@attrs.frozen
class Rotation:
    """Body of POST /iiot/{device}/token: `revoke` ends the old token at once, not with the first use of the new."""

    revoke: bool = False


@attrs.frozen
class CounterReset:
    """Body of POST /iiot/{device}/seq: the frame number that counts as the highest on disk, 0 for none."""

    seq: Count


@attrs.frozen
class Push:
    """Body of POST /iiot: one configuration for every device whose name matches."""

    match: str
    config: Document


@attrs.frozen
class Rollback:
    """Body of POST /iiot/{device}/config/rollback."""

    version: Seq


@attrs.frozen
class KeptFor:
    """For how many days something is kept."""

    days: Days


@attrs.frozen
class SyslogSource:
    """Body of PUT /iiot/{device}/syslog-source: addresses and networks."""

    addresses: tuple[str, ...]


@attrs.frozen
class Condition:
    """What a rule asks of readings. `kind` is one of CONDITIONS; `limit` what a value is compared with: for `outside` the lower end, and
    `upper` the other; `window` the milliseconds over which a trend is taken, or lines are counted; `span` those that a trend looks
    ahead, or that a reading may be absent or a device offline; `count` how many lines there must be, of what is searched for in `q`,
    and of what `level` at least."""

    kind: str
    limit: Value = 0
    upper: float = 0.0
    window: int = 0
    span: int = 0
    count: int = 0
    q: str = ""
    level: str = "debug"


@attrs.frozen
class Rule:
    """Body of POST /rules, PUT /rules/{id} and POST /rules/dry-run: when to raise an alert for a device, one that has a name that
    matches and these labels. Times in milliseconds."""

    condition: Condition
    name: TokenName = TokenName("")
    metric: MetricName | None = None
    match: str = "*"
    match_labels: TextLabels = TextLabels({})
    for_: Span = Span(0)
    keep_firing_for: Span = Span(0)
    clear: float | None = None
    severity: Severity = Severity("warning")
    labels: TextLabels = TextLabels({})
    text: str = ""
    disabled: bool = False


@attrs.frozen
class Acknowledgement:
    """Body of POST /alerts/{id}/ack: until when it holds, in milliseconds; without it until the alert is over."""

    text: str = ""
    until: Expiry | None = None


@attrs.frozen
class NewSilence:
    """Body of POST /silences: of which alerts nobody is told, and until when."""

    until: Expiry
    match: str = "*"
    labels: TextLabels = TextLabels({})
    rule: str | None = None
    text: str = ""


@attrs.frozen
class NewWebhook:
    """Body of POST /webhooks: who is told of which alerts, in which form, and how often. Times in milliseconds."""

    url: str
    name: str | None = None
    form: WebhookForm = WebhookForm("webhook")
    secret: str | None = None
    match: str = "*"
    severity: Severity = Severity("info")
    rule: str | None = None
    group_by: Grouping = Grouping("rule")
    wait: Span = Span(10_000)
    interval: Span = Span(300_000)
    repeat: Span = Span(14_400_000)


@attrs.frozen
class NewWebhookSecret:
    """Body of POST /webhooks/{id}/secret; without one the server makes it."""

    secret: str | None = None


@attrs.frozen
class NewCommand:
    """Body of POST /iiot/{device}/commands: what to run, how long it may take, and how long it may wait for the device; without `ttl`
    it is for the session that is open now. Times in milliseconds."""

    argv: Argv
    timeout: Period = Period(30_000)
    ttl: Period | None = None
    parallel: bool = False


@attrs.frozen
class NewCommandBatch(NewCommand):
    """Body of POST /commands: the same for all devices whose name matches, how many are given it in a minute, and after how many that
    did not end well it goes to no other."""

    match: str = ""
    per_minute: Seq | None = None
    stop_after_failures: Seq | None = None


@attrs.frozen
class Retention:
    """Body of PUT /retention."""

    logs: KeptFor


@attrs.frozen
class ReportRequest:
    """Body of POST /iiot/{device}/report."""

    what: str


def encode(frame: Credentials | Welcome | Error | Throttled | Report | Config) -> bytes:
    """The JSON text of a frame of the server; fields that say nothing are left out."""
    silent = ("seq", "retry_after")
    fields = attrs.asdict(frame, filter=lambda field, value: value != () and not (field.name in silent and value is None))
    if isinstance(frame, Error) and frame.seq is not None:  # a device may write numbers that orjson does not
        fields["seq"] = orjson.Fragment(str(frame.seq))
    return orjson.dumps({"type": type(frame).__name__.lower(), **fields})


def encode_refusal(refusal: Refusal, seq: int | None) -> bytes:
    """The `error` frame of a refusal."""
    fault = refusal.fault
    return encode(Error(fault.code, fault.message, seq, refusal.errors, refusal.retry_after))


def encode_ack(seq: int) -> bytes:
    """Written by hand: thousands a second."""
    return b'{"type":"ack","seq":%d}' % seq


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def parse_rfc3339(text: str) -> int | None:
    """Milliseconds of an RFC 3339 date and time, or None if it is not one."""
    if RFC3339.fullmatch(text) is None:
        return None
    try:
        return round(datetime.fromisoformat(text.upper()).timestamp() * 1000)
    except ValueError:
        return None


UNITS: Final = MappingProxyType({"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": DAY, "": 1_000})
DURATION: Final = re.compile(r"(\d{1,12})(ms|s|m|h|d|)")


def parse_duration(text: str) -> int:
    """Milliseconds of `250ms`, `60s`, `5m`, `1h`, `2d`, or of a plain number of seconds."""
    found = DURATION.fullmatch(text)
    if found is None:
        raise Invalid("is not a duration such as 60s, 5m, 1h or 1d")
    return int(found[1]) * UNITS[found[2]]


def check_timestamp(value: object, _: object = None) -> Timestamp:
    if type(value) is int:
        moment: int | None = value
    else:
        moment = parse_rfc3339(value) if type(value) is str else None
    if moment is None:
        raise Invalid("must be an integer of milliseconds or an RFC 3339 time")
    if not EARLIEST <= moment <= now_ms() + DAY:
        raise Invalid("is not between 2000-01-01 and a day from now")
    return Timestamp(moment)


def check_clock(value: object, _: object = None) -> Clock:
    """What a device takes for the time: it may be wrong by decades, which is no reason to turn it away."""
    moment = parse_rfc3339(value) if type(value) is str else value
    if type(moment) is not int or not -INTEGERS <= moment < INTEGERS:
        raise Invalid("must be an integer of milliseconds or an RFC 3339 time")
    return Clock(moment)


def check_expiry(value: object, _: object = None) -> Expiry:
    moment = value if type(value) is int else parse_rfc3339(value) if type(value) is str else None
    if moment is None or not EARLIEST <= moment <= LATEST:
        raise Invalid("must be an integer of milliseconds or an RFC 3339 time")
    return Expiry(moment)


def check_integer(value: object, _: object = None) -> int:
    if type(value) is not int or not -INTEGERS <= value < INTEGERS:
        raise Invalid("is not an integer of at most 63 bits")
    return value


def check_seq(value: object, _: object = None) -> Seq:
    if type(value) is not int or not 0 < value < INTEGERS:
        raise Invalid("is not a positive integer of at most 63 bits")
    return Seq(value)


def check_count(value: object, _: object = None) -> Count:
    if type(value) is not int or not 0 <= value < INTEGERS:
        raise Invalid("is not a whole number of at most 63 bits, from 0 on")
    return Count(value)


def check_days(value: object, _: object = None) -> Days:
    if type(value) is not int or not 0 < value <= DAYS_MOST:
        raise Invalid(f"is not a number of days between 1 and {DAYS_MOST}")
    return Days(value)


def check_boolean(value: object, _: object = None) -> bool:
    if type(value) is not bool:
        raise Invalid("is not true or false")
    return value


def check_name(value: object) -> str:
    if type(value) is not str or DEVICE_NAME.fullmatch(value) is None:
        raise Invalid("must have 1 to 64 letters, digits or . _ : -")
    if value in (".", ".."):  # clients take them out of a path, so nobody could reach the device
        raise Invalid("is not allowed as a name")
    return value


def check_device_name(value: object, _: object = None) -> DeviceName:
    name = check_name(value)
    if name == "summary":
        raise Invalid("is the address of the counts of all devices")
    if name.startswith("-"):
        raise Invalid("begins with -, and command lines such as that of ssh take it for an option")
    return DeviceName(name)


def check_tenant_name(value: object, _: object = None) -> TenantName:
    return TenantName(check_name(value))


def check_device_secret(value: object, _: object = None) -> DeviceSecret:
    if type(value) is not str or DEVICE_SECRET.fullmatch(value) is None:
        raise Invalid("is not 32 random bytes as 43 characters of base64url")
    return DeviceSecret(value)


def check_token_name(value: object, _: object = None) -> TokenName:
    if type(value) is not str or not 0 < len(value) <= 128 or not value.isprintable():
        raise Invalid("is not 1 to 128 printable characters")
    return TokenName(value)


def check_quotas(value: object, _: object = None) -> QuotaChange:
    if type(value) is not dict:
        raise Invalid("is not an object")
    for name, most in value.items():
        if name not in QUOTAS:
            raise Invalid("is not a known field", f".{name}")
        if most is not None and (type(most) is not int or not 0 <= most < INTEGERS):
            raise Invalid("is neither null nor a whole number from 0 on", f".{name}")
    return QuotaChange(value)


SPAN_MOST: Final = 30 * DAY
LARGEST_NUMBER: Final = sys.float_info.max
# What a rule may ask of readings, and what stands beside it.
CONDITIONS: Final = MappingProxyType(
    {
        "above": (), "below": (), "outside": (), "equals": (), "changed": (), "slope_above": ("window",), "slope_below": ("window",),
        "predicted_above": ("within", "window"), "predicted_below": ("within", "window"), "absent": (), "offline": (), "log": (),
    }
)  # fmt: skip


def check_span(value: object, _: object = None) -> Span:
    if type(value) is not str:
        raise Invalid("is not a duration such as 60s, 5m, 1h or 1d")
    milliseconds = parse_duration(value)
    if milliseconds > SPAN_MOST:
        raise Invalid("is longer than 30d")
    return Span(milliseconds)


def check_period(value: object, _: object = None) -> Period:
    """Seconds, or a duration with its unit."""
    if type(value) is str:
        milliseconds = parse_duration(value)
    elif type(value) in (int, float) and abs(cast("float", value)) <= SPAN_MOST:
        milliseconds = round(cast("float", value) * 1000)
    else:
        raise Invalid("is neither a number of seconds nor a duration such as 60s, 5m, 1h or 1d")
    if not 0 < milliseconds <= SPAN_MOST:
        raise Invalid("is not above 0, or longer than 30d")
    return Period(milliseconds)


ARGV_BYTES: Final = 64 * 1024  # a device's system takes 128 KiB of one argument
ARGV_WORDS: Final = 1_000
KEY_CHARACTERS: Final = 128  # of an Idempotency-Key


def check_argv(value: object, _: object = None) -> Argv:
    if type(value) is not list or not 0 < len(value) <= ARGV_WORDS:
        raise Invalid(f"is not a list of 1 to {ARGV_WORDS} texts: a program and its arguments")
    for index, word in enumerate(value):
        if type(word) is not str or "\0" in word:
            raise Invalid("is not a text, or has a zero character", f"[{index}]")
    if not value[0]:
        raise Invalid("is empty: it is the program", "[0]")
    if sum(len(word.encode(errors="surrogatepass")) + 1 for word in value) > ARGV_BYTES:
        raise Invalid(f"is longer than {ARGV_BYTES} bytes")
    return Argv(tuple(value))


def check_output(value: object, _: object = None) -> OutputText:
    if type(value) is not str:
        raise Invalid("is not a text")
    return OutputText(value)


MESSAGE_CHARACTERS: Final = 1_000  # that a device may tell of why a command ended


def check_message(value: object, _: object = None) -> MessageText:
    if type(value) is not str or len(value) > MESSAGE_CHARACTERS or "\0" in value:
        raise Invalid(f"is not a text of at most {MESSAGE_CHARACTERS} characters without zero characters")
    return MessageText(value)


def output_bytes(frame: Output) -> bytes:
    """Refusal: invalid."""
    try:
        return base64.b64decode(frame.data, validate=True) if frame.encoding == "base64" else frame.data.encode()
    except ValueError as error:
        raise Refusal("invalid", FieldError("data", "is not base64")) from error


def check_grouping(value: object, _: object = None) -> Grouping:
    if type(value) is not str or not value.isprintable() or not (value in ("rule", "device") or re.fullmatch(r"label:.{1,128}", value)):
        raise Invalid("is not one of rule, device, or label: with the name of a label")
    return Grouping(value)


def check_number(value: object, _: object = None) -> float:
    if type(value) not in (int, float) or not abs(cast("float", value)) <= LARGEST_NUMBER:
        raise Invalid("is not a number")
    return cast("float", value)


def kind_of(content: object) -> tuple[str, dict[str, Any]]:
    """What a condition asks, and its fields, which are those that it needs."""
    if type(content) is not dict:
        raise Invalid("is not an object")
    kinds = [name for name in content if name in CONDITIONS]
    if len(kinds) != 1:
        raise Invalid(f"needs one of {', '.join(CONDITIONS)}, and has {' and '.join(kinds) or 'none'}")
    for name in content:
        if name != kinds[0] and name not in CONDITIONS[kinds[0]]:
            raise Invalid(f"is not a known field beside {kinds[0]}", f".{name}")
    return kinds[0], content


def check_scalar(value: object) -> Value:
    if type(value) not in (int, float, bool, str):
        raise Invalid("is neither a number, a boolean nor a text")
    return cast("Value", value)


def check_range(value: object) -> tuple[float, float]:
    if type(value) is not list or len(value) != 2:
        raise Invalid("is not a list of a lower and an upper end")
    low, high = map(check_number, value)
    if not low < high:
        raise Invalid("has a lower end that is not below the upper one")
    return low, high


def named(fields: Mapping[str, Any], name: str, check: Callable[[object], T]) -> T:
    """One of the fields of a condition, checked."""
    try:
        return check(fields.get(name))
    except Invalid as error:
        raise Invalid(str(error), f".{name}{error.at}") from None


def named_span(fields: Mapping[str, Any], name: str) -> int:
    """A duration among the fields of a condition, above 0."""
    span = named(fields, name, check_span)
    if not span:
        raise Invalid("is not above 0", f".{name}")
    return span


def one_of(*words: str) -> Callable[..., str]:
    def check(value: object, _: object = None) -> str:
        if type(value) is not str or value not in words:
            raise Invalid(f"is not one of {', '.join(words)}")
        return value

    return check


COUNT_MOST: Final = 1_000  # lines that a rule counts, whose times are in memory for every device


def check_line_count(value: object, _: object = None) -> int:
    if type(value) is not int or not 0 < value <= COUNT_MOST:
        raise Invalid(f"is not a whole number from 1 to {COUNT_MOST}")
    return value


def check_filled(value: object) -> str:
    if type(value) is not str or not value.strip():
        raise Invalid("is not a text, or an empty one")
    return value


def check_line_condition(fields: object) -> Condition:
    """What a rule asks of lines of logs."""
    if type(fields) is not dict:
        raise Invalid("is not an object")
    for name in fields:
        if name not in ("q", "level", "count", "window"):
            raise Invalid("is not a known field", f".{name}")
    level = named(fields, "level", one_of(*LEVELS)) if "level" in fields else "debug"
    q = named(fields, "q", check_filled) if "q" in fields else ""
    return Condition("log", window=named_span(fields, "window"), count=named(fields, "count", check_line_count), q=q, level=level)


def check_condition(content: object, _: object = None) -> Condition:
    kind, fields = kind_of(content)
    if kind == "log":
        return named(fields, kind, check_line_condition)
    spans = {name: named_span(fields, name) for name in CONDITIONS[kind]}
    if kind in ("absent", "offline"):
        return Condition(kind, span=named_span(fields, kind))
    if kind == "equals":
        return Condition(kind, named(fields, kind, check_scalar))
    ends = named(fields, kind, check_range if kind == "outside" else lambda value: (check_number(value), 0.0))
    return Condition(kind, *ends, spans.get("window", 0), spans.get("within", 0))


def depth_of(value: object, most: int) -> int:
    """How deep arrays and objects are nested; no further than one more than `most` is looked."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return 0
    return 1 + max((depth_of(item, most - 1) for item in inner), default=0) if most else 1


ALL_DIGITS_ZERO: Final = bytes(48 if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))


def is_doubtful(text: bytes) -> bool:
    """Whether a document with this text, as orjson writes it, may have a bad scalar. It is quicker than a look at every value."""
    shape = text.translate(ALL_DIGITS_ZERO)
    return b"\\u0000" in text or b"0" * 19 in shape or b"0e" in shape


def has_bad_scalar(value: object, largest: float) -> bool:
    """Whether a document holds what SQLite's JSON does not keep: zero characters, integers of over 63 bits."""
    if isinstance(value, dict):
        return any("\0" in name or has_bad_scalar(item, largest) for name, item in value.items())
    if isinstance(value, list):
        return any(has_bad_scalar(item, largest) for item in value)
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, float):
        return not -largest < value < largest
    return isinstance(value, int) and not -INTEGERS <= value < INTEGERS


def canonical(document: object) -> bytes:
    """The JSON text of a document, equal for equal documents."""
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS)


def shown_path(path: str) -> str:
    """The path of a field, whose name the peer chose."""
    return redacted(path.lstrip("."))[:256]


def field_errors(error: BaseException, path: str = "") -> Iterator[FieldError]:
    """Every field at fault in what the converter raised, with its path and a text made for the peer."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            path += f".{note.name.rstrip('_')}"  # it was a word of Python
        elif isinstance(note, IterableValidationNote):
            path += f"[{note.index}]"
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from field_errors(inner, path)
    elif isinstance(error, ForbiddenExtraKeysError):
        yield from (FieldError(shown_path(f"{path}.{name}"), "is not a known field") for name in sorted(error.extra_fields))
    elif isinstance(error, Invalid):
        yield FieldError(shown_path(f"{path}{error.at}"), str(error))
    elif isinstance(error, KeyError):
        yield FieldError(path.lstrip("."), "is missing")
    else:
        yield FieldError(path.lstrip("."), "is not as expected")


def errors_from(start: int, errors: Iterable[FieldError]) -> Iterator[FieldError]:
    """Errors of a part of a frame whose first sample has this number."""
    for error in errors:
        yield attrs.evolve(error, path=re.sub(r"(?<=^samples\[)[0-9]+", lambda index: str(start + int(index[0])), error.path))


MEMBERS: Final = rb'"(?:type"\s*:\s*"telemetry"|seq"\s*:\s*[0-9]{1,19})'  # of telemetry, besides its samples
BEFORE_SAMPLES: Final = re.compile(rb'\s*\{(?:\s*%b\s*,){0,2}\s*"samples"\s*:\s*\[' % MEMBERS)
BETWEEN_SAMPLES: Final = re.compile(rb"\}\s*,\s*\{")
AFTER_SAMPLES: Final = re.compile(rb"\](?:\s*,\s*%b){0,2}\s*\}\s*" % MEMBERS)


@attrs.frozen
class LongTelemetry:
    """The text of a frame, apart: what stands before the array of its samples and after it, and the array in parts."""

    before: bytes
    parts: list[bytes]
    after: bytes

    @classmethod
    def of(cls, data: bytes, size: int) -> LongTelemetry | None:
        """With parts of about so many bytes; None, if it is written in an unusual way. Where the text that divides two samples stands
        elsewhere, in a name say, a part is no JSON: it ends within what it began."""
        found, end = BEFORE_SAMPLES.match(data), data.rfind(b"]")
        if found is None or not AFTER_SAMPLES.fullmatch(data, end):
            return None
        parts, start = list[bytes](), found.end()
        while start < end:
            between = BETWEEN_SAMPLES.search(data, start + size, end)
            parts.append(b"[%b]" % data[start : between.start() + 1 if between else end])
            start = between.end() - 1 if between else end
        return cls(data[: found.end() - 1], parts, data[end + 1 :])

    def frame(self, part: bytes) -> bytes:
        """The text of a frame with a part of the samples."""
        return b"".join((self.before, part, self.after))


# How values of a type are checked, whatever the limits are.
HOOKS: Final[tuple[tuple[Any, Callable[[Any, Any], Any]], ...]] = (
    (int, check_integer),
    (bool, check_boolean),
    (Seq, check_seq),
    (Count, check_count),
    (Timestamp, check_timestamp),
    (Expiry, check_expiry),
    (Clock, check_clock),
    (DeviceName, check_device_name),
    (DeviceSecret, check_device_secret),
    (TenantName, check_tenant_name),
    (TokenName, check_token_name),
    (QuotaChange, check_quotas),
    (LogLevel, one_of(*LEVELS)),
    (Severity, one_of(*SEVERITIES)),
    (Days, check_days),
    (Span, check_span),
    (Condition, check_condition),
    (float, check_number),
    (WebhookForm, one_of(*WEBHOOK_FORMS)),
    (Grouping, check_grouping),
    (Argv, check_argv),
    (Period, check_period),
    (Stream, one_of("stdout", "stderr")),
    (Encoding, one_of("text", "base64")),
    (End, one_of("done", "refused", "failed", "timed_out", "cancelled", "lost")),
    (OutputText, check_output),
    (MessageText, check_message),
    (TunnelState, one_of("open", "refused", "credit", "end", "closed")),
    (Mode, one_of("merge", "replace")),
    (Verdict, one_of("applied", "rejected", "in_progress")),
)


class Codec:
    """JSON text to frames and bodies.

    Content is first read the quick way. Only where that fails is it read again, slowly and with Python's own exact
    integers, to say which fields are wrong.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._quick = self._converter(exact=False, largest=INTEGERS)  # the quick parser makes reals of integers of over 64 bits
        self._hooks = {kind: (cls, self._quick.get_structure_hook(cls)) for kind, cls in FRAMES.items()}

    @functools.cached_property
    def _large(self) -> Converter:
        """For content without such integers."""
        return self._converter(exact=False, largest=float("inf"))

    @functools.cached_property
    def _exact(self) -> Converter:
        return self._converter(exact=True, largest=float("inf"))

    def frame(self, data: bytes) -> Frame:
        """The frame in `data`, or Refusal: not_json, not_an_object, too_deep, unknown_type, invalid."""
        return self._frame_of(self._object(data), data)

    def in_pieces(self, data: bytes) -> Iterator[Frame | None]:
        """The frame in `data`, as the last of what this yields; before that None for each piece of a long one, so that others can
        go on there. Refusal, as for `frame`."""
        long = LongTelemetry.of(data, self._limits.piece_bytes)
        if long is None:
            yield from self._in_pieces_when_read(data)
            return
        seq, taken = Seq(0), list[Sample]()
        try:
            outer = self._object(long.frame(b"[]"))
            for part in long.parts:
                yield None
                frame = self._frame_of({**outer, "samples": orjson.loads(part)}, long.frame(part))
                assert isinstance(frame, Telemetry)
                seq = frame.seq
                taken += frame.samples
        except orjson.JSONDecodeError:
            yield from self._in_pieces_when_read(data)
        except Refusal as refusal:
            if refusal.errors and all(error.path.startswith("samples[") for error in refusal.errors):
                raise Refusal(refusal.fault.code, *errors_from(len(taken), refusal.errors)) from refusal
            yield from self._in_pieces_when_read(data)
        else:
            yield Telemetry(seq, tuple(taken)) if taken else self.frame(data)

    def _in_pieces_when_read(self, data: bytes) -> Iterator[Frame | None]:
        """The same of a frame whose text must be read at once."""
        content = self._object(data)
        samples = content.get("samples")
        if content.get("type") != "telemetry" or type(samples) is not list:
            yield self._frame_of(content, data)
            return
        del content["type"]
        written: list[Any] = []
        taken: list[Sample] = []
        size, quick = self.piece(samples, data), self._quick
        for start in range(0, max(1, len(samples)), size):
            yield None
            stop = start + size
            piece = {**content, "samples": samples[start:stop]}
            try:
                frame = quick.structure(piece, Telemetry)
            except Exception:  # noqa: BLE001 - whatever it was, the exact converter names it
                if not written and LARGE_INTEGER.search(data) is None and (large := self._try(self._large, piece)):
                    frame, quick = large, self._large
                else:
                    written = written or self._exactly(data, Telemetry)["samples"]
                    frame = self._exact_piece(content, written[start:stop], start)
            taken += frame.samples
        yield Telemetry(frame.seq, tuple(taken))

    @staticmethod
    def _try(converter: Converter, content: Mapping[str, Any]) -> Telemetry | None:
        try:
            return converter.structure(content, Telemetry)
        except Exception:  # noqa: BLE001 - whatever it was, the exact converter names it
            return None

    def piece(self, samples: Sized, data: bytes) -> int:
        """How many samples of a long frame are worked at in one piece."""
        return max(1, len(samples) * self._limits.piece_bytes // len(data))

    def _exact_piece(self, content: Mapping[str, Any], samples: list[Any], start: int) -> Telemetry:
        """Samples from number `start` on. Refusal: invalid."""
        try:
            return self.strings({**content, "samples": samples}, Telemetry, "invalid")
        except Refusal as refusal:
            raise Refusal("invalid", *errors_from(start, refusal.errors)) from refusal

    def _frame_of(self, content: dict[str, Any], data: bytes) -> Frame:
        kind = content.pop("type", None)
        found = self._hooks.get(kind) if type(kind) is str else None
        if found is None:
            raise Refusal("unknown_type")
        cls, hook = found
        try:
            return cast("Frame", hook(content, cls))
        except Exception:  # noqa: BLE001 - whatever it was, the exact converter names it
            return self._look_again(data, cls)

    def body(self, data: bytes, cls: type[T]) -> T:
        """The request body in `data` as `cls`, or Refusal; an empty body stands for an empty object."""
        self._object(data or b"{}")
        return self._look_again(data or b"{}", cls)

    def document(self, data: bytes) -> Document:
        """The document that is a whole request body. Refusal: not_json, not_an_object, too_deep, too_large, invalid."""
        content = self._object(data)
        if depth_of(content, self._limits.document_depth) > self._limits.document_depth:
            raise Refusal("too_deep")
        if len(orjson.dumps(content)) > self._limits.document_bytes:
            raise Refusal("too_large")
        try:
            return self._check_document(float("inf"), json.loads(data))
        except Invalid as error:
            raise Refusal("invalid", FieldError("", str(error))) from error

    def strings(self, content: Mapping[str, object], cls: type[T], code: str) -> T:
        """A `cls` out of fields that are at hand already (a query), or Refusal(code)."""
        try:
            return self._exact.structure(content, cls)
        except Exception as error:  # field_errors knows them all, and has a text for the rest
            raise Refusal(code, *islice(field_errors(error), self._limits.field_errors)) from error

    def seq_of(self, data: bytes) -> tuple[int | None, bool]:
        """The number of a frame that is wrong, as the device wrote it: any integer. In text that is no JSON it is taken from where
        `seq` stands with a number, if it stands with no other one too. And whether it can be the frame's own: a number of a frame,
        which stands in the frame itself, not in what it holds."""
        try:
            seq = self._object(data).get("seq")
        except Refusal:
            seq, head = None, INNER.split(data.lstrip(b" \t\r\n\xef\xbb\xbf{"), 1)[0]
        else:
            if type(seq) is not float:  # orjson makes one of an integer of more than 64 bits
                return (seq, 0 < seq < INTEGERS) if type(seq) is int else (None, False)
            head = b""
        written = set(SEQ_TEXT.findall(data))
        if len(written) != 1:
            return None, False
        number = int(written.pop())
        return number, 0 < number < INTEGERS and SEQ_TEXT.findall(head) == [str(number).encode()]

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            content = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise Refusal("too_deep" if "depth limit" in str(error) else "not_json") from error
        if type(content) is not dict:
            raise Refusal("not_an_object")
        return content

    def _look_again(self, data: bytes, cls: type[T]) -> T:
        return self.strings(self._exactly(data, cls), cls, "invalid")

    def _exactly(self, data: bytes, cls: type[Any]) -> Any:
        """What the text holds, with integers of any size. Refusal: too_deep."""
        try:
            content = json.loads(data)
        except RecursionError as error:
            raise Refusal("too_deep") from error
        if cls in FRAMES.values():
            content.pop("type", None)
        return content

    def _converter(self, *, exact: bool, largest: float) -> Converter:
        """`largest`: reals are below it."""
        converter = Converter(detailed_validation=exact, forbid_extra_keys=True)
        for kind, hook in HOOKS:
            converter.register_structure_hook(kind, hook)
        converter.register_structure_hook(str, self._check_text)
        converter.register_structure_hook(Labels, self._check_labels)
        converter.register_structure_hook(Values, functools.partial(self._check_values, largest))
        converter.register_structure_hook(Document, functools.partial(self._check_document, largest))
        converter.register_structure_hook(TextLabels, self._check_text_labels)
        converter.register_structure_hook(MetricName, self._check_metric)
        converter.register_structure_hook(LogText, self._check_log_text)
        converter.register_structure_hook_factory(attrs.has, functools.partial(self._object_hook, converter))
        converter.register_structure_hook_factory(
            lambda cls: getattr(cls, "__origin__", None) is tuple, functools.partial(self._array_hook, converter),
        )
        return converter

    def _object_hook(self, converter: Converter, cls: type[Any]) -> Callable[[Any, Any], Any]:
        renames = {field.name: override(rename=field.name.rstrip("_")) for field in attrs.fields(cls) if field.name.endswith("_")}
        make = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True, **renames)  # type: ignore[arg-type]

        def structure(content: Any, _: Any) -> Any:
            if not isinstance(content, dict):
                raise Invalid("is not an object")
            return make(content, cls)

        return structure

    def _array_hook(self, converter: Converter, cls: Any) -> Callable[[Any, Any], Any]:
        inner = cls.__args__[0]
        hook = converter.get_structure_hook(inner)

        def structure(content: Any, _: Any) -> Any:
            if type(content) is not list:
                raise Invalid("is not an array")
            index = 0
            try:
                items = []
                for index, item in enumerate(content):  # noqa: B007 - the index names the item at fault
                    items.append(hook(item, inner))
            except Exception as error:  # noqa: BLE001 - raised again with the index
                error.add_note(IterableValidationNote("", index, inner))
                raise IterableValidationError("", [error], cls) from None
            return tuple(items)

        return structure

    def _check_document(self, largest: float, content: object, _: object = None) -> Document:
        """A document within its bounds; reals below `largest`."""
        if type(content) is not dict:
            raise Invalid("is not an object")
        most = self._limits.document_depth
        try:
            text = orjson.dumps(content)
        except TypeError:  # it is too deep for that, or there is an integer of over 64 bits
            text = b""
        if not 0 < text.count(b"{") + text.count(b"[") <= most and depth_of(content, most) > most:
            raise Invalid(f"is nested deeper than {most}")
        if (not text or is_doubtful(text)) and has_bad_scalar(content, largest):
            raise Invalid("holds a zero character or an integer of over 63 bits")
        if len(text or orjson.dumps(content)) > self._limits.document_bytes:
            raise Invalid(f"is longer than {self._limits.document_bytes} bytes")
        return Document(content)

    def _check_text(self, value: object, _: object = None) -> str:
        if type(value) is not str or "\0" in value or len(value) > self._limits.text_characters:
            raise Invalid(f"is not a string of at most {self._limits.text_characters} characters")
        return value

    def _check_metric(self, value: object, _: object = None) -> MetricName:
        most = self._limits.metric_characters
        if type(value) is not str or not 0 < len(value) <= most or not value.isprintable():
            raise Invalid(f"is not 1 to {most} printable characters")
        return MetricName(value)

    def _check_log_text(self, value: object, _: object = None) -> LogText:
        """A zero character, which SQLite's JSON does not keep, is shown as a sign for it: no line is refused because of one."""
        if type(value) is not str or len(value) > self._limits.log_characters:
            raise Invalid(f"is not a string of at most {self._limits.log_characters} characters")
        return LogText(value.replace("\0", "\u2400"))

    def _check_labels(self, content: object, _: object = None) -> Labels:
        if type(content) is not dict:
            raise Invalid("is not an object")
        longest = self._limits.label_characters
        for name, value in content.items():
            if not 0 < len(name) <= longest or not name.isprintable():
                raise Invalid(f"has a name that is not 1 to {longest} printable characters", f".{name}")
            if value is not None and (type(value) is not str or len(value) > longest or not value.isprintable()):
                raise Invalid(f"is neither null nor at most {longest} printable characters", f".{name}")
        return Labels(content)

    def _check_text_labels(self, content: object, _: object = None) -> TextLabels:
        labels = self._check_labels(content)
        for name, value in labels.items():
            if value is None:
                raise Invalid("is null", f".{name}")
        if len(labels) > self._limits.labels:
            raise Invalid(f"are more than {self._limits.labels}")
        return cast("TextLabels", labels)

    def _check_values(self, largest: float, content: object, _: object = None) -> Values:
        """Readings by metric; reals below `largest`."""
        if type(content) is not dict:
            raise Invalid("is not an object")
        longest = self._limits.metric_characters
        for name, value in content.items():
            kind = type(value)
            if kind is float:
                good = -largest < value < largest
            elif kind is int:
                good = -INTEGERS <= value < INTEGERS
            elif kind is str:
                good = "\0" not in value and len(value) <= self._limits.text_characters
            else:
                good = kind is bool
            if not good:
                raise Invalid(f"is not a number of 63 bits, a boolean or a string of {self._limits.text_characters} characters", f".{name}")
            if not 0 < len(name) <= longest or not name.isprintable():
                raise Invalid(f"has a name that is not 1 to {longest} printable characters", f".{name}")
        return cast("Values", content)


# ==== Rules ====
# Owns: pure functions over the field's own terms. Must not know: asyncio, SQL, sockets.

UNQUOTED_PLUS: Final = re.compile(r"(.{19,}) (\d\d:\d\d)")  # in the query of an address + is a space
ENTITY_TAG: Final = re.compile(r'(W/)?"[\x21\x23-\x7e\x80-\xff]*"|[0-9]{1,18}')
TOKEN: Final = re.compile(r"iiot_(dev|op|prov|log)_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
AGGREGATES: Final = ("avg", "min", "max", "sum", "count", "last")


def format_time(moment: int) -> str:
    """RFC 3339, UTC, with milliseconds."""
    whole, milliseconds = divmod(moment, 1000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{milliseconds:03d}Z"


def moment_text(moment: int | None) -> str | None:
    return None if moment is None else format_time(moment)


def parse_moment(text: str, now: int) -> int:
    """Milliseconds of an RFC 3339 time, of a number of milliseconds, or of a duration back from now (`-15m`)."""
    if text.startswith("-"):
        return max(0, now - parse_duration(text[1:]))
    moment = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else parse_rfc3339(UNQUOTED_PLUS.sub(r"\1+\2", text))
    if moment is None:
        raise Invalid("is not an RFC 3339 time, milliseconds, or a duration back from now such as -15m")
    return moment


def merge_patch(target: object, patch: object) -> Any:
    """`target` with a merge patch applied (RFC 7396, section 2); neither is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


EQUAL_ALIKE: Final = frozenset({str, int, bool})  # of two values of these Python knows whether they are equal in JSON
MISSING: Final = object()


def same(one: object, other: object) -> bool:
    """Whether two JSON values are equal; unlike in Python, 1, 1.0 and true are not."""
    kind = type(one)
    if kind is not type(other):
        return False
    return one == other if kind in EQUAL_ALIKE else canonical(one) == canonical(other)


Place = tuple[str, ...]  # where in a document: the names that lead there, none for the document itself


def pointer(place: Place) -> str:
    """As RFC 6901 writes it."""
    text = "/".join(place)
    if "~" in text or text.count("/") >= len(place):
        return "".join([f"/{name.replace('~', '~0').replace('/', '~1')}" for name in place])
    return f"/{text}"


def place_of(text: str) -> Place:
    """What a pointer points to (RFC 6901)."""
    return tuple(name.replace("~1", "/").replace("~0", "~") for name in text.split("/")[1:])


def merge_into(target: dict[str, Any], patch: Mapping[str, Any], place: Place = ()) -> Iterator[dict[str, Any]]:
    """Apply a merge patch to `target` itself; what it changes, as `changes_between` tells it."""
    for name in sorted(patch):
        value, here = patch[name], (*place, name)
        if value is None:
            if name in target:
                yield {"path": here, "from": target.pop(name)}
        elif name not in target:
            target[name] = merge_patch(None, value)
            yield {"path": here, "to": target[name]}
        elif isinstance(value, dict) and isinstance(target[name], dict):
            yield from merge_into(target[name], value, here)
        elif not same(target[name], after := merge_patch(None, value)):
            yield {"path": here, "from": target[name], "to": after}
            target[name] = after


def apply_changes(document: dict[str, Any], changes: Iterable[Mapping[str, Any]], *, back: bool = False) -> None:
    """Make a document what it was after changes that `changes_between` tells, or before them."""
    side = "from" if back else "to"
    for change in changes:
        if not change["path"]:
            document.clear()
            document.update(change[side])
            continue
        *parents, name = change["path"]
        inner: Any = document
        for parent in parents:
            inner = inner[parent]
        if side in change:
            inner[name] = change[side]
        else:
            inner.pop(name, None)


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any], place: Place = ()) -> Iterator[dict[str, Any]]:
    """What differs between two documents: {path: Place, from?, to?}; an array is one value."""
    for name in sorted({*old, *new}):
        before, after = old.get(name, MISSING), new.get(name, MISSING)
        if before is after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changes_between(before, after, (*place, name))
        elif before is MISSING:
            yield {"path": (*place, name), "to": after}
        elif after is MISSING:
            yield {"path": (*place, name), "from": before}
        elif not same(before, after):
            yield {"path": (*place, name), "from": before, "to": after}


def read_changes(told: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Changes as `changes_text` tells them."""
    return ({**change, "path": place_of(change["path"])} for change in told)


def changes_text(changes: list[dict[str, Any]], document: Mapping[str, Any], most: int) -> bytes:
    """The changes that led to a document, as JSON: [{path (RFC 6901), from?, to?}]. Where that would be longer than `most` bytes they
    are told as one, of the whole document: a long name stands in the path of all that it holds, and so 64 KiB could make 180 MB.
    The changes are used up."""
    if sum([len(name) for change in changes for name in change["path"]]) <= most:
        for change in changes:
            change["path"] = pointer(change["path"])
        text = orjson.dumps(changes)
        if len(text) <= most:
            return text
        changes = list(read_changes(changes))
    old = orjson.loads(orjson.dumps(document))
    apply_changes(old, changes, back=True)
    return orjson.dumps([{"path": "", "from": old, "to": document}])


def entity_tags(text: str) -> frozenset[str]:
    """The tags of a condition (RFC 9110, section 8.8.3) as they stand, a number without its quotes too; `*` alone is any. Invalid."""
    if text.strip() == "*":
        return frozenset({"*"})
    tags = [part.strip() for part in text.split(",") if part.strip()]
    if not tags or not all(ENTITY_TAG.fullmatch(tag) for tag in tags):
        raise Invalid("is neither * nor a list of versions, each in quotation marks")
    return frozenset(f'"{tag}"' if tag.isdigit() else tag for tag in tags)


def is_met(match: frozenset[str] | None, none_match: frozenset[str] | None, tag: str | None, *, exists: bool = True) -> bool:
    """Whether the conditions If-Match and If-None-Match hold for what has this tag (RFC 9110, sections 13.1.1 and 13.1.2)."""
    if match is not None and not (exists if match == {"*"} else tag in match):
        return False
    if none_match is None:
        return True
    return not (exists if none_match == {"*"} else tag in {text.removeprefix("W/") for text in none_match})


def disarmed(text: str) -> str:
    """A text that no spreadsheet takes for a formula (OWASP, CSV Injection)."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def csv_field(value: object) -> str:
    """A field of a CSV line (RFC 4180)."""
    text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def csv_lines(rows: bytes, *, names: int = 1, spreadsheet: bool = False) -> bytes:
    """CSV lines of a JSON array of rows `[time, metric, …]`, with texts disarmed for a spreadsheet. `names`: how many columns after the
    time name the series, which is one. Rows of numbers alone, all but every row there is, are turned without a look at each: a time,
    the only other text beside the names, ends in Z and holds nothing to be quoted."""
    if rows == b"[]":
        return b""
    shown_names = rows[: rows.index(b"]")].split(b",")[1 : 1 + names]
    plain = all(re.fullmatch(rb'"(?!-)[A-Za-z0-9 _.:/-]+"', name) for name in shown_names)
    if plain and rows.count(b'"') == (2 + 2 * names) * rows.count(b'Z",' + b",".join(shown_names) + b","):
        return rows[2:-2].replace(b",null", b",").replace(b'"', b"").replace(b"],[", b"\n") + b"\n"
    shown = [[disarmed(cell) if spreadsheet and isinstance(cell, str) else cell for cell in row] for row in orjson.loads(rows)]
    return "".join(",".join(map(csv_field, row)) + "\n" for row in shown).encode()


UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # with those that turn the direction of writing
SHORT_ESCAPES: Final = MappingProxyType({"\n": r"\n", "\r": r"\r", "\t": r"\t"})


def escape_of(found: re.Match[str]) -> str:
    character = found[0]
    return SHORT_ESCAPES.get(character) or (f"\\x{ord(character):02x}" if character < "\u0100" else f"\\u{ord(character):04x}")


def printable(text: str) -> str:
    r"""`text` as one line that does nothing to a terminal: control characters, ends of lines and what turns the direction of writing
    are escaped, as in `\n`, `\x1b` and `\u202e`. A backslash stays one, so that paths can be read."""
    return UNPRINTABLE.sub(escape_of, text)


def line_as_json(line: Mapping[str, Any]) -> bytes:
    """A line of a log, as one line of JSON (https://github.com/ndjson/ndjson-spec)."""
    return orjson.dumps(line) + b"\n"


def line_as_text(line: Mapping[str, Any]) -> bytes:
    """A line of a log for people to read."""
    logger = f"{printable(line['logger'])}: " if line["logger"] else ""
    return f"{line['at']} {line['device']} {line['level']} {logger}{printable(line['message'])}\n".encode()


LINE_COLUMNS: Final = ("at", "received_at", "device", "level", "logger", "host", "message", "fields")


def line_as_csv(line: Mapping[str, Any]) -> bytes:
    """A line of a log as a line of CSV (RFC 4180)."""
    cells = {**line, "fields": None if line["fields"] is None else canonical(line["fields"]).decode()}
    return (",".join(csv_field(cells[name]) for name in LINE_COLUMNS) + "\n").encode()


def line_as_ecs(line: Mapping[str, Any]) -> bytes:
    """A line of a log in the Elastic Common Schema (https://www.elastic.co/docs/reference/ecs), which names no place for what else a
    sender tells: that stands under a name of our own."""
    shown = {
        "@timestamp": line["at"], "event.ingested": line["received_at"], "ecs.version": "8.11.0", "message": line["message"],
        "log.level": line["level"], "log.logger": line["logger"], "host.name": line["device"], "host.hostname": line["host"],
        "iiot.fields": line["fields"],
    }  # fmt: skip
    return orjson.dumps({name: value for name, value in shown.items() if value is not None}) + b"\n"


@attrs.frozen
class LineFormat:
    """How lines of a log are written in a stream."""

    content_type: str
    write: Callable[[Mapping[str, Any]], bytes]
    header: bytes = b""


LINE_FORMATS: Final = MappingProxyType(
    {
        "ndjson": LineFormat("application/x-ndjson", line_as_json),
        "ecs": LineFormat("application/x-ndjson", line_as_ecs),
        "text": LineFormat("text/plain; charset=utf-8", line_as_text),
        "csv": LineFormat("text/csv; charset=utf-8", line_as_csv, (",".join(LINE_COLUMNS) + "\n").encode()),
    }
)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, as sockets and proxies write it: alone, with a port, in brackets, or IPv4 within IPv6."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def client_address(peer: str, forwarded: Iterable[str], trusted: Networks) -> str:
    """Who a request comes from. Each proxy adds to X-Forwarded-For the peer it had, so the list is read from its end for as
    long as the one who wrote the entry is trusted; what stands before that anybody may have written."""
    address = parse_address(peer)
    if address is None:
        return peer
    hops = [hop for line in forwarded for hop in line.split(",")]
    while hops and any(address in network for network in trusted):
        hop = parse_address(hops.pop())
        if hop is None:
            break
        address = hop
    return str(address)


def network_of(address: str) -> str:
    """What one attacker can be expected to hold: an IPv4 address, or 64 bits of IPv6 (RFC 6177)."""
    parsed = parse_address(address)
    if parsed is None or parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))


# How the index of logs (unicode61 of SQLite's FTS5, remove_diacritics 2) sees letters. Its tables are of Unicode 6.1: CASED are the
# letters that it may write otherwise, MARKS what it takes away inside a word, and YOUNG what is no letter but came after its
# tables (pictographs, currencies) or is nobody's: all of that is a letter to it.
CASED: Final = (
    *(range(0x41, 0x37F), range(0x380, 0x528), range(0x531, 0x557), range(0x10A0, 0x10CE), range(0x1D79, 0x2000), range(0x2126, 0x2185)),
    *(range(0x2C00, 0x2C2F), range(0x2C30, 0x2D2E), range(0xA640, 0xA698), range(0xA722, 0xA796), range(0xA7A0, 0xA7AB)),
    *(range(0xFF21, 0xFF3B), range(0x10400, 0x10428)),
)
MARKS: Final = "\u0300-\u0304\u0306-\u030c\u030f\u0311\u031b\u0323-\u0328\u032d\u032e\u0330\u0331"
YOUNG: Final = (
    "\u20ba-\u20cf\u23f4-\u23ff\u2427-\u243f\u244b-\u245f\u2700\u2b4d-\u2b4f\u2b5a-\u2bff\ue000-\uf8ff\U0001f02c-\U0001f02f"
    "\U0001f094-\U0001f09f\U0001f0af-\U0001f0b0\U0001f0bf-\U0001f0c0\U0001f0d0\U0001f0e0-\U0001f10f\U0001f12f\U0001f16c-\U0001f16f"
    "\U0001f19b-\U0001f1e5\U0001f203-\U0001f20f\U0001f23b-\U0001f23f\U0001f249-\U0001f24f\U0001f252-\U0001f2ff\U0001f321-\U0001f32f"
    "\U0001f336\U0001f37d-\U0001f37f\U0001f394-\U0001f39f\U0001f3c5\U0001f3cb-\U0001f3df\U0001f3f1-\U0001f3ff\U0001f43f\U0001f441"
    "\U0001f4f8\U0001f4fd-\U0001f4ff\U0001f53e-\U0001f53f\U0001f544-\U0001f54f\U0001f568-\U0001f5fa\U0001f641-\U0001f644"
    "\U0001f650-\U0001f67f\U0001f6c6-\U0001f6ff\U0001f774-\U000e0000\U000e01f0-\U0010ffff"
)
LETTERS: Final = re.compile(rf"[\w{YOUNG}][\w{YOUNG}{MARKS}]*")
ASCII_LETTERS: Final = bytes(ord(chr(code).lower()) if code < 128 and chr(code).isalnum() else ord(" ") for code in range(256))


def folded_letter(letter: str) -> str:
    """A letter without case (one letter for one) and, if it is a Latin one, without diacritics."""
    small = letter.casefold() if len(letter.casefold()) == 1 else letter.lower()[0]
    base = unicodedata.normalize("NFD", small)[0]
    return base if base.isascii() and small != "\u01e1" else small  # that one is not in the index's table


FOLDED: Final = MappingProxyType(
    {letter: folded_letter(letter) for run in CASED for letter in map(chr, run) if letter.isalnum() and folded_letter(letter) != letter}
    | {mark: "" for mark in map(chr, range(0x300, 0x332)) if re.match(f"[{MARKS}]", mark)}
)


def words_of(text: str) -> list[str]:
    """The words of a text in their order, as the index of logs sees them: runs of letters and digits, without case and diacritics."""
    if text.isascii():
        return text.encode().translate(ASCII_LETTERS).decode().split()
    words = LETTERS.findall(text.replace("_", " "))
    return [word.lower() if word.isascii() else "".join([FOLDED.get(letter, letter) for letter in word]) for word in words]


PART_LETTERS: Final = 3  # parts of words are found by three letters at a time


@attrs.frozen
class Term:
    """What stands in a line: the words of `text` one after the other, of the last only its beginning if it is a `prefix`. `part` is
    what words may contain instead, or empty: one word that is neither a phrase nor a prefix, and not too short to be looked up."""

    text: str
    prefix: bool = False
    part: str = ""


@attrs.frozen
class Group:
    """Searches joined by AND or OR, at least two; or NOT of one: every line that it does not find."""

    operator: Literal["AND", "OR", "NOT"]
    of: tuple[Term | Group, ...]


Search = Term | Group
OPERATORS: Final = ("AND", "OR", "NOT")
LEXEME: Final = re.compile(r'\s*(?:([()])|("(?:[^"\\]|\\.|"")*"\**)|([^\s()"][^\s()]*))', re.DOTALL)
INNER_STAR: Final = re.compile(r"\w\*+\w")
ESCAPED_QUOTE: Final = re.compile(r'""|\\(["\\])')
NO_TEXT: Final = re.compile(r"[\x00\ud800-\udfff]")  # what SQLite does not take within a text


@attrs.frozen
class Lexeme:
    """A piece of a search: `kind` is an operator, a parenthesis, `phrase`, `word` or `end`; `at` counts from 1."""

    kind: str
    text: str
    at: int


def bad_search(text: str, at: int) -> Invalid:
    return Invalid(f"at character {at}: {text}", f":{at}")


def lexemes_of(text: str) -> Iterator[Lexeme]:
    """The pieces of a search, `end` the last. A quotation mark inside a word is a character of it. Invalid."""
    position, end = 0, len(text.rstrip())
    while position < end:
        found = LEXEME.match(text, position)
        if found is None:  # at a quotation mark, for everything else begins something
            at = text.index('"', position) + 1
            raise bad_search('the phrase has no closing quotation mark; inside a phrase \\" is one, and \\\\ a backslash', at)
        bracket, phrase, word = found.groups()
        at = found.end() - len(bracket or phrase or word) + 1
        kind = bracket or (phrase and "phrase") or (word if word in OPERATORS else "word")
        yield Lexeme(kind, found[0].lstrip(), at)
        position = found.end()
    yield Lexeme("end", "", end)


def term_of(lexeme: Lexeme) -> Term:
    """The term of a word or a phrase. A star at its end makes it a prefix; one before a word says what is so anyway: a word is
    found inside of others too. Invalid if it holds no letter and no digit."""
    bare = lexeme.text.rstrip("*")
    prefix = bare != lexeme.text and not bare.startswith("*")
    text = ESCAPED_QUOTE.sub(lambda mark: mark[1] or '"', bare[1:-1]) if lexeme.kind == "phrase" else bare
    words = words_of(text)
    if lexeme.kind == "word" and (inner := INNER_STAR.search(bare)) is not None:
        raise bad_search("a star stands at the end of a word; in quotation marks it is searched through", lexeme.at + inner.start() + 1)
    if not words:
        raise bad_search(f"{lexeme.text[:40]} has no letter and no digit, and nothing else can be searched for", lexeme.at)
    is_part = lexeme.kind == "word" and not prefix and len(words) == 1 and len(words[0]) >= PART_LETTERS
    return Term(text, prefix, words[0] if is_part else "")


def group(operator: Literal["AND", "OR"], found: list[Search]) -> Search:
    """Searches joined; a group within a group of its kind is one with it."""
    of: list[Search] = []
    for search in found:
        of.extend(search.of if isinstance(search, Group) and search.operator == operator else [search])
    return of[0] if len(of) == 1 else Group(operator, tuple(of))


def negated(search: Search) -> Search:
    return search.of[0] if isinstance(search, Group) and search.operator == "NOT" else Group("NOT", (search,))


class SearchParser:
    """Reads a search from its left: OR of ANDs of words, phrases and parentheses, each after any number of NOT."""

    def __init__(self, text: str, limits: Limits) -> None:
        self._limits = limits
        self._lexemes = list(lexemes_of(text))
        self._next = 0
        self._terms = 0

    def whole(self) -> Search:
        if len(self._lexemes) == 1:
            raise bad_search("there is nothing to search for", 1)
        search = self._any(0)
        if self._kind() == ")":
            raise bad_search("the parenthesis was not opened; in quotation marks it is searched through", self._lexemes[self._next].at)
        return search

    def _kind(self) -> str:
        return self._lexemes[self._next].kind

    def _take(self) -> Lexeme:
        self._next += 1
        return self._lexemes[self._next - 1]

    def _any(self, depth: int) -> Search:
        found = [self._all(depth)]
        while self._kind() == "OR":
            self._take()
            found.append(self._all(depth))
        return group("OR", found)

    def _all(self, depth: int) -> Search:
        found = [self._one(depth)]
        while self._kind() not in ("OR", ")", "end"):
            if self._kind() == "AND":
                self._take()
            found.append(self._one(depth))
        return group("AND", found)

    def _one(self, depth: int) -> Search:
        is_negated = False
        while self._kind() == "NOT":
            is_negated = not is_negated
            self._take()
        lexeme = self._take()
        search = self._enclosed(lexeme, depth + 1) if lexeme.kind == "(" else self._term(lexeme)
        return negated(search) if is_negated else search

    def _enclosed(self, opening: Lexeme, depth: int) -> Search:
        if depth > self._limits.search_depth:
            raise bad_search(f"parentheses are nested deeper than {self._limits.search_depth}", opening.at)
        search = self._any(depth)
        if self._take().kind != ")":
            raise bad_search("the parenthesis is not closed", opening.at)
        return search

    def _term(self, lexeme: Lexeme) -> Term:
        if lexeme.kind == "end":
            last = self._lexemes[-2]
            raise bad_search(f"after {last.text} a word is missing", last.at)
        if lexeme.kind not in ("word", "phrase"):
            raise bad_search(f"a word is missing before {lexeme.text}, which is searched for in quotation marks only", lexeme.at)
        self._terms += 1
        if self._terms > self._limits.search_terms:
            raise bad_search(f"there are more than {self._limits.search_terms} words", lexeme.at)
        return term_of(lexeme)


def parse_search(text: str, limits: Limits) -> Search:
    """A search of logs: words (`motor` finds `Motorstart`), "phrases", beginnings (`over*`), AND, OR, NOT (in capitals) and
    parentheses; without an operator between them, AND. NOT binds first, then AND, then OR. What is none of these is text, whatever
    characters it has: its words are searched for one after the other. Invalid, with the character, counted from 1, in `at` (`:7`)."""
    if len(text) > limits.search_characters:
        raise bad_search(f"the search is longer than {limits.search_characters} characters", limits.search_characters + 1)
    return SearchParser(text, limits).whole()


def parts_of(search: Search) -> set[str]:
    """The words of a search that other words may contain, as `words_of` writes them: to be looked up in the tenant's dictionary."""
    if isinstance(search, Term):
        return {search.part} - {""}
    return {part for inner in search.of for part in parts_of(inner)}


def quoted_for_index(text: str) -> str:
    """A string of FTS5: no character in it is grammar."""
    return '"' + NO_TEXT.sub(" ", text).replace('"', '""') + '"'


def joined_for_index(operator: str, expressions: list[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({f' {operator} '.join(expressions)})"


def sides_for_index(search: Search, words: Mapping[str, Collection[str]]) -> tuple[str, bool]:
    """The lines of a search as an expression of FTS5, and whether it is those or all others. FTS5 knows NOT only between two: so what
    is negated goes to the right of what is not, and an OR with something negated is told by what it does not find."""
    if isinstance(search, Term):
        if search.prefix:
            return f"{quoted_for_index(search.text)} *", False
        found = sorted({*words.get(search.part, ())} - {search.part}) if search.part else []
        return joined_for_index("OR", [quoted_for_index(text) for text in (search.text, *found)]), False
    sides = [sides_for_index(inner, words) for inner in search.of]
    if search.operator == "NOT":
        return sides[0][0], not sides[0][1]
    is_or = search.operator == "OR"
    base = [expression for expression, others in sides if others == is_or]
    without = [expression for expression, others in sides if others != is_or]
    if not base:
        return joined_for_index("OR", without), not is_or
    whole = joined_for_index("AND", base)
    return (f"({whole} NOT {joined_for_index('OR', without)})" if without else whole), is_or


def match_expression(search: Search, words: Mapping[str, Collection[str]], who: str) -> str:
    """What MATCH is given for a search. `words` are those of the dictionary that contain a part; `who` is an expression over the
    column of that name, which the server puts together: nothing outside it is found."""
    expression, others = sides_for_index(search, words)
    return f"{{who}} : ({who}) {'NOT' if others else 'AND'} {{text}} : ({expression})"


# ==== Alert rules ====
# Owns: what a rule's condition makes of readings, and when an alert of it fires and clears. Must not know: asyncio, SQL, sockets.


SLICES: Final = 64  # of the window of a trend: it is sharp to so fine a part, and costs no more memory with more readings


def slice_begin(ts: int, window: int) -> int:
    """When the slice began that a time is in: slices are the same wherever a line begins to be drawn."""
    return ts - ts % max(1, window // SLICES)


@attrs.frozen
class Slice:
    """Readings that come one after the other, as a line sees them: sums of x, y, xx and xy about one of them, x in minutes."""

    first: int
    last: int
    zero: float  # the value that y is counted from; x is counted from `first`
    count: int
    x: float
    y: float
    xx: float
    xy: float

    def since(self, first: int, zero: float) -> tuple[int, float, float, float, float]:
        """The number of readings and the sums, about another."""
        right, up = (self.first - first) / 60_000, self.zero - zero
        x, y = self.x + self.count * right, self.y + self.count * up
        return self.count, x, y, self.xx + right * (self.x + x), self.xy + right * y + up * self.x

    def with_later(self, later: Slice) -> Slice:
        """Both in one."""
        count, x, y, xx, xy = later.since(self.first, self.zero)
        return Slice(self.first, later.last, self.zero, self.count + count, self.x + x, self.y + y, self.xx + xx, self.xy + xy)


class Trend:
    """The straight line through the readings of a window, by least squares. The window moves by slices. Nothing is ever taken from a sum:
    what is left of a large number hides the small ones. Slices that are past are kept in two stacks, the older one with the sums of each
    slice and all that follow, so that the oldest can go (Tangwongsan and others, In-Order Sliding-Window Aggregation)."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._older: list[tuple[int, Slice]] = []  # the oldest last: the end of each, and all from there on
        self._newer: list[Slice] = []
        self._sum: Slice | None = None  # of the newer ones
        self._begin(0, 0.0, None)

    def _begin(self, ts: int, value: float, first: int | None) -> None:
        """A new slice; `first`: the oldest reading that is left."""
        self._zero = ts, value
        self._until = slice_begin(ts, self._window) + max(1, self._window // SLICES)
        self._last = ts
        self._own = [0, 0.0, 0.0, 0.0, 0.0]
        self._first = ts if first is None else first
        self._add_up()

    def _add_up(self) -> None:
        """All slices but the present one."""
        past = (self._older[-1][1] if self._older else None, self._sum)
        parts = [part.since(*self._zero) for part in past if part is not None]
        self._base = [sum(each) for each in zip(*parts, strict=True)] if parts else [0, 0.0, 0.0, 0.0, 0.0]

    def _close(self) -> None:
        """The present slice is past."""
        if self._own[0]:
            count, x, y, xx, xy = self._own
            closed = Slice(self._zero[0], self._last, self._zero[1], int(count), x, y, xx, xy)
            self._newer.append(closed)
            self._sum = closed if self._sum is None else self._sum.with_later(closed)

    def _forget(self, until: int) -> None:
        """Slices that end by then are no more in the window."""
        while True:
            if not self._older:
                for one in reversed(self._newer):
                    self._older.append((one.last, one.with_later(self._older[-1][1]) if self._older else one))
                self._newer, self._sum = [], None
            if not self._older or self._older[-1][0] > until:
                break
            self._older.pop()
        self._first = self._older[-1][1].first if self._older else self._zero[0]
        self._add_up()

    def add(self, ts: int, value: float) -> tuple[float, float] | None:
        """Take a reading; the line's slope a minute and its value at this time. None, while the readings cover less than half of the
        window, through two of them that lie close together every line would be steep; or where one is beyond all reckoning."""
        if ts >= self._until or not self._own[0]:
            self._close()
            self._begin(ts, value, self._first if self._own[0] else None)
        x, y, own = (ts - self._zero[0]) / 60_000, value - self._zero[1], self._own
        own[0] += 1
        own[1] += x
        own[2] += y
        own[3] += x * x
        own[4] += x * y
        self._last = ts
        if self._first <= ts - self._window:
            self._forget(ts - self._window)
        return self._line(ts, x)

    def _line(self, ts: int, at: float) -> tuple[float, float] | None:
        (count, x, y, xx, xy), base = self._own, self._base
        count, x, y, xx, xy = count + base[0], x + base[1], y + base[2], xx + base[3], xy + base[4]
        spread = xx - x * x / count
        if 2 * (ts - self._first) < self._window or spread <= 0:
            return None
        slope = (xy - x * y / count) / spread
        now = self._zero[1] + y / count + slope * (at - x / count)
        return (slope, now) if math.isfinite(slope) and math.isfinite(now) else None


def glob_class(text: str, place: int) -> tuple[str, int]:
    """One of a set of characters, whose bracket is before `place`, and where it ends. Without an end it matches nothing."""
    is_other = text.startswith("^", place)
    begin = place + is_other
    end = text.find("]", begin + 1)
    if end < 0:
        return "(?!)", len(text)
    singles, ranges, before = list[str](), list[str](), ""
    inside, at = text[begin:end], 0
    while at < len(inside):
        char, at = inside[at], at + 1
        if char == "-" and before and at < len(inside):
            if before <= inside[at]:
                ranges.append(f"{re.escape(before)}-{re.escape(inside[at])}")
            before, at = "", at + 1
        else:
            singles.append(re.escape(char))
            before = "" if char == "]" and at == 1 else char
    members = "".join(ranges + singles)
    return f"[{'^' if is_other else ''}{members}]", end + 1


def glob_pattern(text: str) -> re.Pattern[str]:
    """What SQLite's GLOB matches, as an expression: `*` any text, `?` one character, `[a-z]` one of them, `[^a-z]` any other."""
    parts, place = list[str](), 0
    while place < len(text):
        char, place = text[place], place + 1
        if char == "[":
            part, place = glob_class(text, place)
            parts.append(part)
        else:
            parts.append({"*": ".*", "?": "."}.get(char) or re.escape(char))
    return re.compile("".join(parts), re.DOTALL)


ALERT_TEXTS: Final = MappingProxyType(
    {"absent": "{device} sends no {metric}", "offline": "{device} is offline", "log": "{device} logs {value} such lines"}
)


def value_text(value: Value | None) -> str:
    """A value as people read it: six digits of a number that is not whole."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def alert_text(rule: Rule, device: str, metric: str, value: Value | None) -> str:
    """What people read of an alert: the text of its rule, with the device, the metric and the value that was judged."""
    fields = {"device": device, "metric": metric, "value": value_text(value)}
    text = rule.text or ALERT_TEXTS.get(rule.condition.kind, "{metric} of {device}: {value}")
    return re.sub(r"\{(device|metric|value)\}", lambda found: fields[found[1]], text)


def check_rule(rule: Rule) -> None:
    """Refusal: invalid, for what can never be, such as a value at which an alert is to clear beyond the limit."""
    kind, limit = rule.condition.kind, rule.condition.limit
    if not rule.match:
        raise Refusal("invalid", FieldError("match", "is empty; * is every device"))
    if (rule.metric is None) != (kind in ("offline", "log")):
        raise Refusal("invalid", FieldError("metric", "is missing" if rule.metric is None else f"is not for {kind}"))
    if kind == "changed" and not cast("float", limit) > 0:
        raise Refusal("invalid", FieldError("condition.changed", "is not above 0"))
    if rule.clear is None:
        return
    if not kind.endswith(("above", "below")):
        raise Refusal("invalid", FieldError("clear", f"is not for {kind}"))
    if (rule.clear > cast("float", limit)) == kind.endswith("above") and rule.clear != limit:
        raise Refusal("invalid", FieldError("clear", f"is not on the other side of {limit}"))


class Judge:
    """Says of each reading of a series, in the order of their times, whether a condition holds, and whether an alert that is there
    stays, as the reading is not beyond its clear value. Text is a reading for `equals` alone."""

    def __init__(self, rule: Rule) -> None:
        self._condition = rule.condition
        self._clear = rule.clear
        self._trend = Trend(rule.condition.window)
        self._before: float | None = None
        self.holds = self.stays = False

    def take(self, ts: int, value: Value) -> Value | None:
        """What was judged: the value, its change, its slope a minute or what it will be; None where this says nothing."""
        condition = self._condition
        if condition.kind == "equals":
            self.holds = value == condition.limit and isinstance(value, str) == isinstance(condition.limit, str)
            return value
        judged = None if isinstance(value, str) else self._measure(ts, float(value))
        if judged is not None:
            self.holds = self._is_beyond(judged, cast("float", condition.limit), condition.upper)
            self.stays = not self._is_clear(judged)
        return judged

    def _measure(self, ts: int, value: float) -> float | None:
        kind = self._condition.kind
        if kind == "changed":
            before, self._before = self._before, value
            return None if before is None else abs(value - before)
        if not kind.startswith(("slope", "predicted")):
            return value
        line = self._trend.add(ts, value)
        if line is None:
            return None
        slope, now = line
        return slope if kind.startswith("slope") else now + slope * self._condition.span / 60_000

    def _is_beyond(self, judged: float, limit: float, upper: float) -> bool:
        match self._condition.kind.rpartition("_")[2]:
            case "above":
                return judged > limit
            case "below":
                return judged < limit
            case "outside":
                return judged < limit or judged > upper
        return judged >= limit  # changed by

    def _is_clear(self, judged: float) -> bool:
        """Whether an alert ends, where that asks for more than not to be beyond."""
        if self._clear is None:
            return True
        return judged >= self._clear if self._condition.kind.endswith("below") else judged <= self._clear


@attrs.define
class Episode:
    """An alert from when its condition began to hold; `fired_at`, `ended_at` (when the condition held no more) and `resolved_at` None,
    while it has not."""

    since: int
    value: Value | None
    fired_at: int | None = None
    resolved_at: int | None = None
    ended_at: int | None = None


class Life:
    """The life of one alert of a rule for one device: pending, firing, resolved. Timers run by the times that it is told."""

    def __init__(self, rule: Rule) -> None:
        self._for = rule.for_
        self._keep = rule.keep_firing_for
        self.now: Episode | None = None
        self.ended: int | None = None  # since when the condition of a firing alert holds no more

    def advance(self, moment: int) -> Episode | None:
        """Let the time go on; an alert that is over by then."""
        episode = self.now
        if episode is None:
            return None
        if episode.fired_at is None and self.ended is None and episode.since + self._for <= moment:
            episode.fired_at = episode.since + self._for
        if episode.fired_at is not None and self.ended is not None and self.ended + self._keep <= moment:
            episode.ended_at, episode.resolved_at = self.ended, self.ended + self._keep
            self.now = self.ended = None
            return episode
        return None

    def take(self, moment: int, value: Value | None, *, holds: bool, stays: bool = False) -> Episode | None:
        """From this moment on the condition holds, or does not, but what there is `stays`; an alert that is over."""
        over = self.advance(moment - 1) if self.now is not None and not holds else self.advance(moment)
        if holds or (stays and self.now is not None and self.ended is None):
            self.now = self.now or Episode(moment, value)
            self.ended = None
        elif self.now is not None and self.now.fired_at is None:
            self.now = None  # it did not hold for long enough
        elif self.now is not None and self.ended is None:
            self.ended = moment
        later = self.advance(moment)  # one that fires at once
        return over or later


def counted_until(lines: list[int], count: int, window: int, since: int) -> int:
    """When so many lines, whose times these are, are no longer in a window; `since`: an alert of them began then, if fewer are known."""
    return (lines[-count] if len(lines) >= count else since) + window + 1


class Trial:
    """A rule over what one device did, as if it had come at its times."""

    def __init__(self, rule: Rule, start: int) -> None:
        self._condition = rule.condition
        self._silence = rule.condition.span if rule.condition.kind in ("absent", "offline") else None
        self._judge = Judge(rule)
        self._life = Life(rule)
        self._last: int | None = start if rule.condition.kind == "absent" else None  # since when there is silence
        self._lines: list[int] = []
        self.over: list[Episode] = []

    def _add(self, episode: Episode | None) -> None:
        if episode is not None:
            self.over.append(episode)

    def take(self, ts: int, value: Value) -> None:
        if self._silence is not None:
            self._miss(ts)
            self._add(self._life.take(ts, None, holds=False))
            self._last = ts
        elif (judged := self._judge.take(ts, value)) is not None:
            self._add(self._life.take(ts, judged, holds=self._judge.holds, stays=self._judge.stays))

    def take_presence(self, ts: int, *, is_connected: bool) -> None:
        if is_connected:
            self.take(ts, 0)
            self._last = None
        elif self._last is None:
            self._last = ts

    def take_line(self, ts: int) -> None:
        count, window = self._condition.count, self._condition.window
        self._count(ts)
        self._lines = [*self._lines[1 - count :], ts] if count > 1 else [ts]
        if len(self._lines) == count and ts - self._lines[0] <= window:
            self._add(self._life.take(ts, count, holds=True))

    def _count(self, until: int) -> None:
        """No line came between the last one and this time."""
        if self._lines and self._life.now is not None:
            over_at = counted_until(self._lines, self._condition.count, self._condition.window, self._life.now.since)
            if over_at <= until and self._life.ended is None:
                self._add(self._life.take(over_at, None, holds=False))

    def _miss(self, until: int) -> None:
        """Nothing came between the last time and this one."""
        if self._silence is not None and self._last is not None and until - self._last > self._silence:
            self._add(self._life.take(self._last + self._silence, None, holds=True))

    def end(self, moment: int) -> list[Episode]:
        """All alerts that fired by then; the last one may still be firing."""
        self._miss(moment + 1)
        self._count(moment)
        self._add(self._life.advance(moment))
        if self._life.now is not None and self._life.now.fired_at is not None:
            self.over.append(self._life.now)
        return self.over


# ==== Alert watch ====
# Owns: which rules look at which devices, how each stands, and what becomes of alerts with what is stored. It is told what is stored and
# what time it is, and says what to write and what to look up. Must not know: asyncio, SQL, sockets.

PRESENCE: Final = ""  # beside metrics, what a rule may look at in a device
LINES: Final = "\n"
NOT_LOOKED_AT: Final = "its rule no longer looks at the device"
NEVER: Final = math.inf


class WatchedRule:
    """A rule that is in force; `gap` in milliseconds, of one about silence."""

    __slots__ = ("gap", "high", "id", "is_kept", "kind", "low", "name", "pattern", "rule", "source", "tenant_id")

    def __init__(self, number: int, tenant_id: int, rule: Rule) -> None:
        self.id, self.tenant_id, self.name, self.rule = number, tenant_id, rule.name, rule
        self.kind = rule.condition.kind
        self.pattern = None if rule.match == "*" else glob_pattern(rule.match)
        self.source = {"offline": PRESENCE, "log": LINES}.get(self.kind, rule.metric or "")
        self.is_kept = self.kind.startswith(("changed", "slope", "predicted"))  # one reading says nothing by itself
        self.low, self.high = self._quiet_range()
        self.gap = rule.condition.span if self.kind in ("absent", "offline") else NEVER

    def _quiet_range(self) -> tuple[float, float]:
        """Between which numbers a condition that does not hold begins to hold in no case; where there are none, the lower is higher."""
        limit = self.rule.condition.limit
        match self.kind:
            case "above":
                return -math.inf, cast("float", limit)
            case "below":
                return cast("float", limit), math.inf
            case "outside":
                return cast("float", limit), self.rule.condition.upper
            case "absent" | "offline" | "log":
                return -math.inf, math.inf
        return math.inf, -math.inf

    def looks_at(self, tenant_id: int, device: str, labels: Mapping[str, str]) -> bool:
        return (
            self.tenant_id == tenant_id and (self.pattern is None or self.pattern.fullmatch(device) is not None)
            and all(labels.get(name) == value for name, value in self.rule.match_labels.items())
        )  # fmt: skip

    def is_quiet(self, value: Value) -> bool:
        """Whether a reading leaves a condition that does not hold as it is."""
        if self.kind == "equals":
            return value != self.rule.condition.limit
        return not self.is_kept and (isinstance(value, str) or self.low <= value <= self.high)


class RuleSet:
    """Rules that look at one device, or at one source; all that the same rules look at share it. Numbers within `low` and `high`, of which
    none comes more than `gap` after the one before, leave all of them as they are, if none holds."""

    __slots__ = ("_by_source", "gap", "high", "low", "members", "rules")

    def __init__(self, rules: tuple[WatchedRule, ...]) -> None:
        self.rules, self.members = rules, frozenset(rules)
        self.low = max((rule.low for rule in rules), default=-math.inf)
        self.high = min((rule.high for rule in rules), default=math.inf)
        self.gap = min((rule.gap for rule in rules), default=NEVER)
        self._by_source: dict[str, RuleSet] | None = None

    def by_source(self) -> dict[str, RuleSet]:
        """The same, by what they look at in a device."""
        if self._by_source is None:
            parts: dict[str, list[WatchedRule]] = {}
            for rule in self.rules:
                parts.setdefault(rule.source, []).append(rule)
            self._by_source = {source: RuleSet(tuple(some)) for source, some in parts.items()}
        return self._by_source


NO_RULES: Final = RuleSet(())


class WatchedDevice:
    """A device that rules may look at; `offline` if its session ended, which one that never had any is not."""

    __slots__ = ("id", "labels", "name", "offline", "rules", "sources", "tenant_id")

    def __init__(self, number: int, tenant_id: int) -> None:
        self.id, self.tenant_id, self.name = number, tenant_id, ""
        self.labels: dict[str, str] = {}
        self.offline = False
        self.rules = NO_RULES
        self.sources = dict[str, "Source"]()  # by metric, PRESENCE and LINES


class Source:
    """What rules look at in one device: the readings of a metric, its presence or its lines. `newest` is the time of the newest reading,
    or since when the device is offline; 0 without one. A source has a clock of its own, that stood at `base` when something last came, at
    `arrived` by the clock of the process: a device with a wrong clock, or one that tells of the past, is judged by its own times."""

    __slots__ = ("arrived", "base", "device", "due", "metric", "newest", "rules", "series", "standings")

    def __init__(self, device: WatchedDevice, metric: str, rules: RuleSet, base: int, arrived: float) -> None:
        self.device, self.metric, self.rules = device, metric, rules
        self.series: str | None = None
        self.newest = 0
        self.base, self.arrived = base, arrived
        self.standings = dict[int, "Standing"]()  # by rule
        self.due = NEVER  # when it is to be looked at again

    def clock(self, now: float) -> int:
        return self.base + round((now - self.arrived) * 1000)

    def when(self, moment: int) -> float:
        """The time of the process at which the source's own clock shows a moment."""
        return self.arrived + (moment - self.base) / 1000

    def came(self, moment: int, now: float) -> None:
        """Something new came, of this moment."""
        self.newest = self.base = moment
        self.arrived = now


class Standing:
    """How a rule stands with a device, where there is something to be kept of it."""

    __slots__ = (
        "alert_id", "catching_up", "judge", "lag", "life", "lines", "looked_at", "reach", "replay", "rule", "source", "stored",
    )  # fmt: skip

    def __init__(self, rule: WatchedRule, source: Source) -> None:
        self.rule, self.source = rule, source
        self.judge = Judge(rule.rule)
        self.life = Life(rule.rule)
        self.lines: list[int] = []  # times of the newest lines, as many as the rule counts
        self.alert_id: int | None = None  # of the row that is stored
        self.stored: tuple[object, ...] = ()  # what it says: since, fired_at, ended_at, catching_up
        self.catching_up = False
        self.lag, self.looked_at = 0, 0.0  # how far its readings were behind, and when that was seen
        self.replay = cast("Replay | None", None)
        self.reach: int | None = None  # since when it would be open by what came late, which may yet end before what was told began

    @property
    def is_stored_as_firing(self) -> bool:
        return bool(self.stored) and self.stored[1] is not None

    def learn(self, alert_id: int, episode: Episode, ended_at: int | None, catching_up: bool, now: float) -> None:  # noqa: FBT001
        """What is stored of its alert."""
        self.alert_id, self.catching_up = alert_id, catching_up
        self.life.now, self.life.ended = episode, ended_at
        self.stored = (episode.since, episode.fired_at, ended_at, catching_up)
        self.looked_at = now

    def lines_are_over_at(self) -> int | None:
        """When there are no longer enough lines in the window, if no more come; None, where that is not waited for."""
        condition, episode = self.rule.rule.condition, self.life.now
        if self.rule.kind != "log" or episode is None or self.life.ended is not None:
            return None
        return counted_until(self.lines, condition.count, condition.window, episode.since)


class Replay:
    """A series that a rule judges anew from what is stored, a part at a time. The standing waits meanwhile. Once all that came late is
    judged, and things are as they were known to be then, it goes on from where the standing was: `known_to`, 0 if it knew nothing.
    Readings of a window before `start` are read too, without being judged: a trend goes through them."""

    __slots__ = (
        "after", "again", "is_present", "judge", "known_to", "life", "past", "reach", "recorded",
        "said_at", "standing", "start", "stop",
    )  # fmt: skip

    def __init__(self, standing: Standing, start: int, stop: int, known_to: int) -> None:
        rule = standing.rule.rule
        self.start = start
        self.standing, self.stop, self.known_to = standing, stop, known_to
        self.again: tuple[int, int] | None = None  # what else came late meanwhile
        self.judge, self.life = Judge(rule), Life(rule)
        self.after = slice_begin(start - 1 - rule.condition.window, rule.condition.window) - 1
        self.recorded: list[Episode] | None = None  # alerts that are stored
        self.past: list[Episode] = []
        self.is_present = False  # it goes on from where the standing was
        self.reach: int | None = None  # since when there was an alert then, by this
        self.said_at = 0  # the time of the last reading that said something

    def is_known(self, over: Episode) -> bool:
        """Whether an alert is stored that fired, and was there in a part of its time."""
        last = over.resolved_at or NEVER
        return any(
            one.fired_at is not None and one.since <= last and (one.resolved_at is None or one.resolved_at >= over.since)
            for one in self.recorded or ()
        )

    def was_there(self, moment: int) -> bool:
        """Whether there was an alert then, as it was known."""
        return any(one.since <= moment <= (one.resolved_at or NEVER) for one in self.recorded or ())

    def held(self, moment: int) -> bool:
        """Whether the condition held then, as it was known."""
        return any(one.since <= moment < (one.ended_at or one.resolved_at or NEVER) for one in self.recorded or ())

    def is_over(self) -> bool:
        """Whether it ends with an alert that is known to be over: its time to be kept has passed, though no reading says so."""
        episode, ended = self.life.now, self.life.ended
        if episode is None or ended is None:
            return False
        return any(one.since <= ended and one.resolved_at is not None and one.resolved_at >= episode.since for one in self.recorded or ())

    def begin(self, recorded: list[list[Any]]) -> None:
        """With what is stored: alerts that were not over before the start."""
        self.recorded = [Episode(*cells) for cells in recorded]
        for one in self.recorded:
            has_ended = one.ended_at is not None and one.ended_at < self.start
            if one.since < self.start and not (has_ended and one.resolved_at is not None):
                had_fired = one.fired_at is not None and one.fired_at < self.start
                self.life.now = Episode(one.since, one.value, one.fired_at if had_fired else None)
                self.life.ended = one.ended_at if has_ended else None

    def take(self, readings: list[tuple[int, Value]]) -> list[Episode]:
        """Judge some; alerts that are over by them."""
        over = list[Episode | None]()
        for ts, value in readings:
            self.after = ts
            judged = self.judge.take(ts, value)
            if judged is not None and ts >= self.start:
                self.said_at = ts
                over.append(self.life.take(ts, judged, holds=self.judge.holds, stays=self.judge.stays))
        return [episode for episode in over if episode is not None]

    def look_whether_present(self) -> None:
        beyond = self.stop + self.standing.rule.rule.condition.window
        holds = self.life.now is not None and self.life.ended is None
        is_as_known = holds == self.held(self.after) and (self.life.now is not None) == self.was_there(self.after)
        if beyond < self.said_at and self.after < self.known_to and is_as_known:
            self.reach = None if self.life.now is None else self.life.now.since
            self.judge, self.life, self.after, self.is_present = self.standing.judge, self.standing.life, self.known_to, True


@attrs.frozen
class AlertRow:
    """An alert as it is to be stored, times in milliseconds; `told` is what its device's timeline is to say of it, if anything."""

    id: int
    standing: Standing
    since: int
    value: Value | None
    fired_at: int | None
    ended_at: int | None
    resolved_at: int | None
    catching_up: bool
    reason: str | None
    told: str

    def text(self) -> str:
        source = self.standing.source
        return alert_text(self.standing.rule.rule, source.device.name, source.metric, self.value)

    def cells(self) -> tuple[object, ...]:
        """As `ALERT_COLUMNS` has them."""
        watched, source = self.standing.rule, self.standing.source
        rule, device = watched.rule, source.device
        return (
            self.id, device.tenant_id, device.id, watched.id, watched.name, watched.kind, rule.severity, rule.labels,
            None if source.metric in (PRESENCE, LINES) else source.metric, None if source.series is None else int(source.series),
            self.text(), self.value, self.since, self.fired_at, self.ended_at, self.resolved_at, self.reason, int(self.catching_up),
        )  # fmt: skip


@attrs.frozen
class DevicesWanted:
    """A page of the devices of a tenant that match, after one; with the series of some metrics, and the open alerts of a rule, or all."""

    tenant_id: int
    match: str = "*"
    after: str = ""
    metrics: tuple[str, ...] = ()
    rule_id: int | None = None


@attrs.frozen
class ReadingsWanted:
    """Readings of a series after a time, to be judged anew; at the first time with what is stored of the rule and the device."""

    rule_id: int
    series: int
    device_id: int
    after: int
    is_first: bool
    needs_before: bool


@attrs.define
class AlertWork:
    """What the next transaction writes of alerts, and looks up for those to come."""

    resolved: dict[int, AlertRow] = attrs.Factory(dict)  # by number, as no alert may be written twice
    past: list[AlertRow] = attrs.Factory(list)  # that are over already
    open: dict[int, AlertRow] = attrs.Factory(dict)
    dropped: list[int] = attrs.Factory(list)  # ended before they fired
    orphans: list[int] = attrs.Factory(list)  # nothing looks after them any more
    late: list[tuple[int, int, int, int, int]] = attrs.Factory(list)  # rule, series, device, start, stop
    judged: list[tuple[int, int]] = attrs.Factory(list)  # rule and series: what was late is judged
    lines: dict[int, int] = attrs.Factory(dict)  # by rule: lines up to this number are judged
    devices: DevicesWanted | None = None
    readings: list[ReadingsWanted] = attrs.Factory(list)
    metrics: tuple[str, ...] = ()  # that rules look at, for devices that have changed
    is_asking: bool = False  # whether more devices have changed than it was told of

    @property
    def is_told(self) -> bool:
        return bool(self.resolved or self.past or self.open or self.dropped or self.orphans)

    def __bool__(self) -> bool:
        return bool(self.is_told or self.late or self.judged or self.lines or self.devices or self.readings or self.is_asking)


@attrs.define
class AlertNews:
    """What a transaction found out for the watch: rules that have changed, with their tenant and text (null: gone); devices that have,
    and a page of those that were wanted, as DEVICE_WATCHED_JSON has them; and readings, with what is stored of alerts."""

    rules: list[tuple[int, int, str | None]] = attrs.Factory(list)
    devices: list[list[Any]] = attrs.Factory(list)
    page: list[list[Any]] | None = None
    readings: list[tuple[list[list[Any]], list[tuple[int, Value]]]] = attrs.Factory(list)
    more: bool = False  # devices have changed that the next transaction will tell


class Places:
    """Which rules look at which devices, and at what in them."""

    def __init__(self) -> None:
        self.rules: dict[int, WatchedRule] = {}
        self.metrics: tuple[str, ...] = ()  # that rules look at
        self.devices: dict[int, WatchedDevice] = {}
        self.sources: dict[str, Source] = {}  # by series
        self._sets: dict[tuple[int, ...], RuleSet] = {}

    def set_of(self, rules: tuple[WatchedRule, ...]) -> RuleSet:
        key = tuple(rule.id for rule in rules)
        return self._sets.get(key) or self._sets.setdefault(key, RuleSet(rules))

    def assign(self, device: WatchedDevice, rules: tuple[WatchedRule, ...]) -> None:
        """From now on these rules look at a device."""
        device.rules = self.set_of(rules)
        parts = device.rules.by_source()
        for source in list(device.sources.values()):
            source.rules = parts.get(source.metric, NO_RULES)
            known = {rule.id for rule in source.rules.rules} if source.standings else set()
            for number in source.standings.keys() - known:
                del source.standings[number]
            if not source.rules.rules:
                del device.sources[source.metric]
                self.sources.pop(source.series or "", None)

    def source(self, device: WatchedDevice, metric: str, now: float, base: int) -> Source | None:
        """What rules look at in a device; None, if none does."""
        rules = device.rules.by_source().get(metric)
        if rules is None:
            return None
        source = device.sources.get(metric)
        if source is None:
            source = device.sources[metric] = Source(device, metric, rules, base, now)
        return source

    def add_series(self, device: WatchedDevice, metric: str, key: str, now: float) -> Source | None:
        """A series that a device has; None, if no rule looks at it."""
        source = self.source(device, metric, now, 0)
        if source is not None:
            source.series = key
            self.sources[key] = source
        return source

    def add_rule(self, rule: WatchedRule) -> None:
        self.rules[rule.id] = rule
        self._list_metrics()

    def _list_metrics(self) -> None:
        self.metrics = tuple({rule.rule.metric for rule in self.rules.values() if rule.rule.metric is not None})

    def forget_rule(self, number: int) -> None:
        rule = self.rules.pop(number, None)
        if rule is None:
            return
        self._list_metrics()
        self._sets.clear()
        for device in self.devices.values():
            if rule in device.rules.members:
                self.assign(device, tuple(other for other in device.rules.rules if other is not rule))

    def forget_device(self, number: int) -> None:
        device = self.devices.pop(number, None)
        if device is not None:
            self.assign(device, ())


class Timers:
    """When sources are to be looked at again, though nothing came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Source]] = []
        self._count = 0

    def plan(self, source: Source, due: float) -> None:
        """At the latest then."""
        if due < source.due:
            source.due = due
            self._count += 1
            heapq.heappush(self._heap, (due, self._count, source))

    def is_due(self, now: float) -> bool:
        return bool(self._heap) and self._heap[0][0] <= now

    def take_due(self, now: float, most: int) -> Iterator[Source]:
        """Those that are due, at most so many; each is to be planned anew."""
        while most and self.is_due(now):
            due, _, source = heapq.heappop(self._heap)
            if source.due == due:
                source.due = NEVER
                most -= 1
                yield source


class AlertBook:
    """Turns what becomes of standings into rows, and remembers what is stored of each."""

    def __init__(self, limits: Limits, timers: Timers) -> None:
        self._limits = limits
        self._timers = timers
        self.work = AlertWork()
        self.next_alert = 1

    def _row(self, standing: Standing, episode: Episode, ended_at: int | None, reason: str | None = None, told: str = "") -> AlertRow:
        if standing.alert_id is None:
            standing.alert_id = self.next_alert
            self.next_alert += 1
        return AlertRow(
            standing.alert_id, standing, episode.since, episode.value, episode.fired_at, ended_at, episode.resolved_at,
            standing.catching_up, reason, told,
        )  # fmt: skip

    def add_over(self, standing: Standing, over: Episode | None, reason: str = "cleared") -> None:
        """An alert that fired is over. One that was not stored as firing happened in the past, and nobody is told."""
        if over is None:
            return
        unwritten = self.work.open.pop(standing.alert_id or 0, None)
        is_known = standing.is_stored_as_firing and not standing.catching_up
        was_told = is_known and (unwritten is None or not unwritten.told)
        is_stored, standing.catching_up = standing.alert_id is not None, not was_told
        row = self._row(standing, over, over.ended_at or over.resolved_at, reason, "resolved" if was_told else "")
        if is_stored:
            self.work.resolved[row.id] = row
        else:
            self.work.past.append(row)
        standing.alert_id, standing.stored, standing.catching_up = None, (), False

    def add_past(self, standing: Standing, over: Episode) -> None:
        """An alert that was over before another that is open now."""
        kept = standing.alert_id, standing.stored, standing.catching_up
        standing.alert_id, standing.stored = None, ()
        self.add_over(standing, over)
        standing.alert_id, standing.stored, standing.catching_up = kept

    def part(self, standing: Standing, wall: int, reason: str) -> None:
        """Nothing looks after it any more."""
        episode, standing.life.now = standing.life.now, None
        if episode is not None and episode.fired_at is not None:
            episode.resolved_at = wall
            self.add_over(standing, episode, reason)
        else:
            self._drop(standing)

    def _drop(self, standing: Standing) -> None:
        """It ended before it fired."""
        if standing.alert_id is not None:
            self.work.open.pop(standing.alert_id, None)
            self.work.dropped.append(standing.alert_id)
            standing.alert_id, standing.stored = None, ()

    def settle(self, standing: Standing, now: float, behind: int) -> None:
        """Write down what has changed; `behind`: how many milliseconds ago was what it was judged by."""
        episode, life, source = standing.life.now, standing.life, standing.source
        if episode is None:
            self._drop(standing)
            if not standing.rule.is_kept and not standing.lines and standing.replay is None:
                source.standings.pop(standing.rule.id, None)
            return
        was_firing = standing.is_stored_as_firing
        if episode.fired_at is not None and not was_firing:
            standing.catching_up = behind > self._limits.behind_seconds * 1000
            standing.lag, standing.looked_at = behind, now
        said = (episode.since, episode.fired_at, life.ended, standing.catching_up)
        if said != standing.stored:
            is_new = episode.fired_at is not None and not standing.catching_up and (not was_firing or bool(standing.stored[3]))
            row = self._row(standing, episode, life.ended)
            unwritten = self.work.open.get(row.id)
            self.work.open[row.id] = attrs.evolve(row, told="firing" if is_new or (unwritten is not None and unwritten.told) else "")
            standing.stored = said
        self._plan(standing, episode)

    def _plan(self, standing: Standing, episode: Episode) -> None:
        rule, source, life = standing.rule.rule, standing.source, standing.life
        if life.ended is not None:
            self._timers.plan(source, source.when(life.ended + rule.keep_firing_for))
        elif episode.fired_at is None:
            self._timers.plan(source, source.when(episode.since + rule.for_))
        if standing.catching_up:
            self._timers.plan(source, standing.looked_at + self._limits.settle_seconds)
        over_at = standing.lines_are_over_at()
        if over_at is not None and not source.device.offline:
            self._timers.plan(source, source.when(over_at))

    def look_whether_caught_up(self, standing: Standing, now: float, wall: int) -> None:
        """Whether readings of the past still come. Those of a device whose clock is wrong stay as far behind as they are."""
        if standing.catching_up and now - standing.looked_at >= self._limits.settle_seconds:
            lag = wall - standing.source.newest
            if standing.lag - lag < (now - standing.looked_at) * 500 or lag <= self._limits.behind_seconds * 1000:
                standing.catching_up = False
            standing.lag, standing.looked_at = lag, now


class Replays:
    """Series that rules judge anew, so many at a time, because readings came late."""

    def __init__(self, limits: Limits, book: AlertBook) -> None:
        self._limits, self._book = limits, book
        self._waiting: deque[Replay] = deque()
        self._asked: list[Replay] = []  # of the transaction under way

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def ask(self) -> list[ReadingsWanted]:
        """What the next transaction is to look up."""
        while self._waiting and len(self._asked) < self._limits.replays:
            replay = self._waiting.popleft()
            if self._is_current(replay):
                self._asked.append(replay)
        return [
            ReadingsWanted(
                replay.standing.rule.id, int(replay.standing.source.series or 0), replay.standing.source.device.id, replay.after,
                replay.recorded is None, replay.standing.rule.kind == "changed",
            )
            for replay in self._asked
        ]  # fmt: skip

    def late(self, standing: Standing, start: int, stop: int) -> None:
        """Judge anew what came late: alerts that waited to fire are found by what was before."""
        first = start - standing.rule.rule.for_
        self.begin(standing, first if standing.reach is None else min(first, standing.reach), stop, standing.source.newest)

    def note(self, standing: Standing, start: int, stop: int) -> None:
        """Should the server end now, these readings are to be judged at its next start."""
        source = standing.source
        self._book.work.late.append((standing.rule.id, int(source.series or 0), source.device.id, start, stop))

    def mark(self, standing: Standing, start: int, stop: int) -> None:
        """Readings between these times came late."""
        if standing.replay is None:
            self.late(standing, start, stop)
        else:
            first, last = standing.replay.again or (start, stop)
            standing.replay.again = min(first, start), max(last, stop)

    def begin(self, standing: Standing, start: int, stop: int, known_to: int) -> None:
        standing.replay = Replay(standing, start, stop, known_to)
        self._waiting.append(standing.replay)

    def _is_current(self, replay: Replay) -> bool:
        standing = replay.standing
        return standing.replay is replay and standing.source.standings.get(standing.rule.id) is standing

    def go_on(self, found: list[tuple[list[list[Any]], list[tuple[int, Value]]]], now: float, wall: int) -> None:
        """With what was looked up for those that asked: what is stored of alerts, and readings."""
        for replay, (recorded, readings) in zip(self._asked, found, strict=False):
            self._go_on(replay, recorded, readings, now, wall)
        self._asked = []

    def _go_on(self, replay: Replay, recorded: list[list[Any]], readings: list[tuple[int, Value]], now: float, wall: int) -> None:
        if not self._is_current(replay):
            return
        if replay.recorded is None:
            replay.begin(recorded)
        for over in replay.take(readings):
            if replay.is_present:
                self._book.add_over(replay.standing, over)
            else:
                replay.past.append(over)
        replay.look_whether_present()
        if len(readings) == self._limits.replay_readings:
            self._waiting.append(replay)
        else:
            self._finish(replay, now, wall)

    def _finish(self, replay: Replay, now: float, wall: int) -> None:
        """What was told stays. What nobody knew is added to the past, and the present is what it would be."""
        standing, life, source = replay.standing, replay.life, replay.standing.source
        standing.replay, standing.reach = None, None
        present, covering = standing.life.now, None
        if present is None and replay.is_over():
            life.now = life.ended = None
        for over in replay.past:
            if not replay.is_known(over):
                self._book.add_past(standing, over)
            else:
                covering = over
        if present is not None and present.fired_at is not None and not replay.is_present:
            if life.now is None and replay.said_at:
                end = covering.resolved_at if covering is not None and covering.resolved_at else source.newest
                self._book.add_over(standing, attrs.evolve(present, resolved_at=max(end, present.fired_at)))
            else:
                replay.reach = None if life.now is None else life.now.since
                life.now = present
        if present is not None and replay.reach is not None and replay.reach < present.since:
            standing.reach = replay.reach
        standing.judge, standing.life = replay.judge, life
        if replay.again is not None:
            self.late(standing, *replay.again)
        elif standing.reach is None:
            self._book.work.judged.append((standing.rule.id, int(source.series or 0)))
        self._book.settle(standing, now, wall - source.newest)


def read_rule(codec: Codec, number: int, tenant_id: int, text: str) -> WatchedRule | None:
    """A rule as it is stored; None, where it is not in force."""
    try:
        rule = codec.body(text.encode(), Rule)
    except Refusal as refusal:
        log.error("rule %d cannot be read, and is not in force: %s", number, refusal.errors)
        return None
    return None if rule.disabled else WatchedRule(number, tenant_id, rule)


class DevicePages:
    """Which devices the watch is yet to be told of, a page at a time."""

    def __init__(self) -> None:
        self._waiting: deque[DevicesWanted] = deque()
        self._asked: DevicesWanted | None = None  # of the transaction under way

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, wanted: DevicesWanted) -> None:
        self._waiting.append(wanted)

    def forget_rule(self, number: int) -> None:
        self._waiting = deque(wanted for wanted in self._waiting if wanted.rule_id != number)

    def ask(self) -> DevicesWanted | None:
        self._asked = self._waiting[0] if self._waiting else None
        return self._asked

    def came(self, page: list[list[Any]] | None) -> tuple[int | None, list[list[Any]]]:
        """The devices that were found, and for which rule; none, where that is gone meanwhile."""
        asked, self._asked = self._asked, None
        if page is None or asked is None or not self._waiting or self._waiting[0] is not asked:
            return None, []
        self._waiting.popleft()
        if page:
            self._waiting.appendleft(attrs.evolve(asked, after=page[-1][2]))
        return asked.rule_id, page


class AlertWatch:
    """All rules, and how they stand. What it keeps in memory can be learned anew from the database at any time."""

    def __init__(self, codec: Codec, limits: Limits) -> None:
        self._codec, self._limits = codec, limits
        self.forget(time.monotonic())

    def forget(self, now: float) -> None:
        """Know nothing, as before a start."""
        self.places, self._timers = Places(), Timers()
        self._book = AlertBook(self._limits, self._timers)
        self.pages = DevicePages()
        self._replays = Replays(self._limits, self._book)
        self._more = False
        self.awake = self._looked_at = now  # since when the server can have heard of what comes

    # What there is.

    def begin(self, rules: list[tuple[int, int, str]], next_alert: int) -> None:
        """All rules, at a start; the devices are wanted page by page."""
        self._book.next_alert = next_alert
        for number, tenant_id, text in rules:
            self._learn_rule(number, tenant_id, text)
        for tenant in sorted({tenant for _, tenant, _ in rules}):
            self.pages.add(DevicesWanted(tenant, metrics=self.places.metrics))

    def _learn_rule(self, number: int, tenant_id: int, text: str | None) -> WatchedRule | None:
        """A rule that is in force now, in the place of one that was."""
        self.places.forget_rule(number)
        self.pages.forget_rule(number)
        watched = None if text is None else read_rule(self._codec, number, tenant_id, text)
        if watched is not None:
            self.places.add_rule(watched)
        return watched

    def learn(self, news: AlertNews, now: float, wall: int) -> None:
        """What the transaction found that was just committed."""
        for number, tenant_id, text in news.rules:
            watched = self._learn_rule(number, tenant_id, text)
            if watched is not None:
                metrics = (watched.rule.metric,) if watched.rule.metric else ()
                self.pages.add(DevicesWanted(tenant_id, watched.rule.match, "", metrics, number))
        for row in news.devices:
            self._learn_device(row, None, now, wall)
        self._more = news.more
        rule_id, page = self.pages.came(news.page)
        for row in page:
            self._learn_device(row, rule_id, now, wall, at_start=rule_id is None)
        self._replays.go_on(news.readings, now, wall)

    def _learn_device(self, row: list[Any], rule_id: int | None, now: float, wall: int, *, at_start: bool = False) -> None:
        """A device that is new, changed or wanted, with all rules or one."""
        number, tenant_id, name, labels, is_disabled, is_connected, disconnected_at, series, alerts = row
        if name is None or is_disabled:
            self.places.forget_device(number)
            return
        device = self.places.devices.get(number) or WatchedDevice(number, tenant_id)
        if rule_id is not None or (device.name, device.labels) != (name, labels):
            device.name, device.labels = name, labels
            self._place(device, rule_id, now, wall)
        if device.rules.rules or alerts:
            self.places.devices[number] = device
        fresh = [(source, value) for metric, newest in series.items() for source, value in self._learn_series(device, metric, newest, now)]
        for alert_id, alert_rule, *episode in alerts:
            self._learn_alert(device, alert_id, alert_rule, episode, now)
        for source, value in fresh:
            self._judge_newest(source, value, now, wall, at_start=at_start)
        self._learn_presence(device, is_connected, disconnected_at, now, wall)

    def _place(self, device: WatchedDevice, rule_id: int | None, now: float, wall: int) -> None:
        """Say anew whether a rule looks at a device, or which do."""
        asked = self.places.rules.values() if rule_id is None else [self.places.rules[rule_id]]
        rules, before = tuple(rule for rule in asked if rule.looks_at(device.tenant_id, device.name, device.labels)), device.rules
        added = tuple(rule for rule in rules if rule not in before.members)
        for rule in before.members.difference(rules) if rule_id is None else ():
            source = device.sources.get(rule.source)
            if source is not None and rule.id in source.standings:
                self._book.part(source.standings[rule.id], wall, NOT_LOOKED_AT)
        self.places.assign(device, rules if rule_id is None else before.rules + added)
        for rule in added:
            if rule.gap < NEVER and (silent := self.places.source(device, rule.source, now, wall)) is not None:
                self._timers.plan(silent, now + rule.gap / 1000)

    def _learn_series(self, device: WatchedDevice, metric: str, newest: list[Any], now: float) -> Iterator[tuple[Source, Value]]:
        """A series with the time and value of its newest reading, if it has one; that value, where it is to be judged."""
        key, ts, value = newest
        source = self.places.sources.get(key) or self.places.add_series(device, metric, key, now)
        if source is not None and ts is not None and ts >= source.newest:
            source.newest = source.base = ts
            yield source, value

    def _judge_newest(self, source: Source, value: Value, now: float, wall: int, *, at_start: bool) -> None:
        """Rules that do not know a series yet judge its newest reading, or all of a window before it; at a start they only read that
        window again, as it was judged when it came."""
        newest = source.newest
        for rule in source.rules.rules:
            standing = source.standings.get(rule.id)
            if rule.is_kept:
                if standing is None or at_start:
                    begin = newest + 1 if at_start else max(1, newest - rule.rule.condition.window)
                    self._replays.begin(self._standing(source, rule), begin, newest, 0)
            elif standing is None and rule.kind != "absent" and not rule.is_quiet(value):
                self._feed(self._standing(source, rule), [(newest, value)], now, wall)

    def _learn_presence(self, device: WatchedDevice, is_connected: bool, disconnected_at: int | None, now: float, wall: int) -> None:  # noqa: FBT001
        was_offline, device.offline = device.offline, not is_connected and disconnected_at is not None
        for source in device.sources.values() if was_offline and is_connected else ():
            if source.metric == LINES and source.standings:  # alerts that stayed as they were meanwhile
                self._timers.plan(source, now)
        source_of_all = device.sources.get(PRESENCE)
        if source_of_all is None:
            return
        if not device.offline:
            source_of_all.came(0, now)
            source_of_all.base = wall
            for standing in list(source_of_all.standings.values()):
                self._take(standing, wall, None, now, holds=False)
        elif disconnected_at is not None and not source_of_all.newest:
            source_of_all.came(disconnected_at, now - max(0, wall - disconnected_at) / 1000)
            self._timers.plan(source_of_all, now)

    def _learn_alert(self, device: WatchedDevice, alert_id: int, rule_id: int, episode: list[Any], now: float) -> None:
        """An alert that is open in the database: at a start, or one that nothing looks after."""
        since, value, fired_at, ended_at, catching_up = episode
        rule = self.places.rules.get(rule_id)
        source = None if rule is None or rule not in device.rules.members else self.places.source(device, rule.source, now, since)
        if rule is None or source is None:
            if alert_id not in self._book.work.resolved:
                self._book.work.orphans.append(alert_id)
            return
        standing = self._standing(source, rule)
        if standing.alert_id is None:
            standing.learn(alert_id, Episode(since, value, fired_at), ended_at, bool(catching_up), now)
            self._timers.plan(source, now)

    def learn_late(self, late: list[tuple[int, int, int, int]]) -> None:
        """Readings that came late before a start and are not judged yet, as rule, series, start and stop."""
        for rule_id, series, start, stop in late:
            source, rule = self.places.sources.get(str(series)), self.places.rules.get(rule_id)
            if source is not None and rule is not None and rule in source.rules.members:
                self._replays.late(self._standing(source, rule), start, stop)
            else:
                self._book.work.judged.append((rule_id, series))

    # What comes.

    def _standing(self, source: Source, rule: WatchedRule) -> Standing:
        return source.standings.get(rule.id) or source.standings.setdefault(rule.id, Standing(rule, source))

    def _take_points(self, points: dict[str, dict[str, Value]], now: float, wall: int) -> None:
        """Readings that are about to be stored, by series and time."""
        sources = self.places.sources
        for key in points.keys() & sources.keys():
            source, some = sources[key], points[key]
            rules = source.rules
            if len(some) == 1:
                ((text, value),) = some.items()
                newest = int(text)
                is_quiet = value.__class__ is not str and rules.low <= value <= rules.high  # type: ignore[operator]
            else:
                newest = max(map(int, some))
                try:
                    is_quiet = rules.low <= min(some.values()) and max(some.values()) <= rules.high  # type: ignore[operator]
                except TypeError:  # texts among them
                    is_quiet = False
            if not is_quiet or source.standings or newest - source.newest > rules.gap:
                self._look(source, sorted((int(text), value) for text, value in some.items()), now, wall)
            if newest > source.newest:
                source.newest = source.base = newest
            else:
                source.base = max(source.base, source.newest)
            source.arrived = now

    def _look(self, source: Source, readings: list[tuple[int, Value]], now: float, wall: int) -> None:
        """Readings of a series that may change something."""
        late = [ts for ts, _ in readings if ts <= source.newest]
        for rule in source.rules.rules:  # before the others: these look from the newest reading on
            if rule.kind == "absent":
                self._look_at_gaps(source, rule, readings, now)
        for rule in source.rules.rules:
            standing = source.standings.get(rule.id)
            if rule.kind == "absent" or (standing is None and not rule.is_kept and all(rule.is_quiet(value) for _, value in readings)):
                continue
            standing = standing or self._standing(source, rule)
            if not late and standing.replay is None:
                self._feed(standing, readings, now, wall)
                continue
            self._replays.note(standing, readings[0][0], readings[-1][0])
            if late:  # otherwise what is judged anew goes on to these
                self._replays.mark(standing, late[0], late[-1])

    def _feed(self, standing: Standing, readings: list[tuple[int, Value]], now: float, wall: int) -> None:
        """Readings in order, later than all before."""
        standing.source.came(readings[-1][0], now)
        for ts, value in readings:
            if (judged := standing.judge.take(ts, value)) is not None:
                over = standing.life.take(ts, judged, holds=standing.judge.holds, stays=standing.judge.stays)
                self._book.add_over(standing, over)
        self._book.settle(standing, now, wall - readings[-1][0])

    def _take(self, standing: Standing, moment: int, value: Value | None, now: float, *, holds: bool, behind: int = 0) -> None:
        self._book.add_over(standing, standing.life.take(moment, value, holds=holds))
        self._book.settle(standing, now, behind)

    def _look_at_gaps(self, source: Source, rule: WatchedRule, readings: list[tuple[int, Value]], now: float) -> None:
        """Readings end a silence; between those that come together there may have been others."""
        newer = [ts for ts, _ in readings if ts > source.newest]
        standing = source.standings.get(rule.id)
        if standing is not None:
            begun = standing.life.now.since if standing.life.now is not None else 0
            self._take(standing, next((ts for ts in newer if ts >= begun), max(begun, readings[-1][0])), None, now, holds=False)
        else:
            newer = [source.newest, *newer] if source.newest else newer
        past = Standing(rule, source)
        for before, after in itertools.pairwise(newer):
            if after - before > rule.gap:
                self._book.add_over(past, past.life.take(before + int(rule.gap), None, holds=True))
                self._book.add_over(past, past.life.take(after, None, holds=False))
        self._book.add_over(past, past.life.advance(LATEST))

    def take_lines(
        self, rule_id: int, lines: list[tuple[int, int]], upto: int, now: float, wall: int, *, is_known: bool = False
    ) -> None:
        """Lines that a rule counts, as device and time, in the order in which they came; all up to a number are judged. Those that are
        known were judged before a start."""
        rule = self.places.rules.get(rule_id)
        if rule is None:
            return
        window, most = rule.rule.condition.window, rule.rule.condition.count
        for device_id, at in lines:
            device = self.places.devices.get(device_id)
            source = None if device is None or rule not in device.rules.members else self.places.source(device, LINES, now, at)
            if source is None:
                continue
            standing = self._standing(source, rule)
            bisect.insort(standing.lines, at)
            del standing.lines[:-most]
            moment = standing.lines[-1]
            source.came(max(source.newest, moment), now)
            if not is_known and len(standing.lines) == most and moment - standing.lines[0] <= window:
                self._take(standing, moment, most, now, holds=True, behind=wall - moment)
            self._book.settle(standing, now, 0)
        if not is_known:
            self._book.work.lines[rule_id] = upto

    # What time it is.

    def look_at_clock(self, now: float) -> bool:
        """Whether there is something to be done. After a standstill of the server nothing can have come: silence is measured anew."""
        if now - self._looked_at > self._limits.standstill_seconds:
            self.awake = now
        self._looked_at = now
        return bool(self.pages or self._replays or self._book.work or self._more) or self._timers.is_due(now)

    def _examine(self, source: Source, now: float, wall: int) -> None:
        clock = source.clock(now)
        for standing in list(source.standings.values()):
            if standing.replay is not None:
                continue
            over_at = standing.lines_are_over_at()
            if over_at is not None and over_at <= clock and not source.device.offline:
                self._book.add_over(standing, standing.life.take(over_at, None, holds=False))
            self._book.add_over(standing, standing.life.advance(clock))
            self._book.look_whether_caught_up(standing, now, wall)
            self._book.settle(standing, now, wall - clock)
        if source.rules.gap < NEVER and (source.metric != PRESENCE or source.newest):
            self._miss(source, now, wall)

    def _miss(self, source: Source, now: float, wall: int) -> None:
        """Nothing came for some time."""
        begin = max(source.arrived, self.awake)
        for rule in source.rules.rules:
            standing = source.standings.get(rule.id)
            if rule.gap == NEVER or (standing is not None and standing.life.now is not None and standing.life.ended is None):
                continue
            due = begin + rule.gap / 1000
            if due > now:
                self._timers.plan(source, due)
            else:
                moment = wall if begin == self.awake else source.clock(due)
                self._take(standing or self._standing(source, rule), moment, None, now, holds=True)

    # What is to be done.

    def close(self, points: dict[str, dict[str, Value]], series: list[tuple[int, int, str]], now: float, wall: int) -> AlertWork:
        """What the next transaction is to write and to look up, which stores these points and new series."""
        self.look_at_clock(now)
        if self.places.rules:
            for number, device_id, metric in series:
                device = self.places.devices.get(device_id)
                if device is not None:
                    self.places.add_series(device, metric, str(number), now)
            self._take_points(points, now, wall)
        for source in self._timers.take_due(now, self._limits.alert_rows):  # of a rule that was removed, too
            self._examine(source, now, wall)
        work, self._book.work = self._book.work, AlertWork()
        work.devices = self.pages.ask()
        work.readings = self._replays.ask()
        work.metrics, work.is_asking = self.places.metrics, self._more
        return work


# ==== Notices ====
# Owns: what receivers are told of alerts, in each form, how that is signed, and which addresses may be reached. Must not know: asyncio,
# SQL, sockets.

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NOT_OVER: Final = "0001-01-01T00:00:00Z"  # the end of an alert that has none: Go's zero time, which receivers look for
GRACE_MS: Final = 300_000  # an alert is told anew before its end, as Alertmanager has it, comes; with so much to spare
# https://docs.ntfy.sh/publish/#message-priority
NTFY_PRIORITIES: Final = MappingProxyType({"info": "2", "warning": "3", "error": "4", "critical": "5"})
# A longer message comes as a file from ntfy, and is cut or refused by Slack and by others that take its form.
FORM_BYTES: Final = MappingProxyType({"ntfy": 4_000, "slack": 4_000})
LINE_CHARACTERS: Final = 300  # of an alert, in a text that people read
TITLE_CHARACTERS: Final = 200
NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: its last 32 bits are an address of IPv4
GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")  # what IANA gives out
THIS_NETWORK: Final = ipaddress.IPv4Network("0.0.0.0/8")  # on Linux this machine
BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
NUMBER_OF_ADDRESS: Final = re.compile(r"0[xX][0-9a-fA-F]{0,16}|[0-9]{1,16}")
AS_WRITTEN: Final = re.compile(r"[Hh][Tt][Tt][Pp][Ss]?://[A-Za-z0-9.:\[\]-]+(/[!-~]*)?")  # it needs no encoding
WEBHOOK_SECRET: Final = re.compile(r"whsec_([A-Za-z0-9+/]{32,86}={0,2})")


@attrs.frozen
class AlertShown:
    """An alert as receivers are shown it; times in milliseconds."""

    rule: str
    device: str
    tenant: str
    severity: str
    metric: str | None
    labels: Mapping[str, str]
    text: str
    value: Value | None
    fired_at: int
    resolved_at: int | None
    reason: str | None
    stale: bool


@attrs.frozen
class AlertGroup:
    """Of what a receiver is told together: `label` and `key` are what the alerts have in common, `alerts` are the first of them."""

    webhook_id: int
    label: str
    key: str
    at: int
    repeat: int
    firing: int
    resolved: int
    alerts: tuple[AlertShown, ...]

    @property
    def hidden(self) -> int:
        return self.firing + self.resolved - len(self.alerts)


@attrs.frozen
class Message:
    """What is sent in one form."""

    headers: Mapping[str, str]
    body: str


def label_name(name: str) -> str:
    """A name that Prometheus and what is made for it take for a label."""
    plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    return f"_{plain}" if plain[:1].isdigit() else plain


def labels_of(alert: AlertShown) -> dict[str, str]:
    """What an alert is known by; a label of its rule does not take the place of one of these."""
    own = {label_name(name): value for name, value in sorted(alert.labels.items()) if value}
    known = {"alertname": alert.rule, "device": alert.device, "severity": alert.severity, "tenant": alert.tenant}
    return dict(sorted({**own, **known, **({"metric": alert.metric} if alert.metric else {})}.items()))


def annotations_of(alert: AlertShown) -> dict[str, str]:
    """What is said of an alert."""
    said = {"summary": alert.text}
    if alert.value is not None:
        said["value"] = alert.value if isinstance(alert.value, str) else orjson.dumps(alert.value).decode()
    if alert.reason is not None:
        said["reason"] = alert.reason
    if alert.stale:
        said["stale"] = "true"
    return said


def fingerprint(labels: Mapping[str, str]) -> str:
    """The number by which Alertmanager knows a set of labels: FNV-1a over names and values in order, each ended by 0xff."""
    number = 0xCBF29CE484222325
    for name in sorted(labels):
        for byte in b"%b\xff%b\xff" % (name.encode(), labels[name].encode()):
            number = (number ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{number:016x}"


def common(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What all of them have alike."""
    first, *others = parts
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def link_to(device: str, external_url: str) -> str:
    return f"{external_url.rstrip('/')}/iiot/{device}" if external_url else ""


def group_key(group: AlertGroup) -> str:
    """As Alertmanager writes it: the way to the receiver, and the labels that the alerts have in common."""
    receiver, key = (orjson.dumps(text).decode() for text in (str(group.webhook_id), group.key))
    return f"{{}}/{{receiver={receiver}}}:{{{label_name(group.label)}={key}}}"


def payload(group: AlertGroup, external_url: str) -> dict[str, Any]:
    """Version 4 of what Alertmanager sends to webhooks (https://prometheus.io/docs/alerting/latest/configuration/#webhook_config)."""
    labels, annotations = [labels_of(alert) for alert in group.alerts], [annotations_of(alert) for alert in group.alerts]
    return {
        "version": "4",
        "groupKey": group_key(group),
        "truncatedAlerts": group.hidden,
        "status": "firing" if group.firing else "resolved",
        "receiver": str(group.webhook_id),
        "groupLabels": {label_name(group.label): group.key},
        "commonLabels": common(labels),
        "commonAnnotations": common(annotations),
        "externalURL": external_url,
        "alerts": [
            {
                "status": "firing" if alert.resolved_at is None else "resolved",
                "labels": its_labels,
                "annotations": its_annotations,
                "startsAt": format_time(alert.fired_at),
                "endsAt": NOT_OVER if alert.resolved_at is None else format_time(alert.resolved_at),
                "generatorURL": link_to(alert.device, external_url),
                "fingerprint": fingerprint(its_labels),
            }
            for alert, its_labels, its_annotations in zip(group.alerts, labels, annotations, strict=True)
        ],
    }  # fmt: skip


def posted_alerts(group: AlertGroup, external_url: str) -> list[dict[str, Any]]:
    """What Alertmanager's own API takes. It ends an alert of which it does not hear: by the end of a firing one it is told anew."""
    return [
        {
            "labels": labels_of(alert),
            "annotations": annotations_of(alert),
            "startsAt": format_time(alert.fired_at),
            "endsAt": format_time(group.at + 2 * group.repeat + GRACE_MS if alert.resolved_at is None else alert.resolved_at),
            **({"generatorURL": link_to(alert.device, external_url)} if external_url else {}),
        }
        for alert in group.alerts
    ]


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(text: str) -> str:
    """A text without what would end a line or a header."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def title_of(group: AlertGroup) -> str:
    counts = [f"{count} {status}" for count, status in ((group.firing, "firing"), (group.resolved, "resolved")) if count]
    return cut(one_line(f"{group.key or 'alerts'}: {', '.join(counts)}"), TITLE_CHARACTERS)


def alert_line(alert: AlertShown) -> str:
    status = f"{alert.severity}" if alert.resolved_at is None else f"resolved ({alert.reason})" if alert.reason else "resolved"
    moment = alert.fired_at if alert.resolved_at is None else alert.resolved_at
    return cut(one_line(f"{status}: {alert.device}: {alert.text or alert.rule}"), LINE_CHARACTERS) + f" [{format_time(moment)}]"


def lines_of(group: AlertGroup, most: int, external_url: str) -> list[str]:
    shown = [alert_line(alert) for alert in group.alerts[:most]]
    hidden = group.firing + group.resolved - len(shown)
    links = [external_url] if external_url else []
    return [*shown, *([f"and {hidden:,} more"] if hidden else []), *links]


def encoded_word(text: str) -> str:
    """A header that may hold any text (RFC 2047)."""
    return text if text.isascii() else f"=?utf-8?B?{base64.b64encode(text.encode()).decode()}?="


def for_slack(text: str) -> str:
    """https://docs.slack.dev/messaging/formatting-message-text/#escaping"""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def text_of(form: str, group: AlertGroup, most: int, external_url: str) -> str:
    """Lines that people read, as many as the form takes."""
    limit = FORM_BYTES.get(form, sys.maxsize)
    while True:
        text = "\n".join(lines_of(group, most, external_url))
        shown = f"*{title_of(group)}*\n{text}" if form == "slack" else text
        shown = for_slack(shown) if form == "slack" else shown
        if most <= 1 or len(shown.encode()) <= limit:
            return shown
        most -= 1


def ntfy_message(group: AlertGroup, text: str) -> Message:
    """https://docs.ntfy.sh/publish/"""
    firing = [alert.severity for alert in group.alerts if alert.resolved_at is None]
    worst = max(firing, key=lambda severity: SEVERITIES.get(severity, 1), default="info")
    tags = f"rotating_light,{worst}" if group.firing else "white_check_mark,resolved"
    headers = {"Title": encoded_word(title_of(group)), "Priority": NTFY_PRIORITIES.get(worst, "3"), "Tags": tags}
    return Message({**headers, "Content-Type": "text/plain; charset=utf-8"}, text)


def message_of(form: str, group: AlertGroup, lines_most: int, external_url: str) -> Message:
    """What a receiver of this form is sent."""
    json_type = {"Content-Type": "application/json"}
    if form == "webhook":
        return Message(json_type, orjson.dumps(payload(group, external_url)).decode())
    if form == "alertmanager":
        return Message(json_type, orjson.dumps(posted_alerts(group, external_url)).decode())
    text = text_of(form, group, lines_most, external_url)
    if form == "ntfy":
        return ntfy_message(group, text)
    if form == "slack":
        return Message(json_type, orjson.dumps({"text": text}).decode())
    thread = hashlib.sha256(group_key(group).encode()).hexdigest()[:32]
    return Message({"Subject": title_of(group), "Thread": thread}, f"{text}\n")


def new_message_id() -> str:
    return f"msg_{secrets.token_hex(16)}"


def new_webhook_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def webhook_key(secret: str) -> bytes:
    """The bytes of a secret. Invalid."""
    found = WEBHOOK_SECRET.fullmatch(secret)
    try:
        key = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        key = b""
    if not 24 <= len(key) <= 64:
        raise Invalid("is not whsec_ and then 24 to 64 bytes in base64")
    return key


def signature_headers(keys: Iterable[str], message_id: str, moment: int, body: bytes) -> dict[str, str]:
    """By which a receiver knows who sent it, with each of the secrets; `moment` in seconds (https://www.standardwebhooks.com)."""
    signed = b"%b.%d.%b" % (message_id.encode(), moment, body)
    each = (base64.b64encode(hmac.digest(webhook_key(key), signed, hashlib.sha256)).decode() for key in keys)
    signatures = " ".join(f"v1,{signature}" for signature in each)
    return {"webhook-id": message_id, "webhook-timestamp": str(moment), **({"webhook-signature": signatures} if signatures else {})}


def address_of(host: str) -> Address | None:
    """The address that a host is, in any way in which systems read one (0x7f000001, 127.1); None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    parts = host.rstrip(".").split(".")
    if len(parts) > 4 or not all(NUMBER_OF_ADDRESS.fullmatch(part) for part in parts):
        return None
    try:
        numbers = [int(part[2:] or "0", 16) if part[:2] in ("0x", "0X") else int(part, 8 if part[0] == "0" else 10) for part in parts]
    except ValueError:  # 08
        return None
    *first, last = numbers
    if any(number > 255 for number in first) or last >= 256 ** (4 - len(first)):
        return None
    return ipaddress.IPv4Address(sum(number << 24 - 8 * place for place, number in enumerate(first)) + last)


def seen_through(address: Address) -> list[Address]:
    """An address, and the one of IPv4 to which it leads; where it is but another way to write that one, that alone."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else address.sixtofour
    return [address] if inner is None else [address, inner]


def is_never_reached(address: Address) -> bool:
    """Where no receiver can be: this link, where clouds keep their secrets; everybody; and nobody."""
    local = address.is_link_local or address.is_multicast or address.is_unspecified
    return local or address == BROADCAST or address in THIS_NETWORK


def is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_reserved
    return address in NAT64 or (address in GLOBAL_UNICAST and address.is_global)


def may_reach(address: Address, named: Networks) -> bool:
    """Whether notifications may be sent there: to public addresses, and to networks that the installation names."""
    return all(
        not is_never_reached(seen) and (is_public(seen) or any(seen in network for network in named)) for seen in seen_through(address)
    )


def addresses_of_mail(url: str, most: int) -> list[str]:
    """Invalid."""
    kind, _, listed = url.partition(":")
    found = [address.strip() for address in listed.split(",")]
    if kind.lower() != "mailto" or not all(MAIL_ADDRESS.fullmatch(address) for address in found):
        raise Invalid("is not mailto: and then addresses such as ops@example.com, separated by commas")
    if len(found) > most:
        raise Invalid(f"has more than {most} addresses")
    return found


def target_of(url: str, form: str) -> URL:
    """Where a notification is posted. Invalid."""
    try:
        target = URL(url, encoded=AS_WRITTEN.fullmatch(url) is not None)  # one that is signed is to stay as it is
        host, port = target.raw_host, target.port
    except ValueError:
        host = port = None
    if not url.isprintable() or not host or not port or target.scheme not in ("http", "https") or ("%" in host and ":" not in host):
        raise Invalid("is not an address that begins with http:// or https://")
    if form == "alertmanager" and not target.path.endswith("/api/v2/alerts"):
        target = target.with_path(f"{target.path.rstrip('/')}/api/v2/alerts")
    return target.with_fragment(None)


def shown_url(url: str, form: str) -> str:
    """An address without what may be a secret in it: for most receivers whoever knows the path may write to them."""
    if form == "email":
        return url
    target = URL(url).with_user(None)
    return f"{target.origin()}{'/…' if target.path_qs != '/' else '/'}"


def check_webhook_secret(secret: str | None) -> None:
    """Refusal: invalid."""
    try:
        if secret is not None:
            webhook_key(secret)
    except Invalid as error:
        raise Refusal("invalid", FieldError("secret", str(error))) from error


def check_webhook(new: NewWebhook, named: Networks, limits: Limits, *, mail: bool) -> None:
    """What can be known of a receiver before anything is sent to it; `mail`: whether there is a server for mail. Refusal: invalid."""

    def refuse(field: str, text: str) -> NoReturn:
        raise Refusal("invalid", FieldError(field, text))

    try:
        if new.form == "email":
            addresses_of_mail(new.url, limits.mail_addresses)
        else:
            literal = address_of(target_of(new.url, new.form).raw_host or "")
            if literal is not None and not may_reach(literal, named):
                refuse("url", "is in a network that may not be reached (--webhook-networks)")
    except Invalid as error:
        refuse("url", str(error))
    if new.form == "email" and not mail:
        refuse("form", "needs a server for mail (--smtp-url and --smtp-from)")
    if not new.match:
        refuse("match", "is empty; * is every device")
    if not new.interval:
        refuse("interval", "is not above 0")
    if new.repeat < limits.repeat_seconds_least * 1000:
        refuse("repeat", f"is shorter than {limits.repeat_seconds_least:g} s")
    if new.secret is not None and new.form != "webhook":
        refuse("secret", f"is not for {new.form}")
    check_webhook_secret(new.secret)


def duration_text(milliseconds: int) -> str:
    """A duration as `parse_duration` reads it, in the largest unit that fits."""
    if not milliseconds:
        return "0s"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if milliseconds % UNITS[unit] == 0)
    return f"{milliseconds // UNITS[unit]}{unit}"


def shown_webhook(new: NewWebhook) -> dict[str, Any]:
    """What people are shown of a receiver."""
    spans = {name: duration_text(getattr(new, name)) for name in ("wait", "interval", "repeat")}
    fields = {name: getattr(new, name) for name in ("form", "match", "severity", "rule", "group_by")}
    return {"name": new.name, "url": shown_url(new.url, new.form), **fields, **spans}


@attrs.frozen
class Attempt:
    """What came of one try to deliver: `error` None where it was taken; `final`: another try is of no use; `unwanted`: it is the content
    that is not taken. In seconds, for how long the receiver wants to be left alone."""

    error: str | None = None
    status: int | None = None
    final: bool = False
    unwanted: bool = False
    retry_after: float | None = None


def seconds_of(retry_after: str, now: float) -> float | None:
    """Retry-After: a number of seconds or a date (RFC 9110, section 10.2.3); None where it is neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:10])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def judged_answer(status: int, retry_after: str | None, now: float) -> Attempt:
    """What an answer means. As Standard Webhooks has it, whatever is not 2xx is tried again, but for 410: the receiver wants no more."""
    if 200 <= status < 300:
        return Attempt(None, status)
    asked = None if retry_after is None else seconds_of(retry_after, now)
    if 300 <= status < 400:
        return Attempt(f"it answered {status}, and redirects are not followed", status)
    if status == 410:
        return Attempt("it answered 410: there is no such receiver any more", status, final=True)
    return Attempt(f"it answered {status}", status, unwanted=status in (400, 413, 422), retry_after=asked)


def seconds_to_wait(tries: int, asked: float | None, limits: Limits) -> float:
    """For how long to wait after so many tries, of which each was in vain."""
    usual = min(limits.redelivery_seconds * 2.0 ** min(tries - 1, 30), limits.redelivery_seconds_most)
    return max(usual, min(asked or 0.0, limits.retry_after_seconds_most))


def is_given_up(attempt: Attempt, tries: int, seconds: float, limits: Limits) -> bool:
    """Whether a notification is sent no more, after so many tries; the next one would be when it is so many seconds old."""
    old = seconds > limits.given_up_seconds and tries >= limits.given_up_tries
    return attempt.error is not None and (attempt.final or old or (attempt.unwanted and tries >= limits.unwanted_tries))


def mail_of(message: Message, recipients: list[str], sender: str, message_id: str, at: int) -> EmailMessage:
    """A text for people. The library refuses whatever would be more than one header."""
    mail = EmailMessage(policy=SMTP)
    mail["From"], mail["To"] = sender, ", ".join(recipients)
    mail["Subject"] = one_line(message.headers["Subject"])
    mail["Date"] = format_datetime(datetime.fromtimestamp(at / 1000, UTC))
    domain = sender.rpartition("@")[2]
    mail["Message-ID"] = f"<{message_id}@{domain}>"
    mail["In-Reply-To"] = mail["References"] = f"<{message.headers['Thread']}@{domain}>"  # programs show those of a group together
    mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody answers that they are on holiday
    mail.set_content(message.body, cte="quoted-printable")
    return mail


# ==== Syslog messages ====
# Owns: what a syslog message says (RFC 5424, RFC 3164 and what is sent under its name), where messages end in a stream (RFC 6587),
# and the token among them. Must not know: asyncio, SQL, sockets.

DateParts = tuple[int, int, int, int, int, int]  # month, day, hour, minute, second, microsecond
Parameters = NewType("Parameters", dict[str, str | list[str]])  # a repeated name has a list
Elements = NewType("Elements", dict[str, Parameters])

# RFC 5424, section 6.2.1, numbers 0 to 7; emergency and alert have no level of their own.
SEVERITY_LEVELS: Final = ("critical", "critical", "critical", "error", "warning", "notice", "info", "debug")
PRIORITY: Final = re.compile(r" *+<([0-9]{1,3})> *+")
# Version, time, host, app name, process id, message id. A time is - or begins with a date, else any text after a 1 would be a head.
HEADER: Final = re.compile(r"1 (-|[0-9]{4}-[0-9]{2}-[0-9]{2}\S*) (\S+) (\S+) (\S+) (\S+)(?: |$)")
# Within quotation marks ] may stand as it is, though RFC 5424, section 6.3.3, wants it escaped: the marks tell where the value ends.
ELEMENT: Final = re.compile(r'\[([^\s="\]]++)((?: ++[^\s="\]]++="(?:[^"\\]++|\\.)*+")*+) *+\]', re.DOTALL)
PARAMETER: Final = re.compile(r'([^\s="\]]++)="((?:[^"\\]++|\\.)*+)"', re.DOTALL)
ESCAPED: Final = re.compile(r'\\(["\\\]])')
REGISTERED_ELEMENTS: Final = ("timeQuality", "origin", "meta")  # RFC 5424, section 7: any other name has an @
OWN_ELEMENT: Final = "iiot@32473"
OWN_TOKEN: Final = re.compile(r"iiot_log_[0-9a-f]{16}_[A-Za-z0-9_-]{43}")
FIRST_WORD: Final = re.compile(rf"\s*+({OWN_TOKEN.pattern}):?(?:\s++|$)")
REPEAT_ID: Final = re.compile(r"[0-9A-Fa-f]{8}(-?)[0-9A-Fa-f]{4}\1[0-9A-Fa-f]{4}\1[0-9A-Fa-f]{4}\1[0-9A-Fa-f]{12}")

MONTH_NAMES: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MONTHS: Final = MappingProxyType({name: number for number, name in enumerate(MONTH_NAMES, 1)})
# Hours ahead of UTC. RFC 5322, section 4.3, fixes those of North America. Others may mean several zones.
ZONE_HOURS: Final = MappingProxyType(
    {"UTC": 0, "GMT": 0, "WET": 0, "WEST": 1, "CET": 1, "CEST": 2, "EET": 2, "EEST": 3, "MSK": 3, "JST": 9, "AEST": 10, "AEDT": 11}
    | {"EST": -5, "EDT": -4, "CST": -6, "CDT": -5, "MST": -7, "MDT": -6, "PST": -8, "PDT": -7}
)
ZONES: Final = MappingProxyType({name: timezone(timedelta(hours=hours)) for name, hours in ZONE_HOURS.items()})
HALF_YEAR: Final = 182 * DAY
# What stands before the time: a version (RFC 3164 with the 1 of RFC 5424), or Cisco's numbers and name (`12: 34: switch: `), and a
# mark of Cisco's for a clock that is not set. A name of a zone is one only where a colon follows, and an unknown one only before
# Cisco's %: in `CRON: x` it is who sends.
STAMP: Final = re.compile(
    r"(?:1 |([0-9]{1,10}): (?:([0-9]{1,10}): )?(?:([\w./-]{1,255}): ?)?|: ?)?([*.])?"
    rf"((?:([0-9]{{4}}) )?({'|'.join(MONTH_NAMES)}) {{1,2}}([0-9]{{1,2}}) (?:([0-9]{{4}}) )?"
    r"([0-9]{2}):([0-9]{2}):([0-9]{2})(?:[.,]([0-9]{1,9}))?(?: ((?:19|20)[0-9]{2})(?= |: ))?"
    rf"(?: ({'|'.join(sorted(ZONE_HOURS))})(?=:)| ([A-Z]{{2,5}})(?=: [*.]?%))?"
    # RFC 3339 as rsyslogd and syslog-ng write it, without a zone, with spaces, and as Sophos writes it (2019:11:06-00:08:03)
    r"|([0-9]{4}[:-][0-9]{2}[:-][0-9]{2})[T -]([0-9]{2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]{1,9})?)(?: ?(Z|[+-][0-9]{2}:?[0-9]{2}))?)"
    r"(?:(:)| |$) *+"
)
# The first word after the time is the host, unless it ends as a tag does, or is the word of syslogd itself. An address that ends
# in :: is a host. A % begins Cisco's name of a message, which engineers read and search as part of the text.
HOST: Final = re.compile(r"(?!last message repeated )((?:::)?+[\w.][\w.:%/@-]{0,254})(?: :)? ++(?=\S)")
TAG: Final = re.compile(
    r"(?![0-9]+:|(?:[0-9A-Fa-f]{1,4}:)*:[0-9A-Fa-f:.]*(?:%\S*)? )([\w./(][\w./()+@#:%~-]{0,127})(?:\[([^\s\[\]]{0,128})\]:?|:(?=\s|$)) ?"
)

RELP_HEAD: Final = re.compile(rb"([0-9]{1,9}) ([A-Za-z]{1,32}) ([0-9]{1,9})([ \n])")
RELP_HEAD_BYTES: Final = 53  # of the longest head
TRAILERS: Final = b"\r\n\0"
LINE_END: Final = re.compile(rb"[\n\0]")
# What a stream that counts goes on with after a wrong count: the next count before a priority.
LINE_END_OR_COUNT: Final = re.compile(rb"[\n\0]|(?=[1-9][0-9]{0,4} <[0-9]{1,3}>)")
COUNT_BYTES: Final = 16  # room for a count and a priority, and what a search has to look at again
# Ten megabytes: no sender has such messages. A count of more digits is text, or one wrong count would mute a connection for hours.
OCTET_COUNT: Final = re.compile(rb"([1-9][0-9]{0,6})(?![0-9])( ?)(<?)")


@attrs.frozen
class SyslogMessage:
    """What a message says. `time` is the sender's, in milliseconds, None if there is none or it cannot be right; `time_as_sent` its
    text where that is all there is of it, or its zone is not known. `token` and `repeat_id` are cut out of all the rest."""

    message: str
    priority: int | None = None
    time: int | None = None
    time_as_sent: str | None = None
    host: str | None = None
    app_name: str | None = None
    process_id: str | None = None
    message_id: str | None = None
    structured_data: Elements = attrs.field(factory=lambda: Elements({}))
    token: str | None = None
    repeat_id: str | None = None

    @property
    def facility(self) -> int | None:
        return None if self.priority is None else self.priority >> 3

    @property
    def severity(self) -> int | None:
        return None if self.priority is None else self.priority & 7

    @property
    def level(self) -> str:
        """One of debug, info, notice, warning, error, critical. Without a priority it is notice (RFC 3164, section 4.3.3)."""
        return "notice" if self.priority is None else SEVERITY_LEVELS[self.priority & 7]


@attrs.frozen
class SyslogFrame:
    """One message of a stream, without its frame. It was longer than it may be and is `cut`, or the stream ended within it: `torn`."""

    data: bytes
    cut: bool = False
    torn: bool = False


def decoded(data: bytes) -> str:
    r"""The text of bytes that should be UTF-8. A byte that is not, and a zero, which SQLite's JSON cannot hold, become four characters,
    as in `\xfc` and `\x00`: it is seen which they were. Other control characters stay."""
    text = data.decode(errors="backslashreplace")
    return text.replace("\0", r"\x00") if "\0" in text else text


def add_parameter(parameters: Parameters, name: str, value: str) -> None:
    there = parameters.get(name)
    if there is None:
        parameters[name] = value
    elif isinstance(there, list):
        there.append(value)
    else:
        parameters[name] = [there, value]


def values_of(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def parse_elements(text: str, start: int) -> tuple[Elements, int]:
    """The structured data that begins at `start` (RFC 5424, section 6.3), and where it ends. An element without parameters is one if
    its name is that of one and it stands apart: `[7]:` and `[error] x` are text. So is what is not well-formed."""
    elements = Elements({})
    while (found := ELEMENT.match(text, start)) is not None:
        name, inner = found.groups()
        if not inner and not (("@" in name or name in REGISTERED_ELEMENTS) and text[found.end() : found.end() + 1] in ("", " ", "[")):
            break
        parameters = elements.setdefault(name, Parameters({}))
        for parameter, value in PARAMETER.findall(inner):
            # A backslash before any other character is itself (RFC 5424, section 6.3.3).
            add_parameter(parameters, parameter, ESCAPED.sub(r"\1", value) if "\\" in value else value)
        start = found.end()
    return elements, start


def moment_of(time: datetime) -> int | None:
    """Milliseconds; a time without a zone is one of the machine's. None where no clock can show it."""
    try:
        return round(time.timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        return None


def iso_moment(text: str, zone: tzinfo | None) -> int | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment_of(time if time.tzinfo else time.replace(tzinfo=zone))


def dated_moment(year: int, parts: DateParts, zone: tzinfo | None) -> int | None:
    try:
        time = datetime(year, *parts, tzinfo=zone)
    except ValueError:
        return None
    return moment_of(time)


def yearless_moment(parts: DateParts, received_at: int, zone: tzinfo | None) -> int | None:
    """A date in the year that puts it nearest to the time of receipt: RFC 3164 has no year."""
    year, nearest = datetime.fromtimestamp(received_at / 1000, zone).year, None
    for candidate in (year, year - 1, year + 1):
        moment = dated_moment(candidate, parts, zone)
        if moment is not None and (nearest is None or abs(moment - received_at) < abs(nearest - received_at)):
            nearest = moment
        if nearest is not None and abs(nearest - received_at) < HALF_YEAR:
            break
    return nearest


def usable(moment: int | None, received_at: int) -> int | None:
    """The moment, if it can be right: within the bounds that a device's times have."""
    return moment if moment is not None and EARLIEST <= moment <= received_at + DAY else None


def parse_header(text: str, start: int, priority: int | None, received_at: int, zone: tzinfo | None) -> SyslogMessage | None:
    """A message of RFC 5424 from its version on. Structured data may be left out, and the space before the text."""
    found = HEADER.match(text, start)
    if found is None:
        return None
    stamp, *fields = found.groups()
    elements, end = parse_elements(text, found.end())
    if not elements:
        if text.startswith("-", end) and text[end + 1 : end + 2] in ("", " ", "\ufeff"):
            end += 1
        elif fields[1].endswith(":"):
            return None  # a tag: this is RFC 3164 with a version before it, and the words after the tag are text
    end += text.startswith(" ", end)
    time = None if stamp == "-" else usable(iso_moment(stamp, zone), received_at)
    host, app_name, process_id, message_id = [None if field == "-" else field for field in fields]
    return SyslogMessage(
        text[end:].removeprefix("\ufeff"),  # RFC 5424, section 6.4
        priority=priority,
        time=time,
        time_as_sent=stamp if time is None and stamp != "-" else None,
        host=host,
        app_name=app_name,
        process_id=process_id,
        message_id=message_id,
        structured_data=elements,
    )


def stamp_moment(groups: tuple[str | Any, ...], received_at: int, zone: tzinfo | None) -> int | None:
    """What the time of a `STAMP` means, by its groups."""
    year, month, day, later, hour, minute, second, fraction, last, name, _, date, clock, offset = groups
    if date is not None:
        return iso_moment(f"{date.replace(':', '-')}T{clock}{offset or ''}", zone)
    microsecond = int(fraction[:6].ljust(6, "0")) if fraction else 0
    parts = MONTHS[month], int(day), int(hour), int(minute), int(second), microsecond
    zone = ZONES[name] if name else zone
    given = year or later or last
    return dated_moment(int(given), parts, zone) if given else yearless_moment(parts, received_at, zone)


def parse_stamped(text: str, start: int, priority: int | None, received_at: int, zone: tzinfo | None) -> SyslogMessage | None:
    """A message that begins with a time: RFC 3164, section 4.1, and what Cisco's devices send. What stands before the time is kept
    under the names of RFC 5424, section 7: Cisco's numbers as `sequenceId`, its mark of a clock that is not set as `isSynced`."""
    found = STAMP.match(text, start)
    if found is None:
        return None
    groups = found.groups()
    number, second_number, origin, mark, stamp = groups[:5]
    host, end, elements = origin, found.end(), Elements({})
    if number:
        elements["meta"] = Parameters({"sequenceId": [number, second_number] if second_number else number})
    if mark:
        elements["timeQuality"] = Parameters({"isSynced": "0"})
    tag = TAG.match(text, end)
    # After a time that ends with a colon no host comes.
    if tag is None and origin is None and groups[19] is None and (word := HOST.match(text, end)) is not None:
        host, end = word[1], word.end()
        tag = TAG.match(text, end)
    time = usable(stamp_moment(groups[5:19], received_at, zone), received_at)
    return SyslogMessage(
        text[end if tag is None else tag.end() :].removeprefix("\ufeff"),
        priority=priority,
        time=time,
        time_as_sent=stamp if time is None or groups[15] else None,
        host=host,
        app_name=tag and tag[1],
        process_id=(tag and tag[2]) or None,
        structured_data=elements,
    )


def parse_bare(text: str, start: int, priority: int | None) -> SyslogMessage:
    """A message without a time: text, for whether its first word is a host cannot be told. Only `name[123]: ` is certain."""
    tag = TAG.match(text, start) if start else None
    if tag is None or not (tag[2] or "").isdecimal():
        return SyslogMessage(text[start:].removeprefix("\ufeff"), priority)
    return SyslogMessage(text[tag.end() :], priority, app_name=tag[1], process_id=tag[2])


def take_own(elements: Elements, text: str) -> tuple[list[Parameters], str]:
    """Our elements out of structured data, and out of the start of the text, for RFC 3164 knows no structured data; and the text left."""
    found = [elements.pop(OWN_ELEMENT)] if OWN_ELEMENT in elements else []
    while text.startswith(f"[{OWN_ELEMENT} ") and (element := ELEMENT.match(text)) is not None:
        found.append(parse_elements(element[0], 0)[0][OWN_ELEMENT])
        text = text[element.end() :].removeprefix(" ")
    return found, text


def take_first_words(text: str) -> tuple[list[str], str]:
    """The tokens in front of the text, and the text left."""
    tokens = []
    while (first := FIRST_WORD.match(text)) is not None:
        tokens.append(first[1])
        text = text[first.end() :]
    return tokens, text


def take_repeat_ids(own: Parameters) -> list[str]:
    numbers = values_of(own.get("id", []))
    if not all(map(REPEAT_ID.fullmatch, numbers)):
        return []
    own.pop("id", None)
    return [number.replace("-", "").lower() for number in numbers]


def redacted_elements(elements: Elements) -> Elements:
    shown = Elements({})
    for name, parameters in elements.items():
        kept = shown.setdefault(redacted(name), Parameters({}))
        for parameter, value in parameters.items():
            for one in values_of(value):
                add_parameter(kept, redacted(parameter), redacted(one))
    return shown


def without_secrets(message: SyslogMessage, mentions: int) -> SyslogMessage:
    """The message with the sender's token, if it shows one, in `token`, and its number in `repeat_id`, and with no token in anything
    else. A token counts in structured data as `[iiot@32473 token="…"]`, and as the first word; the first one counts. Our parameter
    `token` goes whatever it holds, for that may be a token mistyped. Of tokens elsewhere, of any kind, the id stays, as in the log.
    `mentions` is how often `iiot_` stands in the whole: when so many tokens were taken, the rest need not be searched."""
    elements = Elements(dict(message.structured_data))
    owned, text = take_own(elements, message.message)
    tokens = [token for own in owned for token in values_of(own.pop("token", [])) if OWN_TOKEN.fullmatch(token)]
    numbers = [number for own in owned for number in take_repeat_ids(own)]
    for parameters in owned:
        for name, value in parameters.items():
            for one in values_of(value):
                add_parameter(elements.setdefault(OWN_ELEMENT, Parameters({})), name, one)
    first_words, text = take_first_words(text)
    head = {name: getattr(message, name) for name in ("time_as_sent", "host", "app_name", "process_id", "message_id")}
    if mentions > len(tokens) + len(first_words):
        # Where only a time stands before the token, a host or a tag was looked for there.
        in_head = [value for value in head.values() if value is not None and OWN_TOKEN.fullmatch(value)]
        head = {name: None if value is None or value in in_head else redacted(value) for name, value in head.items()}
        first_words = in_head + first_words
        text, elements = redacted(text), redacted_elements(elements)
    return SyslogMessage(
        text,
        message.priority,
        message.time,
        **head,
        structured_data=elements,
        token=next(iter(tokens + first_words), None),
        repeat_id=next(iter(numbers), None),
    )


def parse_syslog(data: bytes, received_at: int, zone: tzinfo | None = None) -> SyslogMessage:
    """What a sender says in one message, whatever the bytes: nothing raises. A time without a zone is one of `zone`, None is that of
    the machine. Without a priority of 0 to 191 (RFC 5424, section 6.2.1; leading zeros count for nothing) all is text, unless it
    begins with a time. Ends of lines and zeros at the end, and a byte order mark before the head or the text, are no part of it."""
    text = decoded(data.rstrip(TRAILERS)).removeprefix("\ufeff")
    found = PRIORITY.match(text)
    priority, start = (int(found[1]), found.end()) if found is not None and int(found[1]) < 192 else (None, 0)
    message = parse_header(text, start, priority, received_at, zone) if start else None
    message = message or parse_stamped(text, start, priority, received_at, zone) or parse_bare(text, start, priority)
    return without_secrets(message, text.count("iiot_")) if "iiot" in text else message


def cut_frame(data: bytes, most: int, *, torn: bool = False) -> SyslogFrame:
    """A message cut to `most` bytes, not within a character of UTF-8: one of a datagram, or of a stream."""
    if len(data) <= most:
        return SyslogFrame(data, torn=torn)
    end = next((at for at in range(most, max(most - 4, 0), -1) if data[at] & 0xC0 != 0x80), most)
    return SyslogFrame(data[:end], cut=True, torn=torn)


@attrs.frozen
class RelpFrame:
    """A frame of RELP: its transaction, its command, and its data."""

    number: bytes
    command: bytes
    data: bytes
    cut: bool = False


class RelpFraming:
    """Frames of RELP in a stream: number, command, length and data, each after a space, and a line feed
    (https://www.rsyslog.com/doc/relp.html). Of data longer than `most` bytes the rest is skipped."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = b""
        self._skip = 0  # bytes of data, and the line feed, that are still to be skipped
        self._cut: RelpFrame | None = None  # the frame of which that is the rest

    def feed(self, data: bytes) -> list[RelpFrame]:
        """The frames that are complete with these bytes. Invalid, if it is something else."""
        frames: list[RelpFrame] = []
        self._held += data
        while self._next(frames):
            pass
        return frames

    def _next(self, frames: list[RelpFrame]) -> bool:
        """Take a frame, or a part of a long one, from what is held; whether there was one."""
        if self._cut is not None:
            skipped = min(self._skip, len(self._held))
            self._held, self._skip = self._held[skipped:], self._skip - skipped
            if not self._skip:
                frames.append(self._cut)
                self._cut = None
            return not self._skip
        head = RELP_HEAD.match(self._held)
        if head is None:
            if len(self._held) > RELP_HEAD_BYTES:
                raise Invalid("is no frame of RELP")
            return False
        number, command, size = head[1], head[2], int(head[3])
        if head[4] == b"\n":
            frames.append(RelpFrame(number, command, b""))
            self._held = self._held[head.end() :]
        elif size > self._most and len(self._held) - head.end() >= self._most:
            self._cut = RelpFrame(number, command, self._held[head.end() : head.end() + self._most], cut=True)
            self._held, self._skip = self._held[head.end() + self._most :], size - self._most + 1
        elif size <= self._most and len(self._held) > head.end() + size:
            frames.append(RelpFrame(number, command, self._held[head.end() : head.end() + size]))
            self._held = self._held[head.end() + size + 1 :]
        else:
            return False
        return True


class SyslogFraming:
    """Where messages end in a stream (RFC 6587, section 3.4), decided message by message. Digits, a space and < begin an octet count;
    once a stream has counted, digits and a space do. Anything else is a line, and ends with LF, CR LF or NUL.

    What is longer than `most` bytes is cut there, and its rest skipped: by the count, unread, or to the end of the line. Where a count
    was wrong, what is left in front of the next count is a line. However little is fed at a time, the same messages come out, and no
    more is held than `most` bytes and a few."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = b""
        self._skip = 0  # bytes of a counted message that are still to be skipped
        self._searched = 0  # so much of what is held has no end of line in it
        self._overlong: re.Pattern[bytes] | None = None  # the end of the line of which the rest is skipped
        self._counted = False  # whether the last message with a priority was counted

    def feed(self, data: bytes) -> list[SyslogFrame]:
        """The messages that are complete with these bytes; empty ones are none."""
        frames: list[SyslogFrame] = []
        held, at = self._held + data, 0
        while (after := self._next(held, at, frames)) is not None:
            at = after
        self._held = held[at:]
        return frames

    def end(self) -> list[SyslogFrame]:
        """What there is of a message at the end of the stream. A line without its end is taken for torn: it cannot be told."""
        held, self._held = self._held, b""
        if self._skip or self._overlong:
            return []
        count = OCTET_COUNT.match(held)
        if count is not None and self._is_count(count):
            held = held[count.start(3) :]
        held = held.strip(TRAILERS)
        return [cut_frame(held, self._most, torn=True)] if held.strip() else []

    def _is_count(self, found: re.Match[bytes]) -> bool:
        return bool(found[3] or (found[2] and self._counted))

    def _next(self, held: bytes, at: int, frames: list[SyslogFrame]) -> int | None:
        """Take one message, or what is skipped, at `at`: where the next begins, None when that has not come yet."""
        if at >= len(held):
            return None
        if self._skip:
            skipped = min(self._skip, len(held) - at)
            self._skip -= skipped
            return at + skipped
        if self._overlong is not None:
            return self._skip_line(held, at, self._overlong)
        if held[at] in TRAILERS:
            return at + 1
        count = OCTET_COUNT.match(held, at) if not self._searched else None
        if count is None:
            return self._line(held, at, frames)
        if self._is_count(count):
            return self._counted_message(held, count, frames)
        return None if count.end() == len(held) else self._line(held, at, frames)

    def _counted_message(self, held: bytes, count: re.Match[bytes], frames: list[SyslogFrame]) -> int | None:
        length, start = int(count[1]), count.start(3)
        end = start + min(length, self._most + 1)
        if len(held) < end:
            return None
        self._counted = True
        self._skip = start + length - end
        self._add(held[start:end], frames)
        return end

    def _line(self, held: bytes, at: int, frames: list[SyslogFrame]) -> int | None:
        pattern = LINE_END_OR_COUNT if self._counted else LINE_END
        found = pattern.search(held, at + self._searched)
        if found is None and len(held) - at <= self._most + COUNT_BYTES:
            self._searched = max(0, len(held) - at - COUNT_BYTES)
            return None
        self._searched = 0
        if found is None:
            self._add(held[at : at + self._most + COUNT_BYTES], frames)
            self._overlong = pattern
            return at + self._most
        self._add(held[at : found.start()], frames)
        if held[at : at + 1] == b"<" and found[0]:
            self._counted = False
        return found.end()

    def _skip_line(self, held: bytes, at: int, pattern: re.Pattern[bytes]) -> int | None:
        found = pattern.search(held, at)
        if found is not None:
            self._overlong = None
            return found.end()
        rest = max(at, len(held) - COUNT_BYTES)
        return rest if rest > at else None

    def _add(self, data: bytes, frames: list[SyslogFrame]) -> None:
        data = data.rstrip(TRAILERS)
        if data.strip():
            frames.append(cut_frame(data, self._most))


# ==== Allowances ====
# Owns: how much of the server a tenant, a token, a device or a network may use, and who goes on next. Must not know: HTTP, sockets,
# SQL.


class Buckets:
    """Counts by key, each as water in a bucket that holds `most` and runs out in `seconds`. The last so many keys are remembered.
    With `strict`, what does not fit keeps the bucket full; without, it changes nothing."""

    def __init__(self, most: int, seconds: float, keys_most: int, *, strict: bool = False) -> None:
        self.most = most
        self._a_second = most / seconds
        self._keys_most = keys_most
        self._strict = strict
        self._levels: dict[str, tuple[float, float]] = {}  # how full, and when; the last one that was counted stands last

    def add(self, key: str) -> float:
        """Count one: 0 when it fits, else in how many seconds there is room for it."""
        before = self._level(key)
        fits = before + 1 <= self.most
        self._keep(key, before + 1 if fits else float(self.most) if self._strict else before)
        return 0.0 if fits else (before + 1 - self.most) / self._a_second

    def pour(self, key: str, amount: int) -> None:
        """Count so many, whether they fit or not."""
        self._keep(key, self._level(key) + amount)

    def rest(self, key: str, most: float | None = None) -> float:
        """In how many seconds there is room again, where there is none; `most`: of another bucket, which runs out as fast."""
        over = self._level(key) - (self.most if most is None else most)
        return 0.0 if over < 0 else (over + 1) / self._a_second

    def _level(self, key: str) -> float:
        level, at = self._levels.get(key, (0.0, 0.0))
        return max(0.0, level - (time.monotonic() - at) * self._a_second)

    def _keep(self, key: str, level: float) -> None:
        self._levels.pop(key, None)
        self._levels[key] = level, time.monotonic()
        if len(self._levels) > self._keys_most:
            del self._levels[next(iter(self._levels))]


class Guesses:
    """Wrong tokens and keys, counted by the network they come from. Right ones never get here, so that nobody can lock out a
    neighbour behind the same address."""

    def __init__(self, limits: Limits) -> None:
        self._networks = Buckets(limits.guesses, 60.0, limits.guessing_networks)

    def wrong(self, address: str) -> Refusal:
        """Count one, and say how it is to be answered: unauthorized, or too_many_attempts."""
        wait = self._networks.add(network_of(address))
        return Refusal("too_many_attempts", retry_after=math.ceil(wait)) if wait else Refusal("unauthorized")


@attrs.define
class DailyQuota:
    """What may be stored of something in a day (UTC, `day` since 1970-01-01), and what of it was."""

    most: int
    day: int = 0
    used: int = 0

    def add(self, now: int, count: int) -> None:
        """What goes over the quota is still stored: after it the server reads no more. Another day is a new count, an earlier one
        too: the clock may have been wrong."""
        if now // DAY != self.day:
            self.used, self.day = 0, now // DAY
        self.used += count

    @property
    def used_up(self) -> bool:
        return self.used >= self.most

    def rest(self, now: int, more: int = 0) -> float:
        """Seconds until something may be stored again; 0 when it may. `more`: that it may have beyond the quota."""
        self.add(now, 0)
        return 0.0 if self.used < self.most + more else ((self.day + 1) * DAY - now) / 1000


@attrs.define(eq=False)
class TenantUse:
    """What a tenant uses of its quotas, counted as it happens."""

    tenant_id: int
    connections_most: int
    points: DailyQuota
    log_bytes: DailyQuota
    connections: int = 0


class LogFlow:
    """What a device may log: of its tenant's quota of the day, and in a second. It is told when that is used up. A twentieth more is
    taken of what it had sent by then, for everything that it sends comes in one order: its readings would wait behind its lines."""

    __slots__ = ("_buckets", "_key", "_quota")

    def __init__(self, quota: DailyQuota, buckets: Buckets, device_id: str) -> None:
        self._quota = quota
        self._buckets = buckets
        self._key = device_id

    def add(self, now: int, count: int) -> None:
        self._quota.add(now, count)
        self._buckets.pour(self._key, count)

    def used_up(self, now: int) -> Throttled | None:
        """Something is: the device is told."""
        return self._look(self._quota.rest(now), self._buckets.rest(self._key))

    def wholly_used_up(self, now: int) -> Throttled | None:
        """The rest of it is, too: no more is taken."""
        quota, most = self._quota, self._buckets.most
        return self._look(quota.rest(now, quota.most // 20), self._buckets.rest(self._key, most * 1.05))

    @staticmethod
    def _look(of_day: float, of_rate: float) -> Throttled | None:
        if of_day:
            return Throttled("log_bytes_per_day", of_day)
        return Throttled("log_bytes_per_second", of_rate) if of_rate else None


def for_seconds(seconds: float) -> Callable[[], float]:
    """The patience of whoever waits for so long and no longer."""
    until = time.monotonic() + seconds
    return lambda: until - time.monotonic()


async def wait_patiently(what: asyncio.Future[Any], patience: Callable[[], float]) -> None:
    """Until it is done. TimeoutError, when there is no patience any more; it may come back while something waits."""
    try:
        while not what.done():
            if (seconds := patience()) <= 0:
                raise TimeoutError
            await asyncio.wait((what,), timeout=seconds)
    finally:
        what.cancel()


@attrs.define
class Pace:
    """What each tenant may have at the moment: of the weight of a transaction, and turns in a round of the event loop; and the shares
    that were used since the last transaction began."""

    each: int
    turns: int
    used: list[Any] = attrs.field(factory=list)


class Sender(Protocol):
    """Who sends more than is taken at once."""

    def hold(self) -> None:
        """Nothing more of it is read."""

    def go_on(self) -> None:
        """It is read again."""


class Backlog:
    """What senders have sent and the server has not taken yet, all of a tenant's together: frames of all its devices at one time would
    fill the memory. Beyond so many bytes only the first goes on, until what it sent is taken; the others wait in their order."""

    __slots__ = ("_bytes", "_held", "_most", "_sizes")

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._sizes: dict[Sender, int] = {}
        self._held: dict[Sender, None] = {}

    def received(self, sender: Sender, size: int) -> None:
        """So many bytes of a sender are not taken yet."""
        self._bytes += size - self._sizes.get(sender, 0)
        self._sizes[sender] = size
        if self._bytes > self._most and sender not in self._held and sender is not next(iter(self._sizes)):
            self._held[sender] = None
            sender.hold()

    def taken(self, sender: Sender) -> None:
        """What a sender sent is taken, or nobody wants it any more: another one may go on."""
        self._bytes -= self._sizes.pop(sender, 0)
        self._let_go_on(sender)
        first = next(iter(self._sizes), None)
        if first in self._held or self._bytes >= self._most:
            self._let_go_on(first)
        else:
            self._let_go_on(next(iter(self._held), None))

    def _let_go_on(self, sender: Sender | None) -> None:
        if sender in self._held:
            del self._held[sender]
            sender.go_on()


class Share:
    """A tenant's part of the time of all: of the event loop, in which its work takes turns, and of what the next transaction stores.
    Work that is short needs no turn. Longer work takes one for each of its parts, and where others of the tenant wait it stands
    last among them: in each round of the event loop one of them goes on. What is to be stored waits apart from what is not: when
    nothing more can be stored, it alone must wait."""

    __slots__ = (
        "_asked", "_asking", "_last", "_pace", "_storing", "_taken", "backlog", "long_work", "used", "waiting_pushes", "webhook_tests",
        "weight",
    )  # fmt: skip

    def __init__(self, pace: Pace, backlog: Backlog) -> None:
        self._pace = pace
        self.backlog = backlog
        self._storing: deque[asyncio.Future[None]] = deque()
        self._asking: deque[asyncio.Future[None]] = deque()
        self._asked = False  # whether the last turn was of one that stores nothing
        self._taken = 0  # turns, in this round
        self.weight = 0  # of what it has in the next transaction
        self._last = 0  # of what was added last
        self.used = False  # since the last transaction began
        self.waiting_pushes = 0
        self.webhook_tests = 0  # that are under way
        self.long_work = asyncio.Lock()  # what is long, and holds much memory, is done one after the other

    @property
    def full(self) -> bool:
        """Whether the next transaction takes no more of it, if what comes is like what came last. One thing it always takes."""
        return self.weight > 0 and self.weight + self._last > self._pace.each

    @property
    def crowded(self) -> bool:
        """Whether short work must wait, too: half of the next transaction is kept for those who wait."""
        return self.full or (bool(self._storing) and 2 * self.weight >= self._pace.each)

    @property
    def asking(self) -> int:
        """How many wait that store nothing."""
        return len(self._asking)

    def add(self, weight: int) -> None:
        """Something goes to the next transaction."""
        self.weight += weight
        self._last = weight
        self._use()

    async def turn(self, patience: Callable[[], float], *, storing: bool = True) -> None:
        """Until it is the turn of whoever calls, and, if that is to store something, the next transaction takes more of the tenant.
        `patience`: for how many seconds more. TimeoutError."""
        self._use()
        waiting = self._storing if storing else self._asking
        if self._taken < self._pace.turns and not waiting and not (storing and self.full):
            self._count()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        await wait_patiently(turn, patience)
        while storing and self.full:  # by another one of this round
            turn = asyncio.get_running_loop().create_future()
            waiting.appendleft(turn)
            await wait_patiently(turn, patience)

    def go_on(self) -> None:
        """Let the next go on, if they may: of both kinds in turn."""
        while self._taken < self._pace.turns:
            stores = bool(self._storing) and not self.full and (self._asked or not self._asking)
            if not (stores or self._asking):
                return
            self._asked = not stores
            turn = (self._storing if stores else self._asking).popleft()
            if not turn.done():  # or who waited has given up
                turn.set_result(None)
                self._count()

    def _use(self) -> None:
        if not self.used:
            self.used = True
            self._pace.used.append(self)

    def _count(self) -> None:
        if not self._taken:
            asyncio.get_running_loop().call_soon(self._next_round)
        self._taken += 1

    def _next_round(self) -> None:
        self._taken = 0
        self.go_on()


class Shares:
    """What every tenant may have of the time of all. A tenant alone may have it all; several share it, and then a transaction is kept
    short, by the time that those before it took: whoever comes meanwhile waits for it. Those who want more than there is get equal
    parts of what the others leave."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pace = Pace(limits.pending_points, limits.turns_alone)
        self.checkpoint_pages = limits.checkpoint_pages  # the log is copied by a commit, for which everybody waits
        self._shares: dict[int | None, Share] = {}
        self.own = Share(self._pace, Backlog(limits.backlog_bytes))  # of what the server does by itself: nobody has less turns for it
        self._lately: dict[Share, float] = {}  # those that were used within a moment, and when
        self._seconds = 2e-6  # for a weight of one; measured from the first transaction on

    def of(self, tenant_id: int | None) -> Share:
        share = self._shares.get(tenant_id)
        if share is None:
            share = self._shares[tenant_id] = Share(self._pace, Backlog(self._limits.backlog_bytes))
        return share

    @property
    def asking(self) -> int:
        """How many wait that store nothing, of all tenants."""
        return sum(share.asking for share in self._shares.values())

    def next_transaction(self) -> None:
        """What was pending is under way: from now on there is room for more."""
        now, limits = asyncio.get_running_loop().time(), self._limits
        used, self._pace.used = self._pace.used, []
        wanting = sum(share.crowded for share in used)
        left = sum(share.weight for share in used if not share.crowded)
        for share in used:
            share.used, share.weight = False, 0
            if share is not self.own:
                self._lately[share] = now
        self._lately = {share: at for share, at in self._lately.items() if now - at < limits.alone_seconds}
        tenants = len(self._lately)
        together = limits.pending_points if tenants < 2 else min(limits.pending_points, round(limits.transaction_seconds / self._seconds))
        self._pace.each = max(limits.share_least, (together - left if tenants > 1 else together) // max(1, wanting))
        self._pace.turns = limits.turns_alone if tenants < 2 else 1
        self.checkpoint_pages = limits.checkpoint_pages if tenants < 2 else limits.checkpoint_pages // 4
        for share in self._lately:
            share.go_on()

    def measured(self, weight: int, seconds: float) -> None:
        """A transaction of such a weight took so long, without its commit. A short one tells little."""
        if weight >= self._limits.share_least:
            self._seconds += (seconds / weight - self._seconds) / 8


class Allowances:
    """How much may who do, beside the quotas of a tenant: what is beyond it is refused, left out or put off where it is asked for."""

    def __init__(self, limits: Limits) -> None:
        self.shares = Shares(limits)  # tenants: of the time of all
        self.guesses = Guesses(limits)  # networks: wrong tokens and keys
        self.refusals = Buckets(limits.refusals, limits.refusals_seconds, limits.notices)  # tokens: refused actions in the audit
        self.openings = Buckets(limits.sessions, float(limits.sessions), limits.notices)  # devices: sessions
        self.fights = Buckets(limits.fights, 3_600.0, limits.notices, strict=True)  # devices: sessions that end young ones
        self.notices = Buckets(1, limits.notice_seconds, limits.notices)  # devices: entries of the timeline about a habit
        logs = round(limits.log_bytes_a_second * limits.log_rate_seconds)
        self.log_bytes = Buckets(logs, limits.log_rate_seconds, limits.notices)  # devices: what they log


# ==== Counts ====
# Owns: what the server counts of itself since its start, in plain numbers: what happens for every frame may cost an addition, no more.
# Must not know: who reads them, and in which form.

SECONDS_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
POINTS_BOUNDS: Final = (0.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)


class Histogram:
    """How often a number was at most so large, for each of its bounds, and the sum of all."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # between a bound and the one before it; the last: above all
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


@attrs.define(eq=False)
class Stored:
    """What was committed. The writer adds to it once a transaction."""

    frames: int = 0
    points: int = 0
    log_lines: int = 0
    log_bytes: int = 0
    failures: int = 0  # transactions that were to be tried again, or dropped
    batch_points: Histogram = attrs.field(factory=lambda: Histogram(POINTS_BOUNDS))
    commit_seconds: Histogram = attrs.field(factory=lambda: Histogram(SECONDS_BOUNDS))
    ack_seconds: Histogram = attrs.field(factory=lambda: Histogram(SECONDS_BOUNDS))


@attrs.define(eq=False)
class Counts:
    """What came, and how it was answered. Nothing of it is named by a peer: codes are those of FAULTS, and requests are counted by the
    route of the table that they met."""

    started_at: float = attrs.field(factory=time.time)
    frame_bytes: int = 0
    sessions: int = 0
    session_ends: Counter[str] = attrs.field(factory=Counter)
    refusals: Counter[str] = attrs.field(factory=Counter)
    requests: Counter[tuple[str, str, int]] = attrs.field(factory=Counter)  # by the route's method and path, empty for none, and status
    datagrams_waiting: Callable[[], int] = lambda: 0  # of the listener, once there is one
    notifications: Counter[str] = attrs.field(factory=Counter)  # by what became of them: delivered, given_up
    failed_deliveries: int = 0  # tries that were in vain


# ==== Database ====
# Owns: the database file and who may open it, connections, migrations, transactions, the readers, and how SQL is spelled. Must not
# know: what the rows mean. Rows go in as one JSON text a statement and answers come out as one, because sqlite3 takes the
# interpreter lock at every row.

SCHEMA_VERSION: Final = 9
APPLICATION_ID: Final = 0x49496F54  # "IIoT"
# A step for each version after the first: MIGRATIONS[n] leads from version n + 1 to n + 2.
MIGRATIONS: Final[tuple[str, ...]] = (
    """
    create table removed_series (
        id  integer primary key
    ) strict;
    alter table presence add column software_version text;
    alter table presence add column config_version integer not null default 0;
    alter table presence add column config_applied integer;
    create table state (
        device_id  integer not null references device on delete cascade,
        version    integer not null,
        at         integer not null,
        session    integer not null,
        document   text not null,
        changes    text not null,
        primary key (device_id, version)
    ) strict, without rowid;
    create table config (
        device_id  integer not null references device on delete cascade,
        version    integer not null,
        document   text not null,
        at         integer not null,
        author     text not null,
        timeout    integer not null,
        status     text not null check (status in ('pending', 'sent', 'in_progress', 'applied', 'rejected', 'timed_out', 'superseded')),
        status_at  integer not null,
        sent_at    integer,
        message    text,
        errors     text,
        primary key (device_id, version)
    ) strict, without rowid;
    create index config_awaited on config (sent_at + timeout) where status in ('sent', 'in_progress');
    """,
    """
    create table new_tenant (
        id                integer primary key autoincrement,
        name              text unique,
        created_at        integer not null,
        devices_most      integer,
        connections_most  integer,
        points_most       integer
    ) strict;
    insert into new_tenant (id, name, created_at) select id, name, created_at from tenant;
    drop table tenant;
    alter table new_tenant rename to tenant;
    create table new_device (
        id          integer primary key autoincrement,
        tenant_id   integer not null references tenant on delete cascade,
        name        text,
        created_at  integer not null,
        disabled    integer not null default 0 check (disabled in (0, 1)),
        labels      text not null default '{}' check (json_valid(labels)),
        unique (tenant_id, name)
    ) strict;
    insert into new_device (id, tenant_id, name, created_at) select id, tenant_id, name, created_at from device;
    drop table device;
    alter table new_device rename to device;
    create index device_removed on device (id) where name is null;
    alter table operator_token add column used_at integer;
    alter table device_token add column pending integer not null default 0 check (pending in (0, 1));
    create table usage (
        tenant_id  integer not null references tenant on delete cascade,
        day        integer not null,
        points     integer not null,
        primary key (tenant_id, day)
    ) strict, without rowid;
    create table audit (
        id         integer primary key autoincrement,
        tenant_id  integer references tenant,
        at         integer not null,
        token      text,
        name       text not null,
        role       text not null,
        action     text not null,
        target     text,
        device     text,
        address    text,
        outcome    text not null,
        detail     text check (detail is null or json_valid(detail))
    ) strict;
    create index audit_by_tenant on audit (tenant_id, id);
    create index audit_by_device on audit (tenant_id, device, id) where device is not null;
    create trigger removed_tenant_stays_removed before update of name on tenant
    when old.name is null
    begin
        select raise(abort, 'a removed tenant stays removed');
    end;
    create trigger audit_is_not_updated before update on audit
    begin
        select raise(abort, 'the audit is append-only');
    end;
    create trigger audit_is_not_deleted before delete on audit
    when old.tenant_id is null or exists (select 1 from tenant where id = old.tenant_id and name is not null)
    begin
        select raise(abort, 'the audit is append-only');
    end;
    create trigger audit_is_not_replaced before insert on audit
    when exists (select 1 from audit where id = new.id)
    begin
        select raise(abort, 'the audit is append-only');
    end;
    """,
    """
    alter table device add column old_name text;
    alter table device add column removed_at integer;
    alter table device add column emptied integer not null default 0 check (emptied in (0, 1));
    drop index device_removed;
    create index device_removed on device (emptied, removed_at) where name is null;
    create index device_by_folded_name on device (tenant_id, lower(name), name);
    alter table device_token add column key_id text;
    create table removed_range (
        id         integer primary key autoincrement,
        series_id  integer not null,
        start      integer not null,
        stop       integer not null
    ) strict;
    create table document (
        id    integer primary key autoincrement,
        text  text not null
    ) strict;
    create table new_config (
        device_id    integer not null references device on delete cascade,
        version      integer not null,
        document_id  integer not null references document,
        at           integer not null,
        author       text not null,
        timeout      integer not null,
        status       text not null check (status in ('pending', 'sent', 'in_progress', 'applied', 'rejected', 'timed_out', 'superseded')),
        status_at    integer not null,
        sent_at      integer,
        message      text,
        errors       text,
        primary key (device_id, version)
    ) strict, without rowid;
    insert into document (id, text) select row_number() over (order by device_id, version), document from config;
    insert into new_config
        select device_id, version, row_number() over (order by device_id, version), at, author, timeout, status, status_at, sent_at,
               message, errors
        from config;
    drop table config;
    alter table new_config rename to config;
    create index config_by_document on config (document_id);
    create index config_awaited on config (device_id, version) where status in ('sent', 'in_progress');
    update presence set software_version = substr(software_version, 1, 128), agent = substr(agent, 1, 128);
    create table salt (
        id     integer primary key check (id = 1),
        value  text not null
    ) strict;
    """,
    """
    create table push (
        id           integer primary key autoincrement,
        tenant_id    integer not null references tenant on delete cascade,
        match        text not null,
        document_id  integer not null references document,
        timeout      integer not null,
        newest       integer not null,
        done         text not null,
        actor        text not null check (json_valid(actor))
    ) strict;
    create index push_by_tenant on push (tenant_id, id);
    create index push_by_document on push (document_id);
    create index audit_by_name on audit (tenant_id, name, id);
    create index audit_by_token on audit (tenant_id, token, id) where token is not null;
    create index audit_by_action on audit (tenant_id, action, id);
    create table hour (
        kind   text not null check (kind in ('event', 'audit')),
        hour   integer not null,
        first  integer not null,
        last   integer not null,
        primary key (kind, hour)
    ) strict, without rowid;
    insert into hour select 'event', at / 3600000, min(id), max(id) from event group by at / 3600000;
    insert into hour select 'audit', at / 3600000, min(id), max(id) from audit group by at / 3600000;
    create trigger hour_of_event after insert on event
    begin
        insert into hour (kind, hour, first, last) values ('event', new.at / 3600000, new.id, new.id)
        on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
    end;
    create trigger hour_of_moved_event after update of at on event
    begin
        insert into hour (kind, hour, first, last) values ('event', new.at / 3600000, new.id, new.id)
        on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
    end;
    create trigger hour_of_audit after insert on audit
    begin
        insert into hour (kind, hour, first, last) values ('audit', new.at / 3600000, new.id, new.id)
        on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
    end;
    """,
    """
    create table log_line (
        id           integer primary key autoincrement,
        tenant_id    integer not null,
        device_id    integer not null,
        at           integer not null,
        received_at  integer not null,
        level        integer not null check (level between 2 and 7),
        message      text not null,
        logger       text,
        host         text,
        fields       text
    ) strict;
    create virtual table log_index using fts5 (who, text, content = '', columnsize = 0, tokenize = 'unicode61 remove_diacritics 2');
    create table log_word (
        id         integer primary key,
        tenant_id  integer not null,
        word       text not null,
        unique (tenant_id, word)
    ) strict;
    create virtual table log_word_index using fts5 (word, content = 'log_word', content_rowid = 'id', columnsize = 0, tokenize = 'trigram');
    create virtual table log_vocabulary using fts5vocab (log_index, 'row');
    create table log_token (
        id           text primary key,
        device_id    integer not null references device on delete cascade,
        secret_hash  blob not null,
        created_at   integer not null
    ) strict, without rowid;
    create index log_token_by_device on log_token (device_id);
    create table syslog_source (
        network    text primary key,
        device_id  integer not null references device on delete cascade
    ) strict, without rowid;
    create index syslog_source_by_device on syslog_source (device_id);
    create table log_repeat (
        device_id    integer not null,
        repeat_id    text not null,
        received_at  integer not null,
        primary key (device_id, repeat_id)
    ) strict, without rowid;
    create index log_repeat_by_time on log_repeat (received_at);
    create table retention (
        tenant_id  integer not null references tenant on delete cascade,
        kind       text not null check (kind in ('logs')),
        days       integer not null check (days > 0),
        primary key (tenant_id, kind)
    ) strict, without rowid;
    create table new_hour (
        kind   text not null check (kind in ('event', 'audit', 'log')),
        hour   integer not null,
        first  integer not null,
        last   integer not null,
        primary key (kind, hour)
    ) strict, without rowid;
    insert into new_hour select kind, hour, first, last from hour;
    drop trigger hour_of_event;
    drop trigger hour_of_moved_event;
    drop trigger hour_of_audit;
    drop table hour;
    alter table new_hour rename to hour;
    create trigger hour_of_event after insert on event
    begin
        insert into hour (kind, hour, first, last) values ('event', new.at / 3600000, new.id, new.id)
        on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
    end;
    create trigger hour_of_moved_event after update of at on event
    begin
        insert into hour (kind, hour, first, last) values ('event', new.at / 3600000, new.id, new.id)
        on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
    end;
    create trigger hour_of_audit after insert on audit
    begin
        insert into hour (kind, hour, first, last) values ('audit', new.at / 3600000, new.id, new.id)
        on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last);
    end;
    """,
    """
    alter table tenant add column log_bytes_most integer;
    alter table usage add column log_bytes integer not null default 0;
    create table log_hour (
        tenant_id  integer not null references tenant on delete cascade,
        hour       integer not null,
        first      integer not null,
        last       integer not null,
        primary key (tenant_id, hour)
    ) strict, without rowid;
    insert into log_hour
        select tenant_id, received_at / 3600000, min(id), max(id) from log_line where tenant_id in (select id from tenant) group by 1, 2;
    """,
    """
    create table rule (
        id          integer primary key autoincrement,
        tenant_id   integer not null references tenant on delete cascade,
        name        text not null,
        body        text not null check (json_valid(body)),
        changed_at  integer not null,
        author      text not null,
        last_line   integer not null,
        unique (tenant_id, name)
    ) strict;
    create table alert (
        id            integer primary key,
        tenant_id     integer not null references tenant on delete cascade,
        device_id     integer not null references device on delete cascade,
        rule_id       integer not null,
        rule          text not null,
        kind          text not null,
        severity      text not null,
        labels        text not null check (json_valid(labels)),
        metric        text,
        series_id     integer,
        text          text not null,
        value         any,
        since         integer not null,
        fired_at      integer,
        ended_at      integer,
        resolved_at   integer,
        reason        text,
        catching_up   integer not null default 0 check (catching_up in (0, 1)),
        changed_at    integer not null,
        acknowledged  text check (acknowledged is null or json_valid(acknowledged))
    ) strict;
    create unique index alert_open on alert (rule_id, device_id) where resolved_at is null;
    create index alert_by_tenant on alert (tenant_id, id);
    create index alert_by_device on alert (device_id, rule_id, resolved_at);
    create index alert_open_by_device on alert (device_id) where resolved_at is null;
    create index alert_firing on alert (tenant_id, id) where fired_at is not null and resolved_at is null;
    create table silence (
        id          integer primary key autoincrement,
        tenant_id   integer not null references tenant on delete cascade,
        match       text not null,
        labels      text not null check (json_valid(labels)),
        rule        text,
        created_at  integer not null,
        until       integer not null,
        author      text not null,
        text        text not null
    ) strict;
    create index silence_by_tenant on silence (tenant_id, id);
    create table webhook (
        id               integer primary key autoincrement,
        tenant_id        integer not null references tenant on delete cascade,
        form             text not null check (form in ('webhook', 'alertmanager', 'ntfy', 'slack', 'email')),
        url              text not null,
        shown            text not null check (json_valid(shown)),
        match            text not null,
        severity         integer not null,
        rule             text,
        group_by         text not null,
        group_wait       integer not null,
        group_interval   integer not null,
        repeat_interval  integer not null,
        secret           text,
        old_secret       text,
        old_until        integer,
        created_at       integer not null,
        removed          integer not null default 0 check (removed in (0, 1))
    ) strict;
    create index webhook_by_tenant on webhook (tenant_id, id);
    create index webhook_removed on webhook (id) where removed = 1;
    create table alert_group (
        webhook_id  integer not null references webhook on delete cascade,
        key         text not null,
        due_at      integer not null,
        told_at     integer,
        primary key (webhook_id, key)
    ) strict, without rowid;
    create index alert_group_due on alert_group (due_at);
    create table notice (
        webhook_id  integer not null references webhook on delete cascade,
        alert_id    integer not null references alert on delete cascade,
        key         text not null,
        told_at     integer,
        primary key (webhook_id, alert_id)
    ) strict, without rowid;
    create index notice_by_alert on notice (alert_id);
    create index notice_by_group on notice (webhook_id, key);
    create table notification (
        id            integer primary key autoincrement,
        tenant_id     integer not null references tenant on delete cascade,
        webhook_id    integer not null references webhook on delete cascade,
        message_id    text not null,
        at            integer not null,
        alerts        integer not null,
        headers       text not null check (json_valid(headers)),
        body          text,
        status        text not null default 'waiting' check (status in ('waiting', 'delivered', 'given_up')),
        tries         integer not null default 0,
        next_at       integer,
        error         text,
        delivered_at  integer
    ) strict;
    create index notification_by_tenant on notification (tenant_id, id);
    create index notification_by_webhook on notification (webhook_id, id);
    create index notification_waiting on notification (webhook_id, id) where status = 'waiting';
    create index notification_done on notification (at) where status <> 'waiting';
    create table late_reading (
        rule_id    integer not null references rule on delete cascade,
        series_id  integer not null,
        device_id  integer not null references device on delete cascade,
        start      integer not null,
        stop       integer not null,
        primary key (rule_id, series_id)
    ) strict, without rowid;
    create index late_reading_by_device on late_reading (device_id);
    create table changed (
        kind  text not null check (kind in ('rule', 'device')),
        id    integer not null,
        primary key (kind, id)
    ) strict, without rowid;
    create trigger new_rule after insert on rule
    begin
        insert or ignore into changed values ('rule', new.id);
    end;
    create trigger changed_rule after update of body on rule
    begin
        insert or ignore into changed values ('rule', new.id);
    end;
    create trigger removed_rule after delete on rule
    begin
        insert or ignore into changed values ('rule', old.id);
    end;
    create trigger new_device after insert on presence when exists (select 1 from rule)
    begin
        insert or ignore into changed values ('device', new.device_id);
    end;
    create trigger changed_device after update of name, labels, disabled on device when exists (select 1 from rule)
    begin
        insert or ignore into changed values ('device', new.id);
    end;
    create trigger changed_presence after update of connected on presence when exists (select 1 from rule)
    begin
        insert or ignore into changed values ('device', new.device_id);
    end;
    """,
    """
    create table command_batch (
        id             integer primary key autoincrement,
        tenant_id      integer not null references tenant on delete cascade,
        match          text not null,
        argv           text not null check (json_valid(argv)),
        timeout        integer not null,
        ttl            integer,
        parallel       integer not null check (parallel in (0, 1)),
        per_minute     integer,
        failures_most  integer,
        actor          text not null check (json_valid(actor)),
        key            text,
        at             integer not null,
        devices        integer not null,
        newest         integer not null,
        done           text not null default '',
        next_at        integer,
        stopped        text
    ) strict;
    create index command_batch_by_tenant on command_batch (tenant_id, id);
    create unique index command_batch_by_key on command_batch (tenant_id, key) where key is not null;
    create index command_batch_due on command_batch (next_at) where next_at is not null;
    create index command_batch_open on command_batch (tenant_id) where next_at is not null;
    create index command_batch_over on command_batch (at) where next_at is null;
    create table command (
        id             integer primary key autoincrement,
        device_id      integer not null references device on delete cascade,
        batch_id       integer,
        argv           text not null check (json_valid(argv)),
        timeout        integer not null,
        ttl            integer,
        parallel       integer not null check (parallel in (0, 1)),
        actor          text not null check (json_valid(actor)),
        key            text,
        status         text not null check (status in
            ('queued', 'sent', 'running', 'done', 'failed', 'refused', 'timed_out', 'cancelled', 'expired', 'lost')),
        at             integer not null,
        sent_at        integer,
        started_at     integer,
        cancelled_at   integer,
        ended_at       integer,
        due_at         integer,
        exit_code      integer,
        message        text,
        stored_bytes   integer not null default 0,
        output_bytes   integer not null default 0
    ) strict;
    create index command_by_device on command (device_id, id);
    create index command_open on command (device_id, id) where ended_at is null;
    create index command_due on command (due_at) where due_at is not null;
    create index command_ended on command (ended_at) where ended_at is not null;
    create index command_by_batch on command (batch_id, id) where batch_id is not null;
    create index command_by_status on command (batch_id, status, exit_code) where batch_id is not null;
    create unique index command_by_key on command (device_id, key) where key is not null;
    create table command_output (
        command_id  integer not null references command on delete cascade,
        start       integer not null,
        stream      text not null check (stream in ('stdout', 'stderr')),
        at          integer not null,
        data        blob not null,
        primary key (command_id, start)
    ) strict;
    create table tunnel (
        id         integer primary key autoincrement,
        device_id  integer not null references device on delete cascade,
        port       integer not null,
        actor      text not null check (json_valid(actor)),
        at         integer not null
    ) strict;
    create index tunnel_by_device on tunnel (device_id);
    """,
)


class StoreError(Exception):
    """The database file cannot be used; the text is for the person who starts the server."""


def companion(name: str) -> str | None:
    """The text of a file that belongs to this one: beside it, or where `pip install` puts it. None where it is missing."""
    for folder in (Path(__file__).parent, Path(sysconfig.get_path("data")) / "share" / "iiot"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    return None


def schema_text() -> str:
    text = companion("schema.sql")
    if text is None:
        raise StoreError("schema.sql is neither beside iiot.py nor installed with it")
    return text


def set_checkpoint_pages(connection: sqlite3.Connection, pages: int) -> None:
    """Let a commit copy the write-ahead log into the database file whenever it has grown by so many pages."""
    connection.execute(f"pragma wal_autocheckpoint = {pages}").fetchone()


def connect(path: Path, *, query_only: bool = False, checkpoint_pages: int = 1_000, busy_seconds: float = 5.0) -> sqlite3.Connection:
    """One connection with everything set that a connection must set for itself."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.execute(f"pragma busy_timeout = {round(busy_seconds * 1000)}")
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("pragma foreign_keys = on")
    connection.execute(f"pragma cache_size = -{8_000 if query_only else 64_000}")
    set_checkpoint_pages(connection, checkpoint_pages)
    connection.execute(f"pragma query_only = {int(query_only)}")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK. Runs on one thread without a break: nothing in it can be cancelled."""
    connection.execute("begin immediate")
    try:
        yield
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise


def statements(script: str) -> Iterator[str]:
    """The statements of an SQL script one by one: executescript would commit the transaction it runs in."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """What SQLite says about a file, with the file's name."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from error


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """StoreError when the file was written by a newer program."""
    (version,) = connection.execute("pragma user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} was written by a newer version of this program (schema {version}, known {SCHEMA_VERSION})")
    return int(version)


def connect_without_log(path: Path) -> sqlite3.Connection:
    """A database file as it is without its log, and left so."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def make_file(path: Path) -> None:
    """An empty file that only its owner may read, unless there is one. SQLite gives its companions the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def is_new(path: Path) -> bool:
    """Whether there is no database yet. StoreError when the file is somebody else's, which is left as it is.

    SQLite itself looks at the file, without its log, which may be another file's (`LockFile.check_log`). Had this process opened
    and closed it by hand, the system would drop the locks of its other connections, and the next process to close the database
    would take the log from under them (https://www.sqlite.org/howtocorrupt.html, section 2.2).
    """
    try:
        if path.stat().st_size == 0:
            return True
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise StoreError(f"there is no folder {path.parent} for {path}") from None
        return True
    with named_errors(path), closing(connect_without_log(path)) as connection:
        if connection.execute("pragma application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreError(f"{path} is not a database of this program")
        schema_version(connection, path)
    return False


def create_schema(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        for statement in statements(schema_text()):
            connection.execute(statement)
        connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
        connection.execute("insert into tenant (name, created_at) values ('default', ?)", (now_ms(),))


def migrate(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Copy the file, then take every step in one transaction."""
    copy = path.with_name(f"{path.name}.schema-{version}")
    log.info("migrating %s from schema %d to %d; the old one is kept as %s", path, version, SCHEMA_VERSION, copy)
    path.chmod(0o600)  # earlier versions left it open to all
    make_file(copy)
    with closing(sqlite3.connect(copy)) as target:
        connection.backup(target)
    connection.execute("pragma foreign_keys = off")  # a step may put another table in the place of one that is referred to
    with transaction(connection):
        for step in MIGRATIONS[version - 1 :]:
            for statement in statements(step):
                connection.execute(statement)
        if connection.execute("pragma foreign_key_check").fetchone() is not None:
            raise StoreError(f"{path} cannot be migrated: rows in it refer to others that are not there")
        connection.execute(f"pragma user_version = {SCHEMA_VERSION}")


def prepare_database(path: Path) -> None:
    """Make the database file, or migrate it. StoreError when it cannot be used."""
    with named_errors(path):
        if is_new(path):
            make_file(path)
            with closing(sqlite3.connect(path)) as connection:
                connection.execute(f"pragma application_id = {APPLICATION_ID}")
        with closing(connect(path)) as connection:
            version = schema_version(connection, path)
            if version == 0:
                create_schema(connection)
            elif version < SCHEMA_VERSION:
                migrate(connection, path, version)


def resolved(path: Path) -> Path:
    """The file itself, whatever links lead to it: its lock lies beside it."""
    return path.resolve()


def salt_of_file(path: Path) -> str | None:
    """The salt in a database file as it is without its log; None where there is none."""
    with closing(connect_without_log(path)) as connection:
        try:
            row = connection.execute("select value from salt").fetchone()
        except sqlite3.OperationalError:  # no such table
            return None
    return None if row is None else str(row[0])


class LockFile:
    """The file beside a database that keeps a second server away, and keeps the salts that the database file may have.

    The lock is not on the database: SQLite has locks of its own there. A crash lets go of it.
    """

    def __init__(self, path: Path) -> None:
        self._database = path
        name = path.with_name(f"{path.name}.lock")
        self._file = os.fdopen(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), "r+", errors="replace")

    def close(self) -> None:
        self._file.close()

    def take(self) -> bool:
        """Whether nobody else has the lock."""
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    async def wait(self, seconds: float) -> None:
        """Take the lock; a server that is stopping may have it for a moment. StoreError when it is not free by then."""
        until, told = time.monotonic() + seconds, False
        while not self.take():
            if time.monotonic() >= until:
                raise StoreError(f"another server runs on {self._database}")
            if not told:
                log.warning("another server runs on %s; waiting up to %.0f s until it stops", self._database, seconds)
                told = True
            await asyncio.sleep(0.05)

    def keep(self, *salts: str) -> None:
        """Write down which salts the database file may have, on the disk."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write("".join(f"{salt}\n" for salt in salts))
        self._file.flush()
        os.fsync(self._file.fileno())

    def check_log(self) -> None:
        """StoreError when there is a write-ahead log that was not written for this database file: SQLite would replay it over a
        backup that was put in the place of the file. To be called with the lock taken, before the database is opened."""
        written = self._database.with_name(f"{self._database.name}-wal")
        self._file.seek(0)
        salts = self._file.read().split()
        if salts and written.exists() and written.stat().st_size and salt_of_file(self._database) not in salts:
            raise StoreError(
                f"{written.name} was not written for this {self._database.name}, but for an earlier or later one."
                f" If you put a backup in its place, remove {written.name} and {self._database.name}-shm, then start again;"
                " if you did not, put back the file that was there"
            )


def copy_log(connection: sqlite3.Connection) -> None:
    """Copy the write-ahead log into the database file as far as nobody reads from it; nobody waits for that."""
    connection.execute("pragma wal_checkpoint(passive)").fetchone()


def start_log_over(connection: sqlite3.Connection) -> None:
    """Copy the write-ahead log into the database file, and cut it. Where somebody still reads from it, a later try may do it."""
    connection.execute("pragma wal_checkpoint(truncate)").fetchone()


def renew_salt(connection: sqlite3.Connection, lock: LockFile) -> None:
    """Give the database another salt. Until that has reached the database file itself, both are right."""
    row, new = connection.execute("select value from salt").fetchone(), secrets.token_hex(16)
    old = () if row is None else row
    lock.keep(*old, new)
    with transaction(connection):
        connection.execute("insert into salt (id, value) values (1, ?) on conflict (id) do update set value = excluded.value", (new,))
    _, logged, copied = connection.execute("pragma wal_checkpoint(passive)").fetchone()
    if logged == copied:
        lock.keep(new)


def time_sql(moment: str) -> str:
    """SQL for RFC 3339 of a column of milliseconds."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', ({moment}) / 1000.0, 'unixepoch')"


LARGEST: Final = "1.7976931348623157e308"  # double
SCALE: Final = "1152921504606846976.0"  # 2 to the power of 60: nothing is lost by it, and no bucket has so many points


def exact_sql(value: str) -> str:
    """SQL for a value's JSON. SQLite prints 15 digits of a real, and half of all doubles change on the way; 18 are exact, and
    `shortened` makes them the fewest. A sum past the largest double is null."""
    real = f"iif(abs({value}) <= {LARGEST}, json(printf('%!.18g', {value})), null)"
    return f"case typeof({value}) when 'real' then {real} else {value} end"


def shortened(text: str) -> bytes:
    """JSON with every number in the fewest digits that read back as the same double."""
    return orjson.dumps(orjson.loads(text))


def bind(rows: object) -> tuple[str]:
    """Rows as the one JSON text that a statement binds."""
    return (orjson.dumps(rows).decode(),)


TEXT_BYTES: Final = 4 * 1024 * 1024  # that one statement binds of rows that may be long: such a text is in memory several times over
LONG_TEXT: Final = 8 * 1024  # texts of one row from which on a statement of its own costs less than reading them within JSON


def bind_in_parts(rows: Iterable[object]) -> Iterator[tuple[str]]:
    """Rows as JSON texts of bounded length, in order, each for one run of a statement: SQLite takes no text of a gigabyte. Every part
    has one row at least."""
    part, size = list[bytes](), 0
    for row in rows:
        text = orjson.dumps(row)
        if part and size + len(text) > TEXT_BYTES:
            yield (b"[%b]" % b",".join(part)).decode(),
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield (b"[%b]" % b",".join(part)).decode(),


class Connection(aiosqlite.Connection):
    """An aiosqlite connection that also runs a whole function on its thread: one hop for a transaction or a query."""

    @classmethod
    async def open(cls, connector: Callable[[], sqlite3.Connection]) -> Connection:
        connection = cls(connector, iter_chunk_size=1)
        await connection
        return connection

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(sqlite3 connection, *arguments)` on the connection's thread."""
        return cast(T, await self._execute(functools.partial(function, self._conn), *arguments))  # type: ignore[no-untyped-call]

    def interrupt_query(self) -> None:
        """End the query that runs on the connection's thread; it fails with `interrupted`."""
        self._conn.interrupt()


class Turns:
    """Who reads next. A tenant never has all readers, so that another one's short question finds one free; and tenants that wait
    take turns, whatever each of them asks. While paused, nobody begins to read; and before that, those who read at that moment do
    not begin again: a long question makes its own tenant wait."""

    def __init__(self, readers: Iterable[Connection]) -> None:
        self._free = list(readers)
        self._most = max(1, len(self._free) - 1)  # for one tenant
        self._held: dict[object, int] = {}
        self._waiting: dict[object, deque[asyncio.Future[Connection]]] = {}  # who has waited longest for a turn stands first
        self._busy: set[Connection] = set()
        self._barred: set[object] = set()  # tenants that may not begin to read
        self._paused = False
        self._returned = asyncio.Event()

    async def take(self, tenant: object) -> Connection:
        turn: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._grant()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(tenant, turn.result())
            raise

    def give(self, tenant: object, reader: Connection) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        self._busy.discard(reader)
        self._free.append(reader)
        self._returned.set()
        self._grant()

    @asynccontextmanager
    async def paused(self, seconds: float, before: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[None]:
        """Until all have been given back, or so many seconds are over; nobody takes one meanwhile. `before` is done first, once those
        who read now are ready."""
        busy, self._barred = set(self._busy), set(self._held)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._until(lambda: not busy & self._busy)
                    if before is not None:
                        await before()
                    self._paused = True
                    await self._until(lambda: not self._busy)
            self._paused = True
            yield
        finally:
            self._paused = False
            self._barred.clear()
            self._grant()

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._returned.clear()
            await self._returned.wait()

    def _grant(self) -> None:
        while self._free and not self._paused:
            turn = self._next()
            if turn is None:
                return
            reader = self._free.pop()
            self._busy.add(reader)
            turn.set_result(reader)

    def _next(self) -> asyncio.Future[Connection] | None:
        """The first that waits of the first tenant that may have one more reader; the tenant stands last from then on."""
        for tenant in list(self._waiting):
            turns = self._waiting[tenant]
            while turns and turns[0].done():  # cancelled
                turns.popleft()
            if not turns:
                del self._waiting[tenant]
            elif self._held.get(tenant, 0) < self._most and tenant not in self._barred:
                del self._waiting[tenant]
                turn = turns.popleft()
                if turns:
                    self._waiting[tenant] = turns
                self._held[tenant] = self._held.get(tenant, 0) + 1
                return turn
        return None


class AnswerTooLong(Exception):  # noqa: N818 - it is no error of the one who asked
    """An answer would have so many characters."""

    def __init__(self, length: int) -> None:
        super().__init__(f"an answer of {length} characters")
        self.length = length


class Readers:
    """A few connections that can only read, each query with a deadline."""

    def __init__(self, connections: Iterable[Connection], seconds: float) -> None:
        self._turns = Turns(connections)
        self._seconds = seconds

    async def row(self, sql: str, parameters: Mapping[str, object]) -> tuple[Any, ...] | None:
        """The first row of a query, or None. Refusal: query_too_slow."""
        return await self._run(self._fetch, sql, parameters, self._seconds)

    async def exact_parts(self, sql: str, parameters: Mapping[str, object], seconds: float) -> list[tuple[int, bytes, int | None]]:
        """Of a JSON array of parts `[number, rows, next]` in the first column of the first row: the rows as JSON text, their numbers
        shortened. Refusal: query_too_slow."""
        return await self._run(self._fetch_parts, sql, parameters, seconds)

    async def exact(
        self, sql: str, parameters: Mapping[str, object], seconds: float | None = None, most: int | None = None
    ) -> bytes | None:
        """The JSON text in the first column of the first row, its numbers shortened; or None. Refusal: query_too_slow, after so
        many seconds. AnswerTooLong, when the text has more than `most` characters."""
        return await self._run(functools.partial(self._fetch_exact, most), sql, parameters, seconds or self._seconds)

    def paused(self, before: Callable[[], Awaitable[object]]) -> AbstractAsyncContextManager[None]:
        """Queries under way end, and none begins; `before` is done while short ones still do."""
        return self._turns.paused(self._seconds, before)

    async def _run(self, fetch: Callable[..., T], sql: str, parameters: Mapping[str, object], seconds: float) -> T:
        tenant = parameters.get("tenant")
        try:
            async with asyncio.timeout(seconds):
                connection = await self._turns.take(tenant)
        except TimeoutError as error:
            raise Refusal("query_too_slow") from error
        query = asyncio.ensure_future(connection.run(fetch, sql, parameters))
        deadline = asyncio.get_running_loop().call_later(seconds, connection.interrupt_query)

        def release(finished: asyncio.Future[Any]) -> None:
            deadline.cancel()
            self._turns.give(tenant, connection)
            if not finished.cancelled():
                finished.exception()  # its caller may be gone

        query.add_done_callback(release)
        try:
            return await asyncio.shield(query)
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise Refusal("query_too_slow") from error
            raise
        except asyncio.CancelledError:
            if not query.done():  # or the connection is another's by now
                connection.interrupt_query()  # nobody wants the answer any more
            raise

    @staticmethod
    def _fetch(connection: sqlite3.Connection, sql: str, parameters: Mapping[str, object]) -> tuple[Any, ...] | None:
        return cast("tuple[Any, ...] | None", connection.execute(sql, parameters).fetchone())

    @classmethod
    def _fetch_parts(
        cls, connection: sqlite3.Connection, sql: str, parameters: Mapping[str, object]
    ) -> list[tuple[int, bytes, int | None]]:
        row = cls._fetch(connection, sql, parameters)
        return [(number, orjson.dumps(rows), following) for number, rows, following in orjson.loads(row[0] if row else "[]")]

    @classmethod
    def _fetch_exact(
        cls, most: int | None, connection: sqlite3.Connection, sql: str, parameters: Mapping[str, object]
    ) -> bytes | None:
        row = cls._fetch(connection, sql, parameters)
        if row is None:
            return None
        if most is not None and len(row[0]) > most:
            raise AnswerTooLong(len(row[0]))
        return shortened(row[0])


HOUR: Final = 3_600_000
PAGE_CHARACTERS: Final = 4 * 1024 * 1024  # of a page: an answer is in memory several times over


class Queries:
    """Queries that answer as JSON text, made by SQLite and sent as it is."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def _json(self, sql: str, **parameters: object) -> str | None:
        row = await self._readers.row(sql, parameters)
        return None if row is None else row[0]

    async def _list(self, page_sql: str, limit: int, **parameters: object) -> str:
        """A page of `page_sql`, which yields (position, item) in order; `next` is the position to go on after. A page has fewer
        entries than asked for where they are long, and at least one."""
        text = await self._json(
            f"""with page as materialized ({page_sql} limit :limit + 1),
                counted as (select position, item, row_number() over () number, sum(length(item)) over (
                    rows between unbounded preceding and current row) size from page),
                shown as materialized (select position, item, number from counted
                    where number <= :limit and (size <= {PAGE_CHARACTERS} or number = 1)),
                last as (select coalesce(max(number), 0) number from shown)
                select json_object('items', (select json_group_array(json(item)) from (select item from shown order by number)),
                    'next', case when (select count(*) from page) > (select number from last)
                            then (select position from shown where number = (select number from last)) end)""",
            limit=limit, **parameters,
        )  # fmt: skip
        return str(text)


    async def _numbers(self, kind: str, tenant: int | None, start: int, stop: int) -> tuple[int, int]:
        """Between which two numbers the entries of a range of times lie, among others; `kind` is event or audit."""
        if start <= 0 and stop >= LATEST:
            return 0, INTEGERS - 1
        row = await self._readers.row(
            f"""select min(first) - 1, max(last) + 1 from hour
                where kind = :kind and hour >= :start / {HOUR} and hour <= (:stop - 1) / {HOUR}""",
            {"kind": kind, "tenant": tenant, "start": start, "stop": stop},
        )
        low, high = row or (None, None)
        if low is None or high is None:
            return 0, 0  # nothing happened then
        return low if start > 0 else 0, high if stop < LATEST else INTEGERS - 1


class Bell:
    """Wakes all who listen. Whoever looks for something takes `next` before the look, and awaits it after one in vain."""

    def __init__(self) -> None:
        self.next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ring(self) -> None:
        self.next.set_result(None)
        self.next = asyncio.get_running_loop().create_future()

    @staticmethod
    async def heard(ring: asyncio.Future[None], seconds: float) -> None:
        """Return at the ring, or after so many seconds."""
        await asyncio.wait((ring,), timeout=seconds)


class TenantBells:
    """Wakes those who listen for something of one tenant. A ring is forgotten with the last who holds it: it may never come."""

    def __init__(self) -> None:
        self._rings = weakref.WeakValueDictionary[int, asyncio.Future[None]]()

    def next(self, tenant_id: int) -> asyncio.Future[None]:
        """Done at the next ring. Whoever looks for something takes it before the look."""
        return self._rings.setdefault(tenant_id, asyncio.get_running_loop().create_future())

    def __bool__(self) -> bool:
        """Whether somebody listens."""
        return bool(self._rings)

    def ring(self, tenant_id: int) -> None:
        if (ring := self._rings.pop(tenant_id, None)) is not None:
            ring.set_result(None)

    def ring_all(self) -> None:
        for tenant_id in list(self._rings):
            self.ring(tenant_id)


def is_held_by_another(error: Exception) -> bool:
    """Whether another program has the database for itself at the moment."""
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorname == "SQLITE_BUSY"


# ==== Accounts ====
# Owns: every line of SQL about tenants with their quotas, tokens, keys and the audit. Must not know: HTTP, sockets.


@attrs.frozen
class NewSecret:
    """A token or key about to be stored: its id, and the SHA-256 of its secret."""

    id: str
    secret_hash: bytes


@attrs.frozen
class Actor:
    """Who answers for a change: `tenant_id` None for the platform's own affairs, `token_id` and `address` None for the command line."""

    tenant_id: int | None
    token_id: str | None
    name: str
    role: str
    address: str | None = None


@attrs.frozen
class Affected:
    """What an action was done to: a name or an id as the action has it, the device if it is one, and what else the action was told."""

    target: str | None = None
    device: str | None = None
    detail: Mapping[str, object] | None = None


def shown_name(text: str | None) -> str | None:
    """A name as a peer gave it, fit to be kept: it may be anything."""
    return None if text is None else text.replace("\0", "\\0")[:256]


def add_entries(connection: sqlite3.Connection, actor: Actor, action: str, outcome: str, affected: Iterable[Affected]) -> None:
    """Entries of the audit, one for all that was affected; none in a tenant that was removed."""
    rows = [(shown_name(row.target), shown_name(row.device), row.detail) for row in affected]
    connection.execute(
        """insert into audit (tenant_id, at, token, name, role, action, target, device, address, outcome, detail)
           select ?2, ?3, ?4, ?5, ?6, ?7, value ->> 0, value ->> 1, ?8, ?9, iif(json_type(value, '$[2]') = 'null', null, value -> 2)
           from json_each(?1) where ?2 is null or exists (select 1 from tenant where id = ?2 and name is not null) order by key""",
        (redacted(*bind(rows)), actor.tenant_id, now_ms(), actor.token_id, actor.name, actor.role, action, actor.address, outcome),
    )


def accounted(
    actor: Actor, action: str, function: Callable[[sqlite3.Connection], T], affected: Callable[[T], Iterable[Affected]]
) -> Callable[[sqlite3.Connection], T]:
    """A change that enters itself in the audit."""

    def change(connection: sqlite3.Connection) -> T:
        result = function(connection)
        add_entries(connection, actor, action, "ok", affected(result))
        return result

    return change


def require_token(connection: sqlite3.Connection, token_id: str) -> None:
    """Refusal: unauthorized, when an operator's token was revoked or has expired since it was shown."""
    if connection.execute(
        "select 1 from operator_token where id = ? and (expires_at is null or expires_at > ?)", (token_id, now_ms())
    ).fetchone() is None:
        raise Refusal("unauthorized")


def tenant_id_of(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("select id from tenant where name = ?", (name,)).fetchone()
    if row is None:
        raise Refusal("not_found")
    return int(row[0])


def is_untouched(connection: sqlite3.Connection) -> bool:
    """Whether nobody has a token yet, and the first tenant is still there."""
    row = connection.execute("select 1 from tenant where name = 'default' and not exists (select 1 from operator_token)").fetchone()
    return row is not None


def insert_operator_token(
    connection: sqlite3.Connection, tenant_id: int | None, new: NewSecret, name: str, role: str, expires_at: int | None = None
) -> None:
    connection.execute(
        "insert into operator_token (id, tenant_id, name, role, secret_hash, created_at, expires_at) values (?, ?, ?, ?, ?, ?, ?)",
        (new.id, tenant_id, name, role, new.secret_hash, now_ms(), expires_at),
    )


def delete_operator_token(connection: sqlite3.Connection, tenant_id: int | None, token_id: str) -> None:
    """Revoke an operator's token of a tenant, or of the platform. Refusal: not_found, last_token."""
    (outlasts_all,) = connection.execute(
        """select exists (
               select 1 from operator_token one where tenant_id is ?1 and id = ?2 and role in ('admin', 'platform')
               and coalesce(expires_at, ?4) > ?3 and not exists (
                   select 1 from operator_token other where tenant_id is ?1 and id <> ?2 and role in ('admin', 'platform')
                   and coalesce(other.expires_at, ?4) >= coalesce(one.expires_at, ?4)))""",
        (tenant_id, token_id, now_ms(), INTEGERS - 1),
    ).fetchone()
    if outlasts_all:
        raise Refusal("last_token")
    if connection.execute("delete from operator_token where tenant_id is ? and id = ?", (tenant_id, token_id)).rowcount == 0:
        raise Refusal("not_found")


def delete_provisioning_key(connection: sqlite3.Connection, tenant_id: int, key_id: str) -> None:
    """Refusal: not_found."""
    if connection.execute("delete from provisioning_key where tenant_id = ? and id = ?", (tenant_id, key_id)).rowcount == 0:
        raise Refusal("not_found")


def insert_provisioning_key(
    connection: sqlite3.Connection, tenant_id: int, new: NewSecret, expires_at: int | None = None, uses: int | None = None
) -> None:
    connection.execute(
        "insert into provisioning_key (id, tenant_id, secret_hash, created_at, expires_at, uses_left) values (?, ?, ?, ?, ?, ?)",
        (new.id, tenant_id, new.secret_hash, now_ms(), expires_at, uses),
    )


def use_provisioning_key(connection: sqlite3.Connection, key_id: str) -> int:
    """Take one use of a key; its tenant. Refusal: unauthorized, when it is used up or gone by now."""
    row = connection.execute(
        """update provisioning_key set uses_left = uses_left - 1
           where id = ? and (uses_left is null or uses_left > 0) and (expires_at is null or expires_at > ?) returning tenant_id""",
        (key_id, now_ms()),
    ).fetchone()
    if row is None:
        raise Refusal("unauthorized")
    return int(row[0])


def set_quotas(connection: sqlite3.Connection, name: str, quotas: Mapping[str, int | None]) -> tuple[int, *tuple[int | None, ...]]:
    """Set those of a tenant's quotas that are named; its id, and its own of `QUOTAS_WATCHED`. Refusal: not_found."""
    row = connection.execute(
        """update tenant set
               devices_most = iif(json_type(?1, '$.devices') is null, devices_most, ?1 ->> 'devices'),
               connections_most = iif(json_type(?1, '$.connections') is null, connections_most, ?1 ->> 'connections'),
               points_most = iif(json_type(?1, '$.points_per_day') is null, points_most, ?1 ->> 'points_per_day'),
               log_bytes_most = iif(json_type(?1, '$.log_bytes_per_day') is null, log_bytes_most, ?1 ->> 'log_bytes_per_day')
           where name = ?2 returning id, connections_most, points_most, log_bytes_most""",
        (*bind(quotas), name),
    ).fetchone()
    if row is None:
        raise Refusal("not_found")
    return cast("tuple[int, *tuple[int | None, ...]]", row)


def insert_tenant(connection: sqlite3.Connection, name: str, admin: NewSecret, quotas: Mapping[str, int | None]) -> None:
    """A new tenant with its first admin token. Refusal: tenant_exists."""
    row = connection.execute(
        "insert into tenant (name, created_at) values (?, ?) on conflict do nothing returning id", (name, now_ms())
    ).fetchone()
    if row is None:
        raise Refusal("tenant_exists")
    set_quotas(connection, name, quotas)
    insert_operator_token(connection, row[0], admin, "first admin", "admin")


def remove_tenant(connection: sqlite3.Connection, name: str) -> int:
    """Put a tenant out of reach with all that is its own; its id. `delete_removed` deletes it. Refusal: not_found."""
    row = connection.execute("update tenant set name = null where name = ? returning id", (name,)).fetchone()
    if row is None:
        raise Refusal("not_found")
    connection.execute("delete from operator_token where tenant_id = ?", row)
    connection.execute("delete from provisioning_key where tenant_id = ?", row)
    connection.execute("delete from rule where tenant_id = ?", row)
    for table in ("device_token", "log_token", "syslog_source"):
        connection.execute(f"delete from {table} where device_id in (select id from device where tenant_id = ?)", row)
    connection.execute("update device set name = null, removed_at = 0 where tenant_id = ?", row)
    connection.execute("update webhook set removed = 1, url = '', secret = null, old_secret = null where tenant_id = ?", row)
    return int(row[0])


DEVICES_SQL: Final = "(select count(*) from device where tenant_id = tenant.id and device.name is not null)"
# One tenant; :today counts days since 1970-01-01, the others are the installation's defaults.
QUOTAS_JSON: Final = f"""json_object(
    'devices', json_object('used', {DEVICES_SQL}, 'limit', coalesce(devices_most, :devices)),
    'connections', json_object('used', (
        select count(*) from device join presence on device_id = device.id
        where tenant_id = tenant.id and device.name is not null and connected),
        'limit', coalesce(connections_most, :connections)),
    'points_per_day', json_object('used', coalesce((select points from usage where tenant_id = tenant.id and day = :today), 0),
        'limit', coalesce(points_most, :points_per_day)),
    'log_bytes_per_day', json_object(
        'used', coalesce((select log_bytes from usage where tenant_id = tenant.id and day = :today), 0),
        'limit', coalesce(log_bytes_most, :log_bytes_per_day)))"""
TENANT_ROWS: Final = f"""select name position,
    json_object('name', name, 'created_at', {time_sql("created_at")}, 'quotas', json({QUOTAS_JSON})) item
    from tenant where name > :after order by name"""
AUDIT_JSON: Final = f"""json_object('id', id, 'at', {time_sql("at")}, 'token', token, 'name', name, 'role', role, 'action', action,
    'target', target, 'device', device, 'address', address, 'outcome', outcome, 'detail', json(detail))"""


@attrs.frozen
class DeviceToken:
    """What a device token stands for; the quotas of its tenant are None where it has none of its own."""

    token_id: str
    secret_hash: bytes
    device_id: int
    device: str
    tenant_id: int
    tenant: str
    connections_most: int | None
    points_most: int | None
    log_bytes_most: int | None
    day: int
    points_of_day: int
    log_bytes_of_day: int


@attrs.frozen
class OperatorToken:
    """What an operator token stands for; `tenant_id` None for the platform's own, `expires_at` None for never."""

    token_id: str
    secret_hash: bytes
    name: str
    role: str
    expires_at: int | None
    used_at: int | None
    tenant_id: int | None
    tenant: str | None


@attrs.frozen
class ProvisioningKey:
    """What a provisioning key stands for; whether it may provision one more device."""

    key_id: str
    secret_hash: bytes
    tenant_id: int
    usable: bool


# Which device it is, and what its tenant may use: the fields of `DeviceToken` after the secret.
HOLDER_COLUMNS: Final = """device.id, device.name, tenant.id, tenant.name, connections_most, points_most, log_bytes_most, :day,
    coalesce((select points from usage where usage.tenant_id = tenant.id and day = :day), 0),
    coalesce((select log_bytes from usage where usage.tenant_id = tenant.id and day = :day), 0)"""


class TokenReads:
    """Look-ups by the id part of a token or key; whether its secret is right the caller must find out. They are short, and have
    readers of their own: slow queries are kept from delaying them."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def device(self, token_id: str) -> DeviceToken | None:
        row = await self._readers.row(
            f"""select device_token.id, secret_hash, {HOLDER_COLUMNS}
                from device_token join device on device.id = device_id join tenant on tenant.id = tenant_id where device_token.id = :id""",
            {"id": token_id, "day": now_ms() // DAY},
        )
        return None if row is None else DeviceToken(*row)

    async def log_sender(self, token_id: str) -> DeviceToken | None:
        """Whose lines are those that show a log token."""
        row = await self._readers.row(
            f"""select log_token.id, secret_hash, {HOLDER_COLUMNS}
                from log_token join device on device.id = device_id join tenant on tenant.id = tenant_id
                where log_token.id = :id and disabled = 0""",
            {"id": token_id, "day": now_ms() // DAY},
        )
        return None if row is None else DeviceToken(*row)

    async def log_sources(self) -> list[tuple[str, DeviceToken]]:
        """Whose lines are those that come from an address: (network, device), for all tenants."""
        row = await self._readers.row(
            f"""select json_group_array(json_array(network, {HOLDER_COLUMNS}))
                from syslog_source cross join device on device.id = device_id join tenant on tenant.id = tenant_id where disabled = 0""",
            {"day": now_ms() // DAY},
        )
        return [(network, DeviceToken("", b"", *rest)) for network, *rest in orjson.loads(row[0] if row else "[]")]

    async def operator(self, token_id: str) -> OperatorToken | None:
        row = await self._readers.row(
            """select operator_token.id, secret_hash, operator_token.name, role, expires_at, used_at, tenant_id, tenant.name
               from operator_token left join tenant on tenant.id = tenant_id
               where operator_token.id = :id and (expires_at is null or expires_at > :now)""",
            {"id": token_id, "now": now_ms()},
        )
        return None if row is None else OperatorToken(*row)

    async def provisioning_key(self, key_id: str) -> ProvisioningKey | None:
        row = await self._readers.row(
            """select id, secret_hash, tenant_id, (expires_at is null or expires_at > :now) and (uses_left is null or uses_left > 0)
               from provisioning_key where id = :id""",
            {"id": key_id, "now": now_ms()},
        )
        return None if row is None else ProvisioningKey(*row)


ACTIONS_MOST: Final = 20  # that a filter looks for one by one; there are fewer
LOOK: Final = 1_000  # entries that are counted to find out of what there are fewer


@attrs.frozen
class Way:
    """How a part of a filter finds entries: each condition of `found` by the index before it, in the order of the entries' numbers. Left
    to itself SQLite may take another index. And how the same is looked at in entries that are found another way."""

    found: tuple[tuple[str, str], ...]
    checked: str

    def entries(self, columns: str, *checked: str) -> str:
        """SQL for them, between the numbers :low and :high."""
        rest = " and ".join(["id > :low and id < :high and at >= :start and at < :stop", *checked])
        return " union all ".join(
            f"select {columns} from audit indexed by {index} where tenant_id is :tenant and {condition} and {rest}"
            for index, condition in self.found
        )


@attrs.frozen
class AuditFilter:
    """Which entries of the audit: `actor` a token's name or id, `start` up to but without `stop` in milliseconds."""

    actor: str | None
    actions: tuple[str, ...] | None
    device: str | None
    start: int
    stop: int

    def ways(self) -> list[Way]:
        """One for each part that is asked for, those first that mostly pick out fewer entries; or the one to all entries."""
        ways = []
        if self.device is not None:
            ways.append(Way((("audit_by_device", "device = :device"),), "device = :device"))
        if self.actor is not None:
            found = ("audit_by_name", "name = :actor"), ("audit_by_token", "token = :actor and name <> :actor")
            ways.append(Way(found, "(name = :actor or token = :actor)"))
        if self.actions is not None:
            checked = "action in (select value from json_each(:actions))"
            each = tuple(("audit_by_action", f"action = :action_{number}") for number in range(len(self.actions)))
            ways.append(Way(each if len(each) <= ACTIONS_MOST else (("audit_by_tenant", checked),), checked))
        return ways or [Way((("audit_by_tenant", "true"),), "true")]

    @property
    def parameters(self) -> dict[str, object]:
        actions = self.actions or ()
        each = {f"action_{number}": action for number, action in enumerate(actions[:ACTIONS_MOST])}
        asked = {"actor": self.actor, "device": self.device, "actions": orjson.dumps(actions).decode()}
        return {**asked, **each, "start": self.start, "stop": self.stop}


def tenant_lines(connection: sqlite3.Connection, defaults: Mapping[str, int]) -> list[str]:
    """Every tenant as JSON, with what it uses and may use."""
    rows = connection.execute(f"select item from ({TENANT_ROWS})", {"after": "", "today": now_ms() // DAY, **defaults})
    return [row[0] for row in rows]


class AccountReads(Queries):
    """Queries over tokens, keys, tenants and the audit. A tenant of None is the platform, with what is its own."""

    async def operator_tokens(self, tenant: int | None, limit: int, after: str) -> str:
        return await self._list(
            f"""select id position, json_object('id', id, 'name', name, 'role', role, 'created_at', {time_sql("created_at")},
                       'expires_at', {time_sql("expires_at")}, 'used_at', {time_sql("used_at")}) item
                from operator_token where tenant_id is :tenant and id > :after order by id""",
            limit, tenant=tenant, after=after,
        )  # fmt: skip

    async def provisioning_keys(self, tenant: int, limit: int, after: str) -> str:
        return await self._list(
            f"""select id position, json_object('id', id, 'created_at', {time_sql("created_at")},
                       'expires_at', {time_sql("expires_at")}, 'uses_left', uses_left) item
                from provisioning_key where tenant_id = :tenant and id > :after order by id""",
            limit, tenant=tenant, after=after,
        )  # fmt: skip

    async def quotas(self, tenant: int, defaults: Mapping[str, int]) -> str | None:
        """What a tenant uses and may use."""
        return await self._json(f"select {QUOTAS_JSON} from tenant where id = :tenant", tenant=tenant, today=now_ms() // DAY, **defaults)

    async def tenants(self, limit: int, after: str, defaults: Mapping[str, int]) -> str:
        """For the platform alone: every tenant, with what it uses and may use."""
        return await self._list(TENANT_ROWS, limit, after=after, today=now_ms() // DAY, **defaults)

    async def audit(self, tenant: int | None, wanted: AuditFilter, limit: int, after: int) -> str:
        """A page of the audit, newest first; `after` is the id of the last entry seen."""
        low, high = await self._numbers("audit", tenant, wanted.start, wanted.stop)
        asked = {"tenant": tenant, "low": low, "high": min(high, after), **wanted.parameters}
        entries = await self._entries(f"id position, {AUDIT_JSON} item", wanted, asked)
        return await self._list(f"{entries} order by position desc", limit, **asked)

    async def audit_lines(self, tenant: int | None, wanted: AuditFilter, limit: int, after: int) -> tuple[str, int | None]:
        """So many entries after one, oldest first, a line of JSON each; and the last one's id, None at the end."""
        low, high = await self._numbers("audit", tenant, wanted.start, wanted.stop)
        asked = {"tenant": tenant, "low": max(low, after), "high": high, **wanted.parameters}
        entries = await self._entries(f"id, {AUDIT_JSON} item", wanted, asked)
        text = await self._json(
            f"""select json_array(group_concat(item, char(10)), iif(count(*) = :limit, max(id), null)) from (
                {entries} order by id limit :limit)""",
            limit=limit, **asked,
        )  # fmt: skip
        lines, last = orjson.loads(text or "[null, null]")
        return "" if lines is None else f"{lines}\n", last

    async def _entries(self, columns: str, wanted: AuditFilter, asked: Mapping[str, object]) -> str:
        """SQL for the entries that are wanted. They are found by the part of the filter that picks out the fewest, as far as a short
        look tells."""
        ways = wanted.ways()
        best = 0
        if len(ways) > 1:
            counts = (f"(select count(*) from ({way.entries('1')} limit {LOOK}))" for way in ways)
            found = orjson.loads(await self._json(f"select json_array({', '.join(counts)})", **asked) or "[0]")
            best = found.index(min(found))
        return ways[best].entries(columns, *(way.checked for number, way in enumerate(ways) if number != best))


# ==== Devices ====
# Owns: every line of SQL about devices: their names and tokens, sessions, timelines, states and configurations. Must not know:
# HTTP, sockets, the shape of frames.


class Committed(Protocol):
    """Who hands rows to the writer and wants to hear of their fate."""

    def committed(self, mark: tuple[int, int]) -> None:
        """Every frame up to `mark`, as it was given to `frame_taken`, is on disk."""

    def not_stored(self) -> None:
        """The storage failed: nothing more will be acknowledged."""

    def refused(self, code: str, seq: int) -> None:
        """The frame `seq` was consumed, but could not be taken."""


@attrs.frozen
class TimelineEntry:
    """An entry of a device's timeline; `arrival` counts what came before it in the same batch."""

    arrival: int
    device_id: int
    at: int
    kind: str
    detail: Mapping[str, object]


@attrs.frozen
class StateReport:
    """A state frame on its way to the disk."""

    owner: Committed
    device_id: int
    session: int
    seq: int
    at: int
    mode: str
    document: Mapping[str, Any]


@attrs.frozen
class VerdictReport:
    """A config_status frame on its way to the disk; `errors` as JSON text."""

    owner: Committed
    device_id: int
    seq: int
    at: int
    version: int
    status: str
    message: str | None
    errors: str | None


@attrs.frozen
class Parting:
    """A session that ended."""

    device_id: int
    session: int
    at: int
    reason: str
    address: str

    def event(self, arrival: int) -> TimelineEntry:
        detail = {"session": self.session, "reason": self.reason, "address": self.address}
        return TimelineEntry(arrival, self.device_id, self.at, "disconnected", detail)


def add_events(connection: sqlite3.Connection, rows: str, parameters: tuple[object, ...] | Mapping[str, object] = ()) -> None:
    """Entries of timelines: `rows` is SQL that yields (device_id, at, kind, detail, position), and they are added in that order."""
    connection.execute(
        f"""insert into event (tenant_id, device_id, at, kind, detail)
            select tenant_id, device.id, at, kind, detail from ({rows}) new join device on device.id = new.device_id order by position""",
        parameters,
    )


def insert_events(connection: sqlite3.Connection, events: list[TimelineEntry]) -> None:
    """Entries of timelines, in the order in which things came."""
    in_order = sorted(events, key=lambda event: event.arrival)
    for part in bind_in_parts((event.device_id, event.at, event.kind, event.detail) for event in in_order):
        add_events(
            connection,
            "select value ->> 0 device_id, value ->> 1 at, value ->> 2 kind, json(value ->> 3) detail, key position from json_each(?)",
            part,
        )


def add_event(connection: sqlite3.Connection, device_id: int, at: int, kind: str, detail: Mapping[str, object]) -> None:
    """One entry of a device's timeline."""
    insert_events(connection, [TimelineEntry(0, device_id, at, kind, detail)])


def settle_alerts(connection: sqlite3.Connection, which: str, reason: str, **parameters: object) -> None:
    """Open alerts are over, for a reason that is not in the readings; those that have not fired are as if they had never been."""
    told = {**parameters, "now": now_ms(), "reason": reason}
    add_events(
        connection,
        f"""select device_id, :now at, 'alert' kind, json_object(
                'alert', id, 'rule', rule, 'status', 'resolved', 'severity', severity, 'value', {exact_sql("value")}, 'text', text,
                'fired_at', {time_sql("fired_at")}, 'resolved_at', {time_sql(":now")}, 'reason', :reason) detail, id position
            from alert where {which} and resolved_at is null and fired_at is not null and catching_up = 0""",
        told,
    )
    connection.execute(f"delete from alert where {which} and resolved_at is null and fired_at is null", parameters)
    connection.execute(
        f"update alert set resolved_at = :now, changed_at = :now, reason = :reason where {which} and resolved_at is null", told
    )


def account_for_commands(connection: sqlite3.Connection, commands: str, action: str, detail: str) -> None:
    """Entries of the audit in the names of those who answer for commands; `commands` are numbers, a JSON text, `detail` SQL for JSON."""
    connection.execute(
        f"""insert into audit (tenant_id, at, token, name, role, action, target, device, address, outcome, detail)
            select device.tenant_id, :now, actor ->> 'token_id', actor ->> 'name', actor ->> 'role', :action, cast(command.id as text),
                device.name, actor ->> 'address', 'ok', {detail}
            from json_each(:commands) wanted cross join command on command.id = wanted.value cross join device on device.id = device_id
            cross join tenant on tenant.id = device.tenant_id where tenant.name is not null order by wanted.key""",
        {"commands": commands, "now": now_ms(), "action": action},
    )


def tell_of_commands(connection: sqlite3.Connection, commands: str) -> None:
    """Where commands stand now, in the timelines of their devices; their arguments are not for everybody who sees these."""
    add_events(
        connection,
        """select device_id, coalesce(ended_at, at) at, 'command' kind, wanted.key position, json_patch('{}', json_object(
               'command', command.id, 'status', status, 'exit_code', exit_code, 'message', message, 'by', actor ->> 'name')) detail
           from json_each(:commands) wanted cross join command on command.id = wanted.value""",
        {"commands": commands},
    )


def account_for_ends(connection: sqlite3.Connection, commands: str) -> None:
    seconds = "(ended_at - coalesce(started_at, ended_at)) / 1000.0"
    detail = f"json_object('status', status, 'exit_code', exit_code, 'seconds', {seconds}, 'output_bytes', output_bytes)"
    account_for_commands(connection, commands, "command.end", detail)


def tell_of_ends(connection: sqlite3.Connection, commands: str) -> None:
    """Commands are over."""
    tell_of_commands(connection, commands)
    account_for_ends(connection, commands)


def end_commands(connection: sqlite3.Connection, which: str, status: str, message: str, **parameters: object) -> list[tuple[int, int]]:
    """Commands are over without a word of their device; each as its number and its device's."""
    (rows,) = connection.execute(
        f"select json_group_array(json_array(id, device_id)) from command where ended_at is null and {which}", parameters
    ).fetchone()
    ended = sorted((number, device_id) for number, device_id in orjson.loads(rows))
    if ended:
        (numbers,) = bind([number for number, _ in ended])
        connection.execute(
            """update command set status = :status, message = :message, ended_at = :now, due_at = null
               where id in (select value from json_each(:numbers))""",
            {"status": status, "message": message, "now": now_ms(), "numbers": numbers},
        )
        tell_of_ends(connection, numbers)
    return ended


def end_unsendable(connection: sqlite3.Connection, devices: str) -> list[tuple[int, int]]:
    """Commands that were for sessions that are over; `devices` are numbers, a JSON text."""
    return end_commands(
        connection,
        """status = 'queued' and ttl is null and device_id in (select value from json_each(:devices))
           and exists (select 1 from presence where presence.device_id = command.device_id and connected = 0)""",
        "expired", "the device was disconnected before it was sent", devices=devices,
    )  # fmt: skip


def insert_device_token(
    connection: sqlite3.Connection, device_id: int, new: NewSecret, *, pending: bool, key_id: str | None = None
) -> None:
    """`pending`: its first use ends the token before it; `key_id`: it came by that provisioning key, and may be asked for again."""
    connection.execute(
        "insert into device_token (id, device_id, secret_hash, created_at, pending, key_id) values (?, ?, ?, ?, ?, ?)",
        (new.id, device_id, new.secret_hash, now_ms(), pending, key_id),
    )


def provisioned_token(connection: sqlite3.Connection, tenant_id: int, device: str, key_id: str, secret_hash: bytes) -> str | None:
    """The id of the token that a device got by a provisioning key and a secret of its own, None where there is none."""
    row = connection.execute(
        """select device_token.id from device_token join device on device.id = device_id
           where tenant_id = ? and name = ? and key_id = ? and secret_hash = ?""",
        (tenant_id, device, key_id, secret_hash),
    ).fetchone()
    return None if row is None else str(row[0])


def require_new_address(connection: sqlite3.Connection, tenant_id: int, name: str) -> None:
    """Refusal: device_exists, when a device has the same hardware address in other letters."""
    same_address = "select name from device where tenant_id = ? and lower(name) = lower(?) and name <> ?"
    taken = connection.execute(same_address, (tenant_id, name, name)).fetchone()
    if taken is not None:
        raise Refusal("device_exists", FieldError("device", f"is the same hardware address as {taken[0]}"))


def insert_device(
    connection: sqlite3.Connection, tenant_id: int, name: str, new: NewSecret, detail: Mapping[str, object], most: int = INTEGERS - 1,
    key_id: str | None = None,
) -> None:
    """A device with its first token, which it may ask for again if `key_id` is given; `most` devices for a tenant without a
    quota of its own. Refusal: device_exists, also for a hardware address in other letters; too_many_devices."""
    now = now_ms()
    if MAC_ADDRESS.fullmatch(name):
        require_new_address(connection, tenant_id, name)
    row = connection.execute(
        "insert into device (tenant_id, name, created_at) values (?, ?, ?) on conflict do nothing returning id", (tenant_id, name, now)
    ).fetchone()
    if row is None:
        raise Refusal("device_exists")
    (full,) = connection.execute(
        f"select {DEVICES_SQL} > coalesce(devices_most, ?) from tenant where id = ?", (most, tenant_id)
    ).fetchone()
    if full:
        raise Refusal("too_many_devices")
    connection.execute("insert into presence (device_id) values (?)", row)
    insert_device_token(connection, row[0], new, pending=False, key_id=key_id)
    add_event(connection, row[0], now, "credentials", {"token": new.id, **detail})


def device_row(connection: sqlite3.Connection, tenant_id: int, name: str) -> tuple[int, bool]:
    """A device's id, and whether it is disabled. Refusal: not_found."""
    row = connection.execute("select id, disabled from device where tenant_id = ? and name = ?", (tenant_id, name)).fetchone()
    if row is None:
        raise Refusal("not_found")
    return int(row[0]), bool(row[1])


def update_device(
    connection: sqlite3.Connection, tenant_id: int, name: str, patch: DevicePatch, by: Mapping[str, object], most_labels: int
) -> int:
    """Disable or enable a device, and patch its labels; its id. Refusal: not_found, invalid beyond `most_labels`."""
    device_id, was_disabled = device_row(connection, tenant_id, name)
    if patch.disabled is not None and patch.disabled != was_disabled:
        connection.execute("update device set disabled = ? where id = ?", (patch.disabled, device_id))
        add_event(connection, device_id, now_ms(), "credentials", {"disabled": patch.disabled, **by})
        if patch.disabled:
            settle_alerts(connection, "device_id = :id", "the device was disabled", id=device_id)
    if patch.labels:
        connection.execute("update device set labels = json_patch(labels, ?) where id = ?", (*bind(patch.labels), device_id))
        (count,) = connection.execute("select count(*) from device, json_each(labels) where device.id = ?", (device_id,)).fetchone()
        if count > most_labels:
            raise Refusal("invalid", FieldError("labels", f"would be more than {most_labels}"))
    return device_id


def rotate_token(
    connection: sqlite3.Connection, tenant_id: int, name: str, new: NewSecret, by: Mapping[str, object], *, revoke: bool
) -> int:
    """Give a device a new token; its id. The old one ends with the first use of the new, or now with `revoke`. Refusal: not_found."""
    device_id, _ = device_row(connection, tenant_id, name)
    connection.execute("delete from device_token where device_id = ? and (pending or ?)", (device_id, revoke))
    insert_device_token(connection, device_id, new, pending=not revoke)
    add_event(connection, device_id, now_ms(), "credentials", {"token": new.id, "revoked": revoke, **by})
    return device_id


def insert_log_token(connection: sqlite3.Connection, tenant_id: int, name: str, new: NewSecret, most: int, *, revoke: bool) -> None:
    """Give a device one more token for its lines alone; with `revoke` those before it end. Refusal: not_found, invalid (too many)."""
    device_id, _ = device_row(connection, tenant_id, name)
    if revoke:
        connection.execute("delete from log_token where device_id = ?", (device_id,))
    (count,) = connection.execute("select count(*) from log_token where device_id = ?", (device_id,)).fetchone()
    if count >= most:
        raise Refusal("invalid", FieldError("revoke", f"the device has {most} log tokens: end those before with true"))
    connection.execute(
        "insert into log_token (id, device_id, secret_hash, created_at) values (?, ?, ?, ?)", (new.id, device_id, new.secret_hash, now_ms())
    )


def delete_log_tokens(connection: sqlite3.Connection, tenant_id: int, name: str) -> None:
    """Refusal: not_found."""
    device_id, _ = device_row(connection, tenant_id, name)
    connection.execute("delete from log_token where device_id = ?", (device_id,))


def overlap(networks: Iterable[str], others: Iterable[str]) -> str | None:
    """The first of the networks that has an address of one of the others."""
    theirs = [ipaddress.ip_network(other) for other in others]
    for text in networks:
        network = ipaddress.ip_network(text)
        if any(network.version == other.version and network.overlaps(other) for other in theirs):
            return text
    return None


def too_large(networks: Iterable[str], bits: int) -> str | None:
    """The first of the networks that has more addresses than so many bits tell apart, of IPv6 more networks of 64 bits."""
    for text in networks:
        network = ipaddress.ip_network(text)
        if network.max_prefixlen - network.prefixlen > bits + (64 if network.version == 6 else 0):
            return text
    return None


def set_syslog_sources(connection: sqlite3.Connection, tenant_id: int, name: str, networks: list[str], limits: Limits) -> None:
    """The networks whose lines are a device's, instead of those before. Refusal: not_found; source_taken, by another device; invalid,
    where several tenants share the server and one of the networks is too large."""
    device_id, _ = device_row(connection, tenant_id, name)
    connection.execute("delete from syslog_source where device_id = ?", (device_id,))
    taken = connection.execute(
        "select network from syslog_source where network in (select value from json_each(?))", bind(networks)
    ).fetchone()
    if taken is not None:
        raise Refusal("source_taken", FieldError("addresses", f"{taken[0]} belongs to another device"))
    others = connection.execute(
        "select network from syslog_source cross join device on device.id = device_id where tenant_id <> ?", (tenant_id,)
    )
    (tenants,) = connection.execute("select count(*) from (select 1 from tenant where name is not null limit 2)").fetchone()
    if tenants > 1 and (large := too_large(networks, limits.source_bits)) is not None:
        raise Refusal("invalid", FieldError("addresses", f"{large} is larger than a /16, or a /48 of IPv6: tenants share this server"))
    if (shared := overlap(networks, (network for (network,) in others))) is not None:
        raise Refusal("source_taken", FieldError("addresses", f"{shared} has addresses of another device"))
    connection.execute(
        "insert into syslog_source (network, device_id) select distinct value, ?2 from json_each(?1)", (*bind(networks), device_id)
    )


def use_device_token(connection: sqlite3.Connection, device_id: int, token_id: str, address: str) -> None:
    """A device shows its token: if it is a new one, the one before it ends. Refusal: unauthorized when the token is gone by
    now, device_disabled."""
    row = connection.execute(
        "select pending, disabled from device_token join device on device.id = device_id where device_token.id = ? and device_id = ?",
        (token_id, device_id),
    ).fetchone()
    if row is None:
        raise Refusal("unauthorized")
    pending, disabled = row
    if disabled:
        raise Refusal("device_disabled")
    if pending:
        connection.execute("delete from device_token where device_id = ? and id <> ?", (device_id, token_id))
        connection.execute("update device_token set pending = 0 where id = ?", (token_id,))
        add_event(connection, device_id, now_ms(), "credentials", {"token": token_id, "first_use": True, "address": address})


@attrs.frozen
class SessionRow:
    """A session as the database has it: its number, the highest frame number on disk, the last time given to a sample
    without one, the configuration that the device is owed, whether it has commands that are not over, the known series by metric,
    and of those that have points ahead of the clock the newest time."""

    session: int
    seq: int
    stamp: int
    config: Config | None
    has_commands: bool
    series: dict[str, str]
    ahead: dict[str, int]


def times_ahead(connection: sqlite3.Connection, device_id: int, now: int, newest: int) -> dict[str, int]:
    """By metric, the newest time of a device's points after now, up to the newest that it was given; mostly there is none."""
    if newest <= now:
        return {}
    (text,) = connection.execute(
        """select json_group_object(metric, ts) from (
               select metric, (select max(ts) from telemetry where series_id = series.id and ts > ?2 and ts <= ?3) ts
               from series where device_id = ?1) where ts is not null""",
        (device_id, now, newest),
    ).fetchone()
    return cast("dict[str, int]", orjson.loads(text))


def open_session(connection: sqlite3.Connection, device_id: int, token_id: str, address: str, agent: str | None) -> SessionRow:
    """Record that a device connected. Refusal: unauthorized when its token is gone by now, device_disabled."""
    use_device_token(connection, device_id, token_id, address)
    now = now_ms()
    session, seq, stamp = connection.execute(
        """update presence set session = session + 1, connected = 1, connected_at = ?1, seen_at = ?1, address = ?2, agent = ?3
           where device_id = ?4 returning session, seq, stamp""",
        (now, address, agent, device_id),
    ).fetchone()
    add_event(connection, device_id, now, "connected", {"session": session, "address": address, "agent": agent})
    (series,) = connection.execute(
        "select json_group_object(metric, cast(id as text)) from series where device_id = ?", (device_id,)
    ).fetchone()
    owed = connection.execute(
        """select config.version, text from config join presence using (device_id) join document on document.id = document_id
           where device_id = ? and config.version = config_version and status not in ('applied', 'rejected')""",
        (device_id,),
    ).fetchone()
    config = None if owed is None else Config(owed[0], orjson.loads(owed[1]))
    has_commands = connection.execute("select 1 from command where device_id = ? and ended_at is null", (device_id,)).fetchone() is not None
    return SessionRow(session, seq, stamp, config, has_commands, orjson.loads(series), times_ahead(connection, device_id, now, stamp))


def set_seq(connection: sqlite3.Connection, device_id: int, seq: int) -> None:
    connection.execute("update presence set seq = ? where device_id = ?", (seq, device_id))


def reset_seq(connection: sqlite3.Connection, tenant_id: int, name: str, seq: int, by: Mapping[str, object]) -> int:
    """Say anew which frame of a device is the highest on disk; its id. Refusal: not_found."""
    device_id, _ = device_row(connection, tenant_id, name)
    set_seq(connection, device_id, seq)
    add_event(connection, device_id, now_ms(), "counter", {"seq": seq, **by})
    return device_id


def remove_device(connection: sqlite3.Connection, tenant_id: int, name: str, by: Mapping[str, object] = MappingProxyType({})) -> int:
    """Put a device out of reach with all that is known of it; its id. `delete_removed` deletes it. Refusal: not_found."""
    device_id, _ = device_row(connection, tenant_id, name)
    now = now_ms()
    add_event(connection, device_id, now, "removed", {**by})
    connection.execute("delete from device_token where device_id = ?", (device_id,))
    connection.execute("delete from log_token where device_id = ?", (device_id,))
    connection.execute("delete from syslog_source where device_id = ?", (device_id,))
    settle_alerts(connection, "device_id = :id", "the device was removed", id=device_id)
    end_commands(connection, "device_id = :id", "cancelled", "the device was removed", id=device_id)
    connection.execute("delete from late_reading where device_id = ?", (device_id,))
    connection.execute("update device set old_name = name, name = null, removed_at = ? where id = ?", (now, device_id))
    return device_id


def close_crashed_sessions(connection: sqlite3.Connection) -> int:
    """Close the sessions that a crash left open, at the last moment at which they are known to have lived."""
    add_events(
        connection,
        """select device_id, coalesce(seen_at, connected_at) at, 'disconnected' kind,
                  json_object('session', session, 'reason', 'crashed', 'address', address) detail, device_id position
           from presence where connected""",
    )
    (devices,) = connection.execute("select json_group_array(device_id) from presence where connected").fetchone()
    closed = connection.execute(
        "update presence set connected = 0, disconnected_at = coalesce(seen_at, connected_at) where connected"
    ).rowcount
    end_unsendable(connection, devices)
    return closed


STATE_COLUMNS: Final = "device_id, version, at, session, document, changes"


StateRow = tuple[int, int, int, int, str, str]  # as `STATE_COLUMNS` has them


def insert_long_states(connection: sqlite3.Connection, rows: Iterable[StateRow]) -> Iterator[StateRow]:
    """Store those with a long text, each as it is bound: as JSON SQLite would read the text once for each column. The others come back."""
    for row in rows:
        if len(row[4]) + len(row[5]) >= LONG_TEXT:
            connection.execute(f"insert into state ({STATE_COLUMNS}) values (?, ?, ?, ?, ?, ?)", row)
        else:
            yield row


def insert_states(connection: sqlite3.Connection, rows: Iterable[StateRow]) -> None:
    for part in bind_in_parts(insert_long_states(connection, rows)):
        connection.execute(
            f"""insert into state ({STATE_COLUMNS})
                select value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5 from json_each(?)""",
            part,
        )


def show_software(connection: sqlite3.Connection, reported: Mapping[int, object], characters: int) -> None:
    """The software versions that devices report, by device, of which so many characters are shown; what is no text is none."""
    shown = {str(device_id): version[:characters] if isinstance(version, str) else None for device_id, version in reported.items()}
    connection.execute(
        "update presence set software_version = value from json_each(?) where device_id = cast(key as integer)",
        bind(shown),
    )


@attrs.define
class Reported:
    """What a device reports of itself, as a batch of reports changes it."""

    version: int
    document: dict[str, Any]

    def take(self, report: StateReport, limits: Limits) -> list[dict[str, Any]]:
        """Apply a report; what it changes. Refusal: document_too_large; then nothing is changed.

        A patch costs as its own size, not as the document's; and nesting does not grow by what is nested no deeper itself.
        """
        old = self.document
        if report.mode == "merge":
            changes = list(merge_into(old, report.document))
        else:
            self.document = dict(report.document)
            changes = list(changes_between(old, self.document))
        if changes and len(orjson.dumps(self.document)) > limits.document_bytes:
            if self.document is old:
                apply_changes(old, changes, back=True)
            self.document = old
            raise Refusal("document_too_large")
        return changes


def reported_by(connection: sqlite3.Connection, devices: Iterable[int]) -> dict[int, Reported]:
    """What devices reported last; those are left out that have not."""
    (text,) = connection.execute(
        """select json_group_array(json_array(device_id, version, json(document)))
           from (select distinct value id from json_each(?)) reporting join state on device_id = reporting.id
           where version = (select max(version) from state last where last.device_id = reporting.id)""",
        bind(list(devices)),
    ).fetchone()
    return {device_id: Reported(version, document) for device_id, version, document in orjson.loads(text)}


def shorten_states(connection: sqlite3.Connection, versions: list[tuple[int, int]]) -> None:
    """Of versions, as device and number, that are not the newest any more, what they changed says enough."""
    connection.execute(
        "update state set document = '' where (device_id, version) in (select value ->> 0, value ->> 1 from json_each(?))", bind(versions)
    )


def new_versions(
    reported: Reported, reports: list[tuple[int, StateReport]], events: list[TimelineEntry], refused: list[tuple[Committed, str, int]],
    limits: Limits,
) -> Iterator[StateRow]:
    """What one device reports, as rows for `insert_states`."""
    row: StateRow | None = None
    for arrival, report in reports:
        try:
            changes = reported.take(report, limits)
        except Refusal as refusal:
            refused.append((report.owner, refusal.fault.code, report.seq))
            continue
        if not changes and reported.version:
            continue
        if row is not None:
            yield row
        reported.version += 1
        events.append(TimelineEntry(arrival, report.device_id, report.at, "state", {"version": reported.version}))
        whole = canonical(reported.document).decode() if reported.version % limits.state_versions == 1 else ""
        told = changes_text(changes, reported.document, 4 * limits.document_bytes).decode()
        row = (report.device_id, reported.version, report.at, report.session, whole, told)
    if row is not None:
        yield (*row[:4], canonical(reported.document).decode(), row[5])


REPORTING: Final = 64  # devices whose documents are in memory at one time


def write_states(
    connection: sqlite3.Connection, reports: list[tuple[int, StateReport]], events: list[TimelineEntry], limits: Limits
) -> list[tuple[Committed, str, int]]:
    """What devices report, each in order of arrival: a version for every actual change; which reports are refused, as (owner, code, seq).

    The newest version has the whole document, and so has one now and then; the others have what changed.
    """
    by_device: dict[int, list[tuple[int, StateReport]]] = {}
    for arrival, report in reports:
        by_device.setdefault(report.device_id, []).append((arrival, report))
    refused: list[tuple[Committed, str, int]] = []
    waiting = iter(by_device)
    while devices := list(islice(waiting, REPORTING)):
        known = reported_by(connection, devices)
        before = {device_id: reported.version for device_id, reported in known.items()}
        rows = (
            row
            for device_id in devices
            for row in new_versions(known.setdefault(device_id, Reported(0, {})), by_device[device_id], events, refused, limits)
        )
        insert_states(connection, rows)
        changed = [device_id for device_id in devices if known[device_id].version > before.get(device_id, 0)]
        show_software(connection, {key: known[key].document.get("software_version") for key in changed}, limits.shown_characters)
        shorten_states(connection, [(key, before[key]) for key in changed if key in before and before[key] % limits.state_versions != 1])
    return refused


# A configuration whose verdict is awaited: its device, its version, and for how many milliseconds.
AWAITED_SQL: Final = """select json_group_array(json_array(config.device_id, config.version, timeout)) from config
    where status in ('sent', 'in_progress')"""


def write_configs_sent(connection: sqlite3.Connection, sent: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Configurations that went out on a socket. Answers those of them whose verdict is awaited from now on, as `Awaited` takes them."""
    rows = bind(sent)
    connection.execute(
        """update config set sent_at = new.value ->> 2,
               status_at = case when status in ('pending', 'in_progress') then new.value ->> 2 else status_at end,
               status = case when status in ('pending', 'in_progress') then 'sent' else status end
           from json_each(?) new where device_id = new.value ->> 0 and version = new.value ->> 1""",
        rows,
    )
    (awaited,) = connection.execute(
        f"{AWAITED_SQL} and (device_id, version) in (select value ->> 0, value ->> 1 from json_each(?))", rows
    ).fetchone()
    return [(device_id, version, timeout) for device_id, version, timeout in orjson.loads(awaited)]


def update_verdicts(connection: sqlite3.Connection, rows: tuple[str]) -> set[int]:
    """Rows of (device, version, status, message, errors, at, index), in order; the indexes of those on versions that were never sent."""
    (unknown,) = connection.execute(
        """select json_group_array(said.value ->> 6) from json_each(?) said
           left join config on device_id = said.value ->> 0 and version = said.value ->> 1 where sent_at is null""",
        rows,
    ).fetchone()
    connection.execute(
        """update config set status = new.status, status_at = new.at, message = new.message, errors = new.errors
           from (select value ->> 0 device_id, value ->> 1 version, value ->> 2 status, value ->> 3 message, value ->> 4 errors,
                        value ->> 5 at, max(key) from json_each(?) group by 1, 2) new
           where config.device_id = new.device_id and config.version = new.version and sent_at is not null
           and (new.status <> 'in_progress' or config.status in ('sent', 'in_progress'))""",
        rows,
    )
    connection.execute(
        """update presence set config_applied = new.version
           from (select value ->> 0 device_id, value ->> 1 version, max(said.key) from json_each(?) said
                 join config on device_id = value ->> 0 and version = value ->> 1
                 where sent_at is not null and value ->> 2 = 'applied' group by 1) new
           where presence.device_id = new.device_id""",
        rows,
    )
    return set(orjson.loads(unknown))


def write_verdicts(
    connection: sqlite3.Connection, verdicts: list[tuple[int, VerdictReport]], events: list[TimelineEntry]
) -> list[tuple[Committed, str, int]]:
    """What devices say of their configurations, in order of arrival; which of it is refused, as (owner, code, seq).

    The last verdict on a version is the one it has. A version that was superseded, or timed out, is changed by a final verdict
    alone: that the device is still at work on it says nothing new.
    """
    refused: set[int] = set()
    rows = ([v.device_id, v.version, v.status, v.message, v.errors, v.at, index] for index, (_, v) in enumerate(verdicts))
    for part in bind_in_parts(rows):
        refused |= update_verdicts(connection, part)
    for index, (arrival, said) in enumerate(verdicts):
        if index not in refused:
            detail = {"version": said.version, "status": said.status}
            more = {"message": said.message, "errors": said.errors and orjson.Fragment(said.errors)}
            shown = detail | {name: value for name, value in more.items() if value is not None}
            events.append(TimelineEntry(arrival, said.device_id, said.at, "config", shown))
    return [(said.owner, "unknown_version", said.seq) for index, (_, said) in enumerate(verdicts) if index in refused]


@attrs.frozen
class Pushed:
    """One row of a push: which version of its configuration the device is now wanted to have."""

    device_id: int
    device: str
    version: int


@attrs.frozen
class NewConfig:
    """A configuration to be pushed: its JSON text, whose token pushed it, and the milliseconds until `timed_out`; with
    `document_id` the text is in the database already."""

    document: str
    author: str
    timeout: int
    document_id: int | None = None


def push_config(connection: sqlite3.Connection, devices: list[int], new: NewConfig) -> list[Pushed]:
    """A new version of the wanted configuration for every device, in their order; what it supersedes, and is not final, says so."""
    if not devices:
        return []
    now, ids, document_id = now_ms(), bind(devices), new.document_id
    if document_id is None:
        (document_id,) = connection.execute("insert into document (text) values (?) returning id", (new.document,)).fetchone()
    connection.execute(
        """update config set status = 'superseded', status_at = ?2 from json_each(?1) wanted, presence
           where presence.device_id = wanted.value and config.device_id = presence.device_id and version = config_version
           and status in ('pending', 'sent', 'in_progress', 'timed_out')""",
        (*ids, now),
    )
    connection.execute("update presence set config_version = config_version + 1 where device_id in (select value from json_each(?))", ids)
    connection.execute(
        """insert into config (device_id, version, document_id, at, author, timeout, status, status_at)
           select device_id, config_version, ?2, ?3, ?4, ?5, 'pending', ?3
           from presence where device_id in (select value from json_each(?1))""",
        (*ids, document_id, now, new.author, new.timeout),
    )
    add_events(
        connection,
        """select device_id, ?2 at, 'config' kind, json_object('version', config_version, 'status', 'pending', 'by', ?3) detail,
                  wanted.key position
           from json_each(?1) wanted join presence on device_id = wanted.value""",
        (*ids, now, new.author),
    )
    (rows,) = connection.execute(
        """select json_group_array(json_array(id, name, config_version)) from (
               select device.id, name, config_version from json_each(?) wanted join device on device.id = wanted.value
               join presence on device_id = device.id order by wanted.key)""",
        ids,
    ).fetchone()
    return [Pushed(*row) for row in orjson.loads(rows)]


def pushed_to(rows: Iterable[Pushed], **detail: object) -> list[Affected]:
    """What a push did, for the audit."""
    return [Affected(row.device, row.device, {"version": row.version, **detail}) for row in rows]


def begin_push(connection: sqlite3.Connection, actor: Actor, match: str, new: NewConfig) -> tuple[int, int]:
    """Enter a push to every device whose name matches, which `make_part_of_push` makes; how many there are, and the number of its
    document, 0 without any."""
    matching = "select count(*) from device where tenant_id = ? and name glob ?"
    (count,) = connection.execute(matching, (actor.tenant_id, match)).fetchone()
    if not count:
        return 0, 0
    (document_id,) = connection.execute("insert into document (text) values (?) returning id", (new.document,)).fetchone()
    connection.execute(
        """insert into push (tenant_id, match, document_id, timeout, newest, done, actor)
           select ?, ?, ?, ?, max(id), '', ? from device""",
        (actor.tenant_id, match, document_id, new.timeout, orjson.dumps(attrs.asdict(actor)).decode()),
    )
    return count, document_id


@attrs.frozen
class PushPart:
    """A part of a push to many devices: what it pushed, as JSON text and to whom; and whether it was the last."""

    document_id: int
    document: str
    rows: list[Pushed]
    last: bool


PUSH_SQL: Final = """select push.id, match, document_id, text, timeout, newest, done, actor
    from push join document on document.id = document_id where tenant_id = ?1"""


def delete_unused_documents(connection: sqlite3.Connection, documents: list[int]) -> None:
    """Those of them that no configuration has."""
    connection.execute(
        """delete from document where id in (select value from json_each(?))
           and not exists (select 1 from config where document_id = document.id)
           and not exists (select 1 from push where document_id = document.id)""",
        bind(documents),
    )


def push_on_behalf(connection: sqlite3.Connection, push: tuple[Any, ...], devices: list[int]) -> list[Pushed]:
    """Give the configuration of a push to some of its devices."""
    _, match, document_id, text, timeout, _, _, actor = push
    who = Actor(**orjson.loads(actor))
    rows = push_config(connection, devices, NewConfig(text, who.name, timeout, document_id))
    add_entries(connection, who, "config.push", "ok", pushed_to(rows, match=match))
    return rows


def make_part_of_push(connection: sqlite3.Connection, tenant_id: int, most: int) -> PushPart | None:
    """Give the oldest push of a tenant to so many more of its devices, in the order of their names. A device that has it already was
    pushed to meanwhile (`make_pushes_to`), and is left out."""
    push = connection.execute(f"{PUSH_SQL} order by push.id limit 1", (tenant_id,)).fetchone()
    if push is None:
        return None
    number, match, document_id, text, _, newest, done, _ = push
    (found,) = connection.execute(
        """select json_group_array(json_array(name, id, exists (
               select 1 from config where document_id = :document_id and device_id = device.id)))
           from (select name, id from device where tenant_id = :tenant_id and name > :done and name glob :match and id <= :newest
                 order by name limit :most) device""",
        {"tenant_id": tenant_id, "done": done, "match": match, "newest": newest, "document_id": document_id, "most": most},
    ).fetchone()
    devices = orjson.loads(found)
    rows = push_on_behalf(connection, push, [device_id for _, device_id, has_it in devices if not has_it])
    if len(devices) < most:
        connection.execute("delete from push where id = ?", (number,))
        delete_unused_documents(connection, [document_id])
    else:
        connection.execute("update push set done = ? where id = ?", (devices[-1][0], number))
    return PushPart(document_id, text, rows, len(devices) < most)


def make_pushes_to(connection: sqlite3.Connection, tenant_id: int, device_id: int, name: str) -> None:
    """Give a device what it was to be given by pushes that are under way: what comes now is newer."""
    owed = f"""{PUSH_SQL} and done < ?2 and ?2 glob match and newest >= ?3
        and not exists (select 1 from config where config.document_id = push.document_id and device_id = ?3) order by push.id"""
    for push in connection.execute(owed, (tenant_id, name, device_id)).fetchall():
        push_on_behalf(connection, push, [device_id])


def push_to_one(
    connection: sqlite3.Connection, tenant_id: int, device: str, new: NewConfig, require: Callable[[int], None] = lambda _: None
) -> Pushed:
    """Refusal: not_found, and what `require` says to the version that is wanted so far."""
    row = connection.execute("select id from device where tenant_id = ? and name = ?", (tenant_id, device)).fetchone()
    if row is None:
        raise Refusal("not_found")
    make_pushes_to(connection, tenant_id, row[0], device)
    require(*connection.execute("select config_version from presence where device_id = ?", (row[0],)).fetchone())
    return push_config(connection, [row[0]], new)[0]


def roll_back(
    connection: sqlite3.Connection, tenant_id: int, device: str, version: int, new: NewConfig, require: Callable[[int], None]
) -> tuple[Pushed, str]:
    """Push the document of an earlier version; it, too. Refusal: not_found, unknown_version, and what `require` says to the
    version that is wanted so far."""
    device_id, _ = device_row(connection, tenant_id, device)
    row = connection.execute(
        "select text, document_id from config join document on document.id = document_id where device_id = ? and version = ?",
        (device_id, version),
    ).fetchone()
    if row is None:
        raise Refusal("unknown_version", FieldError("version", f"{version} was never pushed to {device}"))
    return push_to_one(connection, tenant_id, device, attrs.evolve(new, document=row[0], document_id=row[1]), require), row[0]


def time_out_configs(connection: sqlite3.Connection, late: list[tuple[int, int]]) -> int:
    """Mark the configurations, as device and version, for which no verdict came in time; how many."""
    rows = (*bind(late), now_ms())
    no_verdict = """status in ('sent', 'in_progress')
        and (device_id, version) in (select value ->> 0, value ->> 1 from json_each(?1))"""
    add_events(
        connection,
        f"""select device_id, ?2 at, 'config' kind, json_object('version', version, 'status', 'timed_out') detail, device_id position
            from config where {no_verdict}""",
        rows,
    )
    return connection.execute(f"update config set status = 'timed_out', status_at = ?2 where {no_verdict}", rows).rowcount


DRIFTED_SQL: Final = "coalesce(config_applied, 0) <> config_version"
DRIFT_SQL: Final = f"json(iif({DRIFTED_SQL}, 'true', 'false'))"
DEVICE_FIELDS: Final = f"""
    'device', device.name, 'connected', json(iif(connected, 'true', 'false')),
    'connected_at', {time_sql("connected_at")}, 'disconnected_at', {time_sql("disconnected_at")},
    'seen_at', {time_sql("seen_at")}, 'created_at', {time_sql("device.created_at")}, 'agent', agent,
    'software_version', software_version, 'disabled', json(iif(disabled, 'true', 'false')), 'labels', json(labels),
    'config', iif(config_version = 0, null, json_object(
        'version', config_version, 'applied', config_applied, 'status', config.status,
        'drift', {DRIFT_SQL}))"""
# A row for every device of a tenant, with where it stands and the configuration that it is wanted to have.
DEVICE_ROWS: Final = """device join presence on presence.device_id = device.id
    left join config on config.device_id = device.id and config.version = config_version"""
# An event of the live feed; a device that was removed still has its name there.
EVENT_JSON: Final = f"""json_patch(json_object('id', event.id, 'device', coalesce(name, old_name), 'kind', kind,
    'at', {time_sql("at")}), detail)"""
# A version of what a device reports; the last whole document up to it; and the changes since that.
STATE_JSON: Final = f"""json_array(
    json_object('device', device.name, 'version', state.version, 'at', {time_sql("state.at")}, 'session', state.session),
    json((select document from state whole where whole.device_id = state.device_id and whole.version <= state.version
          and document <> '' order by version desc limit 1)),
    json((select json_group_array(json(changes)) from (
        select changes from state later where later.device_id = state.device_id and later.version <= state.version
        and later.version > (select max(version) from state whole where whole.device_id = state.device_id
                             and whole.version <= state.version and document <> '') order by version))))"""
CONFIG_JSON: Final = f"""json_object('version', config.version, 'status', status, 'status_at', {time_sql("status_at")},
    'at', {time_sql("config.at")}, 'by', author, 'sent_at', {time_sql("sent_at")}, 'timeout', timeout / 1000.0,
    'message', message, 'errors', json(errors), 'document', json((select text from document where document.id = document_id)))"""


class PushReads:
    """Which pushes to many devices are under way. These are short, and share the readers of the tokens."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def tenants(self) -> list[int]:
        """Numbers of the tenants that have some."""
        row = await self._readers.row("select json_group_array(tenant_id) from (select distinct tenant_id from push)", {})
        return cast("list[int]", orjson.loads(row[0])) if row else []

    async def is_under_way(self, document_id: int) -> bool:
        return await self._readers.row("select 1 from push where document_id = :document_id", {"document_id": document_id}) is not None


class NewsReads:
    """What happened, in all tenants, for the one task that tells it. These are short, and share the readers of the tokens."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def newest(self) -> int:
        row = await self._readers.row("select coalesce(max(id), 0) from event", {})
        return int(row[0]) if row else 0

    async def highest(self) -> int:
        """The highest number that an event ever had; the newest events may have gone with their device."""
        row = await self._readers.row("select seq from sqlite_sequence where name = 'event'", {})
        return int(row[0]) if row else 0

    async def after(self, last: int, limit: int) -> list[tuple[int, int, str, str]]:
        """The events after one, oldest first: (tenant, id, kind, JSON)."""
        row = await self._readers.row(
            f"""select json_group_array(json_array(tenant_id, id, kind, item)) from (
                select event.tenant_id tenant_id, event.id id, kind, {EVENT_JSON} item from event join device on device.id = device_id
                where event.id > :last and coalesce(name, old_name) is not null order by event.id limit :limit)""",
            {"last": last, "limit": limit},
        )
        return cast("list[tuple[int, int, str, str]]", orjson.loads(row[0]) if row else [])


# ==== Readings ====
# Owns: every line of SQL that asks for readings. Must not know: HTTP, the shape of frames.

LATEST_JSON: Final = f"""(select json_group_object(metric, json(point)) from (
    select metric, (select json_object('time', {time_sql("ts")}, 'value', {exact_sql("value")})
                    from telemetry where series_id = series.id order by ts desc limit 1) point
    from series where device_id = device.id order by metric) where point is not null)"""
# The series that a query is about, in the order asked: (id, metric), id null where the device has no such metric.
WANTED_SQL: Final = """device_row as (
        select id from device where tenant_id = :tenant and name = :device and (:device_id is null or id = :device_id)),
    wanted as (
        select series.id, asked.value metric from json_each(:metrics) asked
        left join series on metric = asked.value and device_id = (select id from device_row)
        union all
        select * from (select id, metric from series where :metrics is null and device_id = (select id from device_row) order by metric)),
    page_size as (select max(1, min(:limit, :together / max(1, (select count(*) from wanted)))) points)"""


@attrs.frozen
class TelemetryRange:
    """Which points: metrics (None: all), from `start` up to but without `stop`, in milliseconds, newest first if `descending`; with
    `device_id`, only of this one of the devices that have the same name one after the other."""

    metrics: tuple[str, ...] | None
    start: int
    stop: int
    descending: bool = False
    device_id: int | None = None


def row_sql(values: Iterable[str], names: Iterable[str] = ()) -> str:
    """SQL for a row's JSON: an array, or an object if the values have names."""
    named = [f"'{name}', {value}" for name, value in zip(names, values, strict=True)] if names else []
    return f"json_object({', '.join(named)})" if named else f"json_array({', '.join(values)})"


class TelemetryReads:
    """Queries over the readings of one device of one tenant."""

    def __init__(self, readers: Readers, limits: Limits) -> None:
        self._readers = readers
        self._limits = limits

    async def points(self, tenant: int, device: str, wanted: TelemetryRange, limit: int) -> bytes | None:
        """One page of points as JSON, None if there is no such device.

        A page is a stretch of time: it ends before the first point that would be one too many for some series, so that all
        series are complete in it, and `next` is where the stretch after it starts.
        """
        order, most = ("desc", "max") if wanted.descending else ("asc", "min")
        within = (  # a bound on each side, so that the key serves it
            "ts > coalesce((select ts from cut), :start - 1) and ts < :stop"
            if wanted.descending
            else "ts >= :start and ts < coalesce((select ts from cut), :stop)"
        )
        return await self._page(
            f"""with {WANTED_SQL},
            cut as (select {most}(ts) ts from (
                select (select ts from telemetry where series_id = wanted.id and ts >= :start and ts < :stop
                        order by ts {order} limit 1 offset (select points from page_size)) ts from wanted) where ts is not null)
            select json_object('device', :device, 'series', (
                select json_group_array(json_object('metric', metric, 'points', json((
                    select json_group_array(json_array({time_sql("ts")}, {exact_sql("value")})) from (
                        select ts, value from telemetry where series_id = wanted.id and {within} order by ts {order})))))
                from wanted), 'next', (select {time_sql("ts + 1" if wanted.descending else "ts")} from cut))
            from device_row""",
            tenant, device, wanted, limit,
        )  # fmt: skip

    async def buckets(
        self, tenant: int, device: str, wanted: TelemetryRange, limit: int, every: int, aggregates: tuple[str, ...]
    ) -> bytes | None:
        """One page of buckets of `every` milliseconds as JSON, None if there is no such device; a bucket without points is
        left out. A page spans at most `limit` buckets from the first point on; `next` is where points come after it."""
        first, beyond = (
            ("max", "exists (select 1 from telemetry where series_id = wanted.id and ts >= :start and ts < (select low from span))")
            if wanted.descending
            else ("min", "exists (select 1 from telemetry where series_id = wanted.id and ts >= (select high from span) and ts < :stop)")
        )
        span = (
            "max(:start, ts / :every * :every + :every - :every * (select points from page_size)) low,"
            " min(:stop, ts / :every * :every + :every) high"
            if wanted.descending
            else "max(:start, ts / :every * :every) low,"
            " min(:stop, ts / :every * :every + :every * (select points from page_size)) high"
        )
        next_page = "low" if wanted.descending else "high"
        return await self._page(
            f"""with recursive {WANTED_SQL},
            first as (select {first}(ts) ts from (
                select (select {first}(ts) from telemetry where series_id = wanted.id and ts >= :start and ts < :stop) ts from wanted)),
            span as (select {span} from first where ts is not null),
            bucket (low, high) as (
                select low, min(high, low / :every * :every + :every) from span
                union all
                select bucket.high, min(span.high, bucket.high + :every) from bucket, span where bucket.high < span.high)
            select json_object('device', :device, 'series', (
                select json_group_array(json_object('metric', metric, 'points', json((
                    select json_group_array(json(point)) from (
                        select ({self._bucket_sql(aggregates)}) point from bucket order by low {"desc" if wanted.descending else "asc"})
                    where point is not null)))) from wanted),
                'next', (select {time_sql(next_page)} from span where exists (select 1 from wanted where {beyond})))
            from device_row""",
            tenant, device, wanted, limit, len(aggregates), every=every,
        )  # fmt: skip

    @staticmethod
    def _bucket_sql(aggregates: tuple[str, ...], *more: str, names: tuple[str, ...] = ()) -> str:
        """One bucket as JSON array, or object where its values have names; null if it is empty. Text counts, and may be last, but is no
        number."""
        number = "filter (where typeof(value) <> 'text')"
        inner = {
            "avg": f"avg(value) {number}", "min": f"min(value) {number}", "max": f"max(value) {number}",
            "sum": f"sum(cast(value as real)) {number}", "count": "count(*)", "last": "max(ts)",
        }  # fmt: skip
        columns = ", ".join(f"{inner[name]} a_{name}" for name in dict.fromkeys(aggregates))
        # A sum of large numbers passes the largest double where their average does not: then each is made smaller first.
        scaled = f"""(select avg(value * 1.0 / {SCALE}) {number} * {SCALE} from telemetry
            where series_id = wanted.id and ts >= bucket.low and ts < bucket.high)"""
        value = {
            "last": "(select value from telemetry where series_id = wanted.id and ts = a_last)",
            "avg": f"case when abs(a_avg) <= {LARGEST} then a_avg else {scaled} end",
        }
        shown = [exact_sql(f"({value[name]})" if name in value else f"a_{name}") for name in aggregates]
        return (
            f"select {row_sql([time_sql('bucket.low / :every * :every'), *more, *shown], names)}"
            f" from (select count(*) n, {columns} from telemetry"
            " where series_id = wanted.id and ts >= bucket.low and ts < bucket.high) where n > 0"
        )

    async def device_and_metrics(self, tenant: int, device: str, wanted: TelemetryRange) -> tuple[int, list[str]] | None:
        """The device's id, and its metrics among those wanted; None if there is no such device."""
        text = await self._json(
            f"with {WANTED_SQL} select json_array(id, json((select json_group_array(metric) from wanted))) from device_row",
            tenant, device, wanted,
        )  # fmt: skip
        return None if text is None else cast("tuple[int, list[str]]", tuple(orjson.loads(text)))

    async def point_rows(self, tenant: int, device: str, metric: str, wanted: TelemetryRange) -> tuple[bytes, int | None] | None:
        """Rows `[time, metric, value]` of one metric as JSON, and from where to go on, None at the end; None if there is no such device."""
        return await self._rows(
            f"""with {WANTED_SQL}
            select (
                select json_array(json(coalesce(json_group_array(json_array({time_sql("ts")}, :metric, {exact_sql("value")})), '[]')),
                                  iif(count(*) = :limit, max(ts) + 1, null))
                from (select ts, value from telemetry where series_id = (select id from wanted) and ts >= :start and ts < :stop
                      order by ts limit :limit)) from device_row""",
            tenant, device, metric, wanted,
        )  # fmt: skip

    async def bucket_rows(
        self, tenant: int, device: str, metric: str, wanted: TelemetryRange, every: int, aggregates: tuple[str, ...]
    ) -> tuple[bytes, int | None] | None:
        """Rows `[time, metric, …aggregates]` of one metric as JSON, and from where to go on, None at the end; None if there is no such
        device."""
        return await self._rows(
            f"""with recursive {WANTED_SQL},
            first as (select min(ts) ts from telemetry where series_id = (select id from wanted) and ts >= :start and ts < :stop),
            span as (select max(:start, ts / :every * :every) low, min(:stop, ts / :every * :every + :every * :limit) high
                     from first where ts is not null),
            bucket (low, high) as (
                select low, min(high, low / :every * :every + :every) from span
                union all
                select bucket.high, min(span.high, bucket.high + :every) from bucket, span where bucket.high < span.high)
            select json_array(json((
                select coalesce(json_group_array(json(line)), '[]') from (
                    select ({self._bucket_sql(aggregates, ":metric")}) line from wanted, bucket order by low) where line is not null)),
                (select high from span where high < :stop)) from device_row""",
            tenant, device, metric, wanted, every=every,
        )  # fmt: skip

    async def _rows(
        self, sql: str, tenant: int, device: str, metric: str, wanted: TelemetryRange, **more: object
    ) -> tuple[bytes, int | None] | None:
        one = attrs.evolve(wanted, metrics=(metric,))
        parameters = self._parameters(tenant, device, one, limit=self._limits.csv_rows, metric=metric, **more)
        text = await self._readers.exact(sql, parameters, self._limits.export_seconds)
        if text is None:
            return None
        rows, _, following = text[1:-1].rpartition(b",")
        return rows, None if following == b"null" else int(following)

    async def _page(
        self, sql: str, tenant: int, device: str, wanted: TelemetryRange, limit: int, values: int = 1, **more: object
    ) -> bytes | None:
        """A page of at most `limit` points of a series, each of so many values. Where they are long texts it has fewer of them."""
        together = self._limits.values_together // values
        while True:
            try:
                most = PAGE_CHARACTERS if limit > 1 else None  # of one point of each series it cannot be shorter
                return await self._json(sql, tenant, device, wanted, most=most, limit=limit, together=together, **more)
            except AnswerTooLong as error:
                limit, together = (max(1, number * PAGE_CHARACTERS // error.length) for number in (limit, together))

    async def _json(
        self, sql: str, tenant: int, device: str, wanted: TelemetryRange, most: int | None = None, **more: object
    ) -> bytes | None:
        return await self._readers.exact(sql, self._parameters(tenant, device, wanted, **more), most=most)

    def _parameters(self, tenant: int, device: str, wanted: TelemetryRange, **more: object) -> dict[str, object]:
        metrics = None if wanted.metrics is None else orjson.dumps(wanted.metrics).decode()
        return {
            "tenant": tenant, "device": device, "device_id": wanted.device_id, "metrics": metrics,
            "start": wanted.start, "stop": wanted.stop, "limit": 1, "together": self._limits.values_together, **more,
        }  # fmt: skip


# A page of a tenant's series, by device and metric. Names are unique, and the order has the device's id all the same: then two indexes
# have the rows in it, and nothing is sorted.
BEHIND_SQL: Final = """device.name >= :device and (device.name > :device or metric > :metric)
    and (:metrics is null or metric in (select value from json_each(:metrics)))"""
FLEET_SQL: Final = f"""select series.id, device.name device, metric from device join series on device_id = device.id
    where tenant_id = :tenant and (:match is null or name glob :match) and {BEHIND_SQL}
    order by device.name, device.id, metric limit :limit"""
# The same of devices that were named: only these are looked up.
DEVICES_FLEET_SQL: Final = f"""select series.id, device.name device, metric from json_each(:devices) named
    cross join device on tenant_id = :tenant and device.name = named.value cross join series on device_id = device.id
    where {BEHIND_SQL} order by device.name, metric limit :limit"""


@attrs.frozen
class FleetRange:
    """Which series: of these devices, or of those whose names match (None: all), of these metrics (None: all). Which of their points:
    from `start` up to but without `stop`, in milliseconds; of `every` so many milliseconds one, if that is not None, with these
    aggregates."""

    match: str | None
    metrics: tuple[str, ...] | None
    start: int
    stop: int
    every: int | None
    aggregates: tuple[str, ...]
    devices: tuple[str, ...] | None = None

    @property
    def sql(self) -> str:
        """A page of its series."""
        return FLEET_SQL if self.devices is None else DEVICES_FLEET_SQL

    @property
    def columns(self) -> tuple[str, ...]:
        return ("time", "device", "metric", *(self.aggregates if self.every is not None and len(self.aggregates) > 1 else ("value",)))


# Series that were asked for by number, each with the time from which.
ASKED_SQL: Final = """(select series.id, name device, metric, asked.value ->> 1 start, asked.key number from json_each(:series) asked
    cross join series on series.id = asked.value ->> 0
    cross join device on device.id = device_id and tenant_id = :tenant and name is not null) wanted"""


class FleetReads(TelemetryReads):
    """Queries over the readings of all devices of one tenant, as rows of time, device, metric and value."""

    async def series(self, tenant: int, wanted: FleetRange, after: tuple[str, str], limit: int) -> list[tuple[int, str, str]]:
        """Number, device and metric of the series behind one, by device and metric."""
        row = await self._readers.row(
            f"select json_group_array(json_array(id, device, metric)) from ({wanted.sql})", self._fleet(tenant, wanted, after, limit)
        )
        return [(number, device, metric) for number, device, metric in orjson.loads(row[0] if row else "[]")]

    async def latest(
        self, tenant: int, wanted: FleetRange, after: tuple[str, str], limit: int, names: tuple[str, ...]
    ) -> tuple[bytes, tuple[str, str] | None]:
        """The newest point of each series of a page, as JSON rows, and the last series of the page if there may be more."""
        newest = f"""(select {row_sql([time_sql("ts"), "device", "metric", exact_sql("value")], names)} from (
            select ts, value from telemetry where series_id = fleet.id and ts >= :start and ts < :stop order by ts desc limit 1))"""
        parts = await self._readers.exact_parts(
            f"""with fleet as materialized ({wanted.sql})
            select json_array(json_array(count(*), json((
                select json_group_array(json(point)) from (select {newest} point from fleet order by device, metric)
                where point is not null)), json((
                select json_array(device, metric) from fleet order by device desc, metric desc limit 1)))) from fleet""",
            self._fleet(tenant, wanted, after, limit), self._limits.export_seconds,
        )  # fmt: skip
        count, rows, last = cast("tuple[int, bytes, list[str] | None]", parts[0])
        return rows, (last[0], last[1]) if last and count == limit else None

    async def devices(self, tenant: int, match: str, after: str, limit: int) -> list[tuple[str, dict[str, str]]]:
        """A page of the devices whose names match, with their labels."""
        row = await self._readers.row(
            """select json_group_array(json_array(name, json(labels))) from (select name, labels from device
               where tenant_id = :tenant and name > :after and name glob :match order by name limit :limit)""",
            {"tenant": tenant, "match": match, "after": after, "limit": limit},
        )
        return [(name, labels) for name, labels in orjson.loads(row[0] if row else "[]")]

    async def readings(
        self, tenant: int, stop: int, series: list[tuple[int, int]], limit: int
    ) -> list[tuple[int, list[tuple[int, Value]], int | None]]:
        """For each of some series, from a time on and up to another: its place in the list, at most so many readings of time in
        milliseconds and value, and from where to go on, None at the end."""
        parts = await self._readers.exact_parts(
            f"""select json_group_array(json((
                select json_array(wanted.number, json(json_group_array(json_array(ts, {exact_sql("value")}))),
                                  case when count(*) = :limit then max(ts) + 1 end)
                from (select ts, value from telemetry where series_id = wanted.id and ts >= wanted.start and ts < :stop
                      order by ts limit :limit)))) from {ASKED_SQL}""",
            {"tenant": tenant, "series": bind(series)[0], "stop": stop, "limit": limit}, self._limits.export_seconds,
        )  # fmt: skip
        return [(number, [(ts, value) for ts, value in orjson.loads(rows)], following) for number, rows, following in parts]

    async def rows(
        self, tenant: int, wanted: FleetRange, series: list[tuple[int, int]], limit: int, names: tuple[str, ...]
    ) -> list[tuple[int, bytes, int | None]]:
        """For each of some series, from a time on: its place in the list, at most so many JSON rows, and from where to go on, None at
        the end. One that is gone meanwhile is left out."""
        part = self._points_part(names) if wanted.every is None else self._buckets_part(wanted.aggregates, names)
        return await self._readers.exact_parts(
            f"select json_group_array(json(({part}))) from {ASKED_SQL}",
            {"tenant": tenant, "series": bind(series)[0], "stop": wanted.stop, "limit": limit, "every": wanted.every},
            self._limits.export_seconds,
        )

    @staticmethod
    def _points_part(names: tuple[str, ...]) -> str:
        row = row_sql([time_sql("ts"), "wanted.device", "wanted.metric", exact_sql("value")], names)
        return f"""select json_array(wanted.number, json(json_group_array({row})), case when count(*) = :limit then max(ts) + 1 end)
            from (select ts, value from telemetry where series_id = wanted.id and ts >= wanted.start and ts < :stop
                  order by ts limit :limit)"""

    def _buckets_part(self, aggregates: tuple[str, ...], names: tuple[str, ...]) -> str:
        some = "from telemetry where series_id = wanted.id and ts >= wanted.start and ts < :stop"
        return f"""with recursive step (low) as (
                select max(wanted.start, (select min(ts) {some}) / :every * :every)
                union all
                select (select min(ts) from telemetry where series_id = wanted.id
                        and ts >= step.low / :every * :every + :every and ts < :stop) / :every * :every
                from step where step.low is not null limit :limit),
            bucket (low, high) as (select low, min(:stop, low / :every * :every + :every) from step where low is not null)
            select json_array(wanted.number, json((
                select json_group_array(json(line)) from (
                    select ({self._bucket_sql(aggregates, "wanted.device", "wanted.metric", names=names)}) line from bucket order by low)
                where line is not null)), (select max(high) from bucket having count(*) = :limit))"""

    @staticmethod
    def _fleet(tenant: int, wanted: FleetRange, after: tuple[str, str], limit: int) -> dict[str, object]:
        metrics = None if wanted.metrics is None else bind(wanted.metrics)[0]
        return {
            "tenant": tenant, "match": wanted.match, "metrics": metrics, "device": after[0], "metric": after[1], "limit": limit,
            "start": wanted.start, "stop": wanted.stop, "devices": None if wanted.devices is None else bind(wanted.devices)[0],
        }  # fmt: skip


def remove_readings(
    connection: sqlite3.Connection, tenant_id: int, name: str, metrics: tuple[str, ...] | None, start: int, stop: int
) -> list[int]:
    """Mark a device's readings of some metrics (None: all), from `start` up to but without `stop`, to be deleted by
    `delete_removed`; the numbers of the marks. Refusal: not_found, also for a metric that the device does not have."""
    device_id, _ = device_row(connection, tenant_id, name)
    wanted = None if metrics is None else bind(metrics)[0]
    unknown = connection.execute(
        "select value from json_each(?) where value not in (select metric from series where device_id = ?)", (wanted or "[]", device_id)
    ).fetchone()
    if unknown is not None:
        raise Refusal("not_found", FieldError("metric", f"the device has no metric {shown_name(unknown[0])}"))
    rows = connection.execute(
        """insert into removed_range (series_id, start, stop) select id, ?3, ?4 from series
           where device_id = ?1 and (?2 is null or metric in (select value from json_each(?2))) returning id""",
        (device_id, wanted, start, stop),
    )
    return [row[0] for row in rows.fetchall()]


class ScrapeReads:
    """Queries over all devices of a tenant for a monitoring system, which wants numbers and takes them page by page."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def presence(self, tenant: int, match: str | None, after: str, limit: int) -> list[tuple[str, int, int | None]]:
        """Devices after one, by name: each with whether it is connected, as 0 or 1, and when it was last heard."""
        text = await self._readers.exact(
            """select json_group_array(json_array(name, connected, seen_at)) from (
                   select name, connected, seen_at from device join presence on device_id = device.id
                   where tenant_id = :tenant and name > :after and (:match is null or name glob :match) order by name limit :limit)""",
            {"tenant": tenant, "match": match, "after": after, "limit": limit},
        )
        return cast("list[tuple[str, int, int | None]]", orjson.loads(text or b"[]"))

    async def readings(
        self, tenant: int, match: str | None, metrics: tuple[str, ...] | None, since: int, after: tuple[str, str], limit: int
    ) -> tuple[list[tuple[str, str, float, int]], tuple[str, str] | None]:
        """The newest readings, as device, metric, value and time, of the series after one, by device and metric; and after which to go
        on, None at the end. Those that are older than `since` or a text are left out."""
        text = await self._readers.exact(
            f"""with shown as materialized ({FLEET_SQL})
                select json_array(json((
                    select json_group_array(json_array(device, metric, {exact_sql("value")}, ts)) from shown cross join telemetry
                    on series_id = shown.id and ts = (select max(ts) from telemetry where series_id = shown.id and ts >= :since)
                    where typeof(value) <> 'text')),
                    json((select case when (select count(*) from shown) = :limit then json_array(device, metric) end
                          from shown order by device desc, metric desc limit 1)))""",
            {
                "tenant": tenant, "match": match, "metrics": None if metrics is None else bind(metrics)[0],
                "since": since, "device": after[0], "metric": after[1], "limit": limit,
            },
        )  # fmt: skip
        rows, last = orjson.loads(text or b"[[],null]")
        return rows, last and (last[0], last[1])


# ==== Logs ====
# Owns: every line of SQL about lines of logs: how they are stored and found, and how long they are kept. Must not know: HTTP, sockets,
# the shape of frames.


@attrs.frozen
class LogLine:
    """A line as it is stored; times in milliseconds, `level` as in `LEVELS`, `fields` is JSON."""

    tenant_id: int
    device_id: int
    at: int
    received_at: int
    level: int
    message: str
    logger: str | None
    host: str | None
    fields: str | None
    repeat_id: str | None = None  # by which its sender tells it again; not stored with it

    @property
    def text(self) -> str:
        """What is searched: `LINE_TEXT` in SQL."""
        return "\n".join((self.message, self.logger or "", self.host or "", self.fields or ""))


LINE_TEXT: Final = "message || char(10) || coalesce(logger, '') || char(10) || coalesce(host, '') || char(10) || coalesce(fields, '')"
# Words by which the index narrows a search: the tenant, the device, and a level of the tenant.
LINE_WHO: Final = "'t' || tenant_id || ' d' || device_id || ' t' || tenant_id || 'l' || level"
# Numbers and the like, hexadecimal ones too, are found whole, or by how they begin: there is no end of them.
LISTED_WORD: Final = re.compile(r"(?=.{4,64}\Z)(?!(?=\D*\d)[0-9a-f]{6,}\Z)(?:\D*\d){0,4}\D*")


class Dictionary:
    """Words that are in the database already, by tenant: most words of a line are."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[tuple[int, str]] = set()

    def new_words(self, lines: Iterable[LogLine]) -> set[tuple[int, str]]:
        """Those of the lines that are not known yet."""
        words = {(line.tenant_id, word) for line in lines for word in words_of(line.text)} - self._known
        return {known for known in words if LISTED_WORD.fullmatch(known[1])}

    def know(self, words: set[tuple[int, str]]) -> None:
        """They are in the database now."""
        if len(self._known) + len(words) > self._most:
            self._known.clear()
        self._known |= words

    def forget(self, words: set[tuple[int, str]]) -> None:
        """They are not there any more."""
        self._known -= words


def insert_words(connection: sqlite3.Connection, words: set[tuple[int, str]]) -> None:
    (before,) = connection.execute("select coalesce(max(id), 0) from log_word").fetchone()
    connection.execute(
        "insert into log_word (tenant_id, word) select value ->> 0, value ->> 1 from json_each(?) where true on conflict do nothing",
        bind(sorted(words)),
    )
    connection.execute("insert into log_word_index (rowid, word) select id, word from log_word where id > ?", (before,))


def without_repeats(connection: sqlite3.Connection, lines: list[LogLine]) -> list[LogLine]:
    """Lines, but for those that were stored before, and are told again. The others are known from now on."""
    numbered = {(line.device_id, line.repeat_id): line.received_at for line in lines if line.repeat_id is not None}
    if not numbered:
        return lines
    (text,) = connection.execute(
        """select json_group_array(json_array(device_id, repeat_id)) from json_each(?) told
           join log_repeat on device_id = told.value ->> 0 and repeat_id = told.value ->> 1""",
        bind(list(numbered)),
    ).fetchone()
    known = {(device_id, repeat_id) for device_id, repeat_id in orjson.loads(text)}
    connection.execute(
        """insert into log_repeat (device_id, repeat_id, received_at) select value ->> 0, value ->> 1, value ->> 2 from json_each(?)""",
        bind([(*key, at) for key, at in numbered.items() if key not in known]),
    )
    left = list[LogLine]()
    for line in lines:
        key = (line.device_id, line.repeat_id)
        if line.repeat_id is None or key not in known:
            left.append(line)
            known.add(key)  # within the batch, too
    return left


def delete_old_repeats(connection: sqlite3.Connection, before: int, most: int) -> bool:
    """Forget which lines came before a time, up to so many; whether there may be more."""
    return connection.execute(
        """delete from log_repeat where (device_id, repeat_id) in (
               select device_id, repeat_id from log_repeat where received_at < ? order by received_at limit ?)""",
        (before, most),
    ).rowcount == most


LINE_COLUMNS_STORED: Final = ("tenant_id", "device_id", "at", "received_at", "level", "message", "logger", "host", "fields")
stored_columns = operator.attrgetter(*LINE_COLUMNS_STORED)


def insert_log_lines(connection: sqlite3.Connection, told: list[LogLine]) -> None:
    """Lines, in order; without those that are told again, and those of devices that were removed meanwhile."""
    lines = without_repeats(connection, told)
    (before,) = connection.execute("select coalesce(max(id), 0) from log_line").fetchone()
    for part in bind_in_parts(map(stored_columns, lines)):
        connection.execute(
            """insert into log_line (tenant_id, device_id, at, received_at, level, message, logger, host, fields)
               select value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, value ->> 7, value ->> 8
               from json_each(?) where value ->> 1 in (select id from device) order by key""",
            part,
        )
    connection.execute(f"insert into log_index (rowid, who, text) select id, {LINE_WHO}, {LINE_TEXT} from log_line where id > ?", (before,))
    connection.execute(
        f"""insert into hour (kind, hour, first, last)
            select 'log', at / {HOUR}, min(id), max(id) from log_line where id > ? group by at / {HOUR}
            on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last)""",
        (before,),
    )
    connection.execute(
        f"""insert into log_hour (tenant_id, hour, first, last)
            select tenant_id, received_at / {HOUR}, min(id), max(id) from log_line where id > ? group by tenant_id, received_at / {HOUR}
            on conflict do update set first = min(first, excluded.first), last = max(last, excluded.last)""",
        (before,),
    )


def delete_log_lines(connection: sqlite3.Connection, lines: list[int]) -> None:
    """By their numbers. The index must be told what it had of them."""
    connection.execute(
        f"""insert into log_index (log_index, rowid, who, text) select 'delete', id, {LINE_WHO}, {LINE_TEXT}
            from log_line where id in (select value from json_each(?))""",
        bind(lines),
    )
    connection.execute("delete from log_line where id in (select value from json_each(?))", bind(lines))


def delete_lines_of(connection: sqlite3.Connection, who: str, most: int) -> bool:
    """Some lines of those who are told as the index has them; whether there were any."""
    (lines,) = connection.execute(
        "select json_group_array(rowid) from (select rowid from log_index where log_index match ? limit ?)", (f"{{who}} : ({who})", most)
    ).fetchone()
    if lines == "[]":
        return False
    delete_log_lines(connection, orjson.loads(lines))
    return True


def delete_words(connection: sqlite3.Connection, words: list[int]) -> None:
    """By their numbers."""
    connection.execute(
        """insert into log_word_index (log_word_index, rowid, word)
           select 'delete', id, word from log_word where id in (select value from json_each(?))""",
        bind(words),
    )
    connection.execute("delete from log_word where id in (select value from json_each(?))", bind(words))


def delete_unused_words(connection: sqlite3.Connection, dictionary: Dictionary, words: list[int]) -> None:
    """Of words, by their numbers, those that no line has."""
    (text,) = connection.execute(
        """select json_group_array(json_array(id, tenant_id, word)) from log_word
           where id in (select value from json_each(?)) and not exists (select 1 from log_vocabulary where term = word)""",
        bind(words),
    ).fetchone()
    unused = orjson.loads(text)
    delete_words(connection, [number for number, _, _ in unused])
    dictionary.forget({(tenant, word) for _, tenant, word in unused})


# An hour whose lines are all too old for their tenant.
OLD_HOUR: Final = f"""select tenant_id, hour, first, last from json_each(:cuts) cut
    cross join log_hour on tenant_id = cast(cut.key as integer) and hour < cut.value / {HOUR} limit 1"""


def cuts_text(cuts: Mapping[int, int]) -> str:
    return bind({str(tenant): cut for tenant, cut in cuts.items()})[0]


def delete_old_lines(connection: sqlite3.Connection, cuts: Mapping[int, int], most: int) -> bool:
    """Lines of tenants that came in an hour before the times that are given, up to so many; whether there may be more."""
    row = connection.execute(OLD_HOUR, {"cuts": cuts_text(cuts)}).fetchone()
    if row is None:
        return False
    tenant_id, hour, first, last = row
    (text,) = connection.execute(
        f"""select json_group_array(id) from (
                select log_line.id from log_index cross join log_line on log_line.id = log_index.rowid
                where log_index match :who and log_index.rowid between :first and :last and received_at / {HOUR} = :hour limit :most)""",
        {"who": f'{{who}} : "t{tenant_id}"', "first": first, "last": last, "hour": hour, "most": most},
    ).fetchone()
    lines = orjson.loads(text)
    delete_log_lines(connection, lines)
    if len(lines) < most:
        connection.execute("delete from log_hour where tenant_id = ? and hour = ?", (tenant_id, hour))
    return True


def set_log_days(connection: sqlite3.Connection, tenant_id: int, days: int | None) -> None:
    """For how many days a tenant's lines are kept; None: as the installation says."""
    connection.execute("delete from retention where tenant_id = ? and kind = 'logs'", (tenant_id,))
    if days is not None:
        connection.execute("insert into retention (tenant_id, kind, days) values (?, 'logs', ?)", (tenant_id, days))


@attrs.frozen
class LogFilter:
    """Which lines are meant: of a device or of those whose names match, of a level at least, with these words, from `start` up to but
    without `stop`."""

    device: str | None
    match: str | None
    level: str
    search: Search | None
    start: int
    stop: int


LINE_JSON: Final = f"""json_object('id', log_line.id, 'at', {time_sql("log_line.at")}, 'received_at', {time_sql("received_at")},
    'device', device.name, 'level', case level {" ".join(f"when {number} then '{name}'" for name, number in LEVELS.items())} end,
    'message', message, 'logger', logger, 'host', host, 'fields', json(fields))"""


class LogReads(Queries):
    """Questions about a tenant's logs."""

    def __init__(self, readers: Readers, limits: Limits) -> None:
        super().__init__(readers)
        self._limits = limits

    async def lines(self, tenant: int, wanted: LogFilter, limit: int, after: int) -> str | None:
        """A page of lines, newest first, from before the line `after`; None where there is no such device. Refusal: bad_query."""
        return await self._lines(tenant, wanted, limit, 0, after, "desc")

    async def newer_lines(self, tenant: int, wanted: LogFilter, limit: int, after: int) -> str | None:
        """A page of the lines after one, oldest first; None where there is no such device. Refusal: bad_query."""
        return await self._lines(tenant, wanted, limit, after, INTEGERS - 1, "asc")

    async def _lines(self, tenant: int, wanted: LogFilter, limit: int, above: int, below: int, order: str) -> str | None:
        devices = await self._devices(tenant, wanted)
        if wanted.device is not None and not devices:
            return None
        low, high = await self._numbers("log", tenant, wanted.start, wanted.stop)
        return await self._list(
            f"""select log_line.id position, {LINE_JSON} item from log_index cross join log_line on log_line.id = log_index.rowid
                join device on device.id = device_id
                where log_index match :expression and log_index.rowid > :low and log_index.rowid < :high
                and log_line.at >= :start and log_line.at < :stop and device.tenant_id = :tenant and name is not null
                and (:match is null or name glob :match) order by log_index.rowid {order}""",
            limit, tenant=tenant, match=wanted.match, expression=await self._expression(tenant, wanted, devices), low=max(low, above),
            high=min(high, below), start=wanted.start, stop=wanted.stop,
        )  # fmt: skip

    async def matches(self, tenant: int, wanted: LogFilter, above: int, upto: int, limit: int) -> list[tuple[int, int, str, int]]:
        """Lines that are wanted, after one and up to another, oldest first: number, device, its name, and time."""
        low, high = await self._numbers("log", tenant, wanted.start, wanted.stop)
        text = await self._json(
            """select json_group_array(json_array(id, device_id, name, at)) from (
                select log_line.id, device_id, name, log_line.at from log_index cross join log_line on log_line.id = log_index.rowid
                join device on device.id = device_id
                where log_index match :expression and log_index.rowid > :low and log_index.rowid < :high
                and log_line.at >= :start and log_line.at < :stop and device.tenant_id = :tenant and name is not null
                and (:match is null or name glob :match) order by log_index.rowid limit :limit)""",
            tenant=tenant, match=wanted.match, expression=await self._expression(tenant, wanted, None), low=max(low, above),
            high=min(high, upto + 1), start=wanted.start, stop=wanted.stop, limit=limit,
        )  # fmt: skip
        return [(number, device_id, name, at) for number, device_id, name, at in orjson.loads(text or "[]")]

    async def newest(self) -> int:
        """The number of the newest line of all."""
        row = await self._readers.row("select coalesce(max(id), 0) from log_line", {})
        return int(row[0]) if row else 0

    async def _devices(self, tenant: int, wanted: LogFilter) -> list[int] | None:
        """Numbers of the devices that are meant; None for all."""
        if wanted.device is None and wanted.match is None:
            return None
        text = await self._json(
            """select json_group_array(id) from device where tenant_id = :tenant and name is not null
               and (:device is null or name = :device) and (:match is null or name glob :match)""",
            tenant=tenant, device=wanted.device, match=wanted.match,
        )  # fmt: skip
        return cast("list[int]", orjson.loads(text or "[]"))

    async def _expression(self, tenant: int, wanted: LogFilter, devices: list[int] | None) -> str:
        """What the index is asked for."""
        levels = " OR ".join(f'"t{tenant}l{number}"' for name, number in LEVELS.items() if number <= LEVELS[wanted.level])
        names = [f'"d{device}"' for device in devices or ()] or ['"none"']
        is_any = devices is None or len(devices) > self._limits.log_devices  # then the names of the lines' devices are looked at
        who = f'"t{tenant}"' if is_any else f"({' OR '.join(names)})"
        narrowed = who if wanted.level == "debug" else f"{who} AND ({levels})"
        if wanted.search is None:
            return f"{{who}} : ({narrowed})"
        words = {part: await self._words_with(tenant, part) for part in sorted(parts_of(wanted.search))}
        return match_expression(wanted.search, words, narrowed)

    async def _words_with(self, tenant: int, part: str) -> list[str]:
        """Words of a tenant's lines that hold a part. Refusal: bad_query, when there are too many."""
        text = await self._json(
            """select json_group_array(word) from (
                select log_word.word from log_word_index cross join log_word on log_word.id = log_word_index.rowid
                where log_word_index match :part and tenant_id = :tenant limit :most + 1)""",
            tenant=tenant, part=f'"{part}"', most=self._limits.log_parts,
        )  # fmt: skip
        words = cast("list[str]", orjson.loads(text or "[]"))
        if len(words) > self._limits.log_parts:
            raise Refusal("bad_query", FieldError("q", f'"{part}" is part of more than {self._limits.log_parts} words: write more of it'))
        return words

    async def days(self, tenant: int, default: int) -> int:
        """For how many days lines are kept."""
        row = await self._readers.row("select days from retention where tenant_id = :tenant and kind = 'logs'", {"tenant": tenant})
        return default if row is None else int(row[0])

    async def cuts(self, default: int) -> dict[int, int]:
        """For each tenant the time before which its lines are too old."""
        text = await self._json(
            """select json_group_object(tenant.id, :now - coalesce(days, :default) * :day)
               from tenant left join retention on tenant_id = tenant.id and kind = 'logs' where name is not null""",
            now=now_ms(), default=default, day=DAY,
        )  # fmt: skip
        return {int(tenant): cut for tenant, cut in orjson.loads(text or "{}").items()}

    async def has_old_repeats(self, before: int) -> bool:
        """Whether it is known of lines from before a time that they came."""
        return await self._readers.row("select 1 from log_repeat where received_at < :before limit 1", {"before": before}) is not None

    async def has_old(self, cuts: Mapping[int, int]) -> bool:
        """Whether there may be lines that are older than tenants want, by the times that are given."""
        return await self._readers.row(OLD_HOUR, {"cuts": cuts_text(cuts)}) is not None

    async def unused_words(self, after: int, most: int) -> tuple[list[int], int]:
        """Of so many words after a number those that no line has any more; the number to go on after, 0 at the end."""
        text = await self._json(
            """select json_group_array(json_array(id, exists (select 1 from log_vocabulary where term = word)))
               from (select id, word from log_word where id > :after order by id limit :most)""",
            after=after, most=most,
        )  # fmt: skip
        looked = orjson.loads(text or "[]")
        return [number for number, used in looked if not used], looked[-1][0] if len(looked) == most else 0


# ==== Alerts ====
# Owns: every line of SQL about rules, alerts and silences. Must not know: HTTP, sockets, how a rule is judged.

# Whether a silence is about an alert, with its device.
COVERED_SQL: Final = """coalesce(device.name, device.old_name) glob silence.match and (silence.rule is null or silence.rule = alert.rule)
    and not exists (
        select 1 from json_each(silence.labels) wanted where not exists (
            select 1 from (select key, value from json_each(alert.labels) union all select key, value from json_each(device.labels)) has
            where has.key = wanted.key and has.value = wanted.value))"""
# Of an alert, with its device: the silence that covers it at :now, null without one.
SILENCED_SQL: Final = f"""(
    select min(silence.id) from silence where silence.tenant_id = alert.tenant_id and silence.until > :now and {COVERED_SQL})"""
# Whether somebody said that they know of it, and that is so still.
ACKNOWLEDGED_SQL: Final = "(alert.acknowledged is not null and coalesce(alert.acknowledged ->> 'until', :now + 1) > :now)"
# Whether its device is known to be offline by an alert of its own, which says enough.
OFFLINE_SQL: Final = """select 1 from alert offline where offline.device_id = alert.device_id and offline.kind = 'offline'
    and offline.resolved_at is null and offline.fired_at is not null"""
HELD_BACK_SQL: Final = f"(alert.kind <> 'offline' and exists ({OFFLINE_SQL}))"
# Whether nothing new is known of what it tells of: its device is offline, or its readings are older than :fresh.
STALE_SQL: Final = """(alert.kind not in ('offline', 'absent') and alert.resolved_at is null and (
    (presence.connected = 0 and presence.disconnected_at is not null)
    or (alert.series_id is not null and coalesce((select max(ts) from telemetry where series_id = alert.series_id), 0) < :fresh)))"""
STATUS_SQL: Final = "case when alert.resolved_at is not null then 'resolved' when alert.fired_at is null then 'pending' else 'firing' end"
ALERT_JSON: Final = f"""json_object(
    'id', alert.id, 'rule', alert.rule, 'rule_id', alert.rule_id, 'device', coalesce(device.name, device.old_name), 'metric', alert.metric,
    'kind', alert.kind, 'status', {STATUS_SQL}, 'severity', alert.severity, 'labels', json(alert.labels), 'text', alert.text,
    'value', {exact_sql("alert.value")}, 'since', {time_sql("alert.since")}, 'fired_at', {time_sql("alert.fired_at")},
    'resolved_at', {time_sql("alert.resolved_at")}, 'reason', alert.reason,
    'stale', json(case when {STALE_SQL} then 'true' else 'false' end),
    'acknowledged', case when {ACKNOWLEDGED_SQL} then json_set(alert.acknowledged, '$.until', {time_sql("alert.acknowledged ->> 'until'")},
        '$.at', {time_sql("alert.acknowledged ->> 'at'")}) end,
    'silenced', case when alert.resolved_at is null then {SILENCED_SQL} end,
    'held_back', json(case when alert.resolved_at is null and {HELD_BACK_SQL} then 'true' else 'false' end),
    'told', json(case when alert.catching_up then 'false' else 'true' end))"""
ALERT_ROWS: Final = "alert join device on device.id = alert.device_id left join presence on presence.device_id = device.id"
# Of an alert that fires: whether nobody has said that they know of it, and no silence covers it; with how bad it is, the worst of those
# first: 4 for critical, and 10 more if it is so.
UNATTENDED_SQL: Final = f"(not {ACKNOWLEDGED_SQL} and {SILENCED_SQL} is null)"
SEVERITY_SQL: Final = " ".join(("case alert.severity", *(f"when '{name}' then {number}" for name, number in SEVERITIES.items()), "end"))
RANK_SQL: Final = f"{SEVERITY_SQL} + 10 * {UNATTENDED_SQL}"
SEVERITY_OF_SQL: Final = " ".join(("case worst % 10", *(f"when {number} then '{name}'" for name, number in SEVERITIES.items()), "end"))
# The alerts of a device that fire: how many, the worst, and of how many nobody has taken care.
FIRING_SQL: Final = "from alert where alert.device_id = device.id and resolved_at is null and fired_at is not null"
DEVICE_ALERTS_JSON: Final = f"""(with firing as materialized (select {RANK_SQL} rank {FIRING_SQL})
    select json_object('number', number, 'severity', {SEVERITY_OF_SQL}, 'unattended', unattended) from (
        select count(*) number, max(rank) worst, coalesce(sum(case when rank > 10 then 1 else 0 end), 0) unattended from firing))"""
DEVICE_JSON: Final = f"json_object({DEVICE_FIELDS}, 'alerts', json({DEVICE_ALERTS_JSON}))"
# How the devices stand whose names match, with the rank of the worst alert of each: worked out once, however often it is looked at.
STANDING_SQL: Final = f"""standing as materialized (
    select device.id standing_id, device.name, config.status, connected, connected_at, disabled, {DRIFTED_SQL} drifted,
        (select max({RANK_SQL}) {FIRING_SQL}) worst
    from {DEVICE_ROWS} where tenant_id = :tenant and device.name is not null and (:match is null or device.name glob :match))"""
# How much a device needs attention: an alert that nobody takes care of, then a configuration that it refused, then that it is away.
ATTENTION_SQL: Final = f"""(
    case when worst >= 10 + {SEVERITIES["error"]} then 16 when worst = 10 + {SEVERITIES["warning"]} then 8 else 0 end
    + case when status = 'rejected' then 4 else 0 end + case when connected = 1 then 0 else 2 end + case when drifted then 1 else 0 end)"""
ATTENTION: Final = "attention "  # begins where a page of this order begins: no name has a space
ATTENTION_MOST: Final = 99
RULE_JSON: Final = f"""json_patch(json_object('id', rule.id, 'name', rule.name), json_set(
    rule.body, '$.changed_at', {time_sql("rule.changed_at")}, '$.by', rule.author))"""
SILENCE_JSON: Final = f"""json_object(
    'id', silence.id, 'match', silence.match, 'labels', json(silence.labels), 'rule', silence.rule, 'text', silence.text,
    'created_at', {time_sql("silence.created_at")}, 'until', {time_sql("silence.until")}, 'by', silence.author,
    'in_force', json(case when silence.until > :now then 'true' else 'false' end), 'alerts', json((
        select json_group_array(json_object('id', id, 'rule', rule, 'device', name)) from (
            select alert.id, alert.rule, device.name from alert join device on device.id = alert.device_id
            where alert.tenant_id = silence.tenant_id and alert.resolved_at is null and alert.fired_at is not null
            and silence.until > :now and {COVERED_SQL} order by alert.id desc limit :most))))"""
ALERT_COLUMNS: Final = """id, tenant_id, device_id, rule_id, rule, kind, severity, labels, metric, series_id, text, value, since, fired_at,
    ended_at, resolved_at, reason, catching_up"""
ALERT_CELLS: Final = ", ".join(f"new.value ->> {place}" for place in range(18))
# What the watch is to know of a device: its number, tenant, name, labels, whether it is disabled, whether it is connected, when it last
# was, of its series that rules look at {metric: [number as text, newest time, value]}, and its open alerts.
DEVICE_WATCHED_JSON: Final = f"""json_array(
    device.id, device.tenant_id, device.name, json(device.labels), device.disabled, coalesce(presence.connected, 0),
    presence.disconnected_at, (
        select json_group_object(newest.metric, json_array(cast(newest.id as text), newest.ts, {exact_sql("telemetry.value")})) from (
            select id, metric, (select max(ts) from telemetry where series_id = series.id) ts from series
            where series.device_id = device.id and metric in (select value from json_each(:metrics))) newest
        left join telemetry on telemetry.series_id = newest.id and telemetry.ts = newest.ts), (
        select json_group_array(json_array(id, rule_id, since, {exact_sql("value")}, fired_at, ended_at, catching_up)) from alert
        where alert.device_id = device.id and resolved_at is null and (:rule is null or rule_id = :rule)))"""


def write_alert_rows(connection: sqlite3.Connection, rows: str, wall: int) -> None:
    """Rows as `ALERT_COLUMNS` has them: those that are there change, the others are new."""
    connection.execute(
        """update alert set since = new.value ->> 12, value = new.value ->> 11, text = new.value ->> 10, fired_at = new.value ->> 13,
               ended_at = new.value ->> 14, resolved_at = new.value ->> 15, reason = new.value ->> 16, catching_up = new.value ->> 17,
               changed_at = :wall
           from json_each(:rows) new where alert.id = new.value ->> 0 and alert.resolved_at is null""",
        {"rows": rows, "wall": wall},
    )
    connection.execute(
        f"""insert into alert ({ALERT_COLUMNS}, changed_at) select {ALERT_CELLS}, :wall from json_each(:rows) new
            where not exists (select 1 from alert where alert.id = new.value ->> 0) and new.value ->> 3 in (select id from rule)
            and exists (select 1 from device where id = new.value ->> 2 and name is not null)
            and (new.value ->> 15 is not null or not exists (
                select 1 from alert where device_id = new.value ->> 2 and rule_id = new.value ->> 3 and resolved_at is null))""",
        {"rows": rows, "wall": wall},
    )


def write_alerts(connection: sqlite3.Connection, work: AlertWork, wall: int) -> list[TimelineEntry]:
    """Store what has become of alerts; entries for the timelines of their devices. An alert that was settled meanwhile, by a change of its
    rule or its device, stays so."""
    if work.dropped:
        connection.execute(
            "delete from alert where id in (select value from json_each(?)) and fired_at is null and resolved_at is null",
            bind(work.dropped),
        )
    if work.orphans:
        settle_alerts(connection, "id in (select value from json_each(:ids))", NOT_LOOKED_AT, ids=bind(work.orphans)[0])
    for rows in ([*work.resolved.values(), *work.open.values()], work.past):
        for part in bind_in_parts(row.cells() for row in rows):
            write_alert_rows(connection, part[0], wall)
    if work.judged:
        connection.execute(
            "delete from late_reading where (rule_id, series_id) in (select value ->> 0, value ->> 1 from json_each(?))", bind(work.judged)
        )
    if work.late:
        connection.execute(
            """insert into late_reading (rule_id, series_id, device_id, start, stop)
               select value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 from json_each(?)
               where value ->> 0 in (select id from rule) and value ->> 2 in (select id from device)
               on conflict do update set start = min(start, excluded.start), stop = max(stop, excluded.stop)""",
            bind(work.late),
        )
    if work.lines:
        connection.execute(
            "update rule set last_line = value from json_each(?) where rule.id = cast(key as integer)",
            bind({str(rule): line for rule, line in work.lines.items()}),
        )
    return [
        TimelineEntry(0, row.standing.source.device.id, wall, "alert", {
            "alert": row.id, "rule": row.standing.rule.name, "status": row.told, "severity": row.standing.rule.rule.severity,
            "value": row.value, "text": row.text(), "fired_at": moment_text(row.fired_at), "resolved_at": moment_text(row.resolved_at),
            "reason": row.reason,
        })
        for row in (*work.resolved.values(), *work.open.values()) if row.told
    ]  # fmt: skip


def require_rule_name(connection: sqlite3.Connection, tenant_id: int, name: str, own: int = 0) -> None:
    """Refusal: rule_exists, when another rule of the tenant has the name."""
    taken = connection.execute("select 1 from rule where tenant_id = ? and name = ? and id <> ?", (tenant_id, name, own)).fetchone()
    if taken is not None:
        raise Refusal("rule_exists")


def insert_rule(connection: sqlite3.Connection, tenant_id: int, name: str, body: str, author: str, most: int) -> int:
    """A new rule; its number. Refusal: rule_exists, too_many_rules."""
    require_rule_name(connection, tenant_id, name)
    (count,) = connection.execute("select count(*) from rule where tenant_id = ?", (tenant_id,)).fetchone()
    if count >= most:
        raise Refusal("too_many_rules")
    row = connection.execute(
        """insert into rule (tenant_id, name, body, changed_at, author, last_line)
           values (?, ?, ?, ?, ?, (select coalesce(max(id), 0) from log_line)) returning id""",
        (tenant_id, name, body, now_ms(), author),
    ).fetchone()
    return int(row[0])


def update_rule(connection: sqlite3.Connection, tenant_id: int, rule_id: int, name: str, body: str, author: str, *, disabled: bool) -> None:
    """Put a rule in the place of another. Its alerts are over, and it begins anew; unless it is the same. Refusal: not_found,
    rule_exists."""
    row = connection.execute("select body from rule where tenant_id = ? and id = ?", (tenant_id, rule_id)).fetchone()
    if row is None:
        raise Refusal("not_found")
    require_rule_name(connection, tenant_id, name, rule_id)
    if row[0] == body:
        return
    settle_alerts(connection, "rule_id = :id", "its rule was disabled" if disabled else "its rule was changed", id=rule_id)
    connection.execute("delete from late_reading where rule_id = ?", (rule_id,))
    connection.execute(
        """update rule set name = ?, body = ?, changed_at = ?, author = ?, last_line = (select coalesce(max(id), 0) from log_line)
           where id = ?""",
        (name, body, now_ms(), author, rule_id),
    )


def delete_rule(connection: sqlite3.Connection, tenant_id: int, rule_id: int) -> str:
    """Its name; its alerts are over. Refusal: not_found."""
    row = connection.execute("delete from rule where tenant_id = ? and id = ? returning name", (tenant_id, rule_id)).fetchone()
    if row is None:
        raise Refusal("not_found")
    settle_alerts(connection, "rule_id = :id", "its rule was removed", id=rule_id)
    return str(row[0])


def acknowledge_alert(
    connection: sqlite3.Connection, tenant_id: int, alert_id: int, by: str, said: Mapping[str, object] | None
) -> str:
    """Somebody knows of an open alert, or (None) takes that back; the device's name. Refusal: not_found, alert_resolved."""
    row = connection.execute(
        """select device.id, name, rule, resolved_at from alert join device on device.id = device_id
           where alert.tenant_id = ? and alert.id = ? and name is not null""",
        (tenant_id, alert_id),
    ).fetchone()
    if row is None:
        raise Refusal("not_found")
    if row[3] is not None:
        raise Refusal("alert_resolved")
    now = now_ms()
    stored = None if said is None else bind({"by": by, **said, "at": now})[0]
    connection.execute("update alert set acknowledged = ?, changed_at = ? where id = ?", (stored, now, alert_id))
    until = {} if said is None else {**said, "until": moment_text(cast("int | None", said["until"]))}
    status = "acknowledged" if said is not None else "not acknowledged"
    add_event(connection, row[0], now, "alert", {"alert": alert_id, "rule": row[2], "status": status, "by": by, **until})
    return str(row[1])


def insert_silence(connection: sqlite3.Connection, tenant_id: int, new: NewSilence, author: str, most: int) -> int:
    """A new silence; its number. Those that were over a day ago go. Refusal: too_many_silences."""
    now = now_ms()
    connection.execute("delete from silence where tenant_id = ? and until < ?", (tenant_id, now - DAY))
    (count,) = connection.execute("select count(*) from silence where tenant_id = ?", (tenant_id,)).fetchone()
    if count >= most:
        raise Refusal("too_many_silences")
    row = connection.execute(
        """insert into silence (tenant_id, match, labels, rule, created_at, until, author, text)
           values (?, ?, ?, ?, ?, ?, ?, ?) returning id""",
        (tenant_id, new.match, *bind(new.labels), new.rule, now, new.until, author, new.text),
    ).fetchone()
    return int(row[0])


def delete_silence(connection: sqlite3.Connection, tenant_id: int, silence_id: int) -> None:
    """Refusal: not_found."""
    if connection.execute("delete from silence where tenant_id = ? and id = ?", (tenant_id, silence_id)).rowcount == 0:
        raise Refusal("not_found")


@attrs.frozen
class AlertFilter:
    """Which alerts are wanted; None: all. `start` and `stop`: that were there in that time, in milliseconds."""

    statuses: tuple[str, ...] | None = None
    severities: tuple[str, ...] | None = None
    rule: str | None = None
    match: str | None = None
    acknowledged: bool | None = None
    silenced: bool | None = None
    start: int = 0
    stop: int = INTEGERS - 1
    alert_id: int | None = None


def alert_times(limits: Limits) -> dict[str, int]:
    """What SQL about alerts calls :now, and :fresh."""
    now = now_ms()
    return {"now": now, "fresh": now - round(limits.stale_seconds * 1000)}


class AlertReads(Queries):
    """Questions about a tenant's rules, alerts and silences."""

    def __init__(self, readers: Readers, limits: Limits) -> None:
        super().__init__(readers)
        self._limits = limits

    async def rules(self, tenant: int, limit: int, after: int) -> str:
        return await self._list(
            f"select id position, {RULE_JSON} item from rule where tenant_id = :tenant and id > :after order by id",
            limit, tenant=tenant, after=after,
        )  # fmt: skip

    async def rule(self, tenant: int, rule_id: int) -> str | None:
        return await self._json(f"select {RULE_JSON} from rule where tenant_id = :tenant and id = :id", tenant=tenant, id=rule_id)

    async def alerts(self, tenant: int, wanted: AlertFilter, limit: int, after: int) -> str:
        """A page of alerts, newest first, from before one."""
        is_open = wanted.statuses is not None and "resolved" not in wanted.statuses
        text = await self._list(
            f"""select alert.id position, {ALERT_JSON} item from {ALERT_ROWS}
                where alert.tenant_id = :tenant and alert.id < :after and coalesce(device.name, device.old_name) is not null
                {"and alert.resolved_at is null" if is_open else ""}
                and (:alert is null or alert.id = :alert)
                and (:statuses is null or {STATUS_SQL} in (select value from json_each(:statuses)))
                and (:severities is null or alert.severity in (select value from json_each(:severities)))
                and (:rule is null or alert.rule = :rule) and (:match is null or coalesce(device.name, device.old_name) glob :match)
                and (:acknowledged is null or :acknowledged = {ACKNOWLEDGED_SQL})
                and (:silenced is null or :silenced = ({SILENCED_SQL} is not null))
                and alert.since < :stop and (alert.resolved_at is null or alert.resolved_at >= :start) order by alert.id desc""",
            limit, tenant=tenant, after=after, alert=wanted.alert_id, rule=wanted.rule, match=wanted.match, start=wanted.start,
            stop=wanted.stop, acknowledged=wanted.acknowledged, silenced=wanted.silenced, **alert_times(self._limits),
            statuses=None if wanted.statuses is None else bind(wanted.statuses)[0],
            severities=None if wanted.severities is None else bind(wanted.severities)[0],
        )  # fmt: skip
        return shortened(text).decode()

    async def silences(self, tenant: int, limit: int, after: int) -> str:
        """A page of silences, with some of the alerts that each holds back now."""
        return await self._list(
            f"select id position, {SILENCE_JSON} item from silence where tenant_id = :tenant and id > :after order by id",
            limit, tenant=tenant, after=after, most=self._limits.silenced_shown, now=now_ms(),
        )  # fmt: skip

    async def sessions(
        self, tenant: int, devices: list[str], start: int, stop: int, limit: int
    ) -> list[tuple[str, list[tuple[int, bool]]]]:
        """When devices connected (true) and disconnected: how it was when a time begins, and what came in it, at most so many of each
        device."""
        low, high = await self._numbers("event", tenant, start, stop)
        known = "event.device_id = device.id and kind in ('connected', 'disconnected')"
        entry = "json_array(at, json(case when kind = 'connected' then 'true' else 'false' end))"
        row = await self._readers.row(
            f"""select json_group_array(json_array(name, json((
                    select json_group_array(json(entry)) from (
                        select * from (select id, {entry} entry from event where {known} and at < :start and id < :high
                                       order by id desc limit 1)
                        union all
                        select * from (select id, {entry} entry from event where {known} and id > :low and id < :high and at >= :start
                                       and at < :stop order by id limit :limit) order by 1)))))
                from json_each(:devices) wanted join device on device.tenant_id = :tenant and device.name = wanted.value""",
            {"tenant": tenant, "devices": bind(devices)[0], "start": start, "stop": stop, "low": low, "high": high, "limit": limit},
        )
        return [(name, [(at, is_connected) for at, is_connected in entries]) for name, entries in orjson.loads(row[0] if row else "[]")]

    async def last_line(self, tenant: int, rule_id: int) -> int:
        """Up to which line a rule has judged; 0 if it is gone."""
        where = {"tenant": tenant, "id": rule_id}
        row = await self._readers.row("select last_line from rule where tenant_id = :tenant and id = :id", where)
        return int(row[0]) if row else 0


def changed_for_watch(connection: sqlite3.Connection, metrics: tuple[str, ...], most: int) -> AlertNews:
    """Rules and devices that have changed, which are then forgotten; of the devices at most so many."""
    news = AlertNews()
    (rules, devices) = connection.execute(
        """select (select json_group_array(id) from changed where kind = 'rule'),
                  (select json_group_array(id) from (select id from changed where kind = 'device' order by id limit ?))""", (most,)
    ).fetchone()
    if rules != "[]":
        (found,) = connection.execute(
            """select json_group_array(json_array(changed.value, coalesce(tenant_id, 0), body)) from json_each(?) changed
               left join rule on rule.id = changed.value""", (rules,)
        ).fetchone()
        news.rules = orjson.loads(found)
    if devices != "[]":
        (found,) = connection.execute(
            f"""select json_group_array(json({DEVICE_WATCHED_JSON})) from device left join presence on device_id = device.id
                where device.id in (select value from json_each(:ids))""",
            {"ids": devices, "metrics": bind(metrics)[0], "rule": None},
        ).fetchone()
        news.devices = orjson.loads(found)
        news.more = len(orjson.loads(devices)) == most
    for kind, ids in (("rule", rules), ("device", devices)):
        if ids != "[]":
            connection.execute("delete from changed where kind = ? and id in (select value from json_each(?))", (kind, ids))
    return news


def devices_for_watch(connection: sqlite3.Connection, wanted: DevicesWanted, most: int) -> list[list[Any]]:
    (found,) = connection.execute(
        f"""select json_group_array(json(item)) from (
                select {DEVICE_WATCHED_JSON} item from device left join presence on device_id = device.id
                where device.tenant_id = :tenant and device.name > :after and device.name glob :match
                order by device.name limit :most)""",
        {
            "tenant": wanted.tenant_id, "after": wanted.after, "match": wanted.match, "metrics": bind(wanted.metrics)[0],
            "rule": wanted.rule_id, "most": most,
        },
    ).fetchone()  # fmt: skip
    return cast("list[list[Any]]", orjson.loads(found))


def readings_for_watch(
    connection: sqlite3.Connection, wanted: ReadingsWanted, most: int
) -> tuple[list[list[Any]], list[tuple[int, Value]]]:
    """A part of a series, and at the first time the alerts of the rule and the device that were not over before it."""
    where = {"series": wanted.series, "after": wanted.after, "rule": wanted.rule_id, "device": wanted.device_id, "most": most}
    recorded = "[]"
    if wanted.is_first:
        (recorded,) = connection.execute(
            f"""select json_group_array(json_array(since, {exact_sql("value")}, fired_at, resolved_at, ended_at)) from (
                    select * from (select since, value, fired_at, ended_at, resolved_at from alert
                                   where device_id = :device and rule_id = :rule and resolved_at > :after order by resolved_at limit :most)
                    union all select since, value, fired_at, ended_at, resolved_at from alert
                    where device_id = :device and rule_id = :rule and resolved_at is null)""",
            where,
        ).fetchone()
    if wanted.is_first and wanted.needs_before:
        (where["after"],) = connection.execute(
            """select coalesce(max(ts) - 1, :after) from (
                    select ts, value from telemetry where series_id = :series and ts <= :after order by ts desc limit :most)
               where typeof(value) <> 'text'""",
            where,
        ).fetchone()
    (found,) = connection.execute(
        f"""select json_group_array(json_array(ts, {exact_sql("value")})) from (
                select ts, value from telemetry where series_id = :series and ts > :after order by ts limit :most)""",
        where,
    ).fetchone()
    return orjson.loads(recorded), [(ts, value) for ts, value in orjson.loads(found)]


def look_up_for_watch(connection: sqlite3.Connection, work: AlertWork, limits: Limits, *, eventful: bool) -> AlertNews:
    """What the watch is to know after this transaction; `eventful`: rules or devices may have changed."""
    news = changed_for_watch(connection, work.metrics, limits.alert_devices) if eventful else AlertNews()
    if work.devices is not None:
        news.page = devices_for_watch(connection, work.devices, limits.alert_devices)
    news.readings = [readings_for_watch(connection, wanted, limits.replay_readings) for wanted in work.readings]
    return news


def rules_for_watch(connection: sqlite3.Connection) -> tuple[list[tuple[int, int, str]], int]:
    """All rules, as number, tenant and text, and the number of the next alert. What had changed is known by that."""
    connection.execute("delete from changed").close()
    rules, next_alert = connection.execute(
        """select (select json_group_array(json_array(rule.id, tenant_id, body)) from rule join tenant on tenant.id = tenant_id
                   where tenant.name is not null), (select coalesce(max(id), 0) + 1 from alert)"""
    ).fetchone()
    return orjson.loads(rules), int(next_alert)


def late_for_watch(connection: sqlite3.Connection) -> list[tuple[int, int, int, int]]:
    """Readings that came late and are not judged yet, as rule, series, start and stop."""
    (rows,) = connection.execute("select json_group_array(json_array(rule_id, series_id, start, stop)) from late_reading").fetchone()
    return cast("list[tuple[int, int, int, int]]", orjson.loads(rows))


def begin_watch(connection: sqlite3.Connection, watch: AlertWatch, limits: Limits) -> None:
    """Let the watch know all rules, all devices that they look at, and how they stand: at a start."""
    with transaction(connection):
        watch.begin(*rules_for_watch(connection))
        while (wanted := watch.pages.ask()) is not None:
            watch.learn(AlertNews(page=devices_for_watch(connection, wanted, limits.alert_devices)), time.monotonic(), now_ms())
        watch.learn_late(late_for_watch(connection))
    watch.awake = time.monotonic()  # nothing came before, though it is known of much: silence is measured from now on


# ==== Notifications ====
# Owns: every line of SQL about receivers, which alerts they are to be told of, and what is sent to them. Must not know: HTTP, sockets,
# in which form they are told.

# Of an alert with its device and a receiver: whether the receiver may be told of it at :now. That a device is offline holds back its other
# alerts from those receivers alone that are told of that.
TELLABLE_SQL: Final = f"""(alert.catching_up = 0 and {SILENCED_SQL} is null and not (alert.kind <> 'offline' and exists (
    {OFFLINE_SQL} and (webhook.rule is null or webhook.rule = offline.rule)
    and {SEVERITY_SQL.replace("alert.", "offline.")} >= webhook.severity)))"""
# Whether it concerns the receiver, and what it is grouped by.
CONCERNS_SQL: Final = f"""({SEVERITY_SQL} >= webhook.severity and (webhook.rule is null or webhook.rule = alert.rule)
    and coalesce(device.name, device.old_name) glob webhook.match)"""
GROUP_KEY_SQL: Final = """case webhook.group_by when 'rule' then alert.rule when 'device' then coalesce(device.name, device.old_name)
    else coalesce((select value from json_each(alert.labels) where key = substr(webhook.group_by, 7)),
                  (select value from json_each(device.labels) where key = substr(webhook.group_by, 7)), '') end"""
# The fields of `AlertShown`.
ALERT_SHOWN_SQL: Final = f"""json_array(alert.rule, coalesce(device.name, device.old_name), tenant.name, alert.severity, alert.metric,
    json(alert.labels), alert.text, {exact_sql("alert.value")}, alert.fired_at, alert.resolved_at, alert.reason,
    json(case when {STALE_SQL} then 'true' else 'false' end))"""
WEBHOOK_JSON: Final = f"""json_set(shown, '$.id', id, '$.created_at', {time_sql("created_at")},
    '$.old_secret_until', {time_sql("case when old_until > :now then old_until end")})"""
NOTIFICATION_JSON: Final = f"""json_object('id', id, 'at', {time_sql("at")}, 'webhook', webhook_id,
    'form', (select form from webhook where webhook.id = webhook_id), 'status', status, 'alerts', alerts, 'tries', tries,
    'next_at', {time_sql("next_at")}, 'error', error, 'delivered_at', {time_sql("delivered_at")})"""


def insert_webhook(connection: sqlite3.Connection, tenant_id: int, new: NewWebhook, shown: Mapping[str, Any], most: int) -> int:
    """A new receiver's number. Refusal: too_many_webhooks."""
    (there,) = connection.execute("select count(*) from webhook where tenant_id = ? and removed = 0", (tenant_id,)).fetchone()
    if there >= most:
        raise Refusal("too_many_webhooks")
    row = {**attrs.asdict(new), "tenant": tenant_id, "shown": bind(shown)[0], "least": SEVERITIES[new.severity], "now": now_ms()}
    return int(connection.execute(
        """insert into webhook (tenant_id, form, url, shown, match, severity, rule, group_by, group_wait, group_interval, repeat_interval,
               secret, created_at)
           values (:tenant, :form, :url, :shown, :match, :least, :rule, :group_by, :wait, :interval, :repeat, :secret, :now)
           returning id""",
        row,
    ).fetchone()[0])  # fmt: skip


def change_webhook_secret(connection: sqlite3.Connection, tenant_id: int, webhook_id: int, secret: str, seconds: float) -> None:
    """Sign with this one from now on, and with the one before, too, for so many seconds. Refusal: not_found, invalid."""
    row = connection.execute(
        """update webhook set old_secret = secret, old_until = :until, secret = :secret
           where tenant_id = :tenant and id = :id and removed = 0 returning form""",
        {"tenant": tenant_id, "id": webhook_id, "secret": secret, "until": now_ms() + round(seconds * 1000)},
    ).fetchone()
    if row is None:
        raise Refusal("not_found")
    if row[0] != "webhook":
        raise Refusal("invalid", FieldError("secret", f"is not for {row[0]}"))


def remove_webhook(connection: sqlite3.Connection, tenant_id: int, webhook_id: int) -> None:
    """Put a receiver out of reach, with what it holds that is secret. `delete_removed` deletes it. Refusal: not_found."""
    if connection.execute(
        """update webhook set removed = 1, url = '', secret = null, old_secret = null
           where tenant_id = :tenant and id = :id and removed = 0""",
        {"tenant": tenant_id, "id": webhook_id},
    ).rowcount == 0:
        raise Refusal("not_found")


def delete_removed_webhook(connection: sqlite3.Connection, webhook_id: int, most: int) -> None:
    """So many rows of what is left of one; then itself."""
    asked = {"id": webhook_id, "most": most}
    left = connection.execute(
        "delete from notification where id in (select id from notification where webhook_id = :id limit :most)", asked
    ).rowcount
    left += connection.execute(
        """delete from notice where webhook_id = :id and alert_id in (
               select alert_id from notice where webhook_id = :id order by alert_id limit :most)""",
        asked,
    ).rowcount
    left += connection.execute(
        """delete from alert_group where webhook_id = :id and key in (
               select key from alert_group where webhook_id = :id order by key limit :most)""",
        asked,
    ).rowcount
    if not left:
        connection.execute("delete from webhook where id = :id and removed = 1", asked)


def delete_old_notifications(connection: sqlite3.Connection, before: int, most: int) -> bool:
    """Some of those that are sent no more and are older; whether there may be more."""
    return connection.execute(
        """delete from notification where id in (
               select id from notification where status <> 'waiting' and at < :before order by at limit :most)""",
        {"before": before, "most": most},
    ).rowcount == most


@attrs.frozen
class Receiver:
    """Where something is sent, how, and how it is signed; `old_secret` None where there is none that signs any more."""

    webhook_id: int
    form: str
    url: str
    secret: str | None
    old_secret: str | None

    @property
    def secrets(self) -> list[str]:
        return [secret for secret in (self.secret, self.old_secret) if secret is not None]


RECEIVER_COLUMNS: Final = "webhook.id, webhook.form, url, secret, case when old_until > :now then old_secret end"


def receiver_of(connection: sqlite3.Connection, tenant_id: int, webhook_id: int) -> tuple[Receiver, str, int]:
    """A receiver, its tenant's name, and after how long the same is told again. Refusal: not_found."""
    row = connection.execute(
        f"""select {RECEIVER_COLUMNS}, tenant.name, repeat_interval from webhook join tenant on tenant.id = tenant_id
            where tenant_id = :tenant and webhook.id = :id and removed = 0""",
        {"tenant": tenant_id, "id": webhook_id, "now": now_ms()},
    ).fetchone()
    if row is None:
        raise Refusal("not_found")
    return Receiver(*row[:5]), *row[5:]


@attrs.frozen
class Watcher:
    """A receiver for which there may be something to tell."""

    tenant_id: int
    webhook_id: int


@attrs.frozen
class Fresh:
    """Alerts that a receiver is to be told of and is not noted for yet, each with the key of its group; and keys of groups in which
    something is over. `after`: the alert to go on after, None at the end."""

    alerts: list[tuple[int, str]]
    over: list[str]
    after: int | None

    @property
    def keys(self) -> list[str]:
        return list({*self.over, *(key for _, key in self.alerts)})


def note_alerts(connection: sqlite3.Connection, webhook_id: int, fresh: Fresh) -> None:
    """Note alerts for a receiver, and when their groups are due: so long after the first of them, and after what was told last."""
    now, (rows,), (keys,) = now_ms(), bind(fresh.alerts), bind(fresh.keys)
    connection.execute(
        """insert into notice (webhook_id, alert_id, key) select webhook.id, alert.id, noted.value ->> 1
           from webhook cross join json_each(:rows) noted cross join alert on alert.id = noted.value ->> 0
           where webhook.id = :webhook and webhook.removed = 0 on conflict do nothing""",
        {"webhook": webhook_id, "rows": rows},
    )
    connection.execute(
        """insert into alert_group (webhook_id, key, due_at)
           select webhook.id, noted.value, :now + group_wait from webhook cross join json_each(:keys) noted
           where webhook.id = :webhook and webhook.removed = 0
           on conflict do update set due_at = min(due_at, max(
               excluded.due_at, coalesce(told_at + (select group_interval from webhook where webhook.id = :webhook), 0)))""",
        {"webhook": webhook_id, "keys": keys, "now": now},
    )


def set_groups_back(connection: sqlite3.Connection) -> None:
    """The clock may have been ahead when groups were told: none waits for longer than its receiver asks for."""
    connection.execute(
        """update alert_group set told_at = min(told_at, :now), due_at = min(due_at, :now + (
               select max(group_wait, group_interval) from webhook where webhook.id = webhook_id)) where due_at > :now""",
        {"now": now_ms()},
    )


@attrs.frozen
class DueGroup:
    """A group in which it is to be looked whether there is something to tell."""

    webhook_id: int
    key: str
    due_at: int
    told_at: int | None
    tenant_id: int
    form: str
    group_by: str
    interval: int
    repeat: int


@attrs.frozen
class Content:
    """What there is to tell of a group: how many alerts fire, of which a receiver knows nothing yet (`fresh`), of which nobody said that
    they know (`open`), which are due to be told again (`overdue`); and how many are over. The numbers of both kinds, and the first of
    all themselves."""

    firing: int
    resolved: int
    fresh: int
    open: int
    overdue: int
    firing_ids: list[int]
    over_ids: list[int]
    shown: list[list[Any]]


@attrs.frozen
class Telling:
    """What becomes of a due group, and when it is due again: `message_id` None where nothing is told; numbers of alerts that are told
    to fire and to be over."""

    group: DueGroup
    at: int
    due_at: int
    firing: tuple[int, ...] = ()
    over: tuple[int, ...] = ()
    message_id: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    body: str = ""
    goes_on: bool = False  # what is noted beyond that stays noted

    @property
    def row(self) -> dict[str, object]:
        group = self.group
        return {
            "webhook": group.webhook_id, "key": group.key, "was_due_at": group.due_at, "tenant": group.tenant_id, "at": self.at,
            "due_at": self.due_at, "told": self.message_id is not None, "firing": bind(self.firing)[0],
            "over": bind(self.over)[0], "alerts": len(self.firing) + len(self.over),
            "message_id": self.message_id, "headers": bind(dict(self.headers))[0], "body": self.body,
        }  # fmt: skip


def write_telling(connection: sqlite3.Connection, telling: Telling) -> None:
    """A notification, and that its receiver knows of what it tells. Whatever was noted and is not told is noted anew when it may be."""
    row = telling.row
    if connection.execute(
        """update alert_group set due_at = :due_at, told_at = case when :told then :at else told_at end
           where webhook_id = :webhook and key = :key and due_at = :was_due_at""",
        row,
    ).rowcount == 0:
        return  # it was told by another, or its receiver is gone
    if telling.message_id is not None:
        connection.execute(
            """insert into notification (tenant_id, webhook_id, message_id, at, alerts, headers, body, next_at)
               values (:tenant, :webhook, :message_id, :at, :alerts, :headers, :body, :at)""",
            row,
        )
        connection.execute(
            "delete from notice where webhook_id = :webhook and alert_id in (select value from json_each(:over))", row
        )
        connection.execute(
            "update notice set told_at = :at where webhook_id = :webhook and alert_id in (select value from json_each(:firing))", row
        )
    if telling.goes_on:
        return
    connection.execute("delete from notice where webhook_id = :webhook and key = :key and told_at is null", row)
    connection.execute(
        """delete from alert_group where webhook_id = :webhook and key = :key
           and not exists (select 1 from notice where notice.webhook_id = :webhook and notice.key = :key)""",
        row,
    )


@attrs.frozen
class Undelivered:
    """The first notification that waits for a receiver."""

    receiver: Receiver
    notification_id: int
    message_id: str
    at: int
    tries: int
    headers: dict[str, str]
    body: str


def mark_notification(connection: sqlite3.Connection, notification_id: int, attempt: Attempt, next_at: int | None) -> None:
    """What came of a try; `next_at` None: there is none after it."""
    delivered = attempt.error is None
    status = "delivered" if delivered else "waiting" if next_at else "given_up"
    connection.execute(
        """update notification set tries = tries + 1, status = :status, error = :error, next_at = :next_at,
               delivered_at = case when :status = 'delivered' then :now end, body = case when :status = 'waiting' then body end
           where id = :id and status = 'waiting'""",
        {"id": notification_id, "status": status, "error": attempt.error, "next_at": None if delivered else next_at, "now": now_ms()},
    )


class NotificationReads(Queries):
    """Queries over receivers, what they are to be told, and what is sent to them."""

    def __init__(self, readers: Readers, limits: Limits) -> None:
        super().__init__(readers)
        self._limits = limits

    async def has_old(self, before: int) -> bool:
        """Whether there are notifications from before a time that are sent no more."""
        where = {"before": before}
        return await self._readers.row("select 1 from notification where status <> 'waiting' and at < :before limit 1", where) is not None

    async def is_told_later(self) -> bool:
        """Whether a group waits."""
        return await self._readers.row("select 1 from alert_group where due_at > :now limit 1", {"now": now_ms()}) is not None

    async def webhooks(self, tenant: int, limit: int, after: int) -> str:
        return await self._list(
            f"""select id position, {WEBHOOK_JSON} item from webhook
                where tenant_id = :tenant and id > :after and removed = 0 order by id""",
            limit, tenant=tenant, after=after, now=now_ms(),
        )  # fmt: skip

    async def webhook(self, tenant: int, webhook_id: int) -> str | None:
        return await self._json(
            f"select {WEBHOOK_JSON} from webhook where tenant_id = :tenant and id = :webhook and removed = 0",
            tenant=tenant, webhook=webhook_id, now=now_ms(),
        )  # fmt: skip

    async def notifications(self, tenant: int, webhook_id: int | None, status: str | None, limit: int, after: int) -> str:
        """Newest first; `after` is the id of the last one seen."""
        whose = "tenant_id = :tenant" if webhook_id is None else "webhook_id = :webhook and +tenant_id = :tenant"
        return await self._list(
            f"""select id position, {NOTIFICATION_JSON} item from notification
                where {whose} and id < :after and (:status is null or status = :status) order by id desc""",
            limit, tenant=tenant, webhook=webhook_id, status=status, after=after,
        )  # fmt: skip

    async def waiting(self) -> int:
        """How many are to be delivered, of all tenants."""
        row = await self._readers.row("select count(*) from notification where status = 'waiting'", {})
        return int(row[0]) if row else 0

    async def watchers(self) -> list[Watcher]:
        """Receivers for which there may be something to tell, of all tenants."""
        text = await self._json(
            """select json_group_array(json_array(tenant_id, id)) from webhook where removed = 0 and (
                   exists (select 1 from alert where alert.tenant_id = webhook.tenant_id and fired_at is not null and resolved_at is null)
                   or exists (select 1 from notice where webhook_id = webhook.id))"""
        )
        return [Watcher(*row) for row in orjson.loads(text or "[]")]

    async def fresh(self, tenant: int, webhook_id: int, after: int, most: int, seconds: float) -> Fresh:
        """Among so many firing alerts after one."""
        row = await self._readers.exact(
            f"""with looked as materialized (
                    select id from alert where tenant_id = :tenant and fired_at is not null and resolved_at is null and id > :after
                    order by id limit :most)
                select json_array(
                    (select json_group_array(json_array(alert.id, {GROUP_KEY_SQL}))
                     from looked cross join alert on alert.id = looked.id cross join device on device.id = alert.device_id
                     cross join webhook on webhook.id = :webhook and webhook.tenant_id = :tenant
                     where not exists (select 1 from notice where notice.webhook_id = :webhook and notice.alert_id = alert.id)
                     and {CONCERNS_SQL} and {TELLABLE_SQL}),
                    (select json_group_array(key) from (
                        select distinct notice.key from notice cross join alert on alert.id = notice.alert_id
                        cross join device on device.id = alert.device_id cross join webhook on webhook.id = notice.webhook_id
                        where :after = 0 and notice.webhook_id = :webhook and webhook.tenant_id = :tenant and notice.told_at is not null
                        and alert.resolved_at is not null and {TELLABLE_SQL}
                        and exists (
                            select 1 from alert_group cross join webhook on webhook.id = alert_group.webhook_id
                            where alert_group.webhook_id = :webhook and alert_group.key = notice.key
                            and due_at > max(:now + group_wait, coalesce(told_at + group_interval, 0))))),
                    (select case when count(*) = :most then max(id) end from looked))""",
            {"tenant": tenant, "webhook": webhook_id, "after": after, "most": most, "now": now_ms()}, seconds,
        )  # fmt: skip
        alerts, over, last = orjson.loads(row or b"[[], [], null]")
        return Fresh([(number, key) for number, key in alerts], over, last)

    async def due_groups(self, most: int, waiting_most: int) -> tuple[list[DueGroup], int | None]:
        """So many groups that are due, and when the next one is, of all tenants; but for those of receivers for whom so many
        notifications wait."""
        text = await self._json(
            """with open as materialized (
                   select id from webhook where removed = 0 and not exists (
                       select 1 from notification where notification.webhook_id = webhook.id and status = 'waiting'
                       order by notification.id limit 1 offset :waiting_most - 1))
               select json_array(
                   (select json_group_array(json_array(webhook_id, key, due_at, told_at, tenant_id, form, group_by, group_interval,
                        repeat_interval))
                    from (select * from alert_group where due_at <= :now and +webhook_id in (select id from open)
                          order by due_at limit :most) due_now
                    cross join webhook on webhook.id = webhook_id),
                   (select min(due_at) from alert_group where due_at > :now))""",
            now=now_ms(), most=most, waiting_most=waiting_most,
        )  # fmt: skip
        rows, due_at = orjson.loads(text or "[[], null]")
        return [DueGroup(*row) for row in rows], due_at

    async def content(self, tenant: int, group: DueGroup, shown: int, most: int, seconds: float) -> Content:
        """What there is to tell of a group: first what is over, then what is new."""
        row = await self._readers.exact(
            f"""with member as materialized (
                    select alert.id id, alert.resolved_at is null firing, notice.told_at told_at, {ACKNOWLEDGED_SQL} known,
                        coalesce(notice.told_at not between :now - :repeat + 1 and :now, 0) overdue,
                        row_number() over (order by alert.resolved_at is null, notice.told_at, alert.id) place
                    from notice cross join alert on alert.id = notice.alert_id cross join device on device.id = alert.device_id
                    cross join webhook on webhook.id = notice.webhook_id
                    where notice.webhook_id = :webhook and notice.key = :key and webhook.tenant_id = :tenant
                    and (alert.resolved_at is null or notice.told_at is not null) and {TELLABLE_SQL})
                select json_array(
                    (select count(*) from member where firing), (select count(*) from member where not firing),
                    (select count(*) from member where firing and told_at is null),
                    (select count(*) from member where firing and not known),
                    (select count(*) from member where firing and overdue),
                    (select json_group_array(id) from (select id from member where place <= :most and firing order by place)),
                    (select json_group_array(id) from (select id from member where place <= :most and not firing order by place)),
                    (select json_group_array(json(item)) from (
                        select {ALERT_SHOWN_SQL} item from member cross join alert on alert.id = member.id
                        cross join device on device.id = alert.device_id cross join tenant on tenant.id = alert.tenant_id
                        left join presence on presence.device_id = device.id
                        where place <= :shown order by place)))""",
            {"tenant": tenant, "webhook": group.webhook_id, "key": group.key, "repeat": group.repeat, "shown": shown, "most": most,
             **alert_times(self._limits)}, seconds,
        )  # fmt: skip
        return Content(*orjson.loads(row or b"[0, 0, 0, 0, 0, [], [], []]"))

    async def to_deliver(self, busy: list[int], latest: int, most: int) -> tuple[list[Undelivered], int | None]:
        """The first notification of each receiver that has one that is due, but for those that are busy; and when the next one is due.
        One that is due later than any may be was made so by a clock that has been set back."""
        text = await self._json(
            f"""with head as materialized (
                    select notification.id id, next_at, tries from webhook cross join notification on notification.id = (
                        select min(id) from notification waiting where waiting.webhook_id = webhook.id and waiting.status = 'waiting')
                    where removed = 0 and webhook.id not in (select value from json_each(:busy)))
                select json_array(
                    (select json_group_array(json_array(notification.id, message_id, notification.at, notification.tries, json(headers),
                         body, json_array({RECEIVER_COLUMNS})))
                     from (select id from head where next_at <= :now or next_at > :latest order by tries > 0, next_at limit :most) due_now
                     cross join notification on notification.id = due_now.id cross join webhook on webhook.id = webhook_id),
                    (select min(next_at) from head where next_at > :now))""",
            busy=bind(busy)[0], now=now_ms(), latest=latest, most=most,
        )  # fmt: skip
        rows, next_at = orjson.loads(text or "[[], null]")
        return [Undelivered(Receiver(*columns), *row) for *row, columns in rows], next_at


# ==== Commands ====
# Owns: every line of SQL about commands, those for many devices, and what they write. Must not know: HTTP, sockets, the shape of frames.

MOVABLE: Final = ("sent", "running")  # by what the device says


FAILED_SQL: Final = "(status in ('failed', 'refused', 'timed_out', 'lost') or status = 'done' and exit_code <> 0)"
OPEN_SQL: Final = "status in ('queued', 'sent', 'running')"


def end_parts_of_batches(connection: sqlite3.Connection, batches: str, most: int) -> list[tuple[int, int]]:
    """Take stopped commands for many back from so many devices; they are over when no other waits."""
    waiting = "select id from command where batch_id in (select value from json_each(:batches)) and status = 'queued' limit :most"
    ended = end_commands(
        connection, f"id in ({waiting})", "cancelled", "the command for many devices was stopped", batches=batches, most=most
    )
    if len(ended) < most:
        connection.execute("update command_batch set next_at = null where id in (select value from json_each(?))", (batches,))
    return ended


def stop_batches(connection: sqlite3.Connection, batches: str, why: str, most: int) -> list[tuple[int, int]]:
    """Give commands for many to no more devices, and take them back from those that have not been sent theirs; `batches` are numbers, a
    JSON text. Those that this ends, each as its number and its device's."""
    connection.execute(
        "update command_batch set next_at = :now, stopped = :why where id in (select value from json_each(:batches))",
        {"batches": batches, "now": now_ms(), "why": why},
    )
    return end_parts_of_batches(connection, batches, most)


def stop_failing_batches(connection: sqlite3.Connection, commands: str, most: int) -> list[tuple[int, int]]:
    """Commands are over, their numbers a JSON text: those for many are stopped of which too many did not end well. Those that this ends,
    each as its number and its device's."""
    (batches,) = connection.execute(
        f"""select json_group_array(id) from command_batch batch
            where id in (
                select batch_id from json_each(:commands) wanted cross join command on command.id = wanted.value where {FAILED_SQL})
            and stopped is null and (next_at is not null or exists (select 1 from command where batch_id = batch.id and {OPEN_SQL}))
            and failures_most <= (select count(*) from command where batch_id = batch.id and {FAILED_SQL})""",
        {"commands": commands},
    ).fetchone()
    return [] if batches == "[]" else stop_batches(connection, batches, "failures", most)


@attrs.frozen
class CommandReport:
    """What a device says of a command, on its way to the disk: that it runs, without `stream` and `status`; what it wrote; or what became
    of it."""

    owner: Committed
    device_id: int
    seq: int
    at: int
    command: int
    stream: str | None = None
    data: bytes = b""
    status: str | None = None
    exit_code: int | None = None
    message: str | None = None
    output_bytes: int = 0


@attrs.define
class CommandProgress:
    """Where a command stands, while reports of it are taken."""

    id: int
    device_id: int
    status: str
    started_at: int | None
    stored: int
    written: int
    ended_at: int | None = None
    exit_code: int | None = None
    message: str | None = None

    def take(self, report: CommandReport, most: int) -> str | None:
        """Move on by what the device says; the code of the refusal, where it may not. `most`: bytes of output that are kept."""
        if self.device_id != report.device_id or self.status == "queued":
            return "unknown_command"
        if self.status not in MOVABLE:  # the end is told again where its confirmation was lost
            return None if report.status == self.status else "command_over"
        if report.status is None:
            self.status, self.started_at = "running", self.started_at or report.at
            self.stored, self.written = min(most, self.stored + len(report.data)), self.written + len(report.data)
        else:
            self.status, self.ended_at, self.exit_code, self.message = report.status, report.at, report.exit_code, report.message
            self.written = max(self.written, report.output_bytes)
        return None

    @property
    def row(self) -> tuple[object, ...]:
        written = min(self.written, INTEGERS - 1)
        return self.id, self.status, self.started_at, self.ended_at, self.exit_code, self.message, self.stored, written


@attrs.frozen
class CommandOutcome:
    """What reports have changed: which were refused, as (owner, code, seq), which commands have something new, and devices of which one
    is over."""

    refused: list[tuple[Committed, str, int]] = attrs.field(factory=list)
    changed: list[int] = attrs.field(factory=list)
    over: list[int] = attrs.field(factory=list)


def commands_in_progress(connection: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, CommandProgress]:
    (rows,) = connection.execute(
        """select json_group_array(json_array(id, device_id, status, started_at, stored_bytes, output_bytes))
           from command where id in (select value from json_each(?))""",
        bind(list(numbers)),
    ).fetchone()
    return {row[0]: CommandProgress(*row) for row in orjson.loads(rows)}


def insert_output(connection: sqlite3.Connection, pieces: list[tuple[object, ...]], data: bytes) -> None:
    """Each piece as (command, start, stream, at, place in `data`, length)."""
    connection.execute(
        """insert into command_output (command_id, start, stream, at, data)
           select value ->> 0, value ->> 1, value ->> 2, value ->> 3, substr(:data, (value ->> 4) + 1, value ->> 5)
           from json_each(:pieces)""",
        {"pieces": bind(pieces)[0], "data": data},
    )


def update_commands(connection: sqlite3.Connection, commands: Iterable[CommandProgress]) -> None:
    connection.execute(
        """update command set status = value ->> 1, started_at = value ->> 2, ended_at = value ->> 3, exit_code = value ->> 4,
               message = value ->> 5, stored_bytes = value ->> 6, output_bytes = value ->> 7,
               due_at = case when value ->> 3 is null then due_at end
           from json_each(?) where command.id = value ->> 0""",
        bind([command.row for command in commands]),
    )


def write_command_reports(connection: sqlite3.Connection, reports: list[CommandReport], limits: Limits) -> CommandOutcome:
    """What devices say of their commands, in order of arrival."""
    known = commands_in_progress(connection, {report.command for report in reports})
    refused, changed, over = list[tuple[Committed, str, int]](), dict[int, CommandProgress](), list[CommandProgress]()
    pieces, data = list[tuple[object, ...]](), bytearray()
    for report in reports:
        command = known.get(report.command)
        was_over, start = command is None or command.status not in MOVABLE, 0 if command is None else command.stored
        code = "unknown_command" if command is None else command.take(report, limits.command_bytes)
        if command is None or code is not None:
            refused.append((report.owner, code or "", report.seq))
        elif not was_over:
            changed[command.id] = command
            if room := command.stored - start:
                pieces.append((command.id, start, report.stream, report.at, len(data), room))
                data += report.data[:room]
            if command.ended_at is not None:
                over.append(command)
    if pieces:
        insert_output(connection, pieces, bytes(data))
    if changed:
        update_commands(connection, changed.values())
    stopped = list[tuple[int, int]]()
    if over:
        (numbers,) = bind([command.id for command in over])
        tell_of_ends(connection, numbers)
        stopped = stop_failing_batches(connection, numbers, limits.command_devices)
    return CommandOutcome(
        refused, [*changed, *(number for number, _ in stopped)], [command.device_id for command in over] + [device for _, device in stopped]
    )


@attrs.frozen
class WantedCommand:
    """What is to be run: the JSON text of its words, times in milliseconds, and the key by which its request is known again."""

    argv: str
    timeout: int
    ttl: int | None
    parallel: bool
    key: str | None = None


def known_by_key(row: tuple[Any, ...] | None, wanted: tuple[object, ...]) -> int | None:
    """The number of what a request has made before, in a row of that and of what it asked for. Refusal: key_reused, for another one."""
    if row is not None and row[1:] != wanted:
        raise Refusal("key_reused")
    return None if row is None else int(row[0])


def insert_command(
    connection: sqlite3.Connection, actor: Actor, device: str, wanted: WantedCommand, most: int
) -> tuple[int, int, bool]:
    """A command for a device: its number, the device's, and whether it is new. Refusal: not_found, device_offline, too_many_commands,
    key_reused."""
    device_id, _ = device_row(connection, cast(int, actor.tenant_id), device)
    made = connection.execute(
        "select id, argv, timeout, ttl, parallel from command where device_id = ? and key = ?", (device_id, wanted.key)
    ).fetchone()
    if (known := known_by_key(made, (wanted.argv, wanted.timeout, wanted.ttl, int(wanted.parallel)))) is not None:
        return known, device_id, False
    connected, waiting = connection.execute(
        "select connected, (select count(*) from command where device_id = :id and ended_at is null) from presence where device_id = :id",
        {"id": device_id},
    ).fetchone()
    if not connected and wanted.ttl is None:
        raise Refusal("device_offline")
    if waiting >= most:
        raise Refusal("too_many_commands", retry_after=1)
    now = now_ms()
    (number,) = connection.execute(
        """insert into command (device_id, argv, timeout, ttl, parallel, actor, key, status, at, due_at)
           values (:device, :argv, :timeout, :ttl, :parallel, :actor, :key, 'queued', :now, :now + :ttl) returning id""",
        {"device": device_id, "now": now, "actor": orjson.dumps(attrs.asdict(actor)).decode(), **attrs.asdict(wanted)},
    ).fetchone()
    tell_of_commands(connection, f"[{number}]")
    return number, device_id, True


def cancel_command(connection: sqlite3.Connection, tenant_id: int, device: str, number: int, grace: int) -> tuple[int, bool]:
    """Take a command back; the number of its device, and whether that is to be told. For so many milliseconds it is waited for then.
    Refusal: not_found, command_over."""
    device_id, _ = device_row(connection, tenant_id, device)
    row = connection.execute("select status, ended_at from command where id = ? and device_id = ?", (number, device_id)).fetchone()
    if row is None:
        raise Refusal("not_found")
    if row[1] is not None:
        raise Refusal("command_over")
    if row[0] == "queued":
        end_commands(connection, "id = :id", "cancelled", "it was taken back before it was sent", id=number)
        return device_id, False
    connection.execute(
        "update command set cancelled_at = coalesce(cancelled_at, :now), due_at = min(due_at, :now + :grace) where id = :id",
        {"now": now_ms(), "grace": grace, "id": number},
    )
    return device_id, True


@attrs.frozen
class WantedBatch(WantedCommand):
    """What is to be run by all devices whose name matches, and how."""

    match: str = ""
    per_minute: int | None = None
    failures_most: int | None = None


def insert_batch(connection: sqlite3.Connection, actor: Actor, wanted: WantedBatch, most: int) -> tuple[int, bool]:
    """A command for many: its number, and whether it is new; `make_parts_of_batches` gives it to them. Refusal: too_many_commands,
    key_reused."""
    tenant = cast(int, actor.tenant_id)
    made = connection.execute(
        """select id, match, per_minute, failures_most, argv, timeout, ttl, parallel from command_batch
           where tenant_id = ? and key = ?""",
        (tenant, wanted.key),
    ).fetchone()
    same = (wanted.match, wanted.per_minute, wanted.failures_most, wanted.argv, wanted.timeout, wanted.ttl, int(wanted.parallel))
    if (known := known_by_key(made, same)) is not None:
        return known, False
    (waiting,) = connection.execute(
        "select count(*) from command_batch where next_at is not null and tenant_id = ?", (tenant,)
    ).fetchone()
    if waiting >= most:
        raise Refusal("too_many_commands", retry_after=1)
    (number,) = connection.execute(
        """insert into command_batch (tenant_id, match, argv, timeout, ttl, parallel, per_minute, failures_most, actor, key, at, next_at,
               devices, newest)
           select :tenant, :match, :argv, :timeout, :ttl, :parallel, :per_minute, :failures_most, :actor, :key, :now, :now,
               (select count(*) from device where tenant_id = :tenant and name glob :match), coalesce(max(id), 0) from device
           returning id""",
        {"tenant": tenant, "now": now_ms(), "actor": orjson.dumps(attrs.asdict(actor)).decode(), **attrs.asdict(wanted)},
    ).fetchone()
    return int(number), True


def cancel_batch(connection: sqlite3.Connection, tenant_id: int, number: int, most: int) -> list[tuple[int, int]]:
    """As `stop_batches`. Refusal: not_found, command_over when it went to all."""
    row = connection.execute("select stopped, next_at from command_batch where id = ? and tenant_id = ?", (number, tenant_id)).fetchone()
    if row is None:
        raise Refusal("not_found")
    waits = connection.execute("select 1 from command where batch_id = ? and status = 'queued'", (number,)).fetchone()
    if row[0] is not None or (row[1] is None and waits is None):
        raise Refusal("command_over")
    return stop_batches(connection, f"[{number}]", "cancelled", most)


def give_part_of_batch(connection: sqlite3.Connection, number: int, devices: list[int], now: int) -> list[int]:
    """A command of a batch for each of some devices, which are those that it is told of; for those that cannot be reached in time it is
    over at once."""
    if not devices:
        return []
    (newest,) = connection.execute("select coalesce(max(id), 0) from command where batch_id = ?", (number,)).fetchone()
    connection.execute(
        """insert into command (device_id, batch_id, argv, timeout, ttl, parallel, actor, status, at, due_at, ended_at, message)
           select device_id, batch.id, argv, timeout, ttl, parallel, actor, case when reachable then 'queued' else 'expired' end, :now,
               case when reachable then :now + ttl end, case when reachable then null else :now end,
               case when reachable then null else 'the device is not connected' end
           from (select wanted.key place, device_id, batch.*, connected = 1 or batch.ttl is not null reachable
                 from json_each(:devices) wanted cross join command_batch batch on batch.id = :batch
                 cross join presence on presence.device_id = wanted.value) batch order by place""",
        {"batch": number, "devices": bind(devices)[0], "now": now},
    )
    numbers, over = connection.execute(
        """select json_group_array(id), json_group_array(id) filter (where ended_at is not null)
           from (select id, ended_at from command where batch_id = ? and id > ? order by id)""",
        (number, newest),
    ).fetchone()
    account_for_commands(connection, numbers, "command.run", "json_object('batch', batch_id)")
    tell_of_commands(connection, numbers)
    account_for_ends(connection, over)
    return devices


def make_parts_of_batches(connection: sqlite3.Connection, now: int, most: int) -> list[int]:
    """Give the commands for many that are due to so many more devices each, or as many as they may in a second; which these are."""
    given = list[int]()
    for number, tenant_id, match, per_minute, newest, done in connection.execute(
        "select id, tenant_id, match, per_minute, newest, done from command_batch where next_at <= ? and stopped is null", (now,)
    ).fetchall():
        count = most if per_minute is None else min(most, max(1, per_minute // 60))
        (found,) = connection.execute(
            """select json_group_array(json_array(name, id)) from (
                   select name, id from device where tenant_id = ? and name > ? and name glob ? and id <= ? order by name limit ?)""",
            (tenant_id, done, match, newest, count),
        ).fetchone()
        devices = orjson.loads(found)
        next_at = None if len(devices) < count else now if per_minute is None else now + count * 60_000 // per_minute
        connection.execute(
            "update command_batch set done = ?, next_at = ? where id = ?", (devices[-1][0] if devices else done, next_at, number)
        )
        given += give_part_of_batch(connection, number, [device_id for _, device_id in devices], now)
    return given


def end_late_commands(connection: sqlite3.Connection, now: int, limits: Limits) -> list[tuple[int, int]]:
    """Commands whose time is over, each as its number and its device's. A device that is away may come back with the result, and one that
    has just come back is about to tell it."""
    (late,) = connection.execute(
        "select json_group_array(id) from (select id from command where due_at <= ? order by due_at limit ?)", (now, limits.command_devices)
    ).fetchone()
    if late == "[]":
        return []
    connection.execute(
        """update command set due_at = :now + :grace from presence
           where id in (select value from json_each(:late)) and status in ('sent', 'running') and presence.device_id = command.device_id
           and case when connected then connected_at > :now - :grace else :now < sent_at + timeout + :away end""",
        {
            "late": late, "now": now, "grace": round(limits.command_grace_seconds * 1000),
            "away": round(limits.command_away_seconds * 1000),
        },
    )  # fmt: skip
    due, times = "id in (select value from json_each(:late)) and due_at <= :now", {"late": late, "now": now}
    expired = end_commands(connection, f"{due} and status = 'queued'", "expired", "its turn did not come within its ttl", **times)
    return expired + end_commands(connection, due, "timed_out", "the device did not tell its end in time", **times)


def command_frames(connection: sqlite3.Connection, numbers: str, limits: Limits) -> list[tuple[int, str]]:
    """Frames that give commands to their devices, each as device and text."""
    (rows,) = connection.execute(
        """select json_group_array(json_array(device_id, frame)) from (
               select device_id, json_object('type', 'command', 'command', id, 'argv', json(argv), 'timeout', timeout / 1000.0,
                   'output_bytes', :bytes) frame
               from command where id in (select value from json_each(:numbers)) order by id)""",
        {"numbers": numbers, "bytes": limits.command_bytes},
    ).fetchone()
    return [(device_id, frame) for device_id, frame in orjson.loads(rows)]


def send_commands(connection: sqlite3.Connection, devices: list[int], now: int, limits: Limits) -> list[tuple[int, str]]:
    """Commands whose turn it is on these devices, as device and frame: those that may run beside others, and the first of the others.
    They count as sent before they are: otherwise a crash between the two would send them twice."""
    (numbers,) = connection.execute(
        """select json_group_array(id) from (
               select command.id id from json_each(?) wanted
               cross join presence on presence.device_id = wanted.value and connected = 1
               cross join command on command.device_id = wanted.value and ended_at is null
               where status = 'queued' and (parallel = 1 or not exists (
                   select 1 from command earlier where earlier.device_id = command.device_id and earlier.ended_at is null
                   and earlier.parallel = 0 and earlier.id < command.id))
               and not exists (select 1 from command_batch batch where batch.id = batch_id and stopped is not null) order by command.id)""",
        bind(devices),
    ).fetchone()
    if numbers == "[]":
        return []
    times = {"numbers": numbers, "now": now, "grace": round(limits.command_grace_seconds * 1000)}
    connection.execute(
        """update command set status = 'sent', sent_at = :now, due_at = :now + timeout + :grace
           where id in (select value from json_each(:numbers))""",
        times,
    )
    return command_frames(connection, numbers, limits)


def cancel_frame(number: int) -> str:
    return f'{{"type":"cancel","command":{number}}}'


def send_commands_again(connection: sqlite3.Connection, devices: list[int], now: int, limits: Limits) -> list[tuple[int, str]]:
    """To devices that have come back: what may not have reached them. What they know already they leave out."""
    (ids,) = bind(devices)
    (numbers,) = connection.execute(
        """select json_group_array(id) from command
           where device_id in (select value from json_each(:devices)) and ended_at is null and status = 'sent' and cancelled_at is null
           and :now < case when ttl is null then sent_at + :again else at + ttl end""",
        {"devices": ids, "now": now, "again": round(limits.command_again_seconds * 1000)},
    ).fetchone()
    frames = command_frames(connection, numbers, limits)
    (cancelled,) = connection.execute(
        """select json_group_array(json_array(device_id, id)) from command
           where device_id in (select value from json_each(?)) and ended_at is null and cancelled_at is not null""",
        (ids,),
    ).fetchone()
    return frames + [(device_id, cancel_frame(number)) for device_id, number in orjson.loads(cancelled)]


@attrs.frozen
class CommandStep:
    """What a look at all commands has changed: frames to send, as device and text; and commands that are over, as number and device."""

    frames: list[tuple[int, str]]
    ended: list[tuple[int, int]]


def go_on_with_commands(connection: sqlite3.Connection, devices: list[int], back: list[int], limits: Limits) -> CommandStep:
    """End what is late, give commands for many to more devices, and send what may be sent: to devices that are named, because one of
    their commands is over, say; `back` are those with a new session."""
    now = now_ms()
    ended = end_late_commands(connection, now, limits)
    if ended:
        ended += stop_failing_batches(connection, *bind([number for number, _ in ended]), limits.command_devices)
    (stopped,) = connection.execute(
        "select json_group_array(id) from command_batch where next_at <= ? and stopped is not null", (now,)
    ).fetchone()
    if stopped != "[]":
        ended += end_parts_of_batches(connection, stopped, limits.command_devices)
    given = make_parts_of_batches(connection, now, limits.command_devices)
    again = send_commands_again(connection, back, now, limits) if back else []
    wanted = list({*devices, *back, *given, *(device_id for _, device_id in ended)})
    return CommandStep(again + send_commands(connection, wanted, now, limits), ended)


def insert_tunnel(connection: sqlite3.Connection, actor: Actor, device_id: int, port: int) -> int:
    """A tunnel is about to be opened; its number."""
    now = now_ms()
    (number,) = connection.execute(
        "insert into tunnel (device_id, port, actor, at) values (?, ?, ?, ?) returning id",
        (device_id, port, orjson.dumps(attrs.asdict(actor)).decode(), now),
    ).fetchone()
    add_event(connection, device_id, now, "tunnel", {"tunnel": number, "port": port, "status": "opened", "by": actor.name})
    return int(number)


def end_tunnels(
    connection: sqlite3.Connection, which: str, reason: str, from_device: int | None, to_device: int | None, **parameters: object
) -> None:
    """Tunnels are over: for the timelines and the audit; bytes None where they are not known."""
    told = {**parameters, "now": now_ms(), "reason": reason, "from_device": from_device, "to_device": to_device}
    add_events(
        connection,
        f"""select device_id, :now at, 'tunnel' kind, json_object('tunnel', id, 'port', port, 'status', 'closed', 'reason', :reason,
                'by', actor ->> 'name') detail, id position from tunnel where {which}""",
        told,
    )
    connection.execute(
        f"""insert into audit (tenant_id, at, token, name, role, action, target, device, address, outcome, detail)
            select device.tenant_id, :now, actor ->> 'token_id', actor ->> 'name', actor ->> 'role', 'tunnel.end', cast(port as text),
                coalesce(device.name, device.old_name), actor ->> 'address', 'ok', json_object('reason', :reason,
                'seconds', (:now - tunnel.at) / 1000.0, 'from_device', :from_device, 'to_device', :to_device)
            from (select * from tunnel where {which}) tunnel cross join device on device.id = device_id
            cross join tenant on tenant.id = device.tenant_id where tenant.name is not null order by tunnel.id""",
        told,
    )
    connection.execute(f"delete from tunnel where {which}", parameters)


def delete_commands(connection: sqlite3.Connection, which: str, limits: Limits, **parameters: object) -> int:
    """Some commands with what they wrote, not more than is quick; how many."""
    return connection.execute(
        f"""delete from command where id in (
                select id from (select id, row_number() over () number, sum(stored_bytes) over (
                                    rows between unbounded preceding and current row) size
                                from (select id, stored_bytes from command where {which} limit :most))
                where number = 1 or size <= :bytes)""",
        {**parameters, "most": limits.removed_rows, "bytes": limits.removed_bytes},
    ).rowcount


# Commands for many of which none is left.
OLD_BATCHES: Final = """select id from command_batch batch
    where at < :before and next_at is null and not exists (select 1 from command where batch_id = batch.id)"""


def delete_old_commands(connection: sqlite3.Connection, before: int, limits: Limits) -> bool:
    """Those that ended before a time, and commands for many, some of them; whether there may be more."""
    if delete_commands(connection, "ended_at < :before", limits, before=before):
        return True
    some = f"delete from command_batch where id in ({OLD_BATCHES} limit :most)"
    return connection.execute(some, {"before": before, "most": limits.removed_documents}).rowcount > 0


COMMAND_JSON: Final = f"""json_object(
    'id', command.id, 'device', device.name, 'argv', json(argv), 'status', status, 'exit_code', exit_code, 'message', message,
    'timeout', timeout / 1000.0, 'parallel', json(case when parallel then 'true' else 'false' end), 'batch', batch_id,
    'at', {time_sql("at")}, 'by', actor ->> 'name', 'expires_at', {time_sql("at + ttl")}, 'sent_at', {time_sql("sent_at")},
    'started_at', {time_sql("started_at")}, 'ended_at', {time_sql("ended_at")}, 'output_bytes', output_bytes,
    'output_cut', json(case when output_bytes > stored_bytes then 'true' else 'false' end))"""
BATCH_JSON: Final = f"""json_object(
    'id', batch.id, 'match', match, 'argv', json(argv), 'timeout', timeout / 1000.0,
    'parallel', json(case when parallel then 'true' else 'false' end), 'per_minute', per_minute, 'stop_after_failures', failures_most,
    'at', {time_sql("at")}, 'by', actor ->> 'name', 'devices', devices,
    'status', case when stopped is not null then 'stopped' when next_at is not null
        or exists (select 1 from command where batch_id = batch.id and {OPEN_SQL}) then 'running' else 'done' end,
    'stopped', stopped,
    'counts', (select json_group_object(status, number) from (
        select status, count(*) number from command where batch_id = batch.id group by status)),
    'not_begun', case when next_at is not null or stopped is not null
        then max(0, devices - (select count(*) from command where batch_id = batch.id)) else 0 end)"""
# What is kept of a command's output from a place on: [start, stream, when it came, its bytes in hexadecimal digits]. So many parts at one
# time: a device may send each byte by itself, and then all of them take seconds of the event loop.
OUTPUT_PIECES: Final = 1_000
PIECES_SQL: Final = f"""(select json_group_array(json_array(start, stream, at, bytes)) from (
    select start, stream, command_output.at at, hex(substr(data, 1, :most - start)) bytes from command_output
    where command_id = command.id and start >= :start and start < :most order by start limit {OUTPUT_PIECES}))"""


@attrs.frozen
class OutputPiece:
    """A part of what a command wrote: how many bytes of both streams were before it, when it came in milliseconds, and its bytes."""

    start: int
    stream: str
    at: int
    data: bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.data)

    @classmethod
    def of(cls, rows: Iterable[list[Any]]) -> list[OutputPiece]:
        return [cls(start, stream, at, bytes.fromhex(digits)) for start, stream, at, digits in rows]


class OutputDecoder:
    """What a command wrote as text, part by part: bytes that are no UTF-8 as replacement characters, and a character that is cut
    between two parts whole."""

    def __init__(self) -> None:
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in ("stdout", "stderr")}

    def take(self, pieces: Iterable[OutputPiece]) -> str:
        return "".join(self._decoders[piece.stream].decode(piece.data) for piece in pieces)

    def end(self) -> str:
        return "".join(decoder.decode(b"", final=True) for decoder in self._decoders.values())


OUTPUT_END: Final = 2**31 - 1  # SQLite counts the bytes of a text with 32 bits; no output has so many


class CommandReads(Queries):
    """Queries over commands, those for many, and what they wrote."""

    async def is_due(self) -> bool:
        """Whether the clock has something to do, for any tenant."""
        row = await self._readers.row(
            """select exists (select 1 from command where due_at <= :now)
                   or exists (select 1 from command_batch where next_at <= :now)""",
            {"now": now_ms()},
        )
        return bool(row and row[0])

    async def has_old(self, before: int) -> bool:
        row = await self._readers.row(
            f"select exists (select 1 from command where ended_at < :before) or exists ({OLD_BATCHES})", {"before": before}
        )
        return bool(row and row[0])

    async def commands(self, tenant: int, device: str, statuses: tuple[str, ...], limit: int, after: int) -> str | None:
        """Of one device, newest first; None without such a device."""
        found = "select 1 from device where tenant_id = :tenant and name = :device"
        if await self._readers.row(found, {"tenant": tenant, "device": device}) is None:
            return None
        return await self._list(
            f"""select command.id position, {COMMAND_JSON} item from device cross join command on device_id = device.id
                where tenant_id = :tenant and name = :device and command.id < :after
                and (:statuses = '[]' or status in (select value from json_each(:statuses))) order by command.id desc""",
            limit, tenant=tenant, device=device, after=after, statuses=bind(statuses)[0],
        )  # fmt: skip

    async def command(
        self, tenant: int, device: str, number: int, start: int = 0, most: int = OUTPUT_END
    ) -> tuple[dict[str, Any], list[OutputPiece]] | None:
        """A command, and what it wrote from a place on up to another one, `OUTPUT_PIECES` of it; None where there is none."""
        row = await self._readers.row(
            f"""select {COMMAND_JSON}, {PIECES_SQL} from device cross join command on device_id = device.id
                where tenant_id = :tenant and name = :device and command.id = :id""",
            {"tenant": tenant, "device": device, "id": number, "start": start, "most": most},
        )
        return None if row is None else (orjson.loads(row[0]), OutputPiece.of(orjson.loads(row[1])))

    async def batches(self, tenant: int, limit: int, after: int) -> str:
        return await self._list(
            f"""select batch.id position, {BATCH_JSON} item from command_batch batch
                where tenant_id = :tenant and batch.id < :after order by batch.id desc""",
            limit, tenant=tenant, after=after,
        )  # fmt: skip

    async def batch(self, tenant: int, number: int, limit: int, after: int, most: int) -> dict[str, Any] | None:
        """A command for many, and a page of its commands in the order in which they were given, each with the first bytes that it wrote."""
        of_it = "from command_batch batch where tenant_id = :tenant and batch.id = :id"
        row = await self._readers.row(f"select {BATCH_JSON} {of_it}", {"tenant": tenant, "id": number})
        if row is None:
            return None
        page = await self._list(
            f"""select command.id position, json_array({COMMAND_JSON}, {PIECES_SQL}) item
                from (select batch.id batch {of_it}) cross join command on batch_id = batch cross join device on device.id = device_id
                where command.id > :after order by command.id""",
            limit, tenant=tenant, id=number, after=after, start=0, most=most,
        )  # fmt: skip
        shown = orjson.loads(page)
        items = [{**item, "output": OutputDecoder().take(OutputPiece.of(pieces))} for item, pieces in shown["items"]]
        return {**orjson.loads(row[0]), "items": items, "next": shown["next"]}


# ==== Removal ====
# Owns: what is left of removed devices, tenants and readings, and its deletion little by little. Must not know: HTTP, sockets.

REMOVED_SQL: Final = """select
    (select json_group_array(id) from (
        select id from device where name is null and emptied = 0
        union all select id from device where name is null and emptied = 1 and removed_at <= :expired
        union all select id from device where name is null and emptied = 1 and removed_at > :now limit :most)),
    (select json_group_array(id) from tenant where name is null), exists (select 1 from removed_series),
    exists (select 1 from removed_range), (select min(id) from webhook where removed = 1)"""


@attrs.frozen
class Removed:
    """Numbers of removed devices and tenants of which something is to be deleted, a few at a time; whether there are series, and
    ranges of readings, too; and a receiver of notifications."""

    devices: list[int]
    tenants: list[int]
    series: bool
    ranges: bool
    webhook: int | None = None

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Removed:
        return cls(orjson.loads(row[0]), orjson.loads(row[1]), bool(row[2]), bool(row[3]), row[4])

    def __bool__(self) -> bool:
        return bool(self.devices or self.tenants or self.series or self.ranges or self.webhook)


def removal_times(limits: Limits) -> dict[str, int]:
    """The time now, and up to which a removal is so long ago that its device's events are no longer kept. A removal later than
    now was made while the clock was wrong."""
    now = now_ms()
    return {"now": now, "expired": now - round(limits.resume_seconds * 1000)}


def delete_removed_readings(connection: sqlite3.Connection, limits: Limits) -> None:
    """Of a few series, which may have millions, or none."""
    some = "select id from removed_series order by id limit ?"
    connection.execute(
        f"delete from telemetry where (series_id, ts) in (select series_id, ts from ({some}) join telemetry on series_id = id limit ?)",
        (limits.removed_series, limits.removed_rows),
    )
    connection.execute(
        f"delete from removed_series where id in ({some}) and not exists (select 1 from telemetry where series_id = id)",
        (limits.removed_series,),
    )


def delete_removed_ranges(connection: sqlite3.Connection, limits: Limits) -> None:
    """A few of them, or a part of the first."""
    marks, rest = connection.execute(
        "select id, series_id, start, stop from removed_range order by id limit ?", (limits.removed_series,)
    ).fetchall(), limits.removed_rows
    for mark, *where in marks:
        rest -= connection.execute(
            """delete from telemetry where (series_id, ts) in (
                   select series_id, ts from telemetry where series_id = ? and ts >= ? and ts < ? limit ?)""",
            (*where, rest),
        ).rowcount
        if rest <= 0:
            return
        connection.execute("delete from removed_range where id = ?", (mark,))


def delete_removed_devices(connection: sqlite3.Connection, devices: list[int], limits: Limits) -> None:
    """Rows of which there may be many; their readings are left to `delete_removed_readings`. Then the events, the alerts and the devices,
    but for those whose events are still in the live feed."""
    ids = bind(devices)
    of_them = "device_id in (select value from json_each(?))"
    # One version after the other: each may be long, and no more of them are to be read than are deleted.
    deleted_versions = connection.execute(
        """delete from state where (device_id, version) in (
               with recursive part (device_id, version, size, number) as (
                   select * from (select device_id, version, length(document) + length(changes), 1 from state
                                  where device_id in (select value from json_each(:ids)) order by device_id, version limit 1)
                   union all select next.device_id, next.version, size + length(document) + length(changes), number + 1
                   from part join state next on (next.device_id, next.version) = (
                       select device_id, version from state where device_id in (select value from json_each(:ids))
                       and (device_id, version) > (part.device_id, part.version) order by device_id, version limit 1)
                   where size < :bytes and number < :versions)
               select device_id, version from part where size <= :bytes or number = 1)""",
        {"ids": ids[0], "bytes": limits.removed_bytes, "versions": limits.removed_versions},
    ).rowcount
    if deleted_versions:
        return
    deleted = connection.execute(
        """delete from config where (device_id, version) in (
               select device_id, version from config where device_id in (select value from json_each(?)) limit ?)
           returning document_id""",
        (*ids, limits.removed_documents),
    ).fetchall()
    if deleted:
        delete_unused_documents(connection, [document_id for (document_id,) in deleted])
        return
    if delete_commands(connection, "device_id in (select value from json_each(:ids))", limits, ids=ids[0]):
        return
    if delete_lines_of(connection, " OR ".join(f'"d{device}"' for device in devices), limits.removed_lines):
        return
    connection.execute(f"insert into removed_series select id from series where {of_them}", ids)
    connection.execute(f"delete from series where {of_them}", ids)
    times = {"ids": ids[0], "most": limits.removed_rows, **removal_times(limits)}
    in_feed = "removed_at > :expired and removed_at <= :now"
    connection.execute(f"update device set emptied = 1 where id in (select value from json_each(:ids)) and {in_feed}", times)
    over = f"select id from device where id in (select value from json_each(:ids)) and ({in_feed}) is not true"
    for table in ("event", "alert"):
        some = f"delete from {table} where id in (select id from {table} where device_id in ({over}) limit :most)"
        if connection.execute(some, times).rowcount:
            return
    connection.execute(f"delete from device where id in ({over})", times)


def delete_removed_tenant(connection: sqlite3.Connection, tenant_id: int, limits: Limits) -> None:
    """The audit, the commands for many and the words of its logs, then the tenant; its devices have gone before."""
    deleted = sum(
        connection.execute(
            f"delete from {table} where id in (select id from {table} where tenant_id = ? limit ?)", (tenant_id, most)
        ).rowcount
        for table, most in (("audit", limits.removed_rows), ("command_batch", limits.removed_documents))
    )
    (words,) = connection.execute(
        "select json_group_array(id) from (select id from log_word where tenant_id = ? limit ?)", (tenant_id, limits.removed_rows)
    ).fetchone()
    delete_words(connection, orjson.loads(words))
    if not deleted and words == "[]":
        connection.execute("delete from tenant where id = ?", (tenant_id,))


def delete_removed(connection: sqlite3.Connection, removed: Removed, limits: Limits) -> None:
    """Delete a part of what is left of `removed`. Nothing may be under way any more from its devices."""
    if removed.series:
        delete_removed_readings(connection, limits)
    elif removed.ranges:
        delete_removed_ranges(connection, limits)
    elif removed.devices:
        delete_removed_devices(connection, removed.devices, limits)
    elif removed.webhook:
        delete_removed_webhook(connection, removed.webhook, limits.removed_rows)
    else:
        delete_removed_tenant(connection, removed.tenants[0], limits)


class RemovalReads:
    """What there is to delete. These are short, and share the readers of the tokens."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers

    async def removed(self, limits: Limits) -> Removed:
        """Of what there is something left to delete."""
        row = await self._readers.row(REMOVED_SQL, {"most": limits.removed_devices, **removal_times(limits)})
        assert row is not None
        return Removed.of(row)

    async def newest_moment(self) -> int | None:
        """The time of the newest line or event, by the server's clock; None where there is none."""
        row = await self._readers.row(
            """select max(at) from (
                select received_at at from log_line where id = (select max(id) from log_line)
                union all select at from event where id = (select max(id) from event))""",
            {},
        )
        return None if row is None or row[0] is None else int(row[0])

    async def is_range_left(self, marks: list[int]) -> bool:
        """Whether some of the readings that were marked to be deleted may still be there."""
        return await self._readers.row(
            "select 1 from removed_range where id in (select value from json_each(:marks)) limit 1", {"marks": bind(marks)[0]}
        ) is not None


# ==== Writer ====
# Owns: what waits to be stored, and the one task that stores it. Must not know: HTTP, sockets, the shape of frames.


class Change:
    """A control operation that waits in the batch, and the future that its caller awaits."""

    __slots__ = ("function", "future")

    def __init__(self, function: Callable[[sqlite3.Connection], Any], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.future = future

    def settle(self, outcome: object) -> None:
        if self.future.done():  # its caller was cancelled
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


@attrs.frozen
class Outcome:
    """What became of a batch: the results of its changes, the frames that were refused, as (owner, code, seq), what is new of commands, the
    configurations that were sent, as `Awaited` takes them, what the watch over alerts is to know, and how many seconds it took without its
    commit."""

    changes: list[object]
    refused: list[tuple[Committed, str, int]]
    commands: CommandOutcome
    awaited: list[tuple[int, int, int]]
    news: AlertNews
    seconds: float


def parts_of_points(points: dict[str, dict[str, Value]], most: int) -> Iterator[dict[str, dict[str, Value]]]:
    """So many points, or one series, for each run of a statement; mostly all of them. Devices that were held back may let go of more at
    once than the writer lets others send."""
    if len(points) > 1 and sum(map(len, points.values())) > most:
        series = list(points.items())
        middle = len(series) // 2
        yield from parts_of_points(dict(series[:middle]), most)
        yield from parts_of_points(dict(series[middle:]), most)
    elif points:
        yield points


class PointFeed:
    """Committed points that somebody follows and has not been sent yet, by series as the writer has them. One that falls behind loses
    what it has, and is told so."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._batches: deque[dict[str, dict[str, Value]]] = deque()
        self._count = 0
        self.behind = False
        self.ring = asyncio.Event()

    def add(self, points: dict[str, dict[str, Value]]) -> None:
        self._count += sum(map(len, points.values()))
        self._batches.append(points)
        if self._count > self._most:
            self._batches.clear()
            self._count, self.behind = 0, True
        self.ring.set()

    def take(self) -> list[dict[str, dict[str, Value]]]:
        self.ring.clear()
        batches, self._batches, self._count = list(self._batches), deque(), 0
        return batches


class Batch:
    """What the next transaction stores. Points lie by series and time, so the last write wins before SQL sees it."""

    def __init__(self) -> None:
        self.points: dict[str, dict[str, Value]] = {}
        self.points_taken = 0
        self.frames = 0
        self.since = 0.0  # when the first of those who wait began to
        self.weight = 0
        self.series: list[tuple[int, int, str]] = []
        self.progress: dict[str, tuple[int, int, int | None]] = {}  # by device: seq, seen_at, stamp
        self.usage: dict[int, tuple[int, int]] = {}  # by tenant: points, and bytes of logs
        self.tokens_used: dict[str, int] = {}  # operators': when
        self.partings: list[tuple[int, Parting]] = []
        self.configs_sent: list[tuple[int, int, int]] = []  # device, version, when
        self.states: list[tuple[int, StateReport]] = []
        self.verdicts: list[tuple[int, VerdictReport]] = []
        self.command_reports: list[CommandReport] = []
        self.events: list[TimelineEntry] = []
        self.lines: list[LogLine] = []
        self.waiting: dict[Committed, tuple[int, int]] = {}
        self.changes: list[Change] = []
        self.alerts = AlertWork()

    def __bool__(self) -> bool:
        has_rows = self.progress or self.series or self.points or self.lines or self.tokens_used
        return bool(has_rows or self.configs_sent or self.eventful or self.alerts)

    def arrival(self) -> int:
        """The number of the next of what makes an event."""
        return len(self.partings) + len(self.states) + len(self.verdicts) + len(self.events)

    @property
    def eventful(self) -> bool:
        """Whether it may add to somebody's timeline."""
        return bool(self.changes or self.partings or self.states or self.verdicts or self.command_reports or self.events)

    def write(self, connection: sqlite3.Connection, limits: Limits, dictionary: Dictionary) -> Outcome:
        """The whole batch in one transaction. Rows first: a change may remove what they name."""
        words = dictionary.new_words(self.lines)
        outcome = self._write(connection, limits, words)
        dictionary.know(words)
        return outcome

    def _write(self, connection: sqlite3.Connection, limits: Limits, words: set[tuple[int, str]]) -> Outcome:
        with transaction(connection):
            began = time.perf_counter()
            awaited = write_configs_sent(connection, self.configs_sent) if self.configs_sent else []
            self._write_rows(connection, limits)
            events = self.events + [parting.event(arrival) for arrival, parting in self.partings]
            refused = write_states(connection, self.states, events, limits) + write_verdicts(connection, self.verdicts, events)
            insert_events(connection, events)
            commands = self._write_commands(connection, limits)
            if self.lines:
                insert_log_lines(connection, self.lines)
            if words:
                insert_words(connection, words)
            if self.alerts:
                insert_events(connection, write_alerts(connection, self.alerts, now_ms()))
            results = [self._attempt(connection, change) for change in self.changes]
            news = look_up_for_watch(connection, self.alerts, limits, eventful=self.eventful or self.alerts.is_asking)
            return Outcome(results, refused + commands.refused, commands, awaited, news, time.perf_counter() - began)

    def _write_commands(self, connection: sqlite3.Connection, limits: Limits) -> CommandOutcome:
        """What devices say of their commands; and those are over that were for sessions that have ended."""
        told = write_command_reports(connection, self.command_reports, limits) if self.command_reports else CommandOutcome()
        parted = [parting.device_id for _, parting in self.partings]
        ended = end_unsendable(connection, *bind(parted)) if parted else []
        return attrs.evolve(told, changed=told.changed + [number for number, _ in ended])

    def _write_rows(self, connection: sqlite3.Connection, limits: Limits) -> None:
        if self.series:
            rows = bind(self.series)
            connection.execute(
                """insert into series (id, device_id, metric) select value ->> 0, value ->> 1, value ->> 2
                   from json_each(?) where value ->> 1 in (select id from device)""",
                rows,
            )
            connection.execute(  # of devices that were removed meanwhile: points may be on their way
                """insert into removed_series select value ->> 0 from json_each(?)
                   where value ->> 1 not in (select id from device)""",
                rows,
            )
        for points in parts_of_points(self.points, 2 * limits.pending_points):
            connection.execute(
                """insert into telemetry (series_id, ts, value)
                   select cast(series.key as integer), cast(point.key as integer), point.value
                   from json_each(?) series, json_each(series.value) point
                   where true on conflict do update set value = excluded.value""",
                bind(points),
            )
        if self.progress:
            connection.execute(
                """update presence set seq = max(seq, new.value ->> 0), seen_at = new.value ->> 1, stamp = coalesce(new.value ->> 2, stamp)
                   from json_each(?) new where device_id = cast(new.key as integer)""",
                bind(self.progress),
            )
        if self.usage:
            connection.execute(
                """insert into usage (tenant_id, day, points, log_bytes)
                   select value ->> '$[0]', ?2, value ->> '$[1][0]', value ->> '$[1][1]' from json_each(?1)
                   where value ->> '$[0]' in (select id from tenant)
                   on conflict do update set points = points + excluded.points, log_bytes = log_bytes + excluded.log_bytes""",
                (*bind(list(self.usage.items())), now_ms() // DAY),
            )
        if self.tokens_used:
            connection.execute(
                "update operator_token set used_at = value from json_each(?) where operator_token.id = key", bind(self.tokens_used)
            )
        if self.partings:
            self._write_partings(connection, bind([attrs.asdict(parting) for _, parting in self.partings]))

    @staticmethod
    def _write_partings(connection: sqlite3.Connection, rows: tuple[str]) -> None:
        connection.execute(
            """update presence set connected = 0, disconnected_at = value ->> 'at', seen_at = value ->> 'at'
               from json_each(?) where device_id = value ->> 'device_id' and presence.session = value ->> 'session'""",
            rows,
        )

    @staticmethod
    def _attempt(connection: sqlite3.Connection, change: Change) -> object:
        """One change in its own savepoint: its failure undoes it alone."""
        connection.execute("savepoint change")
        try:
            outcome: object = change.function(connection)
        except Exception as error:  # whatever it was, it is its caller's alone
            if not connection.in_transaction:  # the disk is full, say: SQLite has undone the whole batch
                raise
            connection.execute("rollback to change")
            outcome = error
        connection.execute("release change")
        return outcome


class Awaited:
    """Configurations that were sent and whose verdict is awaited, with the time at which each is late. It goes by the clock
    of the process: the wall clock may be set meanwhile. So a start gives each its whole time again."""

    def __init__(self) -> None:
        self._due: dict[tuple[int, int], float] = {}
        self._order: list[tuple[float, tuple[int, int]]] = []  # the same as a heap

    def add(self, sent: Iterable[tuple[int, int, int]]) -> None:
        """Each as device, version and milliseconds from now on. One that is sent again has the time that it had: the device may have
        come back because it cannot live with it."""
        now = time.monotonic()
        for device_id, version, timeout in sent:
            key, due = (device_id, version), now + timeout / 1000
            if self._due.setdefault(key, due) is due:
                heapq.heappush(self._order, (due, key))

    def take_late(self) -> list[tuple[int, int]]:
        """Those that are late by now, as device and version; each once."""
        now, late = time.monotonic(), []
        while self._order and self._order[0][0] <= now:
            _, key = heapq.heappop(self._order)
            del self._due[key]
            late.append(key)
        return late


class CommandTurns:
    """Devices that may be sent a command now: one of theirs is over, one is new, or they have come back."""

    def __init__(self) -> None:
        self._devices: dict[int, bool] = {}  # whether they have come back
        self._missed: set[int] = set()
        self.wanted = asyncio.Event()

    def add(self, devices: Iterable[int], *, back: bool = False) -> None:
        for device_id in devices:
            self._devices[device_id] = back or self._devices.get(device_id, False)
            self.wanted.set()

    def miss(self, device_id: int) -> None:
        """It had a turn before it was welcomed."""
        self._missed.add(device_id)

    def welcomed(self, device_id: int, *, has_commands: bool) -> None:
        """A new session can be reached; whether there were commands when it was opened."""
        if has_commands or device_id in self._missed:
            self._missed.discard(device_id)
            self.add([device_id], back=True)

    def take(self, most: int) -> dict[int, bool]:
        """So many of them; then they are forgotten here."""
        taken = dict(islice(self._devices.items(), most))
        for device_id in taken:
            del self._devices[device_id]
        if not self._devices:
            self.wanted.clear()
        return taken


class Writer:
    """The only writer: takes all that is pending, commits it as one transaction, then tells those who wait.

    Load makes batches larger, not the wait longer. It is stopped by `close`, after what is pending; it is never cancelled.
    """

    def __init__(self, connection: Connection, limits: Limits, shares: Shares, next_series: int, watch: AlertWatch) -> None:
        self._connection = connection
        self.watch = watch
        self._limits = limits
        self._shares = shares
        self._checkpoint_pages = limits.checkpoint_pages
        self._next_series = next_series
        self.dictionary = Dictionary(limits.log_words_known)
        self._pending = Batch()
        self._work = asyncio.Event()
        self._stopping = False
        self._is_watch_lost = False
        self.failing = False
        self.news = Bell()
        self.log_news = TenantBells()
        self.command_news = TenantBells()  # by the number of a command
        self.turns = CommandTurns()
        self.alert_news = Bell()  # alerts may have changed, or what is to be told of them
        self.point_feeds: set[PointFeed] = set()
        self.awaited = Awaited()
        self.stored = Stored()
        self.committed_at = time.monotonic()
        self.task = asyncio.create_task(self._run(), name="writer")

    def add_series(self, device_id: int, metric: str) -> str:
        """A new series; its number as the text that `add_points` takes."""
        number = self._next_series
        self._next_series += 1
        self._pending.series.append((number, device_id, metric))
        return str(number)

    def points(self) -> dict[str, dict[str, Value]]:
        """Points of the next transaction, by series number and time in milliseconds, both as text: JSON's keys are."""
        return self._pending.points

    def points_taken(self, tenant_id: int, points: int) -> None:
        """So many of those just added count for a tenant."""
        pending = self._pending
        pending.points_taken += points
        before = pending.usage.get(tenant_id)
        pending.usage[tenant_id] = (points, 0) if before is None else (before[0] + points, before[1])

    def log_bytes_taken(self, tenant_id: int, size: int) -> None:
        """So many bytes of lines count for a tenant."""
        points, before = self._pending.usage.get(tenant_id, (0, 0))
        self._pending.usage[tenant_id] = points, before + size

    @property
    def pending(self) -> tuple[int, int]:
        """Points that wait for the next transaction, and what all that waits weighs."""
        return self._pending.points_taken, self._pending.weight

    def token_used(self, token_id: str, at: int) -> None:
        self._pending.tokens_used[token_id] = at
        self._work.set()

    def frame_taken(self, owner: Committed, device_id: str, mark: tuple[int, int], at: int, stamp: int, share: Share, weight: int) -> None:
        """A frame, whose points were just added, belongs to the next transaction. `mark`: its number, and how many frames
        its session has handed over so far; `at`: when it came; `stamp`: the newest time given to a sample without one."""
        pending = self._pending
        pending.progress[device_id] = (mark[0], at, stamp)
        pending.frames += 1
        if not pending.waiting:
            pending.since = time.monotonic()
        pending.waiting[owner] = mark
        self.weigh(share, weight)

    def await_commit(self, owner: Committed, mark: tuple[int, int]) -> None:
        """Tell the owner when what was handed over until now is on disk, by its mark."""
        if not self._pending.waiting:
            self._pending.since = time.monotonic()
        self._pending.waiting[owner] = mark
        self._work.set()

    def weigh(self, share: Share, weight: int) -> None:
        """What was just added belongs to the next transaction, and to a tenant's share of it."""
        self._pending.weight += weight
        share.add(weight)
        self._work.set()

    def state_reported(self, report: StateReport) -> None:
        self._pending.states.append((self._pending.arrival(), report))
        self._work.set()

    def verdict_reported(self, report: VerdictReport) -> None:
        self._pending.verdicts.append((self._pending.arrival(), report))
        self._work.set()

    def command_reported(self, report: CommandReport) -> None:
        self._pending.command_reports.append(report)
        self._work.set()

    def logged(self, lines: Iterable[LogLine]) -> None:
        """Lines belong to the next transaction; who adds them tells what they weigh."""
        self._pending.lines.extend(lines)

    def config_sent(self, device_id: int, version: int) -> None:
        """A configuration went out on the device's socket, just now."""
        self._pending.configs_sent.append((device_id, version, now_ms()))
        self._work.set()

    def seen(self, devices: Mapping[int, int]) -> None:
        """When devices that send nothing were last heard, by device."""
        for device_id, at in devices.items():
            self._pending.progress.setdefault(str(device_id), (0, at, None))
        self._work.set()

    def happened(self, device_id: int, kind: str, **detail: object) -> None:
        """An entry of a device's timeline, of this moment."""
        self._pending.events.append(TimelineEntry(self._pending.arrival(), device_id, now_ms(), kind, detail))
        self._work.set()

    def session_ended(self, parting: Parting) -> None:
        self._pending.partings.append((self._pending.arrival(), parting))
        self._work.set()

    async def change(self, function: Callable[[sqlite3.Connection], T], share: Share | None = None, weight: int | None = None) -> T:
        """Run a control operation in the next transaction; returns after the commit. `share`: of the tenant whose operation it is,
        without it the server's own; `weight`: if it is known to be more than that of others. Refusal: storage_unavailable, or its own."""
        if self._stopping:
            raise Refusal("storage_unavailable")
        change = Change(function, asyncio.get_running_loop().create_future())
        change.future.add_done_callback(lambda future: future.cancelled() or future.exception())  # its caller may be gone
        self._pending.changes.append(change)
        self.weigh(share or self._shares.own, weight or self._limits.change_points)
        await asyncio.wait((change.future,), timeout=self._limits.storage_seconds)
        if not change.future.done() and change in self._pending.changes:
            self._pending.changes.remove(change)
            raise Refusal("storage_unavailable")
        return cast(T, await change.future)  # under way: whether it is stored must be known

    def patience(self) -> Callable[[], float]:
        """How long it is worth to wait for the writer from now on: it comes to everything while it commits anything."""
        began, seconds = time.monotonic(), self._limits.storage_seconds
        return lambda: max(began, self.committed_at) + seconds - time.monotonic()

    async def _find_watch(self) -> None:
        """Let the watch over alerts learn all anew."""
        try:
            self.watch.forget(time.monotonic())
            await self._connection.run(begin_watch, self.watch, self._limits)
            self._is_watch_lost = False
        except sqlite3.Error as error:  # the next transaction may do better
            log.error("cannot look for rules: %s", error)

    async def look_at_alerts(self) -> None:
        """Let alerts go on with the time: some are due though nothing came."""
        if self.watch.look_at_clock(time.monotonic()):
            self._work.set()

    async def alone(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function on the connection, between two transactions; it makes its own."""
        return await self._connection.run(function, *arguments)

    async def close(self) -> None:
        """Store what is pending, then stop."""
        self._stopping = True
        self._work.set()
        await asyncio.wait((self.task,))  # how it failed, if it did, the supervisor has told

    async def _run(self) -> None:
        batch = Batch()
        try:
            while self._pending or not self._stopping:
                await self._work.wait()
                self._work.clear()
                while self._pending or (self.watch.look_at_clock(time.monotonic()) and not self._stopping):
                    batch, self._pending = self._pending, Batch()
                    self._shares.next_transaction()
                    if self._is_watch_lost:
                        await self._find_watch()
                    batch.alerts = self.watch.close(batch.points, batch.series, time.monotonic(), now_ms())
                    if not batch:  # what was due came to nothing: a round without any wait would hold up everybody
                        break
                    await self._store(batch)
                self._shares.next_transaction()  # what was withdrawn meanwhile weighs nothing
        except BaseException as error:  # a defect, and the end of the server: nobody may wait for what will not come
            self._stopping = True
            self._not_stored(batch, error)
            raise

    def _write(self, connection: sqlite3.Connection, batch: Batch) -> Outcome:
        if self._checkpoint_pages != self._shares.checkpoint_pages:
            self._checkpoint_pages = self._shares.checkpoint_pages
            set_checkpoint_pages(connection, self._checkpoint_pages)
        return batch.write(connection, self._limits, self.dictionary)

    async def _store(self, batch: Batch) -> None:
        """Commit a batch, however often it takes."""
        patience = time.monotonic() + self._limits.storage_seconds
        while batch:
            began = time.monotonic()
            try:
                outcome = await self._connection.run(self._write, batch)
            except Exception as error:  # noqa: BLE001 - whatever failed, nothing was stored, and those who wait must hear it
                if is_held_by_another(error) and time.monotonic() < patience:
                    continue
                self._not_stored(batch, error)
                if self._stopping or not isinstance(error, sqlite3.OperationalError):
                    log.critical("dropped a batch that cannot be stored: %d points, none of them acknowledged", batch.points_taken)
                    partings = batch.partings + self._pending.partings
                    self._pending = Batch()  # frames after those that are lost are not to be stored
                    self._pending.partings = partings
                    self._is_watch_lost = True  # it has judged what was not stored
                    return
                if batch:
                    await asyncio.sleep(self._limits.retry_seconds)
            else:
                if self.failing:
                    self.watch.awake = time.monotonic()
                self.failing = False
                self.committed_at = time.monotonic()
                self._count_commit(batch, began)
                self._shares.measured(batch.weight, outcome.seconds)
                self._tell(batch, outcome)
                return

    def _count_commit(self, batch: Batch, began: float) -> None:
        stored, now = self.stored, self.committed_at
        stored.frames += batch.frames
        stored.points += batch.points_taken
        stored.log_lines += len(batch.lines)
        stored.log_bytes += sum(log_bytes for _, log_bytes in batch.usage.values())
        stored.batch_points.add(batch.points_taken)
        stored.commit_seconds.add(now - began)
        if batch.waiting:
            stored.ack_seconds.add(now - batch.since)

    def _tell(self, batch: Batch, outcome: Outcome) -> None:
        """The batch is on disk: tell those who wait for it."""
        self.awaited.add(outcome.awaited)
        for owner, code, seq in outcome.refused:
            owner.refused(code, seq)
        for change, result in zip(batch.changes, outcome.changes, strict=True):
            change.settle(result)
        for owner, mark in batch.waiting.items():
            owner.committed(mark)
        if batch.points:
            for feed in self.point_feeds:
                feed.add(batch.points)
        self.watch.learn(outcome.news, time.monotonic(), now_ms())
        if batch.eventful or batch.alerts.is_told:
            self.news.ring()
            self.alert_news.ring()
        for tenant_id in {line.tenant_id for line in batch.lines}:
            self.log_news.ring(tenant_id)
        for command in outcome.commands.changed:
            self.command_news.ring(command)
        self.turns.add(outcome.commands.over)

    def _not_stored(self, batch: Batch, error: BaseException) -> None:
        """Nothing is acknowledged: sessions end with 1013, callers hear it, rows stay in the batch to be tried again."""
        log.error("cannot store: %s", error)
        self.failing = True
        self.stored.failures += 1
        for change in batch.changes + self._pending.changes:
            change.settle(Refusal("storage_unavailable"))
        for owner in [*batch.waiting, *self._pending.waiting]:
            owner.not_stored()
        for failed in (batch, self._pending):
            failed.changes, failed.waiting, failed.tokens_used = [], {}, {}


# ==== Store ====
# Owns: the open database as the rest of the program sees it. Must not know: HTTP, sockets.


class Reads(Queries):
    """Queries over a tenant's devices."""

    def __init__(self, readers: Readers, keys: Readers, limits: Limits) -> None:
        """`keys` are for tokens alone: slow queries must not keep devices and people out."""
        super().__init__(readers)
        self.telemetry = TelemetryReads(readers, limits)
        self.fleet = FleetReads(readers, limits)
        self.scrapes = ScrapeReads(readers)
        self.accounts = AccountReads(readers)
        self.tokens = TokenReads(keys)
        self.removal = RemovalReads(keys)
        self.news = NewsReads(keys)
        self.pushes = PushReads(keys)
        self.logs = LogReads(readers, limits)
        self.alerts = AlertReads(readers, limits)
        self.notifications = NotificationReads(readers, limits)
        self.commands = CommandReads(readers)

    async def devices(self, tenant: int, limit: int, after: str = "", match: str | None = None, *, connected: bool | None = None) -> str:
        return await self._list(
            f"""select device.name position, {DEVICE_JSON} item from {DEVICE_ROWS}
                where tenant_id = :tenant and device.name > :after and (:match is null or device.name glob :match)
                and (:connected is null or connected = :connected) order by device.name""",
            limit, tenant=tenant, after=after, match=match, connected=connected, now=now_ms(),
        )  # fmt: skip

    async def devices_by_attention(
        self, tenant: int, limit: int, after: tuple[int, str], match: str | None, *, connected: bool | None
    ) -> str:
        """A page of devices, those first that need attention most; `after` is the weight and the name of the last one seen."""
        return await self._list(
            f"""with {STANDING_SQL}, ranked as materialized (
                    select * from (select standing_id, name, {ATTENTION_SQL} weight from standing
                                   where :connected is null or connected = :connected)
                    where weight < :weight or weight = :weight and name > :after order by weight desc, name limit :limit + 1)
                select '{ATTENTION}' || weight || ' ' || device.name position, {DEVICE_JSON} item
                from ranked cross join {DEVICE_ROWS.replace("device join", "device on device.id = standing_id join", 1)}
                order by weight desc, device.name""",
            limit, tenant=tenant, weight=after[0], after=after[1], match=match, connected=connected, now=now_ms(),
        )  # fmt: skip

    async def summary(self, tenant: int, match: str | None) -> str:
        """How many devices there are, and how they stand."""
        counts = {
            "devices": "1", "online": "connected = 1", "offline": "connected = 0", "disabled": "disabled = 1",
            "never_seen": "connected_at is null", "alerts": "worst > 0", "unattended": "worst > 10",
            "critical": f"worst = 10 + {SEVERITIES['critical']}", "drifted": "drifted", "rejected": "status = 'rejected'",
        }  # fmt: skip
        shown = ", ".join(f"'{name}', coalesce(sum(case when {condition} then 1 else 0 end), 0)" for name, condition in counts.items())
        text = await self._json(f"with {STANDING_SQL} select json_object({shown}) from standing", tenant=tenant, match=match, now=now_ms())
        return str(text)

    async def device(self, tenant: int, name: str) -> bytes | None:
        return await self._readers.exact(
            f"""select json_set({DEVICE_JSON}, '$.latest', json({LATEST_JSON}), '$.reported', json((
                select document from state where device_id = device.id order by version desc limit 1)))
                from {DEVICE_ROWS} where tenant_id = :tenant and name = :name""",
            {"tenant": tenant, "name": name, "now": now_ms()},
        )

    async def device_id(self, tenant: int, name: str) -> int | None:
        row = await self._readers.row("select id from device where tenant_id = :tenant and name = :name", {"tenant": tenant, "name": name})
        return None if row is None else int(row[0])

    async def events(
        self, tenant: int, device: str, limit: int, after: int, kinds: tuple[str, ...] | None, start: int, stop: int
    ) -> str | None:
        """A device's timeline, newest first; `after` is the id of the last entry seen."""
        device_id = await self.device_id(tenant, device)
        if device_id is None:
            return None
        low, high = await self._numbers("event", tenant, start, stop)
        return await self._list(
            f"""select id position, json_patch(json_object('id', id, 'kind', kind, 'at', {time_sql("at")}), detail) item from event
                where +tenant_id = :tenant and device_id = :device_id and id > :low and id < :high and at >= :start and at < :stop
                and (:kinds is null or kind in (select value from json_each(:kinds))) order by id desc""",
            limit, tenant=tenant, device_id=device_id, low=low, high=min(high, after), start=start, stop=stop,
            kinds=None if kinds is None else orjson.dumps(kinds).decode(),
        )  # fmt: skip

    async def feed(self, tenant: int, after: int, limit: int) -> list[tuple[int, str, str]]:
        """What happened in a tenant after an event, oldest first: (id, kind, JSON)."""
        text = await self._json(
            f"""select json_group_array(json_array(id, kind, item)) from (
                select event.id id, kind, {EVENT_JSON} item
                from event join device on device.id = device_id
                where event.tenant_id = :tenant and event.id > :after and coalesce(name, old_name) is not null
                order by event.id limit :limit)""",
            tenant=tenant, after=after, limit=limit,
        )  # fmt: skip
        return cast("list[tuple[int, str, str]]", orjson.loads(text or "[]"))

    async def last_event(self, tenant: int) -> int:
        row = await self._readers.row("select coalesce(max(id), 0) from event where tenant_id = :tenant", {"tenant": tenant})
        return int(row[0]) if row else 0

    async def syslog_sources(self, tenant: int, device: str) -> str | None:
        """The networks whose lines are the device's."""
        return await self._json(
            """select json_object('device', name, 'addresses', (
                   select json_group_array(network) from (select network from syslog_source where device_id = device.id order by network)))
               from device where tenant_id = :tenant and name = :device""",
            tenant=tenant, device=device,
        )  # fmt: skip

    async def state(self, tenant: int, device: str, at: int | None, version: int | None) -> bytes | None:
        """The document that a device reported: the last, that of a version, or the one that was in force at a time."""
        text = await self._json(
            f"""select {STATE_JSON} from state join device on device.id = device_id
                where tenant_id = :tenant and name = :device and (:version is null or version = :version)
                and (:at is null or at <= :at) order by version desc limit 1""",
            tenant=tenant, device=device, at=at, version=version,
        )  # fmt: skip
        if text is None:
            return None
        shown, document, changes = orjson.loads(text)
        for told in changes:
            apply_changes(document, read_changes(told))
        return orjson.dumps({**shown, "reported": orjson.Fragment(canonical(document))})

    async def state_history(self, tenant: int, device: str, limit: int, after: int) -> str | None:
        """Every change of what a device reports, newest first."""
        item = f"json_object('version', version, 'at', {time_sql('at')}, 'session', session, 'changes', json(changes))"
        return await self._history("state", item, tenant, device, limit, after)

    async def config(self, tenant: int, device: str) -> str | None:
        """The configuration that a device is wanted to have, and how far it is."""
        return await self._json(
            f"""select json_set(iif(config.version is null, json_object('version', 0, 'status', null, 'document', null), {CONFIG_JSON}),
                       '$.device', name, '$.applied', config_applied, '$.drift', {DRIFT_SQL})
                from {DEVICE_ROWS} where tenant_id = :tenant and name = :device""",
            tenant=tenant, device=device,
        )  # fmt: skip

    async def pushed(self, tenant: int, rows: list[Pushed]) -> list[dict[str, Any]]:
        """What came of configurations that were pushed, in their order; removed devices are left out, and what devices said of it
        where it would be longer than an answer may be."""
        text = await self._json(
            f"""select json_group_array(json_object('device', name, 'version', version, 'status', status,
                    'message', iif(size <= {PAGE_CHARACTERS}, message, null),
                    'errors', json(iif(size <= {PAGE_CHARACTERS}, errors, null)))) from (
                select name, version, status, message, errors,
                    sum(coalesce(length(message), 0) + coalesce(length(errors), 0)) over (order by said.key rows unbounded preceding) size
                from json_each(:rows) said join config on config.device_id = said.value ->> 0 and version = said.value ->> 1
                join device on device.id = config.device_id where tenant_id = :tenant and name is not null order by said.key)""",
            tenant=tenant, rows=bind([(row.device_id, row.version) for row in rows])[0],
        )  # fmt: skip
        return cast("list[dict[str, Any]]", orjson.loads(text or "[]"))

    async def pushed_with(self, tenant: int, document_id: int) -> list[Pushed]:
        """The devices to which a document was pushed, each with the first version that has it."""
        text = await self._json(
            """select json_group_array(json_array(id, name, version)) from (
                select id, name, min(version) version from config join device on id = device_id
                where document_id = :document_id and tenant_id = :tenant and name is not null group by id order by name)""",
            tenant=tenant, document_id=document_id,
        )  # fmt: skip
        return [Pushed(*row) for row in orjson.loads(text or "[]")]

    async def config_history(self, tenant: int, device: str, limit: int, after: int) -> str | None:
        """Every configuration that was pushed to a device, newest first."""
        return await self._history("config", CONFIG_JSON, tenant, device, limit, after)

    async def _history(self, table: str, item: str, tenant: int, device: str, limit: int, after: int) -> str | None:
        """A page of the versions of a device, newest first; as `_list`, but no more of them are read than are shown: each may be long."""
        device_id = await self.device_id(tenant, device)
        if device_id is None:
            return None

        def newest(below: str) -> str:
            return f"""{table}.device_id = :device_id and {table}.version = (
                select max(version) from {table} where device_id = :device_id and version < {below})"""

        return await self._json(
            f"""with recursive page as (
                    select {table}.version position, {item} item, 1 number, 0 before from {table} where {newest(":after")}
                    union all select {table}.version, {item}, number + 1, before + length(item) from page join {table}
                    on {newest("position")} where number < :limit and before + length(item) < {PAGE_CHARACTERS}),
                shown as materialized (select * from page where before + length(item) <= {PAGE_CHARACTERS} or number = 1),
                last as (select min(position) position from shown)
                select json_object('items', (select json_group_array(json(item)) from (select item from shown order by number)),
                    'next', (select position from last where exists (
                        select 1 from {table} where device_id = :device_id and version < last.position)))""",
            device_id=device_id, after=after, limit=limit,
        )  # fmt: skip


@attrs.frozen
class FileSizes:
    """Bytes of the database, of its write-ahead log, and of the file system that they are on."""

    database: int
    log: int
    disk: int
    disk_free: int


class Store:
    """The open database: `writer` for everything that changes, `read` for everything that is asked."""

    def __init__(
        self, path: Path, writer: Writer, read: Reads, readers: Readers, lock: LockFile, allowances: Allowances, copier: Connection
    ) -> None:
        self.writer = writer
        self.allowances = allowances
        self.read = read
        self._path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._readers = readers
        self._lock = lock
        self._copier = copier

    @classmethod
    @asynccontextmanager
    async def open(cls, name: Path, limits: Limits, query_seconds: float = 2.0) -> AsyncIterator[Store]:
        """Open the database, made or migrated if need be, and close the sessions that a crash left open; a query may take so many
        seconds. StoreError when it cannot be used, or another server has it."""
        path = resolved(name)
        is_new(path)  # somebody else's file gets no lock beside it
        async with AsyncExitStack() as stack:
            lock = LockFile(path)
            stack.callback(lock.close)
            await lock.wait(limits.lock_seconds)
            with named_errors(path):
                lock.check_log()
            prepare_database(path)
            busy = limits.storage_seconds / 3
            connection = await Connection.open(
                functools.partial(connect, path, checkpoint_pages=limits.checkpoint_pages, busy_seconds=busy)
            )
            stack.push_async_callback(connection.close)
            await connection.run(renew_salt, lock)
            crashed, awaited = await connection.run(cls._start)
            if crashed:
                log.warning("the last run ended without a stop; %d open sessions were closed", crashed)
            (next_series,) = await connection.run(
                lambda c: c.execute(
                    """select coalesce(max(id), 0) + 1 from (
                           select max(id) id from series union all select max(id) from removed_series
                           union all select max(series_id) from telemetry)"""
                ).fetchone()
            )
            connections = []
            for _ in range(limits.readers + 1):
                connections.append(await Connection.open(functools.partial(connect, path, query_only=True)))
                stack.push_async_callback(connections[-1].close)
            copier = await Connection.open(functools.partial(connect, path, checkpoint_pages=0))
            stack.push_async_callback(copier.close)
            keys, readers = Readers(connections[:1], limits.storage_seconds), Readers(connections[1:], query_seconds)
            allowances, watch = Allowances(limits), AlertWatch(Codec(limits), limits)
            await connection.run(begin_watch, watch, limits)
            writer = Writer(connection, limits, allowances.shares, next_series, watch)
            writer.awaited.add(awaited)
            stack.push_async_callback(writer.close)
            yield cls(path, writer, Reads(readers, keys, limits), readers, lock, allowances, copier)

    async def keep_log_short(self, most: int) -> bool:
        """Start the write-ahead log over if it is longer than `most` bytes; whether it was. Whoever looks up a token does not wait:
        that is short."""
        if not self._log.exists() or self._log.stat().st_size <= most:
            return False
        async with self._readers.paused(lambda: self._copier.run(copy_log)):
            await self.writer.alone(start_log_over)
        return True

    async def sizes(self) -> FileSizes:
        """OSError. Where a disk is slow, others do not wait for it."""

        def look() -> FileSizes:
            disk, log_size = shutil.disk_usage(self._path.parent), self._log.stat().st_size if self._log.exists() else 0
            return FileSizes(self._path.stat().st_size, log_size, disk.total, disk.free)

        return await asyncio.to_thread(look)

    async def renew_salt(self) -> None:
        """So that a copy that is made of the running database is soon known to be one of an earlier time."""
        await self.writer.alone(renew_salt, self._lock)

    async def healthy(self, limits: Limits) -> bool:
        """Whether a write committed lately, or can."""
        if self.writer.failing or time.monotonic() - self.writer.committed_at > limits.healthy_seconds:
            try:
                await self.writer.change(lambda connection: connection.execute(f"pragma user_version = {SCHEMA_VERSION}").close())
            except Refusal:
                return False
        return True

    @staticmethod
    def _start(connection: sqlite3.Connection) -> tuple[int, list[tuple[int, int, int]]]:
        """How many sessions a crash left open, and the configurations whose verdict is awaited."""
        with transaction(connection):
            end_tunnels(connection, "true", "the server stopped without closing it", None, None)
            return close_crashed_sessions(connection), orjson.loads(connection.execute(AWAITED_SQL).fetchone()[0])


# ==== Identity ====
# Owns: tokens and keys, what they look like and what they prove. Must not know: HTTP.

# What a role may do besides its own: whatever the roles below it may. `platform` stands apart.
RANKS: Final = MappingProxyType({"viewer": 1, "operator": 2, "admin": 3})


@attrs.frozen
class Secret:
    """A token or key: `text` is shown once, `stored` is what the database keeps of it."""

    text: str
    stored: NewSecret


def token_text(kind: str, identifier: str, secret: str) -> str:
    return f"iiot_{kind}_{identifier}_{secret}"


def mint(kind: str, made: str | None = None) -> Secret:
    """A new token or key: `kind` is dev, op, prov or log. The id is for look-up; the secret has 256 random bits, unless its holder
    made it."""
    identifier, secret = secrets.token_hex(8), made or secrets.token_urlsafe(32)
    return Secret(token_text(kind, identifier, secret), NewSecret(identifier, hashlib.sha256(secret.encode()).digest()))


def take_apart(kind: str, text: str) -> NewSecret | None:
    """The id and hash of a token that a peer shows, None if it is none of its kind."""
    found = TOKEN.fullmatch(text)
    if found is None or found[1] != kind:
        return None
    return NewSecret(found[2], hashlib.sha256(found[3].encode()).digest())


def token_id_of(text: str) -> str | None:
    """The id part of a token, whoever shows it."""
    found = TOKEN.fullmatch(text)
    return found[2] if found else None


@attrs.frozen
class Principal:
    """Who makes a request; `tenant_id` and `tenant` are None for the platform's own tokens, `expires_at` for those without end."""

    token_id: str
    name: str
    role: str
    tenant_id: int | None
    tenant: str | None
    expires_at: int | None = None

    def may(self, role: str) -> bool:
        """Whether the principal may do what `role` may; `any` is everybody with a token."""
        return role in ("any", self.role) or RANKS.get(self.role, 0) >= RANKS.get(role, 99)

    def actor(self, address: str) -> Actor:
        return Actor(self.tenant_id, self.token_id, self.name, self.role, address)


class RefusedActions:
    """Refused actions for the audit, which nobody can delete from: a token's first ones in a minute are entered each, those beyond
    are counted, and entered together."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._seconds = limits.refusals_seconds
        self._allowance = store.allowances.refusals
        self._counts: dict[tuple[Actor, str, str], int] = {}

    async def enter(self, actor: Actor, action: str, affected: Iterable[Affected], refusal: Refusal) -> None:
        """What was refused, not what failed; where nothing can be stored the log has it."""
        code = refusal.fault.code
        if refusal.fault.status >= 500:
            return
        if self._allowance.add(f"{actor.tenant_id} {actor.token_id}"):
            key = actor, action, code
            self._counts[key] = self._counts.get(key, 0) + 1
        else:
            await self._write(actor, action, code, affected)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            await self.enter_counts()

    async def enter_counts(self) -> None:
        counts, self._counts = self._counts, {}
        for (actor, action, code), count in counts.items():
            await self._write(actor, action, code, [Affected(None, None, {"count": count})])

    async def _write(self, actor: Actor, action: str, code: str, affected: Iterable[Affected]) -> None:
        try:
            share = self._store.allowances.shares.of(actor.tenant_id)
            await self._store.writer.change(lambda connection: add_entries(connection, actor, action, code, affected), share)
        except Refusal as failure:
            log.error("cannot enter in the audit (%s): %r was refused %s: %s", failure, actor.name, action, code)


class Secretive(Protocol):
    """What the database knows of a token or key."""

    @property
    def secret_hash(self) -> bytes: ...


StoredSecret = TypeVar("StoredSecret", bound=Secretive)


class Identity:
    """Says who holds a token. An unknown id and a wrong secret take the same path and get the same answer."""

    def __init__(self, store: Store, limits: Limits, devices_most: int) -> None:
        self._store = store
        self._devices_most = devices_most
        self._guesses = store.allowances.guesses
        self.refused = RefusedActions(store, limits)
        self._used_seconds = limits.seen_seconds
        self._turn_seconds = limits.storage_seconds

    async def operator(self, text: str, address: str) -> Principal:
        """Refusal: unauthorized, too_many_attempts."""
        if not text:
            raise Refusal("unauthorized")  # nothing is shown, nothing guessed
        known = await self._known("op", text, address, self._store.read.tokens.operator)
        now = now_ms()
        if abs(now - (known.used_at or 0)) >= self._used_seconds * 1000:  # the clock may have been ahead
            self._store.writer.token_used(known.token_id, now)
        return Principal(known.token_id, known.name, known.role, known.tenant_id, known.tenant, known.expires_at)

    async def device(self, text: str, address: str) -> DeviceToken:
        """Refusal: unauthorized, too_many_attempts."""
        return await self._known("dev", text, address, self._store.read.tokens.device)

    async def log_sender(self, text: str, address: str) -> DeviceToken:
        """Refusal: unauthorized, too_many_attempts."""
        return await self._known("log", text, address, self._store.read.tokens.log_sender)

    async def provision(self, frame: Provision, address: str) -> Credentials:
        """Register a device by a provisioning key. The same key, device and secret get the same answer again, when the first was
        lost. Refusal: unauthorized, too_many_attempts, device_exists or too_many_devices (then no use of the key is taken)."""
        key = await self._known("prov", frame.key, address, self._store.read.tokens.provisioning_key)
        if not key.usable and frame.secret is None:
            raise self._guesses.wrong(address)
        token, device = mint("dev", frame.secret), frame.device
        asks_again = None if frame.secret is None else key.key_id

        def register(connection: sqlite3.Connection) -> str | None:
            if asks_again is not None and (
                known := provisioned_token(connection, key.tenant_id, device, key.key_id, token.stored.secret_hash)
            ):
                return known
            tenant_id, told = use_provisioning_key(connection, key.key_id), {"key": key.key_id, "address": address}
            insert_device(connection, tenant_id, device, token.stored, told, self._devices_most, asks_again)
            return None

        actor = Actor(key.tenant_id, key.key_id, "provisioning key", "provisioning", address)
        change = accounted(
            actor, "device.provision", register, lambda known: [Affected(device, device, {"again": True} if known else None)]
        )
        share = self._store.allowances.shares.of(key.tenant_id)
        try:
            await share.turn(for_seconds(self._turn_seconds))
            known = await self._store.writer.change(change, share)
        except Refusal as refusal:
            if refusal.fault.code == "unauthorized":  # the key is used up, or gone
                raise self._guesses.wrong(address) from refusal
            await self.refused.enter(actor, "device.provision", [Affected(device, device)], refusal)
            raise
        return Credentials(device, token_text("dev", known, frame.secret or "") if known else token.text)

    async def _known(self, kind: str, text: str, address: str, look_up: Callable[[str], Awaitable[StoredSecret | None]]) -> StoredSecret:
        shown = take_apart(kind, text)
        known = await look_up(shown.id) if shown else None
        right = hmac.compare_digest(known.secret_hash if known else bytes(32), shown.secret_hash if shown else bytes(32))
        if not right or known is None:
            raise self._guesses.wrong(address)
        return known


class LogSenders:
    """Whose lines arrive by syslog: by the token in a line, or by the address that it comes from, the narrowest network first. What was
    found is believed for a few seconds, and no longer than nothing changes."""

    def __init__(self, identity: Identity, tokens: TokenReads, limits: Limits) -> None:
        self._identity = identity
        self._tokens = tokens
        self._limits = limits
        self._known: dict[tuple[str, str], DeviceToken | Refusal | None] = {}  # by kind, and token or address
        self._sources: list[tuple[Network, DeviceToken]] = []
        self._until = 0.0

    def forget(self) -> None:
        """Something has changed."""
        self._known.clear()
        self._until = 0.0

    async def find(self, token: str | None, address: str) -> DeviceToken | None:
        """The device, None if the address is nobody's. Refusal: unauthorized, too_many_attempts, for a wrong token."""
        if time.monotonic() >= self._until or len(self._known) > self._limits.refused_senders:
            sources = [(ipaddress.ip_network(network), device) for network, device in await self._tokens.log_sources()]
            self._sources = sorted(sources, key=lambda source: -source[0].prefixlen)
            self._known.clear()
            self._until = time.monotonic() + self._limits.sender_seconds
        key = ("address", address) if token is None else ("token", token)
        if key not in self._known:
            self._known[key] = self._of_address(address) if token is None else await self._of_token(token, address)
        known = self._known.get(key)
        if isinstance(known, Refusal):
            raise known
        return known

    def _of_address(self, address: str) -> DeviceToken | None:
        parsed = parse_address(address)
        return next((device for network, device in self._sources if parsed is not None and parsed in network), None)

    async def _of_token(self, token: str, address: str) -> DeviceToken | Refusal:
        try:
            return await self._identity.log_sender(token, address)
        except Refusal as refusal:
            if refusal.fault.status >= 500:  # it is not known whose it is, and may be in a moment
                raise
            return refusal.with_traceback(None)


@attrs.define
class RefusedLines:
    """Lines from one address, of one tenant or of nobody, that were not stored: how many, when the last came, and why that was not."""

    address: str
    tenant_id: int | None
    lines: int
    last_at: int
    reason: str


def datagrams_lost(listening: socket.socket) -> int:
    """How many datagrams to a socket the system has thrown away, because they were not read in time. Only Linux says so."""
    with suppress(OSError, ValueError, IndexError):
        inode = str(os.fstat(listening.fileno()).st_ino)
        name = "udp6" if listening.family == socket.AF_INET6 else "udp"
        for row in Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
            columns = row.split()
            if columns[9] == inode:
                return int(columns[12])
    return 0


class TurnedAway:
    """Lines that were not stored, since the start: those of nobody, and those that came faster than they could be taken."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._since = now_ms()
        self._known: dict[tuple[str, int | None], RefusedLines] = {}
        self._listening: list[socket.socket] = []
        self.lines: Counter[str] = Counter()  # by reason

    def watch(self, listening: socket.socket) -> None:
        """What the system throws away of the datagrams to a socket is shown, too."""
        self._listening.append(listening)

    def add(self, address: str, reason: str, tenant_id: int | None = None) -> None:
        """Of more addresses than are counted apart the last ones are counted together."""
        known = self._known.get((address, tenant_id))
        if known is None:
            address = address if len(self._known) < self._most else "others"
            known = self._known.setdefault((address, tenant_id), RefusedLines(address, tenant_id, 0, 0, reason))
        known.lines, known.last_at, known.reason = known.lines + 1, now_ms(), reason
        self.lines[reason] += 1

    def datagrams_lost(self) -> int:
        return sum(map(datagrams_lost, self._listening))

    def shown(self, tenant_id: int) -> dict[str, Any]:
        """A tenant's own, and those of nobody: they may be meant for it."""
        seen = [refused for refused in self._known.values() if refused.tenant_id in (None, tenant_id)]
        return {
            "since": moment_text(self._since),
            "datagrams_lost": self.datagrams_lost(),
            "items": [
                {"address": refused.address, "lines": refused.lines, "last_at": moment_text(refused.last_at), "reason": refused.reason}
                for refused in sorted(seen, key=lambda refused: -refused.last_at)
            ],
        }


# ==== Connections ====
# Owns: sockets from their accept to their end, how many there are, who of them has not proved who it is, and who makes room. Must
# not know: HTTP, devices.

SPARE_DESCRIPTORS: Final = 64  # for the database, the log and what a library opens
BACKLOG: Final = 512  # connections that wait to be accepted, when a fleet comes back at once
ACCEPTS: Final = 16  # connections that are accepted in a round of the event loop: each may begin a handshake of TLS
TLS_BYTES: Final = 16 * 1024  # what is read at one time from a connection with TLS: one record of it
LOOKS: Final = 10  # within the time that a stranger has for its next step
CLOSING_TURNS: Final = 8  # of the loop: a connection that is turned away is closed after three to five


# Of files and sockets: tried in this order where a system names no limit, for it has one all the same (macOS).
DESCRIPTORS: Final = (1_048_576, 262_144, 65_536, 24_576, 10_240)


def descriptors() -> int:
    """How many files and sockets this process may have open."""
    if sys.platform == "win32":
        return 8_192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def higher_limits(soft: int, hard: int, infinity: int) -> list[int]:
    """The limits that a process may try to set itself, the highest first, from those it has."""
    if soft == infinity:
        return []
    known = DESCRIPTORS if hard == infinity else (hard, *(number for number in DESCRIPTORS if number < hard))
    return [number for number in known if number > soft]


def raise_descriptors() -> None:
    """As many files and sockets as the system allows this process: every device holds one."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for number in higher_limits(soft, hard, resource.RLIM_INFINITY):
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
                return


def give_up_after(connection: socket.socket, seconds: float) -> None:
    """Let the system break a connection whose peer confirms nothing, or takes nothing, for so long (RFC 5482), where it can. What is
    accepted on a socket that listens begins with the value of that one."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        with suppress(OSError):  # it has ended already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(seconds * 1000))


class Peers:
    """The connections that were accepted and are not closed. Among them are the strangers: those that have not proved who they are, and
    those with nothing under way for which they would have to. Where there is no room for more, strangers make it, the oldest first:
    who is recognized stays, and who is new has the time that it takes to show a token."""

    def __init__(self, limits: Limits) -> None:
        self.held = 0
        # The one that has waited for longest is the first. With one that has asked for nothing yet: since which look that is so.
        self._strangers: dict[socket.socket, int | None] = {}
        self._looks = 0
        self._limits = limits
        self._told = -math.inf  # when a shortage was logged

    @property
    def strangers(self) -> int:
        return len(self._strangers)

    def enter(self, peer: socket.socket) -> None:
        """One was accepted."""
        self.held += 1
        self._strangers[peer] = self._looks

    def begin(self, peer: socket.socket) -> None:
        """Its handshake of TLS is over. It has as long again for its first request, if that has not come along with it."""
        if self._strangers.get(peer) is not None:
            self._strangers[peer] = self._looks

    def leave(self, peer: socket.socket) -> None:
        self.held -= 1
        self.recognize(peer)

    def recognize(self, peer: socket.socket) -> None:
        self._strangers.pop(peer, None)

    def put_last(self, peer: socket.socket) -> None:
        """It is the stranger that has waited least, if it is still there. How long it may wait is for its protocol to say."""
        self.recognize(peer)
        if peer.fileno() >= 0:
            self._strangers[peer] = None

    def turn_away(self, peer: socket.socket) -> None:
        """Let a connection end: its protocol, whatever that is, reads the end of what comes, and closes it."""
        self.recognize(peer)
        with suppress(OSError):  # the peer has gone already
            peer.shutdown(socket.SHUT_RDWR)

    async def look_at_strangers(self) -> None:
        """Turn away those that were seen in ten looks and have asked for nothing. The time between two looks is no less than a turn of
        the loop takes: who waits for a server that is slow is not taken for silent."""
        while True:
            await asyncio.sleep(self._limits.hello_seconds / LOOKS)
            self._looks += 1
            for peer in [peer for peer, since in self._strangers.items() if since is not None and self._looks - since > LOOKS]:
                self.turn_away(peer)

    async def find_room(self) -> bool:
        """Whether one more can come in. Where there is no room, some strangers make it, for those who come next as well."""
        if self._is_full():
            self._tell()
            some = max(1, min(BACKLOG, len(self._strangers) // 8))  # few: the youngest are about to show a token
            for peer in list(islice(self._strangers, some)):
                self.turn_away(peer)
            for _ in range(CLOSING_TURNS):
                if not self._is_full():
                    break
                await asyncio.sleep(0)
        return not self._is_full()

    def _tell(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told > self._limits.shortage_seconds:
            self._told = now
            log.warning(
                "connections run short: %d are open. Of these %d have shown no valid token and make room for others", self.held,
                len(self._strangers),
            )  # fmt: skip

    def _is_full(self) -> bool:
        return self.held >= descriptors() - SPARE_DESCRIPTORS or len(self._strangers) >= self._limits.connections


class Peer(socket.socket):
    """A connection from its accept until it is closed, whatever transport and protocol it has meanwhile: asyncio tells a protocol
    nothing of a connection whose handshake of TLS is not over."""

    __slots__ = ("_peers",)

    def __init__(self, peers: Peers, accepted: socket.socket) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._peers = peers
        peers.enter(self)

    def close(self) -> None:
        if self.fileno() >= 0:
            super().close()
            self._peers.leave(self)

    def asked(self) -> None:
        """The head of a request is complete."""
        self._peers.put_last(self)

    def recognized(self) -> None:
        """It has proved who it is."""
        self._peers.recognize(self)

    def answered(self) -> None:
        """Nothing is under way any more."""
        self._peers.put_last(self)


class Door:
    """Where connections are accepted. asyncio's own would take more at one time than there are descriptors, then accept nothing for a
    second, and wait a minute for a handshake of TLS."""

    def __init__(
        self, make: Callable[[Peer], asyncio.BaseProtocol], context: ssl.SSLContext | None, peers: Peers, limits: Limits
    ) -> None:
        """`peers`: those of all doors."""
        if context is not None:  # asyncio keeps as much for each connection while that lasts: 256 KiB if it is not told
            sslproto.SSLProtocol.max_size = TLS_BYTES
        self._make = make
        self._context = context
        self._limits = limits
        self.peers = peers
        self._listening: dict[asyncio.Task[None], socket.socket] = {}
        self._beginning: dict[asyncio.Task[None], Peer] = {}

    def open(self, listener: socket.socket) -> asyncio.Task[None]:
        """Let in who connects to a socket that listens, until the door is closed."""
        listener.setblocking(False)
        give_up_after(listener, self._limits.stall_seconds)
        task = asyncio.create_task(self._accept(listener), name="listener")
        task.add_done_callback(lambda _: listener.close())
        self._listening[task] = listener
        return task

    async def close(self) -> None:
        """Accept nothing any more. Who has no protocol yet gets none."""
        for task, listener in self._listening.items():
            with suppress(NotImplementedError):  # Windows has none
                asyncio.get_running_loop().remove_reader(listener)  # it would accept one more for a task that has ended
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)
        for peer in self._beginning.values():
            self.peers.turn_away(peer)
        await asyncio.gather(*self._beginning, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(ACCEPTS):
                try:
                    accepted, _ = await loop.sock_accept(listener)
                except ConnectionAbortedError:  # by a client without patience
                    continue
                except OSError as error:  # descriptors went elsewhere, or the system has none
                    log.warning("cannot accept connections: %s", error)
                    await asyncio.sleep(self._limits.retry_seconds)
                    continue
                with accepted:  # closed, unless a peer takes it
                    if await self.peers.find_room():
                        self._let_in(Peer(self.peers, accepted))
            await asyncio.sleep(0)

    def _let_in(self, peer: Peer) -> None:
        task = asyncio.create_task(self._begin(peer))
        self._beginning[task] = peer
        task.add_done_callback(self._beginning.pop)

    async def _begin(self, peer: Peer) -> None:
        """Give a connection its protocol, once its handshake of TLS is over."""
        # Who closes in silence is not waited for. None where there is no TLS, as asyncio wants it.
        patience = self._limits.close_seconds if self._context else None
        protocol = self._make(peer)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol, peer, ssl=self._context, ssl_shutdown_timeout=patience
            )
            self.peers.begin(peer)
        except OSError as error:  # that of TLS is one, too
            log.debug("a connection did not begin: %s", error)
            # Circles would be garbage for long, and there may be thousands of strangers: the protocol has them until it is told, and
            # the frames of a traceback hold the future that holds the error.
            protocol.connection_lost(error)
            error.__traceback__ = None


# ==== Tunnels ====
# Owns: byte streams between operators and ports of a device, beside each other on the device's link, and what each side may send. Must
# not know: HTTP, SQL, sockets.


class TunnelOver(Exception):  # noqa: N818 - it may be no error
    """A tunnel is over, before both of its directions were; the text says why, for people."""


class TunnelCarrier(Protocol):
    """A device's link, as its tunnels use it."""

    def send(self, payload: bytes) -> None: ...

    async def send_patiently(self, payload: bytes) -> None:
        """Send a binary frame, once nearly all before it is on its way."""


def tunnel_frame(number: int, state: str, **more: object) -> bytes:
    return orjson.dumps({"type": "tunnel", "tunnel": number, "state": state, **more})


TUNNEL_ROOM_MOST: Final = 2**30  # bytes that a device may say it has room for


@attrs.frozen
class TunnelOwner:
    """Who opened a tunnel, from where and when, and by which number it is listed."""

    id: int
    by: str
    address: str
    since: int


class Tunnel:
    """A stream of bytes each way between an operator and a port of a device. Each side sends only what the other one has room for, and
    says so as it hands on what came (as in RFC 9113, section 5.2): a side that does not read holds up nobody else."""

    def __init__(self, carrier: TunnelCarrier, number: int, port: int, owner: TunnelOwner, limits: Limits) -> None:
        self.number, self.port, self.owner = number, port, owner
        self.over: str | None = None  # why
        self.ended = asyncio.Event()  # that it is over
        self._broken: str | None = None  # why the device closed it: what it had sent before is still to be read
        self.from_device = self.to_device = 0  # bytes
        self.moved = time.monotonic()
        self.answered = asyncio.Event()
        self._carrier = carrier
        self._limits = limits
        self._room = 0  # bytes that the device has room for
        self._granted = limits.tunnel_window  # bytes that the device may still send
        self._consumed = 0  # and those that are handed on, and not granted anew
        self._pieces: deque[bytes] = deque()
        self._is_open = self._device_ended = self._operator_ended = False
        self._readable, self._writable = asyncio.Event(), asyncio.Event()

    @property
    def shown(self) -> dict[str, object]:
        """As it is listed."""
        owner = self.owner
        return {
            "id": owner.id, "port": self.port, "by": owner.by, "address": owner.address, "since": format_time(owner.since),
            "open": self._is_open, "from_device": self.from_device, "to_device": self.to_device,
        }  # fmt: skip

    # What the device says.

    def told(self, news: TunnelNews) -> None:
        if news.state in ("refused", "closed"):
            self._closed_by_device(news.message or "the device gives no reason")
        elif not self._is_open and news.state != "open":
            self.breach("the device said something else before it opened the port")
        elif news.state == "end":
            self._device_ended = True
            self._readable.set()
        elif self._room + (news.credit or 0) > TUNNEL_ROOM_MOST:
            self.breach("the device has room for more than there is")
        else:
            self._room += news.credit or 0
            self._is_open = self._is_open or news.state == "open"
            self._writable.set()
        self.answered.set()

    def _closed_by_device(self, why: str) -> None:
        if not self._is_open:
            self.end(why)
            return
        self._broken = f"the device: {why}"
        if not self._pieces:
            self.end(self._broken)
        self._readable.set()
        self._writable.set()

    def came(self, data: bytes) -> None:
        """Bytes of the device."""
        self._granted -= len(data)
        if len(data) > self._limits.tunnel_bytes:
            self.breach(f"the device sent more than {self._limits.tunnel_bytes} bytes at once")
        elif self._granted < 0:
            self.breach("the device sent more than there was room for")
        elif self._device_ended or not self._is_open:
            self.breach("the device sent bytes before it opened the port, or after their end")
        elif data:
            self.moved = time.monotonic()
            self._pieces.append(data)
            self._readable.set()

    def breach(self, why: str) -> None:
        self._carrier.send(tunnel_frame(self.number, "closed"))
        self.end(why)

    def end(self, why: str) -> None:
        """It is over at once, for whoever reads or writes too."""
        self.over = self.over or why
        self._pieces.clear()
        for event in (self.answered, self.ended, self._readable, self._writable):
            event.set()

    # What the operator does.

    async def read(self) -> bytes:
        """What the device has sent, nothing at its end. TunnelOver."""
        while not self._pieces and not self.over and not self._device_ended and not self._broken:
            self._readable.clear()
            await self._readable.wait()
        if self._broken and not self._pieces:
            self.end(self._broken)
        if self.over:
            raise TunnelOver(self.over)
        return self._pieces.popleft() if self._pieces else b""

    def consumed(self, size: int) -> None:
        """So many bytes were handed on: there is room for as many again."""
        self._consumed += size
        self.from_device += size
        if 2 * self._consumed >= self._limits.tunnel_window and not (self.over or self._broken or self._device_ended):
            self._carrier.send(tunnel_frame(self.number, "credit", credit=self._consumed))
            self._granted, self._consumed = self._granted + self._consumed, 0

    async def write(self, data: bytes) -> None:
        """Send to the device, a piece at a time, as it has room. For a device that has closed it is lost: what it had sent before is
        still to be read, and then its reason is told. TunnelOver."""
        start, header = 0, struct.pack("!I", self.number)
        while start < len(data):
            while not self._room and not self.over and not self._broken:
                self._writable.clear()
                await self._writable.wait()
            if self._broken and not self.over:
                return
            piece = data[start : start + min(self._room, self._limits.tunnel_bytes)]
            if not self.over:
                self._room -= len(piece)
                await self._carrier.send_patiently(header + piece)
            if self.over:
                raise TunnelOver(self.over)
            start += len(piece)
            self.to_device += len(piece)
            self.moved = time.monotonic()

    def finish(self) -> None:
        """The operator sends no more."""
        self._operator_ended = True
        if not self.over and not self._broken:
            self._carrier.send(tunnel_frame(self.number, "end"))

    @property
    def is_read(self) -> bool:
        """Whether all that the device sends was handed on, up to its end."""
        return self._device_ended and not self._pieces and not self.over and not self._broken

    @property
    def operator_ended(self) -> bool:
        return self._operator_ended

    @property
    def is_broken(self) -> bool:
        """Whether the device has closed it."""
        return self._broken is not None

    @property
    def is_whole(self) -> bool:
        """Whether both directions came to their end."""
        return self.is_read and self._operator_ended


class Tunnels:
    """All tunnels of a session. A number is given out once: what is still under way to a tunnel that is over belongs to no other."""

    __slots__ = ("_are_over", "_carrier", "_last", "_limits", "_open")

    def __init__(self, carrier: TunnelCarrier, limits: Limits) -> None:
        self._carrier = carrier
        self._limits = limits
        self._last = 0
        self._are_over = False
        self._open: dict[int, Tunnel] = {}

    def shown(self) -> list[dict[str, object]]:
        return [tunnel.shown for tunnel in self._open.values() if not tunnel.over]

    def find(self, number: int) -> Tunnel | None:
        """By the number by which it is listed."""
        return next((tunnel for tunnel in self._open.values() if tunnel.owner.id == number and not tunnel.over), None)

    def open(self, port: int, owner: TunnelOwner) -> Tunnel:
        """Ask the device to open a port. Refusal: device_offline, when the session is over; too_many_tunnels."""
        if self._are_over:
            raise Refusal("device_offline")
        if len(self._open) >= self._limits.tunnels:
            raise Refusal("too_many_tunnels", retry_after=1)
        self._last += 1
        tunnel = self._open[self._last] = Tunnel(self._carrier, self._last, port, owner, self._limits)
        self._carrier.send(tunnel_frame(tunnel.number, "open", port=port, credit=self._limits.tunnel_window))
        return tunnel

    def close(self, tunnel: Tunnel, why: str) -> None:
        """The operator is done with it; the device is told, unless it knows."""
        if self._open.pop(tunnel.number, None) is not None and not tunnel.over and not tunnel.is_whole:
            if not tunnel.is_broken:
                self._carrier.send(tunnel_frame(tunnel.number, "closed"))
            tunnel.end(why)

    def told(self, news: TunnelNews) -> None:
        """Refusal: not_binary, for a number that was never given out."""
        if news.tunnel > self._last or not news.tunnel:
            raise Refusal("not_binary")
        if (tunnel := self._open.get(news.tunnel)) is not None and not tunnel.over:
            tunnel.told(news)

    def came(self, data: bytes) -> None:
        """A binary frame. Refusal: not_binary."""
        number = int.from_bytes(data[:4], "big")
        if len(data) < 4 or number > self._last or not number:
            raise Refusal("not_binary")
        if (tunnel := self._open.get(number)) is not None and not tunnel.over:
            tunnel.came(data[4:])

    def end_all(self, why: str) -> None:
        """The session is over."""
        self._are_over = True
        for tunnel in self._open.values():
            tunnel.end(why)
        self._open.clear()


# ==== Registry ====
# Owns: which sockets are open, which session speaks for which device, what every tenant uses, which requests are under way;
# the heartbeat. Must not know: SQL.


def websocket_frame(opcode: int, payload: bytes) -> bytes:
    """A frame of the server (RFC 6455, section 5.2): final, not masked."""
    length = len(payload)
    if length < 126:
        return struct.pack("!BB", 0x80 | opcode, length) + payload
    if length < 65_536:
        return struct.pack("!BBH", 0x80 | opcode, 126, length) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, length) + payload


class Phase(Protocol):
    """How far a device's connection has come, where that is to be told of its end."""

    def ended(self, code: str) -> None:
        """The connection is over, for this reason."""


HEADER_BYTES: Final = 14  # of a frame, at most
NOTSENT_LOWAT: Final = MappingProxyType({"linux": 25, "darwin": 0x201})  # by system
UNSENT_BYTES: Final = 64 * 1024  # of a connection with tunnels that the system may hold: what else is sent waits behind them


def keep_little_unsent(transport: asyncio.Transport | None) -> None:
    """Let the system take no more of a connection than it can soon send; otherwise megabytes would lie before what is urgent. Linux and
    macOS know how (TCP_NOTSENT_LOWAT, https://lwn.net/Articles/560082/)."""
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is not None and sys.platform in NOTSENT_LOWAT:
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, NOTSENT_LOWAT[sys.platform], UNSENT_BYTES)
READ_BYTES: Final = 64 * 1024  # of messages that wait to be read from a link, before the connection is not read any more


class Link(BaseProtocol):
    """A device's WebSocket once its HTTP is over: aiohttp's reader of messages on the bare connection, which keeps a quarter of
    what aiohttp's own WebSocket keeps of each.

    Sends are never awaited: a peer that does not read what it is sent is dropped.
    """

    __slots__ = (
        "_backlog", "_counted", "_is_served", "_limits", "_lost", "_queue", "_read", "_reader", "_received", "_senders", "_stopping",
        "address", "began", "ended", "heard", "peer", "phase", "pinged", "reading", "use",
    )  # fmt: skip

    def __init__(
        self, transport: asyncio.Transport, peer: Peer, address: str, limits: Limits, stopping: asyncio.Event
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(loop)
        self.transport = transport
        self._upgraded = True  # no HTTP is parsed: what `BaseProtocol` asks before it holds the connection
        self._queue = WebSocketDataQueue(self, READ_BYTES, loop=loop)
        # One byte more than a frame may have: aiohttp refuses a frame of this size itself.
        self._reader = WebSocketReader(self._queue, limits.frame_bytes + 1, compress=False, decode_text=False)
        self._limits = limits
        self._stopping = stopping
        self._lost: asyncio.Future[None] | None = None  # made when it is waited for
        self._senders: list[asyncio.Future[None]] | None = None  # of those who send patiently; made when there is one
        self._is_served = False
        self._received = 0  # bytes that are not taken yet
        self._counted = 0  # if fewer than so many are left, some of those in the backlog were taken
        self._read = 0  # bytes of the message that is being taken
        self._backlog: Backlog | None = None
        self.peer = peer
        self.address = address
        self.ended = ""  # why, once it has
        self.phase: Phase | None = None
        self.use: TenantUse | None = None  # once it is known which device this is
        self.began = self.heard = loop.time()
        self.pinged = False
        self.reading = True  # whether the session takes what the device sends

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()  # a long frame on a slow line is life, before it is whole
        self._reader.feed_data(data)
        self._received += len(data)
        if self._received > self._limits.piece_bytes:
            self._count()

    def belong(self, use: TenantUse, backlog: Backlog) -> None:
        """It is known to which tenant its device belongs."""
        self.use, self._backlog = use, backlog

    def hold(self) -> None:
        self._pause_reading_for_buffer()
        self._loop.call_later(self._limits.stall_seconds, self.go_on)  # whatever holds the others up

    def go_on(self) -> None:
        if self._buffer_paused:
            self.heard = self._loop.time()
            self._resume_reading_for_buffer()

    @property
    def listens(self) -> bool:
        """Whether the server reads what the device sends; if not, its silence is the server's."""
        return self.reading and not self._buffer_paused

    def connection_lost(self, exc: BaseException | None) -> None:
        self._reader.feed_eof()
        super().connection_lost(exc)
        self._wake_senders()
        if self._backlog is not None:
            self._backlog.taken(self)
        if self._lost is not None:
            self._lost.set_result(None)
        self._forget()

    def served(self) -> None:
        """Nobody reads from it any more."""
        self._is_served = True
        self._forget()

    def _forget(self) -> None:
        """A link and its queue know each other: a circle is garbage for long."""
        if self.transport is None and self._is_served:
            del self._queue, self._reader

    @property
    def has_more(self) -> bool:
        """Whether the next message has come already."""
        return bool(self._queue._buffer)  # noqa: SLF001 - see `PRIVATE`

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    async def read(self) -> WSMessage | None:
        """The next message; None after the last, and then `ended` says why it was the last."""
        self._received -= self._read
        if self._received < self._counted:
            self._message_taken()
        try:
            message = cast(WSMessage, await self._queue.read())
        except EofStream:
            self.sign_off("connection_lost")
            return None
        except WebSocketError as error:
            broken = (fault.code for fault in FAULTS.values() if fault.close == error.code)
            self.end(next(broken, "protocol_error"))
            await self._wait_until_lost()
            return None
        if message.type is not WSMsgType.CLOSE:
            self._read = len(message.data) + HEADER_BYTES
            return message
        self.end("closed_by_device")
        return None

    def _message_taken(self) -> None:
        """Some of what was counted, or all that was received. Whoever has sent more goes behind the others with it."""
        self._received = max(0, self._received)
        if self._counted and self._backlog is not None:
            self._counted = 0
            self._backlog.taken(self)
            self._count()

    def _count(self) -> None:
        if self._received > self._limits.piece_bytes and self._backlog is not None:
            self._counted = self._received - self._limits.piece_bytes
            self._backlog.received(self, self._received)

    async def close(self) -> None:
        """End the connection and wait for the device's close frame, or until it is gone. What it sent before that is read and thrown
        away: a socket that is closed with unread bytes is reset, and the device would never see the close code."""
        self.end("shutting_down")  # if it has not ended yet
        while await self.read() is not None:
            pass
        if self.transport is not None:
            self.transport.close()

    def send(self, payload: bytes) -> None:
        """Send a text frame, or drop the peer that has not read the ones before it."""
        self.send_frame(WSMsgType.TEXT, payload)

    async def send_patiently(self, payload: bytes) -> None:
        """Send a binary frame, once nearly all before it is on its way. What else is sent meanwhile goes before it."""
        if self._senders is None:
            self._senders = []
            keep_little_unsent(self.transport)
        while self._paused and self.transport is not None and not self.ended:
            turn = self._loop.create_future()
            self._senders.append(turn)
            await turn
        self.send_frame(WSMsgType.BINARY, payload)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wake_senders()

    def _wake_senders(self) -> None:
        """In the order in which they came; the first of them may fill the buffer again."""
        senders, self._senders = self._senders or [], self._senders and []
        for turn in senders:
            if not turn.done():
                turn.set_result(None)

    def ping(self) -> None:
        self.send_frame(WSMsgType.PING, b"")

    def send_frame(self, opcode: int, payload: bytes) -> None:
        if not self.ended:
            self._write(opcode, payload)

    def end(self, code: str) -> None:
        """Close with a code and its reason; whoever reads the link reads the answer to it."""
        if self.ended:
            return
        self.sign_off(code)
        fault = FAULTS[code]
        self._write(WSMsgType.CLOSE, struct.pack("!H", fault.close) + fault.message.encode())
        seconds = self._limits.stop_close_seconds if self._stopping.is_set() else self._limits.close_seconds
        if self.transport is not None:
            self._loop.call_later(seconds, self.transport.abort)

    def abort(self, code: str) -> None:
        """Break the connection: the peer does not read, or is gone."""
        self.sign_off(code)
        if self.transport is not None:
            self.transport.abort()

    def sign_off(self, code: str) -> None:
        """It is over, from this moment and for this reason; the socket may take longer."""
        if not self.ended:
            self.ended = code
            phase, self.phase = self.phase, None
            if phase is not None:
                phase.ended(code)
            self._wake_senders()

    def _write(self, opcode: int, payload: bytes) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        transport.write(websocket_frame(opcode, payload))
        if transport.get_write_buffer_size() > self._limits.outbox_bytes:
            self.abort("too_slow")

    async def _wait_until_lost(self) -> None:
        if self.transport is not None:
            self._lost = self._loop.create_future()
            await self._lost


class ReachableSession(Protocol):
    """A session that was welcomed, as the registry knows it."""

    link: Link
    tunnels: Tunnels

    def send_config(self, version: int, document: bytes) -> bool: ...
    def wake(self) -> None: ...


class RequestUnderWay:
    """A request under way: the token it stands on, and the deadline that ends it. It is entered before the token is looked up:
    a revocation that comes between must find it."""

    def __init__(self, token_id: str | None, deadline: asyncio.Timeout) -> None:
        self.token_id = token_id
        self.tenant_id: int | None = None
        self.client_gone = False
        self.over = False
        self._until: float | None = None
        self._changing = False
        self._deadline = deadline
        self._task = asyncio.current_task()

    def end(self) -> None:
        """It goes on only if it is the one that asks for this."""
        if self._task is not asyncio.current_task():
            self.lasts(0.0)

    def client_left(self) -> None:
        """Nobody waits for the answer any more: what only reads ends."""
        self.client_gone = True
        if not self.over:
            self.lasts(0.0)

    def lasts(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        self._until = until if self._until is None else min(self._until, until)  # who has ended it ended it for good
        self._arm()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A change is made or refused by its own transaction. What follows from it, and the answer, must not be cut off from it."""
        self._changing = True
        self._arm()
        try:
            yield
        finally:
            self._changing = False
            self._arm()

    def _arm(self) -> None:
        if not self._deadline.expired():
            self._deadline.reschedule(None if self._changing else self._until)


class Subscription:
    """The events of a tenant that a live feed has not sent yet, in order. One that falls behind reads the database again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._events: deque[tuple[int, bytes]] = deque()
        self.behind = True
        self.ring = asyncio.Event()

    def add(self, number: int, text: bytes) -> None:
        if len(self._events) >= self._most:
            self._events.clear()
            self.behind = True
        if not self.behind:
            self._events.append((number, text))
        self.ring.set()

    def catch_up(self) -> None:
        """What happens from now on is kept; what happened before is read from the database."""
        self._events.clear()
        self.behind = False

    def take(self, last: int) -> tuple[int, bytes]:
        """What came after the event `last`: the newest event's id, and the text."""
        self.ring.clear()
        events, self._events = self._events, deque()
        newer = [(number, text) for number, text in events if number > last]
        return (newer[-1][0] if newer else last), b"".join(text for _, text in newer)


def event_lines(number: int, kind: str, text: str) -> bytes:
    """One event of a live feed (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return f"id: {number}\nevent: {kind}\ndata: {text}\n\n".encode()


class News:
    """Tells what was committed to those of the tenant who wait for it: its live feeds, and pushes that wait for a verdict. One look
    at the database serves all of them."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._read = store.read.news
        self._committed = store.writer.news
        self._limits = limits
        self._feeds: dict[int, set[Subscription]] = {}
        self._rings = TenantBells()
        self._watching = asyncio.Event()  # set while what happens is told; nobody looks while nobody waits

    async def watching(self) -> None:
        """From now on nothing that happens is missed by who has a subscription."""
        if not self._watching.is_set():
            self._committed.ring()
            await self._watching.wait()

    @contextmanager
    def subscription(self, tenant: int) -> Iterator[Subscription]:
        """Refusal: too_many_feeds."""
        feeds = self._feeds.setdefault(tenant, set())
        if len(feeds) >= self._limits.feeds:
            raise Refusal("too_many_feeds", retry_after=math.ceil(self._limits.feed_seconds))
        feed = Subscription(self._limits.feed_events)
        feeds.add(feed)
        try:
            yield feed
        finally:
            feeds.discard(feed)
            if not feeds:
                self._feeds.pop(tenant, None)

    def ring(self, tenant: int) -> asyncio.Future[None]:
        """Done when something may have happened in the tenant. Whoever looks for something takes it before the look."""
        if not self._watching.is_set():
            self._committed.ring()
        return self._rings.next(tenant)

    def wake_all(self) -> None:
        """The server stops."""
        self._rings.ring_all()
        for feeds in self._feeds.values():
            for feed in feeds:
                feed.ring.set()

    async def run(self) -> None:
        last: int | None = None
        while True:
            ring = self._committed.next
            try:
                last = await self._tell(last)
            except (Refusal, sqlite3.Error) as error:  # the next look tells it
                log.warning("cannot look for what happened: %s", error)
            await Bell.heard(ring, self._limits.feed_seconds)

    async def _tell(self, last: int | None) -> int | None:
        """Tell what happened after an event; the id of the newest, None while nobody waits for any."""
        if not (self._feeds or self._rings):
            self._watching.clear()
            return None
        if last is None:
            last = await self._read.newest()
            self._rings.ring_all()  # what they wait for may have happened before
            self._watching.set()
        while events := await self._read.after(last, self._limits.feed_events):
            for tenant, number, kind, text in events:
                if feeds := self._feeds.get(tenant):
                    lines = event_lines(number, kind, text)
                    for feed in feeds:
                        feed.add(number, lines)
                self._rings.ring(tenant)
            last = events[-1][1]
        return last


FEED_END_SECONDS: Final = 1.0  # for a live feed to write what it is at, when the server stops


class Registry:
    """All links of devices; by device the one link that may speak for it, and once that was welcomed, its session. Nobody
    reaches a device that was not welcomed."""

    def __init__(self, limits: Limits, allowances: Allowances) -> None:
        self.links: dict[Link, asyncio.Task[None]] = {}
        self.closing = asyncio.Event()
        self._context = contextvars.Context()  # of no request: a session outlives the one that began it
        self._fought_seconds = limits.fought_seconds
        self._conflict_retry_seconds = limits.conflict_retry_seconds
        self._allowances = allowances
        self._places: dict[int, Link] = {}
        self._live: dict[int, ReachableSession] = {}
        self._uses: dict[int, TenantUse] = {}
        self._quotas: dict[int, Mapping[str, int]] = {}  # those that were set since the start
        self._removed_tenants: set[int] = set()
        self._running: set[RequestUnderWay] = set()
        self._feeds: set[asyncio.Transport | None] = set()
        self._held: dict[int, int] = {}  # how often
        self._followers: Counter[tuple[int, str]] = Counter()  # of logs and of points, by tenant

    def serve(self, link: Link, conversation: Coroutine[Any, Any, None]) -> None:
        """Begin a conversation, and keep it until it is over."""
        task = self.links[link] = asyncio.get_running_loop().create_task(conversation, context=self._context)

        def served(_: object) -> None:
            del self.links[link]
            link.served()

        task.add_done_callback(served)

    @contextmanager
    def held(self, device_id: int) -> Iterator[None]:
        """Nothing is read from the device meanwhile: it waits in the device."""
        self._held[device_id] = self._held.get(device_id, 0) + 1
        try:
            yield
        finally:
            self._held[device_id] -= 1
            if not self._held[device_id]:
                del self._held[device_id]
            if session := self._live.get(device_id):
                session.wake()

    def is_held(self, device_id: int) -> bool:
        return device_id in self._held

    @contextmanager
    def follower(self, tenant_id: int, what: str, most: int) -> Iterator[None]:
        """Somebody follows a tenant's logs or points. Refusal: too_many_feeds."""
        if self._followers[tenant_id, what] >= most:
            raise Refusal("too_many_feeds", retry_after=1)
        self._followers[tenant_id, what] += 1
        try:
            yield
        finally:
            self._followers[tenant_id, what] -= 1
            if not self._followers[tenant_id, what]:
                del self._followers[tenant_id, what]

    @contextmanager
    def feed(self, transport: asyncio.Transport | None) -> Iterator[None]:
        """Keep a live feed's connection at hand while it lasts: at the end of the server one that is not read must not hold it up."""
        self._feeds.add(transport)
        try:
            yield
        finally:
            self._feeds.discard(transport)

    @asynccontextmanager
    async def request(self, token_id: str | None) -> AsyncIterator[RequestUnderWay]:
        """A request lasts no longer than its token, and than its client waits. Refusal: unauthorized, when the token is revoked or
        expires meanwhile. ConnectionError, when the client has gone."""
        deadline = asyncio.timeout(None)
        running = RequestUnderWay(token_id, deadline)
        try:
            async with deadline:
                self._running.add(running)
                try:
                    yield running
                finally:
                    self._running.discard(running)
                    running.over = True
        except TimeoutError:
            if not deadline.expired():
                raise
            if running.client_gone:
                raise ConnectionResetError("the client has gone") from None
            raise Refusal("unauthorized") from None

    def stands(self, running: RequestUnderWay, tenant_id: int | None, seconds: float | None) -> None:
        """The token of a request is known, and how long it lasts. Refusal: unauthorized, when its tenant was removed meanwhile."""
        if tenant_id in self._removed_tenants:
            raise Refusal("unauthorized")
        running.tenant_id = tenant_id
        if seconds is not None:
            running.lasts(seconds)

    def end_requests(self, token_id: str) -> None:
        """A token was revoked: end what is under way for it."""
        for running in self._running:
            if running.token_id == token_id:
                running.end()

    def use_of(self, token: DeviceToken, quotas: Mapping[str, int]) -> TenantUse:
        """What a tenant uses. At the first session since the start that is what the token's row says of it, and `quotas` where
        it has none of its own."""
        use = self._uses.get(token.tenant_id)
        if use is None:
            own = (token.connections_most, token.points_most, token.log_bytes_most)
            most = self._quotas.get(token.tenant_id) or with_defaults(dict(zip(QUOTAS_WATCHED, own, strict=True)), quotas)
            points = DailyQuota(most["points_per_day"], token.day, token.points_of_day)
            log_bytes = DailyQuota(most["log_bytes_per_day"], token.day, token.log_bytes_of_day)
            use = self._uses[token.tenant_id] = TenantUse(token.tenant_id, most["connections"], points, log_bytes)
        return use

    def set_quotas(self, tenant_id: int, quotas: Mapping[str, int]) -> None:
        """What a tenant may use from now on. Sessions that wait for more look again."""
        self._quotas[tenant_id] = quotas
        use = self._uses.get(tenant_id)
        if use is not None:
            use.connections_most = quotas["connections"]
            use.points.most, use.log_bytes.most = quotas["points_per_day"], quotas["log_bytes_per_day"]
            for session in [session for session in self._live.values() if session.link.use is use]:
                session.wake()

    def take_over(self, device_id: int, link: Link, use: TenantUse) -> None:
        """`link` speaks for the device from now on; the one before it is superseded. Refusal: too_many_connected;
        session_conflict, when young sessions of the device were superseded again and again; too_many_sessions."""
        before = self._places.get(device_id)
        if wait := self._allowances.openings.add(str(device_id)):
            raise Refusal("too_many_sessions", retry_after=math.ceil(wait))
        if before is None and use.connections >= use.connections_most:
            raise Refusal("too_many_connected")
        if before is not None:
            if link.began - before.began < self._fought_seconds and self._allowances.fights.add(str(device_id)):
                raise Refusal("session_conflict", retry_after=self._conflict_retry_seconds)
            before.end("superseded")
        self._places[device_id] = link
        link.belong(use, self._allowances.shares.of(use.tenant_id).backlog)
        use.connections += 1

    def welcome(self, device_id: int, session: ReachableSession) -> None:
        """The device knows that it is connected: from now on it can be reached."""
        self._live[device_id] = session

    def leave(self, device_id: int, link: Link) -> None:
        if self._places.get(device_id) is link and link.use is not None:
            del self._places[device_id]
            self._live.pop(device_id, None)
            link.use.connections -= 1

    def _links_of(self, tenant_id: int) -> list[Link]:
        return [link for link in self._places.values() if link.use is not None and link.use.tenant_id == tenant_id]

    @property
    def sessions(self) -> int:
        """How many devices can be reached."""
        return len(self._live)

    def is_live(self, device_id: int) -> bool:
        return device_id in self._live

    def tunnels(self, device_id: int) -> Tunnels | None:
        """Those of a device's session; None when it is not connected."""
        session = self._live.get(device_id)
        return None if session is None else session.tunnels

    def address_of(self, device_id: int) -> str | None:
        """From where the device's session comes, None without one."""
        link = self._places.get(device_id)
        return None if link is None else link.address

    def is_news(self, device_id: int, kind: str) -> bool:
        """Whether this was not said of the device within the last hour."""
        return not self._allowances.notices.add(f"{device_id} {kind}")

    def send(self, device_id: int, payload: bytes) -> bool:
        """Send to a device; False when it is not connected."""
        session = self._live.get(device_id)
        if session is None:
            return False
        session.link.send(payload)
        return True

    def send_config(self, device_id: int, version: int, document: bytes) -> bool:
        """Send a configuration, JSON text, to a device if it is connected; if not, False: its next welcome carries it."""
        session = self._live.get(device_id)
        return session is not None and session.send_config(version, document)

    def end(self, device_id: int, code: str) -> None:
        """End a device's session, if there is one, or the one that is about to begin."""
        link = self._places.get(device_id)
        if link is not None:
            link.end(code)

    def end_tenant(self, tenant_id: int) -> None:
        """A tenant was removed: end its sessions and requests."""
        self._uses.pop(tenant_id, None)
        self._quotas.pop(tenant_id, None)
        self._removed_tenants.add(tenant_id)
        for running in self._running:
            if running.tenant_id == tenant_id:
                running.end()
        for link in self._links_of(tenant_id):
            link.end("tenant_removed")

    def end_all(self, code: str) -> None:
        """The server stops: end every session, and every feed with the next ring, or soon if its client does not read."""
        self.closing.set()
        asyncio.get_running_loop().call_later(FEED_END_SECONDS, self._abort_feeds)
        for link in list(self.links):
            link.end(code)

    async def wait_until_left(self, seconds: float) -> None:
        """Until every link is closed; those that are still open after so many seconds are cut."""
        if self.links:
            _, late = await asyncio.wait(self.links.values(), timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _abort_feeds(self) -> None:
        for transport in self._feeds:
            if transport is not None:
                transport.abort()

    def heard_since(self, moment: float) -> dict[int, float]:
        """By device, when it was last heard, of those that were heard after a moment of the loop's clock."""
        return {device_id: session.link.heard for device_id, session in self._live.items() if session.link.heard > moment}


class Heartbeat:
    """Pings devices that are silent and drops those that do not answer. One task for all sessions: timers of their own
    would cost each of ten thousand more memory than the rest of it."""

    def __init__(self, registry: Registry, writer: Writer, limits: Limits, seconds: float) -> None:
        self._registry = registry
        self._writer = writer
        self._seconds = seconds
        self._grace = seconds * 0.4  # with the step below it: offline within one and a half heartbeats
        self._step = min(1.0, seconds / 20)
        self._seen_seconds = limits.seen_seconds

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        last = recorded = loop.time()
        while True:
            await asyncio.sleep(self._step)
            now = loop.time()
            late, last = now - last - self._step, now
            self._sweep(now, late if late > self._grace / 2 else 0.0)
            if now - recorded >= self._seen_seconds:
                self._record(now, recorded)
                recorded = now

    def _sweep(self, now: float, late: float) -> None:
        """`late`: how long this process itself stood still; a device is not to blame for that."""
        for link in list(self._registry.links):
            link.heard += late
            silent = now - link.heard
            if silent < self._seconds or not link.listens:
                link.pinged = False
            elif not link.pinged:
                link.pinged = True
                link.ping()
            elif silent >= self._seconds + self._grace:
                link.abort("unresponsive")

    def _record(self, now: float, since: float) -> None:
        """Store when silent devices were last heard; those that send are stored with their frames."""
        wall = now_ms()
        seen = {device: wall - round((now - heard) * 1000) for device, heard in self._registry.heard_since(since).items()}
        if seen:
            self._writer.seen(seen)


class ConfigClock:
    """Marks configurations `timed_out` for which no verdict came, across restarts too: what is awaited stands in the database."""

    def __init__(self, writer: Writer, limits: Limits) -> None:
        self._writer = writer
        self._seconds = limits.clock_seconds

    async def run(self) -> None:
        late: list[tuple[int, int]] = []
        while True:
            await asyncio.sleep(self._seconds)
            late += self._writer.awaited.take_late()
            try:
                if late:
                    await self._writer.change(functools.partial(time_out_configs, late=late))
                    late = []
            except (Refusal, sqlite3.Error) as error:  # they stay late, and the next try may do better
                log.warning("cannot mark configurations whose verdict did not come: %s", error)


class LineJudge:
    """Lets rules about logs judge the lines that have come. Which lines a rule has judged stands in the database."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._logs, self._alerts, self._watch = store.read.logs, store.read.alerts, store.writer.watch
        self._limits = limits
        self._marks: dict[WatchedRule, int] = {}  # up to which line each has judged
        self.problems: dict[int, str] = {}  # why a rule cannot judge, by its number

    async def look(self) -> None:
        """Judge what is new, a part of it for each rule."""
        rules = [rule for rule in self._watch.places.rules.values() if rule.kind == "log"]
        self._marks = {rule: self._marks[rule] for rule in rules if rule in self._marks}
        self.problems = {rule.id: self.problems[rule.id] for rule in rules if rule.id in self.problems}
        newest = await self._logs.newest() if rules else 0
        for rule in rules:
            try:
                if rule not in self._marks:
                    await self._begin(rule)
                if self._marks[rule] < newest:
                    await self._judge(rule, newest)
                self.problems.pop(rule.id, None)
            except Refusal as refusal:  # the others go on, and so may this one the next time
                text = "; ".join(error.message for error in refusal.errors) or refusal.fault.message
                if self.problems.get(rule.id) != text:
                    log.warning("rule %d (%s) cannot judge lines: %s", rule.id, rule.name, text)
                self.problems[rule.id] = text

    def _wanted(self, rule: WatchedRule, start: int) -> LogFilter:
        condition = rule.rule.condition
        search = parse_search(condition.q, self._limits) if condition.q else None
        return LogFilter(None, rule.rule.match, condition.level, search, start, LATEST)

    async def _begin(self, rule: WatchedRule) -> None:
        """Learn where a rule stands, and which lines it has in its window."""
        mark = await self._alerts.last_line(rule.tenant_id, rule.id)
        wanted, last = self._wanted(rule, now_ms() - rule.rule.condition.window), 0
        while lines := await self._logs.matches(rule.tenant_id, wanted, last, mark, self._limits.trial_readings):
            last = lines[-1][0]
            self._take(rule, lines, mark, is_known=True)
        self._marks[rule] = mark

    async def _judge(self, rule: WatchedRule, newest: int) -> None:
        mark = self._marks[rule]
        upto = min(newest, mark + self._limits.judged_lines)
        lines = await self._logs.matches(rule.tenant_id, self._wanted(rule, 0), mark, upto, self._limits.trial_readings)
        if len(lines) == self._limits.trial_readings:
            upto = lines[-1][0]
        self._marks[rule] = upto
        self._take(rule, lines, upto, is_known=False)

    def _take(self, rule: WatchedRule, lines: list[tuple[int, int, str, int]], upto: int, *, is_known: bool) -> None:
        taken = [(device_id, at) for _, device_id, _, at in lines]
        if self._watch.places.rules.get(rule.id) is rule:  # otherwise it was changed meanwhile
            self._watch.take_lines(rule.id, taken, upto, time.monotonic(), now_ms(), is_known=is_known)


async def every(seconds: float, purpose: str, work: Callable[[], Awaitable[object]]) -> None:
    """Do something again and again, with a pause before each. What fails is logged, and the next time may do better."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except (OSError, sqlite3.Error, Refusal) as error:
            log.warning("cannot %s: %s", purpose, error)


class Supervisor:
    """Runs the tasks that the server cannot do without. If one ends before it is told to, the server is of no use: it says so in
    its log and at /healthz, and ends, so that a service manager starts it again."""

    def __init__(self) -> None:
        self.failed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._tell: Callable[[], object] | None = None

    def on_failure(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        if self.failed:
            tell()

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        self.watch(task)

    def watch(self, task: asyncio.Task[None]) -> None:
        """A task that somebody else began, and ends."""
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (task.exception() is not None or task in self._tasks):
            log.critical("the %s failed, and the server ends", task.get_name(), exc_info=task.exception())
            self.failed = True
            if self._tell is not None:
                self._tell()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class SteadyClock:
    """Says whether the time of the day can be believed by whoever deletes what is old. Where it was set forward by much, everything seems
    old; that may be put right before long. So it is doubted for some time, unless it is set back."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._at: tuple[float, int] | None = None  # the process's own clock and that of the day, when they were last looked at
        self._doubted_until = float("-inf")

    @property
    def is_new(self) -> bool:
        return self._at is None

    def expect(self, newest: int | None) -> None:
        """At the start: the newest time that is known, if any. A server that was off for long doubts as well."""
        self._at = time.monotonic(), now_ms()
        if newest is not None:
            self._look(newest, DAY)

    def is_doubtful(self) -> bool:
        """Look at the clock."""
        if self._at is not None:
            since, was = self._at
            self._look(was + round((time.monotonic() - since) * 1000), round(self._limits.clock_jump_seconds * 1000))
        self._at = time.monotonic(), now_ms()
        return time.monotonic() < self._doubted_until

    def _look(self, expected: int, most: int) -> None:
        ahead = now_ms() - expected
        if ahead > most:
            self._doubted_until = time.monotonic() + self._limits.clock_doubt_seconds
            hours = self._limits.clock_doubt_seconds / 3_600
            log.warning("the clock is %.0f h ahead of what was known: nothing is deleted for its age for %.0f h", ahead / HOUR, hours)
        elif ahead < -most:
            self._doubted_until = float("-inf")


class Cleaner:
    """Deletes what removed devices and tenants left behind, and what is too old, a little at a time. Tenants may be removed from the
    command line, beside the server: then it is the first to see it, and ends what is under way for them."""

    def __init__(self, store: Store, registry: Registry, limits: Limits, log_days: int) -> None:
        self._store = store
        self._registry = registry
        self._limits = limits
        self._log_days = log_days
        self._began = asyncio.get_running_loop().time()
        self._looked = float("-inf")  # when it was last looked for what is too old
        self._clock = SteadyClock(limits)
        self._word = 0  # the last that it was asked of whether a line has it
        self.wanted = asyncio.Event()
        self.wanted.set()  # a removal before the last stop may not be done

    async def run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._limits.clock_seconds):
                    await self.wanted.wait()
            try:
                await self._clean()
                await self._delete_old()
            except (Refusal, sqlite3.Error) as error:
                log.warning("cannot delete what was removed or is too old: %s", error)
                await asyncio.sleep(self._limits.retry_seconds)
                self.wanted.set()

    async def _clean(self) -> None:
        """First nothing more may come from what was removed: frames that are under way are stored before the change that deletes."""
        self.wanted.clear()
        while removed := await self._store.read.removal.removed(self._limits):
            for tenant_id in removed.tenants:
                self._registry.end_tenant(tenant_id)
            for device_id in removed.devices:
                self._registry.end(device_id, "device_removed")
            delete = functools.partial(delete_removed, removed=removed, limits=self._limits)
            await self._store.writer.change(delete, weight=self._limits.removed_rows)


    async def _delete_old(self) -> None:
        """What was kept for as long as its tenant wants it, now and then."""
        now, writer, logs, limits = asyncio.get_running_loop().time(), self._store.writer, self._store.read.logs, self._limits
        if now - self._looked < limits.retention_seconds:
            return
        self._looked = now
        if self._clock.is_new:
            self._clock.expect(await self._store.read.removal.newest_moment())
        if self._clock.is_doubtful():
            return
        cuts = await logs.cuts(self._log_days)
        delete = functools.partial(delete_old_lines, cuts=cuts, most=limits.removed_lines)
        more = await logs.has_old(cuts)
        while more:
            more = await writer.change(delete, weight=limits.removed_rows)
        before = now_ms() - round(limits.repeat_seconds * 1000)
        more = now - self._began >= limits.repeat_seconds and await logs.has_old_repeats(before)
        while more:
            more = await writer.change(lambda connection: delete_old_repeats(connection, before, limits.removed_rows))
        old = now_ms() - limits.notification_days * DAY
        more = await self._store.read.notifications.has_old(old)
        while more:
            more = await writer.change(lambda connection: delete_old_notifications(connection, old, limits.removed_rows))
        ended = now_ms() - limits.command_days * DAY
        more = await self._store.read.commands.has_old(ended)
        while more:
            more = await writer.change(lambda connection: delete_old_commands(connection, ended, limits))
        words, self._word = await logs.unused_words(self._word, limits.looked_words)
        if words:
            await writer.change(lambda connection: delete_unused_words(connection, writer.dictionary, words))


class Pusher:
    """Makes pushes to many devices a part at a time, of all tenants in turn; those, too, that were under way at the last stop."""

    def __init__(self, store: Store, registry: Registry, limits: Limits) -> None:
        self._store = store
        self._registry = registry
        self._limits = limits
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._awaited: dict[int, asyncio.Future[None]] = {}  # by document

    async def made(self, document_id: int) -> None:
        """Until a push is made. Refusal: storage_unavailable, when nothing can be stored for now; it is made later."""
        made = self._awaited[document_id] = asyncio.get_running_loop().create_future()
        self._wanted.set()
        try:
            if await self._store.read.pushes.is_under_way(document_id):
                await wait_patiently(made, self._store.writer.patience())
        except TimeoutError:
            raise Refusal("storage_unavailable") from None
        finally:
            del self._awaited[document_id]

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                while tenants := await self._store.read.pushes.tenants():
                    for tenant_id in tenants:
                        await self._make_part(tenant_id)
            except (Refusal, sqlite3.Error) as error:
                log.warning("cannot go on with a push: %s", error)
                await asyncio.sleep(self._limits.retry_seconds)
                self._wanted.set()

    async def _make_part(self, tenant_id: int) -> None:
        limits, share = self._limits, self._store.allowances.shares.of(tenant_id)
        make = functools.partial(make_part_of_push, tenant_id=tenant_id, most=limits.push_devices)
        part = await self._store.writer.change(make, share, limits.push_devices * limits.device_points)
        if part is None:
            return
        document = part.document.encode()
        for row in part.rows:
            self._registry.send_config(row.device_id, row.version, document)
        made = self._awaited.get(part.document_id)
        if part.last and made is not None and not made.done():
            made.set_result(None)


class Commander:
    """Gives devices their commands when it is their turn, one after the other, and minds the clocks of all commands. What it needs to
    know stands in the database: it may begin anew at any time."""

    def __init__(self, store: Store, registry: Registry, limits: Limits) -> None:
        self._store = store
        self._registry = registry
        self._limits = limits

    async def run(self) -> None:
        turns, limits = self._store.writer.turns, self._limits
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(limits.command_clock_seconds):
                    await turns.wanted.wait()
            devices = turns.take(limits.command_devices)
            try:
                if devices or await self._store.read.commands.is_due():
                    await self._go_on(devices)
            except (Refusal, sqlite3.Error) as error:
                log.warning("cannot go on with commands: %s", error)
                for device_id, back in devices.items():
                    turns.add([device_id], back=back)
                await asyncio.sleep(limits.retry_seconds)

    async def _go_on(self, devices: dict[int, bool]) -> None:
        live = {device_id: back for device_id, back in devices.items() if self._registry.is_live(device_id)}
        for device_id in devices.keys() - live.keys():
            if self._registry.address_of(device_id) is not None:
                self._store.writer.turns.miss(device_id)
        step = functools.partial(
            go_on_with_commands, devices=[device_id for device_id, back in live.items() if not back],
            back=[device_id for device_id, back in live.items() if back], limits=self._limits,
        )  # fmt: skip
        done = await self._store.writer.change(step, weight=self._limits.removed_rows)
        for device_id, frame in done.frames:
            self._registry.send(device_id, frame.encode())
        for command, _ in done.ended:
            self._store.writer.command_news.ring(command)


# ==== Delivery ====
# Owns: who is told of alerts and when (Dispatcher), and how that arrives (Courier, MessageSender). Must not know: HTTP of our own, SQL.


class ForbiddenAddress(OSError):  # noqa: N818 - it is no error of the one who asked
    """Notifications may not be sent there."""


class Lookups:
    """Looks names up, each on a thread of its own: there is no way to end one that hangs, and nothing else may wait for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = 0

    async def addresses(self, host: str, port: int, family: socket.AddressFamily) -> list[tuple[Any, ...]]:
        """As `getaddrinfo` tells them. OSError."""
        if self._running >= self._most:
            raise OSError("too many names are being looked up")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[tuple[Any, ...]]] = loop.create_future()

        def end(outcome: list[tuple[Any, ...]] | Exception) -> None:
            self._running -= 1
            if found.done():  # nobody waits any more
                return
            if isinstance(outcome, Exception):
                found.set_exception(outcome)
            else:
                found.set_result(outcome)

        def work() -> None:
            outcome: list[tuple[Any, ...]] | Exception
            try:
                outcome = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                outcome = OSError(str(error))
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(end, outcome)

        self._running += 1
        threading.Thread(target=work, name="lookup", daemon=True).start()
        return await found


class GuardedResolver(AbstractResolver):
    """Names to addresses that notifications may be sent to. The client connects to what it is given here, and looks up no name twice."""

    def __init__(self, named: Networks, lookups: Lookups) -> None:
        self._named = named
        self._lookups = lookups

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """ForbiddenAddress, where there is none; OSError."""
        found = await self._lookups.addresses(host, port, family)
        good = [row for row in found if may_reach(ipaddress.ip_address(row[4][0]), self._named)]
        if not good:
            raise ForbiddenAddress("no address of it may be reached")
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=sockaddr[0], port=port, family=kind, proto=protocol, flags=numeric)
            for kind, _, protocol, _, sockaddr in good
        ]

    async def close(self) -> None:
        return


def guarded_socket(named: Networks, info: Any) -> socket.socket:
    """A socket for a connection that is about to be made; the last look at its address, wherever that came from. ForbiddenAddress."""
    family, kind, protocol, _, sockaddr = info
    address = address_of(str(sockaddr[0]))
    if address is None or not may_reach(address, named):
        raise ForbiddenAddress("the address may not be reached")
    return socket.socket(family, kind, protocol)


def told_failure(error: BaseException, seconds: float) -> str:
    """What failed, for whoever owns the receiver: nothing of what the other side said, and no address."""
    known: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
        (ForbiddenAddress, "its address is in a network that may not be reached (--webhook-networks)"),
        (ClientConnectorDNSError, "its name is not known"),
        (TimeoutError, f"it did not answer within {seconds:g} s"),
        ((ClientConnectorCertificateError, ssl.SSLCertVerificationError), "its certificate is not valid"),
        ((ClientSSLError, ssl.SSLError), "no connection with TLS could be made"),
        ((ClientConnectorError, aiosmtplib.SMTPConnectError), "no connection could be made"),
        (aiosmtplib.SMTPAuthenticationError, "the server for mail does not take the user and password"),
        (aiosmtplib.SMTPException, "the server for mail did not take it"),
        ((ClientError, ConnectionError), "the connection broke, or the answer was no HTTP"),
    )
    chain = [error, *([error.__cause__] if error.__cause__ is not None else []), *([error.__context__] if error.__context__ else [])]
    if isinstance(error, ClientConnectorError):
        chain.append(error.os_error)
    for kind, text in known:
        if any(isinstance(part, kind) for part in chain):
            return text
    return "it could not be sent"


def smtp_refusal(error: aiosmtplib.SMTPException) -> tuple[int | None, bool]:
    """The code by which a server for mail says no, and whether it will say so again: that is what 5yz means (RFC 5321, section 4.2.1). That
    it does not take our password is no fault of the message."""
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        codes = [refused.code for refused in error.recipients]
        return (codes[0], all(code >= 500 for code in codes)) if codes else (None, False)
    code = error.code if isinstance(error, aiosmtplib.SMTPResponseException) else None
    of_message = (aiosmtplib.SMTPDataError, aiosmtplib.SMTPSenderRefused, aiosmtplib.SMTPRecipientRefused)
    return code, isinstance(error, of_message) and code is not None and code >= 500


async def connected(lookups: Lookups, host: str, port: int) -> socket.socket:
    """A connection to the first address of a host for mail that takes one. SMTPConnectError."""
    loop = asyncio.get_running_loop()
    try:
        found = await lookups.addresses(host, port, socket.AF_UNSPEC)
    except OSError as error:
        raise aiosmtplib.SMTPConnectError(str(error)) from error
    for family, kind, protocol, _, sockaddr in found:
        with ExitStack() as stack:
            link = stack.enter_context(socket.socket(family, kind, protocol))
            link.setblocking(False)
            with suppress(OSError):
                await loop.sock_connect(link, sockaddr)
                stack.pop_all()
                return link
    raise aiosmtplib.SMTPConnectError("no address of it takes a connection")


def literal_of(link: socket.socket) -> str:
    """By which a client without a name of its own tells who it is (RFC 5321, section 4.1.3); to look for a name could take long."""
    host = str(link.getsockname()[0]).partition("%")[0]
    return f"[IPv6:{host}]" if ":" in host else f"[{host}]"


class MessageSender:
    """Makes one try to deliver a message."""

    def __init__(self, settings: Settings, limits: Limits, session: ClientSession, lookups: Lookups) -> None:
        self._settings = settings
        self._limits = limits
        self._session = session
        self._lookups = lookups

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, limits: Limits) -> AsyncIterator[MessageSender]:
        """A client that keeps nothing between two requests: neither connections, nor names, nor cookies; and that no variable of the
        environment sends elsewhere."""
        named, lookups = networks(settings.webhook_networks), Lookups(limits.lookups)
        connector = TCPConnector(
            limit=0, force_close=True, use_dns_cache=False, resolver=GuardedResolver(named, lookups),
            socket_factory=functools.partial(guarded_socket, named),
        )  # fmt: skip
        async with ClientSession(
            connector=connector, cookie_jar=DummyCookieJar(), trust_env=False, auto_decompress=False,
            timeout=ClientTimeout(total=limits.delivery_seconds),
            headers={hdrs.USER_AGENT: f"iiot/{VERSION}", hdrs.ACCEPT_ENCODING: "identity"},
        ) as session:  # fmt: skip
            yield cls(settings, limits, session, lookups)

    async def send(self, receiver: Receiver, message_id: str, at: int, message: Message) -> Attempt:
        seconds = self._limits.delivery_seconds
        try:
            if receiver.form != "email":  # the client has the same limit, and what comes after the answer one of its own
                async with asyncio.timeout(seconds + self._limits.answer_seconds):
                    return await self._post(receiver, message_id, message)
            async with asyncio.timeout(seconds):
                return await self._mail(receiver, message_id, at, message)
        except aiosmtplib.SMTPException as error:
            code, final = smtp_refusal(error)
            return Attempt(told_failure(error, seconds), code, final)
        except (ClientError, OSError, ValueError) as error:  # ValueError: what is no address or header after all
            return Attempt(told_failure(error, seconds))
        except Exception as error:  # whatever it is, it is tried again as anything else, and not at once
            log.error("a delivery to receiver %d failed", receiver.webhook_id, exc_info=error)
            return Attempt(told_failure(error, seconds))

    async def _post(self, receiver: Receiver, message_id: str, message: Message) -> Attempt:
        target, body = target_of(receiver.url, receiver.form), message.body.encode()
        literal = address_of(target.raw_host or "")
        if literal is not None and not may_reach(literal, networks(self._settings.webhook_networks)):
            raise ForbiddenAddress("the address may not be reached")
        signed = signature_headers(receiver.secrets, message_id, now_ms() // 1000, body) if receiver.form == "webhook" else {}
        async with self._session.post(target, data=body, headers={**message.headers, **signed}, allow_redirects=False) as response:
            attempt = judged_answer(response.status, response.headers.get(hdrs.RETRY_AFTER), time.time())
            with suppress(ClientError, TimeoutError, asyncio.IncompleteReadError):  # it has answered
                async with asyncio.timeout(self._limits.answer_seconds):
                    await response.content.readexactly(self._limits.answer_bytes)
            response.close()
            return attempt

    async def _mail(self, receiver: Receiver, message_id: str, at: int, message: Message) -> Attempt:
        server, sender = urlsplit(self._settings.smtp_url), self._settings.smtp_from
        if not server.hostname or not sender:
            return Attempt("there is no server for mail (--smtp-url and --smtp-from)")
        recipients = addresses_of_mail(receiver.url, self._limits.mail_addresses)
        user, password = (None if text is None else unquote(text) for text in (server.username, server.password))
        address, is_tls = address_of(server.hostname), server.scheme == "smtps"
        is_near = server.hostname == "localhost" or (address is not None and address.is_loopback)
        usual = 465 if is_tls else 25 if user is None else 587
        # Within this machine there is nobody to hide from, and servers there have certificates that nobody vouches for. Elsewhere no
        # password goes in clear, and without one TLS is used where there is some.
        start_tls = False if is_tls or is_near else True if user is not None else None
        with await connected(self._lookups, server.hostname, server.port or usual) as link:
            refused, _ = await aiosmtplib.send(
                mail_of(message, recipients, sender, message_id, at), sender=sender, recipients=recipients, hostname=server.hostname,
                sock=link, local_hostname=literal_of(link), username=user, password=password, use_tls=is_tls, start_tls=start_tls,
                timeout=self._limits.delivery_seconds,
            )  # fmt: skip
        if refused:
            log.warning("the server for mail refused %d of %d addresses of receiver %d", len(refused), len(recipients), receiver.webhook_id)
        return Attempt(None, 250)


CLOCK_STEP_MS: Final = 1_000  # by less a clock is but put right


async def any_of(ring: asyncio.Future[None], wanted: asyncio.Event, seconds: float) -> None:
    """Return at the ring, when it is wanted, or after so many seconds."""
    waiting = asyncio.ensure_future(wanted.wait())
    try:
        await asyncio.wait((ring, waiting), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


class Courier:
    """Delivers notifications: to each receiver one after the other, to many at once. Those that failed last have places of their own, so
    that they keep nobody waiting."""

    def __init__(self, store: Store, sender: MessageSender, limits: Limits, counts: Counts) -> None:
        self._store = store
        self._sender = sender
        self._limits = limits
        self._counts = counts
        self._under_way: dict[int, asyncio.Task[None]] = {}  # by receiver
        self._failing: set[int] = set()  # receivers that did not take what they were sent last
        self.wanted = asyncio.Event()

    async def run(self) -> None:
        try:
            while True:
                self.wanted.clear()
                wait = await self._begin_due()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self.wanted.wait()
        finally:
            await self._end()

    async def _end(self) -> None:
        """What is under way may still be marked; for what is not, its receiver is asked again after the start."""
        tasks = list(self._under_way.values())
        if tasks:
            await asyncio.wait(tasks, timeout=self._limits.stop_close_seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin_due(self) -> float:
        """Begin deliveries that are due, as far as there is place; for how long there is nothing more to do."""
        limits = self._limits
        latest = now_ms() + round(max(limits.retry_after_seconds_most, limits.redelivery_seconds_most) * 1000)
        try:
            due, next_at = await self._store.read.notifications.to_deliver(
                self._left_out(), latest, limits.deliveries + limits.failing_deliveries
            )
        except (Refusal, sqlite3.Error) as error:
            log.warning("cannot look for notifications to deliver: %s", error)
            return limits.retry_seconds
        for waiting in due:
            if self._has_place(waiting):
                self._begin(waiting)
        most = limits.notice_seconds_most
        return most if next_at is None else max(0.01, min((next_at - now_ms()) / 1000, most))

    def _failing_under_way(self) -> int:
        return sum(webhook_id in self._failing for webhook_id in self._under_way)

    def _left_out(self) -> list[int]:
        """Receivers to which nothing is begun now; those that fail, where they have no place, stand before no other."""
        is_full = self._failing_under_way() >= self._limits.failing_deliveries
        return list({*self._under_way, *(self._failing if is_full else ())})

    def _has_place(self, waiting: Undelivered) -> bool:
        failing = self._failing_under_way()
        if waiting.tries or waiting.receiver.webhook_id in self._failing:
            self._failing.add(waiting.receiver.webhook_id)
            return failing < self._limits.failing_deliveries
        return len(self._under_way) - failing < self._limits.deliveries

    def _begin(self, waiting: Undelivered) -> None:
        webhook_id = waiting.receiver.webhook_id
        task = asyncio.create_task(self._deliver(waiting), name=f"delivery to receiver {webhook_id}")
        self._under_way[webhook_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            del self._under_way[webhook_id]
            self.wanted.set()
            if not task.cancelled() and task.exception() is not None:
                log.error("a delivery to receiver %d failed", webhook_id, exc_info=task.exception())

        task.add_done_callback(ended)

    async def _deliver(self, waiting: Undelivered) -> None:
        receiver = waiting.receiver
        attempt = await self._sender.send(receiver, waiting.message_id, waiting.at, Message(waiting.headers, waiting.body))
        if attempt.error is None:
            self._failing.discard(receiver.webhook_id)
        else:
            self._failing.add(receiver.webhook_id)
        await self._mark(waiting, attempt)

    async def _mark(self, waiting: Undelivered, attempt: Attempt) -> None:
        """Write down what came of it. Where nothing can be stored, its receiver is sent nothing until that can be."""
        tries = waiting.tries + 1
        next_at = now_ms() + round(seconds_to_wait(tries, attempt.retry_after, self._limits) * 1000)
        if is_given_up(attempt, tries, (next_at - waiting.at) / 1000, self._limits):
            next_at = 0
        mark = functools.partial(
            mark_notification, notification_id=waiting.notification_id, attempt=attempt, next_at=next_at or None
        )
        while True:
            try:
                await self._store.writer.change(mark)
                break
            except (Refusal, sqlite3.Error) as error:
                log.warning("cannot mark a notification to receiver %d: %s", waiting.receiver.webhook_id, error)
                await asyncio.sleep(self._limits.retry_seconds)
        if attempt.error is None:
            self._counts.notifications["delivered"] += 1
            return
        self._counts.failed_deliveries += 1
        if not next_at:
            self._counts.notifications["given_up"] += 1
            log.warning("a notification to receiver %d was given up: %s", waiting.receiver.webhook_id, attempt.error)


def to_be_told(group: DueGroup, content: Content, at: int) -> bool:
    """Whether a group is told now: there is something new, or all of it is to be told again. Alertmanager repeats by itself, and ends
    what it does not hear of; it is told so that it does not."""
    if content.fresh or content.resolved:
        return True
    if group.form == "alertmanager":
        return content.overdue > 0
    return content.open > 0 and group.told_at is not None and group.told_at + group.repeat <= at


def group_of(group: DueGroup, content: Content, at: int) -> AlertGroup:
    label = {"rule": "alertname", "device": "device"}.get(group.group_by) or group.group_by.removeprefix("label:")
    alerts = tuple(AlertShown(*row) for row in content.shown)
    firing, resolved = content.firing, content.resolved
    if group.form == "alertmanager":  # it is told all of them, part by part
        firing = sum(alert.resolved_at is None for alert in alerts)
        resolved = len(alerts) - firing
    return AlertGroup(group.webhook_id, label, group.key, at, group.repeat, firing, resolved, alerts)


class Dispatcher:
    """Finds out who is to be told of which alerts, and writes down what is sent to them together with what they know then. Whatever it
    needs to know stands in the database: it may begin anew at any time."""

    def __init__(self, store: Store, limits: Limits, external_url: str, courier: Courier) -> None:
        self._store = store
        self._limits = limits
        self._external_url = external_url
        self._courier = courier
        self._wanted = asyncio.Event()
        self._looked_at: int | None = None

    def look(self) -> None:
        """Receivers have changed."""
        self._wanted.set()

    async def run(self) -> None:
        while True:
            ring, wait = self._store.writer.alert_news.next, cast("float | None", None)
            self._wanted.clear()
            with self._going_on("tell of alerts"):
                await self._heed_clock()
                wait = await self._round()
            if wait is None:
                await asyncio.sleep(self._limits.retry_seconds)
            else:
                await any_of(ring, self._wanted, wait)

    async def _heed_clock(self) -> None:
        """At the start, and when the clock was set back."""
        now = now_ms()
        is_in_doubt = self._looked_at is None or now < self._looked_at - CLOCK_STEP_MS
        if is_in_doubt and await self._store.read.notifications.is_told_later():
            await self._store.writer.change(set_groups_back)
        self._looked_at = now

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """Whatever fails for one is told in the log, and keeps no other from being told: all is looked at anew before long."""
        try:
            yield
        except (Refusal, sqlite3.Error) as error:
            log.warning("cannot %s: %s", what, error)
        except Exception as error:  # a fault of ours in what one alert says must not keep all others from being told
            log.error("cannot %s", what, exc_info=error)

    async def _round(self) -> float:
        """One look at everything; in how many seconds something is due."""
        limits, reads, began = self._limits, self._store.read.notifications, time.monotonic()
        for watcher in await reads.watchers():
            with self._going_on(f"note what receiver {watcher.webhook_id} is to be told"):
                await self._note(watcher)
        while True:
            due, next_at = await reads.due_groups(limits.groups_together, limits.notifications_waiting)
            if due:
                await self._tell(due)
            is_all = len(due) < limits.groups_together
            if is_all or time.monotonic() > began + limits.notice_seconds_most:
                break
        await asyncio.sleep(limits.notice_pause_seconds)
        wait = limits.notice_seconds_most if next_at is None else (next_at - now_ms()) / 1000
        return max(0.0, min(wait, limits.notice_seconds_most)) if is_all else 0.0

    async def _note(self, watcher: Watcher) -> None:
        """Note what a receiver is to be told, some alerts at a time."""
        limits, after = self._limits, cast("int | None", 0)
        while after is not None:
            fresh = await self._store.read.notifications.fresh(
                watcher.tenant_id, watcher.webhook_id, after, limits.alerts_looked, limits.export_seconds
            )
            after = fresh.after
            if fresh.keys:
                note = functools.partial(note_alerts, webhook_id=watcher.webhook_id, fresh=fresh)
                await self._store.writer.change(note, self._store.allowances.shares.of(watcher.tenant_id))

    async def _tell(self, due: list[DueGroup]) -> None:
        tellings = []
        for group in due:
            later = now_ms() + round(max(group.interval / 1000, self._limits.retry_seconds) * 1000)
            telling = Telling(group, now_ms(), later, goes_on=True)  # where it fails
            with self._going_on(f"tell receiver {group.webhook_id} of {group.key!r}"):
                telling = await self._telling(group)
            tellings.append(telling)

        def write(connection: sqlite3.Connection) -> None:
            for telling in tellings:
                write_telling(connection, telling)

        await self._store.writer.change(write, weight=self._limits.removed_rows)
        if any(telling.message_id for telling in tellings):
            self._courier.wanted.set()

    async def _telling(self, group: DueGroup) -> Telling:
        limits, at = self._limits, now_ms()
        later = at + max(group.interval, round(limits.notice_pause_seconds * 1000))
        parts = group.form == "alertmanager"
        shown = limits.alerts_posted if parts else limits.alerts_shown
        while True:
            most = shown if parts else limits.alerts_together
            content = await self._store.read.notifications.content(group.tenant_id, group, shown, most, limits.export_seconds)
            if not to_be_told(group, content, at):
                return Telling(group, at, max(later, (group.told_at or 0) + group.repeat))
            message = message_of(group.form, group_of(group, content, at), limits.alert_lines, self._external_url)
            if shown == 1 or len(message.body.encode()) <= limits.notification_bytes:
                break
            shown //= 2
        is_part = parts and max(content.fresh + content.resolved, content.overdue) > most
        return Telling(
            group, at, at if is_part else at + group.repeat, tuple(content.firing_ids), tuple(content.over_ids), new_message_id(),
            message.headers, message.body, goes_on=is_part,
        )  # fmt: skip


# ==== Page ====
# Owns: the page for a browser as it is sent, and the policy under which the browser runs it. Must not know: HTTP, what the page does.


def source_hash(text: str) -> str:
    """A source that a policy allows by what it is (https://www.w3.org/TR/CSP3/#grammardef-hash-source)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page_policy(text: str) -> str:
    """Only the one script and the one style that stand in the page; no markup out of a text, nothing from elsewhere. ValueError, for
    a page that does not have one of each."""
    scripts = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    if len(scripts) != 1 or len(styles) != 1 or text.count("<script") != 1:
        raise ValueError("dashboard.html must have one script and one style")
    return (
        f"default-src 'none'; script-src {source_hash(scripts[0])}; style-src {source_hash(styles[0])}; img-src data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


@attrs.frozen
class Page:
    """dashboard.html: its bytes, its entity tag and its policy."""

    body: bytes
    tag: str
    policy: str

    @classmethod
    def read(cls) -> Page | None:
        """None where only the other files were copied to a machine, or the page cannot be one: the server works without it."""
        text = companion("dashboard.html")
        if text is None:
            log.warning("dashboard.html is not beside iiot.py: there is no page for a browser")
            return None
        try:
            policy = page_policy(text)
        except ValueError as error:
            log.error("there is no page for a browser: %s", error)
            return None
        body = text.encode()
        return cls(body, f'"{hashlib.sha256(body).hexdigest()[:16]}"', policy)


# ==== Sessions ====
# Owns: one device's WebSocket from hello to close. Must not know: other devices.

@attrs.frozen
class Services:
    """What a session and a request work with."""

    settings: Settings
    limits: Limits
    codec: Codec
    store: Store
    identity: Identity
    registry: Registry
    cleaner: Cleaner
    pusher: Pusher
    supervisor: Supervisor
    news: News
    trusted: Networks
    senders: LogSenders
    turned_away: TurnedAway
    peers: Peers
    counts: Counts
    lines: LineJudge
    dispatcher: Dispatcher
    sender: MessageSender
    page: Page | None


def metrics_of(frame: Telemetry) -> set[str]:
    return set().union(*(sample.values for sample in frame.samples))


def errors_text(frame: ConfigStatus, most: int) -> str | None:
    """The errors of a verdict as JSON text, None without any. Refusal: document_too_large, beyond `most` bytes."""
    text = orjson.dumps([attrs.asdict(error) for error in frame.errors])
    if len(text) > most:
        raise Refusal("document_too_large")
    return text.decode() if frame.errors else None


class Tally:
    """Counts what happens, minute by minute."""

    __slots__ = ("_count", "_since")

    def __init__(self) -> None:
        self._since = 0.0
        self._count = 0

    def add(self, now: float) -> int:
        """One more; how many there were in this minute."""
        if now - self._since > 60:
            self._since, self._count = now, 0
        self._count += 1
        return self._count


async def first_frame(link: Link, codec: Codec, limits: Limits) -> Frame:
    """The next frame of a device that is not known yet. Refusal: bad_handshake, frame_too_big, closed_by_device, invalid."""
    while (message := await link.read()) is not None:
        if message.type == WSMsgType.PING:
            link.send_frame(WSMsgType.PONG, message.data)
        elif message.type != WSMsgType.PONG:
            break
    if message is None:
        raise Refusal("closed_by_device")
    if message.type != WSMsgType.TEXT:
        raise Refusal("bad_handshake")
    if len(message.data) > limits.hello_bytes:
        raise Refusal("frame_too_big")
    try:
        return codec.frame(cast(bytes, message.data))
    except Refusal as refusal:
        if refusal.fault.code == "invalid":
            raise
        raise Refusal("bad_handshake") from refusal


async def handshake(services: Services, link: Link) -> tuple[DeviceToken, Hello]:
    """Who is there. Refusal: bad_handshake, unauthorized, too_many_attempts, device_exists, too_many_devices, or what is wrong
    with the frame."""
    next_frame = functools.partial(first_frame, link, services.codec, services.limits)
    frame = await next_frame()
    if isinstance(frame, Provision):
        link.send(encode(await services.identity.provision(frame, link.address)))
        frame = await next_frame()
    if not isinstance(frame, Hello):
        raise Refusal("bad_handshake")
    return await services.identity.device(frame.token, link.address), frame


class Stamps:
    """Times of receipt for samples that have no time: the server's clock, in milliseconds.

    A point's key is its metric and time, so metrics may share a millisecond, and two samples of one metric may not. A burst of
    one metric runs ahead of the clock until the clock has caught up. A stamp that is further ahead than a burst can lead was
    given while the clock was wrong; it does not count.
    """

    __slots__ = ("_floor", "_last", "_most_ahead", "newest")

    def __init__(self, newest: int, most_ahead: int, ahead: Mapping[str, int] | None = None) -> None:
        """`newest`: the newest stamp that the device was given before; `ahead`: by metric, the times of points that are ahead of the
        clock. Without it any metric may have had the newest stamp."""
        self.newest = newest
        self._most_ahead = most_ahead
        self._floor = newest if ahead is None else 0  # of metrics that are not in `_last`
        self._last: dict[str, int] = dict(ahead or {})  # of metrics that got a stamp since the clock last caught up

    def give(self, samples: tuple[Sample, ...], now: int) -> list[int]:
        """The time of each sample: its own, or a stamp. Refusal: invalid, when stamps would run too far ahead; then none is given."""
        moments: list[int | None] = [sample.ts for sample in samples]
        if None not in moments:
            return cast("list[int]", moments)
        if not now <= self.newest <= now + self._most_ahead:
            self.newest, self._floor, self._last = now - 1, now - 1, {}
        last, floor, given = self._last, self._floor, dict[str, int]()
        for index, sample in enumerate(samples):
            if moments[index] is None:
                before = max((given.get(metric) or last.get(metric, floor) for metric in sample.values), default=floor)
                moments[index] = moment = max(now, before + 1)
                if moment > now + self._most_ahead:
                    message = "is missing, and the metric has more samples than there are milliseconds"
                    raise Refusal("invalid", FieldError(f"samples[{index}].ts", message))
                given.update(dict.fromkeys(sample.values, moment))
        self._last = last | given
        self.newest = max(self.newest, *given.values(), now - 1)
        return cast("list[int]", moments)


TUNNEL_BYTES: Final = 64  # of a frame, within which it says that it is of a tunnel
THROTTLE_SECONDS: Final = 60.0  # between two looks whether a tenant may store again


class Owner(Committed, Protocol):
    """The session whose frames an intake takes."""

    link: Link
    tunnels: Tunnels

    def notice(self, kind: str, **detail: object) -> bool: ...

    def tell_change(self) -> None:
        """Fewer frames are held."""


class Throttle:
    """Holds back what a device sends while its tenant may store no more, or it itself: not stored, not acknowledged, not lost."""

    def __init__(
        self,
        use: TenantUse,
        logs: LogFlow,
        take: Callable[[bytes], Throttled | None],
        turn: Callable[[], Awaitable[None]],
        owner: Owner,
    ) -> None:
        """`take`: a frame, or why it cannot be taken now; `turn`: until one more may be. TimeoutError."""
        self._use, self._logs, self._take, self._turn, self._owner = use, logs, take, turn, owner
        self._told: Throttled | None = None
        self._frames: deque[bytes] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._going: asyncio.Task[None] | None = None
        self.size = 0

    def hold(self, data: bytes, used_up: Throttled | None = None) -> None:
        self._frames.append(data)
        self.size += len(data)
        if used_up is not None:
            self.wait(used_up)
        elif self._timer is None or not self._told_of_logs():  # another look at its first frame would read it again
            self.look()

    def look(self) -> None:
        """Let go of what may be stored by now. If nothing may, tell the device for how long, and look again then."""
        if rest := self._use.points.rest(now_ms()):
            self.wait(Throttled("points_per_day", rest))
            return
        self._stop_timer()
        if self._frames and self._going is None:
            self._going = asyncio.create_task(self._let_go())
        elif self._told_of_logs() and not self._frames:
            self._look_at_logs()

    def _told_of_logs(self) -> bool:
        return self._told is not None and self._told.limit != "points_per_day"

    def _look_at_logs(self) -> None:
        """A device that was told, and so sends no more lines, is told when it may."""
        if used_up := self._logs.used_up(now_ms()):
            self.wait(used_up)
        elif self._told is not None:
            self._tell(attrs.evolve(self._told, retry_after=0.0))
            self._told = None

    def wait(self, used_up: Throttled) -> None:
        """Tell the device. The clock may be set meanwhile: so look, and tell, again before long."""
        if self._timer is None and not self._owner.link.ended:
            self._timer = asyncio.get_running_loop().call_later(min(used_up.retry_after, THROTTLE_SECONDS), self._look_again)
            self._tell(used_up)

    def _tell(self, used_up: Throttled) -> None:
        self._told = used_up
        self._owner.link.send(encode(used_up))

    async def _let_go(self) -> None:
        """Of one frame after the other, in turn with all that the tenant's other devices hold: the day is new for them all at one time."""
        used_up = None
        try:
            while used_up is None and self._frames and not self._use.points.rest(now_ms()):
                await self._turn()
                used_up = self._take(self._frames[0])
                if used_up is None:
                    self.size -= len(self._frames.popleft())
                    self._owner.tell_change()
        except TimeoutError:
            self._owner.link.end("storage_unavailable")
        finally:
            self._going = None
        if used_up is None:
            self.look()
        else:
            self.wait(used_up)

    def _look_again(self) -> None:
        self._timer = None
        self.look()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        self._stop_timer()
        if self._going is not None:
            self._going.cancel()


class Intake:
    """What a device sends in one session, on its way to the writer: every frame number once, and not more than its tenant may
    store."""

    __slots__ = (
        "_bad_frames", "_codec", "_counts", "_device_id", "_duplicates", "_durable", "_frames", "_frames_stored", "_limits", "_logs",
        "_owner", "_progress_key", "_series", "_session", "_stamps", "_taken", "_throttle", "_use", "_writer", "share",
    )  # fmt: skip

    def __init__(self, services: Services, owner: Owner, device_id: int, use: TenantUse, opened: SessionRow) -> None:
        self._limits = services.limits
        self._codec = services.codec
        self._counts = services.counts
        self._writer = services.store.writer
        self._owner = owner
        self._device_id = device_id
        self._progress_key = str(device_id)
        self._use = use
        self._logs = LogFlow(use.log_bytes, services.store.allowances.log_bytes, self._progress_key)
        self.share = services.store.allowances.shares.of(use.tenant_id)
        self._session = opened.session
        self._series = opened.series
        self._stamps = Stamps(opened.stamp, round(services.limits.stamp_ahead_seconds * 1000), opened.ahead)
        self._taken = opened.seq  # the highest frame number handed to the writer, or refused
        self._durable = opened.seq  # the highest frame number on disk
        self._frames = 0  # handed to the writer
        self._frames_stored = 0
        self._bad_frames = Tally()
        self._duplicates = 0  # since the last new frame
        self._throttle: Throttle | None = None  # made when it is needed

    @property
    def waiting(self) -> int:
        """Frames that are not on disk yet."""
        return self._frames - self._frames_stored

    @property
    def held(self) -> int:
        """Bytes of frames that wait until more may be stored."""
        return self._throttle.size if self._throttle is not None else 0

    def take(self, data: bytes) -> None:
        """One text frame: for the writer, or behind those that are held back."""
        points = self._use.points
        if points.used >= points.most or (self._throttle is not None and self._throttle.size):
            if self._is_of_tunnel(data):  # whoever looks for what is wrong is not held back
                self._take(data)
            else:
                self._throttled().hold(data)
        elif used_up := self._take(data):
            self._throttled().hold(data, used_up)

    def _is_of_tunnel(self, data: bytes) -> bool:
        if b'"tunnel"' not in data[:TUNNEL_BYTES]:
            return False
        with suppress(Refusal):
            return isinstance(self._codec.frame(data), TunnelNews)
        return False

    def stored(self, mark: tuple[int, int]) -> None:
        """The writer has every frame up to `mark` on disk."""
        self._durable, self._frames_stored = mark

    def look_again(self) -> None:
        """The session begins, or the tenant's quota has changed."""
        if self._throttle is not None or self._use.points.used_up:
            self._throttled().look()

    def stop(self) -> None:
        """Nothing is taken any more."""
        if self._throttle is not None:
            self._throttle.stop()

    async def _turn(self) -> None:
        await self.share.turn(self._writer.patience())

    def forget_owner(self) -> None:
        self._throttle = None
        del self._owner

    def _throttled(self) -> Throttle:
        if self._throttle is None:
            self._throttle = Throttle(self._use, self._logs, self._take, self._turn, self._owner)
        return self._throttle

    def _take(self, data: bytes) -> Throttled | None:
        """A frame, or why it is not taken now."""
        try:
            frame = self._codec.frame(data)
            if not self._is_known(frame):
                if isinstance(frame, Log) and (used_up := self._logs.wholly_used_up(now_ms())):
                    return used_up
                self._take_frame(frame, len(data))
        except Refusal as refusal:
            self._bad_frame(refusal, data)
        self._counts.frame_bytes += len(data)
        return None

    async def take_in_pieces(self, data: bytes, pause: Callable[[], Awaitable[None]]) -> None:
        """A long text frame: as `take`, with a pause after each piece of the work."""
        if self._use.points.used_up or self.held:
            self.take(data)
            return
        try:
            for frame in self._codec.in_pieces(data):
                if frame is None:
                    await pause()
                elif not self._is_known(frame) and not self._owner.link.ended:
                    if isinstance(frame, Log) and (used_up := self._logs.wholly_used_up(now_ms())):
                        self._throttled().hold(data, used_up)
                    elif isinstance(frame, Telemetry):
                        await self._take_long_telemetry(frame, self._codec.piece(frame.samples, data), pause)
                    else:
                        self._take_frame(frame, len(data))
        except Refusal as refusal:
            self._bad_frame(refusal, data)
        self._counts.frame_bytes += len(data)

    def _is_known(self, frame: Frame) -> bool:
        """Whether it was taken before; then it is acknowledged again. What is said of a tunnel has no number, and is done with here.
        Refusal: unknown_type, invalid, not_binary."""
        if isinstance(frame, (Hello, Provision)):
            raise Refusal("unknown_type")
        if isinstance(frame, TunnelNews):
            self._owner.tunnels.told(frame)
            return True
        if frame.seq <= self._taken:
            self._acknowledge_again(frame.seq)
            return True
        if frame.seq - self._taken > self._limits.seq_leap:
            raise Refusal("invalid", FieldError("seq", f"is more than {self._limits.seq_leap} above {self._taken}"))
        return False

    def _take_frame(self, frame: Frame, size: int) -> None:
        if isinstance(frame, Telemetry):
            self._take_telemetry(frame, size)
        elif isinstance(frame, State):
            self._take_state(frame, size)
        elif isinstance(frame, ConfigStatus):
            self._take_verdict(frame, size)
        elif isinstance(frame, Log):
            self._take_log(frame, size)
        elif isinstance(frame, (Started, Output, Result)):
            self._take_of_command(frame, size)

    def _take_telemetry(self, frame: Telemetry, size: int) -> None:
        """Hand the points to the writer. Refusal: too_many_series, invalid; then none of the frame is taken."""
        now = now_ms()
        moments = self._moments(frame, now)
        count = self._add_points(frame.samples, moments, self._writer.points())
        self._points_taken(frame.seq, now, count, max(count, size // self._limits.point_bytes))

    async def _take_long_telemetry(self, frame: Telemetry, size: int, pause: Callable[[], Awaitable[None]]) -> None:
        """Hand the points over so many samples at a time; a transaction of many would keep others waiting. What has its own times may be
        stored before the frame is: if that is sent again, the points are the same. Refusal: too_many_series, invalid; then none of
        the frame is taken."""
        now = now_ms()
        moments, count, kept = self._moments(frame, now), 0, 0
        rows: dict[str, dict[str, Value]] = {}
        timed = all(sample.ts is not None for sample in frame.samples)
        for start in range(0, len(frame.samples), size):
            added = self._add_points(frame.samples[start : start + size], moments[start : start + size], rows)
            count, kept = count + added, kept + added
            if timed and start + size < len(frame.samples):
                self._hand_over(rows)
                self._writer.weigh(self.share, kept)
                rows, kept = {}, 0
            await pause()
            if self._owner.link.ended:
                return
        self._hand_over(rows)
        self._points_taken(frame.seq, now, count, kept)

    def _moments(self, frame: Telemetry, now: int) -> list[int]:
        """The time of each sample. Refusal: too_many_series, invalid."""
        series, most = self._series, self._limits.series_per_device
        if len(series) + sum(len(sample.values) for sample in frame.samples) > most < len(metrics_of(frame).union(series)):
            raise Refusal("too_many_series")
        return self._stamps.give(frame.samples, now)

    def _add_points(self, samples: tuple[Sample, ...], moments: list[int], rows: dict[str, dict[str, Value]]) -> int:
        """How many there were."""
        series, count = self._series, 0
        for sample, moment in zip(samples, moments, strict=True):
            ts = str(moment)
            for metric, value in sample.values.items():
                number = series.get(metric)
                if number is None:
                    number = series[metric] = self._writer.add_series(self._device_id, metric)
                points = rows.get(number)
                if points is None:
                    rows[number] = {ts: value}
                else:
                    points[ts] = value
            count += len(sample.values)
        return count

    def _hand_over(self, rows: dict[str, dict[str, Value]]) -> None:
        pending = self._writer.points()
        for number, points in rows.items():
            pending[number] = {**pending[number], **points} if number in pending else points

    def _points_taken(self, seq: Seq, now: int, count: int, weight: int) -> None:
        """`count` points of the quota."""
        points = self._use.points
        points.add(now, count)
        self._writer.points_taken(self._use.tenant_id, count)
        self._frame_taken(seq, now, weight)
        if points.used >= points.most:
            self._throttled().look()

    def _take_state(self, frame: State, size: int) -> None:
        now = now_ms()
        report = StateReport(self._owner, self._device_id, self._session, frame.seq, now, frame.mode, frame.reported)
        self._writer.state_reported(report)
        weight = max(size * self._limits.state_weight, self._limits.document_bytes)
        self._frame_taken(frame.seq, now, weight // self._limits.point_bytes)

    def _take_verdict(self, frame: ConfigStatus, size: int) -> None:
        now = now_ms()
        errors = errors_text(frame, self._limits.document_bytes)
        report = VerdictReport(self._owner, self._device_id, frame.seq, now, frame.version, frame.status, frame.message, errors)
        self._writer.verdict_reported(report)
        self._frame_taken(frame.seq, now, max(self._limits.verdict_points, size // self._limits.point_bytes))

    def _take_log(self, frame: Log, size: int) -> None:
        now = now_ms()
        self._writer.logged(
            LogLine(
                self._use.tenant_id, self._device_id, now if entry.ts is None else entry.ts, now, LEVELS[entry.level], entry.message,
                entry.logger, None, None if entry.fields is None else canonical(entry.fields).decode(),
            )
            for entry in frame.entries
        )  # fmt: skip
        self._logs.add(now, size)
        self._writer.log_bytes_taken(self._use.tenant_id, size)
        weight = (len(frame.entries) + size // self._limits.point_bytes) * self._limits.log_weight
        self._frame_taken(frame.seq, now, weight)
        if used_up := self._logs.used_up(now):
            self._throttled().wait(used_up)

    def _take_of_command(self, frame: OfCommand, size: int) -> None:
        """Refusal: invalid."""
        now = now_ms()
        report = CommandReport(self._owner, self._device_id, frame.seq, now, frame.command)
        if isinstance(frame, Output):
            report = attrs.evolve(report, stream=frame.stream, data=output_bytes(frame))
        elif isinstance(frame, Result):
            report = attrs.evolve(
                report, status=frame.status, exit_code=frame.exit_code, message=frame.message, output_bytes=frame.output_bytes or 0
            )
        self._writer.command_reported(report)
        self._frame_taken(frame.seq, now, max(self._limits.verdict_points, size // self._limits.point_bytes))

    def _frame_taken(self, seq: int, now: int, weight: int) -> None:
        self._taken = seq
        self._duplicates = 0
        self._frames += 1
        self._writer.frame_taken(self._owner, self._progress_key, (seq, self._frames), now, self._stamps.newest, self.share, weight)

    def _acknowledge_again(self, seq: int) -> None:
        """A duplicate: on disk already, or about to be and acknowledged then. If duplicates keep coming, the device has lost its
        counter, and the operator must see it."""
        self._duplicates += 1
        if self._duplicates >= self._limits.duplicates:
            self._owner.notice("duplicates", seq=seq, highest=self._taken)
        if seq <= self._durable:
            self._owner.link.send(encode_ack(self._durable))

    def _bad_frame(self, refusal: Refusal, data: bytes) -> None:
        """Say what is wrong with a frame; it is consumed, so that the device does not send it for ever."""
        seq, own = self._codec.seq_of(data)
        self.refuse(refusal, seq)
        if seq is not None and own and 0 < seq - self._taken <= self._limits.seq_leap:
            self._frame_taken(seq, now_ms(), 1)

    def refuse(self, refusal: Refusal, seq: int | None) -> None:
        self._counts.refusals[refusal.fault.code] += 1
        self._owner.link.send(encode_refusal(refusal, seq))
        if self._bad_frames.add(asyncio.get_running_loop().time()) >= self._limits.bad_frames_per_minute:
            self._owner.link.end("too_many_bad_frames")


def enter_notice(services: Services, device_id: int, kind: str, **detail: object) -> bool:
    """Enter something in a device's timeline, unless that was done within the last hour; whether it was entered now."""
    news = services.registry.is_news(device_id, kind)
    if news:
        services.store.writer.happened(device_id, kind, **detail)
    return news


class Session:
    """A device that was welcomed: from now on it can be reached, and what it sends is stored."""

    __slots__ = ("_changed", "_config_sent", "_device_id", "_intake", "_number", "_services", "link", "tunnels")

    def __init__(self, services: Services, link: Link, token: DeviceToken, use: TenantUse, opened: SessionRow) -> None:
        self._services = services
        self.link = link
        self._device_id = token.device_id
        self._number = opened.session
        self._intake = Intake(services, self, token.device_id, use, opened)
        self.tunnels = Tunnels(link, services.limits)
        self._config_sent = 0  # the highest version that went out in this session
        self._changed: asyncio.Future[None] | None = None  # made when it is waited for

    def begin(self, welcome: Welcome) -> None:
        """Nothing reaches the device before its welcome, and everything after it."""
        self.link.phase = self
        self.link.send(encode(welcome))
        self._services.registry.welcome(self._device_id, self)
        self._services.counts.sessions += 1
        if welcome.config is not None:
            self._config_sent = welcome.config.version
            self._services.store.writer.config_sent(self._device_id, welcome.config.version)
        self._intake.look_again()

    async def converse(self) -> None:
        """Take frames until the connection is over."""
        link, intake, limits, clock = self.link, self._intake, self._services.limits, asyncio.get_running_loop().time
        at_hand, began = False, 0.0
        while (message := await link.read()) is not None:
            if (intake.share.full if at_hand else intake.share.crowded) and message.type == WSMsgType.TEXT:  # by others before it
                await self._wait_for_turn()
                at_hand = False
            if not at_hand:
                began = clock()
            if self._services.registry.is_held(self._device_id):
                await self._wait_while(lambda: self._services.registry.is_held(self._device_id))
            if link.ended:
                continue
            if len(message.data) > limits.piece_bytes and message.type == WSMsgType.TEXT:
                await self._take_in_pieces(cast(bytes, message.data))
            else:
                self._take(message)
            at_hand = link.has_more
            if intake.waiting >= limits.unacknowledged_frames:
                await self._wait_for_acks()
            elif intake.held > limits.held_bytes:
                await self._wait_while(lambda: intake.held > limits.held_bytes)
            elif at_hand and clock() - began > limits.turn_seconds:
                await self._wait_for_turn()
                began = clock()

    def _take(self, message: WSMessage) -> None:
        if message.type == WSMsgType.TEXT:
            self._intake.take(cast(bytes, message.data))
        elif message.type == WSMsgType.PING:
            self.link.send_frame(WSMsgType.PONG, message.data)
        elif message.type == WSMsgType.BINARY:
            try:
                self.tunnels.came(cast(bytes, message.data))
            except Refusal as refusal:
                self._intake.refuse(refusal, None)

    async def _take_in_pieces(self, data: bytes) -> None:
        """Of the long frames of a tenant one after the other."""
        long_work = self._intake.share.long_work
        begun = asyncio.ensure_future(long_work.acquire())
        await self._wait(wait_patiently(begun, self._services.store.writer.patience()))
        if begun.done() and not begun.cancelled():
            try:
                if not self.link.ended:
                    await self._intake.take_in_pieces(data, self._wait_for_turn)
            finally:
                long_work.release()

    async def _wait_for_turn(self) -> None:
        """Read no more until it is the device's turn, and the writer takes more: the device's own sends come to a stand, and nothing
        is dropped."""
        await self._wait(self._intake.share.turn(self._services.store.writer.patience()))

    async def _wait_for_acks(self) -> None:
        """Read no more until some of what was taken is on disk."""

        async def wait() -> None:
            patience = self._services.store.writer.patience()
            while self._intake.waiting >= self._services.limits.unacknowledged_frames and not self.link.ended:
                await wait_patiently(self._next_change(), patience)

        await self._wait(wait())

    async def _wait(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait for something that has a limit; beyond it the storage does not keep up."""
        self.link.reading = False
        try:
            await waiting
        except TimeoutError:
            self.link.end("storage_unavailable")
        finally:
            self._read_again()

    async def _wait_while(self, held: Callable[[], bool]) -> None:
        """Read no more from the device for as long as it is held: by its tenant's quota, although it was told, or by a removal of
        readings. Pings go on: a device that was unplugged does not confirm their bytes, and the system gives its connection up."""
        self.link.reading = False
        while held() and not self.link.ended:
            if self.link.is_closing:
                self.link.sign_off("connection_lost")
            try:
                await wait_patiently(self._next_change(), for_seconds(self._services.settings.heartbeat / 4))
            except TimeoutError:
                self.link.ping()
        self._read_again()

    def _read_again(self) -> None:
        self.link.reading = True
        self.link.heard = asyncio.get_running_loop().time()

    def _next_change(self) -> asyncio.Future[None]:
        """Done when frames were stored, a quota was changed, a hold is over, or the connection is."""
        self._changed = asyncio.get_running_loop().create_future()
        return self._changed

    def tell_change(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def committed(self, mark: tuple[int, int]) -> None:
        """The writer has every frame up to `mark` on disk."""
        self._intake.stored(mark)
        self.tell_change()
        self.link.send(encode_ack(mark[0]))

    def not_stored(self) -> None:
        self.link.end("storage_unavailable")

    def refused(self, code: str, seq: int) -> None:
        """The writer could not take a frame; it is consumed."""
        if not self.link.ended:
            self._intake.refuse(Refusal(code), seq)

    def notice(self, kind: str, **detail: object) -> bool:
        return enter_notice(self._services, self._device_id, kind, **detail)

    def send_config(self, version: int, document: bytes) -> bool:
        """Send a configuration, unless it went out, or a newer one did; whether it is the last that went out."""
        if self.link.ended or version <= self._config_sent:
            return version == self._config_sent and not self.link.ended
        self._config_sent = version
        self.link.send(b'{"type":"config","version":%d,"document":%b}' % (version, document))
        self._services.store.writer.config_sent(self._device_id, version)
        return True

    def forget(self) -> None:
        """The conversation is over. A session and its intake know each other: a circle is garbage for long."""
        self._intake.forget_owner()

    def wake(self) -> None:
        """Its tenant's quota has changed, or a hold is over."""
        if not self.link.ended:
            self._intake.look_again()
            self.tell_change()

    def ended(self, code: str) -> None:
        self.tell_change()
        self._intake.stop()
        self.tunnels.end_all(f"the device's session ended: {FAULTS[code].message}")
        self._services.counts.session_ends[code] += 1
        self._services.registry.leave(self._device_id, self.link)
        self._services.store.writer.session_ended(Parting(self._device_id, self._number, now_ms(), code, self.link.address))


class Opening:
    """A device that is known and not welcomed yet: a newer session of the device supersedes it, and nothing else reaches it."""

    def __init__(self, services: Services, link: Link, token: DeviceToken) -> None:
        self._services = services
        self._link = link
        self._token = token
        self._use = services.registry.use_of(token, default_quotas(services.settings))

    def ended(self, _: str) -> None:
        self._services.registry.leave(self._token.device_id, self._link)

    async def open(self, hello: Hello) -> Session | None:
        """Take the device over, and welcome it once all that its earlier session queued is on disk; None when the connection ended
        meanwhile. Refusal: too_many_connected, session_conflict, too_many_sessions."""
        link, token, writer = self._link, self._token, self._services.store.writer
        if link.ended:
            return None
        await self._take_over()
        agent = hello.agent and hello.agent[: self._services.limits.shown_characters]
        share = self._services.store.allowances.shares.of(token.tenant_id)
        try:
            await share.turn(writer.patience())
        except TimeoutError:
            raise Refusal("storage_unavailable") from None
        opened = await writer.change(
            lambda connection: open_session(connection, token.device_id, token.token_id, link.address, agent), share
        )
        if link.ended:  # superseded, say
            writer.session_ended(Parting(token.device_id, opened.session, now_ms(), link.ended, link.address))
            return None
        heartbeat = self._services.settings.heartbeat
        session = Session(self._services, link, token, self._use, opened)
        session.begin(
            Welcome(token.device, token.tenant, opened.session, opened.seq, format_time(now_ms()), heartbeat, opened.config)
        )
        writer.turns.welcomed(token.device_id, has_commands=opened.has_commands)
        return session

    async def _take_over(self) -> None:
        """A client without patience, which is refused, is kept for a moment."""
        registry, device_id = self._services.registry, self._token.device_id
        try:
            registry.take_over(device_id, self._link, self._use)
            self._link.phase = self
        except Refusal as refusal:
            if refusal.fault.code == "session_conflict":
                here, other = self._link.address, registry.address_of(device_id)
                if enter_notice(self._services, device_id, "conflict", address=here, session_address=other):
                    log.warning("%s: clients at %s and %s use one token", self._token.device, here, other)
            if refusal.retry_after is not None:
                await asyncio.sleep(self._services.limits.conflict_seconds)
            raise


async def open_link(services: Services, link: Link) -> Session | None:
    """A connection's first frames, up to the welcome; None when it has ended before. Refusal."""
    if len(services.registry.links) > services.limits.connections:
        raise Refusal("too_many_connections")
    async with asyncio.timeout(services.limits.hello_seconds):
        token, hello = await handshake(services, link)
    link.peer.recognized()
    return await Opening(services, link, token).open(hello)


async def serve_link(services: Services, link: Link) -> None:
    """A device's connection, from its first frame to its last."""
    session = None
    try:
        session = await open_link(services, link)
        if session is not None:
            await session.converse()
    except TimeoutError:
        services.counts.refusals["handshake_timeout"] += 1
        link.end("handshake_timeout")
    except Refusal as refusal:
        services.counts.refusals[refusal.fault.code] += 1
        if refusal.fault.close != FAULTS["closed_by_device"].close:
            link.send(encode_refusal(refusal, None))
        link.end(refusal.fault.code)
    except Exception:  # a defect must not take the server with it
        log.exception("session of %s failed", link.address)
        link.end("server_fault")
    finally:
        await link.close()
        if session is not None:
            session.forget()


# ==== Syslog ====
# Owns: the listeners for syslog, and the way of a line from there to the writer. Must not know: HTTP.


class WaitingDatagrams:
    """Datagrams in their order, of the addresses that they come from in turn: one that sends without end takes nobody else's place."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._by_address: dict[str, deque[bytes]] = {}
        self._came = asyncio.Event()

    @property
    def count(self) -> int:
        return self._count

    def put(self, data: bytes, address: str) -> bool:
        """Whether there was room."""
        waiting = self._by_address.get(address)
        if self._count >= self._most or (waiting is not None and len(waiting) >= self._most // 4):
            return False
        if waiting is None:
            waiting = self._by_address[address] = deque()
        waiting.append(data)
        self._count += 1
        self._came.set()
        return True

    async def get(self) -> tuple[bytes, str]:
        while not self._count:
            self._came.clear()
            await self._came.wait()
        address = next(iter(self._by_address))
        waiting = self._by_address.pop(address)
        data = waiting.popleft()
        if waiting:
            self._by_address[address] = waiting
        self._count -= 1
        return data, address


class Datagrams(asyncio.DatagramProtocol):
    """Messages that came by UDP, one in each datagram (RFC 5426), and wait for their turn. UDP tells its sender nothing: what does not
    fit is counted."""

    def __init__(self, waiting: WaitingDatagrams, turned_away: TurnedAway) -> None:
        self._waiting = waiting
        self._turned_away = turned_away

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        if not self._waiting.put(data, addr[0]):
            self._turned_away.add(addr[0], "too_fast")


def line_of(message: SyslogMessage, frame: SyslogFrame, sender: DeviceToken, received_at: int) -> LogLine:
    """A message as a line; what has no place of its own there is among its fields."""
    more = {
        "facility": message.facility, "severity": message.severity, "process_id": message.process_id, "message_id": message.message_id,
        "structured_data": message.structured_data or None, "time_as_sent": message.time_as_sent,
        "cut": frame.cut or None, "torn": frame.torn or None,
    }  # fmt: skip
    fields = canonical({name: value for name, value in more.items() if value is not None}).decode()
    at = received_at if message.time is None else message.time
    return LogLine(
        sender.tenant_id, sender.device_id, at, received_at, LEVELS[message.level], message.message, message.app_name, message.host,
        None if fields == "{}" else fields, message.repeat_id,
    )  # fmt: skip


class RelpStream:
    """The answers of a connection of RELP: a message is answered when it is on disk."""

    def __init__(self, writer: asyncio.StreamWriter, most: int) -> None:
        self._writer = writer
        self._most = most
        self._waiting: deque[bytes] = deque()
        self._handed_over = 0
        self._all_answered = asyncio.Event()

    async def until_answered(self) -> None:
        """Until all that was handed over is on disk. TimeoutError is for the caller to raise."""
        if self._waiting:
            self._all_answered.clear()
            await self._all_answered.wait()

    def hand_over(self, number: bytes) -> tuple[int, int]:
        """A message goes to the writer; the mark by which its commit is told."""
        self._waiting.append(number)
        self._handed_over += 1
        return self._handed_over, self._handed_over

    def committed(self, mark: tuple[int, int]) -> None:
        answered = len(self._waiting) - (self._handed_over - mark[1])
        self._send(b"".join([b"%b rsp 6 200 OK\n" % self._waiting.popleft() for _ in range(answered)]))
        if not self._waiting:
            self._all_answered.set()

    def refused(self, code: str, seq: int) -> None:
        """Nothing of it is refused there."""

    def not_stored(self) -> None:
        """No answer: the sender comes back, and tells all again that was not answered."""
        self._writer.transport.abort()
        self._all_answered.set()

    def answer(self, number: bytes, text: bytes) -> None:
        self._send(b"%b rsp %d %b\n" % (number, len(text), text) if text else b"%b rsp 0\n" % number)

    def say_goodbye(self, number: bytes) -> None:
        self.answer(number, b"")
        self._send(b"0 serverclose 0\n")

    def _send(self, data: bytes) -> None:
        """Or drop the peer that does not read."""
        if self._writer.transport.is_closing():
            return
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > self._most:
            self._writer.transport.abort()


@attrs.define(eq=False)
class SyslogStream:
    """Where a stream comes from, and whose its lines are: of the tenant of the first of them, None before it."""

    address: str
    peer: Peer
    tenant_id: int | None = None


RELP_OFFER: Final = b"200 OK\nrelp_version=0\nrelp_software=iiot,%b\ncommands=syslog" % VERSION.encode()


class SyslogListener:
    """Takes syslog over TCP, TLS (RFC 5425), UDP and RELP. A stream is read no faster than its lines can be stored; but for RELP
    there is no answer in this protocol, so what was under way at a stop or a crash is lost."""

    def __init__(self, services: Services, peers: Peers) -> None:
        self._services = services
        self._limits = services.limits
        self._peers = peers
        self._waiting = waiting = WaitingDatagrams(services.limits.syslog_datagrams)
        services.counts.datagrams_waiting = lambda: waiting.count
        self._doors: list[Door] = []
        self._endpoints: list[asyncio.DatagramTransport] = []
        self._streams: set[asyncio.Task[None]] = set()
        self._known: Counter[int] = Counter()  # streams whose lines are somebody's, by tenant

    async def listen(self, sockets: list[socket.socket]) -> None:
        """On sockets that listen, and on the same addresses for datagrams."""
        turned_away = self._services.turned_away
        for listener in sockets:
            endpoint, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: Datagrams(self._waiting, turned_away), local_addr=listener.getsockname()[:2]
            )
            self._endpoints.append(endpoint)
            there: socket.socket = endpoint.get_extra_info("socket")
            there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._limits.syslog_buffer)  # as far as the system allows it
            turned_away.watch(there)
        await self.listen_for_streams(sockets)

    async def listen_for_streams(
        self, sockets: list[socket.socket], *, context: ssl.SSLContext | None = None, relp: bool = False
    ) -> None:
        def make(peer: Peer) -> asyncio.BaseProtocol:
            return asyncio.StreamReaderProtocol(asyncio.StreamReader(), functools.partial(self._begin, peer=peer, relp=relp))

        door = Door(make, context, self._peers, self._limits)
        self._doors.append(door)
        for listener in sockets:
            self._services.supervisor.watch(door.open(listener))

    async def close(self) -> None:
        for door in self._doors:
            await door.close()
        for endpoint in self._endpoints:
            endpoint.close()
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def take_datagrams(self) -> None:
        """Take what came by UDP, in its order."""
        while True:
            data, address = await self._waiting.get()
            try:
                await self._take(cut_frame(data, self._limits.syslog_bytes), address, None)
            except (Refusal, sqlite3.Error) as error:  # whose it is cannot be looked up
                self._services.turned_away.add(address, error.fault.code if isinstance(error, Refusal) else "storage_unavailable")

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, peer: Peer, relp: bool) -> None:
        """Somebody has connected. Who has sent no line of a device makes room where that is short, and may be silent for long: a machine
        in good health has nothing to say."""
        peer.asked()
        address = str((writer.get_extra_info("peername") or ("unknown",))[0])
        stream = SyslogStream(address, peer)
        taking = self._take_relp(reader, writer, stream) if relp else self._take_stream(reader, stream)
        task = asyncio.create_task(self._serve(taking, writer, stream), name="syslog stream")
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)

    async def _serve(self, taking: Coroutine[Any, Any, None], writer: asyncio.StreamWriter, stream: SyslogStream) -> None:
        address = stream.address
        try:
            await taking
        except Invalid as error:
            self._services.turned_away.add(address, "not_relp")
            log.debug("what %s sends %s", address, error)
        except (OSError, TimeoutError) as error:  # it broke off; or nothing can be stored, and its sender keeps what it has not sent
            log.debug("a stream of syslog from %s ended: %s", address, type(error).__name__)
        except (Refusal, sqlite3.Error) as error:
            log.warning("a stream of syslog from %s was closed: %s", address, error)
        finally:
            writer.transport.abort()
            if stream.tenant_id is not None:
                self._known[stream.tenant_id] -= 1

    async def _take_stream(self, reader: asyncio.StreamReader, stream: SyslogStream) -> None:
        framing = SyslogFraming(self._limits.syslog_bytes)
        while data := await reader.read(READ_BYTES):
            for frame in framing.feed(data):
                await self._take(frame, stream.address, stream)
        for frame in framing.end():
            await self._take(frame, stream.address, stream)

    async def _take_relp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: SyslogStream) -> None:
        """A message of nobody ends the connection: an answer that it is refused would be the end of the message. Its sender keeps it, and
        comes back with it. Invalid."""
        framing, answers = RelpFraming(self._limits.syslog_bytes), RelpStream(writer, self._limits.outbox_bytes)
        while data := await reader.read(READ_BYTES):
            for frame in framing.feed(data):
                if frame.command == b"syslog":
                    if not await self._take(SyslogFrame(frame.data, frame.cut), stream.address, stream):
                        async with asyncio.timeout(self._limits.storage_seconds):
                            await answers.until_answered()
                        return
                    self._services.store.writer.await_commit(answers, answers.hand_over(frame.number))
                elif frame.command == b"close":
                    answers.say_goodbye(frame.number)
                    await writer.drain()
                    return
                else:
                    answers.answer(frame.number, RELP_OFFER if frame.command == b"open" else b"500 unknown command")

    def _recognize(self, stream: SyslogStream, tenant_id: int) -> bool:
        """A line of the stream is a tenant's; whether it may have one more of them."""
        if stream.tenant_id is None:
            if self._known[tenant_id] >= self._limits.syslog_connections:
                return False
            self._known[tenant_id] += 1
            stream.tenant_id = tenant_id
            stream.peer.recognized()
        return True

    async def _take(self, frame: SyslogFrame, address: str, stream: SyslogStream | None) -> bool:
        """A message on its way to the writer; whether it is. What comes by no stream, and cannot be taken now, is lost. Refusal:
        storage_unavailable, too_many_connections. TimeoutError, when the storage does not keep up."""
        services, now = self._services, now_ms()
        message = parse_syslog(frame.data, now)
        try:
            sender = await services.senders.find(message.token, address)
        except Refusal as refusal:
            if refusal.fault.code not in ("unauthorized", "too_many_attempts"):
                raise
            services.turned_away.add(address, refusal.fault.code)
            return False
        if sender is None:
            services.turned_away.add(address, "unknown_address")
            return False
        use = services.registry.use_of(sender, default_quotas(services.settings))
        flow = LogFlow(use.log_bytes, services.store.allowances.log_bytes, str(sender.device_id))
        share = services.store.allowances.shares.of(sender.tenant_id)
        used_up = flow.used_up(now)
        if stream is None and (share.crowded or used_up):
            services.turned_away.add(address, used_up.limit if used_up else "too_fast", sender.tenant_id)
            return False
        if stream is not None and not self._recognize(stream, sender.tenant_id):
            services.turned_away.add(address, "too_many_connections", sender.tenant_id)
            raise Refusal("too_many_connections")
        while used_up := flow.used_up(now_ms()):  # noqa: ASYNC110 - nothing happens when there is room again
            await asyncio.sleep(min(used_up.retry_after, THROTTLE_SECONDS))
        if share.crowded:
            await share.turn(services.store.writer.patience())
        self._store(line_of(message, frame, sender, now), len(frame.data), flow, share)
        return True

    def _store(self, line: LogLine, size: int, flow: LogFlow, share: Share) -> None:
        writer = self._services.store.writer
        flow.add(line.received_at, size)
        writer.log_bytes_taken(line.tenant_id, size)
        writer.logged((line,))
        writer.weigh(share, (1 + size // self._limits.point_bytes) * self._limits.log_weight)


# ==== HTTP queries ====
# Owns: what the address of a request may ask for: a class for each kind of query, checked. Must not know: SQL, sockets.

Moment = NewType("Moment", int)
Duration = NewType("Duration", int)
Names = NewType("Names", tuple[str, ...])
Aggregates = NewType("Aggregates", tuple[str, ...])
AlertStatuses = NewType("AlertStatuses", tuple[str, ...])
NotificationStatus = NewType("NotificationStatus", str)
CommandStatuses = NewType("CommandStatuses", tuple[str, ...])
OutputFormat = NewType("OutputFormat", str)
DeviceOrder = NewType("DeviceOrder", str)
Glob = NewType("Glob", str)
FUTURE: Final = Moment(LATEST)
AGGREGATES_MOST: Final = 8  # values of a bucket: an answer grows with them


@attrs.frozen
class NoQuery:
    """A route without parameters."""


@attrs.frozen
class ListQuery:
    """A page of a list."""

    limit: int | None = None
    after: str | None = None


@attrs.frozen
class DeviceQuery:
    """GET /iiot."""

    limit: int | None = None
    after: str | None = None
    match: Glob | None = None
    connected: bool | None = None
    sort: DeviceOrder = DeviceOrder("name")


@attrs.frozen
class SummaryQuery:
    """GET /iiot/summary."""

    match: Glob | None = None


@attrs.frozen
class EventQuery:
    """GET /iiot/{device}/events; `from` is part of the range, `to` is not. (A trailing _ is not part of a name.)"""

    limit: int | None = None
    after: int | None = None
    kind: Names | None = None
    from_: Moment = Moment(0)
    to_: Moment = FUTURE


@attrs.frozen
class LogQuery:
    """GET /iiot/{device}/logs."""

    q: str | None = None
    level: LogLevel = LogLevel("debug")
    limit: int | None = None
    after: int | None = None
    from_: Moment = Moment(0)
    to_: Moment = FUTURE
    format: str = "json"
    follow: bool = False


@attrs.frozen
class TenantLogQuery(LogQuery):
    """GET /logs."""

    match: str | None = None


@attrs.frozen
class StateQuery:
    """GET /iiot/{device}/state."""

    at: Moment | None = None
    version: int | None = None


@attrs.frozen
class HistoryQuery:
    """A page of a history; `after` is the last version seen."""

    limit: int | None = None
    after: int | None = None


@attrs.frozen
class PushQuery:
    """A push: `timeout` until a verdict must have come, `wait` for how long the answer waits for it."""

    timeout: Duration | None = None
    wait: Duration | None = None


@attrs.frozen
class CommandQuery:
    """A command that is made or taken back; `wait` for how long the answer waits for its end."""

    wait: Duration | None = None


@attrs.frozen
class CommandListQuery:
    """GET /iiot/{device}/commands; `after` is the number of the last one seen."""

    status: CommandStatuses | None = None
    limit: int | None = None
    after: int | None = None


@attrs.frozen
class OutputQuery:
    """GET /iiot/{device}/commands/{id}/output."""

    format: OutputFormat = OutputFormat("text")
    stream: Stream | None = None
    follow: bool = False


@attrs.frozen
class FeedQuery:
    """GET /events; `after` is the id of the last event seen, as is the header Last-Event-ID."""

    after: int | None = None


@attrs.frozen
class RangeQuery:
    """DELETE /iiot/{device}/telemetry; `from` is part of the range, `to` is not."""

    metric: Names | None = None
    from_: Moment | None = None
    to_: Moment | None = None


@attrs.frozen
class RemovalQuery:
    """DELETE /tenants/{tenant}; `confirm` is its name once more."""

    confirm: str | None = None


@attrs.frozen
class AuditQuery:
    """GET /audit; `actor` is a token's name or id."""

    limit: int | None = None
    after: int | None = None
    actor: str | None = None
    action: Names | None = None
    device: str | None = None
    from_: Moment = Moment(0)
    to_: Moment = FUTURE
    format: str = "json"


@attrs.frozen
class TelemetryQuery:
    """GET /iiot/{device}/telemetry; `from` is part of the range, `to` is not."""

    metric: Names | None = None
    from_: Moment = Moment(0)
    to_: Moment = FUTURE
    every: Duration | None = None
    agg: Aggregates | None = None
    order: str = "asc"
    limit: int | None = None
    after: Moment | None = None
    format: str = "json"
    spreadsheet: bool | None = None


@attrs.frozen
class TrialQuery:
    """POST /rules/dry-run; without `from` the last day, without `to` until now."""

    from_: Moment | None = None
    to_: Moment | None = None


@attrs.frozen
class RuleListQuery:
    """GET /rules and GET /silences."""

    limit: int | None = None
    after: int | None = None


@attrs.frozen
class AlertQuery:
    """GET /alerts; `severity` is the least; `from` and `to`: that were there in that time."""

    limit: int | None = None
    after: int | None = None
    status: AlertStatuses | None = None
    severity: Severity | None = None
    rule: str | None = None
    match: str | None = None
    acknowledged: bool | None = None
    silenced: bool | None = None
    from_: Moment = Moment(0)
    to_: Moment = FUTURE


@attrs.frozen
class FleetQuery:
    """GET /telemetry"""

    match: Glob | None = None
    device: Names | None = None
    metric: Names | None = None
    from_: Moment | None = None
    to_: Moment | None = None
    every: Duration | None = None
    agg: Aggregates | None = None
    latest: bool | None = None
    follow: bool | None = None
    format: str = "json"
    spreadsheet: bool | None = None


@attrs.frozen
class ScrapeQuery:
    """GET /metrics/devices; without `max_age` it is `scrape_age_seconds`."""

    match: Glob | None = None
    metric: Names | None = None
    max_age: Duration | None = None


QUERY_CHARACTERS: Final = 1_024


def one_value(values: object) -> str:
    if not isinstance(values, list) or len(values) != 1:
        raise Invalid("is given more than once")
    if len(values[0]) > QUERY_CHARACTERS:
        raise Invalid(f"is longer than {QUERY_CHARACTERS:,} characters")
    if "\0" in values[0]:
        raise Invalid("holds a zero character")
    return str(values[0])


def query_integer(values: object, _: object) -> int:
    text = one_value(values)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Invalid("is not a whole number")
    return int(text)


def query_boolean(values: object, _: object) -> bool:
    text = one_value(values)
    if text not in ("true", "false", "1", "0"):
        raise Invalid("is neither true nor false")
    return text in ("true", "1")


def query_names(values: object, _: object) -> Names:
    """A parameter that may be given more than once."""
    return Names(tuple(dict.fromkeys(one_value([value]) for value in cast("list[str]", values))))


def query_glob(values: object, _: object) -> Glob:
    if not (glob := one_value(values)):
        raise Invalid("is empty; * is every device")
    return Glob(glob)


def query_aggregates(values: object, _: object) -> Aggregates:
    names = tuple(one_value(values).split(","))
    if not set(names) <= set(AGGREGATES):
        raise Invalid(f"is not of {', '.join(AGGREGATES)}")
    if len(names) > AGGREGATES_MOST:
        raise Invalid(f"names more than {AGGREGATES_MOST}")
    return Aggregates(names)


def query_statuses(values: object, _: object) -> AlertStatuses:
    return AlertStatuses(tuple(map(one_of("pending", "firing", "resolved"), query_names(values, None))))


COMMAND_STATUSES: Final = (
    "queued", "sent", "running", "done", "failed", "refused", "timed_out", "cancelled", "expired", "lost",
)  # fmt: skip


def query_command_statuses(values: object, _: object) -> CommandStatuses:
    return CommandStatuses(tuple(map(one_of(*COMMAND_STATUSES), query_names(values, None))))


def query_duration(values: object, _: object) -> Duration:
    milliseconds = parse_duration(one_value(values))
    if not 0 < milliseconds <= 3_660 * DAY:
        raise Invalid("is not between 1ms and ten years")
    return Duration(milliseconds)


def make_query_converter() -> Converter:
    """Makes query classes out of {name: [text, …]}."""
    converter = Converter(forbid_extra_keys=True)
    converter.register_structure_hook(str, lambda values, _: one_value(values))
    converter.register_structure_hook(int, query_integer)
    converter.register_structure_hook(bool, query_boolean)
    converter.register_structure_hook(Moment, lambda values, _: Moment(parse_moment(one_value(values), now_ms())))
    converter.register_structure_hook(Duration, query_duration)
    converter.register_structure_hook(Names, query_names)
    converter.register_structure_hook(Glob, query_glob)
    converter.register_structure_hook(LogLevel, lambda values, _: LogLevel(one_of(*LEVELS)(one_value(values), None)))
    converter.register_structure_hook(Severity, lambda values, _: Severity(one_of(*SEVERITIES)(one_value(values), None)))
    converter.register_structure_hook(Aggregates, query_aggregates)
    converter.register_structure_hook(AlertStatuses, query_statuses)
    converter.register_structure_hook(CommandStatuses, query_command_statuses)
    converter.register_structure_hook(OutputFormat, lambda values, _: OutputFormat(one_of("text", "raw", "ndjson")(one_value(values))))
    converter.register_structure_hook(DeviceOrder, lambda values, _: DeviceOrder(one_of("name", "attention")(one_value(values))))
    converter.register_structure_hook(Stream, lambda values, _: Stream(one_of("stdout", "stderr")(one_value(values))))
    is_status = one_of("waiting", "delivered", "given_up")
    converter.register_structure_hook(NotificationStatus, lambda values, _: NotificationStatus(is_status(one_value(values))))

    def structure_query(cls: type[Any]) -> Callable[[Any, Any], Any]:
        renames = {field.name: override(rename=field.name.rstrip("_")) for field in attrs.fields(cls)}
        return make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True, **renames)  # type: ignore[arg-type]

    converter.register_structure_hook_factory(attrs.has, structure_query)
    return converter


# ==== HTTP calls ====
# Owns: a request in hand, and how it is answered: at once, as a stream, or when what it waits for has come. Must not know: SQL.

SERVICES: Final = web.AppKey("services", Services)
JSON_TYPE: Final = "application/json"
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"  # by which spreadsheets know UTF-8
MANY_PAUSE_SECONDS: Final = 0.1  # between two looks at the verdicts of a push to many: each may be thousands of rows


def remote_address(request: web.Request, trusted: Networks) -> str:
    """Who the request comes from, behind the proxies that are trusted."""
    return client_address(request.remote or "", request.headers.getall("X-Forwarded-For", ()), trusted)


def versions(tags: frozenset[str] | None) -> frozenset[str] | None:
    """The tags of a condition without the time of a status: a change may depend on the version alone."""
    return None if tags is None else frozenset(re.sub(r'-[0-9]+"$', '"', tag) for tag in tags)


@attrs.define
class Call:
    """One request, its principal known, its query checked. `action` is what the audit calls it."""

    request: web.Request
    services: Services
    principal: Principal
    address: str
    action: str = ""
    running: RequestUnderWay | None = None
    query: Any = None
    subject: str | None = None
    accounted: bool = False
    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    @property
    def tenant(self) -> int:
        """The tenant within which everything happens. Refusal: forbidden, for the platform's own tokens."""
        if self.principal.tenant_id is None:
            raise Refusal("forbidden")
        return self.principal.tenant_id

    @property
    def device(self) -> str:
        return self.request.match_info["device"]

    @property
    def by(self) -> dict[str, object]:
        """Who and from where, for a device's timeline."""
        return {"by": self.principal.name, "address": self.address}

    @property
    def affected(self) -> Affected:
        """What the address of the request names last, or its body (`subject`)."""
        names = self.request.match_info
        return Affected(self.subject or next(reversed(names.values()), None), names.get("device"))

    def require(self, tag: str | None, *, exists: bool = True) -> None:
        """Refusal: precondition_failed, unless the conditions of the request hold for what has this entity tag."""
        if not is_met(versions(self.match), versions(self.none_match), tag, exists=exists):
            raise Refusal("precondition_failed")

    async def change(
        self, function: Callable[[sqlite3.Connection], T], affected: Callable[[T], Iterable[Affected]] | None = None, **detail: object
    ) -> T:
        """Run a change and enter it in the audit, in one transaction, if the token still stands in it. `affected` tells what was
        changed by the outcome, `detail` what else the action was told."""
        token_id = self.principal.token_id

        def stand_and_change(connection: sqlite3.Connection) -> T:
            require_token(connection, token_id)
            return function(connection)

        usual = [attrs.evolve(self.affected, detail=detail or None)]
        actor = self.principal.actor(self.address)
        with self.running.changing() if self.running else nullcontext():
            change = accounted(actor, self.action, stand_and_change, affected or (lambda _: usual))
            result = await self.services.store.writer.change(change, self.services.store.allowances.shares.of(self.principal.tenant_id))
        self.accounted = True
        return result

    async def refused(self, refusal: Refusal) -> None:
        """Enter in the audit that an action was refused."""
        if self.action and not self.accounted:
            await self.services.identity.refused.enter(self.principal.actor(self.address), self.action, [self.affected], refusal)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A request that is to wait for a device counts while it does. Refusal: too_many_requests."""
        if not isinstance(self.query, (PushQuery, CommandQuery)) or self.query.wait is None:
            yield
            return
        share = self.services.store.allowances.shares.of(self.tenant)
        if share.waiting_pushes >= self.services.limits.waiting_pushes:
            raise Refusal("too_many_requests", retry_after=1)
        share.waiting_pushes += 1
        try:
            yield
        finally:
            share.waiting_pushes -= 1

    def page(self) -> int:
        """Entries of a page. Refusal: bad_query."""
        limits = self.services.limits
        return self.count(limits.page, limits.page_most)

    def count(self, default: int, most: int) -> int:
        wanted = default if self.query.limit is None else cast(int, self.query.limit)
        if not 1 <= wanted <= most:
            raise Refusal("bad_query", FieldError("limit", f"is not between 1 and {most}"))
        return wanted

    def version_after(self) -> int:
        """The version before which a page of a history starts."""
        return INTEGERS - 1 if self.query.after is None else cast(int, self.query.after)

    async def content(self) -> bytes:
        """The body of the request. Refusal: too_large, bad_request."""
        try:
            async with asyncio.timeout(self.services.limits.body_seconds):
                return await self.request.read()
        except web.HTTPRequestEntityTooLarge:
            raise Refusal("too_large") from None
        except (web.RequestPayloadError, TimeoutError) as error:  # it is not encoded as it says, breaks off, or does not come
            raise Refusal("bad_request") from error

    async def body(self, cls: type[T]) -> T:
        return self.services.codec.body(await self.content(), cls)


def wait_seconds(call: Call) -> float:
    """For how long an answer waits for what is asked for. Refusal: bad_query."""
    seconds, most = (0.0 if call.query.wait is None else cast(int, call.query.wait) / 1000), call.services.limits.wait_seconds_most
    if seconds > most:
        raise Refusal("bad_query", FieldError("wait", f"is longer than {most:.0f}s"))
    return seconds


def number_in(call: Call) -> int:
    """The number in the address of a request. Refusal: not_found, for what is none."""
    text = call.request.match_info["id"]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Refusal("not_found")
    return int(text)


def json_response(text: str | bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    body = text.encode() if isinstance(text, str) else text
    return web.Response(body=body + b"\n", status=status, content_type=JSON_TYPE, headers=headers)


def required_text(text: str | bytes | None) -> str | bytes:
    if text is None:
        raise Refusal("not_found")
    return text


def required(text: str | bytes | None) -> web.Response:
    return json_response(required_text(text))


def answer(value: object, status: int = 200) -> web.Response:
    return json_response(orjson.dumps(value), status)


def error_response(refusal: Refusal) -> web.Response:
    fault = refusal.fault
    error: dict[str, object] = {"code": fault.code, "message": fault.message}
    if refusal.errors:
        error["details"] = [attrs.asdict(field) for field in refusal.errors]
    headers = {"WWW-Authenticate": "Bearer"} if fault.status == 401 else {}
    if refusal.retry_after is not None:
        headers[hdrs.RETRY_AFTER] = str(refusal.retry_after)
    return json_response(orjson.dumps({"error": error}), fault.status, headers)


COMPRESSED_BYTES: Final = 1_024  # less than that gains nothing: it is one packet


def accepts(request: web.BaseRequest, header: str, *names: str) -> bool:
    """Whether a client takes one of these, by a header with weights (RFC 9110, section 12.4.2)."""
    for shown in request.headers.get(header, "").lower().split(","):
        name, _, parameters = shown.partition(";")
        if name.strip() in names:
            return re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", parameters) is None
    return False


def compress(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Compress an answer for a client that asks for that; aiohttp does so beside the event loop."""
    response.headers[hdrs.VARY] = hdrs.ACCEPT_ENCODING
    if accepts(request, hdrs.ACCEPT_ENCODING, "gzip", "*"):
        response.enable_compression(web.ContentCoding.gzip)


def compress_if_large(request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
    """The JSON of an answer. What has an entity tag keeps its bytes: the tag is of them."""
    if isinstance(response, web.Response) and not response.prepared and hdrs.ETAG not in response.headers:
        body = response.body
        if response.content_type == JSON_TYPE and isinstance(body, bytes) and len(body) >= COMPRESSED_BYTES:
            compress(request, response)
    return response


async def look_until(
    services: Services, seconds: float, look: Callable[[], Awaitable[T]], enough: Callable[[T], bool],
    next_ring: Callable[[], asyncio.Future[None]], pause: float = 0.0,
) -> T:
    """What `look` answers, once that is enough; or when the time is over, or the server stops. It looks again after each ring,
    but no sooner than after `pause` seconds."""
    until = time.monotonic() + seconds
    while True:
        ring = next_ring()
        seen = await look()
        if enough(seen) or time.monotonic() >= until or services.registry.closing.is_set():
            return seen
        await Bell.heard(ring, until - time.monotonic())
        await asyncio.sleep(pause)


def reset_if_broken(transport: asyncio.Transport | None, broken: bool) -> None:  # noqa: FBT001 - what the name ends in
    """Let the system reset a connection that ends from now on, or end it in order again. A client of HTTP/1.0 knows the end of a
    stream by the end of the connection, so only a reset tells it that something is missing; also when this process is killed."""
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is not None:
        with suppress(OSError):  # it has ended already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", broken, 0))


@asynccontextmanager
async def streaming(
    call: Call, content_type: str, headers: Mapping[str, str] = MappingProxyType({}), *, ends: bool = False
) -> AsyncIterator[web.StreamResponse]:
    """A response of unknown length. Where it breaks off, the client must see that this is not the end of the file. One that `ends` by
    itself is compressed; of the others each part must arrive at once."""
    unbuffered = {"X-Accel-Buffering": "no"}  # by nginx: a feed would never arrive
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: content_type, **unbuffered, **headers})
    if ends:
        compress(call.request, response)
    if call.request.version < HttpVersion11:  # the end of the connection is the end of the stream
        response.force_close()
    reset_if_broken(call.request.transport, True)
    await response.prepare(call.request)
    try:
        yield response
        await response.write_eof()
        reset_if_broken(call.request.transport, False)
    except ConnectionError:
        return  # the client has gone
    except BaseException as error:  # whatever it was, the transport must go; all but the client's slowness goes on
        if call.request.transport is not None:
            call.request.transport.abort()
        if not isinstance(error, TimeoutError):  # the client does not read
            raise


async def wait_for_turn(services: Services, tenant_id: int | None) -> None:
    """Until it is the turn of a request, among those of its tenant. Refusal: too_many_requests."""
    share, limits = services.store.allowances.shares.of(tenant_id), services.limits
    if share.asking >= limits.requests_waiting:
        raise Refusal("too_many_requests", retry_after=1)
    try:
        await share.turn(for_seconds(limits.request_seconds), storing=False)
    except TimeoutError:
        raise Refusal("too_many_requests", retry_after=1) from None


# ==== HTTP metrics ====
# Owns: the handlers for a monitoring system that scrapes (Prometheus): the server's own numbers, and the newest of its devices. Must not
# know: SQL.

TLS: Final = web.AppKey("tls", ssl.SSLContext)  # where the server has a certificate
# https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
PROMETHEUS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def der_elements(data: bytes) -> list[tuple[int, bytes]]:
    """The elements that stand side by side in DER (X.690): tag and content of each. ValueError."""
    found, at = [], 0
    while at + 2 <= len(data):
        tag, size, at = data[at], data[at + 1], at + 2
        if size > 0x7F:  # the length has a length of its own
            long = size - 0x80
            size, at = int.from_bytes(data[at : at + long], "big"), at + long
        found.append((tag, data[at : at + size]))
        at += size
    if at != len(data):
        raise ValueError("it ends too early")
    return found


def not_after(certificate: bytes) -> int:
    """Until when a certificate (DER) is valid, in seconds since 1970 (RFC 5280, sections 4.1 and 4.1.2.5). ValueError."""
    try:
        ((_, whole),) = der_elements(certificate)
        fields = der_elements(der_elements(whole)[0][1])
        validity = fields[4 if fields[0][0] == 0xA0 else 3][1]  # version 1 leaves out the version
        _, (tag, text) = der_elements(validity)
        written = text.decode("ascii")
        if tag == 0x17:  # UTCTime: two digits of the year
            written = ("19" if written >= "5" else "20") + written
        return round(datetime.strptime(written, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
    except (IndexError, ValueError) as error:
        raise ValueError("it is no certificate") from error


def shown_certificate(context: ssl.SSLContext) -> bytes:
    """The certificate (DER) that a server with this context shows at the moment: its file may be newer. A context does not tell it but in
    a handshake, so one is made within this process; that costs what a connection costs."""
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.check_hostname, asking.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = asking.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return client.getpeercert(binary_form=True) or b""


def certificate_expiry(context: ssl.SSLContext | None) -> int | None:
    """Until when the server's certificate is valid, in seconds since 1970; None without one."""
    try:
        return None if context is None else not_after(shown_certificate(context))
    except (ValueError, ssl.SSLError) as error:  # the other numbers are there all the same
        log.warning("cannot tell until when the certificate is valid: %s", error)
        return None


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """Its name ends in _total, which the format adds."""
    return CounterMetricFamily(name, text, value=value)


def counter_by(name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in rows:
        family.add_metric(values, count)
    return family


def histogram(name: str, text: str, seen: Histogram) -> Metric:
    """The format wants to know how many were at most as large as each bound."""
    bounds = [*map(str, seen.bounds), "+Inf"]
    return HistogramMetricFamily(name, text, buckets=list(zip(bounds, accumulate(seen.counts), strict=True)), sum_value=seen.total)


def families_of_storage(writer: Writer, sizes: FileSizes) -> Iterator[Metric]:
    stored, (points, weight) = writer.stored, writer.pending
    yield counter("iiot_frames", "Frames of devices that are on disk, with those that were refused.", stored.frames)
    yield counter("iiot_points", "Points that are on disk.", stored.points)
    yield counter("iiot_log_lines", "Lines of logs that are on disk.", stored.log_lines)
    yield counter("iiot_log_bytes", "Bytes of the lines of logs that are on disk, as they were sent.", stored.log_bytes)
    yield counter("iiot_commit_failures", "Transactions that failed; what they held was tried again, or not confirmed.", stored.failures)
    yield histogram("iiot_batch_points", "Points of a transaction.", stored.batch_points)
    yield histogram("iiot_commit_seconds", "How long a transaction took, with its commit.", stored.commit_seconds)
    yield histogram("iiot_ack_seconds", "How long the oldest frame of a transaction waited until it was on disk.", stored.ack_seconds)
    yield gauge("iiot_pending_points", "Points that wait for the next transaction.", points)
    yield gauge("iiot_pending_weight", "What waits for the next transaction, all of it counted as points.", weight)
    yield gauge("iiot_database_bytes", "Size of the database file.", sizes.database)
    yield gauge("iiot_wal_bytes", "Size of the write-ahead log.", sizes.log)
    yield gauge("iiot_disk_bytes", "Size of the file system of the database.", sizes.disk)
    yield gauge("iiot_disk_free_bytes", "Free bytes of the file system of the database.", sizes.disk_free)


def families_of_traffic(services: Services) -> Iterator[Metric]:
    counts, peers, turned_away = services.counts, services.peers, services.turned_away
    yield gauge("iiot_sessions", "Devices that are connected.", services.registry.sessions)
    yield counter("iiot_sessions_opened", "Sessions of devices that began.", counts.sessions)
    ends = (((code,), counts.session_ends[code]) for code in FAULTS if code in counts.session_ends)
    yield counter_by("iiot_session_ends", "Sessions of devices that ended, by the reason of the timeline.", ("reason",), ends)
    yield gauge("iiot_connections", "Connections that are open.", peers.held)
    yield gauge("iiot_stranger_connections", "Open connections that have shown no valid token, or have nothing under way.", peers.strangers)
    yield counter("iiot_frame_bytes", "Bytes of the frames that devices sent.", counts.frame_bytes)
    refusals = (((code,), counts.refusals[code]) for code in FAULTS)  # also those that did not happen: a rise from 0 is seen
    yield counter_by("iiot_refusals", "Requests, frames and handshakes that were refused, by the code of the error.", ("code",), refusals)
    requests = (((method, path or "unmatched", str(status)), n) for (method, path, status), n in sorted(counts.requests.items()))
    yield counter_by("iiot_http_requests", "Requests that were answered, by route and status.", ("method", "route", "status"), requests)
    yield gauge("iiot_requests_waiting", "Requests that wait for their turn.", services.store.allowances.shares.asking)
    lines = (((reason,), n) for reason, n in sorted(turned_away.lines.items()))
    yield counter_by("iiot_syslog_refused_lines", "Lines of syslog that were not stored, by reason.", ("reason",), lines)
    yield gauge("iiot_syslog_datagrams_waiting", "Datagrams of syslog that wait for their turn.", counts.datagrams_waiting())


def families_of_notifications(counts: Counts, waiting: int) -> Iterator[Metric]:
    done = (((status,), counts.notifications[status]) for status in ("delivered", "given_up"))
    yield counter_by("iiot_notifications", "Notifications of alerts that were delivered or given up.", ("status",), done)
    yield counter("iiot_failed_deliveries", "Tries to deliver a notification that failed.", counts.failed_deliveries)
    yield gauge("iiot_notifications_waiting", "Notifications that wait until their receiver takes them.", waiting)


def families_of_program(counts: Counts, expiry: int | None) -> Iterator[Metric]:
    running = {"version": VERSION, "python": ".".join(map(str, sys.version_info[:3])), "sqlite": sqlite3.sqlite_version}
    yield InfoMetricFamily("iiot_build", "What runs.", running)
    yield gauge("iiot_start_time_seconds", "When the server was started, in seconds since 1970.", counts.started_at)
    if expiry is not None:
        yield gauge("iiot_certificate_expiry_timestamp_seconds", "Until when the certificate is valid, in seconds since 1970.", expiry)


class ServerMetrics(Collector):
    """All of one scrape: what was read off the server, and what a thread looks up of its process."""

    def __init__(self, families: Iterable[Metric], turned_away: TurnedAway) -> None:
        self._families = list(families)
        self._turned_away = turned_away

    def collect(self) -> Iterator[Metric]:
        yield from self._families
        lost = self._turned_away.datagrams_lost()
        yield counter("iiot_syslog_datagrams_lost", "Datagrams of syslog that the system threw away: they were not read in time.", lost)
        yield from ProcessCollector(registry=None).collect()

    def text(self) -> bytes:
        return generate_latest(self)


async def show_metrics(call: Call) -> web.StreamResponse:
    """The server's own numbers. They are read at one moment of the event loop, which changes them; text is made of them elsewhere."""
    services = call.services
    sizes, waiting = await services.store.sizes(), await services.store.read.notifications.waiting()
    families = [
        *families_of_program(services.counts, certificate_expiry(call.request.app.get(TLS))),
        *families_of_traffic(services), *families_of_storage(services.store.writer, sizes),
        *families_of_notifications(services.counts, waiting),
    ]  # fmt: skip
    text = await asyncio.to_thread(ServerMetrics(families, services.turned_away).text)
    return web.Response(body=text, headers={hdrs.CONTENT_TYPE: PROMETHEUS_TYPE})


def label_value(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def family_head(name: str, text: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} gauge\n"


async def presence_lines(call: Call, name: str, text: str, value: Callable[[int, int | None], float | None]) -> AsyncIterator[str]:
    """A family of a number of every device; `value` makes it of whether it is connected and when it was heard."""
    limits, scrapes, after = call.services.limits, call.services.store.read.scrapes, ""
    head = family_head(name, text)
    while True:
        page = await scrapes.presence(call.tenant, call.query.match, after, limits.scrape_rows)
        numbers = ((device, value(connected, seen_at)) for device, connected, seen_at in page)
        yield head + "".join(f'{name}{{device="{label_value(device)}"}} {number}\n' for device, number in numbers if number is not None)
        if len(page) < limits.scrape_rows:
            return
        head, after = "", page[-1][0]


async def reading_lines(call: Call, since: int, name: str, text: str, value: Callable[[float, int], float]) -> AsyncIterator[str]:
    """A family of a number of every series; `value` makes it of its newest reading and the time of that."""
    limits, scrapes, query = call.services.limits, call.services.store.read.scrapes, call.query
    head, after = family_head(name, text), cast("tuple[str, str] | None", ("", ""))
    while after is not None:
        page, after = await scrapes.readings(call.tenant, query.match, query.metric, since, after, limits.scrape_rows)
        yield head + "".join(
            f'{name}{{device="{label_value(device)}",metric="{label_value(metric)}"}} {value(number, at)}\n'
            for device, metric, number, at in page
        )
        head = ""


async def device_lines(call: Call) -> AsyncIterator[str]:
    """The format wants the lines of a family in one piece, and all of them would fill the memory: so the devices are walked through once
    for each."""
    age = round(call.services.limits.scrape_age_seconds * 1000) if call.query.max_age is None else cast(int, call.query.max_age)
    since = now_ms() - age
    families = (
        presence_lines(call, "iiot_device_connected", "Whether the device is connected.", lambda connected, _: connected),
        presence_lines(
            call, "iiot_device_seen_timestamp_seconds", "When the device was last heard, in seconds since 1970.",
            lambda _, seen_at: None if seen_at is None else seen_at / 1000,
        ),
        reading_lines(call, since, "iiot_reading", "The newest reading.", lambda number, _: number),
        reading_lines(
            call, since, "iiot_reading_timestamp_seconds", "The time of the newest reading, in seconds since 1970.", lambda _, at: at / 1000
        ),
    )  # fmt: skip
    for family in families:
        async for lines in family:
            yield lines


async def show_device_metrics(call: Call) -> web.StreamResponse:
    """Presence and newest readings of the tenant's devices. Refusal: bad_query."""
    pages = device_lines(call)
    first = await anext(pages)  # before the head of the answer: what is wrong with it can still be told
    async with streaming(call, PROMETHEUS_TYPE) as response:
        await response.write(first.encode())
        async for lines in pages:
            async with asyncio.timeout(call.services.limits.stall_seconds):
                await response.write(lines.encode())
            await wait_for_turn(call.services, call.tenant)
    return response


# ==== HTTP readings ====
# Owns: the handlers of readings and of logs, with who sends lines by syslog and how long they are kept. Must not know: SQL.

async def make_log_token(call: Call) -> web.StreamResponse:
    tenant, name, token, body = call.tenant, call.device, mint("log"), await call.body(Rotation)
    most = call.services.limits.log_tokens
    await call.change(
        lambda connection: insert_log_token(connection, tenant, name, token.stored, most, revoke=body.revoke),
        token=token.stored.id, revoke=body.revoke,
    )  # fmt: skip
    call.services.senders.forget()
    return answer({"device": name, "token": token.text}, 201)


async def revoke_log_tokens(call: Call) -> web.StreamResponse:
    tenant, name = call.tenant, call.device
    await call.change(lambda connection: delete_log_tokens(connection, tenant, name))
    call.services.senders.forget()
    return web.Response(status=204)


async def show_syslog_source(call: Call) -> web.StreamResponse:
    return required(await call.services.store.read.syslog_sources(call.tenant, call.device))


def as_network(text: str) -> Network:
    """An address of IPv4 that is written as one of IPv6 is what it is. ValueError, also where it names a network card."""
    network = ipaddress.ip_network(text.strip())
    if isinstance(network, ipaddress.IPv6Network):
        if network.network_address.scope_id is not None:
            raise ValueError(text)
        if (mapped := network.network_address.ipv4_mapped) is not None and network.prefixlen >= 96:
            return ipaddress.ip_network(f"{mapped}/{network.prefixlen - 96}")
    return network


def as_networks(addresses: Iterable[str], most: int) -> list[str]:
    """Addresses and networks as they are stored. Refusal: invalid."""
    found = []
    for index, text in enumerate(addresses):
        try:
            network = as_network(text)
        except ValueError:
            raise Refusal("invalid", FieldError(f"addresses[{index}]", "is neither an address nor a network such as 10.0.0.0/24")) from None
        found.append(str(network))
    if len(found) > most:
        raise Refusal("invalid", FieldError("addresses", f"are more than {most}"))
    return found


async def set_syslog_source(call: Call) -> web.StreamResponse:
    tenant, name, body = call.tenant, call.device, await call.body(SyslogSource)
    limits = call.services.limits
    networks = as_networks(body.addresses, limits.sources)
    await call.change(lambda connection: set_syslog_sources(connection, tenant, name, networks, limits), addresses=networks)
    call.services.senders.forget()
    return await show_syslog_source(call)


async def show_refused_lines(call: Call) -> web.StreamResponse:
    return answer(await asyncio.to_thread(call.services.turned_away.shown, call.tenant))


async def stream_log_lines(call: Call, wanted: LogFilter, shown: LineFormat) -> web.StreamResponse:
    """All lines that are wanted, newest first; with `limit` so many. Refusal: bad_query, not_found."""
    logs, limits = call.services.store.read.logs, call.services.limits
    rest = None if call.query.limit is None else call.page()
    text = await logs.lines(call.tenant, wanted, rest or limits.page_most, call.version_after())
    if text is None:
        raise Refusal("not_found")
    async with streaming(call, shown.content_type) as response:
        if shown.header:
            await response.write(shown.header)
        while text is not None:
            page = orjson.loads(text)
            async with asyncio.timeout(limits.stall_seconds):
                await response.write(b"".join(map(shown.write, page["items"])))
            rest = None if rest is None else rest - len(page["items"])
            if page["next"] is None or rest == 0:
                break
            await wait_for_turn(call.services, call.tenant)
            text = await logs.lines(call.tenant, wanted, rest or limits.page_most, page["next"])
    return response


async def follow_log_lines(call: Call, wanted: LogFilter, shown: LineFormat) -> web.StreamResponse:
    """The newest lines, `limit` of them, or those after a line that is named; then those that come, as they are committed; an empty
    line where there is none for a while. Refusal: bad_query, not_found, too_many_feeds."""
    services, logs, limits, tenant = call.services, call.services.store.read.logs, call.services.limits, call.tenant
    last = await logs.newest()
    text: str | bytes = '{"items":[]}'
    if (after := cast("int | None", call.query.after)) is None:
        text = required_text(await logs.lines(tenant, wanted, call.count(limits.tail, limits.page_most), last + 1))
    elif call.query.limit is not None:
        raise Refusal("bad_query", FieldError("limit", "cannot be given with after and follow: all lines after that one are sent"))
    else:
        last = min(last, after)
        required_text(await logs.newer_lines(tenant, wanted, 1, last))
    with services.registry.follower(tenant, "logs", limits.feeds), services.registry.feed(call.request.transport):
        async with streaming(call, shown.content_type) as response:
            lines = orjson.loads(text)["items"][::-1]
            if first := shown.header + b"".join(map(shown.write, lines)):
                await response.write(first)
            while not services.registry.closing.is_set():
                ring = services.store.writer.log_news.next(tenant)
                newer = await logs.newer_lines(tenant, wanted, limits.page_most, last)
                if newer is None:  # its device was removed
                    break
                lines = orjson.loads(newer)["items"]
                last = lines[-1]["id"] if lines else last
                if not lines:
                    await asyncio.wait((ring,), timeout=limits.feed_seconds)
                if lines or not ring.done():
                    async with asyncio.timeout(limits.stall_seconds):
                        await response.write(b"".join(map(shown.write, lines)) or b"\n")
                await asyncio.sleep(limits.follow_seconds)
                await wait_for_turn(services, tenant)
    return response


async def show_log_lines(call: Call) -> web.StreamResponse:
    """Of one device, or of all whose names match. Refusal: bad_query, not_found."""
    query: LogQuery = call.query
    device = call.request.match_info.get("device")
    match = query.match if isinstance(query, TenantLogQuery) else None
    try:
        search = None if query.q is None else parse_search(query.q, call.services.limits)
    except Invalid as error:
        raise Refusal("bad_query", FieldError("q", str(error))) from error
    wanted = LogFilter(device, match, query.level, search, query.from_, query.to_)
    if query.format == "json" and not query.follow:
        return required(await call.services.store.read.logs.lines(call.tenant, wanted, call.page(), call.version_after()))
    shown = LINE_FORMATS.get(query.format)
    if shown is None:
        raise Refusal("bad_query", FieldError("format", f"is not one of {', '.join(LINE_FORMATS)}" + ("" if query.follow else ", json")))
    return await (follow_log_lines if query.follow else stream_log_lines)(call, wanted, shown)


async def retention_of(call: Call) -> str:
    days = await call.services.store.read.logs.days(call.tenant, call.services.settings.log_days)
    return orjson.dumps({"logs": {"days": days}}).decode()


async def show_retention(call: Call) -> web.StreamResponse:
    return json_response(await retention_of(call))


async def set_retention(call: Call) -> web.StreamResponse:
    body = await call.body(Retention)
    await call.change(lambda connection: set_log_days(connection, call.tenant, body.logs.days), logs={"days": body.logs.days})
    return json_response(await retention_of(call))


async def reset_retention(call: Call) -> web.StreamResponse:
    await call.change(lambda connection: set_log_days(connection, call.tenant, None))
    return web.Response(status=204)


async def csv_pieces(
    call: Call, wanted: TelemetryRange, metrics: Iterable[str], every: int | None, aggregates: tuple[str, ...]
) -> AsyncIterator[bytes]:
    """Refusal: not_found, when the device was removed meanwhile."""
    telemetry = call.services.store.read.telemetry
    for metric in metrics:
        start: int | None = wanted.start
        while start is not None and start < wanted.stop:
            rest = attrs.evolve(wanted, start=start)
            if every is None:
                piece = await telemetry.point_rows(call.tenant, call.device, metric, rest)
            else:
                piece = await telemetry.bucket_rows(call.tenant, call.device, metric, rest, every, aggregates)
            if piece is None:
                raise Refusal("not_found")
            rows, start = piece
            yield csv_lines(rows, spreadsheet=bool(call.query.spreadsheet))


async def stream_csv(call: Call, wanted: TelemetryRange, every: int | None, aggregates: tuple[str, ...]) -> web.StreamResponse:
    """The whole range, header line first, in pieces of bounded size; metric by metric, each by time."""
    for name in ("limit", "after"):
        if getattr(call.query, name) is not None:
            raise Refusal("bad_query", FieldError(name, "is not for format=csv, which is the whole range"))
    if wanted.descending:
        raise Refusal("bad_query", FieldError("order", "of format=csv is asc"))
    telemetry = call.services.store.read.telemetry
    found_there = await telemetry.device_and_metrics(call.tenant, call.device, wanted)
    if found_there is None:
        raise Refusal("not_found")
    device_id, metrics = found_there
    wanted = attrs.evolve(wanted, device_id=device_id)
    headers = {"Content-Disposition": f'attachment; filename="{call.device.replace(":", "-")}.csv"'} if call.query.spreadsheet else {}
    async with streaming(call, "text/csv; charset=utf-8", headers, ends=True) as response:
        header = ("time", "metric", *(("value",) if every is None else aggregates))
        await response.write((BYTE_ORDER_MARK if call.query.spreadsheet else b"") + ",".join(header).encode() + b"\n")
        async for lines in csv_pieces(call, wanted, metrics, every, aggregates):
            async with asyncio.timeout(call.services.limits.stall_seconds):
                await response.write(lines)
    return response


async def show_telemetry(call: Call) -> web.StreamResponse:
    query: TelemetryQuery = call.query
    limits, telemetry = call.services.limits, call.services.store.read.telemetry
    if query.order not in ("asc", "desc"):
        raise Refusal("bad_query", FieldError("order", "is neither asc nor desc"))
    if query.format not in ("json", "csv"):
        raise Refusal("bad_query", FieldError("format", "is neither json nor csv"))
    if query.agg and query.every is None:
        raise Refusal("bad_query", FieldError("agg", "needs every"))
    if query.spreadsheet is not None and query.format != "csv":
        raise Refusal("bad_query", FieldError("spreadsheet", "needs format=csv"))
    wanted = TelemetryRange(query.metric, query.from_, query.to_, query.order == "desc")
    aggregates = query.agg or Aggregates(("avg",))
    if query.format == "csv":
        return await stream_csv(call, wanted, query.every, aggregates)
    if query.after is not None:
        wanted = attrs.evolve(wanted, stop=query.after) if wanted.descending else attrs.evolve(wanted, start=query.after)
    limit = call.count(limits.points, limits.points_most)
    if query.every is None:
        return required(await telemetry.points(call.tenant, call.device, wanted, limit))
    return required(await telemetry.buckets(call.tenant, call.device, wanted, limit, query.every, aggregates))


def fleet_range(query: FleetQuery, limits: Limits) -> FleetRange:
    """Refusal: bad_query, for what contradicts itself."""
    others = {"every": query.every, "agg": query.agg, "from": query.from_, "to": query.to_}
    if query.latest and query.follow:
        raise Refusal("bad_query", FieldError("latest", "cannot be given with follow"))
    for name in ("every", "agg") if query.latest else tuple(others) if query.follow else ():
        if others[name] is not None:
            raise Refusal("bad_query", FieldError(name, f"cannot be given with {'latest' if query.latest else 'follow'}"))
    if query.agg and query.every is None:
        raise Refusal("bad_query", FieldError("agg", "needs every"))
    if query.device is not None and query.match is not None:
        raise Refusal("bad_query", FieldError("device", "cannot be given with match"))
    if query.device is not None and len(query.device) > limits.fleet_devices:
        raise Refusal("bad_query", FieldError("device", f"is given more than {limits.fleet_devices:,} times"))
    start, stop = query.from_ or Moment(0), FUTURE if query.to_ is None else query.to_
    return FleetRange(query.match, query.metric, start, stop, query.every, query.agg or Aggregates(("avg",)), query.device)


async def rest_of_series(call: Call, wanted: FleetRange, number: int, start: int | None, names: tuple[str, ...]) -> AsyncIterator[bytes]:
    while start is not None:
        await wait_for_turn(call.services, call.tenant)
        parts = await call.services.store.read.fleet.rows(call.tenant, wanted, [(number, start)], call.services.limits.csv_rows, names)
        if not parts:
            raise Refusal("not_found")
        _, rows, start = parts[0]
        yield rows


async def require_series(call: Call, wanted: FleetRange, number: int) -> None:
    """The device whose series were listed up to this one may have had more of them, and be gone. Refusal: not_found."""
    if not await call.services.store.read.fleet.rows(call.tenant, wanted, [(number, wanted.stop)], 1, ()):
        raise Refusal("not_found")


async def fleet_pieces(call: Call, wanted: FleetRange, names: tuple[str, ...]) -> AsyncIterator[bytes]:
    """JSON arrays of rows, series by series, each by time. Refusal: not_found, when a device was removed in the middle of its rows."""
    fleet, limits, after, last = call.services.store.read.fleet, call.services.limits, ("", ""), 0
    while series := await fleet.series(call.tenant, wanted, after, limits.fleet_page):
        if last and series[0][1] != after[0]:
            await require_series(call, wanted, last)
        after, last = (series[-1][1], series[-1][2]), series[-1][0]
        for first in range(0, len(series), limits.fleet_series):
            some = [(number, wanted.start) for number, *_ in series[first : first + limits.fleet_series]]
            parts = await fleet.rows(call.tenant, wanted, some, limits.csv_rows // limits.fleet_series, names)
            if len(parts) < len(some):
                raise Refusal("not_found")
            for place, rows, following in parts:
                yield rows
                async for more in rest_of_series(call, wanted, some[place][0], following, names):
                    yield more
            await wait_for_turn(call.services, call.tenant)
    if last:
        await require_series(call, wanted, last)


async def latest_pieces(call: Call, wanted: FleetRange, names: tuple[str, ...]) -> AsyncIterator[bytes]:
    """JSON arrays of rows, the newest point of each series."""
    limits, after = call.services.limits, cast("tuple[str, str] | None", ("", ""))
    while after is not None:
        rows, after = await call.services.store.read.fleet.latest(call.tenant, wanted, after, limits.fleet_page, names)
        yield rows
        await wait_for_turn(call.services, call.tenant)


async def stream_rows(call: Call, wanted: FleetRange, pieces: AsyncIterator[bytes]) -> web.StreamResponse:
    """The rows of all pieces, as CSV or as one JSON array."""
    query: FleetQuery = call.query
    is_csv, separator = query.format == "csv", b""
    headers = {"Content-Disposition": 'attachment; filename="telemetry.csv"'} if query.spreadsheet else {}
    async with streaming(call, "text/csv; charset=utf-8" if is_csv else JSON_TYPE, headers, ends=True) as response:
        header = (BYTE_ORDER_MARK if query.spreadsheet else b"") + ",".join(wanted.columns).encode() + b"\n"
        await response.write(header if is_csv else b"[")
        async for rows in pieces:
            text = csv_lines(rows, names=2, spreadsheet=bool(query.spreadsheet)) if is_csv else rows[1:-1]
            if text:
                async with asyncio.timeout(call.services.limits.stall_seconds):
                    await response.write(text if is_csv else separator + text)
                separator = b","
        await response.write(b"" if is_csv else b"]\n")
    return response


def as_stored(value: Value) -> Value:
    """As it is read from the database: without the sign of zero, too."""
    return int(value) if isinstance(value, bool) else value + 0.0 if isinstance(value, float) else value


class Followed:
    """The series that a follower is sent, by number. New ones are looked for when there are some."""

    def __init__(self, call: Call, wanted: FleetRange) -> None:
        self._call = call
        self._wanted = wanted
        self._names: dict[str, tuple[str, str]] = {}
        self._highest = 0

    async def look(self) -> None:
        """Refusal: bad_query, when there are too many."""
        most = self._call.services.limits.followed_series
        series = await self._call.services.store.read.fleet.series(self._call.tenant, self._wanted, ("", ""), most + 1)
        if len(series) > most:
            raise Refusal("bad_query", FieldError("match", f"finds more than {most:,} series, and no more can be followed"))
        self._names = {str(number): (device, metric) for number, device, metric in series}

    async def rows(self, batches: list[dict[str, dict[str, Value]]]) -> list[dict[str, Any]]:
        """What of committed points is wanted. Refusal: bad_query, when there are too many series by now."""
        highest = max((int(number) for points in batches for number in points), default=0)
        if highest > self._highest:
            await self.look()
            self._highest = highest
        return [
            {"time": format_time(ts), "device": self._names[number][0], "metric": self._names[number][1], "value": as_stored(value)}
            for points in batches
            for number in sorted(points.keys() & self._names.keys(), key=self._names.__getitem__)
            for ts, value in sorted((int(ts), value) for ts, value in points[number].items())
        ]


async def events_of(call: Call, feed: PointFeed, followed: Followed) -> AsyncIterator[bytes]:
    """What has come, in events of a bounded length, each in its tenant's turn; a comment when there is nothing."""
    if feed.behind:
        feed.behind = False
        yield b"event: reset\ndata: {}\n\n"
    is_empty, most = True, call.services.limits.event_points
    for batch in feed.take():
        rows = await followed.rows([batch])
        for first in range(0, len(rows), most):
            await wait_for_turn(call.services, call.tenant)
            yield b"event: points\ndata: %b\n\n" % orjson.dumps(rows[first : first + most])
            is_empty = False
    if is_empty:
        yield b": alive\n\n"


async def follow_points(call: Call, wanted: FleetRange) -> web.StreamResponse:
    """Committed points as they come, as server-sent events; `reset` where some are left out, because they were not read in time.
    Refusal: bad_query, too_many_feeds."""
    services, limits = call.services, call.services.limits
    feed, followed = PointFeed(limits.followed_points), Followed(call, wanted)
    services.store.writer.point_feeds.add(feed)
    try:
        await followed.look()
        with services.registry.follower(call.tenant, "points", limits.point_followers), services.registry.feed(call.request.transport):
            async with streaming(call, "text/event-stream") as response:
                await response.write(b": connected\n\n")
                while not services.registry.closing.is_set():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(limits.feed_seconds):
                            await feed.ring.wait()
                    async for text in events_of(call, feed, followed):
                        async with asyncio.timeout(limits.stall_seconds):
                            await response.write(text)
                    await asyncio.sleep(limits.follow_seconds)
        return response
    finally:
        services.store.writer.point_feeds.discard(feed)


async def show_fleet_telemetry(call: Call) -> web.StreamResponse:
    query: FleetQuery = call.query
    wanted = fleet_range(query, call.services.limits)
    if query.format not in ("json", "csv"):
        raise Refusal("bad_query", FieldError("format", "is neither json nor csv"))
    if query.spreadsheet is not None and query.format != "csv":
        raise Refusal("bad_query", FieldError("spreadsheet", "needs format=csv"))
    if query.follow:
        if query.format == "csv":
            raise Refusal("bad_query", FieldError("format", "cannot be csv with follow"))
        return await follow_points(call, wanted)
    names = () if query.format == "csv" else wanted.columns
    pieces = latest_pieces(call, wanted, names) if query.latest else fleet_pieces(call, wanted, names)
    return await stream_rows(call, wanted, pieces)


def check_line_search(rule: Rule, limits: Limits) -> None:
    """Refusal: invalid, for a search that cannot be read."""
    try:
        if rule.condition.q:
            parse_search(rule.condition.q, limits)
    except Invalid as error:
        raise Refusal("invalid", FieldError(f"condition.log.q{error.at}", str(error))) from error


class RuleTrial:
    """A rule over what is stored of all devices that match, a part of the readings at a time."""

    def __init__(self, call: Call, rule: Rule, start: int, stop: int) -> None:
        self._call = call
        self._rule = rule
        self._range = start, stop
        self._trials: dict[str, Trial] = {}
        self._alerts = 0  # that are over
        self._found: list[tuple[str, Episode]] = []
        self.readings = 0

    async def run(self) -> None:
        """Refusal: bad_query, when there is too much."""
        limits, tenant = self._call.services.limits, self._call.tenant
        await self._find_devices()
        match self._rule.condition.kind:
            case "offline":
                await self._run_sessions()
            case "log":
                await self._run_lines()
            case _:
                await self._run_series()
        for count, (device, trial) in enumerate(self._trials.items(), 1):
            self._found += [(device, episode) for episode in trial.end(self._range[1])]
            if count % limits.fleet_page == 0:
                await wait_for_turn(self._call.services, tenant)
        self._require_few(len(self._found), limits.page_most, "alerts")

    async def _find_devices(self) -> None:
        """Those that the rule looks at; one that never sent the metric is among them."""
        fleet, limits, after = self._call.services.store.read.fleet, self._call.services.limits, ""
        while some := await fleet.devices(self._call.tenant, self._rule.match, after, limits.fleet_page):
            after = some[-1][0]
            for name, labels in some:
                if all(labels.get(label) == value for label, value in self._rule.match_labels.items()):
                    self._trials[name] = Trial(self._rule, self._range[0])

    async def _run_series(self) -> None:
        fleet, limits, place = self._call.services.store.read.fleet, self._call.services.limits, ("", "")
        wanted = FleetRange(self._rule.match, (self._rule.metric or "",), *self._range, None, ())
        while series := await fleet.series(self._call.tenant, wanted, place, limits.fleet_page):
            place = series[-1][1], series[-1][2]
            series = [each for each in series if each[1] in self._trials]
            for first in range(0, len(series), limits.fleet_series):
                await self._run_some(series[first : first + limits.fleet_series])

    async def _run_sessions(self) -> None:
        alerts, limits, names = self._call.services.store.read.alerts, self._call.services.limits, list(self._trials)
        for first in range(0, len(names), limits.fleet_series):
            await wait_for_turn(self._call.services, self._call.tenant)
            some = names[first : first + limits.fleet_series]
            for name, entries in await alerts.sessions(self._call.tenant, some, *self._range, limits.page_most):
                self._require_few(len(entries), limits.page_most, "sessions of a device")
                for at, is_connected in entries:
                    self._trials[name].take_presence(at, is_connected=is_connected)

    async def _run_lines(self) -> None:
        condition, logs, limits = self._rule.condition, self._call.services.store.read.logs, self._call.services.limits
        search = parse_search(condition.q, limits) if condition.q else None
        wanted = LogFilter(None, self._rule.match, condition.level, search, *self._range)
        last, newest, times = 0, await logs.newest(), dict[str, list[int]]()
        while lines := await logs.matches(self._call.tenant, wanted, last, newest, limits.trial_readings):
            await wait_for_turn(self._call.services, self._call.tenant)
            last, self.readings = lines[-1][0], self.readings + len(lines)
            self._require_few(self.readings, limits.trial_most, "lines")
            for _, _, name, at in lines:
                times.setdefault(name, []).append(at)
        for name in times.keys() & self._trials.keys():
            for at in sorted(times[name]):
                self._trials[name].take_line(at)

    @staticmethod
    def _require_few(count: int, most: int, what: str) -> None:
        if count > most:
            raise Refusal("bad_query", FieldError("from", f"gives more than {most:,} {what}: take fewer devices or less time"))

    async def _run_some(self, series: list[tuple[int, str, str]]) -> None:
        fleet, limits = self._call.services.store.read.fleet, self._call.services.limits
        todo = [(number, self._range[0], device) for number, device, _ in series]
        while todo:
            await wait_for_turn(self._call.services, self._call.tenant)
            asked = [(number, start) for number, start, _ in todo]
            parts = await fleet.readings(self._call.tenant, self._range[1], asked, limits.trial_readings // len(todo))
            for place, readings, _ in parts:
                self._judge(todo[place][2], readings)
            todo = [(todo[place][0], start, todo[place][2]) for place, _, start in parts if start is not None]

    def _judge(self, device: str, readings: list[tuple[int, Value]]) -> None:
        limits, trial = self._call.services.limits, self._trials[device]
        before = len(trial.over)
        for ts, value in readings:
            trial.take(ts, value)
        self.readings += len(readings)
        self._alerts += len(trial.over) - before
        self._require_few(self.readings, limits.trial_most, "readings")
        self._require_few(self._alerts, limits.page_most, "alerts")

    def shown(self) -> dict[str, Any]:
        start, stop = self._range
        return {
            "from": format_time(start),
            "to": format_time(stop),
            "devices": len(self._trials),
            "readings": self.readings,
            "items": [
                {
                    "device": device, "since": format_time(episode.since), "fired_at": moment_text(episode.fired_at),
                    "resolved_at": moment_text(episode.resolved_at), "value": episode.value,
                }
                for device, episode in sorted(self._found, key=lambda item: (item[1].fired_at or 0, item[0]))
            ],
        }  # fmt: skip


async def try_rule(call: Call) -> web.StreamResponse:
    """When a rule would have fired and cleared."""
    rule, query, now = await call.body(Rule), cast("TrialQuery", call.query), now_ms()
    check_rule(rule)
    check_line_search(rule, call.services.limits)
    start, stop = now - DAY if query.from_ is None else max(0, query.from_), min(now, FUTURE if query.to_ is None else query.to_)
    if start >= stop:
        raise Refusal("bad_query", FieldError("from", "is not earlier than to"))
    trial = RuleTrial(call, rule, start, stop)
    await trial.run()
    return answer(trial.shown())


async def remove_telemetry(call: Call) -> web.StreamResponse:
    """204 once the readings are gone; 202 when that takes longer than a request may, or the server stops: it goes on."""
    query: RangeQuery = call.query
    if query.from_ is None or query.to_ is None:
        raise Refusal("bad_query", FieldError("from" if query.from_ is None else "to", "is missing"))
    if query.from_ > query.to_:
        raise Refusal("bad_query", FieldError("from", "is later than to"))
    tenant, name, services = call.tenant, call.device, call.services
    start, stop = min(query.from_, LATEST), min(query.to_, LATEST)
    device_id = await services.store.read.device_id(tenant, name)
    if device_id is None:
        raise Refusal("not_found")
    removal = services.store.read.removal
    with services.registry.held(device_id):  # what it sends meanwhile must not be taken for what was there
        marks = await call.change(
            lambda connection: remove_readings(connection, tenant, name, query.metric, start, stop),
            lambda _: [Affected(name, name, {"metric": query.metric, "from": format_time(start), "to": format_time(stop)})],
        )
        services.cleaner.wanted.set()
        left = await look_until(
            services, services.limits.wait_seconds_most, lambda: removal.is_range_left(marks), lambda left: not left,
            lambda: services.store.writer.news.next, MANY_PAUSE_SECONDS,
        )  # fmt: skip
    return answer({"device": name, "status": "removing"}, 202) if left else web.Response(status=204)


async def ask_report(call: Call) -> web.StreamResponse:
    body = await call.body(ReportRequest)
    if body.what not in ("telemetry", "state"):
        raise Refusal("invalid", FieldError("what", "is neither telemetry nor state"))
    tenant, name = call.tenant, call.device
    device_id = await call.services.store.read.device_id(tenant, name)
    if device_id is None:
        raise Refusal("not_found")
    registry = call.services.registry

    def ask(connection: sqlite3.Connection) -> None:
        """In the transaction that enters it, so that the audit says what is answered: the device may have gone while that waited."""
        device_row(connection, tenant, name)
        if not registry.is_live(device_id):
            raise Refusal("device_offline")

    if not registry.is_live(device_id):
        raise Refusal("device_offline")
    await call.change(ask, what=body.what)
    registry.send(device_id, encode(Report(body.what)))  # to one that goes just now in vain, as to one whose link is broken
    return answer({"device": name, "what": body.what}, 202)


# ==== HTTP alerts ====
# Owns: the handlers of rules, alerts and silences. Must not know: SQL.


def check_future(moment: int | None, field: str = "until") -> None:
    """Refusal: invalid, for what would be over before it was made."""
    if moment is not None and moment <= now_ms():
        raise Refusal("invalid", FieldError(field, "is in the past"))


async def rule_in(call: Call) -> tuple[Rule, str]:
    """The rule in the body of a request, and its text as it is stored. Refusal: invalid."""
    content = await call.content()
    rule = call.services.codec.body(content, Rule)
    call.subject = rule.name
    if not rule.name:
        raise Refusal("invalid", FieldError("name", "is missing"))
    check_rule(rule)
    check_line_search(rule, call.services.limits)
    return rule, canonical(orjson.loads(content)).decode()


def with_problems(call: Call, rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules, each with what keeps it from judging, if something does."""
    problems = call.services.lines.problems
    return [{**rule, "problem": problems[rule["id"]]} if rule["id"] in problems else rule for rule in rules]


async def list_rules(call: Call) -> web.StreamResponse:
    query: RuleListQuery = call.query
    page = orjson.loads(await call.services.store.read.alerts.rules(call.tenant, call.page(), query.after or 0))
    return answer({"items": with_problems(call, page["items"]), "next": page["next"]})


async def show_rule(call: Call) -> web.StreamResponse:
    shown = required_text(await call.services.store.read.alerts.rule(call.tenant, number_in(call)))
    return answer(with_problems(call, [orjson.loads(shown)])[0])


async def create_rule(call: Call) -> web.StreamResponse:
    tenant, limits = call.tenant, call.services.limits
    rule, text = await rule_in(call)
    number = await call.change(
        lambda connection: insert_rule(connection, tenant, rule.name, text, call.principal.name, limits.rules),
        lambda made: [Affected(rule.name, None, {"id": made, "rule": orjson.loads(text)})],
    )
    shown = await call.services.store.read.alerts.rule(tenant, number)
    return json_response(required_text(shown), 201)


async def replace_rule(call: Call) -> web.StreamResponse:
    tenant, number = call.tenant, number_in(call)
    rule, text = await rule_in(call)
    await call.change(
        lambda connection: update_rule(
            connection, tenant, number, rule.name, text, call.principal.name, disabled=rule.disabled
        ),
        lambda _: [Affected(rule.name, None, {"id": number, "rule": orjson.loads(text)})],
    )
    return await show_rule(call)


async def remove_rule(call: Call) -> web.StreamResponse:
    tenant, number = call.tenant, number_in(call)
    await call.change(lambda connection: delete_rule(connection, tenant, number), lambda name: [Affected(name, None, {"id": number})])
    return web.Response(status=204)


async def list_alerts(call: Call) -> web.StreamResponse:
    query: AlertQuery = call.query
    severities = None if query.severity is None else tuple(SEVERITIES)[SEVERITIES[query.severity] - 1 :]
    wanted = AlertFilter(
        query.status, severities, query.rule, query.match, query.acknowledged, query.silenced, query.from_, query.to_
    )  # fmt: skip
    after = INTEGERS - 1 if query.after is None else query.after
    return json_response(await call.services.store.read.alerts.alerts(call.tenant, wanted, call.page(), after))


async def show_alert(call: Call) -> web.StreamResponse:
    wanted = AlertFilter(alert_id=number_in(call))
    found = orjson.loads(await call.services.store.read.alerts.alerts(call.tenant, wanted, 1, INTEGERS - 1))["items"]
    if not found:
        raise Refusal("not_found")
    return answer(found[0])


async def acknowledge(call: Call) -> web.StreamResponse:
    tenant, number, by, body = call.tenant, number_in(call), call.principal.name, await call.body(Acknowledgement)
    check_future(body.until)
    said = {"until": body.until, "text": body.text}
    await call.change(
        lambda connection: acknowledge_alert(connection, tenant, number, by, said),
        lambda device: [Affected(str(number), device, {"until": moment_text(body.until), "text": body.text})],
    )
    return await show_alert(call)


async def take_acknowledgement_back(call: Call) -> web.StreamResponse:
    tenant, number, by = call.tenant, number_in(call), call.principal.name
    await call.change(
        lambda connection: acknowledge_alert(connection, tenant, number, by, None), lambda device: [Affected(str(number), device)]
    )
    return await show_alert(call)


async def list_silences(call: Call) -> web.StreamResponse:
    query: RuleListQuery = call.query
    return json_response(await call.services.store.read.alerts.silences(call.tenant, call.page(), query.after or 0))


async def create_silence(call: Call) -> web.StreamResponse:
    tenant, body = call.tenant, await call.body(NewSilence)
    check_future(body.until)
    if not body.match:
        raise Refusal("invalid", FieldError("match", "is empty; * is every device"))
    call.subject = body.match
    number = await call.change(
        lambda connection: insert_silence(connection, tenant, body, call.principal.name, call.services.limits.silences),
        lambda made: [Affected(str(made), None, {**attrs.asdict(body), "until": moment_text(body.until)})],
    )
    return answer({"id": number, **attrs.asdict(body), "until": moment_text(body.until)}, 201)


async def remove_silence(call: Call) -> web.StreamResponse:
    tenant, number = call.tenant, number_in(call)
    await call.change(lambda connection: delete_silence(connection, tenant, number))
    return web.Response(status=204)


# ==== HTTP notifications ====
# Owns: the handlers of receivers of alerts, and of what was sent to them. Must not know: SQL.


@attrs.frozen
class NotificationQuery:
    """GET /notifications; `after` is the id of the last one seen."""

    limit: int | None = None
    after: int | None = None
    webhook: int | None = None
    status: NotificationStatus | None = None


async def list_webhooks(call: Call) -> web.StreamResponse:
    return json_response(await call.services.store.read.notifications.webhooks(call.tenant, call.page(), call.query.after or 0))


async def create_webhook(call: Call) -> web.StreamResponse:
    """A receiver. Its secret is shown this once."""
    tenant, limits, settings, new = call.tenant, call.services.limits, call.services.settings, await call.body(NewWebhook)
    call.subject = new.name
    check_webhook(new, networks(settings.webhook_networks), limits, mail=bool(settings.smtp_url and settings.smtp_from))
    if new.form == "webhook" and new.secret is None:
        new = attrs.evolve(new, secret=new_webhook_secret())
    shown = shown_webhook(new)
    webhook_id = await call.change(
        lambda connection: insert_webhook(connection, tenant, new, shown, limits.webhooks),
        lambda made: [Affected(str(made), None, shown)],
    )
    call.services.dispatcher.look()
    made = orjson.loads(required_text(await call.services.store.read.notifications.webhook(tenant, webhook_id)))
    return answer({**made, **({} if new.secret is None else {"secret": new.secret})}, 201)


async def delete_webhook(call: Call) -> web.StreamResponse:
    tenant, webhook_id = call.tenant, number_in(call)
    await call.change(lambda connection: remove_webhook(connection, tenant, webhook_id))
    call.services.cleaner.wanted.set()
    return web.Response(status=204)


async def renew_webhook_secret(call: Call) -> web.StreamResponse:
    """A new secret, shown this once. The old one signs, too, for some time."""
    tenant, webhook_id, body = call.tenant, number_in(call), await call.body(NewWebhookSecret)
    check_webhook_secret(body.secret)
    secret, seconds = body.secret or new_webhook_secret(), call.services.limits.old_secret_seconds
    await call.change(lambda connection: change_webhook_secret(connection, tenant, webhook_id, secret, seconds))
    made = orjson.loads(required_text(await call.services.store.read.notifications.webhook(tenant, webhook_id)))
    return answer({**made, "secret": secret}, 201)


async def test_webhook(call: Call) -> web.StreamResponse:
    """Send one notification at once, as any other, and tell what came of it. Refusal: not_found, too_many_requests."""
    services, webhook_id = call.services, number_in(call)
    await call.body(NoQuery)
    share = services.store.allowances.shares.of(call.tenant)
    if share.webhook_tests >= services.limits.webhook_tests:
        raise Refusal("too_many_requests", retry_after=1)
    receiver, tenant, repeat = await call.change(lambda connection: receiver_of(connection, call.tenant, webhook_id))
    at = now_ms()
    alert = AlertShown("test", "test", tenant, "info", None, {}, "This is a test of notifications.", None, at, None, None, stale=False)
    group = AlertGroup(webhook_id, "alertname", "test", at, repeat, 1, 0, (alert,))
    message = message_of(receiver.form, group, services.limits.alert_lines, services.settings.external_url)
    share.webhook_tests += 1
    try:
        attempt = await services.sender.send(receiver, new_message_id(), at, message)
    finally:
        share.webhook_tests -= 1
    status = "delivered" if attempt.error is None else "failed"
    return answer({"status": status, "http_status": attempt.status, "error": attempt.error})


async def list_notifications(call: Call) -> web.StreamResponse:
    query: NotificationQuery = call.query
    after = INTEGERS - 1 if query.after is None else query.after
    read = call.services.store.read.notifications
    return json_response(await read.notifications(call.tenant, query.webhook, query.status, call.page(), after))


# ==== HTTP commands ====
# Owns: the handlers of commands, and of those for many devices. Must not know: SQL.

COMMAND_FINAL: Final = ("done", "failed", "refused", "timed_out", "cancelled", "expired", "lost")
BINARY_TYPE: Final = "application/octet-stream"


def idempotency_key(call: Call) -> str | None:
    """By which a request that is sent again is known
    (https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/). Refusal: invalid."""
    key = call.request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise Refusal("invalid", FieldError("Idempotency-Key", f"is not 1 to {KEY_CHARACTERS} printable characters of ASCII"))
    return key


def wanted_command(call: Call, body: NewCommand) -> WantedCommand:
    """Refusal: invalid."""
    most = call.services.limits.command_seconds_most
    if body.timeout > most * 1000:
        raise Refusal("invalid", FieldError("timeout", f"is longer than {most:.0f}s"))
    return WantedCommand(orjson.dumps(body.argv).decode(), body.timeout, body.ttl, body.parallel, idempotency_key(call))


async def shown_command(call: Call, number: int) -> dict[str, Any]:
    """A command with all of its output that is kept, as text. Refusal: not_found."""
    decoder, output, start = OutputDecoder(), "", 0
    while found := await call.services.store.read.commands.command(call.tenant, call.device, number, start):
        shown, pieces = found
        output += decoder.take(pieces)
        if len(pieces) < OUTPUT_PIECES:
            return {**shown, "output": output + (decoder.end() if shown["status"] in COMMAND_FINAL else "")}
        start = pieces[-1].stop
        await wait_for_turn(call.services, call.tenant)
    raise Refusal("not_found")


async def answer_command(call: Call, number: int, seconds: float, status: int) -> web.StreamResponse:
    """A command as it is when it is over, or when the time is. Refusal: not_found, when its device was removed meanwhile."""
    commands, news = call.services.store.read.commands, call.services.store.writer.command_news

    async def look() -> tuple[dict[str, Any], list[OutputPiece]] | None:
        return await commands.command(call.tenant, call.device, number, most=0)

    await look_until(
        call.services, seconds, look, lambda found: found is None or found[0]["status"] in COMMAND_FINAL, lambda: news.next(number)
    )
    return answer(await shown_command(call, number), status)


async def run_command(call: Call) -> web.StreamResponse:
    """Let a device run a program."""
    body, seconds = await call.body(NewCommand), wait_seconds(call)
    wanted, actor, most = wanted_command(call, body), call.principal.actor(call.address), call.services.limits.commands_open

    def told(made: tuple[int, int, bool]) -> list[Affected]:
        number, _, is_new = made
        detail = {"argv": body.argv, "timeout": body.timeout / 1000, "ttl": body.ttl and body.ttl / 1000}
        return [Affected(str(number), call.device, detail)] if is_new else []

    number, device_id, _ = await call.change(lambda connection: insert_command(connection, actor, call.device, wanted, most), told)
    call.services.store.writer.turns.add([device_id])
    return await answer_command(call, number, seconds, 202)


async def list_commands(call: Call) -> web.StreamResponse:
    statuses = call.query.status or ()
    commands = call.services.store.read.commands
    return required(await commands.commands(call.tenant, call.device, statuses, call.page(), call.version_after()))


async def show_command(call: Call) -> web.StreamResponse:
    return answer(await shown_command(call, number_in(call)))


async def cancel_one(call: Call) -> web.StreamResponse:
    """Take a command back: at once if it was not sent; otherwise the device is told, and says what became of it."""
    number, services = number_in(call), call.services
    grace = round(services.limits.command_grace_seconds * 1000)
    device_id, is_sent = await call.change(lambda connection: cancel_command(connection, call.tenant, call.device, number, grace))
    if is_sent:
        services.registry.send(device_id, cancel_frame(number).encode())
    else:
        services.store.writer.command_news.ring(number)
        services.store.writer.turns.add([device_id])
    return await answer_command(call, number, wait_seconds(call), 202)


class OutputForm(Protocol):
    """How what a command wrote is sent."""

    content_type: str

    def take(self, pieces: list[OutputPiece]) -> bytes: ...
    def end(self) -> bytes: ...


class RawOutput:
    """The bytes as they are."""

    content_type = BINARY_TYPE

    def take(self, pieces: list[OutputPiece]) -> bytes:
        return b"".join(piece.data for piece in pieces)

    def end(self) -> bytes:
        return b""


class TextOutput:
    """As text, whatever the bytes are."""

    content_type = "text/plain; charset=utf-8"

    def __init__(self) -> None:
        self._decoder = OutputDecoder()

    def take(self, pieces: list[OutputPiece]) -> bytes:
        return self._decoder.take(pieces).encode()

    def end(self) -> bytes:
        return self._decoder.end().encode()


class LinesOfOutput:
    """A line of JSON for each part, with its stream and time."""

    content_type = "application/x-ndjson"

    def __init__(self) -> None:
        self._decoder = OutputDecoder()

    def take(self, pieces: list[OutputPiece]) -> bytes:
        return b"".join(self._line(piece.stream, piece.at, self._decoder.take([piece])) for piece in pieces)

    def end(self) -> bytes:
        return b""

    @staticmethod
    def _line(stream: str, at: int, text: str) -> bytes:
        return orjson.dumps({"at": format_time(at), "stream": stream, "data": text}, option=orjson.OPT_APPEND_NEWLINE)


OUTPUT_FORMS: Final[Mapping[str, Callable[[], OutputForm]]] = MappingProxyType(
    {"text": TextOutput, "raw": RawOutput, "ndjson": LinesOfOutput}
)


async def output_pieces(call: Call, number: int, *, follow: bool) -> AsyncIterator[list[OutputPiece]]:
    """What a command wrote, as it comes; up to its end, or that of the server."""
    services, start = call.services, 0
    commands, news = services.store.read.commands, services.store.writer.command_news
    while True:
        ring = news.next(number)
        found = await commands.command(call.tenant, call.device, number, start)
        if found is None:  # its device was removed
            return
        shown, pieces = found
        if pieces:
            start = pieces[-1].stop
            yield pieces
        if len(pieces) < OUTPUT_PIECES:
            if not follow or shown["status"] in COMMAND_FINAL or services.registry.closing.is_set():
                return
            await Bell.heard(ring, services.limits.feed_seconds)
        await wait_for_turn(services, call.tenant)


async def show_output(call: Call) -> web.StreamResponse:
    """What a command wrote; with `follow` also what it writes from now on, up to its end. Refusal: bad_query, not_found, too_many_feeds."""
    query, services, number = cast(OutputQuery, call.query), call.services, number_in(call)
    form = OUTPUT_FORMS[query.format]()
    if await services.store.read.commands.command(call.tenant, call.device, number, most=0) is None:
        raise Refusal("not_found")
    follower = services.registry.follower(call.tenant, "output", services.limits.feeds) if query.follow else nullcontext()
    with follower, services.registry.feed(call.request.transport):
        async with streaming(call, form.content_type) as response:
            async for pieces in output_pieces(call, number, follow=query.follow):
                wanted = [piece for piece in pieces if query.stream in (None, piece.stream)]
                if text := form.take(wanted):
                    async with asyncio.timeout(services.limits.stall_seconds):
                        await response.write(text)
            await response.write(form.end())
    return response


async def batch_of(call: Call, number: int, most: int, after: int = 0) -> dict[str, Any]:
    """A command for many, with so many of its commands. Refusal: not_found."""
    found = await call.services.store.read.commands.batch(call.tenant, number, most, after, call.services.limits.output_shown)
    if found is None:
        raise Refusal("not_found")
    return found


async def run_command_on_many(call: Call) -> web.StreamResponse:
    """Let all devices whose name matches run a program."""
    body = await call.body(NewCommandBatch)
    if not body.match:
        raise Refusal("invalid", FieldError("match", "is missing or empty; * is every device"))
    call.subject = body.match
    one, actor, most = wanted_command(call, body), call.principal.actor(call.address), call.services.limits.batches_open
    wanted = WantedBatch(**attrs.asdict(one), match=body.match, per_minute=body.per_minute, failures_most=body.stop_after_failures)

    def told(made: tuple[int, bool]) -> list[Affected]:
        number, is_new = made
        detail = {"batch": number, "argv": body.argv, "timeout": body.timeout / 1000, "ttl": body.ttl and body.ttl / 1000}
        return [Affected(body.match, None, detail)] if is_new else []

    number, _ = await call.change(lambda connection: insert_batch(connection, actor, wanted, most), told)
    call.services.store.writer.turns.wanted.set()
    return answer(await batch_of(call, number, call.services.limits.page), 202)


async def list_batches(call: Call) -> web.StreamResponse:
    return json_response(await call.services.store.read.commands.batches(call.tenant, call.page(), call.version_after()))


async def show_batch(call: Call) -> web.StreamResponse:
    return answer(await batch_of(call, number_in(call), call.page(), call.query.after or 0))


async def cancel_many(call: Call) -> web.StreamResponse:
    """Give a command for many to no more of them; those that have it go on."""
    number, services = number_in(call), call.services
    ended = await call.change(lambda connection: cancel_batch(connection, call.tenant, number, services.limits.command_devices))
    for command, _ in ended:
        services.store.writer.command_news.ring(command)
    services.store.writer.turns.add(device_id for _, device_id in ended)
    return answer(await batch_of(call, number, call.services.limits.page), 202)


# ==== HTTP tunnels ====
# Owns: an operator's side of a tunnel. Must not know: SQL.


OPERATOR_GONE: Final = "the operator's connection broke"
OPERATOR_LEFT: Final = "the operator closed the connection"
MESSAGE_TOO_LONG: Final = "the operator sent a message of more than 1 MiB"
OPERATOR_BYTES: Final = 1024 * 1024  # of a message: it is in memory until the device has room for all of it
BOTH_ENDED: Final = "both sides came to their end"


def without_operator(tunnel: Tunnel | None) -> str:
    """Why a tunnel ends whose operator's connection has ended."""
    return OPERATOR_LEFT if tunnel is not None and tunnel.operator_ended else OPERATOR_GONE


def close_payload(code: int, why: str = "") -> bytes:
    """Of a close frame: a reason has at most 123 bytes (RFC 6455, section 5.5)."""
    return struct.pack("!H", code) + why.encode()[:123].decode(errors="ignore").encode()


TCP_INFO: Final = struct.Struct("=3xB20xI28xI")  # its tcpi_probes, tcpi_unacked and tcpi_last_ack_recv


def look_after(connection: socket.socket | None) -> None:
    """Let the system ask a silent peer whether it is there, after 10 s and three times; but not break a connection because the peer
    takes nothing: its program may stand still for as long as it likes."""
    if connection is None:
        return
    options = {"TCP_USER_TIMEOUT": 0, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    with suppress(OSError):  # it has ended already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_gone(connection: socket.socket | None, seconds: float, unheard: float) -> bool:
    """Whether the peer's system has confirmed nothing for so long of what it was sent, or asked, as Linux tells (struct tcp_info of
    <linux/tcp.h>). One that has no room says so, and is asked ever more seldom: that is no silence. Elsewhere: whether nothing was heard
    of the peer for three times as long, by `unheard` in seconds."""
    if connection is None or sys.platform != "linux":
        return unheard > 3 * seconds
    try:
        unanswered, unconfirmed, silent = TCP_INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size))
    except (OSError, struct.error):
        return unheard > 3 * seconds
    return bool(silent > seconds * 1000 and (unconfirmed or unanswered > 1))


TUNNEL_PROTOCOL: Final = "iiot.tunnel.v1"  # a message without bytes is the end of a direction, and a close the end of both


class OperatorSocket(web.WebSocketResponse):
    """A WebSocket that is closed by whoever uses it, with one close frame."""

    def __init__(self) -> None:
        super().__init__(
            autoping=False, autoclose=False, compress=False, decode_text=False, max_msg_size=OPERATOR_BYTES, protocols=(TUNNEL_PROTOCOL,)
        )

    async def write_eof(self, data: bytes = b"") -> None:
        self._eof_sent = True


class OperatorLeg:
    """An operator's WebSocket: the bytes of binary messages, one after the other, are those of the stream. That it is closed is the end
    of what the operator sends; what the device sends goes on until its own end. Who speaks `TUNNEL_PROTOCOL` says that in other words,
    and so learns whether what it sent after the device's end arrived, too."""

    def __init__(self, link: OperatorSocket, tunnel: Tunnel, limits: Limits, idle: float) -> None:
        self._link = link
        self._tunnel = tunnel
        self._limits = limits
        self._idle = idle
        self._heard = time.monotonic()
        self._is_writing = False
        self._has_closed = False

    async def carry(self) -> None:
        """Until both directions are at their end. TunnelOver."""
        try:
            async with asyncio.TaskGroup() as group:
                both = [group.create_task(self._to_operator()), group.create_task(self._to_device())]
                watches = [group.create_task(self._watch()), group.create_task(self._until_over())]
                await asyncio.wait(both)
                for watch in watches:
                    watch.cancel()
            if self._link.ws_protocol:
                await self._link.send_frame(close_payload(WSCloseCode.OK), WSMsgType.CLOSE)
        except* (TunnelOver, ConnectionError) as errors:
            over = [str(error) for error in errors.exceptions if isinstance(error, TunnelOver)]
            raise TunnelOver(over[0] if over else without_operator(self._tunnel)) from None

    async def _to_operator(self) -> None:
        while data := await self._tunnel.read():
            self._is_writing = True
            await self._link.send_bytes(data)
            self._is_writing = False
            self._tunnel.consumed(len(data))
        if self._link.ws_protocol:
            await self._link.send_bytes(b"")
        else:
            self._has_closed = True  # nothing may come after it (RFC 6455, section 5.5.1)
            await self._link.send_frame(close_payload(WSCloseCode.OK), WSMsgType.CLOSE)

    async def _to_device(self) -> None:
        while True:
            message = await self._link.receive()
            self._heard = time.monotonic()
            if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                if not message.data and self._link.ws_protocol:
                    self._tunnel.finish()
                    return
                await self._tunnel.write(message.data)
            elif message.type == WSMsgType.PING:
                await self._link.pong(message.data)
            elif message.type == WSMsgType.CLOSE or (self._tunnel.is_read and not self._link.ws_protocol):
                self._tunnel.finish()
                return
            elif message.type != WSMsgType.PONG:
                raise TunnelOver(MESSAGE_TOO_LONG if self._link.close_code == WSCloseCode.MESSAGE_TOO_BIG else OPERATOR_GONE)

    async def _until_over(self) -> None:
        """Whoever waits for the operator hears of the end, too: one that does not read holds up nobody."""
        await self._tunnel.ended.wait()
        raise TunnelOver(self._tunnel.over)

    async def _watch(self) -> None:
        """Ping the operator, for what lies between forgets connections without bytes. Its program may stand still, stopped say, with much
        that it has not read: it is gone when its system confirms nothing either."""
        limits, connection, pinged = self._limits, self._link.get_extra_info("socket"), time.monotonic()
        look_after(connection)
        while True:
            await asyncio.sleep(min(limits.tunnel_look_seconds, limits.tunnel_ping_seconds, self._idle / 4))
            now = time.monotonic()
            if now - self._tunnel.moved > self._idle:
                raise TunnelOver(f"no bytes in either direction for {self._idle:g} s")
            if is_gone(connection, limits.tunnel_gone_seconds, 0.0 if self._tunnel.operator_ended else now - self._heard):
                raise TunnelOver(OPERATOR_GONE)
            if now - pinged >= limits.tunnel_ping_seconds and not (self._is_writing or self._has_closed):
                pinged = now
                await self._link.ping()

    async def say_why(self, why: str) -> None:
        """Close; an operator that does not read is not waited for."""
        if self._has_closed:
            return
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(self._limits.stop_close_seconds):
                await self._link.send_frame(close_payload(WSCloseCode.INTERNAL_ERROR, why), WSMsgType.CLOSE)

    async def hang_up(self, seconds: float) -> None:
        """Wait so long until the operator has closed too."""
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(seconds):
                while (await self._link.receive()).type in (WSMsgType.BINARY, WSMsgType.TEXT, WSMsgType.PING, WSMsgType.PONG):
                    pass


def port_in(call: Call) -> int:
    """The port in the address of a request. Refusal: not_found, for what is none."""
    text = call.request.match_info["port"]
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65_536):
        raise Refusal("not_found")
    return int(text)


class CarriedTunnel:
    """A tunnel from its opening to its entry in the audit."""

    def __init__(self, call: Call, device_id: int, owner: TunnelOwner) -> None:
        self._call = call
        self._device_id = device_id
        self._tunnels: Tunnels | None = None
        self._owner = owner
        self._tunnel: Tunnel | None = None
        self._why = "the server failed"
        self._accounted = False

    async def carry(self, port: int) -> web.StreamResponse:
        """Nothing is read from the operator before the device has opened the port. Refusal: device_offline, too_many_tunnels,
        tunnel_refused, tunnel_timeout."""
        try:
            self._tunnels = self._call.services.registry.tunnels(self._device_id)  # of the session that the device has by now
            if self._tunnels is None:
                raise Refusal("device_offline")
            tunnel = self._tunnel = self._tunnels.open(port, self._owner)
            await self._wait_until_open(tunnel)
        except Refusal as refusal:
            self._why = refusal.errors[0].message if refusal.errors else refusal.fault.message
            raise
        except asyncio.CancelledError:
            self._why = self._cancelled()
            raise
        services = self._call.services
        link = OperatorSocket()
        await link.prepare(self._call.request)
        leg = OperatorLeg(link, tunnel, services.limits, services.settings.tunnel_idle)
        try:
            await leg.carry()
            self._why = BOTH_ENDED
        except TunnelOver as over:
            self._why = str(over)
            await leg.say_why(self._why)
        except asyncio.CancelledError:
            self._why = self._cancelled()
            await leg.say_why(self._why)
            raise
        finally:
            await self.account()
            limits, closing = services.limits, services.registry.closing
            await leg.hang_up(limits.stop_close_seconds if closing.is_set() else limits.close_seconds)
        return link

    async def _wait_until_open(self, tunnel: Tunnel) -> None:
        try:
            async with asyncio.timeout(self._call.services.limits.tunnel_open_seconds):
                await tunnel.answered.wait()
        except TimeoutError:
            raise Refusal("tunnel_timeout") from None
        if tunnel.over is not None:
            raise Refusal("tunnel_refused", FieldError("port", tunnel.over))

    def _cancelled(self) -> str:
        """Why the request ended."""
        if self._tunnel is not None and self._tunnel.is_read:
            return BOTH_ENDED
        if self._call.services.registry.closing.is_set():
            return FAULTS["shutting_down"].message
        running = self._call.running
        if running is None or not running.client_gone:
            return "the operator's token is valid no more"
        return without_operator(self._tunnel)

    async def account(self) -> None:
        """Enter the end in the audit, once; where that cannot be stored, the next start does."""
        if self._accounted:
            return
        self._accounted = True
        tunnel, read, written = self._tunnel, 0, 0
        if tunnel is not None and self._tunnels is not None:
            self._tunnels.close(tunnel, self._why)
            read, written = tunnel.from_device, tunnel.to_device
        try:
            await self._call.services.store.writer.change(
                lambda connection: end_tunnels(connection, "id = :id", self._why, read, written, id=self._owner.id)
            )
        except Refusal as refusal:
            log.error("cannot enter the end of tunnel %d in the audit: %s", self._owner.id, refusal)


async def open_tunnel(call: Call) -> web.StreamResponse:
    """GET /iiot/{device}/tunnel/{port}: a WebSocket whose bytes go to that port of the device. It is entered in the audit before the
    device hears of it."""
    services, tenant, port = call.services, call.tenant, port_in(call)
    if call.request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
        raise Refusal("upgrade_required")
    if not OperatorSocket().can_prepare(call.request).ok:
        raise Refusal("upgrade_required", FieldError("Upgrade", "is not a whole handshake of a WebSocket"))
    device_id = await services.store.read.device_id(tenant, call.device)
    if device_id is None:
        raise Refusal("not_found")
    if services.registry.tunnels(device_id) is None:
        raise Refusal("device_offline")
    actor, since = call.principal.actor(call.address), now_ms()
    number = await call.change(
        lambda connection: insert_tunnel(connection, actor, device_id, port), lambda _: [Affected(str(port), call.device)]
    )
    carried = CarriedTunnel(call, device_id, TunnelOwner(number, actor.name, call.address, since))
    try:
        return await carried.carry(port)
    finally:
        await carried.account()


async def list_tunnels(call: Call) -> web.StreamResponse:
    """Those that are open now."""
    device_id = await call.services.store.read.device_id(call.tenant, call.device)
    if device_id is None:
        raise Refusal("not_found")
    tunnels = call.services.registry.tunnels(device_id)
    return answer({"items": [] if tunnels is None else tunnels.shown(), "next": None})


async def close_tunnel(call: Call) -> web.StreamResponse:
    device_id = await call.services.store.read.device_id(call.tenant, call.device)
    tunnels = None if device_id is None else call.services.registry.tunnels(device_id)
    tunnel = None if tunnels is None else tunnels.find(number_in(call))
    if tunnel is None:
        raise Refusal("not_found")
    await call.change(lambda _: None)
    if not tunnel.over:
        tunnel.breach(f"closed by {call.principal.name}")
    return web.Response(status=204)


# ==== HTTP API ====
# Owns: the route table and its handlers: a request in, JSON out. Must not know: SQL.

def attention_after(after: str) -> tuple[int, str]:
    """The weight and the name of a device, after which a page begins. Refusal: bad_query."""
    found = re.fullmatch(rf"{ATTENTION}([0-9]{{1,3}}) (\S+)", after)
    if found is None:
        raise Refusal("bad_query", FieldError("after", "is of a list in another order"))
    return int(found[1]), found[2]


async def list_devices(call: Call) -> web.StreamResponse:
    query: DeviceQuery = call.query
    read, after = call.services.store.read, query.after or ""
    if query.sort == "name":
        if after.startswith(ATTENTION):
            raise Refusal("bad_query", FieldError("after", "is of a list in another order"))
        return json_response(await read.devices(call.tenant, call.page(), after, query.match, connected=query.connected))
    begin = attention_after(after) if after else (ATTENTION_MOST, "")
    return json_response(await read.devices_by_attention(call.tenant, call.page(), begin, query.match, connected=query.connected))


async def show_summary(call: Call) -> web.StreamResponse:
    return json_response(await call.services.store.read.summary(call.tenant, call.query.match))


async def show_device(call: Call) -> web.StreamResponse:
    return required(await call.services.store.read.device(call.tenant, call.device))


async def register_device(call: Call) -> web.StreamResponse:
    tenant, token = call.tenant, mint("dev")
    try:
        name = check_device_name(call.device)
    except Invalid as error:
        raise Refusal("invalid", FieldError("device", str(error))) from error
    await call.body(NoQuery)
    if call.match is not None:  # it asks for a device that is there already
        raise Refusal("precondition_failed")
    most = call.services.settings.quota_devices
    try:
        await call.change(lambda connection: insert_device(connection, tenant, name, token.stored, call.by, most))
    except Refusal as refusal:
        if refusal.fault.code == "device_exists":  # If-None-Match: * asks for just that
            call.require(None)
        raise
    return answer({"device": name, "token": token.text}, 201)


async def patch_device(call: Call) -> web.StreamResponse:
    tenant, name, body = call.tenant, call.device, await call.body(DevicePatch)
    device_id = await call.change(
        lambda connection: update_device(connection, tenant, name, body, call.by, call.services.limits.labels),
        **attrs.asdict(body, filter=lambda _, value: value not in (None, {})),
    )
    call.services.senders.forget()
    if body.disabled:
        call.services.registry.end(device_id, "device_disabled")
    return await show_device(call)


async def rotate_device_token(call: Call) -> web.StreamResponse:
    tenant, name, token, body = call.tenant, call.device, mint("dev"), await call.body(Rotation)
    device_id = await call.change(
        lambda connection: rotate_token(connection, tenant, name, token.stored, call.by, revoke=body.revoke),
        token=token.stored.id, revoke=body.revoke,
    )  # fmt: skip
    if body.revoke:
        call.services.registry.end(device_id, "credentials_revoked")
    return answer({"device": name, "token": token.text}, 201)


async def delete_device(call: Call) -> web.StreamResponse:
    tenant, name = call.tenant, call.device
    device_id = await call.change(lambda connection: remove_device(connection, tenant, name, call.by))
    call.services.senders.forget()
    call.services.registry.end(device_id, "device_removed")
    call.services.store.writer.command_news.ring_all()  # some may wait for one of its commands
    call.services.cleaner.wanted.set()
    return web.Response(status=204)


async def reset_counter(call: Call) -> web.StreamResponse:
    """Set the counter, and end the session, which was told the old one. Frames that it sent just before may have raised it again,
    and another session may have been told that: so both once more."""
    tenant, name, seq, services = call.tenant, call.device, (await call.body(CounterReset)).seq, call.services
    device_id = await call.change(lambda connection: reset_seq(connection, tenant, name, seq, call.by), seq=seq)
    services.registry.end(device_id, "seq_reset")
    await services.store.writer.change(lambda connection: set_seq(connection, device_id, seq))
    services.registry.end(device_id, "seq_reset")
    return answer({"device": name, "seq": seq})


async def list_events(call: Call) -> web.StreamResponse:
    query: EventQuery = call.query
    after = INTEGERS - 1 if query.after is None else query.after
    read = call.services.store.read
    return required(await read.events(call.tenant, call.device, call.page(), after, query.kind, query.from_, query.to_))


FINAL: Final = ("applied", "rejected", "timed_out", "superseded")


async def show_state(call: Call) -> web.StreamResponse:
    query: StateQuery = call.query
    if query.at is not None and query.version is not None:
        raise Refusal("bad_query", FieldError("version", "is not for a request with at"))
    return required(await call.services.store.read.state(call.tenant, call.device, query.at, query.version))


async def list_states(call: Call) -> web.StreamResponse:
    return required(await call.services.store.read.state_history(call.tenant, call.device, call.page(), call.version_after()))


def version_tag(version: int, status_at: str | None = None) -> str:
    """The entity tag of a device's configuration; version 0 is none at all. With the time of its status it changes with that too."""
    return f'"{version}-{parse_rfc3339(status_at)}"' if status_at else f'"{version}"'


async def show_config(call: Call) -> web.StreamResponse:
    text = await call.services.store.read.config(call.tenant, call.device)
    response = required(text)
    shown = orjson.loads(text or "")
    version, tag = shown["version"], version_tag(shown["version"], shown.get("status_at"))
    response.headers[hdrs.ETAG] = tag
    if not is_met(versions(call.match), None, version_tag(version), exists=version > 0):
        raise Refusal("precondition_failed")
    if not is_met(None, call.none_match, tag, exists=version > 0):
        return web.Response(status=304, headers={hdrs.ETAG: tag})
    return response


async def list_configs(call: Call) -> web.StreamResponse:
    return required(await call.services.store.read.config_history(call.tenant, call.device, call.page(), call.version_after()))


def new_config(call: Call, document: str) -> NewConfig:
    """What is pushed, by whom, and for how long a verdict is awaited. Refusal: bad_query."""
    limits = call.services.limits
    timeout = round(limits.config_seconds * 1000) if call.query.timeout is None else cast(int, call.query.timeout)
    if timeout > limits.config_seconds_most * 1000:
        raise Refusal("bad_query", FieldError("timeout", f"is longer than {limits.config_seconds_most:.0f}s"))
    return NewConfig(document, call.principal.name, timeout)


async def answer_push(call: Call, pushed: list[Pushed], document: bytes, seconds: float, pause: float = 0.0) -> list[dict[str, Any]]:
    """Send what was pushed; each device with its status, or with its verdict if that was waited for and came. Devices that were
    removed meanwhile are left out."""
    send, read, tenant = call.services.registry.send_config, call.services.store.read, call.tenant
    sent = {row.device_id for row in pushed if send(row.device_id, row.version, document)}
    rows = {row.device: row for row in pushed}
    seen = await look_until(
        call.services, seconds, lambda: read.pushed(tenant, pushed), lambda seen: all(row["status"] in FINAL for row in seen),
        lambda: call.services.news.ring(tenant), pause,
    )  # fmt: skip
    for row in seen:
        if row["status"] == "pending" and rows[row["device"]].device_id in sent:  # that it is sent is on its way to the disk
            row["status"] = "sent"
    return [{name: value for name, value in row.items() if value is not None} for row in seen]


async def answer_one(call: Call, pushed: Pushed, document: bytes, seconds: float) -> web.StreamResponse:
    """Refusal: not_found, when the device was removed meanwhile."""
    rows = await answer_push(call, [pushed], document, seconds)
    if not rows:
        raise Refusal("not_found")
    return answer(rows[0], 202)


def require_version(call: Call) -> Callable[[int], None]:
    """The conditions of a request, for the version of the wanted configuration."""
    return lambda version: call.require(version_tag(version), exists=version > 0)


async def push_one(call: Call) -> web.StreamResponse:
    tenant, document = call.tenant, canonical(call.services.codec.document(await call.content()))
    new, seconds = new_config(call, document.decode()), wait_seconds(call)
    pushed = await call.change(
        lambda connection: push_to_one(connection, tenant, call.device, new, require_version(call)), lambda row: pushed_to([row])
    )
    return await answer_one(call, pushed, document, seconds)


async def push_back(call: Call) -> web.StreamResponse:
    tenant, body, new, seconds = call.tenant, await call.body(Rollback), new_config(call, ""), wait_seconds(call)
    pushed, document = await call.change(
        lambda connection: roll_back(connection, tenant, call.device, body.version, new, require_version(call)),
        lambda outcome: pushed_to([outcome[0]], document_of=body.version),
    )
    return await answer_one(call, pushed, document.encode(), seconds)


async def push_many(call: Call) -> web.StreamResponse:
    tenant, body = call.tenant, await call.body(Push)
    if not body.match:
        raise Refusal("invalid", FieldError("match", "is empty; * is every device"))
    call.subject = body.match
    document = canonical(body.config)
    new, seconds = new_config(call, document.decode()), wait_seconds(call)
    actor, pusher = call.principal.actor(call.address), call.services.pusher
    count, document_id = await call.change(
        lambda connection: begin_push(connection, actor, body.match, new),
        lambda begun: [Affected(body.match, None, {"devices": begun[0]})],  # and each of them when it is its turn
    )
    if not count:
        return answer({"items": []}, 202)
    await pusher.made(document_id)
    rows = await call.services.store.read.pushed_with(tenant, document_id)
    return answer({"items": await answer_push(call, rows, document, seconds, MANY_PAUSE_SECONDS if seconds else 0.0)}, 202)


async def feed_pieces(services: Services, tenant: int, feed: Subscription, last: int) -> AsyncIterator[bytes]:
    """The events after the last one seen, as they come; a comment where there is none for a while. Ends with the server."""
    limits = services.limits
    await services.news.watching()
    while not services.registry.closing.is_set():
        if feed.behind:
            feed.catch_up()
            while events := await services.store.read.feed(tenant, last, limits.feed_events):
                last = events[-1][0]
                yield b"".join(event_lines(*event) for event in events)
        last, lines = feed.take(last)
        if lines:
            yield lines
        elif not feed.behind:
            try:
                async with asyncio.timeout(limits.feed_seconds):
                    await feed.ring.wait()
            except TimeoutError:
                yield b":\n\n"


async def follow_events(call: Call) -> web.StreamResponse:
    """The tenant's events as they are committed (server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    services, tenant = call.services, call.tenant
    shown, last = call.request.headers.get("Last-Event-ID", ""), cast("int | None", call.query.after)
    if shown:  # of a reconnect: newer than what the address says
        if not (shown.isascii() and shown.isdigit() and len(shown) < 19):
            raise Refusal("invalid", FieldError("Last-Event-ID", "is not the id of an event"))
        last = int(shown)
    newest = await services.store.read.last_event(tenant)
    is_of_another = last is not None and last > await services.store.read.news.highest()  # a backup was restored
    asked, last = last, newest if last is None else min(last, newest)
    with services.news.subscription(tenant) as feed, services.registry.feed(call.request.transport):
        async with streaming(call, "text/event-stream") as response:
            if is_of_another:
                told = orjson.dumps({"id": newest, "kind": "reset", "asked": asked}).decode()
                await response.write(event_lines(newest, "reset", told))
            async for lines in feed_pieces(services, tenant, feed, last):
                async with asyncio.timeout(services.limits.stall_seconds):
                    await response.write(lines)
        return response


async def list_keys(call: Call) -> web.StreamResponse:
    return json_response(await call.services.store.read.accounts.provisioning_keys(call.tenant, call.page(), call.query.after or ""))


async def create_key(call: Call) -> web.StreamResponse:
    tenant, key, body = call.tenant, mint("prov"), await call.body(NewProvisioningKey)
    if body.uses is not None and body.uses < 1:
        raise Refusal("invalid", FieldError("uses", "is not at least 1"))
    check_future(body.expires_at, "expires_at")
    await call.change(
        lambda connection: insert_provisioning_key(connection, tenant, key.stored, body.expires_at, body.uses),
        lambda _: [Affected(key.stored.id, None, {"uses": body.uses, "expires_at": moment_text(body.expires_at)})],
    )
    return answer({"id": key.stored.id, "key": key.text}, 201)


async def delete_key(call: Call) -> web.StreamResponse:
    tenant, key_id = call.tenant, call.request.match_info["id"]
    await call.change(lambda connection: delete_provisioning_key(connection, tenant, key_id))
    return web.Response(status=204)


async def list_tokens(call: Call) -> web.StreamResponse:
    accounts = call.services.store.read.accounts
    return json_response(await accounts.operator_tokens(call.principal.tenant_id, call.page(), call.query.after or ""))


async def create_token(call: Call) -> web.StreamResponse:
    """A token of the caller's own tenant, or of the platform for its own; not above the caller's role."""
    who, token, body = call.principal, mint("op"), await call.body(NewToken)
    call.subject = body.name
    if body.role not in (*RANKS, "platform"):
        raise Refusal("invalid", FieldError("role", f"is not one of {', '.join((*RANKS, 'platform'))}"))
    check_future(body.expires_at, "expires_at")
    if (body.role == "platform") != (who.tenant_id is None) or not who.may(body.role):
        raise Refusal("forbidden")
    await call.change(
        lambda connection: insert_operator_token(connection, who.tenant_id, token.stored, body.name, body.role, body.expires_at),
        lambda _: [Affected(token.stored.id, None, {"name": body.name, "role": body.role, "expires_at": moment_text(body.expires_at)})],
    )
    return answer({"id": token.stored.id, "name": body.name, "role": body.role, "token": token.text}, 201)


async def revoke_token(call: Call) -> web.StreamResponse:
    tenant, token_id = call.principal.tenant_id, call.request.match_info["id"]
    await call.change(lambda connection: delete_operator_token(connection, tenant, token_id))
    call.services.registry.end_requests(token_id)
    return web.Response(status=204)


async def whoami(call: Call) -> web.StreamResponse:
    who, quotas = call.principal, None
    if who.tenant_id is not None:
        quotas = await call.services.store.read.accounts.quotas(who.tenant_id, default_quotas(call.services.settings))
    expires_at = moment_text(who.expires_at)
    known = {"id": who.token_id, "name": who.name, "role": who.role, "tenant": who.tenant, "expires_at": expires_at}
    return answer({**known, "quotas": orjson.Fragment(quotas or "null")})


async def list_tenants(call: Call) -> web.StreamResponse:
    quotas = default_quotas(call.services.settings)
    return json_response(await call.services.store.read.accounts.tenants(call.page(), call.query.after or "", quotas))


async def create_tenant(call: Call) -> web.StreamResponse:
    """A tenant with its first admin token: who asks for it has no other way in."""
    token, body = mint("op"), await call.body(NewTenant)
    call.subject = body.name
    await call.change(
        lambda connection: insert_tenant(connection, body.name, token.stored, body.quotas),
        lambda _: [Affected(body.name, None, {"quotas": body.quotas, "token": token.stored.id})],
    )
    return answer({"name": body.name, "token": token.text}, 201)


async def patch_tenant(call: Call) -> web.StreamResponse:
    name, body = call.request.match_info["tenant"], await call.body(TenantPatch)
    tenant, *own = await call.change(lambda connection: set_quotas(connection, name, body.quotas), quotas=body.quotas)
    defaults = default_quotas(call.services.settings)
    call.services.registry.set_quotas(tenant, with_defaults(dict(zip(QUOTAS_WATCHED, own, strict=True)), defaults))
    return json_response(await call.services.store.read.accounts.quotas(tenant, defaults) or "null")


async def delete_tenant(call: Call) -> web.StreamResponse:
    name = call.request.match_info["tenant"]
    if call.query.confirm != name:
        raise Refusal("bad_query", FieldError("confirm", "does not repeat the tenant's name"))
    tenant = await call.change(lambda connection: remove_tenant(connection, name))
    call.services.senders.forget()
    call.services.registry.end_tenant(tenant)
    call.services.cleaner.wanted.set()
    return web.Response(status=204)


async def stream_audit(call: Call, wanted: AuditFilter) -> web.StreamResponse:
    """All that is wanted of the audit, oldest first, a line of JSON each (https://github.com/ndjson/ndjson-spec)."""
    limits, accounts = call.services.limits, call.services.store.read.accounts
    last: int | None = 0 if call.query.after is None else call.query.after
    async with streaming(call, "application/x-ndjson") as response:
        while last is not None:
            lines, last = await accounts.audit_lines(call.principal.tenant_id, wanted, limits.audit_rows, last)
            async with asyncio.timeout(limits.stall_seconds):
                await response.write(lines.encode())
    return response


async def show_audit(call: Call) -> web.StreamResponse:
    query: AuditQuery = call.query
    wanted = AuditFilter(query.actor, query.action, query.device, query.from_, query.to_)
    if query.format == "ndjson" and query.limit is None:
        return await stream_audit(call, wanted)
    if query.format != "json":
        problem = FieldError("limit", "is not for format=ndjson, which is the whole range")
        raise Refusal("bad_query", problem if query.format == "ndjson" else FieldError("format", "is neither json nor ndjson"))
    after = INTEGERS - 1 if query.after is None else query.after
    return json_response(await call.services.store.read.accounts.audit(call.principal.tenant_id, wanted, call.page(), after))


async def show_page(call: Call) -> web.StreamResponse:
    """The page for a browser, and for all others what this is."""
    if not accepts(call.request, hdrs.ACCEPT, "text/html"):
        return answer({"name": "iiot", "version": VERSION, "page": "open this address in a browser"})
    page = call.services.page
    if page is None:
        raise Refusal("not_found", FieldError("dashboard.html", "is not beside iiot.py, or damaged"))
    headers = {  # weak: the same page is sent as it is, and compressed
        hdrs.ETAG: f"W/{page.tag}", "Content-Security-Policy": page.policy, "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
    }  # fmt: skip
    if not is_met(None, call.none_match, page.tag):
        return web.Response(status=304, headers=headers)
    response = web.Response(body=page.body, content_type="text/html", charset="utf-8", headers=headers)
    compress(call.request, response)
    response.headers[hdrs.VARY] = f"{hdrs.ACCEPT}, {hdrs.ACCEPT_ENCODING}"
    return response


async def show_health(call: Call) -> web.StreamResponse:
    if call.services.supervisor.failed:
        raise Refusal("server_fault")
    if not await call.services.store.healthy(call.services.limits):
        raise Refusal("storage_unavailable")
    return answer({"status": "ok", "version": VERSION})


class Upgrade(web.WebSocketResponse):
    """The answer to a WebSocket's handshake. With it HTTP ends: the connection goes from aiohttp's handler of requests to a link."""

    def __init__(self, services: Services, address: str) -> None:
        super().__init__(protocols=("iiot.v1",), autoclose=False, autoping=False, compress=False, decode_text=False)
        self._services = services
        self._address = address

    def _post_start(self, request: web.BaseRequest, protocol: str | None, writer: object) -> None:
        services = self._services

        def begin(transport: asyncio.Transport, peer: Peer) -> Link:
            give_up_after(peer, services.settings.heartbeat * 1.5)
            link = Link(transport, peer, self._address, services.limits, services.registry.closing)
            services.registry.serve(link, serve_link(services, link))
            return link

        cast("PlainRequestHandler", request.protocol).hand_over(begin)

    async def write_eof(self, data: bytes = b"") -> None:
        """The connection is another's by now."""
        self._eof_sent = True


async def begin_link(call: Call) -> web.StreamResponse:
    """GET /device: the connection becomes a device's WebSocket."""
    if call.request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
        raise Refusal("bad_handshake")
    upgrade = Upgrade(call.services, call.address)
    try:
        await upgrade.prepare(call.request)
    except web.HTTPBadRequest as error:
        raise Refusal("bad_handshake") from error
    return upgrade


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@attrs.frozen
class Route:
    """A method and path, the least role that may use it (`public`: everybody, `any`: every token; `platform` stands beside the
    others), what answers, and for whatever changes something, or reaches into a device, what the audit calls it. `conditional`:
    the handler looks at If-Match and If-None-Match; elsewhere a request with one that could fail is refused."""

    method: str
    path: str
    role: str
    handler: Handler
    query: type[Any] = NoQuery
    action: str = ""
    conditional: bool = False


ROUTES: Final = (
    Route("GET", "/iiot", "viewer", list_devices, DeviceQuery),
    Route("POST", "/iiot", "operator", push_many, PushQuery, "config.push"),
    Route("GET", "/iiot/summary", "viewer", show_summary, SummaryQuery),
    Route("GET", "/iiot/{device}", "viewer", show_device),
    Route("PUT", "/iiot/{device}", "admin", register_device, action="device.register", conditional=True),
    Route("PATCH", "/iiot/{device}", "admin", patch_device, action="device.update"),
    Route("DELETE", "/iiot/{device}", "admin", delete_device, action="device.remove"),
    Route("POST", "/iiot/{device}/token", "admin", rotate_device_token, action="device.token"),
    Route("POST", "/iiot/{device}/seq", "operator", reset_counter, action="device.seq"),
    Route("POST", "/iiot/{device}", "operator", push_one, PushQuery, "config.push", conditional=True),
    Route("GET", "/iiot/{device}/config", "viewer", show_config, conditional=True),
    Route("GET", "/iiot/{device}/config/history", "viewer", list_configs, HistoryQuery),
    Route("POST", "/iiot/{device}/config/rollback", "operator", push_back, PushQuery, "config.rollback", conditional=True),
    Route("GET", "/iiot/{device}/state", "viewer", show_state, StateQuery),
    Route("GET", "/iiot/{device}/state/history", "viewer", list_states, HistoryQuery),
    Route("GET", "/iiot/{device}/events", "viewer", list_events, EventQuery),
    Route("GET", "/telemetry", "viewer", show_fleet_telemetry, FleetQuery),
    Route("GET", "/rules", "viewer", list_rules, RuleListQuery),
    Route("POST", "/rules", "admin", create_rule, action="rule.create"),
    Route("POST", "/rules/dry-run", "viewer", try_rule, TrialQuery),
    Route("GET", "/rules/{id}", "viewer", show_rule),
    Route("PUT", "/rules/{id}", "admin", replace_rule, action="rule.update"),
    Route("DELETE", "/rules/{id}", "admin", remove_rule, action="rule.remove"),
    Route("GET", "/alerts", "viewer", list_alerts, AlertQuery),
    Route("GET", "/alerts/{id}", "viewer", show_alert),
    Route("POST", "/alerts/{id}/ack", "operator", acknowledge, action="alert.acknowledge"),
    Route("DELETE", "/alerts/{id}/ack", "operator", take_acknowledgement_back, action="alert.unacknowledge"),
    Route("GET", "/silences", "viewer", list_silences, RuleListQuery),
    Route("POST", "/silences", "operator", create_silence, action="silence.create"),
    Route("DELETE", "/silences/{id}", "operator", remove_silence, action="silence.remove"),
    Route("GET", "/iiot/{device}/telemetry", "viewer", show_telemetry, TelemetryQuery),
    Route("DELETE", "/iiot/{device}/telemetry", "admin", remove_telemetry, RangeQuery, "telemetry.remove"),
    Route("POST", "/iiot/{device}/report", "operator", ask_report, action="device.report"),
    Route("POST", "/iiot/{device}/commands", "admin", run_command, CommandQuery, "command.run"),
    Route("GET", "/iiot/{device}/commands", "admin", list_commands, CommandListQuery),
    Route("GET", "/iiot/{device}/commands/{id}", "admin", show_command),
    Route("DELETE", "/iiot/{device}/commands/{id}", "admin", cancel_one, CommandQuery, "command.cancel"),
    Route("GET", "/iiot/{device}/commands/{id}/output", "admin", show_output, OutputQuery),
    Route("GET", "/iiot/{device}/tunnel/{port}", "admin", open_tunnel, action="tunnel.open"),
    Route("GET", "/iiot/{device}/tunnels", "admin", list_tunnels),
    Route("DELETE", "/iiot/{device}/tunnels/{id}", "admin", close_tunnel, action="tunnel.close"),
    Route("POST", "/commands", "admin", run_command_on_many, action="command.run"),
    Route("GET", "/commands", "admin", list_batches, HistoryQuery),
    Route("GET", "/commands/{id}", "admin", show_batch, HistoryQuery),
    Route("DELETE", "/commands/{id}", "admin", cancel_many, action="command.cancel"),
    Route("POST", "/iiot/{device}/log-token", "admin", make_log_token, action="device.log_token"),
    Route("DELETE", "/iiot/{device}/log-token", "admin", revoke_log_tokens, action="device.log_token.revoke"),
    Route("GET", "/iiot/{device}/syslog-source", "viewer", show_syslog_source),
    Route("PUT", "/iiot/{device}/syslog-source", "admin", set_syslog_source, action="device.syslog_source"),
    Route("GET", "/syslog/refused", "admin", show_refused_lines),
    Route("GET", "/iiot/{device}/logs", "viewer", show_log_lines, LogQuery),
    Route("GET", "/logs", "viewer", show_log_lines, TenantLogQuery),
    Route("GET", "/retention", "viewer", show_retention),
    Route("PUT", "/retention", "admin", set_retention, action="retention.set"),
    Route("DELETE", "/retention", "admin", reset_retention, action="retention.reset"),
    Route("GET", "/webhooks", "viewer", list_webhooks, HistoryQuery),
    Route("POST", "/webhooks", "admin", create_webhook, action="webhook.create"),
    Route("DELETE", "/webhooks/{id}", "admin", delete_webhook, action="webhook.remove"),
    Route("POST", "/webhooks/{id}/secret", "admin", renew_webhook_secret, action="webhook.secret"),
    Route("POST", "/webhooks/{id}/test", "admin", test_webhook, action="webhook.test"),
    Route("GET", "/notifications", "viewer", list_notifications, NotificationQuery),
    Route("GET", "/provisioning-keys", "admin", list_keys, ListQuery),
    Route("POST", "/provisioning-keys", "admin", create_key, action="key.create"),
    Route("DELETE", "/provisioning-keys/{id}", "admin", delete_key, action="key.remove"),
    Route("GET", "/tokens", "admin", list_tokens, ListQuery),
    Route("POST", "/tokens", "admin", create_token, action="token.create"),
    Route("DELETE", "/tokens/{id}", "admin", revoke_token, action="token.revoke"),
    Route("GET", "/audit", "admin", show_audit, AuditQuery),
    Route("GET", "/tenants", "platform", list_tenants, ListQuery),
    Route("POST", "/tenants", "platform", create_tenant, action="tenant.create"),
    Route("PATCH", "/tenants/{tenant}", "platform", patch_tenant, action="tenant.update"),
    Route("DELETE", "/tenants/{tenant}", "platform", delete_tenant, RemovalQuery, "tenant.remove"),
    Route("GET", "/platform/tokens", "platform", list_tokens, ListQuery),
    Route("POST", "/platform/tokens", "platform", create_token, action="token.create"),
    Route("DELETE", "/platform/tokens/{id}", "platform", revoke_token, action="token.revoke"),
    Route("GET", "/platform/audit", "platform", show_audit, AuditQuery),
    Route("GET", "/events", "viewer", follow_events, FeedQuery),
    Route("GET", "/whoami", "any", whoami),
    Route("GET", "/", "public", show_page, conditional=True),
    Route("GET", "/healthz", "public", show_health),
    Route("GET", "/metrics", "platform", show_metrics),
    Route("GET", "/metrics/devices", "viewer", show_device_metrics, ScrapeQuery),
    Route("GET", "/device", "public", begin_link),
)

NOBODY: Final = Principal("", "", "public", None, None)


def bearer_token(request: web.Request) -> str:
    """The token that a request shows (RFC 6750, section 2.1), empty without one."""
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def condition(request: web.Request, name: str) -> frozenset[str] | None:
    """The entity tags of If-Match or If-None-Match, None without that header. Refusal: invalid."""
    if name not in request.headers:
        return None
    try:
        return entity_tags(",".join(request.headers.getall(name)))
    except Invalid as error:
        raise Refusal("invalid", FieldError(name, str(error))) from error


def refuse_conditions(call: Call) -> None:
    """What has no entity tag matches none: a GET may still ask for what has another one than some. All else would not do what the
    request asks for. Refusal: invalid."""
    if call.match is not None:
        raise Refusal("invalid", FieldError("If-Match", "cannot be used with this request"))
    if call.none_match is not None and (call.request.method not in ("GET", "HEAD") or call.none_match == {"*"}):
        raise Refusal("invalid", FieldError("If-None-Match", "cannot be used with this request"))


def as_set(route: Route, settings: Settings) -> Route:
    """A route with the role that the settings give it."""
    return attrs.evolve(route, role="public") if settings.metrics_public and route.handler is show_metrics else route


def endpoint(route: Route, converter: Converter) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A route as aiohttp calls it: who is it, may they, is the query right; then the handler."""

    async def handle(request: web.Request) -> web.StreamResponse:
        services = request.app[SERVICES]
        address = remote_address(request, services.trusted)
        if route.role == "public":
            return await handle_known(Call(request, services, NOBODY, address))
        token, call = bearer_token(request), None
        try:
            async with services.registry.request(token_id_of(token)) as running:
                line = cast("PlainRequestHandler", request.protocol)
                line.running = running
                who = await services.identity.operator(token, address)
                line.peer.recognized()
                services.registry.stands(running, who.tenant_id, None if who.expires_at is None else (who.expires_at - now_ms()) / 1000)
                call = Call(request, services, who, address, route.action, running)
                if not who.may(route.role):
                    raise Refusal("forbidden")
                await wait_for_turn(services, who.tenant_id)
                return await handle_known(call)
        except Refusal as refusal:
            if call is not None:
                await call.refused(refusal)
            raise

    async def handle_known(call: Call) -> web.StreamResponse:
        shown = call.request.query
        call.match, call.none_match = condition(call.request, hdrs.IF_MATCH), condition(call.request, hdrs.IF_NONE_MATCH)
        if not route.conditional:
            refuse_conditions(call)
        try:
            call.query = converter.structure({name: shown.getall(name) for name in shown}, route.query)
        except Exception as error:
            wrong = islice(field_errors(error), call.services.limits.field_errors)
            raise Refusal("bad_query", *(attrs.evolve(field, path=field.path.rstrip("_")) for field in wrong)) from error
        with call.waiting():
            return await route.handler(call)

    return handle


@web.middleware
async def answer_errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Every refusal and failure as the JSON of the contract; what an exception says goes to the log alone."""
    counts = request.app[SERVICES].counts
    try:
        return compress_if_large(request, await handler(request))
    except Refusal as refusal:
        counts.refusals[refusal.fault.code] += 1
        if request.writer.output_size > 0:  # an answer is under way, of a token that was revoked: it breaks off
            raise ConnectionError from refusal
        return error_response(refusal)
    except web.HTTPException as error:
        known = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
        code = known.get(error.status, "invalid")
        counts.refusals[code] += 1
        response = error_response(Refusal(code))
        if hdrs.ALLOW in error.headers:
            response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        return response
    except ConnectionError:  # the client went away
        raise
    except Exception:  # the boundary: whatever a handler did wrong, the next request is answered
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        counts.refusals["server_fault"] += 1
        return error_response(Refusal("server_fault"))


class PlainRequestHandler(web.RequestHandler):
    """aiohttp's side of a connection, except that what is no HTTP gets an error of the contract, that a request whose client has
    gone ends, and that a WebSocket goes to a protocol of its own."""

    __slots__ = ("counts", "peer", "running")

    counts: Counts
    peer: Peer
    running: RequestUnderWay

    def connection_lost(self, exc: BaseException | None) -> None:
        if hasattr(self, "running"):
            self.running.client_left()
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            if hasattr(self, "peer"):  # otherwise the connection is a link's
                self.peer.answered()

    def hand_over(self, begin: Callable[[asyncio.Transport, Peer], BaseProtocol]) -> None:
        """Give the connection, and what has come on it after the request, to the protocol that `begin` makes."""
        transport, server, peer = self.transport, self._manager, self.peer
        if transport is None or server is None:
            raise ConnectionResetError("the client has gone")
        self.keep_alive(False)
        link, tail, self._message_tail = begin(transport, peer), self._message_tail, b""
        transport.set_protocol(link)
        self.transport = self._parser = None  # which know each other: a circle is garbage for long
        del self.peer
        server.connection_lost(self, None)
        link.data_received(tail)
        if self._buffer_paused:
            link.resume_reading()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        if status == 500 and not isinstance(exc, (ConnectionError, web.RequestPayloadError)):
            log.error("cannot serve %s: %s", request.remote, message, exc_info=exc)
        else:  # what the parser says quotes the peer, secrets and all
            log.debug("cannot serve %s: %s", request.remote, type(exc).__name__)
        code = "server_fault" if status == 500 else "bad_request"
        self.counts.refusals[code] += 1
        response = error_response(Refusal(code))
        response.force_close()
        return response


class PlainServer(web.Server):
    """aiohttp's server, of handlers that know their peer."""

    counts: Counts

    def serve(self, peer: Peer) -> PlainRequestHandler:
        handler = PlainRequestHandler(self, loop=self._loop, **self._kwargs)
        handler.peer, handler.counts = peer, self.counts
        return handler


class PlainRunner(web.AppRunner):
    async def _make_server(self) -> PlainServer:
        made = await super()._make_server()

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            cast(PlainRequestHandler, request.protocol).peer.asked()
            return await made.request_handler(request)

        server = PlainServer(handle, request_factory=made.request_factory, **self._kwargs)
        server.counts = self.app[SERVICES].counts
        return server


# ==== Application ====
# Owns: how the parts are put together, started in order and stopped in the opposite one.

HEADERS: Final = MappingProxyType(
    {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
)


STOP_SECONDS: Final = 2.0  # for requests under way to be answered, when the server stops


async def run_services(app: web.Application, settings: Settings, limits: Limits) -> AsyncIterator[None]:
    """Open the store, then what stands on it; close them the other way round."""
    async with Store.open(Path(settings.db), limits, settings.query_seconds) as store, MessageSender.open(settings, limits) as sender:
        registry = Registry(limits, store.allowances)
        lines = LineJudge(store, limits)
        cleaner, pusher = Cleaner(store, registry, limits, settings.log_days), Pusher(store, registry, limits)
        identity = Identity(store, limits, settings.quota_devices)
        supervisor, news, trusted = Supervisor(), News(store, limits), networks(settings.trusted_proxy)
        senders, turned_away = LogSenders(identity, store.read.tokens, limits), TurnedAway(limits.refused_senders)
        counts = Counts()
        courier = Courier(store, sender, limits, counts)
        dispatcher = Dispatcher(store, limits, settings.external_url, courier)
        app[SERVICES] = Services(
            settings, limits, Codec(limits), store, identity, registry, cleaner, pusher, supervisor, news, trusted, senders, turned_away,
            Peers(limits), counts, lines, dispatcher, sender, Page.read(),
        )  # fmt: skip
        supervisor.watch(store.writer.task)
        supervisor.start("heartbeat", Heartbeat(registry, store.writer, limits, settings.heartbeat).run())
        supervisor.start("judge of lines", every(limits.alert_seconds, "judge lines", lines.look))
        supervisor.start("alert clock", every(limits.alert_seconds, "look at alerts", store.writer.look_at_alerts))
        supervisor.start("config clock", ConfigClock(store.writer, limits).run())
        supervisor.start("cleaner", cleaner.run())
        supervisor.start("pusher", pusher.run())
        supervisor.start("commander", Commander(store, registry, limits).run())
        supervisor.start("news", news.run())
        supervisor.start("dispatcher of alerts", dispatcher.run())
        supervisor.start("courier of notifications", courier.run())
        shorten = functools.partial(store.keep_log_short, limits.log_bytes)
        supervisor.start("log keeper", every(limits.log_look_seconds, "start the write-ahead log over", shorten))
        supervisor.start("audit of refused actions", identity.refused.run())
        supervisor.start("salt clock", every(limits.salt_seconds, "renew the salt of the write-ahead log", store.renew_salt))
        try:
            yield
        finally:
            await supervisor.close()
            await identity.refused.enter_counts()


async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
    """What browsers need to be told: take types as they are named, frame nothing, load nothing, keep no answer."""
    if response.status == 101:
        return
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


async def count_answer(request: web.Request, response: web.StreamResponse) -> None:
    """By the route that it met: what is in its address is the client's."""
    resource = request.match_info.route.resource
    if resource is None:
        method, path = "", ""
    else:
        method, path = request.match_info.route.method, resource.canonical
    request.app[SERVICES].counts.requests[method, path, response.status] += 1


async def end_sessions(app: web.Application) -> None:
    app[SERVICES].registry.end_all("shutting_down")
    app[SERVICES].store.writer.news.ring()
    app[SERVICES].news.wake_all()
    app[SERVICES].store.writer.log_news.ring_all()
    app[SERVICES].store.writer.command_news.ring_all()
    for feed in app[SERVICES].store.writer.point_feeds:
        feed.ring.set()
    await app[SERVICES].registry.wait_until_left(STOP_SECONDS)


def make_app(settings: Settings, limits: Limits | None = None) -> web.Application:
    """The server as an aiohttp application."""
    bounds = limits or Limits()
    app = web.Application(middlewares=[answer_errors], client_max_size=bounds.body_bytes)
    converter = make_query_converter()
    for route in ROUTES:
        app.router.add_route(route.method, route.path, endpoint(as_set(route, settings), converter))
    app.cleanup_ctx.append(lambda running: run_services(running, settings, bounds))
    app.on_shutdown.append(end_sessions)
    app.on_response_prepare.extend((add_headers, count_answer))
    return app


def load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    """OSError with the name of the file that cannot be used."""

    def refuse_passphrase() -> str:
        raise OSError("the key has a passphrase, and the server cannot ask for it; write a key without one: openssl pkey -in KEY -out NEW")

    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, refuse_passphrase)
    except OSError as error:
        raise OSError(f"cannot use {settings.tls_cert} {settings.tls_key}: {error}") from error


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """What HTTPS needs, None without a certificate. OSError with the name of the file that cannot be used."""
    if not settings.tls_cert:
        if settings.tls_key:
            raise OSError("there is --tls-key but no --tls-cert: give both, or neither for plain HTTP")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_certificate(context, settings)
    return context


def reload_certificate(context: ssl.SSLContext | None, settings: Settings) -> None:
    """Take certificate and key from their files anew, for connections from now on. If they cannot be used, the old ones stay."""
    if context is None:
        log.info("nothing to reload: there is no certificate")
        return
    try:
        tls_context(settings)  # tried apart: a failed load may leave half of it behind
        load_certificate(context, settings)
    except OSError as error:
        log.error("the old certificate stays: %s", error)
    else:
        log.info("reloaded %s", settings.tls_cert)


def addresses_of(name: str, port: int) -> list[Any]:
    """OSError, for a name that cannot be one, too."""
    try:
        return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise OSError("it is no name of a machine") from error


def listen_on(name: str, port: int) -> list[socket.socket]:
    """Sockets that listen on an address, or on all those that a name stands for, all on one port; `::` is every address of both
    families. OSError."""
    if name == "::" and socket.has_dualstack_ipv6():
        return [socket.create_server((name, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)]
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, _, _, _, (address, _, *more) in addresses_of(name, port):
            try:
                sockets.append(socket.create_server((str(address), port, *more), family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # localhost has ::1 where no IPv6 is
                    raise
                missing = error
            port = sockets[0].getsockname()[1] if sockets else port
    except BaseException:
        for made in sockets:
            made.close()
        raise
    if not sockets:
        raise missing or OSError("it stands for no address")
    return sockets


def warn_of_plain_text(addresses: Iterable[Any]) -> None:
    """Say once that what crosses the network can be read there."""
    open_to_others = [address for address, *_ in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if open_to_others:
        log.warning(
            "listening on %s without TLS: everybody on the network can read tokens and data. Use --tls-cert and --tls-key, or a proxy"
            " with TLS on this machine and --host 127.0.0.1", open_to_others[0],
        )  # fmt: skip


async def open_syslog(services: Services, context: ssl.SSLContext | None, peers: Peers, stack: AsyncExitStack) -> None:
    """The listeners for syslog that the settings want. OSError."""
    settings, listener = services.settings, SyslogListener(services, peers)
    if settings.syslog_tls_port and context is None:
        raise OSError("--syslog-tls-port needs --tls-cert and --tls-key")
    stack.push_async_callback(listener.close)
    services.supervisor.start("syslog datagrams", listener.take_datagrams())
    for flag, port, protocol, listen in (
        ("syslog-port", settings.syslog_port, "syslog", listener.listen),
        ("syslog-tls-port", settings.syslog_tls_port, "syslog with TLS", functools.partial(listener.listen_for_streams, context=context)),
        ("relp-port", settings.relp_port, "RELP", functools.partial(listener.listen_for_streams, relp=True)),
    ):
        if not port:
            continue
        try:
            await listen(listen_on(settings.host, port))
        except OSError as error:
            told = f"cannot listen for {protocol} on {settings.host} port {port}: {error.strerror or error}"
            raise OSError(f"{told}; choose another with --{flag}") from error
        log.info("listening for %s on %s port %d", protocol, settings.host, port)


class FewAtATime(selectors.DefaultSelector):
    """Tells of so many sockets at one time, and of the others the next time: the system goes through them in turn. When ten thousand
    devices go at one moment, a round of the event loop would else serve them all before anything else."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._epoll = select.epoll.fromfd(os.dup(self.fileno()))

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        keys, ready = self.get_map(), list[tuple[selectors.SelectorKey, int]]()
        for descriptor, events in self._epoll.poll(timeout, self._most):
            key = keys.get(descriptor)
            if key is not None:
                writes = selectors.EVENT_WRITE if events & ~select.EPOLLIN else 0  # one that is broken is ready for both
                reads = selectors.EVENT_READ if events & ~select.EPOLLOUT else 0
                ready.append((key, (reads | writes) & key.events))
        return ready

    def close(self) -> None:
        self._epoll.close()
        super().close()


def event_loop() -> asyncio.AbstractEventLoop:
    """As asyncio makes one; where there is epoll, one that serves so many sockets in a round."""
    return asyncio.SelectorEventLoop(FewAtATime(Limits().sockets_in_a_round) if hasattr(select, "epoll") else None)


@asynccontextmanager
async def serving(
    settings: Settings, limits: Limits | None = None, context: ssl.SSLContext | None = None, stop: asyncio.Event | None = None
) -> AsyncIterator[str]:
    """The running server, with the certificate in `context` or the one that the settings name; yields its address. It sets `stop`
    when it can go on no longer. OSError when it cannot listen there; StoreError at the end, when it could not go on."""
    context = context or tls_context(settings)
    app = make_app(settings, limits)
    if context is not None:
        app[TLS] = context
    runner = PlainRunner(app, access_log=None, keepalive_timeout=20, shutdown_timeout=STOP_SECONDS)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        services = app[SERVICES]
        peers = services.peers
        door = Door(cast(PlainServer, runner.server).serve, context, peers, services.limits)
        stack.push_async_callback(door.close)
        try:
            listeners = listen_on(settings.host, settings.port)
        except OSError as error:
            told = f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
            raise OSError(f"{told}; choose another with --port or --host") from error
        addresses = [listener.getsockname() for listener in listeners]
        services.supervisor.start("watch over silent peers", peers.look_at_strangers())
        for listener in listeners:
            services.supervisor.watch(door.open(listener))
        await open_syslog(services, context, peers, stack)
        if context is None:
            warn_of_plain_text(addresses)
        host, port = addresses[0][:2]
        shown = f"[{host}]" if ":" in host else host
        if stop is not None:
            services.supervisor.on_failure(stop.set)
        yield f"{'https' if context else 'http'}://{shown}:{port}"
        if services.supervisor.failed:
            raise StoreError("the server could not go on; its log says why")


# ==== Tunnel client ====
# Owns: `python iiot.py tunnel`: standard input and output, and the WebSocket that their bytes go through. Must not know: the server.

STREAM_BYTES: Final = 64 * 1024  # that are read at once
TERMINAL_BYTES: Final = 1_024  # that are written to a terminal at once: it says no more than that there is some room
ANSWER_SECONDS: Final = 60.0  # for the server's answer; the device has some seconds of it
LEAVE_SECONDS: Final = 1.0  # for a last word to the server


class TunnelError(Exception):
    """The tunnel cannot be opened, or broke; the text is for the person who opened it."""


async def told_refusal(request: ClientRequest, handler: Callable[[ClientRequest], Awaitable[ClientResponse]]) -> ClientResponse:
    """TunnelError with what the server says, where it refuses: of a handshake that fails aiohttp tells the status alone."""
    response = await handler(request)
    if response.status < 400:
        return response
    text = await response.text()
    try:
        error = orjson.loads(text)["error"]
        details = "; ".join(str(field["message"]) for field in error.get("details", ()))
        raise TunnelError(f"{error['message']} {details}".strip())
    except (ValueError, KeyError, TypeError):
        raise TunnelError(f"{request.url.host} answers {response.status}: it may be no server of this kind") from None


class StandardStream:
    """Standard input or output, without a thread that hangs in it: a terminal, a pipe, a socket or a file. Other programs may share it,
    and must not meet it changed: a pipe is opened anew where the system allows that, and else put back at the end."""

    def __init__(self, descriptor: int, flags: int) -> None:
        self.shared = self._descriptor = descriptor
        mode = os.fstat(descriptor).st_mode
        self.is_terminal = os.isatty(descriptor)
        self._is_changed = False
        if sys.platform == "linux" and stat.S_ISFIFO(mode):
            with suppress(OSError):  # another user's pipe
                self._descriptor = os.open(f"/proc/self/fd/{descriptor}", flags | os.O_NONBLOCK)
                return
        if (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) and os.get_blocking(descriptor):
            os.set_blocking(descriptor, False)
            self._is_changed = True

    def close(self) -> None:
        if self._is_changed:
            os.set_blocking(self.shared, True)
        if self._descriptor != self.shared:
            os.close(self._descriptor)
            self._descriptor = self.shared

    def end(self) -> None:
        """Let the one at the other end see that nothing more comes."""
        self.close()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.shared)
        os.close(nowhere)

    async def read(self) -> bytes:
        """What comes next, nothing at the end. OSError."""
        loop = asyncio.get_running_loop()
        while True:
            if self.is_terminal:
                await self._ready(loop.add_reader, loop.remove_reader)
            try:
                return os.read(self._descriptor, STREAM_BYTES)
            except BlockingIOError:
                await self._ready(loop.add_reader, loop.remove_reader)

    async def write(self, data: bytes) -> None:
        """OSError."""
        loop, rest = asyncio.get_running_loop(), memoryview(data)
        while rest:
            if self.is_terminal:
                await self._ready(loop.add_writer, loop.remove_writer)
            try:
                rest = rest[os.write(self._descriptor, rest[:TERMINAL_BYTES] if self.is_terminal else rest) :]
            except BlockingIOError:
                await self._ready(loop.add_writer, loop.remove_writer)

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        ready = asyncio.Event()
        add(self._descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self._descriptor)


def tunnel_url(url: str, device: str, port: int) -> str:
    """`device` may stand in brackets, as ssh wants names with colons."""
    name = device[1:-1] if device.startswith("[") and device.endswith("]") else device
    return f"{re.sub('^http', 'ws', url.rstrip('/'))}/iiot/{quote(name, safe='')}/tunnel/{port}"


class TunnelClient:
    """Both directions of a tunnel, each until its own end (`TUNNEL_PROTOCOL`)."""

    def __init__(self, link: ClientWebSocketResponse, source: StandardStream, sink: StandardStream) -> None:
        self._link = link
        self._source = source
        self._sink = sink
        self._limits = Limits()
        self._sending: asyncio.Task[None] | None = None

    async def carry(self) -> None:
        """Until the server closes, which it does when both directions are at their end. What standard input still has when the device's
        side has ended may be meant for it: only somebody at a terminal is not waited for. TunnelError."""
        look_after(self._link.get_extra_info("socket"))
        try:
            async with asyncio.TaskGroup() as group:
                self._sending = group.create_task(self._send_input())
                watch = group.create_task(self._watch())
                await self._receive_output()
                for task in (self._sending, watch):
                    task.cancel()
        except* (TunnelError, ClientError, OSError) as errors:
            raise self._told(errors.exceptions) from None

    @staticmethod
    def _told(errors: Sequence[BaseException]) -> TunnelError:
        """What a person is told, if several things go wrong together."""
        known = [error for error in errors if isinstance(error, TunnelError)]
        broken = [error for error in errors if isinstance(error, (ClientError, ConnectionError))]
        return known[0] if known else TunnelError("the connection to the server broke" if broken else str(errors[0]))

    async def _send_input(self) -> None:
        """All of standard input, then the end."""
        while data := await self._source.read():
            await self._link.send_bytes(data)
        await self._link.send_bytes(b"")

    async def _receive_output(self) -> None:
        while (message := await self._receive()).type == WSMsgType.BINARY:
            if message.data:
                await self._write(message.data)
            else:
                self._sink.end()
                if self._source.is_terminal and self._sending is not None and not self._sending.done():
                    self._sending.cancel()
                    await self._link.send_bytes(b"")
        if message.type != WSMsgType.CLOSE:
            raise TunnelError("the connection to the server broke")
        if message.data != WSCloseCode.OK:
            raise TunnelError(message.extra or f"the server closed the tunnel ({message.data})")

    async def _write(self, data: bytes) -> None:
        try:
            await self._sink.write(data)
        except BrokenPipeError:
            raise TunnelError("nobody reads standard output any more") from None

    async def _receive(self) -> WSMessage:
        """The server pings: what is silent for three times as long is gone."""
        while True:
            try:
                async with asyncio.timeout(3 * self._limits.tunnel_ping_seconds):
                    message = await self._link.receive()
            except TimeoutError:
                raise TunnelError("the server says nothing any more") from None
            if message.type == WSMsgType.PING:
                await self._link.pong(message.data)
            elif message.type != WSMsgType.PONG:
                return message

    async def _watch(self) -> None:
        """A direction that stands still looks the same whether its reader does or the network is gone."""
        while True:
            await asyncio.sleep(self._limits.tunnel_look_seconds)
            if is_gone(self._link.get_extra_info("socket"), self._limits.tunnel_gone_seconds, 0.0):
                raise TunnelError("the connection to the server broke: nothing comes back any more")

    def hang_up(self) -> None:
        """What was not sent would keep the connection open, of which nobody may take it any more."""
        connection = self._link.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    async def leave(self) -> None:
        """Somebody stopped this program: say so to the server, if it listens."""
        with suppress(ClientError, ConnectionError, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._link.send_frame(close_payload(WSCloseCode.OK), WSMsgType.CLOSE)


async def connect_tunnel(client: ClientSession, url: str) -> ClientWebSocketResponse:
    """TunnelError."""
    try:
        return await client.ws_connect(
            url, protocols=(TUNNEL_PROTOCOL,), autoclose=False, autoping=False, max_msg_size=0, timeout=ClientWSTimeout(ws_close=1.0)
        )
    except (ClientError, OSError, TimeoutError, ValueError) as error:
        raise TunnelError(f"no connection to the server: {error}") from error


def standard_streams() -> tuple[StandardStream, StandardStream]:
    """TunnelError."""
    if sys.stdin is None or sys.stdout is None:
        raise TunnelError("standard input and output must be open")
    return StandardStream(sys.stdin.fileno(), os.O_RDONLY), StandardStream(sys.stdout.fileno(), os.O_WRONLY)


async def carry_standard_streams(url: str, token: str) -> None:
    """TunnelError."""
    task = asyncio.current_task()
    if sys.platform != "win32" and task is not None:
        for number in (signal.SIGHUP, signal.SIGTERM):  # ssh ends its helper so
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    limits = ClientTimeout(total=None, sock_connect=ANSWER_SECONDS, sock_read=ANSWER_SECONDS)
    headers = {hdrs.AUTHORIZATION: f"Bearer {token}", hdrs.USER_AGENT: f"iiot-tunnel/{VERSION}"}
    source, sink = standard_streams()
    try:
        async with ClientSession(timeout=limits, headers=headers, middlewares=(told_refusal,)) as client:
            tunnel = TunnelClient(await connect_tunnel(client, url), source, sink)
            try:
                await tunnel.carry()
            except asyncio.CancelledError:
                await tunnel.leave()
                raise
            finally:
                tunnel.hang_up()
    except asyncio.CancelledError:
        raise TunnelError("stopped") from None
    finally:
        source.close()
        sink.close()


# ==== Command line ====
# Owns: arguments, variables of the environment, what is printed where: results to standard output, the rest to standard error.


SWITCHES: Final[Mapping[str, bool]] = MappingProxyType(
    {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("", "0", "false", "no", "off"), False)},
)


def parse_option(field: attrs.Attribute[Any], text: str) -> Any:
    """An option's value. ArgumentTypeError, which argparse shows with the flag's name."""
    kind: Callable[[str], Any] = type(field.default)
    if kind is bool:
        if text.lower() not in SWITCHES:
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return SWITCHES[text.lower()]
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a number' if kind is float else 'a whole number'}") from None
    if field.metadata["good"] and not field.metadata["good"](value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {field.metadata['rule']}")
    return value


def add_options(parser: argparse.ArgumentParser, cls: type[Any], names: Iterable[str] = ()) -> None:
    """A flag for every field of an options class, or for those named; its default from IIOT_NAME where that is set."""
    for field in attrs.fields(cls):
        if names and field.name not in names:
            continue
        variable = f"IIOT_{field.name.upper()}"
        default = field.default
        if variable in os.environ:
            try:
                default = parse_option(field, os.environ[variable])
            except argparse.ArgumentTypeError as error:
                parser.error(f"{variable}: {error}")
        shown = f" ({field.default})" if field.default not in ("", 0.0) else ""
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", default=default, help=field.metadata["help"])
            continue
        parser.add_argument(flag, type=functools.partial(parse_option, field), default=default, help=field.metadata["help"] + shown)


def whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def port_number(text: str) -> int:
    if whole_number(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def checked(check: Callable[[object], T], text: str) -> T:
    """An argument that must pass the check of a frame's field."""
    try:
        return check(text)
    except Invalid as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def options(arguments: argparse.Namespace, cls: type[T]) -> T:
    names = attrs.fields_dict(cast("type[attrs.AttrsInstance]", cls))
    return cls(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def add_tenant_commands(parser: argparse.ArgumentParser) -> None:
    tenant = parser.add_subparsers(dest="verb", required=True)
    add = tenant.add_parser("add", help="make a tenant; print only its first admin token")
    tenants = tenant.add_parser("list", help="print every tenant as a line of JSON, with what it uses and may use")
    remove = tenant.add_parser("remove", help="remove a tenant with all its data")
    remove.add_argument("--confirm", required=True, help="its name once more")
    for command in (add, remove):
        command.add_argument("name", type=functools.partial(checked, check_tenant_name))
    for command in (add, tenants, remove):
        add_options(command, Settings, ("db", *(QUOTA_OPTIONS if command is tenants else ())))


class RedactingParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


def make_parser() -> argparse.ArgumentParser:
    parser = RedactingParser(prog="iiot.py", description="Industrial-IoT platform in one process.")
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the server (the default)")
    add_options(serve, Settings)
    token = commands.add_parser("token", help="make an operator token in the database file; print only the token")
    token.add_argument("--role", required=True, choices=(*RANKS, "platform"))
    named = functools.partial(checked, check_token_name)
    token.add_argument("--name", default="command line", type=named, help="what the token is called")
    key = commands.add_parser("provisioning-key", help="make a provisioning key in the database file; print only the key")
    key.add_argument("--uses", type=whole_number, default=None, help="how many devices it may provision (any number)")
    for command in (token, key):
        command.add_argument("--tenant", default="default", help="the tenant (default)")
        add_options(command, Settings, ("db",))
    tunnel = commands.add_parser("tunnel", help="connect standard input and output to a port of a device; IIOT_TOKEN is an admin's token")
    tunnel.add_argument("device", help="its name; with colons in it, in brackets")
    tunnel.add_argument("port", type=port_number, help="a port that the device's agent allows")
    tunnel.add_argument("--url", default=os.environ.get("IIOT_URL", "http://127.0.0.1:8080"), help="address of the server")
    add_tenant_commands(commands.add_parser("tenant", help="make, list and remove tenants, in the database file"))
    return parser


def change_database(path: Path, function: Callable[[sqlite3.Connection], T]) -> T:
    """One change of a database file from the command line, beside a running server too. StoreError when it is not there."""
    with named_errors(path):
        if is_new(path):
            raise StoreError(f"there is no database {path}; start the server first")
        with closing(LockFile(resolved(path))) as lock:
            if lock.take():  # no server runs: as at its start, the log must be the file's own
                lock.check_log()
        with closing(connect(path)) as connection:
            if schema_version(connection, path) < SCHEMA_VERSION:
                raise StoreError(f"{path} was written by an older version of this program; start the server first")
            with transaction(connection):
                return function(connection)


def operator_at_the_machine(tenant_id: int | None) -> Actor:
    """Who answers for what is done from the command line."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        name = "unknown"
    return Actor(tenant_id, None, name, "command line")


def named_tenant(connection: sqlite3.Connection, name: str) -> int:
    try:
        return tenant_id_of(connection, name)
    except Refusal as refusal:
        raise StoreError(f"there is no tenant {name}") from refusal


def mint_token(arguments: argparse.Namespace) -> None:
    token = mint("op")

    def add(connection: sqlite3.Connection) -> None:
        tenant = None if arguments.role == "platform" else named_tenant(connection, arguments.tenant)
        insert_operator_token(connection, tenant, token.stored, arguments.name, arguments.role)
        affected = Affected(token.stored.id, None, {"name": arguments.name, "role": arguments.role})
        add_entries(connection, operator_at_the_machine(tenant), "token.create", "ok", [affected])

    change_database(Path(arguments.db), add)
    print(token.text)


def mint_key(arguments: argparse.Namespace) -> None:
    key = mint("prov")

    def add(connection: sqlite3.Connection) -> None:
        tenant = named_tenant(connection, arguments.tenant)
        insert_provisioning_key(connection, tenant, key.stored, uses=arguments.uses)
        affected = Affected(key.stored.id, None, {"uses": arguments.uses})
        add_entries(connection, operator_at_the_machine(tenant), "key.create", "ok", [affected])

    change_database(Path(arguments.db), add)
    print(key.text)


def manage_tenants(arguments: argparse.Namespace) -> None:
    """`tenant add`, `tenant list` and `tenant remove`. A running server notices a removal by itself."""
    path, actor, token = Path(arguments.db), operator_at_the_machine(None), mint("op")

    def add(connection: sqlite3.Connection) -> None:
        insert_tenant(connection, arguments.name, token.stored, {})
        add_entries(connection, actor, "tenant.create", "ok", [Affected(arguments.name, None, {"token": token.stored.id})])

    def remove(connection: sqlite3.Connection) -> None:
        named_tenant(connection, arguments.name)
        remove_tenant(connection, arguments.name)
        add_entries(connection, actor, "tenant.remove", "ok", [Affected(arguments.name)])

    match arguments.verb:
        case "add":
            change_database(path, add)
            print(token.text)
        case "list":
            quotas = default_quotas(options(arguments, Settings))
            for line in change_database(path, lambda connection: tenant_lines(connection, quotas)):
                print(line)
        case "remove":
            if arguments.confirm != arguments.name:
                raise StoreError("--confirm does not repeat the tenant's name")
            change_database(path, remove)


def first_credentials(path: Path) -> tuple[Secret, Secret] | None:
    """An admin token and a provisioning key for a database that has no operator token yet."""
    token, key = mint("op"), mint("prov")

    def add(connection: sqlite3.Connection) -> bool:
        if not is_untouched(connection):
            return False
        tenant = tenant_id_of(connection, "default")
        insert_operator_token(connection, tenant, token.stored, "first start", "admin")
        insert_provisioning_key(connection, tenant, key.stored)
        actor = operator_at_the_machine(tenant)
        add_entries(connection, actor, "token.create", "ok", [Affected(token.stored.id, None, {"name": "first start", "role": "admin"})])
        add_entries(connection, actor, "key.create", "ok", [Affected(key.stored.id, None, {"uses": None})])
        return True

    return (token, key) if change_database(path, add) else None


def agent_command() -> str:
    """How the reference device is started, for a line to paste into another terminal in the same folder."""
    program, python = Path(sys.argv[0]), Path(sys.executable)
    if program.suffix != ".py":
        return shlex.quote(str(program.with_name("iiot-agent")))  # both programs are installed
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return shlex.join((str(python), str(program.with_name("agent.py"))))


SWITCH_SECONDS: Final = 0.0005


def share_interpreter() -> None:
    """Let a thread that asks for the interpreter have it soon: a transaction asks some ten times, and each time the event loop, or
    whoever reads, would keep it waiting for ten times as long. And look for cyclic garbage seldom, and not among what is there from
    the start: the longest of those looks stall everybody, and frames are made of so many parts that each causes some."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 50)


def address_to_use(url: str) -> str:
    """The address for a client on this machine: a server that listens on every address has none of its own."""
    return re.sub(r"//(0\.0\.0\.0|\[::\])(?=:)", "//localhost", url)


async def serve(settings: Settings) -> None:
    """Run the server until SIGINT or SIGTERM."""
    path = Path(settings.db)
    raise_descriptors()
    share_interpreter()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # Windows: there the KeyboardInterrupt ends asyncio.run
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    context = tls_context(settings)
    with suppress(NotImplementedError, AttributeError):  # Windows has no such signal
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_certificate, context, settings)
    async with serving(settings, context=context, stop=stop) as url:
        print(f"listening on {url}", flush=True)
        first = first_credentials(path)
        if first is not None:
            token, key = first
            near = address_to_use(url)
            page = f"\nThe page, signed in:\n  {near}/#token={token.text}" if companion("dashboard.html") is not None else ""
            print(
                f"\nFirst start. Shown once, keep them:\n  admin token       {token.text}\n  provisioning key  {key.text}\n"
                f"{page}\nThis machine as a device:\n  {agent_command()} --url {near} --key {key.text}\n"
                f"The list of devices:\n  curl -H 'Authorization: Bearer {token.text}' {near}/iiot",
                flush=True,
            )
        await stop.wait()
        log.info("stopping")


class RedactingFormatter(logging.Formatter):
    """Log lines without the secrets that a peer may have put into an address, or into what it sent."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def open_standard_streams(arguments: argparse.Namespace) -> None:
    """TunnelError."""
    token = os.environ.get("IIOT_TOKEN", "")
    if not token:
        raise TunnelError("set IIOT_TOKEN to the token of an admin")
    asyncio.run(carry_standard_streams(tunnel_url(arguments.url, arguments.device, arguments.port), token))


def main(argv: list[str] | None = None) -> None:
    """The command line; `python iiot.py` alone serves."""
    words = sys.argv[1:] if argv is None else argv
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["serve", *words]
    arguments = make_parser().parse_args(words)
    level = getattr(arguments, "log_level", "info").upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    try:
        match arguments.command:
            case "serve":
                with asyncio.Runner(loop_factory=event_loop) as runner:
                    runner.run(serve(options(arguments, Settings)))
            case "token":
                mint_token(arguments)
            case "provisioning-key":
                mint_key(arguments)
            case "tenant":
                manage_tenants(arguments)
            case "tunnel":
                open_standard_streams(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Refusal as refusal:
        sys.exit(f"iiot.py: {refusal.fault.message}")
    except (StoreError, TunnelError, OSError, sqlite3.Error) as error:
        sys.exit(redacted(f"iiot.py: {error}"))


if __name__ == "__main__":
    main()
