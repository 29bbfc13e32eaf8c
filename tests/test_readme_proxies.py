"""The README's proxies and certificates, for real: nginx, Caddy, and the server's own TLS, with the page's files and its private CA."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from aiohttp import ClientSession, TCPConnector
from aiohttp.test_utils import unused_port
from plant import PATIENCE, Plant, Process
from readme import README, Terminal, as_root, blocks, strays

POINTS = 400_000  # of the CSV that breaks off: more than the buffers on its way hold
SLOW = "2M"  # bytes a second at which curl reads it
NAMES = {"iiot.example.com": "localhost"}


def program(name: str) -> str:
    """A program: of the environment that runs the tests, or of the machine. Debian keeps nginx in /usr/sbin."""
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin")))
    if found is None:
        pytest.skip(f"the README's proxies need {name}")
    return found


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def make_certificates(folder: Path) -> Terminal:
    """The private CA of the page, and the certificate that it gave to the server, in its place: /etc/iiot in this folder."""
    program("openssl")
    terminal, there = Terminal(folder), folder / "etc/iiot"
    there.mkdir(parents=True)
    for text in blocks("A private CA", "sh")[:3]:
        await terminal.run(as_root(text, folder))
    assert strays(folder, "etc/") == []
    assert {mode(folder / name) for name in ("ca.key", "server.key")} == {0o600}
    assert {path.name: mode(path) for path in there.iterdir()} == {"ca.pem": 0o644, "server.pem": 0o644, "server.key": 0o400}
    return terminal


def trusting(**variables: str) -> str:
    """The page's commands for whoever trusts the CA, with these variables set."""
    exports = "export " + " ".join(f"{name}={value}" for name, value in variables.items())
    return blocks("A private CA", "sh")[3].replace("curl", f"{exports}\ncurl")


def settings(folder: Path) -> dict[str, str]:
    """What the page has written into the service's variables."""
    return dict(line.split("=", 1) for line in (folder / "etc/iiot/iiot.env").read_text().splitlines())


def nginx(folder: Path, text: str) -> list[str]:
    """The page's file as Debian's nginx.conf includes it."""
    (folder / "iiot.conf").write_text(text)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr;\nevents {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;\n"
        f"uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; include {folder}/iiot.conf; }}\n"
    )
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, text: str) -> list[str]:
    """The page's file, without the listener for redirects and the administration's, which tests cannot share."""
    path = folder / "etc/caddy/Caddyfile"
    path.parent.mkdir()
    path.write_text("{\n    admin off\n    auto_https disable_redirects\n}\n" + text)
    return [program("caddy"), "run", "--config", str(path)]


async def check(terminal: Terminal, title: str, words: list[str]) -> None:
    """The page's commands after a proxy's file was saved: it is right, and the service knows the proxy."""
    text = as_root(blocks(title, "sh")[0], terminal.folder)
    nginx_there, caddy_there = f"{shlex.join(words)} -t", f"env HOME={terminal.folder} {words[0]} validate"
    assert ("nginx -t" in text) != ("caddy validate" in text)
    await terminal.run(text.replace("nginx -t", nginx_there).replace("caddy validate", caddy_there))


PROXIES: dict[str, tuple[str, str, Callable[[Path, str], list[str]]]] = {
    "nginx": ("Proxy: nginx", "listen 443 ssl", nginx),
    "caddy": ("Proxy: Caddy", "iiot.example.com {", caddy),
}


