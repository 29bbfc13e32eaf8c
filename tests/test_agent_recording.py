"""Recorded files: what the agent reads in them, how it sends them, and how it says what it could not send."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from devices import SENSORS, frames_of, free_port, record, replay, started, stored
from hypothesis import example, given
from hypothesis import strategies as st
from plant import ROOT, Plant, Process

import agent
import iiot

# A recorded file


@pytest.mark.parametrize("delimiter", [",", ";"])
async def test_a_recording_arrives_whole_and_a_second_time_changes_nothing(plant: Plant, tmp_path: Path, delimiter: str) -> None:
    expected = record(tmp_path / "run.csv", 1000, delimiter=delimiter)
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    first = await stored(plant, "press-1")
    assert sum(map(len, first.values())) == 8000
    assert first == expected
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    assert await stored(plant, "press-1") == expected


async def test_a_recording_shows_its_progress_on_a_terminal_and_nowhere_else(plant: Plant, tmp_path: Path) -> None:
    """What is said next is written over the progress, or stands in a line of its own."""
    record(tmp_path / "run.csv", 1000)
    token = await plant.register("press-1")
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "agent.py"), "--url", plant.url, "--token", token, "--replay", "run.csv", cwd=tmp_path, stderr=theirs
    )
    os.close(theirs)
    assert await process.wait() == 0
    printed = ""
    with suppress(OSError):  # where the other side is closed and all is read
        while True:
            printed += os.read(ours, 4096).decode()
    os.close(ours)
    shown = [int(rows) for rows in re.findall(r"(\d+) of 1000 rows acknowledged\r", printed)]
    assert shown
    assert shown == sorted(shown)
    assert printed.count("acknowledged") == len(shown)
    assert re.search(r" {40}\rreplayed 1000 of 1000 rows\r\n$", printed)
    _, err = await replay(plant, tmp_path, "press-1")
    assert "\r" not in err
    assert "acknowledged" not in err
    assert err.endswith("\nreplayed 1000 of 1000 rows\n")


async def test_a_row_of_which_a_part_is_stored_is_not_called_replayed_and_not_called_lost(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(f"time,a,b\n2026-01-01T00:00:00Z,1,2\n2026-01-01T00:00:01Z,{2**64},3\nyesterday,1,4\n")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code != 0
    assert "replayed 1 of 3 rows completely; of the other 2 a part or nothing is stored\n" in err
    assert {metric: len(points) for metric, points in (await stored(plant, "press-1")).items()} == {"a": 1, "b": 2}


async def test_a_recording_may_hold_what_recordings_hold(plant: Plant, tmp_path: Path) -> None:
    lines = [
        "\ufeffzeit;druck;zahl;text;\"komma, und; mehr\"",
        "2026-01-01T00:00:00Z;1.5;7;läuft;\"a;b\"",
        "",
        "2026-01-01T02:00:01+02:00;;-9223372036854775807;\"say \"\"on\"\"\";0.1",
        " 1767225602.25 ;1e100;0;;-0.0",
        "1767225603000;nan;;True;FALSE",
    ]
    (tmp_path / "run.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    zero, one, two, three = (f"2026-01-01T00:00:0{second}Z" for second in ("0.000", "1.000", "2.250", "3.000"))
    assert await stored(plant, "press-1") == {
        "druck": [[zero, 1.5], [two, 1e100]],
        "zahl": [[zero, 7], [one, -9223372036854775807], [two, 0]],
        "text": [[zero, "läuft"], [one, 'say "on"'], [three, 1]],
        "komma, und; mehr": [[zero, "a;b"], [one, 0.1], [two, 0.0], [three, 0]],
    }
    assert err.splitlines()[-1].endswith("replayed 4 of 4 rows; values that are text: 2 of 'text', 1 of 'komma, und; mehr'")


GOOD = "2026-01-01 00:00:00Z,1.5,2.5\n2026-01-01 00:00:01Z,3.5,4.5\n"
LAST = "2026-01-01 00:00:09Z,5.5,6.5\n"


@pytest.mark.parametrize(
    ("middle", "line"),
    [
        pytest.param(b"2026-01-01 00:00:02Z,5.\n", 4, id="a short line"),
        pytest.param(b"\n\nyesterday,1,2\n", 6, id="a bad time after empty lines"),
        pytest.param(b"2026-01-01 00:00:02Z,\xff\xfe,2\n", 4, id="not UTF-8"),
        pytest.param(b'2026-01-01 00:00:02Z,"5,2\n', 4, id="a quote that does not end"),
        pytest.param(b"2026-01-01 00:00:02Z," + b"9" * 1_200_000 + b",2\n", 4, id="a row of over 1 MiB"),
        pytest.param(b"2026-01-01 00:00:02Z," + b"9" * 5_000_000 + b",2\n", 4, id="a row without end"),
    ],
)
async def test_a_row_that_cannot_be_sent_is_named_by_its_line_and_blocks_none_after_it(
    plant: Plant, tmp_path: Path, middle: bytes, line: int
) -> None:
    (tmp_path / "run.csv").write_bytes(f"time,a,b\n{GOOD}".encode() + middle + LAST.encode())
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    assert re.findall(r"^run\.csv: line (\d+): ", err.replace("\r", "\n"), re.MULTILINE) == [str(line)]
    assert "replayed 3 of 4 rows" in err
    zero, one, nine = (f"2026-01-01T00:00:0{second}.000Z" for second in (0, 1, 9))
    assert await stored(plant, "press-1") == {"a": [[zero, 1.5], [one, 3.5], [nine, 5.5]], "b": [[zero, 2.5], [one, 4.5], [nine, 6.5]]}


async def test_of_what_is_lost_twenty_lines_are_named(plant: Plant, tmp_path: Path) -> None:
    rows = "".join(f"2026-01-01 00:00:{second:02}Z,{'1e400' if second % 2 else second}\n" for second in range(60))
    (tmp_path / "run.csv").write_text(f"time,a\n{rows}")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    named = re.findall(r"run\.csv: line (\d+): 'a': '1e400' is larger than a number can be", err)
    assert named == [str(line) for line in range(3, 43, 2)]
    assert "run.csv: and 10 more\n" in err
    assert "replayed 30 of 60 rows" in err
    assert err.endswith("agent.py: something is lost in 30 rows of run.csv\n")
    assert [value for _, value in (await stored(plant, "press-1"))["a"]] == list(range(0, 60, 2))


async def test_a_row_that_is_longer_than_a_frame_is_sent_in_parts(plant: Plant, tmp_path: Path) -> None:
    names, text = [f"m{number}" for number in range(1_500)], "x" * 1_024
    (tmp_path / "run.csv").write_text(f"time,{','.join(names)}\n2026-01-01T00:00:00Z{(',' + text) * 1_500}\n")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 0, err
    assert "replayed 1 of 1 rows" in err
    latest = (await plant.get("/iiot/press-1"))["latest"]
    assert latest.keys() == set(names)
    assert {point["value"] for point in latest.values()} == {text}


async def test_our_own_export_is_read_as_what_it_is(plant: Plant, tmp_path: Path) -> None:
    expected = record(tmp_path / "run.csv", 60)
    assert (await replay(plant, tmp_path, "press-1"))[0] == 0
    (tmp_path / "run.csv").write_text((await plant.ask("GET", "/iiot/press-1/telemetry?format=csv"))[1])
    code, err = await replay(plant, tmp_path, "press-2")
    assert code == 0, err
    assert await stored(plant, "press-2") == expected


async def test_a_file_of_another_encoding_is_refused_in_words_and_read_with_its_encoding(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("zeit;temp °C;druck\n2026-01-01T00:00:00Z;21,5;1.013,25\n", encoding="latin-1")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    assert "run.csv: line 1: is not UTF-8; name the encoding, for example --encoding cp1252" in err
    code, err = await replay(plant, tmp_path, "press-1", "--encoding", "latin-1")
    assert code == 0, err
    assert "columns separated by semicolon, decimal comma" in err
    zero = "2026-01-01T00:00:00.000Z"
    assert await stored(plant, "press-1") == {"temp °C": [[zero, 21.5]], "druck": [[zero, 1013.25]]}


async def test_times_of_another_form_and_without_a_zone_need_to_be_told(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("Zeit\ta\n23.07.2025 08:00\t1,5\n23.11.2025 08:00\t2\n")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    assert "line 2: '23.07.2025 08:00' is no time of ISO 8601 and no number; " in err
    assert "name its form, for example --time-format '%d.%m.%Y %H:%M'" in err
    form = ("--time-format", "%d.%m.%Y %H:%M")
    code, err = await replay(plant, tmp_path, "press-1", *form)
    assert code == 1
    assert "line 2: '23.07.2025 08:00' names no time zone; add --timezone, for example --timezone UTC" in err
    assert await stored(plant, "press-1") == {}
    code, err = await replay(plant, tmp_path, "press-1", *form, "--timezone", "Europe/Berlin")
    assert code == 0, err
    assert await stored(plant, "press-1") == {"a": [["2025-07-23T06:00:00.000Z", 1.5], ["2025-11-23T07:00:00.000Z", 2]]}


async def test_values_of_one_millisecond_are_kept_and_what_overwrites_another_is_said(plant: Plant, tmp_path: Path) -> None:
    rows = ["2026-01-01T00:00:00.0001Z,1,", "2026-01-01T00:00:00.0002Z,,2", "2026-01-01T00:00:00.0003Z,3,2"]
    (tmp_path / "run.csv").write_text("\n".join(("time,a,b", *rows)) + "\n")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    assert "run.csv: line 2: 'a': line 4 has another value for the same millisecond, which is kept" in err
    assert err.count("run.csv: line") == 1
    assert "replayed 2 of 3 rows" in err
    zero = "2026-01-01T00:00:00.000Z"
    assert await stored(plant, "press-1") == {"a": [[zero, 3]], "b": [[zero, 2]]}


async def test_rows_with_more_metrics_than_a_device_may_have_lose_the_new_ones_alone(plant: Plant, tmp_path: Path) -> None:
    device = await plant.device("press-1")
    await device.store({"ts": "2026-01-01T00:00:00Z", "values": {f"m{number}": 0 for number in range(1_998)}})
    await device.close()
    rows = "".join(f"2026-01-01T00:01:{second:02}Z,{second},1,2,3,4\n" for second in range(60))
    (tmp_path / "run.csv").write_text(f"time,m0,n0,n1,n2,n3\n{rows}")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    assert "The device has reached its limit of metrics." in err
    assert "no session" not in err, "so few frames were refused that the server did not lose its patience"
    found = await stored(plant, "press-1")
    assert [value for _, value in found["m0"]] == [0, *range(60)]
    assert sorted(len(points) for name, points in found.items() if name.startswith("n")) == [60, 60]


async def test_a_replay_that_is_stopped_says_how_far_it_came(plant: Plant, tmp_path: Path) -> None:
    record(tmp_path / "run.csv", 1000, step=timedelta(seconds=60))
    token = await plant.register("press-1")
    async with started(tmp_path, "--url", plant.url, "--token", token, "--replay", "run.csv", "--speed", "1000") as running:
        await plant.until(f"/iiot/press-1/telemetry?metric={SENSORS[0]}", lambda body: body["series"] and body["series"][0]["points"])
        running.process.terminate()
        code, err = await running.end()
    assert code == 128 + 15
    found = re.search(r"replayed (\d+) of 1000 rows", err)
    assert found is not None
    assert 1 <= int(found[1]) < 1000


async def test_a_recording_that_is_not_there_is_named(plant: Plant, tmp_path: Path) -> None:
    code, err = await replay(plant, tmp_path, "press-1")
    assert code != 0
    assert "cannot read run.csv: No such file or directory" in err


@pytest.mark.parametrize(
    "bad",
    ["1999-12-31 23:59:59Z,1.0", f"2026-01-01 00:00:01Z,{'x' * 5000}"],
    ids=["too early", "too long"],
)
async def test_rows_that_the_server_refuses_are_not_called_replayed(plant: Plant, tmp_path: Path, bad: str) -> None:
    (tmp_path / "run.csv").write_text(f"time,a\n2026-01-01 00:00:00Z,1.5\n{bad}\n")
    code, err = await replay(plant, tmp_path, "press-1")
    assert code != 0
    assert "replayed 1 of 2 rows" in err
    assert "run.csv: line 3: " in err


async def test_speed_keeps_the_recordings_pace_so_many_times(plant: Plant, tmp_path: Path) -> None:
    expected = record(tmp_path / "run.csv", 4, step=timedelta(seconds=10))
    before = time.monotonic()
    code, err = await replay(plant, tmp_path, "press-1", "--speed", "25")
    took = time.monotonic() - before
    assert code == 0, err
    assert 1.2 <= took < 10, "30 s of recording in 1.2 s"
    assert await stored(plant, "press-1") == expected
    assert await frames_of(plant, "press-1") == 4, "each row goes out when it is due"


async def test_a_recording_longer_than_the_spool_waits_for_room(tmp_path: Path) -> None:
    port = free_port()
    process = Process(tmp_path, "--port", str(port))
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, (await process.read_first_start())[0])
        token = await plant.register("press-1")
        await process.stop()
        expected = record(tmp_path / "run.csv", 120)
        arguments = ("--url", plant.url, "--token", token, "--replay", "run.csv", "--spool", "2")
        try:
            async with started(tmp_path, *arguments) as running:
                await running.line("no session")  # all that the spool takes is in it by now
                await process.start()
                code, err = await running.end()
            assert code == 0, err
            assert "replayed 120 of 120 rows" in err
            assert await stored(plant, "press-1") == expected
        finally:
            await process.stop()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), (" 42 ", 42), ("-7", -7), ("+7", 7), ("0", 0), ("-0", 0), ("1.5", 1.5), ("1.0", 1.0), ("-0.0", -0.0), ("1e3", 1000.0),
        (".5", 0.5), ("5.", 5.0), ("0.5", 0.5), ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)),
        ("-1e300", -1e300), ("", None), ("   ", None), ("nan", None), ("-NaN", None), ("true", True), ("FALSE", False), (" True ", True),
        ("running", "running"), (" running ", "running"), ("1,5", "1,5"), ("0x10", "0x10"), ("12:30", "12:30"), ("1_000", "1_000"),
        ("007", "007"), ("00123", "00123"), ("-01", "-01"), ("00.5", "00.5"), ("--", "--"), ("x" * 1024, "x" * 1024),
    ],
)  # fmt: skip
def test_a_cell_is_read_as_what_it_says(text: str, value: object) -> None:
    read = agent.parse_cell(text)
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "comma", "point"),
    [
        ("21,5", 21.5, "21,5"), ("1.013,25", 1013.25, "1.013,25"), ("-1.013.250", -1013250, "-1.013.250"), ("1.013", 1013, 1.013),
        ("1,013", 1.013, 1013), ("1,013.25", "1,013.25", 1013.25), ("21.5", "21.5", 21.5), ("0.123", "0.123", 0.123), ("7", 7, 7),
        (",5", 0.5, ",5"), ("1,5e3", 1500.0, "1,5e3"), ("1.0130", "1.0130", 1.013), ("12345,5", 12345.5, "12345,5"),
    ],
)  # fmt: skip
def test_decimals_are_read_as_the_file_writes_them(text: str, comma: object, point: object) -> None:
    for style, value in ((agent.COMMA, comma), (agent.POINT, point)):
        read = agent.parse_cell(text, style)
        assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9223372036854775808", "63 bits"), ("-9223372036854775809", "63 bits"), ("9" * 5000, "63 bits"), ("1e400", "larger"),
        ("inf", "finite"), ("-Infinity", "finite"), ("x" * 1025, "1025 characters"), ("a\0b", "zero character"),
    ],
)  # fmt: skip
def test_what_the_server_cannot_keep_is_a_value_error(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        agent.parse_cell(text)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200))
def test_every_real_is_read_exactly(value: float) -> None:
    assert agent.parse_cell(repr(value)) == value


@given(st.integers(min_value=-(2**63) + 1, max_value=2**63 - 1))
def test_every_integer_is_read_exactly(value: int) -> None:
    assert agent.parse_cell(str(value)) == value


@given(st.text())
def test_whatever_a_cell_holds_is_a_value_for_the_wire_or_none(text: str) -> None:
    value = None
    with suppress(ValueError):
        value = agent.parse_cell(text)
    assert value is None or value == json.loads(json.dumps(value, allow_nan=False))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-10**9, max_value=10**9))
def test_a_number_with_groups_and_decimal_comma_is_the_same_number(number: Any) -> None:
    english = f"{number:,.3f}"
    german = english.translate(str.maketrans(",.", ".,"))
    assert agent.parse_cell(german, agent.COMMA) == agent.parse_cell(english, agent.POINT) == float(number)


def test_what_a_cell_says_about_decimals() -> None:
    cells = {
        "comma": "21,5 1.013,25 0,123 1.013.250",
        "point": "21.5 0.123 1,013.25",
        "either": "1.013 1,013 -1.013",
        "": "7 a.b 1e5 x 1.2.3",
    }
    for mark, texts in cells.items():
        assert {agent.decimal_mark(text) for text in texts.split()} == {mark}


BERLIN = agent.Times(agent.parse_zone("Europe/Berlin"))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2020-03-09 10:14:33Z", 1_583_748_873_000),
        ("2020-03-09T11:14:33.250+01:00", 1_583_748_873_250),
        (" 2020-03-09 10:14:33.0006Z ", 1_583_748_873_001),
        ("1583748873", 1_583_748_873_000),
        ("1583748873.25", 1_583_748_873_250),
        ("1583748873,25", 1_583_748_873_250),
        ("1.58374887325e9", 1_583_748_873_250),
        ("1583748873250", 1_583_748_873_250),
    ],
)
def test_a_recorded_time_names_its_zone_or_counts_from_1970(text: str, moment: int) -> None:
    assert agent.parse_time(text, agent.Times()) == (moment, False)


@pytest.mark.parametrize(
    ("text", "times", "moment"),
    [
        ("2020-03-09 10:14:33", BERLIN, "2020-03-09T09:14:33Z"),
        ("2020-07-09", BERLIN, "2020-07-08T22:00:00Z"),
        ("2020-07-09 12:00Z", BERLIN, "2020-07-09T12:00:00Z"),
        ("2020-07-09 12:00", agent.Times(agent.parse_zone("-03:30")), "2020-07-09T15:30:00Z"),
        ("2020-07-09 12:00", agent.Times(agent.parse_zone("utc")), "2020-07-09T12:00:00Z"),
        ("23.11.2026 08:00", agent.Times(BERLIN.zone, "%d.%m.%Y %H:%M"), "2026-11-23T07:00:00Z"),
        ("23.11.2026 08:00 +0300", agent.Times(None, "%d.%m.%Y %H:%M %z"), "2026-11-23T05:00:00Z"),
    ],
)
def test_a_time_without_a_zone_is_in_the_one_that_is_told(text: str, times: agent.Times, moment: str) -> None:
    assert agent.parse_time(text, times) == (round(datetime.fromisoformat(moment).timestamp() * 1000), False)


def test_an_hour_that_came_twice_is_read_in_the_files_order() -> None:
    texts = ["01:30", "02:00", "02:30", "02:00", "02:30", "03:00"]
    before, read = None, []
    for text in texts:
        before, twice = agent.parse_time(f"2026-10-25 {text}", BERLIN, before)
        read.append((f"{datetime.fromtimestamp(before / 1000, UTC):%H:%M}", twice))
    assert read == [("23:30", False), ("00:00", True), ("00:30", True), ("01:00", True), ("01:30", True), ("02:00", False)]


def test_a_time_that_the_clock_left_out_is_no_time() -> None:
    with pytest.raises(ValueError, match="does not exist in Europe/Berlin"):
        agent.parse_time("2026-03-29 02:30", BERLIN)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "ISO 8601") for text in ("", "yesterday", "nan", "inf", "2020-13-09", "2020-03-09 25:00:00", "10:14", "23.11.2026 08:00")),
        ("1e400", "neither seconds nor milliseconds"), ("1e14", "neither seconds nor milliseconds"),
        ("2020-03-09 10:14:33", "--timezone"), ("2020-03-09", "--timezone"),
    ],
)  # fmt: skip
def test_what_is_no_time_is_a_value_error_that_says_what_to_add(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        agent.parse_time(text, agent.Times())


@pytest.mark.parametrize("text", ["Mars/Olympus", "../etc/passwd", "Europe", "+1", "+25:00", ""])
def test_what_is_no_zone_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        agent.parse_zone(text)


@given(st.integers(min_value=946_684_800_000, max_value=4_000_000_000_000))
@example(1_583_748_873_000)
def test_every_millisecond_is_read_exactly_in_each_form(moment: int) -> None:
    seconds, milliseconds = divmod(moment, 1000)
    utc = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=moment)
    in_utc = agent.Times(UTC)
    texts = (f"{seconds}.{milliseconds:03d}", str(moment), utc.isoformat(), utc.replace(tzinfo=None).isoformat(" "))
    assert [agent.parse_time(text, in_utc) for text in texts] == [(moment, False)] * 4


# Files, without a server


LATEST = 4_000_000_000_000


def read(path: Path, content: str | bytes, **options: Any) -> tuple[agent.Recording, list[tuple[int, dict[str, Any]]]]:
    """A recording out of this content, and its samples by line."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    recording = agent.Recording(agent.Options(replay=str(path), **options))
    recording.survey()
    return recording, [(line, sample) for line, sample in recording.samples(LATEST) if sample is not None]


