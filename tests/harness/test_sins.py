# SPDX-License-Identifier: Apache-2.0
"""Ports as they are in the wild: each of their sins is a failed check that says what is wrong and what is right."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from harness import Port, check_parity
from harness.cli import main

ROOT = Path(__file__).parents[2]
FILES = ("modeling_nanogpt", "configuration_nanogpt", "checkpoint")
NEW = transformers.__version__.startswith("5")
TIED = """_tied_weights_keys: ClassVar[Any] = (
        {"lm_head.weight": "transformer.wte.weight"} if TRANSFORMERS_5 else ["lm_head.weight"]
    )"""


def vendored(directory: Path, *, model: str = "NanoGPTLMHeadModel", more: str = "", **edits: tuple[str, str]) -> Port:
    """A copy of nanoGPT's port with one edit in each of the files named, and lines at the end of the model's."""
    package = directory / "vendored"
    package.mkdir()
    for name in FILES:
        text = (ROOT / f"reference_models/nanogpt/{name}.py").read_text()
        if name in edits:
            before, after = edits[name]
            assert before in text, before
            text = text.replace(before, after)
        (package / f"{name}.py").write_text(text + (textwrap.dedent(more) if name == "modeling_nanogpt" else ""))
    return Port(
        name="vendored",
        family="nanogpt",
        model=f"vendored/modeling_nanogpt.py:{model}",
        config="vendored/configuration_nanogpt.py:NanoGPTConfig",
        load=f"checkpoint:{model}.from_nanogpt_ckpt",
        code=[f"vendored/{name}.py" for name in FILES],
        root=directory,
    )


def subclass(forward: str) -> Mapping[str, str]:
    body = textwrap.indent(textwrap.dedent(forward).strip(), "    ")
    return {"model": "Port", "more": f"\n\nclass Port(NanoGPTLMHeadModel):\n{body}\n"}


@pytest.mark.parametrize(
    ("check", "port", "words"),
    [
        pytest.param(
            "roundtrip.pretrained",
            {"modeling_nanogpt": ("self.post_init()", "pass")},
            "a port calls self.post_init() at the end of __init__",
            marks=pytest.mark.skipif(not NEW, reason="transformers 4 loads such a port"),
            id="no post_init",
        ),
        pytest.param(
            "weights.values",
            {"modeling_nanogpt": (TIED, '_tied_weights_keys = ["lm_head.weight"]')},
            "_tied_weights_keys is a list; from transformers 5 on it is a dict",
            marks=pytest.mark.skipif(not NEW, reason="transformers 4 wants a list"),
            id="list of tied keys",
        ),
        pytest.param(
            "remote_code.cold",
            {"modeling_nanogpt": ("from .configuration_nanogpt", "from vendored.configuration_nanogpt")},
            "files that travel with a checkpoint are imported relatively",
            id="absolute import",
        ),
        pytest.param(
            "weights.values",
            {"modeling_nanogpt": ("from .configuration_nanogpt", "from configuration_nanogpt")},
            "No module named 'configuration_nanogpt'; files that travel with a checkpoint are imported relatively",
            id="import of a file beside it",
        ),
        pytest.param(
            "api.output_type",
            subclass("def forward(self, *a, **k):\n    return super().forward(*a, **{**k, 'return_dict': False})"),
            "forward returns tuple; callers expect an output with .logits",
            id="tuple",
        ),
        pytest.param(
            "masks.left_padding",
            subclass(
                "def forward(self, input_ids, labels=None):\n    return super().forward(input_ids, labels=labels)"
            ),
            "forward takes no 'attention_mask'; a port of this family does, or declares what it lacks",
            id="no attention_mask",
        ),
        pytest.param(
            "generation.greedy",
            {"modeling_nanogpt": ("(NanoGPTPreTrainedModel, GenerationMixin)", "(NanoGPTPreTrainedModel)")},
            "the port has no generate(); from transformers 4.50 on a model must inherit GenerationMixin",
            id="no generate",
        ),
        pytest.param(
            "loss.value",
            subclass("def forward(self, *a, labels=None, **k):\n    return super().forward(*a, targets=labels, **k)"),
            "labels that are shifted already; a port shifts them inside, or its description says labels = 'preshifted'",
            id="preshifted labels",
        ),
        pytest.param(
            "forward.lengths",
            subclass(
                "def forward(self, *a, **k):\n"
                "    output = super().forward(*a, **k)\n"
                "    output.logits = output.logits[:, -1:]\n"
                "    return output"
            ),
            "logits of the last position only; a port gives those of every position, fewer with logits_to_keep",
            id="last position only",
        ),
        pytest.param(
            "api.auto_classes",
            {"configuration_nanogpt": ('model_type = "nanogpt"', 'model_type = "gpt2"')},
            "model_type 'gpt2'",
            id="another's model type",
        ),
        pytest.param(
            "config.declared",
            {"modeling_nanogpt": ("import torch\n", "import torch\nfrom transformers.utils import gone_by_now\n")},
            "this transformers no longer has that name",
            id="import that is gone",
        ),
    ],
)
def test_a_sin_is_one_line_that_says_what_a_correct_port_does(
    tmp_path: Path, frameworks: None, check: str, port: Mapping[str, Any], words: str
) -> None:
    results = check_parity(vendored(tmp_path, **port), checks=[check], backends=["torch-cpu"])
    assert [result.status for result in results] == ["failed"]
    assert words in results[0].reason
    assert "\n" not in results[0].reason


SINFUL = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from beside import width_of


class SinfulConfig(PretrainedConfig):
    model_type = "bert"

    def __init__(self, n_positions=64, vocab_size=64, n_layer=2, n_head=2, n_embd=8, dropout=0.0, bias=True, **rest):
        self.n_positions, self.vocab_size, self.n_layer, self.n_head = n_positions, vocab_size, n_layer, n_head
        self.n_embd, self.dropout, self.bias = n_embd, dropout, bias
        super().__init__(**rest)


class Sinful(PreTrainedModel):
    config_class = SinfulConfig
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        from reference_models.nanogpt.original import GPT, GPTConfig

        super().__init__(config)
        names = ("vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        fields = {name: getattr(config, name) for name in names}
        inner = GPT(GPTConfig(block_size=config.n_positions, **fields))
        self.transformer, self.lm_head = inner.transformer, inner.lm_head
        width_of(self.lm_head)

    def forward(self, input_ids, labels=None):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.transformer.drop(self.transformer.wte(input_ids) + self.transformer.wpe(places))
        for block in self.transformer.h:
            hidden = block(hidden)
        logits = self.lm_head(self.transformer.ln_f(hidden))
        if labels is None:
            return (logits[:, -1:],)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1), logits
"""


