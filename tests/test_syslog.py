"""Syslog from real senders, over TCP, TLS and UDP: whose line it is, what is kept of it, and what becomes of lines of nobody."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import shutil
import signal
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import PATIENCE, Plant, Process, certificate, locked
from readme import blocks

import iiot

LOGGER = shutil.which("logger")
RSYSLOGD = shutil.which("rsyslogd", path=f"{os.environ['PATH']}:/usr/sbin")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


@attrs.define
class Site:
    """A server that listens for syslog, and its port."""

    plant: Plant
    port: int

    async def tcp(self, data: bytes, *, tls: ssl.SSLContext | None = None) -> None:
        """One stream, to its end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)
        try:
            writer.write(data)
            await writer.drain()
            if tls is None:
                writer.write_eof()
                await reader.read()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def udp(self, *messages: bytes) -> None:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            for message in messages:
                sender.sendto(message, ("127.0.0.1", self.port))

    async def token(self, name: str = "press-1", **body: Any) -> str:
        status, answer = await self.plant.ask("POST", f"/iiot/{name}/log-token", body)
        assert status == 201, answer
        return str(answer["token"])

    async def bind(self, name: str, *addresses: str) -> None:
        status, answer = await self.plant.ask("PUT", f"/iiot/{name}/syslog-source", {"addresses": list(addresses)})
        assert status == 200, answer

    async def lines(self, count: int, path: str = "/logs") -> list[dict[str, Any]]:
        """So many lines, oldest first, once they are there."""
        items = (await self.plant.until(path, lambda body: len(body["items"]) >= count))["items"]
        assert len(items) == count
        return list(reversed(items))

    async def refused(self, lines: int) -> list[dict[str, Any]]:
        """Refused lines by address, once there are so many."""
        items: list[dict[str, Any]] = (
            await self.plant.until("/syslog/refused", lambda body: sum(item["lines"] for item in body["items"]) >= lines)
        )["items"]
        assert sum(item["lines"] for item in items) == lines
        return items


@asynccontextmanager
async def listening(folder: Path, limits: iiot.Limits | None = None, **settings: Any) -> AsyncIterator[Site]:
    port = free_port()
    async with plants.plant(folder, limits, **{"syslog_port": port, **settings}) as plant:
        await plant.register("press-1")
        yield Site(plant, settings.get("syslog_tls_port", port))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with listening(tmp_path) as running:
        yield running


def counted(message: str) -> bytes:
    data = message.encode()
    return b"%d %b" % (len(data), data)


# ---- whose line it is, and what is kept


async def test_a_line_of_rfc_5424_is_kept_with_all_it_says_but_its_token(site: Site) -> None:
    token = await site.token()
    own = f'[iiot@32473 token="{token}"][origin ip="10.0.0.7"]'
    await site.tcp(counted(f"<11>1 2026-01-01T00:00:00.5Z switch-7 lldpd 412 ID47 {own} port 3 down"))
    (line,) = await site.lines(1)
    del line["id"], line["received_at"]
    assert line == {
        "at": "2026-01-01T00:00:00.500Z", "device": "press-1", "level": "error", "message": "port 3 down", "logger": "lldpd",
        "host": "switch-7",
        "fields": {
            "facility": 1, "severity": 3, "process_id": "412", "message_id": "ID47", "structured_data": {"origin": {"ip": "10.0.0.7"}},
        },
    }  # fmt: skip
    secret = token.rpartition("_")[2].encode()
    assert all(secret not in file.read_bytes() for file in site.plant.database.parent.iterdir() if file.is_file())


async def test_lines_of_one_stream_go_each_to_the_device_of_its_token_in_their_order(site: Site) -> None:
    await site.plant.register("press-2")
    first, second = await site.token("press-1"), await site.token("press-2")
    await site.tcp(b"".join(f"<14>Jan  1 00:00:00 host app: {token} line {n}\n".encode() for n, token in enumerate([first, second] * 20)))
    lines = await site.lines(40)
    assert [line["message"] for line in lines] == [f"line {n}" for n in range(40)]
    assert [line["device"] for line in lines] == ["press-1", "press-2"] * 20


