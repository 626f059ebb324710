"""Post-training quantization of large language models."""
