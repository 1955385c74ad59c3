"""Pictures from files: read, taken out of a frame, prepared as the training images were, and compared with them."""
