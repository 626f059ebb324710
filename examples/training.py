"""The training loop of the example models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

Windows = Callable[[torch.Generator], Tensor]
"""The next batch of token ids, int64 ``[windows, tokens]``."""


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, window: int) -> float:
    """Non-overlapping windows, the first token of each unscored, an incomplete last window dropped."""
    windows = ids[: len(ids) // window * window].view(-1, window)
    loss, count = 0.0, 0
    for batch in windows.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    return math.exp(loss / count)


def rate_factor(step: int, steps: int) -> float:
    """Warm-up, then the first part of a cosine that is one and a half times as long, then straight down to zero."""
    warm, cooldown, horizon = 100, round(0.225 * steps), round(1.5 * steps)
    if step < warm:
        return (step + 1) / warm
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, horizon - warm)))
    return cosine * min(1.0, (steps - step) / cooldown)


def train(model: nn.Module, windows: Windows, *, steps: int, rate: float, seed: int, note: Callable[[int], str]) -> int:
    """AdamW with bfloat16 autocast. Returns the number of tokens seen.

    Args:
        note: after a step, what to add to the log; an empty text adds nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    start, seen = time.perf_counter(), 0
    for step in range(1, steps + 1):
        batch = windows(generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seen += batch.numel()
        more = note(step)
        if more or step % 100 == 0 or step == steps:
            passed = time.perf_counter() - start
            words = f"step {step}/{steps}  loss {loss.item():.3f}  {seen / passed:.0f} tokens/s  {more}"
            print(f"{words}  {passed:.0f} s", flush=True)
    return seen
