# SPDX-License-Identifier: Apache-2.0
"""A BERT on MLX with a head: its outputs and loss, its files, and which of its weights are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import config as configs
from . import heads, hub, losses, quantisation, task_heads, weights
from .config import BertConfig, ConfigError
from .core import BertCore, check_dtype, checkpoint_of, config_of, load
from .heads import HeadConfig
from .weights import Checkpoint, WeightsError

# Parameters that a file need not have: what they start as is what they are without training.
_OPTIONAL = ("adaptive_thresholds",)


class BertWithHead(nn.Module):
    """A `BertCore` in `bert` and a head in `head`; in evaluation mode from the start, and `train()` turns dropout on.

    Args:
        bert: the body.
        head: what its head is to be; the head is new. `heads.default_head` and `task_heads.task_head` make one.

    Raises:
        ValueError: the head reads another width than the body gives, or a pooler output where there is none.
        TypeError: the body is no BertCore, or the head no HeadConfig.
    """

    def __init__(self, bert: BertCore, head: HeadConfig) -> None:
        super().__init__()
        _check_fit(bert, head)
        self.bert = bert
        self.head = heads.build(head)
        self.head_config = head
        self.eval()

    @property
    def config(self) -> BertConfig:
        """The body's configuration."""
        return self.bert.config

    @config.setter
    def config(self, config: BertConfig) -> None:
        # Quantisation puts another in its place.
        self.bert.config = config

    def __call__(
        self,
        input_ids: mx.array | None = None,
        attention_mask: mx.array | None = None,
        token_type_ids: mx.array | None = None,
        position_ids: mx.array | None = None,
        *,
        labels: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        training: bool | None = None,
    ) -> dict[str, Any] | tuple[mx.array | None, mx.array]:
        """What the head makes of a batch; the arguments that are not named here are `BertCore`'s.

        Args:
            labels: as `losses.loss` takes them.
            return_dict: False gives (loss, logits) alone.

        Returns:
            `loss` (None without labels), `logits`, `predictions`, `probabilities` (None for a regression and a time
            series), `head_outputs`, which has everything of `heads.OUTPUTS`, `bert_outputs`, and `hidden_states` and
            `attentions` where they are asked for.

        Raises:
            ValueError: as `BertCore` and `losses.loss`.
        """
        training = self.training if training is None else training
        states = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        outputs = self.head(states, self.bert.embeddings.word_embeddings, training=training)
        loss = None if labels is None else losses.loss(self.head_config, outputs, labels)
        if not return_dict:
            return loss, outputs["logits"]
        found = {"loss": loss, "logits": outputs["logits"], "predictions": outputs["predictions"]}
        found |= {"probabilities": outputs.get("probabilities"), "bert_outputs": states, "head_outputs": outputs}
        if output_hidden_states:
            found["hidden_states"] = states.hidden_states
        if output_attentions:
            found["attentions"] = states.attentions
        return found

    def freeze_bert(self) -> None:
        """Leaves only the head to train; a masked language model's word embeddings are the body's."""
        self.bert.freeze()

    def freeze_encoder(self) -> None:
        """Leaves the head and the pooler to train, where there is one."""
        self.bert.embeddings.freeze()
        self.bert.encoder.freeze()

    def unfreeze_all(self) -> None:
        """Everything trains that can: quantised weights cannot, and thresholds of predictions are in no loss."""
        self.unfreeze()
        for module in self.modules():
            if "scales" in module:
                module.freeze(recurse=False)
        if "adaptive_thresholds" in self.head:
            self.head.freeze(recurse=False, keys="adaptive_thresholds")

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, both whole before either takes its place.

        Where transformers has a task model that computes the same, it reads the directory; `BertCore` always does.

        Raises:
            OSError: they cannot be written.
        """
        kind = task_heads.task_kind(self.config, self.head_config)
        tensors = {}
        for name, tensor in tree_flatten(self.head.parameters()):
            if name != "adaptive_thresholds" or not (tensor == 0.5).all():
                tensors[task_heads.their_key(self.config, kind, name)] = tensor
        if "decoder" in self.head:
            # Without ties transformers has the bias twice, and adds this one.
            tensors[task_heads.their_key(self.config, kind, "decoder.bias")] = self.head.bias
        entries = task_heads.config_entries(self.config, self.head_config)
        dtype = str(self.bert.embeddings.LayerNorm.weight.dtype).split(".")[-1]
        entries |= {key: dtype for key in ("dtype", "torch_dtype") if key in self.config.extra}
        config = replace(self.config, extra={**self.config.extra, **entries})
        weights.write(directory, dict(tree_flatten(self.bert.parameters())), config, head=tensors)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        strict: bool = True,
        *,
        head_type: str | None = None,
        head_config: HeadConfig | Mapping[str, Any] | None = None,
        num_labels: int | None = None,
        random_init: bool = False,
        default_config: bool = False,
        dtype: mx.Dtype | None = None,
        **config_overrides: Any,
    ) -> BertWithHead:
        """The model of a directory or of a repository of the Hub, as `BertCore.from_pretrained` finds it.

        The head is the file's where it has one of the type that is asked for, ours or that of transformers' own
        `...ForSequenceClassification`, `...ForTokenClassification`, `...ForMaskedLM` or `...ForPreTraining`. Where it
        has none, or one of another type, the head is a new one, with a warning: its weights are random.

        Args:
            head_type: one of `heads.HEAD_TYPES`; that of the file without it.
            head_config: exactly this head. Given a dictionary, as `HeadConfig.to_dict` makes it.
            num_labels: outputs of the head; those of the file without it.
            strict, random_init, default_config, dtype, config_overrides: as for `BertCore.from_pretrained`.
                `random_init=True` also takes a new head in place of one with another number of labels.

        Raises:
            ConfigError, HubError, WeightsError: the configuration, the download or the weights are at fault; also a
                head of the type asked for with another number of labels.
            TypeError: an override is no field of the configuration.
            ValueError: no model computes in that dtype.
        """
        directory = hub.resolve(id_or_path, revision=revision, cache_dir=cache_dir, token=token)
        config = configs.override(config_of(directory, default_config=default_config), config_overrides)
        checkpoint = checkpoint_of(directory, config, random_init=random_init)
        return cls.from_checkpoint(
            config,
            checkpoint,
            strict=strict,
            head_type=head_type,
            head_config=head_config,
            num_labels=num_labels,
            random_init=random_init,
            dtype=dtype,
        )

    @classmethod
    def from_checkpoint(
        cls,
        config: BertConfig,
        checkpoint: Checkpoint | None,
        *,
        strict: bool = True,
        head_type: str | None = None,
        head_config: HeadConfig | Mapping[str, Any] | None = None,
        num_labels: int | None = None,
        random_init: bool = False,
        dtype: mx.Dtype | None = None,
    ) -> BertWithHead:
        """The model of what `core.checkpoint_of` read; the arguments are those of `from_pretrained`.

        Raises:
            ConfigError, WeightsError, ValueError: as `from_pretrained` raises them.
        """
        check_dtype(dtype, config)
        there = _head_of(checkpoint, config)
        wanted = _wanted(checkpoint, config, there, head_type, head_config, num_labels, random_init=random_init)
        bert = BertCore(config, add_pooling_layer=_needs_pooler(config, wanted, checkpoint))
        if checkpoint is not None:
            load(bert, checkpoint, strict=strict, random_init=random_init)
        model = cls(bert, wanted)
        model.head.set_dtype(bert.embeddings.LayerNorm.weight.dtype)
        if checkpoint is not None:
            found = there if _same_weights(config, there, wanted) else None
            model.head.load_weights(_head_tensors(model, checkpoint, found, random_init=random_init), strict=False)
        if dtype is not None:
            model.set_dtype(dtype)
        # What cannot be read is an error here and not in the first forward pass.
        mx.eval(model.parameters())
        return model

    def load_pretrained(self, directory: str | Path, *, strict: bool = True) -> None:
        """Puts the weights of a directory into this model; the head stays as it is, with a warning, where it has none.

        Raises:
            ConfigError, WeightsError: as for `from_pretrained`; also another head, by type or number of outputs.
                The model is then as it was.
        """
        config = configs.read(Path(directory))
        checkpoint = weights.read_checkpoint(directory, self.config)
        there = _head_of(checkpoint, config)
        if there is not None and not _same_weights(config, there, self.head_config):
            fault = f"has the head of a {_described(there.config)}, expected that of a {_described(self.head_config)}"
            raise WeightsError(checkpoint.path, f"{fault} with the same layers")
        tensors = _head_tensors(self, checkpoint, there, random_init=False)
        load(self.bert, checkpoint, strict=strict, random_init=False)
        self.head.load_weights(tensors, strict=False)
        mx.eval(self.parameters())


@dataclass(frozen=True)
class _Found:
    """The head that a file has: ours or transformers', and what of that its names are."""

    config: HeadConfig
    kind: str | None


