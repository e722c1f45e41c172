# SPDX-License-Identifier: Apache-2.0
"""Argument checks and logging of the older package."""
