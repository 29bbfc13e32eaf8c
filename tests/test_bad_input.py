"""Whatever a peer sends is answered in the words of the contract, and nothing around it is lost."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import WSMsgType
from plant import Device, Plant

import iiot

MOMENT = "2026-01-01T00:00:00Z"
# What exceptions say of themselves, in Python, SQLite and the libraries in use.
INNER = re.compile(
    r"traceback|error:|exception|\bline \d+|column \d+|sqlite|orjson|cattrs|attrs|aiohttp|<class|object at 0x|'[a-z]+' object|\bNoneType\b",
    re.I,
)


def no_exception_in(text: str) -> None:
    assert not INNER.search(text), text


async def error_of(device: Device) -> dict[str, Any]:
    """The answer to a bad frame: its message is the one of the table, and what it says of fields is no exception's text."""
    while (frame := await device.receive())["type"] == "ack":
        pass
    assert frame["type"] == "error"
    assert frame["message"] == iiot.FAULTS[frame["code"]].message
    no_exception_in(json.dumps(frame["message"]) + json.dumps([error["message"] for error in frame.get("errors", [])]))
    return frame


@pytest.fixture
async def device(plant: Plant) -> AsyncIterator[Device]:
    """A device that has stored a reading, and stores another one after what the test does to it."""
    device = await plant.device("press-1")
    await device.store({"ts": "2026-01-01T00:00:00Z", "values": {"before": 1}})
    yield device
    device.seq += 10
    await device.store({"ts": "2026-01-01T00:00:01Z", "values": {"after": 2}})
    assert await plant.points("press-1", "before") == [["2026-01-01T00:00:00.000Z", 1]]
    assert await plant.points("press-1", "after") == [["2026-01-01T00:00:01.000Z", 2]]
    kinds = [item["kind"] for item in (await plant.get("/iiot/press-1/events"))["items"]]
    assert kinds == ["connected", "credentials"]  # the session went on
    await device.close()


async def metrics(plant: Plant) -> set[str]:
    return {series["metric"] for series in (await plant.get("/iiot/press-1/telemetry"))["series"]}


# ---- frames that are no frames


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "not_json"), (" ", "not_json"), ("hello", "not_json"), ("{", "not_json"), ('{"type":"telemetry"', "not_json"),
        ("{'type':'telemetry'}", "not_json"), ('{"type":"telemetry",}', "not_json"), ('{"type":"telemetry"}{}', "not_json"),
        ("\0", "not_json"), ('{"type":"tele\nmetry"}', "not_json"), ("\ufeff{}", "not_json"), (b"\xff\xfe", "not_json"),
        (b'{"type":"\xc3\x28"}', "not_json"), ('{"type":"\\ud800"}', "not_json"), ("undefined", "not_json"), ("NaN", "not_json"),
        ("[]", "not_an_object"), ('[{"type":"telemetry"}]', "not_an_object"), ("null", "not_an_object"), ("true", "not_an_object"),
        ("7", "not_an_object"), ('"telemetry"', "not_an_object"),
        ("{}", "unknown_type"), ('{"type":null}', "unknown_type"), ('{"type":"Telemetry"}', "unknown_type"),
        ('{"type":""}', "unknown_type"),
        ('{"type":["telemetry"]}', "unknown_type"), ('{"type":{}}', "unknown_type"), ('{"type":1}', "unknown_type"),
        ('{"type":"hello","token":"x"}', "unknown_type"), ('{"type":"provision","key":"x","device":"y"}', "unknown_type"),
        ("[" * 1_500 + "]" * 1_500, "too_deep"), ("[" * 500_000, "too_deep"), ('{"a":' * 5_000 + "1" + "}" * 5_000, "too_deep"),
        ('{"type":"telemetry","seq":2,"samples":' + "[" * 5_000 + "]" * 5_000 + "}", "too_deep"),
    ],
)  # fmt: skip
async def test_what_is_no_frame_is_refused(plant: Plant, device: Device, content: str | bytes, code: str) -> None:
    await device.link.send_frame(content.encode() if isinstance(content, str) else content, WSMsgType.TEXT)
    assert (await error_of(device))["code"] == code
    assert await metrics(plant) == {"before"}


