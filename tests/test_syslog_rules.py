"""Syslog messages and their frames as pure functions: what senders really send, and the answer to it written down."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from itertools import pairwise
from typing import Any

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import iiot

BERLIN_SUMMER = timezone(timedelta(hours=2))
TOKEN = iiot.mint("log").text
OTHER = iiot.mint("log").text
OPERATOR = iiot.mint("op").text
NUMBER = "0F1E2D3C4B5A69788796A5B4C3D2E1F0"


def at(text: str) -> int:
    moment = iiot.parse_rfc3339(text)
    assert moment is not None
    return moment


NOW = at("2026-06-03T12:00:00Z")


def parsed(line: str | bytes, now: int = NOW, zone: tzinfo | None = UTC) -> iiot.SyslogMessage:
    return iiot.parse_syslog(line.encode() if isinstance(line, str) else line, now, zone)


def told(line: str | bytes, now: int = NOW, zone: tzinfo | None = UTC) -> dict[str, Any]:
    """What a line says, without what it does not."""
    shown = {name: value for name, value in attrs.asdict(parsed(line, now, zone)).items() if value not in (None, {})}
    return shown | ({"time": iiot.format_time(shown["time"])} if "time" in shown else {})


# ---- RFC 5424


def test_every_part_of_a_message_is_kept() -> None:
    line = '<165>1 2026-06-03T10:14:15.003Z press.example.com evntslog 812 ID47 [p@32473 iut="3" id="1"][meta sequenceId="7"] An event'
    message = parsed(line)
    assert (message.facility, message.severity, message.level) == (20, 5, "notice")
    assert told(line) == {
        "message": "An event",
        "priority": 165,
        "time": "2026-06-03T10:14:15.003Z",
        "host": "press.example.com",
        "app_name": "evntslog",
        "process_id": "812",
        "message_id": "ID47",
        "structured_data": {"p@32473": {"iut": "3", "id": "1"}, "meta": {"sequenceId": "7"}},
    }


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("<14>1 - h a - - - x", {"message": "x", "priority": 14, "host": "h", "app_name": "a"}),
        ("<14>1 - - - - - -", {"message": "", "priority": 14}),
        ("<14>1 - - - - -", {"message": "", "priority": 14}),  # structured data left out, and the text
        (r'<14>1 - - - - - [p@1 k="a\\b\]\"c"] x', {"message": "x", "priority": 14, "structured_data": {"p@1": {"k": 'a\\b]"c'}}}),
        (r'<14>1 - - - - - [p@1 k="\A/x"]', {"message": "", "priority": 14, "structured_data": {"p@1": {"k": r"\A/x"}}}),
        ('<14>1 - - - - - [p@1 k="[a]"] x', {"message": "x", "priority": 14, "structured_data": {"p@1": {"k": "[a]"}}}),
        ('<14>1 - - - - - [p@1 k="1" k="2" k="3"] x', {"message": "x", "priority": 14, "structured_data": {"p@1": {"k": ["1", "2", "3"]}}}),
        ('<14>1 - - - - - [p@1 k="1"][p@1 k="2"] x', {"message": "x", "priority": 14, "structured_data": {"p@1": {"k": ["1", "2"]}}}),
        ('<14>1 - - - - - [p@1 k=""]', {"message": "", "priority": 14, "structured_data": {"p@1": {"k": ""}}}),
        ("<14>1 - - - - - [p@1] x", {"message": "x", "priority": 14, "structured_data": {"p@1": {}}}),
        # no space before the text: after an element it is seen where the text begins, after - it is not
        ('<14>1 - - - - - [p@1 k="v"]x', {"message": "x", "priority": 14, "structured_data": {"p@1": {"k": "v"}}}),
        ("<14>1 - - - - - -x", {"message": "-x", "priority": 14}),
        # a byte order mark before the text, with and without a space
        ("<14>1 - - - - - - \ufeffüber", {"message": "über", "priority": 14}),
        ("<14>1 - - - - - -\ufeffüber", {"message": "über", "priority": 14}),
        ('<14>1 - - - - - [p@1 k="v"]\ufeffx', {"message": "x", "priority": 14, "structured_data": {"p@1": {"k": "v"}}}),
        ("\ufeff<14>1 - - - - - - x", {"message": "x", "priority": 14}),
        # structured data left out, and text in brackets
        ("<14>1 - h a 7 - [7]: text", {"message": "[7]: text", "priority": 14, "host": "h", "app_name": "a", "process_id": "7"}),
        ("<14>1 - - - - - [error] text", {"message": "[error] text", "priority": 14}),
        ("<14>1 - - - - - [] text", {"message": "[] text", "priority": 14}),
        ("<14>1 - - - - - - [error] text", {"message": "[error] text", "priority": 14}),
        # not well-formed from here on
        ('<14>1 - - - - - [a@1 k="v"][b@1 k="v] x', {"message": '[b@1 k="v] x', "priority": 14, "structured_data": {"a@1": {"k": "v"}}}),
        ("<14>1 - - - - - [a@1 k=v] x", {"message": "[a@1 k=v] x", "priority": 14}),
        (r'<14>1 - - - - - [a@1 k="C:\"] x', {"message": r'[a@1 k="C:\"] x', "priority": 14}),
        ("<14>1 - h a", {"message": "1 - h a", "priority": 14}),
        ("<14>1 user logged in from here - x", {"message": "1 user logged in from here - x", "priority": 14}),
        ("<14>2 - h a - - - x", {"message": "2 - h a - - - x", "priority": 14}),  # a version that is not known
        ("<14>1 - h  a - - - x", {"message": "1 - h  a - - - x", "priority": 14}),  # an empty field: which one cannot be told
        ("<14>1 - fd00::7 a - - - x", {"message": "x", "priority": 14, "host": "fd00::7", "app_name": "a"}),
        ("<14>1 - 2600:1f14:: a - - - x", {"message": "x", "priority": 14, "host": "2600:1f14::", "app_name": "a"}),
    ],
)
def test_rfc_5424(line: str, answer: dict[str, Any]) -> None:
    assert told(line) == answer


@pytest.mark.parametrize(
    ("stamp", "time", "as_sent"),
    [
        ("2026-06-03T10:00:00Z", "2026-06-03T10:00:00.000Z", False),
        ("2026-06-03T10:00:00.123456+02:00", "2026-06-03T08:00:00.123Z", False),
        ("2026-06-03T10:00:00.123456789Z", "2026-06-03T10:00:00.123Z", False),
        ("2026-06-03T10:00:00+0200", "2026-06-03T08:00:00.000Z", False),
        ("2026-06-03T10:00:00", "2026-06-03T08:00:00.000Z", False),  # the server's zone
        ("1970-01-01T00:00:07Z", None, True),  # a clock that was never set
        ("1999-12-31T23:59:59Z", None, True),
        ("2026-06-04T12:00:00Z", "2026-06-04T12:00:00.000Z", False),
        ("2026-06-04T12:00:01Z", None, True),  # more than a day ahead
        ("2026-02-30T10:00:00Z", None, True),
        ("2026-06-03T23:59:60Z", None, True),
        ("2017-01-14-14T13:49:17Z", None, True),
        ("0001-01-01T00:00:00+14:00", None, True),
    ],
)
def test_a_time_that_cannot_be_right_is_kept_as_text(stamp: str, time: str | None, *, as_sent: bool) -> None:
    answer = {"message": "x", "priority": 14, "host": "h", "app_name": "a"} | ({"time": time} if time else {})
    assert told(f"<14>1 {stamp} h a - - - x", zone=BERLIN_SUMMER) == answer | ({"time_as_sent": stamp} if as_sent else {})


# ---- priorities


@pytest.mark.parametrize(
    ("line", "priority", "level", "text"),
    [
        ("<0>x", 0, "critical", "x"),
        ("<1>x", 1, "critical", "x"),
        ("<2>x", 2, "critical", "x"),
        ("<3>x", 3, "error", "x"),
        ("<12>x", 12, "warning", "x"),
        ("<13>x", 13, "notice", "x"),
        ("<14>x", 14, "info", "x"),
        ("<191>x", 191, "debug", "x"),
        ("<014>x", 14, "info", "x"),
        (" <14> x", 14, "info", "x"),
        ("<000>x", 0, "critical", "x"),
        ("<192>x", None, "notice", "<192>x"),
        ("<999>x", None, "notice", "<999>x"),
        ("<2100>x", None, "notice", "<2100>x"),
        ("<0014>x", None, "notice", "<0014>x"),
        ("<>x", None, "notice", "<>x"),
        ("<-1>x", None, "notice", "<-1>x"),
        ("<1", None, "notice", "<1"),
        ("<14", None, "notice", "<14"),
        ("<١٤>x", None, "notice", "<١٤>x"),  # digits of another script
        ("x", None, "notice", "x"),
        ("", None, "notice", ""),
        ("<192>Jun  3 10:00:00 h a[1]: x", None, "notice", "<192>Jun  3 10:00:00 h a[1]: x"),
        ("<192>1 - h a - - - x", None, "notice", "<192>1 - h a - - - x"),
        ("<192>a[1]: x", None, "notice", "<192>a[1]: x"),
        ("a[1]: x", None, "notice", "a[1]: x"),
    ],
)
def test_priorities(line: str, priority: int | None, level: str, text: str) -> None:
    message = parsed(line)
    assert (message.priority, message.level, message.message) == (priority, level, text)
    assert (message.facility, message.severity) == ((None, None) if priority is None else divmod(priority, 8))
    assert (message.host, message.app_name) == (None, None)


# ---- RFC 3164

TEN = "2026-06-03T10:00:00.000Z"


@pytest.mark.parametrize(
    ("rest", "answer"),
    [
        ("host app[1]: x", {"host": "host", "app_name": "app", "process_id": "1", "message": "x"}),
        ("host app: x", {"host": "host", "app_name": "app", "message": "x"}),
        ("host app[]: x", {"host": "host", "app_name": "app", "message": "x"}),
        ("host app[1] x", {"host": "host", "app_name": "app", "process_id": "1", "message": "x"}),
        ("host app[1]:x", {"host": "host", "app_name": "app", "process_id": "1", "message": "x"}),
        ("host app:", {"host": "host", "app_name": "app", "message": ""}),
        ("host app:   x ", {"host": "host", "app_name": "app", "message": "  x "}),
        ("host : x", {"host": "host", "message": "x"}),  # logger -t ''
        ("host a:b: c: d", {"host": "host", "app_name": "a:b", "message": "c: d"}),
        ("host LOGICAL:rpd[6]: x", {"host": "host", "app_name": "LOGICAL:rpd", "process_id": "6", "message": "x"}),
        ("host f2b.server[16]: E: [2] 'y'", {"host": "host", "app_name": "f2b.server", "process_id": "16", "message": "E: [2] 'y'"}),
        ("host (systemd)[16]: x", {"host": "host", "app_name": "(systemd)", "process_id": "16", "message": "x"}),
        ("host %%01IFNET/4/IF_STATE(l)[1]:Interface", {"host": "host", "message": "%%01IFNET/4/IF_STATE(l)[1]:Interface"}),
        ("chronyd[1]: x", {"app_name": "chronyd", "process_id": "1", "message": "x"}),
        ("pump: x", {"app_name": "pump", "message": "x"}),
        ("CRON: x", {"app_name": "CRON", "message": "x"}),  # not a zone
        ("CEST x: y", {"host": "CEST", "app_name": "x", "message": "y"}),
        ("fd00::7 app[3]: x", {"host": "fd00::7", "app_name": "app", "process_id": "3", "message": "x"}),
        ("fd00::7 x", {"host": "fd00::7", "message": "x"}),
        ("fe80:: app: x", {"host": "fe80::", "app_name": "app", "message": "x"}),
        ("::1 app: x", {"host": "::1", "app_name": "app", "message": "x"}),
        ("fe80::1%eth0 app: x", {"host": "fe80::1%eth0", "app_name": "app", "message": "x"}),
        ("2001:db8:1:2:3:4:5:6 app: x", {"host": "2001:db8:1:2:3:4:5:6", "app_name": "app", "message": "x"}),
        ("cafe: x", {"app_name": "cafe", "message": "x"}),
        ("10.0.0.7 app: x", {"host": "10.0.0.7", "app_name": "app", "message": "x"}),
        ("hello", {"message": "hello"}),
        ("[error] x", {"message": "[error] x"}),
        ("host [error] x", {"host": "host", "message": "[error] x"}),
        ('{"a": 1} x', {"message": '{"a": 1} x'}),
        ("last message repeated 3 times", {"message": "last message repeated 3 times"}),
        ("host last message repeated 3 times", {"host": "host", "message": "last message repeated 3 times"}),
        ("_gateway date=2024-07-19 time=11:05:36", {"host": "_gateway", "message": "date=2024-07-19 time=11:05:36"}),
        ("pa.example 1,2020/03/31 22:50:49,unknown", {"host": "pa.example", "message": "1,2020/03/31 22:50:49,unknown"}),
        ("host CEF:0|Check Point|x", {"host": "host", "message": "CEF:0|Check Point|x"}),
        ("host app: \ufeffx", {"host": "host", "app_name": "app", "message": "x"}),
        ("", {"message": ""}),
    ],
)
@pytest.mark.parametrize("stamp", ["Jun  3 10:00:00", "Jun 3 10:00:00", "Jun 03 10:00:00", "2026-06-03T10:00:00+00:00"])
def test_rfc_3164(stamp: str, rest: str, answer: dict[str, Any]) -> None:
    assert told(f"<30>{stamp} {rest}") == {"priority": 30, "time": TEN} | answer
    assert told(f"{stamp} {rest}") == {"time": TEN} | answer, "a line of a file, without its priority"


@pytest.mark.parametrize(
    "line",
    [
        "User logged in",
        "ERROR: disk full",
        "MiniSwitch 7483c04f9d75,USW_FLEX_MINI-1.8.6.694: NETDEV: Setup PVID... done",
        "%2SWPORT-W-LOCKPORTACTIVE: A packet",
        "10.255.255.1 %ASA-7-609002: Teardown",
        "12: 3w2d: %SYS-5-CONFIG: x",
        "Foo  3 10:00:00 h a: x",
        "Jun 3 10:00 h a: x",
        "Jun  3 10:00:00h a: x",
        "1990 Oct 22 x",
    ],
)
def test_what_begins_with_no_time_is_text(line: str) -> None:
    assert told(f"<38>{line}") == {"priority": 38, "message": line}


def test_a_tag_with_a_process_is_one_without_a_time_too() -> None:
    assert told("<38>sshd[12]: x") == {"priority": 38, "message": "x", "app_name": "sshd", "process_id": "12"}
    assert told("<38>a[b]: x") == {"priority": 38, "message": "a[b]: x"}


@pytest.mark.parametrize(
    ("stamp", "received", "time"),
    [
        ("Jan  1 00:00:01", "2026-12-31T23:59:58Z", "2027-01-01T00:00:01.000Z"),
        ("Dec 31 23:59:59", "2027-01-01T00:00:02Z", "2026-12-31T23:59:59.000Z"),
        ("Feb 29 12:00:00", "2028-02-29T12:00:01Z", "2028-02-29T12:00:00.000Z"),
        ("Feb 29 12:00:00", "2028-03-01T00:00:00Z", "2028-02-29T12:00:00.000Z"),
        ("Feb 29 12:00:00", "2029-01-02T00:00:00Z", "2028-02-29T12:00:00.000Z"),
        ("Feb 29 12:00:00", "2027-03-01T00:00:00Z", None),  # there was none: next year's is far ahead
        ("Feb 29 12:00:00", "2026-03-01T00:00:00Z", None),
        ("Dec 10 00:00:00", "2026-06-03T12:00:00Z", "2025-12-10T00:00:00.000Z"),
        ("Nov 30 00:00:00", "2026-06-03T12:00:00Z", None),  # nearer ahead than back, and cannot be right
        ("Jun 31 00:00:00", "2026-06-03T12:00:00Z", None),
        ("Jun  3 24:00:00", "2026-06-03T12:00:00Z", None),
        ("Jun  0 10:00:00", "2026-06-03T12:00:00Z", None),
        ("Jun  3 10:00:00 2019", "2026-06-03T12:00:00Z", "2019-06-03T10:00:00.000Z"),
        ("Jun  3 2019 10:00:00", "2026-06-03T12:00:00Z", "2019-06-03T10:00:00.000Z"),
        ("2019 Jun  3 10:00:00", "2026-06-03T12:00:00Z", "2019-06-03T10:00:00.000Z"),
        ("Jan  1 1970 00:00:07", "2026-06-03T12:00:00Z", None),
        ("2026-06-03T10:00:00.123456+02:00", "2026-06-03T12:00:00Z", "2026-06-03T08:00:00.123Z"),
        ("2026-06-03T10:00:00,5Z", "2026-06-03T12:00:00Z", "2026-06-03T10:00:00.500Z"),
        ("2026-06-03T10:00:00+0200", "2026-06-03T12:00:00Z", "2026-06-03T08:00:00.000Z"),
        ("2026-06-03 10:00:00.5 -07:00", "2026-06-03T20:00:00Z", "2026-06-03T17:00:00.500Z"),
        ("2019:11:06-00:08:03", "2026-06-03T12:00:00Z", "2019-11-06T00:08:03.000Z"),
        ("1970-01-01T00:00:07Z", "2026-06-03T12:00:00Z", None),
        ("2026-13-01T00:00:07Z", "2026-06-03T12:00:00Z", None),
    ],
)
def test_times_of_rfc_3164(stamp: str, received: str, time: str | None) -> None:
    answer = {"message": "x", "priority": 30, "app_name": "pump"}
    assert told(f"<30>{stamp} pump: x", at(received)) == answer | ({"time": time} if time else {"time_as_sent": stamp})


def test_a_time_without_a_zone_is_the_servers() -> None:
    assert parsed("<30>Jun  3 10:00:00 pump: x", zone=BERLIN_SUMMER).time == at("2026-06-03T08:00:00Z")
    assert parsed("<30>2026-06-03T10:00:00 pump: x", zone=BERLIN_SUMMER).time == at("2026-06-03T08:00:00Z")
    local = round(datetime(2026, 6, 3, 10).timestamp() * 1000)
    assert parsed("<30>Jun  3 10:00:00 pump: x", zone=None).time == local
    assert iiot.parse_syslog(b"<30>2026-06-03T10:00:00 pump: x", NOW).time == local


def test_the_year_is_that_of_the_servers_zone() -> None:
    """New Year's Eve there, New Year's Day in UTC."""
    west = timezone(timedelta(hours=-8))
    assert parsed("<30>Dec 31 20:00:00 pump: x", at("2027-01-01T04:00:00Z"), west).time == at("2027-01-01T04:00:00Z")


@given(st.integers(at("2001-01-01T00:00:00Z") // 1000, at("2100-01-01T00:00:00Z") // 1000), st.integers(-150 * 86_400, 86_400))
def test_a_year_left_out_is_found_again(received: int, ahead: int) -> None:
    sent = datetime.fromtimestamp(received + ahead, UTC)
    assert parsed(f"<30>{sent:%b %d %H:%M:%S} h a: x", received * 1000).time == (received + ahead) * 1000


# ---- Cisco


def cisco(time: str, message: str, number: str | list[str] | None = None, *, unset: bool = False, **others: str) -> dict[str, Any]:
    elements: dict[str, Any] = {"meta": {"sequenceId": number}} if number else {}
    elements |= {"timeQuality": {"isSynced": "0"}} if unset else {}
    return {"time": time, "message": message, "priority": 189} | others | ({"structured_data": elements} if elements else {})


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("12: *Jan  8 19:46:03.2: %SYS-5: x", cisco("2026-01-08T19:46:03.200Z", "%SYS-5: x", "12", unset=True)),
        ("12: Jan  8 19:46:03: %SYS-5: x", cisco("2026-01-08T19:46:03.000Z", "%SYS-5: x", "12")),
        ("12: .Jan  8 2024 19:46:03.213 CET: %SYS-5: x", cisco("2024-01-08T18:46:03.213Z", "%SYS-5: x", "12", unset=True)),
        ("12: Jan  8 2024 19:46:03 EST: %SYS-5: x", cisco("2024-01-09T00:46:03.000Z", "%SYS-5: x", "12")),
        (  # a name of a zone that the plant chose: the time is one of the server's zone, and its text stays
            "12: Jan  8 19:46:03.7 WERK: %SYS-5: x",
            cisco("2026-01-08T19:46:03.700Z", "%SYS-5: x", "12", time_as_sent="Jan  8 19:46:03.7 WERK"),
        ),
        (
            "12: Jan  8 19:46:03.7 TZ: *%LWAPP-3-R: 1 wcm: x",
            cisco("2026-01-08T19:46:03.700Z", "*%LWAPP-3-R: 1 wcm: x", "12", time_as_sent="Jan  8 19:46:03.7 TZ"),
        ),
        (
            "1807987: 1807982: May 31 08:04:12 CEST: %SEC-6-I: y",
            cisco("2026-05-31T06:04:12.000Z", "%SEC-6-I: y", ["1807987", "1807982"]),
        ),
        (
            "38: switch1: *Mar  1 00:00:20.003 UTC: %LINK-3-U: i",
            cisco("2026-03-01T00:00:20.003Z", "%LINK-3-U: i", "38", unset=True, host="switch1"),
        ),
        (
            "123: RP/0/CPU0:Jan  8 19:46:03.213 UTC: config[657]: %MGBL-SYS-5-C : z",
            cisco("2026-01-08T19:46:03.213Z", "%MGBL-SYS-5-C : z", "123", host="RP/0/CPU0", app_name="config", process_id="657"),
        ),
        (": 2024 Jan  8 19:46:03.213 UTC: %VSHD-5-V: y", cisco("2024-01-08T19:46:03.213Z", "%VSHD-5-V: y")),
        (":Apr 14 10:07:20 EDT: %ASA-session-6-302014: T", cisco("2026-04-14T14:07:20.000Z", "%ASA-session-6-302014: T")),
        ("Sep 14 2016 10:07:20: %ASA-4-106023: Deny", cisco("2016-09-14T10:07:20.000Z", "%ASA-4-106023: Deny")),
        ("Sep 14 10:07:20 2016: %ASA-4-106023: Deny", cisco("2016-09-14T10:07:20.000Z", "%ASA-4-106023: Deny")),
        ("Sep 14 2016 09:33:47 ASA-RE : %ASA-4-1: D", cisco("2016-09-14T09:33:47.000Z", "%ASA-4-1: D", host="ASA-RE")),
        ("Sep 14 2016 09:33:47 ASA-RE %ASA-4-1: D", cisco("2016-09-14T09:33:47.000Z", "%ASA-4-1: D", host="ASA-RE")),
        (  # through a relay: the relay's time, and what it was given
            "May  5 14:01:20 10.1.186.49 87117903: 87117909: May  5 14:01:19.115: %FMANFP-6-I: F0: x",
            cisco("2026-05-05T14:01:20.000Z", "87117903: 87117909: May  5 14:01:19.115: %FMANFP-6-I: F0: x", host="10.1.186.49"),
        ),
        (" Jun 3 08:11:57 ISE-1 CISE_Failed 000231543 1 0", cisco("2026-06-03T08:11:57.000Z", "CISE_Failed 000231543 1 0", host="ISE-1")),
    ],
)
def test_cisco(line: str, answer: dict[str, Any]) -> None:
    assert told(f"<189>{line}") == answer


# ---- other senders, byte for byte


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        # util-linux logger 2.38: --rfc3164, --rfc5424, --rfc5424=notime,notq,nohost
        (b"<13>May 25 18:29:49 vm root: hello world", {"host": "vm", "app_name": "root", "time": "2026-05-25T18:29:49.000Z"}),
        (
            b'<13>1 2026-05-25T18:29:49.813195+00:00 vm root - - [timeQuality tzKnown="1" isSynced="0"] hello world',
            {
                "host": "vm",
                "app_name": "root",
                "time": "2026-05-25T18:29:49.813Z",
                "structured_data": {"timeQuality": {"tzKnown": "1", "isSynced": "0"}},
            },
        ),
        (b"<13>1 - - root - - - hello world", {"app_name": "root"}),
        # Python's SysLogHandler ends with a zero, others with an end of line
        (b"<13>hello world\0", {}),
        (b"<13>hello world\r\n", {}),
        # RFC 3164 with the version of RFC 5424
        (b"<13>1 Jun  3 10:00:00 vm root: hello world", {"host": "vm", "app_name": "root", "time": TEN}),
        (b"<13>1 2026-06-03T10:00:00Z vm root: hello world", {"host": "vm", "app_name": "root", "time": TEN}),
    ],
)  # fmt: skip
def test_other_senders(line: bytes, answer: dict[str, Any]) -> None:
    assert told(line) == {"message": "hello world", "priority": 13} | answer


def test_the_words_after_a_tag_are_no_fields_of_rfc_5424() -> None:
    answer = {"message": "some words here now", "priority": 13, "host": "vm", "app_name": "root", "time": TEN}
    assert told("<13>1 2026-06-03T10:00:00Z vm root: some words here now") == answer


# ---- the token, and the number of the line


@pytest.mark.parametrize(
    ("line", "text", "elements"),
    [
        (f'<14>1 - - - - - [iiot@32473 token="{TOKEN}"] x', "x", {}),
        (f'<14>1 - - - - - [a@1 b="c"][iiot@32473 token="{TOKEN}"] x', "x", {"a@1": {"b": "c"}}),
        (f'<14>1 - - - - - [iiot@32473 line="7" token="{TOKEN}"][a@1 b="c"] x', "x", {"iiot@32473": {"line": "7"}, "a@1": {"b": "c"}}),
        (f'<14>1 - - - - - [iiot@32473 token="{TOKEN}" token="{OTHER}"] x', "x", {}),
        (f'<14>1 - - - - - [iiot@32473 token="{TOKEN}"][iiot@32473 token="{TOKEN}"] x', "x", {}),
        (f'<14>1 - - - - - [iiot@32473 token="{TOKEN}"] {TOKEN} x', "x", {}),
        (f'<14>1 - - - - - [iiot@32473 token="nonsense" token="{TOKEN}"] x', "x", {}),
        (f"<14>1 - - - - - - {TOKEN} x", "x", {}),
        (f"<14>1 - - - - - - \ufeff{TOKEN} x", "x", {}),
        (f'<14>1 - - - - - - [iiot@32473 token="{TOKEN}"] x', "x", {}),  # the element in the text
        (f'<30>Jun  3 10:00:00 host app: [iiot@32473 token="{TOKEN}"][iiot@32473 k="v"] x', "x", {"iiot@32473": {"k": "v"}}),
        (f"<30>Jun  3 10:00:00 host app: {TOKEN} x", "x", {}),
        (f"<30>Jun  3 10:00:00 host {TOKEN} x", "x", {}),
        (f"<30>Jun  3 10:00:00 host {TOKEN}: x", "x", {}),
        (f"<30>Jun  3 10:00:00 {TOKEN} x", "x", {}),
        (f"<30>Jun  3 10:00:00 {TOKEN}: x", "x", {}),
        (f"<30>Jun  3 10:00:00 {TOKEN} {OTHER} x", "x", {}),
        (f"<30>{TOKEN} x", "x", {}),
        (f"<30>{TOKEN}: x", "x", {}),
        (f"<30>{TOKEN}\tx", "x", {}),
        (f"<30>{TOKEN} {OTHER} x", "x", {}),
        (f"<30>{TOKEN}", "", {}),
        (f"{TOKEN} x", "x", {}),
    ],
)
def test_a_token_is_found_and_cut_out(line: str, text: str, elements: dict[str, Any]) -> None:
    message = parsed(line)
    assert (message.token, message.message, message.structured_data) == (TOKEN, text, elements)
    assert "iiot_log_" not in repr(attrs.evolve(message, token=None))


def test_a_switch_may_have_its_token_for_a_name() -> None:
    message = parsed(f"<189>12: {TOKEN}: *Jan  8 19:46:03.2: %SYS-5: x")
    assert (message.token, message.host, message.message) == (TOKEN, None, "%SYS-5: x")


@pytest.mark.parametrize(
    "line",
    [
        f"<30>Jun  3 10:00:00 host app: the token {TOKEN} is wrong, and so is {OTHER}",
        f'<14>1 - - - - - [a@1 token="{TOKEN}" {TOKEN}="x"] x',
        f'<14>1 - - - - - [{TOKEN}@1 b="c"] x',
        f'<14>1 - - - - - [iiot@32473 key="{TOKEN}"] x',
        f'<14>1 - - - - - [iiot@32473 token="{TOKEN}] torn',
        f"<14>1 - {TOKEN}x a {TOKEN}/1 - - x",
        f"<14>1 2026-06-03T10:00:00{TOKEN} - - - - - x",
        f"<14>{TOKEN}x y",
        f"<14>x{TOKEN} y",
        f"<192>{TOKEN} y",
        f"<14>{OPERATOR} y",
        f'<14>1 - - - - - [iiot@32473 token="{OPERATOR}"] x',
        f'<14>1 - - - - - [iiot@32473 token="{TOKEN}x"] x',
        f"<14>{TOKEN[:40]}",  # cut by the sender
        f"<14>iiot_{TOKEN}log_{TOKEN}",
    ],
)
def test_a_token_elsewhere_proves_nothing_and_is_cut_out(line: str) -> None:
    message = parsed(line)
    assert message.token is None
    for secret in (TOKEN, OTHER, OPERATOR):
        assert secret[len("iiot_log_") + 17 : 35] not in repr(message)


def test_what_is_left_of_a_token_is_its_id() -> None:
    assert parsed(f"<30>the token {TOKEN} is wrong").message == f"the token {TOKEN[:26]}… is wrong"
    both = parsed(f"<30>{TOKEN} and {OTHER}")
    assert (both.token, both.message) == (TOKEN, f"and {OTHER[:26]}…")


@pytest.mark.parametrize("number", [NUMBER, NUMBER.lower(), "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"])
def test_the_number_of_a_line_is_taken_out(number: str) -> None:
    """rsyslogd's %uuid% has no hyphens."""
    for other in ("", f' token="{TOKEN}"', f' id="{NUMBER}"'):
        message = parsed(f'<14>1 - - - - - [iiot@32473 id="{number}"{other}] x')
        assert (message.repeat_id, message.structured_data, message.message) == (NUMBER.lower(), {}, "x")


