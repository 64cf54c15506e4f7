# SPDX-License-Identifier: Apache-2.0
"""The model families this project ships: one room each, with the original, the port and what links them."""
