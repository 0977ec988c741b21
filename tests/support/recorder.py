"""A receiver of follow-ups, as a process that may be killed: writes down what it had before it answers.

`python -m tests.support.recorder PORT FILE SHARE SECRET` fails SHARE of its requests, answered or not.
"""

import json
import os
import random
import sys

import uvicorn
from standardwebhooks import Webhook
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def main() -> None:
    port, path, share, secret = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    webhook = Webhook(secret)

    async def receive(request: Request) -> Response:
        body = await request.body()
        result = webhook.verify(body, dict(request.headers))  # else it is no line, and 500
        fails = random.random() < share
        line = {"id": request.headers["webhook-id"], "cursor": result["data"]["cursor"], "taken": not fails}
        os.write(file, json.dumps(line).encode() + b"\n")
        return Response(status_code=500 if fails else 204)

    app = Starlette(routes=[Route("/{path:path}", receive, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


if __name__ == "__main__":
    main()
