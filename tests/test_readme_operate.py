"""Part 5 of the README: the service, the first secrets, backup and restore, an update; each command as it is written."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import attrs
import pytest
from aiohttp import ClientSession
from plant import ROOT, Process
from readme import SECTIONS, Terminal, as_root, blocks, section, strays
from test_install import SOURCES, run, separate

import iiot


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"the README's commands need {program}")


def copy_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    return folder


def units() -> dict[str, str]:
    """Every unit of the page, by the name under which it is saved."""
    found: dict[str, str] = {}
    for part in SECTIONS:
        files = [block.text for block in part.blocks if block.kind == "ini"]
        names = re.findall(r"Save this file as `/etc/systemd/system/([\w.-]+)`", part.text)
        found |= dict(zip(names, files, strict=True))
    return found


def done_at(root: Path, text: str, folder: Path | None = None) -> str:
    """Run commands of the page that must succeed; what they print."""
    done = run("bash", "-ec", as_root(text, root), folder=folder or root)
    assert done.returncode == 0, (text, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine on which the service was installed by the page's own commands; only systemd itself does not run there."""
    need("useradd", "systemctl", "systemd-analyze")
    root = tmp_path_factory.mktemp("machine")
    for folder in ("etc/systemd/system", "opt", "var/lib", "var/backups"):
        (root / folder).mkdir(parents=True)
    for name in ("passwd", "group", "shadow", "gshadow"):
        (root / "etc" / name).touch()
    source = copy_sources(root / "source")
    install, _, enable, _ = blocks("Service (systemd)", "sh")
    done_at(root, install, source)
    for name, unit in units().items():
        (root / "etc/systemd/system" / name).write_text(unit)
    done_at(root, enable, source)
    return root


def test_the_service_is_installed_as_the_page_says(machine: Path) -> None:
    assert (machine / "etc/passwd").read_text().startswith("iiot:x:")
    assert (machine / "var/lib/iiot").stat().st_mode & 0o777 == 0o700
    assert (machine / "etc/iiot").stat().st_mode & 0o777 == 0o755
    assert (machine / "etc/systemd/system/multi-user.target.wants/iiot.service").is_symlink()
    version = run(machine / "opt/iiot/bin/iiot", "--version", folder=machine)
    assert version.stdout == f"{iiot.VERSION}\n"


def test_the_units_are_right(machine: Path, tmp_path: Path) -> None:
    """As systemd reads them; the programs are where these tests installed them."""
    assert set(units()) == {"iiot.service", "iiot-agent.service", "iiot-backup.service", "iiot-backup.timer"}
    done_at(machine, blocks("Backup and restore", "sh")[1].replace("sudo -u iiot /opt/iiot/bin/iiot-backup\n", ""))
    for name, unit in units().items():
        (tmp_path / name).write_text(unit.replace("/opt/iiot", str(machine / "opt/iiot")))
    done = run("systemd-analyze", "verify", "--man=no", *(tmp_path / name for name in units()), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, (good, bad) in {
        "iiot.service": ("ProtectSystem=", "ProtectSystems="), "iiot-agent.service": ("StateDirectory=", "StateDirectories="),
        "iiot-backup.service": ("Type=", "Types="), "iiot-backup.timer": ("02:30", "26:30"),
    }.items():  # fmt: skip
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(good, bad))
        assert bad.strip("=") in run("systemd-analyze", "verify", "--man=no", tmp_path / name, folder=tmp_path).stderr


