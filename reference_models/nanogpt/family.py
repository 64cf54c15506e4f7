# SPDX-License-Identifier: Apache-2.0
"""What the harness needs to know about nanoGPT: its configurations, its original's conventions, names and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from harness.errors import DescriptionError
from harness.families import Family, Fields, LossConvention, Tap

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

    from harness.golden import Golden


TRAINING_STATE: Mapping[str, Any] = {
    "iter_num": 7,
    "best_val_loss": 1.5,
    "config": {"dataset": "none", "batch_size": 12},
    "train_config": {"dataset": "none", "batch_size": 12},
}


def configurations() -> SearchStrategy[dict[str, Any]]:
    """nanoGPT configurations of at most three layers and sixteen channels or so; the plainest has one of everything.

    Corners: one head, head size 1 and odd sizes, any vocabulary, no bias.
    """
    from hypothesis import strategies as st

    @st.composite
    def draw_fields(draw: st.DrawFn) -> dict[str, Any]:
        n_head = draw(st.integers(1, 4))
        # A layer norm over fewer than four channels leaves hardly anything to compare.
        head_size = draw(st.integers(-(-4 // n_head), 6))
        return {
            "block_size": draw(st.integers(4, 20)),
            "vocab_size": draw(st.integers(11, 61)),
            "n_layer": draw(st.integers(1, 3)),
            "n_head": n_head,
            "n_embd": n_head * head_size,
            "dropout": 0.0,
            "bias": draw(st.booleans()),
        }

    return draw_fields()


def build_original(cls: type, fields: Fields) -> torch.nn.Module:
    """`cls(config)`, the config being the `GPTConfig` that stands beside the class, as in nanoGPT's model.py."""
    import sys

    beside = sys.modules[cls.__module__]
    if not hasattr(beside, "GPTConfig"):
        raise DescriptionError(f"there is no GPTConfig beside {cls.__name__}, as in nanoGPT's model.py; add one")
    config = beside.GPTConfig(**fields)
    module: torch.nn.Module = cls(config)
    return module.eval()


def run_original(
    module: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Logits at all positions (nanoGPT gives them only when it has targets) and the loss when targets are given."""
    import torch

    logits, loss = module(tokens, tokens if targets is None else targets)
    return {"logits": logits} if targets is None else {"logits": logits, "loss": torch.as_tensor(loss)}


def generate_original(
    module: torch.nn.Module,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """nanoGPT's own loop: prompt and new tokens (rows, tokens)."""
    tokens: torch.Tensor = module.generate(prompt, max_new_tokens, temperature=temperature, top_k=top_k)  # type: ignore[operator]
    return tokens


def taps(fields: Fields) -> Sequence[Tap]:
    """Where both models can be compared, in the order data passes."""
    places = [Tap(name="embedding", original="transformer.drop", port="transformer.drop")]
    for layer in range(fields["n_layer"]):
        for name in ("ln_1", "attn", "ln_2", "mlp"):
            path = f"transformer.h.{layer}.{name}"
            places.append(Tap(name=f"block.{layer}.{name}", original=path, port=path))
        path = f"transformer.h.{layer}"
        places.append(Tap(name=f"block.{layer}", original=path, port=path))
    places.append(Tap(name="final_norm", original="transformer.ln_f", port="transformer.ln_f"))
    return [*places, Tap(name="head", original="lm_head", port="lm_head")]


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of nanoGPT's `configure_optimizers`: tensors with two axes or more decay."""
    optimizer = module.configure_optimizers(weight_decay, 1e-3, (0.9, 0.95), "cpu")  # type: ignore[operator]
    return [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]


def write_checkpoint(module: torch.nn.Module, fields: Fields, path: Path) -> None:
    """A `ckpt.pt` with the entries that train.py saves, without optimiser state."""
    import torch

    checkpoint = {
        "model": module.state_dict(),
        "model_args": dict(fields),
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "none", "dropout": fields["dropout"]},
    }
    torch.save(checkpoint, path)


def read_checkpoint(path: str) -> tuple[Fields, dict[str, torch.Tensor]]:
    """Fields and state dict of a `ckpt.pt` as train.py resumes it: the prefix of a compiled model taken off."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state: Mapping[str, torch.Tensor] = checkpoint["model"]
    return checkpoint["model_args"], {key.removeprefix("_orig_mod."): tensor for key, tensor in state.items()}


def resume(module: torch.nn.Module, path: str) -> None:
    """What train.py does with the rest of a file: the state of its AdamW, its step, its best loss."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    optimizer = module.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")  # type: ignore[operator]
    optimizer.load_state_dict(checkpoint["optimizer"])
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    if decays != [0.1, 0.0]:
        raise ValueError(
            f"the weight decay would be {decays[0]} of matrices and {decays[1]} of gains and offsets, not 0.1 and 0"
        )
    for group in optimizer.param_groups:
        if tuple(group["betas"]) != (0.9, 0.95) or group["lr"] != 6e-4:
            found = f"{tuple(group['betas'])} and lr={group['lr']}"
            raise ValueError(f"AdamW would go on with betas={found}, not train.py's (0.9, 0.95) and 0.0006")
    int(checkpoint["iter_num"]), float(checkpoint["best_val_loss"])


