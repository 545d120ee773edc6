"""The page in a real browser: headless Chromium, a phone's width and a desk's, light and dark."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgeq.reporting import Sources, write
from edgeq.sweeping import SweepResult
from tests.browser import DESK, PHONE, Browser, needs_browser
from tests.reporting.test_report import HOSTILE, ROWS, recorded, trace

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of plot: two documents with sensors, one with hostile names, and a sweep."""
    waves = trace("power", "ina219", 20.0, board=4.0)
    waves = replace(waves, values={"board": 4 + np.sin(waves.t_ns / 1e9)})
    clocks = {f"policy{i}": 1e9 + 1e8 * i for i in range(8)}
    first = recorded(
        waves, trace("temperature", "thermal", 2.0, cpu=61.0, gpu=58.5),
        trace("frequency", "cpufreq", 2.0, **clocks), trace("memory", "rss", 10.0, rss=1.2e8),
        trace("throttle", "throttled", 2.0, now=0.0),
    )  # fmt: skip
    second = recorded(trace("energy", "rapl", 10.0, package=7.0), rounds=80)
    long = {**second.runs[0].subject, "name": "a" * 200 + HOSTILE, "unit": "run"}
    second = replace(second, runs=(second.runs[0], replace(second.runs[0], subject=long)))
    rows = tuple(
        SweepResult(f"r{i}", "m", f"w4-g{i}", nbytes=(10 + i) * 10**6, kl=0.1 / (i + 1),
            tokens_per_s=9.0 + i)
        for i in range(12)
    )  # fmt: skip
    path = tmp_path_factory.mktemp("report") / "report.html"
    documents = (("first.json", first), (HOSTILE, second))
    write(Sources(documents, (*ROWS, *rows)), path)
    return path


SCREENS = [(PHONE, "light"), (PHONE, "dark"), (DESK, "light"), (DESK, "dark")]


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, report: Path, width: int, scheme: str
) -> None:
    browser.open(report, width, scheme)
    assert browser.ask("return document.title") == "edgeq report"
    assert browser.ask("return document.querySelectorAll('figure.plot').length") >= 12
    assert browser.complaints() == []
    asked = [url for url in browser.requests() if url != "data:,"]
    assert asked == [report.as_uri()]
    assert browser.ask("return document.scripts.length") == 0


def test_the_checks_see_requests_and_complaints(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/x.png'><script>throw 1</script>")
    browser.open(page, PHONE, "light")
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert any("Uncaught" in text for text in browser.complaints())


def test_the_page_forbids_itself_scripts_and_requests(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        image = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
        added = f"<img src='{image}'><script>document.title = 'ran'</script></body>"
        page = tmp_path / "added.html"
        page.write_text(report.read_text("utf-8").replace("</body>", added), "utf-8")
        browser.open(page, PHONE, "light")
        assert browser.ask("return document.title") == "edgeq report"
        assert any("Content Security Policy" in text for text in browser.complaints())
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


@pytest.mark.parametrize("width", [320, PHONE, 768, DESK])
def test_nothing_is_wider_than_the_screen(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width, "light")
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    out = browser.ask("""
        document.querySelectorAll('details').forEach(e => e.open = true);
        return [...document.body.querySelectorAll('*')]
          .filter(e => !e.closest('.scroll') && !e.closest('svg') && e.getClientRects().length)
          .filter(e => { const r = e.getBoundingClientRect();
                         return r.right > window.innerWidth + 1 || r.left < -1 })
          .map(e => e.outerHTML.slice(0, 100))""")
    assert out == []
    assert browser.ask("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_every_plot_has_axes_with_units_and_is_described(
    browser: Browser, report: Path, width: int
) -> None:
    browser.open(report, width, "light")
    plots = browser.ask("""
        return [...document.querySelectorAll('figure.plot')].map(f => ({
          key: f.id,
          x: f.querySelector('.xlabel').innerText,
          y: f.querySelector('.ylabel').innerText,
          ticks: ['.xtick', '.ytick'].map(s => [...f.querySelectorAll(s)].map(t => {
            const r = t.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom] })),
          title: f.querySelector('svg title').textContent,
          desc: f.querySelector('svg desc').textContent,
          named: f.querySelector('svg').getAttribute('aria-labelledby').split(' ')
                  .every(id => document.getElementById(id)),
          table: !!f.querySelector('details table'),
          drawn: [...f.querySelectorAll('.area path.line, .area path.dot')].length,
          size: [f.querySelector('svg').clientWidth, f.querySelector('svg').clientHeight],
        }))""")
    kinds = {re.sub(r"\d+", "", plot["key"]) for plot in plots}
    assert kinds >= {"latency-token", "latency-run", "speed-token", "d-power", "d-temperature",
                     "d-frequency", "d-memory", "d-throttle", "d-roofline", "pareto--size",
                     "pareto--rate"}  # fmt: skip
    for plot in plots:
        for label in (plot["x"], plot["y"]):
            unit = label.rpartition(", ")[2]
            assert re.fullmatch(
                r"%|s|ms|W|°C|GHz|MiB|MB|count or flags|\w+/s|nats/token|"
                r"int8 operations/byte read|10⁹ int8 operations/s",
                unit,
            ), label
        xs, ys = plot["ticks"]
        assert min(len(xs), len(ys)) >= 2, plot["key"]
        for a, b in pairwise(xs):
            assert a[1] <= b[0] + 1, f"{plot['key']}: ticks overlap at {width}"
        for a, b in pairwise(ys):
            assert b[3] <= a[2] + 1, f"{plot['key']}: ticks overlap"
        assert plot["title"]
        assert plot["desc"]
        assert plot["named"]
        assert plot["drawn"]
        assert plot["table"] or plot["key"].endswith("rate")
        assert min(plot["size"]) > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_large_enough_and_stands_out(browser: Browser, report: Path, scheme: str) -> None:
    browser.open(report, PHONE, scheme)
    found = browser.ask("""
        const rgb = text => text.match(/[\\d.]+/g).map(Number);
        const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ?
            v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b };
        const under = e => { for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length < 4 || c[3]) return c } };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
            return (x + 0.05) / (y + 0.05) };
        document.querySelectorAll('details').forEach(e => e.open = true);
        const texts = [...document.body.querySelectorAll('*')].filter(e => !e.closest('svg') &&
            [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
        const page = under(document.body);
        return {
          size: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
          text: Math.min(...texts.map(e => ratio(rgb(getComputedStyle(e).color), under(e)))),
          lines: Math.min(...[...document.querySelectorAll('path.line, path.dot')]
                 .map(e => ratio(rgb(getComputedStyle(e).stroke), page))),
          bars: ratio(rgb(getComputedStyle(document.querySelector('.bar')).backgroundColor), page),
          onShades: Math.min(...[...document.querySelectorAll('.low')].flatMap(f =>
                 [...f.querySelectorAll('.area path.line')].flatMap(l =>
                 [...f.querySelectorAll('.area path.shade')].map(s => ratio(
                     rgb(getComputedStyle(l).stroke), rgb(getComputedStyle(s).fill)))))),
          page: light(page),
        }""")
    assert found["size"] >= 12
    assert found["text"] >= 4.5
    assert found["lines"] >= 3
    assert found["bars"] >= 3
    assert found["onShades"] >= 3
    assert found["page"] > 0.9 if scheme == "light" else found["page"] < 0.05


def test_hostile_names_are_text(browser: Browser, report: Path) -> None:
    browser.open(report, PHONE, "light")
    assert HOSTILE in browser.ask("return document.body.textContent")
    assert browser.ask("return document.querySelectorAll('img, script').length") == 0
