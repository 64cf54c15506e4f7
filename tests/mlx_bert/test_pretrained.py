# SPDX-License-Identifier: Apache-2.0
"""BertCore from a directory and back: what transformers wrote, what transformers reads, and what is never silent."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import torch  # noqa: E402
import transformers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from reference_models.mlx_bert import hub  # noqa: E402
from reference_models.mlx_bert.config import ConfigError  # noqa: E402
from reference_models.mlx_bert.core import BertCore, _is_hub_model_id  # noqa: E402
from reference_models.mlx_bert.hub import HubError, NotFoundError  # noqa: E402
from reference_models.mlx_bert.quantisation import quantize  # noqa: E402
from reference_models.mlx_bert.weights import WeightsError  # noqa: E402
from reference_models.mlx_bert.with_head import BertWithHead  # noqa: E402
from tests.mlx_bert.oracle import MODEL_TYPES, core_of, relative, to_mlx, torch_model  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread", "mlx_on_the_cpu")]
IDS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory that transformers wrote, of a float32 BERT."""
    torch_model("bert").float().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def states_of(core: Any) -> dict[str, Any]:
    return dict(tree_flatten(core.parameters()))


def drop(saved: Path, *names: str, add: tuple[str, ...] = ()) -> None:
    path = str(saved / "model.safetensors")
    tensors = {name: tensor for name, tensor in mx.load(path).items() if name not in names}
    mx.eval(tensors)
    mx.save_safetensors(path, tensors | {name: mx.zeros((2, 2)) for name in add}, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_transformers_saved_gives_its_numbers(model_type: str, tmp_path: Path) -> None:
    model = torch_model(model_type)
    model.float().save_pretrained(tmp_path)
    core = BertCore.from_pretrained(tmp_path)
    assert not core.training and core.config.vocab_size == 64
    truth = model.double()(IDS).last_hidden_state.detach()
    assert relative(core(to_mlx(IDS)).last_hidden_state, truth) <= 2e-6
    # And back: transformers loads what BertCore saves, with the same bits.
    core.save_pretrained(tmp_path / "again")
    again, said = transformers.AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert type(again) is type(model) and not said["missing_keys"] and not said["unexpected_keys"]
    assert all((again.state_dict()[name] == tensor.float()).all() for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]


def test_a_saved_model_comes_back_whole(saved: Path, tmp_path: Path) -> None:
    core = BertCore.from_pretrained(str(saved))
    core.set_dtype(mx.bfloat16)
    core.save_pretrained(tmp_path / "again")
    again = BertCore.from_pretrained(tmp_path / "again")
    assert again.config.to_dict() | {"extra": {}} == core.config.to_dict() | {"extra": {}}
    assert "bfloat16" in (tmp_path / "again" / "config.json").read_text()
    assert all((again_value == states_of(core)[name]).all() for name, again_value in states_of(again).items())
    assert {value.dtype for value in states_of(again).values()} == {mx.bfloat16}


def test_overrides_and_dtype(saved: Path) -> None:
    core = BertCore.from_pretrained(saved, dtype=mx.float16, hidden_dropout_prob=0.5, compute_additional_pooling=False)
    assert core.config.hidden_dropout_prob == 0.5 and core(to_mlx(IDS)).mean_pooled is None
    assert {value.dtype for value in states_of(core).values()} == {mx.float16}
    with pytest.raises(TypeError, match="'hidden_dropout': did you mean 'hidden_dropout_prob'"):
        BertCore.from_pretrained(saved, hidden_dropout=0.5)
    with pytest.raises(WeightsError, match="shape"):
        BertCore.from_pretrained(saved, hidden_size=64)


@pytest.mark.parametrize("dtype", ["float16", torch.float16, mx.int32, mx.bool_, mx.complex64])
def test_a_dtype_that_no_model_computes_in_is_refused(saved: Path, dtype: Any) -> None:
    for load in (BertCore.from_pretrained, partial(BertWithHead.from_pretrained, head_type="regression")):
        with pytest.raises(ValueError, match=r"dtype is .*: expected mlx.core.float32, float16") as caught:
            load(saved, dtype=dtype)
        assert "\n" not in str(caught.value)


def test_a_quantised_model_is_not_cast_to_float64(saved: Path, tmp_path: Path) -> None:
    quantize(BertCore.from_pretrained(saved), bits=4, group_size=32).save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match="dtype is float64, and MLX computes nothing quantised in it"):
        BertCore.from_pretrained(tmp_path / "quantised", dtype=mx.float64)


