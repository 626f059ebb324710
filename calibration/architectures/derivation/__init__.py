"""Entries of the architecture table found by running a class with random weights in one block of each kind."""
