"""Made-up reports as fixtures; `tests.report_cases` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from flataudit.results import AuditReport
from tests.report_cases import Made, calibrated_report, made_up


@pytest.fixture(scope="session")
def reports() -> dict[str, Made]:
    return made_up()


@pytest.fixture
def calibrated() -> AuditReport:
    return calibrated_report()


@pytest.fixture
def change() -> Callable[..., dict[str, Any]]:
    """The calibrated report's JSON with some fields of the dataclass replaced."""

    def changed(**fields: Any) -> dict[str, Any]:
        return dataclasses.replace(calibrated_report(), **fields).to_dict()

    return changed
