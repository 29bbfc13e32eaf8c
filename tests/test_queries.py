"""What an operator reads: devices, readings, buckets, CSV, events, health; with which token, and within which tenant."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from plant import Device, Plant, locked

import iiot

START = 1_767_225_600_000  # 2026-01-01T00:00:00Z
Points = dict[str, dict[int, Any]]  # by metric and time


def time(offset: int) -> str:
    """A moment so many milliseconds into the year 2026, as answers write it."""
    return iiot.format_time(START + offset)


def moment_of(text: str) -> int:
    moment = iiot.parse_rfc3339(text)
    assert moment is not None
    return moment


async def store(plant: Plant, points: Points, name: str = "press-1") -> None:
    """A device that has sent these points, a hundred a frame."""
    samples: dict[int, dict[str, Any]] = {}
    for metric, readings in points.items():
        for ts, value in readings.items():
            samples.setdefault(ts, {})[metric] = value
    device = await plant.device(name)
    content = [{"ts": ts, "values": values} for ts, values in samples.items()]
    random.Random(len(content)).shuffle(content)
    for index in range(0, len(content), 100):
        await device.telemetry(*content[index : index + 100])
    await device.store()
    await device.close()


async def telemetry(plant: Plant, query: str = "", name: str = "press-1") -> dict[str, list[list[Any]]]:
    """The points of a one-page answer by metric."""
    body = await plant.get(f"/iiot/{name}/telemetry{query}")
    assert body["device"] == name
    assert body["next"] is None
    return {series["metric"]: series["points"] for series in body["series"]}


async def walk(plant: Plant, query: str) -> tuple[dict[str, list[list[Any]]], int]:
    """The points of all pages by metric, in the order in which they came, and how many pages there were."""
    series: dict[str, list[list[Any]]] = {}
    after, pages = "", 0
    while True:
        body = await plant.get(f"/iiot/press-1/telemetry?{query}{after}")
        pages += 1
        assert pages < 1_000
        for each in body["series"]:
            series.setdefault(each["metric"], []).extend(each["points"])
        if body["next"] is None:
            return series, pages
        after = f"&after={body['next']}"


def bucketed(readings: dict[int, Any], every: int, aggregates: list[str], start: int = 0, stop: int = 2**62) -> list[list[Any]]:
    """Buckets as plain Python computes them."""
    buckets: dict[int, list[tuple[int, Any]]] = {}
    for ts, value in sorted(readings.items()):
        if start <= ts < stop:
            buckets.setdefault(ts // every * every, []).append((ts, value))
    found = []
    for low, content in sorted(buckets.items()):
        numbers = [value for _, value in content if not isinstance(value, str)]
        results = {
            "avg": math.fsum(numbers) / len(numbers) if numbers else None,
            "min": min(numbers) if numbers else None,
            "max": max(numbers) if numbers else None,
            "sum": math.fsum(numbers) if numbers else None,
            "count": len(content),
            "last": content[-1][1],
        }
        found.append([iiot.format_time(low), *(results[name] for name in aggregates)])
    return found


def close_to(expected: list[list[Any]]) -> list[list[Any]]:
    """The same, sums of floats being equal up to their rounding."""
    return [[pytest.approx(value, rel=1e-12) if isinstance(value, float) else value for value in point] for point in expected]


def uneven(seed: int = 7) -> Points:
    """Series of very different density over ten minutes: thick, thin, one point, text among numbers, a burst at the end."""
    chance = random.Random(seed)
    return {
        "thick": {START + index * 500: chance.uniform(-50, 50) for index in range(1_200)},
        "thin": {START + index * 60_000 + 17: index for index in range(10)},
        "single": {START + 300_000: 2.5},
        "mode": {START + 1_000 * index: chance.choice(["auto", "hand", 1, 0.5]) for index in sorted(chance.sample(range(600), 90))},
        "burst": {START + 599_000 + index: index * 0.1 for index in range(300)},
    }


# ---- devices


async def test_the_list_of_devices_is_sorted_and_comes_in_pages(plant: Plant) -> None:
    names = sorted(f"press-{number:02}" for number in range(23))
    for name in random.Random(1).sample(names, len(names)):
        await plant.register(name)
    assert [item["device"] for item in (await plant.get("/iiot"))["items"]] == names
    seen: list[str] = []
    after: str | None = ""
    pages = 0
    while after is not None:
        body = await plant.get(f"/iiot?limit=5&after={after}")
        seen += [item["device"] for item in body["items"]]
        after, pages = body["next"], pages + 1
    assert (seen, pages) == (names, 5)


@pytest.mark.parametrize(("count", "following"), [(4, None), (5, None), (6, "press-4")])
async def test_a_full_page_is_followed_by_another_only_if_there_is_more(plant: Plant, count: int, following: str | None) -> None:
    for number in range(count):
        await plant.register(f"press-{number}")
    body = await plant.get("/iiot?limit=5")
    assert (len(body["items"]), body["next"]) == (min(count, 5), following)
    assert (await plant.get("/iiot?after=press-9")) == {"items": [], "next": None}


async def test_a_list_of_no_devices_is_empty(plant: Plant) -> None:
    assert await plant.get("/iiot") == {"items": [], "next": None}


async def test_a_page_has_100_entries_unless_it_is_said(plant: Plant) -> None:
    def add(connection: Any) -> None:
        connection.executemany(
            "insert into device (tenant_id, name, created_at) values (1, ?, 0)", [(f"device-{number:04}",) for number in range(1_001)]
        )
        connection.execute("insert into presence (device_id) select id from device")

    iiot.change_database(plant.database, add)
    assert len((await plant.get("/iiot"))["items"]) == 100
    assert len((await plant.get("/iiot?limit=1000"))["items"]) == 1_000
    assert (await plant.get("/iiot?limit=1000"))["next"] == "device-0999"


@pytest.mark.parametrize(
    ("match", "matched"),
    [
        ("*", ["Press-1", "oven-1", "press-1", "press-10", "press-2"]), ("press-*", ["press-1", "press-10", "press-2"]),
        ("press-?", ["press-1", "press-2"]), ("press-[12]", ["press-1", "press-2"]), ("press-[^1]", ["press-2"]), ("press-1", ["press-1"]),
        ("*1", ["Press-1", "oven-1", "press-1"]), ("*e*-1*", ["Press-1", "oven-1", "press-1", "press-10"]), ("press", []),
        ("%", []),
    ],
)  # fmt: skip
async def test_devices_are_found_by_a_pattern(plant: Plant, match: str, matched: list[str]) -> None:
    for name in ("press-1", "press-2", "press-10", "oven-1", "Press-1"):
        await plant.register(name)
    async with plant.client.get(
        plant.url + "/iiot", params={"match": match}, headers={"Authorization": f"Bearer {plant.token}"}
    ) as response:
        assert [item["device"] for item in (await response.json())["items"]] == matched


async def test_an_empty_pattern_is_refused(plant: Plant) -> None:
    for answer in (await plant.ask("GET", "/iiot?match="), await plant.ask("POST", "/iiot", {"match": "", "config": {}})):
        assert answer[0] in (400, 422)
        assert answer[1]["error"]["details"] == [{"path": "match", "message": "is empty; * is every device"}]


async def test_devices_are_found_by_their_connection(plant: Plant) -> None:
    for number in range(4):
        await plant.register(f"press-{number}")
    devices = [await plant.device(name) for name in ("press-1", "press-3")]
    assert [item["device"] for item in (await plant.get("/iiot?connected=true"))["items"]] == ["press-1", "press-3"]
    assert [item["device"] for item in (await plant.get("/iiot?connected=false"))["items"]] == ["press-0", "press-2"]
    body = await plant.get("/iiot?connected=true&match=press-*&limit=1")
    assert ([item["device"] for item in body["items"]], body["next"]) == (["press-1"], "press-1")
    body = await plant.get("/iiot?connected=true&match=press-*&limit=1&after=press-1")
    assert ([item["device"] for item in body["items"]], body["next"]) == (["press-3"], None)
    for device in devices:
        await device.close()


async def test_a_device_is_shown_with_its_presence_and_its_newest_readings(plant: Plant) -> None:
    device = await plant.device("press-1", agent="plc/1")
    assert (await plant.get("/iiot/press-1"))["latest"] == {}
    await device.store(
        {"ts": START + 2_000, "values": {"a": 0.1 + 0.2, "b": "auto", "c": True}}, {"ts": START + 1_000, "values": {"a": 7, "d": 4}}
    )
    body = await plant.get("/iiot/press-1")
    latest = body.pop("latest")
    assert latest == {
        "a": {"time": time(2_000), "value": 0.1 + 0.2}, "b": {"time": time(2_000), "value": "auto"},
        "c": {"time": time(2_000), "value": 1}, "d": {"time": time(1_000), "value": 4},
    }  # fmt: skip
    (item,) = (await plant.get("/iiot"))["items"]
    assert item.items() <= body.items()  # one device may be shown with more
    assert (body["device"], body["connected"], body["agent"]) == ("press-1", True, "plc/1")
    for field in ("connected_at", "seen_at", "created_at"):
        assert abs(moment_of(body[field]) - iiot.now_ms()) < 60_000
    await device.store({"ts": START + 3_000, "values": {"a": 8}})
    assert (await plant.get("/iiot/press-1"))["latest"]["a"] == {"time": time(3_000), "value": 8}


# ---- points


async def test_points_of_all_metrics_by_default(plant: Plant) -> None:
    await store(plant, {"b": {START: 1}, "a": {START + 1: 2.5, START: "on"}})
    body = await plant.get("/iiot/press-1/telemetry")
    assert body == {
        "device": "press-1", "next": None,
        "series": [{"metric": "a", "points": [[time(0), "on"], [time(1), 2.5]]}, {"metric": "b", "points": [[time(0), 1]]}],
    }  # fmt: skip


async def test_points_of_the_metrics_asked_for_in_that_order(plant: Plant) -> None:
    await store(plant, {"a": {START: 1}, "b": {START: 2}, "c": {START: 3}})
    body = await plant.get("/iiot/press-1/telemetry?metric=c&metric=a")
    assert [series["metric"] for series in body["series"]] == ["c", "a"]


async def test_a_metric_that_the_device_has_not_has_no_points(plant: Plant) -> None:
    await store(plant, {"a": {START: 1}})
    assert await telemetry(plant, "?metric=a&metric=b") == {"a": [[time(0), 1]], "b": []}
    assert await telemetry(plant, "?metric=b&every=1m&agg=avg,count") == {"b": []}
    await plant.register("press-2")
    assert await telemetry(plant, name="press-2") == {}
    assert await telemetry(plant, "?every=1m", name="press-2") == {}


@pytest.mark.parametrize(
    ("query", "offsets"),
    [
        ("", [0, 1, 2, 3, 4]), (f"from={START + 2}", [2, 3, 4]), (f"to={START + 2}", [0, 1]), (f"from={START + 1}&to={START + 3}", [1, 2]),
        (f"from={START + 2}&to={START + 2}", []), (f"from={START + 3}&to={START + 1}", []), (f"from={START + 5}", []), (f"to={START}", []),
        ("from=2026-01-01T00:00:00.003Z", [3, 4]), ("from=2026-01-01T01:00:00.003%2B01:00", [3, 4]), ("to=2026-01-01T00:00:00.001Z", [0]),
        ("from=0&to=9999-12-31T23:59:59Z", [0, 1, 2, 3, 4]), ("order=desc", [4, 3, 2, 1, 0]),
        (f"order=desc&from={START + 1}&to={START + 3}", [2, 1]),
    ],
)  # fmt: skip
async def test_a_range_holds_its_start_and_not_its_end(plant: Plant, query: str, offsets: list[int]) -> None:
    await store(plant, {"n": {START + offset: offset for offset in range(5)}})
    assert await telemetry(plant, "?" + query) == {"n": [[time(offset), offset] for offset in offsets]}


async def test_times_back_from_now(plant: Plant) -> None:
    now = iiot.now_ms()
    await store(plant, {"n": {now - minutes * 60_000: minutes for minutes in (0, 5, 20, 90, 3_000)}})
    assert [value for _, value in (await telemetry(plant, "?from=-15m"))["n"]] == [5, 0]
    assert [value for _, value in (await telemetry(plant, "?from=-2h&to=-10m"))["n"]] == [90, 20]
    assert [value for _, value in (await telemetry(plant, "?from=-3d"))["n"]] == [3_000, 90, 20, 5, 0]
    assert [value for _, value in (await telemetry(plant, "?to=-3600"))["n"]] == [3_000, 90]
    assert sum(point[1] for point in (await telemetry(plant, "?from=-15m&every=1h&agg=count"))["n"]) == 2


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 7, 100, 1_199, 1_200, 10_000])
async def test_a_walk_over_all_pages_meets_every_point_once(plant: Plant, limit: int, order: str) -> None:
    points = uneven()
    points["thick"] = dict(list(points["thick"].items())[: 150 if limit < 7 else 1_200])
    await store(plant, points)
    series, pages = await walk(plant, f"limit={limit}&order={order}")
    expected = {
        metric: [[iiot.format_time(ts), value] for ts, value in sorted(readings.items(), reverse=order == "desc")]
        for metric, readings in sorted(points.items())
    }
    assert series == expected
    assert pages >= max(map(len, points.values())) / limit


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 50, 10_000])
@pytest.mark.parametrize("every", ["700ms", "10s", "61s", "1d"])
async def test_a_walk_over_all_pages_meets_every_bucket_once(plant: Plant, every: str, limit: int, order: str) -> None:
    points = uneven()
    if limit < 50:  # fewer, so that the walk ends soon
        points = {metric: dict(list(readings.items())[:12]) for metric, readings in points.items()}
    await store(plant, points)
    start, stop = START + 1_234, START + 599_123
    series, _ = await walk(plant, f"every={every}&agg=count,min,max,last,avg&limit={limit}&order={order}&from={start}&to={stop}")
    assert list(series) == sorted(points)
    for metric, readings in points.items():
        expected = bucketed(readings, iiot.parse_duration(every), ["count", "min", "max", "last", "avg"], start, stop)
        assert series[metric] == close_to(expected if order == "asc" else expected[::-1])


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("every", ["", "&every=1s&agg=count,last"])
async def test_a_walk_over_sparse_series_is_short(plant: Plant, order: str, every: str) -> None:
    points: Points = {"a": {iiot.EARLIEST: 1, START: 2, START + 10_000_000_000: 3}, "b": {iiot.EARLIEST + 1: 4, START - 86_400_000: 5}}
    await store(plant, points)
    series, pages = await walk(plant, f"limit=1&order={order}{every}")
    assert [point[-1] for point in series["a"]] == ([1, 2, 3] if order == "asc" else [3, 2, 1])
    assert [point[-1] for point in series["b"]] == ([4, 5] if order == "asc" else [5, 4])
    assert pages <= 5


async def test_a_page_of_many_series_is_bounded_together(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), values_together=30)) as plant:
        points: Points = {f"m{number}": {START + index: index for index in range(20)} for number in range(10)}
        await store(plant, points)
        body = await plant.get("/iiot/press-1/telemetry")
        assert sum(len(series["points"]) for series in body["series"]) <= 30
        series, pages = await walk(plant, "limit=1000")
        assert series == {metric: [[time(index), index] for index in range(20)] for metric in sorted(points)}
        assert pages == 7
        assert (await walk(plant, "limit=1000&every=2ms&agg=count"))[0] == {
            metric: [[time(index), 2] for index in range(0, 20, 2)] for metric in points
        }


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("every", ["", "&every=1s&agg=last"])
async def test_a_page_of_long_texts_has_fewer_of_them(plant: Plant, monkeypatch: pytest.MonkeyPatch, order: str, every: str) -> None:
    monkeypatch.setattr(iiot, "PAGE_CHARACTERS", 10_000)
    points: Points = {metric: {START + index * 1000: f"{index:04}" * 100 for index in range(60)} for metric in ("a", "b")}
    await store(plant, points)
    body = await plant.get(f"/iiot/press-1/telemetry?limit=1000&order={order}{every}")
    assert 1_000 < len(json.dumps(body)) <= 11_000
    series, pages = await walk(plant, f"limit=1000&order={order}{every}")
    assert {metric: sorted(value for _, value in shown) for metric, shown in series.items()} == {
        metric: list(texts.values()) for metric, texts in points.items()
    }
    assert pages < 20


# ---- buckets


@pytest.mark.parametrize("aggregate", iiot.AGGREGATES)
@pytest.mark.parametrize("every", ["1s", "7s", "1m", "1h"])
async def test_buckets_are_what_plain_python_makes_of_the_points(plant: Plant, every: str, aggregate: str) -> None:
    points = uneven()
    await store(plant, points)
    series = await telemetry(plant, f"?every={every}&agg={aggregate}&limit=10000")
    assert list(series) == sorted(points)
    for metric, readings in points.items():
        assert series[metric] == close_to(bucketed(readings, iiot.parse_duration(every), [aggregate]))


async def test_aggregates_come_in_the_order_asked_and_as_often(plant: Plant) -> None:
    await store(plant, {"n": {START: 1, START + 1: 2, START + 2: 6}})
    series = await telemetry(plant, "?every=60s&agg=last,count,sum,max,min,avg,count")
    assert series == {"n": [[time(0), 6, 3, 9, 6, 1, 3, 3]]}


async def test_the_average_is_the_default(plant: Plant) -> None:
    await store(plant, {"n": {START: 1, START + 1: 2}})
    assert await telemetry(plant, "?every=1m") == {"n": [[time(0), 1.5]]}


async def test_text_counts_and_may_be_last_but_is_no_number(plant: Plant) -> None:
    await store(plant, {"mode": {START: "auto", START + 1: 5, START + 2: "hand", START + 60_000: "9", START + 120_000: True}})
    assert await telemetry(plant, "?every=1m&agg=avg,min,max,sum,count,last") == {
        "mode": [[time(0), 5, 5, 5, 5, 3, "hand"], [time(60_000), None, None, None, None, 1, "9"], [time(120_000), 1, 1, 1, 1, 1, 1]]
    }


async def test_buckets_start_at_multiples_of_their_length_whatever_the_range(plant: Plant) -> None:
    await store(plant, {"n": {START + 1_000 * index: index for index in range(120)}})
    for order in ("asc", "desc"):
        series = await telemetry(plant, f"?every=1m&agg=min,max,count&from={START + 30_500}&to={START + 90_500}&order={order}")
        expected = [[time(0), 31, 59, 29], [time(60_000), 60, 90, 31]]
        assert series == {"n": expected if order == "asc" else expected[::-1]}


async def test_min_and_max_keep_doubles_exactly(plant: Plant) -> None:
    await store(plant, {"n": {START: 0.1 + 0.2, START + 1: 123456789.12345678, START + 2: 2**53 + 1}})
    assert await telemetry(plant, "?every=1m&agg=min,max") == {"n": [[time(0), 0.1 + 0.2, 2**53 + 1]]}


@pytest.mark.parametrize("form", ["json", "csv"])
async def test_a_sum_beyond_the_largest_double_is_answered_all_the_same(plant: Plant, form: str) -> None:
    await store(plant, {"n": {START: 1.7e308, START + 1: 1.7e308}, "m": {START: 1}})
    status, body = await plant.ask("GET", f"/iiot/press-1/telemetry?every=1m&agg=count,sum&format={form}")
    assert status == 200
    if form == "json":
        assert {series["metric"]: series["points"][0][1] for series in body["series"]} == {"m": 1, "n": 2}
        json.dumps(body, allow_nan=False)
    else:
        assert "inf" not in body.lower()


# ---- exactness


async def test_doubles_come_back_as_they_were_sent(plant: Plant) -> None:
    chance = random.Random(42)
    doubles: list[float] = [0.1, 0.1 + 0.2, 1 / 3, 1e15 + 0.3, 1e22, 1e-200, 1e200, 1e300, 2.0**53 + 2, 0.0, -1.5]
    while len(doubles) < 5_000:
        (value,) = struct.unpack("<d", chance.randbytes(8))
        if 1e-200 < abs(value) < 1e200:
            doubles.append(value)
    sent: dict[int, Any] = {START + index: value for index, value in enumerate(doubles)}
    await store(plant, {"n": sent})
    assert [value for _, value in await plant.points("press-1", "n")] == doubles
    assert all(isinstance(value, float) for _, value in await plant.points("press-1", "n"))
    assert [float(row[2]) for row in await read_csv(plant, "/iiot/press-1/telemetry?format=csv")] == doubles
    buckets = (await telemetry(plant, "?every=1ms&agg=last,min,max&limit=10000"))["n"]
    assert [point[1:] for point in buckets] == [[value] * 3 for value in doubles]


async def test_times_come_back_as_they_were_sent(plant: Plant) -> None:
    chance = random.Random(43)
    moments = sorted({chance.randrange(iiot.EARLIEST, START) for _ in range(5_000)})
    await store(plant, {"n": dict.fromkeys(moments, 1)})
    assert [moment_of(text) for text, _ in await plant.points("press-1", "n")] == moments


async def test_integers_keep_all_their_digits(plant: Plant) -> None:
    integers = [2**63 - 1, -(2**63), 2**53 + 1, 0, -1, 10**18]
    await store(plant, {"n": {START + index: value for index, value in enumerate(integers)}})
    assert [value for _, value in await plant.points("press-1", "n")] == integers
    assert [row[2] for row in await read_csv(plant, "/iiot/press-1/telemetry?format=csv")] == list(map(str, integers))


# ---- CSV


async def read_csv(plant: Plant, path: str, header: tuple[str, ...] = ("time", "metric", "value")) -> list[list[str]]:
    """The lines under the header line."""
    async with plant.client.get(plant.url + path, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
        rows = list(csv.reader(io.StringIO((await response.read()).decode(), newline=""), strict=True))
    assert tuple(rows[0]) == header
    return rows[1:]


def typed(fields: list[str], like: list[Any]) -> list[Any]:
    """Fields of a CSV line as numbers where the JSON has numbers."""
    return [field if isinstance(value, str) or value is None else float(field) for field, value in zip(fields, like, strict=True)]


@pytest.mark.parametrize("rows", [1, 2, 7, 1_200, 10_000])
async def test_csv_holds_what_json_holds(tmp_path: Path, rows: int) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), csv_rows=rows)) as plant:
        points = uneven()
        if rows == 1:
            points = {metric: dict(list(readings.items())[:20]) for metric, readings in points.items()}
        await store(plant, points)
        expected = [
            [iiot.format_time(ts), metric, value] for metric, readings in sorted(points.items()) for ts, value in sorted(readings.items())
        ]
        got = await read_csv(plant, "/iiot/press-1/telemetry?format=csv")
        assert len(got) == len(expected)
        assert [typed(fields, like) for fields, like in zip(got, expected, strict=True)] == expected


@pytest.mark.parametrize("rows", [1, 3, 10_000])
@pytest.mark.parametrize("every", ["10s", "3m"])
async def test_csv_of_buckets_holds_what_json_holds(tmp_path: Path, rows: int, every: str) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), csv_rows=rows)) as plant:
        await store(plant, uneven())
        query = f"every={every}&agg=count,avg,last,min,max,sum&from={START + 5_432}&to={START + 599_100}"
        series = await telemetry(plant, f"?{query}&limit=10000")
        header = ("time", "metric", "count", "avg", "last", "min", "max", "sum")
        got = await read_csv(plant, f"/iiot/press-1/telemetry?format=csv&{query}", header)
        expected = [[point[0], metric, *point[1:]] for metric, points in series.items() for point in points]
        assert len(got) == len(expected)
        for fields, like in zip(got, expected, strict=True):
            assert typed(fields, like) == ["" if value is None else value for value in like]


async def test_csv_of_a_range_and_of_some_metrics(plant: Plant) -> None:
    await store(plant, {"a": {START + index: index for index in range(10)}, "b": {START + 5: "x"}, "c": {START: 1}})
    got = await read_csv(
        plant, f"/iiot/press-1/telemetry?format=csv&metric=b&metric=none&metric=a&from={START + 4}&to={START + 7}&order=asc"
    )
    assert got == [[time(5), "b", "x"], [time(4), "a", "4"], [time(5), "a", "5"], [time(6), "a", "6"]]


async def test_csv_quotes_what_needs_it(plant: Plant) -> None:
    texts = ['say "no"', "a,b", "line\nbreak", "", " ", "\r\n", "'", "\U0001f600", "=1+1", "1.5"]
    await store(plant, {'6" pipe, left': {START + index: text for index, text in enumerate(texts)}})
    got = await read_csv(plant, "/iiot/press-1/telemetry?format=csv")
    assert got == [[time(index), '6" pipe, left', text] for index, text in enumerate(texts)]
    got = await read_csv(plant, "/iiot/press-1/telemetry?format=csv&every=1ms&agg=last,avg", ("time", "metric", "last", "avg"))
    assert got == [[time(index), '6" pipe, left', text, ""] for index, text in enumerate(texts)]


async def test_csv_of_nothing_is_its_header(plant: Plant) -> None:
    await plant.register("press-1")
    for query in ("", "&metric=a", f"&from={START}&to={START}", f"&from={START}&to=0", "&every=1m"):
        header = ("time", "metric", "avg" if "every" in query else "value")
        assert await read_csv(plant, f"/iiot/press-1/telemetry?format=csv{query}", header) == []


# ---- events


async def test_events_come_newest_first_in_pages(plant: Plant) -> None:
    for _ in range(6):
        device = await plant.device("press-1")
        await device.close()
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
    everything = (await plant.get("/iiot/press-1/events"))["items"]
    assert [item["kind"] for item in everything] == ["disconnected", "connected"] * 6 + ["credentials"]
    assert [item["id"] for item in everything] == sorted((item["id"] for item in everything), reverse=True)
    for limit, pages in ((1, 13), (5, 3), (13, 1)):
        items, query = [], ""
        for _ in range(pages):
            body = await plant.get(f"/iiot/press-1/events?limit={limit}{query}")
            items += body["items"]
            query = f"&after={body['next']}"
        assert (items, body["next"]) == (everything, None)


async def test_events_of_some_kinds_and_of_a_range(plant: Plant) -> None:
    for _ in range(3):
        device = await plant.device("press-1")
        await device.close()
        await plant.until("/iiot/press-1", lambda body: not body["connected"])
    iiot.change_database(plant.database, lambda connection: connection.execute("update event set at = ? + id", (START,)))
    everything = (await plant.get("/iiot/press-1/events"))["items"]
    assert {item["at"] for item in everything} == {iiot.format_time(START + item["id"]) for item in everything}
    for kinds in (["connected"], ["disconnected", "credentials"], ["nothing"]):
        query = "&".join(f"kind={kind}" for kind in kinds)
        items = (await plant.get(f"/iiot/press-1/events?{query}"))["items"]
        assert items == [item for item in everything if item["kind"] in kinds]
    low, high = everything[5], everything[2]
    items = (await plant.get(f"/iiot/press-1/events?from={low['at']}&to={high['at']}"))["items"]
    assert items == everything[3:6]
    assert (await plant.get("/iiot/press-1/events?from=-1h"))["items"] == []


async def test_events_are_of_one_device(plant: Plant) -> None:
    await plant.device("press-1")
    await plant.register("press-2")
    assert [item["kind"] for item in (await plant.get("/iiot/press-2/events"))["items"]] == ["credentials"]


# ---- health


async def test_a_server_that_can_store_is_healthy(plant: Plant) -> None:
    status, body = await plant.ask("GET", "/healthz", token="")
    assert (status, body["status"]) == (200, "ok")


async def test_a_server_that_cannot_store_is_not_healthy_until_it_can(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), healthy_seconds=0.0, storage_seconds=0.2)) as plant:
        assert (await plant.ask("GET", "/healthz", token=""))[0] == 200
        with locked(plant.database):
            status, body = await plant.ask("GET", "/healthz", token="")
            assert (status, body["error"]["code"]) == (503, "storage_unavailable")
            assert await plant.get("/iiot") == {"items": [], "next": None}  # reading goes on
        await plant.until("/iiot", lambda body: body)
        assert (await plant.ask("GET", "/healthz", token=""))[0] == 200


# ---- roles


def requests_of_routes() -> Iterator[tuple[str, str, str]]:
    for route in iiot.ROUTES:
        if route.role != "public":
            yield route.method, route.path.format(device="press-9", id="0", tenant="none", port="22"), route.role


@pytest.mark.parametrize(("method", "path", "needed"), list(requests_of_routes()))
async def test_a_route_is_for_its_role_and_those_above_it(plant: Plant, method: str, path: str, needed: str) -> None:
    async def refusal(token: str) -> tuple[int, str] | None:
        """What the answer says if it is about the token; an answer that goes on for ever is not waited for."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with plant.client.request(method, plant.url + path, headers=headers) as response:
            return (response.status, (await response.json())["error"]["code"]) if response.status in (401, 403) else None

    ranks = ["viewer", "operator", "admin"]
    for role in [*ranks, "platform"]:
        allowed = needed in ("any", role) or (role in ranks and needed in ranks[: ranks.index(role)])
        assert await refusal(plants.admin_token(plant.database, role)) == (None if allowed else (403, "forbidden"))
    assert await refusal("") == (401, "unauthorized")


