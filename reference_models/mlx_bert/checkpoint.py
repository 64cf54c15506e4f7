# SPDX-License-Identifier: Apache-2.0
"""Directories with weights of BERT as transformers, MLX's tools and upstream's port write them, and reading them back.

Everything here is on the side of the original: torch, safetensors and NumPy. What the port reads, it reads by code of
its own, so that neither can hide an error of the other.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from harness.families import Fields, nearest
from reference_models.mlx_bert import original

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Layout = Literal["safetensors", "sharded", "bin", "gamma-beta", "mlx-community", "mlx-examples", "997e078", "a7f08d8"]
"""How a directory is laid out:

- `safetensors`: what transformers writes, one file.
- `sharded`: the same in several files and an index.
- `bin`: what transformers wrote before: `pytorch_model.bin`, tied tensors twice, position ids as a tensor.
- `gamma-beta`: one safetensors file in which a norm has `gamma` and `beta`, as in conversions of the first checkpoints.
- `mlx-community`: transformers' names with position ids, and an index beside the one file.
- `mlx-examples`: `weights.npz` with the names of ml-explore/mlx-examples.
- `997e078`, `a7f08d8`: what upstream's port saved at these commits, with a configuration of its own. That of `a7f08d8`
  has no room for the biases of attention, so they are lost.
"""

DType = Literal["float16", "bfloat16", "float32", "float64"]

INDEX = "model.safetensors.index.json"
NPZ = "weights.npz"

EXAMPLES_PARTS: Mapping[str, str] = {
    "attention.self.query": "attention.query_proj",
    "attention.self.key": "attention.key_proj",
    "attention.self.value": "attention.value_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "ln1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "ln2",
}
"""A part of a layer by transformers' name -> by the name of MLX's own encoder layer."""

LAYER_PREFIXES: Mapping[str, str] = {
    "mlx-examples": "encoder.layers.{}",
    "997e078": "encoder_layers.{}",
    "a7f08d8": "encoder_layers.{}.transformer_layer",
}

OUTSIDE_LAYERS: Mapping[str, Mapping[str, str]] = {
    "mlx-examples": {"embeddings.LayerNorm": "embeddings.norm", "pooler.dense": "pooler"},
    "997e078": {},
    "a7f08d8": {},
}
"""Layout -> transformers' name of a module outside of the layers -> its name there, where that is another."""

POSITION_IDS = "embeddings.position_ids"
ATTENTION_BIAS = re.compile(r"\.attention\.(query|key|value|out)_proj\.bias$")

UPSTREAM_CONFIGURATION: Fields = {
    "bos_token_id": 101,
    "eos_token_id": 102,
    "pooler_hidden_size": None,
    "pooler_dropout": 0.0,
    "pooler_activation": "tanh",
    "use_fused_attention": True,
    "use_memory_efficient_attention": True,
    "gradient_checkpointing": False,
    "compute_additional_pooling": True,
}
"""What upstream's configuration has beside fields of transformers', and with which defaults."""

