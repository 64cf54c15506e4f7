# SPDX-License-Identifier: Apache-2.0
"""The catalogue: every check by id, what it needs, and on which routes, backends and dtypes it is asked.

A check is the function `group.name` of the module `harness.checks.<group>`: it takes a Trial and a Case, raises
Mismatch when its property does not hold, Skip when it cannot say anything about this case, and returns its numbers.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.cases import Kind

if TYPE_CHECKING:
    from harness.cases import Case
    from harness.trial import Trial

MAIN = "main"
"""Stands for the port's own way of loading, see `harness.routes.main_route`."""

SEMANTICS = ("float64",)
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One property, as data.

    needs: features a family must have. routes, dtypes: one result for each combination. devices: asked again on every
    accelerator of the family, not on the CPU alone. examples: cases drawn in profile `gate`. cases: which models of the
    family it holds for.
    """

    id: str
    needs: tuple[str, ...] = ()
    routes: tuple[str, ...] = (MAIN,)
    dtypes: tuple[str, ...] = SEMANTICS
    devices: bool = False
    examples: int = 8
    cases: Kind = "drawn"


def function_of(check: Check) -> Callable[[Trial, Case], dict[str, float]]:
    """The function behind a check's id."""
    group, _, name = check.id.partition(".")
    function: Callable[[Trial, Case], dict[str, float]] = getattr(
        importlib.import_module(f"harness.checks.{group}"), name
    )
    return function


def check_ids() -> list[str]:
    """Ids of the whole catalogue, in order."""
    return [check.id for check in CATALOGUE]


def fresh_processes(check: str, route: str, load: str) -> frozenset[str]:
    """Where the model under test, or the port's converter, runs besides: names of sandboxes of a Session.

    By a check's id, its route, and how the port's weights get in.
    """
    words = (route, check.partition(".")[0])
    offline = "remote_code" in words or check in ("hub.offline", "heads.saved") or load.startswith("command:")
    return frozenset({"sandbox"} if offline else ()) | frozenset({"hub"} if "hub" in words else ())


EVERY_ROUTE = (MAIN, "direct", "pretrained", "remote_code", "hub")

