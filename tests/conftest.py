"""Fixtures: a server of its own for every test that asks for one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import plant as plants
import pytest

import iiot

# How long an example takes says how busy the machine is: a time is never what fails a test.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take long, too: those that are marked so")
    parser.addoption("--kills", type=int, default=8, help="how often the server is killed under load (8)")
    parser.addoption("--relp-lines", type=int, default=5_000, help="how many lines rsyslogd sends through two kills (5000)")
    parser.addoption("--model-runs", type=int, default=10, help="how many runs of 25 steps the configuration model makes (10)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes many seconds, and is run by --long alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[plants.Plant]:
    """A running server with the limits of a real one."""
    async with plants.plant(tmp_path) as running:
        yield running


@pytest.fixture
async def same_day() -> None:
    """Quotas are counted by the day: a test that looks at them does not begin in its last seconds."""
    rest = iiot.DAY - iiot.now_ms() % iiot.DAY
    if rest < 2 * plants.PATIENCE * 1000:
        await asyncio.sleep(rest / 1000 + 1)


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[plants.Process]:
    """A server in a process of its own."""
    server = plants.Process(tmp_path)
    try:
        yield server
    finally:
        if server.url:
            await server.stop()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test is no passed one: where everything must have been installed, it fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