def test_the_roles_of_the_contract() -> None:
    roles = {(route.method, route.path): route.role for route in iiot.ROUTES}
    for request, role in {
        ("GET", "/iiot"): "viewer", ("GET", "/iiot/{device}"): "viewer", ("PUT", "/iiot/{device}"): "admin",
        ("GET", "/iiot/{device}/events"): "viewer", ("GET", "/iiot/{device}/telemetry"): "viewer",
        ("POST", "/iiot/{device}/report"): "operator",
        ("GET", "/provisioning-keys"): "admin", ("POST", "/provisioning-keys"): "admin", ("DELETE", "/provisioning-keys/{id}"): "admin",
        ("GET", "/tokens"): "admin", ("POST", "/tokens"): "admin", ("DELETE", "/tokens/{id}"): "admin", ("GET", "/whoami"): "any",
        ("GET", "/healthz"): "public", ("GET", "/device"): "public",
    }.items():  # fmt: skip
        assert roles[request] == role


@pytest.mark.parametrize("role", ["viewer", "operator", "admin", "platform"])
async def test_whoami_says_whose_token_it_is(plant: Plant, role: str) -> None:
    status, body = await plant.ask("GET", "/whoami", token=plants.admin_token(plant.database, role))
    assert status == 200
    assert (body["name"], body["role"], body["tenant"]) == (f"test {role}", role, None if role == "platform" else "default")