def lost(recording: agent.Recording) -> list[str]:
    return [line.rpartition("run.csv: ")[2] for line in recording.losses.report().splitlines()]


def test_a_recording_knows_its_rows_before_it_is_read(tmp_path: Path) -> None:
    recording, samples = read(tmp_path / "run.csv", 'time,a\n2026-01-01,1\n\n2026-01-02,\n2026-01-03,"x\ny"\n', timezone="UTC")
    assert recording.rows == 3
    assert samples == [(2, {"ts": 1_767_225_600_000, "values": {"a": 1}}), (5, {"ts": 1_767_398_400_000, "values": {"a": "x\ny"}})]
    assert recording.losses.count == 0, "an empty cell is no value"


@pytest.mark.parametrize(
    ("middle", "line"),
    [
        pytest.param(b"2026-01-01 00:00:02Z,5.\n", 4, id="a short line"),
        pytest.param(b"2026-01-01 00:0\n", 4, id="only a part of a time"),
        pytest.param(b"2026-01-01 00:00:02Z,1,2,3\n", 4, id="a line too long"),
        pytest.param(b"\n\nyesterday,1,2\n", 6, id="a bad time after empty lines"),
        pytest.param(b"2026-13-01 00:00:02Z,1,2\n", 4, id="a month too many"),
        pytest.param(b",1,2\n", 4, id="no time"),
        pytest.param(b"nan,1,2\n", 4, id="a time that is no number"),
        pytest.param(b"1e300,1,2\n", 4, id="a time beyond all clocks"),
        pytest.param(b"0,1,2\n", 4, id="a time before the server's"),
        pytest.param(b"4000000000001,1,2\n", 4, id="a time after the server's"),
        pytest.param(b"2026-01-01 00:00:02Z,\xff\xfe,2\n", 4, id="not UTF-8"),
        pytest.param(b"2026-01-01 00:00:02Z," + b"9" * 200_000 + b",2\n", 4, id="a cell without end"),
        pytest.param(b"2026-01-01 00:00:02Z," + b"9" * 9_000_000 + b",2\n", 4, id="a line without end"),
        pytest.param(b'2026-01-01 00:00:02Z,"5,2\n', 4, id="an open quote"),
        pytest.param(b'2026-01-01 00:00:02Z,"5"x,2\n', 4, id="text behind a quote"),
    ],
)
def test_a_row_that_cannot_be_read_is_lost_alone(tmp_path: Path, middle: bytes, line: int) -> None:
    recording, samples = read(tmp_path / "run.csv", f"time,a,b\n{GOOD}".encode() + middle + LAST.encode())
    assert [sample["values"] for _, sample in samples] == [{"a": 1.5, "b": 2.5}, {"a": 3.5, "b": 4.5}, {"a": 5.5, "b": 6.5}]
    assert [text.partition(": ")[0] for text in lost(recording)] == [f"line {line}"]
    assert recording.losses.rows == 1
    assert len(recording.losses.report()) < 300


