# SPDX-License-Identifier: Apache-2.0
"""What the harness has to know about a family, as data; and finding the families that are installed or registered."""

from __future__ import annotations

import dataclasses
import difflib
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import DescriptionError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from hypothesis.strategies import SearchStrategy

    from harness.golden import Golden

Fields = Mapping[str, Any]
"""A configuration as the original's own fields, by name."""

ENTRY_POINTS = "parity.families"

SHOWN = 12
"""How many valid choices an error message lists."""

_registered: dict[str, Family] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConvention:
    """How a model takes its labels: "preshifted" has them shifted already; "hf" as transformers' models do.

    These shift inside the model where it is causal, and nowhere where it is not: a label is the token at its position.
    """

    labels: Literal["hf", "preshifted"]
    ignore_index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A named place in both models whose output has the same meaning: paths of submodules."""

    name: str
    original: str
    port: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """A layer that sends every token to some of its experts, as places in both models.

    layer: what the experts' outputs are summed to, in the shape of its input or with rows and tokens in one axis.
    logits: the scores of the experts before any is chosen, (tokens, experts), row after row. router: the module whose
    output says, in some ports, what was chosen.
    """

    layer: Tap
    logits: Tap
    router: Tap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """Where tokens go: all (tokens, k), the best expert first.

    indices: int64, the experts. ranks: int64, place in the expert's queue. keep: bool, whether there was room.
    weights: what the expert's output is multiplied by, 0 where there was no room.
    """

    indices: torch.Tensor
    ranks: torch.Tensor
    keep: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """One routed layer of the original in a call: its module, what it was given (tokens, width), its router logits."""

    module: torch.nn.Module
    inputs: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """A term of the training loss that depends on the routed layers, and its closed form.

    on: overrides of a configuration that has none of the terms, which switch this one on. closed_form: (fields, the
    routed layers) -> what the loss grows by; its gradient is the term's too.
    """

    name: str
    on: Fields
    closed_form: Callable[[Fields, Sequence[Observed]], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How a sparse family chooses experts: what the checks of group `routing` need.

    layers: fields -> its routed layers, in order.
    decide: (router logits (tokens, experts), fields, whether in training) -> the decision, in closed form.
    expert_outputs: (routed layer of the original, inputs (tokens, width)) -> every expert's output of every token,
        (tokens, experts, width), before it is weighed.
    exposed: what a port's router returned -> its decision by field of `Decision`, None where it returns something else.
    crowded: fields -> the same with too little room: many tokens find none.
    capacity: (fields, number of tokens, whether in training) -> how many tokens an expert takes.
    quiet: overrides that switch every auxiliary loss and all noise off.
    noise: overrides that switch noise in the choice on, where the family has it.
    auxiliary: the terms of the training loss, each alone.
    auxiliary_in_evaluation: whether the terms are part of the loss in evaluation too.
    """

    layers: Callable[[Fields], Sequence[RoutedLayer]]
    decide: Callable[[torch.Tensor, Fields, bool], Decision]
    expert_outputs: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    exposed: Callable[[Any], Mapping[str, torch.Tensor] | None]
    crowded: Callable[[Fields], Fields]
    capacity: Callable[[Fields, int, bool], int]
    quiet: Fields = dataclasses.field(default_factory=dict)
    noise: Fields = dataclasses.field(default_factory=dict)
    auxiliary: Sequence[Auxiliary] = ()
    auxiliary_in_evaluation: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A further class beside the port's model, on the same body, such as a classifier of whole texts.

    port: the name of the class in the file of the port's model, or in another file of the port's `code`.
    auto_class: what loads a saved one, where it is a model of transformers.
    options: keywords of its configuration, each set a head of its own.
    original: `module:Class` of the original. build_original: (class, fields, options) -> module in evaluation mode.
    run_original: (module, tokens, mask (rows, tokens) bool) -> logits (rows, ...).
    labels: (tokens (rows, tokens), options, seed) -> labels of a batch.
    loss: (logits, labels, options) -> scalar, in closed form.
    port_key: (original's state-dict key) -> the port's key.
    write: (original with the head, fields, directory) writes the files from which the port's class then loads itself by
        from_pretrained. None: it is built, and given the original's numbers by `port_key`.
    dropout: fields that set a dropout probability of the head alone, beside the family's.
    """

    name: str
    port: str
    auto_class: str = ""
    options: Sequence[Fields]
    original: str
    build_original: Callable[[type, Fields, Fields], torch.nn.Module]
    run_original: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    labels: Callable[[torch.Tensor, Fields, int], torch.Tensor]
    loss: Callable[[torch.Tensor, torch.Tensor, Fields], torch.Tensor]
    port_key: Callable[[str], str] = str
    write: Callable[[torch.nn.Module, Fields, Path], None] | None = None
    dropout: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the ports of a family are quantised: a function `quantize(model, bits=, group_size=)` in one of their files.

    fields: overrides of a drawn case's fields, for rows that are long enough. options: keywords, each set a way.
    """

    fields: Fields
    options: Sequence[Fields]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model with its conventions. Everything a check needs to know that is about one family alone.

    Functions must not import a framework until they are called: families are read while tests are collected.

    name: the word used in descriptions and reports.
    features: what the family has; a check whose needs are not among them is skipped. Known words: `logits`, `loss`,
        `causal`, `masks`, `dropout`, `generation`, `checkpoint`, `initialisation`, `parameter_groups`, `taps`,
        `tied_embeddings`, `learned_positions`, `attentions`, `routing`, `legacy_calls`, `heads`, `original_only`,
        `further_inputs`, `further_outputs`, `quantisation`, `tokenizer` (its checkpoint has one, and a converter takes
        it along).
    configurations: a Hypothesis strategy of `Fields`, valid by construction, that shrinks to the plainest model.
    original: `module:Class` of the built-in original.
    build_original: (class, fields) -> module in evaluation mode with its default initialisation.
    run_original: (module, inputs, targets or None) -> outputs by name; at least `logits` (batch, tokens, vocabulary),
        and `loss` (scalar) when targets are given. Taps are read by the harness itself.
    fields: original field -> names it is known by in ports, the likeliest first (the field's own name is always tried).
    own_names: fields whose own name scripts and old files give to a port's configuration too, whatever it calls them.
    port_fields: constants every port's configuration gets where it declares the name.
    defaults: every field of the original's configuration, with what it is where nothing is given; None: not all of them
        have a default.
    special_tokens: configuration name (`eos_token_id`, ...) -> its default; those not named are None in the original.
    refused: overrides of a drawn case's fields, each of which makes a configuration that the original refuses.
    large: overrides of a drawn case's fields, each of which makes a model that is larger somewhere than any that is
        drawn (layers with numbers of two digits, more positions or tokens, wider heads). A few checks ask for one row
        of its full length; `weights.large` writes files of the first.
    independent: fields -> those of a model near this one in which a token depends on no other row and on nothing that
        comes later: with room for every token at every expert, no loss and no noise over the batch. None: all are.
    continuous: fields -> those of a model near this one that has no choices, so that small errors stay small. None: all
        are.
    routing: how a family with experts chooses them.
    tuple_order: the outputs of the original's forward, in order. A port's tuple for return_dict=False may have it
        instead of the library's, which has the loss first. What `run_original` does not give has to be there only.
    legacy_calls: how scripts written for the original call it -> such a call: (model, tokens, targets) -> outputs in
        `tuple_order`. They work on a port too.
    port_key: (original's state-dict key) -> the port's key.
    tied: groups of state-dict keys of the original that are one tensor; a function of the fields where these decide.
    run_masked: as `run_original` without targets, for a family with `masks` whose original takes them: (module, tokens,
        mask (rows, tokens) bool, True where a token is to be seen) -> outputs.
    padding: fields -> the token id that padding has to carry, where the model tells padding by its id too; None: any
        id, since the mask alone tells.
    positions_by_mask: whether positions count the tokens that the mask keeps; False where they count padding too.
    mask_axes: of an additive mask, by the family's contract: 4 (rows, 1 or heads, queries, keys), or 2 (rows, keys).
    relative_positions: fields -> whether only the distance of two positions matters. Such a model goes on beyond its
        maximum length. None: never.
    first_position: the row of a learned position table that the first token has; a function where fields decide.
    longest: fields -> tokens of the longest text, where that is not the number of the field that bounds positions.
    further_inputs: further argument of both forwards -> (fields, tokens (rows, tokens), seed) -> its value, or None
        where the configuration has none of it.
    run_further: as `run_original` without targets, with further arguments by name: (module, tokens, arguments).
    original_only: argument of the original's forward that a port cannot take -> its value for tokens (rows, tokens).
        A port says so instead of leaving it aside.
    heads: further classes beside the port's model, each with what it is compared to.
    quantisation: how its ports are quantised, where they are.
    framework: what its ports are written in, `transformers` or `mlx`; checks of a library's interface need that one.
    output: the name of the output that is compared; what the checks call logits is (rows, tokens, any width).
    maximum_length, vocabulary: names of the fields that bound positions and token ids.
    dropout: name of the field that sets the dropout probability, or their names; none where there is no such field.
    loss: how the original takes its targets.
    taps: fields -> the places to compare, in the order data passes them.
    gains: regular expression on the original's keys -> factor on the sensitising weights of that tensor.
    write_checkpoint: (module, fields, path, training state or None) writes the original's own file.
    read_checkpoint: path -> (fields, state dict), as the original's own resume code would read them.
    checkpoint_dialects: (module, fields, directory) -> files written there by what sets them apart from the plain one:
        equivalent files that some revision or setting of the original's training writes. `weights.dialects` asks for
        those that today's original reads, `weights.older_dialects` for the others.
    resume: (module, path) resumes the original's training from its own file, as far as the weights are loaded; raises
        where it cannot.
    training_state: keyword of a port's way back -> a value to write there, such as the number of steps done. Those that
        the port's `to_...` takes are given.
    read_training_state: path -> the same by the same keywords, from where the original's resume code looks for each.
    file_dtypes: those that a checkpoint of the original can be in, beside float32.
    checkpoint_name: the name of the file, or of the directory, that `write_checkpoint` writes.
    weights_file: in a checkpoint that is a directory, the file that holds the tensors.
    generate_original: (module, prompt, keyword options max_new_tokens, temperature, top_k) -> prompt + new tokens.
    parameter_groups: (original module, weight decay) -> AdamW groups of the original.
    revised_name: how a port may be told name and revision in one text, such as "{name}@{revision}".
    golden: reproduces what a golden file stores, see `harness.golden`.
    golden_names: further values of a golden file's `family` that this family answers for.
    golden_bounds: tensor-name pattern -> relative bound, where the default of `harness.golden` does not hold; the first
        pattern that fits counts. A function of the golden file where they depend on its configuration or mode.
    mutants: `module:NAME` of the planted bugs that `parity selftest` proves the checks with.
    port_auto_class: the transformers Auto class a saved port is loaded with.
    backends: where ports of this family can run.
    """

    name: str
    features: frozenset[str]
    configurations: Callable[[], SearchStrategy[dict[str, Any]]]
    original: str
    build_original: Callable[[type, Fields], torch.nn.Module]
    run_original: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor]]
    fields: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    own_names: Sequence[str] = ()
    port_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Fields | None = None
    special_tokens: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    refused: Sequence[Fields] = ()
    large: Sequence[Fields] = ()
    independent: Callable[[Fields], Fields] | None = None
    continuous: Callable[[Fields], Fields] | None = None
    routing: Routing | None = None
    tuple_order: Sequence[str] = ("loss", "logits")
    legacy_calls: Mapping[str, Callable[[Any, torch.Tensor, torch.Tensor], Any]] = dataclasses.field(
        default_factory=dict
    )
    port_key: Callable[[str], str] = str
    tied: Sequence[Sequence[str]] | Callable[[Fields], Sequence[Sequence[str]]] = ()
    run_masked: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]] | None = None
    padding: Callable[[Fields], int | None] | None = None
    positions_by_mask: bool = True
    mask_axes: Literal[2, 4] = 4
    relative_positions: Callable[[Fields], bool] | None = None
    first_position: int | Callable[[Fields], int] = 0
    longest: Callable[[Fields], int] | None = None
    further_inputs: Mapping[str, Callable[[Fields, torch.Tensor, int], torch.Tensor | None]] = dataclasses.field(
        default_factory=dict
    )
    run_further: (
        Callable[[torch.nn.Module, torch.Tensor, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None
    ) = None
    original_only: Mapping[str, Callable[[torch.Tensor], Any]] = dataclasses.field(default_factory=dict)
    heads: Sequence[Head] = ()
    quantisation: Quantisation | None = None
    framework: str = "transformers"
    output: str = "logits"
    maximum_length: str = "max_position_embeddings"
    vocabulary: str = "vocab_size"
    dropout: str | Sequence[str] = ()
    loss: LossConvention = LossConvention(labels="hf", ignore_index=-100)
    taps: Callable[[Fields], Sequence[Tap]] | None = None
    gains: Mapping[str, float] = dataclasses.field(default_factory=dict)
    write_checkpoint: Callable[..., None] | None = None
    read_checkpoint: Callable[[str], tuple[Fields, dict[str, torch.Tensor]]] | None = None
    checkpoint_dialects: Callable[[torch.nn.Module, Fields, Path], Mapping[str, Path]] | None = None
    resume: Callable[[torch.nn.Module, str], None] | None = None
    training_state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read_training_state: Callable[[str], Mapping[str, Any]] | None = None
    file_dtypes: Sequence[str] = ("float64", "bfloat16", "float16")
    checkpoint_name: str = "checkpoint.pt"
    weights_file: str = ""
    generate_original: Callable[..., torch.Tensor] | None = None
    parameter_groups: Callable[[torch.nn.Module, float], list[dict[str, Any]]] | None = None
    revised_name: str = ""
    golden: Callable[[Golden], Mapping[str, torch.Tensor]] | None = None
    golden_names: Sequence[str] = ()
    golden_bounds: Mapping[str, float] | Callable[[Golden], Mapping[str, float]] = dataclasses.field(
        default_factory=dict
    )
    mutants: str | None = None
    port_auto_class: str = "AutoModelForCausalLM"
    backends: Sequence[str] = ("torch-cpu", "torch-cuda", "torch-mps")


def taps_of(family: Family, fields: Fields) -> Sequence[Tap]:
    """The places of a configuration at which both models are compared; none where the family names none."""
    return family.taps(fields) if family.taps is not None else ()


def tied_of(family: Family, fields: Fields) -> Sequence[Sequence[str]]:
    """The groups of the original's keys that are one tensor in a configuration."""
    return family.tied(fields) if callable(family.tied) else family.tied


def dropouts_of(family: Family) -> Sequence[str]:
    """The fields that set a dropout probability."""
    return (family.dropout,) if isinstance(family.dropout, str) else family.dropout


def with_dropout(family: Family, fields: Fields, probability: float) -> Fields:
    """Fields with every dropout probability set, where the family has any."""
    return {**fields, **dict.fromkeys(dropouts_of(family), probability)}


def padding_of(family: Family, fields: Fields) -> int | None:
    """The id that padding has to carry in a configuration; None where any may stand there."""
    return family.padding(fields) if family.padding is not None else None


def longest_of(family: Family, fields: Fields) -> int:
    """The tokens of the longest text of a configuration."""
    return family.longest(fields) if family.longest is not None else int(fields[family.maximum_length])


def first_position_of(family: Family, fields: Fields) -> int:
    """The row of its position table that the first token of a text has."""
    return family.first_position(fields) if callable(family.first_position) else family.first_position


def has_relative_positions(family: Family, fields: Fields) -> bool:
    """Whether only the distance of two positions matters in a configuration."""
    return family.relative_positions is not None and family.relative_positions(fields)


def register_family(family: Family) -> Family:
    """Makes a family known in this process, as a `conftest.py` does; a second one of the same name replaces it."""
    _registered[family.name] = family
    return family


def registered() -> Mapping[str, Family]:
    """The families that are registered in this process, by name; a copy."""
    return dict(_registered)


def family_names() -> list[str]:
    """Names of every family that is registered or has an entry point, sorted; nothing is imported for it."""
    return sorted({*_registered, *(entry.name for entry in metadata.entry_points(group=ENTRY_POINTS))})


def find_family(name: str) -> Family:
    """The family of that name. Raises DescriptionError that names the nearest one when there is none."""
    if name in _registered:
        return _registered[name]
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=name):
        try:
            family = entry.load()
        except Exception as error:  # any error of foreign code, at import, is a finding about that code
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DescriptionError(f"family '{name}' cannot be imported from {entry.value}: {cause}") from error
        if not isinstance(family, Family):
            raise DescriptionError(f"entry point {entry.value} of family '{name}' is not a harness.Family")
        return family
    raise DescriptionError(
        f"there is no family '{name}'{nearest(name, family_names())}; one of your own has an entry point in"
        f" '{ENTRY_POINTS}', or is registered in conftest.py"
    )


def read_conftest(directory: Path, needed: Iterable[str]) -> None:
    """Imports a directory's conftest.py where a family among `needed` is not known: it may register it.

    Raises DescriptionError when it cannot be imported.
    """
    file = directory / "conftest.py"
    if set(needed) <= set(family_names()) or not file.is_file():
        return
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    try:
        runpy.run_path(str(file), run_name="conftest")
    except Exception as error:
        raise DescriptionError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of an error message: the nearest valid choice, then all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    shown, rest = list(known)[:SHOWN], len(known) - SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f"{hint} known: {', '.join(shown) or 'none'}{more}"
