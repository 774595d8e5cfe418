"""A title and a remedy for every code of the contract."""

from __future__ import annotations

from flataudit.report import remedies

CODES = (
    "overconfident", "underconfident", "train_saturated", "not_at_minimum", "premise_violated",
    "estimators_disagree", "high_leverage", "penalty_unknown", "indefinite_hessian",
    "few_calibration_samples", "approximate_solver", "data_mismatch", "outside_theory",
)  # fmt: skip


def test_every_code_of_the_contract_has_a_remedy_and_a_title() -> None:
    added = {
        "prediction_contradicted",
        "gap_regressed",
        "calibration_refuted",
    }  # beyond the contract, which allows additions
    assert set(remedies.WARNING_CODES) == set(CODES) | added
    for code in remedies.WARNING_CODES:
        assert remedies.remedy(code).startswith(remedies.first_step(code))
        assert remedies.remedy(code).endswith(".")
        assert len(remedies.first_step(code)) < 110
        assert remedies.warning_title(code) != code
        measured = remedies.first_step(code, measured=True)
        assert remedies.remedy(code, measured=True).startswith(measured)
        assert "--heldout" not in measured
        assert len(measured) < 110
    assert remedies.remedy("new_code") == remedies.first_step("new_code") != ""
    assert remedies.warning_title("new_code") == "new_code"