def test_an_open_quote_far_from_the_end_takes_one_row(tmp_path: Path) -> None:
    rows = [f'2026-01-01 00:{row // 60:02}:{row % 60:02}Z,{chr(34) if row == 7 else ""}{row}' for row in range(1_000)]
    recording, samples = read(tmp_path / "run.csv", "\n".join(("time,a", *rows)))
    assert [sample["values"]["a"] for _, sample in samples] == [row for row in range(1_000) if row != 7]
    assert lost(recording) == ["line 9: unexpected end of data"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("", "line 1: ", id="an empty file"),
        pytest.param("\n\n", "line 1: ", id="empty lines"),
        pytest.param("time\n2026-01-01\n", "line 1: ", id="no metric"),
        pytest.param("time,a,a\n2026-01-01,1,2\n", "line 1: ", id="two metrics of one name"),
        pytest.param("time,a,\n2026-01-01,1,2\n", "line 1: ", id="a metric without a name"),
        pytest.param(f"time,{'x' * 129}\n2026-01-01,1\n", "line 1: .*128 printable", id="a name too long"),
        pytest.param("time," + ",".join(map(str, range(2_001))), "line 1: 2001 metrics", id="metrics too many"),
        pytest.param("time,metric,avg,max\n", "export of buckets", id="an export of buckets"),
        pytest.param("time,device,metric,value\n", "several devices", id="an export of many devices"),
        pytest.param("time;a\n1767225602;21,5\n1767225603;21.5\n", "two ways, '21,5' in line 2 and '21.5' in line 3", id="both decimals"),
        pytest.param("time;a\n1767225602;7\n1767225603;1.013\n", "line 3: '1.013' may be .*--decimal comma", id="decimals or thousands"),
        pytest.param("time\ta\n1767225602\t1,013\n", "line 2: '1,013' may be .*--decimal comma", id="decimals or thousands, in tabs"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_before_anything_is_sent(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(agent.AgentError, match=rf"run\.csv: {words}" if words.startswith("line") else words):
        read(tmp_path / "run.csv", content)


@pytest.mark.parametrize(("decimal", "value"), [("comma", 1013), ("point", 1.013)])
def test_what_can_be_read_in_two_ways_is_read_as_told(tmp_path: Path, decimal: str, value: object) -> None:
    _, samples = read(tmp_path / "run.csv", "time;a\n1767225602;1.013\n", decimal=decimal)
    assert samples[0][1]["values"] == {"a": value}


def test_the_choice_of_decimals_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(tmp_path / "run.csv", "time\ta\tb\n1767225602\t1.013\t21,5\n")
    assert caplog.messages[-1].endswith("1 rows, columns separated by tab, decimal comma")


def test_an_export_holds_a_metric_in_every_row(tmp_path: Path) -> None:
    recording, samples = read(tmp_path / "run.csv", f"time,metric,value\n{GOOD.replace('1.5', 'a').replace('3.5', 'a,b')}"[:-1] + "\n")
    assert [(line, sample["values"]) for line, sample in samples] == [(2, {"a": 2.5})]
    assert lost(recording) == ["line 3: 4 columns where the header has 3"]


def test_a_secret_in_a_file_is_not_shown(tmp_path: Path) -> None:
    token = iiot.mint("dev").text
    recording, _ = read(tmp_path / "run.csv", f"time,a\n{token},1\n")
    assert token not in recording.losses.report()
    assert "line 2" in recording.losses.report()


def rows_of(texts: list[str]) -> Iterator[str]:
    yield "time,a"
    yield from texts


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=12))
def test_whatever_a_file_holds_every_row_is_sent_or_named(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    content = "\n".join(rows_of([f"1767225602.{number:03d},{line}" for number, line in enumerate(lines)]))
    recording, samples = read(tmp_path_factory.mktemp("rows") / "run.csv", content)
    named = recording.losses.rows
    assert all(sample["values"] for _, sample in samples)
    assert len(samples) + named <= recording.rows
    assert json.loads(agent.encode({"samples": [sample for _, sample in samples]}))
