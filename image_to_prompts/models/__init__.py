"""Networks, their weights and checkpoints, and the text encoder."""
