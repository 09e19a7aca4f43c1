"""The route behind the button Finish now: it lets a training end after its present step, and nothing else."""

from __future__ import annotations

from typing import Any

ROUTE = "/language_bridge/finish"
_LONGEST_NAME = 200


def register() -> None:
    """Adds the route to the server that the pack is loaded into; without a server there is nothing to do."""
    try:
        import server as host_server
    except ImportError:
        return
    server, web = getattr(host_server.PromptServer, "instance", None), host_server.web
    if server is None:
        return

    @server.routes.post(ROUTE)
    async def finish(request: Any) -> Any:
        """{"run": name} to {"finishing": whether a training of that name is under way}."""
        try:
            body: Any = await request.json()
        except ValueError:
            body = None
        run = body.get("run") if isinstance(body, dict) else None
        if not isinstance(run, str) or len(run) > _LONGEST_NAME:
            return web.json_response(
                {"error": "a JSON object with the name of a run is expected"}, status=400
            )
        from ..host import training

        return web.json_response({"finishing": training.finish(run.strip())})