CATALOGUE: tuple[Check, ...] = (
    Check(id="config.json_round_trip", needs=("transformers",)),
    Check(id="config.fields"),
    Check(id="config.unknown_keys", examples=5),
    Check(id="config.declared"),
    Check(id="config.defaults", examples=2),
    Check(id="config.refused", examples=3),
    Check(id="config.common_names", examples=3),
    Check(id="weights.coverage", needs=("logits",)),
    Check(id="weights.values"),
    Check(id="weights.configuration", needs=("checkpoint",), examples=4),
    Check(id="weights.evaluation_mode", needs=("checkpoint",), examples=1),
    Check(id="weights.tied", needs=("tied_embeddings",)),
    Check(id="weights.tied_after_resize", needs=("transformers", "tied_embeddings"), examples=5),
    Check(id="weights.back_to_original", needs=("checkpoint",), examples=5),
    Check(id="weights.dialects", needs=("checkpoint",), examples=4),
    Check(id="weights.older_dialects", needs=("checkpoint",), examples=4),
    Check(id="weights.program", needs=("checkpoint",), examples=1),
    Check(id="weights.read_again", needs=("checkpoint",), examples=1),
    Check(id="weights.dtypes", needs=("checkpoint",), examples=2),
    Check(id="weights.whole_numbers", needs=("checkpoint", "dropout"), examples=1),
    Check(id="weights.large", needs=("checkpoint",), examples=1),
    Check(id="weights.damaged", needs=("checkpoint",), examples=4),
    Check(id="forward.logits", needs=("logits",), routes=EVERY_ROUTE, devices=True, examples=24),
    Check(id="forward.blocks", needs=("taps",), devices=True, examples=12),
    Check(id="forward.outputs", needs=("further_outputs",), devices=True),
    Check(id="forward.further_inputs", needs=("further_inputs",), devices=True),
    Check(id="forward.outside_vocabulary", needs=("logits",), examples=2),
    Check(id="forward.lengths", needs=("logits",), devices=True),
    Check(id="forward.large", needs=("logits",), routes=(MAIN, "pretrained"), examples=1),
    Check(id="forward.beyond_maximum", needs=("logits", "learned_positions"), examples=4),
    Check(id="forward.small_scale", needs=("logits",), devices=True),
    Check(id="forward.large_scale", needs=("logits",), devices=True),
    Check(id="forward.rows_independent", needs=("logits",), devices=True, cases="independent"),
    Check(id="forward.causal", needs=("causal",), devices=True, cases="independent"),
    Check(id="forward.deterministic", needs=("logits",), devices=True),
    Check(id="forward.inputs_embeds", needs=("logits",), devices=True, cases="independent"),
    Check(id="forward.position_ids", needs=("learned_positions",), devices=True, cases="independent"),
    Check(id="masks.none_is_ones", needs=("masks",), devices=True),
    Check(id="masks.additive", needs=("masks",), devices=True),
    Check(id="masks.original", needs=("masks",), devices=True),
    Check(id="masks.right_padding", needs=("masks",), devices=True, cases="independent"),
    Check(id="masks.left_padding", needs=("masks",), devices=True, cases="independent"),
    Check(id="masks.interior_padding", needs=("masks",), devices=True, cases="independent"),
    Check(id="masks.pad_content", needs=("masks",), devices=True, cases="independent"),
    Check(
        id="masks.packed", needs=("learned_positions", "causal", "masks"), devices=True, examples=4, cases="independent"
    ),
    Check(id="masks.all_masked_row", needs=("masks",), devices=True, cases="independent"),
    Check(id="loss.value", needs=("loss",), devices=True),
    Check(id="loss.ignored", needs=("loss",)),
    Check(id="loss.from_logits", needs=("loss",)),
    Check(id="loss.targets", needs=("loss",), examples=4),
    Check(id="loss.pure", needs=("loss",), cases="independent"),
    Check(id="training.gradients", needs=("logits",), devices=True),
    Check(id="training.gradients_masked", needs=("loss", "masks"), devices=True, examples=4, cases="independent"),
    Check(id="training.special_tokens", needs=("loss",), examples=3),
    Check(id="training.optimiser_steps", needs=("loss", "parameter_groups"), devices=True, examples=4),
    Check(id="training.initialisation", needs=("initialisation",), examples=4, cases="routed"),
    Check(id="training.dropout", needs=("logits", "dropout"), examples=4),
    Check(id="training.gradient_checkpointing", needs=("loss",), devices=True, examples=4),
    Check(id="training.micro_batches", needs=("loss",), examples=4, cases="independent"),
    Check(id="training.parameter_groups", needs=("parameter_groups",), examples=3),
    Check(id="generation.greedy", needs=("generation",), devices=True, cases="independent"),
    Check(
        id="generation.past_maximum",
        needs=("generation", "learned_positions"),
        devices=True,
        examples=5,
        cases="independent",
    ),
    Check(id="generation.large", needs=("generation",), examples=1, cases="independent"),
    Check(id="generation.cache", needs=("generation",), devices=True, cases="independent"),
    Check(id="generation.cache_masked", needs=("generation", "masks"), devices=True, cases="independent"),
    Check(id="generation.chunked_prefill", needs=("generation",), devices=True, cases="independent"),
    Check(id="generation.sampled", needs=("generation",), examples=5, cases="independent"),
    Check(id="generation.batch", needs=("generation",), devices=True, examples=5, cases="independent"),
    Check(id="generation.left_padded", needs=("generation", "masks"), devices=True, examples=5, cases="independent"),
    Check(id="generation.beam", needs=("generation",), examples=4, cases="independent"),
    Check(id="generation.given", needs=("generation",), examples=2, cases="independent"),
    Check(id="generation.static_cache", needs=("generation",), devices=True, examples=4, cases="independent"),
    Check(id="generation.inputs_embeds", needs=("generation",), examples=3, cases="independent"),
    Check(id="routing.logits", needs=("routing",), devices=True, cases="routed"),
    Check(id="routing.choices", needs=("routing",), devices=True, examples=12, cases="routed"),
    Check(id="routing.capacity", needs=("routing",), examples=4, cases="routed"),
    Check(id="routing.auxiliary", needs=("routing", "loss"), devices=True, examples=4, cases="routed"),
    Check(id="routing.noise", needs=("routing", "loss"), examples=3, cases="routed"),
    Check(id="routing.variance", needs=("routing", "causal"), devices=True, cases="routed"),
    Check(id="routing.padding", needs=("routing", "masks"), devices=True, cases="routed"),
    Check(id="routing.generation", needs=("routing", "generation"), devices=True, examples=5, cases="routed"),
    Check(id="routing.purity", needs=("routing", "loss"), examples=4, cases="routed"),
    Check(
        id="routing.precision",
        needs=("routing", "logits"),
        dtypes=(*PRECISIONS, "autocast"),
        devices=True,
        cases="routed",
    ),
    Check(id="roundtrip.pretrained", examples=6),
    Check(id="roundtrip.options", examples=2),
    Check(id="roundtrip.copies", needs=("transformers", "logits"), examples=2),
    Check(id="roundtrip.incomplete", examples=4),
    Check(id="roundtrip.sharded", needs=("transformers",), examples=4),
    Check(id="roundtrip.bin", needs=("transformers",), examples=4),
    Check(id="roundtrip.fixed_point", examples=4),
    Check(id="roundtrip.poisoned_memory", needs=("transformers",), examples=4),
    Check(id="roundtrip.meta_device", needs=("transformers",), examples=4),
    Check(id="roundtrip.cast", dtypes=("float32", "bfloat16", "float16"), examples=4),
    Check(id="roundtrip.dtype", dtypes=("bfloat16", "float16"), examples=4),
    Check(id="remote_code.files", needs=("transformers",), examples=2),
    Check(id="remote_code.outputs", needs=("transformers", "logits"), examples=4),
    Check(id="remote_code.poisoned_memory", needs=("transformers", "logits"), examples=2),
    Check(id="remote_code.resaved", needs=("transformers",), examples=2),
    Check(id="remote_code.two_models", needs=("transformers", "logits"), examples=2),
    Check(id="remote_code.base_model", needs=("transformers",), examples=1),
    Check(id="remote_code.tokenizer", needs=("transformers", "tokenizer"), examples=2),
    Check(id="remote_code.generation", needs=("transformers", "generation"), examples=2, cases="independent"),
    Check(id="remote_code.cold", needs=("transformers", "logits"), examples=1),
    Check(id="hub.files", needs=("transformers",), examples=1),
    Check(id="hub.outputs", needs=("logits",), examples=2),
    Check(id="hub.repushed", needs=("transformers", "logits"), examples=1),
    Check(id="hub.revisions", needs=("logits",), examples=1),
    Check(id="hub.code_revision", needs=("transformers", "logits"), examples=1),
    Check(id="hub.pinned_code", needs=("transformers", "logits"), examples=1),
    Check(id="hub.private", needs=("logits",), examples=1),
    Check(id="hub.gated", needs=("logits",), examples=1),
    Check(id="hub.cache_dir", needs=("logits",), examples=1),
    Check(id="hub.warm_cache", needs=("logits",), examples=1),
    Check(id="hub.offline", needs=("logits",), examples=1),
    Check(id="hub.bin", needs=("transformers", "logits"), examples=1),
    Check(id="hub.sharded", needs=("transformers", "logits"), examples=1),
    Check(id="hub.tokenizer", needs=("transformers", "logits"), examples=1),
    Check(id="precision.logits", needs=("logits",), dtypes=(*PRECISIONS, "autocast"), devices=True, cases="continuous"),
    Check(
        id="precision.long_positions",
        needs=("logits", "learned_positions"),
        dtypes=("bfloat16",),
        devices=True,
        examples=1,
        cases="continuous",
    ),
    Check(
        id="precision.loss",
        needs=("loss",),
        dtypes=(*PRECISIONS, "autocast"),
        devices=True,
        examples=5,
        cases="continuous",
    ),
    Check(id="precision.masks", needs=("masks",), dtypes=PRECISIONS, devices=True, examples=5, cases="continuous"),
    Check(
        id="precision.gradients",
        needs=("loss",),
        dtypes=("float32", "bfloat16"),
        devices=True,
        examples=4,
        cases="continuous",
    ),
    Check(id="precision.cache", needs=("generation",), dtypes=PRECISIONS, devices=True, examples=4, cases="continuous"),
    Check(id="precision.quantised", needs=("quantisation",), dtypes=("float32",), devices=True, examples=2),
    Check(id="backend.attention", needs=("transformers", "logits"), devices=True, examples=6),
    Check(
        id="backend.attention_masked", needs=("transformers", "masks"), devices=True, examples=6, cases="independent"
    ),
    Check(id="backend.attention_gradients", needs=("transformers", "loss"), devices=True, examples=4),
    Check(id="backend.placement", needs=("transformers", "logits"), examples=2),
    Check(id="backend.compiled", needs=("logits",), examples=1, cases="routed"),
    Check(id="process.settings", needs=("logits",), examples=1),
    Check(id="process.random_numbers", needs=("logits",), examples=1),
    Check(id="heads.logits", needs=("heads",), examples=6),
    Check(id="heads.loss", needs=("heads",), examples=3),
    Check(id="heads.dropout", needs=("heads", "dropout"), examples=2),
    Check(id="heads.saved", needs=("heads",), examples=2),
    Check(id="api.original_only", needs=("original_only",), examples=1),
    Check(id="api.output_type", needs=("transformers", "logits"), examples=3),
    Check(id="api.tuple_order", needs=("transformers", "logits"), examples=3),
    Check(id="api.legacy_calls", needs=("legacy_calls", "loss"), examples=3),
    Check(id="api.configured_outputs", needs=("transformers", "logits"), examples=3),
    Check(id="api.hidden_states", needs=("taps",), examples=4),
    Check(id="api.attentions", needs=("attentions",), examples=4),
    Check(id="api.logits_to_keep", needs=("causal",), examples=4),
    Check(id="api.auto_classes", needs=("transformers",), examples=1),
    Check(id="api.embeddings", needs=("transformers", "logits"), examples=2),
    Check(id="api.device_map", needs=("transformers",), examples=1),
)
