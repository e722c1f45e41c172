# SPDX-License-Identifier: Apache-2.0
"""The current API: types, managers and the engine's face."""
