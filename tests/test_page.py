"""The page in a browser, on a real server: what people see, and when."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator

import plant as plants
import pytest
from browser import AXE, CHROMIUM, NARROW, WIDE, Window, browser, context, shot, window
from plant import Device, Plant, Process
from playwright.async_api import Browser

import iiot

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as running:
        yield running


@pytest.fixture
async def page(chromium: Browser, plant: Plant) -> AsyncIterator[Window]:
    """The page, signed in as an admin. What its console says at the end is what the policy or a fault made it say."""
    made = await context(chromium, token=plant.token)
    opened = await window(made, plant.url)
    yield opened
    assert opened.errors == []
    await made.close()


async def test_the_address_of_the_first_start_opens_the_page_signed_in(process: Process, chromium: Browser) -> None:
    await process.start()
    await process.read_first_start()
    found = re.search(r"http\S+/#token=\S+", process.printed)
    assert found is not None, process.printed
    opened = await window(await context(chromium), process.url)
    await opened.page.goto(found[0])
    await opened.shows("h2", "No device yet")
    assert "token" not in opened.page.url
    assert "iiot_op_" not in await opened.evaluate("JSON.stringify([history.state, location.href, document.title])")
    await opened.page.reload()
    await opened.shows("h2", "No device yet")
    assert opened.errors == []


async def test_another_tab_of_the_browser_is_signed_in_too(page: Window, plant: Plant, chromium: Browser) -> None:
    made = await context(chromium)
    first, second = await window(made, plant.url), await window(made, plant.url)
    await first.open(f"#token={plant.token}")
    await first.shows("#q")
    await second.open("#/admin/keys")
    await second.shows("h1", "Provisioning keys")


async def test_a_token_is_shown_with_its_role_before_the_page_opens(plant: Plant, chromium: Browser) -> None:
    opened = await window(await context(chromium), plant.url)
    await opened.open("")
    await opened.page.get_by_label("Token").fill("iiot_op_0000000000000000_wrong")
    await opened.page.keyboard.press("Enter")
    await opened.shows("[role=alert]", "A valid token is needed.")
    await opened.page.get_by_label("Token").fill(plants.admin_token(plant.database, "viewer"))
    await opened.page.keyboard.press("Enter")
    await opened.shows("dd", "viewer")
    await opened.page.get_by_role("button", name="Open the fleet").click()
    await opened.shows("h2", "No device yet")


async def test_a_revoked_token_leads_back_to_the_entry(chromium: Browser, plant: Plant) -> None:
    _, made = await plant.ask("POST", "/tokens", {"name": "for a day", "role": "viewer"})
    opened = await window(await context(chromium, token=made["token"]), plant.url)
    await opened.open("#/fleet")
    await opened.shows("h2", "No device yet")
    await plant.ask("DELETE", f"/tokens/{made['id']}")
    await opened.shows("form", "A valid token is needed.")


async def test_a_device_comes_online_and_appears_without_a_reload(page: Window, plant: Plant) -> None:
    await page.open("#/fleet")
    await page.shows("h2", "No device yet")
    device = await plant.device("press-7")
    await page.shows(".vp .tr", "press-7")
    await page.shows(".vp .tr", "online")
    await device.store({"values": {"temperature": 20.5}})
    await page.shows(".vp .tr", "20.50")
    await device.store({"values": {"temperature": 21.25}})
    await page.shows(".vp .tr", "21.25")
    await device.close()
    await page.shows(".vp .tr", "offline")
    await plant.ask("DELETE", "/iiot/press-7")
    await page.shows("h2", "No device yet")


async def recording(plant: Plant, name: str, end: int) -> Device:
    """A device with 20 minutes of readings, one a second: 10, and from the middle on 30."""
    device = await plant.device(name)
    samples = [{"ts": end - (1200 - i) * 1000, "values": {"flow": 10.0 if i < 600 else 30.0, "pressure": i / 100}} for i in range(1200)]
    await device.store(*samples)
    return device


END = 1_796_040_000_000  # a whole minute in November 2026


async def test_a_chart_has_its_step_where_the_readings_have_it(page: Window, plant: Plant) -> None:
    await recording(plant, "pump", END)
    await page.open(f"#/device/pump/readings?m=flow&from={END - 1_200_000}&to={END}")
    await page.shows(".legend", "10 to 30")
    drawn = await page.evaluate(
        """async end => {
            await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
            const host = document.querySelector('.plot'), { chart } = host, [base] = host.querySelectorAll('canvas');
            const { data, width } = base.getContext('2d').getImageData(0, 0, base.width, base.height), step = end - 600_000;
            const isBlue = (x, y) => { // the line's colour, which neither the grid nor the letters have
                const [red, , blue, alpha] = data.slice(4 * (y * width + x));
                return alpha > 200 && blue > red + 60;
            };
            const near = [-2, -1, 0, 1, 2];
            const drawn = (t, v) => near.some(dx => near.some(dy => isBlue(Math.round(chart.x(t)) + dx, Math.round(chart.y(v)) + dy)));
            return [[step - 60_000, 10], [step + 60_000, 30], [step - 60_000, 30], [step + 60_000, 10]].map(([t, v]) => drawn(t, v));
        }""",
        END,
    )
    assert drawn == [True, True, False, False]


async def test_dragging_zooms_and_back_returns(page: Window, plant: Plant) -> None:
    await recording(plant, "pump", END)
    whole = f"#/device/pump/readings?m=flow&from={END - 1_200_000}&to={END}"
    await page.open(whole)
    await page.shows(".legend", "10 to 30")
    box = await page.page.locator(".plot").bounding_box()
    assert box is not None
    from_, to = await page.evaluate("[document.querySelector('.plot').chart.at(200), document.querySelector('.plot').chart.at(400)]")
    await page.page.mouse.move(box["x"] + 200, box["y"] + 60)
    await page.page.mouse.down()
    await page.page.mouse.move(box["x"] + 400, box["y"] + 60, steps=4)
    await page.page.mouse.up()
    await page.page.wait_for_url(lambda url: f"to={END}" not in url)
    shown = {name: int(value) for name, value in re.findall(r"(from|to)=(\d+)", page.page.url)}
    assert abs(shown["from"] - from_) < 1500
    assert abs(shown["to"] - to) < 1500
    await page.page.get_by_role("button", name="Back", exact=True).click()
    await page.page.wait_for_url(f"**/{whole}")


async def test_keys_move_the_cursor_of_all_charts_and_say_the_value(page: Window, plant: Plant) -> None:
    await recording(plant, "pump", END)
    await page.open(f"#/device/pump/readings?m=flow,pressure&from={END - 1_200_000}&to={END}")
    await page.shows(".legend", "10 to 30")
    await page.page.locator(".plot").first.focus()
    await page.page.keyboard.press("Home")
    await page.shows(".legend b", "10")
    await page.page.keyboard.press("End")
    await page.shows(".legend b", "30")
    await page.shows(".legend", "11.99")
    await page.page.keyboard.press("Shift+ArrowLeft")
    await page.page.keyboard.press("Escape")
    await page.shows(".legend", "in view")
    await page.page.keyboard.press("t")
    await page.shows("h2", "The same buckets")


async def test_the_page_goes_on_when_the_server_was_killed(process: Process, chromium: Browser) -> None:
    await process.start()
    token, _ = await process.read_first_start()
    port = process.url.rsplit(":", 1)[1]
    async with plants.client() as client:
        plant = process.plant(client, token)
        await plant.register("press-7")
        opened = await window(await context(chromium, token=token), process.url)
        await opened.open("#/fleet")
        await opened.shows(".vp .tr", "never seen")
        await process.stop(signal.SIGKILL)
        await opened.shows("#banner", "The server does not answer.")
        process.arguments = ("--port", port)
        await process.start()
        await plant.register("press-8")
        device = await plant.device("press-7")
        await opened.shows("#banner", "The server is back.")
        await opened.shows(".vp .tr", "press-8")
        await opened.shows(".vp .tr", "online")
        await device.close()


async def test_a_push_is_applied_before_ones_eyes_and_a_rejected_one_says_why(page: Window, plant: Plant) -> None:
    device = await plant.device("press-7")
    await page.open("#/device/press-7/config")
    for version, (status, more) in enumerate((("applied", {}), ("rejected", {"message": "the valve is stuck"})), 1):
        await page.shows("textarea")
        await page.page.locator("textarea").first.fill(f'{{"interval": {version}}}')
        await page.page.get_by_role("button", name=f"Push as v{version}").click()
        assert (await device.expect("config"))["document"] == {"interval": version}
        device.seq += 1
        await device.send("config_status", seq=device.seq, version=version, status=status, **more)
        await page.shows("main .state", f"{status} by the device")
    await page.shows("main", "the valve is stuck")
    await page.shows(".facts", "v2 rejected, v1 applied")


async def test_the_push_of_a_colleague_is_told_and_ones_own_text_stays(page: Window, plant: Plant) -> None:
    await plant.device("press-7")
    await plant.ask("POST", "/iiot/press-7", {"interval": 1})
    await page.open("#/device/press-7/config")
    await page.shows("textarea")
    await page.page.locator("textarea").first.fill('{"interval": 3}')
    await plant.ask("POST", "/iiot/press-7", {"interval": 2})
    await page.shows("main", "test admin")
    assert await page.page.locator("textarea").first.input_value() == '{"interval": 3}'


async def test_an_alert_that_one_window_acknowledges_is_so_in_the_other(page: Window, plant: Plant) -> None:
    await plant.ask("POST", "/rules", {"name": "hot", "metric": "level", "condition": {"above": 5}, "severity": "critical"})
    device = await plant.device("press-7")
    await page.open("#/alerts")
    await page.shows(".alerts", "Nothing is firing.")
    other = await window(page.page.context, plant.url)
    await other.open("#/alerts")
    await device.store({"values": {"level": 9}})
    for each in (page, other):
        await each.shows(".alerts section[aria-label=Firing] a", "press-7")
        await each.shows(".nav .count", "1")
    await page.page.locator(".alerts a").first.click()
    await page.shows("h1", "hot")
    await page.page.keyboard.press("a")
    await page.page.get_by_label("Text").fill("on my way")
    await page.page.locator("dialog button[type=submit]").click()
    await page.shows(".note", "on my way")
    await other.shows(".alerts section[aria-label=Acknowledged] a", "press-7")
    await device.store({"values": {"level": 1}})
    await other.shows(".alerts section[aria-label^=Resolved] a", "press-7")
    assert other.errors == []


async def test_a_log_is_tailed_and_searched(page: Window, plant: Plant) -> None:
    device = await plant.device("press-7")

    async def log(message: str, level: str = "info") -> None:
        device.seq += 1
        await device.send("log", seq=device.seq, entries=[{"level": level, "message": message, "logger": "pumpd"}])
        await device.acknowledged(device.seq)

    await log("valve opened")
    await page.open("#/device/press-7/logs")
    await page.shows(".log", "valve opened")
    await log("bearing is hot", "error")
    await page.shows(".log", "bearing is hot")
    await page.page.keyboard.press("/")
    await page.page.keyboard.type("bearing")
    await page.gone(".log div", "valve opened")
    await page.shows(".log mark", "bearing")


NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>"


async def test_markup_in_texts_is_text_and_the_policy_blocks_what_would_run(page: Window, plant: Plant) -> None:
    device = await plant.device("press-7")
    await plant.ask("PATCH", "/iiot/press-7", {"labels": {"note": NASTY}})
    await device.store({"values": {NASTY: 1, "mode": NASTY}})
    device.seq += 2
    await device.send("log", seq=device.seq - 1, entries=[{"level": "info", "message": NASTY, "logger": NASTY}])
    await device.send("state", seq=device.seq, reported={NASTY: NASTY}, mode="replace")
    await plant.ask("POST", "/iiot/press-7", {NASTY: NASTY})
    await plant.ask("POST", "/rules", {"name": NASTY[:60], "metric": NASTY, "condition": {"above": 0}, "text": NASTY})
    ran: list[str] = []
    page.page.on("dialog", lambda dialog: ran.append(dialog.message))
    await page.open("#/fleet")
    await page.shows(".vp .tr", "onerror=alert(1)")
    for tab in ("readings", "config", "state", "timeline", "logs"):
        await page.open(f"#/device/press-7/{tab}")
        await page.shows("main", "onerror=alert(1)")
    await page.open("#/alerts/rules")
    await page.shows("main", "onerror=alert(1)")
    assert ran == []
    assert page.errors == []
    blocked = await page.evaluate(
        """() => {
            const tried = [() => { document.body.innerHTML = '<img src=x onerror=alert(3)>'; },
                () => document.body.append(Object.assign(document.createElement('script'), { text: 'alert(4)' }))];
            return tried.map(act => { try { act(); return false; } catch { return true; } });
        }"""
    )
    assert blocked == [True, True]
    assert ran == []
    await page.until(lambda: asyncio.sleep(0, len(page.errors) >= 2))
    page.errors.clear()  # what the policy said of these


VIEWS = [
    "#/fleet", "#/fleet?is=alerts", "#/fleet?q=nothing", "#/alerts", "#/alerts/rules",
    *(f"#/admin/{part}" for part in ("devices", "keys", "tokens", "audit", "retention", "syslog")),
    *(f"#/device/press-7/{tab}" for tab in ("readings", "readings?table=1", "config", "state", "timeline", "logs", "commands")),
]  # fmt: skip


async def furnish(plant: Plant) -> Device:
    """A device with something in every view."""
    device = await recording(plant, "press-7", iiot.now_ms())
    device.seq += 2
    await device.send("state", seq=device.seq - 1, reported={"software_version": "1.2", "board": {"model": "GX"}}, mode="replace")
    await device.send("log", seq=device.seq, entries=[{"level": "error", "message": "bearing is hot", "logger": "pumpd"}])
    await plant.ask("POST", "/iiot/press-7", {"interval": 2})
    await plant.ask("POST", "/rules", {"name": "hot", "metric": "flow", "condition": {"above": 5}, "severity": "critical"})
    await plant.ask("POST", "/silences", {"match": "valve-*", "until": "2099-01-01T00:00:00Z"})
    await plant.until("/alerts?status=firing", lambda body: body["items"])
    return device


@pytest.mark.parametrize("role", ["viewer", "operator"])
async def test_a_page_offers_nothing_that_its_token_may_not(chromium: Browser, plant: Plant, role: str) -> None:
    await furnish(plant)
    opened = await window(await context(chromium, token=plants.admin_token(plant.database, role)), plant.url)
    refused: list[str] = []
    opened.page.on("response", lambda answer: refused.append(answer.url) if answer.status == 403 else None)
    for view in VIEWS:
        await opened.open(view)
        await opened.page.wait_for_load_state("load")
        for button in await opened.page.locator("main button.main:enabled, main button.danger:enabled").all():
            assert role == "operator", (view, await button.inner_text())
    assert refused == []


@pytest.mark.parametrize(("size", "dark"), [(WIDE, False), (WIDE, True), (NARROW, False), ((360, 780), True)])
async def test_every_view_fits_its_window_and_can_be_used_by_everybody(
    chromium: Browser, plant: Plant, size: tuple[int, int], *, dark: bool
) -> None:
    """No sideways scroll, and axe finds nothing at all. The pictures are to be looked at."""
    if not AXE.is_file():
        pytest.skip("needs axe-core")
    await furnish(plant)
    made = await context(chromium, size, dark=dark, token=plant.token, bypass_csp=True)
    opened, script = await window(made, plant.url), AXE.read_text(encoding="utf-8")
    for view in VIEWS:
        await opened.open(view)
        await opened.shows("main *")
        await opened.evaluate("() => new Promise(done => setTimeout(done, 300))")  # until what is read has come: nothing tells of it
        wide = await opened.evaluate(
            "Math.max(document.documentElement.scrollWidth - innerWidth, document.querySelector('main').scrollWidth"
            " - document.querySelector('main').clientWidth)"
        )
        assert wide <= 0, (view, wide)
        await opened.evaluate(script)
        found = await opened.evaluate("axe.run(document, { resultTypes: ['violations'] }).then(all => all.violations)")
        assert not found, (view, [(one["id"], one["nodes"][0]["html"][:200]) for one in found])
        name = re.sub(r"\W+", "-", view).strip("-")
        await opened.page.screenshot(path=shot(f"{name}-{size[0]}-{'dark' if dark else 'light'}.png"))


async def test_a_device_is_added_with_the_line_to_paste_and_removed_by_its_name(page: Window, plant: Plant) -> None:
    await page.open("#/admin/devices")
    await page.page.get_by_label("Name", exact=True).fill("press-7")
    await page.page.get_by_label("Labels", exact=True).fill("line:3 site:north")
    await page.page.get_by_role("button", name="Add", exact=True).click()
    await page.shows("dialog", "This is shown once.")
    await page.page.mouse.click(5, 5)  # beside it
    secret = await page.text("dialog .copy code")
    await (await plant.connect()).hello(secret)
    assert f"--url {plant.url} --token {secret} --name press-7" in await page.text("dialog .copy:last-of-type code")
    await page.page.keyboard.press("Escape")
    await page.shows("main tr", "line:3")
    await page.shows("main tr", "online")
    await page.page.get_by_role("button", name="Remove").click()
    remove = page.page.get_by_role("button", name="Remove press-7")
    assert await remove.is_disabled()
    await page.page.get_by_label("Type press-7").fill("press-7")
    await remove.click()
    await page.shows("main", "No device yet.")
    assert (await plant.get("/iiot"))["items"] == []
    assert secret not in await page.evaluate("document.documentElement.outerHTML + location.href")


async def test_keys_and_tokens_are_made_once_and_end(page: Window, plant: Plant) -> None:
    await page.open("#/admin/keys")
    await page.page.get_by_role("button", name="New key").click()
    await page.page.get_by_label("Uses").fill("3")
    await page.page.get_by_role("button", name="Make").click()
    key = await page.text("dialog .copy code")
    assert key.startswith("iiot_prov_")
    await page.page.keyboard.press("Escape")
    await page.shows("main tr", "3")
    await page.open("#/admin/tokens")
    await page.page.get_by_role("button", name="New token").click()
    await page.page.get_by_label("Name").fill("hall 2")
    await page.page.get_by_role("button", name="Make").click()
    token = await page.text("dialog .copy code")
    await page.page.keyboard.press("Escape")
    assert (await plant.ask("GET", "/whoami", token=token))[1]["role"] == "viewer"
    await page.page.locator("main tr", has_text="hall 2").get_by_role("button", name="Revoke").click()
    await page.page.get_by_role("button", name="Revoke hall 2").click()
    await page.gone("main tr", "hall 2")
    assert (await plant.ask("GET", "/whoami", token=token))[0] == 401


async def test_the_token_of_the_platform_opens_its_tenants_alone(chromium: Browser, plant: Plant) -> None:
    opened = await window(await context(chromium, token=plants.admin_token(plant.database, "platform")), plant.url)
    refused: list[str] = []
    opened.page.on("response", lambda answer: refused.append(answer.url) if answer.status == 403 else None)
    await opened.open("")
    await opened.shows("main tr", "default")
    await opened.page.get_by_role("button", name="New tenant").click()
    await opened.page.get_by_label("Name").fill("works-2")
    await opened.page.get_by_role("button", name="Make").click()
    await opened.shows("dialog", "First admin token of works-2")
    await opened.page.keyboard.press("Escape")
    await opened.shows("main tr", "works-2")
    for part in ("tokens", "audit"):
        await opened.open(f"#/admin/{part}")
        await opened.shows("main tr")
    assert refused == []
    assert opened.errors == []


async def test_labels_with_spaces_and_colons_stay_whole(page: Window, plant: Plant) -> None:
    await plant.register("press-7")
    await plant.ask("PATCH", "/iiot/press-7", {"labels": {"site": "hall 2: north", "old": "x"}})
    await page.open("#/admin/devices")
    await page.page.locator("main tr", has_text="press-7").get_by_role("button", name="Labels").click()
    await page.page.locator("dialog .bar", has=page.page.locator("input[value=old]")).get_by_role("button", name="Remove").click()
    await page.page.get_by_role("button", name="Add a label").click()
    await page.page.get_by_label("Name").last.fill("line")
    await page.page.get_by_label("Value").last.fill("3 b")
    await page.page.get_by_role("button", name="Save").click()
    await page.shows("main tr", "line:3 b")
    assert (await plant.get("/iiot/press-7"))["labels"] == {"site": "hall 2: north", "line": "3 b"}


async def test_addresses_of_a_device_are_shown_before_they_are_replaced(page: Window, plant: Plant) -> None:
    await plant.register("press-7")
    await plant.ask("PUT", "/iiot/press-7/syslog-source", {"addresses": ["10.0.0.7"]})
    await page.open("#/admin/syslog")
    await page.page.get_by_label("Device").fill("press-7")
    await page.page.keyboard.press("Tab")
    addresses = page.page.get_by_label("All its addresses")
    await page.until(addresses.is_enabled)
    shown = await addresses.input_value()
    await addresses.fill(f"{shown} 10.0.0.8")
    await page.page.get_by_role("button", name="Give").click()
    await page.shows("#toast", "belong to press-7 now")
    assert (await plant.get("/iiot/press-7/syslog-source"))["addresses"] == ["10.0.0.7/32", "10.0.0.8/32"]


async def test_the_page_of_the_platform_comes_back_too(process: Process, chromium: Browser) -> None:
    await process.start()
    await process.read_first_start()
    port = process.url.rsplit(":", 1)[1]
    opened = await window(await context(chromium, token=plants.admin_token(process.database, "platform")), process.url)
    await opened.open("#/admin/tenants")
    await opened.shows("main tr", "default")
    await process.stop(signal.SIGKILL)
    await opened.page.get_by_role("link", name="Audit").click()
    await opened.shows("#banner", "The server does not answer.")
    process.arguments = ("--port", port)
    await process.start()
    await opened.page.get_by_role("button", name="Try now").click()
    await opened.shows("#banner", "The server is back.")
