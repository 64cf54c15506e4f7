# SPDX-License-Identifier: Apache-2.0
"""The losses of the Hugging Face nanoMoE: conventions, auxiliary terms, their manager, training."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
from reference_models.nanomoe.manager import AUXILIARY_LOSSES, MANAGER, MOEManager, manager_of_this_call
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT, TRANSFORMERS_5

Make = Callable[..., Any]

IDX = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(1))
NEXT = torch.cat((IDX[:, 1:], torch.full((2, 1), -1)), dim=1)
SWIGLU: dict[str, Any] = {
    "n_exp": 3,
    "use_qwen3_moe_mlp": True,
    "train_capacity": 0.7,
    "min_capacity": 1,
    "use_aux_loss": True,
    "use_router_z_loss": True,
    "use_router_ortho_loss": True,
}
OF_THE_ANCESTOR: dict[str, Any] = {
    name: value for name, value in SWIGLU.items() if name not in ("use_qwen3_moe_mlp", "use_router_ortho_loss")
}

both = pytest.mark.parametrize(
    ("architecture", "fields"), [("nanomoe", SWIGLU), ("ancestor", OF_THE_ANCESTOR)], ids=["nanomoe", "ancestor"]
)


def assert_close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() < bound


# What the labels mean


def test_conventions_of_labels(make_original_model: Make, make_port_model: Make) -> None:
    source, model = make_original_model(), make_port_model()
    upstream = make_port_model(label_convention="preshifted")
    expected = source(IDX, NEXT)[1]
    for loss in (
        model(IDX, labels=IDX).loss,
        model(IDX, targets=NEXT).loss,
        model(IDX, shift_labels=NEXT).loss,
        upstream(IDX, labels=NEXT).loss,
        upstream(IDX, targets=NEXT).loss,
    ):
        assert loss.dtype == torch.float64
        assert_close(loss, expected)
    expected = source(IDX, NEXT.clone().index_fill_(1, torch.tensor([2]), -1))[1]
    for ignored in (-1, -100):
        labels, targets = IDX.clone(), NEXT.clone()
        labels[:, 3] = targets[:, 2] = ignored
        assert_close(model(IDX, labels=labels).loss, expected)
        assert_close(model(IDX, targets=targets).loss, expected)
        assert_close(upstream(IDX, labels=targets).loss, expected)


@both
def test_micro_batches_add_up(make_port_model: Make, architecture: str, fields: dict[str, Any]) -> None:
    """Each row alone gives its own auxiliary losses, which count by the row's share of the labels."""
    model = make_port_model(architecture, **fields).train()
    rows = [model(row[None], labels=row[None]) for row in IDX]
    whole = torch.stack([outputs.loss for outputs in rows]).mean()
    for count in (12, torch.tensor(12)):
        parts = [model(row[None], labels=row[None], num_items_in_batch=count).loss for row in IDX]
        assert_close(torch.stack(parts).sum(), whole)


# Auxiliary losses


@both
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_total_is_the_sum_of_its_parts(
    make_port_model: Make, architecture: str, fields: dict[str, Any], training: bool
) -> None:
    model = make_port_model(architecture, **fields).train(training)
    outputs = model(IDX, targets=NEXT)
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), IDX[:, 1:].flatten())
    assert_close(outputs.losses["ntp_loss"], cross_entropy)
    total = cross_entropy + sum(getattr(model.config, f"{n}_weight") * outputs.losses[n] for n in AUXILIARY_LOSSES)
    assert_close(outputs.loss, total)
    expected = set(AUXILIARY_LOSSES) if architecture == "nanomoe" else {"aux_loss", "router_z_loss"}
    if not training and architecture == "nanomoe":
        expected = set()  # pure cross-entropy in evaluation
    assert {name for name in AUXILIARY_LOSSES if outputs.losses[name] != 0} == expected


