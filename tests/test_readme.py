# SPDX-License-Identifier: Apache-2.0
"""The programs of README.md and of the guide, run as they stand there, and the files and links that README.md names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from programs import DOCUMENTED, README, ROOT, SHOWN, run_fill, run_older, run_two_processes


def test_two_process_example_prints_what_its_comments_say(tmp_path: Path) -> None:
    run_two_processes(tmp_path)


def test_documented_example_stands_there_word_for_word() -> None:
    assert DOCUMENTED in SHOWN


def test_documented_example_moves_the_row_once_and_then_prints_the_status(tmp_path: Path) -> None:
    run_older(tmp_path)


def test_program_of_the_guide_brings_bytes_to_a_device_and_back(tmp_path: Path) -> None:
    run_fill(tmp_path)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_between_the_pages_lead_somewhere(page: str) -> None:
    here = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", here.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (here.parent / target).exists(), f"{page} links to {target}"


def test_paths_that_the_readme_names_exist() -> None:
    for path in re.findall(r"`((?:python|pyext|core|tests|docs|tools)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
