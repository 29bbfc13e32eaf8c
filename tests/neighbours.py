"""python tests/neighbours.py: what one tenant pays for what another does.

A quiet tenant has fifty devices and an operator. They are timed alone, and then beside a noisy tenant that does what once made all
others wait (`noise.py`), input by input, each on a fresh server with a fresh database. Either tenant is a process of its own. The quiet
one also measures how late it is woken itself: by so much its figures may be too high.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import Program, processor_seconds
from load import Worker, telemetry_frame
from noise import INPUTS, PATIENCE, Client, Input, Link, Noise, Place, Tenant, request

import iiot

QUIET_DEVICES = 50  # each sends a frame of two points every second
REQUESTS_A_SECOND = 10.0
ALONE_SECONDS = 4.0
TIMER_SECONDS = 0.005
DESCRIPTORS = 400  # of the server that silent connections are to fill
Row = tuple[float, float, str]  # when something was sent, the seconds that it took, and what came of it


# ---- the quiet tenant


@attrs.define
class Measured:
    """What the quiet tenant measured: acknowledgements, requests, how late its timer was; and why sessions were closed."""

    acks: list[Row] = attrs.field(factory=list)
    requests: list[Row] = attrs.field(factory=list)
    timer: list[Row] = attrs.field(factory=list)
    closed: list[str] = attrs.field(factory=list)

    def over(self, moment: float) -> Measured:
        """What was over before a moment."""
        acks, requests, timer = ([row for row in rows if row[0] + row[1] < moment] for rows in (self.acks, self.requests, self.timer))
        return Measured(acks, requests, timer)

    def after(self, moment: float) -> Measured:
        """What was not."""
        acks, requests, timer = ([row for row in rows if row[0] + row[1] >= moment] for rows in (self.acks, self.requests, self.timer))
        return Measured(acks, requests, timer, self.closed)


class Quiet:
    """The devices and the operator of the quiet tenant. With `fresh` the operator opens a connection for each request."""

    def __init__(self, place: Place, tenant: Tenant, *, fresh: bool) -> None:
        self._place = place
        self._tenant = tenant
        self._fresh = fresh
        self._measured = Measured()

    async def run(self, pipe: Connection) -> Measured:
        """Tell when all are connected; told for how long, measure."""
        links = [await Link.open(self._place, token) for token in self._tenant.devices[:QUIET_DEVICES]]
        sent: list[deque[tuple[int, float]]] = [deque() for _ in links]
        pipe.send("ready")
        seconds = await asyncio.to_thread(pipe.recv)
        first = iiot.now_ms()
        frames = [telemetry_frame(turn + 1, first + turn * 1000, 1, 2) for turn in range(int(seconds) + 1)]
        others = [asyncio.create_task(work) for work in (*map(self._read, links, sent), self._watch_timer())]
        await asyncio.gather(self._send(links, sent, frames, seconds), self._ask_in_turn(seconds))
        until = time.monotonic() + PATIENCE
        while any(sent) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for waiting in sent:
            self._give_up(waiting)
        for task in others:
            task.cancel()
        return self._measured

    @staticmethod
    async def _send(links: list[Link], sent: list[deque[tuple[int, float]]], frames: list[bytes], seconds: float) -> None:
        """One device after the other, so that each sends once a second; whatever it still waits for."""
        began = time.monotonic()
        for number in range(int(seconds * len(links))):
            await asyncio.sleep(max(0.0, began + number / len(links) - time.monotonic()))
            turn, place = divmod(number, len(links))
            if not links[place].writer.is_closing():
                sent[place].append((turn + 1, time.monotonic()))
                links[place].writer.write(frames[turn])

    async def _read(self, link: Link, sent: deque[tuple[int, float]]) -> None:
        try:
            while True:
                frame = await link.receive()
                now = time.monotonic()
                while frame["type"] == "ack" and sent and sent[0][0] <= frame["seq"]:
                    at = sent.popleft()[1]
                    self._measured.acks.append((at, now - at, "ack"))
        except ConnectionError as error:
            self._measured.closed.append(str(error))
            self._give_up(sent)
            link.writer.close()

    def _give_up(self, sent: deque[tuple[int, float]]) -> None:
        """Frames for which no acknowledgement came."""
        self._measured.acks += [(at, time.monotonic() - at, "no ack") for _, at in sent]
        sent.clear()

    def _requests(self) -> Iterator[bytes]:
        token = self._tenant.admin
        for number in count():
            device = f"/iiot/quiet-{number % QUIET_DEVICES:05}"
            yield request("GET", "/iiot", token)
            yield request("GET", device, token)
            yield request("GET", f"{device}/telemetry?metric=metric-0&from=-1m&every=5s&agg=avg,max", token)
            yield request("GET", f"{device}/events", token)
            yield request("POST", device, token, b'{"interval":%d}' % number)
            yield request("GET", "/healthz")

    async def _ask_in_turn(self, seconds: float) -> None:
        """One request after the other, at a steady pace; the next one at once where an answer came late."""
        client, due = Client(self._place), time.monotonic()
        until = due + seconds
        for content in self._requests():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            at = time.monotonic()
            if at >= until:
                return
            status = await client.ask(content)
            self._measured.requests.append((at, time.monotonic() - at, status))
            due = max(due + 1 / REQUESTS_A_SECOND, time.monotonic())
            if self._fresh:
                client.close()

    async def _watch_timer(self) -> None:
        while True:
            due = time.monotonic() + TIMER_SECONDS
            await asyncio.sleep(TIMER_SECONDS)
            self._measured.timer.append((due, time.monotonic() - due, ""))


def run_and_tell(pipe: Connection, work: Coroutine[Any, Any, object]) -> None:
    """The work of a process; what it answers is sent."""
    try:
        pipe.send(asyncio.run(work))
    except Exception as error:  # noqa: BLE001 - raised again where the answer is received
        pipe.send(error)


def be_quiet(pipe: Connection, place: Place, tenant: Tenant, fresh: bool) -> None:  # noqa: FBT001 - the arguments of a process
    run_and_tell(pipe, Quiet(place, tenant, fresh=fresh).run(pipe))


def be_noisy(pipe: Connection, number: int, place: Place, database: Path, tenant: Tenant, neighbour: str) -> None:
    os.nice(10)  # it stands for other machines: its own work is not to be paid for
    noise, work = Noise(pipe, place, database, tenant, neighbour), INPUTS[number].work
    assert work is not None

    async def run() -> Counter[str]:
        await work(noise)
        return noise.counts

    run_and_tell(pipe, run())


# ---- the server and its history


def add_tenant(connection: sqlite3.Connection, name: str, devices: int) -> tuple[int, Tenant]:
    """A tenant and its id. By SQL, for thousands of devices, and for servers of other versions."""
    now = iiot.now_ms()
    (tenant,) = connection.execute("insert into tenant (name, created_at) values (?, ?) returning id", (name, now)).fetchone()
    people = {role: iiot.mint("op") for role in ("admin", "viewer")}
    connection.executemany(
        "insert into operator_token (id, tenant_id, name, role, secret_hash, created_at) values (?, ?, ?, ?, ?, ?)",
        [(token.stored.id, tenant, f"{name} {role}", role, token.stored.secret_hash, now) for role, token in people.items()],
    )
    tokens = [iiot.mint("dev") for _ in range(devices)]
    for number, token in enumerate(tokens):
        (device,) = connection.execute(
            "insert into device (tenant_id, name, created_at) values (?, ?, ?) returning id", (tenant, f"{name}-{number:05}", now)
        ).fetchone()
        connection.execute("insert into presence (device_id) values (?)", (device,))
        connection.execute(
            "insert into device_token (id, device_id, secret_hash, created_at) values (?, ?, ?, ?)",
            (token.stored.id, device, token.stored.secret_hash, now),
        )
    return tenant, Tenant(people["admin"].text, people["viewer"].text, tuple(token.text for token in tokens))


def prepare(database: Path, source: Path, case: Input) -> tuple[Tenant, Tenant]:
    """The database of a server's own version, with a quiet tenant, and a noisy one with its history."""
    make = "import sys, pathlib, iiot; iiot.prepare_database(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", make, str(database)], cwd=source.parent, check=True)
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("pragma journal_mode = off")  # a log of all this would have to be copied
        connection.execute("pragma synchronous = off")
        connection.execute("begin")
        _, quiet = add_tenant(connection, "quiet", QUIET_DEVICES + 1)
        tenant, noisy = add_tenant(connection, "noisy", case.devices)
        if case.fill is not None:
            case.fill(connection, tenant)
        connection.execute("commit")
        connection.execute("pragma journal_mode = wal")
    return quiet, noisy


