"""Dead letters: how they are written, read back and sent to the input again."""
