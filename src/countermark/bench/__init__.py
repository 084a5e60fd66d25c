"""What measures the rest: host models, data sets, training, experiments, the demo and the speed."""
