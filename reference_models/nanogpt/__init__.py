# SPDX-License-Identifier: Apache-2.0
"""nanoGPT: the original, its Hugging Face port and its native checkpoints."""
