"""A server of the usual chat-completions form, for any engine, and an engine for many requests.

`engine`      what the server asks of an engine, and the tokens that go from one to the other
`chat`        messages as tokens, and tokens as text
`request`     the body of a request, checked
`answer`      the answer, at once or as events, while the client is there
`app`         the routes

`batching`    an engine: one thread, whose steps answer many requests
`pool`        the texts that a cache holds, and the steps that read them
`sequences`   what each text has to read, and with whom it shares pages
`row`         one step of the model

The server needs the extra "serve": pip install "pasa-jax[serve]".
"""