def make_certificate(folder: Path) -> tuple[str, str]:
    """Files of a certificate for this machine, and of its key."""
    certificate, key = str(folder / "server.pem"), str(folder / "server.key")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


# ---- measuring


@attrs.frozen
class Result:
    """What one input did to the quiet tenant and to the server."""

    case: Input
    alone: Measured
    beside: Measured
    counts: Counter[str]
    memory: tuple[float, float]  # MB when the input began, and at most
    wal: int  # bytes of the write-ahead log, at most
    cores: tuple[float, float]  # in use by the server, and by programs that have nothing to do with this
    told: list[str]  # what the server logged, but for what is usual


class Cores:
    """How many cores are in use since now."""

    def __init__(self, server: int, others: Iterable[int]) -> None:
        self._server = server
        self._ours = (server, os.getpid(), *others)
        self._before = self._seconds()

    def _seconds(self) -> tuple[float, float, float]:
        """The time, the processor time of the server, and that of all programs but ours."""
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
        everything = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), processor_seconds(self._server), everything - sum(map(processor_seconds, self._ours))

    def used(self) -> tuple[float, float]:
        """By the server, and by programs that are not ours."""
        seconds, server, others = (now - before for now, before in zip(self._seconds(), self._before, strict=True))
        return server / seconds, max(0.0, others / seconds)


