"""Native checkpoints in transformers' ``from_pretrained``: floats by transformers, quantized linears by us."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class NativeConfig(QuantizationConfigMixin):
    """``quantization_config`` of a native checkpoint, as it is in config.json."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method: Any = "ptq"  # no member of transformers' enum
        self.settings = settings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the JSON object."""
        config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {"quant_method": self.quant_method, **self.settings}


class NativeQuantizer(HfQuantizer):
    """Leaves quantized modules empty while transformers loads, and then puts ours in their place.

    Attributes:
        requires_calibration: this only reads what ``ptq quantize`` wrote.
    """

    requires_calibration = True
    quantization_config: NativeConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what `ptq.load_model` does and transformers cannot.

        Raises:
            ValueError: weights are spread over devices, or experts are quantized.
        """
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise ValueError("a native checkpoint of ptq is loaded on one device: leave device_map out")
        if any(".experts." in name for name in self.quantization_config.settings["layers"]):
            raise ValueError("transformers keeps experts in one module: use ptq.load_model for this checkpoint")

    def update_attn_implementation(self, config: Any) -> Any:
        """The first call with the config, before files are looked up: the weights have their usual names."""
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from calibration.model.opening import open_model
        from calibration.model.skeleton import set_submodule

        self._folder = Path(kwargs["checkpoint_files"][0]).parent
        _, _, spec = open_model(self._folder)
        names = list(self.quantization_config.settings["layers"])
        paths = [spec.root_module_name(name + ".").removesuffix(".") for name in names]
        table = next((path for path in paths if model.get_submodule(path) is model.get_input_embeddings()), None)
        self._tied = table is not None and bool(model.all_tied_weights_keys)
        for path in paths:
            set_submodule(model, path, _empty(model.get_submodule(path)))
        if self._tied:
            for target in model.all_tied_weights_keys:
                path = target.removesuffix(".weight")
                set_submodule(model, path, _empty(model.get_submodule(path)))
            model.all_tied_weights_keys = {}
        ignored = {rf"^{re.escape(name)}\." for name in (*names, *paths)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ptq.runtime.load import fill_model

        fill_model(model, self._folder, self._tied)
        return model

    def is_serializable(self) -> bool:
        """Kernels have layouts of their own: the folder is the serialized form."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _empty(module: torch.nn.Module) -> torch.nn.Module:
    """A module without parameters, which remembers by what Gemma multiplies embeddings."""
    placeholder = torch.nn.Module()
    if hasattr(module, "scalar_embed_scale"):
        placeholder.scalar_embed_scale = module.scalar_embed_scale
    return placeholder
