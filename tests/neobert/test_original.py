# SPDX-License-Identifier: Apache-2.0
"""NeoBERT's training model against vectors of the upstream code, a second implementation, and its description."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness import families
from harness.errors import DescriptionError
from harness.families import Family, LossConvention
from harness.golden import read_golden, record, verify
from reference_models.neobert import golden as golden_files
from reference_models.neobert import original
from reference_models.neobert.original import (
    NeoBERT,
    NeoBERTConfig,
    NeoBERTForSequenceClassification,
    NeoBERTLMHead,
    RMSNorm,
    additive_mask,
    masked_lm_loss,
    masked_lm_loss_sum,
    rotary_table,
    rotated,
    swiglu_size,
)

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "neobert"
FILES = sorted(path.name for path in GOLDEN.glob("*.safetensors"))
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 23,
    "max_length": 12,
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
DROP = -math.inf
ROPE_OR_NOT = pytest.mark.parametrize("rope", [True, False], ids=["rope", "learned"])


def sensitive(model: Any) -> Any:
    """The model in float64 and evaluation, with weights drawn so wide that each of them matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.3)
    return model.double().eval()


def tiny(**fields: Any) -> NeoBERTLMHead:
    model: NeoBERTLMHead = sensitive(NeoBERTLMHead(NeoBERTConfig(**(SIZES | fields))))
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Tokens of which none is padding."""
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def far(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() > 1e-2)


# Vectors of the upstream code


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family, with no more than golden files need."""
    monkeypatch.setattr(families, "_registered", {})
    families.register_family(
        Family(
            name="neobert",
            features=frozenset({"logits", "loss"}),
            configurations=lambda: pytest.fail("a golden file needs no drawn configuration"),
            original=f"{original.__name__}:NeoBERTLMHead",
            build_original=lambda kind, fields: kind(NeoBERTConfig(**fields)).eval(),
            run_original=lambda *_: pytest.fail("golden files of this family are run by a function of its own"),
            maximum_length="max_length",
            loss=LossConvention(labels="preshifted", ignore_index=-100),
            parameter_groups=lambda module, decay: [{"params": list(module.parameters()), "weight_decay": decay}],
            golden=golden_files.golden,
            golden_bounds=golden_files.bounds,
        )
    )
    return


def test_all_six_vectors_are_here() -> None:
    assert len(FILES) == 6


@pytest.mark.parametrize("file", FILES)
def test_vectors(registered: None, file: str) -> None:
    (result,) = verify(GOLDEN / file)
    assert (result.status, result.reason) == ("verified", "")
    tight = {name for name, bound in result.bounds.items() if bound == 1e-12}
    everything = {name for name in result.bounds if "_f64" in name}
    through_float32 = {name for name in everything if "_nocast/" not in name and not name.endswith("/embedding")}
    assert tight == (everything if "ln_learnedpos" in file else everything - through_float32)
    assert max(result.bounds.values()) <= 2e-5


