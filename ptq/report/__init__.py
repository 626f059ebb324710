"""Views of a run record: Markdown, one HTML page, a model card, and several runs in one table."""
