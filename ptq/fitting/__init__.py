"""``ptq fit``: a scheme per linear under a budget."""
