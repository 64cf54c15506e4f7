# SPDX-License-Identifier: Apache-2.0
"""What the harness needs to know about nanoMoE and its ancestor: configurations, conventions, experts, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.families import Auxiliary, Family, Fields, LossConvention, RoutedLayer, Routing, Tap
from reference_models.nanogpt.family import build_original, generate_original, parameter_groups
from reference_models.nanomoe import closed_forms, native_files
from reference_models.nanomoe.golden import bounds, golden

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import DrawFn, SearchStrategy

CAPACITIES = (8.0, 0.5, 0.8, 1.0, 1.25, 2.0, 3.0)
"""Of the factors by which room is more or less than an even share: the plainest has room for all."""

CROWDED = 0.7

WITHOUT_LOSSES = {
    "use_aux_loss": False,
    "use_router_z_loss": False,
    "use_noisy_top_k": False,
}
WITHOUT_ORTHOGONALITY = {
    "use_router_ortho_loss": False,
    "use_experts_ortho_loss": False,
    "use_gate_output_loss": False,
}


def configurations() -> SearchStrategy[dict[str, Any]]:
    """nanoMoE configurations of at most three layers and six experts; the plainest is dense, with one of everything.

    Corners: one expert of several chosen, all chosen, experts that do not divide the tokens, room for all and for few,
    experts in every layer, in every second or third one, or from a later layer on.
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_fields(draw: DrawFn) -> dict[str, Any]:
        return {
            **_common_fields(draw),
            "use_router_ortho_loss": draw(st.booleans()),
            "use_experts_ortho_loss": draw(st.booleans()),
            "use_gate_output_loss": draw(st.booleans()),
            "router_ortho_loss_weight": draw(st.sampled_from((0.01, 0.003))),
            "router_ortho_neg_corr_weight": draw(st.sampled_from((1, 0.5))),
            "experts_ortho_loss_weight": draw(st.sampled_from((0.01, 0.2))),
            "gate_output_loss_weight": draw(st.sampled_from((0.01, 0.05))),
            "moe_start_layer": draw(st.sampled_from((0, 0, 1, 2))),
            "use_qwen3_moe_mlp": draw(st.booleans()),
        }

    return draw_fields()


def ancestor_configurations() -> SearchStrategy[dict[str, Any]]:
    """The ancestor's configurations, which have no orthogonality losses, no gates, and dropout."""
    from hypothesis import strategies as st

    @st.composite
    def draw_fields(draw: DrawFn) -> dict[str, Any]:
        return {**_common_fields(draw), "dropout": 0.0}

    return draw_fields()


