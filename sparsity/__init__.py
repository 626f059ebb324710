"""Activation sparsification. Its methods join the recipe as ``GATE`` passes."""
