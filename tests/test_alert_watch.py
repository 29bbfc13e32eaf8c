"""The watch over alerts by itself: what is told of a device piece by piece is judged as if it were judged at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

import iiot

LIMITS = attrs.evolve(iiot.Limits(), replay_readings=3)
CODEC = iiot.Codec(LIMITS)
START = 1_790_000_000_000
SECOND = 1_000
Reading = tuple[int, iiot.Value]
Seen = tuple[int, int | None, int | None]


@given(st.text("ab*?[]^-é", max_size=8), st.lists(st.text("ab*?[]^-é", max_size=5), max_size=8))
def test_a_glob_matches_what_the_database_says(glob: str, names: list[str]) -> None:
    pattern = iiot.glob_pattern(glob)
    with closing(sqlite3.connect(":memory:")) as connection:
        for name in names:
            (expected,) = connection.execute("select ? glob ?", (name, glob)).fetchone()
            assert (pattern.fullmatch(name) is not None) == bool(expected), (glob, name)


@attrs.define
class Kept:
    """An alert as a database would keep it."""

    since: int
    value: Any
    fired_at: int | None
    ended_at: int | None
    resolved_at: int | None
    catching_up: bool


class Stored:
    """What is stored beside a watch: the readings of one series, and alerts of one rule."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.text = orjson.dumps({"name": "some", "metric": "level", **rule}).decode()
        self.rule = CODEC.body(self.text.encode(), iiot.Rule)
        iiot.check_rule(self.rule)
        self.readings: dict[int, iiot.Value] = {}
        self.alerts: dict[int, Kept] = {}
        self.late: dict[tuple[int, int], tuple[int, int]] = {}
        self.now = START / 1000
        self.begin()

    def begin(self) -> None:
        """Start, with what is stored alone."""
        self.watch = iiot.AlertWatch(CODEC, LIMITS)
        self.watch.forget(self.now)
        self.watch.begin([(1, 1, self.text)], max(self.alerts, default=0) + 1)
        while self.watch.pages.ask() is not None:
            page = [] if self.watch.places.devices else [self.device()]
            self.watch.learn(iiot.AlertNews(page=page), self.now, self.wall)
        self.watch.learn_late([(*key, *span) for key, span in self.late.items()])

    @property
    def wall(self) -> int:
        return round(self.now * 1000)

    def device(self) -> list[Any]:
        newest = max(self.readings, default=None)
        alerts = [
            [number, 1, kept.since, kept.value, kept.fired_at, kept.ended_at, kept.catching_up]
            for number, kept in self.alerts.items() if kept.resolved_at is None
        ]  # fmt: skip
        series = {"level": ["7", newest, self.readings[newest]]} if newest is not None else {}
        return [5, 1, "press-1", {}, 0, 1, None, series, alerts]

    def take(self, readings: Iterable[Reading]) -> None:
        """One transaction that stores these."""
        some = dict(readings)
        series = [(7, 5, "level")] if not self.readings and some else []
        points = {"7": {str(ts): value for ts, value in some.items()}} if some else {}
        work = self.watch.close(points, series, self.now, self.wall)
        self.readings |= some
        for number in work.dropped:
            self.alerts.pop(number, None)  # it may have ended before it was stored
        for row in (*work.resolved.values(), *work.open.values(), *work.past):
            known = self.alerts.get(row.id)
            assert known is None or known.resolved_at is None, "an alert that is over changes no more"
            self.alerts[row.id] = Kept(row.since, row.value, row.fired_at, row.ended_at, row.resolved_at, row.catching_up)
        assert sum(kept.resolved_at is None for kept in self.alerts.values()) <= 1
        for key in work.judged:
            self.late.pop(key, None)
        for rule, number, _, start, stop in work.late:
            first, last = self.late.get((rule, number), (start, stop))
            self.late[rule, number] = min(first, start), max(last, stop)
        self.watch.learn(iiot.AlertNews(readings=[self.look_up(wanted) for wanted in work.readings]), self.now, self.wall)

    def look_up(self, wanted: iiot.ReadingsWanted) -> tuple[list[list[Any]], list[Reading]]:
        after = wanted.after
        recorded = [
            [kept.since, kept.value, kept.fired_at, kept.resolved_at, kept.ended_at] for kept in self.alerts.values()
            if wanted.is_first and (kept.resolved_at is None or kept.resolved_at > after)
        ]  # fmt: skip
        if wanted.is_first and wanted.needs_before:
            after = max((ts for ts, value in self.readings.items() if ts <= after and not isinstance(value, str)), default=after + 1) - 1
        readings = sorted((ts, value) for ts, value in self.readings.items() if ts > after)
        return recorded, readings[: LIMITS.replay_readings]

    def settle(self) -> None:
        """Until there is nothing to be done at this time."""
        for _ in range(200):
            if not self.watch.look_at_clock(self.now):
                return
            self.take(())
        pytest.fail("the watch never comes to rest")

    def seen(self) -> list[Seen]:
        seen = [(kept.since, kept.fired_at, kept.resolved_at) for kept in self.alerts.values() if kept.fired_at is not None]
        return sorted(seen, key=lambda one: (one[0], one[2] or iiot.LATEST))


