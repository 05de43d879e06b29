"""One file for each format that others invented."""