def read_training_state(path: str) -> dict[str, Any]:
    """What train.py and sample.py read of a file beside the model, by the words that a way back may have for it."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    names = {"train_config": "config", **{name: name for name in TRAINING_STATE if name != "train_config"}}
    return {name: checkpoint[entry] for name, entry in names.items() if entry in checkpoint}


def checkpoint_dialects(module: torch.nn.Module, fields: Fields, directory: Path) -> Mapping[str, Path]:
    """The same model as revisions of train.py from the first to today's write it, by what is different in the file."""
    import torch

    optimizer = module.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")  # type: ignore[operator]
    plain = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": dict(fields),
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "none"},
    }
    return write_dialects(plain, directory)


def write_dialects(plain: dict[str, Any], directory: Path) -> dict[str, Path]:
    """What a train.py that descends from nanoGPT's saves, `plain`, in files that each differ from it in one way."""
    import torch

    tensors, fields = plain["model"], plain["model_args"]
    causal = torch.ones(fields["block_size"], fields["block_size"]).tril()[None, None]
    masks = {f"transformer.h.{layer}.attn.bias": causal for layer in range(fields["n_layer"])}

    def without(contents: Mapping[str, Any], *names: str) -> dict[str, Any]:
        return {name: value for name, value in contents.items() if name not in names}

    files = {
        # torch.compile, which train.py does by default.
        "names with the prefix _orig_mod.": plain
        | {"model": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}},
        "no iter_num, best_val_loss and config": without(plain, "iter_num", "best_val_loss", "config"),
        # Attention without torch 2; a constant, and no parameter in spite of its name.
        "causal masks among the weights": plain | {"model": tensors | masks},
        "its tensors in another order": plain | {"model": dict(reversed(tensors.items()))},
        # The vocabulary is what the embedding has rows for.
        "no vocab_size in model_args": plain | {"model_args": without(fields, "vocab_size")},
    }
    if fields["bias"]:  # before there was a choice every model had biases
        files["no bias in model_args"] = plain | {"model_args": without(fields, "bias")}
    paths = {name: directory / f"{number}.pt" for number, name in enumerate(files)}
    for name, path in paths.items():
        torch.save(files[name], path)
    # What a GPU writes names it as the place to load to.
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        paths["tensors of a GPU"] = directory / "gpu.pt"
        torch.save(plain, paths["tensors of a GPU"])
    return paths


def golden(golden: Golden) -> Mapping[str, torch.Tensor]:
    """Everything a golden file of nanoGPT stores."""
    from harness.golden import reproduce

    blocks = {f"block.{layer}": f"transformer.h.{layer}" for layer in range(golden.fields["n_layer"])}
    return reproduce(golden, places={"embedding": "transformer.drop", **blocks, "final_norm": "transformer.ln_f"})


FAMILY = Family(
    name="nanogpt",
    features=frozenset(
        {
            "attentions",
            "causal",
            "checkpoint",
            "dropout",
            "generation",
            "initialisation",
            "learned_positions",
            "logits",
            "loss",
            "masks",
            "parameter_groups",
            "taps",
            "tied_embeddings",
        }
    ),
    configurations=configurations,
    original="reference_models.nanogpt.original:GPT",
    build_original=build_original,
    run_original=run_original,
    fields={
        "block_size": ("n_positions", "max_position_embeddings", "sequence_len", "n_ctx"),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
        "n_embd": ("hidden_size",),
        "dropout": ("resid_pdrop",),
    },
    defaults={
        "block_size": 1024,
        "vocab_size": 50304,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "dropout": 0.0,
        "bias": True,
    },
    refused=({"n_embd": 8, "n_head": 3}, {"n_embd": 10, "n_head": 4}, {"n_embd": 4, "n_head": 8}),
    large=(
        # Two digits in a layer's number, heads wider than 64, more than 256 positions and tokens.
        {"n_layer": 12, "n_head": 1, "n_embd": 72, "block_size": 300, "vocab_size": 300, "bias": False},
        # More positions than float16 has whole numbers in a row.
        {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 2100, "bias": True},
        # GPT-2's vocabulary, more heads than any drawn, and a short window to move.
        {"n_layer": 1, "n_head": 16, "n_embd": 16, "block_size": 16, "vocab_size": 50257, "bias": True},
    ),
    tied=(("transformer.wte.weight", "lm_head.weight"),),
    maximum_length="block_size",
    dropout="dropout",
    loss=LossConvention(labels="preshifted", ignore_index=-1),
    taps=taps,
    # Logits with standard deviation near 2, and attention with a peak (see the project's design, "Numbers").
    gains={r"(wte|wpe|lm_head)\.weight$": 2.0, r"c_attn\.weight$": 1.7},
    write_checkpoint=write_checkpoint,
    read_checkpoint=read_checkpoint,
    checkpoint_dialects=checkpoint_dialects,
    resume=resume,
    training_state=TRAINING_STATE,
    read_training_state=read_training_state,
    checkpoint_name="ckpt.pt",
    generate_original=generate_original,
    mutants="reference_models.nanogpt.mutants:MUTANTS",
    parameter_groups=parameter_groups,
    golden=golden,
)
