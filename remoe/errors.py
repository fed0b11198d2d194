"""Everything that can go wrong, with what a client is told.

RemoeError
├── InvalidRequestError          400  the caller must change the request
│   ├── UnsupportedParameterError
│   └── ContextLengthError
├── AuthenticationError          401
├── PermissionDeniedError        403
├── NotFoundError                404
│   └── ModelNotFoundError
├── RequestTooLargeError         413
├── QueueFullError               429  retry later
├── RateLimitError               429  retry when the minute allows it
│   └── TokenRateLimitError
├── QuotaError                   429  not today
├── InternalError                500
├── UnavailableError             503  asleep, loading, draining
│   └── ExpertUnavailableError
├── DeadlineError                504
├── CheckpointError              (start-up) files missing, damaged, or of an unsupported family
└── SettingsError                (start-up) a setting is missing or out of range
"""

from __future__ import annotations

from typing import ClassVar, TypedDict

__all__ = [
    "AuthenticationError",
    "CheckpointError",
    "ContextLengthError",
    "DeadlineError",
    "ErrorEnvelope",
    "ExpertUnavailableError",
    "InternalError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "NotFoundError",
    "PermissionDeniedError",
    "QueueFullError",
    "QuotaError",
    "RateLimitError",
    "RemoeError",
    "RequestTooLargeError",
    "SettingsError",
    "TokenRateLimitError",
    "UnavailableError",
    "UnsupportedParameterError",
]


class ErrorBody(TypedDict):
    """OpenAI's error object; `code` is a string or null, never a number."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    error: ErrorBody


class RemoeError(Exception):
    """Base of all errors; the message says what happened and what to do about it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> ErrorEnvelope:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequestError(RemoeError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameterError(InvalidRequestError):
    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    code = "context_length_exceeded"


class AuthenticationError(RemoeError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDeniedError(RemoeError):
    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class NotFoundError(RemoeError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class RequestTooLargeError(RemoeError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class QueueFullError(RemoeError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retryable = True


class RateLimitError(RemoeError):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    retryable = True


class TokenRateLimitError(RateLimitError):
    type = "tokens"


class QuotaError(RemoeError):
    """Not retryable: the budget comes back at midnight, longer than any client waits."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"


class InternalError(RemoeError):
    code = "internal_error"


class UnavailableError(RemoeError):
    status = 503
    code = "model_loading"
    retryable = True


class ExpertUnavailableError(UnavailableError):
    code = "expert_unavailable"


class DeadlineError(RemoeError):
    status = 504
    code = "upstream_timeout"
    retryable = True


class CheckpointError(RemoeError):
    code = "checkpoint"


class SettingsError(RemoeError):
    code = "settings"
