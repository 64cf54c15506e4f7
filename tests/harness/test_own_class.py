# SPDX-License-Identifier: Apache-2.0
"""Ports that are no models of transformers: loaded by their own class, with their code there, from a Hub too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from harness import check_parity, families
from harness.families import Family, dropouts_of, find_family, register_family, with_dropout
from harness.ports import Port, beside, read_ports
from harness.results import Result
from harness.routes.hub import folder_of, model_of
from harness.routes.remote_code import hidden, request_for
from harness.runner import Options, nowhere, too_few
from harness.trial import Trial

REPOSITORY = Path(__file__).parents[2]
PORT = next(port for port in read_ports(REPOSITORY) if port.name == "nanogpt")


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    """nanoGPT's, as if its ports were of a library that Auto classes do not know."""
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    nanogpt = find_family("nanogpt")
    return register_family(dataclasses.replace(nanogpt, name="own", framework="own", revised_name=""))


@pytest.fixture
def port(family: Family) -> Port:
    return dataclasses.replace(PORT, family=family.name, min_checks=0)


@pytest.mark.hub
def test_it_is_pushed_as_a_directory_and_loaded_by_its_class(frameworks: None, port: Port) -> None:
    asked = ["hub.outputs", "hub.revisions", "hub.private", "hub.gated", "hub.cache_dir", "hub.warm_cache"]
    results = check_parity(port, checks=asked, backends=["torch-cpu"])
    assert {result.check: (result.status, result.reason) for result in results} == dict.fromkeys(asked, ("passed", ""))


def test_checks_of_transformers_interface_are_not_asked(frameworks: None, port: Port) -> None:
    results = check_parity(port, checks=["hub.files", "api.auto_classes", "remote_code.*"], backends=["torch-cpu"])
    assert {result.status for result in results} == {"skipped"}
    assert {result.reason for result in results} == {"ports of family 'own' are models of own, not of transformers"}


def trial_of(port: Port, family: Family) -> Trial:
    values = dict.fromkeys((field.name for field in dataclasses.fields(Trial)), None)
    return Trial(**{**values, "port": port, "family": family, "dtype": "float32"})  # type: ignore[arg-type]


def test_a_fresh_process_is_told_the_class_and_may_read_its_code(port: Port, family: Family) -> None:
    own, theirs = trial_of(port, family), trial_of(PORT, find_family("nanogpt"))
    assert request_for(own, steps=[])["class"] == PORT.model
    assert hidden(own) == []
    assert "class" not in request_for(theirs)
    assert hidden(theirs) == [PORT.root]


def test_what_has_no_push_to_hub_is_uploaded_with_the_same_options(port: Port, family: Family, tmp_path: Path) -> None:
    own, theirs = trial_of(port, family), trial_of(PORT, find_family("nanogpt"))
    assert model_of(own, tmp_path, revision="experiment") == folder_of(tmp_path, revision="experiment")
    assert model_of(theirs, tmp_path, revision="experiment")["kind"] == "model"


def test_a_name_is_found_beside_the_model_or_in_the_ports_code(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("class Model: ...\nclass Head: ...\n")
    (tmp_path / "more.py").write_text("class Tail: ...\ndef quantize(model): ...\n")
    port = Port(
        name="p",
        family="nanogpt",
        model="model.py:Model",
        config="model.py:Model",
        root=tmp_path,
        code=("model.py", "more.py"),
    )
    assert [beside(port, name) for name in ("Head", "Tail", "quantize", "Wing")] == [
        "model.py:Head",
        "more.py:Tail",
        "more.py:quantize",
        None,
    ]


@pytest.mark.parametrize(
    ("named", "expected"), [((), {}), ("dropout", {"dropout": 0.3}), (("a", "b"), {"a": 0.3, "b": 0.3})]
)
def test_every_field_of_dropout_is_set(named: str | tuple[str, ...], expected: dict[str, float]) -> None:
    family = dataclasses.replace(find_family("nanogpt"), dropout=named)
    assert list(dropouts_of(family)) == list(expected)
    assert with_dropout(family, {"n_layer": 1}, 0.3) == {"n_layer": 1, **expected}


def test_where_no_backend_of_a_family_is_here_a_number_of_checks_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, family: Family, port: Port
) -> None:
    least = dataclasses.replace(port, min_checks=2)
    result = Result(
        port="nanogpt",
        family="own",
        check="forward.logits",
        route="direct",
        backend="torch-cpu",
        dtype="float64",
        status="skipped",
        reason="there is no such device",
    )
    assert nowhere(family) is None
    assert too_few([least], [result], Options()) == ["port 'nanogpt': 0 checks ran, 2 were asked for"]
    monkeypatch.setattr("harness.runner.unavailable", lambda backend: "there is no such device")
    assert nowhere(family) == "there is no such device"
    assert too_few([least], [result], Options()) == []
    assert len(too_few([least], [result], Options(min_checks=1))) == 1
