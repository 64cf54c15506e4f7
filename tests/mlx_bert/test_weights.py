# SPDX-License-Identifier: Apache-2.0
"""Every layout gives each parameter exactly the numbers of its tensor, and nothing else is taken for weights."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
torch = pytest.importorskip("torch")

from safetensors.numpy import save as numpy_bytes  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_models.mlx_bert import weights  # noqa: E402
from reference_models.mlx_bert.names import original, parameter_shapes  # noqa: E402
from reference_models.mlx_bert.weights import WeightsError, read, read_checkpoint, read_file, write  # noqa: E402

pytestmark = pytest.mark.mlx

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
    "pooler_hidden_size": None,
    "quantization": None,
}
QUANTISATION = {"bits": 4, "group_size": 32}

Tensors = dict[str, Any]


def sizes(**changes: Any) -> Any:
    fields = SIZES | changes
    return SimpleNamespace(**fields, to_hf_config=lambda: {"model_type": fields["model_type"], "extra": [1]})


def tensors_of(dtype: Any = torch.float32, **changes: Any) -> Tensors:
    """Every parameter with numbers of its own, as torch's tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(sizes(**changes))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def numbers(tensor: Any) -> Any:
    """What a tensor of torch or MLX holds, as numpy's float64."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().double().numpy()
    if tensor.dtype == mx.bfloat16:  # every bfloat16 is a float32
        tensor = tensor.astype(mx.float32)
    return np.asarray(tensor).astype(np.float64)


def assert_equal(read: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert str(read[name].dtype).rpartition(".")[2] == str(tensor.dtype).rpartition(".")[2], name
        np.testing.assert_array_equal(numbers(read[name]), numbers(tensor), err_msg=name)


def renamed(tensors: Tensors, *replacements: tuple[str, str], prefix: str = "") -> Tensors:
    made = {}
    for name, tensor in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        made[prefix + name] = tensor
    return made


EXAMPLES = [
    (".layer.", ".layers."),
    (".self.key.", ".key_proj."),
    (".self.query.", ".query_proj."),
    (".self.value.", ".value_proj."),
    (".attention.output.dense.", ".attention.out_proj."),
    (".attention.output.LayerNorm.", ".ln1."),
    (".output.LayerNorm.", ".ln2."),
    (".intermediate.dense.", ".linear1."),
    (".output.dense.", ".linear2."),
    (".LayerNorm.", ".norm."),
    ("pooler.dense.", "pooler."),
]


def one_file(name: str = "model.safetensors") -> Callable[[Path, Tensors], None]:
    def put(directory: Path, tensors: Tensors) -> None:
        if name.endswith(".safetensors"):
            save_file(tensors, directory / name)
        elif name.endswith(".npz"):
            np.savez(directory / name, **{key: tensor.numpy() for key, tensor in tensors.items()})
        else:
            torch.save(tensors, directory / name)

    return put


def shards(directory: Path, tensors: Tensors, *, suffix: str = "safetensors") -> dict[str, Any]:
    """The tensors in two files, every other one in each; returns what the index says."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for number, file in enumerate(files):
        one_file(file)(directory, dict(list(tensors.items())[number::2]))
    index = {"metadata": {}, "weight_map": {name: files[number % 2] for number, name in enumerate(tensors)}}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return index


def old_torch_file(directory: Path, tensors: Tensors) -> None:
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


LAYOUTS: dict[str, tuple[Callable[[Path, Tensors], Any], Callable[[Tensors], Tensors]]] = {
    "safetensors": (one_file(), dict),
    "sharded": (shards, dict),
    "pytorch_model.safetensors": (one_file("pytorch_model.safetensors"), dict),
    "weights.npz": (one_file("weights.npz"), dict),
    "mlx-examples": (one_file("bert-base-uncased.npz"), lambda tensors: renamed(tensors, *EXAMPLES)),
    "playground": (one_file(), lambda tensors: renamed(tensors, ("encoder.layer.", "encoder_layers."))),
    "tensorflow": (
        one_file(),
        lambda tensors: renamed(tensors, ("Norm.weight", "Norm.gamma"), ("Norm.bias", "Norm.beta")),
    ),
    "task": (
        one_file(),
        lambda tensors: renamed(tensors, prefix="bert.") | {"classifier.weight": torch.ones(3, 32)},
    ),
    "buffers": (
        one_file(),
        lambda tensors: (
            tensors
            | {"embeddings.position_ids": torch.arange(7)[None], "embeddings.token_type_ids": torch.zeros(1, 7).long()}
        ),
    ),
    "bin": (one_file("pytorch_model.bin"), dict),
    "model.bin": (one_file("model.bin"), dict),
    "old bin": (old_torch_file, dict),
    "sharded bin": (lambda directory, tensors: shards(directory, tensors, suffix="bin"), dict),
}


