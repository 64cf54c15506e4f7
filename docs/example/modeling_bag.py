# SPDX-License-Identifier: Apache-2.0
"""The port of the worked example: the model of `bag_family.py` as a Hugging Face class."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BagConfig(PretrainedConfig):
    """Sizes, under the names that transformers uses."""

    model_type = "bag"

    def __init__(self, vocab_size=40, hidden_size=12, num_hidden_layers=2, max_position_embeddings=16, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**({"tie_word_embeddings": False} | kwargs))


class BagForCausalLM(PreTrainedModel):
    """Predicts a token from the mean of the embeddings so far."""

    config_class = BagConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_hidden_layers))
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config.vocab_size, width), "layers": layers})
        self.lm_head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)

    def get_input_embeddings(self):
        return self.model["embed_tokens"]

    def set_input_embeddings(self, value):
        self.model["embed_tokens"] = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, return_dict=None, num_items_in_batch=None):
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        x = x.cumsum(1) / counts[:, None]
        for layer in self.model["layers"]:
            x = x + torch.tanh(layer(x))
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            targets = labels[:, 1:]
            total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
            loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


BagConfig.register_for_auto_class()
BagForCausalLM.register_for_auto_class("AutoModelForCausalLM")