@pytest.mark.parametrize("depth", [100, 900, 1_000, 1_020])
async def test_a_deep_value_is_refused_with_its_path_or_for_its_depth(device: Device, depth: int) -> None:
    await device.link.send_str('{"type":"telemetry","seq":2,"samples":[{"values":{"n":%s}}]}' % ("[" * depth + "]" * depth))
    error = await error_of(device)
    assert error["code"] in ("too_deep", "invalid")
    if error["code"] == "invalid":
        assert [each["path"] for each in error["errors"]] == ["samples[0].values.n"]


async def test_binary_frames_are_refused_while_no_tunnel_is_open(device: Device) -> None:
    for content in (b"", b"\0\0\0\1", b"\0\0\0\1bytes", b'{"type":"telemetry"}'):
        await device.link.send_bytes(content)
        assert (await error_of(device))["code"] == "not_binary"


# ---- fields

GOOD: dict[str, Any] = {"seq": 2, "samples": [{"ts": MOMENT, "values": {"n": 1.5}}]}
OBJECT, ARRAY, MISSING, UNKNOWN = "is not an object", "is not an array", "is missing", "is not a known field"
SEQ = "is not a positive integer of at most 63 bits"
TIME, RANGE = "must be an integer of milliseconds or an RFC 3339 time", "is not between 2000-01-01 and a day from now"
VALUE = "is not a number of 63 bits, a boolean or a string of 1024 characters"
NAME = "has a name that is not 1 to 128 printable characters"


def sample(**fields: Any) -> dict[str, Any]:
    """A frame whose second sample differs from a good one in these fields."""
    return {"samples": [{"values": {"n": 1}}, {"values": {"n": 2}, **fields}]}


