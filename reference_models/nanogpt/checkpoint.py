# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's own checkpoint file, `ckpt.pt`: read in each of its dialects, written so that nanoGPT can resume.

The dialects are those of karpathy/nanoGPT from its first revision to commit
3adf61e154c3fe3fca428ad6bc3818b27a3b8291, and of the ports that kept GPT-2's mask buffers. What reading and writing
need in any file of that form is public, for the models that descend from nanoGPT.
"""

from __future__ import annotations

import os
import pickle
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
_COMPILED_PREFIX = "_orig_mod."
_MASK_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
_REQUIRED_ARGS = ("n_layer", "n_head", "n_embd", "block_size")
_OPTIONAL_ARGS = ("bias", "vocab_size", "dropout")
_SIZES = ("block_size", "vocab_size", "n_embd", "bias")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CheckpointError(ValueError):
    """A file is not a usable checkpoint; the message is one line: the file, what is wrong, what was expected."""

    def __init__(self, path: str | os.PathLike[str], fault: str) -> None:
        super().__init__(f"{os.fspath(path)}: {' '.join(fault.split())}")


@dataclass(frozen=True)
class NanoGPTCheckpoint:
    """What a checkpoint holds, in one form whatever its dialect.

    `model_args` has all of `GPTConfig`'s fields, `state_dict` exactly the keys of the original's, with one tensor
    for the embedding and the head.
    """

    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    iter_num: int = 0
    best_val_loss: float = 1e9
    config: dict[str, Any] = field(default_factory=dict)


def load_checkpoint(path: str | os.PathLike[str]) -> NanoGPTCheckpoint:
    """Read a nanoGPT checkpoint onto the CPU without running any code from it.

    Understood are files with and without biases; with the prefix of a compiled model; with the causal masks
    that revisions before torch 2 stored; without `bias` (there was one), `vocab_size` (then 50257; the rows of the
    embedding say so), `dropout`, `iter_num`, `best_val_loss`, `config` or the head. Where head and embedding differ
    the head wins with a warning, because that is what nanoGPT's own loading does.

    Raises:
        CheckpointError: the file is missing, truncated, not a zip archive or holds anything but tensors and
            plain values, or its tensors are not exactly those that its `model_args` ask for, all finite.
    """
    contents = read_entries(path)
    state_dict = named_tensors(path, contents["model"])
    model_args = _check_model_args(path, contents["model_args"], state_dict)
    progress = training_progress(path, contents)
    require_layers(path, model_args["n_layer"], state_dict)
    return NanoGPTCheckpoint(
        model_args=model_args,
        state_dict=matching_tensors(path, model_args, state_dict, expected_shapes(model_args)),
        **progress,
    )


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    iter_num: int = 0,
    best_val_loss: float = 1e9,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that nanoGPT's `train.py` resumes from and its strict loading accepts.

    The optimizer starts anew with `train.py`'s default settings: a port has no moments to hand over, but
    resuming demands the entry. The file appears complete or not at all, whatever interrupts the writing.

    Raises:
        OSError: the file cannot be written; the message names it.
        ValueError: the tensors are not those of a nanoGPT model with these `model_args`.
    """
    names = expected_shapes(model_args)
    if unpaired := sorted(set(names) ^ set(state_dict)):
        raise ValueError(f"these tensors are missing, or unknown to nanoGPT: {listed(unpaired)}")
    tensors = {name: own_storage(state_dict[name]) for name in names}
    tensors[HEAD] = tensors[EMBEDDING]
    contents = {
        "model": tensors,
        "optimizer": fresh_optimizer_state(tensors),
        "model_args": dict(model_args),
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": dict(config or {}),
    }
    write_whole(path, contents)


def expected_shapes(model_args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a model, in the order of the original's state dict."""
    width, vocab_size = model_args["n_embd"], model_args["vocab_size"]

    def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if model_args["bias"] else {})

    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab_size, width),
        "transformer.wpe.weight": (model_args["block_size"], width),
    }
    for layer in range(model_args["n_layer"]):
        block = f"transformer.h.{layer}"
        shapes |= affine(f"{block}.ln_1", width)
        shapes |= affine(f"{block}.attn.c_attn", 3 * width, width)
        shapes |= affine(f"{block}.attn.c_proj", width, width)
        shapes |= affine(f"{block}.ln_2", width)
        shapes |= affine(f"{block}.mlp.c_fc", 4 * width, width)
        shapes |= affine(f"{block}.mlp.c_proj", width, 4 * width)
    shapes |= affine("transformer.ln_f", width)
    return shapes | {HEAD: (vocab_size, width)}


