"""Training halves of the schemes: their torch code, one file a scheme, loaded on demand."""
