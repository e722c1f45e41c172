# SPDX-License-Identifier: Apache-2.0
"""Move a KV cache of a model's size from a prefill process to a decode process, check every byte, and show how fast it was."""

from __future__ import annotations

import argparse
import time
from typing import Any

from . import options, tables
from .children import Child, ChildError, Children, Reporter

HELP = "two processes, one model's KV cache, every byte checked"

_START_SECONDS = 30  # what a child may take to start and to make its caches, besides --timeout
_MOST = (1 << 31) - 1  # of anything that is counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=("blocks", "contiguous", "both"), default="both", help="kinds of caches (both)")
    parser.add_argument("--layers", type=_positive, default=32, metavar="N", help="layers of the model (32)")
    parser.add_argument("--kv-heads", type=_positive, default=8, metavar="N", help="key/value heads of a layer (8)")
    parser.add_argument("--head-dim", type=_positive, default=128, metavar="N", help="dimensions of a head (128)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="type of an element (fp16)")
    parser.add_argument("--tokens", type=_positive, default=2048, metavar="N", help="tokens in the cache (2048)")
    parser.add_argument("--block-tokens", type=_positive, default=16, metavar="N", help="tokens of a block (16)")
    options.add_transport(parser)
    options.add_timeout(parser)
    options.add_role(parser, "prompt", "decoder")


# Names of LLMConfig's DataType and the bytes of an element.
DTYPES = {"fp16": ("DT_FLOAT16", 2), "bf16": ("DT_BF16", 2), "fp32": ("DT_FLOAT", 4), "int8": ("DT_INT8", 1)}


def _positive(text: str) -> int:
    return options.count(text, _MOST)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, or one of its two children."""
    if not options.has_numpy("demo"):
        return 2
    if arguments.role is not None:
        from . import demo_roles

        return demo_roles.run(arguments, Reporter())
    started = time.monotonic()
    try:
        results = _Demo(arguments).run()
    except ChildError as exc:
        print(f"demo: FAILED: {exc}")
        return 1
    failed = [row for row in results if row["wrong"] is not None]
    print()
    print(table(results))
    print()
    if failed:
        print(f"demo: FAILED: {len(failed)} of {len(results)} steps did not hold")
        return 1
    moved = sum(row["bytes"] for row in results)
    seconds = time.monotonic() - started
    print(f"demo: everything was verified, {moved:,} bytes in {len(results)} steps, {seconds:.1f} s in all")
    return 0


_PASSED_ON = ("mode", "layers", "kv_heads", "head_dim", "dtype", "tokens", "block_tokens", "transport", "timeout")


class _Demo:
    """The parent: starts both processes, shows their progress, collects the results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments

    def run(self) -> list[dict[str, Any]]:
        with Children("demo", options.again(self._arguments, *_PASSED_ON)) as children:
            return self._talk(children)

    def _talk(self, children: Children) -> list[dict[str, Any]]:
        patience = self._arguments.timeout + _START_SECONDS
        prefill = children.start("prefill", "prompt")
        ready = self._follow(prefill, patience)
        decode = children.start("decode", "decoder", ready["address"])
        results: list[dict[str, Any]] = []
        while True:
            event = self._follow(decode, patience)
            if event["event"] == "end":
                return results
            results.append(event)

    def _follow(self, child: Child, patience: float) -> dict[str, Any]:
        """Show what a child says, up to the next event that is more than talk."""
        while True:
            event = child.next(patience)
            text = event.get("text")
            if text:
                print(f"[{child.name:7}] {text}", flush=True)
            if event["event"] != "say":
                return event


def table(results: list[dict[str, Any]]) -> str:
    """Return the steps as a table of plain text."""
    return tables.plain(("what", "bytes", "time", "speed", "verified"), [_cells(row) for row in results], 1, open_end=True)


def _cells(row: dict[str, Any]) -> list[str]:
    verdict = row["good"] if row["wrong"] is None else f"WRONG: {row['wrong']}"
    size = speed = "-"
    if row["bytes"]:
        size, speed = f"{row['bytes']:,}", f"{row['bytes'] / row['seconds'] / 1e9:.2f} GB/s"
    return [row["what"], size, f"{row['seconds'] * 1e3:.1f} ms", speed, verdict]
