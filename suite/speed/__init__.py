"""Speed: cases, timing, checks against fp64."""