def _common_fields(draw: DrawFn) -> dict[str, Any]:
    from hypothesis import strategies as st

    n_head, n_exp = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    # A norm over few channels leaves hardly anything to compare, and no expert may be a mixture of the others.
    head_size = draw(st.integers(-(-8 // n_head), 9))
    return {
        "block_size": draw(st.integers(4, 16)),
        "vocab_size": draw(st.integers(11, 61)),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_head,
        "n_embd": n_head * head_size,
        "bias": draw(st.booleans()),
        "n_exp": n_exp,
        "top_k": draw(st.integers(1, n_exp)),
        "use_aux_loss": draw(st.booleans()),
        "use_router_z_loss": draw(st.booleans()),
        "use_noisy_top_k": False,
        "aux_loss_weight": draw(st.sampled_from((0.01, 0.05))),
        "router_z_loss_weight": draw(st.sampled_from((0.001, 0.02))),
        "train_capacity": draw(st.sampled_from(CAPACITIES)),
        "eval_capacity": draw(st.sampled_from(CAPACITIES)),
        "min_capacity": draw(st.integers(1, 4)),
        "stride": draw(st.sampled_from((1, 1, 2, 3))),
        "use_switch_tfm_init": draw(st.booleans()),
        "switch_tfm_init_scale": draw(st.sampled_from((1.0, 0.1))),
        "router_use_full_prec": draw(st.booleans()),
    }


def run_original(
    module: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Logits at all positions (the originals give them only when they have targets), and the loss with targets."""
    import torch

    logits, loss, *_ = module(tokens, tokens if targets is None else targets)
    return {"logits": logits} if targets is None else {"logits": logits, "loss": torch.as_tensor(loss)}


def call_by_upstream_names(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
    """The call of scripts that ask for a tuple."""
    return model(idx=tokens, targets=targets, return_dict=False)


def call_by_position(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> Any:
    """The call of train.py and bench.py, as they call the original."""
    return model(tokens, targets)


def routed(fields: Fields) -> list[int]:
    """Layers with experts: from `moe_start_layer` on the last one of every `stride`."""
    every = range(fields["moe_start_layer"], fields["n_layer"])
    return [layer for layer in every if fields["n_exp"] > 1 and (layer + 1) % fields["stride"] == 0]


def ancestor_routed(fields: Fields) -> list[int]:
    """Layers with experts: the first one of every `stride`."""
    return [layer for layer in range(fields["n_layer"]) if fields["n_exp"] > 1 and layer % fields["stride"] == 0]


def _same(name: str, path: str) -> Tap:
    return Tap(name=name, original=path, port=path)


def _taps(fields: Fields, with_experts: Sequence[int]) -> Sequence[Tap]:
    """Where both models can be compared, in the order data passes."""
    places = [_same("embedding", "transformer.drop")]
    for layer in range(fields["n_layer"]):
        block = f"transformer.h.{layer}"
        places += [_same(f"block.{layer}.{name}", f"{block}.{name}") for name in ("ln_1", "attn", "ln_2")]
        if layer in with_experts:
            places.append(_same(f"block.{layer}.mlp.router.logits", f"{block}.mlp.router.w_g"))
        places += [_same(f"block.{layer}.mlp", f"{block}.mlp"), _same(f"block.{layer}", block)]
    return [*places, _same("final_norm", "transformer.ln_f"), _same("head", "lm_head")]


def _layers(with_experts: Sequence[int]) -> Sequence[RoutedLayer]:
    return [
        RoutedLayer(
            layer=_same(f"block.{layer}.mlp", f"transformer.h.{layer}.mlp"),
            logits=_same(f"block.{layer}.mlp.router.logits", f"transformer.h.{layer}.mlp.router.w_g"),
            router=_same(f"block.{layer}.mlp.router", f"transformer.h.{layer}.mlp.router"),
        )
        for layer in with_experts
    ]


def exposed(output: Any) -> Mapping[str, torch.Tensor] | None:
    """Indices, ranks and kept slots, all (tokens, k), from what a router of this family's form returned."""
    names = ("indices", "ranks", "keep")
    return {name: getattr(output, name) for name in names} if all(hasattr(output, name) for name in names) else None


def crowded(fields: Fields) -> Fields:
    """The same with less room than an even share."""
    return {**fields, "train_capacity": CROWDED / 2, "eval_capacity": CROWDED, "min_capacity": 1}


def independent(fields: Fields) -> Fields:
    """The same with room for every token at every expert, and no losses over the batch."""
    off = {name: False for name in (*WITHOUT_LOSSES, *WITHOUT_ORTHOGONALITY) if name in fields}
    room = float(-(-fields["n_exp"] // fields["top_k"]))
    return {**fields, **off, "train_capacity": room, "eval_capacity": room}


def continuous(fields: Fields) -> Fields:
    """The same with every expert chosen for every token."""
    return independent({**fields, "top_k": fields["n_exp"]})


def squared_relu(hidden: torch.Tensor) -> torch.Tensor:
    """The activation of nanoMoE's plain experts."""
    return hidden.relu().square()


def gelu(hidden: torch.Tensor) -> torch.Tensor:
    """The activation of the ancestor's experts."""
    import torch

    return torch.nn.functional.gelu(hidden)


SHARED_TERMS = (
    Auxiliary(name="the load balance loss", on={"use_aux_loss": True}, closed_form=closed_forms.load_balance),
    Auxiliary(name="the router z-loss", on={"use_router_z_loss": True}, closed_form=closed_forms.router_z),
)

SHARED: dict[str, Any] = {
    "build_original": build_original,
    "run_original": run_original,
    "generate_original": generate_original,
    "parameter_groups": parameter_groups,
    "independent": independent,
    "continuous": continuous,
    "fields": {
        "block_size": ("n_positions", "max_position_embeddings", "sequence_len", "n_ctx"),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
        "n_embd": ("hidden_size",),
        "n_exp": ("num_experts", "num_local_experts"),
        "top_k": ("moe_top_k", "num_experts_per_tok"),
    },
    "own_names": ("top_k",),
    "tied": (("transformer.wte.weight", "lm_head.weight"),),
    "maximum_length": "block_size",
    "loss": LossConvention(labels="preshifted", ignore_index=-1),
    # Logits with standard deviation near 2 and peaked attention; experts' matrices are stored (in, out).
    "gains": {
        r"(wte|wpe|lm_head)\.weight$": 2.0,
        r"c_attn\.weight$": 1.7,
        r"w_g\.weight$": 1.5,
        r"experts\.(c_fc|gate_proj)$": 2.0,
        r"experts\.c_proj$": 0.5,
    },
    "write_checkpoint": native_files.write_checkpoint,
    "read_checkpoint": native_files.read_checkpoint,
    "checkpoint_dialects": native_files.checkpoint_dialects,
    "resume": native_files.resume,
    "training_state": native_files.TRAINING_STATE,
    "read_training_state": native_files.read_training_state,
    "golden": golden,
    "golden_bounds": bounds,
    "tuple_order": ("logits", "loss", "losses"),
    "legacy_calls": {
        "model(idx=..., targets=..., return_dict=False)": call_by_upstream_names,
        "model(X, Y)": call_by_position,
    },
}

FEATURES = frozenset(
    {
        "attentions",
        "causal",
        "checkpoint",
        "generation",
        "initialisation",
        "learned_positions",
        "legacy_calls",
        "logits",
        "loss",
        "masks",
        "parameter_groups",
        "routing",
        "taps",
        "tied_embeddings",
    }
)

COMMON_DEFAULTS: Fields = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "bias": True,
    "n_exp": 1,
    "top_k": 2,
    "use_aux_loss": False,
    "use_router_z_loss": False,
    "use_noisy_top_k": False,
    "aux_loss_weight": 0.01,
    "router_z_loss_weight": 0.001,
    "train_capacity": 1.25,
    "eval_capacity": 2.0,
    "min_capacity": 4,
    "use_switch_tfm_init": False,
    "switch_tfm_init_scale": 1.0,
    "router_use_full_prec": False,
}

REFUSED: Sequence[Fields] = (
    {"n_embd": 8, "n_head": 3},
    {"n_embd": 4, "n_head": 8},
    {"n_exp": 4, "top_k": 5, "stride": 1, "moe_start_layer": 0},
    {"n_exp": 4, "top_k": 0, "stride": 1, "moe_start_layer": 0},
    {"n_exp": 4, "top_k": 2, "stride": 0},
)

LARGE: Sequence[Fields] = (
    # Two digits in the numbers of layers, one of them with experts, and of experts, heads wider than 64, more than 256
    # positions and tokens.
    {
        "n_layer": 12,
        "n_head": 1,
        "n_embd": 72,
        "n_exp": 12,
        "top_k": 3,
        "stride": 11,
        "moe_start_layer": 0,
        "block_size": 300,
        "vocab_size": 300,
        "bias": False,
        "train_capacity": 4.0,
        "eval_capacity": 4.0,
    },
    # More positions than float16 has whole numbers in a row.
    {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "n_exp": 2,
        "top_k": 1,
        "stride": 1,
        "moe_start_layer": 0,
        "block_size": 2100,
        "bias": True,
        "train_capacity": 2.0,
        "eval_capacity": 2.0,
    },
    # GPT-2's vocabulary, more heads than any drawn, and a short window to move.
    {"n_layer": 1, "n_head": 16, "n_embd": 16, "n_exp": 1, "top_k": 1, "block_size": 16, "vocab_size": 50257},
)


def _without(overrides: Sequence[Fields], *names: str) -> Sequence[Fields]:
    return [{name: value for name, value in fields.items() if name not in names} for fields in overrides]


FAMILY = Family(
    name="nanomoe",
    features=FEATURES,
    configurations=configurations,
    original="reference_models.nanomoe.original:GPT",
    defaults={
        **COMMON_DEFAULTS,
        "use_router_ortho_loss": False,
        "use_experts_ortho_loss": True,
        "use_gate_output_loss": True,
        "router_ortho_loss_weight": 0.01,
        "router_ortho_neg_corr_weight": 1,
        "experts_ortho_loss_weight": 0.01,
        "gate_output_loss_weight": 0.01,
        "stride": 1,
        "moe_start_layer": 0,
        "use_qwen3_moe_mlp": False,
    },
    refused=REFUSED,
    large=LARGE,
    taps=lambda fields: _taps(fields, routed(fields)),
    routing=Routing(
        layers=lambda fields: _layers(routed(fields)),
        decide=closed_forms.decide,
        expert_outputs=lambda module, inputs: closed_forms.expert_outputs(module, inputs, squared_relu),
        exposed=exposed,
        crowded=crowded,
        capacity=closed_forms.capacity,
        quiet={**WITHOUT_LOSSES, **WITHOUT_ORTHOGONALITY},
        noise={"use_noisy_top_k": True},
        auxiliary=(
            *SHARED_TERMS,
            Auxiliary(
                name="the router's orthogonality loss",
                on={"use_router_ortho_loss": True},
                closed_form=closed_forms.router_orthogonality,
            ),
            Auxiliary(
                name="the experts' orthogonality loss",
                on={"use_experts_ortho_loss": True},
                closed_form=closed_forms.experts_orthogonality,
            ),
            Auxiliary(
                name="the gate output loss", on={"use_gate_output_loss": True}, closed_form=closed_forms.gate_output
            ),
        ),
    ),
    checkpoint_name="nanomoe-0.pt",
    mutants="reference_models.nanomoe.mutants:MUTANTS",
    **SHARED,
)

ANCESTOR = Family(
    name="nanomoe_ancestor",
    features=FEATURES | {"dropout"},
    configurations=ancestor_configurations,
    original="reference_models.nanomoe.ancestor:GPT",
    port_fields={"architecture": "ancestor"},
    defaults={**COMMON_DEFAULTS, "dropout": 0.0, "stride": 2},
    refused=_without(REFUSED, "moe_start_layer"),
    large=_without(LARGE, "moe_start_layer"),
    dropout="dropout",
    taps=lambda fields: _taps(fields, ancestor_routed(fields)),
    routing=Routing(
        layers=lambda fields: _layers(ancestor_routed(fields)),
        decide=closed_forms.decide,
        expert_outputs=lambda module, inputs: closed_forms.expert_outputs(module, inputs, gelu),
        exposed=exposed,
        crowded=crowded,
        capacity=closed_forms.capacity,
        quiet=WITHOUT_LOSSES,
        noise={"use_noisy_top_k": True},
        auxiliary=SHARED_TERMS,
        auxiliary_in_evaluation=True,
    ),
    checkpoint_name="ckpt.pt",
    mutants="reference_models.nanomoe.ancestor_mutants:MUTANTS",
    **SHARED,
)
