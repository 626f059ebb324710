"""The walk over a model's blocks, and what a pass may ask of it."""
