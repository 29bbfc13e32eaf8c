"""Wrong tokens and keys are counted by the network they come from, and slowed; a right one is always heard."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import plant as plants
import pytest
from aiohttp import ClientSession
from hypothesis import example, given
from hypothesis import strategies as st
from plant import PATIENCE, Device, Plant, Process, command

import iiot


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        return False
    return True


HOSTS = ("127.0.0.1", "::1") if has_ipv6() else ("127.0.0.1",)
LOCAL = "127.0.0.1/32,::1"
UNAUTHORIZED, TOO_MANY = "unauthorized", "too_many_attempts"


def few(guesses: int) -> iiot.Limits:
    return attrs.evolve(iiot.Limits(), guesses=guesses)


@attrs.frozen
class Answer:
    """What comes back over HTTP; the time of day is left out."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])

    @property
    def retry_after(self) -> str:
        return dict(self.headers)["Retry-After"]


def forwarding(*lines: str) -> list[tuple[str, str]]:
    return [("X-Forwarded-For", line) for line in lines]


async def ask(plant: Plant, token: str | None, *forwarded: str, path: str = "/whoami") -> Answer:
    """A request with this token, as a proxy passes it on."""
    headers = forwarding(*forwarded)
    if token is not None:
        headers.append(("Authorization", f"Bearer {token}"))
    async with asyncio.timeout(PATIENCE), plant.client.get(plant.url + path, headers=headers) as response:
        shown = tuple((name, value) for name, value in response.headers.items() if name != "Date")
        return Answer(response.status, await response.read(), shown)


async def guess(plant: Plant, *forwarded: str) -> int:
    """The status with which a wrong token is answered."""
    return (await ask(plant, iiot.mint("op").text, *forwarded)).status


async def connect(plant: Plant, *forwarded: str) -> Device:
    return Device(await plant.client.ws_connect(plant.url + "/device", headers=forwarding(*forwarded)))


async def show(plant: Plant, *forwarded: str, **frame: str) -> tuple[str, int | None, str]:
    """All that the socket says to a first frame that is refused: the text of its error frame, close code and reason."""
    device = await connect(plant, *forwarded)
    await device.link.send_json(frame)
    text = await device.link.receive_str()
    closed = await device.closed()
    return text, closed.code, closed.reason


async def guess_at_socket(plant: Plant, *forwarded: str) -> str:
    """The code with which the socket refuses a wrong token; frame and close agree."""
    text, code, reason = await show(plant, *forwarded, type="hello", token=iiot.mint("dev").text)
    return refusal(text, code, reason)


def refusal(text: str, code: int | None, reason: str) -> str:
    frame = json.loads(text)
    fault = iiot.FAULTS[frame["code"]]
    wait = frame.pop("retry_after", None)
    assert (wait is not None and 1 <= wait <= 60) if fault.code == TOO_MANY else wait is None
    assert frame == {"type": "error", "code": fault.code, "message": fault.message}
    assert (code, reason) == (fault.close, fault.message)
    return fault.code


async def provisioning_key(plant: Plant, **body: Any) -> str:
    status, answer = await plant.ask("POST", "/provisioning-keys", body)
    assert status == 201, answer
    return str(answer["key"])


def secret_of(token: str) -> str:
    return token.split("_", 3)[3]


def other_secret(token: str) -> str:
    """The same id, and a secret of the same form."""
    return token.removesuffix(secret_of(token)) + secret_of(iiot.mint("op").text)


# ---- At HTTP


@pytest.mark.parametrize("host", HOSTS)
async def test_so_many_wrong_tokens_are_answered_401_and_those_beyond_429_with_retry_after(tmp_path: Path, host: str) -> None:
    async with plants.plant(tmp_path, few(5), host=host) as plant:
        for _ in range(5):
            answer = await ask(plant, iiot.mint("op").text)
            assert (answer.status, answer.code, dict(answer.headers)["WWW-Authenticate"]) == (401, UNAUTHORIZED, "Bearer")
            assert "Retry-After" not in dict(answer.headers)
        for path in ("/whoami", "/iiot", "/tenants", "/iiot/press-1/telemetry", "/events"):
            answer = await ask(plant, iiot.mint("op").text, path=path)
            assert (answer.status, answer.code) == (429, TOO_MANY)
            assert json.loads(answer.body)["error"]["message"] == iiot.FAULTS[TOO_MANY].message
            assert re.fullmatch("[1-9][0-9]*", answer.retry_after)
            assert int(answer.retry_after) <= 60


