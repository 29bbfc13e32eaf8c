"""Tenants below HTTP: whatever the store can be asked for one tenant holds no byte of another, and does not depend on another.

The reads are found by themselves. For a parameter that is new, say in ARGUMENTS what to give for it; for a read that is not
for one tenant, say in UNSCOPED what else keeps it from giving one tenant's data to another.
"""

from __future__ import annotations

import inspect
import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, NoReturn, cast

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from plant import Device, Plant

import iiot

START = 1_767_225_600_000  # 2026-01-01T00:00:00Z
LIMITS = iiot.Limits()
QUOTAS = iiot.default_quotas(iiot.Settings())
SHARED_DEVICES = ("press-1", "press-2")
SHARED_METRICS = ("note", "pressure")
PLACES = (
    "acknowledgement", "agent", "alert", "argument", "author", "code", "config", "device", "end", "error", "glob", "gone", "label", "log",
    "many", "message", "metric", "nothing", "output", "path", "reason", "receiver", "rule", "silence", "software", "state", "team",
    "telemetry", "viewer",
)  # fmt: skip


@attrs.define
class Side:
    """A tenant as it was loaded: its word stands in every text of it, its number in every reading, its address in all it did.
    Its quota and how often its devices sent are its own, too."""

    word: str
    number: float
    address: str
    quota: int
    samples: int
    id: int = 0
    first: str = ""  # the id of its first admin token, which the platform has seen
    ids: dict[str, str] = attrs.field(factory=dict)  # of its other tokens and keys: kind (dev, op or prov) by id

    @property
    def tenant(self) -> str:
        return f"tenant-of-{self.word}"

    def text(self, place: str) -> str:
        assert place in PLACES
        return f"{self.word}-{place}"

    @property
    def marks(self) -> list[bytes]:
        """What no other tenant may see, and the platform neither."""
        return [f"{self.word}-".encode(), str(self.number).encode(), self.address.encode(), *(mark.encode() for mark in self.ids)]

    @property
    def names(self) -> list[bytes]:
        """What no other tenant may see, but the platform gave it."""
        return [self.tenant.encode(), str(self.quota).encode(), self.first.encode()]

    @property
    def points(self) -> int:
        """That it stored in all, of three metrics on three devices."""
        return 9 * self.samples

    def know(self, token: str) -> str:
        """Note a token or key that was given out; it again."""
        _, kind, identifier, _ = token.split("_", 3)
        self.ids[identifier] = kind
        return token


async def load_device(plant: Plant, side: Side, name: str, device: Device) -> None:
    """Readings, states and configurations, equal in everything but the marks."""

    async def push(status: str, **verdict: Any) -> None:
        assert (await plant.ask("POST", f"/iiot/{name}?timeout=1h", {"mode": side.text("config")}))[0] == 202
        version = (await device.expect("config"))["version"]
        await tell("config_status", version=version, status=status, **verdict)

    async def tell(kind: str, **fields: Any) -> None:
        device.seq += 1
        await device.send(kind, seq=device.seq, **fields)
        await device.acknowledged(device.seq)

    values = {"pressure": side.number, "note": side.text("telemetry"), side.text("metric"): side.text("telemetry")}
    await device.store(*({"ts": START + n * 1_000, "values": values} for n in range(side.samples)))
    await tell("state", reported={"serial": side.text("state"), "software_version": side.text("software")})
    await tell("state", reported={"serial": side.text("state") * 2})
    told = {"level": "error", "message": f"{side.text('log')} {side.text('message')}", "logger": side.text("log")}
    await tell("log", entries=[told, {**told, "fields": {"place": side.text("log")}}])
    problem = {"path": side.text("path"), "code": side.text("code"), "message": side.text("error")}
    await push("rejected", message=side.text("message"), errors=[problem])
    await push("in_progress", message=side.text("message"))
    assert (await plant.ask("PATCH", f"/iiot/{name}", {"labels": {"line": side.text("label")}}))[0] == 200


