# SPDX-License-Identifier: Apache-2.0
"""NeoBERT's own checkpoint directories: every dialect in, the trainer's form out, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_models.neobert import checkpoint
from reference_models.neobert.checkpoint import (
    CheckpointError,
    expected_shapes,
    layout,
    load_original,
    read_run,
    read_weight,
    whole_directory,
    write_run,
)
from reference_models.neobert.original import NeoBERTConfig, NeoBERTLMHead
from reference_models.neobert.tensor_reader import open_tensors, read_tensor
from reference_models.neobert.tensor_writer import safetensors_file, torch_file
from reference_models.neobert.tokenizer import write_tokenizer
from tests.disk import limited_file_size

CONFIG = NeoBERTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    vocab_size=37,
    max_length=12,
    norm_eps=1e-5,
    dropout=0.25,
    attn_backend="flash_attn_varlen",
)
LEARNED = replace(CONFIG, rope=False, rms_norm=False, hidden_act="gelu", tie_word_embeddings=False, pad_token_id=3)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, LEARNED], ids=["tied", "learned"])
LAYOUTS = pytest.mark.parametrize("file", ["state_dict.pt", "model.safetensors"])

pytestmark = pytest.mark.usefixtures("one_thread")


def original(config: NeoBERTConfig = CONFIG) -> NeoBERTLMHead:
    torch.manual_seed(0)
    model = NeoBERTLMHead(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """A tokenizer for each padding token."""
    base = tmp_path_factory.mktemp("tokenizers")
    for pad in (0, 3):
        write_tokenizer(base / str(pad), vocab_size=37, pad_token_id=pad, max_length=12)
    return {pad: base / str(pad) for pad in (0, 3)}


@pytest.fixture
def run(tmp_path: Path, tokenizers: Mapping[int, Path]) -> Path:
    """A checkpoint directory with state_dict.pt."""
    directory = tmp_path / "run" / "model_checkpoints" / "7"
    write_run(directory, original(), tokenizer=tokenizers[0])
    return directory


def state_dict(run: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(run / "state_dict.pt", weights_only=True)
    return tensors


def rewrite(run: Path, **model: Any) -> None:
    """Change or, with None, leave out entries of config.yaml's section for the model."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] |= model
    settings["model"] = {key: value for key, value in settings["model"].items() if value is not None}
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def require_same(run: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is read with its dtype and its bits."""
    read = read_run(run)
    assert layout(read) == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        found = read_weight(read, name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def refused(run: Path, *words: str) -> None:
    """The checkpoint is refused with one line that has these words."""
    with pytest.raises(CheckpointError) as refusal:
        read = read_run(run)
        for name in layout(read):
            read_weight(read, name)
    message = str(refusal.value)
    assert "\n" not in message and os.fspath(run) in message
    for word in words:
        assert word in message, message


# What is written


@CONFIGS
@LAYOUTS
def test_written_and_read(tmp_path: Path, tokenizers: Mapping[int, Path], config: NeoBERTConfig, file: Any) -> None:
    model = original(config)
    write_run(tmp_path / "7", model, tokenizer=tokenizers[config.pad_token_id], layout=file, name="mine", step=7)
    read = read_run(tmp_path / "7")
    assert NeoBERTConfig(**read.fields) == config
    assert read.settings["model"]["name"] == "mine" and read.settings["trainer"] == {"max_steps": 7}
    assert read.text == (tmp_path / "7" / "config.yaml").read_text()
    assert list(layout(read)) == list(model.state_dict())
    assert {name: shape for name, (_, shape) in layout(read).items()} == expected_shapes(read.fields)
    require_same(tmp_path / "7", model.state_dict())
    again = load_original(read)
    assert not again.training and again.config == config
    assert (again.decoder.weight is again.model.encoder.weight) is config.tie_word_embeddings
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_what_the_trainer_writes(run: Path, tmp_path: Path, tokenizers: Mapping[int, Path]) -> None:
    assert sorted(place.name for place in run.iterdir()) == [
        "config.yaml", "state_dict.pt", "tokenizer", "tokenizer_info.json",
    ]  # fmt: skip
    tensors = state_dict(run)
    assert tensors["decoder.weight"].data_ptr() == tensors["model.encoder.weight"].data_ptr()
    assert json.loads((run / "tokenizer_info.json").read_text()) == {
        "tokenizer_name": None, "vocab_size": 37, "pad_token_id": 0,
    }  # fmt: skip
    section = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert section["dropout_prob"] == 0.25 and section["max_position_embeddings"] == 12
    assert "dropout" not in section and "max_length" not in section
    known = {field.name for field in dataclass_fields(NeoBERTConfig)} - {"dropout", "max_length"}
    assert known <= set(section)
    write_run(tmp_path / "copies", original(), tokenizer=tokenizers[0], layout="model.safetensors")
    copies = load_file(tmp_path / "copies" / "model.safetensors")
    assert torch.equal(copies["decoder.weight"], copies["model.encoder.weight"])


def test_a_run_without_a_tokenizer(tmp_path: Path) -> None:
    write_run(tmp_path / "7", original(), tokenizer=None)
    refused(tmp_path / "7", "tokenizer: not found", "expected the directory")


def test_a_run_is_not_written_over(run: Path, tokenizers: Mapping[int, Path]) -> None:
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(FileExistsError, match="not empty; expected a new or an empty directory"):
        write_run(run, original(), tokenizer=tokenizers[0])
    assert sorted(run.parent.rglob("*")) == before


@LAYOUTS
def test_a_full_disk_leaves_nothing(tmp_path: Path, tokenizers: Mapping[int, Path], file: Any) -> None:
    with limited_file_size(4000), pytest.raises(OSError, match="7"):
        write_run(tmp_path / "a" / "b" / "7", original(), tokenizer=tokenizers[0], layout=file)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with whole_directory(target) as staging:
        (staging / "file").write_text("content")
        assert not target.exists() and staging.name.endswith(".unfinished") and staging.name.startswith(".target")
    assert [place.name for place in target.parent.iterdir()] == ["target"]
    assert (target / "file").read_text() == "content"


def test_a_directory_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with whole_directory(tmp_path / "link") as staging:
        (staging / "file").write_text("content")
    assert (tmp_path / "target" / "file").exists() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_directory_disappears(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_directory(tmp_path / "new" / "target") as staging:
        (staging / "file").write_text("content")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), whole_directory(tmp_path / "new" / "target") as staging:  # noqa: PT011
        (staging.parent / "other").write_text("")
        raise ValueError
    assert [place.name for place in (tmp_path / "new").iterdir()] == ["other"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = pytest.raises(NotADirectoryError, match="is a file; expected a new or an empty directory")
    with expected, whole_directory(tmp_path / "file"):
        pass
    with pytest.raises(NotADirectoryError), whole_directory(tmp_path / "file" / "below"):
        pass


# Dialects


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes(run: Path, prefix: str) -> None:
    tensors = state_dict(run)
    torch.save({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, run / "state_dict.pt")
    require_same(run, tensors)


def test_a_compiled_layer(run: Path) -> None:
    tensors = state_dict(run)
    renamed = {
        name.replace("encoder.1.", "encoder.1._orig_mod."): tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    assert renamed.keys() != tensors.keys()
    torch.save(renamed, run / "state_dict.pt")
    require_same(run, tensors)


def test_the_same_tensor_with_and_without_a_prefix(run: Path) -> None:
    tensors = state_dict(run)
    one = "model.layer_norm.weight"
    torch.save(tensors | {f"module.{one}": tensors[one]}, run / "state_dict.pt")
    require_same(run, tensors)
    torch.save(tensors | {f"module.{one}": tensors[one] + 1}, run / "state_dict.pt")
    refused(run, one, "with and without a prefix")


@pytest.mark.parametrize("keep", [True, False], ids=["both", "alone"])
def test_the_decoder_below_the_model(run: Path, keep: bool) -> None:
    tensors = state_dict(run)
    spelled = {f"model.{name}" if name.startswith("decoder.") else name: value for name, value in tensors.items()}
    torch.save(spelled | (tensors if keep else {}), run / "state_dict.pt")
    require_same(run, tensors)


@LAYOUTS
def test_packed_swiglu(run: Path, file: str) -> None:
    tensors = state_dict(run)
    packed = {name: tensor for name, tensor in tensors.items() if ".ffn.w1." not in name and ".ffn.w2." not in name}
    for layer in range(2):
        ffn = f"model.transformer_encoder.{layer}.ffn"
        packed[f"{ffn}.w12.weight"] = torch.cat([tensors[f"{ffn}.w1.weight"], tensors[f"{ffn}.w2.weight"]])
    (run / "state_dict.pt").unlink()
    if file == "state_dict.pt":
        torch.save(packed, run / file)
    else:
        save_file({name: tensor.clone() for name, tensor in packed.items()}, run / file)
    require_same(run, tensors)


def test_packed_swiglu_of_another_width(run: Path) -> None:
    tensors = state_dict(run)
    ffn = "model.transformer_encoder.0.ffn"
    packed = {name: tensor for name, tensor in tensors.items() if f"{ffn}.w1" not in name and f"{ffn}.w2" not in name}
    torch.save(packed | {f"{ffn}.w12.weight": torch.ones(40, 16)}, run / "state_dict.pt")
    refused(run, f"{ffn}.w12.weight has shape (40, 16), expected (32, 16)")
    torch.save(tensors | {f"{ffn}.w12.weight": torch.ones(32, 16)}, run / "state_dict.pt")
    refused(run, f"both {ffn}.w1.weight and the packed")


def test_views_and_dtypes(run: Path) -> None:
    tensors = state_dict(run)
    rewrite(run, tie_word_embeddings=False)
    flat = torch.arange(16 * 37 + 5, dtype=torch.float32) / 100
    qkv = "model.transformer_encoder.0.qkv.weight"
    tensors |= {
        "decoder.weight": flat[5:].view(37, 16),
        "decoder.bias": flat[:37],
        "model.transformer_encoder.0.wo.weight": torch.randn(16, 16).T,
        qkv: tensors[qkv].bfloat16(),
        "model.layer_norm.weight": torch.nn.Parameter(tensors["model.layer_norm.weight"].double()),
        "model.transformer_encoder.1.wo.weight": torch.randn(20, 20).half()[2:18, 1:17],
    }
    torch.save(tensors, run / "state_dict.pt")
    require_same(run, tensors)


def test_a_state_dict_with_metadata(run: Path) -> None:
    tensors = original().state_dict()
    assert isinstance(tensors, OrderedDict) and hasattr(tensors, "_metadata")
    torch.save(tensors, run / "state_dict.pt")
    require_same(run, tensors)


def test_a_decoder_without_a_bias(run: Path) -> None:
    tensors = state_dict(run)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "decoder.bias"}, run / "state_dict.pt")
    assert "decoder.bias" not in read_run(run).tensors
    require_same(run, tensors | {"decoder.bias": torch.zeros(37)})
    assert not load_original(read_run(run)).decoder.bias.any()


def test_other_names_and_spellings_in_the_yaml(run: Path) -> None:
    rewrite(run, hidden_act="SwiGLU", dropout=0.5, attn_backend=None, flash_attention=True)
    fields = read_run(run).fields
    assert fields["hidden_act"] == "swiglu" and fields["dropout"] == 0.5
    assert fields["attn_backend"] == "flash_attn_varlen"
    rewrite(run, flash_attention=False)
    assert read_run(run).fields["attn_backend"] == "sdpa"
    text = (run / "config.yaml").read_text().replace("norm_eps: 1.0e-05", "norm_eps: 1e-5")
    (run / "config.yaml").write_text(text)
    assert isinstance(yaml.safe_load(text)["model"]["norm_eps"], str)
    assert read_run(run).fields["norm_eps"] == 1e-5


def test_whether_tensors_are_tied(run: Path) -> None:
    tensors = state_dict(run)
    rewrite(run, tie_word_embeddings=None)
    assert read_run(run).fields["tie_word_embeddings"] is True
    copied = tensors | {"decoder.weight": tensors["decoder.weight"].clone()}
    torch.save(copied, run / "state_dict.pt")
    assert read_run(run).fields["tie_word_embeddings"] is True
    copied["decoder.weight"][36, 15] += 1
    torch.save(copied, run / "state_dict.pt")
    assert read_run(run).fields["tie_word_embeddings"] is False
    require_same(run, copied)
    torch.save(tensors | {"decoder.weight": tensors["decoder.weight"].double()}, run / "state_dict.pt")
    assert read_run(run).fields["tie_word_embeddings"] is False
    rewrite(run, tie_word_embeddings=True)
    refused(run, "differ, but config.yaml has tie_word_embeddings: true; set it to false")
    del tensors["decoder.weight"]
    torch.save(tensors, run / "state_dict.pt")
    bias = {"decoder.bias": tensors.pop("decoder.bias")}
    torch.save(tensors | bias, run / "state_dict.pt")
    require_same(run, tensors | {"decoder.weight": tensors["model.encoder.weight"]} | bias)
    rewrite(run, tie_word_embeddings=False)
    refused(run, "tensors are missing: decoder.weight")


def test_equal_tensors_that_are_declared_untied(run: Path) -> None:
    rewrite(run, tie_word_embeddings=False)
    assert read_run(run).fields["tie_word_embeddings"] is False


def test_no_tokenizer_info(run: Path) -> None:
    (run / "tokenizer_info.json").unlink()
    with pytest.warns(UserWarning, match=r"tokenizer_info\.json: not found"):
        read_run(run)


# What is refused

Edit = Callable[[Path], object]


def model(**entries: Any) -> Edit:
    return lambda run: rewrite(run, **entries)


def text(name: str, content: str) -> Edit:
    return lambda run: (run / name).write_text(content)


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def edit(run: Path) -> None:
        found = {name: tensor.clone() for name, tensor in state_dict(run).items()}
        change(found)
        torch.save(found, run / "state_dict.pt")

    return edit


# Lists of lists, 9 ** 12 numbers in a few lines.
REPEATED = "x0: &x0 1\n" + "".join(f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]\n" for n in range(12))


def hidden_size(written: str, before: str = "") -> Edit:
    def edit(run: Path) -> None:
        settings = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(before + settings.replace("hidden_size: 16", f"hidden_size: {written}"))

    return edit


def remove(name: str) -> Edit:
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


NORM = "model.transformer_encoder.1.ffn_norm.weight"
BAD: Mapping[str, tuple[Edit, str]] = {
    "no config": (remove("config.yaml"), "config.yaml: not found"),
    "no weights": (remove("state_dict.pt"), "holds no weights, expected state_dict.pt or model.safetensors"),
    "DeepSpeed": (
        lambda run: [remove("state_dict.pt")(run), text("latest", "x")(run)],
        "write state_dict.pt with its zero_to_fp32.py first",
    ),
    "two weight files": (text("model.safetensors", ""), "keep the one to be exported"),
    "no tokenizer": (remove("tokenizer"), "tokenizer: not found"),
    "empty yaml": (text("config.yaml", ""), "holds a NoneType, expected sections"),
    "no section": (text("config.yaml", "trainer: {}\n"), "has no section 'model'"),
    "section of another form": (text("config.yaml", "model: [1]\n"), "has no section 'model'"),
    "yaml tag": (
        text("config.yaml", "model: !!python/object/apply:os.system ['touch /tmp/neobert_was_here']\n"),
        "python/object/apply:os.system' in line 1; expected plain values",
    ),
    "not yaml": (text("config.yaml", "model: {\n"), "is not YAML"),
    "deep yaml": (text("config.yaml", "[" * 5000), "is not YAML"),
    "no text": (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\xfa"), "not text in UTF-8"),
    "unhashable key": (text("config.yaml", "? {a: 1}\n: 2\n"), "config.yaml: "),
    "missing keys": (model(rope=None, hidden_act=None), "lacks rope, hidden_act; add"),
    "ngpt": (model(ngpt=True), "nGPT (NormNeoBERT) is another architecture"),
    "relu": (model(hidden_act="relu"), "Unsupported hidden_act 'relu', expected one of swiglu, gelu"),
    "backend": (model(attn_backend="xformers"), "Unsupported attn_backend 'xformers'"),
    "heads": (model(num_attention_heads=3), "hidden_size=16 is not a multiple of num_attention_heads=3"),
    "odd heads": (model(num_attention_heads=16), "RoPE requires an even head dimension"),
    "size as text": (model(hidden_size="16"), "model.hidden_size is '16', expected a whole number"),
    "size as fraction": (model(vocab_size=37.0), "model.vocab_size is '37.0', expected a whole number"),
    "size as flag": (model(num_hidden_layers=True), "expected a whole number"),
    "epsilon": (model(norm_eps=float("nan")), "model.norm_eps is 'nan', expected a number"),
    "endless epsilon": (model(norm_eps=10**400), "model.norm_eps is a number of 1329 bits, expected a number"),
    "endless size": (hidden_size("0x1" + "0" * 5000), "a number of 20001 bits, expected a whole number"),
    "size that repeats itself": (hidden_size("*x12", REPEATED), "model.hidden_size is a list, expected a whole number"),
    "flag as text": (model(rope="yes"), "model.rope is 'yes', expected true or false"),
    "act as number": (model(hidden_act=3), "model.hidden_act is '3', expected a name"),
    "vocabulary": (model(vocab_size=40), "tokenizer_info.json: has vocab_size 37, expected 40"),
    "padding": (model(pad_token_id=2), "tokenizer_info.json: has pad_token_id 0, expected 2"),
    "info is not JSON": (text("tokenizer_info.json", "{"), "tokenizer_info.json: is not JSON"),
    "vocabulary of the tensors": (
        lambda run: [remove("tokenizer_info.json")(run), rewrite(run, vocab_size=40)],
        "model.encoder.weight has shape (37, 16), expected (40, 16)",
    ),
    "fewer layers": (model(num_hidden_layers=1), "tensors are left over: model.transformer_encoder.1.attention_norm"),
    "more layers": (model(num_hidden_layers=3), "tensors are missing: model.transformer_encoder.2.attention_norm"),
    "a billion layers": (model(num_hidden_layers=10**9), "config.yaml has num_hidden_layers=1000000000"),
    "width": (model(intermediate_size=40), "ffn.w1.weight has shape (16, 16), expected (32, 16)"),
    "positions": (model(rope=False), "tensors are missing: model.positional_embedding.weight"),
    "layer norm": (model(rms_norm=False), "tensors are missing: model.transformer_encoder.0.attention_norm.bias"),
    "missing norm": (tensors(lambda found: found.pop(NORM)), f"tensors are missing: {NORM}"),
    "surplus": (tensors(lambda found: found.update(extra=torch.ones(1))), "tensors are left over: extra"),
    "shape": (tensors(lambda found: found.update({NORM: torch.ones(17)})), f"{NORM} has shape (17,), expected (16,)"),
    "transposed": (
        tensors(lambda found: found.update({NORM.replace("ffn_norm", "qkv"): torch.ones(16, 48)})),
        "qkv.weight has shape (16, 48), expected (48, 16)",
    ),
    "integers": (
        tensors(lambda found: found.update({NORM: torch.ones(16, dtype=torch.int64)})),
        f"{NORM} is torch.int64, expected one of torch.float64",
    ),
    "not a number": (
        tensors(lambda found: found[NORM].__setitem__(3, float("nan"))),
        f"{NORM} contains NaN or infinite values",
    ),
    "infinite": (
        tensors(lambda found: found["model.encoder.weight"].__setitem__((36, 15), -float("inf"))),
        "model.encoder.weight contains NaN or infinite values",
    ),
    "not a number in a view": (
        tensors(lambda found: found.update({NORM: torch.full((16, 2), float("nan"))[:, 0]})),
        f"{NORM} contains NaN",
    ),
    "repeated numbers": (
        tensors(lambda found: found.update({NORM: torch.ones(1).expand(16)})),
        f"{NORM} is larger than its data",
    ),
    "a list": (lambda run: torch.save([torch.ones(1)], run / "state_dict.pt"), "holds a list"),
    "empty": (lambda run: torch.save({}, run / "state_dict.pt"), "holds an empty dictionary"),
    "nested": (lambda run: torch.save({"model": state_dict(run)}, run / "state_dict.pt"), "model is a dict"),
    "no archive": (text("state_dict.pt", "hello"), "is not a zip archive"),
    "other archive": (
        lambda run: zipfile.ZipFile(run / "state_dict.pt", "w").writestr("a/b", "c"),
        "is a zip archive without data.pkl",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run: Path, case: str) -> None:
    edit, message = BAD[case]
    edit(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(run, message)
    assert not Path("/tmp/neobert_was_here").exists()


def test_huge_yaml(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LONGEST_YAML", 100)
    refused(run, "config.yaml: is longer than 100 bytes")


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: not found; expected a checkpoint directory")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; expected a checkpoint directory")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.98])
@LAYOUTS
def test_truncated(tmp_path: Path, tokenizers: Mapping[int, Path], file: Any, share: float) -> None:
    write_run(tmp_path / "7", original(), tokenizer=tokenizers[0], layout=file)
    path = tmp_path / "7" / file
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(tmp_path / "7", f"{file}: is ")


def test_a_flipped_bit(run: Path) -> None:
    content = bytearray((run / "state_dict.pt").read_bytes())
    numbers = state_dict(run)["model.transformer_encoder.0.qkv.weight"].numpy().tobytes()
    content[content.index(numbers) + 100] ^= 1
    (run / "state_dict.pt").write_bytes(content)
    refused(run, "model.transformer_encoder.0.qkv.weight does not have the checksum it was written with")


def test_a_flipped_bit_under_views(run: Path) -> None:
    tensors = state_dict(run)
    one, other = (f"model.transformer_encoder.{layer}.wo.weight" for layer in range(2))
    both = torch.randn(32, 16)
    torch.save(tensors | {one: both[:16], other: both[16:]}, run / "state_dict.pt")
    content = bytearray((run / "state_dict.pt").read_bytes())
    content[content.index(both.numpy().tobytes()) + 1000] ^= 1
    (run / "state_dict.pt").write_bytes(content)
    refused(run, "a storage does not have the checksum it was written with")


class Hostile:
    """Would make a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_a_hostile_pickle(run: Path) -> None:
    torch.save(state_dict(run) | {"extra": Hostile(run / "hostile")}, run / "state_dict.pt")
    refused(run, "its pickle would run code or make an object (posix.mkdir); expected only tensors")
    assert not (run / "hostile").exists()


def replaced_pickle(run: Path, content: bytes) -> None:
    with zipfile.ZipFile(run / "state_dict.pt", "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", b"\0" * 64)
        archive.writestr("archive/version", "3\n")


def described(start: int, shape: tuple[int, ...], stride: tuple[int, ...], *, key: str = "0") -> bytes:
    """A pickle of {"a": tensor}."""
    numbers = b"".join(b"(" + b"".join(pickle.dumps(n, 2)[2:-1] for n in part) + b"t" for part in (shape, stride))
    name = key.encode()
    storage = (
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX" + struct.pack("<I", len(name)) + name + b"X\x03\0\0\0cpuK\x10tQ"
    )
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + pickle.dumps(start, 2)[2:-1] + numbers
    return b"\x80\x02}X\x01\0\0\0a" + rebuild + b"\x89ccollections\nOrderedDict\n)RtRs."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "is damaged or truncated"),
        (b"\x80\x02r" + struct.pack("<I", 1 << 31) + b".", "is damaged or truncated"),
        (b"", "is damaged or truncated"),
        (b"\x80\x02}X\x01\0\0\0aK\x01s.", "a is a int, expected a tensor"),
        (described(0, (17,), (1,)), "a is larger than its data"),
        (described(16, (1,), (1,)), "a is larger than its data"),
        (described(0, (1 << 40, 4), (0, 1)), "a is larger than its data"),
        (described(0, (-4,), (1,)), "described in an unknown way"),
        (described(0, (2, 2), (1,)), "described in an unknown way"),
        (described(0, (16,), (1,), key="../0"), "has no data for a"),
        (described(0, (16,), (1,)), "tensors are missing"),
    ],
    ids=["bytearray", "memo", "nothing", "number", "large", "late", "repeated", "negative", "axes", "key", "sound"],
)
def test_hostile_descriptions(run: Path, content: bytes, message: str) -> None:
    rewrite(run, num_hidden_layers=1)
    replaced_pickle(run, content)
    refused(run, message)


