"""The chat page in a real browser, on a running server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeq
from tests.browser import DESK, PHONE, Browser, needs_browser
from tests.chat_models import endless_copy
from tests.paths import DEMO
from tests.serving.plain_http import ask, metric

pytestmark = needs_browser
HOSTILE = "<img src=x onerror=\"document.title='run'\"> [a](javascript:alert(1)) <script>1</script>"
NAME = "<b>tale</b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


@pytest.fixture(scope="module")
def pair(talker: Path) -> Iterator[edgeq.Server]:
    """A chat model and one without a template, whose name is markup."""
    settings = edgeq.ServerSettings(port=0, parallel=2)
    models: list[Any] = [("talker", talker), (NAME, DEMO)]
    with edgeq.Server(models, settings, context=512, threads=1) as made:
        yield made


class Page:
    """The page, and what a person does with it."""

    def __init__(self, browser: Browser, server: edgeq.Server, width: int, models: int = 2) -> None:
        self.browser = browser
        browser.open(server.url + "/health", width, "light")
        browser.ask("localStorage.clear(); sessionStorage.clear()")
        browser.open(server.url + "/", width, "light")
        self.until(f"document.getElementById('model').options.length === {models}")

    def ask(self, script: str) -> Any:
        return self.browser.ask("return " + script)

    def until(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser.driver, 60, 0.05).until(lambda _: self.ask(script))

    def press(self, selector: str) -> None:
        self.browser.driver.find_element("css selector", selector).click()

    def set(self, name: str, value: object) -> None:
        """Give a setting another value, as typing it does."""
        self.browser.ask(
            f"const field = document.getElementById({json.dumps(name)});"
            f"field.value = {json.dumps(str(value))};"
            "field.dispatchEvent(new Event('change', {bubbles: true}))"
        )

    def write(self, text: str) -> None:
        field = self.browser.driver.find_element("id", "message")
        field.send_keys(text + "\n")

    def answered(self) -> None:
        self.until("!document.getElementById('send').hidden")

    @property
    def answers(self) -> list[str]:
        found = self.ask("[...document.querySelectorAll('.answer .text')].map(e => e.innerText)")
        return [str(text) for text in found]


def test_a_conversation(browser: Browser, pair: edgeq.Server) -> None:
    """Send, regenerate, edit, reload, begin anew."""
    page = Page(browser, pair, DESK)
    page.set("temperature", 0)
    page.set("max_tokens", 12)
    page.write("Tell me.")
    page.answered()
    body = {"messages": [{"role": "user", "content": "Tell me."}], "temperature": 0,
            "max_tokens": 12}  # fmt: skip
    said = ask(pair, "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert page.answers[0].split() == said.split()
    assert "12 tokens" in page.ask("document.querySelector('.foot').innerText")
    assert page.ask("document.getElementById('speed').innerText").endswith("tok/s")
    assert page.ask("document.getElementById('context').innerText").endswith(" of 512")
    page.write("And then?")
    page.answered()
    assert len(page.answers) == 2
    page.press(".turn:first-of-type .foot .tool")  # regenerate: what came after is gone
    page.answered()
    assert [text.split() for text in page.answers] == [said.split()]
    page.press(".mine-tools .tool")
    field = browser.driver.find_element("css selector", ".edit textarea")
    field.clear()
    field.send_keys("The fox\n")
    page.until("document.querySelector('.mine')?.innerText === 'The fox'")
    page.answered()
    body["messages"] = [{"role": "user", "content": "The fox"}]
    said = ask(pair, "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert page.answers[0].split() == said.split()
    before = page.answers
    browser.driver.refresh()
    page.until("document.querySelectorAll('.answer').length === 1")
    assert page.answers == before
    page.press("#new")
    assert page.answers == []
    assert browser.complaints() == []


def test_stop_frees_the_slot(browser: Browser, talker: Path, tmp_path: Path) -> None:
    settings = edgeq.ServerSettings(port=0, parallel=1)
    endless = endless_copy(
        talker, tmp_path / "endless"
    )  # an answer must not end before it is stopped
    models: list[Any] = [("talker", endless), ("tale", DEMO)]
    with edgeq.Server(models, settings, context=512, backend="numpy") as slow:
        _stop(Page(browser, slow, PHONE), slow)


def _stop(page: Page, server: edgeq.Server) -> None:
    page.set("max_tokens", 480)
    # pressed by the page itself as the words come: between two commands of the driver a short
    # answer may end
    page.browser.ask(
        "new MutationObserver((_, words) => {"
        "  if ((document.querySelector('.answer .text')?.innerText.length ?? 0) <= 20) return;"
        "  words.disconnect();"
        "  const stop = document.querySelector('#stop');"
        "  if (stop.checkVisibility()) stop.click();"
        "}).observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    page.write("Tell me.")
    page.until("document.querySelector('.answer .text')?.innerText.length > 20")
    page.answered()
    assert "stopped" in page.ask("document.querySelector('.foot').innerText")
    for _ in range(500):
        if not (running := metric(server, 'edgeq_requests_running{model="talker"}')):
            break
        time.sleep(0.01)
    assert running == 0


def test_two_models_side_by_side(browser: Browser, pair: edgeq.Server) -> None:
    page = Page(browser, pair, DESK)
    page.set("max_tokens", 8)
    page.press("#compare")
    page.write("Once upon a time")
    page.answered()
    assert len(page.answers) == 2
    assert all(page.answers)
    names = page.ask("[...document.querySelectorAll('.answer h2')].map(e => e.innerText)")
    assert [name.rsplit(" ", 2)[0] for name in names] == ["talker", NAME]
    assert all(name.endswith(" MiB") for name in names)
    browser.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert page.ask("[...document.querySelectorAll('.foot')].every(e => !e.hidden)")
    places = page.ask(
        "[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().left)"
    )
    assert places[0] < places[1]
    page.press("#report-button")
    page.until("document.getElementById('report-text').innerText.includes('no report')")
    assert browser.complaints() == []


def test_what_differs_between_two_models_is_not_chance(
    browser: Browser, talker: Path, tmp_path: Path
) -> None:
    """Sampled answers of a model and its copy are the same; those of a coarser one are not."""
    coarse = tmp_path / "coarse.edgeq"
    edgeq.quantize(DEMO, coarse, "w2-g32", threads=1)
    models: list[Any] = [("one", DEMO), ("copy", DEMO), ("coarse", coarse)]
    settings = edgeq.ServerSettings(port=0, parallel=1)
    with edgeq.Server(models, settings, context=256, threads=1) as three:
        page = Page(browser, three, DESK, models=3)
        page.set("max_tokens", 24)
        page.set("temperature", 1.5)
        page.press("#compare")
        page.write("Once upon a time")
        page.answered()
        note = "document.querySelector('.difference').innerText"
        assert page.ask(note) == "Both answers are the same."
        first, second = page.answers
        assert first == second
        page.press(".foot .tool")  # both again, with other random numbers
        page.until(f"document.querySelector('.answer .text').innerText !== {json.dumps(first)}")
        page.answered()
        assert page.answers[0] == page.answers[1] != first
        # an answer that ends before the other is shown as ended
        page.set("other", "coarse")
        page.browser.ask("window.requestAnimationFrame = act => setTimeout(act, 30)")
        page.write("Once upon a time")
        page.answered()
        browser.driver.execute_async_script("setTimeout(arguments[0], 200)")
        assert page.ask("[...document.querySelectorAll('.foot')].every(e => !e.hidden)")
        first, second = page.answers[2:]
        assert first != second
        shown = page.ask("[...document.querySelectorAll('.difference')].at(-1).innerText")
        words = re.search(r"first (\d+) words", shown)
        same = int(words[1]) if words else "word is" in shown
        assert first.split()[:same] == second.split()[:same]
        assert browser.complaints() == []


def test_words_are_counted_without_the_space_before_them(
    browser: Browser, pair: edgeq.Server
) -> None:
    Page(browser, pair, DESK)
    script = """
        const done = arguments[arguments.length - 1];
        import("./measures.js").then(({ sameness }) => done([
            sameness(" there were two", " there were a"), sameness(" there", " were"),
            sameness("", " were"), sameness(" one  word\\n", "one word more"),
        ]));
    """
    assert browser.driver.execute_async_script(script) == [
        "The first 2 words are the same.", "The answers differ from the first word on.",
        "The answers differ from the first word on.", "The first 2 words are the same.",
    ]  # fmt: skip


def test_a_reload_keeps_what_was_written(browser: Browser, talker: Path, tmp_path: Path) -> None:
    """An answer that a reload interrupts stays on the page, and can be continued."""
    settings = edgeq.ServerSettings(port=0, parallel=1)
    endless = endless_copy(talker, tmp_path / "endless")
    models: list[Any] = [("talker", endless), ("tale", DEMO)]
    with edgeq.Server(models, settings, context=512, backend="numpy") as slow:
        page = Page(browser, slow, DESK)
        page.set("max_tokens", 400)
        page.write("Tell me.")
        page.until("document.querySelector('.answer .text')?.innerText.length > 20")
        seen = page.answers[0]
        browser.driver.refresh()
        page.until("document.getElementById('model').options.length === 2")
        assert page.answers[0].startswith(seen[:20])
        assert page.ask("document.querySelector('.fault').innerText") == ""
        assert "stopped" in page.ask("document.querySelector('.foot').innerText")
        page.set("max_tokens", 2)
        page.write("And then?")
        page.answered()
        assert page.answers[1]
        assert page.ask("[...document.querySelectorAll('.fault')].every(e => !e.innerText)")


def test_hostile_text_stays_text(browser: Browser, pair: edgeq.Server) -> None:
    """In the model's answer (a schema makes it say that), the prompt and the model's name."""
    pytest.importorskip("llguidance")
    page = Page(browser, pair, DESK)
    page.set("schema", json.dumps({"const": HOSTILE}))
    page.write(HOSTILE)
    page.answered()
    assert page.ask("document.querySelector('.mine').textContent") == HOSTILE
    assert "onerror" in page.answers[0]
    assert page.ask("document.title") == "edgeq chat"
    assert page.ask("document.querySelectorAll('main img, main script, main a').length") == 0
    assert page.ask("document.querySelectorAll('#model b').length") == 0
    assert browser.complaints() == []


MARKDOWN = """# One

