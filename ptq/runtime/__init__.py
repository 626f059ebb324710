"""Running quantized models: `QuantLinear`, its kernels, and a decode loop that measures itself."""
