# SPDX-License-Identifier: Apache-2.0
"""nanoMoE's own checkpoints: read in each layout of its two originals, written so that the original resumes.

The layouts are `ckpt.pt` of wolfecameron/nanoMoE at 661fbcfade3e3081b3ed1150bc07e49082f46b48 ("ancestor") and of the
nanoGPT it descends from, `<prefix>-<eval>.pt` of askerlee/nanoMoE at 84a1de8 ("nanomoe"), and the directories that
askerlee/nanoMoE writes from 07e6c1679aa87ff07a0375f58a257d09fd1a0ad8 on. This file stays behind when a port travels.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_models.nanogpt.checkpoint import (
    EMBEDDING,
    HEAD,
    CheckpointError,
    fresh_optimizer_state,
    listed,
    matching_tensors,
    named_tensors,
    own_storage,
    read_archive,
    read_entries,
    require_layers,
    training_progress,
    write_whole,
)

from .configuration_nanomoe_gpt import GPTConfig
from .modeling_nanomoe_gpt import GPT

Architecture = Literal["nanomoe", "ancestor"]

# Both originals' fields, in their order and with their defaults.
MODEL_ARGS: Mapping[Architecture, Mapping[str, Any]] = {
    "nanomoe": {
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "bias": True,
        "n_exp": 1,
        "top_k": 2,
        "use_aux_loss": False,
        "use_router_z_loss": False,
        "use_router_ortho_loss": False,
        "use_experts_ortho_loss": True,
        "use_gate_output_loss": True,
        "use_noisy_top_k": False,
        "aux_loss_weight": 0.01,
        "router_z_loss_weight": 0.001,
        "router_ortho_loss_weight": 0.01,
        "router_ortho_neg_corr_weight": 1,
        "experts_ortho_loss_weight": 0.01,
        "gate_output_loss_weight": 0.01,
        "train_capacity": 1.25,
        "eval_capacity": 2.0,
        "min_capacity": 4,
        "stride": 1,
        "moe_start_layer": 0,
        "use_switch_tfm_init": False,
        "switch_tfm_init_scale": 1.0,
        "router_use_full_prec": False,
        "use_qwen3_moe_mlp": False,
    },
    "ancestor": {
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
        "n_exp": 1,
        "top_k": 2,
        "use_aux_loss": False,
        "use_router_z_loss": False,
        "use_noisy_top_k": False,
        "aux_loss_weight": 0.01,
        "router_z_loss_weight": 0.001,
        "train_capacity": 1.25,
        "eval_capacity": 2.0,
        "min_capacity": 4,
        "stride": 2,
        "use_switch_tfm_init": False,
        "switch_tfm_init_scale": 1.0,
        "router_use_full_prec": False,
    },
}
_OWNERS = {"nanomoe": "askerlee/nanoMoE", "ancestor": "wolfecameron/nanoMoE"}
_REQUIRED_ARGS = ("n_layer", "n_head", "n_embd", "block_size")
# No tensor says these, and a model with others computes something else.
_ROUTING_ARGS = ("top_k", "stride", "train_capacity", "eval_capacity", "min_capacity")
_PORT_NAMES = {"top_k": "moe_top_k"}
_SIZES = ("block_size", "vocab_size", "n_embd", "bias", "n_exp")
_EXPERT_TENSOR = re.compile(r"transformer\.h\.(\d{1,9})\.mlp\.(?:router|experts)\..+", re.ASCII)
_NORM_BIAS = re.compile(r"transformer\.(?:h\.\d+\.ln_[12]|ln_f)\.bias")
_OPTIONAL_TENSORS = {"router.w_noise.weight": "use_noisy_top_k", "experts.gate_proj": "use_qwen3_moe_mlp"}


@dataclass(frozen=True)
class NanoMoECheckpoint:
    """What a checkpoint holds, in one form whatever its layout.

    `model_args` has all fields of that original's `GPTConfig` under its names, `state_dict` exactly the keys of the
    original's, with one tensor for the embedding and the head, `settings` what else a config.json says.
    """

    architecture: Architecture
    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    iter_num: int = 0
    best_val_loss: float = 1e9
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(path: str | os.PathLike[str]) -> NanoMoECheckpoint:
    """Read a checkpoint of either original onto the CPU without running any code from it.

    Whose it is follows from the fields of its `model_args`, and its tensors have to agree: `dropout` is the
    ancestor's, `moe_start_layer` and what else it lacks is nanoMoE's, and a file without `n_exp` is nanoGPT's own,
    which is the ancestor without experts. Understood are files with and without biases; with the prefix of a compiled
    model; with causal masks among the weights; without `bias` (there was one), `vocab_size` (the rows of the embedding
    say so), `iter_num`, `best_val_loss`, `config` or the head, and without fields of a loss or of the initialisation.
    Where head and embedding differ the head wins with a warning, because that is what the originals' loading does.

    A directory holds config.json and model.safetensors or pytorch_model.bin, whole or in parts with an index: those of
    askerlee/nanoMoE, without the head, and those that the port's `save_pretrained` writes. No code in it is run.

    Raises:
        CheckpointError: the file is missing, truncated, not a zip archive or holds anything but tensors and plain
            values; its `model_args`, or config.json, are not those of one original; or its tensors are not exactly
            those that these ask for, all finite.
    """
    if os.path.isdir(path):
        return _load_directory(Path(path))
    contents = read_entries(path)
    state_dict = named_tensors(path, contents["model"])
    architecture, model_args = _read_model_args(path, contents["model_args"], state_dict)
    progress = training_progress(path, contents)
    return NanoMoECheckpoint(
        architecture=architecture,
        model_args=model_args,
        state_dict=_matching_tensors(path, architecture, model_args, state_dict),
        **progress,
    )


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    architecture: Architecture,
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    iter_num: int = 0,
    best_val_loss: float = 1e9,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that the original's `train.py` resumes from and its strict loading accepts.

    The ancestor's has an optimizer, which starts anew with `train.py`'s default settings. nanoMoE's has neither that
    nor a number of steps; one above 0 is written nevertheless, so that it is not lost. The file appears complete or
    not at all, whatever interrupts the writing.

    Raises:
        OSError: the file cannot be written; the message names it.
        ValueError: `model_args` are not all fields of that original, or the tensors not those of a model with them.
    """
    if odd := sorted(set(model_args) ^ set(MODEL_ARGS[architecture])):
        raise ValueError(f"these fields are missing, or unknown to {_OWNERS[architecture]}: {listed(odd)}")
    tensors = _own_tensors(architecture, model_args, state_dict)
    contents = {
        "model": tensors,
        "model_args": dict(model_args),
        "best_val_loss": best_val_loss,
        "config": dict(config or {}),
    }
    if architecture == "ancestor":
        contents |= {"optimizer": fresh_optimizer_state(tensors), "iter_num": iter_num}
    elif iter_num:
        contents["iter_num"] = iter_num
    write_whole(path, contents)


