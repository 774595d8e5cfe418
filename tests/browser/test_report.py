"""The report page in a real browser: readable, accessible, printable, inside MLflow's frame."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flataudit.report import html
from tests.report_cases import large, made_up, with_everything

pytestmark = pytest.mark.browser

WIDTHS = {"wide": 1280, "phone": 360}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every made-up report, and two with all sections, as files."""
    folder = tmp_path_factory.mktemp("pages")
    made = {name: (*pair, None) for name, pair in made_up().items()}
    made |= {"everything": with_everything(), "large": (*large(), None)}
    for name, parts in made.items():
        (folder / f"{name}.html").write_text(html.render(*parts), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


NAMES = ("calibrated", "refused", "regression", "without_loo", "everything", "large")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_violation(browser, view, axe, pages, name, scheme, width):
    view(browser, width=WIDTHS[width], scheme=scheme)
    browser.get(pages[name].as_uri())
    open_all(browser)
    browser.execute_script(axe)
    found = browser.execute_async_script(
        "axe.run(document, {resultTypes: ['violations', 'incomplete']}).then(arguments[0])"
    )
    assert [explained(rule) for rule in found["violations"]] == []
    assert len(found["passes"]) > 20
    undecided = [explained(r) for r in found["incomplete"] if r["id"] != "color-contrast"]
    assert undecided == []


@pytest.mark.parametrize("name", NAMES)
def test_a_phone_needs_no_sideways_scrolling(browser, view, pages, name):
    view(browser, width=360)
    browser.get(pages[name].as_uri())
    open_all(browser)
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')]"
        ".filter(e => !e.closest('.scroll, svg, .skip')"
        " && e.getBoundingClientRect().right > 361).map(e => e.outerHTML.slice(0, 200))"
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_dark_colours_follow_the_reader(browser, view, pages):
    def lightness(selector: str, what: str) -> float:
        colour = browser.execute_script(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
            selector, what,
        )  # fmt: skip
        return sum(float(x) for x in re.findall(r"[\d.]+", colour)[:3]) / 3

    browser.get(pages["everything"].as_uri())
    assert lightness("body", "backgroundColor") > 200 > 100 > lightness("body", "color")
    assert lightness("figure svg text", "fill") < 120
    view(browser, width=1280, scheme="dark")
    assert lightness("body", "backgroundColor") < 50 < 200 < lightness("body", "color")
    assert lightness("figure svg text", "fill") > 150
    view(browser, width=1280, scheme="dark", media="print")
    assert lightness("body", "backgroundColor") == 255
    assert lightness("figure svg text", "fill") < 80


def test_the_keyboard_reaches_every_link_table_and_fold(browser, pages):
    from selenium.webdriver import ActionChains, Keys

    browser.get(pages["everything"].as_uri())
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('a, summary, [tabindex]')]"
        ".filter(e => e.checkVisibility()).length"
    )
    here = "const e = document.activeElement; return e === document.body ? null : e.outerHTML"
    seen = []
    for _ in range(wanted):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        seen.append(browser.execute_script(here))
    assert None not in seen
    assert seen[0].startswith('<a class="skip"')
    assert browser.execute_script(
        "return getComputedStyle(document.activeElement).outlineStyle"
    ) == "solid"  # fmt: skip
    summary = browser.find_element("css selector", "summary")
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open")


def test_the_page_works_in_mlflow_s_frame(browser, pages, tmp_path):
    """MLflow shows HTML artifacts in an iframe without network and without its own origin."""
    text = pages["everything"].read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    quoted = json.dumps(text).replace("</", r"<\/")
    frame.write_text(
        '<!DOCTYPE html><iframe sandbox="allow-scripts" width="1200" height="900"></iframe><script>'
        f"document.querySelector('iframe').srcdoc = {quoted};"
        "</script>",
        encoding="utf-8",
    )
    browser.get_log("browser")
    browser.get(frame.as_uri())
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    shown = browser.find_element("css selector", "#answers").text
    assert "Verdict: warn" in shown
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.querySelectorAll('figure svg').length") == 3
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_printing_loses_nothing(browser, view, pages, tmp_path):
    if shutil.which("pdftotext") is None:
        pytest.skip("needs pdftotext (apt-get install poppler-utils)")
    view(browser, width=1280, scheme="dark")
    browser.get(pages["everything"].as_uri())
    page = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    pdf = tmp_path / "report.pdf"
    printed = browser.execute_cdp_cmd("Page.printToPDF", page)["data"]
    pdf.write_bytes(base64.b64decode(printed))
    text = subprocess.run(
        ["pdftotext", "-layout", pdf, "-"], check=True, capture_output=True, text=True
    ).stdout
    words = set(text.split())
    open_all(browser)
    browser.execute_script("document.querySelectorAll('nav, .skip').forEach(e => e.remove())")
    hidden = browser.execute_script("return document.body.innerText").split()
    missing = [
        word for word in hidden if word not in words and word.isalnum() and 3 < len(word) < 40
    ]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_has_words(browser, pages, name):
    browser.get(pages[name].as_uri())
    silent = browser.execute_script(
        "return [...document.querySelectorAll('svg')].filter(e => !e.closest('[aria-hidden=true]')"
        " && !e.getAttribute('aria-label')).length"
    )
    assert silent == 0


def open_all(browser: Any) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true; })")


def explained(rule: dict[str, Any]) -> str:
    where = [
        node["html"][:160] + " | " + node.get("failureSummary", "")[:300]
        for node in rule["nodes"][:3]
    ]
    return f"{rule['id']} ({rule['impact']}): {where}"
