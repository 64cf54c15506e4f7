# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: facts about the model, and examples that run as they stand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from .checkpoint import Run
from .tokenizer_assets import METASPACE, Assets

_FILL_MASK = """\
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

directory = {directory}  # or the name of a repository that it was pushed to
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True).eval()

text = {text}.replace({literal}, tokenizer.mask_token)
inputs = tokenizer(text, return_tensors="pt", truncation=True)
{metaspace}with torch.no_grad():
    logits = model(**inputs).logits
is_mask = inputs["input_ids"][0] == tokenizer.mask_token_id
for token_id in logits[0, is_mask][0].topk(5).indices.tolist():
    print(tokenizer.decode([token_id]))
"""
# A vocabulary that marks spaces gives one a token of its own before the mask, where training text has none.
_METASPACE = """\
ids = inputs["input_ids"][0]
space = tokenizer.convert_tokens_to_ids("\\u2581")
before_mask = torch.cat([ids[1:] == tokenizer.mask_token_id, torch.tensor([False])])
inputs = {name: value[:, ~((ids == space) & before_mask)] for name, value in inputs.items()}
"""
_EMBEDDING = """\
import torch
from transformers import AutoModel, AutoTokenizer

directory = {directory}
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()

texts = ["The cat sat on the mat.", "A dog sleeps."]
inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
weights = inputs["attention_mask"][..., None].to(hidden.dtype)
embeddings = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
print(embeddings.shape)
"""


def model_card(
    run: Run,
    assets: Assets,
    *,
    directory: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> str:
    """Return the text of README.md.

    Args:
        run: the checkpoint that is exported.
        assets: its tokenizer.
        directory: where the export will be; the examples load it from there.
        layout: dtype and shape of every tensor in its weight files.
    """
    return "\n".join(
        [
            _front_matter(run),
            f"# {directory.name}",
            "",
            "NeoBERT, an encoder, exported for transformers from a training checkpoint. The code of the model is in"
            " this directory, so loading it takes `trust_remote_code=True`; no other package is needed.",
            "",
            _facts(run, layout),
            "## Fill in a masked word",
            "",
            _fenced(_fill_mask(directory, assets), "python"),
            "## Embed sentences",
            "",
            _fenced(_EMBEDDING.format(directory=_quoted(directory)), "python"),
            "## Good to know",
            "",
            "- `attention_mask` is (batch, length): integers or booleans that say which tokens count, or a floating"
            " mask that is added to the scores.",
            "- Packed sequences (`cu_seqlens`, block-diagonal masks) exist in the training model only.",
            "- `attn_implementation` is `sdpa` (default) or `eager`. `flash_attention` in config.json says what the"
            " training ran with and changes nothing.",
            "",
            "<details>",
            "<summary>Configuration of the training run</summary>",
            "",
            _fenced(run.text, "yaml"),
            "</details>",
            "",
        ]
    )


def _front_matter(run: Run) -> str:
    matter: dict[str, Any] = {
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "fill-mask",
        "language": ["en"],
    }
    dataset = run.settings.get("dataset")
    if isinstance(dataset, Mapping):
        name = dataset.get("name") or PurePath(str(dataset.get("path") or "")).name
        if name:
            matter["datasets"] = [str(name)]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n"


def _facts(run: Run, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    fields = run.fields
    count = sum(math.prod(shape) for _, shape in layout.values())
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in layout.values()})
    learned = f"learned, {fields['max_length']} of them"
    rows = {
        "parameters": f"{count:,} ({', '.join(dtypes)})",
        "layers, heads, width": f"{fields['num_hidden_layers']}, {fields['num_attention_heads']},"
        f" {fields['hidden_size']}",
        "feed-forward network": f"{fields['hidden_act']}, intermediate_size {fields['intermediate_size']}",
        "norm": f"{'RMSNorm' if fields['rms_norm'] else 'LayerNorm'}, epsilon {fields['norm_eps']:g}",
        "positions": "rotary, neighbouring channels in pairs" if fields["rope"] else learned,
        "longest text in training": f"{fields['max_length']} tokens",
        "vocabulary": f"{fields['vocab_size']} tokens, padding is {fields['pad_token_id']}",
        "decoder": "tied to the token embedding" if fields["tie_word_embeddings"] else "a matrix of its own",
    }
    if "decoder.bias" not in run.tensors:
        rows["bias of the decoder"] = "zero: the checkpoint has none"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _fill_mask(directory: Path, assets: Assets) -> str:
    token = assets.mask_token
    literal = "[MASK]" if token in ("[MASK]", "[mask]") else token
    has_metaspace = METASPACE in assets.entries and assets.special_tokens["unk_token"] != METASPACE
    return _FILL_MASK.format(
        directory=_quoted(directory),
        text=json.dumps(f"{literal} is the capital of France."),
        literal=json.dumps(literal),
        metaspace=_METASPACE if has_metaspace else "",
    )


def _quoted(directory: Path) -> str:
    return json.dumps(str(directory))


def _fenced(text: str, language: str) -> str:
    """A block of code that no line of it can end."""
    fence = "`" * (max([2, *(len(run) for run in re.findall("`+", text))]) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
