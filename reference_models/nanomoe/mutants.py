# SPDX-License-Identifier: Apache-2.0
"""Planted bugs for the nanoMoE port, and harmless rewrites of it, as exact edits of its source.

Those named `a-...` are what the existing port of nanoMoE did (askerlee/nanoMoE at 07e6c16). `killers` names the checks
that are expected to notice; the harmless rewrites at the end have none.
"""

from __future__ import annotations

import functools

from harness.mutants import planted

ROOM = "reference_models/nanomoe/"

_model = functools.partial(planted, ROOM + "modeling_nanomoe_gpt.py")
_config = functools.partial(planted, ROOM + "configuration_nanomoe_gpt.py")

CHOICES = (
    _model(
        "softmax-over-all",
        "weights are a softmax over all experts, of which the chosen ones are taken",
        "routing.choices",
        "            weights = F.softmax(best, dim=-1)\n",
        "            weights = F.softmax(logits, dim=-1).gather(1, indices)\n",
    ),
    _model(
        "sigmoid-weights",
        "weights are sigmoids of the chosen logits",
        "routing.choices",
        "            weights = F.softmax(best, dim=-1)\n",
        "            weights = best.sigmoid()\n",
    ),
    _model(
        "weights-renormalised-after-drops",
        "what a dropped choice would have weighed is shared out among the others",
        "routing.choices",
        "        slots, gate_output = compute(tokens, routing)\n",
        "        slots, gate_output = compute(tokens, routing)\n"
        "        kept = routing.weights * routing.keep\n"
        "        routing = routing._replace(weights=kept / kept.sum(-1, keepdim=True).clamp(min=1e-9))\n",
    ),
    _model(
        "weights-of-inputs",
        "inputs are weighed instead of outputs, which is the same for linear experts alone",
        "routing.choices",
        "        rows = tokens[order % len(tokens)]\n",
        "        rows = tokens[order % len(tokens)] * routing.weights.T.flatten()[order].unsqueeze(-1)\n",
    ),
    _model(
        "worst-experts",
        "the experts with the smallest logits are chosen",
        "routing.choices",
        "logits.topk(self.config.moe_top_k, dim=-1)",
        "logits.topk(self.config.moe_top_k, dim=-1, largest=False)",
    ),
    _model(
        "one-expert-too-few",
        "the last choice is never made where there are more than two",
        "routing.choices",
        "        order = experts.argsort(stable=True)\n        if isinstance",
        "        order = experts.argsort(stable=True)\n"
        "        order = order[order < 2 * len(tokens)]\n        if isinstance",
    ),
    _model(
        "choices-exposed-in-other-order",
        "the router says its choices worst first, and acts on them best first",
        "routing.choices",
        "return Routing(logits, indices, weights, ranks, ranks < capacity, capacity)",
        "return Routing(logits, indices.flip(1), weights.flip(1), ranks.flip(1), ranks.flip(1) < capacity, capacity)",
    ),
)

