# SPDX-License-Identifier: Apache-2.0
"""MLX BERT: encoding and loading at BERT-base's sizes, beside other BERTs on MLX and on torch."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from harness.backends.mlx import device_name  # noqa: E402
from reference_models.mlx_bert.config import BertConfig  # noqa: E402
from reference_models.mlx_bert.core import BertCore  # noqa: E402

if TYPE_CHECKING:
    import transformers

pytestmark = pytest.mark.benchmark(group="MLX BERT")

LAYERS = 12
# Rows, length, layers and rounds. The BLAS of MLX's Linux wheel is so slow that all layers of a large batch would take
# it half an hour in each round; the layers are alike, and the embeddings before them take no time.
BATCHES = [(1, 128, LAYERS, 5), (1, 512, LAYERS, 3), (32, 128, 1, 3), (32, 512, 1, 2)]
LOADINGS = 3
WAIT_SECONDS = 600

# A process that has everything imported, and loads what it is given. transformers only maps the file into memory, so
# that a sum reads its weights; ours are read when `from_pretrained` returns.
LOADERS = {
    "mlx": """
import sys
from reference_models.mlx_bert.core import BertCore

print("ready", flush=True)
model = BertCore.from_pretrained(sys.stdin.readline().strip())
print("loaded", flush=True)
sys.stdin.read()
""",
    "transformers": """
import sys, torch
from transformers import BertModel

