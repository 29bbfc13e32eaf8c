"""Who is told of alerts, when, in which form, and that it arrives: a real server, and receivers on real sockets."""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import itertools
import json
import re
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from email.header import decode_header, make_header
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession, web
from aiosmtpd import smtp
from hypothesis import given
from hypothesis import strategies as st
from plant import PATIENCE, Plant, Process
from receivers import LOCAL, Post, alerting, receiver, told_to
from standardwebhooks import Webhook, WebhookVerificationError

import iiot

QUICK = attrs.evolve(
    iiot.Limits(), notice_pause_seconds=0.01, notice_seconds_most=0.2, redelivery_seconds=0.05, redelivery_seconds_most=0.1,
    repeat_seconds_least=0.0,
)  # fmt: skip
ALERTMANAGER, IRC_RELAY = shutil.which("prometheus-alertmanager"), shutil.which("alertmanager-irc-relay")
LONG = 300.0  # seconds, for what is much on a machine that has other work, too
MOMENT = 1_767_225_600_000  # 2026-01-01T00:00:00Z


async def registered(plant: Plant, *names: str) -> None:
    for name in names:
        await plant.register(name)


async def delivered(plant: Plant, count: int) -> list[dict[str, Any]]:
    """So many notifications, newest first, once none of them waits."""

    def is_done(body: Any) -> bool:
        return len(body["items"]) >= count and all(item["status"] != "waiting" for item in body["items"])

    items: list[dict[str, Any]] = (await plant.until("/notifications", is_done))["items"]
    assert len(items) == count
    return items


# ---- forms


ALERT = iiot.AlertShown(
    "too hot", "press-1", "default", "critical", "temperature", {"line": "3", "alertname": "x", "a-b": "c"}, "press-1 is at 83.5", 83.5,
    MOMENT, None, None, stale=False,
)  # fmt: skip
OVER = attrs.evolve(ALERT, device="press-2", text="press-2 is at 90", value=90, resolved_at=MOMENT + 60_000, reason="cleared", stale=True)
GROUP = iiot.AlertGroup(7, "alertname", "too hot", MOMENT, 3_600_000, 1, 1, (ALERT, OVER))


def test_the_payload_is_alertmanagers() -> None:
    labels = {
        "a_b": "c", "alertname": "too hot", "device": "press-1", "line": "3", "metric": "temperature", "severity": "critical",
        "tenant": "default",
    }  # fmt: skip
    assert iiot.payload(GROUP, "https://iiot.example.com/") == {
        "version": "4",
        "groupKey": '{}/{receiver="7"}:{alertname="too hot"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "7",
        "groupLabels": {"alertname": "too hot"},
        "commonLabels": {name: value for name, value in labels.items() if name != "device"},
        "commonAnnotations": {},
        "externalURL": "https://iiot.example.com/",
        "alerts": [
            {
                "status": "firing", "labels": labels, "annotations": {"summary": "press-1 is at 83.5", "value": "83.5"},
                "startsAt": "2026-01-01T00:00:00.000Z", "endsAt": "0001-01-01T00:00:00Z",
                "generatorURL": "https://iiot.example.com/iiot/press-1", "fingerprint": iiot.fingerprint(labels),
            },
            {
                "status": "resolved", "labels": {**labels, "device": "press-2"},
                "annotations": {"summary": "press-2 is at 90", "value": "90", "reason": "cleared", "stale": "true"},
                "startsAt": "2026-01-01T00:00:00.000Z", "endsAt": "2026-01-01T00:01:00.000Z",
                "generatorURL": "https://iiot.example.com/iiot/press-2", "fingerprint": iiot.fingerprint({**labels, "device": "press-2"}),
            },
        ],
    }  # fmt: skip


def test_a_fingerprint_is_that_of_prometheus() -> None:
    """https://github.com/prometheus/common: model.LabelSet{}.Fingerprint() is the offset basis of FNV-1a."""
    assert iiot.fingerprint({}) == "cbf29ce484222325"
    assert iiot.fingerprint({"b": "2", "a": "1"}) == iiot.fingerprint({"a": "1", "b": "2"}) != iiot.fingerprint({"a": "12", "b": ""})


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=5), st.text(max_size=20), st.one_of(st.none(), st.text()))
def test_any_alert_has_names_that_receivers_take(labels: dict[str, str], text: str, value: str | None) -> None:
    alert = attrs.evolve(ALERT, labels=labels, text=text, value=value)
    for form in iiot.WEBHOOK_FORMS:
        message = iiot.message_of(form, attrs.evolve(GROUP, key=text, alerts=(alert,)), 20, "")
        assert all(value.isprintable() for value in message.headers.values())
    shown = iiot.labels_of(alert)
    assert all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) for name in shown if name)
    assert shown["alertname"] == "too hot"
    assert all(isinstance(said, str) for said in iiot.annotations_of(alert).values())


@given(st.text(), st.text())
def test_a_mail_has_the_headers_that_it_is_given(key: str, text: str) -> None:
    group = attrs.evolve(GROUP, key=key, alerts=(attrs.evolve(ALERT, text=text),))
    message = iiot.message_of("email", group, 20, "")
    mail = iiot.mail_of(message, ["a@example.com", "b@example.com"], "iiot@example.com", "msg_1", MOMENT)
    read = email.message_from_bytes(mail.as_bytes(), policy=email.policy.default)
    assert {name.lower() for name in read} == {
        "from", "to", "subject", "date", "message-id", "in-reply-to", "references", "auto-submitted", "content-type",
        "content-transfer-encoding", "mime-version",
    }  # fmt: skip
    assert read["Message-ID"] == "<msg_1@example.com>"
    others = iiot.message_of("email", attrs.evolve(group, firing=5, alerts=(OVER,)), 20, "")
    assert others.headers["Thread"] == message.headers["Thread"], "what is said of a group at any time is one thread"
    assert iiot.message_of("email", attrs.evolve(group, key=f"{key}."), 20, "").headers["Thread"] != message.headers["Thread"]


