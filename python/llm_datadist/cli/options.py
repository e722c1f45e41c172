# SPDX-License-Identifier: Apache-2.0
"""The options that several verbs have, how a child gets those of its parent, and what is needed besides options."""

from __future__ import annotations

import argparse
import importlib.util
import sys


def add_transport(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", choices=("auto", "shm", "tcp"), help="transport to require (auto)")


def add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds that one step may take (60)")


def add_role(parser: argparse.ArgumentParser, *roles: str) -> None:
    """Declare what only a child is given: its role, and the address at which it finds the one that listens."""
    parser.add_argument("--role", choices=roles, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.001 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.001 to 86400")
    return value


def count(text: str, most: int) -> int:
    """Read a number from 1 to most."""
    value = int(text)
    if not 1 <= value <= most:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to {most}")
    return value


def again(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Return the words that give these options to a child. What has no value is left out."""
    words = []
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    return words


def has_numpy(verb: str) -> bool:
    """Return whether numpy is there. Where it is not, say what to do."""
    if importlib.util.find_spec("numpy") is not None:
        return True
    print(f"{verb}: numpy is needed: pip install numpy", file=sys.stderr)
    return False
