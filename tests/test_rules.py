"""The pure functions: times, durations, frames, fields of CSV, WebSocket frames, tokens, statements of SQL."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import agent
import iiot

CODEC = iiot.Codec(iiot.Limits())


def decode(content: object) -> iiot.Frame:
    return CODEC.frame(json.dumps(content).encode())


def refusal_of(data: bytes) -> iiot.Refusal:
    with pytest.raises(iiot.Refusal) as caught:
        CODEC.frame(data)
    return caught.value


def sqlite(expression: str, value: object) -> Any:
    """What SQLite makes of `expression` over the bound `value`."""
    with closing(sqlite3.connect(":memory:")) as connection:
        return connection.execute(f"select {expression} from (select :value as value)", {"value": value}).fetchone()[0]


# ---- times and durations


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("2000-01-01T00:00:00Z", 946_684_800_000),
        ("2026-01-02T03:04:05Z", 1_767_323_045_000),
        ("2026-01-02T03:04:05.6Z", 1_767_323_045_600),
        ("2026-01-02T03:04:05.678Z", 1_767_323_045_678),
        ("2026-01-02T03:04:05.678912Z", 1_767_323_045_679),
        ("2026-01-02T03:04:05.678123456Z", 1_767_323_045_678),
        ("2026-01-02t03:04:05z", 1_767_323_045_000),
        ("2026-01-02 03:04:05Z", 1_767_323_045_000),
        ("2026-01-02T05:04:05+02:00", 1_767_323_045_000),
        ("2026-01-01T22:34:05-04:30", 1_767_323_045_000),
        ("1970-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:59.999Z", -1),
        ("2024-02-29T00:00:00Z", 1_709_164_800_000),
        ("9999-12-31T23:59:59.999Z", iiot.FUTURE),
    ],
)
def test_rfc3339_times_are_read(text: str, milliseconds: int) -> None:
    assert iiot.parse_rfc3339(text) == milliseconds


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "2026-01-02", "2026-01-02T03:04:05", "2026-01-02T03:04Z", "20260102T030405Z", "2026-1-2T03:04:05Z",
        "2026-02-29T00:00:00Z", "2026-13-01T00:00:00Z", "2026-00-01T00:00:00Z", "2026-01-02T24:00:01Z", "2026-01-02T03:60:05Z",
        "2026-01-02T03:04:05+2:00", "2026-01-02T03:04:05+25:00", "2026-01-02T03:04:05.Z", "2026-01-02T03:04:05,5Z",
        " 2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z\n", "0000-01-01T00:00:00Z", "2026-W01-1T00:00:00Z",
        "\uff12\uff10\uff12\uff16-01-02T03:04:05Z", "12026-01-02T03:04:05Z",
    ],
)  # fmt: skip
def test_what_is_no_rfc3339_time_is_none(text: str) -> None:
    assert iiot.parse_rfc3339(text) is None


@given(st.integers(-iiot.DAY, iiot.FUTURE))
@example(iiot.FUTURE)
@example(-1)
def test_a_time_is_read_back_as_it_was_written(moment: int) -> None:
    text = iiot.format_time(moment)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert iiot.parse_rfc3339(text) == moment


@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)),
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
)
def test_an_offset_names_the_same_moment(naive: datetime, minutes: int) -> None:
    moment = naive.replace(microsecond=naive.microsecond // 1000 * 1000, tzinfo=timezone(timedelta(minutes=minutes)))
    exact = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert iiot.parse_rfc3339(moment.isoformat()) == exact


@given(st.integers(0, iiot.FUTURE))
def test_the_database_writes_a_time_as_the_program_does(moment: int) -> None:
    assert sqlite(iiot.time_sql("value"), moment) == iiot.format_time(moment)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("250ms", 250), ("60s", 60_000), ("5m", 300_000), ("1h", 3_600_000), ("2d", 172_800_000), ("90", 90_000), ("0s", 0), ("007s", 7_000)],
)
def test_durations_are_read(text: str, milliseconds: int) -> None:
    assert iiot.parse_duration(text) == milliseconds


@pytest.mark.parametrize("text", ["", "s", "-5s", "1.5h", "5 m", "1w", "5M", "5m ", "1h30m", "1e3s", "0x10", "9" * 13])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(iiot.Invalid):
        iiot.parse_duration(text)


NOW = 1_767_323_045_000


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("-15m", NOW - 900_000), ("-250ms", NOW - 250), ("-1d", NOW - 86_400_000), ("-10", NOW - 10_000), ("0", 0),
        ("1767323045678", 1_767_323_045_678), ("2026-01-02T03:04:05.678Z", 1_767_323_045_678),
    ],
)  # fmt: skip
def test_a_moment_is_a_time_milliseconds_or_a_duration_back(text: str, milliseconds: int) -> None:
    assert iiot.parse_moment(text, NOW) == milliseconds


@pytest.mark.parametrize(
    "text", ["", "-", "15m", "--15m", "+15m", "now", "1.5", "1_000", "\u0661\u0662", "-2026-01-01T00:00:00Z", "9" * 20]
)
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(iiot.Invalid):
        iiot.parse_moment(text, NOW)


@given(st.from_regex(r"-?[0-9]{1,20}(ms|s|m|h|d|)", fullmatch=True))
@example("-" + "9" * 12 + "d")
def test_whatever_moment_is_read_the_database_can_be_asked_for(text: str) -> None:
    try:
        moment = iiot.parse_moment(text, NOW)
    except iiot.Invalid:
        return
    assert -iiot.INTEGERS <= moment < iiot.INTEGERS


def test_timestamps_lie_between_the_year_2000_and_a_day_from_now() -> None:
    ahead = iiot.now_ms() + iiot.DAY
    for good in (iiot.EARLIEST, iiot.now_ms(), ahead - 60_000, "2000-01-01T00:00:00Z"):
        iiot.check_timestamp(good)
    for bad in (
        iiot.EARLIEST - 1,
        ahead + 60_000,
        0,
        -1,
        1_767_323_045,
        2**63,
        2**64,
        -(2**70),
        "1999-12-31T23:59:59.999Z",
        "2999-01-01T00:00:00Z",
    ):
        with pytest.raises(iiot.Invalid, match="is not between 2000-01-01 and a day from now"):
            iiot.check_timestamp(bad)


@pytest.mark.parametrize("value", [True, False, 1.0, 1767323045000.0, "yesterday", "1767323045000", [], {}, b""])
def test_a_timestamp_is_an_integer_or_an_rfc3339_text(value: object) -> None:
    with pytest.raises(iiot.Invalid, match="must be an integer of milliseconds or an RFC 3339 time"):
        iiot.check_timestamp(value)


# ---- names and numbers


@pytest.mark.parametrize("name", ["a", "A", "0", "press-1", "00:1A:2b:3C:4d:5E", "line_2.press", "x" * 64, "...", "a-", "_", ":"])
def test_good_device_names(name: str) -> None:
    assert iiot.check_device_name(name) == name


@pytest.mark.parametrize("name", [".", ".."])
def test_a_step_in_a_path_is_no_name(name: str) -> None:
    for check in (iiot.check_device_name, iiot.check_tenant_name):
        with pytest.raises(iiot.Invalid, match="is not allowed as a name"):
            check(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "a\n", "a\0", "é", "a*", "a?", "%41", "a,b", "\u0661", None, 1, True, ["a"]])
def test_bad_device_names(name: object) -> None:
    with pytest.raises(iiot.Invalid):
        iiot.check_device_name(name)


@pytest.mark.parametrize("value", [1, 2, 2**31, 2**53 + 1, 2**63 - 1])
def test_good_sequence_numbers(value: int) -> None:
    assert iiot.check_seq(value) == value


@pytest.mark.parametrize("value", [0, -1, 2**63, 2**64, 2**100, True, 1.0, 1e3, "1", None, [1]])
def test_bad_sequence_numbers(value: object) -> None:
    with pytest.raises(iiot.Invalid):
        iiot.check_seq(value)


# ---- frames

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.isprintable)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1)
VALUES = NUMBERS | st.booleans() | TEXTS
MOMENTS = st.integers(iiot.EARLIEST, 1_767_323_045_000)
SAMPLES = st.lists(
    st.fixed_dictionaries({"values": st.dictionaries(NAMES, VALUES, max_size=4)}, optional={"ts": MOMENTS | MOMENTS.map(iiot.format_time)}),
    max_size=4,
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS, nested, max_leaves=10
)
FIELDS = st.sampled_from(["type", "seq", "samples", "ts", "values", "token", "agent", "time", "key", "device", "more"])
NEARLY = st.fixed_dictionaries(
    {"type": st.sampled_from(["telemetry", "hello", "provision"])},
    optional={
        "seq": JSON | st.integers(1, 9),
        "samples": JSON | st.lists(st.dictionaries(FIELDS, JSON | MOMENTS | st.dictionaries(TEXTS, JSON, max_size=2), max_size=3)),
        "token": JSON, "agent": JSON, "time": JSON, "key": JSON, "device": JSON, "more": JSON,
    },
)  # fmt: skip


def same(sent: object, got: object) -> bool:
    """Equal in type and value: 1, 1.0 and True are three different things."""
    return type(sent) is type(got) and sent == got


@given(st.integers(1, 2**63 - 1), SAMPLES)
@example(1, [{"values": {"a": 1e300, "b": 2**63 - 1, "c": -(2**63), "d": 9.3e18, "e": -9.3e18, "f": 1.8446744073709552e19}}])
@example(1, [{"values": {"a": 9223372036854775808.0, "b": -9223372036854775808.0, "c": 5e-324, "d": 1.7976931348623157e308, "e": True}}])
def test_every_good_telemetry_frame_is_read_exactly(seq: int, samples: list[dict[str, Any]]) -> None:
    frame = decode({"type": "telemetry", "seq": seq, "samples": samples})
    assert isinstance(frame, iiot.Telemetry)
    assert frame.seq == seq
    assert len(frame.samples) == len(samples)
    for sample, sent in zip(frame.samples, samples, strict=True):
        ts = sent.get("ts")
        assert sample.ts == (iiot.parse_rfc3339(ts) if isinstance(ts, str) else ts)
        assert list(sample.values) == list(sent["values"])
        assert all(same(sent["values"][name], value) for name, value in sample.values.items())


KNOWN_TEXTS = re.compile(
    r"is (missing|not a known field|not an object|not an array|not a positive integer of at most 63 bits"
    r"|not between 2000-01-01 and a day from now|not a string of at most 1024 characters|not allowed as a name"
    r"|not a number of 63 bits, a boolean or a string of 1024 characters)|has a name that is not 1 to 128 printable characters"
    r"|must be an integer of milliseconds or an RFC 3339 time|must have 1 to 64 letters, digits or \. _ : -"
)


def check_refusal(refusal: iiot.Refusal) -> None:
    """Nothing that an exception said is in what the peer is told."""
    assert refusal.fault.code in ("not_json", "not_an_object", "too_deep", "unknown_type", "invalid")
    assert bool(refusal.errors) == (refusal.fault.code == "invalid")
    for error in refusal.errors:
        assert KNOWN_TEXTS.fullmatch(error.message), error


@given(JSON | NEARLY)
def test_whatever_json_comes_is_a_frame_or_a_refusal_in_known_words(content: object) -> None:
    try:
        decode(content)
    except iiot.Refusal as refusal:
        check_refusal(refusal)


IN_PIECES = iiot.Codec(attrs.evolve(iiot.Limits(), piece_bytes=30))
BIG = '{"type":"telemetry","seq":1,"samples":[{"values":{}},{"values":{}},{"values":{"a":%s}}]}'


def outcome(decode_text: Callable[[bytes], Any], text: str, before: list[Any] | None = None) -> Any:
    """What is made of a text, or the refusal; with `before`, after those."""
    try:
        return decode_text(text.encode())
    except iiot.Refusal as refusal:
        return refusal if before is None else [*before, refusal]


@given((NEARLY | SAMPLES.map(lambda samples: {"type": "telemetry", "seq": 1, "samples": samples})).map(json.dumps))
@example(BIG % "18446744073709551616")
@example(BIG % "1e300")
@example(BIG % '"\\u0000"')
@example('{"type":"telemetry","seq":1,"samples":[]}')
@example('{"type":"telemetry","samples":[]}')
@example('{"type":"telemetry","samples":[' + "[" * 1_000 + "]" * 1_000 + "]}")
@example('{"seq":1,"samples":[{"values":{"a":1}},{"values":{"b":2}},{"values":{"},{":3}}] , "type" : "telemetry"}')
@example('{"type":"telemetry","seq":1,"samples":[{"values":{"a":1}},{"values":{"b":"%s"}},{"values":{"c":2}}]}' % ("},{" * 9))
@example('{"type":"telemetry","seq":1,"samples":[{"values":{"a":1}}],"samples":[{"values":{"a":[{},{},{},{},{}]}}]}')
@example('{"type":"telemetry","seq":1,"samples":[{"values":{"a":1}},{"values":{"b":2}},{"values":{"c":3}}],"seq":2}')
@example('{"type":"telemetry","seq":1,"samples":[{"values":{"a":1}}, {"values":{"b":2}}],"samples":[{"values":{"c":3}}]}')
@example('{"type":"telemetry","type":"state","seq":1,"samples":[{"values":{"a":1}},{"values":{"b":2}},{"values":{"c":3}}]}')
@example('{"type":"telemetry","seq":1,"samples":[{"values":{"a":1}},{"values":{"b":2}},{"values":{"c":3}}],"more":[]}')
@example('{"type":"telemetry","seq":1,"samples":[{"values":{"abcdefghijk":1}},{"values":{"b":2}}],"samples":[{"values":{"c":3}}]}')
@example('{"samples":[],"more":[{"abcdefghijklmnopqrstuvw":1},{}],"seq":1,"type":"telemetry"}')
@example('{"samples":[{"values":{"abcdefghijklmnopqrstuvw":1}},{}],"seq":1,"type":"telemetry"}')
def test_a_frame_in_pieces_is_the_frame_and_is_refused_for_the_same_reason(text: str) -> None:
    whole, (*pauses, piece) = outcome(CODEC.frame, text), outcome(lambda data: list(IN_PIECES.in_pieces(data)), text, [])
    assert pauses == [None] * len(pauses)
    if isinstance(whole, iiot.Refusal):
        assert isinstance(piece, iiot.Refusal)
        assert piece.fault is whole.fault
        assert set(piece.errors) <= set(whole.errors), "it stops at the first piece at fault"
        assert bool(piece.errors) == bool(whole.errors)
    else:
        assert piece == whole


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"")
@example(b"\xff\xfe{\x00}\x00")
@example(b"\xef\xbb\xbf{}")
@example(b'{"type":"\xff"}')
@example(b'{"type":"hello","token":"\\ud800"}')
@example(b'{"type":"telemetry","seq":1' + b"0" * 5_000 + b',"samples":[]}')
@example(b'{"type":"telemetry","seq":1' + b"0" * 300 + b',"samples":[]}')
@example(b'{"type":"hello","token":"x","time":-1' + b"0" * 300 + b"}")
def test_whatever_bytes_come_are_a_frame_or_a_refusal_in_known_words(data: bytes) -> None:
    try:
        CODEC.frame(data)
    except iiot.Refusal as refusal:
        check_refusal(refusal)
    CODEC.seq_of(data)


@pytest.mark.parametrize("depth", [900, 995, 1_000, 1_020, 1_100, 10_000, 100_000])
@pytest.mark.parametrize("where", ["agent", "more"])
def test_however_deep_a_frame_is_it_is_refused(depth: int, where: str) -> None:
    data = b'{"type":"hello","token":"x","%s":%s}' % (where.encode(), b"[" * depth + b"]" * depth)
    assert refusal_of(data).fault.code in ("invalid", "too_deep")
    assert refusal_of(b'{"a":' * depth + b"1" + b"}" * depth).fault.code in ("unknown_type", "too_deep")


@pytest.mark.parametrize(
    ("data", "seq"),
    [
        (b'{"type":"nonsense","seq":7}', 7), (b'{"seq":0}', 0), (b'{"seq":-3}', -3), (b'{"seq":9223372036854775808}', 2**63),
        (b'{"seq": 36893488147419103232 }', 2**65), (b'{"seq":7,"values":{"seq":9}}', 7),
        (b'{"type":"telemetry","seq":7,"samples":[{"values":{"a":NaN}}]}', 7), (b'\xef\xbb\xbf{"seq":7}', 7),
        (b'{"seq" : 7, "a": "\xe9"}', 7), (b'{"seq":7,"a":"\\ud800"}', 7), (b'{"seq":7,"a":1.}', 7), (b'{"seq":7', 7),
        (b'{"seq":7,"samples":[{"values":{"seq":7,"a":NaN}}]}', 7),
        (b'{"seq":7,"samples":[{"values":{"seq":8,"a":NaN}}]}', None), (b'{"seq":7.5,"a":NaN}', None), (b'{"seq":01}', 1),
        (b'{"seq":7e3,"a":NaN}', None), (b"", None), (b"7", None), (b'"seq"', None), (b"[7]", None), (b"null", None),
        (b'{"seq":"7"}', None), (b'{"seq":true}', None), (b'{"seq":7.5}', None), (b"{}", None),
        (b'{"seq":1' + b"0" * 50 + b"}", None),
    ],
)  # fmt: skip
def test_the_number_of_a_bad_frame_is_found_as_the_device_wrote_it(data: bytes, seq: int | None) -> None:
    assert CODEC.seq_of(data)[0] == seq


@pytest.mark.parametrize("seq", [0, -3, 2**63, 10**39])
def test_an_error_repeats_a_number_that_is_out_of_range(seq: int) -> None:
    assert json.loads(iiot.encode(iiot.Error("invalid", "No.", seq)))["seq"] == seq


def test_a_frame_of_the_server_leaves_out_what_says_nothing() -> None:
    assert json.loads(iiot.encode(iiot.Error("not_json", "No."))) == {"type": "error", "code": "not_json", "message": "No."}
    full = iiot.encode(iiot.Error("invalid", "No.", 3, (iiot.FieldError("seq", "is missing"),)))
    assert json.loads(full)["errors"] == [{"path": "seq", "message": "is missing"}]
    welcome = json.loads(iiot.encode(iiot.Welcome("a", "default", 1, 0, "2026-01-01T00:00:00.000Z", 20.0)))
    assert welcome["seq"] == 0
    assert welcome["config"] is None


@given(st.integers(1, 2**63 - 1))
def test_an_ack_is_json(seq: int) -> None:
    assert json.loads(iiot.encode_ack(seq)) == {"type": "ack", "seq": seq}


# ---- values as JSON and CSV


def printed(value: object) -> Any:
    """A value after its way through SQLite's JSON."""
    text = sqlite(f"json_array({iiot.exact_sql('value')})", value)
    return json.loads(iiot.shortened(text))[0]


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(0.1)
@example(0.1 + 0.2)
@example(1e15 + 0.3)
@example(123456789.12345678)
@example(2.0**53 + 2)
@example(1e22)
@example(1e300)
@example(-1.1504217457648656e164)
@example(1.7976931348623157e308)
@example(5e-324)
def test_the_database_prints_a_double_that_reads_back_as_itself(value: float) -> None:
    assert same(value, printed(value))


