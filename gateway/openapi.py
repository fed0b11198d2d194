"""The OpenAPI document: bodies and errors are handled by hand, and described here."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
)

__all__ = ["ERROR_RESPONSES", "body_of", "describe"]

_REF = "#/components/schemas/{model}"
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERROR_RESPONSES: dict[int | str, dict[str, object]] = {
    "default": {
        "description": "OpenAI's error object",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    }
}


_BODIES = (ChatRequest, CompletionRequest, ResponseRequest, TokenizeRequest, DetokenizeRequest)


def body_of(model: type[BaseModel]) -> dict[str, object]:
    """The `openapi_extra` of a route that takes this body."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, object]:
    """Build the document once, with the body models among its components."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, models = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template=_REF
        )
        document["components"] = {"schemas": {**models["$defs"], "Error": _ERROR_SCHEMA}}
        app.openapi_schema = document
    return app.openapi_schema
