"""What Runtime Smooth does to quantized inputs, apart from everything else: weights of 8 bits, inputs of 4.

    python benchmarks/stress_model.py MODEL stress
    python benchmarks/runtime_smooth.py MODEL stress --eval TEXT [--max-windows N]

Every checkpoint is rounded to w8a16 by every of ``--methods``; its inputs are then quantized by each of ``--grids``:
``token``, or Runtime Smooth as schemes spell it (``rs128``; ``n`` without reordering, ``b64`` with maxima over 64
tokens), at all linears or at some: ``rs32/norm+o`` leaves down to ``token``. Rows of a site have the relative error of
outputs, ||(Q(x) - x) Wᵀ||² / ||x Wᵀ||² in per cent, mean over the linears behind norms ("norm"), o or down, on the same
x for all grids. "shuffled" is ``rs1`` with its scales given to channels at random: where it costs as much, the scales
tell nothing of the channels. "spread" is their root mean square over their mean (1: flat, smoothing changes nothing).
The row "perplexity" has all inputs on the grid. "leak": KL divergence in nats, mean over tokens, between predictions of
the first half of a window before its own second half and before that of another window; causal grids have 0. Then
perplexity of the first half before either.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

import ptq
from calibration.model.opening import load_tokenizer
from calibration.scoring.perplexity import EncodedText, score
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.encoding import encode_text
from ptq.activations import ActivationQuant, RuntimeSmooth
from ptq.evaluation import logits_of
from ptq.numerics.activations import fake_quantize_inputs
from ptq.numerics.hadamard import hadamard_transform
from ptq.numerics.smooth import smoothing_scales
from ptq.quantized import QuantizedTensor
from ptq.runtime.linear import QuantLinear
from ptq.runtime.load import Loaded, load_model
from ptq.scheme import parse_scheme

CPU = torch.device("cpu")
GRIDS = "token,rs1,rs32,rs128,rs128n,rs128b64,rs128b128,rs128nb64,rs32/norm+o,rs128/norm+o"
SITES = {"o_proj": "o", "down_proj": "down"}  # of linears that no norm feeds
MEASURED = ("spread", "shuffled")
Table = dict[tuple[str, str], list[float]]
"""(site, grid) -> one number per linear."""


def site_of(path: str) -> str:
    return SITES.get(path.rpartition(".")[2], "norm")


def input_grid(name: str, site: str) -> ActivationQuant:
    """The grid that a name of ``--grids`` means at a site."""
    grid, _, sites = name.partition("/")
    plain = grid == "token" or (sites and site not in sites.split("+"))
    scheme = parse_scheme("w8a4" if plain else f"w8a4-{grid}")
    assert scheme.inputs is not None
    return scheme.inputs


def with_inputs(q: QuantizedTensor, grid: ActivationQuant | None, bias: torch.Tensor | None) -> QuantLinear:
    q = dataclasses.replace(q, scheme=dataclasses.replace(q.scheme, inputs=grid))
    return QuantLinear(q, bias, torch.float32, CPU, "reference")


class Compared(torch.nn.Module):
    """A linear that also runs on quantized copies of its input, and remembers how far their outputs are off."""

    def __init__(self, q: QuantizedTensor, site: str, grids: Sequence[str], errors: Table) -> None:
        super().__init__()
        self.exact, self.site, self.errors, self.block = with_inputs(q, None, None), site, errors, q.hadamard
        self.weight = q.dequantize(torch.float32)
        self.grids = {name: input_grid(name, site) for name in grids}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.exact(x)
        x = x if self.block is None else hadamard_transform(x, self.block)
        scales = smoothing_scales(x.float(), RuntimeSmooth(group=1))
        shuffled = scales[..., torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(0))]
        copies = {name: fake_quantize_inputs(x, grid) for name, grid in self.grids.items()}
        copies["shuffled"] = fake_quantize_inputs(x / shuffled, input_grid("token", self.site)) * shuffled
        for name, copy in copies.items():
            error = (copy @ self.weight.T - y).square().sum() / y.square().sum()
            self.errors[self.site, name].append(100 * float(error))
        self.errors[self.site, "spread"].append(float((scales.square().mean(-1).sqrt() / scales.mean(-1)).mean()))
        return y


def output_errors(folder: Path, grids: Sequence[str], windows: torch.Tensor) -> Table:
    """Relative errors of all linears on int64 ``windows [n, L]``, averaged by site."""
    errors: Table = defaultdict(list)

    def build(path: str, q: QuantizedTensor, bias: torch.Tensor | None) -> Compared:
        assert bias is None, "this benchmark is for linears without biases"
        return Compared(q, site_of(path), grids, errors)

    model = load_model(folder, dtype=torch.float32, build=build).model
    for window in windows:
        model(window[None], use_cache=False)
    return errors


def on_grid(folder: Path, grid: str) -> Loaded:
    def build(path: str, q: QuantizedTensor, bias: torch.Tensor | None) -> QuantLinear:
        return with_inputs(q, input_grid(grid, site_of(path)), bias)

    return load_model(folder, dtype=torch.float32, build=build)


def perplexity(folder: Path, grid: str, text: EncodedText, scoring: Scoring) -> float:
    return score(logits_of(on_grid(folder, grid), CPU), text, scoring).perplexity


def leak(folder: Path, grid: str, windows: torch.Tensor) -> tuple[float, float, float]:
    """KL divergence between predictions of the first halves of ``windows [n, L]`` before their own second halves and
    before those of the window in front, and perplexity of the first halves before either."""
    model, half = on_grid(folder, grid).model, windows.shape[1] // 2
    kl, losses = [], ([], [])
    others = torch.cat([windows[:, :half], windows.roll(1, 0)[:, half:]], dim=1)  # of one shape: rounding is the same
    for pair in zip(windows, others, strict=True):
        own, other = (model(w[None], use_cache=False).logits[0, :half].log_softmax(-1) for w in pair)
        kl.append((own.exp() * (own - other)).sum(-1).mean())
        for logits, found in zip((own, other), losses, strict=True):
            found.append(torch.nn.functional.nll_loss(logits[:-1], pair[0][1:half]))
    before_own, before_other = (float(torch.stack(found).mean().exp()) for found in losses)
    return float(torch.stack(kl).mean()), before_own, before_other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--eval", help="text to score", required=True)
    parser.add_argument("--grids", default=GRIDS)
    parser.add_argument("--methods", default="rtn,rotate+rtn")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    parser.add_argument("--error-windows", type=int, default=8, help="of the first table")
    args = parser.parse_args()
    grids = args.grids.split(",")
    text = encode_text(load_corpus(args.eval, "score"), load_tokenizer(args.models[0]))
    scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")
    windows = text.ids[: args.error_windows * args.seq_len].view(args.error_windows, -1)
    print(f"window {args.seq_len}, float32, weights of 8 bits, inputs of 4", flush=True)
    columns = [*MEASURED, *grids]
    for head in (("model", "site", *columns), ("---", "---", *["---:"] * len(columns))):
        print("| " + " | ".join(head) + " |")
    with tempfile.TemporaryDirectory() as temporary:
        for number, model in enumerate(args.models):
            for method in args.methods.split(","):
                out, name = Path(temporary) / f"{number}{method}", f"{model.name}, {method}"
                ptq.quantize(model, out=out, method=method, scheme="w8a16-gchannel", format="native", dtype="float32")
                errors = output_errors(out, grids, windows)
                for site in ("norm", "o", "down"):
                    means = [torch.tensor(errors[site, column]).mean() for column in columns]
                    print(f"| {name} | {site} | " + " | ".join(f"{float(m):.3f}" for m in means) + " |", flush=True)
                found = [perplexity(out, grid, text, scoring) for grid in grids]
                print(f"| {name} | perplexity | | | " + " | ".join(f"{p:.2f}" for p in found) + " |", flush=True)
                leaks = [leak(out, grid, windows) for grid in grids]
                print(f"| {name} | leak | | | " + " | ".join(f"{k:.4f}: {a:.2f}, {b:.2f}" for k, a, b in leaks) + " |")


if __name__ == "__main__":
    main()
