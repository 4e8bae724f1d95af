"""Run records, comparison tables and figures; reads what training wrote and computes no result of its own."""
