# SPDX-License-Identifier: Apache-2.0
"""Makes originals of both architectures with telling weights, and the port with the weights of one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from reference_models.nanomoe import ancestor, original
from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT, GPTModel

SIZES: dict[str, Any] = {"block_size": 16, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 16}
# What the port has and no original.
PORT_ONLY = ("label_convention", "pad_tokens_take_capacity", "use_cache")

Make = Callable[..., Any]


def make_original(architecture: str = "nanomoe", dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """Return an original in eval mode with weights that show every defect: peaked attention, biases, gains, routing."""
    module = ancestor if architecture == "ancestor" else original
    known = {field.name for field in dataclasses.fields(module.GPTConfig)}
    fields = {name: value for name, value in (SIZES | {"stride": 1} | fields).items() if name not in PORT_ONLY}
    assert set(fields) <= known, set(fields) - known
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.2))
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype).eval()


def make_port(
    architecture: str = "nanomoe",
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    source: Any = None,
    **fields: Any,
) -> GPT:
    """Return the port, in eval mode, with the weights of that original."""
    source = source or make_original(architecture, **fields)
    own = {name: value for name, value in fields.items() if name in PORT_ONLY}
    config = GPTConfig(**vars(source.config), **own, architecture=architecture)
    model = GPT._from_config(config, attn_implementation=attention)
    model.load_state_dict(source.state_dict(), strict=True)
    return model.to(dtype).eval()


@pytest.fixture
def make_original_model() -> Make:
    """Takes architecture, dtype and fields of the original's configuration."""
    return make_original


@pytest.fixture
def make_port_model() -> Make:
    """Takes the same, and the attention implementation, an original to copy and fields that only the port has."""
    return make_port


@pytest.fixture(autouse=True)
def own_registration(one_thread: None) -> None:
    """Other tests import copies of the port, which register themselves in its place."""
    AutoConfig.register(GPTConfig.model_type, GPTConfig, exist_ok=True)
    AutoModel.register(GPTConfig, GPTModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTConfig, GPT, exist_ok=True)