@pytest.mark.parametrize("number", ["7", "", NUMBER[1:], "0f1e2d3c-4b5a-69788796-a5b4c3d2e1f0"])
def test_a_number_that_is_no_uuid_is_kept(number: str) -> None:
    message = parsed(f'<14>1 - - - - - [iiot@32473 id="{number}"] x')
    assert (message.repeat_id, message.structured_data) == (None, {"iiot@32473": {"id": number}})
    assert parsed(f'<14>1 - - - - - [a@1 id="{NUMBER}"] x').repeat_id is None


def test_tokens_of_devices_have_a_kind_of_their_own() -> None:
    assert iiot.take_apart("log", TOKEN)
    assert iiot.take_apart("dev", TOKEN) is None
    assert iiot.redacted(TOKEN) == f"{TOKEN[:26]}…"


# ---- bytes that are no text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"<13>\xdcberhitzt", r"\xdcberhitzt"),  # Latin-1
        ("<13>Überhitzt".encode(), "Überhitzt"),
        (b"<13>a\0b", r"a\x00b"),
        (b"<13>a\x1b[31mb\tc\nd", "a\x1b[31mb\tc\nd"),
        (b"<13>\xed\xa0\x80", r"\xed\xa0\x80"),  # half of a surrogate pair
        (b"<13>\xc3", r"\xc3"),
        (b"\xff<13>x", r"\xff<13>x"),
        (b"<13>\0\0", ""),
        (b"\0", ""),
    ],
)
def test_bytes_that_are_no_text_are_seen(data: bytes, text: str) -> None:
    assert parsed(data).message == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain über C:\\temp", "plain über C:\\temp"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31m\x07\x7f\x9b", r"\x1b[31m\x07\x7f\x9b"),
        ("\0", r"\x00"),
        ("\u2028\u202e\u2066", r"\u2028\u202e\u2066"),
    ],
)
def test_a_text_is_printed_as_one_line_that_does_nothing(text: str, shown: str) -> None:
    assert iiot.printable(text) == shown