def test_the_first_start_by_hand_and_new_secrets(machine: Path) -> None:
    first = blocks("Service (systemd)", "sh")[1]
    minted, journal = blocks("First-start secrets and the journal")
    program = ("bash", "-c", f"exec {as_root(first, machine).strip()} --port 0")
    with subprocess.Popen(program, cwd=machine, env=separate(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            printed = [server.stdout.readline() for _ in range(5)]
            assert "iiot_op_" in printed[3]
            assert "iiot_prov_" in printed[4]
            beside = run("bash", "-ec", as_root(minted, machine), folder=machine)
            assert [line.split("_")[1] for line in beside.stdout.splitlines()] == ["op", "prov"], beside
        finally:
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=20)
    assert server.returncode == 0
    assert not re.search(r"iiot_(op|prov)_\w{20}", err)
    need("journalctl")
    assert run("bash", "-c", journal, folder=machine).returncode in (0, 1)  # 1: no journal is kept here


async def test_health_of_the_service(process: Process, tmp_path: Path) -> None:
    need("curl")
    await process.start()
    check = blocks("Service (systemd)")[-2:]
    terminal = Terminal(tmp_path, {"http://127.0.0.1:8080": process.url})
    assert await terminal.run(check[0]) == check[1]


def test_the_unit_hides_the_first_secrets_only() -> None:
    """Standard output has nothing but what a first start prints; log lines go to standard error."""
    (unit,) = blocks("Service (systemd)", "ini")
    assert "StandardOutput=null" in unit
    assert "StandardError" not in unit
    assert iiot.Settings().port == 8080
    assert "logs go to standard error" in {field.name: field.metadata["help"] for field in attrs.fields(iiot.Settings)}["log_level"]


@pytest.mark.long
def test_an_update_and_a_way_back(machine: Path) -> None:
    """To an older version too, whose files are older than those that were built before."""
    (commands,) = blocks("Update")
    assert commands.endswith("\nsudo systemctl restart iiot\n")
    source = machine / "source"
    assert done_at(machine, commands, source) == f"{iiot.VERSION}\n"
    current, old = (source / "iiot.py").read_text(), "0.0.1"
    (source / "iiot.py").write_text(current.replace(f'VERSION: Final = "{iiot.VERSION}"', f'VERSION: Final = "{old}"'))
    os.utime(source / "iiot.py", (0, 1_000_000_000))
    assert (source / "build").exists()
    assert done_at(machine, commands, source) == f"{old}\n"
    (source / "iiot.py").write_text(current)
    assert done_at(machine, commands, source) == f"{iiot.VERSION}\n"


async def test_the_agent_as_the_unit_starts_it(machine: Path, process: Process, tmp_path: Path) -> None:
    install, start = blocks("Agent at boot (systemd)", "sh")
    await process.start()
    token, key = await process.read_first_start()
    (shown,) = re.findall(r"iiot_prov_\w+…", install)
    enable, journal = start.splitlines()
    done_at(machine, install.replace("https://iiot.example.com", process.url).replace(shown, key), machine / "source")
    done_at(machine, enable)
    assert (machine / "etc/systemd/system/multi-user.target.wants/iiot-agent.service").is_symlink()
    assert (machine / "etc/iiot/agent.env").stat().st_mode & 0o777 == 0o600
    unit = as_root(units()["iiot-agent.service"], machine)
    (settings,) = re.findall(r"^EnvironmentFile=(.*)$", unit, re.MULTILINE)
    (program,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    variables = dict(line.split("=", 1) for line in Path(settings).read_text().splitlines())
    assert set(variables) == {"IIOT_URL", "IIOT_KEY", "IIOT_NAME", "SSL_CERT_FILE"}
    del variables["SSL_CERT_FILE"]  # this server has no TLS; test_readme_proxies has
    agent = await asyncio.create_subprocess_exec(program, cwd=folder, env={**separate(), **variables}, stderr=subprocess.DEVNULL)
    try:
        async with ClientSession() as client:
            await process.plant(client, token).until("/iiot?limit=1", lambda body: body["items"] and body["items"][0]["connected"])
    finally:
        agent.terminate()
        await agent.wait()
    assert [path.name for path in folder.glob("*.token*")] == ["pump-house.token"]
    need("journalctl")
    assert run("bash", "-c", journal, folder=machine).returncode in (0, 1)  # 1: no journal is kept here


@pytest.mark.long
def test_the_install_lines_with_and_without_internet(tmp_path: Path) -> None:
    line, pack, unpack = blocks("Install")
    source = copy_sources(tmp_path / "source")
    for text in (line, pack):
        done = run("bash", "-c", text, folder=source)
        assert done.returncode == 0, done.stderr
    assert strays(source, *SOURCES) == []
    there = copy_sources(tmp_path / "there")
    shutil.copytree(source / "packages", there / "packages")
    done = run("bash", "-c", unpack, folder=there)
    assert done.returncode == 0, done.stderr
    for folder in (source, there):
        assert run(folder / ".venv/bin/python", "iiot.py", "--version", folder=folder).stdout == f"{iiot.VERSION}\n"
    assert run(there / ".venv/bin/iiot", "--version", folder=tmp_path).stdout == f"{iiot.VERSION}\n"
    (shown,) = re.findall(r"`(--no-index\s[^`]*)`", section("Service (systemd)").text)
    done = run(there / ".venv/bin/pip", "install", "-q", *shown.split(), folder=there)
    assert done.returncode == 0, done.stderr


async def test_a_backup_is_whole_and_comes_back(process: Process, tmp_path: Path) -> None:
    """Made beside a running server; restored after the server was killed, which leaves a log that belongs to the old file."""
    need("sqlite3")
    backup, _, _, restore, _ = blocks("Backup and restore", "sh")
    terminal = Terminal(tmp_path)
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        for value in range(50):
            await device.store({"values": {"level": value}})
        await terminal.run(backup)
        assert strays(tmp_path) == []
        assert (tmp_path / "backup.db").stat().st_mode & 0o777 == 0o600
        code, _, err = await terminal.attempt(backup)
        assert code != 0
        assert "already exists" in err
        await device.close()
        await process.stop()
        await process.start()
        plant = process.plant(client, token)
        plant.tokens.update({"press-1": (await plant.ask("POST", "/iiot/press-1/token", {"revoke": True}))[1]["token"]})
        await (await plant.device("press-1")).store({"values": {"level": 50}})
        await process.stop(signal.SIGKILL)
        assert (tmp_path / "iiot.db-wal").stat().st_size > 0
        shutil.copy(tmp_path / "backup.db", tmp_path / "iiot.db")  # and the log forgotten
        with pytest.raises(AssertionError, match=r"was not written for this iiot\.db"):
            await Process(tmp_path).start()
        await terminal.run(restore)
        assert sorted(path.name for path in tmp_path.glob("iiot.db*")) == ["iiot.db", "iiot.db.lock"]
        assert (tmp_path / "iiot.db").stat().st_mode & 0o777 == 0o600
        await process.start()
        plant = process.plant(client, token)
        assert [value for _, value in await plant.points("press-1", "level")] == list(range(50))


async def test_the_service_s_backup_comes_back(machine: Path) -> None:
    """The page's own commands for the service; only systemd itself does not run here."""
    need("sqlite3")
    _, backup, enable, _, restore = blocks("Backup and restore", "sh")
    folder, backups = machine / "var/lib/iiot", machine / "var/backups/iiot"
    for path in folder.iterdir():
        path.unlink()
    process = Process(folder)
    await process.start()
    done_at(machine, backup)
    (made,) = backups.iterdir()
    assert backups.stat().st_mode & 0o777 == 0o700
    assert made.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}\.db", made.name)
    days = {name: time.time() - age * 86_400 for name, age in {"two.db": 2.5, "three.db": 3.5, "three.db.part": 3.5}.items()}
    for name, moment in days.items():
        (backups / name).touch()
        os.utime(backups / name, (moment, moment))
    await asyncio.sleep(1)
    program = backup.splitlines()[-1]
    done_at(machine, program)
    assert len(list(backups.iterdir())) == 3
    assert (backups / "two.db").exists()
    done_at(machine, enable)
    assert (machine / "etc/systemd/system/timers.target.wants/iiot-backup.timer").is_symlink()
    await process.stop(signal.SIGKILL)
    done_at(machine, restore.replace("2026-11-25-023000.db", made.name))
    assert sorted(path.name for path in folder.glob("iiot.db*")) == ["iiot.db", "iiot.db.lock"]
    assert (folder / "iiot.db").stat().st_mode & 0o777 == 0o600
    await process.start()
    assert await process.stop() == 0
    await asyncio.sleep(1)
    kept = set(backups.iterdir())
    with (folder / "iiot.db").open("r+b") as file:
        file.write(b"broken")
    assert run("bash", "-ec", as_root(program, machine), folder=machine).returncode != 0
    assert {path for path in backups.iterdir() if path.suffix == ".db"} == kept


async def test_a_stopped_server_s_file_alone_is_a_backup(process: Process, tmp_path: Path) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        await (await plant.device("press-1")).store({"values": {"level": 7}})
        assert await process.stop() == 0
        assert not (tmp_path / "iiot.db-wal").exists()
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(tmp_path / "iiot.db", tmp_path / "elsewhere")
        with closing(sqlite3.connect(tmp_path / "elsewhere" / "iiot.db")) as connection:
            assert connection.execute("select value from telemetry").fetchall() == [(7,)]
