# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on loopback: the real, unmodified client pushes to it and loads from it. This is its door."""