@pytest.mark.filterwarnings("ignore:.*is a pickle of torch's")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_each_parameter_its_numbers(layout: str, tmp_path: Path) -> None:
    put, name = LAYOUTS[layout]
    tensors = tensors_of()
    put(tmp_path, name(tensors))
    checkpoint = read_checkpoint(tmp_path, sizes())
    assert_equal(checkpoint.tensors, tensors)
    assert (checkpoint.missing, checkpoint.unexpected) == ((), ())
    assert list(checkpoint.head) == (["classifier.weight"] if layout == "task" else [])
    assert_equal(read(tmp_path, sizes()), tensors)


@pytest.mark.filterwarnings("ignore:.*is a pickle of torch's")
@pytest.mark.parametrize("layout", ["safetensors", "weights.npz", "bin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_of_the_file_stays(layout: str, dtype: Any, tmp_path: Path) -> None:
    tensors = tensors_of(dtype)
    if layout == "weights.npz":
        arrays = {name: mx.array(tensor.float().numpy()) for name, tensor in tensors.items()}
        kind = {torch.float64: mx.float64, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[dtype]
        mx.savez(str(tmp_path / layout), **{name: array.astype(kind, stream=mx.cpu) for name, array in arrays.items()})
    else:
        LAYOUTS[layout][0](tmp_path, tensors)
    assert_equal(read(tmp_path, sizes()), tensors)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_what_transformers_saves_of_the_other_models_is_read_and_what_is_written_it_loads(
    model_type: str, tmp_path: Path
) -> None:
    from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

    torch.manual_seed(0)
    model: Any
    if model_type == "roberta":
        model = RobertaModel(
            RobertaConfig(
                vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                max_position_embeddings=7, type_vocab_size=2,
            )
        )  # fmt: skip
    else:
        model = DistilBertModel(
            DistilBertConfig(
                vocab_size=11, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=7
            )
        )  # fmt: skip
    model.save_pretrained(tmp_path / "theirs")
    found = read(tmp_path / "theirs", sizes(model_type=model_type))
    theirs = dict(model.named_parameters())
    assert_equal({original(name, model_type): tensor for name, tensor in found.items()}, theirs)
    write(tmp_path / "ours", found, sizes(model_type=model_type))
    model.config.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in again.named_parameters():
        assert torch.equal(tensor, theirs[name]), name


def test_the_first_of_several_files_is_read(tmp_path: Path) -> None:
    tensors = tensors_of()
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    one_file("pytorch_model.bin")(tmp_path, other)
    one_file("weights.npz")(tmp_path, tensors)
    assert_equal(read(tmp_path, sizes()), tensors)
    shards(tmp_path, other)
    assert_equal(read(tmp_path, sizes()), other)
    one_file()(tmp_path, tensors)
    assert_equal(read(tmp_path, sizes()), tensors)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_a_torch_file_is_read_with_a_warning(name: str, tmp_path: Path) -> None:
    one_file(name)(tmp_path, tensors_of())
    with pytest.warns(UserWarning, match=rf"{name}: is a pickle of torch's.*weights_only=True.*model.safetensors"):
        read(tmp_path, sizes())


def test_a_lone_tensor_that_lacks_or_is_left_over_is_named(tmp_path: Path) -> None:
    tensors = tensors_of()
    lost = [name for name in tensors if name.startswith("encoder.layer.1.attention.self") and name.endswith("bias")]
    for name in lost:
        del tensors[name]
    save_file(tensors | {"encoder.layer.2.output.dense.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as raised:
        read(tmp_path, sizes())
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/model.safetensors: lacks {', '.join(lost)}; has and the model has not enc")
    assert "encoder.layer.2.output.dense.bias" in text and len(text.splitlines()) == 1
    assert raised.value.missing == tuple(lost)
    assert raised.value.unexpected == ("encoder.layer.2.output.dense.bias",)
    checkpoint = read_checkpoint(tmp_path, sizes())
    assert_equal(checkpoint.tensors, tensors)
    assert (checkpoint.missing, checkpoint.unexpected) == (raised.value.missing, raised.value.unexpected)


def test_the_older_files_of_bert_playground_lack_biases_and_are_refused_by_their_names(tmp_path: Path) -> None:
    short = [(old, new) for old, new in EXAMPLES if ".layer" not in old and old not in (".LayerNorm.", "pooler.dense.")]
    tensors = renamed(tensors_of(), *short)
    old = {
        key.replace("encoder.layer.0", "encoder_layers.0.transformer_layer").replace(
            "encoder.layer.1", "encoder_layers.1.transformer_layer"
        ): tensor
        for key, tensor in tensors.items()
        if not key.endswith("_proj.bias")
    }
    save_file(
        old | {"embeddings.position_ids": torch.arange(7, dtype=torch.int32)[None]}, tmp_path / "model.safetensors"
    )
    with pytest.raises(WeightsError) as raised:
        read(tmp_path, sizes())
    assert raised.value.unexpected == ()
    assert len(raised.value.missing) == 8
    assert "encoder.layer.0.attention.self.query.bias" in str(raised.value)


def test_a_model_without_a_pooler_is_read_where_that_will_do(tmp_path: Path) -> None:
    tensors = tensors_of()
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(renamed(encoder, prefix="bert."), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks pooler.dense.weight, pooler.dense.bias; expected"):
        read(tmp_path, sizes())
    assert_equal(read(tmp_path, sizes(), allow_missing_pooler=True), encoder)
    half = encoder | {"pooler.dense.bias": tensors["pooler.dense.bias"]}
    save_file(half, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks pooler.dense.weight; expected"):
        read(tmp_path, sizes(), allow_missing_pooler=True)


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (torch.ones(12, 32), "has shape (12, 32), expected (11, 32)"),
        (torch.ones(32, 11), "has shape (32, 11), expected (11, 32)"),
        (torch.ones(11 * 32), "has shape (352,), expected (11, 32)"),
        (torch.ones(11, 32, dtype=torch.int32), "is of type I32, expected F64 or F32 or F16 or BF16"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is a pickle of torch's")
@pytest.mark.parametrize("file", ["model.safetensors", "weights.npz", "model.bin"])
def test_a_tensor_of_another_shape_or_type_is_refused(file: str, tensor: Any, fault: str, tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    one_file(file)(tmp_path, renamed(tensors_of() | {name: tensor}, prefix="bert."))
    with pytest.raises(WeightsError) as raised:
        read(tmp_path, sizes())
    assert str(raised.value) == f"{tmp_path / file}: bert.{name} {fault}"


def test_a_type_that_no_weights_have_is_refused(tmp_path: Path) -> None:
    save_file(tensors_of() | {NAME: torch.ones(32, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"pooler.dense.bias is of type F8_E4M3, expected F64 or F32 or F16 or BF16"):
        read(tmp_path, sizes())


def test_tensors_of_another_model_type_are_refused(tmp_path: Path) -> None:
    tensors = {original(name, "distilbert"): t for name, t in tensors_of(model_type="distilbert").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="names of a distilbert model, expected those of a bert model"):
        read(tmp_path, sizes())


@pytest.mark.parametrize(
    ("name", "buffer", "fault"),
    [
        ("position_ids", torch.arange(1, 8)[None], "position_ids has numbers of its own; expected 0, 1, 2 and so on"),
        ("position_ids", torch.arange(8)[None], r"position_ids has shape \(1, 8\), expected 7 positions"),
        ("token_type_ids", torch.ones(1, 7), "token_type_ids has numbers of its own; expected zeros"),
    ],
)
def test_buffers_that_are_not_berts_are_not_dropped(name: str, buffer: Any, fault: str, tmp_path: Path) -> None:
    save_file(tensors_of() | {f"embeddings.{name}": buffer}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=fault):
        read(tmp_path, sizes())


def test_a_place_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"/absent: is not there; expected a directory with model.safetensors"):
        read(tmp_path / "absent", sizes())
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"/file: is a file; expected a directory"):
        read(tmp_path / "file", sizes())
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"/empty: holds nothing; expected one of model.safetensors, "):
        read(tmp_path / "empty", sizes())
    (tmp_path / "empty" / "flax_model.msgpack").write_text("")
    with pytest.raises(WeightsError, match=r"/empty: holds only flax_model.msgpack; expected one of"):
        read(tmp_path / "empty", sizes())
    for name in ("a", "b"):
        one_file(f"{name}.npz")(tmp_path / "empty", {})
    with pytest.raises(WeightsError, match=r"/empty: has a.npz, b.npz; expected one of them"):
        read(tmp_path / "empty", sizes())


def edited(header: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The same file with its header changed."""

    def edit(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + length])
        changed = header(found)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or found).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return edit


NAME = "pooler.dense.bias"


def moved(header: dict[str, Any]) -> None:
    header[NAME]["data_offsets"] = [begin + 4 for begin in header[NAME]["data_offsets"]]


def doubled(header: dict[str, Any]) -> bytes:
    return json.dumps(header)[:-1].encode() + b', "' + NAME.encode() + b'": {}}'


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "expected the header of a safetensors file"),
    "short": (lambda content: content[:5], "expected the header of a safetensors file"),
    "long header": (lambda content: b"\xff" * 7 + b"\x7f" + content[8:], "expected the header of a safetensors file"),
    "truncated": (lambda content: content[:-1], "is truncated"),
    "appended": (lambda content: content + b"more", "is damaged: its tensors end at byte"),
    "no json": (edited(lambda header: b"{..."), "its header is not JSON"),
    "deep json": (edited(lambda header: b"[" * 100_000), "its header is not JSON"),
    "not utf-8": (edited(lambda header: b'"\xff"'), "its header is not JSON"),
    "list": (edited(lambda header: [1]), "its header is not an object"),
    "twice": (edited(doubled), "it has a name twice"),
    "overlap": (edited(moved), "does not begin where the tensor before it ends"),
    "negative": (
        edited(lambda header: header[NAME].update(data_offsets=[-4, 124])),
        "pooler.dense.bias has no dtype, shape and data_offsets",
    ),
    "no numbers": (
        edited(lambda header: header[NAME].update(shape=["32"])),
        "pooler.dense.bias has no dtype, shape and data_offsets",
    ),
    "no entry": (edited(lambda header: header.update({NAME: 3})), "pooler.dense.bias has no dtype, shape and"),
    "no dtype": (edited(lambda header: header[NAME].update(dtype=[1])), r"pooler.dense.bias is of type \[1\]"),
    "huge": (
        edited(lambda header: header[NAME].update(shape=[1 << 40, 1 << 40])),
        "pooler.dense.bias of shape .* is not its 128 bytes",
    ),
    "a line's end": (edited(lambda header: header.update({"a\nb": 3})), r"'a\\nb' has no dtype"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_safetensors_file_is_refused_before_it_is_read(damage: str, tmp_path: Path) -> None:
    change, fault = DAMAGES[damage]
    save_file(tensors_of(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightsError, match=fault) as raised:
        read(tmp_path, sizes())
    assert str(raised.value).startswith(f"{path}: ") and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "x.bin", "", 3, None])
def test_a_shard_outside_the_directory_is_refused(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    index = shards(tmp_path / "model", tensors_of())
    save_file({NAME: torch.ones(32)}, tmp_path / "x.safetensors")
    index["weight_map"][NAME] = name
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        WeightsError, match=r"index.json: pooler.dense.bias is in .*; expected the name of a .safetensor"
    ):
        read(tmp_path / "model", sizes())


def test_a_shard_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path, tensors_of())
    first, second = (tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors: lacks embeddings.word_embeddings.weight, "):
        read(tmp_path, sizes())
    first.write_bytes(content[:-4])
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors: is truncated"):
        read(tmp_path, sizes())
    first.unlink()
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors: is not there; model.safetensors.index.json"):
        read(tmp_path, sizes())
    first.write_bytes(content)
    index["weight_map"]["classifier.bias"] = first.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"00001-of-00002.safetensors: lacks classifier.bias; expected exactly"):
        read(tmp_path, sizes())
    del index["weight_map"]["classifier.bias"], index["weight_map"]["embeddings.word_embeddings.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        WeightsError, match=r"00001-of-00002.safetensors: has embeddings.word_embeddings.weight; expect"
    ):
        read(tmp_path, sizes())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index.json: "):
        read(tmp_path, sizes())


class Hostile:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def pickled(path: Path) -> bytes:
    return pickle.dumps({NAME: Hostile(path)}, protocol=2)


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    return stream.getvalue()


def archived(values: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{NAME: values})
    return stream.getvalue()


def lying(shape: str) -> bytes:
    """An .npz whose array says another shape than it has."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        archive.writestr(f"{NAME}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(128))
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:.*is a pickle of torch's")
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pytorch_model.bin", pickled),
        ("pytorch_model.bin", lambda path: zipped(pickled(path))),
        ("pytorch_model.bin", lambda path: b""),
        ("pytorch_model.bin", lambda path: b"\x80\x02text"),
        ("pytorch_model.bin", lambda path: zipped(b"(" * 1000)),
        ("weights.npz", lambda path: archived(np.array([Hostile(path)], dtype=object))),
        ("weights.npz", lambda path: archived(np.array(["text"]))),
        ("weights.npz", lambda path: archived(np.ones(32, dtype=">f4"))),
        ("weights.npz", lambda path: b"PK\3\4"),
        ("weights.npz", lambda path: zipped(b"")),
        ("weights.npz", lambda path: lying("(1 << 40,)")),
    ],
)
def test_a_hostile_file_runs_nothing_and_is_refused_in_one_line(
    file: str, content: Callable[[Path], bytes], tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content(tmp_path / "made"))
    with pytest.raises(WeightsError) as raised:
        read(tmp_path, sizes())
    assert str(raised.value).startswith(f"{tmp_path / file}: ") and len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_arrays_are_read_whatever_the_order_of_their_numbers_and_packed_or_not(tmp_path: Path) -> None:
    tensors = tensors_of()
    columns = {name: np.asfortranarray(tensor.numpy()) for name, tensor in tensors.items()}
    np.savez_compressed(tmp_path / "model.npz", **columns)
    assert_equal(read(tmp_path, sizes()), tensors)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    one_file("weights.npz")(tmp_path, tensors_of())
    with zipfile.ZipFile(tmp_path / "weights.npz", "a") as archive:
        archive.writestr(f"{NAME}.npy", b"")
    with pytest.raises(WeightsError, match=r"has pooler.dense.bias.npy twice"):
        read(tmp_path, sizes())


@pytest.mark.parametrize("shape", [(1 << 40,), (31,), (-32,), (-4, -8)])
def test_an_array_that_is_not_the_bytes_it_has_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(lying(str(shape)))
    with pytest.raises(WeightsError, match=r"is damaged: pooler.dense.bias of shape \(.*\) is not its bytes"):
        read(tmp_path, sizes())


@pytest.mark.filterwarnings("ignore:.*is a pickle of torch's")
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([torch.ones(2)], "holds a list, expected a dictionary of tensors"),
        ({"epoch": 3}, "epoch is a int, expected a tensor"),
        ({"state_dict": {NAME: torch.ones(32)}}, "state_dict is a dict, expected a tensor"),
        ({NAME: torch.ones(32).to_sparse()}, "pooler.dense.bias is of type torch.float32"),
        ({"classifier.weight": torch.ones(1).expand(1 << 40)}, "classifier.weight is larger than its data"),
        ({NAME: torch.ones(32, dtype=torch.complex64)}, "pooler.dense.bias is of type torch.complex64"),
    ],
)
def test_a_torch_file_with_other_things_is_refused(content: Any, fault: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(WeightsError, match=fault):
        read(tmp_path, sizes())


def test_without_torch_a_torch_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_file("model.bin")(tmp_path, tensors_of())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"model.bin: torch reads this file .*; run: pip install torch"):
        read(tmp_path, sizes())


def arrays(dtype: Any = None, **changes: Any) -> dict[str, Any]:
    made = {name: mx.array(tensor.numpy()) for name, tensor in tensors_of(**changes).items()}
    return {name: array.astype(dtype or mx.float32, stream=mx.cpu) for name, array in made.items()}


@pytest.mark.parametrize("dtype", [mx.float64, mx.float32, mx.float16, mx.bfloat16])
def test_what_is_written_is_what_is_read_by_this_and_by_the_library(dtype: Any, tmp_path: Path) -> None:
    tensors = arrays(dtype)
    tensors["pooler.dense.weight"] = tensors["pooler.dense.weight"].T  # not in the order of its memory
    directory = write(tmp_path / "new" / "place", tensors, sizes())
    assert_equal(read(directory, sizes()), tensors)
    assert_equal(load_file(directory / "model.safetensors"), tensors)
    assert json.loads((directory / "config.json").read_text()) == {"model_type": "bert", "extra": [1]}
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_a_head_is_written_beside_the_body_and_told_apart(model_type: str, tmp_path: Path) -> None:
    config = sizes(model_type=model_type)
    tensors = {name: mx.array(tensor.numpy()) for name, tensor in tensors_of(model_type=model_type).items()}
    head = {"classifier.weight": mx.ones((3, 32)), "head.temperature": mx.array([2.0])}
    write(tmp_path, tensors, config, head=head)
    keys = load_file(tmp_path / "model.safetensors")
    assert set(keys) == {f"{model_type}.{original(name, model_type)}" for name in tensors} | set(head)
    checkpoint = read_checkpoint(tmp_path, config)
    assert (checkpoint.missing, checkpoint.unexpected) == ((), ())
    assert_equal(checkpoint.tensors, tensors)
    assert_equal(checkpoint.head, head)


def test_a_model_without_a_pooler_is_written_without_one(tmp_path: Path) -> None:
    tensors = {name: array for name, array in arrays().items() if not name.startswith("pooler.")}
    write(tmp_path, tensors, sizes())
    assert_equal(read(tmp_path, sizes(), allow_missing_pooler=True), tensors)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensors: tensors.pop("embeddings.LayerNorm.bias"), "lacks embeddings.LayerNorm.bias"),
        (lambda tensors: tensors.update(more=mx.ones(3)), "has and the model has not more"),
        (lambda tensors: tensors.update({NAME: mx.ones(3)}), r"pooler.dense.bias has shape \(3,\), expected \(32,\)"),
        (lambda tensors: tensors.update({NAME: mx.ones(32, dtype=mx.int32)}), "pooler.dense.bias is of type"),
        (lambda tensors: tensors.update({NAME: mx.ones(32, dtype=mx.uint32)}), "pooler.dense.bias is of type U32"),
    ],
)
def test_what_could_not_be_read_is_not_written(change: Callable[[Any], Any], fault: str, tmp_path: Path) -> None:
    tensors = arrays()
    change(tensors)
    with pytest.raises(WeightsError, match=fault):
        write(tmp_path, tensors, sizes())
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = arrays()
    write(tmp_path, tensors, sizes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    changed = {name: array + 1 for name, array in tensors.items()}
    config = SimpleNamespace(**vars(sizes()) | {"to_hf_config": lambda: {"model_type": "bert", "extra": [2]}})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, changed, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    config.to_hf_config = lambda: {"not json": {1, 2}}
    with pytest.raises(TypeError, match="not JSON"):
        write(tmp_path, changed, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_is_written_over_the_file_that_it_comes_from(tmp_path: Path) -> None:
    tensors = arrays()
    write(tmp_path, tensors, sizes())
    write(tmp_path, read(tmp_path, sizes()), sizes())
    assert_equal(read(tmp_path, sizes()), tensors)


def test_a_file_of_any_tensors_is_written_and_read(tmp_path: Path) -> None:
    tensors = {"scale": mx.array(2.5), "none": mx.zeros((0, 3)), "words": mx.ones((2, 3), dtype=mx.uint32)}
    weights.write_file(tmp_path / "head" / "model.safetensors", tensors)
    assert_equal(read_file(tmp_path / "head" / "model.safetensors"), tensors)
    assert set(load_file(tmp_path / "head" / "model.safetensors")) == set(tensors)
    with pytest.raises(WeightsError, match=r"absent.safetensors: cannot be read: No such file"):
        read_file(tmp_path / "absent.safetensors")


def quantised(tensors: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = dict(tensors)
    for name, array in tensors.items():
        if array.ndim == 2:
            path = name.removesuffix(".weight")
            made[name], made[f"{path}.scales"], made[f"{path}.biases"] = mx.quantize(array, **QUANTISATION | changes)
    return made


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 32), (5, 32), (6, 32), (8, 32), (4, 64)])
def test_quantised_weights_are_written_and_read(model_type: str, bits: int, group_size: int, tmp_path: Path) -> None:
    given = {"bits": bits, "group_size": group_size}
    config = sizes(model_type=model_type, hidden_size=64, quantization=given)
    tensors = quantised(arrays(model_type=model_type, hidden_size=64), **given)
    write(tmp_path, tensors, config)
    assert_equal(read(tmp_path, config), tensors)
    assert_equal(
        mx.load(str(tmp_path / "model.safetensors")),
        {original(name, model_type): array for name, array in tensors.items()},
    )


def test_a_quantised_task_model_of_mlx_embeddings_is_read(tmp_path: Path) -> None:
    tensors = quantised(arrays())
    files = {f"bert.{name}": array for name, array in tensors.items()} | {"classifier.weight": mx.ones((2, 32))}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), files)
    checkpoint = read_checkpoint(tmp_path, sizes(quantization=QUANTISATION | {"mode": "affine"}))
    weights.require(checkpoint)
    assert_equal(checkpoint.tensors, tensors)
    assert list(checkpoint.head) == ["classifier.weight"]


