"""The methods, by the names that recipes and ``--method`` use."""

from __future__ import annotations

from calibration.passes import Pass
from ptq.methods.awq import Awq
from ptq.methods.gptq import Gptq
from ptq.methods.lorc import Lorc
from ptq.methods.rtn import Rtn

METHODS: dict[str, type[Pass]] = {"rtn": Rtn, "gptq": Gptq, "awq": Awq, "lorc": Lorc}

__all__ = ["METHODS", "Awq", "Gptq", "Lorc", "Rtn"]
