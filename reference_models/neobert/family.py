# SPDX-License-Identifier: Apache-2.0
"""What the harness needs to know about NeoBERT: configurations, the training model's conventions, names and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.classifiers import text_labels, text_loss
from harness.families import Family, Fields, Head, LossConvention, Tap
from reference_models.neobert import golden, native_files

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

HEAD_OPTIONS: Sequence[Fields] = (
    {"num_labels": 3, "problem_type": "single_label_classification"},
    {"num_labels": 1, "problem_type": "regression"},
    {"num_labels": 2, "problem_type": "multi_label_classification"},
)


def configurations() -> SearchStrategy[dict[str, Any]]:
    """NeoBERT configurations of at most three layers; the plainest has one of everything.

    Corners: both norms, activations and kinds of positions, tied or not, one head, head size 1 where positions are
    learned, nominal widths that SwiGLU rounds up and that share a rounded one, padding at any id.
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_fields(draw: st.DrawFn) -> dict[str, Any]:
        rope, heads, vocabulary = not draw(st.booleans()), draw(st.integers(1, 4)), draw(st.integers(11, 61))
        # A norm over few channels leaves hardly anything to compare, and rotations need pairs.
        pairs = draw(st.integers(-(-3 // heads), 4))
        head_size = 2 * pairs if rope else draw(st.integers(-(-6 // heads), 8))
        return {
            "hidden_size": heads * head_size,
            "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": heads,
            "intermediate_size": draw(st.integers(9, 60)),
            "vocab_size": vocabulary,
            "max_length": draw(st.integers(4, 20)),
            "rope": rope,
            "rms_norm": not draw(st.booleans()),
            "hidden_act": draw(st.sampled_from(("swiglu", "gelu"))),
            "tie_word_embeddings": draw(st.booleans()),
            "norm_eps": draw(st.sampled_from((1e-5, 1e-6, 1e-3))),
            "pad_token_id": draw(st.sampled_from((0, 0, 3, vocabulary - 1))),
            "dropout": 0.0,
            "embedding_init_range": draw(st.sampled_from((0.02, 0.05))),
            "decoder_init_range": draw(st.sampled_from((0.02, 0.03))),
        }

    return draw_fields()


def build_original(cls: type, fields: Fields) -> torch.nn.Module:
    """`cls(config)`, the config being the `NeoBERTConfig` that stands beside the class."""
    return _built(cls, fields)


def _built(cls: type, fields: Fields, **options: Any) -> torch.nn.Module:
    import sys

    module: torch.nn.Module = cls(sys.modules[cls.__module__].NeoBERTConfig(**fields), **options)
    return module.eval()


def run_original(
    module: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Logits at all positions, and the masked-LM loss of labels that stand where their tokens stand."""
    from reference_models.neobert.original import masked_lm_loss

    logits = module(tokens)["logits"]
    return {"logits": logits} if targets is None else {"logits": logits, "loss": masked_lm_loss(logits, targets)}


def run_masked(module: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits with the training model's own mask, which is added to the scores."""
    return {"logits": module(tokens, pad_mask=additive(module, mask))["logits"]}


def additive(module: torch.nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """0 where the bool mask is True, minus infinity elsewhere, in the module's dtype."""
    import torch

    zeros = torch.zeros(mask.shape, dtype=next(module.parameters()).dtype)
    return zeros.masked_fill(~mask, float("-inf"))


def taps(fields: Fields) -> Sequence[Tap]:
    """Where both models can be compared, in the order data passes."""
    paths = {"embedding": "model.encoder"} if fields["rope"] else {"token_embedding": "model.encoder"}
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.transformer_encoder.{layer}"
        parts = ("attention_norm", "qkv", "wo", "ffn_norm", "ffn")
        paths |= {f"block.{layer}.{part}": f"{block}.{part}" for part in parts}
        paths[f"block.{layer}"] = block
    paths |= {"final_norm": "model.layer_norm", "head": "decoder"}
    return [Tap(name=name, original=path, port=path) for name, path in paths.items()]


def build_classifier(cls: type, fields: Fields, options: Fields) -> torch.nn.Module:
    """The training model with a classifier on its first token."""
    return _built(cls, fields, num_labels=options["num_labels"])


def run_classifier(module: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Its logits (rows, labels)."""
    logits: torch.Tensor = module(tokens, additive(module, mask))["logits"]
    return logits


def _ones(tokens: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor([0, tokens.shape[1]], dtype=torch.int32)


FAMILY = Family(
    name="neobert",
    features=frozenset(
        {
            "attentions",
            "checkpoint",
            "dropout",
            "heads",
            "initialisation",
            "learned_positions",
            "logits",
            "loss",
            "masks",
            "original_only",
            "taps",
            "tied_embeddings",
            "tokenizer",
        }
    ),
    configurations=configurations,
    original="reference_models.neobert.original:NeoBERTLMHead",
    build_original=build_original,
    run_original=run_original,
    run_masked=run_masked,
    fields={"max_length": ("max_position_embeddings",), "dropout": ("dropout_prob",)},
    # Of both classes; the vocabulary is that of the training files, which the training class alone has larger.
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
        "max_length": 1024,
        "rope": True,
        "rms_norm": True,
        "hidden_act": "swiglu",
        "tie_word_embeddings": True,
        "norm_eps": 1e-6,
        "pad_token_id": 0,
        "dropout": 0.0,
        "embedding_init_range": 0.02,
        "decoder_init_range": 0.02,
    },
    special_tokens={"pad_token_id": 0},
    refused=(
        {"hidden_size": 10, "num_attention_heads": 4},
        {"hidden_size": 9, "num_attention_heads": 3, "rope": True},
        {"hidden_act": "relu"},
        {"ngpt": True},
    ),
    large=(
        # Two digits in a layer's number, heads wider than 64, more than 256 positions and tokens.
        {
            "num_hidden_layers": 12,
            "num_attention_heads": 1,
            "hidden_size": 72,
            "intermediate_size": 100,
            "max_length": 300,
            "vocab_size": 300,
            "pad_token_id": 0,
            "rope": True,
        },
        # More positions than float16 has whole numbers in a row.
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "hidden_size": 8,
            "max_length": 2100,
            "rope": False,
        },
        # More positions than any text of training has.
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "hidden_size": 8,
            "max_length": 1100,
            "rope": True,
        },
        # BERT's vocabulary, and more heads than any drawn.
        {
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "hidden_size": 32,
            "max_length": 16,
            "vocab_size": 30522,
            "rope": True,
        },
    ),
    tied=lambda fields: [("model.encoder.weight", "decoder.weight")] if fields["tie_word_embeddings"] else [],
    padding=lambda fields: None if fields["rope"] else fields["pad_token_id"],
    mask_axes=2,
    relative_positions=lambda fields: bool(fields["rope"]),
    first_position=1,
    original_only={
        "packed_seqlens": lambda tokens: [[tokens.shape[1]]] * len(tokens),
        "cu_seqlens": _ones,
        "max_seqlen": lambda tokens: tokens.shape[1],
    },
    heads=(
        Head(
            name="classification",
            port="NeoBERTForSequenceClassification",
            auto_class="AutoModelForSequenceClassification",
            options=HEAD_OPTIONS,
            original="reference_models.neobert.original:NeoBERTForSequenceClassification",
            build_original=build_classifier,
            run_original=run_classifier,
            labels=text_labels,
            loss=text_loss,
        ),
    ),
    maximum_length="max_length",
    dropout="dropout",
    loss=LossConvention(labels="hf", ignore_index=-100),
    taps=taps,
    # Logits with standard deviation near 2, and attention with a peak (see the project's design, "Numbers").
    gains={r"(encoder|positional_embedding|decoder)\.weight$": 1.5, r"qkv\.weight$": 1.7},
    write_checkpoint=native_files.write_checkpoint,
    read_checkpoint=native_files.read_checkpoint,
    checkpoint_dialects=native_files.checkpoint_dialects,
    checkpoint_name="run/model_checkpoints/100",
    weights_file="state_dict.pt",
    golden=golden.golden,
    golden_bounds=golden.bounds,
    mutants="reference_models.neobert.mutants:MUTANTS",
    port_auto_class="AutoModelForMaskedLM",
)
