"""What no lesson teaches: pictures, files and paths, checkpoints, the embedding of a rare token."""