FIELDS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"seq": ...}, {"seq": MISSING}),
    ({"samples": ...}, {"samples": MISSING}),
    ({"seq": ..., "samples": ...}, {"seq": MISSING, "samples": MISSING}),
    ({"extra": 1}, {"extra": UNKNOWN}),
    ({"b": 1, "a": None}, {"a": UNKNOWN, "b": UNKNOWN}),
    ({"token": "secret"}, {"token": UNKNOWN}),
    ({"seq": 0}, {"seq": SEQ}),
    ({"seq": -5}, {"seq": SEQ}),
    ({"seq": 2.0}, {"seq": SEQ}),
    ({"seq": 2.5}, {"seq": SEQ}),
    ({"seq": "2"}, {"seq": SEQ}),
    ({"seq": True}, {"seq": SEQ}),
    ({"seq": None}, {"seq": SEQ}),
    ({"seq": [2]}, {"seq": SEQ}),
    ({"seq": 2**63}, {"seq": SEQ}),
    ({"seq": 2**64 - 1}, {"seq": SEQ}),
    ({"seq": 2**64}, {"seq": SEQ}),
    ({"seq": 10**300}, {"seq": SEQ}),
    ({"seq": -(2**63) - 1}, {"seq": SEQ}),
    ({"samples": None}, {"samples": ARRAY}),
    ({"samples": {}}, {"samples": ARRAY}),
    ({"samples": "n=1"}, {"samples": ARRAY}),
    ({"samples": [None]}, {"samples[0]": OBJECT}),
    ({"samples": [{"values": {}}, []]}, {"samples[1]": OBJECT}),
    ({"samples": [{"values": {}}, 7]}, {"samples[1]": OBJECT}),
    ({"samples": [{}]}, {"samples[0].values": MISSING}),
    ({"samples": [{"values": {"n": 1}}, {"ts": MOMENT}]}, {"samples[1].values": MISSING}),
    (sample(values=None), {"samples[1].values": OBJECT}),
    (sample(values=[1]), {"samples[1].values": OBJECT}),
    (sample(values=1), {"samples[1].values": OBJECT}),
    (sample(unit="bar"), {"samples[1].unit": UNKNOWN}),
    (sample(ts="today"), {"samples[1].ts": TIME}),
    (sample(ts=""), {"samples[1].ts": TIME}),
    (sample(ts="2026-01-01"), {"samples[1].ts": TIME}),
    (sample(ts="2026-01-01T00:00:00"), {"samples[1].ts": TIME}),
    (sample(ts="2026-02-30T00:00:00Z"), {"samples[1].ts": TIME}),
    (sample(ts="1767225600000"), {"samples[1].ts": TIME}),
    (sample(ts=1767225600000.0), {"samples[1].ts": TIME}),
    (sample(ts=True), {"samples[1].ts": TIME}),
    (sample(ts=[]), {"samples[1].ts": TIME}),
    (sample(ts=0), {"samples[1].ts": RANGE}),
    (sample(ts=-1), {"samples[1].ts": RANGE}),
    (sample(ts=1_767_225_600), {"samples[1].ts": RANGE}),
    (sample(ts=946_684_799_999), {"samples[1].ts": RANGE}),
    (sample(ts="1999-12-31T23:59:59.999Z"), {"samples[1].ts": RANGE}),
    (sample(ts="1970-01-01T00:00:00Z"), {"samples[1].ts": RANGE}),
    (sample(ts="9999-12-31T23:59:59Z"), {"samples[1].ts": RANGE}),
    (sample(ts=1_767_225_600_000_000), {"samples[1].ts": RANGE}),
    (sample(ts=2**63), {"samples[1].ts": RANGE}),
    (sample(ts=2**64), {"samples[1].ts": RANGE}),
    (sample(ts=-(10**300)), {"samples[1].ts": RANGE}),
    (sample(ts="today", unit="bar"), {"samples[1].ts": TIME, "samples[1].unit": UNKNOWN}),
    (sample(values={"n": None}), {"samples[1].values.n": VALUE}),
    (sample(values={"m": 1, "n": [1]}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": {"value": 1}}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": "x" * 1_025}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": "a\0b"}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": 2**63}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": -(2**63) - 1}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": 2**64 - 1}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": 2**64}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": -(2**64)}), {"samples[1].values.n": VALUE}),
    (sample(values={"n": 10**300}), {"samples[1].values.n": VALUE}),
    (sample(values={"m": 1e300, "n": 10**20}), {"samples[1].values.n": VALUE}),
    (sample(values={"": 1}), {"samples[1].values.": NAME}),
    (sample(values={"a\nb": 1}), {"samples[1].values.a\nb": NAME}),
    (sample(values={"a\0b": 1}), {"samples[1].values.a\0b": NAME}),
    (sample(values={"x" * 129: 1}), {f"samples[1].values.{'x' * 129}": NAME}),
    ({"seq": 0, "samples": [{"ts": 5}], "extra": 1}, {"seq": SEQ, "samples[0].ts": RANGE, "samples[0].values": MISSING, "extra": UNKNOWN}),
]


@pytest.mark.parametrize(("changes", "errors"), FIELDS, ids=[" ".join(errors)[:60] for _, errors in FIELDS])
async def test_fields_at_fault_are_named_with_their_path(
    plant: Plant, device: Device, changes: dict[str, Any], errors: dict[str, str]
) -> None:
    frame = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    await device.send("telemetry", **frame)
    error = await error_of(device)
    assert error["code"] == "invalid"
    assert {each["path"]: each["message"] for each in error["errors"]} == errors
    written = frame.get("seq")
    assert error.get("seq") == (written if type(written) is int and abs(written) < 10**40 else None), "as the device wrote it"
    if "seq" not in errors:
        assert await device.receive() == {"type": "ack", "seq": 2}  # consumed
    assert await metrics(plant) == {"before"}  # and none of it stored, whatever of it was good


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "nan", "1e400", "-1e400", "1" + "0" * 400, "1" + "0" * 5_000, "01", "1.", ".5", "+1", "0x10", "1_000"],
)
@pytest.mark.parametrize(
    "where", ['{"type":"telemetry","seq":2,"samples":[{"values":{"n":%s}}]}', '{"type":"telemetry","seq":%s,"samples":[]}']
)
async def test_what_json_does_not_call_a_number_is_no_json(plant: Plant, device: Device, where: str, value: str) -> None:
    await device.link.send_str(where % value)
    assert (await error_of(device))["code"] == "not_json"
    assert await metrics(plant) == {"before"}


