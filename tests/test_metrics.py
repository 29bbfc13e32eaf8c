"""What a monitoring system scrapes: the server's own numbers, the newest of its devices, and both in a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp.test_utils import unused_port
from hypothesis import given
from hypothesis import strategies as st
from plant import OPENSSL, PATIENCE, ROOT, Device, Plant, Process, certificate, locked
from prometheus_client.parser import text_string_to_metric_families
from readme import Terminal, blocks, section

import iiot

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
RULES, DASHBOARD = ROOT / ".github/prometheus-rules.yml", ROOT / ".github/grafana-dashboard.json"
Labels = frozenset[tuple[str, str]]


@attrs.frozen
class Scrape:
    """One answer: every number by name and labels, and the families in their order."""

    text: str
    numbers: dict[tuple[str, Labels], float]
    families: list[str]

    @classmethod
    def of(cls, text: str) -> Scrape:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        numbers = {(sample.name, frozenset(sample.labels.items())): float(sample.value) for sample in samples}
        assert len(numbers) == len(samples), "no number stands there twice"
        return cls(text, numbers, re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))

    def get(self, name: str, **labels: str) -> float:
        return self.numbers[name, frozenset(labels.items())]

    def of_name(self, name: str) -> dict[tuple[str, ...], float]:
        """By the values of the labels, in the order of the labels' names."""
        return {tuple(value for _, value in sorted(labels)): number for (own, labels), number in self.numbers.items() if own == name}


@attrs.frozen
class Watched:
    """A plant, and who scrapes it."""

    plant: Plant
    platform: str

    async def server(self) -> Scrape:
        status, text = await self.plant.ask("GET", "/metrics", token=self.platform)
        assert status == 200, text
        return Scrape.of(text)

    async def devices(self, query: str = "") -> Scrape:
        status, text = await self.plant.ask("GET", f"/metrics/devices{query}")
        assert status == 200, text
        return Scrape.of(text)

    async def until(self, name: str, least: float, **labels: str) -> Scrape:
        """Once a number is so large."""
        async with asyncio.timeout(PATIENCE):
            while (scrape := await self.server()).numbers.get((name, frozenset(labels.items())), 0) < least:
                await asyncio.sleep(0.01)
        return scrape


@asynccontextmanager
async def watched(folder: Path, limits: iiot.Limits | None = None, **settings: Any) -> AsyncIterator[Watched]:
    async with plants.plant(folder, limits, **settings) as plant:
        yield Watched(plant, plants.admin_token(plant.database, "platform"))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Watched]:
    async with watched(tmp_path) as running:
        yield running


# ---- the server's own


async def test_what_devices_send_is_counted_once_it_is_on_disk(site: Watched) -> None:
    device = await site.plant.device("press-1")
    before = await site.server()
    frames = [{"values": {"level": n, "text": "x", "on": True}} for n in range(5)]
    for frame in frames:
        await device.store(frame)
    await device.send("log", seq=6, entries=[{"level": "error", "message": "hot"}] * 3)
    await device.acknowledged(6)
    after = await site.server()
    for name, more in {
        "iiot_frames_total": 6, "iiot_points_total": 15, "iiot_log_lines_total": 3, "iiot_batch_points_sum": 15,
        "iiot_ack_seconds_count": 6, "iiot_commit_failures_total": 0,
    }.items():  # fmt: skip
        assert after.get(name) - before.get(name) == more, name
    assert after.get("iiot_commit_seconds_count") - before.get("iiot_commit_seconds_count") >= 6
    assert 0 < after.get("iiot_commit_seconds_sum") < PATIENCE
    assert 0 < after.get("iiot_ack_seconds_sum") < PATIENCE
    assert after.get("iiot_frame_bytes_total") - before.get("iiot_frame_bytes_total") > 6 * 40
    assert after.get("iiot_log_bytes_total") > 3 * 10
    assert after.get("iiot_sessions") == 1
    assert after.get("iiot_connections") == 2
    assert (after.get("iiot_pending_points"), after.get("iiot_pending_weight")) == (0, 0)
    assert after.get("iiot_database_bytes") > 0 < after.get("iiot_wal_bytes")
    assert 0 < after.get("iiot_disk_free_bytes") < after.get("iiot_disk_bytes")
    assert abs(after.get("iiot_start_time_seconds") - iiot.now_ms() / 1000) < 60
    ((labels, one),) = after.of_name("iiot_build_info").items()
    assert (labels[2], one) == (iiot.VERSION, 1)


