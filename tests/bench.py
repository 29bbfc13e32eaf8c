"""python tests/bench.py: what this machine does, in one run, beside what it is compared with.

Every server is a process of its own on a fresh database; the load comes from a second process with frames built beforehand.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent))
from load import (
    LEVELS,
    Worker,
    answer_commands,
    answer_configs,
    connect_and_wait,
    send_at_full_speed,
    send_logs_at_full_speed,
    send_steadily,
)
from plant import ROOT
from sshd import Sshd

import iiot

FIRST_TS = 1_735_689_600_000  # 2025-01-01
HISTORY_POINTS = 1_000_000


def processor_seconds(process: int) -> float:
    """Seconds of processor time that a process has used."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Program:
    """A server as a process of its own."""

    def __init__(self, database: Path, *arguments: str, source: Path = Path(iiot.__file__), before: tuple[str, ...] = ()) -> None:
        """`before`: the words of a command that starts another."""
        self.database = database
        self._command = [*before, sys.executable, str(source), "--port", "0", "--db", str(database), *arguments]
        self._process: subprocess.Popen[str] | None = None
        self.host, self.port = "127.0.0.1", 0

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        found = re.search(r":(\d+)$", self._process.stdout.readline().strip())
        assert found is not None
        self.port = int(found[1])

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)

    def memory(self, field: str = "VmRSS") -> float:
        """Resident memory in MB; with `VmHWM` the most that it ever was."""
        return int(next(line.split()[1] for line in self._told("status") if line.startswith(field))) / 1000

    def written(self) -> int:
        """Bytes that the process has given to the disk."""
        return int(next(line.split()[1] for line in self._told("io") if line.startswith("write_bytes")))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _told(self, file: str) -> list[str]:
        return Path(f"/proc/{self.pid}/{file}").read_text().splitlines()


