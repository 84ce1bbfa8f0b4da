"""What people look at: one self-contained page and the table of a model card, made from plain values."""
