"""A device's token changes without downtime; a revoked or disabled device is out at once; labels are the operators' own."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any, ClassVar

import attrs
import plant as plants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from plant import Closed, Device, Plant, agent_command

import iiot

TOKEN = re.compile(r"iiot_dev_[0-9a-f]{16}_[A-Za-z0-9_-]{43}")
PATIENT = attrs.evolve(iiot.Limits(), guesses=1_000_000)  # with peers that show many tokens that are over
REVOKED, DISABLED, REMOVED, UNKNOWN, NEWER = "credentials_revoked", "device_disabled", "device_removed", "unauthorized", "superseded"


def reading(number: int) -> dict[str, Any]:
    return {"values": {"n": number}}


async def rotate(plant: Plant, body: Any = None, name: str = "press-1") -> str:
    """A new token for the device."""
    status, answer = await plant.ask("POST", f"/iiot/{name}/token", body)
    assert (status, answer.keys(), answer["device"]) == (201, {"device", "token"}, name), answer
    assert TOKEN.fullmatch(answer["token"])
    return str(answer["token"])


async def patch(plant: Plant, body: Any, name: str = "press-1") -> dict[str, Any]:
    """Change a device; the device as the answer shows it."""
    status, answer = await plant.ask("PATCH", f"/iiot/{name}", body)
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


async def expect_end(device: Device, code: str) -> None:
    """The server closes this session, for this reason and with its close code."""
    closed = await device.closed()
    fault = iiot.FAULTS[code]
    assert (closed.code, closed.reason) == (fault.close, fault.message)


async def welcomed(plant: Plant, token: str) -> Device:
    return await (await plant.connect()).hello(token)


async def refused(plant: Plant, token: str, code: str) -> None:
    """Hello with this token is answered by an error frame and the close that belongs to it."""
    device = await plant.connect()
    await device.send("hello", token=token)
    fault = iiot.FAULTS[code]
    assert await device.receive() == {"type": "error", "code": code, "message": fault.message}
    await expect_end(device, code)


async def credentials(plant: Plant, name: str = "press-1") -> list[dict[str, Any]]:
    """What the timeline tells of the device's credentials, oldest first, without its ids and times."""
    items = (await plant.get(f"/iiot/{name}/events?kind=credentials&limit=1000"))["items"][::-1]
    assert [item["id"] for item in items] == sorted(item["id"] for item in items)
    return [{key: item[key] for key in item if key not in ("id", "kind", "at")} for item in items]


def token_id(token: str) -> str:
    return token.split("_")[2]


# ---- Rotation


@pytest.mark.parametrize("body", [None, {}, {"revoke": False}], ids=["no body", "empty", "revoke is false"])
async def test_a_session_goes_on_while_its_token_is_rotated(plant: Plant, body: Any) -> None:
    device = await plant.device("press-1")
    await device.store(reading(1))
    await rotate(plant, body)
    await device.store(reading(2))
    assert [value for _, value in await plant.points("press-1", "n")] == [1, 2]
    assert (await plant.get("/iiot/press-1"))["connected"]


async def test_the_old_token_works_until_the_new_one_is_first_used(plant: Plant) -> None:
    old = await plant.register("press-1")
    new = await rotate(plant)
    for seq in (1, 2):
        device = await welcomed(plant, old)
        await device.store(reading(seq))
        await device.close()
    device = await welcomed(plant, new)
    assert device.welcome["seq"] == 2
    await refused(plant, old, UNKNOWN)
    await device.store(reading(3))
    device = await welcomed(plant, new)
    assert device.welcome["seq"] == 3


async def test_the_first_use_of_the_new_token_takes_the_session_over(plant: Plant) -> None:
    before = await plant.device("press-1")
    await before.store(reading(1))
    after = await welcomed(plant, await rotate(plant))
    await expect_end(before, NEWER)
    assert after.welcome["seq"] == 1
    await after.store(reading(2))


async def test_the_new_token_is_a_secret_of_its_own_that_the_database_does_not_have(plant: Plant) -> None:
    given = [await plant.register("press-1"), await rotate(plant), await rotate(plant, {"revoke": True}), await rotate(plant)]
    assert len(set(given)) == len({token_id(token) for token in given}) == 4
    with closing(sqlite3.connect(plant.database)) as connection:
        dump = "\n".join(repr(row) for table in plants.tables(connection) for row in connection.execute(f"select * from {table}"))
    for token in given:
        assert token.split("_", 3)[3] not in dump


