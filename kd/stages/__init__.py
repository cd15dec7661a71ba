"""The training stages: recipe, data, roles, objective."""
