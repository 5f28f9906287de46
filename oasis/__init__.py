"""What the scripts beside this folder need to run. Nobody has to read it to understand the method."""
