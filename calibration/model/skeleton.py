"""The model class with its parameters on the meta device; parameters come and go one segment at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from calibration.architectures.spec import ArchitectureSpec
from calibration.errors import ToolkitError, foreign
from calibration.model.classes import empty_model
from calibration.model.experts import ExpertList
from calibration.model.headers import TensorInfo


def build_model(config: Any, spec: ArchitectureSpec, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers language model without weights, see `empty_model`, whose experts are `ExpertList` modules."""
    kind = getattr(config, "model_type", "unknown")
    what = f"config.json: the class of model_type '{kind}' cannot be built from it"
    with foreign(what, "compare it with the model's original config"):
        model = empty_model(config, dtype, device, spec.attention)
    blocks = model.get_submodule(spec.blocks)
    for index in range(spec.n_blocks):
        experts = spec.experts(index)
        if experts is not None:
            with torch.device("meta"):
                replacement = ExpertList(experts).to(dtype)
            set_submodule(blocks[index], experts.module, replacement)
    return model


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` below ``root``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def load_parameters(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set parameters or buffers of ``root`` by name, without copying; names and shapes must exist.

    Raises:
        KeyError: ``root`` has no such parameter or buffer.
        ToolkitError: the shapes differ.
    """
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = root.get_submodule(parent)
        slot = module._parameters.get(leaf, module._buffers.get(leaf))
        if slot is None:
            raise KeyError(name)
        if slot.shape != tensor.shape:
            raise _misfit(name, tensor.shape, slot.shape)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor


def places(model: nn.Module) -> frozenset[str]:
    """Names of parameters and of the buffers that files store."""
    return frozenset(model.state_dict())


def check_placed(infos: Mapping[str, TensorInfo], model: nn.Module, spec: ArchitectureSpec) -> None:
    """Refuse a checkpoint whose blocks hold tensors that the model class has no place for: they would vanish.

    Masks and frequencies that older classes stored and today's compute are left out.

    Raises:
        ToolkitError: names them.
    """
    known = places(model)
    lost = [
        name
        for name, info in infos.items()
        if spec.block_of(name) is not None and spec.root_module_name(name) not in known and not _computed(name, info)
    ]
    if lost:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        raise ToolkitError(
            f"{', '.join(lost[:4])}{more}: in the checkpoint, but {type(model).__name__} of config.json has no place "
            "for it, and it would be lost",
            "compare config.json (biases, model_type) with the model's original; if the model class is too old, update "
            "transformers",
        )


def _computed(name: str, info: TensorInfo) -> bool:
    leaf = name.rpartition(".")[2]
    mask = len(info.shape) == 4 and info.shape[:2] == (1, 1)
    return mask or leaf in ("inv_freq", "masked_bias", "original_inv_freq")


def _misfit(name: str, stored: Sequence[int], expected: Sequence[int]) -> ToolkitError:
    return ToolkitError(
        f"{name}: shape {tuple(stored)}, the model of config.json has {tuple(expected)}",
        "config.json and weights do not belong together: fetch both again",
    )


def release(root: nn.Module) -> None:
    """Drop all parameters of ``root`` to meta."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


class Skeleton:
    """A model that is walked block by block.

    Attributes:
        spec: the architecture table's entry.
        model: the model class, see `build_model`.
        dtype, device: of forward passes.
    """

    def __init__(self, config: Any, spec: ArchitectureSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.model = build_model(config, spec, dtype, device)
        self._places = places(self.model)

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.spec.blocks)[index]

    def check_complete(self, infos: Mapping[str, TensorInfo], added: Collection[str] = ()) -> None:
        """Refuse a checkpoint that lacks parameters or has them in another shape, which would fail far from the cause.

        Args:
            infos: headers of all tensors of the checkpoint.
            added: names in the checkpoint of parameters that passes make.

        Raises:
            ToolkitError: names what is missing, or the first shape that differs.
        """
        stored = {self.spec.root_module_name(n): info for n, info in infos.items()}
        tied = self.model.all_tied_weights_keys  # {"lm_head.weight": "model.embed_tokens.weight"} where tied
        missing = [n for n, _ in self.model.named_parameters(remove_duplicate=False) if n not in stored]
        made = {self.spec.root_module_name(n) for n in added}
        missing = [n for n in missing if n not in made and not {tied.get(n)} & (stored.keys() | made)]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ToolkitError(
                f"{', '.join(missing[:4])}{more}: not in the checkpoint, and the model has no other source for it",
                "fetch the checkpoint again; if it is complete, load it with AutoModelForCausalLM.from_pretrained and "
                "save it with save_pretrained, which writes every tensor under today's name",
            )
        check_placed(infos, self.model, self.spec)
        for name, parameter in self.model.named_parameters():
            if name in stored and stored[name].shape != tuple(parameter.shape):
                raise _misfit(name, stored[name].shape, parameter.shape)

    def stem_names(self, names: Iterable[str]) -> list[str]:
        """Of the checkpoint names, those that must be in memory to run everything before the blocks."""
        outside = (n for n in names if self.spec.block_of(n) is None)
        return [n for n in outside if not self.spec.root_module_name(n).startswith("lm_head.") and self._has(n)]

    def _has(self, name: str) -> bool:
        """Whether the class has a parameter or a stored buffer of this name."""
        return self.spec.root_module_name(name) in self._places

    def block_has(self, index: int, name: str) -> bool:
        """The same for a block-relative checkpoint name."""
        return self._has(self.spec.prefix(index) + name)
