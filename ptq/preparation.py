"""The preprocessing of PTQ1.61 (Zhao et al. 2025, arXiv 2502.13179): train what a first quantization broke, then
quantize again.

The new starting point is the quantized model plus a low-rank correction, merged into float weights. It is never used
as it is: in it, weights that matter lie in the channels that the second quantization keeps. Unlike everything else
here this trains on the language-model loss and holds the whole model in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.architectures import ArchitectureSpec
from calibration.bounds import check_counts
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader, write_atomically
from calibration.model.gguf import said
from calibration.model.opening import fingerprint
from calibration.model.shards import ShardWriter
from calibration.model.skeleton import build_model, load_parameters, set_submodule
from calibration.progress import Progress, Silent
from calibration.shown import Shown
from calibration.text.crops import TokenBatches
from ptq.formats.native import WEIGHTS_KEY
from ptq.formats.reading import Schemes, quantized_linears, read_linear
from ptq.formats.registry import Format, stored_names
from ptq.formats.write import copy_small_files
from ptq.planning.source import TextOptions, open_source
from ptq.runtime.load import checkpoint_dtype
from ptq.session import Session

RECORD_FILE = "preparation.json"
NO_TURN = "quantize without rotate, or with online = false"


@dataclass(frozen=True)
class Training:
    """How the correction is trained.

    Attributes:
        steps: optimizer steps; the published runs took 5000 of 2 sequences of up to 2048 tokens per device.
        batch: sequences per step.
        rank, alpha, dropout: of the low-rank part ``W += alpha / rank * B A``.
        rate: of AdamW; warm-up over the first part ``warmup`` of the steps, then a cosine to 0.
        seed: of text, start and dropout.
    """

    steps: int = 1000
    batch: int = 4
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    rate: float = 1e-4
    warmup: float = 0.05
    seed: int = 0

    def factor(self, step: int) -> float:
        """The part of the rate that step number ``step`` (from 0) takes."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


class LowRank(nn.Module):
    """A frozen linear with a trained low-rank part; the part is 0 at the start."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], training: Training) -> None:
        super().__init__()
        out_features, in_features = shape
        self.base = base
        self.dropout = nn.Dropout(training.dropout)
        self.scale = training.alpha / training.rank
        self.a = nn.Parameter(torch.randn(training.rank, in_features) / in_features**0.5)
        self.b = nn.Parameter(torch.zeros(out_features, training.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        result: torch.Tensor = self.base(x) + self.scale * (self.dropout(x) @ self.a.T) @ self.b.T
        return result

    def delta(self) -> torch.Tensor:
        """What the part adds to ``W [out, in]``."""
        return self.scale * self.b.detach() @ self.a.detach()


def trained_linears(spec: ArchitectureSpec) -> list[str]:
    """Full names of the linears that get a low-rank part: all of the blocks but the output projections of attention,
    as published."""
    names = []
    for index in range(spec.n_blocks):
        block = spec.block(index)
        outputs = {name for group in block.balance if group.heads is not None for name in group.consumers}
        names += [spec.prefix(index) + name for name in block.linears if name not in outputs]
    return names


@dataclass(frozen=True, repr=False)
class Preparation(Shown):
    """A float checkpoint to quantize again. Losses are nats per token, means over a tenth of the steps."""

    out: Path
    first_loss: float
    last_loss: float

    def facts(self) -> Mapping[str, object]:
        return {"written to": self.out, "loss": f"{self.first_loss:.4f} -> {self.last_loss:.4f} nats per token"}


def prepare_checkpoint(
    model: str | Path,
    *,
    out: str | Path,
    dataset: str | None = None,
    seq_len: int = 2048,
    training: Training | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Preparation:
    """Train a low-rank correction of a quantized checkpoint on text, and write the sum as a float checkpoint.

    Args:
        model: a quantized checkpoint, in any format.
        dataset: text to train on, as for calibration.

    Raises:
        ToolkitError: the model is not quantized, settings that make no sense, or a text that is too short.
    """
    training, progress = training or Training(), progress or Silent()
    if training.steps < 1 or training.batch < 1:
        raise ToolkitError(
            f"--steps {training.steps} --batch {training.batch}: nothing to train on", "use at least 1 of each"
        )
    check_counts(steps=training.steps, batch=training.batch)
    samples = training.steps * training.batch
    options = TextOptions(
        dataset, samples, seq_len, training.seed, device, "float32", trust_remote_code=trust_remote_code
    )
    source = open_source(model, options)
    folder, reader, config, spec, place = source.folder, source.reader, source.config, source.spec, source.device
    session = Session(Path(out))
    session.check(overwrite, resume=False, source=folder, resumable=False)
    quantized = quantized_linears(reader)
    if quantized is None:
        raise ToolkitError(
            f"{said(folder)}: a float checkpoint; preparation starts from a quantized one",
            f"first run `ptq quantize {model} --method ptq1.61 --out Q`, then `ptq prepare Q`",
        )
    fmt, schemes = quantized
    _check(training, spec, schemes)
    source.check_text()
    source.tell(progress)
    tokens = source.windows(progress)
    session.begin({"prepare": fingerprint(reader), "training": asdict(training)}, resume=False)
    with session.unless_done(), reader:
        weights = dict(_float_tensors(reader, spec, fmt, schemes))
        network = build_model(config, spec, torch.float32, place)
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            parts = _attach(network, spec, weights, training, place)
            losses = _train(network, parts, tokens, training, progress)
        _write(reader, spec, weights, parts, session.partial)
        copy_small_files(folder, session.partial)
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        record = {**asdict(training), "text": tokens.source, "first_loss": first, "last_loss": last}
        write_atomically(session.partial / RECORD_FILE, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        session.finish()
    return Preparation(Path(out), first, last)


def _check(training: Training, spec: ArchitectureSpec, schemes: Schemes) -> None:
    if not 0 < training.rate < 1:
        raise ToolkitError(f"--rate {training.rate}: outside (0, 1)", "use 1e-4")
    sides = [min(schemes[name][1]) for name in trained_linears(spec) if name in schemes]
    if not 0 < training.rank <= min(sides, default=1):
        raise ToolkitError(
            f"--rank {training.rank}: the smallest linear has {min(sides, default=1)} rows or columns",
            f"use a rank from 1 to {min(sides, default=1)}",
        )


def _float_tensors(
    reader: CheckpointReader, spec: ArchitectureSpec, fmt: Format, schemes: Schemes
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in float32, named and turned as in a float checkpoint."""
    taken: set[str] = set()
    for name, (scheme, shape) in schemes.items():
        q = read_linear(reader, fmt, name, scheme, shape)
        if q.hadamard is not None:
            raise ToolkitError(
                f"{name}: its input is rotated at run time, which a float checkpoint cannot say", NO_TURN
            )
        w = q.dequantize()
        yield f"{name}.weight", w.T.contiguous() if spec.conv1d else w
        taken.update(stored_names(fmt, name).values())
    for name in reader.infos:
        if name not in taken:
            yield name, reader.tensor(name).float()


