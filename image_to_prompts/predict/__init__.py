"""Whatever turns images into 384 numbers."""
