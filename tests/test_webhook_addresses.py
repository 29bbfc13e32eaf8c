"""Where notifications may be sent: addresses in every spelling, and names whatever they stand for, at the moment of each connection."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import attrs
import plant as plants
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from receivers import LOCAL, alerting, receiver, told_to
from yarl import URL

import iiot

EVERYTHING = iiot.networks("0.0.0.0/0,::/0")
FORBIDDEN = "its address is in a network that may not be reached (--webhook-networks)"
QUICK = attrs.evolve(
    iiot.Limits(), notice_pause_seconds=0.01, notice_seconds_most=0.2, redelivery_seconds=0.05, redelivery_seconds_most=0.1
)

# Ways to write an address that is inside, and the address of IPv4 that each stands for.
INSIDE = {
    "127.0.0.1": "127.0.0.1", "127.1": "127.0.0.1", "127.0.1": "127.0.0.1", "2130706433": "127.0.0.1", "0x7f000001": "127.0.0.1",
    "0X7F.1": "127.0.0.1", "0177.0.0.1": "127.0.0.1", "017700000001": "127.0.0.1", "10.0.0.1": "10.0.0.1", "10.1": "10.0.0.1",
    "0xa.0.0.1": "10.0.0.1", "172.16.5": "172.16.0.5", "192.168.0.1.": "192.168.0.1", "100.64.0.1": "100.64.0.1",
    "[::ffff:10.0.0.1]": "10.0.0.1", "[::ffff:a00:1]": "10.0.0.1", "[64:ff9b::10.0.0.1]": "10.0.0.1", "[64:ff9b::7f00:1]": "127.0.0.1",
    "[2002:7f00:1::]": "127.0.0.1", "[2002:a00:1::1]": "10.0.0.1",
}  # fmt: skip
# Inside, and no address of IPv4.
INSIDE_6 = [
    "[::1]", "[fd00::1]", "[fc00:1::1]", "[fec0::1]", "[::10.0.0.1]", "[2001:db8::1]", "[100::1]", "[2001::1]", "[64:ff9b:1::a00:1]"
]  # fmt: skip
# Nobody may name a network of these.
NEVER = [
    "169.254.169.254", "0xa9fea9fe", "2852039166", "169.254.1", "[fe80::1]", "[fe80::1%25eth0]", "[febf::1]", "0.0.0.0", "0", "0.0.0.1",
    "[::]", "224.0.0.1", "239.1.2.3", "[ff02::1]", "255.255.255.255", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::]", "[::ffff:0.0.0.0]",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "134744072", "1.1", "[2606:4700:4700::1111]", "[64:ff9b::808:808]", "[2002:808:808::]", "[::ffff:8.8.8.8]"]
NAMES = ["example.com", "localhost", "fade.cafe", "0x.example", "1.2.3.4.5", "256.1.1.1", "08.1.1.1", "4294967296", "a", "1.2.3.4x", ""]


def address(host: str) -> iiot.Address:
    found = iiot.address_of(host.replace("%25", "%"))
    assert found is not None, host
    return found


@pytest.mark.parametrize(("host", "inner"), INSIDE.items())
def test_an_address_is_seen_in_every_spelling(host: str, inner: str) -> None:
    found = address(host)
    assert iiot.seen_through(found)[-1] == ipaddress.ip_address(inner)
    assert not iiot.may_reach(found, ())
    assert iiot.may_reach(found, iiot.networks(f"{inner}/32,64:ff9b::/96,2002::/16"))
    assert iiot.may_reach(found, EVERYTHING)


@pytest.mark.parametrize("host", INSIDE_6)
def test_an_address_inside_needs_its_network(host: str) -> None:
    assert not iiot.may_reach(address(host), ())
    assert iiot.may_reach(address(host), iiot.networks(f"{address(host)}/128,10.0.0.0/8"))


@pytest.mark.parametrize("host", NEVER)
def test_some_addresses_are_never_reached(host: str) -> None:
    assert not iiot.may_reach(address(host), ())
    assert not iiot.may_reach(address(host), EVERYTHING)


@pytest.mark.parametrize("host", PUBLIC)
def test_a_public_address_may_be_reached(host: str) -> None:
    assert iiot.may_reach(address(host), ())


@pytest.mark.parametrize("host", NAMES)
def test_a_name_is_no_address(host: str) -> None:
    assert iiot.address_of(host) is None


@given(st.ip_addresses(v=4))
def test_every_address_is_judged_alike_in_every_spelling(plain: ipaddress.IPv4Address) -> None:
    number = int(plain)
    head, rest = number >> 24, number & 0xFFFFFF
    for host in (str(number), hex(number), oct(number).replace("o", ""), f"{head}.{rest}", f"{head:#x}.{rest >> 16}.{rest & 0xFFFF}"):
        assert iiot.address_of(host) == plain
        assert socket.inet_aton(host) == plain.packed, "as the system reads it"
    for inner in (f"::ffff:{plain}", f"64:ff9b::{number >> 16:x}:{number & 0xFFFF:x}"):
        assert iiot.may_reach(address(inner), ()) == iiot.may_reach(plain, ())


@given(st.text(alphabet="0123456789abcdefx.", min_size=1, max_size=16))
def test_what_the_system_takes_for_an_address_is_one(host: str) -> None:
    try:
        packed = socket.inet_aton(host)
    except OSError:
        return
    assert iiot.address_of(host) == ipaddress.IPv4Address(packed)


@given(st.ip_addresses(v=6))
def test_nothing_but_what_is_given_out_is_public(one: ipaddress.IPv6Address) -> None:
    assume(one.ipv4_mapped is None and one not in iiot.NAT64)
    if iiot.may_reach(one, ()):
        assert one in iiot.GLOBAL_UNICAST
        assert one.is_global


@pytest.mark.parametrize("host", [*INSIDE, *INSIDE_6, *NEVER, "%31%32%37.0.0.1", "\uff11\uff12\uff17.0.0.1", "\u2460\u2461\u2466.0.0.1"])
def test_an_address_that_is_written_down_is_refused_at_once(host: str) -> None:
    """Except that what the library takes for no address at all is refused as that."""
    new = iiot.NewWebhook(f"http://{host}:8080/hook")
    with pytest.raises(iiot.Refusal) as refused:
        iiot.check_webhook(new, (), iiot.Limits(), mail=False)
    assert [error.path for error in refused.value.errors] == ["url"]


def answers(*hosts: str) -> Any:
    """Stands in the place of `getaddrinfo`."""

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (each, port, 0, 0)) if ":" in each
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in hosts
        ]

    return look_up


@pytest.mark.parametrize("inside", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1"])
async def test_a_name_that_resolves_inside_is_seen_through(tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with alerting(tmp_path, QUICK, webhook_networks="") as (plant, _):
        await told_to(plant, "http://innocent.example.com:9/")
        monkeypatch.setattr(socket, "getaddrinfo", answers(inside))
        _, body = await plant.ask("POST", "/webhooks/1/test")
        assert body == {"status": "failed", "http_status": None, "error": FORBIDDEN}


async def test_a_name_is_looked_up_once_for_a_connection_and_anew_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two addresses the one that may be reached is taken; a name that is another's the next time is seen then."""
    asked = []
    async with alerting(tmp_path, QUICK) as (plant, _), receiver() as hook:
        await told_to(plant, hook.url.replace("127.0.0.1", "innocent.example.com"))
        real = answers("10.0.0.1", "127.0.0.1")

        def look_up(host: str, *rest: Any, **more: Any) -> list[Any]:
            asked.append(host)
            return list(real(host, *rest, **more))

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["status"] == "delivered"
        assert asked == ["innocent.example.com"]
        assert hook.posts[0].headers["Host"].startswith("innocent.example.com:")
        real = answers("10.0.0.1")
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["error"] == FORBIDDEN
        assert len(hook.posts) == 1


