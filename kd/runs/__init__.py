"""Folders that a command writes and goes on with after a stop."""
