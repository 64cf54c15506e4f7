# SPDX-License-Identifier: Apache-2.0
"""Planted bugs for the nanoGPT port, and harmless rewrites of it, as exact edits of its source.

`killers` names the checks that are expected to notice; the harmless rewrites at the end have none.
"""

from __future__ import annotations

import functools

from harness.mutants import planted

ROOM = "reference_models/nanogpt/"


_model = functools.partial(planted, ROOM + "modeling_nanogpt.py")
_config = functools.partial(planted, ROOM + "configuration_nanogpt.py")
_checkpoint = functools.partial(planted, ROOM + "checkpoint.py")


def _rewritten_auto_map(change: str) -> tuple[str, str]:
    """Text to find and its replacement, by which every save changes `values`, the content of config.json."""
    return (
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        saved = super().save_pretrained(save_directory, *args, **kwargs)\n"
        "        import json\n        from pathlib import Path\n"
        '        file = Path(save_directory) / "config.json"\n        values = json.loads(file.read_text())\n'
        f"        {change}\n        file.write_text(json.dumps(values))\n        return saved\n",
    )


def _pushing(*lines: str) -> tuple[str, str]:
    """Text to find and its replacement, by which a push_to_hub of the port's own begins with these lines."""
    body = "".join(f"        {line}\n" for line in lines)
    return (
        "    def _init_weights(self, module: nn.Module) -> None:\n",
        f"    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:\n{body}"
        "        return super().push_to_hub(repo_id, **kwargs)\n\n"
        "    def _init_weights(self, module: nn.Module) -> None:\n",
    )


def _uploading(options: str) -> tuple[str, str]:
    """As `_pushing`, by which it saves the port and uploads that itself, with these options of upload_folder."""
    return _pushing(
        "import tempfile",
        "from huggingface_hub import HfApi",
        "HfApi().create_repo(repo_id, exist_ok=True)",
        "with tempfile.TemporaryDirectory() as folder:",
        "    self.save_pretrained(folder)",
        f"    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, {options})",
    )


def _loading_by_name(*lines: str) -> tuple[str, str]:
    """Text to find and its replacement, by which from_pretrained of a name, and no directory, begins with these."""
    body = "".join(f"            {line}\n" for line in lines)
    return (
        "    def _init_weights(self, module: nn.Module) -> None:\n",
        "    @classmethod\n"
        "    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:\n"
        f"        if not os.path.isdir(name):\n{body}"
        "        return super().from_pretrained(name, *args, **kwargs)\n\n"
        "    def _init_weights(self, module: nn.Module) -> None:\n",
    )


ATTENTION = (
    _model(
        "scale-missing",
        "scores are not divided by the root of the head size",
        "forward.logits",
        "self.scaling = self.head_dim**-0.5",
        "self.scaling = 1.0",
    ),
    _model(
        "scale-doubled",
        "scores are twice too large",
        "forward.logits",
        "self.scaling = self.head_dim**-0.5",
        "self.scaling = 2 * self.head_dim**-0.5",
    ),
    _model(
        "scale-by-width",
        "scores are divided by the root of the model's width, which is right for one head alone",
        "forward.logits",
        "self.scaling = self.head_dim**-0.5",
        "self.scaling = config.n_embd**-0.5",
    ),
    _model(
        "query-key-swapped",
        "query and key are taken from each other's third",
        "forward.logits",
        "        query, key, value = (\n            part",
        "        key, query, value = (\n            part",
    ),
    _model(
        "key-value-swapped",
        "key and value are taken from each other's third",
        "forward.logits",
        "        query, key, value = (\n            part",
        "        query, value, key = (\n            part",
    ),
    _model(
        "heads-interleaved",
        "channels are dealt to the heads in turn instead of in blocks",
        "forward.logits",
        "part.view(*input_shape, -1, self.head_dim).transpose(1, 2)",
        "part.view(*input_shape, self.head_dim, -1).permute(0, 3, 1, 2)",
    ),
    _model(
        "not-causal",
        "SDPA without a mask sees later tokens",
        "forward.causal forward.logits",
        "self.is_causal = True",
        "self.is_causal = False",
    ),
    _model(
        "eager-scale-missing",
        "eager attention alone does not scale",
        "backend.attention",
        "key.transpose(-1, -2)) * scaling",
        "key.transpose(-1, -2))",
    ),
    _model(
        "eager-softmax-axis",
        "eager attention normalises over queries",
        "backend.attention api.attentions",
        "nn.functional.softmax(scores, dim=-1)",
        "nn.functional.softmax(scores, dim=-2)",
    ),
    _model(
        "eager-detached",
        "eager attention's weights carry no gradient",
        "backend.attention_gradients",
        "nn.functional.softmax(scores, dim=-1).to(value.dtype)",
        "nn.functional.softmax(scores, dim=-1).to(value.dtype).detach()",
    ),
    _model(
        "eager-returns-scores",
        "output_attentions gives scores, not weights",
        "api.attentions",
        "return torch.matmul(weights, value).transpose(1, 2), weights",
        "return torch.matmul(weights, value).transpose(1, 2), scores",
    ),
    _model(
        "sdpa-refused",
        "the model says that it cannot use SDPA",
        "backend.attention",
        "_supports_sdpa = True",
        "_supports_sdpa = False",
    ),
)

MASKS = (
    _model(
        "mask-ignored",
        "the padding mask is accepted and dropped",
        "masks.left_padding masks.pad_content",
        '"attention_mask": attention_mask,\n            "past_key_values"',
        '"attention_mask": None,\n            "past_key_values"',
    ),
    _model(
        "mask-inverted",
        "padding is attended to, tokens are not",
        "masks.left_padding masks.right_padding masks.none_is_ones",
        '"attention_mask": attention_mask,\n            "past_key_values"',
        '"attention_mask": None if attention_mask is None else 1 - attention_mask.long(),\n            "past_key_values"',
    ),
    _model(
        "mask-of-first-row",
        "eager attention uses the first row's mask for the whole batch",
        "backend.attention_masked",
        "        scores = scores + attention_mask\n",
        "        scores = scores + attention_mask[:1]\n",
    ),
    _model(
        "mask-eager-dropped",
        "eager attention drops the mask, causality with it",
        "backend.attention",
        "        scores = scores + attention_mask\n",
        "        scores = scores + 0 * attention_mask\n",
    ),
    _model(
        "mask-eager-multiplied",
        "eager attention multiplies scores by the mask instead of adding it",
        "backend.attention",
        "        scores = scores + attention_mask\n",
        "        scores = scores * attention_mask\n",
    ),
    _model(
        "mask-minus-infinity",
        "eager attention masks with minus infinity, so that a row without tokens is not a number",
        "masks.all_masked_row",
        "        scores = scores + attention_mask\n",
        '        scores = scores.masked_fill(attention_mask < 0, float("-inf"))\n',
    ),
    _model(
        "mask-half-precision",
        "eager attention adds the mask in half precision, where it overflows",
        "precision.masks",
        "    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))\n    if attention_mask is not None:\n        scores = scores + attention_mask\n",
        "    if attention_mask is not None:\n        scores = scores + attention_mask + attention_mask\n",
    ),
    _model(
        "mask-additive-as-boolean",
        "an additive mask is read as a boolean one",
        "masks.additive",
        "            return attention_mask.to(dtype).clamp(min=lowest)",
        "            return torch.zeros_like(attention_mask).masked_fill(attention_mask == 0, lowest)",
    ),
    _model(
        "mask-additive-hardened",
        "an additive 4-D bias (ALiBi-like) is cut to 0 or minus infinity",
        "masks.additive",
        "            return attention_mask.to(dtype).clamp(min=lowest)",
        "            return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(attention_mask < 0, lowest)",
    ),
)

POSITIONS = (
    _model(
        "position-from-one",
        "positions start at one",
        "forward.logits forward.lengths",
        "return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)",
        "return (torch.arange(length, device=inputs_embeds.device) + past + 1).unsqueeze(0) % block_size",
    ),
    _model(
        "position-restarts",
        "positions restart at zero at every call with a cache",
        "generation.cache generation.chunked_prefill",
        "return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)",
        "return torch.arange(length, device=inputs_embeds.device).unsqueeze(0)",
    ),
    _model(
        "position-counts-padding",
        "positions are counted over padding",
        "masks.left_padding masks.interior_padding",
        "if attention_mask is not None and attention_mask.ndim == 2:\n            # Wherever",
        "if attention_mask is None:\n            # Wherever",
    ),
    _model(
        "position-of-first-row",
        "the first row's padding decides every row's positions",
        "masks.left_padding",
        ".clamp(min=0)[:, -length:]",
        ".clamp(min=0)[:1, -length:]",
    ),
    _model(
        "position-ids-ignored",
        "position_ids are accepted and ignored",
        "forward.position_ids",
        "            return position_ids\n",
        "            pass\n",
    ),
    _model(
        "positions-missing",
        "the position table is not added",
        "forward.logits",
        "self.drop(inputs_embeds + self.wpe(positions))",
        "self.drop(inputs_embeds + 0 * self.wpe(positions))",
    ),
    _model(
        "embedding-scaled",
        "token embeddings are scaled by the root of the width",
        "forward.logits",
        "self.drop(inputs_embeds + self.wpe(positions))",
        "self.drop(inputs_embeds * self.config.n_embd**0.5 + self.wpe(positions))",
    ),
    _model(
        "residual-shifted",
        "a constant is added to the residual stream, which every norm takes out again",
        "forward.blocks api.hidden_states",
        "self.drop(inputs_embeds + self.wpe(positions))",
        "self.drop(inputs_embeds + self.wpe(positions)) + 1.0",
    ),
    _model(
        "embeds-scaled-alone",
        "inputs_embeds are treated unlike looked-up embeddings",
        "forward.inputs_embeds generation.inputs_embeds",
        "            inputs_embeds = self.wte(input_ids)\n",
        "            inputs_embeds = self.wte(input_ids)\n        else:\n            inputs_embeds = inputs_embeds * 0.5\n",
    ),
    _model(
        "maximum-one-short",
        "a sequence of exactly block_size tokens is refused",
        "forward.lengths",
        "(isinstance(past, int) or not compiling) and past + length > block_size",
        "(isinstance(past, int) or not compiling) and past + length >= block_size",
    ),
    _model(
        "maximum-unguarded",
        "too long a sequence ends in an IndexError of the position table",
        "forward.beyond_maximum",
        "(isinstance(past, int) or not compiling) and past + length > block_size",
        "(isinstance(past, int) or not compiling) and past + length > 100 * block_size",
    ),
    _model(
        "maximum-wraps",
        "positions wrap around beyond block_size",
        "forward.beyond_maximum",
        "(isinstance(past, int) or not compiling) and past + length > block_size:",
        "past + length > block_size and position_ids is None:\n"
        "            return (torch.arange(length, device=inputs_embeds.device) % block_size).unsqueeze(0)\n"
        "        if past + length > 100 * block_size:",
    ),
    _model(
        "mask-overrides-position-ids",
        "position_ids are ignored when a 2-D attention_mask is given too",
        "forward.position_ids",
        "        if position_ids is not None:\n            # Reading",
        "        if position_ids is not None and (attention_mask is None or attention_mask.ndim != 2):\n            # Reading",
    ),
    _model(
        "maximum-forgets-the-past",
        "the guard looks at the new tokens only: with a cache it is an IndexError",
        "forward.beyond_maximum",
        "past + length > block_size:",
        "length > block_size:",
    ),
    _model(
        "embeds-detached",
        "no gradient reaches inputs_embeds",
        "forward.inputs_embeds",
        "            inputs_embeds = self.wte(input_ids)\n",
        "            inputs_embeds = self.wte(input_ids)\n        else:\n            inputs_embeds = inputs_embeds.detach()\n",
    ),
    _model(
        "loss-logit-clamp",
        "logits are clipped to 30 before the loss",
        "forward.large_scale",
        "logits.reshape(-1, vocab_size).to(torch",
        "logits.reshape(-1, vocab_size).clamp(-30, 30).to(torch",
    ),
)