def test_a_message_for_people_is_short() -> None:
    many = attrs.evolve(GROUP, firing=10_000, resolved=0, alerts=(attrs.evolve(ALERT, text="ä<&>" * 500),) * 100)
    lines = iiot.lines_of(many, 20, "")
    assert len(lines) == 21
    assert lines[-1] == "and 9,980 more"
    slack = json.loads(iiot.message_of("slack", many, 20, "").body)["text"]
    for text in (iiot.message_of("ntfy", many, 20, "https://iiot.example.com").body, slack):
        assert len(text.encode()) <= 4_000
        counted = re.search(r"^and ([0-9,]+) more$", text, re.MULTILINE)
        assert counted is not None
        assert int(counted[1].replace(",", "")) == 10_000 - text.count("[2026-")
    assert "ä&lt;&amp;&gt;" in slack
    assert "<" not in slack


@pytest.mark.parametrize(
    ("status", "retry_after", "ok", "final", "asked"),
    [
        (200, None, True, False, None), (204, "9", True, False, None), (301, None, False, False, None), (307, "5", False, False, None),
        (400, None, False, False, None), (404, None, False, False, None), (408, None, False, False, None), (410, "5", False, True, None),
        (425, None, False, False, None), (429, "7", False, False, 7.0), (429, "soon", False, False, None),
        (429, "Thu, 01 Jan 2026 00:01:00 GMT", False, False, 60.0), (503, "99999999999999999999", False, False, 9_999_999_999.0),
        (500, "-3", False, False, None), (100, None, False, False, None),
    ],
)  # fmt: skip
def test_what_an_answer_means(status: int, retry_after: str | None, ok: bool, final: bool, asked: float | None) -> None:  # noqa: FBT001
    attempt = iiot.judged_answer(status, retry_after, MOMENT / 1000)
    assert (attempt.error is None, attempt.final, attempt.retry_after) == (ok, final, asked)


@pytest.mark.parametrize(
    ("tries", "asked", "seconds"),
    [(1, None, 5.0), (2, None, 10.0), (8, None, 600.0), (10_000, None, 600.0), (1, 60.0, 60.0), (8, 60.0, 600.0), (1, 1e9, 3_600.0)],
)
def test_when_it_is_tried_again(tries: int, asked: float | None, seconds: float) -> None:
    assert iiot.seconds_to_wait(tries, asked, iiot.Limits()) == seconds


@given(st.binary(min_size=24, max_size=64), st.text(max_size=100).map(str.encode))
def test_a_signature_is_that_of_the_library(key: bytes, body: bytes) -> None:
    secret = f"whsec_{base64.b64encode(key).decode()}"
    headers = iiot.signature_headers([iiot.new_webhook_secret(), secret], "msg_1", int(time.time()), body)
    Webhook(secret).verify(body, headers, json_parse=False)
    with pytest.raises(WebhookVerificationError):
        Webhook(iiot.new_webhook_secret()).verify(body, headers, json_parse=False)


@pytest.mark.parametrize("milliseconds", [0, 1, 999, 1_000, 60_000, 90_000, 3_600_000, 86_400_000, 5_400_000])
def test_a_duration_is_shown_as_it_is_read(milliseconds: int) -> None:
    assert iiot.parse_duration(iiot.duration_text(milliseconds)) == milliseconds


# ---- receivers of a tenant


async def test_a_secret_is_shown_once_and_a_receiver_is_listed(tmp_path: Path) -> None:
    async with alerting(tmp_path) as (plant, _):
        wanted = {"name": "night shift", "match": "press-*", "severity": "error", "rule": "hot", "group_by": "label:line"}
        made = await told_to(plant, "https://example.com/hook?token=1", **wanted)
        assert made.pop("secret").startswith("whsec_")
        shown = {
            "id": 1, "name": "night shift", "url": "https://example.com/…", "form": "webhook", **wanted, "wait": "0s", "interval": "1ms",
            "repeat": "4h",
        }  # fmt: skip
        assert {name: made[name] for name in shown} == shown
        assert await plant.get("/webhooks") == {"items": [made], "next": None}
        assert "secret" not in await told_to(plant, "https://user:pass@ntfy.sh/topic", form="ntfy")
        assert (await told_to(plant, "https://hooks.slack.com/services/T0/B0/XX", form="slack"))["url"] == "https://hooks.slack.com/…"
        assert [item["url"] for item in (await plant.get("/webhooks?after=1"))["items"]] == [
            "https://ntfy.sh/…", "https://hooks.slack.com/…"
        ]  # fmt: skip
        assert (await plant.ask("DELETE", "/webhooks/1"))[0] == 204
        assert (await plant.ask("DELETE", "/webhooks/1"))[0] == 404
        assert [item["id"] for item in (await plant.get("/webhooks"))["items"]] == [2, 3]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"), ({"url": 5}, "url"), ({"url": "ftp://example.com"}, "url"), ({"url": "example.com"}, "url"),
        ({"url": "http://"}, "url"), ({"url": "http://example.com:0/"}, "url"), ({"url": "http://[::1"}, "url"),
        ({"url": "http://10.0.0.1/"}, "url"), ({"url": "http://example.com/ a\r\nHost: b"}, "url"),
        ({"url": "http://0x7f000001/"}, "url"), ({"url": "http://169.254.169.254/"}, "url"), ({"url": "mailto:a@example.com"}, "url"),
        ({"url": "https://example.com", "form": "email"}, "url"), ({"url": "mailto:a@example.com", "form": "email"}, "form"),
        ({"url": "mailto:a@b\r\nBcc: c@d", "form": "email"}, "url"), ({"url": "https://example.com", "form": "pager"}, "form"),
        ({"url": "https://example.com", "secret": "x"}, "secret"), ({"url": "https://example.com", "secret": "whsec_QUJD"}, "secret"),
        ({"url": "https://example.com", "form": "slack", "secret": "whsec_" + "A" * 43 + "="}, "secret"),
        ({"url": "https://example.com", "match": ""}, "match"), ({"url": "https://example.com", "severity": "bad"}, "severity"),
        ({"url": "https://example.com", "group_by": "label:"}, "group_by"),
        ({"url": "https://example.com", "group_by": "rules"}, "group_by"),
        ({"url": "https://example.com", "wait": "soon"}, "wait"), ({"url": "https://example.com", "interval": "0s"}, "interval"),
        ({"url": "https://example.com", "repeat": "0s"}, "repeat"), ({"url": "https://example.com", "repeat": "4s"}, "repeat"),
        ({"url": "https://example.com", "repeat": "31d"}, "repeat"),
        ({"url": "https://example.com", "more": 1}, "more"), ({"url": "https://example.com/" + "x" * 1_024}, "url"),
    ],
)  # fmt: skip
async def test_a_receiver_that_can_be_none_is_refused(plant: Plant, body: Any, field: str) -> None:
    status, answer = await plant.ask("POST", "/webhooks", body)
    assert status == 422
    assert [detail["path"] for detail in answer["error"]["details"]] == [field]
    assert (await plant.get("/webhooks"))["items"] == []


