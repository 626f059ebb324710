"""`DequantizedCheckpoint`: the float weights that a quantized checkpoint stands for, one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader, TensorSource
from calibration.model.headers import TensorInfo
from ptq.formats.adapter import read_adapter
from ptq.formats.reading import quantized_linears, read_linear
from ptq.formats.registry import format_of, stored_names
from ptq.runtime.load import checkpoint_dtype


class DequantizedCheckpoint:
    """A quantized checkpoint with the tensor names, shapes and dtype of the float model; see `float_weights`.

    What the runtime does to inputs (static or dynamic activation scales) is not part of a weight and not seen.

    Raises:
        ToolkitError: the weights expect inputs in another basis.
    """

    def __init__(self, reader: CheckpointReader, spec: ArchitectureSpec) -> None:
        quantized = quantized_linears(reader)
        assert quantized is not None, "a float checkpoint needs no dequantizing"
        fmt, self._schemes = quantized
        turned = [name for name in reader.infos if name.endswith(".hadamard")]
        if turned:
            raise ToolkitError(
                f"{turned[0]}: the model transforms this linear's input while it runs; its weight is no float one",
                "quantize with online = false for rotate in a recipe",
            )
        self._reader, self._format = reader, fmt
        self._adapter = read_adapter(reader.folder)
        self._dtype = checkpoint_dtype(reader, spec)
        self._transposed = f"{spec.blocks}." if spec.conv1d else None
        taken = {full for name in self._schemes for full in stored_names(fmt, name).values()}
        infos = {name: info for name, info in reader.infos.items() if name not in taken}
        for name, (_, (rows, columns)) in self._schemes.items():
            shape = (columns, rows) if self._is_transposed(name) else (rows, columns)
            infos[f"{name}.weight"] = TensorInfo(self._dtype, shape, "")
        self._infos = infos

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor, or a weight made of its codes and low-rank parts."""
        linear = name.removesuffix(".weight")
        if not name.endswith(".weight") or linear not in self._schemes:
            return self._reader.tensor(name)
        scheme, shape = self._schemes[linear]
        q = read_linear(self._reader, self._format, linear, scheme, shape)
        if linear in self._adapter:
            q = dataclasses.replace(q, parts={**q.parts, **self._adapter[linear]})
        weight = q.dequantize(self._dtype)
        return weight.T.contiguous() if self._is_transposed(name) else weight

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Rows of a tensor by their numbers, rising; no others are read where it is stored as it is."""
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and linear in self._schemes:
            return self.tensor(name)[indices]
        return self._reader.rows(name, indices)

    def _is_transposed(self, name: str) -> bool:
        return self._transposed is not None and name.startswith(self._transposed)

    def close(self) -> None:
        self._reader.close()


def float_weights(reader: CheckpointReader, spec: ArchitectureSpec) -> TensorSource:
    """The checkpoint itself where it is float, else its dequantized view."""
    return reader if format_of(reader.config) is None else DequantizedCheckpoint(reader, spec)