# ---- operator tokens


async def test_a_token_is_made_used_listed_and_revoked(plant: Plant) -> None:
    status, made = await plant.ask("POST", "/tokens", {"name": "night shift", "role": "viewer"})
    assert status == 201
    assert made.keys() == {"id", "name", "role", "token"}
    assert (made["name"], made["role"]) == ("night shift", "viewer")
    status, who = await plant.ask("GET", "/whoami", token=made["token"])
    assert status == 200
    assert {name: who[name] for name in ("id", "name", "role", "tenant", "expires_at")} == {
        "id": made["id"], "name": "night shift", "role": "viewer", "tenant": "default", "expires_at": None,
    }  # fmt: skip
    items = {item["id"]: item for item in (await plant.get("/tokens"))["items"]}
    assert len(items) == 2
    listed = items[made["id"]]
    assert (listed["name"], listed["role"], listed["expires_at"]) == ("night shift", "viewer", None)
    assert made["token"][-43:] not in json.dumps(list(items.values()))
    assert (await plant.ask("DELETE", f"/tokens/{made['id']}"))[0] == 204
    assert (await plant.ask("GET", "/whoami", token=made["token"]))[0] == 401
    assert (await plant.ask("DELETE", f"/tokens/{made['id']}"))[0] == 404
    assert len((await plant.get("/tokens"))["items"]) == 1


