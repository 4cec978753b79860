"""Who says what is relevant; one judge per file."""
