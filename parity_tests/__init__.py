"""The harness that compares a JAX network with its PyTorch reference, and the tests."""

import os

# JAX would take most of a GPU's memory when it starts, and leave too little for PyTorch in the same process. The
# command starts JAX before it loads the harness, so this comes first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
