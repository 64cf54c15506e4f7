# SPDX-License-Identifier: Apache-2.0
"""Planted bugs of the NeoBERT port and its exporter, and harmless rewrites: what the gate must and must not notice.

Bugs of the model are looked for in a port that is given its tensors by name: the exporter compares the model with the
original before it writes, and would refuse them all before any check could look.
"""

from __future__ import annotations

import functools

from harness.mutants import Mutant, planted

ROOM = "reference_models/neobert/"
in_model = functools.partial(planted, ROOM + "model.py", load="state_dict")
in_rotary = functools.partial(planted, ROOM + "rotary.py", load="state_dict")
in_config = functools.partial(planted, ROOM + "configuration_neobert.py", load="state_dict")

in_export = functools.partial(planted, ROOM + "export.py")
in_checkpoint = functools.partial(planted, ROOM + "checkpoint.py")
in_assets = functools.partial(planted, ROOM + "tokenizer_assets.py")

BY_CHOICE = "    by_choice = torch.where(attention_mask == 0, -math.inf, nothing)\n"
EAGER_MASK = "        scores = scores + attention_mask\n"
ATTEND = "        output, weights = attention(\n"
ANGLES = "            angles = rotary_angles(position_ids, config.dim_head, dtype=inputs_embeds.dtype)\n"
POOLED = "        pooled = torch.tanh(self.dense(self.dropout(outputs.last_hidden_state[:, 0])))\n"

CLASSIFIER_CALL = """            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        pooled"""

MASKS: tuple[Mutant, ...] = (
    in_model(
        "mask_inverted",
        "the mask keeps what it should drop, as an existing port did for eleven days",
        "masks.none_is_ones masks.right_padding masks.left_padding masks.interior_padding masks.original",
        BY_CHOICE,
        BY_CHOICE.replace("== 0", "!= 0"),
    ),
    in_model(
        "mask_inverted_in_sdpa",
        "the mask is inverted for every attention but the eager one",
        "masks.original masks.right_padding backend.attention_masked",
        ATTEND,
        "        if self.config._attn_implementation != 'eager' and not output_attentions and has_keys is not None:\n"
        "            attention_mask = torch.where(attention_mask == 0, -math.inf, 0.0).to(query.dtype)\n" + ATTEND,
    ),
    in_model(
        "mask_lost_in_sdpa",
        "every attention but the eager one is given no mask",
        "masks.original masks.right_padding backend.attention_masked",
        ATTEND,
        "        if self.config._attn_implementation != 'eager':\n            attention_mask = None\n" + ATTEND,
    ),
    in_model(
        "mask_multiplies",
        "eager attention multiplies the scores by the mask instead of masking",
        "masks.original backend.attention_masked",
        EAGER_MASK,
        "        scores = scores * (attention_mask == 0)\n",
    ),
    in_model(
        "mask_lost_in_eager",
        "eager attention leaves the mask aside",
        "masks.original backend.attention_masked",
        EAGER_MASK,
        "        pass\n",
    ),
    in_model(
        "additive_as_boolean",
        "an additive mask is read as one that keeps what is not 0",
        "masks.additive",
        "    is_additive = (attention_mask < 0).any() | (attention_mask == 0).all()\n",
        "    is_additive = torch.zeros((), dtype=torch.bool, device=attention_mask.device)\n",
    ),
    in_model(
        "zeros_mask_everything",
        "an additive mask of zeros drops everything",
        "masks.additive",
        " | (attention_mask == 0).all()\n",
        "\n",
    ),
    in_model(
        "float_mask_added",
        "a mask of ones and zeros as floating numbers is added to the scores",
        "masks.right_padding masks.left_padding masks.interior_padding",
        "    return torch.where(is_additive, attention_mask.to(dtype), by_choice)\n",
        "    return attention_mask.to(dtype)\n",
    ),
    in_model(
        "mask_cut_to_length",
        "the mask is reduced to a length for each row, and holes are filled",
        "masks.original masks.interior_padding masks.left_padding",
        BY_CHOICE,
        "    length = (attention_mask != 0).sum(dim=1, keepdim=True)\n"
        "    kept = torch.arange(attention_mask.shape[1], device=attention_mask.device) < length\n"
        "    by_choice = torch.where(kept, nothing, -math.inf)\n",
    ),
    in_model(
        "mask_scaled",
        "padding is weakened instead of dropped",
        "masks.pad_content masks.original",
        BY_CHOICE,
        BY_CHOICE.replace("-math.inf", "-10.0"),
    ),
    in_model(
        "masked_row_nan",
        "a row that is masked as a whole is not a number in eager attention",
        "masks.all_masked_row",
        "            has_keys = (mask > -math.inf).any(dim=1)[:, None]\n",
        "            has_keys = torch.ones_like(mask[:, :1], dtype=torch.bool)\n",
    ),
    in_model(
        "mask_overwritten",
        "a row that is masked as a whole is written into the caller's own additive mask",
        "masks.all_masked_row",
        "            scores_mask = mask.masked_fill(~has_keys, 0.0)[:, None, None, :]\n",
        "            if attention_mask.is_floating_point():\n"
        "                attention_mask.masked_fill_(~has_keys, 0.0)\n"
        "            scores_mask = mask.masked_fill(~has_keys, 0.0)[:, None, None, :]\n",
    ),
    in_model(
        "first_mask_for_all",
        "the first row's mask is used for every row",
        "masks.original masks.right_padding",
        "            scores_mask = mask.masked_fill(~has_keys, 0.0)[:, None, None, :]\n",
        "            scores_mask = mask.masked_fill(~has_keys, 0.0)[:1, None, None, :]\n",
    ),
    in_model(
        "mask_of_base_alone",
        "the language model does not hand its mask on",
        "masks.original masks.right_padding",
        "        outputs = self.model(\n            input_ids=input_ids,\n            attention_mask=attention_mask,\n"
        "            position_ids=position_ids,\n            inputs_embeds=inputs_embeds,\n"
        "            output_attentions=output_attentions,\n            output_hidden_states=output_hidden_states,\n"
        "            return_dict=True,\n            **kwargs,\n        )\n        logits = self.decoder(",
        "        outputs = self.model(\n            input_ids=input_ids,\n            attention_mask=None,\n"
        "            position_ids=position_ids,\n            inputs_embeds=inputs_embeds,\n"
        "            output_attentions=output_attentions,\n            output_hidden_states=output_hidden_states,\n"
        "            return_dict=True,\n            **kwargs,\n        )\n        logits = self.decoder(",
    ),
)