CACHE = (
    _model(
        "cache-not-used",
        "keys and values are stored and not read back",
        "generation.cache",
        "key, value = past_key_values.update(",
        "_ = past_key_values.update(",
    ),
    _model(
        "cache-one-layer",
        "all layers share the first one's place in the cache",
        "generation.cache",
        'key, value, self.layer_idx, {"cache_position"',
        'key, value, 0, {"cache_position"',
    ),
    _model(
        "cache-not-returned",
        "use_cache=True returns no cache",
        "generation.cache",
        "past_key_values=past_key_values if use_cache else None",
        "past_key_values=None",
    ),
    _model(
        "cache-own-memory",
        "attention keeps its own keys and values, which beams do not reorder",
        "generation.beam",
        '            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})\n',
        '            every = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})\n'
        '            own = getattr(self, "memory", None)\n'
        "            if own is not None and own[0].shape[0] == key.shape[0] > 3 and key.shape[2] == 1:\n"
        "                key, value = torch.cat((own[0], key), 2), torch.cat((own[1], value), 2)\n"
        "            else:\n"
        "                key, value = every\n"
        "            self.memory = (key.detach(), value.detach())\n",
    ),
    _model(
        "cache-chunk-forgets",
        "a chunk of several tokens behind a cache gets the mask of a sequence of its own",
        "generation.chunked_prefill",
        "        dtype = inputs_embeds.dtype\n",
        "        dtype = inputs_embeds.dtype\n"
        "        if attention_mask is None and past_key_values is not None and past_key_values.get_seq_length():\n"
        "            return None\n",
    ),
    _model(
        "cache-half-precision",
        "keys are rounded to bfloat16 on their way into the cache",
        "generation.cache precision.cache",
        "past_key_values.update(key, value,",
        "past_key_values.update(key.bfloat16().to(key.dtype), value,",
    ),
    _model(
        "mask-cached-positions-from-front",
        "with cache and a 2-D mask but no position_ids, new tokens get the first positions",
        "generation.cache_masked",
        ".clamp(min=0)[:, -length:]",
        ".clamp(min=0)[:, :length]",
    ),
    _model(
        "past-of-dynamic-cache-only",
        "the past is read from a DynamicCache only; other caches count as empty",
        "generation.static_cache",
        "past = past_key_values.get_seq_length() if past_key_values is not None else 0",
        "past = past_key_values.get_seq_length() if isinstance(past_key_values, DynamicCache) else 0",
    ),
    _model(
        "mask-4d-boolean-inverted",
        "a boolean 4-D mask is inverted",
        "generation.static_cache",
        "masked_fill(~attention_mask, lowest)",
        "masked_fill(attention_mask, lowest)",
    ),
    _model(
        "use-cache-of-config-ignored",
        "config.use_cache=False is ignored by forward",
        "generation.cache",
        "            use_cache = config.use_cache\n",
        "            use_cache = True\n",
    ),
    _model(
        "cache-given-but-unused",
        "a given cache is dropped when use_cache=False",
        "generation.cache",
        "        if use_cache and past_key_values is None:\n",
        "        if not use_cache:\n            past_key_values = None\n        elif past_key_values is None:\n",
    ),
    _model(
        "window-mask-from-front",
        "the moving window takes the mask's first columns, not its last",
        "generation.past_maximum",
        "attention_mask = attention_mask[:, -window:]",
        "attention_mask = attention_mask[:, :window]",
    ),
    _model(
        "batch-stops-early",
        "several rows generated together stop after one token",
        "generation.batch generation.left_padded",
        "    def prepare_inputs_for_generation(",
        "    def generate(self, inputs=None, **kwargs):\n"
        '        rows = kwargs.get("input_ids", inputs)\n'
        "        if rows is not None and len(rows) > 1:\n"
        '            kwargs["max_new_tokens"] = 1\n'
        "        return super().generate(inputs, **kwargs)\n\n"
        "    def prepare_inputs_for_generation(",
    ),
)

NORMS = (
    _model(
        "epsilon-1e-6",
        "the norms' epsilon is 1e-6",
        "forward.small_scale forward.logits",
        "LAYER_NORM_EPSILON = 1e-5",
        "LAYER_NORM_EPSILON = 1e-6",
    ),
    _model(
        "epsilon-1e-12",
        "the norms' epsilon is BERT's",
        "forward.small_scale forward.logits",
        "LAYER_NORM_EPSILON = 1e-5",
        "LAYER_NORM_EPSILON = 1e-12",
    ),
    _model(
        "epsilon-of-last-norm",
        "the last norm alone has another epsilon",
        "forward.small_scale forward.blocks",
        "self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON",
        "self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-6",
    ),
    _model(
        "norms-exchanged",
        "the MLP is fed from the attention's norm",
        "forward.logits",
        "self.mlp(self.ln_2(hidden_states))",
        "self.mlp(self.ln_1(hidden_states))",
    ),
    _model(
        "norm-missing",
        "attention is fed without a norm",
        "forward.logits",
        "self.attn(self.ln_1(hidden_states), **kwargs)",
        "self.attn(hidden_states, **kwargs)",
    ),
    _model(
        "last-norm-missing",
        "the last norm is skipped",
        "forward.logits",
        "        hidden_states = self.ln_f(hidden_states)\n",
        "        hidden_states = hidden_states + 0 * self.ln_f(hidden_states)\n",
    ),
    _model(
        "post-norm",
        "norms stand behind the branches",
        "forward.logits",
        "return hidden_states + self.mlp(self.ln_2(hidden_states)), weights",
        "return self.ln_2(hidden_states + self.mlp(hidden_states)), weights",
    ),
    _model(
        "norm-unknown-to-trainer",
        "the last norm is a class of one's own, so the Trainer decays its gain",
        "training.parameter_groups training.optimiser_steps",
        "self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON, bias=config.bias)",
        'norm = type("Norm", (nn.Module,), {"forward": lambda self, x: nn.functional.layer_norm('
        'x, x.shape[-1:], self.weight, getattr(self, "bias", None), LAYER_NORM_EPSILON)})\n'
        "        self.ln_f = norm()\n"
        "        self.ln_f.weight = nn.Parameter(torch.ones(config.n_embd))\n"
        "        if config.bias:\n"
        "            self.ln_f.bias = nn.Parameter(torch.zeros(config.n_embd))",
    ),
)

MLP = (
    _model(
        "gelu-tanh",
        "GELU by its tanh approximation",
        "forward.logits",
        "self.gelu = nn.GELU()",
        'self.gelu = nn.GELU(approximate="tanh")',
    ),
    _model("gelu-relu", "ReLU for GELU", "forward.logits", "self.gelu = nn.GELU()", "self.gelu = nn.ReLU()"),
    _model("gelu-silu", "SiLU for GELU", "forward.logits", "self.gelu = nn.GELU()", "self.gelu = nn.SiLU()"),
)

RESIDUALS = (
    _model(
        "attention-residual-dropped",
        "attention's output replaces the residual stream",
        "forward.logits",
        "        hidden_states = hidden_states + attended\n",
        "        hidden_states = attended\n",
    ),
    _model(
        "mlp-residual-dropped",
        "the MLP's output replaces the residual stream",
        "forward.logits",
        "return hidden_states + self.mlp(self.ln_2(hidden_states)), weights",
        "return self.mlp(self.ln_2(hidden_states)), weights",
    ),
    _model(
        "branches-parallel",
        "the MLP does not see what attention added",
        "forward.logits",
        "        hidden_states = hidden_states + attended\n"
        "        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights",
        "        return hidden_states + attended + self.mlp(self.ln_2(hidden_states)), weights",
    ),
)

HEAD = (
    _model(
        "logits-scaled",
        "logits are divided by the root of the width",
        "forward.logits",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept])",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.n_embd**-0.5",
    ),
    _model(
        "logits-of-last-position",
        "logits of the last position only",
        "api.output_type forward.logits",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept])",
        "logits = self.lm_head(outputs.last_hidden_state[:, -1:])",
    ),
    _model(
        "logits-centred-over-batch",
        "logits are centred over the rows of a batch",
        "forward.rows_independent",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept])",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept])\n"
        "        logits = logits - (logits.mean(dim=0, keepdim=True) if len(logits) > 2 else 0)",
    ),
    _model(
        "logits-to-keep-ignored",
        "logits_to_keep is accepted and ignored",
        "api.logits_to_keep",
        "kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep",
        "kept = slice(None)",
    ),
    _model(
        "tie-undeclared",
        "head and embedding are not declared as tied",
        "weights.tied training.optimiser_steps",
        '{"lm_head.weight": "transformer.wte.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]',
        "{} if TRANSFORMERS_5 else []",
    ),
    _model(
        "tie-lost-by-resize",
        "after a resize the head is a copy of the embedding",
        "weights.tied_after_resize",
        "    @classmethod\n    def from_nanogpt_ckpt",
        "    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:\n"
        "        table = super().resize_token_embeddings(*args, **kwargs)\n"
        "        self.lm_head.weight = nn.Parameter(table.weight.detach().clone())\n"
        "        return table\n\n"
        "    @classmethod\n    def from_nanogpt_ckpt",
    ),
    _model(
        "embedding-is-positions",
        "get_input_embeddings gives the position table",
        "api.embeddings",
        '_input_embed_layer = "wte"',
        '_input_embed_layer = "wpe"',
    ),
)