class Server(Program):
    """A server on a fresh database with so many devices."""

    def __init__(self, folder: Path, devices: int, *arguments: str) -> None:
        super().__init__(folder / "iiot.db", *arguments)
        iiot.prepare_database(self.database)
        self.tokens: list[str] = []
        operator = iiot.mint("op")
        with closing(iiot.connect(self.database)) as connection, iiot.transaction(connection):
            tenant = iiot.tenant_id_of(connection, "default")
            iiot.insert_operator_token(connection, tenant, operator.stored, "bench", "admin")
            for number in range(devices):
                token = iiot.mint("dev")
                iiot.insert_device(connection, tenant, f"device-{number:05}", token.stored, {})
                self.tokens.append(token.text)
        self.operator = operator.text

    def add_history(self, points: int) -> None:
        """A device with one long series, a point a second."""
        with closing(iiot.connect(self.database)) as connection, iiot.transaction(connection):
            tenant = iiot.tenant_id_of(connection, "default")
            iiot.insert_device(connection, tenant, "history", iiot.mint("dev").stored, {})
            connection.execute("insert into series (device_id, metric) select id, 'level' from device where name = 'history'")
            connection.execute(
                """insert into telemetry with recursive n(i) as (select 0 union all select i + 1 from n where i < ? - 1)
                   select series.id, ? + i * 1000, (i * 7919 % 1000003) / 1000.0 from n, series where metric = 'level'""",
                (points, FIRST_TS),
            )

    def get(self, path: str, body: object = None) -> bytes:
        """The answer to GET, or to POST where there is a body."""
        headers, data = {"Authorization": f"Bearer {self.operator}"}, None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.host}:{self.port}{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return bytes(response.read())


@contextmanager
def server(devices: int, history: int = 0, arguments: tuple[str, ...] = ()) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        running = Server(Path(folder), devices, *arguments)
        if history:
            running.add_history(history)
        running.start()
        try:
            yield running
        finally:
            running.stop()


def raw_insert(devices: int, frames: int, samples: int) -> float:
    """Points a second of `executemany`, 1,000 a commit, of the rows that the fleet sends, in the order in which it does."""
    rows = [
        (device * 2 + metric + 1, FIRST_TS + (frame * samples + sample) * 100, (frame * 31 + sample * 7 + metric) % 9973 / 8)
        for frame in range(frames)
        for device in range(devices)
        for sample in range(samples)
        for metric in range(2)
    ]
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        path = Path(folder) / "raw.db"
        iiot.prepare_database(path)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
            started = time.perf_counter()
            for at in range(0, len(rows), 1000):
                connection.execute("begin immediate")
                connection.executemany("insert into telemetry (series_id, ts, value) values (?, ?, ?)", rows[at : at + 1000])
                connection.execute("commit")
            return len(rows) / (time.perf_counter() - started)


def ingest(devices: int, frames: int, samples: int, rules: Iterable[dict[str, Any]] = ()) -> tuple[float, float]:
    """Frames a second, from the first byte to the last ack, and seconds of the server's processor for each; every point is counted in
    the database afterwards."""
    with server(devices) as running:
        for number, rule in enumerate(rules):
            running.get("/rules", {"name": f"rule {number}", **rule})
        worker = Worker(send_at_full_speed, running.host, running.port, running.tokens, frames, samples, FIRST_TS)
        worker.receive()
        before = processor_seconds(running.pid)
        worker.send()
        seconds = float(worker.receive())
        used = processor_seconds(running.pid) - before
        worker.join()
        with closing(sqlite3.connect(running.database)) as connection:
            stored = connection.execute("select count(*) from telemetry").fetchone()[0]
        assert stored == devices * frames * samples * 2, stored
        return devices * frames / seconds, used / (devices * frames)


def throughput(devices: int, frames: int, samples: int) -> None:
    points = samples * 2
    rate, _ = ingest(devices, frames, samples)
    raw = raw_insert(devices, frames, samples)
    print(
        f"frames of {points} points, {devices} devices: {rate:,.0f} frames/s, {rate * points:,.0f} points/s on disk and acknowledged; "
        f"raw executemany of the same {devices * frames * points:,} rows: {raw:,.0f} points/s; ratio {rate * points / raw:.2f}",
        flush=True,
    )


def alerts(devices: int, frames: int, samples: int, rounds: int) -> None:
    """What rules cost: none, a thousand of other metrics, and those that look at every point."""
    kinds: dict[str, list[dict[str, Any]]] = {
        "no rules": [],
        "1,000 rules of other metrics": [{"metric": f"other {n}", "condition": {"above": n}} for n in range(1_000)],
        "a rule for every point": [{"metric": f"metric-{n}", "condition": {"above": 1e9}} for n in range(2)],
        "a trend through every point": [{"metric": f"metric-{n}", "condition": {"slope_above": 1e9, "window": "1m"}} for n in range(2)],
        "an alert every few seconds": [{"metric": f"metric-{n}", "condition": {"above": 600}} for n in range(2)],
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, rules in kinds.items():
            measured[name].append(ingest(devices, frames, samples, rules))
    without = statistics.median(used for _, used in measured["no rules"])
    for name, found in measured.items():
        rate, used = (statistics.median(each) for each in zip(*found, strict=True))
        told = f"{used * 1e6:.1f} µs of the server's processor each ({used / without - 1:+.0%})"
        print(f"frames of {samples * 2} points, {name}: {rate:,.0f} frames/s, {told}", flush=True)


def latency(devices: int, rate: float, seconds: float) -> None:
    with server(devices) as running:
        worker = Worker(send_steadily, running.host, running.port, running.tokens, rate, seconds, FIRST_TS)
        times = sorted(worker.receive())
        worker.join()
    p50, p99 = times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000
    longest = times[-1] * 1000
    print(f"ack at {rate:,.0f} frames/s, {devices} devices: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {longest:.1f} ms", flush=True)


def idle_devices(devices: int) -> None:
    with server(devices) as running:
        before = running.memory()
        worker = Worker(connect_and_wait, running.host, running.port, running.tokens)
        seconds = float(worker.receive())
        time.sleep(2)
        after = running.memory()
        answered = json.loads(running.get("/iiot?connected=true&limit=1"))
        assert answered["items"], answered
        worker.send()
        worker.join()
    print(
        f"connects: {devices / seconds:,.0f} a second; memory with {devices:,} connected devices: {after:,.0f} MB "
        f"({before:,.0f} MB without, {(after - before) * 1000 / devices:.1f} KB each)",
        flush=True,
    )


def configurations(devices: int) -> None:
    """One configuration pushed to all devices, live, until each one's verdict has been read back."""
    with server(devices) as running:
        worker = Worker(answer_configs, running.host, running.port, running.tokens)
        worker.receive()
        started = time.perf_counter()
        pushed = json.loads(running.get("/iiot", {"match": "*", "config": {"interval": 5, "limits": {"pressure": [1.5, 8]}}}))
        answered = time.perf_counter() - started
        assert len(pushed["items"]) == devices
        worker.receive()
        applied, after = 0, ""
        while after is not None:
            page = json.loads(running.get(f"/iiot?limit=1000&after={after}"))
            applied += sum(item["config"]["status"] == "applied" for item in page["items"])
            after = page["next"]
        seconds = time.perf_counter() - started
        assert applied == devices, applied
        worker.send()
        worker.join()
    print(
        f"one configuration to {devices:,} live devices: {answered:.2f} s until the push is answered, "
        f"{seconds:.2f} s until {applied:,} applied verdicts are read back",
        flush=True,
    )


def commands(devices: int) -> None:
    """One command for all devices, live, until each one's result has been read back."""
    with server(devices) as running:
        worker = Worker(answer_commands, running.host, running.port, running.tokens)
        worker.receive()
        started = time.perf_counter()
        number = json.loads(running.get("/commands", {"match": "*", "argv": ["uname", "-sr"]}))["id"]
        worker.receive()
        answered = time.perf_counter() - started
        done, after = 0, 0
        while after is not None:
            page = json.loads(running.get(f"/commands/{number}?limit=1000&after={after}"))
            done += sum((one["status"], one["output"]) == ("done", "Linux 6.1.0\n") for one in page["items"])
            after = page["next"]
        seconds = time.perf_counter() - started
        assert (done, page["counts"]) == (devices, {"done": devices}), page["counts"]
        worker.send()
        worker.join()
    print(
        f"one command to {devices:,} live devices: {answered:.2f} s until the last result is stored, "
        f"{seconds:.2f} s until {done:,} results with their output are read back",
        flush=True,
    )


def size_on_disk(devices: int, metrics: int, frames: int) -> None:
    """Bytes a point of the database file, once the server has stopped. The order of the rows is that of a fleet, so pages split as they
    do in use."""
    with server(devices) as running:
        worker = Worker(send_at_full_speed, running.host, running.port, running.tokens, frames, 1, FIRST_TS, metrics)
        worker.receive()
        worker.send()
        worker.receive()
        worker.join()
        running.stop()
        points, size = devices * metrics * frames, running.database.stat().st_size
    series = devices * metrics
    print(f"on disk: {size / points:.1f} bytes a point ({points:,} points of {series:,} series in {size / 1e6:,.0f} MB)", flush=True)


def bytes_written(devices: int, metrics: int, samples: int, rate: float, seconds: float) -> None:
    """Bytes that the server gives to the disk for each point, at a steady rate: the log and the database file together. Each device must
    send within a heartbeat, for the load generator answers no pings."""
    with server(devices) as running:
        before = running.written()
        worker = Worker(send_steadily, running.host, running.port, running.tokens, rate, seconds, FIRST_TS, metrics, samples)
        worker.receive()
        worker.join()
        written, points = running.written() - before, int(rate * seconds) * metrics * samples
    print(
        f"written at {rate:,.3g} frames/s of {metrics * samples} points, {devices} devices: {written / points:,.0f} bytes a point, "
        f"{written / seconds / 1e6 * 86.4:,.1f} GB a day",
        flush=True,
    )


def queries(points: int, devices: int, frames: int) -> None:
    """A bucket query over a long series, on an idle server and beside a writer under full load."""
    path = f"/iiot/history/telemetry?metric=level&every={points // 1000}s&agg=avg,min,max&limit=2000"
    with server(devices, history=points) as running:

        def timed() -> float:
            started = time.perf_counter()
            body = json.loads(running.get(path))
            assert len(body["series"][0]["points"]) >= 1000, body
            return time.perf_counter() - started

        idle = [timed() for _ in range(5)]
        worker = Worker(send_at_full_speed, running.host, running.port, running.tokens, frames, 1, FIRST_TS)
        worker.receive()
        worker.send()
        time.sleep(1)
        loaded = []
        while not worker.pipe.poll():
            loaded.append(timed())
        worker.receive()
        worker.join()
    print(
        f"buckets of {points:,} points into 1,000: {statistics.median(idle) * 1000:.0f} ms idle, {statistics.median(loaded) * 1000:.0f} ms "
        f"while a writer runs at full load (longest {max(loaded) * 1000:.0f} ms, {len(loaded)} queries)",
        flush=True,
    )


WORDS = 20_000


class Messages:
    """Lines as machines write them: a few common words, many rare ones, a number, an id. The same at every run."""

    def __init__(self) -> None:
        self._chance = random.Random(1)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(self._chance.choices(letters, k=self._chance.randint(3, 10))) for _ in range(WORDS)]
        self._weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(WORDS)))

    def some(self, count: int) -> list[str]:
        chance = self._chance
        return [
            f"{' '.join(chance.choices(self.words, cum_weights=self._weights, k=8))} value={chance.random() * 100:.2f} "
            f"id={chance.getrandbits(32):08x} E-{chance.randint(1000, 9999)}"
            for _ in range(count)
        ]


