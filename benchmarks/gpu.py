"""Everything that runs on one GPU, checked and timed on the shapes of an 8 B Llama, in about ten minutes.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --json gpu.json --parts decode load
    python benchmarks/gpu.py --interpret

Weights are random. It ends with code 1 where a kernel differs from its reference or a part breaks; the other parts run
all the same. Parts that gpu.json has are not run again, unless ``--parts`` names them. ``--interpret`` rehearses
all parts on tiny shapes on the CPU, the kernels in Triton's interpreter: its checks count, its times say nothing.

``check``: kernels against references. ``gram``: products of the Gram matrices. ``loop``: GPTQ's column loop of the
block's linears, by the Triton program and by torch. ``quantize``: one block through `ptq quantize`, of 128 x 2048
tokens. ``decode``: all linears of a block for one token, attention left out; tokens/s are those of 32 such blocks.
``graph``: the same in a CUDA graph, without the time it takes to start kernels. ``load``: a block from
memory to the GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

import ptq

NAMES = ("check", "gram", "loop", "quantize", "decode", "graph", "load")


def machine(gpu: bool) -> dict[str, str]:
    """What results of one file must share."""
    device = torch.cuda.get_device_name() if gpu else "no GPU: a rehearsal, its times say nothing"
    return {"device": device, "torch": torch.__version__, "ptq": ptq.__version__}


def refuse(message: str, fix: str) -> NoReturn:
    print(f"error: {message}\n    fix: {fix}", file=sys.stderr)
    raise SystemExit(2)


def kept(path: Path | None, facts: dict[str, str]) -> dict[str, Any]:
    """The results that the file already has."""
    if path is not None and not path.parent.is_dir():
        refuse(f"{path.parent}: no such folder", "make it, or name another file")
    if path is None or not path.exists():
        return {"machine": facts, "parts": {}}
    try:
        found = json.loads(path.read_text())
        same = found["machine"] == facts and isinstance(found["parts"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        refuse(f"{path}: is not a result of this script, machine and versions", "name another file")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=NAMES, help="run these, also where the file has them")
    parser.add_argument("--json", type=Path, help="results, written as each part ends")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes, on the CPU in Triton's interpreter")
    args = parser.parse_args()
    if not args.interpret and not torch.cuda.is_available():
        refuse("torch sees no GPU here", "run it on a machine with a GPU, or rehearse it with --interpret")
    if importlib.util.find_spec("triton") is None:
        refuse("the package triton is not installed", "pip install triton")
    if args.interpret and os.environ.get("TRITON_INTERPRET") != "1":  # has to stand before Triton is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    from gpu_parts import DIFFERS, PARTS, TINY, Bench, Shapes

    bench = Bench(torch.device("cpu"), TINY) if args.interpret else Bench(torch.device("cuda"), Shapes())
    torch.manual_seed(0)
    results = kept(args.json, machine(bench.gpu))
    print(", ".join(results["machine"].values()), end="\n\n| part | what | | |\n| --- | --- | ---: | --- |\n")
    failed = []
    for name in args.parts or NAMES:
        part = results["parts"].get(name)
        if part is None or args.parts:
            try:
                part = PARTS[name](bench)
            except Exception as error:  # noqa: BLE001 - the others still have something to say
                failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:2000]}")
                continue
            results["parts"][name] = part
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
        for what, number, unit in part:
            print(f"| {name} | {what} | {number:.4g} | {unit} |", flush=True)
            if unit.startswith(DIFFERS):
                failed.append(f"{name}: {what}")
    if failed:
        raise SystemExit("\n".join(["", *failed]))


if __name__ == "__main__":
    main()
