"""Studies: questions answered by many small quantizations of one model, or by a law fitted to such runs."""
