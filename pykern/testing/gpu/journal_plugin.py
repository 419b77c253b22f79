"""A pytest plugin: each outcome at once as a line of JSON, so that a run that is killed has still told something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, required=True, help="where each test's outcome is written")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with xdist the controller sees every worker's reports
        config.pluginmanager.register(_Writer(config.getoption("--journal")))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test fails in its setup or teardown too; what is skipped is so in the setup, mostly.
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report)

    def _write(self, test: str, outcome: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        entry = {"test": test, "outcome": outcome}
        if outcome == "skipped":
            entry["message"] = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            entry["message"] = (crash.message if crash else str(report.longrepr))[:1000]
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
