"""One module for each task, importable without torch; a module's name is the value of `model.task`."""
