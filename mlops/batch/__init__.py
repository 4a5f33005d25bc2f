"""Batch sampling: many volumes, shared out among processes that know nothing of each other."""
