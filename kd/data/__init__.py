"""Rows: files and records, chat templates, token rows and masks, the mixture of a run."""
