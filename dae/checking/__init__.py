"""`dae check`: everything that can be checked without loading weights."""