def create(config: BertConfig, head: HeadConfig) -> BertWithHead:
    """A new model with weights from MLX's generator."""
    return BertWithHead(BertCore(config, add_pooling_layer=_needs_pooler(config, head, None)), head)


def has_head(checkpoint: Checkpoint | None, config: BertConfig) -> bool:
    """Whether a checkpoint has the tensors of a head that `BertWithHead` can have.

    Raises:
        ConfigError, WeightsError: the head's configuration is faulty, or the checkpoint lacks its classifier.
    """
    return _head_of(checkpoint, config) is not None


def as_head_config(given: HeadConfig | Mapping[str, Any]) -> HeadConfig:
    """The head of a configuration or of the dictionary of one."""
    return given if isinstance(given, HeadConfig) else HeadConfig.from_dict(given)


def agreed(head: HeadConfig, head_type: str | None, num_labels: int | None) -> HeadConfig:
    """The head, where what is said of it beside agrees.

    Raises:
        ConfigError: it does not.
    """
    if head_type is not None and heads.head_type_of(head_type) != head.head_type:
        raise ConfigError(f"head_type={head_type!r} and the head_config of a {head.head_type} disagree: give one")
    if num_labels is not None and num_labels != head.output_size and head.head_type != "binary_classification":
        raise ConfigError(f"num_labels={num_labels} and head_config.output_size={head.output_size} disagree: give one")
    return head


