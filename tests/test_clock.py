"""Times that the server gives, and what becomes of them when its clock is set: a clock that was wrong does not bind the future."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st
from plant import PATIENCE, Plant, Process

import iiot

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
YEAR = 365 * iiot.DAY


def sample(*metrics: str) -> iiot.Sample:
    return iiot.Sample(iiot.Values(dict.fromkeys(metrics, 1)))


# ---- the rule


def give(stamps: iiot.Stamps, now: int, *metrics: str) -> list[int]:
    """The stamps of samples of one metric each."""
    return stamps.give(tuple(sample(metric) for metric in metrics), now)


def test_metrics_may_share_a_millisecond_and_samples_of_one_metric_may_not() -> None:
    stamps = iiot.Stamps(0, 60_000)
    assert give(stamps, 1_000, "a", "b", "c", "a", "b", "a") == [1_000, 1_000, 1_000, 1_001, 1_001, 1_002]
    assert stamps.give((sample("c", "d"), sample("a", "c")), 1_000) == [1_001, 1_003]
    assert stamps.newest == 1_003


def test_a_burst_runs_ahead_and_comes_back_to_the_clock() -> None:
    stamps = iiot.Stamps(0, 60_000)
    assert give(stamps, 1_000, *["a"] * 3_000) == list(range(1_000, 4_000))
    assert give(stamps, 2_000, "a", "b") == [4_000, 2_000], "another metric is not kept ahead"
    assert give(stamps, 5_000, "a") == [5_000]


def test_a_thousand_metrics_a_frame_stay_at_the_clock_however_often_they_come() -> None:
    stamps = iiot.Stamps(0, 60_000)
    names = [f"m{n}" for n in range(1_000)]
    for now in range(1_000, 5_000, 10):
        assert set(give(stamps, now, *names)) == {now}


def test_the_stamps_of_an_earlier_session_are_not_given_again() -> None:
    assert give(iiot.Stamps(5_000, 60_000), 4_000, "a", "b", "a") == [5_001, 5_001, 5_002]
    assert give(iiot.Stamps(5_000, 60_000), 5_000, "a") == [5_001]
    assert give(iiot.Stamps(5_000, 60_000), 6_000, "a") == [6_000]


def test_a_stamp_of_a_clock_that_was_ahead_does_not_count() -> None:
    now = 1_000_000_000
    stamps = iiot.Stamps(now + YEAR, 60_000)
    assert give(stamps, now, "a", "a") == [now, now + 1]
    assert stamps.newest == now + 1
    give(stamps, now + YEAR, "a")
    assert give(stamps, now + 10, "a") == [now + 10], "within one session too"


def test_a_burst_beyond_the_limit_is_refused_and_gives_no_stamp() -> None:
    stamps = iiot.Stamps(0, 60_000)
    give(stamps, 1_000, *["a"] * 50_000)
    with pytest.raises(iiot.Refusal) as refused:
        give(stamps, 1_001, *["b"] * 5, *["a"] * 20_000)
    assert [error.path for error in refused.value.errors] == ["samples[10007].ts"]
    assert give(stamps, 1_002, "a", "b") == [51_000, 1_002]


@given(st.lists(st.tuples(st.integers(0, 40), st.lists(st.sampled_from("abc"), max_size=30)), max_size=30))
def test_no_two_samples_of_a_metric_get_one_stamp_and_none_is_before_its_receipt(frames: list[tuple[int, list[str]]]) -> None:
    stamps, now, seen = iiot.Stamps(0, 60_000), 1_000_000, set[tuple[str, int]]()
    for pause, metrics in frames:
        now += pause
        for metric, stamp in zip(metrics, give(stamps, now, *metrics), strict=True):
            assert (metric, stamp) not in seen
            assert now <= stamp <= now + sum(before == metric for before, _ in seen), "no further ahead than the burst"
            seen.add((metric, stamp))
    assert stamps.newest == max((stamp for _, stamp in seen), default=0) or not seen


# ---- a server


async def test_unstamped_samples_of_many_metrics_have_the_time_of_receipt(plant: Plant) -> None:
    device = await plant.device("press-1")
    before = iiot.now_ms()
    for _ in range(20):
        await device.store(*({"values": {f"m{n}": 1}} for n in range(1_000)))
    latest = (await plant.get("/iiot/press-1"))["latest"].values()
    assert {iiot.format_time(before) <= point["time"] <= iiot.format_time(iiot.now_ms()) for point in latest} == {True}


async def test_none_of_3000_unstamped_samples_of_one_metric_in_one_frame_is_lost(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.store(*({"values": {"level": n}} for n in range(3_000)))
    assert [value for _, value in await plant.points("press-1", "level")] == list(range(3_000))


async def test_a_frame_that_would_run_too_far_ahead_is_refused_whole(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), stamp_ahead_seconds=1.0)) as plant:
        device = await plant.device("press-1")
        seq = await device.telemetry({"values": {"other": 1}}, *({"values": {"level": n}} for n in range(3_000)))
        error = await device.expect("error")
        assert (error["seq"], error["code"]) == (seq, "invalid")
        (field,) = error["errors"]
        assert field["message"] == "is missing, and the metric has more samples than there are milliseconds"
        await device.acknowledged(seq)
        assert (await plant.get("/iiot/press-1"))["latest"] == {}


@attrs.define
class Clocked:
    """A server whose wall clock the test sets, while its own clock runs on."""

    plant: Plant
    offset: Path

    def set(self, milliseconds: int) -> None:
        """So far from the true time, at once."""
        beside = self.offset.with_suffix(".new")
        beside.write_text(f"{milliseconds / 1000:+.3f}\n")
        beside.replace(self.offset)


@pytest.fixture
async def clocked(tmp_path: Path) -> AsyncIterator[Clocked]:
    if FAKETIME is None:
        pytest.skip("setting a server's clock needs faketime")
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    server = Process(
        tmp_path, LD_PRELOAD=str(FAKETIME), FAKETIME_TIMESTAMP_FILE=str(offset), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1"
    )
    try:
        await server.start()
        token, _ = await server.read_first_start()
        async with ClientSession() as client:
            yield Clocked(server.plant(client, token), offset)
    finally:
        if server.url:
            await server.stop()


def is_near(moment: str, now: int) -> bool:
    shown = iiot.parse_rfc3339(moment)
    assert shown is not None
    return abs(shown - now) < 60_000


async def test_readings_taken_while_the_clock_was_a_year_ahead_do_not_keep_later_ones_there(clocked: Clocked) -> None:
    plant = clocked.plant
    device = await plant.device("press-1")
    clocked.set(YEAR)
    await device.store({"values": {"level": 1}})
    assert is_near((await plant.points("press-1", "level"))[0][0], iiot.now_ms() + YEAR)
    clocked.set(0)
    await device.store({"values": {"level": 2}})
    shown = await plant.get("/iiot/press-1")
    assert is_near(shown["seen_at"], iiot.now_ms())
    points = await plant.points("press-1", "level")
    assert ([is_near(at, iiot.now_ms()) for at, _ in points], [value for _, value in points]) == ([True, False], [2, 1])
    await device.close()
    device = await plant.device("press-1")
    await device.store({"values": {"level": 3}})
    assert is_near((await plant.points("press-1", "level"))[1][0], iiot.now_ms()), "in the next session too"
    assert shown["latest"]["level"]["value"] == 1, "the newest time is still the wrong one"
    beyond = f"from={iiot.now_ms() + iiot.DAY}&to={iiot.now_ms() + 2 * YEAR}"
    assert (await plant.ask("DELETE", f"/iiot/press-1/telemetry?metric=level&{beyond}"))[0] == 204
    assert (await plant.get("/iiot/press-1"))["latest"]["level"]["value"] == 3


async def until_timed_out(plant: Plant, name: str) -> None:
    """Push to a device that says nothing, and wait for the time-out."""
    assert (await plant.ask("POST", f"/iiot/{name}?timeout=200ms", {"n": 1}))[0] == 202
    await plant.until(f"/iiot/{name}/config", lambda config: config["status"] == "timed_out")


@pytest.mark.parametrize("step", [2 * 3_600_000, -2 * 3_600_000], ids=["forward", "back"])
async def test_a_push_times_out_by_the_time_that_has_passed_whatever_the_clock_is_set_to(clocked: Clocked, step: int) -> None:
    plant = clocked.plant
    devices = [await plant.device(name) for name in ("press-1", "press-2", "press-3")]
    assert (await plant.ask("POST", "/iiot/press-1?timeout=1h", {"n": 1}))[0] == 202
    await plant.until("/iiot/press-1/config", lambda config: config["status"] == "sent")
    assert (await plant.ask("POST", "/iiot/press-2?timeout=1s", {"n": 1}))[0] == 202
    clocked.set(step)
    await until_timed_out(plant, "press-3")
    await plant.until("/iiot/press-2/config", lambda config: config["status"] == "timed_out")
    assert (await plant.get("/iiot/press-1/config"))["status"] == "sent", "its hour has not passed"
    assert len(devices) == 3


async def test_a_quota_used_up_while_the_clock_was_ahead_does_not_last_until_then(clocked: Clocked) -> None:
    plant = clocked.plant
    platform = plants.admin_token(plant.database, "platform")
    clocked.set(YEAR)
    assert (await plant.ask("PATCH", "/tenants/default", {"quotas": {"points_per_day": 2}}, token=platform))[0] == 200
    device = await plant.device("press-1")
    await device.telemetry({"values": {"a": 1, "b": 1}})
    assert 0 < (await device.expect("throttled"))["retry_after"] <= 86_400
    await device.close()
    clocked.set(0)
    device = await plant.device("press-1")
    async with asyncio.timeout(PATIENCE):
        await device.store({"values": {"a": 2, "b": 2}})


async def test_a_token_used_while_the_clock_was_ahead_shows_its_later_uses(clocked: Clocked) -> None:
    plant = clocked.plant
    made = (await plant.ask("POST", "/tokens", {"name": "shift", "role": "viewer"}))[1]

    def used(body: dict[str, Any]) -> bool:
        (at,) = (item["used_at"] for item in body["items"] if item["id"] == made["id"])
        return at is not None and is_near(at, iiot.now_ms() + ahead)

    for ahead in (YEAR, 0):
        clocked.set(ahead)
        assert (await plant.ask("GET", "/whoami", token=made["token"]))[0] == 200
        await plant.until("/tokens", used)


async def test_what_was_done_while_the_clock_was_wrong_is_found_by_its_time_and_what_came_after_by_its_own(clocked: Clocked) -> None:
    plant = clocked.plant
    now, hour = iiot.now_ms(), 3_600_000
    for step, version in ((0, 1), (YEAR, 2), (-YEAR, 3), (0, 4)):
        clocked.set(step)
        device = f"press-{version}"
        await plant.register(device)
        _, pushed = await plant.ask("POST", "/iiot/press-1", {"n": version})
        assert pushed["version"] == version

    async def found(query: str) -> list[int]:
        entries = (await plant.get(f"/audit?action=config.push{query}"))["items"]
        events = (await plant.get(f"/iiot/press-1/events?kind=config{query}"))["items"]
        versions = [entry["detail"]["version"] for entry in entries]
        assert [event["version"] for event in events if event["status"] == "pending"] == versions
        return versions

    assert await found("") == [4, 3, 2, 1], "in the order in which it was done"
    for step, versions in ((0, [4, 1]), (YEAR, [2]), (-YEAR, [3]), (YEAR // 2, [])):
        assert await found(f"&from={now + step - hour}&to={now + step + hour}") == versions
    assert await found(f"&from={now - hour}") == [4, 2, 1]
    assert await found(f"&to={now + hour}") == [4, 3, 1]


# ---- the way out of wrong times


async def test_readings_of_a_range_are_removed_and_no_others(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), removed_rows=100)) as plant:
        start = 1_767_225_600_000
        devices = [await plant.device(name) for name in ("press-1", "press-2")]
        for device in devices:
            await device.store(*({"ts": start + n, "values": {"level": n, "flow": n, "heat": n}} for n in range(1_000)))
        query = f"metric=level&metric=flow&from={start + 100}&to={start + 900}"
        assert await plant.ask("DELETE", f"/iiot/press-1/telemetry?{query}") == (204, "")
        rest = [*range(100), *range(900, 1_000)]
        for metric, expected in (("level", rest), ("flow", rest), ("heat", list(range(1_000)))):
            assert [value for _, value in await plant.points("press-1", metric)] == expected
        assert len(await plant.points("press-2", "level")) == 1_000
        assert await plant.ask("DELETE", f"/iiot/press-1/telemetry?from=0&to={start + 1_000}") == (204, "")
        assert (await plant.get("/iiot/press-1"))["latest"] == {}
        await devices[0].store({"ts": start + 500, "values": {"level": 7}})
        assert [value for _, value in await plant.points("press-1", "level")] == [7]


async def test_what_a_device_sends_while_readings_are_removed_is_not_taken_for_them(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), removed_rows=50)) as plant:
        start = 1_767_225_600_000
        device = await plant.device("press-1")
        for at in range(0, 5_000, 1_000):
            await device.store(*({"ts": start + at + n, "values": {"level": 1, "flow": 1}} for n in range(1_000)))
        removing = asyncio.create_task(plant.ask("DELETE", f"/iiot/press-1/telemetry?from={start}&to={start + 5_000}"))
        await plant.until("/audit?action=telemetry.remove", lambda body: body["items"])
        sent = [await device.telemetry({"ts": start + n, "values": {"level": 2}}) for n in range(0, 5_000, 50)]
        assert (await removing)[0] == 204
        await device.acknowledged(sent[-1])
        assert [value for _, value in await plant.points("press-1", "level")] == [2] * 100
        assert await plant.points("press-1", "flow") == []


async def test_a_range_up_to_the_end_of_time_may_be_removed(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.store({"values": {"level": 1}})
    assert await plant.ask("DELETE", "/iiot/press-1/telemetry?from=0&to=999999999999999") == (204, "")
    assert await plant.points("press-1", "level") == []


async def test_a_burst_before_a_reconnect_keeps_no_other_metric_ahead(plant: Plant) -> None:
    device = await plant.device("press-1")
    for _ in range(4):
        await device.store(*({"values": {"a": n}} for n in range(10_000)))
    await device.close()
    device = await plant.device("press-1")
    before = iiot.now_ms()
    await device.store({"values": {"c": 1}}, {"values": {"a": 1}})
    latest = (await plant.get("/iiot/press-1"))["latest"]
    assert iiot.format_time(before) <= latest["c"]["time"] <= iiot.format_time(iiot.now_ms())
    assert latest["a"]["value"] == 1, "the last of it all"


@pytest.mark.parametrize(
    ("query", "status", "path"),
    [
        ("from=1&to=2&metric=nothing", 404, "metric"), ("from=1", 400, "to"), ("to=1", 400, "from"), ("metric=level", 400, "from"),
        ("from=2&to=1", 400, "from"), ("from=1&to=2&agg=max", 400, "agg"),
    ],
)  # fmt: skip
async def test_what_readings_to_remove_must_be_said(plant: Plant, query: str, status: int, path: str) -> None:
    device = await plant.device("press-1")
    await device.store({"values": {"level": 1}})
    answered, body = await plant.ask("DELETE", f"/iiot/press-1/telemetry?{query}")
    assert (answered, [field["path"] for field in body["error"]["details"]]) == (status, [path])
    assert len(await plant.points("press-1", "level")) == 1


async def test_a_removal_of_readings_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        device = await plant.device("press-1")
        await device.store(*({"ts": iiot.EARLIEST + n, "values": {"level": n}} for n in range(1_000)))
    with plants.writing(plant.database) as connection:
        assert iiot.remove_readings(connection, 1, "press-1", None, 0, iiot.LATEST)
    async with plants.plant(tmp_path) as plant:
        await plant.until("/iiot/press-1/telemetry?metric=level", lambda body: body["series"][0]["points"] == [])
