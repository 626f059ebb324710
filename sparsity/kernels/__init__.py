"""Products with one or a few tokens that read only the weights that are used, behind a dispatcher."""
