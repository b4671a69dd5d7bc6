"""Steps of a zeroth-order run, and access to the weights between them."""
