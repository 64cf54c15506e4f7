# SPDX-License-Identifier: Apache-2.0
"""NeoBERT: the training model, its Hugging Face port, its checkpoints and what moves them from one to the other."""
