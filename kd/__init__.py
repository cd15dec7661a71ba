"""Knowledge distillation for causal language models: data, roles, losses, trainer and the upstream stages."""