async def test_ten_wrong_tokens_a_minute_are_answered_401(plant: Plant) -> None:
    assert [await guess(plant) for _ in range(12)] == [401] * 10 + [429] * 2


@pytest.mark.parametrize("host", HOSTS)
async def test_a_right_token_is_heard_while_its_address_is_slowed(tmp_path: Path, host: str) -> None:
    async with plants.plant(tmp_path, few(2), host=host) as plant:
        await plant.register("press-1")
        held = await plant.device("press-1")
        key = await provisioning_key(plant)
        viewer = plants.admin_token(plant.database, "viewer")
        wrong = await asyncio.gather(*(guess(plant) for _ in range(40)), *(guess_at_socket(plant) for _ in range(10)))
        assert set(wrong[2:]) <= {401, 429, UNAUTHORIZED, TOO_MANY}
        assert await guess(plant) == 429
        right = [ask(plant, token) for token in (plant.token, viewer) * 10]
        statuses = await asyncio.gather(*right, *(ask(plant, other_secret(plant.token)) for _ in range(20)))
        assert [answer.status for answer in statuses] == [200] * 20 + [429] * 20
        await held.store({"values": {"n": 1}})
        again = await plant.device("press-1")
        await again.store({"values": {"n": 2}})
        new = await connect(plant)
        await new.send("provision", key=key, device="press-2")
        await new.hello((await new.expect("credentials"))["token"])
        await new.store({"values": {"n": 1}})
        assert await guess(plant) == 429
        assert await guess_at_socket(plant) == TOO_MANY


async def test_a_right_token_gives_no_guesses_back(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(3)) as plant:
        for expected in (401, 401, 401, 429):
            assert (await ask(plant, plant.token)).status == 200
            assert await guess(plant) == expected


async def test_who_shows_no_token_guesses_none(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1)) as plant:
        for _ in range(20):
            answer = await ask(plant, None)
            assert (answer.status, answer.code) == (401, UNAUTHORIZED)
        assert await guess(plant) == 401
        assert await guess(plant) == 429
        assert (await ask(plant, None)).status == 401


async def test_what_needs_no_token_is_answered_to_an_address_that_is_slowed(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1)) as plant:
        assert [await guess(plant) for _ in range(2)] == [401, 429]
        assert (await ask(plant, iiot.mint("op").text, path="/healthz")).status == 200


async def test_a_token_without_the_role_is_a_right_one(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1)) as plant:
        viewer = plants.admin_token(plant.database, "viewer")
        assert [(await ask(plant, viewer, path="/tokens")).status for _ in range(5)] == [403] * 5
        assert await guess(plant) == 401


async def test_the_count_runs_out_with_time(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(600)) as plant:
        async with asyncio.timeout(PATIENCE):
            while 429 not in await asyncio.gather(*(guess(plant) for _ in range(100))):
                pass
        waits = 0
        async with asyncio.timeout(PATIENCE):
            while (answer := await ask(plant, iiot.mint("op").text)).status == 429:
                waits += 1
                await asyncio.sleep(int(answer.retry_after))  # as the answer asks for
        assert answer.status == 401
        assert waits <= 5


# ---- At the socket


@pytest.mark.parametrize("host", HOSTS)
async def test_wrong_tokens_at_the_socket_close_4401_and_then_4429(tmp_path: Path, host: str) -> None:
    async with plants.plant(tmp_path, few(3), host=host) as plant:
        assert [await guess_at_socket(plant) for _ in range(5)] == [UNAUTHORIZED] * 3 + [TOO_MANY] * 2
        assert (iiot.FAULTS[UNAUTHORIZED].close, iiot.FAULTS[TOO_MANY].close) == (4401, 4429)


async def test_wrong_keys_at_the_socket_close_4401_and_then_4429(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(3)) as plant:
        key = await provisioning_key(plant)
        codes = []
        for wrong in (iiot.mint("prov").text, other_secret(key), "key", other_secret(key), iiot.mint("prov").text):
            codes.append(refusal(*await show(plant, type="provision", key=wrong, device="press-1")))  # noqa: PERF401 - in order
        assert codes == [UNAUTHORIZED] * 3 + [TOO_MANY] * 2
        assert (await plant.get("/iiot"))["items"] == []


async def test_a_wrong_token_after_right_credentials_counts_too(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1)) as plant:
        key = await provisioning_key(plant)
        for name, code in (("press-1", 4401), ("press-2", 4429)):
            device = await plant.connect()
            await device.send("provision", key=key, device=name)
            await device.expect("credentials")
            await device.send("hello", token=iiot.mint("dev").text)
            assert (await device.closed()).code == code


