# SPDX-License-Identifier: Apache-2.0
"""Who gets which token and what the auxiliary losses are, written as formulas: a witness beside original and port.

Symbols: N tokens, E experts, k choices a token. Formulas are those of wolfecameron/nanoMoE at commit 661fbcf and
askerlee/nanoMoE at commit 84a1de8, which are the Switch Transformer's (arXiv 2101.03961) for the balance of load and
ST-MoE's (arXiv 2202.08906) for the router z-loss. Slow on purpose: one token after the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.families import Decision, Fields, Observed

if TYPE_CHECKING:
    import torch

SCALED_GRADIENT = 0.1


def capacity(fields: Fields, tokens: int, training: bool) -> int:
    """How many tokens an expert takes: the even number at or above k factor N / E, rounded down first, or the least."""
    factor = fields["train_capacity" if training else "eval_capacity"]
    share = math.floor(fields["top_k"] * factor * tokens / fields["n_exp"])
    return max(int(fields["min_capacity"]), share + share % 2)


def decide(logits: torch.Tensor, fields: Fields, training: bool) -> Decision:
    """Where tokens go. logits: (N, E). All first choices queue before all second ones, each in the order of tokens."""
    import torch

    k, room = fields["top_k"], capacity(fields, len(logits), training)
    values, indices = logits.topk(k, dim=-1)
    queues: Counter[int] = Counter()
    ranks = torch.zeros_like(indices)
    for choice in range(k):
        for token, expert in enumerate(indices[:, choice].tolist()):
            ranks[token, choice] = queues[expert]
            queues[expert] += 1
    keep = ranks < room
    return Decision(indices=indices, ranks=ranks, keep=keep, weights=values.softmax(dim=-1) * keep)


def expert_outputs(module: Any, inputs: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Every expert's output for every token: (N, E, width) from inputs (N, width). activation: of plain experts."""
    import torch

    experts = module.experts
    hidden = torch.einsum("nd,edf->nef", inputs, experts.c_fc)
    gate = getattr(experts, "gate_proj", None)
    if gate is not None:
        hidden = torch.nn.functional.silu(torch.einsum("nd,edf->nef", inputs, gate)) * hidden
        return torch.einsum("nef,efd->ned", hidden, experts.c_proj)
    if getattr(experts, "fc_bias", None) is not None:
        hidden = hidden + experts.fc_bias[:, 0]
    outputs = torch.einsum("nef,efd->ned", activation(hidden), experts.c_proj)
    return outputs if getattr(experts, "proj_bias", None) is None else outputs + experts.proj_bias[:, 0]


def load_balance(fields: Fields, layers: Sequence[Observed]) -> Any:
    """E sum_e P_e f_e: the mean weight of an expert times the mean number of choices of it, before any drop."""
    import torch

    total: Any = 0.0
    for layer in layers:
        values, indices = layer.logits.topk(fields["top_k"], dim=-1)
        weights = torch.zeros_like(layer.logits).scatter(1, indices, values.softmax(dim=-1))
        chosen = torch.zeros_like(layer.logits).scatter(1, indices, 1.0)
        total = total + fields["n_exp"] * (weights.mean(dim=0) * chosen.mean(dim=0)).sum()
    return fields["aux_loss_weight"] * total


def router_z(fields: Fields, layers: Sequence[Observed]) -> Any:
    """The mean over tokens of the squared logarithm of the sum of all exponentials."""
    terms = [layer.logits.logsumexp(dim=-1).square().mean() for layer in layers]
    return fields["router_z_loss_weight"] * sum(terms)


def router_orthogonality(fields: Fields, layers: Sequence[Observed]) -> Any:
    """The sum over experts and gate columns of their squared product with the router's row; negative ones weighted."""
    import torch

    total: Any = 0.0
    for layer in layers:
        module: Any = layer.module
        if getattr(module.experts, "gate_proj", None) is None:
            continue
        products = torch.einsum("ed,edf->ef", module.router.w_g.weight, _damped(module.experts.gate_proj))
        weights = torch.where(products >= 0, 1.0, float(fields["router_ortho_neg_corr_weight"]))
        total = total + (weights * products.square()).sum()
    return fields["router_ortho_loss_weight"] * total


def experts_orthogonality(fields: Fields, layers: Sequence[Observed]) -> Any:
    """The squared cosines between all pairs of experts' first matrices, summed once, over E squared."""
    total: Any = 0.0
    for layer in layers:
        module: Any = layer.module
        if getattr(module.experts, "gate_proj", None) is None:
            continue
        rows = module.experts.c_fc.flatten(1)
        rows = rows / rows.norm(dim=1, keepdim=True)
        total = total + (rows @ rows.T).triu(1).square().sum() / len(rows) ** 2
    return fields["experts_ortho_loss_weight"] * total


def gate_output(fields: Fields, layers: Sequence[Observed]) -> Any:
    """The mean over kept slots of the mean square of the gate's product; its gradient reaches the inputs a tenth."""
    import torch

    total: Any = 0.0
    for layer in layers:
        module: Any = layer.module
        if getattr(module.experts, "gate_proj", None) is None:
            continue
        decision = decide(layer.logits.detach(), fields, True)
        token, choice = decision.keep.nonzero(as_tuple=True)
        gates = module.experts.gate_proj[decision.indices[token, choice]]
        squares = torch.einsum("sd,sdf->sf", _damped(layer.inputs)[token], gates).square().mean(dim=-1)
        total = total + squares[squares != 0].mean()
    return fields["gate_output_loss_weight"] * total


def _damped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, through which only a tenth of the gradient passes: float32's tenth."""
    import torch

    share = float(torch.tensor(SCALED_GRADIENT, dtype=torch.float32))
    return share * tensor + (1 - share) * tensor.detach()
