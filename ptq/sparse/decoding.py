"""Sparse layers for decoding, in a model that is loaded with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ptq.quantized import QuantizedTensor
    from ptq.runtime.load import LinearFactory, Loaded
    from sparsity.attach import SparseDecoder
    from sparsity.decode import Phase
    from sparsity.sites import Mode, Site


def load_with_sites(
    folder: Path,
    sites: tuple[Site, ...],
    dtype: torch.dtype,
    device: torch.device,
    kernel: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Loaded, SparseDecoder]:
    """A float or quantized model that decodes sparsely at ``sites``; without any, with the same kernels densely.

    Raises:
        ToolkitError: sites that do not belong to this model, and those of `load_model`.
    """
    from dataclasses import replace

    from calibration.model.opening import open_model
    from ptq.runtime.load import load_model
    from sparsity.attach import attach, decode_modes
    from sparsity.decode import Phase

    reader, _, architecture = open_model(folder, trust_remote_code)
    reader.close()
    sites = tuple(
        replace(
            site,
            threshold=site.threshold.to(device),
            center=None if site.center is None else site.center.to(device),
            shift=None if site.shift is None else site.shift.to(device),
        )
        for site in sites
    )
    phase, modes = Phase(), decode_modes(architecture, sites)
    loaded = load_model(
        folder,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        build=int4_layers(modes, phase, dtype, device, kernel),
        decoding=True,
    )
    decoder = attach(loaded.model, architecture, sites, phase, kernel)
    return replace(loaded, decoding=f"{decoder.path} decoding sparsely"), decoder


def int4_layers(
    modes: dict[str, Mode], phase: Phase, dtype: torch.dtype, device: torch.device, kernel: str | None
) -> LinearFactory:
    """Builds `DecodeLinear` in the layout that serves dense and sparse decoding, from what `fits_int4_rows`."""
    from sparsity.decode import DecodeLinear
    from sparsity.kernels.int4 import Int4Rows

    def build(path: str, q: QuantizedTensor, bias: torch.Tensor | None) -> DecodeLinear | None:
        if path not in modes or not fits_int4_rows(q):
            return None
        weights = q.scheme.weights
        # symmetric grids have the zero 2^(bits-1): moved to 8, so that no zeros are stored
        codes = q.codes if q.zero is not None else q.codes + (8 - 2 ** (weights.bits - 1))
        zero = None if q.zero is None else q.zero.to(device)
        rows = Int4Rows.pack(codes.to(device), q.scale.to(device), zero, modes[path])
        return DecodeLinear(rows, modes[path], None if bias is None else bias.to(device), dtype, phase, kernel)

    return build


def fits_int4_rows(q: QuantizedTensor) -> bool:
    """Whether a weight is integer codes of up to four bits and nothing else: groups of columns in their order, scales
    exact in bfloat16 (other tools' float16 scales need not be), inputs in the model's dtype."""
    import torch

    from sparsity.kernels.int4 import int4_problem

    weights = q.scheme.weights
    if weights.float_format is not None or weights.superblocks or weights.bits > 4:
        return False
    if weights.grouping.axis != "in" or q.parts:
        return False
    if weights.float_zeros:
        return False
    if q.group_index is not None or q.scheme.inputs is not None or q.scale.shape[0] != q.shape[0]:
        return False
    exact = torch.equal(q.scale.to(torch.bfloat16).to(q.scale.dtype), q.scale)
    return exact and int4_problem(q.shape[1], q.shape[1] // q.scale.shape[1]) is None