async def test_http_and_the_socket_have_one_count(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(4)) as plant:
        assert [await guess(plant), await guess(plant)] == [401] * 2
        assert await guess_at_socket(plant) == UNAUTHORIZED
        assert refusal(*await show(plant, type="provision", key=iiot.mint("prov").text, device="press-1")) == UNAUTHORIZED
        assert await guess(plant) == 429
        assert await guess_at_socket(plant) == TOO_MANY
        assert refusal(*await show(plant, type="provision", key=iiot.mint("prov").text, device="press-1")) == TOO_MANY


async def test_a_frame_that_is_no_hello_guesses_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1)) as plant:
        for frame in ({"type": "hello"}, {"type": "nonsense", "token": "x"}, {"type": "provision", "device": "press-1"}):
            assert (await show(plant, **frame))[1] == 4400
        assert await guess_at_socket(plant) == UNAUTHORIZED


# ---- One path, one answer


async def wrong_at_http(plant: Plant) -> dict[str, str]:
    """Everything that is no right operator's token, by what is wrong with it."""
    revoked = (await plant.ask("POST", "/tokens", {"name": "gone", "role": "viewer"}))[1]
    assert (await plant.ask("DELETE", f"/tokens/{revoked['id']}"))[0] == 204
    return {
        "malformed": "token",
        "too short": plant.token[:-1],
        "too long": plant.token + "A",
        "id in capitals": plant.token.replace(plant.token.split("_")[2], plant.token.split("_")[2].upper() + "A", 1),
        "unknown id": iiot.mint("op").text,
        "wrong secret": other_secret(plant.token),
        "right secret, unknown id": iiot.mint("op").text[: len("iiot_op_0123456789abcdef_")] + secret_of(plant.token),
        "revoked": revoked["token"],
        "a device's": await plant.register("press-1"),
        "a key": await provisioning_key(plant),
        "a key's id": plant.token.replace("_op_", "_prov_"),
        "sql": "iiot_op_' or 1=1 --_" + "A" * 43,
    }


async def test_whatever_is_wrong_with_a_token_counts_and_the_answer_is_the_same(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1), trusted_proxy=LOCAL) as plant:
        wrong = await wrong_at_http(plant)
        first = {what: await ask(plant, token, f"192.0.2.{n}") for n, (what, token) in enumerate(wrong.items())}
        assert {answer.status for answer in first.values()} == {401}
        assert len(set(first.values())) == 1, first
        second = {what: (await ask(plant, token, f"192.0.2.{n}")).status for n, (what, token) in enumerate(wrong.items())}
        assert second == dict.fromkeys(wrong, 429)
        assert (await ask(plant, None, "192.0.2.1")) == first["malformed"]


async def test_whatever_is_wrong_at_the_socket_counts_and_the_answer_is_the_same(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1), trusted_proxy=LOCAL) as plant:
        token, key, used_up = await plant.register("press-1"), await provisioning_key(plant), await provisioning_key(plant, uses=1)
        device = await plant.connect()
        await device.send("provision", key=used_up, device="press-2")
        await device.expect("credentials")
        tokens = ("", "token", token[:-1], token + "A", other_secret(token), iiot.mint("dev").text, plant.token, key, plant.token[:-1])
        keys = ("", "key", key[:-1], other_secret(key), iiot.mint("prov").text, token, plant.token, used_up)
        frames = [{"type": "hello", "token": wrong} for wrong in tokens]
        frames += [{"type": "provision", "key": wrong, "device": "press-3"} for wrong in keys]
        first = [await show(plant, f"192.0.2.{n}", **frame) for n, frame in enumerate(frames)]
        assert len(set(first)) == 1, first
        assert refusal(*first[0]) == UNAUTHORIZED
        second = [await show(plant, f"192.0.2.{n}", **frame) for n, frame in enumerate(frames)]
        assert len(set(second)) == 1, second
        assert refusal(*second[0]) == TOO_MANY


# ---- Behind a reverse proxy


async def test_addresses_behind_a_trusted_proxy_are_counted_apart(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(2), trusted_proxy="127.0.0.1/32") as plant:
        assert [await guess(plant, "192.0.2.1") for _ in range(3)] == [401, 401, 429]
        assert [await guess(plant, "192.0.2.2") for _ in range(3)] == [401, 401, 429]
        assert [await guess_at_socket(plant, "192.0.2.3") for _ in range(3)] == [UNAUTHORIZED] * 2 + [TOO_MANY]
        assert await guess(plant, "192.0.2.3") == 429
        assert await guess_at_socket(plant, "192.0.2.1:4711") == TOO_MANY
        assert await guess(plant) == 401  # the proxy itself
        assert (await ask(plant, plant.token, "192.0.2.1")).status == 200


