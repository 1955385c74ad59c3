"""The speed benchmark: the same training steps in both frameworks, measured in turns."""
