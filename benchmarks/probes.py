"""Three prices of a linear's error, in nats of divergence per unit of ||(Q(W) - W) X^T||^2 per token.

``kl`` is what `ptq fit` uses: one linear rounded alone, divergence measured, over its error. ``second-order`` takes
half of the mean squared gradient of the loss at the linear's output, with labels drawn from the model (the diagonal of
the Fisher matrix, as one number per linear): one backward pass through the whole model instead of one forward pass per
linear. ``none`` is one price for all linears.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from calibration.text.crops import TokenBatches
from ptq.fitting.sensitivity import Sensitivities

WINDOWS = 4


def second_order(model: Path, linears: list[str], tokens: TokenBatches) -> dict[str, float]:
    """By full name. The loss is summed over positions: later losses are independent draws, so squares add up."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            outputs[name] = output.requires_grad_()
            output.retain_grad()
            return output

        return hook

    for name in linears:
        network.get_submodule(name).register_forward_hook(keep(name))
    generator = torch.Generator().manual_seed(0)
    found = dict.fromkeys(linears, 0.0)
    for ids in tokens.input_ids[:WINDOWS].split(1):
        log_p = network(ids, use_cache=False).logits[0].log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, labels).sum().backward()
        for name, output in outputs.items():
            assert output.grad is not None
            found[name] += 0.5 * float(output.grad.square().mean()) / WINDOWS
    return found


def reweighted(measured: Sensitivities, prices: dict[str, float]) -> Sensitivities:
    """The same errors at other prices, scaled to give the divergence of the probe with everything rounded."""
    parts = sum(measured.weights[n] * error for n, error in measured.probed.items())
    expected = sum(prices[n] * error for n, error in measured.probed.items())
    return dataclasses.replace(measured, weights=prices, additivity=measured.additivity * parts / expected)
