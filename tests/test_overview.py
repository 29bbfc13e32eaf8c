"""What a browser is sent first, what is compressed, and where the whole fleet stands at a glance."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import plant as plants
import pytest
from plant import ROOT, Plant

import iiot

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def page_text() -> str:
    return (ROOT / "dashboard.html").read_text(encoding="utf-8")


async def test_a_browser_gets_the_page_with_a_policy_for_its_one_script_and_style(plant: Plant) -> None:
    async with plant.client.get(plant.url + "/", headers=HTML) as response:
        assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        text, policy, tag = await response.text(), response.headers["Content-Security-Policy"], response.headers["ETag"]
    assert text == page_text()
    for kind, opening in (("script", '<script type="module">'), ("style", "<style>")):
        (source,) = re.findall(rf"{opening}(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    async with plant.client.get(plant.url + "/", headers={**HTML, "If-None-Match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")


async def test_others_are_told_what_this_is(plant: Plant) -> None:
    assert await plant.ask("GET", "/", token="") == (
        200, {"name": "iiot", "version": iiot.VERSION, "page": "open this address in a browser"},
    )  # fmt: skip


@pytest.mark.parametrize(("accept", "is_page"), [("TEXT/HTML", True), ("text/html;q=0", False), ("*/*", False), ("text/htmlx", False)])
async def test_the_page_is_for_who_asks_for_html(plant: Plant, accept: str, is_page: bool) -> None:  # noqa: FBT001 - a parameter
    async with plant.client.get(plant.url + "/", headers={"Accept": accept}) as response:
        assert (response.content_type == "text/html") == is_page


async def test_a_server_without_its_page_or_with_a_damaged_one_serves_all_else(tmp_path: Path) -> None:
    for name in ("iiot.py", "schema.sql"):
        shutil.copy(ROOT / name, tmp_path)
    for text in (None, "<style></style>"):
        if text is not None:
            (tmp_path / "dashboard.html").write_text(text)
        server = await asyncio.create_subprocess_exec(
            sys.executable, "iiot.py", "--port", "0", "--db", f"{text is None}.db", cwd=tmp_path, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert server.stdout is not None
        async with asyncio.timeout(plants.PATIENCE), plants.client() as client:
            url = (await server.stdout.readline()).decode().split()[-1]
            async with client.get(url + "/", headers=HTML) as response:
                assert response.status == 404
                assert (await response.json())["error"]["details"][0]["path"] == "dashboard.html"
            async with client.get(url + "/healthz") as response:
                assert response.status == 200
            server.terminate()
            assert ("#token=" in (await server.stdout.read()).decode()) == (text is not None)
            await server.wait()


@pytest.mark.parametrize("text", ["<style></style>", '<style></style><script type="module"></script><script type="module"></script>'])
def test_a_page_that_no_policy_fits_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="one script and one style"):
        iiot.page_policy(text)


def test_the_page_loads_nothing_and_makes_no_markup_out_of_texts() -> None:
    text = page_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=", "http://", "https://"):
        assert word not in text.replace("http://www.w3.org/2000/svg", ""), word
    assert len(text.encode()) <= 250_000
    assert len(gzip.compress(text.encode(), 9)) <= 75_000


async def raw(plant: Plant, path: str, encoding: str, **headers: str) -> tuple[int, str, bytes]:
    """Status, coding and the bytes of an answer as they came."""
    shown = {"Authorization": f"Bearer {plant.token}", "Accept-Encoding": encoding, **headers}
    async with plant.client.get(plant.url + path, headers=shown, auto_decompress=False) as response:
        return response.status, response.headers.get("Content-Encoding", ""), await response.read()


@pytest.mark.parametrize(("encoding", "coding"), [("gzip, deflate", "gzip"), ("identity", ""), ("gzip;q=0", ""), ("br", ""), ("*", "gzip")])
async def test_long_answers_are_compressed_for_whom_asks(plant: Plant, encoding: str, coding: str) -> None:
    for number in range(20):
        await plant.register(f"press-{number}")
    status, got, body = await raw(plant, "/iiot", encoding)
    assert (status, got) == (200, coding)
    plain = gzip.decompress(body) if coding else body
    assert plain.startswith(b'{"items":[{"device":"press-0"')
    assert (await raw(plant, "/iiot?limit=1", encoding))[1] == ""
    status, got, body = await raw(plant, "/", encoding, **HTML)
    assert (status, got) == (200, coding)
    assert (gzip.decompress(body) if coding else body) == page_text().encode()


async def test_tables_are_compressed_and_streams_are_not(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.store(*({"ts": iiot.now_ms() - number, "values": {"level": number}} for number in range(500)))
    for path in ("/telemetry?format=csv", "/iiot/press-1/telemetry?format=csv", "/telemetry"):
        status, coding, body = await raw(plant, path, "gzip")
        assert (status, coding) == (200, "gzip")
        assert b"level" in zlib.decompress(body, 31)
    headers = {"Authorization": f"Bearer {plant.token}", "Accept-Encoding": "gzip"}
    for path in ("/events", "/telemetry?follow=true"):
        async with plant.client.get(plant.url + path, headers=headers) as response:
            assert "Content-Encoding" not in response.headers


async def alerting(plant: Plant) -> None:
    """Four devices: one has a critical alert, one a warning, one was never seen, and one has nothing."""
    for name, severity, level in (("hot", "critical", 5), ("warm", "warning", 3)):
        rule = {"name": name, "metric": "level", "condition": {"above": level}, "severity": severity, "match": f"press-{name}"}
        assert (await plant.ask("POST", "/rules", rule))[0] == 201
    for name, value in (("press-a", 1), ("press-hot", 9), ("press-warm", 4)):
        device = await plant.device(name)
        await device.store({"values": {"level": value}})
    await plant.register("press-never")


def names(answer: Any) -> list[str]:
    return [one["device"] for one in answer["items"]]


async def test_the_summary_counts_devices_by_how_they_stand(plant: Plant) -> None:
    await alerting(plant)
    await plant.ask("POST", "/iiot/press-a", {"n": 1})
    counts = await plant.until("/iiot/summary", lambda body: body["alerts"] == 2)
    assert counts == {
        "devices": 4, "online": 3, "offline": 1, "disabled": 0, "never_seen": 1, "alerts": 2, "unattended": 2, "critical": 1, "drifted": 1,
        "rejected": 0,
    }  # fmt: skip
    (alert,) = (await plant.get("/alerts?rule=hot"))["items"]
    await plant.ask("POST", f"/alerts/{alert['id']}/ack", {})
    await plant.ask("POST", "/silences", {"match": "press-warm", "until": "2099-01-01T00:00:00Z"})
    counts = await plant.get("/iiot/summary")
    assert (counts["alerts"], counts["unattended"], counts["critical"]) == (2, 0, 0)
    assert (await plant.get("/iiot/summary?match=*-warm"))["devices"] == 1
    shown = {one["device"]: one["alerts"] for one in (await plant.get("/iiot"))["items"]}
    assert shown["press-hot"] == {"number": 1, "severity": "critical", "unattended": 0}
    assert shown["press-a"] == {"number": 0, "severity": None, "unattended": 0}
    assert (await plant.get("/iiot/press-warm"))["alerts"] == {"number": 1, "severity": "warning", "unattended": 0}


async def test_devices_are_listed_by_what_needs_attention_page_by_page(plant: Plant) -> None:
    await alerting(plant)
    await plant.until("/iiot/summary", lambda body: body["alerts"] == 2)
    wanted = ["press-hot", "press-warm", "press-never", "press-a"]
    assert names(await plant.get("/iiot?sort=attention")) == wanted
    after, seen = "", []
    while True:
        page = await plant.get(f"/iiot?sort=attention&limit=1{after}")
        seen += names(page)
        if page["next"] is None:
            break
        after = f"&after={quote(page['next'])}"
    assert seen == wanted
    assert names(await plant.get("/iiot?sort=attention&connected=true&match=press-*")) == ["press-hot", "press-warm", "press-a"]
    for path in ("/iiot?after=attention%2016%20press-1", "/iiot?sort=attention&after=press-1", "/iiot?sort=level"):
        assert (await plant.ask("GET", path))[0] == 400


async def test_readings_of_devices_that_are_named_are_one_request(plant: Plant) -> None:
    for name in ("press-1", "press-2", "press-3"):
        device = await plant.device(name)
        await device.store({"values": {"level": 1, "flow": 2}})
    rows = await plant.get("/telemetry?device=press-3&device=press-1&device=nobody&metric=level&latest=true")
    assert [(row["device"], row["metric"], row["value"]) for row in rows] == [("press-1", "level", 1), ("press-3", "level", 1)]
    rows = await plant.get("/telemetry?device=press-2&every=60s&agg=last")
    assert [(row["device"], row["metric"], row["value"]) for row in rows] == [("press-2", "flow", 2), ("press-2", "level", 1)]
    assert (await plant.ask("GET", "/telemetry?device=press-1&match=*"))[0] == 400


async def test_more_devices_than_one_request_may_name_are_refused(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), fleet_devices=2)) as plant:
        assert await plant.get("/telemetry?device=a&device=b&device=a") == []
        status, answer = await plant.ask("GET", "/telemetry?device=a&device=b&device=c")
        assert (status, answer["error"]["details"][0]["path"]) == (400, "device")
