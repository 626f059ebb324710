"""Pure functions on tensors. Imports torch and nothing else of this project but the scheme types."""
