"""Stock OpenSSH through a tunnel: a real sshd behind a real agent, and ssh, scp, sftp and rsync as people use them."""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import plant as plants
import pytest
from aiohttp import WSMsgType
from aiohttp.test_utils import unused_port
from plant import PATIENCE, ROOT, Plant, Process
from readme import blocks
from sshd import SSHD, Sshd

SSH_TOOLS = [tool for tool in ("ssh", "scp", "sftp", "ssh-keygen", "rsync") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(SSHD is None or bool(SSH_TOOLS), reason=f"needs sshd and other programs; missing: {SSH_TOOLS}")
MEBIBYTE = 1 << 20


class Site:
    """A server, a device with an agent and an sshd, and an operator's ssh."""

    def __init__(self, folder: Path, server: Process, plant: Plant, sshd: Sshd) -> None:
        self.folder = folder
        self.server = server
        self.plant = plant
        self.sshd = sshd
        self.echo_port = unused_port()
        self.agents: list[asyncio.subprocess.Process] = []

    async def start_agent(self, name: str) -> asyncio.subprocess.Process:
        key = (await self.plant.ask("POST", "/provisioning-keys", {}))[1]["key"]
        with (self.folder / "agent.log").open("ab") as errors:
            agent = await asyncio.create_subprocess_exec(
                sys.executable, str(ROOT / "agent.py"), "--url", self.server.url, "--key", key, "--name", name, "--interval", "0.2",
                "--allow-tunnel", f"{self.sshd.port},{self.echo_port},1-9", cwd=self.folder, stderr=errors,
            )  # fmt: skip
        self.agents.append(agent)
        await self.plant.until("/iiot", lambda body: any(one["device"] == name and one["connected"] for one in body["items"]))
        return agent

    @property
    def options(self) -> list[str]:
        proxy = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'iiot.py'))} tunnel %n %p"
        return [
            "-F", "none", "-o", f"ProxyCommand={proxy}", "-o", f"Port={self.sshd.port}", "-o", f"IdentityFile={self.folder}/user",
            "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={self.folder}/known",
            "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", f"User={getpass.getuser()}",
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "IIOT_URL": self.server.url, "IIOT_TOKEN": self.plant.token}

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self.environment
        )

    async def run(self, *words: str, data: bytes = b"", patience: float = 3 * PATIENCE) -> bytes:
        """What a command prints, which must end well."""
        process = await self.start(*words)
        async with asyncio.timeout(patience):
            output, errors = await process.communicate(data)
        assert process.returncode == 0, (words[0], process.returncode, errors.decode(), (self.folder / "agent.log").read_text()[-2000:])
        return output

    async def open_tunnels(self, name: str = "press-7") -> int:
        return len((await self.plant.get(f"/iiot/{name}/tunnels"))["items"])

    async def until_no_tunnels(self, name: str = "press-7") -> None:
        await self.plant.until(f"/iiot/{name}/tunnels", lambda body: body["items"] == [])


