"""What rounding one linear alone costs, as gradients say it in several ways, beside what it costs.

    python benchmarks/probes.py MODEL --dataset CALIBRATION --eval TEXT --linears 0.self_attn.q_proj,11.mlp.down_proj

Linears are spread over the model where none are named. Each is rounded to nearest alone, and the divergence is measured
on windows of ``--eval``; the gradients are those of labels drawn from the model on calibration windows. With
g_t the gradient at the output of the linear at token t, e_t the error there, and D = sum_t g_t x_t^T, per window and
position:

* ``window``: 1/2 (sum_t g_t . e_t)^2, the Fisher matrix itself, one sample of it per window;
* ``window, rows``: 1/2 sum_r (sum_t g_tr e_tr)^2, errors of different outputs taken to be uncorrelated;
* ``moments``: 1/2 sum_r s_r dW_r (sum D^T D) dW_r^T, what `ptq fit` uses;
* ``tokens``: 1/2 sum_tr g_tr^2 e_tr^2, errors of different tokens taken to be uncorrelated as well;
* ``rows``: 1/2 sum_r (sum_t g_tr^2) E_r, with the mean squared error E_r of an output on calibration's Gram matrix.

The whole model is in memory, and the gradients of one window.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.model.opening import load_tokenizer
from calibration.text.corpora import load_corpus
from calibration.text.encoding import encode_text
from calibration.text.samples import model_tokens
from calibration.walk.backward import WeightGradients
from calibration.walk.token_weights import weights_by_norm
from ptq.numerics.grids import fake_quantize
from ptq.numerics.objective import output_energies
from ptq.scheme import parse_scheme
from ptq.study.ranks import spearman

WAYS = ("window", "window, rows", "moments", "tokens", "rows")

Changes = dict[tuple[str, str], torch.Tensor]
"""By linear and scheme, Q(W) - W ``[out, in]``."""


@torch.no_grad()
def measured(network: PreTrainedModel, changes: Changes, ids: torch.Tensor) -> dict[tuple[str, str], float]:
    """Mean KL(float || one linear changed), nats per token."""
    log_p = network(ids, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    p, found = log_p.exp(), {}
    for (name, scheme), change in changes.items():
        weight = network.get_submodule(name).weight
        kept = weight.data
        weight.data = kept + change
        other = network(ids, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        weight.data = kept
        found[name, scheme] = float((p * (log_p - other)).sum(-1).mean())
    return found


def expected(network: PreTrainedModel, changes: Changes, ids: torch.Tensor) -> dict[str, dict[tuple[str, str], float]]:
    """By way of saying it, nats per token."""
    names = list(dict.fromkeys(name for name, _ in changes))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = args[0].detach()[0], output

        return hook

    network.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())
    for name in names:
        network.get_submodule(name).register_forward_hook(keep(name))
    generator = torch.Generator().manual_seed(0)
    scale = 1 / (2 * len(ids) * (ids.shape[1] - 1))
    found: dict[str, dict[tuple[str, str], float]] = {way: defaultdict(float) for way in WAYS}
    moments = {name: WeightGradients(*change.shape, change.device) for (name, _), change in changes.items()}
    squares: dict[str, torch.Tensor | float] = defaultdict(float)
    output_errors: dict[tuple[str, str], torch.Tensor | float] = defaultdict(float)
    for window in ids.split(1):
        log_p = network(window, use_cache=False).logits[0, :-1].log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (-log_p.gather(1, labels)).sum().backward()
        for name, (x, output) in seen.items():
            moments[name].update(x, output.grad[0])
            squares[name] += output.grad[0].square().sum(0)
        for (name, scheme), change in changes.items():
            x, g = seen[name][0], seen[name][1].grad[0]
            errors = x @ change.T
            rows = (g * errors).sum(0)
            found["window"][name, scheme] += scale * float(rows.sum()) ** 2
            found["window, rows"][name, scheme] += scale * float(rows.square().sum())
            found["tokens"][name, scheme] += scale * float((g.square() * errors.square()).sum())
            output_errors[name, scheme] += (errors.square() * weights_by_norm(x)[:, None]).mean(0) / len(ids)
    for (name, scheme), change in changes.items():
        m = moments[name]
        found["moments"][name, scheme] = scale * float(m.rows @ output_energies(change, m.columns) / m.rows.sum())
        found["rows"][name, scheme] = scale * float(squares[name] @ output_errors[name, scheme])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="text on which divergence is measured")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4, help="of --eval")
    parser.add_argument("--linears", help="BLOCK.NAME, with commas; default: 15 spread over blocks and roles")
    parser.add_argument("--schemes", default="w2a16-g64-sym,w3a16-g64-sym,w4a16-g64-sym")
    args = parser.parse_args()

    network = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    text = encode_text(load_corpus(args.eval, "score"), load_tokenizer(Path(args.model))).ids.flatten()
    scored = text[: args.windows * args.seq_len].view(args.windows, args.seq_len)
    folder = Path(args.model)
    tokens = model_tokens(folder, network.config, args.dataset, args.samples, args.seq_len, 0, False).input_ids
    linears = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in f".{n}"]
    count = min(15, len(linears))
    names = [linears[i * len(linears) // count + i * (len(linears) // count) // count] for i in range(count)]
    if args.linears:
        names = [next(n for n in linears if n.endswith(f"layers.{end}")) for end in args.linears.split(",")]
    schemes = args.schemes.split(",")
    print(f"{len(names)} of {len(linears)} linears, {tokens.numel()} tokens")
    weights = {name: network.get_submodule(name).weight.data for name in names}
    changes = {(n, s): fake_quantize(w, parse_scheme(s).weights) - w for n, w in weights.items() for s in schemes}
    true = measured(network, changes, scored)
    found = expected(network, changes, tokens)
    print("| | scheme | rank correlation | expected over measured, median | standard deviation of its logarithm |")
    print("| --- | --- | ---: | ---: | ---: |")
    for way in WAYS:
        for scheme in schemes:
            pairs = [(found[way][n, scheme], true[n, scheme]) for n in names]
            logs = [math.log(a / b) for a, b in pairs]
            ranks = spearman(*map(list, zip(*pairs, strict=True)))
            print(f"| {way} | {scheme} | {ranks:.2f} | {math.exp(statistics.median(logs)):.2f} "
                  f"| {statistics.stdev(logs):.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
