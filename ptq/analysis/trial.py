"""Afterwards: whether the recipes that the advice names do what it says. Each is carried out and scored, beside plain
rounding with the same scheme. Holds the float model for the comparison."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from calibration.errors import ToolkitError, foreign
from calibration.memory import return_freed
from calibration.model.checkpoint import write_atomically
from calibration.model.reading import read_json
from calibration.model.typed import built
from calibration.progress import Part, Progress
from calibration.scoring.perplexity import score
from calibration.scoring.windows import Scoring
from calibration.text.crops import TokenBatches
from calibration.text.encoding import EncodedText
from ptq.analysis.record import Advice, Trial
from ptq.analysis.sites import short
from ptq.evaluation import EVAL_TOKENS, logits_of
from ptq.planning.job import Options, prepare
from ptq.run.pipeline import run as run_job
from ptq.runtime.load import load_model

PLAIN = "rtn"
TRIALS_FILE = "trials.json"
SAME = 0.05
"""KL within this share of plain rounding's is neither better nor worse."""


def recipes_to_try(advice: Sequence[Advice]) -> list[tuple[str, str, bool]]:
    """(method, scheme, whether it was advised), plain rounding first for every scheme."""
    advised = [recipe for a in advice for recipe in a.recipes]
    found = []
    for scheme in dict.fromkeys(scheme for _, scheme in advised):
        methods = [method for method, of in advised if of == scheme]
        found += [(PLAIN, scheme, PLAIN in methods), *((m, scheme, True) for m in methods if m != PLAIN)]
    return found


def try_recipes(
    folder: Path,
    advice: Sequence[Advice],
    tokens: TokenBatches,
    windows: int,
    options: Options,
    dtype: torch.dtype,
    device: torch.device,
    place: Path,
    progress: Progress,
) -> tuple[Trial, ...]:
    """Quantize with every recipe on the text behind the first ``windows`` windows, and score it on those.

    Args:
        options: of the runs; the text is taken from ``tokens``.
        dtype: of scoring.
        place: a folder for the runs and for what is finished, `TRIALS_FILE`, from which another call goes on.
    """
    trust, finished = options.trust_remote_code, place / TRIALS_FILE
    found = _finished(finished)
    reference = logits_of(load_model(folder, dtype=dtype, device=device, trust_remote_code=trust), device)
    text = EncodedText.of_windows(tokens.input_ids[:windows], "the text of the analysis")
    batch = max(1, min(EVAL_TOKENS // tokens.seq_len, windows // 8))  # so that progress is seen
    scoring = Scoring(window=tokens.seq_len, batch_size=batch, dtype=str(dtype).removeprefix("torch."))
    calibration = TokenBatches(tokens.input_ids[windows:], tokens.source)
    recipes = recipes_to_try(advice)
    for number, (method, scheme, advised) in enumerate(recipes, 1):
        if any((trial.method, trial.scheme) == (method, scheme) for trial in found):
            continue
        part = Part(progress, f"recipe {number} of {len(recipes)}, {method} {scheme}")
        try:
            job = prepare(folder, method=method, scheme=scheme, format="native", options=options)
        except ToolkitError as refusal:
            found.append(Trial(method, scheme, advised, None, None, None, str(refusal)))
            continue
        record = run_job(job, place / "run", overwrite=True, tokens=calibration, progress=part)
        loaded = load_model(place / "run", dtype=dtype, device=device, trust_remote_code=trust)
        part.stage("score", windows)
        result = score(
            logits_of(loaded, device), text, scoring, reference_fn=reference, progress=_scored(part, windows)
        )
        assert result.divergence is not None
        bits = float(record.result["bits_per_weight"])
        found.append(
            Trial(method, scheme, advised, bits, short(result.perplexity), short(result.divergence.kl_mean), None)
        )
        write_atomically(finished, json.dumps({"trials": [dataclasses.asdict(t) for t in found]}).encode())
        del loaded
        return_freed()
    shutil.rmtree(place, ignore_errors=True)
    return tuple(found)


def _finished(path: Path) -> list[Trial]:
    """What an interrupted analysis has tried."""
    fix = "pass --overwrite without --resume to start again"
    if not path.exists():
        return []
    with foreign(f"{path}: damaged", fix):
        return [built(Trial, entry) for entry in read_json(path, fix)["trials"]]


def _scored(progress: Progress, windows: int) -> Callable[[int, int], None]:
    """Windows scored so far -> units of the stage."""
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        progress.advance(f"window {done} of {total}", done - seen)
        seen = done

    return advance


def verdicts(trials: Sequence[Trial]) -> list[str]:
    """One sentence per scheme: whether the advice helped."""
    said = []
    for scheme in dict.fromkeys(t.scheme for t in trials):
        of = [t for t in trials if t.scheme == scheme and t.divergence is not None]
        plain = next((t for t in of if t.method == PLAIN), None)
        for t in of:
            if plain is None or plain.divergence is None or t.divergence is None or not t.advised:
                continue
            if t is plain:
                said.append(f"{scheme}: plain rounding was advised, KL {t.divergence:.4g} nats")
                continue
            ratio = t.divergence / max(plain.divergence, 1e-12)
            word = "helped" if ratio < 1 - SAME else "made no difference" if ratio <= 1 + SAME else "did harm"
            said.append(f"{scheme}: {t.method} {word}, KL {t.divergence:.4g} against {plain.divergence:.4g} nats")
    return said
