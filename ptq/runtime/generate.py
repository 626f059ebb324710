"""A decode loop that measures itself, and the machine's read bandwidth to hold its speed against.

Decoding one sequence reads every weight once per token, so ``bytes of weights * tokens/s`` over the read bandwidth
is the share of the possible that is reached. A share above 1 means that weights stayed in a cache.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from calibration.bounds import check_amounts, check_counts
from calibration.errors import ToolkitError
from calibration.memory import peak_rss_bytes
from calibration.model.classes import rope_switch
from calibration.shown import Shown
from calibration.text.encoding import prompt_ids
from ptq.runtime.decoding.native import Inputs
from ptq.runtime.decoding.stepper import Stepper, check_inputs, first_step, steps_text

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer shows for bytes of an unfinished character


@dataclass(frozen=True, repr=False)
class Generation(Shown):
    """What was generated and how fast.

    Attributes:
        text: the new text, without the prompt and without special tokens.
        prompt_tokens, new_tokens: counts; an end-of-text token is counted.
        prefill_seconds: from the call of the model on the prompt to the first new token.
        decode_tokens_per_second: (n - 1) / (t_last - t_first); None where fewer than two tokens were generated.
        weight_bytes_read_per_token: see `weight_bytes_per_token`.
        peak_rss_bytes: highest resident set of the process so far.
        linears: how they were computed, as `Loaded.path` says.
        one_call: steps were one call each, see `decode_tokens`.
        inputs: what these rounded inputs of integer codes to.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    weight_bytes_read_per_token: int
    peak_rss_bytes: int
    linears: str = ""
    one_call: bool = False
    inputs: Inputs = "int15"

    @property
    def steps(self) -> str:
        """``one call each`` or ``the model's own``, and that inputs were rounded to 8 bits, or not though asked for"""
        return steps_text(self.one_call, self.inputs)

    def facts(self) -> Mapping[str, object]:
        speed = self.decode_tokens_per_second
        return {
            "text": self.text,
            "tokens": f"{self.new_tokens} behind {self.prompt_tokens} of prompt",
            "speed": "" if speed is None else f"{speed:.1f} tokens/s",
            "first token": f"after {self.prefill_seconds:.2f} s",
            "linears": self.linears,
            "steps": self.steps,
            "weights read": f"{self.weight_bytes_read_per_token / 1e6:.1f} MB per token",
        }

    def bandwidth_share(self, bytes_per_second: float) -> float | None:
        """Weights read per second over ``bytes_per_second`` (of `read_bandwidth`)."""
        if self.decode_tokens_per_second is None:
            return None
        return self.weight_bytes_read_per_token * self.decode_tokens_per_second / bytes_per_second


