"""Decoding steps in one call each, taken over from a model that has read the prompt."""

from __future__ import annotations

import copy
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
        phase: of a model with thresholds of activation sparsity.
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
        self.phase = self.program.phase
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


def first_step(
    model: Any, token: torch.Tensor, arguments: dict[str, Any], position: int, room: int
) -> tuple[torch.Tensor, Stepper | None]:
    """The step behind a prompt, and what goes on from there if it does the same as the model.

    With thresholds of activation sparsity the steps compared are dense ones: which values are pruned hangs on the last
    digit, so that two ways to round to bfloat16 end far apart.

    Args:
        token: int64 ``[1, 1]``.
        arguments: of the model, with its cache; the model's own steps go on with what is in them then.
        position: of the token.
        room: positions to make room for.

    Returns:
        logits ``[vocabulary]``, and None where the model has to go on by itself.
    """
    stepper = take_over(model, arguments["past_key_values"], position, room)
    if stepper is None:
        return model(input_ids=token, **arguments).logits[0, -1], None
    if stepper.phase is None or not stepper.phase.masked:
        logits, entered = _watched_step(model, token, arguments)
        return logits, stepper if stepper.agrees(token, entered, logits) else None
    untouched = copy.deepcopy(arguments["past_key_values"])
    stepper.phase.masked = False
    try:
        dense = take_over(model, arguments["past_key_values"], position, room)
        logits, entered = _watched_step(model, token, arguments)
    finally:
        stepper.phase.masked = True
    if dense is not None and dense.agrees(token, entered, logits):
        stepper.factor = dense.factor
        return stepper(token), stepper
    arguments["past_key_values"] = untouched
    return model(input_ids=token, **arguments).logits[0, -1], None


def _watched_step(model: Any, token: torch.Tensor, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[vocabulary]`` of the model, and what its first block was given."""
    entered: list[torch.Tensor] = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, named: entered.append(args[0] if args else named["hidden_states"]), with_kwargs=True
        )
    )
    try:
        return model(input_ids=token, **arguments).logits[0, -1], entered[0]
    finally:
        hook.remove()