async def test_a_long_frame_counts_as_one(site: Watched) -> None:
    device = await site.plant.device("press-1")
    await device.store(*({"ts": 1_767_225_600_000 + n, "values": {"level": n}} for n in range(5_000)))
    scrape = await site.server()
    assert (scrape.get("iiot_frames_total"), scrape.get("iiot_points_total")) == (1, 5_000)
    assert scrape.get("iiot_frame_bytes_total") > 5_000 * 40


async def test_buckets_add_up(site: Watched) -> None:
    device = await site.plant.device("press-1")
    for count in (1, 11, 101):
        await device.store(*({"values": {"level": n}} for n in range(count)))
    scrape = await site.server()
    by_bound = {bound: number for (bound,), number in scrape.of_name("iiot_batch_points_bucket").items()}
    empty = by_bound["0.0"]
    assert [by_bound[bound] - empty for bound in ("10.0", "100.0", "1000.0", "100000.0", "+Inf")] == [1, 2, 3, 3, 3]
    for name in ("iiot_batch_points", "iiot_commit_seconds", "iiot_ack_seconds"):
        counts = [number for _, number in scrape.of_name(f"{name}_bucket").items()]
        assert counts == sorted(counts)
        assert counts[-1] == scrape.get(f"{name}_count")


def test_a_number_that_is_a_bound_is_within_it() -> None:
    seen = iiot.Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        seen.add(value)
    assert (seen.counts, seen.total) == ([2, 2, 1], 7.5)


async def test_refusals_are_counted_wherever_they_are_told(site: Watched) -> None:
    plant = site.plant
    device = await plant.device("press-1")
    await device.send("nonsense", seq=1)
    await device.expect("error")
    stranger = await plant.connect()
    await stranger.send("hello", token="wrong")
    await stranger.closed()
    assert (await plant.ask("GET", "/whoami", token="wrong"))[0] == 401
    assert (await plant.ask("GET", "/iiot?limit=0"))[0] == 400
    reader, writer = await asyncio.open_connection(*plant.url.removeprefix("http://").split(":"))
    writer.write(b"this is no HTTP\r\n\r\n")
    assert b"400" in await reader.readline()
    writer.close()
    scrape = await site.server()
    refused = {code: number for (code,), number in scrape.of_name("iiot_refusals_total").items()}
    assert set(refused) == set(iiot.FAULTS)
    assert {code: number for code, number in refused.items() if number} == {
        "unknown_type": 1, "unauthorized": 2, "bad_query": 1, "bad_request": 1,
    }  # fmt: skip


async def test_a_handshake_that_does_not_come_is_counted(tmp_path: Path) -> None:
    async with watched(tmp_path, attrs.evolve(iiot.Limits(), hello_seconds=0.1)) as site:
        await (await site.plant.connect()).closed()
        assert (await site.server()).get("iiot_refusals_total", code="handshake_timeout") == 1


async def test_sessions_that_end_are_counted_by_their_reason(site: Watched) -> None:
    await site.plant.device("press-1")
    second = await site.plant.device("press-1")
    await second.close()
    scrape = await site.until("iiot_session_ends_total", 1, reason="closed_by_device")
    assert scrape.of_name("iiot_session_ends_total") == {("superseded",): 1, ("closed_by_device",): 1}
    assert (scrape.get("iiot_sessions_opened_total"), scrape.get("iiot_sessions")) == (2, 0)