print("ready", flush=True)
model = BertModel.from_pretrained(sys.stdin.readline().strip())
sum(weight.sum().item() for weight in model.parameters())
print("loaded", flush=True)
sys.stdin.read()
""",
}

# Takes ids and mask, (rows, tokens), and gives what encodes them: it returns hidden states that are all computed.
Encoder = Callable[[np.ndarray, np.ndarray], Callable[[], Any]]


@pytest.mark.parametrize(("rows", "length", "layers", "rounds"), BATCHES)
def test_encode(
    against_each: Callable[..., dict[str, dict[str, float]]],
    benchmark: Any,
    rows: int,
    length: int,
    layers: int,
    rounds: int,
) -> None:
    """All hidden states of the last layer in float32, from ids and a mask of 1 and 0."""
    mx.random.seed(0)
    core = BertCore(BertConfig(num_hidden_layers=layers))
    mx.eval(core.parameters())
    ours, others = mlx_encoder(lambda ids, mask: core(ids, mask).last_hidden_state), other_encoders(core)
    small = batch(2, 8, core.config)
    for name, encoder in others.items():
        np.testing.assert_allclose(ours(*small)(), encoder(*small)(), rtol=0, atol=1e-4, err_msg=name)
    measured_batch = batch(rows, length, core.config)
    measured = against_each(
        ours(*measured_batch), {name: encoder(*measured_batch) for name, encoder in others.items()}, rounds=rounds
    )
    part = "" if layers == LAYERS else f", timed with {layers} layer of {LAYERS}"
    benchmark.extra_info.update(what=f"encoding {rows} x {length} tokens on MLX's {device_name()}{part}")
    benchmark.extra_info["others"] = measured
    benchmark.extra_info["sentences_per_second"] = rows * layers / LAYERS / benchmark.stats.stats.median


def test_load(against: Callable[..., None], benchmark: Any, tmp_path: Path, peak_mib: Callable[[int], float]) -> None:
    """A checkpoint of 438 MB in processes that have the imports behind them."""
    import transformers

    transformers.BertModel(bert_config(LAYERS)).save_pretrained(tmp_path)
    processes = {name: [loader(name) for _ in range(LOADINGS)] for name in LOADERS}
    left = {name: iter(started) for name, started in processes.items()}
    against(
        lambda: load(next(left["mlx"]), tmp_path),
        lambda: load(next(left["transformers"]), tmp_path),
        rounds=LOADINGS,
        warmup=0,
    )
    peaks = {name: max(peak_mib(process.pid) for process in started) for name, started in processes.items()}
    for process in [*processes["mlx"], *processes["transformers"]]:
        process.communicate(timeout=WAIT_SECONDS)
    file = (tmp_path / "model.safetensors").stat().st_size / 2**20
    benchmark.extra_info.update(
        what=f"loading BERT-base, {file:.0f} MiB, to MLX's {device_name()}",
        baseline="transformers",
        process_mib=peaks["mlx"],
        process_over_file=peaks["mlx"] / file,
        baseline_process_mib=peaks["transformers"],
    )


def batch(rows: int, length: int, config: BertConfig) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask: an eighth of the last row is padding."""
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (rows, length))
    mask = np.ones_like(ids)
    mask[-1, length - length // 8 :] = 0
    return ids * mask, mask


def mlx_encoder(forward: Callable[[Any, Any], Any]) -> Encoder:
    """Of a function of MLX arrays."""

    def encoder(ids: np.ndarray, mask: np.ndarray) -> Callable[[], Any]:
        arrays = mx.array(ids, dtype=mx.int32), mx.array(mask, dtype=mx.int32)

        def encode() -> Any:
            states = forward(*arrays)
            mx.eval(states)
            return states

        return encode

    return encoder


def other_encoders(core: BertCore) -> dict[str, Encoder]:
    """What `core` is measured against, with its weights: itself compiled, other layers of MLX, and torch."""
    found = mlx_embeddings_bert()
    compiled = mx.compile(lambda ids, mask: core(ids, mask).last_hidden_state)
    others = {"ours under mx.compile": mlx_encoder(compiled)}
    if found is None:
        others["plain mlx.nn layers (mlx-embeddings is not installed)"] = mlx_encoder(plain_layers(core))
    else:
        others["mlx-embeddings"] = mlx_encoder(mlx_embeddings_forward(core, found))
    return {**others, **torch_encoders(core)}


def mlx_embeddings_bert() -> Any:
    """mlx-embeddings' own module with its BERT, None where the package is not installed.

    The module needs nothing beside MLX; what the package imports first, mlx-vlm, need not be there.
    """
    found = importlib.util.find_spec("mlx_embeddings")
    if found is None:
        return None
    name = "mlx_embeddings_models"
    directory = Path(found.submodule_search_locations[0]) / "models"
    package = importlib.util.spec_from_file_location(
        name, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    sys.modules[name] = importlib.util.module_from_spec(package)
    return importlib.import_module(f"{name}.bert")


def mlx_embeddings_forward(core: BertCore, bert: Any) -> Callable[[Any, Any], Any]:
    sizes = bert_config(core.config.num_hidden_layers).to_dict()
    model = bert.Model(bert.ModelArgs.from_dict(sizes))
    model.eval()
    model.load_weights(tree_flatten(core.parameters()))
    return lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state


def plain_layers(core: BertCore) -> Callable[[Any, Any], Any]:
    """BERT of mlx.nn's own layers and the formula of attention, as it is written without a thought for speed."""
    config, weights = core.config, dict(tree_flatten(core.parameters()))
    heads, epsilon = config.num_attention_heads, config.layer_norm_eps

    def filled(layer: Any, name: str) -> Any:
        layer.update({key: weights[f"{name}.{key}"] for key in layer.parameters()})
        return layer

    def linear(name: str) -> Any:
        outputs, inputs = weights[f"{name}.weight"].shape
        return filled(nn.Linear(inputs, outputs), name)

    def norm(name: str) -> Any:
        return filled(nn.LayerNorm(config.hidden_size, eps=epsilon), name)

    tables = [weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "token_type", "position")]
    first_norm = norm("embeddings.LayerNorm")
    names = ("query", "key", "value")
    layers = [
        (
            [linear(f"encoder.layer.{index}.attention.self.{name}") for name in names],
            linear(f"encoder.layer.{index}.attention.output.dense"),
            norm(f"encoder.layer.{index}.attention.output.LayerNorm"),
            linear(f"encoder.layer.{index}.intermediate.dense"),
            linear(f"encoder.layer.{index}.output.dense"),
            norm(f"encoder.layer.{index}.output.LayerNorm"),
        )
        for index in range(config.num_hidden_layers)
    ]

    def forward(ids: Any, mask: Any) -> Any:
        word, token_type, position = tables
        added = mx.where(mask[:, None, None, :] == 0, -1e4, 0.0)
        hidden = first_norm(word[ids] + token_type[0] + position[: ids.shape[1]])
        for projections, mix, mixed_norm, widen, narrow, last_norm in layers:
            query, key, value = (mx.unflatten(one(hidden), -1, (heads, -1)).swapaxes(1, 2) for one in projections)
            scores = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5 + added
            mixed = mx.softmax(scores, axis=-1) @ value
            hidden = mixed_norm(hidden + mix(mx.flatten(mixed.swapaxes(1, 2), 2)))
            hidden = last_norm(hidden + narrow(nn.gelu(widen(hidden))))
        return hidden

    return forward


def bert_config(layers: int) -> transformers.BertConfig:
    """BERT-base with so many layers; its sizes are the defaults here and in `BertConfig` of ours."""
    import transformers

    return transformers.BertConfig(num_hidden_layers=layers, attn_implementation="sdpa")


def torch_encoders(core: BertCore) -> dict[str, Encoder]:
    """transformers' BertModel with one thread, as MLX's Linux wheel has it, and with all that torch would take."""
    import torch
    import transformers

    model = transformers.BertModel(bert_config(core.config.num_hidden_layers)).eval()
    weights = {name: torch.from_numpy(np.array(weight)) for name, weight in tree_flatten(core.parameters())}
    model.load_state_dict(weights)

    def with_threads(threads: int) -> Encoder:
        def encoder(ids: np.ndarray, mask: np.ndarray) -> Callable[[], Any]:
            tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

            def encode() -> Any:
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                with torch.no_grad():
                    states = model(**tensors).last_hidden_state
                torch.set_num_threads(before)
                return states

            return encode

        return encoder

    counts = dict.fromkeys((1, torch.get_num_threads()))
    return {f"torch with {count} thread{'s' * (count > 1)}": with_threads(count) for count in counts}


def loader(name: str) -> subprocess.Popen[str]:
    """A process that waits for a directory to load."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADERS[name]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert answer(process) == "ready\n"
    return process


def load(process: subprocess.Popen[str], directory: Path) -> None:
    print(directory, file=process.stdin, flush=True)
    assert answer(process) == "loaded\n"


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
