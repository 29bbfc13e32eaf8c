"""What a request asks for is done or refused, never ignored: conditions, time-outs, and waiting for a verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import plant as plants
import pytest
from aiohttp import ClientSession
from plant import Device, Plant, Process

import iiot


async def ask(plant: Plant, method: str, path: str, body: Any = None, **conditions: str) -> tuple[int, Any, Mapping[str, str]]:
    """Status, JSON (None without a body) and headers; conditions as If_Match and If_None_Match."""
    headers = {"Authorization": f"Bearer {plant.token}", **{name.replace("_", "-"): value for name, value in conditions.items()}}
    async with asyncio.timeout(plants.PATIENCE), plant.client.request(method, plant.url + path, json=body, headers=headers) as response:
        text = await response.read()
        return response.status, await response.json() if text else None, response.headers


def code(answer: tuple[int, Any, Mapping[str, str]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


# ---- the rule (RFC 9110, sections 13.1.1 and 13.1.2)


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ('"1"', {'"1"'}), ("1", {'"1"'}), ('"1", "2"', {'"1"', '"2"'}), ('W/"1"', {'W/"1"'}), (" * ", {"*"}), ('"a b"', None),
        ("", None), ("x", None), ('"1', None), ('"1" "2"', None), ('*, "1"', None), ("-1", None), ("1.5", None), ('w/"1"', None),
    ],
)  # fmt: skip
def test_entity_tags(text: str, tags: set[str] | None) -> None:
    if tags is None:
        with pytest.raises(iiot.Invalid):
            iiot.entity_tags(text)
    else:
        assert iiot.entity_tags(text) == tags


@pytest.mark.parametrize(
    ("match", "none_match", "tag", "exists", "met"),
    [
        (None, None, '"1"', True, True),
        ('"1"', None, '"1"', True, True), ('"2"', None, '"1"', True, False), ('"2", "1"', None, '"1"', True, True),
        ('W/"1"', None, '"1"', True, False), ("*", None, '"1"', True, True), ("*", None, '"0"', False, False),
        (None, '"1"', '"1"', True, False), (None, '"2"', '"1"', True, True), (None, 'W/"1"', '"1"', True, False),
        (None, "*", '"1"', True, False), (None, "*", '"0"', False, True), ('"1"', '"1"', '"1"', True, False),
        ('"1"', None, None, True, False),
    ],
)  # fmt: skip
def test_conditions(match: str | None, none_match: str | None, tag: str | None, exists: bool, met: bool) -> None:  # noqa: FBT001 - a table
    tags = [None if text is None else iiot.entity_tags(text) for text in (match, none_match)]
    assert iiot.is_met(tags[0], tags[1], tag, exists=exists) is met


# ---- configuration


async def test_a_push_and_a_rollback_look_at_their_conditions(plant: Plant) -> None:
    await plant.register("press-1")
    path, back = "/iiot/press-1", "/iiot/press-1/config/rollback"
    assert code(await ask(plant, "POST", path, {"n": 1}, If_Match="*")) == (412, "precondition_failed"), "there is none yet"
    assert (await ask(plant, "POST", path, {"n": 1}, If_None_Match="*"))[1]["version"] == 1
    assert code(await ask(plant, "POST", path, {"n": 2}, If_None_Match="*")) == (412, "precondition_failed")
    assert code(await ask(plant, "POST", path, {"n": 2}, If_None_Match='"1"')) == (412, "precondition_failed")
    assert (await ask(plant, "POST", path, {"n": 2}, If_None_Match='"7"'))[1]["version"] == 2
    assert (await ask(plant, "POST", path, {"n": 3}, If_Match='"1", "2"'))[1]["version"] == 3
    assert code(await ask(plant, "POST", path, {"n": 4}, If_Match='W/"3"')) == (412, "precondition_failed")
    assert code(await ask(plant, "POST", back, {"version": 1}, If_Match='"2"')) == (412, "precondition_failed")
    assert code(await ask(plant, "POST", back, {"version": 1}, If_Match="x")) == (422, "invalid")
    assert (await ask(plant, "POST", back, {"version": 1}, If_Match='"3"'))[1]["version"] == 4
    assert (await plant.get("/iiot/press-1/config"))["document"] == {"n": 1}


async def test_a_configuration_that_the_client_has_is_answered_304(plant: Plant) -> None:
    await plant.register("press-1")
    path = "/iiot/press-1/config"
    assert (await ask(plant, "GET", path, If_None_Match="*"))[0] == 200, "version 0 is none"
    assert (await ask(plant, "GET", path, If_None_Match='"0"'))[0] == 304
    await ask(plant, "POST", "/iiot/press-1", {"n": 1})
    status, body, headers = await ask(plant, "GET", path, If_None_Match='"0"')
    tag = headers["ETag"]
    assert (status, body["version"]) == (200, 1)
    for shown in (tag, f"W/{tag}", f'"7", {tag}', "*"):
        status, body, headers = await ask(plant, "GET", path, If_None_Match=shown)
        assert (status, body, headers["ETag"]) == (304, None, tag)
        assert "X-Content-Type-Options" in headers
    for shown in ('"1"', "1", tag):
        assert (await ask(plant, "GET", path, If_Match=shown))[0] == 200
    device = await plant.device("press-1")
    await device.send("config_status", seq=1, version=1, status="applied")
    await device.acknowledged(1)
    status, body, headers = await ask(plant, "GET", path, If_None_Match=tag)
    assert (status, body["status"]) == (200, "applied"), "the answer has changed, though not the version"
    assert headers["ETag"] != tag
    assert (await ask(plant, "POST", "/iiot/press-1", {"n": 2}, If_Match=tag))[1]["version"] == 2, "a change depends on the version"
    assert code(await ask(plant, "GET", path, If_Match='"7"')) == (412, "precondition_failed")


async def test_a_registration_may_ask_that_there_is_no_such_device(plant: Plant) -> None:
    assert (await ask(plant, "PUT", "/iiot/press-1", If_None_Match="*"))[0] == 201
    assert code(await ask(plant, "PUT", "/iiot/press-1", If_None_Match="*")) == (412, "precondition_failed")
    assert code(await ask(plant, "PUT", "/iiot/press-1")) == (409, "device_exists")
    for shown in ("*", '"7"'):
        assert code(await ask(plant, "PUT", "/iiot/press-2", If_Match=shown)) == (412, "precondition_failed"), "it is not there"


UNCONDITIONAL = [route for route in iiot.ROUTES if not route.conditional]


@pytest.mark.parametrize("route", UNCONDITIONAL, ids=lambda route: f"{route.method} {route.path}")
async def test_a_condition_that_does_not_apply_is_refused(plant: Plant, route: iiot.Route) -> None:
    await plant.register("press-1")
    platform = plants.admin_token(plant.database, "platform")
    token = platform if route.role == "platform" else plant.token
    path = route.path.format(device="press-1", id="0123456789abcdef", tenant="acme", port="22")
    for name in ("If-Match", "If-None-Match"):
        headers = {"Authorization": f"Bearer {token}", name: "*"}
        async with plant.client.request(route.method, plant.url + path, headers=headers) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"], error["details"][0]["path"]) == (422, "invalid", name)


async def test_what_has_no_tag_is_shown_to_whoever_has_another(plant: Plant) -> None:
    assert (await ask(plant, "GET", "/iiot", If_None_Match='"abc"'))[0] == 200


# ---- halves of an answer


async def answer_config(device: Device, status: str) -> None:
    version = (await device.expect("config"))["version"]
    device.seq += 1
    await device.send("config_status", seq=device.seq, version=version, status=status)


async def test_a_push_to_many_waits_for_every_verdict(plant: Plant) -> None:
    devices = [await plant.device(f"press-{n}") for n in range(3)]
    pushing = asyncio.create_task(plant.ask("POST", "/iiot?wait=20s", {"match": "press-*", "config": {"n": 1}}))
    await answer_config(devices[0], "applied")
    await answer_config(devices[1], "rejected")
    await plant.until("/iiot/press-1/config", lambda config: config["status"] == "rejected")
    assert not pushing.done()
    await answer_config(devices[2], "applied")
    status, body = await pushing
    assert (status, [(item["device"], item["version"], item["status"]) for item in body["items"]]) == (
        202, [("press-0", 1, "applied"), ("press-1", 1, "rejected"), ("press-2", 1, "applied")],
    )  # fmt: skip


async def test_a_push_to_many_answers_what_is_known_when_its_time_is_over(plant: Plant) -> None:
    device = await plant.device("press-1")
    await plant.register("press-2")
    status, body = await plant.ask("POST", "/iiot?wait=50ms", {"match": "press-*", "config": {"n": 1}})
    assert (status, [item["status"] for item in body["items"]]) == (202, ["sent", "pending"])
    await device.close()


async def test_a_device_that_rejected_its_first_configuration_drifts(plant: Plant) -> None:
    device = await plant.device("press-1")
    assert (await plant.get("/iiot/press-1/config"))["drift"] is False
    pushing = asyncio.create_task(plant.ask("POST", "/iiot/press-1?wait=20s", {"n": 1}))
    await answer_config(device, "rejected")
    assert (await pushing)[1]["status"] == "rejected"
    config = await plant.get("/iiot/press-1/config")
    assert (config["applied"], config["drift"]) == (None, True)
    assert (await plant.get("/iiot"))["items"][0]["config"]["drift"] is True


async def test_a_rollback_names_the_version_that_never_was(plant: Plant) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("POST", "/iiot/press-1/config/rollback", {"version": 9})
    assert (status, body["error"]["code"]) == (404, "unknown_version")
    assert body["error"]["details"] == [{"path": "version", "message": "9 was never pushed to press-1"}]


async def test_a_state_is_asked_by_time_or_by_version(plant: Plant) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("GET", "/iiot/press-1/state?at=-1m&version=1")
    assert (status, body["error"]["code"]) == (400, "bad_query")


async def test_a_push_that_waits_when_the_server_stops_is_answered_with_what_is_known(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        pushing = asyncio.create_task(plant.ask("POST", "/iiot/press-1?wait=60s", {"n": 1}))
        await device.expect("config")
        assert await process.stop() == 0
        assert await pushing == (202, {"device": "press-1", "version": 1, "status": "sent"})


# ---- times in an address


@pytest.mark.parametrize("written", ["2026-01-01T01:00:00+01:00", "2026-01-01T01:00:00%2B01:00", "2026-01-01+01:00:00+01:00"])
async def test_the_plus_of_a_time_zone_may_arrive_as_a_space(plant: Plant, written: str) -> None:
    device = await plant.device("press-1")
    await device.store({"ts": "2026-01-01T00:00:00Z", "values": {"level": 1}}, {"ts": "2025-12-31T23:59:59Z", "values": {"level": 0}})
    assert await plant.points("press-1", "level", f"&from={written}") == [["2026-01-01T00:00:00.000Z", 1]]


@pytest.mark.parametrize("written", ["2026-01-01 00:00:00Z 01:00", "2026-01-01 01:00", "today 01:00"])
async def test_a_space_elsewhere_is_no_plus(plant: Plant, written: str) -> None:
    await plant.register("press-1")
    assert (await plant.ask("GET", f"/iiot/press-1/telemetry?from={written}"))[0] == 400


async def test_a_removed_device_leaves_no_push_waiting(plant: Plant) -> None:
    await plant.device("press-1")
    pushing = asyncio.create_task(plant.ask("POST", "/iiot?wait=20s", {"match": "*", "config": {}}))
    await plant.until("/iiot/press-1/config", lambda config: config["version"] == 1)
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    assert await pushing == (202, {"items": []})