async def test_a_tenant_has_so_many_receivers(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, webhooks=2)) as (plant, _):
        for _ in range(2):
            await told_to(plant, "https://example.com/")
        status, body = await plant.ask("POST", "/webhooks", {"url": "https://example.com/"})
        assert (status, body["error"]["code"]) == (403, "too_many_webhooks")
        assert (await plant.ask("DELETE", "/webhooks/1"))[0] == 204
        await told_to(plant, "https://example.com/")


async def test_both_secrets_sign_while_one_is_changed(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, old_secret_seconds=3_600.0)) as (plant, alerts), receiver() as hook:
        first = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
        assert (await told_to(plant, hook.url, secret=first, group_by="device"))["secret"] == first
        await registered(plant, "press-1", "press-2", "press-3")
        await alerts.fire("hot", "press-1")
        Webhook(first).verify((post := await hook.next()).body, {name.lower(): value for name, value in post.headers.items()})
        status, made = await plant.ask("POST", "/webhooks/1/secret")
        assert status == 201
        second = made["secret"]
        await alerts.fire("hot", "press-2")
        post = await hook.next()
        assert len(post.headers["webhook-signature"].split(" ")) == 2
        for secret in (first, second):
            Webhook(secret).verify(post.body, {name.lower(): value for name, value in post.headers.items()})
        await alerts.change("update webhook set old_until = 1")
        await alerts.fire("hot", "press-3")
        post = await hook.next()
        Webhook(second).verify(post.body, {name.lower(): value for name, value in post.headers.items()})
        with pytest.raises(WebhookVerificationError):
            Webhook(first).verify(post.body, {name.lower(): value for name, value in post.headers.items()})
        assert (await plant.ask("POST", "/webhooks/9/secret"))[0] == 404
        await told_to(plant, hook.url, form="slack")
        assert (await plant.ask("POST", "/webhooks/2/secret"))[0] == 422


async def test_a_test_tells_what_came_of_it(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, _), receiver() as hook:
        secret = (await told_to(plant, f"{hook.url}/a"))["secret"]
        hook.answers = [200, 418]
        assert await plant.ask("POST", "/webhooks/1/test") == (200, {"status": "delivered", "http_status": 200, "error": None})
        post = await hook.next()
        assert (post.path, post.devices) == ("/a", {"test": "firing"})
        Webhook(secret).verify(post.body, {name.lower(): value for name, value in post.headers.items()})
        assert await plant.ask("POST", "/webhooks/1/test") == (
            200, {"status": "failed", "http_status": 418, "error": "it answered 418"}
        )  # fmt: skip
        assert (await plant.ask("POST", "/webhooks/2/test"))[0] == 404
        assert (await plant.get("/notifications"))["items"] == []


async def test_a_test_of_a_receiver_that_hangs_ends_in_time(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, delivery_seconds=0.1)) as (plant, _), receiver() as hook:
        hook.answers = [forever]
        await told_to(plant, hook.url)
        _, body = await plant.ask("POST", "/webhooks/1/test")
        assert body == {"status": "failed", "http_status": None, "error": "it did not answer within 0.1 s"}


# ---- who is told of what


async def forever(_: Post) -> web.StreamResponse:
    await asyncio.sleep(3_600)
    return web.Response()


