# SPDX-License-Identifier: Apache-2.0
"""`parity init` in somebody's repository: what it recognises, what it writes, and what it leaves alone."""

from __future__ import annotations

import importlib.util
import io
import os
import stat
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.cli import main
from harness.init import command, writing
from harness.ports import read_ports

CONFIG = """
from transformers import PretrainedConfig

class MineConfig(PretrainedConfig):
    model_type = "mine"

    def __init__(self, block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4, dropout=0.0, bias=True, **kwargs):
        super().__init__(**kwargs)
"""
MODEL = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

{imports}

class MinePreTrainedModel(PreTrainedModel):
    config_class = MineConfig

class MineModel(MinePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)

    def forward(self, input_ids, **kwargs):
        return input_ids

class MineForCausalLM(MinePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = MineModel(config)

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.model(input_ids, **kwargs)
        loss = None
        if labels is not None:
            {loss}
        return logits, loss

{methods}

{functions}
"""
SHIFTED = "loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
ORIGINAL = """
from dataclasses import dataclass
from torch import nn

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return x

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])

    def forward(self, idx, targets=None):
        return idx, None
"""


def model(imports: str = "", loss: str = SHIFTED, methods: str = "", functions: str = "") -> str:
    return MODEL.format(
        imports=imports,
        loss=loss,
        methods=textwrap.indent(textwrap.dedent(methods), "    "),
        functions=textwrap.dedent(functions),
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def described(here: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `parity init --yes` says of the ports."""
    assert main(["init", "--yes", *arguments]) == 0
    ports = read_ports(here)
    assert ports
    name = "parity.toml" if (here / "parity.toml").exists() else "pyproject.toml"
    tables: list[dict[str, Any]] = tomllib.loads((here / name).read_text())["tool"]["parity"]["port"]
    return tables


# What is recognised


def test_a_model_its_configuration_and_what_travels_with_them(here: Path) -> None:
    write(
        {
            "mine/__init__.py": "",
            "mine/configuration_mine.py": CONFIG,
            "mine/modeling_mine.py": model("from .configuration_mine import MineConfig\nfrom .maths import add\n"),
            "mine/maths.py": "from . import more\n\ndef add(a, b):\n    return a + b\n",
            "mine/more.py": "",
            "tests/test_mine.py": model(CONFIG),
            ".venv/lib/modeling_other.py": model(CONFIG),
        }
    )
    assert described(here) == [
        {
            "name": "mine",
            "family": "nanogpt",
            "model": "mine/modeling_mine.py:MineForCausalLM",
            "config": "mine/configuration_mine.py:MineConfig",
            "code": ["mine/modeling_mine.py", "mine/configuration_mine.py", "mine/maths.py", "mine/more.py"],
        }
    ]


READ = 'state = torch.load(path)\nreturn {build}(MineConfig(**state["model_args"]))'


