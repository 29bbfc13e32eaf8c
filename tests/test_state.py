"""What a device reports of itself: merge and replace, a version for every actual change, and what is shown of it afterwards."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import plant as plants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plant import Device, Plant

import agent
import iiot

BYTES = iiot.Limits().document_bytes
DEPTH = iiot.Limits().document_depth

Step = tuple[str, dict[str, Any]]


async def send(device: Device, reported: Any, mode: str | None = "merge", **more: Any) -> int:
    """Send a state frame; its number."""
    device.seq += 1
    await device.send("state", seq=device.seq, reported=reported, **({} if mode is None else {"mode": mode}), **more)
    return device.seq


async def report(device: Device, reported: Any, mode: str | None = "merge") -> None:
    """Report, and wait until it is on disk; an error frame fails."""
    seq = await send(device, reported, mode)
    while (frame := await device.receive())["type"] != "ack" or frame["seq"] < seq:
        assert frame["type"] == "ack", frame


async def state(plant: Plant, name: str = "press-1", query: str = "") -> dict[str, Any]:
    body: dict[str, Any] = await plant.get(f"/iiot/{name}/state{query}")
    return body


async def history(plant: Plant, name: str = "press-1") -> list[dict[str, Any]]:
    """Every change, oldest first."""
    items: list[dict[str, Any]] = (await plant.get(f"/iiot/{name}/state/history?limit=1000"))["items"]
    return items[::-1]


def milliseconds(text: str) -> int:
    moment = iiot.parse_rfc3339(text)
    assert moment is not None
    return moment


def document_of(size: int, name: str = "a") -> dict[str, str]:
    """A document of exactly so many bytes."""
    return {name: "x" * (size - len(f'{{"{name}":""}}'))}


def nested(depth: int) -> dict[str, Any]:
    """A document of exactly this depth."""
    document: dict[str, Any] = {}
    for _ in range(depth - 1):
        document = {"a": document}
    return document


def text(value: object) -> str:
    """JSON by which values are told apart: in Python 1, 1.0 and True are equal."""
    return json.dumps(value, sort_keys=True)


def patched(target: Any, patch: Any) -> Any:
    """A merge patch as RFC 7396 spells it, section 2, line by line."""
    if isinstance(patch, dict):
        if not isinstance(target, dict):
            target = {}
        target = json.loads(json.dumps(target))
        for name, value in patch.items():
            if value is None:
                if name in target:
                    del target[name]
            else:
                target[name] = patched(target.get(name), value)
        return target
    return patch


# ---- merge and replace


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
async def test_a_merge_patch_does_what_appendix_a_of_rfc_7396_says(plant: Plant, target: Any, patch: Any, result: Any) -> None:
    before = text(target)
    assert text(iiot.merge_patch(target, patch)) == text(result)
    assert text(target) == before
    if isinstance(target, dict) and isinstance(patch, dict):
        device = await plant.device("press-1")
        await report(device, target, "replace")
        await report(device, patch)
        assert (await state(plant))["reported"] == result


async def test_merge_is_what_a_frame_without_a_mode_means(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": 1, "b": {"c": 2, "d": 3}}, mode=None)
    await report(device, {"b": {"c": None, "e": [4]}}, mode=None)
    assert (await state(plant))["reported"] == {"a": 1, "b": {"d": 3, "e": [4]}}


async def test_replace_puts_a_document_in_place_of_all_before(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": 1, "b": {"c": 2}})
    await report(device, {"b": {"d": 3}}, "replace")
    assert (await state(plant))["reported"] == {"b": {"d": 3}}
    assert (await plant.get("/iiot/press-1"))["reported"] == {"b": {"d": 3}}


async def test_null_is_kept_by_replace_and_removes_by_merge(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": None, "b": [None, {"c": None}]}, "replace")
    assert (await state(plant))["reported"] == {"a": None, "b": [None, {"c": None}]}
    await report(device, {"a": None, "d": [None]})
    assert (await state(plant))["reported"] == {"b": [None, {"c": None}], "d": [None]}
    *_, last = await history(plant)
    assert last["changes"] == [{"path": "/a", "from": None}, {"path": "/d", "to": [None]}]


async def test_values_come_back_as_they_were_sent(plant: Plant) -> None:
    document = {
        "integers": [2**63 - 1, -(2**63), 0, 2**53 + 1],
        "reals": [0.1, 1.0, 1e300, 5e-324, -0.0, 123456789.123456789, 1 / 3],
        "texts": ["", 'say "no"', "\\", "\n\t\x01\x7f", "ümläut ☃ 𝄞", "\u2028", "[1]", "null"],
        "others": [True, False, None, [], {}, [[]]],
        "": {" ": {"a/b": 1, "m~n": 2, "$.x": 3, '"': 4, "ключ": 5}},
    }
    device = await plant.device("press-1")
    await report(device, document, "replace")
    assert text((await state(plant))["reported"]) == text(document)
    assert text((await plant.get("/iiot/press-1"))["reported"]) == text(document)
    await report(device, {"one": 1})
    assert text((await state(plant))["reported"]) == text({**document, "one": 1})


# ---- versions


async def test_every_actual_change_is_a_version_with_its_time_and_session(plant: Plant) -> None:
    before = iiot.now_ms()
    device = await plant.device("press-1")
    await report(device, {"a": 1})
    await report(device, {"a": 2})
    await device.close()
    device = await plant.device("press-1")
    await report(device, {"b": 3})
    after = iiot.now_ms()
    items = await history(plant)
    assert [(item["version"], item["session"]) for item in items] == [(1, 1), (2, 1), (3, 2)]
    times = [milliseconds(item["at"]) for item in items]
    assert before <= times[0] <= times[1] <= times[2] <= after
    assert (await state(plant)) == {"device": "press-1", "version": 3, "at": items[2]["at"], "session": 2, "reported": {"a": 2, "b": 3}}


async def test_a_report_of_nothing_new_makes_no_version(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": {"b": 1, "c": [1, 2]}, "d": 2})
    first = await state(plant)
    await report(device, {"a": {"b": 1}})
    await report(device, {"d": 2, "a": {"c": [1, 2], "b": 1}}, "replace")
    await report(device, {})
    await report(device, {"unknown": None})
    assert await state(plant) == first
    assert len(await history(plant)) == 1
    assert len((await plant.get("/iiot/press-1/events?kind=state"))["items"]) == 1


@pytest.mark.parametrize("other", [1.0, True, "1"])
async def test_what_is_equal_in_some_languages_is_a_change(plant: Plant, other: object) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": 1})
    await report(device, {"a": other})
    (_, last) = await history(plant)
    assert text(last["changes"]) == text([{"path": "/a", "from": 1, "to": other}])
    assert text((await state(plant))["reported"]) == text({"a": other})


async def test_a_frame_sent_again_makes_no_version(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": 1})
    await report(device, {"a": 2})
    for seq in (1, 2, 1):
        await device.send("state", seq=seq, reported={"a": 1})
        assert (await device.receive()) == {"type": "ack", "seq": 2}
    assert (await state(plant))["reported"] == {"a": 2}
    assert len(await history(plant)) == 2


async def test_a_device_that_never_reported_has_no_state(plant: Plant) -> None:
    await plant.register("press-1")
    for path in ("state", "state?version=1", "state?at=2100-01-01T00:00:00Z"):
        status, body = await plant.ask("GET", f"/iiot/press-1/{path}")
        assert (status, body["error"]["code"]) == (404, "not_found")
    assert await plant.get("/iiot/press-1/state/history") == {"items": [], "next": None}
    assert (await plant.get("/iiot/press-1"))["reported"] is None
    for path in ("state", "state/history"):
        assert (await plant.ask("GET", f"/iiot/press-9/{path}"))[0] == 404


async def test_a_version_shows_the_document_of_its_time(plant: Plant) -> None:
    device = await plant.device("press-1")
    for number in range(1, 4):
        await report(device, {f"n{number}": number})
    assert [(await state(plant, query=f"?version={n}"))["reported"] for n in (1, 2, 3)] == [
        {"n1": 1},
        {"n1": 1, "n2": 2},
        {"n1": 1, "n2": 2, "n3": 3},
    ]
    for version in (0, 4, 10**17):
        assert (await plant.ask("GET", f"/iiot/press-1/state?version={version}"))[0] == 404


async def test_at_a_time_the_document_is_the_last_one_before_it(plant: Plant) -> None:
    device = await plant.device("press-1")
    for number in range(8):
        await report(device, {"n": number})
        until = iiot.now_ms()
        while iiot.now_ms() == until:  # the next change has a millisecond of its own
            await asyncio.sleep(0)
    items = await history(plant)
    times = [milliseconds(item["at"]) for item in items]
    assert len(set(times)) == 8
    for index, moment in enumerate(times):
        for at in (moment, (times[index + 1] if index < 7 else moment + 10_000) - 1):
            assert (await state(plant, query=f"?at={at}"))["reported"] == {"n": index}
        assert (await state(plant, query=f"?at={items[index]['at']}"))["version"] == index + 1
    status, body = await plant.ask("GET", f"/iiot/press-1/state?at={times[0] - 1}")
    assert (status, body["error"]["code"]) == (404, "not_found")


async def test_the_history_names_what_changed_by_json_pointers(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a/b": {"m~n": 1, "": 2}, "list": [1], "gone": {"x": 1}, "same": {"y": 1}})
    await report(device, {"a/b": {"m~n": 3}, "list": [1, 2], "gone": None, "same": {"y": 1, "z": {}}, "~1": 0})
    await report(device, {"list": {"now": "an object"}})
    items = await history(plant)
    assert items[0]["changes"] == [
        {"path": "/a~1b", "to": {"m~n": 1, "": 2}},
        {"path": "/gone", "to": {"x": 1}},
        {"path": "/list", "to": [1]},
        {"path": "/same", "to": {"y": 1}},
    ]
    assert items[1]["changes"] == [
        {"path": "/a~1b/m~0n", "from": 1, "to": 3},
        {"path": "/gone", "from": {"x": 1}},
        {"path": "/list", "from": [1], "to": [1, 2]},
        {"path": "/same/z", "to": {}},
        {"path": "/~01", "to": 0},
    ]
    assert items[2]["changes"] == [{"path": "/list", "from": [1, 2], "to": {"now": "an object"}}]


@pytest.mark.parametrize(("table", "path"), [("state", "/state/history"), ("config", "/config/history")])
async def test_a_page_of_a_history_reads_no_more_than_it_shows(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, table: str, path: str
) -> None:
    """Versions may be long: a page of four megabytes would read a hundred. Here what is not shown is no JSON, and cannot be read."""
    monkeypatch.setattr(iiot, "PAGE_CHARACTERS", 10_000)
    await plant.device("press-1")
    value = "json_array(json_object('text', printf('%3000d', n)))"
    numbers = "with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < 12)"
    with plants.writing(plant.database) as connection:
        if table == "state":
            connection.execute(f"insert into state {numbers} select 1, n, 0, 1, '', {value} from numbers")
        else:
            connection.execute("insert into document (id, text) values (1, '{}')")
            connection.execute(
                f"""insert into config (device_id, version, document_id, at, author, timeout, status, status_at, errors) {numbers}
                    select 1, n, 1, 0, 'somebody', 1, 'rejected', 0, {value} from numbers"""
            )
    shown, column = "changes" if table == "state" else "errors", f"/iiot/press-1{path}?limit=1000"
    page = await plant.get(column)
    assert ([item["version"] for item in page["items"]], page["next"]) == ([12, 11, 10], 10)
    with plants.writing(plant.database) as connection:
        connection.execute(f"update {table} set {shown} = 'no JSON' where version < 9")
    assert await plant.get(column) == page
    versions = []
    with plants.writing(plant.database) as connection:
        connection.execute(f"update {table} set {shown} = '[]' where version < 9")
    while page["next"] is not None:
        page = await plant.get(f"{column}&after={page['next']}")
        versions += [item["version"] for item in page["items"]]
    assert versions == list(range(9, 0, -1))


async def test_a_version_longer_than_a_page_is_shown_alone(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iiot, "PAGE_CHARACTERS", 100)
    device = await plant.device("press-1")
    for number in range(3):
        await send(device, {"n": f"{number:500}"})
    await device.acknowledged(device.seq)
    versions, after = [], ""
    for _ in range(3):
        page = await plant.get(f"/iiot/press-1/state/history{after}")
        versions.append([item["version"] for item in page["items"]])
        after = f"?after={page['next']}"
    assert (versions, page["next"]) == ([[3], [2], [1]], None)


async def test_the_history_comes_in_pages_newest_first(plant: Plant) -> None:
    device = await plant.device("press-1")
    for number in range(7):
        await send(device, {"n": number})
    await device.acknowledged(device.seq)
    versions, after = [], ""
    for size in (3, 3, 1):
        page = await plant.get(f"/iiot/press-1/state/history?limit=3{after}")
        assert len(page["items"]) == size
        versions += [item["version"] for item in page["items"]]
        after = f"&after={page['next']}"
    assert page["next"] is None
    assert versions == [7, 6, 5, 4, 3, 2, 1]


async def test_the_software_version_is_shown_in_the_list_of_devices(plant: Plant) -> None:
    device = await plant.device("press-1")
    await plant.device("press-2")

    async def shown() -> Any:
        items = (await plant.get("/iiot"))["items"]
        assert items[1]["software_version"] is None
        return items[0]["software_version"]

    assert await shown() is None
    for reported, mode, expected in (
        ({"software_version": "1.4.2"}, "merge", "1.4.2"),
        ({"other": 1}, "merge", "1.4.2"),
        ({"software_version": {"major": 2}}, "merge", None),
        ({"software_version": 3}, "merge", None),
        ({"software_version": "[1]"}, "merge", "[1]"),
        ({"nested": {"software_version": "no"}}, "replace", None),
        ({"software_version": "1.5.0", "nested": {}}, "replace", "1.5.0"),
        ({"software_version": None}, "merge", None),
    ):
        await report(device, reported, mode)
        assert await shown() == expected, reported


# ---- many in one commit


async def test_reports_of_many_devices_in_one_commit_are_taken_in_the_order_of_each(plant: Plant) -> None:
    devices = {name: await plant.device(name) for name in ("press-1", "press-2", "press-3")}
    model: dict[str, list[Any]] = {name: [] for name in devices}
    for round_ in range(40):
        for number, (name, device) in enumerate(devices.items()):
            mode = "replace" if (round_ + number) % 5 == 0 else "merge"
            document = {"n": round_ // 2, "keep": {f"k{round_ % 4}": round_}} if (round_ + number) % 3 else {}
            old = model[name][-1] if model[name] else {}
            new = document if mode == "replace" else patched(old, document)
            if not model[name] or text(new) != text(old):
                model[name].append(new)
            await send(device, document, mode)
    for device in devices.values():
        await device.acknowledged(device.seq)
    for name, documents in model.items():
        assert [item["version"] for item in await history(plant, name)] == list(range(1, len(documents) + 1))
        for version, document in enumerate(documents, 1):
            assert (await state(plant, name, f"?version={version}"))["reported"] == document
        assert len((await plant.get(f"/iiot/{name}/events?kind=state&limit=1000"))["items"]) == len(documents)


async def test_frames_that_waited_for_one_commit_are_versions_of_their_own(plant: Plant) -> None:
    devices = {name: await plant.device(name) for name in ("press-1", "press-2")}
    with closing(sqlite3.connect(plant.database, isolation_level=None)) as other:
        other.execute("begin immediate")  # until it is over, nothing is committed
        for device in devices.values():
            for document, mode in (({"n": 1}, "merge"), ({}, "merge"), ({"n": 1}, "replace"), ({"m": 2}, "replace"),
                                   (document_of(BYTES, "m"), "merge"), (document_of(BYTES - 100, "o"), "merge"),
                                   ({"o": "", "p": "x" * 80, "m": "x" * 100}, "merge"), ({"p": None}, "merge")):  # fmt: skip
                await send(device, document, mode)
            await device.send("nonsense")  # answered at once: by then all before it has been read
            assert (await device.expect("error"))["code"] == "unknown_type"
        other.execute("rollback")
    for name, device in devices.items():
        error = await device.expect("error")
        assert (error["code"], error["seq"]) == ("document_too_large", 6)
        await device.acknowledged(device.seq)
        assert [item["version"] for item in await history(plant, name)] == [1, 2, 3, 4, 5]
        assert [(await state(plant, name, f"?version={n}"))["reported"] for n in range(1, 6)] == [
            {"n": 1},
            {"m": 2},
            document_of(BYTES, "m"),
            {"m": "x" * 100, "o": "", "p": "x" * 80},
            {"m": "x" * 100, "o": ""},
        ]


# ---- bounds


async def test_a_document_of_just_64_kib_is_taken_and_one_byte_more_is_not(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, document_of(BYTES))
    assert (await state(plant))["reported"] == document_of(BYTES)
    for mode in ("merge", "replace"):
        seq = await send(device, document_of(BYTES + 1), mode)
        error = await device.expect("error")
        assert (error["code"], error["seq"]) == ("invalid", seq)
        assert [field["path"] for field in error["errors"]] == ["reported"]
        await device.acknowledged(seq)
    assert (await state(plant))["version"] == 1
    await report(device, {"a": None, "b": 1})
    assert (await state(plant))["reported"] == {"b": 1}


async def test_a_merge_that_would_make_a_document_too_large_is_refused_and_changes_nothing(plant: Plant) -> None:
    device = await plant.device("press-1")
    half = document_of(BYTES // 2)
    await report(device, half)
    rest = document_of(BYTES - BYTES // 2 + 1, "b")  # two objects of which one pair of braces becomes a comma
    await report(device, rest)
    assert (await state(plant))["reported"] == {**half, **rest}
    before = await state(plant)
    seq = await send(device, {"b": rest["b"] + "x"})
    assert (await device.receive()) == {
        "type": "error", "code": "document_too_large", "seq": seq, "message": iiot.FAULTS["document_too_large"].message,
    }  # fmt: skip
    await device.acknowledged(seq)
    assert await state(plant) == before
    await report(device, {"c": 0, "b": None})
    assert (await state(plant))["reported"] == {**half, "c": 0}
    assert (await plant.device("press-1")).welcome["seq"] == device.seq, "what was refused was consumed"


async def test_a_document_of_depth_10_is_taken_and_one_deeper_is_not(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, nested(DEPTH))
    for deep in (nested(DEPTH + 1), {"a": [nested(DEPTH - 1)]}, nested(200)):
        for mode in ("merge", "replace"):
            seq = await send(device, deep, mode)
            error = await device.expect("error")
            assert (error["code"], error["seq"], [field["path"] for field in error["errors"]]) == ("invalid", seq, ["reported"])
            await device.acknowledged(seq)
    assert (await state(plant))["reported"] == nested(DEPTH)
    assert (await state(plant))["version"] == 1


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ('"reported":{"a":9223372036854775808}', "reported"),
        ('"reported":{"a":-9223372036854775809}', "reported"),
        ('"reported":{"a":[{"b":18446744073709551616}]}', "reported"),
        ('"reported":{"a":1000000000000000000000000000000}', "reported"),
        ('"reported":{"a":"zero\\u0000"}', "reported"),
        ('"reported":{"zero\\u0000":1}', "reported"),
        ('"reported":[1]', "reported"),
        ('"reported":null', "reported"),
        ('"reported":"text"', "reported"),
        ('"mode":"merge"', "reported"),
        ('"reported":{},"mode":"patch"', "mode"),
        ('"reported":{},"mode":null', "mode"),
        ('"reported":{},"modus":"merge"', "modus"),
        ('"reported":{},"ts":1', "ts"),
    ],
)
async def test_a_bad_report_is_named_with_its_path_and_the_session_goes_on(plant: Plant, fields: str, path: str) -> None:
    device = await plant.device("press-1")
    await report(device, {"good": 1})
    device.seq += 1
    await device.link.send_str(f'{{"type":"state","seq":{device.seq},{fields}}}')
    error = await device.expect("error")
    assert (error["code"], error["seq"], [field["path"] for field in error["errors"]]) == ("invalid", device.seq, [path])
    await device.acknowledged(device.seq)
    await report(device, {"good": 2})
    assert (await state(plant))["version"] == 2


@pytest.mark.parametrize("seq", ["0", "-1", "1.5", "null", '"1"', "true", "9223372036854775808"])
async def test_a_report_without_a_good_number_is_refused(plant: Plant, seq: str) -> None:
    device = await plant.device("press-1")
    await device.link.send_str(f'{{"type":"state","seq":{seq},"reported":{{"a":1}}}}')
    error = await device.expect("error")
    assert (error["code"], [field["path"] for field in error["errors"]]) == ("invalid", ["seq"])
    await report(device, {"good": 1})
    assert (await state(plant))["reported"] == {"good": 1}


@pytest.mark.parametrize("query", ["version=one", "version=-1", "version=1&version=2", "at=yesterday", "at=", "when=now"])
async def test_a_question_that_is_not_understood_is_refused(plant: Plant, query: str) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("GET", f"/iiot/press-1/state?{query}")
    assert (status, body["error"]["code"]) == (400, "bad_query")
    assert [field["path"] for field in body["error"]["details"]] == [query.partition("=")[0]]


# ---- across restarts


async def test_state_and_its_history_survive_a_restart_and_go_on(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        device = await plant.device("press-1")
        await report(device, {"software_version": "1.0", "a": {"b": 1}})
        await report(device, {"a": {"c": 2}})
        before, versions, token = await state(plant), await history(plant), plant.tokens["press-1"]
    async with plants.plant(tmp_path) as plant:
        plant.tokens["press-1"] = token
        assert await state(plant) == before
        assert await history(plant) == versions
        assert (await plant.get("/iiot"))["items"][0]["software_version"] == "1.0"
        device = await plant.device("press-1")
        await report(device, {"a": {"b": 1}})
        assert await state(plant) == before
        await report(device, {"a": {"b": None}})
        assert (await state(plant))["reported"] == {"software_version": "1.0", "a": {"c": 2}}
        assert [item["version"] for item in await history(plant)] == [1, 2, 3]


async def test_every_version_is_what_it_was_however_it_is_kept(plant: Plant) -> None:
    device, numbers, kept = await plant.device("press-1"), random.Random(8), []
    document: dict[str, Any] = {}
    for number in range(1, 161):
        value = numbers.choice([None, number, {"a": number, "b": {"c": number}}, {"a": None}, "x"])
        patch: dict[str, Any] = {f"k{numbers.randrange(8)}": value, "n": number}
        document = iiot.merge_patch(document, patch)
        kept.append(document)
        await report(device, patch)
        if number % 40 == 0:
            await device.close()
            device = await plant.device("press-1")
    for version, expected in enumerate(kept, 1):
        assert (await plant.get(f"/iiot/press-1/state?version={version}"))["reported"] == expected
    assert (await state(plant))["reported"] == kept[-1]
    whole = plants.rows(plant.database, "select version from state where document <> '' order by version")
    assert [version for (version,) in whole] == [1, 51, 101, 151, 160]


async def test_small_patches_of_a_large_document_take_little_room(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {f"key-{n:05}": 0 for n in range(4_000)})
    before = sum(path.stat().st_size for path in plant.database.parent.iterdir())
    for number in range(1, 2_001):
        device.seq += 1
        await device.send("state", seq=device.seq, reported={f"key-{number:05}": number})
    await device.acknowledged(device.seq)
    stored = plants.rows(plant.database, "select count(*), sum(length(document)), sum(length(changes)) from state")[0]
    assert stored[0] == 2_001
    assert stored[1] < 45 * 70_000
    assert stored[2] < 500_000
    assert sum(path.stat().st_size for path in plant.database.parent.iterdir()) - before < 60_000_000


async def test_a_patch_that_makes_a_document_too_large_changes_nothing_of_it(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"a": {"b": 1, "c": [1]}, "x": "y", "more": "z" * 200})
    device.seq += 1
    await device.send("state", seq=device.seq, reported={"a": {"b": None, "d": "x" * 65_400}, "x": None})
    assert (await device.expect("error"))["code"] == "document_too_large"
    await device.acknowledged(device.seq)
    device.seq += 1
    await device.send("state", seq=device.seq, reported={"a": {"c": None}})
    await device.acknowledged(device.seq)
    assert (await state(plant))["reported"] == {"a": {"b": 1}, "x": "y", "more": "z" * 200}


async def test_a_report_costs_no_more_after_many_versions(plant: Plant) -> None:
    device = await plant.device("press-1")
    await report(device, {"n": 0})
    with closing(sqlite3.connect(plant.database)) as other:
        other.execute(
            """with recursive number (n) as (values (2) union all select n + 1 from number where n < 20000)
               insert into state (device_id, version, at, session, document, changes) select 1, n, n, 1, ?, '[]' from number""",
            (json.dumps(document_of(500), separators=(",", ":")),),
        )
        other.commit()
    steps = 0
    with closing(iiot.connect(plant.database)) as other:

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        other.set_progress_handler(count, 100)
        with iiot.transaction(other):
            mine = iiot.StateReport(Nobody(), 1, 1, 2, iiot.now_ms(), "merge", {"n": 1})
            assert iiot.write_states(other, [(0, mine)], [], iiot.Limits()) == []
        other.set_progress_handler(None, 0)
    assert steps * 100 < 10_000, "virtual machine instructions of SQLite"


class Nobody:
    """Reports, and does not want to hear of it."""

    def committed(self, mark: tuple[int, int]) -> None:
        pass

    def not_stored(self) -> None:
        pass

    def refused(self, code: str, seq: int) -> None:
        pass


# ---- properties

NAMES = st.sampled_from(["a", "b", "c", "a/b", "~", ""])
SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5, "", "x", "1"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=3)
STEPS = st.tuples(st.sampled_from(["merge", "merge", "replace"]), DOCUMENTS)


def without_nulls(value: Any) -> Any:
    """What a sequence of merges alone could have made: no member is null."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return value


