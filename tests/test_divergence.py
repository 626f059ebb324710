"""Divergence from a reference model on the same tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_models import V, bigram, random_text

from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring


def test_a_model_does_not_diverge_from_itself_or_from_its_shifted_logits() -> None:
    text, model = random_text(5 * 32), bigram()
    for other in (model, lambda ids: model(ids) + 3.0):
        found = score(model, text, Scoring("gptq", 32), reference_fn=other).divergence
        assert found is not None and found.top1_agreement == 1.0
        assert 0 <= found.kl_mean < 1e-6 and 0 <= found.kl_p99 < 1e-5
        assert abs(found.delta_nll) < 1e-6 and found.delta_nll_se < 1e-6


def test_divergence_against_the_slow_formula() -> None:
    text, q_model, p_model = random_text(5 * 32), bigram(1), bigram(0)
    result = score(q_model, text, Scoring("gptq", 32), reference_fn=p_model)
    windows = text.ids.view(5, 32)
    p = torch.stack([p_model(w[None])[0, :-1] for w in windows]).double().log_softmax(-1)
    q = torch.stack([q_model(w[None])[0, :-1] for w in windows]).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).flatten().numpy()
    target = windows[:, 1:, None]
    delta = (p.gather(2, target) - q.gather(2, target))[..., 0].numpy()
    found = result.divergence
    assert found is not None and found.kl_mean >= 0
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.delta_nll == pytest.approx(delta.mean(), rel=1e-5)
    assert found.delta_nll_se == pytest.approx(delta.mean(1).std(ddof=1) / math.sqrt(5), rel=1e-4)
    reference = score(p_model, text, Scoring("gptq", 32))
    assert found.reference_perplexity == pytest.approx(reference.perplexity, rel=1e-9)
    assert math.log(result.perplexity / reference.perplexity) == pytest.approx(found.delta_nll, abs=1e-6)


def test_masked_vocabulary_and_one_window() -> None:
    def masked(ids: Tensor) -> Tensor:
        logits = bigram()(ids)
        logits[..., V - 5 :] = -math.inf
        return logits

    text = random_text(40, vocabulary=V - 5)
    found = score(masked, text, Scoring("gptq", 32), reference_fn=masked).divergence
    assert found is not None and found.kl_mean < 1e-6 and found.delta_nll_se == 0.0


def test_half_precision_logits_are_scored_in_float32() -> None:
    text = random_text(5 * 32)
    half = score(lambda ids: bigram()(ids).bfloat16(), text, Scoring("gptq", 32))
    exact = score(lambda ids: bigram()(ids).bfloat16().float(), text, Scoring("gptq", 32))
    assert half.nll == exact.nll
