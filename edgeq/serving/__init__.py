"""The server of ``edgeq serve``: the OpenAI API for models on this machine, and a chat page.

    settings      the settings and limits of a server
    served        a model that is served, with its tokenizer and its slots
    slots         the pool of engines, and the queue of requests that wait for one
    prefix_cache  KV caches of earlier sequences, for prompts that begin with them
    worker        generates one answer on a thread
    failures      errors in the form of the OpenAI API
    fields        the fields of request bodies: their checks and their JSON schemas
    messages      checks the messages of conversations
    tools, tool_families    the syntax in which each model family writes tool calls
    parts, harmony    split an answer into content, reasoning and tool calls
    forms         constraints on an answer: JSON, a JSON schema, a grammar or a tool call
    requests      request bodies of chats and completions
    token_requests    request bodies of ``/tokenize`` and ``/detokenize``
    embeddings    request bodies of ``/v1/embeddings``
    answers       responses and events of chats and completions
    responses     request bodies, responses and events of ``/v1/responses``
    service       the models, metrics and sensors that all endpoints share
    metrics       counters in the text format of Prometheus
    sensors       temperature and power of this machine
    phone         addresses of the chat page as QR codes
    openapi       the OpenAPI document of the server
    app           routes, API keys and limits, on Starlette
    server        starts a server and shuts it down in order

Engines run on threads, one for each slot; everything else runs on one event loop. A request has an
engine to itself and releases it when the request ends, fails, or its client disconnects.
"""
