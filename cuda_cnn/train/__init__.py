"""Training, evaluation and pictures of the networks, on data that is always there or that a person names."""
