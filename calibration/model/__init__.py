"""Checkpoints and the model classes they belong to: reading, writing, building."""
