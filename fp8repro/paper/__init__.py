"""What the paper reports, and the plan of runs that stand beside it."""