Some *slanted* and **bold** `code`, [a link](https://example.org/x) and <b>no tag</b>.

- first
  - inner
- second

1. one
2. two

| a | b |
| --- | ---: |
| 1 | 2 |

```python
print("<i>")
```

> said
"""


def test_markdown_becomes_nodes(browser: Browser, pair: edgeq.Server) -> None:
    page = Page(browser, pair, DESK)
    browser.driver.set_script_timeout(30)
    made = browser.driver.execute_async_script(
        "const done = arguments[1]; import('/markdown.js').then(m => {"
        "const box = document.createElement('div'); box.append(...m.markdown(arguments[0]));"
        "done(box.innerHTML) })", MARKDOWN,
    )  # fmt: skip
    for piece in (
        "<h3>One</h3>", "<em>slanted</em>", "<strong>bold</strong>", "<code>code</code>",
        'href="https://example.org/x"', "&lt;b&gt;no tag&lt;/b&gt;", "<li>first<ul><li>inner</li>",
        "<ol><li>one</li><li>two</li></ol>", "<th>a</th>", "<td>2</td>",
        'print("&lt;i&gt;")', "<blockquote><p>said</p></blockquote>",
    ):  # fmt: skip
        assert piece in made, made
    assert page.ask("document.scripts.length") == 1


@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
def test_it_fits_and_asks_nobody_else(browser: Browser, pair: edgeq.Server, width: int) -> None:
    page = Page(browser, pair, width)
    drawers = ["#settings-button", "#report-button", *(["#phone-button"] if width > 720 else [])]
    for button in (*drawers, "#compare"):
        page.press(button)
        assert page.ask("document.documentElement.scrollWidth") <= width
        if button != "#compare":
            page.press("aside:not([hidden]) .close")
    unnamed = page.ask(
        "[...document.querySelectorAll('button, select, textarea, input')].filter(e =>"
        "!(e.innerText || e.labels?.length || e.getAttribute('aria-label'))).map(e => e.id)"
    )
    assert unnamed == []
    asked = {url.split("/")[2] for url in browser.requests() if url.startswith("http")}
    assert asked == {pair.url.split("/")[2]}
    assert browser.complaints() == []


def test_the_page_forbids_itself_other_scripts(pair: edgeq.Server) -> None:
    reply = ask(pair, "/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    scripts = [f"/{name}.js" for name in ("api", "chat", "drawers", "markdown", "measures")]
    assert b"innerHTML" not in b"".join(ask(pair, file).raw for file in scripts)


def test_the_address_for_a_phone(browser: Browser, talker: Path, pair: edgeq.Server) -> None:
    pytest.importorskip("segno")
    page = Page(browser, pair, DESK)
    page.press("#phone-button")
    page.until("document.getElementById('phone-codes').innerText.includes('--host 0.0.0.0')")
    settings = edgeq.ServerSettings(host="0.0.0.0", port=0, insecure=True)
    models: list[Any] = [("talker", talker), ("tale", DEMO)]
    with edgeq.Server(models, settings, context=128, threads=1) as shared:
        port = shared.url.rpartition(":")[2]
        found = ask(shared, "/phone", headers={"Host": f"board.local:{port}"}).json
        assert found["addresses"][0]["url"] == f"http://board.local:{port}/"
        for host in ("localhost:1", "127.0.0.1:1", "[::1]:1", 'a"b:1', "a b:1", ""):
            urls = [one["url"] for one in ask(shared, "/phone", headers={"Host": host}).json[
                "addresses"]]  # fmt: skip
            assert all(url.endswith(f":{port}/") and "127.0.0" not in url for url in urls), urls
            assert not any("[" in url for url in urls)  # it does not listen on IPv6
        local: Any = type("Place", (), {"url": f"http://127.0.0.1:{port}"})
        page = Page(browser, local, DESK)
        page.press("#phone-button")
        page.until("!document.getElementById('phone-codes').innerText.includes('Loading')")
        shown = page.ask("[...document.querySelectorAll('figcaption')].map(e => e.innerText)")
        assert all(f":{port}/" in url for url in shown)
        sizes = page.ask("[...document.querySelectorAll('figure img')].map(e => e.naturalWidth)")
        assert len(sizes) == len(shown)
        assert all(size > 100 for size in sizes)
        assert browser.complaints() == []


def test_without_segno_the_address_is_shown_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeq.serving import phone

    def absent(extra: str, packages: Any, purpose: str) -> None:
        raise edgeq.MissingDependencyError(packages[0], extra, purpose, [])

    monkeypatch.setattr(phone, "require", absent)
    settings = edgeq.ServerSettings(host="192.0.2.7", insecure=True)
    found = phone.phone_addresses(settings, 8080, "localhost:8080")
    assert found["addresses"] == [{"url": "http://192.0.2.7:8080/", "qr": None}]
    assert "edgeq[serve]" in found["reason"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_axe_finds_nothing_serious(
    browser: Browser, pair: edgeq.Server, width: int, scheme: str
) -> None:
    """axe-core's rules on the empty page, a conversation, two models, and each drawer."""
    axe = pytest.importorskip("axe_core_python")
    source = (Path(axe.__path__[0]) / "axe.min.js").read_text("utf-8")
    page = Page(browser, pair, width)
    browser.open(pair.url + "/", width, scheme)
    page.until("document.getElementById('model').options.length === 2")
    browser.driver.set_script_timeout(60)
    browser.driver.execute_script(source)

    def serious() -> list[Any]:
        found = browser.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then(result => done(result.violations.map("
            "v => [v.id, v.impact, v.nodes.map(n => n.html)])))"
        )
        return [one for one in found if one[1] in ("serious", "critical")]

    assert serious() == []
    page.set("max_tokens", 8)
    page.write("Tell me. `code` *x*")
    page.answered()
    assert serious() == []
    page.press("#compare")
    page.write("Once upon a time")
    page.answered()
    assert serious() == []
    for name in ("settings", "report", *(["phone"] if width == DESK else [])):
        page.press(f"#{name}-button")
        page.until(f"!document.getElementById('{name}').innerText.includes('Loading')")
        assert serious() == []
        page.press(f"#{name} .close")
