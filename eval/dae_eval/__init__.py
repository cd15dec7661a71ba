"""Evaluation: lm-eval suites on loaded models, and the two numbers that sum them up."""
