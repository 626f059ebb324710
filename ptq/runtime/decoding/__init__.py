"""Decoding a sequence token by token in one call per step: kernels, the list of a model's operations, and the loop."""
