# SPDX-License-Identifier: Apache-2.0
"""Checks of the interface: what callers of a Hugging Face model rely on, in types, order and shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from harness.capture import capture
from harness.cases import Case
from harness.checks.loss import at_least_two_tokens, port_labels
from harness.errors import Mismatch, Skip
from harness.numerics import require_close, require_shape
from harness.routes.pretrained import load, save
from harness.trial import (
    Trial,
    call_port,
    config_class,
    original_model,
    port_class,
    port_config,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    worst,
)


def output_type(trial: Trial, case: Case) -> dict[str, float]:
    """forward returns an output with named fields: logits for every position, and a loss only when there are labels.

    Would have caught: a bare tuple, logits of the last position alone, a loss of zero where there are no labels.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    output = _call(trial, pair.port, pair.batch.tokens)
    if not hasattr(output, "logits"):
        raise Mismatch(f"forward returns {type(output).__name__}; callers expect an output with .logits")
    shape = (*pair.batch.tokens.shape, case.fields[trial.family.vocabulary])
    if tuple(output.logits.shape) != shape:
        raise Mismatch(f"logits have shape {tuple(output.logits.shape)}, expected {shape}")
    if getattr(output, "loss", None) is not None:
        raise Mismatch("forward returns a loss though it was given no labels")
    if "loss" in trial.family.features:
        labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
        if getattr(_call(trial, pair.port, pair.batch.tokens, labels=labels), "loss", None) is None:
            raise Mismatch("forward returns no loss though it was given labels")
    return {}


def tuple_order(trial: Trial, case: Case) -> dict[str, float]:
    """With return_dict=False forward returns a tuple: the loss first where there is one, then the logits.

    Would have caught: return_dict accepted and ignored, None left in the tuple.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    tokens = pair.batch.tokens
    named, plain = _call(trial, pair.port, tokens), _call(trial, pair.port, tokens, return_dict=False)
    if not isinstance(plain, tuple):
        raise Mismatch(f"return_dict=False gives {type(plain).__name__}, expected a tuple")
    if not plain or not torch.equal(plain[0], named.logits):
        raise Mismatch("return_dict=False without labels: the first entry is not the logits")
    if "loss" in trial.family.features:
        labels = port_labels(trial, tokens, pair.batch.targets)
        plain = _call(trial, pair.port, tokens, labels=labels, return_dict=False)
        if len(plain) < 2 or plain[0] is None or plain[0].ndim or not torch.equal(plain[1], named.logits):
            raise Mismatch("return_dict=False with labels: the first two entries are not loss and logits")
    return {}


def hidden_states(trial: Trial, case: Case) -> dict[str, float]:
    """Hidden states follow the library's contract: the embedding, then each block's output, the last one normed.

    Compared with the original's own. Would have caught: the last entry before the norm, the embedding left out.
    """
    pair = prepare(trial, case)
    assert trial.family.taps is not None  # the check needs taps
    places = {tap.name: tap.original for tap in trial.family.taps(case.fields)}
    tokens, targets = pair.batch.tokens, pair.batch.targets
    _, seen = capture(pair.original, places, lambda: run_original(trial, pair.original, tokens, targets))
    blocks = [name for name in places if name.count(".") == 1 and name.startswith("block.")]
    expected = [seen["embedding"], *(seen[name] for name in blocks[:-1]), seen["final_norm"]]
    states = getattr(_call(trial, pair.port, pair.batch.tokens, output_hidden_states=True), "hidden_states", None)
    if states is None:
        raise Mismatch("output_hidden_states=True gives no hidden_states")
    if len(states) != len(expected):
        raise Mismatch(f"{len(states)} hidden states, expected {len(expected)}: the embedding and one for each block")
    return worst(
        *(
            require_semantics(trial, f"hidden_states[{i}]", actual.cpu(), wanted)
            for i, (actual, wanted) in enumerate(zip(states, expected, strict=True))
        )
    )


def attentions(trial: Trial, case: Case) -> dict[str, float]:
    """Attention weights with eager attention: one tensor a block, rows that sum to one, nothing on masked places.

    Would have caught: scores instead of weights, dropout in what is returned, a causal mask that leaks.
    """
    pair = prepare(trial, case)
    model: Any = pair.port
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    weights = getattr(_call(trial, model, pair.batch.tokens, output_attentions=True), "attentions", None)
    if not weights or any(tensor is None for tensor in weights):
        raise Mismatch("output_attentions=True with eager attention gives no attentions")
    rows, count = pair.batch.tokens.shape
    for layer, tensor in enumerate(weights):
        if tensor.ndim != 4 or (tensor.shape[0], *tensor.shape[2:]) != (rows, count, count):
            raise Mismatch(
                f"attentions[{layer}] has shape {tuple(tensor.shape)}, expected ({rows}, heads, {count}, {count})"
            )
        require_close(f"sums of attentions[{layer}]", tensor.sum(-1), torch.ones_like(tensor.sum(-1)), bound=1e-5)
        if "causal" in trial.family.features and bool((tensor.triu(1) != 0).any()):
            raise Mismatch(f"attentions[{layer}] has weight on later positions")
    return {"layers": float(len(weights))}


def logits_to_keep(trial: Trial, case: Case) -> dict[str, float]:
    """`logits_to_keep` gives the last logits of the full call, as a count and as positions.

    Would have caught: the argument swallowed, which costs the memory it is there to save; a slice [-0:].
    """
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    full = port_logits(trial, pair.port, tokens)
    positions = torch.arange(0, tokens.shape[1], 2)
    for keep, expected in ((0, full), (1, full[:, -1:]), (positions, full[:, positions])):
        actual = port_logits(trial, pair.port, tokens, logits_to_keep=keep)
        require_shape(f"logits with logits_to_keep={keep}", actual, expected)
        require_close(
            f"logits with logits_to_keep={keep}", actual, expected, bound=1e-4 if trial.dtype != "float64" else 1e-9
        )
    return {}


def auto_classes(trial: Trial, case: Case) -> dict[str, float]:
    """The configuration's model_type is the port's own, and the Auto class makes the port from it.

    Would have caught: model_type "gpt2", with which AutoModelForCausalLM silently builds another architecture.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class, cls = port_class(trial), config_class(trial)  # importing the model's file is what registers it
    model_type = getattr(cls, "model_type", "")
    if not model_type:
        raise Mismatch(f"{cls.__name__} has no model_type")
    if model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] is not cls:
        raise Mismatch(f"model_type '{model_type}' belongs to {CONFIG_MAPPING[model_type].__name__} of transformers")
    if model_type not in CONFIG_MAPPING:
        raise Skip(
            f"model_type '{model_type}' is not registered with AutoConfig; remote_code checks load it by auto_map"
        )
    auto = getattr(transformers, trial.family.port_auto_class)
    made = auto.from_config(port_config(trial, case.fields))
    if not isinstance(made, model_class):
        raise Mismatch(f"{trial.family.port_auto_class} makes {type(made).__name__} of the port's configuration")
    directory = save(trial, case, original_model(trial, case, dtype="float32"))
    loaded = auto.from_pretrained(directory)
    if not isinstance(loaded, model_class):
        raise Mismatch(f"{trial.family.port_auto_class} loads a saved port as {type(loaded).__name__}")
    return {}


