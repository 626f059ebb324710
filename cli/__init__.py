"""The ``ptq`` command."""
