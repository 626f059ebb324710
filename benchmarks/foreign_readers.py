"""Read an AWQ or GPTQ folder of ours with the libraries that define the formats, and compare bit for bit.

The libraries need CUDA builds, pinned torch versions or compiled helpers to install, but the files that unpack weights
are plain torch. They are loaded from an unpacked source archive or wheel, without installing it:

    pip download --no-deps --no-binary :all: autoawq==0.2.9     # then: tar xzf autoawq-0.2.9.tar.gz
    pip download --no-deps --no-binary :all: gptqmodel==7.7.0   # then: tar xzf gptqmodel-7.7.0.tar.gz
    pip download --no-deps --python-version 3.11 auto-gptq==0.7.1   # then: unzip auto_gptq-0.7.1-*.whl -d auto_gptq

    python benchmarks/foreign_readers.py FOLDER --source autoawq-0.2.9        # AWQ
    python benchmarks/foreign_readers.py FOLDER --source auto_gptq            # GPTQ v1
    python benchmarks/foreign_readers.py FOLDER --source gptqmodel-7.7.0      # AWQ, GPTQ v1 and v2

Every weight is dequantized by the library in float32 and compared with what our reader makes of the same file. The
exit code is 1 if any weight differs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from calibration.model.checkpoint import CheckpointReader
from ptq.formats.registry import format_of

Dequantize = Callable[[CheckpointReader, str, tuple[int, int]], torch.Tensor]
"""(checkpoint, name of a linear, its shape) to float32 ``[out, in]``."""


def load_file(path: Path, name: str) -> Any:
    """One Python file as a module, without its package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def awq_dequantize(packing_utils: Path) -> Dequantize:
    """``dequantize_gemm`` of AutoAWQ, or of gptqmodel, whose plain torch kernel calls it."""
    packing = load_file(packing_utils, "awq_packing_utils")

    def dequantize(reader: CheckpointReader, name: str, shape: tuple[int, int]) -> torch.Tensor:
        words, zeros, scales = (reader.tensor(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales"))
        group = shape[1] // scales.shape[0]
        # float32 scales: in float16 the library would round the products, which says nothing of the file
        return packing.dequantize_gemm(words, zeros, scales.float(), 4, group).T

    return dequantize


def autoawq(source: Path) -> Dequantize:
    """AutoAWQ."""
    return awq_dequantize(source / "awq" / "utils" / "packing_utils.py")


def autogptq(source: Path) -> Dequantize:
    """``QuantLinear`` of AutoGPTQ, asked for the product with the identity."""
    module = load_file(source / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda.py", "auto_gptq_qlinear")

    def dequantize(reader: CheckpointReader, name: str, shape: tuple[int, int]) -> torch.Tensor:
        data = reader.config["quantization_config"]
        assert data["checkpoint_format"] == "gptq", "AutoGPTQ 0.7 reads version 1 only"
        linear = module.QuantLinear(data["bits"], data["group_size"], shape[1], shape[0], bias=False)
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            setattr(linear, suffix, reader.tensor(f"{name}.{suffix}"))
        linear.scales = linear.scales.float()
        return linear(torch.eye(shape[1])).T

    return dequantize


def gptqmodel(source: Path) -> Dequantize:
    """gptqmodel: ``convert_gptq_file``, which dequantizes whole files, and its copy of AutoAWQ's function.

    Its ``convert_awq_file`` (7.7.0) is not used: it takes the columns of a word in natural order, unlike its kernels.
    """
    for name in ("gptqmodel", "gptqmodel.utils", "gptqmodel.quantization"):
        package = types.ModuleType(name)  # an empty package: its __init__ would import compiled extensions
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules[name] = package
    # two files of it import compiled or rare packages for printing and device detection, of which one name each is used
    stand_ins = {"logger": ("setup_logger", lambda: logging.getLogger("gptqmodel")), "torch": ("HAS_NPU", False)}
    for file, (attribute, value) in stand_ins.items():
        module = types.ModuleType(f"gptqmodel.utils.{file}")
        setattr(module, attribute, value)
        sys.modules[module.__name__] = module
    library = importlib.import_module("gptqmodel.utils.model_dequant")
    awq = awq_dequantize(source / "gptqmodel" / "quantization" / "awq" / "utils" / "packing_utils.py")
    done: dict[str, dict[str, torch.Tensor]] = {}

    def dequantize(reader: CheckpointReader, name: str, shape: tuple[int, int]) -> torch.Tensor:
        data = reader.config["quantization_config"]
        if data["quant_method"] == "awq":
            return awq(reader, name, shape)
        shard = next(info.shard for key, info in reader.infos.items() if key.startswith(f"{name}."))
        if shard not in done:
            done.clear()
            done[shard] = library.convert_gptq_file(reader.folder / shard, torch.float32, data, "cpu")
        return done[shard][f"{name}.weight"]

    return dequantize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint in AWQ or GPTQ format")
    parser.add_argument("--source", type=Path, required=True, help="unpacked archive or wheel of the library")
    options = parser.parse_args()
    libraries = {"awq": autoawq, "auto_gptq": autogptq, "gptqmodel": gptqmodel}
    found = [name for name in libraries if (options.source / name).is_dir()]
    if len(found) != 1:
        parser.error(f"{options.source}: expected exactly one of the folders {', '.join(libraries)} in it")
    dequantize = libraries[found[0]](options.source.resolve())

    weights = different = 0
    with CheckpointReader(options.folder) as reader:
        ours = format_of(reader.config)
        assert ours is not None, "a float checkpoint"
        schemes = ours.schemes(reader.config, reader.infos, reader.tensor)
        for name, (scheme, shape) in schemes.items():
            names = {suffix: f"{name}.{suffix}" for suffix in ours.suffixes if f"{name}.{suffix}" in reader.infos}
            expected = ours.decode({s: reader.tensor(full) for s, full in names.items()}, scheme, shape).dequantize()
            wrong = int((dequantize(reader, name, shape) != expected).sum())
            weights, different = weights + expected.numel(), different + wrong
            if wrong:
                print(f"{name}: {wrong} of {expected.numel()} weights differ")
    print(f"{ours.name}, {len(schemes)} linears read by {found[0]}: {different} of {weights} weights differ")
    return 1 if different or not weights else 0


if __name__ == "__main__":
    sys.exit(main())
