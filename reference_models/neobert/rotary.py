# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings as NeoBERT has them: neighbouring channels are one complex number.

The angles are computed at every call. A table that is kept goes wrong: it is cast with the model, a library leaves it
unwritten after loading, or a text is longer than it.
"""

import torch
from torch import Tensor

ROPE_THETA = 10000.0


def rotary_angles(position_ids: Tensor, size: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position's angles, (batch or 1, length, 1, size / 2).

    Args:
        position_ids: integers (batch or 1, length), of any size.
        size: even number of channels of a head.
        dtype: what the model computes in; the angles are in float32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, size, 2, device=position_ids.device).to(wide) / size
    angles = position_ids[..., None].to(wide) * (1.0 / ROPE_THETA**exponents)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channels 2j and 2j + 1 of queries or keys (batch, length, heads, size) by their j-th angle.

    Computed in the type of the angles; the result has the type of `heads`.
    """
    even, odd = heads.to(cosine.dtype).unflatten(-1, (heads.shape[-1] // 2, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).to(heads.dtype)