@pytest.mark.parametrize(
    ("parts", "files", "load"),
    [
        ({}, {}, None),
        (
            {"methods": "@classmethod\ndef from_ckpt(cls, path):\n    return cls(torch.load(path))"},
            {},
            "checkpoint:MineForCausalLM.from_ckpt",
        ),
        (
            {
                "methods": "@classmethod\ndef from_ckpt(cls, ckpt: 'str | os.PathLike', device='cpu'):\n"
                "    return cls(read(ckpt))",
                "functions": "def read(path):\n    return torch.load(path)",
            },
            {},
            "checkpoint:MineForCausalLM.from_ckpt",
        ),
        (
            {"functions": "def convert(checkpoint_path):\n    return MineForCausalLM(torch.load(checkpoint_path))"},
            {},
            "checkpoint:convert",
        ),
        (
            {},
            {
                "tools/load.py": "import torch\nfrom port import MineForCausalLM\n\n"
                "def load(path):\n    return MineForCausalLM(torch.load(path))\n"
            },
            "checkpoint:tools/load.py:load",
        ),
        (
            {},
            {
                "convert it.py": "import sys, torch\nfrom port import MineForCausalLM\n\n"
                "MineForCausalLM(torch.load(sys.argv[1])).save_pretrained(sys.argv[2])\n"
            },
            "command:python 'convert it.py' {checkpoint} {out}",
        ),
        (
            {},
            {
                "convert.py": "import argparse, torch\nfrom port import MineForCausalLM\n\n"
                "parser = argparse.ArgumentParser()\nparser.add_argument('--output-dir', required=True)\n"
                "parser.add_argument('--ckpt', '-c', required=True)\nparser.add_argument('--verbose')\n"
                "a = parser.parse_args()\nMineForCausalLM(torch.load(a.ckpt)).save_pretrained(a.output_dir)\n"
            },
            "command:python convert.py --output-dir {out} --ckpt {checkpoint}",
        ),
        (
            {"methods": "@classmethod\ndef from_pretrained(cls, name, **kwargs):\n    return cls(kwargs)"},
            {},
            "pretrained",
        ),
        # None of these makes a port of a file.
        ({"methods": "@classmethod\ndef from_size(cls, size):\n    return cls(torch.load('x'))"}, {}, None),
        ({"methods": "@classmethod\ndef from_ckpt(cls, path, out):\n    return cls(torch.load(path))"}, {}, None),
        ({"functions": "def read(path):\n    return torch.load(path)"}, {}, None),
    ],
)
def test_the_loader_is_found_where_it_stands(
    here: Path, parts: dict[str, str], files: dict[str, str], load: str | None
) -> None:
    write({"port.py": model(CONFIG, **parts), **files})
    (table,) = described(here)
    assert table.get("load") == load


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (SHIFTED, {}),
        ("loss = self.loss_function(logits, labels, 9)", {}),
        (
            "loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)",
            {"labels": "preshifted"},
        ),
        (
            "loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())",
            {"labels": "preshifted", "ignore_index": -100},
        ),
        ("loss = own_loss(logits, labels)", {"labels": "preshifted", "ignore_index": -7}),
        (SHIFTED.replace("flatten())", "flatten(), ignore_index=0)"), {"ignore_index": 0}),
        ("loss = logits.sum()", {}),
    ],
)
def test_the_convention_of_labels_is_read_from_the_forward(here: Path, loss: str, expected: dict[str, Any]) -> None:
    own = """
        IGNORED = -7

        def own_loss(logits, labels, ignored=IGNORED):
            return nn.CrossEntropyLoss(ignore_index=ignored)(logits, labels)
        """
    write({"port.py": model(CONFIG, loss=loss, functions=own)})
    (table,) = described(here)
    assert {key: table[key] for key in ("labels", "ignore_index") if key in table} == expected


def test_fields_by_other_names_come_from_the_converter_or_from_their_meaning(here: Path) -> None:
    config = """
class MineConfig(PretrainedConfig):
    def __init__(self, width=4, layers=1, heads=1, max_position_embeddings=8, vocab=9, drop=0, with_bias=True, **kw):
        super().__init__(**kw)
"""
    convert = """
        def read(path):
            a = torch.load(path)["model_args"]
            return MineForCausalLM(MineConfig(width=a["n_embd"], drop=a.get("dropout", 0.0)))
        """
    write({"port.py": model("from transformers import PretrainedConfig\n" + config, functions=convert)})
    (table,) = described(here)
    assert table["config_map"] == {
        "n_embd": "width",
        "dropout": "drop",
        "n_layer": "layers",
        "n_head": "heads",
        "vocab_size": "vocab",
        "bias": "with_bias",
    }
    assert "guessed by name: vocab_size, n_layer, n_head, bias" in (here / "parity.toml").read_text()


def test_a_copy_of_the_original_is_the_truth_and_no_port(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"vendor/nanoGPT/model.py": ORIGINAL})
    assert main(["init"]) == 2
    out, _ = capsys.readouterr()
    assert "vendor/nanoGPT/model.py:GPT looks like a copy of the original; a port of it was not found" in out
    write({"port.py": model(CONFIG)})
    (table,) = described(here)
    assert table["original"] == "vendor/nanoGPT/model.py:GPT"


