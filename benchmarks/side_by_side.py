"""ptq and llm-compressor on the same model, samples, bits and dtype: wall time, peak memory, perplexity, KL.

    python3 -m venv OTHER
    OTHER/bin/pip install -c benchmarks/constraints-llmcompressor.txt torch llmcompressor
    python benchmarks/side_by_side.py MODEL --dataset train.txt --eval test.txt --other OTHER/bin/python

llm-compressor needs an environment of its own (its version pins exclude ours). Both tools get the same token ids; each
run is a process of its own. ``quantize`` is the time between a loaded interpreter and the written checkpoint;
``process`` has interpreter and imports in it. Perplexity and KL are measured by one reader of the compressed-tensors
files on both sides, in float32. The floor is what no implementation can beat here: forward passes of the calibration
set through the decoder blocks (one for AWQ on the float stream; for GPTQ one to gather and one to propagate, which the
last block does not need) at the measured seconds per pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def tokens_file(model: Path, dataset: str, samples: int, seq_len: int, path: Path) -> None:
    """The calibration windows of `ptq quantize --dataset` as a file that both tools read."""
    from calibration.model.opening import load_tokenizer
    from calibration.text.corpora import load_corpus
    from calibration.text.crops import calibration_tokens

    batches = calibration_tokens(load_corpus(dataset, "calibrate"), load_tokenizer(model), samples, seq_len, seed=0)
    save_file({"input_ids": batches.input_ids}, path)


def measured(command: list[str]) -> float:
    """Wall seconds of one process."""
    started = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.decode()[-3000:]}")
    return time.perf_counter() - started


def ours(
    model: Path, tokens: Path, method: str, shape: tuple[int, int], out: Path, scheme: str = "w4a16-g128-sym"
) -> dict[str, float]:
    """``method`` with ``scheme``, or a recipe ("*.toml"), which has a scheme of its own."""
    from calibration.record import read_timings

    how = ["--recipe", method] if method.endswith(".toml") else ["--method", method, "--scheme", scheme]
    command = [sys.executable, "-m", "cli.main", "quantize", str(model), *how]
    command += ["--dataset", str(tokens), "--dtype", "bfloat16"]
    command += ["--samples", str(shape[0]), "--seq-len", str(shape[1]), "--out", str(out), "--overwrite"]
    seconds = measured(command)
    timings = read_timings(out)
    assert timings is not None
    return {"process": seconds, "quantize": timings.seconds, "peak_gib": timings.peak_rss_bytes / 2**30}


def theirs(
    python: str, model: Path, tokens: Path, method: str, out: Path, extra: list[str], bits: int = 4
) -> dict[str, float]:
    """llm-compressor, symmetric groups of 128."""
    result = out.with_suffix(".json")
    command = [python, str(HERE / "llmcompressor_run.py"), "--model", str(model), "--tokens", str(tokens)]
    command += ["--method", method, "--bits", str(bits), "--group-size", "128", "--symmetric", "--dtype", "bfloat16"]
    seconds = measured([*command, "--out", str(out), "--json", str(result), *extra])
    data = json.loads(result.read_text())
    return {"process": seconds, "quantize": data["oneshot_seconds"], "peak_gib": data["peak_rss_gib"]}


def scores(folder: Path, dataset: str, seq_len: int, reference: Path) -> dict[str, float]:
    """Perplexity, and mean KL divergence from the float model in nats per token."""
    import ptq

    result = ptq.evaluate(folder, dataset=dataset, seq_len=seq_len, reference=reference)
    assert result.divergence is not None
    return {"perplexity": result.perplexity, "kl": result.divergence.kl_mean}


def forward_seconds(model: Path, tokens: Path, shape: tuple[int, int]) -> float:
    """One pass of the calibration set through the decoder blocks in bfloat16, without the head."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).base_model.eval()
    batches = load_file(tokens)["input_ids"][: shape[0], : shape[1]].split(4)
    with torch.no_grad():
        network(batches[0], use_cache=False)
        started = time.perf_counter()
        for batch in batches:
            network(batch, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--other", required=True, help="Python of the environment with llm-compressor")
    parser.add_argument("--other-args", default="", help="further arguments of llmcompressor_run.py")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="of ours; theirs runs once, in between")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape = (args.samples, args.seq_len)
    report: dict[str, Any] = {"load_average_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        tokens = work / "tokens.safetensors"
        tokens_file(args.model, args.dataset, *shape, tokens)
        report["forward_seconds"] = forward_seconds(args.model, tokens, shape)
        for method, passes in (("awq", 1), ("gptq", 2)):
            runs = [ours(args.model, tokens, method, shape, work / f"ours-{method}") for _ in range(args.repeats)]
            mine = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            other = theirs(args.other, args.model, tokens, method, work / f"theirs-{method}", args.other_args.split())
            mine |= scores(work / f"ours-{method}", args.eval, args.seq_len, args.model)
            other |= scores(work / f"theirs-{method}", args.eval, args.seq_len, args.model)
            report[method] = {"ptq": mine, "llm-compressor": other, "floor": passes * report["forward_seconds"]}
            print(json.dumps({method: report[method]}), file=sys.stderr)
    print(f"one pass through the blocks: {report['forward_seconds']:.1f} s\n")
    print("| method | tool | quantize s | process s | peak GiB | perplexity | KL | floor s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in ("awq", "gptq"):
        for tool in ("ptq", "llm-compressor"):
            r = report[method][tool]
            print(
                f"| {method} | {tool} | {r['quantize']:.1f} | {r['process']:.1f} | {r['peak_gib']:.2f} "
                f"| {r['perplexity']:.3f} | {r['kl']:.5f} | {report[method]['floor']:.1f} |"
            )
        ratio = {k: report[method]["llm-compressor"][k] / report[method]["ptq"][k] for k in ("quantize", "process")}
        print(f"| {method} | ratio | {ratio['quantize']:.1f} x | {ratio['process']:.1f} x | | | | |")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
