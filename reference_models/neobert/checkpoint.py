# SPDX-License-Identifier: Apache-2.0
"""NeoBERT's own checkpoint directories: read in each of their dialects, written as the trainer leaves them.

A directory `<run>/model_checkpoints/<step>` holds state_dict.pt (from 29c5ce2 on model.safetensors), config.yaml,
tokenizer_info.json and tokenizer/, see pszemraj/NeoBERT at 3c73efd88ceaf2ed726f25eb2877a754fa867891.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from reference_models.nanogpt.checkpoint import CheckpointError, listed, own_storage, write_whole

from .original import NeoBERTConfig, NeoBERTLMHead, swiglu_size
from .tensor_reader import StoredTensor, TensorFile, check_shared_storages, open_tensors, read_tensor, rows

__all__ = [
    "CheckpointError",
    "Run",
    "expected_shapes",
    "layout",
    "load_original",
    "read_json",
    "read_run",
    "read_weight",
    "to_disk",
    "whole_directory",
    "write_run",
]

EMBEDDING = "model.encoder.weight"
DECODER = "decoder.weight"
DECODER_BIAS = "decoder.bias"
WEIGHTS = ("state_dict.pt", "model.safetensors")

_WHOLE_NUMBERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "pad_token_id",
)  # fmt: skip
_REQUIRED = (*_WHOLE_NUMBERS, "norm_eps", "rope", "rms_norm", "hidden_act")
_NUMBERS = (
    "norm_eps", "embedding_init_range", "decoder_init_range", "classifier_init_range", "dropout", "base_scale",
)  # fmt: skip
_FLAGS = ("rope", "rms_norm", "tie_word_embeddings", "ngpt")
_NAMES = ("hidden_act", "attn_backend", "kernel_backend")
# Names in the file, and those of the training model's configuration where they differ.
_FIELD_NAMES = {"max_position_embeddings": "max_length"}
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LONGEST_YAML = 1 << 22  # bytes
_LARGEST = 1 << 63  # whole numbers in config.yaml; YAML itself has no end
_EQUAL_ROWS = 4096  # rows of two tensors that are in memory to be compared


@dataclass(frozen=True)
class Run:
    """What a checkpoint directory holds, in one form whatever its dialect.

    `fields` are those of `original.NeoBERTConfig`; `tensors` is where the tensors lie in `source`, under the names of
    the training model's state dict and in its order, without `decoder.bias` where the checkpoint has none; `settings`
    is config.yaml, and `text` the same as it stands there.
    """

    directory: Path
    fields: Mapping[str, Any]
    source: TensorFile
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path
    settings: Mapping[str, Any]
    text: str


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read all but the numbers of a checkpoint, without running any code from it; see `read_weight` for those.

    Understood are both weight files; the prefixes of a compiled or a wrapped model; SwiGLU matrices packed in `w12`;
    the decoder below `model.`; a decoder without a bias. Whether embedding and decoder are tied says config.yaml, or
    else that they are equal.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, config.yaml is not that of a model which can be
            exported, its tensors are not exactly those that it asks for, or tokenizer_info.json contradicts it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        fault = "is a file" if directory.exists() else "not found"
        raise CheckpointError(directory, f"{fault}; expected a checkpoint directory, <run>/model_checkpoints/<step>")
    settings, text = _read_settings(directory / "config.yaml")
    section = _model_section(directory / "config.yaml", settings)
    fields = _fields(directory / "config.yaml", section)
    _check_tokenizer_info(directory / "tokenizer_info.json", fields)
    source = open_tensors(_weights_file(directory))
    tensors = _matching(source, fields, _training_names(source))
    check_shared_storages(source, tensors.values())
    fields["tie_word_embeddings"] = _is_tied(source, tensors, section)
    tensors.setdefault(DECODER, tensors[EMBEDDING])
    tokenizer = directory / "tokenizer"
    if not tokenizer.is_dir():
        raise CheckpointError(tokenizer, "not found; expected the directory that the tokenizer was saved to")
    return Run(directory, fields, source, tensors, tokenizer, settings, text)


def layout(run: Run) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of the training model, the decoder's bias among them."""
    kinds = {name: (stored.dtype, stored.shape) for name, stored in run.tensors.items()}
    return kinds | {DECODER_BIAS: kinds.get(DECODER_BIAS, (kinds[DECODER][0], kinds[DECODER][1][:1]))}