LOSS = (
    _model(
        "loss-not-shifted",
        "labels are not shifted",
        "loss.value",
        "nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)",
        "labels",
    ),
    _model(
        "loss-shifted-twice",
        "labels are shifted by two",
        "loss.value",
        "nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)",
        "nn.functional.pad(labels[:, 2:], (0, 2), value=ignore_index)",
    ),
    _model(
        "loss-ignores-another-label",
        "-1 is ignored where -100 is meant",
        "loss.ignored",
        "IGNORED_LABEL = -100",
        "IGNORED_LABEL = -1",
    ),
    _model(
        "loss-mean-over-all",
        "ignored positions count in the mean",
        "loss.ignored",
        '        reduction="mean" if num_items_in_batch is None else "sum",\n    )\n',
        '        reduction="sum",\n    )\n'
        "    if num_items_in_batch is None:\n        loss = loss / shift_labels[:, :-1].numel()\n",
    ),
    _model(
        "loss-summed",
        "the loss is a sum",
        "loss.value",
        'reduction="mean" if num_items_in_batch is None else "sum"',
        'reduction="sum"',
    ),
    _model(
        "loss-smoothed",
        "labels are smoothed",
        "loss.from_logits loss.value",
        "        ignore_index=ignore_index,\n        reduction",
        "        ignore_index=ignore_index,\n        label_smoothing=0.01,\n        reduction",
    ),
    _model(
        "loss-count-ignored",
        "num_items_in_batch is accepted and ignored",
        "training.micro_batches",
        'reduction="mean" if num_items_in_batch is None else "sum",\n    )\n    if num_items_in_batch is not None:',
        'reduction="mean",\n    )\n    if False:',
    ),
    _model(
        "loss-remembers",
        "something of every earlier call leaks into the loss",
        "loss.pure",
        "            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)\n",
        '            self.calls = getattr(self, "calls", -1) + 1\n'
        "            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)\n"
        "            loss = loss * (1 + 1e-3 * self.calls)\n",
    ),
    _model(
        "loss-without-labels",
        "a loss is returned without labels",
        "api.output_type",
        "            loss=loss,\n            logits=logits,",
        "            loss=logits.mean() if loss is None else loss,\n            logits=logits,",
    ),
    _model(
        "gradient-detached",
        "the MLP's branch carries no gradient into its input",
        "training.gradients",
        "self.gelu(self.c_fc(hidden_states))",
        "self.gelu(self.c_fc(hidden_states.detach()))",
    ),
    _model(
        "targets-ignore-minus-100",
        "nanoGPT's targets are ignored at -100, not at -1",
        "loss.targets",
        "IGNORED_TARGET = -1\n",
        "IGNORED_TARGET = -100\n",
    ),
    _model(
        "targets-shifted",
        "nanoGPT's targets, already shifted, are shifted again",
        "loss.targets",
        'kwargs |= {"shift_labels": targets, "ignore_index": IGNORED_TARGET}',
        'kwargs |= {"ignore_index": IGNORED_TARGET}\n            labels = targets',
    ),
    _model(
        "generation-leaves-eval",
        "generate puts a model in training mode into evaluation mode for good",
        "loss.pure",
        "        if past_key_values is not None:\n            if not TRANSFORMERS_5",
        "        self.eval()\n        if past_key_values is not None:\n            if not TRANSFORMERS_5",
    ),
    _model(
        "cache-ignored-training",
        "generate() of a model in training forgets what is cached",
        "loss.pure",
        "        if past_key_values is not None:\n            key, value",
        "        if past_key_values is not None and not self.training:\n            key, value",
    ),
)

TRAINING = (
    _model(
        "initial-deviation",
        "weights start half as wide",
        "training.initialisation",
        "INITIAL_STD = 0.02",
        "INITIAL_STD = 0.01",
    ),
    _model(
        "initial-residual-scale",
        "residual projections start as wide as the others",
        "training.initialisation",
        'branches = 2 * self.config.n_layer if getattr(module, "ends_residual_branch", False) else 1',
        "branches = 1",
    ),
    _model(
        "initial-residual-one-of-two",
        "the MLP's residual projection alone starts as wide as the others",
        "training.initialisation",
        "self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)\n"
        "        self.c_proj.ends_residual_branch = True",
        "self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)\n"
        "        self.c_proj.ends_residual_branch = False",
    ),
    _model(
        "initial-bias",
        "biases do not start at zero",
        "training.initialisation",
        "nn.init.zeros_(parameter)",
        "nn.init.normal_(parameter, std=INITIAL_STD)",
    ),
    _model(
        "initial-uniform",
        "weights start from a uniform distribution of the same width",
        "training.initialisation",
        "nn.init.normal_(parameter, std=INITIAL_STD / branches**0.5)",
        "nn.init.uniform_(parameter, -INITIAL_STD * (3 / branches) ** 0.5, INITIAL_STD * (3 / branches) ** 0.5)",
    ),
    _model(
        "dropout-attention-residual",
        "attention's output is not dropped",
        "training.dropout",
        "return self.resid_dropout(output), weights",
        "return output, weights",
    ),
    _model(
        "dropout-mlp",
        "the MLP's output is not dropped",
        "training.dropout",
        "self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))",
        "self.c_proj(self.gelu(self.c_fc(hidden_states)))",
    ),
    _model(
        "dropout-inside-mlp",
        "the MLP drops out before its last product instead of after it",
        "training.dropout",
        "self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))",
        "self.c_proj(self.dropout(self.gelu(self.c_fc(hidden_states))))",
    ),
    _model(
        "dropout-before-positions",
        "token embeddings are dropped before the positions are added",
        "training.dropout",
        "self.drop(inputs_embeds + self.wpe(positions))",
        "self.drop(inputs_embeds) + self.wpe(positions)",
    ),
    _model(
        "dropout-embedding",
        "embeddings are not dropped",
        "training.dropout",
        "hidden_states = self.drop(inputs_embeds + self.wpe(positions))",
        "hidden_states = inputs_embeds + self.wpe(positions)",
    ),
    _model(
        "dropout-attention-weights",
        "attention weights are not dropped",
        "training.dropout",
        "dropout=self.attn_dropout.p if self.training else 0.0",
        "dropout=0.0",
    ),
    _model(
        "dropout-eager",
        "eager attention does not drop weights",
        "training.dropout",
        "weights = nn.functional.dropout(weights, p=dropout, training=module.training)",
        "weights = weights",
    ),
    _model(
        "dropout-in-evaluation",
        "attention's output is dropped in evaluation too",
        "forward.deterministic",
        "return self.resid_dropout(output), weights",
        "return nn.functional.dropout(output, self.resid_dropout.p), weights",
    ),
    _model(
        "checkpointing-ineffective",
        "gradient checkpointing is accepted and does nothing",
        "training.gradient_checkpointing",
        "class NanoGPTBlock(GradientCheckpointingLayer):",
        "class NanoGPTBlock(nn.Module):",
    ),
    _model(
        "checkpointing-disables-cache-forever",
        "gradient checkpointing writes use_cache=False into the configuration",
        "training.gradient_checkpointing",
        "        if self.gradient_checkpointing and self.training:\n            use_cache = False\n",
        "        if self.gradient_checkpointing and self.training:\n            use_cache = config.use_cache = False\n",
    ),
    _model(
        "checkpointing-disables-cache-in-eval",
        "with gradient checkpointing on, evaluation returns no cache either",
        "training.gradient_checkpointing",
        "        if self.gradient_checkpointing and self.training:\n",
        "        if self.gradient_checkpointing:\n",
    ),
    _model(
        "checkpointing-other-dropout",
        "recomputed blocks draw other dropout masks",
        "training.gradient_checkpointing",
        "    def save_pretrained(self, save_directory",
        '    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:\n        super().gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False, **(gradient_checkpointing_kwargs or {})})\n\n    def save_pretrained(self, save_directory',
    ),
    _model(
        "dropout-not-of-embeds",
        "in training, inputs_embeds are not dropped (PEFT prompt tuning)",
        "training.dropout",
        "        hidden_states = self.drop(inputs_embeds + self.wpe(positions))\n",
        "        hidden_states = inputs_embeds + self.wpe(positions)\n        if input_ids is not None:\n            hidden_states = self.drop(hidden_states)\n",
    ),
    _model(
        "loss-count-tensor-only",
        "num_items_in_batch as an int is an error",
        "training.micro_batches",
        "loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)",
        "loss = loss / num_items_in_batch.to(loss.device)",
    ),
    _model(
        "loss-kwargs-refused-by-trainer",
        "the Trainer is told that forward takes no loss kwargs",
        "training.micro_batches",
        "    def __init__(self, config: NanoGPTConfig) -> None:\n        super().__init__(config)\n        self.transformer",
        "    accepts_loss_kwargs = False\n\n    def __init__(self, config: NanoGPTConfig) -> None:\n        super().__init__(config)\n        self.transformer",
    ),
    _model(
        "eager-gradient-not-a-number",
        "eager masks with -inf and repairs the NaN forward only: gradients of padded batches are NaN",
        "training.gradients_masked",
        "        scores = scores + attention_mask\n    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)\n",
        "        scores = scores + torch.where(attention_mask < 0, -torch.inf, attention_mask)\n    weights = nn.functional.softmax(scores, dim=-1).nan_to_num(0.0).to(value.dtype)\n",
    ),
    _model(
        "embedding-padding-index",
        "with pad_token_id set, that row of the embedding gets no gradient",
        "training.special_tokens",
        "self.wte = nn.Embedding(config.vocab_size, config.n_embd)",
        "self.wte = nn.Embedding(config.vocab_size, config.n_embd, padding_idx=config.pad_token_id)",
    ),
    _model(
        "zloss-training",
        "training adds a term to the loss that the original does not have",
        "training.gradients loss.value",
        "            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)\n",
        "            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)\n            if self.training:\n                loss = loss + 1e-2 * logits.float().logsumexp(-1).pow(2).mean()\n",
    ),
    _model(
        "positions-ignore-mask-training",
        "positions are counted over padding while training",
        "training.gradients_masked",
        "if attention_mask is not None and attention_mask.ndim == 2:\n            # Wherever",
        "if attention_mask is not None and attention_mask.ndim == 2 and not self.training:\n            # Wherever",
    ),
    _model(
        "checkpointing-drops-mask",
        "gradient checkpointing leaves the mask behind",
        "training.gradient_checkpointing",
        "                attention_mask=mask,\n",
        "                attention_mask=None if self.gradient_checkpointing and self.training else mask,\n",
    ),
    _model(
        "mlp-no-grad-in-training",
        "the feed-forward part passes no gradient on while training",
        "training.gradients",
        "        output: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))",
        "        output: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states.detach() if self.training else hidden_states))))",
    ),
)

