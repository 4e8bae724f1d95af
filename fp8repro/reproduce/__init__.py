"""Runs the plan of the whole paper: its processes and their progress."""
