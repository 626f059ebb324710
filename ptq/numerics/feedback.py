"""What a rounding error costs under GPTQ's error feedback, in closed form: no column loop."""

from __future__ import annotations

import torch

from ptq.numerics.gptq import column_order, inverse_factor


def column_costs(gram: torch.Tensor, loss: torch.Tensor | None = None, damping: float = 0.01) -> torch.Tensor:
    """What a squared rounding error made in each column costs, ``[in]``, after the columns that follow (by activation
    order) have taken over what they can.

    Frantar et al. 2022, arXiv 2210.17323: the column loop ends with Q - W = -e U, where e_j = (w_j - q_j) / U_jj is the
    error made in column j and U the factor of `inverse_factor`. Errors of different columns are uncorrelated, so that
    (Q - W) M (Q - W)^T is expected to be the sum of e_j^2 (U M U^T)_jj; for M = H, the Gram matrix, that is the
    published loss, the sum of e_j^2. The squared rounding error of a column hardly depends on what earlier columns
    added to it, so that of rounding to nearest stands for it.

    Args:
        gram: ``[in, in]`` float32, which the loop works with; columns without inputs cost nothing.
        loss: M ``[in, in]``; None: the Gram matrix.
    """
    dead = gram.diagonal() == 0
    h = gram.clone()
    h.diagonal()[dead] = 1
    order = column_order(h.diagonal(), "activation", 1)
    u, _ = inverse_factor(h[order][:, order], damping)
    ordered = u.diagonal().square().reciprocal()
    if loss is not None:
        ordered = ordered * ((u @ loss[order][:, order]) * u).sum(dim=1)
    costs = torch.empty_like(gram.diagonal())
    costs[order] = ordered
    return costs.masked_fill_(dead, 0)


def feedback_errors(w: torch.Tensor, rounded: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """The expected (Q - W) M (Q - W)^T of GPTQ by row, ``[out]``, from W ``[out, in]`` rounded to nearest."""
    return (rounded - w).square_() @ costs