async def load(plant: Plant, side: Side) -> None:
    """Everything that a tenant can have, by the doors that devices and people use."""
    viewer = {"name": side.text("viewer"), "role": "viewer", "expires_at": "2999-01-01T00:00:00Z"}
    for body in (viewer, {"name": side.text("author"), "role": "admin"}):
        status, made = await plant.ask("POST", "/tokens", body)
        assert status == 201
        token = side.know(made["token"])
    plant.token = token
    key = side.know((await plant.ask("POST", "/provisioning-keys", {"uses": 3}))[1]["key"])
    devices = {}
    for name in SHARED_DEVICES:
        side.know(await plant.register(name))
        devices[name] = await plant.device(name, agent=side.text("agent"))
    provisioned = await plant.connect()
    await provisioned.send("provision", key=key, device=side.text("device"))
    own = side.know((await provisioned.expect("credentials"))["token"])
    devices[side.text("device")] = await provisioned.hello(own, agent=side.text("agent"))
    for name, device in devices.items():
        await load_device(plant, side, name, device)

    matching = {"match": f"press-[{side.text('glob')}1]", "config": {"mode": side.text("config")}}
    steps: tuple[tuple[str, str, Any, int], ...] = (
        ("POST", "/iiot?timeout=1h", matching, 202),
        ("POST", "/iiot", {"match": f"{side.text('glob')}*", "config": {}}, 202),
        ("POST", "/iiot/press-2/config/rollback", {"version": 1}, 202),
        ("POST", "/iiot/press-1/report", {"what": "state"}, 202),
        ("PUT", f"/iiot/{side.text('gone')}", None, 201),
        ("DELETE", f"/iiot/{side.text('gone')}", None, 204),
        ("DELETE", f"/iiot/{side.text('nothing')}", None, 404),
        ("PUT", "/iiot/press-1", None, 409),
    )
    for method, path, body, expected in steps:
        status, answer = await plant.ask(method, path, body)
        assert status == expected, (path, answer)
        if status == 201:
            side.know(answer["token"])
    await load_alerts(plant, side)
    await load_commands(plant, side, devices["press-1"])
    side.know((await plant.ask("POST", "/iiot/press-2/token"))[1]["token"])
    side.know((await plant.ask("POST", "/iiot/press-1/log-token"))[1]["token"])
    assert (await plant.ask("PUT", "/iiot/press-1/syslog-source", {"addresses": [f"{side.address}/32"]}))[0] == 200


async def load_alerts(plant: Plant, side: Side) -> None:
    """A rule by which there is an alert of every device, one of them acknowledged, and a silence that holds them back."""
    rule = {
        "name": side.text("rule"), "metric": "pressure", "condition": {"above": 1}, "labels": {"team": side.text("team")},
        "text": side.text("alert"),
    }  # fmt: skip
    status, answer = await plant.ask("POST", "/rules", rule)
    assert status == 201, answer
    found = await plant.until("/alerts", lambda answer: len(answer["items"]) == len(SHARED_DEVICES) + 1)
    path = f"/alerts/{found['items'][0]['id']}/ack"
    assert (await plant.ask("POST", path, {"text": side.text("acknowledgement")}))[0] == 200
    receiver = {"name": side.text("receiver"), "url": "http://127.0.0.1:9/", "wait": "0s", "group_by": "label:team"}
    assert (await plant.ask("POST", "/webhooks", receiver))[0] == 201
    failed = await plant.until("/notifications", lambda answer: answer["items"] and answer["items"][0]["tries"])
    assert failed["items"][0]["status"] == "waiting"
    silence = {"match": f"[p{side.text('silence')}]*-1", "text": side.text("reason"), "until": "2999-01-01T00:00:00Z"}
    assert (await plant.ask("POST", "/silences", silence))[0] == 201


