"""Notifications where things go wrong: receivers that answer badly, a clock that jumps, faults of our own; and what other programs of this
kind were reported to do wrong."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from aiosmtpd import smtp
from plant import PATIENCE
from readme import blocks, section, table
from receivers import alerting, receiver, told_to
from test_notifications import MOMENT, QUICK, Mailbox, delivered, forever, names_for, registered

import iiot

DAY = 86_400_000


# ---- what the page says


def test_the_page_says_when_it_is_tried_and_given_up() -> None:
    limits, page = iiot.Limits(), " ".join(section("Notifications").text.split())
    usual = iiot.NewWebhook("https://example.com")
    for told in (
        f"One try takes at most {limits.delivery_seconds:.0f} s.",
        f"after {limits.redelivery_seconds:.0f} s, then after twice as long, at most {limits.redelivery_seconds_most / 60:.0f} minutes",
        "`Retry-After` of the answer counts, up to an hour.", f"after {limits.given_up_seconds / 3_600:.0f} hours",
        f"(and at least {limits.given_up_tries} tries)", f"after {limits.unwanted_tries} tries", "is listed for 30 days",
        f"The old one signs too for {limits.old_secret_seconds / 3_600:.0f} hours", f"A text shows at most {limits.alert_lines} alerts",
        f"shows at most {limits.alerts_shown} alerts", f"When {limits.notifications_waiting:,} notifications wait",
        f"at least {limits.repeat_seconds_least:.0f} s",
        *(f"default: `{iiot.duration_text(span)}`" for span in (usual.wait, usual.interval, usual.repeat)),
    ):  # fmt: skip
        assert told in page
    assert (limits.retry_after_seconds_most, limits.notification_days) == (3_600, 30)
    assert [row[0] for row in table(section("Notifications").text, "form")] == list(iiot.WEBHOOK_FORMS)
    fields = {row[0] for row in table(section("Notifications").text, "field")}
    assert fields == {field.name for field in attrs.fields(iiot.NewWebhook)}


async def test_the_page_s_function_knows_what_is_genuine(tmp_path: Path) -> None:
    (program,) = blocks("Notifications", "python")
    named: dict[str, Any] = {}
    exec(program, named)
    async with alerting(tmp_path, QUICK) as (plant, _), receiver() as hook:
        secret = (await told_to(plant, hook.url))["secret"]
        await plant.ask("POST", "/webhooks/1/test")
        renewed = (await plant.ask("POST", "/webhooks/1/secret"))[1]["secret"]
        await plant.ask("POST", "/webhooks/1/test")
    first, second = hook.posts
    for post, right, wrong in ((first, [secret], [renewed]), (second, [secret, renewed], [iiot.new_webhook_secret()])):
        headers = {name.lower(): value for name, value in post.headers.items()}
        assert all(named["is_genuine"](each, headers, post.body) for each in right)
        assert not any(named["is_genuine"](each, headers, post.body) for each in wrong)
        assert not named["is_genuine"](right[0], headers, post.body + b" ")


# ---- receivers that answer badly


@asynccontextmanager
async def raw_server(answer: Callable[[asyncio.StreamWriter], Awaitable[None]], **options: Any) -> AsyncIterator[str]:
    """The address of a server that answers each request by its own means, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
        except OSError:
            pass  # the other side has gone
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, **options)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


async def byte_by_byte(writer: asyncio.StreamWriter, text: bytes) -> None:
    while not writer.is_closing():
        for byte in text:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.01)


async def whole_answer_byte_by_byte(writer: asyncio.StreamWriter) -> None:
    await byte_by_byte(writer, b"HTTP/1.1 200 OK\r\n" + b"X-More: " + b"x" * 1_000)


async def body_byte_by_byte(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    await byte_by_byte(writer, b"x")


async def half_a_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nx")
    await writer.drain()


async def half_a_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    await writer.drain()


async def nothing(writer: asyncio.StreamWriter) -> None:
    return


async def endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"X-More: " + b"x" * 8_000 + b"\r\n")
        await writer.drain()


async def no_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example.com ESMTP\r\n")
    await writer.drain()


