# SPDX-License-Identifier: Apache-2.0
"""Verifies a Hub: every content, tree and commit is what its id says, and every ref leads to one that is whole."""
