"""The page of examples/serve_openai in a browser without a window."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server import served
from tiny_server import EXAMPLES, PATIENCE, Tiny, application, process, started

pytest.importorskip("openai", reason="pip install 'lora-mux[serve]'")
pytest.importorskip("transformers", "5.23", reason="pip install 'lora-mux[serve]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("apt-get install chromium chromium-driver", allow_module_level=True)

GONE = "the server does not answer: does it still run?"
# Without them the browser asks its maker's servers for updates, or would need a GPU.
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
FLAGS += ["disable-background-networking", "disable-component-update", "window-size=1180,900"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    tiny = Tiny(tmp_path_factory.mktemp("tiny"))
    with started(tiny, cache_tokens=4096) as models, served(application(models)) as url:
        yield SimpleNamespace(tiny=tiny, models=models, model=models.model, url=url)


@pytest.fixture
def page(browser: Any, stage: SimpleNamespace) -> Iterator[Any]:
    browser.get(stage.url)
    page = Page(browser)
    page.wait(lambda: page.names("a"))
    yield page
    page.complaints()


@pytest.fixture
def slowly(stage: SimpleNamespace) -> Iterator[None]:
    """Steps of the model take long enough to look at the page between them."""
    hook = stage.model.register_forward_hook(lambda *given: time.sleep(0.03))
    yield
    hook.remove()


class Page:
    """What a person does there."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """As it is, with its spaces."""
        return str(self.find(selector).get_property("textContent"))

    def names(self, side: str) -> list[str]:
        found = self.browser.find_elements("css selector", f"#{side} .weights span")
        return [span.text for span in found]

    def slide(self, side: str, name: str, weight: float) -> None:
        slider = self.find(f"#{side} [data-adapter='{name}']")
        self.browser.execute_script("arguments[0].value = arguments[1]", slider, weight)
        self.browser.execute_script("arguments[0].dispatchEvent(new Event('input'))", slider)

    def complaints(self) -> list[str]:
        """Errors in the browser's console since the last time: of scripts, and of the policy."""
        log = self.browser.get_log("browser")
        return [line["message"] for line in log if line["level"] == "SEVERE"]

    def fill(self, selector: str, value: str) -> None:
        self.find(selector).clear()
        self.find(selector).send_keys(value)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def wait(self, until: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while not (found := until()):
            assert time.monotonic() < end
            time.sleep(0.02)
        return found


def test_two_mixes_side_by_side(page: Any, stage: SimpleNamespace, slowly: None) -> None:
    """What the sliders say is asked for, and what comes is shown as it comes."""
    assert page.names("a") == page.names("b") == stage.tiny.names
    assert page.text("#a code") == "base" and page.text("#b code") == "base:sql"
    page.slide("a", "sql", 1)
    page.slide("a", "french", 0.4)
    page.slide("b", "sql", 0)
    page.slide("b", "legal", -0.5)
    assert page.text("#a code") == "base:sql+0.4*french"
    assert page.text("#b code") == "base:-0.5*legal"
    page.fill("#prompt", "hello <b>you</b>")
    page.fill("#tokens", "16")
    page.click("#ask")
    seen: set[tuple[str, str]] = set()

    def ended() -> bool:
        seen.add((page.text("#a .answer"), page.text("#b .answer")))
        return "tokens in" in page.text("#a .note") and "tokens in" in page.text("#b .note")

    page.wait(ended)
    for side, row in (("a", "sql+0.4*french"), ("b", "-0.5*legal")):
        assert page.text(f"#{side} .answer") == stage.tiny.answer(row, "hello <b>you</b>")
    assert len([1 for a, b in seen if a and b]) > 3  # they grew, side by side
    assert not page.complaints()


def test_plain_text_and_the_keyboard(page: Any, stage: SimpleNamespace) -> None:
    page.find("#b [data-adapter=sql]").send_keys("\ue014\ue014")  # right, right: 0.05 each
    assert page.text("#b code") == "base:1.1*sql"
    page.find("#kind").send_keys("plain text")
    page.fill("#tokens", "16")
    page.fill("#prompt", "hello")
    page.find("#prompt").send_keys("\ue009\ue007")  # control and enter
    page.wait(lambda: "tokens in" in page.text("#b .note"))
    assert page.text("#b .answer") == stage.tiny.answer("1.1*sql", "hello", 16, False)
    assert not page.complaints()


def test_an_error_of_one_side(page: Any, stage: SimpleNamespace) -> None:
    """It is shown there, and the other side is answered."""
    stage.models.mux.remove("sql")
    page.fill("#tokens", "8")
    page.click("#ask")
    page.wait(lambda: page.find("#ask").is_enabled())
    assert "unknown adapter 'sql'" in page.text("#b .note.bad")
    assert page.text("#a .answer") == stage.tiny.answer("", "What do you know?", 8)
    stage.models.mux.load("sql", stage.tiny.adapters / "sql")
    assert [line for line in page.complaints() if "404" in line]


def test_stopping_frees_both_requests(page: Any, stage: SimpleNamespace, slowly: None) -> None:
    page.fill("#tokens", "900")
    page.fill("#temperature", "2")
    page.click("#ask")
    page.wait(lambda: page.text("#b .answer"))
    page.click("#stop")
    page.wait(lambda: page.text("#b .note") == "stopped" == page.text("#a .note"))
    page.wait(lambda: not stage.models.engine.scheduler.active_requests)


def test_a_reload_frees_both_requests(page: Any, stage: SimpleNamespace, slowly: None) -> None:
    page.fill("#tokens", "900")
    page.click("#ask")
    page.wait(lambda: page.text("#b .answer"))
    page.browser.refresh()
    page.wait(lambda: not stage.models.engine.scheduler.active_requests)
    page.wait(lambda: page.names("a"))
    assert page.find("#ask").is_enabled() and not page.text("#b .answer")


def test_twenty_adapters_with_all_sliders_at_an_end(page: Any, stage: SimpleNamespace) -> None:
    """Copies of one, so that their weights add up: 10 * 1.5 - 7 * 1."""
    copies = [f"a-copy.of_sql-{i}" for i in range(17)]
    stage.models.mux.load_many(dict.fromkeys(copies, stage.tiny.adapters / "sql"))
    try:
        page.browser.refresh()
        page.wait(lambda: len(page.names("b")) == 20)
        for name in stage.tiny.names:
            page.slide("b", name, 0)
        for i, name in enumerate(copies):
            page.slide("b", name, 99 if i < 10 else -99)
        terms = page.text("#b code").removeprefix("base:").split("+")
        assert terms == [f"{1.5 if i < 10 else -1}*{name}" for i, name in enumerate(copies)]
        page.fill("#tokens", "16")
        page.click("#ask")
        page.wait(lambda: "tokens in" in page.text("#b .note"))
        assert page.text("#b .answer") == stage.tiny.answer("8*sql", "What do you know?")
        assert not page.complaints()
    finally:
        for name in copies:
            stage.models.mux.remove(name)


def test_names_that_mean_something_in_javascript(page: Any, stage: SimpleNamespace) -> None:
    """Members of each object, and a number, which would come first."""
    odd = ["toString", "constructor", "__proto__", "7"]
    usual = [*stage.models.mux.adapters]
    stage.models.mux.load_many(dict.fromkeys(odd, stage.tiny.adapters / "sql"))
    try:
        page.browser.refresh()
        page.wait(lambda: len(page.names("b")) == 7)
        assert page.names("a") == page.names("b") == [*usual, *odd]
        assert page.text("#a code") == "base" and page.text("#b code") == f"base:{usual[0]}"
        page.slide("b", usual[0], 0)
        for name in odd:
            page.slide("b", name, 0.5)
        rest = "+".join(f"0.5*{name}" for name in odd)
        assert page.text("#b code") == f"base:{rest}"
        page.browser.execute_script("return list()")  # it waits; what was chosen stays
        assert page.text("#b code") == f"base:{rest}"
        page.fill("#tokens", "8")
        page.click("#ask")
        page.wait(lambda: "tokens in" in page.text("#b .note"))
        assert page.text("#b .answer") == stage.tiny.answer("2*sql", "What do you know?", 8)
        assert not page.complaints()
    finally:
        for name in odd:
            stage.models.mux.remove(name)


def test_any_characters_and_a_long_answer(page: Any, stage: SimpleNamespace) -> None:
    text = "\u00fc \u4f60\u597d \U0001f600 </textarea>\n\n<script>throw 1</script>\t\\ \"'"
    page.browser.execute_script("arguments[0].value = arguments[1]", page.find("#prompt"), text)
    page.fill("#tokens", "600")
    page.click("#ask")
    page.wait(lambda: page.find("#ask").is_enabled())
    for side in ("a", "b"):
        row = page.text(f"#{side} code").removeprefix("base").removeprefix(":")
        assert page.text(f"#{side} .answer") == stage.tiny.answer(row, text, 600)
        assert "tokens in" in page.text(f"#{side} .note")
    assert not page.complaints()


def test_numbers(page: Any, stage: SimpleNamespace) -> None:
    """A field without one is left to the server, whose usual answer is greedy; others are told."""
    page.find("#temperature").clear()
    page.fill("#tokens", "8")
    page.click("#ask")
    page.wait(lambda: "tokens in" in page.text("#b .note"))
    row = page.text("#b code").removeprefix("base:")
    assert page.text("#b .answer") == stage.tiny.answer(row, "What do you know?", 8)
    for field, given, said in (
        ("#temperature", "e", "temperature must be a number"),
        ("#temperature", "3", "less than or equal to 2, got 3"),
        ("#tokens", "0", "greater than or equal to 1, got 0"),
        ("#tokens", "1.5", "integer"),
        ("#tokens", "999999", "at most"),
    ):
        before = page.find(field).get_property("value")
        page.fill(field, given)
        page.click("#ask")
        page.wait(lambda: page.find("#ask").is_enabled())
        for side in ("a", "b"):
            assert said in page.text(f"#{side} .note.bad") and not page.text(f"#{side} .answer")
        page.fill(field, before or "0")
    page.complaints()


def test_a_server_that_is_gone(browser: Any, stage: SimpleNamespace, tmp_path: Path) -> None:
    """Midway, before the next question, and with another key: the page says so each time."""
    base, adapters = str(stage.tiny.base), stage.tiny.folders("sql")
    with process(tmp_path / "log", base, *adapters, env={"LORA_MUX_API_KEY": ""}) as server:
        browser.get(server.url)
        page = Page(browser)
        page.wait(lambda: page.names("a"))
        page.fill("#tokens", "900")
        page.click("#ask")
        page.wait(lambda: page.text("#a .answer") and page.text("#b .answer"))
        server.process.kill()
        for _ in range(2):
            page.wait(lambda: page.find("#ask").is_enabled())
            for side in ("a", "b"):
                assert page.text(f"#{side} .note.bad") == GONE
                assert not page.find(f"#{side} .answer").get_attribute("class").count("busy")
            page.click("#ask")
    page.wait(lambda: page.find("#ask").is_enabled())
    browser.execute_script("list()")
    page.wait(lambda: page.text("#failure") == GONE)
    page.complaints()


def test_a_key_that_is_wanted_later(page: Any, stage: SimpleNamespace) -> None:
    """As by a server that was started again: the page asks for it where an answer is refused."""
    answers = 'async () => new Response(\'{"error": {"message": "no key"}}\', {status: 401})'
    page.browser.execute_script(f"window.fetch = {answers}")
    assert not page.find("#key").is_displayed()
    page.click("#ask")
    page.wait(lambda: page.text("#b .note") == "no key")
    assert page.find("#key").is_displayed()
    page.fill("#key", "\u4f60")
    page.click("#ask")
    page.wait(lambda: "of ASCII" in page.text("#b .note"))


def test_the_key(browser: Any, stage: SimpleNamespace) -> None:
    """Without it the page says what is missing, and shows nothing."""
    with served(application(stage.models, key="secret")) as url:
        browser.get(url)
        page = Page(browser)
        page.wait(lambda: "key" in page.text("#failure"))
        assert page.find("#key").is_displayed() and not page.names("a")
        page.fill("#key", "secret\n")
        page.wait(lambda: {*page.names("a")} == {*stage.tiny.names})
        assert not page.find("#failure").is_displayed()
        page.slide("b", "french", 1)
        page.fill("#tokens", "8")
        page.click("#ask")
        page.wait(lambda: "tokens in" in page.text("#b .note"))
        row = page.text("#b code").removeprefix("base:")
        assert page.text("#b .answer") == stage.tiny.answer(row, "What do you know?", 8)


def test_the_page_brings_all_that_it_needs() -> None:
    text = (EXAMPLES / "serve_openai/page.html").read_text("utf-8")
    assert "http:" not in text and "https:" not in text and "src=" not in text
