# SPDX-License-Identifier: Apache-2.0
"""What errors that ports in the wild are known to end in mean, and what a correct port does instead."""

from __future__ import annotations

import re

ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"has no attribute 'all_tied_weights_keys'",
        "the model was built without post_init(); a port calls self.post_init() at the end of __init__",
    ),
    (
        r"'list' object has no attribute 'keys'",
        "_tied_weights_keys is a list; from transformers 5 on it is a dict of tied tensor to its source, such as"
        " {'lm_head.weight': 'transformer.wte.weight'}",
    ),
    (
        r"cannot import name '\w+' from '(?!transformers_modules)transformers",
        "this transformers no longer has that name; a port carries what it needs of it, or asks for the version",
    ),
    (
        r"No module named '(?!transformers|torch|numpy)\w+'|packages that were not found in your environment",
        "files that travel with a checkpoint are imported relatively (from .file import name), others are installed",
    ),
    (r"`get_input_embeddings` not auto", "a port has get_input_embeddings() and set_input_embeddings()"),
    (
        r"'tuple' object has no attribute 'logits'",
        "forward returned a tuple where an output with .logits is expected; a port returns a tuple only when"
        " return_dict=False is asked for",
    ),
    (
        r"got an unexpected keyword argument 'return_dict'",
        "generate() passes return_dict=True; a port's forward takes it, or **kwargs",
    ),
    (
        r"Target -100 is out of bounds",
        "labels of -100 are to be ignored; a port passes ignore_index=-100, or its description has labels or"
        " ignore_index as they are",
    ),
    (
        r"Tensor on device meta is not on the expected device|Cannot copy out of meta tensor",
        "a tensor is made from data in __init__; a port registers it as a buffer and fills it in _init_weights",
    ),
    (
        r"while pushing .*\b401\b",
        "a push_to_hub of the port's own hands its options on, token= among them",
    ),
    (
        r"while loading the model .*(not a valid model identifier|gated repo)",
        "a from_pretrained of the port's own hands token= on, and asks the Hub with it for whatever else it wants",
    ),
    (
        r"while loading the model .*(does not appear to have a file named model\.safetensors|safetensors-convert)",
        "a port leaves it to the library which files hold weights: use_safetensors=True rules pytorch_model.bin out",
    ),
    (
        r"while loading the model .*(Connection refused|Max retries exceeded|offline mode|no network)",
        "what was loaded once is in the client's cache; a port asks the Hub for nothing more, and takes a name offline",
    ),
    (
        r"Some tensors share memory",
        "two parameters are one tensor and no _tied_weights_keys says so; a port names them there",
    ),
)
"""Regular expression on an error's text, and one sentence."""


def advised(reason: str) -> str:
    """A reason with the sentence for the first error in it that is known, if there is one."""
    found = next((advice for pattern, advice in ADVICE if re.search(pattern, reason)), None)
    return reason if found is None or found in reason else f"{reason}; {found}"
