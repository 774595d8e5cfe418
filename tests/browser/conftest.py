"""A headless Chromium for the tests that look at pages, and axe-core for their accessibility.

Debian has both programs: `apt-get install chromium chromium-driver`. axe-core comes from the npm
registry, once, into pytest's cache folder. Where one is missing the tests skip and say so.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

AXE = "4.14.1"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One Chromium for all tests; use `browser`, which resets it between tests."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    started.set_page_load_timeout(60)
    yield started
    started.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """A headless Chromium with an empty page 1280 pixels wide, in light colours."""
    show(chromium, width=1280, height=1000, scheme="light")
    chromium.get("about:blank")
    yield chromium
    chromium.switch_to.default_content()
    chromium.get("about:blank")


def show(
    browser: Chrome, *, width: int, height: int = 1000, scheme: str = "light", media: str = ""
) -> None:
    """Sets the width in CSS pixels, the colour scheme (light or dark), and the media (print)."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


@pytest.fixture
def view() -> Any:
    """`show`, for tests: helpers in this file cannot be imported by name."""
    return show


@pytest.fixture(scope="session")
def axe(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of axe-core's script; fetched from the npm registry at the first call."""
    assert pytestconfig.cache is not None
    kept = pytestconfig.cache.mkdir("axe-core") / f"axe-{AXE}.min.js"
    if not kept.is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"needs npm (apt-get install npm) to fetch axe-core {AXE}")
        folder = tmp_path_factory.mktemp("axe")
        command = [npm, "pack", f"axe-core@{AXE}", "--silent", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"could not fetch axe-core {AXE} from the npm registry: {error}")
        (archive,) = folder.glob("axe-core-*.tgz")
        with tarfile.open(archive) as files:
            member = files.extractfile("package/axe.min.js")
            assert member is not None
            kept.write_bytes(member.read())
    return kept.read_text(encoding="utf-8")
