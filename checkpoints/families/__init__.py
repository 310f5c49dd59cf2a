"""One entry per published family: the model_type of its config.json -> its adapter."""