async def test_an_endless_list_of_faults_does_not_cost_the_session(plant: Plant, device: Device) -> None:
    await device.send("telemetry", seq=2, samples=[], **{f"field{number}": 1 for number in range(60_000)})
    error = await error_of(device)
    assert (error["code"], error["seq"]) == ("invalid", 2)
    assert len(json.dumps(error)) < 100_000


# ---- what looks odd and is good


@pytest.mark.parametrize(
    "value",
    [
        1e300, -1e300, 1e200, 1e-200, 9.3e18, -9.3e18, 1.8446744073709552e19, 9223372036854775808.0, 2**63 - 1, -(2**63), 2**53 + 1, 0, 0.0,
        0.1, 0.1 + 0.2, 123456789.12345678, 1e22, "", "x" * 1_024, "\U0001f600" * 1_024, "a\nb\tc", '"', "\\", "\u2028", "NaN", "1e300",
    ],
)  # fmt: skip
async def test_a_value_is_read_back_as_it_was_sent(plant: Plant, device: Device, value: object) -> None:
    await device.store({"ts": MOMENT, "values": {"n": value}})
    ((_, got),) = await plant.points("press-1", "n")
    assert (type(got), got) == (type(value), value)
    got = (await plant.get("/iiot/press-1"))["latest"]["n"]["value"]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize(
    "metric", ["a", "x" * 128, "motor temperature [°C]", "a.b[0]", '"', "\\", "'", "%", ",", "温度", "type", "$", "a:b", "1"]
)
async def test_a_metric_may_have_any_printable_name(plant: Plant, device: Device, metric: str) -> None:
    await device.store({"ts": MOMENT, "values": {metric: 1}})
    assert metric in await metrics(plant)
    async with plant.client.get(
        plant.url + "/iiot/press-1/telemetry", params={"metric": metric}, headers={"Authorization": f"Bearer {plant.token}"}
    ) as response:
        assert (await response.json())["series"] == [{"metric": metric, "points": [["2026-01-01T00:00:00.000Z", 1]]}]
    assert (await plant.get("/iiot/press-1"))["latest"][metric] == {"time": "2026-01-01T00:00:00.000Z", "value": 1}


@pytest.mark.parametrize("ts", [946_684_800_000, "2000-01-01T00:00:00Z", "2000-01-01T05:30:00+05:30", None])
async def test_the_first_moment_counts(plant: Plant, device: Device, ts: object) -> None:
    await device.store({"ts": ts, "values": {"n": 1}})
    ((time, _),) = await plant.points("press-1", "n")
    assert (time == "2000-01-01T00:00:00.000Z") is (ts is not None)


async def test_a_clock_may_be_ahead_by_less_than_a_day(plant: Plant, device: Device) -> None:
    await device.store({"ts": iiot.now_ms() + iiot.DAY - 60_000, "values": {"n": 1}})
    await device.telemetry({"ts": iiot.now_ms() + iiot.DAY + 60_000, "values": {"n": 2}})
    assert (await error_of(device))["errors"] == [{"path": "samples[0].ts", "message": RANGE}]
    assert [value for _, value in await plant.points("press-1", "n")] == [1]


async def test_a_frame_may_be_empty(plant: Plant, device: Device) -> None:
    await device.store()
    await device.store({"values": {}})
    assert await metrics(plant) == {"before"}


async def test_good_and_bad_frames_mixed_at_full_speed_lose_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), bad_frames_per_minute=10**6)) as plant:
        device = await plant.device("press-1")
        bad = [json.dumps({"type": "telemetry", "seq": 0, **changes}, default=str) for changes, _ in FIELDS if "seq" not in changes]

        async def send() -> None:
            for number in range(1_000):
                await device.telemetry({"values": {"n": number}})
                await device.link.send_str(bad[number % len(bad)])

        sending = asyncio.create_task(send())
        errors, acknowledged = 0, 0
        while errors < 1_000 or acknowledged < 1_000:
            frame = await device.receive()
            if frame["type"] == "error":
                errors += 1
            else:
                acknowledged = frame["seq"]
        await sending
        assert [value for _, value in await plant.points("press-1", "n")] == list(range(1_000))


