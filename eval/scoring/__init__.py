"""Predictions to scores, without a model: formats, readings, metrics, protocols, statistics."""
