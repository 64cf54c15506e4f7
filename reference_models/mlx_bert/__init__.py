# SPDX-License-Identifier: Apache-2.0
"""BERT on MLX: the model, its weights in every layout they come in, its heads, and what it is compared with."""
