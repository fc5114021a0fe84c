"""Training on a machine: the training loop, devices, processes, precision, files."""
