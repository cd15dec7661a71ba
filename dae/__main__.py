"""`python -m dae` is the command `dae`."""

from dae.cli import main

if __name__ == "__main__":
    main()
