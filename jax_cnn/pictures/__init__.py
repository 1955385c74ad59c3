"""Pictures from files: read, prepared as the training images were, and compared with them."""
