# SPDX-License-Identifier: Apache-2.0
"""transformers' own model tests on nanoGPT's port; test_planted_bugs.py runs a copy beside the library's tests.

Everything here helps those tests: what they ask of a model that is part of the library is supplied.
"""

from __future__ import annotations

import unittest
from typing import TYPE_CHECKING, Any

import tests.test_modeling_common as common
from tests.generation.test_utils import GenerationTesterMixin
from transformers import set_seed
from transformers.models.auto import modeling_auto

from reference_models.nanogpt.configuration_nanogpt import NanoGPTConfig
from reference_models.nanogpt.modeling_nanogpt import NanoGPTLMHeadModel, NanoGPTModel

if TYPE_CHECKING:
    import torch

try:
    from tests.test_training_mixin import TrainingTesterMixin
except ImportError:  # transformers 4.57 has none.

    class TrainingTesterMixin:
        pass


ROWS, TOKENS = 13, 7

# By these tables the tests know which models have a loss.
modeling_auto.MODEL_MAPPING_NAMES[NanoGPTConfig.model_type] = NanoGPTModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NanoGPTConfig.model_type] = NanoGPTLMHeadModel.__name__
# It writes fields of other models into the configuration, which the port refuses when it is loaded.
common.set_config_for_less_flaky_test = lambda config: None


class Tester:
    """A tiny model and its inputs, in the sizes of the library's own testers."""

    batch_size, seq_length, is_training = ROWS, TOKENS, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    base_model_class, causal_lm_class = NanoGPTModel, NanoGPTLMHeadModel

    def get_config(self) -> NanoGPTConfig:
        return NanoGPTConfig(
            block_size=128,
            vocab_size=99,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_embd=self.hidden_size,
            dropout=0.1,
            pad_token_id=98,
            bos_token_id=97,
            eos_token_id=97,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[NanoGPTConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        return config, {
            "input_ids": common.ids_tensor([ROWS, TOKENS], config.vocab_size),
            "attention_mask": common.random_attention_mask([ROWS, TOKENS]),
        }


class TestPort(common.ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """The two models of the port."""

    all_model_classes = (NanoGPTModel, NanoGPTLMHeadModel)
    test_headmasking = test_pruning = False  # Nor do models of the library have them that are new in 4.57.
    model_tester: Any = None

    def setUp(self) -> None:
        set_seed(0)
        common.global_rng.seed(0)
        self.model_tester = Tester()
