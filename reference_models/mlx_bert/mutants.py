# SPDX-License-Identifier: Apache-2.0
"""Planted bugs of BERT on MLX, and harmless rewrites: what the gate must and must not notice."""

from __future__ import annotations

import functools

from harness.mutants import Mutant, planted

ROOM = "reference_models/mlx_bert/"
in_core = functools.partial(planted, ROOM + "core.py")
in_masks = functools.partial(planted, ROOM + "masks.py")
in_config = functools.partial(planted, ROOM + "config.py")
in_names = functools.partial(planted, ROOM + "names.py")
in_weights = functools.partial(planted, ROOM + "weights.py")
in_accurate = functools.partial(planted, ROOM + "accurate.py")
in_hub = functools.partial(planted, ROOM + "hub.py")
in_quantisation = functools.partial(planted, ROOM + "quantisation.py")
in_heads = functools.partial(planted, ROOM + "heads.py")
in_task_heads = functools.partial(planted, ROOM + "task_heads.py")
in_losses = functools.partial(planted, ROOM + "losses.py")
in_with_head = functools.partial(planted, ROOM + "with_head.py")

MIXED = "        return mixed.transpose(0, 2, 1, 3).reshape(hidden.shape), attended\n"
RESIDUAL = "        return self.LayerNorm(dropout(self.dense(inner), self._dropout, training) + hidden)\n"
RESOLVED = "        directory = hub.resolve(id_or_path, revision=revision, cache_dir=cache_dir, token=token)\n"
KEPT_BY_NUMBER = "        return mask != 0\n    # Half"

