"""The verbs of the command line as functions: what ``edgeq.<verb>`` is in Python.

    run        continue a prompt or answer it, and hold a conversation
    serve      an OpenAI-compatible server, and a chat page
    evaluate   accuracy on a question set or labeled samples, perplexity of a text
    bench      tokens per second as llama-bench measures them; inferences per second of graphs
    profile    where time, memory and energy go; reports of saved profiles and sweeps
    devices    profiles of devices, this machine, and what fits on them
    doctor     what works on this machine, and how to fix what does not
    inspect    what is in a model file
    quantize   a language model to an artifact, a graph to a QDQ file
    calibrate  statistics of activations, and the loss from quantizing each tensor
    sweep      recipes on models in parallel

Functions take paths or opened objects, return objects or records that JSON can hold, print nothing
and raise `edgeq.EdgeqError`. The command line parses options, calls these and prints the result.
"""
