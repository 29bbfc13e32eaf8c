"""Lines of logs: stored once, in order, found by their words, and kept for as long as their tenant wants."""

from __future__ import annotations

import asyncio
import csv
import functools
import io
import json
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession, StreamReader
from plant import PATIENCE, Device, Plant, Process

import iiot

START = 1_767_225_600_000  # 2026-01-01T00:00:00Z


def entry(message: str, level: str = "info", **more: Any) -> dict[str, Any]:
    return {"level": level, "message": message, **more}


async def ship(device: Device, *entries: dict[str, Any]) -> None:
    """Send lines in one frame, and wait until they are stored."""
    device.seq += 1
    await device.send("log", seq=device.seq, entries=entries)
    await device.acknowledged(device.seq)


async def found(plant: Plant, path: str = "/logs", **query: str) -> list[str]:
    """The messages of a page."""
    async with plant.client.get(plant.url + path, params=query, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        body = await response.json()
        assert response.status == 200, body
        return [item["message"] for item in body["items"]]


async def refused(plant: Plant, **query: str) -> dict[str, Any]:
    async with plant.client.get(plant.url + "/logs", params=query, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        error: dict[str, Any] = (await response.json())["error"]
        assert (response.status, error["code"]) == (400, "bad_query")
        return error


# ---- what is stored


async def test_a_line_comes_back_as_it_was_sent(plant: Plant) -> None:
    device = await plant.device("press-1")
    told = {"code": 4711, "axis": {"x": 1.5}}
    await ship(device, entry("motor started", "notice", ts=START, logger="drive", fields=told), entry("überhitzt \0 ✓ \t\x1b[0m"))
    second, first = (await plant.get("/iiot/press-1/logs"))["items"]
    received = first.pop("received_at")
    assert first == {
        "id": 1, "at": "2026-01-01T00:00:00.000Z", "device": "press-1", "level": "notice", "message": "motor started", "logger": "drive",
        "host": None, "fields": told,
    }  # fmt: skip
    assert second["message"] == "überhitzt ␀ ✓ \t\x1b[0m"
    assert second["at"] == second["received_at"] == received


async def test_a_frame_that_is_sent_again_is_stored_once(plant: Plant) -> None:
    device = await plant.device("press-1")
    for _ in range(2):
        await device.send("log", seq=1, entries=[entry("once")])
        await device.acknowledged(1)
    assert await found(plant) == ["once"]


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ({"level": "fatal"}, "entries[1].level"), ({"message": 5}, "entries[1].message"), ({"message": "x" * 16_385}, "entries[1].message"),
        ({"ts": 0}, "entries[1].ts"), ({"fields": []}, "entries[1].fields"), ({"host": "here"}, "entries[1].host"),
    ],
)  # fmt: skip
async def test_nothing_of_a_frame_with_a_wrong_line_is_stored(plant: Plant, wrong: dict[str, Any], path: str) -> None:
    device = await plant.device("press-1")
    device.seq = 1
    await device.send("log", seq=device.seq, entries=[entry("good"), {**entry("bad"), **wrong}])
    error = await device.expect("error")
    assert (error["code"], [field["path"] for field in error["errors"]]) == ("invalid", [path])
    await ship(device, entry("after"))
    assert await found(plant) == ["after"]


async def test_acknowledged_lines_survive_kill(process: Process) -> None:
    iiot.prepare_database(process.database)
    token = plants.admin_token(process.database)
    await process.start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        for number in range(50):
            device.seq += 1
            await device.send("log", seq=device.seq, entries=[entry(f"line {number} of many")])
        await device.acknowledged(30)
        await process.stop(signal.SIGKILL)
        plants.check_whole(process.database)
        await process.start()
        again = process.plant(client, token)
        again.tokens, plant = plant.tokens, again
        device = await plant.device("press-1")
        assert device.welcome["seq"] >= 30
        lines = (await plant.get("/logs?q=many&limit=1000"))["items"]
        assert len(lines) == device.welcome["seq"]