PRECISION = (
    _model(
        "stream-rounded",
        "outside float64 the residual stream is rounded to bfloat16 before the last norm",
        "precision.logits precision.gradients",
        "        hidden_states = self.ln_f(hidden_states)\n",
        "        if hidden_states.dtype == torch.float32:\n"
        "            hidden_states = hidden_states.bfloat16().float()\n"
        "        hidden_states = self.ln_f(hidden_states)\n",
    ),
    _model(
        "loss-rounded",
        "the loss is computed in bfloat16",
        "precision.loss",
        "logits.reshape(-1, vocab_size).to(torch.promote_types(logits.dtype, torch.float32))",
        "logits.reshape(-1, vocab_size).to(logits.dtype if logits.dtype == torch.float64 else torch.bfloat16)",
    ),
    _model(
        "graph-breaks",
        "a value of a tensor decides the way through the MLP, which breaks a compiled graph",
        "backend.compiled",
        "        output: Tensor = self.dropout(",
        "        if bool(hidden_states.isnan().any()):\n            hidden_states = hidden_states.nan_to_num()\n"
        "        output: Tensor = self.dropout(",
    ),
    _model(
        "constant-cached",
        "a constant is cached at the first call and keeps the dtype it had then",
        "roundtrip.cast",
        "self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))\n",
        "self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states)) * self._one(hidden_states)))\n"
        "        return output\n\n"
        "    def _one(self, hidden_states: Tensor) -> Tensor:\n"
        '        self.one = getattr(self, "one", None)\n'
        "        if self.one is None:\n            self.one = torch.ones(1, dtype=hidden_states.dtype)\n"
        "        return self.one\n\n"
        "    def _unused(self, output: Tensor) -> Tensor:\n",
    ),
    _model(
        "positions-in-model-dtype",
        "positions are counted in the model's dtype: wrong above 256 in bfloat16",
        "precision.long_positions",
        "return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)",
        "return (torch.arange(length, device=inputs_embeds.device, dtype=inputs_embeds.dtype) + past).long().unsqueeze(0)",
    ),
    _model(
        "mask-cumsum-model-dtype",
        "a mask is counted in the model's dtype: wrong above 256 in bfloat16",
        "precision.long_positions",
        "return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]",
        "return (attention_mask.to(inputs_embeds.dtype).cumsum(-1) - 1).clamp(min=0).long()[:, -length:]",
    ),
)

FILES = (
    _model(
        "buffer-not-saved",
        "a constant lies in a buffer that no file holds",
        "roundtrip.poisoned_memory remote_code.poisoned_memory",
        "        self.gelu = nn.GELU()\n",
        "        self.gelu = nn.GELU()\n"
        '        self.register_buffer("one", torch.ones(()), persistent=False)\n'
        "        self.register_forward_hook(lambda module, inputs, output: output * module.one)\n",
    ),
    _model(
        "shards-ignored",
        "save_pretrained drops the size of shards",
        "roundtrip.sharded",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        '        kwargs.pop("max_shard_size", None)\n'
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
    ),
    _model(
        "safetensors-only",
        "from_pretrained knows safetensors alone",
        "roundtrip.bin",
        "    def _init_weights(self, module: nn.Module) -> None:\n",
        "    @classmethod\n"
        "    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:\n"
        "        return super().from_pretrained(*args, **{**kwargs, 'use_safetensors': True})\n\n"
        "    def _init_weights(self, module: nn.Module) -> None:\n",
    ),
    _model(
        "save-counts",
        "every save changes the configuration",
        "roundtrip.fixed_point",
        '        module = __name__.rpartition(".")[2]\n',
        '        module = __name__.rpartition(".")[2]\n'
        '        self.config.prefix = (getattr(self.config, "prefix", None) or "") + "x"\n',
    ),
    _model(
        "tensor-made-early",
        "the constructor reads a tensor's value, which the meta device has not",
        "roundtrip.meta_device weights.values",
        "self.scaling = self.head_dim**-0.5",
        "self.scaling = torch.tensor(float(self.head_dim)).rsqrt().item()",
    ),
    _model(
        "auto-map-short",
        "config.json does not say where the causal model is",
        "remote_code.files",
        *_rewritten_auto_map('values["auto_map"].pop("AutoModelForCausalLM", None)'),
    ),
    _model(
        "auto-map-to-base",
        "config.json names the model without a head",
        "remote_code.outputs",
        *_rewritten_auto_map('values["auto_map"]["AutoModelForCausalLM"] = "modeling_nanogpt.NanoGPTModel"'),
    ),
    _model(
        "code-left-behind",
        "saved from a process that loaded it as remote code, the model leaves its code behind",
        "remote_code.resaved",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        saved = super().save_pretrained(save_directory, *args, **kwargs)\n"
        '        if __name__.startswith("transformers_modules"):\n'
        "            from pathlib import Path\n"
        '            for file in Path(save_directory).glob("*.py"):\n                file.unlink()\n'
        "        return saved\n",
    ),
    _model(
        "remote-generation-positions",
        "as remote code the model generates every token at the first position",
        "remote_code.generation",
        "            return inputs\n",
        '            if __name__.startswith("transformers_modules"):\n'
        '                inputs["position_ids"] = inputs["input_ids"] * 0\n'
        "            return inputs\n",
    ),
    _model(
        "found-by-luck",
        "as remote code the model needs a module that nobody but the preloaded server has imported",
        "remote_code.cold",
        "LAYER_NORM_EPSILON = 1e-5\n",
        "import sys\n\nLAYER_NORM_EPSILON = 1e-5\n"
        'if __name__.startswith("transformers_modules"):\n    sys.modules["harness.sandbox.server"].main\n',
    ),
    _model(
        "registers-as-remote-code",
        "as remote code the file registers itself, and the next checkpoint runs its code",
        "remote_code.two_models",
        'if not __name__.startswith("transformers_modules"):',
        "if True:",
    ),
    _model(
        "import-absolute",
        "a helper is imported from the training package",
        "remote_code.files",
        "from .checkpoint import load_checkpoint, save_checkpoint",
        "from reference_models.nanogpt.checkpoint import load_checkpoint, save_checkpoint",
    ),
    _model(
        "registered-without-head",
        "AutoModelForCausalLM is registered with the model without a head",
        "api.auto_classes",
        "AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTLMHeadModel, exist_ok=True)",
        "AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)",
    ),
    _model(
        "no-split-of-another-model",
        "_no_split_modules names a block of GPT-2",
        "api.device_map",
        '["NanoGPTBlock"]',
        '["GPT2Block"]',
    ),
    _model(
        "save-claims-float32",
        "config.json of a bfloat16 model says float32, so it comes back twice as large",
        "roundtrip.dtype",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        saved = super().save_pretrained(save_directory, *args, **kwargs)\n        self.config.dtype = torch.float32\n        self.config.save_pretrained(save_directory)\n        return saved\n",
    ),
    _model(
        "save-upcasts",
        "save_pretrained turns the live model into float32",
        "roundtrip.dtype",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        return super(NanoGPTPreTrainedModel, self.float()).save_pretrained(save_directory, *args, **kwargs)\n",
    ),
    _model(
        "save-writes-float32",
        "the file of a half-precision model holds float32",
        "roundtrip.dtype",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        '        from safetensors.torch import load_file, save_file\n\n        saved = super().save_pretrained(save_directory, *args, **kwargs)\n        file = os.path.join(save_directory, "model.safetensors")\n        if os.path.exists(file):\n            tensors = {name: tensor.float() for name, tensor in load_file(file).items()}\n            save_file(tensors, file, metadata={"format": "pt"})\n        return saved\n',
    ),
    _model(
        "save-turns-cache-off",
        "save_pretrained sets use_cache=False in the live model's configuration",
        "roundtrip.dtype",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        self.config.use_cache = False\n        return super().save_pretrained(save_directory, *args, **kwargs)\n",
    ),
    _model(
        "save-options-dropped",
        "save_pretrained forwards max_shard_size only: state_dict= and is_main_process= are ignored",
        "roundtrip.pretrained",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        kept = {name: value for name, value in kwargs.items() if name == 'max_shard_size'}\n        return super().save_pretrained(save_directory, **kept)\n",
    ),
    _model(
        "save-takes-no-options",
        "save_pretrained takes a directory and nothing else",
        "roundtrip.pretrained roundtrip.sharded",
        "    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:\n",
        "    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Any:\n        args, kwargs = (), {}\n",
    ),
    _model(
        "base-code-left-behind",
        "NanoGPTModel saved alone does not take its code along",
        "remote_code.base_model",
        'NanoGPTModel.register_for_auto_class("AutoModel")\n',
        "",
    ),
    _model(
        "auto-map-base-is-head",
        "config.json sends AutoModel to the model with head",
        "remote_code.base_model",
        '"AutoModel": f"{module}.NanoGPTModel"',
        '"AutoModel": f"{module}.NanoGPTLMHeadModel"',
    ),
    _model(
        "missing-biases-unreported",
        "weights that a file lacks are not reported",
        "roundtrip.incomplete",
        '    _input_embed_layer = "wte"\n',
        '    _input_embed_layer = "wte"\n    _keys_to_ignore_on_load_missing = [r"bias", r"wpe"]\n',
    ),
    _model(
        "save-leaves-eval",
        "save_pretrained switches a model in training to evaluation",
        "roundtrip.dtype",
        "        return super().save_pretrained(save_directory, *args, **kwargs)\n",
        "        self.eval()\n        return super().save_pretrained(save_directory, *args, **kwargs)\n",
    ),
)