async def load_commands(plant: Plant, side: Side, device: Device) -> None:
    """Commands that are over and one that is not, of one device and for many."""

    async def tell(kind: str, **fields: Any) -> None:
        device.seq += 1
        await device.send(kind, seq=device.seq, command=number, **fields)
        await device.acknowledged(device.seq)

    one = {"argv": ["echo", side.text("argument")], "timeout": "1h"}
    many = {**one, "match": f"press-[{side.text('many')}1]", "per_minute": 1, "stop_after_failures": 2}
    for path, body, is_over in (("/iiot/press-1/commands", one, True), ("/commands", many, True), ("/iiot/press-1/commands", one, False)):
        status, answer = await plant.ask("POST", path, body)
        assert status == 202, answer
        number = (await device.expect("command"))["command"]
        await tell("started")
        await tell("output", stream="stdout", data=side.text("output"))
        if is_over:
            await tell("result", status="failed", message=side.text("end"))


@attrs.frozen
class World:
    """Two tenants alike, one more that was removed and is not yet deleted, and the database that has them all."""

    sides: tuple[Side, Side]
    removed: Side
    database: Path
    platform_token: str  # its id

    @property
    def all(self) -> tuple[Side, ...]:
        return (*self.sides, self.removed)

    def others(self, side: Side) -> tuple[Side, ...]:
        return tuple(other for other in self.all if other is not side)


@pytest.fixture
async def world(tmp_path: Path) -> World:
    sides = (
        Side("quartz", 13_579_111.25, "192.0.2.17", 1_357_911_131_517, 20),
        Side("basalt", 24_680_222.75, "198.51.100.23", 2_468_101_214_161, 23),
        Side("pumice", 97_531_333.5, "203.0.113.99", 9_753_119_753_117, 26),
    )
    quick = attrs.evolve(LIMITS, settle_seconds=0.1)  # what came is judged at once
    async with plants.plant(tmp_path, quick, trusted_proxy="127.0.0.1/32", webhook_networks="127.0.0.0/8") as plant:
        platform = plants.admin_token(plant.database, "platform")
        for side in sides:
            status, made = await plant.ask("POST", "/tenants", {"name": side.tenant, "quotas": {"devices": side.quota}}, token=platform)
            assert status == 201
            side.first = made["token"].split("_")[2]
            async with ClientSession(headers={"X-Forwarded-For": side.address}) as client:
                await load(Plant(plant.url, client, made["token"], plant.database), side)
    with closing(iiot.connect(plant.database)) as connection, iiot.transaction(connection):
        for side in sides:
            side.id = iiot.tenant_id_of(connection, side.tenant)
        iiot.remove_tenant(connection, sides[2].tenant)
    return World(sides[:2], sides[2], plant.database, platform.split("_")[2])


@asynccontextmanager
async def store_of(database: Path) -> AsyncIterator[iiot.Store]:
    """The store, with a device of every tenant connected, as far as it knows."""

    def connect(connection: Any) -> None:
        connection.execute("update presence set connected = 1 where device_id in (select id from device where name = 'press-1')")
        connection.execute("delete from notice where alert_id in (select max(alert_id) from notice group by webhook_id)")  # it is new then

    async with iiot.Store.open(database, LIMITS) as store:
        await store.writer.change(connect)
        yield store


# What to ask for one side of the world: by name and type of the parameter, every value that is tried.
Asked = Callable[[World, Side], tuple[object, ...]]


def asked_devices(world: World, side: Side) -> tuple[object, ...]:
    return (*SHARED_DEVICES, *(each.text("device") for each in world.all), "nobody")


def asked_points(world: World, side: Side) -> tuple[object, ...]:
    """Not by the metrics that others alone have: the answer repeats those it was asked for."""
    some = (*SHARED_METRICS, side.text("metric"))
    return tuple(iiot.TelemetryRange(metrics, 0, iiot.LATEST, down) for metrics in (None, some) for down in (False, True))


def asked_fleet(world: World, side: Side) -> tuple[object, ...]:
    some = (*SHARED_METRICS, side.text("metric"))
    everything = iiot.FleetRange(None, None, 0, iiot.LATEST, None, ("last",))
    return tuple(
        attrs.evolve(everything, match=match, devices=devices, metrics=metrics, every=every)
        for match, devices in (
            (None, None), ("*", None), *((f"{each.word}*", None) for each in world.all),
            (None, (*SHARED_DEVICES, *(each.text("device") for each in world.all))),
        )
        for metrics in (None, some)
        for every in (None, 60_000)
    )