async def test_nothing_that_a_peer_says_becomes_a_label(site: Watched) -> None:
    plant = site.plant
    for path in ("/peers-word", "/iiot/peers-word", "/iiot/peers-word/config", "/iiot/peers-word/peers-word", "/iiot?peers-word=1"):
        await plant.ask("GET", path)
    await plant.ask("PEERSWORD", "/iiot")
    await plant.ask("DELETE", "/iiot")
    device = await plant.device("peers-word", agent="peers-word")
    await device.send("peers-word", seq=1)
    await device.store({"values": {"peers-word": 1}})
    scrape = await site.server()
    assert "peers" not in scrape.text.lower()
    requests = scrape.of_name("iiot_http_requests_total")
    assert {labels: number for labels, number in requests.items() if labels[1] == "unmatched"} == {
        ("", "unmatched", "404"): 2, ("", "unmatched", "405"): 1,
    }  # fmt: skip
    assert requests["GET", "/iiot/{device}", "404"] == 1
    assert requests["GET", "/iiot", "400"] == 1
    assert {route for _, route, _ in requests} <= {route.path for route in iiot.ROUTES} | {"unmatched"}
    assert (await site.server()).get("iiot_http_requests_total", method="GET", route="/metrics", status="200") >= 1


async def test_a_commit_that_fails_is_counted(tmp_path: Path) -> None:
    async with watched(tmp_path, attrs.evolve(iiot.Limits(), storage_seconds=0.3, retry_seconds=0.1)) as site:
        device = await site.plant.device("press-1")
        with locked(site.plant.database):
            await device.telemetry({"values": {"level": 1}})
            await device.closed()
        assert (await site.until("iiot_points_total", 1)).get("iiot_commit_failures_total") >= 1


async def test_syslog_that_is_refused_is_counted_by_reason(tmp_path: Path) -> None:
    port = unused_port()
    async with watched(tmp_path, syslog_port=port) as site:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"<13>peers-word: hello\n" * 3)
        await writer.drain()
        scrape = await site.until("iiot_syslog_refused_lines_total", 3, reason="unknown_address")
        writer.close()
        assert scrape.of_name("iiot_syslog_refused_lines_total") == {("unknown_address",): 3}
        assert (scrape.get("iiot_syslog_datagrams_waiting"), scrape.get("iiot_syslog_datagrams_lost_total")) == (0, 0)
        assert "peers" not in scrape.text


async def test_the_numbers_are_public_where_that_is_set(tmp_path: Path) -> None:
    async with watched(tmp_path, metrics_public=True) as site:
        for token in ("", site.platform, site.plant.token, "wrong"):
            assert (await site.plant.ask("GET", "/metrics", token=token))[0] == 200
        assert (await site.plant.ask("GET", "/metrics/devices", token=""))[0] == 401


@pytest.mark.parametrize(
    ("arguments", "variable", "status"),
    [
        ((), "", 401), (("--metrics-public",), "", 200), ((), "1", 200), ((), "True", 200), ((), "no", 401),
        (("--metrics-public",), "0", 200),
    ],
)  # fmt: skip
async def test_a_switch_is_a_flag_or_a_variable(process: Process, arguments: tuple[str, ...], variable: str, status: int) -> None:
    process.arguments, process.environment = arguments, {"IIOT_METRICS_PUBLIC": variable}
    await process.start()
    async with plants.client() as client:
        assert (await process.plant(client, "").ask("GET", "/metrics"))[0] == status


async def test_a_switch_that_is_neither_is_refused(tmp_path: Path) -> None:
    code, _, err = await plants.command("serve", folder=tmp_path, IIOT_METRICS_PUBLIC="maybe")
    assert code == 2
    assert "IIOT_METRICS_PUBLIC: 'maybe' is neither true nor false" in err


# ---- the certificate