class RoundingNorm(RMSNorm):
    """Upstream's way: to float32 by a method that can be made one to float64."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__(norm.weight.shape[0], norm.eps)
        del self.float32_inside

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SomeoneElses(NeoBERTLMHead):
    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        for parent in (self.model, *self.model.transformer_encoder):
            for name, child in list(parent.named_children()):
                if isinstance(child, RMSNorm):
                    setattr(parent, name, RoundingNorm(child))


def test_an_original_of_someone_else_rounds_by_its_own_conversions(registered: None) -> None:
    path = GOLDEN / "neobert_swiglu_rms_learnedpos_tied_pad3.safetensors"
    (result,) = verify(path, original_override={"neobert": SomeoneElses})
    assert (result.status, result.reason) == ("verified", "")


@pytest.mark.parametrize("fields", [{}, {"rope": False, "rms_norm": False, "tie_word_embeddings": True}])
def test_recording(registered: None, tmp_path: Path, fields: dict[str, Any]) -> None:
    out = tmp_path / "own.safetensors"
    # Fields that are not given are the original's defaults.
    spec = f"{original.__name__}:NeoBERTLMHead"
    record(spec, out, fields=SIZES | fields, family="neobert", adamw_steps=1)
    (result,) = verify(out)
    assert (result.status, result.reason) == ("verified", "")
    stored = {name.removeprefix("outputs_f64/") for name in result.errors if name.startswith("outputs_f64/")}
    losses = {"loss", "loss_sum", "adamw_losses"}
    assert stored == losses | {
        "embedding", "block.0", "block.1", "final_norm", "hidden_representation", "logits",
    }  # fmt: skip
    for wrong in ({"depth": 2}, {"ngpt": True}):
        with pytest.raises(DescriptionError, match="its config is not that of neobert"):
            golden_files.bounds(dataclasses.replace(read_golden(out), fields=wrong))


# A second implementation


def in_numpy(config: NeoBERTConfig, state: dict[str, Tensor], ids: Tensor, scores: Tensor | None = None) -> Any:
    """Logits by loops over rows, heads and queries; scores (rows, queries, keys) are added."""
    weights = {name: tensor.double().numpy() for name, tensor in state.items()}

    def norm(name: str, x: Any) -> Any:
        if config.rms_norm:
            return weights[f"{name}.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return weights[f"{name}.weight"] * scaled + weights[f"{name}.bias"]

    def feed_forward(name: str, x: Any) -> Any:
        if config.hidden_act == "gelu":
            inside = x @ weights[f"{name}.0.weight"].T
            inside = inside * 0.5 * (1 + np.vectorize(math.erf)(inside / math.sqrt(2)))
            return inside @ weights[f"{name}.2.weight"].T
        gate = x @ weights[f"{name}.w1.weight"].T
        return (gate / (1 + np.exp(-gate)) * (x @ weights[f"{name}.w2.weight"].T)) @ weights[f"{name}.w3.weight"].T

    def turned(vector: Any, position: int) -> Any:
        turned = np.empty_like(vector)
        for pair in range(len(vector) // 2):
            angle = position * 10000.0 ** (-2 * pair / len(vector))
            a, b = vector[2 * pair : 2 * pair + 2]
            turned[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    d = config.hidden_size // config.num_attention_heads
    logits = []
    for row, line in enumerate(ids.tolist()):
        x, count = weights["model.encoder.weight"][line], 0
        if not config.rope:
            for place, token in enumerate(line):
                count += token != config.pad_token_id
                position = count if token != config.pad_token_id else 0
                x[place] += weights["model.positional_embedding.weight"][position]
        for layer in range(config.num_hidden_layers):
            name = f"model.transformer_encoder.{layer}"
            packed = norm(f"{name}.attention_norm", x) @ weights[f"{name}.qkv.weight"].T
            mixed = np.zeros_like(x)
            for head in range(config.num_attention_heads):
                q, k, v = (packed[:, (3 * head + part) * d : (3 * head + part + 1) * d] for part in range(3))
                if config.rope:
                    q, k = (np.stack([turned(vector, p) for p, vector in enumerate(part)]) for part in (q, k))
                products = q @ k.T / math.sqrt(d) + (0 if scores is None else scores[row].double().numpy())
                with np.errstate(invalid="ignore"):
                    exponentials = np.exp(products - products.max(-1, keepdims=True))
                    probabilities = np.nan_to_num(exponentials / exponentials.sum(-1, keepdims=True))
                mixed[:, head * d : (head + 1) * d] = probabilities @ v
            x = x + mixed @ weights[f"{name}.wo.weight"].T
            x = x + feed_forward(f"{name}.ffn", norm(f"{name}.ffn_norm", x))
        x = norm("model.layer_norm", x)
        logits.append(x @ weights["decoder.weight"].T + weights["decoder.bias"])
    return torch.tensor(np.stack(logits))


@pytest.mark.parametrize("seed", range(12))
def test_a_second_implementation_agrees(seed: int) -> None:
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3])
    config = {
        "hidden_size": heads * draw.choice([4, 6]), "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([1, 2, 3]), "intermediate_size": draw.choice([16, 20, 31]),
        "rms_norm": bool(seed & 1), "rope": bool(seed & 2), "hidden_act": ("swiglu", "gelu")[seed // 4 % 2],
        "pad_token_id": draw.choice([0, 3]), "norm_eps": draw.choice([1e-6, 1e-2]),
        "tie_word_embeddings": draw.choice([True, False]),
    }  # fmt: skip
    model = tiny(**config)
    ids = torch.randint(0, 5, (3, draw.choice([1, 7, 12])), generator=torch.Generator().manual_seed(seed))
    # Every third has a mask of keys, every third one of queries and keys, with rows that see nothing.
    kept = torch.rand(3, *ids.shape[1:] * (seed % 3), generator=torch.Generator().manual_seed(seed)) < 0.7
    mask = None if seed % 3 == 0 else torch.zeros(kept.shape).double().masked_fill(~kept, DROP)
    scores = None if mask is None else mask[:, None].expand(3, ids.shape[1], -1) if mask.dim() == 2 else mask
    assert_equal(model(ids, mask)["logits"], in_numpy(model.config, model.state_dict(), ids, scores))


# Configuration, tensors, initialisation


def test_configuration_defaults_in_order() -> None:
    assert list(vars(NeoBERTConfig()).items()) == [
        ("hidden_size", 768),
        ("num_hidden_layers", 28),
        ("num_attention_heads", 12),
        ("intermediate_size", 3072),
        ("dropout", 0.0),
        ("embedding_init_range", 0.02),
        ("decoder_init_range", 0.02),
        ("classifier_init_range", 0.02),
        ("rms_norm", True),
        ("rope", True),
        ("norm_eps", 1e-6),
        ("hidden_act", "swiglu"),
        ("vocab_size", 32064),
        ("pad_token_id", 0),
        ("max_length", 1024),
        ("attn_backend", "sdpa"),
        ("kernel_backend", "auto"),
        ("tie_word_embeddings", True),
        ("ngpt", False),
        ("base_scale", 1 / math.sqrt(960)),
    ]
    assert NeoBERTConfig(hidden_act="SwiGLU").hidden_act == "swiglu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngpt": True}, "ngpt=True.*nGPT"),
        ({"num_attention_heads": 3}, "hidden_size=16.*num_attention_heads=3"),
        ({"hidden_size": 18, "num_attention_heads": 6}, "RoPE requires an even head dimension.* 3$"),
        ({"hidden_act": "ReLU"}, "Unsupported hidden_act 'relu', expected one of swiglu, gelu"),
        ({"attn_backend": "flash"}, "Unsupported attn_backend 'flash'"),
        ({"kernel_backend": "cuda"}, "Unsupported kernel_backend 'cuda'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0, expected at least 1"),
        ({"pad_token_id": 23}, "pad_token_id=23, expected 0 to vocab_size-1=22"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"norm_eps": math.nan}, "norm_eps=nan"),
    ],
)
def test_configurations_without_meaning(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        NeoBERTConfig(**(SIZES | fields))
    assert "\n" not in str(caught.value)


def test_an_odd_head_size_needs_learned_positions() -> None:
    model = tiny(hidden_size=18, num_attention_heads=6, rope=False)
    assert model(tokens(2, 5))["logits"].shape == (2, 5, 23)


@pytest.mark.parametrize(
    ("nominal", "inside"),
    [
        (13, 8), (37, 24), (48, 32), (50, 40), (55, 40), (64, 48), (100, 72), (128, 88), (256, 176), (512, 344),
        (768, 512), (1024, 688), (1536, 1024), (2048, 1368), (3072, 2048), (4096, 2736),
    ],
)  # fmt: skip
def test_width_table(nominal: int, inside: int) -> None:
    assert swiglu_size(nominal) == inside


def test_names_and_shapes_of_tensors() -> None:
    def shapes(**fields: Any) -> list[tuple[str, tuple[int, ...]]]:
        return [
            (name, tuple(tensor.shape)) for name, tensor in tiny(num_hidden_layers=1, **fields).state_dict().items()
        ]

    layer = "model.transformer_encoder.0"
    assert shapes() == [
        ("model.encoder.weight", (23, 16)),
        (f"{layer}.attention_norm.weight", (16,)),
        (f"{layer}.qkv.weight", (48, 16)),
        (f"{layer}.wo.weight", (16, 16)),
        (f"{layer}.ffn_norm.weight", (16,)),
        (f"{layer}.ffn.w1.weight", (16, 16)),
        (f"{layer}.ffn.w2.weight", (16, 16)),
        (f"{layer}.ffn.w3.weight", (16, 16)),
        ("model.layer_norm.weight", (16,)),
        ("decoder.weight", (23, 16)),
        ("decoder.bias", (23,)),
    ]
    assert shapes(rms_norm=False, rope=False, hidden_act="gelu") == [
        ("model.encoder.weight", (23, 16)),
        ("model.positional_embedding.weight", (13, 16)),
        (f"{layer}.attention_norm.weight", (16,)),
        (f"{layer}.attention_norm.bias", (16,)),
        (f"{layer}.qkv.weight", (48, 16)),
        (f"{layer}.wo.weight", (16, 16)),
        (f"{layer}.ffn_norm.weight", (16,)),
        (f"{layer}.ffn_norm.bias", (16,)),
        (f"{layer}.ffn.0.weight", (24, 16)),
        (f"{layer}.ffn.2.weight", (16, 24)),
        ("model.layer_norm.weight", (16,)),
        ("model.layer_norm.bias", (16,)),
        ("decoder.weight", (23, 16)),
        ("decoder.bias", (23,)),
    ]


def test_the_decoder_is_tied_where_the_configuration_says_so() -> None:
    tied, apart = tiny(tie_word_embeddings=True), tiny()
    assert tied.decoder.weight is tied.model.encoder.weight
    assert apart.decoder.weight is not apart.model.encoder.weight
    assert len(list(apart.parameters())) == len(list(tied.parameters())) + 1
    assert {"decoder.weight", "model.encoder.weight"} <= set(tied.state_dict())


def test_initialisation() -> None:
    torch.manual_seed(0)
    ranges = {"embedding_init_range": 0.3, "decoder_init_range": 0.1, "classifier_init_range": 0.7}
    fields = SIZES | ranges | {"rope": False, "rms_norm": False, "pad_token_id": 5, "vocab_size": 400}
    model = NeoBERTLMHead(NeoBERTConfig(**(fields | {"hidden_size": 64, "max_length": 200})))
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(tensor, torch.full_like(tensor, "norm" in name and name.endswith("weight"))), name
            continue
        limit = 0.3 if "encoder.weight" in name or "positional" in name else 0.1
        assert 0.99 * limit < tensor.abs().max() <= limit, name
        # A uniform distribution has a standard deviation of its range over the root of 12.
        assert tensor.std().item() == pytest.approx(2 * limit / math.sqrt(12), rel=0.05), name
    assert not model.model.encoder.weight[5].any() and not model.model.positional_embedding.weight[0].any()
    assert model.model.encoder.weight[0].any()

    head = NeoBERTForSequenceClassification(NeoBERTConfig(**(fields | {"hidden_size": 64})), num_labels=50)
    for layer in (head.dense, head.classifier):
        assert layer.weight.std().item() == pytest.approx(0.7, rel=0.05)
        assert not layer.bias.any()


def test_the_tied_matrix_is_drawn_as_an_embedding() -> None:
    ranges = {"embedding_init_range": 0.3, "decoder_init_range": 0.001}
    model = NeoBERTLMHead(NeoBERTConfig(**(SIZES | ranges | {"tie_word_embeddings": True})))
    assert model.decoder.weight.abs().max() > 0.2
    assert not model.decoder.weight[0].any()


# Masks


@ROPE_OR_NOT
def test_masks_that_say_the_same(rope: bool) -> None:
    model, ids = tiny(rope=rope), tokens(3, 6)
    nothing = model(ids)["logits"]
    for kept in (torch.zeros(3, 6), torch.zeros(3, 6, 6), torch.ones(3, 6, dtype=torch.bool)):
        assert_equal(model(ids, kept)["logits"], nothing)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]]).bool()
    added = torch.zeros(3, 6).masked_fill(~keep, DROP)
    padded = model(ids, added)["logits"]
    assert far(padded, nothing)
    for same in (keep, added.double(), added[:, None].expand(3, 6, 6), keep[:, None].expand(3, 6, 6)):
        assert_equal(model(ids, same)["logits"], padded)
    torch.testing.assert_close(model(ids, added.clamp(min=-1e4))["logits"], padded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_of_another_type(dtype: torch.dtype) -> None:
    model, ids = tiny().to(dtype), tokens(2, 6)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    expected = model(ids, keep)["logits"]
    for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        added = torch.zeros(2, 6, dtype=other).masked_fill(~keep, DROP)
        torch.testing.assert_close(model(ids, added)["logits"], expected)


@ROPE_OR_NOT
def test_padding_is_as_if_it_were_not_there(rope: bool) -> None:
    model, content = tiny(rope=rope), tokens(1, 5)
    alone = model(content)["logits"]
    for left, right in ((3, 0), (0, 3), (2, 1)):
        ids = nn.functional.pad(content, (left, right))
        assert_equal(model(ids, ids != 0)["logits"][:, left : left + 5], alone)


def test_finite_scores_are_added() -> None:
    model, ids = tiny(num_hidden_layers=1), tokens(2, 5)
    bias = torch.randn(2, 5, 5, dtype=torch.float64)
    assert_equal(model(ids, bias)["logits"], in_numpy(model.config, model.state_dict(), ids, bias))
    assert far(model(ids, bias.double())["logits"], model(ids)["logits"])


@pytest.mark.parametrize("mask", [torch.zeros(2, 5, dtype=torch.bool), torch.full((2, 5), DROP)], ids=["bool", "added"])
def test_a_row_that_may_attend_to_nothing(mask: Tensor) -> None:
    model, ids = tiny(num_hidden_layers=1), tokens(2, 5)
    mask = mask.clone()
    mask[1] = torch.ones(5) if mask.dtype == torch.bool else torch.zeros(5)
    block = model.model.transformer_encoder[0]
    x = model.model.encoder(ids[:1])
    without_attention = model.decoder(model.model.layer_norm(x + block.ffn(block.ffn_norm(x))))
    logits = model(ids, mask)["logits"]
    assert_equal(logits[:1], without_attention)
    assert_equal(logits[1:], model(ids[1:])["logits"])
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"shape \(2, 4\), expected \(2, 5\) or \(2, 5, 5\)"),
        (torch.ones(1, 5), ValueError, r"shape \(1, 5\)"),
        (torch.zeros(2, 1, 5, 5), ValueError, r"shape \(2, 1, 5, 5\)"),
        (torch.ones(2, 5, dtype=torch.long), TypeError, "pad_mask is torch.int64.*0 keeps.*True keeps"),
        (torch.ones(2, 5), ValueError, "ones and zeros"),
        (torch.eye(5)[:2], ValueError, "ones and zeros"),
        (torch.ones(2, 5, 5), ValueError, "ones and zeros"),
        (torch.full((2, 5), math.nan), ValueError, "NaN"),
        (torch.full((2, 5), math.inf), ValueError, r"\+inf"),
    ],
)
def test_masks_that_nobody_can_mean(mask: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tiny()(tokens(2, 5), mask)
    assert "\n" not in str(caught.value)


# Packed sequences


def test_a_segment_is_as_if_alone_with_rope_and_not_with_learned_positions() -> None:
    ids = tokens(2, 9)
    for rope in (True, False):
        model = tiny(rope=rope)
        packed = model(ids, packed_seqlens=[[4, 3, 2], [6, 3]])["logits"]
        for row, start, stop in ((0, 0, 4), (0, 4, 7), (0, 7, 9), (1, 0, 6), (1, 6, 9)):
            alone = model(ids[row : row + 1, start:stop])["logits"][0]
            if rope or start == 0:
                assert_equal(packed[row, start:stop], alone)
            else:
                assert far(packed[row, start:stop], alone)


def test_packed_lengths_of_every_form() -> None:
    model, ids = tiny(), tokens(2, 9)
    lists = model(ids, packed_seqlens=[[4, 3], [9]])["logits"]
    for dtype in (torch.int32, torch.int64):
        assert_equal(model(ids, packed_seqlens=torch.tensor([[4, 3, 0], [0, 9, 0]], dtype=dtype))["logits"], lists)
    assert_equal(model(ids, packed_seqlens=((4, 0, 3), (9,)))["logits"], lists)
    assert_equal(model(ids, packed_seqlens=[[9], [9]])["logits"], model(ids)["logits"])
    one_each = model(ids, packed_seqlens=[[4], [9]])["logits"]
    assert_equal(model(ids, packed_seqlens=torch.tensor([4, 9]))["logits"], one_each)
    one_row = model(ids[:1], packed_seqlens=[[4, 3]])["logits"]
    assert_equal(model(ids[:1], packed_seqlens=torch.tensor([4, 3]))["logits"], one_row)


def test_tokens_after_the_last_segment_attend_to_nothing() -> None:
    model, ids = tiny(num_hidden_layers=1), tokens(2, 9)
    packed = model(ids, packed_seqlens=[[4], []])["hidden_representation"]
    keys = torch.zeros(2, 9, 9, dtype=torch.bool)
    keys[0, :4, :4] = True
    assert_equal(packed, model(ids, keys)["hidden_representation"])
    assert packed.isfinite().all()


def test_a_mask_beside_packed_lengths_is_ignored_with_a_warning() -> None:
    model, ids = tiny(), tokens(1, 6)
    with pytest.warns(UserWarning, match="pad_mask is ignored"):
        found = model(ids, torch.full((1, 6), DROP), [[3, 3]])["logits"]
    assert_equal(found, model(ids, packed_seqlens=[[3, 3]])["logits"])


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        ([[4, 3], [5, 5]], ValueError, r"packed_seqlens\[1\] adds up to 10, more than the 9 tokens"),
        ([[4, 3]], ValueError, "1 rows, and the batch has 2"),
        (torch.tensor([4, 3, 2]), ValueError, "3 rows, and the batch has 2"),
        ([[4, -1], [5]], ValueError, r"packed_seqlens\[0\] holds -1"),
        ([[4.0], [5]], ValueError, r"packed_seqlens\[0\] holds 4.0"),
        ([[True], [5]], ValueError, "holds True"),
        ([4, 5], TypeError, r"packed_seqlens\[0\] is int"),
        (torch.tensor([[4.0], [5.0]]), TypeError, "torch.float32, expected an integer tensor"),
        (torch.tensor([[True], [True]]), TypeError, "torch.bool, expected an integer tensor"),
        (torch.tensor(4), ValueError, r"shape \(\), expected one or two axes"),
        (torch.ones(2, 1, 1, dtype=torch.long), ValueError, "expected one or two axes"),
        # It stands for one on a GPU.
        (torch.ones(2, 1, dtype=torch.long, device="meta"), RuntimeError, "on meta, expected a CPU tensor"),
    ],
)
def test_packed_lengths_without_meaning(packed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tiny()(tokens(2, 9), packed_seqlens=packed)
    assert "\n" not in str(caught.value)


# Positions


def embedded(model: NeoBERTLMHead, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the first layer is given."""
    seen: list[Tensor] = []
    hook = model.model.transformer_encoder[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(ids, mask)
    hook.remove()
    return seen[0]


def test_learned_positions_count_content_whatever_the_mask_says() -> None:
    model = tiny(rope=False, pad_token_id=3)
    ids = torch.tensor([[3, 3, 7, 8, 3, 9], [0, 1, 2, 4, 5, 3]])
    expected = torch.tensor([[0, 0, 1, 2, 0, 3], [1, 2, 3, 4, 5, 0]])
    for mask in (None, torch.zeros(2, 6), ids == 3):
        offsets = embedded(model, ids, mask) - model.model.encoder(ids)
        assert_equal(offsets, model.model.positional_embedding(expected))


def test_learned_positions_end_with_their_table() -> None:
    model = tiny(rope=False)
    assert model(tokens(2, 12))["logits"].isfinite().all()
    with_padding = nn.functional.pad(tokens(2, 12), (1, 2))
    assert model(with_padding)["logits"].isfinite().all(), "only content needs a position"
    with pytest.raises(ValueError, match=r"13 tokens.*max_length=12"):
        model(tokens(2, 13))


def test_rope_has_no_end() -> None:
    model = tiny()
    ids = tokens(1, 40)
    assert_equal(model(ids)["logits"], in_numpy(model.config, model.state_dict(), ids))


def test_scores_depend_on_distances_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    table = rotary_table(2000, 8, dtype=torch.float64, device=torch.device("cpu"))

    def score(at: int, other: int) -> float:
        return float((rotated(query, table[at, None]) * rotated(key, table[other, None])).sum())

    for shift in (1, 17, 1500):
        assert score(5 + shift, 9 + shift) == pytest.approx(score(5, 9), rel=1e-12)
    assert abs(score(5, 9) - score(9, 5)) > 0.1
    assert torch.equal(rotated(query, table[:1]), query)
    assert rotated(query, table[3:4]).norm().item() == pytest.approx(query.norm().item(), rel=1e-14)


def test_neighbouring_channels_are_a_pair() -> None:
    table = rotary_table(3, 4, dtype=torch.float64, device=torch.device("cpu"))
    found = rotated(torch.tensor([1.0, 0, 1, 0], dtype=torch.float64).expand(1, 3, 1, 4), table)[0, :, 0]
    angles = [(position, position / 100) for position in range(3)]
    expected = [[f(angle) for angle in pair for f in (math.cos, math.sin)] for pair in angles]
    assert_equal(found, torch.tensor(expected, dtype=torch.float64))


# Types and places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_rounds_before_the_gain(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-5)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    norm.to(dtype)
    x = torch.randn(200, 64).to(dtype)
    wide = x.double()
    rounded = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    assert norm(x).dtype == dtype
    # A tie may go either way in float32, hence nearly all.
    assert (norm(x) == rounded * norm.weight).float().mean() > 0.999
    after = nn.functional.rms_norm(x, (64,), norm.weight, 1e-5)
    assert (norm(x) != after).float().mean() > 0.1


@ROPE_OR_NOT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_casting_before_and_after_a_call_is_the_same(rope: bool, dtype: torch.dtype) -> None:
    ids = tokens(2, 12)
    mask = torch.zeros(2, 12).masked_fill(torch.arange(12) > 8, DROP)
    late = tiny(rope=rope).float()
    single = late(ids, mask)["logits"]
    late, early = late.to(dtype), tiny(rope=rope).to(dtype)
    assert torch.equal(late(ids, mask)["logits"], early(ids, mask)["logits"])
    assert early(ids, mask)["logits"].dtype == dtype
    # Eight bits in two layers and a decoder.
    assert (early(ids, mask)["logits"].float() - single).abs().max() < 0.25 * single.std()


def test_angles_stay_precise_in_half_precision() -> None:
    x = torch.ones(1, 3000, 1, 2, dtype=torch.bfloat16)
    table = rotary_table(3000, 2, dtype=torch.float32, device=torch.device("cpu"))
    positions = torch.arange(3000.0).double()
    expected = torch.stack((positions.cos() - positions.sin(), positions.sin() + positions.cos()), -1)
    found = rotated(x, table)
    assert found.dtype == torch.bfloat16
    # bfloat16 has no whole numbers between 256 and 258: angles in it would be off by radians.
    torch.testing.assert_close(found[0, :, 0].double(), expected, rtol=0, atol=0.01)


def test_a_copy_and_a_model_made_without_storage() -> None:
    model, ids = tiny(), tokens(2, 9)
    before = model(ids)["logits"]
    assert torch.equal(copy.deepcopy(model)(ids)["logits"], before)
    with torch.device("meta"):
        empty = NeoBERTLMHead(model.config)
    assert empty(ids.to("meta"), torch.zeros(2, 9, device="meta"))["logits"].shape == (2, 9, 23)
    filled = empty.double().to_empty(device="cpu").eval()
    for tensor in filled.buffers():
        tensor.fill_(math.nan)
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(ids)["logits"], before)


