"""Configuration: pushed, sent, answered, and shown as it is."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import Device, Plant, Process

import iiot


async def push(plant: Plant, name: str, document: Any, query: str = "", if_match: str | None = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {plant.token}", **({"If-Match": if_match} if if_match else {})}
    async with plant.client.post(f"{plant.url}/iiot/{name}{query}", data=json.dumps(document), headers=headers) as response:
        return response.status, await response.json()


async def verdict(device: Device, version: int, status: str, **more: Any) -> int:
    device.seq += 1
    await device.send("config_status", seq=device.seq, version=version, status=status, **more)
    return device.seq


async def answer(device: Device, version: int, status: str, **more: Any) -> None:
    await device.acknowledged(await verdict(device, version, status, **more))


async def config(plant: Plant, name: str) -> dict[str, Any]:
    body: dict[str, Any] = await plant.get(f"/iiot/{name}/config")
    return body


async def until_status(plant: Plant, name: str, status: str) -> dict[str, Any]:
    body: dict[str, Any] = await plant.until(f"/iiot/{name}/config", lambda body: body["status"] == status)
    return body


async def statuses(plant: Plant, name: str) -> list[str]:
    """Of every version, the newest first."""
    return [item["status"] for item in (await plant.get(f"/iiot/{name}/config/history"))["items"]]


async def test_a_push_to_a_live_device_is_sent_applied_and_shown(plant: Plant) -> None:
    device = await plant.device("press-1")
    assert device.welcome["config"] is None
    document = {"speed": 1.5, "deep": {"a": [1, None]}}
    assert await push(plant, "press-1", document) == (202, {"device": "press-1", "version": 1, "status": "sent"})
    assert await device.receive() == {"type": "config", "version": 1, "document": document}
    await until_status(plant, "press-1", "sent")
    await answer(device, 1, "in_progress")
    assert (await config(plant, "press-1"))["status"] == "in_progress"
    await answer(device, 1, "applied", message="done")
    shown = await config(plant, "press-1")
    assert (shown["version"], shown["applied"], shown["status"], shown["drift"]) == (1, 1, "applied", False)
    assert (shown["message"], shown["by"], shown["document"]) == ("done", "test admin", {"speed": 1.5, "deep": {"a": [1, None]}})
    (item,) = (await plant.get("/iiot"))["items"]
    assert item["config"] == {"version": 1, "applied": 1, "status": "applied", "drift": False}
    kinds = [(event["kind"], event.get("status")) for event in (await plant.get("/iiot/press-1/events?kind=config"))["items"]]
    assert kinds == [("config", "applied"), ("config", "in_progress"), ("config", "pending")]


async def test_a_device_without_configuration_has_version_0(plant: Plant) -> None:
    await plant.register("press-1")
    shown = await config(plant, "press-1")
    assert (shown["version"], shown["status"], shown["document"], shown["drift"]) == (0, None, None, False)
    assert (await plant.get("/iiot"))["items"][0]["config"] is None
    assert (await plant.get("/iiot/press-1/config/history"))["items"] == []
    assert (await plant.ask("GET", "/iiot/nobody/config"))[0] == 404
    assert (await plant.ask("GET", "/iiot/nobody/config/history"))[0] == 404
    assert (await push(plant, "nobody", {}))[0] == 404


async def test_of_several_pushes_while_offline_the_newest_alone_is_delivered(plant: Plant) -> None:
    await plant.register("press-1")
    for number in range(3):
        assert (await push(plant, "press-1", {"n": number}))[1]["status"] == "pending"
    assert await statuses(plant, "press-1") == ["pending", "superseded", "superseded"]
    device = await plant.device("press-1")
    assert device.welcome["config"] == {"version": 3, "document": {"n": 2}}
    await answer(device, 3, "applied")
    assert await statuses(plant, "press-1") == ["applied", "superseded", "superseded"]
    assert (await plant.device("press-1")).welcome["config"] is None


async def test_a_device_that_vanishes_before_its_verdict_is_sent_the_configuration_again(plant: Plant) -> None:
    device = await plant.device("press-1")
    await push(plant, "press-1", {"n": 1})
    await device.expect("config")
    await device.close()
    again = await plant.device("press-1")
    assert again.welcome["config"] == {"version": 1, "document": {"n": 1}}
    await answer(again, 1, "rejected", message="too fast", errors=[{"path": "n", "code": "range", "message": "is above 0"}])
    shown = await config(plant, "press-1")
    assert (shown["status"], shown["applied"], shown["message"]) == ("rejected", None, "too fast")
    assert shown["errors"] == [{"path": "n", "code": "range", "message": "is above 0"}]


async def test_a_late_verdict_stands_in_the_history_of_its_own_version(plant: Plant) -> None:
    device = await plant.device("press-1")
    await push(plant, "press-1", {"n": 1})
    await device.expect("config")
    await push(plant, "press-1", {"n": 2})
    await device.expect("config")
    await answer(device, 1, "in_progress")
    await until_status(plant, "press-1", "sent")
    assert await statuses(plant, "press-1") == ["sent", "superseded"]
    await answer(device, 1, "applied")
    assert await statuses(plant, "press-1") == ["sent", "applied"]
    shown = await config(plant, "press-1")
    assert (shown["version"], shown["status"], shown["applied"], shown["drift"]) == (2, "sent", 1, True)
    await answer(device, 2, "applied")
    assert (await config(plant, "press-1"))["drift"] is False


async def test_a_configuration_that_crashes_its_device_times_out_all_the_same(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), clock_seconds=0.01)) as plant:
        device = await plant.device("press-1")
        assert (await plant.ask("POST", "/iiot/press-1?timeout=400ms", {"n": 1}))[0] == 202
        await device.expect("config")
        async with asyncio.timeout(plants.PATIENCE):
            while (await config(plant, "press-1"))["status"] != "timed_out":
                await device.close()
                device = await plant.device("press-1")
                assert device.welcome["config"]["version"] == 1, "it is sent again"
        await device.close()
        await plant.device("press-1")
        assert (await config(plant, "press-1"))["status"] == "timed_out"


@pytest.mark.parametrize("late", ["applied", "rejected"])
async def test_without_a_verdict_in_time_it_is_timed_out_and_a_later_verdict_counts(tmp_path: Path, late: str) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), clock_seconds=0.02)) as plant:
        device = await plant.device("press-1")
        status, body = await push(plant, "press-1", {"n": 1}, "?timeout=100ms&wait=20")
        assert (status, body["status"]) == (202, "timed_out")
        await answer(device, 1, "in_progress")
        assert (await config(plant, "press-1"))["status"] == "timed_out"
        await answer(device, 1, late)
        assert (await config(plant, "press-1"))["status"] == late
        kinds = [event["status"] for event in (await plant.get("/iiot/press-1/events?kind=config"))["items"]]
        assert kinds == [late, "in_progress", "timed_out", "pending"]


async def test_a_push_to_an_offline_device_does_not_time_out(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), clock_seconds=0.01)) as plant:
        await plant.register("press-1")
        await plant.device("press-2")
        await push(plant, "press-1", {"n": 1}, "?timeout=1ms")
        await push(plant, "press-2", {"n": 1}, "?timeout=1ms")
        await until_status(plant, "press-2", "timed_out")
        assert (await config(plant, "press-1"))["status"] == "pending"


async def test_waiting_returns_with_the_verdict(plant: Plant) -> None:
    device = await plant.device("press-1")
    waiting = asyncio.create_task(push(plant, "press-1", {"n": 1}, "?wait=20"))
    await device.expect("config")
    await answer(device, 1, "in_progress")
    assert not waiting.done()
    await answer(device, 1, "rejected", message="no", errors=[{"path": "n", "code": "x", "message": "y"}])
    assert await waiting == (
        202,
        {"device": "press-1", "version": 1, "status": "rejected", "message": "no", "errors": [{"path": "n", "code": "x", "message": "y"}]},
    )


async def test_of_two_pushes_on_the_same_version_one_is_refused(plant: Plant) -> None:
    await plant.register("press-1")
    answers = await asyncio.gather(*(push(plant, "press-1", {"n": n}, if_match='"0"') for n in range(2)))
    assert sorted(status for status, _ in answers) == [202, 412]
    assert {body["error"]["code"] for status, body in answers if status == 412} == {"precondition_failed"}
    assert (await push(plant, "press-1", {"n": 3}, if_match="1"))[1]["version"] == 2
    assert (await push(plant, "press-1", {"n": 4}, if_match="1"))[0] == 412
    assert (await push(plant, "press-1", {"n": 4}, if_match="*"))[1]["version"] == 3
    assert (await push(plant, "press-1", {"n": 4}, if_match="x"))[0] == 422
    assert len(await statuses(plant, "press-1")) == 3


async def test_a_rollback_is_a_new_version(plant: Plant) -> None:
    device = await plant.device("press-1")
    for n in (1, 2):
        await push(plant, "press-1", {"n": n})
        await device.expect("config")
    status, body = await plant.ask("POST", "/iiot/press-1/config/rollback", {"version": 1})
    assert (status, body) == (202, {"device": "press-1", "version": 3, "status": "sent"})
    assert await device.receive() == {"type": "config", "version": 3, "document": {"n": 1}}
    documents = [item["document"] for item in (await plant.get("/iiot/press-1/config/history"))["items"]]
    assert documents == [{"n": 1}, {"n": 2}, {"n": 1}]
    assert (await plant.ask("POST", "/iiot/press-1/config/rollback", {"version": 9}))[0] == 404
    assert (await plant.ask("POST", "/iiot/nobody/config/rollback", {"version": 1}))[0] == 404


async def test_one_push_reaches_every_matching_device(plant: Plant) -> None:
    live = [await plant.device(f"press-{n}") for n in range(3)]
    await plant.register("press-9")
    await plant.register("lathe-1")
    status, body = await plant.ask("POST", "/iiot", {"match": "press-*", "config": {"speed": 2}})
    assert status == 202
    assert [(row["device"], row["version"], row["status"]) for row in body["items"]] == [
        ("press-0", 1, "sent"), ("press-1", 1, "sent"), ("press-2", 1, "sent"), ("press-9", 1, "pending"),
    ]  # fmt: skip
    for device in live:
        assert await device.receive() == {"type": "config", "version": 1, "document": {"speed": 2}}
    assert (await config(plant, "lathe-1"))["version"] == 0
    assert (await plant.ask("POST", "/iiot", {"match": "none-*", "config": {}}))[1] == {"items": []}


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth > 1 else {}


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "not_json"), (b"{", 400, "not_json"), (b"[1]", 400, "not_an_object"), (b"7", 400, "not_an_object"),
        (json.dumps(nested(11)).encode(), 422, "too_deep"), (b'{"a":"' + b"x" * 65_536 + b'"}', 413, "too_large"),
        (b'{"a":' * 5000, 422, "too_deep"), (b'{"a":18446744073709551616}', 422, "invalid"), (b'{"a":NaN}', 400, "not_json"),
        (b'{"a":"\\u0000"}', 422, "invalid"), (b"x" * 300_000, 413, "too_large"),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
async def test_a_document_that_cannot_be_is_refused_and_changes_nothing(plant: Plant, data: bytes, status: int, code: str) -> None:
    await plant.register("press-1")
    answered, body = await plant.ask("POST", "/iiot/press-1", data=data)
    assert (answered, body["error"]["code"]) == (status, code)
    assert (await config(plant, "press-1"))["version"] == 0


async def test_the_largest_and_deepest_document_is_taken_as_it_is(plant: Plant) -> None:
    device = await plant.device("press-1")
    document = {**nested(10), "b": "x" * 60_000}
    assert (await push(plant, "press-1", document))[0] == 202
    assert (await device.expect("config"))["document"] == document


@pytest.mark.parametrize("query", ["?timeout=2d", "?wait=1h", "?wait=x", "?colour=red"])
async def test_a_push_with_a_bad_parameter_changes_nothing(plant: Plant, query: str) -> None:
    await plant.register("press-1")
    assert (await push(plant, "press-1", {"n": 1}, query))[0] == 400
    assert (await config(plant, "press-1"))["version"] == 0


async def test_a_verdict_on_what_was_never_sent_is_refused_and_consumed(plant: Plant) -> None:
    await plant.register("press-1")
    await push(plant, "press-1", {"n": 1})
    await push(plant, "press-1", {"n": 2})
    device = await plant.device("press-1")
    for version in (1, 3, 2**62):
        seq = await verdict(device, version, "applied")
        error = await device.expect("error")
        assert (error["code"], error["seq"]) == ("unknown_version", seq)
        await device.acknowledged(seq)
    shown = await config(plant, "press-1")
    assert (shown["version"], shown["applied"]) == (2, None)
    assert await statuses(plant, "press-1") == [shown["status"], "superseded"]
    await answer(device, 2, "applied")
    assert (await config(plant, "press-1"))["status"] == "applied"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"version": 0, "status": "applied"}, "version"), ({"version": 1, "status": "done"}, "status"), ({"version": 1}, "status"),
        ({"version": 1, "status": "applied", "message": 7}, "message"),
        ({"version": 1, "status": "rejected", "errors": [{"path": "a", "code": 1, "message": ""}]}, "errors[0].code"),
    ],
)  # fmt: skip
async def test_a_bad_verdict_is_named_and_the_session_goes_on(plant: Plant, fields: dict[str, Any], path: str) -> None:
    device = await plant.device("press-1")
    await device.send("config_status", seq=1, **fields)
    error = await device.expect("error")
    assert (error["code"], [wrong["path"] for wrong in error["errors"]]) == ("invalid", [path])
    device.seq = 1
    await device.store({"values": {"n": 1}})


async def test_verdicts_in_one_commit_count_in_their_order(plant: Plant) -> None:
    devices = [await plant.device(f"press-{n}") for n in range(4)]
    await plant.ask("POST", "/iiot", {"match": "press-*", "config": {"n": 1}})
    for device in devices:
        await device.expect("config")
    for device in devices:
        for status in ("in_progress", "rejected", "in_progress", "applied", "rejected", "applied"):
            await verdict(device, 1, status)
    for device in devices:
        await device.acknowledged(6)
    for n in range(4):
        shown = await config(plant, f"press-{n}")
        assert (shown["status"], shown["applied"]) == ("applied", 1)
        seen = [event["status"] for event in (await plant.get(f"/iiot/press-{n}/events?kind=config"))["items"]]
        assert seen == ["applied", "rejected", "applied", "in_progress", "rejected", "in_progress", "pending"]


async def test_roles_of_configuration(plant: Plant) -> None:
    await plant.register("press-1")
    viewer = plants.admin_token(plant.database, "viewer")
    for path in ("/iiot/press-1", "/iiot", "/iiot/press-1/config/rollback"):
        assert (await plant.ask("POST", path, {}, token=viewer))[0] == 403
    for path in ("/iiot/press-1/config", "/iiot/press-1/config/history"):
        assert (await plant.ask("GET", path, token=viewer))[0] == 200


async def test_what_is_owed_and_what_was_answered_survive_kill(process: Process) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        answered, silent = await plant.device("answered"), await plant.device("silent")
        await plant.register("offline")
        await plant.ask("POST", "/iiot", {"match": "*", "config": {"n": 1}})
        await answered.expect("config")
        await silent.expect("config")
        await until_status(plant, "silent", "sent")
        await answer(answered, 1, "applied")
        await process.stop(signal.SIGKILL)
        await process.start()
        plant.url = process.url
        shown = {name: (await config(plant, name))["status"] for name in ("answered", "silent", "offline")}
        assert shown == {"answered": "applied", "silent": "sent", "offline": "pending"}
        owed = {name: (await plant.device(name)).welcome["config"] for name in shown}
        assert owed == {"answered": None, "silent": {"version": 1, "document": {"n": 1}}, "offline": {"version": 1, "document": {"n": 1}}}


async def test_a_timeout_goes_on_across_a_restart(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), clock_seconds=0.02)
    async with plants.plant(tmp_path, limits) as plant:
        await plant.device("press-1")
        await push(plant, "press-1", {"n": 1}, "?timeout=300ms")
        await until_status(plant, "press-1", "sent")
    async with plants.plant(tmp_path, limits) as plant:
        await until_status(plant, "press-1", "timed_out")