def openssl(folder: Path, *words: str) -> str:
    if OPENSSL is None:
        pytest.skip("certificates are made by openssl")
    return subprocess.run([OPENSSL, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def end_by_openssl(folder: Path, name: str) -> int:
    shown = openssl(folder, "x509", "-in", name, "-noout", "-enddate").strip().removeprefix("notAfter=")
    return round(datetime.strptime(shown, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC).timestamp())


KEYS = {"rsa": ("rsa:2048",), "ec": ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"), "ed25519": ("ed25519",)}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("days", ["1", "3650", "36500"])  # of the last the year has four digits
def test_the_end_of_a_certificate_is_openssl_s(tmp_path: Path, key: str, days: str) -> None:
    openssl(tmp_path, "req", "-x509", "-newkey", *KEYS[key], "-nodes", "-subj", "/O=Müller/CN=localhost", "-utf8", "-days", days,
            "-keyout", "a.key", "-out", "a.pem")  # fmt: skip
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "a.pem").read_text())
    assert iiot.not_after(der) == end_by_openssl(tmp_path, "a.pem")
    for cut in range(len(der)):
        with pytest.raises(ValueError, match="no certificate"):
            iiot.not_after(der[:cut])


def test_the_end_of_a_certificate_of_version_1(tmp_path: Path) -> None:
    openssl(tmp_path, "req", "-newkey", *KEYS["ec"], "-nodes", "-subj", "/CN=old", "-keyout", "a.key", "-out", "a.csr")
    openssl(tmp_path, "x509", "-req", "-in", "a.csr", "-signkey", "a.key", "-days", "5", "-out", "a.pem")
    if "Version: 1 " not in openssl(tmp_path, "x509", "-in", "a.pem", "-noout", "-text"):
        pytest.skip("this openssl makes none")
    assert iiot.not_after(ssl.PEM_cert_to_DER_cert((tmp_path / "a.pem").read_text())) == end_by_openssl(tmp_path, "a.pem")


@given(st.binary(max_size=60))
def test_what_is_no_certificate_has_no_end(data: bytes) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        iiot.not_after(data)


async def test_the_end_is_that_of_the_certificate_that_is_shown(process: Process, tmp_path: Path) -> None:
    """Not that of the file, which is another until it is reloaded."""

    def renew(days: str) -> int:
        made = ("-days", days, "-keyout", "a.key", "-out", "a.pem")
        openssl(tmp_path, "req", "-x509", "-newkey", *KEYS["ec"], "-nodes", "-subj", "/CN=a", *made)
        return end_by_openssl(tmp_path, "a.pem")

    process.arguments = ("--tls-cert", "a.pem", "--tls-key", "a.key", "--metrics-public")
    first = renew("5")
    await process.start()
    async with plants.client() as client:
        site = Watched(process.plant(client, ""), "")
        name = "iiot_certificate_expiry_timestamp_seconds"
        assert (await site.server()).get(name) == first
        second = renew("400")
        assert (await site.server()).get(name) == first
        os.kill(process.pid, signal.SIGHUP)
        assert (await site.until(name, first + 1)).get(name) == second


async def test_without_a_certificate_there_is_no_end(site: Watched) -> None:
    assert "certificate" not in (await site.server()).text


async def test_a_certificate_of_rsa_is_read_off_tls(tmp_path: Path) -> None:
    openssl(tmp_path, "req", "-x509", "-newkey", *KEYS["rsa"], "-nodes", "-subj", "/CN=a", "-keyout", "a.key", "-out", "a.pem")
    context = iiot.tls_context(iiot.Settings(tls_cert=str(tmp_path / "a.pem"), tls_key=str(tmp_path / "a.key")))
    assert iiot.certificate_expiry(context) == end_by_openssl(tmp_path, "a.pem")


# ---- the devices'


DEVICE_FAMILIES = ["iiot_device_connected", "iiot_device_seen_timestamp_seconds", "iiot_reading", "iiot_reading_timestamp_seconds"]


async def test_presence_and_newest_readings_of_the_devices(site: Watched) -> None:
    plant = site.plant
    device = await plant.device("press-1")
    gone = await plant.device("press-2")
    await plant.register("press-3")
    at = iiot.now_ms() - 60_000
    await device.store({"ts": at, "values": {"level": 1}}, {"ts": at + 1, "values": {"level": 2.5, "on": True, "mode": "auto"}})
    await device.store({"ts": at - 5, "values": {"level": 9, "big": 2**63 - 1, "tiny": 5e-324, "tenth": 0.1}})
    await gone.close()
    await plant.until("/iiot/press-2", lambda shown: not shown["connected"])
    scrape = await site.devices()
    assert scrape.families == DEVICE_FAMILIES
    assert scrape.of_name("iiot_device_connected") == {("press-1",): 1, ("press-2",): 0, ("press-3",): 0}
    seen = scrape.of_name("iiot_device_seen_timestamp_seconds")
    assert set(seen) == {("press-1",), ("press-2",)}
    assert all(abs(moment - iiot.now_ms() / 1000) < 60 for moment in seen.values())
    assert scrape.of_name("iiot_reading") == {
        ("press-1", "level"): 2.5, ("press-1", "on"): 1, ("press-1", "big"): float(2**63 - 1), ("press-1", "tiny"): 5e-324,
        ("press-1", "tenth"): 0.1,
    }  # fmt: skip
    times = scrape.of_name("iiot_reading_timestamp_seconds")
    assert times.keys() == scrape.of_name("iiot_reading").keys()
    assert times["press-1", "level"] == (at + 1) / 1000
    assert all(re.fullmatch(r'(#.*|[^{]+\{.*\} [^ ]+)', line) for line in scrape.text.splitlines()), "no sample has a time of its own"


HARD = ['a"b', "a\\b", 'a\\"', "{}", "ü°C", "a,b=c", "#", "\\n", "x" * 128, "\U0001f321"]


async def test_every_name_of_a_metric_comes_out_valid(site: Watched) -> None:
    device = await site.plant.device("press:1.A_b-c")
    await device.store({"values": {name: number for number, name in enumerate(HARD)}})
    scrape = await site.devices()
    assert scrape.of_name("iiot_reading") == {("press:1.A_b-c", name): number for number, name in enumerate(HARD)}
    assert iiot.label_value('a"b\n\\') == 'a\\"b\\n\\\\'
    await check_by_promtool(scrape.text)


async def test_a_scrape_is_narrowed(site: Watched) -> None:
    for name in ("press-1", "press-2", "pump-1"):
        device = await site.plant.device(name)
        await device.store({"values": {"level": 1, "speed": 2, "heat": 3}})

    async def readings(query: str) -> set[tuple[str, ...]]:
        scrape = await site.devices(query)
        assert scrape.families == DEVICE_FAMILIES
        return set(scrape.of_name("iiot_reading"))

    assert len(await readings("")) == 9
    assert await readings("?match=press-*&metric=level") == {("press-1", "level"), ("press-2", "level")}
    assert await readings("?match=pump-1&metric=speed&metric=heat&metric=nothing") == {("pump-1", "speed"), ("pump-1", "heat")}
    assert await readings("?match=nobody") == set()
    assert (await site.devices("?match=press-*")).of_name("iiot_device_connected") == {("press-1",): 1, ("press-2",): 1}
    for query in ("match=", "max_age=0", "max_age=x", "metrics=level", "match=a&match=b"):
        assert (await site.plant.ask("GET", f"/metrics/devices?{query}"))[0] == 400, query


async def test_old_readings_are_left_out(site: Watched) -> None:
    device = await site.plant.device("press-1")
    now = iiot.now_ms()
    ages = {"a": 0, "b": 240_000, "c": 360_000, "d": 86_400_000 * 365, "ahead": -3_600_000}
    await device.store(*({"ts": now - age, "values": {name: 1}} for name, age in ages.items()))
    await device.store({"ts": now - 1_000, "values": {"became text": 1}}, {"ts": now, "values": {"became text": "broken"}})

    async def shown(query: str) -> set[str]:
        return {metric for _, metric in (await site.devices(query)).of_name("iiot_reading")}

    assert iiot.Limits().scrape_age_seconds == 300
    assert await shown("") == {"a", "b", "ahead"}
    assert await shown("?max_age=10m") == {"a", "b", "c", "ahead"}
    assert await shown("?max_age=3650d") == set(ages)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1_000])