def test_float32_inside_a_float64_model() -> None:
    model, ids = tiny(), tokens(2, 9)
    rounding = NeoBERTLMHead(model.config, float32_inside=True).double().eval()
    rounding.load_state_dict(model.state_dict())
    difference = (rounding(ids)["logits"] - model(ids)["logits"]).abs().max()
    assert 1e-8 < difference < 1e-4
    assert torch.equal(rounding.float()(ids)["logits"], model.float()(ids)["logits"])


# Dropout, loss, edges


def test_dropout_only_while_training_and_on_every_branch() -> None:
    model, ids = tiny(dropout=0.5), tokens(2, 5)
    assert torch.equal(model(ids)["logits"], tiny(dropout=0.0)(ids)["logits"])
    model.train()
    assert far(model(ids)["logits"], model(ids)["logits"])
    everything = tiny(dropout=0.0).train()
    for name, part in everything.named_modules():
        if name.endswith(("resid_dropout", "ffn_dropout")):
            part.p = 1.0
    assert_equal(everything.model(ids), everything.model.layer_norm(everything.model.encoder(ids)))
    assert [part.p for part in model.modules() if isinstance(part, nn.Dropout)] == [0.5] * 4


def test_attention_weights_are_dropped_too() -> None:
    model, ids = tiny(dropout=0.5, num_hidden_layers=1).train(), tokens(1, 5)
    block = model.model.transformer_encoder[0]
    block.resid_dropout.p = block.ffn_dropout.p = 0.0
    assert far(model(ids)["logits"], model(ids)["logits"])


