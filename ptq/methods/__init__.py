"""The methods, by the names that recipes and ``--method`` use."""

from __future__ import annotations

from calibration.walk.passes import Pass
from ptq.methods.adadim import AdaDim, AdaDimPublished
from ptq.methods.adaquant import AdaQuant
from ptq.methods.awq import Awq
from ptq.methods.bias_correct import BiasCorrect
from ptq.methods.equalize import Equalize
from ptq.methods.exponent_shift import ExponentShift
from ptq.methods.fp4 import Fp4
from ptq.methods.gptaq import Gptaq
from ptq.methods.gptq import Gptq
from ptq.methods.hqq import Hqq
from ptq.methods.lorc import Lorc
from ptq.methods.norm_tweak import NormTweak
from ptq.methods.outliertune import OutlierTune
from ptq.methods.ptq161 import Ptq161
from ptq.methods.ranges import Ranges
from ptq.methods.repquant import RepQuant
from ptq.methods.rotate import Rotate
from ptq.methods.rs import Rs
from ptq.methods.rtn import Rtn
from ptq.methods.signround import SignRound
from ptq.methods.smoothquant import SmoothQuant

METHODS: dict[str, type[Pass]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "gptaq": Gptaq,
    "hqq": Hqq,
    "awq": Awq,
    "adadim": AdaDim,
    "adadim-published": AdaDimPublished,
    "fp4": Fp4,
    "adaquant": AdaQuant,
    "ptq1.61": Ptq161,
    "equalize": Equalize,
    "exponent-shift": ExponentShift,
    "signround": SignRound,
    "lorc": Lorc,
    "norm-tweak": NormTweak,
    "smoothquant": SmoothQuant,
    "rotate": Rotate,
    "rs": Rs,
    "ranges": Ranges,
    "bias-correct": BiasCorrect,
    "outliertune": OutlierTune,
    "repquant": RepQuant,
}

COMBINATIONS: dict[str, tuple[str, ...]] = {
    "rtn-ada": ("adadim", "rtn"),
    "gptq-ada": ("adadim", "gptq"),
    "rrs": ("rotate", "rs", "gptq"),
}
"""Names in the literature for passes in a row, as ``--method`` takes them; the last one rounds. A rounding pass behind
the name takes its place: ``rrs+rtn``."""

__all__ = [
    "COMBINATIONS",
    "METHODS",
    "AdaDim",
    "AdaDimPublished",
    "AdaQuant",
    "Awq",
    "BiasCorrect",
    "Equalize",
    "ExponentShift",
    "Fp4",
    "Gptaq",
    "Gptq",
    "Hqq",
    "Lorc",
    "NormTweak",
    "OutlierTune",
    "Ptq161",
    "Ranges",
    "RepQuant",
    "Rotate",
    "Rs",
    "Rtn",
    "SignRound",
    "SmoothQuant",
]
