"""Where quantization and activation sparsity meet: joint recipes, masked scoring, sparse decoding."""
