"""``ptq generate``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Device, Model, TrustRemoteCode, quiet_libraries


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, bfloat16 or float16.")] = "auto",
    kernel: Annotated[
        str | None, typer.Option(help="Kernel for quantized linears; default: the fastest that can run.")
    ] = None,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="Also measure the machine's read bandwidth and the share reached.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt with MODEL, float or quantized, and say how fast it was."""
    quiet_libraries()
    import sys

    import torch

    from calibration.model.opening import load_tokenizer
    from ptq.devices import parse_dtype, resolve_device
    from ptq.runtime.generate import generate as run
    from ptq.runtime.generate import read_bandwidth
    from ptq.sparse.decoding import load_decoder

    where = resolve_device(device)
    width = torch.bfloat16 if dtype == "auto" else parse_dtype(dtype)
    loaded, sparse = load_decoder(model, dtype=width, device=where, kernel=kernel, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(loaded.folder, trust_remote_code)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    show(prompt)
    result = run(
        loaded.model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stream=show
    )
    speed = result.decode_tokens_per_second
    print()
    linears = loaded.path if sparse is None else f"{sparse.path} decoding sparsely"
    print(
        f"[{result.new_tokens} tokens, {0 if speed is None else speed:.1f} tokens/s, first after "
        f"{result.prefill_seconds:.2f} s; linears: {linears}; {result.weight_bytes_read_per_token / 1e6:.1f} MB of "
        f"weights per token; peak memory {result.peak_rss_bytes / 1e9:.2f} GB]"
    )
    if bandwidth:
        peak = read_bandwidth()
        share = result.bandwidth_share(peak)
        print(f"[read bandwidth {peak / 1e9:.1f} GB/s, share reached {0 if share is None else share:.0%}]")
