"""Reading and writing files, local and remote."""
