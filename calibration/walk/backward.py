"""Gradients through a whole model with one block in memory: blocks in reverse, each run again from its kept inputs.

The loss is the negative log-likelihood of labels drawn from the model's own predictions, summed over positions.
Products of its gradients are, in expectation, the Fisher matrix: the second derivative of the Kullback-Leibler
divergence from the model as it is (Martens 2020, arXiv 1412.1193, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from calibration.model.skeleton import Skeleton
from calibration.walk.capture import Watcher, watch_gradients
from calibration.walk.head import LogProbabilities, pieces
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates


class WeightGradients:
    """Second moments of the gradient of one linear's weight, D = sum over the tokens of a window of g_t x_t^T.

    Attributes:
        columns: sum over windows of D^T D, ``[in, in]``; float32, float64 where the model runs in it.
        rows: sum over windows of the squared rows of D, ``[out]``.
    """

    def __init__(self) -> None:
        self.columns = torch.zeros(())
        self.rows = torch.zeros(())

    def update(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Fold in a window: ``x [tokens, in]`` and the gradient at the output ``[tokens, out]``."""
        d = gradient.T @ x if x.dtype == torch.float64 else gradient.float().T @ x.float()
        self.columns = self.columns + d.T @ d
        self.rows = self.rows + d.square().sum(dim=1)


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
    watchers: Mapping[str, Watcher],
    advance: Callable[[], None],
) -> None:
    """Carry gradients from behind a block to in front of it, window by window.

    Args:
        states: that enter the block, one window to a batch.
        gradients: by window, ``[1, L, hidden]``; replaced in place.
        watchers: block-relative name of a linear -> what looks at it.
    """
    rename = segment.architecture.module_name
    with watch_gradients(segment.module, {rename(name): w for name, w in watchers.items()}):
        for window, gradient in enumerate(gradients):
            entering = states.batches[window].requires_grad_()
            with torch.enable_grad():
                output = states.output(segment.module, segment.index, window)
            (gradients[window],) = torch.autograd.grad(output, entering, gradient)
            states.batches[window] = entering.detach()
            advance()