async def test_lines_of_a_file_are_stored_once_through_kills_of_agent_and_server(process: Process, tmp_path: Path) -> None:
    iiot.prepare_database(process.database)
    admin, file, count = plants.admin_token(process.database), tmp_path / "app.log", 3_000
    file.touch()
    await process.start()
    async with ClientSession() as client:
        token = await process.plant(client, admin).register("press-1")
        stored = functools.partial(plants.rows, process.database, "select count(*) from log_line")

        async def agent() -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                sys.executable, str(plants.ROOT / "agent.py"), "--url", process.url, "--token", token, "--log-file", str(file),
                "--spool-file", str(tmp_path / "spool"), "--cursor-file", str(tmp_path / "cursor"), cwd=tmp_path,
            )  # fmt: skip

        running = await agent()
        await process.plant(client, admin).until("/iiot/press-1", lambda body: body["connected"])
        async with asyncio.timeout(6 * PATIENCE):
            with file.open("a") as lines:
                for number in range(count):
                    print(f"ERROR line {number}", file=lines, flush=True)
                    if number % 50 == 0:
                        await asyncio.sleep(0)
                    if number in (count // 3, 2 * count // 3):
                        while stored()[0][0] < number // 2:
                            await asyncio.sleep(0.01)
                        await process.stop(signal.SIGKILL)
                        running.kill()
                        await running.wait()
                        await process.start()
                        running = await agent()
            while stored()[0][0] < count:
                await asyncio.sleep(0.05)
        running.terminate()
        await running.wait()
    messages = [message for (message,) in plants.rows(process.database, "select message from log_line order by id")]
    assert messages == [f"ERROR line {number}" for number in range(count)]
    plants.check_whole(process.database)


# ---- what is found


LINES = (
    ("press-1", "error", "E-4711: motor-start failed at 10.0.0.7"),
    ("press-1", "warning", "bearing overheated, 50% load"),
    ("press-2", "info", "cannot open C:\\temp\\spool.txt"),
    ("press-2", "debug", "Gehäuse überhitzt"),
    ("pump-1", "critical", "start motor"),
)  # fmt: skip


@pytest.fixture
async def logged(plant: Plant) -> Plant:
    devices: dict[str, Device] = {}
    for name, level, message in LINES:
        if name not in devices:
            devices[name] = await plant.device(name)
        await ship(devices[name], entry(message, level))
    return plant


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, [4, 3, 2, 1, 0]), ({"q": "motor"}, [4, 0]), ({"q": "MOTOR"}, [4, 0]), ({"q": "E-4711"}, [0]), ({"q": "motor-start"}, [0]),
        ({"q": "10.0.0.7"}, [0]), ({"q": "C:\\temp"}, [2]), ({"q": "50%"}, [1]), ({"q": "überhitzt"}, [3]), ({"q": "uberhitzt"}, [3]),
        ({"q": "heat"}, [1]), ({"q": "hitz"}, [3]), ({"q": "start motor"}, [4, 0]), ({"q": '"start motor"'}, [4]), ({"q": "over*"}, [1]),
        ({"q": "motor NOT failed"}, [4]), ({"q": "bearing OR temp"}, [2, 1]), ({"q": "nothing"}, []), ({"level": "error"}, [4, 0]),
        ({"level": "warning", "q": "motor OR load"}, [4, 1, 0]), ({"match": "press-*", "q": "motor"}, [0]), ({"match": "x*"}, []),
        ({"match": "press-*", "level": "warning"}, [1, 0]), ({"q": "t1"}, []), ({"q": "d1 OR t1l3"}, []),
    ],
)  # fmt: skip
async def test_a_search_finds_what_an_engineer_means(logged: Plant, query: dict[str, str], expected: list[int]) -> None:
    assert await found(logged, **query) == [LINES[number][2] for number in expected]


async def test_names_of_more_devices_than_the_index_is_told_of_are_looked_at(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), log_devices=1)) as plant:
        for name in ("press-1", "press-2", "pump-1"):
            await ship(await plant.device(name), entry(f"of {name}"))
        assert await found(plant, match="press-*") == ["of press-2", "of press-1"]
        assert await found(plant, match="press-*", q="of") == ["of press-2", "of press-1"]
        assert await found(plant, match="pump-*") == ["of pump-1"]


