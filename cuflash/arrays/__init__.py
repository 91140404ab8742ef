"""The caller's arrays: borrowed without a copy, and made of the same kind. Knows nothing of attention."""
