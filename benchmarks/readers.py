"""Which program reads what we write: the demo in every scheme and format, loaded by every reader, and compared.

    python benchmarks/readers.py WORK --python transformers=PYTHON --python vLLM=PYTHON --python GPTQModel=PYTHON \
        --llama-perplexity PROGRAM [--out ptq/formats/readers.json]
    python benchmarks/readers.py WORK --python GPTQModel=PYTHON --python AutoAWQ=PYTHON --others

PYTHON is an interpreter whose environment has the reader, which is run by `benchmarks/reader_inside.py`. What is
compared: the log-probability of every token of a few windows of text, the reader's beside ours (reference kernels,
float32); from llama.cpp, which is asked for perplexities, their mean. ``moved`` is how far quantization itself moves
them, ``difference`` how far the reader is from us, both in nats per token; the float model (scheme ``float``) shows how
much of it is the reader's arithmetic. Whatever has been done in WORK is not done again.

With ``--others`` GPTQModel and AutoAWQ, as named, quantize the demo in their ways (`reader_inside.GPTQMODEL`,
`reader_inside.AUTOAWQ`), and what is compared is their own model with ours of the same folder; a table is printed.

``ptq quantize`` quotes the file in its plan. `benchmarks/foreign_readers.py` compares single weights bit for bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ptq
from calibration.errors import PlanError, ToolkitError
from calibration.model.opening import DEMO_FOLDER
from ptq.formats.readers import schemes_of

HERE = Path(__file__).parent
WINDOWS, LENGTH = 8, 128
WEIGHTS = ("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16-gchannel", "w4a16-g128-asym")
CASES: dict[str, tuple[str, ...]] = {
    "compressed-tensors": (
        *WEIGHTS,
        *(f"w{bits}a16-g128" for bits in (2, 3, 5, 6, 8)),
        *("w8a16-gchannel", "w8a8", "w8a8-asym", "w8a8-astatic", "w8a8-ag64", "w4a8", "w4a8-astatic", "w4a4", "fp8"),
        *("fp8-astatic", "nvfp4", "mxfp4", "nvfp4-anvfp4", "mxfp4-amxfp4", "w4a8kv8", "w8a8kv8"),
        *("fp8-gblock-ag128", "mxfp8", "mxfp8-amxfp8", "w8a8kvfp8-kvstatic", "w8a8kv8-kvstatic"),
    ),
    "gptq": (*WEIGHTS, "w2a16-g128", "w3a16-g128", "w8a16-g128", "w8a16-g128-asym"),
    "awq": (*WEIGHTS, "w4a16-g128-sym"),
    "gguf": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4", "w4a16-g128"),
}
PARTLY = {"compressed-tensors": ("*.o_proj", "*.v_proj"), "gptq": ("*.o_proj",), "awq": ("*.o_proj",)}
"""Linears left in float in a second kind of file."""
FILES = {"transformers": ("compressed-tensors",), "vLLM": ("compressed-tensors", "gptq", "awq"),
         "GPTQModel": ("gptq", "awq"), "AutoAWQ": ("awq",), "llama.cpp": ("gguf",)}  # fmt: skip
"""What each reader is given."""
NO_KERNEL = ("cpu_gemm", "find a kernel", "Marlin", "MarlinNvFp4", "narrow() cannot", "requires x86 with")
"""In a refusal: the reader knows the file, but has nothing for this processor that multiplies it. (The last: vLLM's way
without a kernel, FP8 with a step per row of weights and one static step of inputs, slices that step as if it were one
per token.)"""


@dataclass(frozen=True)
class Case:
    """A file: format, scheme, and which linears stay in float."""

    format: str
    scheme: str
    left: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.format, self.scheme, re.sub(r"\W", "", self.left)))) + (
            ".gguf" if self.format == "gguf" else ""
        )


def cases() -> list[Case]:
    found = [Case(fmt, scheme) for fmt, schemes in CASES.items() for scheme in schemes]
    return found + [Case(fmt, "w4a16-g128", left) for fmt, patterns in PARTLY.items() for left in patterns]


def write(case: Case, work: Path) -> tuple[str, str]:
    """Quantize the demo into WORK, once; its scheme in full, and the reason where ptq itself refuses it."""
    out = work / case.name
    calibrated = any(word in case.scheme for word in ("-astatic", "anvfp4", "-kvstatic"))
    passes = '[[pass]]\nname = "ranges"\n' * calibrated + '[[pass]]\nname = "rtn"\n'
    rule = f'[[rule]]\nmatch = "{case.left}"\nscheme = "float"\n' * bool(case.left)
    recipe = work / "recipe.toml"
    recipe.write_text(f'scheme = "{case.scheme}"\n{passes}{rule}')
    settings: dict[str, Any] = {"recipe": recipe, "format": case.format, "samples": 16, "seq_len": LENGTH}
    try:
        scheme = schemes_of(ptq.plan("demo", **settings).plan.layout)[0]
        if not out.exists():
            ptq.quantize("demo", out=out, **settings)
    except (PlanError, ToolkitError) as error:
        return case.scheme, str(error).splitlines()[0]
    return scheme, ""


def logprobs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Ours, float32: ids ``[n, length]`` -> ``[n, length - 1]``."""
    model = ptq.load_model(folder, dtype="float32", kernel="reference").model
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.log_softmax(-1)
    found: torch.Tensor = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return found


