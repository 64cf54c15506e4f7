# SPDX-License-Identifier: Apache-2.0
"""What backends are told and reports repeat, for those who must not import a framework to know it."""

from types import MappingProxyType
from typing import Any

DTYPES = ("float64", "float32", "bfloat16", "float16", "autocast")
"""Names of the dtypes a check can run in."""

TORCH_SETTINGS = MappingProxyType[str, Any](
    {
        "float32_matmul_precision": "highest",
        "cudnn_allow_tf32": False,
        "allow_bf16_reduced_precision_reduction": False,
        "allow_fp16_reduced_precision_reduction": False,
        "threads": 1,
        "deterministic_algorithms": 0,
        "default_dtype": "float32",
        "default_device": "cpu",
        "gradients": True,
    }
)
"""Under which every check runs: full precision, and one thread, as tiny models only lose time to a second."""
