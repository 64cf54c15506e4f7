# SPDX-License-Identifier: Apache-2.0
"""Carries a tokenizer into an export so that both lines of transformers load it, after making sure it fits the model.

The files are handled as files: what the installed transformers would write of them depends on its version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, read_json

SPECIAL_TOKENS = ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
_COPIED = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
# The class of a tokenizer without one of its own: what 5.x writes, and the name that both lines read.
_GENERIC_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# Marks a space in vocabularies of SentencePiece.
METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class Assets:
    """A tokenizer that fits the model: texts of its files by name, files to copy, its mask token, and its entries."""

    texts: Mapping[str, str]
    copied: tuple[Path, ...]
    mask_token: str
    entries: Mapping[str, int]
    special_tokens: Mapping[str, str]


def read_assets(directory: Path, fields: Mapping[str, Any]) -> Assets:
    """Read a saved tokenizer and make sure that it belongs to a model of these `fields`.

    Raises CheckpointError when a file is missing or damaged, or a special token is; when its library cannot read it;
    when a token has no row in the model; when the padding token is another one; when the tokenizer needs code of its
    own.
    """
    settings_file, pipeline_file = directory / "tokenizer_config.json", directory / "tokenizer.json"
    settings = read_json(settings_file)
    if "auto_map" in settings:
        raise CheckpointError(settings_file, "has auto_map: the tokenizer needs code of its own, which is not run here")
    if not pipeline_file.exists():
        raise CheckpointError(
            pipeline_file, "not found; expected that of a fast tokenizer: load it with AutoTokenizer and save it again"
        )
    pipeline = read_json(pipeline_file)
    entries = _entries(pipeline_file, pipeline)
    tokens = _special_tokens(directory, settings)
    largest = max(entries, key=lambda token: entries[token])
    if entries[largest] >= fields["vocab_size"]:
        raise CheckpointError(
            pipeline_file,
            f"has token {largest[:40]!r} with id {entries[largest]}, but the model's vocab_size is"
            f" {fields['vocab_size']}; expected the tokenizer that the model was trained with",
        )
    for kind, token in tokens.items():
        if kind in SPECIAL_TOKENS and token not in entries:
            raise CheckpointError(
                pipeline_file, f"its vocabulary lacks {token!r}, the {kind}; expected all special ones"
            )
    pad = tokens["pad_token"]
    if entries[pad] != fields["pad_token_id"]:
        raise CheckpointError(
            pipeline_file,
            f"has the padding token {pad!r} at {entries[pad]}, but the model's pad_token_id is"
            f" {fields['pad_token_id']}; expected the tokenizer that the model was trained with",
        )
    _require_readable(pipeline_file)
    written = {**settings, "model_max_length": fields["max_length"]}
    given = str(settings.get("tokenizer_class") or "TokenizersBackend")
    written["tokenizer_class"] = _GENERIC_CLASS.get(given, given)
    texts = {"tokenizer_config.json": json.dumps(written, indent=2, ensure_ascii=False) + "\n"}
    copied = tuple(directory / name for name in _COPIED if (directory / name).is_file())
    names = {file.name for file in copied}
    if "special_tokens_map.json" not in names:
        texts["special_tokens_map.json"] = json.dumps(tokens, indent=2, ensure_ascii=False) + "\n"
    if "vocab.txt" not in names and pipeline["model"].get("type") == "WordPiece":
        texts["vocab.txt"] = "".join(f"{token}\n" for token in sorted(entries, key=lambda token: entries[token]))
    return Assets(texts, copied, tokens["mask_token"], entries, tokens)


def write_assets(assets: Assets, directory: Path) -> None:
    """Write the tokenizer's files into a directory."""
    for file in assets.copied:
        (directory / file.name).write_bytes(file.read_bytes())
    for name, text in assets.texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _entries(file: Path, pipeline: Mapping[str, Any]) -> dict[str, int]:
    """All tokens with their ids, those of the vocabulary and those that were added."""
    model = pipeline.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        pairs = [pair[0] for pair in vocabulary if isinstance(pair, list) and pair and isinstance(pair[0], str)]
        vocabulary = {token: number for number, token in enumerate(pairs)} if len(pairs) == len(vocabulary) else None
    added = pipeline.get("added_tokens") or []
    try:
        entries = dict(vocabulary or {}) | {token["content"]: token["id"] for token in added}
        is_sound = bool(vocabulary) and all(type(number) is int and number >= 0 for number in entries.values())
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(file, "has no vocabulary of tokens and ids; expected a file of the tokenizers library")
    return entries


def _require_readable(file: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        reason = str(error).partition("\n")[0]
        raise CheckpointError(file, f"cannot be read by the tokenizers library: {reason}") from None


def _special_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by kind, which 4.57 keeps in a file of their own and 5.x among the settings."""
    file = directory / "special_tokens_map.json"
    source, where = (read_json(file), file) if file.exists() else (settings, directory / "tokenizer_config.json")
    tokens = {}
    for kind, value in source.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if kind.endswith("_token") and isinstance(content, str) and content:
            tokens[kind] = content
    if missing := [kind for kind in SPECIAL_TOKENS if kind not in tokens]:
        raise CheckpointError(where, f"lacks {', '.join(missing)}; expected all of {', '.join(SPECIAL_TOKENS)}")
    return tokens