POSITIONS: tuple[Mutant, ...] = (
    in_rotary(
        "rope_half_split",
        "channels j and j + d/2 turn together instead of neighbours",
        "forward.logits forward.blocks",
        "    even, odd = heads.to(cosine.dtype).unflatten(-1, (heads.shape[-1] // 2, 2)).unbind(-1)\n",
        "    even, odd = heads.to(cosine.dtype).chunk(2, dim=-1)\n",
    ),
    in_rotary(
        "theta_grows",
        "the base of the angles grows with texts of more than 1024 tokens",
        "forward.large",
        "    angles = position_ids[..., None].to(wide) * (1.0 / ROPE_THETA**exponents)\n",
        "    theta = ROPE_THETA * max(1.0, position_ids.shape[-1] / 1024)\n"
        "    angles = position_ids[..., None].to(wide) * (1.0 / theta**exponents)\n",
    ),
    in_rotary(
        "rope_theta",
        "another base of the angles",
        "forward.logits forward.lengths",
        "ROPE_THETA = 10000.0",
        "ROPE_THETA = 500000.0",
    ),
    in_rotary(
        "rope_backwards_key",
        "channels are turned and mirrored, so that sums of positions count instead of distances",
        "forward.logits forward.position_ids",
        "(even * cosine - odd * sine, even * sine + odd * cosine)",
        "(even * cosine - odd * sine, even * sine - odd * cosine)",
    ),
    in_rotary(
        "rope_in_half_precision",
        "angles are computed in the model's own narrow dtype",
        "precision.long_positions",
        "    wide = torch.promote_types(dtype, torch.float32)\n",
        "    wide = dtype\n",
    ),
    in_model(
        "rope_of_value",
        "the key is turned twice, the query not",
        "forward.logits",
        "query, key = rotate(query, *angles), rotate(key, *angles)",
        "key = rotate(rotate(key, *angles), *angles)",
    ),
    in_model(
        "rope_position_ids_ignored",
        "position_ids of rotary models are left aside",
        "forward.position_ids",
        "            if position_ids is None:\n                position_ids = torch.arange(",
        "            if True:\n                position_ids = torch.arange(",
    ),
    in_model(
        "rope_positions_clamped",
        "positions beyond the maximum length all turn alike",
        "forward.beyond_maximum forward.position_ids",
        ANGLES,
        ANGLES.replace("position_ids,", "position_ids.clamp(max=config.max_length - 1),"),
    ),
    in_model(
        "rope_table_cast",
        "a complex table is kept from the first call, and cast to real numbers with the model",
        "roundtrip.cast",
        ANGLES,
        "            if not hasattr(self, 'table'):\n"
        "                every = torch.arange(config.max_length + 600, device=position_ids.device)[None]\n"
        "                cosine, sine = rotary_angles(every, config.dim_head, dtype=inputs_embeds.dtype)\n"
        "                self.register_buffer('table', torch.complex(cosine, sine)[0], persistent=False)\n"
        "            table = self.table[position_ids]\n"
        "            angles = (table.real, table.imag) if table.is_complex() else (table, torch.zeros_like(table))\n",
    ),
    in_model(
        "buffer_lost_on_load",
        "a factor is kept in a buffer that no file has, and is whatever was in memory after loading",
        "roundtrip.poisoned_memory remote_code.poisoned_memory",
        "        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)\n",
        "        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)\n"
        "        self.encoder.register_buffer('factor', torch.ones(()), persistent=False)\n"
        "        self.encoder.register_forward_hook(lambda module, _, output: output * module.factor)\n",
    ),
    in_model(
        "positions_from_0",
        "learned positions count from 0",
        "forward.logits forward.blocks",
        "        positions: Tensor = content.cumsum(dim=1) * content\n",
        "        positions: Tensor = (content.cumsum(dim=1) - 1) * content\n",
    ),
    in_model(
        "positions_of_padding",
        "padding has the position that it would have as a token",
        "forward.logits masks.original",
        "        positions: Tensor = content.cumsum(dim=1) * content\n",
        "        positions: Tensor = content.cumsum(dim=1)\n",
    ),
    in_model(
        "pad_is_0",
        "token 0 is taken for padding, whatever the configuration says",
        "forward.logits masks.left_padding",
        "            content = input_ids != self.config.pad_token_id\n",
        "            content = input_ids != 0\n",
    ),
    in_model(
        "positions_from_mask",
        "learned positions are counted by the mask instead of the token ids",
        "masks.original",
        "        if input_ids is not None:\n            content = input_ids",
        "        if input_ids is not None and mask is None:\n            content = input_ids",
    ),
    in_model(
        "learned_positions_unchecked",
        "a text that is too long ends in an error of the position table",
        "forward.beyond_maximum",
        "        if readable and positions.shape[1] > longest and int(positions.max()) > longest:\n",
        "        if False:\n",
    ),
    in_model(
        "padding_position_of_embeds",
        "embeddings as inputs have positions that count from 0",
        "forward.inputs_embeds",
        "            content = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)\n",
        "            content = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)\n"
        "            return content.cumsum(dim=1) - 1\n",
    ),
)

