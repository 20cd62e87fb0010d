"""The configuration: a folder for every group, `config.yaml` that composes them, and the schema of our own keys."""
