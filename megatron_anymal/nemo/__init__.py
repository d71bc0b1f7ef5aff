"""NeMo around the engine: launch, run folder, loggers, model classes. The only place that imports NeMo or Lightning."""