@given(st.integers(-(2**63), 2**63 - 1) | TEXTS)
def test_integers_and_texts_are_printed_as_json_exactly(value: int | str) -> None:
    assert same(value, printed(value))


def test_a_sum_past_the_largest_double_is_null() -> None:
    assert printed(math.inf) is None
    assert printed(-math.inf) is None


@given(st.lists(VALUES | st.none(), min_size=2, max_size=4))
@example(["", ""])
@example(['"', ","])
@example(["\r\n", " a "])
@example(['say "no"', "1.5"])
def test_fields_of_csv_are_read_back_as_they_were(values: list[Any]) -> None:
    text = ",".join(map(iiot.csv_field, values)) + "\n"
    (fields,) = csv.reader(io.StringIO(text, newline=""), strict=True)
    for field, value in zip(fields, values, strict=True):
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert same(value, type(value)(field))
        else:
            assert field == ("" if value is None else str(value))


METRICS = ["m", "Z", "null", "motor 1", "a,b", 'q"', "é", "a],[b", "1.5", "\\"]
CELLS = NUMBERS | st.none() | st.sampled_from([*METRICS, "", "],[", 'Z","m",', ",null", "\n", '"'])


@given(st.sampled_from(METRICS), st.lists(st.tuples(MOMENTS.map(iiot.format_time), CELLS, CELLS), max_size=4))
@example("Z", [("2026-01-01T00:00:00.000Z", "Z", "Z"), ("2026-01-01T00:00:00.001Z", None, 1)])
def test_csv_of_one_metric_is_read_back_as_it_was(metric: str, rows: list[tuple[str, Any, Any]]) -> None:
    text = iiot.csv_lines(orjson.dumps([(time, metric, *cells) for time, *cells in rows])).decode()
    got = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert [fields[:2] for fields in got] == [[time, metric] for time, *_ in rows]
    for fields, (_, *cells) in zip(got, rows, strict=True):
        assert len(fields) == 4
        for field, cell in zip(fields[2:], cells, strict=True):
            assert field == (cell or "") if cell is None or isinstance(cell, str) else type(cell)(field) == cell


