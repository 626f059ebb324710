"""``ptq generate``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Dense, Device, Inputs, Model, TrustRemoteCode, quiet_libraries


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
    dense: Dense = False,
    inputs: Inputs = "int15",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt with MODEL, float or quantized, and say how fast it was."""
    quiet_libraries()
    import sys

    import ptq

    waiting = prompt  # shown with the first piece, once the model is there

    def show(text: str) -> None:
        nonlocal waiting
        sys.stdout.write(waiting + text)
        sys.stdout.flush()
        waiting = ""

    result = ptq.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        kernel=kernel,
        sparse=not dense,
        trust_remote_code=trust_remote_code,
        stream=show,
        inputs=inputs,  # type: ignore[arg-type]
    )
    show("")
    speed = result.decode_tokens_per_second
    print()
    print(
        f"[{result.new_tokens} tokens, {0 if speed is None else speed:.1f} tokens/s, first after "
        f"{result.prefill_seconds:.2f} s; linears: {result.linears}; "
        f"steps: {result.steps}; "
        f"{result.weight_bytes_read_per_token / 1e6:.1f} MB of weights per token; "
        f"peak memory {result.peak_rss_bytes / 1e9:.2f} GB]"
    )
    if bandwidth:
        from ptq.runtime.generate import read_bandwidth

        peak = read_bandwidth()
        share = result.bandwidth_share(peak)
        print(f"[read bandwidth {peak / 1e9:.1f} GB/s, share reached {0 if share is None else share:.0%}]")