def embeddings(trial: Trial, case: Case) -> dict[str, float]:
    """Input and output embeddings can be read and replaced, and the model then uses the new ones.

    Would have caught: accessors that give a copy, or another table with as many rows.
    """
    pair = prepare(trial, case)
    model: Any = pair.port
    vocabulary = case.fields[trial.family.vocabulary]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, name)()
        if module is None or module.weight.shape[0] != vocabulary:
            raise Mismatch(f"{name}() does not give the table with {vocabulary} rows")
    before = port_logits(trial, model, pair.batch.tokens)
    table = model.get_input_embeddings()
    replaced = torch.nn.Embedding(*table.weight.shape).to(table.weight)
    model.set_input_embeddings(replaced)
    if model.get_input_embeddings() is not replaced:
        raise Mismatch("set_input_embeddings does not set what get_input_embeddings gives")
    if torch.equal(port_logits(trial, model, pair.batch.tokens), before):
        raise Mismatch("after set_input_embeddings the model still uses the old table")
    return {}


def device_map(trial: Trial, case: Case) -> dict[str, float]:
    """The port loads under a device_map, and the modules it must not split exist.

    Would have caught: `_no_split_modules` left over from another model, on which accelerate cuts a residual in two.
    """
    model = prepare(trial, case).port
    kinds = {type(module).__name__ for module in model.modules()}
    named = list(getattr(model, "_no_split_modules", None) or [])
    if not named:
        raise Mismatch("_no_split_modules is empty; device_map='auto' needs the name of the block")
    if absent := [name for name in named if name not in kinds]:
        raise Mismatch(f"_no_split_modules names {absent[0]}, which the model does not have")
    directory = save(trial, case, original_model(trial, case, dtype="float32"))
    single = dataclasses.replace(trial, dtype="float32")
    tokens = prepare(single, case).batch.tokens
    mapped = load(trial, directory, device_map={"": "cpu"})
    require_close(
        "logits under a device_map",
        port_logits(single, mapped, tokens),
        port_logits(single, load(trial, directory), tokens),
        bound=1e-6,
    )
    return {}


def _call(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return call_port(trial, model, tokens, **options)