def test_what_config_json_says_of_quantisation_has_to_be_so(tmp_path: Path) -> None:
    tensors = quantised(arrays())
    write(tmp_path / "q", tensors, sizes(quantization=QUANTISATION))
    write(tmp_path / "f", arrays(), sizes())
    with pytest.raises(WeightsError, match=r"_embeddings.scales is quantised, and config.json has no quantization"):
        read(tmp_path / "q", sizes())
    with pytest.raises(WeightsError, match=r"no tensor is quantised, and config.json says quantization \{'bits': 4"):
        read(tmp_path / "f", sizes(quantization=QUANTISATION))
    with pytest.raises(WeightsError, match=r"embeddings.weight has shape \(\d+, 4\), expected \(\d+, 8\)"):
        read(tmp_path / "q", sizes(quantization=QUANTISATION | {"bits": 8}))
    with pytest.raises(WeightsError, match="quantization is of mode 'mxfp4'; expected 'affine'"):
        read(tmp_path / "q", sizes(quantization=QUANTISATION | {"mode": "mxfp4"}))
    name = "encoder.layer.0.output.dense.biases"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {key: t for key, t in tensors.items() if key != name})
    with pytest.raises(WeightsError, match=f"lacks {name}; expected"):
        read(tmp_path, sizes(quantization=QUANTISATION))


def test_loading_needs_little_more_memory_than_the_file_has(tmp_path: Path) -> None:
    # 110 MB, so that what the interpreter needs counts little beside it: its own part is taken off.
    big = {"vocab_size": 30_522, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    content = numpy_bytes({name: np.ones(shape, "f4") for name, shape in parameter_shapes(sizes(**big)).items()})
    (tmp_path / "model.safetensors").write_bytes(content)
    source = f"""
import sys
from types import SimpleNamespace
import mlx.core as mx
from reference_models.mlx_bert.weights import read

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
tensors = read({str(tmp_path)!r}, SimpleNamespace(**{SIZES | big!r}))
mx.eval(tensors)
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc, to ask after the most memory that a process had")
    done = subprocess.run(
        [sys.executable, "-c", source], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.1 * len(content)
