# SPDX-License-Identifier: Apache-2.0
"""Trains a small NeoBERT as a masked language model on a text, in seconds, and writes the run's checkpoint.

python -m reference_models.neobert.train OUT [--steps N] [--seed S] [--layout model.safetensors] [--text FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from reference_models.neobert.checkpoint import CheckpointError, write_run
from reference_models.neobert.original import NeoBERTConfig, NeoBERTLMHead, masked_lm_loss
from reference_models.neobert.tokenizer import write_tokenizer

Layout = Literal["state_dict.pt", "model.safetensors"]

# Only a clone of the repository has it; an installed package is given a text.
DEFAULT_TEXT = Path(__file__).resolve().parents[2] / "fixtures" / "text" / "sentences.txt"
DEFAULT_CONFIG = NeoBERTConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    vocab_size=256,
    max_length=64,
    norm_eps=1e-5,
    # Wider than the default, which is meant for a width of 768 and would take these few steps to grow.
    embedding_init_range=0.15,
    decoder_init_range=0.15,
)
IGNORED = -100


class TrainingError(ValueError):
    """What was asked for cannot be trained; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Where the checkpoint is, and the mean loss over the whole text, with the same tokens masked, before and after."""

    directory: Path
    loss_before: float
    loss_after: float


def train(
    output: Path,
    *,
    text: Path = DEFAULT_TEXT,
    steps: int = 300,
    seed: int = 0,
    layout: Layout = "state_dict.pt",
    config: NeoBERTConfig = DEFAULT_CONFIG,
    rows: int = 32,
    learning_rate: float = 3e-3,
) -> Trained:
    """Trains `steps` steps on `rows` lines each and writes `output/model_checkpoints/<steps>/`; the same every time.

    Each line of the text is one sequence, cut at the model's length; 15 % of its tokens are asked for, as in BERT.
    Raises TrainingError for a text that is not there or has no lines, and where the checkpoint's folder exists.
    """
    lines = _lines(text)
    directory = output / "model_checkpoints" / str(steps)
    if directory.exists():
        raise TrainingError(f"{directory}: exists already; give another OUT or another number of steps")
    with tempfile.TemporaryDirectory() as scratch, _reproducible(seed):
        tokenizer = Path(scratch) / "tokenizer"
        write_tokenizer(
            tokenizer,
            vocab_size=config.vocab_size,
            pad_token_id=config.pad_token_id,
            max_length=config.max_length,
        )
        special, ids = _encoded(tokenizer, lines, config)
        model = NeoBERTLMHead(config)
        choices = torch.Generator().manual_seed(seed)
        asked = masked(ids, special, generator=torch.Generator().manual_seed(seed + 1))
        before = _mean_loss(model, *asked, config=config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        model.train()
        for step in range(steps):
            # From full to a tenth in a line: a constant rate would end on whatever the last lines were.
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - 0.9 * step / steps)
            chosen = ids[torch.randint(len(ids), (rows,), generator=choices)]
            inputs, labels = masked(chosen, special, generator=choices)
            loss = _loss(model, inputs, labels, config=config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        after = _mean_loss(model, *asked, config=config)
        write_run(directory, model, tokenizer=tokenizer, layout=layout, step=steps)
    return Trained(directory=directory, loss_before=before, loss_after=after)


def masked(ids: Tensor, special: SpecialIds, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and labels, both (rows, tokens) int64: of 15 % asked for, 80 % are masked, 10 % replaced, 10 % kept.

    Special tokens are never asked for, and every row is asked for at least one token; all other labels are -100.
    """
    never = torch.tensor([special.pad, special.first, special.separator, special.mask])
    word = ~torch.isin(ids, never)
    draw = torch.rand(ids.shape, generator=generator)
    lowest = draw.masked_fill(~word, 2).argmin(1, keepdim=True)
    asked = word & (draw < 0.15)
    asked.scatter_(1, lowest, True)
    asked &= word
    fate = torch.rand(ids.shape, generator=generator)
    other = torch.randint(special.size, ids.shape, generator=generator)
    other = other.where(~torch.isin(other, never), ids)
    inputs = ids.where(~(asked & (fate < 0.8)), torch.tensor(special.mask))
    inputs = inputs.where(~(asked & (fate >= 0.9)), other)
    return inputs, ids.masked_fill(~asked, IGNORED)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids that masking needs, and the size of the vocabulary."""

    pad: int
    first: int
    separator: int
    mask: int
    size: int


def _lines(text: Path) -> list[str]:
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        hint = "; the text of fixtures/ is in the repository only: give one with --text" if text == DEFAULT_TEXT else ""
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TrainingError(f"{text}: the text cannot be read ({reason}){hint}") from error
    if not any(lines):
        raise TrainingError(f"{text}: the text has no lines")
    return [line for line in lines if line]


def _encoded(tokenizer: Path, lines: Sequence[str], config: NeoBERTConfig) -> tuple[SpecialIds, Tensor]:
    """The lines as ids (lines, tokens), padded to the longest."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    special = SpecialIds(
        pad=loaded.pad_token_id,
        first=loaded.cls_token_id,
        separator=loaded.sep_token_id,
        mask=loaded.mask_token_id,
        size=config.vocab_size,
    )
    return special, loaded(list(lines), padding=True, truncation=True, return_tensors="pt")["input_ids"]


def _loss(model: NeoBERTLMHead, inputs: Tensor, labels: Tensor, *, config: NeoBERTConfig) -> Tensor:
    """The masked-LM loss of one batch, whose padding tokens are masked out as the training loop does."""
    pad_mask = torch.zeros(inputs.shape).masked_fill(inputs == config.pad_token_id, float("-inf"))
    return masked_lm_loss(model(inputs, pad_mask)["logits"], labels)


@torch.no_grad()
def _mean_loss(model: NeoBERTLMHead, inputs: Tensor, labels: Tensor, *, config: NeoBERTConfig) -> float:
    model.eval()
    return float(_loss(model, inputs, labels, config=config))


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """torch's generator seeded and one thread, because the order of a sum depends on how many there are."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains: 0 when the loss fell, 1 when it did not, 2 for what cannot be, 130 after Ctrl-C."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m reference_models.neobert.train", description=summary)
    parser.add_argument("output", type=Path, metavar="OUT", help="the directory of the run")
    parser.add_argument("--steps", type=int, default=300, help="training steps (300)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation, masking and order (0)")
    parser.add_argument("--layout", choices=get_args(Layout), default="state_dict.pt", help="the file of the weights")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="one sequence a line (that of fixtures/text)")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected at least 1")
    if not 0 <= options.seed < 1 << 63:
        parser.error(f"--seed is {options.seed}; expected a number from 0 to 2 ** 63 - 1")
    for path in (options.output, options.text):
        if "\0" in str(path):
            parser.error(f"{str(path)!r} is not a path")
    try:
        trained = train(
            options.output, text=options.text, steps=options.steps, seed=options.seed, layout=options.layout
        )
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"train: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: interrupted; nothing was written", file=sys.stderr)
        return 130
    fell = trained.loss_after < trained.loss_before
    print(f"loss {trained.loss_before:.3f} before, {trained.loss_after:.3f} after {options.steps} steps")
    print(trained.directory)
    if not fell:
        print("train: the loss did not fall; give more steps", file=sys.stderr)
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main())