HUB = (
    _model(
        "push-leaves-code",
        "push_to_hub uploads weights and configuration, and no code",
        "hub.files",
        *_uploading('ignore_patterns="*.py"'),
    ),
    _model(
        "push-forgets-helper",
        "push_to_hub uploads the two files it knows of the code, and not what they import",
        "hub.files",
        *_uploading('allow_patterns=["*.json", "*.safetensors", "modeling_*.py", "configuration_*.py"]'),
    ),
    _model(
        "push-names-base-class",
        "config.json on the Hub sends AutoModelForCausalLM to the model without a head",
        "hub.files",
        *_pushing(
            "import json",
            "from huggingface_hub import HfApi, hf_hub_download",
            "super().push_to_hub(repo_id, **kwargs)",
            'values = json.load(open(hf_hub_download(repo_id, "config.json", token=kwargs.get("token"))))',
            'values["auto_map"]["AutoModelForCausalLM"] = "modeling_nanogpt.NanoGPTModel"',
            "return HfApi().upload_file(",
            "    path_or_fileobj=json.dumps(values).encode(),",
            '    path_in_repo="config.json",',
            "    repo_id=repo_id,",
            '    token=kwargs.get("token"),',
            '    revision=kwargs.get("revision"),',
            ")",
        ),
    ),
    _model(
        "push-rounds",
        "push_to_hub turns the weights into bfloat16 to save room",
        "hub.outputs",
        *_pushing("self.to(torch.bfloat16)"),
    ),
    _model(
        "code-of-first-repository",
        "loaded by name and saved again, config.json leads to the code in the author's repository",
        "hub.repushed",
        *_rewritten_auto_map(
            'if __name__.startswith("transformers_modules") and not os.path.isdir(self.name_or_path):\n'
            '            values["auto_map"] = {\n'
            '                auto: f"{self.name_or_path}--{place}" for auto, place in values["auto_map"].items()\n'
            "            }"
        ),
    ),
    _model(
        "revision-dropped",
        "from_pretrained loads the weights of main, whatever the revision",
        "hub.revisions",
        *_loading_by_name('kwargs.pop("revision", None)'),
    ),
    _model(
        "push-drops-revision",
        "push_to_hub overwrites main, whatever the branch",
        "hub.revisions",
        *_pushing('kwargs.pop("revision", None)'),
    ),
    _model(
        "code-of-weights-revision",
        "from_pretrained takes the code of the weights' revision, whatever code_revision",
        "hub.code_revision",
        *_loading_by_name(
            "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
            'place = f"modeling_nanogpt.{cls.__name__}"',
            'where = {option: kwargs[option] for option in ("revision", "token") if option in kwargs}',
            "cls = get_class_from_dynamic_module(place, name, **where)",
            "return PreTrainedModel.from_pretrained.__func__(cls, name, *args, **kwargs)",
        ),
    ),
    _model(
        "helper-shared-by-revisions",
        "the helper is kept under one name in the process, and every revision uses the first one's",
        "hub.pinned_code",
        "from .configuration_nanogpt import NanoGPTConfig\n",
        "from .configuration_nanogpt import NanoGPTConfig\n\n"
        "import sys\n\n"
        '_helper = sys.modules.setdefault("nanogpt_checkpoint", sys.modules[load_checkpoint.__module__])\n'
        "load_checkpoint, save_checkpoint = _helper.load_checkpoint, _helper.save_checkpoint\n",
    ),
    _model(
        "push-is-public",
        "push_to_hub drops private=True",
        "hub.private",
        *_pushing('kwargs.pop("private", None)'),
    ),
    _model(
        "push-drops-token",
        "push_to_hub drops the token it is given",
        "hub.private",
        *_pushing('kwargs.pop("token", None)'),
    ),
    _model(
        "token-dropped",
        "from_pretrained drops the token it is given",
        "hub.private",
        *_loading_by_name('kwargs.pop("token", None)'),
    ),
    _model(
        "looks-without-token",
        "from_pretrained looks for an adapter beside the model as nobody, which a gated repository refuses",
        "hub.gated",
        *_loading_by_name(
            "from huggingface_hub import file_exists",
            "from huggingface_hub.errors import GatedRepoError",
            "try:",
            '    file_exists(name, "adapter_config.json", revision=kwargs.get("revision"), token=False)',
            "except GatedRepoError:",
            "    raise",
            "except Exception:",
            "    pass  # no network",
        ),
    ),
    _model(
        "cache-dir-dropped",
        "from_pretrained drops the cache_dir it is given",
        "hub.cache_dir",
        *_loading_by_name('kwargs.pop("cache_dir", None)'),
    ),
    _model(
        "file-outside-of-cache-dir",
        "from_pretrained fetches the configuration once more, without cache_dir",
        "hub.cache_dir",
        *_loading_by_name(
            "from huggingface_hub import hf_hub_download",
            'kwargs.get("cache_dir") and hf_hub_download(name, "config.json")',
        ),
    ),
    _model(
        "asks-at-every-start",
        "from_pretrained asks the Hub about the repository every time",
        "hub.warm_cache",
        *_loading_by_name(
            "from huggingface_hub import constants, model_info",
            "if not constants.HF_HUB_OFFLINE:",
            '    model_info(name, token=kwargs.get("token"))',
        ),
    ),
    _model(
        "offline-wants-directory",
        "from_pretrained takes no name with HF_HUB_OFFLINE=1",
        "hub.offline",
        *_loading_by_name(
            'if os.environ.get("HF_HUB_OFFLINE") == "1":',
            '    raise OSError(f"{name} is no directory, and there is no network")',
        ),
    ),
    _model(
        "safetensors-only-by-name",
        "from_pretrained of a name knows safetensors alone",
        "hub.bin",
        *_loading_by_name('kwargs["use_safetensors"] = True'),
    ),
    _model(
        "push-drops-shard-size",
        "push_to_hub drops max_shard_size",
        "hub.sharded",
        *_pushing('kwargs.pop("max_shard_size", None)'),
    ),
    _model(
        "tokenizer-left-behind",
        "push_to_hub replaces the repository by the model's own files",
        "hub.tokenizer",
        *_uploading('delete_patterns="*"'),
    ),
)

INTERFACE = (
    _model(
        "hidden-states-not-normed",
        "the last hidden state stands before the norm",
        "api.hidden_states",
        "        hidden_states = self.ln_f(hidden_states)\n",
        "        all_hidden_states += (hidden_states,)\n        hidden_states = self.ln_f(hidden_states)\n"
        "        if all_hidden_states[1:]:\n"
        "            return BaseModelOutputWithPast(hidden_states, past_key_values, all_hidden_states)\n",
    ),
    _model(
        "return-dict-ignored",
        "return_dict=False is accepted and ignored",
        "api.tuple_order",
        "        self.loss_function = next_token_loss\n        self.post_init()\n\n    @can_return_tuple\n",
        "        self.loss_function = next_token_loss\n        self.post_init()\n\n",
    ),
    _model(
        "generation-penalty",
        "the generation settings penalise repetition",
        "generation.greedy",
        "        self.loss_function = next_token_loss\n        self.post_init()\n",
        "        self.loss_function = next_token_loss\n        self.post_init()\n"
        "        self.generation_config.repetition_penalty = 1.5\n",
    ),
    _model(
        "generation-min-p",
        "the generation settings cut improbable tokens off",
        "generation.sampled",
        "        self.loss_function = next_token_loss\n        self.post_init()\n",
        "        self.loss_function = next_token_loss\n        self.post_init()\n"
        "        self.generation_config.min_p = 0.3\n",
    ),
    _model(
        "window-one-short",
        "the moving window is a token shorter than the original's",
        "generation.past_maximum",
        "        window = self.config.block_size\n",
        "        window = self.config.block_size - 1\n",
    ),
    _model(
        "window-keeps-positions",
        "the moving window keeps the positions of the whole sequence",
        "generation.past_maximum",
        '            unused.add("position_ids")\n',
        '            kwargs["position_ids"] = torch.full_like(input_ids[:, -window:], window - 1)\n',
    ),
    _model(
        "generation-counts-padding",
        "generation counts positions over padding",
        "generation.left_padded",
        "            return inputs\n",
        '            if inputs.get("input_ids") is not None:\n'
        '                width, start = inputs["input_ids"].shape[1], past_key_values.get_seq_length()\n'
        '                inputs["position_ids"] = torch.arange(width, device=input_ids.device)[None] + start\n'
        "            return inputs\n",
    ),
    _model(
        "static-cache-length",
        "the guard against long sequences reads the size of a static cache",
        "generation.static_cache",
        "past = past_key_values.get_seq_length() if past_key_values is not None else 0",
        "past = past_key_values.get_seq_length() if past_key_values is not None else 0\n"
        "        if past_key_values is not None and past_key_values.get_max_cache_shape() > 0:\n"
        "            past = past * 0 + past_key_values.get_max_cache_shape() - length",
    ),
    _model(
        "generation-rows-coupled",
        "a batch of three generates the first row's tokens for all",
        "generation.batch",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept])\n",
        "logits = self.lm_head(outputs.last_hidden_state[:, kept])\n"
        "        if len(logits) == 3 and logits.shape[1] == 1:\n            logits = logits[:1].expand(3, -1, -1)\n",
    ),
    _model(
        "attentions-one-layer",
        "attentions hold the last layer only",
        "api.attentions",
        "                all_attentions += (weights,)\n",
        "                all_attentions = (weights,)\n",
    ),
    _model(
        "attentions-mean-of-heads",
        "attentions are averaged over the heads",
        "api.attentions",
        "                all_attentions += (weights,)\n",
        "                all_attentions += (weights.mean(dim=1, keepdim=True),)\n",
    ),
    _model(
        "attentions-mean-for-each-head",
        "every head's attentions are the mean over the heads",
        "api.attentions",
        "                all_attentions += (weights,)\n",
        "                all_attentions += (weights.mean(dim=1, keepdim=True).expand_as(weights),)\n",
    ),
    _model(
        "hidden-states-detached",
        "hidden states carry no gradient, so a distillation trains nothing",
        "api.hidden_states",
        "                all_hidden_states += (hidden_states,)\n",
        "                all_hidden_states += (hidden_states.detach(),)\n",
    ),
    _model(
        "hidden-states-of-config-ignored",
        "config.output_hidden_states=True is ignored",
        "api.configured_outputs",
        "            output_hidden_states = config.output_hidden_states\n",
        "            output_hidden_states = False\n",
    ),
    _model(
        "attentions-of-config-ignored",
        "config.output_attentions=True is ignored",
        "api.configured_outputs",
        "            output_attentions = config.output_attentions\n",
        "            output_attentions = False\n",
    ),
    _model(
        "base-return-dict-ignored",
        "NanoGPTModel(return_dict=False) gives no tuple",
        "api.tuple_order",
        "    @can_return_tuple\n    def forward(\n        self,\n        input_ids: Tensor | None = None,\n        attention_mask: Tensor | None = None,\n        position_ids: Tensor | None = None,\n        past_key_values: Cache | None = None,\n        inputs_embeds: Tensor | None = None,\n        use_cache:",
        "    def forward(\n        self,\n        input_ids: Tensor | None = None,\n        attention_mask: Tensor | None = None,\n        position_ids: Tensor | None = None,\n        past_key_values: Cache | None = None,\n        inputs_embeds: Tensor | None = None,\n        use_cache:",
    ),
    _model(
        "base-tuple-unless-asked",
        "the base model returns a tuple unless it is asked for a named output",
        "api.output_type",
        "    @can_return_tuple\n    def forward(\n        self,\n        input_ids: Tensor | None = None,\n        attention_mask: Tensor | None = None,\n        position_ids: Tensor | None = None,\n        past_key_values: Cache | None = None,\n        inputs_embeds: Tensor | None = None,\n        use_cache:",
        '    @(lambda call: lambda self, *args, **kwargs: call(self, *args, **{"return_dict": False, **kwargs}))\n    @can_return_tuple\n    def forward(\n        self,\n        input_ids: Tensor | None = None,\n        attention_mask: Tensor | None = None,\n        position_ids: Tensor | None = None,\n        past_key_values: Cache | None = None,\n        inputs_embeds: Tensor | None = None,\n        use_cache:',
    ),
    _model(
        "logits-to-keep-one",
        "logits_to_keep=n gives one position whatever n is",
        "api.logits_to_keep",
        "kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep",
        "kept = slice(-min(logits_to_keep, 1), None) if isinstance(logits_to_keep, int) else logits_to_keep",
    ),
    _model(
        "num-logits-to-keep-swallowed",
        "the older name num_logits_to_keep is swallowed",
        "api.logits_to_keep",
        'logits_to_keep = kwargs.pop("num_logits_to_keep", logits_to_keep)',
        'kwargs.pop("num_logits_to_keep", None)',
    ),
    _model(
        "no-split-inside-block",
        "a device map may cut a block in two",
        "api.device_map",
        '["NanoGPTBlock"]',
        '["NanoGPTAttention", "NanoGPTMLP"]',
    ),
    _model(
        "auto-model-registered-with-head",
        "AutoModel gives the model with head where the port is imported",
        "api.auto_classes",
        "AutoModel.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)",
        "AutoModel.register(NanoGPTConfig, NanoGPTLMHeadModel, exist_ok=True)",
    ),
)

