"""A server of the usual chat-completions form, for any engine.

`engine`      what the server asks of an engine, and the tokens that go from one to the other
`chat`        messages as tokens, and tokens as text
`request`     the body of a request, checked
`answer`      the answer, at once or as events, while the client is there
`app`         the routes

The server needs the extra "serve": pip install "pasa-jax[serve]".
"""
