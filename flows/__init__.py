"""How Prefect runs an audit. Prefect is imported nowhere else in the project."""

import os

# Read when Prefect is imported: the embedded server may need two minutes on a busy machine, and
# nothing is reported to anyone.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
