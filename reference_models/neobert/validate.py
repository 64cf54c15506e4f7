# SPDX-License-Identifier: Apache-2.0
"""Says whether an exported directory is a complete, working model, and with a checkpoint whether it is the same one.

    python -m reference_models.neobert.validate DIR [--against CHECKPOINT] [--strict]

The code of the directory runs, in a fresh process where nothing of this project can be imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.report.summary import one_line
from harness.report.terminal import make_console
from harness.sandbox import environment, fresh_directories, kill_group, last_line, signal_name
from reference_models.neobert import probe
from reference_models.neobert.probe import OLD_WEIGHTS, SHARDS, WEIGHTS, Failed, Skipped, Status, Warned, some

if TYPE_CHECKING:
    from torch import Tensor

    from reference_models.neobert.checkpoint import Run

TIME_LIMIT_SECONDS = 900.0
"""Of a fresh process: a gigabyte takes a minute on two cores."""

REQUIRED_FILES = ("config.json", "model.py", "rotary.py")
REQUIRED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "norm_eps",
    "pad_token_id",
    "rms_norm",
    "rope",
    "hidden_act",
    "dropout",
    "flash_attention",
    "tie_word_embeddings",
)
REQUIRED_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM")
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

FILES, CODE, CONFIG, DTYPES = "files", "code", "config", "dtypes"
AGAINST_CONFIG, AGAINST_TENSORS, AGAINST_OUTPUTS = "checkpoint config", "checkpoint tensors", "checkpoint outputs"
FIRST = (FILES, CODE, CONFIG, DTYPES)
AGAINST = (AGAINST_CONFIG, AGAINST_TENSORS, AGAINST_OUTPUTS)
NAMES = (*FIRST, *probe.NAMES, *AGAINST)
"""Every row, in the order of the table; the last three are asked with a checkpoint only."""

PARITY = 1e-9
"""Of the largest value, in float64; a part computed in float32 differs by 1e-7."""

_STYLES: Mapping[Status, str] = {"passed": "green", "failed": "bold red", "warning": "yellow", "skipped": "dim"}


class NotAnExport(ValueError):
    """What was given to validate is no directory, or to compare with no checkpoint; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row of the table: what was asked, `passed`, `failed`, `warning` or `skipped`, and what was found."""

    check: str
    status: Status
    reason: str


def validate(
    directory: str | os.PathLike[str], *, against: str | os.PathLike[str] | None = None, strict: bool = False
) -> list[Finding]:
    """Asks every check of an exported directory, one row each, whatever the ones before it found.

    against: the training checkpoint it was exported from; adds full parity in float64.
    strict: warnings are failures.

    Raises NotAnExport where `directory` is no directory, or `against` cannot be read.
    """
    exported = Path(directory).absolute()
    if not exported.is_dir():
        raise NotAnExport(f"{directory}: {'not a directory' if exported.exists() else 'no such directory'}")
    run = None if against is None else _checkpoint(against)
    found = [_asked(name, question, exported) for name, question in _QUESTIONS.items()]
    with tempfile.TemporaryDirectory(prefix="validate-") as scratch:
        if (exported / "config.json").is_file():
            found += ask_in_fresh_process(exported, Path(scratch))
        else:
            found += [Finding(check=name, status="skipped", reason="needs config.json") for name in probe.NAMES]
        if run is not None:
            loads = any(finding.check == probe.LOAD and finding.status == "passed" for finding in found)
            found += _compared(exported, run, Path(scratch), loads=loads)
    if strict:
        found = [replace(row, status="failed") if row.status == "warning" else row for row in found]
    return found


def _checkpoint(path: str | os.PathLike[str]) -> Run:
    from reference_models.neobert.checkpoint import CheckpointError, read_run

    try:
        return read_run(Path(path))
    except (CheckpointError, OSError) as error:
        raise NotAnExport(str(error)) from error


def _asked(name: str, question: Any, *arguments: Any) -> Finding:
    """The finding of a function that returns what it found or raises what it did not."""
    check = probe.Check(name=name, ask=lambda _: str(question(*arguments)))
    status, reason = probe.answer(check, probe.Subject(directory=Path(), config={}))
    return Finding(check=name, status=status, reason=one_line(reason))


# What can be asked of files alone


def files_present(directory: Path) -> str:
    """The files that every export has, and those that its auto_map names."""
    weights = [name for name in (WEIGHTS, SHARDS, OLD_WEIGHTS) if (directory / name).is_file()]
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    if not weights:
        missing.append(f"{WEIGHTS} or {OLD_WEIGHTS}")
    if missing:
        raise Failed(f"missing: {', '.join(missing)}")
    auto_map = _config(directory).get("auto_map")
    if not isinstance(auto_map, dict):
        raise Failed("config.json has no auto_map: transformers cannot find the classes")
    faults = [f"auto_map names no {name}" for name in REQUIRED_CLASSES if name not in auto_map]
    for auto_class, reference in auto_map.items():
        module, _, name = str(reference).rpartition(".")
        file = directory / f"{module}.py"
        if not file.is_file():
            faults.append(f"auto_map: {auto_class} is {reference}, and there is no {module}.py")
        elif name not in _names_of(_parsed(file)):
            faults.append(f"auto_map: {auto_class} is {reference}, and {module}.py has no {name}")
    if faults:
        raise Failed(some(faults))
    return ", ".join([*REQUIRED_FILES, *weights]) + f", and the {len(auto_map)} classes of auto_map"


def code_is_self_contained(directory: Path) -> str:
    """Every relative import of the code leads to a file of the directory, and none to the training side."""
    sources = sorted(directory.glob("*.py"))
    if not sources:
        raise Failed("there is no Python file")
    faults, doubts = [], []
    for source in sources:
        for node in ast.walk(_parsed(source)):
            where = f"{source.name} line {getattr(node, 'lineno', 0)}"
            faults += [f"{where} {fault}" for fault in _import_faults(node, directory)]
            if _imports_by_name(node):
                doubts.append(f"{where} imports by name when it runs: such a file does not travel with the code")
    if faults:
        raise Failed(some(faults))
    if doubts:
        raise Warned(some(doubts))
    return f"the imports of {', '.join(source.name for source in sources)} lead to files that are here"


def _import_faults(node: ast.AST, directory: Path) -> Iterator[str]:
    """What is wrong with one import statement."""
    if isinstance(node, ast.ImportFrom) and node.level > 1:
        yield f"imports from {'.' * node.level}{node.module or ''}, which is outside of the directory"
    elif isinstance(node, ast.ImportFrom) and node.level == 1:
        modules = [node.module] if node.module else [alias.name for alias in node.names]
        for module in modules:
            path = directory / f"{module.replace('.', '/')}.py"
            if not path.is_file():
                yield f"imports .{module}, and there is no {path.relative_to(directory)}"
    elif isinstance(node, ast.ImportFrom | ast.Import):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            first = name.partition(".")[0]
            if first in probe.NOT_IMPORTABLE:
                yield f"imports {name}, which no user of the export has"
            elif (directory / f"{first}.py").is_file():
                yield f"imports {first} and means {first}.py beside it: write .{first}"


def _imports_by_name(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    return (isinstance(called, ast.Attribute) and called.attr == "import_module") or (
        isinstance(called, ast.Name) and called.id in ("import_module", "__import__")
    )


def _parsed(source: Path) -> ast.Module:
    try:
        return ast.parse(source.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise Failed(f"{source.name} is not Python: {error}") from error


def _names_of(module: ast.Module) -> set[str]:
    """What a module defines or imports at its top."""
    found = set()
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise Failed("there is no config.json") from error
    except ValueError as error:
        raise Failed(f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise Failed(f"config.json holds a {type(config).__name__}, expected an object")
    return config


def config_fields(directory: Path) -> str:
    """config.json has every field that says what the model is, with values that make one."""
    config = _config(directory)
    missing = [name for name in REQUIRED_FIELDS if name not in config]
    faults = [f"missing: {', '.join(missing)}"] if missing else []
    if "tie_word_embeddings" in missing:
        faults.append("without tie_word_embeddings 4.57 ties the decoder and 5.x does not")
    faults += [
        f"{name} is {config[name]!r}, expected a whole number above 0"
        for name in _COUNTS
        if name in config and not _is_count(config[name])
    ]
    if not faults:
        faults = list(_contradictions(config))
    if faults:
        raise Failed(some(faults))
    return f"all {len(REQUIRED_FIELDS)} fields, and they fit each other"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """What makes no model, of fields that are all there."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        yield f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
    elif config["rope"] and hidden // heads % 2:
        yield f"rope needs an even size of a head, and {hidden} / {heads} is odd"
    if config["hidden_act"] not in ("swiglu", "gelu"):
        yield f"hidden_act is {config['hidden_act']!r}, expected swiglu or gelu"
    if config.get("model_type") != "neobert":
        yield f"model_type is {config.get('model_type')!r}, expected neobert"
    longest = config["max_position_embeddings"]
    if not _is_count(longest) or config.get("max_length", longest) != longest:
        yield f"max_position_embeddings is {longest!r} and max_length {config.get('max_length')!r}, expected one number"
    pad = config["pad_token_id"]
    if not isinstance(pad, int) or not 0 <= pad < config["vocab_size"]:
        yield f"pad_token_id is {pad!r}, outside of the vocabulary of {config['vocab_size']}"
    if config.get("ngpt"):
        yield "ngpt is set, which the exported model does not have"


