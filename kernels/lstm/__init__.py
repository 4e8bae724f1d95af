"""LSTM cells."""
