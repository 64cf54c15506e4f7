# SPDX-License-Identifier: Apache-2.0
"""Labels and losses of transformers' own classifiers, by `problem_type`, for a family whose heads are such."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from harness.families import Fields

IGNORED = -100


def text_labels(tokens: torch.Tensor, options: Fields, seed: int) -> torch.Tensor:
    """Labels for texts (rows, tokens): classes (rows,), numbers (rows,), or any of the classes (rows, labels).

    options: `problem_type` and `num_labels`.
    """
    import torch

    generator, rows, count = _generator(seed), len(tokens), options["num_labels"]
    kind = options["problem_type"]
    if kind == "single_label_classification":
        return torch.randint(count, (rows,), generator=generator)
    if kind == "regression":
        return torch.randn(rows, generator=generator).double()
    return torch.randint(2, (rows, count), generator=generator).double()


def text_loss(logits: torch.Tensor, labels: torch.Tensor, options: Fields) -> torch.Tensor:
    """Cross entropy over classes, mean squared error of a number, binary cross entropy of each class."""
    from torch.nn import functional

    kind = options["problem_type"]
    if kind == "single_label_classification":
        return functional.cross_entropy(logits, labels)
    if kind == "regression":
        return functional.mse_loss(logits.squeeze(-1), labels)
    return functional.binary_cross_entropy_with_logits(logits, labels)


def token_labels(tokens: torch.Tensor, options: Fields, seed: int) -> torch.Tensor:
    """A class for every token, (rows, tokens), and in each row of several one that does not count.

    options: `num_labels`; without it the classes are the words that the tokens are.
    """
    import torch

    labels = tokens.clone()
    if "num_labels" in options:
        labels = torch.randint(options["num_labels"], tokens.shape, generator=_generator(seed))
    labels[:, 1::3] = IGNORED
    return labels


def token_loss(logits: torch.Tensor, labels: torch.Tensor, options: Fields) -> torch.Tensor:
    """Cross entropy over the tokens that count."""
    from torch.nn import functional

    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed + 6)
