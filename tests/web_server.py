"""A server of `ssmttm web` in a thread of this process, on a port of its own."""

import threading
from contextlib import contextmanager

from ssmttm.web.app import create_app
from ssmttm.web.limits import Limits
from ssmttm.web.serve import bind, make_server


@contextmanager
def run_server(pipelines, limits=None):
    """Yield the server's port and its `Service`."""
    limits = limits or Limits()
    app = create_app(pipelines, limits)
    server = make_server(app, limits)
    with bind("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1], app.state.service
        finally:
            server.should_exit = True
            thread.join(10)
