"""Where a model is hard to quantize: outliers, attention heads that do nothing, and what should help."""
