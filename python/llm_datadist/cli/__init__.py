# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m llm_datadist VERB``, each verb a module in here.

A verb's module has HELP, its line in the list of verbs; ``add_arguments(parser)``, which declares its options; and
``run(arguments)``, which does the work and returns the exit status: 0 where all held, 1 where something did not, 2 where it
could not begin.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from . import bench, demo

_VERBS = {"bench": bench, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that argv names and return the exit status of the process."""
    arguments = _parser().parse_args(argv)
    try:
        return int(_VERBS[arguments.verb].run(arguments))
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell has it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm_datadist", description="Tools around llm_datadist.")
    parser.add_argument("--version", action="version", version=f"llm-datadist-open {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in _VERBS.items():
        module.add_arguments(verbs.add_parser(name, help=module.HELP, description=module.__doc__))
    return parser
