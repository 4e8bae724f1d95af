"""Translation data: text, vocabulary, data sets and batches. Randomness is a function of (seed, epoch) alone."""
