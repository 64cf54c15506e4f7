# SPDX-License-Identifier: Apache-2.0
"""The validator: a good export passes, and every fault that is planted fails its own row and what depends on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.sandbox import environment, fresh_directories
from reference_models.neobert import probe, validate
from reference_models.neobert.checkpoint import write_run
from reference_models.neobert.export import export
from reference_models.neobert.original import NeoBERTLMHead
from reference_models.neobert.tokenizer import write_tokenizer
from reference_models.neobert.train import DEFAULT_CONFIG, train
from reference_models.neobert.validate import NotAnExport

Edit = Callable[[Path], None]
OLD_LINE = transformers.__version__.startswith("4.")
TOKENIZER = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
CONFIG = replace(DEFAULT_CONFIG, max_length=24)

# Forks one child for each request, because importing the library takes longer than asking every question.
SERVER = """
import importlib.util, os, sys, traceback
from pathlib import Path
import torch, transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline
spec = importlib.util.spec_from_file_location("probe", sys.argv[1])
probe = importlib.util.module_from_spec(spec)
sys.modules["probe"] = probe
spec.loader.exec_module(probe)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            probe.main(Path(line.strip()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Mapping[str, Any], Path], str]]:
    """Stands in for `run_probe`: the same script on the same request, forked from a process that has the library."""
    base = tmp_path_factory.mktemp("server")
    for folder in fresh_directories(base):
        Path(folder).mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-P", "-s", "-c", SERVER, str(Path(probe.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=base / "scratch" / "work",
        env=environment(base / "scratch", os.environ),
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(request: Mapping[str, Any], scratch: Path) -> str:
        (scratch / "request.json").write_text(json.dumps(request))
        print(scratch / "request.json", file=stdin, flush=True)
        status = stdout.readline().strip()
        return "" if status == "0" else f"the fresh process exited with status {status}"

    yield run
    stdin.close()
    process.wait()