# ---- the handshake


@pytest.mark.parametrize(
    ("frame", "errors"),
    [
        ({"type": "hello"}, {"token": MISSING}),
        ({"type": "hello", "token": 7}, {"token": "is not a string of at most 1024 characters"}),
        ({"type": "hello", "token": "t", "version": 2}, {"version": UNKNOWN}),
        ({"type": "hello", "token": "t", "agent": {}}, {"agent": "is not a string of at most 1024 characters"}),
        ({"type": "hello", "token": "t", "time": "noon"}, {"time": TIME}),
        ({"type": "provision", "key": "k"}, {"device": MISSING}),
        ({"type": "provision", "device": "a b"}, {"key": MISSING, "device": "must have 1 to 64 letters, digits or . _ : -"}),
    ],
)
async def test_what_is_wrong_with_a_hello_is_said_before_the_close(plant: Plant, frame: dict[str, Any], errors: dict[str, str]) -> None:
    device = await plant.connect()
    await device.link.send_str(json.dumps(frame))
    error = await error_of(device)
    assert {each["path"]: each["message"] for each in error["errors"]} == errors
    closed = await device.closed()
    assert (closed.code, closed.reason) == (4400, iiot.FAULTS["invalid"].message)


async def test_a_wrong_token_and_an_unknown_one_are_answered_alike(plant: Plant) -> None:
    token = await plant.register("press-1")
    answers = []
    for wrong in (iiot.mint("dev").text, token[:-43] + iiot.mint("dev").text[-43:], token[:-5], plant.token, ""):
        device = await plant.connect()
        await device.send("hello", token=wrong)
        answers.append((await error_of(device), (await device.closed()).args))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][1] == (4401, iiot.FAULTS["unauthorized"].message)


# ---- requests


@pytest.mark.parametrize("kind", ["none", "empty", "words", "unknown", "device's", "truncated", "other secret", "basic", "raw"])
async def test_a_request_without_a_good_token_is_refused(plant: Plant, kind: str) -> None:
    device_token = await plant.register("press-1")
    headers = {
        "none": {}, "empty": {"Authorization": ""}, "words": {"Authorization": "Bearer let me in"},
        "unknown": {"Authorization": f"Bearer {iiot.mint('op').text}"}, "device's": {"Authorization": f"Bearer {device_token}"},
        "truncated": {"Authorization": f"Bearer {plant.token[:-1]}"}, "basic": {"Authorization": f"Basic {plant.token}"},
        "other secret": {"Authorization": f"Bearer {plant.token[:-43]}{iiot.mint('op').text[-43:]}"}, "raw": {"Authorization": plant.token},
    }[kind]  # fmt: skip
    async with plant.client.get(plant.url + "/iiot", headers=headers) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert await response.json() == {"error": {"code": "unauthorized", "message": "A valid token is needed."}}