async def headers_of_its_own(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nRetry-After: \xff\r\nContent-Length: 5\r\n\r\nhello")
    await writer.drain()


SLOW, BROKEN = "it did not answer within 0.3 s", "the connection broke, or the answer was no HTTP"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (whole_answer_byte_by_byte, SLOW), (body_byte_by_byte, None), (half_a_body, None), (half_a_head, BROKEN), (nothing, BROKEN),
        (endless_head, BROKEN), (no_http, BROKEN), (headers_of_its_own, None),
    ],
)  # fmt: skip
async def test_what_is_made_of_an_answer_that_is_none(
    tmp_path: Path, answer: Callable[[asyncio.StreamWriter], Awaitable[None]], error: str | None
) -> None:
    """By the status it is known whether a notification was taken, whatever becomes of the rest."""
    seconds = 0.3 if error == SLOW else PATIENCE
    limits = attrs.evolve(QUICK, delivery_seconds=seconds, answer_seconds=0.1, redelivery_seconds=3_600.0)
    async with raw_server(answer) as url, alerting(tmp_path, limits) as (plant, alerts):
        await told_to(plant, url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        body = await plant.until("/notifications", lambda body: body["items"] and body["items"][0]["tries"])
        (item,) = body["items"]
        assert (item["error"], item["status"], item["tries"]) == (error, "waiting" if error else "delivered", 1)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_what_a_receiver_does_not_want_keeps_the_next_waiting_for_a_while_only(tmp_path: Path, status: int) -> None:
    async with alerting(tmp_path, attrs.evolve(QUICK, unwanted_tries=3)) as (plant, alerts), receiver() as hook:
        hook.answers = [status] * 3
        await told_to(plant, hook.url, group_by="device")
        await registered(plant, "press-1", "press-2")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.fire("hot", "press-2")
        second, first = await delivered(plant, 2)
        assert (first["status"], first["tries"], first["error"]) == ("given_up", 3, f"it answered {status}")
        assert (second["status"], second["tries"]) == ("delivered", 1)


@pytest.mark.parametrize(
    ("status", "tries", "hours", "given_up"),
    [
        (503, 1, 1, False), (503, 9, 1e6, False), (503, 10, 1e6, True), (503, 500, 23, False), (400, 4, 1, False), (400, 5, 0, True),
        (404, 50, 1, False), (410, 1, 0, True), (200, 99, 1e6, False),
    ],
)  # fmt: skip
def test_when_a_notification_is_given_up(status: int, tries: int, hours: float, given_up: bool) -> None:  # noqa: FBT001
    """That a clock was set forward is no reason: it has to be tried some times."""
    attempt = iiot.judged_answer(status, None, MOMENT / 1000)
    assert iiot.is_given_up(attempt, tries, hours * 3_600, iiot.Limits()) is given_up


async def test_many_that_fail_stand_before_no_other(tmp_path: Path) -> None:
    """Each of theirs is new, as those before were given up; they are due for long."""
    limits = attrs.evolve(QUICK, deliveries=1, failing_deliveries=1, delivery_seconds=0.2, given_up_seconds=0.0, given_up_tries=1)
    async with alerting(tmp_path, limits) as (plant, alerts), receiver() as hanging, receiver() as hook:
        hanging.answers = [forever] * 10_000
        names = [f"press-{number}" for number in range(50)]
        await registered(plant, *names, "pump-1")
        for _ in range(4):
            await told_to(plant, hanging.url, group_by="device", match="press-*")
        await told_to(plant, hook.url, match="pump-*")
        await alerts.fire("hot", *names)
        for _ in range(8):
            await hanging.next()
        await alerts.fire("hot", "pump-1")
        assert (await hook.next()).devices == {"pump-1": "firing"}
        for number in range(1, 5):
            assert (await plant.get(f"/notifications?webhook={number}&status=waiting"))["items"], "those others have much to come"


async def test_an_address_is_used_as_it_is_written(tmp_path: Path) -> None:
    """One that is signed, say: https://github.com/home-assistant/core and others were told that it was written anew."""
    path = "/workflows/a%2Fb/%7Ex//c;v=1/./x?sp=%2Ftriggers%2Fmanual&sv=1.0&sig=a%2Bb%3D&x=%20y+z"
    async with alerting(tmp_path, QUICK) as (plant, _), receiver() as hook:
        await told_to(plant, hook.url + path)
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["status"] == "delivered"
        assert hook.posts[0].path == path
        await told_to(plant, hook.url + "/ä b?c=ö#fragment")
        assert (await plant.ask("POST", "/webhooks/2/test"))[1]["status"] == "delivered"
        assert hook.posts[1].path == "/%C3%A4%20b?c=%C3%B6"


async def test_a_storm_of_groups_is_told_as_fast_as_it_is_taken(tmp_path: Path) -> None:
    """However long the time between two notifications of a group is: for most of them it is the first."""
    async with alerting(tmp_path, attrs.evolve(QUICK, notifications_waiting=3)) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, group_by="device", interval="1h")
        names = [f"press-{number:02}" for number in range(40)]
        await registered(plant, *names)
        await alerts.fire("hot", *names)
        assert sorted([next(iter((await hook.next()).devices)) for _ in names]) == names
        assert len(await delivered(plant, 40)) == 40


