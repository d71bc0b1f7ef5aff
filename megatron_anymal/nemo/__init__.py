"""NeMo integration: launch, run folder, loggers, model class. The only package that imports NeMo or Lightning."""