UPSTREAM_FIELDS: Sequence[str] = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def write_hf_directory(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    directory: str | Path,
    *,
    layout: Layout = "safetensors",
    dtype: DType | None = None,
    shard_size: str | int = "8KB",
) -> Path:
    """Writes a directory with weights and `config.json`, and returns it.

    Args:
        model: a module of transformers, whose tied tensors are written once, or a state dict, which is written whole.
            Names with a prefix and heads are written as they are, where the layout has a place for them.
        config: transformers' own configuration as JSON has it; None takes the module's.
        directory: made where it does not exist. Files of other layouts in it stay.
        dtype: of the weights; None leaves each as it is. Integers are never changed.
        shard_size: the largest shard of `sharded`, in bytes or as "5GB"; so small that a small model has several.

    Raises:
        ValueError: there is no such layout; it has no place for one of the tensors, or for the model or dtype.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"there is no layout '{layout}'{nearest(layout, get_args(Layout))}")
    if config is None:
        if not hasattr(model, "config"):
            raise ValueError("config is None, and a state dict has none; give what config.json is to hold")
        config = config_of(model)
    directory = Path(directory)
    everything = _state_of(model)
    tied = {} if isinstance(model, Mapping) else _tied(everything)
    everything = {key: _cast(tensor, dtype) for key, tensor in everything.items()}
    state = {key: tensor for key, tensor in everything.items() if key not in tied}
    written = {**config, "dtype": dtype or _dtype_name(state)}
    directory.mkdir(parents=True, exist_ok=True)
    if layout in LAYER_PREFIXES:
        named = _renamed(state, layout, written)
        if layout == "mlx-examples":
            _write_npz(named, directory / NPZ)
        else:
            _write_safetensors(named | _position_ids(state, "int32"), directory, metadata={"format": "mlx"})
            written = _upstream_config(written)
            extra = {"compute_additional_pooling": True, "bert_core_version": "1.0.0"}
            _write_json(extra, directory / "bert_core_config.json")
    elif layout == "bin":
        import torch

        # Tied tensors share their storage in such a file.
        shared = {key: state[tied[key]] if key in tied else tensor for key, tensor in everything.items()}
        torch.save(shared | _position_ids(state, "int64"), directory / "pytorch_model.bin")
    elif layout == "mlx-community":
        tensors = state | _position_ids(state, "int64")
        _write_safetensors(tensors, directory, metadata={"format": "mlx"})
        _write_index(dict.fromkeys(tensors, "model.safetensors"), tensors, directory)
    elif layout == "sharded":
        _write_shards(state, directory, shard_size)
    else:
        named = {_old_norm(key): tensor for key, tensor in state.items()} if layout == "gamma-beta" else state
        _write_safetensors(named, directory, metadata={"format": "pt"})
    _write_json(written, directory / "config.json")
    return directory


def config_of(model: Any) -> dict[str, Any]:
    """What transformers would write as the `config.json` of a module, without its dtype."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    return {**config, "architectures": [type(model).__name__]}


def read_hf_directory(directory: str | Path, *, head: str = original.BODY) -> tuple[dict[str, Any], Tensors]:
    """Fields by BERT's names, and the state dict, as the original's own loader reads a directory of any layout.

    transformers' layouts are read by transformers, the others by their names. A file's dtypes are kept.

    Args:
        head: the class that reads, see `original.CLASSES`. The plain body finds its tensors in a checkpoint with a
            head too. A masked language model has no pooler, and then there is none in the state dict.

    Raises:
        ValueError: tensors are missing beside the pooler, or left over in a layout that transformers does not know.
        OSError: there are no weights that transformers knows.
    """
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layout = _own_layout(directory, config)
    if layout is None:
        return _read_by_transformers(directory, config, head)
    fields = {name: config[name] for name in UPSTREAM_FIELDS} if "model_type" not in config else _fields(config)
    module = original.build(fields, head=head)
    names = _renamed_keys(module.state_dict(), layout)
    found = _read_npz(directory / NPZ) if layout == "mlx-examples" else _read_safetensors(directory)
    found.pop(POSITION_IDS, None)
    _refuse_difference(set(names.values()) - set(found), set(found) - set(names.values()), directory)
    return original.fields_of(module.config), {key: found[name] for key, name in names.items()}


def write_checkpoint(module: torch.nn.Module, fields: Fields, path: Path, state: object = None) -> None:
    """The module's directory, as a Family has it: in float32 where that holds every value, since MLX reads no float64.

    fields and state are not needed: the module has its configuration, and training leaves nothing beside the weights.
    """
    _write_whole(module, path)


def read_checkpoint(path: str) -> tuple[Fields, Tensors]:
    """Fields and state dict of a directory as transformers reads it, as a Family has it; see `read_hf_directory`.

    Raises ValueError for a layout that transformers does not know, and what `read_hf_directory` raises.
    """
    directory = Path(path)
    layout = _own_layout(directory, json.loads((directory / "config.json").read_text(encoding="utf-8")))
    if layout is not None:
        raise ValueError(f"{directory} is in the layout of {layout}, which transformers does not read")
    return read_hf_directory(directory)


