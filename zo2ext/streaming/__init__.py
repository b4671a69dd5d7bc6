"""How weights rest and move: stores, devices, and the pipeline between them."""
