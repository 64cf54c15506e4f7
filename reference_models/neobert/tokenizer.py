# SPDX-License-Identifier: Apache-2.0
"""A small WordPiece tokenizer, written as the files that transformers' BertTokenizerFast would save."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Layout = Literal["4.57", "5"]

PAD = "[PAD]"
UNKNOWN, FIRST, SEPARATOR, MASK = "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNKNOWN, FIRST, SEPARATOR, MASK)

# Every word of fixtures/text/sentences.txt, the most frequent first.
_WORDS = """
the . a is in of and function to cat python two by dog on at program child book city list read river sat this
warm bird code garden light looked make numbers quantum returns slept small sum three feline one paris physics
rome rug student teacher train winter words wrote about capital drank energy file fire likes long madrid mat
moon old rested summer sun table took tree very walk water we write ball bright defines describes door four
france gave has italy language milk morning night particle programmer reads short sit sort spain spring stars
takes they value wave window young are cold comes computer count counts fast five floor for green lamp matter
part parts programs sang simple six slow some sorts states steps things uses white
"""
_CHARACTERS = string.ascii_lowercase + string.digits
# Single characters last: with all of them no word of English is unknown, and a small vocabulary still has words.
VOCABULARY: tuple[str, ...] = (
    *_WORDS.split(),
    *(character for character in _CHARACTERS if character not in _WORDS.split()),
    *(f"##{character}" for character in _CHARACTERS),
    *(character for character in ",?!:;'\"-()" if character not in _WORDS.split()),
)


def write_tokenizer(
    directory: Path,
    *,
    vocabulary: Sequence[str] | None = None,
    vocab_size: int,
    pad_token_id: int = 0,
    max_length: int,
    layout: Layout = "5",
) -> None:
    """Writes a lower-casing WordPiece tokenizer of exactly `vocab_size` entries that AutoTokenizer loads.

    Parameters
    ----------
    directory : made where it is not there.
    vocabulary : words, and pieces that start with `##`, without the special tokens; by default the first that fit of
        the words of fixtures/text and of all letters. Entries that are left over are called `[unused0]` and so on.
    pad_token_id : where `[PAD]` stands; `[UNK]`, `[CLS]`, `[SEP]` and `[MASK]` take the lowest other entries.
    max_length : the model_max_length that the tokenizer says.
    layout : the files and fields that this line of transformers writes; 4.57 and 5.x load either.

    Raises ValueError for a size below 6, a pad_token_id outside of it, or a vocabulary that does not fit, repeats an
    entry or holds a special token.
    """
    tokens = _tokens(vocabulary, vocab_size=vocab_size, pad_token_id=pad_token_id)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "tokenizer.json", _pipeline(tokens))
    fields = _fields(max_length)
    if layout == "5":
        _write(directory / "tokenizer_config.json", {"backend": "tokenizers", **fields}, sorted_keys=True)
        return
    named = {f"{name}_token": token for name, token in _NAMED.items()}
    old = {
        "added_tokens_decoder": {
            number: _added(token) for number, token in enumerate(tokens) if token in SPECIAL_TOKENS
        },
        "clean_up_tokenization_spaces": True,
        "do_basic_tokenize": True,
        "extra_special_tokens": {},
        "never_split": None,
    }
    _write(directory / "tokenizer_config.json", fields | old, sorted_keys=True)
    _write(directory / "special_tokens_map.json", named, sorted_keys=True)
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


_NAMED = {"pad": PAD, "unk": UNKNOWN, "cls": FIRST, "sep": SEPARATOR, "mask": MASK}


def _tokens(vocabulary: Sequence[str] | None, *, vocab_size: int, pad_token_id: int) -> list[str]:
    """All entries in the order of their ids."""
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(
            f"vocab_size is {vocab_size}: {len(SPECIAL_TOKENS)} special tokens and a word need at least "
            f"{len(SPECIAL_TOKENS) + 1}"
        )
    if not 0 <= pad_token_id < vocab_size:
        raise ValueError(f"pad_token_id is {pad_token_id}, outside of a vocabulary of {vocab_size}")
    room = vocab_size - len(SPECIAL_TOKENS)
    words = list(VOCABULARY[:room] if vocabulary is None else vocabulary)
    if len(words) > room:
        raise ValueError(
            f"the vocabulary has {len(words)} words and {len(SPECIAL_TOKENS)} special tokens, and vocab_size is "
            f"{vocab_size}: give a vocab_size of at least {len(words) + len(SPECIAL_TOKENS)}"
        )
    unused = [f"[unused{number}]" for number in range(room - len(words))]
    others = [*SPECIAL_TOKENS[1:], *words, *unused]
    if len(set(others) | {PAD}) != vocab_size:
        repeated = sorted({token for token in others if token == PAD or others.count(token) > 1})
        raise ValueError(f"the vocabulary repeats {', '.join(repeated)}: special tokens are added to it by themselves")
    return [*others[:pad_token_id], PAD, *others[pad_token_id:]]


def _fields(max_length: int) -> dict[str, Any]:
    """The part of tokenizer_config.json that both lines write."""
    return {
        **{f"{name}_token": token for name, token in _NAMED.items()},
        "do_lower_case": True,
        "model_max_length": max_length,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }


def _added(token: str) -> dict[str, Any]:
    """A special token as tokenizer_config.json and tokenizer.json describe it."""
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _pipeline(tokens: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json: BERT's normalisation, WordPiece, and [CLS] A [SEP] B [SEP]."""

    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def text(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    ids = {token: number for number, token in enumerate(tokens)}
    single = [special(FIRST, 0), text("A", 0), special(SEPARATOR, 0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **_added(token)} for token, number in ids.items() if token in SPECIAL_TOKENS],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, text("B", 1), special(SEPARATOR, 1)],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (FIRST, SEPARATOR)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def _write(path: Path, content: Mapping[str, Any], *, sorted_keys: bool = False) -> None:
    """JSON as transformers lays it out: its own files sorted and with an end of line, those of `tokenizers` not."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sorted_keys)
    path.write_text(text + "\n" if sorted_keys else text, encoding="utf-8")