async def test_pages_of_any_size_make_the_same_answer(tmp_path: Path, rows: int) -> None:
    """Grouped by family, each number once; also where a page ends with a device, or in the middle of one."""
    async with watched(tmp_path, attrs.evolve(iiot.Limits(), scrape_rows=rows)) as site:
        expected: dict[tuple[str, ...], float] = {}
        for number in range(4):
            device = await site.plant.device(f"press-{number}")
            values = {f"m{metric}": metric for metric in range(number)}
            await device.store({"values": {**values, "text": "x"}})
            expected |= {(f"press-{number}", metric): value for metric, value in values.items()}
        for query in ("", "?metric=m0&metric=m1&metric=m2"):
            scrape = await site.devices(query)
            assert scrape.families == DEVICE_FAMILIES
            assert scrape.of_name("iiot_reading") == expected
            assert scrape.of_name("iiot_device_connected") == {(f"press-{number}",): 1 for number in range(4)}
            assert scrape.of_name("iiot_reading_timestamp_seconds").keys() == expected.keys()


async def test_a_tenant_sees_its_own(site: Watched) -> None:
    await (await site.plant.device("press-1")).store({"values": {"level": 1}})
    _, made = await site.plant.ask("POST", "/tenants", {"name": "acme"}, token=site.platform)
    status, text = await site.plant.ask("GET", "/metrics/devices?max_age=3650d", token=made["token"])
    assert status == 200
    assert Scrape.of(text).numbers == {}