@pytest.mark.parametrize("written", ["number", "text"])
async def test_a_token_expires(plant: Plant, written: str) -> None:
    def moment(milliseconds: int) -> int | str:
        return milliseconds if written == "number" else iiot.format_time(milliseconds)

    expiry = iiot.now_ms() + 60_000
    made = (await plant.ask("POST", "/tokens", {"name": "guest", "role": "viewer", "expires_at": moment(expiry)}))[1]
    assert (await plant.ask("GET", "/iiot", token=made["token"]))[0] == 200
    listed = {item["id"]: item["expires_at"] for item in (await plant.get("/tokens"))["items"]}
    assert listed[made["id"]] == iiot.format_time(expiry)
    plants.expire(plant.database, "operator_token", made["id"])
    assert (await plant.ask("GET", "/iiot", token=made["token"]))[0] == 401


@pytest.mark.parametrize(("path", "body"), [("/tokens", {"name": "guest", "role": "viewer"}), ("/provisioning-keys", {})])
async def test_what_would_have_expired_before_it_is_made_is_refused(plant: Plant, path: str, body: dict[str, Any]) -> None:
    status, answer = await plant.ask("POST", path, {**body, "expires_at": iiot.now_ms() - 1})
    assert (status, answer["error"]["details"]) == (422, [{"path": "expires_at", "message": "is in the past"}])