# ---- faults of our own, and a clock that jumps


async def test_a_group_that_cannot_be_told_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, faults = iiot.message_of, [KeyError("a fault"), iiot.Refusal("query_too_slow")]

    def message_of(form: str, group: iiot.AlertGroup, *rest: Any) -> iiot.Message:
        if group.key == "bad" and faults:
            raise faults.pop()
        return real(form, group, *rest)

    monkeypatch.setattr(iiot, "message_of", message_of)
    async with alerting(tmp_path, attrs.evolve(QUICK, retry_seconds=0.05)) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("bad", "press-1")
        await alerts.fire("good", "press-1")
        assert [(await hook.next()).json["commonLabels"]["alertname"] for _ in range(2)] == ["good", "bad"]
    told = [(record.getMessage(), record.exc_info is not None) for record in caplog.records if "receiver 1 of 'bad'" in record.getMessage()]
    assert [has_trace for _, has_trace in told] == [False, True]


async def test_a_receiver_for_whom_nothing_can_be_found_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = iiot.NotificationReads.fresh

    async def fresh(self: iiot.NotificationReads, tenant: int, webhook_id: int, *rest: Any) -> iiot.Fresh:
        if webhook_id == 1:
            raise iiot.Refusal("query_too_slow")
        return await real(self, tenant, webhook_id, *rest)

    monkeypatch.setattr(iiot.NotificationReads, "fresh", fresh)
    async with alerting(tmp_path, attrs.evolve(QUICK, retry_seconds=0.05)) as (plant, alerts), receiver() as hook:
        await told_to(plant, f"{hook.url}/1")
        await told_to(plant, f"{hook.url}/2")
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        assert (await hook.next()).path == "/2"
        monkeypatch.undo()
        assert (await hook.next()).path == "/1"


async def test_the_dispatcher_goes_on_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, faults = iiot.NotificationReads.watchers, [RuntimeError("a fault")] * 3

    async def watchers(self: iiot.NotificationReads) -> list[iiot.Watcher]:
        if faults:
            raise faults.pop()
        return await real(self)

    monkeypatch.setattr(iiot.NotificationReads, "watchers", watchers)
    async with alerting(tmp_path, attrs.evolve(QUICK, retry_seconds=0.02)) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        assert (await hook.next()).devices == {"press-1": "firing"}
        assert not faults
        assert (await plant.get("/healthz"))["status"] == "ok"


async def test_a_fault_while_sending_is_tried_again_later_and_not_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, faults = iiot.MessageSender._post, [RuntimeError("can't start new thread"), KeyError("x")]

    async def post(*arguments: Any) -> iiot.Attempt:
        if faults:
            raise faults.pop()
        return await real(*arguments)

    monkeypatch.setattr(iiot.MessageSender, "_post", post)
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1")
        await alerts.fire("hot", "press-1")
        await hook.next()
        (item,) = await delivered(plant, 1)
        assert item["tries"] == 3


async def test_a_clock_that_was_ahead_when_the_server_ran_before_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with receiver() as hook:
        async with alerting(tmp_path, QUICK) as (plant, alerts):
            await told_to(plant, hook.url)
            await registered(plant, "press-1", "press-2")
            await alerts.fire("hot", "press-1")
            await hook.next()
            await delivered(plant, 1)
        ahead = iiot.now_ms() + 365 * DAY
        with plants.writing(plant.database) as connection:
            connection.execute("update alert_group set told_at = ?, due_at = ?", (ahead, ahead + DAY))
            connection.execute("update notice set told_at = ?", (ahead,))
        async with alerting(tmp_path, QUICK) as (plant, alerts):
            await alerts.fire("hot", "press-2")
            assert set((await hook.next()).devices) == {"press-1", "press-2"}
            await alerts.resolve("hot", "press-1", "press-2")
            assert set((await hook.next()).devices.values()) == {"resolved"}
        assert hook.unread == 0


async def test_a_clock_that_is_set_back_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ahead = iiot.now_ms, [365 * DAY]
    monkeypatch.setattr(iiot, "now_ms", lambda: real() + ahead[0])
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        hook.answers = [200, 500]
        await told_to(plant, hook.url, repeat="30d", interval="20ms")
        await registered(plant, "press-1", "press-2")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await delivered(plant, 1)
        ahead[0] = 0
        await alerts.fire("hot", "press-2")
        posts = [await hook.next() for _ in range(2)]
        assert all(set(post.devices) == {"press-1", "press-2"} for post in posts)
        await delivered(plant, 2)
        assert hook.unread == 0


