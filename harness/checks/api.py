# SPDX-License-Identifier: Apache-2.0
"""Checks of the interface: what callers of a Hugging Face model rely on, in types, order and shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from harness.capture import watch
from harness.cases import Case
from harness.checks.loss import at_least_two_tokens, port_labels
from harness.errors import Mismatch, Skip
from harness.numerics import require_close
from harness.ports import first_line
from harness.routes.pretrained import load, save
from harness.trial import (
    Pair,
    Trial,
    call_port,
    config_class,
    field_known_by,
    initial_original,
    is_asked,
    original_model,
    outputs_of,
    port_class,
    port_config,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    takes,
    worst,
)


def output_type(trial: Trial, case: Case) -> dict[str, float]:
    """forward returns an output with named fields: logits for every position, and a loss only when there are labels.

    A base model that AutoModel offers returns one with last_hidden_state. Would have caught: a bare tuple, logits of
    the last position alone, a loss of zero where there are no labels, a base model that returns a bare tensor.
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
    _takes_ids_first(trial, pair, output.logits)
    if "loss" in trial.family.features:
        labels = port_labels(trial, pair.batch.tokens, pair.batch.targets)
        if getattr(_call(trial, pair.port, pair.batch.tokens, labels=labels), "loss", None) is None:
            raise Mismatch("forward returns no loss though it was given labels")
    base = base_model(pair.port)
    if base is not None and is_offered(base):
        output = _call(trial, base, pair.batch.tokens)
        if getattr(output, "last_hidden_state", None) is None:
            raise Mismatch(
                f"{type(base).__name__}, the base model, returns {type(output).__name__};"
                " callers of AutoModel expect an output with .last_hidden_state"
            )
    return {}


def _takes_ids_first(trial: Trial, pair: Pair, expected: torch.Tensor) -> None:
    tokens = pair.batch.tokens.to(next(pair.port.parameters()).device)
    try:
        with torch.no_grad():
            actual = pair.port(tokens)
    except Exception as error:  # whatever the first argument is taken for
        raise Mismatch(
            f"forward(tokens) without a keyword raises {type(error).__name__}: {first_line(error)};"
            " token ids are the first argument"
        ) from error
    if not torch.equal(outputs_of(trial, actual)["logits"], expected.cpu()):
        raise Mismatch("forward(tokens) gives other logits than forward(input_ids=tokens): ids are the first argument")


