"""Methods side by side on one model, text, window and seed: perplexity, KL, bits, size, seconds, peak memory.

    python benchmarks/table.py demo
    python benchmarks/table.py MODEL --dataset train.txt --eval test.txt --seq-len 512 --json table.json

Every setting is a `ptq quantize` in a process of its own, so that its memory is its own. Then all results are scored
against the float model in one process, on the same windows in float32, with the float model's logits computed once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from calibration.model.opening import load_tokenizer, locate
from calibration.record import Evaluation, read_record, read_timings
from calibration.scoring.perplexity import LogitsModel, score
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.encoding import EncodedText, encode_text
from ptq.evaluation import logits_of
from ptq.planning.source import default_dataset
from ptq.runtime.load import load_model

CPU = torch.device("cpu")


def remembered(logits: LogitsModel) -> LogitsModel:
    """The same function, computing each batch once (the windows of a small model's test text fit in memory)."""
    known: dict[bytes, torch.Tensor] = {}

    def lookup(ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in known:
            known[key] = logits(ids)
        return known[key]

    return lookup


@dataclasses.dataclass(frozen=True)
class Bench:
    """One model and one text: quantizes in processes of their own, scores in this one."""

    model: str
    calibration: tuple[str, ...]
    text: EncodedText
    scoring: Scoring
    reference: LogitsModel
    base: Evaluation
    kernel: str | None = None

    @staticmethod
    def of(args: argparse.Namespace, kernel: str | None = None) -> Bench:
        """From the arguments of `add_arguments`; ``kernel`` runs the quantized models, None is the fastest."""
        folder = locate(args.model)
        corpus = load_corpus(args.eval or default_dataset(folder), "score")
        text = encode_text(corpus, load_tokenizer(folder))
        scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")
        reference = remembered(logits_of(load_model(folder, dtype=torch.float32), CPU))
        base = score(reference, text, scoring)
        print(f"float perplexity {base.perplexity:.4f}, {base.protocol.tokens_scored} tokens", file=sys.stderr)
        calibration = ("--samples", str(args.samples), "--seq-len", str(args.seq_len))
        calibration += ("--dataset", args.dataset) if args.dataset else ()
        calibration += ("--dtype", args.dtype) if args.dtype else ()
        return Bench(args.model, calibration, text, scoring, reference, base, kernel)

    def row(self, method: str, scheme: str, *more: str) -> dict[str, Any]:
        """One line of the table: ``ptq quantize --method M --scheme S MORE``, or ``--recipe`` for a method "*.toml"."""
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            how = ["--recipe", method] if method.endswith(".toml") else ["--method", method, "--scheme", scheme]
            command = [sys.executable, "-m", "cli.main", "quantize", self.model, *how, *self.calibration, *more]
            subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
            record, timings = read_record(out), read_timings(out)
            assert timings is not None
            logits = logits_of(load_model(out, dtype=torch.float32, kernel=self.kernel), CPU)
            e = score(logits, self.text, self.scoring, model="quantized", reference_fn=self.reference)
        assert e.divergence is not None
        row = {
            "method": method,
            "scheme": scheme,
            "bits_per_weight": record.result["bits_per_weight"],
            "perplexity": e.perplexity,
            "kl": e.divergence.kl_mean,
            "top1": e.divergence.top1_agreement,
            "file_mb": record.result["bytes"] / 1e6,
            "seconds": timings.seconds,
            "peak_gb": timings.peak_rss_bytes / 1e9,
            "peak_above_start_gb": (timings.peak_rss_bytes - timings.base_rss_bytes) / 1e9,
        }
        print(json.dumps(row), file=sys.stderr)
        return row

    def report(self, rows: list[dict[str, Any]], to: Path | None) -> None:
        """Print the table, and write it as JSON where a path is given."""
        print(f"float: perplexity {self.base.perplexity:.3f}, {self.text.ids.numel()} tokens of {self.text.dataset}\n")
        print("| method | scheme | bits/weight | perplexity | KL | top-1 | file MB | seconds | peak GB |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for r in rows:
            print(
                f"| {r['method']} | {r['scheme']} | {r['bits_per_weight']:.3f} | {r['perplexity']:.3f} | {r['kl']:.5f} "
                f"| {r['top1']:.2%} | {r['file_mb']:.2f} | {r['seconds']:.1f} | {r['peak_gb']:.2f} |"
            )
        if to:
            self.save(rows, to)

    def save(self, rows: list[dict[str, Any]], to: Path) -> None:
        """The rows as JSON, with the float model's."""
        to.write_text(json.dumps({"float": dataclasses.asdict(self.base), "rows": rows}, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts and the output of every table."""
    parser.add_argument("model")
    parser.add_argument("--dataset", help="calibration text")
    parser.add_argument("--eval", help="text to score")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    parser.add_argument("--dtype", help="of the forward passes that calibrate")
    parser.add_argument("--json", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="g128,g64")
    parser.add_argument("--methods", default="rtn,gptq,awq,awq+gptq")
    parser.add_argument("--suffix", default="sym", help="sym or asym")
    args = parser.parse_args()
    bench = Bench.of(args)
    rows = [
        bench.row(method, f"w{bits}a16-{group}-{args.suffix}")
        for bits in args.bits.split(",")
        for group in args.groups.split(",")
        for method in args.methods.split(",")
    ]
    bench.report(rows, args.json)


if __name__ == "__main__":
    main()
