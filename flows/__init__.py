"""How Prefect runs an audit. Prefect is imported nowhere else in the project."""

import logging
import os

# Read when Prefect is imported: the embedded server may need two minutes on a busy machine, and
# nothing is reported to anyone.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# The lines of the stages (flataudit.logs) reach Prefect; those outside a run raise no warning.
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "flataudit")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
if logging.getLogger("flataudit").level == logging.NOTSET:
    logging.getLogger("flataudit").setLevel(logging.INFO)
