"""What travels: a model's units, and how each lies in one slab."""