def test_a_port_with_every_sin_is_a_table_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], frameworks: None
) -> None:
    (tmp_path / "sinful.py").write_text(SINFUL)
    (tmp_path / "beside.py").write_text("def width_of(linear):\n    return linear.out_features\n")
    (tmp_path / "gone.py").write_text("from transformers.utils import gone_by_now\n" + SINFUL)
    shutil.copy(tmp_path / "sinful.py", tmp_path / "other.py")
    (tmp_path / "parity.toml").write_text(
        "".join(
            f'[[port]]\nname = "{name}"\nfamily = "nanogpt"\nmodel = "{name}.py:Sinful"\n'
            f'config = "{name}.py:SinfulConfig"\n'
            for name in ("sinful", "gone")
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check", "--backend", "torch-cpu", "--dtype", "float64", "--json"]) == 1
    results = json.loads(capsys.readouterr().out)["results"]
    by_port = {name: [result for result in results if result["port"] == name] for name in ("sinful", "gone")}
    assert len(by_port["sinful"]) == len(by_port["gone"]) > 80
    for result in results:
        assert result["status"] in ("passed", "failed", "skipped"), result
        assert "\n" not in result["reason"]
    failed = {result["check"]: result["reason"] for result in by_port["sinful"] if result["status"] == "failed"}
    assert len(failed) > 40
    assert all("gone_by_now" in result["reason"] for result in by_port["gone"] if result["status"] == "failed")
    assert any("forward takes no 'attention_mask'" in reason for reason in failed.values())
    for check, words in {
        "forward.lengths": "logits of the last position only",
        "generation.greedy": "the port has no generate()",
        "loss.value": "labels that are shifted already",
        "api.output_type": "forward returns tuple",
        "api.auto_classes": "model_type 'bert'",
        "config.defaults": "the original's default is 1024",
    }.items():
        assert words in failed.get(check, ""), (check, failed.get(check))