def logs(lines: int, devices: int) -> None:
    """Intake of a part of the lines; then all of them are in the database, and are searched."""
    made, part = Messages(), lines // 10 // devices
    with server(devices) as running:
        messages = [made.some(part) for _ in range(devices)]
        worker = Worker(send_logs_at_full_speed, running.host, running.port, running.tokens, messages, 50)
        worker.receive()
        before = processor_seconds(running.pid)
        worker.send()
        seconds = float(worker.receive())
        used = processor_seconds(running.pid) - before
        worker.join()
        running.stop()
        count, text = part * devices, "\n".join(itertools.chain(*messages)).encode()
        with closing(sqlite3.connect(running.database)) as connection:
            assert connection.execute("select count(*) from log_line").fetchone() == (count,)
        print(
            f"log lines in frames of 50, {devices} devices: {count / seconds:,.0f} lines/s on disk and acknowledged, "
            f"{used / count * 1e6:.0f} µs of the processor each; {running.database.stat().st_size / count:.0f} bytes a line on disk with "
            f"its index (text {len(text) / count:.0f}, gzip {len(gzip.compress(text)) / count:.0f})",
            flush=True,
        )
        with closing(iiot.connect(running.database)) as connection:
            dictionary = iiot.Dictionary(iiot.Limits().log_words_known)
            for start in range(count, lines, 5_000):
                batch = iiot.Batch()
                for number, message in enumerate(made.some(5_000), start):
                    at, level = FIRST_TS + number, iiot.LEVELS[LEVELS[number % len(LEVELS)]]
                    batch.lines.append(iiot.LogLine(1, 1 + number % devices, at, at, level, message, None, None, None))
                batch.write(connection, iiot.Limits(), dictionary)
        running.start()
        searches = {
            "newest": "limit=100", "rare word": f"q={made.words[-10]}", "common word, device and level": f"q={made.words[0]}&level=error",
            "phrase": f'q="{made.words[5]} {made.words[40]}"', "part of a word": f"q={made.words[-20][1:-1]}", "a code": "q=E-4711",
            "beginning of a word": f"q={made.words[3000][:4]}*", "nothing": "q=nothing-of-this",
        }
        for name, search in searches.items():
            path = f"/iiot/device-00017/logs?{search}" if "device" in name else f"/logs?{search}"
            took = []
            for _ in range(9):
                started = time.perf_counter()
                found = json.loads(running.get(urllib.parse.quote(path, safe="/?=&*")))["items"]
                took.append((time.perf_counter() - started) * 1000)
            told = f"{len(found)} on the page, {statistics.median(took):.1f} ms (first {took[0]:.0f} ms)"
            print(f"search of {lines:,} lines, {name}: {told}", flush=True)


