"""One file a format that others invented."""
