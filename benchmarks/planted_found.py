"""Whether the analysis finds the channels that `stress_model.py` planted, and no others.

    python benchmarks/planted_found.py MODEL STRESS [--dataset TEXT] [--samples 16] [--seq-len 512]

STRESS computes what MODEL computes, so a channel was planted where its mean |x| grew. Found are the channels that stand
out by the rule of the advice. A planted channel can be missed: one that the model hardly uses is still small after it
was multiplied.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from calibration.model.opening import forward_dtype, locate, open_model
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from calibration.text.samples import model_tokens
from ptq.analysis.observe import Findings, Subject, observe
from ptq.planning.source import default_dataset

GROWTH = 5.0
INPUTS = ("attention input", "mlp input", "down input")


def findings(folder: Path, tokens: TokenBatches) -> Findings:
    reader, config, spec = open_model(folder)
    device = torch.device("cpu")
    dtype = forward_dtype(next(iter(reader.infos.values())).dtype, device)
    return observe(Subject(reader, config, spec, dtype, device), tokens, str, Silent())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("stress")
    parser.add_argument("--dataset")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    folder = locate(args.model)
    _, config, spec = open_model(folder)
    dataset = args.dataset or default_dataset(folder)
    tokens = model_tokens(folder, config, dataset, args.samples, args.seq_len, 0, False)
    plain, stressed = findings(folder, tokens), findings(locate(args.stress), tokens)
    print("| input | planted | found | missed | their size over the median | found, not planted | of them as before |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    before = {(s.block, s.role): set(s.standout) for s in plain.sites}
    for role in INPUTS:
        counts, missed = [0] * 5, []
        for site in (s for s in stressed.sites if s.role == role):
            name = f"{spec.prefix(site.block)}{role.replace(' ', '_')}.abs_mean"
            mean = stressed.ranges[name]
            planted = set((mean > GROWTH * plain.ranges[name]).nonzero().flatten().tolist())
            found = set(site.standout)
            missed += [f"{float(mean[c] / mean.median()):.1f}" for c in sorted(planted - found)]
            extra = found - planted
            natural = extra & before[site.block, role]
            found_planted = planted & found
            for i, part in enumerate((planted, found_planted, planted - found, extra, natural)):
                counts[i] += len(part)
        cells = [role, *map(str, counts[:3]), ", ".join(missed), *map(str, counts[3:])]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