@asynccontextmanager
async def at_site(folder: Path) -> AsyncIterator[Site]:
    server, sshd = await Process(folder).start(), Sshd(folder)
    async with plants.client() as client:
        site = Site(folder, server, Plant(server.url, client, plants.admin_token(server.database), server.database), sshd)
        try:
            sshd.start()
            await site.start_agent("press-7")
            yield site
        finally:
            for agent in site.agents:
                if agent.returncode is None:
                    agent.kill()
                await agent.wait()
            sshd.stop()
            await server.stop(signal.SIGKILL)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with at_site(tmp_path) as ready:
        yield ready


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def random_file(path: Path, size: int) -> str:
    """The digest of what is in it."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size // MEBIBYTE):
            piece = os.urandom(MEBIBYTE)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of(path: Path) -> str:
    return digest(path.read_bytes())


async def test_ssh_logs_in_and_runs_a_command(site: Site) -> None:
    assert await site.run("ssh", *site.options, "press-7", "cat; echo done", data=b"through\n") == b"through\ndone\n"
    process = await site.start("ssh", *site.options, "press-7", "exit 7")
    assert await process.wait() == 7
    await site.until_no_tunnels()
    audit = (await site.plant.get("/audit?action=tunnel.end"))["items"]
    assert {(one["device"], one["target"]) for one in audit} == {("press-7", str(site.sshd.port))}
    assert all(one["detail"]["from_device"] > 1_000 < one["detail"]["to_device"] for one in audit)


async def test_a_hardware_address_is_a_name_for_ssh_too(site: Site) -> None:
    await site.start_agent("00:1B:44:11:3A:B7")
    assert await site.run("ssh", *site.options, "00:1B:44:11:3A:B7", "echo here") == b"here\n"
    await site.run("scp", *site.options, str(site.folder / "host.pub"), f"[00:1B:44:11:3A:B7]:{site.folder}/there")
    assert digest_of(site.folder / "there") == digest_of(site.folder / "host.pub")


async def test_the_lines_of_the_readme_log_in(site: Site) -> None:
    start, exported, configured, _ = blocks("Log in to a device with ssh")
    assert start.strip().endswith("--allow-tunnel 22,8000-8010")
    line = exported.splitlines()[1]
    for shown, here in (
        (".venv/bin/python iiot.py", f"{sys.executable} {ROOT / 'iiot.py'}"), ("ssh -o", shlex.join(["ssh", *site.options[4:], "-o"])),
        ("admin@pump-house", "press-7 echo by the line"),
    ):  # fmt: skip
        assert shown in line
        line = line.replace(shown, here)
    assert await site.run("sh", "-c", line) == b"by the line\n"
    configured = configured.replace("/opt/iiot/.venv/bin/python /opt/iiot/iiot.py", f"{sys.executable} {ROOT / 'iiot.py'}")
    (site.folder / "config").write_text(configured)
    assert await site.run("ssh", "-F", str(site.folder / "config"), *site.options[4:], "press-7", "echo by the file") == b"by the file\n"


async def test_sftp_rsync_and_forwarded_ports_work(site: Site) -> None:
    digest = random_file(site.folder / "file", 2 * MEBIBYTE)
    batch = f"put {site.folder}/file {site.folder}/by-sftp\n"
    await site.run("sftp", *site.options, "-b", "-", "press-7", data=batch.encode())
    shell = shlex.join(["ssh", *site.options])
    await site.run("rsync", "-e", shell, "-z", str(site.folder / "file"), f"press-7:{site.folder}/by-rsync")
    assert {digest_of(site.folder / name) for name in ("by-sftp", "by-rsync")} == {digest}
    with serving_text(b"over a forwarded port") as port:
        local, dynamic = unused_port(), unused_port()
        ssh = await site.start("ssh", *site.options, "-N", "-L", f"{local}:127.0.0.1:{port}", "-D", str(dynamic), "press-7")
        try:
            assert await curl(f"http://127.0.0.1:{local}/") == b"over a forwarded port"
            assert await curl(f"http://127.0.0.1:{port}/", "--socks5", f"127.0.0.1:{dynamic}") == b"over a forwarded port"
        finally:
            ssh.terminate()
            await ssh.wait()


@contextmanager
def serving_text(text: bytes) -> Iterator[int]:
    """A web server of Python's own, as a process."""
    port = unused_port()
    program = (
        "import http.server, sys\nclass Handler(http.server.BaseHTTPRequestHandler):\n def do_GET(self):\n  self.send_response(200)\n"
        f"  self.send_header('Content-Length', '{len(text)}')\n  self.end_headers()\n  self.wfile.write({text!r})\n"
        f"http.server.ThreadingHTTPServer(('127.0.0.1', {port}), Handler).serve_forever()"
    )
    server = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        server.kill()
        server.wait()


