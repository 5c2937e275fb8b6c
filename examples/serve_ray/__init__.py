"""Ray Serve: a model and its adapters on many replicas. docs/serve_ray.md tells how to use it."""
