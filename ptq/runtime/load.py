"""Load a checkpoint, float or in any of our formats, into a transformers model that runs from its integer codes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.model.gguf import said
from calibration.model.opening import locate, open_model
from calibration.model.skeleton import build_model, check_placed, load_parameters, places, set_submodule
from calibration.shown import Shown
from ptq.formats.adapter import read_adapter
from ptq.formats.reading import quantized_linears, read_linear
from ptq.formats.registry import format_of, stored_names
from ptq.quantized import CACHE_STEPS, QuantizedTensor
from ptq.runtime.attention import cache_layers, quantize_cache
from ptq.runtime.embedding import is_embedding, quantize_embedding
from ptq.runtime.kernels.dispatch import check_kernel
from ptq.runtime.kernels.kernel import KernelQuery
from ptq.runtime.kernels.rows import ROWS
from ptq.runtime.linear import QuantLinear
from ptq.scheme import QuantScheme

LinearFactory = Callable[[str, QuantizedTensor, torch.Tensor | None], torch.nn.Module | None]
"""(path in the model class, weight, bias) -> the layer that runs it; None leaves it to `QuantLinear`."""


@dataclass(frozen=True, repr=False)
class Loaded(Shown):
    """A model ready to run.

    Attributes:
        model: a transformers causal language model; quantized linears are `QuantLinear`.
        folder: where it came from, for its tokenizer.
        format: name of the quantized format, or None for a float checkpoint.
        kernels: kernel name -> number of linears that run on it.
        reasons: why faster kernels were not taken: (kernel, reason) -> number of linears.
        activations: how linears with quantized inputs run: ``"simulated"``, or the kernel that multiplies codes ->
            number of linears.
        caches: texts of the grids of the KV cache, e.g. ``kv4``.
        masks: what prunes activations in every forward pass: ``teal 0.5, masks on all positions but the first``.
        decoding: the linears that skip weights while decoding, e.g. ``native x 42 decoding sparsely``.
    """

    model: Any
    folder: Path
    format: str | None
    kernels: dict[str, int]
    reasons: dict[tuple[str, str], int]
    activations: dict[str, int] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    masks: str = ""
    decoding: str = ""

    def facts(self) -> Mapping[str, object]:
        weights = sum(p.numel() for p in self.model.parameters())
        slower = {f"not {kernel} ({n} linears)": reason for (kernel, reason), n in self.reasons.items()}
        return {
            "model": type(self.model).__name__,
            "from": self.folder.name,
            "format": self.format or "float",
            "linears": self.path,
            "parameters in float": f"{weights:,}",
            **slower,
        }

    @property
    def path(self) -> str:
        """How linears are computed: ``float``, ``int4 x 42``, or ``reference x 42; inputs simulated x 42; kv4
        simulated``; and what prunes activations."""
        kernels = ", ".join(f"{name} x {n}" for name, n in sorted(self.kernels.items()))
        inputs = ", ".join(f"inputs {how} x {n}" for how, n in sorted(self.activations.items()))
        linears = [kernels, self.decoding] if kernels or self.decoding else ["float"]
        caches = (f"{cache} simulated" for cache in self.caches)
        return "; ".join(filter(None, [*linears, inputs, *caches, self.masks]))


def checkpoint_dtype(reader: CheckpointReader, spec: ArchitectureSpec) -> torch.dtype:
    """The dtype a checkpoint was made in: that of its first float linear, else (all are quantized) the config's.

    Scales tell nothing of it: AWQ and GPTQ files have float16 ones, and our own bfloat16, whatever the model's dtype.
    """
    weights = [f"{spec.prefix(0)}{name}.weight" for name in spec.block(0).linears]
    stored = [reader.infos[name].dtype for name in weights if name in reader.infos]
    stored = [dtype for dtype in stored if dtype.is_floating_point and dtype.itemsize > 1]  # not W8A8 or FP8 codes
    if stored:
        return stored[0]
    named = str(reader.config.get("dtype") or reader.config.get("torch_dtype")).removeprefix("torch.")
    norms = (i.dtype for n, i in reader.infos.items() if n.startswith(spec.prefix(0)) and n.endswith(".weight"))
    found = getattr(torch, named, None)
    return found if isinstance(found, torch.dtype) else next(norms, torch.float32)


def stored_dtype(folder: Path, trust_remote_code: bool = False) -> torch.dtype:
    """`checkpoint_dtype` of a folder."""
    reader, _, spec = open_model(folder, trust_remote_code, coded=True)
    with reader:
        return checkpoint_dtype(reader, spec)


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    kernel: str | None = None,
    trust_remote_code: bool = False,
    build: LinearFactory | None = None,
    decoding: bool = False,
) -> Loaded:
    """Load a checkpoint folder, ``demo`` or a hub id. Quantized linears keep their codes; nothing is dequantized.

    Dense: thresholds in the folder are for `ptq.sparse.loading.load_model`, which is the public one.

    Args:
        dtype: of activations and of what is not quantized; None takes the checkpoint's.
        kernel: name of the kernel for all quantized linears; None takes the fastest that can run each.
        build: makes other layers than `QuantLinear` where it wants to.
        decoding: where no kernel is named, linears take the one that is made for single tokens, if it can run them.

    Raises:
        ToolkitError: broken or unknown checkpoint, a foreign quantization, tensors that are missing or do not fit.
    """
    check_kernel(kernel)
    folder, device = locate(model), torch.device(device)
    reader, config, spec = open_model(folder, trust_remote_code, coded=True)
    with reader:
        fmt, schemes = quantized_linears(reader) or (None, {})
        reader.computed = dtype = dtype or checkpoint_dtype(reader, spec)
        network = build_model(config, spec, dtype, device)
        stored = {spec.root_module_name(name) for name in (*schemes, *reader.infos)}
        placed = _place(network, reader, spec, schemes, dtype, device, _tied(network, stored), kernel, build, decoding)
        if fmt is None:
            check_placed(reader.infos, network, spec)
        known = places(network)  # a tied head has its name too
        plain = {}
        for name in reader.infos:
            target = spec.root_module_name(name)
            if name not in placed.taken and target in known:
                tensor = reader.tensor(name)
                plain[target] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        load_parameters(network, plain)
    # as in from_pretrained: head and embedding that are both stored and differ are not tied, whatever the config says
    absent = {n for n, p in network.named_parameters(remove_duplicate=False) if p.is_meta}
    if placed.tie:
        network.tie_weights(missing_keys=absent, recompute_mapping=False)
    missing = [n for n, p in network.named_parameters() if p.is_meta]
    if missing:
        raise ToolkitError(
            f"{said(folder)}: no tensor for {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}",
            "the checkpoint is incomplete: fetch or write it again",
        )
    network.eval().requires_grad_(False)
    return Loaded(
        network,
        folder,
        fmt.name if fmt else None,
        dict(placed.kernels),
        dict(placed.reasons),
        dict(placed.activations),
        _exchange_cache(network, spec, schemes, placed),
    )


def fill_model(network: Any, folder: Path, tied: bool) -> None:
    """Put the quantized modules of a checkpoint into a transformers model whose other parameters are loaded.

    Args:
        tied: the head has no tensors of its own.

    Raises:
        ToolkitError: as in `load_model`.
    """
    reader, _, spec = open_model(folder)
    with reader:
        found = quantized_linears(reader)
        assert found is not None, "a quantizer was asked for"
        schemes = found[1]
        placed = _place(network, reader, spec, schemes, network.dtype, network.device, tied)
    _exchange_cache(network, spec, schemes, placed)


@dataclass
class _Placed:
    """What `_place` put into a model: counts as in `Loaded`, blocks whose keys are transformed, names of tensors that
    are used up, and whether the rest is still to be tied."""

    kernels: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    activations: Counter[str] = field(default_factory=Counter)
    turned: dict[int, int] = field(default_factory=dict)
    cache_steps: dict[int, list[torch.Tensor | None]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    tie: bool = True


def _place(
    network: Any,
    reader: CheckpointReader,
    spec: ArchitectureSpec,
    schemes: Mapping[str, tuple[QuantScheme, tuple[int, int]]],
    dtype: torch.dtype,
    device: torch.device,
    tied: bool,
    kernel: str | None = None,
    build: LinearFactory | None = None,
    decoding: bool = False,
) -> _Placed:
    """A layer with codes in the place of every quantized linear, and of the embedding."""
    placed, adapter, fmt = _Placed(), read_adapter(reader.folder), format_of(reader.config)
    for name, (scheme, shape) in schemes.items():
        assert fmt is not None
        q = read_linear(reader, fmt, name, scheme, shape)
        if name in adapter:
            q = dataclasses.replace(q, parts={**q.parts, **adapter[name]})
        if "key_hadamard" in q.parts:
            placed.turned[_layer(spec, name)] = int(q.parts["key_hadamard"])
        for i, part in enumerate(CACHE_STEPS):
            if part in q.parts:
                placed.cache_steps.setdefault(_layer(spec, name), [None, None])[i] = q.parts[part].to(device)
        placed.taken |= {*stored_names(fmt, name).values(), f"{name}.bias"}
        bias = reader.tensor(f"{name}.bias") if f"{name}.bias" in reader.infos else None
        path = spec.root_module_name(name + ".").removesuffix(".")
        chosen = decoding_kernel(q, dtype, device) if decoding else None
        if is_embedding(network, path):
            quantize_embedding(network, path, q, dtype, device, tied, chosen)
            placed.tie = False
            continue
        layer = None if build is None else build(path, q, bias)
        if layer is None:
            layer = linear = QuantLinear(q, bias, dtype, device, kernel or chosen)
            placed.kernels[linear.kernel] += 1
            placed.activations.update([linear.activations] if linear.activations else [])
            placed.reasons.update((k, r) for k, r in linear.reasons.items())
        _replace(network, path, layer, name)
    return placed


def decoding_kernel(q: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """The kernel that is made for single tokens, if it can run this weight."""
    query = KernelQuery.of(q.scheme, q.shape, dtype, device.type, q.group_index is not None)
    return ROWS.name if ROWS.refusal(query) is None else None


def _layer(spec: ArchitectureSpec, name: str) -> int:
    """The decoder layer of a tensor."""
    return int(name[len(spec.blocks) + 1 :].split(".")[0])


def _exchange_cache(
    network: Any,
    spec: ArchitectureSpec,
    schemes: Mapping[str, tuple[QuantScheme, tuple[int, int]]],
    placed: _Placed,
) -> tuple[str, ...]:
    """Attention with a quantized cache where schemes say so; the texts of its grids."""
    layers = cache_layers(spec, {name: scheme for name, (scheme, _) in schemes.items()})
    if layers:
        quantize_cache(network, layers, placed.turned, placed.cache_steps)
    return tuple(sorted({str(cache) for cache in layers.values()}))


def _tied(network: Any, stored: set[str]) -> bool:
    """Whether the head has no tensors of its own in the checkpoint."""
    heads = {target.removesuffix(".weight") for target in network.all_tied_weights_keys}
    return bool(heads) and not any(name.removesuffix(".weight") in heads for name in stored)


def _replace(network: Any, path: str, linear: torch.nn.Module, name: str) -> None:
    try:
        network.get_submodule(path)
    except AttributeError:
        raise ToolkitError(
            f"{name}: the model class has no such linear", "config.json and weights do not fit"
        ) from None
    set_submodule(network, path, linear)
