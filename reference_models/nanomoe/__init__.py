# SPDX-License-Identifier: Apache-2.0
"""nanoMoE: the originals of both of its lines, and the port that is held to them."""