def asked_lines(world: World, side: Side) -> tuple[object, ...]:
    everything = iiot.LogFilter(None, None, "debug", None, 0, iiot.LATEST)
    devices = [*SHARED_DEVICES, *(each.text(place) for each in world.all for place in ("device", "gone", "nothing"))]
    searches = ["log", "NOT nothing", "og OR lo*", *(each.word for each in world.all), *(f'"{each.word} log"' for each in world.all)]
    return (
        everything,
        *(attrs.evolve(everything, device=device) for device in devices),
        *(attrs.evolve(everything, match=match) for match in ("*", *(f"{each.word}*" for each in world.all))),
        *(attrs.evolve(everything, search=iiot.parse_search(search, LIMITS)) for search in searches),
        attrs.evolve(everything, level="error", search=iiot.parse_search("log", LIMITS)),
        attrs.evolve(everything, start=1),
    )


def asked_entries(world: World, side: Side) -> tuple[object, ...]:
    actors = [name for each in world.all for name in (each.text("author"), each.first, *each.ids)]
    devices = [*SHARED_DEVICES, *(each.text(place) for each in world.all for place in ("device", "gone", "nothing"))]
    everything = iiot.AuditFilter(None, None, None, 0, iiot.LATEST)
    return (
        everything,
        attrs.evolve(everything, actions=("config.push", "device.provision", "tenant.create", "token.create")),
        *(attrs.evolve(everything, actor=actor) for actor in actors),
        *(attrs.evolve(everything, device=device) for device in devices),
        attrs.evolve(everything, start=1),
        attrs.evolve(everything, stop=iiot.LATEST - 1),
        *(attrs.evolve(everything, actor=actor, actions=("config.push",), device="press-1", start=1) for actor in actors),
        *(attrs.evolve(everything, actor=actor, actions=("config.push", "device.report")) for actor in actors),
        attrs.evolve(everything, actions=(*map(str, range(iiot.ACTIONS_MOST)), "config.push")),
    )


def asked_alerts(world: World, side: Side) -> tuple[object, ...]:
    everything = iiot.AlertFilter()
    return (
        everything,
        *(attrs.evolve(everything, rule=each.text("rule")) for each in world.all),
        *(attrs.evolve(everything, match=match) for match in ("*", *(f"{each.word}*" for each in world.all))),
        *(attrs.evolve(everything, acknowledged=asked) for asked in (True, False)),
        *(attrs.evolve(everything, silenced=asked) for asked in (True, False)),
        *(attrs.evolve(everything, alert_id=number) for number in range(1, 20)),
        attrs.evolve(everything, statuses=("firing",), severities=("warning",), start=1),
    )


def asked_groups(world: World, side: Side) -> tuple[object, ...]:
    """Of receivers of all."""
    due = iiot.DueGroup(1, "", 0, None, side.id, "webhook", "rule", 1, 1)
    return tuple(attrs.evolve(due, webhook_id=number, key=each.text("team")) for number, each in enumerate(world.all, 1))


def the_same(*values: object) -> Asked:
    return lambda world, side: values


