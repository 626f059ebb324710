"""Load a checkpoint with the thresholds that lie beside its weights: masks for scoring, sparse layers for decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from calibration.errors import unknown_value
from calibration.model.opening import locate
from ptq.runtime import load
from ptq.runtime.load import Loaded
from ptq.sparse.decoding import load_with_sites
from ptq.sparse.masks import attach_masks
from sparsity.files import load_sparsity

Sparse = Literal["masks", "decode", False]


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kernel: str | None = None,
    trust_remote_code: bool = False,
    sparse: Sparse = "masks",
    decoding: bool = False,
) -> Loaded:
    """`ptq.runtime.load.load_model`, and then what the folder says of activation sparsity; `Loaded.path` says it too.

    Args:
        dtype: None takes the checkpoint's.
        kernel: for quantized linears; for the sparse ones where they decode.
        sparse: ``masks`` prune at every position but the first of a sequence, by the dense computation; ``decode``
            skips weights while single tokens are decoded, and computes prompts densely; False ignores thresholds.
        decoding: see `ptq.runtime.load.load_model`.

    Raises:
        ToolkitError: see `ptq.runtime.load.load_model` and `sparsity.files.load_sparsity`.
    """
    if sparse not in ("masks", "decode", False):
        raise unknown_value("sparse", str(sparse), ("masks", "decode", "False"))
    folder = locate(model)
    sparsity = load_sparsity(folder) if sparse == "decode" else None
    if sparsity is not None:
        width = dtype or load.stored_dtype(folder, trust_remote_code)
        return load_with_sites(folder, sparsity.sites, width, torch.device(device), kernel, trust_remote_code)[0]
    loaded = load.load_model(
        folder, dtype=dtype, device=device, kernel=kernel, trust_remote_code=trust_remote_code, decoding=decoding
    )
    return attach_masks(loaded)[0] if sparse == "masks" else loaded
