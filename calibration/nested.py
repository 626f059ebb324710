"""Tensors inside of dataclasses, mappings and tuples, which processes hand to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch


def moved(value: Any, device: torch.device) -> Any:
    """A value whose tensors are on a device, none of them part of a larger one."""
    if torch.is_tensor(value):
        value = value.to(device)
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and nbytes(value):
        parts = {f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def nbytes(value: Any) -> int:
    """Bytes of the tensors in a value."""
    if torch.is_tensor(value):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(map(nbytes, value.values()))
    if isinstance(value, tuple):
        return sum(map(nbytes, value))
    return sum(map(nbytes, vars(value).values())) if dataclasses.is_dataclass(value) else 0
