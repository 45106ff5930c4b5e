"""What a run leaves behind, and takes up again."""
