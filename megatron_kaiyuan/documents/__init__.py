"""Documents of one source in an order: ranks by score, sets of them, random and even parts (numpy only)."""
