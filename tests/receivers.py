"""What the tests of notifications work with: receivers that keep what they are sent, and alerts as the judge of rules writes them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import web
from plant import PATIENCE, Plant

import iiot

LOCAL = "127.0.0.0/8"  # where receivers of tests are
Answer = Callable[["Post"], Awaitable[web.StreamResponse]]


@attrs.frozen
class Post:
    """What a receiver was sent, by which method to which path, and when."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def devices(self) -> dict[str, str]:
        """The status of each device that it tells of."""
        return {alert["labels"]["device"]: alert["status"] for alert in self.json["alerts"]}


class Receiver:
    """An HTTP server that keeps what it is sent. `answers` are used up first, each a status or a function of its own; then it is 200."""

    def __init__(self) -> None:
        self.url = ""
        self.posts: list[Post] = []
        self.answers: list[int | Answer] = []
        self._came = asyncio.Event()
        self._read = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        post = Post(request.method, request.path_qs, dict(request.headers), await request.read(), asyncio.get_running_loop().time())
        self.posts.append(post)
        self._came.set()
        answer = self.answers.pop(0) if self.answers else 200
        return web.Response(status=answer) if isinstance(answer, int) else await answer(post)

    async def next(self, seconds: float = PATIENCE) -> Post:
        """The next one that was not asked for yet."""
        async with asyncio.timeout(seconds):
            while len(self.posts) <= self._read:
                self._came.clear()
                await self._came.wait()
        self._read += 1
        return self.posts[self._read - 1]

    @property
    def unread(self) -> int:
        return len(self.posts) - self._read


@asynccontextmanager
async def receiver(port: int = 0) -> AsyncIterator[Receiver]:
    made = Receiver()
    server = web.Server(made.handle)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()


class Alerts:
    """Writes alerts as the judge of rules does, and rings."""

    def __init__(self, store: iiot.Store) -> None:
        self.store = store

    async def change(self, sql: str, *parameters: object) -> None:
        await self.store.writer.change(lambda connection: connection.execute(sql, parameters).close())
        self.store.writer.alert_news.ring()

    async def fire(
        self, rule: str, *devices: str, severity: str = "critical", kind: str = "above", catching_up: bool = False, tenant: int = 1,
        text: str = "", value: object = None, labels: dict[str, str] | None = None, metric: str | None = "temperature",
    ) -> None:  # fmt: skip
        """An alert of a rule for each of these devices."""
        now = iiot.now_ms()

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute(
                """insert into alert (id, tenant_id, device_id, rule_id, rule, kind, severity, labels, metric, text, value, since, fired_at,
                       catching_up, changed_at)
                   select (select coalesce(max(id), 0) from alert) + row_number() over (order by device.id), :tenant, device.id, :rule_id,
                       :rule, :kind, :severity, :labels, :metric, case when :text = '' then device.name || ' is hot' else :text end,
                       :value, :now - 1000, :now, :catching_up, :now
                   from device where tenant_id = :tenant and name in (select value from json_each(:devices)) order by device.id""",
                {
                    "tenant": tenant, "rule_id": sum(map(ord, rule)), "rule": rule, "kind": kind, "severity": severity, "metric": metric,
                    "labels": json.dumps(labels or {}), "text": text, "value": value, "now": now, "catching_up": catching_up,
                    "devices": json.dumps(devices),
                },
            )  # fmt: skip

        await self.store.writer.change(insert)
        self.store.writer.alert_news.ring()

    async def resolve(self, rule: str, *devices: str, reason: str = "cleared") -> None:
        await self.change(
            """update alert set resolved_at = ?, reason = ? where rule = ? and resolved_at is null
               and device_id in (select id from device where name in (select value from json_each(?)))""",
            iiot.now_ms(), reason, rule, json.dumps(devices),
        )  # fmt: skip

    async def acknowledge(self, rule: str, **said: object) -> None:
        text = json.dumps({"by": "me", "at": 1, "until": None, **said})
        await self.change("update alert set acknowledged = ? where rule = ?", text, rule)

    async def silence(self, match: str, seconds: float = 3_600.0) -> None:
        now = iiot.now_ms()
        await self.change(
            """insert into silence (tenant_id, match, labels, rule, created_at, until, author, text)
               values (1, ?, '{}', null, ?, ?, 'me', '')""",
            match, now, now + round(seconds * 1000),
        )  # fmt: skip


@asynccontextmanager
async def alerting(folder: Path, limits: iiot.Limits | None = None, **settings: Any) -> AsyncIterator[tuple[Plant, Alerts]]:
    """A server that may reach receivers of tests, and who writes alerts into it."""
    opened, real = list[iiot.Store](), iiot.Store.open

    @asynccontextmanager
    async def noted(*arguments: Any) -> AsyncIterator[iiot.Store]:
        async with real(*arguments) as store:
            opened.append(store)
            yield store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iiot.Store, "open", noted)
        async with plants.plant(folder, limits, **{"webhook_networks": LOCAL, **settings}) as plant:
            yield plant, Alerts(opened[0])


async def told_to(plant: Plant, url: str, **fields: Any) -> dict[str, Any]:
    """A new receiver of the tenant, as it was answered."""
    status, body = await plant.ask("POST", "/webhooks", {"url": url, "wait": "0s", "interval": "1ms", **fields})
    assert status == 201, body
    made: dict[str, Any] = body
    return made
