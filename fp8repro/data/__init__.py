"""Data sets: images and translation. Randomness is a function of seed, epoch and sample, never of workers."""
