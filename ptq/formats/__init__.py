"""File formats: one object per format, all listed in `ptq.formats.registry`."""
