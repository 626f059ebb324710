"""Text, models, statistics and measurement. Knows nothing of bits."""
