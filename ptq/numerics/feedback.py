"""What a rounding error costs under GPTQ's error feedback, in closed form: no column loop."""

from __future__ import annotations

import torch

from ptq.numerics.gptq import column_order, inverse_factor


def column_costs(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """1 / U_jj^2 for every column, ``[in]``: the change of the output per squared rounding error made there, after the
    columns that follow (by activation order) have taken over what they can.

    Frantar et al. 2022, arXiv 2210.17323: the loss of the column loop is the sum of (w_j - q_j)^2 / U_jj^2 with U the
    factor of `inverse_factor`. The squared rounding error of a column hardly depends on what earlier columns added
    to it, so that of rounding to nearest stands for it.

    Args:
        gram: ``[in, in]`` float32; columns without inputs cost nothing.
    """
    dead = gram.diagonal() == 0
    h = gram.clone()
    h.diagonal()[dead] = 1
    order = column_order(h.diagonal(), "activation", 1)
    u, _ = inverse_factor(h[order][:, order], damping)
    costs = torch.empty_like(gram.diagonal())
    costs[order] = u.diagonal().square().reciprocal()
    return costs.masked_fill_(dead, 0)


def feedback_error(w: torch.Tensor, rounded: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """The expected ||(Q(W) - W) X^T||^2 of GPTQ, a scalar, from W ``[out, in]`` rounded to nearest."""
    return (rounded - w).square_().sum(dim=0) @ costs