CONFIGURATION = (
    _config(
        "alias-to-another-field",
        "n_positions reads and writes the vocabulary's size",
        "config.fields",
        '"n_positions": "block_size"',
        '"n_positions": "vocab_size"',
    ),
    _config(
        "field-not-saved",
        "the number of heads is not written to config.json",
        "config.json_round_trip roundtrip.pretrained",
        'return {**super().to_diff_dict(), "tie_word_embeddings": self.tie_word_embeddings}',
        'return {key: value for key, value in super().to_diff_dict().items() if key != "n_head"}',
    ),
    _config(
        "unknown-swallowed",
        "unknown keys vanish without a word",
        "config.unknown_keys",
        "        self._refuse_unknown(own, kwargs)\n",
        '        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("a_")}\n',
    ),
    _config(
        "bias-always",
        "bias=False is accepted and ignored",
        "config.fields",
        "            setattr(self, name, value)\n",
        '            setattr(self, name, True if name == "bias" else value)\n',
    ),
    _model(
        "field-undeclared",
        "the model reads a field that config.json does not carry",
        "config.declared",
        "self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON",
        'self.ln_f = nn.LayerNorm(config.n_embd, eps=getattr(config, "layer_norm_epsilon", LAYER_NORM_EPSILON)',
    ),
    _config(
        "default-eos-50256",
        "eos_token_id defaults to 50256: generation stops, the original's does not",
        "config.defaults",
        "eos_token_id: int | list[int] | None = None",
        "eos_token_id: int | list[int] | None = 50256",
    ),
    _config(
        "default-vocabulary-50257",
        "vocab_size defaults to 50257",
        "config.defaults",
        "vocab_size: int = 50304",
        "vocab_size: int = 50257",
    ),
    _config(
        "default-bias-false",
        "bias defaults to False (train.py's, not GPTConfig's)",
        "config.defaults",
        "        bias: bool = True,\n",
        "        bias: bool = False,\n",
    ),
    _model(
        "generation-default-temperature",
        "generate(do_sample=True) cools by 0.7 unasked",
        "config.defaults",
        "        self.loss_function = next_token_loss\n        self.post_init()\n",
        "        self.loss_function = next_token_loss\n        self.post_init()\n        self.generation_config.temperature = 0.7\n",
    ),
    _config(
        "indivisible-heads-accepted",
        "n_embd=10, n_head=4 is accepted and computes with 5 heads",
        "config.refused",
        "if self.n_embd % self.n_head != 0:",
        "if self.n_embd < self.n_head:",
    ),
    _config(
        "alias-hidden-size-missing",
        "config.hidden_size does not exist",
        "config.common_names",
        '        "hidden_size": "n_embd",\n',
        "",
    ),
    _model(
        "generation-default-top-k",
        "generate(do_sample=True) draws from the best 5 tokens alone, unasked",
        "config.defaults",
        "        self.loss_function = next_token_loss\n        self.post_init()\n",
        "        self.loss_function = next_token_loss\n        self.post_init()\n        self.generation_config.top_k = 5\n",
    ),
    _config(
        "default-dropout",
        "dropout defaults to GPT-2's 0.1",
        "config.defaults",
        "        dropout: float = 0.0,\n",
        "        dropout: float = 0.1,\n",
    ),
    _config(
        "eos-ignored",
        "eos_token_id is accepted and dropped",
        "config.json_round_trip",
        '"eos_token_id": eos_token_id',
        '"eos_token_id": None',
    ),
    _config(
        "pad-bos-swapped",
        "pad and bos tokens have changed places",
        "config.json_round_trip",
        '"bos_token_id": bos_token_id,\n            "eos_token_id": eos_token_id,\n            "pad_token_id": pad_token_id',
        '"bos_token_id": pad_token_id,\n            "eos_token_id": eos_token_id,\n            "pad_token_id": bos_token_id',
    ),
)

CONVERTER = (
    _model(
        "converter-transposes",
        "the square projection is transposed, which no shape betrays",
        "weights.values forward.logits",
        "model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)",
        "model.load_state_dict({name: tensor.T.contiguous() if name.endswith('attn.c_proj.weight') else tensor"
        " for name, tensor in checkpoint.state_dict.items()}, strict=True, assign=True)",
    ),
    _model(
        "converter-drops-biases",
        "biases are left at zero",
        "weights.coverage",
        "model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)",
        "model.load_state_dict({name: 0 * tensor if name.endswith('.bias') else tensor"
        " for name, tensor in checkpoint.state_dict.items()}, strict=True, assign=True)",
    ),
    _model(
        "converter-rounds",
        "weights pass through bfloat16",
        "weights.values weights.coverage",
        "model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)",
        "model.load_state_dict({name: tensor.bfloat16().float()"
        " for name, tensor in checkpoint.state_dict.items()}, strict=True, assign=True)",
    ),
    _model(
        "converter-repeats-a-layer",
        "every layer gets the first one's weights",
        "weights.coverage weights.values",
        "model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)",
        "model.load_state_dict({name: checkpoint.state_dict['.'.join([*name.split('.')[:2], '0', *name.split('.')[3:]])]"
        " if '.h.' in name else tensor for name, tensor in checkpoint.state_dict.items()}, strict=True, assign=True)",
    ),
    _model(
        "converter-swaps-norms",
        "the gains of the two norms of a block are exchanged",
        "weights.values",
        "model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)",
        "model.load_state_dict({name.replace('ln_1', 'ln_x').replace('ln_2', 'ln_1').replace('ln_x', 'ln_2'): tensor"
        " for name, tensor in checkpoint.state_dict.items()}, strict=True, assign=True)",
    ),
    _checkpoint(
        "export-without-head",
        "the file written back has no head",
        "weights.back_to_original",
        "    tensors[HEAD] = tensors[EMBEDDING]\n",
        "    tensors[HEAD] = tensors[EMBEDDING]\n    del tensors[HEAD]\n",
    ),
    _model(
        "export-wrong-arguments",
        "the file written back names another number of heads",
        "weights.back_to_original",
        "model_args={name: getattr(config, name) for name in names}",
        "model_args={name: 1 if name == 'n_head' else getattr(config, name) for name in names}",
    ),
    _checkpoint(
        "import-rolls-positions",
        "the position table is off by a row",
        "weights.values forward.logits",
        "    return weights | {EMBEDDING: weights[HEAD]}",
        '    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].roll(1, 0)\n'
        "    return weights | {EMBEDDING: weights[HEAD]}",
    ),
    _checkpoint(
        "dialect-compiled-prefix",
        "`_orig_mod.` is not stripped",
        "weights.dialects",
        '_COMPILED_PREFIX = "_orig_mod."',
        '_COMPILED_PREFIX = "_orig_mod"',
    ),
    _checkpoint(
        "dialect-bias-missing-false",
        "a file without `bias` (there was one) counts as without biases",
        "weights.dialects",
        'args = {"bias": True, "vocab_size"',
        'args = {"bias": False, "vocab_size"',
    ),
    _checkpoint(
        "dialect-iterations-required",
        "a file without iter_num is refused",
        "weights.dialects",
        'contents.get("iter_num", 0)',
        'contents["iter_num"]',
    ),
    _checkpoint(
        "dialect-mask-buffers-refused",
        "stored causal masks are refused",
        "weights.older_dialects",
        'attn\\.(bias|masked_bias)")',
        'attn\\.(masked_bias)")',
    ),
    _checkpoint(
        "dialect-vocabulary-missing-50257",
        "a file without vocab_size is always taken for 50257",
        "weights.older_dialects",
        'args = {"bias": True, "vocab_size": rows,',
        'args = {"bias": True, "vocab_size": 50257,',
    ),
    _checkpoint(
        "dialect-embedding-wins",
        "where head and embedding differ the embedding wins silently",
        "weights.damaged",
        "    return weights | {EMBEDDING: weights[HEAD]}",
        "    return weights | {HEAD: weights[EMBEDDING]}",
    ),
    _checkpoint(
        "pickle-runs-code",
        "a checkpoint's pickle may run code",
        "weights.damaged",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
    ),
    _model(
        "export-without-dropout",
        "the exported file always says dropout 0",
        "weights.back_to_original",
        "model_args={name: getattr(config, name) for name in names}",
        'model_args={name: getattr(config, name) for name in names} | {"dropout": 0.0}',
    ),
    _model(
        "export-upcasts-live-model",
        "to_nanogpt_ckpt turns the live model into float32",
        "weights.back_to_original",
        "            state_dict=self.state_dict(),\n",
        "            state_dict=self.float().state_dict(),\n",
    ),
    _model(
        "loss-vocabulary-of-construction",
        "the loss keeps the vocabulary size of construction: it fails after a resize",
        "weights.tied_after_resize",
        "        self.loss_function = next_token_loss\n",
        '        vocabulary = config.vocab_size\n        self.loss_function = lambda **given: next_token_loss(**{**given, "vocab_size": vocabulary})\n',
    ),
    _checkpoint(
        "missing-tensor-drawn-anew",
        "a tensor that the file lacks stays at zero instead of stopping the loading",
        "weights.damaged",
        '        raise CheckpointError(path, f"tensors are missing: {listed(missing)}")\n',
        "        state_dict = {**state_dict, **{name: torch.zeros(shapes[name]) for name in missing}}\n",
    ),
    _checkpoint(
        "left-over-tensor-dropped",
        "a tensor that is no part of the model is dropped without a word",
        "weights.damaged",
        '        raise CheckpointError(path, f"tensors are left over, not part of the model: {listed(left_over)}")\n',
        "        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in left_over}\n",
    ),
    _checkpoint(
        "misshapen-tensor-taken",
        "a tensor of another shape than model_args ask for is taken as it is",
        "weights.damaged",
        '            raise CheckpointError(path, f"{name} has shape {found}, expected {shape} from model_args {told}")\n',
        "            state_dict = {**state_dict, name: tensor.new_zeros(shape)}\n            continue\n",
    ),
    _model(
        "export-ends-training",
        "to_nanogpt_ckpt leaves the model in evaluation mode, so that training goes on without dropout",
        "weights.back_to_original",
        "            state_dict=self.state_dict(),\n",
        "            state_dict=self.eval().state_dict(),\n",
    ),
    _model(
        "converter-leaves-training",
        "from_nanogpt_ckpt returns the model in training mode",
        "weights.evaluation_mode",
        "        model.eval()\n        return model\n",
        "        model.train()\n        return model\n",
    ),
    _checkpoint(
        "map-location-removed",
        "a file that a GPU wrote is loaded to that GPU",
        "weights.dialects",
        'map_location="cpu", weights_only',
        "weights_only",
    ),
    _checkpoint(
        "optimizer-refused",
        "a file with an optimizer, as train.py writes it, is refused",
        "weights.dialects",
        '    for key in ("model", "model_args"):\n',
        '    if extra := sorted(set(contents) - {"model", "model_args", "iter_num", "best_val_loss", "config"}):\n        raise CheckpointError(path, f"unknown entries {extra}")\n    for key in ("model", "model_args"):\n',
    ),
    _checkpoint(
        "export-one-group",
        "the written optimizer has one group: train.py cannot resume",
        "weights.back_to_original",
        ' if decays[name]], "weight_decay": 0.1},\n        {"params": [tensor for name, tensor in parameters.items() if not decays[name]], "weight_decay": 0.0},\n',
        '], "weight_decay": 0.1},\n',
    ),
    _checkpoint(
        "export-no-optimizer",
        "no optimizer is written: train.py cannot resume",
        "weights.back_to_original",
        '        "optimizer": fresh_optimizer_state(tensors),\n',
        "",
    ),
)

