"""Results reach the disk whole or not at all, and nothing is overwritten unasked."""
