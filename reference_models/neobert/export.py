# SPDX-License-Identifier: Apache-2.0
"""Exports a NeoBERT training checkpoint to a directory that transformers loads with trust_remote_code=True.

    python -m reference_models.neobert.export CHECKPOINT [--output DIR]

Exit status: 0 the directory is there, 2 it is not, for the reason in the one line on standard error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import math
import os
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .checkpoint import DECODER, DECODER_BIAS, CheckpointError, layout, read_run, read_weight, to_disk, whole_directory
from .comparison import ComparisonError, compare
from .original import NeoBERTConfig
from .readme import model_card
from .tensor_writer import Layout, safetensors_file, torch_file
from .tokenizer_assets import read_assets, write_assets

# The files that make the model, and travel with its weights.
CODE = ("configuration_neobert.py", "model.py", "rotary.py")
AUTO_MAP = {
    "AutoConfig": "configuration_neobert.NeoBERTConfig",
    "AutoModel": "model.NeoBERT",
    "AutoModelForMaskedLM": "model.NeoBERTLMHead",
    "AutoModelForSequenceClassification": "model.NeoBERTForSequenceClassification",
}
_SAME_NAMES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "norm_eps",
    "pad_token_id", "rms_norm", "rope", "hidden_act", "embedding_init_range", "decoder_init_range", "dropout",
    "tie_word_embeddings",
)  # fmt: skip
_WAITING = 2  # tensors that were read and are not written yet
_UNFLUSHED = 1 << 26  # bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m reference_models.neobert.export",
        description="Exports a NeoBERT training checkpoint to a directory that transformers loads.",
    )
    parser.add_argument("checkpoint", help="directory <run>/model_checkpoints/<step>")
    parser.add_argument("-o", "--output", help="a new or an empty directory; by default <run>/hf/<name of run>_<step>")
    given = parser.parse_args(arguments)
    try:
        with _ended_by_sigterm(), warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            directory = export(given.checkpoint, output=given.output)
    except (CheckpointError, ComparisonError) as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"{error.filename}: {error.strerror}; nothing was exported")
    except KeyboardInterrupt:
        print("error: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    for note in notes:
        if issubclass(note.category, UserWarning):
            print(f"note: {note.message}", file=sys.stderr)
    print(directory)
    return 0


def _refused(reason: str) -> int:
    # A path, or a name in a file, may have line breaks in it.
    print(f"error: {' '.join(reason.splitlines())}", file=sys.stderr)
    return 2


def export(checkpoint: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Path:
    """Write the Hugging Face directory of a training checkpoint, complete or not at all, and return where it is.

    One tensor is in memory at a time, and the weights of one layer in float64: before the directory appears, the
    model that is in it is compared with the training model, see `comparison.compare`. Every tensor keeps its dtype and
    bits; where embedding and decoder are tied, the embedding alone is written, as `save_pretrained` does.

    Args:
        checkpoint: see `checkpoint.read_run`.
        output: a new or an empty directory; by default `hf/<run>_<step>` of the run that `checkpoint` is a step of.

    Raises:
        CheckpointError: the checkpoint is damaged, hostile or not one of a model that can be exported, or its
            tokenizer is missing or another's.
        ComparisonError: the exported model would not compute what the training model does.
        OSError: the directory has something in it or cannot be written; nothing is left behind.
    """
    run = read_run(checkpoint)
    assets = read_assets(run.tokenizer, run.fields)
    directory = _real_path(output if output is not None else default_output(checkpoint))
    written = layout(run)
    if run.fields["tie_word_embeddings"]:
        del written[DECODER]
    if DECODER_BIAS not in run.tensors:
        warnings.warn(f"{run.source.path}: has no {DECODER_BIAS}; zeros are exported in its place", stacklevel=2)
    with whole_directory(directory) as staging:
        config = json.dumps(config_fields(run.fields, written), indent=2, allow_nan=False)
        (staging / "config.json").write_text(config + "\n", encoding="utf-8")
        for name in CODE:
            (staging / name).write_bytes(Path(__file__).with_name(name).read_bytes())
        write_assets(assets, staging)
        card = model_card(run, assets, directory=directory, layout=written)
        (staging / "README.md").write_text(card, encoding="utf-8")
        with _weight_files(staging, written) as write:

            def load(name: str) -> Tensor:
                tensor = read_weight(run, name)
                write(name, tensor)
                return tensor

            compare(NeoBERTConfig(**run.fields), staging, layout=written, load=load)
    return directory


def _real_path(path: str | os.PathLike[str]) -> Path:
    """The path without links. Raises OSError for one that cannot be, or that the README could not name."""
    real = os.fspath(path)
    try:
        real = os.path.realpath(real)
        real.encode("utf-8")
    except ValueError:
        raise OSError(errno.EINVAL, "is not a path in UTF-8; expected one", ascii(real)) from None
    return Path(real)


def default_output(checkpoint: str | os.PathLike[str]) -> Path:
    """Return `<run>/hf/<name of run>_<step>` for a checkpoint `<run>/model_checkpoints/<step>`."""
    place = Path(os.path.realpath(checkpoint))
    run = place.parent.parent
    return run / "hf" / f"{run.name}_{place.name}"


def config_fields(fields: Mapping[str, Any], written: Layout) -> dict[str, Any]:
    """Return what config.json holds.

    Args:
        fields: of the training model's configuration.
        written: dtype and shape of every tensor in the weight files.
    """
    defaults = {"embedding_init_range": 0.02, "decoder_init_range": 0.02, "dropout": 0.0}
    counts: Counter[torch.dtype] = Counter()
    for dtype, shape in written.values():
        counts[dtype] += math.prod(shape)
    return {
        "architectures": ["NeoBERTLMHead"],
        "model_type": "neobert",
        "auto_map": AUTO_MAP,
        **{name: fields[name] if name in fields else defaults[name] for name in _SAME_NAMES},
        "max_length": fields["max_length"],
        "max_position_embeddings": fields["max_length"],
        "flash_attention": fields.get("attn_backend", "sdpa") != "sdpa",
        "torch_dtype": str(counts.most_common(1)[0][0]).removeprefix("torch."),
        "transformers_version": importlib.metadata.version("transformers"),
    }


@contextmanager
def _weight_files(directory: Path, written: Layout) -> Iterator[Callable[[str, Tensor], None]]:
    """Give a function that hands a tensor to both files; they are written beside what the caller does meanwhile."""
    files = (directory / "model.safetensors", directory / "pytorch_model.bin")
    waiting: deque[Future[None]] = deque()
    flushed: deque[Future[None]] = deque()
    unflushed = 0
    with (
        safetensors_file(files[0], written) as write_safetensors,
        torch_file(files[1], written) as write_torch,
        ThreadPoolExecutor(max_workers=1) as writer,
        ThreadPoolExecutor(max_workers=1) as flusher,
    ):

        def write_both(name: str, tensor: Tensor) -> None:
            write_safetensors(name, tensor)
            write_torch(name, tensor)

        def write(name: str, tensor: Tensor) -> None:
            nonlocal unflushed
            while len(waiting) >= _WAITING:
                waiting.popleft().result()
            waiting.append(writer.submit(write_both, name, tensor))
            unflushed += tensor.nbytes
            if unflushed >= _UNFLUSHED and all(flush.done() for flush in flushed):
                # So that the disk is at work already, and not all of it is left to the end.
                flushed.extend(flusher.submit(to_disk, file) for file in files)
                unflushed = 0

        yield write
        while waiting:
            waiting.popleft().result()
        while flushed:
            flushed.popleft().result()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the program as an exception does, so that what is half-written is removed."""

    def end(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
