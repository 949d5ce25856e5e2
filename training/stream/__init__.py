"""The stream of training batches: sources mixed, cleaned, packed, and resumable at every batch."""