async def test_tokens_are_listed_in_pages(plant: Plant) -> None:
    for number in range(7):
        assert (await plant.ask("POST", "/tokens", {"name": str(number), "role": "viewer"}))[0] == 201
    everything = (await plant.get("/tokens"))["items"]
    assert len(everything) == 8
    first = await plant.get("/tokens?limit=5")
    second = await plant.get(f"/tokens?limit=5&after={first['next']}")
    assert first["items"] + second["items"] == everything
    assert second["next"] is None


# ---- provisioning keys


async def test_a_provisioning_key_is_made_used_listed_and_withdrawn(plant: Plant) -> None:
    status, made = await plant.ask("POST", "/provisioning-keys", {"uses": 5, "expires_at": "2099-01-01T00:00:00Z"})
    assert status == 201
    assert made.keys() == {"id", "key"}
    device = await plant.connect()
    await device.send("provision", key=made["key"], device="press-1")
    token = (await device.receive())["token"]
    await device.hello(token)
    (item,) = (await plant.get("/provisioning-keys"))["items"]
    assert (item["id"], item["uses_left"], item["expires_at"]) == (made["id"], 4, "2099-01-01T00:00:00.000Z")
    assert made["key"][-43:] not in json.dumps(item)
    assert (await plant.ask("DELETE", f"/provisioning-keys/{made['id']}"))[0] == 204
    assert (await plant.ask("DELETE", f"/provisioning-keys/{made['id']}"))[0] == 404
    device = await plant.connect()
    await device.send("provision", key=made["key"], device="press-2")
    assert (await device.receive())["code"] == "unauthorized"
    assert (await plant.get("/provisioning-keys"))["items"] == []
    await (await (await plant.connect()).hello(token)).store({"values": {"n": 1}})  # the devices it admitted stay


