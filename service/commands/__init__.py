"""What a person types: one file a command, and the tree of them."""
