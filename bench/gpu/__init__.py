"""One run of all that needs a GPU, and the environment that it runs in."""