# ---- what alerts say


NASTY = [
    'a"b\n', "x\r\nX-Injected: 1", "\x00\x01\x7f", "ünïcödé 机器 🔥", "\u2028\u2029\x85", "=?utf-8?q?x?=", "<!channel> *bold* `code`",
    "a" * 128, "{{ .Labels }}", "%0d%0aX-Injected: 1", "\u202egnp.exe",
]  # fmt: skip


@pytest.mark.parametrize("form", ["webhook", "ntfy", "slack", "alertmanager"])
async def test_names_and_texts_of_every_kind_arrive(tmp_path: Path, form: str) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, form=form)
        await registered(plant, "press-1")
        for text in NASTY:
            await alerts.fire(text, "press-1", text=text, metric=text, value=text, labels={text: text} if text.isprintable() else {})
        posts = [await hook.next() for _ in NASTY]
        assert all(item["status"] == "delivered" for item in await delivered(plant, len(NASTY)))
        assert not [name for post in posts for name in post.headers if "injected" in name.lower()]
        for post in posts:
            if form == "webhook":
                (alert,) = post.json["alerts"]
                assert alert["annotations"]["summary"] == alert["annotations"]["value"] == alert["labels"]["metric"]
            assert all(value.isprintable() for value in post.headers.values())
            assert form != "slack" or not {"<", ">"} & set(post.json["text"])


async def test_labels_that_group_may_hold_anything(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url, group_by="label:line")
        await registered(plant, "press-1")
        texts = [text for text in NASTY if text.isprintable()]  # others are refused
        for number, text in enumerate(texts):
            await alerts.fire(f"hot {number}", "press-1", labels={"line": text})
        keys = {(await hook.next()).json["groupLabels"]["line"] for _ in texts}
        assert keys == set(texts)
        for number in range(len(texts)):
            await alerts.resolve(f"hot {number}", "press-1")
        assert {(await hook.next()).json["groupLabels"]["line"] for _ in texts} == keys
        assert plants.rows(plant.database, "select 1 from alert_group union all select 1 from notice") == []
        assert hook.unread == 0


async def test_a_notification_is_not_too_large(tmp_path: Path) -> None:
    limits = attrs.evolve(QUICK, notification_bytes=20_000)
    async with alerting(tmp_path, limits) as (plant, alerts), receiver() as hook, receiver() as other:
        await told_to(plant, hook.url, wait="200ms")
        await told_to(plant, other.url, form="alertmanager", wait="200ms")
        names = [f"press-{number:02}" for number in range(40)]
        await registered(plant, *names)
        await alerts.fire("hot", *names, text="x" * 1_000)
        post = await hook.next()
        assert len(post.body) <= 20_000
        assert post.json["truncatedAlerts"] == 40 - len(post.json["alerts"]) > 0
        shown = set[str]()
        while len(shown) < 40:
            post = await other.next()
            assert len(post.body) <= 20_000
            shown |= {alert["labels"]["device"] for alert in post.json}
        assert sorted(shown) == names


# ---- who is told


@pytest.mark.parametrize("filters", [{"rule": "hot"}, {"severity": "critical"}])
async def test_who_is_not_told_that_a_device_is_offline_is_told_of_the_rest(tmp_path: Path, filters: dict[str, str]) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook, receiver() as everything:
        await told_to(plant, hook.url, **filters)
        await told_to(plant, everything.url)
        await registered(plant, "press-1")
        await alerts.fire("gone", "press-1", kind="offline", severity="warning", metric=None)
        await alerts.fire("hot", "press-1")
        assert (await hook.next()).json["commonLabels"]["alertname"] == "hot"
        assert (await everything.next()).json["commonLabels"]["alertname"] == "gone"
        await alerts.resolve("hot", "press-1")
        assert (await hook.next()).json["status"] == "resolved"
        await delivered(plant, 3)
        assert everything.unread == 0


async def test_what_was_resolved_while_the_server_was_down_is_told(tmp_path: Path) -> None:
    async with receiver() as hook:
        async with alerting(tmp_path, QUICK) as (plant, alerts):
            await told_to(plant, hook.url)
            await registered(plant, "press-1")
            await alerts.fire("hot", "press-1")
            await hook.next()
            await delivered(plant, 1)
        with plants.writing(plant.database) as connection:
            connection.execute("update alert set resolved_at = ?, reason = 'the rule was deleted'", (iiot.now_ms(),))
        async with alerting(tmp_path, QUICK) as (plant, alerts):
            assert (await hook.next()).devices == {"press-1": "resolved"}
            await delivered(plant, 2)
        assert hook.unread == 0


