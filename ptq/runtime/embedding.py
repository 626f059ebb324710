"""`QuantEmbedding`: a token embedding that keeps its codes and dequantizes the rows that are looked up."""

from __future__ import annotations

from typing import Any

import torch

from calibration.model.skeleton import set_submodule
from ptq.quantized import QuantizedTensor
from ptq.runtime.kernels.kernel import KernelQuery
from ptq.runtime.kernels.reference import REFERENCE, dequantize_rows
from ptq.runtime.linear import QuantLinear


class QuantEmbedding(torch.nn.Module):
    """``ids [...] -> rows [..., width]`` of ``W [vocabulary, width]`` in one dtype.

    Attributes:
        scheme: text of the scheme.
        embed_scale: by which rows are multiplied (Gemma), or None.
    """

    def __init__(
        self, q: QuantizedTensor, dtype: torch.dtype, device: torch.device, embed_scale: float | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = q.shape
        self.scheme, self._dtype = str(q.scheme), dtype
        self._query = KernelQuery.of(q.scheme, q.shape, dtype, device.type, q.group_index is not None)
        self.embed_scale = embed_scale
        for name, tensor in REFERENCE.pack(q, dtype, device).items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows in the dtype given at the start."""
        packed = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        rows = dequantize_rows(packed, ids.reshape(-1), self._query, self._dtype).view(*ids.shape, self.embedding_dim)
        if self.embed_scale is None:
            return rows
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype, device=rows.device)  # rounded first, as there

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


def is_embedding(network: Any, path: str) -> bool:
    """Whether this module of a transformers model is its token embedding."""
    return any(module is network.get_input_embeddings() for name, module in network.named_modules() if name == path)


def quantize_embedding(
    network: Any,
    path: str,
    q: QuantizedTensor,
    dtype: torch.dtype,
    device: torch.device,
    tied: bool,
    kernel: str | None = None,
) -> None:
    """Put a `QuantEmbedding` in the place of the token embedding, and a `QuantLinear` of the same codes into the head
    where the two are tied; ``kernel`` is the head's."""
    # the number, not the buffer of the same name, which transformers leaves without values until all is loaded
    scale = getattr(network.get_submodule(path), "scalar_embed_scale", None)
    set_submodule(network, path, QuantEmbedding(q, dtype, device, scale))
    if tied:
        head = network.get_output_embeddings()
        name = next(name for name, module in network.named_modules() if module is head)
        set_submodule(network, name, QuantLinear(q, None, dtype, device, kernel))