def size(scale: float) -> None:
    size_on_disk(100, 10, int(4000 * scale))
    for fleet in (10, 100, 1000, 10_000):
        bytes_written(fleet, 10, 1, fleet / 5, 60 * scale)
    for fleet in (100, 1000):
        bytes_written(fleet, 10, 12, fleet / 15, 60 * scale)


def ingest_in_both_sizes(scale: float) -> None:
    throughput(200, int(3000 * scale), 1)
    throughput(int(2000 * scale), 40, 25)


def alerts_in_both_sizes(scale: float) -> None:
    alerts(200, int(2000 * scale), 1, 5)
    alerts(200, int(400 * scale), 25, 5)


class Sink(BaseHTTPRequestHandler):
    """A receiver of notifications that takes everything."""

    protocol_version = "HTTP/1.1"
    taken: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


def notifications(alerts: int) -> None:
    """So many alerts that fire at one moment, told to a receiver of each kind of groups, and how long another request waits meanwhile."""
    sink = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    Thread(target=sink.serve_forever, daemon=True).start()
    with server(alerts, arguments=("--webhook-networks", "127.0.0.0/8")) as running:
        for form, grouping in (("webhook", "rule"), ("webhook", "device"), ("alertmanager", "rule")):
            url = f"http://127.0.0.1:{sink.server_address[1]}/"
            body = {"url": url, "form": form, "group_by": grouping, "wait": "0s", "interval": "1h", "rule": f"{form} {grouping}"}
            number = json.loads(running.get("/webhooks", body))["id"]
            with closing(iiot.connect(running.database)) as connection, iiot.transaction(connection):
                connection.execute(
                    """insert into alert (id, tenant_id, device_id, rule_id, rule, kind, severity, labels, text, since, fired_at,
                           changed_at)
                       select :number * 1000000 + id, tenant_id, id, :number, :rule, 'above', 'critical', '{}', name || ' is hot', 1, 1, 1
                       from device""",
                    {"number": number, "rule": body["rule"]},
                )
            started, worst, told = time.perf_counter(), 0.0, 0
            with closing(sqlite3.connect(running.database)) as connection:
                while told < alerts:
                    asked = time.perf_counter()
                    running.get("/healthz")
                    worst = max(worst, time.perf_counter() - asked)
                    (told,) = connection.execute(
                        "select count(*) from notice where webhook_id = ? and told_at is not null", (number,)
                    ).fetchone()
                    time.sleep(0.01)
            seconds = time.perf_counter() - started
            waited = f"another request waits {worst * 1000:.0f} ms at most"
            print(f"{alerts:,} alerts at once, told to {form} by {grouping}: written down in {seconds:.1f} s, {waited}", flush=True)
    sink.shutdown()