@pytest.mark.parametrize("over", ["tcp", "udp"])
async def test_a_sender_without_a_token_is_known_by_its_address(site: Site, over: str) -> None:
    await site.plant.register("press-2")
    await site.bind("press-2", "127.0.0.0/8")
    await site.bind("press-1", "127.0.0.1", "10.0.0.0/8")
    line = b"<28>Jun 3 10:00:00 chronyd[1]: clock was stepped"
    if over == "tcp":
        await site.tcp(line + b"\n")
    else:
        site.udp(line)
    (stored,) = await site.lines(1)
    assert (stored["device"], stored["level"], stored["logger"]) == ("press-1", "warning", "chronyd"), "the narrowest network counts"
    await site.bind("press-1", "10.0.0.0/8")
    site.udp(line)
    assert [stored["device"] for stored in await site.lines(2)] == ["press-1", "press-2"]


async def test_what_is_not_understood_is_kept_whole(site: Site) -> None:
    await site.bind("press-1", "127.0.0.1")
    site.udp(b"\xff\xfewhat \x00 is this?")
    (line,) = await site.lines(1)
    assert (line["level"], line["message"]) == ("notice", r"\xff\xfewhat \x00 is this?")


async def test_a_line_that_is_too_long_is_cut_and_marked(tmp_path: Path) -> None:
    async with listening(tmp_path, attrs.evolve(iiot.Limits(), syslog_bytes=200)) as site:
        await site.bind("press-1", "127.0.0.1")
        await site.tcp(b"<13>Jan  1 00:00:00 host app: " + b"x" * 5_000 + b"\n<13>Jan  1 00:00:00 host app: next\n")
        long, following = await site.lines(2)
        assert (long["fields"]["cut"], len(long["message"]) < 200, following["message"]) == (True, True, "next")


async def test_syslog_over_tls_needs_the_server_s_certificate(tmp_path: Path) -> None:
    cert, key = await certificate(tmp_path, "localhost")
    secured: dict[str, Any] = {"tls_cert": str(tmp_path / cert), "tls_key": str(tmp_path / key)}
    trusting = ssl.create_default_context(cafile=str(tmp_path / cert))
    trusting.check_hostname = False
    async with listening(tmp_path, syslog_port=0, syslog_tls_port=free_port(), **secured) as site:
        token = await site.token()
        await site.tcp(counted(f'<14>1 - - - - - [iiot@32473 token="{token}"] over TLS'), tls=trusting)
        assert [line["message"] for line in await site.lines(1)] == ["over TLS"]
    with pytest.raises(OSError, match="tls-cert"):
        async with plants.plant(tmp_path, syslog_tls_port=free_port()):
            pass


async def test_the_readme_s_line_for_logger_sends_a_line(site: Site) -> None:
    if LOGGER is None:
        pytest.skip("logger is not installed")
    await site.bind("press-1", "127.0.0.1")
    line = blocks("Receive syslog", "sh")[-1].replace("192.0.2.1", "127.0.0.1").replace("5514", str(site.port))
    process = await asyncio.create_subprocess_shell(line)
    assert await process.wait() == 0
    assert [stored["message"] for stored in await site.lines(1)] == ["hello"]


@asynccontextmanager
async def rsyslogd(folder: Path, port: int, token: str) -> AsyncIterator[socket.socket]:
    """A real sender with the README's configuration, and a socket on which programs tell it their lines."""
    if RSYSLOGD is None:
        pytest.skip("rsyslogd is not installed")
    (action,) = blocks("Receive syslog", "rsyslog")
    shown = {"192.0.2.1": "127.0.0.1", "2514": str(port), 'resumeInterval="5"': 'resumeInterval="1"'}
    shown |= {"TOKEN": token} if token else {'token=\\"TOKEN\\" ': ""}
    for name, real in shown.items():
        assert name in action
        action = action.replace(name, real)
    with tempfile.TemporaryDirectory(prefix="rs-") as short:  # a socket's path has a hundred characters at most
        own = f'global(workDirectory="{folder}")\nmodule(load="imuxsock" SysSock.Use="off" SysSock.RateLimit.Interval="0")\n'
        source = f'input(type="imuxsock" Socket="{short}/log" RateLimit.Interval="0")\n'
        (folder / "rsyslog.conf").write_text(own + source + action)
        process = await asyncio.create_subprocess_exec(RSYSLOGD, "-n", "-f", f"{folder}/rsyslog.conf", "-i", f"{folder}/rsyslog.pid")
        try:
            async with asyncio.timeout(PATIENCE):
                while not Path(short, "log").exists():
                    await asyncio.sleep(0.02)
            with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
                sender.connect(f"{short}/log")
                yield sender
        finally:
            process.terminate()
            await process.wait()


