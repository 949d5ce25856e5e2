"""Search over how to train, tried before it is kept; knows nothing of the trainer."""
