# SPDX-License-Identifier: Apache-2.0
"""Names of the dtypes a check can run in, for those who must not import a framework to know them."""

DTYPES = ("float64", "float32", "bfloat16", "float16", "autocast")
