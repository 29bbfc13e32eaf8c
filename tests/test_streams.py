"""A copy that was cut short does not look whole, and a feed is never silent: for HTTP/1.1, HTTP/1.0, and behind nginx as it comes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import unused_port
from plant import PATIENCE, Plant, Process
from test_feed import feed, timeline

import iiot

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
CURL = shutil.which("curl")
SLOW = attrs.evolve(iiot.Limits(), csv_rows=10)  # thousands of pieces: a copy takes its time
ROWS = 20_000


@attrs.define
class Download:
    """curl, reading a stream slowly; `seen` is what it has printed so far."""

    process: asyncio.subprocess.Process
    seen: bytes = b""

    async def line(self) -> bytes:
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self.process.stdout.readline()
        self.seen += line
        return line

    async def end(self) -> int:
        """Its exit code, after all that still came."""
        async with asyncio.timeout(PATIENCE):
            rest, _ = await self.process.communicate()
        self.seen += rest
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def curl(plant: Plant, path: str, *arguments: str, url: str = "", token: str = "") -> AsyncIterator[Download]:
    """Its own pipe is small, so that the server cannot be far ahead of the test."""
    if CURL is None:
        pytest.skip("a client that the server is not written for: curl")
    process = await asyncio.create_subprocess_exec(
        CURL, "-sS", "-N", "-H", f"Authorization: Bearer {token or plant.token}", *arguments,
        (url or plant.url) + path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=4_096,
    )  # fmt: skip
    try:
        yield Download(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def nginx(plant: Plant, folder: Path) -> AsyncIterator[str]:
    """nginx before the server with nothing but a proxy_pass; its address."""
    if NGINX is None:
        pytest.skip("a proxy that the server is not written for: nginx")
    port, home = unused_port(), folder / "nginx"
    home.mkdir()
    (home / "nginx.conf").write_text(
        f"daemon off; pid {home}/pid; error_log {home}/error.log; worker_processes 1; user root;\n"
        f"events {{}} http {{ access_log off; client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;"
        f" uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;"
        f" server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass {plant.url}; }} }} }}\n"
    )
    process = await asyncio.create_subprocess_exec(NGINX, "-e", str(home / "error.log"), "-p", str(home), "-c", str(home / "nginx.conf"))
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    break
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def filled(plant: Plant, name: str = "press-1") -> None:
    device = await plant.device(name)
    for start in range(0, ROWS, 5_000):
        samples = ({"ts": 1_767_225_600_000 + n, "values": {"level": n}} for n in range(start, start + 5_000))
        await device.store(*samples)


WAYS = pytest.mark.parametrize("way", ["HTTP/1.1", "HTTP/1.0", "nginx"])


@asynccontextmanager
async def download(plant: Plant, folder: Path, way: str, path: str, token: str = "") -> AsyncIterator[Download]:
    if way == "nginx":
        async with nginx(plant, folder) as url, curl(plant, path, url=url, token=token) as reading:
            yield reading
    else:
        async with curl(plant, path, *(["--http1.0"] if way == "HTTP/1.0" else []), token=token) as reading:
            yield reading


PATH = "/iiot/press-1/telemetry?format=csv"


@WAYS
async def test_a_copy_that_is_whole_ends_well(tmp_path: Path, way: str) -> None:
    async with plants.plant(tmp_path, SLOW) as plant:
        await filled(plant)
        async with download(plant, tmp_path, way, PATH) as reading:
            assert await reading.end() == 0
        assert reading.seen.count(b"\n") == 1 + ROWS


@WAYS
@pytest.mark.parametrize("name_is_taken_again", [False, True], ids=["removed", "removed and registered anew"])
async def test_a_copy_of_a_device_that_is_removed_meanwhile_fails(tmp_path: Path, way: str, name_is_taken_again: bool) -> None:  # noqa: FBT001
    async with plants.plant(tmp_path, SLOW) as plant:
        await filled(plant)
        async with download(plant, tmp_path, way, PATH) as reading:
            await reading.line()
            assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
            if name_is_taken_again:
                plant.tokens.clear()
                device = await plant.device("press-1")
                await device.store({"values": {"level": 1}})
            assert await reading.end() != 0
        assert reading.seen.count(b"\n") < 1 + ROWS


@WAYS
async def test_a_copy_whose_token_is_revoked_meanwhile_fails(tmp_path: Path, way: str) -> None:
    async with plants.plant(tmp_path, SLOW) as plant:
        await filled(plant)
        made = (await plant.ask("POST", "/tokens", {"name": "copy", "role": "viewer"}))[1]
        async with download(plant, tmp_path, way, PATH, made["token"]) as reading:
            await reading.line()
            assert (await plant.ask("DELETE", f"/tokens/{made['id']}"))[0] == 204
            assert await reading.end() != 0


@WAYS
async def test_a_copy_from_a_server_that_is_killed_fails(process: Process, tmp_path: Path, way: str) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        for start in range(0, 200_000, 5_000):
            values = {f"level-{m}": start for m in range(10)}
            await device.telemetry(*({"ts": iiot.EARLIEST + start + n, "values": values} for n in range(500)))
        await device.acknowledged(device.seq)
        async with download(plant, tmp_path, way, PATH) as reading:
            await reading.line()
            await process.stop(signal.SIGKILL)
            assert await reading.end() != 0


async def test_a_stream_to_http_1_0_ends_although_the_client_would_keep_the_connection(plant: Plant) -> None:
    await filled(plant)
    async with curl(plant, PATH, "--http1.0", "-H", "Connection: keep-alive", "--max-time", "10") as reading:
        assert await reading.end() == 0
    assert reading.seen.count(b"\n") == 1 + ROWS


# ---- the feed


async def test_a_last_event_of_another_database_is_answered_by_a_reset(plant: Plant) -> None:
    device = await plant.device("press-1")
    newest = (await timeline(plant))[-1]["id"]
    for by_header in (False, True):
        beyond = newest + 500
        async with feed(plant, "" if by_header else f"?after={beyond}", last=beyond if by_header else None) as following:
            event = await following.event()
            assert (event.id, event.kind, event.data) == (newest, "reset", {"id": newest, "kind": "reset", "asked": beyond})
            await device.send("state", seq=device.seq + 1, reported={"n": device.seq})
            device.seq += 1
            event = await following.event()
            assert event.kind == "state"
            assert event.id is not None
            newest = event.id


async def test_events_that_went_with_their_device_are_no_reset(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), resume_seconds=0.0)) as plant:
        await plant.register("press-1")
        await plant.register("press-2")
        async with feed(plant, "?after=0") as following:
            assert (await plant.ask("DELETE", "/iiot/press-2"))[0] == 204
            (*_, removed) = await following.events(3)
        async with asyncio.timeout(PATIENCE):
            while plants.rows(plant.database, "select 1 from event where kind = 'removed'"):
                await asyncio.sleep(0.01)
        async with feed(plant, last=removed.id) as following:
            await plant.register("press-3")
            assert (await following.event()).kind == "credentials"


async def test_the_newest_event_is_no_reset(plant: Plant) -> None:
    device = await plant.device("press-1")
    newest = (await timeline(plant))[-1]["id"]
    async with feed(plant, last=newest) as following:
        await device.close()
        assert (await following.event()).kind == "disconnected"


async def test_a_removed_device_ends_in_the_feed_and_its_events_stay_in_a_resume(plant: Plant) -> None:
    device = await plant.device("press-1")
    start = (await timeline(plant))[0]["id"]
    async with feed(plant) as following:
        assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
        await device.closed()
        removed, gone = await following.events(2)
    assert [(event.kind, event.data["device"]) for event in (removed, gone)] == [("removed", "press-1"), ("disconnected", "press-1")]
    assert (removed.data["by"], gone.data["reason"]) == ("test admin", "device_removed")
    plant.tokens.clear()
    await plant.register("press-1")
    async with feed(plant, f"?after={start}") as following:
        events = await following.events(4)
    assert [event.kind for event in events] == ["connected", "removed", "disconnected", "credentials"]
    assert [event["kind"] for event in await timeline(plant)] == ["credentials"], "the timeline is the new device's alone"


async def test_the_events_of_a_removed_device_go_when_their_time_is_over(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), resume_seconds=0.0)) as plant:
        await plant.register("press-1")
        assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
        async with asyncio.timeout(PATIENCE):
            while plants.rows(plant.database, "select 1 from event union all select 1 from device"):
                await asyncio.sleep(0.01)


async def test_the_feed_comes_through_nginx_as_it_is(plant: Plant, tmp_path: Path) -> None:
    device = await plant.device("press-1")
    async with nginx(plant, tmp_path) as url, curl(plant, "/events", url=url) as reading:
        async with asyncio.timeout(PATIENCE):
            while b"data: " not in reading.seen:
                await device.send("state", seq=device.seq + 1, reported={"n": device.seq})
                device.seq += 1
                await device.acknowledged(device.seq)
                try:
                    async with asyncio.timeout(0.5):
                        await reading.line()
                except TimeoutError:
                    continue
        event = json.loads(reading.seen.partition(b"data: ")[2])
        assert (event["kind"], event["device"]) == ("state", "press-1")


# ---- CSV for a spreadsheet


FORMULAS = ["=cmd|' /C calc'!A0", '=HYPERLINK("http://192.0.2.1","x")', "+1+1", "-1+1", "@SUM(A1)", "\tx", "\rx", "plain", "it's"]


async def get_text(plant: Plant, path: str) -> tuple[bytes, Any]:
    async with plant.client.get(plant.url + path, headers={"Authorization": f"Bearer {plant.token}"}) as response:
        assert response.status == 200
        return await response.read(), response.headers


async def test_a_csv_is_exact_for_programs_and_disarmed_for_a_spreadsheet(plant: Plant) -> None:
    device = await plant.device("press-1")
    await device.store(*({"ts": iiot.EARLIEST + n, "values": {"=note": text}} for n, text in enumerate(FORMULAS)))
    await device.store({"ts": iiot.EARLIEST, "values": {"-5": -5.5, "level": -7}})
    exact, _ = await get_text(plant, PATH)
    assert exact.startswith(b"time,metric,value\n2000-01-01T00:00:00.000Z,-5,-5.5\n")
    assert b',=note,"=HYPERLINK(""http://192.0.2.1"",""x"")"\n' in exact
    shown, headers = await get_text(plant, PATH + "&spreadsheet=1")
    assert shown.startswith("\ufefftime,metric,value\n2000-01-01T00:00:00.000Z,'-5,-5.5\n".encode())
    assert headers["Content-Disposition"] == 'attachment; filename="press-1.csv"'
    cells = [cell for line in shown.decode().splitlines() for cell in line.split(",")]
    for text in ("'=note", "'=cmd|' /C calc'!A0", "'+1+1", "'-1+1", "'@SUM(A1)", "'\tx", "plain", "it's", "-7"):
        assert text in cells, text
    bucket, _ = await get_text(plant, PATH + "&spreadsheet=1&every=1s&agg=last&metric=%3Dnote")
    assert b",'=note,it's\n" in bucket


async def test_a_spreadsheet_is_a_csv(plant: Plant) -> None:
    await plant.register("press-1")
    status, body = await plant.ask("GET", "/iiot/press-1/telemetry?spreadsheet=1")
    assert (status, body["error"]["details"]) == (400, [{"path": "spreadsheet", "message": "needs format=csv"}])


# ---- sums


@pytest.mark.parametrize(
    ("values", "average", "total"),
    [
        ([1e308, 1e308], 1e308, None), ([1.7976931348623157e308] * 3, 1.7976931348623157e308, None), ([-1e308] * 4, -1e308, None),
        ([2**53, 0], 2**52, 2**53), ([0.1, 0.2], 0.15000000000000002, 0.30000000000000004),
        ([5e-324, 5e-324], 5e-324, 1e-323), ([2**63 - 1, 2**63 - 1], float(2**63 - 1), 2 * float(2**63 - 1)), ([1, "text"], 1, 1),
    ],
)  # fmt: skip
async def test_averages_and_sums_of_large_numbers(plant: Plant, values: list[Any], average: float, total: float | None) -> None:
    device = await plant.device("press-1")
    await device.store(*({"ts": iiot.EARLIEST + n, "values": {"level": value}} for n, value in enumerate(values)))
    ((_, shown_average, shown_total),) = await plant.points("press-1", "level", "&every=1s&agg=avg,sum")
    assert (shown_average, shown_total) == (average, total)
