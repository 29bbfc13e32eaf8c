"""What the tests of the page work with: Debian's Chromium, driven by Playwright, on the page of a real server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from plant import PATIENCE, ROOT
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, async_playwright

CHROMIUM = shutil.which("chromium")
AXE = ROOT / ".node" / "node_modules" / "axe-core" / "axe.min.js"  # .ci/run puts it there
# Without these Chromium asks for its maker's hosts, and as root it has no sandbox of its own.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
SHOTS = ROOT / ".shots"  # git ignores it
WIDE, NARROW = (1440, 900), (390, 844)


class Window:
    """A page of the browser, and what its console said."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    async def open(self, address: str) -> None:
        """Go to an address of the page, such as #/fleet."""
        await self.page.goto(f"{self.url}/{address}")
        await self.until(lambda: self.page.evaluate("performance.getEntriesByName('page-ready').length > 0"))

    async def shows(self, selector: str, text: str = "") -> None:
        """Wait until something is there to be seen."""
        place = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        await place.first.wait_for(timeout=PATIENCE * 1000)

    async def gone(self, selector: str, text: str = "") -> None:
        place = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        await place.first.wait_for(state="hidden", timeout=PATIENCE * 1000)

    async def text(self, selector: str) -> str:
        return await self.page.locator(selector).first.inner_text()

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Look until it is so: for what the page shows without telling anybody."""
        async with asyncio.timeout(PATIENCE):
            while not await condition():
                await asyncio.sleep(0.02)

    async def evaluate(self, script: str, argument: Any = None) -> Any:
        return await self.page.evaluate(script, argument)


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield running
        finally:
            await running.close()


async def context(
    running: Browser, size: tuple[int, int] = WIDE, *, dark: bool = False, token: str = "", **options: Any
) -> BrowserContext:
    """A browser that has shown no token before, unless it is given one."""
    scheme: Literal["dark", "light"] = "dark" if dark else "light"
    made = await running.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, timezone_id="Europe/Berlin", locale="en-GB", **options
    )
    made.set_default_timeout(PATIENCE * 1000)
    if token:
        await made.add_init_script(f"if (!sessionStorage.getItem('iiot.token')) sessionStorage.setItem('iiot.token', {token!r})")
    return made


async def window(made: BrowserContext, url: str) -> Window:
    return Window(await made.new_page(), url)


def shot(name: str) -> Path:
    """Where a picture of the page goes."""
    SHOTS.mkdir(exist_ok=True)
    return SHOTS / name