QUEUES = (
    _model(
        "queue-in-token-order",
        "a token's second choice queues before the next token's first",
        "routing.choices routing.capacity routing.variance",
        "        experts = indices.T.flatten()\n        if is_token",
        "        experts = indices.flatten()\n        if is_token",
    ),
    _model(
        "queue-unstable",
        "the last token of a batch is served first",
        "routing.choices routing.variance",
        "        places = torch.arange(len(order), device=experts.device) - (lengths.cumsum(0) - lengths)[in_order]\n",
        "        places = lengths.cumsum(0)[in_order] - 1 - torch.arange(len(order), device=experts.device)\n",
    ),
    _model(
        "capacity-off-by-one",
        "one token more than there is room for is kept",
        "routing.capacity routing.choices",
        "ranks < capacity, capacity)",
        "ranks <= capacity, capacity)",
    ),
    _model(
        "capacity-odd",
        "an odd capacity stays odd",
        "routing.capacity",
        "        return max(config.min_capacity, whole + whole % 2)\n",
        "        return max(config.min_capacity, whole)\n",
    ),
    _model(
        "capacity-rounded-up",
        "a capacity that is no whole number is rounded up",
        "routing.capacity",
        "        whole = math.floor(config.moe_top_k * factor * count / config.n_exp)\n",
        "        whole = math.ceil(config.moe_top_k * factor * count / config.n_exp)\n",
    ),
    _model(
        "capacity-without-k",
        "the capacity does not grow with the number of choices",
        "routing.capacity",
        "        whole = math.floor(config.moe_top_k * factor * count / config.n_exp)\n",
        "        whole = math.floor(factor * count / config.n_exp)\n",
    ),
    _model(
        "capacity-bounded",
        "no expert takes more than 64 tokens",
        "routing.capacity",
        "        return max(config.min_capacity, whole + whole % 2)\n",
        "        return min(max(config.min_capacity, whole + whole % 2), max(64, config.min_capacity))\n",
    ),
    _model(
        "capacity-of-evaluation-in-training",
        "training has the capacity of evaluation",
        "routing.capacity routing.choices",
        "config.train_capacity if self.training else config.eval_capacity",
        "config.eval_capacity",
    ),
    _model(
        "capacity-bounded-in-evaluation",
        "evaluation has room for 64 tokens at most, training has not",
        "routing.capacity",
        "        return max(config.min_capacity, whole + whole % 2)\n",
        "        room = max(config.min_capacity, whole + whole % 2)\n"
        "        return room if self.training else min(room, max(64, config.min_capacity))\n",
    ),
    _model(
        "capacity-least-forgotten",
        "there is no least capacity",
        "routing.capacity routing.choices",
        "        return max(config.min_capacity, whole + whole % 2)\n",
        "        return whole + whole % 2\n",
    ),
    _model(
        "pads-take-room",
        "padding is counted in what the capacity is computed from",
        "routing.padding",
        "self._capacity(len(tokens) if is_token is None else is_token.sum())",
        "self._capacity(len(tokens))",
    ),
    _model(
        "pads-queue",
        "padding queues with the tokens",
        "routing.padding",
        "            experts = experts.masked_fill(~is_token.repeat(indices.shape[1]), self.config.n_exp)\n",
        "            experts = experts + 0\n",
    ),
    _model(
        "capacity-of-the-first-call",
        "the capacity of the first call in evaluation is kept for all later ones",
        "routing.variance routing.generation",
        "        capacity = self._capacity(len(tokens) if is_token is None else is_token.sum())\n",
        "        capacity = self._capacity(len(tokens) if is_token is None else is_token.sum())\n"
        "        if not self.training:\n"
        "            self.first = getattr(self, 'first', capacity)\n"
        "            capacity = self.first\n",
    ),
)

PLACES = (
    _config(
        "stride-phase-of-the-ancestor",
        "the first layer of every stride has the experts instead of the last one",
        "weights.* forward.* routing.*",
        "        return bool(layer >= self.moe_start_layer and (layer + 1) % self.stride == 0)\n",
        "        return bool(layer >= self.moe_start_layer and layer % self.stride == 0)\n",
    ),
    _config(
        "start-layer-counted-from-one",
        "experts start a layer later than they should",
        "weights.* forward.* routing.*",
        "layer >= self.moe_start_layer and",
        "layer > self.moe_start_layer - (self.moe_start_layer == 0) and",
    ),
    _model(
        "router-before-the-norm",
        "the router reads the residual stream, not what the norm makes of it",
        "routing.logits",
        "        output, *others = self.mlp(self.ln_2(hidden_states), is_token)\n",
        "        router = self.mlp.router.w_g.register_forward_hook(lambda module, given, value: torch.nn.functional.linear("
        "hidden_states.flatten(0, 1), module.weight))\n"
        "        output, *others = self.mlp(self.ln_2(hidden_states), is_token)\n"
        "        router.remove()\n",
    ),
    _model(
        "router-in-half-precision",
        "router logits are rounded to bfloat16 at every dtype",
        "routing.logits routing.precision",
        "        logits: Tensor = self.w_g(tokens)\n",
        "        logits: Tensor = self.w_g(tokens).to(torch.bfloat16).to(tokens.dtype)\n",
    ),
    _model(
        "weights-in-half-precision",
        "in float32 the experts' weights are rounded to bfloat16",
        "routing.precision",
        "            weights = F.softmax(best, dim=-1)\n",
        "            weights = F.softmax(best, dim=-1)\n"
        "            if weights.dtype == torch.float32:\n"
        "                weights = weights.bfloat16().float()\n",
    ),
)

