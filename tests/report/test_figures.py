"""Figures: real PNG and SVG, deterministic, themed, and silent about what is not there."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from flataudit.report import figures

NAMES = ("calibrated", "refused", "regression", "without_loo")


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draw", [figures.reliability_png, figures.spectrum_png])
def test_png(reports: Any, name: str, draw: Any) -> None:
    png = draw(*reports[name])
    width, height = size(png)
    assert width == round(figures.WIDTH * figures.PNG_DPI)
    assert 400 < height < 1200
    assert len(png) < 200_000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draw", [figures.reliability_svg, figures.spectrum_svg])
def test_svg_is_inline_ready(reports: Any, name: str, draw: Any) -> None:
    svg = draw(*reports[name])
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("viewBox")
    assert root.get("aria-label")
    assert "http" not in svg
    assert "<metadata" not in svg
    assert "width=" not in svg.split(">")[0]
    assert "var(--fig-ink" in svg or "var(--fig-muted" in svg
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    assert used <= set(ids)


def test_svgs_share_no_ids(reports: Any) -> None:
    found = [
        set(re.findall(r'id="([^"]+)"', draw(*reports["calibrated"])))
        for draw in (figures.reliability_svg, figures.spectrum_svg)
    ]
    assert not found[0] & found[1]


def test_the_same_report_gives_the_same_picture(reports: Any) -> None:
    for draw in (figures.reliability_svg, figures.spectrum_svg):
        assert draw(*reports["refused"]) == draw(*reports["refused"])


def test_bins_outside_the_band_have_their_own_marker(reports: Any) -> None:
    assert ">outside<" in figures.reliability_svg(*reports["refused"])
    assert ">outside<" not in figures.reliability_svg(*reports["calibrated"])
    assert "15 of 15 bins" in figures.reliability_alt(*reports["calibrated"])
    assert "8 of 10 bars" in figures.reliability_alt(*reports["regression"])


def test_spectrum_writes_the_soft_rank(reports: Any) -> None:
    assert "Soft rank 313.8 = shaded area" in figures.spectrum_svg(*reports["calibrated"])
    text = figures.spectrum_svg(*reports["regression"])
    assert "Soft rank 10.9 = area 9.9 + 1.0 unpenalised" in text


def test_leverage_is_drawn_where_there_is_no_spectrum(reports: Any) -> None:
    report, display = reports["refused"]
    assert "mean leverage 0.210 = soft rank / n" in figures.spectrum_svg(report, display)
    assert "Leverage" in figures.spectrum_alt(report, display)


@pytest.mark.parametrize(
    "display",
    [
        {},
        {"reliability": None, "spectrum": None},
        {"spectrum": {"ratios": [], "reason": "costs $x_1 & <b>", "leverage": []}},
        {"spectrum": {"ratios": None, "reason": "costs $x_1 & <b>", "leverage": [0.5]}},
        {"spectrum": {"ratios": [3.0, None, 0.0, -1e-12], "reason": None, "leverage": []}},
        {"spectrum": {"ratios": [5.0], "reason": None, "leverage": [0.0, 0.0]}},
        {"spectrum": {"ratios": None, "reason": None, "leverage": [0.0, 0.0]}},
    ],
)
def test_sparse_displays_are_drawn_without_a_warning(reports: Any, display: Any) -> None:
    report = reports["calibrated"][0]
    for draw in (figures.reliability_png, figures.spectrum_png):
        size(draw(report, display))
    ET.fromstring(figures.spectrum_svg(report, display))


def test_one_bin_and_no_histogram(reports: Any) -> None:
    one = {"confidence": 1.0, "accuracy": 1.0, "low": 1.0, "high": 1.0, "count": 9}
    data = {"kind": "classification", "evidence": "train", "bins": [one], "histogram": []}
    size(figures.reliability_png(reports["calibrated"][0], {"reliability": data}))


def test_no_figure_stays_open_and_settings_are_restored(reports: Any) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    before, opened = dict(mpl.rcParams), plt.get_fignums()  # of other tests
    figures.spectrum_png(*reports["calibrated"])
    assert plt.get_fignums() == opened
    assert dict(mpl.rcParams) == before