def offline(devices: int) -> None:
    """All devices are gone at one moment: what a receiver gets, and how long another request waits meanwhile."""
    sink = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    Thread(target=sink.serve_forever, daemon=True).start()
    Sink.taken.clear()
    with server(devices, arguments=("--webhook-networks", "127.0.0.0/8")) as running:
        running.get("/rules", {"name": "offline", "condition": {"offline": "5s"}})
        url = f"http://127.0.0.1:{sink.server_address[1]}/"
        running.get("/webhooks", {"url": url, "group_by": "rule", "wait": "5s", "interval": "1h"})
        worker = Worker(connect_and_wait, running.host, running.port, running.tokens)
        worker.receive()
        time.sleep(5)
        worker.send()
        gone, waits, first = time.perf_counter(), list[tuple[float, float]](), None
        while time.perf_counter() - gone < 30:
            asked = time.perf_counter()
            running.get("/healthz")
            waits.append((asked - gone, time.perf_counter() - asked))
            if Sink.taken and first is None:
                first = time.perf_counter() - gone
            time.sleep(0.01)
        worker.join()
    sink.shutdown()
    told = [len(body["alerts"]) + body["truncatedAlerts"] for body in Sink.taken]
    when = "never" if first is None else f"{first:.1f} s"
    going, later = (max(wait for at, wait in waits if (at < 4) is early) * 1000 for early in (True, False))
    print(
        f"{devices:,} devices gone at once, offline after 5 s, told after 5 s more: {len(told)} notification of {told} alerts "
        f"after {when}; "
        f"another request waits {going:.0f} ms at most while they go, {later:.0f} ms after that",
        flush=True,
    )


TIMED_AGENT = """
import json, signal, sys, time
sys.path.insert(0, sys.argv[1])
import agent
times, acknowledged = [], agent.Window.acknowledged
def timed(window, size, sent, now, under_way):
    times.append((time.time(), now - sent))
    acknowledged(window, size, sent, now, under_way)
agent.Window.acknowledged = timed
try:
    agent.main(sys.argv[3:])
finally:
    open(sys.argv[2], "w").write(json.dumps(times))
"""  # the agent, and how long each of its frames waited to be acknowledged