TELEMETRY = "/iiot/press-1/telemetry"
NO_MOMENT = "is not an RFC 3339 time, milliseconds, or a duration back from now such as -15m"
NO_DURATION = "is not a duration such as 60s, 5m, 1h or 1d"
PARAMETERS = [
    ("/iiot?limit=0", "limit", "is not between 1 and 1000"),
    ("/iiot?limit=1001", "limit", "is not between 1 and 1000"),
    ("/iiot?limit=-1", "limit", "is not a whole number"),
    ("/iiot?limit=ten", "limit", "is not a whole number"),
    ("/iiot?limit=1.5", "limit", "is not a whole number"),
    ("/iiot?limit=", "limit", "is not a whole number"),
    ("/iiot?limit=1&limit=2", "limit", "is given more than once"),
    ("/iiot?limit=99999999999999999999", "limit", "is not a whole number"),
    ("/iiot?limit=%D9%A1", "limit", "is not a whole number"),
    ("/iiot?connected=yes", "connected", "is neither true nor false"),
    ("/iiot?connected=True", "connected", "is neither true nor false"),
    ("/iiot?match=a&match=b", "match", "is given more than once"),
    ("/iiot?match=a%00", "match", "holds a zero character"),
    ("/iiot?after=" + "x" * 1_025, "after", "is longer than 1,024 characters"),
    ("/iiot?metric=a", "metric", UNKNOWN),
    ("/iiot/press-1?at=now", "at", UNKNOWN),
    ("/whoami?x=1", "x", UNKNOWN),
    ("/iiot/press-1/events?limit=1001", "limit", "is not between 1 and 1000"),
    ("/iiot/press-1/events?after=last", "after", "is not a whole number"),
    ("/iiot/press-1/events?from=yesterday", "from", NO_MOMENT),
    ("/iiot/press-1/events?to=yesterday", "to", NO_MOMENT),
    ("/iiot/press-1/events?kind=a%00", "kind", "holds a zero character"),
    (TELEMETRY + "?limit=10001", "limit", "is not between 1 and 10000"),
    (TELEMETRY + "?limit=0", "limit", "is not between 1 and 10000"),
    (TELEMETRY + "?from=yesterday", "from", NO_MOMENT),
    (TELEMETRY + "?from=", "from", NO_MOMENT),
    (TELEMETRY + "?from=15m", "from", NO_MOMENT),
    (TELEMETRY + "?from=2026-01-01", "from", NO_MOMENT),
    (TELEMETRY + "?from=2026-01-01T00:00:00", "from", NO_MOMENT),
    (TELEMETRY + "?from=2026-02-30T00:00:00Z", "from", NO_MOMENT),
    (TELEMETRY + "?from=-15x", "from", NO_DURATION),
    (TELEMETRY + "?from=1&from=2", "from", "is given more than once"),
    (TELEMETRY + "?to=-1w", "to", NO_DURATION),
    (TELEMETRY + "?to=1e12", "to", NO_MOMENT),
    (TELEMETRY + "?after=next", "after", NO_MOMENT),
    (TELEMETRY + "?every=0", "every", "is not between 1ms and ten years"),
    (TELEMETRY + "?every=-60s", "every", NO_DURATION),
    (TELEMETRY + "?every=often", "every", NO_DURATION),
    (TELEMETRY + "?every=", "every", NO_DURATION),
    (TELEMETRY + "?every=999999999999d", "every", "is not between 1ms and ten years"),
    (TELEMETRY + "?every=1m&agg=median", "agg", "is not of avg, min, max, sum, count, last"),
    (TELEMETRY + "?every=1m&agg=", "agg", "is not of avg, min, max, sum, count, last"),
    (TELEMETRY + "?every=1m&agg=avg,", "agg", "is not of avg, min, max, sum, count, last"),
    (TELEMETRY + "?every=1m&agg=avg, min", "agg", "is not of avg, min, max, sum, count, last"),
    (TELEMETRY + "?every=1m&agg=avg&agg=min", "agg", "is given more than once"),
    (TELEMETRY + "?agg=avg", "agg", "needs every"),
    (TELEMETRY + "?order=up", "order", "is neither asc nor desc"),
    (TELEMETRY + "?order=ASC", "order", "is neither asc nor desc"),
    (TELEMETRY + "?format=xml", "format", "is neither json nor csv"),
    (TELEMETRY + "?format=csv&limit=5", "limit", "is not for format=csv, which is the whole range"),
    (TELEMETRY + "?format=csv&after=5", "after", "is not for format=csv, which is the whole range"),
    (TELEMETRY + "?format=csv&order=desc", "order", "of format=csv is asc"),
    (TELEMETRY + "?metric=a%00", "metric", "holds a zero character"),
    (TELEMETRY + "?start=1", "start", UNKNOWN),
    ("/provisioning-keys?limit=1001", "limit", "is not between 1 and 1000"),
    ("/tokens?page=2", "page", UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(("path", "parameter", "message"), PARAMETERS, ids=[path[:60] for path, _, _ in PARAMETERS])
async def test_a_bad_query_parameter_is_named(plant: Plant, path: str, parameter: str, message: str) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("GET", path)
    assert (status, body["error"]["code"]) == (400, "bad_query")
    assert body["error"]["message"] == iiot.FAULTS["bad_query"].message
    assert body["error"]["details"] == [{"path": parameter, "message": message}]


async def test_a_body_that_is_not_encoded_as_it_says_is_refused(plant: Plant) -> None:
    headers = {"Authorization": f"Bearer {plant.token}", "Content-Encoding": "gzip"}
    async with plant.client.post(plant.url + "/tokens", data=b"no gzip", headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "bad_request")


async def test_every_bad_query_parameter_is_named(plant: Plant) -> None:
    await plant.register("press-1")
    _, body = await plant.ask("GET", TELEMETRY + "?from=x&to=y&every=z&more=1")
    assert sorted(detail["path"] for detail in body["error"]["details"]) == ["every", "from", "more", "to"]


@pytest.mark.parametrize("path", [TELEMETRY, "/iiot/press-1/events"])
@pytest.mark.parametrize("parameter", ["from", "to"])
@pytest.mark.parametrize(
    "moment", ["-999999999999d", "-999999999999h", "999999999999999", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "-0"]
)
async def test_no_moment_is_too_far_to_be_asked_for(plant: Plant, path: str, parameter: str, moment: str) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("GET", f"{path}?{parameter}={moment}")
    assert status in (200, 400)
    if status == 400:
        assert [detail["path"] for detail in body["error"]["details"]] == [parameter]


BODIES: list[tuple[str, bytes, int, str, list[str]]] = [
    ("/tokens", b"", 422, "invalid", ["name", "role"]),
    ("/tokens", b"{}", 422, "invalid", ["name", "role"]),
    ("/tokens", b"role=admin", 400, "not_json", []),
    ("/tokens", b"{", 400, "not_json", []),
    ("/tokens", b"\xff", 400, "not_json", []),
    ("/tokens", b"[]", 400, "not_an_object", []),
    ("/tokens", b"null", 400, "not_an_object", []),
    ("/tokens", b"[" * 5_000 + b"]" * 5_000, 422, "too_deep", []),
    ("/tokens", b'{"name":"a","role":"owner"}', 422, "invalid", ["role"]),
    ("/tokens", b'{"name":"a","role":"platform"}', 403, "forbidden", []),
    ("/tokens", b'{"name":1,"role":"viewer"}', 422, "invalid", ["name"]),
    ("/tokens", b'{"name":"a","role":["viewer"]}', 422, "invalid", ["role"]),
    ("/tokens", b'{"name":"a","role":"viewer","tenant":"other"}', 422, "invalid", ["tenant"]),
    ("/tokens", b'{"name":"a","role":"viewer","expires_at":"soon"}', 422, "invalid", ["expires_at"]),
    ("/tokens", b'{"name":"a","role":"viewer","expires_at":18446744073709551616}', 422, "invalid", ["expires_at"]),
    ("/provisioning-keys", b'{"uses":0}', 422, "invalid", ["uses"]),
    ("/provisioning-keys", b'{"uses":-1}', 422, "invalid", ["uses"]),
    ("/provisioning-keys", b'{"uses":1.5}', 422, "invalid", ["uses"]),
    ("/provisioning-keys", b'{"uses":"5"}', 422, "invalid", ["uses"]),
    ("/provisioning-keys", b'{"uses":true}', 422, "invalid", ["uses"]),
    ("/provisioning-keys", b'{"uses":9223372036854775808}', 422, "invalid", ["uses"]),
    ("/provisioning-keys", b'{"expires_at":true}', 422, "invalid", ["expires_at"]),
    ("/provisioning-keys", b'{"expires_at":1e12}', 422, "invalid", ["expires_at"]),
    ("/provisioning-keys", b'{"key":"mine"}', 422, "invalid", ["key"]),
    ("/iiot/press-1/report", b"", 422, "invalid", ["what"]),
    ("/iiot/press-1/report", b'{"what":"telemetry"', 400, "not_json", []),
    ("/tokens", b'{"name":"' + b"x" * 300_000 + b'","role":"viewer"}', 413, "too_large", []),
]


@pytest.mark.parametrize(
    ("path", "content", "status", "code", "paths"), BODIES, ids=[f"{path} {content[:50]!r}" for path, content, *_ in BODIES]
)
async def test_a_bad_body_is_refused(plant: Plant, path: str, content: bytes, status: int, code: str, paths: list[str]) -> None:
    await plant.register("press-1")
    got, body = await plant.ask("POST", path, data=content)
    assert (got, body["error"]["code"]) == (status, code)
    assert body["error"]["message"] == iiot.FAULTS[code].message
    assert [detail["path"] for detail in body["error"].get("details", [])] == paths
    no_exception_in(json.dumps(body))
    assert (await plant.get("/provisioning-keys"))["items"] == []
    assert len((await plant.get("/tokens"))["items"]) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"), ("GET", "/iiot/", 404, "not_found"),
        ("GET", "/iiot/a/b/c", 404, "not_found"), ("GET", "/iiot/press-9", 404, "not_found"), ("GET", "/iiot/a%20b", 404, "not_found"),
        ("GET", "/iiot/press-9/events", 404, "not_found"), ("GET", "/iiot/press-9/telemetry", 404, "not_found"),
        ("GET", "/iiot/press-9/telemetry?every=1m", 404, "not_found"), ("GET", "/iiot/press-9/telemetry?format=csv", 404, "not_found"),
        ("GET", "/iiot/press-9/telemetry?format=csv&every=1m", 404, "not_found"), ("DELETE", "/tokens/nothing", 404, "not_found"),
        ("DELETE", "/provisioning-keys/nothing", 404, "not_found"), ("GET", "/iiot/a%00b", 404, "not_found"),
        ("DELETE", "/iiot", 405, "method_not_allowed"), ("PATCH", "/whoami", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
    ],
)  # fmt: skip
async def test_what_is_not_there_is_refused_in_json(plant: Plant, method: str, path: str, status: int, code: str) -> None:
    got, body = await plant.ask(method, path)
    assert (got, body) == (status, {"error": {"code": code, "message": iiot.FAULTS[code].message}})


async def test_a_refused_method_is_told_which_are_allowed(plant: Plant) -> None:
    async with plant.client.delete(plant.url + "/tokens") as response:
        assert response.status == 405
        assert set(response.headers["Allow"].split(",")) >= {"GET", "POST"}


@pytest.mark.parametrize(
    "request_text",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /iiot HTTP/1.1\r\nHost: x\r\nBad Header: a\r\n\r\n",
        b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /tokens HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"GET /device HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
    ],
    ids=["no HTTP", "bad header", "long line", "bad length", "bad key"],
)
async def test_what_is_no_http_is_answered_without_the_text_of_an_exception(plant: Plant, request_text: bytes) -> None:
    host, port = plant.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request_text)
        async with asyncio.timeout(plants.PATIENCE):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            assert length is not None
            body = (await reader.readexactly(int(length[1]))).decode()
    finally:
        writer.close()
        await writer.wait_closed()
    assert " 400 " in head.splitlines()[0]
    for word in ("Invalid", "Got more than", "Bad Header", "bytearray", "b'", "abc", "key"):
        assert word not in body


async def test_a_damaged_database_is_not_explained_to_the_client(plant: Plant) -> None:
    token, device = plant.token, await plant.device("press-1")
    iiot.change_database(plant.database, lambda connection: connection.execute("alter table event rename to misplaced"))
    status, body = await plant.ask("GET", "/iiot/press-1/events", token=token)
    assert (status, body) == (500, {"error": {"code": "server_fault", "message": "The server failed; its log says why."}})
    iiot.change_database(plant.database, lambda connection: connection.execute("alter table misplaced rename to event"))
    assert len((await plant.get("/iiot/press-1/events"))["items"]) == 2
    await device.store({"values": {"n": 1}})
