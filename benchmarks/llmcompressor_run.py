"""Quantize one model with llm-compressor and write its time and peak memory as JSON.

The other side of the comparison in this folder. It runs in its own environment (constraints-llmcompressor.txt), since
llm-compressor and ptq ask for different versions of transformers, and reads calibration samples that are already
tokenized, so that both tools see the same ones:

    python benchmarks/llmcompressor_run.py --model MODEL --tokens tokens.safetensors --method awq --asymmetric --out OUT

`--tokens` names a safetensors file with `input_ids`, int64, samples × sequence length. Quantization settings that the
command line does not name stay at llm-compressor's defaults: 20 AWQ grid points with the mappings it infers for the
architecture, GPTQ with block size 128, dampening 0.01 and static activation order, the sequential pipeline.
"""

import time

START = time.perf_counter()  # before the imports below, which are a good part of a short run

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import psutil  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

GIB = 2**30
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def build_recipe(method: str, bits: int, group_size: int, symmetric: bool) -> list[Modifier]:
    """Integer weights in groups for every linear layer but lm_head; AWQ is a transform before rounding."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    transforms: list[Modifier] = [AWQModifier()] if "awq" in method else []
    rounding = GPTQModifier if "gptq" in method else QuantizationModifier
    return [*transforms, rounding(config_groups=groups, ignore=["lm_head"])]


def allow_missing_accelerator() -> None:
    """Let AWQ run on a machine that has no accelerator.

    AWQModifier pins its cached activations before every grid search (IntermediatesCache.pin_memory, with no option
    that turns it off), and torch raises where no accelerator can use pinned memory. Pinning only speeds up a copy to
    a device, so here, where there is no such copy, leaving it out changes neither the results nor the time.
    """
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def peak_rss() -> float:
    """The largest resident size of this process so far, in GiB.

    Linux: VmHWM, which starts anew with the program; ru_maxrss would count the process that launched this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time llm-compressor on one model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file with input_ids")
    parser.add_argument("--method", choices=("awq", "gptq", "awq+gptq"), required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--asymmetric", dest="symmetric", action="store_false", help="same as --no-symmetric")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1, help="calibration samples in one forward pass")
    parser.add_argument("--prefetch", action="store_true", help="llm-compressor's sequential_prefetch")
    parser.add_argument("--layers-per-step", type=int, default=1, help="its sequential_targets_per_subgraph")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the compressed model")
    parser.add_argument("--json", type=Path, help="file for the result (default: standard output only)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    imported, imports_rss = time.perf_counter(), psutil.Process().memory_info().rss / GIB
    allow_missing_accelerator()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokens = load_file(args.tokens)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    samples = Dataset.from_dict({"input_ids": tokens.tolist()})

    load_before, cpu_before = os.getloadavg()[0], time.process_time()
    started = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=build_recipe(args.method, args.bits, args.group_size, args.symmetric),
        dataset=samples,
        num_calibration_samples=len(samples),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,  # the order of the file, so that a run can be repeated
        batch_size=args.batch_size,
        sequential_prefetch=args.prefetch,
        sequential_targets_per_subgraph=args.layers_per_step,
    )
    finished, cpu_after = time.perf_counter(), time.process_time()
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    saved = time.perf_counter()

    result = {
        "tool": "llmcompressor",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "samples": list(tokens.shape),
        "threads": torch.get_num_threads(),
        "oneshot_seconds": round(finished - started, 3),
        # On a busy machine wall time says little: compare processor seconds, best with --threads 1.
        "oneshot_cpu_seconds": round(cpu_after - cpu_before, 3),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "import_seconds": round(imported - START, 3),
        "load_seconds": round(started - imported, 3),
        "save_seconds": round(saved - finished, 3),
        "process_seconds": round(saved - START, 3),
        "imports_rss_gib": round(imports_rss, 3),
        "peak_rss_gib": round(peak_rss(), 3),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