EXPERTS = (
    _model(
        "expert-activation-relu",
        "plain experts have ReLU, not its square",
        "forward.logits routing.choices",
        "        return F.relu(hidden_states).square()\n",
        "        return F.relu(hidden_states)\n",
    ),
    _model(
        "gate-and-value-swapped",
        "SiLU is applied to the values instead of the gate",
        "forward.logits routing.choices",
        "        gate = F.silu(linear(rows, self.gate_proj, None))\n"
        "        return linear(gate * linear(rows, self.c_fc, None), self.c_proj, None)\n",
        "        gate = linear(rows, self.gate_proj, None)\n"
        "        return linear(gate * F.silu(linear(rows, self.c_fc, None)), self.c_proj, None)\n",
    ),
    _model(
        "expert-bias-of-the-first",
        "every expert has the first one's offset",
        "forward.logits routing.choices",
        "bias.squeeze(1)[self.experts]",
        "bias.squeeze(1)[self.experts * 0]",
        2,
    ),
    _model(
        "dense-layers-gated",
        "dense layers of a model with gated experts have SiLU too",
        "forward.logits",
        "        self.act = activation(config)\n        self.c_proj = nn.Linear(4",
        "        self.act = nn.SiLU() if config.use_qwen3_moe_mlp else activation(config)\n"
        "        self.c_proj = nn.Linear(4",
    ),
    _model(
        "qk-norm-epsilon",
        "queries and keys are normalised with RMSNorm's epsilon of the stream",
        "forward.logits",
        "eps=torch.finfo(accumulation_dtype(heads.dtype)).eps",
        "eps=RMS_NORM_EPSILON",
    ),
    _model(
        "qk-norm-over-the-width",
        "queries and keys are normalised over all heads together",
        "forward.logits",
        "            query, key = self._norm(query), self._norm(key)\n",
        "            query, key = (F.rms_norm(x.transpose(1, 2).flatten(2), (self.config.n_embd,),\n"
        "                eps=torch.finfo(x.dtype).eps).view(*input_shape, -1, self.head_dim).transpose(1, 2)\n"
        "                for x in (query, key))\n",
    ),
    _model(
        "qk-norm-of-queries-alone",
        "keys are not normalised",
        "forward.logits",
        "query, key = self._norm(query), self._norm(key)",
        "query = self._norm(query)",
    ),
    _model(
        "norm-epsilon",
        "RMSNorm has LayerNorm's epsilon",
        "forward.logits forward.small_scale",
        "RMS_NORM_EPSILON = 1e-6",
        "RMS_NORM_EPSILON = 1e-5",
    ),
)

