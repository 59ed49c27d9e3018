"""What is peculiar to each family of models: a file for each, named in tables.MODELS and adapter.REGISTRY."""
