"""What a run will do, decided from headers alone."""
