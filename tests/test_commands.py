"""Commands: what is asked for is run once, in its turn, and its end is known; whatever breaks meanwhile."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from plant import PATIENCE, Device, Plant, Process, rows

import iiot

QUICK = attrs.evolve(
    iiot.Limits(), command_clock_seconds=0.02, command_grace_seconds=0.3, command_away_seconds=2.0, command_again_seconds=30.0,
    command_bytes=1_000, commands_open=3, batches_open=2, clock_seconds=0.05, retention_seconds=0.05,
)  # fmt: skip


class Runner:
    """A device that runs what it is told, by hand."""

    def __init__(self, device: Device) -> None:
        self.device = device

    async def say(self, kind: str, **fields: Any) -> None:
        """Send a frame, and wait until it is on disk."""
        self.device.seq += 1
        await self.device.send(kind, seq=self.device.seq, **fields)
        await self.device.acknowledged(self.device.seq)

    async def told(self, argv: list[str] | None = None) -> int:
        """The number of the next command, which is this one."""
        frame = await self.device.expect("command")
        assert argv is None or frame["argv"] == argv
        return int(frame["command"])

    async def write(self, command: int, data: str | bytes, stream: str = "stdout") -> None:
        coded = {"data": base64.b64encode(data).decode(), "encoding": "base64"} if isinstance(data, bytes) else {"data": data}
        await self.say("output", command=command, stream=stream, **coded)

    async def end(self, command: int, status: str = "done", **fields: Any) -> None:
        await self.say("result", command=command, status=status, **({"exit_code": 0} if status == "done" else {}), **fields)

    async def refused(self, kind: str, **fields: Any) -> str:
        """Send a frame that is not taken; the code of the error."""
        self.device.seq += 1
        await self.device.send(kind, seq=self.device.seq, **fields)
        return str((await self.device.expect("error"))["code"])


async def runner(plant: Plant, name: str = "press-1") -> Runner:
    return Runner(await plant.device(name))


async def post(plant: Plant, argv: list[str], name: str = "press-1", query: str = "", **more: Any) -> int:
    status, answer = await plant.ask("POST", f"/iiot/{name}/commands{query}", {"argv": argv, **more})
    assert status == 202, answer
    return int(answer["id"])


async def command(plant: Plant, number: int, name: str = "press-1") -> Any:
    return await plant.get(f"/iiot/{name}/commands/{number}")


async def until(plant: Plant, number: int, status: str, name: str = "press-1") -> Any:
    return await plant.until(f"/iiot/{name}/commands/{number}", lambda shown: shown["status"] == status)


async def raw(plant: Plant, path: str) -> bytes:
    async with plant.client.get(plant.url + path, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        assert response.status == 200
        return await response.read()


async def test_one_request_runs_a_command_and_answers_its_output_and_exit_code(plant: Plant) -> None:
    press = await runner(plant)
    asked = asyncio.create_task(plant.ask("POST", "/iiot/press-1/commands?wait=20", {"argv": ["uname", "-r"], "timeout": 5}))
    frame = await press.device.expect("command")
    assert frame == {"type": "command", "command": 1, "argv": ["uname", "-r"], "timeout": 5.0, "output_bytes": 1024 * 1024}
    await press.say("started", command=1)
    await press.write(1, "6.1.0\n")
    await press.write(1, "careful\n", "stderr")
    await press.end(1, output_bytes=14)
    status, answer = await asked
    assert (status, answer["status"], answer["exit_code"], answer["output"]) == (202, "done", 0, "6.1.0\ncareful\n")
    assert (answer["output_bytes"], answer["output_cut"], answer["by"], answer["device"]) == (14, False, "test admin", "press-1")
    assert answer["at"] <= answer["sent_at"] <= answer["started_at"] <= answer["ended_at"]


async def test_a_command_moves_from_sent_to_running_to_its_end(plant: Plant) -> None:
    press = await runner(plant)
    number = await post(plant, ["sleep", "1"])
    await press.told()
    assert (await command(plant, number))["status"] == "sent"
    await press.say("started", command=number)
    assert (await command(plant, number))["status"] == "running"
    await press.end(number, "failed", message="no such file: sleep")
    shown = await command(plant, number)
    assert (shown["status"], shown["exit_code"], shown["message"]) == ("failed", None, "no such file: sleep")
    events = (await plant.get("/iiot/press-1/events?kind=command"))["items"]
    assert [(event["command"], event["status"]) for event in events] == [(1, "failed"), (1, "queued")]
    assert {event["by"] for event in events} == {"test admin"}


@pytest.mark.parametrize("status", ["refused", "timed_out", "cancelled", "lost"])
async def test_the_end_is_what_the_device_says(plant: Plant, status: str) -> None:
    press = await runner(plant)
    number = await post(plant, ["ls"])
    await press.told()
    await press.end(number, status, message="so it is")
    shown = await command(plant, number)
    assert (shown["status"], shown["message"]) == (status, "so it is")


async def test_an_end_is_final(plant: Plant) -> None:
    press = await runner(plant)
    number = await post(plant, ["ls"])
    await press.told()
    await press.end(number)
    await press.end(number)  # told again by a device that did not hear that it was heard
    assert await press.refused("result", command=number, status="failed") == "command_over"
    assert await press.refused("output", command=number, stream="stdout", data="more") == "command_over"
    assert await press.refused("started", command=number) == "command_over"
    assert (await command(plant, number))["output"] == ""
    assert (await plant.ask("DELETE", f"/iiot/press-1/commands/{number}"))[1]["error"]["code"] == "command_over"
    ends = (await plant.get("/audit?action=command.end"))["items"]
    assert [(one["target"], one["device"], one["detail"]["status"]) for one in ends] == [(str(number), "press-1", "done")]


async def test_nothing_is_taken_of_a_command_that_is_another_device_s_or_was_not_sent(plant: Plant) -> None:
    press, other = await runner(plant), await runner(plant, "press-2")
    first, second = await post(plant, ["ls"]), await post(plant, ["ls"])
    await press.told()
    for number in (first, second, 77):
        assert await other.refused("output", command=number, stream="stdout", data="x") == "unknown_command"
    assert await press.refused("result", command=second, status="done", exit_code=0) == "unknown_command"
    assert [(await command(plant, number))["status"] for number in (first, second)] == ["sent", "queued"]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "argv"),
        ({"argv": []}, "argv"),
        ({"argv": "ls"}, "argv"),
        ({"argv": [""]}, "argv[0]"),
        ({"argv": ["ls", 5]}, "argv[1]"),
        ({"argv": ["ls", "a\0b"]}, "argv[1]"),
        ({"argv": ["x" * 1024 * 100]}, "argv"),
        ({"argv": ["x"] * 1_001}, "argv"),
        ({"argv": ["ls"], "timeout": 0}, "timeout"),
        ({"argv": ["ls"], "timeout": -1}, "timeout"),
        ({"argv": ["ls"], "timeout": 0.0001}, "timeout"),
        ({"argv": ["ls"], "timeout": 366 * 86_400}, "timeout"),
        ({"argv": ["ls"], "timeout": "2d"}, "timeout"),
        ({"argv": ["ls"], "timeout": True}, "timeout"),
        ({"argv": ["ls"], "ttl": 0}, "ttl"),
        ({"argv": ["ls"], "parallel": 1}, "parallel"),
        ({"argv": ["ls"], "shell": True}, "shell"),
    ],
)
async def test_what_cannot_be_run_is_refused_with_the_field_at_fault(plant: Plant, body: dict[str, Any], path: str) -> None:
    await plant.device("press-1")
    status, answer = await plant.ask("POST", "/iiot/press-1/commands", body)
    assert (status, answer["error"]["code"]) == (422, "invalid")
    assert path in [detail["path"] for detail in answer["error"]["details"]]
    assert (await plant.get("/iiot/press-1/commands"))["items"] == []


async def test_words_of_a_megabyte_are_refused(plant: Plant) -> None:
    await plant.device("press-1")
    status, answer = await plant.ask("POST", "/iiot/press-1/commands", {"argv": ["x" * 1_000_000]})
    assert (status, answer["error"]["code"]) == (413, "too_large")


async def test_words_come_to_the_device_as_they_were_given(plant: Plant) -> None:
    press = await runner(plant)
    argv = ["sh", "-c", 'echo "Prüfstand \u2603" \\ \n\t$HOME', "", "--", "\U0001f600", "'"]
    await post(plant, argv)
    assert (await press.device.expect("command"))["argv"] == argv
    assert (await command(plant, 1))["argv"] == argv


async def test_commands_of_a_device_run_one_after_the_other_unless_they_may_run_beside_others(plant: Plant) -> None:
    press, other = await runner(plant), await runner(plant, "press-2")
    first, second, third = [await post(plant, [word]) for word in ("one", "two", "three")]
    beside = await post(plant, ["beside"], parallel=True)
    elsewhere = await post(plant, ["elsewhere"], "press-2")
    assert [await press.told(), await press.told(), await other.told()] == [first, beside, elsewhere]
    assert [(await command(plant, number))["status"] for number in (second, third)] == ["queued", "queued"]
    await press.end(beside)
    await press.end(first)
    assert await press.told(["two"]) == second
    assert (await command(plant, third))["status"] == "queued"
    await press.end(second, "failed")
    assert await press.told(["three"]) == third


async def test_a_device_that_is_not_connected_is_refused_unless_the_command_may_wait(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        await plant.register("press-1")
        status, answer = await plant.ask("POST", "/iiot/press-1/commands", {"argv": ["ls"]})
        assert (status, answer["error"]["code"]) == (409, "device_offline")
        number = await post(plant, ["ls"], ttl=3_600)
        late = await post(plant, ["late"], ttl=0.1)
        shown = await until(plant, late, "expired")
        assert shown["message"] == "its turn did not come within its ttl"
        assert (await command(plant, number))["status"] == "queued"
        press = await runner(plant)
        assert await press.told(["ls"]) == number
        await press.end(number)


async def test_a_command_without_ttl_ends_with_the_session_that_it_was_for(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        press = await runner(plant)
        first, second = await post(plant, ["one"]), await post(plant, ["two"])
        patient = await post(plant, ["three"], ttl="1h")
        await press.told()
        await press.say("started", command=first)
        await press.device.close()
        shown = await until(plant, second, "expired")
        assert shown["message"] == "the device was disconnected before it was sent"
        press = await runner(plant)
        assert (await command(plant, first))["status"] == "running"
        await press.end(first)
        assert await press.told(["three"]) == patient


async def test_what_may_not_have_arrived_is_sent_again_and_goes_on_without_gap_or_repeat(plant: Plant) -> None:
    press = await runner(plant)
    number = await post(plant, ["ls"])
    assert await press.told() == number
    press = await runner(plant)  # a hello that takes the session over
    assert await press.told() == number
    await press.say("started", command=number)
    await press.write(number, "one ")
    seq = press.device.seq
    press = await runner(plant)
    for repeated, text in ((seq, "one "), (seq + 1, "two "), (seq + 1, "two "), (seq + 2, "three")):
        await press.device.send("output", seq=repeated, command=number, stream="stdout", data=text)
    press.device.seq = seq + 2
    await press.end(number)
    assert (await command(plant, number))["output"] == "one two three"
    other = await post(plant, ["next"])
    assert await press.told() == other  # and nothing else came between


async def test_a_command_for_an_earlier_session_is_not_begun_much_later(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, command_again_seconds=0.0)) as plant:
        press = await runner(plant)
        number = await post(plant, ["reboot"], timeout=0.05)
        await press.told()
        await press.device.close()
        press = await runner(plant)
        shown = await until(plant, number, "timed_out")
        assert shown["message"] == "the device did not tell its end in time"
        await post(plant, ["ls"])
        assert await press.told(["ls"]) != number


async def test_a_device_that_says_nothing_is_waited_for_only_so_long(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        press = await runner(plant)
        asked = asyncio.create_task(plant.ask("POST", "/iiot/press-1/commands?wait=20", {"argv": ["ls"], "timeout": 0.1}))
        number = await press.told()
        follower = await post(plant, ["next"])
        status, answer = await asked
        assert (status, answer["status"], answer["message"]) == (202, "timed_out", "the device did not tell its end in time")
        assert await press.told() == follower
        assert await press.refused("result", command=number, status="done", exit_code=0) == "command_over"


async def test_a_device_that_is_away_may_come_back_with_the_result(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, command_away_seconds=60.0)) as plant:
        press = await runner(plant)
        number = await post(plant, ["make"], timeout=0.01)
        await press.told()
        await press.say("started", command=number)
        await press.device.close()
        due = "select due_at from command"
        (first,) = rows(plant.database, due)
        async with asyncio.timeout(PATIENCE):
            while rows(plant.database, due) == [first]:  # its time is over, and it is waited for
                await asyncio.sleep(0.01)
        assert (await command(plant, number))["status"] == "running"
        press = await runner(plant)
        await press.end(number)
        assert (await command(plant, number))["status"] == "done"


async def test_a_device_that_does_not_come_back_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        press = await runner(plant)
        number = await post(plant, ["make"], timeout=0.01)
        await press.told()
        await press.device.close()
        await until(plant, number, "timed_out")


async def test_a_command_that_waits_is_taken_back_at_once_and_one_that_runs_by_its_device(plant: Plant) -> None:
    press = await runner(plant)
    first, second = await post(plant, ["one"]), await post(plant, ["two"])
    await press.told()
    status, answer = await plant.ask("DELETE", f"/iiot/press-1/commands/{second}")
    assert (status, answer["status"], answer["message"]) == (202, "cancelled", "it was taken back before it was sent")
    asked = asyncio.create_task(plant.ask("DELETE", f"/iiot/press-1/commands/{first}?wait=20"))
    assert await press.device.expect("cancel") == {"type": "cancel", "command": first}
    assert (await command(plant, first))["status"] == "sent"
    await press.end(first, "cancelled", message="killed")
    assert (await asked)[1]["status"] == "cancelled"


async def test_a_device_that_comes_back_is_told_what_was_taken_back_meanwhile(plant: Plant) -> None:
    press = await runner(plant)
    number = await post(plant, ["ls"])
    await press.told()
    await press.device.close()
    await plant.until("/iiot/press-1", lambda device: not device["connected"])
    assert (await plant.ask("DELETE", f"/iiot/press-1/commands/{number}"))[0] == 202
    press = await runner(plant)
    frame = await press.device.receive()
    assert frame == {"type": "cancel", "command": number}  # and not the command


async def test_a_cancel_that_the_device_does_not_answer_ends_by_the_clock(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        press = await runner(plant)
        number = await post(plant, ["ls"], timeout=3_600)
        await press.told()
        await plant.ask("DELETE", f"/iiot/press-1/commands/{number}")
        await until(plant, number, "timed_out")


async def test_the_same_request_again_is_the_same_command(plant: Plant) -> None:
    press = await runner(plant)

    async def ask(body: dict[str, Any], path: str = "/iiot/press-1/commands", key: str = "a1") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {plant.token}", "Idempotency-Key": key}
        async with plant.client.post(plant.url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    answers = await asyncio.gather(*(ask({"argv": ["ls"]}) for _ in range(5)))
    assert {(status, answer["id"]) for status, answer in answers} == {(202, 1)}
    await press.told()
    await press.end(1)
    status, answer = await ask({"argv": ["ls"]})
    assert (status, answer["status"]) == (202, "done")
    for other in ({"argv": ["rm"]}, {"argv": ["ls"], "timeout": 5}, {"argv": ["ls"], "parallel": True}):
        status, answer = await ask(other)
        assert (status, answer["error"]["code"]) == (422, "key_reused")
    assert (await ask({"argv": ["ls"]}, key="b"))[1]["id"] == 2
    status, answer = await ask({"argv": ["ls"]}, key="x" * 129)
    assert (status, answer["error"]["details"][0]["path"]) == (422, "Idempotency-Key")
    batches = [await ask({"argv": ["ls"], "match": "*"}, "/commands") for _ in range(2)]
    assert [(status, answer["id"]) for status, answer in batches] == [(202, 1), (202, 1)]
    assert (await ask({"argv": ["ls"], "match": "press-*"}, "/commands"))[0] == 422
    audited = (await plant.get("/audit?action=command.run"))["items"]
    assert len([one for one in audited if one["outcome"] == "ok" and "argv" in one["detail"]]) == 3


async def test_output_is_kept_up_to_a_limit_and_marked_as_cut(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        press = await runner(plant)
        number = await post(plant, ["yes"])
        assert (await press.device.expect("command"))["output_bytes"] == 1_000
        for _ in range(3):
            await press.write(number, "y" * 400)
        shown = await command(plant, number)
        assert (len(shown["output"]), shown["output_bytes"], shown["output_cut"]) == (1_000, 1_200, True)
        await press.end(number, output_bytes=10**12)
        shown = await command(plant, number)
        assert (len(shown["output"]), shown["output_bytes"], shown["output_cut"]) == (1_000, 10**12, True)


async def test_bytes_come_out_as_they_went_in_and_characters_whole(plant: Plant) -> None:
    press = await runner(plant)
    number = await post(plant, ["cat"])
    await press.told()
    snowman, other = "\u2603".encode(), bytes(range(256))
    parts: list[tuple[str | bytes, str]] = [
        ("a\0b", "stdout"), (snowman[:1], "stdout"), (snowman[:2], "stderr"), (snowman[1:], "stdout"), (snowman[2:] + b"!", "stderr"),
        (other, "stdout"), ("", "stdout"),
    ]  # fmt: skip
    for data, stream in parts:
        await press.write(number, data, stream)
    await press.end(number)
    path = f"/iiot/press-1/commands/{number}/output"
    whole = b"".join(data.encode() if isinstance(data, str) else data for data, _ in parts)
    assert await raw(plant, f"{path}?format=raw") == whole
    assert await raw(plant, f"{path}?format=raw&stream=stderr") == snowman + b"!"
    assert (await command(plant, number))["output"].startswith("a\0b\u2603\u2603!")
    assert (await raw(plant, path)).decode() == (await command(plant, number))["output"]
    lines = [json.loads(line) for line in (await raw(plant, f"{path}?format=ndjson")).splitlines()]
    assert "".join(line["data"] for line in lines) == (await command(plant, number))["output"]
    assert {line["stream"] for line in lines} == {"stdout", "stderr"}


async def test_what_is_no_base64_is_refused(plant: Plant) -> None:
    press = await runner(plant)
    number = await post(plant, ["cat"])
    await press.told()
    for data in ("a", "a===", "ä===", "aGVs bG8="):
        code = await press.refused("output", command=number, stream="stdout", data=data, encoding="base64")
        assert code == "invalid"


@pytest.mark.parametrize("form", ["text", "raw", "ndjson"])
async def test_output_is_followed_live_up_to_the_end(plant: Plant, form: str) -> None:
    press = await runner(plant)
    number = await post(plant, ["tail", "-f"])
    await press.told()
    path = f"/iiot/press-1/commands/{number}/output?follow=1&format={form}"

    def text_of(seen: bytes) -> str:
        lines = seen.splitlines() if form == "ndjson" else []
        return "".join(json.loads(line)["data"] for line in lines) if lines else seen.decode()

    async with plant.client.get(plant.url + path, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        seen = b""
        for part in ("one ", "two "):
            await press.write(number, part)
            async with asyncio.timeout(PATIENCE):
                while part not in text_of(seen):
                    seen += await response.content.readany()
        await press.end(number)
        async with asyncio.timeout(PATIENCE):
            seen += await response.read()
    assert text_of(seen) == "one two "


async def test_too_many_commands_are_refused(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        await runner(plant)
        for _ in range(3):
            await post(plant, ["ls"])
        status, answer = await plant.ask("POST", "/iiot/press-1/commands", {"argv": ["ls"]})
        assert (status, answer["error"]["code"]) == (429, "too_many_commands")


async def test_a_list_has_the_newest_first_and_may_be_narrowed(plant: Plant) -> None:
    press = await runner(plant)
    numbers = [await post(plant, [str(index)], parallel=True) for index in range(4)]
    for number in numbers[:2]:
        await press.end(number)
    shown = await plant.get("/iiot/press-1/commands")
    assert [one["id"] for one in shown["items"]] == numbers[::-1]
    assert [one["id"] for one in (await plant.get("/iiot/press-1/commands?status=done"))["items"]] == numbers[1::-1]
    assert len((await plant.get("/iiot/press-1/commands?status=sent&status=done"))["items"]) == 4
    page = await plant.get("/iiot/press-1/commands?limit=3")
    assert ([one["id"] for one in page["items"]], page["next"]) == (numbers[:0:-1], numbers[1])
    assert (await plant.ask("GET", "/iiot/press-1/commands?status=over"))[1]["error"]["code"] == "bad_query"
    for path in ("/iiot/nobody/commands", "/iiot/press-1/commands/99", "/iiot/press-1/commands/x", "/iiot/press-1/commands/99/output"):
        assert (await plant.ask("GET", path))[0] == 404


async def test_a_removed_device_ends_its_commands(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        press = await runner(plant)
        await post(plant, ["ls"])
        await press.told()
        asked = asyncio.create_task(plant.ask("POST", "/iiot/press-1/commands?wait=20", {"argv": ["next"]}))
        await plant.until("/iiot/press-1/commands", lambda shown: len(shown["items"]) == 2)
        assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
        ends = (await plant.get("/audit?action=command.end"))["items"]
        assert [(one["target"], one["detail"]["status"]) for one in ends] == [("2", "cancelled"), ("1", "cancelled")]
        async with asyncio.timeout(PATIENCE):
            while rows(plant.database, "select 1 from command"):
                await asyncio.sleep(0.01)
        assert (await asked)[0] == 404


async def test_old_commands_and_what_they_wrote_are_deleted(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, command_days=0)) as plant:
        press = await runner(plant)
        number = await post(plant, ["ls"])
        _, batch = await plant.ask("POST", "/commands", {"argv": ["ls"], "match": "*"})
        await press.told()
        await press.write(number, "text")
        await press.end(number)
        await press.end(await press.told())
        async with asyncio.timeout(PATIENCE):
            while any(rows(plant.database, f"select 1 from {table}") for table in ("command", "command_output", "command_batch")):
                await asyncio.sleep(0.01)
        assert (await plant.ask("GET", f"/commands/{batch['id']}"))[0] == 404


async def fleet(plant: Plant, count: int, prefix: str = "press") -> list[Runner]:
    return [await runner(plant, f"{prefix}-{number:02}") for number in range(count)]


async def on_many(plant: Plant, **body: Any) -> int:
    status, answer = await plant.ask("POST", "/commands", {"argv": ["uname"], "match": "*", **body})
    assert status == 202, answer
    return int(answer["id"])


async def test_one_request_runs_a_command_on_many(plant: Plant) -> None:
    presses = await fleet(plant, 3)
    await runner(plant, "oven-1")
    await plant.register("press-09")
    number = await on_many(plant, match="press-*")
    for index, press in enumerate(presses):
        one = await press.told(["uname"])
        await press.write(one, f"six.{index}\n")
        await press.end(one)
    shown = await plant.until(f"/commands/{number}", lambda shown: shown["status"] == "done")
    assert (shown["devices"], shown["counts"], shown["not_begun"]) == (4, {"done": 3, "expired": 1}, 0)
    assert [(one["device"], one["status"], one["output"]) for one in shown["items"]] == [
        ("press-00", "done", "six.0\n"), ("press-01", "done", "six.1\n"), ("press-02", "done", "six.2\n"), ("press-09", "expired", ""),
    ]  # fmt: skip
    assert shown["items"][3]["message"] == "the device is not connected"
    page = await plant.get(f"/commands/{number}?limit=3")
    assert (len(page["items"]), page["next"]) == (3, shown["items"][2]["id"])
    rest = await plant.get(f"/commands/{number}?limit=3&after={page['next']}")
    assert ([one["device"] for one in rest["items"]], rest["next"]) == (["press-09"], None)
    assert [one["id"] for one in (await plant.get("/commands"))["items"]] == [number]
    audited = (await plant.get("/audit?action=command.run"))["items"]
    assert [one["device"] for one in audited] == ["press-09", "press-02", "press-01", "press-00", None]
    assert audited[-1]["detail"] == {"batch": number, "argv": ["uname"], "timeout": 30.0, "ttl": None}


async def test_a_command_for_many_goes_to_parts_of_them(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, command_devices=2)) as plant:
        presses = await fleet(plant, 5)
        number = await on_many(plant)
        for press in presses:
            await press.end(await press.told())
        shown = await plant.until(f"/commands/{number}", lambda shown: shown["status"] == "done")
        assert shown["counts"] == {"done": 5}


async def test_a_command_for_many_goes_to_so_many_in_a_minute(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, QUICK) as plant:
        presses = await fleet(plant, 3)
        number = await on_many(plant, per_minute=120)  # two in a second
        await presses[0].end(await presses[0].told())
        await presses[1].end(await presses[1].told())
        shown = await plant.get(f"/commands/{number}")
        assert (shown["status"], shown["counts"], shown["not_begun"]) == ("running", {"done": 2}, 1)
        await presses[2].end(await presses[2].told())
        first, _, last = (await plant.get(f"/commands/{number}"))["items"]
        assert iiot.parse_rfc3339(last["at"]) - iiot.parse_rfc3339(first["at"]) >= 1_000  # type: ignore[operator]


async def test_a_command_for_many_is_stopped_after_failures(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(QUICK, command_devices=2)) as plant:
        presses = await fleet(plant, 5)
        number = await on_many(plant, per_minute=60, stop_after_failures=2)
        first = await presses[0].told()
        await presses[0].say("result", command=first, status="done", exit_code=3)
        second = await presses[1].told()
        await presses[1].end(second, "refused")
        shown = await plant.until(f"/commands/{number}", lambda shown: shown["status"] == "stopped")
        assert (shown["stopped"], shown["not_begun"], sum(shown["counts"].values())) == ("failures", 3, 2)


async def test_a_command_for_many_that_is_stopped_leaves_alone_what_runs(plant: Plant) -> None:
    press, busy = await fleet(plant, 2)
    other = await post(plant, ["long"], "press-01")
    await busy.told()
    number = await on_many(plant)
    running = await press.told()
    await plant.until(f"/commands/{number}", lambda shown: sum(shown["counts"].values()) == 2)
    status, shown = await plant.ask("DELETE", f"/commands/{number}")
    assert (status, shown["status"], shown["counts"]) == (202, "stopped", {"sent": 1, "cancelled": 1})
    await press.end(running)
    await busy.end(other)
    assert (await plant.get(f"/commands/{number}"))["counts"] == {"done": 1, "cancelled": 1}
    assert (await plant.ask("DELETE", f"/commands/{number}"))[1]["error"]["code"] == "command_over"
    assert (await plant.ask("DELETE", "/commands/77"))[0] == 404


async def test_a_command_for_many_needs_to_know_for_whom(plant: Plant) -> None:
    for body, path in (({}, "match"), ({"match": ""}, "match"), ({"match": "*", "per_minute": 0}, "per_minute")):
        status, answer = await plant.ask("POST", "/commands", {"argv": ["ls"], **body})
        assert (status, answer["error"]["details"][0]["path"]) == (422, path)
    number = await on_many(plant, match="nobody-*")
    shown = await plant.until(f"/commands/{number}", lambda shown: shown["status"] == "done")
    assert (shown["devices"], shown["items"]) == (0, [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_restart_of_the_server_loses_nothing_of_a_command(tmp_path: Path, number: signal.Signals) -> None:
    server = await Process(tmp_path).start()
    try:
        async with plants.client() as operator:
            plant = Plant(server.url, operator, plants.admin_token(server.database), server.database)
            press = await runner(plant)
            first = await post(plant, ["make"], timeout=600)
            second, patient = await post(plant, ["now"]), await post(plant, ["later"], ttl="1h")
            await press.told()
            await press.write(first, "one ")
            await server.stop(number)
            await server.start()
            plant.url = server.url
            assert (await command(plant, first))["status"] == "running"
            assert (await command(plant, second))["status"] == "expired"
            press = await runner(plant)
            await press.write(first, "two")
            await press.end(first)
            assert (await command(plant, first))["output"] == "one two"
            assert await press.told() == patient
    finally:
        await server.stop(signal.SIGKILL)