async def test_who_follows_a_device_that_is_removed_comes_to_an_end(plant: Plant) -> None:
    device = await plant.device("press-1")
    async with plant.client.get(
        f"{plant.url}/iiot/press-1/logs?follow=1&format=text", headers={"Authorization": f"Bearer {plant.token}"}
    ) as response:
        await ship(device, entry("last"))
        assert await next_line(response.content) == "last"
        other = await plant.device("press-2")
        assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
        await ship(other, entry("of another"))
        async with asyncio.timeout(PATIENCE):
            assert (await response.content.read()).strip() == b""


async def test_a_search_of_one_device_finds_its_lines_alone(logged: Plant) -> None:
    assert await found(logged, "/iiot/press-1/logs", q="motor") == [LINES[0][2]]
    assert await found(logged, "/iiot/press-2/logs", level="info") == [LINES[2][2]]
    async with logged.client.get(f"{logged.url}/iiot/nobody/logs", headers={"Authorization": f"Bearer {logged.token}"}) as response:
        assert response.status == 404


@pytest.mark.parametrize("text", ['"open', "(a", "a)", "AND", "a OR", "NOT", "()", "a AND OR b"])
async def test_a_bad_expression_is_refused_with_where(logged: Plant, text: str) -> None:
    (field,) = (await refused(logged, q=text))["details"]
    assert field["path"] == "q"
    assert any(character.isdigit() for character in field["message"])


async def test_a_part_of_very_many_words_is_refused_in_words(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), log_parts=3)) as plant:
        device = await plant.device("press-1")
        await ship(device, entry("pumpa pumpb pumpc pumpd"))
        (field,) = (await refused(plant, q="pump"))["details"]
        assert "pump" in field["message"]
        assert await found(plant, q="pump*") == await found(plant, q="pumpa") == ["pumpa pumpb pumpc pumpd"]


@pytest.mark.parametrize(
    ("word", "listed"),
    [
        ("motor", True), ("überhitzt", True), ("facade", True), ("db2inst1", True), ("plc1234", True), ("x" * 64, True), ("x" * 65, False),
        ("abc", False), ("12345", False), ("a1b2c3", False), ("deadbeef0", False), ("plc12345", False), ("0a1b2c3d4e5f", False),
    ],
)  # fmt: skip
def test_words_of_which_there_is_no_end_are_not_listed(word: str, listed: bool) -> None:  # noqa: FBT001 - a table
    assert bool(iiot.LISTED_WORD.fullmatch(word)) == listed


async def test_a_page_stays_where_it_is_while_lines_arrive(plant: Plant) -> None:
    device = await plant.device("press-1")
    await ship(device, *(entry(f"line {number}") for number in range(10)))
    page = await plant.get("/logs?q=line&limit=4")
    seen = [item["message"] for item in page["items"]]
    while page["next"] is not None:
        await ship(device, entry("line later"))
        page = await plant.get(f"/logs?q=line&limit=4&after={page['next']}")
        seen += [item["message"] for item in page["items"]]
    assert seen == [f"line {number}" for number in reversed(range(10))]


async def test_a_range_of_times_holds_its_start_and_not_its_end_in_whatever_order_lines_came(plant: Plant) -> None:
    device = await plant.device("press-1")
    hours = [5, 1, 900, 3, 2]
    for hour in hours:
        await ship(device, entry(f"at {hour}", ts=START + hour * 3_600_000))
    assert await found(plant, **{"from": str(START + 3_600_000), "to": str(START + 3 * 3_600_000)}) == ["at 2", "at 1"]
    assert await found(plant, q="at", **{"from": str(START + 4 * 3_600_000)}) == ["at 900", "at 5"]


async def test_a_tenant_finds_no_line_of_another(plant: Plant) -> None:
    platform = plants.admin_token(plant.database, "platform")
    assert (await plant.ask("POST", "/tenants", {"name": "acme"}, token=platform))[0] == 201
    other = Plant(plant.url, plant.client, plants.admin_token(plant.database, tenant_name="acme"), plant.database)
    await ship(await plant.device("press-1"), entry("ours alone"))
    await ship(await other.device("press-1"), entry("theirs alone"))
    for query in ({}, {"q": "alone"}, {"q": "NOT nothing"}, {"q": "one OR heir"}, {"match": "*"}, {"level": "info"}):
        assert await found(plant, **query) == ["ours alone"]
        assert await found(other, **query) == ["theirs alone"]


# ---- how it is shown


