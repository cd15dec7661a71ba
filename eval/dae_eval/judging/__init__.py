"""MT-Bench and AlpacaEval: answers of a model, judged by another."""