def test_loss_is_the_sum_over_the_number_of_labels() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    labels = torch.tensor([[2, -100, 3], [-100, -100, 6]])
    log_probabilities = logits.log_softmax(-1)
    total = -(log_probabilities[0, 0, 2] + log_probabilities[0, 2, 3] + log_probabilities[1, 2, 6])
    assert_equal(masked_lm_loss_sum(logits, labels), total)
    assert_equal(masked_lm_loss(logits, labels), total / 3)
    nothing = torch.full_like(labels, -100)
    assert masked_lm_loss_sum(logits, nothing) == 0 and masked_lm_loss(logits, nothing).isnan()
    assert masked_lm_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_the_row_of_padding_learns_only_as_part_of_the_decoder() -> None:
    for tied in (False, True):
        model = tiny(rope=False, tie_word_embeddings=tied)
        model(torch.tensor([[0, 4, 0, 5]]))["logits"].square().sum().backward()
        assert bool(model.model.encoder.weight.grad[0].any()) == tied
        assert not model.model.positional_embedding.weight.grad[0].any()


def test_no_tokens_give_no_logits() -> None:
    for rope in (True, False):
        assert tiny(rope=rope)(torch.zeros(2, 0, dtype=torch.long))["logits"].shape == (2, 0, 23)


def test_the_encoder_alone() -> None:
    model, ids = tiny(), tokens(2, 5)
    outputs = model(ids)
    assert isinstance(model.model, NeoBERT)
    assert torch.equal(model.model(ids), outputs["hidden_representation"])
    assert_equal(outputs["logits"], model.decoder(model.model(ids)))


