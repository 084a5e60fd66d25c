"""The training halves of the schemes: what needs torch, one file a scheme, loaded on demand."""
