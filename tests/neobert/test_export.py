# SPDX-License-Identifier: Apache-2.0
"""The exporter: a directory that transformers loads and that computes the same, or one line and nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from reference_models.neobert import comparison, export
from reference_models.neobert.checkpoint import CheckpointError, layout, read_run, read_weight, write_run
from reference_models.neobert.comparison import ComparisonError, compare
from reference_models.neobert.original import NeoBERTConfig, NeoBERTLMHead
from reference_models.neobert.tokenizer import write_tokenizer
from tests.disk import limited_file_size

CONFIG = NeoBERTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    vocab_size=64,
    max_length=12,
    norm_eps=1e-5,
    dropout=0.25,
    attn_backend="flash_attn_varlen",
)
CONFIGS: Mapping[str, NeoBERTConfig] = {
    "tied": CONFIG,
    "untied": replace(CONFIG, tie_word_embeddings=False),
    "learned": replace(
        CONFIG, rope=False, rms_norm=False, hidden_act="gelu", tie_word_embeddings=False, pad_token_id=3
    ),
    "bfloat16": CONFIG,
    "mixed": replace(CONFIG, tie_word_embeddings=False),
}
FILES = [
    "README.md", "config.json", "configuration_neobert.py", "model.py", "model.safetensors", "pytorch_model.bin",
    "rotary.py", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
]  # fmt: skip
SENTENCE = "the cat sat on the mat."

pytestmark = pytest.mark.usefixtures("one_thread")


def original(kind: str) -> NeoBERTLMHead:
    torch.manual_seed(0)
    model = NeoBERTLMHead(CONFIGS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if kind == "bfloat16":
        model.bfloat16()
    if kind == "mixed":
        # Not that of the first tensor, which one would take for that of all.
        model.model.encoder.double()
    return model


def write(place: Path, kind: str = "tied", *, file: Any = "state_dict.pt", line: Any = "5") -> Path:
    """A checkpoint directory of a run."""
    config = CONFIGS[kind]
    write_tokenizer(
        place / "tokenizer", vocab_size=64, pad_token_id=config.pad_token_id, max_length=99, layout=line
    )  # fmt: skip
    checkpoint = place / "run" / "model_checkpoints" / "7"
    write_run(checkpoint, original(kind), tokenizer=place / "tokenizer", layout=file)
    shutil.rmtree(place / "tokenizer")
    return checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What is exported of each kind of model, each dialect of files used once at least."""
    base = tmp_path_factory.mktemp("exports")
    directories = {}
    for number, kind in enumerate(CONFIGS):
        file = ("state_dict.pt", "model.safetensors")[number % 2]
        path = write(base / kind, kind, file=file, line=("5", "4.57")[number % 2])
        directories[kind] = export.export(path)
    return directories