@pytest.mark.parametrize("cls", [BertCore, BertWithHead])
def test_a_file_in_place_of_the_directory_is_told_so(cls: Any, saved: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        for options in ({}, {"random_init": True, "default_config": True}):
            with pytest.raises(HubError, match=f"{name}' is a file; expected the directory"):
                cls.from_pretrained(saved / name, **options)


def test_a_configuration_that_is_nested_too_deeply_is_told_so(saved: Path) -> None:
    (saved / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON") as caught:
        BertCore.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_the_file_may_go_once_the_model_is_there(saved: Path) -> None:
    core = BertCore.from_pretrained(saved)
    before = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(b"\0" * len(before))
    (saved / "model.safetensors").unlink()
    assert mx.isfinite(core(to_mlx(IDS)).last_hidden_state).all()
    assert (states_of(core)["embeddings.LayerNorm.weight"] != 0).any()


def test_a_missing_tensor_is_an_error_and_random_only_by_name(saved: Path) -> None:
    name = "encoder.layer.1.output.dense.bias"
    drop(saved, name)
    with pytest.raises(WeightsError, match=name) as caught:
        BertCore.from_pretrained(saved)
    assert caught.value.missing == (name,)
    with pytest.raises(WeightsError, match=name):
        BertCore.from_pretrained(saved, strict=False)
    with pytest.warns(UserWarning, match=f"lacks {name}; random, as random_init=True asks for"):
        core = BertCore.from_pretrained(saved, random_init=True)
    loaded = mx.load(str(saved / "model.safetensors"))
    assert all((states_of(core)[key] == value).all() for key, value in loaded.items())


def test_a_tensor_that_is_left_over_is_an_error_and_passed_over_only_by_name(saved: Path) -> None:
    drop(saved, add=("encoder.layer.1.attention.self.rotary",))
    with pytest.raises(WeightsError, match="rotary"):
        BertCore.from_pretrained(saved)
    with pytest.raises(WeightsError, match="rotary"):
        BertCore.from_pretrained(saved, random_init=True)
    with pytest.warns(UserWarning, match="attention.self.rotary are not the model's and passed over, strict=False"):
        BertCore.from_pretrained(saved, strict=False)


def test_a_checkpoint_without_a_pooler(tmp_path: Path) -> None:
    model = torch_model("bert").float()
    task = transformers.BertForTokenClassification(model.config)
    task.bert.load_state_dict({name: value for name, value in model.state_dict().items() if "pooler" not in name})
    task.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"lacks pooler\.dense.*add_pooling_layer=False loads the rest"):
        BertCore.from_pretrained(tmp_path)
    core = BertCore.from_pretrained(tmp_path, add_pooling_layer=False)
    output = core(to_mlx(IDS))
    assert output.pooler_output is None
    assert relative(output.last_hidden_state, model.double()(IDS).last_hidden_state.detach()) <= 2e-6
    core.save_pretrained(tmp_path / "again")
    assert "pooler" not in BertCore.from_pretrained(tmp_path / "again", add_pooling_layer=False)


def test_a_directory_without_weights_is_random_only_by_name(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(WeightsError):
        BertCore.from_pretrained(saved)
    with pytest.warns(UserWarning, match="no weights; all are random, as random_init=True asks for"):
        core = BertCore.from_pretrained(saved, random_init=True)
    assert core.config.vocab_size == 64 and not core.training


def test_damaged_weights_are_never_random(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\1" * 100)
    with pytest.raises(WeightsError):
        BertCore.from_pretrained(saved, random_init=True, strict=False)


def test_a_default_configuration_only_by_name(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        BertCore.from_pretrained(saved)
    with (
        pytest.warns(UserWarning, match="the default configuration is used, as default_config=True asks for"),
        pytest.raises(WeightsError, match="shape"),
    ):
        BertCore.from_pretrained(saved, default_config=True)


def test_a_good_directory_warns_of_nothing(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertCore.from_pretrained(saved, random_init=True, default_config=True, strict=False)


def test_a_quantised_model_comes_back(saved: Path, tmp_path: Path) -> None:
    core = quantize(BertCore.from_pretrained(saved), bits=8, group_size=32)
    core.save_pretrained(tmp_path / "again")
    again = BertCore.from_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization"]["bits"] == 8
    first, second = core(to_mlx(IDS)).last_hidden_state, again(to_mlx(IDS)).last_hidden_state
    assert (first == second).all()
    whole = core_of(torch_model("bert"))(to_mlx(IDS)).last_hidden_state
    assert 0 < mx.abs(first - whole).max() < 0.1


def test_the_rule_of_hub_ids_can_be_had_from_here() -> None:
    assert _is_hub_model_id("mlx-community/bert-base-uncased") and not _is_hub_model_id("./local_model")


@pytest.mark.parametrize("cls", [BertCore, BertWithHead])
def test_a_path_is_never_taken_for_a_hub_id(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_downloaded", lambda *_: pytest.fail("the Hub was asked for a path"))
    with pytest.raises(NotFoundError, match="'org/name' is no path that is there"):
        cls.from_pretrained(Path("org/name"))