def read_weight(run: Run, name: str) -> Tensor:
    """Return one tensor as it is stored, on the CPU, with memory of its own; a missing `decoder.bias` is zero.

    Raises CheckpointError when it is damaged or not finite.
    """
    if name == DECODER_BIAS and name not in run.tensors:
        dtype, shape = layout(run)[name]
        return torch.zeros(shape, dtype=dtype)
    return read_tensor(run.source, name, stored=run.tensors[name])


def load_original(run: Run) -> NeoBERTLMHead:
    """Return the training model with the weights of a checkpoint, each in the dtype it is stored in; evaluation mode.

    Raises CheckpointError when a tensor is damaged or not finite.
    """
    with torch.device("meta"):
        model = NeoBERTLMHead(NeoBERTConfig(**run.fields))
    model.load_state_dict({name: read_weight(run, name) for name in layout(run)}, strict=True, assign=True)
    if run.fields["tie_word_embeddings"]:
        model.decoder.weight = model.model.encoder.weight
    return model.eval()


def expected_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a training model, in the order of its state dict."""
    width, vocabulary = fields["hidden_size"], fields["vocab_size"]

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,)} | ({} if fields["rms_norm"] else {f"{name}.bias": (width,)})

    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, width)}
    if not fields["rope"]:
        shapes["model.positional_embedding.weight"] = (fields["max_length"] + 1, width)
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.transformer_encoder.{layer}"
        shapes |= norm(f"{block}.attention_norm")
        shapes |= {f"{block}.qkv.weight": (3 * width, width), f"{block}.wo.weight": (width, width)}
        shapes |= norm(f"{block}.ffn_norm")
        if fields["hidden_act"] == "swiglu":
            inner = swiglu_size(fields["intermediate_size"])
            shapes |= {f"{block}.ffn.w{number}.weight": (inner, width) for number in (1, 2)}
            shapes |= {f"{block}.ffn.w3.weight": (width, inner)}
        else:
            inner = fields["intermediate_size"]
            shapes |= {f"{block}.ffn.0.weight": (inner, width), f"{block}.ffn.2.weight": (width, inner)}
    shapes |= norm("model.layer_norm")
    return shapes | {DECODER: (vocabulary, width), DECODER_BIAS: (vocabulary,)}


def write_run(
    directory: str | os.PathLike[str],
    model: NeoBERTLMHead,
    *,
    tokenizer: Path | None,
    name: str = "neobert",
    layout: Literal["state_dict.pt", "model.safetensors"] = "state_dict.pt",
    step: int = 0,
) -> None:
    """Write the checkpoint directory that the trainer would, complete or not at all.

    Args:
        directory: a new or an empty one, `<run>/model_checkpoints/<step>`.
        model: the training model, on any device and of any dtype; it stays as it is.
        tokenizer: a directory with the tokenizer's files, which are copied; without one the exporter refuses the run.
        name: what config.yaml calls the model.
        layout: the file for the weights. Tied tensors are one in state_dict.pt and copies in model.safetensors, as the
            trainer writes them.
        step: number of training steps done.

    Raises:
        OSError: the directory cannot be written, or has something in it; nothing is left behind.
    """
    config = model.config
    names = {"max_length": "max_position_embeddings", "dropout": "dropout_prob"}
    fields = {names.get(entry.name, entry.name): getattr(config, entry.name) for entry in dataclasses.fields(config)}
    settings = {
        "model": {"name": name, **fields},
        "dataset": {"name": None, "path": None},
        "tokenizer": {"name": None, "max_length": config.max_length, "vocab_size": config.vocab_size},
        "trainer": {"max_steps": step},
    }
    info = {"tokenizer_name": None, "vocab_size": config.vocab_size, "pad_token_id": config.pad_token_id}
    tensors = {key: own_storage(tensor) for key, tensor in model.state_dict().items()}
    with whole_directory(Path(directory)) as staging:
        if config.tie_word_embeddings and layout == "state_dict.pt":
            tensors[DECODER] = tensors[EMBEDDING]
        if layout == "state_dict.pt":
            write_whole(staging / layout, tensors)
        else:
            _write_safetensors(staging / layout, tensors)
        (staging / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        (staging / "tokenizer_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copytree(tokenizer, staging / "tokenizer", copy_function=shutil.copyfile)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Give a place to write in that becomes `directory` at the end, complete and on the disk, or else disappears.

    What a killed process leaves is a hidden directory beside it, `.<name>.<letters>.unfinished`.

    Raises OSError where `directory` is a file or has something in it, or cannot be written; the message names it.
    """
    directory = Path(os.path.realpath(directory))
    _require_empty(directory)
    made: list[Path] = []
    staging = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.unfinished")
    is_done = False
    try:
        _make_parents(directory.parent, made)
        staging.mkdir()
        yield staging
        for place in (*staging.rglob("*"), staging):
            to_disk(place)
        os.rename(staging, directory)
        is_done = True
        to_disk(directory.parent)
    except OSError as error:
        # Of the file that could not be read; what was written has a name that nobody knows.
        is_read = error.filename is not None and not str(error.filename).startswith(os.fspath(staging))
        culprit = os.fsdecode(error.filename) if is_read else os.fspath(directory)
        raise OSError(error.errno, error.strerror or str(error), culprit) from None
    finally:
        if not is_done:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in reversed(made):
                # Somebody else may have put something there.
                _remove_if_empty(parent)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a file holds; raises CheckpointError for any other file."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\u" in text:
            # Half of a character can be written in JSON, and in no other text.
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(file, "not found; expected it in the directory of a checkpoint") from None
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from None
    except UnicodeEncodeError:
        raise CheckpointError(file, "has half of a surrogate pair (\\ud800); expected whole characters") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(file, f"holds a {type(content).__name__}, expected an object")
    return content


