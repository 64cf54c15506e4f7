# SPDX-License-Identifier: Apache-2.0
"""What docs/mlx_bert.md, and README.md of MLX BERT, show is done as it stands there, at a real Hub."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import mlx.core as mx
import torch
import transformers

from harness.cases.weights import sensitising_state
from harness.hub import HubServer, User
from reference_models.mlx_bert import factory, heads, weights
from reference_models.mlx_bert.config import BertConfig
from tests.docs.blocks import ROOT, Block, blocks, quoted, rows
from tests.mlx_bert.oracle import torch_model

pytestmark = [pytest.mark.mlx, pytest.mark.hub, pytest.mark.usefixtures("one_thread")]

DOCUMENT = ROOT / "docs/mlx_bert.md"
README = ROOT / "README.md"

# Every block, in the order of the document and with the names of those before it. A line that is only an expression
# with its value behind it is also asked for that value; of some blocks the model is looked at.
READER = """
import contextlib, io, json, pathlib, re, sys, warnings

names, said = {"__name__": "document", "json": json, "pathlib": pathlib}, []
for block, line, look in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    block = block.replace("{...}", "json.loads(pathlib.Path('hf_config.json').read_text())")
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        # As far down as in the document, so that a traceback shows the line.
        exec(compile("\\n" * line + block, "document", "exec"), names)
    claims = re.findall(r"^(\\S.*)  # (True|False)$", block, re.MULTILINE)
    model = names.get("model")
    ids = __import__("mlx.core").core.array([[2, 3, 4, 5], [6, 7, 8, 9]])
    found = {
        "printed": printed.getvalue(),
        "warned": [str(one.message) for one in warned],
        "claims": [[str(eval(expression, names)), value] for expression, value in claims],
    }
    if look and model is not None:
        states = (getattr(model, "bert", model))(ids)
        found |= {"states": states.last_hidden_state.tolist(), "pooled": states.pooler_output.tolist()}
        found |= {"type": type(model).__name__, "training": model.training}
    if "mlx_config" in names:
        found["config"] = names["mlx_config"].to_hf_config(), names["hf_config"], names["mlx_config"].vocab_size
    said.append(found)
pathlib.Path(sys.argv[2]).write_text(json.dumps(said))
"""
PUSH = """
import sys
from huggingface_hub import HfApi

api = HfApi()
for repository, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    api.create_repo(repository)
    api.upload_folder(repo_id=repository, folder_path=folder)
"""
CLOSE = "import sys, huggingface_hub as h; h.HfApi().update_repo_settings(sys.argv[1], gated='manual')"
IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
NAMES = ("bert-base-uncased", "bert-large-uncased", "distilbert-base-uncased", "no-weights", "bad-config")
# The blocks of the earlier port's document, as they are written there but for the paths of imports.
BEFORE = (
    "From the Hub",
    "From a directory",
    "A forward pass",
    "A classification head",
    "What is an id",
    "A cache of one's own",
    "Configuration",
)


def run(hub: HubServer, source: str, *arguments: str, home: Path, token: str | None = None, **more: str) -> str:
    environment = {**os.environ, **hub.env(token=token, home=home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def small(model_type: str) -> Any:
    """A small float32 model of transformers whose every weight shows."""
    return torch_model(model_type).float()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with small models that transformers made, under the names of the document."""
    home = tmp_path_factory.mktemp("home")
    folders = {name: home / name for name in NAMES}
    for name, folder in folders.items():
        small("distilbert" if name.startswith("distil") else "bert").save_pretrained(folder)
    (folders["no-weights"] / "model.safetensors").unlink()
    (folders["bad-config"] / "config.json").write_text("{")
    (home / "nothing").mkdir()
    (home / "nothing" / "README.md").write_text("")
    owned = {f"mlx-community/{name}": folder for name, folder in folders.items()}
    owned |= {f"org/{name}": folders[NAMES[0]] for name in ("bert", "gated")} | {"org/nothing": home / "nothing"}
    users = [User(name="mlx-community", token="hf_mlx"), User(name="org", token="hf_org")]
    with HubServer(tmp_path_factory.mktemp("hub"), users=users) as server:
        for user in users:
            mine = {name: folder for name, folder in owned.items() if name.startswith(f"{user.name}/")}
            pairs = [part for name, folder in mine.items() for part in (name, str(folder))]
            run(server, PUSH, *pairs, home=home, token=user.token)
        run(server, CLOSE, "org/gated", home=home, token="hf_org")
        yield server


def followed(hub: HubServer, written: list[Block], place: Path) -> list[dict[str, Any]]:
    """What each block did, in one fresh process with a directory of its own."""
    small("bert").save_pretrained(place / "path" / "to" / "local" / "model")
    (place / "hf_config.json").write_bytes((place / "path/to/local/model/config.json").read_bytes())
    asked = [(block.text, block.line, block.heading in BEFORE) for block in written]
    (place / "blocks.json").write_text(json.dumps(asked))
    run(hub, READER, "blocks.json", "said.json", home=place)
    return list(json.loads((place / "said.json").read_text()))


