"""Every causal type of transformers at tiny size: derived, proved, quantized, and loaded elsewhere.

    PYTHONPATH=.:tests python benchmarks/architectures.py --records types.jsonl --page docs/architectures.md
    PYTHONPATH=.:tests python benchmarks/architectures.py --records types.jsonl olmo2 glm4_moe

Types that the records already have are not run again. For each: a random model of the real config class (float32,
random gains and biases) is saved as transformers saves it; random scales on all proved pairs, and a rotation, are
applied to the whole model and its logits compared; AWQ and GPTQ at 8 bits run end to end, and the output is read here
and by plain transformers.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ptq
from benchmarks.tiny_configs import tiny_config
from calibration.architectures import FAMILIES, Residual, described
from calibration.architectures.derivation.pairs import scales
from calibration.errors import ToolkitError
from calibration.model.classes import auto_class
from calibration.model.opening import open_model
from calibration.model.skeleton import Skeleton, load_parameters, places
from calibration.walk.float_blocks import FloatBlocks
from ptq.methods import Rotate
from ptq.runtime.load import load_model

SECONDS = 90  # of processor time per type
VOCABULARY = 288
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
TEXT = " ".join(f"line {i} of a text that says {i * i % 97} and nothing else\n" for i in range(60))


def save(model_type: str, folder: Path) -> Any:
    """A random model in which no gain and no bias has its neutral value, saved with a tokenizer of bytes."""
    from byte_tokenizer import byte_tokenizer

    torch.manual_seed(0)
    config = tiny_config(model_type, vocab_size=VOCABULARY)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.0) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def rebuilt(folder: Path, passes: tuple[Any, ...] = (), balance: bool = False) -> torch.Tensor:
    """Logits of the whole model, loaded block by block, with passes applied or all pairs scaled at random."""
    reader, config, spec = open_model(folder)
    skeleton = Skeleton(config, spec, torch.float32, torch.device("cpu"))
    blocks = FloatBlocks(reader, skeleton, passes)
    known, generator = places(skeleton.model), torch.Generator().manual_seed(4)
    outside = {spec.root_module_name(n): t for n, t in blocks.outside.tensors()}
    load_parameters(skeleton.model, {n: t for n, t in outside.items() if n in known})
    if not passes:
        skeleton.model.tie_weights()
    for index in range(len(blocks)):
        segment = blocks.load_transformed(index)
        for group in segment.spec.balance if balance else ():
            n = segment.weight(group.consumers[0]).shape[1]
            segment.absorb(
                group, scales(n if group.heads is None else group.heads.key_value * group.heads.width, generator)
            )
        segment.sync()
    return logits(skeleton.model)


def examine(model_type: str, folder: Path) -> dict[str, Any]:
    """What works for one type."""
    model = save(model_type, folder / "float")
    plain = logits(model)
    _, _, spec = open_model(folder / "float")
    found: dict[str, Any] = {"how": "derived" if spec.derived else "table", "pairs": described(spec), "norm": spec.norm}
    block = spec.block(spec.n_blocks - 1)
    found |= {
        "feed_forward": len(block.feed_forward),
        "kept": sorted(set(block.kept))[:4],
        "class": type(model).__name__,
    }
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    run = {"dataset": str(folder / "text.txt"), "samples": 8, "seq_len": 32, "scheme": "w8a16-gchannel"}
    record = ptq.quantize(folder / "float", out=folder / "out", method="awq+gptq", **run)
    found["balanced"] = distance(rebuilt(folder / "float", balance=True), plain)
    found["stream"] = "" if isinstance(spec.residual, Residual) else spec.residual
    if isinstance(spec.residual, Residual):
        found["rotated"] = distance(rebuilt(folder / "float", (Rotate(online=False),)), plain)
    ours = logits(load_model(folder / "out").model)
    found |= {"quantized": record.result["quantized_linears"], "format": record.result["format"]}
    found["ours"] = distance(ours, plain)
    if found["format"] == "compressed-tensors":
        try:
            theirs = auto_class(model.config).from_pretrained(folder / "out", dtype=torch.float32)
            found["theirs"] = distance(logits(theirs), ours)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            found["unread"] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return found


@contextmanager
def limited() -> Iterator[None]:
    """An error after `SECONDS` of processor time: other work on the machine does not count."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(model_type: str) -> dict[str, Any]:
    """`examine`, or the reason why not: ours (``refused``), or that the tiny model itself does not run."""
    with tempfile.TemporaryDirectory() as place, limited():
        folder, stage = Path(place), "tiny model"
        try:
            logits(save(model_type, folder / "float"))
            stage = "failed"
            return {"type": model_type, **examine(model_type, folder)}
        except ToolkitError as error:
            return {"type": model_type, "refused": error.message.replace(f"{place}/", "")}
        except Exception as error:  # noqa: BLE001 - a table of everything: the reason is its content
            reason = f"{type(error).__name__}: {' '.join(str(error).replace(f'{place}/', '').split())[:160]}"
            return {"type": model_type, stage: reason}