def watch(
    program: Program, quiet: Worker, noisy: Worker, seconds: float
) -> tuple[float, tuple[float, float], int, tuple[float, float]]:
    """Let the quiet tenant work, after a while beside the noisy one: when that began, memory then and at most, the longest
    write-ahead log, and the cores in use."""
    wal, longest, used = Path(f"{program.database}-wal"), 0, (0.0, 0.0)
    quiet.send(ALONE_SECONDS + seconds)
    time.sleep(ALONE_SECONDS)
    memory, cores, began = program.memory(), Cores(program.pid, (quiet.pid, noisy.pid)), time.monotonic()
    noisy.send(seconds)
    while not quiet.pipe.poll(0.05):
        longest = max(longest, wal.stat().st_size)
        if time.monotonic() < began + seconds:
            used = cores.used()
    return began, (memory, program.memory("VmHWM")), longest, used


def measure(case: Input, source: Path, seconds: float) -> Result:
    tls = case.number == 15
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name:
        folder = Path(name)
        quiet_tenant, noisy_tenant = prepare(folder / "iiot.db", source, case)
        certificate, key = make_certificate(folder) if tls else ("", "")
        limit = f"ulimit -n {DESCRIPTORS}; " if tls else ""
        shell = ("sh", "-c", f'{limit}exec "$@" 2>{shlex.quote(str(folder / "log"))}', "sh")
        arguments = ("--tls-cert", certificate, "--tls-key", key) if tls else ()
        program = Program(folder / "iiot.db", *arguments, source=source, before=shell)
        program.start()
        try:
            place = Place(program.host, program.port, certificate)
            quiet = Worker(be_quiet, place, quiet_tenant, tls)
            quiet.receive()
            noisy = Worker(be_noisy, INPUTS.index(case), place, program.database, noisy_tenant, quiet_tenant.devices[-1])
            noisy.receive()
            began, memory, wal, used = watch(program, quiet, noisy, seconds)
            measured, counts = quiet.receive(), noisy.receive()
        finally:
            program.stop()
        told = [line for line in (folder / "log").read_text().splitlines() if " INFO " not in line]
        return Result(case, measured.over(began), measured.after(began), counts, memory, wal, used, told)


