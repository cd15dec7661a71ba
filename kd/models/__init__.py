"""Checkpoints and adapters: whether they are whole and belong together, and roles on shared weights."""