COMPUTATION: tuple[Mutant, ...] = (
    in_model(
        "qkv_split_as_a_whole",
        "the rows of qkv are taken for all queries, all keys, all values",
        "forward.logits forward.blocks",
        "        query, key, value = heads.chunk(3, dim=-1)\n",
        "        query, key, value = (\n"
        "            part.reshape(rows, length, -1, self.head_dim) for part in heads.flatten(2).chunk(3, dim=-1)\n"
        "        )\n",
    ),
    in_model(
        "gate_and_up_swapped",
        "silu is on w2 instead of w1",
        "forward.logits forward.blocks",
        "F.silu(self.w1(hidden_states)) * self.w2(hidden_states)",
        "F.silu(self.w2(hidden_states)) * self.w1(hidden_states)",
    ),
    in_model(
        "swiglu_width",
        "two thirds of the nominal width, not rounded up to a multiple of 8",
        "forward.logits weights.values",
        "        inside = 8 * -(-(2 * config.intermediate_size // 3) // 8)\n",
        "        inside = 2 * config.intermediate_size // 3\n",
    ),
    in_model(
        "swiglu_width_rounded",
        "the width is rounded to the nearest multiple of 8",
        "forward.logits weights.values",
        "        inside = 8 * -(-(2 * config.intermediate_size // 3) // 8)\n",
        "        inside = max(8, 8 * round(2 * config.intermediate_size / 24))\n",
    ),
    in_model(
        "gelu_by_tanh",
        "the tanh approximation in place of the exact GELU",
        "forward.logits forward.blocks",
        "        nn.GELU(),\n",
        '        nn.GELU(approximate="tanh"),\n',
    ),
    in_model(
        "rms_epsilon",
        "an epsilon of RMSNorm that nobody asked for",
        "forward.small_scale forward.logits",
        "        return NeoBERTRMSNorm(config.hidden_size, config.norm_eps)\n",
        "        return NeoBERTRMSNorm(config.hidden_size, 1e-6)\n",
    ),
    in_model(
        "layer_norm_epsilon",
        "LayerNorm with its own default epsilon",
        "forward.small_scale forward.logits",
        "    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)\n",
        "    return nn.LayerNorm(config.hidden_size)\n",
    ),
    in_model(
        "epsilon_outside",
        "RMSNorm adds its epsilon to the root",
        "forward.small_scale forward.logits",
        "        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)\n",
        "        normed = wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)\n",
    ),
    in_model(
        "rms_in_half_precision",
        "RMSNorm squares in the model's own narrow dtype",
        "precision.logits precision.gradients precision.loss precision.masks",
        "        wide = hidden_states.to(accumulation_dtype(hidden_states.dtype))\n",
        "        wide = hidden_states / 64 * 64 + 256 - 256 if hidden_states.dtype != torch.float64 else hidden_states\n",
    ),
    in_model(
        "norms_swapped",
        "the two norms of a block are exchanged",
        "forward.logits forward.blocks",
        "        attended, weights = self._attend(self.attention_norm(hidden_states), **kwargs)\n"
        "        hidden_states = hidden_states + self.resid_dropout(self.wo(attended))\n"
        "        return hidden_states + self.ffn_dropout(self.ffn(self.ffn_norm(hidden_states))), weights\n",
        "        attended, weights = self._attend(self.ffn_norm(hidden_states), **kwargs)\n"
        "        hidden_states = hidden_states + self.resid_dropout(self.wo(attended))\n"
        "        return hidden_states + self.ffn_dropout(self.ffn(self.attention_norm(hidden_states))), weights\n",
    ),
    in_model(
        "post_norm",
        "the feed-forward branch is normed behind its sum",
        "forward.logits forward.blocks",
        "        return hidden_states + self.ffn_dropout(self.ffn(self.ffn_norm(hidden_states))), weights\n",
        "        return self.ffn_norm(hidden_states + self.ffn_dropout(self.ffn(hidden_states))), weights\n",
    ),
    in_model(
        "parallel_branches",
        "attention and feed-forward network both see the block's input",
        "forward.logits forward.blocks",
        "        hidden_states = hidden_states + self.resid_dropout(self.wo(attended))\n"
        "        return hidden_states + self.ffn_dropout(self.ffn(self.ffn_norm(hidden_states))), weights\n",
        "        hidden_states, before = hidden_states + self.resid_dropout(self.wo(attended)), hidden_states\n"
        "        return hidden_states + self.ffn_dropout(self.ffn(self.ffn_norm(before))), weights\n",
    ),
    in_model(
        "final_norm_missing",
        "the last norm is left out",
        "forward.logits forward.blocks",
        "        hidden_states = self.layer_norm(hidden_states)\n",
        "        hidden_states = hidden_states + 0 * self.layer_norm(hidden_states)\n",
    ),
    in_model(
        "scale_of_width",
        "scores are scaled by the width of the model instead of a head's",
        "forward.logits forward.blocks",
        "        self.scaling = self.head_dim**-0.5\n",
        "        self.scaling = config.hidden_size**-0.5\n",
    ),
    in_model(
        "scale_in_eager",
        "eager attention does not scale its scores",
        "backend.attention masks.original",
        "    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling\n",
        "    scores = torch.matmul(query, key.transpose(-1, -2))\n",
    ),
    in_model(
        "is_causal",
        "attention without a mask sees no later token",
        "forward.logits masks.none_is_ones",
        "        self.is_causal = False\n",
        "        self.is_causal = True\n",
    ),
    in_model(
        "decoder_without_bias",
        "the decoder has no offset",
        "forward.logits weights.coverage weights.values",
        "        self.decoder: nn.Module = nn.Linear(config.hidden_size, config.vocab_size)\n",
        "        self.decoder: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n",
    ),
    in_model(
        "dropout_in_evaluation",
        "eager attention drops in evaluation too",
        "forward.deterministic",
        "    dropped = F.dropout(weights, p=dropout, training=module.training)\n",
        "    dropped = F.dropout(weights, p=module.config.dropout)\n",
    ),
    in_model(
        "residual_dropout_missing",
        "attention's branch is not dropped",
        "training.dropout",
        "self.resid_dropout(self.wo(attended))",
        "self.wo(attended)",
    ),
    in_model(
        "attention_dropout_missing",
        "attention weights are not dropped",
        "training.dropout",
        "            dropout=self.config.dropout if self.training else 0.0,\n",
        "            dropout=0.0,\n",
    ),
    in_model(
        "embedding_scaled",
        "embeddings are multiplied by the root of the width",
        "forward.logits forward.blocks",
        "            inputs_embeds = self.encoder(input_ids)\n",
        "            inputs_embeds = self.encoder(input_ids) * config.hidden_size**0.5\n",
    ),
    in_model(
        "normal_initialisation",
        "linear layers start from a normal distribution",
        "training.initialisation",
        "                nn.init.uniform_(parameter, -config.decoder_init_range, config.decoder_init_range)\n",
        "                nn.init.normal_(parameter, std=config.decoder_init_range)\n",
    ),
    in_model(
        "padding_row_drawn",
        "the embedding of padding starts at random",
        "training.initialisation",
        "                if module.padding_idx is not None:\n",
        "                if False:\n",
    ),
    in_model(
        "padding_learns",
        "the embedding of padding gets a gradient",
        "training.gradients",
        "        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)\n",
        "        self.encoder = nn.Embedding(config.vocab_size, config.hidden_size)\n",
    ),
)