@pytest.fixture
def fast(server: Callable[[Mapping[str, Any], Path], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "run_probe", server)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tied"), steps=60, config=CONFIG).directory


@pytest.fixture(scope="module")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = replace(CONFIG, tie_word_embeddings=False, rope=False, rms_norm=False, hidden_act="gelu", pad_token_id=3)
    write_tokenizer(
        base / "tokenizer", vocab_size=config.vocab_size, pad_token_id=3, max_length=config.max_length, layout="4.57"
    )
    write_run(base / "7", NeoBERTLMHead(config), tokenizer=base / "tokenizer", layout="model.safetensors", step=7)
    return base / "7"


@pytest.fixture(scope="module")
def good(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(checkpoint, output=tmp_path_factory.mktemp("good") / "export")


@pytest.fixture(scope="module")
def untied(untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(untied_checkpoint, output=tmp_path_factory.mktemp("good") / "untied")


def statuses(found: Sequence[validate.Finding]) -> dict[str, set[str]]:
    """The rows of each status."""
    return {
        status: {row.check for row in found if row.status == status}
        for status in ("passed", "failed", "warning", "skipped")
    }


def reason(found: Sequence[validate.Finding], check: str) -> str:
    return next(row.reason for row in found if row.check == check)


# Good exports


def test_a_good_export_passes_every_row(good: Path, checkpoint: Path) -> None:
    found = validate.validate(good, against=checkpoint)
    assert statuses(found)["passed"] == set(validate.NAMES), found
    assert [row.check for row in found] == list(validate.NAMES)
    assert "\n" not in "".join(row.reason for row in found)


def test_another_architecture_passes_too(untied: Path, untied_checkpoint: Path, fast: None) -> None:
    found = validate.validate(untied, against=untied_checkpoint)
    assert statuses(found)["passed"] >= set(validate.NAMES) - {"cosine"}, found
    assert "4 batches" not in reason(found, "checkpoint outputs") and "5 batches" in reason(found, "checkpoint outputs")


# Planted faults


@dataclass(frozen=True)
class Fault:
    """What is done to a copy of the good export, and the rows that have to fail, warn or be skipped for it."""

    name: str
    plant: Edit
    failed: set[str]
    said: str
    warning: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()
    against: bool = False
    untied: bool = False


def code(old: str, new: str, file: str = "model.py") -> Edit:
    """Replaces the one place where `old` stands."""

    def edit(directory: Path) -> None:
        text = (directory / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
        (directory / file).write_text(text.replace(old, new))

    return edit


def config(**fields: Any) -> Edit:
    """Sets fields of config.json; None takes one out."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / "config.json").read_text()) | fields
        kept = {name: value for name, value in content.items() if value is not None or name not in fields}
        (directory / "config.json").write_text(json.dumps(kept))

    return edit


def auto_map(name: str, reference: str | None) -> Edit:
    """Sets an entry of auto_map; None takes it out."""

    def edit(directory: Path) -> None:
        entries = json.loads((directory / "config.json").read_text())["auto_map"] | {name: reference}
        config(auto_map={key: value for key, value in entries.items() if value})(directory)

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], *, both: bool = True) -> Edit:
    """Changes the tensors of model.safetensors, and writes pytorch_model.bin from them."""

    def edit(directory: Path) -> None:
        content = load_file(directory / "model.safetensors")
        change(content)
        content = {name: tensor.clone() for name, tensor in content.items()}
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
        if both:
            torch.save(content, directory / "pytorch_model.bin")

    return edit


def without(*names: str) -> Edit:
    def edit(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return edit


def tokenizer(**options: Any) -> Edit:
    """Another tokenizer in place of the good one."""

    def edit(directory: Path) -> None:
        without(*TOKENIZER)(directory)
        write_tokenizer(directory, **({"vocab_size": 256, "max_length": 24} | options))

    return edit


def each(*edits: Edit) -> Edit:
    def edit(directory: Path) -> None:
        for one in edits:
            one(directory)

    return edit


def one_bit(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Flips the lowest bit of the first number."""

    def change(content: dict[str, torch.Tensor]) -> None:
        content[name].view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    return change


def add(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda content: content.update({name: tensor})


NEEDS_MODEL = frozenset(check.name for check in probe.CHECKS if probe.LOAD in check.needs)
NEEDS_TOKENIZER = frozenset(check.name for check in probe.CHECKS if probe.TOKENIZER in check.needs)
DROP_KEYS = "scores_mask = mask.masked_fill(~has_keys, 0.0)[:, None, None, :]"
ROTATED = "            query, key = rotate(query, *angles), rotate(key, *angles)\n"
NARROW = "output.reshape(rows, length, width), weights if output_attentions else None"
INVERTED = (
    ROTATED + "        sdpa = self.config._attn_implementation == 'sdpa' and not output_attentions\n"
    "        if sdpa and attention_mask is not None:\n"
    "            attention_mask = torch.where(attention_mask == 0, -math.inf, 0.0).to(query.dtype)\n"
)
REGISTERED = 'NeoBERT.register_for_auto_class("AutoModel")'
TIED_ON_LOAD = """
def tied(cls, *args, _load=NeoBERTLMHead.from_pretrained.__func__, **kwargs):
    loaded = _load(cls, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.decoder.weight = model.model.encoder.weight
    return loaded


NeoBERTLMHead.from_pretrained = classmethod(tied)
"""
# The angles of all positions at once, as the first revisions of the exported model kept them.
TABLE_KEPT = code(
    "        self.layer_norm = norm(config)\n",
    "        self.layer_norm = norm(config)\n"
    "        cosine, sine = rotary_angles(torch.arange(64)[None], config.dim_head, dtype=torch.float64)\n"
    "        self.register_buffer('cosine', cosine, persistent=False)\n"
    "        self.register_buffer('sine', sine, persistent=False)\n",
)
TABLE_READ = code(
    "angles = rotary_angles(position_ids, config.dim_head, dtype=inputs_embeds.dtype)",
    "angles = tuple(table[:, : inputs_embeds.shape[1]].to(inputs_embeds.dtype) for table in (self.cosine, self.sine))",
)

FAULTS = [
    Fault(
        "rotary.py is not exported",
        without("rotary.py"),
        {"files", "code", "load"},
        "missing: rotary.py",
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "auto_map names a class that is not there",
        auto_map("AutoModelForSequenceClassification", "model.Classifier"),
        {"files", "load classifier"},
        "auto_map: AutoModelForSequenceClassification is model.Classifier, and model.py has no Classifier",
    ),
    Fault(
        "the training package is imported where there is one",
        code(REGISTERED, "try:\n    import neobert.model\nexcept ImportError:\n    pass\n" + REGISTERED),
        {"code"},
        "imports neobert.model, which no user of the export has",
    ),
    Fault(
        "a helper is imported from outside of the directory",
        code("from .rotary import", "from ..rotary import"),
        {"code", "load"},
        "imports from ..rotary, which is outside of the directory",
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "a helper is imported by name",
        code(
            "from .rotary import rotary_angles, rotate\n",
            "import importlib\n\nrotary = importlib.import_module(f'{__package__}.rotary')\n"
            "rotary_angles, rotate = rotary.rotary_angles, rotary.rotate\n",
        ),
        {"load"},
        "No module named",
        warning=frozenset({"code"}),
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "a helper is imported as if it were installed",
        code("from .rotary import", "from rotary import"),
        {"code", "load"},
        "imports rotary and means rotary.py beside it: write .rotary",
        skipped=NEEDS_MODEL,
    ),
    Fault("a field is not mapped", config(rope=None), {"config"}, "missing: rope"),
    Fault(
        "the tie flag is not exported",
        config(tie_word_embeddings=None),
        {"config"},
        "missing: tie_word_embeddings; without tie_word_embeddings 4.57 ties the decoder and 5.x does not",
    ),
    Fault(
        "the heads do not divide the width",
        config(num_attention_heads=5),
        {"config", "load"},
        "hidden_size 64 is not a multiple of num_attention_heads 5",
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "the dtype is that of the first tensor",
        config(dtype="bfloat16"),
        set(),
        "17 F32, and config.json says bfloat16: loading with dtype='auto' rounds",
        warning=frozenset({"dtypes"}),
    ),
    Fault(
        "a tensor is missing",
        tensors(lambda content: content.pop("model.layer_norm.weight")),
        {"load"},
        "AutoModelForMaskedLM: missing: model.layer_norm.weight",
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "a tensor is left over",
        tensors(add("model.norm.weight", torch.ones(64))),
        {"load"},
        "AutoModelForMaskedLM: unexpected: model.norm.weight",
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "the weights are cut off",
        lambda directory: os.truncate(directory / "model.safetensors", 5000),
        {"load", "dtypes", "weight files"},
        "model.safetensors cannot be read",
        skipped=NEEDS_MODEL,
    ),
    Fault(
        "the decoder is the embedding after loading",
        code(REGISTERED, TIED_ON_LOAD + REGISTERED),
        {"tensors"},
        "decoder.weight as loaded is not decoder.weight of the file, largest difference",
        untied=True,
    ),
    Fault(
        "the tie flag is the other one",
        config(tie_word_embeddings=True),
        {"tensors"},
        "decoder.weight is not model.encoder.weight in the file, and config.json says tie_word_embeddings",
        warning=frozenset({"warnings"}),
        untied=True,
    ),
    Fault(
        "a weight is not a number",
        tensors(lambda content: content["model.layer_norm.weight"][:1].fill_(float("nan"))),
        {
            "tensors",
            "logits",
            "hidden states",
            "mask forms",
            "padding",
            "all-masked row",
            "sdpa = eager",
            "first token",
            "encoding",
            "fill-mask",
            "load base",
            "load classifier",
        },
        "model.layer_norm.weight is not finite in the file",
        skipped=frozenset({"cosine"}),
    ),
    Fault(
        "the two files of weights differ",
        tensors(one_bit("model.layer_norm.weight"), both=False),
        {"weight files"},
        "model.layer_norm.weight of pytorch_model.bin is not model.layer_norm.weight of model.safetensors",
    ),
    Fault(
        "a logit is lost",
        code(
            "logits = self.decoder(outputs.last_hidden_state)",
            "logits = self.decoder(outputs.last_hidden_state)[..., 1:]",
        ),
        {"logits"},
        "the logits have shape (2, 12, 255), expected (2, 12, 256)",
    ),
    Fault(
        "the last hidden state is left out",
        code("(*all_hidden_states, hidden_states) if", "all_hidden_states if"),
        {"hidden states"},
        "2 hidden states for 2 blocks, expected 3",
    ),
    Fault(
        "the last hidden state is not normed",
        code(
            "        hidden_states = self.layer_norm(hidden_states)\n",
            "        all_hidden_states += (hidden_states,)\n        hidden_states = self.layer_norm(hidden_states)\n",
        ),
        {"hidden states"},
        "",
    ),
    Fault(
        "an additive mask is read as booleans",
        code("torch.where(is_additive, attention_mask.to(dtype), by_choice)", "by_choice"),
        {"mask forms"},
        "an attention_mask of additive 0 and -inf that keeps all, compared with none: relative error",
    ),
    Fault(
        "the mask is ignored",
        code(DROP_KEYS, "scores_mask = torch.zeros_like(mask)[:, None, None, :]"),
        {"padding", "sdpa = eager", "encoding"},
        "a row with padding on the right, compared with the row alone: relative error",
    ),
    Fault(
        "a row with nothing to attend to is not a number",
        each(
            code(DROP_KEYS, "scores_mask = mask[:, None, None, :]"),
            code("has_keys = has_keys[:, :, None, None]", "has_keys = None"),
        ),
        {"all-masked row"},
        "the logits of an all-masked row are not finite with eager",
    ),
    Fault(
        "eager attention ignores the mask",
        code("scores = scores + attention_mask", "pass"),
        {"sdpa = eager"},
        "eager with padding right, compared with the attention it is loaded with: relative error",
    ),
    Fault(
        "eager attention multiplies by the mask",
        code("scores = scores + attention_mask", "scores = scores * (attention_mask == 0)"),
        {"sdpa = eager"},
        "eager with padding right, compared with the attention it is loaded with: relative error",
    ),
    Fault(
        "attention cannot be chosen",
        code("    _supports_sdpa = True\n", "    _supports_sdpa = False\n"),
        {"sdpa = eager"},
        "attention cannot be switched to sdpa",
    ),
    Fault(
        "sdpa takes the mask the other way round",
        code(ROTATED, INVERTED),
        {"mask forms", "padding", "all-masked row", "sdpa = eager", "first token", "encoding"},
        "an attention_mask of int64 that keeps all, compared with none: relative error",
        warning=frozenset({"cosine"}),
    ),
    Fault(
        "the first token attends to itself",
        code(NARROW, NARROW.replace("output.", "torch.cat((value[:, :1], output[:, 1:]), 1).")),
        {"first token", "padding", "encoding"},
        "the first token's vector does not depend on tokens 1; 2; 3; and 8 more of 12",
        warning=frozenset({"cosine"}),
    ),
    Fault(
        "the tokenizer is larger than the model",
        tokenizer(vocab_size=300),
        {"tokenizer"},
        "it has 300 entries, the model has 256",
    ),
    Fault(
        "the tokenizer pads with another token",
        tokenizer(pad_token_id=7),
        {"tokenizer"},
        "it pads with 7, config.json says 0",
    ),
    Fault(
        "the tokenizer is longer than the model",
        tokenizer(max_length=25),
        {"tokenizer"},
        "it says 25 model_max_length, the model was trained with 24",
    ),
    Fault(
        "the tokenizer has no mask token",
        each(
            without("special_tokens_map.json", "vocab.txt"),
            code('  "mask_token": "[MASK]",\n', "", "tokenizer_config.json"),
            code(
                '"tokenizer_class": "BertTokenizer"',
                '"tokenizer_class": "PreTrainedTokenizerFast"',
                "tokenizer_config.json",
            ),
        ),
        {"tokenizer"},
        "it has no mask token",
        skipped=NEEDS_TOKENIZER,
    ),
    Fault(
        "there is no tokenizer",
        without(*TOKENIZER),
        {"tokenizer"},
        "",
        skipped=NEEDS_TOKENIZER,
    ),
    Fault(
        "the encoder refuses what the tokenizer gives",
        code(
            "        _refuse_unknown(kwargs)\n",
            "        _refuse_unknown(kwargs)\n        if token_type_ids is not None:\n"
            "            raise TypeError('token_type_ids')\n",
        ),
        {"encoding"},
        "TypeError: token_type_ids",
        skipped=frozenset({"cosine"}),
    ),
    Fault(
        "the head refuses what the tokenizer gives",
        code(
            "        logits = self.decoder(",
            "        if token_type_ids is not None:\n            raise TypeError('token_type_ids')\n"
            "        logits = self.decoder(",
        ),
        {"fill-mask"},
        "TypeError: token_type_ids",
    ),
    Fault(
        "all sentences mean the same",
        code(
            "        hidden_states = self.layer_norm(hidden_states)\n",
            "        hidden_states = self.layer_norm(hidden_states) + 100\n",
        ),
        set(),
        "cat and quantum 1.00; expected at least 0.5, at least 0.5, at most 0.95",
        warning=frozenset({"cosine"}),
    ),
    Fault(
        "AutoModel is another class",
        auto_map("AutoModel", "model.NeoBERTForSequenceClassification"),
        {"load base"},
        "AutoModel: missing: classifier.bias; classifier.weight; dense.bias; and 1 more",
    ),
    Fault(
        "AutoModel computes something else",
        each(
            auto_map("AutoModel", "model.Bare"),
            code(
                "class NeoBERTLMHead(",
                "class Bare(NeoBERT):\n    def forward(self, *args, **kwargs):\n"
                "        output = super().forward(*args, **kwargs)\n        output.last_hidden_state *= 2\n"
                "        return output\n\n\nclass NeoBERTLMHead(",
            ),
        ),
        {"load base"},
        "the vectors of AutoModel, compared with those of AutoModelForMaskedLM: relative error",
    ),
    Fault(
        "the classifier has no classes",
        auto_map("AutoModelForSequenceClassification", "model.NeoBERT"),
        {"load classifier"},
        "the model gives a BaseModelOutput, expected an output with logits",
    ),
    Fault(
        "a forward pass warns",
        code(
            "        logits = self.decoder(",
            "        warnings.warn('experimental', stacklevel=2)\n        logits = self.decoder(",
        ),
        set(),
        "UserWarning: experimental",
        warning=frozenset({"warnings"}),
    ),
    Fault(
        "the epsilon of config.json is another one",
        config(norm_eps=1e-6),
        {"checkpoint config", "checkpoint outputs"},
        "norm_eps is 1e-06, the checkpoint's is 1e-05",
        against=True,
    ),
    Fault(
        "an intermediate size that gives the same width",
        config(intermediate_size=127),
        {"checkpoint config"},
        "intermediate_size is 127, the checkpoint's is 128",
        against=True,
    ),
    Fault(
        "one bit of a tensor is another one",
        tensors(one_bit("model.layer_norm.weight")),
        {"checkpoint tensors", "checkpoint outputs"},
        "model.layer_norm.weight is not the checkpoint's, largest difference",
        against=True,
    ),
    Fault(
        "a tensor is stored in another dtype",
        tensors(lambda content: content.update({"decoder.bias": content["decoder.bias"].double()})),
        {"checkpoint tensors"},
        "decoder.bias is torch.float64, the checkpoint's is torch.float32",
        warning=frozenset({"dtypes"}),
        against=True,
    ),
    Fault(
        "the angles have another base",
        code("ROPE_THETA = 10000.0", "ROPE_THETA = 10001.0", "rotary.py"),
        {"checkpoint outputs"},
        "block 0 with no mask, the first to differ from the training model: relative error",
        against=True,
    ),
    Fault(
        "an added score is read as a mask",
        code(
            "torch.where(is_additive, attention_mask.to(dtype), by_choice)",
            "torch.where(is_additive, torch.where(attention_mask < -1, -math.inf, nothing), by_choice)",
        ),
        {"checkpoint outputs"},
        "block 0 with scores added by a float64 mask, the first to differ",
        against=True,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_its_own_row(
    fault: Fault,
    good: Path,
    untied: Path,
    checkpoint: Path,
    tmp_path: Path,
    fast: None,
) -> None:
    # A name of its own, because transformers keeps the code of a directory under its name.
    directory = shutil.copytree(untied if fault.untied else good, tmp_path / f"fault{FAULTS.index(fault)}")
    fault.plant(directory)
    found = validate.validate(directory, against=checkpoint if fault.against else None)
    rows = statuses(found)
    blamed = rows["failed"] | rows["warning"]
    told = [(row.check, row.reason) for row in found if row.check in blamed]
    assert rows["failed"] == fault.failed, told
    # Nobody trained the untied one.
    assert rows["warning"] - ({"cosine"} if fault.untied else set()) == fault.warning, told
    assert rows["skipped"] == fault.skipped
    assert any(fault.said in text for _, text in told), told
    assert not any("Traceback" in text for _, text in told)


def test_every_row_has_a_fault_that_fails_it() -> None:
    covered = set().union(*(fault.failed | fault.warning for fault in FAULTS))
    assert covered == set(validate.NAMES)


def test_a_table_that_is_lost_on_load_shows(good: Path, tmp_path: Path, fast: None) -> None:
    directory = shutil.copytree(good, tmp_path / "kept_table")
    each(TABLE_KEPT, TABLE_READ)(directory)
    found = validate.validate(directory)
    if OLD_LINE:
        assert not statuses(found)["failed"]  # it builds models where their memory is
        return
    assert statuses(found)["failed"] >= {"tensors", "mask forms", "encoding"}, found
    assert "the buffer model.cosine is not finite after loading" in reason(found, "tensors")


def test_strict_makes_failures_of_warnings(good: Path, tmp_path: Path, fast: None) -> None:
    directory = shutil.copytree(good, tmp_path / "warned")
    config(dtype="bfloat16")(directory)
    found = validate.validate(directory, strict=True)
    assert statuses(found)["failed"] == {"dtypes"} and not statuses(found)["warning"]


# Exports of others


def in_one_file(directory: Path) -> None:
    """The configuration class in model.py, as upstream exports have it."""
    own = (directory / "configuration_neobert.py").read_text()
    model = (directory / "model.py").read_text().replace("from .configuration_neobert import NeoBERTConfig\n", "")
    (directory / "model.py").write_text(own + "\n\n" + model)
    (directory / "configuration_neobert.py").unlink()
    auto_map("AutoConfig", "model.NeoBERTConfig")(directory)


FOREIGN = each(
    in_one_file,
    config(tie_word_embeddings=None),
    code(
        "hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None",
        "hidden_states=list(all_hidden_states) if output_hidden_states else None",
    ),
    code("    _supports_sdpa = True\n", "    _supports_sdpa = False\n"),
    code(ROTATED, INVERTED.replace("self.config._attn_implementation == 'sdpa' and ", "")),
)


def test_an_export_of_another_kind_gets_rows_and_no_traceback(
    good: Path, checkpoint: Path, tmp_path: Path, fast: None
) -> None:
    directory = shutil.copytree(good, tmp_path / "foreign")
    FOREIGN(directory)
    found = validate.validate(directory, against=checkpoint)
    rows = statuses(found)
    assert rows["passed"] >= {"files", "code", "load", "tensors", "logits", "tokenizer", "checkpoint tensors"}
    assert rows["failed"] >= {"config", "hidden states", "mask forms", "padding", "sdpa = eager", "first token"}
    assert reason(found, "hidden states") == "hidden_states is a list of 2, expected a tuple of 3"
    assert reason(found, "config").startswith("missing: tie_word_embeddings;")
    switched = reason(found, "sdpa = eager")
    assert "eager with padding right: 3072 of 6144 values are not finite" in switched
    assert "attention cannot be switched to sdpa" in switched
    assert "the logits with padding right: 4096 of 8192 values are not finite" in reason(found, "checkpoint outputs")
    assert not [row for row in found if "Traceback" in row.reason or "\n" in row.reason]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds a list, expected an object"),
        ("{}", "config.json has no auto_map"),
        (None, "missing: config.json"),
    ],
)
def test_a_config_that_says_nothing_costs_no_traceback(
    good: Path, tmp_path: Path, fast: None, content: str | None, said: str
) -> None:
    directory = shutil.copytree(good, tmp_path / "nothing")
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    found = validate.validate(directory)
    assert {row.check for row in found} == set(validate.NAMES) - set(validate.AGAINST)
    assert statuses(found)["failed"] >= {"files", "config"}
    assert said in reason(found, "files")
    assert not [row for row in found if "Traceback" in row.reason]


def test_an_empty_directory_fails_and_does_not_raise(tmp_path: Path) -> None:
    found = validate.validate(tmp_path)
    rows = statuses(found)
    assert rows["failed"] == {"files", "code", "config"} and not rows["passed"]


# Processes of their own


def test_the_training_side_cannot_be_imported(good: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(good, tmp_path / "leaning")
    code(REGISTERED, "from reference_models.neobert.rotary import rotate as rotate\n" + REGISTERED)(directory)
    found = validate.validate(directory)
    assert statuses(found)["failed"] == {"code", "load"}
    assert "reference_models" in reason(found, "load")


def test_a_process_that_dies_has_failed_the_row_it_was_at(good: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(good, tmp_path / "dying")
    code(
        "        logits = self.decoder(",
        "        print('the end is near')\n        os.kill(os.getpid(), 11)\n        logits = self.decoder(",
    )(directory)
    found = validate.validate(directory)
    rows = statuses(found)
    assert rows["failed"] == {"logits"}
    assert "was killed by SIGSEGV" in reason(found, "logits")
    assert rows["skipped"] == set(probe.NAMES) - {"load", "tensors", "weight files", "logits"}


def test_a_process_that_hangs_is_ended(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "TIME_LIMIT_SECONDS", 0.5)
    found = validate.validate(good)
    assert statuses(found)["failed"] == {"load"}
    assert reason(found, "load") == "the fresh process was killed: it exceeded 0.5 s"


# The command


def test_the_command_prints_a_table_and_says_how_it_ended(
    good: Path, checkpoint: Path, tmp_path: Path, fast: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate.main([str(good), "--against", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(good) and lines[-1] == f"{len(validate.NAMES)} passed"
    assert [line for line in lines if line.startswith("mask forms")]

    directory = shutil.copytree(good, tmp_path / "bad")
    each(config(dtype="bfloat16"), without("pytorch_model.bin"))(directory)
    assert validate.main([str(directory)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(probe.NAMES) + 2} passed, 1 warning, 1 skipped"
    assert validate.main([str(directory), "--strict"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(probe.NAMES) + 2} passed, 1 failed, 1 skipped"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/none"], "no such directory"),
        (["{tmp}/file"], "not a directory"),
        (["{good}", "--against", "{tmp}/none"], "not found"),
        (["{good}", "--against", "{tmp}"], "config.yaml"),
    ],
)
def test_what_is_no_export_costs_one_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("")
    assert validate.main([argument.format(tmp=tmp_path, good=good) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and said in printed.err


def test_a_line_break_in_a_path_and_an_interruption_cost_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert validate.main([str(tmp_path / "a\nb")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(validate, "validate", interrupt)
    assert validate.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "validate: interrupted\n"


def test_wrong_usage_ends_with_two() -> None:
    with pytest.raises(SystemExit) as ended:
        validate.main(["--strict"])
    assert ended.value.code == 2


def test_asking_needs_no_framework_here() -> None:
    script = "import sys; import reference_models.neobert.validate; print({'torch', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_not_an_export_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(NotAnExport, match="no such directory"):
        validate.validate(tmp_path / "none")


@pytest.mark.parametrize("kind", [list, set])
def test_loading_information_is_read_on_both_lines(kind: type) -> None:
    information = {
        "missing_keys": kind(["b", "a.w"]),
        "unexpected_keys": kind(["decoder.bias"]),
        "mismatched_keys": kind([("c", (1,), (2,))]),
        "error_msgs": [],
    }
    assert probe.loading_faults(information, unexpected=("decoder.",), missing=("a.",)) == [
        "missing: b",
        "of another shape: c",
    ]
