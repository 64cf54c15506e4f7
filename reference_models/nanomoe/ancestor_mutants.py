# SPDX-License-Identifier: Apache-2.0
"""Planted bugs of what only the ancestor's architecture has in the nanoMoE port."""

from __future__ import annotations

import functools

from harness.mutants import planted

ROOM = "reference_models/nanomoe/"

_model = functools.partial(planted, ROOM + "modeling_nanomoe_gpt.py")
_config = functools.partial(planted, ROOM + "configuration_nanomoe_gpt.py")

MUTANTS = (
    _config(
        "ancestor-places-of-nanomoe",
        "the last layer of every stride has the experts instead of the first one",
        "weights.* forward.* routing.*",
        "            return bool(layer % self.stride == 0)\n",
        "            return bool((layer + 1) % self.stride == 0)\n",
    ),
    _config(
        "ancestor-default-stride",
        "experts are in every layer where nothing is said, as in nanoMoE",
        "config.defaults",
        '2 if architecture == "ancestor" else 1',
        "1",
    ),
    _model(
        "ancestor-losses-in-training-alone",
        "auxiliary losses and noise are switched off in evaluation, as in nanoMoE",
        "loss.value loss.from_logits routing.auxiliary routing.noise",
        '        return self.training or self.config.architecture == "ancestor"\n',
        "        return self.training\n",
    ),
    _model(
        "ancestor-noise-in-training-alone",
        "noise is switched off in evaluation, as in nanoMoE",
        "routing.noise",
        "        if self.config.use_noisy_top_k and self.is_active:\n",
        "        if self.config.use_noisy_top_k and self.training:\n",
    ),
    _model(
        "ancestor-tanh-gelu",
        "the activation is GELU's tanh approximation",
        "forward.logits routing.choices",
        "nn.GELU(approximate=config.gelu_approximate)",
        'nn.GELU(approximate="tanh")',
    ),
    _model(
        "ancestor-qk-norm",
        "queries and keys are normalised, as in nanoMoE",
        "forward.logits",
        '        if self.config.architecture == "nanomoe":\n            query, key',
        "        if self.config.n_head:\n            query, key",
    ),
    _model(
        "ancestor-norm-without-offset",
        "LayerNorm never has an offset",
        "weights.coverage",
        "eps=LAYER_NORM_EPSILON, bias=config.bias)",
        "eps=LAYER_NORM_EPSILON, bias=False)",
    ),
    _model(
        "ancestor-norm-epsilon",
        "LayerNorm has RMSNorm's epsilon",
        "forward.logits forward.small_scale",
        "LAYER_NORM_EPSILON = 1e-5",
        "LAYER_NORM_EPSILON = 1e-6",
    ),
    _model(
        "ancestor-experts-without-dropout",
        "nothing is dropped behind experts, only behind dense layers",
        "training.dropout",
        "        if self.dropout.p == 0 or not self.training:\n",
        "        if True:\n",
    ),
    _model(
        "ancestor-dropout-in-evaluation",
        "outputs of experts are dropped in evaluation too",
        "forward.deterministic",
        "        if self.dropout.p == 0 or not self.training:\n            return output\n",
        "        if not self.training:\n            return F.dropout(output, self.dropout.p)\n",
    ),
)