def at_once(rule: iiot.Rule, readings: Iterable[Reading], moment: int) -> list[Seen]:
    trial = iiot.Trial(rule, START)
    for ts, value in sorted(readings):
        trial.take(ts, value)
    return [(one.since, one.fired_at, one.resolved_at) for one in trial.end(moment)]


LEVELS = [
    {"condition": {"above": 5}}, {"condition": {"above": 5}, "clear": 3}, {"condition": {"below": 3}, "clear": 5},
    {"condition": {"outside": [3, 5]}}, {"condition": {"equals": 4}}, {"condition": {"equals": "stop"}},
]  # fmt: skip
TRENDS = [
    {"condition": {"changed": 3}}, {"condition": {"slope_above": 30, "window": "4s"}},
    {"condition": {"predicted_below": 2, "window": "4s", "within": "3s"}, "clear": 3},
]  # fmt: skip
timings = st.fixed_dictionaries({"for": st.sampled_from(["0s", "1s", "3s"]), "keep_firing_for": st.sampled_from(["0s", "2s"])})
values = st.one_of(st.integers(0, 8), st.sampled_from([2.5, 5.0, "stop", "run"]))
steps = st.lists(st.tuples(st.sampled_from([0, 400, 1_000, 2_300]), values), max_size=25)


def spread(some: list[tuple[int, iiot.Value]]) -> list[Reading]:
    moment, readings = START, list[Reading]()
    for step, value in some:
        moment += step + 1
        readings.append((moment, value))
    return readings


@given(st.sampled_from(LEVELS + TRENDS), timings, steps, st.lists(st.integers(1, 4), max_size=25), st.data())
@settings(deadline=None)
def test_what_comes_in_order_is_judged_as_a_trial_judges_it(
    rule: dict[str, Any], timing: dict[str, str], some: list[tuple[int, iiot.Value]], sizes: list[int], data: st.DataObject
) -> None:
    """In parts of any size, each as soon as it is there, and with stops between them."""
    stored, readings = Stored({**rule, **timing}), spread(some)
    place = 0
    for size in [*sizes, len(readings)]:
        part = readings[place : place + size]
        place += size
        if not part:
            break
        stored.now = part[-1][0] / 1000
        stored.take(part)
        if data.draw(st.booleans()):
            stored.settle()
        if data.draw(st.integers(0, 5)) == 0:
            stored.settle()
            stored.begin()
            stored.settle()
    stored.now += data.draw(st.sampled_from([0, 1, 5]))
    stored.settle()
    assert stored.seen() == at_once(stored.rule, readings, stored.wall)


def overlaps(one: Seen, other: Seen) -> bool:
    return one[0] <= (other[2] or iiot.LATEST) and other[0] <= (one[2] or iiot.LATEST)


@given(st.sampled_from(LEVELS + TRENDS), timings, steps, st.data())
@settings(deadline=None)
def test_what_comes_late_adds_to_the_past_what_nobody_knew(
    rule: dict[str, Any], timing: dict[str, str], some: list[tuple[int, iiot.Value]], data: st.DataObject
) -> None:
    """Some readings come after all others."""
    stored, readings = Stored({**rule, **timing}), spread(some)
    are_late = [data.draw(st.booleans()) for _ in readings]
    stored.now = (readings[-1][0] if readings else START) / 1000
    for late in (False, True):
        part = [reading for reading, is_late in zip(readings, are_late, strict=True) if is_late is late]
        if part:
            stored.take(part)
        if data.draw(st.booleans()):
            stored.begin()
        stored.settle()
    stored.now += 3_600
    stored.settle()
    truth = at_once(stored.rule, readings, stored.wall)
    assert [one for one in truth if not any(overlaps(one, other) for other in stored.seen())] == []


@given(st.sampled_from(LEVELS + TRENDS), timings, steps, st.randoms(use_true_random=False), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_whatever_comes_late_there_is_an_alert_if_there_is_one_in_truth(
    rule: dict[str, Any], timing: dict[str, str], some: list[tuple[int, iiot.Value]], random: Any, size: int, data: st.DataObject
) -> None:
    """Readings in any order, with stops between them."""
    stored, readings = Stored({**rule, **timing}), spread(some)
    shuffled = list(readings)
    random.shuffle(shuffled)
    note(f"as they come: {[(ts - START, value) for ts, value in shuffled]}")
    stored.now = (readings[-1][0] if readings else START) / 1000
    for place in range(0, len(shuffled), size):
        stored.take(shuffled[place : place + size])
        if data.draw(st.booleans()):
            stored.settle()
        if data.draw(st.integers(0, 5)) == 0:
            stored.begin()
    stored.now += 3_600
    stored.settle()
    truth = at_once(stored.rule, readings, stored.wall)
    assert any(kept.resolved_at is None for kept in stored.alerts.values()) == any(one[2] is None for one in truth)
