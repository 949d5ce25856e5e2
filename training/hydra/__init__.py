"""Adapters per domain: what they learn from, when they are undone, how they become one."""
