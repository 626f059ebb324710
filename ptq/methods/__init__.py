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
from ptq.methods.gptq import Gptq
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

DEFAULT_SCHEMES: dict[str, str] = {
    "fp4": "fp4-e2m1-g128",
    "ptq1.61": "w1a16-salient20",
    "smoothquant": "w8a8",
    "outliertune": "w8a8-asym",
    "repquant": "w8a8",
    "rotate": "w4a4",
    "rs": "w4a4",
}
"""What ``--method`` alone means, for methods that are not about 4-bit integer weights alone; the first pass decides."""

__all__ = [
    "COMBINATIONS",
    "DEFAULT_SCHEMES",
    "METHODS",
    "AdaDim",
    "AdaDimPublished",
    "AdaQuant",
    "Awq",
    "BiasCorrect",
    "Equalize",
    "ExponentShift",
    "Fp4",
    "Gptq",
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