def checkpoint_dialects(module: torch.nn.Module, fields: Fields, directory: Path) -> Mapping[str, Path]:
    """The same model as tools and revisions write it, by what is different in the directory; all hold equal numbers.

    transformers reads all but `weights.npz` and upstream's own.
    """
    paths: dict[str, Path] = {}

    def put(name: str, model: torch.nn.Module = module, layout: Layout = "safetensors") -> None:
        paths[name] = directory / str(len(paths))
        _write_whole(model, paths[name], layout=layout)

    put("several files and an index", layout="sharded")
    put("pytorch_model.bin", layout="bin")
    put("norms with gamma and beta", layout="gamma-beta")
    put("mlx-community's", layout="mlx-community")
    model_type = original.model_type_of(fields)
    for head in CARRIERS[model_type]:
        put(f"inside of {original.CLASSES[model_type][head]}", model=_inside(module, fields, head))
    if model_type == "bert":
        put("inside of BertForPreTraining, with gamma and beta", _inside(module, fields, "pretraining"), "gamma-beta")
        put("mlx-examples' weights.npz", layout="mlx-examples")
        put("the names of upstream's commit 997e078", layout="997e078")
    return paths


CARRIERS: Mapping[str, Sequence[str]] = {
    "bert": ("pretraining", "sequence_classification"),
    "distilbert": ("masked_lm", "sequence_classification"),
    "roberta": (),
}
"""model_type -> heads whose checkpoints hold the whole body. None of RoBERTa's has a pooler."""


def _write_whole(module: torch.nn.Module, path: Path, *, layout: Layout = "safetensors") -> None:
    import torch

    floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    exact = all(torch.equal(tensor.float().to(tensor.dtype), tensor) for tensor in floats)
    wide = any(tensor.dtype == torch.float64 for tensor in floats)
    if path.exists():
        shutil.rmtree(path)
    write_hf_directory(module, None, path, layout=layout, dtype="float32" if exact and wide else None)


def _inside(module: torch.nn.Module, fields: Fields, head: str) -> torch.nn.Module:
    """A model with a head, whose body has the module's weights and dtype."""
    whole = original.build(fields, head=head).to(next(module.parameters()).dtype)
    whole.get_submodule(original.model_type_of(fields)).load_state_dict(module.state_dict())
    return whole


def _state_of(model: Any) -> Tensors:
    if isinstance(model, Mapping):  # a safetensors file takes no tensors that share storage
        return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in model.items()}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}


def _tied(state: Tensors) -> dict[str, str]:
    """Key of a tensor that is another one -> the key of that one, the first of them."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    tied = {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and first.setdefault(place, key) != key:
            tied[key] = first[place]
    return tied


def _cast(tensor: torch.Tensor, dtype: DType | None) -> torch.Tensor:
    import torch

    if dtype is None or not tensor.is_floating_point():
        return tensor
    if dtype not in get_args(DType):
        raise ValueError(f"dtype is '{dtype}'{nearest(dtype, get_args(DType))}")
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor.to(wanted)


def _dtype_name(state: Tensors) -> str:
    return next(str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point())


def _position_ids(state: Tensors, dtype: str) -> Tensors:
    """The position ids that old files have beside the body's embeddings, (1, positions)."""
    import torch

    table = ".position_embeddings.weight"
    return {
        f"{key.removesuffix(table)}.position_ids": torch.arange(len(tensor), dtype=getattr(torch, dtype)).unsqueeze(0)
        for key, tensor in state.items()
        if key.endswith(table)
    }


def _old_norm(key: str) -> str:
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _renamed(state: Tensors, layout: str, config: Fields) -> Tensors:
    if config.get("model_type") != "bert":
        raise ValueError(f"layout '{layout}' is of BERT alone, and model_type is '{config.get('model_type')}'")
    return {name: state[key] for key, name in _renamed_keys(state, layout).items() if name}