ARGUMENTS: Mapping[str, Asked] = {
    "document_id: int": the_same(*range(1, 20)),
    "tenant: int": lambda world, side: (side.id,),
    "tenant: int | None": lambda world, side: (side.id,),
    "device: str": asked_devices,
    "name: str": asked_devices,
    "metric: str": lambda world, side: (*SHARED_METRICS, side.text("metric")),
    "wanted: TelemetryRange": asked_points,
    "wanted: FleetRange": asked_fleet,
    "after: tuple[int, str]": the_same((iiot.ATTENTION_MOST, "")),
    "series: list[tuple[int, int]]": the_same([(number, 0) for number in range(1, 100)]),
    "match: str": lambda world, side: ("*", *(f"{each.word}*" for each in world.all)),
    "names: tuple[str, ...]": the_same((), ("time", "device", "metric", "value")),
    "wanted: AuditFilter": asked_entries,
    "wanted: LogFilter": asked_lines,
    "wanted: AlertFilter": asked_alerts,
    "webhook_id: int": the_same(*range(1, 5)),
    "webhook_id: int | None": the_same(None, *range(1, 5)),
    "status: str | None": the_same(None, "waiting", "delivered"),
    "group: DueGroup": asked_groups,
    "shown: int": the_same(100),
    "seconds: float": the_same(2.0),
    "rule_id: int": the_same(*range(1, 5)),
    "devices: list[str]": lambda world, side: ([*SHARED_DEVICES, *(each.text("device") for each in world.all)],),
    "above: int": the_same(0),
    "upto: int": the_same(iiot.INTEGERS - 1),
    "metrics: tuple[str, ...] | None": lambda world, side: (None, (*SHARED_METRICS, side.text("metric"))),
    "since: int": the_same(0, 1),
    "after: tuple[str, str]": the_same(("", ""), ("press-1", ""), ("press-1", "pressure")),
    "default: int": the_same(30),
    "cuts: Mapping[int, int]": lambda world, side: ({side.id: 0},),
    "most: int": the_same(10, 1_000),
    "before: int": the_same(0),
    "limit: int": the_same(1_000, 1),
    "after: str": the_same(""),
    "after: int": the_same(0, iiot.INTEGERS - 1),
    "match: str | None": lambda world, side: (None, "*", *(f"{each.word}*" for each in world.all)),
    "connected: bool | None": the_same(None, True, False),
    "number: int": the_same(*range(1, 13)),
    "statuses: tuple[str, ...]": the_same((), ("running", "failed")),
    "kinds: tuple[str, ...] | None": the_same(None, ("connected", "disconnected", "credentials", "state", "config")),
    "start: int": the_same(0, 1),
    "stop: int": the_same(iiot.LATEST, iiot.LATEST - 1),
    "at: int | None": the_same(None, iiot.LATEST),
    "version: int": the_same(1, 2, 3),
    "version: int | None": the_same(None, 1, 2),
    "every: int": the_same(1_000, iiot.DAY),
    "aggregates: tuple[str, ...]": the_same(iiot.AGGREGATES),
    "defaults: Mapping[str, int]": the_same(QUOTAS),
    "rows: list[Pushed]": the_same([iiot.Pushed(number, "", 1) for number in range(1, 30)]),  # devices of all
}

# Reads of one tenant whose answer is but numbers.
NUMBERS_ALONE = {
    "NotificationReads.notifications", "Reads.device_id", "Reads.last_event", "Reads.summary", "LogReads.days", "AlertReads.last_line",
}  # fmt: skip

Read = Callable[..., Awaitable[object]]


async def check_token(world: World, read: Read, kind: str) -> None:
    """Identity asks by the id that a peer shows, before it is known whose it is; the caller checks the secret. The answer is of
    the tenant that has the token, and a removed tenant has none."""
    for side in world.sides:
        checked = 0
        for identifier, its_kind in {**side.ids, side.first: "op"}.items():
            known: Any = await read(identifier)
            if known is None:  # of another kind, or of a device that was removed
                continue
            assert its_kind == kind
            assert known.tenant_id == side.id
            if kind == "dev":
                assert known.points_of_day in (side.points, 0)  # 0 when a new day began meanwhile
            assert found([mark for other in world.others(side) for mark in other.marks + other.names], known) == []
            checked += 1
        assert checked == {"dev": 4, "op": 3, "prov": 1, "log": 1}[kind]
    for identifier in (*world.removed.ids, world.removed.first):
        assert await read(identifier) is None


async def check_tenants(world: World, read: Read) -> None:
    """For the platform alone, which knows the tenants by name and how much they use, and sees inside none."""
    answer = await read(1_000, "", QUOTAS)
    assert found([mark for side in world.all for mark in side.marks], answer) == []
    assert [side.word for side in world.all if found([side.tenant.encode()], answer)] == ["quartz", "basalt"], "a removed one is none"
    assert {route.role for route in iiot.ROUTES if "list_tenants" in route.handler.__name__} == {"platform"}


