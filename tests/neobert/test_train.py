# SPDX-License-Identifier: Apache-2.0
"""The training command: its loss falls, its run is the same every time, and wrong input costs one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference_models.neobert import train as training
from reference_models.neobert.checkpoint import layout, read_run, read_weight
from reference_models.neobert.train import IGNORED, SpecialIds, TrainingError, main, masked, train

SPECIAL = SpecialIds(pad=0, first=2, separator=3, mask=4, size=50)


def test_the_loss_falls_and_the_run_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "run"), "--steps", "20"]) == 0
    loss, place = capsys.readouterr().out.splitlines()
    before, after = float(loss.split()[1]), float(loss.split()[3])
    assert after < before - 0.5, loss
    assert place == str(tmp_path / "run" / "model_checkpoints" / "20")
    run = read_run(place)
    assert run.fields["tie_word_embeddings"] and run.settings["trainer"]["max_steps"] == 20
    assert sorted(path.name for path in run.tokenizer.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_same_seed_gives_the_same_weights_in_each_layout(tmp_path: Path) -> None:
    torch.manual_seed(5)
    first = train(tmp_path / "first", steps=3, seed=1)
    torch.manual_seed(6)
    second = train(tmp_path / "second", steps=3, seed=1, layout="model.safetensors")
    other = train(tmp_path / "other", steps=3, seed=2)
    assert (second.directory / "model.safetensors").is_file() and (first.directory / "state_dict.pt").is_file()
    assert (first.loss_before, first.loss_after) == (second.loss_before, second.loss_after)
    runs = [read_run(each.directory) for each in (first, second, other)]
    for name in layout(runs[0]):
        assert torch.equal(read_weight(runs[0], name), read_weight(runs[1], name)), name
    assert not torch.equal(*(read_weight(run, "model.encoder.weight") for run in runs[1:]))


def test_training_leaves_the_generator_and_the_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    train(tmp_path, steps=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_masking_asks_for_words_only_and_for_one_of_every_row() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (2000, 10), generator=generator)
    ids[:, 0], ids[:, -2], ids[:, -1] = 2, 3, 0
    inputs, labels = masked(ids, SPECIAL, generator=generator)
    asked = labels != IGNORED
    assert torch.equal(labels[asked], ids[asked]) and torch.equal(inputs[~asked], ids[~asked])
    assert asked.any(1).all() and not asked[:, [0, -2, -1]].any()
    assert (inputs[asked] == 4).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (inputs[asked] == ids[asked]).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert not torch.isin(inputs[asked], torch.tensor([0, 2, 3])).any()


def test_an_own_text_is_learned(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("we sing\n\n" * 4)
    trained = train(tmp_path / "run", text=text, steps=10, rows=4)
    assert trained.loss_after < trained.loss_before


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read (No such file or directory)"), (b"\xff", "it is not UTF-8"), (b" \n\n", "has no lines")],
)
def test_a_text_that_cannot_be_used_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert main([str(tmp_path / "run"), "--text", str(text)]) == 2
    line = capsys.readouterr().err
    assert said in line and str(text) in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_the_repository_a_text_has_to_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "DEFAULT_TEXT", tmp_path / "gone.txt")
    with pytest.raises(TrainingError, match="is in the repository only: give one with --text"):
        train(tmp_path / "run", text=training.DEFAULT_TEXT)


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_checkpoints" / "3").mkdir(parents=True)
    assert main([str(tmp_path), "--steps", "3"]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--steps", "0"])
    assert ended.value.code == 2


@pytest.mark.parametrize("options", [["--seed", "-1"], ["--seed", str(1 << 63)], ["--text", "a\0b"]])
def test_what_no_run_can_have_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "run"), "--steps", "1", *options])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interruption_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_run", interrupt)
    assert main([str(tmp_path / "run"), "--steps", "1"]) == 130
    assert capsys.readouterr().err == "train: interrupted; nothing was written\n"
    assert not (tmp_path / "run").exists()
