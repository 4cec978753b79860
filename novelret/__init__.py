"""Finetune a deployed dense retriever for novelty."""