async def test_who_is_told_that_it_fires_is_told_once_that_it_is_over(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1", "press-2")
        await alerts.fire("hot", "press-1", "press-2", value=83.5, labels={"line": "3"})
        post = await hook.next()
        assert post.devices == {"press-1": "firing", "press-2": "firing"}
        assert (post.json["status"], post.json["commonLabels"]["line"]) == ("firing", "3")
        await alerts.resolve("hot", "press-2")
        post = await hook.next()
        assert post.devices == {"press-1": "firing", "press-2": "resolved"}
        await alerts.resolve("hot", "press-1", reason="the rule was deleted")
        post = await hook.next()
        assert (post.devices, post.json["status"]) == ({"press-1": "resolved"}, "resolved")
        assert post.json["alerts"][0]["annotations"]["reason"] == "the rule was deleted"
        assert plants.rows(plant.database, "select * from notice") == []
        assert plants.rows(plant.database, "select * from alert_group") == []
        items = await delivered(plant, 3)
        assert [(item["webhook"], item["form"], item["tries"], item["alerts"], item["error"]) for item in items] == [
            (1, "webhook", 1, count, None) for count in (1, 2, 2)
        ]
        assert hook.unread == 0


async def test_nothing_is_told_again_after_a_start(tmp_path: Path) -> None:
    async with receiver() as hook:
        async with alerting(tmp_path, QUICK) as (plant, alerts):
            await told_to(plant, hook.url)
            await registered(plant, "press-1", "press-2")
            await alerts.fire("hot", "press-1")
            await hook.next()
            await delivered(plant, 1)
        async with alerting(tmp_path, QUICK) as (plant, alerts):
            await alerts.fire("hot", "press-2")
            assert (await hook.next()).devices == {"press-1": "firing", "press-2": "firing"}
            await alerts.resolve("hot", "press-1", "press-2")
            assert set((await hook.next()).devices.values()) == {"resolved"}
            await delivered(plant, 3)
        assert hook.unread == 0


@pytest.mark.parametrize(
    ("group_by", "groups"),
    [
        ("rule", [({"alertname": "cold"}, {"press-1"}), ({"alertname": "hot"}, {"press-1", "press-2"})]),
        ("device", [({"device": "press-1"}, {"press-1"}), ({"device": "press-2"}, {"press-2"})]),
        ("label:line", [({"line": ""}, {"press-2"}), ({"line": "3"}, {"press-1"})]),
    ],
)
async def test_alerts_are_told_in_groups(tmp_path: Path, group_by: str, groups: list[tuple[dict[str, str], set[str]]]) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await registered(plant, "press-1", "press-2")
        assert (await plant.ask("PATCH", "/iiot/press-1", {"labels": {"line": "3"}}))[0] == 200
        await alerts.fire("hot", "press-1", "press-2")
        await alerts.fire("cold", "press-1")
        await told_to(plant, hook.url, group_by=group_by)
        posts = [await hook.next() for _ in groups]
        assert sorted((sorted(post.json["groupLabels"].items()), sorted(post.devices)) for post in posts) == sorted(
            (sorted(labels.items()), sorted(devices)) for labels, devices in groups
        )
        assert len({post.json["groupKey"] for post in posts}) == len(groups)
        assert hook.unread == 0


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"match": "press-*"}, {"press-1"}), ({"severity": "error"}, {"press-1"}), ({"rule": "leak"}, {"pump-1"}),
        ({"match": "*1", "severity": "warning"}, {"press-1", "pump-1"}),
    ],
)  # fmt: skip
async def test_a_receiver_is_told_of_what_concerns_it(tmp_path: Path, wanted: dict[str, str], told: set[str]) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, group_by="label:none", wait="200ms", **wanted)
        await registered(plant, "press-1", "pump-1")
        await alerts.fire("hot", "press-1")
        await alerts.fire("leak", "pump-1", severity="warning")
        assert set((await hook.next()).devices) == told


