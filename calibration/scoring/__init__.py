"""Perplexity, divergence and tasks: windows, protocols, sums."""
