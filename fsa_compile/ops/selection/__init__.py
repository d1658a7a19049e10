"""Block selection: which blocks a query attends to, from its compressed attention."""
