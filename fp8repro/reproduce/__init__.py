"""The plan that reproduces the whole paper: its cells, the processes that run them, and how far they are."""
