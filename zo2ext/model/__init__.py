"""The units of a model, and the layout of each in one slab."""