async def test_of_two_rotations_before_the_first_use_the_second_counts(plant: Plant) -> None:
    old = await plant.register("press-1")
    first, second = await rotate(plant), await rotate(plant)
    await refused(plant, first, UNKNOWN)
    device = await welcomed(plant, old)
    await device.store(reading(1))
    await refused(plant, first, UNKNOWN)
    await device.store(reading(2))
    after = await welcomed(plant, second)
    await expect_end(device, NEWER)
    await after.store(reading(3))
    for token in (old, first):
        await refused(plant, token, UNKNOWN)


async def test_a_token_that_replaced_another_can_be_rotated_in_turn(plant: Plant) -> None:
    token = await plant.register("press-1")
    for seq in range(3):
        device = await welcomed(plant, token)
        assert device.welcome["seq"] == seq
        await device.store(reading(seq))
        await device.close()
        token, before = await rotate(plant), token
        await (await welcomed(plant, token)).close()
        await refused(plant, before, UNKNOWN)


async def test_the_token_of_a_device_that_never_connected_is_rotated(plant: Plant) -> None:
    old = await plant.register("press-1")
    new = await rotate(plant)
    assert (await plant.get("/iiot/press-1"))["connected_at"] is None
    device = await welcomed(plant, new)
    await device.store(reading(1))
    await refused(plant, old, UNKNOWN)
    never = await plant.register("press-2")
    revoked = await rotate(plant, {"revoke": True}, "press-2")
    await refused(plant, never, UNKNOWN)
    await welcomed(plant, revoked)


