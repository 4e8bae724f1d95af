"""A run's settings: what there is, what people choose, and one-line errors for what they may not."""
