"""Methods side by side on one model, text, window and seed: perplexity, KL, bits, size, seconds, peak memory.

    python benchmarks/table.py demo
    python benchmarks/table.py MODEL --dataset train.txt --eval test.txt --seq-len 512 --records rows.jsonl
    python benchmarks/table.py MODEL ... --records rows.jsonl --rows "awq+gptq w3a16-g64-sym" --folders other=DIR

Every setting is a `ptq quantize` in a process of its own, so that its memory and its processor time are its own. Then
all results are scored against the float model in one process, on the same windows in float32, with the float model's
states computed once. With ``--records`` every row is written as it is made, and rows that stand there are not made
again: a stopped table goes on with the same command. ``--folders`` scores what other tools wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
from ptq.runtime.load import Loaded, load_model

CPU = torch.device("cpu")


def remembered(loaded: Loaded) -> LogitsModel:
    """Logits of a model that is asked for the same windows again and again: what enters its head is kept (the logits
    themselves would be a gigabyte per ten thousand tokens), where the head is all that follows."""
    head = loaded.model.get_output_embeddings()
    logits, known = logits_of(loaded, CPU), dict[bytes, torch.Tensor]()
    entered: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    @torch.no_grad()
    def lookup(ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in known:
            entered.clear()
            found = logits(ids)
            assert torch.equal(head(entered[0]), found), "something follows the head of this model"
            known[key] = entered[0]
            return found
        result: torch.Tensor = head(known[key])
        return result

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
    records: Path | None = None

    @staticmethod
    def of(args: argparse.Namespace, kernel: str | None = None) -> Bench:
        """From the arguments of `add_arguments`; ``kernel`` runs the quantized models, None is the fastest."""
        folder = locate(args.model)
        corpus = load_corpus(args.eval or default_dataset(folder), "score")
        text = encode_text(corpus, load_tokenizer(folder))
        scoring = Scoring("gptq", args.seq_len, batch_size=4, max_windows=args.max_windows, dtype="float32")
        reference = remembered(load_model(folder, dtype=torch.float32))
        base = score(reference, text, scoring)
        print(f"float perplexity {base.perplexity:.4f}, {base.protocol.tokens_scored} tokens", file=sys.stderr)
        calibration = ("--samples", str(args.samples), "--seq-len", str(args.seq_len))
        calibration += ("--dataset", args.dataset) if args.dataset else ()
        calibration += ("--dtype", args.dtype) if args.dtype else ()
        return Bench(args.model, calibration, text, scoring, reference, base, kernel, args.records)

    def row(self, method: str, scheme: str, *more: str) -> dict[str, Any]:
        """One line of the table: ``ptq quantize --method M --scheme S MORE``, or ``--recipe`` for a method "*.toml".

        Returns the recorded one where the records have it, with the same calibration and scoring.
        """
        key = {"method": method, "scheme": scheme, "calibration": list(self.calibration), "more": list(more)}
        return self._recorded(key) or self._record(key | self._quantized(method, scheme, *more))

    def foreign(self, tool: str, folder: Path) -> dict[str, Any]:
        """The line of a folder that another tool wrote."""
        key = {"method": tool, "scheme": folder.name, "calibration": [], "more": []}
        return self._recorded(key) or self._record(key | self._scored(folder))

    def _quantized(self, method: str, scheme: str, *more: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            how = ["--recipe", method] if method.endswith(".toml") else ["--method", method, "--scheme", scheme]
            command = [sys.executable, "-m", "cli.main", "quantize", self.model, *how, *self.calibration, *more]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            record, timings = read_record(out), read_timings(out)
            assert timings is not None
            return self._scored(out) | {
                "bits_per_weight": record.result["bits_per_weight"],
                "file_mb": record.result["bytes"] / 1e6,
                "seconds": timings.seconds,
                "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "peak_gb": timings.peak_rss_bytes / 1e9,
                "peak_above_start_gb": (timings.peak_rss_bytes - timings.base_rss_bytes) / 1e9,
            }

    def _scored(self, folder: Path) -> dict[str, Any]:
        logits = logits_of(load_model(folder, dtype=torch.float32, kernel=self.kernel), CPU)
        e = score(logits, self.text, self.scoring, model="quantized", reference_fn=self.reference)
        assert e.divergence is not None
        return {
            "perplexity": e.perplexity,
            "kl": e.divergence.kl_mean,
            "kl_se": e.divergence.kl_se,
            "top1": e.divergence.top1_agreement,
            "delta_nll": e.divergence.delta_nll,
            "delta_nll_se": e.divergence.delta_nll_se,
        }

    def _recorded(self, key: dict[str, Any]) -> dict[str, Any] | None:
        if self.records is None or not self.records.exists():
            return None
        key = key | {"scored": self._protocol()}
        rows: list[dict[str, Any]] = [json.loads(line) for line in self.records.read_text().splitlines()]
        return next((row for row in rows if all(row.get(k) == v for k, v in key.items())), None)

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row | {"scored": self._protocol()}
        print(json.dumps(row), file=sys.stderr)
        if self.records is not None:
            with self.records.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def _protocol(self) -> str:
        return f"{self.scoring.window} x {self.scoring.max_windows}, float {self.base.perplexity:.4f}"

    def report(self, rows: Sequence[dict[str, Any]], to: Path | None) -> None:
        """Print the table, and write it as JSON where a path is given."""
        print(f"float: perplexity {self.base.perplexity:.3f}, {self.text.ids.numel()} tokens of {self.text.dataset}\n")
        print("| method | scheme | bits/weight | perplexity | KL | top-1 | difference | file MB | CPU s | peak GB |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for r in rows:
            made = ("bits_per_weight", "file_mb", "cpu_seconds", "peak_gb")
            bits, size, seconds, peak = (f"{r[k]:.3f}" if r.get(k) is not None else "" for k in made)
            print(
                f"| {r['method']} | {r['scheme']} | {bits} | {r['perplexity']:.3f} | {r['kl']:.4f} ± {r['kl_se']:.4f} "
                f"| {r['top1']:.3f} | {r['delta_nll']:.3f} ± {r['delta_nll_se']:.3f} | {size} | {seconds} | {peak} |"
            )
        if to:
            self.save(rows, to)

    def save(self, rows: Sequence[dict[str, Any]], to: Path) -> None:
        """The rows as JSON, with the float model's."""
        to.write_text(json.dumps({"float": dataclasses.asdict(self.base), "rows": list(rows)}, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts and the output of every table."""
    parser.add_argument("model")
    parser.add_argument("--dataset", help="calibration text")
    parser.add_argument("--eval", help="text to score")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    parser.add_argument("--dtype", help="of the forward passes that calibrate")
    parser.add_argument("--records", type=Path, help="rows as JSON lines: written as they are made, and not made again")
    parser.add_argument("--json", type=Path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--groups", default="g128,g64")
    parser.add_argument("--methods", default="rtn,gptq,awq,awq+gptq")
    parser.add_argument("--suffix", default="sym", help="sym or asym")
    parser.add_argument("--rows", nargs="*", help="'METHOD SCHEME [OPTION ...]' each, instead of bits, groups, methods")
    parser.add_argument("--folders", nargs="*", default=[], help="TOOL=DIR: what another tool wrote")
    args = parser.parse_args()
    settings = args.rows if args.rows is not None else [
        f"{method} w{bits}a16-{group}-{args.suffix}"
        for bits in args.bits.split(",")
        for group in args.groups.split(",")
        for method in args.methods.split(",")
    ]  # fmt: skip
    bench = Bench.of(args)
    rows = [bench.row(*setting.split()) for setting in settings]
    for tool, _, folder in (named.partition("=") for named in args.folders):
        rows.append(bench.foreign(tool, Path(folder)))
    bench.report(rows, args.json)


if __name__ == "__main__":
    main()
