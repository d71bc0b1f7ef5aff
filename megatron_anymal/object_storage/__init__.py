"""Datasets on object storage (S3, GCS, HTTP): requests, read-ahead, and a cache on local disk."""
