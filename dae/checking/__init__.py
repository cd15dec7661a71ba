"""`dae check`: everything but the weights, before a run costs anything."""
