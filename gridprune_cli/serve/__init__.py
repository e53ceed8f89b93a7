"""A server that stays warm: OpenAI's chat completions over one model with its cache. Starlette and uvicorn carry it.

A question goes down these files: `http` (connections) -> `gate` (who may ask) -> `app` (routes) -> `chat` (one request,
streams) -> `wire` (JSON to a `ChatRequest`) -> `pictures` (image parts to bytes, `fetching` those of hosts) -> `jobs`
(the queue) -> `work` (the one thread that works) -> `answering` (a batch) -> `replies`. What commands ask goes through
`commands` in place of `chat`, `wire` and `pictures`, and through `command_work` in place of `answering`. Nothing but
`answering` and `command_work` imports torch, and the worker imports them once the server is up.
"""
