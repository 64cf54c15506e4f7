# SPDX-License-Identifier: Apache-2.0
"""Labels and losses of transformers' classifiers: the closed forms are what transformers' own heads compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.classifiers import IGNORED, text_labels, text_loss, token_labels, token_loss

KINDS = [("single_label_classification", 3), ("regression", 1), ("multi_label_classification", 4)]
TOKENS = torch.tensor([[3, 4, 5, 6, 7], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


def head_of(name: str, **options: Any) -> torch.nn.Module:
    import transformers

    sizes = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=8, **options)
    torch.manual_seed(0)
    module: torch.nn.Module = getattr(transformers, name)(config).double().eval()
    return module


@pytest.mark.parametrize(("kind", "count"), KINDS)
def test_the_loss_of_texts_is_that_of_transformers(kind: str, count: int) -> None:
    options = {"problem_type": kind, "num_labels": count}
    labels = text_labels(TOKENS, options, seed=4)
    output = head_of("BertForSequenceClassification", **options)(input_ids=TOKENS, labels=labels)
    torch.testing.assert_close(text_loss(output.logits, labels, options), output.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "count"), KINDS)
def test_labels_are_of_the_kind_and_follow_the_seed(kind: str, count: int) -> None:
    options = {"problem_type": kind, "num_labels": count}
    first, again, other = (text_labels(TOKENS.repeat(4, 1), options, seed=seed) for seed in (1, 1, 2))
    assert first.shape == ((12, count) if kind == "multi_label_classification" else (12,))
    assert first.is_floating_point() == (kind != "single_label_classification")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "options"), [("BertForTokenClassification", {"num_labels": 3}), ("BertForMaskedLM", {})]
)
def test_the_loss_of_tokens_is_that_of_transformers(name: str, options: dict[str, Any]) -> None:
    labels = token_labels(TOKENS, options, seed=4)
    assert (labels == IGNORED).any(dim=1).all()
    assert (labels != IGNORED).any(dim=1).all()
    output = head_of(name, **options)(input_ids=TOKENS, labels=labels)
    torch.testing.assert_close(token_loss(output.logits, labels, options), output.loss, rtol=1e-12, atol=0)


def test_without_classes_the_labels_are_the_tokens_themselves() -> None:
    labels = token_labels(TOKENS, {}, seed=4)
    assert torch.equal(labels[:, 0], TOKENS[:, 0])
    assert bool((TOKENS >= 0).all())  # the tokens stay as they were