async def check_removed(world: World, read: Read) -> None:
    """For the cleaner: numbers of tenants and of their devices, which nobody sees."""
    removed = await read(LIMITS)
    assert isinstance(removed, iiot.Removed)
    assert removed.tenants == [world.removed.id]
    with closing(iiot.connect(world.database)) as connection:
        theirs = {row[0] for row in connection.execute("select id from device where tenant_id = ?", (world.removed.id,))}
    assert set(removed.devices) == theirs != set()


async def check_newest(world: World, read: Read) -> None:
    """For the task that tells what happened: one number, which nobody sees."""
    assert isinstance(await read(), int)


async def check_sources(world: World, read: Read) -> None:
    """For the listeners of syslog: each network says whose it is, and no two are one."""
    sources: Any = await read()
    assert {device.tenant_id for _, device in sources} == {side.id for side in world.sides}
    assert len({network for network, _ in sources}) == len(sources)


async def check_cuts(world: World, read: Read) -> None:
    """For the task that deletes what is too old: a time for each tenant, by its number."""
    cuts: Any = await read(30)
    assert {side.id for side in world.sides} <= cuts.keys()


async def check_old(world: World, read: Read) -> None:
    """For the same task."""
    assert await read({side.id: 0 for side in world.all}) is False
    assert await read({side.id: iiot.LATEST for side in world.sides}) is True


async def check_repeats(world: World, read: Read) -> None:
    """For the same task: whether there are some, of anybody."""
    assert await read(0) is False


async def check_told_later(world: World, read: Read) -> None:
    """For the task that tells: whether there is a group of anybody that waits."""
    assert await read() in (True, False)


async def check_commands(world: World, read: Read) -> None:
    """For the task that goes on with them: whether the time of one of anybody has come."""
    assert await read() in (True, False)


async def check_words(world: World, read: Read) -> None:
    """For the same task: numbers, which nobody sees."""
    words, after = cast("tuple[list[int], int]", await read(0, 10))
    assert all(type(number) is int for number in (*words, after))


async def check_news(world: World, read: Read) -> None:
    """For the same task: each event says whose it is, and is told to nobody else."""
    events: Any = await read(0, 10_000)
    assert events
    for tenant, _, _, text in events:
        (side,) = (side for side in world.all if side.id == tenant)
        assert found([mark for other in world.others(side) for mark in other.marks], text) == []


async def check_range_left(world: World, read: Read) -> None:
    """For who has just marked them: whether they are still there."""
    assert await read([1, 2, 3]) is False


async def check_pushes(world: World, read: Read) -> None:
    """For the task that makes pushes: numbers of tenants, which nobody sees."""
    assert await read() == []


async def check_push(world: World, read: Read) -> None:
    """For who has just begun one: whether it is made."""
    assert await read(1) is False


async def check_watchers(world: World, read: Read) -> None:
    """For the task that finds out who is told: each receiver says whose it is."""
    found: Any = await read()
    assert {watcher.tenant_id for watcher in found} == {side.id for side in world.sides}


async def check_groups(world: World, read: Read) -> None:
    """For the same task: each group says whose it is."""
    groups, _ = cast("tuple[list[iiot.DueGroup], int | None]", await read(100, 10))
    assert {group.tenant_id for group in groups} <= {side.id for side in world.sides}


async def check_deliveries(world: World, read: Read) -> None:
    """For the task that delivers: what is sent to a receiver is of its tenant alone."""
    due, _ = cast("tuple[list[iiot.Undelivered], int | None]", await read([], 0, 100))
    with closing(iiot.connect(world.database)) as connection:
        owners = dict(connection.execute("select id, tenant_id from webhook"))
    for each in due:
        (side,) = (side for side in world.sides if side.id == owners[each.receiver.webhook_id])
        assert found(side.marks, each.body) != []
        assert found([mark for other in world.others(side) for mark in other.marks + other.names], each.body) == []
    assert len(due) == len(world.sides)


async def check_waiting(world: World, read: Read) -> None:
    """For who scrapes the server: one number."""
    assert isinstance(await read(), int)


async def check_health(world: World, read: Read) -> None:
    """Whether the store can write, of the process as a whole."""
    assert await read(LIMITS) is True