# ---- Prometheus


async def check_by_promtool(text: str, *words: str) -> None:
    if PROMTOOL is None:
        pytest.skip("promtool is of the package prometheus")
    process = await asyncio.create_subprocess_exec(
        PROMTOOL, *(words or ("check", "metrics")), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate(text.encode())
    assert process.returncode == 0, out.decode()
    assert words or not out, out.decode()


async def everything(site: Watched) -> Device:
    """What makes every number of the server's be there; the device that is connected."""
    device = await site.plant.device("press-1")
    await device.store({"values": {"level": 7.25, 'a"b\\c': 1}})
    await (await site.plant.device("press-2")).close()
    await site.plant.ask("GET", "/nowhere")
    await site.until("iiot_session_ends_total", 1, reason="closed_by_device")
    return device


@asynccontextmanager
async def full_site(folder: Path) -> AsyncIterator[Watched]:
    cert, key = await certificate(folder, "localhost")
    port = unused_port()
    async with watched(folder, tls_cert=str(folder / cert), tls_key=str(folder / key), syslog_port=port) as site:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"<13>a: b\n")
        await site.until("iiot_syslog_refused_lines_total", 1, reason="unknown_address")
        writer.close()
        await everything(site)
        yield site


async def test_both_routes_pass_promtool(tmp_path: Path) -> None:
    async with full_site(tmp_path) as site:
        for scrape in (await site.server(), await site.devices()):
            await check_by_promtool(scrape.text)


def names_of(scrapes: tuple[Scrape, ...]) -> set[str]:
    return {name for scrape in scrapes for name, _ in scrape.numbers}


async def test_the_readme_names_every_number(tmp_path: Path) -> None:
    async with full_site(tmp_path) as site:
        there = names_of((await site.server(), await site.devices()))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in there if name.startswith("iiot_")}
    shown = set(re.findall(r"`(iiot_\w+)(?:\{[\w,]+\})?`", section("Metrics").text))
    assert shown == families