LOSSES: tuple[Mutant, ...] = (
    in_model(
        "labels_shifted",
        "labels are shifted as a causal model's",
        "loss.value loss.ignored",
        "        logits.reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits.dtype)),\n"
        "        labels.reshape(-1).to(logits.device, torch.long),\n",
        "        logits[:, :-1].reshape(-1, logits.shape[-1]).to(accumulation_dtype(logits.dtype)),\n"
        "        labels[:, 1:].reshape(-1).to(logits.device, torch.long),\n",
    ),
    in_model(
        "ignored_label",
        "the loss leaves out -1 instead of -100",
        "loss.ignored",
        "IGNORED_LABEL = -100\n",
        "IGNORED_LABEL = -1\n",
    ),
    in_model(
        "padding_ignored",
        "the loss leaves out labels that are the padding token",
        "loss.value loss.ignored",
        "            loss=None if labels is None else self.loss_function(logits, labels, ",
        "            loss=None if labels is None else self.loss_function(\n"
        "                logits, labels.masked_fill(labels == self.config.pad_token_id, -100), ",
    ),
    in_model(
        "items_in_batch_ignored",
        "the number of labels in the whole batch is left aside",
        "training.micro_batches",
        "    return loss if count is None else loss / torch.as_tensor(count, device=loss.device)\n",
        "    return loss if count is None else loss / loss.detach()\n",
    ),
)

