# SPDX-License-Identifier: Apache-2.0
"""What the validator asks of an export in a fresh process, where only the export's own code can be imported.

Run as a script with the path of a request; imports nothing of this project, and no framework until it is asked. What
it finds goes line by line into a file, so that a process that dies has said what it had found.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Status = Literal["passed", "failed", "warning", "skipped"]

NOT_IMPORTABLE = ("reference_models", "harness", "neobert")
"""The packages of the training side: an export that needs one of them works on no user's machine."""

WEIGHTS, OLD_WEIGHTS, SHARDS = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"

EMBEDDING, DECODER = "model.encoder.weight", "decoder.weight"

# Two of one subject each, and one of another: what the document's cosine check compares, in words of our own text.
SENTENCES = (
    "The cat sat on the mat.",
    "A feline rested on the rug.",
    "Write a Python function to sort a list.",
    "The programmer wrote a function in Python.",
    "Quantum physics describes light and matter.",
)
SIMILAR, DISTINCT = 0.5, 0.95

TOLERANCE = 1e-4
"""Of the largest value, in float32: the order of a sum costs 1e-6, a wrong mask costs 1e-1 and more."""


class Failed(Exception):
    """A check does not hold; the text says what was found and what was expected."""


class Warned(Exception):
    """A check found what may be meant so; the text says what, and when it would be wrong."""


class Skipped(Exception):
    """A check cannot say anything here; the text says why."""


@dataclasses.dataclass(kw_only=True)
class Subject:
    """What the checks work on: the directory, its configuration, and what the first of them loaded."""

    directory: Path
    config: Mapping[str, Any]
    warned: list[str] = dataclasses.field(default_factory=list)
    model: Any = None
    tokenizer: Any = None
    vectors: Tensor | None = None


# The checks, in the order in which they run


def load_masked_lm(subject: Subject) -> str:
    """AutoModelForMaskedLM loads, and every tensor of the file has its place."""
    subject.model = loaded(subject, "AutoModelForMaskedLM")
    subject.config = {**subject.model.config.to_dict(), **subject.config}
    return f"{type(subject.model).__name__}: nothing missing, unexpected or of another shape"


def tensors_equal_the_file(subject: Subject) -> str:
    """Every tensor of the file is in the model, bit for bit, and every tensor of the model comes from the file."""
    import torch

    state = subject.model.state_dict()
    faults: list[str] = []
    places: set[int] = set()
    count = 0
    for name, stored in stored_tensors(subject.directory):
        count += 1
        if name not in state:
            faults.append(f"{name} is in the file and not in the model")
            continue
        places.add(state[name].data_ptr())
        if not stored.isfinite().all():
            faults.append(f"{name} is not finite in the file")
        if not same_bits(state[name], stored):
            what = f"{name} as loaded is not {name} of the file"
            if state[name].shape == stored.shape:
                what += f", largest difference {float((state[name] - stored).abs().max()):.3g}"
            faults.append(what)
    if subject.config.get("tie_word_embeddings") and not tied_in_the_file(subject.directory):
        faults.append(f"{DECODER} is not {EMBEDDING} in the file, and config.json says tie_word_embeddings")
    faults += [
        f"{name} of the model is not in the file, and is no tensor of the file under another name"
        for name, tensor in state.items()
        if tensor.data_ptr() not in places
    ]
    faults += [
        f"the buffer {name} is not finite after loading"
        for name, buffer in subject.model.named_buffers()
        if buffer.dtype != torch.bool and not buffer.isfinite().all()
    ]
    if faults:
        raise Failed(some(faults))
    return f"{count} tensors equal the file's, bit for bit"