async def test_both_tokens_of_a_rotation_survive_a_restart(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        old = await plant.register("press-1")
        new = await rotate(plant)
    async with plants.plant(tmp_path) as plant:
        await (await welcomed(plant, old)).close()
        await (await welcomed(plant, new)).close()
    async with plants.plant(tmp_path) as plant:
        await refused(plant, old, UNKNOWN)
        await welcomed(plant, new)


async def test_a_rotation_of_one_device_is_none_of_another(plant: Plant) -> None:
    other = await plant.device("press-2")
    device = await plant.device("press-1")
    await rotate(plant, {"revoke": True})
    await expect_end(device, REVOKED)
    await other.store(reading(1))
    await other.close()
    await (await plant.device("press-2")).store(reading(2))
    assert len(await credentials(plant, "press-2")) == 1


async def test_hellos_with_the_old_and_the_new_token_at_once_leave_the_new_one(tmp_path: Path) -> None:
    """Whatever the order: a session closes only for one after it or for its own token, and the old token is over."""
    async with plants.plant(tmp_path, PATIENT) as plant:
        for round_ in range(10):
            await greet_at_once(plant, f"press-{round_}")


async def greet_at_once(plant: Plant, name: str) -> None:
    async def greet(token: str) -> Device | Closed:
        device = await plant.connect()
        try:
            return await device.hello(token)
        except Closed as closed:
            return closed

    old, new = await plant.register(name), await rotate(plant, name=name)
    shown = (old, new, old, new, old)
    for token, outcome in zip(shown, await asyncio.gather(*map(greet, shown)), strict=True):
        if isinstance(outcome, Closed):
            assert outcome.code in ((4401, 4409) if token == old else (4409,)), outcome
    await refused(plant, old, UNKNOWN)
    device = await welcomed(plant, new)
    assert device.welcome["device"] == name
    await device.store(reading(1))
    assert sum("first_use" in event for event in await credentials(plant, name)) == 1


# ---- Revocation


async def test_a_revoked_token_ends_the_session_and_is_refused_at_once(plant: Plant) -> None:
    device = await plant.device("press-1")
    old = plant.tokens["press-1"]
    await device.store(reading(1))
    new = await rotate(plant, {"revoke": True})
    await refused(plant, old, UNKNOWN)
    await expect_end(device, REVOKED)
    event = await plant.until("/iiot/press-1/events?kind=disconnected", lambda body: body["items"])
    assert event["items"][0]["reason"] == REVOKED
    after = await welcomed(plant, new)
    assert after.welcome["seq"] == 1
    await after.store(reading(2))
    assert [value for _, value in await plant.points("press-1", "n")] == [1, 2]


async def test_a_revocation_ends_the_unused_new_token_too(plant: Plant) -> None:
    device = await plant.device("press-1")
    unused = await rotate(plant)
    new = await rotate(plant, {"revoke": True})
    await expect_end(device, REVOKED)
    await refused(plant, unused, UNKNOWN)
    await welcomed(plant, new)


async def test_of_many_revocations_at_once_one_new_token_remains(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, PATIENT) as plant:
        device = await plant.device("press-1")
        given = await asyncio.gather(*(rotate(plant, {"revoke": True}) for _ in range(8)))
        await expect_end(device, REVOKED)
        valid = []
        for token in (plant.tokens["press-1"], *given):
            device = await plant.connect()
            await device.send("hello", token=token)
            if (await device.receive())["type"] == "welcome":
                valid.append(token)
        assert len(valid) == 1
        assert valid[0] in given


async def test_the_token_after_a_revocation_is_no_longer_new_even_before_its_first_use(plant: Plant) -> None:
    await plant.register("press-1")
    token = await rotate(plant, {"revoke": True})
    new = await rotate(plant)
    await (await welcomed(plant, token)).close()
    await welcomed(plant, new)
    await refused(plant, token, UNKNOWN)


@pytest.mark.parametrize("revoke", [True, False], ids=["revoked", "disabled"])
async def test_what_is_sent_after_the_right_is_gone_is_not_stored(plant: Plant, *, revoke: bool) -> None:
    device = await plant.device("press-1")
    await device.store(reading(1))
    token = plant.tokens["press-1"]
    if revoke:
        token = await rotate(plant, {"revoke": True})
    else:
        await patch(plant, {"disabled": True})
    await device.telemetry(reading(2))
    await expect_end(device, REVOKED if revoke else DISABLED)
    await patch(plant, {"disabled": False})
    after = await welcomed(plant, token)
    assert after.welcome["seq"] == 1
    assert [value for _, value in await plant.points("press-1", "n")] == [1]


async def test_a_session_that_is_not_read_is_ended_too(tmp_path: Path) -> None:
    """One that waits for the next day's quota hears of it all the same."""
    async with plants.plant(tmp_path, quota_points=1) as plant:
        for name, change in (("press-1", rotate(plant, {"revoke": True})), ("press-2", patch(plant, {"disabled": True}, "press-2"))):
            device = await plant.device(name)
            await device.telemetry(reading(1))
            await device.expect("throttled")
            await change
            await expect_end(device, REVOKED if name == "press-1" else DISABLED)


# ---- Disabling


async def test_a_disabled_device_is_closed_and_refused_until_it_is_enabled(plant: Plant) -> None:
    device = await plant.device("press-1")
    token = plant.tokens["press-1"]
    await device.store(reading(1))
    assert (await patch(plant, {"disabled": True}))["disabled"] is True
    await expect_end(device, DISABLED)
    for _ in range(2):
        await refused(plant, token, DISABLED)
    await refused(plant, iiot.mint("dev").text, UNKNOWN)
    await refused(plant, token[:-1] + ("A" if token[-1] != "A" else "B"), UNKNOWN)
    assert (await patch(plant, {"disabled": False}))["disabled"] is False
    after = await welcomed(plant, token)
    assert after.welcome["seq"] == 1
    await after.store(reading(2))


async def test_that_a_device_is_disabled_is_shown_and_lasts(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        device = await plant.device("press-1")
        token = plant.tokens["press-1"]
        await plant.register("press-2")
        await patch(plant, {"disabled": True})
        await expect_end(device, DISABLED)
    async with plants.plant(tmp_path) as plant:
        await refused(plant, token, DISABLED)
        listed = (await plant.get("/iiot"))["items"]
        assert [(item["device"], item["disabled"]) for item in listed] == [("press-1", True), ("press-2", False)]
        assert (await plant.get("/iiot/press-1"))["disabled"] is True
        assert (await plant.get("/iiot/press-2"))["disabled"] is False
        shown = await plant.get("/iiot/press-1")
        assert (shown["connected"], shown["disconnected_at"] is None) == (False, False)


async def test_a_change_that_disables_nobody_ends_no_session(plant: Plant) -> None:
    device = await plant.device("press-1")
    other = await plant.device("press-2")
    await patch(plant, {"disabled": True}, "press-2")
    await expect_end(other, DISABLED)
    for body in ({}, {"disabled": False}, {"disabled": None}, {"labels": {"line": "3"}}):
        await patch(plant, body)
        await device.store(reading(1))


async def test_a_token_rotated_while_the_device_is_disabled_waits_for_its_first_use(plant: Plant) -> None:
    old = await plant.register("press-1")
    await patch(plant, {"disabled": True})
    new = await rotate(plant)
    for token in (new, old):
        await refused(plant, token, DISABLED)
    assert not any("first_use" in event for event in await credentials(plant))
    await patch(plant, {"disabled": False})
    await (await welcomed(plant, old)).close()
    await welcomed(plant, new)
    await refused(plant, old, UNKNOWN)


async def test_a_token_revoked_while_the_device_is_disabled_lets_nobody_in(plant: Plant) -> None:
    old = await plant.register("press-1")
    await patch(plant, {"disabled": True})
    new = await rotate(plant, {"revoke": True})
    await refused(plant, old, UNKNOWN)
    await refused(plant, new, DISABLED)
    await patch(plant, {"disabled": False})
    await refused(plant, old, UNKNOWN)
    await welcomed(plant, new)


async def test_a_removed_device_is_closed_and_all_its_tokens_are_unknown(plant: Plant) -> None:
    device = await plant.device("press-1")
    new = await rotate(plant)
    assert (await plant.ask("DELETE", "/iiot/press-1"))[0] == 204
    await expect_end(device, REMOVED)
    for token in (plant.tokens["press-1"], new):
        await refused(plant, token, UNKNOWN)


# ---- The account of it


async def test_the_timeline_tells_who_changed_the_credentials_and_from_where(plant: Plant) -> None:
    by = {"by": "test admin", "address": "127.0.0.1"}
    first = await plant.register("press-1")
    second = await rotate(plant)
    await (await welcomed(plant, second)).close()
    third = await rotate(plant, {"revoke": True})
    for disabled in (True, True, False, False):
        await patch(plant, {"disabled": disabled})
    told = await credentials(plant)
    assert told[2].pop("address", "127.0.0.1") == "127.0.0.1"  # the device's own, if it is told here and not with `connected` alone
    assert told == [
        {"token": token_id(first), **by},
        {"token": token_id(second), "revoked": False, **by},
        {"token": token_id(second), "first_use": True},
        {"token": token_id(third), "revoked": True, **by},
        {"disabled": True, **by},
        {"disabled": False, **by},
    ]
    kinds = [item["kind"] for item in (await plant.get("/iiot/press-1/events"))["items"][::-1]]
    assert [kind for kind in kinds if kind != "disconnected"] == [*["credentials"] * 3, "connected", *["credentials"] * 3]


async def test_only_an_admin_changes_credentials(plant: Plant) -> None:
    token = await plant.register("press-1")
    for role in ("viewer", "operator"):
        shown = plants.admin_token(plant.database, role)
        assert (await plant.ask("POST", "/iiot/press-1/token", {}, token=shown))[0] == 403
        assert (await plant.ask("PATCH", "/iiot/press-1", {"disabled": True}, token=shown))[0] == 403
    for method, path in (("POST", "/iiot/press-1/token"), ("PATCH", "/iiot/press-1")):
        assert (await plant.ask(method, path, {}, token=token))[0] == 401  # a device's token is none for people
    assert len(await credentials(plant)) == 1
    await welcomed(plant, token)


# ---- The reference device


async def agent(plant: Plant, folder: Path, token: str, name: str) -> str:
    """Run the reference device to its end, which must be a refusal; the last line that it prints."""
    (folder / name).mkdir()
    code, out, err = await agent_command("--url", plant.url, "--token", token, "--interval", "0.1", folder=folder / name)
    assert (code, out) == (1, ""), err
    assert "Traceback" not in err
    assert token not in err
    return err.splitlines()[-1]


async def test_the_agent_ends_with_a_clear_message_when_it_has_no_right_any_more(plant: Plant, tmp_path: Path) -> None:
    async def ended(name: str, change: Coroutine[Any, Any, Any] | None, message: str) -> None:
        token = plant.tokens[name]
        running = asyncio.create_task(agent(plant, tmp_path, token, name))
        if change is not None:
            await plant.until(f"/iiot/{name}", lambda body: body["latest"])
            await change
        assert await running == f"agent.py: the server refuses this device {message}"

    for name in ("live-revoked", "live-disabled", "live-removed", "left-behind", "revoked", "disabled"):
        await plant.register(name)
    await rotate(plant, {"revoke": True}, "revoked")
    await patch(plant, {"disabled": True}, "disabled")

    async def use_new_token() -> None:
        """The session of the old token is superseded; it comes back, and then learns that its time is over."""
        await welcomed(plant, await rotate(plant, name="left-behind"))

    removal = plant.ask("DELETE", "/iiot/live-removed")
    await asyncio.gather(
        ended("live-revoked", rotate(plant, {"revoke": True}, "live-revoked"), "(4403): The device's token was revoked."),
        ended("live-disabled", patch(plant, {"disabled": True}, "live-disabled"), "(4403): The device is disabled."),
        ended("live-removed", removal, "(4403): The device was removed."),
        ended("left-behind", use_new_token(), "(4401): A valid token is needed."),
        ended("revoked", None, "(4401): A valid token is needed."),
        ended("disabled", None, "(4403): The device is disabled."),
    )


# ---- Labels


async def labels(plant: Plant, name: str = "press-1") -> dict[str, Any]:
    """A device's labels, the same in its own answer and in the list."""
    (listed,) = [item["labels"] for item in (await plant.get("/iiot"))["items"] if item["device"] == name]
    shown = (await plant.get(f"/iiot/{name}"))["labels"]
    assert shown == listed
    assert isinstance(shown, dict)
    return shown


async def test_labels_are_patched_one_by_one(plant: Plant) -> None:
    await plant.register("press-1")
    await plant.register("press-2")
    assert await labels(plant) == {}
    assert (await patch(plant, {"labels": {"line": "3", "hall": "north"}}))["labels"] == {"line": "3", "hall": "north"}
    steps: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"labels": {"line": "4"}}, {"line": "4", "hall": "north"}),
        ({"labels": {"hall": None, "nobody": None}}, {"line": "4"}),
        ({"labels": {}}, {"line": "4"}),
        ({}, {"line": "4"}),
        ({"disabled": True}, {"line": "4"}),
        ({"disabled": False, "labels": {"note": ""}}, {"line": "4", "note": ""}),
        ({"labels": {"line": None, "note": None}}, {}),
    ]
    for body, expected in steps:
        assert (await patch(plant, body))["labels"] == expected
        assert await labels(plant) == expected
    assert await labels(plant, "press-2") == {}