def _renamed_keys(keys: Iterable[str], layout: str) -> dict[str, str]:
    """transformers' key -> the layout's; what the layout has no room for is left out."""
    known = ("embeddings.", "encoder.layer.", "pooler.dense.")
    names = {}
    for key in keys:
        if not key.startswith(known):
            raise ValueError(f"layout '{layout}' has no place for {key}; it holds a plain BertModel")
        name = _layer_name(key, layout)
        for theirs, own in OUTSIDE_LAYERS[layout].items():
            if key.startswith(f"{theirs}."):
                name = key.replace(theirs, own)
        if layout != "a7f08d8" or not ATTENTION_BIAS.search(name):
            names[key] = name
    return names


def _layer_name(key: str, layout: str) -> str:
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
    if not found:
        return key
    number, part, kind = found.groups()
    own = part if layout == "997e078" else EXAMPLES_PARTS[part]
    return f"{LAYER_PREFIXES[layout].format(number)}.{own}.{kind}"


def _upstream_config(config: Fields) -> dict[str, Any]:
    known = {name: config.get(name) for name in UPSTREAM_FIELDS}
    return {**UPSTREAM_CONFIGURATION, **{name: value for name, value in known.items() if value is not None}}


def _write_safetensors(tensors: Tensors, directory: Path, *, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors", metadata=metadata)


def _write_shards(tensors: Tensors, directory: Path, shard_size: str | int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, directory / name, metadata={"format": "pt"})
    if split.is_sharded:
        _write_index(split.tensor_to_filename, tensors, directory)


def _write_index(files: Mapping[str, str], tensors: Tensors, directory: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    _write_json(index, directory / INDEX)


def _write_npz(tensors: Tensors, path: Path) -> None:
    import numpy
    import torch

    if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        raise ValueError(f"{path.name} cannot hold bfloat16, which NumPy has not; give dtype='float16' or 'float32'")
    numpy.savez(path, **{key: tensor.numpy() for key, tensor in tensors.items()})  # type: ignore[arg-type]


def _write_json(value: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _own_layout(directory: Path, config: Fields) -> str | None:
    """The layout of a directory that transformers does not read; None for those it does."""
    if (directory / NPZ).is_file():
        return "mlx-examples"
    if "model_type" in config:
        return None
    with_biases = any(".self.query." in key for key in _read_safetensors(directory))
    return "997e078" if with_biases else "a7f08d8"


def _fields(config: Fields) -> dict[str, Any]:
    import transformers

    kind = getattr(transformers, original.CONFIGURATIONS[original.model_type_of(config)])
    return original.fields_of(kind.from_dict(dict(config)))


def _read_by_transformers(directory: Path, config: Fields, head: str) -> tuple[dict[str, Any], Tensors]:
    import transformers

    kind = getattr(transformers, original.CLASSES[original.model_type_of(config)][head])
    keywords = {"dtype": "auto", "attn_implementation": "eager", "local_files_only": True}
    model, loading = kind.from_pretrained(directory, output_loading_info=True, **keywords)
    missing = set(loading["missing_keys"])
    # transformers draws what is missing, and says so in a warning alone.
    _refuse_difference({key for key in missing if "pooler." not in key}, set(), directory)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items() if key not in missing}
    return original.fields_of(model.config), state


def _read_safetensors(directory: Path) -> Tensors:
    from safetensors.torch import load_file

    return dict(load_file(directory / "model.safetensors"))


def _read_npz(path: Path) -> Tensors:
    import numpy
    import torch

    with numpy.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _refuse_difference(missing: set[str], left: set[str], directory: Path) -> None:
    parts = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
    parts += [f"holds {', '.join(sorted(left))} too many"] * bool(left)
    if parts:
        raise ValueError(f"{directory} {' and '.join(parts)}")