async def test_a_provisioning_key_has_no_end_unless_it_is_said(plant: Plant) -> None:
    for body in (None, {}, {"uses": None, "expires_at": None}):
        status, made = await plant.ask("POST", "/provisioning-keys", body)
        assert status == 201
        items = {item["id"]: item for item in (await plant.get("/provisioning-keys"))["items"]}
        assert (items[made["id"]]["uses_left"], items[made["id"]]["expires_at"]) == (None, None)


async def test_provisioning_keys_are_listed_in_pages(plant: Plant) -> None:
    ids = sorted([(await plant.ask("POST", "/provisioning-keys"))[1]["id"] for _ in range(7)])
    first = await plant.get("/provisioning-keys?limit=4")
    second = await plant.get(f"/provisioning-keys?limit=4&after={first['next']}")
    assert [item["id"] for item in first["items"] + second["items"]] == ids
    assert (len(first["items"]), second["next"]) == (4, None)


# ---- tenants


@attrs.frozen
class Other:
    """A second tenant: its admin's token, a provisioning key, a device of its own that has sent a reading."""

    token: str
    token_id: str
    key: str
    key_id: str
    device: Device


@pytest.fixture
async def other(plant: Plant) -> Other:
    token, key, device = iiot.mint("op"), iiot.mint("prov"), iiot.mint("dev")

    def add(connection: Any) -> None:
        connection.execute("insert into tenant (name, created_at) values ('other', 0)")
        tenant = iiot.tenant_id_of(connection, "other")
        iiot.insert_operator_token(connection, tenant, token.stored, "theirs", "admin")
        iiot.insert_provisioning_key(connection, tenant, key.stored)
        iiot.insert_device(connection, tenant, iiot.DeviceName("theirs-1"), device.stored, {})

    iiot.change_database(plant.database, add)
    session = await (await plant.connect()).hello(device.text)
    assert session.welcome["tenant"] == "other"
    await session.store({"ts": START, "values": {"secret": 7}})
    return Other(token.text, token.stored.id, key.text, key.stored.id, session)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/iiot/theirs-1"), ("GET", "/iiot/theirs-1/events"), ("GET", "/iiot/theirs-1/telemetry"),
        ("GET", "/iiot/theirs-1/telemetry?metric=secret"), ("GET", "/iiot/theirs-1/telemetry?every=1m"),
        ("GET", "/iiot/theirs-1/telemetry?format=csv"), ("GET", "/iiot/theirs-1/telemetry?format=csv&every=1m"),
        ("POST", "/iiot/theirs-1/report"), ("DELETE", "/tokens/{token}"), ("DELETE", "/provisioning-keys/{key}"),
    ],
)  # fmt: skip
async def test_what_is_another_tenants_is_not_there(plant: Plant, other: Other, method: str, path: str) -> None:
    path = path.replace("{token}", other.token_id).replace("{key}", other.key_id)
    await plant.ask("POST", "/tokens", {"name": "spare", "role": "admin"}, token=other.token)  # the last one cannot be revoked
    body = {"what": "telemetry"} if method == "POST" else None
    status, answer = await plant.ask(method, path, body)
    assert (status, answer) == (404, {"error": {"code": "not_found", "message": iiot.FAULTS["not_found"].message}})
    status, answer = await plant.ask(method, path, body, token=other.token)
    assert status in (200, 202, 204), answer


