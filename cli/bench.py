"""``ptq bench``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Device, Inputs, Model, TrustRemoteCode, quiet_libraries

if TYPE_CHECKING:
    from ptq.runtime.bench import Speed

PROMPT = (
    "The river rises in the hills above the town and runs north through a narrow valley, where three mills once stood. "
    "In the summer of 1846 a flood carried away the oldest of them, and"
)


def bench(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode, greedily; at least 3.", min=3)] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each; the fastest step counts.", min=1)] = 5,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, bfloat16 or float16.")] = "auto",
    kernel: Annotated[str | None, typer.Option(help="Sparse kernel; default: the fastest that can run.")] = None,
    inputs: Inputs = "int15",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how fast MODEL decodes: dense, and sparse beside the bound from the bytes it skips."""
    quiet_libraries()
    import torch

    from calibration.model.opening import load_tokenizer, locate
    from calibration.text.encoding import prompt_ids
    from ptq.devices import parse_dtype, resolve_device
    from ptq.runtime.bench import measure_speed
    from ptq.runtime.decoding.stepper import check_inputs, steps_text
    from ptq.runtime.generate import decode_tokens, read_bandwidth
    from ptq.runtime.load import load_model
    from ptq.sparse.decoding import load_with_sites
    from sparsity.files import load_sparsity

    folder, where = locate(model), resolve_device(device)
    width = torch.bfloat16 if dtype == "auto" else parse_dtype(dtype)
    sparsity = load_sparsity(folder)
    ids = prompt_ids(load_tokenizer(folder, trust_remote_code), prompt).to(where)
    peak = read_bandwidth() if where.type == "cpu" else None
    machine = f"{torch.get_num_threads()} threads" + ("" if peak is None else f", read bandwidth {peak / 1e9:.1f} GB/s")
    print(f"{ids.shape[1]} tokens of prompt, {new_tokens} decoded, fastest step of {repeats} runs; {machine}")

    def show(name: str, speed: Speed, read: float, rest: str = "") -> None:
        share = "" if peak is None else f", {read * speed.tokens_per_second / peak:.0%} of bandwidth"
        share += f", steps {steps_text(speed.one_call, inputs)}"  # type: ignore[arg-type]
        print(f"{name:<22}{speed.tokens_per_second:7.2f} tokens/s  {read / 1e6:9.2f} MB/token{share}{rest}")

    loaded = load_model(folder, dtype=width, device=where, trust_remote_code=trust_remote_code, decoding=True)
    check_inputs(loaded.model, inputs)
    (dense,) = measure_speed(loaded.model, ids, new_tokens, repeats, inputs=inputs)  # type: ignore[arg-type]
    show(f"dense ({loaded.path})", dense, dense.weight_bytes)
    if sparsity is None:
        return
    del loaded
    sparse, decoder = load_with_sites(folder, sparsity.sites, width, where, kernel, trust_remote_code)
    decoder.phase.counting = True
    decode_tokens(sparse.model, ids, new_tokens)
    decoder.phase.counting = False
    settings = [lambda masked=masked: setattr(decoder.phase, "masked", masked) for masked in (False, True)]
    own, speed = measure_speed(sparse.model, ids, new_tokens, repeats, settings, inputs)  # type: ignore[arg-type]
    show("dense, same kernels", own, own.weight_bytes)
    read = own.weight_bytes - decoder.bytes_skipped(new_tokens - 1)
    gain = speed.tokens_per_second / max(own.tokens_per_second, dense.tokens_per_second)
    bound = own.weight_bytes / read
    show("sparse", speed, read, f"; {gain:.2f} x the faster dense, bound {bound:.2f}: {_share(gain, bound)}")
    print(f"[{sparsity.method}, target {sparsity.target:g}: kernels {decoder.path}]")
    for path, reason in list(decoder.masked_only.items())[:3]:
        print(f"[{path}: pruned, but its weight is read whole: {reason}; {len(decoder.masked_only)} such linears]")


def _share(gain: float, bound: float) -> str:
    return f"{(gain - 1) / (bound - 1):.0%} of its gain" if bound > 1 else "nothing is skipped"