def test_a_plain_module_with_a_dataclass_is_a_port_where_there_is_no_other(here: Path) -> None:
    write({"net.py": ORIGINAL.replace("GPT(", "Net(").replace("GPTConfig", "Sizes").replace("idx", "input_ids")})
    (table,) = described(here)
    assert (table["model"], table["config"]) == ("net.py:Net", "net.py:Sizes")
    text = (here / "parity.toml").read_text()
    for line in ('# "generation.*" = ', '# "masks.*" = ', '# "roundtrip.*" = '):
        assert line in text


def test_what_a_port_seems_to_lack_is_left_to_the_maintainer_and_can_be_uncommented(here: Path) -> None:
    write({"port.py": model(CONFIG).replace(", GenerationMixin):", "):").replace(", attention_mask=None", "")})
    (table,) = described(here)
    assert "lacks" not in table
    text = (here / "parity.toml").read_text()
    start = text.index("# [tool.parity.port.lacks]")
    (here / "parity.toml").write_text(text[:start] + text[start:].replace("# ", ""))
    (port,) = read_ports(here)
    assert port.lacks["generation.*"] == "it does not generate"
    assert "masks.*" not in port.lacks  # forward passes further keywords on


def test_a_converter_to_a_class_of_transformers_describes_that_class(here: Path) -> None:
    write(
        {
            "convert.py": "import sys, torch\nfrom transformers import GPT2Config, GPT2LMHeadModel\n\n"
            "a = torch.load(sys.argv[1])['model_args']\n"
            "model = GPT2LMHeadModel(GPT2Config(n_positions=a['block_size']))\nmodel.save_pretrained(sys.argv[2])\n"
        }
    )
    assert described(here) == [
        {
            "name": "gpt2",
            "family": "nanogpt",
            "model": "transformers.models.gpt2.modeling_gpt2:GPT2LMHeadModel",
            "config": "transformers.models.gpt2.configuration_gpt2:GPT2Config",
            "load": "command:python convert.py {checkpoint} {out}",
        }
    ]


OTHER_HEAD = """
class MineForSequenceClassification(MinePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = MineModel(config)

    def forward(self, input_ids, labels=None):
        return nn.functional.cross_entropy(self.model(input_ids), labels)
"""


@pytest.mark.parametrize("register", ["", "\nMineForCausalLM.register_for_auto_class('AutoModelForCausalLM')\n"])
def test_other_heads_and_wrappers_are_no_ports(here: Path, register: str) -> None:
    text = model(CONFIG, functions=OTHER_HEAD + register)
    wrapper = (
        "from torch import nn\nfrom port import MineForCausalLM\n\nclass Wrapper(nn.Module):\n"
        "    def __init__(self, config):\n        self.model = MineForCausalLM(config)\n\n"
        "    def forward(self, input_ids):\n        return self.model(input_ids)\n"
    )
    write({"port.py": text.replace("MineForCausalLM", "Mine") if register else text, "wrapper.py": wrapper})
    if register:
        write({"wrapper.py": wrapper.replace("MineForCausalLM", "Mine")})
    (table,) = described(here)
    assert table["model"] == ("port.py:Mine" if register else "port.py:MineForCausalLM")


def test_nothing_of_the_repository_is_imported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "import pathlib\npathlib.Path('imported').write_text('')\n"
    write({"port.py": evil + model(CONFIG), "conftest.py": evil, "mine/__init__.py": evil, "setup.py": evil})
    described(here)
    assert not (here / "imported").exists()
    assert "port" not in sys.modules