def _check_fit(bert: BertCore, head: HeadConfig) -> None:
    for name, value, expected in (("bert", bert, BertCore), ("head", head, HeadConfig)):
        if not isinstance(value, expected):
            raise TypeError(f"{name} is of type {type(value).__name__}: expected a {expected.__name__}")
    config = bert.config
    width, source = config.hidden_size, "hidden_size"
    if head.pooling == "pooler":
        if "pooler" not in bert:
            raise ValueError("the head reads the pooler output, and the model has no pooler: expected another pooling")
        width, source = config.pooler_hidden_size or width, "the pooler's width"
    if head.input_size != width:
        raise ValueError(f"the head has input_size={head.input_size}: expected {source}={width}")
    if head.head_type == "masked_lm" and head.output_size != config.vocab_size:
        raise ValueError(f"the head has output_size={head.output_size}: expected vocab_size={config.vocab_size}")


def _needs_pooler(config: BertConfig, head: HeadConfig, checkpoint: Checkpoint | None) -> bool:
    """Whether the body has a pooler: where the head reads it, and else as transformers and the file have it."""
    if head.pooling == "pooler":
        return True
    has = checkpoint is None or any(name.startswith("pooler.") for name in checkpoint.tensors)
    return has and task_heads.task_kind(config, head) is None