def weight_bytes_per_token(model: torch.nn.Module) -> int:
    """Bytes of weights that decoding one token reads.

    Every parameter, and the ``weight_bytes`` of modules that have such a count (`QuantLinear`), each once. Embedding
    tables count only where another module shares them (a tied head reads the whole table; a look-up reads one row).
    Parameters under a module called ``experts`` count by the share of experts that a token is sent to.
    """
    config: Any = getattr(model, "config", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    share = active / experts if experts and active else 1.0
    seen: dict[int, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        part = share if ".experts." in f".{name}." else 1.0
        counted = getattr(module, "weight_bytes", None)
        if counted is not None:
            seen[id(module)] = counted * part
            continue
        for tensor in module.parameters(False):
            if tensor.numel():
                seen[tensor.data_ptr()] = tensor.nbytes * part
    return round(sum(seen.values()))


def read_bandwidth(buffer_bytes: int = 2**30, repeats: int = 7) -> float:
    """The CPU's sequential read bandwidth in bytes per second, with torch's current number of threads.

    The best of ``repeats`` float32 sums and as many dot products over a buffer: reductions that read every byte once
    and write nothing; which of them streams faster depends on the machine. Measure on an idle machine, close to the
    decoding it is held against: a load that comes or goes between the two makes the share meaningless. The buffer
    must be larger than the last-level cache (which servers share between many cores and report whole: 480 MB on
    some), or this measures the cache. It is allocated for the call and freed after it.
    """
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        for read in (buffer.sum, partial(torch.dot, buffer, buffer)):
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


class _Stream:
    """Hands text to a callback as it grows; holds back bytes that are no whole character yet."""

    def __init__(self, tokenizer: Any, callback: Callable[[str], None]) -> None:
        self.tokenizer, self.callback = tokenizer, callback
        self.tokens: list[int] = []
        self.start, self.shown = 0, 0

    def put(self, token: int) -> None:
        self.tokens.append(token)
        # Decoding goes a few tokens back, not to the start: some tokenizers write a word differently at a beginning.
        text = self.tokenizer.decode(self.tokens[self.start :], skip_special_tokens=True)
        if text.endswith(REPLACEMENT):
            return
        if len(text) > self.shown:
            self.callback(text[self.shown :])
        if len(self.tokens) - self.start > 32:
            self.start = len(self.tokens) - 8
            text = self.tokenizer.decode(self.tokens[self.start :], skip_special_tokens=True)
        self.shown = len(text)

    def finish(self) -> None:
        """Show what was held back, so that the pieces join to the whole text."""
        text = self.tokenizer.decode(self.tokens[self.start :], skip_special_tokens=True)
        if len(text) > self.shown:
            self.callback(text[self.shown :])


class Decoded(NamedTuple):
    """What `decode_tokens` made.

    Attributes:
        tokens: new ones, the end token included.
        times: the start, then one for each new token, in seconds.
        one_call: steps behind the second token were one call each.
    """

    tokens: list[int]
    times: list[float]
    one_call: bool


def decode_tokens(
    model: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    end_tokens: frozenset[int] = frozenset(),
    on_token: Callable[[int], None] | None = None,
    fused: bool = True,
    inputs: Inputs = "int15",
) -> Decoded:
    """Token by token after ``input_ids`` int64 ``[1, n]``, with a key-value cache.

    Where a model changes its rotary frequencies at some length (LongRoPE), the cache is made anew there, once.

    Args:
        fused: on CPUs, steps behind the second token are one call each where `stepper` knows the model, the first such
            step having done the same as the model's own.
        inputs: what such steps round those of integer codes to. The first of a sequence that is compared is the
            model's own.
    """
    from transformers import DynamicCache

    arguments: dict[str, Any] = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1  # a prompt needs the head for its last position only
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    tokens: list[int] = []
    times = [time.perf_counter()]
    switch, sequence = rope_switch(model.config), input_ids
    fused = fused and switch is None and input_ids.device.type == "cpu"
    stepper: Stepper | None = None
    room = input_ids.shape[1] + max_new_tokens
    with torch.inference_mode():
        for number in range(max_new_tokens):
            if stepper is not None:
                logits = stepper(input_ids)
            elif fused and number == 1:
                logits, stepper = first_step(model, input_ids, arguments, sequence.shape[1] - 1, room, inputs)
            else:
                logits = model(input_ids=input_ids, **arguments).logits[0, -1]
            if temperature > 0:
                chances = torch.softmax(logits.float() / temperature, dim=-1)
                choice = torch.multinomial(chances, 1, generator=generator)
            else:
                choice = logits.argmax(keepdim=True)
            token = int(choice)  # waits for a GPU
            times.append(time.perf_counter())
            tokens.append(token)
            if on_token is not None:
                on_token(token)
            if token in end_tokens:
                break
            input_ids = choice[None]
            sequence = torch.cat([sequence, input_ids], dim=1)
            if sequence.shape[1] - 1 == switch:
                input_ids, arguments["past_key_values"] = sequence, DynamicCache(config=model.config)
    return Decoded(tokens, times, stepper is not None)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
    linears: str = "",
    inputs: Inputs = "int15",
) -> Generation:
    """Continue ``prompt``: greedy at temperature 0, else sampled from the softmax with ``seed``.

    The model must be in evaluation mode. It stops at the model's end-of-text tokens. ``stream`` is handed the text as
    it grows; the time it takes counts as decoding time. ``linears`` goes into the result; ``inputs`` see
    `decode_tokens`.

    Raises:
        ToolkitError: the prompt is empty, nothing is to be generated, or inputs cannot be rounded so.
    """
    check_inputs(model, inputs)
    input_ids = prompt_ids(tokenizer, prompt).to(model.device)
    check_counts(max_new_tokens=max_new_tokens, seed=seed)
    check_amounts(temperature=temperature)
    if max_new_tokens < 1:
        raise ToolkitError(f"max new tokens: {max_new_tokens}", "ask for at least 1")
    shown = None if stream is None else _Stream(tokenizer, stream)
    on_token = None if shown is None else shown.put
    ends = _end_tokens(model, tokenizer)
    tokens, times, one_call = decode_tokens(
        model, input_ids, max_new_tokens, temperature, seed, ends, on_token, inputs=inputs
    )
    if shown is not None:
        shown.finish()
    return Generation(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        prompt_tokens=input_ids.shape[1],
        new_tokens=len(tokens),
        prefill_seconds=times[1] - times[0],
        decode_tokens_per_second=(len(tokens) - 1) / (times[-1] - times[1]) if len(tokens) > 1 else None,
        weight_bytes_read_per_token=weight_bytes_per_token(model),
        peak_rss_bytes=peak_rss_bytes(),
        linears=linears,
        one_call=one_call,
        inputs=inputs,
    )