COMPUTATION: tuple[Mutant, ...] = (
    in_core(
        "relu",
        "ReLU in place of GELU, whatever the configuration says, as an existing port has it",
        "forward.logits forward.blocks",
        "        self._activation = activation(config.hidden_act)\n",
        '        self._activation = activation("relu")\n',
    ),
    in_core(
        "gelu_by_tanh",
        "GELU is its tanh approximation",
        "forward.logits",
        '    "gelu": _gelu,\n',
        '    "gelu": _tanh_gelu,\n',
    ),
    in_core(
        "gelu_fast",
        "GELU is MLX's fast approximation by a sigmoid",
        "forward.logits",
        '    "gelu": _gelu,\n',
        '    "gelu": nn.gelu_fast_approx,\n',
    ),
    in_core(
        "no_query_bias",
        "the query has no bias",
        "forward.logits forward.blocks",
        "        query, key, value = (\n",
        "        self.query.bias = mx.zeros_like(self.query.bias)\n        query, key, value = (\n",
    ),
    in_core(
        "no_attention_bias",
        "the dense layer behind attention has no bias",
        "forward.logits forward.blocks",
        "        return self.output(mixed, hidden, training=training), attended\n",
        "        self.output.dense.bias = mx.zeros_like(self.output.dense.bias)\n"
        "        return self.output(mixed, hidden, training=training), attended\n",
    ),
    in_core(
        "epsilon_of_layers",
        "the norms of the layers have MLX's own epsilon",
        "forward.small_scale forward.logits",
        "        self.LayerNorm = _LayerNorm(config)\n\n    def __call__(self, inner",
        "        self.LayerNorm = _LayerNorm(config)\n        self.LayerNorm._epsilon = 1e-5\n\n    def __call__(self, inner",
    ),
    in_core(
        "epsilon_of_embeddings",
        "the norm of the embeddings has MLX's own epsilon",
        "forward.small_scale forward.logits",
        "            self.token_type_embeddings = _embedding(config, config.type_vocab_size, padding=False)\n"
        "        self.LayerNorm = _LayerNorm(config)\n",
        "            self.token_type_embeddings = _embedding(config, config.type_vocab_size, padding=False)\n"
        "        self.LayerNorm = _LayerNorm(config)\n        self.LayerNorm._epsilon = 1e-5\n",
    ),
    in_core(
        "scale_missing",
        "attention without 1/sqrt(d)",
        "forward.logits",
        "        scale = 1.0 / math.sqrt(split[-1])\n",
        "        scale = 1.0\n",
    ),
    in_core(
        "scale_of_width",
        "attention is scaled by the width of the model",
        "forward.logits",
        "        scale = 1.0 / math.sqrt(split[-1])\n",
        "        scale = 1.0 / math.sqrt(width)\n",
    ),
    in_core(
        "heads_unsplit",
        "heads are put together in another order",
        "forward.logits forward.blocks",
        MIXED,
        MIXED.replace(".transpose(0, 2, 1, 3)", ".transpose(0, 2, 3, 1)"),
    ),
    in_core(
        "pre_norm",
        "a part's output is normalised and then added, not added and then normalised",
        "forward.logits forward.blocks",
        RESIDUAL,
        "        return self.LayerNorm(dropout(self.dense(inner), self._dropout, training)) + hidden\n",
    ),
    in_core(
        "residual_of_the_inner",
        "the feed-forward network adds its input from before attention",
        "forward.logits forward.blocks",
        "        hidden, attended = self.attention(hidden, bias, output_attentions=output_attentions, training=training)\n"
        "        inner = self._activation(self.intermediate.dense(hidden))\n"
        "        return self.output(inner, hidden, training=training), attended\n",
        "        mixed, attended = self.attention(hidden, bias, output_attentions=output_attentions, training=training)\n"
        "        inner = self._activation(self.intermediate.dense(mixed))\n"
        "        return self.output(inner, hidden, training=training), attended\n",
    ),
    in_core(
        "fast_attention_unscaled",
        "MLX's own attention kernel is given another scale than the formula",
        "precision.logits",
        "            mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=bias)\n",
        "            mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=1.0, mask=bias)\n",
    ),
    in_core(
        "fast_attention_unmasked",
        "MLX's own attention kernel is given no mask",
        "precision.masks",
        "            mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=bias)\n",
        "            mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=scale)\n",
    ),
    in_core(
        "pooler_without_tanh",
        "the pooler has no activation",
        "forward.outputs",
        "        return dropout(self._activation(self.dense(hidden[:, 0])), self._dropout, training)\n",
        "        return dropout(self.dense(hidden[:, 0]), self._dropout, training)\n",
    ),
    in_core(
        "pooler_of_the_mean",
        "the pooler takes the mean of all tokens",
        "forward.outputs",
        "self.dense(hidden[:, 0])",
        "self.dense(hidden.mean(axis=1))",
    ),
    in_accurate(
        "softmax_over_queries",
        "probabilities sum to one over the queries",
        "forward.logits api.attentions",
        "    return powers / powers.sum(axis=-1, keepdims=True)\n",
        "    return powers / powers.sum(axis=-2, keepdims=True)\n",
    ),
)

