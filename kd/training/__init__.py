"""The objective, transformers.Trainer around it, and what every stage does before and after."""
