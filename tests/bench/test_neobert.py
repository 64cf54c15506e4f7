# SPDX-License-Identifier: Apache-2.0
"""NeoBERT: exporting and validating a gigabyte beside a copy of it, and encoding beside other encoders of its size."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.benchmark(group="NeoBERT")

# The default sizes with so many layers that float32 weights are 1.0 GB.
LAYERS = 32
COPIES = 2
WAIT_SECONDS = 600

# What is timed is encoding; the vocabulary costs an encoder nothing.
WIDTH, HEADS, ENCODER_LAYERS, INSIDE, VOCABULARY, LONGEST = 384, 6, 4, 1024, 1024, 512
BATCHES = [(8, 128), (1, 512)]
ENCODINGS = 10

# Starts a program and says what it and the processes it started held at most. Of a large process the child of the
# test itself would inherit the number.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""

# A process that has everything imported, and exports to each directory that it is given.
EXPORTER = """
import sys, torch, transformers
from reference_models.neobert import export, model

if sys.argv[2] == "unchecked":
    # One tensor after the other, and none is kept.
    export.compare = lambda config, staging, *, layout, load: any(load(name) is None for name in layout)
print("ready", flush=True)
for line in sys.stdin:
    export.export(sys.argv[1], output=line.strip())
    print("done", flush=True)
"""


@dataclass(frozen=True)
class Gigabyte:
    """A checkpoint in both layouts, and the directory that it is exported to."""

    checkpoints: dict[str, Path]
    exported: Path

    def megabytes(self, layout: str) -> float:
        """MiB of the weights of a checkpoint."""
        return (self.checkpoints[layout] / layout).stat().st_size / 2**20


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gigabyte]:
    """Random weights: what they are costs nothing."""
    import torch

    from reference_models.neobert.checkpoint import write_run
    from reference_models.neobert.export import export
    from reference_models.neobert.original import NeoBERTConfig, NeoBERTLMHead
    from reference_models.neobert.tokenizer import write_tokenizer

    base = tmp_path_factory.mktemp("gigabyte")
    config = NeoBERTConfig(num_hidden_layers=LAYERS)
    tokenizer = base / "tokenizer"
    write_tokenizer(tokenizer, vocab_size=config.vocab_size, pad_token_id=0, max_length=config.max_length)
    torch.manual_seed(0)
    model = NeoBERTLMHead(config)
    checkpoints = {}
    for layout in ("state_dict.pt", "model.safetensors"):
        checkpoints[layout] = base / layout / "model_checkpoints" / "7"
        write_run(checkpoints[layout], model, tokenizer=tokenizer, layout=layout)  # type: ignore[arg-type]
    del model
    yield Gigabyte(checkpoints, export(checkpoints["state_dict.pt"], output=base / "exported"))
    shutil.rmtree(base)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`places("copy")`: a new place every time. What is written there stays until the end, so that no time is lost."""
    numbers = itertools.count()
    yield lambda name: tmp_path / f"{name}{next(numbers)}"
    for place in tmp_path.iterdir():
        shutil.rmtree(place)


