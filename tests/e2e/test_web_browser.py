"""The web page in Debian's Chromium: one walk through it, wide and on a telephone; axe-core looks.

With COUNTERMARK_PICTURES=docs/web the pictures of the documentation are taken on the way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rooms import TOKEN
from serving import Served, served

from countermark.claims.signed import Claim

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium"),
]
WIDTHS = {"desktop": (1200, 900), "phone": (390, 844)}
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def server(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    folder = tmp_path_factory.mktemp("walk") / "room"
    shutil.copytree(room, folder, ignore=shutil.ignore_patterns("state"))
    with served(folder) as found:
        yield found, folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


class Walk:
    """A page of the browser at one width, whose every stop is looked at."""

    def __init__(self, page: Any, width: str) -> None:
        self.page, self.width = page, width
        self.asked: set[str] = set()
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("console", self.heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def stop(self, name: str) -> None:
        """axe finds nothing serious, light or dark; nothing is wider than the screen."""
        from axe_playwright_python.sync_playwright import Axe

        for scheme in ("dark", "light"):
            self.page.emulate_media(color_scheme=scheme)
            found = Axe().run(self.page).response["violations"]
            bad = [(each["id"], each["nodes"][0]["html"]) for each in found
                   if each["impact"] in SERIOUS]  # fmt: skip
            assert not bad, (name, scheme, bad)
        over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert self.page.evaluate(over) <= 0, f"{name} is wider than the screen"
        if folder := os.environ.get("COUNTERMARK_PICTURES"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder) / f"{self.width}-{name}.png"
            self.page.screenshot(path=path, scale="css", animations="disabled")
            Image.open(path).convert("RGB").quantize(48).save(path, optimize=True)


@pytest.fixture(params=list(WIDTHS))
def walk(request: pytest.FixtureRequest, browser: Any) -> Iterator[Walk]:
    width, height = WIDTHS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=request.param == "phone"
    )
    context.set_default_timeout(120_000)
    yield Walk(context.new_page(), request.param)
    context.close()


def test_a_walk_through_the_room(server: tuple[Served, Path], walk: Walk) -> None:
    (site, folder), page = server, walk.page
    page.goto(site.address + "/claims")
    walk.stop("login")
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_url(site.address + "/claims")

    page.goto(site.address)
    walk.stop("home")
    page.get_by_role("link", name="Verify", exact=True).click()
    page.get_by_label("A file to upload").set_input_files(folder / "suspects" / "acme.safetensors")
    page.get_by_label("A key of this server").select_option("acme.key")
    walk.stop("verify")
    page.get_by_role("button", name="Read the suspect").click()
    page.wait_for_url("**/jobs/*")
    walk.stop("watch")
    page.get_by_text("OWNED", exact=True).wait_for()
    walk.stop("verdict")

    page.goto(site.address + "/claims")
    page.get_by_label("Owner, or a digest").fill("beta")
    page.get_by_role("link", name="ACME Inc.").first.wait_for(state="detached")
    walk.stop("search")
    page.get_by_role("link", name="Beta Ltd.").click()
    page.get_by_text("as was computed just now").wait_for()
    walk.stop("claim")

    page.get_by_role("link", name="Dispute", exact=True).click()
    page.get_by_label("or one that lies on this server").select_option("beta.safetensors")
    for side, owner in (("first", "acme"), ("second", "beta")):
        party = page.get_by_role("group", name=f"The {side} party")
        party.get_by_label("Its key").select_option(f"{owner}.key")
        party.get_by_label("Its claim").fill(Claim.load(folder / f"{owner}.json").digest)
        party.get_by_label("Its own model").select_option(f"{owner}.safetensors")
    walk.stop("asking")
    page.get_by_role("button", name="Resolve").click()
    page.get_by_text("For ACME Inc.").wait_for()
    walk.stop("dispute")

    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(site.address + "/login")
    assert not walk.complaints
    assert {url for url in walk.asked if not url.startswith((site.address, "data:"))} == set()


def test_everything_is_reached_by_keyboard(server: tuple[Served, Path], walk: Walk) -> None:
    (site, _), page = server, walk.page
    page.goto(site.address + "/login")
    page.locator("input:focus").wait_for()  # the page focuses the field once it is drawn
    page.keyboard.type(TOKEN)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url(site.address + "/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url(site.address + "/verify")


def test_pages_work_without_scripts_and_in_print(
    server: tuple[Served, Path], browser: Any, tmp_path: Path
) -> None:
    site, _ = server
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site.address + "/login")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    page.goto(site.address + "/verify")
    page.get_by_label("or one that lies on this server").select_option("unmarked.safetensors")
    page.get_by_label("A key of this server").select_option("acme.key")
    page.get_by_role("button", name="Read the suspect").click()
    page.get_by_text("NOT PROVEN", exact=True).wait_for(timeout=120_000)  # the page reloads itself
    page.emulate_media(media="print")
    assert not page.get_by_role("navigation").is_visible()
    assert page.get_by_text("The question").is_visible()
    context.close()