def test_a_packed_archive(run: Path) -> None:
    with zipfile.ZipFile(run / "state_dict.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(run / "state_dict.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refused(run, "state_dict.pt: ")


def header(**entries: Any) -> bytes:
    content = json.dumps(entries).encode()
    return len(content).to_bytes(8, "little") + content + b"\0" * 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the header"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "expected the header"),
        (b"\x02\0\0\0\0\0\0\0[]", "its header is not an object"),
        (b"\x02\0\0\0\0\0\0\0{]", "its header is not JSON"),
        (b"\x89\x13\0\0\0\0\0\0" + b"[" * 5001, "its header is not JSON"),
        (header(a={"dtype": "F32", "shape": [16]}), "a has no place in it"),
        (header(a=3), "a has no place in it"),
        (header(a={"dtype": "F32", "shape": [17], "data_offsets": [0, 68]}), "a has no place in it"),
        (header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}), "a has no place in it"),
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}), "a has no place in it"),
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}), "does not fill its 4 bytes"),
        (header(a={"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}), "a is of type F8_E4M3"),
    ],
    ids=[
        "empty",
        "long",
        "list",
        "no JSON",
        "deep",
        "lacking",
        "number",
        "beyond",
        "negative",
        "back",
        "short",
        "type",
    ],
)
def test_hostile_safetensors(run: Path, content: bytes, message: str) -> None:
    (run / "state_dict.pt").unlink()
    (run / "model.safetensors").write_bytes(content)
    refused(run, "model.safetensors: ", message)


def test_a_file_that_is_written_anew(run: Path) -> None:
    read = read_run(run)
    torch.save(state_dict(run), run / "new")
    os.replace(run / "new", run / "state_dict.pt")
    with pytest.raises(CheckpointError, match="was written anew while it was read"):
        read_weight(read, "model.layer_norm.weight")


# The writer of tensors


def test_written_tensors(tmp_path: Path) -> None:
    given = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(4, 3).double().T,
        "d": torch.tensor(2.0).half(),
        "e": torch.zeros(0, 3),
        "f": torch.randn(3),
    }
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    files = {"x.safetensors": safetensors_file, "x.bin": torch_file}
    for name, writer in files.items():
        with writer(tmp_path / name, kinds) as write:
            for key in reversed(given):
                write(key, given[key])
    expected = load_file(tmp_path / "x.safetensors")
    assert zipfile.ZipFile(tmp_path / "x.bin").testzip() is None
    for found in (
        expected,
        torch.load(tmp_path / "x.bin", weights_only=True),
        torch.load(tmp_path / "x.bin", weights_only=True, mmap=True),
        {name: read_tensor(open_tensors(tmp_path / "x.bin"), name) for name in given},
        {name: read_tensor(open_tensors(tmp_path / "x.safetensors"), name) for name in given},
    ):
        assert set(found) == set(given)
        for name, tensor in given.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert list(torch.load(tmp_path / "x.bin", weights_only=True)) == list(given)


def test_tensors_in_the_file_of_torch_are_aligned(tmp_path: Path) -> None:
    with torch_file(tmp_path / "x.bin", {name: (torch.float32, (n,)) for name, n in (("a", 1), ("b", 33))}) as write:
        write("a", torch.ones(1))
        write("b", torch.ones(33))
    for stored in open_tensors(tmp_path / "x.bin").tensors.values():
        assert stored.storage.offset % 64 == 0
