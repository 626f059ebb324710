"""`QuantLinear`: one class for every quantized linear of every model family."""

from __future__ import annotations

from collections.abc import Callable

import torch

from calibration.errors import ToolkitError
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.hadamard import hadamard_transform
from ptq.quantized import INPUT_GRID, LORA, QuantizedTensor
from ptq.runtime.kernels.dispatch import refusals, select
from ptq.runtime.kernels.kernel import KernelQuery


class QuantLinear(torch.nn.Module):
    """``x [..., in] -> x Wᵀ + bias [..., out]`` in the dtype of x, from one copy of the integer codes.

    Where the weight expects a Hadamard transform of its input (rotation R4), x goes through it first.

    Where the scheme quantizes inputs, x is quantized first: by the kernel where it multiplies integers, else as
    `fake_quantize_inputs` does ("simulated"), which is also what calibration runs.

    A low-rank part W += (b * scale) a runs beside the kernel, ``y += ((x aᵀ) * scale) bᵀ``, on the same x.

    W is ``[out, in]`` whatever the layer it replaces stored, so it stands for ``nn.Linear``, GPT-2's ``Conv1D`` and
    Falcon's ``FalconLinear`` alike. It keeps the codes in the layout of its kernel and never a float weight; the
    reference kernel makes one for the length of a call.

    The tensors are buffers that move with ``.to(device)`` but never change dtype: a cast scale would no longer fit
    its kernel. They are absent from ``state_dict``, because a kernel's layout may depend on the machine.

    Attributes:
        in_features, out_features: of W.
        kernel: name of the kernel that runs.
        reasons: kernel name to the reason why it was not taken, for every faster kernel.
        scheme: text of the scheme, e.g. ``w4a16-g128-sym``.
        activations: ``""`` where inputs are not quantized, ``"simulated"``, or the kernel that multiplies their codes.
    """

    def __init__(
        self,
        q: QuantizedTensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        kernel: str | None = None,
    ) -> None:
        """Pack ``q`` for activations of ``dtype`` on ``device``.

        Args:
            bias: ``[out]``, stored in ``dtype``.
            kernel: name of the kernel to use; None takes the fastest that can run.

        Raises:
            ToolkitError: ``kernel`` is unknown or cannot run this layer.
        """
        super().__init__()
        device = torch.device(device)
        self._query = KernelQuery.of(q.scheme, q.shape, dtype, device.type, q.group_index is not None)
        self._kernel = select(self._query, kernel)
        self.out_features, self.in_features = q.shape
        self.kernel = self._kernel.name
        self.reasons = refusals(self._query, self._kernel)
        self.scheme = str(q.scheme)
        self._inputs = q.scheme.inputs
        self._by_sequence = self._inputs is not None and self._inputs.smooth is not None
        self._simulated = self._inputs is not None and not self._kernel.integer
        self.activations = "" if self._inputs is None else "simulated" if self._simulated else self._kernel.name
        for name in INPUT_GRID:
            if name in q.parts:
                self.register_buffer(name, q.parts[name].float().to(device), persistent=False)
        for name, tensor in self._kernel.pack(q, dtype, device).items():
            self.register_buffer(name, tensor, persistent=False)
        if bias is not None:
            self.register_buffer("bias", bias.detach().to(device=device, dtype=dtype), persistent=False)
        self._hadamard = q.hadamard
        self._low_rank = q.low_rank is not None
        for name, tensor in zip(LORA, q.low_rank or (), strict=False):
            kept = tensor if name == "lora_scale" else tensor.to(dtype)  # int8 codes are exact in bfloat16
            self.register_buffer(name, kept.to(device), persistent=False)

    @property
    def plain(self) -> bool:
        """Whether x Wᵀ + bias is all there is: no transform in front, no grid of inputs, no low-rank part."""
        return self._hadamard is None and self._inputs is None and not self._low_rank

    @property
    def weight_bytes(self) -> int:
        """Bytes of every tensor of this layer: codes, scales, zeros, orders and bias. All are read for each token."""
        return sum(t.nbytes for t in self._buffers.values() if t is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` to ``[..., out]``, same dtype.

        Raises:
            ToolkitError: x has another dtype than the kernel's tensors were packed for.
        """
        query = self._query
        if x.dtype is not query.dtype and not self._kernel.any_dtype:
            wanted, got = (str(dtype).removeprefix("torch.") for dtype in (query.dtype, x.dtype))
            raise ToolkitError(
                f"{self}: packed for {wanted} activations, got {got}",
                f"load the model with dtype {got}, or with the 'reference' kernel, instead of casting it",
            )
        if self._hadamard is not None:
            x = hadamard_transform(x, self._hadamard)
        if self._simulated:
            x = self._quantized(x)
        # the buffers are the kernel's dict as they are: no attribute look-ups on the way of a token
        rows = x.reshape(-1, query.in_features).contiguous()
        if self._kernel.integer and self._by_sequence and x.ndim > 2:
            y = torch.cat([self._kernel.run(part, self._buffers, query) for part in rows.split(x.shape[-2])])  # type: ignore[arg-type]
        else:
            y = self._kernel.run(rows, self._buffers, query)  # type: ignore[arg-type]
        if self._low_rank:
            seen = rows if self._inputs is None or self._simulated else self._quantized(x).reshape(rows.shape)
            y = y + self._correction(seen)
        return y.view(*x.shape[:-1], query.out_features)

    def _quantized(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` after quantization and back; Runtime Smooth needs sequences on axis -2."""
        assert self._inputs is not None
        scale, zero = (self._buffers.get(name) for name in INPUT_GRID)
        return fake_quantize_inputs(torch.atleast_2d(x), self._inputs, scale, zero).view(x.shape)

    def _correction(self, x: torch.Tensor) -> torch.Tensor:
        """``((x aᵀ) * scale) bᵀ`` for ``x [tokens, in]``; the scale is applied in float32."""
        b, a, scale = (self.get_buffer(name) for name in LORA)
        weights = ((x @ a.to(x.dtype).T).float() * scale).to(x.dtype)
        return weights @ b.to(x.dtype).T

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Every ``.to``, ``.cuda``, ``.float`` and so on comes through here: follow the device, not the dtype.

        Raises:
            ToolkitError: the layout is bound to the kind of device it was packed for.
        """

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.device.type != tensor.device.type and not self._kernel.any_device:
                raise ToolkitError(
                    f"{self}: packed for {tensor.device.type}, cannot move to {moved.device.type}",
                    f"load the model with device '{moved.device.type}' instead of moving it",
                )
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def extra_repr(self) -> str:
        bias = self._buffers.get("bias") is not None
        return f"in={self.in_features}, out={self.out_features}, bias={bias}, {self.scheme}, kernel={self.kernel}"