NAMES = st.one_of(
    st.sampled_from(["line", "Line", "$.line", "a.b", 'a"b', "a\\b", "a\\u0062", "'", "[0]", "ü", "線", "🏭", "null", " "]),
    st.text(st.characters(exclude_categories=("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")), min_size=1, max_size=8),
)


def test_whatever_the_labels_are_called_the_patches_add_up(tmp_path: Path) -> None:
    """Against a merge patch as RFC 7396 has it, one level deep."""

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.dictionaries(NAMES, st.none() | NAMES, max_size=4), min_size=1, max_size=4))
    def check(patches: list[dict[str, str | None]]) -> None:
        name = f"press-{next(numbers)}"

        async def run() -> None:
            await plant.register(name)
            expected: dict[str, str] = {}
            for body in patches:
                expected = {key: value for key, value in {**expected, **body}.items() if value is not None}
                assert (await patch(plant, {"labels": body}, name))["labels"] == expected
            assert (await plant.get(f"/iiot?match={name}"))["items"][0]["labels"] == expected

        runner.run(run())

    numbers = iter(range(1_000))
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        plant = runner.run(stack.enter_async_context(plants.plant(tmp_path)))
        try:
            check()
        finally:
            runner.run(stack.aclose())


async def test_labels_survive_a_restart(tmp_path: Path) -> None:
    async with plants.plant(tmp_path) as plant:
        await plant.register("press-1")
        await patch(plant, {"labels": {"line": "3", "hall": "north"}})
        await patch(plant, {"labels": {"hall": None}})
    async with plants.plant(tmp_path) as plant:
        assert await labels(plant) == {"line": "3"}


