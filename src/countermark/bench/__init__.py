"""Host models, data sets, training, experiments, the demo, and measurements of speed."""