LOSSES = (
    _model(
        "balance-of-kept-slots",
        "the load balance loss counts what found room only",
        "routing.auxiliary",
        "    slots = weights.new_zeros(len(weights), experts).scatter(1, routing.indices, 1.0)\n",
        "    slots = weights.new_zeros(len(weights), experts).scatter(1, routing.indices, routing.keep.to(weights.dtype))\n",
    ),
    _model(
        "balance-divided-by-k",
        "the load balance loss is 1 when balanced, not k",
        "routing.auxiliary",
        "    return experts * (_mean(weight, is_token)",
        "    return experts / routing.indices.shape[1] * (_mean(weight, is_token)",
    ),
    _model(
        "balance-of-all-probabilities",
        "the load balance loss takes the softmax over all experts",
        "routing.auxiliary",
        "    weight = weights.new_zeros(len(weights), experts).scatter(1, routing.indices, weights)\n",
        "    weight = F.softmax(routing.logits.to(weights.dtype), dim=-1)\n",
    ),
    _model(
        "balance-without-experts",
        "the load balance loss does not grow with the number of experts",
        "routing.auxiliary",
        "    return experts * (_mean(weight, is_token)",
        "    return 1 * (_mean(weight, is_token)",
    ),
    _model(
        "z-loss-of-chosen",
        "the z-loss sums the exponentials of the chosen experts only",
        "routing.auxiliary",
        "_mean(routing.logits.logsumexp(dim=-1).square(), is_token)",
        "_mean(routing.logits.gather(1, routing.indices).logsumexp(dim=-1).square(), is_token)",
    ),
    _model(
        "z-loss-before-the-noise",
        "the z-loss is of logits without their noise",
        "routing.noise",
        "            *self._losses(routing, is_token, gate_output),\n",
        "            *self._losses(routing._replace(logits=self.router.w_g(tokens)), is_token, gate_output),\n",
    ),
    _model(
        "z-loss-not-squared",
        "the z-loss is a mean of logarithms, not of their squares",
        "routing.auxiliary",
        ".logsumexp(dim=-1).square()",
        ".logsumexp(dim=-1)",
    ),
    _model(
        "losses-averaged-over-layers",
        "auxiliary losses are means over the layers with experts",
        "routing.auxiliary",
        "            sums = {name: manager.aggregate(name) for name in AUXILIARY_LOSSES}\n",
        "            sums = {name: manager.aggregate(name) / max(1, sum(block.has_experts for block in self.h))\n"
        "                for name in AUXILIARY_LOSSES}\n",
    ),
    _model(
        "losses-detached",
        "auxiliary losses have their value and no gradient",
        "routing.auxiliary training.gradients",
        '_weight") * part.to(loss.device)',
        '_weight") * part.detach().to(loss.device)',
    ),
    _model(
        "losses-in-evaluation",
        "auxiliary losses are part of the loss in evaluation",
        "loss.value loss.from_logits routing.auxiliary",
        '        return self.training or self.config.architecture == "ancestor"\n',
        "        return True\n",
    ),
    _model(
        "losses-never-added",
        "auxiliary losses are computed, reported and not added",
        "routing.auxiliary training.gradients",
        '                loss = loss + share * getattr(self.config, f"{name}_weight") * part.to(loss.device)\n',
        "                loss = loss + 0 * part.to(loss.device)\n",
    ),
    _config(
        "loss-weights-swapped",
        "the weights of the load balance loss and the z-loss are exchanged by default",
        "config.defaults",
        "        aux_loss_weight: float = 0.01,\n        router_z_loss_weight: float = 0.001,\n",
        "        aux_loss_weight: float = 0.001,\n        router_z_loss_weight: float = 0.01,\n",
    ),
    _model(
        "gate-gradient-whole",
        "the gradients that should be a tenth are whole",
        "routing.auxiliary",
        "        return gradients[0] * GRADIENT_SCALE\n",
        "        return gradients[0]\n",
    ),
    _model(
        "negative-products-unweighted",
        "negative products weigh as much as positive ones in the router's orthogonality",
        "routing.auxiliary",
        "torch.where(products >= 0, 1.0, negative_weight)",
        "1.0",
    ),
    _model(
        "orthogonality-of-both-triangles",
        "every pair of experts counts twice",
        "routing.auxiliary",
        ".triu(1).square().mean()",
        ".fill_diagonal_(0).square().mean()",
    ),
    _model(
        "gate-output-of-all-slots",
        "the gate output loss is a mean over all choices, those without room as zeros",
        "routing.auxiliary",
        "        return squares.sum() / squares.count_nonzero().clamp(min=1)\n",
        "        return squares.sum() / (squares.count_nonzero().clamp(min=1) + 1)\n",
    ),
    _model(
        "noise-in-evaluation",
        "noisy top-k is noisy in evaluation too",
        "routing.noise",
        "        if self.config.use_noisy_top_k and self.is_active:\n",
        "        if self.config.use_noisy_top_k:\n",
    ),
    _model(
        "noise-never",
        "noisy top-k has no noise in training",
        "routing.noise",
        "        if self.config.use_noisy_top_k and self.is_active:\n",
        "        if self.config.use_noisy_top_k and not self.is_active:\n",
    ),
    _model(
        "noise-without-softplus",
        "the noise's standard deviation may be negative, and is smaller",
        "routing.noise",
        "F.softplus(self.w_noise(tokens)) * torch.randn_like(logits)",
        "self.w_noise(tokens) * torch.randn_like(logits)",
    ),
)

