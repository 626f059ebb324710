"""Methods of activation sparsity side by side on one model, text and seed: what they reach, skip and cost.

    python benchmarks/sparsity_table.py demo
    python benchmarks/sparsity_table.py MODEL --dataset train.txt --eval test.txt --seq-len 512 --json table.json

MODEL is a float or a quantized checkpoint. Every setting is calibrated on the calibration text and scored on the other
text, in float32 on the same windows, twice: with masks on every position but the first of a window, and (protocol
``decode``, left out with ``--no-decode``) with a dense first half and masks on the second, which alone is scored. KL is
the divergence from ``--reference``, MODEL itself unless said otherwise. ``reached`` is the share pruned on the scored
text (all positions but the first), per kind of site; ``skipped`` the share of the weights of the blocks that a decoded
token does not read.

A row is kept in the file of ``--json`` when it is done, and not made again. Greedy searches run once per block, to the
largest target, on one calibration window of the dense model (as published); the other targets are rows on their way.
They are kept beside that file, block by block, so that a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import remembered

from calibration.model.opening import forward_dtype, load_tokenizer, locate, open_model
from calibration.progress import Silent
from calibration.scoring.perplexity import LogitsModel, score
from calibration.scoring.windows import Scoring
from calibration.text.corpora import load_corpus
from calibration.text.crops import TokenBatches
from calibration.text.encoding import EncodedText, encode_text
from calibration.text.samples import model_tokens
from calibration.walk.context import Context
from calibration.walk.passes import Pass
from calibration.walk.segment import Segment
from ptq.evaluation import logits_of
from ptq.planning.source import default_dataset
from ptq.runtime.dequantized import float_weights
from ptq.runtime.load import checkpoint_dtype, load_model
from ptq.sparse.masks import linear_sizes
from sparsity.files import sites_from
from sparsity.job import Base, calibrate
from sparsity.masking import Masks, mask_model, skipped_weights
from sparsity.methods import Cats, Chess, ChessWithAttention, Scap, Teal, Wina
from sparsity.sites import Site

CPU = torch.device("cpu")
SETTINGS: dict[str, Callable[[float], Pass]] = {
    "cats": Cats,
    "chess": Chess,
    "chess down_norm": lambda target: Chess(target, down_norm=True),
    "chess-qo": ChessWithAttention,
    "scap": lambda target: Scap(target, centering="none"),
    "scap centered": lambda target: Scap(target, centering="every"),
    "teal": Teal,
    "teal uniform": lambda target: Teal(target, allocation="uniform"),
    "wina": Wina,
    "wina uniform": lambda target: Wina(target, allocation="uniform"),
}
Rows = list[tuple[float, float, dict[str, float]]]
"""Of a greedy search: share removed, error, shares by linear."""


class Searched(Teal):
    """Leaves no thresholds, and the rows of every block's search in a file; blocks that are there are not searched."""

    def __init__(self, step: Teal, target: float, path: Path) -> None:
        for name, value in {**vars(step), "target": target, "inner": step, "path": path}.items():
            object.__setattr__(self, name, value)

    def apply(self, segment: Segment, context: Context) -> None:
        known = read_rows(self.path)
        if segment.index not in known:
            known[segment.index] = self.inner._search(segment, context, self.target)
            self.path.write_text(json.dumps(known))


class Allotted(Teal):
    """A method with shares that a search found before."""

    def __init__(self, step: Teal, rows: dict[int, Rows]) -> None:
        for name, value in {**vars(step), "inner": step, "rows": rows}.items():
            object.__setattr__(self, name, value)

    def importance(self, segment: Segment, linear: str) -> torch.Tensor | None:
        return self.inner.importance(segment, linear)

    def apply(self, segment: Segment, context: Context) -> None:
        shares = self._all_shares(segment, self.rows[segment.index], self.target)
        self.put_by_stage(segment, context, shares)


def read_rows(path: Path) -> dict[int, Rows]:
    """Block -> rows of its search."""
    return {int(block): rows for block, rows in json.loads(path.read_text()).items()} if path.exists() else {}


def sites_of(folder: Path, step: Pass, tokens: TokenBatches, batch_size: int) -> tuple[Site, ...]:
    """The sites that a pass finds, with forward passes in the dtype that `ptq sparsify` takes by itself."""
    reader, config, spec = open_model(folder)
    base = Base(float_weights(reader, spec), config, spec)
    with tempfile.TemporaryDirectory() as blocks:
        gates = calibrate(
            base,
            step,
            tokens,
            Path(blocks),
            dtype=forward_dtype(checkpoint_dtype(reader, spec), CPU),
            device=CPU,
            batch_size=batch_size,
            progress=Silent(),
        )
    return sites_from(gates)


