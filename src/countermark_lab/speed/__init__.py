"""Speed of marking and verifying, as ratios of CPU time in one run."""
