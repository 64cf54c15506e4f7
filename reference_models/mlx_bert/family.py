# SPDX-License-Identifier: Apache-2.0
"""What the harness needs to know about BERT on MLX: configurations, the torch models it is held to, names and files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.classifiers import text_labels, text_loss, token_labels, token_loss
from harness.families import Family, Fields, Head, Quantisation
from reference_models.mlx_bert import checkpoint, golden, original

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy


def configurations(model_type: str) -> SearchStrategy[dict[str, Any]]:
    """Models of at most three layers; the plainest has one of everything.

    Corners: one head, head size 1, a feed-forward network narrower than the model, one token type and three, epsilons
    that differ from the library's, padding at any id, and the activations that BERTs are found with.
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_fields(draw: st.DrawFn) -> dict[str, Any]:
        heads, vocabulary = draw(st.integers(1, 4)), draw(st.integers(11, 61))
        # A norm over few channels leaves hardly anything to compare.
        head_size = draw(st.integers(-(-6 // heads), 8))
        pad = draw(st.sampled_from((0, 1, 3) if model_type != "roberta" else (1, 0, 3)))
        places = draw(st.integers(4, 20)) + (pad + 1 if model_type == "roberta" else 0)
        fields = {
            "vocab_size": vocabulary,
            "hidden_size": heads * head_size,
            "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": heads,
            "intermediate_size": draw(st.integers(4, 48)),
            "hidden_act": draw(st.sampled_from(("gelu", "relu", "gelu_new", "silu"))),
            "max_position_embeddings": places,
            "pad_token_id": pad,
            "initializer_range": draw(st.sampled_from((0.02, 0.05))),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if model_type != "distilbert":
            fields["type_vocab_size"] = draw(st.integers(1, 3))
            fields["layer_norm_eps"] = draw(st.sampled_from((1e-12, 1e-5, 1e-3)))
        # A configuration without it is BERT's, and a port of BERT alone need not know the name.
        return fields if model_type == "bert" else {"model_type": model_type, **fields}

    return draw_fields()


def run_original(
    module: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The last hidden states, which are compared as logits are, and the pooler's output."""
    return _named(original.run(module, tokens))


def run_masked(module: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same under a mask."""
    return _named(original.run_masked(module, tokens, mask))


def run_further(
    module: torch.nn.Module, tokens: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same with token types."""
    return _named(original.run(module, tokens, token_type_ids=given["token_type_ids"]))


def token_types(fields: Fields, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """A type for each token."""
    import torch

    generator = torch.Generator().manual_seed(seed + 8)
    return torch.randint(fields["type_vocab_size"], tokens.shape, generator=generator)


def _named(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"logits" if name == "last_hidden_state" else name: value for name, value in outputs.items()}


def behind_padding(fields: Fields) -> int:
    """RoBERTa's positions begin behind the row of its padding id."""
    return int(fields["pad_token_id"]) + 1


def padding_id(fields: Fields) -> int:
    """RoBERTa tells padding by its id."""
    return int(fields["pad_token_id"])


TEXT_OPTIONS: tuple[Fields, ...] = (
    {"num_labels": 3, "problem_type": "single_label_classification"},
    {"num_labels": 1, "problem_type": "regression"},
    {"num_labels": 2, "problem_type": "multi_label_classification"},
)

HEADS = tuple(
    Head(
        name=name,
        port="BertWithHead",
        options=options,
        original=f"reference_models.mlx_bert.original:{door}",
        build_original=original.build_head,
        run_original=original.run_classifier,
        labels=labels,
        loss=loss,
        write=checkpoint.write_checkpoint,
        dropout=("classifier_dropout",),
    )
    for name, door, options, labels, loss in (
        ("sequence_classification", "SequenceClassificationOriginal", TEXT_OPTIONS, text_labels, text_loss),
        ("token_classification", "TokenClassificationOriginal", ({"num_labels": 3},), token_labels, token_loss),
        ("masked_lm", "MaskedLMOriginal", ({},), token_labels, token_loss),
    )
)

FAMILY = Family(
    name="mlx_bert",
    features=frozenset(
        {
            "attentions",
            "checkpoint",
            "dropout",
            "further_inputs",
            "further_outputs",
            "heads",
            "initialisation",
            "learned_positions",
            "logits",
            "masks",
            "quantisation",
            "taps",
        }
    ),
    framework="mlx",
    configurations=functools.partial(configurations, "bert"),
    original="reference_models.mlx_bert.original:BertOriginal",
    build_original=original.build_original,
    run_original=run_original,
    run_masked=run_masked,
    further_inputs={"token_type_ids": token_types},
    run_further=run_further,
    output="last_hidden_state",
    taps=original.taps,
    port_key=original.port_key,
    positions_by_mask=False,
    mask_axes=2,
    longest=original.maximum_length,
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
    },
    special_tokens={"pad_token_id": 0},
    refused=(
        {"hidden_size": 10, "num_attention_heads": 4},
        {"hidden_act": "no such activation"},
    ),
    large=(
        {"num_hidden_layers": 11},
        {"max_position_embeddings": 300},
        {"hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 130},
    ),
    maximum_length="max_position_embeddings",
    dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    gains={r"(word|position|token_type)_embeddings\.weight$": 1.0, r"(query|key|q_lin|k_lin)\.weight$": 1.7},
    write_checkpoint=checkpoint.write_checkpoint,
    read_checkpoint=checkpoint.read_checkpoint,
    checkpoint_dialects=checkpoint.checkpoint_dialects,
    file_dtypes=("bfloat16", "float16"),
    checkpoint_name="checkpoint",
    weights_file="model.safetensors",
    revised_name="{name}@{revision}",
    heads=HEADS,
    quantisation=Quantisation(
        fields={"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96},
        options=({"bits": 8, "group_size": 32}, {"bits": 4, "group_size": 64}),
    ),
    golden=golden.golden,
    golden_names=("bert",),
    golden_bounds=golden.BOUNDS,
    mutants="reference_models.mlx_bert.mutants:MUTANTS",
    backends=("mlx-cpu", "mlx-gpu"),
)

DISTILBERT = dataclasses.replace(
    FAMILY,
    name="mlx_distilbert",
    features=FAMILY.features - {"further_inputs", "further_outputs"},
    configurations=functools.partial(configurations, "distilbert"),
    further_inputs={},
    run_further=None,
    defaults=None,
    golden_names=(),
    mutants="reference_models.mlx_bert.mutants:OF_DISTILBERT",
)

ROBERTA = dataclasses.replace(
    FAMILY,
    name="mlx_roberta",
    configurations=functools.partial(configurations, "roberta"),
    padding=padding_id,
    first_position=behind_padding,
    defaults=None,
    golden_names=(),
    mutants="reference_models.mlx_bert.mutants:OF_ROBERTA",
)
