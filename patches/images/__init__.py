"""Images: from encoded bytes to the tensors that a network reads. Training and prediction run the same lines."""
