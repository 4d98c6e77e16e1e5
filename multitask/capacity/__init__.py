"""What a job would do on a given cluster: measured times of its steps, and an estimate made of them."""
