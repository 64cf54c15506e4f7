# SPDX-License-Identifier: Apache-2.0
"""What docs/nanomoe.md shows is done as it stands there, block by block, where it says that it is done."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from harness.hub import HubServer
from reference_models.nanomoe.checkpoint import from_nanomoe_ckpt, to_nanomoe_directory
from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT, GPTModel
from tests.docs.blocks import ROOT, Reader, blocks, dead_links, every_fence_is_of_a_block

DOCUMENT = ROOT / "docs/nanomoe.md"
PORT = ROOT / "reference_models/nanomoe"
CODE = ("configuration_nanomoe_gpt.py", "modeling_nanomoe_gpt.py", "manager.py")
TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 64}

BLOCKS = blocks(DOCUMENT)
SECTIONS = list(dict.fromkeys(block.section for block in BLOCKS))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Reader]:
    # Other tests import copies of the port, which register themselves in its place.
    AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
    AutoModel.register(GPTConfig, GPTModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTConfig, GPT, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference_models").symlink_to(ROOT / "reference_models")
    torch.manual_seed(0)
    reader = Reader(DOCUMENT, PORT, tmp_path)
    yield reader
    reader.leave()


# The text


@pytest.mark.parametrize("section", SECTIONS)
def test_section(section: str, reader: Reader) -> None:
    for block in BLOCKS:
        if block.section == section:
            reader.follow(block)


def test_every_block_belongs_to_a_section_and_has_a_language_that_is_run() -> None:
    assert every_fence_is_of_a_block(DOCUMENT)
    assert {block.language for block in BLOCKS} == {"python", "console", "toml"}
    assert "" not in SECTIONS


def test_links_lead_to_files_and_headings() -> None:
    assert dead_links(DOCUMENT) == []


def test_every_defect_of_the_existing_port_has_its_row() -> None:
    rows = re.findall(r"^\| (A-[^|]*) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [name for row in rows for name in row.split(", ")] == [f"A-{number}" for number in range(1, 27)]


def test_other_names_are_those_of_the_configuration() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("| other name")[2].partition("\n\n")[0]
    named = {
        alias: field
        for row in text.splitlines()[2:]
        for aliases, field in re.findall(r"^\| (.*) \| `(\w+)` \|$", row)
        for alias in re.findall(r"`(\w+)`", aliases)
    }
    assert named == GPTConfig.attribute_map


# What the document says without showing it


def program(directory: Path, name: str, *lines: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory / name


def test_without_an_import_or_trust_there_is_no_model(reader: Reader) -> None:
    GPT(GPTConfig(**SIZES)).save_pretrained("saved")
    load = program(
        reader.top / "elsewhere",
        "load.py",
        "from transformers import AutoModelForCausalLM",
        "AutoModelForCausalLM.from_pretrained('../saved')",
    )
    done = reader.program(load)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_whose_code_runs_where_the_port_was_imported(reader: Reader) -> None:
    GPT(GPTConfig(**SIZES)).save_pretrained("saved")
    for name in CODE:
        program(reader.top / "workspace", name, (PORT / name).read_text(encoding="utf-8"))
    expected = "is GPT" if TRANSFORMERS_5 else "is not GPT"
    load = program(
        reader.top / "workspace",
        "load.py",
        "from modeling_nanomoe_gpt import GPT",
        "from transformers import AutoModelForCausalLM",
        f"assert type(AutoModelForCausalLM.from_pretrained('../saved', trust_remote_code=True)) {expected}",
    )
    done = reader.program(load)
    assert done.returncode == 0, done.stderr


def test_a_directory_of_an_earlier_revision(reader: Reader) -> None:
    model = GPT(GPTConfig(**SIZES, n_exp=8, moe_top_k=4)).eval()
    to_nanomoe_directory(model, "earlier")
    for name in CODE:
        shutil.copy(PORT / name, "earlier")
    file = reader.top / "earlier" / "config.json"
    renamed = file.read_text().replace('"moe_top_k"', '"top_k"').replace('"block_size"', '"sequence_len"')
    file.write_text(renamed)
    load = program(
        reader.top / "elsewhere",
        "load.py",
        "from transformers import AutoModelForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained('../DIRECTORY', trust_remote_code=True)",
        "assert (model.config.moe_top_k, model.config.block_size) == (4, 32)",
    )
    text = load.read_text()
    load.write_text(text.replace("DIRECTORY", "earlier"))
    assert re.search(r"`nanomoe_gpt` but Transformers does not recognize", reader.program(load).stderr)
    from_nanomoe_ckpt("earlier").save_pretrained("later")
    load.write_text(text.replace("DIRECTORY", "later"))
    done = reader.program(load)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("reader")
def test_dtype_of_what_is_loaded() -> None:
    GPT(GPTConfig(**SIZES)).to(torch.bfloat16).save_pretrained("half")
    expected = torch.bfloat16 if TRANSFORMERS_5 else torch.float32
    assert AutoModelForCausalLM.from_pretrained("half").dtype == expected
    assert AutoModelForCausalLM.from_pretrained("half", dtype=torch.float64).dtype == torch.float64


@pytest.mark.usefixtures("reader")
def test_what_the_trainer_of_each_line_calls_the_loss() -> None:
    model = GPT(GPTConfig(**SIZES))
    tokens = torch.randint(64, (4, 16))
    arguments = TrainingArguments(output_dir="out", report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    reported = Trainer(model=model, args=arguments, eval_dataset=rows).evaluate()["eval_loss"]
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert reported == pytest.approx(loss if TRANSFORMERS_5 else loss * 15 / 16, rel=1e-4)


@pytest.mark.usefixtures("reader")
def test_generation_beyond_the_window_and_without_sampling() -> None:
    model = GPT(GPTConfig(**SIZES)).eval()
    tokens = torch.randint(64, (2, 8))
    assert model.generate(tokens, max_new_tokens=40).shape == (2, 48)
    with pytest.raises(ValueError, match="block_size=32"):
        model.generate(tokens, max_new_tokens=40, use_cache=True)
    best = model.generate(tokens, max_new_tokens=8)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, temperature=0.8, top_k=5, top_p=0.95), best)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("drops", [False, True])
def test_what_a_token_depends_on(drops: bool) -> None:
    config = GPTConfig(**SIZES, n_exp=8, moe_top_k=2, eval_capacity=0.5 if drops else 4.0)
    assert config.capacity_can_drop == drops
    model = GPT(config).eval().double()
    tokens = torch.randint(64, (4, 32))
    whole = model(tokens).logits
    prefix = model(tokens[:, :10]).logits
    alone = model(tokens[1:2]).logits
    turned = model(tokens.flip(0)).logits.flip(0)
    first = model(tokens[:, :20], use_cache=True)
    rest = model(tokens[:, 20:], past_key_values=first.past_key_values, use_cache=True).logits
    pairs = {
        "prefix": (whole[:, :10], prefix),
        "batch": (whole[1:2], alone),
        "order": (whole, turned),
        "cache": (whole[:, 20:], rest),
    }
    equal = {name: torch.allclose(*pair, atol=1e-12) for name, pair in pairs.items()}
    assert equal == dict.fromkeys(pairs, not drops)


@pytest.mark.usefixtures("reader")
def test_the_tuple_of_the_configuration_and_a_positional_mask() -> None:
    model = GPT(GPTConfig(**SIZES, return_dict=False)).eval()
    tokens = torch.randint(64, (2, 8))
    loss, logits, *_ = model(input_ids=tokens, labels=tokens)
    assert loss.ndim == 0 and logits.shape == (2, 8, 64)
    mask = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    assert torch.equal(model(tokens, mask)[0], model(tokens, attention_mask=mask)[0])
    assert list(GPT(GPTConfig(**SIZES))(idx=tokens, targets=tokens))[:2] == ["loss", "logits"]


@pytest.mark.usefixtures("reader")
def test_auxiliary_losses_of_the_default_architecture_are_of_training() -> None:
    tokens = torch.randint(64, (2, 8))
    for swiglu in (False, True):
        model = GPT(GPTConfig(**SIZES, n_exp=4, use_aux_loss=True, use_qwen3_moe_mlp=swiglu))
        trained = model.train()(input_ids=tokens, labels=tokens).losses
        assert trained["aux_loss"] > 0
        assert bool(trained["gate_output_loss"] > 0) == swiglu
        outputs = model.eval()(input_ids=tokens, labels=tokens)
        assert torch.equal(outputs.loss, outputs.losses["ntp_loss"])


# The two documents of the existing port, whose code these are in other words


@pytest.mark.parametrize("experts", [{}, {"n_exp": 8, "moe_top_k": 2, "stride": 2, "use_aux_loss": True}])
@pytest.mark.usefixtures("reader")
def test_the_model_they_build_is_trained_saved_loaded_and_generates(experts: dict[str, Any]) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50304, **experts)
    model = GPT(config)
    X, Y = torch.randint(50304, (2, 2, 8))
    logits, loss, losses = model(input_ids=X, labels=Y, return_dict=False)
    assert logits.shape == (2, 8, 50304)
    loss.backward()
    assert losses["ntp_loss"] > 0 and ((losses["aux_loss"] > 0) == bool(experts))
    model.save_pretrained("path/to/save/directory")
    loaded = AutoModelForCausalLM.from_pretrained("path/to/save/directory")
    outputs = loaded(input_ids=X, labels=Y, return_dict=True)
    assert torch.equal(outputs.logits, model.eval()(X).logits)
    assert loaded.config.top_k == config.top_k == 2
    sampled = loaded.generate(X, max_new_tokens=5, do_sample=True, temperature=0.8, top_k=50, top_p=0.95)
    assert sampled.shape == loaded.generate_legacy(idx=X, max_new_tokens=5, temperature=0.8, top_k=50).shape == (2, 13)


def test_a_training_script_that_copies_the_code_and_an_absolute_path(reader: Reader) -> None:
    for name in CODE:
        program(reader.top / "workspace", name, (PORT / name).read_text(encoding="utf-8"))
    train = program(
        reader.top / "workspace",
        "train.py",
        "import shutil",
        "from pathlib import Path",
        "from modeling_nanomoe_gpt import GPT, GPTConfig",
        f"model = GPT(GPTConfig(**{SIZES}, n_exp=8, moe_top_k=2))",
        "model.save_pretrained('checkpoint')",
        f"for filename in {CODE}:",
        "    Path('checkpoint', filename).unlink()",  # as save_pretrained of the existing port leaves it
        f"for filename in {CODE}:",
        "    shutil.copy(filename, 'checkpoint')",
    )
    done = reader.program(train)
    assert done.returncode == 0, done.stderr
    evaluate = program(
        reader.top / "elsewhere",
        "evaluate.py",
        "from transformers import AutoModelForCausalLM",
        f"path = {str(reader.top / 'workspace/checkpoint')!r}",
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        "assert type(model).__module__.startswith('transformers_modules.')",
    )
    done = reader.program(evaluate)
    assert done.returncode == 0, done.stderr


def test_a_gpt2_by_its_name(reader: Reader) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64)
    GPT2LMHeadModel(config).save_pretrained("tiny")
    for name in CODE:
        program(reader.top / "workspace", name, (PORT / name).read_text(encoding="utf-8"))
    load = program(
        reader.top / "workspace",
        "load.py",
        "from huggingface_hub import HfApi",
        "import torch",
        "from transformers import GPT2LMHeadModel",
        "from modeling_nanomoe_gpt import GPT",
        "HfApi().create_repo('alice/gpt2')",
        "HfApi().upload_folder(repo_id='alice/gpt2', folder_path='../tiny')",
        "model, tokens = GPT.from_pretrained_gpt2('alice/gpt2'), torch.arange(16)[None]",
        "expected = GPT2LMHeadModel.from_pretrained('../tiny').eval()(tokens).logits",
        "assert torch.allclose(model(tokens).logits, expected, atol=1e-5)",
    )
    with HubServer(reader.top / "hub") as hub:
        reader.variables = hub.env()
        done = reader.program(load)
    assert done.returncode == 0, done.stderr
