"""One zeroth-order step of a model, and what reads the weights between steps."""