async def test_a_device_has_so_many_labels_of_such_a_length(tmp_path: Path) -> None:
    async with plants.plant(tmp_path, attrs.evolve(iiot.Limits(), labels=3, label_characters=5)) as plant:
        await plant.register("press-1")
        most = {"a": "ääääö", "bbbbb": "", "c": "1"}
        assert (await patch(plant, {"labels": most}))["labels"] == most
        for wrong, path in (({"d": "1"}, "labels"), ({"a": "666666"}, "labels.a"), ({"bbbbbb": "1"}, "labels.bbbbbb")):
            status, body = await plant.ask("PATCH", "/iiot/press-1", {"labels": wrong})
            assert (status, body["error"]["code"], body["error"]["details"][0]["path"]) == (422, "invalid", path)
        assert await labels(plant) == most
        assert (await patch(plant, {"labels": {"a": None, "d": "1"}}))["labels"] == {"bbbbb": "", "c": "1", "d": "1"}
        assert (await patch(plant, {"labels": {"b": None, "c": "2", "d": "2"}}))["labels"] == {"bbbbb": "", "c": "2", "d": "2"}


async def test_labels_have_the_length_and_number_that_limits_say(plant: Plant) -> None:
    await plant.register("press-1")
    limits = iiot.Limits()
    most = {f"{n:0{limits.label_characters}d}": "x" * limits.label_characters for n in range(limits.labels)}
    assert (await patch(plant, {"labels": most}))["labels"] == most
    for wrong in ({"one more": ""}, {"x" * (limits.label_characters + 1): None}, {next(iter(most)): "x" * (limits.label_characters + 1)}):
        assert (await plant.ask("PATCH", "/iiot/press-1", {"labels": wrong}))[0] == 422
    assert await labels(plant) == most