class Bench:
    """One model and text; scores settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder, self.window = args, locate(args.model), args.seq_len
        _, config, self.spec = open_model(self.folder)
        dataset = args.dataset or default_dataset(self.folder)
        self.tokens = model_tokens(self.folder, config, dataset, args.samples, self.window, args.seed, False)
        self.batch_size = max(1, 2048 // self.window)
        self.targets, self.json = [float(t) for t in args.targets.split(",")], args.json

    @functools.cached_property
    def text(self) -> EncodedText:
        """What is scored; not needed by searches that are stopped before."""
        corpus = load_corpus(self.args.eval or default_dataset(self.folder), "score")
        return encode_text(corpus, load_tokenizer(self.folder))

    @functools.cached_property
    def reference(self) -> LogitsModel:
        return remembered(load_model(self.args.reference or self.folder, dtype=torch.float32))

    def step(self, name: str, target: float) -> Pass:
        """The pass of a row; greedy allocations that are kept on the disk are those of one search."""
        step = SETTINGS[name](target)
        if not isinstance(step, Teal) or not step.searches:
            return step
        step = dataclasses.replace(step, step=self.args.step)
        if self.json is None:
            return step
        path = self.json.with_name(f"{self.json.stem}-{name}.json")
        if len(read_rows(path)) < self.spec.n_blocks:
            sites_of(self.folder, Searched(step, max(self.targets), path), self.tokens, 1)
        return Allotted(step, read_rows(path))

    def scored(self, sites: tuple[Site, ...], protocol: str) -> tuple[dict[str, float], Masks, Any]:
        loaded = load_model(self.folder, dtype=torch.float32)
        masks = mask_model(loaded.model, self.spec, sites, self.window // 2 if protocol == "decode" else 1)
        scoring = Scoring(protocol, self.window, batch_size=self.batch_size, max_windows=self.args.max_windows)
        result = score(logits_of(loaded, CPU), self.text, scoring, reference_fn=self.reference)
        assert result.divergence is not None
        return {"perplexity": result.perplexity, "kl": result.divergence.kl_mean}, masks, loaded.model

    def row(self, name: str, target: float, step: Pass | None) -> dict[str, Any]:
        sites = () if step is None else sites_of(self.folder, step, self.tokens, self.batch_size)
        everywhere, masks, model = self.scored(sites, "gptq")
        decode = self.scored(sites, "decode")[0] if self.args.decode else None
        kinds: dict[str, list[float]] = {}
        for site in sites:
            kinds.setdefault(site.linear.rpartition(".")[2], []).append(masks.tallies[site.name].share)
        sizes = linear_sizes(model, self.spec)
        skipped = skipped_weights(self.spec, sizes, {n: t.share for n, t in masks.tallies.items()})
        return {
            "method": name,
            "target": target,
            "reached": {kind: sum(shares) / len(shares) for kind, shares in kinds.items()},
            "range": {kind: (min(shares), max(shares)) for kind, shares in kinds.items()},
            "centers": sum(site.center is not None for site in sites),
            "skipped": sum(skipped.values()) / sum(sizes.values()),
            "all": everywhere,
            "decode": decode,
        }


def line(row: dict[str, Any]) -> str:
    reached = ", ".join(f"{kind.removesuffix('_proj')} {100 * share:.1f}" for kind, share in row["reached"].items())
    later = f"| {row['decode']['perplexity']:.3f} | {row['decode']['kl']:.4f} " if row["decode"] else ""
    return (
        f"| {row['method']} | {row['target']:.0%} | {reached or '-'} | {row['skipped']:.1%} "
        f"| {row['all']['perplexity']:.3f} | {row['all']['kl']:.4f} {later}|"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", help="model to measure KL against")
    parser.add_argument("--dataset", help="calibration text, or a .safetensors file of token ids")
    parser.add_argument("--eval", help="text to score")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default="0.3,0.5,0.7")
    parser.add_argument("--methods", default=",".join(SETTINGS), help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--step", type=float, default=Teal.step, help="of greedy searches, a share of q's weights")
    parser.add_argument("--max-windows", type=int, help="score only the first so many windows")
    parser.add_argument("--no-dense", action="store_true", help="leave out the row of the dense model")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="score once, with masks everywhere")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = [(name, float(target)) for target in args.targets.split(",") for name in args.methods.split(",")]
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    rows = {(row["method"], row["target"]): row for row in known}
    bench = Bench(args)
    for name, target in (setting for setting in [("dense", 0.0), *settings] if setting not in rows):
        if name == "dense" and args.no_dense:
            continue
        rows[name, target] = bench.row(name, target, None if name == "dense" else bench.step(name, target))
        print(json.dumps(rows[name, target]), file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    later = " decode only: perplexity | KL |" if args.decode else ""
    print(f"| method | target | reached, % | weights skipped | perplexity | KL |{later}")
    print("| --- | ---: | --- | ---: | ---: | ---: |" + (" ---: | ---: |" if args.decode else ""))
    print("\n".join(line(row) for row in rows.values()))


if __name__ == "__main__":
    main()