def run_alone(*module: str) -> float:
    """Runs `python -m` with these arguments, which must succeed; the MiB that it held at most."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-m", *module]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=WAIT_SECONDS, check=True)
    status, peak = done.stdout.split()
    assert status == "0", f"{' '.join(module)} exited with status {status}"
    return float(peak)


def copy(directory: Path, place: Path) -> None:
    """Copies the files of a directory and waits until they are on the disk, as the exporter does."""
    place.mkdir()
    for file in directory.iterdir():
        shutil.copyfile(file, place / file.name)
    for written in (*place.iterdir(), place):
        descriptor = os.open(written, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@pytest.mark.parametrize("layout", ["state_dict.pt", "model.safetensors"])
def test_export_command(
    against: Callable[..., None], benchmark: Any, gigabyte: Gigabyte, places: Callable[[str], Path], layout: str
) -> None:
    """With the imports of torch and transformers."""
    peaks: list[float] = []

    def run() -> None:
        checkpoint, place = gigabyte.checkpoints[layout], places("export")
        peaks.append(run_alone("reference_models.neobert.export", str(checkpoint), "--output", str(place)))

    against(run, lambda: copy(gigabyte.exported, places("copy")), rounds=COPIES, warmup=0)
    note_copies(benchmark, f"`export` of {layout}, 1 GB, the whole command", peaks, gigabyte.megabytes(layout))


@pytest.mark.parametrize("way", ["checked", "unchecked"])
def test_export_in_process(
    against: Callable[..., None],
    benchmark: Any,
    gigabyte: Gigabyte,
    places: Callable[[str], Path],
    peak_mib: Callable[[int], float],
    way: str,
) -> None:
    """What is left of the command without imports, and what of that without the comparison of the two models."""
    layout = "state_dict.pt"
    command = [sys.executable, "-c", EXPORTER, str(gigabyte.checkpoints[layout]), way]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None
    assert stdout.readline() == "ready\n"

    def run() -> None:
        print(places("export"), file=stdin, flush=True)
        assert stdout.readline() == "done\n"

    against(run, lambda: copy(gigabyte.exported, places("copy")), rounds=COPIES, warmup=0)
    what = {"checked": "", "unchecked": ", without comparing the models"}[way]
    peak = peak_mib(process.pid)
    process.communicate(timeout=WAIT_SECONDS)
    note_copies(benchmark, f"`export()` of {layout}, 1 GB{what}", [peak], gigabyte.megabytes(layout))


def test_validate_command(benchmark: Any, gigabyte: Gigabyte) -> None:
    peaks: list[float] = []
    benchmark.pedantic(
        lambda: peaks.append(run_alone("reference_models.neobert.validate", str(gigabyte.exported))), rounds=1
    )
    benchmark.extra_info["what"] = "`validate` of what was exported, the whole command"
    note_peak(benchmark, peaks, gigabyte.megabytes("state_dict.pt"))


def note_copies(benchmark: Any, what: str, peaks: list[float], file: float) -> None:
    benchmark.extra_info.update(what=what, baseline="a copy of what it writes, 2 GB")
    note_peak(benchmark, peaks, file)


def note_peak(benchmark: Any, peaks: list[float], file: float) -> None:
    benchmark.extra_info.update(process_mib=max(peaks), process_over_file=max(peaks) / file)


# Encoding


SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": ENCODER_LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
}
# NeoBERT has two thirds of it inside, for it has three matrices there.
NOMINAL = INSIDE * 3 // 2


def make_port() -> Any:
    from reference_models.neobert.configuration_neobert import NeoBERTConfig
    from reference_models.neobert.model import NeoBERT

    config = NeoBERTConfig(**SIZES, intermediate_size=NOMINAL, max_length=LONGEST, attn_implementation="sdpa")
    return NeoBERT(config)


def make_original(port: Any) -> Any:
    """The training model with the port's weights."""
    from reference_models.neobert.original import NeoBERT, NeoBERTConfig

    original = NeoBERT(NeoBERTConfig(**SIZES, intermediate_size=NOMINAL, max_length=LONGEST))
    original.load_state_dict(port.state_dict())
    return original


def make_bert(port: Any) -> Any:
    """As many weights in a layer: two matrices inside, half as wide again, for three."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **SIZES,
        intermediate_size=NOMINAL,
        max_position_embeddings=LONGEST,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


def make_modernbert(port: Any) -> Any:
    """As many weights, its own GLU, and attention to the whole text in every layer."""
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        **SIZES,
        intermediate_size=INSIDE,
        max_position_embeddings=LONGEST,
        global_attn_every_n_layers=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        attn_implementation="sdpa",
    )
    return ModernBertModel(config)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "the training model": make_original,
    "BERT": make_bert,
    "ModernBERT": make_modernbert,
}


def weights_of_layers(model: Any) -> int:
    """How many numbers there are in the matrices of linear layers."""
    return sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "Linear")


def padded_batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the mask of transformers: an eighth of the last row is padding, less of the others."""
    import torch

    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, length - (row + 1) * length // (8 * rows) :] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("rows", "length"), BATCHES)
def test_encode(against: Callable[..., None], benchmark: Any, rows: int, length: int, other: str) -> None:
    """All hidden states after the last norm, in evaluation and without gradients."""
    import torch

    torch.manual_seed(0)
    port = make_port().eval()
    model = OTHERS[other](port).eval()
    assert weights_of_layers(port) == weights_of_layers(model)
    ids, mask = padded_batch(rows, length)
    added = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))

    def run() -> torch.Tensor:
        with torch.no_grad():
            states: torch.Tensor = port(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    def baseline() -> torch.Tensor:
        with torch.no_grad():
            if other == "the training model":
                return model(ids, added)  # type: ignore[no-any-return]
            return model(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]

    assert run().shape == baseline().shape
    if other == "the training model":
        torch.testing.assert_close(run(), baseline())
    against(run, baseline, rounds=ENCODINGS)
    benchmark.extra_info.update(what=f"encoding {rows} x {length} tokens", baseline=other)
    benchmark.extra_info["encoded_per_second"] = rows * length / benchmark.stats.stats.median