async def streamed(plant: Plant, **query: str) -> tuple[str, str]:
    """The content type and the text of a stream that ends."""
    async with plant.client.get(plant.url + "/logs", params=query, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        assert response.status == 200
        assert response.headers["X-Accel-Buffering"] == "no"
        return response.headers["Content-Type"], await response.text()


async def test_each_format_shows_all_lines_newest_first(plant: Plant) -> None:
    device = await plant.device("press-1")
    await ship(device, entry('a "b", c\n\x1b[31mred', "error", ts=START, logger="=drive", fields={"n": 1}))
    await ship(device, *(entry(f"line {number}", "debug", ts=START) for number in range(1_500)))
    kind, text = await streamed(plant, format="ndjson", level="info")
    (line,) = [json.loads(text) for text in text.splitlines()]
    assert (kind, line["message"], line["fields"]) == ("application/x-ndjson", 'a "b", c\n\x1b[31mred', {"n": 1})
    kind, text = await streamed(plant, format="ecs", level="info")
    shown = json.loads(text)
    assert shown.pop("event.ingested") == line["received_at"]
    assert shown == {
        "@timestamp": "2026-01-01T00:00:00.000Z", "ecs.version": "8.11.0", "message": 'a "b", c\n\x1b[31mred', "log.level": "error",
        "log.logger": "=drive", "host.name": "press-1", "iiot.fields": {"n": 1},
    }  # fmt: skip
    kind, text = await streamed(plant, format="text", level="info")
    expected = '2026-01-01T00:00:00.000Z press-1 error =drive: a "b", c\\n\\x1b[31mred\n'
    assert (kind, text) == ("text/plain; charset=utf-8", expected)
    kind, text = await streamed(plant, format="csv")
    header, *rows = csv.reader(io.StringIO(text))
    assert kind == "text/csv; charset=utf-8"
    assert header == list(iiot.LINE_COLUMNS)
    assert [row[6] for row in rows] == [*(f"line {number}" for number in reversed(range(1_500))), 'a "b", c\n\x1b[31mred']
    assert rows[-1] == ["2026-01-01T00:00:00.000Z", line["received_at"], "press-1", "error", "=drive", "", rows[-1][6], '{"n":1}']
    assert len((await streamed(plant, format="ndjson", limit="7"))[1].splitlines()) == 7


@pytest.mark.parametrize("query", [{"format": "xml"}, {"follow": "1"}, {"format": "ndjson", "limit": "0"}, {"level": "loud"}])
async def test_a_format_that_there_is_not_is_refused(plant: Plant, query: dict[str, str]) -> None:
    assert (await refused(plant, **query))["details"][0]["path"] in ("format", "limit", "level")


@asynccontextmanager
async def following(plant: Plant, **query: str) -> AsyncIterator[StreamReader]:
    asked = {"follow": "1", "format": "text", **query}
    async with plant.client.get(plant.url + "/logs", params=asked, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        assert response.status == 200
        yield response.content


async def next_line(stream: StreamReader) -> str:
    """The next line that is not empty: an empty one shows that the stream lives."""
    async with asyncio.timeout(PATIENCE):
        while not (line := (await stream.readline()).decode().rstrip()):
            assert not stream.at_eof()
        return line.rpartition(" ")[2]


async def test_who_follows_sees_the_last_lines_and_then_each_as_it_is_stored(plant: Plant) -> None:
    device = await plant.device("press-1")
    await ship(device, *(entry(f"before-{number}") for number in range(15)))
    async with following(plant) as stream, following(plant, q="NOT later", limit="1", level="error") as picky:
        assert [await next_line(stream) for _ in range(10)] == [f"before-{number}" for number in range(5, 15)]
        for number in range(8):
            await ship(device, entry(f"later-{number}", "error"))
            assert await next_line(stream) == f"later-{number}"
        await ship(device, entry("other", "error"), entry("info"))
        assert [await next_line(stream) for _ in range(2)] == ["other", "info"]
        assert await next_line(picky) == "other"


async def test_who_follows_goes_on_after_a_line(plant: Plant) -> None:
    device = await plant.device("press-1")
    await ship(device, *(entry(f"line-{number}") for number in range(30)))
    page = await plant.get("/logs?limit=20")
    async with following(plant, after=str(page["items"][-1]["id"])) as stream:
        assert [await next_line(stream) for _ in range(19)] == [f"line-{number}" for number in range(11, 30)]
        await ship(device, entry("one-more"))
        assert await next_line(stream) == "one-more"
    assert (await plant.ask("GET", "/logs?follow=1&format=text&after=3&limit=5"))[0] == 400
    assert (await plant.ask("GET", "/iiot/nobody/logs?follow=1&format=text&after=3"))[0] == 404


async def test_a_tenant_s_lines_wake_nobody_of_another(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), follow_seconds=0.0, feed_seconds=PATIENCE)) as plant:
        platform = plants.admin_token(plant.database, "platform")
        assert (await plant.ask("POST", "/tenants", {"name": "acme"}, token=platform))[0] == 201
        other = Plant(plant.url, plant.client, plants.admin_token(plant.database, tenant_name="acme"), plant.database)
        device, busy = await plant.device("press-1"), await other.device("press-1")
        async with following(plant) as stream:
            for number in range(20):
                await ship(busy, entry(f"theirs-{number}"))
            await ship(device, entry("ours"))
            assert (await stream.readline()).decode().endswith("ours\n"), "not even an empty line before"