def dtypes_kept(directory: Path) -> str:
    """Loading with the dtype that config.json names loses nothing of any tensor."""
    from safetensors import SafetensorError, safe_open

    if not (directory / WEIGHTS).is_file():
        raise Skipped(f"there is no {WEIGHTS}")
    config = _config(directory)
    said = config.get("dtype", config.get("torch_dtype"))
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as opened:
            names = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Failed(f"{WEIGHTS} cannot be read: {error}") from error
    counts = Counter(names.values())
    found = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    if said not in _HELD:
        raise Failed(f"config.json says dtype {said!r}, and the tensors are {found}: expected {', '.join(_HELD)}")
    lost = [name for name, dtype in names.items() if dtype not in _HELD[said]]
    if lost:
        raise Warned(f"{found}, and config.json says {said}: loading with dtype='auto' rounds {some(lost)}")
    return f"{found}, and config.json says {said}"


_HELD = {
    "float64": ("F64", "F32", "BF16", "F16"),
    "float32": ("F32", "BF16", "F16"),
    "bfloat16": ("BF16",),
    "float16": ("F16",),
}
"""Which tensors of a file a dtype holds without rounding."""

_QUESTIONS = {FILES: files_present, CODE: code_is_self_contained, CONFIG: config_fields, DTYPES: dtypes_kept}


