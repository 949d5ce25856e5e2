"""Mutants that change nothing a test could notice, each with the reason; read by mutants.py."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