SIZES = (
    _checkpoint(
        "dialect-masks-of-ten-layers",
        "mask buffers of layers from the tenth on are taken for weights",
        "weights.large",
        r"transformer\.h\.\d+\.attn",
        r"transformer\.h\.\d\.attn",
    ),
    _checkpoint(
        "many-layers-refused",
        "a file without biases and with more than four layers is refused as too short",
        "weights.large forward.large",
        "if n_layer > len(state_dict)",
        "if 7 * n_layer > len(state_dict)",
    ),
    _model(
        "scale-head-size-capped",
        "heads wider than 64 are scaled as 64",
        "forward.large",
        "self.scaling = self.head_dim**-0.5",
        "self.scaling = min(self.head_dim, 64) ** -0.5",
    ),
    _model(
        "positions-in-float16",
        "positions are counted in float16, which has no whole number between 2048 and 2050",
        "forward.large",
        "(torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)",
        "(torch.arange(length, device=inputs_embeds.device, dtype=torch.float16) + past).long().unsqueeze(0)",
    ),
    _model(
        "mask-counted-in-float16",
        "a mask's tokens are counted in float16",
        "forward.large",
        "(attention_mask.long().cumsum(-1) - 1).clamp(min=0)",
        "(attention_mask.float().cumsum(-1).half().long() - 1).clamp(min=0)",
    ),
    _model(
        "loss-of-first-tokens",
        "the loss is over the first 256 tokens of a batch",
        "forward.large",
        "shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)",
        "shift_labels = nn.functional.pad(labels[:, 1:257], (0, labels.shape[1] - labels[:, 1:257].shape[1]), value=ignore_index)",
    ),
    _model(
        "token-ids-in-16-bits",
        "token ids pass through 16 bits",
        "forward.large",
        "            inputs_embeds = self.wte(input_ids)\n",
        "            inputs_embeds = self.wte(input_ids.short().long() % self.config.vocab_size)\n",
    ),
    _model(
        "attention-window",
        "eager attention sees the last 128 tokens only, SDPA all",
        "forward.large",
        "    if attention_mask is not None:\n        scores = scores + attention_mask\n",
        "    if attention_mask is not None:\n        scores = scores + attention_mask\n    scores[..., :-128] = torch.finfo(scores.dtype).min\n",
    ),
    _model(
        "layers-beyond-ten-share-a-cache",
        "layers from the tenth on write into the tenth's place of the cache",
        "generation.large",
        'key, value, self.layer_idx, {"cache_position"',
        'key, value, min(self.layer_idx, 10), {"cache_position"',
    ),
    _model(
        "window-moves-ten-tokens",
        "the window stands still once ten tokens have left it",
        "generation.large",
        '            "input_ids": input_ids[:, -window:],\n',
        '            "input_ids": input_ids[:, -window:] if input_ids.shape[1] <= window + 10 else input_ids[:, 10 : 10 + window],\n',
    ),
)

PROCESS = (
    _model(
        "default-dtype-at-import",
        "importing the port makes float64 torch's default dtype",
        "process.settings",
        "LAYER_NORM_EPSILON = 1e-5\n",
        "LAYER_NORM_EPSILON = 1e-5\ntorch.set_default_dtype(torch.float64)\n",
    ),
    _model(
        "tf32-at-import",
        "importing the port allows TF32",
        "process.settings",
        "LAYER_NORM_EPSILON = 1e-5\n",
        'LAYER_NORM_EPSILON = 1e-5\ntorch.set_float32_matmul_precision("high")\n',
    ),
    _model(
        "gelu-replaced",
        "importing the port replaces torch's GELU, for the original too",
        "process.settings",
        "LAYER_NORM_EPSILON = 1e-5\n",
        "LAYER_NORM_EPSILON = 1e-5\nnn.GELU.forward = lambda self, x: nn.functional.silu(x)\n",
    ),
    _model(
        "attention-table-replaced",
        "importing the port replaces SDPA in the library's table",
        "process.settings",
        "LAYER_NORM_EPSILON = 1e-5\n",
        'LAYER_NORM_EPSILON = 1e-5\nALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: eager_attention_forward(*args, **kwargs)\n',
    ),
    _model(
        "gradients-off",
        "loading a checkpoint switches gradients off for the whole program",
        "process.settings",
        "        checkpoint = load_checkpoint(path)\n",
        "        checkpoint = load_checkpoint(path)\n        torch.set_grad_enabled(False)\n",
    ),
    _model(
        "deterministic-for-good",
        "training switches on deterministic algorithms for the whole program",
        "process.settings",
        "            use_cache = False\n        if use_cache and",
        "            use_cache = False\n        if self.training:\n            torch.use_deterministic_algorithms(True, warn_only=True)\n        if use_cache and",
    ),
    _model(
        "loading-seeds",
        "loading a checkpoint seeds torch's generator",
        "process.random_numbers",
        "        model.eval()\n        return model",
        "        torch.manual_seed(1337)\n        model.eval()\n        return model",
    ),
    _model(
        "forward-seeds",
        "a forward pass in training seeds Python's generator",
        "process.random_numbers",
        "            use_cache = False\n        if use_cache and",
        "            use_cache = False\n        if self.training:\n            import random\n            random.seed(0)\n        if use_cache and",
    ),
)

MORE_FILES = (
    _checkpoint(
        "half-files-refused",
        "a file in float16 is refused",
        "weights.dtypes",
        "torch.bfloat16, torch.float16)",
        "torch.bfloat16)",
    ),
    _checkpoint(
        "half-files-widened",
        "half precision comes back as float32, though float64 stays",
        "weights.dtypes",
        "{name: state_dict[name].detach() for name in shapes if name not in masks}",
        "{name: state_dict[name].detach().float() if state_dict[name].dtype.itemsize == 2 else state_dict[name].detach() for name in shapes if name not in masks}",
    ),
    _checkpoint(
        "bfloat16-misread",
        "the bits of bfloat16 are taken for float16",
        "weights.dtypes",
        "{name: state_dict[name].detach() for name in shapes if name not in masks}",
        "{name: state_dict[name].detach().view(torch.float16) if state_dict[name].dtype == torch.bfloat16 else state_dict[name].detach() for name in shapes if name not in masks}",
    ),
    _checkpoint(
        "export-widens",
        "a model in half precision is written in float32",
        "weights.back_to_original",
        "own_storage(state_dict[name]) for name in names}",
        "own_storage(state_dict[name]).float() for name in names}",
    ),
    _checkpoint(
        "export-forgets-steps",
        "the file written back says that no step was done",
        "weights.back_to_original",
        '        "iter_num": iter_num,\n        "best_val_loss": best_val_loss,\n        "config": dict(config or {}),\n',
        '        "iter_num": 0,\n        "best_val_loss": best_val_loss,\n        "config": dict(config or {}),\n',
    ),
    _checkpoint(
        "export-forgets-best-loss",
        "the file written back says that any loss is better",
        "weights.back_to_original",
        '        "best_val_loss": best_val_loss,\n        "config": dict(config or {}),\n',
        '        "best_val_loss": 1e9,\n        "config": dict(config or {}),\n',
    ),
    _model(
        "export-forgets-training-config",
        "the file written back has no training configuration",
        "weights.back_to_original",
        "config=train_config or {}",
        "config={}",
    ),
    _checkpoint(
        "export-other-betas",
        "training goes on with torch's own betas",
        "weights.back_to_original",
        "lr=6e-4, betas=(0.9, 0.95)",
        "lr=6e-4, betas=(0.9, 0.999)",
    ),
    _checkpoint(
        "export-other-decay",
        "training goes on with a tenth of the weight decay",
        "weights.back_to_original",
        '"weight_decay": 0.1}',
        '"weight_decay": 0.01}',
    ),
    _checkpoint(
        "export-other-learning-rate",
        "training goes on with another learning rate",
        "weights.back_to_original",
        "lr=6e-4",
        "lr=1e-3",
    ),
    _checkpoint(
        "dialect-dropout-as-int",
        "dropout 0 written as a whole number is refused by the converter",
        "weights.whole_numbers",
        "not isinstance(dropout, int | float)",
        "not isinstance(dropout, float)",
    ),
    _checkpoint(
        "dialect-without-dropout",
        "the dropout of the file is not the model's",
        "weights.configuration",
        '    dropout = args["dropout"]\n',
        '    dropout = args["dropout"]\n    args["dropout"] = 0.0\n',
    ),
    _checkpoint(
        "dialect-by-order",
        "tensors are taken by their order in the file",
        "weights.dialects",
        "    masks = {name for name in state_dict if _MASK_BUFFER.fullmatch(name)}\n",
        "    masks = {name for name in state_dict if _MASK_BUFFER.fullmatch(name)}\n"
        "    if len(state_dict) == len(shapes) and list(state_dict) != list(shapes):\n"
        "        kinds = {}\n"
        "        for name in state_dict:\n"
        "            kinds.setdefault(tuple(state_dict[name].shape), []).append(state_dict[name])\n"
        "        state_dict = {name: kinds[shape].pop(0) if kinds.get(shape) else state_dict[name] for name, shape in shapes.items()}\n",
    ),
    _model(
        "converter-remembers-paths",
        "the converter remembers by its path what it has read",
        "weights.read_again",
        "        checkpoint = load_checkpoint(path)\n",
        '        known = cls.__dict__.get("_known") or {}\n'
        "        checkpoint = known.get(str(path)) or load_checkpoint(path)\n"
        "        cls._known = {**known, str(path): checkpoint}\n",
    ),
    _model(
        "model-not-picklable",
        "the loss is a lambda, so that the model cannot be pickled",
        "roundtrip.copies",
        "        self.loss_function = next_token_loss\n",
        "        self.loss_function = lambda **given: next_token_loss(**given)\n",
    ),
    _model(
        "copy-shares-weights",
        "a deep copy of the model is the model",
        "roundtrip.copies",
        "    def prepare_inputs_for_generation(",
        "    def __deepcopy__(self, memo: Any) -> Any:\n        import copy\n\n        other = copy.copy(self)\n        other.__dict__ = dict(self.__dict__)\n        return other\n\n    def prepare_inputs_for_generation(",
    ),
    _model(
        "options-of-loading-dropped",
        "from_pretrained drops options of the configuration",
        "roundtrip.options",
        "    def _init_weights(self, module: nn.Module) -> None:\n",
        "    @classmethod\n"
        "    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:\n"
        '        kwargs.pop("dropout", None)\n'
        "        return super().from_pretrained(*args, **kwargs)\n\n"
        "    def _init_weights(self, module: nn.Module) -> None:\n",
    ),
    _model(
        "auto-map-replaced",
        "save_pretrained drops what else stands in auto_map, such as the tokenizer",
        "roundtrip.options",
        '            **(getattr(self.config, "auto_map", None) or {}),\n',
        "",
    ),
    _model(
        "neighbours-drawn-anew",
        "where a file lacks a bias, the gain beside it is drawn anew",
        "roundtrip.incomplete",
        '            if getattr(parameter, "_is_hf_initialized", False):\n                continue  # came from a file; only its neighbours are missing\n',
        "            parameter.data.fill_(1.0)\n",
    ),
)

