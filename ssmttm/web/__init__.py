"""The web page and the HTTP and WebSocket API of `ssmttm web`.

Modules import FastAPI in functions only: the extra `web` may be absent.
"""