@pytest.fixture(scope="module")
def read(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the first block below each heading did; and the directory it was done in."""
    place = tmp_path_factory.mktemp("reader")
    written = [block for block in blocks(DOCUMENT) if block.language == "python"]
    said: dict[str, Any] = {}
    for block, found in zip(written, followed(hub, written, place), strict=True):
        said.setdefault(block.heading, found)
    return said, place


def assert_bert(found: dict[str, Any]) -> None:
    """The model of the block gives the numbers of the model of transformers, and is in evaluation mode."""
    with torch.no_grad():
        truth = torch_model("bert")(IDS)
    for mine, theirs in ((found["states"], truth.last_hidden_state), (found["pooled"], truth.pooler_output)):
        assert float((torch.tensor(mine).double() - theirs).abs().max() / theirs.abs().max()) <= 2e-6
    assert found["training"] is False


def test_from_the_hub(read: tuple[dict[str, Any], Path]) -> None:
    found = read[0]["From the Hub"]
    assert_bert(found)
    assert (found["type"], found["warned"]) == ("BertCore", [])


def test_from_a_directory(read: tuple[dict[str, Any], Path]) -> None:
    found = read[0]["From a directory"]
    assert_bert(found)
    assert (found["type"], found["warned"]) == ("BertCore", [])


def test_the_configuration(read: tuple[dict[str, Any], Path]) -> None:
    found, place = read
    made, again, vocabulary = found["Configuration"]["config"]
    assert made == again and vocabulary == 64
    original = json.loads((place / "hf_config.json").read_text())
    assert {name: again[name] for name in original} == original


def test_what_is_an_id(read: tuple[dict[str, Any], Path]) -> None:
    claims = read[0]["What is an id"]["claims"]
    assert len(claims) == 2 and all(found == claimed for found, claimed in claims)


def test_a_forward_pass(read: tuple[dict[str, Any], Path]) -> None:
    found = read[0]["A forward pass"]
    assert_bert(found)
    assert (found["printed"], found["warned"]) == ("Output shape: (2, 10, 32)\n", [])


def test_a_classification_head(read: tuple[dict[str, Any], Path]) -> None:
    found = read[0]["A classification head"]
    assert_bert(found)
    assert (found["type"], found["printed"]) == ("BertWithHead", "Logits shape: (2, 1)\n")
    (warning,) = found["warned"]
    assert warning.endswith("has no head of a binary_classification of 1 outputs; the model's is random until it is "
                            "trained")  # fmt: skip


def test_a_cache_of_ones_own(read: tuple[dict[str, Any], Path]) -> None:
    found, place = read
    assert_bert(found["A cache of one's own"])
    cached = place / "my_model_cache" / "models--mlx-community--bert-base-uncased" / "snapshots"
    (snapshot,) = cached.iterdir()
    assert {"config.json", "model.safetensors"} <= {path.name for path in snapshot.iterdir()}


def test_the_readme_as_it_stands(hub: HubServer, tmp_path: Path) -> None:
    (block,) = [block for block in blocks(README) if block.section == "MLX BERT"]
    assert block.language == "python"
    followed(hub, [block], tmp_path)


ANSWER = """
import json, sys, warnings
sys.modules.update(dict.fromkeys(json.loads(sys.argv[2])))
from reference_models.mlx_bert.factory import create_model

answers = []
for call in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            answer = type(create_model(**call)).__name__
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
    answers.append([answer, *(str(one.message) for one in warned)])
print(json.dumps(answers))
"""


def answers(
    hub: HubServer, home: Path, *calls: dict[str, Any], without: list[str] | None = None, **more: str
) -> list[list[str]]:
    """What each call of create_model gives or raises, and the warnings, in one fresh process."""
    said = run(hub, ANSWER, json.dumps(calls), json.dumps(without or []), home=home, **more)
    return list(json.loads(said))


def test_what_the_document_says_of_errors(hub: HubServer, tmp_path: Path) -> None:
    core: dict[str, Any] = {"model_type": "bert_core"}
    head: dict[str, Any] = {"head_type": "regression"}
    place = "mlx-community/"
    found = answers(
        hub,
        tmp_path,
        # Download failures: informative.
        core | {"model_name": f"{place}never"},
        head | {"model_name": f"{place}bert-base-uncased@never"},
        # Missing weight files: random initialization, by name and not in silence.
        core | {"model_name": f"{place}no-weights"},
        core | {"model_name": f"{place}no-weights", "random_init": True},
        head | {"model_name": f"{place}no-weights", "random_init": True},
        # Config errors: the default configuration, by name and not in silence.
        core | {"model_name": f"{place}bad-config"},
        core | {"model_name": f"{place}bad-config", "default_config": True},
        # The other models of its list.
        core | {"model_name": f"{place}bert-large-uncased"},
        core | {"model_name": f"{place}distilbert-base-uncased"},
        head | {"model_name": f"{place}distilbert-base-uncased"},
    )
    assert all("\n" not in line for answer in found for line in answer)
    never, revision, no_weights, random, random_head, config, default, large, distil, distil_head = found
    assert never == ["HubError: mlx-community/never: is not on the Hub, or is private and the token given does not "
                     "open it"]  # fmt: skip
    assert revision[0].startswith("HubError: mlx-community/bert-base-uncased@never: has no revision 'never'")
    assert no_weights[0].startswith("WeightsError: ") and "expected one of model.safetensors" in no_weights[0]
    for answer, kind in ((random, "BertCore"), (random_head, "BertWithHead")):
        assert answer[0] == kind and "no weights; all are random, as random_init=True asks for" in answer[1]
    assert config[0].startswith("ConfigError: ") and "config.json: cannot be read as JSON" in config[0]
    # The weights are not those of the default configuration, and that is said too.
    assert default[0].startswith("WeightsError: ") and "shape" in default[0]
    assert "the default configuration is used, as default_config=True asks for" in default[1]
    assert large == ["BertCore"] and distil == ["BertCore"] and distil_head[0] == "BertWithHead"


def test_the_lines_of_the_hubs_errors(hub: HubServer, tmp_path: Path) -> None:
    names = ("bert-base-uncased", "org/never", "org/bert@never", "org/gated", "org/nothing")
    found = answers(hub, tmp_path, *({"model_name": name} for name in names))
    bert = {"model_name": "org/bert"}
    found += answers(hub, tmp_path, bert, HF_HUB_OFFLINE="1")
    found += answers(hub, tmp_path, bert, HF_ENDPOINT="http://127.0.0.1:9")
    found += answers(hub, tmp_path, bert, without=["huggingface_hub"])
    table = rows(DOCUMENT, "what | line")
    assert len(found) == len(table)
    for (answer,), (what, line) in zip(found, table, strict=True):
        kind, _, said = answer.partition(": ")
        assert kind == {0: "NotFoundError", 7: "ImportError"}.get(table.index([what, line]), "HubError")
        expected = quoted(line)[0]
        assert said == expected or (expected.endswith(" ...") and said.startswith(expected[:-3])), what


def test_the_lists_of_the_factory_are_whole() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    registry = quoted(text.partition("`list_available_models()` gives:")[2].partition(". `create_bert_for_task")[0])
    assert sorted(registry) == factory.list_available_models()
    tasks = quoted(text.partition("takes a head type or")[2].partition(";")[0])
    assert {*tasks, *heads.HEAD_TYPES, *heads.ALIASES} == set(factory.TASKS)
    assert [quoted(row[0])[0] for row in rows(DOCUMENT, "`head_type` | outputs")] == list(heads.HEAD_TYPES)
    arguments = [name for row in rows(DOCUMENT, "argument of `create_model`") for name in quoted(row[0])]
    assert set(arguments) == set(inspect.signature(factory.create_model).parameters) - {"unknown"}
    files = quoted(text.partition("in the directory is read:")[2].partition(".\n\n")[0])
    assert [name for name in files if name != ".npz"] == list(weights.FILES)


@pytest.mark.parametrize("head_type", heads.HEAD_TYPES)
def test_the_outputs_of_a_head_are_those_of_its_row(head_type: str) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=12)
    labels = {"binary_classification": 1, "masked_lm": 12}.get(head_type, 3)
    options = {"use_uncertainty": True} if head_type == "regression" else {}
    head = heads.default_head(config, head_type, labels, **options)
    found = factory.create_model(config=config, head_config=head)(mx.array([[2, 3, 4], [5, 6, 7]]))["head_outputs"]
    table = {quoted(row[0])[0]: row[1] for row in rows(DOCUMENT, "`head_type` | outputs")}
    if head_type == "masked_lm":
        table["masked_lm"] = table["token_classification"]
    shapes = {}
    for names, sizes in re.findall(r"((?:`\w+`,? )+)\(([^)]*)\)", table[head_type]):
        shape = eval(f"[{sizes}]", {"B": 2, "T": 3, "N": labels})
        shapes |= dict.fromkeys(quoted(names), tuple(shape))
    assert shapes == {name: array.shape for name, array in found.items()}


def test_a_task_model_of_the_hub_at_a_revision(tmp_path: Path) -> None:
    config = small("bert").config
    config.num_labels = 3
    model = transformers.BertForSequenceClassification(config)
    model.load_state_dict(sensitising_state(model.double(), gains={}, seed=7))
    model.float().save_pretrained(tmp_path / "model")
    with HubServer(tmp_path / "hub", users=[User(name="org", token="hf_org")]) as server:
        run(server, PUSH, "org/task", str(tmp_path / "model"), home=tmp_path, token="hf_org")
        ((kind, *warned),) = answers(server, tmp_path, {"model_name": "org/task@main"})
        assert (kind, warned) == ("BertWithHead", [])