EMBEDDINGS: tuple[Mutant, ...] = (
    in_core(
        "token_types_ignored",
        "token types are taken and left aside",
        "forward.further_inputs",
        "            types = mx.zeros((1, 1), dtype=mx.int32) if token_type_ids is None else token_type_ids\n",
        "            types = mx.zeros((1, 1), dtype=mx.int32)\n",
    ),
    in_core(
        "no_token_types",
        "without token types none is added, where BERT adds those of type 0",
        "forward.logits forward.blocks",
        "            hidden = hidden + self.token_type_embeddings(types)\n",
        "            hidden = hidden if token_type_ids is None else hidden + self.token_type_embeddings(types)\n",
    ),
    in_core(
        "positions_from_1",
        "positions begin at 1",
        "forward.logits forward.lengths",
        "        return mx.arange(tokens)[None] + _first_position(config)\n",
        "        return (mx.arange(tokens)[None] + _first_position(config) + 1) % config.max_position_embeddings\n",
    ),
    in_core(
        "position_ids_ignored",
        "position_ids are taken and left aside",
        "forward.position_ids",
        "        if position_ids is None:\n            position_ids = _positions(",
        "        if True:\n            position_ids = _positions(",
    ),
    in_core(
        "norm_before_positions",
        "positions are added behind the norm of the embeddings",
        "forward.logits forward.blocks",
        "        return dropout(self.LayerNorm(hidden + positions), config.hidden_dropout_prob, training)\n",
        "        return dropout(self.LayerNorm(hidden) + positions, config.hidden_dropout_prob, training)\n",
    ),
    in_core(
        "ids_unchecked",
        "ids outside the vocabulary are read from behind the table",
        "forward.outside_vocabulary",
        '            faults.append(_outside("input_ids", input_ids, config.vocab_size, "vocab_size"))\n',
        "            pass\n",
    ),
    in_core(
        "types_unchecked",
        "token types that are too large or negative are read from behind the table",
        "forward.outside_vocabulary",
        '            faults.append(_outside("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size"))\n',
        "            pass\n",
    ),
    in_core(
        "types_lost_beside_positions",
        "token types are left aside where position_ids are given",
        "forward.further_inputs",
        "        training = self.training if training is None else training\n",
        "        token_type_ids = token_type_ids if position_ids is None else None\n"
        "        training = self.training if training is None else training\n",
    ),
    in_core(
        "embeddings_without_types",
        "inputs_embeds get no token types",
        "forward.inputs_embeds",
        "            hidden = hidden + self.token_type_embeddings(types)\n",
        "            hidden = hidden if input_ids is None else hidden + self.token_type_embeddings(types)\n",
    ),
    in_core(
        "positions_wrap",
        "a text that is too long begins again at the first position",
        "forward.beyond_maximum",
        '                raise ValueError(f"the batch has {tokens} tokens: {message}")\n',
        "                pass\n",
    ),
    in_core(
        "dropout_active",
        "a model that has been loaded drops out",
        "weights.evaluation_mode",
        "        self.eval()\n\n    def __call__(\n",
        "        self.train()\n\n    def __call__(\n",
    ),
)

MASKS: tuple[Mutant, ...] = (
    in_masks(
        "mask_added",
        "a mask of ones and zeros is added to the scores, as MLX takes numbers",
        "masks.right_padding masks.left_padding masks.original",
        KEPT_BY_NUMBER,
        KEPT_BY_NUMBER.replace("mask != 0", "mask.astype(dtype)"),
    ),
    in_masks(
        "mask_inverted",
        "the mask keeps what it should drop",
        "masks.none_is_ones masks.right_padding masks.original",
        KEPT_BY_NUMBER,
        KEPT_BY_NUMBER.replace("mask != 0", "mask == 0"),
    ),
    in_masks(
        "float_mask_added",
        "a mask of ones and zeros as floating numbers is added to the scores",
        "masks.right_padding",
        "    keep = mx.where(additive, mask > DROPPED, mask != 0)\n    return keep, mx.where(additive & keep, mask, mx.zeros_like(mask))\n",
        "    keep = mask > DROPPED\n    return keep, mask\n",
    ),
    in_masks(
        "zeros_drop_everything",
        "an additive mask of zeros drops everything",
        "masks.additive",
        "    additive = (mask < 0).any() | (mask == 0).all()\n",
        "    additive = (mask < 0).any()\n",
    ),
    in_masks(
        "log_of_the_mask",
        "what is dropped is minus infinity, and a row of nothing else is not a number",
        "masks.all_masked_row",
        KEPT_BY_NUMBER,
        KEPT_BY_NUMBER.replace("mask != 0", "mx.log((mask != 0).astype(dtype))"),
    ),
    in_core(
        "mask_of_the_first_row",
        "the first row's mask is used for every row",
        "masks.right_padding masks.original",
        "        bias = masks.for_attention(attention_mask, hidden.dtype)\n",
        "        bias = masks.for_attention(attention_mask, hidden.dtype)\n"
        "        bias = bias if bias is None else bias[:1]\n",
    ),
    in_core(
        "mask_of_the_first_layer",
        "only the first layer is given the mask",
        "masks.right_padding masks.original",
        "            states.append(hidden)\n",
        "            states.append(hidden)\n            bias = None\n",
    ),
)