HEADS: tuple[Mutant, ...] = (
    in_model(
        "head_on_mean",
        "the classifier looks at the mean of all tokens",
        "heads.logits",
        POOLED,
        POOLED.replace("[:, 0]", ".mean(dim=1)"),
    ),
    in_model(
        "head_relu", "relu in place of tanh in the classifier", "heads.logits", POOLED, POOLED.replace("tanh", "relu")
    ),
    in_model(
        "head_without_mask",
        "the classifier does not hand its mask on",
        "heads.logits",
        "            attention_mask=attention_mask,\n            position_ids=position_ids,\n"
        "            inputs_embeds=inputs_embeds,\n            output_attentions=output_attentions,\n"
        "            output_hidden_states=output_hidden_states,\n            return_dict=True,\n"
        "            **kwargs,\n        )\n        pooled",
        "            position_ids=position_ids,\n"
        "            inputs_embeds=inputs_embeds,\n            output_attentions=output_attentions,\n"
        "            output_hidden_states=output_hidden_states,\n            return_dict=True,\n"
        "            **kwargs,\n        )\n        pooled",
    ),
    in_model(
        "head_regression_by_classes",
        "a regression is scored as classes of one",
        "heads.loss",
        "        measure = F.mse_loss if problem == ",
        "        measure = F.binary_cross_entropy_with_logits if problem == ",
    ),
    in_model(
        "head_summed_loss",
        "the loss of several labels is their sum",
        "heads.loss",
        '        reduction = "mean" if num_items_in_batch is None else "sum"\n        loss = measure',
        '        reduction = "sum"\n        loss = measure',
    ),
    in_model(
        "head_dropout_once",
        "the classifier drops nothing in front of its last layer",
        "heads.dropout",
        "        logits = self.classifier(self.dropout(pooled))\n",
        "        logits = self.classifier(pooled)\n",
    ),
    in_model(
        "head_not_found",
        "the classifier is not named in the auto_map of what is saved",
        "heads.saved",
        '            "AutoModelForSequenceClassification": f"{module}.NeoBERTForSequenceClassification",\n',
        '            "AutoModelForSequenceClassification": f"{module}.NeoBERTLMHead",\n',
    ),
)