def _attach(
    network: Any, spec: ArchitectureSpec, weights: dict[str, torch.Tensor], training: Training, device: torch.device
) -> dict[str, LowRank]:
    """Fill the model and put a low-rank part beside every linear that gets one, by full name."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    named = {spec.root_module_name(name): tensor for name, tensor in weights.items()}
    load_parameters(network, {name: tensor.to(device) for name, tensor in named.items() if name in parameters})
    absent = {n for n, p in network.named_parameters(remove_duplicate=False) if p.is_meta}
    network.tie_weights(missing_keys=absent, recompute_mapping=False)
    network.requires_grad_(False)
    parts = {}
    for name in trained_linears(spec):
        path = spec.root_module_name(name + ".").removesuffix(".")
        rows, columns = weights[f"{name}.weight"].shape
        shape = (columns, rows) if spec.conv1d else (rows, columns)
        parts[name] = LowRank(network.get_submodule(path), shape, training).to(device)
        set_submodule(network, path, parts[name])
    return parts


def _train(
    network: Any, parts: dict[str, LowRank], tokens: TokenBatches, training: Training, progress: Progress
) -> list[float]:
    """The loss of every step."""
    progress.stage("train", training.steps)
    trained = [parameter for part in parts.values() for parameter in (part.a, part.b)]
    optimizer = torch.optim.AdamW(trained, lr=training.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.factor)
    network.train()
    losses = []
    for ids in tokens.batches(training.batch):
        ids = ids.to(trained[0].device)
        loss = network(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        progress.advance(f"loss {losses[-1]:.3f}")
    return losses


def _write(
    reader: CheckpointReader,
    spec: ArchitectureSpec,
    weights: dict[str, torch.Tensor],
    parts: dict[str, LowRank],
    out: Path,
) -> None:
    """A float checkpoint in the dtype that the model had before it was quantized."""
    dtype = checkpoint_dtype(reader, spec)
    writer = ShardWriter(out)
    for name, tensor in weights.items():
        part = parts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if part is not None:
            delta = part.delta().cpu()
            tensor = tensor + (delta.T if spec.conv1d else delta)
        writer.add(name, tensor.to(dtype).contiguous())
    writer.finish()
    config = {key: value for key, value in reader.config.items() if key not in ("quantization_config", WEIGHTS_KEY)}
    write_atomically(out / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