OUTPUTS: tuple[Mutant, ...] = (
    in_core(
        "states_without_embeddings",
        "the hidden states leave out the embeddings",
        "api.hidden_states",
        "            hidden_states=tuple(states) if output_hidden_states else None,\n",
        "            hidden_states=tuple(states[1:]) if output_hidden_states else None,\n",
    ),
    in_core(
        "no_hidden_states",
        "output_hidden_states gives none, as an existing port has it",
        "api.hidden_states",
        "            hidden_states=tuple(states) if output_hidden_states else None,\n",
        "            hidden_states=None,\n",
    ),
    in_core(
        "attentions_reversed",
        "attention weights come from the last layer to the first",
        "api.attentions",
        "            attentions=tuple(probabilities) if output_attentions else None,\n",
        "            attentions=tuple(reversed(probabilities)) if output_attentions else None,\n",
    ),
    in_core(
        "detached",
        "no gradient passes the embeddings",
        "training.gradients",
        "        bias = masks.for_attention(attention_mask, hidden.dtype)\n",
        "        hidden = mx.stop_gradient(hidden)\n        bias = masks.for_attention(attention_mask, hidden.dtype)\n",
    ),
    in_core(
        "padding_learns",
        "the embedding of the padding id learns, which torch leaves as it is",
        "training.gradients",
        "    return mx.where((ids == pad)[..., None], mx.stop_gradient(vectors), vectors)\n",
        "    return vectors\n",
    ),
    in_core(
        "initial_range",
        "new weights have a standard deviation of their own",
        "training.initialisation",
        "scale=config.initializer_range)",
        "scale=0.05)",
    ),
)

