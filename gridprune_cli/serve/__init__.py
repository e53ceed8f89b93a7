"""A server that stays warm: OpenAI's chat completions over one model with its cache. Starlette and uvicorn carry it.

A request goes down these files: `http` (connections) -> `app` (routes, streams) -> `wire` (JSON to a `ChatRequest`) ->
`pictures` (image parts to bytes) -> `work` (the queue, and the one thread that prunes and generates) -> back through
`wire`. Nothing but `work` imports torch, and only once the server is up.
"""