def stored(value: object) -> Any:
    """What SQLite keeps of a value that reaches it as JSON."""
    with closing(sqlite3.connect(":memory:")) as connection:
        query = "select json_extract(:json, '$.message'), json(:json)"
        text, whole = connection.execute(query, {"json": json.dumps(value, ensure_ascii=False)}).fetchone()
    return text, json.loads(whole)


HEADS = ["", "<14>", "<14>1 - h a p m ", "<14>1 - h a - - [a@1 ", "<30>Jun  3 10:00:00 ", "<30>Jun  3 10:00:00 h a[1]: ", "<189>12: *"]
LINES = [
    '<165>1 2026-06-03T10:14:15.003Z h evntslog 812 ID47 [p@32473 iut="3" e="a\\]b"][meta sequenceId="7"] An event',
    "<34>Jun  3 10:14:15 mymachine su[123]: 'su root' failed for lonvick on /dev/pts/8",
    "<189>12: *Jan  8 2026 19:46:03.2 CET: %SYS-5-CONFIG_I: Configured from console",
    "<30>2026-06-03T10:00:00.123456+02:00 fd00::7 app[1]: x",
]


def expect_nothing_lost(data: bytes) -> None:
    """The text is the end of what came, and every field stands in it."""
    message = parsed(data)
    text = iiot.decoded(data.rstrip(b"\r\n\0"))
    assert text.endswith(message.message)
    head = text[: len(text) - len(message.message)]
    for field in (message.time_as_sent, message.host, message.app_name, message.process_id, message.message_id):
        assert field is None or field in head
    for name, parameters in message.structured_data.items():
        assert name in (*head.split("]")[0].split(), "meta", "timeQuality") or f"[{name}" in head
        assert all(isinstance(value, str | list) for value in parameters.values())
    assert message.level in iiot.SEVERITY_LEVELS
    assert message.time is None or iiot.EARLIEST <= message.time <= NOW + iiot.DAY
    value = attrs.asdict(message)
    assert stored(value) == (message.message, value)
    assert not iiot.UNPRINTABLE.search(iiot.printable(message.message))


