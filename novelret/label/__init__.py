"""Candidates, prompts, judges and the judgement store."""
