"""The steps of ``ptq sparsify``, of both packages: open, check, calibrate, copy, write."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import disk_errors
from calibration.model.contents import checkpoint_files
from calibration.model.opening import context_length, fingerprint, forward_dtype, locate, open_model
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.text.samples import default_dataset, model_tokens
from calibration.walk.passes import Pass
from ptq.devices import evaluation_dtype, parse_dtype, resolve_device
from ptq.evaluation import logits_of
from ptq.planning.job import BATCH_TOKENS
from ptq.runtime.dequantized import float_weights
from ptq.runtime.load import checkpoint_dtype, load_model
from ptq.session import Session
from sparsity.budget import ROUNDS, Profile, choose
from sparsity.coverage import with_bytes_skipped
from sparsity.files import SETTINGS_FILE, TENSORS_FILE, Sparsity, site_tensors
from sparsity.job import Base, calibrate, check_plan, write
from sparsity.masking import mask_model
from sparsity.sites import Site

NOT_COPIED = ("plan.json", SETTINGS_FILE, TENSORS_FILE)


@dataclass(frozen=True)
class SparsifyOptions:
    """Calibration text and where forward passes run, as in `ptq.planning.job.Options`; and goals instead of a target.

    Attributes:
        skip_bytes: share of the bytes of all linears of the blocks to be skipped per token.
        max_increase: relative increase of the perplexity that is allowed, 0.01 for one per cent; measured on windows of
            ``search_text``, or where there is none on other windows of the calibration text.
    """

    dataset: str | None
    samples: int
    seq_len: int
    seed: int
    device: str
    dtype: str
    trust_remote_code: bool = False
    skip_bytes: float | None = None
    max_increase: float | None = None
    search_text: str | None = None


def run_sparsify(
    model: str | Path, step: Pass, out: Path, options: SparsifyOptions, overwrite: bool, progress: Progress
) -> Sparsity:
    """Thresholds of one method, beside a copy of the checkpoint.

    Raises:
        ToolkitError, PlanError: whatever can be refused; ``out`` is then not there.
    """
    if options.samples < 1 or options.seq_len < 2:
        raise ToolkitError(
            f"--samples {options.samples} --seq-len {options.seq_len}: too small", "use at least 1 sample of 2 tokens"
        )
    folder = locate(model)
    session = Session(out)
    session.check(overwrite, resume=False, source=folder, resumable=False)
    reader, config, spec = open_model(folder, options.trust_remote_code)
    seq_len = min(options.seq_len, context_length(config))
    if options.skip_bytes is not None:
        step = with_bytes_skipped(step, options.skip_bytes, reader.infos, spec)
    walked = step if options.max_increase is None else Profile(step)
    check_plan(walked, spec, options.samples * seq_len)
    device = resolve_device(options.device)
    stored = checkpoint_dtype(reader, spec)
    dtype = forward_dtype(stored, device) if options.dtype == "auto" else parse_dtype(options.dtype)
    tokens = _tokens(folder, config, options.dataset, seq_len, options.seed, options)
    if options.max_increase is not None:
        text = options.search_text or options.dataset
        held_out = _tokens(folder, config, text, seq_len, options.seed + 1, options)
    session.begin({"sparsify": fingerprint(reader), "method": step.name}, resume=False)
    with session.unless_done():
        gates = calibrate(
            Base(float_weights(reader, spec), config, spec),
            walked,
            tokens,
            session.blocks,
            dtype=dtype,
            device=device,
            batch_size=max(1, min(options.samples, BATCH_TOKENS // seq_len)),
            progress=progress,
        )
        reader.close()
        choice = None
        if options.max_increase is not None:
            progress.stage("search", ROUNDS)
            choice = choose(gates, spec, options.max_increase, Increase(folder, spec, held_out, options, progress))
            gates = site_tensors(choice.sites)
        with disk_errors(session.partial):
            for path in checkpoint_files(folder):
                if path.name not in NOT_COPIED:
                    target = session.partial / path.relative_to(folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
        sparsity = write(session.partial, [step], gates, tokens.source, choice)
        session.finish()
    return sparsity


class Increase:
    """Sites -> relative increase of the perplexity on some windows, with masks on all positions but the first."""

    def __init__(
        self, folder: Path, spec: ArchitectureSpec, tokens: TokenBatches, options: SparsifyOptions, progress: Progress
    ) -> None:
        where = resolve_device(options.device)
        loaded = load_model(folder, dtype=evaluation_dtype(options.dtype, where), device=where)
        self._model, self._logits = loaded.model, logits_of(loaded, where)
        self._spec, self._tokens, self._progress = spec, tokens, progress
        self._batch = max(1, BATCH_TOKENS // tokens.seq_len)
        self._dense = self._mean_nll()

    def __call__(self, sites: tuple[Site, ...]) -> float:
        masks = mask_model(self._model, self._spec, sites)
        try:
            found = math.expm1(self._mean_nll() - self._dense)
        finally:
            masks.remove()
        self._progress.advance(f"perplexity {found:+.2%}")
        return found

    @torch.no_grad()
    def _mean_nll(self) -> float:
        """Nats per token, float32 log-softmax, the first token of a window not scored."""
        total = 0.0
        for ids in self._tokens.batches(self._batch):
            logits = self._logits(ids)[:, :-1].float().flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        return total / (len(self._tokens) * (self._tokens.seq_len - 1))


def _tokens(
    folder: Path, config: Any, dataset: str | None, seq_len: int, seed: int, options: SparsifyOptions
) -> TokenBatches:
    name = dataset or default_dataset(folder)
    return model_tokens(folder, config, name, options.samples, seq_len, seed, options.trust_remote_code)