async def curl(url: str, *more: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        "curl", "-s", "--retry", "20", "--retry-delay", "1", "--retry-all-errors", "--max-time", "20", *more, url,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(3 * PATIENCE):
        output, _ = await process.communicate()
    return output


async def copy_both_ways(site: Site, size: int) -> None:
    digest = random_file(site.folder / "file", size)
    patience = 60 + size / MEBIBYTE
    await site.run("scp", *site.options, str(site.folder / "file"), f"press-7:{site.folder}/there", patience=patience)
    await site.run("scp", *site.options, f"press-7:{site.folder}/there", str(site.folder / "back"), patience=patience)
    assert (digest_of(site.folder / "there"), digest_of(site.folder / "back")) == (digest, digest)


async def test_a_file_goes_both_ways_while_readings_go_on(site: Site) -> None:
    before = len(await site.plant.points("press-7", "load_1m"))
    await copy_both_ways(site, 16 * MEBIBYTE)
    assert len(await site.plant.points("press-7", "load_1m")) > before
    assert (await site.plant.get("/iiot/press-7/events?kind=disconnected"))["items"] == []


@pytest.mark.long
async def test_a_large_file_goes_both_ways(site: Site) -> None:
    await copy_both_ways(site, 200 * MEBIBYTE)


@pytest.mark.parametrize("cut", ["the device", "the server"])
async def test_a_link_that_is_cut_in_the_middle_ends_both_sides_and_leaves_nothing(site: Site, cut: str) -> None:
    random_file(site.folder / "file", 64 * MEBIBYTE)
    (agent,) = site.agents
    await site.run("ssh", *site.options, "press-7", "true")
    await site.until_no_tunnels()
    open_before = descriptors(agent.pid), descriptors(site.server.pid)
    copies = [
        await site.start("scp", "-l", "40000", *site.options, str(site.folder / "file"), f"press-7:{site.folder}/there"),
        await site.start("scp", "-l", "40000", *site.options, f"press-7:{site.folder}/file", str(site.folder / "back")),
    ]
    await site.plant.until(
        "/iiot/press-7/tunnels", lambda body: len([one for one in body["items"] if one["from_device"] + one["to_device"] > 500_000]) == 2
    )
    if cut == "the device":
        await site.plant.ask("POST", "/iiot/press-7/seq", {"seq": 1})  # ends the session; the agent comes back at once
    else:
        await site.server.stop(signal.SIGKILL)
        site.server.arguments = ("--port", site.server.url.rpartition(":")[2])
        await site.server.start()
    async with asyncio.timeout(30):
        for copy in copies:
            await copy.communicate()
            assert copy.returncode
    await site.plant.until("/iiot", lambda body: body["items"][0]["connected"])
    await site.until_no_tunnels()
    async with asyncio.timeout(PATIENCE):
        while descriptors(agent.pid) > open_before[0] or (cut == "the device" and descriptors(site.server.pid) > open_before[1]):
            await asyncio.sleep(0.05)
    assert await site.run("ssh", *site.options, "press-7", "echo again") == b"again\n"


async def test_a_dead_port_and_one_that_is_not_allowed_answer_at_once(site: Site) -> None:
    for port, words in ((9, "nothing listens at port 9"), (site.sshd.port + 1, "--allow-tunnel")):
        process = await site.start(sys.executable, str(ROOT / "iiot.py"), "tunnel", "press-7", str(port))
        async with asyncio.timeout(PATIENCE):
            output, errors = await process.communicate()
        assert (process.returncode, output) == (1, b"")
        assert words in errors.decode(), errors


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def through(site: Site, port: int, data: bytes, began: asyncio.Barrier) -> bytes:
    """What comes back of what is sent through a tunnel of its own, which is open together with all others."""
    headers = {"Authorization": f"Bearer {site.plant.token}"}
    async with site.plant.client.ws_connect(f"{site.server.url}/iiot/press-7/tunnel/{port}", headers=headers, max_msg_size=0) as link:
        await began.wait()
        sending, got = asyncio.create_task(link.send_bytes(data)), b""
        async with asyncio.timeout(3 * PATIENCE):
            while len(got) < len(data):
                got += await link.receive_bytes()
            await sending
        await link.send_frame(struct.pack("!H", 1000), WSMsgType.CLOSE)
        await link.receive()
    return got


async def test_fifty_tunnels_do_not_notice_one_that_is_not_read_and_one_that_is_stopped(site: Site) -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", site.echo_port)
    words = ["ssh", *site.options, "press-7", "yes"]
    stopped, unread = (subprocess.Popen(words, stdout=subprocess.PIPE, env=site.environment) for _ in range(2))  # noqa: ASYNC220 - asyncio reads
    assert stopped.stdout is not None
    await asyncio.to_thread(stopped.stdout.read, 100_000)
    stopped.send_signal(signal.SIGSTOP)
    try:
        data, began = [os.urandom(300_000) for _ in range(48)], asyncio.Barrier(49)
        others = [asyncio.create_task(through(site, site.echo_port, one, began)) for one in data]
        await began.wait()
        assert await site.open_tunnels() == 50
        assert [digest(got) for got in await asyncio.gather(*others)] == list(map(digest, data))
        assert await site.open_tunnels() == 2
        assert (await site.plant.get("/iiot/press-7/events?kind=disconnected"))["items"] == []
    finally:
        server.close()
        for process in (stopped, unread):
            process.kill()
            process.communicate()
    await site.until_no_tunnels()
