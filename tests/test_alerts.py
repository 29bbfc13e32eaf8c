"""Rules at work: alerts that fire and clear by what is stored, and that survive everything."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from plant import Device, Plant, Process
from receivers import receiver, told_to

import iiot

SECOND = 1_000
QUICK = attrs.evolve(iiot.Limits(), alert_seconds=0.02, settle_seconds=0.5)
Shown = tuple[str, str, str, Any]


async def rule(plant: Plant, condition: dict[str, Any], name: str = "hot", **more: Any) -> int:
    if next(iter(condition)) not in ("offline", "log"):
        more = {"metric": "level", **more}
    status, answer = await plant.ask("POST", "/rules", {"name": name, "condition": condition, **more})
    assert status == 201, answer
    return int(answer["id"])


async def alerts(plant: Plant, query: str = "") -> list[dict[str, Any]]:
    return list((await plant.get(f"/alerts{query}"))["items"])


async def shown(plant: Plant, query: str = "") -> list[Shown]:
    return [(one["device"], one["rule"], one["status"], one["value"]) for one in await alerts(plant, query)]


async def until(plant: Plant, *wanted: Shown, query: str = "") -> list[dict[str, Any]]:
    """Wait until these are the alerts, newest first."""

    def is_so(answer: Any) -> bool:
        return [(one["device"], one["rule"], one["status"], one["value"]) for one in answer["items"]] == list(wanted)

    try:
        await plant.until(f"/alerts{query}", is_so)
    except (TimeoutError, AssertionError):
        assert await shown(plant, query) == list(wanted)
    return await alerts(plant, query)


def moment(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


async def level(device: Device, *values: Any, ago: float = 0.0, step: float = 1.0, metric: str = "level") -> None:
    """Readings, the last one so many seconds ago, and so many seconds between two of them."""
    last = iiot.now_ms() - round(ago * SECOND)
    stamps = [last - round((len(values) - 1 - place) * step * SECOND) for place in range(len(values))]
    await device.store(*({"ts": ts, "values": {metric: value}} for ts, value in zip(stamps, values, strict=True)))


@pytest.mark.parametrize(
    ("condition", "quiet", "bad", "judged"),
    [
        ({"above": 5}, [5, 4], 5.1, 5.1), ({"below": 5}, [5, 6], 4, 4), ({"outside": [1, 2]}, [1, 2], 0, 0),
        ({"equals": "stop"}, ["run", 1], "stop", "stop"), ({"equals": 3}, [1, "3"], 3, 3), ({"equals": True}, [0, False], True, 1),
        ({"changed": 2}, [0, 1], 3, 2),
    ],
)  # fmt: skip
async def test_an_alert_fires_with_the_reading_that_is_beyond(
    plant: Plant, condition: dict[str, Any], quiet: list[Any], bad: Any, judged: Any
) -> None:
    device = await plant.device("press-1")
    await rule(plant, condition)
    await level(device, *quiet, ago=1)
    assert await alerts(plant) == []
    await level(device, bad)
    (alert,) = await until(plant, ("press-1", "hot", "firing", judged))
    assert alert["metric"] == "level"
    assert (alert["severity"], alert["stale"], alert["acknowledged"], alert["silenced"]) == ("warning", False, None, None)
    assert alert["since"] == alert["fired_at"]


async def test_a_value_exactly_at_the_threshold_neither_fires_nor_keeps_firing(plant: Plant) -> None:
    device = await plant.device("press-1")
    await rule(plant, {"above": 0.1})
    await level(device, 0.1, ago=2)
    assert await alerts(plant) == []
    await level(device, 0.10000000000000002, ago=1)
    await until(plant, ("press-1", "hot", "firing", 0.10000000000000002))
    await level(device, 0.1)
    (alert,) = await until(plant, ("press-1", "hot", "resolved", 0.10000000000000002))
    assert alert["reason"] == "cleared"


async def test_what_is_there_when_a_rule_comes_is_judged_by_it(plant: Plant) -> None:
    first, second = await plant.device("press-1"), await plant.device("press-2")
    await level(first, 9)
    await level(second, 1)
    await rule(plant, {"above": 5})
    await until(plant, ("press-1", "hot", "firing", 9))
    await level(second, 8)
    await until(plant, ("press-2", "hot", "firing", 8), ("press-1", "hot", "firing", 9))


async def test_a_trend_of_stored_readings_fires_when_its_rule_comes(plant: Plant) -> None:
    device = await plant.device("press-1")
    await level(device, *range(11), ago=1)
    await rule(plant, {"slope_above": 50, "window": "10s"})
    (alert,) = await until(plant, ("press-1", "hot", "firing", pytest.approx(60)))
    await level(device, 10.1)
    await until(plant, ("press-1", "hot", "firing", alert["value"]))


async def test_an_alert_waits_for_its_time_and_fires_by_itself(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, **{"for": "1s"})
        await level(device, 9)
        await until(plant, ("press-1", "hot", "pending", 9), query="?status=pending")
        (alert,) = await until(plant, ("press-1", "hot", "firing", 9))
        assert iiot.parse_rfc3339(alert["fired_at"]) == (iiot.parse_rfc3339(alert["since"]) or 0) + SECOND


async def test_one_that_ends_before_it_fires_leaves_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, **{"for": "1h"})
        await level(device, 9, ago=1)
        await until(plant, ("press-1", "hot", "pending", 9))
        await level(device, 1)
        await until(plant)
        assert await plant.get("/iiot/press-1/events?kind=alert") == {"items": [], "next": None}


async def test_an_alert_clears_only_beyond_its_clear_value_and_after_its_time(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, clear=3, keep_firing_for="1s")
        await level(device, 9, 4, ago=3)
        await until(plant, ("press-1", "hot", "firing", 9))
        await level(device, 3, ago=2)
        (alert,) = await until(plant, ("press-1", "hot", "resolved", 9))
        assert alert["reason"] == "cleared"


async def test_spooled_readings_are_judged_by_their_own_times_and_what_is_over_is_history(tmp_path: Path) -> None:
    """Two hours that come at once: what fired and cleared in them is in the history, and the timeline tells nobody of it."""
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, **{"for": "30s"})
        values = [1] * 30 + [9] * 30 + [1] * 30 + [9] * 2 + [1] * 28
        await level(device, *values, step=60)
        found = await until(plant, *[("press-1", "hot", "resolved", 9)] * 2)
        for alert, minutes in zip(found, (2, 30), strict=True):
            since, fired, over = (iiot.parse_rfc3339(alert[name]) or 0 for name in ("since", "fired_at", "resolved_at"))
            assert (fired - since, over - since) == (30 * SECOND, minutes * 60 * SECOND)
            assert not alert["told"]
        assert await plant.get("/iiot/press-1/events?kind=alert") == {"items": [], "next": None}


async def test_readings_of_the_past_that_end_beyond_are_told_once_no_more_come(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5})
        await level(device, 1, 9, ago=600)
        (alert,) = await until(plant, ("press-1", "hot", "firing", 9))
        assert not alert["told"]
        await plant.until("/alerts", lambda answer: answer["items"][0]["told"])
        (event,) = (await plant.get("/iiot/press-1/events?kind=alert"))["items"]
        assert (event["status"], event["rule"], event["value"]) == ("firing", "hot", 9)


async def test_an_alert_that_follows_on_another_in_the_past_or_fires_by_a_clock_that_is_behind_is_told_to_nobody(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, settle_seconds=600.0)) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, keep_firing_for="2s")
        await rule(plant, {"above": 5}, "later", **{"for": "1s"})
        await level(device, 9, 1, 1, 9, ago=7_000)
        alerts = await until(
            plant, ("press-1", "later", "firing", 9), ("press-1", "hot", "firing", 9), ("press-1", "hot", "resolved", 9), query="?from=-3h"
        )
        assert [alert["told"] for alert in alerts] == [False] * 3
        assert (await plant.get("/iiot/press-1/events?kind=alert"))["items"] == []


async def test_a_device_that_catches_up_part_by_part_tells_of_nothing_that_is_over(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, settle_seconds=5.0)) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, **{"for": "10s"})
        for ago in range(2_000, 0, -100):
            await level(device, 9 if ago % 400 else 1, ago=ago)
        await level(device, 1)
        found = await alerts(plant)
        assert len(found) >= 4
        assert {one["status"] for one in found} == {"resolved"}
        assert await plant.get("/iiot/press-1/events?kind=alert") == {"items": [], "next": None}


async def test_late_readings_add_to_the_past_what_was_not_known(plant: Plant) -> None:
    device = await plant.device("press-1")
    await rule(plant, {"above": 5})
    await level(device, 1, ago=600)
    await level(device, 1)
    await level(device, 9, 9, ago=300)
    (alert,) = await until(plant, ("press-1", "hot", "resolved", 9))
    assert not alert["told"]
    since, over = (iiot.parse_rfc3339(alert[name]) or 0 for name in ("since", "resolved_at"))
    assert over - since == pytest.approx(301 * SECOND, abs=5 * SECOND)
    await level(device, 2)
    await level(device, 9, ago=299)
    assert len(await until(plant, ("press-1", "hot", "resolved", 9))) == 1, "it belongs to an alert that is known"


async def test_a_late_reading_that_was_quiet_ends_what_only_seemed_to_hold(tmp_path: Path) -> None:
    """An alert that is pending since a time is pending since a later one, where a late reading says that it did not hold meanwhile."""
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, **{"for": "1h"})
        await level(device, 9, 9, ago=1, step=20)
        (before,) = await until(plant, ("press-1", "hot", "pending", 9))
        await level(device, 1, ago=11)
        await plant.until("/alerts", lambda answer: answer["items"] and answer["items"][0]["since"] > before["since"])


async def test_a_late_reading_leaves_an_alert_that_was_told_as_it_is(plant: Plant) -> None:
    device = await plant.device("press-1")
    await rule(plant, {"above": 5})
    await level(device, 9, 9, ago=1, step=20)
    (before,) = await until(plant, ("press-1", "hot", "firing", 9))
    await level(device, 1, ago=11)
    await level(device, 9, ago=12)
    await level(device, 9)
    assert await until(plant, ("press-1", "hot", "firing", 9)) == [before]
    await level(device, 1)
    await until(plant, ("press-1", "hot", "resolved", 9))


async def test_a_reading_400_days_old_changes_nothing_of_today(plant: Plant) -> None:
    device = await plant.device("press-1")
    await rule(plant, {"above": 5})
    await level(device, 9, ago=2)
    (today,) = await until(plant, ("press-1", "hot", "firing", 9))
    await level(device, 1, ago=400 * 86_400)
    await level(device, 8, ago=399 * 86_400)
    await level(device, 1, ago=398 * 86_400)
    past, same = await until(plant, ("press-1", "hot", "resolved", 8), ("press-1", "hot", "firing", 9))
    assert same == today
    assert past["resolved_at"] < today["since"]


async def test_silence_is_an_alert_of_its_own_and_ends_no_other(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, stale_seconds=0.5)) as plant:
        device = await plant.device("press-1")
        await plant.register("press-2")
        await rule(plant, {"above": 5})
        await rule(plant, {"absent": "1s"}, "silent", match="press-*")
        await level(device, 9)
        (gone,) = await until(plant, ("press-1", "silent", "firing", None), query="?rule=silent&match=press-1")
        (never,) = await until(plant, ("press-2", "silent", "firing", None), query="?rule=silent&match=press-2")
        (hot,) = await until(plant, ("press-1", "hot", "firing", 9), query="?rule=hot")
        await plant.until("/alerts?rule=hot", lambda answer: answer["items"][0]["stale"])
        assert (gone["text"], never["text"], hot["text"]) == ("press-1 sends no level", "press-2 sends no level", "level of press-1: 9")
        assert not gone["stale"]
        await level(device, 8)
        await until(plant, ("press-1", "silent", "resolved", None), query="?match=press-1&rule=silent")


async def test_a_device_is_offline_after_its_time_and_until_it_connects(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        token = await plant.register("press-1")
        await plant.register("press-2")
        device = await (await plant.connect()).hello(token)
        await rule(plant, {"offline": "1s"}, "gone")
        await rule(plant, {"above": 5})
        await level(device, 9)
        await until(plant, ("press-1", "hot", "firing", 9))
        await device.close()
        gone, hot = await until(plant, ("press-1", "gone", "firing", None), ("press-1", "hot", "firing", 9))
        assert (gone["held_back"], hot["held_back"], gone["stale"], hot["stale"]) == (False, True, False, True)
        device = await (await plant.connect()).hello(token)
        await until(plant, ("press-1", "gone", "resolved", None), query="?rule=gone")
        assert not (await alerts(plant, "?rule=hot"))[0]["held_back"]
        events = (await plant.get("/iiot/press-1/events?kind=alert"))["items"]
        assert [(one["rule"], one["status"]) for one in events] == [("gone", "resolved"), ("gone", "firing"), ("hot", "firing")]
        await device.close()


async def test_lines_that_match_fire_when_there_are_enough_in_the_window(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"log": {"q": "jam", "level": "error", "count": 3, "window": "2s"}}, "jams")

        async def lines(*texts: str, level: str = "error") -> None:
            device.seq += 1
            await device.send("log", seq=device.seq, entries=[{"level": level, "message": text} for text in texts])
            await device.acknowledged(device.seq)

        await lines("a jam", "no trouble", "jam again")
        await lines("jam", level="warning")
        await asyncio.sleep(0.2)
        assert await alerts(plant) == []
        await lines("JAM")
        (alert,) = await until(plant, ("press-1", "jams", "firing", 3))
        assert alert["text"] == "press-1 logs 3 such lines"
        await until(plant, ("press-1", "jams", "resolved", 3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("edit", "its rule was changed"), ("disable", "its rule was disabled"), ("delete", "its rule was removed"),
        ("labels", "its rule no longer looks at the device"), ("disable device", "the device was disabled"),
        ("remove device", "the device was removed"),
    ],
)  # fmt: skip
async def test_an_alert_whose_rule_or_device_changes_is_over_with_that_reason(plant: Plant, change: str, reason: str) -> None:
    device = await plant.device("press-1")
    await plant.ask("PATCH", "/iiot/press-1", {"labels": {"line": "3"}})
    await level(device, 9)
    body = {"name": "hot", "metric": "level", "condition": {"above": 5}, "match_labels": {"line": "3"}}
    _, made = await plant.ask("POST", "/rules", body)
    await until(plant, ("press-1", "hot", "firing", 9))
    status, answer = await {
        "edit": lambda: plant.ask("PUT", f"/rules/{made['id']}", {**body, "condition": {"above": 20}}),
        "disable": lambda: plant.ask("PUT", f"/rules/{made['id']}", {**body, "disabled": True}),
        "delete": lambda: plant.ask("DELETE", f"/rules/{made['id']}"),
        "labels": lambda: plant.ask("PATCH", "/iiot/press-1", {"labels": {"line": "4"}}),
        "disable device": lambda: plant.ask("PATCH", "/iiot/press-1", {"disabled": True}),
        "remove device": lambda: plant.ask("DELETE", "/iiot/press-1"),
    }[change]()
    assert status < 300, answer
    (alert,) = await until(plant, ("press-1", "hot", "resolved", 9))
    assert alert["reason"] == reason
    if change == "remove device":
        return
    events = (await plant.get("/iiot/press-1/events?kind=alert"))["items"]
    assert [(one["status"], one.get("reason")) for one in events] == [("resolved", reason), ("firing", None)]
    await device.close()


async def test_what_was_planned_for_the_last_rule_holds_up_nobody_once_it_is_gone(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with plants.client() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        number = await rule(plant, {"absent": "1s"})
        await level(device, 1)
        assert (await plant.ask("DELETE", f"/rules/{number}"))[0] == 204
        await asyncio.sleep(1.5)  # until what was planned is due: nothing tells of it
        await level(device, 2)
        assert await alerts(plant) == []


async def test_a_rule_that_is_put_again_as_it_is_leaves_its_alerts(plant: Plant) -> None:
    device = await plant.device("press-1")
    body = {"name": "hot", "metric": "level", "condition": {"above": 5}}
    _, made = await plant.ask("POST", "/rules", body)
    await level(device, 9)
    before = await until(plant, ("press-1", "hot", "firing", 9))
    assert (await plant.ask("PUT", f"/rules/{made['id']}", body))[0] == 200
    assert await alerts(plant) == before


async def test_alerts_are_acknowledged_until_a_time_and_that_is_taken_back(plant: Plant) -> None:
    device = await plant.device("press-1")
    await rule(plant, {"above": 5})
    await level(device, 9)
    (alert,) = await until(plant, ("press-1", "hot", "firing", 9))
    path, later = f"/alerts/{alert['id']}", iiot.format_time(iiot.now_ms() + 3_600_000)
    status, answer = await plant.ask("POST", f"{path}/ack", {"text": "on my way", "until": later})
    assert status == 200
    said = {name: answer["acknowledged"][name] for name in ("by", "text", "until")}
    assert said == {"by": "test admin", "text": "on my way", "until": later}
    assert await plant.get(path) == answer
    assert len(await alerts(plant, "?acknowledged=true")) == 1
    assert await alerts(plant, "?acknowledged=false") == []
    status, answer = await plant.ask("DELETE", f"{path}/ack")
    assert (status, answer["acknowledged"]) == (200, None)
    told = [(event["status"], event["by"]) for event in (await plant.get("/iiot/press-1/events?kind=alert"))["items"][:2]]
    assert told == [("not acknowledged", "test admin"), ("acknowledged", "test admin")]
    await level(device, 1)
    await until(plant, ("press-1", "hot", "resolved", 9))
    assert (await plant.ask("POST", f"{path}/ack", {}))[1]["error"]["code"] == "alert_resolved"


async def test_a_silence_shows_what_it_holds_back(plant: Plant) -> None:
    device = await plant.device("press-1")
    await plant.ask("PATCH", "/iiot/press-1", {"labels": {"line": "3"}})
    await rule(plant, {"above": 5}, labels={"team": "night"})
    await level(device, 9)
    (alert,) = await until(plant, ("press-1", "hot", "firing", 9))
    later = iiot.format_time(iiot.now_ms() + 3_600_000)
    for more, is_covered in (
        ({"match": "pump-*"}, False), ({"labels": {"line": "4"}}, False), ({"rule": "cold"}, False),
        ({"match": "press-*", "labels": {"line": "3", "team": "night"}, "rule": "hot"}, True),
    ):  # fmt: skip
        status, made = await plant.ask("POST", "/silences", {"until": later, "text": "maintenance", **more})
        assert status == 201
        (listed,) = (await plant.get("/silences"))["items"]
        expected = [{"id": alert["id"], "rule": "hot", "device": "press-1"}] if is_covered else []
        assert (listed["alerts"], listed["in_force"], listed["by"]) == (expected, True, "test admin")
        assert (await alerts(plant))[0]["silenced"] == (made["id"] if is_covered else None)
        assert len(await alerts(plant, "?silenced=true")) == is_covered
        assert (await plant.ask("DELETE", f"/silences/{made['id']}"))[0] == 204


async def test_after_a_restart_everything_stands_as_it_stood(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5})
        await rule(plant, {"above": 5}, "later", **{"for": "1h"})
        await level(device, 9, ago=1)
        before = await until(plant, ("press-1", "later", "pending", 9), ("press-1", "hot", "firing", 9))
        await device.close()
        token = plant.token
    async with plants.plant(tmp_path, QUICK) as plant:
        plant.token = token
        assert await alerts(plant) == [{**one, "stale": True} for one in before]
        status, made = await plant.ask("POST", "/iiot/press-1/token")
        assert status == 201, made
        plant.tokens["press-1"] = made["token"]
        device = await plant.device("press-1")
        await level(device, 9)
        await level(device, 1)
        (alert,) = await until(plant, ("press-1", "hot", "resolved", 9))
        assert alert["id"] == before[1]["id"]


async def test_after_a_standstill_silence_is_measured_anew(tmp_path: Path) -> None:
    """Nobody could have been heard while the server did not run."""
    async with plants.plant(tmp_path, QUICK) as plant:
        await level(await plant.device("press-1"), 1, ago=3_600)
        await rule(plant, {"absent": "1h"}, "silent")
        await rule(plant, {"offline": "1h"}, "gone")
        token = plant.token
    async with plants.plant(tmp_path, QUICK) as plant:
        plant.token = token
        await asyncio.sleep(0.5)
        assert await alerts(plant) == []


async def test_after_a_standstill_no_silence_is_said_to_have_begun_in_it(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        await level(await plant.device("press-1"), 1)
        await rule(plant, {"absent": "1s"}, "silent")
        await rule(plant, {"offline": "1s"}, "gone")
        token = plant.token
    await asyncio.sleep(0.5)  # the standstill
    began = iiot.now_ms()
    async with plants.plant(tmp_path, QUICK) as plant:
        plant.token = token
        found = await plant.until("/alerts?status=firing", lambda answer: len(answer["items"]) == 2)
        assert all(moment(alert["since"]) >= began + 1 * SECOND for alert in found["items"])


async def test_what_comes_later_from_before_a_silence_was_noticed_does_not_make_it_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        device, began = await plant.device("press-1"), iiot.now_ms()
        await rule(plant, {"absent": "1s"}, "silent")
        await device.store({"ts": began, "values": {"level": 1}})
        (alert,) = await until(plant, ("press-1", "silent", "firing", None))
        came = iiot.now_ms()
        await device.store({"ts": began + SECOND // 2, "values": {"level": 1}}, {"ts": came, "values": {"level": 1}})
        (alert,) = await until(plant, ("press-1", "silent", "resolved", None))
        assert (moment(alert["since"]), moment(alert["resolved_at"])) == (began + SECOND, came)


async def test_a_new_rule_finds_a_device_that_has_been_gone_for_its_time(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK, webhook_networks="127.0.0.0/8") as plant, receiver() as hook:
        await told_to(plant, hook.url)
        await (await plant.device("press-1")).close()
        await plant.until("/iiot/press-1", lambda device: device["disconnected_at"])
        await asyncio.sleep(2.1)  # it is gone
        number = await rule(plant, {"offline": "2s"}, "gone")
        assert (await hook.next()).devices == {"press-1": "firing"}
        (alert,), (told,) = await alerts(plant), (await plant.get("/notifications"))["items"]
        gone_at, made_at = (await plant.get("/iiot/press-1"))["disconnected_at"], (await plant.get(f"/rules/{number}"))["changed_at"]
        assert moment(alert["since"]) == moment(gone_at) + 2 * SECOND
        assert moment(told["at"]) < moment(made_at) + 2 * SECOND


async def test_rules_have_names_of_their_own_and_a_number(plant: Plant) -> None:
    number = await rule(plant, {"above": 5}, text="{device}: {metric} is {value}, {nothing}")
    listed = await plant.get("/rules")
    assert [(one["id"], one["name"], one["by"]) for one in listed["items"]] == [(number, "hot", "test admin")]
    assert await plant.get(f"/rules/{number}") == listed["items"][0]
    status, answer = await plant.ask("POST", "/rules", {"name": "hot", "metric": "level", "condition": {"above": 5}})
    assert (status, answer["error"]["code"]) == (409, "rule_exists")
    await level(await plant.device("press-1"), 9)
    (alert,) = await until(plant, ("press-1", "hot", "firing", 9))
    assert alert["text"] == "press-1: level is 9, {nothing}"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"metric": "level", "condition": {"above": 5}}, "name"), ({"name": "x", "condition": {"above": 5}}, "metric"),
        ({"name": "x", "metric": "level", "condition": {"offline": "5m"}}, "metric"),
        ({"name": "x", "condition": {"log": {"count": 0, "window": "1m"}}}, "condition.log.count"),
        ({"name": "x", "condition": {"log": {"count": 1}}}, "condition.log.window"),
        ({"name": "x", "condition": {"log": {"count": 1, "window": "1m", "q": '"'}}}, "condition.log.q"),
        ({"name": "x", "condition": {"log": {"count": 1, "window": "1m", "level": "bad"}}}, "condition.log.level"),
        ({"name": "x", "condition": {"log": {"count": 1, "window": "1m", "lines": 1}}}, "condition.log.lines"),
        ({"name": "x", "metric": "level", "condition": {"above": 5}, "severity": "bad"}, "severity"),
        ({"name": "x", "metric": "level", "condition": {"above": 5}, "labels": {"a": None}}, "labels.a"),
        ({"name": "x", "metric": "level", "condition": {"above": 5}, "match_labels": {"a": 1}}, "match_labels.a"),
    ],
)  # fmt: skip
async def test_a_rule_that_cannot_be_kept_is_refused_by_its_field(plant: Plant, body: Any, path: str) -> None:
    status, answer = await plant.ask("POST", "/rules", body)
    assert (status, answer["error"]["code"]) == (422, "invalid")
    assert answer["error"]["details"][0]["path"].startswith(path)


async def test_a_thousand_rules_look_at_one_metric(plant: Plant) -> None:
    device = await plant.device("press-1")
    for number in range(1_000):
        await rule(plant, {"above": number}, f"rule {number}")
    await level(device, 499.5)
    found = await plant.until("/alerts?status=firing&limit=1000", lambda answer: len(answer["items"]) >= 500)
    assert {one["rule"] for one in found["items"]} == {f"rule {number}" for number in range(500)}
    await level(device, 0)
    await plant.until("/alerts?status=firing", lambda answer: not answer["items"])


async def test_a_rule_that_nothing_matches_waits_for_what_will(plant: Plant) -> None:
    await rule(plant, {"above": 5}, match="pump-*")
    await level(await plant.device("press-1"), 9)
    assert await alerts(plant) == []
    await level(await plant.device("pump-1"), 9)
    await until(plant, ("pump-1", "hot", "firing", 9))


async def test_a_text_is_neither_above_nor_below_and_ends_nothing(plant: Plant) -> None:
    device = await plant.device("press-1")
    await rule(plant, {"above": 5})
    await rule(plant, {"below": 5}, "cold")
    await level(device, "broken", ago=5)
    assert await alerts(plant) == []
    await level(device, 9, "broken", ago=3)
    await until(plant, ("press-1", "hot", "firing", 9))
    await level(device, True)
    await until(plant, ("press-1", "cold", "firing", 1), ("press-1", "hot", "resolved", 9))


async def test_a_metric_may_have_any_printable_name(plant: Plant) -> None:
    device, name = await plant.device("press-1"), "a\"b' {value} <&>é"
    await rule(plant, {"above": 5}, metric=name)
    await level(device, 9, metric=name)
    (alert,) = await until(plant, ("press-1", "hot", "firing", 9))
    assert (alert["metric"], alert["text"]) == (name, f"{name} of press-1: 9")
    status, answer = await plant.ask("POST", "/rules", {"name": "other", "metric": 'a"b\n', "condition": {"above": 5}})
    assert (status, answer["error"]["details"][0]["path"]) == (422, "metric")


async def test_what_is_stale_is_told_as_it_is_listed(tmp_path: Path) -> None:
    """Of its device being offline an alert knows all there is to know."""
    async with plants.plant(tmp_path, QUICK, webhook_networks="127.0.0.0/8") as plant, receiver() as hook:
        device = await plant.device("press-1")
        await rule(plant, {"above": 5}, severity="info")
        await level(device, 9)
        await until(plant, ("press-1", "hot", "firing", 9))
        await device.close()
        await plant.until("/alerts", lambda answer: answer["items"][0]["stale"])
        await told_to(plant, hook.url, rule="hot")
        await rule(plant, {"offline": "10ms"}, "gone")
        await told_to(plant, hook.url, rule="gone")
        told = {}
        for _ in range(2):
            (alert,) = (await hook.next()).json["alerts"]
            told[alert["labels"]["alertname"]] = alert["annotations"].get("stale")
        assert told == {"hot": "true", "gone": None}
