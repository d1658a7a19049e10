"""Programs that look like selected attention and are not, or not provably."""
