"""What a bit means: formats, roundings, recipes, the oracle. Imports nothing of ours but errors."""