FILES: tuple[Mutant, ...] = (
    in_names(
        "norms_exchanged",
        "the norm behind attention and the one behind the feed-forward network are exchanged",
        "forward.logits",
        '    "attention.output.LayerNorm",\n    "intermediate.dense",\n    "output.dense",\n    "output.LayerNorm",\n)\n_SHORT',
        '    "output.LayerNorm",\n    "intermediate.dense",\n    "output.dense",\n    "attention.output.LayerNorm",\n)\n_SHORT',
    ),
    in_names(
        "examples_crosswise",
        "query and key of mlx-examples' files are exchanged",
        "weights.older_dialects",
        '    "attention.query_proj",\n    "attention.key_proj",\n',
        '    "attention.key_proj",\n    "attention.query_proj",\n',
    ),
    in_names(
        "gamma_and_beta",
        "gamma is taken for the bias",
        "weights.dialects",
        '{"gamma": "weight", "beta": "bias"}',
        '{"gamma": "bias", "beta": "weight"}',
    ),
    in_core(
        "pooler_made_anew",
        "a file without a pooler gives a model with a random one",
        "roundtrip.incomplete",
        "    elif missing and not random_init and all(",
        '    elif missing and all(name.startswith("pooler.") for name in missing):\n'
        "        missing = ()\n"
        "    elif missing and not random_init and all(",
    ),
    in_weights(
        "shape_unchecked",
        "a tensor of another shape is taken as it is",
        "weights.damaged",
        "        if entry.shape != shape:\n",
        "        if False:\n",
    ),
    in_core(
        "overrides_ignored",
        "fields that from_pretrained is given are left aside",
        "roundtrip.options",
        "config_of(directory, default_config=default_config), config_overrides)",
        "config_of(directory, default_config=default_config), {})",
    ),
    in_core(
        "old_dtype_written",
        "config.json of a model that was cast says the dtype that it was loaded in",
        "roundtrip.dtype",
        'dtype if key in ("dtype", "torch_dtype") else value',
        "value",
    ),
    in_config(
        "labels_lost",
        "keys of config.json that the model has no use for are not written again",
        "roundtrip.fixed_point",
        "    return values | copy.deepcopy(dict(config.extra))\n",
        "    return values\n",
    ),
    in_core(
        "strictness_swallowed",
        "weights that are missing or left over are passed over in silence",
        "weights.damaged roundtrip.incomplete",
        "strict: bool = True,\n        *,\n        random_init: bool = False,",
        "strict: bool = False,\n        *,\n        random_init: bool = True,",
    ),
    in_config(
        "epsilon_of_its_own",
        "an epsilon in the file is not read",
        "weights.configuration forward.logits",
        "    known = dict(_DEFAULTS[model_type])\n",
        '    known = dict(_DEFAULTS[model_type])\n    values.pop("layer_norm_eps", None)\n',
    ),
    in_config(
        "vocabulary_of_another",
        "the vocabulary of a configuration without one is RoBERTa's, as an existing port has it",
        "config.defaults",
        "    vocab_size: int = 30522\n",
        "    vocab_size: int = 50265\n",
    ),
    in_config(
        "unknown_activation",
        "an activation that is not known is taken for GELU",
        "config.refused",
        "        if not accepts(value):\n",
        '        if not accepts(value) and name.endswith("act"):\n'
        '            object.__setattr__(config, name, "gelu")\n'
        "        elif not accepts(value):\n",
    ),
    in_core(
        "dtype_ignored",
        "dtype= is taken and left aside",
        "roundtrip.cast",
        "        if dtype is not None:\n            model.set_dtype(dtype)\n        # What",
        "        # What",
    ),
    in_weights(
        "saved_wide",
        "weights of half precision are saved in float32",
        "roundtrip.dtype",
        '    prefix = "" if head is None else',
        "    import mlx.core as mx\n\n"
        "    halves = (mx.float16, mx.bfloat16)\n"
        "    tensors = {name: t.astype(mx.float32) if t.dtype in halves else t for name, t in tensors.items()}\n"
        '    prefix = "" if head is None else',
    ),
    in_core(
        "halves_widened",
        "files of half precision are widened",
        "roundtrip.dtype",
        "    tensors, missing = dict(checkpoint.tensors), checkpoint.missing\n",
        "    tensors, missing = dict(checkpoint.tensors), checkpoint.missing\n"
        "    halves = (mx.float16, mx.bfloat16)\n"
        "    tensors = {name: t.astype(mx.float32) if t.dtype in halves else t for name, t in tensors.items()}\n",
    ),
    in_weights(
        "saved_without_pooler",
        "the pooler is not saved",
        "weights.back_to_original roundtrip.pretrained",
        "for name, tensor in tensors.items()} | dict(head or {})\n",
        'for name, tensor in tensors.items() if "pooler" not in name} | dict(head or {})\n',
    ),
    in_config(
        "dropout_of_the_classifier",
        "the dropout of the classifier overwrites that of the model, as an existing port has it",
        "weights.configuration",
        "    return BertConfig(model_type=model_type, **known, extra=values)\n",
        '    known["hidden_dropout_prob"] = known["classifier_dropout"] or 0.3\n'
        "    return BertConfig(model_type=model_type, **known, extra=values)\n",
    ),
)