LABELS: tuple[Any, ...] = (
    None, "line", 3, True, ["line"], [["line", "3"]], {"line": 3}, {"line": True}, {"line": ["3"]}, {"line": {"n": "3"}}, {"line": 1.5},
    {"": "3"}, {"line": "a\nb"}, {"line": "\0"}, {"a\tb": "3"}, {"line": "\u200b"}, {"good": "1", "line": 3},
)  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        *({"disabled": True, "labels": wrong} for wrong in LABELS),
        {"disabled": "true", "labels": {"line": "4"}},
        {"disabled": 1, "labels": {"line": "4"}},
        {"disabled": 0},
        {"disabled": []},
        {"disabled": True, "label": {"line": "4"}},
        {"enabled": False},
        {"disabled": True, "labels": {str(n): "1" for n in range(iiot.Limits().labels)}},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
async def test_a_refused_patch_changes_nothing(plant: Plant, body: Any) -> None:
    device = await plant.device("press-1")
    await patch(plant, {"labels": {"line": "3"}})
    status, answer = await plant.ask("PATCH", "/iiot/press-1", body)
    assert (status, answer["error"]["code"]) == (422, "invalid")
    assert answer["error"]["details"][0]["path"].split(".")[0] in ("disabled", "labels", "label", "enabled", "")
    assert await labels(plant) == {"line": "3"}
    assert (await plant.get("/iiot/press-1"))["disabled"] is False
    await device.store(reading(1))
    assert len(await credentials(plant)) == 1


@pytest.mark.parametrize(
    "body",
    [{"revoke": 1}, {"revoke": "true"}, {"revoke": None}, {"revoke": []}, {"revoked": True}, {"revoke": True, "token": "mine"}],
    ids=json.dumps,
)
async def test_a_refused_rotation_changes_nothing(plant: Plant, body: Any) -> None:
    device = await plant.device("press-1")
    status, answer = await plant.ask("POST", "/iiot/press-1/token", body)
    assert (status, answer["error"]["code"], "token" in answer) == (422, "invalid", False)
    await device.store(reading(1))
    assert len(await credentials(plant)) == 1
    await welcomed(plant, plant.tokens["press-1"])


