"""The architecture table's vocabulary: which linears share an input, and where a channel scale can be absorbed.

A method never tests for Llama or OPT; it reads these groups. Names are those of the checkpoint files, relative to a
decoder block (``self_attn.q_proj``, ``block_sparse_moe.experts.3.w1``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

NormKind = Literal["rms", "rms_plus_one", "layer"]


@dataclass(frozen=True)
class SharedInput:
    """Linears that read the same tensor, and so share one Gram matrix.

    ``stage`` orders them by execution: everything of a lower stage has run before (q/k/v: 0, o: 1, gate/up: 2,
    down: 3). Parallel blocks have their MLP input in stage 0 as well.
    """

    linears: tuple[str, ...]
    stage: int
    expert: int | None = None


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and the width of one head."""

    query: int
    key_value: int
    width: int

    @property
    def repeats(self) -> int:
        """Query heads that share one key/value head."""
        return self.query // self.key_value

    def spread(self, channels: torch.Tensor) -> torch.Tensor:
        """Numbers per value channel ``[key/value heads * width]`` for the channels that the output projection reads,
        ``[query heads * width]``."""
        return channels.view(self.key_value, 1, self.width).expand(-1, self.repeats, -1).reshape(-1)


@dataclass(frozen=True)
class Balance:
    """A place where ``producer(x) / s`` and ``consumers(s * x)`` cancel exactly.

    Attributes:
        producer: a norm (``kind == "norm"``) or a linear.
        consumers: *every* linear and router that reads the producer's output.
        kind: ``norm``: s divides gain and bias. ``linear``: s divides rows and bias of the producer (elementwise
            products and ReLU commute with s > 0). ``value``: the producer makes attention values, so a scale per
            value channel reaches the consumer once per query head that shares the key/value head.
        rows: first and last row of a fused producer that feed the consumers, None for all.
        heads: only for ``value``.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "linear", "value"]
    rows: tuple[int, int] | None = None
    heads: Heads | None = None


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where ``gate`` is None.

    Attributes:
        up, down, gate: linears. Where ``gate`` and ``up`` are one fused linear both name it.
        activation: transformers' name of the nonlinearity, e.g. ``silu``.
        nonlinearity: path of its module below the block, in the model class.
        expert: index of the expert, None in dense blocks.
    """

    up: str
    down: str
    activation: str
    nonlinearity: str
    gate: str | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Residual:
    """What lies around the residual stream outside the blocks, by full checkpoint names without ``.weight``.

    Attributes:
        embeddings: tables whose rows are added to the stream; the first is that of the tokens.
        final_norm: between the last block and the head.
        head: the output projection; a checkpoint with tied weights does not store it.
    """

    embeddings: tuple[str, ...]
    final_norm: str
    head: str = "lm_head"


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block.

    Attributes:
        inputs: every linear of the block, grouped by shared input, in execution order.
        balance: where scales can be absorbed.
        writes: linears whose output is added to the residual stream.
        routers: linears that choose experts; never quantized, but they read balanced inputs.
        scores: linears that make queries and keys. Softmax lies behind them, so the error of their own output is a
            poor guide for fine choices such as clipping.
        unbalanced: reasons why a usual pair is absent, for the plan.
        feed_forward: its feed-forward network, or those of its experts.
        inner_norms: norms in ``balance`` that do not read the residual stream.
        kept: further modules with matrices, which stay as they are: convolutions, linears that are never called.
    """

    inputs: tuple[SharedInput, ...]
    balance: tuple[Balance, ...]
    writes: tuple[str, ...]
    routers: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    unbalanced: tuple[str, ...] = ()
    feed_forward: tuple[FeedForward, ...] = ()
    inner_norms: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for shared in self.inputs for name in shared.linears)

    def with_transformed_inputs(self, linears: Collection[str]) -> BlockSpec:
        """The block when the runtime transforms the inputs of ``linears``: their columns are no longer channels of what
        makes them, so no producer can take their scales."""
        kept = tuple(group for group in self.balance if set(linears).isdisjoint(group.consumers))
        return replace(self, balance=kept)

    def shared_input(self, linear: str) -> SharedInput:
        """The group that ``linear`` belongs to."""
        return next(shared for shared in self.inputs if linear in shared.linears)


@dataclass(frozen=True)
class Experts:
    """Where a block keeps its experts, which transformers stores as fused 3-D parameters.

    Attributes:
        module: path of the experts module inside a block of the model class, e.g. ``mlp.experts``.
        gate, up, down: names of one expert's linears in the checkpoint.
        count: experts per layer.
        hidden, intermediate: widths.
        activation: transformers' name of the activation between gate and product.
    """

    module: str
    gate: str
    up: str
    down: str
    count: int
    hidden: int
    intermediate: int
    activation: str


@dataclass(frozen=True)
class ArchitectureSpec:
    """One model family, resolved for one config.

    Attributes:
        family: ``model_type`` of the config.
        blocks: path of the list of decoder blocks, in the checkpoint and in the model class.
        n_blocks: how many there are.
        norm: how a gain is stored: ``rms`` and ``layer`` store g, ``rms_plus_one`` stores g - 1.
        block: index -> `BlockSpec`.
        renames: (prefix in the checkpoint, prefix in the model class), relative to a block.
        root_renames: the same for names outside the blocks (GPT-NeoX calls its head ``embed_out`` on disk).
        tuple_output: the block returns a tuple whose first element is the hidden state.
        conv1d: linears are GPT-2's Conv1D, whose weight is stored ``[in, out]``.
        experts: index -> `Experts`, or None for a dense block.
        residual: what lies around the residual stream, where its basis can be changed exactly: every norm reads the
            stream and feeds linears only. Else the reason why not.
        bias_switches: entry of ``config.json`` -> the block's linears whose biases it switches on.
        attention: implementation used to run calibration; ``sdpa`` where the family supports it.
        derived: found by `derive`, not written by hand: names are those of the model class.
        other_linears: full names of linears that no block's spec names: those of vision towers, and what blocks keep.
        offsets: norm -> what it adds to its stored gain, for norms that differ from ``norm`` in that.
    """

    family: str
    blocks: str
    n_blocks: int
    norm: NormKind
    block: Callable[[int], BlockSpec]
    renames: tuple[tuple[str, str], ...] = ()
    root_renames: tuple[tuple[str, str], ...] = ()
    tuple_output: bool = False
    conv1d: bool = False
    experts: Callable[[int], Experts | None] = field(default=lambda index: None)
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    residual: Residual | str = "the architecture table names nothing around its residual stream"
    attention: Literal["sdpa", "eager"] = "sdpa"
    derived: bool = False
    other_linears: tuple[str, ...] = ()
    offsets: Mapping[str, float] = field(default_factory=dict)

    def offset(self, norm: str) -> float:
        """What a norm adds to its stored gain."""
        return self.offsets.get(norm, 1.0 if self.norm == "rms_plus_one" else 0.0)

    def prefix(self, index: int) -> str:
        """``model.layers.7.``"""
        return f"{self.blocks}.{index}."

    def block_of(self, name: str) -> int | None:
        """Index of the block that a full checkpoint name belongs to; None outside the blocks, and in further layers
        that the model class does not have (multi-token prediction)."""
        if not name.startswith(self.blocks + "."):
            return None
        index = name[len(self.blocks) + 1 :].partition(".")[0]
        return int(index) if index.isdigit() and int(index) < self.n_blocks else None

    @property
    def base_prefix(self) -> str:
        """First component of the path of the blocks; some checkpoints leave it out."""
        return self.blocks.split(".")[0] + "."

    def module_name(self, name: str) -> str:
        """Block-relative checkpoint name -> block-relative name in the model class."""
        for stored, module in self.renames:
            if name.startswith(stored):
                return module + name[len(stored) :]
        return name

    def root_module_name(self, name: str) -> str:
        """The same for a full name, inside or outside the blocks."""
        if name.startswith(self.blocks + "."):
            index, _, rest = name[len(self.blocks) + 1 :].partition(".")
            return f"{self.blocks}.{index}.{self.module_name(rest)}"
        for stored, module in self.root_renames:
            if name.startswith(stored):
                return module + name[len(stored) :]
        return name


def described(spec: ArchitectureSpec) -> str:
    """How much was found, per kind of block: ``4 inputs, 4 pairs``."""
    kinds = dict.fromkeys(spec.block(i) for i in range(spec.n_blocks))
    return "; ".join(f"{len({s.stage for s in k.inputs})} inputs, {len(k.balance)} pairs" for k in kinds)


Family = Callable[[Any], ArchitectureSpec]
"""transformers config -> spec."""