# ---- telling


def milliseconds(rows: Iterable[Row]) -> list[str]:
    """Median, 99 of 100, and the longest."""
    times = sorted(row[1] * 1000 for row in rows) or [float("nan")]
    shown = (times[len(times) // 2], times[len(times) * 99 // 100], times[-1])
    return [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in shown]


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{what}: {number:,}" for what, number in counts.most_common()) or "none"


def wrong(measured: Measured) -> Counter[str]:
    """What the quiet tenant got that it ought not to get."""
    bad = Counter(status for _, _, status in measured.requests if not status.startswith("2"))
    return bad + Counter(what for _, _, what in measured.acks if what != "ack") + Counter(measured.closed)


def cells(measured: Measured) -> list[str]:
    return [*milliseconds(measured.acks), *milliseconds(measured.requests), counted(wrong(measured))]


def tell(result: Result) -> None:
    for title, part in (("alone", result.alone), ("beside", result.beside)):
        a50, a99, a_most, r50, r99, r_most, bad = cells(part)
        print(
            f"{result.case.number:>2} {title:6}: ack p50 {a50}, p99 {a99}, longest {a_most} ms; request p50 {r50}, p99 {r99}, "
            f"longest {r_most} ms; not 2xx, or closed: {bad}; generator late by at most {milliseconds(part.timer)[2]} ms"
        )
    before, most = result.memory
    print(
        f"   {result.case.label}: {counted(result.counts)}; server: memory {before:,.0f} MB, at most {most:,.0f} MB;"
        f" write-ahead log at most {result.wal / 1e6:,.0f} MB; {result.cores[0]:.1f} cores, other programs {result.cores[1]:.1f};"
        f" {len(result.told):,} lines in its log",
        *(f"      {line[:200]}" for line in result.told[:3]), sep="\n", flush=True,
    )  # fmt: skip


HEADS = (
    "", "input", "ack p50", "p99", "longest", "request p50", "p99", "longest", "not 2xx, closed", "memory MB", "WAL MB", "cores",
    "other programs", "generator late", "what became of the input",
)  # fmt: skip


def table(results: list[Result]) -> str:
    """All of them, with a line for the quiet tenant alone."""
    alone = Measured()
    for part in (result.alone for result in results):
        alone.acks += part.acks
        alone.requests += part.requests
        alone.timer += part.timer
    memory = max(result.memory[0] for result in results)
    rows = [HEADS, ["---"] * len(HEADS), ["", "none", *cells(alone), f"{memory:,.0f}", "", "", "", milliseconds(alone.timer)[2], ""]]
    for result in results:
        server = f"{result.memory[1]:,.0f}", f"{result.wal / 1e6:,.0f}", *(f"{cores:.1f}" for cores in result.cores)
        late = milliseconds(result.beside.timer)[2]
        rows.append([str(result.case.number), result.case.label, *cells(result.beside), *server, late, counted(result.counts)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="numbers of inputs, separated by commas")
    parser.add_argument("--seconds", type=float, default=12.0, help="for how long an input lasts")
    parser.add_argument("--server", type=Path, default=Path(iiot.__file__), help="iiot.py of another version")
    arguments = parser.parse_args()
    only = {int(number) for number in arguments.only.split(",") if number}
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}; load before {os.getloadavg()[0]:.1f}")
    results = []
    for case in INPUTS:
        if only and case.number not in only:
            continue
        if case.work is None:
            print(f"{case.number:>2} {case.label}: see the tests", flush=True)
            continue
        results.append(measure(case, arguments.server.resolve(), arguments.seconds))
        tell(results[-1])
    if results:
        print(table(results))


if __name__ == "__main__":
    main()