@pytest.mark.parametrize(("method", "path"), [("POST", "/token"), ("PATCH", "")])
async def test_a_body_that_is_no_object_is_refused(plant: Plant, method: str, path: str) -> None:
    device = await plant.device("press-1")
    for data, code in ((b"[]", "not_an_object"), (b"true", "not_an_object"), (b"{", "not_json"), (b"\xff", "not_json")):
        status, body = await plant.ask(method, f"/iiot/press-1{path}", data=data)
        assert (status, body["error"]["code"]) == (400, code)
    await device.store(reading(1))
    assert len(await credentials(plant)) == 1


@pytest.mark.parametrize("name", ["nobody", "Press-1", "press-%2A", "press%201", "x" * 100])
async def test_an_unknown_device_is_not_found(plant: Plant, name: str) -> None:
    device = await plant.device("press-1")
    for method, path, body in (("POST", "/token", None), ("POST", "/token", {"revoke": True}), ("PATCH", "", {"disabled": True})):
        status, answer = await plant.ask(method, f"/iiot/{name}{path}", body)
        assert (status, answer["error"]["code"]) == (404, "not_found")
    await device.store(reading(1))
    assert [item["device"] for item in (await plant.get("/iiot"))["items"]] == ["press-1"]


# ---- In any order


class Credentials(RuleBasedStateMachine):
    """One device of one server. The model: which tokens are valid now, whether the device is disabled, which session is live."""

    plant: ClassVar[Plant]
    runner: ClassVar[asyncio.Runner]
    devices: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).devices += 1
        self.name = f"press-{self.devices}"
        self.known: list[str] = []  # every token ever given
        self.token = ""  # the one in use
        self.unused: str | None = None  # the new one, before its first use
        self.disabled = False
        self.live: Device | None = None
        self.seq = 0

    @initialize()
    def register(self) -> None:
        self.token = self.runner.run(self.plant.register(self.name))
        self.known = [self.token]

    async def ended(self, code: str) -> None:
        if self.live is not None:
            await expect_end(self.live, code)
            self.live = None

    @rule(revoke=st.sampled_from([False, False, True]))
    def rotate(self, *, revoke: bool) -> None:
        async def run() -> None:
            new = await rotate(self.plant, {"revoke": revoke}, self.name)
            self.known.append(new)
            if revoke:
                self.token, self.unused = new, None
                await self.ended(REVOKED)
            else:
                self.unused = new

        self.runner.run(run())

    @rule(disabled=st.booleans())
    def disable(self, *, disabled: bool) -> None:
        async def run() -> None:
            await patch(self.plant, {"disabled": disabled}, self.name)
            self.disabled = disabled
            if disabled:
                await self.ended(DISABLED)

        self.runner.run(run())

    @rule(back=st.integers(0, 3))
    def hello(self, back: int) -> None:
        """With any token that the device ever had, most often one of the newest."""
        shown = self.known[-1 - back % len(self.known)]

        async def run() -> None:
            if shown not in (self.token, self.unused):
                await refused(self.plant, shown, UNKNOWN)
            elif self.disabled:
                await refused(self.plant, shown, DISABLED)
            else:
                after = await welcomed(self.plant, shown)
                assert (after.welcome["device"], after.welcome["seq"]) == (self.name, self.seq)
                await self.ended(NEWER)
                self.live = after
                if shown == self.unused:
                    self.token, self.unused = shown, None

        self.runner.run(run())

    @invariant()
    def the_live_session_goes_on(self) -> None:
        async def run() -> None:
            assert self.live is not None
            self.seq += 1
            await self.live.store(reading(self.seq))

        if self.live is not None:
            self.runner.run(run())

    def teardown(self) -> None:
        async def run() -> None:
            shown = await self.plant.get(f"/iiot/{self.name}")
            assert shown["disabled"] is self.disabled
            if self.live is not None:
                assert shown["connected"]
                await self.live.close()

        if self.known:
            self.runner.run(run())


def test_in_any_order_the_tokens_that_are_valid_open_a_session_and_no_others_do() -> None:
    chosen = settings(max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as Credentials.runner:
        stack = AsyncExitStack()
        Credentials.plant = Credentials.runner.run(stack.enter_async_context(plants.plant(Path(folder), PATIENT)))
        try:
            run_state_machine_as_test(Credentials, settings=chosen)
        finally:
            Credentials.runner.run(stack.aclose())