async def test_the_last_look_is_at_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if all before it were wrong."""
    monkeypatch.setattr(iiot, "target_of", lambda url, form: URL(url))
    settings = iiot.Settings()
    async with receiver() as hook, iiot.MessageSender.open(settings, QUICK) as sender:
        message = iiot.Message({}, "{}")
        monkeypatch.setattr(iiot, "address_of", lambda host: None if host == "127.0.0.1" else ipaddress.ip_address(host))
        attempt = await sender.send(iiot.Receiver(1, "slack", hook.url, None, None), "msg_1", 0, message)
        assert attempt.error == FORBIDDEN
        assert hook.posts == []


async def test_a_name_that_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    async with alerting(tmp_path, QUICK) as (plant, _):
        await told_to(plant, "http://nowhere.example.com:9/")
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["error"] == "its name is not known"


async def test_a_lookup_that_hangs_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, hang = answers("127.0.0.1"), threading.Event()

    def look_up(host: str, *rest: Any, **more: Any) -> list[Any]:
        if host.startswith("slow"):
            hang.wait(plants.PATIENCE)
        return list(real(host, *rest, **more))

    async with alerting(tmp_path, attrs.evolve(QUICK, delivery_seconds=1.0, lookups=2)) as (plant, _), receiver() as hook:
        for name in ("slow-1", "slow-2", "quick"):
            await told_to(plant, hook.url.replace("127.0.0.1", name))
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["error"] == "it did not answer within 1 s"
        assert (await plant.ask("POST", "/webhooks/3/test"))[1]["status"] == "delivered"
        assert (await plant.ask("POST", "/webhooks/2/test"))[1]["error"] == "it did not answer within 1 s"
        assert (await plant.ask("POST", "/webhooks/3/test"))[1]["status"] == "failed", "there is a bound"
        hang.set()
        async with asyncio.timeout(plants.PATIENCE):
            while (await plant.ask("POST", "/webhooks/3/test"))[1]["status"] != "delivered":
                await asyncio.sleep(0.01)


async def test_a_network_that_is_named_is_reached_and_no_other(tmp_path: Path) -> None:
    async with alerting(tmp_path, QUICK, webhook_networks=f"{LOCAL},10.1.0.0/16") as (plant, _), receiver() as hook:
        await told_to(plant, hook.url)
        await told_to(plant, "http://10.1.2.3/")
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["status"] == "delivered"
        assert (await plant.ask("POST", "/webhooks", {"url": "http://10.2.0.1/"}))[0] == 422


async def test_a_network_that_is_named_no_more_is_reached_no_more(tmp_path: Path) -> None:
    async with receiver() as hook:
        async with alerting(tmp_path, QUICK) as (plant, _):
            await told_to(plant, hook.url)
        async with alerting(tmp_path, QUICK, webhook_networks="") as (plant, _):
            assert (await plant.ask("POST", "/webhooks/1/test"))[1]["error"] == FORBIDDEN
        assert hook.posts == []


async def test_no_secret_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with alerting(tmp_path, attrs.evolve(QUICK, given_up_seconds=0.0, given_up_tries=1)) as (plant, alerts), receiver() as hook:
        hook.answers = [500]
        url = hook.url.replace("//", "//user:pa55word@") + "/t0ken"
        secret = (await told_to(plant, url))["secret"]
        await plant.register("press-1")
        await alerts.fire("hot", "press-1")
        await plant.until("/notifications", lambda body: body["items"] and body["items"][0]["status"] == "given_up")
        text = "\n".join(record.getMessage() for record in caplog.records if record.name != "aiohttp.access")  # the receiver's own
        assert "receiver 1" in text
        for word in ("pa55word", "t0ken", secret):
            assert word not in text
        assert "pa55word" not in str(await plant.get("/webhooks"))
        status, audit = await plant.ask("GET", "/audit")
        assert (status, "pa55word" in str(audit), secret in str(audit)) == (200, False, False)
    assert iiot.redacted(f"x {secret} smtp://user:pa55@host y") == "x whsec_… smtp://user:…@host y"
    assert iiot.redacted("https://t0ken@host/a https://:t0ken@host/") == "https://…@host/a https://:…@host/"


async def test_a_receiver_with_a_certificate_that_nobody_vouches_for_is_not_trusted(tmp_path: Path) -> None:
    chain, key = await plants.certificate(tmp_path, "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / chain, tmp_path / key)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server, alerting(tmp_path, QUICK) as (plant, _):
        await told_to(plant, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        assert (await plant.ask("POST", "/webhooks/1/test"))[1]["error"] == "its certificate is not valid"
