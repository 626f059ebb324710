"""The public functions, which ``import ptq`` names: arguments of Python's own kinds in, one dataclass out."""
