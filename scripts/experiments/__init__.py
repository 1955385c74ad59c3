"""The benchmark, the comparison page and the studies, and what they share."""
