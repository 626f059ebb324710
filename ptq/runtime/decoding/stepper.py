"""Decoding steps in one call each, taken over from a model that has read the prompt."""

from __future__ import annotations

from typing import Any

import torch

from calibration.errors import ToolkitError
from ptq.runtime.decoding.builder import Unsupported
from ptq.runtime.decoding.native import library, run_step
from ptq.runtime.decoding.program import Program, read_program

TOLERANCE = {torch.float32: 0.003, torch.bfloat16: 0.05}
"""Distance of the first step's logits from the model's own, over their spread, both as norms. A model that rounds every
result to bfloat16 is 0.01 to 0.03 away from what it computes in float32."""


class Stepper:
    """Decodes one sequence, from behind its prompt. It is the model's own weights that are read, in float32 arithmetic,
    with keys and values in the model's dtype.

    Attributes:
        position: of the next token.
    """

    def __init__(self, model: Any, cache: Any, position: int, room: int) -> None:
        """
        Args:
            cache: of transformers, filled by ``position`` tokens.
            room: positions to make room for.

        Raises:
            Unsupported: the model is not made of the parts that `read_program` knows, or C++ cannot be compiled.
        """
        windows = [getattr(layer, "sliding_window", None) or 0 for layer in cache.layers]
        try:
            library()
            self.program: Program = read_program(model, room, windows)
        except ToolkitError as error:
            raise Unsupported(error.message) from error
        self.embedding, self.position = model.get_input_embeddings(), position
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.factor = 1.0
        for layer, keys, values in zip(cache.layers, self.program.keys, self.program.values, strict=True):
            if not isinstance(getattr(layer, "keys", None), torch.Tensor) or layer.keys.shape[1::2] != keys.shape[::2]:
                raise Unsupported("its cache has other shapes")
            known = layer.keys.shape[2]  # a window keeps the last ones
            for own, theirs in ((keys, layer.keys), (values, layer.values)):
                own[:, position - known : position] = theirs[0]

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Logits ``[vocabulary]`` float32 behind ``token`` int64 ``[1, 1]``; valid until the next call."""
        program = self.program
        assert self.position < program.keys[0].shape[1], "there is no room for another position"
        program.hidden.copy_(self.embedding(token)[0, 0])
        if self.factor != 1.0:
            program.hidden.mul_(self.factor)
        run_step(program.ops, len(program.ops), program.work, self.position)
        self.position += 1
        return program.logits if not self.softcap else torch.tanh(program.logits / self.softcap) * self.softcap

    def agrees(self, token: torch.Tensor, entered: torch.Tensor, expected: torch.Tensor) -> bool:
        """Make the first step, and see whether it is the model's.

        Args:
            entered: what the model's first block was given for this token, ``[1, 1, hidden]``: some models scale what
                the embedding gives.
            expected: the model's logits ``[vocabulary]``.
        """
        given, plain = entered.float().flatten(), self.embedding(token).float().flatten()
        if not given.shape == plain.shape == self.program.hidden.shape:
            return False
        self.factor = float(given @ plain / (plain @ plain).clamp_min(1e-30))
        self.factor = 1.0 if abs(self.factor - 1) < 1e-6 else self.factor
        found, expected = self(token), expected.float()
        spread = torch.linalg.vector_norm(expected - expected.mean())
        distance = float(torch.linalg.vector_norm(found - expected) / spread)
        return distance <= TOLERANCE[self.program.keys[0].dtype]


def take_over(model: Any, cache: Any, position: int, room: int) -> Stepper | None:
    """A `Stepper` where the model has one. Classes of another make can fail in any of these ways while being read."""
    try:
        return Stepper(model, cache, position, room)
    except (Unsupported, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None
