# SPDX-License-Identifier: Apache-2.0
"""Which test proves which promise: the rows of docs/parity.md, and the tests that are marked with their ids.

``@pytest.mark.parity("manager.pull_cache")`` says that a test proves that row. A mark with an id that no row has ends the
collection. With ``--parity``, meant for a run of all tests, each row needs a marked test that passed from set-up to
tear-down; a row that begins with "later:" waits for its part and must not have one.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

DOCUMENT = Path("docs", "parity.md")
ROW = re.compile(r"^\| `(?P<id>[a-z0-9_]+\.[a-z0-9_]+)` \|(?P<name>[^|]*)\|(?P<promise>[^|]*)\|", re.MULTILINE)
LATER = "later:"


def read_rows(text: str) -> dict[str, str]:
    """Return what each row promises, by its id."""
    rows: dict[str, str] = {}
    for row in ROW.finditer(text):
        if row["id"] in rows:
            raise pytest.UsageError(f"{DOCUMENT} has two rows {row['id']}")
        rows[row["id"]] = row["promise"].strip()
    if not rows:
        raise pytest.UsageError(f"{DOCUMENT} has no rows")
    return rows


class Parity:
    """The rows, and what a run has proven of them."""

    def __init__(self, rows: dict[str, str], complete: bool) -> None:
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

    def faults(self) -> list[str]:
        """What does not hold: rows that wait for nothing and have no proof, and rows that are there before their time."""
        later = {row for row, promise in self.rows.items() if promise.startswith(LATER)}
        unproven = [f"{row}: no marked test passed" for row in self.rows if row not in self.proven | later]
        return unproven + [f"{row}: is proven, and the table says {LATER!r}" for row in self.rows if row in self.proven & later]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.complete and exitstatus == pytest.ExitCode.OK and self.faults():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.complete:
            return
        faults = self.faults()
        terminalreporter.section(f"{len(faults)} of {len(self.rows)} rows of {DOCUMENT} do not hold", red=bool(faults))
        for fault in faults:
            terminalreporter.line(fault)


def marks(item: pytest.Item) -> Iterator[str]:
    """The ids that a test is marked with."""
    return (row for mark in item.iter_markers("parity") for row in mark.args)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", action="store_true", help=f"fail unless each row of {DOCUMENT} has a passing marked test")


def pytest_configure(config: pytest.Config) -> None:
    rows = read_rows((config.rootpath / DOCUMENT).read_text())
    config.pluginmanager.register(Parity(rows, config.getoption("parity")), "parity of rows and tests")