def applied(document: Any, changes: list[dict[str, Any]], *, backwards: bool) -> Any:
    """A document with a list of changes done, or undone."""
    document = json.loads(json.dumps(document))
    gone, come = ("to", "from") if backwards else ("from", "to")
    for change in changes:
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in change["path"].split("/")[1:]]
        place = document
        for name in way:
            place = place[name]
        assert (last in place) == (gone in change)
        if gone in change:
            assert text(place.pop(last)) == text(change[gone])
        if come in change:
            place[last] = change[come]
    return document


@given(DOCUMENTS, DOCUMENTS)
def test_a_patch_applied_in_place_is_the_patch_and_tells_what_it_changed(old: Any, patch: Any) -> None:
    new, document = iiot.merge_patch(old, patch), json.loads(json.dumps(old))
    told = json.loads(iiot.changes_text(list(iiot.merge_into(document, patch)), document, 10_000))
    assert text(document) == text(new)
    assert text(told) == text(json.loads(iiot.changes_text(list(iiot.changes_between(old, new)), new, 10_000)))
    changes = list(iiot.read_changes(told))
    iiot.apply_changes(document, changes, back=True)
    assert text(document) == text(old)
    iiot.apply_changes(document, changes)
    assert text(document) == text(new)


@given(VALUES, VALUES)
def test_a_merge_patch_is_that_of_the_rfc_whatever_the_documents(target: Any, patch: Any) -> None:
    before = text(target), text(patch)
    assert text(iiot.merge_patch(target, patch)) == text(patched(target, patch))
    assert (text(target), text(patch)) == before