@pytest.mark.parametrize(
    ("field", "written"),
    [("plain", "plain"), ("", ""), ("a,b", '"a,b"'), ('6" pipe', '"6"" pipe"'), ("a\nb", '"a\nb"'), ("a\rb", '"a\rb"')],
)
def test_only_a_csv_field_that_needs_quotes_has_them(field: str, written: str) -> None:
    assert iiot.csv_field(field) == written


# ---- WebSocket frames


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 100_000])
@pytest.mark.parametrize("opcode", [1, 2, 8, 9, 10])
def test_a_websocket_frame_is_final_unmasked_and_states_its_length_shortly(opcode: int, length: int) -> None:
    payload = bytes(index % 251 for index in range(length))
    frame = iiot.websocket_frame(opcode, payload)
    assert frame[0] == 0x80 | opcode
    if length < 126:
        assert (frame[1], frame[2:]) == (length, payload)
    elif length < 65_536:
        assert (frame[1], struct.unpack("!H", frame[2:4])[0], frame[4:]) == (126, length, payload)
    else:
        assert (frame[1], struct.unpack("!Q", frame[2:10])[0], frame[10:]) == (127, length, payload)


# ---- tokens


@pytest.mark.parametrize("kind", ["dev", "op", "prov"])
def test_a_token_proves_itself_and_no_other(kind: str) -> None:
    token, other = iiot.mint(kind), iiot.mint(kind)
    assert re.fullmatch(rf"iiot_{kind}_[0-9a-f]{{16}}_[A-Za-z0-9_-]{{43}}", token.text)
    assert iiot.take_apart(kind, token.text) == token.stored
    assert token.stored.id != other.stored.id
    assert token.stored.secret_hash != other.stored.secret_hash
    assert len(token.stored.secret_hash) == 32
    assert token.text[-43:].encode() not in token.stored.secret_hash + token.stored.id.encode()