def test_odd_files_are_passed_by_and_nothing_is_said_of_texts_in_them(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write({"port.py": "pattern = '\\d'\n" + model(CONFIG), "a\nb.py": model(CONFIG), "empty.py": ""})
    os.mkfifo("pipe.py")
    Path("link.py").symlink_to("port.py")
    Path("loop").symlink_to(".")
    assert len(described(here)) == 1
    out, err = capfd.readouterr()
    assert out.startswith("looked at 1 Python files")
    assert err == ""


# Several, none, and not sure


def test_several_ports_are_numbered_and_get_a_name_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"one/port.py": model(CONFIG), "two/port.py": model(CONFIG)})
    tables = described(here)
    assert [table["name"] for table in tables] == ["mine", "mine-2"]
    out, _ = capsys.readouterr()
    assert "port 1 of 2: one/port.py:MineForCausalLM" in out
    assert "port 2 of 2: two/port.py:MineForCausalLM" in out


def test_a_port_that_is_described_is_left_and_another_is_added(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"one/port.py": model(CONFIG)})
    described(here)
    before = (here / "parity.toml").read_text()
    write({"two/port.py": model(CONFIG)})
    described(here)
    out, _ = capsys.readouterr()
    assert "port 'mine' (one/port.py:MineForCausalLM) is described already and is left as it is" in out
    assert f"{here / '.github/workflows/parity.yml'} is there already and is left as it is" in out
    after = (here / "parity.toml").read_text()
    assert after.startswith(before)
    assert [port.name for port in read_ports(here)] == ["mine", "mine-2"]


def test_where_all_is_there_nothing_is_done(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"mine/port.py": model(CONFIG)})
    described(here)
    text = (here / "parity.toml").read_text().replace("mine/port.py:", "mine.port:")  # the same, named by module
    (here / "parity.toml").write_text(text)
    capsys.readouterr()
    assert main(["init", "--yes"]) == 2
    assert capsys.readouterr().err == (
        "parity: there is nothing to write: the ports are described and the workflow is there\n"
    )
    assert (here / "parity.toml").read_text() == text


def test_where_there_is_no_port_it_says_what_was_looked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        {
            "a.py": "class Config: ...\n",
            "broken.py": "class Model(torch.nn.Module:\n",
            "deep.py": "config = " + "(" * 500,
        }
    )
    assert main(["init"]) == 2
    out, err = capsys.readouterr()
    assert "not read: broken.py: SyntaxError" in out
    assert "those of an installed family: " in out
    assert "nanogpt" in out
    assert "[[tool.parity.port]]" in out
    assert err == f"parity: no port was found in {here}; what is looked for, and what to write, stands above\n"


def test_a_port_of_something_else_is_named_and_can_be_insisted_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = (
        "from transformers import PretrainedConfig\n\nclass MineConfig(PretrainedConfig):\n    vocab_size: int = 3\n"
    )
    write({"port.py": model(other)})
    assert main(["init"]) == 2
    assert (
        "port.py:MineForCausalLM is not proposed: port.py:MineConfig has 14 % of the fields" in capsys.readouterr().out
    )
    (table,) = described(here, "--family", "nanogpt", "--model", "port.py:MineForCausalLM")
    assert table["family"] == "nanogpt"


def test_two_families_that_fit_alike_are_left_to_the_user(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    from harness import families

    nanogpt = families.find_family("nanogpt")
    twins = {name: dataclasses.replace(nanogpt, name=name) for name in ("one_family", "other_family")}
    monkeypatch.setattr("harness.init.proposal.family_names", lambda: list(twins))
    monkeypatch.setattr("harness.init.proposal.find_family", twins.__getitem__)
    write({"port.py": model(CONFIG)})
    assert main(["init"]) == 2
    assert "may be a port of one_family or other_family: say which with --family" in capsys.readouterr().out
    assert described(here, "--family", "other_family")[0]["family"] == "other_family"


BERT = (Path(__file__).parents[1] / "mlx_bert" / "plain_bert.py").read_text(encoding="utf-8")


def test_a_module_of_mlx_is_a_port_of_a_family_on_mlx(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"bert.py": BERT})
    assert main(["init", "--family", "mlx_bert", "--yes"]) == 0
    (port,) = read_ports(here)
    assert (port.family, port.model, port.config) == ("mlx_bert", "bert.py:Bert", "bert.py:Config")