class Copies:
    """Copies of a file to a machine by scp, each with its digest compared, and how fast they were."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._size = size
        self._digest = hashlib.sha256()
        with (folder / "file").open("wb") as file:
            for _ in range(size >> 20):
                piece = os.urandom(1 << 20)
                self._digest.update(piece)
                file.write(piece)

    def both_ways(self, host: str, options: list[str], environment: dict[str, str]) -> tuple[float, float]:
        """MB in a second, there and back."""
        rates = []
        for source, target in ((str(self._folder / "file"), f"{host}:{self._folder}/there"), (f"{host}:{self._folder}/there", "back")):
            began = time.perf_counter()
            subprocess.run(["scp", "-q", *options, source, target], check=True, cwd=self._folder, env={**os.environ, **environment})
            rates.append(self._size / 1e6 / (time.perf_counter() - began))
        for name in ("there", "back"):
            assert hashlib.sha256((self._folder / name).read_bytes()).digest() == self._digest.digest()
            (self._folder / name).unlink()
        return rates[0], rates[1]


def tunnels(megabytes: int) -> None:
    """A file by scp through a tunnel, beside the same copy without one, and through a second sshd (ssh -J); and what the device's own
    readings notice of it."""
    with server(1) as running, tempfile.TemporaryDirectory() as name:
        folder, sshd = Path(name), Sshd(Path(name))
        sshd.start()
        words = ["--url", f"http://127.0.0.1:{running.port}", "--token", running.tokens[0], "--name", "device-00000"]
        timed = [sys.executable, "-c", TIMED_AGENT, str(ROOT), str(folder / "times"), *words]
        agent = subprocess.Popen([*timed, "--interval", "0.02", "--allow-tunnel", str(sshd.port)], cwd=folder, stderr=subprocess.DEVNULL)
        options = [
            "-F", "none", "-o", f"IdentityFile={folder}/user", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
            "-o", "LogLevel=ERROR", "-o", f"Port={sshd.port}",
        ]  # fmt: skip
        proxy = f"{sys.executable} {ROOT / 'iiot.py'} tunnel %n %p"
        jump = f"ssh {' '.join(options)} -W %h:%p 127.0.0.1"
        ways = {
            "directly": ("127.0.0.1", options),
            "by ssh -J": ("127.0.0.1", [*options, "-o", f"ProxyCommand={jump}"]),
            "through a tunnel": ("device-00000", [*options, "-o", f"ProxyCommand={proxy}"]),
        }
        environment = {"IIOT_URL": f"http://127.0.0.1:{running.port}", "IIOT_TOKEN": running.operator}
        copies = Copies(folder, megabytes << 20)
        time.sleep(10)
        began = time.time()
        told = {way: copies.both_ways(host, more, environment) for way, (host, more) in list(ways.items())[:2]}
        middle = time.time()
        told["through a tunnel"] = copies.both_ways(*ways["through a tunnel"], environment)
        agent.terminate()
        agent.wait()
        sshd.stop()
        times = json.loads((folder / "times").read_text())
    before = sorted(seconds for at, seconds in times if began - 9 < at < began)
    copying = sorted(seconds for at, seconds in times if at > middle)
    rates = ", ".join(f"{way} {there:.0f} and {back:.0f} MB/s" for way, (there, back) in told.items())
    shown = [f"p50 {some[len(some) // 2] * 1000:.1f} ms, p99 {some[len(some) * 99 // 100] * 1000:.1f} ms" for some in (before, copying)]
    print(
        f"{megabytes} MiB by scp, there and back: {rates}; acks of the device's own readings: {shown[0]} without, {shown[1]} with the "
        f"copy through its connection ({len(copying)} frames)",
        flush=True,
    )


PARTS: dict[str, Callable[[float], None]] = {
    "ingest": ingest_in_both_sizes,
    "latency": lambda scale: latency(200, 5000.0, 10 * scale),
    "idle": lambda scale: idle_devices(int(10_000 * scale)),
    "size": size,
    "config": lambda scale: configurations(int(5000 * scale)),
    "commands": lambda scale: commands(int(5000 * scale)),
    "tunnels": lambda scale: tunnels(max(1, int(200 * scale))),
    "queries": lambda scale: queries(HISTORY_POINTS, 200, int(3000 * scale)),
    "logs": lambda scale: logs(int(5_000_000 * scale), 50),
    "alerts": alerts_in_both_sizes,
    "offline": lambda scale: offline(int(10_000 * scale)),
    "notifications": lambda scale: notifications(int(10_000 * scale)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the frames and devices, for a quick look")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}", flush=True)
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            part(arguments.scale)


if __name__ == "__main__":
    main()
