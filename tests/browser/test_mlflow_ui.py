"""What a reviewer sees in the MLflow UI of a real server: version page, audit run, report.

With FLATAUDIT_SCREENSHOTS=docs/images the picture of the documents is taken anew.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.mlflow_store import make_store
from tests.shells import environment

pytestmark = pytest.mark.browser

PEOPLE = "Sorts parcels by their label. Ask Ann before you promote it."
WAIT = 60  # seconds, for a page of the UI


@dataclass(frozen=True)
class Audited:
    """A version that `flataudit audit` audited on the server."""

    url: str
    name: str
    version: str
    tags: dict[str, str]
    description: str


@pytest.fixture(scope="module")
def audited(sqlite_url, tmp_path_factory):
    make_store(sqlite_url)
    client = MlflowClient(sqlite_url)
    found = client.copy_model_version("models:/digits/1", "sorter")
    client.update_model_version("sorter", found.version, PEOPLE)
    uri = f"models:/sorter/{found.version}"
    command = [sys.executable, "-m", "flataudit", "audit", uri, "--train", "mlflow"]
    done = subprocess.run(
        command,
        env=environment(MLFLOW_TRACKING_URI=sqlite_url),
        cwd=tmp_path_factory.mktemp("here"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    version = client.get_model_version("sorter", found.version)
    return Audited(sqlite_url, "sorter", found.version, version.tags, version.description)


@pytest.fixture
def page(browser):
    """The page's elements by XPath, once there are any, and its text."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    class Page:
        def find(self, path):
            wait = WebDriverWait(browser, WAIT)
            return wait.until(lambda b: b.find_elements(By.XPATH, path), f"no {path}")

        def shows(self, text):
            WebDriverWait(browser, WAIT).until(lambda _: text in self.text(), f"no {text!r}")

        def text(self):
            (body,) = browser.find_elements(By.TAG_NAME, "body")
            return " ".join(body.text.split())

        def picture(self, name):
            """The page without the UI's side panel; for the documents where they are asked for."""
            folder = os.environ.get("FLATAUDIT_SCREENSHOTS")
            if folder:
                WebDriverWait(browser, WAIT).until(lambda b: b.find_elements(By.XPATH, PANEL))
                for button in browser.find_elements(By.XPATH, PANEL):
                    button.click()
                time.sleep(2)  # the panel slides
                browser.save_screenshot(str(Path(folder) / name))

    return Page()


PANEL = "//*[contains(text(), 'MLflow Assistant')]/ancestor::*[.//button][1]//button[last()]"


def version_page(audited):
    return (
        f"{audited.url}/?workflowType=machine_learning"
        f"#/models/{audited.name}/versions/{audited.version}"
    )


def test_the_version_s_page(audited, browser, page):
    browser.get(version_page(audited))
    page.shows("flataudit.verdict")
    text = page.text()
    for key, value in audited.tags.items():
        if value:
            assert f"{key} {value}" in text, key
    assert PEOPLE in text
    assert f"flataudit: {audited.tags['flataudit.verdict']}." in text
    assert f"Gap: {audited.tags['flataudit.gap']} nats per example" in text
    assert "<!--" not in text  # the marks around our block
    page.picture("mlflow-version.png")


def test_the_run_s_link_and_the_report(audited, browser, page):
    """From the version's page by a click to the run, and on to the report in its sandbox."""
    browser.get(version_page(audited))
    (link,) = page.find("//a[text()='Audit run and full report']")
    browser.execute_script("arguments[0].removeAttribute('target')", link)
    link.click()
    page.shows(f"audit {audited.name} v{audited.version}")
    assert f"/runs/{audited.tags['flataudit.run_id']}" in browser.current_url
    page.shows("flataudit/predicted_test_nll")

    run = browser.current_url.partition("#")[2].partition("?")[0]
    browser.get(f"{audited.url}/#{run}/artifacts/flataudit/report.html")
    (frame,) = page.find("//iframe[contains(@class, 'html')]")
    assert frame.get_attribute("sandbox") == "allow-scripts"
    browser.switch_to.frame(frame)
    page.shows(f"{audited.name}, version {audited.version}")
    text = page.text()
    for expected in (
        "How well will it do on unseen data?",
        "May I rely on this?",
        f"Verdict: {audited.tags['flataudit.verdict']}",
        audited.tags["flataudit.gap"].partition(" ")[0],
    ):
        assert expected in text
    headings = page.find("//h1 | //h2")
    assert 0 <= headings[0].location["y"] < 200  # the answer comes first
    missing = browser.execute_script(
        "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    )
    assert missing == 0