def test_families_of_another_framework_are_not_thought_of(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"bert.py": BERT})
    assert main(["init"]) == 2
    said = capsys.readouterr().out
    assert "bert.py:Bert may be a port of mlx_bert or mlx_distilbert or mlx_roberta: say which with --family" in said
    of_torch = BERT.replace("import mlx.nn as nn", "from torch import nn").replace("import mlx.core as mx", "import mx")
    write({"bert.py": of_torch.replace("def __call__", "def forward")})
    main(["init"])
    assert "mlx_bert" not in capsys.readouterr().out.partition("recognised")[0]


def test_a_family_of_the_repositorys_own_can_be_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"port.py": model(CONFIG)})
    assert main(["init", "--family", "nanogtp"]) == 2
    assert "did you mean 'nanogpt'" in capsys.readouterr().err
    write({"conftest.py": "from harness import Family, register_family\nregister_family(Family(name='mine'))\n"})
    assert described(here, "--family", "mine")[0]["family"] == "mine"
    assert main(["init", "--model", "port.py:MineForCausal"]) == 2
    assert "did you mean 'port.py:MineForCausalLM'" in capsys.readouterr().err


# What is written


def test_without_a_terminal_it_shows_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"port.py": model(CONFIG)})
    before = sorted(here.rglob("*"))
    assert main(["init"]) == 0
    assert sorted(here.rglob("*")) == before
    out, _ = capsys.readouterr()
    assert 'model = "port.py:MineForCausalLM"' in out
    assert "python -m pytest -m parity" in out
    assert out.endswith("nothing is written; to write it: parity init --yes\n")


@pytest.mark.parametrize(
    ("answer", "writes"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("", False), ("\n", False)]
)
def test_at_a_terminal_it_asks(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, writes: bool
) -> None:
    write({"port.py": model(CONFIG)})
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.setattr(command, "at_a_terminal", lambda: True)
    assert main(["init"]) == 0
    assert (here / "parity.toml").exists() is (here / ".github/workflows/parity.yml").exists() is writes
    assert ("nothing is written" in capsys.readouterr().out) is not writes


@pytest.mark.parametrize(
    "before",
    [
        b"[project]\nname = 'x' # no newline at the end",
        b"\xef\xbb\xbf[project]\r\nname = '\xc3\xa9'\r\n\r\n[tool.other]\r\na = 1\r\n",
        b"",
        b"[tool.parity]\n",
        b"tool.other.a = 1\n",
    ],
)
def test_pyproject_keeps_every_byte_and_its_mode(here: Path, before: bytes) -> None:
    write({"port.py": model(CONFIG)})
    path = here / "pyproject.toml"
    path.write_bytes(before)
    path.chmod(0o640)
    assert main(["init", "--yes"]) == 0
    after = path.read_bytes()
    assert after.startswith(before)
    assert (b"\r\n" in before) is (b"\n" not in after.replace(b"\r\n", b""))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [port.name for port in read_ports(here)] == ["mine"]


@pytest.mark.parametrize("before", ["tool = { other = { a = 1 } }\n", "[tool]\nparity = { port = [] }\n"])
def test_a_file_that_no_table_can_follow_is_left(here: Path, before: str, capsys: pytest.CaptureFixture[str]) -> None:
    write({"port.py": model(CONFIG), "pyproject.toml": before})
    assert main(["init", "--yes"]) == 2
    assert (here / "pyproject.toml").read_text() == before
    assert not (here / ".github").exists()
    out, err = capsys.readouterr()
    assert err.startswith("parity: a table cannot be appended to pyproject.toml as it is: ")
    assert err.count("\n") == 1
    assert "[[tool.parity.port]]" in out  # to write by hand


def test_a_parity_toml_with_short_headings_gets_another(here: Path) -> None:
    write({"port.py": model(CONFIG), "other.py": model(CONFIG)})
    short = (
        "[[port]]\nname = 'x'\nfamily = 'nanogpt'\nmodel = 'other.py:MineForCausalLM'\nconfig = 'other.py:MineConfig'\n"
    )
    write({"parity.toml": short, "pyproject.toml": "[project]\nname = 'x'\n"})
    assert main(["init", "--yes"]) == 0
    assert [port.name for port in read_ports(here)] == ["x", "mine"]
    assert (here / "pyproject.toml").read_text() == "[project]\nname = 'x'\n"