# Sequence classification


def classifier(num_labels: int = 3, **fields: Any) -> NeoBERTForSequenceClassification:
    head = NeoBERTForSequenceClassification(NeoBERTConfig(**(SIZES | fields)), num_labels)
    model: NeoBERTForSequenceClassification = sensitive(head)
    return model


def test_the_head_reads_the_first_token() -> None:
    model, ids = classifier(), tokens(2, 5)
    outputs = model(ids)
    first = model.model(ids)[:, 0]
    assert_equal(outputs["logits"], model.classifier(torch.tanh(model.dense(first))))
    assert torch.equal(outputs["hidden_representation"], model.model(ids))
    assert {name.split(".")[0] for name in model.state_dict()} == {"model", "dense", "classifier"}
    with pytest.raises(ValueError, match="num_labels=0"):
        classifier(0)


def test_dropout_before_and_after_the_dense_layer() -> None:
    model, ids = classifier(), tokens(2, 5)
    given: list[Tensor] = []
    assert model.dropout.p == 0.1
    model.dropout.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.dropout.register_forward_hook(lambda _, inputs, output: output + len(given))  # what it returns is used
    logits = model(ids)["logits"]
    first, second = given
    assert_equal(first, model.model(ids)[:, 0])
    assert_equal(second, torch.tanh(model.dense(first + 1)))
    assert_equal(logits, model.classifier(second + 2))


