"""What a rule makes of readings: when its alert would have fired and cleared."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plant import Device, Plant

import iiot

CODEC = iiot.Codec(iiot.Limits())
START = 1_767_225_600_000  # 2026-01-01T00:00:00Z
SECOND, MINUTE = 1_000, 60_000
Reading = tuple[int, Any]
Span = tuple[int, int, int | None]


def rule_of(condition: dict[str, Any], **more: Any) -> iiot.Rule:
    return CODEC.body(json.dumps({"metric": "level", "condition": condition, **more}).encode(), iiot.Rule)


def tried(rule: iiot.Rule, readings: list[Reading], stop: int) -> list[Span]:
    """Of each alert since when it held, when it fired and when it was over, in seconds."""
    trial = iiot.Trial(rule, 0)
    for seconds, value in readings:
        trial.take(seconds * SECOND, value)

    def seconds_of(moment: int | None) -> int | None:
        return None if moment is None else moment // SECOND

    return [(one.since // SECOND, (one.fired_at or 0) // SECOND, seconds_of(one.resolved_at)) for one in trial.end(stop * SECOND)]


@pytest.mark.parametrize(
    ("condition", "values", "alerts"),
    [
        ({"above": 5}, [5, 6, 5, 4], [(1, 1, 2)]), ({"above": 5}, [5, 5.0, 4.999], []), ({"below": 5}, [5, 4, 5], [(1, 1, 2)]),
        ({"outside": [1, 2]}, [1, 0.9, 1, 2, 2.1, 1.5], [(1, 1, 2), (4, 4, 5)]), ({"equals": 3}, [3, 3.0, 4], [(0, 0, 2)]),
        ({"equals": "stop"}, ["run", "stop", "stop", "run", 1], [(1, 1, 3)]), ({"equals": True}, [0, 1, 0], [(1, 1, 2)]),
        ({"equals": "1"}, [1, 1], []), ({"changed": 2}, [0, 1, 3, 3, 0], [(2, 2, 3), (4, 4, None)]),
        ({"above": 5}, ["text", 6, "text", 4], [(1, 1, 3)]), ({"above": 0}, [False, True, False], [(1, 1, 2)]),
        ({"slope_above": 60, "window": "2s"}, [0, 2, 4, 4, 4, 4, 4], [(1, 1, 3)]), ({"slope_above": 0, "window": "10s"}, [7], []),
        ({"slope_above": 0, "window": "4s"}, [1, 2, 3, 4], [(2, 2, None)]),
        ({"slope_below": -60, "window": "2s"}, [9, 7, 5], [(1, 1, None)]),
        ({"predicted_above": 100, "within": "1m", "window": "4s"}, [0, 1, 3, 5], [(3, 3, None)]),
        ({"predicted_below": 0, "within": "10s", "window": "2s"}, [20, 19, 18], []),
    ],
)  # fmt: skip
def test_a_condition_holds_from_one_reading_to_another(condition: dict[str, Any], values: list[Any], alerts: list[Span]) -> None:
    assert tried(rule_of(condition), list(enumerate(values)), len(values) - 1) == alerts


@pytest.mark.parametrize(
    ("more", "readings", "stop", "alerts"),
    [
        ({"for": "10s"}, [(0, 9), (9, 1)], 100, []), ({"for": "10s"}, [(0, 9), (10, 1)], 100, []),
        ({"for": "10s"}, [(0, 9), (11, 1)], 100, [(0, 10, 11)]), ({"for": "10s"}, [(0, 9)], 9, []),
        ({"for": "10s"}, [(0, 9)], 10, [(0, 10, None)]),
        ({"for": "10s"}, [(0, 9), (5, 9), (12, 9), (20, 1)], 100, [(0, 10, 20)]),
        ({"for": "10s"}, [(0, 9), (5, 1), (6, 9), (15, 9)], 15, []),
        ({"keep_firing_for": "10s"}, [(0, 9), (1, 1)], 100, [(0, 0, 11)]),
        ({"keep_firing_for": "10s"}, [(0, 9), (1, 1)], 10, [(0, 0, None)]),
        ({"keep_firing_for": "10s"}, [(0, 9), (1, 1), (5, 9), (6, 1), (30, 1)], 100, [(0, 0, 16)]),
        ({"keep_firing_for": "10s"}, [(0, 9), (1, 1), (30, 9), (31, 1)], 100, [(0, 0, 11), (30, 30, 41)]),
        ({"clear": 3}, [(0, 9), (1, 4), (2, 3), (3, 4)], 9, [(0, 0, 2)]), ({"clear": 3}, [(0, 4)], 9, []), ({}, [], 9, []),
        ({"for": "5s", "clear": 3}, [(0, 9), (1, 4), (7, 4), (8, 2)], 9, [(0, 5, 8)]),
    ],
)  # fmt: skip
def test_timers_run_by_the_times_of_the_readings(more: dict[str, Any], readings: list[Reading], stop: int, alerts: list[Span]) -> None:
    assert tried(rule_of({"above": 5}, **more), readings, stop) == alerts


@pytest.mark.parametrize(
    ("readings", "stop", "alerts"),
    [
        ([], 59, []), ([], 60, [(60, 60, None)]), ([(10, 1)], 69, []), ([(10, 1)], 71, [(70, 70, None)]),
        ([(10, 1), (69, 1)], 80, []), ([(10, 1), (70, 1)], 80, []), ([(10, 1), (71, 1)], 80, [(70, 70, 71)]),
        ([(10, 1), (100, 1), (300, "x")], 300, [(70, 70, 100), (160, 160, 300)]),
    ],
)  # fmt: skip
def test_silence_is_an_alert_of_its_own_until_the_next_reading(readings: list[Reading], stop: int, alerts: list[Span]) -> None:
    assert tried(rule_of({"absent": "1m"}), readings, stop) == alerts


READINGS = st.lists(st.tuples(st.integers(1, 20), st.integers(-1_000_000, 1_000_000)), min_size=1, max_size=60)


@given(READINGS, st.integers(1, 60), st.sampled_from([0.0, 1e9, -3e12]))
def test_a_trend_is_the_line_of_least_squares_through_its_window(steps: list[tuple[int, int]], window: int, offset: float) -> None:
    trend, now, seen = iiot.Trend(window * SECOND), START, list[tuple[int, Fraction]]()
    for step, value in steps:
        now += step * SECOND
        seen.append((now, Fraction(value) + Fraction(offset)))
        line = trend.add(now, value + offset)
        some = [(Fraction(ts, MINUTE), each) for ts, each in seen if ts > now - window * SECOND]
        if 2 * (some[-1][0] - some[0][0]) < Fraction(window, 60):
            assert line is None
            continue
        assert line is not None
        mean_x, mean_y = sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in some) / sum((x - mean_x) ** 2 for x, _ in some)
        most = 1e-6 * (1e6 + abs(offset) * 1e-3)
        assert line[0] == pytest.approx(float(slope), rel=1e-6, abs=most)
        assert line[1] == pytest.approx(float(mean_y + slope * (Fraction(now, MINUTE) - mean_x)), rel=1e-6, abs=most)


@pytest.mark.parametrize("mark", [1.7976931348623157e308, -1e18, 1e18])
def test_a_reading_that_is_far_off_leaves_nothing_behind_when_it_has_left_the_window(mark: float) -> None:
    trend = iiot.Trend(10 * MINUTE)
    lines = [trend.add(n * 10 * SECOND, mark if n == 100 else n / 3) for n in range(300)]
    for line in lines[160:]:
        assert line is not None
        assert line[0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "condition"), ({"above": 1, "below": 2}, "condition"), ({"over": 1}, "condition"), ({"above": "5"}, "condition.above"),
        ({"above": True}, "condition.above"), ({"above": 1, "window": "1m"}, "condition.window"),
        ({"outside": [2, 1]}, "condition.outside"),
        ({"outside": 1}, "condition.outside"), ({"slope_above": 1}, "condition.window"),
        ({"slope_above": 1, "window": "0s"}, "condition.window"),
        ({"predicted_above": 1, "window": "1m"}, "condition.within"), ({"absent": "31d"}, "condition.absent"),
        ({"absent": 5}, "condition.absent"),
        ({"changed": 0}, "condition.changed"),
        ({"equals": None}, "condition.equals"), ({"equals": [1]}, "condition.equals"), ("above", "condition"),
    ],
)  # fmt: skip
async def test_a_condition_that_cannot_be_is_refused_by_its_field(plant: Plant, body: Any, path: str) -> None:
    status, answer = await plant.ask("POST", "/rules/dry-run", {"metric": "level", "condition": body})
    assert (status, answer["error"]["code"]) == (422, "invalid")
    assert answer["error"]["details"][0]["path"] == path


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"for": "x"}, "for"), ({"for_": "1s"}, "for_"), ({"keep_firing_for": 5}, "keep_firing_for"), ({"clear": 6}, "clear"),
        ({"clear": "x"}, "clear"), ({"metric": ""}, "metric"), ({"metric": 'a"b\n'}, "metric"), ({"match": 5}, "match"),
        ({"match": ""}, "match"),
    ],
)  # fmt: skip
async def test_a_rule_that_cannot_be_is_refused_by_its_field(plant: Plant, more: dict[str, Any], path: str) -> None:
    status, answer = await plant.ask("POST", "/rules/dry-run", {"metric": "level", "condition": {"above": 5}, **more})
    assert (status, answer["error"]["code"]) == (422, "invalid")
    assert path in [detail["path"] for detail in answer["error"]["details"]]


# ---- over stored history


async def store(device: Device, metric: str, values: list[Any]) -> None:
    await device.store(*({"ts": START + n * SECOND, "values": {metric: value}} for n, value in enumerate(values)))


async def try_rule(plant: Plant, condition: dict[str, Any], *, seconds: int = 100, **more: Any) -> Any:
    path = f"/rules/dry-run?from={START}&to={START + seconds * SECOND}"
    status, answer = await plant.ask("POST", path, {"metric": "level", "condition": condition, **more})
    assert status == 200, answer
    return answer


def moment(seconds: int) -> str:
    return iiot.format_time(START + seconds * SECOND)


@pytest.mark.parametrize("limits", [None, attrs.evolve(iiot.Limits(), fleet_page=2, fleet_series=2, trial_readings=3)])
async def test_a_rule_is_tried_on_what_is_stored(tmp_path: Path, limits: iiot.Limits | None) -> None:
    async with plants.plant(tmp_path, limits) as plant:
        for name, values in (("press-1", [1, 9, 9, 1]), ("press-2", [1, 1]), ("press-3", [1, 1, 8.5]), ("pump-1", [9, 9])):
            await store(await plant.device(name), "level", values)
        await store(await plant.device("press-4"), "other", [9])
        answer = await try_rule(plant, {"above": 5}, match="press-*")
    assert answer == {
        "from": moment(0), "to": moment(100), "devices": 4, "readings": 9,
        "items": [
            {"device": "press-1", "since": moment(1), "fired_at": moment(1), "resolved_at": moment(3), "value": 9},
            {"device": "press-3", "since": moment(2), "fired_at": moment(2), "resolved_at": None, "value": 8.5},
        ],
    }  # fmt: skip


async def test_a_device_that_never_sent_the_metric_is_absent(plant: Plant) -> None:
    await store(await plant.device("press-1"), "level", list(range(101)))
    await store(await plant.device("press-2"), "other", [1])
    answer = await try_rule(plant, {"absent": "30s"})
    assert answer["devices"] == 2
    assert [(item["device"], item["since"], item["resolved_at"]) for item in answer["items"]] == [("press-2", moment(30), None)]


async def test_a_rule_that_matches_nothing_finds_nothing(plant: Plant) -> None:
    assert (await try_rule(plant, {"above": 5}, match="nobody"))["items"] == []


async def test_without_a_range_it_is_the_last_day(plant: Plant) -> None:
    await (await plant.device("press-1")).store({"values": {"level": 9}}, {"ts": START, "values": {"level": 9}})
    status, answer = await plant.ask("POST", "/rules/dry-run", {"metric": "level", "condition": {"above": 5}})
    assert (status, answer["readings"], len(answer["items"])) == (200, 1, 1)
    status, answer = await plant.ask("POST", "/rules/dry-run?from=5&to=5", {"metric": "level", "condition": {"above": 5}})
    assert (status, answer["error"]["details"][0]["path"]) == (400, "from")


async def test_alerts_that_still_fire_count_too(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), page_most=3)) as plant:
        for number in range(4):
            await plant.register(f"press-{number}")
        status, answer = await plant.ask("POST", "/rules/dry-run", {"metric": "level", "condition": {"absent": "5m"}})
    assert (status, answer["error"]["details"][0]["path"]) == (400, "from")


@pytest.mark.parametrize(("field", "what"), [("trial_most", "readings"), ("page_most", "alerts")])
async def test_more_than_can_be_tried_is_refused(tmp_path: Path, field: str, what: str) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), **{field: 3})) as plant:
        await store(await plant.device("press-1"), "level", [9, 1] * 5)
        path = f"/rules/dry-run?from={START}&to={START + 100_000}"
        status, answer = await plant.ask("POST", path, {"metric": "level", "condition": {"above": 5}})
    assert status == 400
    assert answer["error"]["details"][0]["message"] == f"gives more than 3 {what}: take fewer devices or less time"
