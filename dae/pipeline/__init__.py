"""`dae run`: stages in a row, each a command of its own."""