@given(st.sampled_from(HEADS), st.binary(max_size=200))
@example("", b"\xef\xbb\xbf\xef\xbb\xbf<14>")
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_message(head: str, rest: bytes) -> None:
    expect_nothing_lost(head.encode() + rest)


@given(st.sampled_from(HEADS), st.text('<>[]:"=\\ -.*%@0123ajJunTZ\ufeff\n', max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_of_the_grammars_characters_is_a_message(head: str, rest: str) -> None:
    expect_nothing_lost((head + rest).encode())


@given(st.sampled_from(LINES), st.data())
@settings(max_examples=100, deadline=None)
def test_a_corrupted_message_is_a_message(line: str, data: st.DataObject) -> None:
    corrupted = bytearray(line.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(corrupted) - 1))
        corrupted[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    expect_nothing_lost(bytes(corrupted))


@given(st.sampled_from(HEADS), st.lists(st.sampled_from([TOKEN, OTHER, " ", '"', "] ", "[iiot@32473 ", 'token="', "x", ": ", TOKEN[:30]])))
@settings(max_examples=300, deadline=None)
def test_no_token_is_ever_kept(head: str, parts: list[str]) -> None:
    message = parsed(head + "".join(parts))
    kept = repr(attrs.evolve(message, token=None))
    assert not iiot.OWN_TOKEN.search(kept)
    assert message.token in (None, TOKEN, OTHER)


SIZE = 64 * 1024
HOSTILE = [
    *(f"<14>1 - h a - - {part * (SIZE // len(part))}" for part in ("[", "[a ", "[a@1]", '[a@1 b="c"]', '[iiot@32473 id="x"]', TOKEN)),
    *(f"<14>1 - h a - - [a@1 {part * (SIZE // len(part))}" for part in (" ", 'b="" ', 'b="', "b", 'b="\\', 'b="\\\\" ')),
    *(f"<14>Jun  3 10:00:00 {part * (SIZE // len(part))}" for part in ("a", "a:", "a[", " ", "::", "1:", "abcd:", "h ", "iiot_log_", "\t")),
    *(f"<14>{part * (SIZE // len(part))}" for part in (" ", "1", "1 ", "1: ", "a: ", "1: a/", "iiot ", f"{TOKEN[:30]} ", "\ufeff", "\0x")),
    f"<14>2026-06-03T10:00:00.{'1' * SIZE}",
    f"<14>1 2026-06-03T10:00:00.{'1' * SIZE}Z h a - - - x",
    f"{' ' * SIZE}iiot_",
    "<" * SIZE,
]


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: repr(line[:24]))
def test_a_hostile_line_takes_little_time(line: str) -> None:
    """Twice the length takes no more than a few times as long: 64 KiB in milliseconds, where backtracking would take minutes."""
    data, started = line.encode(), time.process_time()
    parsed(data)
    assert time.process_time() - started < 0.5


# ---- frames

MOST = 64


def framed(*parts: bytes, most: int = MOST, end: bool = True) -> list[bytes | str]:
    """The messages of a stream, each with a word behind it if it was cut or is torn."""
    framing = iiot.SyslogFraming(most)
    frames = [frame for part in parts for frame in framing.feed(part)] + (framing.end() if end else [])
    messages: list[bytes | str] = []
    for frame in frames:
        messages += [frame.data, *["cut"] * frame.cut, *["torn"] * frame.torn]
    return messages


LONG = b"<13>" + b"x" * 200
INSIDE = b"<13>" + b"x" * 80 + b"12 <13>smuggled\n<13>line\n" + b"x" * 80


@pytest.mark.parametrize(
    ("stream", "messages"),
    [
        (b"5 <13>a6 <13>bb", [b"<13>a", b"<13>bb"]),
        (b"<13>a\n<13>b\n", [b"<13>a", b"<13>b"]),
        (b"<13>a\r\n<13>b\r\n", [b"<13>a", b"<13>b"]),
        (b"<13>a\0<13>b\0", [b"<13>a", b"<13>b"]),
        (b"<13>a\0\n<13>b\0\n", [b"<13>a", b"<13>b"]),
        (b"\n\r\n\0  \n", []),
        (b"", []),
        # both in one stream
        (b"5 <13>a<13>b\n5 <13>c\n<13>d\n", [b"<13>a", b"<13>b", b"<13>c", b"<13>d"]),
        # ends of lines within a counted message are its own
        (b"9 <13>a\nb\0c<13>d\n", [b"<13>a\nb\0c", b"<13>d"]),
        # a line that begins as a count does: no priority follows
        (b"42 answers\n<13>a\n", [b"42 answers", b"<13>a"]),
        (b"42\n<13>a\n", [b"42", b"<13>a"]),
        (b"10.0.0.7 is up\n<13>a\n", [b"10.0.0.7 is up", b"<13>a"]),
        (b"2026-06-03T10:00:00Z h a: x\n", [b"2026-06-03T10:00:00Z h a: x"]),
        (b"05 <13>a\n", [b"05 <13>a"]),
        (b"0 <13>a\n", [b"0 <13>a"]),
        # … once it has counted, a space is enough
        (b"5 <13>a2 hi3 you", [b"<13>a", b"hi", b"you"]),
        # the count is one too small, and one too large, in a stream that counts: the next count is found
        (b"5 <13>ab5 <13>c5 <13>d", [b"<13>a", b"b", b"<13>c", b"<13>d"]),
        (b"6 <13>a5 <13>c5 <13>d", [b"<13>a5", b" <13>c", b"<13>d"]),
        (b"6 <13>a15 <13>0123456789a5 <13>d", [b"<13>a1", b"<13>0", b"123456789a", b"<13>d"]),
        # the count leaves its LF out, and counts it
        (b"5 <13>a\n5 <13>b\n", [b"<13>a", b"<13>b"]),
        (b"6 <13>a\n6 <13>b\n", [b"<13>a", b"<13>b"]),
        (b"7 <13>a\r\n7 <13>b\r\n", [b"<13>a", b"<13>b"]),
        # more is promised than is sent
        (b"5 <13>a9 <13>b", [b"<13>a", b"<13>b", "torn"]),
        (b"9 ", [b"9 ", "torn"]),
        (b"9", [b"9", "torn"]),
        (b"<13>a\n<13>b", [b"<13>a", b"<13>b", "torn"]),
        # too long: cut, and the inside is skipped unread
        (b"204 " + LONG + b"5 <13>a", [LONG[:MOST], "cut", b"<13>a"]),
        (b"%d %b5 <13>a" % (len(INSIDE), INSIDE), [INSIDE[:MOST], "cut", b"<13>a"]),
        (b"9999999 " + LONG, [LONG[:MOST], "cut"]),
        (LONG + b"\n<13>a\n", [LONG[:MOST], "cut", b"<13>a"]),
        (LONG, [LONG[:MOST], "cut"]),
        (LONG + b" 5 <13>a\n<13>b\n", [LONG[:MOST], "cut", b"<13>b"]),
        # just as long as it may be
        (b"64 " + LONG[:64] + b"5 <13>a", [LONG[:64], b"<13>a"]),
        (b"66 " + LONG[:64] + b"\r\n5 <13>a", [LONG[:64], b"<13>a"]),
        (b"65 " + LONG[:65] + b"5 <13>a", [LONG[:64], "cut", b"<13>a"]),
        (LONG[:64] + b"\r\n<13>a\n", [LONG[:64], b"<13>a"]),
        (LONG[:65] + b"\n<13>a\n", [LONG[:64], "cut", b"<13>a"]),
        # a count of eight digits and more is none
        (b"1" * 30 + b" <13>a\n<13>b\n", [b"1" * 30 + b" <13>a", b"<13>b"]),
        (b"12345678 <13>a\n<13>b\n", [b"12345678 <13>a", b"<13>b"]),
        (b"9" * 300 + b"\n<13>b\n", [b"9" * 64, "cut", b"<13>b"]),
        # not within a character
        (b"<13>" + "ü".encode() * 60 + b"\n", [b"<13>" + "ü".encode() * 30, "cut"]),
        (b"<13>a" + "ü".encode() * 60 + b"\n", [b"<13>a" + "ü".encode() * 29, "cut"]),
        (b"<13>" + b"\x80" * 99 + b"\n", [b"<13>" + b"\x80" * 60, "cut"]),
    ],
)
def test_where_messages_end(stream: bytes, messages: list[bytes | str]) -> None:
    assert framed(stream) == messages
    assert framed(*[stream[at : at + 1] for at in range(len(stream))]) == messages, "byte by byte"


def test_a_message_is_there_as_soon_as_it_is_complete() -> None:
    framing = iiot.SyslogFraming(MOST)
    assert framing.feed(b"5 <13>") == []
    assert framing.feed(b"a") == [iiot.SyslogFrame(b"<13>a")]
    assert framing.feed(b"<13>b") == []
    assert framing.feed(b"\n") == [iiot.SyslogFrame(b"<13>b")]
    assert framing.end() == []
    assert framing.end() == []


def test_a_line_of_64_kib_is_cut_to_the_limit() -> None:
    most = iiot.Limits().syslog_bytes
    assert 8 * 1024 <= most < SIZE
    line = b"<13>Jun  3 10:00:00 h a: " + b"x" * SIZE
    for stream in (line + b"\n<13>next\n", b"%d %b%b" % (len(line), line, b"9 <13>next.")):
        cut, *others = iiot.SyslogFraming(most).feed(stream)
        assert cut == iiot.SyslogFrame(line[:most], cut=True)
        assert [other.data[:8] for other in others] == [b"<13>next"]
    assert iiot.cut_frame(line, most) == iiot.SyslogFrame(line[:most], cut=True), "a datagram"


PIECES = [b"5 <13>a", b"<13>b\n", b"9 <13>a\nb12 <1>x", b"42 <", b"7 ", b"1234", b"\r\n", b"\0", b" ", b"<13>", b"x" * 70, b"12 <13>"]
STREAMS = st.lists(st.sampled_from(PIECES) | st.binary(max_size=12)).map(b"".join)


@given(STREAMS, st.lists(st.integers(0, 400), max_size=8))
@example(b"5 <13>a" + b"x" * 64 + b"5 <13>b", [71])
@example(b"5 <13>a" + b"x" * 75 + b"12345 <13>b", [87, 88])
@settings(max_examples=500, deadline=None)
def test_the_same_messages_come_out_however_they_come_in(stream: bytes, places: list[int]) -> None:
    cuts = sorted({0, len(stream), *(place for place in places if place < len(stream))})
    assert framed(*[stream[start:stop] for start, stop in pairwise(cuts)]) == framed(stream)
    assert framed(*[bytes([byte]) for byte in stream]) == framed(stream)


@given(st.lists(STREAMS, max_size=12))
@settings(max_examples=200, deadline=None)
def test_memory_is_bounded_whatever_is_sent(parts: list[bytes]) -> None:
    framing = iiot.SyslogFraming(MOST)
    for part in parts:
        assert all(len(frame.data) <= MOST for frame in framing.feed(part))
        assert len(framing._held) <= MOST + 2 * iiot.COUNT_BYTES


@given(st.lists(st.binary(min_size=1, max_size=30).map(lambda data: b"<13>" + data), max_size=8))
def test_counted_messages_come_out_as_they_went_in(messages: list[bytes]) -> None:
    stream = b"".join(b"%d %b" % (len(message), message) for message in messages)
    assert framed(stream) == [message.rstrip(b"\r\n\0") for message in messages]


@pytest.mark.parametrize("piece", [b"a", b"1", b"9 ", b"\xff", b"<13>", b"\n", b"99999 <"], ids=repr)
def test_a_hostile_stream_takes_little_time(piece: bytes) -> None:
    framing, started = iiot.SyslogFraming(16 * 1024), time.process_time()
    for _ in range(64):
        framing.feed(piece * (64 * 1024 // len(piece)))
    for _ in range(20_000):
        framing.feed(piece)
    assert time.process_time() - started < 2.5


# ---- RELP


@given(
    st.lists(st.tuples(st.integers(1, 999_999_999), st.sampled_from(["syslog", "open", "close"]), st.binary(max_size=120)), max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
)
def test_frames_of_relp_are_found_however_they_are_split(told: list[tuple[int, str, bytes]], sizes: list[int]) -> None:
    framing, most, found = iiot.RelpFraming(50), 50, list[iiot.RelpFrame]()
    stream = b"".join(
        b"%d %b %d%b\n" % (number, command.encode(), len(data), b" " + data if data else b"") for number, command, data in told
    )
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(stream):
            break
        found += framing.feed(stream[at : at + size])
        at += size
    assert found == [
        iiot.RelpFrame(b"%d" % number, command.encode(), data[:most], cut=len(data) > most) for number, command, data in told
    ]
    assert len(framing._held) <= most + iiot.RELP_HEAD_BYTES


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n" + b"x" * 60, b"1 syslog 99999999999 " + b"x" * 60, b"\x16\x03\x01" + b"\0" * 60])
def test_what_is_no_relp_is_refused(text: bytes) -> None:
    with pytest.raises(iiot.Invalid):
        iiot.RelpFraming(50).feed(text)
