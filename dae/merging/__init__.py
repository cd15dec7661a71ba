"""`dae merge`: mixtures of experts, merges of weights, and a full expert as an adapter."""