async def test_another_tenants_alerts_are_not_told(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook, receiver() as theirs:
        platform = plants.admin_token(plant.database, "platform")
        _, made = await plant.ask("POST", "/tenants", {"name": "acme"}, token=platform)
        acme = Plant(plant.url, plant.client, made["token"], plant.database)
        await told_to(plant, hook.url)
        await told_to(acme, theirs.url)
        await registered(plant, "press-1")
        await registered(acme, "press-1")
        await alerts.fire("hot", "press-1", tenant=2)
        assert (await theirs.next()).json["commonLabels"]["tenant"] == "acme"
        await alerts.fire("cold", "press-1")
        assert (await hook.next()).json["commonLabels"]["tenant"] == "default"
        await delivered(plant, 1)
        assert [item["webhook"] for item in (await acme.get("/notifications"))["items"]] == [2]
        assert (await acme.get("/notifications?webhook=1"))["items"] == []
        for method, path in (("DELETE", "/webhooks/1"), ("POST", "/webhooks/1/test"), ("POST", "/webhooks/1/secret")):
            assert (await acme.ask(method, path))[0] == 404
        assert (hook.unread, theirs.unread) == (0, 0)


async def test_what_is_over_before_it_is_told_is_not_told(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, interval="400ms")
        await registered(plant, "press-1", "press-2", "press-3")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.fire("hot", "press-2")
        async with asyncio.timeout(PATIENCE):
            while len(plants.rows(plant.database, "select 1 from notice")) < 2:
                await asyncio.sleep(0.01)
        await alerts.resolve("hot", "press-2")
        await alerts.fire("hot", "press-3")
        post = await hook.next()
        assert post.devices == {"press-1": "firing", "press-3": "firing"}
        await alerts.resolve("hot", "press-1", "press-3")
        assert (await hook.next()).devices == {"press-1": "resolved", "press-3": "resolved"}


async def test_an_alert_that_comes_back_between_two_notifications_is_told_last_as_it_is(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, interval="300ms")
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.resolve("hot", "press-1")
        await alerts.fire("hot", "press-1")
        post = await hook.next()
        assert [alert["status"] for alert in post.json["alerts"]] == ["resolved", "firing"]
        assert len({alert["fingerprint"] for alert in post.json["alerts"]}) == 1


async def test_a_group_waits_for_more_and_then_for_its_interval(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, wait="300ms", interval="500ms")
        await registered(plant, *(f"press-{number}" for number in range(5)))
        began = asyncio.get_running_loop().time()
        await alerts.fire("hot", "press-0")
        await alerts.fire("hot", "press-1")
        first = await hook.next()
        assert set(first.devices) == {"press-0", "press-1"}
        assert first.at - began >= 0.3
        await alerts.fire("hot", "press-2")
        await alerts.fire("hot", "press-3")
        second = await hook.next()
        assert set(second.devices) == {"press-0", "press-1", "press-2", "press-3"}
        assert second.at - first.at >= 0.45


async def test_what_fires_is_told_again_after_a_time_unless_somebody_knows(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook, receiver() as clock:
        await told_to(plant, hook.url, repeat="300ms", rule="hot")
        await told_to(plant, clock.url, repeat="100ms", rule="tick")
        await registered(plant, "press-1", "press-2")
        await alerts.fire("tick", "press-1")
        await alerts.fire("hot", "press-1", "press-2")
        posts = [await hook.next() for _ in range(3)]
        for before, after in itertools.pairwise(posts):
            assert after.at - before.at >= 0.25
            assert (after.devices, after.message_id != before.message_id) == (before.devices, True)
        await alerts.acknowledge("hot")
        seen = len(hook.posts)
        for _ in range(clock.unread + 10):  # a second
            await clock.next()
        assert len(hook.posts) <= seen + 1
        await alerts.acknowledge("hot", until=1)  # it is over
        for _ in range(hook.unread + 1):
            await hook.next()


async def test_an_alert_that_is_known_is_told_with_one_that_is_not(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1", "press-2")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.acknowledge("hot")
        await alerts.fire("hot", "press-2")
        assert set((await hook.next()).devices) == {"press-1", "press-2"}


async def test_a_silence_holds_back_and_its_end_lets_go(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, group_by="device")
        await registered(plant, "press-1", "press-2", "pump-1")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.silence("press-*")
        await alerts.resolve("hot", "press-1")
        await alerts.fire("hot", "press-2")
        await alerts.fire("hot", "pump-1")
        assert (await hook.next()).devices == {"pump-1": "firing"}
        await delivered(plant, 2)
        await alerts.change("delete from silence")
        assert {**(await hook.next()).devices, **(await hook.next()).devices} == {"press-1": "resolved", "press-2": "firing"}
        assert hook.unread == 0


async def test_a_silence_that_ends_by_itself_lets_go(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.silence("press-1", 0.5)
        until = asyncio.get_running_loop().time() + 0.5
        await alerts.fire("hot", "press-1")
        assert (await hook.next()).at >= until - 0.05


async def test_an_alert_of_a_device_that_is_known_to_be_offline_is_held_back(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("gone", "press-1", kind="offline", metric=None)
        await alerts.fire("hot", "press-1")
        assert (await hook.next()).json["commonLabels"]["alertname"] == "gone"
        await alerts.resolve("gone", "press-1")
        assert {(await hook.next()).json["commonLabels"]["alertname"] for _ in range(2)} == {"gone", "hot"}


async def test_what_came_late_is_told_when_all_is_there_and_still_so(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1", "press-2", "press-3")
        await alerts.fire("late", "press-1", "press-2", catching_up=True)
        await alerts.fire("hot", "press-3")
        assert (await hook.next()).devices == {"press-3": "firing"}
        await alerts.resolve("late", "press-1")
        await alerts.change("update alert set catching_up = 0")
        assert (await hook.next()).devices == {"press-2": "firing"}
        await delivered(plant, 2)


async def test_a_device_that_is_removed_has_its_name_to_the_end(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, match="press-*", group_by="device")
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await plant.ask("DELETE", "/iiot/press-1")
        await alerts.change("update alert set resolved_at = ?, reason = 'the device was removed'", iiot.now_ms())
        assert (await hook.next()).devices == {"press-1": "resolved"}


def fleet(database: Path, count: int) -> list[str]:
    names = [f"press-{number:05}" for number in range(count)]

    def add(connection: sqlite3.Connection) -> None:
        connection.execute(
            "insert into device (tenant_id, name, created_at) select 1, value, 1 from json_each(?)", (json.dumps(names),)
        )
        connection.execute("insert into presence (device_id, session, connected) select id, 0, 0 from device")

    iiot.change_database(database, add)
    return names


@pytest.mark.parametrize(("form", "posts"), [("webhook", 1), ("alertmanager", 20)])
async def test_ten_thousand_alerts_at_once_are_told(tmp_path: Path, form: str, posts: int) -> None:
    """How long the event loop does nothing else meanwhile, `bench.py` measures."""
    async with alerting(tmp_path, attrs.evolve(QUICK, groups_together=1)) as (plant, alerts), receiver() as hook:
        names = fleet(plant.database, 10_000)
        await told_to(plant, hook.url, form=form, wait="500ms", interval="1h")
        await alerts.fire("gone", *names, kind="offline")
        shown = []
        for _ in range(posts):
            post = await hook.next(LONG)
            shown += [alert["labels"]["device"] for alert in (post.json if form == "alertmanager" else post.json["alerts"])]
            assert len(shown) <= (500 if form == "alertmanager" else 100) * len(hook.posts)
        await plant.until("/notifications?status=waiting", lambda body: not body["items"])
        if form == "webhook":
            assert (post.json["truncatedAlerts"], len(shown)) == (9_900, 100)
        else:
            assert sorted(shown) == names
        assert plants.rows(plant.database, "select count(*) from notice where told_at is not null") == [(10_000,)]
        if form == "webhook":
            await alerts.resolve("gone", *names)
            await alerts.change("update alert_group set due_at = 0")
            post = await hook.next(LONG)
            assert (post.json["truncatedAlerts"], post.json["status"]) == (9_900, "resolved")
            assert plants.rows(plant.database, "select count(*) from notice") == [(0,)]


# ---- how it arrives


async def test_a_receiver_that_hangs_keeps_nobody_waiting(tmp_path: Path) -> None:
    """There is one place for those that take what they are sent; the one that hangs has its own."""
    limits = attrs.evolve(QUICK, deliveries=1, delivery_seconds=1.0)
    async with receiver() as hook, receiver() as other, alerting(tmp_path, limits) as (plant, alerts):
        hook.answers = [forever] * 1_000
        await told_to(plant, hook.url)
        await registered(plant, *(f"press-{number}" for number in range(5)))
        await alerts.fire("hot", "press-0")
        await hook.next()
        await plant.until("/notifications", lambda body: body["items"][0]["tries"] > 0)
        await told_to(plant, other.url, group_by="device")
        for number in range(1, 5):
            await alerts.fire("hot", f"press-{number}")
        assert set().union(*[(await other.next()).devices for _ in range(5)]) == {f"press-{number}" for number in range(5)}
        waiting = (await plant.get("/notifications?webhook=1&status=waiting"))["items"]
        assert waiting[-1]["error"] == "it did not answer within 1 s"


async def test_a_receiver_is_sent_one_after_the_other_in_order(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [500, 500, 500]
        await told_to(plant, hook.url, group_by="device")
        await registered(plant, "press-1", "press-2")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.fire("hot", "press-2")
        posts = [await hook.next() for _ in range(4)]
        assert [list(post.devices) for post in posts] == [["press-1"], ["press-1"], ["press-1"], ["press-2"]]
        assert len({post.message_id for post in hook.posts[:4]}) == 1
        assert len({post.body for post in hook.posts[:4]}) == 1
        second, first = await delivered(plant, 2)
        assert (first["tries"], second["tries"], first["error"]) == (4, 1, None)


async def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    async def redirect(_: Post) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"{hook.url}/elsewhere"})

    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [redirect]
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        await plant.until("/notifications", lambda body: body["items"] and body["items"][0]["tries"])
        first, second = await hook.next(), await hook.next()
        assert (first.path, second.path, first.message_id) == ("/", "/", second.message_id)


async def test_a_receiver_that_is_gone_is_given_up(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [410]
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        (item,) = await delivered(plant, 1)
        assert (item["status"], item["tries"], item["next_at"], item["delivered_at"]) == ("given_up", 1, None, None)
        assert item["error"] == "it answered 410: there is no such receiver any more"
        assert len(hook.posts) == 1
        assert [found["id"] for found in (await plant.get("/notifications?status=given_up"))["items"]] == [1]
        assert (await plant.get("/notifications?status=delivered"))["items"] == []
        assert (await plant.ask("GET", "/notifications?status=lost"))[0] == 400
        assert plants.rows(plant.database, "select body from notification") == [(None,)]


async def test_a_receiver_that_asks_for_time_gets_it(tmp_path: Path) -> None:
    async def later(_: Post) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "1"})

    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [later, 500]
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        first, second, third = [await hook.next() for _ in range(3)]
        assert second.at - first.at >= 0.95
        assert first.message_id == second.message_id == third.message_id


async def test_what_is_not_taken_for_too_long_is_given_up(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, given_up_seconds=0.3, given_up_tries=4)) as (plant, alerts), receiver() as hook:
        hook.answers = [503] * 1_000
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        (item,) = await delivered(plant, 1)
        assert (item["status"], item["error"]) == ("given_up", "it answered 503")
        assert item["tries"] >= 4
        text = (await plant.ask("GET", "/metrics", token=plants.admin_token(plant.database, "platform")))[1]
        assert 'iiot_notifications_total{status="given_up"} 1.0' in text
        assert 'iiot_notifications_total{status="delivered"} 0.0' in text
        assert f"iiot_failed_deliveries_total {item['tries']}.0" in text
        assert "iiot_notifications_waiting 0.0" in text


async def test_while_much_waits_for_a_receiver_it_is_told_later_of_what_is_so_then(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, notifications_waiting=2)) as (plant, alerts), receiver() as hook:
        hook.answers = [500] * 20
        await told_to(plant, hook.url, interval="20ms")
        await registered(plant, *(f"press-{number}" for number in range(6)))
        for number in range(6):
            await alerts.fire("hot", f"press-{number}")
            await hook.next()
        assert len((await plant.get("/notifications"))["items"]) <= 2
        async with asyncio.timeout(PATIENCE):
            while len((await hook.next()).devices) < 6:
                pass
        assert len(await delivered(plant, len(plants.rows(plant.database, "select 1 from notification")))) <= 3


async def test_answers_without_end_are_not_read(tmp_path: Path) -> None:
    async def endless(post: Post) -> web.StreamResponse:
        return web.Response(body=b"x" * 50_000_000)

    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [endless]
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        (item,) = await delivered(plant, 1)
        assert item["status"] == "delivered"


async def test_no_cookie_is_kept_and_no_proxy_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cookie(_: Post) -> web.StreamResponse:
        return web.Response(status=500, headers={"Set-Cookie": "a=1"})

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [cookie]
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        posts = [await hook.next(), await hook.next()]
        assert all("Cookie" not in post.headers for post in posts)


async def test_old_notifications_go_and_those_that_wait_stay(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, retention_seconds=0.05, clock_seconds=0.02, removed_rows=2)) as (plant, alerts):
        await told_to(plant, "https://example.com/")
        await alerts.change(
            """insert into notification (tenant_id, webhook_id, message_id, at, alerts, headers, status, next_at)
               select 1, 1, 'm', value ->> 0, 1, '{}', value ->> 1, ? from json_each(?)""",
            iiot.now_ms() + 3_600_000,
            json.dumps([[1, "delivered"]] * 5 + [[1, "given_up"], [1, "waiting"], [iiot.now_ms(), "delivered"]]),
        )
        await plant.until("/notifications", lambda body: [item["id"] for item in body["items"]] == [8, 7])


async def test_a_removed_receiver_leaves_nothing_behind(tmp_path: Path) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, removed_rows=3, clock_seconds=0.02)) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, group_by="device")
        names = [f"press-{number}" for number in range(10)]
        await registered(plant, *names)
        await alerts.fire("hot", *names)
        for _ in names:
            await hook.next()
        assert (await plant.ask("DELETE", "/webhooks/1"))[0] == 204
        tables = ("webhook", "alert_group", "notice", "notification")
        async with asyncio.timeout(PATIENCE):
            while any(plants.rows(plant.database, f"select 1 from {table}") for table in tables):
                await asyncio.sleep(0.01)
        assert len(plants.rows(plant.database, "select 1 from alert")) == 10


