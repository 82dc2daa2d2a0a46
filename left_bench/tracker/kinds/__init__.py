"""One module for each tracker; a module's name is the tracker's, and `TRACKER` in it is what `choose` knows of it."""
