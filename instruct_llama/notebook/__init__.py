"""What the notebooks show: plots, widgets, their style, and the tour that executes them all."""