@given(DOCUMENTS, DOCUMENTS)
def test_changes_lead_from_one_document_to_the_other_and_back(old: Any, new: Any) -> None:
    changes = json.loads(iiot.changes_text(list(iiot.changes_between(old, new)), new, 10_000))
    assert text(applied(old, changes, backwards=False)) == text(new)
    assert text(applied(new, changes, backwards=True)) == text(old)
    assert bool(changes) == (text(old) != text(new))
    for change in changes:
        assert not ("from" in change and "to" in change and text(change["from"]) == text(change["to"]))


@given(DOCUMENTS.map(without_nulls), DOCUMENTS.map(without_nulls))
def test_a_merge_difference_leads_from_one_document_to_the_other(old: Any, new: Any) -> None:
    patch = agent.merge_difference(old, new)
    assert text(iiot.merge_patch(old, patch)) == text(new)
    assert (patch == {}) == (text(old) == text(new))
    assert agent.merge_difference(new, iiot.merge_patch(old, patch)) == {}


async def play(steps: list[tuple[int, Step]]) -> None:
    """Devices report, all at once; what the server has of each is what a plain model has."""
    with tempfile.TemporaryDirectory() as folder:
        async with plants.plant(Path(folder)) as plant:
            devices = [await plant.device(f"press-{number}") for number in range(2)]
            models: list[list[Any]] = [[], []]
            for number, (mode, document) in steps:
                versions = models[number]
                old = versions[-1] if versions else {}
                new = patched(old, document) if mode == "merge" else document
                if not versions or text(new) != text(old):
                    versions.append(new)
                await send(devices[number], document, mode)
            for number, versions in enumerate(models):
                if devices[number].seq:
                    await devices[number].acknowledged(devices[number].seq)
                items = await history(plant, f"press-{number}")
                assert len(items) == len(versions)
                document = {}
                for item, expected in zip(items, versions, strict=True):
                    document = applied(document, item["changes"], backwards=False)
                    assert text(document) == text(expected)
                if versions:
                    assert text((await state(plant, f"press-{number}"))["reported"]) == text(versions[-1])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 1), STEPS), min_size=1, max_size=16))
def test_whatever_devices_report_the_server_has_what_a_plain_model_has(steps: list[tuple[int, Step]]) -> None:
    asyncio.run(play(steps))
