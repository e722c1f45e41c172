# SPDX-License-Identifier: Apache-2.0
"""``python -m llm_datadist``: see the package cli."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