def page(records: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    good = [r for r in records if r.get("theirs", 1.0) < 1e-4]
    here = [r for r in records if "ours" in r and r not in good]
    exact = [r for r in records if r.get("balanced", 1.0) < 1e-5]
    turned = [r for r in exact if r.get("rotated", 1.0) < 1e-5]
    refused = [r for r in exact if r.get("stream")]
    unbuilt = [r for r in records if "tiny model" in r]
    lines = [
        "# Architectures",
        "",
        "Made by `benchmarks/architectures.py`, nothing edited by hand: tiny random models (float32) of the config "
        "classes of transformers.",
        "",
        f"Of {len(records)} types {len(good)} run AWQ and GPTQ end to end and have the same logits in plain "
        f"transformers as here (1e-4); {len(here)} more run here, and transformers' own class does not take their file "
        f"for the reason given; the tiny model of {len(unbuilt)} does not build or run by itself; "
        f"{len(records) - len(good) - len(here) - len(unbuilt)} are refused or fail.",
        "",
        f"On {len(exact)} random scales on every proved pair, which is what AWQ and SmoothQuant move, leave the logits "
        f"as they are (1e-5); the residual stream of {len(turned)} of them can be rotated (1e-5), that of "
        f"{len(refused)} is refused with the reason.",
        "",
        "*balanced*: largest change of a logit when all pairs are scaled at random. *rotated*: the same for a "
        "rotation. *8 bits*: distance of the quantized model from the float one. *reader*: distance between this "
        "package's reader and plain transformers on the same files.",
        "",
        "| type | entry | inputs and pairs | balanced | rotated | linears | 8 bits | reader | stays float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in records if "ours" in r):
        rotated = f"{r['rotated']:.0e}" if "rotated" in r else f"no: {r['stream']}"
        reader = f"transformers {r['theirs']:.0e}" if "theirs" in r else f"{r['format']}, here only"
        reader += f" (transformers: {r['unread']})".replace("|", "/") if "unread" in r else ""
        kept = ", ".join(f"`{name}`" for name in r["kept"])
        lines.append(
            f"| {r['type']} | {r['how']} | {r['pairs']} | {r['balanced']:.0e} | {rotated} | {r['quantized']} | "
            f"{r['ours']:.3f} | {reader} | {kept} |"
        )
    lines += ["", "## Not quantized", "", "| type | why |", "|---|---|"]
    for r in (r for r in records if "ours" not in r):
        why = next(f"{key}: {r[key]}" for key in ("refused", "failed", "tiny model") if key in r)
        lines.append(f"| {r['type']} | {why.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", help="all causal types, and those of the table, where none is named")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.records.touch()

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in options.records.read_text().splitlines()]

    wanted = options.types or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FAMILIES})
    for model_type in wanted:
        if model_type in {r["type"] for r in read()}:
            continue
        record = attempt(model_type)
        with options.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    if options.page is not None:
        options.page.write_text(page(sorted(read(), key=lambda r: str(r["type"]))), encoding="utf-8")


if __name__ == "__main__":
    main()
