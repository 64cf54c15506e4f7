# SPDX-License-Identifier: Apache-2.0
"""Compares the Hugging Face model of a directory with the training model in float64 and names where they part.

Both models exist without memory; a module's weights are there, in float64, only while all forward passes go through
it. So each pass runs in a thread of its own that waits before every module, one running at a time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import secrets
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .original import NeoBERTConfig, NeoBERTLMHead

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

BOUND = 1e-9
# Rows of the vocabulary that take part. They do not depend on each other, and all of them would cost as much as layers.
_VOCABULARY = 2048
# Longest text. Beyond it a longer one shows nothing new and takes long.
_LONGEST = 1024
# Multiplications of the weights, over all passes of a model.
_BUDGET = 1 << 33
_VOCABULARY_TENSORS = ("model.encoder.weight", "decoder.weight", "decoder.bias")
_TIED = ("decoder.weight", "model.encoder.weight")
# What is looked at inside a block, in the order in which it is computed, and what a message calls it.
_INSIDE = {
    "attention_norm": "attention_norm",
    "qkv": "qkv",
    "wo": "attention",
    "ffn_norm": "ffn_norm",
    "ffn": "ffn",
    "": "",
}


class ComparisonError(ValueError):
    """The two models differ; the message is one line: the first module that does, by how much, on which input."""


@dataclass(frozen=True)
class Case:
    """One forward pass of either model: token ids (rows, tokens) and, or not, which of them count, 1 or 0."""

    label: str
    ids: Tensor
    mask: Tensor | None


def compare(
    config: NeoBERTConfig,
    directory: Path,
    *,
    layout: Layout,
    load: Callable[[str], Tensor],
) -> None:
    """Make sure that the code and config.json in a directory compute what the training model does, within 1e-9.

    The error is the largest difference over the root mean square of what the training model gives, in float64, after
    the embeddings, inside and after every block, and for the logits; on texts with and without padding, of one token,
    of a few, of the longest and, with rotary positions, one longer. Where the weights are many, the long texts go
    through one layer of one head with the same settings and random weights instead.

    A wrong field in config.json, or fault in the code, shows. What is wrong in `config` itself does not if every
    tensor fits it: a number of heads, an epsilon, an intermediate_size of the same rounded width.

    Args:
        config: the training model's.
        directory: with config.json and the files that it names in auto_map.
        layout: dtype and shape of every tensor that the weight files of the directory will hold.
        load: gives one of those tensors; it is called once for each, in the order of the modules.

    Raises:
        ComparisonError: the models differ, or the Hugging Face model cannot be made or run.
    """
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with _imported(directory, settings) as code:
        _require_tensors(code, settings, layout)
        weights = sum(math.prod(shape) for name, (_, shape) in layout.items() if name not in _VOCABULARY_TENSORS)
        vocabulary = min(config.vocab_size, max(_VOCABULARY, config.pad_token_id + 2))
        weights += vocabulary * config.hidden_size
        short, long = cases(dataclasses.replace(config, vocab_size=vocabulary))
        is_small = sum(case.ids.numel() for case in (*short, *long)) * weights <= _BUDGET
        _compare(
            dataclasses.replace(config, vocab_size=vocabulary),
            code,
            settings | {"vocab_size": vocabulary},
            cases=[*short, *long] if is_small else short,
            names=layout,
            load=lambda name: load(name)[:vocabulary] if name in _VOCABULARY_TENSORS else load(name),
        )
        if not is_small:
            _compare_narrow(config, code, settings)


def cases(config: NeoBERTConfig) -> tuple[list[Case], list[Case]]:
    """Return short texts, with and without padding and masks, and long ones."""
    generator = torch.Generator().manual_seed(0)

    def ids(rows: int, tokens: int) -> Tensor:
        drawn = torch.randint(config.vocab_size - 1, (rows, tokens), generator=generator)
        # Any token but padding: learned positions do not count that.
        return drawn + (drawn >= config.pad_token_id) if config.vocab_size > 1 else drawn

    length = min(5, config.max_length)
    padded, mask = ids(3, length), torch.ones(3, length, dtype=torch.long)
    mask[1, max(1, length - 2) :] = 0
    mask[2, : min(1, length - 1)] = 0
    padded[mask == 0] = config.pad_token_id
    short = [
        Case("one token", ids(1, 1), None),
        Case(f"{length} tokens without a mask", ids(1, length), None),
        Case(f"3 rows of {length} tokens, padded right and left", padded, mask),
    ]
    longest = min(config.max_length, _LONGEST)
    long = [Case(f"{longest} tokens, the longest text", ids(1, longest), None)]
    if config.rope:
        long.append(Case(f"{longest + 1} tokens, one beyond the longest text", ids(1, longest + 1), None))
    return short, long


def _compare_narrow(config: NeoBERTConfig, code: ModuleType, settings: Mapping[str, Any]) -> None:
    """Send the long texts through one layer of one head with random weights, and all other settings as they are."""
    narrow: dict[str, Any] = {
        "hidden_size": config.dim_head,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        # Many, because positions do not show where all tokens are one.
        "vocab_size": 64,
        "pad_token_id": min(config.pad_token_id, 63),
        "max_length": min(config.max_length, _LONGEST),
        "tie_word_embeddings": False,
    }
    small = dataclasses.replace(config, **narrow)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in NeoBERTLMHead(small).state_dict().items()}
    generator = torch.Generator().manual_seed(1)

    def load(name: str) -> Tensor:
        drawn = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        return 1 + 0.2 * drawn if drawn.dim() == 1 else drawn / drawn.shape[-1] ** 0.5

    _, long = cases(small)
    theirs = {**settings, **narrow, "max_position_embeddings": narrow["max_length"]}
    try:
        _compare(small, code, theirs, cases=long, names=shapes, load=load)
    except ComparisonError as error:
        raise ComparisonError(f"{error}, in a layer of one head with random weights") from None


def _require_tensors(code: ModuleType, settings: Mapping[str, Any], layout: Layout) -> None:
    """Raise for a Hugging Face model whose tensors are others than those of the weight files."""
    model = _exported(code, settings)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if _is_tied(model):
        del shapes[_TIED[0]]
    files = {name: shape for name, (_, shape) in layout.items()}
    for name in [*files, *shapes]:
        if files.get(name) != shapes.get(name):
            raise ComparisonError(
                f"{name} differs: the weights have {files.get(name, 'no such tensor')}, the Hugging Face model that"
                f" config.json describes {shapes.get(name, 'no such tensor')}"
            )


def _exported(code: ModuleType, settings: Mapping[str, Any]) -> nn.Module:
    """The Hugging Face model without memory, in evaluation mode."""
    try:
        config = code.NeoBERTConfig.from_dict(dict(settings))
        with torch.device("meta"):
            model: nn.Module = code.NeoBERTLMHead(config).to(torch.float64).eval()
    except Exception as error:  # whatever the code that is looked at raises
        raise ComparisonError(f"the Hugging Face model cannot be made from config.json: {error}") from None
    return model


def _is_tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def _compare(
    config: NeoBERTConfig,
    code: ModuleType,
    settings: Mapping[str, Any],
    *,
    cases: Sequence[Case],
    names: Sequence[str] | Mapping[str, Any],
    load: Callable[[str], Tensor],
) -> None:
    """Take both models through `cases`, module by module."""
    with torch.device("meta"):
        training = NeoBERTLMHead(config).to(torch.float64).eval()
    exported = _exported(code, settings)
    is_tied = _is_tied(exported)
    stages = [f"model.transformer_encoder.{layer}" for layer in range(config.num_hidden_layers)]
    before = ["model.encoder"] if config.rope else ["model.encoder", "model.positional_embedding"]
    stages = [*before, *stages, "model.layer_norm", "decoder"]
    embedding: Tensor | None = None
    room: dict[str, Tensor] = {}  # one layer's weights, for one layer after the other

    pairs = [(_Walk(case, training), _Walk(case, exported)) for case in cases]
    walks = [walk for pair in pairs for walk in pair]
    try:
        with _watched(training, stages), _watched(exported, stages), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training model's, of a text longer than the longest
            for walk in walks:
                walk.advance()
            for stage in stages:
                tensors = {}
                for name in (name for name in names if name.startswith(f"{stage}.")):
                    stored, place = load(name), name.removeprefix(stage)
                    if stage.startswith("model.transformer_encoder."):
                        wide = room.setdefault(place, torch.empty(stored.shape, dtype=torch.float64))
                        tensors[name] = wide.copy_(stored)
                    else:
                        tensors[name] = stored.double()
                if stage == "model.encoder":
                    embedding = tensors["model.encoder.weight"] if is_tied else None
                if stage == "decoder" and embedding is not None:
                    tensors["decoder.weight"] = embedding
                with _weights(training, stage, tensors), _weights(exported, stage, tensors):
                    for walk in walks:
                        walk.require(stage)
                        walk.advance()
                for one, other in pairs:
                    _require_equal(stage, one, other)
            for one, other in pairs:
                _require_close("logits", one.case, one.results["logits"], other.results["logits"])
    finally:
        for walk in walks:
            walk.stop()


def _require_equal(stage: str, one: _Walk, other: _Walk) -> None:
    """Compare what both models computed since the last stage."""
    for tap, expected in one.results.items():
        if tap == "logits":
            continue  # those of the whole model are looked at last
        if tap not in other.results:
            raise ComparisonError(f"{_place(tap)} differs: the Hugging Face model does not call {tap}")
        _require_close(_place(tap), one.case, expected, other.results[tap])
    for walk in (one, other):
        logits = walk.results.get("logits")
        walk.results = {} if logits is None else {"logits": logits}


def _require_close(place: str, case: Case, expected: Tensor, found: Tensor) -> None:
    where = f"on {case.label}"
    if found.shape != expected.shape:
        raise ComparisonError(
            f"{place} differs: shape {tuple(found.shape)}, the training model's is {tuple(expected.shape)}, {where}"
        )
    scale = float(expected.square().mean().sqrt()) or 1.0
    error = float((found - expected).abs().max()) / scale
    # A comparison with a number that is none is false.
    if not error <= BOUND:
        raise ComparisonError(
            f"{place} is the first that differs from the training model's: relative error {error:.1e}, bound"
            f" {BOUND:.0e}, {where}"
        )


def _place(tap: str) -> str:
    """What a message calls an output."""
    parts = tap.split(".")
    if parts[:2] != ["model", "transformer_encoder"]:
        return {
            "model.encoder": "token_embedding",
            "model.positional_embedding": "positional_embedding",
            "model.layer_norm": "final_norm",
        }.get(tap, tap)
    if parts[3:] == ["input"]:
        return "embedding"
    inside = _INSIDE[".".join(parts[3:])]
    return f"block.{parts[2]}" + (f".{inside}" if inside else "")


class _Stopped(BaseException):
    """Ends the thread of a forward pass that nobody waits for."""


_current = threading.local()


@dataclass(eq=False)
class _Walk:
    """One forward pass that stops before each stage, and what it has computed since it was last looked at."""

    case: Case
    model: nn.Module
    results: dict[str, Tensor] = field(default_factory=dict)
    stage: str | None = None
    is_inside: bool = False  # has come to a block
    thread: threading.Thread | None = None
    go: SimpleQueue[bool] = field(default_factory=SimpleQueue)
    came: SimpleQueue[BaseException | None] = field(default_factory=SimpleQueue)

    def advance(self) -> None:
        """Run up to the next stage or to the end."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        else:
            self.go.put(True)
        error = self.came.get()
        if error is not None:
            # Fault of the model: what raises here for both would have been found by the reader of the checkpoint.
            at = _place(self.stage) if self.stage else "the start"
            raise ComparisonError(f"the model fails at {at} on {self.case.label}: {error}") from None

    def require(self, stage: str) -> None:
        """Raise unless the pass waits before this stage."""
        if self.stage != stage:
            at = _place(self.stage) if self.stage else "the end"
            raise ComparisonError(f"{_place(stage)} differs: the model is at {at} instead, on {self.case.label}")

    def stop(self) -> None:
        """End the thread wherever it is."""
        if self.thread is not None:
            self.go.put(False)
            self.thread.join()

    def pause(self, stage: str) -> None:
        """In the thread: wait before a stage."""
        self.stage = stage
        self.came.put(None)
        if not self.go.get():
            raise _Stopped

    def _run(self) -> None:
        _current.walk = self
        error: BaseException | None = None
        try:
            with torch.no_grad():
                self.results["logits"] = _logits(self.model, self.case)
            self.stage = None
        except _Stopped:
            return
        except BaseException as caught:
            error = caught
        self.came.put(error)


