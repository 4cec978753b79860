"""How a sampled state and its reward become a loss; one file each."""
