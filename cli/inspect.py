"""``ptq inspect``"""

from __future__ import annotations

from cli.options import Device, Model, TrustRemoteCode, quiet_libraries


def inspect(model: Model, device: Device = "auto", trust_remote_code: TrustRemoteCode = False) -> None:
    """Show what MODEL is: architecture, linears and their groups; for quantized ones schemes and kernels."""
    quiet_libraries()
    from rich.console import Console

    import ptq

    console = Console()
    for line in ptq.inspect(model, device=device, trust_remote_code=trust_remote_code).lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
