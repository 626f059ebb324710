"""Whether the model class of a written config.json has a place for every tensor, and a tensor for every place.

transformers drops tensors that a class lacks with no more than a warning: a bias or norm that a pass created would be
lost without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from calibration.errors import ToolkitError
from calibration.model.opening import open_model
from calibration.model.skeleton import build_model, places
from ptq.formats.reading import quantized_linears
from ptq.formats.registry import stored_names


def check_keys(out: Path, source: Collection[str], trust_remote_code: bool = False) -> None:
    """Compare the names in a written checkpoint with those of its model class, on the meta device: parameters, and
    buffers that the source stores.

    Args:
        source: names in the checkpoint it was made from: leftovers there (masks that today's classes compute) may stay.

    Raises:
        ToolkitError: a tensor without a place, or a parameter without a tensor.
    """
    reader, config, spec = open_model(out, trust_remote_code, coded=True)
    fmt, schemes = quantized_linears(reader) or (None, {})
    reader.close()
    model = build_model(config, spec, torch.float32, torch.device("meta"))
    known = places(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = (known - parameters) & {spec.root_module_name(name) for name in source}
    packed = {full for name in schemes if fmt for full in stored_names(fmt, name).values()}
    plain = {spec.root_module_name(name): name for name in reader.infos if name not in packed}
    lost = [name for path, name in plain.items() if path not in known and name not in source]
    held = {spec.root_module_name(f"{name}.weight") for name in schemes} | set(plain)
    missing = [path for path in (parameters | buffers) - held if model.all_tied_weights_keys.get(path) not in held]
    for names, what in ((lost, "has no place in the model class"), (missing, "has no tensor in the written files")):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ToolkitError(
                f"{', '.join(sorted(names)[:4])}{more}: {what} of config.json, and would be lost on loading",
                "this is a bug of ptq: please report it",
            )
