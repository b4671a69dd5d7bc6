"""Several processes that make one run: meshes of ranks, their messages and agreements."""
