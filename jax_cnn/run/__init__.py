"""The run loop that both training commands share: command line, progress, files. It imports neither framework."""
