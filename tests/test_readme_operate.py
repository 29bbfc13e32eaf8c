"""Part 5 of the README: the service, the first secrets, backup and restore, an update; each command as it is written."""

from __future__ import annotations

import getpass
import grp
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import attrs
import pytest
from aiohttp import ClientSession
from plant import ROOT, Process
from readme import Terminal, blocks
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


def as_root(line: str, root: Path) -> str:
    """A line of the page with a folder in the place of the machine's own, and this user in the place of the service's."""
    user, group = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
    line = line.replace("-o iiot -g iiot", f"-o {user} -g {group}").replace("sudo -u iiot ", "")
    line = line.replace("sudo useradd ", f"{'' if os.geteuid() == 0 else 'sudo '}useradd --prefix {root} ")
    line = line.replace("sudo systemctl enable --now ", f"systemctl --root={root} enable ").replace("sudo ", "")
    return re.sub(r"(?<![\w/])(?=/(opt|var|etc)/)", str(root), line)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine on which the service was installed by the page's own commands; only systemd itself does not run there."""
    need("useradd", "systemctl", "systemd-analyze")
    root = tmp_path_factory.mktemp("machine")
    for folder in ("etc/systemd/system", "etc/iiot", "opt", "var/lib"):
        (root / folder).mkdir(parents=True)
    for name in ("passwd", "group", "shadow", "gshadow"):
        (root / "etc" / name).touch()
    source = copy_sources(root / "source")
    install, enable = (text for text in blocks("Service (systemd)", "sh")[:2])
    for line in install.splitlines():
        done = run("bash", "-c", as_root(line, root), folder=source)
        assert done.returncode == 0, (line, done.stderr)
    (unit,) = blocks("Service (systemd)", "ini")
    (root / "etc/systemd/system/iiot.service").write_text(unit)
    done = run("bash", "-c", as_root(enable, root), folder=source)
    assert done.returncode == 0, done.stderr
    return root


def test_the_service_is_installed_as_the_page_says(machine: Path) -> None:
    assert (machine / "etc/passwd").read_text().startswith("iiot:x:")
    assert (machine / "var/lib/iiot").stat().st_mode & 0o777 == 0o700
    assert (machine / "etc/systemd/system/multi-user.target.wants/iiot.service").is_symlink()
    version = run(machine / "opt/iiot/bin/iiot", "--version", folder=machine)
    assert version.stdout == f"{iiot.VERSION}\n"


def test_the_unit_is_right(machine: Path, tmp_path: Path) -> None:
    """As systemd reads it; the program is where this test installed it."""
    (unit,) = blocks("Service (systemd)", "ini")
    path = tmp_path / "iiot.service"
    path.write_text(unit.replace("/opt/iiot", str(machine / "opt/iiot")))
    done = run("systemd-analyze", "verify", "--man=no", path, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(path.read_text().replace("ProtectSystem=", "ProtectSystems="))
    assert "ProtectSystems" in run("systemd-analyze", "verify", "--man=no", path, folder=tmp_path).stderr


def test_the_first_start_by_hand_and_new_secrets(machine: Path) -> None:
    first, minted, journal = blocks("First-start secrets and the journal")
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


def test_an_update(machine: Path) -> None:
    install, restart = blocks("Update")[0].splitlines()
    done = run("bash", "-c", as_root(install, machine), folder=machine / "source")
    assert done.returncode == 0, done.stderr
    assert restart == "sudo systemctl restart iiot"


def test_the_install_lines_with_and_without_internet(tmp_path: Path) -> None:
    line, pack, unpack = blocks("Install")
    source = copy_sources(tmp_path / "source")
    for text in (line, pack):
        done = run("bash", "-c", text, folder=source)
        assert done.returncode == 0, done.stderr
    there = copy_sources(tmp_path / "there")
    shutil.copytree(source / "packages", there / "packages")
    done = run("bash", "-c", unpack, folder=there)
    assert done.returncode == 0, done.stderr
    for folder in (source, there):
        assert run(folder / ".venv/bin/python", "iiot.py", "--version", folder=folder).stdout == f"{iiot.VERSION}\n"
    assert run(there / ".venv/bin/iiot", "--version", folder=tmp_path).stdout == f"{iiot.VERSION}\n"


async def test_a_backup_is_whole_and_comes_back(process: Process, tmp_path: Path) -> None:
    """Made beside a running server; restored after the server was killed, which leaves a log that belongs to the old file."""
    need("sqlite3")
    backup, _, restore, _ = blocks("Backup and restore")
    terminal = Terminal(tmp_path)
    await process.start()
    token, _ = await process.read_first_start()
    async with ClientSession() as client:
        plant = process.plant(client, token)
        device = await plant.device("press-1")
        for value in range(50):
            await device.store({"values": {"level": value}})
        await terminal.run(backup)
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
    _, backup, _, restore = (as_root(text, machine) for text in blocks("Backup and restore"))
    (machine / "var/backups").mkdir()
    folder = machine / "var/lib/iiot"
    for path in folder.iterdir():
        path.unlink()
    process = Process(folder)
    await process.start()
    done = run("bash", "-ec", backup, folder=machine)
    assert done.returncode == 0, done.stderr
    (made,) = (machine / "var/backups/iiot").iterdir()
    assert (machine / "var/backups/iiot").stat().st_mode & 0o777 == 0o700
    await process.stop(signal.SIGKILL)
    lines = [line for line in restore.splitlines() if "systemctl" not in line]
    assert len(lines) == len(restore.splitlines()) - 2
    done = run("bash", "-ec", "\n".join(lines).replace("2026-11-25.db", made.name), folder=machine)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.glob("iiot.db*")) == ["iiot.db", "iiot.db.lock"]
    assert (folder / "iiot.db").stat().st_mode & 0o777 == 0o600
    await process.start()
    assert await process.stop() == 0


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
