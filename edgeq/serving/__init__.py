"""The server of ``edgeq serve``: OpenAI's interface to models on this machine, and a chat page.

    settings      what a server is asked to do, and its limits
    served        a model that is served: its tokenizer, its slots
    slots         engines, who gets the next one, and who waits
    prefix_cache  caches of sequences that left their engine
    worker        one answer, generated on a thread
    failures      errors as OpenAI's clients know them
    fields        the fields of request bodies: their checks and their schemas
    messages      conversations, checked
    tools         how models write calls of tools
    parts         an answer taken apart: what is said, thought and called
    forms         what an answer is asked to be: JSON, a grammar, a call
    requests      bodies of requests as jobs
    token_requests bodies of ``/tokenize`` and ``/detokenize``
    answers       generated text as OpenAI's objects and events
    service       what all endpoints share
    responses     the same in OpenAI's newer form
    metrics       counters in Prometheus' format
    sensors       temperature and power of this machine
    openapi       the document that describes the interface
    app           routes, keys and limits, on Starlette
    server        runs all of it, and ends it in order

Engines run on threads, one for each slot; everything else runs on one event loop. An engine belongs
to one request at a time, and a request that ends, fails or loses its client gives it back.
"""
