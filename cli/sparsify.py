"""``ptq sparsify``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Device, Model, Out, Overwrite, TrustRemoteCode, quiet_libraries


def sparsify(
    model: Model,
    method: Annotated[str, typer.Option(help="cats, chess, chess-qo (also inputs of q and o), scap, teal, fatrelu.")],
    out: Out,
    target: Annotated[
        str, typer.Option(help="Share pruned at every site, 0.5; or by name for scap and teal: down_proj=0.6,*=0.4.")
    ] = "0.5",
    dataset: Annotated[str | None, typer.Option(help="Calibration text, as for `ptq quantize`.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens per window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of calibration forwards: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find activation thresholds for MODEL, float or quantized, and write them beside a copy of its weights.

    Examples:

      ptq sparsify demo --method chess --target 0.5 --out demo-chess

      ptq eval demo-chess --reference demo --dataset builtin
    """
    quiet_libraries()
    from calibration.errors import ToolkitError, unknown_value
    from cli.progress import TerminalProgress
    from cli.sparse import sparsifiers
    from cli.sparse_run import SparsifyOptions, run_sparsify
    from sparsity.methods import METHODS

    methods = sparsifiers(target)
    if method not in METHODS:
        raise unknown_value("--method", method, METHODS)
    if method not in methods:
        raise ToolkitError(f"--target {target}: '{method}' prunes one kind of site", "pass one share, --target 0.5")
    options = SparsifyOptions(dataset, samples, seq_len, seed, device, dtype, trust_remote_code)
    with TerminalProgress() as progress:
        sparsity = run_sparsify(model, methods[method](), out, options, overwrite, progress)
    print(f"{sparsity.method}: {len(sparsity.sites)} sites, written to {out}")