def tuple_order(trial: Trial, case: Case) -> dict[str, float]:
    """With return_dict=False forward returns a tuple: the loss first where there is one, then the logits.

    Or both in the original's own order, where the family says that it has another. A base model that takes return_dict
    does so too, with the last hidden state first. Would have caught: return_dict accepted and ignored, by the model or
    by its base model; None left in the tuple.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    tokens = pair.batch.tokens
    logits, plain = _logits(trial, pair.port, tokens), _call(trial, pair.port, tokens, return_dict=False)
    if not isinstance(plain, tuple):
        raise Mismatch(f"return_dict=False gives {type(plain).__name__}, expected a tuple")
    if not plain or not torch.equal(plain[0], logits):
        raise Mismatch("return_dict=False without labels: the first entry is not the logits")
    if "loss" in trial.family.features:
        labels = port_labels(trial, tokens, pair.batch.targets)
        plain = _call(trial, pair.port, tokens, labels=labels, return_dict=False)
        orders = dict.fromkeys([("loss", "logits"), tuple(trial.family.tuple_order)])
        if not any(_begins_with(plain, order, logits) for order in orders):
            listed = ", or ".join(" and ".join(order) for order in orders)
            raise Mismatch(f"return_dict=False with labels: the first two entries are not {listed}")
    base = base_model(pair.port)
    if base is not None and _takes_return_dict(base):
        plain = _call(trial, base, tokens, return_dict=False)
        if not isinstance(plain, tuple):
            raise Mismatch(
                f"{type(base).__name__}, the base model, gives {type(plain).__name__} for return_dict=False,"
                " expected a tuple"
            )
        last = getattr(_call(trial, base, tokens), "last_hidden_state", None)
        if last is not None and (not plain or not torch.equal(plain[0], last)):
            raise Mismatch(
                f"{type(base).__name__}, the base model, with return_dict=False: the first entry is not the last"
                " hidden state"
            )
    return {}


def _begins_with(plain: Sequence[Any], order: Sequence[str], logits: torch.Tensor) -> bool:
    """Whether a tuple has a scalar loss and these logits where the order says."""
    if len(plain) < len(order):
        return False
    named = dict(zip(order, plain, strict=False))
    loss = named["loss"]
    return loss is not None and not loss.ndim and torch.equal(named["logits"], logits)


def legacy_calls(trial: Trial, case: Case) -> dict[str, float]:
    """Calls that scripts make of the original give the port's outputs in the original's order, with its loss.

    Would have caught: `model(X, Y)` whose targets are taken for a mask, so that no loss comes back and no error; an
    output object that unpacks to the names of its fields.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    tokens, targets = pair.batch.tokens, pair.batch.targets.clone()
    targets[:, 0] = trial.family.loss.ignore_index
    expected = run_original(trial, pair.original, tokens, targets)
    device = next(pair.port.parameters()).device
    numbers = []
    for written, call in trial.family.legacy_calls.items():
        try:
            with torch.no_grad():
                plain = call(pair.port, tokens.to(device), targets.to(device))
        except Exception as error:  # whatever it raises is the finding
            raise Mismatch(f"{written} ends in {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(plain, tuple) or len(plain) < len(trial.family.tuple_order):
            raise Mismatch(f"{written} gives {type(plain).__name__}, expected ({', '.join(trial.family.tuple_order)})")
        for name, value in zip(trial.family.tuple_order, plain, strict=False):
            if name not in expected:  # scripts unpack it, whatever it is
                continue
            if not isinstance(value, torch.Tensor):
                raise Mismatch(f"{written} gives {type(value).__name__} for the {name}")
            numbers.append(require_semantics(trial, f"{name} of {written}", value.cpu(), expected[name]))
    return worst(*numbers)


def original_only(trial: Trial, case: Case) -> dict[str, float]:
    """What only the original's forward takes, a port refuses by name; it does not leave it aside without a word.

    Would have caught: `**kwargs` that swallow the lengths of packed texts, which then attend to each other.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    require_original_only_refused(trial, pair.port, pair.batch.tokens)
    return {}


def require_original_only_refused(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Raises Mismatch for an argument that only the original's forward takes and a model leaves aside, or fails on."""
    tokens, what = tokens.to(next(model.parameters()).device), type(model).__name__
    for name, value in trial.family.original_only.items():
        try:
            with torch.no_grad():
                model(tokens, **{name: value(tokens)})
        except (TypeError, ValueError, NotImplementedError) as error:
            if name not in str(error):
                raise Mismatch(f"{what} refuses '{name}' with another reason: {first_line(error)}") from None
            continue
        except Exception as error:
            kind = f"{type(error).__name__}: {first_line(error)}"
            raise Mismatch(
                f"{what}: '{name}' ends in {kind}; expected a TypeError or ValueError that names it"
            ) from None
        raise Mismatch(f"{what} takes '{name}', which only the original has, and leaves it aside without a word")


def configured_outputs(trial: Trial, case: Case) -> dict[str, float]:
    """What the configuration asks to be returned is returned as if a caller had asked for it.

    A port may leave output_hidden_states and output_attentions to the caller, both or neither. A return_dict=False that
    breaks forward is counted only: it breaks transformers' own Llama and GPT-2. Would have caught:
    output_hidden_states taken from the argument alone where output_attentions is not, a tuple in another order.
    """
    pair = prepare(trial, at_least_two_tokens(case))
    model: Any = pair.port
    tokens = pair.batch.tokens
    if getattr(model, "config", None) is None:
        raise Skip("the port has no configuration that could ask for outputs")
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    obeys_return_dict, breaks = _obeys_return_dict(trial, model, tokens)
    obeyed = {
        option: _obeys(trial, model, tokens, option, field)
        for option, field in (("output_hidden_states", "hidden_states"), ("output_attentions", "attentions"))
        if takes(model, option, by_keywords=True)
    }
    followed = [option for option, verdict in obeyed.items() if verdict]
    ignored = [option for option, verdict in obeyed.items() if verdict is False]
    if followed and ignored:
        raise Mismatch(
            f"config.{ignored[0]}=True is ignored, though config.{followed[0]}=True is not;"
            f" an argument that is not given stands for the configuration's value"
        )
    if not followed and not obeys_return_dict:
        raise Skip("the port leaves to the caller what it returns: its configuration's output options change nothing")
    return {"return_dict_breaks": 1.0} if breaks else {}


def _obeys_return_dict(trial: Trial, model: Any, tokens: torch.Tensor) -> tuple[bool, bool]:
    """Whether config.return_dict=False gives a tuple, and whether it breaks forward.

    Raises Mismatch for another tuple than the argument's.
    """
    logits = _logits(trial, model, tokens)
    with _configured(model.config, "return_dict", False):
        try:
            plain = _call(trial, model, tokens)
        except Exception:  # heads that read their base model's output by name, as most of the library's do
            return False, True
    if not isinstance(plain, tuple):
        return False, False
    if not plain or not torch.equal(plain[0], logits):
        raise Mismatch("config.return_dict=False: the first entry of the tuple is not the logits")
    if "loss" in trial.family.features:
        labels = tokens.clone()
        with _configured(model.config, "return_dict", False):
            labelled = _call(trial, model, tokens, labels=labels)
        if not _begins_with(labelled, ("loss", "logits"), logits):
            raise Mismatch(
                "config.return_dict=False with labels: the first two entries are not loss and logits; the Trainer takes"
                " the first for the loss"
            )
    if takes(model, "return_dict", by_keywords=True) and tuple(trial.family.tuple_order) == ("loss", "logits"):
        asked = _call(trial, model, tokens, return_dict=False)
        if isinstance(asked, tuple) and len(asked) != len(plain):
            raise Mismatch(
                f"config.return_dict=False gives a tuple of {len(plain)}, the argument return_dict=False one of"
                f" {len(asked)}"
            )
    return True, False


def _obeys(trial: Trial, model: Any, tokens: torch.Tensor, option: str, field: str) -> bool | None:
    """Whether the configuration's option gives what the argument gives; None where the argument gives nothing."""
    asked = getattr(_call(trial, model, tokens, **{option: True}), field, None)
    if not asked or any(tensor is None for tensor in asked):
        return None  # the finding of api.hidden_states or api.attentions
    with _configured(model.config, option, True):
        try:
            output = _call(trial, model, tokens)
        except Exception as error:  # whatever the setting breaks is the finding
            broken = f"{type(error).__name__}: {first_line(error)}"
            raise Mismatch(f"with config.{option}=True forward raises {broken}") from error
    given = getattr(output, field, None)
    if not given:
        return False
    if len(given) != len(asked) or not all(map(torch.equal, given, asked)):
        raise Mismatch(f"config.{option}=True gives other {field} than the argument {option}=True")
    return True


@contextlib.contextmanager
def _configured(config: Any, name: str, value: Any) -> Iterator[None]:
    """Sets a field of a configuration, inside."""
    before = getattr(config, name, None)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


def hidden_states(trial: Trial, case: Case) -> dict[str, float]:
    """Hidden states follow the library's contract: the embedding, then each block's output, the last one normed.

    Compared with the original's own; gradients flow through each to the token embedding. Would have caught: the last
    entry before the norm, the embedding left out, detached states, which train nothing in a distillation, a mask that
    is forgotten when states are asked for.
    """
    pair = prepare(trial, case)
    assert trial.family.taps is not None  # the check needs taps
    places = {tap.name: tap.original for tap in trial.family.taps(case.fields)}
    tokens, targets = pair.batch.tokens, pair.batch.targets
    blocks = [path for name, path in places.items() if name.count(".") == 1 and name.startswith("block.")]
    first = "block.0" if "final_norm" in places else "embedding"
    if not blocks or first not in places:
        raise Skip(f"family '{trial.family.name}' names no tap '{first}', which hidden states are compared at")
    _, calls = watch(pair.original, lambda: run_original(trial, pair.original, tokens, targets))
    ran = {call.path: call for call in calls}
    if "final_norm" in places:
        # Whatever is added to the embedding, a block is given the sum.
        expected = [ran[path].inputs[0] for path in blocks] + [cast(torch.Tensor, ran[places["final_norm"]].output)]
    else:
        expected = [cast(torch.Tensor, ran[path].output) for path in (places["embedding"], *blocks)]
    # With gradients: the same states are then asked for theirs.
    states = getattr(call_port(trial, pair.port, tokens, output_hidden_states=True), "hidden_states", None)
    if states is None:
        raise Mismatch("output_hidden_states=True gives no hidden_states")
    if len(states) != len(expected):
        raise Mismatch(f"{len(states)} hidden states, expected {len(expected)}: the embedding and one for each block")
    numbers = worst(
        *(
            require_semantics(trial, f"hidden_states[{i}]", actual.detach().cpu(), wanted)
            for i, (actual, wanted) in enumerate(zip(states, expected, strict=True))
        )
    )
    _require_gradients(pair.port, states)
    return worst(numbers, _same_beside_a_mask(trial, pair, "output_hidden_states"))


def _same_beside_a_mask(trial: Trial, pair: Pair, option: str) -> dict[str, float]:
    """What is computed of a masked batch is the same whether more of it is returned."""
    if not is_asked(trial, "masks", "masks.right_padding") or not takes(pair.port, "attention_mask"):
        return {}
    tokens, mask = pair.batch.tokens, _end_masked(pair.batch.tokens)
    plain = port_logits(trial, pair.port, tokens, attention_mask=mask)
    asked = port_logits(trial, pair.port, tokens, attention_mask=mask, **{option: True})
    what = f"logits of a masked batch with {option}=True"
    return require_semantics(trial, what, asked[mask.bool()], plain[mask.bool()])


def _end_masked(tokens: torch.Tensor) -> torch.Tensor:
    """An int64 mask (rows, tokens) without the last token, if there is another."""
    mask = torch.ones_like(tokens)
    mask[:, 1:][:, -1:] = 0
    return mask


def _require_gradients(model: Any, states: Sequence[torch.Tensor]) -> None:
    """Raises Mismatch unless each hidden state depends on the token embedding in a way that gradients can follow."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(table, "weight", None)
    if weight is None or not weight.requires_grad:
        return
    for i, state in enumerate(states):
        gradient = None
        if state.requires_grad:
            (gradient,) = torch.autograd.grad(state.sum(), weight, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise Mismatch(
                f"hidden_states[{i}] is detached: no gradient flows from it to the input embedding;"
                " a port returns the states that it goes on computing with"
            )


def attentions(trial: Trial, case: Case) -> dict[str, float]:
    """Attention weights with eager attention: a tensor a block, a map a head, rows that sum to one, nothing masked.

    They are in the order of the blocks: other weights of the last one change its own map alone. Would have caught:
    scores instead of weights, dropout in what is returned, a causal mask that leaks, padding that has weight in them,
    the weights of the last block alone or first, the mean over the heads in place of each.
    """
    case = _at_least_two_layers(trial, at_least_two_tokens(case))
    pair = prepare(trial, case)
    model: Any = pair.port
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    weights = getattr(_call(trial, model, pair.batch.tokens, output_attentions=True), "attentions", None)
    if not weights or any(tensor is None for tensor in weights):
        raise Mismatch("output_attentions=True with eager attention gives no attentions")
    rows, count = pair.batch.tokens.shape
    layers, heads = known_by(trial, case, "num_hidden_layers"), known_by(trial, case, "num_attention_heads")
    if layers is not None and len(weights) != layers:
        raise Mismatch(f"{len(weights)} attentions, expected {layers}: one for each block")
    for layer, tensor in enumerate(weights):
        shape = (rows, tensor.shape[1] if heads is None and tensor.ndim > 1 else heads, count, count)
        if tuple(tensor.shape) != shape:
            raise Mismatch(
                f"attentions[{layer}] has shape {tuple(tensor.shape)},"
                f" expected ({rows}, {'heads' if heads is None else heads}, {count}, {count})"
            )
        require_close(f"sums of attentions[{layer}]", tensor.sum(-1), torch.ones_like(tensor.sum(-1)), bound=1e-5)
        if "causal" in trial.family.features and bool((tensor.triu(1) != 0).any()):
            raise Mismatch(f"attentions[{layer}] has weight on later positions")
        # One token has one place to look at, whichever head looks.
        if count > 1 and tensor.shape[1] > 1 and bool((tensor == tensor[:, :1]).all()):
            raise Mismatch(f"attentions[{layer}] has the same map for every head, though their weights differ")
    numbers = _masked_attentions(trial, pair)
    _require_order(trial, pair, weights)
    return {"layers": float(len(weights)), **numbers}


def _masked_attentions(trial: Trial, pair: Pair) -> dict[str, float]:
    if not is_asked(trial, "masks", "masks.right_padding") or not takes(pair.port, "attention_mask"):
        return {}
    tokens = pair.batch.tokens
    mask = _end_masked(tokens).bool()
    output = _call(trial, pair.port, tokens, attention_mask=mask.long(), output_attentions=True)
    for layer, tensor in enumerate(output.attentions):
        seen = tensor.cpu().transpose(1, 2)[mask]  # (real tokens, heads, keys)
        if bool((seen[..., ~mask[0]] != 0).any()):
            raise Mismatch(f"attentions[{layer}] has weight on masked tokens, which had none in what was computed")
        require_close(f"sums of attentions[{layer}]", seen.sum(-1), torch.ones_like(seen.sum(-1)), bound=1e-5)
    return _same_beside_a_mask(trial, pair, "output_attentions")


def _require_order(trial: Trial, pair: Pair, weights: Sequence[torch.Tensor]) -> None:
    """Raises Mismatch when a map before the last depends on the last block, which it comes before."""
    if len(weights) < 2:
        return
    model = pair.port
    for path in _stacks(model, len(weights)):
        last = cast(torch.nn.ModuleList, model.get_submodule(path))[-1]
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.add_(torch.ones_like(parameter).cumsum(-1).sin())
    after = _call(trial, model, pair.batch.tokens, output_attentions=True).attentions
    for layer, (tensor, before) in enumerate(zip(after[:-1], weights[:-1], strict=True)):
        if not torch.equal(tensor, before):
            raise Mismatch(
                f"attentions[{layer}] changes with the weights of the last of {len(weights)} blocks;"
                " expected the maps in the order of the blocks"
            )


def logits_to_keep(trial: Trial, case: Case) -> dict[str, float]:
    """`logits_to_keep` gives the last logits of the full call, as a count and as positions.

    So does num_logits_to_keep, its older name, in a port that knows it. Would have caught: the argument swallowed,
    which costs the memory it is there to save; a slice [-0:]; one position whatever the count.
    """
    pair = prepare(trial, case)
    tokens = pair.batch.tokens
    full = port_logits(trial, pair.port, tokens)
    positions = torch.arange(0, tokens.shape[1], 2)
    counts: dict[int, torch.Tensor] = {0: full} | {n: full[:, -n:] for n in (1, 2, 3) if n <= tokens.shape[1]}
    for count, expected in counts.items():
        kept = port_logits(trial, pair.port, tokens, logits_to_keep=count)
        require_semantics(trial, f"logits with logits_to_keep={count}", kept, expected)
    kept = port_logits(trial, pair.port, tokens, logits_to_keep=positions)
    require_semantics(trial, f"logits with logits_to_keep={positions.tolist()}", kept, full[:, positions])
    older = "num_logits_to_keep"
    if _names(pair.port, older):
        for count, expected in counts.items():
            try:
                kept = port_logits(trial, pair.port, tokens, **{older: count})
            except (TypeError, ValueError):  # a port may know the older name in order to refuse it
                continue
            require_semantics(trial, f"logits with {older}={count}", kept, expected)
    return {}


def _names(model: torch.nn.Module, word: str) -> bool:
    """Whether the port's forward knows a keyword by name: as a parameter, or as one it takes out of its keywords."""
    if takes(model, word):
        return True
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    return word in getattr(code, "co_consts", ())


def auto_classes(trial: Trial, case: Case) -> dict[str, float]:
    """The configuration's model_type is the port's own, and the Auto class makes the port from it.

    AutoModel makes the base model that is registered for it. Would have caught: model_type "gpt2", with which
    AutoModelForCausalLM silently builds another architecture; AutoModel registered with the model that has the head.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    model_class, cls = port_class(trial), config_class(trial)  # importing the model's file is what registers it
    model_type = getattr(cls, "model_type", "")
    if not model_type:
        raise Mismatch(f"{cls.__name__} has no model_type")
    own = cls.__module__.startswith("transformers.")
    if model_type in CONFIG_MAPPING_NAMES and not own:
        # Registered over it, as exist_ok allows, it would be the port's here and the library's in every other program.
        raise Mismatch(f"model_type '{model_type}' belongs to {CONFIG_MAPPING_NAMES[model_type]} of transformers")
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
    base = base_model(made)
    registered = transformers.MODEL_MAPPING.get(cls, None)
    # Some ports give AutoModel their model with head on purpose; these do not name a base model for it elsewhere.
    if base is not None and isinstance(registered, type) and type(base)._auto_class == "AutoModel":
        wanted: Any = type(base)
        if not issubclass(registered, wanted):
            raise Mismatch(
                f"AutoModel makes {registered.__name__} of the port's configuration here, and {wanted.__name__} of its"
                " remote code; both should be the base model"
            )
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
    _require_input_gradients(trial, model, pair.batch.tokens)
    replaced = torch.nn.Embedding(*table.weight.shape).to(table.weight)
    model.set_input_embeddings(replaced)
    if model.get_input_embeddings() is not replaced:
        raise Mismatch("set_input_embeddings does not set what get_input_embeddings gives")
    if torch.equal(port_logits(trial, model, pair.batch.tokens), before):
        raise Mismatch("after set_input_embeddings the model still uses the old table")
    return {}


def _require_input_gradients(trial: Trial, model: Any, tokens: torch.Tensor) -> None:
    """Raises Mismatch unless a frozen model computes gradients for its inputs once it is told to, as adapters need."""
    if not hasattr(model, "enable_input_require_grads"):
        return
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.enable_input_require_grads()
    tracked = call_port(trial, model, tokens).logits.requires_grad
    model.disable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    if not tracked:
        raise Mismatch(
            "after enable_input_require_grads() the logits of a frozen model carry no gradient, so that adapters with"
            " gradient checkpointing train nothing; tokens are embedded by calling get_input_embeddings()"
        )


def device_map(trial: Trial, case: Case) -> dict[str, float]:
    """The port loads under a device_map, and the modules it must not split exist, its repeated block among them.

    Would have caught: `_no_split_modules` left over from another model, or with the parts of a block instead of the
    block, on which accelerate cuts a residual in two.
    """
    case = _at_least_two_layers(trial, case)
    model = prepare(trial, case).port
    kinds = {type(module).__name__ for module in model.modules()}
    named = list(getattr(model, "_no_split_modules", None) or [])
    if not named:
        raise Mismatch("_no_split_modules is empty; device_map='auto' needs the name of the block")
    if absent := [name for name in named if name not in kinds]:
        raise Mismatch(f"_no_split_modules names {absent[0]}, which the model does not have")
    layers = known_by(trial, case, "num_hidden_layers")
    stacks = _stacks(model, layers) if layers is not None and layers > 1 else {}
    if stacks and not any(_is_whole(model, path, named) for path in stacks):
        path, block = next(iter(stacks.items()))
        raise Mismatch(
            f"_no_split_modules names {', '.join(sorted(named))} and not {block}, the class of the {layers} blocks of"
            f" '{path}'; device_map='auto' may cut a block, and with it a residual, in two"
        )
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


def _logits(trial: Trial, model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The port's logits where they are computed, whatever forward returns them in."""
    output = _call(trial, model, tokens)
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else outputs_of(trial, output)["logits"]


def known_by(trial: Trial, case: Case, name: str) -> Any:
    """The case's value of the field that the library knows by this name; None where the family has no such field."""
    field = field_known_by(trial, case.fields, name)
    return None if field is None else case.fields[field]


def base_model(model: Any) -> Any:
    """The PreTrainedModel inside of a model with a head; None where there is none."""
    from transformers import PreTrainedModel

    base = getattr(model, "base_model", None)
    return base if base is not model and isinstance(base, PreTrainedModel) else None


def is_offered(base: Any) -> bool:
    """Whether AutoModel gives callers this base model; otherwise it is a part of the port, as it likes to be."""
    from transformers import MODEL_MAPPING

    return type(base)._auto_class == "AutoModel" or MODEL_MAPPING.get(type(base.config), None) is type(base)


def _takes_return_dict(base: Any) -> bool:
    """Whether a base model promises return_dict: by a parameter, or by keywords if it is there for callers."""
    named = takes(base, "input_ids") and takes(base, "return_dict")
    return named or (is_offered(base) and takes(base, "return_dict", by_keywords=True))


def _at_least_two_layers(trial: Trial, case: Case) -> Case:
    """The case with two layers where it has one, if the original can be built so."""
    field = field_known_by(trial, case.fields, "num_hidden_layers")
    if field is None or case.fields[field] != 1:
        return case
    deeper = {**case.fields, field: 2}
    try:
        initial_original(trial, deeper)
    except Exception:  # another field may have to change with it
        return case
    return dataclasses.replace(case, fields=deeper)


def _stacks(model: torch.nn.Module, layers: int) -> dict[str, str]:
    """The outermost lists of one block for each layer: path, and the class of their elements."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or len(module) != layers:
            continue
        # A list of norms, or of experts within a block, is not what must stay together.
        parts = [part for part in module[0].modules() if next(part.parameters(recurse=False), None) is not None]
        if len(parts) > 1 and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = type(module[0]).__name__
    return found


def _is_whole(model: torch.nn.Module, path: str, named: Sequence[str]) -> bool:
    """Whether what is named keeps the elements of a list whole: they themselves, or something around them."""
    names = path.split(".")
    around = [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
    elements = list(model.get_submodule(path).children())
    return any(type(module).__name__ in named for module in around) or all(
        type(element).__name__ in named for element in elements
    )
