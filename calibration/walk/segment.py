"""`Segment`: one decoder block as the passes see it, with float32 master weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from calibration.architectures.spec import ArchitectureSpec, Balance, BlockSpec
from calibration.errors import ToolkitError
from calibration.walk.masters import Masters


class Replacement(Protocol):
    """What a rounding pass puts in place of a weight. This package knows no more of it."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight a user will run, ``[out, in]``."""


@dataclass
class Segment:
    """One block between load and commit.

    All names are block-relative names of the checkpoint. ``masters`` hold every parameter in float32 (float64 in
    exactness tests); the module holds copies in the dtype of the forward pass, refreshed by `sync`. Weights are
    ``[out, in]`` here also where the file stores them transposed (Conv1D).

    Attributes:
        index: of the block; ``prefix`` is its path in the checkpoint.
        schemes: linear -> scheme (of a type this package does not know); linears that stay float are absent.
        quantized: linear -> result of the rounding pass.
        parts: linear -> tensors that a user's runtime needs beside the codes, by name (low-rank factors, static input
            scales); committed and exported with the linear.
        gates: tensors of activation thresholds, by the names they have in a file of their own; committed beside the
            block, not with its weights.
        grids: linear -> the grid on which rounding must put its weight as it now is (of a type this package does not
            know). A weight that changes loses its grid.
        errors: linear -> ``{"weight": ..., "output": ...}`` relative errors, filled by the rounding pass.
        notes: linear -> numbers worth recording, ``{"awq.alpha": 0.45}``.
        edits: counts changes that are not exact; statistics gathered before such a change are stale.
        originals: parameters as they were before their first change that was not exact, float32; kept only where
            ``keep_originals``, for passes that compare what is left with what was.
    """

    index: int
    prefix: str
    spec: BlockSpec
    architecture: ArchitectureSpec
    module: nn.Module
    masters: Masters
    stored_dtypes: dict[str, torch.dtype]
    schemes: dict[str, Any]
    quantized: dict[str, Replacement] = field(default_factory=dict)
    parts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    gates: dict[str, torch.Tensor] = field(default_factory=dict)
    grids: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, dict[str, float | str]] = field(default_factory=dict)
    edits: int = 0
    keep_originals: bool = False
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    _stale: set[str] = field(default_factory=set)

    def weight(self, linear: str) -> torch.Tensor:
        """The master weight ``[out, in]`` (a view: edit it through `set_weight`)."""
        w = self.masters[f"{linear}.weight"]
        return w.T if self.architecture.conv1d and w.ndim == 2 else w

    def stored_weight(self, linear: str) -> torch.Tensor:
        """The values of `weight`, in bfloat16 or float16 where it is stored so and was not read before (to look at)."""
        w = self.masters.exact(f"{linear}.weight")
        return w.T if self.architecture.conv1d and w.ndim == 2 else w

    def set_weight(self, linear: str, w: torch.Tensor, exact: bool = False) -> None:
        """Replace a weight ``[out, in]``. ``exact`` edits leave the block's function, and so statistics, unchanged."""
        if not exact:
            self._keep(f"{linear}.weight")
        self.weight(linear).copy_(w)
        self._touch(f"{linear}.weight", exact)

    def set_weight_later(self, linear: str, make: Callable[[], torch.Tensor]) -> None:
        """`set_weight` to what ``make`` gives, ``[out, in]`` in the dtype of masters, when somebody reads it."""
        name, turned = f"{linear}.weight", self.architecture.conv1d
        self._keep(name)
        self.masters.overwrite(name, (lambda: make().T.contiguous()) if turned else make)
        self._touch(name, exact=False)

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Replace a parameter, in the layout of the file, as part of an exact edit of the block."""
        self.masters[name].copy_(value)
        self._touch(name, exact=True)

    def transform_input(self, linear: str) -> None:
        """From now on the runtime transforms the input of ``linear``, see `BlockSpec.with_transformed_inputs`."""
        self.spec = self.spec.with_transformed_inputs((linear,))

    def gain(self, norm: str) -> torch.Tensor:
        """What a norm multiplies by, ``[channels]``."""
        return self._gain(self.masters[f"{norm}.weight"], self.architecture.offset(norm)).clone()

    def remove_gain(self, norm: str) -> None:
        """Let a norm multiply by one; the caller moves its gain elsewhere."""
        name = f"{norm}.weight"
        self.replace(name, torch.full_like(self.masters[name], 1.0 - self.architecture.offset(norm)))

    def original(self, linear: str) -> torch.Tensor:
        """The weight ``[out, in]`` before it was rounded (a view)."""
        name = f"{linear}.weight"
        assert self.keep_originals, "originals are kept for passes that repair"
        w = self.originals.get(name, self.masters[name])
        return w.T if self.architecture.conv1d and w.ndim == 2 else w

    def norms(self) -> list[str]:
        """Parameters of the norms on the residual stream: gains, and biases of LayerNorm. Their modules hang directly
        in the block; norms of queries and keys lie inside the attention."""
        linears = {*self.spec.linears, *self.spec.routers}
        leaves = [name.rpartition(".") for name, master in self.masters.items() if master.ndim == 1]
        return [f"{m}.{leaf}" for m, _, leaf in leaves if "." not in m and m not in linears]

    def set_vector(self, name: str, value: torch.Tensor, exact: bool = False) -> None:
        """Replace a gain or a bias. It is stored in float32 from then on: small steps would be lost in less. ``exact``
        edits leave the block's function unchanged."""
        if not exact:
            self._keep(name)
        self.masters[name].copy_(value)
        self.stored_dtypes[name] = torch.float32
        self._touch(name, exact)

    def _keep(self, name: str) -> None:
        if self.keep_originals and name not in self.originals:
            self.originals[name] = self.masters[name].clone()

    def _touch(self, name: str, exact: bool) -> None:
        self._stale.add(name)
        self.grids.pop(name.removesuffix(".weight"), None)
        self.edits += not exact

    def note(self, linear: str, **values: float | str) -> None:
        self.notes.setdefault(linear, {}).update(values)

    def full_name(self, name: str) -> str:
        return self.prefix + name

    def module_path(self, name: str) -> str:
        """Where a linear of the block is in the model class, from the root."""
        return self.prefix + self.architecture.module_name(name)

    def absorb(self, group: Balance, s: torch.Tensor) -> torch.Tensor:
        """Divide the producer by ``s`` and multiply the consumers' input columns by it; the function is unchanged.

        Args:
            s: positive, ``[channels of the producer]``: input width of the consumers, or for ``value`` groups
                ``[key/value heads * head width]``.

        Returns:
            The factors that the consumers' inputs were divided by, ``[in]``. A norm's gain is rounded to its stored
            dtype first and s is taken from the rounded gain, so that saving the norm does not undo exactness.
        """
        if not bool(torch.isfinite(s).all() and (s > 0).all()):
            raise ToolkitError(
                f"{self.full_name(group.producer)}: scales are not finite and positive",
                "check the checkpoint and the calibration text for NaN or Inf",
            )
        if group.kind == "norm":
            s = self._divide_norm(group.producer, s)
        else:
            self._divide_rows(group, s)
            if group.heads is not None:
                s = group.heads.spread(s)
        for consumer in group.consumers:
            self.weight(consumer).mul_(s)
            self._touch(f"{consumer}.weight", exact=True)
        return s

    def _divide_norm(self, norm: str, s: torch.Tensor) -> torch.Tensor:
        name = f"{norm}.weight"
        stored = self.masters[name]
        offset = self.architecture.offset(norm)
        gain = self._gain(stored, offset).clone()
        rounded = (gain / s - offset).to(self.stored_dtypes[name]).to(stored.dtype)
        kept = (gain == 0) | (self._gain(rounded, offset) == 0)  # a dead channel carries nothing: leave it alone
        stored.copy_(torch.where(kept, stored, rounded))
        effective = torch.where(kept, 1.0, gain / self._gain(stored, offset))
        self._touch(name, exact=True)
        bias = self.masters.get(f"{norm}.bias")
        if bias is not None:
            bias.div_(effective)
            self._touch(f"{norm}.bias", exact=True)
        return effective

    @staticmethod
    def _gain(stored: torch.Tensor, offset: float) -> torch.Tensor:
        """What the norm multiplies by. Norms that store g - 1 add the 1 in float32, whatever the model's dtype."""
        return (stored.float() + offset).to(stored.dtype) if offset else stored

    def _divide_rows(self, group: Balance, s: torch.Tensor) -> None:
        rows = slice(*group.rows) if group.rows else slice(None)
        self.weight(group.producer)[rows].div_(s[:, None])
        self._touch(f"{group.producer}.weight", exact=True)
        bias = self.masters.get(f"{group.producer}.bias")
        if bias is not None:
            bias[rows].div_(s)
            self._touch(f"{group.producer}.bias", exact=True)

    def sync(self) -> None:
        """Bring edited parameters into the module, in the dtype of the forward pass."""
        for name in self._stale:
            path, _, leaf = self.architecture.module_name(name).rpartition(".")
            target = getattr(self.module.get_submodule(path), leaf).data
            if target.data_ptr() != self.masters[name].data_ptr():
                target.copy_(self.masters[name])
        self._stale.clear()
