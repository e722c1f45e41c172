# SPDX-License-Identifier: Apache-2.0
"""The check that each row of docs/parity.md has a passing test, seen to fail; and the page's own references."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity import DOCUMENT, ROW

pytest_plugins = ["pytester"]

TESTS = Path(__file__).resolve().parent
TABLE = """
| id | name | promise | differs |
|---|---|---|---|
| `caches.pull` | `pull()` | moves bytes | |
| `caches.push` | `push()` | moves them the other way | |

| topic | the original | here |
|---|---|---|
| `not.a_row` of this table | is | two cells wide |
"""
PULL_HOLDS = """
import pytest

@pytest.mark.parity("caches.pull")
def test_pull():
    pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with the plugin, two rows, and a test that proves the first one."""
    pytester.makeini("[pytest]\naddopts = --strict-markers\nmarkers = parity(*ids): proves rows")
    pytester.syspathinsert(TESTS)
    pytester.makeconftest('pytest_plugins = ["parity"]')
    pytester.mkdir(DOCUMENT.parent.name).joinpath(DOCUMENT.name).write_text(TABLE)
    pytester.makepyfile(test_pull=PULL_HOLDS)
    return pytester


def proving_push(project: pytest.Pytester, body: str, decorator: str = "") -> None:
    project.makepyfile(
        test_push=f"import pytest\n\n{decorator}\n@pytest.mark.parity('caches.push')\ndef test_push():\n    {body}\n"
    )


def fails_with(project: pytest.Pytester, *lines: str) -> None:
    done = project.runpytest("--parity")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*1 of 2 rows of docs/parity.md do not hold*", *lines])


def test_a_row_without_a_test_fails_the_run(project: pytest.Pytester) -> None:
    fails_with(project, "caches.push: no marked test passed")


def test_a_run_of_some_tests_does_not_ask_for_all_rows(project: pytest.Pytester) -> None:
    assert project.runpytest().ret == pytest.ExitCode.OK


def test_passing_tests_for_all_rows_pass(project: pytest.Pytester) -> None:
    proving_push(project, "pass")
    done = project.runpytest("--parity")
    assert done.ret == pytest.ExitCode.OK
    done.stdout.fnmatch_lines(["*0 of 2 rows of docs/parity.md do not hold*"])


NO_PROOF = {
    "fails": ("assert False", ""),
    "is skipped": ("pytest.skip('not here')", ""),
    "is skipped by a mark": ("pass", "@pytest.mark.skip"),
    "is expected to fail": ("assert False", "@pytest.mark.xfail"),
    "fails in its set-up": ("pass", "@pytest.mark.usefixtures('no_such_fixture')"),
}


@pytest.mark.parametrize("name", NO_PROOF)
def test_a_test_that_does_not_pass_proves_nothing(project: pytest.Pytester, name: str) -> None:
    proving_push(project, *NO_PROOF[name])
    fails_with(project, "caches.push: no marked test passed")


def test_a_test_that_leaves_something_proves_nothing(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_push="import pytest\n\n@pytest.fixture\ndef leaving():\n    yield\n    assert False\n\n"
        "@pytest.mark.parity('caches.push')\ndef test_push(leaving):\n    pass\n"
    )
    fails_with(project, "caches.push: no marked test passed")


def test_one_passing_case_is_enough_and_a_case_may_carry_the_mark(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_push="import pytest\n\nPROOF = pytest.mark.parity('caches.push')\n\n"
        "@pytest.mark.parametrize('case', [1, pytest.param(2, marks=PROOF), pytest.param(3, marks=[PROOF, pytest.mark.skip])])\n"
        "def test_push(case):\n    pass\n"
    )
    assert project.runpytest("--parity").ret == pytest.ExitCode.OK


@pytest.mark.parametrize("deselecting", [[], ["-m", "not parity"]])
def test_an_id_that_no_row_has_ends_the_collection(project: pytest.Pytester, deselecting: list[str]) -> None:
    project.makepyfile(test_push="import pytest\n\n@pytest.mark.parity('not.a_row')\ndef test_push():\n    pass\n")
    done = project.runpytest(*deselecting)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*test_push.py::test_push: not.a_row"])
    assert "passed" not in done.stdout.str()


@pytest.mark.parametrize(("table", "text"), [(TABLE + TABLE, "two rows caches.pull"), ("no table", "has no rows")])
def test_a_page_that_can_not_be_understood_is_refused(project: pytest.Pytester, table: str, text: str) -> None:
    project.path.joinpath(DOCUMENT).write_text(table)
    done = project.runpytest()
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert text in done.stderr.str()


def test_a_row_for_later_waits_until_a_test_proves_it(project: pytest.Pytester) -> None:
    project.path.joinpath(DOCUMENT).write_text(TABLE.replace("moves them", "later: moves them"))
    assert project.runpytest("--parity").ret == pytest.ExitCode.OK
    proving_push(project, "pass")
    fails_with(project, "caches.push: is proven, and the table says 'later:'")


# --- the page


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def test_the_differences_that_rows_name_are_there(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / DOCUMENT).read_text()
    differences = {cells(line)[0] for line in page.partition("\n| topic |")[2].splitlines() if line.startswith("|")}
    rows = [cells(line) for line in page.splitlines() if ROW.match(line)]
    assert {len(row) for row in rows} == {4}
    named = {topic for *_, differs in rows for topic in differs.split("; ") if topic}
    assert named and not named - differences
