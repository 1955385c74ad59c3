"""The shell around both training commands: command line, progress, files. Every side effect, no framework."""