# Reads that are not for one tenant, each with what must hold instead.
UNSCOPED: Mapping[str, Callable[[World, Read], Awaitable[None]]] = {
    "TokenReads.device": lambda world, read: check_token(world, read, "dev"),
    "TokenReads.operator": lambda world, read: check_token(world, read, "op"),
    "TokenReads.log_sender": lambda world, read: check_token(world, read, "log"),
    "TokenReads.log_sources": check_sources,
    "TokenReads.provisioning_key": lambda world, read: check_token(world, read, "prov"),
    "AccountReads.tenants": check_tenants,
    "RemovalReads.removed": check_removed,
    "NewsReads.newest": check_newest,
    "NewsReads.highest": check_newest,
    "NewsReads.after": check_news,
    "LogReads.newest": check_newest,
    "RemovalReads.newest_moment": check_newest,
    "LogReads.cuts": check_cuts,
    "LogReads.has_old": check_old,
    "LogReads.unused_words": check_words,
    "LogReads.has_old_repeats": check_repeats,
    "RemovalReads.is_range_left": check_range_left,
    "PushReads.tenants": check_pushes,
    "PushReads.is_under_way": check_push,
    "CommandReads.is_due": check_commands,
    "CommandReads.has_old": check_repeats,
    "NotificationReads.has_old": check_repeats,
    "NotificationReads.is_told_later": check_told_later,
    "NotificationReads.watchers": check_watchers,
    "NotificationReads.due_groups": check_groups,
    "NotificationReads.to_deliver": check_deliveries,
    "NotificationReads.waiting": check_waiting,
    "Store.healthy": check_health,
}

NOT_READS = {"Store.open", "Store.keep_log_short", "Store.renew_salt", "Store.sizes", "Store.allowances", "Store.writer"}


def reads_of(owner: object, seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Read]]:
    """Every public method of an object, and of every object of this project that it holds in public."""
    for name, value in inspect.getmembers(owner):
        title = f"{type(owner).__name__}.{name}"
        if name.startswith("_") or title in NOT_READS or id(value) in seen:
            continue
        if inspect.iscoroutinefunction(value):
            yield title, value
        elif callable(value):
            pytest.fail(f"{title} is no coroutine, as reads are; if it reads, let this test call it, if not, name it in NOT_READS")
        elif type(value).__module__ == iiot.__name__:
            yield from reads_of(value, seen | {id(owner)})


def unknown_parameter(title: str, parameter: str) -> NoReturn:
    pytest.fail(f"{title} takes {parameter!r}: say in ARGUMENTS of {Path(__file__).name} what to give for it")


def calls(title: str, read: Read, world: World, side: Side, **fixed: object) -> Iterator[tuple[dict[str, object], Read]]:
    """Every combination of arguments for a side. A read that is for no tenant must be among UNSCOPED."""
    parameters = inspect.signature(read).parameters
    if "tenant" not in parameters:
        pytest.fail(f"{title} is asked without a tenant: say in UNSCOPED of {Path(__file__).name} what makes that right, and check it")
    values: list[tuple[object, ...]] = []
    for name, parameter in parameters.items():
        asked = ARGUMENTS.get(f"{name}: {parameter.annotation}") or unknown_parameter(title, f"{name}: {parameter.annotation}")
        values.append((fixed[name],) if name in fixed else asked(world, side))
    for combination in itertools.product(*values):
        chosen = dict(zip(parameters, combination, strict=True))

        async def call(chosen: dict[str, object] = chosen) -> object:
            positional = [value for name, value in chosen.items() if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY]
            named = {name: value for name, value in chosen.items() if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY}
            return await read(*positional, **named)

        yield chosen, call


def content(answer: object) -> bytes:
    """Every byte of an answer."""
    match answer:
        case bytes():
            return answer
        case str():
            return answer.encode()
        case list() | tuple():
            return b"\n".join(map(content, answer))
        case dict():
            return content([*answer.keys(), *answer.values()])
        case int() | float() | None:
            return repr(answer).encode()
        case _:
            assert attrs.has(type(answer)), f"cannot look into {answer!r}"
            return content(attrs.astuple(answer))  # type: ignore[arg-type]


