"""Built-in models, data sets and the training loop that `embed`, `demo` and `check` use."""