async def test_addresses_of_one_64_bit_network_are_counted_together(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(3), trusted_proxy=LOCAL) as plant:
        for address in ("2001:db8:0:1::1", "[2001:db8:0:1::2]:443", "2001:DB8:0:1:ffff:ffff:ffff:ffff"):
            assert await guess(plant, address) == 401
        for address in ("2001:db8:0:1::1", "2001:db8:0:1:abcd::"):
            assert await guess(plant, address) == 429
        assert await guess_at_socket(plant, "2001:db8:0:1::99") == TOO_MANY
        for address in ("2001:db8:0:2::1", "2001:db8::1", "192.0.2.1"):
            assert await guess(plant, address) == 401


async def test_ipv4_within_ipv6_is_counted_as_ipv4(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(1), trusted_proxy=LOCAL) as plant:
        assert await guess(plant, "::ffff:192.0.2.1") == 401
        assert await guess(plant, "192.0.2.1") == 429
        assert await guess(plant, "::ffff:192.0.2.2") == 401


async def test_what_the_client_wrote_before_the_proxy_is_not_believed(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(2), trusted_proxy=f"{LOCAL},10.0.0.0/8") as plant:
        forged = (["203.0.113.1, 192.0.2.1"], ["203.0.113.2", "192.0.2.1"], ["203.0.113.3, 10.0.0.1, 192.0.2.1, 10.9.9.9"])
        assert [await guess(plant, *lines) for lines in forged] == [401, 401, 429]
        assert [await guess(plant, f"203.0.113.{n}") for n in (1, 2, 3)] == [401] * 3
        assert await guess_at_socket(plant, "127.0.0.1, 192.0.2.1") == TOO_MANY


@pytest.mark.parametrize("trusted", ["", "10.0.0.0/8,2001:db8::/32"], ids=["nobody", "others"])
async def test_the_header_of_a_peer_that_is_not_trusted_changes_nothing(tmp_path: Path, trusted: str) -> None:
    async with plants.plant(tmp_path, few(3), trusted_proxy=trusted) as plant:
        assert [await guess(plant, f"192.0.2.{n}") for n in range(4)] == [401, 401, 401, 429]
        assert await guess_at_socket(plant, "192.0.2.9") == TOO_MANY
        await plant.register("press-1")
        device = await (await connect(plant, "192.0.2.9")).hello(plant.tokens["press-1"])
        await device.close()
        assert {item.get("address") for item in (await plant.get("/iiot/press-1/events"))["items"]} == {"127.0.0.1"}


GARBAGE = (
    "", " ", ",", ",,,,", "unknown", "_hidden", "999.1.1.1", "1.2.3", "[", "[]", "[::g", "::g", ":", "%", "1.2.3.4/24", "\t", "ü",
    "'; drop table device; --", "for=192.0.2.60;proto=http", "192.0.2.1, unknown", "192.0.2.1,", "x" * 4_000, ", " * 2_000,
)  # fmt: skip


async def test_garbage_in_the_header_is_counted_for_the_proxy_and_breaks_nothing(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, few(len(GARBAGE)), trusted_proxy=LOCAL) as plant:
        for garbage in GARBAGE:
            assert (await ask(plant, plant.token, garbage)).status == 200, garbage
            assert await guess(plant, garbage) == 401, garbage
        assert await guess(plant) == 429
        assert await guess_at_socket(plant, "unknown") == TOO_MANY
        assert await guess(plant, "192.0.2.1") == 401


async def test_the_address_behind_the_proxy_stands_in_the_timeline_and_in_the_audit(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, trusted_proxy=LOCAL) as plant:
        headers = [("Authorization", f"Bearer {plant.token}"), *forwarding("203.0.113.1, 192.0.2.1")]
        async with plant.client.put(f"{plant.url}/iiot/press-1", headers=headers) as response:
            token = (await response.json())["token"]
        device = await (await connect(plant, "192.0.2.2:4711")).hello(token)
        await device.close()
        body = await plant.until("/iiot/press-1/events?kind=disconnected", lambda body: body["items"])
        items = body["items"] + (await plant.get("/iiot/press-1/events?kind=connected&kind=credentials"))["items"]
        assert [(item["kind"], item["address"]) for item in items] == [
            ("disconnected", "192.0.2.2"), ("connected", "192.0.2.2"), ("credentials", "192.0.2.1"),
        ]  # fmt: skip
        (entry,) = (await plant.get("/audit?action=device.register"))["items"]
        assert entry["address"] == "192.0.2.1"


