"""Features that others have computed, made into a dataset."""