LIBRARY: tuple[Mutant, ...] = (
    in_model(
        "not_tied",
        "embedding and decoder are two tensors whatever the configuration says",
        "weights.tied",
        '        {"decoder.weight": "model.encoder.weight"} if TRANSFORMERS_5 else ["decoder.weight"]\n',
        "        {} if TRANSFORMERS_5 else []\n",
    ),
    in_config(
        "always_tied",
        "embedding and decoder are one tensor whatever the configuration says",
        "weights.tied weights.values",
        "            setattr(self, name, value)\n",
        '            setattr(self, name, True if name == "tie_word_embeddings" else value)\n',
    ),
    in_model(
        "absolute_import",
        "the model imports its helper from the repository",
        "remote_code.files",
        "from .rotary import rotary_angles, rotate\n",
        "from reference_models.neobert.rotary import rotary_angles, rotate\n",
    ),
    in_model(
        "registered_as_remote_code",
        "remote code registers itself, and is taken for other checkpoints of the type",
        "remote_code.two_models",
        'if not __name__.startswith("transformers_modules"):\n',
        "if True:\n",
    ),
    in_model(
        "unknown_arguments_swallowed",
        "lengths of packed sequences are left aside without a word",
        "api.original_only",
        "        _refuse_unknown(kwargs)\n",
        "",
    ),
    in_model(
        "hidden_states_of_blocks_alone",
        "hidden states without the last norm's output",
        "api.hidden_states",
        "            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,\n",
        "            hidden_states=all_hidden_states if output_hidden_states else None,\n",
    ),
    in_model(
        "attentions_are_scores",
        "scores are returned for attention weights",
        "api.attentions",
        "    return torch.matmul(dropped, value).transpose(1, 2), weights\n",
        "    return torch.matmul(dropped, value).transpose(1, 2), scores\n",
    ),
    in_config(
        "default_epsilon",
        "another default epsilon",
        "config.defaults",
        "        norm_eps: float = 1e-6,\n",
        "        norm_eps: float = 1e-5,\n",
    ),
    in_config(
        "activation_forgotten",
        "config.json says nothing of the activation",
        "config.json_round_trip roundtrip.pretrained",
        "        return {**super().to_diff_dict(), **self._always_written()}\n",
        "        written = {**super().to_diff_dict(), **self._always_written()}\n"
        '        written.pop("hidden_act", None)\n        return written\n',
    ),
    in_config(
        "ngpt_accepted",
        "normalised NeoBERT is built as the plain one",
        "config.refused",
        "        if self.ngpt is True:\n",
        "        if False:\n",
    ),
)