async def test_rsyslogd_sends_its_lines_by_the_readme_s_configuration(tmp_path: Path) -> None:
    relp = free_port()
    async with listening(tmp_path, relp_port=relp) as site, rsyslogd(tmp_path, relp, await site.token()) as sender:
        for number in range(50):
            sender.send(b"<29>pump[7]: line %d says \"stop\" \\ ]" % number)
        lines = await site.lines(50)
        assert [line["message"] for line in lines] == [f'line {number} says "stop" \\ ]' for number in range(50)]
        assert {(line["logger"], line["level"], line["fields"]["process_id"]) for line in lines} == {("pump", "notice", "7")}
        assert {line["host"].partition(".")[0] for line in lines} == {socket.gethostname().partition(".")[0]}
        assert all("structured_data" not in line["fields"] for line in lines)


async def test_rsyslogd_keeps_lines_of_nobody_until_they_are_somebodys(tmp_path: Path) -> None:
    """As after a token was replaced, until rsyslogd knows the new one: here its address is bound to the device. It tries again with the
    next line that it is told."""
    relp, count = free_port(), 50
    async with listening(tmp_path, relp_port=relp) as site, rsyslogd(tmp_path, relp, "") as sender:
        for number in range(count):
            sender.send(b"<29>pump[7]: line %d" % number)
        await site.refused(1)
        await site.bind("press-1", "127.0.0.1")
        async with asyncio.timeout(PATIENCE):
            while len(items := (await site.plant.get("/logs?limit=1000"))["items"]) < count:
                sender.send(b"<29>pump[7]: line %d" % number)
                await asyncio.sleep(0.2)
        lines = [line["message"] for line in reversed(items)]
        assert lines[:count] == [f"line {number}" for number in range(count)]


async def test_every_line_over_relp_is_stored_once_through_kills(tmp_path: Path, process: Process, request: pytest.FixtureRequest) -> None:
    """`--relp-lines 100000` is the longer round."""
    count, relp = request.config.getoption("--relp-lines"), free_port()
    process.arguments = (*process.arguments, "--relp-port", str(relp))
    iiot.prepare_database(process.database)
    token = plants.admin_token(process.database)
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        await plant.register("press-1")
        _, made = await plant.ask("POST", "/iiot/press-1/log-token", {})
        async with rsyslogd(tmp_path, relp, made["token"]) as sender:
            stored = functools.partial(plants.rows, process.database, "select count(*) from log_line")

            async def send() -> None:
                for number in range(count):
                    await asyncio.to_thread(sender.send, b"<29>pump[7]: line %d" % number)

            sending = asyncio.create_task(send())
            for part in (0.2, 0.6):
                async with asyncio.timeout(6 * PATIENCE):
                    while stored()[0][0] < count * part:
                        await asyncio.sleep(0.01)
                await process.stop(signal.SIGKILL)
                await process.start()
            await sending
            async with asyncio.timeout(12 * PATIENCE):
                while stored()[0][0] < count:
                    await asyncio.sleep(0.1)
            await asyncio.sleep(1)  # a line that is stored twice would come now
    messages = [message for (message,) in plants.rows(process.database, "select message from log_line")]
    assert len(messages) == count
    assert set(messages) == {f"line {number}" for number in range(count)}


# ---- RELP by hand