async def test_after_a_kill_the_same_is_sent_again_by_the_same_id_and_nothing_else(process: Process) -> None:
    """It is killed between the POST and its marking: the receiver reads, and does not answer until the server is gone."""
    process.arguments = ("--webhook-networks", LOCAL)
    await process.start()
    token, _ = await process.read_first_start()
    gone = asyncio.Event()

    async def answer_after_the_kill(_: Post) -> web.StreamResponse:
        await gone.wait()
        return web.Response()

    async with ClientSession() as client, receiver() as hook:
        plant = process.plant(client, token)
        await told_to(plant, hook.url)
        await registered(plant, "press-1", "press-2")
        with plants.writing(process.database) as connection:
            connection.execute(
                """insert into alert (id, tenant_id, device_id, rule_id, rule, kind, severity, labels, text, since, fired_at, changed_at)
                   select device.id, 1, device.id, 1, 'hot', 'above', 'critical', '{}', 'hot', 1, 1, 1 from device"""
            )
        hook.answers = [answer_after_the_kill]
        first = await hook.next()
        await process.stop(signal.SIGKILL)
        gone.set()
        await process.start()
        plant = process.plant(client, token)
        second = await hook.next()
        assert (second.message_id, second.body) == (first.message_id, first.body)
        with plants.writing(process.database) as connection:
            connection.execute("update alert set resolved_at = 2, reason = 'cleared'")
        third = await hook.next()
        assert (third.message_id != first.message_id, set(third.devices.values())) == (True, {"resolved"})
        await delivered(plant, 2)
        assert hook.unread == 0