def test_a_file_that_changes_while_it_is_shown_is_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"port.py": model(CONFIG), "pyproject.toml": "[project]\nname = 'x'\n"})

    def edit(_: object) -> bool:
        (here / "pyproject.toml").write_text("[project]\nname = 'edited'\n")
        return True

    monkeypatch.setattr(command, "_agreed", edit)
    assert main(["init"]) == 2
    assert (here / "pyproject.toml").read_text() == "[project]\nname = 'edited'\n"


# The workflow


def steps(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())["jobs"]["parity"]["steps"]
    return found


def test_the_workflow_installs_runs_the_gate_and_keeps_the_report(here: Path) -> None:
    write({"port.py": model(CONFIG), "requirements.txt": "", "pyproject.toml": "[project]\nname = 'x'\n"})
    assert main(["init", "--yes", "--harness", "git+https://example.org/parity@1"]) == 0
    path = here / ".github/workflows/parity.yml"
    document = yaml.safe_load(path.read_text())
    assert set(document[True]) == {"pull_request", "push"}  # YAML 1.1 reads `on` as true
    assert document["permissions"] == {"contents": "read"}
    assert document["env"] == {"PARITY_HARNESS": "git+https://example.org/parity@1"}
    commands = "\n".join(step.get("run", "") for step in steps(path)).splitlines()
    assert [line for line in commands if line] == [
        "python -m pip install torch --index-url https://download.pytorch.org/whl/cpu",
        'python -m pip install "${PARITY_HARNESS:?set PARITY_HARNESS at the top of the workflow}"',
        "python -m pip install -r requirements.txt",
        "python -m pip install -e .",
        "python -m pytest -m parity --parity-report=parity-report --junitxml=parity-report/pytest.xml",
    ]
    upload = steps(path)[-1]
    assert upload["if"] == "${{ !cancelled() }}"
    assert upload["with"] == {"name": "parity-report", "path": "parity-report"}


def test_a_directory_below_the_repository_gets_its_workflow_at_the_top(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write({"packages/mine/port.py": model(CONFIG), ".git/HEAD": "ref: refs/heads/main\n"})
    monkeypatch.chdir(here / "packages/mine")
    assert main(["init", "--yes"]) == 0
    document = yaml.safe_load((here / ".github/workflows/parity.yml").read_text())
    assert document["jobs"]["parity"]["defaults"] == {"run": {"working-directory": "packages/mine"}}
    assert document["jobs"]["parity"]["steps"][-1]["with"]["path"] == "packages/mine/parity-report"
    assert not (here / "packages/mine/.github").exists()
    assert (here / "packages/mine/parity.toml").exists()


@pytest.mark.parametrize(
    ("written", "requirement"),
    [
        (None, ""),
        ('{"url": "file:///home/ann/project", "dir_info": {"editable": true}}', ""),
        (
            '{"url": "https://example.org/parity", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
            "git+https://example.org/parity@abc",
        ),
    ],
)
def test_where_the_harness_comes_from_is_what_pip_wrote_down(
    monkeypatch: pytest.MonkeyPatch, written: str | None, requirement: str
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            return written

    monkeypatch.setattr(writing.metadata, "distribution", lambda name: Installed())
    assert writing.harness_requirement() == requirement


def test_looking_imports_no_framework(here: Path) -> None:
    write({"port.py": model(CONFIG)})
    import subprocess

    code = (
        "import sys\nfrom harness.cli import main\nassert main(['init']) == 0\n"
        "assert not {'torch', 'transformers', 'mlx'} & set(sys.modules)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _root() -> Path:
    found = importlib.util.find_spec("harness")
    assert found is not None and found.origin is not None
    return Path(found.origin).parents[1]