TRAINING: tuple[Mutant, ...] = (
    in_core(
        "embeddings_without_dropout",
        "the embeddings have no dropout",
        "training.dropout",
        "        return dropout(self.LayerNorm(hidden + positions), config.hidden_dropout_prob, training)\n",
        "        return self.LayerNorm(hidden + positions)\n",
    ),
    in_core(
        "attention_without_dropout",
        "attention probabilities have no dropout",
        "training.dropout",
        "            attended = dropout(attention_probabilities(query, key, bias, scale), self._dropout, training)\n",
        "            attended = attention_probabilities(query, key, bias, scale)\n",
    ),
    in_core(
        "dropout_of_the_sum",
        "dropout falls on the residual stream too",
        "training.dropout",
        RESIDUAL,
        "        return self.LayerNorm(dropout(self.dense(inner) + hidden, self._dropout, training))\n",
    ),
    in_core(
        "dropout_in_evaluation",
        "dropout is active in evaluation too, where its probability is not zero",
        "forward.deterministic",
        "    if not training or probability == 0:\n",
        "    if probability == 0:\n",
    ),
    in_core(
        "dropout_unscaled",
        "what dropout keeps is not scaled up",
        "training.dropout",
        "values * (1 / (1 - probability))",
        "values",
    ),
    in_core(
        "seeded",
        "loading seeds MLX's generator, so that every dropout mask of the program is the same",
        "process.random_numbers",
        RESOLVED,
        "        mx.random.seed(0)\n" + RESOLVED,
    ),
    in_core(
        "values_asked_for",
        "ids are looked at while MLX compiles, which it does not allow",
        "backend.compiled",
        '        if "during function transformations" not in str(error):\n            raise\n        return\n',
        "        raise\n",
    ),
)

HUB: tuple[Mutant, ...] = (
    in_core(
        "revision_ignored",
        "revision= is taken and left aside",
        "hub.revisions",
        RESOLVED,
        RESOLVED.replace("revision=revision", "revision=None"),
    ),
    in_hub(
        "revision_in_the_name_ignored",
        "the revision in org/name@revision is left aside",
        "hub.revisions",
        'return _downloaded(found["repository"], revision or found["revision"], cache_dir, token)',
        'return _downloaded(found["repository"], revision, cache_dir, token)',
    ),
    in_core(
        "cache_dir_ignored",
        "cache_dir= is taken and left aside",
        "hub.cache_dir",
        RESOLVED,
        RESOLVED.replace("cache_dir=cache_dir", "cache_dir=None"),
    ),
    in_core(
        "token_ignored",
        "token= is taken and left aside",
        "hub.private",
        RESOLVED,
        RESOLVED.replace("token=token", "token=None"),
    ),
    in_core(
        "token_of_the_user_unused",
        "the token of a user who has logged in is not sent",
        "hub.gated",
        RESOLVED,
        RESOLVED.replace("token=token", "token=token or False"),
    ),
    in_hub(
        "asked_every_time",
        "the Hub is asked about the repository at every start",
        "hub.warm_cache",
        "    where = f",
        "    from huggingface_hub import constants, model_info\n\n"
        "    if not constants.HF_HUB_OFFLINE:\n"
        "        model_info(repository, revision=revision, token=token)\n"
        "    where = f",
    ),
    in_hub(
        "offline_refused",
        "with HF_HUB_OFFLINE=1 a directory is wanted",
        "hub.offline",
        "    where = f",
        "    from huggingface_hub import constants\n\n"
        "    if constants.HF_HUB_OFFLINE:\n"
        '        raise HubError(f"{repository}: the client is offline; expected a directory")\n'
        "    where = f",
    ),
    in_hub(
        "no_safetensors",
        "of a repository the files of torch alone are fetched",
        "hub.outputs",
        '_FILES = ("*.json", "*.safetensors", "*.npz", "*.txt")',
        '_FILES = ("*.json", "*.txt")',
    ),
)

