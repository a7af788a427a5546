"""Which vectors are near to each other."""
