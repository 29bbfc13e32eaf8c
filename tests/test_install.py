"""The program as pip installs it, away from its source tree."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import venv
from pathlib import Path

import pytest
from plant import ROOT

import iiot

SEPARATE = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
SOURCES = ("iiot.py", "agent.py", "schema.sql", "dashboard.html", "pyproject.toml", "README.md", "LICENSE")


def separate() -> dict[str, str]:
    """The variables, without those by which Python would find the tests' own environment."""
    return {name: value for name, value in os.environ.items() if name not in SEPARATE}


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=separate(), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment into which a copy of the source tree was installed."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    outcome = run(*pip, "install", source, folder=folder)
    if outcome.returncode != 0:
        probe = run(*pip, "download", "--no-deps", "--dest", folder / "probe", "attrs", folder=folder)
        if probe.returncode != 0:
            pytest.skip("the package index cannot be reached")
    assert outcome.returncode == 0, outcome.stderr
    shutil.rmtree(source)
    return programs


@pytest.mark.long
def test_the_installed_program_starts_with_a_new_database(installed: Path, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [installed / "iiot", "--port", "0"], cwd=tmp_path, env=separate(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+\n", line), server.communicate(timeout=20)[1]
        minted = run(installed / "iiot", "token", "--role", "viewer", folder=tmp_path)
        assert minted.returncode == 0, minted.stderr
        assert minted.stdout.startswith("iiot_op_")
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            out, err = server.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            raise
    assert server.returncode == 0
    assert "Traceback" not in err
    assert f"\n  {installed / 'iiot-agent'} --url http://127.0.0.1:" in out


@pytest.mark.long
def test_the_installed_module_is_not_the_source_tree(installed: Path, tmp_path: Path) -> None:
    shown = "import iiot; print(iiot.__file__); print(len(iiot.schema_text())); print(iiot.Page.read().tag)"
    where = run(installed / "python", "-c", shown, folder=tmp_path)
    assert where.returncode == 0, where.stderr
    module, characters, tag = where.stdout.split()
    assert tag == getattr(iiot.Page.read(), "tag", None)
    assert Path(module).is_relative_to(installed.parent)
    assert int(characters) == len((ROOT / "schema.sql").read_text(encoding="utf-8"))


@pytest.mark.long
def test_the_installed_distribution_knows_its_version_and_its_program(installed: Path, tmp_path: Path) -> None:
    version = run(installed / "iiot", "--version", folder=tmp_path)
    said = run(installed / "python", "-c", "from importlib.metadata import version; print(version('iiot'))", folder=tmp_path)
    assert version.stdout == said.stdout != ""
    assert run(installed / "iiot-agent", "--version", folder=tmp_path).stdout == version.stdout
