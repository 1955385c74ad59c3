"""The parity harness: the only code that imports both sides."""
