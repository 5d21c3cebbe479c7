"""The page in a real browser: type, stream, stop, on a desk and on a phone. $JAXLM_SCREENSHOTS keeps pictures to look at."""

import os
import pathlib
import re
import shutil
import time

import httpx
import pytest
from served import fake_server

from jaxlm.serve.options import ServeOptions
from jaxlm.serve.page import Page

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SAYS = (
    "They dream of the open sea, I think, and of the wind that carries them there. <b>A boat</b> at rest keeps the memory of "
    "every wave it has met.\n\nHere is how one would count them:\n```python\n"
    'for boat in harbour.boats(sorted_by="length", only="those that are asleep and lie still in the dark"):\n'
    "    print(boat.name, boat.dream)\n```\nAnd in the morning they forget. "
)
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    """A browser with a profile of its own, or the reason why there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a page; whatever it complains of fails the test, but what it is asked to `forgive`."""
    pages, contexts = [], []

    def go(url, view=DESK, dark=False, forgive="(?!)"):
        phone = view == PHONE
        context = chromium.new_context(
            viewport=view, color_scheme="dark" if dark else "light", has_touch=phone, is_mobile=phone, device_scale_factor=1 + phone
        )
        page = context.new_page()
        page.set_default_timeout(15_000)
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        pages.append((page, said, forgive))
        contexts.append(context)
        return page

    yield go
    for page, said, forgive in pages:
        assert not [text for text in said if not re.search(forgive, text)]
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"], "wider than the screen"
    for context in contexts:
        context.close()


def picture(page, name):
    if folder := os.environ.get("JAXLM_SCREENSHOTS"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


def shown(page, text, seconds=10):
    page.wait_for_function("text => document.getElementById('turns').innerText.includes(text)", arg=text, timeout=seconds * 1000)


def idle(engine, seconds=5):
    end = time.monotonic() + seconds
    while engine.stats().running:
        assert time.monotonic() < end, "it goes on writing"
        time.sleep(0.02)


def test_a_conversation(visit):
    with fake_server(context=3000, delay=0.004, says=SAYS) as live:
        page = visit(live.url)
        picture(page, "desk-empty")
        page.keyboard.type("The boats lie still.")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("What do they dream of?")
        assert page.input_value("#input") == "The boats lie still.\nWhat do they dream of?"
        page.keyboard.press("Enter")
        shown(page, "They dream of the open sea")
        assert live.engine.stats().running == 1 and page.is_visible("#stop") and not page.is_visible("#send")
        shown(page, "And in the morning")
        picture(page, "desk-streaming")
        page.click("#stop")
        idle(live.engine)
        shown(page, "stopped")
        assert re.search(r"\d+ tokens · \d+\.\d tokens/s · stopped", page.inner_text(".foot"))
        assert page.locator(".theirs b").count() == 0 and "<b>A boat</b>" in page.inner_text(".theirs")  # text is never markup
        assert "print(boat.name" in page.inner_text(".theirs pre")
        picture(page, "desk-stopped")

        page.click("#adjust")
        page.fill("#system", "Be brief")
        page.fill("#max_tokens", "20")
        page.click("#adjust")
        page.fill("#input", "And you?")
        page.press("#input", "Enter")
        shown(page, "20 tokens")
        shown(page, "first after")
        shown(page, "ended by its limit")
        request = live.engine.seen[-1]
        told = bytes(i for i in request.prompt if i < 256).decode()
        assert told.startswith("System: Be brief\nUser: The boats lie still.\nWhat do they dream of?\nAssistant: They dream")
        assert told.endswith("User: And you?\nAssistant:") and request.max_tokens == 20 and request.sample.temperature == 0.8
        page.click(".theirs:last-child button:has-text('Retry')")
        shown(page, "first after")
        assert page.locator(".theirs").count() == 2 and live.engine.seen[-1].prompt == request.prompt

        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
        picture(page, "desk-dark")
        page.click("#fresh")
        shown(page, "Say something")


@pytest.mark.slow
def test_on_a_phone(visit):
    """Enter starts a line there, and the button sends; nothing is wider than the screen (`visit` looks)."""
    with fake_server(context=3000, delay=0.002, says=SAYS) as live:
        page = visit(live.url, PHONE, dark=True)
        page.tap("#input")
        page.keyboard.type("One line")
        page.keyboard.press("Enter")
        assert page.input_value("#input") == "One line\n" and not live.engine.seen
        page.tap("#send")
        shown(page, "And in the morning")
        picture(page, "phone-streaming")
        page.tap("#stop")
        shown(page, "stopped")
        page.tap("#adjust")
        picture(page, "phone-settings")
        idle(live.engine)


@pytest.mark.slow
def test_a_model_that_only_goes_on(visit):
    with fake_server(context=3000, delay=0.002, says=SAYS, chats=False) as live:
        page = visit(live.url, PHONE)
        assert "Begin a text" in page.inner_text("#turns") and not page.is_visible("#settings")
        page.fill("#input", "The harbour is quiet. ")
        page.tap("#send")
        shown(page, "256 tokens")
        assert bytes(live.engine.seen[-1].prompt[1:]) == b"The harbour is quiet. "
        assert page.inner_text(".page .text").startswith("The harbour is quiet. They dream")
        picture(page, "phone-text")
        page.tap("button:has-text('Go on')")
        page.wait_for_function("() => document.querySelector('.page .new').textContent.startsWith('They')")
        assert bytes(live.engine.seen[-1].prompt[1:]).startswith(b"The harbour is quiet. They dream")
        page.keyboard.press("Escape")
        shown(page, "stopped")
        idle(live.engine)


def test_a_key_is_asked_for(visit):
    with fake_server(ServeOptions(api_key="secret")) as live:
        page = visit(live.url, forgive="401")
        page.fill("#input", "Hi")
        page.press("#input", "Enter")
        shown(page, "asks for an API key")
        assert page.evaluate("document.activeElement.id") == "key"
        picture(page, "desk-key")
        page.fill("#key", "secret")
        page.click("button:has-text('Try again')")
        shown(page, "User: Hi")


@pytest.mark.slow
def test_a_short_context_is_no_error(visit):
    """The most new tokens that are set are more than fit behind the prompt: as many as fit are asked for, nearly."""
    with fake_server(context=100, delay=0.002, says=SAYS, chats=False) as live:
        page = visit(live.url, forgive="400")
        assert page.input_value("#max_tokens") == "100"
        page.fill("#input", "x" * 80)
        page.press("#input", "Enter")
        shown(page, "12 tokens")


def test_nothing_foreign_runs_on_it(live):
    """One file: no address in it but its own routes, and a policy that names its script by its hash."""
    found = httpx.get(live.url)
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+';", policy) and "frame-ancestors 'none'" in policy
    assert not re.search(r"(?:src|href)=\"(?!data:)|@import|url\(", found.text.replace("http://www.w3.org", ""))


def test_a_models_name_is_text():
    body = Page("</script><script>alert(1)</script>", "chat", False).response().body.decode()
    assert "<script>alert" not in body and "\\u003c/script>" in body
