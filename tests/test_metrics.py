"""What a monitoring system scrapes: the server's own numbers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator
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
from plant import OPENSSL, PATIENCE, Plant, Process, locked
from prometheus_client.parser import text_string_to_metric_families

import iiot

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
        assert (await site.plant.ask("GET", "/whoami", token=""))[0] == 401


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