EXPORT: tuple[Mutant, ...] = (
    in_export(
        "helper_not_exported",
        "rotary.py stays behind",
        "forward.logits weights.values",
        'CODE = ("configuration_neobert.py", "model.py", "rotary.py")',
        'CODE = ("configuration_neobert.py", "model.py")',
    ),
    in_export(
        "auto_map_of_base",
        "the masked language model's Auto class is given the base model",
        "remote_code.outputs remote_code.cold",
        '    "AutoModelForMaskedLM": "model.NeoBERTLMHead",\n',
        '    "AutoModelForMaskedLM": "model.NeoBERT",\n',
    ),
    in_export(
        "auto_map_without_classifier",
        "no auto_map entry for the classifier",
        "heads.saved",
        '    "AutoModelForSequenceClassification": "model.NeoBERTForSequenceClassification",\n',
        "",
    ),
    in_export(
        "dtype_of_first",
        "the first tensor's dtype is said to be that of all",
        "weights.dtypes",
        "str(counts.most_common(1)[0][0])",
        "str(next(iter(written.values()))[0])",
    ),
    in_export(
        "dropout_not_mapped",
        "the dropout of the run is left out of config.json",
        "weights.configuration",
        "        **{name: fields[name] if name in fields else defaults[name] for name in _SAME_NAMES},\n",
        '        **{name: fields.get(name, defaults.get(name)) for name in _SAME_NAMES if name != "dropout"},\n',
    ),
    in_export(
        "padding_not_mapped",
        "the padding token is 0 in config.json, whatever it was",
        "weights.configuration",
        "        **{name: fields[name] if name in fields else defaults[name] for name in _SAME_NAMES},\n",
        '        **{name: fields.get(name, defaults.get(name)) for name in _SAME_NAMES if name != "pad_token_id"},\n',
    ),
    in_export(
        "initial_range_not_mapped",
        "the initial range of embeddings is left out of config.json",
        "weights.configuration",
        '    "pad_token_id", "rms_norm", "rope", "hidden_act", "embedding_init_range", "decoder_init_range", "dropout",\n',
        '    "pad_token_id", "rms_norm", "rope", "hidden_act", "decoder_init_range", "dropout",\n',
    ),
    in_export(
        "epsilon_not_mapped",
        "the epsilon of the run is left out of config.json",
        "forward.logits weights.values",
        '    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "norm_eps",\n',
        '    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",\n',
    ),
    in_export(
        "tie_not_written",
        "config.json says nothing of the tie",
        "weights.values weights.tied forward.logits",
        '    "tie_word_embeddings",\n)  # fmt: skip\n',
        ")  # fmt: skip\n",
    ),
    in_export(
        "written_is_not_compared",
        "what is written is not what was compared",
        "weights.values",
        "                write(name, tensor)\n",
        '                write(name, tensor.flip(0) if name.endswith("wo.weight") else tensor)\n',
    ),
    in_export(
        "written_by_half",
        "numbers are rounded to half precision on the way",
        "weights.values weights.coverage",
        "                write(name, tensor)\n",
        "                write(name, tensor.to(torch.bfloat16).to(tensor.dtype))\n",
    ),
    in_export(
        "bin_is_another",
        "pytorch_model.bin holds other numbers than model.safetensors",
        "weights.program",
        "            write_torch(name, tensor)\n",
        "            write_torch(name, tensor * 2)\n",
    ),
    in_checkpoint(
        "bias_of_zeros",
        "the decoder's offset is zero though the checkpoint has one",
        "weights.values weights.coverage",
        "    if name == DECODER_BIAS and name not in run.tensors:\n",
        "    if name == DECODER_BIAS:\n",
    ),
    in_checkpoint(
        "packed_the_other_way",
        "the packed gate is taken for what it multiplies",
        "weights.older_dialects",
        "            tensors[name] = rows(packed, (number - 1) * inner, number * inner)\n",
        "            tensors[name] = rows(packed, (2 - number) * inner, (3 - number) * inner)\n",
    ),
    in_checkpoint(
        "dropout_name",
        "the dropout is read under one of its two names alone",
        "weights.configuration",
        '    if "dropout" not in given and section.get("dropout_prob") is not None:\n',
        "    if False:\n",
    ),
    in_checkpoint(
        "tie_guessed",
        "a checkpoint is taken for tied whatever its tensors are",
        "weights.values weights.tied forward.logits",
        "    if declared is False:\n        return False\n",
        "    return True\n",
    ),
    in_assets(
        "tokenizer_length",
        "the tokenizer keeps the longest text that it was saved with",
        "remote_code.tokenizer",
        '    written = {**settings, "model_max_length": fields["max_length"]}\n',
        '    written = {**settings, "model_max_length": 512}\n',
    ),
)