def queries_of(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert found is not None
            assert variable["query"]["query"] == variable["definition"]
            yield found[1]


def rule_queries() -> list[str]:
    return re.findall(r"^ +expr: (.*)$", RULES.read_text(encoding="utf-8"), re.MULTILINE)


async def test_dashboard_and_rules_ask_for_numbers_that_are_there(tmp_path: Path) -> None:
    async with full_site(tmp_path) as site:
        there = names_of((await site.server(), await site.devices()))
    assert len(rule_queries()) >= 5
    dashboard = list(queries_of(json.loads(DASHBOARD.read_text(encoding="utf-8"))))
    asked = {name for query in (*dashboard, *rule_queries()) for name in re.findall(r"\b(?:iiot|process)_\w+", query)}
    assert asked - there == set()
    unseen = {re.sub(r"_(bucket|count|sum)$", "", name) for name in there - asked if name.startswith("iiot_")}
    assert unseen - {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} == set(), "each is in a panel or a rule"
    codes = {code for query in rule_queries() for found in re.findall(r'code=~?"([^"]+)"', query) for code in found.split("|")}
    assert codes <= set(iiot.FAULTS)


def test_the_dashboard_is_one_for_any_data_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    (source,) = (variable for variable in dashboard["templating"]["list"] if variable["type"] == "datasource")
    assert source["query"] == "prometheus"
    users = [part for panel in dashboard["panels"] if panel["type"] != "row" for part in (panel, *panel["targets"])]
    assert {part["datasource"]["uid"] for part in users} == {f"${{{source['name']}}}"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == ["Server", "Devices"]


async def test_the_rules_pass_promtool() -> None:
    await check_by_promtool("", "check", "rules", str(RULES))


@attrs.frozen
class Prometheus:
    """A real one, that runs."""

    plant: Plant
    url: str

    async def ask(self, path: str, **parameters: str) -> Any:
        async with self.plant.client.get(f"{self.url}/api/v1/{path}", params=parameters) as response:
            body = await response.json()
            assert (response.status, body["status"]) == (200, "success"), (parameters, body)
            return body["data"]

    async def value(self, query: str) -> float | None:
        found = (await self.ask("query", query=query))["result"]
        return float(found[0]["value"][1]) if found else None

    async def until(self, query: str, wanted: float) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.value(query) != wanted:
                await asyncio.sleep(0.1)


@asynccontextmanager
async def prometheus(folder: Path, plant: Plant) -> AsyncIterator[Prometheus]:
    """With the configuration of the README, whose tokens the README's commands make; only times are shorter, and the port is the test's."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not there")
    terminal = Terminal(folder)
    await terminal.run(blocks("Metrics", "sh")[0])
    assert (folder / "iiot-viewer.token").stat().st_mode & 0o777 == 0o600
    (text,) = blocks("Metrics", "yaml")
    text = text.replace("127.0.0.1:8080", plant.url.removeprefix("http://")).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(RULES, folder)
    await check_by_promtool("", "check", "config", str(folder / "prometheus.yml"))
    port = unused_port()
    with (folder / "prometheus.log").open("ab") as log:
        running = await asyncio.create_subprocess_exec(
            PROMETHEUS, "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.path=tsdb",
            cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE):
            while b"Server is ready" not in (folder / "prometheus.log").read_bytes():
                await asyncio.sleep(0.05)
        yield Prometheus(plant, f"http://127.0.0.1:{port}")
    finally:
        running.terminate()
        await running.wait()


async def test_a_real_prometheus_scrapes_both(site: Watched, tmp_path: Path) -> None:
    device = await everything(site)
    async with prometheus(tmp_path, site.plant) as real:
        await real.until('iiot_reading{job="iiot-devices",device="press-1",metric="level"}', 7.25)
        await real.until(r'iiot_reading{metric="a\"b\\c"}', 1)
        await real.until('sum by (job) (up{job="iiot"})', 1)
        await real.until("iiot_sessions", 1)
        assert await real.value('iiot_device_connected{device="press-1"}') == 1
        assert await real.value('iiot_device_connected{device="press-2"}') == 0
        await device.store({"values": {"level": 8.5}})
        await real.until('iiot_reading{metric="level"}', 8.5)
        await device.close()
        await real.until('iiot_device_connected{device="press-1"}', 0)
        await real.until("iiot_points_total", 3)
        for query in queries_of(json.loads(DASHBOARD.read_text(encoding="utf-8"))):
            await real.ask("query", query=query.replace("$__rate_interval", "1m").replace('"$', '".*'))
        async with asyncio.timeout(PATIENCE):
            while {rule["health"] for rule in await rules(real)} != {"ok"}:
                await asyncio.sleep(0.1)
        assert "firing" not in {rule["state"] for rule in await rules(real)}  # the disk of who tests may be filling up


async def rules(real: Prometheus) -> list[dict[str, Any]]:
    (group,) = (await real.ask("rules"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found
