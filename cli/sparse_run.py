"""The steps of ``ptq sparsify``, of both packages: open, check, calibrate, copy, write."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from calibration.checkpoint import disk_errors
from calibration.errors import ToolkitError
from calibration.models import fingerprint, forward_dtype, locate, open_model
from calibration.passes import Pass
from calibration.progress import Progress
from calibration.samples import model_tokens
from ptq.devices import parse_dtype, resolve_device
from ptq.evaluation import context_length, default_dataset
from ptq.pipeline import BATCH_TOKENS
from ptq.runtime.dequantized import float_weights
from ptq.runtime.load import checkpoint_dtype
from ptq.session import BLOCKS, Session
from sparsity.files import SETTINGS_FILE, TENSORS_FILE, Sparsity
from sparsity.job import Base, calibrate, check_plan, write

NOT_COPIED = ("plan.json", SETTINGS_FILE, TENSORS_FILE)


@dataclass(frozen=True)
class SparsifyOptions:
    """Calibration text and where forward passes run; as in `ptq.pipeline.Options`."""

    dataset: str | None
    samples: int
    seq_len: int
    seed: int
    device: str
    dtype: str
    trust_remote_code: bool


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
    check_plan(step, spec, options.samples * seq_len)
    device = resolve_device(options.device)
    stored = checkpoint_dtype(reader, spec)
    dtype = forward_dtype(stored, device) if options.dtype == "auto" else parse_dtype(options.dtype)
    dataset = options.dataset or default_dataset(folder)
    trust = options.trust_remote_code
    tokens = model_tokens(folder, config, dataset, options.samples, seq_len, options.seed, trust)
    session.begin({"sparsify": fingerprint(reader), "method": step.name}, resume=False)
    with session.unless_done():
        gates = calibrate(
            Base(float_weights(reader, spec), config, spec),
            step,
            tokens,
            session.blocks,
            dtype=dtype,
            device=device,
            batch_size=max(1, min(options.samples, BATCH_TOKENS // seq_len)),
            progress=progress,
        )
        reader.close()
        with disk_errors(session.partial):
            shutil.copytree(
                folder, session.partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_COPIED, BLOCKS)
            )
        sparsity = write(session.partial, [step], gates, tokens.source)
        session.finish()
    return sparsity
