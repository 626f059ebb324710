"""Products with quantized weights, one file per kernel; `dispatch` picks the first that can run."""
