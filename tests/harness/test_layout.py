# SPDX-License-Identifier: Apache-2.0
"""A port may name and arrange its tensors as it likes: what is asked of gradients is asked of the right numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness import Port, check_parity
from harness.cases import Case
from harness.families import find_family
from harness.layout import Layout, layout_of
from harness.ports import read_ports
from harness.runner import session
from harness.trial import Trial

CASE = Case(
    fields={"block_size": 4, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 4, "dropout": 0.0, "bias": True},
    rows=1,
    tokens=3,
    seed=0,
)

SOURCE = '''
import torch
from reference_models.nanogpt.family import read_checkpoint
from reference_models.nanogpt.original import GPT, GPTConfig as Config


class Transposed(torch.nn.Module):
    """A linear layer that keeps its weight the other way round, as GPT-2's does."""

    def __init__(self, linear):
        super().__init__()
        self.kernel = torch.nn.Parameter(linear.weight.detach().T.clone())
        self.bias = linear.bias

    def forward(self, x):
        y = x @ self.kernel{detached}
        return y if self.bias is None else y + self.bias


def norm(config):
    """A class that the Trainer knows to give no weight decay."""
    return torch.nn.LayerNorm(config.n_embd, bias=config.bias)


class Port(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn.c_proj = Transposed(block.attn.c_proj)
            block.ln_1, block.ln_2 = norm(config), norm(config)
        self.transformer.ln_f = norm(config)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits, loss = super().forward(input_ids, input_ids if labels is None else labels)
        return {{"logits": logits}} if labels is None else {{"loss": loss, "logits": logits}}

    @classmethod
    def read(cls, path):
        fields, state = read_checkpoint(path)
        for name in [name for name in state if name.endswith("attn.c_proj.weight")]:
            state[name.replace("weight", "kernel")] = state.pop(name).T{scaled}
        model = cls(Config(**fields))
        model.load_state_dict(state)
        return model.eval()
'''


def transposing(directory: Path, *, detached: str = "", scaled: str = "") -> Port:
    (directory / "transposing.py").write_text(SOURCE.format(detached=detached, scaled=scaled))
    return Port(
        name="transposing",
        family="nanogpt",
        model="transposing.py:Port",
        config="transposing.py:Config",
        load="checkpoint:Port.read",
        labels="preshifted",
        root=directory,
    )


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    with session() as shared:
        yield Trial(
            port=transposing(tmp_path),
            family=find_family("nanogpt"),
            route="checkpoint",
            backend="torch-cpu",
            dtype="float64",
            workdir=tmp_path,
            sandbox=shared.sandbox,
            hub=shared.hub,
        )


def found(trial: Trial) -> Layout:
    layout = layout_of(trial, CASE)
    assert layout is not None
    return layout


def test_a_transposed_tensor_under_another_name_is_followed(trial: Trial) -> None:
    layout = found(trial)
    assert not layout.is_plain(trial)
    tensors = {name: torch.randn(shape) for name, shape in layout.sources.items()}
    arranged = layout.arrange(tensors)
    assert torch.equal(arranged["transformer.h.0.attn.c_proj.kernel"], tensors["transformer.h.0.attn.c_proj.weight"].T)
    assert torch.equal(arranged["transformer.wte.weight"], tensors["transformer.wte.weight"])
    stacked = layout.arrange({name: torch.stack([tensor, 2 * tensor]) for name, tensor in tensors.items()})
    for name, tensor in arranged.items():
        assert torch.equal(stacked[name], torch.stack([tensor, 2 * tensor])), name


def test_single_numbers_are_arranged_too() -> None:
    layout = Layout(
        sources={"scale": torch.Size([]), "shift": torch.Size([2])},
        places={"both": torch.tensor([2, 0, 1])},
        added=(),
    )
    tensors = {"scale": torch.tensor([1.0, 2.0]), "shift": torch.tensor([[3.0, 4.0], [5.0, 6.0]])}
    assert layout.arrange(tensors)["both"].tolist() == [[4.0, 1.0, 3.0], [6.0, 2.0, 5.0]]


def test_zeros_that_fill_up_are_known_to_be_none_of_the_originals() -> None:
    layout = Layout(sources={"table": torch.Size([2])}, places={"padded": torch.tensor([0, 1, 2, 2])}, added=())
    assert layout.arrange({"table": torch.tensor([3.0, 4.0])})["padded"].tolist() == [3.0, 4.0, 0.0, 0.0]
    assert layout.known("padded").tolist() == [True, True, False, False]


def test_the_reference_port_is_arranged_as_its_original(trial: Trial) -> None:
    (port,) = (port for port in read_ports(Path(__file__).parents[2]) if port.name == "nanogpt")
    plain = dataclasses.replace(trial, port=port)
    assert found(plain).is_plain(plain)


def test_weights_that_a_loader_changes_have_no_layout(trial: Trial, tmp_path: Path) -> None:
    folder = tmp_path / "scaled"
    folder.mkdir()
    assert layout_of(dataclasses.replace(trial, port=transposing(folder, scaled=" / 2")), CASE) is None
    broken = dataclasses.replace(trial.port, load="checkpoint:Port.reed")
    assert layout_of(dataclasses.replace(trial, port=broken), CASE) is None


ASKED = ("training.gradients", "training.optimiser_steps", "training.initialisation", "precision.gradients")


def test_training_is_compared_number_by_number(tmp_path: Path) -> None:
    port = transposing(tmp_path)
    results = check_parity(port, checks=[*ASKED, "training.parameter_groups"], backends=["torch-cpu"])
    assert {result.status for result in results} == {"passed"}, [result.reason for result in results]


def test_a_fault_in_a_tensor_of_the_ports_own_is_found(tmp_path: Path) -> None:
    port = transposing(tmp_path, detached=".detach()")
    (result,) = check_parity(port, checks=["training.gradients"], backends=["torch-cpu"])
    assert result.status == "failed"
    assert "gradient, transformer.h.0.attn.c_proj.kernel: relative error" in result.reason


def test_names_alone_do_not_bring_tensors_that_a_loader_arranges(tmp_path: Path) -> None:
    results = check_parity(transposing(tmp_path), checks=["forward.logits"], backends=["torch-cpu"])
    statuses = {result.route: result.status for result in results}
    assert (statuses["checkpoint"], statuses["direct"]) == ("passed", "skipped")