LOADER = """
import contextlib, io, json, re, sys
import torch
from pathlib import Path
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, logging
logging.set_verbosity_error()
results = {}
for kind, place in json.loads(sys.argv[1]).items():
    found = results[kind] = {}
    for name, auto in (("base", AutoModel), ("head", AutoModelForMaskedLM)):
        model, info = auto.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
        found[name] = {key: sorted(map(str, value)) for key, value in info.items() if value}
        found["dtype"] = str(model.dtype)
    model = AutoModelForMaskedLM.from_pretrained(place, trust_remote_code=True, dtype=torch.float64).eval()
    found["tied"] = model.decoder.weight is model.model.encoder.weight
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    found["longest"] = tokenizer.model_max_length
    found["special"] = tokenizer.special_tokens_map
    inputs = tokenizer(["the cat sat on the mat.", "a dog"], padding=True, return_tensors="pt")
    found["ids"], found["mask"] = inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()
    with torch.no_grad():
        found["logits"] = model(**inputs).logits.tolist()
    found["printed"] = []
    for example in re.findall("```python\\n(.*?)```", (Path(place) / "README.md").read_text(), re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(example, {})
        found["printed"].append(printed.getvalue())
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def loaded(exports: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What transformers says of each export in a process that has nothing else, not even this package."""
    home = tmp_path_factory.mktemp("home")
    places = json.dumps({kind: str(place) for kind, place in exports.items()})
    done = subprocess.run(
        [sys.executable, "-P", "-s", "-c", f"import sys\nsys.modules['reference_models'] = None\n{LOADER}", places],
        cwd=home,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


every_kind = pytest.mark.parametrize("kind", CONFIGS)


# What is exported


@every_kind
def test_files(exports: Mapping[str, Path], kind: str) -> None:
    place = exports[kind]
    assert sorted(file.name for file in place.iterdir()) == FILES
    assert place == place.parents[1] / "hf" / "run_7"
    assert [file.name for file in place.parent.iterdir()] == ["run_7"]
    for name in export.CODE:
        assert (place / name).read_bytes() == (Path(export.__file__).parent / name).read_bytes()


@every_kind
def test_tensors_keep_their_bits(exports: Mapping[str, Path], kind: str) -> None:
    run = read_run(exports[kind].parents[1] / "model_checkpoints" / "7")
    expected = {name: read_weight(run, name) for name in layout(run)}
    if CONFIGS[kind].tie_word_embeddings:
        del expected["decoder.weight"]
    safetensors = load_file(exports[kind] / "model.safetensors")
    torch_file = torch.load(exports[kind] / "pytorch_model.bin", weights_only=True)
    for found in (safetensors, torch_file):
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(exports[kind] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_configuration(exports: Mapping[str, Path]) -> None:
    assert json.loads((exports["tied"] / "config.json").read_text()) == {
        "architectures": ["NeoBERTLMHead"],
        "model_type": "neobert",
        "auto_map": export.AUTO_MAP,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "vocab_size": 64,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "rms_norm": True,
        "rope": True,
        "hidden_act": "swiglu",
        "embedding_init_range": 0.02,
        "decoder_init_range": 0.02,
        "dropout": 0.25,
        "tie_word_embeddings": True,
        "max_length": 12,
        "max_position_embeddings": 12,
        "flash_attention": True,
        "torch_dtype": "float32",
        "transformers_version": transformers.__version__,
    }
    learned = json.loads((exports["learned"] / "config.json").read_text())
    assert {name: learned[name] for name in ("rope", "rms_norm", "hidden_act", "pad_token_id", "max_length")} == {
        "rope": False, "rms_norm": False, "hidden_act": "gelu", "pad_token_id": 3, "max_length": 12,
    }  # fmt: skip
    kinds = {kind: json.loads((place / "config.json").read_text()) for kind, place in exports.items()}
    assert {kind: config["torch_dtype"] for kind, config in kinds.items()} == {
        "tied": "float32", "untied": "float32", "learned": "float32", "bfloat16": "bfloat16", "mixed": "float32",
    }  # fmt: skip
    assert [config["tie_word_embeddings"] for config in kinds.values()] == [True, False, False, True, False]


@every_kind
def test_transformers_loads_it(loaded: Mapping[str, Any], kind: str) -> None:
    found, config = loaded[kind], CONFIGS[kind]
    assert found["head"] == {} and found["base"] in ({}, {"unexpected_keys": ["decoder.bias", "decoder.weight"]})
    assert found["tied"] is config.tie_word_embeddings
    assert found["longest"] == 12
    assert {f"{name}_token" for name in ("cls", "sep", "pad", "mask", "unk")} <= set(found["special"])
    ids, mask = torch.tensor(found["ids"]), torch.tensor(found["mask"])
    assert (ids[mask == 0] == config.pad_token_id).all() and mask.sum() == 13
    model = original(kind).double()
    pad_mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask == 0, -torch.inf)
    with torch.no_grad():
        expected = model(ids, pad_mask)["logits"]
    logits = torch.tensor(found["logits"], dtype=torch.float64)
    assert (logits - expected).abs().max() <= 1e-9 * expected.square().mean().sqrt()


@every_kind
def test_the_examples_of_the_card_run(loaded: Mapping[str, Any], kind: str) -> None:
    masked, embedded = loaded[kind]["printed"]
    assert len(masked.splitlines()) == 5
    assert embedded == "torch.Size([2, 16])\n"


def test_the_card(exports: Mapping[str, Path], tmp_path: Path) -> None:
    card = (exports["tied"] / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["library_name"] == "transformers" and matter["license"] == "mit" and "datasets" not in matter
    assert "# run_7\n" in card and f'directory = "{exports["tied"]}"' in card
    assert "tied to the token embedding" in card and "RMSNorm, epsilon 1e-05" in card
    settings = (exports["tied"].parents[1] / "model_checkpoints" / "7" / "config.yaml").read_text()
    assert f"```yaml\n{settings}```\n\n</details>" in card
    path = write(tmp_path, "learned")
    settings = "# ```\n" + (path / "config.yaml").read_text().replace("path: null", "path: '/data/some: set'")
    (path / "config.yaml").write_text(settings)
    card = (export.export(path, output=tmp_path / 'na"me') / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["some: set"]
    assert f"````yaml\n{settings}````\n" in card
    assert json.loads(re.findall(r"directory = (.*?)(?:  #|\n)", card)[0]) == str(tmp_path / 'na"me')
    assert "learned, 12 of them" in card and "LayerNorm" in card and "a matrix of its own" in card


def test_a_card_for_a_vocabulary_that_marks_spaces(checkpoint: Path) -> None:
    pipeline = json.loads((checkpoint / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = pipeline["model"]["vocab"]
    word = next(word for word in vocabulary if word.isalpha())
    vocabulary["\u2581"] = vocabulary.pop(word)
    (checkpoint / "tokenizer" / "tokenizer.json").write_text(json.dumps(pipeline))
    card = (export.export(checkpoint) / "README.md").read_text()
    example = re.findall("```python\n(.*?)```", card, re.DOTALL)[0]
    assert 'convert_tokens_to_ids("\\u2581")' in example
    ids = torch.tensor([[2, vocabulary["\u2581"], 4, vocabulary["\u2581"], 5]])
    lines = example[example.index("ids = inputs") : example.index("with torch.no_grad")]
    space = vocabulary["\u2581"]

    class Tokenizer:
        mask_token_id = 4

        def convert_tokens_to_ids(self, token: str) -> int:
            return space

    scope: dict[str, Any] = {"inputs": {"input_ids": ids}, "tokenizer": Tokenizer(), "torch": torch}
    exec(lines, scope)
    assert scope["inputs"]["input_ids"].tolist() == [[2, 4, space, 5]]


def test_a_decoder_without_a_bias(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = torch.load(checkpoint / "state_dict.pt", weights_only=True)
    del tensors["decoder.bias"]
    torch.save(tensors, checkpoint / "state_dict.pt")
    (checkpoint / "tokenizer_info.json").unlink()
    assert export.main([str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    place = Path(out.strip())
    assert not load_file(place / "model.safetensors")["decoder.bias"].any()
    assert "has no decoder.bias; zeros are exported" in err and "tokenizer_info.json: not found" in err
    assert [line.startswith("note: ") for line in err.splitlines()] == [True, True]
    assert "the checkpoint has none" in (place / "README.md").read_text()


@pytest.mark.parametrize("line", ["4.57", "5"])
def test_tokenizers_of_both_lines(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, line=line)
    settings = json.loads((path / "tokenizer" / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "TokenizersBackend"
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    place = export.export(path)
    written = json.loads((place / "tokenizer_config.json").read_text())
    assert written["model_max_length"] == 12 and written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {**written, "model_max_length": 99} == {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert json.loads((place / "special_tokens_map.json").read_text()) == {
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]",
    }  # fmt: skip
    vocabulary = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
    assert {word: number for number, word in enumerate((place / "vocab.txt").read_text().splitlines())} == vocabulary


def test_an_empty_output_directory_will_do(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert export.main([str(checkpoint), "--output", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'empty'}\n"
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == FILES


def test_a_relative_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    assert export.export(".") == checkpoint.parents[1] / "hf" / "run_7"


def test_the_module_needs_no_transformers() -> None:
    script = "import sys, reference_models.neobert.export; sys.exit('transformers' in sys.modules)"
    root = Path(export.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


# What is compared


def prepared(checkpoint: Path, *, text: Sequence[tuple[str, str, str]] = (), **settings: Any) -> None:
    """Compare a checkpoint with what would be exported of it, after changes to its code and its config.json."""
    run = read_run(checkpoint)
    written = layout(run)
    if run.fields["tie_word_embeddings"]:
        del written["decoder.weight"]
    place = checkpoint.parent / "staged"
    place.mkdir()
    for name in export.CODE:
        shutil.copyfile(Path(export.__file__).with_name(name), place / name)
    for name, old, new in text:
        content = (place / name).read_text()
        assert content.count(old) == 1, (name, old)
        (place / name).write_text(content.replace(old, new))
    config = export.config_fields(run.fields, written) | settings
    (place / "config.json").write_text(json.dumps(config))
    loads: list[str] = []

    def load(name: str) -> Tensor:
        loads.append(name)
        return read_weight(run, name)

    modules, registered = set(sys.modules), transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content
    known = dict(registered)
    try:
        compare(NeoBERTConfig(**run.fields), place, layout=written, load=load)
        assert loads == list(written)
    finally:
        assert not [name for name in set(sys.modules) - modules if "neobert_export" in name]
        assert registered == known
        assert sorted(file.name for file in place.iterdir()) == ["config.json", *sorted(export.CODE)]


@every_kind
def test_equal_models(tmp_path: Path, kind: str) -> None:
    prepared(write(tmp_path, kind))


@every_kind
def test_equal_large_models(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose long texts go through a narrow layer, and of whose vocabulary a part takes part."""
    monkeypatch.setattr(comparison, "_BUDGET", 0)
    monkeypatch.setattr(comparison, "_VOCABULARY", 10)
    monkeypatch.setattr(comparison, "_LONGEST", 8)
    prepared(write(tmp_path, kind))


HALVES = (
    "model.py",
    "query, key, value = heads.chunk(3, dim=-1)",
    "query, key, value = (part.view(rows, length, -1, self.head_dim) for part in heads.flatten(2).chunk(3, dim=-1))",
)
MASK = ("model.py", "by_choice = torch.where(attention_mask == 0,", "by_choice = torch.where(attention_mask != 0,")
FAULTS: Mapping[str, tuple[str, Sequence[tuple[str, str, str]], Mapping[str, Any], str]] = {
    "heads": ("tied", (), {"num_attention_heads": 4}, "block.0.attention is the first"),
    "epsilon": ("tied", (), {"norm_eps": 1e-6}, "block.0.attention_norm is the first"),
    "epsilon of the other norm": ("learned", (), {"norm_eps": 1e-6}, "block.0.attention_norm is the first"),
    "theta": ("tied", [("rotary.py", "THETA = 10000.0", "THETA = 1e5")], {}, "block.0.attention is the first"),
    "packed globally": ("tied", [HALVES], {}, "block.0.attention is the first"),
    "inverted mask": ("tied", [MASK], {}, "block.0.attention is the first"),
    "padding": ("learned", (), {"pad_token_id": 0}, "embedding is the first"),
    "gate": ("tied", [("model.py", "F.silu(self.w1(", "F.gelu(self.w1(")], {}, "block.0.ffn is the first"),
    "final norm": (
        "tied",
        [("model.py", "hidden_states = self.layer_norm(hidden_states)", "self.layer_norm(hidden_states)")],
        {},
        "decoder is the first",
    ),
    "layers swapped": (
        "tied",
        [("model.py", "for block in self.transformer_encoder:", "for block in reversed(self.transformer_encoder):")],
        {},
        "block.0 differs: the model is at block.1 instead",
    ),
    "tie": ("untied", (), {"tie_word_embeddings": True}, "decoder.weight differs: the weights have (64, 16)"),
    "no tie": ("tied", (), {"tie_word_embeddings": False}, "the weights have no such tensor"),
    "width": ("tied", (), {"intermediate_size": 40}, "ffn.w1.weight differs: the weights have (16, 16)"),
    "layers": ("tied", (), {"num_hidden_layers": 3}, "encoder.2.attention_norm.weight differs: the weights have no"),
    "positions": ("tied", (), {"rope": False}, "model.positional_embedding.weight differs"),
    "activation": ("tied", (), {"hidden_act": "relu"}, "cannot be made from config.json: unsupported hidden_act"),
    "helper": (
        "tied",
        [("model.py", "from .rotary import", "from rotary import")],
        {},
        "model.py cannot be imported from where it is exported to: No module named 'rotary'",
    ),
    "exception": (
        "tied",
        [("model.py", "heads = self.qkv(", "heads = self.kqv(")],
        {},
        "the model fails at block.0 on 3 rows of 5 tokens, padded right and left: 'NeoBERTBlock' object has no",
    ),
    "longest text": (
        "tied",
        [("rotary.py", "angles = position_ids[..., None]", "angles = position_ids.clamp(max=11)[..., None]")],
        {},
        "on 13 tokens, one beyond the longest text",
    ),
    "logits": ("tied", [("model.py", "logits = self.decoder(", "logits = 2 * self.decoder(")], {}, "logits is the"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_different_models(tmp_path: Path, fault: str) -> None:
    kind, text, settings, message = FAULTS[fault]
    with pytest.raises(ComparisonError) as refusal:
        prepared(write(tmp_path, kind), text=text, **settings)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_table_that_ends_in_a_large_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_BUDGET", 0)
    _, text, _, message = FAULTS["longest text"]
    with pytest.raises(ComparisonError, match=f"{message}.*, in a layer of one head with random weights"):
        prepared(write(tmp_path), text=text)


def test_what_differs_is_not_exported(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = export.config_fields
    monkeypatch.setattr(export, "config_fields", lambda *given: honest(*given) | {"num_attention_heads": 4})
    before = sorted(checkpoint.parents[1].rglob("*"))
    assert export.main([str(checkpoint)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "block.0.attention" in err
    assert sorted(checkpoint.parents[1].rglob("*")) == before


# What is refused, with nothing left behind


def refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], *words: str, output: Path | str | None = None
) -> None:
    root = checkpoint.parents[2]
    before = sorted(root.rglob("*"))
    assert export.main([str(checkpoint), *(["-o", str(output)] if output is not None else [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: "), err
    for word in words:
        assert word in err, err
    assert sorted(root.rglob("*")) == before


def test_a_bad_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "state_dict.pt").write_bytes(b"PK\3\4")
    refused(checkpoint, capsys, "state_dict.pt: is a truncated zip archive")
    refused(checkpoint / "nowhere", capsys, "not found")


def test_numbers_that_are_none(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = torch.load(checkpoint / "state_dict.pt", weights_only=True)
    tensors["model.layer_norm.weight"][0] = float("nan")
    torch.save(tensors, checkpoint / "state_dict.pt")
    refused(checkpoint, capsys, "model.layer_norm.weight contains NaN")


Change = Mapping[str, Any]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer_config.json", {"mask_token": None}, "tokenizer_config.json: lacks mask_token; expected all of"),
        ("tokenizer_config.json", {"cls_token": None, "unk_token": 3}, "lacks cls_token, unk_token"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "needs code of its own"),
        ("tokenizer_config.json", {"sep_token": "</s>"}, "its vocabulary lacks '</s>', the sep_token"),
        ("special_tokens_map.json", {"cls_token": "[CLS]"}, "special_tokens_map.json: lacks sep_token, pad_token"),
        ("tokenizer.json", {"added_tokens": [{"id": 64, "content": "more"}]}, "has token 'more' with id 64"),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": None}, "has no vocabulary"),
        ("tokenizer.json", {"model": 3, "added_tokens": [3]}, "has no vocabulary"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Words"}}, "tokenizer.json: cannot be read by"),
        ("tokenizer.json", {"model": "WordPiece"}, "has no vocabulary"),
        ("tokenizer.json", {"model": {"vocab": ["a", "b"]}}, "has no vocabulary"),
        ("tokenizer.json", {"model": {"vocab": [[["a"], 1.0]]}}, "has no vocabulary"),
        ("tokenizer.json", {"more": "\ud800"}, "tokenizer.json: has half of a surrogate pair"),
        ("tokenizer_config.json", {"more": "\ud800"}, "tokenizer_config.json: has half of a surrogate pair"),
        ("tokenizer.json", {"model": {"vocab": {"[PAD]": "0"}}, "added_tokens": []}, "has no vocabulary"),
        ("tokenizer.json", {"added_tokens": [{"id": 5, "content": "[PAD]"}]}, "'[PAD]' at 5, but the model's"),
    ],
)  # fmt: skip
def test_a_bad_tokenizer(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], file: str, change: Change, message: str
) -> None:
    path = checkpoint / "tokenizer" / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (content | change).items() if value is not None}))
    refused(checkpoint, capsys, message)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_a_tokenizer_without_a_file(checkpoint: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    (checkpoint / "tokenizer" / file).write_text("{")
    refused(checkpoint, capsys, f"{file}: is not JSON")
    (checkpoint / "tokenizer" / file).unlink()
    refused(checkpoint, capsys, f"{file}: not found")


def test_an_output_with_something_in_it(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    refused(checkpoint, capsys, "full: is not empty; expected a new or an empty directory", output=tmp_path / "full")
    refused(checkpoint, capsys, "file: is a file; expected", output=tmp_path / "full" / "file")
    refused(checkpoint, capsys, "below: Not a directory", output=tmp_path / "full" / "file" / "below")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no directory that nobody can write to")
def test_an_output_that_cannot_be_written(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(checkpoint, capsys, "error: /proc/neobert: ", output="/proc/neobert")


@pytest.mark.parametrize("output", ["a\0b", "a\udcffb"])
def test_an_output_that_is_no_path(checkpoint: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    refused(checkpoint, capsys, "is not a path in UTF-8", output=output)


def test_a_line_break_in_a_path(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(checkpoint / "a\nb", capsys, "a b: not found")


@pytest.mark.parametrize("size", [10, 3000, 20_000])
def test_a_full_disk(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    with limited_file_size(size):
        refused(checkpoint, capsys, f"error: {tmp_path / 'a' / 'b'}: File too large", output=tmp_path / "a" / "b")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_export(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    ready = tmp_path / "ready"
    child = os.fork()
    if child == 0:

        def wait(*_: Any, **__: Any) -> None:
            ready.write_text("")
            time.sleep(600)

        status = 1
        # Ignored where the tests run in the background of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            export.compare = wait
            status = export.main([str(checkpoint)])
        except SystemExit as end:
            status = int(str(end.code))
        finally:
            os._exit(status)
    while not ready.exists():
        time.sleep(0.01)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    place = checkpoint.parents[1] / "hf"
    if number != signal.SIGKILL:
        assert os.waitstatus_to_exitcode(status) == 128 + number
        assert not place.exists()
    else:
        assert [re.sub("[0-9a-f]{16}", "?", left.name) for left in place.iterdir()] == [".run_7.?.unfinished"]
    export.export(checkpoint)
    assert sorted(file.name for file in (place / "run_7").iterdir()) == FILES


def test_errors_of_the_function(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        export.export(checkpoint, output=tmp_path / "file")
    shutil.rmtree(checkpoint / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer: not found"):
        export.export(checkpoint)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        export.main([])
    assert end.value.code == 2 and "checkpoint" in capsys.readouterr().err