def _head_of(checkpoint: Checkpoint | None, config: BertConfig) -> _Found | None:
    """The head that a checkpoint has; None where it has none, or one of a task that is not here."""
    if checkpoint is None:
        return None
    stored = config.extra.get("head_config")
    if stored is not None and checkpoint.head:
        try:
            head = HeadConfig.from_dict(stored)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.path.with_name(configs.CONFIG_FILE)}: head_config: {error}") from None
        return _Found(head, task_heads.task_kind(config, head))
    has_pooler = any(name.startswith("pooler.") for name in checkpoint.tensors)
    kind = task_heads.kind_of(config, checkpoint.head, has_pooler=has_pooler)
    if kind is None:
        return None
    key = task_heads.labels_key(config, kind)
    if key is not None and key not in checkpoint.head:
        raise WeightsError(checkpoint.path, f"lacks {key}, which its architectures {_architectures(config)} have")
    labels = 1 if key is None else checkpoint.head[key].shape[0]
    head_type = task_heads.head_type_for(config, kind, labels)
    return _Found(task_heads.task_head(config, head_type, labels), kind)


def _architectures(config: BertConfig) -> str:
    return ", ".join(map(str, config.extra.get("architectures") or ["BertModel"]))


def _wanted(
    checkpoint: Checkpoint | None,
    config: BertConfig,
    there: _Found | None,
    head_type: str | None,
    head_config: HeadConfig | Mapping[str, Any] | None,
    num_labels: int | None,
    *,
    random_init: bool,
) -> HeadConfig:
    """The head that the model gets: the one asked for, made as the file's where that is one of its type."""
    if head_config is not None:
        return agreed(as_head_config(head_config), head_type, num_labels)
    if head_type is None and there is None:
        fault = f"head_type is not given and the weights have no head: expected one of {', '.join(heads.HEAD_TYPES)}"
        raise ConfigError(fault if checkpoint is None else f"{checkpoint.path}: {fault}")
    head_type = there.config.head_type if head_type is None and there else heads.head_type_of(head_type)
    if there is None or not _serves(config, there, head_type):
        return heads.default_head(config, head_type, num_labels)
    there_are = there.config.output_size
    outputs = there_are if num_labels is None else heads.outputs_of(config, head_type, num_labels)
    if head_type == "binary_classification":
        outputs = 1
    if outputs == there_are or random_init:
        of_that_type = there.config.head_type == head_type
        head = there.config if of_that_type else task_heads.task_head(config, head_type, outputs)
        return replace(head, output_size=outputs)
    assert checkpoint is not None
    binary = head_type == "binary_classification"
    hint = "head_type='multiclass_classification'" if binary else f"num_labels={there_are}"
    fault = f"its head has {there_are} outputs, expected {outputs} for this {head_type}"
    raise WeightsError(checkpoint.path, f"{fault}: {hint} takes the file's head, random_init=True a new one")


def _serves(config: BertConfig, there: _Found, head_type: str) -> bool:
    """Whether a file's head is one of a type; transformers' on texts does not say of which task it is."""
    if there.config.head_type == head_type:
        return True
    return (
        "head_config" not in config.extra and there.kind is not None and task_heads.KINDS.get(head_type) == there.kind
    )


def _same_weights(config: BertConfig, there: _Found | None, head: HeadConfig) -> bool:
    """Whether a file's head has the parameters of this one, in the same places of the same formula."""
    if there is None or not _serves(config, there, head.head_type):
        return False
    free = ("head_type", "input_dropout", "dropout", "initializer_range", "focal_gamma", "output_scale", "output_bias")
    fields = {name: value for name, value in head.to_dict().items() if name not in free}
    return fields == {name: value for name, value in there.config.to_dict().items() if name not in free}


def _described(head: HeadConfig) -> str:
    return f"{head.head_type} of {head.output_size} outputs"