async def test_lists_are_of_one_tenant(plant: Plant, other: Other) -> None:
    await plant.register("ours-1")
    await plant.ask("POST", "/provisioning-keys")
    for path, field in (("/iiot", "device"), ("/tokens", "id"), ("/provisioning-keys", "id")):
        ours = {item[field] for item in (await plant.get(path))["items"]}
        theirs = {item[field] for item in (await plant.ask("GET", path, token=other.token))[1]["items"]}
        assert len(ours) == len(theirs) == 1
        assert not ours & theirs


async def test_two_tenants_may_use_one_name(plant: Plant, other: Other) -> None:
    ours = await plant.device("theirs-1")
    await ours.store({"ts": START, "values": {"secret": 1}})
    assert await plant.points("theirs-1", "secret") == [[time(0), 1]]
    _, body = await plant.ask("GET", "/iiot/theirs-1/telemetry", token=other.token)
    assert body["series"][0]["points"] == [[time(0), 7]]
    assert (await plant.ask("GET", "/iiot/theirs-1", token=other.token))[1]["latest"]["secret"]["value"] == 7
    device = await plant.connect()
    await device.send("provision", key=other.key, device="ours-1")
    assert (await device.receive())["type"] == "credentials"
    assert (await plant.ask("GET", "/iiot/ours-1"))[0] == 404
    assert (await plant.ask("GET", "/iiot/ours-1", token=other.token))[0] == 200


