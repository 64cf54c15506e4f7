# SPDX-License-Identifier: Apache-2.0
"""What the harness is told about nanoGPT is believed by every check: names, files, ties and planted bugs are right."""

import fnmatch
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from harness.cases import Case, cases
from harness.cases.batches import draw_batch
from harness.cases.weights import sensitising_state
from harness.checks import CATALOGUE
from harness.mutants import mutants_of
from harness.ports import read_ports
from reference_models.nanogpt.configuration_nanogpt import NanoGPTConfig
from reference_models.nanogpt.family import FAMILY, configurations, read_checkpoint, write_checkpoint
from reference_models.nanogpt.modeling_nanogpt import NanoGPTLMHeadModel
from reference_models.nanogpt.original import GPT

ROOT = Path(__file__).parents[2]
PORT = next(port for port in read_ports(ROOT) if port.name == "nanogpt")
MUTANTS = mutants_of(FAMILY)
FIELDS: dict[str, Any] = {
    "block_size": 6,
    "vocab_size": 13,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "dropout": 0.0,
    "bias": True,
}

drawn = settings(max_examples=25, deadline=None, database=None, derandomize=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def original(seed: int = 0, **fields: Any) -> torch.nn.Module:
    module = FAMILY.build_original(GPT, FIELDS | fields)
    module.load_state_dict(sensitising_state(module, gains=FAMILY.gains, seed=seed))
    return module.double()


# Configurations


@drawn
@given(configurations())
def test_the_port_takes_every_configuration_as_the_original_does(fields: dict[str, Any]) -> None:
    config = NanoGPTConfig(**fields)
    config.validate_architecture()
    assert {name: getattr(config, name) for name in fields} == fields
    assert fields["n_embd"] % fields["n_head"] == 0
    assert fields["n_embd"] >= 4, "a norm over fewer channels leaves hardly anything to compare"
    theirs = {key: value.shape for key, value in FAMILY.build_original(GPT, fields).state_dict().items()}
    with torch.device("meta"):
        ours = {FAMILY.port_key(key): value.shape for key, value in NanoGPTLMHeadModel(config).state_dict().items()}
    assert ours == theirs


def test_a_field_goes_by_the_names_that_ports_use() -> None:
    config = NanoGPTConfig(**FIELDS)
    for field in FAMILY.fields:
        assert field in FIELDS
    for field, names in {"block_size": "n_positions", "n_layer": "num_hidden_layers"}.items():
        assert names in FAMILY.fields[field]
        assert getattr(config, names) == FIELDS[field]


# The original's conventions


@drawn
@given(cases(FAMILY))
def test_the_original_gives_logits_at_every_position_with_and_without_targets(case: Case) -> None:
    module = FAMILY.build_original(GPT, case.fields)
    batch = draw_batch(rows=case.rows, tokens=case.tokens, vocabulary=case.fields["vocab_size"], seed=case.seed)
    with torch.no_grad():
        alone = FAMILY.run_original(module, batch.tokens, None)
        both = FAMILY.run_original(module, batch.tokens, batch.targets)
    assert set(alone) == {"logits"} and set(both) == {"logits", "loss"}
    assert torch.equal(alone["logits"], both["logits"])
    flat = both["logits"].flatten(0, 1)
    torch.testing.assert_close(both["loss"], torch.nn.functional.cross_entropy(flat, batch.targets.flatten()))


def test_the_original_ignores_the_declared_index() -> None:
    module = original()
    tokens = torch.tensor([[1, 2, 3, 4]])
    some = torch.tensor([[2, FAMILY.loss.ignore_index, 4, FAMILY.loss.ignore_index]])
    outputs = FAMILY.run_original(module, tokens, some)
    expected = torch.nn.functional.cross_entropy(outputs["logits"][0, [0, 2]], torch.tensor([2, 4]))
    torch.testing.assert_close(outputs["loss"], expected)


def test_declared_ties_are_all_that_share_a_tensor() -> None:
    state = original().state_dict(keep_vars=True)
    sharing = [names for names in _by_identity(state).values() if len(names) > 1]
    assert sorted(map(sorted, sharing)) == sorted(sorted(group) for group in FAMILY.tied)


def _by_identity(state: dict[str, torch.Tensor]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for key, tensor in state.items():
        found.setdefault(id(tensor), []).append(key)
    return found


def test_every_gain_is_of_a_tensor() -> None:
    for pattern in FAMILY.gains:
        assert any(re.search(pattern, key) for key in original().state_dict()), pattern


def test_generation_is_the_originals_own_greedy_where_it_is_asked_for() -> None:
    assert FAMILY.generate_original is not None
    module = original()
    prompt = torch.tensor([[1, 2], [3, 4]])
    tokens = FAMILY.generate_original(module, prompt, max_new_tokens=6, top_k=1)  # two past the block size
    assert torch.equal(tokens[:, :2], prompt)
    for end in range(2, 8):
        best = FAMILY.run_original(module, tokens[:, max(0, end - 6) : end], None)["logits"][:, -1].argmax(dim=-1)
        assert torch.equal(tokens[:, end], best)


# Taps


@pytest.mark.parametrize("layers", [1, 3])
def test_taps_run_in_both_models_in_the_order_they_are_listed(layers: int) -> None:
    assert FAMILY.taps is not None
    fields = FIELDS | {"n_layer": layers}
    port = NanoGPTLMHeadModel(NanoGPTConfig(**fields)).eval()
    tapped = FAMILY.taps(fields)
    tokens = torch.tensor([[1, 2, 3]])
    for module, paths, run in (
        (port, [tap.port for tap in tapped], lambda: port(tokens)),
        (theirs := original(n_layer=layers), [tap.original for tap in tapped], lambda: theirs(tokens)),
    ):
        order: list[str] = []
        for path in paths:
            module.get_submodule(path).register_forward_hook(lambda *_, path=path, order=order: order.append(path))
        run()
        assert order == paths
    assert len({tap.name for tap in tapped}) == len(tapped) == 5 * layers + 3


# Files


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_comes_back_bit_for_bit_with_its_fields(bias: bool, tmp_path: Path) -> None:
    fields, module = FIELDS | {"bias": bias}, original(bias=bias)
    path = tmp_path / FAMILY.checkpoint_name
    write_checkpoint(module, fields, path)
    read, state = read_checkpoint(str(path))
    assert read == fields
    assert list(state) == list(module.state_dict())
    for key, tensor in module.state_dict().items():
        assert torch.equal(state[key], tensor), key


def test_a_compiled_models_checkpoint_is_read_as_training_resumes_it(tmp_path: Path) -> None:
    module = original()
    path = tmp_path / "ckpt.pt"
    write_checkpoint(module, FIELDS, path)
    contents = torch.load(path, weights_only=True)
    contents["model"] = {f"_orig_mod.{key}": tensor for key, tensor in contents["model"].items()}
    torch.save(contents, path)
    assert list(read_checkpoint(str(path))[1]) == list(module.state_dict())


def test_the_port_reads_what_the_family_writes(tmp_path: Path) -> None:
    module, path = original(), tmp_path / "ckpt.pt"
    write_checkpoint(module, FIELDS, path)
    port = NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    for key, tensor in module.state_dict().items():
        assert torch.equal(port.state_dict()[FAMILY.port_key(key)], tensor), key


# Training


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_groups_have_each_parameter_once_and_decay_matrices_alone(bias: bool) -> None:
    assert FAMILY.parameter_groups is not None
    module = original(bias=bias)
    groups = FAMILY.parameter_groups(module, 0.25)
    seen = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert seen == Counter(id(parameter) for parameter in module.parameters())
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.25 if parameter.ndim >= 2 else 0.0)


# Planted bugs


def test_each_planted_bug_has_one_id_and_another_text() -> None:
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS)
    edits = [(mutant.file, mutant.find, mutant.replace) for mutant in MUTANTS]
    assert len(set(edits)) == len(edits), "two mutants plant the same bug"
    for mutant in MUTANTS:
        assert mutant.find != mutant.replace, mutant.id
        assert (mutant.bug and mutant.bug[0] == mutant.bug[0].lower()) or mutant.bug[:2].isupper() or " " in mutant.bug
        assert mutant.file in PORT.code, f"{mutant.id} edits what does not travel"
    assert all(mutant.id.startswith("harmless-") == mutant.harmless for mutant in MUTANTS)


def test_every_killer_is_a_check_that_is_asked_of_the_port() -> None:
    asked = [check.id for check in CATALOGUE if set(check.needs) <= {*FAMILY.features, FAMILY.framework}]
    for mutant in MUTANTS:
        for pattern in mutant.killers:
            assert fnmatch.filter(asked, pattern), f"{mutant.id}: {pattern}"


def test_no_check_is_left_out_for_want_of_a_feature() -> None:
    # nanoGPT has no experts, and its port is not called as its scripts call it; no class but one; no converter program;
    # nothing goes in but tokens, and nothing comes out but logits; nobody has quantised it.
    # tests/nanomoe, tests/neobert and tests/mlx_bert look after the checks of those.
    others = {"routing", "legacy_calls", "heads", "original_only", "tokenizer", "further_inputs", "further_outputs"}
    others |= {"quantisation"}
    assert {need for check in CATALOGUE for need in check.needs} - {*FAMILY.features, FAMILY.framework} == others
