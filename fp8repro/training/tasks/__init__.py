"""Kinds of work that the loop trains: classifying images and translating."""
