"""Large networks that the harness is measured on, and their ports to Flax."""
