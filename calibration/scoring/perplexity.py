"""Perplexity under named protocols, and the distance to a reference model on the same tokens.

``gptq``: disjoint windows, every target but a window's first token (Frantar et al. 2022, arXiv 2210.17323; the number
most papers print). ``hf-stride``: overlapping windows, only what a window adds is scored (Hugging Face's guide
"perplexity of fixed-length models"). ``llama.cpp``: disjoint chunks, second half scored.
``decode``: disjoint windows whose first half is a prompt and whose second half is scored, for models that compute
prompts and generated tokens in different ways (activation sparsity). Under all of them every window begins with BOS
where the tokenizer puts one in front of a text: the same tokens are scored, the first token of a window is exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.record import Divergence, Evaluation, Protocol
from calibration.scoring.windows import Scoring, Window, batches, cut_windows
from calibration.text.encoding import EncodedText, begin_with_bos, too_short

# Token ids, int64 [B, L], on the CPU -> logits [B, L, V] in any float type, on any device.
LogitsModel = Callable[[Tensor], Tensor]
# Called with (windows done, windows in all), first of all with 0 done.
Progress = Callable[[int, int], None]

# Float32 logits held at a time, per model: 64 MiB. Smaller pieces gain nothing, larger ones cost memory at V = 128k.
CHUNK_ELEMENTS = 1 << 24


@dataclass
class _Sums:
    """What has been added up over windows. Float64 totals of float32 values; KL per token for its percentile."""

    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agreed: int = 0

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def extend(self, other: _Sums) -> None:
        """Put the windows of another behind one's own."""
        self.nll += other.nll
        self.reference_nll += other.reference_nll
        self.counts += other.counts
        self.kl += other.kl
        self.agreed += other.agreed

    def divergence(self) -> Divergence:
        kl = torch.cat(self.kl).numpy()
        counts = np.array(self.counts, dtype=np.float64)
        difference = np.array(self.nll) - np.array(self.reference_nll)
        # Tokens of a window are correlated, windows hardly: the error is that of window means.
        means = difference / counts
        windows = np.split(kl, np.cumsum(self.counts)[:-1])
        return Divergence(
            kl_mean=float(kl.mean(dtype=np.float64)),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=self.agreed / self.tokens,
            delta_nll=float(difference.sum() / self.tokens),
            delta_nll_se=_standard_error(means),
            reference_perplexity=_perplexity(sum(self.reference_nll), self.tokens),
            kl_se=_standard_error(np.array([window.mean(dtype=np.float64) for window in windows])),
        )


def _standard_error(means: np.ndarray) -> float:
    """Of the mean of window means; 0 where there is one window."""
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0


def score(
    logits_fn: LogitsModel,
    text: EncodedText,
    scoring: Scoring,
    *,
    model: str = "float",
    path: str = "float",
    reference_fn: LogitsModel | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """Perplexity of a model on a text, and with ``reference_fn`` its divergence from another model.

    Both models see the same windows, one batch at a time, so that whole distributions are compared without storing
    them. Log-probabilities are float32.

    Args:
        logits_fn, reference_fn: see `LogitsModel`; in evaluation mode, and with an empty cache at every call.
        model, path: as in `Evaluation`.
        processes: that take the batches of windows in turn; all get the result, the same for any number of them.

    Raises:
        ToolkitError: the text is shorter than one window, or a model gives NaN or infinite losses.
    """
    limits = [limit for limit in (scoring.max_windows, text.max_windows) if limit is not None]
    ids = text.ids[: min(limits) * scoring.window] if limits else text.ids
    if len(ids) < scoring.window:
        raise too_short(text.dataset, len(ids), scoring.window)
    windows = cut_windows(scoring, len(ids))
    shared = processes or Processes()
    parts: dict[int, _Sums] = {}
    done = 0
    if progress is not None:
        progress(0, len(windows))
    with torch.no_grad():
        for number, batch in enumerate(batches(windows, scoring.batch_size)):
            done += len(batch)
            if number % shared.size != shared.rank:
                continue
            block = begin_with_bos(torch.stack([ids[w.start : w.stop] for w in batch]), text.bos_id)
            reference = None if reference_fn is None else reference_fn(block)
            parts[number] = _batch_sums(batch, block, logits_fn(block), reference)
            for w, nll in zip(batch, parts[number].nll, strict=True):
                if not math.isfinite(nll):
                    raise ToolkitError(
                        f"model '{model}': the loss of the window at token {w.start} is {nll}",
                        f"look for overflow: use float32 or bfloat16 instead of {scoring.dtype}, or check the weights",
                    )
            if progress is not None:
                progress(done, len(windows))
    sums = _Sums()
    found = {number: part for own in shared.all_values(parts) for number, part in own.items()}
    for number in sorted(found):
        sums.extend(found[number])
    scored = [slice(w.start + w.first, w.stop) for w in windows]
    words = sum(int(text.words[part].sum()) for part in scored)
    n_bytes = sum(int(text.bytes[part].sum()) for part in scored)
    nll = sum(sums.nll)
    return Evaluation(
        model=model,
        protocol=Protocol(
            name=scoring.protocol,
            dataset=text.dataset,
            text_fingerprint=text.fingerprint,
            join=text.join,
            special_tokens=text.special_tokens,
            window=scoring.window,
            stride=scoring.step,
            tokens_scored=sums.tokens,
            dtype=scoring.dtype,
            bos=text.bos_id is not None,
        ),
        perplexity=_perplexity(nll, sums.tokens),
        nll=nll,
        words=words,
        bytes=n_bytes,
        divergence=None if reference_fn is None else sums.divergence(),
        path=path,
        windows=len(windows),
    )


def _batch_sums(batch: list[Window], block: Tensor, logits: Tensor, reference: Tensor | None) -> _Sums:
    """Those of the windows of one batch: ids ``[B, L]`` and logits ``[B, L, V]``, also of the reference."""
    sums = _Sums()
    for row, w in enumerate(batch):
        reference_row = None if reference is None else reference[row, w.first - 1 : -1]
        _add(sums, logits[row, w.first - 1 : -1], block[row, w.first :], reference_row)
    return sums


def _add(sums: _Sums, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
    """Adds one window: logits ``[T, V]`` of any float type, targets int64 ``[T]``, reference logits ``[T, V]``.

    nll = -log q(target); KL(p || q) = sum_v p (log p - log q) with the reference as p, all in float32.
    """
    assert logits.shape[0] == targets.shape[0], (logits.shape, targets.shape)
    nll = reference_nll = 0.0
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for begin in range(0, len(targets), step):
        part = slice(begin, begin + step)
        log_q = logits[part].float().log_softmax(-1)
        target = targets[part, None].to(log_q.device)
        nll -= float(log_q.gather(1, target).sum(dtype=torch.float64))
        if reference is None:
            continue
        log_p = reference[part].float().log_softmax(-1).to(log_q.device)
        assert log_p.shape == log_q.shape, (log_p.shape, log_q.shape)
        reference_nll -= float(log_p.gather(1, target).sum(dtype=torch.float64))
        sums.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        p = log_p.exp()
        # 0 log 0 = 0, also where masked logits make it 0 * (inf - inf); rounding can leave -1e-9 where KL is 0.
        terms = torch.where(p > 0, p * log_p.sub_(log_q), 0.0)
        sums.kl.append(terms.sum(-1).clamp_min_(0.0).cpu())
    sums.nll.append(nll)
    sums.counts.append(len(targets))
    if reference is not None:
        sums.reference_nll.append(reference_nll)


def _perplexity(nll: float, tokens: int) -> float:
    mean = nll / tokens
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows a float64 above 709