@attrs.define
class Sender:
    """One connection of RELP."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int = 0

    async def ask(self, command: str, data: bytes = b"") -> bytes:
        """The data of the answer."""
        self.number += 1
        tail = b" %b\n" % data if data else b"\n"
        self.writer.write(b"%d %b %d" % (self.number, command.encode(), len(data)) + tail)
        return await self.answer()

    async def answer(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            number, command, size = (await self.reader.readuntil(b" "), await self.reader.readuntil(b" "), await self.reader.readuntil())
            assert (int(number), command) == (self.number, b"rsp ")
            return size

    @classmethod
    @asynccontextmanager
    async def of(cls, port: int) -> AsyncIterator[Sender]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def test_relp_answers_when_a_line_is_on_disk_and_repeats_are_stored_once(tmp_path: Path) -> None:
    relp = free_port()
    async with listening(tmp_path, relp_port=relp) as site, Sender.of(relp) as sender:
        token = await site.token()
        assert (await sender.ask("open", b"relp_version=0\nrelp_software=test\ncommands=syslog")).startswith(b"62 200 OK\n")
        for _ in range(3):
            await sender.reader.readline()
        line = f'<14>1 - - - - - [iiot@32473 token="{token}" id="0123456789abcdef0123456789abcdef"] once'.encode()
        for _ in range(3):
            assert await sender.ask("syslog", line) == b"6 200 OK\n"
            assert plants.rows(site.plant.database, "select message from log_line") == [("once",)]
        other = line.replace(b"0123456789abcdef0", b"1123456789abcdef0").replace(b"once", b"twice")
        sender.writer.write(b"".join(b"%d syslog %d %b\n" % (number, len(other), other) for number in (5, 6, 7)))
        for sender.number in (5, 6, 7):
            assert await sender.answer() == b"6 200 OK\n"
        assert [stored["message"] for stored in await site.lines(2)] == ["once", "twice"]
        assert await sender.ask("close") == b"0\n"
        assert await sender.reader.read() == b"0 serverclose 0\n"


async def test_a_line_of_nobody_ends_the_connection_without_an_answer(tmp_path: Path) -> None:
    """rsyslogd throws a line away that is answered by an error, and keeps one that is not answered."""
    relp = free_port()
    async with listening(tmp_path, relp_port=relp) as site:
        async with Sender.of(relp) as sender:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                pytest.fail(str(await sender.ask("syslog", b"<14>1 - - - - - - x")))
        assert (await site.refused(1))[0]["reason"] == "unknown_address"


async def test_lines_before_one_of_nobody_are_confirmed(tmp_path: Path) -> None:
    relp = free_port()
    async with listening(tmp_path, relp_port=relp) as site, Sender.of(relp) as sender:
        token = await site.token()
        with locked(site.plant.database):
            for message in (f"{token} mine", f"{iiot.mint('log').text} nobody's"):
                line = f"<14>Jan  1 00:00:00 host app: {message}".encode()
                sender.number += 1
                sender.writer.write(b"%d syslog %d %b\n" % (sender.number, len(line), line))
            await site.refused(1)
        with suppress(ConnectionError):
            assert b" rsp 6 200 OK\n" in await sender.reader.read()
        assert [line["message"] for line in await site.lines(1)] == ["mine"]


async def test_what_is_no_relp_is_told_and_counted(tmp_path: Path) -> None:
    relp = free_port()
    async with listening(tmp_path, relp_port=relp) as site, Sender.of(relp) as sender:
        assert (await sender.ask("nonsense")).startswith(b"19 500 ")
        sender.writer.write(b"GET / HTTP/1.1\r\nHost: press\r\n\r\n and more than the longest head of all frames has")
        with suppress(ConnectionError):
            assert await sender.reader.read() == b""
        assert (await site.refused(1))[0]["reason"] == "not_relp"


async def test_it_is_forgotten_which_lines_came_when_nobody_repeats_them_any_more(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), repeat_seconds=0.2, retention_seconds=0.05, clock_seconds=0.05)
    relp = free_port()
    async with listening(tmp_path, limits, relp_port=relp) as site, Sender.of(relp) as sender:
        await site.bind("press-1", "127.0.0.1")
        assert await sender.ask("syslog", b'<14>1 - - - - - [iiot@32473 id="0123456789abcdef0123456789abcdef"] x') == b"6 200 OK\n"
        async with asyncio.timeout(PATIENCE):
            while plants.rows(site.plant.database, "select 1 from log_repeat"):
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "way", [("--tcp", "--octet-count", "--rfc5424"), ("--tcp", "--rfc3164"), ("--udp", "--rfc5424"), ("--udp", "--rfc3164")]
)
async def test_logger_of_util_linux_sends_lines(site: Site, way: tuple[str, ...]) -> None:
    if LOGGER is None:
        pytest.skip("logger is not installed")
    await site.bind("press-1", "127.0.0.1")
    process = await asyncio.create_subprocess_exec(
        LOGGER, *way, "--server", "127.0.0.1", "--port", str(site.port), "--priority", "local0.warning", "--tag", "plc", "valve 7 stuck"
    )
    assert await process.wait() == 0
    (line,) = await site.lines(1)
    assert (line["level"], line["logger"], line["message"], line["fields"]["facility"]) == ("warning", "plc", "valve 7 stuck", 16)
    assert line["host"] == socket.gethostname().partition(".")[0] or way[-1] == "--rfc5424"


# ---- lines of nobody


async def test_lines_of_nobody_are_refused_counted_and_shown(site: Site) -> None:
    wrong = iiot.mint("log").text
    site.udp(b"<14>Jan  1 00:00:00 host app: nobody's")
    assert [(item["address"], item["reason"]) for item in await site.refused(1)] == [("127.0.0.1", "unknown_address")]
    await site.bind("press-1", "127.0.0.1")
    await site.tcp(f"<14>Jan  1 00:00:00 host app: {wrong} wrong\n<14>Jan  1 00:00:00 host app: right\n".encode())
    assert [(item["address"], item["reason"]) for item in await site.refused(2)] == [("127.0.0.1", "unauthorized")]
    assert [line["message"] for line in await site.lines(1)] == ["right"]


@pytest.mark.parametrize("end", ["revoked", "replaced", "disabled", "removed"])
async def test_a_token_that_has_ended_adds_no_line(site: Site, end: str) -> None:
    token = await site.token()
    line = f"<14>Jan  1 00:00:00 host app: {token} x\n".encode()
    await site.tcp(line)
    await site.lines(1)
    asked: tuple[str, str, Any] = {
        "revoked": ("DELETE", "/iiot/press-1/log-token", None), "replaced": ("POST", "/iiot/press-1/log-token", {"revoke": True}),
        "disabled": ("PATCH", "/iiot/press-1", {"disabled": True}), "removed": ("DELETE", "/iiot/press-1", None),
    }[end]  # fmt: skip
    assert (await site.plant.ask(*asked))[0] in (200, 201, 204)
    await site.tcp(line)
    await site.refused(1)


async def test_a_log_token_opens_nothing_else(site: Site) -> None:
    token = await site.token()
    assert (await site.plant.ask("GET", "/whoami", token=token))[0] == 401
    device = await site.plant.connect()
    await device.send("hello", token=token)
    assert (await device.expect("error"))["code"] == "unauthorized"


async def test_an_address_belongs_to_one_device_in_all_tenants(site: Site) -> None:
    await site.plant.register("press-2")
    await site.bind("press-1", "10.0.0.7", "fd00::7", "10.0.0.7/32")
    assert await site.plant.get("/iiot/press-1/syslog-source") == {"device": "press-1", "addresses": ["10.0.0.7/32", "fd00::7/128"]}
    for address, code in (("10.0.0.7", "source_taken"), ("10.0.0.7/8", "invalid"), ("x", "invalid")):
        _, answer = await site.plant.ask("PUT", "/iiot/press-2/syslog-source", {"addresses": [address]})
        assert answer["error"]["code"] == code
    await site.bind("press-1")
    await site.bind("press-2", "10.0.0.7")


async def another_tenant(site: Site, name: str) -> Site:
    """A tenant with one device, press-1, as its own admin sees the server."""
    plant = site.plant
    platform = plants.admin_token(plant.database, "platform")
    status, body = await plant.ask("POST", "/tenants", {"name": name, "quotas": {}}, token=platform)
    assert status == 201, body
    theirs = Site(Plant(plant.url, plant.client, body["token"], plant.database), site.port)
    await theirs.plant.register("press-1")
    return theirs


async def test_no_tenant_takes_addresses_of_another(site: Site) -> None:
    acme = await another_tenant(site, "acme")
    await site.bind("press-1", "127.0.0.0/24")
    for address in ("127.0.0.10", "127.0.0.0/16", "127.0.0.0/24"):
        status, answer = await acme.plant.ask("PUT", "/iiot/press-1/syslog-source", {"addresses": [address]})
        assert (status, answer["error"]["code"]) == (409, "source_taken"), address
    for network in ("0.0.0.0/0", "10.0.0.0/15", "2001:db8::/47"):
        status, answer = await acme.plant.ask("PUT", "/iiot/press-1/syslog-source", {"addresses": [network]})
        assert (status, answer["error"]["code"]) == (422, "invalid"), network
    await acme.bind("press-1", "10.0.0.0/16", "2001:db8::/48")
    assert (await site.plant.get("/iiot/press-1/syslog-source"))["addresses"] == ["127.0.0.0/24"]


async def test_a_tenant_alone_may_bind_every_address(site: Site) -> None:
    await site.plant.register("press-2")
    await site.bind("press-1", "0.0.0.0/0")
    await site.bind("press-2", "127.0.0.1")
    site.udp(b"<14>Jan  1 00:00:00 host app: narrowest")
    (line,) = await site.lines(1)
    assert line["device"] == "press-2"


async def test_an_address_of_ipv4_is_one_however_it_is_written(site: Site) -> None:
    await site.bind("press-1", "::ffff:127.0.0.1")
    assert (await site.plant.get("/iiot/press-1/syslog-source"))["addresses"] == ["127.0.0.1/32"]
    site.udp(b"<14>Jan  1 00:00:00 host app: x")
    await site.lines(1)
    assert (await site.plant.ask("PUT", "/iiot/press-1/syslog-source", {"addresses": ["fe80::1%eth0"]}))[0] == 422


async def test_a_tenant_sees_its_own_refused_lines_and_those_of_nobody(tmp_path: Path) -> None:
    async with listening(tmp_path, quota_log_bytes=0) as site:
        acme = await another_tenant(site, "acme")
        site.udp(b"<14>Jan  1 00:00:00 host app: nobody's")
        await site.refused(1)
        await acme.bind("press-1", "127.0.0.1")
        site.udp(b"<14>Jan  1 00:00:00 host app: over the quota")
        assert {item["reason"] for item in await acme.refused(2)} == {"unknown_address", "log_bytes_per_day"}
        assert {item["reason"] for item in await site.refused(1)} == {"unknown_address"}


async def test_what_the_system_throws_away_of_datagrams_is_shown(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), syslog_buffer=1)
    async with listening(tmp_path, limits) as site:
        assert (await site.plant.get("/syslog/refused"))["datagrams_lost"] == 0
        site.udp(*(b"<14>Jan  1 00:00:00 host app: x" for _ in range(1_000)))  # the server does not read meanwhile: it is this process
        await site.plant.until("/syslog/refused", lambda body: body["datagrams_lost"] > 0)


async def test_who_sends_datagrams_without_end_takes_nobody_elses_place() -> None:
    waiting = iiot.WaitingDatagrams(8)
    assert [waiting.put(b"%d" % number, "flood") for number in range(4)] == [True, True, False, False]
    assert [waiting.put(b"%d" % number, address) for number in range(2) for address in ("one", "two", "three")] == [True] * 6
    assert not waiting.put(b"", "four")
    taken = [await waiting.get() for _ in range(8)]
    assert taken == [(b"%d" % number, address) for number in range(2) for address in ("flood", "one", "two", "three")]
    assert waiting.put(b"last", "flood")
    assert await waiting.get() == (b"last", "flood")


async def test_a_device_has_a_bounded_number_of_log_tokens(site: Site) -> None:
    for _ in range(iiot.Limits().log_tokens):
        await site.token()
    status, answer = await site.plant.ask("POST", "/iiot/press-1/log-token")
    assert (status, answer["error"]["code"]) == (422, "invalid")
    await site.token(revoke=True)


# ---- more than can be taken


async def test_datagrams_that_come_too_fast_are_counted(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), pending_points=100, syslog_datagrams=5)
    async with listening(tmp_path, limits) as site:
        await site.bind("press-1", "127.0.0.1")
        with locked(site.plant.database):
            site.udp(*(b"<14>Jan  1 00:00:00 host app: line" for _ in range(50)))
            async with asyncio.timeout(PATIENCE):
                while not (items := (await site.plant.get("/syslog/refused"))["items"]):
                    await asyncio.sleep(0.01)
        assert {item["reason"] for item in items} == {"too_fast"}
        async with asyncio.timeout(PATIENCE):
            while True:
                lost = sum(item["lines"] for item in (await site.plant.get("/syslog/refused"))["items"])
                stored = len((await site.plant.get("/logs"))["items"])
                if lost + stored == 50:
                    break


async def test_a_stream_waits_while_nothing_can_be_stored_and_loses_nothing(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), pending_points=500)
    async with listening(tmp_path, limits) as site:
        await site.bind("press-1", "127.0.0.1")
        lines = b"".join(b"<14>Jan  1 00:00:00 host app: line %d\n" % n for n in range(2_000))
        with locked(site.plant.database):
            sending = asyncio.create_task(site.tcp(lines))
            await asyncio.sleep(0.3)
            assert not sending.done()
        await sending
        page = await site.plant.until("/logs?limit=1000", lambda body: body["items"][:1] and body["items"][0]["message"] == "line 1999")
        assert [line["message"] for line in page["items"]] == [f"line {n}" for n in range(1_999, 999, -1)]
        assert plants.rows(site.plant.database, "select count(*) from log_line") == [(2_000,)]


async def test_datagrams_wait_for_nothing_while_streams_do(site: Site) -> None:
    """Whoever takes them for all senders would give up when the storage does, and end the server."""
    await site.bind("press-1", "127.0.0.1")
    site.udp(b"<14>Jan  1 00:00:00 host app: before")
    await site.lines(1)
    with locked(site.plant.database):
        (writer,) = [thing for thing in gc.get_objects() if isinstance(thing, iiot.Writer) and not thing.task.done()]
        share = writer._shares.of(1)
        share._storing.append(asyncio.get_running_loop().create_future())
        share.add(share._pace.each // 2)
        share.add(1)
        assert (share.crowded, share.full) == (True, False)
        site.udp(b"<14>Jan  1 00:00:00 host app: meanwhile")
        assert (await site.refused(1))[0]["reason"] == "too_fast"


@pytest.mark.parametrize("kind", ["tcp", "tls", "relp"])
async def test_who_says_nothing_makes_room_for_who_sends_lines(tmp_path: Path, kind: str) -> None:
    limits = attrs.evolve(iiot.Limits(), connections=5)
    other = free_port()
    cert, key = await certificate(tmp_path, "localhost")
    secure: dict[str, Any] = {"tls_cert": str(tmp_path / cert), "tls_key": str(tmp_path / key), "syslog_tls_port": other}
    settings: dict[str, dict[str, Any]] = {"tcp": {}, "tls": secure, "relp": {"relp_port": other}}
    async with listening(tmp_path, limits, **settings[kind]) as site:
        await site.bind("press-1", "127.0.0.1")
        port = site.port if kind == "tcp" else other
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        async with asyncio.timeout(PATIENCE):
            for reader, _ in silent[:10]:
                with suppress(ConnectionError):
                    assert await reader.read() == b""
        line = b"<14>Jan  1 00:00:00 host app: x\n"
        if kind == "relp":
            async with Sender.of(port) as sender:
                assert await sender.ask("syslog", line.strip()) == b"6 200 OK\n"
        else:
            context = ssl.create_default_context(cafile=tmp_path / cert) if kind == "tls" else None
            if context is not None:
                context.check_hostname = False
            await site.tcp(line, tls=context)
        await site.lines(1)
        for _, writer in silent:
            writer.close()


async def test_a_stream_that_has_sent_lines_of_a_device_stays_while_others_make_room(tmp_path: Path) -> None:
    async with listening(tmp_path, attrs.evolve(iiot.Limits(), connections=5)) as site:
        await site.bind("press-1", "127.0.0.1")
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"<14>Jan  1 00:00:00 host app: first\n")
        await site.lines(1)
        silent = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(20)]
        writer.write(b"<14>Jan  1 00:00:00 host app: second\n")
        assert [line["message"] for line in await site.lines(2)] == ["first", "second"]
        for _, other in (*silent, (None, writer)):
            other.close()


async def test_streams_are_bounded_in_number(tmp_path: Path) -> None:
    async with listening(tmp_path, attrs.evolve(iiot.Limits(), syslog_connections=2)) as site:
        await site.bind("press-1", "127.0.0.1")
        held = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(2)]
        for number, (_, writer) in enumerate(held):
            writer.write(b"<14>Jan  1 00:00:00 host app: %d\n" % number)
        await site.lines(2)
        with suppress(OSError):  # it may be told by the end of the stream alone
            await site.tcp(b"<14>Jan  1 00:00:00 host app: one more\n")
        assert (await site.refused(1))[0]["reason"] == "too_many_connections"
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
