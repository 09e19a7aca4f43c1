"""What developers and CI need around the pack: environment, server, demo, checks. Never shipped to users."""
