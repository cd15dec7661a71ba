"""`dae sample`: a model writes general rows."""
