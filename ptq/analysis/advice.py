"""From measurements to what should help: rules whose thresholds are constants, so that they can be tested and argued.

A rule fires on inputs of linears only, because that is what gets quantized. It names where it fired; what it says of
methods follows from how they work, not from a run of them. What the plan of this model refuses is not advised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ptq.analysis.record import Advice, SiteRecord, WeightRecord

TOKEN_DISPARITY = 20.0
"""Largest over median |x| of tokens from which one range for all of them wastes more than four bits."""
SAFE_8 = 0.05
"""Relative output error of a linear with 8-bit inputs, one scale per token, up to which nothing need be done."""
WEIGHT_KURTOSIS = 20.0
COLUMN_DISPARITY = 20.0
_NAMED = 6
TRIED = ("rotate", "smoothquant", "rs")
"""Methods that `Advice.helps` names first, of which a plan is made."""
SMOOTHED = {
    "norm": "smoothquant",
    "linear": "smoothquant, with down = true",
    "value": "smoothquant, with values = true",
}
"""What a scale per channel can move into -> the method that moves it."""


Refusal = Callable[[str, str], str | None]
"""(method, scheme) -> why the plan refuses it, None where it does not."""


def advise(
    sites: Sequence[SiteRecord], weights: Sequence[WeightRecord], refusal: Refusal = lambda method, scheme: None
) -> tuple[Advice, ...]:
    """What the rules say, alarms first; the last entry is the recipe to try."""
    inputs = [s for s in sites if s.role.endswith("input")]
    rules: tuple[Callable[[], Advice | None], ...] = (
        lambda: _channels(inputs, balanced=True),
        lambda: _channels(inputs, balanced=False),
        lambda: _first_tokens(inputs),
        lambda: _spikes(inputs),
        lambda: _massive(sites),
        lambda: _weights(weights),
        lambda: _static(inputs, refusal),
    )
    found = [_possible(advice, refusal) for advice in (rule() for rule in rules) if advice is not None]
    return (*found, _recipe(inputs, found, refusal))


def _possible(advice: Advice, refusal: Refusal) -> Advice:
    """The advice, with methods that this model's plan refuses among those that cannot help."""
    helps, cannot = [], list(advice.cannot)
    for said in advice.helps:
        method = said.partition(":")[0].partition(",")[0]
        reason = refusal(f"{method}+rtn", "w8a8") if method in TRIED else None
        if reason is None:
            helps.append(said)
        else:
            cannot.append(f"{method}: {reason}")
    return replace(advice, helps=tuple(helps), cannot=tuple(cannot))


def _channels(inputs: Iterable[SiteRecord], balanced: bool) -> Advice | None:
    hit = [s for s in inputs if s.standout and (s.balanced is not None) == balanced]
    if not hit:
        return None
    channels = sorted({c for s in hit for c in s.standout})
    alarm = max(s.output_error.get("token-8", 0.0) for s in hit) > SAFE_8
    finding = f"{len(channels)} channels are far larger than the others in {_where(hit)}"
    finding += "" if alarm else "; eight bits per token still hold them, fewer may not"
    smooth = "rs: divides by maxima that the channels have in the live input, for inputs of 4 bits"
    if balanced:
        kinds = dict.fromkeys(s.balanced for s in hit if s.balanced is not None)
        moved = [f"{SMOOTHED[kind]}: moves their size into the weights, exactly" for kind in kinds]
        helps = ("rotate: spreads them over all channels", *moved, smooth)
    else:
        helps = (smooth, "inputs of these linears in 16 bits, by a rule of the recipe")
    cannot = ["atoken alone: a channel is large in every token, so its scale is too coarse for all others"]
    if not balanced:
        cannot.append("smoothquant: no norm or linear before these linears can take a scale exactly")
    return Advice("channels", alarm, finding, tuple(channels), helps, tuple(cannot))


def _first_tokens(inputs: Iterable[SiteRecord]) -> Advice | None:
    hit = [s for s in inputs if s.token_disparity > TOKEN_DISPARITY and s.largest.position == 0]
    if not hit:
        return None
    return Advice(
        "first token",
        True,
        f"the first token of a text is up to {max(s.token_disparity for s in hit):.0f} times larger in {_where(hit)}",
        (),
        ("atoken: every token has its own scale",),
        ("atensor, and astatic for these inputs: one range for all tokens is set by the first",),
    )