@asynccontextmanager
async def running(words: list[str], folder: Path, port: int) -> AsyncIterator[None]:
    """A proxy, from when it listens."""
    with (folder / "proxy.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*words, cwd=folder, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)})
    try:
        async with asyncio.timeout(PATIENCE):
            while process.returncode is None:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("localhost", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        assert process.returncode is None, (folder / "proxy.log").read_text()
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture(params=sorted(PROXIES))
async def proxied(request: pytest.FixtureRequest, tmp_path: Path, process: Process) -> AsyncIterator[Terminal]:
    """The shell of an operator on the other side of a proxy, who trusts the private CA; IIOT_URL is the proxy's address."""
    title, listen, start = PROXIES[request.param]
    program(request.param)
    program("curl")
    terminal = await make_certificates(tmp_path)
    await terminal.run(as_root(blocks("Proxy: nginx", "sh")[1], tmp_path))
    inline = set(re.findall(r"`(IIOT_TRUSTED_PROXY=\S+)`", README))  # that of both proxies is the same
    assert inline == {f"{name}={value}" for name, value in settings(tmp_path).items()}
    process.environment.update(settings(tmp_path))
    await process.start()
    token, key = await process.read_first_start()
    port = unused_port()
    (text,) = blocks(title, "nginx", "caddy")
    moved = {
        "/etc/iiot": f"{tmp_path}/etc/iiot", "http://127.0.0.1:8080": process.url, "127.0.0.1:8080": process.url.removeprefix("http://"),
        listen: listen.replace("443", str(port)).replace("iiot.example.com", f"https://localhost:{port}"), **NAMES,
    }  # fmt: skip
    for shown, real in moved.items():
        text = text.replace(shown, real)
    words = start(tmp_path, text)
    await check(terminal, title, words)
    async with running(words, tmp_path, port):
        terminal.replace["https://localhost:8443"] = f"https://localhost:{port}"
        assert json.loads(await terminal.run(trusting(TOKEN=token, IIOT_KEY=key)))["role"] == "admin"
        try:
            yield terminal
        finally:
            await terminal.stop()


@pytest.fixture
async def beyond(proxied: Terminal) -> AsyncIterator[Plant]:
    """A client that speaks through the proxy."""
    context = ssl.create_default_context(cafile=proxied.folder / "ca.pem")
    url, token = (await proxied.run('echo "$IIOT_URL $TOKEN"')).split()
    async with ClientSession(connector=TCPConnector(ssl=context)) as client:
        yield Plant(url, client, token, proxied.folder / "iiot.db")


async def test_a_device_and_its_feed_go_through_a_proxy_unbuffered(proxied: Terminal, beyond: Plant) -> None:
    device = await beyond.device("press-1")
    feed = await proxied.start('curl -sN --cacert ca.pem -H "Authorization: Bearer $TOKEN" "$IIOT_URL/events?after=2"')
    assert feed.stdout is not None
    async with asyncio.timeout(PATIENCE):
        for serial in range(3):  # each arrives by itself, while the stream goes on
            seq = device.seq = device.seq + 1
            await device.send("state", seq=seq, reported={"serial": serial})
            event = [(await feed.stdout.readline()).decode() for _ in range(4)]
            assert event[1] == "event: state\n"
    await device.store({"values": {"level": 1.5}})
    table = await proxied.run(
        'curl -sf --cacert ca.pem -H "Authorization: Bearer $TOKEN" "$IIOT_URL/iiot/press-1/telemetry?format=csv"'
    )
    assert re.fullmatch(r"time,metric,value\n\S+Z,level,1\.5\n", table)
    assert (await beyond.ask("POST", "/iiot/press-1?wait=1", {"interval": 5}))[0] == 202
    assert (await device.expect("config"))["document"] == {"interval": 5}


async def test_the_agent_trusts_the_private_ca_and_its_address_is_known(proxied: Terminal, beyond: Plant) -> None:
    await proxied.start(".venv/bin/python agent.py --name pump-house --interval 0.2")
    await beyond.until("/iiot?limit=1", lambda body: body["items"] and body["items"][0]["connected"])
    forged = 'curl -sf4 --interface 127.0.0.2 --cacert ca.pem -H "X-Forwarded-For: 203.0.113.9" -H "Authorization: Bearer $TOKEN"'
    await proxied.run(f'{forged} -X PUT "$IIOT_URL/iiot/press-2"')
    seen = await beyond.get("/audit?action=device.register&limit=1")
    assert seen["items"][0]["address"] == "127.0.0.2"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_csv_that_breaks_off_fails(proxied: Terminal, beyond: Plant, process: Process, version: str) -> None:
    await beyond.register("history")
    with closing(sqlite3.connect(process.database)) as connection, connection:
        connection.execute("insert into series (device_id, metric) select id, 'level' from device where name = 'history'")
        connection.execute(
            """insert into telemetry with recursive n(i) as (select 0 union all select i + 1 from n where i < ? - 1)
               select series.id, 1735689600000 + i * 1000, i / 7.0 from n, series where metric = 'level'""",
            (POINTS,),
        )
    name = f"part{version}.csv"
    export = await proxied.start(
        f"curl -sf {version} --limit-rate {SLOW} --cacert ca.pem -H \"Authorization: Bearer $TOKEN\""
        f' "$IIOT_URL/iiot/history/telemetry?format=csv" -o {name}'
    )
    part = proxied.folder / name
    async with asyncio.timeout(PATIENCE):
        while not part.exists() or part.stat().st_size < 100_000:
            await asyncio.sleep(0.05)
    await process.stop(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE):
        code = await export.wait()
    assert code in (18, 56, 92), code  # of curl: partial file, cannot receive, HTTP/2 stream error
    assert part.read_text().count("\n") < POINTS


@pytest.mark.parametrize("kind", ["flags", "variables"])
async def test_tls_without_a_proxy(tmp_path: Path, kind: str) -> None:
    """The page's line, or its variables of the service, on a port of the test's own: on every address, for the agent and for curl, with
    a certificate that is renewed."""
    terminal = await make_certificates(tmp_path)
    line, variables = blocks("TLS without a proxy")
    port = unused_port()
    terminal.replace |= {f"{name}8443": f"{name}{port}" for name in ("--port ", "IIOT_PORT=", "https://localhost:")}
    await terminal.run(as_root(variables, tmp_path))
    given = settings(tmp_path)
    assert f"--host {given['IIOT_HOST']} --port {port}" in terminal.localized(line)
    written = " ".join(f"{name}={value}" for name, value in given.items())
    server = await terminal.start(line if kind == "flags" else f"env {written} .venv/bin/python iiot.py")
    assert server.stdout is not None
    try:
        printed = ""
        async with asyncio.timeout(PATIENCE):
            while "curl" not in printed:
                printed += (await server.stdout.readline()).decode()
        token, key = (re.findall(pattern, printed)[0] for pattern in (r"iiot_op_\S+", r"iiot_prov_\S+"))
        assert printed.count(f"https://localhost:{port}") == 3  # for the page, the agent and curl
        listing = printed.splitlines()[-1].strip()
        assert json.loads(await terminal.run(f"export CURL_CA_BUNDLE=ca.pem\n{listing}")) == {"items": [], "next": None}
        told = await terminal.run(trusting(TOKEN=token.rstrip("'"), IIOT_KEY=key))
        assert set(json.loads(told)) == set(json.loads(blocks("A private CA", "json")[0]))
        agent = await terminal.start(".venv/bin/python agent.py --name pump-house --interval 0.2")
        listing = 'curl -sf --cacert ca.pem -H "Authorization: Bearer $TOKEN" "$IIOT_URL/iiot"'
        await terminal.until(listing, lambda body: body["items"] and body["items"][0]["connected"])
        before = await asyncio.to_thread(ssl.get_server_certificate, ("localhost", port))
        for text in blocks("A private CA", "sh")[1:3]:
            await terminal.run(as_root(text, tmp_path))
        server.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE):
            while await asyncio.to_thread(ssl.get_server_certificate, ("localhost", port)) == before:
                await asyncio.sleep(0.05)
        assert agent.returncode is None
    finally:
        await terminal.stop()
