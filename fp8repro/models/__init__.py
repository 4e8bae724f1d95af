"""The networks; none of them knows of precision."""