# ---- other forms


async def test_ntfy_gets_what_it_documents(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url.replace("//", "//user:pass@") + "/plant-1", form="ntfy")
        await registered(plant, "press-1")
        await alerts.fire("zu heiß 🔥", "press-1", text="press-1 hat 83,5 °C")
        post = await hook.next()
        assert (post.path, post.method) == ("/plant-1", "POST")
        assert str(make_header(decode_header(post.headers["Title"]))) == "zu heiß 🔥: 1 firing"
        assert (post.headers["Priority"], post.headers["Tags"]) == ("5", "rotating_light,critical")
        assert post.body.decode().startswith("critical: press-1: press-1 hat 83,5 °C [")
        assert post.headers["Authorization"] == "Basic dXNlcjpwYXNz"
        assert "webhook-id" not in post.headers
        await alerts.resolve("zu heiß 🔥", "press-1")
        post = await hook.next()
        assert (post.headers["Priority"], post.headers["Tags"]) == ("2", "white_check_mark,resolved")
        assert b"resolved (cleared): press-1" in post.body


async def test_slack_gets_a_text(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, f"{hook.url}/services/T/B/X", form="slack")
        await registered(plant, "press-1")
        await alerts.fire("a < b & c", "press-1", text="<!channel> & more")
        post = await hook.next()
        assert post.headers["Content-Type"] == "application/json"
        title, line = post.json["text"].split("\n")
        assert title == "*a &lt; b &amp; c: 1 firing*"
        assert line.startswith("critical: press-1: &lt;!channel&gt; &amp; more [")


def names_for(host: str) -> Any:
    """Stands in the place of `getaddrinfo`: every name is this host's."""
    return lambda name, port, *rest, **more: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]


class Mailbox:
    """What a server for mail took; it says no to addresses at refused.example.com."""

    def __init__(self) -> None:
        self.mails: asyncio.Queue[Any] = asyncio.Queue()
        self.fails = 0

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:  # noqa: N802
        if address.endswith("@refused.example.com"):
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        await self.mails.put(envelope)
        if self.fails:
            self.fails -= 1
            return "451 try again later"
        return "250 OK"


@asynccontextmanager
async def mail_server() -> AsyncIterator[tuple[Mailbox, str]]:
    mailbox = Mailbox()
    server = await asyncio.get_running_loop().create_server(lambda: smtp.SMTP(mailbox, enable_SMTPUTF8=False), "127.0.0.1", 0)
    try:
        yield mailbox, f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def test_mail_goes_out(tmp_path: Path) -> None:
    async with mail_server() as (mailbox, url), alerting(tmp_path, QUICK, smtp_url=url, smtp_from="iiot@example.com") as (plant, alerts):
        mailbox.fails = 1
        await told_to(plant, "mailto:a@example.com,b@example.com", form="email")
        await registered(plant, "press-1")
        await alerts.fire("zu heiß", "press-1", text="83,5 °C")
        async with asyncio.timeout(PATIENCE):
            envelopes = [await mailbox.mails.get() for _ in range(2)]
        for envelope in envelopes:
            assert (envelope.mail_from, envelope.rcpt_tos) == ("iiot@example.com", ["a@example.com", "b@example.com"])
        first, second = (email.message_from_bytes(envelope.content, policy=email.policy.default) for envelope in envelopes)
        assert first["Message-ID"] == second["Message-ID"]
        assert (second["Subject"], second["From"]) == ("zu heiß: 1 firing", "iiot@example.com")
        assert second["To"] == "a@example.com, b@example.com"
        assert second.get_content_type() == "text/plain"
        assert second.get_content().startswith("critical: press-1: 83,5 °C [")
        (item,) = await delivered(plant, 1)
        assert (item["status"], item["tries"], item["form"]) == ("delivered", 2, "email")