def found(marks: list[bytes], answer: object) -> list[bytes]:
    text = content(answer)
    return [mark for mark in marks if mark in text]


async def ask_everything(store: iiot.Store, world: World, side: Side) -> AsyncIterator[tuple[str, dict[str, object], object]]:
    """The answers to every read for one tenant, with all arguments that are tried."""
    for title, read in reads_of(store):
        if title not in UNSCOPED:
            for arguments, call in calls(title, read, world, side):
                yield title, arguments, await call()


@pytest.mark.parametrize("which", [0, 1])
async def test_no_read_for_one_tenant_holds_a_byte_of_another(world: World, which: int) -> None:
    side = world.sides[which]
    foreign = [mark for other in world.others(side) for mark in other.marks + other.names] + [world.platform_token.encode()]
    titles, with_content, seen = set(), set(), b""
    async with store_of(world.database) as store:
        async for title, arguments, answer in ask_everything(store, world, side):
            assert found(foreign, answer) == [], f"{title} for {side.word}, asked {arguments}"
            titles.add(title)
            if found(side.marks + side.names, answer):
                with_content.add(title)
                seen += content(answer)
    assert titles - with_content == NUMBERS_ALONE, "a read that was to hold its own tenant's data held none, or one of a number holds more"
    assert [place for place in PLACES if side.text(place).encode() not in seen] == [], "loaded, and never read"
    own = [str(side.number), str(side.quota), side.address, *list(side.ids)[:6]]  # the last are of a device that was removed
    assert [mark for mark in own if mark.encode() not in seen] == [], "loaded, and never read"


@pytest.mark.parametrize("which", [0, 1])
async def test_what_is_read_for_one_tenant_is_the_same_without_the_others(world: World, which: int, tmp_path: Path) -> None:
    """For what has no marks: numbers of rows, sums, what is used of a quota."""
    side = world.sides[which]
    alone = tmp_path / "alone.db"
    shutil.copy(world.database, alone)
    with closing(iiot.connect(alone)) as connection, iiot.transaction(connection):
        iiot.remove_tenant(connection, world.sides[1 - which].tenant)
        asked = {"most": 20, **iiot.removal_times(iiot.Limits())}
        while removed := iiot.Removed.of(connection.execute(iiot.REMOVED_SQL, asked).fetchone()):
            iiot.delete_removed(connection, removed, LIMITS)
        kept = {row[0] for row in connection.execute("select distinct tenant_id from device union select id from tenant where id <> 1")}
        assert kept == {side.id}
    async with store_of(world.database) as beside:
        beside_others = [step async for step in ask_everything(beside, world, side)]
    async with store_of(alone) as by_itself:
        without_others = [step async for step in ask_everything(by_itself, world, side)]
    for one, other in zip(beside_others, without_others, strict=True):
        assert one == other, f"{one[0]} for {side.word}, asked {one[1]}"


async def test_the_platform_sees_tenants_by_name_and_inside_none(world: World) -> None:
    marks = [mark for side in world.all for mark in side.marks]
    seen = b""
    async with store_of(world.database) as store:
        for title, read in reads_of(store):
            tenant = inspect.signature(read).parameters.get("tenant")
            if title in UNSCOPED or tenant is None or "None" not in str(tenant.annotation):
                continue
            for arguments, call in calls(title, read, world, world.sides[0], tenant=None):
                answer = await call()
                assert found(marks, answer) == [], f"{title} for the platform, asked {arguments}"
                seen += content(answer)
    expected = [world.platform_token.encode(), *(name for side in world.all for name in side.names)]
    assert [mark for mark in expected if mark not in seen] == []


async def test_reads_that_are_for_no_tenant_give_no_tenant_anything_of_another(world: World) -> None:
    checked = set()
    async with store_of(world.database) as store:
        for title, read in reads_of(store):
            if title in UNSCOPED:
                await UNSCOPED[title](world, read)
                checked.add(title)
    assert checked == set(UNSCOPED), "a read that is there no more"
