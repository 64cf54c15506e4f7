# SPDX-License-Identifier: Apache-2.0
"""The small tokenizer: its files are those of transformers, and it loads with AutoTokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import transformers
from transformers import AutoTokenizer, BertTokenizerFast

from reference_models.neobert.tokenizer import SPECIAL_TOKENS, VOCABULARY, write_tokenizer

LAYOUTS: tuple[Literal["4.57", "5"], ...] = ("4.57", "5")
TEXT = Path(__file__).resolve().parents[2] / "fixtures" / "text" / "sentences.txt"
OLD_LINE = transformers.__version__.startswith("4.")


@pytest.mark.parametrize("pad_token_id", [0, 3, 11])
def test_the_files_are_those_that_the_installed_transformers_writes(tmp_path: Path, pad_token_id: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    layout: Literal["4.57", "5"] = "4.57" if OLD_LINE else "5"
    write_tokenizer(ours, vocab_size=12, pad_token_id=pad_token_id, max_length=16, layout=layout)
    vocabulary: dict[str, int] = json.loads((ours / "tokenizer.json").read_text())["model"]["vocab"]
    if OLD_LINE:
        (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
        source: dict[str, Any] = {"vocab_file": str(tmp_path / "vocab.txt")}
    else:
        source = {"vocab": vocabulary}
    BertTokenizerFast(**source, model_max_length=16).save_pretrained(theirs)

    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in theirs.iterdir():
        assert (ours / path.name).read_text() == path.read_text(), path.name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad_token_id", [0, 5, 9])
@pytest.mark.parametrize("vocab_size", [10, 300])
def test_loads_with_the_size_and_the_padding_asked_for(
    tmp_path: Path, layout: Literal["4.57", "5"], pad_token_id: int, vocab_size: int
) -> None:
    write_tokenizer(tmp_path, vocab_size=vocab_size, pad_token_id=pad_token_id, max_length=16, layout=layout)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert tokenizer.pad_token_id == pad_token_id
    assert tokenizer.model_max_length == 16
    named = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    assert named == SPECIAL_TOKENS
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)

    batch = tokenizer(["The cat.", f"The {tokenizer.mask_token} the the"], padding=True)
    assert batch["input_ids"][0][-1] == pad_token_id
    assert batch["attention_mask"] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"][1][2] == tokenizer.mask_token_id
    assert batch["input_ids"][1][0] == tokenizer.cls_token_id and batch["input_ids"][1][-1] == tokenizer.sep_token_id
    assert len(tokenizer("the " * 40, truncation=True)["input_ids"]) == 16


def test_no_word_of_the_text_is_unknown(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocab_size=256, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("The cats know 42 zebras!")[:3] == ["the", "cat", "##s"]
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        tokens = tokenizer.tokenize(line)
        assert "[UNK]" not in tokens and not any(token.startswith("##") for token in tokens), line
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= 256 - len(SPECIAL_TOKENS)


def test_an_own_vocabulary_is_taken_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocabulary=["ant", "##s"], vocab_size=8, pad_token_id=1, max_length=8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    in_order = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert in_order == ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "ant", "##s", "[unused0]"]
    assert tokenizer("ants")["input_ids"] == [2, 5, 6, 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocab_size": 5}, "vocab_size is 5: 5 special tokens and a word need at least 6"),
        ({"vocab_size": 6, "pad_token_id": 6}, "pad_token_id is 6, outside of a vocabulary of 6"),
        ({"vocab_size": 6, "pad_token_id": -1}, "pad_token_id is -1"),
        ({"vocab_size": 6, "vocabulary": ["a", "b"]}, "give a vocab_size of at least 7"),
        ({"vocab_size": 9, "vocabulary": ["a", "a"]}, "repeats a:"),
        ({"vocab_size": 9, "vocabulary": ["a", "[PAD]"]}, r"repeats \[PAD\]:"),
        ({"vocab_size": 9, "vocabulary": ["[CLS]"]}, r"repeats \[CLS\]:"),
    ],
)
def test_refuses_what_cannot_be_a_vocabulary(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_tokenizer(tmp_path / "out", max_length=8, **options)
    assert not (tmp_path / "out").exists()


def test_writes_without_transformers() -> None:
    script = "import sys; import reference_models.neobert.tokenizer; print('transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