async def test_those_who_follow_are_bounded_in_number(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), feeds=2)) as plant:
        async with following(plant) as first, following(plant):
            status, answer = await plant.ask("GET", "/logs?follow=1&format=text")
            assert (status, answer["error"]["code"]) == (429, "too_many_feeds")
            device = await plant.device("press-1")
            await ship(device, entry("still"))
            assert await next_line(first) == "still"
        await plant.until("/logs", lambda body: body["items"])
        async with following(plant) as again:
            await ship(device, entry("again"))
            assert [await next_line(again) for _ in range(2)] == ["still", "again"]


# ---- how long it is kept


async def lines_left(plant: Plant) -> int:
    ((count,),) = plants.rows(plant.database, "select count(*) from log_line")
    return int(count)


async def until_left(plant: Plant, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while await lines_left(plant) != count:
            await asyncio.sleep(0.02)


def age(plant: Plant, days: int, which: str) -> None:
    """Let lines have come so many days earlier."""
    with plants.writing(plant.database) as connection:
        connection.execute(f"update log_line set received_at = received_at - ? * {iiot.DAY} where {which}", (days,))
        connection.execute("delete from log_hour")
        connection.execute(
            f"insert into log_hour select tenant_id, received_at / {iiot.HOUR}, min(id), max(id) from log_line group by 1, 2"
        )


async def test_lines_that_were_kept_long_enough_are_deleted_and_no_others(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), retention_seconds=0.05, clock_seconds=0.05, removed_lines=3)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        assert (await plant.ask("PUT", "/retention", {"logs": {"days": 10}}))[0] == 200
        await ship(device, *(entry(f"old{number}") for number in range(8)))
        await ship(device, entry("newer"))
        age(plant, 9, "message <> 'newer'")
        await asyncio.sleep(0.3)
        assert await lines_left(plant) == 9
        assert (await plant.ask("PUT", "/retention", {"logs": {"days": 8}}))[1] == {"logs": {"days": 8}}
        await until_left(plant, 1)
        assert await found(plant) == await found(plant, q="newer") == ["newer"]
        assert await found(plant, q="old*") == await found(plant, q="old3") == []
        async with asyncio.timeout(PATIENCE):
            while plants.rows(plant.database, "select word from log_word order by word") != [("newer",)]:
                await asyncio.sleep(0.02)
        await ship(device, entry("old3 again"))
        assert await found(plant, q="ld3") == ["old3 again"], "a word that was deleted is known again"
        plants.check_whole(plant.database)


async def test_lines_that_came_while_the_clock_was_ahead_hold_up_no_others(tmp_path: Path) -> None:
    limits = attrs.evolve(iiot.Limits(), retention_seconds=0.05, clock_seconds=0.05, removed_lines=3)
    async with plants.plant(tmp_path, limits) as plant:
        device = await plant.device("press-1")
        await ship(device, *(entry(f"ahead{number}") for number in range(8)))
        await ship(device, *(entry(f"old{number}") for number in range(8)))
        await ship(device, entry("newer"))
        age(plant, -400, "message like 'ahead%'")
        age(plant, 40, "message like 'old%'")
        await until_left(plant, 9)
        assert await found(plant, q="old*") == []
        assert plants.rows(plant.database, "select count(*) from log_hour") == [(2,)]
        plants.check_whole(plant.database)


