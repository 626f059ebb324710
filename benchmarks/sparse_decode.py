"""Decoding speed of one model under every sparsity method, thresholds set to a target on its own activations.

    python benchmarks/sparse_decode.py MODEL [--methods cats chess chess+qo scap teal] [--target 0.5] [--new-tokens 32]

For speed only: MODEL may be random (benchmarks/random_llama.py) or quantized. Thresholds are quantiles of what each
site sees on a few tokens of the dense model; the sparsity reached is counted on the decoded tokens that are timed.
Every method is measured by turns with the same kernels reading every row; the fastest step of each counts. "x dense"
is the ratio of the two, "x one call" that to the dense model as `ptq generate` decodes it. "bound" is bytes read dense
over bytes read sparse (embedding look-up, attention cache and activations left out); "share" is (x dense - 1) /
(bound - 1).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from calibration.architectures import ArchitectureSpec
from calibration.model.opening import open_model
from ptq.runtime.bench import Speed, measure_speed
from ptq.runtime.generate import decode_tokens, read_bandwidth
from ptq.runtime.load import load_model
from ptq.sparse.decoding import load_with_sites
from sparsity.attach import decode_modes
from sparsity.sites import Mode, Site

METHODS: dict[str, tuple[tuple[str, Mode], ...]] = {
    "cats": (("gate", "output"),),
    "chess": (("gate", "output"),),
    "chess+qo": (("gate", "output"), ("q_proj", "input"), ("o_proj", "input")),
    "scap": (("gate", "input"), ("up", "input"), ("down", "input")),
    "teal": (("", "input"),),
}
"""Which linears are pruned: part of their path, and how. chess has a threshold per channel."""


def chosen(method: str, architecture: ArchitectureSpec) -> list[tuple[str, Mode]]:
    """(path of a linear, mode) of every site."""
    paths = list(decode_modes(architecture, ()))
    return [(path, mode) for part, mode in METHODS[method] for path in paths if part in path]


def site_values(model: Any, architecture: ArchitectureSpec, ids: torch.Tensor) -> dict[tuple[str, Mode], torch.Tensor]:
    """(path, mode) -> sizes of what is pruned there ``[tokens, n]``, on the tokens of ``ids``."""
    seen: dict[tuple[str, Mode], torch.Tensor] = {}
    handles = []
    for path in decode_modes(architecture, ()):

        def inputs(module: Any, args: Any, path: str = path) -> None:
            seen[path, "input"] = args[0].detach().float().abs()[0]

        handles.append(model.get_submodule(path).register_forward_pre_hook(inputs))
    for index in range(architecture.n_blocks):
        prefix = architecture.prefix(index)
        for network in architecture.block(index).feed_forward:
            gate = prefix + architecture.module_name(str(network.gate))

            def outputs(module: Any, args: Any, y: torch.Tensor, path: str = gate) -> None:
                seen[path, "output"] = y.detach().float().abs()[0]

            handles.append(model.get_submodule(prefix + network.nonlinearity).register_forward_hook(outputs))
    with torch.inference_mode():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def sites_for(method: str, architecture: ArchitectureSpec, values: dict, target: float) -> tuple[Site, ...]:
    sites = []
    for path, mode in chosen(method, architecture):
        sizes = values[path, mode]
        if method.startswith("chess") and mode == "output":
            threshold = sizes.quantile(target, dim=0)
        else:
            threshold = sizes.flatten()[: 2**23].quantile(target)[None]
        sites.append(Site(path, mode, threshold.float().contiguous()))
    return tuple(sites)


def row(name: str, speed: Speed, read: float, peak: float, *rest: str) -> str:
    share = f"{read * speed.tokens_per_second / peak:.0%}"
    return f"| {name} | {speed.tokens_per_second:.2f} | {read / 1e6:.0f} | {share} | {' | '.join(rest)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.bfloat16
    reader, config, architecture = open_model(args.model)
    reader.close()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, args.prompt_tokens), generator=generator)
    loaded = load_model(args.model, dtype=dtype, decoding=True)
    more = decode_tokens(loaded.model, ids, 8)[0]
    values = site_values(loaded.model, architecture, torch.cat((ids, torch.tensor([more])), dim=1))
    peak = read_bandwidth()
    print(
        f"{torch.get_num_threads()} threads, read bandwidth {peak / 1e9:.1f} GB/s, {args.prompt_tokens} + "
        f"{args.new_tokens} tokens, fastest step of {args.repeats} runs\n"
    )
    (plain,) = measure_speed(loaded.model, ids, args.new_tokens, args.repeats)
    columns = ("decoding", "tokens/s", "MB/token", "of bandwidth", "same kernels dense", "x dense", "bound", "share")
    print(f"| {' | '.join(columns)} | x one call |")
    print("| --- |" + " ---: |" * 8)
    name = f"dense, one call per step ({loaded.path})"
    print(row(name, plain, plain.weight_bytes, peak, "", "", "", "", "1.00"), flush=True)
    del loaded
    for method in args.methods:
        sites = sites_for(method, architecture, values, args.target)
        sparse, decoder = load_with_sites(args.model, sites, dtype, device)
        decoder.phase.counting = True
        decode_tokens(sparse.model, ids, args.new_tokens)
        decoder.phase.counting = False
        settings = [lambda m=m, phase=decoder.phase: setattr(phase, "masked", m) for m in (False, True)]
        dense, speed = measure_speed(sparse.model, ids, args.new_tokens, args.repeats, settings)
        read = dense.weight_bytes - decoder.bytes_skipped(args.new_tokens - 1)
        gain, bound = speed.tokens_per_second / dense.tokens_per_second, dense.weight_bytes / read
        ratios = f"{gain:.2f}", f"{bound:.2f}", f"{(gain - 1) / (bound - 1):.0%}"
        to_dense = f"{speed.tokens_per_second / plain.tokens_per_second:.2f}"
        print(row(method, speed, read, peak, f"{dense.tokens_per_second:.2f}", *ratios, to_dense), flush=True)
        del sparse, decoder


if __name__ == "__main__":
    main()