async def test_mail_that_nobody_takes_is_given_up(tmp_path: Path) -> None:
    async with mail_server() as (_, url), alerting(tmp_path, QUICK, smtp_url=url, smtp_from="iiot@example.com") as (plant, alerts):
        await told_to(plant, "mailto:a@refused.example.com", form="email")
        await told_to(plant, "mailto:a@refused.example.com,b@example.com", form="email")
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        items = await delivered(plant, 2)
        assert sorted((item["webhook"], item["status"], item["tries"]) for item in items) == [(1, "given_up", 1), (2, "delivered", 1)]
        assert (await plant.ask("POST", "/webhooks/1/test"))[1] == {
            "status": "failed", "http_status": 550, "error": "the server for mail did not take it"
        }  # fmt: skip


async def test_a_password_is_not_sent_in_clear(tmp_path: Path) -> None:
    """127.0.0.1 is this machine; that the server there has no TLS is told for any other name."""
    async with mail_server() as (_, url):
        settings = iiot.Settings(smtp_url=url.replace("//127.0.0.1", "//user:pass@mail.example.com"), smtp_from="iiot@example.com")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", names_for("127.0.0.1"))
            async with iiot.MessageSender.open(settings, QUICK) as sender:
                receiver = iiot.Receiver(1, "email", "mailto:a@example.com", None, None)
                attempt = await sender.send(receiver, "msg_1", MOMENT, iiot.message_of("email", GROUP, 20, ""))
        assert attempt.error == "the server for mail did not take it"


# ---- real peers


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@asynccontextmanager
async def running(*arguments: str, folder: Path) -> AsyncIterator[None]:
    with (folder / "peer.log").open("ab") as output:
        process = await asyncio.create_subprocess_exec(*arguments, cwd=folder, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def ask_peer(client: ClientSession, url: str) -> Any:
    """JSON, once it answers."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                async with client.get(url) as response:
                    if response.status == 200:
                        return await response.json()
            except OSError:
                pass
            await asyncio.sleep(0.05)


@pytest.mark.skipif(ALERTMANAGER is None, reason="there is no prometheus-alertmanager here")
async def test_a_real_alertmanager_takes_alerts_and_their_end(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (tmp_path / "alertmanager.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    flags = ("--config.file=alertmanager.yml", "--storage.path=data", f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=")
    async with running(str(ALERTMANAGER), *flags, folder=tmp_path), alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        client = plant.client
        await ask_peer(client, f"{url}/api/v2/status")
        await told_to(plant, url, form="alertmanager")
        await told_to(plant, hook.url)
        await registered(plant, "press-1", "press-2")
        await alerts.fire("zu heiß", "press-1", "press-2", text="83,5 °C", value=83.5, labels={"a-b": "c", "line": "3"})
        told = {alert["fingerprint"]: alert for alert in (await hook.next()).json["alerts"]}
        async with asyncio.timeout(PATIENCE):
            while len(shown := await ask_peer(client, f"{url}/api/v2/alerts")) < 2:
                await asyncio.sleep(0.05)
        assert {alert["fingerprint"] for alert in shown} == set(told), "it knows them by the same numbers"
        for alert in shown:
            ours = told[alert["fingerprint"]]
            assert (alert["labels"], alert["annotations"]) == (ours["labels"], ours["annotations"])
            assert iiot.parse_rfc3339(alert["startsAt"]) == iiot.parse_rfc3339(ours["startsAt"])
            assert alert["status"]["state"] == "active"
        await alerts.resolve("zu heiß", "press-1")
        async with asyncio.timeout(PATIENCE):
            while [alert["labels"]["device"] for alert in await ask_peer(client, f"{url}/api/v2/alerts")] != ["press-2"]:
                await asyncio.sleep(0.05)
        assert {item["error"] for item in await delivered(plant, 4)} == {None}


@pytest.mark.skipif(IRC_RELAY is None, reason="there is no alertmanager-irc-relay here")
async def test_a_real_receiver_of_alertmanagers_takes_the_payload(tmp_path: Path) -> None:
    """It says in a channel of IRC what a webhook tells it."""
    said: asyncio.Queue[str] = asyncio.Queue()

    async def serve_irc(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = "relay"
        while line := (await reader.readline()).decode().strip():
            word, _, rest = line.partition(" ")
            if word == "NICK":
                name = rest
            elif word == "USER":
                writer.write(f":irc 001 {name} :welcome\r\n".encode())
            elif word == "PING":
                writer.write(f":irc PONG irc {rest}\r\n".encode())
            elif word == "JOIN":
                writer.write(f":{name}!u@h JOIN {rest}\r\n".encode())
            elif word in ("PRIVMSG", "NOTICE") and rest.startswith("#"):
                await said.put(rest)
        writer.close()

    irc = await asyncio.start_server(serve_irc, "127.0.0.1", 0)
    port, irc_port = free_port(), irc.sockets[0].getsockname()[1]
    template = "{{ .Labels.alertname }} on {{ .Labels.device }} is {{ .Status }}: {{ .Annotations.summary }}"
    (tmp_path / "relay.yml").write_text(
        f"http_host: 127.0.0.1\nhttp_port: {port}\nirc_host: 127.0.0.1\nirc_port: {irc_port}\nirc_use_ssl: no\nirc_nickname: relay\n"
        f"irc_realname: relay\nirc_channels: [{{name: \"#plant\"}}]\nmsg_once_per_alert_group: no\nuse_privmsg: yes\n"
        f"msg_template: \"{template}\"\n"
    )  # fmt: skip
    relay = running(str(IRC_RELAY), "--config", "relay.yml", folder=tmp_path)
    async with irc, relay, alerting(tmp_path, QUICK) as (plant, alerts):
        await told_to(plant, f"http://127.0.0.1:{port}/plant")
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1", text="press-1 is at 83.5")
        async with asyncio.timeout(PATIENCE):
            assert await said.get() == "#plant :hot on press-1 is firing: press-1 is at 83.5"
            await alerts.resolve("hot", "press-1")
            assert await said.get() == "#plant :hot on press-1 is resolved: press-1 is at 83.5"
        assert {item["status"] for item in await delivered(plant, 2)} == {"delivered"}