def foreign(reader: str, python: str, folders: list[Path], ids: torch.Tensor, work: Path) -> dict[str, dict[str, Any]]:
    """Answers of a reader by folder; a crash is an answer too."""
    jobs, results = work / f"{reader}.json", work / f"{reader}.jsonl"
    names = [str(folder) for folder in folders]
    jobs.write_text(json.dumps({"ids": ids.tolist(), "folders": names}))
    while True:
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
        missing = [name for name in names if name not in {line["folder"] for line in lines}]
        if not missing:
            return {line["folder"]: line for line in lines}
        command = [python, str(HERE / "reader_inside.py"), reader, str(jobs), str(results)]
        with (work / f"{reader}.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        after = results.read_text().count("\n") if results.is_file() else 0
        if code and after == len(lines):
            with results.open("a") as file:
                line = {"folder": missing[0], "refused": f"the process ended with code {code}", "version": ""}
                file.write(json.dumps(line) + "\n")


def llama_perplexity(program: str, file: Path, text: Path, work: Path) -> dict[str, Any]:
    """llama-perplexity's answer, kept in WORK."""
    kept = work / f"{file.name}.perplexity"
    if not kept.is_file():
        command = [program, "-m", str(file), "-f", str(text), "-c", str(LENGTH), "--chunks", str(WINDOWS), "-t", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        kept.write_text(done.stdout + done.stderr)
    said = kept.read_text()
    found = re.search(r"Final estimate: PPL = ([\d.]+)", said)
    asked = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    build = re.search(r"version: (\S+)", asked.stdout + asked.stderr)
    answer: dict[str, Any] = {"version": build.group(1) if build else ""}
    if found:
        return answer | {"perplexity": float(found.group(1))}
    errors = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-1:]
    return answer | {"refused": errors[0][:300] if errors else "no output"}


def row(
    reader: str, case: Case, scheme: str, answer: dict[str, Any], difference: float, bias: float, moved: float
) -> dict[str, Any]:
    """One line of readers.json."""
    found = {"reader": reader, "format": case.format, "scheme": scheme, "left": case.left}
    if "refused" in answer:
        lacking = any(words in answer["refused"] for words in NO_KERNEL)
        return found | {"answer": "no kernel" if lacking else "refused", "why": answer["refused"]}
    wrong = not difference <= 0.02 + 2 * moved  # also nan
    numbers = {"difference": round(difference, 5), "log_perplexity": round(bias, 5), "moved": round(moved, 4)}
    return found | {"answer": "wrong" if wrong else "run"} | numbers


def windows(part: str) -> torch.Tensor:
    """``[WINDOWS, LENGTH]`` tokens of the demo's text: ``test`` or ``train``."""
    from transformers import AutoTokenizer

    text = (DEMO_FOLDER / f"{part}.txt").read_text(encoding="utf-8")[: 20 * WINDOWS * LENGTH]
    tokens = AutoTokenizer.from_pretrained(DEMO_FOLDER)(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(tokens[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


def score_others(work: Path, writer: str, python: str) -> None:
    """Folders that GPTQModel or AutoAWQ writes, in it and here."""
    folder, ids = work / "others" / writer, windows("test")
    jobs = work / "write.json"
    jobs.write_text(json.dumps({"model": str(DEMO_FOLDER), "ids": windows("train").tolist()}))
    with (work / "write.log").open("a") as log:
        command = [python, str(HERE / "reader_inside.py"), writer, "--write", str(jobs), str(folder)]
        subprocess.run(command, stdout=log, stderr=log, check=False)
    folders = sorted(path.parent for path in folder.glob("*/config.json"))
    base, answers = logprobs(DEMO_FOLDER, ids), foreign(writer, python, folders, ids, folder)
    for found in folders:
        answer, mine = answers[str(found)], logprobs(found, ids)
        theirs = torch.tensor(answer["logprobs"]) if "logprobs" in answer else torch.full_like(base, math.nan)
        difference, moved = float((theirs - mine).abs().mean()), float((mine - base).abs().mean())
        print(f"{found.name}: difference {difference:.4f}, moved {moved:.3f}", answer.get("refused", ""), flush=True)


def score_folders(
    work: Path, pythons: dict[str, str], written: dict[Case, str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and versions of the readers that take folders."""
    ids = windows("test")
    base, rows, versions = logprobs(DEMO_FOLDER, ids), [], {}
    ours: dict[Case, torch.Tensor] = {Case("float", "float"): base}
    for reader, python in pythons.items():
        own = [Case("float", "float"), *(case for case in written if case.format in FILES[reader])]
        folders = [DEMO_FOLDER if case.format == "float" else work / case.name for case in own]
        answers = foreign(reader, python, folders, ids, work)
        for case, folder in zip(own, folders, strict=True):
            if case not in ours:
                ours[case] = logprobs(folder, ids)
            answer = answers[str(folder)]
            versions[reader] = answer["version"] or versions.get(reader, "")
            moved = float((ours[case] - base).abs().mean())
            theirs = torch.tensor(answer["logprobs"]) if "logprobs" in answer else torch.full_like(base, math.nan)
            difference, bias = float((theirs - ours[case]).abs().mean()), float((ours[case] - theirs).mean())
            rows.append(row(reader, case, written.get(case, "float"), answer, difference, bias, moved))
            print(rows[-1], flush=True)
    return rows, versions


def score_gguf(work: Path, program: str, written: dict[Case, str]) -> tuple[list[dict[str, Any]], str]:
    """Rows and version of llama.cpp."""
    text, rows, version = DEMO_FOLDER / "test.txt", [], ""

    def ours(model: Path) -> float:
        found = ptq.evaluate(model, dataset=str(text), protocol="llama.cpp", seq_len=LENGTH, max_windows=WINDOWS)
        return math.log(found.perplexity)

    base = ours(DEMO_FOLDER)
    for case, scheme in written.items():
        if case.format == "gguf":
            answer, mine = llama_perplexity(program, work / case.name, text, work), ours(work / case.name)
            version = answer["version"] or version
            bias = math.log(answer["perplexity"]) - mine if "perplexity" in answer else math.nan
            rows.append(row("llama.cpp", case, scheme, answer, abs(bias), bias, abs(mine - base)))
            print(rows[-1], flush=True)
    return rows, version


def processor() -> str:
    """``CPU with AVX2`` or ``CPU with AVX-512``: what kernels for processors ask for."""
    capability = torch.backends.cpu.get_cpu_capability()
    return "CPU with " + {"AVX2": "AVX2", "AVX512": "AVX-512"}.get(capability, capability)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--python", action="append", default=[], metavar="READER=PYTHON")
    parser.add_argument("--llama-perplexity", metavar="PROGRAM")
    parser.add_argument(
        "--others", action="store_true", help="folders that GPTQModel and AutoAWQ write, instead of ours"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "ptq" / "formats" / "readers.json")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pythons = dict(entry.split("=", 1) for entry in options.python)
    if unknown := set(pythons) - set(FILES):
        parser.error(f"{', '.join(unknown)}: known readers are {', '.join(FILES)}")
    if options.others:
        for writer in ("GPTQModel", "AutoAWQ"):
            if writer in pythons:
                score_others(work, writer, pythons[writer])
        return
    written = {}
    for case in cases():
        scheme, reason = write(case, work)
        print(f"{case.name}: {reason or 'written'}", flush=True)
        if not reason:
            written[case] = scheme
    rows, versions = score_folders(work, pythons, written)
    if options.llama_perplexity:
        more, versions["llama.cpp"] = score_gguf(work, options.llama_perplexity, written)
        rows += more
    old = json.loads(options.out.read_text()) if options.out.is_file() else {"readers": {}, "runs": []}
    today = datetime.date.today().isoformat()
    said = {name: {"version": version, "date": today, "machine": processor()} for name, version in versions.items()}
    readers = old["readers"] | said
    kept = [run for run in old["runs"] if run["reader"] not in versions]  # readers that were not asked today
    document = {"model": "demo", "readers": readers, "runs": kept + rows}
    lines = ",\n".join("  " + json.dumps(run) for run in document.pop("runs"))
    options.out.write_text(json.dumps(document)[:-1] + f', "runs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    sys.exit(main())