@pytest.mark.parametrize("running", [True, False])
async def test_a_clock_that_is_set_forward_deletes_nothing_until_it_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, running: bool
) -> None:
    limits = attrs.evolve(iiot.Limits(), retention_seconds=0.05, clock_seconds=0.05, clock_doubt_seconds=1.0)
    right, ahead = iiot.now_ms, 40 * iiot.DAY
    async with plants.plant(tmp_path, limits) as plant:
        await ship(await plant.device("press-1"), entry("one"))
        if running:
            await plant.until("/healthz", lambda body: body)
            monkeypatch.setattr(iiot, "now_ms", lambda: right() + ahead)
            await asyncio.sleep(0.5)
            assert await lines_left(plant) == 1
            await until_left(plant, 0)
    if not running:
        monkeypatch.setattr(iiot, "now_ms", lambda: right() + ahead)
        async with plants.plant(tmp_path, limits) as plant:
            await asyncio.sleep(0.5)
            assert await lines_left(plant) == 1
            await until_left(plant, 0)


async def test_a_clock_that_is_put_right_again_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, moment = iiot.SteadyClock(iiot.Limits()), iiot.now_ms
    with pytest.MonkeyPatch.context() as patch:
        clock.expect(moment() - iiot.HOUR)
        assert not clock.is_doubtful()
        patch.setattr(iiot, "now_ms", lambda: moment() + 40 * iiot.DAY)
        assert clock.is_doubtful()
        assert "the clock is 960 h ahead of what was known" in caplog.text
        assert clock.is_doubtful()
        patch.setattr(iiot, "now_ms", moment)
        assert not clock.is_doubtful()


async def test_retention_is_as_the_installation_says_until_it_is_set(plant: Plant) -> None:
    assert await plant.get("/retention") == {"logs": {"days": 30}}
    assert (await plant.ask("PUT", "/retention", {"logs": {"days": 1}}))[1] == {"logs": {"days": 1}}
    assert await plant.get("/retention") == {"logs": {"days": 1}}
    assert (await plant.ask("DELETE", "/retention"))[0] == 204
    assert await plant.get("/retention") == {"logs": {"days": 30}}
    for days in (0, -1, 1.5, "7", 36_601, None, True):
        assert (await plant.ask("PUT", "/retention", {"logs": {"days": days}}))[0] == 422


async def test_a_removed_device_leaves_no_lines_and_no_words_in_the_index(plant: Plant) -> None:
    gone, stays = await plant.device("press-1"), await plant.device("press-2")
    await ship(gone, *(entry(f"gone {number}") for number in range(700)))
    await ship(stays, entry("stays"))
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    assert await found(plant) == ["stays"], "at once, before they are deleted"
    await until_left(plant, 1)
    plants.check_whole(plant.database)
    with sqlite3.connect(plant.database) as connection:
        assert connection.execute("select count(*) from log_index where log_index match 'gone'").fetchone() == (0,)
    connection.close()


def test_a_wrong_word_in_the_index_is_noticed(tmp_path: Path) -> None:
    """What `check_index` is worth."""
    database = tmp_path / "iiot.db"
    iiot.prepare_database(database)
    with plants.writing(database) as connection:
        connection.execute("insert into log_word (id, tenant_id, word) values (1, 1, 'pump')")
    with pytest.raises(sqlite3.DatabaseError):
        plants.check_whole(database)


def test_json_of_a_line_is_told_as_json(tmp_path: Path) -> None:
    line = iiot.LogLine(1, 1, 0, 0, 3, "m", "l", "h", json.dumps({"a": 1}))
    assert line.text == 'm\nl\nh\n{"a": 1}'
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table log_line (message, logger, host, fields)")
        connection.execute("insert into log_line values (?, ?, ?, ?)", (line.message, line.logger, line.host, line.fields))
        assert connection.execute(f"select {iiot.LINE_TEXT} from log_line").fetchone() == (line.text,)
    connection.close()