def test_whatever_is_not_a_whole_token_of_the_kind_is_refused() -> None:
    token = iiot.mint("dev").text
    wrong = [token[:length] for length in range(len(token))]
    wrong += [token[length:] for length in range(1, len(token))]
    wrong += [
        iiot.mint("op").text,
        iiot.mint("prov").text,
        token + "A",
        token + "\n",
        " " + token,
        token.upper(),
        token.replace("iiot", "tiio"),
    ]
    for text in wrong:
        assert iiot.take_apart("dev", text) is None


@given(st.text(max_size=90))
def test_no_text_breaks_the_check_of_a_token(text: str) -> None:
    assert iiot.take_apart("dev", text) is None


@pytest.mark.parametrize(
    ("holder", "allowed"),
    [
        ("viewer", {"viewer", "any"}),
        ("operator", {"viewer", "operator", "any"}),
        ("admin", {"viewer", "operator", "admin", "any"}),
        ("platform", {"platform", "any"}),
        ("public", {"any", "public"}),
        ("nonsense", {"any", "nonsense"}),
    ],
)
def test_a_role_may_what_the_roles_below_it_may(holder: str, allowed: set[str]) -> None:
    principal = iiot.Principal("id", "name", holder, None, None)
    roles = {"viewer", "operator", "admin", "platform", "any", "public", "nonsense"}
    assert {role for role in roles if principal.may(role)} == allowed