BAD_NETWORKS = (
    "banana", "10.0.0.0/33", "10.0.0.1/8", "::1/129", "2001:db8::1/64", "10.0.0.0/8;::1", "10.0.0.0/8,banana", "10.0.0.*",
    "localhost", "10.0.0.0/8 ::1", "/8", "-1",
)  # fmt: skip


@pytest.mark.parametrize("text", BAD_NETWORKS)
def test_what_is_no_network_is_refused_by_name(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        iiot.make_parser().parse_args(["serve", f"--trusted-proxy={text}"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"argument --trusted-proxy: {text!r} is not a list of networks such as 10.0.0.0/8,::1" in err


async def test_the_server_does_not_start_with_a_network_that_is_none(tmp_path: Path) -> None:
    for outcome in await asyncio.gather(
        command("--port", "0", "--trusted-proxy", "10.0.0.1/8", folder=tmp_path),
        command("--port", "0", folder=tmp_path, IIOT_TRUSTED_PROXY="10.0.0.1/8"),
    ):
        code, out, err = outcome
        assert (code, out) == (2, ""), outcome
        assert "Traceback" not in err
        assert re.search("--trusted-proxy|IIOT_TRUSTED_PROXY", err.splitlines()[-1])
        assert "'10.0.0.1/8' is not a list of networks" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("", []),
        (" , ", []),
        ("10.0.0.0/8", ["10.0.0.0/8"]),
        ("10.1.2.3", ["10.1.2.3/32"]),
        (" 10.0.0.0/8 , ::1,2001:DB8::/32,", ["10.0.0.0/8", "::1/128", "2001:db8::/32"]),
        ("0.0.0.0/0,::/0", ["0.0.0.0/0", "::/0"]),
        ("172.16.0.0/255.240.0.0", ["172.16.0.0/12"]),
    ],
)
def test_networks_are_a_list_with_commas(text: str, networks: list[str]) -> None:
    assert [str(network) for network in iiot.networks(text)] == networks
    arguments = iiot.make_parser().parse_args(["serve", f"--trusted-proxy={text}"])
    assert arguments.trusted_proxy == text


async def test_the_flag_reaches_the_running_server(tmp_path: Path) -> None:
    server = Process(tmp_path, "--trusted-proxy", "10.0.0.0/8, 127.0.0.1")
    await server.start()
    try:
        token, _ = await server.read_first_start()
        async with ClientSession() as client:
            plant = server.plant(client, token)
            assert [await guess(plant, "192.0.2.1, 10.0.0.1") for _ in range(11)] == [401] * 10 + [429]
            assert await guess(plant, "192.0.2.2") == 401
            assert (await ask(plant, token, "192.0.2.1")).status == 200
    finally:
        await server.stop()


# ---- The count by itself


class Clock:
    """The time that `Guesses` sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(iiot, "time", SimpleNamespace(monotonic=lambda: self.now))


def codes(guesses: iiot.Guesses, address: str, count: int) -> list[str]:
    return [guesses.wrong(address).fault.code for _ in range(count)]


def test_a_network_has_its_guesses_back_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, guesses = Clock(monkeypatch), iiot.Guesses(few(10))
    assert codes(guesses, "192.0.2.1", 12) == [UNAUTHORIZED] * 10 + [TOO_MANY] * 2
    clock.now += 60.001
    assert codes(guesses, "192.0.2.1", 12) == [UNAUTHORIZED] * 10 + [TOO_MANY] * 2
    clock.now += 1_000_000
    assert codes(guesses, "192.0.2.1", 12) == [UNAUTHORIZED] * 10 + [TOO_MANY] * 2


def test_a_network_has_one_guess_back_after_its_part_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, guesses = Clock(monkeypatch), iiot.Guesses(few(10))
    codes(guesses, "192.0.2.1", 10)
    for _ in range(5):
        clock.now += 6.001
        assert codes(guesses, "192.0.2.1", 1) == [UNAUTHORIZED]
    assert codes(guesses, "192.0.2.1", 1) == [TOO_MANY]


@pytest.mark.parametrize("pause", [0.05, 1.0, 3.0, 5.9])
def test_who_goes_on_guessing_is_answered_so_many_a_minute(monkeypatch: pytest.MonkeyPatch, pause: float) -> None:
    clock, guesses = Clock(monkeypatch), iiot.Guesses(few(10))
    codes(guesses, "192.0.2.1", 20)
    answered = 0
    while clock.now < 1_600:
        clock.now += pause
        answered += codes(guesses, "192.0.2.1", 1) == [UNAUTHORIZED]
    assert 95 <= answered <= 100


@pytest.mark.parametrize(
    ("most", "pauses"),
    [
        *((most, [0.0]) for most in (1, 7, 10, 90, 600)),
        (10, [0.01] * 30),
        *((most, [pause]) for most in (1, 7, 10) for pause in (3.0, 5.9)),
        (7, [1.0, 1.0, 1.0]),
    ],
)
def test_who_waits_as_long_as_retry_after_says_is_answered(monkeypatch: pytest.MonkeyPatch, most: int, pauses: list[float]) -> None:
    clock, guesses = Clock(monkeypatch), iiot.Guesses(few(most))
    codes(guesses, "192.0.2.1", most)
    for pause in pauses:
        clock.now += pause
        refusal = guesses.wrong("192.0.2.1")
    assert refusal.fault.code == TOO_MANY
    assert refusal.retry_after is not None
    assert 1 <= refusal.retry_after <= 60
    clock.now += refusal.retry_after + 0.001
    assert codes(guesses, "192.0.2.1", 1) == [UNAUTHORIZED]


@given(st.integers(1, 20), st.lists(st.floats(0, 20), max_size=80))
def test_however_guesses_are_spread_no_more_are_answered_than_a_minute_has(most: int, pauses: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock, guesses = Clock(patch), iiot.Guesses(few(most))
        answered: list[float] = []
        for pause in pauses:
            clock.now += pause
            refusal = guesses.wrong("192.0.2.1")
            assert refusal.fault.code in (UNAUTHORIZED, TOO_MANY)
            if refusal.fault.code == UNAUTHORIZED:
                assert refusal.retry_after is None
                answered.append(clock.now)
            else:
                assert type(refusal.retry_after) is int
                assert 1 <= refusal.retry_after <= 60
            for index, start in enumerate(answered):
                assert len(answered) - index <= most + (clock.now - start) * most / 60 + 1e-6


def test_no_more_networks_are_remembered_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    guesses = iiot.Guesses(attrs.evolve(few(1), guessing_networks=3))
    assert codes(guesses, "192.0.2.1", 2) == [UNAUTHORIZED, TOO_MANY]
    assert codes(guesses, "192.0.2.2", 2) == [UNAUTHORIZED, TOO_MANY]
    assert codes(guesses, "192.0.2.3", 2) == [UNAUTHORIZED, TOO_MANY]
    assert codes(guesses, "192.0.2.1", 1) == [TOO_MANY]  # guessed again: 2 is now the one longest silent
    assert codes(guesses, "192.0.2.4", 1) == [UNAUTHORIZED]
    assert codes(guesses, "192.0.2.1", 1) == [TOO_MANY]
    assert codes(guesses, "192.0.2.3", 1) == [TOO_MANY]
    assert codes(guesses, "192.0.2.2", 1) == [UNAUTHORIZED]  # forgotten


def test_a_world_of_guessers_takes_bounded_memory() -> None:
    guesses = iiot.Guesses(attrs.evolve(few(1), guessing_networks=100))
    for number in range(5_000):
        guesses.wrong(str(ipaddress.ip_address(2**32 - 1 - number)))
        guesses.wrong(str(ipaddress.ip_address((0x20010DB8 << 96) + (number << 64))))
    remembered = vars(guesses._networks)
    assert max(len(value) for value in remembered.values() if isinstance(value, dict)) == 100
    assert sum(sys.getsizeof(value) for value in remembered.values()) < 100_000


# ---- Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        (" 192.0.2.1\t", "192.0.2.1"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8:0:0::0001", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("::1", "::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%eth0]:80", "fe80::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:443", "192.0.2.1"),
        ("::FFFF:C000:0201", "192.0.2.1"),
        ("", None),
        ("unknown", None),
        ("_hidden", None),
        ("192.0.2", None),
        ("192.0.2.256", None),
        ("192.0.2.01", None),
        ("192.0.2.1/32", None),
        ("192.0.2.1 192.0.2.2", None),
        ("\u0661.2.3.4", None),
        ("1234", None),
        ("[]", None),
        ("[", None),
        (":", None),
        (":80", None),
        (":::", None),
        ("localhost:80", None),
        ("2001:db8::1::2", None),
        ("\0", None),
    ],
)
def test_an_address_is_read_however_it_is_written(text: str, address: str | None) -> None:
    found = iiot.parse_address(text)
    assert (None if found is None else str(found)) == address


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_every_address_is_read_alone_and_with_a_port(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    expected = getattr(address, "ipv4_mapped", None) or address
    bracketed = f"[{address}]" if address.version == 6 else str(address)
    for text in (str(address), address.exploded, f" {address} ", bracketed, f"{bracketed}:{port}"):
        assert iiot.parse_address(text) == expected


@given(st.text())
@example("[" * 100)
@example("%")
def test_whatever_stands_for_an_address_is_one_or_none(text: str) -> None:
    found = iiot.parse_address(text)
    assert found is None or ipaddress.ip_address(str(found)) == found
    assert iiot.client_address(text, [text], iiot.networks("0.0.0.0/0,::/0")) in (text, str(found))
    if found is None or found.version == 4:
        assert iiot.network_of(text) == text
    else:
        assert found in ipaddress.ip_network(iiot.network_of(text))


TRUSTED = "10.0.0.0/8,2001:db8:ffff::/48"
HOPS: list[tuple[str, list[str], str, str]] = [
    ("192.0.2.1", [], TRUSTED, "192.0.2.1"),
    ("192.0.2.1", ["203.0.113.1"], TRUSTED, "192.0.2.1"),  # not a proxy
    ("10.0.0.1", [], TRUSTED, "10.0.0.1"),
    ("10.0.0.1", ["203.0.113.1"], "", "10.0.0.1"),
    ("10.0.0.1", ["203.0.113.1"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["203.0.113.1:4711"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["198.51.100.1, 203.0.113.1"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["198.51.100.1", "203.0.113.1"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["203.0.113.1, 10.0.0.3,10.0.0.2"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["203.0.113.1", "10.0.0.3", "10.0.0.2"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["198.51.100.1, 10.0.0.3, 203.0.113.1, 10.0.0.2"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], TRUSTED, "10.0.0.3"),  # someone inside
    ("10.0.0.1", ["203.0.113.1, unknown"], TRUSTED, "10.0.0.1"),
    ("10.0.0.1", ["unknown, 203.0.113.1"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["203.0.113.1, unknown, 10.0.0.2"], TRUSTED, "10.0.0.2"),
    ("10.0.0.1", [""], TRUSTED, "10.0.0.1"),
    ("10.0.0.1", ["2001:DB8::0001"], TRUSTED, "2001:db8::1"),
    ("10.0.0.1", ["203.0.113.1, [2001:db8:ffff::1]:443"], TRUSTED, "203.0.113.1"),
    ("2001:db8:ffff::1", ["203.0.113.1"], TRUSTED, "203.0.113.1"),
    ("::ffff:10.0.0.1", ["203.0.113.1"], TRUSTED, "203.0.113.1"),
    ("10.0.0.1", ["203.0.113.1, ::ffff:10.0.0.2"], TRUSTED, "203.0.113.1"),
    ("::ffff:192.0.2.1", [], TRUSTED, "192.0.2.1"),
    ("fe80::1%eth0", [], TRUSTED, "fe80::1"),
    ("", ["203.0.113.1"], "0.0.0.0/0", ""),  # a peer without an address
]


@pytest.mark.parametrize(("peer", "forwarded", "trusted", "address"), HOPS)
def test_the_client_is_the_last_that_no_trusted_proxy_stands_for(peer: str, forwarded: list[str], trusted: str, address: str) -> None:
    assert iiot.client_address(peer, forwarded, iiot.networks(trusted)) == address
    assert iiot.client_address(peer, iter(forwarded), iiot.networks(trusted)) == address


PROXIES = st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="2001:db8:ffff::/48")
CLIENTS = st.ip_addresses(network="192.0.2.0/24") | st.ip_addresses(network="2001:db8:1::/48")


FORGED = st.lists(st.text(st.characters(exclude_characters="\r\n")) | PROXIES.map(str) | CLIENTS.map(str))


@given(FORGED, CLIENTS, st.lists(st.tuples(PROXIES, st.booleans()), min_size=1))
def test_whatever_a_client_writes_it_is_known_by_its_own_address(
    forged: list[str], client: ipaddress.IPv4Address | ipaddress.IPv6Address, proxies: list[tuple[Any, bool]]
) -> None:
    """The client sends a header of its own; each proxy adds the peer it had, to the last line or in a new one."""
    lines, peer = list(forged), str(client)
    for proxy, same_line in proxies:
        hop, peer = peer, str(proxy)
        if lines and same_line:
            lines[-1] += f", {hop}"
        else:
            lines.append(hop)
    assert iiot.client_address(peer, lines, iiot.networks(TRUSTED)) == str(client)
    assert iiot.client_address(str(client), lines, iiot.networks(TRUSTED)) == str(client)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:1::/64"),
        ("2001:db8:0:2::1", "2001:db8:0:2::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("unknown", "unknown"),
    ],
)
def test_a_guesser_is_an_address_or_64_bits(address: str, network: str) -> None:
    assert iiot.network_of(address) == network


@given(st.ip_addresses(v=6), st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_ipv6_addresses_are_one_guesser_exactly_if_their_first_64_bits_are_the_same(
    one: ipaddress.IPv6Address, other: ipaddress.IPv6Address, low: int
) -> None:
    def shown(number: int) -> str:
        return iiot.client_address(str(ipaddress.IPv6Address(number)), (), ())

    first, second = int(one) | 1 << 127, int(other) | 1 << 127  # none that stands for an IPv4 address
    assert iiot.network_of(shown(first)) == iiot.network_of(shown((first >> 64 << 64) + low))
    assert (iiot.network_of(shown(first)) == iiot.network_of(shown(second))) == (first >> 64 == second >> 64)


@given(st.ip_addresses(v=4), st.ip_addresses(v=4))
def test_ipv4_addresses_are_guessers_of_their_own(one: ipaddress.IPv4Address, other: ipaddress.IPv4Address) -> None:
    assert (iiot.network_of(str(one)) == iiot.network_of(str(other))) == (one == other)


# ---- What logs and the audit show of a token

ID, SECRET = "0123456789abcdef", "Abcdefghijklmnopqrstuvwxyz-0123456789_ABCDE"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("nothing to hide: iiot_op, iiot_dev_, iiot_op_0123", "nothing to hide: iiot_op, iiot_dev_, iiot_op_0123"),
        *((f"iiot_{kind}_{ID}_{SECRET}", f"iiot_{kind}_{ID}_…") for kind in ("op", "dev", "prov")),
        (f"GET /iiot/iiot_op_{ID}_{SECRET}?x=1 failed", f"GET /iiot/iiot_op_{ID}_…?x=1 failed"),
        (f'{{"token":"iiot_dev_{ID}_{SECRET}","seq":1}}', f'{{"token":"iiot_dev_{ID}_…","seq":1}}'),
        (f"iiot_op_{ID}_{SECRET} iiot_prov_{ID}_{SECRET}\n", f"iiot_op_{ID}_… iiot_prov_{ID}_…\n"),
        (f"iiot_op_{ID}_{SECRET[:9]}", f"iiot_op_{ID}_…"),  # torn
        (f"xiiot_op_{ID}_{SECRET}x", f"xiiot_op_{ID}_…"),
        (f"iiot_op_{ID}_…", f"iiot_op_{ID}_…"),
    ],
)
def test_the_secret_part_of_a_token_is_never_shown(text: str, shown: str) -> None:
    assert iiot.redacted(text) == shown


AFTER = st.text(max_size=8) | st.sampled_from(["_", "iiot_op_", "-", "A"])


@given(st.lists(st.tuples(st.sampled_from(["op", "dev", "prov"]), AFTER), max_size=4))
def test_whatever_stands_around_tokens_no_secret_is_left_of_them(parts: list[tuple[str, str]]) -> None:
    tokens = [(iiot.mint(kind).text, after) for kind, after in parts]
    text = "".join(token + after for token, after in tokens)
    hidden = iiot.redacted(text)
    for token, _ in tokens:
        assert secret_of(token) not in hidden
    assert iiot.redacted(hidden) == hidden


async def test_a_refused_token_is_not_in_the_log(process: Process) -> None:
    await process.start()
    admin, _ = await process.read_first_start()
    shown = iiot.mint("op").text
    async with ClientSession() as client:
        plant = process.plant(client, admin)
        statuses = [(await ask(plant, shown, path=f"/iiot/{shown}?match={shown}")).status for _ in range(12)]
        assert statuses == [401] * 10 + [429] * 2
        assert refusal(*await show(plant, type="hello", token=shown)) == TOO_MANY
    await process.stop()
    assert secret_of(shown) not in (process.folder / "stderr").read_text()
