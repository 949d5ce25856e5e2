"""The record of experiments."""
