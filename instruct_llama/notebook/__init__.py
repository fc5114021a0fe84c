"""Plots, widgets and style of the notebooks, and the tour that executes all of them."""