def _read_settings(file: Path) -> tuple[Mapping[str, Any], str]:
    try:
        with open(file, "rb") as stream:
            content = stream.read(_LONGEST_YAML + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(file, "not found; expected the run's configuration, which the trainer saves") from None
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CheckpointError(file, "is not text in UTF-8") from None
    if len(content) > _LONGEST_YAML:
        raise CheckpointError(file, f"is longer than {_LONGEST_YAML} bytes; expected the configuration of a run")
    try:
        settings = yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        raise CheckpointError(
            file, f"{error.problem}{_line(error)}; expected plain values, since a tag could run code: write it without"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise CheckpointError(file, f"is not YAML: {error.problem}{_line(error)}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(file, f"is not YAML: {error}") from None
    if not isinstance(settings, Mapping):
        raise CheckpointError(file, f"holds a {type(settings).__name__}, expected sections, 'model' among them")
    return settings, text


def _line(error: yaml.MarkedYAMLError) -> str:
    return f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""


def _model_section(file: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    section = settings.get("model")
    if not isinstance(section, Mapping) or not section:
        raise CheckpointError(file, "has no section 'model'; expected the model's configuration there")
    if missing := [key for key in _REQUIRED if section.get(key) is None]:
        raise CheckpointError(file, f"its section 'model' lacks {', '.join(missing)}; add what it was trained with")
    return section


def _fields(file: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the training model's configuration that the file gives."""
    given = {
        key: section[key] for key in (*_WHOLE_NUMBERS, *_NUMBERS, *_FLAGS, *_NAMES) if section.get(key) is not None
    }
    if "dropout" not in given and section.get("dropout_prob") is not None:
        given["dropout"] = section["dropout_prob"]
    if "attn_backend" not in given and isinstance(section.get("flash_attention"), bool):
        given["attn_backend"] = "flash_attn_varlen" if section["flash_attention"] else "sdpa"
    if given.get("ngpt"):
        raise CheckpointError(
            file, "ngpt is true: nGPT (NormNeoBERT) is another architecture, for which there is no Hugging Face model"
        )
    fields: dict[str, Any] = {}
    for key, value in given.items():
        if key in _WHOLE_NUMBERS:
            expected = None if type(value) is int and abs(value) < _LARGEST else "a whole number of 64 bits"
        elif key in _NUMBERS:
            value, expected = _number(value)
        else:
            kind, what = (bool, "true or false") if key in _FLAGS else (str, "a name")
            expected = None if isinstance(value, kind) else what
        if expected:
            raise CheckpointError(file, f"model.{key} is {_shown(section.get(key, value))}, expected {expected}")
        fields[_FIELD_NAMES.get(key, key)] = value
    try:
        NeoBERTConfig(**fields)
    except (ValueError, ArithmeticError) as error:
        raise CheckpointError(file, f"section 'model': {error}") from None
    return fields | {"hidden_act": fields["hidden_act"].lower()}


def _shown(value: Any) -> str:
    """A value of config.yaml in a message: short, whatever it holds and however often it holds itself."""
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return f"a number of {value.bit_length()} bits"
    return repr(str(value)[:80]) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _number(value: Any) -> tuple[Any, str | None]:
    """A finite number, and what else would have been expected."""
    if isinstance(value, str):
        # YAML 1.1 reads 1e-5, without a point, as text.
        try:
            value = float(value)
        except ValueError:
            return value, "a number"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    is_number = is_number and (isinstance(value, float) or abs(value) < _LARGEST)
    return value, None if is_number else "a number"


def _check_tokenizer_info(file: Path, fields: Mapping[str, Any]) -> None:
    if not file.exists():
        warnings.warn(
            f"{file}: not found; whether tokenizer and model belong together is checked by the tokenizer alone",
            stacklevel=3,
        )
        return
    info = read_json(file)
    for key in ("vocab_size", "pad_token_id"):
        if info.get(key) is not None and info[key] != fields[key]:
            raise CheckpointError(
                file,
                f"has {key} {str(info[key])[:80]}, expected {fields[key]}, the model's in config.yaml; correct either",
            )


def _weights_file(directory: Path) -> Path:
    there = [directory / name for name in WEIGHTS if (directory / name).exists()]
    if len(there) > 1:
        raise CheckpointError(directory, f"has {' and '.join(WEIGHTS)}; keep the one to be exported, remove the other")
    if there:
        return there[0]
    sharded = [place.name for place in directory.iterdir() if place.name in ("latest", "zero_to_fp32.py")]
    hint = "; it looks like DeepSpeed's: write state_dict.pt with its zero_to_fp32.py first" if sharded else ""
    raise CheckpointError(directory, f"holds no weights, expected {' or '.join(WEIGHTS)}{hint}")


def _training_names(source: TensorFile) -> dict[str, StoredTensor]:
    """The tensors under the training model's names: without what wrappers put in front, the decoder outside."""
    tensors: dict[str, StoredTensor] = {}
    for stored_name, stored in source.tensors.items():
        parts = [part for part in stored_name.split(".") if part != "_orig_mod"]
        while parts and parts[0] == "module":
            parts = parts[1:]
        name = ".".join(parts)
        if name.startswith("model.decoder."):
            name = name.removeprefix("model.")
        if tensors.setdefault(name, stored) != stored:
            raise CheckpointError(
                source.path, f"has two tensors for {name}, with and without a prefix; expected one, remove the other"
            )
    return tensors


def _matching(
    source: TensorFile, fields: Mapping[str, Any], tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors in the training model's order, after making sure that they are those that `fields` ask for."""
    file, layers = source.path, fields["num_hidden_layers"]
    # Before the names of a billion layers are made.
    if layers > len(tensors):
        raise CheckpointError(file, f"has {len(tensors)} tensors, but config.yaml has num_hidden_layers={layers}")
    shapes = expected_shapes(fields)
    for layer in range(layers):
        packed = tensors.pop(f"model.transformer_encoder.{layer}.ffn.w12.weight", None)
        if packed is None or fields["hidden_act"] != "swiglu":
            continue
        inner, width = shapes[f"model.transformer_encoder.{layer}.ffn.w1.weight"]
        _require_shape(file, f"model.transformer_encoder.{layer}.ffn.w12.weight", packed, (2 * inner, width), fields)
        for number in (1, 2):
            name = f"model.transformer_encoder.{layer}.ffn.w{number}.weight"
            if name in tensors:
                raise CheckpointError(file, f"has both {name} and the packed ffn.w12; expected one of them")
            # The gate lies above what it is multiplied with.
            tensors[name] = rows(packed, (number - 1) * inner, number * inner)
    optional = {DECODER_BIAS} | ({DECODER} if fields.get("tie_word_embeddings") else set())
    if missing := [name for name in shapes if name not in tensors and name not in optional]:
        raise CheckpointError(
            file, f"tensors are missing: {listed(missing)}; expected all that config.yaml's model has"
        )
    if left_over := [name for name in tensors if name not in shapes]:
        raise CheckpointError(
            file,
            f"tensors are left over: {listed(left_over)}; config.yaml's model has no such ones, is it of this run?",
        )
    for name, stored in tensors.items():
        _require_shape(file, name, stored, shapes[name], fields)
        if stored.dtype not in _TYPES:
            raise CheckpointError(file, f"{name} is {stored.dtype}, expected one of {', '.join(map(str, _TYPES))}")
        # A small file can claim a huge tensor by repeating one number.
        if math.prod(stored.shape) * stored.dtype.itemsize > stored.storage.size:
            raise CheckpointError(file, f"{name} is larger than its data, expected all numbers in the file")
    return {name: tensors[name] for name in shapes if name in tensors}


def _require_shape(
    file: Path, name: str, stored: StoredTensor, shape: tuple[int, ...], fields: Mapping[str, Any]
) -> None:
    if stored.shape != shape:
        sizes = ("hidden_size", "intermediate_size", "vocab_size", "max_length")
        told = ", ".join(f"{size}={fields[size]}" for size in sizes)
        raise CheckpointError(file, f"{name} has shape {stored.shape}, expected {shape} from config.yaml's {told}")


def _is_tied(source: TensorFile, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any]) -> bool:
    """What config.yaml says, or else whether the two tensors are equal."""
    declared = section.get("tie_word_embeddings")
    if declared is False:
        return False
    embedding, decoder = tensors[EMBEDDING], tensors.get(DECODER)
    equal = decoder is None or embedding == decoder or _are_equal(source, embedding, decoder)
    if declared and not equal:
        raise CheckpointError(
            source.path,
            f"{EMBEDDING} and {DECODER} differ, but config.yaml has tie_word_embeddings: true; set it to false to"
            " export both",
        )
    return equal


def _are_equal(source: TensorFile, first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of one shape hold the same numbers in the same dtype; a part of each is read at a time."""
    if first.dtype != second.dtype:
        return False
    for begin in range(0, first.shape[0], _EQUAL_ROWS):
        end = min(begin + _EQUAL_ROWS, first.shape[0])
        parts = [
            read_tensor(source, name, stored=rows(stored, begin, end))
            for name, stored in ((EMBEDDING, first), (DECODER, second))
        ]
        if not torch.equal(*parts):
            return False
    return True


def _write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # The trainer clones tensors that share memory, which the format cannot express.
    separate = {name: tensor.clone() if name == DECODER else tensor for name, tensor in tensors.items()}
    try:
        save_file(separate, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def _require_empty(directory: Path) -> None:
    if directory.is_dir():
        if any(directory.iterdir()):
            raise FileExistsError(17, "is not empty; expected a new or an empty directory", os.fspath(directory))
    elif directory.exists():
        raise NotADirectoryError(20, "is a file; expected a new or an empty directory", os.fspath(directory))


def _make_parents(directory: Path, made: list[Path]) -> None:
    """Make the directories that are missing, and note which these are."""
    if not directory.exists():
        _make_parents(directory.parent, made)
        directory.mkdir()
        made.append(directory)


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def to_disk(place: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk. Raises OSError."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
