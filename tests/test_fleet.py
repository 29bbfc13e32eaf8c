"""Readings of all devices in one request: rows for a spreadsheet, pandas and Grafana; the newest of each; those that come."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import StreamReader
from plant import PATIENCE, Device, Plant

import iiot

START = 1_767_225_600_000  # 2026-01-01T00:00:00Z
COLUMNS = ("time", "device", "metric", "value")
DEVICES = ("press-1", "press-2", "pump-1")
SMALL = attrs.evolve(iiot.Limits(), fleet_page=3, fleet_series=2, csv_rows=6)


def moment(seconds: int) -> str:
    return iiot.format_time(START + seconds * 1_000)


async def fill(plant: Plant, points: int = 10) -> dict[str, Device]:
    """Devices with two metrics each: what number, and text of it."""
    devices = {name: await plant.device(name) for name in DEVICES}
    for place, device in enumerate(devices.values()):
        await device.store(
            *({"ts": START + n * 1_000, "values": {"level": n + place / 3, "mode": f"at {n}", "on": n % 2 == 0}} for n in range(points))
        )
    return devices


def expected(points: int = 10) -> list[dict[str, Any]]:
    rows = []
    for place, name in enumerate(DEVICES):
        for metric in ("level", "mode", "on"):
            for n in range(points):
                value: Any = {"level": n + place / 3, "mode": f"at {n}", "on": int(n % 2 == 0)}[metric]
                rows.append({"time": moment(n), "device": name, "metric": metric, "value": value})
    return rows


@pytest.fixture(params=[True, False], ids=["in small pieces", "at once"])
async def filled(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Plant]:
    async with plants.plant(tmp_path, SMALL if request.param else None) as plant:
        for device in (await fill(plant)).values():
            await device.close()
        yield plant


async def test_rows_of_all_devices_are_by_device_metric_and_time(filled: Plant) -> None:
    assert await filled.get("/telemetry") == expected()


@pytest.mark.parametrize(
    ("query", "which"),
    [
        ("match=press-*", lambda row: row["device"].startswith("press-")),
        ("metric=level&metric=on", lambda row: row["metric"] in ("level", "on")),
        ("match=pump-1&metric=mode", lambda row: (row["device"], row["metric"]) == ("pump-1", "mode")),
        (f"from={START + 3_000}&to={START + 5_000}", lambda row: moment(3) <= row["time"] < moment(5)),
        ("match=nobody*", lambda row: False), ("metric=nothing", lambda row: False), (f"to={START}", lambda row: False),
    ],
)  # fmt: skip
async def test_rows_are_narrowed(filled: Plant, query: str, which: Any) -> None:
    assert await filled.get(f"/telemetry?{query}") == [row for row in expected() if which(row)]


async def test_csv_has_the_same_rows(filled: Plant) -> None:
    status, text = await filled.ask("GET", "/telemetry?format=csv")
    assert status == 200
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [list(row) for row in rows[:1]] == [["time", "device", "metric", "value"]]
    assert rows == [{name: str(value) for name, value in row.items()} for row in expected()]


async def test_names_that_csv_must_quote_come_back(plant: Plant) -> None:
    device = await plant.device("press:1")
    await device.store({"ts": START, "values": {'a,"b': 1.5, "-x": 2}}, {"ts": START + 1, "values": {'a,"b': 2.5}})
    _, text = await plant.ask("GET", "/telemetry?format=csv")
    rows = [row[1:] for row in csv.reader(io.StringIO(text))]
    assert rows[1:] == [["press:1", "-x", "2"], ["press:1", 'a,"b', "1.5"], ["press:1", 'a,"b', "2.5"]]
    _, text = await plant.ask("GET", "/telemetry?format=csv&spreadsheet=1&metric=-x")
    assert text.splitlines()[1].split(",")[2] == "'-x"


async def test_buckets_are_one_row_each(filled: Plant) -> None:
    rows = await filled.get("/telemetry?metric=level&every=4s")
    assert [(row["time"], row["device"], row["value"]) for row in rows] == [
        (moment(start), name, pytest.approx(sum(n + place / 3 for n in numbers) / len(numbers)))
        for place, name in enumerate(DEVICES)
        for start, numbers in ((0, (0, 1, 2, 3)), (4, (4, 5, 6, 7)), (8, (8, 9)))
    ]
    rows = await filled.get("/telemetry?match=press-1&metric=level&every=4s&agg=min,max,count")
    assert rows[0] == {"time": moment(0), "device": "press-1", "metric": "level", "min": 0, "max": 3, "count": 4}
    _, text = await filled.ask("GET", "/telemetry?match=press-1&metric=level&every=4s&agg=last&format=csv")
    rows = [f"{moment(n)},press-1,level,{last}.0" for n, last in ((0, 3), (4, 7), (8, 9))]
    assert text.splitlines() == ["time,device,metric,value", *rows]


async def test_what_grafana_writes_is_understood(filled: Plant) -> None:
    """`from=${__from}&to=${__to}&every=${__interval}`"""
    for every in ("500ms", "15s", "1m", "1h", "1d"):
        rows = await filled.get(f"/telemetry?metric=level&from={START}&to={START + 10_000}&every={every}")
        assert {row["device"] for row in rows} == set(DEVICES)


async def test_the_newest_value_of_each(filled: Plant) -> None:
    rows = await filled.get("/telemetry?latest=true")
    assert rows == [row for row in expected() if row["time"] == moment(9)]
    assert await filled.get(f"/telemetry?latest=true&to={START + 1_000}&metric=level") == [
        row for row in expected() if (row["time"], row["metric"]) == (moment(0), "level")
    ]
    assert await filled.get("/telemetry?latest=true&from=-5m") == []
    _, text = await filled.ask("GET", "/telemetry?latest=true&match=press-1&metric=mode&format=csv")
    assert text == f"time,device,metric,value\n{moment(9)},press-1,mode,at 9\n"


async def test_a_fleet_without_readings_is_an_empty_list(plant: Plant) -> None:
    for query in ("", "?latest=1", "?every=1m"):
        assert await plant.get(f"/telemetry{query}") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("latest=1&every=1m", "every"), ("agg=min", "agg"), ("match=", "match"), ("latest=1&follow=1", "latest"), ("format=xml", "format"),
        ("follow=1&from=0", "from"), ("follow=1&every=1m", "every"), ("follow=1&format=csv", "format"), ("spreadsheet=1", "spreadsheet"),
        ("limit=5", "limit"),
    ],
)  # fmt: skip
async def test_what_contradicts_itself_is_refused(plant: Plant, query: str, field: str) -> None:
    status, body = await plant.ask("GET", f"/telemetry?{query}")
    assert (status, body["error"]["code"]) == (400, "bad_query")
    assert body["error"]["details"][0]["path"] == field


async def test_removed_devices_are_in_no_row(filled: Plant) -> None:
    assert (await filled.ask("DELETE", "/iiot/press-2"))[0] == 204
    assert await filled.get("/telemetry") == [row for row in expected() if row["device"] != "press-2"]


async def read_to_the_end(reader: StreamReader | asyncio.StreamReader) -> None:
    async with asyncio.timeout(PATIENCE):
        while await reader.read(1 << 16):
            pass


@pytest.mark.parametrize("page", [3, 4, 500])
async def test_a_list_in_which_a_device_is_removed_breaks_off(tmp_path: Path, page: int) -> None:
    limits = attrs.evolve(iiot.Limits(), fleet_page=page, fleet_series=2)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        await device.store(*({"ts": START + n, "values": {f"metric-{m:03}": n for m in range(200)}} for n in range(100)))
        await device.close()
        await plant.register("press-2")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(plant.url.rsplit(":", 1)[1]))
        writer.write(f"GET /telemetry HTTP/1.1\r\nHost: press\r\nAuthorization: Bearer {plant.token}\r\n\r\n".encode())
        await reader.readexactly(1_000)
        assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
        with pytest.raises(ConnectionResetError):
            await read_to_the_end(reader)
        writer.close()


async def test_rare_readings_are_found_in_short_buckets(plant: Plant) -> None:
    await (await plant.device("press-1")).store(*({"ts": START + n * 3_600_000 + 7, "values": {"level": n}} for n in range(50)))
    rows = await plant.get("/telemetry?every=3ms&agg=last")
    starts = [iiot.format_time((START + n * 3_600_000 + 7) // 3 * 3) for n in range(50)]
    assert [(row["time"], row["value"]) for row in rows] == list(zip(starts, range(50), strict=True))


# ---- points as they come


@asynccontextmanager
async def following(plant: Plant, query: str = "") -> AsyncIterator[StreamReader]:
    headers = {"Authorization": f"Bearer {plant.token}"}
    async with plant.client.get(f"{plant.url}/telemetry?follow=true{query}", headers=headers) as response:
        assert (response.status, response.content_type, response.headers["X-Accel-Buffering"]) == (200, "text/event-stream", "no")
        yield response.content


async def event(stream: StreamReader) -> tuple[str, Any]:
    """The next event; comments are passed over."""
    async with asyncio.timeout(PATIENCE):
        while True:
            line = (await stream.readline()).decode()
            assert line, "the stream has ended"
            if line.startswith("event: "):
                data = (await stream.readline()).decode()
                return line[7:].strip(), json.loads(data.removeprefix("data: "))


async def rows_of(stream: StreamReader, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        kind, more = await event(stream)
        assert kind == "points"
        rows += more
    return rows


async def test_committed_points_come_to_who_follows(plant: Plant) -> None:
    device, other = await plant.device("press-1"), await plant.device("pump-1")
    await device.store({"ts": START, "values": {"level": 1}})
    async with following(plant, "&match=press-*&metric=level&metric=new&metric=on") as stream:
        await stream.readline()
        await other.store({"ts": START, "values": {"level": 1}})
        await device.store({"ts": START + 1_000, "values": {"level": 2.5, "mode": "auto"}})
        await device.store({"ts": START + 2_000, "values": {"new": "text", "on": True}})
        late = await plant.device("press-9")
        await late.store({"ts": START + 3_000, "values": {"level": 4}})
        rows = await rows_of(stream, 4)
    assert sorted(rows, key=lambda row: (row["time"], row["metric"])) == [
        {"time": moment(1), "device": "press-1", "metric": "level", "value": 2.5},
        {"time": moment(2), "device": "press-1", "metric": "new", "value": "text"},
        {"time": moment(2), "device": "press-1", "metric": "on", "value": 1},
        {"time": moment(3), "device": "press-9", "metric": "level", "value": 4},
    ]


async def test_who_follows_sees_nothing_of_another_tenant(plant: Plant) -> None:
    platform = plants.admin_token(plant.database, "platform")
    _, made = await plant.ask("POST", "/tenants", {"name": "acme", "quotas": {}}, token=platform)
    acme = Plant(plant.url, plant.client, made["token"], plant.database)
    ours, theirs = await plant.device("press-1"), await acme.device("press-1")
    async with following(plant) as stream:
        await stream.readline()
        await theirs.store({"ts": START, "values": {"level": 1, "secret": 2}})
        await ours.store({"ts": START, "values": {"level": 3}})
        assert [(row["metric"], row["value"]) for row in await rows_of(stream, 1)] == [("level", 3)]


async def test_a_stream_of_points_ends_with_the_server(tmp_path: Path) -> None:
    async with plants.client() as operator:
        async with plants.plant(tmp_path) as plant:
            headers = {"Authorization": f"Bearer {plant.token}"}
            response = await operator.get(f"{plant.url}/telemetry?follow=true", headers=headers)
            await response.content.readline()
        async with asyncio.timeout(PATIENCE / 4):
            assert b"event" not in await response.content.read()


async def test_who_does_not_keep_up_is_told(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), followed_points=5, follow_seconds=0.3)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        async with following(plant) as stream:
            await stream.readline()
            for number in range(10):
                await device.store({"ts": START + number, "values": {"level": number}})
            kinds = [(await event(stream))[0]]
            while "reset" not in kinds:
                kinds.append((await event(stream))[0])
            await device.store({"ts": START + 100, "values": {"level": 100}})
            while (await event(stream))[1][-1:] != [dict(zip(COLUMNS, (moment(0)[:-4] + "100Z", "press-1", "level", 100), strict=True))]:
                pass


async def test_events_have_a_bounded_length_and_followers_a_bounded_number(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), event_points=3, point_followers=1)) as plant:
        device = await plant.device("press-1")
        async with following(plant) as stream:
            await stream.readline()
            assert (await plant.ask("GET", "/telemetry?follow=1"))[0] == 429
            await device.store(*({"ts": START + n, "values": {"level": -0.0}} for n in range(10)))
            rows = [(await event(stream))[1] for _ in range(4)]
        assert [len(some) for some in rows] == [3, 3, 3, 1]
        assert [row["time"] for some in rows for row in some] == [iiot.format_time(START + n) for n in range(10)]
        assert str(rows[0][0]["value"]) == "0.0"


async def test_more_series_than_can_be_followed_are_refused(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), followed_series=2)) as plant:
        await (await plant.device("press-1")).store({"values": {"a": 1, "b": 1, "c": 1}})
        status, body = await plant.ask("GET", "/telemetry?follow=1")
        assert (status, body["error"]["details"][0]["path"]) == (400, "match")
        async with following(plant, "&metric=a") as stream:
            await stream.readline()