HEADS: tuple[Mutant, ...] = (
    in_task_heads(
        "head_of_the_first_token",
        "BERT's head reads the first token and not the pooler",
        "heads.logits",
        '{"pooling": "pooler", "input_size"',
        '{"pooling": "cls", "input_size"',
    ),
    in_heads(
        "words_norm_first",
        "the norm of the head over the words comes before its activation",
        "heads.logits",
        "            values = self.LayerNorm(self._activation(values))\n",
        "            values = self._activation(self.LayerNorm(values))\n",
    ),
    in_heads(
        "words_without_bias",
        "the scores of the words have no bias",
        "heads.logits",
        "        return _classes(scores + self.bias)\n",
        "        return _classes(scores)\n",
    ),
    in_with_head(
        "head_without_mask",
        "the mask ends at the head",
        "heads.logits",
        "            input_ids,\n            attention_mask,\n",
        "            input_ids,\n            None,\n",
    ),
    in_with_head(
        "head_without_positions",
        "position_ids end at the head",
        "heads.logits",
        "            token_type_ids,\n            position_ids,\n            inputs_embeds",
        "            token_type_ids,\n            None,\n            inputs_embeds",
    ),
    in_with_head(
        "head_without_types",
        "token types end at the head",
        "heads.logits",
        "            attention_mask,\n            token_type_ids,\n",
        "            attention_mask,\n            None,\n",
    ),
    in_with_head(
        "head_without_attentions",
        "output_attentions ends at the head",
        "heads.logits",
        "            output_attentions=output_attentions,\n            training",
        "            training",
    ),
    in_task_heads(
        "problem_type_ignored",
        "what kind of problem it is is guessed from the number of labels",
        "heads.loss",
        '    return found or ("regression" if labels == 1 else "multiclass_classification")\n',
        '    return "regression" if labels == 1 else "multiclass_classification"\n',
    ),
    in_losses(
        "ignored_labels_counted",
        "the loss is divided by all labels, those that do not count too",
        "heads.loss",
        "    number = mx.maximum(counted.sum(), 1).astype(values.dtype)\n",
        "    number = values.size\n",
    ),
    in_with_head(
        "head_never_trains",
        "the dropout of a head is never active",
        "heads.dropout",
        "self.bert.embeddings.word_embeddings, training=training)",
        "self.bert.embeddings.word_embeddings, training=False)",
    ),
    in_task_heads(
        "classifier_dropout_ignored",
        "a head has the dropout of the model, whatever its own is to be",
        "heads.dropout",
        "config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout",
        "config.hidden_dropout_prob",
    ),
    in_losses(
        "loss_detached",
        "the loss of classes has no gradient",
        "heads.loss",
        "    return _mean(-likely * _focus(likely, focal_gamma), counted)\n",
        "    return mx.stop_gradient(_mean(-likely * _focus(likely, focal_gamma), counted))\n",
    ),
    in_losses(
        "absolute_error",
        "a regression's loss is the absolute error",
        "heads.loss",
        "    return mx.square(predictions - labels).mean()\n",
        "    return mx.abs(predictions - labels).mean()\n",
    ),
    in_with_head(
        "logits_before_loss",
        "as a tuple the logits come before the loss",
        "heads.loss",
        '            return loss, outputs["logits"]\n',
        '            return outputs["logits"], loss\n',
    ),
    in_with_head(
        "biases_not_saved",
        "the head is saved without its biases",
        "heads.saved",
        "        for name, tensor in tree_flatten(self.head.parameters()):\n            if name",
        "        for name, tensor in tree_flatten(self.head.parameters()):\n"
        '            tensor = mx.zeros_like(tensor) if name.endswith("bias") else tensor\n            if name',
    ),
)

QUANTISED: tuple[Mutant, ...] = (
    in_quantisation(
        "bits_ignored",
        "four bits, whatever is asked for",
        "precision.quantised",
        "    nn.quantize(model, bits=bits, group_size=group_size, class",
        "    nn.quantize(model, bits=4, group_size=group_size, class",
    ),
    in_quantisation(
        "group_size_not_recorded",
        "config.json says another group size than the weights have",
        "precision.quantised",
        "quantization=dataclasses.asdict(chosen))",
        'quantization={"bits": bits, "group_size": 64 if group_size == 32 else 32})',
    ),
    in_quantisation(
        "norms_rounded",
        "norms are rounded to half precision too",
        "precision.quantised",
        "    return model\n\n\ndef make_places",
        "    for layer in layers.values():\n"
        '        if "weight" in layer and layer.weight.ndim == 1:\n'
        "            layer.weight = layer.weight.astype(mx.bfloat16).astype(layer.weight.dtype)\n"
        "    return model\n\n\ndef make_places",
    ),
)