EXISTING_PORT = (
    _config(
        "a-1-top-k-swallowed",
        "`top_k` of old files and scripts is taken for a generation parameter and ignored",
        "config.unknown_keys",
        '        "top_k": "moe_top_k",\n',
        "",
    ),
    _model(
        "a-2-tied-keys-in-a-list",
        "`_tied_weights_keys` has the form of the other transformers line",
        "weights.tied",
        '{"lm_head.weight": "transformer.wte.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]',
        '["lm_head.weight"] if TRANSFORMERS_5 else None',
    ),
    _model(
        "a-3-residual-scaling-lost",
        "residual projections start like every other matrix",
        "training.initialisation",
        "std=INITIAL_STD / (2 * self.config.n_layer) ** 0.5",
        "std=INITIAL_STD",
    ),
    _config(
        "a-4-tie-not-written",
        "config.json does not say that the head is tied, so that it comes back random on transformers 5",
        "weights.* roundtrip.*",
        '        return {**super().to_diff_dict(), "tie_word_embeddings": self.tie_word_embeddings}\n',
        "        return {k: v for k, v in super().to_diff_dict().items() if k != 'tie_word_embeddings'}\n\n"
        "    @classmethod\n    def from_dict(cls, values: Any, **kwargs: Any) -> Any:\n"
        "        config = super().from_dict(values, **kwargs)\n"
        "        chosen = config[0] if isinstance(config, tuple) else config\n"
        "        chosen.tie_word_embeddings = values.get('tie_word_embeddings', False)\n        return config\n",
    ),
    _config(
        "a-5-no-layers-for-the-cache",
        "the configuration knows no num_hidden_layers",
        "config.common_names",
        '        "num_hidden_layers": "n_layer",\n',
        "",
    ),
    _model(
        "a-6-mask-ignored",
        "attention_mask is accepted and ignored",
        "masks.left_padding",
        "        past = past_key_values.get_seq_length() if past_key_values is not None else 0\n",
        "        past = past_key_values.get_seq_length() if past_key_values is not None else 0\n"
        "        attention_mask = None\n",
    ),
    _config(
        "a-7-labels-preshifted",
        "`labels` are not shifted by default",
        "loss.value",
        'label_convention: str = "hf",',
        'label_convention: str = "preshifted",',
    ),
    _model(
        "a-8-library-index-not-ignored",
        "-100 is a class that does not exist",
        "loss.value loss.ignored",
        "        ignore_index=IGNORED_LABEL,\n        reduction",
        "        ignore_index=IGNORED_TARGET,\n        reduction",
    ),
    _model(
        "a-10-gates-of-plain-experts",
        "a training step with plain experts and default losses asks for a gate that they do not have",
        "routing.auxiliary",
        "        return self.router.is_active and config.use_qwen3_moe_mlp and config.use_gate_output_loss\n",
        "        return self.router.is_active and config.use_gate_output_loss\n",
    ),
    _model(
        "a-11-orthogonality-of-plain-experts",
        "the router's orthogonality loss fails with plain experts",
        "routing.auxiliary",
        "            if swiglu is not None and config.use_router_ortho_loss\n            else None,\n",
        "            if config.use_router_ortho_loss\n            else None,\n",
    ),
    _model(
        "a-12-losses-leak",
        "losses of calls without labels are kept, and added to the next labelled one of any model",
        "routing.purity",
        "        loss, losses = None, None\n        if targets is not None:\n",
        "        loss, losses = None, None\n        stale = GPT.__dict__.get('stale', {})\n"
        "        left = {name: part + stale.get(name, 0) for name, part in outputs.auxiliary_losses.items()}\n"
        "        GPT.stale = {name: part.detach() for name, part in left.items()} if targets is None else {}\n"
        "        outputs.auxiliary_losses = left\n        if targets is not None:\n",
    ),
    _model(
        "a-13-second-argument-is-a-mask",
        "model(X, Y) takes the targets for an attention mask",
        "api.legacy_calls",
        "        if len(args) > 1 and _is_token_ids(args[1]) and args[1].shape == args[0].shape:\n",
        "        if len(args) > 2 and _is_token_ids(args[1]) and args[1].shape == args[0].shape:\n",
    ),
    _model(
        "a-14-no-tuple",
        "return_dict=False gives an output object, which unpacks to the names of its fields",
        "api.legacy_calls api.tuple_order",
        "        if return_dict is False:\n",
        "        if False:\n",
    ),
    _model(
        "a-15-tuple-order-for-the-trainer",
        "a configuration with return_dict=False gives the logits first, which the Trainer takes for the loss",
        "api.configured_outputs",
        "        if return_dict is False:\n",
        "        if return_dict is False or not self.config.return_dict:\n",
    ),
    _model(
        "a-16-last-logits-only",
        "without labels only the last position has logits",
        "api.output_type forward.causal",
        "        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep\n",
        "        if targets is None and isinstance(logits_to_keep, int):\n            logits_to_keep = 1\n"
        "        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep\n",
    ),
    _model(
        "a-17-no-window",
        "generation past the block size ends in an error of its own, where the original's window moves on",
        "generation.past_maximum",
        '            "input_ids": input_ids[:, -window:],\n',
        '            "input_ids": input_ids if input_ids.shape[1] <= window else [].pop(),\n',
    ),
    _model(
        "a-19-no-auto-map",
        "config.json does not say where the code is",
        "remote_code.files",
        'GPT.register_for_auto_class("AutoModelForCausalLM")\n',
        "",
    ),
    _model(
        "a-20-absolute-imports",
        "the files import each other by their bare names",
        "remote_code.outputs",
        "    from .configuration_nanomoe_gpt import GPTConfig\n    from .manager",
        "    from .configuration_nanomoe_gpt import GPTConfig\n    if __name__.startswith('transformers_modules'):\n"
        "        import manager as _\n    from .manager",
    ),
    _model(
        "a-21-tensor-made-on-meta",
        "a scale is a tensor that is made while the model is on the meta device",
        "roundtrip.meta_device",
        "        self.gradient_checkpointing = False\n        self.post_init()\n",
        "        self.gradient_checkpointing = False\n        self.alpha = torch.tensor(1.0)\n        self.post_init()\n"
        "        self.register_forward_pre_hook(lambda module, given: float(module.alpha) and None)\n",
    ),
    _model(
        "a-22-buffer-of-another-dtype",
        "under autocast the sum of experts' outputs and their weights have two dtypes that cannot be added",
        "precision.logits",
        "return output.new_zeros(routing.keep.numel(), output.shape[1]).index_copy(0, order, output), gate_output",
        "place = order.unsqueeze(-1).expand_as(output)\n"
        "        empty = tokens.new_zeros(routing.keep.numel(), output.shape[1])\n"
        "        return empty.scatter(0, place, output), gate_output",
    ),
    _model(
        "a-23-no-gradient-checkpointing",
        "gradient checkpointing cannot be switched on",
        "training.gradient_checkpointing",
        "class Block(GradientCheckpointingLayer):\n",
        "class Block(nn.Module):\n",
    ),
    _model(
        "a-24-loss-kept-on-the-module",
        "a layer keeps its last output with its graph, and cannot be copied afterwards",
        "roundtrip.copies",
        "        output, *others = self.mlp(self.ln_2(hidden_states), is_token)\n",
        "        output, *others = self.mlp(self.ln_2(hidden_states), is_token)\n        self.last = output\n",
    ),
)

