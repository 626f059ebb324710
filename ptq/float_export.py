"""A quantized checkpoint, or a GGUF file, as the float checkpoint that it stands for."""

from __future__ import annotations

import json
from pathlib import Path

from calibration.errors import ToolkitError
from calibration.model.checkpoint import write_atomically
from calibration.model.gguf import GgufReader
from calibration.model.opening import fingerprint, locate, open_model
from calibration.model.shards import ShardWriter
from calibration.progress import Progress, Silent
from ptq.conversion import Exported, move_thresholds
from ptq.formats.gguf import check_target
from ptq.formats.native import WEIGHTS_KEY
from ptq.formats.write import copy_small_files
from ptq.runtime.dequantized import float_weights
from ptq.session import Session
from sparsity.files import load_sparsity


def export_float(
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the dequantized weights of ``model`` as a plain Hugging Face checkpoint in its own dtype. Activation
    thresholds go with it.

    What quantizes inputs or the KV cache while the model runs is no part of a weight and does not remain.

    Raises:
        ToolkitError: the model is float already, or its weights expect inputs in another basis.
    """
    check_target(out, "float")
    folder, progress = locate(model), progress or Silent()
    session = Session(Path(out))
    session.check(overwrite, resume=False, source=folder, resumable=False)
    reader, _, spec = open_model(folder, trust_remote_code, coded=True)
    if "quantization_config" not in reader.config and not isinstance(reader, GgufReader):
        raise ToolkitError(f"{folder}: a float checkpoint already", "copy the folder, or use --format gguf")
    sparsity = load_sparsity(folder)
    source = float_weights(reader, spec)
    session.begin({"export": fingerprint(reader), "format": "float"}, resume=False)
    with session.unless_done():
        progress.stage("export", len(source.infos))
        writer = ShardWriter(session.partial)
        for name in source.infos:
            writer.add(reader.stored_name(name), source.tensor(name))
            progress.advance(name)
        writer.finish()
        source.close()
        config = {k: v for k, v in reader.config.items() if k not in ("quantization_config", WEIGHTS_KEY)}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomically(session.partial / "config.json", text.encode())
        copy_small_files(folder, session.partial)
        if sparsity is not None:
            move_thresholds(sparsity, session.partial)
        session.finish()
    return Exported(Path(out), "float", 0)
