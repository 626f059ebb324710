"""The methods, by the names that recipes and ``--method`` use."""

from __future__ import annotations

from calibration.passes import Pass
from ptq.methods.adadim import AdaDim, AdaDimPublished
from ptq.methods.awq import Awq
from ptq.methods.gptq import Gptq
from ptq.methods.lorc import Lorc
from ptq.methods.ranges import Ranges
from ptq.methods.rtn import Rtn

METHODS: dict[str, type[Pass]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "adadim": AdaDim,
    "adadim-published": AdaDimPublished,
    "lorc": Lorc,
    "ranges": Ranges,
}

COMBINATIONS: dict[str, tuple[str, ...]] = {"rtn-ada": ("adadim", "rtn"), "gptq-ada": ("adadim", "gptq")}
"""Names in the literature for passes in a row, as ``--method`` takes them."""

__all__ = ["COMBINATIONS", "METHODS", "AdaDim", "AdaDimPublished", "Awq", "Gptq", "Lorc", "Ranges", "Rtn"]
