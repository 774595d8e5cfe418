"""The page: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from flataudit.report import figures, html, marks, remedies, tables, trend, words
from flataudit.results import (
    AuditWarning,
    DataInfo,
    Gap,
    HeldoutFit,
    Interval,
    ModelInfo,
    PenaltyPoint,
    Shift,
    SliceRow,
    SliceTable,
)
from tests.report_cases import large, slice_table, with_everything

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "line", "circle", "path", "rect", "use", "img", "link", "input"}


class Outline(HTMLParser):
    """Checks nesting; collects tags, ids, local links and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag == "a":
            self.links.append(str(values["href"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(outline(page).text))


@pytest.fixture(scope="module")
def pages(reports: Any) -> dict[str, str]:
    return {name: html.render(*made) for name, made in reports.items()}


def test_pages_are_self_contained_and_small(pages: dict[str, str]) -> None:
    for page in pages.values():
        assert len(page.encode()) < 1_000_000
        assert "http:" not in page
        assert "https:" not in page
        assert "src=" not in page
        assert "@import" not in page
        assert not re.search(r"url\((?!#)", page)
        assert "<script" not in page
        assert "default-src 'none'" in page


def test_pages_are_well_formed_with_unique_ids_and_live_links(pages: dict[str, str]) -> None:
    for page in pages.values():
        found = outline(page)
        assert found.tags.count("h1") == 1
        assert found.tags.count("main") == 1
        assert len(found.ids) == len(set(found.ids))
        assert {link.removeprefix("#") for link in found.links} <= set(found.ids)


def test_nothing_missing_is_printed_as_none_or_nan(pages: dict[str, str]) -> None:
    for page in pages.values():
        assert not re.search(r"\b(None|nan|NaN|null|inf|undefined)\b", text_of(page))


def test_first_screen_answers_three_questions(pages: dict[str, str]) -> None:
    text = text_of(pages["calibrated"]).partition("Calibration and spectrum")[0]
    for part in ("0.052", "nats per example", "0.041 to 0.064", "91.3 %", "90.7 to 91.9",
                 "0.263 [0.251, 0.274]", "Yes, rely on it", "Verdict: pass"):  # fmt: skip
        assert part in text
    text = text_of(pages["refused"]).partition("Calibration and spectrum")[0]
    assert "No, do not rely on it" in text
    assert "Verdict: fail" in text
    assert "not reliable" in text
    assert words.LOWER_BOUND in text
    assert "Measure the gap on held-out data" in text
    text = text_of(pages["regression"]).partition("Calibration and spectrum")[0]
    assert "Only with care" in text
    assert "Verdict: warn" in text
    assert "Accuracy" not in text
    assert "\N{MINUS SIGN}0.033 to 0.095" in text


def test_a_certain_but_warned_prediction_is_not_called_careless(change: Any, reports: Any) -> None:
    report = change(warnings=(AuditWarning("premise_violated", "warn", "m"),))
    assert "Usable, but look at this first" in html.render(report, {})


def test_a_measurement_that_contradicts_the_prediction_comes_first(change: Any) -> None:
    warning = AuditWarning("prediction_contradicted", "high", "measured 0.29, predicted 0.07")
    other = AuditWarning("premise_violated", "warn", "m")
    page = html.render(
        change(heldout=HeldoutFit(0.5, 0.9, gap=0.29, gap_se=0.01), warnings=(other, warning)), {}
    )
    steps = page.partition("Trust the measurement")
    assert steps[1]
    assert "Read the leave-one-out estimate" not in steps[0]
    assert "Nothing stands against" not in page


def test_everything_from_outside_is_escaped(calibrated: Any) -> None:
    report = dataclasses.replace(
        calibrated,
        model=ModelInfo(n_params=3, uri=EVIL, name=EVIL, version=EVIL, model_id=EVIL, flavor=EVIL),
        data=DataInfo(9, 2, sha256=EVIL),
        penalty=dataclasses.replace(calibrated.penalty, training={EVIL: EVIL}, assumptions=(EVIL,)),
        calibration=dataclasses.replace(calibrated.calibration, p_values={EVIL: 0.5}),
        gap=dataclasses.replace(calibrated.gap, reason=EVIL),
        warnings=(AuditWarning(EVIL, "warn", f"--heldout {EVIL}"),
                  AuditWarning("x", EVIL, EVIL)),  # type: ignore[arg-type]
        solver=dataclasses.replace(calibrated.solver, name=EVIL, reason=EVIL, device=EVIL),
    ).to_dict()  # fmt: skip
    sample = {"index": 1, "label": EVIL, "predicted": EVIL, "leverage": 0.1, "tic": 0.1,
              "loo": 0.2, "nll": 0.1}  # fmt: skip
    for ratios, leverage in (([2.0], []), (None, [0.5]), (None, [])):
        spectrum = {"ratios": ratios, "reason": EVIL, "leverage": leverage}
        page = html.render(report, {"spectrum": spectrum, "influence": [sample]})
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert 'class="tag <' not in page
        outline(page)


def test_no_observed_or_recalibrated_gap_is_a_dash_with_a_reason(pages: dict[str, str]) -> None:
    text = text_of(pages["without_loo"])
    assert "not available: a leave-one-out step is not finite" in text
    assert "not computed for this model" in text
    assert "needs leave-one-out or held-out predictions" in text
    assert "– no standard error available" in text
    assert "not computed (needs netcal)" in text
    assert "No picture: too large" in text
    assert "Model given in Python" in text


def test_observed_gap_stands_beside_the_estimators(pages: dict[str, str]) -> None:
    text = text_of(pages["regression"])
    assert "Observed measured on 89 held-out samples 0.0457 0.0610" in text
    assert "Held-out data, measured 5.440" in text
    assert "Observed measured" not in text_of(pages["calibrated"])


def test_every_warning_shows_message_and_remedy(reports: Any, pages: dict[str, str]) -> None:
    for name, (report, _) in reports.items():
        text = text_of(pages[name]).replace("( --", "(--")
        plain = re.sub(r"\s+", "", text)
        for warning in report["warnings"]:
            remedy = remedies.remedy(warning["code"], measured=report["heldout"] is not None)
            for part in (warning["message"], remedy, warning["code"]):
                assert re.sub(r"\s+", "", part) in plain


def test_all_codes_can_be_shown(change: Any) -> None:
    every = tuple(AuditWarning(code, "info", f"about {code}") for code in remedies.WARNING_CODES)
    page = html.render(change(warnings=every), {})
    assert all(f"About {code}." in page for code in remedies.WARNING_CODES)


def test_influence_marks_contradicted_labels_and_folds_the_rest(pages: dict[str, str]) -> None:
    page = pages["calibrated"]
    assert page.count('<span class="tag">differs</span>') == 9
    assert "38 more samples" in page
    assert page.count("<details>") == 1
    assert "differs</span>" not in pages["regression"]


def test_loss_if_left_out_is_training_loss_plus_rise(change: Any) -> None:
    sample = {"index": 4, "label": 1, "predicted": 0, "leverage": 0.5, "tic": 0.3, "loo": 2.25,
              "nll": 0.5}  # fmt: skip
    assert "0.500 2.750 2.250" in text_of(html.render(change(), {"influence": [sample]}))


def test_a_huge_report_stays_below_one_megabyte(reports: Any) -> None:
    report, display = reports["calibrated"]
    ratios = [1e5 / (i + 1) for i in range(50_000)]
    display = display | {"spectrum": {"ratios": ratios, "reason": None, "leverage": []}}
    assert len(html.render(report, display).encode()) < 1_000_000


def test_null_gap_and_heldout_values(change: Any) -> None:
    nan = float("nan")
    report = change(
        gap=Gap(nan, nan, nan, 0.9, "tic", "none"), heldout=HeldoutFit(nan, None, nan, nan)
    )
    text = text_of(html.render(report, {}))
    assert "no gap could be computed" in text
    assert not re.search(r"\b(None|nan)\b", text)


def test_title_prefers_the_registered_name(change: Any) -> None:
    assert html.model_title(change()) == "fashion-mlp, version 3"
    assert html.model_title(change(model=ModelInfo(3, uri="runs:/a/m"))) == "runs:/a/m"
    assert html.model_title(change(model=ModelInfo(3, model_id="m-1"))) == "m-1"
    assert html.model_title(change(model=ModelInfo(3))) == "Model given in Python"


def test_sensitivity_table(change: Any) -> None:
    assert "other penalties" not in html.render(change(), {})
    points = (
        PenaltyPoint(1 / 3, 0.0612, 0.05, None),
        PenaltyPoint(1.0, 0.052, 0.047, 0.055),
        PenaltyPoint(3.0, 0.041, 0.04, 0.05),
    )
    page = html.render(change(sensitivity=points), {})
    table = page.partition("The gap at other penalties</h3>")[2].partition("</table>")[0]
    heads = re.findall(r"<th scope=.col.[^>]*>([^<]*)", table)
    assert [head.strip() for head in heads] == ["Penalty", "Soft rank", "TIC", "LOO"]
    assert re.findall(r"<th scope=.row.>([^<]*)", table) == ["D/3", "D", "3 D"]
    assert re.findall(r"<td[^>]*>([^<]*)", table)[:3] == ["0.0612", "0.0500", "–"]
    assert table.count("used") == 1


def test_groups_of_the_training_record_are_rows(change: Any) -> None:
    report = change()
    report["penalty"]["training"] = {
        "optimizer": "sgd",
        "groups": [{"parameters": ["0.bias", "<b>"], "weight_decay": 0.0, "sum_lr": 2.5}],
    }
    page = html.render(report, {})
    assert "Other 0.bias, &lt;b&gt;" in page
    assert "weight decay 0, sum of rates 2.5" in page


def section(page: str, name: str) -> str:
    """The visible text of one section."""
    found = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
    return re.sub(r"\s+", " ", " ".join(outline(f"<div>{found}</div>").text)).strip()


def test_the_page_with_everything(pages: dict[str, str]) -> None:
    page = html.render(*with_everything())
    found = outline(page)
    assert len(found.ids) == len(set(found.ids))
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert len(page.encode()) < 1_000_000


def test_the_largest_page_is_below_one_megabyte() -> None:
    assert len(html.render(*large()).encode()) < 1_000_000


def test_classes_and_slices_show_the_worst_first_and_fold_the_rest(change: Any) -> None:
    text = section(html.render(change(), {}), "slices")
    assert text == ""
    row = SliceRow("7", 120, 0.2, 0.1234, 0.05, 0.91, Interval(0.88, 0.821, 0.922))
    few = SliceRow("3", 1, 0.2, 0.9, None, 1.0, Interval(0.0, 0.0, 0.73))
    report = change(classes=SliceTable("class", "loo", 0.06, (row, few)))
    text = section(html.render(report, {}), "slices")
    assert "7 120 91.0 % 88.0 % [82.1, 92.2] 0.123 0.050" in text
    assert "3 few samples 1 100.0 % 0.0 % [0.0, 73.0] 0.900 –" in text
    assert "over all samples it is 0.060" in text
    assert "the estimate used above is 0.052" in text  # the soft rank's
    assert "slices of fewer than 10 samples last" in text
    report = change(slices=(slice_table("shop", 40),))
    page = html.render(report, {})
    assert "By shop" in page
    assert "28 more, with smaller gaps or few samples" in page
    places = [page.index(f"shop {i}<") for i in (0, 5, 39)]
    assert places == sorted(places)


def test_slices_of_regression_have_no_accuracy(reports: Any) -> None:
    report, display = reports["regression"]
    row = {"value": "a", "n": 50, "train_nll": 5.0, "gap": 0.02, "gap_se": 0.01,
           "train_accuracy": None, "predicted_accuracy": None}  # fmt: skip
    table = {"column": "shop", "estimator": "loo", "gap": 0.031, "rows": [row]}
    text = section(html.render(report | {"slices": [table]}, display), "slices")
    assert "Accuracy" not in text
    assert "the estimate used above" not in text  # it is this one


def test_names_of_slices_and_history_are_escaped(change: Any) -> None:
    row = SliceRow(EVIL, 12, 0.2, 0.1, 0.05, 0.9, None)
    report = change(slices=(SliceTable(EVIL, "tic", 0.06, (row,)),))
    past = {"version": EVIL, "audited_at": EVIL, "verdict": EVIL, "confidence": EVIL, "gap": 0.05,
            "gap_low": None, "gap_high": None, "heldout_gap": None}  # fmt: skip
    page = html.render(report, {}, [past])
    assert "<script" not in page
    outline(page)


def test_a_report_of_before_has_no_slices_and_still_renders(reports: Any) -> None:
    report, display = reports["calibrated"]
    old = {key: value for key, value in report.items() if key not in ("classes", "slices", "shift")}
    assert 'id="slices"' not in html.render(old, display)


def test_held_out_inputs_are_compared(change: Any) -> None:
    text = section(html.render(change(), {}), "assumptions")
    assert "Not tested: no held-out data were given (--heldout)." in text
    moved = Shift(0.002, 5.1, 3, 17, 0.21, 0.3, 784)
    text = section(html.render(change(shift=moved), {}), "assumptions")
    assert "Held-out inputs differ from training p 0.002" in text
    assert "Features that moved 3 of 784" in text
    assert "number 17 distribution functions differ by 21.0 %" in text
    same = Shift(0.4, 1.0, 0, 3, 0.02, 0.0, 784)
    assert "no difference found" in section(html.render(change(shift=same), {}), "assumptions")


def test_history_is_newest_first_with_what_came_true(change: Any) -> None:
    page = html.render(change(), {})
    assert "This is the first audit of this model that is on record." in section(page, "history")
    _, _, history = with_everything()
    page = html.render(change(), {}, history)
    text = section(page, "history")
    assert "3 this audit pass 0.052 [0.041, 0.064] – ok" in text
    assert "3 2026-09-03 08:00 pass 0.050 [0.040, 0.070] 0.060 ok" in text
    assert text.index("2026-09-03") < text.index("2026-03-03")
    assert "Predicted gap of 8 audits of this model: from 0.110 to 0.052" in page
    later = [history[1] | {"observed_gap": 0.0815}]
    assert "0.082" in section(html.render(change(), {}, later), "history")


def test_a_trend_needs_two_audits(change: Any) -> None:
    assert trend.trend_svg(change(), []) is None
    nan = float("nan")
    report = change(gap=Gap(nan, nan, nan, 0.9, "tic", "none"))
    past = {"version": "1", "audited_at": None, "gap": 0.1, "gap_low": None, "gap_high": None}
    assert trend.trend_svg(report, [past]) is None
    drawn = trend.trend_svg(change(), [past] * 40)
    assert drawn is not None
    assert f"of {trend.SHOWN} audits" in drawn


def test_every_picture_has_its_numbers_as_a_table(pages: dict[str, str]) -> None:
    page = pages["calibrated"]
    table = page.partition("Reliability in numbers</summary>")[2].partition("</table>")[0]
    assert table.count("<tr>") == 16
    shares = page.partition("Share of the soft rank by eigenvalue</summary>")[2]
    rows = re.findall(r'row">([\d ]+ %)</th><td class="n">([\d,]+) of 4,000', shares)
    assert [part for part, _ in rows] == ["25 %", "50 %", "75 %", "90 %", "99 %"]
    ratios = [4.278e4 * i**-2.0 for i in range(1, 4001)]
    used = [r / (1 + r) for r in ratios]
    for part, count in rows:
        k, share = int(count.replace(",", "")), float(part.removesuffix(" %")) / 100
        assert sum(used[:k]) >= share * sum(used) > sum(used[: k - 1])
    assert "PIT histogram in numbers" in pages["regression"]


def test_shares_without_a_spectrum() -> None:
    assert figures.share_rows({}) == []
    assert figures.share_rows({"spectrum": {"ratios": None}}) == []


def test_the_observed_gap_is_a_line_through_all_estimators(pages: dict[str, str]) -> None:
    assert pages["regression"].count('class="level"') == 4  # three estimators and the observed
    assert 'class="level"' not in pages["calibrated"]
    limits = marks.scale([0.0, 1.0])
    found = marks.mark(limits, 0.5, None, None, 1.0)
    assert found is not None
    assert (found["at"], found["line"]) == ("50.00%", f"{100 * 1.06 / 1.12:.2f}%")


def test_points_of_the_history_are_oldest_first(change: Any) -> None:
    _, _, history = with_everything()
    found = tables.points(change(), history)
    assert [row["audited_at"][:7] for row in found[:-1]] == [f"2026-0{i}" for i in range(3, 10)]
    assert found[-1]["this"]
