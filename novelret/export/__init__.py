"""Finetuned query encoders for where they are served; one form per file."""
