"""The names of everything that flataudit writes to MLflow: experiments, tags, metrics, artifacts.

`tracking` writes audits, `records` the decisions of gates and the observations made later, and
`audits` reads them all back: each takes its names from here, so that none can drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping

# Experiments: one run per audit, per gate's decision, per observation.
EXPERIMENT = "flataudit"
GATES = "flataudit-gates"
OBSERVATIONS = "flataudit-observations"

ARTIFACTS = "flataudit"  # the folder of each run's artifacts
REPORT = f"{ARTIFACTS}/report.json"

URI_TAG, VERDICT = "flataudit.model_uri", "flataudit.verdict"  # the first on the run alone
RUN_ID, MODEL_ID = "flataudit.run_id", "flataudit.model_id"  # the second: ModelSource.identity
AUDIT_ID = "flataudit.audit_id"  # of a run alone: a retry finds by it the run that it began
AUDITED_AT, POLICY = "flataudit.audited_at", "flataudit.policy"
GAP, CALIBRATION = "flataudit.gap", "flataudit.calibration"
CONFIDENCE, WARNINGS = "flataudit.confidence", "flataudit.warnings"
# Of an audit run alone, so that a list of audits needs no report: which estimate, of what kind.
ESTIMATOR, FAMILY, EVIDENCE = "flataudit.estimator", "flataudit.family", "flataudit.evidence"

# Metrics of the run alone. The first: the audit in its process; the others: the stages as seen from
# outside, and the most RAM that the audit's process held.
DURATION = "flataudit/duration_seconds"
LOAD_SECONDS, ESTIMATE_SECONDS = "flataudit/load_seconds", "flataudit/estimate_seconds"
PEAK_BYTES = "flataudit/peak_bytes"

# metric of an audit: where its value is in the report's JSON
METRICS: Mapping[str, tuple[str, ...]] = {
    "flataudit/gap": ("gap", "value"),
    "flataudit/gap_low": ("gap", "low"),
    "flataudit/gap_high": ("gap", "high"),
    "flataudit/predicted_test_nll": ("predicted_test_nll", "value"),
    "flataudit/predicted_accuracy": ("predicted_accuracy", "value"),
    "flataudit/gap_soft_rank": ("estimates", "soft_rank", "gap"),
    "flataudit/gap_soft_rank_recalibrated": ("estimates", "soft_rank_recalibrated", "gap"),
    "flataudit/gap_soft_rank_blend": ("estimates", "soft_rank_blend", "gap"),
    "flataudit/gap_tic": ("estimates", "tic", "gap"),
    "flataudit/gap_loo": ("estimates", "loo", "gap"),
    "flataudit/soft_rank": ("estimates", "soft_rank", "rank"),
    "flataudit/train_nll": ("train", "nll"),
    "flataudit/ece": ("calibration", "ece"),
    "flataudit/confidence_gap": ("calibration", "confidence_gap"),
    "flataudit/slope": ("calibration", "slope"),
    "flataudit/information_ratio": ("premise", "information_ratio"),
    "flataudit/stationarity": ("penalty", "stationarity"),
    "flataudit/heldout_gap": ("heldout", "gap"),
    "flataudit/heldout_gap_se": ("heldout", "gap_se"),
    "flataudit/fresh_labels": ("fresh_labels", "n"),
    "flataudit/log_e_value": ("fresh_labels", "log_e"),
}

# The e-process over labels that came later: the artifact of an audit or an observation that holds
# its state, and the metrics that an audit finds the last one by and that show it.
FRESH_LABELS = f"{ARTIFACTS}/fresh_labels.json"
LABELS_COUNTED, LOG_E = "flataudit/fresh_labels", "flataudit/log_e_value"

# metric of an observation, on its run and on the logged model
OBSERVED_GAP, OBSERVED_GAP_SE = "flataudit/observed_gap", "flataudit/observed_gap_se"
OBSERVED_NLL, OBSERVED_ACCURACY = "flataudit/observed_nll", "flataudit/observed_accuracy"
OBSERVED_SAMPLES = "flataudit/observed_samples"
# tags of an observation's run, and, the second, of the version
OBSERVED_SHA256, OBSERVED_RUN = "flataudit.observed_sha256", "flataudit.observation_run_id"
OBSERVED_TEXT, OBSERVED_AT = "flataudit.observed_gap", "flataudit.observed_at"

# tags of a gate's run; the first three also of the version that an enforced gate looked at
GATE, GATE_RUN, GATE_OVERRIDE = "flataudit.gate", "flataudit.gate_run_id", "flataudit.gate_override"
GATE_MODE, GATE_BY, GATE_AT = "flataudit.gate_mode", "flataudit.gate_by", "flataudit.gate_at"
GATE_POLICY = "flataudit.gate_policy"  # sha256 of the policy file's content as read
GATE_ALIAS, GATE_STATE = "flataudit.gate_alias", "flataudit.gate_state"
GATE_QUEUE, GATE_TICKET = "flataudit.gate_queue", "flataudit.gate_ticket"
DECISION = f"{ARTIFACTS}/gate.json"
