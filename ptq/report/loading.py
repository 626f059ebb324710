"""How to load a checkpoint: one snippet for each program that the record says can."""

from __future__ import annotations

from collections.abc import Mapping

from calibration.record import RunRecord
from ptq.report import figures, wording
from ptq.report.figures import plain

PLACE = "MODEL"
_EXTRA_PACKAGES = {  # what transformers needs besides itself, by its `quant_method`
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum gptqmodel",
    "awq": "gptqmodel accelerate",
    "gguf": "gguf",
}
_PROMPT = "The capital of France is"


def section(record: RunRecord, files: Mapping[str, int]) -> str:
    """Snippets for the programs that load it, and the reasons of those that do not."""
    answers = wording.loads(record)
    if not answers:
        return ""
    parts = ["## How to load it", f"`{PLACE}` is this folder, or the id of the repository that holds it."]
    for program, yes, word, why in answers:
        if yes:
            condition = plain(wording.answer(word.capitalize(), why)) + "." if why else ""
            snippet = _snippet(program, record, files) or ("" if why else "Loads it as it is.")
            parts.append("\n\n".join(part for part in (f"### {plain(program)}", condition, snippet) if part))
    refused = [f"- {plain(program)}: {plain(why)}" for program, yes, _, why in answers if not yes]
    if refused:
        parts.append("### Programs that do not load it\n\n" + "\n".join(refused))
    return "\n\n".join(parts)


def _snippet(program: str, record: RunRecord, files: Mapping[str, int]) -> str:
    name = program.lower().split()[0] if program.strip() else ""
    gguf = next((file for file in sorted(files) if file.endswith(".gguf")), None)
    if name == "ptq":
        return figures.block(f'ptq generate {PLACE} --prompt "{_PROMPT}"', "sh")
    if name == "transformers":
        return _transformers(record, gguf)
    if name == "vllm":
        return figures.block(f"pip install vllm\nvllm serve {PLACE}", "sh")
    if name == "sglang":
        command = f"python -m sglang.launch_server --model-path {PLACE}"
        return figures.block(f"pip install sglang\n{command}", "sh")
    if name in ("llama.cpp", "llama-cpp") and gguf is not None:
        return figures.block(f'llama-cli -m {gguf} -p "{_PROMPT}"', "sh")
    return ""


def _transformers(record: RunRecord, gguf: str | None) -> str:
    method = str(record.result.get("format") or "").lower()
    extra = next((packages for key, packages in _EXTRA_PACKAGES.items() if key in method), "")
    known = [wording.read_scheme(name) for name, _, _ in wording.schemes(record)]
    schemes = {scheme for scheme in known if scheme}
    asymmetric = len(schemes) == 1 and not next(iter(schemes)).weights.symmetric
    dequantize = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    imports, options = ["AutoModelForCausalLM", "AutoTokenizer"], ['dtype="auto"']
    note = ""
    answer = str((record.result.get("loads_in") or {}).get("transformers"))
    if "compressed" in method and (asymmetric or dequantize in answer):
        # Some releases build the packed model without packed zero points and then refuse the file, and Falcon's own
        # linears read a float weight. Dequantizing while loading avoids both; it applies one scheme to all linears, so
        # it is wrong for mixed precision.
        imports.append("CompressedTensorsConfig")
        options.append(dequantize)
        note = "\n\nThe weights are dequantized while loading: not every release runs this model from packed weights."
    if gguf is not None:
        options.append(f'gguf_file="{gguf}"')
    tokenizer_options = f', gguf_file="{gguf}"' if gguf is not None else ""
    lines = [
        f"from transformers import {', '.join(imports)}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{PLACE}", {", ".join(options)})',
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}"{tokenizer_options})',
        f'inputs = tokenizer("{_PROMPT}", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
    ]
    install = figures.block(f"pip install transformers {extra}".rstrip(), "sh")
    return f"{install}\n\n{figures.block(chr(10).join(lines), 'python')}{note}"
