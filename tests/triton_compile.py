"""Run by test_triton_compile.py in a process of its own, without the interpreter: every Triton program is compiled for
a GPU, which needs none. The interpreter takes Python that the compiler refuses."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptq.numerics import gptq_triton
from ptq.runtime.kernels import smoothed_triton
from sparsity.kernels import triton_products as products

TARGET = GPUTarget("cuda", 80, 32)
TYPES = {
    **dict.fromkeys(("w_ptr", "codes", "zero"), "*u8"),
    **dict.fromkeys(("words",), "*i32"),
    **dict.fromkeys(("q_ptr",), "*i8"),
    **dict.fromkeys(("order_ptr",), "*i64"),
    **dict.fromkeys(("x", "wt", "w", "gate", "h", "scale"), "*bf16"),
    **dict.fromkeys(("tokens", "n_in", "n_out", "line", "group", "groups", "columns", "outputs", "out"), "i32"),
}
"""Of arguments by name; others are float32."""


def check(program: Any, constants: dict[str, Any], types: dict[str, str] | None = None, **options: Any) -> None:
    names = program.arg_names
    known = {**dict.fromkeys(names, "*fp32"), **TYPES, **(types or {}), **dict.fromkeys(constants, "constexpr")}
    indexed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=program, signature={name: known[name] for name in names}, constexprs=indexed)
    assert triton.compile(source, target=TARGET, options=options).asm["cubin"]


def main() -> None:
    codes = {"SHIFT": 8.0, "LOWEST": 0.0, "HIGHEST": 15.0, "ROWS": gptq_triton.ROWS}
    for more, columns in ((False, 128), (True, 256)):
        grid = {"HAS_ZERO": more, "FLOAT_ZERO": more, "HAS_P": more, "COLUMNS": columns}
        floats = {"w": "*fp32", "zero": "*fp32"}
        check(gptq_triton._program, {**codes, **grid}, floats, enable_fp_fusion=False)
    tile = {"BT": smoothed_triton.TOKENS, "BN": smoothed_triton.OUTPUTS, "BK": smoothed_triton.COLUMNS}
    check(smoothed_triton._program, {"GROUP": 128, **tile})
    for tokens in (1, 3):
        one = {"tokens": 1} if tokens == 1 else {}  # Triton compiles for a 1 apart
        inputs = {**one, "T_STEP": 0, "C_STEP": tokens - 2, "B": 1 if tokens == 1 else 4, "BLOCK_IN": 32}
        outputs = {**one, "T_STEP": tokens - 2, "HAS_BIAS": tokens > 1, "B": 1 if tokens == 1 else 4, "BLOCK_OUT": 16}
        check(products.input_product, {**inputs, "BLOCK_OUT": 128})
        check(products.output_product, {**outputs, "BLOCK_IN": 128})
        check(products.int4_input_product, {**inputs, "HAS_ZERO": tokens > 1, "BLOCK_WORDS": 16})
        check(products.int4_output_product, {**outputs, "HAS_ZERO": tokens > 1})
    sys.stdout.write("all compiled\n")


if __name__ == "__main__":
    main()
