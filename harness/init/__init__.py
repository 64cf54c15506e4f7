# SPDX-License-Identifier: Apache-2.0
"""Describes the ports of somebody else's repository from its source, and writes the CI workflow that gates them."""

from harness.init.command import add_init_parser, run_init

__all__ = ["add_init_parser", "run_init"]
