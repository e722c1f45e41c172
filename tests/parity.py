# SPDX-License-Identifier: Apache-2.0
"""Which test proves which promise: the rows of docs/parity.md, and the tests that are marked with their ids.

``@pytest.mark.parity("manager.pull_cache")`` says that a test proves that row. A mark with an id that no row has ends the
collection. With ``--parity``, meant for a run of all tests, each row needs a marked test that passed from set-up to
tear-down.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

DOCUMENT = Path("docs", "parity.md")
ROW = re.compile(r"^\| `([a-z0-9_]+\.[a-z0-9_]+)` \|", re.MULTILINE)


def read_rows(text: str) -> list[str]:
    """Return the ids of the rows."""
    rows: list[str] = ROW.findall(text)
    if not rows:
        raise pytest.UsageError(f"{DOCUMENT} has no rows")
    twice = sorted({row for row in rows if rows.count(row) > 1})
    if twice:
        raise pytest.UsageError(f"{DOCUMENT} has several rows {', '.join(twice)}")
    return rows


class Parity:
    """The rows, and what a run has proven of them."""

    def __init__(self, rows: list[str], complete: bool) -> None:
        self.rows, self.complete = rows, complete
        self.proven: set[str] = set()
        self.passed: dict[str, bool] = {}  # by test, whether its phases so far have passed

    @pytest.hookimpl(tryfirst=True)  # before tests are deselected: their marks count too
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        unknown = [f"{item.nodeid}: {row}" for item in items for row in marks(item) if row not in self.rows]
        if unknown:
            raise pytest.UsageError(f"marked for rows that {DOCUMENT} has not:\n" + "\n".join(unknown))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self.passed[item.nodeid] = report.passed and self.passed.get(item.nodeid, report.when == "setup")
        if report.when == "teardown" and self.passed.pop(item.nodeid):
            self.proven.update(marks(item))
        return report

    def unproven(self) -> list[str]:
        """The ids of the rows for which no marked test has passed."""
        return [row for row in self.rows if row not in self.proven]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.complete and exitstatus == pytest.ExitCode.OK and self.unproven():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.complete:
            return
        unproven = self.unproven()
        title = f"{len(unproven)} of {len(self.rows)} rows of {DOCUMENT} have no test that passed"
        terminalreporter.section(title, red=bool(unproven))
        for row in unproven:
            terminalreporter.line(row)


def marks(item: pytest.Item) -> Iterator[str]:
    """The ids that a test is marked with."""
    return (row for mark in item.iter_markers("parity") for row in mark.args)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", action="store_true", help=f"fail unless each row of {DOCUMENT} has a passing marked test")


def pytest_configure(config: pytest.Config) -> None:
    rows = read_rows((config.rootpath / DOCUMENT).read_text())
    config.pluginmanager.register(Parity(rows, config.getoption("parity")), "parity of rows and tests")
