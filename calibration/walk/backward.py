"""Gradients through a whole model with one block in memory: blocks in reverse, each run again from its kept inputs.

The loss is the negative log-likelihood of labels drawn from the model's own predictions, summed over positions.
Products of its gradients are, in expectation, the Fisher matrix: the second derivative of the Kullback-Leibler
divergence from the model as it is (Martens 2020, arXiv 1412.1193, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from calibration.model.skeleton import Skeleton
from calibration.walk.capture import Watcher, watch_gradients
from calibration.walk.head import LogProbabilities, pieces
from calibration.walk.lanes import merge
from calibration.walk.products import no_products, plus
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates


class WeightGradients:
    """Second moments of the gradient of one linear's weight ``[out, in]``, D = sum over the tokens of a window of
    g_t x_t^T.

    Attributes:
        columns: sum over windows of D^T D, ``[in, in]``; float32, float64 where the model runs in it.
        rows: sum over windows of the squared rows of D, ``[out]``.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        self.columns = no_products(in_features, device)
        self.rows = torch.zeros(out_features, dtype=torch.float32, device=device)

    def update(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Fold in a window: ``x [tokens, in]`` and the gradient at the output ``[tokens, out]``."""
        d = gradient.T @ x if x.dtype == torch.float64 else gradient.float().T @ x.float()
        self.columns = plus(self.columns, d.T @ d)
        self.rows = self.rows + d.square().sum(dim=1)


@merge.register
def _(total: WeightGradients, other: WeightGradients) -> None:
    total.columns = plus(total.columns, other.columns)
    total.rows = total.rows + other.rows


def head_gradient(
    skeleton: Skeleton,
    log_probabilities: LogProbabilities,
    ids: torch.Tensor,
    states: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """The gradient of the loss at the hidden states behind the last block, ``[1, L, hidden]``.

    Args:
        ids: ``[1, L]``; the last position predicts nothing that is in the window, and has no loss.
        states: ``[1, L, hidden]``.
        generator: of the CPU; one label is drawn for every position.
    """
    gradient = torch.zeros_like(states)
    for piece in pieces(skeleton, ids.shape[1]):
        part = states[:, piece].detach().requires_grad_()
        with torch.enable_grad():
            log_p = log_probabilities(ids[:, piece], part)
            labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            (gradient[:, piece],) = torch.autograd.grad(-log_p.gather(1, labels).sum(), part)
    return gradient


def block_backward(
    segment: Segment,
    states: HiddenStates,
    gradients: list[torch.Tensor],
    windows: Iterable[int],
    watchers: Mapping[str, Watcher],
    advance: Callable[[], None],
) -> None:
    """Carry gradients from behind a block to in front of it, window by window.

    Args:
        states: that enter the block, one window to a batch.
        gradients: by window, ``[1, L, hidden]``; replaced in place.
        windows: which of them, by their place among the states.
        watchers: block-relative name of a linear -> what looks at it.
    """
    rename = segment.architecture.module_name
    with watch_gradients(segment.module, {rename(name): w for name, w in watchers.items()}):
        for window in windows:
            entering = states.batches[window].requires_grad_()
            with torch.enable_grad():
                output = states.output(segment.module, segment.index, window)
            (gradients[window],) = torch.autograd.grad(output, entering, gradients[window])
            states.batches[window] = entering.detach()
            advance()