async def test_what_fires_resolves_and_fires_again_under_a_silence_is_told_as_it_is_after_it(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook:
        await told_to(plant, hook.url)
        await registered(plant, "press-1", "press-2")
        await alerts.fire("hot", "press-1", "press-2")
        await hook.next()
        await alerts.silence("press-*")
        await alerts.resolve("hot", "press-1", "press-2")
        await alerts.fire("hot", "press-1")
        await alerts.change("delete from silence")
        post = await hook.next()
        assert sorted((alert["labels"]["device"], alert["status"]) for alert in post.json["alerts"]) == [
            ("press-1", "firing"), ("press-1", "resolved"), ("press-2", "resolved"),
        ]  # fmt: skip
        await delivered(plant, 2)
        assert hook.unread == 0


async def test_that_it_is_over_is_told_once_however_short_the_times_are(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK) as (plant, alerts), receiver() as hook, receiver() as clock:
        await told_to(plant, hook.url, rule="hot", repeat="20ms")
        await told_to(plant, clock.url, rule="tick", repeat="20ms")
        await registered(plant, "press-1")
        await alerts.fire("tick", "press-1")
        await alerts.fire("hot", "press-1")
        await hook.next()
        await alerts.resolve("hot", "press-1")
        while (await hook.next()).json["status"] == "firing":
            pass
        for _ in range(clock.unread + 10):
            await clock.next()
        assert hook.unread == 0


# ---- mail


@asynccontextmanager
async def mail_server_with_tls(folder: Path) -> AsyncIterator[tuple[Mailbox, str]]:
    """As Debian installs one: it offers TLS, with a certificate that nobody vouches for."""
    chain, key = await plants.certificate(folder, "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / chain, folder / key)
    mailbox = Mailbox()
    server = await asyncio.get_running_loop().create_server(lambda: smtp.SMTP(mailbox, tls_context=context), "127.0.0.1", 0)
    try:
        yield mailbox, f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_a_mail_server_on_this_machine_needs_no_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = iiot.message_of("email", iiot.AlertGroup(1, "alertname", "hot", MOMENT, 1, 1, 0, ()), 20, "")
    receiver = iiot.Receiver(1, "email", "mailto:a@example.com", None, None)
    async with mail_server_with_tls(tmp_path) as (mailbox, url):
        async with iiot.MessageSender.open(iiot.Settings(smtp_url=url, smtp_from="iiot@example.com"), QUICK) as sender:
            assert (await sender.send(receiver, "msg_1", MOMENT, message)).error is None
        envelope = await mailbox.mails.get()
        assert envelope.rcpt_tos == ["a@example.com"]
        monkeypatch.setattr(socket, "getaddrinfo", names_for("127.0.0.1"))
        away = iiot.Settings(smtp_url=url.replace("127.0.0.1", "user:pass@mail.example.com"), smtp_from="iiot@example.com")
        async with iiot.MessageSender.open(away, QUICK) as sender:
            assert (await sender.send(receiver, "msg_1", MOMENT, message)).error == "its certificate is not valid"
    async with iiot.MessageSender.open(attrs.evolve(away, smtp_url="smtp://mail.example.com:1"), QUICK) as sender:
        assert (await sender.send(receiver, "msg_1", MOMENT, message)).error == "no connection could be made"


async def test_a_mail_server_whose_name_is_looked_up_for_long_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the server does on threads goes on."""
    limits = attrs.evolve(QUICK, delivery_seconds=PATIENCE, webhook_tests=40, stop_close_seconds=0.1)
    async with alerting(tmp_path, limits, smtp_url="smtp://mail.example.com", smtp_from="iiot@example.com") as (plant, _):
        real, asked = socket.getaddrinfo, list[str]()

        def look_up(host: str, *rest: Any, **more: Any) -> Any:
            if host == "mail.example.com":
                asked.append(host)
                time.sleep(1)
                raise socket.gaierror(-2, "Name or service not known")
            return real(host, *rest, **more)

        await told_to(plant, "mailto:a@example.com", form="email")
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        tests = [asyncio.create_task(plant.ask("POST", "/webhooks/1/test")) for _ in range(40)]
        async with asyncio.timeout(PATIENCE):
            while len(asked) < 40:
                await asyncio.sleep(0.01)
        assert {body["error"] for _, body in await asyncio.gather(*tests)} == {"no connection could be made"}