HARMLESS: tuple[Mutant, ...] = (
    in_rotary(
        "rope_by_complex_numbers",
        "rotations by complex multiplication, as upstream writes them",
        "",
        "    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)\n",
        "    turned = torch.view_as_real(torch.complex(even, odd) * torch.complex(*torch.broadcast_tensors(cosine, sine)))\n",
    ),
    in_model(
        "heads_unpacked_first",
        "heads are brought before their tokens before q, k and v are told apart",
        "",
        "        query, key, value = heads.chunk(3, dim=-1)\n",
        "        query, key, value = (part.transpose(1, 2) for part in heads.transpose(1, 2).split(self.head_dim, dim=-1))\n",
    ),
    in_export("one_tensor_waits", "fewer tensors wait for the disk", "", "_WAITING = 2  #", "_WAITING = 1  #"),
)

OUTPUTS: tuple[Mutant, ...] = (
    in_model(
        "classifier_without_states",
        "the classifier never returns hidden states",
        "heads.logits",
        CLASSIFIER_CALL,
        CLASSIFIER_CALL.replace("output_hidden_states=output_hidden_states", "output_hidden_states=False"),
    ),
    in_model(
        "classifier_without_positions",
        "the classifier keeps position_ids to itself",
        "heads.logits",
        CLASSIFIER_CALL,
        CLASSIFIER_CALL.replace("position_ids=position_ids", "position_ids=None"),
    ),
    in_model(
        "classifier_swallows",
        "the classifier swallows keywords that the model below would refuse",
        "heads.logits",
        CLASSIFIER_CALL,
        CLASSIFIER_CALL.replace("            **kwargs,\n", ""),
    ),
    in_model(
        "classes_without_count",
        "the classifier leaves the number of items in the batch aside where labels are classes",
        "heads.loss",
        "            return masked_lm_loss(logits, labels, num_items_in_batch)\n",
        "            return masked_lm_loss(logits, labels)\n",
    ),
    in_model(
        "regression_by_type_only",
        "one label is a class unless the configuration says that it is a number",
        "heads.loss",
        '            problem = "regression" if self.num_labels == 1 else kind\n',
        "            problem = kind\n",
    ),
    in_model(
        "classes_unless_told",
        "labels of several classes at once are taken for one class",
        "heads.loss",
        'kind = "single_label_classification" if is_class else "multi_label_classification"\n',
        'kind = "single_label_classification"\n',
    ),
    in_model(
        "attentions_without_mask",
        "the attentions that are returned give weight to padding",
        "api.attentions",
        "    return torch.matmul(dropped, value).transpose(1, 2), weights\n",
        "    raw = F.softmax(torch.matmul(query, key.transpose(-1, -2)) * scaling, dim=-1)\n"
        "    return torch.matmul(dropped, value).transpose(1, 2), raw\n",
    ),
    in_model(
        "attentions_backwards",
        "the attentions of the last block come first",
        "api.attentions",
        "                all_attentions += (weights,)\n",
        "                all_attentions = (weights, *all_attentions)\n",
    ),
    in_model(
        "mask_lost_with_states",
        "whoever asks for hidden states gets them without the mask from the first block on",
        "api.hidden_states",
        "                attention_mask=scores_mask,\n",
        "                attention_mask=None if all_hidden_states else scores_mask,\n",
    ),
    in_model(
        "masked_row_gradient",
        "a row that is masked as a whole has no finite gradient, though finite outputs",
        "training.gradients_masked",
        "            scores_mask = mask.masked_fill(~has_keys, 0.0)[:, None, None, :]\n",
        "            scores_mask = mask[:, None, None, :]\n",
    ),
    in_model(
        "position_ids_of_one_row",
        "position_ids of the first row are those of all",
        "forward.position_ids",
        "            angles = rotary_angles(position_ids, config",
        "            angles = rotary_angles(position_ids[:1], config",
    ),
    in_model(
        "learned_position_ids_of_one_row",
        "learned positions are looked up by the position_ids of the first row",
        "forward.position_ids",
        "            return position_ids\n",
        "            return position_ids[:1]\n",
    ),
    in_model(
        "embeds_count_padding",
        "learned positions of embeddings count their padding",
        "forward.inputs_embeds",
        "        elif mask is not None:\n            content = mask >= 0\n",
        "",
    ),
)

MUTANTS = (*MASKS, *POSITIONS, *COMPUTATION, *LOSSES, *HEADS, *LIBRARY, *OUTPUTS, *EXPORT, *HARMLESS)