AT_THE_EDGES = (
    _config(
        "can-drop-in-training",
        "whether an expert can be full is asked of the capacity of training",
        "routing.generation",
        "self.moe_top_k * self.eval_capacity < self.n_exp",
        "self.moe_top_k * self.train_capacity < self.n_exp",
    ),
    _model(
        "noise-untrained",
        "the size of the noise gets no gradient",
        "routing.noise",
        "F.softplus(self.w_noise(tokens)) *",
        "F.softplus(self.w_noise(tokens)).detach() *",
    ),
    _model(
        "losses-over-pads",
        "auxiliary losses are means over padding too",
        "routing.padding",
        "*self._losses(routing, is_token, gate_output)",
        "*self._losses(routing, None, gate_output)",
    ),
    _model(
        "pads-take-room-in-training",
        "padding is counted in the capacity of training",
        "routing.padding",
        "self._capacity(len(tokens) if is_token is None else is_token.sum())",
        "self._capacity(len(tokens) if is_token is None or self.training else is_token.sum())",
    ),
    _model(
        "capacity-of-the-longest-row",
        "with padding the capacity is computed from as many rows as long as the longest",
        "routing.padding",
        "        routing: Routing = self.router(tokens, is_token)\n",
        "        routing: Routing = self.router(tokens, is_token)\n"
        "        if is_token is not None:\n"
        "            longest = is_token.view(hidden_states.shape[:2]).sum(1).max() * len(hidden_states)\n"
        "            room = self.router._capacity(longest)\n"
        "            routing = routing._replace(capacity=room, keep=routing.ranks < room)\n",
    ),
    _model(
        "masked-capacity-least-forgotten",
        "with padding there is no least capacity",
        "routing.padding",
        "(share + share % 2).clamp(min=config.min_capacity)",
        "(share + share % 2)",
    ),
    _model(
        "router-logits-softmaxed",
        "output_router_logits gives probabilities",
        "routing.logits",
        "router_logits=all_router_logits if",
        "router_logits=tuple(x.softmax(-1) for x in all_router_logits) if",
    ),
    _model(
        "router-logits-never",
        "output_router_logits is accepted and ignored",
        "routing.logits",
        "router_logits=all_router_logits if output_router_logits else None",
        "router_logits=None",
    ),
    _model(
        "triple-is-a-pair",
        "upstream's calls give two values where its scripts unpack three",
        "api.legacy_calls",
        "            return output.logits, output.loss, output.losses\n",
        "            return output.logits, output.loss\n",
    ),
    _model(
        "losses-whole-in-micro-batches",
        "every micro-batch adds the auxiliary losses as a whole",
        "training.micro_batches",
        "            share = count / torch.as_tensor(num_items_in_batch, device=loss.device)\n",
        "            share = 1.0\n",
    ),
    _model(
        "compiled-drops-kept",
        "compiled, a dropped slot gets what another row got",
        "backend.compiled",
        ".masked_fill(~keep.unsqueeze(-1), 0), gate_output",
        ", gate_output",
    ),
    _model(
        "compiled-experts-swapped",
        "compiled, every expert computes the rows of another",
        "backend.compiled",
        "self.dropout(self.experts(rows, padded_linear))",
        "self.dropout(self.experts(rows.flip(0), padded_linear))",
    ),
    _model(
        "expert-fan-out",
        "the Switch Transformer's start of experts takes the width of what they give",
        "training.initialisation",
        "parameter.shape[-2 if parameter.ndim == 3 else -1]",
        "parameter.shape[-1]",
    ),
    _model(
        "switch-scale-ignored",
        "switch_tfm_init_scale changes nothing",
        "training.initialisation",
        "(self.config.switch_tfm_init_scale / fan_in)",
        "(1.0 / fan_in)",
    ),
)

HARMLESS = (
    _model(
        "harmless-experts-one-by-one",
        "experts compute their tokens in a loop of another order",
        "",
        "        product = torch.cat(products) if products else rows.new_zeros(0, weight.shape[2])\n",
        "        product = torch.cat([*products[:1], *products[1:]]) if products else rows.new_zeros(0, weight.shape[2])\n",
    ),
    _model(
        "harmless-buffers-everywhere",
        "every expert gets a buffer, full or not",
        "",
        "        compute = self._in_buffers if torch.compiler.is_compiling() else self._in_groups\n",
        "        compute = self._in_buffers if torch.compiler.is_compiling() or not self.training else self._in_groups\n",
    ),
)

MUTANTS = (*CHOICES, *QUEUES, *PLACES, *EXPERTS, *LOSSES, *EXISTING_PORT, *AT_THE_EDGES, *HARMLESS)
