"""Text: corpora by name or file, token ids, calibration windows."""
