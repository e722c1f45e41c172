# SPDX-License-Identifier: Apache-2.0
"""Argument checks and logging, shared by the whole package."""
