"""The parts of an analysis that are done on request: other softmaxes, linears rounded alone, recipes carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.distributed import Processes
from calibration.errors import ToolkitError
from calibration.memory import return_freed
from calibration.progress import Progress
from calibration.text.crops import TokenBatches
from calibration.walk.kept_states import check_room
from ptq.analysis.record import Advice, Trial
from ptq.analysis.softmax_record import SoftmaxSweep
from ptq.analysis.softmax_sweep import SweepOptions, sweep_softmax
from ptq.analysis.trial import try_recipes
from ptq.devices import evaluation_dtype
from ptq.fitting.job import Fit
from ptq.fitting.memory import kept_bytes
from ptq.planning.job import Options
from ptq.runtime.attention import has_interface
from ptq.runtime.explicit_attention import parse_softmax
from ptq.runtime.load import load_model
from ptq.study.frontier import Point, frontier
from ptq.study.sensitivity import SchemeSensitivity, gradient_windows, measure_sensitivity, prepare_sensitivity


@dataclass(frozen=True)
class Parts:
    """What all of them need.

    Attributes:
        options: text and seeds.
        windows, probe_windows: as in `AnalysisOptions`.
        quantized: the checkpoint is.
    """

    folder: Path
    spec: ArchitectureSpec
    options: Options
    windows: int
    probe_windows: int
    device: torch.device
    quantized: bool

    def softmax(self, tokens: TokenBatches, wanted: SweepOptions, progress: Progress) -> SoftmaxSweep:
        """Holds the whole model; gone again afterwards."""
        dtype, trust = evaluation_dtype(self.options.dtype, self.device), self.options.trust_remote_code
        loaded = load_model(self.folder, dtype=dtype, device=self.device, trust_remote_code=trust)
        held = sum(t.nbytes for t in (*loaded.model.parameters(), *loaded.model.buffers()))
        progress.message(f"--clipped-softmax holds the whole model: {held / 1e9:.2f} GB in {dtype}")
        found = sweep_softmax(loaded.model, self.spec, tokens, self.windows, wanted, self.quantized, progress)
        del loaded
        return_freed()
        return found

    def sensitivity(
        self, fit: Fit | None, schemes: Sequence[str], tokens: TokenBatches, progress: Progress, processes: Processes
    ) -> tuple[tuple[SchemeSensitivity, ...], tuple[Point, ...]]:
        """Every linear alone, and what mixing could reach; one block in memory. Empty without ``fit``. The
        ``processes`` share the work, and all get the result."""
        if fit is None:
            return (), ()
        found = measure_sensitivity(fit, schemes, tokens, self.probe_windows, progress, processes)
        fit.job.reader.close()
        return found, frontier(found)

    def trials(
        self, advice: Sequence[Advice], tokens: TokenBatches, place: Path, progress: Progress
    ) -> tuple[Trial, ...]:
        """Holds the float model."""
        dtype = evaluation_dtype(self.options.dtype, self.device)
        options = replace(self.options, samples=len(tokens) - self.windows)
        return try_recipes(self.folder, advice, tokens, self.windows, options, dtype, self.device, place, progress)


def check_parts(
    parts: Parts, config: Any, softmax: SweepOptions | None, sensitivity: Sequence[str], try_advice: bool
) -> Fit | None:
    """Refuse what cannot be done, from headers alone. Returns the plan of sensitivities, where they are wanted.

    Raises:
        ToolkitError, PlanError: see the messages.
    """
    samples, windows = parts.options.samples, parts.windows
    if (softmax is not None or try_advice) and not 1 <= windows < samples:
        raise ToolkitError(
            f"--samples {samples} --windows {windows}: some windows are scored, and some must be left to set ranges",
            f"pass --windows {max(samples // 2, 1)}, or more --samples",
        )
    if softmax is not None:
        if not has_interface(config):
            reason = f"{config.model_type}: its attention is not on transformers' attention interface"
            raise ToolkitError(f"--clipped-softmax: {reason}", "leave --clipped-softmax out")
        if not 0 <= softmax.head_windows <= windows:
            raise ToolkitError(
                f"--head-windows {softmax.head_windows}: outside 0 .. {windows} (--windows)",
                "give fewer; 0 leaves single heads out",
            )
        for text in softmax.settings:
            parse_softmax(text, parts.options.seq_len)
    if sensitivity and parts.probe_windows < 1:
        raise ToolkitError(f"--probe-windows {parts.probe_windows}: less than 1", "pass --probe-windows 4")
    if parts.quantized and (sensitivity or try_advice):
        option = "--sensitivity" if sensitivity else "--try"
        raise ToolkitError(f"{option}: {parts.folder.name} is quantized already", "analyze the float model")
    if not sensitivity:
        return None
    fit = prepare_sensitivity(parts.folder, sensitivity, parts.options)
    check_room(kept_bytes(fit.job, gradient_windows(fit, parts.probe_windows)))
    return fit