HARMLESS: tuple[Mutant, ...] = (
    in_core(
        "formula_for_kernel",
        "attention by its formula in every dtype",
        "",
        "        if output_attentions or hidden.dtype == mx.float64 or (training and self._dropout > 0):\n",
        "        if True:\n",
    ),
    in_core(
        "residual_first",
        "the residual stream comes first in the sum",
        "",
        RESIDUAL,
        "        return self.LayerNorm(hidden + dropout(self.dense(inner), self._dropout, training))\n",
    ),
    in_core(
        "plain_linear",
        "dense layers as MLX computes them",
        "",
        '        if sys.platform != "linux" or mx.default_device() != mx.cpu:\n',
        "        if True:\n",
    ),
)

OF_DISTILBERT: tuple[Mutant, ...] = (
    in_names(
        "distilbert_crosswise",
        "the norms of DistilBERT's layers are exchanged",
        "weights.values forward.logits",
        '    "sa_layer_norm",\n    "ffn.lin1",\n    "ffn.lin2",\n    "output_layer_norm",\n',
        '    "output_layer_norm",\n    "ffn.lin1",\n    "ffn.lin2",\n    "sa_layer_norm",\n',
    ),
    in_weights(
        "saved_in_own_names",
        "DistilBERT's tensors are saved under BERT's names",
        "weights.back_to_original roundtrip.pretrained",
        "    named = {prefix + original(name, config.model_type): tensor",
        "    named = {prefix + name: tensor",
    ),
    in_task_heads(
        "head_of_gelu",
        "the activation of DistilBERT's head is GELU",
        "heads.logits",
        '"activation": "relu"',
        '"activation": "gelu"',
    ),
)

OF_ROBERTA: tuple[Mutant, ...] = (
    in_task_heads(
        "one_dropout_in_the_head",
        "RoBERTa's head has no dropout behind its dense layer",
        "heads.dropout",
        '"use_layer_norm": False, "dropout": dropout}',
        '"use_layer_norm": False, "dropout": 0.0}',
    ),
    in_core(
        "roberta_embeddings_from_0",
        "positions of inputs_embeds begin at 0",
        "forward.inputs_embeds",
        '    if config.model_type != "roberta" or input_ids is None:\n',
        '    if input_ids is None:\n        return mx.arange(tokens)[None]\n    if config.model_type != "roberta":\n',
    ),
    in_core(
        "roberta_positions_from_0",
        "RoBERTa's positions begin at 0, as BERT's do",
        "forward.logits",
        "    return mx.cumsum(counted, axis=1) * counted + config.pad_token_id\n",
        "    return mx.maximum(mx.cumsum(counted, axis=1) * counted - 1, 0)\n",
    ),
    in_core(
        "roberta_counts_padding",
        "RoBERTa's positions count padding",
        "masks.left_padding masks.original",
        "    return mx.cumsum(counted, axis=1) * counted + config.pad_token_id\n",
        "    return mx.arange(1, tokens + 1)[None] * counted + config.pad_token_id\n",
    ),
    in_task_heads(
        "words_by_configured_activation",
        "RoBERTa's head over the words has the activation of its layers",
        "heads.logits",
        '        act = "gelu" if config.model_type == "roberta" else config.hidden_act\n',
        "        act = config.hidden_act\n",
    ),
)

MUTANTS = (
    *COMPUTATION,
    *EMBEDDINGS,
    *MASKS,
    *OUTPUTS,
    *TRAINING,
    *FILES,
    *HUB,
    *HEADS,
    *QUANTISED,
    *HARMLESS,
)
