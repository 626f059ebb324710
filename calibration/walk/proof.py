"""What an architecture's spec claims, tried on a checkpoint's own weights before passes rely on it.

A wrong entry of the table would otherwise cost quality without a word: a scale that does not cancel, a rotation through
a norm that subtracts the mean. One block of each kind is loaded and run a few times on eight tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from calibration.architectures.derivation.inputs import TOLERANCE
from calibration.architectures.derivation.pairs import scales
from calibration.architectures.derivation.residual import after, rotated_norms, turn
from calibration.architectures.spec import Balance, Residual
from calibration.errors import ToolkitError
from calibration.model.skeleton import release
from calibration.model.watching import trace, watching
from calibration.progress import Progress, Silent
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.passes import Pass, Phase
from calibration.walk.segment import Segment
from calibration.walk.states import HiddenStates

TOKENS = 8


def needs_proof(passes: Sequence[Pass]) -> bool:
    """Whether a pass moves scales or rotations between modules, or counts on linears sharing their input."""
    return any(phase in (Phase.TRANSFORM, Phase.BALANCE) for step in passes for phase in step.phases) or any(
        step.statistics for step in passes
    )


@torch.no_grad()
def prove(blocks: FloatBlocks, progress: Progress) -> int:
    """Prove the spec on one block of each kind; returns the number of pairs.

    Every group of linears is seen to read one tensor. Random scales on all pairs of a block at once leave its output
    unchanged (3e-5 of the largest value, float32), and a random rotation of the residual stream goes through it where
    the spec says that its basis can change.

    Raises:
        ToolkitError: names the pair, the group or the block that is not what the spec says.
    """
    biases = tuple(step for step in blocks.passes if type(step).new_biases is not Pass.new_biases)
    blocks = replace(blocks, passes=biases, schemes=lambda index: {}, master_dtype=torch.float32)
    spec = blocks.skeleton.spec
    first = {spec.block(index): index for index in reversed(range(spec.n_blocks))}
    states = blocks.enter(TokenBatches(torch.arange(TOKENS)[None], {}), Silent())
    progress.stage("prove", len(first))
    pairs = 0
    for index in sorted(first.values()):
        try:
            pairs += _Proof(blocks, states, index, seed=0).run()
        except ToolkitError:  # rounding may send a token to another expert; what is wrong is wrong with any scales
            pairs += _Proof(blocks, states, index, seed=1).run()
        progress.advance(f"block {index}")
    return pairs


@dataclass
class _Proof:
    blocks: FloatBlocks
    states: HiddenStates
    index: int
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = self.states.batches[0].shape
        self.hidden = torch.randn(shape, generator=self.generator).to(self.states.batches[0].device)

    def run(self) -> int:
        segment = self._load()
        with trace(segment.module) as calls:
            expected = self._output(segment, self.hidden)
        self._check_inputs(segment, {call.path: call.entered for call in reversed(calls)})  # of their first calls
        self._absorb(segment, segment.spec.balance)
        if not self._same(expected, segment):
            for group in segment.spec.balance:
                segment = self._load()
                self._absorb(segment, [group])
                if not self._same(expected, segment):
                    raise self._wrong(
                        f"a scale on {group.producer} does not cancel in {', '.join(group.consumers[:4])}", "the pair"
                    )
            raise self._wrong("scales on all its pairs together do not cancel", "the pairs")
        self._check_stream(segment, expected)
        release(segment.module)
        return len(segment.spec.balance)

    def _load(self) -> Segment:
        """The block with float32 parameters, whatever the dtype of the run."""
        segment = self.blocks.load(self.index)
        self.blocks.fill(self.index, {name: master.clone() for name, master in segment.masters.items()})
        return segment

    def _absorb(self, segment: Segment, groups: Sequence[Balance]) -> None:
        for group in groups:
            weight = segment.weight(group.consumers[0])
            n = weight.shape[1] if group.heads is None else group.heads.key_value * group.heads.width
            segment.absorb(group, scales(n, self.generator).to(weight.device))
        segment.sync()

    def _same(self, expected: torch.Tensor, segment: Segment) -> bool:
        return _close(expected, self._output(segment, self.hidden))

    def _output(self, segment: Segment, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = _widened(self.states.call(hidden.shape[0], self.index))
        result = segment.module(hidden.clone(), *args, **kwargs)
        output: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
        return output.clone()

    def _check_inputs(self, segment: Segment, entered: dict[str, tuple[torch.Tensor, ...]]) -> None:
        rename = segment.architecture.module_name
        for shared in segment.spec.inputs:
            seen = [entered[rename(name)][0].flatten() for name in shared.linears if entered.get(rename(name))]
            if any(not torch.equal(x, seen[0]) for x in seen[1:]):
                raise self._wrong(f"{', '.join(shared.linears)} do not read the same tensor", "the group")

    def _check_stream(self, segment: Segment, expected: torch.Tensor) -> None:
        architecture, spec = segment.architecture, segment.spec
        if not isinstance(architecture.residual, Residual):
            return
        keep_mean = architecture.norm == "layer"
        there, back = turn(self.hidden.shape[-1], self.generator, keep_mean, self.hidden.device)
        norms = [g.producer for g in spec.balance if g.kind == "norm" and g.producer not in spec.inner_norms]
        paths = [architecture.module_name(name) for name in norms]
        modules = [segment.module.get_submodule(path) for path in paths]
        offsets = [architecture.offset(name) for name in norms]
        with rotated_norms(list(zip(modules, offsets, strict=True)), back) as functions:
            watches = [after(path, function) for path, function in zip(paths, functions, strict=True)]
            watches += [after(architecture.module_name(name), there) for name in spec.writes]
            with watching(segment.module, watches):
                found = self._output(segment, there(self.hidden))
        if not _close(there(expected), found):
            raise self._wrong("its residual stream cannot be rotated as the entry says", "what it says of the stream")

    def _wrong(self, reason: str, what: str) -> ToolkitError:
        spec = self.blocks.skeleton.spec
        return ToolkitError(
            f"{spec.prefix(self.index).rstrip('.')}: {reason}: the architecture entry '{spec.family}' does not "
            "describe this model",
            f"correct {what} in calibration/architectures/, or check that model_type in config.json is the right one; "
            "--method rtn needs neither",
        )


def _close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    return float((expected - found).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _widened(value: Any) -> Any:
    """The arguments of a call with float32 in place of narrower floats."""
    if torch.is_tensor(value):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_widened(item) for item in value)
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return value