def read_entries(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """Return what train.py saved, with dictionaries under `model` and `model_args`; see `read_archive`."""
    contents = read_archive(path)
    if not isinstance(contents, Mapping):
        raise CheckpointError(path, f"holds a {type(contents).__name__}, expected a dictionary with 'model'")
    for key in ("model", "model_args"):
        if not isinstance(contents.get(key), Mapping):
            found = ", ".join(sorted(map(str, contents))[:8]) or "nothing"
            raise CheckpointError(path, f"has no dictionary under the key {key!r}; found: {found}")
    return contents


def read_archive(path: str | os.PathLike[str]) -> Any:
    """Unpickle tensors and plain values onto the CPU, and nothing else; raises CheckpointError for any other file."""
    with reading(path) as file:
        with open_archive(path, file) as archive:
            # torch does not look at the checksums that it writes.
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(path, f"is damaged: {damaged} does not have the checksum it was written with")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a checkpoint; whatever goes wrong while it is read and unpickled is raised as a CheckpointError."""
    try:
        with open(path, "rb") as file:
            yield file
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(path, "not found; expected a checkpoint that train.py wrote") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise CheckpointError(
            path, f"its pickle would run code or make an object{what}; expected only tensors and plain values"
        ) from None
    except Exception as error:  # a damaged archive fails in many ways inside torch
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(path, f"is damaged or truncated: {reason[0][:200]}") from None


def open_archive(path: str | os.PathLike[str], file: BinaryIO) -> zipfile.ZipFile:
    """Return a whole zip archive that does not unpack to more than itself; raises CheckpointError for another file."""
    head = file.read(4)
    if not zipfile.is_zipfile(file):
        fault = "is a truncated zip archive" if head.startswith(b"PK") else "is not a zip archive"
        raise CheckpointError(path, f"{fault}; expected a file that torch.save wrote")
    archive = zipfile.ZipFile(file)
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > file.seek(0, os.SEEK_END):
        raise CheckpointError(path, f"would unpack to {unpacked} bytes; expected no more than its own size")
    return archive


def named_tensors(path: str | os.PathLike[str], model: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Strip the prefix of a compiled model and put the tied tensor under both of its names."""
    state_dict = {str(name).removeprefix(_COMPILED_PREFIX): tensor for name, tensor in model.items()}
    if len(state_dict) != len(model):
        raise CheckpointError(path, f"has tensors both with and without the prefix {_COMPILED_PREFIX!r}")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(path, f"{name} is a {type(tensor).__name__}, expected a tensor")
    for name, twin in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        if name in state_dict:
            state_dict.setdefault(twin, state_dict[name])
    return state_dict


def _check_model_args(
    path: str | os.PathLike[str], given: Mapping[Any, Any], state_dict: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return all hyperparameters, with what older files left out filled in."""
    if missing := [name for name in _REQUIRED_ARGS if name not in given]:
        raise CheckpointError(path, f"model_args lacks {', '.join(missing)}")
    if unknown := sorted(str(name) for name in given if name not in _REQUIRED_ARGS + _OPTIONAL_ARGS):
        raise CheckpointError(
            path,
            f"model_args has {', '.join(unknown)}, expected {', '.join(_REQUIRED_ARGS + _OPTIONAL_ARGS)}",
        )
    embedding = state_dict.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.ndim == 2 else 50257
    args = {"bias": True, "vocab_size": rows, "dropout": 0.0} | {str(name): given[name] for name in given}
    for name in (*_REQUIRED_ARGS, "vocab_size"):
        if not isinstance(args[name], int) or isinstance(args[name], bool) or args[name] < 1:
            raise CheckpointError(path, f"model_args has {name}={args[name]!r}, expected a whole number above 0")
    if args["n_embd"] % args["n_head"] != 0:
        raise CheckpointError(
            path, f"model_args has n_embd={args['n_embd']}, expected a multiple of n_head={args['n_head']}"
        )
    if not isinstance(args["bias"], bool):
        raise CheckpointError(path, f"model_args has bias={args['bias']!r}, expected True or False")
    dropout = args["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(path, f"model_args has dropout={dropout!r}, expected a number from 0 up to 1")
    return args


def training_progress(path: str | os.PathLike[str], contents: Mapping[Any, Any]) -> dict[str, Any]:
    """Return `iter_num`, `best_val_loss` and `config` of what train.py saved, or what stands for each where it did not.

    Raises:
        CheckpointError: one of them is not a number, or not a dictionary.
    """
    iter_num, best_val_loss = contents.get("iter_num", 0), contents.get("best_val_loss", 1e9)
    config = contents.get("config", {})
    try:
        iter_num, best_val_loss = int(iter_num), float(best_val_loss)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise CheckpointError(path, "iter_num and best_val_loss are expected to be numbers") from None
    if not isinstance(config, Mapping):
        raise CheckpointError(path, f"config is a {type(config).__name__}, expected a dictionary")
    return {"iter_num": iter_num, "best_val_loss": best_val_loss, "config": dict(config)}


def require_layers(path: str | os.PathLike[str], n_layer: int, state_dict: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a model of a billion layers, before its list of names is made."""
    if n_layer > len(state_dict):
        raise CheckpointError(path, f"model_args has n_layer={n_layer}, but there are {len(state_dict)} tensors")


def matching_tensors(
    path: str | os.PathLike[str],
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    sizes: Sequence[str] = _SIZES,
) -> dict[str, Tensor]:
    """Return the weights in the order of `shapes`, with one tensor for the embedding and the head.

    Args:
        path: the file, for messages.
        model_args: hyperparameters; `block_size` is that of causal masks among the tensors, which are left out.
        state_dict: the tensors under the original's names, see `named_tensors`.
        shapes: name and shape of every tensor of the model.
        sizes: hyperparameters that a message about a wrong shape names.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, not a dense one of floating-point numbers,
            larger than its data, or not finite.
    """
    shapes = dict(shapes)
    masks = {name for name in state_dict if _MASK_BUFFER.fullmatch(name)}
    if missing := [name for name in shapes if name not in state_dict]:
        raise CheckpointError(path, f"tensors are missing: {listed(missing)}")
    if left_over := [name for name in state_dict if name not in shapes and name not in masks]:
        raise CheckpointError(path, f"tensors are left over, not part of the model: {listed(left_over)}")
    block_size = model_args["block_size"]
    for name in masks:
        shapes[name] = (1, 1, block_size, block_size) if name.endswith(".bias") else ()
    for name, shape in shapes.items():
        tensor = state_dict[name]
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            told = ", ".join(f"{size}={model_args[size]}" for size in sizes)
            raise CheckpointError(path, f"{name} has shape {found}, expected {shape} from model_args {told}")
        if name in masks:
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
            raise CheckpointError(path, f"{name} is {tensor.dtype}, expected a dense tensor of {listed(_DTYPES)}")
        # A small file can claim a huge tensor by repeating one number.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(path, f"{name} is larger than its data, expected all numbers in the file")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(path, f"{name} contains NaN or infinite values, expected finite weights")
    head, embedding = state_dict[HEAD], state_dict[EMBEDDING]
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        warnings.warn(
            f"{os.fspath(path)}: {HEAD} and {EMBEDDING} differ although they are one tensor in nanoGPT; "
            f"{HEAD} is used, as nanoGPT itself would",
            stacklevel=3,
        )
    weights = {name: state_dict[name].detach() for name in shapes if name not in masks}
    return weights | {EMBEDDING: weights[HEAD]}


def listed(names: Iterable[Any]) -> str:
    """Return the first five names, and how many more there are."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, not as a view: torch.save writes whatever lies under a view as well."""
    tensor = tensor.detach().cpu().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def fresh_optimizer_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state of the AdamW that `train.py` would make of all parameters but the head, before its first step.

    Tensors of two axes or more decay, unless they are biases, as those of nanoMoE's experts, which have three.
    """
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items() if name != HEAD}
    decays = {name: tensor.dim() >= 2 and not name.endswith("bias") for name, tensor in parameters.items()}
    groups = [
        {"params": [tensor for name, tensor in parameters.items() if decays[name]], "weight_decay": 0.1},
        {"params": [tensor for name, tensor in parameters.items() if not decays[name]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def write_whole(path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Write what torch.save takes; the file appears complete or not at all. Raises OSError that names it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write(contents, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _write(contents: Mapping[str, Any], path: Path) -> None:
    """Write a new file down to the disk."""
    try:
        with open(path, "xb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # torch's writer hides what stopped it, a full disk or an interrupt, behind an error of its own.
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        raise cause or error from None
