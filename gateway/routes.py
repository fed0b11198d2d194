"""Routes whose endpoints take the request and give the response, found by their whole path at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["DescribedRoute", "ExactPaths"]


class DescribedRoute(APIRoute):
    """FastAPI describes it; its endpoint takes the request and gives the response by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # There are no parameters to look for in each request, and nothing to clean up after one;
        # the application handles what is raised.
        self.app = self.answer

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


class ExactPaths:
    """ASGI app: a route without parameters in its path needs no search; all else is the router's."""

    def __init__(self, router: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._router = router
        self._routes: dict[tuple[Any, Any], DescribedRoute] = {
            (method, route.path): route
            for route in reversed(routes)  # the first of two is the one that counts
            if isinstance(route, DescribedRoute) and "{" not in route.path
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope.get("method"), scope.get("path")))
        if route is None:
            await self._router(scope, receive, send)
            return
        scope["route"] = route
        await route.answer(scope, receive, send)
