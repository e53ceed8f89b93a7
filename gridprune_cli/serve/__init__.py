"""A server that stays warm: OpenAI's chat completions over one model with its cache. Starlette and uvicorn carry it.

A request goes down these files: `http` (connections) -> `app` (routes, streams) -> `wire` (JSON to a `ChatRequest`) ->
`pictures` (image parts to bytes) -> `jobs` (the queue) -> `work` (the one thread that works) -> `answering` (a batch)
-> `replies`. Nothing but `answering` imports torch, and the worker imports it once the server is up.
"""