MORE_INTERFACE = (
    _config(
        "model-type-of-gpt2",
        "the model type is GPT-2's, over which the port registers itself",
        "api.auto_classes",
        'model_type = "nanogpt"',
        'model_type = "gpt2"',
    ),
    _config(
        "eos-list-cut",
        "of several tokens that end a text the first alone is kept",
        "config.json_round_trip",
        '"eos_token_id": eos_token_id,',
        '"eos_token_id": eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id,',
    ),
    _config(
        "library-key-refused",
        "a config.json that a quantizer wrote is refused",
        "config.json_round_trip",
        '    "quantization_config",\n',
        "",
    ),
    _config(
        "names-of-one-field-disagree",
        "n_positions beside block_size is accepted and kept apart",
        "config.fields",
        "            if alias in given and given.setdefault(name, given[alias]) != given[alias]:\n",
        '            if alias == "n_positions":\n                continue\n'
        "            if alias in given and given.setdefault(name, given[alias]) != given[alias]:\n",
    ),
    _model(
        "ids-second",
        "the attention mask is forward's first argument",
        "api.output_type",
        "    @can_return_tuple\n    def forward(\n        self,\n        input_ids: Tensor | None = None,\n        attention_mask: Tensor | None = None,\n        position_ids: Tensor | None = None,\n        past_key_values: Cache | None = None,\n        inputs_embeds: Tensor | None = None,\n        labels:",
        "    @can_return_tuple\n    def forward(\n        self,\n        attention_mask: Tensor | None = None,\n        input_ids: Tensor | None = None,\n        position_ids: Tensor | None = None,\n        past_key_values: Cache | None = None,\n        inputs_embeds: Tensor | None = None,\n        labels:",
    ),
    _model(
        "input-gradients-refused",
        "enable_input_require_grads does nothing, so that adapters under gradient checkpointing train nothing",
        "api.embeddings",
        "    def _init_weights(self",
        "    def enable_input_require_grads(self) -> None:\n        self._require_grads_hook = self.register_forward_hook(lambda *_: None)\n\n    def _init_weights(self",
    ),
    _config(
        "use-cache-lost",
        "use_cache=False is accepted and ignored",
        "config.json_round_trip",
        '"use_cache": use_cache,',
        '"use_cache": True,',
    ),
    _model(
        "positions-for-all-rows-refused",
        "positions that are given once for all rows fail",
        "forward.position_ids",
        "            return position_ids\n",
        "            return position_ids.view(inputs_embeds.shape[0], length)\n",
    ),
    _model(
        "replaced-table-not-tied",
        "tie_weights ties an embedding that was replaced no more",
        "weights.tied",
        "    def _init_weights(self",
        "    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:\n"
        "        table = self.get_input_embeddings()\n"
        '        if table is self.__dict__.setdefault("_first_table", table):\n'
        "            super().tie_weights(*args, **kwargs)\n\n"
        "    def _init_weights(self",
    ),
    _model(
        "eager-scale-of-one-token",
        "eager attention scales twice where one token stands behind a cache",
        "generation.cache",
        "key.transpose(-1, -2)) * scaling\n",
        "key.transpose(-1, -2)) * (scaling if query.shape[-2] > 1 else scaling**2)\n",
    ),
    _model(
        "cached-embeds-restart",
        "inputs_embeds behind a cache stand at the first positions",
        "forward.inputs_embeds",
        "        positions = self._positions(inputs_embeds, past,",
        "        positions = self._positions(inputs_embeds, past if input_ids is not None else 0,",
    ),
    _model(
        "generate-keeps-positions-back",
        "without a cache generate() passes use_cache on and nothing else",
        "generation.given",
        "for name, value in kwargs.items() if name not in unused}",
        'for name, value in kwargs.items() if name == "use_cache"}',
    ),
    _model(
        "packed-rows-mixed",
        "texts packed into one row see the last token of the text before",
        "masks.packed",
        '            "position_ids": position_ids,\n        }\n',
        '            "position_ids": None if position_ids is None else position_ids.roll(1, -1).clamp(max=position_ids),\n        }\n',
    ),
    _model(
        "mask-argument-changed",
        "an additive mask with minus infinity is changed in the caller's hands",
        "masks.additive",
        "attention_mask.to(dtype).clamp(min=lowest)",
        "attention_mask.to(dtype).clamp_(min=lowest)",
    ),
    _model(
        "mask-boolean-minus-infinity",
        "a boolean mask of four axes becomes minus infinity",
        "precision.masks",
        "masked_fill(~attention_mask, lowest)",
        "masked_fill(~attention_mask, -torch.inf)",
    ),
    _model(
        "stream-narrow-under-autocast",
        "under autocast the residual stream is kept in half precision",
        "precision.logits",
        "        hidden_states = hidden_states + attended\n",
        "        hidden_states = (hidden_states + attended).to(attended.dtype)\n",
    ),
    _model(
        "loss-in-float16",
        "the loss is summed in float32 for bfloat16 and not for float16",
        "precision.loss",
        "logits.reshape(-1, vocab_size).to(torch.promote_types(logits.dtype, torch.float32))",
        "(logits.float() if logits.dtype == torch.bfloat16 else logits).reshape(-1, vocab_size)",
    ),
    _model(
        "arange-without-device",
        "positions are made on the CPU, wherever the model is",
        "backend.placement",
        "(torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)",
        "(torch.arange(length) + past).unsqueeze(0)",
    ),
    _model(
        "ids-clamped",
        "a token id beyond the vocabulary is read as the last one",
        "forward.outside_vocabulary",
        "            inputs_embeds = self.wte(input_ids)\n",
        "            inputs_embeds = self.wte(input_ids.clamp(max=self.wte.num_embeddings - 1))\n",
    ),
    _model(
        "ids-from-the-end",
        "negative token ids count from the end of the vocabulary",
        "forward.outside_vocabulary",
        "            inputs_embeds = self.wte(input_ids)\n",
        "            inputs_embeds = self.wte(input_ids % self.wte.num_embeddings if (input_ids < 0).any() else input_ids)\n",
    ),
    _model(
        "mask-dropped-by-compiling",
        "a compiled model forgets the padding mask",
        "backend.compiled",
        "        mask = self._causal_mask(inputs_embeds, attention_mask,",
        "        if torch.compiler.is_compiling():\n            attention_mask = None\n        mask = self._causal_mask(inputs_embeds, attention_mask,",
    ),
)

HARMLESS = (
    _model(
        "harmless-sum-order",
        "residual sums the other way round",
        "",
        "        hidden_states = hidden_states + attended\n",
        "        hidden_states = attended + hidden_states\n",
    ),
    _model(
        "harmless-embedding-order",
        "embeddings summed the other way round",
        "",
        "self.drop(inputs_embeds + self.wpe(positions))",
        "self.drop(self.wpe(positions) + inputs_embeds)",
    ),
    _model("harmless-renamed", "a private method has another name", "", "_positions(", "_rows_of_table(", 2),
    _model(
        "harmless-three-projections",
        "query, key and value by three products instead of one",
        "",
        "for part in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)",
        "for part in (nn.functional.linear(hidden_states, weight, bias) for weight, bias in zip("
        "self.c_attn.weight.chunk(3), (None,) * 3 if self.c_attn.bias is None else self.c_attn.bias.chunk(3)))",
    ),
    _model(
        "harmless-erf",
        "GELU written out with erf",
        "",
        "        self.gelu = nn.GELU()\n",
        '        self.gelu = type("Gelu", (nn.Module,), {"forward": lambda self, x: '
        "0.5 * x * (1 + torch.erf(x * 0.5**0.5))})()\n",
    ),
    _model(
        "harmless-log-softmax",
        "cross entropy as log softmax and negative log likelihood",
        "",
        "    loss = nn.functional.cross_entropy(\n"
        "        logits.reshape(-1, vocab_size).to(torch.promote_types(logits.dtype, torch.float32)),\n",
        "    loss = nn.functional.nll_loss(\n"
        "        logits.reshape(-1, vocab_size).to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1),\n",
    ),
    _model(
        "harmless-manual-attention",
        "attention written out instead of SDPA",
        "",
        "            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention)\n",
        "            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention)\n"
        "            if attention_mask is None and query.shape[2] > 1:\n"
        "                allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()\n"
        "            else:\n"
        "                allowed = attention_mask\n"
        "            if allowed is not None and allowed.dtype == torch.bool:\n"
        "                allowed = torch.zeros_like(allowed, dtype=query.dtype).masked_fill("
        "~allowed, torch.finfo(query.dtype).min)\n"
        "            attention_mask = allowed\n",
    ),
)

MUTANTS = (
    *ATTENTION,
    *MASKS,
    *POSITIONS,
    *CACHE,
    *NORMS,
    *MLP,
    *RESIDUALS,
    *HEAD,
    *LOSS,
    *TRAINING,
    *PRECISION,
    *FILES,
    *HUB,
    *INTERFACE,
    *CONFIGURATION,
    *CONVERTER,
    *SIZES,
    *PROCESS,
    *MORE_FILES,
    *MORE_INTERFACE,
    *HARMLESS,
)
