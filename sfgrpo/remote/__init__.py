"""Rewards behind HTTP, seen from the trainer: what is sent, and to which of several servers.

    wire.py       samples, prompts and metadata as a body, and back
    pictures.py   images as PNG or JPEG, and back
    token.py      the secret that client and server share
    servers.py    several servers: balancing, fail-over, retries, deadlines

The server is `sfgrpo.serving`; `sfgrpo.rewards.http` is its client, `sfgrpo.rewards.vlm` that of
servers which speak OpenAI's protocol.
"""