# What is asked in a fresh process


def ask_in_fresh_process(directory: Path, scratch: Path) -> list[Finding]:
    """The findings of probe.py; a process that dies has failed the check it was at."""
    answers = scratch / "findings.jsonl"
    ended = run_probe({"do": "checks", "directory": str(directory), "answer": str(answers)}, scratch)
    lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
    rows = [json.loads(line) for line in lines]
    found = [Finding(check=check, status=status, reason=one_line(reason)) for check, status, reason in rows]
    lacking = [name for name in probe.NAMES if name not in {finding.check for finding in found}]
    if lacking:
        reason = one_line(ended or "the fresh process ended without an answer")
        found.append(Finding(check=lacking[0], status="failed", reason=reason))
        found += [Finding(check=name, status="skipped", reason=f"needs '{lacking[0]}'") for name in lacking[1:]]
    return found


def run_probe(request: Mapping[str, Any], scratch: Path) -> str:
    """Runs probe.py on a request in an interpreter with empty folders; how it ended, empty when it ended well."""
    base = Path(tempfile.mkdtemp(dir=scratch))
    for folder in fresh_directories(base):
        Path(folder).mkdir(parents=True)
    (base / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # Neither the working directory nor the user's own packages.
    command = [sys.executable, "-P", "-s", probe.__file__, str(base / "request.json")]
    # The environment has one thread, which is too few for a gigabyte.
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    with open(base / "errors", "w+b") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            cwd=base / "scratch" / "work",
            env=environment(base / "scratch", os.environ) | {"OMP_NUM_THREADS": threads},
            start_new_session=True,
        )
        try:
            status = child.wait(timeout=TIME_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"the fresh process was killed: it exceeded {TIME_LIMIT_SECONDS:g} s"
        finally:
            kill_group(child.pid)
            child.wait()
        errors.seek(0)
        last = last_line(errors.read().decode(errors="replace"))
    if status == 0:
        return ""
    how = f"was killed by {signal_name(-status)}" if status < 0 else f"exited with status {status}"
    return f"the fresh process {how}; its last line: {last or 'none'}"


# What is asked with the checkpoint


def _compared(directory: Path, run: Run, scratch: Path, *, loads: bool) -> list[Finding]:
    found = [
        _asked(AGAINST_CONFIG, config_is_the_checkpoints, directory, run),
        _asked(AGAINST_TENSORS, tensors_are_the_checkpoints, directory, run),
    ]
    if loads:
        return [*found, _asked(AGAINST_OUTPUTS, outputs_are_the_checkpoints, directory, run, scratch)]
    return [
        *found,
        Finding(check=AGAINST_OUTPUTS, status="skipped", reason=f"needs what '{probe.LOAD}' could not load"),
    ]


_NOT_EXPORTED = ("attn_backend", "kernel_backend", "ngpt", "base_scale", "classifier_init_range")
"""Fields of the training model that change nothing of what the exported one computes."""


def config_is_the_checkpoints(directory: Path, run: Run) -> str:
    """Every field of the training model stands in config.json with the same value."""
    config = _config(directory)
    fields = {name: value for name, value in run.fields.items() if name not in _NOT_EXPORTED}
    faults = [
        f"{name} is {config.get(name)!r}, the checkpoint's is {value!r}"
        for name, value in fields.items()
        if config.get(name, _ABSENT) != value
    ]
    if faults:
        raise Failed(some(faults))
    return f"{len(fields)} fields are the checkpoint's"


_ABSENT = object()


def tensors_are_the_checkpoints(directory: Path, run: Run) -> str:
    """Every tensor of the checkpoint is in the directory's file, bit for bit and in its dtype, and no other."""
    from reference_models.neobert import checkpoint

    lacking = dict.fromkeys(checkpoint.layout(run))
    faults = []
    for name, tensor in probe.stored_tensors(directory):
        if name not in lacking:
            faults.append(f"{name} is not in the checkpoint")
            continue
        del lacking[name]
        expected = checkpoint.read_weight(run, name)
        if expected.dtype != tensor.dtype:
            faults.append(f"{name} is {tensor.dtype}, the checkpoint's is {expected.dtype}")
        elif expected.shape != tensor.shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, the checkpoint's {tuple(expected.shape)}")
        elif not probe.same_bits(tensor, expected):
            difference = float((tensor.double() - expected.double()).abs().max())
            faults.append(f"{name} is not the checkpoint's, largest difference {difference:.3g}")
    is_tied_away = run.fields["tie_word_embeddings"] and checkpoint.DECODER in lacking
    if is_tied_away:
        del lacking[checkpoint.DECODER]
    faults += [f"{name} of the checkpoint is missing" for name in lacking]
    if faults:
        raise Failed(some(faults))
    count = len(checkpoint.layout(run)) - is_tied_away
    tied = f"; {checkpoint.DECODER} is the embedding and left out" if is_tied_away else ""
    return f"{count} tensors equal the checkpoint's, bit for bit{tied}"


def outputs_are_the_checkpoints(directory: Path, run: Run, scratch: Path) -> str:
    """Logits and hidden states in float64 are those of the training model, without a mask and with every kind."""
    import torch
    from safetensors.torch import load_file, save_file

    batches = parity_batches(run.fields)
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        tensors[f"{index}.ids"] = batch.ids
        if batch.mask is not None:
            tensors[f"{index}.mask"] = batch.mask
    save_file(tensors, scratch / "batches.safetensors")
    answer = scratch / "outputs.safetensors"
    request = {"directory": str(directory), "batches": str(scratch / "batches.safetensors"), "number": len(batches)}
    ended = run_probe({"do": "batches", "answer": str(answer), **request}, scratch)
    if ended:
        raise Failed(ended)
    # The process with the other model has ended: two of them are never in memory together.
    ours = load_file(answer)
    worst, states_kept = 0.0, True
    with torch.no_grad():
        for index, (batch, reference) in enumerate(zip(batches, original_outputs(run, batches), strict=True)):
            states = [
                ours[f"{index}.hidden.{layer}"] for layer in range(len(ours)) if f"{index}.hidden.{layer}" in ours
            ]
            names = ["the embeddings", *(f"block {layer}" for layer in range(len(reference) - 3)), "the final norm"]
            # A directory with other hidden states still has logits to compare.
            states_kept = len(states) == len(reference) - 1
            pairs = [*zip(names, states, reference[:-1], strict=True)] if states_kept else []
            for name, given, expected in [*pairs, ("the logits", ours[f"{index}.logits"], reference[-1])]:
                worst = max(worst, _relative_error(name, given, expected, batch.name))
    what = "logits and hidden states" if states_kept else "logits (its hidden states are others)"
    return f"{what} of {len(batches)} batches in float64: relative error {worst:.1e}, at most {PARITY:g}"


def _relative_error(name: str, given: Tensor, expected: Tensor, batch: str) -> float:
    where = f"{name} with {batch}"
    if given.shape != expected.shape:
        raise Failed(f"{where}: shape {tuple(given.shape)}, the training model's is {tuple(expected.shape)}")
    if not given.isfinite().all():
        raise Failed(f"{where}: {int((~given.isfinite()).sum())} of {given.numel()} values are not finite")
    error = float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if error > PARITY:
        hint = "; an error of this size is that of a part computed in float32" if error < 1e-5 else ""
        raise Failed(
            f"{where}, the first to differ from the training model: relative error {error:.2g}, at most "
            f"{PARITY:g}{hint}"
        )
    return error


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What both models are given: int64 ids (rows, tokens), the mask of transformers, and the training model's."""

    name: str
    ids: Tensor
    mask: Tensor | None = None
    pad_mask: Tensor | None = None


def parity_batches(fields: Mapping[str, Any]) -> list[Batch]:
    """Random tokens without a mask, with padding at each place, with scores added, and longer than in training."""
    import torch

    generator = torch.Generator().manual_seed(1)
    size, pad = fields["vocab_size"], fields.get("pad_token_id", 0)
    longest = fields["max_length"]

    def drawn(rows: int, tokens: int) -> Tensor:
        ids = torch.randint(size - 1, (rows, tokens), generator=generator)
        return torch.where(ids >= pad, ids + 1, ids)

    length = min(16, longest)
    batches = [Batch(name="no mask", ids=drawn(2, length))]
    for side in ("right", "left", "inside"):
        ids, keep = probe.padding(drawn(2, length), pad, side)
        additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(keep == 0, float("-inf"))
        batches.append(Batch(name=f"padding {side}", ids=ids, mask=keep, pad_mask=additive))
    # Negative all over: one above 0 could not be told from a mask of 0 and 1.
    scores = -3 * torch.rand((2, length), dtype=torch.float64, generator=generator)
    batches.append(Batch(name="scores added by a float64 mask", ids=drawn(2, length), mask=scores, pad_mask=scores))
    if fields.get("rope", True) and longest <= 64:
        batches.append(Batch(name=f"more than {longest} tokens", ids=drawn(1, longest + 3)))
    return batches


def original_outputs(run: Run, batches: Sequence[Batch]) -> Iterator[list[Tensor]]:
    """Of each batch the input of every block, the output of the final norm, and the logits."""
    from reference_models.neobert import checkpoint

    model = checkpoint.load_original(run).double()
    states: list[Tensor] = []
    blocks = model.model.transformer_encoder
    for block in blocks:
        block.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    model.model.layer_norm.register_forward_hook(lambda _, __, output: states.append(output))
    for batch in batches:
        states.clear()
        given = model(batch.ids, batch.pad_mask)["logits"]
        yield [*states, given]


# The table


def print_findings(directory: Path, found: Sequence[Finding]) -> None:
    """The table on standard output: a row for every check in the order they were asked, then the count."""
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    plain = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one rule under the head
    grid = Table(box=plain, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    grid.add_column("check", no_wrap=True)
    grid.add_column("status", no_wrap=True)
    grid.add_column("found", overflow="fold")
    for finding in found:
        reason = finding.reason.encode(console.encoding, "backslashreplace").decode(console.encoding)
        grid.add_row(finding.check, Text(finding.status, style=_STYLES[finding.status]), Text(reason))
    console.print(Text(str(directory), style="dim"), overflow="fold")
    console.print()
    console.print(grid)
    counts = Counter(finding.status for finding in found)
    words = ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
    console.print()
    console.print(Text(words, style="bold red" if counts["failed"] else "bold green"))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table: 0 for no failure, 1 for a failed check, 2 for no export or no checkpoint, 130 after Ctrl-C."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m reference_models.neobert.validate", description=summary)
    parser.add_argument("directory", type=Path, metavar="DIR", help="an exported model")
    parser.add_argument("--against", type=Path, metavar="CHECKPOINT", help="the checkpoint it was exported from")
    parser.add_argument("--strict", action="store_true", help="warnings are failures")
    options = parser.parse_args(argv)
    try:
        found = validate(options.directory, against=options.against, strict=options.strict)
    except NotAnExport as error:
        print(f"validate: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("validate: interrupted", file=sys.stderr)
        return 130
    print_findings(options.directory, found)
    return 1 if any(finding.status == "failed" for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
