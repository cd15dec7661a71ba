"""Losses, summed over response tokens."""
