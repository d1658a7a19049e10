"""Selected attention: exact softmax over the tokens of the blocks that a query selected."""
