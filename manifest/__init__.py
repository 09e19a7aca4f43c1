"""Which files exist, how large they are, their hashes and licences. Standard library only."""
