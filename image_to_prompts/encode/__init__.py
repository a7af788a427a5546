"""What frozen models say of images."""
