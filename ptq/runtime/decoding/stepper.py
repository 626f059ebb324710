"""Decoding steps in one call each, taken over from a model that has read the prompt."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import torch

from calibration.errors import ToolkitError
from ptq.runtime.decoding.builder import Unsupported
from ptq.runtime.decoding.native import Inputs, library, run_step
from ptq.runtime.decoding.program import Program, read_program
from ptq.runtime.kernels.rows import ROWS
from ptq.runtime.linear import QuantLinear
from sparsity.decode import DecodeLinear
from sparsity.kernels.int4 import Int4Rows
from sparsity.kernels.native import NATIVE

TOLERANCE = {torch.float32: 0.003, torch.bfloat16: 0.05}
"""Of the first step: how far each block and the head may be from what the model's own makes of the same state, over
what it adds to that state (the head: over the spread of its logits), as norms. Blocks of SmolLM2-135M in 4 bits were
up to 0.0001 away in float32 and 0.008 in bfloat16."""
TOLERANCE_INT8 = 0.1
"""Where inputs are rounded to 8 bits: there 0.03 at most."""
ROUNDED = 2.0**-8
"""Of the norm of a state in bfloat16: what rounding it may change beside that."""


def steps_text(one_call: bool, inputs: Inputs) -> str:
    """How steps were made, as commands say it."""
    if inputs == "int8":
        return "one call each, inputs rounded to 8 bits" if one_call else "the model's own, inputs not rounded"
    return "one call each" if one_call else "the model's own"


def check_inputs(model: Any, inputs: str) -> None:
    """
    Raises:
        ToolkitError: inputs are to be rounded to something else than is known, or no linear is there to do it.
    """
    if inputs not in get_args(Inputs):
        raise ToolkitError(f"inputs '{inputs}'", f"choose one of {', '.join(get_args(Inputs))}")
    if inputs == "int15":
        return
    if model.device.type != "cpu" or not any(map(_multiplies_integers, model.modules())):
        raise ToolkitError(
            f"inputs '{inputs}': no linear of this model multiplies integer codes of its weight in decoding steps",
            "leave it out; it is for weights of 2 to 8 bits on CPUs, loaded for decoding",
        )


def _multiplies_integers(module: torch.nn.Module) -> bool:
    if isinstance(module, DecodeLinear):
        return module.kernel is NATIVE and module.mode == "input" and isinstance(module.weight_rows, Int4Rows)
    return isinstance(module, QuantLinear) and module.kernel == ROWS.name


class Stepper:
    """Decodes one sequence, from behind its prompt. It is the model's own weights that are read, in float32 arithmetic,
    with keys and values in the model's dtype.

    Attributes:
        position: of the next token.
        phase: of a model with thresholds of activation sparsity.
        inputs: to what those of integer codes are rounded.
    """

    def __init__(self, model: Any, cache: Any, position: int, room: int, inputs: Inputs = "int15") -> None:
        """
        Args:
            cache: of transformers, filled by ``position`` tokens.
            room: positions to make room for.
            inputs: to what those of integer codes are rounded.

        Raises:
            Unsupported: the model is not made of the parts that `read_program` knows, or C++ cannot be compiled.
        """
        windows = [getattr(layer, "sliding_window", None) or 0 for layer in cache.layers]
        try:
            library()
            self.program: Program = read_program(model, room, windows, inputs)
        except ToolkitError as error:
            raise Unsupported(error.message) from error
        self.embedding, self.position = model.get_input_embeddings(), position
        self.phase = self.program.phase
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.factor, self.inputs = 1.0, inputs
        self._rounded = ROUNDED if model.dtype == torch.bfloat16 else 0.0
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
        run_step(program.ops, program.work, self.position)
        self.position += 1
        return self._logits()

    def _logits(self) -> torch.Tensor:
        logits = self.program.logits
        return logits if not self.softcap else torch.tanh(logits / self.softcap) * self.softcap

    def agrees(self, token: torch.Tensor, states: list[torch.Tensor], expected: torch.Tensor) -> bool:
        """Make the first step, each block from the model's own state in front of it, and see whether it is the model's.

        So differences do not add up over the depth.

        Args:
            states: what the model's blocks were given for this token, and what the last one gave, each ``[1, 1,
                hidden]``. Some models scale what the embedding gives.
            expected: the model's logits ``[vocabulary]``.
        """
        program = self.program
        flat = [state.float().flatten() for state in states]
        given, plain = flat[0], self.embedding(token).float().flatten()
        if len(flat) != len(program.blocks) + 1 or any(state.shape != program.hidden.shape for state in (*flat, plain)):
            return False
        self.factor = float(given @ plain / (plain @ plain).clamp_min(1e-30))
        self.factor = 1.0 if abs(self.factor - 1) < 1e-6 else self.factor
        distances = [_distance(self.factor * plain, given, given, self._rounded)]
        for first, last, before, behind in zip([0, *program.blocks], program.blocks, flat, flat[1:], strict=False):
            program.hidden.copy_(before)
            run_step(program.ops, program.work, self.position, first, last)
            distances.append(_distance(program.hidden, behind, behind - before, self._rounded))
        program.hidden.copy_(flat[-1])
        run_step(program.ops, program.work, self.position, program.blocks[-1])
        self.position += 1
        expected = expected.float()
        distances.append(_distance(self._logits(), expected, expected - expected.mean(), self._rounded))
        return max(distances) <= max(TOLERANCE[program.keys[0].dtype], TOLERANCE_INT8 if self.inputs == "int8" else 0)


def _distance(found: torch.Tensor, expected: torch.Tensor, part: torch.Tensor, rounded: float) -> float:
    """Of vectors, less what rounding explains, over the norm of ``part``; NaN is far away."""
    norm = torch.linalg.vector_norm
    distance = (norm(found - expected) - rounded * norm(expected)) / norm(part).clamp_min(1e-30)
    return float(distance.nan_to_num(math.inf))


def take_over(model: Any, cache: Any, position: int, room: int, inputs: Inputs) -> Stepper | None:
    """A `Stepper` where the model has one. Classes of another make can fail in any of these ways while being read."""
    try:
        return Stepper(model, cache, position, room, inputs)
    except (Unsupported, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def first_step(
    model: Any,
    token: torch.Tensor,
    arguments: dict[str, Any],
    position: int,
    room: int,
    inputs: Inputs = "int15",
) -> tuple[torch.Tensor, Stepper | None]:
    """The step behind a prompt, and what goes on from there if it does the same as the model.

    With thresholds of activation sparsity the steps compared are dense ones: which values are pruned hangs on the last
    digit, so that two ways to round to bfloat16 end 0.2 apart within one block.

    Args:
        token: int64 ``[1, 1]``.
        arguments: of the model, with its cache; the model's own steps go on with what is in them then.
        position: of the token.
        room: positions to make room for.
        inputs: to what those of integer codes are rounded.

    Returns:
        logits ``[vocabulary]``, and None where the model has to go on by itself.
    """
    stepper = take_over(model, arguments["past_key_values"], position, room, inputs)
    if stepper is None:
        return model(input_ids=token, **arguments).logits[0, -1], None
    if stepper.phase is None or not stepper.phase.masked:
        logits, states = _watched_step(model, token, arguments)
        return logits, stepper if stepper.agrees(token, states, logits) else None
    untouched = copy.deepcopy(arguments["past_key_values"])
    stepper.phase.masked = False
    try:
        dense = take_over(model, arguments["past_key_values"], position, room, inputs)
        logits, states = _watched_step(model, token, arguments)
    finally:
        stepper.phase.masked = True
    if dense is not None and dense.agrees(token, states, logits):
        stepper.factor = dense.factor
        return stepper(token), stepper
    arguments["past_key_values"] = untouched
    return model(input_ids=token, **arguments).logits[0, -1], None


def _watched_step(
    model: Any, token: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits ``[vocabulary]`` of the model, what each of its blocks was given, and what the last one gave."""
    states: list[torch.Tensor] = []
    layers = model.get_decoder().layers

    def entered(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append((args[0] if args else named["hidden_states"]).clone())

    def left(_: Any, args: tuple[Any, ...], given: Any) -> None:
        states.append((given if isinstance(given, torch.Tensor) else given[0]).clone())

    hooks = [layer.register_forward_pre_hook(entered, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(left))
    try:
        return model(input_ids=token, **arguments).logits[0, -1], states
    finally:
        for hook in hooks:
            hook.remove()