def test_masks_of_the_head() -> None:
    model, ids = classifier(), tokens(2, 5)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = model.model(ids, keep.bool())[:, 0]
    for mask in (keep, keep.bool(), keep.float(), 7 * keep, torch.zeros(2, 5).masked_fill(keep == 0, DROP)):
        assert_equal(model(ids, mask)["hidden_representation"][:, 0], expected)
    whole = model(ids)["logits"]
    assert_equal(model(ids, torch.zeros(2, 5))["logits"], whole)
    assert far(model(ids, torch.zeros(2, 5, dtype=torch.long))["logits"], whole)


def test_additive_mask() -> None:
    assert additive_mask(torch.tensor([[True, False]])).tolist() == [[0, DROP]]
    assert additive_mask(torch.tensor([[2, 0]])).tolist() == [[0, DROP]]
    assert additive_mask(torch.tensor([[0.5, 0.0]])).tolist() == [[0, DROP]]
    finite = torch.tensor([[-3.0, 0.0, 2.0]], dtype=torch.float64)
    assert additive_mask(finite) is finite
    with pytest.raises(ValueError, match="NaN"):
        additive_mask(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(ValueError, match="pad_mask has shape"):
        classifier()(tokens(2, 5), torch.ones(2, 4))


def test_losses_of_the_head() -> None:
    ids = tokens(2, 5)
    model = classifier(3)
    logits = model(ids)["logits"]
    found = model(ids, labels=torch.tensor([2, 0]))["loss"]
    assert_equal(found, -(logits.log_softmax(-1)[0, 2] + logits.log_softmax(-1)[1, 0]) / 2)
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    probabilities = logits.sigmoid()
    expected = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean()
    assert_equal(model(ids, labels=targets)["loss"], expected)
    single = classifier(1)
    found = single(ids, labels=torch.tensor([1.0, -2.0]))["loss"]
    assert_equal(found, (single(ids)["logits"].flatten() - torch.tensor([1.0, -2.0]).double()).square().mean())