def from_nanomoe_ckpt(path: str | os.PathLike[str]) -> GPT:
    """Load a checkpoint, file or directory, that an original wrote; the model comes back in evaluation mode.

    Every tensor keeps its bits and its dtype. See `load_checkpoint` for what is read.

    Raises:
        CheckpointError: the file is missing, damaged, hostile or not a checkpoint of either original.
    """
    checkpoint = load_checkpoint(path)
    fields = {"architecture": checkpoint.architecture, **_port_fields(checkpoint.model_args)}
    config = GPTConfig.from_dict(checkpoint.settings | fields)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    model.tie_weights()
    model.eval()
    return model


def to_nanomoe_ckpt(
    model: GPT,
    path: str | os.PathLike[str],
    *,
    iter_num: int = 0,
    best_val_loss: float = 1e9,
    train_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint from which the `train.py` of the model's original resumes.

    What is the port's alone, such as `label_convention`, has no place in it.

    Args:
        model: of either architecture, on any device; it stays as it is.
        path: where to write; an existing file is replaced only once the new one is complete.
        iter_num: number of training steps done.
        best_val_loss: best validation loss so far; by default any loss is better.
        train_config: what `train.py` ran with; `sample.py` looks for `dataset` in it.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
        ValueError: the original cannot compute what the model does.
    """
    config = model.config
    if config.gelu_approximate != "none":
        raise ValueError(
            f"gelu_approximate={config.gelu_approximate!r} is not the GELU of {_OWNERS['ancestor']}, which would"
            " compute something else from this file; set it to 'none' to write the weights all the same"
        )
    save_checkpoint(
        path,
        architecture=config.architecture,
        model_args=_model_args(config),
        state_dict=model.state_dict(),
        iter_num=iter_num,
        best_val_loss=best_val_loss,
        config=train_config,
    )


def to_nanomoe_directory(model: GPT, directory: str | os.PathLike[str]) -> None:
    """Write the directory that askerlee/nanoMoE at 07e6c16 loads with its own `from_pretrained`: no code, no head.

    What is the port's alone, such as `label_convention`, has no place in it; `save_pretrained` keeps that.

    Args:
        model: of architecture "nanomoe", on any device; it stays as it is.
        directory: a new or an empty one; it appears complete or not at all.

    Raises:
        OSError: the directory cannot be written, or has something in it; nothing is left behind.
        ValueError: the model is of the other architecture.
    """
    config, directory = model.config, Path(directory)
    if config.architecture != "nanomoe":
        raise ValueError(
            f"architecture={config.architecture!r}: {_OWNERS['nanomoe']} cannot compute it; to_nanomoe_ckpt writes the"
            f" file of {_OWNERS['ancestor']}"
        )
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty; expected a new directory")
    model_args = _model_args(config)
    tensors = _own_tensors("nanomoe", model_args, model.state_dict())
    del tensors[HEAD]
    fields = _port_fields(model_args) | {
        "architectures": ["GPT"],
        "dtype": str(tensors[EMBEDDING].dtype).removeprefix("torch."),
        "model_type": config.model_type,
        # Without it transformers 5 leaves the head, which is not in the file, as it was drawn.
        "tie_word_embeddings": True,
    }
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for file in temporary.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(directory)) from None
    except SafetensorError as error:
        raise OSError(f"{directory} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def expert_layers(architecture: Architecture, model_args: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the layers with experts, ascending; none where there is one expert."""
    if model_args["n_exp"] == 1:
        return []
    stride = model_args["stride"]
    if architecture == "ancestor":
        return list(range(0, model_args["n_layer"], stride))
    start = model_args["moe_start_layer"]
    return [layer for layer in range(stride - 1, model_args["n_layer"], stride) if layer >= start]


def expected_shapes(architecture: Architecture, model_args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a model, in the order of the original's state dict."""
    width, vocab_size = model_args["n_embd"], model_args["vocab_size"]
    norm_bias = architecture == "ancestor" and model_args["bias"]

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if norm_bias else {})

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if model_args["bias"] else {})

    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab_size, width),
        "transformer.wpe.weight": (model_args["block_size"], width),
    }
    with_experts = set(expert_layers(architecture, model_args))
    for layer in range(model_args["n_layer"]):
        block = f"transformer.h.{layer}"
        shapes |= norm(f"{block}.ln_1")
        shapes |= linear(f"{block}.attn.c_attn", 3 * width, width)
        shapes |= linear(f"{block}.attn.c_proj", width, width)
        shapes |= norm(f"{block}.ln_2")
        if layer in with_experts:
            shapes |= {f"{block}.mlp.{name}": shape for name, shape in _expert_shapes(model_args)}
        else:
            shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width)
            shapes |= linear(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes | norm("transformer.ln_f") | {HEAD: (vocab_size, width)}


def _expert_shapes(model_args: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give names and shapes of a router and its experts, whose matrices are (expert, in, out)."""
    experts, width = model_args["n_exp"], model_args["n_embd"]
    is_gated = model_args.get("use_qwen3_moe_mlp", False)
    yield "router.w_g.weight", (experts, width)
    if model_args["use_noisy_top_k"]:
        yield "router.w_noise.weight", (experts, width)
    if is_gated:
        yield "experts.gate_proj", (experts, width, 4 * width)
    yield "experts.c_fc", (experts, width, 4 * width)
    yield "experts.c_proj", (experts, 4 * width, width)
    if model_args["bias"] and not is_gated:
        yield "experts.fc_bias", (experts, 1, 4 * width)
        yield "experts.proj_bias", (experts, 1, width)


def _own_tensors(
    architecture: Architecture, model_args: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights in the original's order, none a view, with one tensor for the embedding and the head."""
    names = expected_shapes(architecture, model_args)
    if unpaired := sorted(set(names) ^ set(state_dict)):
        raise ValueError(f"these tensors are missing, or unknown to {_OWNERS[architecture]}: {listed(unpaired)}")
    tensors = {name: own_storage(state_dict[name]) for name in names}
    return tensors | {HEAD: tensors[EMBEDDING]}


def _port_fields(model_args: Mapping[str, Any]) -> dict[str, Any]:
    return {_PORT_NAMES.get(name, name): value for name, value in model_args.items()}


def _model_args(config: GPTConfig) -> dict[str, Any]:
    architecture: Architecture = config.architecture
    return {name: getattr(config, _PORT_NAMES.get(name, name)) for name in MODEL_ARGS[architecture]}


def _load_directory(directory: Path) -> NanoMoECheckpoint:
    """Read config.json and the weights beside it."""
    file = directory / "config.json"
    fields = _read_json(file)
    if fields.get("model_type") != GPTConfig.model_type:
        found = fields.get("model_type")
        raise CheckpointError(file, f"has model_type={found!r}, expected {GPTConfig.model_type!r}")
    names = {key: GPTConfig.attribute_map.get(key, key) for key in fields}
    # Whoever saves a configuration writes all of it: what lacks a field is of another revision.
    needed = _port_fields(dict.fromkeys((*_REQUIRED_ARGS, *_ROUTING_ARGS)))
    if missing := [name for name in needed if name not in names.values()]:
        raise CheckpointError(file, f"lacks {', '.join(missing)}")
    try:
        config = GPTConfig.from_dict(dict(fields))  # a copy, into which the library writes
    except Exception as error:  # what the library itself reads of a file can be wrong in many ways
        raise CheckpointError(file, f"is not of a model that can be: {error}") from None
    model_args = _model_args(config)
    own = {"architecture", *_port_fields(model_args)}
    state_dict = named_tensors(directory, _directory_tensors(directory))
    return NanoMoECheckpoint(
        architecture=config.architecture,
        model_args=model_args,
        state_dict=_matching_tensors(directory, config.architecture, model_args, state_dict),
        settings={key: value for key, value in fields.items() if names[key] not in own},
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(file, "not found; expected it in the directory of a checkpoint") from None
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(file, f"holds a {type(content).__name__}, expected an object")
    return content


def _directory_tensors(directory: Path) -> Mapping[Any, Any]:
    """Read the weights of a directory, whole or in parts."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return _file_tensors(directory / name)
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _indexed_tensors(index)
    raise CheckpointError(directory, "holds no weights; expected model.safetensors or pytorch_model.bin, or an index")


def _indexed_tensors(index: Path) -> dict[Any, Any]:
    """Read the parts that an index names; each tensor has to be where it says, and no other."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(part, str) for part in places.values()):
        raise CheckpointError(index, "has no object weight_map with the file of each tensor")
    tensors: dict[Any, Any] = {}
    for part in sorted(set(places.values())):
        if Path(part).name != part:
            raise CheckpointError(index, f"names {part!r}, expected a file beside it")
        found = _file_tensors(index.parent / part)
        expected = {name for name in places if places[name] == part}
        if odd := sorted(map(str, expected ^ found.keys())):
            raise CheckpointError(index.parent / part, f"holds other tensors than {index.name} says: {listed(odd)}")
        tensors |= found
    return tensors


def _file_tensors(file: Path) -> Mapping[Any, Any]:
    if not file.is_file():
        raise CheckpointError(file, "not found; the index beside it says that it holds tensors")
    if file.suffix != ".safetensors":
        contents = read_archive(file)
        if not isinstance(contents, Mapping):
            raise CheckpointError(file, f"holds a {type(contents).__name__}, expected a dictionary of tensors")
        return contents
    try:
        # Copies: what is read stays a part of the file, and changes when that is written anew.
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(file, f"is damaged or truncated: {error}") from None


def _read_model_args(
    path: str | os.PathLike[str], given: Mapping[Any, Any], state_dict: Mapping[str, Tensor]
) -> tuple[Architecture, dict[str, Any]]:
    """Return whose hyperparameters they are and all of them, with what older files left out filled in."""
    architecture = _architecture(path, given)
    known = MODEL_ARGS[architecture]
    if missing := [name for name in _REQUIRED_ARGS if name not in given]:
        raise CheckpointError(path, f"model_args lacks {', '.join(missing)}")
    if unknown := sorted(str(name) for name in given if name not in known):
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        raise CheckpointError(
            path, f"model_args has {listed(unknown)}, unknown to {_OWNERS[architecture]}; did you mean {nearest[0]}?"
        )
    embedding = state_dict.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.ndim == 2 else 50257
    args = dict(known) | {"vocab_size": rows} | dict(given)
    try:
        GPTConfig(architecture=architecture, **_port_fields(args))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"model_args cannot be those of a model: {error}") from None
    if args["n_exp"] > 1 and (missing := [name for name in _ROUTING_ARGS if name not in given]):
        raise CheckpointError(
            path, f"model_args has n_exp={args['n_exp']} and lacks {', '.join(missing)}, which no tensor tells"
        )
    return architecture, args


def _architecture(path: str | os.PathLike[str], given: Mapping[Any, Any]) -> Architecture:
    """Return whose hyperparameters these are, by the names that only one of the originals has."""
    nanomoe, ancestor = (MODEL_ARGS[name].keys() for name in ("nanomoe", "ancestor"))
    only_nanomoe, only_ancestor = sorted(given.keys() & nanomoe - ancestor), sorted(given.keys() & ancestor - nanomoe)
    if only_nanomoe and only_ancestor:
        raise CheckpointError(
            path,
            f"model_args has {listed(only_ancestor)} of {_OWNERS['ancestor']} and {listed(only_nanomoe)} of "
            f"{_OWNERS['nanomoe']}; expected the fields of one of the two",
        )
    if only_nanomoe:
        return "nanomoe"
    if only_ancestor or "n_exp" not in given:
        return "ancestor"
    raise CheckpointError(
        path,
        f"model_args has n_exp, but neither dropout, as those of {_OWNERS['ancestor']}, nor moe_start_layer, as those"
        f" of {_OWNERS['nanomoe']}; expected one of them, to tell whose file this is",
    )


def _matching_tensors(
    path: str | os.PathLike[str],
    architecture: Architecture,
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the weights in the original's order, after making sure that they are those `model_args` ask for."""
    require_layers(path, model_args["n_layer"], state_dict)
    _require_norms(path, architecture, model_args, state_dict)
    _require_placement(path, architecture, model_args, state_dict)
    _require_experts(path, architecture, model_args, state_dict)
    return matching_tensors(path, model_args, state_dict, expected_shapes(architecture, model_args), sizes=_SIZES)


def _require_norms(
    path: str | os.PathLike[str],
    architecture: Architecture,
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
) -> None:
    """Raise for tensors of the other original, which its norms give away."""
    biases = [name for name in state_dict if _NORM_BIAS.fullmatch(name)]
    if biases and architecture == "nanomoe":
        raise CheckpointError(
            path,
            f"has {listed(biases)} of a LayerNorm, as {_OWNERS['ancestor']}, but model_args of {_OWNERS['nanomoe']},"
            " whose RMSNorm has none",
        )
    if not biases and architecture == "ancestor" and model_args["bias"]:
        raise CheckpointError(
            path,
            "no norm has a bias, as the RMSNorm of "
            f"{_OWNERS['nanomoe']}, but model_args are those of {_OWNERS['ancestor']} with bias=True; expected"
            " transformer.ln_f.bias and its like",
        )


def _require_placement(
    path: str | os.PathLike[str],
    architecture: Architecture,
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
) -> None:
    """Raise unless experts are in the layers that the original puts them in."""
    found = sorted({int(match[1]) for name in state_dict if (match := _EXPERT_TENSOR.fullmatch(name))})
    expected = expert_layers(architecture, model_args)
    if found == expected:
        return
    rules = {
        "nanomoe": "i >= moe_start_layer and (i + 1) % stride == 0",
        "ancestor": "i % stride == 0",
    }
    names = ("n_exp", "stride", "moe_start_layer")
    told = ", ".join(f"{name}={model_args[name]}" for name in names if name in model_args)
    other: Architecture = "ancestor" if architecture == "nanomoe" else "nanomoe"
    theirs = expert_layers(other, {"moe_start_layer": 0} | dict(model_args))
    hint = f"; that is where {_OWNERS[other]} puts them" if found and found == theirs else ""
    raise CheckpointError(
        path,
        f"has experts in {_layers(found)}, expected them in {_layers(expected)}: with {told} a layer i of "
        f"{_OWNERS[architecture]} has experts where n_exp > 1 and {rules[architecture]}{hint}",
    )


def _layers(layers: list[int]) -> str:
    if not layers:
        return "no layer"
    return f"layer{'s' if len(layers) > 1 else ''} {listed(layers)}"


def _require_experts(
    path: str | os.PathLike[str],
    architecture: Architecture,
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
) -> None:
    """Raise for another number of experts, another kind of them, and matrices the wrong way round."""
    for ending, flag in _OPTIONAL_TENSORS.items():
        found = [name for name in state_dict if name.endswith(f".mlp.{ending}")]
        if found and not model_args.get(flag, False):
            said = f"{flag}={model_args[flag]}" if flag in model_args else f"no {flag}, which that original lacks"
            raise CheckpointError(path, f"has {listed(found)}, but model_args has {said}")
    shapes = dict(_expert_shapes(model_args))
    for layer in expert_layers(architecture, model_args):
        for name, shape in shapes.items():
            full_name = f"transformer.h.{layer}.mlp.{name}"
            actual = tuple(state_dict[full_name].shape) if full_name in state_dict else shape
            if actual == shape:
                continue
            if len(actual) == len(shape) and actual[1:] == shape[1:]:
                raise CheckpointError(
                    path, f"{full_name} is of {actual[0]} experts, but model_args has n_exp={model_args['n_exp']}"
                )
            if actual == (shape[0], *reversed(shape[1:])):
                raise CheckpointError(
                    path, f"{full_name} has shape {actual}, transposed; expected {shape}: expert, in, out"
                )