# ---- the rest


def test_a_script_falls_into_its_statements() -> None:
    script = """-- a comment; with a semicolon
        create table a (x text default 'one; two');
        create table b (y);
        create trigger t after insert on a begin
            insert into b values (new.x);  -- inside; the trigger
            insert into b values (';');
        end;
        insert into a values ('x');
    """
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("begin")
        for statement in iiot.statements(script):
            connection.execute(statement)
        assert connection.in_transaction
        assert connection.execute("select count(*) from b").fetchone() == (2,)


def test_the_schema_falls_into_statements_that_make_every_table() -> None:
    found = list(iiot.statements(iiot.schema_text()))
    assert "".join(found).strip() == iiot.schema_text().strip()
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in found:
            connection.execute(statement)
        made = connection.execute("select count(*) from sqlite_schema where sql is not null and name not like 'sqlite_%' "
                                  "and name not in (select name from pragma_table_list where type = 'shadow')").fetchone()[0]
    assert made == len(re.findall(r"^create ", iiot.schema_text(), re.MULTILINE))


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.5, 300))
def test_the_wait_before_another_attempt_is_bounded(attempt: int, jitter: float, most: float) -> None:
    assert 0 <= agent.backoff(attempt, most, jitter) <= most
    assert math.isclose(agent.backoff(attempt, most, 1.0), min(most, 0.5 * 2 ** min(attempt, 16)))


def test_every_fault_has_a_reason_that_fits_a_close_frame_and_a_code_of_the_contract() -> None:
    contract = {1001, 1009, 1011, 1013, 4400, 4401, 4403, 4408, 4409, 4429}
    for code, fault in iiot.FAULTS.items():
        assert fault.code == code
        assert 0 < len(fault.message.encode()) <= 123
        assert fault.close in contract | {1000, 1002, 1006}
        assert 400 <= fault.status < 600
    assert contract <= {fault.close for fault in iiot.FAULTS.values()}
