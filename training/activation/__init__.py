"""What backward keeps of activations: codes, slots of saved tensors, exact inversion."""
