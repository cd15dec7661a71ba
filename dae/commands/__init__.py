"""The commands beside `dae align`: parse, call one function, print."""