def weight_files_agree(subject: Subject) -> str:
    """model.safetensors and pytorch_model.bin hold the same, because a user may get either."""
    import torch

    if not (subject.directory / WEIGHTS).is_file() or not (subject.directory / OLD_WEIGHTS).is_file():
        raise Skipped(f"there is only one of {WEIGHTS} and {OLD_WEIGHTS}")
    old = torch.load(subject.directory / OLD_WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    new = dict(stored_tensors(subject.directory))
    faults = [f"{name} is in one of the two files only" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        if old[name].dtype != new[name].dtype or not same_bits(old[name], new[name]):
            faults.append(f"{name} of {OLD_WEIGHTS} is not {name} of {WEIGHTS}")
    if faults:
        raise Failed(some(faults))
    return f"{OLD_WEIGHTS} and {WEIGHTS} hold the same {len(new)} tensors"


def logits(subject: Subject) -> str:
    """One vector of logits for every token, one number for every entry of the vocabulary, all finite."""
    ids = some_ids(subject, rows=2)
    given = call(subject.model, ids).logits
    expected = (*ids.shape, subject.config["vocab_size"])
    if tuple(given.shape) != expected:
        raise Failed(f"the logits have shape {tuple(given.shape)}, expected {expected}")
    if not given.isfinite().all():
        raise Failed(f"{int((~given.isfinite()).sum())} of {given.numel()} logits are not finite")
    return f"finite logits of shape {tuple(given.shape)}"


def hidden_states(subject: Subject) -> str:
    """The embeddings, each block, and last what the final norm makes of the last block."""
    ids = some_ids(subject, rows=2)
    base = subject.model.base_model
    outputs = call(base, ids, output_hidden_states=True)
    last, states = outputs.last_hidden_state, outputs.hidden_states
    number = subject.config["num_hidden_layers"] + 1
    if not isinstance(states, tuple):
        raise Failed(f"hidden_states is a {type(states).__name__} of {len(states)}, expected a tuple of {number}")
    if len(states) != number:
        raise Failed(
            f"{len(states)} hidden states for {number - 1} blocks, expected {number}: the embeddings, then each block, "
            "the last one after the final norm"
        )
    shape = (*ids.shape, subject.config["hidden_size"])
    wrong = [index for index, state in enumerate(states) if tuple(state.shape) != shape]
    if wrong:
        raise Failed(f"hidden state {wrong[0]} has shape {tuple(states[wrong[0]].shape)}, expected {shape}")
    alike("the last hidden state", states[-1], "last_hidden_state", last)
    if subject.config.get("rope", True):
        alike("hidden state 0", states[0], "the embeddings of the tokens", base.get_input_embeddings()(ids))
    of_the_head = call(subject.model, ids, output_hidden_states=True).hidden_states
    if of_the_head is None or len(of_the_head) != number:
        raise Failed(f"with the head there are {len(of_the_head or ())} hidden states, expected {number}")
    for index, (ours, theirs) in enumerate(zip(of_the_head, states, strict=True)):
        alike(f"hidden state {index} with the head", ours, "that without", theirs)
    return f"{number} of shape {shape}, the last one equal to last_hidden_state"


def mask_forms(subject: Subject) -> str:
    """One mask, however it is written: none, integers, booleans, floating 0 and 1, additive 0 and -inf."""
    import torch

    ids = some_ids(subject, rows=2)
    keep = torch.ones(ids.shape, dtype=torch.int64)
    reference = call(subject.model, ids).logits
    for name, mask in written(keep).items():
        alike(f"an attention_mask of {name} that keeps all", masked(subject, ids, mask), "none", reference)

    padded, keep = padding(ids, subject.config["pad_token_id"], "right")
    reference = masked(subject, padded, keep)
    for name, mask in written(keep).items():
        alike(f"a padded row with {name}", masked(subject, padded, mask), "with 0 and 1 in int64", reference)
    return "none, int64, int32, bool, float and additive masks give the same logits, with padding and without"


def padding_is_ignored(subject: Subject) -> str:
    """A padded row gives what it gives alone, and what stands at a masked place changes nothing."""
    ids = some_ids(subject, rows=2)
    alone = call(subject.model, ids[1:, : -pad_length(ids)]).logits[0]
    for side in ("right", "left"):
        padded, keep = padding(ids, subject.config["pad_token_id"], side)
        given = masked(subject, padded, keep)[1, keep[1].bool()]
        alike(f"a row with padding on the {side}", given, "the row alone", alone)
    for side in ("right", "left", "inside"):
        _, keep = padding(ids, subject.config["pad_token_id"], side)
        # Not the padding token: learned positions count all others, so both batches have the same ones.
        others = other_ids(subject, ids).where(keep == 0, ids)
        first, second = (masked(subject, tokens, keep)[keep.bool()] for tokens in (ids, others))
        alike(f"the real tokens of a row masked {side}", second, "those with other masked tokens", first)
    return "padding on the right, on the left and inside changes nothing at the real tokens"


def all_masked_row(subject: Subject) -> str:
    """A row with nothing to attend to is finite and disturbs no other, however attention is computed."""
    import torch

    ids = some_ids(subject, rows=2)
    keep = torch.ones(ids.shape, dtype=torch.int64)
    keep[0] = 0
    other = call(subject.model, ids[1:]).logits
    for name, options in ways_to_attend(subject):
        given = masked(subject, ids, keep, **options)
        if not given[0].isfinite().all():
            raise Failed(f"the logits of an all-masked row are not finite with {name}")
        alike(f"the row beside an all-masked one with {name}", given[1:], "the row alone", other)
    return "finite, and the row beside it is undisturbed"


def attention_implementations(subject: Subject) -> str:
    """sdpa and eager give the same, with and without padding; so does asking for the attention weights."""
    ids = some_ids(subject, rows=2)
    batches: dict[str, tuple[Tensor, Tensor | None]] = {"no mask": (ids, None)}
    for side in ("right", "left", "inside"):
        batches[f"padding {side}"] = padding(ids, subject.config["pad_token_id"], side)
    own = {name: masked(subject, tokens, keep) for name, (tokens, keep) in batches.items()}
    faults, ways = [], []
    for way, options in ways_to_attend(subject):
        ways.append(way)
        try:
            for name, (tokens, keep) in batches.items():
                given = masked(subject, tokens, keep, **options)
                alike(f"{way} with {name}", given, "the attention it is loaded with", own[name])
                if options:
                    check_weights(subject, tokens, keep)
        except Failed as failure:
            faults.append(str(failure))
    faults += [f"attention cannot be switched to {name}" for name in ("sdpa", "eager") if name not in ways]
    if faults:
        raise Failed(some(faults))
    return "sdpa, eager and output_attentions=True agree, with padding and without"


def check_weights(subject: Subject, ids: Tensor, keep: Tensor | None) -> None:
    """Every block gives attention weights (rows, heads, tokens, tokens) that add up to 1 over the real tokens."""
    import torch

    number, heads = subject.config["num_hidden_layers"], subject.config["num_attention_heads"]
    layers = call(subject.model, ids, attention_mask=keep, output_attentions=True).attentions or ()
    if len(layers) != number:
        raise Failed(f"output_attentions=True gives the weights of {len(layers)} blocks, expected {number}")
    shape = (len(ids), heads, ids.shape[1], ids.shape[1])
    kept = torch.ones(shape) if keep is None else keep[:, None, None, :].expand(shape)
    for layer in layers:
        if tuple(layer.shape) != shape:
            raise Failed(f"attention weights have shape {tuple(layer.shape)}, expected {shape}")
        alike("the sum of attention weights over real tokens", (layer * kept).sum(-1), "1", torch.ones(shape[:3]))


def first_token(subject: Subject) -> str:
    """Changing any real token changes the first one's vector: what an inverted mask takes away."""
    import torch

    ids = some_ids(subject, rows=1)
    length = ids.shape[1]
    if length < 2:
        raise Skipped("the model takes one token only")
    others = other_ids(subject, ids)
    changed = ids.repeat(length - 1, 1)
    places = torch.arange(1, length)
    changed[torch.arange(length - 1), places] = others[0, 1:]
    base = subject.model.base_model
    for name, keep in (("no mask", None), ("a mask of ones", torch.ones_like(ids))):
        options = {} if keep is None else {"attention_mask": keep}
        before = call(base, ids, **options).last_hidden_state[0, 0]
        options = {} if keep is None else {"attention_mask": torch.ones_like(changed)}
        after = call(base, changed, **options).last_hidden_state[:, 0]
        moved = (after - before).abs().amax(-1) / before.abs().max()
        # Rounding moves it by 1e-7 at most.
        still = [int(place) for place, change in zip(places, moved, strict=True) if not change > 1e-6]
        if still:
            raise Failed(
                f"with {name} the first token's vector does not depend on token{'s' if len(still) > 1 else ''} "
                f"{some(list(map(str, still)))} of {length}"
            )
    return f"its vector depends on each of the {length - 1} others, without a mask and with one"


def tokenizer_fits(subject: Subject) -> str:
    """The tokenizer loads and fits the model: size, special tokens, padding, length."""
    from transformers import AutoTokenizer

    subject.tokenizer = tokenizer = AutoTokenizer.from_pretrained(subject.directory, trust_remote_code=True)
    size, config = len(tokenizer), subject.config
    faults = []
    if size > config["vocab_size"]:
        faults.append(f"it has {size} entries, the model has {config['vocab_size']}")
    for name in ("pad", "unk", "cls", "sep", "mask"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if getattr(tokenizer, f"{name}_token", None) is None or number is None:
            faults.append(f"it has no {name} token")
        elif not 0 <= number < config["vocab_size"]:
            faults.append(f"its {name} token is {number}, outside of the {config['vocab_size']} of the model")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != config["pad_token_id"]:
        faults.append(f"it pads with {tokenizer.pad_token_id}, config.json says {config['pad_token_id']}")
    longest = max_length(config)
    if tokenizer.model_max_length > longest:
        said = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else "no"
        faults.append(f"it says {said} model_max_length, the model was trained with {longest}")
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= config["vocab_size"] >= size:
        faults.append(f"its highest id is {highest}, the model has {config['vocab_size']} entries")
    if faults:
        subject.tokenizer = tokenizer if tokenizer.mask_token and tokenizer.pad_token else None
        raise Failed(some(faults))
    return f"{type(tokenizer).__name__} of {size} entries, pads with {tokenizer.pad_token_id}"


def encoding(subject: Subject) -> str:
    """Sentences go from text to vectors, with everything that the tokenizer gives handed to the model."""
    batch = encoded(subject, SENTENCES)
    vectors = subject.model.base_model.eval()(**batch).last_hidden_state
    if not vectors.isfinite().all():
        raise Failed("the vectors of the tokens are not finite")
    subject.vectors = vectors[:, 0]
    largest = float(vectors[:, 0].abs().max())
    for row in range(1, len(SENTENCES)):
        if float((vectors[row, 0] - vectors[0, 0]).abs().max()) <= 1e-6 * largest:
            raise Failed(f"the first token of '{SENTENCES[row]}' has the vector of that of '{SENTENCES[0]}'")
    alone = subject.model.base_model(**encoded(subject, SENTENCES[:1])).last_hidden_state
    count = int(batch["attention_mask"][0].sum())
    sides = slice(count) if subject.tokenizer.padding_side == "right" else slice(-count, None)
    alike("a sentence in a batch", vectors[0, sides], "the sentence alone", alone[0])
    return f"{len(SENTENCES)} sentences, vectors of shape {tuple(vectors.shape)}; the first as it is alone"


def fill_mask(subject: Subject) -> str:
    """The pipeline fill-mask gives words with probabilities."""
    from transformers import pipeline

    tokenizer = subject.tokenizer
    text = f"The cat sat on the {tokenizer.mask_token}."
    pipe = pipeline("fill-mask", model=subject.model, tokenizer=tokenizer, device="cpu")
    number = min(5, subject.config["vocab_size"])
    answers = pipe(text, top_k=number)
    scores = [answer["score"] for answer in answers]
    if len(answers) != number or not all(math.isfinite(score) and 0 <= score <= 1 for score in scores):
        raise Failed(f"{text} gives {len(answers)} answers with the scores {scores}, expected {number} probabilities")
    return f"{text} -> {answers[0]['token_str']} ({scores[0]:.2f})"


def cosine(subject: Subject) -> str:
    """The document's check of meaning: like sentences are alike, unlike ones are not the same."""
    import torch

    if subject.vectors is None:
        raise Skipped("no sentences were encoded")

    def similarity(first: int, second: int) -> float:
        assert subject.vectors is not None
        return float(torch.cosine_similarity(subject.vectors[first], subject.vectors[second], dim=0))

    cats, code, apart = similarity(0, 1), similarity(2, 3), similarity(0, 4)
    said = f"cat and feline {cats:.2f}, Python and Python {code:.2f}, cat and quantum {apart:.2f}"
    if cats < SIMILAR or code < SIMILAR or apart > DISTINCT:
        raise Warned(
            f"{said}; expected at least {SIMILAR}, at least {SIMILAR}, at most {DISTINCT}: a small or hardly trained "
            "model need not have it"
        )
    return said


def load_base(subject: Subject) -> str:
    """AutoModel loads the same encoder, and leaves only the decoder over."""
    ids = some_ids(subject, rows=2)
    reference = call(subject.model.base_model, ids).last_hidden_state
    release(subject)
    base = loaded(subject, "AutoModel", unexpected=("decoder.",))
    alike("the vectors of AutoModel", call(base, ids).last_hidden_state, "those of AutoModelForMaskedLM", reference)
    return f"{type(base).__name__}: only decoder.* of the file is left over, and the vectors are the same"


def load_classification(subject: Subject) -> str:
    """AutoModelForSequenceClassification loads with a new head and takes what the tokenizer gives."""
    release(subject)
    if "AutoModelForSequenceClassification" not in (subject.config.get("auto_map") or {}):
        raise Skipped("auto_map names no AutoModelForSequenceClassification")
    head = ("dense.", "classifier.")
    model = loaded(subject, "AutoModelForSequenceClassification", unexpected=("decoder.",), missing=head)
    batch = (
        encoded(subject, SENTENCES[:2]) if subject.tokenizer is not None else {"input_ids": some_ids(subject, rows=2)}
    )
    outputs = model(**batch)
    if not hasattr(outputs, "logits"):
        raise Failed(f"the model gives a {type(outputs).__name__}, expected an output with logits")
    expected = (2, model.config.num_labels)
    if tuple(outputs.logits.shape) != expected:
        raise Failed(f"the logits have shape {tuple(outputs.logits.shape)}, expected {expected}")
    if not outputs.logits.isfinite().all():
        raise Failed("the logits are not finite")
    return f"{type(model).__name__}: only {' and '.join(f'{name}*' for name in head)} are new"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A row of the table: the function that fills it, and the rows without which it cannot be asked."""

    name: str
    ask: Callable[[Subject], str]
    needs: tuple[str, ...] = ()


LOAD, TOKENIZER = "load", "tokenizer"

CHECKS = (
    Check(name=LOAD, ask=load_masked_lm),
    Check(name="tensors", ask=tensors_equal_the_file, needs=(LOAD,)),
    Check(name="weight files", ask=weight_files_agree),
    Check(name="logits", ask=logits, needs=(LOAD,)),
    Check(name="hidden states", ask=hidden_states, needs=(LOAD,)),
    Check(name="mask forms", ask=mask_forms, needs=(LOAD,)),
    Check(name="padding", ask=padding_is_ignored, needs=(LOAD,)),
    Check(name="all-masked row", ask=all_masked_row, needs=(LOAD,)),
    Check(name="sdpa = eager", ask=attention_implementations, needs=(LOAD,)),
    Check(name="first token", ask=first_token, needs=(LOAD,)),
    Check(name=TOKENIZER, ask=tokenizer_fits),
    Check(name="encoding", ask=encoding, needs=(LOAD, TOKENIZER)),
    Check(name="fill-mask", ask=fill_mask, needs=(LOAD, TOKENIZER)),
    Check(name="cosine", ask=cosine, needs=(LOAD, TOKENIZER)),
    Check(name="load base", ask=load_base, needs=(LOAD,)),
    Check(name="load classifier", ask=load_classification, needs=(LOAD,)),
)
WARNINGS = "warnings"
NAMES = (*(check.name for check in CHECKS), WARNINGS)


def ask_all(directory: Path, say: Callable[[str, Status, str], None]) -> None:
    """Runs every check on an export and says name, status and reason of each as soon as it is known."""
    import torch

    subject = Subject(directory=directory, config=json.loads((directory / "config.json").read_text(encoding="utf-8")))
    there = {LOAD: False, TOKENIZER: False}
    for check in CHECKS:
        lacking = [name for name in check.needs if not there[name]]
        if lacking:
            say(check.name, "skipped", f"needs what '{lacking[0]}' could not load")
            continue
        with torch.no_grad(), noted(subject):
            status, reason = answer(check, subject)
        say(check.name, status, reason)
        if check.name == LOAD:
            there[LOAD] = subject.model is not None
        if check.name == TOKENIZER:
            there[TOKENIZER] = subject.tokenizer is not None
    if subject.warned:
        say(WARNINGS, "warning", some(subject.warned))
    else:
        say(WARNINGS, "passed", "no Python warning while it was loaded and run")


def answer(check: Check, subject: Subject) -> tuple[Status, str]:
    """The status and the reason of one check; foreign code may raise anything."""
    try:
        return "passed", check.ask(subject)
    except Failed as failure:
        return "failed", str(failure)
    except Warned as warning:
        return "warning", str(warning)
    except Skipped as reason:
        return "skipped", str(reason)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"


# Loading


def loaded(subject: Subject, auto_class: str, *, unexpected: Sequence[str] = (), missing: Sequence[str] = ()) -> Any:
    """The model through an Auto class, as wide as its widest tensor and at least float32. Raises Failed.

    unexpected, missing: beginnings of names that may be left over in the file, or not be in it.
    """
    import transformers

    model, information = getattr(transformers, auto_class).from_pretrained(
        subject.directory,
        trust_remote_code=True,
        dtype=widest(subject.directory),
        output_loading_info=True,
    )
    faults = loading_faults(information, unexpected=unexpected, missing=missing)
    if faults:
        raise Failed(f"{auto_class}: {some(faults)}")
    return model.eval()


def loading_faults(
    information: Mapping[str, Any], *, unexpected: Sequence[str] = (), missing: Sequence[str] = ()
) -> list[str]:
    """What loading information complains of; its values are lists on transformers 4.57 and sets on 5.x."""
    excused = {"missing_keys": tuple(missing), "unexpected_keys": tuple(unexpected), "mismatched_keys": ()}
    words = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
    faults = []
    for key, beginnings in excused.items():
        names = sorted(
            str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in information.get(key) or ()
        )
        names = [name for name in names if not name.startswith(beginnings)]
        if names:
            faults.append(f"{words[key]}: {some(names)}")
    return faults + [str(text) for text in information.get("error_msgs") or ()]


def release(subject: Subject) -> None:
    """Lets go of the model, so that two are never here at once."""
    subject.model = None
    gc.collect()


def stored_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the directory's weights, one at a time."""
    import torch
    from safetensors import safe_open

    if (directory / WEIGHTS).is_file():
        files = [directory / WEIGHTS]
    elif (directory / SHARDS).is_file():
        index = json.loads((directory / SHARDS).read_text(encoding="utf-8"))
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    else:
        yield from torch.load(directory / OLD_WEIGHTS, map_location="cpu", weights_only=True, mmap=True).items()
        return
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def tied_in_the_file(directory: Path) -> bool:
    """Whether the decoder of the file is the embedding, or is not there."""
    both = {name: tensor for name, tensor in stored_tensors(directory) if name in (EMBEDDING, DECODER)}
    return len(both) < 2 or same_bits(both[EMBEDDING], both[DECODER])


def widest(directory: Path) -> torch.dtype:
    """The dtype into which every tensor of the file goes without loss, at least float32."""
    import torch

    dtype = torch.float32
    for _, tensor in stored_tensors(directory):
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same in every bit, the narrower one widened; also for NaN and for minus zero."""
    import torch

    if first.shape != second.shape:
        return False
    dtype = torch.promote_types(first.dtype, second.dtype)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    rows = zip(first.split(_ROWS), second.split(_ROWS), strict=True) if first.ndim else ((first, second),)
    return all(
        torch.equal(ours.to(dtype).contiguous().view(whole), theirs.to(dtype).contiguous().view(whole))
        for ours, theirs in rows
    )


_ROWS = 4096  # compared at a time: a whole embedding would be copied otherwise


# Running


def call(model: Any, ids: Tensor, **options: Any) -> Any:
    """The outputs of a model in evaluation mode for ids (rows, tokens)."""
    return model(input_ids=ids, **options)


def masked(subject: Subject, ids: Tensor, keep: Tensor | None, **options: Any) -> Tensor:
    """The logits (rows, tokens, vocabulary) with a mask (rows, tokens) of any form."""
    try:
        logits: Tensor = call(subject.model, ids, attention_mask=keep, **options).logits
    except Exception as error:
        form = "no mask" if keep is None else f"a mask of {str(keep.dtype).removeprefix('torch.')}"
        raise Failed(f"{form}: {type(error).__name__}: {error}") from error
    return logits


def some_ids(subject: Subject, *, rows: int) -> Tensor:
    """Ids (rows, at most 12 tokens) without the padding token, the same in every run."""
    import torch

    config = subject.config
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config["vocab_size"] - 1, (rows, min(12, max_length(config))), generator=generator)
    ids: Tensor = drawn + (drawn >= config["pad_token_id"]).long()  # all but the padding token
    return ids


def other_ids(subject: Subject, ids: Tensor) -> Tensor:
    """Another id for every one, and none of them the padding token."""
    import torch

    size, pad = subject.config["vocab_size"], subject.config["pad_token_id"]
    raised: Tensor = (ids + 1) % size
    others: Tensor = torch.where(raised == pad, (raised + 1) % size, raised)
    return others


def pad_length(ids: Tensor) -> int:
    """How many tokens of a row are padded."""
    return min(4, int(ids.shape[1]) - 1)


def padding(ids: Tensor, pad_token_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask (int64, 1 keeps) of a batch whose second row, cut short, is padded on a side or has gaps inside."""
    import torch

    count, length = pad_length(ids), ids.shape[1]
    keep = torch.ones_like(ids)
    padded = ids.clone()
    if side == "inside":
        keep[1, 1 : 1 + count] = 0
    elif side == "left":
        keep[1, :count] = 0
        padded[1, count:] = ids[1, : length - count]
    else:
        keep[1, length - count :] = 0
    padded[keep == 0] = pad_token_id
    return padded, keep


def written(keep: Tensor) -> dict[str, Tensor]:
    """A mask (int64, 1 keeps) in every form a user may give it."""
    import torch

    nothing = torch.zeros(keep.shape)
    return {
        "int64": keep,
        "int32": keep.int(),
        "bool": keep.bool(),
        "additive 0 and -inf": nothing.masked_fill(keep == 0, float("-inf")),
        "additive 0 and the lowest float32": nothing.masked_fill(keep == 0, torch.finfo(torch.float32).min),
        "0 and 1 in float32": keep.float(),
    }


def ways_to_attend(subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each implementation that the model can be switched to, then that which gives weights: name, and what to pass."""
    first = getattr(subject.model.config, "_attn_implementation", None)
    try:
        for name in ("sdpa", "eager"):
            try:
                subject.model.set_attn_implementation(name)
            except Exception:
                continue  # What cannot be switched is not among the names.
            if getattr(subject.model.config, "_attn_implementation", None) == name:
                yield name, {}
    finally:
        if first is not None:
            with suppress(Exception):  # It is foreign code; what it refuses, it has not switched away from either.
                subject.model.set_attn_implementation(first)
    yield "output_attentions=True", {"output_attentions": True}


def encoded(subject: Subject, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """A padded batch as the tokenizer gives it, cut at the model's length."""
    longest = max_length(subject.config)
    batch: Mapping[str, Tensor] = subject.tokenizer(
        list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )
    return batch


def max_length(config: Mapping[str, Any]) -> int:
    """How many tokens the model was trained with."""
    return int(config.get("max_position_embeddings") or config.get("max_length") or 512)


def alike(what: str, ours: Tensor, other: str, theirs: Tensor, *, tolerance: float = TOLERANCE) -> None:
    """Raises Failed unless both are finite, of one shape, and the same up to rounding."""
    if ours.shape != theirs.shape:
        raise Failed(f"{what}, compared with {other}: shape {tuple(ours.shape)} and not {tuple(theirs.shape)}")
    for name, tensor in ((what, ours), (other, theirs)):
        if not tensor.isfinite().all():
            raise Failed(f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are not finite")
    error = float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max()))) if theirs.numel() else 0.0
    if error > tolerance:
        raise Failed(f"{what}, compared with {other}: relative error {error:.2g}, at most {tolerance:g} is rounding")


# Words


def some(parts: Sequence[str], most: int = 3) -> str:
    """The first few of a list in words."""
    shown = "; ".join(parts[:most])
    return shown if len(parts) <= most else f"{shown}; and {len(parts) - most} more"


@contextmanager
def noted(subject: Subject) -> Iterator[None]:
    """Keeps the Python warnings of what runs inside, without those about the future of a library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    own = os.environ.get("HF_MODULES_CACHE", os.devnull)
    for warning in caught:
        later = issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | ResourceWarning)
        if later and not warning.filename.startswith(own):
            continue
        text = f"{warning.category.__name__}: {warning.message}"
        if text not in subject.warned:
            subject.warned.append(text)


# The process


class NotHere:
    """An import finder that refuses the packages of the training side, wherever they are installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in NOT_IMPORTABLE:
            raise ModuleNotFoundError(f"No module named '{name}': an export has to carry its own code", name=name)
        return None


def run_batches(directory: Path, batches: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The float64 logits and hidden states of `number` batches, named `<index>.logits` and `<index>.hidden.<layer>`."""
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float64).eval()
    given: dict[str, Tensor] = {}
    for index in range(number):
        options = {"attention_mask": batches[f"{index}.mask"]} if f"{index}.mask" in batches else {}
        with torch.no_grad():
            outputs = model(input_ids=batches[f"{index}.ids"], output_hidden_states=True, **options)
        given[f"{index}.logits"] = outputs.logits.contiguous()
        for layer, state in enumerate(outputs.hidden_states or ()):
            given[f"{index}.hidden.{layer}"] = state.contiguous().clone()
    return given


def main(request: Path) -> None:
    """Does what the request says: the checks, their findings line by line; or the batches, their outputs in a file."""
    sys.meta_path.insert(0, NotHere())
    asked = json.loads(request.read_text(encoding="utf-8"))
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Memory that nobody wrote to is NaN: a table that was lost on the way from the meta device shows.
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    directory = Path(asked["directory"])
    if asked["do"] == "checks":
        with open(asked["answer"], "w", encoding="utf-8") as answers:
            ask_all(directory, lambda *row: print(json.dumps(row), file=answers, flush=True))
        return
    from safetensors.torch import load_file, save_file

    save_file(run_batches(directory, load_file(asked["batches"]), asked["number"]), asked["answer"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
