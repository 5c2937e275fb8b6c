"""An OpenAI-compatible server in which every request names its own mix of adapters.

    python examples/serve_openai MODEL sql=adapters/sql french=adapters/french

It is transformers' own server, put together from subclasses of its parts; docs/serve_openai.md.

app        the application: transformers' handlers, the errors, the page
fields     which fields of a request are served; all others are refused
engine     continuous batching, in which each request has its adapters and its sampling
models     the model, its adapters and the engine, from start to end
loading    adapters that come and go while the server runs
gate       in front of all that: for whom a request is, the key, its size, and who hangs up
demo       a tiny model with adapters, to try it with
"""