def _head_tensors(
    model: BertWithHead, checkpoint: Checkpoint, there: _Found | None, *, random_init: bool
) -> list[tuple[str, mx.array]]:
    """The tensors for the model's head; none, with a warning, where the file does not have the head."""
    path, config = checkpoint.path, model.config
    if there is None:
        beside = f"; not used: {', '.join(sorted(checkpoint.head))}" if checkpoint.head else ""
        fault = f"has no head of a {_described(model.head_config)}; the model's is random until it is trained"
        warnings.warn(f"{path}: {fault}{beside}", stacklevel=4)
        return []
    expected = dict(tree_flatten(model.head.parameters()))
    found: dict[str, mx.array] = {}
    unused = []
    for key, tensor in _whole(checkpoint, config).items():
        name = task_heads.our_key(config, there.kind, key)
        if name is None or (name not in expected and not name.startswith("decoder.")):
            unused.append(key)
        elif name in found:
            raise WeightsError(path, f"{key} is there twice, under two names: expected one of them")
        else:
            found[name] = tensor
    if model.head_config.head_type == "masked_lm":
        _settle_decoder(checkpoint, model, found)
    for name, tensor in found.items():
        key = task_heads.their_key(config, there.kind, name)
        if tensor.shape != expected[name].shape:
            raise WeightsError(path, f"{key} has shape {tensor.shape}, expected {expected[name].shape}")
        if not mx.issubdtype(tensor.dtype, mx.floating):
            raise WeightsError(path, f"{key} is of type {tensor.dtype}, expected a float type")
    missing = [name for name in expected if name not in found and name not in _OPTIONAL]
    listed = ", ".join(task_heads.their_key(config, there.kind, name) for name in missing)
    if missing and not random_init:
        raise WeightsError(path, f"lacks {listed} of its head; random_init=True leaves them random")
    if missing:
        warnings.warn(f"{path}: lacks {listed} of its head; random, as random_init=True asks for", stacklevel=4)
    if unused:
        warnings.warn(f"{path}: {', '.join(sorted(unused))} are of another head, and are not used", stacklevel=4)
    return list(found.items())


def _whole(checkpoint: Checkpoint, config: BertConfig) -> dict[str, mx.array]:
    """The head's tensors; what is quantised is made whole again, as a head is always."""
    tensors = dict(checkpoint.head)
    for key in [key for key in tensors if key.endswith(".scales")]:
        path = key.removesuffix(".scales")
        if f"{path}.weight" not in tensors or f"{path}.biases" not in tensors or config.quantization is None:
            raise WeightsError(checkpoint.path, f"{key} is there without {path}.weight, {path}.biases or quantization")
        chosen = quantisation.settings(config.quantization)
        parts = tensors[f"{path}.weight"], tensors.pop(key), tensors.pop(f"{path}.biases")
        try:
            tensors[f"{path}.weight"] = mx.dequantize(*parts, group_size=chosen.group_size, bits=chosen.bits)
        except ValueError as error:
            raise WeightsError(checkpoint.path, f"{path}.weight is damaged: {str(error).splitlines()[0]}") from None
    return tensors


def _settle_decoder(checkpoint: Checkpoint, model: BertWithHead, found: dict[str, mx.array]) -> None:
    """Leaves one bias and, where the classifier is the word embeddings, no matrix of its own."""
    tied = model.head_config.tie_word_embeddings
    bias, weight = found.pop("decoder.bias", None), found.get("decoder.weight")
    if bias is not None:
        # Without ties transformers adds the decoder's bias, and the other is nothing's.
        if tied and "bias" in found and not mx.array_equal(bias, found["bias"]):
            raise WeightsError(checkpoint.path, "the decoder has two biases that differ: expected one, or two equal")
        found["bias"] = bias
    if not tied or weight is None:
        return
    embeddings = checkpoint.tensors["embeddings.word_embeddings.weight"]
    if model.config.quantization is None and not mx.array_equal(weight, embeddings):
        fault = "the decoder is not the word embeddings, as config.json says: expected tie_word_embeddings false there"
        raise WeightsError(checkpoint.path, fault)
    del found["decoder.weight"]
