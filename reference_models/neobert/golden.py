# SPDX-License-Identifier: Apache-2.0
"""What golden files of NeoBERT store, reproduced; and how closely it has to agree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.errors import DescriptionError

if TYPE_CHECKING:
    import torch

    from harness.golden import Golden
    from reference_models.neobert.original import NeoBERTConfig

    Tensors = Mapping[str, torch.Tensor]

NOCAST = "_nocast"
BLOCKS = "model.transformer_encoder"
FINAL_NORM = "model.layer_norm"


def golden(golden: Golden) -> Mapping[str, torch.Tensor]:
    """Everything that a golden file of NeoBERT stores, in float64 with upstream's rounding to float32 and without.

    Tokens and labels go by upstream's names, `src` and `labels`, or by `idx` and `targets` as `record` draws them. An
    original of someone else's rounds, or does not, by `Tensor.float()`.

    Raises DescriptionError when the config is not one of the original's.
    """
    from harness.golden import reproduce

    blocks = {str(layer): f"{BLOCKS}.{layer}" for layer in range(_config(golden).num_hidden_layers)}
    places = {f"block.{layer}": path for layer, path in blocks.items()} | {"final_norm": FINAL_NORM}
    with_hf = any("/hf." in name for name in golden.stored)
    if with_hf:  # upstream's Hugging Face class lists what its layers return, the last before the final norm
        places |= {f"hf.hidden_states.{layer}": path for layer, path in blocks.items()}
        places["hf.last_hidden_state"] = FINAL_NORM
    nocast = frozenset(section for section in golden.sections if section.endswith(NOCAST))
    produced: dict[str, torch.Tensor] = {}
    for sections, float32_inside in ((nocast, False), (golden.sections - nocast, True)):
        run = functools.partial(_run, float32_inside=float32_inside, with_hf=with_hf)
        produced |= reproduce(dataclasses.replace(golden, sections=sections), places=places, run=run)
    return produced


def bounds(golden: Golden) -> Mapping[str, float]:
    """Relative bounds by tensor-name pattern: rounding in float64, unless upstream goes through float32 on the way.

    What goes through it differs between processors by 1e-6, gradients by 5e-6, and so does upstream's Hugging Face
    class, which rounds in other places.
    """
    exact = {"*_f64_nocast/*": 1e-12, "*_f32/*": 1e-5}
    config = _config(golden)
    if config.rms_norm or config.rope:
        return exact | {
            "outputs_f64/embedding": 1e-12,
            "outputs_f64/*": 5e-6,
            "grads_f64/*": 2e-5,
            "adamw*_f64/*": 2e-5,
        }
    return exact | {"*_f64/*": 1e-12}


def _config(golden: Golden) -> NeoBERTConfig:
    from reference_models.neobert.original import NeoBERTConfig

    try:
        return NeoBERTConfig(**golden.fields)
    except (TypeError, ValueError) as error:
        raise DescriptionError(f"its config is not that of {golden.family}: {error}") from None


def _run(module: torch.nn.Module, inputs: Tensors, *, float32_inside: bool, with_hf: bool) -> dict[str, torch.Tensor]:
    """One call of the training model: its outputs, the input of its first layer and the loss of the trainer."""
    from reference_models.neobert.original import masked_lm_loss, masked_lm_loss_sum

    part: Any
    for part in module.modules():
        if hasattr(part, "float32_inside"):
            part.float32_inside = float32_inside
    embedding: list[torch.Tensor] = []
    first = module.get_submodule(f"{BLOCKS}.0")
    before = first.register_forward_pre_hook(lambda _, given: embedding.append(given[0].clone()))
    try:
        outputs = dict(module(inputs["src"] if "src" in inputs else inputs["idx"], inputs.get("pad_mask")))
    finally:
        before.remove()
    outputs["embedding"] = embedding[0]
    if with_hf:
        outputs["hf.logits"] = outputs["logits"]
    labels = inputs.get("labels", inputs.get("targets"))
    if labels is not None:
        outputs["loss_sum"] = masked_lm_loss_sum(outputs["logits"], labels)
        outputs["loss"] = masked_lm_loss(outputs["logits"], labels)
    return outputs
