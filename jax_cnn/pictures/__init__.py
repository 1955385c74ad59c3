"""From any picture to what the network was trained on: read, prepared, and compared with the training images."""