def _spikes(inputs: Iterable[SiteRecord]) -> Advice | None:
    hit = [s for s in inputs if s.token_disparity > TOKEN_DISPARITY and s.largest.position != 0]
    if not hit:
        return None
    return Advice(
        "spikes",
        True,
        f"a few tokens have single values up to {max(s.token_disparity for s in hit):.0f} times larger than other "
        f"tokens' largest in {_where(hit)}",
        tuple(sorted({s.largest.channel for s in hit})),
        ("rotate: spreads the value over all channels of its token", "atoken: keeps the damage to that token"),
        (
            "atensor, and astatic for these inputs: one range for all tokens is set by the spikes",
            "smoothquant, for these inputs: their channels are small in all other tokens, whose grid it makes coarser",
        ),
    )


def _massive(sites: Iterable[SiteRecord]) -> Advice | None:
    hit = [s for s in sites if s.massive and s.massive.count]
    if not hit:
        return None
    channels = sorted({c for s in hit if s.massive for c, _ in s.massive.channels})
    return Advice(
        "massive activations",
        True,
        f"the residual stream holds massive activations behind {len(hit)} blocks",
        tuple(channels),
        ("atoken, or ranges, which gives the inputs concerned a scale per token",),
        ("percentile clipping of ranges: without these few values the model is another one",),
    )


def _weights(weights: Iterable[WeightRecord]) -> Advice | None:
    hit = [w for w in weights if w.kurtosis > WEIGHT_KURTOSIS or w.column_disparity > COLUMN_DISPARITY]
    if not hit:
        return None
    names = ", ".join(w.name for w in hit[:_NAMED]) + (" ..." if len(hit) > _NAMED else "")
    return Advice(
        "weights",
        True,
        f"{len(hit)} weights have outliers: {names}",
        (),
        ("g64 or g128: a scale per group", "awq and gptq", "rotate"),
        ("gtensor and gchannel at four bits: few weights set the scale of all others",),
    )


STATIC = ("rotate+ranges+gptq", "smoothquant+ranges+gptq", "ranges+gptq")
"""For static inputs, the best first."""


def _static(inputs: Sequence[SiteRecord], refusal: Refusal) -> Advice | None:
    """Static steps for all linears but those that read massive tokens; for engines that take steps from the file."""
    hit = [s for s in inputs if s.token_disparity > TOKEN_DISPARITY]
    method = next((m for m in STATIC if refusal(m, "w8a8-astatic") is None), None)
    if not hit or method is None:
        return None
    few, all_ = (sum(len(s.linears) for s in some) for some in (hit, inputs))
    return Advice(
        "static inputs",
        False,
        f"{few} of {all_} linears read a token too large for a static step that is to serve the others",
        (),
        (f"--method {method} --scheme w8a8-astatic: a step per token for these linears, static steps for the others",),
        (),
    )


EIGHT = (("rotate+gptq", "w8a8"), ("smoothquant+gptq", "w8a8"))
FOUR = (("rrs", "w4a4"), ("rs+gptq", "w4a4"))
"""For 8 bits on both sides and for 4, the best first. A rotation spreads channels and spikes alike, at whichever sites
they are; scales that move into weights or follow the live input are for families whose stream cannot turn, and for
runtimes that do not rotate."""


def _recipe(inputs: Sequence[SiteRecord], found: Sequence[Advice], refusal: Refusal) -> Advice:
    """What to try, the best first; of the recipes for 4 bits the first that the plan takes."""
    worst = max((s.output_error.get("token-8", 0.0) for s in inputs), default=0.0)
    rules = {advice.rule for advice in found if advice.alarm} - {"weights"}
    wanted: tuple[tuple[str, str], ...] = (("rtn", "w8a8"), ("awq+gptq", "w4a16"))
    if rules or worst > SAFE_8:
        wanted = EIGHT + ((("rotate+gptq", "w4a8"),) if "channels" in rules else ())
    accepted = [recipe for recipe in wanted if refusal(*recipe) is None]
    accepted += [recipe for recipe in FOUR if refusal(*recipe) is None][:1]
    recipes = tuple(accepted) or (("rtn", "w8a8"),)
    return Advice(
        "recipe",
        False,
        f"8-bit inputs with a scale per token change outputs by at most {100 * worst:.1f} % in any linear",
        (),
        tuple(f"--method {method} --scheme {scheme}" for method, scheme in recipes),
        (),
        recipes,
    )


def _where(sites: Iterable[SiteRecord]) -> str:
    """``attention input (blocks 0, 1, 2)``, by role."""
    roles: dict[str, list[int]] = {}
    for s in sites:
        roles.setdefault(s.role, []).append(s.block)
    parts = []
    for role, blocks in roles.items():
        named = ", ".join(map(str, blocks[:_NAMED])) + (" ..." if len(blocks) > _NAMED else "")
        parts.append(f"{role} (block{'s' if len(blocks) > 1 else ''} {named})")
    return ", ".join(parts)
