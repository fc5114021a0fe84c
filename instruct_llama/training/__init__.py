"""What runs the algorithms on a machine: devices, processes, precision, files."""