async def test_the_platforms_token_sees_inside_no_tenant(plant: Plant, other: Other) -> None:
    token = plants.admin_token(plant.database, "platform")
    for path in ("/iiot", "/iiot/theirs-1", "/iiot/theirs-1/telemetry", "/tokens", "/provisioning-keys"):
        assert (await plant.ask("GET", path, token=token))[0] == 403


# ---- limits of queries


async def test_a_query_that_takes_too_long_is_ended_and_the_next_is_answered(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), readers=1), query_seconds=0.15) as plant:
        token = plant.token

        def add(connection: Any) -> None:
            connection.execute("insert into device (id, tenant_id, name, created_at) values (1, 1, 'press-1', 0)")
            connection.execute("insert into presence (device_id) values (1)")
            connection.execute("insert into series values (1, 1, 'n')")
            connection.execute(
                "with recursive n (i) as (select 0 union all select i + 1 from n where i < 1000000)"
                " insert into telemetry select 1, ? + i, i * 0.1 from n",
                (START,),
            )

        iiot.change_database(plant.database, add)
        status, body = await plant.ask("GET", "/iiot/press-1/telemetry?every=1d&agg=avg,min,max,sum,count,last", token=token)
        assert (status, body["error"]["code"]) == (503, "query_too_slow")
        assert (await plant.get("/iiot/press-1/telemetry?limit=1"))["series"][0]["points"] == [[time(0), 0.0]]
