"""`dae run`: a pipeline of stages, each a command of its own."""