def _logits(model: nn.Module, case: Case) -> Tensor:
    if isinstance(model, NeoBERTLMHead):
        pad_mask = None
        if case.mask is not None:
            pad_mask = torch.zeros(case.mask.shape, dtype=torch.float64).masked_fill(case.mask == 0, -math.inf)
        logits: Tensor = model(case.ids, pad_mask)["logits"]
        return logits
    return model(input_ids=case.ids, attention_mask=case.mask).logits  # type: ignore[no-any-return]


@contextmanager
def _watched(model: nn.Module, stages: Sequence[str]) -> Iterator[None]:
    """Make every pass through a model wait before its stages and keep what modules give."""
    handles = []
    modules = dict(model.named_modules())

    def keep(tap: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            _current.walk.results[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def wait(stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            if stage.startswith("model.transformer_encoder.") and not _current.walk.is_inside:
                _current.walk.is_inside = True
                _current.walk.results["model.transformer_encoder.0.input"] = arguments[0]
            _current.walk.pause(stage)

        return hook

    for stage in stages:
        if stage not in modules:
            raise ComparisonError(f"{_place(stage)} differs: the Hugging Face model has no module {stage}")
        handles.append(modules[stage].register_forward_pre_hook(wait(stage)))
        inside = list(_INSIDE) if stage.startswith("model.transformer_encoder.") else [""]
        for name in inside:
            tap = f"{stage}.{name}" if name else stage
            if tap in modules:
                handles.append(modules[tap].register_forward_hook(keep(tap)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _weights(model: nn.Module, stage: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a module its weights, and take them from it again."""
    module = model.get_submodule(stage)
    empty = module.state_dict()
    module.load_state_dict({name.removeprefix(f"{stage}."): t for name, t in tensors.items()}, assign=True)
    try:
        yield
    finally:
        module.load_state_dict(empty, assign=True)


@contextmanager
def _imported(directory: Path, settings: Mapping[str, Any]) -> Iterator[ModuleType]:
    """Import the model's file of a directory, and what it imports from beside it, for as long as it is needed."""
    # Under this name the code knows that it is a copy, and leaves transformers' own tables alone.
    package = f"transformers_modules.neobert_export_{secrets.token_hex(8)}"
    file = str(settings.get("auto_map", {}).get("AutoModelForMaskedLM", "")).partition(".")[0]
    name = f"{package}.{file}"
    parent = ModuleType(package)
    parent.__path__ = [str(directory)]
    sys.modules[package] = parent
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec = importlib.util.spec_from_file_location(name, directory / f"{file}.py")
        if spec is None or spec.loader is None:
            raise ComparisonError("config.json names no file for AutoModelForMaskedLM in auto_map")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the code that is looked at raises
            raise ComparisonError(f"{file}.py cannot be imported from where it is exported to: {error}") from None
        yield module
    finally:
        sys.dont_write_bytecode = writes_bytecode
        for known in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
            del sys.modules[known]
