# SPDX-License-Identifier: Apache-2.0
"""A failure that names the wrong module costs an afternoon: a bug planted in a module is found in that module."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.capture import capture
from harness.cases import Case
from harness.checks import Check
from harness.errors import Mismatch
from harness.families import Family, Tap, find_family
from harness.localise import Divergence, compare_taps, locate
from harness.mutants import Mutant, mutants_of, plant
from harness.ports import Port, read_ports
from harness.runner import Session, check_parity, session
from harness.trial import Trial, prepare

ROOT = Path(__file__).parents[2]
FAMILY = find_family("nanogpt")
PORT = next(port for port in read_ports(ROOT) if port.name == "nanogpt")
MUTANTS = {mutant.id: mutant for mutant in mutants_of(FAMILY)}
CASE = Case(
    fields={
        "block_size": 8,
        "vocab_size": 13,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "dropout": 0.0,
        "bias": True,
    },
    rows=2,
    tokens=6,
    seed=5,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    with session() as opened:
        yield opened


def trial_of(
    port: Port, shared: Session, workdir: Path, *, family: Family = FAMILY, route: str = "checkpoint"
) -> Trial:
    return Trial(
        port=port,
        family=family,
        route=route,
        backend="torch-cpu",
        dtype="float64",
        workdir=workdir,
        sandbox=shared.sandbox,
        hub=shared.hub,
    )


def located(
    port: Port,
    shared: Session,
    workdir: Path,
    check: str = "forward.logits",
    *,
    case: Case = CASE,
    seconds: float = 30.0,
    **options: Any,
) -> Divergence | None:
    return locate(trial_of(port, shared, workdir, **options), case, Check(id=check), seconds=seconds)


@pytest.mark.parametrize(
    ("mutant", "module", "said"),
    [
        (
            "scale-missing",
            "block.0.attn",
            "scores are 2x the original's before the softmax, which is the root of the head",
        ),
        ("scale-doubled", "block.0.attn", "scores are 2x the original's before the softmax$"),
        ("scale-by-width", "block.0.attn", "scores are 0.7071x the original's before the softmax"),
        ("query-key-swapped", "block.0.attn", "q and k exchanged, in c_attn"),
        ("key-value-swapped", "block.0.attn", "k and v exchanged, in c_attn"),
        ("heads-interleaved", "block.0.attn", "channels of q, k and v dealt to 2 heads in turn instead of in blocks"),
        ("not-causal", "block.0.attn", "the causal mask is missing"),
        ("gelu-tanh", "block.0.mlp", "its activation is GELU's tanh approximation"),
        ("gelu-relu", "block.0.mlp", "its activation is ReLU"),
        ("epsilon-1e-6", "block.0.ln_1", "its epsilon is 1e-06, the original's is 1e-05"),
        ("epsilon-of-last-norm", "final_norm", "its epsilon is 1e-06, the original's is 1e-05"),
        ("norm-missing", "block.0.ln_1", "as if block.0.ln_1 were skipped"),
        ("norms-exchanged", "block.0.ln_2", "as if block.0.ln_1 ran in the place of block.0.ln_2"),
        ("post-norm", "block.0.ln_2", "the port runs block.0.mlp before block.0.ln_2"),
        # It runs, and its output is dropped behind its tap.
        ("last-norm-missing", "head", "is the output of block.1 instead of the output of final_norm"),
        ("position-from-one", "embedding", "transformer.wpe.weight is looked up one row too late"),
        ("positions-missing", "embedding", "lacks the output of transformer.wpe"),
        (
            "embedding-scaled",
            "embedding",
            "has 2.828x the output of transformer.wte (2.828 is the root of the width, 8)",
        ),
        ("attention-residual-dropped", "block.0.ln_2", "what it is given lacks the output of embedding"),
        ("mlp-residual-dropped", "block.0", "its output lacks the input of block.0.ln_2"),
        ("branches-parallel", "block.0.ln_2", "what it is given lacks the output of block.0.attn"),
        ("residual-shifted", "block.0", "what it is given is the original's plus 1"),
        ("logits-scaled", "logits", "they are 0.3536x the original's (0.3536 is one over the root of the width, 8)"),
        ("converter-transposes", "transformer.h.0.attn.c_proj.weight", "c_proj.weight transposed (and 1 more tensor)"),
        ("converter-drops-biases", "transformer.h.0.ln_1.bias", "is zero, and not the original's"),
        ("converter-rounds", "transformer.wte.weight", "rounded to bfloat16"),
        (
            "converter-repeats-a-layer",
            "transformer.h.1.ln_1.weight",
            "holds the original's transformer.h.0.ln_1.weight",
        ),
        ("converter-swaps-norms", "transformer.h.0.ln_1.weight", "they have changed places"),
        ("import-rolls-positions", "transformer.wpe.weight", "with rows shifted by one"),
        ("cache-one-layer", "block.1.attn", "with use_cache=False it agrees"),
    ],
)
def test_a_planted_bug_is_found_where_it_is_and_told(
    mutant: str, module: str, said: str, shared: Session, tmp_path: Path
) -> None:
    planted = plant(MUTANTS[mutant], PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path)
    assert found is not None
    assert found.module == module, found
    # A dollar stands for the end: two is the root of the head size here, and that is not what was planted.
    assert said in found.sentence + "$", found


@pytest.mark.parametrize(
    ("mutant", "check", "module", "said"),
    [
        ("mask-ignored", "masks.left_padding", "row 0", "sees position 0, which is padding: the mask is not used"),
        ("mask-inverted", "masks.right_padding", "row 0", "the mask is read the other way round"),
        ("mask-additive-as-boolean", "masks.additive", "row 0", "position 0 sees position 1, which comes later"),
        ("mask-additive-hardened", "masks.additive", "row 0", "+0.5 at position 5 for position 0 changes nothing"),
        ("mask-4d-boolean-inverted", "generation.static_cache", "row 0", "with a boolean mask of four axes"),
        (
            "mask-of-first-row",
            "backend.attention_masked",
            "row 1",
            "with eager attention, with padding on the left, row 1",
        ),
        ("eager-scale-missing", "backend.attention", "block.0.attn", "with eager attention, block.0.attn diverges"),
        ("eager-softmax-axis", "backend.attention", "block.0.attn", "runs over the queries instead of the keys"),
        ("position-counts-padding", "masks.left_padding", "row 0", "instead of 0: positions count the padding too"),
        ("position-of-first-row", "masks.left_padding", "row 1", "every row gets the positions of row 0"),
        ("position-ids-ignored", "forward.position_ids", "position_ids", "position_ids change nothing"),
        (
            "mask-overrides-position-ids",
            "forward.position_ids",
            "position_ids",
            "position_ids beside a mask change nothing",
        ),
        (
            "position-restarts",
            "generation.cache",
            "embedding at position 1",
            "as if it stood at position 0 instead of 1",
        ),
        (
            "cache-not-used",
            "generation.cache",
            "block.0.attn at position 1",
            "it does not see position 0",
        ),
        (
            "cache-chunk-forgets",
            "generation.chunked_prefill",
            "block.0.attn at position 2",
            "it does not see position 1",
        ),
        ("cache-given-but-unused", "generation.cache", "embedding at position 5", "a last call with use_cache=False"),
        ("mask-cached-positions-from-front", "generation.cache_masked", "embedding at position 2", "as if it stood at"),
        (
            "past-of-dynamic-cache-only",
            "generation.static_cache",
            "embedding at position 1",
            "one token at a time, static",
        ),
        ("dropout-in-evaluation", "forward.deterministic", "block.0.attn", "it gives something else at every call"),
        (
            "embeds-scaled-alone",
            "forward.inputs_embeds",
            "embedding",
            "its output has 0.5x the output of transformer.wte",
        ),
        (
            "logits-centred-over-batch",
            "forward.rows_independent",
            "logits",
            "they have the mean over the rows taken out",
        ),
        (
            "mask-minus-infinity",
            "masks.all_masked_row",
            "block.0.attn",
            "whose output is not finite (row 1, position 0)",
        ),
        (
            "generation-counts-padding",
            "generation.left_padded",
            "prepare_inputs",
            "row 2 position 1 instead of 0 (step 0",
        ),
        ("gradient-detached", "training.gradients", "block.1.mlp", "): none reaches its input"),
        (
            "eager-detached",
            "backend.attention_gradients",
            "block.1.attn",
            "with eager attention, block.1.attn passes back",
        ),
        ("positions-ignore-mask-training", "training.gradients_masked", "row 0", "in training mode, with padding on"),
        ("tie-undeclared", "weights.tied", "lm_head.weight", "are two tensors in the port, one in the original"),
    ],
)
def test_masks_caches_and_ties_name_the_place(
    mutant: str, check: str, module: str, said: str, shared: Session, tmp_path: Path
) -> None:
    if mutant == "tie-undeclared" and transformers.__version__ < "5":
        pytest.skip("transformers 4 ties the head without being told")
    planted = plant(MUTANTS[mutant], PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path, check, case=dataclasses.replace(CASE, rows=3))
    assert found is not None
    assert found.module.startswith(module), found
    assert said in found.sentence, found


MODEL = MUTANTS["gelu-tanh"].file
PROJECTED = "        output = self.c_proj(output.reshape(*input_shape, -1))\n"
MLP = "self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))"
NORMED = "self.attn(self.ln_1(hidden_states), **kwargs)"
FIRST_NORM = "self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON"
SUM = "hidden_states + self.mlp(self.ln_2(hidden_states)), weights"
EMBEDDED = "self.drop(inputs_embeds + self.wpe(positions))"
LOGITS = "logits = self.lm_head(outputs.last_hidden_state[:, kept])"
BLOCKS = "        for block in self.h:\n            if output_hidden"


@pytest.mark.parametrize(
    ("find", "replace", "module", "said"),
    [
        (
            PROJECTED,
            PROJECTED + "        output = output * 1.01\n",
            "block.0.attn",
            "its output is 1.01x the original's",
        ),
        (
            PROJECTED,
            "        output = output.reshape(*input_shape, -1)\n",
            "block.0.attn",
            "as if c_proj were left out",
        ),
        (
            PROJECTED,
            PROJECTED + "        output = output + self.c_proj.bias\n",
            "block.0.attn",
            "with transformer.h.0.attn.c_proj.bias once too often",
        ),
        (
            PROJECTED,
            "        output = nn.functional.linear(output.reshape(*input_shape, -1), self.c_proj.weight)\n",
            "block.0.attn",
            "as if c_proj.bias were zero",
        ),
        ("self.scaling = self.head_dim**-0.5", "self.scaling = 1 / self.head_dim", "block.0.attn", "one over the root"),
        (MLP, MLP.replace("self.gelu(", "(").replace("((", "(("), "block.0.mlp", "its activation is no activation"),
        (
            NORMED,
            "self.attn(nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.ln_1.weight, 1e-5)"
            " + self.ln_1.bias, **kwargs)",
            "block.0.ln_1",
            "it does not take the mean out, as RMSNorm",
        ),
        (
            "eps=LAYER_NORM_EPSILON, bias=config.bias)\n        self.attn",
            "eps=2e-5)\n        self.attn",
            "block.0.ln_1",
            "2e-05",
        ),
        (
            f"return {SUM}",
            "normed = self.ln_2(hidden_states)\n        return normed + self.mlp(normed), weights",
            "block.0",
            "has the output of block.0.ln_2 in the place of the input of block.0.ln_2",
        ),
        (f"return {SUM}", f"return 2 * {SUM}", "block.0", "its output has 2x the input of block.0.ln_2"),
        (f"return {SUM}", "return hidden_states, weights", "block.0", "lacks the output of transformer.h.0.mlp"),
        (EMBEDDED, EMBEDDED.replace("+ self", "- self"), "embedding", "has -1x the output of transformer.wpe"),
        (EMBEDDED, EMBEDDED.replace("+ self", "+ 0.5 * self"), "embedding", "has 0.5x the output of transformer.wpe"),
        (LOGITS, f"{LOGITS}\n        logits = 30 * torch.tanh(logits / 30)", "logits", "they are capped softly at 30"),
        (LOGITS, f"{LOGITS}.log_softmax(-1)", "logits", "they are log-probabilities"),
        (LOGITS, f"{LOGITS}.roll(1, 1)", "logits", "they are the original's, one position too late"),
        (BLOCKS, BLOCKS.replace("self.h:", "self.h[:-1]:"), "block.1", "as if block.1 were skipped"),
        (BLOCKS, BLOCKS.replace("self.h:", "[self.h[0], *self.h]:"), "block.1.ln_1", "the port runs block.0 2 times"),
    ],
)
def test_a_fault_that_no_planted_bug_has_is_told_too(
    find: str, replace: str, module: str, said: str, shared: Session, tmp_path: Path
) -> None:
    bug = Mutant(id="new", file=MODEL, find=find, replace=replace, bug="a fault", killers=("*",))
    found = located(plant(bug, PORT, tmp_path / "port"), shared, tmp_path)
    assert found is not None
    assert found.module == module, found
    assert said in found.sentence, found


@pytest.mark.parametrize(
    ("find", "replace", "module"),
    [
        (MLP, MLP.replace("self.c_fc(hidden_states))", "self.c_fc(hidden_states)).clamp(max=0.7)"), "block.0.mlp"),
        (PROJECTED, PROJECTED.replace("output.reshape", "output.abs().reshape"), "block.0.attn"),
        (EMBEDDED, EMBEDDED.replace("self.wpe(", "self.wpe(2 * ").replace("positions)", "positions % 8)"), "embedding"),
    ],
)
def test_a_fault_that_is_not_simple_gets_no_simple_name(
    find: str, replace: str, module: str, shared: Session, tmp_path: Path
) -> None:
    bug = Mutant(id="new", file=MODEL, find=find, replace=replace, bug="a fault", killers=("*",))
    found = located(plant(bug, PORT, tmp_path / "port"), shared, tmp_path)
    assert found is not None
    assert found.module == module
    assert re.fullmatch(rf"{re.escape(module)} diverges \(in \S+, out \S+\)", found.sentence), found


def test_what_a_port_says_it_lacks_is_not_held_against_it(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["position-of-first-row"], PORT, tmp_path / "port")
    case = dataclasses.replace(CASE, rows=3)
    assert located(planted, shared, tmp_path, "masks.pad_content", case=case) is not None
    declared = dataclasses.replace(planted, lacks={"masks.*_padding": "positions are the caller's"})
    assert located(declared, shared, tmp_path, "masks.pad_content", case=case) is None
    planted = plant(MUTANTS["position-restarts"], PORT, tmp_path / "cached")
    assert located(planted, shared, tmp_path, "generation.greedy") is not None
    declared = dataclasses.replace(planted, lacks={"generation.c*": "no cache"})
    assert located(declared, shared, tmp_path, "generation.greedy") is None


def test_a_failed_check_says_where_and_why(tmp_path: Path) -> None:
    planted = plant(MUTANTS["gelu-relu"], PORT, tmp_path / "port")
    [result] = check_parity(planted, checks=["forward.blocks"], backends=["torch-cpu"], shrink_seconds=5.0)
    assert result.status == "failed"
    assert result.first_divergence == "block.0.mlp"
    check, _, place = result.reason.partition("; block.0.mlp diverges (in ")
    assert check.startswith("output of block.0.mlp: relative error")
    assert place.endswith("): its activation is ReLU")


def test_the_errors_before_and_after_are_given(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["scale-missing"], PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path)
    assert found is not None
    assert found.error_in is not None
    assert found.error_out is not None
    assert found.error_in < 1e-12 < 1e-3 < found.error_out
    assert f"block.0.attn diverges (in {found.error_in:.1e}, out {found.error_out:.1e}): its scores" in found.sentence


@pytest.mark.parametrize("check", ["forward.logits", "masks.left_padding", "generation.cache", "weights.values"])
def test_a_correct_port_diverges_nowhere(check: str, shared: Session, tmp_path: Path) -> None:
    assert located(PORT, shared, tmp_path, check) is None


@pytest.mark.parametrize("mutant", [name for name, mutant in MUTANTS.items() if mutant.harmless])
def test_a_harmless_rewrite_diverges_nowhere(mutant: str, shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS[mutant], PORT, tmp_path / "port")
    for check in ("forward.logits", "backend.attention_masked", "generation.chunked_prefill"):
        assert located(planted, shared, tmp_path, check) is None


def test_what_no_simple_relation_explains_is_named_without_one(shared: Session, tmp_path: Path) -> None:
    strange = Mutant(
        id="strange",
        file=MUTANTS["gelu-tanh"].file,
        find="        output: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(hidden_states))))",
        replace="        inner = self.c_fc(hidden_states)\n"
        "        output: Tensor = self.c_proj(self.gelu(inner + 1e-3 * inner.sin()))",
        bug="something nobody would think of",
        killers=("*",),
    )
    planted = plant(strange, PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path)
    assert found is not None
    assert re.fullmatch(r"block\.0\.mlp diverges \(in \S+, out \S+\)", found.sentence), found


def test_without_time_the_place_is_named_and_no_cause_sought(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["gelu-tanh"], PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path, seconds=0)
    assert found is not None
    assert re.fullmatch(r"block\.0\.mlp diverges \(in \S+, out \S+\)", found.sentence), found


def test_a_failure_in_a_fresh_process_is_looked_for_in_this_one(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["gelu-tanh"], PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path, route="remote_code")
    assert found is not None
    assert found.module == "block.0.mlp"


def test_rounding_is_no_divergence(shared: Session, tmp_path: Path) -> None:
    trial = dataclasses.replace(trial_of(PORT, shared, tmp_path), dtype="bfloat16")
    assert locate(trial, CASE, Check(id="precision.logits")) is None


def test_a_failure_in_bfloat16_is_looked_for_in_float64(shared: Session, tmp_path: Path) -> None:
    planted = plant(MUTANTS["scale-missing"], PORT, tmp_path / "port")
    trial = dataclasses.replace(trial_of(planted, shared, tmp_path), dtype="bfloat16")
    found = locate(trial, CASE, Check(id="precision.logits"), seconds=30)
    assert found is not None
    assert found.module == "block.0.attn"


def test_a_part_in_float32_is_no_divergence_and_hides_none(shared: Session, tmp_path: Path) -> None:
    file = MUTANTS["gelu-tanh"].file
    narrow = Mutant(
        id="narrow",
        file=file,
        find="        attended, weights = self.attn(self.ln_1(hidden_states), **kwargs)\n",
        replace="        normed = self.ln_1(hidden_states).float().to(hidden_states.dtype)\n"
        "        attended, weights = self.attn(normed, **kwargs)\n",
        bug="float32 inside",
    )
    planted = plant(narrow, PORT, tmp_path / "narrow")
    assert located(planted, shared, tmp_path) is None
    both = plant(MUTANTS["gelu-relu"], planted, tmp_path / "both")
    found = located(both, shared, tmp_path)
    assert found is not None
    assert "its activation is ReLU" in found.sentence


def test_a_batch_of_one_token_is_looked_at_where_it_alone_fails(shared: Session, tmp_path: Path) -> None:
    short = Mutant(
        id="short",
        file=MUTANTS["gelu-tanh"].file,
        find="self.drop(inputs_embeds + self.wpe(positions))",
        replace="self.drop(inputs_embeds + self.wpe(positions) * (2 if positions.shape[-1] == 1 else 1))",
        bug="positions count twice for a single token",
    )
    planted = plant(short, PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path, case=dataclasses.replace(CASE, tokens=1))
    assert found is not None
    assert found.module == "embedding"


@pytest.mark.parametrize("what", ["RuntimeError('no')", "SystemExit(3)"])
def test_a_port_that_cannot_run_is_nowhere_rather_than_an_error(what: str, shared: Session, tmp_path: Path) -> None:
    broken = Mutant(
        id="raises",
        file=MUTANTS["gelu-tanh"].file,
        find="self.gelu = nn.GELU()",
        replace=f"raise {what}",
        bug="cannot be built",
        killers=("*",),
    )
    planted = plant(broken, PORT, tmp_path / "port")
    assert located(planted, shared, tmp_path) is None


def test_an_interrupt_is_not_swallowed(shared: Session, tmp_path: Path) -> None:
    test_interrupt = Mutant(
        id="interrupts",
        file=MUTANTS["gelu-tanh"].file,
        find="self.gelu = nn.GELU()",
        replace="raise KeyboardInterrupt",
        bug="as when a person presses Ctrl-C",
    )
    planted = plant(test_interrupt, PORT, tmp_path / "port")
    with pytest.raises(KeyboardInterrupt):
        located(planted, shared, tmp_path)


def test_a_port_without_taps_is_compared_at_its_logits(shared: Session, tmp_path: Path) -> None:
    untapped = dataclasses.replace(FAMILY, taps=None)
    assert located(PORT, shared, tmp_path, family=untapped) is None
    planted = plant(MUTANTS["gelu-tanh"], PORT, tmp_path / "port")
    found = located(planted, shared, tmp_path, family=untapped)
    assert found is not None
    assert found.module == "logits"
    assert found.sentence.endswith("its activation is GELU's tanh approximation")


def test_taps_are_compared_in_the_order_data_passes(shared: Session, tmp_path: Path) -> None:
    trial = trial_of(PORT, shared, tmp_path)
    found = compare_taps(trial, CASE, prepare(trial, CASE))
    parts = ("ln_1", "attn", "ln_2", "mlp")
    blocks = [name for layer in (0, 1) for name in (*(f"block.{layer}.{part}" for part in parts), f"block.{layer}")]
    assert [name for name, _, _ in found] == ["embedding", *blocks, "final_norm", "head"]
    for name, ours, theirs in found:
        assert ours.shape == theirs.shape == (2, 6, 13 if name == "head" else 8), name
        assert ours.dtype == theirs.dtype == torch.float64, name


def test_taps_that_a_port_has_not_are_left_out(shared: Session, tmp_path: Path) -> None:
    def taps(fields: object) -> list[Tap]:
        return [
            Tap(name="elsewhere", original="transformer.drop", port="model.dropout"),
            Tap(name="final_norm", original="transformer.ln_f", port="transformer.ln_f"),
        ]

    trial = trial_of(PORT, shared, tmp_path, family=dataclasses.replace(FAMILY, taps=taps))
    assert [name for name, _, _ in compare_taps(trial, CASE, prepare(trial, CASE))] == ["final_norm"]
    untapped = dataclasses.replace(trial, family=dataclasses.replace(FAMILY, taps=None))
    assert compare_taps(untapped, CASE, prepare(untapped, CASE)) == []


class Twofold(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, "weights"


def test_capture_takes_the_first_of_a_tuple_and_leaves_no_hooks_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), Twofold())
    result, seen = capture(model, {"first": "0", "second": "1"}, lambda: model(torch.zeros(2)))
    assert result[1] == "weights"
    assert seen["first"].tolist() == [0, 0]
    assert seen["second"].tolist() == [1, 1]
    with pytest.raises(ZeroDivisionError):
        capture(model, {"first": "0"}, lambda: 1 / 0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_is_not_there_or_does_not_run_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), Twofold())
    with pytest.raises(Mismatch, match="Sequential has no submodule '2', for 'third'"):
        capture(model, {"third": "2"}, lambda: model(torch.zeros(2)))
    with pytest.raises(Mismatch, match="Sequential did not run the submodules of second"):
        capture(model, {"first": "0", "second": "1"}, lambda: model[0](torch.zeros(2)))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_whose_parts_are_called_one_by_one_may_be_left_out() -> None:
    inner = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    model = torch.nn.ModuleDict({"parts": inner, "whole": torch.nn.Identity(), "idle": torch.nn.Identity()})
    places = {"parts": "parts", "whole": "whole"}

    def call() -> object:
        return model["whole"](inner[1](inner[0](torch.zeros(2))))

    assert list(capture(model, places, call, in_parts=True)[1]) == ["whole"]
    with pytest.raises(Mismatch, match="did not run the submodules of parts"):
        capture(model, places, call)
    with pytest.raises(Mismatch, match="did not run the submodules of idle"):
        capture(model, {**places, "idle": "idle"}, call, in_parts=True)


def test_a_module_that_returns_no_tensor_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Identity())
    with pytest.raises(Mismatch, match="submodule '0' returns NoneType, expected a tensor first"):
        capture(model, {"first": "0"}, lambda: model(None))


def test_a_sum_in_place_is_no_divergence(shared: Session, tmp_path: Path) -> None:
    harmless = Mutant(
        id="in-place",
        file=MUTANTS["gelu-tanh"].file,
        find="        hidden_states = hidden_states + attended\n",
        replace="        hidden_states += attended\n",
        bug="the residual sum in place",
    )
    planted = plant(harmless, PORT, tmp_path / "port")
    assert located(planted, shared, tmp_path) is None
