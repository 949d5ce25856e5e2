"""Replay of completions that passed: which, when, and whether it helps."""
