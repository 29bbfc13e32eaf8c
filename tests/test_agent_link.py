"""The agent and a server that says no, a link that is slow or dead, and answers that are lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import plant as plants
import pytest
from aiohttp import WSMsgType
from devices import Caller, played, provisioning_key, record, replay, started, stored
from hypothesis import example, given
from hypothesis import strategies as st
from plant import PATIENCE, Plant

import agent
import iiot

TOKEN = iiot.mint("dev").text


def rows(count: int) -> str:
    return "time,a\n" + "".join(f"{1_767_225_600 + number},{number}\n" for number in range(count))


async def acknowledge_all(caller: Caller) -> None:
    """Acknowledge whatever the agent sends, until it leaves."""
    while True:
        await caller.send("ack", seq=(await caller.receive())["seq"])


# ---- what a refusal means

FINAL = ("unauthorized", "device_disabled", "device_removed", "credentials_revoked", "tenant_removed")
FIRST = ("device_exists", "invalid", "bad_handshake")
COME_BACK = (
    "too_many_bad_frames", "superseded", "seq_reset", "session_conflict", "too_many_attempts", "too_many_connected", "too_many_devices",
    "too_many_connections", "throttled", "shutting_down", "storage_unavailable", "server_fault", "handshake_timeout", "something_new",
)  # fmt: skip


@pytest.mark.parametrize("welcomed", [False, True])
@pytest.mark.parametrize("close", [None, 1000, 1001, 1006, 1011, 1013, 4400, 4401, 4403, 4408, 4409, 4429])
def test_the_code_of_the_error_decides_what_is_for_good(close: int | None, *, welcomed: bool) -> None:
    assert all(agent.is_final(code, close, welcomed=welcomed) for code in FINAL)
    assert all(agent.is_final(code, close, welcomed=welcomed) is not welcomed for code in FIRST)
    assert not any(agent.is_final(code, close, welcomed=welcomed) for code in COME_BACK)
    assert agent.is_final("", close, welcomed=welcomed) is (close in (4401, 4403) or (close == 4400 and not welcomed))


@pytest.mark.parametrize("code", FINAL)
@pytest.mark.parametrize("welcomed", [False, True], ids=["at once", "in the session"])
async def test_a_replay_that_is_refused_for_good_ends_however_much_waits(tmp_path: Path, code: str, *, welcomed: bool) -> None:
    (tmp_path / "run.csv").write_text(rows(12_000))

    async def refuse(caller: Caller) -> None:
        if welcomed:
            await caller.welcome()
        await caller.receive()
        await caller.refuse(4403, code)

    async with played(refuse) as url, started(tmp_path, "--url", url, "--token", TOKEN, "--replay", "run.csv") as running:
        code_, err = await running.end()
    assert code_ == 1
    assert "replayed 0 of 12000 rows" in err or not welcomed
    assert err.splitlines()[-1].startswith(f"agent.py: the server refuses this device (4403): {code} it is.")
    assert TOKEN not in err


async def test_a_replay_with_a_wrong_token_ends_however_much_waits(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(rows(12_000))
    async with started(tmp_path, "--url", plant.url, "--token", TOKEN, "--replay", "run.csv") as running:
        code, err = await running.end()
    assert code == 1
    assert err.splitlines()[-1] == "agent.py: the server refuses this device (4401): A valid token is needed."


async def test_a_session_that_ends_for_now_is_followed_by_another(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(rows(20))
    frames: list[dict[str, Any]] = []

    async def play(caller: Caller) -> None:
        if caller.number <= len(COME_BACK):
            await caller.welcome()
            await caller.refuse(4429, COME_BACK[caller.number - 1])
        else:
            await caller.welcome()
            frames.append(await caller.receive())
            await caller.send("ack", seq=frames[-1]["seq"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "RETRY_SECONDS", 0.01)
        async with played(play) as url:
            await agent.Agent(agent.Options(url=url, token=TOKEN, name="press-1", replay=str(tmp_path / "run.csv"))).run()
    assert [len(frame["samples"]) for frame in frames] == [20]


async def test_the_agent_waits_as_long_as_the_server_says_and_tells_of_a_conflict_in_words(tmp_path: Path) -> None:
    moments: list[float] = []

    async def play(caller: Caller) -> None:
        moments.append(time.monotonic())
        await caller.welcome()
        if caller.number == 1:
            await caller.refuse(4429, "session_conflict", retry_after=3)
        else:
            await acknowledge_all(caller)

    (tmp_path / "run.csv").write_text(rows(20))
    async with played(play) as url, started(tmp_path, "--url", url, "--token", TOKEN, "--replay", "run.csv") as running:
        code, err = await running.end()
    assert code == 0, err
    assert moments[1] - moments[0] >= 3
    assert "another client uses the same token as this device (session_conflict it is.); the next attempt comes in 3.0 s" in err


async def test_after_a_reset_of_the_counter_the_agent_comes_back_at_once_and_counts_from_there(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(rows(120))
    seen: list[tuple[int, int, int]] = []
    moments: list[float] = []

    async def play(caller: Caller) -> None:
        moments.append(time.monotonic())
        await caller.welcome(1_000 if caller.number == 1 else 3)
        for _ in range(3):
            frame = await caller.receive()
            seen.append((caller.number, frame["seq"], frame["samples"][0]["values"]["a"]))
            if (caller.number, frame["seq"]) == (1, 1_001):
                await caller.send("ack", seq=1_001)
        if caller.number == 1:
            moments.append(time.monotonic())
            await caller.refuse(4409, "seq_reset")
        await caller.send("ack", seq=seen[-1][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "backoff", lambda *_: 100.0)
        async with played(play) as url:
            running = asyncio.create_task(
                agent.Agent(agent.Options(url=url, token=TOKEN, name="press-1", replay=str(tmp_path / "run.csv"))).run()
            )
            async with asyncio.timeout(PATIENCE):
                while len(seen) < 5:
                    await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    assert seen == [(1, 1_001, 0), (1, 1_002, 50), (1, 1_003, 100), (2, 4, 50), (2, 5, 100)]
    assert moments[2] - moments[1] < 5


async def test_a_reset_of_the_counter_costs_a_live_agent_no_reading(plant: Plant, tmp_path: Path) -> None:
    token = await plant.register("press-1")
    path = "/iiot/press-1/telemetry?metric=load_1m&limit=10000"
    async with started(tmp_path, "--url", plant.url, "--token", token, "--interval", "0.02") as running:
        body = await plant.until(path, lambda body: body["series"] and len(body["series"][0]["points"]) > 20)
        status, _ = await plant.ask("POST", "/iiot/press-1/seq", {"seq": 0})
        assert status == 200
        await running.line("closed by the server (4409)")
        count = len(body["series"][0]["points"])
        await plant.until(path, lambda body: len(body["series"][0]["points"]) > count + 20)
        running.process.terminate()
        assert (await running.end())[0] == 0
    device = await plant.device("press-1")
    assert 20 < device.seq < len(await plant.points("press-1", "load_1m")) + 10, "it counts from the number of the reset"


async def test_of_two_agents_with_one_token_one_says_so_and_waits(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, iiot.Limits(fights=1, conflict_seconds=0.1)) as plant:
        arguments = ("--url", plant.url, "--token", await plant.register("press-1"), "--interval", "0.05")
        async with started(tmp_path, *arguments) as one, started(tmp_path, *arguments) as other:
            told = [asyncio.create_task(running.line("another client uses the same token as this device")) for running in (one, other)]
            done, rest = await asyncio.wait(told, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        assert done, "nobody said so"
        assert "the next attempt comes in 60.0 s" in done.pop().result()
        sessions = (await plant.get("/iiot/press-1/events?kind=connected&limit=1000"))["items"]
        assert len(sessions) < 10


# ---- frames that are refused


def bad_values(frame: dict[str, Any], bad: range) -> list[int]:
    return [value for sample in frame["samples"] for value in sample["values"].values() if value in bad]


@pytest.mark.parametrize("named", [False, True], ids=["and names nothing", "and names the first fault"])
@pytest.mark.parametrize("bad", [range(7, 8), range(50), range(40, 60), range(0)], ids=str)
async def test_of_a_refused_frame_the_bad_samples_alone_are_lost_and_the_good_ones_are_not_sent_behind_the_rest(
    tmp_path: Path, bad: range, *, named: bool
) -> None:
    (tmp_path / "run.csv").write_text(rows(20_000))
    stored_values: list[int] = []
    refused = 0

    async def play(caller: Caller) -> None:
        nonlocal refused
        await caller.welcome()
        while True:
            frame = await caller.receive()
            if not bad_values(frame, bad):
                stored_values.extend(sample["values"]["a"] for sample in frame["samples"])
                await caller.send("ack", seq=frame["seq"])
                continue
            refused += 1
            first = next(index for index, sample in enumerate(frame["samples"]) if sample["values"]["a"] in bad)
            errors = [{"path": f"samples[{first}].values.a", "message": "is odd"}] if named else []
            await caller.send("error", code="invalid", message="It is bad.", seq=frame["seq"], errors=errors)
            await caller.send("ack", seq=frame["seq"])

    async with played(play) as url, started(tmp_path, "--url", url, "--token", TOKEN, "--replay", "run.csv") as running:
        code, err = await running.end()
    assert sorted(stored_values) == [value for value in range(20_000) if value not in bad]
    assert code == (1 if bad else 0)
    assert f"replayed {20_000 - len(bad)} of 20000 rows" in err
    assert len(re.findall(r"run\.csv: line \d+: 'a': the server refuses it: ", err)) == min(20, len(bad))
    assert refused <= (len(bad) if named else 2 * len(bad) + 2 * 6)
    good = next(value for value in range(100) if value + 1 in bad or value not in bad)
    assert good in bad or stored_values.index(good) < 10_000, "before what was behind it and not yet under way"


async def test_a_row_of_the_future_is_lost_alone(plant: Plant, tmp_path: Path) -> None:
    moments = [iiot.now_ms() - 1_000, iiot.now_ms() + 3 * iiot.DAY, iiot.now_ms() - 500]
    (tmp_path / "run.csv").write_text("time,a\n" + "".join(f"{moment},1\n" for moment in moments))
    code, err = await replay(plant, tmp_path, "press-1")
    assert code == 1
    assert f"run.csv: line 3: '{moments[1]}' is not between 2000-01-01 and a day from now" in err
    assert [len(points) for points in (await stored(plant, "press-1")).values()] == [2]


async def test_too_many_bad_frames_cost_no_good_reading(tmp_path: Path) -> None:
    """As after a quarter of an hour offline with a clock that stood in 1970."""
    limits = iiot.Limits(bad_frames_per_minute=5)
    async with plants.plant(tmp_path, limits) as plant:
        token = await plant.register("press-1")
        options = agent.Options(url=plant.url, token=token, name="press-1", config_file=str(tmp_path / "config"), interval=3_600)
        device = agent.Agent(options)
        for number in range(12):
            await device._spool.put({"type": "telemetry", "samples": [{"ts": 1_000 + number, "values": {"a": number}}]})
        good = [iiot.now_ms() - number for number in range(5)]
        for moment in good:
            await device._spool.put({"type": "telemetry", "samples": [{"ts": moment, "values": {"a": 1}}]})
        running = asyncio.create_task(device.run())
        try:
            path = "/iiot/press-1/telemetry?metric=a"
            body = await plant.until(path, lambda body: running.done() or (body["series"] and len(body["series"][0]["points"]) == 5))
            assert not running.done(), running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert len(body["series"][0]["points"]) == 5
        reasons = [event["reason"] for event in (await plant.get("/iiot/press-1/events?kind=disconnected"))["items"]]
        assert "too_many_bad_frames" in reasons


async def test_an_error_that_names_no_frame_leaves_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(rows(200))
    taken: list[int] = []

    async def play(caller: Caller) -> None:
        await caller.welcome(0 if caller.number == 1 else 4)
        while True:
            frame = await caller.receive()
            values = [sample["values"]["a"] for sample in frame["samples"]]
            if 120 in values:
                await caller.send("error", code="not_json", message="It is no JSON.")
            else:
                taken.extend(values)
                await caller.send("ack", seq=frame["seq"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "VERDICT_SECONDS", 0.05)
        patch.setattr(agent, "RETRY_SECONDS", 0.01)
        async with played(play) as url:
            replaying = agent.Agent(agent.Options(url=url, token=TOKEN, name="press-1", replay=str(tmp_path / "run.csv")))
            assert replaying._replay is not None
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(agent.AgentError, match="something is lost in 1 rows"):
                    await replaying.run()
    assert sorted(set(taken) | {120}) == list(range(200))
    assert "line 122: 'a': the server refuses it: It is no JSON." in replaying._replay.recording.losses.report()


async def test_frames_that_are_too_big_for_somebody_are_sent_smaller(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(rows(200))
    taken: list[int] = []

    async def play(caller: Caller) -> None:
        await caller.welcome()
        while True:
            frame = await caller.receive()
            if len(json.dumps(frame)) > 1_500:
                await caller.link.close(code=1009)
            taken.extend(sample["values"]["a"] for sample in frame["samples"])
            await caller.send("ack", seq=frame["seq"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "RETRY_SECONDS", 0.01)
        async with played(play) as url:
            await agent.Agent(agent.Options(url=url, token=TOKEN, name="press-1", replay=str(tmp_path / "run.csv"))).run()
    assert set(taken) == set(range(200))


# ---- provisioning


async def test_the_secret_is_on_the_disk_before_it_is_asked_with_and_asked_with_again(tmp_path: Path) -> None:
    asked: list[tuple[str, str, int]] = []

    async def play(caller: Caller) -> None:
        frame = await caller.receive()
        file = tmp_path / "press-1.token.secret"
        asked.append((frame["secret"], file.read_text().strip(), stat.S_IMODE(file.stat().st_mode)))
        if caller.number < 3:
            return  # the answer is lost
        await caller.send("credentials", device="press-1", token=f"iiot_dev_0123456789abcdef_{frame['secret']}")
        await caller.welcome()
        await acknowledge_all(caller)

    (tmp_path / "run.csv").write_text(rows(3))
    arguments = ("--key", iiot.mint("prov").text, "--name", "press-1", "--replay", "run.csv")
    before = os.umask(0)
    try:
        async with played(play) as url:
            async with started(tmp_path, "--url", url, *arguments) as first:
                await first.line("no session")
            async with started(tmp_path, "--url", url, *arguments) as second:
                code, err = await second.end()
    finally:
        os.umask(before)
    assert code == 0, err
    secret = asked[0][0]
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", secret)
    assert asked == [(secret, secret, 0o600)] * 3
    assert secret not in first.printed + second.printed
    assert sorted(path.name for path in tmp_path.glob("*.token*")) == ["press-1.token"]
    assert (tmp_path / "press-1.token").read_text() == f"iiot_dev_0123456789abcdef_{secret}\n"


async def test_provisioning_whose_answer_was_lost_goes_on_with_a_key_of_one_use(plant: Plant, tmp_path: Path) -> None:
    status, made = await plant.ask("POST", "/provisioning-keys", {"uses": 1})
    assert status == 201
    secret = "s" * 43
    device = await plant.connect()
    await device.send("provision", key=made["key"], device="press-1", secret=secret)
    assert (await device.expect("credentials"))["token"].endswith(f"_{secret}")
    await device.close()
    (tmp_path / "press-1.token.secret").write_text(f"{secret}\n")
    (tmp_path / "run.csv").write_text(rows(3))
    async with started(tmp_path, "--url", plant.url, "--key", made["key"], "--name", "press-1", "--replay", "run.csv") as running:
        code, err = await running.end()
    assert code == 0, err
    assert (await stored(plant, "press-1"))["a"][2][1] == 2


@pytest.mark.parametrize("key", [False, True], ids=["alone", "with a key at hand"])
async def test_the_token_file_of_a_removed_device_is_named(plant: Plant, tmp_path: Path, *, key: bool) -> None:
    token = await plant.register("press-1")
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    (tmp_path / "press-1.token").write_text(f"{token}\n")
    arguments = ("--key", await provisioning_key(plant)) if key else ()
    async with started(tmp_path, "--url", plant.url, "--name", "press-1", *arguments) as running:
        code, err = await running.end()
    assert code == 1
    assert "Its token is in press-1.token; to make a new device of this machine, remove this file" in err.splitlines()[-1]
    (tmp_path / "press-1.token").unlink()
    if key:
        async with started(tmp_path, "--url", plant.url, "--name", "press-1", *arguments) as running:
            await running.line("connected as press-1")


async def test_an_empty_token_file_is_named_and_the_key_is_used(plant: Plant, tmp_path: Path) -> None:
    (tmp_path / "press-1.token").write_text("\n")
    async with started(tmp_path, "--url", plant.url, "--name", "press-1") as running:
        code, err = await running.end()
    assert (code, err) == (1, "agent.py: press-1.token is empty: needs --key (a provisioning key) or --token for the first start\n")
    key = await provisioning_key(plant)
    async with started(tmp_path, "--url", plant.url, "--name", "press-1", "--key", key) as running:
        await running.line("press-1.token is empty; the provisioning key is used")
        await running.line("connected as press-1")


# ---- a link that is slow, and one that is dead


@asynccontextmanager
async def throttled(url: str, rate: int, *, buffers: bool) -> AsyncIterator[tuple[str, list[int]]]:
    """A way to the server that carries so many bytes a second towards it, and takes no more than that from the agent, or, if it
    buffers, all at once; and the connections that were made over it."""
    host, port = url.removeprefix("http://").split(":")
    made: list[int] = []
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    async def carry(source: socket.socket, sink: socket.socket, *, slowly: bool) -> None:
        with suppress(OSError):
            while data := await loop.sock_recv(source, 256 if slowly else 65_536):
                await loop.sock_sendall(sink, data)
                if slowly:
                    await asyncio.sleep(len(data) / rate)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    async def connect() -> None:
        while True:
            near, _ = await loop.sock_accept(listening)
            made.append(len(made) + 1)
            far = stack.enter_context(socket.socket())
            stack.enter_context(near)
            for end in (near, far):
                end.setblocking(False)
            await loop.sock_connect(far, (host, int(port)))
            tasks.update(asyncio.create_task(step) for step in (carry(near, far, slowly=True), carry(far, near, slowly=False)))

    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listening.setblocking(False)
        if not buffers:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # as on a slow line, where segments are short
        tasks.add(asyncio.create_task(connect()))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", made
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.long
@pytest.mark.parametrize("buffers", [False, True], ids=["a slow line", "a proxy that buffers"])
async def test_a_slow_link_carries_a_recording(tmp_path: Path, *, buffers: bool) -> None:
    """The agent's patience is shorter here than in the field, and the line carries 3 kB/s: a frame of fifty rows takes over four
    seconds. Where all bytes seem to leave at once, the frames get smaller from one connection to the next."""
    expected = record(tmp_path / "run.csv", 60)
    async with plants.plant(tmp_path, heartbeat=1.0) as plant:
        token = await plant.register("press-1")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("LOOK_SECONDS", 0.1), ("PING_SECONDS", 0.8), ("LINK_SECONDS", 2.5), ("LINK_BYTES", 100)):
                patch.setattr(agent, name, value)
            patch.setattr(agent, "SLOW_SECONDS", 0.5)
            patch.setattr(agent, "QUICK_SECONDS", 0.2)
            patch.setattr(agent, "RETRY_SECONDS", 0.1)
            async with throttled(plant.url, 3_000, buffers=buffers) as (url, made):
                device = agent.Agent(agent.Options(url=url, token=token, name="press-1", replay=str(tmp_path / "run.csv")))
                async with asyncio.timeout(40):
                    await device.run()
        assert buffers or made == [1]
        assert await stored(plant, "press-1") == expected
        assert device._spool.window.size < agent.WINDOW_FIRST


@pytest.mark.parametrize("alive", [False, True], ids=["nothing moves", "pings are answered"])
async def test_a_link_is_given_up_when_nothing_moves_on_it(tmp_path: Path, *, alive: bool) -> None:
    sessions: list[int] = []
    pings = asyncio.Event()
    second = asyncio.Event()

    async def play(caller: Caller) -> None:
        sessions.append(caller.number)
        await caller.welcome()
        if caller.number > 1:
            second.set()
        elif alive:
            count = 0
            while (message := await caller.link.receive()).type in (WSMsgType.TEXT, WSMsgType.PING):
                if message.type == WSMsgType.PING:
                    await caller.link.pong(message.data)
                    count += 1
                if count == 10:  # two and a half times the agent's patience
                    pings.set()
        else:
            await second.wait()  # it reads nothing, and answers no ping

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LOOK_SECONDS", 0.05), ("PING_SECONDS", 0.1), ("LINK_SECONDS", 0.4), ("RETRY_SECONDS", 0.01)):
            patch.setattr(agent, name, value)
        async with played(play, autoping=False) as url:
            options = agent.Options(url=url, token=TOKEN, name="press-1", config_file=str(tmp_path / "config"), interval=3_600)
            running = asyncio.create_task(agent.Agent(options).run())
            async with asyncio.timeout(PATIENCE):
                await (pings if alive else second).wait()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    assert sessions == [1] if alive else sessions[:2] == [1, 2]


async def test_a_server_that_acknowledges_nothing_is_asked_again_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text(rows(20))
    frames: list[int] = []

    async def play(caller: Caller) -> None:
        await caller.welcome(0 if caller.number == 1 else 1)
        while True:
            frames.append((await caller.receive())["seq"])

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LOOK_SECONDS", 0.05), ("ANSWER_SECONDS", 0.3), ("RETRY_SECONDS", 0.01)):
            patch.setattr(agent, name, value)
        async with played(play) as url:
            async with asyncio.timeout(PATIENCE):
                await agent.Agent(agent.Options(url=url, token=TOKEN, name="press-1", replay=str(tmp_path / "run.csv"))).run()
    assert frames == [1]


# ---- the window, and the parts of a frame


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 100), st.floats(0, 10)), max_size=60))
def test_the_window_stays_within_its_bounds(steps: list[tuple[int, float, float]]) -> None:
    window, now = agent.Window(), 0.0
    for size, took, pause in steps:
        now += pause
        window.acknowledged(size, now - took, now, size)
        assert agent.WINDOW_LEAST <= window.size <= agent.WINDOW_MOST
        assert window.frame <= window.size


@pytest.mark.parametrize("rate", [300, 1_000, 3_000, 20_000, 1_000_000])
def test_on_a_link_of_any_pace_acknowledgements_come_within_seconds(rate: int) -> None:
    """A link that carries so many bytes a second, and an agent that always has more to send."""
    window, now, late = agent.Window(), 0.0, []
    under_way: list[tuple[int, float, float]] = []  # size, sent, arrives
    free = 0.0
    for _ in range(400):
        while not under_way or sum(size for size, *_ in under_way) + window.frame <= window.size:
            free = max(free, now) + window.frame / rate
            under_way.append((window.frame, now, free))
        size, sent, now = under_way.pop(0)
        late.append(now - sent)
        window.acknowledged(size, sent, now, size + sum(size for size, *_ in under_way))
    settled = late[200:]
    assert max(settled) < max(2 * agent.SLOW_SECONDS, 2 * agent.WINDOW_LEAST / rate + 1)
    assert rate < 1_000_000 or window.size == agent.WINDOW_MOST


FRAMES = st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1), min_size=1, max_size=9).map(
    lambda rows: agent.Outgoing(
        {"type": "telemetry", "samples": [{"ts": number, "values": values} for number, values in enumerate(rows)]},
        tuple(range(100, 100 + len(rows))),
        len(rows),
    )
)


def points(*frames: agent.Outgoing) -> list[tuple[int, int, str, int]]:
    """Line, time, metric and value of all that some frames hold."""
    return sorted(
        (line, sample["ts"], metric, value)
        for frame in frames
        for line, sample in zip(frame.lines, frame.samples, strict=True)
        for metric, value in sample["values"].items()
    )


@given(FRAMES)
def test_halving_ends_with_single_values_and_loses_none(frame: agent.Outgoing) -> None:
    whole, singles = [frame], []
    while whole:
        parts = agent.halves(whole[-1])
        if parts:
            assert points(*parts) == points(whole.pop())
            assert all(part.samples for part in parts)
            whole += parts
        else:
            singles.append(whole.pop())
    assert points(*singles) == points(frame)
    assert all(len(points(single)) == 1 for single in singles)
    assert sum(single.rows for single in singles) == frame.rows


@given(FRAMES, st.integers(0, 10), st.sampled_from(["ts", "values.a", "values.b", "values", ""]))
@example(agent.Outgoing({"samples": [{"ts": 1, "values": {"a": 1}}]}, (1,), 1), 0, "values.a")
def test_what_a_refusal_names_is_lost_and_the_rest_sent_again(frame: agent.Outgoing, index: int, field: str) -> None:
    parts, lost = agent.parts_without(frame, f"samples[{index}].{field}")
    assert points(*parts, *([lost] if lost else [])) == points(frame) or (lost is None and not parts)
    if index < len(frame.samples):
        assert lost is not None
        assert lost.lines == (100 + index,) or lost.lines == (1,)
        metric = field.removeprefix("values.")
        if metric in frame.samples[index]["values"]:
            assert lost.samples[0]["values"].keys() == {metric}
    else:
        assert lost is None


@given(FRAMES)
def test_parts_by_metric_hold_all_and_none_twice(frame: agent.Outgoing) -> None:
    parts = agent.parts_by_metric(frame)
    assert bool(parts) == (len(agent.metrics_of(frame)) > 1)
    if parts:
        assert points(*parts) == points(frame)
        assert not set(agent.metrics_of(parts[0])) & set(agent.metrics_of(parts[1]))