def test_closed_forms(make_port_model: Make) -> None:
    model = make_port_model(**(SWIGLU | {"n_layer": 1, "router_ortho_neg_corr_weight": 0.25})).train()
    layer = model.transformer.h[0].mlp
    seen: list[Any] = []
    inputs: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    layer.router.register_forward_hook(lambda module, given, output: seen.append(output))
    losses = model(IDX, targets=NEXT).losses
    (routing,), (tokens,) = seen, inputs
    balance = sum(
        torch.where(routing.indices == expert, routing.weights, 0).sum() / 14 * (routing.indices == expert).sum() / 14
        for expert in range(3)
    )
    assert_close(losses["aux_loss"], 3 * balance)
    assert_close(losses["router_z_loss"], routing.logits.exp().sum(-1).log().square().mean())
    products = torch.stack([layer.experts.gate_proj[e].T @ layer.router.w_g.weight[e] for e in range(3)])
    assert_close(
        losses["router_ortho_loss"], (products.clamp(min=0) ** 2).sum() + 0.25 * (products.clamp(max=0) ** 2).sum()
    )
    flat = layer.experts.c_fc.flatten(1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = torch.stack([torch.cosine_similarity(flat[a], flat[b], dim=0) for a, b in pairs])
    assert_close(losses["experts_ortho_loss"], (cosines**2).sum() / 9)
    slots = [(t, e) for t, row in enumerate(routing.indices.tolist()) for j, e in enumerate(row) if routing.keep[t, j]]
    assert 0 < len(slots) < 28
    gates = torch.stack([(tokens[t] @ layer.experts.gate_proj[e]).square().mean() for t, e in slots])
    assert_close(losses["gate_output_loss"], gates.mean())


@pytest.mark.parametrize("qwen", [False, True])
@pytest.mark.parametrize("ortho", [False, True])
def test_a_step_with_default_flags(make_port_model: Make, qwen: bool, ortho: bool) -> None:
    model = make_port_model(n_exp=4, use_qwen3_moe_mlp=qwen, use_router_ortho_loss=ortho).train()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    before = model(IDX, targets=NEXT).loss
    before.backward()
    optimizer.step()
    assert model(IDX, targets=NEXT).loss < before


def test_losses_do_not_leak_between_threads(make_port_model: Make) -> None:
    model = make_port_model(**SWIGLU).train()
    expected = model(IDX, targets=NEXT).loss
    losses: list[Tensor] = []

    def run() -> None:
        losses.extend(model(IDX, targets=NEXT).loss.detach() for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 15
    assert all(torch.equal(loss, expected) for loss in losses)


# The manager


def test_manager_by_name_and_by_upstreams_methods() -> None:
    manager = MOEManager()
    manager.add("aux_loss", torch.tensor(1.0))
    manager.add_aux_loss(torch.tensor(2.0))
    manager.add_router_z_loss(4)
    assert manager.aggregate("aux_loss") == manager.aggregate_aux_loss() == 3
    assert manager.aggregate_router_z_loss() == 4
    manager.reset_aux_loss()
    assert manager.aggregate("aux_loss") == 0
    assert manager.aggregate("router_z_loss") == 4
    manager.reset()
    assert [manager.aggregate(name) for name in AUXILIARY_LOSSES] == [0] * 5
    for attribute in ("add_loss", "aux_loss", "remove_aux_loss"):
        with pytest.raises(AttributeError, match="aux_loss"):
            getattr(manager, attribute)


def test_global_manager_is_that_of_the_call(make_port_model: Make) -> None:
    MANAGER.add_aux_loss(torch.tensor(100.0))
    assert MANAGER.aggregate_aux_loss() == 0
    MANAGER.reset_aux_loss()
    model = make_port_model(**SWIGLU).train()
    expected = model(IDX, targets=NEXT)
    layer = model.transformer.h[1].mlp
    seen: list[Any] = []

    def add_one(module: Any, inputs: Any, output: Any) -> None:
        # As the layer of a script does that imports MANAGER: what it adds is in this call's sum, and in no other's.
        seen.append(MANAGER.aggregate("aux_loss"))
        MANAGER.add_aux_loss(torch.tensor(1.0))

    handle = layer.register_forward_hook(add_one)
    losses = model(IDX, targets=NEXT).losses
    assert losses["aux_loss"] == expected.losses["aux_loss"] + 1
    assert 0 < seen[0] < losses["aux_loss"]
    handle.remove()
    assert model(IDX, targets=NEXT).losses == expected.losses
    assert MANAGER.aggregate_aux_loss() == 0
    with manager_of_this_call() as outer:
        MANAGER.add("aux_loss", 1)
        with manager_of_this_call():
            assert MANAGER.aggregate("aux_loss") == 0
        assert outer.aggregate("aux_loss") == MANAGER.aggregate("aux_loss") == 1
        with pytest.raises(ZeroDivisionError), manager_of_this_call():
            _ = 1 / 0
        assert MANAGER.aggregate("aux_loss") == 1


# Training


@both
def test_training_follows_the_original(
    make_original_model: Make, make_port_model: Make, architecture: str, fields: dict[str, Any]
) -> None:
    source = make_original_model(architecture, use_noisy_top_k=True, **fields).train()
    model = make_port_model(architecture, source=source).train()
    theirs = source.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ours = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    assert [[p.shape for p in group["params"]] for group in ours.param_groups] == [
        [p.shape for p in group["params"]] for group in theirs.param_groups
    ]
    for step in range(3):
        losses = []
        for optimizer, run in ((theirs, source), (ours, model)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            losses.append(run(IDX, NEXT)[1])
            losses[-1].backward()
            optimizer.step()
        assert_close(losses[1], losses[0])
    named = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        assert (named[name] - parameter).abs().max() < 1e-9, name


def test_offsets_do_not_decay() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=1, n_embd=8, n_exp=2, stride=2))
    decayed, kept = model.configure_optimizers(0.5, 1e-3, (0.9, 0.95), "cpu").param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    assert {names[parameter].rpartition(".")[2] for parameter in decayed["params"]} == {"weight", "c_fc", "c_proj"}
    assert "transformer.h.1.mlp.experts.fc_bias" in {names[parameter] for parameter in kept["params"]}
    assert len(names) == len(decayed["params"]) + len(kept["params"])


@both
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(
    make_port_model: Make, architecture: str, fields: dict[str, Any], use_reentrant: bool
) -> None:
    model = make_port_model(architecture, use_noisy_top_k=True, **fields).train()
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        outputs = model(IDX, labels=IDX)
        outputs.loss.backward()
        results.append((outputs.losses, [parameter.grad for parameter in model.parameters()]))
    assert outputs.past_key_values is None
    assert results[0][0] == results[1][0]
    for plain, checkpointed in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(plain, checkpointed)


@both
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(architecture: str, fields: dict[str, Any], accumulation: int, tmp_path: Path) -> None:
    """The library's Trainer takes the steps of a loop written by hand."""
    config = GPTConfig(
        **fields, block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=16, architecture=architecture
    )
    rows = torch.randint(37, (8, 10), generator=torch.Generator().manual_seed(3))
    set_seed(0)
    by_hand, by_trainer = GPT(config), GPT(config)
    by_trainer.load_state_dict(by_hand.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        optim="adamw_torch",
        seed=0,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    trainer = InOrder(model=by_trainer, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    # 4.57 divides by the number of all labels, 5.x by the number of those that are predicted, as the model does.
    first_counted = 1 if TRANSFORMERS_5 else 0
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0, eps=arguments.adam_epsilon)
    by_hand.train()
    losses = []
    for step in range(8):
        batches = [rows[:4], rows[4:]] if accumulation == 2 else [rows[4 * (step % 2) :][:4]]
        count = sum(batch[:, first_counted:].numel() for batch in batches)
        optimizer.zero_grad()
        parts = [by_hand(input_ids=batch, labels=batch, num_items_in_batch=count).loss for batch in batches]
        torch.stack(parts).sum().backward()
        optimizer.step()
        losses.append(float(torch.stack(parts).sum().detach()))
    assert logged == pytest.approx(losses, abs=2e-4)
    assert logged[-1] < logged[0]
    for ours, theirs in zip(by_hand.parameters(), by_trainer.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    by_hand.eval()
    count = rows[:, first_counted:].numel()
    expected = float(by_hand(input_ids=rows, labels=rows, num_items_in_batch=count).loss.detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    if TRANSFORMERS_5:
        assert expected == pytest.approx(float(by_hand(input_ids=rows, labels=rows).loss.detach()), rel=1e-6)
    assert trainer.predict(data).predictions.shape == (8, 10, 37)
