"""Recipes: schema, layering (YAML < flags < key=value), every mistake in one message."""
